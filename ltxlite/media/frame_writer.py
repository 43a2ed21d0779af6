"""Writes a clip as a folder: numbered PNG frames, and the sound as WAV."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ltxlite.errors import MediaError
from ltxlite.media.atomic import folder_written_beside
from ltxlite.media.audio import fit_length, write_wav
from ltxlite.media.background import Background
from ltxlite.media.colour import nearest_uint8_rgb
from ltxlite.media.image import save_png
from ltxlite.media.output import VideoSettings, delivered, delivered_sound


class FrameWriter:
    """Takes frames and sound like a VideoWriter; made by `create_frames`."""

    def __init__(self, folder: Path, settings: VideoSettings, background: Background) -> None:
        self._folder = folder
        self._settings = settings
        self._background = background
        self._frames = 0
        self._sound: list[Tensor] = []

    def write(self, frames: Tensor) -> None:
        """Append frames (F, 3, H, W) in [-1, 1] as frame_00001.png and so on.

        Raises MediaError if the frames do not fit the settings, or saving failed before.
        """
        rgb = nearest_uint8_rgb(delivered(frames, self._settings)).cpu()
        self._background.submit(partial(self._save, rgb, self._frames + 1))
        self._frames += rgb.shape[0]

    def write_audio(self, waveform: Tensor) -> None:
        """Append sound (1 or 2 channels, N) in [-1, 1] at the settings' audio rate."""
        self._sound.append(delivered_sound(waveform, self._settings))

    def finish(self) -> None:
        """Write the sound, as long as the frames last, as audio.wav."""
        if not self._frames:
            raise MediaError("no frame was written, nothing to save")
        if self._settings.audio_rate is None:
            return
        if not self._sound:
            raise MediaError("audio_rate is set, but no sound was written; set it to None")
        samples = self._settings.samples(self._frames)
        waveform = fit_length(torch.cat(self._sound, dim=1), samples)
        write_wav(self._folder / "audio.wav", waveform, self._settings.audio_rate)

    def _save(self, rgb: Tensor, first: int) -> None:
        for number, frame in enumerate(rgb, start=first):
            save_png(self._folder / f"frame_{number:05d}.png", frame)


@contextmanager
def create_frames(folder: Path, settings: VideoSettings) -> Iterator[FrameWriter]:
    """Open a folder for a clip's frames; it appears when the block ends, and only without error.

    8-bit RGB, rounded to the nearest value; of the settings, size, fps and audio rate count.
    Raises MediaError if the folder has contents already or cannot be written.
    """
    with folder_written_beside(folder) as unfinished, Background() as background:
        writer = FrameWriter(unfinished, settings, background)
        yield writer
        background.finish()
        writer.finish()
