"""Which blocks are special: those whose loss hangs on how a few numbers happen to round.

On samples of anything smooth, a search for scales loses less than llama.cpp does; on constants,
outliers or almost nothing, either may be lucky.  Telling them apart takes about 1 % of the time of
a search, and of Gaussian blocks takes hardly one in a million for special.
"""

import torch
from torch import Tensor

from ltxlite_quant.decode_codebook import IQ4_VALUES

RUN = 16  # the smallest group of a format
# Of values below it, d is subnormal in every format; IQ4_NL multiplies it with the least.
TINY = IQ4_VALUES[-1] * 2.0**-14
HUGE = 2.0**15  # half of what fp16 holds
APART = 24  # root mean squares of the other values that make an outlier
# Energy over that of the second differences: noise has 1/6, a ramp much more.
SMOOTH = 64


def find_special(values: Tensor, largest: Tensor) -> Tensor:
    """Tell which blocks must be searched again: (n, block size) fp32 -> (n,) bool.

    largest: (n,), their largest magnitudes.
    They are neither zero nor a sample of anything smooth: nearly nothing or huge, an outlier among
    small values, a quarter of the values equal to their neighbours or to the largest, a ramp, or a
    run of 16 of which none is below a quarter of another (constants, zeros).
    """
    runs = values.view(len(values), -1, RUN)
    low, high = runs.amin(2), runs.amax(2)
    same = (values[:, 1:] == values[:, :-1]).sum(1) + (values.abs() == largest[:, None]).sum(1)
    outlier, energy = largest * largest, (values * values).sum(1)
    special = outlier * values.shape[1] > (energy - outlier) * APART**2
    special |= values.diff(n=2, dim=1).square_().sum(1) * SMOOTH < energy
    special |= (largest < TINY) | (largest > HUGE) | (same > values.shape[1] // 4)
    special |= (torch.maximum(low, -high) >= torch.maximum(high, -low) * 0.25).any(1)
    return special & (largest > 0)
