"""Sources, targets and mishaps that the tests of conversion share."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltxlite.cli import main
from ltxlite.convert.run import Conversion, Converted, convert
from ltxlite.progress import Report
from ltxlite_quant.policy import recipe_named

GOLDEN = Path(__file__).parent / "golden" / "models"
MODEL = GOLDEN / "tiny-2.3-distilled.safetensors"
GEMMA = GOLDEN / "gemma3_tiny"
PREFIX = "model.diffusion_model."
QUERY = "transformer_blocks.1.attn1.to_q.weight"
Q8_0 = recipe_named("Q8_0")
SMALL = 264  # tensors of the fixture `small`


def asked(
    target: Path, source: Path = MODEL, recipe: str = "Q8_0", part: str = "transformer"
) -> Conversion:
    return Conversion((source,), target, recipe_named(recipe), part, "full", "cpu")


def converted(target: Path, *rest: object) -> Converted:
    return convert(asked(target, *rest), Report())


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def changed(folder: Path, source: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Write a checkpoint with its tensors changed; the name keeps its words."""
    tensors = load_file(source)
    change(tensors)
    path = folder / "changed-distilled.safetensors"
    save_file(tensors, path, metadata_of(source))
    return path


def source_tensors() -> dict[str, Tensor]:
    return {
        name.removeprefix(PREFIX): tensor
        for name, tensor in load_file(MODEL).items()
        if name.startswith(PREFIX)
    }


def field(reader: gguf.GGUFReader, name: str) -> tuple[object, list[gguf.GGUFValueType]]:
    found = reader.fields[name]
    return found.contents(), found.types


def beside(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


class Killed(Report):
    """Stops the work like Ctrl-C, after so many reports of progress."""

    def __init__(self, after: int, stop: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self.stop = after, stop

    def advance(self, done: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.stop


def killed(target: Path, small: Path, after: int = 100) -> tuple[Path, Path]:
    with pytest.raises(KeyboardInterrupt):
        convert(asked(target, small), Killed(after))
    part = target.with_name(f"{target.name}.ltxlite-part")
    journal = target.with_name(f"{target.name}.ltxlite-journal")
    assert beside(target) == [journal.name, part.name]
    return part, journal


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + 64] = bytes(byte ^ 0xFF for byte in data[offset : offset + 64])
    path.write_bytes(data)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run, expect exit 1 and one line; returns it."""
    assert main(["convert", *map(str, arguments), "--quiet"]) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("ltxlite: ")
    assert "\n" not in message
    return message


def without(*words: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if any(word in n for word in words)]:
            del tensors[name]

    return change


def with_value(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[PREFIX + name] = value(tensors[PREFIX + name])

    return change
