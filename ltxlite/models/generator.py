"""The generator inside every LTX vocoder: a stereo log-mel spectrogram becomes a waveform.

LTX-2.0 has HiFi-GAN's: leaky rectifiers, a tanh at the end.  LTX-2.3 has one of the same plan with
periodic activations that are kept from aliasing.  Both always run in fp32: in bf16 the spectra are
40 to 90 % off.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.models import mel
from ltxlite.models.settings import Settings

INPUT_CHANNELS = mel.CHANNELS * mel.MEL_BINS
EDGE_KERNEL = 7  # of the first and the last convolution
FILTER_TAPS = 12  # of the anti-aliasing low-pass
SNAKE_EPSILON = 1e-9
INNER_SLOPE = 0.1  # of the leaky rectifiers of 2.0
FINAL_SLOPE = 0.01  # of the last one
# Spectrogram frames played at once: 6.4 s of the 2.3 core, whose parts overlap by 0.9 s, and 3.2 s
# of its extension; each holds 0.1 GB. Longer parts gain nothing, shorter ones compute more twice.
MOST_FRAMES = 640


@dataclass(frozen=True, slots=True)
class GeneratorConfig:
    """Hyper-parameters of one generator; the defaults are those of the 2.0 vocoder.

    width: channels before the first upsampling, halved by each.
    rates, kernels: of the upsamplings.
    block_kernels, block_dilations: of the residual blocks that follow each one.
    snake: anti-aliased SnakeBeta activations and 2.3 names, otherwise leaky rectifiers.
    bound: what limits the waveform: "tanh", "clamp" or "none".
    """

    width: int = 1024
    rates: tuple[int, ...] = (6, 5, 2, 2, 2)
    kernels: tuple[int, ...] = (16, 15, 8, 4, 4)
    block_kernels: tuple[int, ...] = (3, 7, 11)
    block_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    snake: bool = False
    final_bias: bool = True
    bound: str = "tanh"

    @classmethod
    def from_settings(cls, settings: Settings, bounded: bool = True) -> Self:
        """Read one generator's section; absent keys mean the 2.0 values, as in the released code.

        bounded: whether anything limits the waveform at all.
        Raises CheckpointError for values that are not implemented.
        """
        default = cls()
        snake = _is_snake(settings)
        settings.expect("stereo", True)
        tanh = settings.flag("use_tanh_at_final", True)
        return cls(
            width=settings.integer("upsample_initial_channel", default.width),
            rates=settings.integers("upsample_rates", default.rates),
            kernels=settings.integers("upsample_kernel_sizes", default.kernels),
            block_kernels=settings.integers("resblock_kernel_sizes", default.block_kernels),
            block_dilations=_dilations(settings, default.block_dilations),
            snake=snake,
            final_bias=settings.flag("use_bias_at_final", True),
            bound=("tanh" if tanh else "clamp") if bounded else "none",
        )

    def __post_init__(self) -> None:
        if len(self.rates) != len(self.kernels) or not self.rates:
            raise CheckpointError(
                f"vocoder: {len(self.rates)} upsample_rates but {len(self.kernels)} "
                "upsample_kernel_sizes, wanted one kernel per rate"
            )
        for rate, kernel in zip(self.rates, self.kernels, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise CheckpointError(
                    f"vocoder: upsampling by {rate} with kernel {kernel} does not give {rate} "
                    "samples a frame; wanted a kernel larger by an even number"
                )
        if len(self.block_kernels) != len(self.block_dilations) or not self.block_kernels:
            raise CheckpointError(
                f"vocoder: {len(self.block_kernels)} resblock_kernel_sizes but "
                f"{len(self.block_dilations)} resblock_dilation_sizes, wanted as many"
            )
        if any(kernel % 2 == 0 for kernel in self.block_kernels):
            raise CheckpointError(
                f"vocoder: resblock_kernel_sizes {self.block_kernels} must be odd"
            )

    @property
    def hop(self) -> int:
        """Return the samples played per mel frame."""
        return math.prod(self.rates)

    @property
    def reach(self) -> int:
        """Return how many spectrogram frames to each side a sample depends on, at most."""
        edge = EDGE_KERNEL // 2
        act = FILTER_TAPS // 2 if self.snake else 0  # both filters together, at the outer rate
        frames, rate = float(edge), 1
        widest = max(
            sum((kernel - 1) // 2 * (dilation + 1) + 2 * act for dilation in dilations)
            for kernel, dilations in zip(self.block_kernels, self.block_dilations, strict=True)
        )
        for step, kernel in zip(self.rates, self.kernels, strict=True):
            frames += (kernel / step + 1) / rate
            rate *= step
            frames += widest / rate
        return math.ceil(frames + (act + edge) / rate)

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels before the first upsampling and after each."""
        return tuple(self.width >> stage for stage in range(len(self.rates) + 1))


