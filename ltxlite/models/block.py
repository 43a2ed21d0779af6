"""A transformer block: two streams with their own layers, and the attentions between them.

Source: LTX-2 400fd31, ltx_core/model/transformer/transformer.py; restated in model.md 2.6.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ltxlite.models.activation import Activation, Normed, Tail, Vectors, modulate
from ltxlite.models.attention import (
    Attention,
    AttentionShape,
    Bias,
    Keys,
    KeyValue,
    attention,
    values_of,
)
from ltxlite.models.layers import TOKEN_CHUNK, FeedForward, TokenRows, add_rows, add_run
from ltxlite.models.nag import lead_away
from ltxlite.models.passes import (
    UNSCALED,
    Avoided,
    BranchScales,
    Moments,
    Pass,
    RowWeights,
    Skip,
    StreamRope,
)
from ltxlite.models.transformer_config import StreamConfig, TransformerConfig
from ltxlite.models.weighted_attention import weighted_attention
from ltxlite_kernels.attention_inputs import KeyBias


@dataclass(frozen=True, slots=True)
class Exchange:
    """Modulation of what one stream tells the other and hears from it.

    cross: scale, shift towards and scale, shift from the other stream.  gate: of what it hears.
    """

    cross: TokenRows
    gate: TokenRows

    def plus(self, table: Tensor, dtype: torch.dtype) -> "Exchange":
        """Return them with a block's table (5, W) added."""
        return Exchange(self.cross.plus(table[:4], dtype), self.gate.plus(table[4:], dtype))


@dataclass(frozen=True, slots=True)
class BlockVectors:
    """Modulation of one stream in one block: its learned tables plus what noise levels say."""

    own: TokenRows
    prompt: TokenRows | None
    exchange: Exchange | None
    scale: float = 1.0  # of what it adds to the stream by itself


@dataclass(slots=True)
class StreamState:
    """A stream on its way through the blocks; `x` (B, T, W) and `block` change, the rest stays."""

    x: Tensor
    context: Tensor
    context_bias: Bias | None
    rope: StreamRope
    weights: tuple[RowWeights, ...]
    enabled: bool
    modulation: TokenRows  # rows of the block tables
    embedded: TokenRows  # row of the output head
    prompt: TokenRows | None  # shift and scale of the prompt's keys and values
    exchange: "Exchange | None"  # where the network has two streams
    avoided: Avoided | None = None  # its context as the first one
    block: BlockVectors | None = None  # those of the block that runs
    moments: Moments | None = None
    scales: BranchScales = UNSCALED


@dataclass(slots=True)
class PassState:
    """Everything a pass carries from block to block."""

    given: Pass
    video: StreamState | None
    audio: StreamState | None
    chunk: int = TOKEN_CHUNK

    def copied(self) -> "PassState":
        """Return a state that goes on by itself; only the residual streams change on the way."""
        streams = (self.video, self.audio)
        video, audio = (None if s is None else replace(s, x=s.x.clone()) for s in streams)
        return replace(self, video=video, audio=audio)


