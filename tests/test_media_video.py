"""Clips: real encodes, read back."""

import dataclasses
import json
import os
import struct
import threading
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from torch import Tensor

from ltxlite.errors import MediaError
from ltxlite.media import video_writer
from ltxlite.media.container import read_metadata
from ltxlite.media.frame_writer import create_frames
from ltxlite.media.image import load_image
from ltxlite.media.output import VideoSettings
from ltxlite.media.video_reader import iter_frames, read_video, read_video_info
from ltxlite.media.video_writer import create_video

NTSC = Fraction(24_000, 1001)
SETTINGS = VideoSettings(width=46, height=34, fps=NTSC)
AAC_PEAK_SAMPLES = 32  # a click keeps its place within this many samples through AAC


def ramp(height: int, width: int) -> Tensor:
    """A (3, H, W) picture in [-0.8, 0.8], linear in both directions."""
    down = torch.linspace(-0.8, 0.8, height)[:, None].expand(height, width)
    across = torch.linspace(-0.8, 0.8, width).expand(height, width)
    return torch.stack([down, across, -down])


def write(path: Path, frames: Tensor, settings: VideoSettings = SETTINGS) -> None:
    with create_video(path, settings) as clip:
        for chunk in frames.split(5):
            clip.write(chunk)


@pytest.mark.parametrize("fps", [NTSC, Fraction(24), Fraction(30_000, 1001), Fraction(25, 2)])
def test_frames_size_and_exact_rate_survive(tmp_path: Path, fps: Fraction) -> None:
    path = tmp_path / "clip.mp4"
    write(path, torch.zeros(13, 3, 34, 46), dataclasses.replace(SETTINGS, fps=fps))
    info = read_video_info(path)
    assert (info.width, info.height, info.frames, info.fps) == (46, 34, 13, fps)
    assert len(list(iter_frames(path))) == 13
    with av.open(str(path)) as container:
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert {after - before for before, after in pairwise(times)} == {1 / fps}
    assert list(tmp_path.iterdir()) == [path]


def test_colour_is_tagged_as_limited_range_bt709_and_the_index_stands_in_front(
    tmp_path: Path,
) -> None:
    path = tmp_path / "clip.mp4"
    write(path, torch.zeros(2, 3, 34, 46))
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc)
        assert (context.color_range, *tags, context.pix_fmt) == (1, 1, 1, 1, "yuv420p")
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_a_gradient_comes_back_within_the_rounding_of_its_planes(tmp_path: Path) -> None:
    path, picture = tmp_path / "clip.mp4", ramp(64, 96)
    lossless = VideoSettings(width=96, height=64, fps=Fraction(24), crf=0)
    write(path, picture[None], lossless)
    shown = read_video(path).frames[0].movedim(-1, 0).float()
    # Half a code of luma is 255/219/2 levels; of chroma 255/224/2, times the weight with which it
    # enters red, green and blue; half a level of final rounding; 0.1 for swscale's fixed point.
    bound = 255 / 219 / 2 + 255 / 224 / 2 * torch.tensor([1.5748, 0.6554, 1.8556]) + 0.6
    error = (shown - (picture + 1) * 127.5)[:, 4:-4, 4:-4]  # chroma is not linear at the border
    assert (error.abs().amax((1, 2)) <= bound).all()
    # Chroma sited half a pixel off would shift red by 1, truncation everything by half a level.
    assert error.mean((1, 2)).abs().max() < 0.2