def _is_snake(settings: Settings) -> bool:
    """Tell the 2.3 residual blocks from the 2.0 ones."""
    settings.expect("resblock", "1", "AMP1")
    snake: bool = settings.take("resblock", "1") == "AMP1"
    if snake and settings.take("activation", "snake") != "snakebeta":
        raise CheckpointError(
            f"{settings.where}.activation is {settings.take('activation', 'snake')!r}, "
            "ltxlite implements 'snakebeta'"
        )
    settings.inert("activation")
    return snake


def _dilations(
    settings: Settings, default: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], ...]:
    """Read the list of lists `resblock_dilation_sizes`."""
    key = "resblock_dilation_sizes"
    rows = settings.take(key, default)
    if not isinstance(rows, (list, tuple)):
        raise CheckpointError(f"{settings.where}.{key} is {rows!r}, wanted a list of lists")
    table: Mapping[str, object] = {str(index): row for index, row in enumerate(rows)}
    reader = Settings(table, f"{settings.where}.{key}")
    return tuple(reader.integers(index) for index in table)


class AntiAliasedSnake(nn.Module):
    """Apply x + sin²(αx)/β at twice the rate, so that the new harmonics do not fold back.

    Filters come from the file: recomputed ones change the waveform by 2 to 3 %.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))  # logarithms of what the formula names
        self.beta = nn.Parameter(torch.zeros(width))
        self.up_filter = nn.Parameter(torch.zeros(1, 1, FILTER_TAPS))
        self.down_filter = nn.Parameter(torch.zeros(1, 1, FILTER_TAPS))

    def forward(self, x: Tensor) -> Tensor:
        return self._halve(self._bend(self._double(x)))

    def _double(self, x: Tensor) -> Tensor:
        reach = FILTER_TAPS // 2 - 1
        crop = 2 * reach + FILTER_TAPS // 2 - 1
        padded = F.pad(x, (reach, reach), mode="replicate")
        kernel = self.up_filter.expand(x.shape[1], -1, -1)
        return 2 * F.conv_transpose1d(padded, kernel, stride=2, groups=x.shape[1])[..., crop:-crop]

    def _bend(self, x: Tensor) -> Tensor:
        frequency, inverse = self.alpha.exp()[:, None], 1.0 / (self.beta.exp() + SNAKE_EPSILON)
        return x + inverse[:, None] * torch.sin(x * frequency) ** 2

    def _halve(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (FILTER_TAPS // 2 - 1, FILTER_TAPS // 2), mode="replicate")
        kernel = self.down_filter.expand(x.shape[1], -1, -1)
        return F.conv1d(padded, kernel, stride=2, groups=x.shape[1])


class ResidualBlock(nn.Module):
    """Add, one dilation after another, two activated convolutions of the running sum to it."""

    def __init__(self, width: int, kernel: int, dilations: tuple[int, ...], snake: bool) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_same_conv(width, kernel, step) for step in dilations)
        self.convs2 = nn.ModuleList(_same_conv(width, kernel, 1) for _ in dilations)
        self.acts1 = nn.ModuleList(_activation(width, snake) for _ in dilations)
        self.acts2 = nn.ModuleList(_activation(width, snake) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for act1, conv1, act2, conv2 in zip(
            self.acts1, self.convs1, self.acts2, self.convs2, strict=True
        ):
            x = x + conv2(act2(conv1(act1(x))))
        return x


def _same_conv(width: int, kernel: int, dilation: int) -> nn.Conv1d:
    padding = (kernel - 1) * dilation // 2
    return nn.Conv1d(width, width, kernel, dilation=dilation, padding=padding)


def _activation(width: int, snake: bool, slope: float = INNER_SLOPE) -> nn.Module:
    return AntiAliasedSnake(width) if snake else nn.LeakyReLU(slope)


class Generator(nn.Module):
    """Play a stereo spectrogram: upsample step by step, refining the waveform after each step."""

    def __init__(self, config: GeneratorConfig, sample_rate: int) -> None:
        super().__init__()
        self.sample_rate = sample_rate
        self.bound, self.hop, self.reach = config.bound, config.hop, config.reach
        widths, edge = config.widths, EDGE_KERNEL // 2
        self.conv_pre = nn.Conv1d(INPUT_CHANNELS, widths[0], EDGE_KERNEL, padding=edge)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(before, after, kernel, rate, padding=(kernel - rate) // 2)
            for (before, after), kernel, rate in zip(
                itertools.pairwise(widths), config.kernels, config.rates, strict=True
            )
        )
        self.before_up = nn.Identity() if config.snake else nn.LeakyReLU(INNER_SLOPE)
        self.blocks_per_stage = len(config.block_kernels)
        self.resblocks = nn.ModuleList(
            ResidualBlock(width, kernel, dilations, config.snake)
            for width in widths[1:]
            for kernel, dilations in zip(config.block_kernels, config.block_dilations, strict=True)
        )
        self.act_post = _activation(widths[-1], config.snake, FINAL_SLOPE)
        self.conv_post = nn.Conv1d(
            widths[-1], mel.CHANNELS, EDGE_KERNEL, padding=edge, bias=config.final_bias
        )

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Play a log-mel spectrogram.

        spectrogram: (B, 2, T, 64) log-mel, brought to fp32.
        Returns (B, 2, T * hop) fp32: in [-1, 1] unless the configuration leaves it unbounded.
        Long sound is played in parts that overlap by all a sample depends on, so that the result
        is the same up to rounding and memory does not grow with the length.
        Raises ShapeError for another layout or weights that are not fp32.
        Source: LTX-2 400fd31 audio_vae/vocoder.py Vocoder.
        """
        require_fp32(self)
        x = _channels_first(spectrogram)
        frames = x.shape[2]
        if frames <= MOST_FRAMES:
            return self._play(x)
        waveform = x.new_empty(len(x), mel.CHANNELS, frames * self.hop)
        step = math.ceil(frames / math.ceil(frames / MOST_FRAMES))
        for start in range(0, frames, step):
            stop, first = min(start + step, frames), max(0, start - self.reach)
            part = self._play(x[..., first : stop + self.reach])
            part = part[..., (start - first) * self.hop : (stop - first) * self.hop]
            waveform[..., start * self.hop : stop * self.hop] = part
        return waveform

    def _play(self, x: Tensor) -> Tensor:
        x = self.conv_pre(x)
        for stage, upsample in enumerate(self.ups):
            x = self._refine(upsample(self.before_up(x)), stage)
        return self._bounded(self.conv_post(self.act_post(x)))

    def _refine(self, x: Tensor, stage: int) -> Tensor:
        """Average the stage's residual blocks."""
        first = stage * self.blocks_per_stage
        total: Tensor = self.resblocks[first](x)
        for index in range(first + 1, first + self.blocks_per_stage):
            total = total + self.resblocks[index](x)
        return total / self.blocks_per_stage

    def _bounded(self, waveform: Tensor) -> Tensor:
        if self.bound == "tanh":
            return torch.tanh(waveform)
        return waveform.clamp(-1.0, 1.0) if self.bound == "clamp" else waveform


def _channels_first(spectrogram: Tensor) -> Tensor:
    """Lay (B, 2, T, 64) out as (B, 128, T) fp32: ear by ear, bin by bin."""
    shape = tuple(spectrogram.shape)
    if len(shape) != 4 or (shape[1], shape[3]) != (mel.CHANNELS, mel.MEL_BINS) or shape[2] == 0:
        raise ShapeError(
            f"vocoder: got shape {shape}, wanted (batch, {mel.CHANNELS}, frames, {mel.MEL_BINS})"
        )
    return spectrogram.float().transpose(2, 3).flatten(1, 2)


def require_fp32(module: nn.Module) -> None:
    """Raise ShapeError if any weight of `module` is not fp32."""
    for name, weight in itertools.chain(module.named_parameters(), module.named_buffers()):
        if weight.dtype != torch.float32:
            raise ShapeError(
                f"vocoder.{name}: got {weight.dtype}, wanted torch.float32: lower precision ruins "
                "the sound; call .float() on the vocoder after loading"
            )
