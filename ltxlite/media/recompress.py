"""Makes a still look like a frame of a compressed clip, as in training."""

import re
from fractions import Fraction

import av
import torch
from av.error import FFmpegError
from av.video.frame import VideoFrame
from torch import Tensor

from ltxlite.errors import MediaError


def default_crf(model_version: str | None) -> int:
    """Return the compression that a model's stills were trained with: 33, from 2.4 on 18.

    An absent or unreadable version counts as an older one.  Source: LTX-2 400fd31.
    """
    found = re.match(r"\D*(\d+)\.(\d+)", model_version or "")
    return 18 if found and (int(found[1]), int(found[2])) >= (2, 4) else 33


def recompress(image: Tensor, crf: int) -> Tensor:
    """Pass a still through one H.264 frame: a model holds a too clean one frozen.

    image: (H, W, 3) uint8, at its own size, before any resizing.
    Returns it cropped to even sides; unchanged if `crf` is 0 or a side is below 2 pixels.
    Raises MediaError if H.264 cannot be encoded here, or for a CRF outside 0 to 51.
    Source: LTX-2 400fd31 (libx264 veryfast, yuv420p, FFmpeg's default matrix both ways).
    """
    if not 0 <= crf <= 51:
        raise MediaError(f"image CRF {crf}: H.264 knows 0 (here: off) to 51; 33 suits LTX-2.3")
    if crf == 0 or min(image.shape[:2]) < 2:
        return image
    height, width = (side // 2 * 2 for side in image.shape[:2])
    even = image[:height, :width].contiguous().cpu().numpy()
    try:
        decoded = _through_h264(VideoFrame.from_ndarray(even, format="rgb24"), crf)
    except FFmpegError as error:
        raise MediaError(
            f"still of {width}x{height}: cannot be re-compressed ({error.strerror or error}); "
            "set the image CRF to 0 to use it as it is"
        ) from error
    return torch.from_numpy(decoded.to_ndarray(format="rgb24"))


def _through_h264(frame: VideoFrame, crf: int) -> VideoFrame:
    """Encode and decode one RGB frame in memory."""
    if "libx264" not in av.codecs_available:
        raise MediaError(
            "stills are re-compressed with libx264, which this build of PyAV lacks; install "
            "PyAV's own wheel (pip install --force-reinstall av) or set the image CRF to 0"
        )
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, "yuv420p"
    encoder.time_base = Fraction(1, 1)
    encoder.options = {"crf": str(crf), "preset": "veryfast"}
    frame.pts = 0
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    decoder = av.CodecContext.create("h264", "r")
    frames = [decoded for packet in packets for decoded in decoder.decode(packet)]
    return (frames + decoder.decode(None))[0]
