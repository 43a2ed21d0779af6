"""The audio-video diffusion transformer of LTX-2.0 and 2.3.

Two residual streams, picture and sound, go through the same kind of block: self-attention,
attention to the prompt, then each looks at the other, then feed-forward. Every step is modulated
by AdaLN rows that depend on the noise level of the token (and, across streams, of the other one).
Source: LTX-2 400fd31, ltx_core/model/transformer; restated in model.md 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltxlite.geometry import midpoints
from ltxlite.models.activation import Activation, modulate, project
from ltxlite.models.attention import Bias
from ltxlite.models.block import Block, Exchange, PassState, StreamState, moments_of
from ltxlite.models.layers import TOKEN_CHUNK, TokenRows, map_rows
from ltxlite.models.passes import Pass, Skip, StreamInput, StreamRope, Timesteps, Velocity
from ltxlite.models.rope import RopeSpec, rope_table
from ltxlite.models.sound_block import SoundBlock
from ltxlite.models.transformer_config import StreamConfig, TransformerConfig
from ltxlite_kernels.attention_inputs import KeyBias


class AdaLN(nn.Module):
    """Maps a noise level to `rows` modulation vectors and to its embedding."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.linear_1 = nn.Linear(256, width)
        self.linear_2 = nn.Linear(width, width)
        self.linear = nn.Linear(width, rows * width)

    def forward(self, scaled: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Map scaled levels (U,) fp32 to rows (U, rows, W) and embeddings (U, 1, W) in `dtype`.

        Level by level: a matmul's rounding depends on its number of rows, and a level must have
        the same vectors alone, among others and in a table. With gradients, all at once.
        """
        waves = timestep_waves(scaled).to(dtype)
        parts = [waves] if torch.is_grad_enabled() else waves.split(1)
        embedded = torch.cat([self.linear_2(F.silu(self.linear_1(part))) for part in parts])
        parts = [embedded] if torch.is_grad_enabled() else embedded.split(1)
        rows = torch.cat([self.linear(F.silu(part)) for part in parts])
        return rows.unflatten(-1, (self.rows, -1)), embedded[:, None]


@dataclass(frozen=True, slots=True)
class AdaLNTable:
    """What an AdaLN says at the levels of a stage, so that its weights need not be there.

    keys: (V,) fp32 scaled levels, rising.  rows: (V, n, W).  embedded: (V, 1, W).
    """

    keys: Tensor
    rows: Tensor
    embedded: Tensor

    def __call__(self, scaled: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Look levels up, without the host seeing them; one that is not there gives NaN."""
        at = torch.searchsorted(self.keys, scaled).clamp(max=len(self.keys) - 1)
        known = (self.keys[at] == scaled)[:, None, None]
        rows, embedded = (
            torch.where(known, found[at].to(dtype), torch.nan)
            for found in (self.rows, self.embedded)
        )
        return rows, embedded


def timestep_waves(scaled: Tensor) -> Tensor:
    """Return 128 cosines, then 128 sines of scaled levels (U,): (U, 256) fp32."""
    exponents = torch.arange(128, dtype=torch.float32, device=scaled.device)
    frequencies = torch.exp(-math.log(10000.0) * exponents / 128)
    angles = scaled.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class CaptionProjection(nn.Module):
    """Projects the prompt inside the transformer (2.0 only)."""

    def __init__(self, captions: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(captions, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, context: Tensor) -> Tensor:
        """Map (B, S, captions) to (B, S, W)."""
        out: Tensor = self.linear_2(F.gelu(self.linear_1(context), approximate="tanh"))
        return out


class StreamEnds(nn.Module):
    """What stands before and behind the blocks of one stream."""

    def __init__(self, stream: StreamConfig, config: TransformerConfig) -> None:
        super().__init__()
        width = stream.width
        self.eps = config.norm_eps
        self.embed = nn.Linear(stream.channels, width)
        self.adaln = AdaLN(width, config.table_rows)
        self.prompt_adaln = AdaLN(width, 2) if config.prompt_adaln else None
        self.cross_adaln = None if config.sound_alone else AdaLN(width, 4)
        self.gate_adaln = None if config.sound_alone else AdaLN(width, 1)
        captions = config.caption_channels
        self.caption = CaptionProjection(captions, width) if captions else None
        self.table = nn.Parameter(torch.empty(2, width))
        self.head = nn.Linear(width, stream.out_channels)
        self.tables: dict[str, AdaLNTable] = {}

    def prompt(self, context: Tensor) -> Tensor:
        """Bring a context (B, S, ·) to what blocks attend to."""
        projected: Tensor = context if self.caption is None else self.caption(context)
        return projected

    def modulation(self, name: str, scaled: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return rows and embeddings of the AdaLN of that name, from its table if it has one."""
        found: tuple[Tensor, Tensor] = (self.tables.get(name) or self.get_submodule(name))(
            scaled, dtype
        )
        return found

    def tabulate(self, name: str, scaled: Tensor, dtype: torch.dtype) -> None:
        """Compute an AdaLN at given levels, its weights on the device for just as long."""
        module, device = self.get_submodule(name), scaled.device
        weights = {key: value.to(device) for key, value in module.state_dict().items()}
        keys = scaled.unique()
        self.tables[name] = AdaLNTable(
            keys, *torch.func.functional_call(module, weights, (keys, dtype))
        )

    def output(self, state: StreamState, chunk: int) -> Tensor:
        """Read the velocity (B, T, C) fp32 off the final state."""
        vectors = state.embedded.plus(self.table, state.x.dtype)

        def rows(tokens: slice) -> Tensor:
            x = F.layer_norm(state.x[:, tokens], state.x.shape[-1:], eps=self.eps)
            shift, scale = (vectors.vectors(number, tokens).spread() for number in range(2))
            given = Activation(modulate(x, shift, scale), moments_of(state, tokens))
            return project(self.head, given).float()

        return map_rows(rows, state.x.shape[1], chunk)


class Transformer(nn.Module):
    """The network: ends of both streams and the blocks between them.

    With `config.sound_alone` it has the sound's only, and takes passes without a picture.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.chunk = TOKEN_CHUNK
        self.video = None if config.sound_alone else StreamEnds(config.video, config)
        self.audio = StreamEnds(config.audio, config)
        kind = SoundBlock if config.sound_alone else Block
        self.blocks = nn.ModuleList(kind(config) for _ in range(config.layers))

    @property
    def ends(self) -> tuple[StreamEnds, ...]:
        """The ends of its streams."""
        return (self.audio,) if self.video is None else (self.video, self.audio)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype activations are computed in: that of a norm, which is never quantized."""
        return self.get_parameter("blocks.0.audio.self_attention.q_norm.weight").dtype

    def forward(self, given: Pass) -> Velocity:
        """Predict the velocities of one pass.

        Raises nothing of its own: shapes are made by `conditioning`.
        """
        return self.run([given])[0]

    def run(self, passes: Sequence[Pass]) -> list[Velocity]:
        """Predict several passes block by block, so that each block is needed only once.

        Passes over the same inputs are one until the first block where they skip different
        attention: of 48 blocks, guidance by perturbing block 28 costs 20.
        """
        groups = [_Group(self.begin(passes[same[0]]), same) for same in _same_inputs(passes)]
        for number, block in enumerate(self.blocks):
            groups = [part for group in groups for part in group.parted(passes, number)]
            for group in groups:
                block(group.state, number)
        found: dict[int, Velocity] = {}
        for group in groups:
            found |= dict.fromkeys(group.passes, self.finish(group.state))
        return [found[index] for index in range(len(passes))]

    def tabulate(self, levels: Tensor) -> None:
        """Compute all modulation of a stage ahead, given every noise level it will see.

        levels: (V,) fp32 on the device, tokens' and samples' of both streams. From then on the
        weights of the AdaLNs, 0.8 GB of 2.3 in bf16, are not needed; other levels give NaN.
        """
        config = self.config
        for ends in self.ends:
            for name, scale in (
                ("adaln", config.timestep_scale),
                ("prompt_adaln", config.timestep_scale),
                ("cross_adaln", config.timestep_scale),
                ("gate_adaln", config.gate_scale),
            ):
                if getattr(ends, name) is not None:
                    ends.tabulate(name, levels * scale, self.dtype)

    def forget_tables(self) -> None:
        """Go back to the AdaLN weights."""
        for ends in self.ends:
            ends.tables.clear()

    def begin(self, given: Pass) -> PassState:
        """Embed latents, noise levels and prompts."""
        video = audio = None
        if given.video is not None:
            assert self.video is not None  # who makes sound alone gives no picture
            video = self._stream(self.video, given.video, given.audio, sound=False)
        if given.audio is not None:
            audio = self._stream(self.audio, given.audio, given.video, sound=True)
        return PassState(given, video, audio, self.chunk)

    def finish(self, state: PassState) -> Velocity:
        """Project the final states to velocities."""
        video = audio = None
        if self.video is not None and state.video is not None:
            video = self.video.output(state.video, state.chunk)
        if state.audio is not None:
            audio = self.audio.output(state.audio, state.chunk)
        return Velocity(video, audio)

    def rope(self, positions: Tensor, sound: bool) -> StreamRope:
        """Build a stream's rotary tables from its positions (B, A, T, 2); reusable over steps."""
        config = self.config
        stream = config.audio if sound else config.video
        limit = max(config.video.max_positions[0], config.audio.max_positions[0])
        own = self._rope_spec(stream.width, stream.max_positions)
        cross = self._rope_spec(config.cross_width, (limit,))
        middle = midpoints(positions)
        return StreamRope(rope_table(middle, own), rope_table(middle[:, :1], cross))

    def _rope_spec(self, width: int, limits: tuple[int, ...]) -> RopeSpec:
        config = self.config
        layout, float64 = config.rope_layout, config.rope_float64
        return RopeSpec(width, config.video.heads, limits, config.theta, layout, float64)

    def _stream(
        self, ends: StreamEnds, given: StreamInput, other: StreamInput | None, sound: bool
    ) -> StreamState:
        dtype = self.dtype
        levels = given.timesteps
        sigma = _per_sample(given.sigma)
        scale = self.config.timestep_scale
        rows, embedded = ends.modulation("adaln", levels.values * scale, dtype)
        prompt = None
        if ends.prompt_adaln is not None:
            prompt = self._rows(ends, "prompt_adaln", sigma, scale)
        avoided = given.avoided
        if avoided is not None:
            avoided = replace(avoided, context=ends.prompt(avoided.context.to(dtype)))
        return StreamState(
            x=project(ends.embed, Activation(given.latent.to(dtype), _moments(given))),
            context=ends.prompt(given.context.to(dtype)),
            context_bias=_context_bias(given, dtype),
            rope=given.rope or self.rope(given.positions, sound),
            weights=given.weights,
            enabled=given.enabled,
            modulation=TokenRows(rows, levels.index),
            embedded=TokenRows(embedded, levels.index),
            prompt=prompt,
            exchange=None if self.config.sound_alone else self._exchange(ends, given, other),
            avoided=avoided,
            moments=given.moments,
            scales=given.scales,
        )

    def _exchange(
        self, ends: StreamEnds, given: StreamInput, other: StreamInput | None
    ) -> Exchange:
        config, levels = self.config, given.timesteps
        other_sigma = _per_sample(given.sigma if other is None else other.sigma)
        own = config.cross_modulation == "own" or other is None
        return Exchange(
            self._rows(ends, "cross_adaln", levels if own else other_sigma, config.timestep_scale),
            self._rows(ends, "gate_adaln", other_sigma, config.gate_scale),
        )

    def _rows(self, ends: StreamEnds, name: str, levels: Timesteps, scale: float) -> TokenRows:
        return TokenRows(ends.modulation(name, levels.values * scale, self.dtype)[0], levels.index)


@dataclass(frozen=True, slots=True)
class _Group:
    """Passes that have been one computation so far: its state, and their places in the list."""

    state: PassState
    passes: tuple[int, ...]

    def parted(self, passes: Sequence[Pass], block: int) -> list["_Group"]:
        """Split by what the passes skip in a block; those after the first go on with a copy."""
        by_skips: dict[frozenset[tuple[int, Skip]], list[int]] = {}
        for index in self.passes:
            by_skips.setdefault(passes[index].skips(block), []).append(index)
        if len(by_skips) == 1:
            return [self]
        copies = [self.state.copied() for _ in range(len(by_skips) - 1)]
        return [
            _Group(replace(state, given=passes[same[0]]), tuple(same))
            for state, same in zip((self.state, *copies), by_skips.values(), strict=True)
        ]


def _same_inputs(passes: Sequence[Pass]) -> list[tuple[int, ...]]:
    """Put passes together whose inputs are the very same records."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, given in enumerate(passes):
        groups.setdefault((id(given.video), id(given.audio)), []).append(index)
    return [tuple(same) for same in groups.values()]


def _moments(given: StreamInput) -> Tensor | None:
    return None if given.moments is None else given.moments.ids


def _per_sample(sigma: Tensor) -> Timesteps:
    index = torch.arange(len(sigma), dtype=torch.int32, device=sigma.device)
    return Timesteps(sigma.float(), index[:, None])


def _context_bias(given: StreamInput, dtype: torch.dtype) -> Bias | None:
    """Turn a text mask (B, S), 1 = attend, into an additive bias (B, 1, 1, S), rows into rows."""
    mask, bias = given.context_mask, given.context_bias
    if mask is None:
        return None if bias is None else KeyBias(bias.rows, bias.row_ids)
    hidden = (1 - mask.to(dtype)) * torch.finfo(dtype).min
    if bias is None:
        return hidden[:, None, None]
    rows = (bias.rows + hidden.float()[:, None]).flatten(0, 1)  # those of each sample
    first = torch.arange(len(mask), device=mask.device, dtype=torch.int32) * len(bias.rows)
    return KeyBias(rows, bias.row_ids + first[:, None])


RENAMES = (
    (r"^transformer_blocks\.", "blocks."),
    (r"\.attn1\.", ".video.self_attention."),
    (r"\.attn2\.", ".video.text_attention."),
    (r"\.audio_attn1\.", ".audio.self_attention."),
    (r"\.audio_attn2\.", ".audio.text_attention."),
    (r"\.audio_ff\.", ".audio.feed_forward."),
    (r"\.ff\.", ".video.feed_forward."),
    (r"\.net\.0\.proj\.", ".up."),
    (r"\.net\.2\.", ".down."),
    (r"\.audio_to_video_attn\.", ".audio_to_video."),
    (r"\.video_to_audio_attn\.", ".video_to_audio."),
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.scale_shift_table_a2v_ca_(video|audio)$", r".\1.cross_table"),
    (r"\.audio_prompt_scale_shift_table$", ".audio.prompt_table"),
    (r"\.prompt_scale_shift_table$", ".video.prompt_table"),
    (r"\.audio_scale_shift_table$", ".audio.table"),
    (r"\.scale_shift_table$", ".video.table"),
    (r"\.emb\.timestep_embedder\.", "."),
    (r"^av_ca_(video|audio)_scale_shift_adaln_single\.", r"\1.cross_adaln."),
    (r"^av_ca_a2v_gate_adaln_single\.", "video.gate_adaln."),
    (r"^av_ca_v2a_gate_adaln_single\.", "audio.gate_adaln."),
    (r"^audio_prompt_adaln_single\.", "audio.prompt_adaln."),
    (r"^prompt_adaln_single\.", "video.prompt_adaln."),
    (r"^audio_adaln_single\.", "audio.adaln."),
    (r"^adaln_single\.", "video.adaln."),
    (r"^audio_patchify_proj\.", "audio.embed."),
    (r"^patchify_proj\.", "video.embed."),
    (r"^audio_proj_out\.", "audio.head."),
    (r"^proj_out\.", "video.head."),
    (r"^audio_caption_projection\.", "audio.caption."),
    (r"^caption_projection\.", "video.caption."),
    (r"^audio_scale_shift_table$", "audio.table"),
    (r"^scale_shift_table$", "video.table"),
)
IGNORED: tuple[str, ...] = ()
# Of a checkpoint, what the sound alone has no use for: all that is not of its own stream.
SOUND_ALONE_IGNORED = (r"^(?!(transformer_blocks\.\d+\.)?audio_)", r"\.audio_to_video_attn\.")
FLOAT32 = (r"table$",)  # fp32 in every release file; added to AdaLN rows in fp32
