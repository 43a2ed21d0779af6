"""`control`: draws the control video of an IC-LoRA: edges, motion tracks, a masked reference."""

import argparse
import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = """examples:
  ltxlite control canny dance.mp4 -o edges.mp4
  ltxlite control tracks tracks.json --size 1280x768 --frames 121 -o tracks.mp4
  ltxlite control masked-ref room.mp4 --mask chair.png --object chair.jpg -o reference.mp4

edges and tracks need no file of their own: `generate --reference canny:dance.mp4` and `--tracks`
draw them at the clip's size. A clip made to a masked reference loses its panel with --cut."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = EXAMPLE
    parser.add_argument("kind", choices=("canny", "tracks", "masked-ref"), help="what to draw")
    parser.add_argument("source", metavar="FILE", help="the clip, or the JSON file of tracks")
    parser.add_argument("-o", "--output", required=True, help=".mp4, or a folder for PNG frames")
    parser.add_argument("--size", default="1280x768", help="of tracks: WIDTHxHEIGHT of the clip")
    parser.add_argument("--frames", type=int, default=121, help="of tracks (default 121)")
    parser.add_argument("--fps", default="24", help="of tracks (default 24)")
    parser.add_argument("--mask", help="masked-ref: still or video, white where the object goes")
    parser.add_argument("--object", help="masked-ref: picture of what goes there")
    parser.add_argument(
        "--panel", type=int, metavar="PIXELS", help="width of its panel (default: half the clip's)"
    )
    parser.add_argument("--panel-left", action="store_true", help="the panel stands at the left")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Draw, print where the video is."""
    from ltxlite.cli.show import print_result
    from ltxlite.errors import RequestError
    from ltxlite.media.compose import even
    from ltxlite.media.fit import as_pixels
    from ltxlite.media.frame_writer import create_frames
    from ltxlite.media.output import VideoSettings
    from ltxlite.media.video_writer import create_video

    target, source = Path(options.output), Path(options.source)
    if target.exists() and source.exists() and target.samefile(source):
        raise RequestError(f"{target}: would be written over its source; choose another -o")
    drawn = {"canny": _edges, "tracks": _tracks, "masked-ref": _masked}[options.kind]
    rate, frames = drawn(options)
    first = even(next(frames))
    settings = VideoSettings(first.shape[1], first.shape[0], rate, None, crf=0)
    count = 0
    with (create_video if target.suffix else create_frames)(target, settings) as writer:
        for frame in itertools.chain([first], map(even, frames)):
            writer.write(as_pixels(frame))
            count += 1
    text = f"{target}  {first.shape[1]}x{first.shape[0]}, {count} frames at {rate} fps"
    print_result(text, {"path": str(target), "frames": count}, options.json)
    return 0


def _edges(options: argparse.Namespace) -> "tuple[Fraction, Iterator[Tensor]]":
    from ltxlite.media.edges import canny

    rate, frames = _clip(options)
    return rate, (canny(frame) for frame in frames)


def _tracks(options: argparse.Namespace) -> "tuple[Fraction, Iterator[Tensor]]":
    from ltxlite.errors import RequestError
    from ltxlite.media.tracks import draw_tracks, read_tracks
    from ltxlite.request import parse_fraction

    width, _, height = options.size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and 0 < options.frames < 1 << 16):
        raise RequestError(
            f"--size {options.size} --frames {options.frames}: wanted such as 1280x768 and 121"
        )
    size = max(int(height), 1), max(int(width), 1)
    tracks = read_tracks(Path(options.source))
    frames = draw_tracks(tracks, range(options.frames), options.frames, size)
    return parse_fraction(options.fps, "--fps"), frames


def _masked(options: argparse.Namespace) -> "tuple[Fraction, Iterator[Tensor]]":
    from ltxlite.errors import RequestError
    from ltxlite.media.compose import masked_reference, panel_of
    from ltxlite.media.image import load_image

    if options.mask is None or options.object is None:
        raise RequestError("masked-ref: give the place with --mask and the thing with --object")
    rate, frames = _clip(options)
    masks = _masks(options, rate)
    thing = load_image(Path(options.object))

    def drawn() -> "Iterator[Tensor]":
        for frame, mask in zip(frames, masks, strict=False):
            if mask.shape != frame.shape[:2]:
                raise RequestError(
                    f"mask {options.mask}: is {mask.shape[1]}x{mask.shape[0]}, the clip "
                    f"{frame.shape[1]}x{frame.shape[0]}; wanted the same size"
                )
            width = options.panel or frame.shape[1] // 2
            panel = panel_of(thing, frame.shape[0], width)
            yield masked_reference(frame, mask, panel, options.panel_left)

    return rate, drawn()


def _clip(options: argparse.Namespace) -> "tuple[Fraction, Iterator[Tensor]]":
    from ltxlite.media.timing import frames_at, read_timing

    path = Path(options.source)
    timing = read_timing(path)
    return timing.rate, frames_at(path, timing.numbers(timing.rate))


def _masks(options: argparse.Namespace, rate: Fraction) -> "Iterator[Tensor]":
    """Yield masks (H, W) of 0 and 1 for as many frames as anybody asks for."""
    from ltxlite.given.footage import open_footage
    from ltxlite.given.source_mask import binary

    footage = open_footage(options.mask, rate)
    chosen = [0] if footage.numbers is None else range(len(footage.numbers))
    last = None
    for last in map(binary, footage.frames(chosen)):
        yield last
    if last is not None:
        yield from itertools.repeat(last)
