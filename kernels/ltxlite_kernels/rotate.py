"""Rotations along K, which spread outliers over a group of inputs before rounding to int8.

Weights and activations turn by the same orthogonal matrix, so their products stay what they were.

SIGNS_128    Hadamard matrix of 128 (Sylvester's) after random signs, a hash of the input's number
REGULAR_256  H4⊗H4⊗H4⊗H4 of ConvRot: int8 ConvRot files hold their weights in this form already

Without signs, Sylvester's matrix gathers what all inputs share in one output: GELU's mean made the
error 1.4 times larger instead of smaller. Signs or a regular matrix help (kernels/README.md).
"""
# Triton publishes no types:
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="arg-type"

from enum import IntEnum

import torch
from torch import Tensor

from ltxlite_quant.formats import FormatError

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False


class Rotation(IntEnum):
    """How rows are turned along K: the size of a group."""

    NONE = 0
    SIGNS_128 = 128
    REGULAR_256 = 256

    @classmethod
    def of(cls, columns: int) -> "Rotation":
        """Return the best rotation that K allows.

        Errors are the same within 1 % (test_int8_quality); the regular one needs no signs, and
        8 to 20 registers less.
        """
        fitting = (one for one in (cls.REGULAR_256, cls.SIGNS_128) if columns % one == 0)
        return next(fitting, cls.NONE)

    def check(self, columns: int) -> None:
        """Raise FormatError unless K is whole groups."""
        if self and columns % self:
            raise FormatError(
                f"rotation {self.name} needs K % {self} == 0, got K = {columns}; rotate no such "
                "rows, or by a smaller group"
            )


def matrix(rotation: Rotation, device: torch.device) -> Tensor:
    """Return the symmetric matrix of signs (size, size), fp32; over √size it is orthogonal."""
    at = torch.arange(rotation, device=device)
    if rotation is Rotation.REGULAR_256:
        digits = at[:, None] ^ at[None, :]  # H4 is -1 where two base-4 digits add up to 3
        odd = digits & digits >> 1 & 0x55
    else:
        odd = at[:, None] & at[None, :]
    for shift in (4, 2, 1):
        odd = odd ^ odd >> shift
    return 1.0 - 2.0 * (odd & 1)


def signs(columns: int, device: torch.device) -> Tensor:
    """Return the signs of inputs 0..K-1 (K,), fp32: the top bit of a hash of the number."""
    mixed = torch.arange(columns, device=device) * _FIRST & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * _SECOND & 0xFFFFFFFF
    return 1.0 - 2.0 * (mixed >> 31)


# Odd numbers that mix well: 2^32 / golden ratio, and a prime of xxHash32 (its specification).
_FIRST, _SECOND = 0x9E3779B1, 0x85EBCA77

if HAVE_TRITON:
    FIRST, SECOND = tl.constexpr(_FIRST), tl.constexpr(_SECOND)

    @triton.jit
    def _factor(ROTATION: tl.constexpr, SLOW: tl.constexpr):  # noqa: N803
        # A symmetric (16, 16) of 0 and ±1, fp16: the matrix is the slow factor ⊗ the fast one.
        row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
        if ROTATION == 256:
            odd = (row ^ column) & ((row ^ column) >> 1)
            factor = 1 - 2 * ((odd ^ (odd >> 2)) & 1)
        else:
            odd = row & column & (7 if SLOW else 15)
            odd = odd ^ (odd >> 2)
            factor = 1 - 2 * ((odd ^ (odd >> 1)) & 1)
            if SLOW:  # two groups of 128 lie side by side: I2 ⊗ H8
                factor = tl.where(((row ^ column) & 8) == 0, factor, 0)
        return factor.to(tl.float16)

    @triton.jit
    def flipped(values, columns):
        """Change the signs of values by the numbers of their inputs; see `signs`."""
        mixed = columns.to(tl.uint32) * FIRST
        mixed = (mixed ^ (mixed >> 15)) * SECOND
        bits = values.to(tl.uint32, bitcast=True) ^ (mixed & 0x80000000)
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def rotated(values, columns, ROTATION: tl.constexpr):  # noqa: N803
        """Turn rows (G, 256) fp32 by the matrix of signs: √size times the rotation.

        Two products with factors of 16 instead of one with 128 or 256: 64 operations a value
        instead of 256 or 512. Values must be scaled to about ±16: fp16 holds them between factors.
        """
        GROUPS: tl.constexpr = values.shape[0]  # noqa: N806
        if ROTATION == 128:
            values = flipped(values, columns)
        fast = tl.reshape(values, (GROUPS * 16, 16)).to(tl.float16)
        turned = tl.dot(fast, _factor(ROTATION, False), out_dtype=tl.float32)
        slow = tl.permute(tl.reshape(turned, (GROUPS, 16, 16)), (0, 2, 1))
        slow = tl.reshape(slow, (GROUPS * 16, 16)).to(tl.float16)
        turned = tl.dot(slow, _factor(ROTATION, True), out_dtype=tl.float32)
        turned = tl.permute(tl.reshape(turned, (GROUPS, 16, 16)), (0, 2, 1))
        return tl.reshape(turned, (GROUPS, 256))
