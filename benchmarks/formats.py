"""What each format costs in quality: two stages of a small random model, beside fp32.

The matrices of the transformer's blocks become a format and the rest stays fp32, arithmetic too.
Seed and prompt are the same, so all that differs is what the format lost. Errors of latents are
relative (root mean square over models); PSNR and SNR are of what the VAEs decode from them. How
large they are says little about a trained model; their order does. What is timed is one step.
"""

import argparse
import atexit
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.harness import Case, Contestant, Result
from benchmarks.wide_model import LAYERS, WIDTH, wide_networks
from ltxlite.checkpoint.at_load import AtLoad
from ltxlite.encode import encode_prompts
from ltxlite.errors import RequestError
from ltxlite.linear import swap_linears
from ltxlite.models.transformer import Transformer
from ltxlite.networks import Networks, Prepare
from ltxlite.pipeline import decode_picture, decode_sound, run_stages
from ltxlite.presets import Model, stages_for
from ltxlite.progress import Clock, Report
from ltxlite.request import Files, Output, Request
from ltxlite.stages import Latents, Prompts, beginning
from ltxlite_quant import FORMATS, QuantTensor
from ltxlite_quant.encode import ENCODERS
from ltxlite_quant.encode_scaled import ENCODERS as SCALED_ENCODERS
from ltxlite_quant.encode_scaled import quantize_scaled
from ltxlite_quant.search import quantize
from ltxlite_quant.search_plan import PLANS

DESCRIPTION = "a tiny model's latents, picture and sound in every format, beside fp32"
PROMPT = "a red kite over a windy beach, waves and gulls"
SIZE, FRAMES = (256, 128), 17
PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16}
NF4 = "BNB_NF4"  # by bitsandbytes, where it has kernels
SCALED = (
    *("F8_E4M3_SCALED", "F8_E5M2_SCALED", "MXFP8", "INT8", "INT8_CONVROT"),
    *("NVFP4_TILED", NF4),
)
# A format and the next smaller one of its family: fewer bits must not be better.
SMALLER = {
    "Q8_0": "Q6_K",
    "Q6_K": "Q5_K",
    "Q5_K": "Q4_K",
    "Q4_K": "Q3_K",
    "Q3_K": "Q2_K",
    "Q5_0": "Q4_0",
    "Q5_1": "Q4_1",
}


Change = Callable[[Transformer], None]


class _Prepared(Networks):
    """Networks of which the transformer is loaded already, and quantized."""

    def __init__(self, networks: Networks, transformer: Transformer) -> None:
        self.__dict__.update(vars(networks))  # all they were opened with, whatever that is
        self._transformer = transformer

    def transformer(self, prepare: Prepare | None = None) -> Transformer:
        """Return the transformer; there are no LoRAs to prepare it for."""
        return self._transformer


@dataclass(frozen=True, slots=True)
class Made:
    """What a run made: latents, frames (F, 3, H, W) in [-1, 1] and a waveform (2, N)."""

    latents: Latents
    frames: Tensor
    sound: Tensor


class Clip:
    """One random model and its clip in fp32, to compare with."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.networks = wide_networks(folder, seed)
        self.request = _request(self.networks, seed)

    @cached_property
    def prompts(self) -> Prompts:
        """The prompt's contexts; no format touches what encodes it."""
        (contexts,) = encode_prompts(self.networks, [self.request.prompt], lambda _: None)
        return Prompts(contexts, None)

    @cached_property
    def reference(self) -> Made:
        """The clip in fp32."""
        return self.made(lambda network: None)

    def transformer(self, change: Change) -> Transformer:
        """Return the transformer with a change made to it."""
        network = self.networks.transformer()
        change(network)
        return network

    def latents(self, transformer: Transformer, request: Request) -> Latents:
        """Return the latents after all stages of a request."""
        networks = _Prepared(self.networks, transformer)
        start = beginning(request, networks)
        *_, last = run_stages(request, networks, self.prompts, start, Clock(Report()))
        return last.latents

    def made(self, change: Change) -> Made:
        """Return the whole clip of a transformer with a change made to it."""
        latents = self.latents(self.transformer(change), self.request)
        frames = torch.cat(list(decode_picture(self.networks, latents.video))).clamp(-1, 1)
        return Made(latents, frames, decode_sound(self.networks, latents.audio)[0])


def _request(networks: Networks, seed: int) -> Request:
    config = networks.transformer_config()
    stages = stages_for(Model("distilled", config.family, config.layers), "balanced", 2, "x2")
    where, width, height = Files("in memory"), *SIZE
    return Request(PROMPT, where, Output("none.mp4"), stages, width, height, FRAMES, seed=seed)


def change_to(name: str) -> Change:
    """Return what turns the matrices of a transformer's blocks into a format."""
    return partial(_rounded, PLAIN[name]) if name in PLAIN else partial(_swapped, name)


def _matrices(network: Transformer) -> dict[str, nn.Linear]:
    modules = network.named_modules()
    return {n: m for n, m in modules if isinstance(m, nn.Linear) and n.startswith("blocks.")}