@pytest.mark.parametrize("sound_first", [True, False])
def test_sound_is_in_time_and_exactly_as_long_as_the_picture(
    tmp_path: Path, sound_first: bool
) -> None:
    path, rate, count, event = tmp_path / "clip.mp4", 44_100, 61, 29
    settings = dataclasses.replace(SETTINGS, audio_rate=rate)
    frames = torch.full((count, 3, 34, 46), -0.9)
    frames[event] = 0.9
    click = round(event / NTSC * rate)
    waveform = torch.zeros(1, click + 3000)  # mono, and shorter than the picture
    waveform[:, click : click + 4] = 0.9
    with create_video(path, settings) as clip:
        if sound_first:
            clip.write_audio(waveform[:, :5000])
            clip.write_audio(waveform[:, 5000:])
        for chunk in frames.split(8):
            clip.write(chunk)
        if not sound_first:
            clip.write_audio(waveform)
    shown = read_video(path)
    assert shown.audio_rate == rate and shown.waveform is not None
    assert shown.waveform.shape == (2, round(count / NTSC * rate))
    assert shown.frames.float().mean((1, 2, 3)).argmax() == event
    heard = shown.waveform.abs().argmax(dim=1)
    assert (heard - click).abs().max() <= AAC_PEAK_SAMPLES
    with av.open(str(path)) as container:
        sound = container.streams.audio[0]
        assert sound.duration is not None and sound.time_base is not None
        assert abs(sound.duration * sound.time_base - count / NTSC) < 1 / NTSC


def test_longer_sound_is_cut_and_a_part_of_a_clip_has_its_part_of_the_sound(tmp_path: Path) -> None:
    path, rate = tmp_path / "clip.mp4", 24_000
    settings = dataclasses.replace(SETTINGS, fps=Fraction(24), audio_rate=rate)
    waveform = torch.zeros(2, 5 * rate)
    waveform[:, 11_000:11_004] = 0.9  # within frame 11, which begins at sample 11000
    with create_video(path, settings) as clip:
        clip.write(torch.zeros(24, 3, 34, 46))
        clip.write_audio(waveform)
    assert read_video(path).waveform.shape == (2, rate)  # type: ignore[union-attr]
    part = read_video(path, start=11, end=13)
    assert part.frames.shape == (2, 34, 46, 3) and part.waveform is not None
    assert part.waveform.shape == (2, 2000)
    peak = part.waveform.abs().max(dim=1)
    assert peak.values.min() > 0.3  # a click of 4 samples loses its top, not its place
    assert peak.indices.max() <= AAC_PEAK_SAMPLES


def test_a_long_job_survives_in_the_metadata(tmp_path: Path) -> None:
    job = json.dumps({"prompt": 'Gewitter über "Köln" 雷\n' * 800, "seed": 7}, ensure_ascii=False)
    assert len(job.encode()) > 20_000
    tags = {"ltxlite_job": job, "comment": "made by a test"}
    write(
        tmp_path / "clip.mp4",
        torch.zeros(1, 3, 34, 46),
        dataclasses.replace(SETTINGS, metadata=tags),
    )
    assert read_metadata(tmp_path / "clip.mp4").items() >= tags.items()


def test_larger_frames_are_cropped_around_the_middle(tmp_path: Path) -> None:
    frames = torch.full((1, 3, 42, 46), 0.9)
    frames[:, :, 4:38] = -0.9
    write(tmp_path / "clip.mp4", frames)
    # crf 19 on a flat picture; the bright border would be 242.
    assert read_video(tmp_path / "clip.mp4").frames.max() < 20


def test_frames_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    wrong = [
        (torch.zeros(3, 34, 46), r"wanted \(F, 3, H, W\)"),
        (torch.zeros(1, 3, 32, 46), "46x32 for a clip of 46x34"),
        (torch.zeros(1, 3, 34 + 64, 46), "46x98 for a clip of 46x34"),
        (torch.full((1, 3, 34, 46), torch.nan), "NaN"),
    ]
    for frames, message in wrong:
        with pytest.raises(MediaError, match=message):
            write(tmp_path / "clip.mp4", frames)
    assert not list(tmp_path.iterdir())


