"""Reading back what was written, before it gets its name."""

from pathlib import Path

import pytest
import torch
from convert_support import QUERY, SMALL, changed, converted, flip, with_value
from safetensors.torch import load_file
from torch import Tensor

from ltxlite.convert.file import PartialFile
from ltxlite.convert.run import Conversion, convert
from ltxlite.errors import CheckpointError
from ltxlite.progress import Report
from ltxlite_quant.gguf import GgufFile
from ltxlite_quant.policy import recipe_named

pytest_plugins = ("convert_fixtures",)


def test_bytes_that_change_on_the_disk_are_found_before_the_file_gets_its_name(
    tmp_path: Path, small_written: Path, monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    target = tmp_path / small_written.name
    with GgufFile(small_written) as file:
        entry = file.tensors[QUERY]

    def rot(partial: PartialFile) -> None:
        flip(partial.path, entry.offset + 40)

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "sync", rot)
        with pytest.raises(CheckpointError, match=f"{QUERY} does not read back as it was written"):
            converted(target, small)
    assert not target.exists()
    assert converted(target, small).resumed == SMALL - 1  # the checksum gave it away
    assert target.read_bytes() == small_written.read_bytes()


def test_a_format_that_fits_a_tensor_badly_is_noted_and_no_error(
    tmp_path: Path, small: Path
) -> None:
    def spiky(values: Tensor) -> Tensor:
        values.fill_(1e-3)
        values[:, ::32] = 1.0  # one value of each block takes all the levels
        values[:, 5::32] = -0.03
        return values

    source = changed(tmp_path, small, with_value(QUERY, spiky))
    result = converted(tmp_path / "x.gguf", source, "Q4_0")
    assert not [note for note in result.notes if QUERY in note]  # the large values hold
    flat = with_value(QUERY, lambda v: v.copy_(torch.randint(-1, 2, v.shape) * 1e-8))
    result = converted(tmp_path / "y.gguf", changed(tmp_path, small, flat), "Q4_0")
    assert [note for note in result.notes if f"{QUERY}: 1.000 of relative error" in note]


def test_without_verification_there_is_no_report_of_errors(
    tmp_path: Path, small_written: Path, small: Path
) -> None:
    quick = Conversion((small,), tmp_path / small_written.name, recipe_named("Q8_0"), verify="none")
    assert convert(quick, Report()).errors == []
    assert quick.target.read_bytes() == small_written.read_bytes()


def test_a_sample_covers_every_tensor_and_all_of_it_with_full(tmp_path: Path, small: Path) -> None:
    sample = Conversion((small,), tmp_path / "x.gguf", recipe_named("Q8_0"))
    few = convert(sample, Report()).errors
    every = converted(tmp_path / "y.gguf", small).errors
    assert sum(row.tensors for row in few) == sum(row.tensors for row in every) == SMALL
    assert sum(row.weights for row in every) == sum(t.numel() for t in load_file(small).values())
    assert sum(row.weights for row in few) < sum(row.weights for row in every)
