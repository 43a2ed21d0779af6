"""Pictures copied beside another sound, out of the containers that people have."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import pytest
import torch
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from clip_files import picture, tone
from torch import Tensor

from ltxlite.errors import MediaError
from ltxlite.media.remux import check_copy, replace_sound
from ltxlite.media.timing import read_timing
from ltxlite.media.video_reader import iter_frames, read_video, read_video_info

SOUND = (torch.from_numpy(tone(2, 0.5, 48_000)), 48_000)


def film(path: Path, codec: str, fps: Fraction, options: Mapping[str, str]) -> Path:
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=fps, options=dict(options)))
        stream.width, stream.height = 64, 48
        stream.pix_fmt = "yuv422p10le" if codec == "prores_ks" else "yuv420p"
        for number in range(12):
            frame = VideoFrame.from_ndarray(picture(number, 48, 64), format="rgb24")
            frame.pts, frame.time_base = number, 1 / fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def all_frames(path: Path) -> Tensor:
    return torch.stack(list(iter_frames(path)))


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("bframes.mp4", "libx264", {"bf": "3"}),
        ("film.mkv", "libx264", {"bf": "3"}),  # stores no decoding times
        ("stream.ts", "libx264", {}),  # does not begin at time 0
        ("old.avi", "mpeg4", {}),
        ("web.webm", "libvpx-vp9", {"cpu-used": "8"}),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_copied_pictures_are_the_same_and_the_sound_begins_with_them(
    tmp_path: Path, name: str, codec: str, options: dict[str, str], suffix: str
) -> None:
    fps = Fraction(24000, 1001) if name == "film.mkv" else Fraction(25)
    source = film(tmp_path / name, codec, fps, options)
    target = tmp_path / f"loud{suffix}"
    replace_sound(source, target, SOUND, {"comment": "rain"})
    assert torch.equal(all_frames(target), all_frames(source))
    before, after = read_timing(source), read_timing(target)
    assert all(
        abs(a - b) <= Fraction(1, 1000) for a, b in zip(before.starts, after.starts, strict=True)
    )
    info = read_video_info(target)
    assert info.sound_delay == 0
    tags = {name.lower(): value for name, value in info.metadata.items()}
    assert tags["comment"] == "rain"
    sound = read_video(target).waveform
    assert sound is not None
    # In time: AAC at 192 kbit/s is good to a few percent; a frame of it late, 1024 samples, the
    # difference would be as large as the tone, whose root mean square is 0.24.
    assert (sound[:, :8000] - SOUND[0][:, :8000]).square().mean().sqrt() < 0.03


def test_pictures_that_a_container_cannot_hold_are_refused_before_any_work(tmp_path: Path) -> None:
    source = film(tmp_path / "a.mov", "prores_ks", Fraction(24), {})
    with pytest.raises(MediaError, match=r"prores pictures cannot be copied.*\.mkv"):
        check_copy(source, tmp_path / "a.mp4")
    check_copy(source, tmp_path / "a.mkv")
    with pytest.raises(MediaError, match="change the suffix"):
        check_copy(source, tmp_path / "a.wmv")
