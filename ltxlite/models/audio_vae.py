"""The audio VAE: log-mel spectrograms to latents of 25 frames a second and back.

Both halves are stacks of 2-D residual blocks over (time, frequency) that never look ahead in time,
so that T mel frames become ceil(T / 4) latent frames and L latent frames become 4 L - 3 mel frames.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.models import mel
from ltxlite.models.settings import Settings

NORM_EPSILON = 1e-6  # the video VAE has 1e-8
MOST_LATENTS = 160  # decoded at once, 6.4 s: 80 MB in bf16


@dataclass(frozen=True, slots=True)
class AudioVAEConfig:
    """Hyper-parameters of the audio VAE; the defaults are those of LTX-2.0, 2.3 and 2.5.

    width: channels of the first level.  multipliers: channels of each level in units of it.
    blocks: residual blocks per encoder level; a decoder level has one more.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 2
    latent_channels: int = 8

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Read the `audio_vae` section of a checkpoint's configuration.

        Raises CheckpointError for values that are not implemented, such as attention in the middle.
        """
        parameters = settings.section("model").section("params")
        parameters.expect("sampling_rate", mel.SAMPLE_RATE)
        _check_preprocessing(settings.section("preprocessing"))
        network = parameters.section("ddconfig")
        _check_network(network)
        return cls(
            width=network.integer("ch", cls().width),
            multipliers=network.integers("ch_mult", cls().multipliers),
            blocks=network.integer("num_res_blocks", cls().blocks),
            latent_channels=network.integer("z_channels", cls().latent_channels),
        )

    def __post_init__(self) -> None:
        if not self.multipliers or mel.MEL_BINS % self.downscale:
            raise CheckpointError(
                f"audio_vae.ch_mult has {len(self.multipliers)} entries, wanted 1 to 7: "
                f"every level but the last halves {mel.MEL_BINS} mel bins"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of each level, outermost first."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def downscale(self) -> int:
        """Return how many mel frames, and mel bins, one latent frame and bin stand for."""
        return 1 << max(len(self.multipliers) - 1, 0)

    @property
    def reach(self) -> int:
        """Return how many latents before its own a decoded mel frame depends on, at most."""
        rows, rate = 2.0 + 2 * 4, 1  # the first convolution and the middle: 2 rows each back
        for level in reversed(range(len(self.multipliers))):
            rows += 4 * (self.blocks + 1) / rate
            if level:
                rate *= 2
                rows += 3 / rate  # the doubled rows and the convolution over them
        return math.ceil(rows + 2 / rate)

    @property
    def latent_bins(self) -> int:
        """Return the frequency bins of a latent frame."""
        return mel.MEL_BINS // self.downscale


def _check_preprocessing(settings: Settings) -> None:
    """Refuse a spectrogram other than the one `mel.log_mel` computes."""
    sound, transform, bands = map(settings.section, ("audio", "stft", "mel"))
    sound.expect("sampling_rate", mel.SAMPLE_RATE)
    sound.expect("stereo", True)
    sound.inert("max_wav_value", "causal_padding", "duration")
    transform.expect("filter_length", mel.WINDOW)
    transform.expect("win_length", mel.WINDOW)
    transform.expect("hop_length", mel.HOP)
    transform.inert("causal")  # the released code centres its frames whatever this says
    bands.expect("n_mel_channels", mel.MEL_BINS)
    bands.expect("mel_fmin", 0)
    bands.expect("mel_fmax", mel.TOP_FREQUENCY)


def _check_network(settings: Settings) -> None:
    """Refuse the variants of the network that no released checkpoint uses."""
    if settings.flag("mid_block_add_attention", True):
        raise CheckpointError(
            f"{settings.where}.mid_block_add_attention is true, or absent, which means true; "
            "ltxlite implements false: take the configuration of a released LTX-2 checkpoint"
        )
    settings.expect("attn_resolutions", [], None)
    settings.expect("norm_type", "pixel")
    settings.expect("causality_axis", "height")
    settings.expect("double_z", True)
    settings.expect("mel_bins", mel.MEL_BINS, None)
    settings.expect("in_channels", mel.CHANNELS)
    settings.expect("out_ch", mel.CHANNELS)
    settings.inert("resolution", "dropout", "downsample_time")


class PixelNorm(nn.Module):
    """Scale the channels at each place to a root mean square of one; no weights."""

    def forward(self, x: Tensor) -> Tensor:
        # Not torch.sqrt: in torch 2.13 the first parallel one of a process, through MKL, may be
        # good to 3e-4 only.
        root = ((x**2).mean(dim=1, keepdim=True) + NORM_EPSILON) ** 0.5
        return x / root


class CausalConv2d(nn.Module):
    """Convolve over (time, frequency), padding time only with the past."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel)
        side = kernel // 2
        self.padding = (side, side, kernel - 1, 0)  # frequency both sides, time before

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, self.padding))
        return out


class ResidualBlock(nn.Module):
    """Add two normalised, activated convolutions to the input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = PixelNorm()
        self.conv1 = CausalConv2d(inputs, outputs)
        self.conv2 = CausalConv2d(outputs, outputs)
        self.nin_shortcut = (
            CausalConv2d(inputs, outputs, kernel=1) if inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm(x)))
        hidden = self.conv2(F.silu(self.norm(hidden)))
        out: Tensor = self.nin_shortcut(x) + hidden
        return out


class Middle(nn.Module):
    """The two blocks at the coarsest scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width)
        self.block_2 = ResidualBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.block_1(x))
        return out


