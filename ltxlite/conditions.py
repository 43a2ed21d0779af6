"""What steers a clip besides its prompt: frozen records of a job file. No torch, no files opened.

Places in the clip are text, as people write them: "17" (frame), "-9" (from the end), "2.5s", "50%",
"last", and for guides "ref": one latent frame before the clip begins, and "after": behind the
references that an IC-LoRA follows.
Source: LTX-2 400fd31 and ComfyUI (features.md E2 to E7, F1, G2, I3 to I5, C7, H1).
"""

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from ltxlite.errors import RequestError
from ltxlite.hearing import Sound as Sound
from ltxlite.hearing import Voice as Voice
from ltxlite.record_checks import check_path, check_share, check_stages

LAST, BEFORE, AFTER = "last", "ref", "after"
ControlKind = Literal["video", "canny", "tracks", "source", "filled"]
Edge = Literal["outward", "inward"]
Interval = tuple[float, float]

MAGNIFIED = ("1", "3/2", "2", "4")

_PLACE = re.compile(r"(?P<frame>-?\d{1,6})|(?P<number>\d{1,6}(\.\d{1,6})?)(?P<unit>s|%)")
_FACTORS = range(1, 65)
_MOST_ATTENTION = 10


@dataclass(frozen=True, slots=True)
class Image:
    """An image, or a short clip, that replaces frames of the clip itself.

    at: where its first frame goes.  strengths: one a stage, the last serves the rest; 1 keeps it,
    0 leaves everything free.  crf: how strongly a still is compressed first, 0 not at all; None as
    the model was trained.
    """

    path: str
    at: str = "0"
    strengths: tuple[float, ...] = (1.0,)
    crf: int | None = None

    def __post_init__(self) -> None:
        what = f"image {self.path}"
        _check_picture(what, self.path, self.strengths, self.crf)
        check_place(self.at, what, before=False)


@dataclass(frozen=True, slots=True)
class Guide:
    """An image or clip that is shown beside the clip and pulls it, without being part of it.

    at: the frame that it stands for.  strengths: as an image's.  attention: how much it and the
    clip see of each other; 1 is plain, up to 10 is more.  crf: as an image's.  comfy: a video
    stands where ComfyUI's node puts it: at the beginning of a latent frame, and encoded as the
    middle of a clip is, without a frame of its own for the first.
    """

    path: str
    at: str = "0"
    strengths: tuple[float, ...] = (1.0,)
    attention: float = 1.0
    crf: int | None = None
    comfy: bool = False

    def __post_init__(self) -> None:
        what = f"guide {self.path}"
        _check_picture(what, self.path, self.strengths, self.crf)
        check_place(self.at, what, before=True)
        _check_attention(what, self.attention)


@dataclass(frozen=True, slots=True)
class Reference:
    """A video (or still) that an IC-LoRA was trained to follow.

    strength: 1 shows it clean, less lets it be noised.  attention: how much it and the clip see of
    each other; attention_mask: a video or still of the reference's size, white where they do.
    downscale, temporal: the fraction of size and frames it is encoded at; None as the LoRA file
    says.  stages: those that see it, from 1.  kind: "canny" draws its edges first; "tracks" draws
    the motion tracks of a JSON file; "source" is the source's own clip, as it lies in the stage's
    frames, and "filled" the same with the places painted that are to be made.
    """

    path: str
    strength: float = 1.0
    attention: float = 1.0
    attention_mask: str | None = None
    downscale: int | None = None
    temporal: int | None = None
    stages: tuple[int, ...] = (1,)
    kind: ControlKind = "video"

    def __post_init__(self) -> None:
        what = f"reference {self.path}"
        check_path(what, self.path)
        check_share(f"{what}: strength", self.strength)
        _check_attention(what, self.attention)
        for name, factor in (("downscale", self.downscale), ("temporal", self.temporal)):
            if factor is not None and factor not in _FACTORS:
                raise RequestError(f"{what}: {name} is {factor}, wanted 1 to {_FACTORS[-1]}")
        check_stages(what, self.stages)


