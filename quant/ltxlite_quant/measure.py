"""How much a quantized tensor lost."""

from torch import Tensor

from ltxlite_quant.formats import FormatError
from ltxlite_quant.tensor import QuantTensor


def relative_rmse(quant: QuantTensor, source: Tensor) -> float:
    """Return the root mean square error of `quant` relative to that of `source` against zero.

    source: the tensor that was quantized, (..., K).  0 is lossless; Gaussian weights give 0.0054
    in Q8_0.  Raises FormatError if the shapes differ or `source` is all zero.
    """
    if tuple(source.shape) != quant.shape:
        raise FormatError(f"cannot compare {quant.shape} with a source of {tuple(source.shape)}")
    exact = source.detach().double()
    size = exact.norm().item()
    if size == 0:
        raise FormatError("the source is all zero (or empty), a relative error has no meaning")
    return float((quant.dequantize().double() - exact).norm().item() / size)
