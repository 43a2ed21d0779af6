"""The text projection: Gemma's states of all layers to one feature per token and stream.

Flattened, a token's states are 49 x 3840 values with the layer as the fastest index, d·L + l.
That row is never built where it can be avoided: W · row = Σ_l W[:, l::L] · x_l, summed up while
Gemma's layers come by.
Source: LTX-2 400fd31, ltx_core/text_encoders/gemma/feature_extractor.py; model.md 3.3.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.models.connector import ConnectorConfig
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.layers import rms_norm
from ltxlite.models.settings import Settings

_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class TextProjectionConfig:
    """Sizes of the projection.

    hidden, states: width and number of Gemma's hidden states.
    shared: 2.0, where picture and sound share one projection without bias and each layer is
    normalised over the whole prompt; else 2.3, where each token of each layer is normalised.
    """

    hidden: int
    states: int
    video: int
    audio: int
    shared: bool = False

    @classmethod
    def from_settings(cls, settings: Settings, gemma: GemmaConfig) -> Self:
        """Read the `transformer` section of a checkpoint's configuration.

        Raises CheckpointError on values that are not implemented.
        """
        shared = not settings.flag("caption_proj_before_connector", False)
        if not shared:
            settings.expect("text_encoder_norm_type", "per_token_rms")
            settings.expect("caption_proj_input_norm", False)
            settings.expect("caption_projection_first_linear", False)
            settings.expect("caption_projection_second_linear", False)
        video = ConnectorConfig.from_settings(settings).width
        audio = ConnectorConfig.from_settings(settings, sound=True).width
        if shared and video != audio:
            raise CheckpointError(
                f"{settings.where}: connectors {video} and {audio} wide, but a 2.0 text "
                "projection feeds both and needs them equal"
            )
        return cls(gemma.hidden, gemma.states, video, audio, shared)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], gemma: GemmaConfig) -> Self:
        """Infer the kind from tensor names and shapes (without prefix).

        Raises CheckpointError if the weights are missing or were made for another text encoder.
        """
        shared = "video_aggregate_embed.weight" not in shapes
        names = ("", "") if shared else ("video_", "audio_")
        rows = []
        for name in (f"{prefix}aggregate_embed.weight" for prefix in names):
            shape = shapes.get(name, ())
            if len(shape) != 2:
                raise CheckpointError(f"{name} is missing; this file holds no text projection")
            if shape[1] != gemma.hidden * gemma.states:
                raise CheckpointError(
                    f"{name} reads {shape[1]} values a token, this Gemma gives {gemma.states} x "
                    f"{gemma.hidden}; LTX-2 needs Gemma 3 12B (49 x 3840)"
                )
            rows.append(shape[0])
        return cls(gemma.hidden, gemma.states, rows[0], rows[1], shared)


class SliceSum:
    """Sums up a plain linear layer slice by slice, in fp32."""

    def __init__(self, linear: nn.Linear, states: int) -> None:
        self.linear, self.states = linear, states
        bias = linear.bias
        self.total = linear.weight.new_zeros(()).float() if bias is None else bias.float()

    def add(self, x: Tensor, number: int) -> None:
        """Add the normalised state `number` (B, n, C)."""
        part = F.linear(x, self.linear.weight[:, number :: self.states])
        self.total = self.total + part.float()

    def result(self, dtype: torch.dtype) -> Tensor:
        """Return the features (B, n, N)."""
        return self.total.to(dtype)


class FlatInput:
    """Collects all states for a layer that can only be called, such as a quantized one."""

    def __init__(self, linear: nn.Module) -> None:
        self.linear = linear
        self.parts: list[Tensor] = []

    def add(self, x: Tensor, number: int) -> None:
        """Keep the normalised state `number` (B, n, C); they come in order."""
        self.parts.append(x)

    def result(self, dtype: torch.dtype) -> Tensor:
        """Return the features (B, n, N)."""
        flat = torch.stack(self.parts, dim=-1).flatten(-2)
        self.parts.clear()
        out: Tensor = self.linear(flat)
        return out.to(dtype)


class TextProjection(nn.Module):
    """Both feature extractors behind one method."""

    def __init__(self, config: TextProjectionConfig) -> None:
        super().__init__()
        self.config = config
        columns = config.hidden * config.states
        if config.shared:
            self.both = nn.Linear(columns, config.video, bias=False)
        else:
            self.video = nn.Linear(columns, config.video)
            self.audio = nn.Linear(columns, config.audio)

    def features(self, states: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Project states (B, n, C) of real tokens to features (B, n, Cv) and (B, n, Ca).

        states: one per layer in Gemma's order, read once. In 2.0 both features are one tensor.
        Raises ShapeError if their number or width is not the projection's.
        """
        config, count, dtype = self.config, 0, torch.float32
        sums = self._sums()
        for number, state in enumerate(states):
            self._check(number < config.states, number + 1, state.shape[-1])
            count, dtype = number + 1, state.dtype
            normed = normalise_layer(state) if config.shared else rms_norm(state.float(), _EPS)
            for scale, total in sums:
                total.add((normed * scale).to(dtype), number)
        self._check(count == config.states, count, config.hidden)
        results = [total.result(dtype) for _, total in sums]
        return results[0], results[-1]

    def _check(self, fits: bool, count: int, width: int) -> None:
        config = self.config
        if not fits or width != config.hidden:
            raise ShapeError(
                f"the text encoder gave {count} states {width} wide, the text projection takes "
                f"{config.states} of {config.hidden}; LTX-2.0 and 2.3 need Gemma 3 12B"
            )

    def padded_features(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Project stacked states (B, L, S, C) of padded prompts to features with padding rows.

        mask: (B, S), 1 on real tokens. Returns (B, S, Cv) and (B, S, Ca) in the same places;
        padding has the feature of an all-zero token: the bias in 2.3, zero in 2.0.
        """
        batch, count, tokens, width = states.shape
        blank = self.features(states.new_zeros(count, 1, 1, width))
        padded = [feature.repeat(batch, tokens, 1) for feature in blank]
        for sample, real in zip(range(batch), mask.bool(), strict=True):
            found = self.features(state[None] for state in states[sample, :, real])
            for out, feature in zip(padded, found, strict=True):
                out[sample, real] = feature[0]
        return padded[0], padded[1]

    def _sums(self) -> list[tuple[float, SliceSum | FlatInput]]:
        """Return a fresh accumulator of each projection and the scale of its input."""
        config = self.config
        if config.shared:
            return [(1.0, self._sum(self.both))]
        return [
            (math.sqrt(config.video / config.hidden), self._sum(self.video)),
            (math.sqrt(config.audio / config.hidden), self._sum(self.audio)),
        ]

    def _sum(self, linear: nn.Module) -> SliceSum | FlatInput:
        if type(linear) is nn.Linear:
            return SliceSum(linear, self.config.states)
        return FlatInput(linear)


def normalise_layer(state: Tensor) -> Tensor:
    """Centre a layer (B, n, C) on its mean over tokens and channels and scale its range to 8.

    Source: LTX-2.0's feature extractor. Returns fp32.
    """
    x = state.float()
    mean = x.mean(dim=(1, 2), keepdim=True)
    span = x.amax(dim=(1, 2), keepdim=True) - x.amin(dim=(1, 2), keepdim=True)
    return 8 * (x - mean) / (span + _EPS)


RENAMES = (
    (r"^video_aggregate_embed\.", "video."),
    (r"^audio_aggregate_embed\.", "audio."),
    (r"^aggregate_embed\.", "both."),
)
IGNORED: tuple[str, ...] = ()
