"""What the machine that will run the model can do."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from sparsecc.errors import SpecError
from sparsecc.target.cores import core_processors, core_speeds
from sparsecc.target.spec import format_spec, parse_specs, suggestion

__all__ = ["TARGET_NAMES", "Target", "host_features", "host_processors"]


TARGET_NAMES = ("cpu", "cuda", "arm64")

_ISA_BY_FLAGS = (  # best first: the flags /proc/cpuinfo must show for the kernels of that path
    ("avx512", frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})),
    ("avx2", frozenset({"avx2", "fma"})),
    ("neon", frozenset({"asimd"})),
)

#: What kernels for int8 and bf16 use beyond that, in the names of /proc/cpuinfo.
_FEATURES = (
    "avx_vnni", "avx512_vnni", "avx512vbmi", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A kind of machine and what is known about it; ``None`` means "as found on the machine".

    Attributes:
        name: ``cpu``, ``cuda`` or ``arm64``.
        isa: instruction set path of the kernels: ``generic``, ``avx2``, ``avx512`` or ``neon``.
        cores: physical cores available to this process.
        threads: threads the model will run on.
        l1_bytes: data cache of one core; ``l2_bytes`` its second level; ``l3_bytes`` the shared last level.
        sm: CUDA compute capability times ten, for instance 90.
        speeds: of the cores relative to each other, where they are not all alike (big.LITTLE), in the order of their
            processors' numbers.

    ``str(target)`` and ``Target.parse`` are inverse: ``cpu{threads=2}``, ``arm64{speeds="446,446,1024,1024"}``.
    """

    name: str = "cpu"
    isa: str | None = None
    cores: int | None = None
    threads: int | None = None
    l1_bytes: int | None = None
    l2_bytes: int | None = None
    l3_bytes: int | None = None
    sm: int | None = None
    speeds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.name not in TARGET_NAMES:
            hint = suggestion(self.name, TARGET_NAMES)
            raise SpecError(f"unknown target '{self.name}'{hint}; known: {', '.join(TARGET_NAMES)}")
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int) and value < 1:
                raise SpecError(f"target option '{item.name}' must be at least 1, got {value}")
        if self.speeds is not None:
            _check_speeds(self.speeds, self.cores)

    @classmethod
    def parse(cls, text: str) -> Target:
        """Return the target that ``text`` describes.

        Raises:
            SpecError: bad grammar, unknown target or unknown option (the known ones are listed).
        """
        specs = parse_specs(text)
        if len(specs) != 1:
            raise SpecError(f"expected one target such as 'cpu{{threads=2}}', got '{text}'")
        known = [item.name.replace("_", "-") for item in fields(cls) if item.name != "name"]
        values: dict[str, int | str | tuple[int, ...]] = {}
        for key, value in specs[0].options.items():
            if key not in known:
                hint = suggestion(key, known)
                raise SpecError(f"target has no option '{key}'{hint}; known: {', '.join(known)}")
            if key == "speeds":
                values[key] = tuple(_parse_count(key, speed) for speed in value.split(","))
            else:
                values[key.replace("-", "_")] = value if key == "isa" else _parse_count(key, value)
        return cls(specs[0].name, **values)  # type: ignore[arg-type]  # the loop above typed them by name

    @classmethod
    def host(cls) -> Target:
        """Return this machine with every CPU field known (read from ``/proc`` and ``/sys`` where there)."""
        return cls("arm64" if platform.machine() in ("aarch64", "arm64") else "cpu").resolved()

    def resolved(self) -> Target:
        """Return a copy whose unknown CPU fields hold what this machine has; ``sm`` stays as it is.

        ``speeds`` are those of this machine if it has as many cores, and stay unknown where its cores are alike.
        """
        found = _host_facts()
        cores = self.cores or (len(self.speeds) if self.speeds else len(found.processors))
        isa = self.isa or ("neon" if self.name == "arm64" else found.isa)
        return Target(
            self.name,
            isa,
            cores=cores,
            threads=self.threads or cores,
            l1_bytes=self.l1_bytes or found.l1_bytes,
            l2_bytes=self.l2_bytes or found.l2_bytes,
            l3_bytes=self.l3_bytes or found.l3_bytes,
            sm=self.sm,
            speeds=self.speeds or (found.speeds if cores == len(found.processors) else None),
        )

    def __str__(self) -> str:
        options = {
            item.name.replace("_", "-"): ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            for item in fields(self)
            if item.name != "name" and (value := getattr(self, item.name)) is not None
        }
        return format_spec(self.name, options)


def _parse_count(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SpecError(f"target option '{key}' must be a whole number, got '{text}'") from None


def _check_speeds(speeds: tuple[int, ...], cores: int | None) -> None:
    if not speeds or any(speed < 1 for speed in speeds):
        raise SpecError(f"target option 'speeds' must be numbers of at least 1, got {list(speeds)}")
    if cores not in (None, len(speeds)):
        raise SpecError(
            f"target option 'speeds' has {len(speeds)} numbers for {cores} cores: give one for each"
        )


def host_features() -> tuple[str, ...]:
    """Return the extensions for int8 and bf16 that this processor has, in the names of ``/proc/cpuinfo``."""
    return _host_facts().features


def host_processors() -> tuple[int, ...]:
    """Return the processors that ``Target.host()`` counts as cores, one of each, in the order of its ``speeds``."""
    return _host_facts().processors


@dataclass(frozen=True)
class _Host:
    isa: str
    features: tuple[str, ...]
    processors: tuple[int, ...]
    speeds: tuple[int, ...] | None
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int


@cache
def _host_facts() -> _Host:
    cpuinfo = _read("/proc/cpuinfo")
    flag_lines = re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    flags = set(flag_lines[0].split()) if flag_lines else set()
    isa = next((name for name, needed in _ISA_BY_FLAGS if needed <= flags), "generic")
    caches = [_cache_bytes(level) for level in (1, 2, 3)]
    processors = core_processors(cpuinfo)
    return _Host(
        isa,
        tuple(name for name in _FEATURES if name in flags),
        processors,
        core_speeds(processors, _read),
        caches[0] or 32 << 10,
        caches[1] or 1 << 20,
        caches[2] or 8 << 20,
    )


def _cache_bytes(level: int) -> int | None:
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(folder / "level").strip() != str(level) or _read(folder / "type").strip() == "Instruction":
            continue
        match = re.fullmatch(r"(\d+)([KM]?)", _read(folder / "size").strip())
        if match:
            return int(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[match[2]]
    return None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
