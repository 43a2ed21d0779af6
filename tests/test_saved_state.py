"""Saved states: of which job they are, and what is wrong with them."""

import json
import os
import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_support import (
    GUIDED,
    LORA,
    MODEL,
    every_progress,
    request_of,
    tiny_networks,
    tiny_prompts,
)
from safetensors.torch import load_file, save_file

from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.progress import Report
from ltxlite.request import Output, Request, Stage
from ltxlite.resume import SavedRun
from ltxlite.saved_state import _checksum, conditions, encode_state
from ltxlite.stages import Progress, beginning


@pytest.fixture(scope="module")
def networks() -> Networks:
    return tiny_networks()


class Notes(Report):
    """Keeps what a run tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def stopped(networks: Networks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Request, bytes]:
    """Return a job, and its state after two steps."""
    stage = Stage(sigmas="linq:4", sampler="euler_ancestral", video=GUIDED)
    request = request_of(tmp_path_factory.mktemp("stopped"), stage)
    with torch.no_grad():
        progress = every_progress(request, networks, tiny_prompts(networks))[1]
    return request, b"".join(encode_state(progress, conditions(request, networks)))


def load(request: Request, networks: Networks) -> tuple[Progress | None, list[str]]:
    notes = Notes()
    with SavedRun(request, networks, notes.note) as saved:
        return saved.load(), notes.lines


def state_of(stopped: tuple[Request, bytes], folder: Path, **changes: Any) -> Request:
    """Put the state where the job, changed or not, will look for it."""
    request, data = stopped
    output = Output(str(folder / "clip.mp4"), crf=30)
    (folder / "clip.mp4.ltxlite-resume").write_bytes(data)
    return replace(request, output=output, **changes)


def test_the_same_job_goes_on_whatever_its_clip_is_called(
    stopped: tuple[Request, bytes], networks: Networks, tmp_path: Path
) -> None:
    progress, (line,) = load(state_of(stopped, tmp_path), networks)
    assert progress is not None and (progress.stage, progress.done) == (0, 2)
    assert "continuing at stage 1 of 1, step 3 of 4" in line


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"prompt": "snow"}, "its prompt was 'rain' and is 'snow' now"),
        ({"seed": 11}, "its seed was 10 and is 11 now"),
        ({"stages": (Stage(), Stage())}, "its stages was "),
        (
            {"stages": (Stage(sigmas="linq:5"),)},
            "its stages[0].sigmas was 'linq:4' and is 'linq:5' now",
        ),
        ({"quantize": "Q8_0"}, "its quantize was None and is 'Q8_0' now"),
    ],
)
def test_another_job_starts_anew_and_says_what_differs(
    stopped: tuple[Request, bytes],
    networks: Networks,
    tmp_path: Path,
    changes: dict[str, Any],
    reason: str,
) -> None:
    progress, (line,) = load(state_of(stopped, tmp_path, **changes), networks)
    assert progress is None
    assert reason in line and line.endswith("starting anew") and "\n" not in line


def test_other_software_arithmetic_or_model_files_start_anew(
    stopped: tuple[Request, bytes], networks: Networks, tmp_path: Path, monkeypatch: Any
) -> None:
    request = state_of(stopped, tmp_path)
    half = Networks(networks.files, networks.device, torch.bfloat16)
    assert "its dtype was 'torch.float32'" in load(request, half)[1][0]
    more = replace(request, files=replace(request.files, loras=(str(LORA),)))
    assert "other model files" in load(more, networks)[1][0]
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert "its torch was " in load(request, networks)[1][0]


def damaged(data: bytes) -> Iterator[bytes]:
    yield b""
    yield from (data[:length] for length in (1, 7, 8, 9, 500, len(data) // 2, len(data) - 1))
    yield data + b"\0"
    yield struct.pack("<Q", 1 << 62) + data[8:]
    yield b"\x80\x04\x95" + data  # a pickle
    chooser = random.Random(0)
    for _ in range(300):
        at = chooser.randrange(len(data))
        yield data[:at] + bytes([data[at] ^ (1 << chooser.randrange(8))]) + data[at + 1 :]


def test_damage_anywhere_is_one_line_and_a_fresh_start(
    stopped: tuple[Request, bytes], networks: Networks, tmp_path: Path
) -> None:
    request, data = stopped
    for broken in damaged(data):
        request = state_of((request, broken), tmp_path)
        progress, lines = load(request, networks)
        assert progress is None
        assert len(lines) == 1 and lines[0].endswith("starting anew") and "\n" not in lines[0]


PLACES: list[Any] = [
    *(
        {"stage": value, "done": 2, "drawn": {}}
        for value in (-1, 2, 1.0, True, None, "0", [], 9**99)
    ),
    *({"stage": 0, "done": value, "drawn": {}} for value in (-1, 0, 5, 1.0, None, 9**99)),
    {"stage": 1, "done": 1, "drawn": {}},
    *({"stage": 0, "done": 2, "drawn": value} for value in (None, [], {"up": 1}, {"step": 10**9})),
    *([], None, 3, {}),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: json.dumps(place)[:50])
def test_a_place_that_cannot_be_is_refused(
    place: Any, stopped: tuple[Request, bytes], networks: Networks, tmp_path: Path
) -> None:
    metadata, tensors = opened(stopped, tmp_path)
    metadata["place"] = json.dumps(place)
    assert refused(metadata, tensors, stopped, networks, tmp_path)


@pytest.mark.parametrize("name", ["latents.0", "carry.x.1", "prediction.guided.0"])
def test_tensors_of_another_kind_or_missing_are_refused(
    name: str, stopped: tuple[Request, bytes], networks: Networks, tmp_path: Path
) -> None:
    metadata, tensors = opened(stopped, tmp_path)
    kept = tensors[name]
    for other in (kept[:, :1], kept.half(), kept.flatten(), None):
        changed = {**tensors, name: other, "carry.x0.0": tensors["carry.x.0"]}
        if other is None:
            del changed[name]
        assert refused(metadata, changed, stopped, networks, tmp_path)
        del changed["carry.x0.0"]
        assert refused(metadata, changed, stopped, networks, tmp_path)


ODD_TEXTS = ("", "{", "[" * 99999, "[]", '"' + "x" * (2 << 20) + '"', "\u20ac")


@pytest.mark.parametrize(
    "key, text",
    [
        *((key, text) for key in ("conditions", "place", "ltxlite_state") for text in ODD_TEXTS),
        ("crc32", ""),
    ],
    ids=lambda value: value[:12],
)
def test_odd_metadata_is_refused(
    key: str, text: str, stopped: tuple[Request, bytes], networks: Networks, tmp_path: Path
) -> None:
    metadata, tensors = opened(stopped, tmp_path)
    assert refused({**metadata, key: text}, tensors, stopped, networks, tmp_path)


def test_the_unchanged_contents_are_accepted(
    stopped: tuple[Request, bytes], networks: Networks, tmp_path: Path
) -> None:
    assert not refused(*opened(stopped, tmp_path), stopped, networks, tmp_path)


def opened(stopped: tuple[Request, bytes], folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    path = folder / "opened"
    path.write_bytes(stopped[1])
    (length,) = struct.unpack("<Q", stopped[1][:8])
    return json.loads(stopped[1][8 : 8 + length])["__metadata__"], load_file(path)


def refused(
    metadata: dict[str, str],
    tensors: dict[str, Any],
    stopped: tuple[Request, bytes],
    networks: Networks,
    folder: Path,
) -> bool:
    """Write a state of these contents; tell whether it is refused in one line, for damage."""
    path = folder / "made"
    whole = {name: value.clone().contiguous() for name, value in tensors.items()}
    if metadata["crc32"]:  # a liar knows how to sum
        metadata = {**metadata, "crc32": _checksum(metadata, whole)}
    save_file(whole, path, metadata)
    progress, lines = load(state_of((stopped[0], path.read_bytes()), folder), networks)
    return progress is None and len(lines) == 1 and "starting anew" in lines[0]


def test_a_folder_in_the_place_of_the_state_is_told_and_stops_nothing(
    stopped: tuple[Request, bytes], networks: Networks, tmp_path: Path
) -> None:
    request = replace(stopped[0], output=Output(str(tmp_path / "clip.mp4")))
    (tmp_path / "clip.mp4.ltxlite-resume").mkdir()
    notes = Notes()
    with SavedRun(request, networks, notes.note) as saved:
        assert saved.load() is None
        for _ in range(3):
            saved.save(beginning(request, networks))
    assert len(notes.lines) == 2
    assert "starting anew" in notes.lines[0] and "cannot be written" in notes.lines[1]


def test_a_model_file_that_changed_starts_anew(
    stopped: tuple[Request, bytes], tmp_path: Path
) -> None:
    model = Path(shutil.copy(MODEL, tmp_path / "model-distilled.safetensors"))
    files = replace(stopped[0].files, model=str(model))
    request = replace(stopped[0], files=files, output=Output(str(tmp_path / "clip.mp4")))
    networks = open_networks(files, "cpu", "float32")
    with SavedRun(request, networks, lambda _: None) as saved:
        saved.save(Progress(1, beginning(request, networks).latents))
    assert load(request, networks)[0] is not None
    os.utime(model, ns=(0, 0))
    assert "other model files, or they have changed" in load(request, networks)[1][0]
