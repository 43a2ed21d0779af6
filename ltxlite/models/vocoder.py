"""Vocoders: log-mel spectrograms to waveforms, always in fp32.

LTX-2.0 has one generator, which plays 24 kHz.  In LTX-2.3 a core plays 16 kHz; a second generator
listens to it and adds what is missing at 48 kHz, mostly the band above.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite.errors import CheckpointError
from ltxlite.models import mel
from ltxlite.models.generator import Generator, GeneratorConfig, require_fp32
from ltxlite.models.settings import Settings

# The filter of the skip path: a sinc under one Hann lobe of 6 zero crossings a side.
SKIP_ZERO_CROSSINGS = 6
SKIP_ROLLOFF = 0.99

RATE_2_0 = 24000
CORE_2_3 = GeneratorConfig(
    width=1536,
    rates=(5, 2, 2, 2, 2, 2),
    kernels=(11, 4, 4, 4, 4, 4),
    snake=True,
    final_bias=False,
    bound="clamp",
)
RESIDUAL_2_3 = GeneratorConfig(
    width=512, kernels=(12, 11, 4, 4, 4), snake=True, final_bias=False, bound="none"
)


@dataclass(frozen=True, slots=True)
class ExtensionConfig:
    """Hyper-parameters of the bandwidth extension; the defaults are those of LTX-2.3 and 2.5.

    window, hop: samples of a frame of its own mel front end, and between two frames.
    """

    generator: GeneratorConfig = RESIDUAL_2_3
    window: int = 512
    hop: int = 80
    input_rate: int = 16000
    output_rate: int = 48000

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Read the `bwe` section.  Raises CheckpointError for values that are not implemented."""
        window = settings.integer("win_size", settings.take("n_fft", cls().window))
        settings.expect("n_fft", window)
        settings.expect("num_mels", mel.MEL_BINS)
        settings.expect("apply_final_activation", False)
        return cls(
            generator=GeneratorConfig.from_settings(settings, bounded=False),
            window=window,
            hop=settings.integer("hop_length", cls().hop),
            input_rate=settings.integer("input_sampling_rate", cls().input_rate),
            output_rate=settings.integer("output_sampling_rate", cls().output_rate),
        )

    def __post_init__(self) -> None:
        if self.output_rate % self.input_rate:
            raise CheckpointError(
                f"vocoder.bwe: {self.input_rate} to {self.output_rate} Hz, "
                "ltxlite implements whole factors; every release has 3"
            )
        if self.generator.hop != self.ratio * self.hop or self.hop > self.window:
            raise CheckpointError(
                f"vocoder.bwe: upsample_rates make {self.generator.hop} samples of a frame, wanted "
                f"{self.ratio} * hop_length {self.hop}, which is at most win_size {self.window}"
            )

    @property
    def ratio(self) -> int:
        """Return the output samples per input sample."""
        return self.output_rate // self.input_rate


EXTENSION_2_3 = ExtensionConfig()


