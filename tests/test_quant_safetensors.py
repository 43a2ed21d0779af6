"""The safetensors reader, against the safetensors library and against hostile files."""

import copy
import gc
import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from ltxlite_quant.formats import FormatError
from ltxlite_quant.safetensors import MAX_HEADER_BYTES, SafetensorsFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write(path, header, data=b"", length=None):
    """Write a safetensors file by hand: a header (object or bytes), its announced length, data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def info(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def samples():
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randint(0, 100, (3, 5), generator=generator).to(dtype)
        for name, dtype in DTYPES.items()
    }
    return values | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}


def test_every_dtype_reads_back_as_the_library_wrote_it(tmp_path):
    wanted = samples()
    save_file(wanted, tmp_path / "a.safetensors", metadata={"config": "{}"})
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"config": "{}"}
        assert file.tensors.keys() == wanted.keys()
        for name, value in wanted.items():
            loaded = file.load(name)
            assert (loaded.dtype, loaded.shape) == (value.dtype, value.shape)
            assert torch.equal(loaded.double(), value.double())
            assert file.tensors[name].nbytes == value.numel() * value.element_size()
            assert file.tensors[name].format.dtype == value.dtype


def test_tensors_are_views_that_outlive_the_file_and_copy_alone(tmp_path):
    values = {"a": torch.arange(64.0), "b": torch.arange(640.0)}
    save_file(values, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        first, again = file.load("a"), file.load("a")
        assert first.data_ptr() == again.data_ptr()  # zero-copy
    del again, file
    gc.collect()
    assert torch.equal(first, values["a"])
    # A copy must not drag the whole file along.
    assert copy.deepcopy(first).untyped_storage().nbytes() == 256


def test_a_misaligned_tensor_is_copied(tmp_path):
    header = {"pad": info("U8", (1,), (0, 1)), "x": info("F32", (3,), (1, 13))}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    value = torch.tensor([1.5, -2.0, 3.25])
    path = write(tmp_path / "m.safetensors", raw, b"\0" + value.numpy().tobytes())
    loaded = SafetensorsFile(path).load("x")
    assert torch.equal(loaded, value)
    assert loaded.data_ptr() % 4 == 0


def test_opening_a_42_gigabyte_file_reads_its_header_only(tmp_path):
    size = 42 << 30
    path = write(tmp_path / "big.safetensors", {"x": info("BF16", (size // 2,), (0, size))})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)  # sparse: takes no room
    with SafetensorsFile(path) as file:
        assert file.load("x").shape == (size // 2,)
        assert file.load("x")[-1] == 0


def test_a_closed_file_and_a_missing_tensor_say_so(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=r"no tensor 'b' \(it has 1"):
        file.load("b")
    file.close()
    file.close()
    with pytest.raises(FormatError, match="was closed"):
        file.load("a")


HOSTILE = {
    "short": (b"\x01\x02", "2 bytes are too short"),
    "empty": (b"", "the file is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    "html": (b"\n <!DOCTYPE html><html></html>", "a web page"),
    "zip": (b"PK\x03\x04" + bytes(60), "a zip archive"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(16), "this is a GGUF file"),
    "long header": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + bytes(99), "not a safetensors file"),
    "cut header": (struct.pack("<Q", 5000) + b"{}", "got 10 bytes, wanted 5008"),
    "not json": (struct.pack("<Q", 4) + b"{\xff\xfe}", "not valid JSON"),
    "deep json": (struct.pack("<Q", 99_999) + b'{"a":' + b"[" * 99_994, "not valid JSON"),
    "utf-32": (struct.pack("<Q", 8) + "{}".encode("utf-32-be"), r"starts with b'\\x00\\x00"),
    "utf-16": (struct.pack("<Q", 4) + "{}".encode("utf-16-le"), "not valid JSON"),
    "space first": (struct.pack("<Q", 3) + b" {}", "it starts with b' {}'"),
    "no header": (struct.pack("<Q", 0), "not valid JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_what_is_no_safetensors_file_is_refused_by_what_it_is(tmp_path, kind):
    content, message = HOSTILE[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


BAD_HEADERS = [
    ({"x": info("F4")}, "'x': unknown dtype 'F4'"),
    ({"x": info("Q8_0", (1, 32), (0, 34))}, "unknown dtype 'Q8_0'"),
    ({"x": info(shape=(2, -3))}, "shape must be a list of sizes"),
    ({"x": info(shape=(2, True))}, "shape must be a list of sizes"),
    ({"x": info(shape=(2, 2.0))}, "shape must be a list of sizes"),
    ({"x": info(shape=(1 << 60, 1 << 60))}, "shape must be a list of sizes"),
    ({"x": info(shape=(1 << 40, 1 << 40))}, "takes 48357"),
    ({"x": info(shape=(2, 4))}, "takes 32 bytes, but data_offsets give it 24"),
    ({"x": info(offsets=(-24, 0))}, "data_offsets must be a list of sizes"),
    ({"x": info(offsets=(24, 0))}, r"must be \[begin, end\]"),
    ({"x": info(offsets=(0, 12, 24))}, r"must be \[begin, end\]"),
    ({"x": {"dtype": "F32"}}, "shape must be a list of sizes, got None"),
    ({"x": 3}, "wanted dtype, shape and data_offsets, got 3"),
    ({"x": info(), "y": info(offsets=(12, 36))}, "'y' starts at byte .* inside 'x'"),
    ({"x": info(offsets=(24, 48))}, r"cut short, got \d+ bytes, wanted \d+ \('x' is incomplete"),
    ({"x": info("F32", (1,), (0, 4))}, "the header describes"),
    ({}, "the header describes"),
    ({"__metadata__": {"a": 1}, "x": info()}, "__metadata__ must map strings to strings"),
    (b'{"x": 1, "x": 2}', "the key 'x' stands twice"),
    (b'{"x": {"dtype": "F32", "dtype": "F32"}}', "the key 'dtype' stands twice"),
    ({"x": info(shape=[1] * 99)}, "shape must be a list of sizes"),
    ({"x": info(shape=(2, float("nan")))}, "shape must be a list of sizes"),
    ({"x": info(shape=(float("inf"), 0))}, "shape must be a list of sizes"),
    (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b'{"x": {"dtype": "U8", "shape": [1e0], "data_offsets": [0, 1]}}', "must be a list of sizes"),
    ({"x" * 5000: 3}, "'x{160}': wanted dtype"),
    ({"a": info("U8", (0,), (3, 3)), "x": info()}, "'a' starts at byte .* inside 'x'"),
]


@pytest.mark.parametrize(("header", "message"), BAD_HEADERS)
def test_a_bad_header_is_refused_with_what_is_wrong(tmp_path, header, message):
    path = write(tmp_path / "bad.safetensors", header, bytes(24))
    with pytest.raises(FormatError, match=message):
        SafetensorsFile(path)


def test_a_file_that_became_shorter_is_told_and_does_not_end_the_process(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1 << 20)}, path)
    file = SafetensorsFile(path)
    with path.open("r+b") as open_file:
        open_file.truncate(path.stat().st_size - 4)
    with pytest.raises(FormatError, match=r"became shorter while it was open, got \d+ bytes"):
        file.load("a")


def test_every_truncation_of_a_good_file_is_refused(tmp_path):
    save_file({"a": torch.zeros(3), "b": torch.ones(2, 2)}, tmp_path / "good.safetensors")
    content = (tmp_path / "good.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError):
            SafetensorsFile(path)
