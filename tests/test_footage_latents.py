"""Footage encoded exactly, or in tiles where the job asks for them."""

import json
from pathlib import Path

import pytest
import torch
from test_engine_runs import Files as DemoFiles
from test_engine_runs import generate

from ltxlite.errors import RequestError
from ltxlite.given.footage_latents import encode_footage
from ltxlite.media.container import read_metadata
from ltxlite.media.image import save_png
from ltxlite.models.tiling import Span, Tiling, tiled_encode
from ltxlite.opening import open_networks
from ltxlite.pipeline import JOB_TAG
from ltxlite.request import Files, Output, Request, Stage, Tiles


def job(tiles: Tiles | None) -> Request:
    return Request("", Files("x"), Output("x.mp4"), (Stage(),), encode_tiles=tiles)


@torch.inference_mode()
def test_footage_is_encoded_exactly_or_in_the_tiles_that_are_asked_for(
    demo_files: DemoFiles,
) -> None:
    model, _, encoder_file = map(str, demo_files)
    networks = open_networks(Files(model, encoder_file), "cpu", "float32")
    encoder = networks.video_encoder()
    random = torch.Generator().manual_seed(0)
    clip = torch.rand(1, 3, 9, 128, 192, generator=random) * 2 - 1
    exact = encode_footage(job(None), networks, encoder, iter(clip.split(4, dim=2)))
    # Another order of the same sums: the clip in pieces.
    torch.testing.assert_close(exact, encoder(clip), rtol=0, atol=1e-5)
    tiles = Tiles(128, 64, 80, 24)
    tiled = encode_footage(job(tiles), networks, encoder, iter(clip.split(4, dim=2)))
    wanted = tiled_encode(encoder, clip, Tiling.auto(128, 192, Span(128, 64), Span(80, 24)))
    assert torch.equal(tiled, wanted)
    assert not torch.allclose(tiled, exact, atol=1e-4)  # seams are blended
    with pytest.raises(RequestError, match="overlap"):  # too little for seams
        encode_footage(job(Tiles(128, 32)), networks, encoder, iter([clip]))


def test_tiles_of_given_pictures_are_part_of_the_job(demo_files: DemoFiles, tmp_path: Path) -> None:
    picture, clip = tmp_path / "red.png", tmp_path / "clip.mp4"
    save_png(picture, torch.zeros(64, 64, 3, dtype=torch.uint8))
    flags = ("--image", str(picture), "--tiled-encode")
    assert generate(demo_files, clip, *flags) == 0
    tiles = json.loads(read_metadata(clip)[JOB_TAG])["encode_tiles"]
    assert (tiles["size"], tiles["overlap"]) == (768, 64)