@dataclass(frozen=True, slots=True)
class Source:
    """A clip that exists already and of which parts are made anew.

    video, audio: seconds [from, to) of the clip in which picture and sound are made anew; None
    keeps them.  mask: a video or still, white where the picture is made anew.  denoise: how much
    of the whole picture is made anew, 0 to 1.
    offset: the source's frame with which the clip begins; below 0 it begins before the source.
    edge: latent frames at an interval's ends are all made anew ("outward") or only those that lie
    inside of it.  whole: deliver the whole source, at its own size, with the clip put into it.
    held: stages, from 1, in which all of the picture is kept; what is free in later ones starts
    from it.  magnify: how many times its own size it is delivered at ("2", "3/2").  match: give
    what is made the colours that the kept frames before it have in the file.
    first: keep the first frame also where all of the picture is made anew.
    fill: an in- or outpainting LoRA makes the whole picture, and what lies in the mask is blended
    into the source.  pad: pixels that the picture grows by, left, above, right, below; to be made.
    """

    path: str
    video: Interval | None = None
    audio: Interval | None = None
    mask: str | None = None
    denoise: float | None = None
    offset: int = 0
    edge: Edge = "outward"
    whole: bool = False
    held: tuple[int, ...] = ()
    magnify: str = "1"
    match: bool = False
    first: bool = False
    fill: bool = False
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __post_init__(self) -> None:
        what = f"source {self.path}"
        check_path(what, self.path)
        self._check_filling(what)
        for name, interval in (("video", self.video), ("audio", self.audio)):
            if interval is not None and not 0 <= interval[0] < interval[1]:
                raise RequestError(
                    f"{what}: {name} from {interval[0]:g} s to {interval[1]:g} s is empty"
                )
        if self.denoise is not None:
            check_share(f"{what}: denoise", self.denoise)
        if self.magnify not in MAGNIFIED:
            raise RequestError(f"{what}: magnify {self.magnify!r}, wanted {', '.join(MAGNIFIED)}")
        if self.held and min(self.held) < 1:
            raise RequestError(f"{what}: held in stages {self.held}, wanted numbers from 1")

    def _check_filling(self, what: str) -> None:
        if not all(0 <= side <= 1 << 13 for side in self.pad):
            raise RequestError(f"{what}: pad {self.pad}, wanted pixels from 0 to {1 << 13} each")
        if self.fill and not (self.whole and (self.mask or any(self.pad))):
            raise RequestError(f"{what}: fill needs a mask or a pad, and the whole clip delivered")
        if any(self.pad) and not self.fill:
            raise RequestError(f"{what}: pad goes with fill")


@dataclass(frozen=True, slots=True)
class Nag:
    """What picture and sound shall not be, without a second pass: normalised attention guidance.

    video, audio: texts; None leaves that stream alone.  scale, alpha, tau: how far away, how much
    of it is mixed in, and how long the result may be.  Source: features.md C7.
    """

    video: str | None = None
    audio: str | None = None
    scale: float = 11.0
    alpha: float = 0.25
    tau: float = 2.5

    def __post_init__(self) -> None:
        if self.video is None and self.audio is None:
            raise RequestError("NAG has no text; give --nag or --nag-audio")
        check_share("NAG: alpha", self.alpha)
        if not (1 <= self.scale <= 1000 and 1 <= self.tau <= 1000):
            raise RequestError(f"NAG: scale {self.scale}, tau {self.tau}; wanted 1 to 1000 each")


@dataclass(frozen=True, slots=True)
class Segment:
    """A prompt for a part of the clip, in seconds; None: from the last one's end, to the next."""

    text: str
    begin: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        begin, end = self.begin or 0.0, self.end
        if begin < 0 or (end is not None and end <= begin):
            raise RequestError(f"segment {self.text[:40]!r}: {begin:g} s to {end} s is empty")


@dataclass(frozen=True, slots=True)
class Relay:
    """Prompts one after another: each segment's text is seen by its part of the clip.

    epsilon: the weight that remains where a segment passes into the next.  video, audio: how
    strongly picture and sound are held to it.  blend: seconds in which attention passes from one
    to the next instead, 0 at once.  Source: features.md H1, H5.
    """

    segments: tuple[Segment, ...]
    epsilon: float = 1e-3
    video: float = 1.0
    audio: float = 1.0
    blend: float | None = None

    def __post_init__(self) -> None:
        if not self.segments:
            raise RequestError("prompt relay has no segments")
        if self.blend is not None and not 0 <= self.blend <= 3600:
            raise RequestError(f"prompt relay: blend is {self.blend} s, wanted 0 to 3600")
        if not 0 < self.epsilon < 1:
            raise RequestError(f"prompt relay: epsilon is {self.epsilon}, wanted between 0 and 1")
        if not (0 <= self.video <= 1000 and 0 <= self.audio <= 1000):
            raise RequestError(
                f"prompt relay: strengths are {self.video} and {self.audio}, wanted 0 to 1000"
            )


