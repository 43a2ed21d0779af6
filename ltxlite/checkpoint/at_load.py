"""Quantizes the large matrices of a network while it loads, for who has only the bf16 file."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ltxlite.checkpoint.packed import BlockState, block_parts
from ltxlite.errors import RequestError
from ltxlite_quant import encode, encode_scaled
from ltxlite_quant.formats import FORMATS, BlockFormat
from ltxlite_quant.tensor import QuantTensor

_NF4 = "BNB_NF4"
_NF4_BLOCK = 64
# What users call formats whose own names say how files store them.
_SHORT = {
    "fp8": "F8_E4M3_SCALED",
    "int8": "INT8",
    "nf4": _NF4,
    "nvfp4": "NVFP4_TILED",
    "mxfp8": "MXFP8",
}
# Module names of the matrices that hold nearly all weights: those of the repeated blocks. What is
# outside of them (AdaLN, projections in and out, tables) is small and sensitive.
_BLOCKS = {"transformer": re.compile(r"^blocks\."), "text_encoder": re.compile(r"^layers\.")}


@dataclass(frozen=True, slots=True)
class AtLoad:
    """How matrices are quantized as they are read, and on which device."""

    format: BlockFormat
    device: torch.device

    @classmethod
    def named(cls, name: str, device: torch.device) -> "AtLoad":
        """Return the rule for what the user calls a type; RequestError if it cannot be done."""
        spelled = _SHORT.get(name.lower(), name.upper())
        if spelled not in _encoders():
            raise RequestError(f"--quantize {name}: choose one of {', '.join(choices())}")
        rule = cls(FORMATS[spelled], device)
        if spelled == _NF4:
            _try_nf4(device)
        return rule

    def of(self, component: str) -> Callable[[str, Tensor | QuantTensor], QuantTensor | None]:
        """Return what a component's weights go through: a quantized one, or None to leave it."""
        return partial(self._quantized, _BLOCKS.get(component))

    def _quantized(
        self, blocks: re.Pattern[str] | None, name: str, loaded: Tensor | QuantTensor
    ) -> QuantTensor | None:
        if blocks is None or not blocks.match(name) or isinstance(loaded, QuantTensor):
            return None
        if loaded.dim() != 2 or loaded.shape[1] % self.format.block_size:
            return None
        return _encoders()[self.format.name](loaded.to(self.device), self.format)


def choices() -> list[str]:
    """Return what `--quantize` takes: names of block formats, and the short ones."""
    return [*encode.ENCODERS, *_SHORT]


def _encoders() -> Mapping[str, Callable[[Tensor, BlockFormat], QuantTensor]]:
    blocks = dict.fromkeys(encode.ENCODERS, encode.quantize)
    return blocks | dict.fromkeys(encode_scaled.ENCODERS, _scaled) | {_NF4: _nf4}


def _scaled(weight: Tensor, block_format: BlockFormat) -> QuantTensor:
    padded = encode_scaled.quantize_scaled(weight, block_format)
    shape = (weight.shape[0], weight.shape[1])
    return padded if padded.shape == shape else padded.cropped(shape)


def _nf4(weight: Tensor, block_format: BlockFormat) -> QuantTensor:
    from bitsandbytes.functional import quantize_4bit

    rows, columns = weight.shape
    codes, state = quantize_4bit(weight.contiguous(), blocksize=_NF4_BLOCK, quant_type="nf4")
    blocks = codes.view(torch.uint8).reshape(rows, columns // block_format.block_size)
    raw = {"scale": state.absmax, "code": state.code}
    parts = block_parts(raw, BlockState((rows, columns), _NF4_BLOCK))
    return QuantTensor(blocks, block_format, (rows, columns), parts)


def _try_nf4(device: torch.device) -> None:
    """Raise RequestError unless bitsandbytes has a 4-bit kernel for this device."""
    try:
        _nf4(torch.ones(2, _NF4_BLOCK, device=device), FORMATS[_NF4])
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise RequestError(
            f"--quantize nf4: bitsandbytes has no 4-bit kernels for {device.type} here "
            f"({str(error).splitlines()[0]:.120}); use --quantize Q4_0"
        ) from None
