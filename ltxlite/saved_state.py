"""The state of a stopped run as a file: a `Progress` and the conditions under which it holds.

A safetensors file of a few MB: latents, what the sampler carries, predictions kept for reuse; its
metadata says of which job, which model files and which software, how far the run was, and a
checksum of it all. No pickle: a hostile file can be refused, but does nothing.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor

import ltxlite
from ltxlite.checkpoint.files import SUFFIXES
from ltxlite.denoise import reused_names
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.geometry import ClipShape
from ltxlite.given.takes import stage_takes
from ltxlite.given.voice import voice_tokens
from ltxlite.networks import Networks
from ltxlite.request import Request
from ltxlite.sampling.contract import NoiseKind, Position
from ltxlite.sampling.samplers import SAMPLERS
from ltxlite.stage_shapes import stage_shape
from ltxlite.stages import (
    SDE_KINDS,
    Latents,
    Progress,
    latent_sizes,
    step_count,
    token_sizes,
)
from ltxlite_quant.safetensors import SafetensorsFile

STATE_VERSION = "1"
_BESIDE = ("config.json", "tokenizer.json", "tokenizer.model")
_DTYPES = {torch.float32: "F32", torch.float64: "F64"}
_MOST_JSON = 1 << 20  # bytes; a job with a long prompt takes 10 kB


def conditions(request: Request, networks: Networks) -> dict[str, Any]:
    """Return by name everything on which the bits of a job's latents depend, as JSON holds it.

    Where and how the clip is written is not part of it.
    """
    job = asdict(request)
    for name in ("output", "files", "device", "dtype"):
        del job[name]
    device = networks.device
    is_gpu = device.type == "cuda"
    facts = {
        **job,
        "device": torch.cuda.get_device_name(device) if is_gpu else str(device),
        "dtype": str(networks.dtype),
        "ltxlite": ltxlite.__version__,
        "torch": torch.__version__,
        "model files": [_identity(path) for path in _model_files(request, networks)],
        "media files": [_identity(Path(path)) for path in request.conditions.media()],
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def encode_state(progress: Progress, facts: Mapping[str, Any]) -> list[memoryview]:
    """Return the pieces of the file, in order; tensors on a GPU are copied from there."""
    tensors = {name: tensor.cpu() for name, tensor in _tensors(progress)}
    place = {"stage": progress.stage, "done": progress.done, "drawn": dict(progress.drawn)}
    metadata = {
        "ltxlite_state": STATE_VERSION,
        "conditions": json.dumps(facts),
        "place": json.dumps(place),
    }
    metadata["crc32"] = _checksum(metadata, tensors)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        dtype, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    head = struct.pack("<Q", len(text)) + text
    return [memoryview(head), *(tensor.numpy().data for tensor in tensors.values())]


def read_state(path: Path, request: Request, networks: Networks) -> Progress:
    """Read the progress of exactly this job, onto the networks' device.

    Raises FileNotFoundError; RequestError if the file is of another job or was made under other
    conditions, naming the first that differs; CheckpointError or FormatError if it is damaged.
    """
    with SafetensorsFile(path) as file:
        metadata = file.metadata
        if metadata.get("ltxlite_state") != STATE_VERSION:
            raise RequestError("it is of another version of ltxlite")
        _refuse_difference(_json(metadata, "conditions"), conditions(request, networks))
        place = _Place.read(_json(metadata, "place"), request, networks)
        wanted = _sizes(place, request, networks)
        if file.tensors.keys() != wanted.keys():
            raise CheckpointError("it is damaged: it holds other tensors than it should")
        for name, entry in file.tensors.items():
            if entry.shape != wanted[name] or entry.format.dtype not in _dtypes(name):
                raise CheckpointError(f"it is damaged: {name} is {entry.format.name} {entry.shape}")
        # Copies: a map that stays open could not be renamed over on Windows.
        tensors = {name: file.load(name).clone() for name in wanted}
    if metadata.get("crc32") != _checksum(metadata, tensors):
        raise CheckpointError("it is damaged: its checksum is wrong")
    moved = {name: tensor.to(networks.device) for name, tensor in tensors.items()}
    return _progress(place, moved, place.shape(request, networks))


def describe(progress: Progress, request: Request, networks: Networks) -> str:
    """Tell where a run goes on: "stage 2 of 2, step 3 of 3"."""
    total = len(request.stages)
    if progress.stage == total:
        return "the decoding"
    steps = step_count(request, networks, progress.stage)
    stage = f"stage {progress.stage + 1} of {total}"
    if progress.done == steps:
        return f"the end of {stage}"
    return f"{stage}, step {progress.done + 1} of {steps}"


def _tensors(progress: Progress) -> Iterator[tuple[str, Tensor]]:
    yield "latents.0", progress.latents.video
    yield "latents.1", progress.latents.audio
    for name, state in progress.position.carry.items():
        for number, tensor in enumerate(state):
            yield f"carry.{name}.{number}", tensor
    for name, tensor in progress.predictions.items():
        yield f"prediction.{name}", tensor.contiguous()


def _progress(place: "_Place", tensors: Mapping[str, Tensor], shape: ClipShape) -> Progress:
    latents = Latents(tensors["latents.0"], tensors["latents.1"], shape)
    names = dict.fromkeys(n.split(".")[1] for n in tensors if n.startswith("carry."))
    carry = {n: (tensors[f"carry.{n}.0"], tensors[f"carry.{n}.1"]) for n in names}
    predictions = {
        name.removeprefix("prediction."): tensor
        for name, tensor in tensors.items()
        if name.startswith("prediction.")
    }
    return Progress(place.stage, latents, Position(place.done, carry), predictions, place.drawn)


@dataclass(frozen=True, slots=True)
class _Place:
    """The numbers of a progress."""

    stage: int
    done: int
    drawn: dict[NoiseKind, int]

    @classmethod
    def read(cls, values: dict[str, Any], request: Request, networks: Networks) -> Self:
        stage, done, drawn = (values.get(name) for name in ("stage", "done", "drawn"))
        if not _is_count(stage, len(request.stages)):
            raise CheckpointError(f"it is damaged: stage {stage!r:.40}")
        steps = 0 if stage == len(request.stages) else step_count(request, networks, stage)
        if not _is_count(done, steps) or stage == done == 0:
            raise CheckpointError(f"it is damaged: step {done!r:.40} of stage {stage}")
        if not isinstance(drawn, dict) or not all(
            kind in SDE_KINDS and _is_count(count, steps) for kind, count in drawn.items()
        ):
            raise CheckpointError(f"it is damaged: noise drawn {drawn!r:.40}")
        return cls(stage, done, drawn)

    def shape(self, request: Request, networks: Networks) -> ClipShape:
        """Return the shape of the latents: the stage's own, or those of the one before."""
        number = self.stage if self.done else self.stage - 1
        return stage_shape(request, request.stages[number], networks)


