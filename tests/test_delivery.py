"""What is delivered of a clip that was made in a source: frames, sizes, sound, colours."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from clip_files import steady, tone, write_clip
from torch import Tensor

from ltxlite.conditions import Conditions, Source
from ltxlite.delivery import (
    Grids,
    delivered_frames,
    delivered_size,
    delivered_sound,
    edit_of,
)
from ltxlite.geometry import AudioGrid, LatentGrid
from ltxlite.media.colour import nearest_uint8_rgb
from ltxlite.media.video_reader import iter_frames
from ltxlite.request import Files, Output, Request, Stage

GRIDS = Grids(LatentGrid(), AudioGrid())
COUNT, FPS, SIZE = 20, Fraction(25), (70, 50)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Return a clip of 20 frames of 70x50 with sound, its middle to be made anew."""
    sound = (tone(2, COUNT / 25, 48_000), 48_000)
    path = write_clip(tmp_path / "a.mp4", steady(COUNT, FPS), SIZE, sound)
    return Source(str(path), video=(0.4, 0.5), whole=True)


def request(source: Source, frames: int = 25) -> Request:
    return Request(
        prompt="",
        files=Files("m"),
        output=Output("out"),
        stages=(Stage(),),
        width=96,
        height=64,
        frames=frames,
        fps=str(FPS),
        conditions=Conditions(source=source),
    )


def own(source: Source) -> Tensor:
    return torch.stack(list(iter_frames(Path(source.path))))


def pieces(frames: Tensor) -> Iterator[Tensor]:
    """Yield frames as a decoder does: one, then eight at a time."""
    yield frames[:1]
    yield from frames[1:].split(8)


def composed(job: Request, made: Tensor) -> Tensor:
    edit = edit_of(job, GRIDS)
    frames = delivered_frames(job, edit, pieces(made), GRIDS)
    return nearest_uint8_rgb(torch.cat(list(frames)))


def test_made_frames_come_back_at_the_sources_place_and_size(source: Source) -> None:
    # Frame n of the clip has the value n / 100; the part is frames 10 to 12, so latent 2: 9 to 16.
    made = (torch.arange(25) / 100).view(-1, 1, 1, 1).expand(-1, 3, 64, 96)
    frames = composed(request(source), made)
    before = own(source)
    assert frames.shape == before.shape == (COUNT, 50, 70, 3)
    assert torch.equal(frames[:9], before[:9])
    assert torch.equal(frames[17:], before[17:])
    levels = ((torch.arange(9, 17) / 100 + 1) / 2 * 255).round().to(torch.uint8)
    assert torch.equal(frames[9:17], levels.view(-1, 1, 1, 1).expand(-1, 50, 70, 3))


def test_a_window_lies_where_its_offset_says(source: Source) -> None:
    moved = replace(source, offset=8, video=(2 / 25, 3 / 25))
    frames = composed(request(moved, frames=9), torch.zeros(9, 3, 64, 96))
    changed = [n for n in range(COUNT) if not torch.equal(frames[n], own(source)[n])]
    assert changed == list(range(9, 17))


def test_colours_are_matched_to_the_kept_frames(source: Source) -> None:
    # The decoder is wrong by a factor and a shift in each channel: kept frames show it.
    pixels = own(source).movedim(-1, 1).float() / 127.5 - 1
    pixels = torch.cat([pixels, pixels[-1:].expand(5, -1, -1, -1)])
    factor, shift = torch.tensor([0.9, 0.8, 0.95]), torch.tensor([0.05, -0.02, 0.03])
    wrong = pixels * factor.view(3, 1, 1) + shift.view(3, 1, 1)
    made = torch.nn.functional.pad(wrong, (0, 26, 0, 14), mode="reflect")
    before = own(source)
    plain = composed(request(source), made).int() - before.int()
    assert plain[9:17].abs().max() > 10
    matched = composed(request(replace(source, match=True)), made).int() - before.int()
    # The map is exact but for fp32 and the blue channel, which is flat but for the bar.
    assert matched[9:17].abs().max() <= 1


def test_a_magnified_source_has_an_even_size(source: Source) -> None:
    odd = replace(source, magnify="3/2", video=(0.0, 0.8))
    assert delivered_size(request(odd), edit_of(request(odd), GRIDS)) == (104, 74)


def test_sound_of_a_source_is_kept_but_for_its_part(source: Source) -> None:
    # 0.4 s to 0.5 s: latents 10 to 13, heard from 0.37 s to 0.53 s.
    job = request(replace(source, audio=(0.4, 0.5)))
    made = torch.full((2, 48_000), 0.25), 48_000
    kept = delivered_sound(request(source), edit_of(job, GRIDS), made, GRIDS)
    heard = delivered_sound(job, edit_of(job, GRIDS), made, GRIDS)
    assert kept is not None
    assert heard is not None
    assert heard[0].shape == (2, 38_400)
    begin, end = 17_760, 25_440
    assert torch.equal(heard[0][:, :begin], kept[0][:, :begin])
    assert torch.equal(heard[0][:, end:], kept[0][:, end:])
    assert torch.equal(heard[0][:, begin + 960 : end - 960], made[0][:, : end - begin - 1920])
