"""What the writers of clips share: the settings, and the check of what they are given."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from ltxlite.errors import MediaError
from ltxlite.media.audio import as_stereo
from ltxlite.media.image import centre_crop

# Clips are generated on a grid of 64 pixels (two stages of 32) and delivered at any even size.
LARGEST_CROP = 63


@dataclass(frozen=True, slots=True)
class VideoSettings:
    """How a clip is written.

    width, height: delivered size in pixels, both even; frames may be up to 63 pixels larger and
    are cropped to it around their middle (1088 -> 1080).
    fps: exact; 23.976 is Fraction(24000, 1001).
    audio_rate: samples per second of the sound to come, None for a silent clip.
    metadata: tags to store; values may be long (a job as JSON).
    Raises MediaError for values that H.264 or mp4 cannot hold.
    """

    width: int
    height: int
    fps: Fraction
    audio_rate: int | None = None
    codec: str = "libx264"
    crf: int = 19
    preset: str = "veryfast"
    audio_bitrate: int = 192_000
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.width < 2 or self.height < 2 or self.width % 2 or self.height % 2:
            raise MediaError(
                f"clip of {self.width}x{self.height}: width and height must be even, as colour is "
                f"stored per 2x2 pixels; choose {self.width // 2 * 2}x{self.height // 2 * 2}"
            )
        if not 0 < self.fps <= 1000 or self.fps.numerator >= 1 << 31:
            raise MediaError(
                f"{self.fps} frames per second: wanted a plain fraction in (0, 1000], "
                "24 or 24000/1001 for example"
            )
        if not 0 <= self.crf <= 51:
            raise MediaError(f"CRF {self.crf}: wanted 0 (lossless) to 51 (worst); 19 is usual")

    def samples(self, frames: int) -> int:
        """Return the number of sound samples that last as long as `frames`; 0 without sound."""
        return round(frames * (self.audio_rate or 0) / self.fps)


def delivered(frames: Tensor, settings: VideoSettings) -> Tensor:
    """Check decoded frames (F, 3, H, W) and crop them to the delivered size.

    Raises MediaError if the shape does not fit the settings or a value is NaN.
    """
    if frames.ndim != 4 or frames.shape[1] != 3:
        raise MediaError(f"frames of shape {tuple(frames.shape)}: wanted (F, 3, H, W)")
    height, width = frames.shape[2:]
    surplus = (height - settings.height, width - settings.width)
    if not all(0 <= pixels <= LARGEST_CROP for pixels in surplus):
        raise MediaError(
            f"frames of {width}x{height} for a clip of {settings.width}x{settings.height}: "
            f"wanted that size, or up to {LARGEST_CROP} pixels more to crop"
        )
    if torch.isnan(frames).any():
        raise MediaError("frames hold NaN: the decoder failed; check the checkpoint with inspect")
    return centre_crop(frames, settings.height, settings.width)


def delivered_sound(waveform: Tensor, settings: VideoSettings) -> Tensor:
    """Check sound (1 or 2 channels, N); return it as stereo on the CPU, fp32 in [-1, 1].

    Raises MediaError if the settings announce no sound, for more channels, or if a value is NaN.
    """
    if settings.audio_rate is None:
        raise MediaError("sound for a clip whose settings have no audio_rate; set it first")
    if torch.isnan(waveform).any():
        raise MediaError("sound holds NaN: the vocoder failed; check the checkpoint with inspect")
    return as_stereo(waveform).detach().cpu().float().clamp(-1, 1)
