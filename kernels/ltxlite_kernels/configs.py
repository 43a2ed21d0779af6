"""Launch configurations: chosen once, by measurement or static count, never tuned at run time."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class DequantConfig:
    """How one format is decoded: blocks a program takes, its warps, bytes its loads align to."""

    blocks: int
    warps: int
    alignment: int


DEQUANT: Mapping[str, DequantConfig] = MappingProxyType(
    {
        # 34-byte blocks start at even addresses only, so the widest load is two bytes.
        "Q8_0": DequantConfig(blocks=64, warps=4, alignment=2),
    }
)
