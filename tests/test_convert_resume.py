"""Conversions that were killed, and what damaged remains are worth."""

from collections.abc import Callable
from pathlib import Path

import pytest
from convert_support import PREFIX, SMALL, Killed, asked, beside, changed, converted, flip, killed
from torch import Tensor

from ltxlite.cli import INTERRUPTED, main
from ltxlite.convert.file import PartialFile
from ltxlite.convert.layout import lay_out
from ltxlite.convert.run import convert
from ltxlite.errors import RequestError
from ltxlite_quant import FORMATS
from ltxlite_quant.policy import Decision

pytest_plugins = ("convert_fixtures",)


@pytest.mark.parametrize(
    "after", [2, 101, 2 * SMALL, 2 * SMALL + 4]
)  # half-way, at the end, while verified
def test_a_killed_conversion_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, small_written: Path, after: int, small: Path
) -> None:
    target = tmp_path / small_written.name
    killed(target, small, after)
    result = converted(target, small)
    assert result.resumed == min(SMALL, after // 2)
    assert target.read_bytes() == small_written.read_bytes()
    assert beside(target) == [target.name]


def test_a_conversion_killed_before_its_first_tensor_leaves_nothing(
    tmp_path: Path, small: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(asked(tmp_path / "x.gguf", small), Killed(1))
    assert beside(tmp_path / "x.gguf") == []


def test_ctrl_c_is_told_with_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    monkeypatch.setattr("ltxlite.cli.show.Terminal.advance", Killed(40).advance.__func__)
    monkeypatch.setattr("ltxlite.cli.show.Terminal.left", 40, raising=False)
    monkeypatch.setattr("ltxlite.cli.show.Terminal.stop", KeyboardInterrupt, raising=False)
    assert main(["convert", str(small), str(tmp_path / "x.gguf"), "--type", "Q8_0"]) == INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().err


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "file cut": lambda part, _: part.write_bytes(part.read_bytes()[:400_000]),
    "file empty": lambda part, _: part.write_bytes(b""),
    "bytes flipped": lambda part, _: flip(part, 300_000),
    "header flipped": lambda part, _: flip(part, 100),
    "journal cut in a line": lambda _, journal: journal.write_bytes(journal.read_bytes()[:-9]),
    "journal of one line": lambda _, journal: journal.write_bytes(
        journal.read_bytes().split(b"\n")[0]
    ),
}


@pytest.mark.parametrize("case", sorted(DAMAGE))
def test_what_is_damaged_in_a_partial_file_is_written_anew(
    tmp_path: Path, small_written: Path, case: str, small: Path
) -> None:
    target = tmp_path / small_written.name
    part, journal = killed(target, small, 300)
    DAMAGE[case](part, journal)
    result = converted(target, small)
    assert result.resumed < 150 or case == "header flipped"
    assert target.read_bytes() == small_written.read_bytes()


def test_a_conversion_killed_twice_still_remembers_the_first_run(
    tmp_path: Path, small_written: Path, small: Path
) -> None:
    target = tmp_path / small_written.name
    _, journal = killed(target, small, 150)
    journal.write_bytes(journal.read_bytes()[:-5])  # the kill came in the middle of a line
    killed(target, small, 200)
    assert converted(target, small).resumed > 80
    assert target.read_bytes() == small_written.read_bytes()


def test_a_partial_file_of_another_recipe_or_source_is_not_touched(
    tmp_path: Path, small: Path
) -> None:
    target = tmp_path / "x.gguf"
    part, journal = killed(target, small)
    before = part.read_bytes(), journal.read_bytes()
    with pytest.raises(RequestError, match="unfinished file of another conversion"):
        converted(target, small, "Q4_0")

    def finetune(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}proj_out.bias"] += 1  # the header stays what it was

    other = changed(tmp_path, small, finetune)
    with pytest.raises(RequestError, match="unfinished file of another conversion"):
        converted(target, other, "Q8_0")
    assert (part.read_bytes(), journal.read_bytes()) == before
    assert converted(target, small).resumed == 50


def test_a_part_file_without_a_journal_is_somebody_elses(tmp_path: Path, small: Path) -> None:
    part = tmp_path / "x.gguf.ltxlite-part"
    part.write_bytes(b"mine")
    with pytest.raises(RequestError, match="of another conversion"):
        converted(tmp_path / "x.gguf", small)
    assert part.read_bytes() == b"mine"


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    layout = lay_out([Decision("a", (3,), FORMATS["F32"], "")], {})
    with (
        PartialFile(tmp_path / "x.gguf", layout, "same"),
        pytest.raises(RequestError, match=r"x\.gguf: another process is writing"),
        PartialFile(tmp_path / "x.gguf", layout, "same"),
    ):
        pass
    assert beside(tmp_path / "x.gguf") == []
