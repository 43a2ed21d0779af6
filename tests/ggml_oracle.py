"""llama.cpp's own quantizer, from the wheel of pywhispercpp: an independent oracle.

The wheel (MIT) carries libggml-base as a plain shared library; nothing of Python in it is imported.
"""

import ctypes
import importlib.metadata
from functools import cache
from pathlib import Path

import gguf
import numpy as np

WHEEL = "pywhispercpp"


def library_path() -> Path | None:
    """Return where the wheel put libggml-base, or None if it is not installed."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = sorted(
        (file for file in files if file.name.startswith(("libggml-base", "ggml-base"))),
        key=lambda file: (len(file.parts), len(file.name)),
    )
    return Path(str(found[0].locate())) if found else None


@cache
def _library() -> ctypes.CDLL:
    path = library_path()
    assert path is not None, f"pip install {WHEEL}"
    library = ctypes.CDLL(str(path))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[pointer] * 2, *[count] * 3, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    return library


def quantize(values: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantize (rows, K) fp32 by ggml_quantize_chunk; importance: (K,) fp32.  Returns bytes."""
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    kind = gguf.GGMLQuantizationType[name]
    size, width = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((rows, columns // size * width), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    assert weights is None or weights.shape == (columns,)
    _library().ggml_quantize_init(int(kind))
    pointers = values.ctypes.data, out.ctypes.data
    last = None if weights is None else weights.ctypes.data
    written = _library().ggml_quantize_chunk(int(kind), *pointers, 0, rows, columns, last)
    assert written == out.nbytes
    return out
