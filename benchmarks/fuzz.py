"""Hostile headers: mutated safetensors and GGUF files must be opened or refused, nothing else.

Each mutation is a file of 1 MiB whose header was damaged or rewritten to lie. It is opened,
recognised, described and its tensors are loaded. Green means that nothing but our own errors came
out and that Python held no more than a text of the file's size takes. A red line names the seed
to replay.
"""

import argparse
import json
import random
import struct
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fuzz_seeds import FILE_BYTES, SEEDS
from benchmarks.harness import Case, Contestant, GateError
from ltxlite.checkpoint.files import ModelFiles, open_models
from ltxlite.cli.describe import describe
from ltxlite.errors import LtxliteError
from ltxlite.networks import Networks
from ltxlite_quant.formats import FormatError

DESCRIPTION = "open mutated headers of both containers"
# A text that is no UTF-8 is there twice: as read so far, and in the error.
ALLOWED_BYTES = 2 * FILE_BYTES
OWN_ERRORS = (FormatError, LtxliteError)
EXTREMES = (0, 1, 2, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 47, (1 << 63) - 1, (1 << 64) - 1)
ODD_JSON: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 3, 4096, 1 << 31, 1 << 62, 10**400, 1e308, -0.5),
    *(float("nan"), float("inf"), "", "BF16", "F8_E8M0", "x" * 999, "\ud800", "\x00"),
    *([], [0], [-1], [1 << 47, 1 << 47], [[]], [None], {}, {"shape": []}, {"layers": []}),
)

Tensors = dict[str, Tensor]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare what only this benchmark takes."""
    parser.add_argument("--mutations", type=int, default=100_000, help="in all [100000]")
    parser.add_argument("--seed", type=int, default=0, help="of the first mutation [0]")


def cases(options: argparse.Namespace) -> list[Case]:
    """Return one case a container; the gate and every run open a batch of their own."""
    each = -(-options.mutations // (len(SEEDS) * (options.runs + 1)))
    facts = {"mutations": each * (options.runs + 1), "file_bytes": FILE_BYTES}
    return [
        Case(name, facts, 0.0, partial(_contestants, name, options.seed, each)) for name in SEEDS
    ]


def _contestants(kind: str, seed: int, count: int) -> Iterator[Contestant]:
    batches = iter(range(seed, 1 << 62, count))

    def run() -> dict[str, Tensor]:
        first = next(batches)
        opened = storm(kind, range(first, first + count))
        return {"outcomes": torch.tensor([float(opened), float(count)])}

    yield Contestant("ltxlite", run)


def storm(kind: str, seeds: range) -> int:
    """Open one mutation a seed; return how many were opened.

    Raises GateError for a foreign exception or too much memory, naming the seed.
    """
    with tempfile.TemporaryDirectory() as folder:
        header, data = SEEDS[kind](Path(folder))
        path = Path(folder) / "mutated.bin"
        _survives(kind, seeds[0], header, data, path)  # imports what is imported when used
        tracemalloc.start()
        try:
            return sum(_survives(kind, seed, header, data, path) for seed in seeds)
        finally:
            tracemalloc.stop()


def _survives(kind: str, seed: int, header: bytes, data: bytes, path: Path) -> bool:
    chooser = random.Random(f"{kind} {seed}")
    mutated = _mutated_json(header, chooser) if kind == "safetensors" else header
    mutated = _mutated_bytes(mutated, chooser, half=kind == "safetensors")
    grown = len(mutated) - len(header)
    _write(path, _framed(kind, mutated, chooser) + data, FILE_BYTES + grown, chooser)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        opened = _use(path)
    except Exception as error:
        raise GateError(f"{kind} mutation {seed}: {type(error).__name__}: {error}") from error
    held = tracemalloc.get_traced_memory()[1] - before
    if held > ALLOWED_BYTES:
        raise GateError(f"{kind} mutation {seed}: {held} bytes held for a file of {FILE_BYTES}")
    return opened


def _use(path: Path) -> bool:
    """Do with a file what a run does before it computes; tell whether it could be opened."""
    try:
        (model,) = open_models(path)
        describe(model)
    except OWN_ERRORS:
        return False
    networks = Networks(ModelFiles([model]), torch.device("cpu"), torch.float32)
    with suppress(*OWN_ERRORS):
        networks.tokenizer()
    for stored in model.tensors.values():
        with suppress(*OWN_ERRORS):
            stored.load()
    return True


def _write(path: Path, content: bytes, size: int, chooser: random.Random) -> None:
    with path.open("wb") as file:
        file.write(content)
        # Now and then cut short; holes of a sparse file cost nothing.
        file.truncate(size if chooser.random() < 0.95 else chooser.randrange(1, size))


def _framed(kind: str, header: bytes, chooser: random.Random) -> bytes:
    if kind != "safetensors":
        return header
    length = len(header) if chooser.random() < 0.95 else chooser.choice(EXTREMES)
    return struct.pack("<Q", length) + header


def _mutated_bytes(header: bytes, chooser: random.Random, half: bool) -> bytes:
    """Flip, overwrite, cut or repeat a few bytes; only half of the files, if so wished."""
    if half and chooser.random() < 0.5:
        return header
    out = bytearray(header)
    for _ in range(chooser.choice((1, 1, 1, 2, 5))):
        at = chooser.randrange(len(out))
        match chooser.randrange(5):
            case 0:
                out[at] ^= 1 << chooser.randrange(8)
            case 1:
                size = chooser.choice((4, 8))
                number = chooser.choice(EXTREMES) % (1 << 8 * size)
                out[at : at + size] = number.to_bytes(size, "little")
            case 2:
                del out[at : at + chooser.randrange(1, 16)]
            case 3:
                out[at:at] = out[at : at + chooser.randrange(1, 64)]
            case _:
                out[at] = chooser.randrange(256)
    return bytes(out) or b"\0"


def _mutated_json(header: bytes, chooser: random.Random) -> bytes:
    """Rewrite one value, field or name of a header that stays valid JSON."""
    parsed = json.loads(header)
    name = chooser.choice(list(parsed))
    match chooser.randrange(6):
        case 0:
            parsed[name] = chooser.choice(ODD_JSON)
        case 1:
            parsed[name][chooser.choice(list(parsed[name]))] = chooser.choice(ODD_JSON)
        case 2:
            parsed[chooser.choice((*parsed, "", "x" * 5000, "blk.0.y"))] = parsed.pop(name)
        case 3:
            del parsed[name]
        case 4:
            _reshape(parsed[name], chooser)
        case _:
            _mutate_config(parsed["__metadata__"], chooser)
    return json.dumps(parsed, ensure_ascii=True).encode()


def _reshape(info: dict[str, Any], chooser: random.Random) -> None:
    """Give a tensor another shape of the same bytes: a lie that no container can see."""
    shape = info.get("shape", [1])
    if chooser.random() < 0.5:
        info["shape"] = [1, *shape] if chooser.random() < 0.5 else [*shape, 1]
    else:
        chooser.shuffle(shape)
        info["shape"] = shape


def _mutate_config(metadata: dict[str, str], chooser: random.Random) -> None:
    config = json.loads(metadata["config"])
    section = config[chooser.choice(list(config))]
    section[chooser.choice(list(section))] = chooser.choice(ODD_JSON)
    metadata["config"] = json.dumps(config)