class StreamBlock(nn.Module):
    """One stream's own part of a block.

    Table rows: 0-2 shift, scale, gate of self-attention, 3-5 of feed-forward, 6-8 of text
    attention (2.3). The cross table orders scale before shift: 0, 1 for audio-to-video, 2, 3 for
    video-to-audio; its row 4 is the gate of what this stream receives.
    """

    def __init__(self, stream: StreamConfig, config: TransformerConfig) -> None:
        super().__init__()
        width = stream.width
        self.eps = config.norm_eps
        shape = AttentionShape(width, width, width, stream.heads, config.gated, config.norm_eps)
        self.self_attention = Attention(shape)
        text = AttentionShape(
            width, stream.context, width, stream.heads, config.gated, config.norm_eps
        )
        self.text_attention = Attention(text)
        self.feed_forward = FeedForward(width, bias=stream.feed_forward_bias)
        self.table = nn.Parameter(torch.empty(config.table_rows, width))
        self.cross_table = None if config.sound_alone else nn.Parameter(torch.empty(5, width))
        self.prompt_table = nn.Parameter(torch.empty(2, width)) if config.text_modulation else None

    def enter(self, state: StreamState, number: int) -> None:
        """Compute the modulation of block `number`, once for all that it does to a stream."""
        dtype, prompt = state.x.dtype, state.prompt
        if self.prompt_table is not None and prompt is not None:
            prompt = prompt.plus(self.prompt_table, dtype)
        elif self.prompt_table is not None:
            only = torch.zeros_like(state.modulation.index[:1, :1])
            prompt = TokenRows(self.prompt_table.to(dtype)[None], only)
        exchange = None
        if self.cross_table is not None and state.exchange is not None:
            exchange = state.exchange.plus(self.cross_table, dtype)
        table, scale = state.modulation.plus(self.table, dtype), 1.0
        if state.scales.covers(number):
            scale = state.scales.own
            table.rows[:, 2::3] *= scale  # the gates
            if exchange is not None:
                exchange.gate.rows.mul_(state.scales.received)
        state.block = BlockVectors(table, prompt, exchange, scale)

    def attend_self(self, state: StreamState, skip: bool | Tensor, chunk: int) -> None:
        """Add self-attention; where skipped (STG), its values pass through unmixed."""
        module, x, table = self.self_attention, state.x, vectors_of(state).own

        def source(rows: slice) -> Activation:
            return self._modulated(state, 0, rows)

        kv = module.prepared(module.keys_values(source, x.shape[1], state.rope.own, chunk))

        def update(rows: slice, residual: Tensor) -> Tensor:
            queries = source(rows)
            mixed = self._mix(queries, kv, state, rows, skip)
            tail = Tail(gate=table.vectors(2, rows), residual=residual)
            return module.output(queries, mixed, tail)

        state.x = add_rows(x, update, chunk)

    def _modulated(self, state: StreamState, first: int, rows: slice) -> Normed:
        """Return normalised rows of x, modulated by the table's rows first (shift) and +1."""
        table = vectors_of(state).own
        shift, scale = table.vectors(first, rows), table.vectors(first + 1, rows)
        return Normed(state.x[:, rows], self.eps, shift, scale, moments_of(state, rows))

    def _mix(
        self, given: Activation, kv: Keys, state: StreamState, rows: slice, skip: bool | Tensor
    ) -> Tensor:
        if skip is True:
            return values_of(kv, rows, state.x.dtype)
        q = self.self_attention.queries(given, state.rope.own, rows)
        mixed = weighted_attention(q, kv, self.self_attention.heads, state.weights, rows)
        if isinstance(skip, Tensor):
            return torch.where(
                skip.to(q.device)[:, None, None], values_of(kv, rows, mixed.dtype), mixed
            )
        return mixed

    def attend_text(self, state: StreamState, chunk: int) -> None:
        """Add attention to the prompt, modulated on both sides in 2.3, plain in 2.0."""
        if state.moments is None or torch.is_grad_enabled():
            state.x = add_rows(state.x, self._text_update(state), chunk)
            return
        for moment, runs in enumerate(state.moments.runs):
            if runs:
                # What a token reads of the prompt is computed by the linears of its own moment.
                update = self._text_update(state, state.moments.ids.new_tensor([moment]))
            for run in runs:
                add_run(state.x, update, run, chunk)

    def _text_update(
        self, state: StreamState, moment: Tensor | None = None
    ) -> Callable[[slice, Tensor], Tensor]:
        """Return what adds attention to the prompt, as it is at a moment (1,), to some rows."""
        module, table = self.text_attention, vectors_of(state).own
        kv = self._text_keys(self._modulated_context(state, state.context), moment)
        avoided, away = state.avoided, None
        if avoided is not None:
            context = self._modulated_context(state, avoided.context)
            away = self._text_keys(context, moment)
        ungated = None
        if (scale := vectors_of(state).scale) != 1:
            ungated = Vectors(state.x.new_full((1, state.x.shape[2]), scale))

        def update(rows: slice, residual: Tensor) -> Tensor:
            queries = Normed(state.x[:, rows], self.eps, moments=moments_of(state, rows))
            tail = Tail(gate=ungated, residual=residual)
            if self.prompt_table is not None:
                queries = self._modulated(state, 6, rows)
                tail = Tail(gate=table.vectors(8, rows), residual=residual)
            bias = _bias_of(state.context_bias, rows)
            if away is None or avoided is None:
                out: Tensor = module(queries, kv, None, rows, bias, tail)
                return out
            q = module.queries(queries, None, rows)
            mixed = attention(q, kv, module.heads, bias)
            mixed = lead_away(mixed, attention(q, away, module.heads), avoided)
            del q
            return module.output(queries, mixed, tail)

        return update

    def _text_keys(self, context: Tensor, moment: Tensor | None) -> KeyValue:
        tokens = context.shape[1]
        return self.text_attention.keys_values(
            lambda rows: Activation(context[:, rows], moment), tokens, None, tokens
        )

    def _modulated_context(self, state: StreamState, context: Tensor) -> Tensor:
        vectors = vectors_of(state).prompt
        if vectors is None:
            return context
        shift, scale = (vectors.vectors(number, slice(None)).spread() for number in range(2))
        return modulate(context, shift, scale)

    def feed(self, state: StreamState, chunk: int) -> None:
        """Add the feed-forward layer."""
        x, table = state.x, vectors_of(state).own

        def update(rows: slice, residual: Tensor) -> Tensor:
            tail = Tail(gate=table.vectors(5, rows), residual=residual)
            out: Tensor = self.feed_forward(self._modulated(state, 3, rows), tail)
            return out

        state.x = add_rows(x, update, chunk)

    def towards(self, state: StreamState, rows: slice, first: int) -> Activation:
        """Return this stream's rows as one side of a cross attention (table rows first, +1)."""
        table = exchange_of(state).cross
        shift, scale = table.vectors(first + 1, rows), table.vectors(first, rows)
        return Normed(state.x[:, rows], self.eps, shift, scale, moments_of(state, rows))

    def received_gate(self, state: StreamState, samples: bool | Tensor) -> Tensor:
        """Return the gate (B or 1, 1, W) of what the other stream sends; samples: those it is for.

        The gate of the others is closed.
        """
        gate = exchange_of(state).gate.vectors(0, slice(None)).spread()
        return gate * samples if isinstance(samples, Tensor) else gate


