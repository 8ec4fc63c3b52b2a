"""The picture of cuts: every part is there, and text of strangers stays text."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from sparsecc.algebra import Tensor, Walk, split
from sparsecc.algebra.picture import cuts_svg


def random_tensor(seed, shape, form):
    dense = (np.random.default_rng(seed).random(shape) < 0.5) * 1.0
    return Tensor.from_coordinates(np.argwhere(dense), dense[dense != 0], shape, form)


@pytest.mark.parametrize(
    ("shape", "form"), [((40, 25), "csr"), ((40,), "csf"), ((12, 300, 7), "csf"), ((7, 15), "coo")]
)
def test_picture_is_xml_and_colours_every_part(shape, form):
    tensor = random_tensor(0, shape, form)
    walks = [Walk.of(tensor)]
    table = split(walks, 4)
    text = cuts_svg(walks, table, [("equal <rows>", np.array([3, 0, 1, 2]))], "a & b")
    root = ET.fromstring(text)
    words = [item.text for item in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words[0] == "a & b"
    assert words[-1].startswith("equal <rows>: largest ")
    drawn = [item for item in root.iter("{http://www.w3.org/2000/svg}rect") if "opacity" in item.attrib]
    assert len({item.get("fill") for item in drawn}) == 4
    bars = [item for item in root.iter("{http://www.w3.org/2000/svg}rect") if item not in drawn]
    assert len(bars) == 2 + 4 + 4  # ground, frame, and a bar for each part of either way
    steps = [i for i in root.iter("{http://www.w3.org/2000/svg}path") if i.get("stroke-width") == "0.8"]
    assert len(steps) == 3


def test_pictures_of_nothing_and_of_very_many_parts():
    empty = Tensor.from_coordinates(np.zeros((0, 2), np.int64), np.zeros(0), (3, 5), "csr")
    walks = [Walk.of(empty)]
    ET.fromstring(cuts_svg(walks, split(walks, 2), [], "empty"))
    walks = [Walk.of(random_tensor(1, (60, 60), "csr"))]
    assert len(cuts_svg(walks, split(walks, 5000), [], "many")) < 500_000
