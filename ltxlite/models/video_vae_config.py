"""Hyper-parameters of the video VAE: read from a checkpoint's `vae` section, or of a release."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Self

from ltxlite.errors import CheckpointError
from ltxlite.geometry import LatentGrid
from ltxlite.models.settings import Settings

COLOURS = 3
Padding = Literal["zeros", "reflect"]  # beyond the edges of a frame
Stride = tuple[int, int, int]  # frames, rows, columns

_SPACE, _TIME, _ALL = (1, 2, 2), (2, 1, 1), (2, 2, 2)
_STRIDES = (("compress_space", _SPACE), ("compress_time", _TIME), ("compress_all", _ALL))


@dataclass(frozen=True, slots=True)
class Block:
    """One entry of a block list: a run of residual blocks, or one change of resolution.

    layers: residual blocks in the run; 0 for a change of resolution.
    stride: how much finer the pixel side is in (frames, rows, columns).
    multiplier: channels of the latent side over channels of the pixel side.
    residual: the upsampler adds its rearranged input (LTX-2.0); downsamplers always do.
    """

    layers: int = 0
    stride: Stride = (1, 1, 1)
    multiplier: int = 1
    residual: bool = False


@dataclass(frozen=True, slots=True)
class VideoVAEConfig:
    """Hyper-parameters of the video VAE.

    Both block lists run from pixels to latents, as in the files; the decoder is built reversed.
    """

    encoder_blocks: tuple[Block, ...]
    decoder_blocks: tuple[Block, ...]
    latent_channels: int = 128
    patch: int = 4
    decoder_width: int = 128
    encoder_padding: Padding = "zeros"
    decoder_padding: Padding = "zeros"

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Read the `vae` section of a checkpoint's configuration.

        An absent padding mode means what the official loader makes of it: zeros in the encoder,
        reflect in the decoder; `decoder_spatial_padding_mode` is read by nobody.
        Raises CheckpointError for values that are not implemented.
        Source: LTX-2 400fd31 ltx_core/model/video_vae/model_configurator.py.
        """
        _check_network(settings)
        return cls(
            encoder_blocks=_read_blocks(settings, "encoder_blocks", "_res"),
            decoder_blocks=_read_blocks(settings, "decoder_blocks", ""),
            latent_channels=settings.integer("latent_channels", 128),
            patch=settings.integer("patch_size", 4),
            decoder_width=settings.integer("decoder_base_channels", 128),
            encoder_padding=_padding(
                settings, ("spatial_padding_mode", "encoder_spatial_padding_mode"), "zeros"
            ),
            decoder_padding=_padding(settings, ("spatial_padding_mode",), "reflect"),
        )

    @classmethod
    def released(cls, family: str) -> "VideoVAEConfig":
        """Return the configuration of a family ("2.0" or "2.3"), for files that bring none.

        2.5 ships its convolutional VAE in the shape of 2.3.  Raises CheckpointError for others.
        """
        if family not in RELEASED:
            raise CheckpointError(
                f"video VAE: no built-in configuration for family {family!r}, "
                f"only for {', '.join(RELEASED)}; use a file that carries its own"
            )
        return RELEASED[family]

    def __post_init__(self) -> None:
        encoder, decoder = _grid(self.encoder_blocks, 1), _grid(self.decoder_blocks, 1)
        if encoder != decoder:
            raise CheckpointError(
                f"vae: encoder_blocks shrink by {encoder.time} in time and {encoder.space} in "
                f"space, decoder_blocks grow by {decoder.time} and {decoder.space}; wanted the same"
            )

    @property
    def grid(self) -> LatentGrid:
        """Return the pixel frames and pixels that one latent stands for: 8 and 32."""
        return _grid(self.decoder_blocks, self.patch)

    @property
    def time_scale(self) -> int:
        """Return the pixel frames of a latent frame."""
        return self.grid.time

    @property
    def space_scale(self) -> int:
        """Return the pixel rows (and columns) of a latent."""
        return self.grid.space


def _grid(blocks: tuple[Block, ...], patch: int) -> LatentGrid:
    time, rows, _ = (math.prod(block.stride[axis] for block in blocks) for axis in range(3))
    return LatentGrid(time, patch * rows)


