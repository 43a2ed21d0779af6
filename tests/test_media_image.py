"""Still pictures: what is loaded is what a viewer shows."""

import io
import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from PIL import Image, ImageCms
from torch import Tensor

from ltxlite.errors import MediaError
from ltxlite.media.image import fit_cover, load_image, save_png
from ltxlite.media.recompress import default_crf, recompress


def picture(height: int = 33, width: int = 47) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# EXIF 2.32, 4.6.5.1.6: where the stored first row and first column are to be shown.
ORIENTATIONS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_all_eight_exif_orientations_are_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture()).save(tmp_path / "x.png", exif=exif)
    shown = ORIENTATIONS[orientation](picture())
    assert np.array_equal(load_image(tmp_path / "x.png").numpy(), shown)


def test_saved_pictures_load_unchanged(tmp_path: Path) -> None:
    save_png(tmp_path / "x.png", torch.from_numpy(picture()))
    assert np.array_equal(load_image(tmp_path / "x.png").numpy(), picture())


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "x.png")
    # 65535 / 255 = 257; 32768 / 257 = 127.502, to the nearest.
    assert load_image(tmp_path / "x.png")[0, :, 1].tolist() == [0, 1, 128, 255]


def test_transparency_is_dropped_and_the_colour_under_it_kept(tmp_path: Path) -> None:
    Image.new("RGBA", (3, 5), (10, 200, 30, 0)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png")[4, 2].tolist() == [10, 200, 30]


def test_an_embedded_colour_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    Image.new("RGB", (3, 3), (255, 0, 0)).save(tmp_path / "x.png", icc_profile=swapped)
    # This profile says that the first channel is blue. 2 levels: 8-bit colour management.
    assert (load_image(tmp_path / "x.png")[0, 0] - torch.tensor([0, 0, 255])).abs().max() <= 2
    Image.new("RGB", (3, 3), (255, 0, 0)).save(tmp_path / "y.png", icc_profile=b"not a profile")
    assert load_image(tmp_path / "y.png")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_cut_off_pictures_are_an_error_in_one_line(tmp_path: Path, suffix: str) -> None:
    whole = io.BytesIO()
    Image.fromarray(picture()).save(whole, suffix)
    (tmp_path / "x").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(MediaError, match="damaged") as caught:
        load_image(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_missing_foreign_and_oversized_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        load_image(tmp_path / "absent.png")
    (tmp_path / "x.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(MediaError, match="no picture that Pillow knows"):
        load_image(tmp_path / "x.png")
    Image.new("1", (10_000, 9_000)).save(tmp_path / "bomb.png")
    with pytest.raises(MediaError, match="89 megapixels"):
        load_image(tmp_path / "bomb.png")


def bilinear(image: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """Resample by the textbook: output centres mapped to input, edges repeated."""
    for axis, length in enumerate(size):
        count = image.shape[axis]
        at = ((np.arange(length) + 0.5) * count / length - 0.5).clip(0, count - 1)
        low = np.floor(at).astype(int)
        weight = (at - low).reshape([-1 if d == axis else 1 for d in range(3)])
        high = np.minimum(low + 1, count - 1)
        image = image.take(low, axis) * (1 - weight) + image.take(high, axis) * weight
    return image


@pytest.mark.parametrize(("height", "width"), [(64, 96), (35, 96), (96, 33)])
def test_fit_cover_scales_to_cover_and_crops_the_middle(height: int, width: int) -> None:
    image = picture(37, 53)
    scale = max(height / 37, width / 53)
    size = (math.ceil(37 * scale), math.ceil(53 * scale))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    exact = bilinear(image.astype(np.float64), size)[top : top + height, left : left + width]
    fitted = fit_cover(torch.from_numpy(image), height, width)
    assert fitted.shape == (3, height, width)
    # fp32 sample positions up to 96 are off by 4e-6 pixels; neighbours differ by at most 2.
    assert np.abs(fitted.movedim(0, -1).numpy() - (exact / 127.5 - 1)).max() < 3e-5


def through_mp4(image: NDArray[np.uint8], crf: int) -> Tensor:
    """Encode and decode one frame the way the reference does: through a file."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=1, options={"crf": str(crf), "preset": "veryfast"}
        )
        stream.height, stream.width, stream.pix_fmt = image.shape[0], image.shape[1], "yuv420p"
        frame = VideoFrame.from_ndarray(image, format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with av.open(io.BytesIO(file.getvalue())) as container:
        return torch.from_numpy(next(container.decode(video=0)).to_ndarray(format="rgb24"))


@pytest.mark.parametrize("crf", [33, 18])
def test_recompression_equals_a_pass_through_an_mp4_at_even_size(crf: int) -> None:
    image = picture()
    expected = through_mp4(np.ascontiguousarray(image[:32, :46]), crf)
    assert torch.equal(recompress(torch.from_numpy(image), crf), expected)


def test_recompression_is_off_at_zero_and_for_slivers() -> None:
    image = torch.from_numpy(picture())
    assert recompress(image, 0) is image
    assert recompress(image[:1], 33).shape == (1, 47, 3)
    with pytest.raises(MediaError, match=r"0 .* to 51"):
        recompress(image, 52)


def test_stills_are_compressed_as_the_model_version_wants() -> None:
    versions = {"2.0.0": 33, "2.3.1": 33, "2.4": 18, "v2.5.0": 18, "10.0": 18, None: 33, "?": 33}
    assert {version: default_crf(version) for version in versions} == versions
