"""A SentencePiece model rebuilt from the vocabulary that llama.cpp keeps in a GGUF's metadata.

The serialized form is a protobuf message of a handful of fields, written here directly: the
protobuf package would be needed for nothing else.
Source: google/sentencepiece sentencepiece_model.proto; formats.md 1.11.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from ltxlite.errors import CheckpointError

KEYS = "tokenizer.ggml."
UNKNOWN, USER_DEFINED = 2, 4  # types of pieces; NORMAL 1, CONTROL 3, UNUSED 5, BYTE 6
_TYPES = range(1, 7)
_BPE = 2
_SPACE = "▁"  # SentencePiece's own space
_FIELDS: tuple[tuple[str, type], ...] = (("tokens", str), ("scores", float), ("token_type", int))
_SPECIAL = (("unknown", 3), ("bos", 2), ("eos", 1), ("padding", 0))
_ADVICE = "take tokenizer.model of google/gemma-3-12b-it and put it beside the file"


def serialized_pieces(metadata: Mapping[str, Any], where: str) -> bytes:
    """Return the SentencePiece model that a GGUF's `tokenizer.ggml.*` keys describe.

    Byte-pair merges by score, no normalisation, nothing put before the text, bytes for unknown
    characters.  Raises CheckpointError if the keys are absent, disagree or are of another kind of
    tokenizer.
    """
    found = metadata.get(f"{KEYS}model")
    if found != "llama":
        raise CheckpointError(
            f"{where}: its tokenizer is {found!r}, which cannot be rebuilt as SentencePiece "
            f"('llama'); {_ADVICE}"
        )
    tokens, scores, types = (_listed(metadata, field, kind, where) for field, kind in _FIELDS)
    if not len(tokens) == len(scores) == len(types):
        raise CheckpointError(
            f"{where}: {len(tokens)} tokens, {len(scores)} scores and {len(types)} types do not "
            f"fit together; {_ADVICE}"
        )
    ids = {name: _special(metadata, f"{name}_token_id", default) for name, default in _SPECIAL}
    pieces = _pieces(tokens, scores, types, ids["unknown"])
    return b"".join([*pieces, _trainer(len(tokens), ids), _normalizer()])


def _listed(metadata: Mapping[str, Any], field: str, kind: type, where: str) -> list[Any]:
    values = metadata.get(KEYS + field)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise CheckpointError(f"{where}: no list of {KEYS}{field}, so no tokenizer; {_ADVICE}")
    return values


def _special(metadata: Mapping[str, Any], key: str, default: int) -> int:
    found = metadata.get(KEYS + key, default)
    return found if type(found) is int else default


def _pieces(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], unknown: int
) -> list[bytes]:
    pieces = []
    for number, (text, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        if number == unknown:  # some converters call it something else, without which nothing loads
            score, kind = 0.0, UNKNOWN
        elif kind == UNKNOWN or kind not in _TYPES:
            kind = 1
        if kind == USER_DEFINED:  # llama.cpp writes runs of spaces as such, SentencePiece escaped
            text = text.replace(" ", _SPACE)
        body = _text(1, text) + _varint(2 << 3 | 5) + struct.pack("<f", score) + _number(3, kind)
        pieces.append(_message(1, body))
    return pieces


def _trainer(count: int, ids: Mapping[str, int]) -> bytes:
    body = _number(3, _BPE) + _number(4, count) + _number(35, 1)  # model, size, byte fallback
    numbers = (ids["unknown"], ids["bos"], ids["eos"], ids["padding"])
    body += b"".join(_number(field, number) for field, number in enumerate(numbers, start=40))
    names = ("<unk>", "<bos>", "<eos>", "<pad>")
    return _message(2, body + b"".join(_text(field, name) for field, name in enumerate(names, 45)))


def _normalizer() -> bytes:
    # No prefix, no spaces removed, spaces escaped.
    return _message(3, _text(1, "identity") + _number(3, 0) + _number(4, 0) + _number(5, 1))


def _varint(number: int) -> bytes:
    out = bytearray()
    number &= (1 << 64) - 1
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())
