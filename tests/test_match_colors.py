"""`--match-colors`: each frame of a clip takes on the colours of a picture."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from resume_support import request_of

from ltxlite.cli import main
from ltxlite.conditions import Conditions, Source
from ltxlite.errors import MediaError, RequestError
from ltxlite.request import Output, Request, Stage
from ltxlite.writing import check_output, recoloured

DemoFiles = tuple[Path, Path, Path]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Write a dull brownish picture, whose colours no mapping has to clamp."""
    generator = np.random.default_rng(3)
    noise = generator.normal((130, 110, 90), 6, (33, 47, 3))
    path = tmp_path / "colours.png"
    Image.fromarray(noise.clip(0, 255).astype("uint8")).save(path)
    return path


def job(picture: Path) -> Request:
    return request_of(picture.parent, Stage(sigmas="linq:3"))


def colours_of(frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = frame.movedim(-3, 0).flatten(1).double()
    return flat.mean(1), torch.cov(flat, correction=0)


def test_every_frame_gets_the_mean_and_covariance_of_the_picture(picture: Path) -> None:
    request = replace(job(picture), output=Output("unused.mp4", match=str(picture)))
    generator = torch.Generator().manual_seed(1)
    pieces = [0.2 * torch.randn(n, 3, 10, 14, generator=generator) for n in (1, 3)]
    made = torch.cat(list(recoloured(iter(pieces), request)))
    pixels = torch.tensor(np.asarray(Image.open(picture))).movedim(-1, 0) / 127.5 - 1
    mean, covariance = colours_of(pixels)
    for frame in made:
        found = colours_of(frame)
        # fp32 pixels of about 0.3; a root of a matrix of 1e-3 loses a few digits.
        torch.testing.assert_close(found[0], mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[1], covariance, rtol=0, atol=1e-5)


def test_a_share_goes_as_far_of_the_way(picture: Path) -> None:
    frames = 0.2 * torch.randn(2, 3, 10, 14, generator=torch.Generator().manual_seed(1))
    found = []
    for share in (0.0, 0.5, 1.0):
        output = Output("unused.mp4", match=str(picture), match_share=share)
        found.extend(
            recoloured(
                iter([frames]),
                replace(job(picture), output=output),
            )
        )
    assert torch.equal(found[0], frames)
    torch.testing.assert_close(found[1], (found[0] + found[2]) / 2)


def test_a_clip_is_written_with_the_colours_of_a_picture(
    demo_files: DemoFiles, picture: Path, tmp_path: Path
) -> None:
    model, upscaler, encoder = demo_files
    flags = ["--model", str(model), "--upscaler", str(upscaler), "--text-encoder", str(encoder)]
    flags += ["--prompt", "rain", "--size", "128x64", "--frames", "9", "--quiet"]
    folder = tmp_path / "frames"
    assert main(["generate", *flags, "--match-colors", f"{picture}:1", "-o", str(folder)]) == 0
    frames = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    assert len(frames) == 9
    for frame in frames:
        # Rounding to 8 bits and what little is clamped move a mean by less than a level.
        assert np.abs(frame.mean(axis=(0, 1)) - (130, 110, 90)).max() < 1.5


def test_what_cannot_be_matched_is_told_in_one_line(picture: Path) -> None:
    request = job(picture)
    with pytest.raises(MediaError, match="no such file"):
        check_output(replace(request, output=Output("out.mp4", match="none.png")))
    with pytest.raises(RequestError, match="matched by 2"):
        Output("out.mp4", match=str(picture), match_share=2.0)
    source = Conditions(source=Source("clip.mp4", video=(0.0, 1.0)))
    with pytest.raises(RequestError, match="kept as they are"):
        replace(request, conditions=source, output=Output("out.mp4", match=str(picture)))
