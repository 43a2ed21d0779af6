"""Headers built to take as much memory as they can, which chance does not find."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from ltxlite.checkpoint.files import open_models
from ltxlite.errors import LtxliteError
from ltxlite_quant.containers import open_container
from ltxlite_quant.formats import FormatError

# Small ones in place of 64 MiB, which nothing that is quick to write would ever reach.
FILE_BYTES = ALLOWANCE = 1 << 20
HEADER_BYTES = (FILE_BYTES + ALLOWANCE) // 40  # the longest that is parsed at all
OBJECTS = 1 << 16  # of opening any file
WIDE = "\U0001f600"


def repeated(unit: str, opening: str = '{"x":[', closing: str = "0]}") -> Callable[[], bytes]:
    def build() -> bytes:
        room = HEADER_BYTES - len((opening + closing).encode())
        return (opening + unit * (room // len(unit.encode())) + closing).encode()

    return build


def numbered(entry: str, opening: str = "{") -> Callable[[], bytes]:
    """Return as many entries with names of their own as fit."""

    def build() -> bytes:
        each = len(entry.encode()) + 10
        count = (HEADER_BYTES - len(opening) - 9) // each
        body = ",".join(f'"{number:06x}":{entry}' for number in range(count))
        return (opening + body + "}").encode()

    return build


JSON = {
    "lists": repeated("[],"),
    "objects": repeated("{},"),
    "objects of one": repeated('{"":0},'),
    "wide objects": repeated('{"":0},', f'{{"{WIDE}":['),
    "floats": repeated("1e1,"),
    "texts": repeated('"ab",'),
    "one name": repeated("\\u0001", '{"', '":0}'),
    "one wide name": repeated("a", f'{{"{WIDE}', '":0}'),
    "a shape": repeated("9,", '{"x":{"dtype":"U8","data_offsets":[0,0],"shape":[', "0]}}"),
    "tensors": numbered('{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'),
    "metadata": numbered('"ab"', '{"__metadata__":{"a":"b"},"y":{'),
    "no text": lambda: b'{"' + b"a" * (HEADER_BYTES - 9) + b'\xff":0}',
}


def gguf(*keys: bytes, tensors: bytes = b"", count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, count, len(keys)) + b"".join(keys) + tensors


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def array(kind: int, element: bytes) -> Callable[[], bytes]:
    def build() -> bytes:
        count = (FILE_BYTES - 999) // len(element)
        return gguf(text(b"k") + struct.pack("<IIQ", 9, kind, count) + element * count)

    return build


def string(value: bytes) -> Callable[[], bytes]:
    return lambda: gguf(text(b"k") + struct.pack("<I", 8) + text(value))


def many_tensors() -> bytes:
    count = FILE_BYTES // 40
    infos = [text(b"%06x" % n) + struct.pack("<IIQ", 0, 0, 32 * n) for n in range(count)]
    return gguf(tensors=b"".join(infos), count=count)


def many_keys() -> bytes:
    return gguf(*(text(b"%06x" % n) + struct.pack("<IH", 2, 9) for n in range(FILE_BYTES // 24)))


LONG = FILE_BYTES - 999
GGUF = {
    "bytes": array(0, b"\x09"),
    "negative bytes": array(1, b"\x81"),
    "truths": array(7, b"\x01"),
    "floats": array(6, struct.pack("<f", 0.1)),
    "doubles": array(12, struct.pack("<d", 0.1)),
    "empty texts": array(8, text(b"")),
    "short texts": array(8, text(b"ab")),
    "short wide texts": array(8, text(WIDE.encode() + b"a")),
    "a long text": string(b"a" * LONG),
    "a long wide text": string(WIDE.encode() + b"a" * LONG),
    "a text that is none at its end": string(b"a" * LONG + b"\xff"),
    "tensors": many_tensors,
    "keys": many_keys,
}


@pytest.fixture(autouse=True)
def _small_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltxlite_quant.gguf.HEADER_ALLOWANCE", ALLOWANCE)
    monkeypatch.setattr("ltxlite_quant.safetensors.HEADER_ALLOWANCE", ALLOWANCE)


def held(path: Path) -> int:
    """Open a file, whatever comes of it; return the most that Python held meanwhile."""
    tracemalloc.start()
    try:
        error: Exception | None = None
        try:
            open_models(path)
        except (FormatError, LtxliteError) as refused:
            error = refused  # with what it holds on to
        assert error is None or len(str(error)) < 1000
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", list(JSON))
def test_no_json_header_takes_more_than_the_file_and_the_allowance(
    tmp_path: Path, kind: str
) -> None:
    header = JSON[kind]()
    assert len(header) <= HEADER_BYTES
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(FILE_BYTES)
    assert held(path) < FILE_BYTES + ALLOWANCE + OBJECTS


@pytest.mark.parametrize("kind", list(GGUF))
def test_no_gguf_header_takes_more_than_the_file_and_the_allowance(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(GGUF[kind]())
    assert held(path) < path.stat().st_size + ALLOWANCE + OBJECTS


def test_a_longer_json_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", HEADER_BYTES + 1))
        file.truncate(FILE_BYTES)
    with pytest.raises(FormatError, match=r"a header of \d+ bytes in a file of 1048576, wanted at"):
        open_container(path)


def test_a_million_tensors_are_refused_before_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 1_000_000, 0))
        file.truncate(24_000_999)  # of zeros, which would be a million tensors without a name
    with pytest.raises(FormatError, match="1000000 tensors take more memory than a file of"):
        open_container(path)
