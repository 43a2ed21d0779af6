"""Importance files: read as written, and refused when they are something else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ltxlite.errors import CheckpointError
from ltxlite.importance import Importance, read_importance, write_importance

MODEL = Path(__file__).parent / "golden" / "models" / "tiny-2.3-distilled.safetensors"
WRITTEN = Importance(
    {"a.weight": torch.tensor([1.0, 0.0, 2.5])}, {"a.weight": 9}, 3, ({"file": "m"},)
)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "x.safetensors"
    write_importance(path, WRITTEN)
    found = read_importance(path)
    assert torch.equal(found.moments["a.weight"], WRITTEN.moments["a.weight"])
    assert (found.tokens, found.prompts, found.models) == ({"a.weight": 9}, 3, ({"file": "m"},))


def metadata(**changes: str) -> dict[str, str]:
    said = {
        "ltxlite_importance": "1",
        "ltxlite_version": "0",
        "prompts": "3",
        "models": "[]",
        "tokens": json.dumps({"a.weight": 9}),
    }
    return said | changes


@pytest.mark.parametrize(
    ("value", "changes", "told"),
    [
        (torch.ones(2, 2), {}, r"wanted F32 \[K\]"),
        (torch.ones(3).half(), {}, r"wanted F32 \[K\]"),
        (torch.ones(0), {}, r"wanted F32 \[K\]"),
        (torch.tensor([1.0, torch.nan]), {}, "NaN, infinity or numbers below zero"),
        (torch.tensor([1.0, torch.inf]), {}, "NaN, infinity or numbers below zero"),
        (torch.tensor([1.0, -1e-9]), {}, "NaN, infinity or numbers below zero"),
        (torch.ones(3), {"ltxlite_importance": "2"}, "no importance file of version 1"),
        (torch.ones(3), {"prompts": "many"}, "not those that its header counts"),
        (torch.ones(3), {"prompts": "9" * 5000}, "not those that its header counts"),
        (torch.ones(3), {"tokens": "{}"}, "not those that its header counts"),
        (torch.ones(3), {"tokens": '{"a.weight": 0}'}, "counts no tokens"),
        (torch.ones(3), {"tokens": '{"a.weight": true}'}, "counts no tokens"),
        (torch.ones(3), {"tokens": "["}, "not valid JSON"),
        (torch.ones(3), {"models": '["m"]'}, "its models are"),
        (torch.ones(3), {"models": "{"}, "not valid JSON"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, value: Tensor, changes: dict[str, str], told: str
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a.weight": value}, path, metadata(**changes))
    with pytest.raises(CheckpointError, match=told):
        read_importance(path)


def test_other_files_are_no_importance_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such importance file"):
        read_importance(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no importance file of version 1"):
        read_importance(MODEL)
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="wanted an importance file"):
        read_importance(tmp_path / "page.safetensors")


def test_sums_of_two_runs_weigh_by_their_tokens() -> None:
    one = Importance({"a": torch.tensor([1.0, 4.0]), "b": torch.ones(1)}, {"a": 1, "b": 5}, 1, ())
    two = Importance({"a": torch.tensor([5.0, 0.0]), "c": torch.ones(3)}, {"a": 3, "c": 2}, 2, ())
    both = one.plus(two)
    assert both.moments["a"].tolist() == [4.0, 1.0]
    assert both.tokens == {"a": 4, "b": 5, "c": 2}
    assert both.prompts == 3
    with pytest.raises(CheckpointError, match="a reads 3 inputs here and 2 in the file to add to"):
        one.plus(Importance({"a": torch.ones(3)}, {"a": 1}, 1, ()))
