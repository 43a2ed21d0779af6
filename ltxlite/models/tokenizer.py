"""Prompt to token ids, by Gemma's vocabulary in either of its two file forms.

`tokenizer.model` (SentencePiece) also travels inside single-file text encoders as the tensor
`spiece_model`; `tokenizer.json` is the form of the tokenizers package. Both give the same ids.
Source: LTX-2 400fd31, ltx_core/text_encoders/gemma/tokenizer.py; model.md 3.2.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from ltxlite.errors import CheckpointError, RequestError

MAX_TOKENS = 1024  # of a prompt, its <bos> included
_BOS, _PAD = "<bos>", "<pad>"
_MAX_BYTES = 256 << 20  # Gemma's tokenizer.json is 33 MB, its tokenizer.model 4.7 MB
# Tokens that Hugging Face appends to the vocabulary where the SentencePiece model lacks them.
_APPENDED = ("<mask>", "<image_soft_token>")


class Vocabulary(Protocol):
    """What a tokenizer file must be able to do."""

    size: int

    def id_of(self, token: str) -> int | None:
        """Return the id of a special token, None if there is none."""

    def split(self, text: str) -> list[int]:
        """Return the ids of a text as it stands: nothing stripped, added or cut."""


class SentencePieceVocabulary:
    """A SentencePiece model that also knows its control tokens when they are written out."""

    def __init__(self, data: bytes, where: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise _unreadable(where, "SentencePiece model", error) from error
        count = self._model.vocab_size()
        special = {
            self._model.id_to_piece(number): number
            for number in range(count)
            if self._model.is_control(number) or self._model.is_unknown(number)
        }
        for token in _APPENDED:
            if self._model.piece_to_id(token) == self._model.unk_id():
                special[token] = count
                count += 1
        self.size = count
        self._special = special
        longest_first = sorted(special, key=len, reverse=True)
        self._written = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def id_of(self, token: str) -> int | None:
        """Return the id of a special token, None if there is none."""
        return self._special.get(token)

    def split(self, text: str) -> list[int]:
        """Return the ids of a text as it stands."""
        ids: list[int] = []
        for part in self._written.split(text):
            found = self._special.get(part)
            ids.extend(self._model.encode(part) if found is None else [found])
        return ids


class JsonVocabulary:
    """A `tokenizer.json`; its own truncation, padding and template are switched off."""

    def __init__(self, data: bytes, where: str) -> None:
        from tokenizers import Tokenizer as Reader

        try:
            self._reader = Reader.from_buffer(data)
        except ValueError as error:
            raise _unreadable(where, "tokenizer.json", error) from error
        self._reader.no_truncation()
        self._reader.no_padding()
        self.size = int(self._reader.get_vocab_size())

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, None if there is none."""
        found: int | None = self._reader.token_to_id(token)
        return found

    def split(self, text: str) -> list[int]:
        """Return the ids of a text as it stands."""
        ids: list[int] = self._reader.encode(text, add_special_tokens=False).ids
        return ids


def _unreadable(where: str, kind: str, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(f"{where}: not a readable {kind} ({reason:.200}); download it again")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a prompt, <bos> in front, and how many tokens were cut off its end."""

    ids: tuple[int, ...]
    cut: int = 0


class Tokenizer:
    """Gemma's tokenizer as LTX uses it: stripped text, one <bos>, no <eos>, at most 1024 ids."""

    def __init__(self, vocabulary: Vocabulary, where: str) -> None:
        """Wrap a vocabulary; raises CheckpointError if it has no <bos> or <pad>."""
        bos, pad = vocabulary.id_of(_BOS), vocabulary.id_of(_PAD)
        if bos is None or pad is None:
            raise CheckpointError(
                f"{where}: no {_BOS} or {_PAD} among {vocabulary.size} tokens, so not Gemma's; "
                "take tokenizer.model or tokenizer.json of google/gemma-3-12b-it"
            )
        self.vocabulary, self.where = vocabulary, where
        self.bos, self.pad = bos, pad

    @classmethod
    def from_sentencepiece(cls, data: bytes, where: str) -> Self:
        """Read a serialized SentencePiece model; raises CheckpointError if it is none."""
        return cls(SentencePieceVocabulary(data, where), where)

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Self:
        """Read the bytes of a tokenizer.json; raises CheckpointError if they are none."""
        return cls(JsonVocabulary(data, where), where)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a tokenizer file of either form; raises CheckpointError if it is none."""
        data = _read(path)
        json = path.suffix == ".json"
        return cls.from_json(data, str(path)) if json else cls.from_sentencepiece(data, str(path))

    def encode(self, text: str, max_tokens: int = MAX_TOKENS) -> Encoded:
        """Turn a prompt into at most `max_tokens` ids; what is cut off is counted.

        Raises RequestError if the text is no valid Unicode.
        """
        if re.search("[\ud800-\udfff]", text):
            raise RequestError("the prompt is not valid Unicode text; save it as UTF-8")
        ids = self.vocabulary.split(text.strip())
        if ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        return Encoded(tuple(ids[:max_tokens]), max(0, len(ids) - max_tokens))

    def left_padded(self, ids: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask (length,) int64 with padding in front, as the references see them."""
        kept = list(ids[:length])
        blank = length - len(kept)
        padded = torch.tensor([self.pad] * blank + kept, dtype=torch.int64)
        mask = torch.tensor([0] * blank + [1] * len(kept), dtype=torch.int64)
        return padded, mask


def find_tokenizer(*places: Path) -> Tokenizer:
    """Read the first tokenizer at the places given: files, or folders that hold one.

    In a folder, and in its subfolder `tokenizer`, `tokenizer.model` goes before `tokenizer.json`.
    Raises CheckpointError with all that was searched if there is none.
    """
    searched = [path for place in places for path in _candidates(place)]
    for path in searched:
        if path.is_file():
            return Tokenizer.from_file(path)
    raise CheckpointError(
        f"no tokenizer found; searched {', '.join(map(str, searched)) or 'nowhere'}; put "
        "tokenizer.model of google/gemma-3-12b-it beside the text encoder"
    )


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Raise CheckpointError unless a tokenizer fits an embedding table of `rows` rows.

    A wrong tokenizer gives every prompt the same picture, or ids without an embedding. Tables
    are padded to a multiple of 64 rows; those of GGUF files lack the image token's row.
    """
    size = tokenizer.vocabulary.size
    if not size - len(_APPENDED) <= rows <= 2 * size:
        raise CheckpointError(
            f"{tokenizer.where}: {size} tokens, but the text encoder has {rows} embeddings; "
            "they belong to different models, take the tokenizer of the text encoder"
        )
    ids = {tokenizer.encode(text).ids for text in ("a red house", "two dogs swim")}
    if len(ids) < 2:
        raise CheckpointError(
            f"{tokenizer.where}: different prompts give the same tokens; the file is damaged"
        )


def _candidates(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    folders = (place, place / "tokenizer")
    return [folder / name for folder in folders for name in ("tokenizer.model", "tokenizer.json")]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > _MAX_BYTES:
        raise CheckpointError(f"{path}: larger than 256 MiB, so no tokenizer")
    return data