class Downsample(nn.Module):
    """Halve time (rounding up) and frequency with a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 2, 0)))
        return out


class Upsample(nn.Module):
    """Double frequency, and time from T to 2 T - 1: the first row has no past to come from."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv2d(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out[:, :, 1:]


class Level(nn.Module):
    """The residual blocks of one scale, then the step to the next scale if there is one."""

    def __init__(self, inputs: int, outputs: int, blocks: int, resample: nn.Module) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * blocks
        self.block = nn.ModuleList(itertools.starmap(ResidualBlock, itertools.pairwise(widths)))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        out: Tensor = self.resample(x)
        return out


class _LatentScale(nn.Module):
    """What encoder and decoder share: mean and standard deviation per latent channel and bin."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__()
        self.shape = (config.latent_channels, 1, config.latent_bins)
        entries = config.latent_channels * config.latent_bins
        self.register_buffer("latent_mean", torch.zeros(entries))
        self.register_buffer("latent_std", torch.ones(entries))

    def normalise(self, latent: Tensor) -> Tensor:
        return (latent - self.latent_mean.view(self.shape)) / self.latent_std.view(self.shape)

    def denormalise(self, latent: Tensor) -> Tensor:
        return latent * self.latent_std.view(self.shape) + self.latent_mean.view(self.shape)


class AudioEncoder(_LatentScale):
    """Encode log-mel spectrograms."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__(config)
        widths = config.widths
        self.latent_channels = config.latent_channels
        self.conv_in = CausalConv2d(mel.CHANNELS, widths[0])
        steps = [*map(Downsample, widths[:-1]), nn.Identity()]
        self.down = nn.ModuleList(
            Level(before, after, config.blocks, step)
            for before, after, step in zip((widths[0], *widths[:-1]), widths, steps, strict=True)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = PixelNorm()
        self.conv_out = CausalConv2d(widths[-1], 2 * config.latent_channels)  # mean, log-variance

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Encode a spectrogram into the normalised latent that the transformer works on.

        spectrogram: (B, 2, T, 64) log-mel in the dtype of the weights.
        Returns (B, C, ceil(T / 4), 16): the mean of the posterior, normalised per channel and bin.
        Raises ShapeError for another layout.
        Source: LTX-2 400fd31 audio_vae/audio_vae.py AudioEncoder.
        """
        _check_layout("AudioEncoder", spectrogram, (mel.CHANNELS, mel.MEL_BINS))
        x = self.conv_in(spectrogram)
        for level in self.down:
            x = level(x)
        moments = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return self.normalise(moments[:, : self.latent_channels])


class AudioDecoder(_LatentScale):
    """Decode audio latents."""

    def __init__(self, config: AudioVAEConfig) -> None:
        super().__init__(config)
        widths = config.widths
        self.conv_in = CausalConv2d(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1])
        steps = [nn.Identity(), *map(Upsample, widths[1:])]
        self.up = nn.ModuleList(
            Level(before, after, config.blocks + 1, step)
            for before, after, step in zip((*widths[1:], widths[-1]), widths, steps, strict=True)
        )
        self.norm_out = PixelNorm()
        self.conv_out = CausalConv2d(widths[0], mel.CHANNELS)
        self.downscale, self.reach = config.downscale, config.reach

    def forward(self, latent: Tensor) -> Tensor:
        """Decode a normalised latent into the log-mel spectrogram that the vocoder plays.

        latent: (B, C, L, 16) in the dtype of the weights.  Returns (B, 2, 4 L - 3, 64) log-mel.
        Long sound is decoded in parts that begin as early as what a frame depends on, so that the
        result is the same up to rounding and memory does not grow with the length.
        Raises ShapeError for another layout.
        Source: LTX-2 400fd31 audio_vae/audio_vae.py AudioDecoder.
        """
        _check_layout("AudioDecoder", latent, (self.shape[0], self.shape[2]))
        count = math.ceil(latent.shape[2] / MOST_LATENTS)
        if count == 1:
            return self._decode(latent)
        step = math.ceil(latent.shape[2] / count)
        return torch.cat(
            [self._part(latent, start, step) for start in range(0, latent.shape[2], step)], dim=2
        )

    def _part(self, latent: Tensor, start: int, step: int) -> Tensor:
        """Decode latents [start, start + step): latent i stands for mel frames 4 i - 3 to 4 i."""
        first = max(0, start - self.reach)
        spectrogram = self._decode(latent[:, :, first : start + step])
        begin = self.downscale * (start - 1) + 1 - self.downscale * first if start else 0
        return spectrogram[:, :, begin:].clone()

    def _decode(self, latent: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.denormalise(latent)))
        for level in reversed(self.up):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


def _check_layout(where: str, x: Tensor, wanted: tuple[int, int]) -> None:
    if x.ndim != 4 or (x.shape[1], x.shape[3]) != wanted or x.shape[2] == 0:
        raise ShapeError(
            f"{where}: got shape {tuple(x.shape)}, wanted (batch, {wanted[0]}, frames, {wanted[1]})"
        )


# Names as they stand after `audio_vae.encoder.` or `audio_vae.decoder.`, for the statistics
# `audio_vae.`, was stripped; each half owns a copy of the statistics, so that it loads alone.
RENAMES = (
    (r"\.(down|up)sample\.", ".resample."),
    (r"^per_channel_statistics\.mean-of-means$", "latent_mean"),
    (r"^per_channel_statistics\.std-of-means$", "latent_std"),
)
IGNORED = (
    # Statistics of the statistics, left over from training; no released code reads them.
    r"^per_channel_statistics\.(mean-of-stds|mean-of-stds_over_std-of-means|channel)$",
)