def _check_network(settings: Settings) -> None:
    """Refuse the variants of the network that no released convolutional VAE uses."""
    kind = settings.take("_class_name", "CausalVideoAutoencoder")
    if kind != "CausalVideoAutoencoder":
        raise CheckpointError(
            f"{settings.where}._class_name is {kind!r}, ltxlite implements the convolutional "
            "'CausalVideoAutoencoder'; for LTX-2.5 take the file with `conv` in its name"
        )
    settings.expect("dims", 3)
    settings.expect("in_channels", COLOURS)
    settings.expect("out_channels", COLOURS)
    settings.expect("norm_layer", "pixel_norm")
    settings.expect("latent_log_var", "uniform", "constant")  # one more channel, which is dropped
    settings.expect("causal_decoder", False)
    settings.expect("timestep_conditioning", False)
    # The official encoder starts as wide as the latent, whatever encoder_base_channels says.
    settings.inert("encoder_base_channels", "decoder_spatial_padding_mode")
    settings.inert("scaling_factor", "normalize_latent_channels", "use_quant_conv")


def _padding(settings: Settings, keys: tuple[str, ...], default: Padding) -> Padding:
    """Return the first padding mode given; all keys count as read."""
    for key in keys:
        settings.expect(key, "zeros", "reflect")
    mode: Padding = next((settings.take(key) for key in keys if settings.has(key)), default)
    return mode


def _read_blocks(settings: Settings, key: str, suffix: str) -> tuple[Block, ...]:
    entries = settings.take(key)
    if not isinstance(entries, (list, tuple)) or not entries:
        raise CheckpointError(f"{settings.where}.{key} is {entries!r}, wanted a list of blocks")
    where = f"{settings.where}.{key}"
    return tuple(_read_block(item, suffix, f"{where}[{i}]") for i, item in enumerate(entries))


def _read_block(entry: Any, suffix: str, where: str) -> Block:
    """Read ["res_x", {"num_layers": 4}] or ["compress_all", {"multiplier": 2}]."""
    match entry:
        case [str() as name, int() as layers]:
            settings = Settings({"num_layers": layers}, where)
        case [str() as name, Mapping() as values]:
            settings = Settings(values, where)
        case _:
            raise CheckpointError(f"{where} is {entry!r}, wanted [name, {{settings}}]")
    strides = {stem + suffix: stride for stem, stride in _STRIDES}
    if name == "res_x":
        settings.expect("inject_noise", False)
        block = Block(layers=settings.integer("num_layers"))
    elif name in strides:
        block = _read_resampler(settings, strides[name], default=2 if suffix else 1)
    else:
        known = ", ".join(["res_x", *strides])
        raise CheckpointError(f"{where} is a {name!r} block, ltxlite implements {known}")
    if settings.unread():
        raise CheckpointError(f"{where} ({name}) has unknown settings {settings.unread()}")
    return block


def _read_resampler(settings: Settings, stride: Stride, default: int) -> Block:
    if stride != _ALL:
        settings.expect("residual", False)  # the official decoder reads it for compress_all only
    return Block(
        stride=stride,
        multiplier=settings.integer("multiplier", default),
        residual=settings.flag("residual", False),
    )


# Blocks from pixels to latents. Only a file without any configuration needs these, and padding
# cannot be seen in its tensors: a wrong choice spoils the borders of every picture.
RELEASED = MappingProxyType(
    {
        "2.0": VideoVAEConfig(
            encoder_blocks=(
                Block(layers=4),
                Block(stride=_SPACE, multiplier=2),
                Block(layers=6),
                Block(stride=_TIME, multiplier=2),
                Block(layers=6),
                Block(stride=_ALL, multiplier=2),
                Block(layers=2),
                Block(stride=_ALL, multiplier=2),
                Block(layers=2),
            ),
            decoder_blocks=(
                Block(layers=5),
                Block(stride=_ALL, multiplier=2, residual=True),
                Block(layers=5),
                Block(stride=_ALL, multiplier=2, residual=True),
                Block(layers=5),
                Block(stride=_ALL, multiplier=2, residual=True),
                Block(layers=5),
            ),
            decoder_padding="reflect",
        ),
        "2.3": VideoVAEConfig(
            encoder_blocks=(
                Block(layers=4),
                Block(stride=_SPACE, multiplier=2),
                Block(layers=6),
                Block(stride=_TIME, multiplier=2),
                Block(layers=4),
                Block(stride=_ALL, multiplier=2),
                Block(layers=2),
                Block(stride=_ALL, multiplier=1),
                Block(layers=2),
            ),
            decoder_blocks=(
                Block(layers=4),
                Block(stride=_SPACE, multiplier=2),
                Block(layers=6),
                Block(stride=_TIME, multiplier=2),
                Block(layers=4),
                Block(stride=_ALL, multiplier=1),
                Block(layers=2),
                Block(stride=_ALL, multiplier=2),
                Block(layers=2),
            ),
        ),
    }
)
