"""Trains the vocoder's core to play the world's spectrograms, then its bandwidth extension.

Absolute and spectral differences alone stay at silence (tiny-model.md 4); squares of the waveform
lead out of there, spectra come later.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ltxlite.models import mel
from ltxlite.models.generator import Generator
from ltxlite.models.settings import Settings
from ltxlite.models.vocoder import ExtendedVocoder, VocoderConfig
from ltxlite.training import recipe
from ltxlite.training.audio_vae import build as build_vae
from ltxlite.training.audio_vae import some_scenes
from ltxlite.training.fixed import freeze_fixed
from ltxlite.training.initial import start
from ltxlite.training.loop import CPU, Loop, Note, Pace, trained
from ltxlite.training.scene import sounds

PACE = Pace(steps=2000, rate=2e-3, decay=0.4, matrix_rate=0.004)
_BATCH = 8
_FRAMES = 32  # mel frames a clip, out of 64
_MARGIN = 4  # mel frames at both ends that are not compared: the network sees nothing beyond them
_WINDOWS = (128, 512, 1024)
_FAINT = 0.03  # magnitude below which differences do not matter


def build() -> ExtendedVocoder:
    """Build the vocoder with initial weights; its extension adds nothing."""
    vocoder = ExtendedVocoder(VocoderConfig.from_settings(Settings(recipe.VOCODER, "recipe")))
    generator = torch.Generator().manual_seed(recipe.SEED)
    for part in (vocoder.core, vocoder.extension):
        _start_generator(part, generator)
    freeze_fixed(vocoder)
    with torch.no_grad():
        vocoder.extension.conv_post.weight.zero_()
        vocoder.core.conv_post.weight.mul_(0.1)  # beyond the clamp at 1 nothing is learned
        quiet = -6.0  # about the mean of a log-mel
        first = vocoder.core.conv_pre
        assert first.bias is not None
        first.bias.copy_(-quiet * first.weight.sum(dim=(1, 2)))
    return vocoder


def _start_generator(part: Generator, generator: torch.Generator) -> None:
    for name, module in part.named_modules():
        if isinstance(module, nn.ConvTranspose1d):
            with torch.no_grad():
                noise = torch.randn(module.weight.shape, generator=generator)
                terms = module.weight.shape[0] * module.weight.shape[2] / module.stride[0]
                module.weight.copy_(noise / terms**0.5)
                assert module.bias is not None
                module.bias.zero_()
        elif isinstance(module, nn.Conv1d):
            start(module, 0.3 if ".convs2." in name else 1.0, generator)


class VocoderTraining:
    """The loop's parts: networks and one step."""

    def __init__(self, folder: Path, pace: Pace = PACE, device: torch.device = CPU) -> None:
        self.vocoder = build()
        self.vocoder.extension.requires_grad_(False)
        self.loop = Loop("vocoder", folder, {"vocoder": self.vocoder}, pace, device)
        self.encoder, self.decoder = (half.to(device) for half in build_vae())
        self.folder = folder
        self._has_vae = False

    def run(self, note: Note) -> None:
        """Train to the end."""
        for step in self.loop.steps(note):
            self.loop.learn(self.losses(step), note)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Compute the losses of a step's batch."""
        progress = self.loop.pace.progress(step)
        wave = self._waves()
        with torch.no_grad():
            spectrogram = mel.log_mel(wave, mel.SAMPLE_RATE)
            if step % 2 and progress > 0.5 and self._vae_is_there():
                spectrogram = self.decoder(self.encoder(spectrogram))
        begin = int(torch.randint(0, 61 - _FRAMES, (1,), generator=self.loop.generator))
        spectrogram = spectrogram[:, :, begin : begin + _FRAMES]
        made = self.vocoder.core_waveform(spectrogram)
        edge, hop = _MARGIN * mel.HOP, mel.HOP
        wanted = wave[..., begin * hop + edge : (begin + _FRAMES) * hop - edge]
        made = made[..., edge:-edge]
        found = {"square": 30 * (made - wanted).square().mean()}
        if progress > 0.4:
            found["spectrum"] = 0.2 * spectral_difference(made, wanted)
        return found

    def _waves(self) -> Tensor:
        """Draw sounds of 61 mel frames, some of them one-sided: (B, 2, 9600)."""
        generator, device = self.loop.generator, self.loop.device
        wave = sounds(some_scenes(_BATCH, generator).to(device), 60 * mel.HOP)
        louder = 0.5 + torch.rand(_BATCH, 1, 1, generator=generator)
        return wave * louder.to(device)

    def _vae_is_there(self) -> bool:
        path = self.folder / "audio_vae.state.safetensors"
        if not self._has_vae and path.is_file():
            trained(path, "encoder", self.encoder)
            trained(path, "decoder", self.decoder)
            self._has_vae = True
        return self._has_vae


def spectral_difference(made: Tensor, wanted: Tensor) -> Tensor:
    """Compare waveforms (B, 2, N) by magnitudes at several resolutions, plain and as logarithms.

    Logarithms make the silence between pulses count.
    """
    total = made.new_zeros(())
    for window in _WINDOWS:
        pair = [_magnitudes(x.flatten(0, 1), window) for x in (made, wanted)]
        total = total + (pair[0] - pair[1]).abs().mean() / pair[1].mean()
        logs = [(magnitude + _FAINT).log() for magnitude in pair]
        total = total + 0.3 * (logs[0] - logs[1]).abs().mean()
    return total / len(_WINDOWS)


def _magnitudes(wave: Tensor, window: int) -> Tensor:
    taps = torch.hann_window(window, device=wave.device)
    spectrum = torch.stft(wave, window, window // 4, window=taps, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square() + 1e-8).sqrt()
