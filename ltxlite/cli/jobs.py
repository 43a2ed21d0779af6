"""Turns the flags of `generate` into a request, and reads saved jobs."""

import argparse
import math
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from ltxlite.catalog import SOURCES
from ltxlite.checkpoint.variant import disagreement, variant_of
from ltxlite.cli.hearing import where_heard, with_hearing
from ltxlite.cli.lint import lint
from ltxlite.cli.prompting import with_prompts
from ltxlite.cli.statistics import with_statistics
from ltxlite.cli.steering import with_media
from ltxlite.cli.tuning import tuning_of
from ltxlite.conditions import Conditions
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.geometry import size_multiple
from ltxlite.given.reference_factors import follows_references
from ltxlite.given.takes import factors_of
from ltxlite.math_errors import exact_layers
from ltxlite.media.container import read_metadata
from ltxlite.network_configs import missing_parts
from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.partial import partial_stages
from ltxlite.pipeline import JOB_TAG
from ltxlite.presets import (
    NEGATIVE_PROMPT,
    SIZES,
    Model,
    needs_distilled_lora,
    stages_for,
    without_picture,
)
from ltxlite.relay_text import Extent
from ltxlite.request import Files, Output, Request, Stage, Tiles, parse_fraction
from ltxlite.sampling.settings import Guidance
from ltxlite.stages import refuse_missing
from ltxlite.strength import Strength, parse_lora

Note = Callable[[str], None]
DEFAULT_FRAMES = 121
DEFAULT_OUTPUT = "out.mp4"


def new_job(options: argparse.Namespace, note: Note) -> tuple[Request, Networks]:
    """Build a request from flags and the checkpoint's defaults."""
    if options.prompt is None and options.schedule is None:
        raise RequestError('no prompt: say what to see and hear with --prompt "..."')
    files, strengths = files_of(options)
    exact = exact_layers(Path(options.exact)) if options.exact else ()
    given = (options.device, options.dtype, options.quantize, options.math, exact)
    networks = open_networks(files, *given)
    networks.sound_alone = not options.picture
    model = _model(networks, options.variant, note)
    stages = _stages(options, model)
    if needs_distilled_lora(stages, model) and not options.distilled_lora:
        raise CheckpointError(f"missing: {SOURCES['distilled_lora'].advice()}, or use --stages 1")
    refuse_missing(stages, networks)
    media = with_media(Conditions(), options)
    strengths = _where_referred(options.lora, strengths, media, len(stages), note)
    strengths = where_heard(options.lora, strengths, media.voice, len(stages), note)
    stages = _with_loras(stages, strengths, bool(options.distilled_lora))
    stages = with_statistics(stages, options, media)
    stages = with_hearing(stages, options, media.voice)
    downscales = _downscales(media, files, networks)
    width, height, crop = _size(options, stages, networks, downscales, note)
    frames = _frames(options, networks, note)
    extent = Extent(frames, parse_fraction(options.fps, "--fps"))
    prompt, conditions = with_prompts(media, options, extent)
    request = Request(
        prompt=prompt,
        negative=NEGATIVE_PROMPT if options.negative is None else options.negative,
        files=files,
        output=_output(options, crop),
        stages=stages if options.sigmas else partial_stages(stages, conditions),
        width=width,
        height=height,
        frames=frames,
        fps=options.fps,
        seed=secrets.randbelow(1 << 32) if options.seed == -1 else options.seed,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        math=options.math,
        exact=exact,
        encode_tiles=parse_tiles(options.tiled_encode, "--tiled-encode"),
        conditions=conditions,
        tuning=tuning_of(options),
        picture=options.picture,
    )
    lint(request, networks, model, bool(options.distilled_lora), note)
    return request, networks


def _output(options: argparse.Namespace, crop: tuple[int, int] | None) -> Output:
    tiles = parse_tiles(options.tiled_decode, "--tiled-decode")
    path = options.output or DEFAULT_OUTPUT
    cut = _cut(options.cut)
    match, share = _match(options.match_colors)
    return Output(path, options.crf, crop, options.wav, tiles, options.trim_head, cut, match, share)


