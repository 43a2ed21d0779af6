"""Bytes that a transformer block moves beside its products, and how often it launches something.

Behind int8 products, elementwise work is the second largest cost of a block: diffusers moves 1.5 to
2 MB for each video token. Every operation that reaches the dispatcher is counted at full size, on
the meta device that stands for a card: what it reads and what it writes, once each, caches left
aside. Products, attention and what decodes weights are listed apart.
"""

import argparse
import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import report, vram_rivals
from benchmarks.harness import Case, Result, Row
from benchmarks.vram_models import components
from ltxlite.account import Levers, StageJob
from ltxlite.account.phase import CARD, META, blank, on_card
from ltxlite.geometry import ClipShape
from ltxlite.math_mode import set_math
from ltxlite.models.block import Block
from ltxlite.models.connector import CONTEXT_LENGTH
from ltxlite.models.passes import Pass, StreamInput, Timesteps
from ltxlite.models.transformer import Transformer

SHAPE = ClipShape(16, 22, 40, 126, 24.0)  # 1280x704x121: 14080 video tokens
CARD_OF_ACCOUNT = 86
MODES = ("int8", "fp16", "bf16")
KINDS = ("elementwise", "attention", "products", "weights")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul_int8", "matmul_fp16", "matmul_fp8", "matmul")
_ATTENTION = ("attention", "attend_int8", "attend_flash", "scaled_dot_product_attention")
_WEIGHTS = ("dequantize", "row_scales", "int8_codes")
_NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "detach")


@dataclass(slots=True)
class Tally:
    """Bytes and launches, by kind and stream."""

    nbytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    launches: dict[tuple[str, str], int] = field(default_factory=dict)
    names: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, name: str, stream: str, nbytes: int) -> None:
        """Count a launch."""
        kind = _kind(name)
        self.nbytes[kind] += nbytes
        self.launches[kind, stream] = self.launches.get((kind, stream), 0) + 1
        self.names[name, stream] = self.names.get((name, stream), 0) + 1

    def of(self, stream: str, *kinds: str) -> int:
        """Return the launches of some kinds in a stream."""
        return sum(self.launches.get((kind, stream), 0) for kind in kinds)


class Launches(TorchDispatchMode):
    """Shows `launched` every operation that is no view; compositions of a card count as one.

    Use it under inference mode: elsewhere compositions arrive in parts.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @abstractmethod
    def launched(
        self, func: Any, args: tuple[Any, ...], named: Mapping[str, Any], result: Any
    ) -> None:
        """Take note of an operation, its arguments and what it returned."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        fused = CARD.fused.get(func)
        if fused is None:
            with self:
                result = func.decompose(*args, **named)
            if result is not NotImplemented:
                return result
        result = (fused or func)(*args, **named)
        if not _only_views(func):
            self.launched(func, args, named, result)
        return result


class TrafficMeter(Launches):
    """Counts what operations read and write.

    An operation belongs to the stream whose token count one of its tensors has; where none has, to
    the stream of that width.
    """

    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        self.tally = Tally()
        self._tokens = {shape.video_tokens: "video", shape.audio_frames: "audio"}

    def launched(
        self, func: Any, args: tuple[Any, ...], named: Mapping[str, Any], result: Any
    ) -> None:
        """Add what it read and what it wrote."""
        name = func._schema.name.split("::")[1]
        tensors = list(_tensors((args, tuple(named.values()))))
        if name.rstrip("_") in _NO_LAUNCH or not (tensors or list(_tensors(result))):
            return
        read = sum(one.nbytes for one in tensors)
        fresh = [one for one in _tensors(result) if all(one is not other for other in tensors)]
        written = sum(one.nbytes for one in fresh)
        if name.endswith("_"):  # in place: its first argument is written too
            written += tensors[0].nbytes
        self.tally.add(name.rstrip("_"), self._stream([*tensors, *fresh]), read + written)

    def _stream(self, tensors: Sequence[Tensor]) -> str:
        sizes = {size for one in tensors for size in one.shape}
        for tokens, name in self._tokens.items():
            if tokens in sizes:
                return name
        return "audio" if 2048 in sizes and 4096 not in sizes else "video"


def block_traffic(mode: str, shape: ClipShape = SHAPE) -> Tally:
    """Count one block of the released model in Q4_K_M, all tokens in one chunk."""
    made = blank("transformer", components("Q4_K_M")["transformer"], Transformer, torch.bfloat16)
    network = made.network
    network.chunk = shape.video_tokens
    set_math(network, mode, CARD_OF_ACCOUNT)
    block = network.blocks[0]
    assert isinstance(block, Block)
    with torch.inference_mode():
        state = network.begin(_inputs(network, shape))
        block(state, 0)  # what is kept of weights, row scales, is made by the first call
        with TrafficMeter(shape) as meter:
            block(state, 0)
    return meter.tally


