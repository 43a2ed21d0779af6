"""Contexts kept on disk: found again, never trusted, never in the way."""

from pathlib import Path

import pytest
import torch

from ltxlite import context_cache
from ltxlite.context_cache import ContextCache


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    video = torch.randn(1, 8, 16, generator=random).bfloat16()
    return video, torch.randn(1, 8, 4, generator=random).bfloat16()


def test_a_context_is_found_again_with_its_bits(tmp_path: Path) -> None:
    cache = ContextCache(tmp_path / "new", print)
    cache.keep("files a", "a train", pair(0))
    found = cache.find("files a", "a train")
    assert found is not None
    assert all(torch.equal(a, b) for a, b in zip(found, pair(0), strict=True))


def test_another_text_or_another_file_is_another_context(tmp_path: Path) -> None:
    cache = ContextCache(tmp_path, print)
    cache.keep("files a", "a train", pair(0))
    assert cache.find("files b", "a train") is None
    assert cache.find("files a", "a train ") is None
    assert cache.find("files a\0a", " train") is None


def test_a_damaged_file_is_as_good_as_none(tmp_path: Path) -> None:
    cache = ContextCache(tmp_path, print)
    cache.keep("files", "text", pair(0))
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:-1], b"\xff" * 100):
        path.write_bytes(content)
        assert cache.find("files", "text") is None


def test_a_folder_that_cannot_be_written_is_told_and_forgiven(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    notes: list[str] = []
    ContextCache(tmp_path / "file" / "folder", notes.append).keep("files", "text", pair(0))
    assert len(notes) == 1 and "not kept" in notes[0]


def test_the_longest_unused_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_cache, "_KEPT_BYTES", 1500)
    cache = ContextCache(tmp_path, print)
    for number in range(6):
        cache.keep("files", f"text {number}", pair(number))
    held = list(tmp_path.glob("*.safetensors"))
    assert 0 < sum(path.stat().st_size for path in held) <= 1500
    assert cache.find("files", "text 5") is not None
    assert cache.find("files", "text 0") is None
