"""Memory that does not grow with the model, and progress that ends where it was announced."""

import json
import math
import re
import struct
import threading
from pathlib import Path

import pytest
from convert_support import Q8_0, asked

import ltxlite.convert.rows as convert_rows
from ltxlite.convert.run import Conversion, convert
from ltxlite.progress import Report

pytest_plugins = ("convert_fixtures",)


class Listener(Report):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, int]] = []
        self.steps: list[int] = []

    def begin(self, part: str, steps: int) -> None:
        self.parts.append((part, steps))
        self.steps = []

    def advance(self, done: int) -> None:
        assert done >= (self.steps[-1] if self.steps else 0)
        self.steps.append(done)


def sparse_projection(path: Path, rows: int, columns: int) -> Path:
    """Write a text projection of which no block is on the disk."""
    header: dict[str, object] = {}
    offset = 0
    for name in ("video", "audio"):
        for leaf, shape in (("weight", [rows, columns]), ("bias", [rows])):
            nbytes = 2 * math.prod(shape)
            entry = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + nbytes]}
            header[f"text_embedding_projection.{name}_aggregate_embed.{leaf}"] = entry
            offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


STATUS = Path("/proc/self/status")


class Watch(threading.Thread):
    """Follows the anonymous memory of this process, every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base = self.peak = self.anonymous()
        self.stopped = threading.Event()

    @staticmethod
    def anonymous() -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
        assert found
        return int(found[1]) << 10

    def run(self) -> None:
        while not self.stopped.wait(0.001):
            self.peak = max(self.peak, self.anonymous())


@pytest.mark.skipif(not STATUS.exists(), reason="anonymous memory is read from /proc")
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_rows, "CHUNK_VALUES", 1 << 18)
    # Two matrices of 16 Mi weights: 34 MB each in bf16, 67 MB as fp32, 36 MB together as Q8_0.
    source = sparse_projection(tmp_path / "x.safetensors", 3277, 5120)
    watch = Watch()
    watch.start()
    convert(Conversion((source,), tmp_path / "x.gguf", Q8_0, "text_projection"), Report())
    watch.stopped.set()
    watch.join()
    # A chunk is 1 MiB of fp32; with the encoder's temporaries and the sample's fp64 values 10 MiB.
    assert watch.peak - watch.base < 24 << 20


def test_progress_ends_at_the_number_of_steps_announced(tmp_path: Path) -> None:
    listener = Listener()
    source = sparse_projection(tmp_path / "x.safetensors", 130, 10240)
    convert(asked(tmp_path / "x.gguf", source, "Q8_0", "text_projection"), listener)
    assert listener.parts == [("convert, M", 2), ("verify", 4)]
    assert listener.steps[-1] == 4