def _inputs(network: Transformer, shape: ClipShape) -> Pass:
    config = network.config
    streams = []
    axes = ((config.video, shape.video_tokens, 3), (config.audio, shape.audio_frames, 1))
    for number, (stream, tokens, count) in enumerate(axes):
        # Positions on the CPU, whose values the tables of angles need; then everything on meta.
        grid = torch.rand(1, count, tokens, 2).round(decimals=1)
        rope = network.rope(grid, sound=number == 1)
        streams.append(
            StreamInput(
                latent=torch.empty(1, tokens, stream.channels, device=META),
                sigma=torch.empty(1, device=META),
                timesteps=Timesteps(
                    torch.empty(1, device=META), torch.empty(1, 1, dtype=torch.long, device=META)
                ),
                positions=grid.to(META),
                context=torch.empty(1, CONTEXT_LENGTH, stream.context, device=META),
                rope=on_card(rope, {}),
            )
        )
    return Pass(*streams)


def diffusers_figures(shape: ClipShape = SHAPE) -> tuple[float, int]:
    """Return megabytes a token and launches, both streams, of one block of diffusers in bf16.

    Its norms count as one kernel each.
    """
    counted = []
    for layers in (1, 2):
        run = vram_rivals.diffusers_run(layers, 1, StageJob(shape), Levers())
        with torch.inference_mode(), TrafficMeter(shape) as meter:
            run()
        counted.append(meter.tally)
    nbytes = [tally.nbytes["elementwise"] for tally in counted]
    launches = [
        sum(tally.of(stream, "elementwise", "attention") for stream in ("video", "audio"))
        for tally in counted
    ]
    return (nbytes[1] - nbytes[0]) / shape.video_tokens / 1e6, launches[1] - launches[0]


def _only_views(func: Any) -> bool:
    aliases = [item.alias_info for item in func._schema.returns]
    return bool(aliases) and all(one is not None and not one.is_write for one in aliases)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)


def _kind(name: str) -> str:
    groups = (("products", _PRODUCTS), ("attention", _ATTENTION), ("weights", _WEIGHTS))
    return next((kind for kind, names in groups if name in names), "elementwise")


def result_of(mode: str) -> Result:
    """Count a mode and put it beside diffusers."""
    tally, tokens = block_traffic(mode), SHAPE.video_tokens
    case = Case(mode, {"tokens": tokens, "card": CARD_OF_ACCOUNT}, 0.0, tuple)
    case.figures["elementwise_mb_a_token"] = tally.nbytes["elementwise"] / tokens / 1e6
    for stream in ("video", "audio"):
        case.figures[f"{stream}_launches"] = tally.of(stream, "elementwise", "attention")
        case.figures[f"{stream}_products"] = tally.of(stream, "products")
        case.figures[f"{stream}_weights"] = tally.of(stream, "weights")
    return Result(case, [Row("ltxlite")])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a mode and, as the last line, JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks traffic", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with targets.toml")
    parser.add_argument("--out", action="store_true", help="also keep the JSON under results/")
    parser.add_argument("--list", action="store_true", help="name every operation")
    options = parser.parse_args(arguments)
    results = [result_of(mode) for mode in MODES]
    for result in results:
        figures = result.case.figures
        print(
            f"{result.case.name:5} {figures['elementwise_mb_a_token']:.3f} MB a video token; "
            + "; ".join(
                f"{stream}: {figures[f'{stream}_launches']:.0f} elementwise and attention, "
                f"{figures[f'{stream}_products']:.0f} products, "
                f"{figures[f'{stream}_weights']:.0f} decodings"
                for stream in ("video", "audio")
            ),
            file=sys.stderr,
        )
        if options.list:
            for (name, stream), count in sorted(block_traffic(result.case.name).names.items()):
                print(f"      {stream} {name} {count}", file=sys.stderr)
    if (missing := vram_rivals.diffusers_missing()) is None:
        megabytes, launches = diffusers_figures()
        print(
            f"diffusers, bf16: {megabytes:.3f} MB a video token; both streams: {launches} "
            "elementwise and attention",
            file=sys.stderr,
        )
        for result in results:
            result.case.figures.update(
                diffusers_mb_a_token=megabytes,
                diffusers_launches=launches,
            )
    else:
        print(f"diffusers: {missing}", file=sys.stderr)
    document = report.as_json("traffic", report.conditions("cpu", 1), results)
    return report.conclude(document, results, options.check, options.out)
