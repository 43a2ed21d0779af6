"""Hostile headers, a little of `python -m benchmarks fuzz` in every run of the tests."""

from pathlib import Path

import pytest

from benchmarks import fuzz
from benchmarks.harness import GateError


@pytest.mark.parametrize("kind", list(fuzz.SEEDS))
def test_mutated_headers_are_opened_or_refused_and_cost_no_memory(kind: str) -> None:
    opened = fuzz.storm(kind, range(1000))
    # Both must happen often, or the mutations are too tame or too wild to test anything.
    assert 50 < opened < 950


@pytest.mark.parametrize("kind", list(fuzz.SEEDS))
def test_the_unmutated_seeds_are_opened(kind: str, tmp_path: Path) -> None:
    header, data = fuzz.SEEDS[kind](tmp_path)
    path = tmp_path / "seed"
    fuzz._write(path, fuzz.framed(kind, header, len(header)) + data, fuzz.FILE_BYTES)
    assert fuzz._use(path)


def test_a_foreign_exception_names_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(2))

    def crash(path: Path) -> bool:
        if next(calls):  # the first is the seed itself, unmutated
            raise KeyError("boom")
        return True

    monkeypatch.setattr(fuzz, "_use", crash)
    with pytest.raises(GateError, match="gguf mutation 7: KeyError: 'boom'"):
        fuzz.storm("gguf", range(7, 8))


def test_memory_beyond_the_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    more = fuzz.FILE_BYTES + fuzz.BESIDES_BYTES + 4096  # beyond what a mutation adds
    monkeypatch.setattr(fuzz, "_use", lambda path: bool(bytearray(more)))
    with pytest.raises(GateError, match=r"safetensors mutation 3: .* bytes held"):
        fuzz.storm("safetensors", range(3, 4))