@dataclass(frozen=True, slots=True)
class VocoderConfig:
    """Hyper-parameters of a vocoder; the defaults are those of LTX-2.3 and 2.5.

    core: the generator that plays the spectrogram, at core_rate Hz.  extension: None in LTX-2.0.
    """

    core: GeneratorConfig = CORE_2_3
    extension: ExtensionConfig | None = EXTENSION_2_3
    core_rate: int = 16000

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Read the `vocoder` section of a checkpoint's configuration.

        With a `bwe` part it is the 2.3 vocoder, without one the flat section describes the core.
        Raises CheckpointError for values that are not implemented.
        """
        if not settings.has("bwe"):
            rate = settings.integer("output_sampling_rate", RATE_2_0)
            return cls(GeneratorConfig.from_settings(settings), None, rate)
        core = settings.section("vocoder")
        core.inert("apply_final_activation")  # the released code bounds the core whatever this says
        extension = ExtensionConfig.from_settings(settings.section("bwe"))
        return cls(GeneratorConfig.from_settings(core), extension, extension.input_rate)

    @classmethod
    def released(cls, family: str) -> Self:
        """Return the vocoder of a released family, "2.0" or "2.3" (which 2.5 shares)."""
        return cls(GeneratorConfig(), None, RATE_2_0) if family == "2.0" else cls()

    @property
    def sample_rate(self) -> int:
        """Return the samples a second of the final waveform."""
        return self.extension.output_rate if self.extension else self.core_rate


def build_vocoder(config: VocoderConfig) -> "Generator | ExtendedVocoder":
    """Build the vocoder that `config` describes, without weights.

    Its forward takes (B, 2, T, 64) log-mel and returns (B, 2, N) fp32 in [-1, 1], `sample_rate` a
    second.
    """
    if config.extension is None:
        return Generator(config.core, config.core_rate)
    return ExtendedVocoder(config)


class ExtendedVocoder(nn.Module):
    """The vocoder of LTX-2.3: a core, and a generator that adds the band the core cannot hold."""

    mel_basis: Tensor
    transform: Tensor

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        extension = config.extension
        if extension is None:
            raise CheckpointError(
                "vocoder: a bandwidth extension is wanted, the file describes none"
            )
        self.sample_rate, self.ratio = extension.output_rate, extension.ratio
        self.window, self.hop = extension.window, extension.hop
        self.core = Generator(config.core, config.core_rate)
        self.extension = Generator(extension.generator, extension.output_rate)
        frequencies = extension.window // 2 + 1
        self.register_buffer("mel_basis", torch.zeros(mel.MEL_BINS, frequencies))
        self.register_buffer("transform", torch.zeros(2 * frequencies, 1, extension.window))

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Play a log-mel spectrogram at the full rate.

        spectrogram: (B, 2, T, 64) log-mel, brought to fp32.
        Returns (B, 2, N) fp32 in [-1, 1] with N = 3 * (core samples), 480 T in all released files.
        Raises ShapeError for another layout or weights that are not fp32.
        Source: LTX-2 400fd31 audio_vae/vocoder.py VocoderWithBWE.
        """
        require_fp32(self)
        low = self.core_waveform(spectrogram)
        padded = self.padded(low)
        full = self.residual(padded) + self.skip(padded)
        return full.clamp(-1.0, 1.0)[..., : low.shape[-1] * self.ratio]

    def core_waveform(self, spectrogram: Tensor) -> Tensor:
        """Play a (B, 2, T, 64) spectrogram at the core's rate: (B, 2, 160 T) in [-1, 1]."""
        waveform: Tensor = self.core(spectrogram)
        return waveform

    def padded(self, low: Tensor) -> Tensor:
        """Append silence to a (B, 2, N) waveform up to a whole number of frames."""
        return F.pad(low, (0, -low.shape[-1] % self.hop))

    def bwe_mel(self, low: Tensor) -> Tensor:
        """Compute what the extension hears of the core: (B, 2, N) to log-mel (B, 2, 64, N / hop).

        Each frame ends with the samples it stands for.  Phase is not used.
        """
        batch, channels, samples = low.shape
        padded = F.pad(low.reshape(batch * channels, 1, samples), (self.window - self.hop, 0))
        real, imaginary = F.conv1d(padded, self.transform, stride=self.hop).chunk(2, dim=1)
        magnitude = torch.sqrt(real**2 + imaginary**2)
        bands = (self.mel_basis @ magnitude).clamp(min=mel.FLOOR).log()
        return bands.reshape(batch, channels, *bands.shape[1:])

    def residual(self, low: Tensor) -> Tensor:
        """Compute what the extension adds to a (B, 2, N) waveform: (B, 2, 3 N), unbounded."""
        waveform: Tensor = self.extension(self.bwe_mel(low).transpose(2, 3))
        return waveform

    def skip(self, low: Tensor) -> Tensor:
        """Resample a (B, 2, N) waveform to (B, 2, 3 N)."""
        reach, ratio = _skip_reach(), self.ratio
        kernel = _skip_kernel(ratio, low.device).expand(mel.CHANNELS, 1, -1)
        padded = F.pad(low, (reach, reach), mode="replicate")
        full = ratio * F.conv_transpose1d(padded, kernel, stride=ratio, groups=mel.CHANNELS)
        return full[..., 2 * reach * ratio : -(2 * reach * ratio + 1 - ratio)]


def _skip_reach() -> int:
    """Return how many samples the skip filter reaches to each side."""
    return math.ceil(SKIP_ZERO_CROSSINGS / SKIP_ROLLOFF)


def _skip_kernel(ratio: int, device: torch.device) -> Tensor:
    """Return the interpolation filter of the skip path, 2 * reach * ratio + 1 taps."""
    reach = _skip_reach()
    times = torch.arange(2 * reach * ratio + 1, device=device) / ratio - reach
    times = times * SKIP_ROLLOFF
    inside = times.clamp(-SKIP_ZERO_CROSSINGS, SKIP_ZERO_CROSSINGS)
    window = torch.cos(inside * math.pi / SKIP_ZERO_CROSSINGS / 2) ** 2
    return torch.sinc(times) * window * SKIP_ROLLOFF / ratio


# Names as they stand after the prefix `vocoder.` was stripped once.
RENAMES = (
    (r"^vocoder\.", "core."),
    (r"^bwe_generator\.", "extension."),
    (r"^mel_stft\.mel_basis$", "mel_basis"),
    (r"^mel_stft\.stft_fn\.forward_basis$", "transform"),
    (r"\.act\.(alpha|beta)$", r".\1"),
    (r"\.upsample\.filter$", ".up_filter"),
    (r"\.downsample\.lowpass\.filter$", ".down_filter"),
)
IGNORED = (
    r"^mel_stft\.stft_fn\.inverse_basis$",  # synthesis; the extension only listens
)
