"""The bytes of a GGUF header, and where every tensor will lie, before any tensor exists.

gguf.GGUFWriter streams too, but only forwards: it cannot go on in a file that a killed process
left. With all offsets known first, tensors are written in place and a journal says which are done.
Source of the layout: ggml docs/gguf.md (version 3); formats.md 1.0.
"""

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ltxlite_quant.formats import BlockFormat, FormatError, byte_count, shown
from ltxlite_quant.gguf import DEFAULT_ALIGNMENT, MAGIC, MAX_DIMENSIONS
from ltxlite_quant.policy import Decision

_VERSION = 3
_STRING, _ARRAY = 8, 9
_PACKED = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}
# ComfyUI's loader crops at 127 bytes; the longest name of LTX-2 has 78.
_LONGEST_NAME = 127


@dataclass(frozen=True, slots=True)
class Key:
    """A metadata value with GGUF's number of its type; of a list, the type of its elements."""

    kind: int
    value: Any


def text(value: str) -> Key:
    """Make a string, or a list of them."""
    return Key(_STRING, value)


def unsigned(value: int) -> Key:
    """Make an unsigned 32-bit number."""
    return Key(4, value)


def integer(value: int | list[int]) -> Key:
    """Make a signed 32-bit number, the only integer that ComfyUI-GGUF hands on, or a list."""
    return Key(5, value)


def number(value: float | list[float]) -> Key:
    """Make a 32-bit float, or a list of them."""
    return Key(6, value)


def texts(values: list[str]) -> Key:
    """Make a list of strings."""
    return Key(_STRING, values)


def boolean(value: bool) -> Key:
    """Make a truth value."""
    return Key(7, value)


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of the file to be: its logical shape and where its bytes go."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A GGUF file without its tensors' values."""

    header: bytes
    tensors: tuple[Placed, ...]
    size: int


def stored_dimensions(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the dimensions under which a tensor is stored: at least one, at most four.

    A convolution over time (O, I, 3, 3, 3) becomes (O, 27 I); its shape goes into a key.
    """
    if len(shape) <= MAX_DIMENSIONS:
        return shape or (1,)
    return shape[0], math.prod(shape[1:])


def shape_keys(decisions: Iterable[Decision]) -> dict[str, Key]:
    """Return the keys that keep shapes which GGUF or its tools lose.

    llama-quantize drops dimensions of one ([1, 4096], formats.md 6, case 2).
    """
    return {
        f"comfy.gguf.orig_shape.{item.name}": integer(list(item.shape))
        for item in decisions
        if stored_dimensions(item.shape) != item.shape
        or (len(item.shape) > 1 and item.shape[0] == 1)
    }


def lay_out(decisions: Iterable[Decision], keys: Mapping[str, Key]) -> Layout:
    """Place all tensors after the header, in the order given, each at a multiple of 32 bytes.

    Raises FormatError for names and values that GGUF cannot hold.
    """
    infos, sizes, offset = [], [], 0
    listed = list(decisions)
    for item in listed:
        if item.format.ggml_type is None or len(_string(item.name, item.name)) > 8 + _LONGEST_NAME:
            raise FormatError(f"{shown(item.name)}: GGUF holds no such name or {item.format.name}")
        infos.append(_info(item, offset))
        nbytes = byte_count(stored_dimensions(item.shape), item.format, item.name)
        sizes.append((offset, nbytes))
        offset += _aligned(nbytes)
    counts = struct.pack("<IQQ", _VERSION, len(listed), len(keys))
    values = [_string(name, name) + _value(key, name) for name, key in keys.items()]
    header = b"".join([MAGIC, counts, *values, *infos])
    header += bytes(_aligned(len(header)) - len(header))
    placed = tuple(
        Placed(item.name, item.shape, item.format, len(header) + start, nbytes)
        for item, (start, nbytes) in zip(listed, sizes, strict=True)
    )
    return Layout(header, placed, len(header) + offset)


def _info(item: Decision, offset: int) -> bytes:
    sizes = stored_dimensions(item.shape)[::-1]
    numbers = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return (
        _string(item.name, item.name) + numbers + struct.pack("<IQ", item.format.ggml_type, offset)
    )


def _value(key: Key, name: str) -> bytes:
    if not isinstance(key.value, list):
        return struct.pack("<I", key.kind) + _element(key.kind, key.value, name)
    head = struct.pack("<IIQ", _ARRAY, key.kind, len(key.value))
    return head + b"".join(_element(key.kind, value, name) for value in key.value)


def _element(kind: int, value: Any, name: str) -> bytes:
    if kind == _STRING:
        return _string(value, name)
    try:
        return struct.pack(_PACKED[kind], value)
    except (struct.error, OverflowError):
        raise FormatError(f"metadata {name!r} is {value!r:.40}, which fits no 32 bits") from None


def _string(value: str, name: str) -> bytes:
    try:
        encoded = value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        raise FormatError(f"metadata {shown(name)} is no Unicode text; leave it out") from None
    return struct.pack("<Q", len(encoded)) + encoded


def _aligned(nbytes: int) -> int:
    return -(-nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
