"""What of each picture a stage encodes: which frames, at what size, as how many tokens.

Everything that can be wrong with a picture is found here, before any network is loaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from torch import Tensor

from ltxlite.conditions import AFTER, BEFORE, Guide, Image, Reference, frame_at
from ltxlite.errors import RequestError
from ltxlite.geometry import ClipShape, LatentGrid
from ltxlite.given.footage import Footage, open_footage
from ltxlite.given.reference_factors import reference_factor
from ltxlite.given.source import source_footage
from ltxlite.media.tracks import read_tracks
from ltxlite.networks import Networks
from ltxlite.request import Files, Request

Extent = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Take:
    """Frames of a file for one stage: their numbers at the clip's rate, 8n + 1 of them.

    extent: of the latent they are encoded to (frames, rows, columns).  lead: how many of its
    latent frames are encoded for the sake of the others, and left out.
    """

    footage: Footage
    chosen: tuple[int, ...]
    extent: Extent
    lead: int = 0

    @property
    def kept(self) -> Extent:
        """The extent of what a stage sees."""
        return self.extent[0] - self.lead, *self.extent[1:]

    @property
    def tokens(self) -> int:
        """Tokens of its latent."""
        return prod(self.kept)

    def frames(self) -> Iterator[Tensor]:
        """Yield the chosen frames, (H, W, 3) uint8."""
        return self.footage.frames(self.chosen)


@dataclass(frozen=True, slots=True)
class ReferenceTake:
    """A reference for one stage; mask: of its attention."""

    reference: Reference
    take: Take
    downscale: int
    temporal: int
    mask: Take | None = None


@dataclass(frozen=True, slots=True)
class StageTakes:
    """The pictures of one stage, in the request's order."""

    images: tuple[Take, ...] = ()
    guides: tuple[Take, ...] = ()
    references: tuple[ReferenceTake, ...] = ()

    @property
    def appended(self) -> tuple[Extent, ...]:
        """Extents of what is appended to the clip's tokens."""
        takes = (*self.guides, *(item.take for item in self.references))
        return tuple(take.kept for take in takes)

    @property
    def is_weighted(self) -> bool:
        """Tell whether some reference is seen at a weight."""
        references = (item.reference for item in self.references)
        return any(item.attention != 1 or item.attention_mask for item in references)

    @property
    def tokens(self) -> int:
        """Tokens that are appended to the clip's."""
        return sum(prod(extent) for extent in self.appended)

    @property
    def all(self) -> tuple[Take, ...]:
        """Everything that the video encoder sees."""
        return (*self.images, *self.guides, *(item.take for item in self.references))


def stage_takes(request: Request, networks: Networks, number: int, shape: ClipShape) -> StageTakes:
    """Return what stage number `number`, from 0, encodes; files are opened, not decoded.

    Raises MediaError for a file that cannot be read, RequestError for what does not fit the clip.
    """
    conditions, grid = request.conditions, networks.latent_grid()
    seen = (item for item in conditions.references if number + 1 in item.stages)
    return StageTakes(
        tuple(_image_take(request, image, shape, grid) for image in conditions.images),
        tuple(_guide_take(request, guide, shape, grid) for guide in conditions.guides),
        tuple(
            _reference_take(request, item, shape, grid, factors_of(item, request.files, networks))
            for item in seen
        ),
    )


def factors_of(reference: Reference, files: Files, networks: Networks) -> tuple[int, int]:
    """Return a reference's downscale and temporal factor: its own, else those of the LoRA files."""
    return (
        reference.downscale or reference_factor("downscale", files.loras, networks),
        reference.temporal or reference_factor("temporal", files.loras, networks),
    )


def _image_take(request: Request, image: Image, shape: ClipShape, grid: LatentGrid) -> Take:
    what = f"image {image.path}"
    first = frame_at(image.at, request.frames, request.rate, what) // grid.time
    take = _whole(request, image.path, shape, grid)
    return _inside(take, first, what, request, grid)


def _guide_take(request: Request, guide: Guide, shape: ClipShape, grid: LatentGrid) -> Take:
    what = f"guide {guide.path}"
    take = _whole(request, guide.path, shape, grid)
    if guide.at in (BEFORE, AFTER):
        if take.extent[0] > 1:
            place = "before the clip" if guide.at == BEFORE else "behind references"
            raise RequestError(f"{what}: {place} there is room for a still, not a video")
        if guide.at == AFTER and not request.conditions.references:
            raise RequestError(f"{what}: after which reference? name one with --reference")
        return take
    frame = frame_at(guide.at, request.frames, request.rate, what)
    if guide.comfy and frame > 0 and take.extent[0] > 1:
        take = _led(take, grid)
    return _inside(take, grid.latent_index(frame), what, request, grid)