def _match(text: str | None) -> tuple[str | None, float]:
    """Read IMAGE[:SHARE]; a drive's colon is no share's."""
    found = re.fullmatch(r"(.+?)(?::(\d*\.?\d+))?", text or "")
    return (None, 1.0) if found is None else (found[1], float(found[2] or 1))


def _cut(text: str | None) -> tuple[int, int, int, int]:
    sides = [] if text is None else text.split(",")
    if text is not None and not (len(sides) == 4 and all(side.isdecimal() for side in sides)):
        raise RequestError(f"--cut {text!r}: wanted pixels left, top, right, bottom: 0,0,640,0")
    left, above, right, below = map(int, sides or "0000")
    return left, above, right, below


def load_job(options: argparse.Namespace, note: Note) -> tuple[Request, Networks]:
    """Read a saved job, from JSON or from a clip's own metadata; -o names a new output."""
    path = Path(options.job)
    if path.suffix.lower() == ".json":
        text = path.read_text(encoding="utf-8")
    else:
        tags = read_metadata(path)
        if JOB_TAG not in tags:
            raise RequestError(f"{path}: holds no ltxlite job; only clips made by ltxlite do")
        text = tags[JOB_TAG]
    request = Request.from_json(text, str(path))
    target = Path(options.output or request.output.path)
    if target.exists() and path.exists() and target.samefile(path):
        raise RequestError(f"{path}: the job would overwrite the clip it is read from; use -o")
    request = replace(request, output=replace(request.output, path=str(target)))
    note(f"job from {path}: {request.prompt[:60]!r}, seed {request.seed}")
    given = (request.device, request.dtype, request.quantize, request.math, request.exact)
    return request, open_networks(request.files, *given)


def files_of(options: argparse.Namespace) -> tuple[Files, list[tuple[Strength, ...]]]:
    """Return the files that the flags name, and each LoRA's strengths by stage."""
    if options.model is None:
        raise RequestError("no --model: name a checkpoint or a folder; try `ltxlite demo` first")
    loras = [parse_lora(text) for text in options.lora]
    distilled = [options.distilled_lora] if options.distilled_lora else []
    files = Files(
        model=options.model,
        text_encoder=options.text_encoder,
        vae=options.vae,
        audio_vae=options.audio_vae,
        connectors=options.connectors,
        text_projection=options.text_projection,
        upscalers=tuple(options.upscaler),
        loras=(*distilled, *(path for path, _ in loras)),
    )
    return files, [strengths for _, strengths in loras]


def _model(networks: Networks, variant: str | None, note: Note) -> Model:
    found = networks.files.find("transformer")
    if found is None:
        raise CheckpointError("missing files:\n  " + "\n  ".join(missing_parts(networks.files)))
    config = networks.transformer_config()
    read = variant_of(found)
    if variant is None and (warning := disagreement(found)):
        note(f"warning: {warning}")
    _warn_of_mixed_connectors(networks, config.family, note)
    if variant is not None:
        if read is not None and read[0] != variant:
            note(f"warning: --variant {variant}, but {found.path.name} says {read[0]} ({read[1]})")
        chosen = variant
    elif read is not None:
        chosen = read[0]
        note(f"variant: {chosen} (from {read[1]})")
    else:
        raise RequestError(
            f"{found.path.name}: neither header nor name tells dev from distilled, and the wrong "
            "one gives noise; say --variant dev or --variant distilled"
        )
    return Model("dev" if chosen == "dev" else "distilled", config.family, config.layers)


