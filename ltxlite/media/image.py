"""Still pictures: files to uint8 tensors and back, and to a network's input pixels."""

import io
import math
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from ltxlite.errors import MediaError

# What Pillow's decoders raise on damaged files.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


def load_image(path: Path) -> Tensor:
    """Load a picture as the viewer shows it: (H, W, 3) uint8, sRGB.

    All eight EXIF orientations are applied; an embedded colour profile is converted to sRGB (an
    unusable one counts as absent, as in browsers); 16-bit grey is scaled to 8 bits. Transparency
    is dropped, not composited: the colour stored under it is what counts, as in the official
    code. Of an animation the first frame is taken.
    Raises MediaError if the file is missing, damaged, no picture, or above 89 megapixels
    (Pillow's limit, against files made to fill the memory).
    Source: LTX-2 400fd31 handles orientations 3, 6 and 8 only.
    """
    if not path.is_file():
        raise MediaError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF and the like: the pixels still count
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _to_tensor(_to_rgb(ImageOps.exif_transpose(image)))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: has more than 89 megapixels; scale it down first") from error
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: is no picture that Pillow knows; convert it to PNG") from error
    except _DAMAGED as error:
        raise MediaError(f"{path}: the picture is damaged or cut off ({error})") from error


def save_png(path: Path, rgb: Tensor) -> None:
    """Save a (H, W, 3) uint8 tensor as an 8-bit RGB PNG."""
    # Level 3 writes a 1080p frame more than twice as fast as level 6, for a few percent in size.
    Image.fromarray(rgb.cpu().numpy()).save(path, format="PNG", compress_level=3)


def fit_cover(image: Tensor, height: int, width: int) -> Tensor:
    """Scale a picture until it covers (height, width), crop the middle, map to [-1, 1].

    image: (H, W, 3) uint8.  Returns (3, height, width) fp32.
    Bilinear without antialiasing, sizes rounded up, offsets rounded down.
    Source: LTX-2 400fd31.
    """
    source_height, source_width = image.shape[:2]
    scale = max(height / source_height, width / source_width)
    # In floating point, as the reference has it: now and then one row more than needed.
    size = (math.ceil(source_height * scale), math.ceil(source_width * scale))
    planes = image.movedim(-1, 0).unsqueeze(0).float()
    scaled = F.interpolate(planes, size=size, mode="bilinear", align_corners=False)
    return centre_crop(scaled[0], height, width) / 127.5 - 1.0


def centre_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """Cut the middle (height, width) out of (..., H, W), offsets rounded down; a view."""
    top = (pixels.shape[-2] - height) // 2
    left = (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        grey = np.asarray(image, dtype=np.int64).clip(0, 65535)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "RGBA", "CMYK", "L"):
        image = _to_srgb(image, profile)
    return image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    if image.mode == "RGBA":
        image = image.convert("RGB")  # profiles speak of colour only
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image
    return image if converted is None else converted


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8))
