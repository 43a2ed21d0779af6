"""Decoding to bf16 beside gguf-py and the torch operations of ComfyUI-GGUF.

ComfyUI-GGUF's algorithm is written anew here from its description (formats.md 2): whole tensors,
byte by byte, in fp32, then rounded. gguf-py stops at fp32, which spares it the rounding.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case, Contestant
from ltxlite_quant import FORMATS, QuantTensor
from ltxlite_quant.search import quantize

DESCRIPTION = "decoders beside gguf-py's and ComfyUI-GGUF's algorithm"
TOLERANCE = 2.0**-8  # one rounding to bf16 is 2^-9 of a value
ROWS = COLUMNS = 4096


def _halves(blocks: Tensor, start: int, stop: int) -> Tensor:
    return blocks[:, start:stop].contiguous().view(torch.float16).float()


def _split(packed: Tensor, width: int, bits: int) -> Tensor:
    # (n, bytes) -> (n, bytes * 8 / bits / width, width), all low parts of `width` bytes first
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    parts = packed.reshape(len(packed), -1, 1, width) >> shifts
    return (parts & (1 << bits) - 1).reshape(len(packed), -1, width)


def _q8_0(blocks: Tensor) -> Tensor:
    return _halves(blocks, 0, 2) * blocks[:, 2:].view(torch.int8)


def _scales_minimums(blocks: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scales = torch.cat([first & 63, (third & 15) | (first >> 2 & 48)], dim=1)
    minimums = torch.cat([second & 63, (third >> 4) | (second >> 2 & 48)], dim=1)
    return (
        (_halves(blocks, 0, 2) * scales)[:, :, None],
        (_halves(blocks, 2, 4) * minimums)[:, :, None],
    )


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minimums = _scales_minimums(blocks)
    return (scales * _split(blocks[:, 16:], 32, 4) - minimums).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minimums = _scales_minimums(blocks)
    codes = _split(blocks[:, 48:], 32, 4) | _split(blocks[:, 16:48], 32, 1) << 4
    return (scales * codes - minimums).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _split(blocks[:, :128], 64, 4).reshape(-1, 8, 32)
    codes = (low | _split(blocks[:, 128:192], 32, 2) << 4).view(torch.int8) - 32
    scales = _halves(blocks, 208, 210) * blocks[:, 192:208].view(torch.int8)
    return (scales[:, :, None] * codes.view(-1, 16, 16)).flatten(1)


TORCH_OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q6_K": _q6_k,
    "Q5_K": _q5_k,
    "Q4_K": _q4_k,
}


def _whole(name: str, blocks: Tensor) -> Tensor:
    decoded = TORCH_OPS[name](blocks.view(-1, FORMATS[name].block_bytes))
    return decoded.to(torch.bfloat16).view(ROWS, COLUMNS)


def _gguf_py(name: str, raw: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]))


def _contestants(quant: Callable[[], QuantTensor], facts: dict[str, Any]) -> Iterator[Contestant]:
    made = quant()
    name, blocks = made.format.name, made.blocks
    facts["copy_gb_s"] = round(_copy_speed(), 2)
    yield Contestant("ltxlite", lambda: {"values": made.dequantize(torch.bfloat16)})
    yield Contestant("gguf-py", lambda: {"values": _gguf_py(name, blocks.numpy())})
    yield Contestant("torch ops", lambda: {"values": _whole(name, blocks)})


def _copy_speed() -> float:
    # GB/s of writing the bf16 result by a plain copy, the best of ten
    source = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)
    target = torch.ones_like(source)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return source.nbytes / min(times) / 1e9


def _random(name: str) -> QuantTensor:
    source = torch.randn(ROWS // 16, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.02
    few = quantize(source, FORMATS[name])
    return QuantTensor(few.blocks.repeat(16, 1), few.format, (ROWS, COLUMNS))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this benchmark can be told: nothing."""


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield the formats that checkpoints use most."""
    for name in TORCH_OPS:
        facts: dict[str, Any] = {"rows": ROWS, "columns": COLUMNS, "dtype": "bf16"}
        build = partial(_contestants, partial(_random, name), facts)
        yield Case(name, facts, TOLERANCE, build, elements=ROWS * COLUMNS)
