"""What rows are rounded to: the type of codes, the rotation before it, the largest code."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ltxlite_kernels.rotate import Rotation
from ltxlite_quant.formats import FormatError

# The largest code a type has, or is meant to have: 64 products of fp16 codes up to 64 and weights
# up to 15.5 can be summed in fp16 (kernels.md 5).
LARGEST: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.int8: 127.0, torch.float16: 64.0, torch.float8_e4m3fn: 448.0}
)
# The same for fp8 on both sides. e4m3 keeps its relative error: only values 2^14 below the largest
# of a row, instead of 2^18, are rounded more coarsely.
LARGEST_FP8_SUMMED_IN_FP16 = 28.0


@dataclass(frozen=True, slots=True)
class Coding:
    """How a row becomes codes and one scale: rotated, divided by the scale, rounded half to even.

    dtype: int8, float16 or float8_e4m3fn.  limit: the largest code; None for 127, 64 or 448.
    int8 and fp8 take the scale absmax / limit.  fp16 takes a power of two, which keeps bf16 and
    fp16 values exact down to 2^-19 of their row's largest, so codes lie below a limit that must be
    a power of two itself.  Raises FormatError for anything else.
    """

    dtype: torch.dtype = torch.int8
    rotation: Rotation = Rotation.NONE
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.dtype not in LARGEST:
            known = ", ".join(str(one) for one in LARGEST)
            raise FormatError(f"codes are {known}, got {self.dtype}")
        fp16 = self.dtype == torch.float16
        most = 32768.0 if fp16 else LARGEST[self.dtype]
        if not 1 <= self.largest <= most or (fp16 and math.frexp(self.largest)[0] != 0.5):
            raise FormatError(
                f"the largest code is {self.limit}, wanted 1 to {most:g} for {self.dtype}"
                + (", a power of two" if fp16 else "")
            )

    @classmethod
    def of(cls, given: "Coding | Rotation") -> "Coding":
        """Return a coding as it is, and int8 for a rotation."""
        return given if isinstance(given, Coding) else cls(rotation=given)

    @property
    def largest(self) -> float:
        """Return the largest code."""
        return LARGEST[self.dtype] if self.limit is None else self.limit

    @property
    def step(self) -> float:
        """Return the scale of a row whose largest value, for fp16 its power of two, is one."""
        return (2.0 if self.dtype == torch.float16 else 1.0) / self.largest
