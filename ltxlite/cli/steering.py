"""Flags that name images and clips, and how all media become conditions of a job."""

import argparse
import re
from dataclasses import dataclass, replace

from ltxlite.cli.hearing import add_hearing, sound_of, voice_of
from ltxlite.conditions import Conditions, ControlKind, Guide, Image, Reference, Source
from ltxlite.errors import RequestError

# Behind the last of these a path ends; C:\x.png@0:0.7 has no such colon after its drive.
_PLACE = r"(?:-?\d+|\d+(?:\.\d+)?[s%]|last|ref|after)"
_NUMBER = r"\d*\.?\d+"
_PICTURE = re.compile(
    rf"(?P<path>.+?)(?:@(?P<at>{_PLACE}))?(?::(?P<strengths>{_NUMBER}(?:,{_NUMBER})*))?"
    rf"(?::(?P<attention>{_NUMBER}))?",
    re.DOTALL,
)
_KINDS: tuple[ControlKind, ...] = ("canny", "tracks")


def add_steering(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    group = parser.add_argument_group("images and clips that steer")
    group.add_argument(
        *("--image", "--guide"),
        action=_InOrder,
        default=[],
        metavar="PATH[@AT][:S1[,S2]]",
        help="--image replaces frames, --guide [...:ATTENTION] is shown beside them; stills and "
        "videos; AT: frame, -1, 2.5s, 50%%, last, for guides ref (before frame 0) and after "
        "(behind references) (default 0); a strength a stage (default 1); may be repeated",
    )
    group.add_argument(
        "--guide-mode",
        choices=("official", "comfy"),
        default="official",
        help="comfy: as ComfyUI's node, which puts videos at the beginning of a latent frame and "
        "takes a guide's strength, 0 to 10, as its attention too (default official)",
    )
    group.add_argument(
        "--image-crf", type=int, help="H.264 that stills pass first, 0 off (default by model: 33)"
    )
    _add_references(group)
    _add_sources(group)
    add_hearing(parser)


def _add_references(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="[canny:|tracks:]PATH[:STRENGTH[:ATTENTION]]",
        help="clip or still that an IC-LoRA (--lora) follows; canny: draws its edges first, "
        "tracks: the motion tracks of a JSON file; may be repeated",
    )
    group.add_argument(
        "--tracks",
        action="append",
        dest="reference",
        type=lambda text: f"tracks:{text}",
        metavar="JSON[:STRENGTH[:ATTENTION]]",
        help='motion tracks that an IC-LoRA follows: [[{"x": 1, "y": 2}, ...], ...] in pixels '
        "of the clip, points spread over it",
    )
    group.add_argument(
        "--reference-mask",
        action="append",
        default=[],
        metavar="PATH",
        help="where a reference counts (white), in order; of its size",
    )
    group.add_argument(
        "--reference-downscale", type=int, metavar="N", help="encode at 1/N size (default: LoRA's)"
    )
    group.add_argument(
        "--reference-temporal", type=int, metavar="N", help="of every Nth frame (default: LoRA's)"
    )
    group.add_argument(
        "--reference-stages", metavar="N[,N]", help="stages that see references (default 1)"
    )


def _add_sources(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--init-video", metavar="PATH", help="clip that is made anew")
    group.add_argument(
        "--denoise", type=float, metavar="X", help="how much of it, 0 to 1 (default 0.5)"
    )
    group.add_argument("--mask", metavar="PATH", help="where it is made anew (white); of its size")


class _InOrder(argparse.Action):
    """Keeps --image and --guide in one list."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Append (flag, text)."""
        found = [*getattr(namespace, self.dest), (option_string, values)]
        setattr(namespace, self.dest, found)


@dataclass(frozen=True, slots=True)
class Spec:
    """A picture flag in its parts; None where nothing was said."""

    path: str
    at: str | None
    strengths: tuple[float, ...]
    attention: float | None


def parse_picture(text: str, flag: str) -> Spec:
    """Split PATH@AT:STRENGTHS:ATTENTION, also where the path is C:\\x.png.

    Raises RequestError without a path.
    """
    found = _PICTURE.fullmatch(text)
    if found is None:
        raise RequestError(f"{flag} {text!r}: wanted a file, such as a.png@0:0.7")
    strengths = tuple(float(part) for part in (found["strengths"] or "1").split(","))
    attention = None if found["attention"] is None else float(found["attention"])
    return Spec(found["path"], found["at"], strengths, attention)


def with_media(conditions: Conditions, options: argparse.Namespace) -> Conditions:
    """Return the conditions with the media that the flags name.

    Raises RequestError for flags that say nothing without another one, or that cannot be read.
    """
    return replace(
        conditions,
        images=tuple(_image(text, options) for flag, text in options.image if flag == "--image"),
        guides=tuple(_guide(text, options) for flag, text in options.image if flag == "--guide"),
        references=_references(options),
        sound=sound_of(options),
        voice=voice_of(options),
        source=_source(options),
    )


def _image(text: str, options: argparse.Namespace) -> Image:
    spec = parse_picture(text, "--image")
    if spec.attention is not None:
        raise RequestError(f"--image {text!r}: only a --guide has an attention")
    return Image(spec.path, spec.at or "0", spec.strengths, options.image_crf)


def _guide(text: str, options: argparse.Namespace) -> Guide:
    spec = parse_picture(text, "--guide")
    strengths, attention = spec.strengths, spec.attention
    comfy = options.guide_mode == "comfy"
    if comfy and attention is None:
        if len(strengths) > 1:
            raise RequestError(
                f"--guide {text!r}: with --guide-mode comfy one strength is the attention too; "
                "give one, or :ATTENTION"
            )
        attention = strengths[0]
    if comfy:
        strengths = tuple(min(strength, 1.0) for strength in strengths)
    attention = 1.0 if attention is None else attention
    return Guide(spec.path, spec.at or "0", strengths, attention, options.image_crf, comfy)


def _references(options: argparse.Namespace) -> tuple[Reference, ...]:
    texts, masks = options.reference, options.reference_mask
    if len(masks) > len(texts):
        raise RequestError(f"--reference-mask given {len(masks)} times for {len(texts)} references")
    for name in ("downscale", "temporal", "stages"):
        if getattr(options, f"reference_{name}") is not None and not texts:
            raise RequestError(f"--reference-{name} without --reference")
    padded = [*masks, *[None] * (len(texts) - len(masks))]
    pairs = zip(texts, padded, strict=True)
    return tuple(_reference(text, mask, options) for text, mask in pairs)


def _reference(text: str, mask: str | None, options: argparse.Namespace) -> Reference:
    kind: ControlKind = next((k for k in _KINDS if text.startswith(f"{k}:")), "video")
    spec = parse_picture(text.removeprefix(f"{kind}:"), "--reference")
    if spec.at is not None or len(spec.strengths) > 1:
        raise RequestError(f"--reference {text!r}: wanted PATH, PATH:STRENGTH or with :ATTENTION")
    return Reference(
        spec.path,
        spec.strengths[0],
        1.0 if spec.attention is None else spec.attention,
        mask,
        options.reference_downscale,
        options.reference_temporal,
        _stages(options.reference_stages),
        kind,
    )


def _stages(text: str | None) -> tuple[int, ...]:
    if text is None:
        return (1,)
    if not re.fullmatch(r"\d(,\d)*", text):
        raise RequestError(f"--reference-stages {text!r}: wanted numbers such as 1 or 1,2")
    return tuple(int(part) for part in text.split(","))


def _source(options: argparse.Namespace) -> Source | None:
    if options.init_video is None:
        for name in ("denoise", "mask"):
            if getattr(options, name) is not None:
                raise RequestError(f"--{name} without --init-video")
        return None
    denoise = options.denoise
    if denoise is None:
        denoise = 0.5 if options.mask is None else 1.0
    return Source(options.init_video, mask=options.mask, denoise=denoise)
