"""Seconds per transformer step and per clip on cards that are not here: a projection.

Work is counted from the networks (FLOPs, bytes, kernels), peaks are those of datasheets
(`gpus.toml`, with sources), and what part of them programs reach is measured where
`benchmarks kernels` left a result for the card, else assumed and bounded by compiled code. Beside
each math mode stands what the same clip takes computed as ComfyUI-GGUF does: weights decoded by
torch operations, cuBLAS in bf16, torch's attention, eager elementwise code.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import project_time, report
from benchmarks.project_cards import RATES, Card, read_cards, read_measurements
from benchmarks.project_time import MODES, Clip, Machine, Mode, clip, elementwise
from ltxlite_quant.formats import FORMATS

DESCRIPTION = "seconds per step and clip on cards that are not here, projected"
# The headline jobs: width, height, frames; distilled, two stages.
JOBS = ((768, 512, 121), (1280, 704, 121), (1920, 1088, 121))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print projections; the last line of stdout is JSON."""
    options = _parse(arguments)
    cards = read_cards()
    measurements = read_measurements(cards)
    chosen = list(cards.values()) if options.gpu == "all" else [cards[options.gpu]]
    header = report.conditions("cpu", 1)
    document: dict[str, Any] = {"benchmark": "project", "label": "projection"}
    document |= {"conditions": header, "assumptions": assumptions(), "cards": []}
    console = Console(stderr=True)
    for card in chosen:
        machine = Machine(card, measurements, resident=options.resident)
        jobs = [_job(machine, size, options.format) for size in options.size]
        document["cards"].append(_as_json(machine, jobs, options.format))
        if not options.json:
            _show(machine, jobs, options.format, console)
    print(json.dumps(document), flush=True)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks project", description=__doc__)
    parser.add_argument(
        "--gpu", choices=(*read_cards(), "all"), default="rtx3060", help="[rtx3060]"
    )
    blocks = [name for name, one in FORMATS.items() if one.is_quantized and one.ggml_type]
    parser.add_argument("--format", choices=blocks, default="Q4_K", help="of weights [Q4_K]")
    parser.add_argument("--size", type=_size, help="WIDTHxHEIGHT [the headline jobs]")
    parser.add_argument("--frames", type=int, help="8 n + 1 [121]")
    help = "part of the transformer that stays in VRAM [what fits beside 4 GB]"
    parser.add_argument("--resident", type=float, help=help)
    parser.add_argument("--json", action="store_true", help="no table")
    options = parser.parse_args(arguments)
    sizes = [options.size] if options.size else [job[:2] for job in JOBS]
    options.size = [(*size, options.frames or 121) for size in sizes]
    if options.resident is not None and not 0 <= options.resident <= 1:
        parser.error(f"--resident is a part, 0 to 1, got {options.resident}")
    for width, height, frames in options.size:
        if width % 64 or height % 64 or frames % 8 != 1:
            parser.error(
                f"{width}x{height}x{frames}: two stages need multiples of 64 pixels, and 8 n + 1 "
                "frames"
            )
    return options


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"WIDTHxHEIGHT expected, like 1280x704, got {text}")
    return int(match[1]), int(match[2])


Job = tuple[tuple[int, int, int], list[tuple[Mode, Clip]]]


def _job(machine: Machine, size: tuple[int, int, int], block_format: str) -> Job:
    modes = [mode for mode in MODES if machine.card.peak(RATES[mode.matmul])]
    return size, [(mode, clip(machine, mode, size, block_format)) for mode in modes]


def assumptions() -> dict[str, Any]:
    """Return everything that is assumed and not a part of a peak."""
    return {
        "gap_seconds": project_time.GAP_SECONDS,
        "enqueue_seconds": project_time.ENQUEUE_SECONDS,
        "reserved_bytes": project_time.RESERVED_BYTES,
        "fp32_efficiency": project_time.FP32_EFFICIENCY,
        "clocks": "boost clocks of datasheets, held",
        "elementwise": {
            name: {"token_bytes": one.token_bytes, "kernels": one.kernels, "source": one.source}
            for name in sorted({mode.code for mode in MODES})
            for one in [elementwise(name)]
        },
        "overlap": "a step is the longest of device, bus and host",
        "text": "1024 tokens, in bf16, its weights cross the bus once",
        "fp8": "a file that holds fp8: nothing is decoded",
    }


