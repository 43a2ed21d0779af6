"""`join`: clips one after another, their sound cross-faded; no model is needed."""

import argparse
from fractions import Fraction
from pathlib import Path

EXAMPLE = """example:
  ltxlite join part1.mp4 part2.mp4 part3.mp4 --overlap 25 -o film.mp4

--overlap: frames with which each clip shows again what the one before ended with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = EXAMPLE
    parser.add_argument("clips", nargs="+", metavar="CLIP", help="clips of one size, in order")
    parser.add_argument("-o", "--output", required=True, help=".mp4, or a folder for PNG frames")
    parser.add_argument("--overlap", type=int, default=0, help="frames shown twice (default 0)")
    parser.add_argument(
        "--fade", type=float, default=0.05, help="seconds over which sound passes (default 0.05)"
    )
    parser.add_argument("--crf", type=int, default=19, help="H.264 quality, 0 best (default 19)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Join, print where the clip is."""
    from ltxlite.cli.show import print_result
    from ltxlite.errors import RequestError
    from ltxlite.joining import joined_frames, joined_sound, open_joint
    from ltxlite.media.frame_writer import create_frames
    from ltxlite.media.output import VideoSettings
    from ltxlite.media.video_writer import create_video

    target = Path(options.output)
    paths = [Path(clip) for clip in options.clips]
    if any(target.exists() and path.exists() and target.samefile(path) for path in paths):
        raise RequestError(f"{target}: would be written over one of its parts; choose another -o")
    if not 0 <= options.fade <= 10:
        raise RequestError(f"--fade {options.fade:g}: wanted 0 to 10 seconds")
    joint = open_joint(paths, options.overlap)
    sound = joined_sound(joint, Fraction(options.fade))
    width, height = joint.size[1] // 2 * 2, joint.size[0] // 2 * 2
    rate = None if sound is None else sound[1]
    settings = VideoSettings(width, height, joint.rate, rate, crf=options.crf)
    with (create_video if target.suffix else create_frames)(target, settings) as writer:
        if sound is not None:
            writer.write_audio(sound[0])
        for frame in joined_frames(joint):
            writer.write(frame)
    text = f"{target}  {width}x{height}, {joint.frames} frames at {joint.rate} fps"
    print_result(text, {"path": str(target), "frames": joint.frames}, options.json)
    return 0