@dataclass(frozen=True, slots=True)
class Conditions:
    """Everything that steers a clip besides its prompt; each is allowed with each other."""

    images: tuple[Image, ...] = ()
    guides: tuple[Guide, ...] = ()
    references: tuple[Reference, ...] = ()
    sound: Sound | None = None
    source: Source | None = None
    nag: Nag | None = None
    relay: Relay | None = field(default=None)
    voice: Voice | None = None

    def __post_init__(self) -> None:
        if self.voice is not None and self.sound is not None and self.sound.denoise == 0:
            raise RequestError(
                f"voice {self.voice.path}: it shapes sound that is made, and sound "
                f"{self.sound.path} is kept as it is; leave one of them out"
            )
        for item in self.references:
            what = f"reference {item.path}: kind {item.kind!r}"
            own = self.source if self.source and self.source.path == item.path else None
            if item.kind in ("source", "filled") and own is None:
                raise RequestError(f"{what} is for the source's own file")
            if item.kind == "filled" and own is not None and not own.fill:
                raise RequestError(f"{what}, but the source fills nothing")

    def media(self) -> tuple[str, ...]:
        """Return every file that is named, in order."""
        masks = (item.attention_mask for item in self.references)
        source = (self.source.path, self.source.mask) if self.source else ()
        named = (
            *(image.path for image in self.images),
            *(guide.path for guide in self.guides),
            *(reference.path for reference in self.references),
            *masks,
            *((self.sound.path, self.sound.heard) if self.sound else ()),
            *source,
            *((self.voice.path,) if self.voice else ()),
        )
        return tuple(path for path in named if path is not None)


def of_stage(strengths: tuple[float, ...], number: int) -> float:
    """Return the strength in stage number `number`, from 0; the last one serves the rest."""
    return strengths[min(number, len(strengths) - 1)]


def check_place(at: str, what: str, before: bool) -> None:
    """Refuse what is no place; "ref" and "after" only where `before` allows it."""
    if at == LAST or (before and at in (BEFORE, AFTER)) or _PLACE.fullmatch(at):
        return
    also = ", ref, after" if before else ""
    raise RequestError(f"{what}: at {at!r}; wanted a frame, -1, 2.5s, 50%, last{also}")


def frame_at(at: str, frames: int, rate: Fraction, what: str) -> int:
    """Return the pixel frame of a place in a clip of so many frames; "ref" has none.

    Raises RequestError for a place beyond the clip.
    Source: seconds int(s fps), percent round(p (F - 1)), negative from the end (features.md E7).
    """
    found = _PLACE.fullmatch(at)
    if at == LAST or found is None:
        return frames - 1
    if found["frame"]:
        frame = int(found["frame"])
        frame += frames if frame < 0 else 0
    elif found["unit"] == "s":
        frame = int(Fraction(found["number"]) * rate)
    else:
        frame = round(Fraction(found["number"]) / 100 * (frames - 1))
    if not 0 <= frame < frames:
        raise RequestError(
            f"{what}: at {at} is outside the clip, whose {frames} frames are 0 to {frames - 1}"
        )
    return frame


def _check_attention(what: str, value: float) -> None:
    if not 0 <= value <= _MOST_ATTENTION:
        raise RequestError(f"{what}: attention is {value}, wanted 0 to {_MOST_ATTENTION}")


def _check_picture(what: str, path: str, strengths: tuple[float, ...], crf: int | None) -> None:
    check_path(what, path)
    if not strengths:
        raise RequestError(f"{what}: no strength; give at least one, such as 1")
    for strength in strengths:
        check_share(f"{what}: strength", strength)
    if crf is not None and not 0 <= crf <= 51:
        raise RequestError(f"{what}: CRF {crf}; H.264 knows 0 (here: off) to 51")