def test_settings_that_mp4_cannot_hold_are_refused() -> None:
    for change, message in [
        ({"width": 45}, "choose 44x34"),
        ({"height": 0}, "must be even"),
        ({"fps": Fraction(0)}, "wanted a plain fraction"),
        ({"fps": Fraction(23.976)}, "24000/1001"),
        ({"crf": 52}, "CRF 52"),
    ]:
        with pytest.raises(MediaError, match=message):
            dataclasses.replace(SETTINGS, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codec": "nonesuch"}, "no encoder 'nonesuch'"),
        ({"preset": "nonesuch"}, "check codec, preset and audio rate"),
        ({"audio_rate": 12_345}, "check codec, preset and audio rate"),
    ],
)
def test_encoders_that_will_not_start_are_an_error_before_the_first_frame(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    settings = dataclasses.replace(SETTINGS, **change)  # type: ignore[arg-type]
    with pytest.raises(MediaError, match=message), create_video(tmp_path / "clip.mp4", settings):
        pytest.fail("the block must not begin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_clip_leaves_no_file(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), create_video(tmp_path / "clip.mp4", SETTINGS) as clip:
        clip.write(torch.zeros(3, 3, 34, 46))
        raise error
    assert not list(tmp_path.iterdir())


def test_an_error_on_the_encoding_thread_reaches_the_caller_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BrokenFrame:
        @staticmethod
        def from_ndarray(*_: object, **__: object) -> None:
            raise MediaError(f"broke on {threading.current_thread().name}")

    monkeypatch.setattr(video_writer, "VideoFrame", BrokenFrame)
    with pytest.raises(MediaError, match="broke on ltxlite-media"):
        write(tmp_path / "clip.mp4", torch.zeros(20, 3, 34, 46))
    assert not list(tmp_path.iterdir())


def test_clips_without_frames_or_without_their_sound_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no frame was written"):
        write(tmp_path / "clip.mp4", torch.zeros(0, 3, 34, 46))
    announced = dataclasses.replace(SETTINGS, audio_rate=48_000)
    with pytest.raises(MediaError, match="no sound was written"):
        write(tmp_path / "clip.mp4", torch.zeros(1, 3, 34, 46), announced)
    frames = create_frames(tmp_path / "clip", announced)
    with pytest.raises(MediaError, match="no sound was written"), frames as folder:
        folder.write(torch.zeros(1, 3, 34, 46))
    broken = create_video(tmp_path / "clip.mp4", announced)
    with pytest.raises(MediaError, match="sound holds NaN"), broken as clip:
        clip.write_audio(torch.full((2, 100), torch.nan))
    silent = create_video(tmp_path / "clip.mp4", SETTINGS)
    with pytest.raises(MediaError, match="no audio_rate"), silent as clip:
        clip.write_audio(torch.zeros(2, 100))
    with pytest.raises(MediaError, match="change the suffix"):
        write(tmp_path / "clip.webm", torch.zeros(1, 3, 34, 46))
    assert not list(tmp_path.iterdir())


def test_names_that_look_like_protocols_are_file_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = Path("späte Fahrt %03d 雷.mp4" if os.name == "nt" else "pipe:späte Fahrt %03d 雷.mp4")
    write(name, torch.zeros(1, 3, 34, 46))
    assert [str(file) for file in Path().iterdir()] == [str(name)]
    assert read_video(name).frames.shape == (1, 34, 46, 3)


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MediaError, match="cannot be written here"):
        write(tmp_path / "file" / "clip.mp4", torch.zeros(1, 3, 34, 46))


def test_damaged_and_foreign_clips_are_an_error_in_one_line(tmp_path: Path) -> None:
    noise = torch.rand(12, 3, 34, 46, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write(tmp_path / "whole.mp4", noise)
    content = (tmp_path / "whole.mp4").read_bytes()
    broken = tmp_path / "broken.mp4"
    for share in (0.01, 0.5, 0.99):
        broken.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(MediaError, match=r"broken\.mp4") as caught:
            read_video(broken)
        assert "\n" not in str(caught.value)
    broken.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for path in (broken, tmp_path / "absent.mp4"):
        with pytest.raises(MediaError, match=r"no video or sound file|no such file"):
            read_metadata(path)
    with pytest.raises(MediaError, match="no frame from number 12 on"):
        read_video(tmp_path / "whole.mp4", start=12)


def test_a_clip_filmed_upright_is_read_upright(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write(path, ramp(34, 46)[None], dataclasses.replace(SETTINGS, crf=1))
    stored = read_video(path).frames[0]
    content = bytearray(path.read_bytes())
    # ISO 14496-12, 8.3.2: x' = a x + c y + tx, y' = b x + d y. (0, 1, -1, 0) turns clockwise.
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 34 << 16, 0, 1 << 30)
    at = content.index(identity, content.index(b"tkhd"))
    content[at : at + len(identity)] = clockwise
    path.write_bytes(content)
    # The first row becomes the last column.
    assert torch.equal(read_video(path).frames[0], stored.flip(0).transpose(0, 1))


def encode_grey(path: Path, codec: str, pixel_format: str, colour_range: int, code: int) -> None:
    shape = (34, 46, 3) if "rgb" in pixel_format else (51, 46)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options={"crf": "0", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 46, 34, pixel_format
        stream.codec_context.color_range = colour_range
        planes = np.full(shape, 128, dtype=np.uint8)
        planes[:34] = code
        frame = VideoFrame.from_ndarray(planes, format=pixel_format)
        container.mux([*stream.encode(frame), *stream.encode(None)])


@pytest.mark.parametrize(
    ("codec", "pixel_format", "colour_range", "level"),
    [  # code 60: (60 - 16) / 219 * 255 = 51.2 in limited range; full range and RGB say 60 itself
        ("libx264", "yuv420p", 0, 51),
        ("libx264", "yuv420p", 1, 51),
        ("libx264", "yuv420p", 2, 60),
        ("libx264rgb", "rgb24", 0, 60),
    ],
)
def test_colour_range_tags_are_obeyed(
    tmp_path: Path, codec: str, pixel_format: str, colour_range: int, level: int
) -> None:
    encode_grey(tmp_path / "clip.mkv", codec, pixel_format, colour_range, code=60)
    assert read_video(tmp_path / "clip.mkv").frames.unique().tolist() == [level]


@pytest.mark.parametrize("height", [34, 578])
def test_untagged_colour_is_read_as_bt601_only_in_standard_definition(
    tmp_path: Path, height: int
) -> None:
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 46, height, "yuv420p"
        planes = np.full((height * 3 // 2, 46), 128, dtype=np.uint8)
        planes[height * 5 // 4 :] = 160  # red chroma
        frame = VideoFrame.from_ndarray(planes, format="yuv420p")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    weight = 1.402 if height == 34 else 1.5748  # of red chroma in red, BT.601 and BT.709
    expected = ((128 - 16) / 219 + weight * (160 - 128) / 224) * 255
    red = read_video(tmp_path / "clip.mkv").frames[0, height // 2, 20, 0]
    assert abs(float(red) - expected) < 2  # crf 23 on a flat picture; the other matrix is 6 off


def test_a_clip_can_be_written_as_png_frames_and_wav(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, fps=Fraction(24), audio_rate=24_000)
    values = torch.randint(0, 256, (3, 36, 46, 3), generator=torch.Generator().manual_seed(0))
    pixels = (values.float() / 127.5 - 1).movedim(-1, 1)
    with create_frames(tmp_path / "clip", settings) as clip:
        clip.write(pixels[:2])
        clip.write(pixels[2:])
        clip.write_audio(torch.zeros(1, 100))
    names = ["audio.wav", "frame_00001.png", "frame_00002.png", "frame_00003.png"]
    assert sorted(file.name for file in (tmp_path / "clip").iterdir()) == names
    for number, name in enumerate(names[1:]):
        assert torch.equal(load_image(tmp_path / "clip" / name), values[number, 1:35].byte())
    assert (tmp_path / "clip" / "audio.wav").stat().st_size == 44 + 3000 * 4


def test_interrupted_frames_leave_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), create_frames(tmp_path / "clip", SETTINGS) as clip:
        clip.write(torch.zeros(3, 3, 34, 46))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
