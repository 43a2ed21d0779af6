"""Quantized tensors: formats, containers, decoders and encoders.

    formats      the one table of tensor formats, GGML type numbers, FormatError
    tensor       QuantTensor, the record that passes between modules
    decode       blocks -> values          encode    values -> blocks
    measure      how far a quantized tensor is from its source
    containers   open_container: a .safetensors or .gguf file by its content

Knows torch and numpy; no model, no kernel, no file name means anything here.
"""

from ltxlite_quant.formats import FORMATS, BlockFormat, FormatError
from ltxlite_quant.tensor import QuantTensor

__all__ = ["FORMATS", "BlockFormat", "FormatError", "QuantTensor"]
