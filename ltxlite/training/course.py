"""The whole course from nothing to files: what is trained, in which order, what runs side by side.

Two processes of one thread each, which two cores run twice as fast as one process of two threads:
picture beside sound, until the video encoder stays; from there on others learn its latents, beside
its decoder that goes on.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch

from ltxlite.errors import LtxliteError, RequestError
from ltxlite.progress import Report
from ltxlite.training import audio_vae, transformer, upscaler, video_vae, vocoder
from ltxlite.training.export import export
from ltxlite.training.latents import write_latents
from ltxlite.training.loop import Note, Pace
from ltxlite.training.sheet import write_sheet

FILES = "files"  # of the folder, where the finished model lies


class Training(Protocol):
    """What trains something in a folder, from where it was left."""

    def run(self, note: Note) -> object:
        """Go on to the end."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """The part that learns nothing: clips become latents, once; it has no pace."""

    folder: Path
    pace: Pace
    device: torch.device

    def run(self, note: Note) -> None:
        """Encode what is not encoded yet."""
        write_latents(self.folder, self.device, note)


@dataclass(frozen=True, slots=True)
class Part:
    """A network, or a few, that are trained together: how long, and what does it."""

    pace: Pace
    training: Callable[[Path, Pace, torch.device], Training]


PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "video_encoder": Part(video_vae.PACE, video_vae.VideoEncoderTraining),
        "video_vae": Part(video_vae.PACE, video_vae.VideoVAETraining),
        "video_decoder": Part(video_vae.POLISH, video_vae.VideoDecoderTraining),
        "audio_vae": Part(audio_vae.PACE, audio_vae.AudioVAETraining),
        "vocoder": Part(vocoder.PACE, vocoder.VocoderTraining),
        "upscaler": Part(upscaler.PACE, upscaler.UpscalerTraining),
        "upscaler_time": Part(upscaler.PACE, upscaler.TemporalUpscalerTraining),
        "latents": Part(Pace(1, 0.0), Encoding),
        "transformer": Part(transformer.PACE, transformer.TransformerTraining),
    }
)
# Tracks of parts, one process each; a round begins when the one before has ended.
ROUNDS = (
    (("video_encoder",), ("audio_vae", "vocoder")),
    (("latents", "transformer"), ("video_vae", "video_decoder", "upscaler", "upscaler_time")),
)


def train_world(folder: Path, resume: bool, device: torch.device, report: Report) -> list[Path]:
    """Train everything in a folder and write the model; returns its files and the sample sheet.

    Raises RequestError for a folder with an earlier run, unless it is to be gone on with.
    """
    if any(folder.glob("*.state.safetensors")) and not resume:
        raise RequestError(f"{folder}: holds an earlier run; --resume goes on with it")
    folder.mkdir(parents=True, exist_ok=True)
    for tracks in ROUNDS:
        processes = [_begun(folder, parts, device) for parts in tracks]
        report.note(f"training {' beside '.join(' then '.join(parts) for parts in tracks)}")
        failed = [process.args for process in processes if process.wait()]
        if failed:
            raise LtxliteError(f"{folder}: training failed, see what it printed; --resume goes on")
    files = export(folder, folder / FILES, report)
    return [*files, write_sheet(folder, folder / "sheet.png")]


def train_parts(
    folder: Path, names: list[str], steps: int | None, device: torch.device, note: Note
) -> None:
    """Train some parts, one after the other, in this process and on one thread.

    Raises RequestError for a part that is not there.
    """
    torch.set_num_threads(1)
    for name in names:
        if name not in PARTS:
            raise RequestError(f"no part is called {name!r}; choose {', '.join(PARTS)}")
    for name in names:
        part = PARTS[name]
        pace = part.pace if steps is None else replace(part.pace, steps=steps)
        part.training(folder, pace, device).run(note)


def _begun(folder: Path, parts: tuple[str, ...], device: torch.device) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "ltxlite", "train", "world", "--resume", "--out", str(folder)]
    command += [f"--device={device}", *(f"--part={part}" for part in parts)]
    return subprocess.Popen(command)
