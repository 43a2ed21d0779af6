"""Measures what every matrix reads while clips are made, up to their latents: nothing is decoded.

Hooks add the squares of each input up on the device that computes it, so no call waits for the
host, and look at no weight: layers may be quantized, or their weights come and go.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ltxlite.convert.source import source_files
from ltxlite.encode import Contexts, encode_prompts
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.importance import Importance, read_importance, write_importance
from ltxlite.math_errors import MathErrors, write_errors
from ltxlite.models.connector import Connector
from ltxlite.models.gemma import Gemma
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.text_projection import TextProjection
from ltxlite.models.transformer import Transformer
from ltxlite.networks import Networks, Prepare
from ltxlite.progress import Clock, Report
from ltxlite.release import release_name
from ltxlite.request import Request
from ltxlite.stage_shapes import stage_shape
from ltxlite.stages import (
    Progress,
    Prompts,
    beginning,
    needs_negative,
    stage_sigmas,
)

# The pipeline's `run_stages`, which only the command line may import.
RunStages = Callable[[Request, Networks, Prompts, Progress, Clock], Iterator[Progress]]
Network = TypeVar("Network", bound=nn.Module)

TEXT = ("text_encoder", "text_projection", "video_connector", "audio_connector")
# Rows squared at a time: 64 MiB of fp32 for the widest input, and short fp32 sums.
_ROWS = 512
# A matrix cut into pieces gives its input to every piece: the first one stands for all.
_FIRST_PIECE = re.compile(r"\.pieces\.0$")
_OTHER_PIECE = re.compile(r"\.pieces\.[1-9]\d*$")


class Moments:
    """Running sums of the squares of what matrices read: (K,) fp64 where it was computed."""

    def __init__(self) -> None:
        self._watched: set[str] = set()
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def watch(self, component: str, network: nn.Module) -> None:
        """Measure every matrix of a network from now on, for as long as the network lives."""
        for name, module in _matrices(network):
            if not _OTHER_PIECE.search(name):
                matrix = release_name(component, f"{_FIRST_PIECE.sub('', name)}.weight")
                module.register_forward_pre_hook(partial(self._add, matrix))
                self._watched.add(matrix)

    @property
    def unread(self) -> list[str]:
        """The matrices that are watched and have read nothing so far."""
        return sorted(self._watched - self._sums.keys())

    def taken(self, prompts: int, models: tuple[dict[str, Any], ...]) -> Importance:
        """Return the mean squares so far. Raises CheckpointError if they are not finite."""
        means = {
            name: (total / self._tokens[name]).float().cpu() for name, total in self._sums.items()
        }
        broken = [name for name, mean in means.items() if not bool(mean.isfinite().all())]
        if broken:
            raise CheckpointError(
                f"{broken[0]} read NaN or infinity: the checkpoint is damaged, or arithmetic "
                "overflows; use --dtype bfloat16 or float32"
            )
        return Importance(means, dict(self._tokens), prompts, models)

    def _add(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2)  # (T, K)
        if name not in self._sums:
            self._sums[name] = x.new_zeros(x.shape[1], dtype=torch.float64)
        for rows in x.split(_ROWS):
            self._sums[name] += rows.float().square().sum(0)
        self._tokens[name] = self._tokens.get(name, 0) + len(x)


def _matrices(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield whatever multiplies by a matrix; what has one inside, for a LoRA, stands for both."""
    inside = " "  # no name begins with it
    for name, module in network.named_modules():  # a module comes before its children
        if isinstance(getattr(module, "in_features", None), int) and not name.startswith(inside):
            yield name, module
            inside = f"{name}."


class WatchedNetworks(Networks):
    """Networks that are measured as soon as they are loaded."""

    def __init__(
        self, networks: Networks, moments: Moments, text: bool, errors: MathErrors | None = None
    ) -> None:
        self.__dict__.update(vars(networks))  # all they were opened with, whatever that is
        self.math = "bf16"  # linears that multiply codes have no values to look at
        self._moments, self._errors = moments, errors
        self._components = ("transformer", *TEXT) if text else ("transformer",)

    def transformer(self, prepare: Prepare | None = None) -> Transformer:
        """Load the transformer; `prepare` may change it before its blocks find their places."""
        network = self._watched("transformer", super().transformer(prepare))
        if self._errors is not None:
            self._errors.watch(network)
        return network

    def gemma(self) -> Gemma:
        """Load the text encoder."""
        return self._watched("text_encoder", super().gemma())

    def text_projection(self, encoder: GemmaConfig | None = None) -> TextProjection:
        """Load the projection of Gemma's states."""
        return self._watched("text_projection", super().text_projection(encoder))

    def video_connector(self) -> Connector:
        """Load the connector of the picture stream."""
        return self._watched("video_connector", super().video_connector())

    def audio_connector(self) -> Connector:
        """Load the connector of the sound stream."""
        return self._watched("audio_connector", super().audio_connector())

    def models(self) -> tuple[dict[str, Any], ...]:
        """Return what tells the files again whose matrices are measured."""
        opened = [self.files.find(component) for component in self._components]
        stored = [
            tensor
            for component, model in zip(self._components, opened, strict=True)
            if model is not None
            for tensor in model.named(component).values()
        ]
        return tuple(
            {"file": file.name, "bytes": file.nbytes, "header_sha256": file.header}
            for file in source_files(stored)
        )

    def _watched(self, component: str, network: Network) -> Network:
        if component in self._components:
            self._moments.watch(component, network)
        return network


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is measured, and where it is kept.

    requests: one a prompt, equal but for prompt and seed.  text: also measure what encodes prompts.
    add: go on with a target that exists.  errors: where to write what int8 costs each layer.
    """

    requests: tuple[Request, ...]
    target: Path
    text: bool = False
    add: bool = False
    errors: Path | None = None

    def __post_init__(self) -> None:
        if not self.requests:
            raise RequestError('no prompt: say what clips to measure with --prompt "..."')
        if self.target.suffix.lower() != ".safetensors":
            raise RequestError(f"{self.target}: the target must be called .safetensors")
        if self.target.exists() and not self.add:
            raise RequestError(f"{self.target}: exists already; name another file, or say --add")


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What came of it.

    matrices, prompts: in the file, earlier runs included.  tokens: rows that the matrix with the
    most of them read.  seconds: by part of the work.
    """

    path: Path
    matrices: int
    prompts: int
    tokens: int
    seconds: dict[str, float] = field(default_factory=dict)


