"""What the user may ask: frozen records whose JSON is a job file. No torch, no files opened here.

Of ours it imports only the error tree and the torch-free records of `sampling.settings`,
`strength`, `conditions` and `tuning`.
"""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar

from ltxlite.conditions import Conditions
from ltxlite.errors import RequestError
from ltxlite.sampling.settings import Guidance, Statistics, check_sampler
from ltxlite.strength import Strength
from ltxlite.tuning import Tuning

JOB_VERSION = 1

Sound = Literal["refine", "keep", "freeze"]
Upscaler = Literal["x1.5", "x2", "pixels"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
MathName = Literal["auto", "int8", "fp16", "bf16", "fp8"]
Variant = Literal["dev", "distilled"]

# Samplers that carry nothing but the noisy state from step to step, one evaluation each.
_FORGETFUL = ("euler", "euler_ancestral", "euler_cfg_pp", "euler_ancestral_cfg_pp")


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass of sampling, at one size.

    scale: width and height as a fraction of the clip's ("1/2").  sigmas: a schedule
    (`sampling.schedules.parse`).  upscaler: how the previous stage's latent gets here, by a model
    or through "pixels"; None where the size stays.  loras: strength of each LoRA file in this
    stage, a number or, by stream and by block, a record; the last one serves the rest.
    sound: what happens to the previous stage's sound: "refine" noises and denoises it again,
    "keep" does so for the picture's sake but ships the earlier sound, "freeze" holds it fixed.
    noise: how much noise the stage starts from, 0 to 1; None means its first sigma.
    real_tokens: the ltx schedule shifts by this stage's token count instead of 4096.
    seed: of this stage's initial noise; None derives it from the job's.
    statistics: what keeps the picture's channels from drifting.
    audio_norm: after each step the predicted sound is multiplied by this, the last one serves all
    further steps; where it is not 1, noise is mixed in anew.  Source: features.md G8.
    """

    scale: str = "1"
    sigmas: str = "distilled"
    sampler: str = "euler"
    sampler_options: dict[str, float | bool] = field(default_factory=dict)
    video: Guidance = field(default_factory=Guidance)
    audio: Guidance = field(default_factory=Guidance)
    upscaler: Upscaler | None = None
    loras: tuple[Strength, ...] = ()
    sound: Sound = "refine"
    noise: float | None = None
    real_tokens: bool = False
    seed: int | None = None
    statistics: Statistics = field(default_factory=Statistics)
    audio_norm: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_sampler(self.sampler, self.sampler_options)
        if not 0 < self.fraction <= 1:
            raise RequestError(f"stage scale is {self.scale!r}, wanted a fraction above 0, up to 1")
        if self.noise is not None and not 0 <= self.noise <= 1:
            raise RequestError(f"stage noise is {self.noise}, wanted 0 to 1")
        _check_audio_norm(self)
        _one_of("stage sound", self.sound, Sound)
        if self.upscaler is not None:
            _one_of("stage upscaler", self.upscaler, Upscaler)

    @property
    def fraction(self) -> Fraction:
        """The scale as a number."""
        return parse_fraction(self.scale, "stage scale")

    def lora_strength(self, index: int) -> Strength:
        """Return the strength of LoRA file number `index` in this stage; 1 if none is given."""
        if not self.loras:
            return Strength()
        return Strength.of(self.loras[min(index, len(self.loras) - 1)])


@dataclass(frozen=True, slots=True)
class Files:
    """Paths of model files or folders; a part named on its own goes before the one in `model`."""

    model: str
    text_encoder: str | None = None
    vae: str | None = None
    audio_vae: str | None = None
    connectors: str | None = None
    text_projection: str | None = None
    upscalers: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the classical decode cuts the picture: pixels of the long side, and frames.

    The short side is cut alike, in tiles of the picture's shape. The defaults are the official
    ones. Source: LTX-2 400fd31 TileSizeConfig.
    """

    size: int = 768
    overlap: int = 64
    frames: int = 80
    frames_overlap: int = 24

    def __post_init__(self) -> None:
        for what, size, overlap, unit in (
            ("pixels", self.size, self.overlap, 32),
            ("frames", self.frames, self.frames_overlap, 8),
        ):
            if size < 2 * unit or size % unit or overlap % unit or not 0 <= overlap < size:
                raise RequestError(
                    f"tiles of {size} {what} overlapping by {overlap}: wanted multiples of "
                    f"{unit}, a size from {2 * unit} on and less overlap than that"
                )


@dataclass(frozen=True, slots=True)
class Output:
    """Where the clip goes and how it is coded.

    path: an .mp4, or a folder for PNG frames and a WAV.  crop: deliver the clip cut to this
    (width, height) around its centre.  wav: also write the sound there.  tiles: decode in tiles
    that are blended, as the official pipelines do; None decodes exactly.  trim: frames that are
    left out at the beginning, and the sound with them: where stages put an image in anew, the
    first ones may flicker (features.md D10).  cut: pixels that are left out at the left, above, at
    the right and below, such as the panel of a masked reference.  match, match_share: a picture
    whose colours each frame takes on, and how much of the way, 0 to 1.
    """

    path: str
    crf: int = 19
    crop: tuple[int, int] | None = None
    wav: str | None = None
    tiles: Tiles | None = None
    trim: int = 0
    cut: tuple[int, int, int, int] = (0, 0, 0, 0)
    match: str | None = None
    match_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.crf <= 51:
            raise RequestError(f"crf is {self.crf}; H.264 takes 0 (lossless) to 51")
        if self.trim < 0:
            raise RequestError(f"trim is {self.trim}, wanted a number of frames, 0 or more")
        if min(self.cut) < 0 or any(side % 2 for side in self.cut):
            raise RequestError(f"cut is {self.cut}, wanted even numbers of pixels, 0 or more")
        if not 0 <= self.match_share <= 1:
            raise RequestError(f"colours matched by {self.match_share}, wanted 0 to 1")


@dataclass(frozen=True, slots=True)
class Request:
    """A whole job. Sizes are final pixels, already snapped; `fps` is exact ("24000/1001").

    quantize: a type that matrices of the blocks are quantized to while they load.  math: what
    the transformer's products are computed in.  exact: layers that stay in bf16 all the same.
    encode_tiles: encode pictures that are given in tiles that are blended; None encodes exactly.
    picture: False makes sound alone, of frames / fps seconds; width and height mean nothing then.
    """

    prompt: str
    files: Files
    output: Output
    stages: tuple[Stage, ...]
    width: int = 1536
    height: int = 1024
    frames: int = 121
    fps: str = "24"
    seed: int = 10
    negative: str | None = None
    device: str = "auto"
    dtype: DType = "auto"
    quantize: str | None = None
    math: MathName = "auto"
    exact: tuple[str, ...] = ()
    encode_tiles: Tiles | None = None
    conditions: Conditions = field(default_factory=Conditions)
    tuning: Tuning = field(default_factory=Tuning)
    picture: bool = True
    version: int = JOB_VERSION

    def __post_init__(self) -> None:
        if self.version != JOB_VERSION:
            raise RequestError(
                f"job file version {self.version}; this ltxlite reads version {JOB_VERSION}"
            )
        for name in ("width", "height", "frames"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 16:
                raise RequestError(f"{name} is {value!r}, wanted a whole number from 1 to 65535")
        if not 1 <= self.rate <= 240:
            raise RequestError(f"fps is {self.fps}, wanted 1 to 240")
        if not self.stages:
            raise RequestError("the job has no stages; give at least one")
        if self.output.trim >= self.frames:
            raise RequestError(
                f"trim: {self.output.trim} frames of a clip of {self.frames} would leave nothing"
            )
        self._check_cut()
        if self.output.trim and self.conditions.source is not None:
            raise RequestError("trim: frames of a source are kept; leave --trim-head out")
        _one_of("dtype", self.dtype, DType)
        _one_of("math", self.math, MathName)
        self._check_stages()
        if not self.picture:
            _check_sound_alone(self)

    def _check_stages(self) -> None:
        named = [("reference", item.path, item.stages) for item in self.conditions.references]
        if (voice := self.conditions.voice) is not None:
            named.append(("voice", voice.path, voice.stages))
        for what, path, stages in named:
            if max(stages) > len(self.stages):
                raise RequestError(
                    f"{what} {path}: stages {stages} of a job with {len(self.stages)}"
                )

    def _check_cut(self) -> None:
        if self.output.match is not None and self.conditions.source is not None:
            raise RequestError(
                "match: frames of a source are kept as they are; leave --match-colors out"
            )
        left, above, right, below = self.output.cut
        if any(self.output.cut) and (self.conditions.source is not None or self.output.crop):
            raise RequestError("cut: goes neither with a source nor with a size that is cropped")
        if left + right >= self.width or above + below >= self.height:
            raise RequestError(
                f"cut: {self.output.cut} of {self.width}x{self.height} leaves nothing"
            )

    @property
    def rate(self) -> Fraction:
        """Frames per second."""
        return parse_fraction(self.fps, "fps")

    @property
    def seconds(self) -> Fraction:
        """Length of the clip."""
        return self.frames / self.rate

    def to_json(self) -> str:
        """Return the job as JSON text; `from_json` gives the equal record back."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, where: str) -> "Request":
        """Read a job file. Raises RequestError naming the field that is wrong."""
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise RequestError(f"{where}: not a job file ({error})") from None
        return build(cls, values, where)


def _check_audio_norm(stage: Stage) -> None:
    if not stage.audio_norm:
        return
    if not all(0 <= factor <= 10 for factor in stage.audio_norm):
        raise RequestError(f"audio norm {stage.audio_norm}: wanted factors from 0 to 10")
    if stage.sampler not in _FORGETFUL:
        raise RequestError(
            f"audio norm begins each step anew, which {stage.sampler} cannot; choose one of "
            f"{', '.join(_FORGETFUL)}"
        )


def _check_sound_alone(request: Request) -> None:
    """Refuse what is about a picture in a job that makes none."""
    conditions, stage, output = request.conditions, request.stages[0], request.output
    sound, nag, tuned = conditions.sound, conditions.nag, request.tuning
    found = {
        "further stages": len(request.stages) > 1,
        "an upscaler": stage.upscaler is not None,
        "--image": conditions.images,
        "--guide": conditions.guides,
        "--reference": conditions.references,
        "a source clip": conditions.source,
        "--nag (--nag-audio is for sound)": nag and nag.video is not None,
        "guidance of the picture": stage.video != Guidance(),
        "modality guidance (it compares with the picture)": stage.audio.modality != 1,
        "a schedule by picture tokens": stage.real_tokens,
        "statistics of the picture": stage.statistics.is_active,
        "a scale of what is the picture's": (
            tuned.video,
            tuned.audio_to_video,
            tuned.video_to_audio,
        )
        != (1, 1, 1),
        "a crop": output.crop,
        "--trim-head": output.trim,
        "--cut": any(output.cut),
        "--match-colors": output.match,
        "tiles": output.tiles or request.encode_tiles,
        "--audio that stays as it is (add --audio-denoise)": sound and sound.denoise == 0,
        "the given sound as output": sound and sound.output == "original",
    }
    for what, is_there in found.items():
        if is_there:
            raise RequestError(f"sound alone is made without {what}; leave it out")


def parse_fraction(text: str, name: str) -> Fraction:
    """Read "24", "23.976", "24000/1001" or "1/2" exactly; RequestError otherwise."""
    if len(text) > 32 or "e" in text.lower():
        raise RequestError(f"{name} is {text!r}, wanted a number or a fraction such as 24000/1001")
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise RequestError(
            f"{name} is {text!r}, wanted a number or a fraction such as 24000/1001"
        ) from None


T = TypeVar("T")


def build(kind: type[T], values: object, where: str) -> T:
    """Build a record from parsed JSON, refusing unknown fields and values of another type."""
    if not isinstance(values, Mapping):
        raise RequestError(f"{where}: wanted an object of {kind.__name__} fields, got {values!r}")
    hints = typing.get_type_hints(kind)
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise RequestError(f"{where}: unknown field {unknown[0]!r}; {kind.__name__} has {known}")
    arguments = {
        name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()
    }
    try:
        return kind(**arguments)
    except TypeError as error:
        raise RequestError(f"{where}: {error}") from None


def _convert(hint: Any, value: object, where: str) -> object:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(inner, value, where)
    if origin is Literal:
        _one_of(where, value, hint)
        return value
    if origin is tuple:
        return _convert_tuple(inner, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            _refuse(where, value, "an object")
        return dict(value)
    if hint is Strength and isinstance(value, int | float) and not isinstance(value, bool):
        return Strength.of(float(value))  # as people write it
    if is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        _refuse(where, value, hint.__name__)
    return value


def _convert_union(kinds: tuple[Any, ...], value: object, where: str) -> object:
    if value is None and type(None) in kinds:
        return None
    concrete = [kind for kind in kinds if kind is not type(None)]
    wants_list = isinstance(value, list)
    fitting = [kind for kind in concrete if (typing.get_origin(kind) is tuple) == wants_list]
    if not fitting:
        _refuse(where, value, " or ".join(str(kind) for kind in concrete))
    return _convert(fitting[0], value, where)


def _convert_tuple(inner: tuple[Any, ...], value: object, where: str) -> object:
    if not isinstance(value, (list, tuple)):
        _refuse(where, value, "a list")
    if len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(_convert(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(inner):
        _refuse(where, value, f"a list of {len(inner)}")
    return tuple(_convert(kind, item, where) for kind, item in zip(inner, value, strict=True))


def _refuse(where: str, value: object, wanted: str) -> typing.NoReturn:
    raise RequestError(f"{where} is {value!r}, wanted {wanted}")


def _one_of(name: str, value: object, choices: Any) -> None:
    allowed = typing.get_args(choices)
    if value not in allowed:
        raise RequestError(f"{name} is {value!r}, choose one of {', '.join(map(str, allowed))}")
