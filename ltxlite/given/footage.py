"""Pictures that steer a clip, stills and videos alike: what a file holds, and its frames."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ltxlite.errors import MediaError
from ltxlite.media.image import load_image
from ltxlite.media.timing import frames_at, read_timing
from ltxlite.media.video_reader import iter_frames

# Read as stills whatever they hold: phones put two pictures into a JPEG.
_STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".avif")


@dataclass(frozen=True, slots=True)
class Footage:
    """A still or a video, at the rate of the clip that it steers.

    height, width: as shown, after rotation.  numbers: for each frame at that rate, the one of the
    file that is shown then; None for a still.
    """

    path: Path
    height: int
    width: int
    numbers: tuple[int, ...] | None = None

    @property
    def is_still(self) -> bool:
        """Tell whether it is one picture."""
        return self.numbers is None

    def frames(self, chosen: Sequence[int]) -> Iterator[Tensor]:
        """Yield frames (H, W, 3) uint8 RGB by their rising numbers at the clip's rate.

        A still gives the same frame each time.  Raises MediaError where the file ends before.
        """
        if self.numbers is None:
            still = load_image(self.path)
            yield from (still for _ in chosen)
            return
        yield from frames_at(self.path, [self.numbers[number] for number in chosen])


def open_footage(path: str, rate: Fraction) -> Footage:
    """Look what a file holds; of a video one frame is decoded.

    rate: frames per second of the clip.  Raises MediaError if it is missing, damaged, or neither
    a picture nor a video.
    """
    file = Path(path)
    if not file.is_file():
        hint = "; is the place behind @ wrong?" if "@" in file.name else ""
        raise MediaError(f"{path}: no such file{hint}")
    facts = file.stat()
    return _look(file, rate, (facts.st_size, facts.st_mtime_ns))


# A planner asks for every size that it tries, and the packets of a long video are many.
@lru_cache(maxsize=64)
def _look(file: Path, rate: Fraction, _version: tuple[int, int]) -> Footage:
    if _is_still(file):
        height, width, _ = load_image(file).shape
        return Footage(file, height, width)
    return _look_at_video(file, rate)


def _look_at_video(file: Path, rate: Fraction) -> Footage:
    try:
        timing = read_timing(file)
    except MediaError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise MediaError(f"{file}: no picture that can be read; as a video, it {reason}") from error
    first = next(iter_frames(file, 0, 1), None)
    if first is None:
        raise MediaError(f"{file}: holds no picture that can be decoded")
    return Footage(file, first.shape[0], first.shape[1], tuple(timing.numbers(rate)))


def _is_still(path: Path) -> bool:
    if path.suffix.lower() in _STILLS:
        return True
    try:
        with Image.open(path) as image:
            return not getattr(image, "is_animated", False)
    except (UnidentifiedImageError, OSError):
        return False
