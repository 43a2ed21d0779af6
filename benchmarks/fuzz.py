"""Hostile headers: mutated safetensors and GGUF files must be opened or refused, nothing else.

Each mutation is a file of 1 MiB whose header was damaged or rewritten to lie. It is opened,
recognised, described and its tensors are loaded. Green means that nothing but our own errors came
out and that Python held no more bytes than the file has. A red line names the seed to replay.
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

from benchmarks.fuzz_seeds import FILE_BYTES, SEEDS, TEXTS
from benchmarks.harness import Case, Contestant, GateError
from ltxlite.checkpoint.files import ModelFiles, open_models
from ltxlite.cli.describe import describe
from ltxlite.errors import LtxliteError
from ltxlite.networks import Networks
from ltxlite_quant.formats import FormatError

DESCRIPTION = "open mutated headers of both containers"
# What opening any file costs: objects, and copies of the 64 KiB of a text that are being checked.
BESIDES_BYTES = 1 << 18
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
        _write(path, framed(kind, header, len(header)) + data, FILE_BYTES)
        _use(path)  # imports what is imported when it is used
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
    if chooser.random() < 0.1:  # declarations and scales lie among the data
        data = _overwritten(data, chooser)
    length = len(mutated) if chooser.random() < 0.95 else chooser.choice(EXTREMES)
    size = FILE_BYTES + grown if chooser.random() < 0.95 else chooser.randrange(1, FILE_BYTES)
    _write(path, framed(kind, mutated, length) + data, size)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        opened = _use(path)
    except Exception as error:
        raise GateError(f"{kind} mutation {seed}: {type(error).__name__}: {error}") from error
    held = tracemalloc.get_traced_memory()[1] - before
    size = path.stat().st_size
    if held > size + BESIDES_BYTES:
        raise GateError(f"{kind} mutation {seed}: {held} bytes held for a file of {size}")
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


def _write(path: Path, content: bytes, size: int) -> None:
    """Write a file of any size; what is beyond the content are holes, which cost nothing."""
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size)


def framed(kind: str, header: bytes, length: int) -> bytes:
    """Put before a header what its container wants: its length, in a safetensors file."""
    return struct.pack("<Q", length) + header if kind == "safetensors" else header


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


def _overwritten(data: bytes, chooser: random.Random) -> bytes:
    """Overwrite one value; with digits, often enough that JSON stays JSON."""
    out, at = bytearray(data), chooser.randrange(len(data) - 4)
    numbers = chooser.choice(EXTREMES[3:]) % (1 << 32), chooser.randrange(1000, 10000)
    out[at : at + 4] = chooser.choice((numbers[0].to_bytes(4, "little"), b"%d" % numbers[1]))
    return bytes(out)


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
            _mutate_text(parsed["__metadata__"], chooser)
    return json.dumps(parsed, ensure_ascii=True).encode()


def _reshape(info: dict[str, Any], chooser: random.Random) -> None:
    """Give a tensor another shape of the same bytes: a lie that no container can see."""
    shape = info.get("shape", [1])
    if chooser.random() < 0.5:
        info["shape"] = [1, *shape] if chooser.random() < 0.5 else [*shape, 1]
    else:
        chooser.shuffle(shape)
        info["shape"] = shape


def _mutate_text(metadata: dict[str, str], chooser: random.Random) -> None:
    """Rewrite one value, at any depth, of JSON that is itself a text of the header."""
    name = chooser.choice(list(TEXTS))
    parsed = place = json.loads(metadata[name])
    while True:
        key = chooser.choice(list(place))
        if not place[key] or not isinstance(place[key], dict) or chooser.random() < 0.1:
            break
        place = place[key]
    place[key] = chooser.choice(ODD_JSON)
    metadata[name] = json.dumps(parsed)