def _warn_of_mixed_connectors(networks: Networks, family: str, note: Note) -> None:
    """Warn of 2.0's connectors of the other variant: they differ, and no shape tells."""
    models = [networks.files.find(name) for name in ("transformer", "video_connector")]
    said = [variant_of(model) for model in models if model is not None]
    if family == "2.0" and len({one[0] for one in said if one}) == 2:
        note(
            "warning: transformer and connectors of 2.0, one dev and one distilled; mixed, they "
            "follow prompts badly"
        )


def _stages(options: argparse.Namespace, model: Model) -> tuple[Stage, ...]:
    stages = list(stages_for(model, options.quality, options.stages, options.upscale_by))
    stages[0] = _guided(stages[0], options, model)
    if options.steps is not None:
        stages[0] = replace(stages[0], sigmas=_with_steps(stages[0].sigmas, options.steps))
    for name, field in (("sigmas", "sigmas"), ("sampler", "sampler")):
        given = getattr(options, name) or []
        if len(given) > len(stages):
            raise RequestError(f"--{name} given {len(given)} times for {len(stages)} stages")
        for index, value in enumerate(given):
            stages[index] = replace(stages[index], **{field: value})
    if not options.picture:
        stages = [without_picture(stages[0])]
    if options.sound is not None:
        stages[1:] = [replace(stage, sound=options.sound) for stage in stages[1:]]
    return tuple(stages)


def _with_steps(sigmas: str, steps: int) -> str:
    # The distilled table is linear-quadratic with 8 steps; other lengths follow the same rule.
    return f"linq:{steps}" if sigmas == "distilled" else f"ltx:{steps}"


def _guided(stage: Stage, options: argparse.Namespace, model: Model) -> Stage:
    """Return the first stage with the guidance that the flags change, picture and sound apart."""
    changes: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name in ("cfg", "stg", "modality", "rescale", "skip_step"):
        text = getattr(options, name)
        if text is not None:
            first, _, second = text.partition(":")
            changes[0][name] = _value(name, first)
            changes[1][name] = _value(name, second or first)
    if options.guidance_mode is not None:
        for stream in changes:
            stream["mode"] = options.guidance_mode
    blocks = (model.perturbed_block,)
    return replace(
        stage,
        video=_guidance(stage.video, changes[0], blocks),
        audio=_guidance(stage.audio, changes[1], blocks),
    )


def _guidance(base: Guidance, changes: dict[str, Any], blocks: tuple[int, ...]) -> Guidance:
    if changes.get("stg") and not base.stg_blocks:
        changes = {**changes, "stg_blocks": blocks}
    return replace(base, **changes)


def _value(name: str, text: str) -> float | int | tuple[float, ...]:
    try:
        if name == "skip_step":
            return int(text)
        values = tuple(value for part in text.split(",") for value in _repeated(part))
    except ValueError:
        flag = name.replace("_", "-")
        raise RequestError(f"--{flag} {text!r}: wanted a number, or two as 3:7") from None
    if len(values) > 1 and name != "cfg":
        raise RequestError(f"--{name} {text!r}: only --cfg takes one value a step")
    return values if len(values) > 1 else values[0]


def _repeated(text: str) -> tuple[float, ...]:
    """Read a number, or as 2x3 a number three times: one for each of so many steps."""
    value, _, count = text.partition("x")
    return (float(value),) * (min(int(count), 1000) if count else 1)


def _with_loras(
    stages: tuple[Stage, ...], strengths: list[tuple[Strength, ...]], distilled: bool
) -> tuple[Stage, ...]:
    """Give every stage one strength a file: the distilled LoRA's by preset, then the user's."""
    full = []
    for number, stage in enumerate(stages):
        own = tuple(values[min(number, len(values) - 1)] for values in strengths)
        first = (stage.lora_strength(0),) if distilled else ()
        full.append(replace(stage, loras=(*first, *own)))
    return tuple(full)


