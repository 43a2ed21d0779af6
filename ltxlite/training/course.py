"""The whole course from nothing to files: what is trained, in which order, what runs side by side.

Two processes of one thread each, which two cores run twice as fast as one process of two threads:
picture beside sound, then transformer beside upscalers. A video encoder stays from `FROZEN` of its
run on, so who trains parts by hand may begin with `latents` there.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from ltxlite.errors import LtxliteError, RequestError
from ltxlite.progress import Report
from ltxlite.training import audio_vae, transformer, upscaler, video_vae, vocoder
from ltxlite.training.export import export
from ltxlite.training.latents import write_latents
from ltxlite.training.loop import Note, Pace
from ltxlite.training.sheet import write_sheet

FILES = "files"  # of the folder, where the finished model lies


@dataclass(frozen=True, slots=True)
class Part:
    """A network, or a few, that are trained together: how long, and what does it."""

    pace: Pace
    run: Callable[[Path, Pace, Note], None]


def _video_vae(folder: Path, pace: Pace, note: Note) -> None:
    video_vae.VideoVAETraining(folder, pace).run(note)


def _video_decoder(folder: Path, pace: Pace, note: Note) -> None:
    video_vae.VideoDecoderTraining(folder, pace).run(note)


def _audio_vae(folder: Path, pace: Pace, note: Note) -> None:
    audio_vae.AudioVAETraining(folder, pace).run(note)


def _vocoder(folder: Path, pace: Pace, note: Note) -> None:
    vocoder.VocoderTraining(folder, pace).run(note)


def _upscaler(folder: Path, pace: Pace, note: Note) -> None:
    upscaler.UpscalerTraining(folder, pace).run(note)


def _temporal(folder: Path, pace: Pace, note: Note) -> None:
    upscaler.TemporalUpscalerTraining(folder, pace).run(note)


def _latents(folder: Path, pace: Pace, note: Note) -> None:
    write_latents(folder, note)


def _transformer(folder: Path, pace: Pace, note: Note) -> None:
    transformer.TransformerTraining(folder, pace).run(note)


PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "video_vae": Part(video_vae.PACE, _video_vae),
        "video_decoder": Part(video_vae.POLISH, _video_decoder),
        "audio_vae": Part(audio_vae.PACE, _audio_vae),
        "vocoder": Part(vocoder.PACE, _vocoder),
        "upscaler": Part(upscaler.PACE, _upscaler),
        "upscaler_time": Part(upscaler.PACE, _temporal),
        "latents": Part(Pace(1, 0.0), _latents),
        "transformer": Part(transformer.PACE, _transformer),
    }
)
# Tracks of parts, one process each; a round begins when the one before has ended.
ROUNDS = (
    (("video_vae",), ("audio_vae", "vocoder")),
    (("latents", "transformer"), ("video_decoder", "upscaler", "upscaler_time")),
)


def train_world(folder: Path, resume: bool, report: Report) -> list[Path]:
    """Train everything in a folder and write the model; returns its files and the sample sheet.

    Raises RequestError for a folder with an earlier run, unless it is to be gone on with.
    """
    if any(folder.glob("*.state.safetensors")) and not resume:
        raise RequestError(f"{folder}: holds an earlier run; --resume goes on with it")
    folder.mkdir(parents=True, exist_ok=True)
    for tracks in ROUNDS:
        processes = [_begun(folder, parts) for parts in tracks]
        report.note(f"training {' beside '.join(' then '.join(parts) for parts in tracks)}")
        failed = [process.args for process in processes if process.wait()]
        if failed:
            raise LtxliteError(f"{folder}: training failed, see what it printed; --resume goes on")
    files = export(folder, folder / FILES, report)
    return [*files, write_sheet(folder, folder / "sheet.png")]


def train_parts(folder: Path, names: list[str], steps: int | None, note: Note) -> None:
    """Train some parts, one after the other, in this process and on one thread.

    Raises RequestError for a part that is not there.
    """
    torch.set_num_threads(1)
    for name in names:
        if name not in PARTS:
            raise RequestError(f"no part is called {name!r}; choose {', '.join(PARTS)}")
    for name in names:
        part = PARTS[name]
        part.run(folder, part.pace if steps is None else replace(part.pace, steps=steps), note)


def _begun(folder: Path, parts: tuple[str, ...]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "ltxlite", "train", "world", "--resume", "--out", str(folder)]
    command += [f"--part={part}" for part in parts]
    return subprocess.Popen(command)
