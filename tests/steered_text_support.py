"""Text attention with full masks, written out: what NAG, relay and weights must equal."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.quality import exact_model
from benchmarks.step import Size, random_pass
from ltxlite.models import attention as attention_module
from ltxlite.models import block as block_module
from ltxlite.models.attention import KeyValue
from ltxlite.models.passes import Avoided, ContextBias, Pass, RowWeights, StreamInput
from ltxlite.models.transformer import Transformer
from ltxlite_kernels.attention_inputs import KeyBias

# 5 latent frames of 2 x 3, 11 tokens of sound, 13 rows of text: nothing is a multiple of anything.
SIZE = Size(2, 2, 16, 12, (5, 2, 3), 11, 13)


def network() -> Transformer:
    return deepcopy(exact_model(5, SIZE))  # which is cached, and tests change theirs


def inputs(
    bias: bool = True, avoided: bool = True, weights: bool = False
) -> tuple[StreamInput, StreamInput]:
    """Return both streams' inputs with what is asked for, the same for the same seed."""
    return steered(random_pass(SIZE, torch.float32, seed=7), SIZE, bias, avoided, weights)


def steered(
    given: Pass, size: Size, bias: bool = True, avoided: bool = True, weights: bool = False
) -> tuple[StreamInput, StreamInput]:
    """Return a pass's inputs with a random bias, a random prompt to avoid, and soft weights."""
    assert given.video is not None and given.audio is not None
    random = torch.Generator().manual_seed(8)
    made = []
    for stream in (given.video, given.audio):
        tokens, frames = stream.latent.shape[1], size.latent[0]
        rows = -6 * torch.rand(frames, size.text_rows, generator=random)
        rows[1, 3] = -1e4  # as good as hidden
        ids = torch.arange(tokens, dtype=torch.int32) * frames // tokens
        away = torch.randn(1, 9, stream.context.shape[2], generator=random)
        soft = torch.rand(1, 1, tokens, generator=random)
        made.append(
            replace(
                stream,
                context_bias=ContextBias(rows, ids) if bias else None,
                # Small tau: some tokens' results are cut to it, some are not.
                avoided=Avoided(away, 5.0, 0.4, 3.0) if avoided else None,
                weights=(RowWeights(2, tokens - 1, soft),) if weights else (),
            )
        )
    return made[0], made[1]


def outputs(transformer: Transformer, given: tuple[StreamInput, StreamInput]) -> Tensor:
    velocity = transformer(Pass(*given))
    assert velocity.video is not None and velocity.audio is not None
    return torch.cat([velocity.video.flatten(), velocity.audio.flatten()])


def dense_outputs(
    given: tuple[StreamInput, StreamInput], monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """Return the outputs of the same network with attention and guidance of this file."""
    transformer = network()
    with monkeypatch.context() as patch:
        patch.setattr(attention_module, "attention", dense_attention)
        patch.setattr(block_module, "attention", dense_attention)
        patch.setattr(block_module, "weighted_attention", dense_weighted)
        patch.setattr(block_module, "lead_away", written_out)
        return outputs(transformer, given)


def dense_attention(
    q: Tensor, kv: KeyValue, heads: int, bias: KeyBias | Tensor | None = None
) -> Tensor:
    mask = torch.zeros(q.shape[1], kv.key.shape[1])
    if isinstance(bias, KeyBias):
        assert bias.row_ids is not None
        mask = torch.stack([bias.rows[int(row)] for row in bias.row_ids])
    return masked(q, kv, heads, mask)


def dense_weighted(
    q: Tensor, kv: KeyValue, heads: int, weights: tuple[RowWeights, ...], rows: slice
) -> Tensor:
    mask = torch.ones(q.shape[1], kv.key.shape[1])
    for item in weights:
        mask[item.start : item.stop] = item.weights[0]
    return masked(q, kv, heads, mask.log())


def masked(q: Tensor, kv: KeyValue, heads: int, mask: Tensor) -> Tensor:
    """Attend in float64 with a mask (T, S), as the definition has it."""
    q, k, v = (x.double().unflatten(-1, (heads, -1)) for x in (q, kv.key, kv.value))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + mask.double()
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2).float()


def written_out(towards: Tensor, away: Tensor, avoided: Avoided) -> Tensor:
    """Lead away token by token.  Source: features.md C7."""
    out = torch.empty_like(towards)
    for sample in range(towards.shape[0]):
        for token in range(towards.shape[1]):
            p, n = (x[sample, token].double() for x in (towards, away))
            g = avoided.scale * p - (avoided.scale - 1) * n
            ratio = float(g.abs().sum() / p.abs().sum())
            if ratio > avoided.tau:
                g = g * avoided.tau * p.abs().sum() / (g.abs().sum() + 1e-7)
            out[sample, token] = avoided.alpha * g + (1 - avoided.alpha) * p
    return out
