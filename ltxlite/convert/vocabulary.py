"""The pieces of a SentencePiece vocabulary, which a GGUF carries, out of either tokenizer file.

`tokenizer.model` lists them. `tokenizer.json` lists merges instead of scores; a piece's score is
then the place of its first merge, and what comes of it is compared with the original.
Source: google/sentencepiece sentencepiece_model.proto; formats.md 1.11.
"""

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ltxlite.checkpoint.files import OpenModel
from ltxlite.errors import CheckpointError
from ltxlite.models.spiece import KEYS, UNKNOWN, USER_DEFINED, serialized_pieces
from ltxlite.models.tokenizer import Tokenizer
from ltxlite.text_encoder import tokenizer_places

Piece = tuple[str, float, int]  # text, score, type

NORMAL, CONTROL, UNUSED, BYTE = 1, 3, 5, 6  # the rest are in `spiece`
_LONGEST = 48 << 20  # Gemma's tokenizer.json has 33 MB; parsed it takes several times as much
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_COMPARED = 64  # one piece in so many is tokenized in both ways
_TEXTS = (
    "A golden retriever,  running along the beach at dawn; the camera follows (slowly).",
    'She says: "Don\'t stop!"\n\n\tThen silence...   4K, 24 fps, f/1.8, 100% real — naïve café',
    "日本の海辺、夕焼け。 Привет, мир! 🐕‍🦺 مرحبا ñandú \u0301\u200b\x07",
    "<start_of_turn>user\nx<end_of_turn>\n ▁ <0x0A> snake_case CamelCase 3.14159",
)


def pieces_beside(model: OpenModel) -> list[Piece]:
    """Return the vocabulary inside a text encoder's file or beside it.

    Raises CheckpointError if there is none, or if it is damaged or cannot be expressed in pieces.
    """
    embedded = model.tensors.get("spiece_model")
    if embedded is not None:
        return list(pieces_of(embedded.values().numpy().tobytes(), str(model.path)))
    places = [place for near in tokenizer_places(model) for place in (near, near / "tokenizer")]
    searched = [place / name for name in ("tokenizer.model", "tokenizer.json") for place in places]
    for path in searched:
        if path.is_file():
            data = _read(path)
            return pieces_of_json(data, path) if path.suffix == ".json" else _pieces(data, path)
    raise CheckpointError(
        f"{model.path}: a GGUF carries its vocabulary, but there is no spiece_model in it and no "
        f"{' or '.join(map(str, searched))}; put tokenizer.model of google/gemma-3-12b-it there"
    )


def metadata_of(pieces: Iterable[Piece]) -> dict[str, Any]:
    """Return pieces as llama.cpp keeps them, by key."""
    listed = list(pieces)
    return {
        f"{KEYS}model": "llama",
        f"{KEYS}tokens": [_spelled(text, kind) for text, _, kind in listed],
        f"{KEYS}scores": [score for _, score, _ in listed],
        f"{KEYS}token_type": [kind for _, _, kind in listed],
    }


def pieces_of_json(data: bytes, path: Path) -> list[Piece]:
    """Return the pieces of a tokenizer.json, checked to give the same ids as it does itself.

    Raises CheckpointError if it is no byte-pair vocabulary, or one that pieces cannot express.
    """
    pieces = _from_merges(*_parsed(data, path), path)
    theirs = Tokenizer.from_json(data, str(path))
    built = serialized_pieces(metadata_of(pieces), str(path))
    ours = Tokenizer.from_sentencepiece(built, str(path))
    for text in (*_TEXTS, *(text.replace("▁", " ") for text, _, _ in pieces[::_COMPARED])):
        if ours.vocabulary.split(text) != theirs.vocabulary.split(text):
            raise CheckpointError(
                f"{path}: as SentencePiece pieces, which a GGUF needs, it would split {text!r:.60} "
                "in another way; put tokenizer.model of google/gemma-3-12b-it beside it"
            )
    return pieces


def _parsed(data: bytes, path: Path) -> tuple[list[str], dict[str, int], list[str]]:
    """Return texts by id, the types of added ones, and what merges make, in their order."""
    try:
        whole = json.loads(data)
        model, added = whole["model"], whole.get("added_tokens") or []
        ids = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
        kinds = {t["content"]: CONTROL if t["special"] else USER_DEFINED for t in added}
        kinds["<unk>"] = UNKNOWN
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        made = [left + right for left, right in pairs]
        texts = sorted(ids, key=ids.__getitem__)
        is_whole = sorted(ids.values()) == list(range(len(ids)))
        if model["type"] != "BPE" or model.get("byte_fallback") is not True or not is_whole:
            raise ValueError(f"a {model['type']!r:.20} model of {len(ids)} tokens")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: no vocabulary of byte pairs with ids from 0 on ({type(error).__name__}: "
            f"{error!s:.100}); put tokenizer.model of google/gemma-3-12b-it beside it"
        ) from None
    return texts, kinds, made


def _from_merges(
    texts: Sequence[str], kinds: Mapping[str, int], made: Iterable[str], path: Path
) -> list[Piece]:
    order: dict[str, int] = {}
    for text in made:
        order.setdefault(text, len(order))
    known = set(texts)
    if strange := next((text for text in order if text not in known), None):
        raise CheckpointError(f"{path}: its merges make {strange!r:.40}, which is no token of it")
    # What no merge makes is never chosen by its score.
    return [
        (text, -float(order.get(text, len(order) + number)), kinds.get(text) or _type(text))
        for number, text in enumerate(texts)
    ]


def _type(text: str) -> int:
    return BYTE if _BYTE.fullmatch(text) else NORMAL


def _spelled(text: str, kind: int) -> str:
    # llama.cpp compares user-defined tokens with the text as it is written.
    return text.replace("▁", " ") if kind == USER_DEFINED else text


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_LONGEST + 1)
    if len(data) > _LONGEST:
        raise CheckpointError(f"{path}: more than {_LONGEST >> 20} MiB, so not Gemma's tokenizer")
    return data


def _pieces(data: bytes, path: Path) -> list[Piece]:
    return list(pieces_of(data, str(path)))


def pieces_of(data: bytes, where: str) -> Iterator[Piece]:
    """Yield text, score and type of each piece of a serialized SentencePiece model.

    Raises CheckpointError if it is none.
    """
    try:
        for field, body in _fields(data):
            if field == 1 and isinstance(body, bytes):
                inner = dict(_fields(body))
                score = struct.unpack("<f", inner.get(2, bytes(4)))[0]
                yield inner[1].decode("utf-8"), score, int(inner.get(3, NORMAL))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError, struct.error):
        raise CheckpointError(
            f"{where}: its tokenizer is no SentencePiece model; download it again"
        ) from None


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Walk over a protobuf message: field numbers and raw values."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, position = _varint(data, position)
        else:
            size = {1: 8, 5: 4}[kind]
        if position + size > len(data):
            raise ValueError("a field ends behind the message")
        yield tag >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")
