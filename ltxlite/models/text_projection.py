"""The text projection: Gemma's states of all layers to one feature per token and stream.

Flattened, a token's states are 49 x 3840 values with the layer as the fastest index, d·L + l.
So the columns of one layer lie 49 apart: summing up W[:, l::49] · x_l while the layers come by
would touch every page of a 2.3 GB matrix 49 times, and cannot decode one quantized along its
rows. The rows of real tokens are filled instead (0.4 MB each in bf16), the matrix is read once.
Source: LTX-2 400fd31, ltx_core/text_encoders/gemma/feature_extractor.py; model.md 3.3.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from torch import Tensor, nn

from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.models.activation import rms_norm
from ltxlite.models.connector import ConnectorConfig
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.layers import apply_to_all
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


class FlatInput:
    """The rows a projection reads, filled state by state as Gemma's layers come by."""

    def __init__(self, states: int, scale: float) -> None:
        self.states, self.scale = states, scale
        self.rows: Tensor | None = None  # (B, n, C, L)

    def put(self, normed: Tensor, number: int, dtype: torch.dtype) -> None:
        """Take the normalised state `number` (B, n, C), in fp32."""
        if self.rows is None:
            self.rows = normed.new_empty(*normed.shape, self.states, dtype=dtype)
        self.rows[..., number] = normed * self.scale

    def taken(self) -> Tensor:
        """Hand the rows (B, n, C L) over."""
        assert self.rows is not None  # `gather` counted the states
        rows, self.rows = self.rows.flatten(-2), None
        return rows


# The inputs of a prompt: for picture and sound, in 2.0 one for both.
Gathered: TypeAlias = tuple[FlatInput, ...]


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
        return self.project(gather(self.config, ([state] for state in states)))[0]

    def project(self, prompts: Sequence[Gathered]) -> list[tuple[Tensor, Tensor]]:
        """Project what `gather` collected of each prompt; the weights are needed once for all.

        Each prompt's features have the bits that it would have alone.
        """
        linears = [self.both] if self.config.shared else [self.video, self.audio]
        found = [
            apply_to_all(linear, [rows[place].taken() for rows in prompts])
            for place, linear in enumerate(linears)
        ]
        return list(zip(found[0], found[-1], strict=True))

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


def gather(config: TextProjectionConfig, states: Iterable[Sequence[Tensor]]) -> list[Gathered]:
    """Collect the rows to project while Gemma's layers come by; no weights are needed yet.

    states: for each layer, the states (B, n, C) of several prompts.  Returns, for each prompt, the
    inputs of the projections.  Raises ShapeError if number or width of the states do not fit.
    """
    count = 0
    prompts: list[Gathered] = []
    for number, layer in enumerate(states):
        _check(config, number < config.states, number + 1, layer[0].shape[-1])
        count = number + 1
        prompts = prompts or [_inputs(config) for _ in layer]
        for state, rows in zip(layer, prompts, strict=True):
            normed = normalise_layer(state) if config.shared else rms_norm(state.float(), _EPS)
            for item in rows:
                item.put(normed, number, state.dtype)
    _check(config, count == config.states, count, config.hidden)
    return prompts


def _check(config: TextProjectionConfig, fits: bool, count: int, width: int) -> None:
    if not fits or width != config.hidden:
        raise ShapeError(
            f"the text encoder gave {count} states {width} wide, the text projection takes "
            f"{config.states} of {config.hidden}; LTX-2.0 and 2.3 need Gemma 3 12B"
        )


def _inputs(config: TextProjectionConfig) -> Gathered:
    if config.shared:
        return (FlatInput(config.states, 1.0),)
    widths = (config.video, config.audio)
    return tuple(FlatInput(config.states, math.sqrt(width / config.hidden)) for width in widths)


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