def _led(take: Take, grid: LatentGrid) -> Take:
    """Encode a video behind a copy of its first frame, so that its own begin a latent frame.

    Source: ComfyUI, LTXVAddGuide; features.md E4.
    """
    count = len(take.footage.numbers or ()) // grid.time
    chosen = (0, *range(count * grid.time))
    return replace(take, chosen=chosen, extent=(count + 1, *take.extent[1:]), lead=1)


def _inside(take: Take, first: int, what: str, request: Request, grid: LatentGrid) -> Take:
    room = grid.latent_frames(request.frames) - first
    if take.kept[0] > room:
        raise RequestError(
            f"{what}: its {len(take.chosen) - take.lead} frames run past the end of the clip "
            f"({request.frames} frames); at most {grid.pixel_frames(room)} fit there"
        )
    return take


def _whole(request: Request, path: str, shape: ClipShape, grid: LatentGrid) -> Take:
    """Take a still, or all of a video that makes whole latent frames."""
    footage = open_footage(path, request.rate)
    count = 1 if footage.numbers is None else grid.snap_frames(len(footage.numbers))
    extent = (grid.latent_frames(count), shape.rows, shape.columns)
    return Take(footage, tuple(range(count)), extent)


def _reference_take(
    request: Request,
    reference: Reference,
    shape: ClipShape,
    grid: LatentGrid,
    factors: tuple[int, int],
) -> ReferenceTake:
    downscale, temporal = factors
    if shape.rows % downscale or shape.columns % downscale:
        size = f"{shape.columns * grid.space}x{shape.rows * grid.space}"
        raise RequestError(
            f"reference {reference.path}: encoded at 1/{downscale} size, which a stage of {size} "
            f"does not divide into; choose multiples of {grid.space * downscale}"
        )
    footage = _reference_footage(request, reference)
    chosen = sparse_frames(_length(footage, request), temporal, grid)
    rows, columns = shape.rows // downscale, shape.columns // downscale
    take = Take(footage, chosen, (grid.latent_frames(len(chosen)), rows, columns))
    return ReferenceTake(reference, take, downscale, temporal, _mask_take(request, reference, take))


def _reference_footage(request: Request, reference: Reference) -> Footage:
    """Open what a reference is drawn from: a picture, a video, tracks, or the source's own clip."""
    if reference.kind == "tracks":
        read_tracks(Path(reference.path))
        every = tuple(range(request.frames))
        return Footage(Path(reference.path), request.height, request.width, every)
    if reference.kind in ("source", "filled"):
        assert request.conditions.source is not None
        return source_footage(request, request.conditions.source)
    return open_footage(reference.path, request.rate)


def _mask_take(request: Request, reference: Reference, take: Take) -> Take | None:
    if reference.attention_mask is None:
        return None
    mask, shown = open_footage(reference.attention_mask, request.rate), take.footage
    what = f"attention mask {reference.attention_mask}"
    if (mask.height, mask.width) != (shown.height, shown.width):
        raise RequestError(
            f"{what}: is {mask.width}x{mask.height}, its reference {shown.width}x{shown.height}; "
            "wanted the same size"
        )
    if mask.numbers is not None and len(mask.numbers) <= take.chosen[-1]:
        raise RequestError(
            f"{what}: has {len(mask.numbers)} frames, its reference {take.chosen[-1] + 1}; wanted "
            "as many, or a still"
        )
    return Take(mask, take.chosen, take.extent)


def sparse_frames(count: int, temporal: int, grid: LatentGrid) -> tuple[int, ...]:
    """Return the frames of a reference that are encoded: the first, then every S-th from frame 1.

    Cut to 8n + 1.  Source: LTX-2 400fd31; model.md 7.3.
    """
    chosen = (0, *range(1, count, temporal))
    return chosen[: grid.snap_frames(len(chosen))]


def _length(footage: Footage, request: Request) -> int:
    """Return how many frames a reference has; a still is shown for the whole clip."""
    if footage.numbers is None:
        return request.frames
    return min(len(footage.numbers), request.frames)
