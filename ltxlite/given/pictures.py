"""Images, guides and references of a job, encoded at each stage's size.

Frames pass through the encoder a few at a time: memory does not grow with a clip's length.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ltxlite.conditions import Guide, Image, frame_at
from ltxlite.geometry import LatentGrid
from ltxlite.given import GivenReference
from ltxlite.given.footage_latents import encode_footage
from ltxlite.given.reference_pixels import reference_pixels
from ltxlite.given.takes import ReferenceTake, StageTakes, Take, stage_takes
from ltxlite.media.image import fit_cover
from ltxlite.media.recompress import default_crf, recompress
from ltxlite.models.video_vae import VideoEncoder
from ltxlite.networks import Networks
from ltxlite.progress import Clock
from ltxlite.request import Request
from ltxlite.stage_shapes import stage_shape

_STEPS = 64


@dataclass(frozen=True, slots=True)
class StagePictures:
    """The pictures of one stage: normalised latents (1, C, f, Y, X), fp32, on the CPU."""

    images: tuple[Tensor, ...] = ()
    guides: tuple[Tensor, ...] = ()
    references: tuple[GivenReference, ...] = ()


def encode_pictures(
    request: Request, networks: Networks, clock: Clock
) -> tuple[StagePictures, ...]:
    """Encode the pictures of a request, one entry a stage.

    The encoder is loaded once and gone at the end.  Raises MediaError for a file that cannot be
    decoded, RequestError for one that does not fit the clip.
    """
    takes = [
        stage_takes(request, networks, number, stage_shape(request, stage, networks))
        for number, stage in enumerate(request.stages)
    ]
    count = sum(len(stage.all) for stage in takes)
    if not count:
        return (StagePictures(),) * len(takes)
    for remark in dict.fromkeys(_remarks(request, takes)):
        clock.note(remark)
    clock.begin("encode pictures", count)
    maker = _Maker(request, networks, clock)
    return tuple(maker.stage(stage) for stage in takes)


def _remarks(request: Request, takes: Sequence[StageTakes]) -> Iterator[str]:
    """Tell what of a file is left out, and what will not do what may be expected."""
    for image in request.conditions.images:
        frame = frame_at(image.at, request.frames, request.rate, f"image {image.path}")
        if frame > 0:
            yield (
                f"{image.path}: a still in the middle of a clip may flash, since the model knows "
                "stills at its beginning only; --guide suits better there"
            )
    for stage in takes:
        for take in (*stage.images, *stage.guides):
            numbers = take.footage.numbers
            if numbers is not None and len(numbers) > len(take.chosen):
                yield f"{take.footage.path}: {len(numbers)} frames, using {len(take.chosen)} (8n+1)"
        for item in stage.references:
            numbers = item.take.footage.numbers
            if numbers is not None and len(numbers) < request.frames:
                yield f"{item.take.footage.path}: ends before the clip does, which is free then"
    if request.conditions.references and not request.files.loras:
        yield "warning: a reference without an IC-LoRA (--lora) changes little"


class _Maker:
    """Holds the encoder while pictures are encoded, and counts them."""

    def __init__(self, request: Request, networks: Networks, clock: Clock) -> None:
        self._request, self._networks, self._clock = request, networks, clock
        self._grid: LatentGrid = networks.latent_grid()
        self._encoder: VideoEncoder = networks.video_encoder()
        version = networks.version() or networks.family_version()
        self._crf = default_crf(".".join(map(str, version)))
        self._done = 0

    def stage(self, takes: StageTakes) -> StagePictures:
        """Encode the pictures of a stage."""
        conditions = self._request.conditions
        images = zip(conditions.images, takes.images, strict=True)
        guides = zip(conditions.guides, takes.guides, strict=True)
        return StagePictures(
            tuple(self._picture(item, take) for item, take in images),
            tuple(self._picture(item, take) for item, take in guides),
            tuple(self._reference(item) for item in takes.references),
        )

    def _picture(self, item: Image | Guide, take: Take) -> Tensor:
        frames = take.frames()
        if take.footage.is_still:
            crf = self._crf if item.crf is None else item.crf
            frames = (recompress(frame, crf) for frame in frames)
        return self._encoded(fit_cover(frame, *self._size(take)) for frame in frames)

    def _reference(self, item: ReferenceTake) -> GivenReference:
        frames = reference_pixels(self._request, item, self._size(item.take))
        latent = self._encoded(frames)
        reference = item.reference
        weight = None
        if item.mask is not None:
            weight = mask_weights(self._mask_pixels(item.mask), self._grid) * reference.attention
        elif reference.attention != 1:
            weight = torch.full((item.take.tokens,), reference.attention)
        return GivenReference(latent, reference.strength, item.downscale, item.temporal, weight)

    def _mask_pixels(self, take: Take) -> Iterator[Tensor]:
        for frame in take.frames():
            yield (fit_cover(frame, *self._size(take)).mean(0) + 1) / 2

    def _encoded(self, frames: Iterable[Tensor]) -> Tensor:
        pixels = grouped(frames, self._networks.window.group_bytes)
        latent = encode_footage(self._request, self._networks, self._encoder, pixels)
        self._done += 1
        self._clock.advance(self._done)
        return latent

    def _size(self, take: Take) -> tuple[int, int]:
        return take.extent[1] * self._grid.space, take.extent[2] * self._grid.space


def grouped(frames: Iterable[Tensor], group_bytes: int) -> Iterator[Tensor]:
    """Join frames (3, H, W) to pixels (1, 3, f, H, W) of about so many bytes, at least a frame."""
    waiting: list[Tensor] = []
    for frame in frames:
        waiting.append(frame)
        if (len(waiting) + 1) * frame.nbytes > group_bytes:
            yield torch.stack(waiting, dim=1)[None]
            waiting.clear()
    if waiting:
        yield torch.stack(waiting, dim=1)[None]


def mask_weights(frames: Iterable[Tensor], grid: LatentGrid) -> Tensor:
    """Average masks (H, W) over the pixels of each token: (f y x,) fp32.

    The first frame makes a latent frame of its own, then each eight. Rounded to 64ths: tokens of
    one weight share a row of attention weights, and 65 rows are few.
    Source: LTX-2 400fd31; model.md 7.4.
    """
    pooled = [F.avg_pool2d(frame[None], grid.space)[0] for frame in frames]
    groups: list[Sequence[Tensor]] = [pooled[:1]]
    groups += [pooled[at : at + grid.time] for at in range(1, len(pooled), grid.time)]
    means = torch.stack([torch.stack(list(group)).mean(0) for group in groups])
    return (means.flatten() * _STEPS).round() / _STEPS