def _rounded(dtype: torch.dtype, network: Transformer) -> None:
    for linear in _matrices(network).values():
        linear.weight = nn.Parameter(linear.weight.to(dtype).float(), requires_grad=False)


def _swapped(name: str, network: Transformer) -> None:
    weights = {n: encoded(name, linear.weight) for n, linear in _matrices(network).items()}
    swap_linears(network, weights)


def encoded(name: str, weight: Tensor) -> QuantTensor:
    """Quantize a weight (N, K). Raises RequestError for nf4 where bitsandbytes has no kernels."""
    if name == NF4:
        made = AtLoad.named("nf4", weight.device).of("transformer")("blocks.0.weight", weight)
        assert made is not None  # a matrix of a block, whose rows are whole blocks
        return made
    if name not in SCALED_ENCODERS:
        return quantize(weight, FORMATS[name])
    padded, shape = quantize_scaled(weight, FORMATS[name]), (weight.shape[0], weight.shape[1])
    return padded if padded.shape == shape else padded.cropped(shape)


def bits_of(name: str) -> float:
    """Return the bits that a weight takes in a matrix of 256 x 4096, scales included."""
    if name not in SCALED:
        return FORMATS[name].bits_per_element
    matrix = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    return 8 * encoded(name, matrix).nbytes / matrix.numel()


class Study:
    """Every format's figures over several models; each computed once."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.clips = clips
        self._found: dict[str, dict[str, float]] = {}

    def figures(self, name: str) -> dict[str, float]:
        """Return a format's errors, means over the models."""
        if name not in self._found:
            change = change_to(name)
            each = [_compared(clip.made(change), clip.reference) for clip in self.clips]
            self._found[name] = {key: _mean(key, [one[key] for one in each]) for key in each[0]}
        return self._found[name]

    def of_case(self, name: str) -> dict[str, float]:
        """Return the same with bits, and with errors over those of the next smaller format."""
        found = {"bits": bits_of(name), **self.figures(name)}
        if name in SMALLER:
            less = self.figures(SMALLER[name])
            for stream in ("video", "audio"):
                found[f"{stream}_over_smaller"] = found[f"{stream}_error"] / less[f"{stream}_error"]
            for signal in ("psnr", "snr"):
                found[f"{signal}_behind_smaller"] = less[signal] - found[signal]
        return found


def _compared(made: Made, wanted: Made) -> dict[str, float]:
    return {
        "video_error": _relative(made.latents.video, wanted.latents.video),
        "audio_error": _relative(made.latents.audio, wanted.latents.audio),
        # Over the whole range of 2 from black to white.
        "psnr": -10 * math.log10((made.frames - wanted.frames).square().mean().item() / 4),
        "snr": -20 * math.log10(_relative(made.sound, wanted.sound)),
    }


def _relative(value: Tensor, wanted: Tensor) -> float:
    return ((value - wanted).double().norm() / wanted.double().norm()).item()


def _mean(key: str, values: Sequence[float]) -> float:
    if key.endswith("error"):
        return math.sqrt(statistics.fmean(value**2 for value in values))
    return statistics.fmean(values)  # decibels


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare what only this benchmark takes."""
    parser.add_argument("--models", type=int, default=4, help="random models to average over [4]")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield every format that we write."""
    study = Study(_clips(options.models))
    facts = {"models": options.models, "layers": LAYERS, "width": WIDTH, "clip": [*SIZE, FRAMES]}
    for name in (*PLAIN, *ENCODERS, *PLANS, *SCALED):
        if name != NF4 or _has_nf4():
            figures: dict[str, float] = {}
            build = partial(_contestants, name, study, figures)
            yield Case(name, facts, 0.0, build, figures=figures)


def _clips(count: int) -> list[Clip]:
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # Windows: maps are open
    atexit.register(folder.cleanup)  # the files are read until the last run
    return [Clip(Path(folder.name), seed) for seed in range(count)]


def _has_nf4() -> bool:
    try:
        bits_of(NF4)
    except RequestError:
        return False
    return True


def _contestants(name: str, study: Study, figures: dict[str, float]) -> Iterator[Contestant]:
    with torch.inference_mode():
        figures |= study.of_case(name)
        clip = study.clips[0]
        transformer = clip.transformer(change_to(name))
    yield Contestant("ltxlite", partial(_one_step, clip, transformer))


def _one_step(clip: Clip, transformer: Transformer) -> Mapping[str, Tensor]:
    stage = replace(clip.request.stages[0], sigmas="1,0")
    latents = clip.latents(transformer, replace(clip.request, stages=(stage,)))
    return {"video": latents.video, "audio": latents.audio}


def show(header: Mapping[str, Any], results: Sequence[Result], console: Console) -> None:
    """Print one table of all formats, the largest first."""
    console.print(" · ".join(f"{key} {value}" for key, value in header.items()), style="dim")
    columns = ("bits", "video_error", "audio_error", "psnr", "snr")
    table = Table("format", *columns)
    for result in sorted(results, key=lambda result: -result.case.figures["bits"]):
        table.add_row(result.case.name, *(f"{result.case.figures[key]:.4g}" for key in columns))
    console.print(table)