def _kinds(card: Card) -> list[str]:
    kinds = {kind for mode in MODES for kind in (mode.matmul, mode.attention)}
    kinds |= {"memory", "dequant", "convolution bf16"}
    return sorted(kind for kind in kinds if card.peak(RATES[kind]))


def _as_json(machine: Machine, jobs: Sequence[Job], block_format: str) -> dict[str, Any]:
    card = machine.card
    found = {kind: machine.efficiency(kind) for kind in _kinds(card)}
    return {
        "card": card.name,
        "format": block_format,
        "peaks": {"tflops": dict(card.tflops), "memory_gbs": card.memory_gbs}
        | {"bus_gbs": card.bus_gbs, "boost_ghz": card.boost_ghz, "source": dict(card.source)},
        "efficiencies": {
            kind: {"value": round(one.value, 3), "origin": one.origin}
            for kind, one in found.items()
        },
        "jobs": [
            {"size": list(size), "modes": {mode.name: _clip_json(one) for mode, one in modes}}
            for size, modes in jobs
        ],
    }


def _clip_json(one: Clip) -> dict[str, Any]:
    return {
        "seconds": round(one.seconds, 2),
        "parts": {name: round(value, 3) for name, value in one.parts.items()},
        "stages": [
            {
                "steps": count,
                "video_tokens": tokens.video,
                "step_seconds": round(step.seconds, 4),
                "limit": step.limit,
                "terms": {name: round(value, 4) for name, value in step.terms.items()},
                "bus": round(step.bus, 4),
                "host": round(step.host, 4),
            }
            for step, count, tokens in zip(one.steps, one.counts, one.tokens, strict=True)
        ],
    }


def _show(machine: Machine, jobs: Sequence[Job], block_format: str, console: Console) -> None:
    card = machine.card
    console.print(f"\nProjection, not a measurement: {card.name}, {block_format}", style="bold")
    rates = ", ".join(f"{name} {rate:g}" for name, rate in card.tflops.items() if rate)
    sources = "; ".join(f"{name}: {source}" for name, source in card.source.items())
    console.print(
        f"peaks: {rates} TFLOP/s; memory {card.memory_gbs:g}, bus {card.bus_gbs:g} GB/s; "
        f"{card.boost_ghz:g} GHz ({sources})",
        style="dim",
    )
    for kind in _kinds(card):
        found = machine.efficiency(kind)
        console.print(f"  {kind}: {found.value:.2f} of the peak ({found.origin})", style="dim")
    for size, modes in jobs:
        _show_job(size, modes, console)
    for name, value in assumptions().items():
        console.print(f"  assumed {name}: {value}", style="dim", markup=False, highlight=False)


def _show_job(
    size: tuple[int, int, int], modes: Sequence[tuple[Mode, Clip]], console: Console
) -> None:
    stages = [
        f"stage {number}: {count} steps of {tokens.video} tokens"
        for number, (count, tokens) in enumerate(
            zip(modes[0][1].counts, modes[0][1].tokens, strict=True), start=1
        )
    ]
    title = f"projection: {'x'.join(map(str, size))}, {', '.join(stages)}"
    table = Table(title=title, title_justify="left")
    table.add_column("seconds")
    for mode, _ in modes:
        table.add_column(mode.name, justify="right")
    clips = [one for _, one in modes]
    for number in range(len(clips[0].steps)):
        steps = [one.steps[number] for one in clips]
        name = f"step of stage {number + 1}"
        table.add_row(name, *(f"{step.seconds:.2f} {step.limit}" for step in steps), style="bold")
        for term in (*steps[0].terms, "bus", "host"):
            values = (s.terms[term] if term in s.terms else getattr(s, term) for s in steps)
            table.add_row(f"  {term}", *(f"{value:.3f}" for value in values), style="dim")
    for part in clips[0].parts:
        table.add_row(part, *(f"{one.parts[part]:.1f}" for one in clips))
    table.add_row("clip", *(f"{one.seconds:.1f}" for one in clips), style="bold")
    first = clips[0].seconds
    table.add_row("times comfyui-gguf", *(f"{first / one.seconds:.2f}" for one in clips))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