def _bias_of(bias: Bias | None, rows: slice) -> Bias | None:
    return bias.of(rows) if isinstance(bias, KeyBias) else bias


def moments_of(state: StreamState, rows: slice) -> Tensor | None:
    """Return the moments of some tokens, None where nothing changes over time."""
    return None if state.moments is None else state.moments.ids[rows]


def vectors_of(state: StreamState) -> BlockVectors:
    """Return the modulation of the block that runs."""
    assert state.block is not None  # `enter` comes first
    return state.block


def exchange_of(state: StreamState) -> Exchange:
    """Return the part of it that is about the other stream."""
    found = vectors_of(state).exchange
    assert found is not None  # the network has two streams
    return found


class Block(nn.Module):
    """A transformer block: both streams' own layers and the attentions between them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        video, audio = config.video.width, config.audio.width
        heads, eps = config.video.heads, config.norm_eps
        inner, gated = config.cross_width, config.gated
        self.video = StreamBlock(config.video, config)
        self.audio = StreamBlock(config.audio, config)
        self.audio_to_video = Attention(AttentionShape(video, audio, inner, heads, gated, eps))
        self.video_to_audio = Attention(AttentionShape(audio, video, inner, heads, gated, eps))

    def forward(self, state: PassState, number: int) -> None:
        """Advance the streams of a pass; `number` is the block's index."""
        streams = (
            (self.video, state.video, Skip.VIDEO_SELF),
            (self.audio, state.audio, Skip.AUDIO_SELF),
        )
        for block, stream, skip in streams:
            if stream is not None:
                block.enter(stream, number)
            if stream is not None and stream.enabled:
                block.attend_self(stream, state.given.skipped(skip, number), state.chunk)
                block.attend_text(stream, state.chunk)
        self.exchange(state, number)
        for block, stream, _ in streams:
            if stream is not None and stream.enabled:
                block.feed(stream, state.chunk)
            if stream is not None:
                stream.block = None

    def exchange(self, state: PassState, number: int) -> None:
        """Let each stream attend to the other as both stood before the exchange."""
        video, audio = state.video, state.audio
        if video is None or audio is None:
            return
        hears = _receives(state.given.skipped(Skip.VIDEO_TO_AUDIO, number), audio)
        sees = _receives(state.given.skipped(Skip.AUDIO_TO_VIDEO, number), video)
        heard: Tensor | None = None
        if hears is not False:
            heard = self._audio_update(video, audio, hears, state.chunk)
        if sees is not False:
            self._update_video(video, audio, sees, state.chunk)
        if heard is not None:
            audio.x = audio.x + heard

    def _audio_update(
        self, video: StreamState, audio: StreamState, samples: bool | Tensor, chunk: int
    ) -> Tensor:
        module = self.video_to_audio
        kv = module.keys_values(
            lambda rows: self.video.towards(video, rows, 2),
            video.x.shape[1],
            video.rope.cross,
            chunk,
        )
        every = slice(0, audio.x.shape[1])
        queries = self.audio.towards(audio, every, 2)
        tail = Tail(gate=Vectors.of_samples(self.audio.received_gate(audio, samples)))
        out: Tensor = module(queries, kv, audio.rope.cross, every, None, tail)
        return out

    def _update_video(
        self, video: StreamState, audio: StreamState, samples: bool | Tensor, chunk: int
    ) -> None:
        module = self.audio_to_video
        kv = module.keys_values(
            lambda rows: self.audio.towards(audio, rows, 0),
            audio.x.shape[1],
            audio.rope.cross,
            chunk,
        )
        gate = Vectors.of_samples(self.video.received_gate(video, samples))

        def update(rows: slice, residual: Tensor) -> Tensor:
            queries = self.video.towards(video, rows, 0)
            tail = Tail(gate=gate, residual=residual)
            out: Tensor = module(queries, kv, video.rope.cross, rows, None, tail)
            return out

        video.x = add_rows(video.x, update, chunk)


def _receives(skipped: bool | Tensor, receiver: StreamState) -> bool | Tensor:
    """Tell whether a stream receives, as a mask (B, 1, 1) where only some of its samples do."""
    if isinstance(skipped, Tensor) and receiver.enabled:
        return (~skipped).to(receiver.x)[:, None, None]
    return receiver.enabled and skipped is False