@torch.inference_mode()
def calibrate(
    asked: Calibration, networks: Networks, run_stages: RunStages, report: Report
) -> Calibrated:
    """Make the latents of each prompt's clip, and write what the matrices read.

    The file is written anew after every prompt, so that a long run may be stopped.  Raises
    CheckpointError for a file to add to that is none, or is of a model of other sizes.
    """
    clock = Clock(report)
    moments, errors = Moments(), None if asked.errors is None else MathErrors()
    watched = WatchedNetworks(networks, moments, asked.text, errors)
    watched.on_load = lambda loaded: report.note(loaded.line())
    models = watched.models()
    earlier = _earlier(asked, models, clock)
    prompts = _encode(asked, watched, clock)
    clock.begin("denoise", sum(_steps(request, networks) for request in asked.requests))
    steps = Steps(clock)
    total = earlier
    for done, (request, contexts) in enumerate(zip(asked.requests, prompts, strict=True), 1):
        for _ in run_stages(request, watched, contexts, beginning(request, watched), Clock(steps)):
            pass
        measured = moments.taken(done, models)
        total = measured if earlier is None else earlier.plus(measured)
        write_importance(asked.target, total)
        if asked.errors is not None and errors is not None:
            write_errors(asked.errors, errors.taken())
        watched.on_load = None  # told once
    assert total is not None  # at least one prompt
    if unread := moments.unread:
        clock.note(f"{len(unread)} matrices were not used and have no importance: {unread[0]}, ...")
    most = max(total.tokens.values())
    return Calibrated(asked.target, len(total.moments), total.prompts, most, clock.finish())


def _earlier(
    asked: Calibration, models: tuple[dict[str, Any], ...], clock: Clock
) -> Importance | None:
    if not asked.target.exists():
        return None
    found = read_importance(asked.target)
    if not all(model in found.models for model in models):
        clock.note(
            f"warning: {asked.target} was measured on {_names(found.models)}, this run is of "
            f"{_names(models)}; their mean counts only if they are one model, stored differently"
        )
    return found


def _names(models: tuple[Any, ...]) -> str:
    return ", ".join(str(model.get("file")) for model in models) or "nothing"


def _encode(asked: Calibration, networks: Networks, clock: Clock) -> list[Prompts]:
    """Encode all prompts at once; the negative one once, where some stage needs it."""
    clock.begin("encode prompts", 1)
    first = asked.requests[0]
    texts = [request.prompt for request in asked.requests]
    negative = any(needs_negative(stage) for stage in first.stages)
    if negative:
        texts.append(first.negative or "")
    contexts = encode_prompts(networks, texts, clock.note)
    clock.advance(1)
    shared: Contexts | None = contexts.pop() if negative else None
    return [Prompts(positive, shared) for positive in contexts]


def _steps(request: Request, networks: Networks) -> int:
    shapes = ((stage, stage_shape(request, stage, networks)) for stage in request.stages)
    return sum(len(stage_sigmas(stage, shape)) - 1 for stage, shape in shapes)


class Steps(Report):
    """Shows the steps of many stages, of one clip after another, as one bar."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._before = self._current = 0

    def note(self, text: str) -> None:
        """Pass on a line for the user."""
        self._clock.note(text)

    def begin(self, part: str, steps: int) -> None:
        """Keep what was done before."""
        self._before, self._current = self._before + self._current, 0

    def advance(self, done: int) -> None:
        """Count a step of the current stage."""
        self._current = done
        self._clock.advance(self._before + done)


def with_prompts(request: Request, prompts: list[str]) -> tuple[Request, ...]:
    """Return a request for each prompt, each with noise of its own."""
    return tuple(
        replace(request, prompt=prompt, seed=request.seed + number)
        for number, prompt in enumerate(prompts)
    )
