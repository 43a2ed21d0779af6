"""The documented defaults: which stages a checkpoint variant and a quality stand for.

Sources: LTX-2 400fd31 (ltx_pipelines/utils/constants), model.md 4.6 and 5, features.md D2, D7.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from ltxlite.errors import RequestError
from ltxlite.request import Stage, Variant
from ltxlite.sampling.settings import Guidance
from ltxlite.strength import Strength

Quality = Literal["draft", "balanced", "max"]

# Final sizes by name: (width, height, delivered crop or None). 1280x720 and 1920x1080 are no
# multiples of 64; the clip is generated at the next size and cut.
SIZES: dict[str, tuple[int, int, tuple[int, int] | None]] = {
    "small": (768, 512, None),
    "default": (1536, 1024, None),
    "720p": (1280, 768, (1280, 720)),
    "1080p": (1920, 1088, (1920, 1080)),
    "portrait": (1024, 1536, None),
    "square": (1024, 1024, None),
}

# Our own words; what guidance pushes away from, in picture and in sound.
NEGATIVE_PROMPT = (
    "blurry, out of focus, low resolution, compression artifacts, flickering, jitter, ghosting, "
    "warped anatomy, extra fingers, melting faces, morphing objects, frozen motion, stutter, "
    "subtitles, captions, watermark, logo, border, overexposed, underexposed, banding, plastic "
    "skin, cartoon, cheap 3d render, distorted voice, robotic speech, clipping, hiss, hum, echo, "
    "muffled audio, wrong language, sound out of sync"
)

_REFINE = "stage2"


@dataclass(frozen=True, slots=True)
class Model:
    """What a preset needs to know of a checkpoint."""

    variant: Variant
    family: str = "2.3"
    layers: int = 48

    @property
    def perturbed_block(self) -> int:
        """The block whose self-attention the STG pass leaves out: 28 of 48 in 2.3, 29 in 2.0."""
        released = 29 if self.family == "2.0" else 28
        return released if self.layers == 48 else released * self.layers // 48


def stages_for(
    model: Model, quality: Quality = "balanced", count: int | None = None, ratio: str = "x2"
) -> tuple[Stage, ...]:
    """Return the stages of a job.

    quality: draft is the first of two stages alone, at its half size; balanced is the official
    two-stage recipe; max samples with res_2s (the official HQ recipe for dev checkpoints).
    count: 1, 2 or 3 stages; None lets quality decide.  ratio: "x2" or "x1.5" between them.
    With dev checkpoints the first LoRA is taken to be the distilled one: it is off in the guided
    stage and on in the refining ones (.25 and .5 for max).
    """
    if quality not in get_args(Quality):
        raise RequestError(f"quality is {quality!r}, choose one of {', '.join(get_args(Quality))}")
    scales = _scales(quality, count, ratio)
    first = _first_stage(model, quality)
    stages = [replace(first, scale=scales[0], loras=_first_loras(model, quality, scales))]
    for scale in scales[1:]:
        stages.append(_refining_stage(model, quality, scale, ratio))
    return tuple(stages)


def without_picture(stage: Stage) -> Stage:
    """Return a first stage for sound alone: nothing of a picture, nor guidance against it.

    Source: LTX-2 400fd31, t2a_one_stage (30 steps, cfg 7, stg 1, rescale .7).
    """
    audio = replace(stage.audio, modality=1.0)
    return replace(stage, scale="1", video=Guidance(), audio=audio, real_tokens=False)


def _scales(quality: Quality, count: int | None, ratio: str) -> tuple[str, ...]:
    if quality == "draft" and count is None:
        return ("1",)
    table = {
        "x2": {1: ("1",), 2: ("1/2", "1"), 3: ("1/4", "1/2", "1")},
        "x1.5": {1: ("1",), 2: ("2/3", "1"), 3: ("4/9", "2/3", "1")},
    }
    number = 2 if count is None else count
    if ratio not in table or number not in table[ratio]:
        raise RequestError(f"{number} stages by {ratio}: wanted 1, 2 or 3 stages, by x2 or x1.5")
    return table[ratio][number]


def _first_stage(model: Model, quality: Quality) -> Stage:
    if model.variant == "distilled":
        return Stage(sigmas="distilled", sampler="res_2s" if quality == "max" else "euler")
    if quality == "max":
        video = Guidance(cfg=3.0, rescale=0.45, modality=3.0)
        audio = Guidance(cfg=7.0, rescale=1.0, modality=3.0)
        return Stage(sigmas="ltx:15", sampler="res_2s", video=video, audio=audio, real_tokens=True)
    video = Guidance(
        cfg=3.0, stg=1.0, rescale=0.7, modality=3.0, stg_blocks=(model.perturbed_block,)
    )
    steps = 15 if quality == "draft" else 40 if model.family == "2.0" else 30
    return Stage(sigmas=f"ltx:{steps}", video=video, audio=replace(video, cfg=7.0))


def _first_loras(model: Model, quality: Quality, scales: tuple[str, ...]) -> tuple[Strength, ...]:
    if model.variant == "distilled":
        return ()
    return (Strength.of(0.25 if quality == "max" else 0.0),)


def _refining_stage(model: Model, quality: Quality, scale: str, ratio: str) -> Stage:
    dev = model.variant == "dev"
    return Stage(
        scale=scale,
        sigmas=_REFINE,
        sampler="res_2s" if quality == "max" else "euler",
        upscaler="x1.5" if ratio == "x1.5" else "x2",
        loras=(Strength.of(0.5 if quality == "max" else 1.0),) if dev else (),
        sound="keep" if dev else "refine",
    )


def needs_distilled_lora(stages: tuple[Stage, ...], model: Model) -> bool:
    """Tell whether some stage of a dev checkpoint refines unguided, which takes that LoRA."""
    return model.variant == "dev" and any(
        stage.video.cfg == 1.0 and stage.upscaler is not None for stage in stages
    )