def _sizes(place: _Place, request: Request, networks: Networks) -> dict[str, tuple[int, ...]]:
    """Return name and size of every tensor that a progress at that place has."""
    shape = place.shape(request, networks)
    latents = latent_sizes(networks, shape)
    sizes = {f"latents.{number}": size for number, size in enumerate(latents)}
    if not place.done:
        return sizes
    stage = request.stages[place.stage]
    sampler = SAMPLERS[stage.sampler]
    is_last = place.done == step_count(request, networks, place.stage)
    remembered = () if is_last else sampler.remembers[: place.done]
    guidances = (stage.video, stage.audio)
    appended = stage_takes(request, networks, place.stage, shape).tokens
    voiced = voice_tokens(request, networks, place.stage)
    for number, tokens in enumerate(token_sizes(networks, shape, appended, voiced)):
        sizes |= {f"carry.{name}.{number}": tokens for name in ("x", *remembered)}
        reused = reused_names(guidances[number], sampler.needs_uncond)
        sizes |= {f"prediction.{name}.{number}": tokens for name in reused}
    return sizes


def _dtypes(name: str) -> tuple[torch.dtype, ...]:
    # res_2s carries fp64.
    return (torch.float32, torch.float64) if name.startswith("carry.") else (torch.float32,)


def _is_count(value: object, most: int) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= most


def _json(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    text = metadata.get(name, "")
    try:
        values = json.loads(text) if len(text) < _MOST_JSON else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"it is damaged: no {name} in it")
    return values


def _refuse_difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        found = _first_difference(then.get(name), value, name)
        if found is not None and name in ("model files", "media files"):
            raise RequestError(f"it was made with other {name}, or they have changed")
        if found is not None:
            where, old, new = found
            raise RequestError(f"its {where} was {old!r:.60} and is {new!r:.60} now")


def _first_difference(then: Any, now: Any, where: str) -> tuple[str, Any, Any] | None:
    """Return the name and both values of the first leaf that differs, as in stages[1].sigmas."""
    if isinstance(then, dict) and isinstance(now, dict):
        pairs = [(then.get(name), value, f"{where}.{name}") for name, value in now.items()]
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        both = enumerate(zip(then, now, strict=True))
        pairs = [(*pair, f"{where}[{number}]") for number, pair in both]
    else:
        return None if then == now else (where, then, now)
    found = (_first_difference(*pair) for pair in pairs)
    return next((item for item in found if item is not None), None)


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    text = metadata["conditions"] + metadata["place"]
    checksum = zlib.crc32(text.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].numpy().data, checksum)
    return f"{checksum:08x}"


def _model_files(request: Request, networks: Networks) -> Iterator[Path]:
    """Yield every file that a run reads, those beside a model that describe it among them."""
    for model in networks.files.models:
        folder = model.path if model.path.is_dir() else model.path.parent
        shards = [path for path in folder.iterdir() if path.suffix in SUFFIXES]
        yield from sorted(shards) if model.path.is_dir() else [model.path]
        beside = (folder / name for name in (*_BESIDE, f"{model.path.name}.config.json"))
        yield from (path for path in beside if path.is_file())
    yield from map(Path, request.files.loras)


def _identity(path: Path) -> tuple[str, int, int]:
    facts = path.stat()
    return str(path.resolve()), facts.st_size, facts.st_mtime_ns
