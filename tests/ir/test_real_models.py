"""Every real model at hand: loads, lists sites, saves, and computes the same."""

from __future__ import annotations

import numpy as np

from sparsecc.ir import Model

SIZES = {"batch": 1, "N": 1, "B": 2, "T": 5, "sequence": 576, "sequence_length": 7, "seq": 7, "batch_size": 2}


def feed_for(model):
    rng = np.random.default_rng(0)
    feed = {}
    for spec in model.input_specs():
        shape = [size if isinstance(size, int) else SIZES.get(size, 1) for size in spec.shape]
        if spec.dtype.startswith("int"):
            feed[spec.name] = np.array(16000) if spec.name == "sr" else rng.integers(0, 2, shape)
        else:
            feed[spec.name] = rng.random(shape, np.float32)
    return feed


def test_round_trip_keeps_every_output(real_models, run, tmp_path):
    for path in real_models:
        model = Model.load(path)
        sites = model.sites()
        assert sites, path.name
        assert len({site.name for site in sites}) == len(sites)
        feed = feed_for(model)
        expected = run(path, feed)
        for external in (False, True):
            out = tmp_path / f"{path.stem}-{external}.onnx"
            model.save(out, external_data=external)
            for a, b in zip(expected, run(out, feed), strict=True):
                assert np.array_equal(a, b, equal_nan=True), path.name
            assert Model.load(out).fingerprint() == model.fingerprint()
        assert model.infer_shapes() is None, path.name


def test_sites_write_back_what_they_read(real_models):
    for path in real_models:
        model = Model.load(path)
        before = model.fingerprint()
        twin = model.copy()
        for site in twin.sites():
            weight = site.numpy()
            assert weight.shape == site.shape
            site.replace(weight)
        assert twin.fingerprint() == before, path.name
        twin.sites()[0].replace(np.zeros(twin.sites()[0].shape))
        assert model.fingerprint() == before


def test_minilm_is_found_whole(real_models):
    model = Model.load(real_models[-1])
    assert sum(site.op in ("MatMul", "Gemm") for site in model.sites()) >= 36
    assert all(isinstance(site.numpy(), np.ndarray) for site in model.sites())