def _where_referred(
    loras: list[str],
    strengths: list[tuple[Strength, ...]],
    conditions: Conditions,
    stages: int,
    note: Note,
) -> list[tuple[Strength, ...]]:
    """Leave IC-LoRA files without a strength out of stages that see no reference (features F1)."""
    seen = {number for reference in conditions.references for number in reference.stages}
    found = []
    for text, own in zip(loras, strengths, strict=True):
        path, _ = parse_lora(text)
        if seen and text == path and len(seen) < stages and follows_references(path):
            own = tuple(Strength.of(float(n in seen)) for n in range(1, stages + 1))
            note(f"{path}: off in stages that see no reference; {path}:1 keeps it on")
        found.append(own)
    return found


def _downscales(conditions: Conditions, files: Files, networks: Networks) -> dict[int, int]:
    """Return by what each stage's size must divide besides the grid, for its references."""
    found: dict[int, int] = {}
    for reference in conditions.references:
        factor, _ = factors_of(reference, files, networks)
        for number in reference.stages:
            found[number] = math.lcm(found.get(number, 1), factor)
    return found


def _size(
    options: argparse.Namespace,
    stages: tuple[Stage, ...],
    networks: Networks,
    downscales: dict[int, int],
    note: Note,
) -> tuple[int, int, tuple[int, int] | None]:
    width, height, crop = _named_size(options.size)
    if options.quality == "draft" and options.stages is None:
        width, height, crop = width // 2, height // 2, None
    grid = networks.latent_grid()
    multiple = math.lcm(
        *(
            size_multiple([stage.fraction], grid.space * downscales.get(number, 1))
            for number, stage in enumerate(stages, start=1)
        )
    )
    snapped = grid.snap_size(width, multiple), grid.snap_size(height, multiple)
    if snapped != (width, height):
        message = f"{width}x{height}: {len(stages)} stages need multiples of {multiple}"
        if options.strict:
            raise RequestError(f"{message}; the nearest is {snapped[0]}x{snapped[1]}")
        note(f"{message}; using {snapped[0]}x{snapped[1]}")
        if crop and (crop[0] > snapped[0] or crop[1] > snapped[1]):
            crop = None
    return *snapped, crop


def _named_size(text: str) -> tuple[int, int, tuple[int, int] | None]:
    if text in SIZES:
        return SIZES[text]
    match = re.fullmatch(r"(\d{1,5})[xX×](\d{1,5})", text)
    if match is None or not all(32 <= int(size) <= 8192 for size in match.groups()):
        raise RequestError(
            f"--size {text!r}: wanted WIDTHxHEIGHT, 32 to 8192 each, or {', '.join(SIZES)}"
        )
    return int(match[1]), int(match[2]), None


def parse_tiles(text: str | None, flag: str) -> Tiles | None:
    """Read "SIZE,OVERLAP" or "SIZE,OVERLAP,FRAMES,OVERLAP". Raises RequestError."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) not in (2, 4) or not all(re.fullmatch(r"\d{1,5}", part) for part in parts):
        raise RequestError(f"{flag} {text!r}: wanted SIZE,OVERLAP such as 768,64")
    return Tiles(*map(int, parts))


def _frames(options: argparse.Namespace, networks: Networks, note: Note) -> int:
    fps: Fraction = parse_fraction(options.fps, "--fps")
    grid = networks.latent_grid()
    if options.seconds is not None:
        if not 0 < options.seconds <= 3600:
            raise RequestError(f"--seconds {options.seconds}: wanted more than 0, at most 3600")
        wanted = max(1, round(options.seconds * float(fps)))
        # The nearest legal length; a clip may be a sixth of a second off at 24 fps.
        return grid.snap_frames(wanted + grid.time // 2)
    frames: int = DEFAULT_FRAMES if options.frames is None else options.frames
    if not options.picture:
        return frames
    snapped = grid.snap_frames(frames)
    if snapped != frames:
        message = f"{frames} frames: a clip has {grid.time}n + 1"
        if options.strict:
            raise RequestError(f"{message}; the nearest below is {snapped}")
        note(f"{message}; using {snapped}")
    return snapped
