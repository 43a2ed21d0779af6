"""The text path in training: a tokenizer for the world's words, a frozen random Gemma, connectors.

A context has 1024 rows, of which a caption fills 15; the rest are 128 registers over and over. A
few of them, each standing for many, train the same network at 1/32 of the cost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ltxlite.models.activation import Activation, rms_norm
from ltxlite.models.connector import CONTEXT_LENGTH, Connector, ConnectorBlock, ConnectorConfig
from ltxlite.models.gemma import Gemma
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.rope import Rope, rope_table
from ltxlite.models.settings import Settings
from ltxlite.models.text_projection import TextProjection, TextProjectionConfig, gather
from ltxlite.models.tokenizer import Tokenizer
from ltxlite.training import recipe
from ltxlite.training.tokens import train_tokenizer
from ltxlite.training.world import PHRASES, SPARE, every_fact
from ltxlite_quant.encode import quantize
from ltxlite_quant.formats import FORMATS

VOCABULARY = 400
_SAMPLED = 11  # registers of a context in training
_EPS = 1e-6


def world_tokenizer() -> bytes:
    """Train the tokenizer of the world's captions."""
    facts = every_fact()
    corpus = [item.caption(phrase) for phrase in range(len(PHRASES)) for item in facts[::7]]
    return train_tokenizer([*corpus, *(f"a {word} shape" for word in SPARE)], VOCABULARY)


def gemma_settings() -> dict[str, object]:
    """Return the configuration of the text encoder, vocabulary included."""
    rows = -(-(VOCABULARY + 16) // 64) * 64
    return {**recipe.GEMMA, "vocab_size": rows}


def random_gemma() -> Gemma:
    """Build the text encoder: random and never trained, the same at every call."""
    config = GemmaConfig.from_settings(Settings(gemma_settings(), "recipe"))
    network = Gemma(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(recipe.SEED)
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name.startswith("embed_tokens"):
                value.copy_(noise)
            elif value.ndim > 1:
                value.copy_(noise / math.sqrt(value.shape[1]))
            else:
                value.copy_(0.1 * noise)  # Gemma's norms store w - 1
            if value.ndim > 1:  # what the file will hold, so that nothing is lost in it
                value.copy_(quantize(value, FORMATS["Q8_0"]).dequantize())
    return network


@dataclass(frozen=True, slots=True)
class TextPath:
    """What turns rows of Gemma's states into contexts; all of it learns."""

    projection: TextProjection
    video: Connector
    audio: Connector

    def networks(self) -> dict[str, nn.Module]:
        """Return the networks by their component names."""
        return {
            "text_projection": self.projection,
            "video_connector": self.video,
            "audio_connector": self.audio,
        }


def text_path() -> TextPath:
    """Build projection and connectors, without values."""
    settings = Settings(recipe.TRANSFORMER, "recipe")
    gemma = GemmaConfig.from_settings(Settings(gemma_settings(), "recipe"))
    return TextPath(
        TextProjection(TextProjectionConfig.from_settings(settings, gemma)),
        Connector(ConnectorConfig.from_settings(settings)),
        Connector(ConnectorConfig.from_settings(settings, sound=True)),
    )


class CaptionRows:
    """What the projection reads of each caption: Gemma never changes, so it is run once."""

    def __init__(self, path: TextPath) -> None:
        self.config = path.projection.config
        self.gemma = random_gemma()
        self.tokenizer = Tokenizer.from_sentencepiece(world_tokenizer(), "recipe")
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the inputs (B, n, C L) of both projections; all captions have n tokens."""
        missing = [text for text in dict.fromkeys(captions) if text not in self._known]
        if missing:
            self._learn(missing)
        rows = [self._known[text] for text in captions]
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    @torch.no_grad()
    def _learn(self, captions: Sequence[str]) -> None:
        ids = torch.tensor([self.tokenizer.encode(text).ids for text in captions])
        states = self.gemma.states(ids, CONTEXT_LENGTH - ids.shape[1])
        (gathered,) = gather(self.config, ([state] for state in states))
        pair = [item.taken() for item in gathered]
        for number, text in enumerate(captions):
            self._known[text] = (pair[0][number], pair[1][number])


def sampled_contexts(
    path: TextPath, rows: tuple[Tensor, Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return contexts (B, n + r, W) for picture and sound with r of the registers.

    And the bias (1, 1, 1, n + r) that has each of these count for all it stands for.
    """
    count = rows[0].shape[1]
    hidden = CONTEXT_LENGTH - count
    picks = count + torch.randperm(hidden, generator=generator)[:_SAMPLED]
    places = torch.cat([torch.arange(count), picks]).to(rows[0].device)
    bias = torch.zeros(1, 1, 1, count + _SAMPLED, device=places.device)
    bias[..., count:] = math.log(hidden / _SAMPLED)
    video = _context(path.video, path.projection.video(rows[0]), places, bias)
    audio = _context(path.audio, path.projection.audio(rows[1]), places, bias)
    return video, audio, bias


def _context(connector: Connector, features: Tensor, places: Tensor, bias: Tensor) -> Tensor:
    """Do what the connector does, at some of its places."""
    count = features.shape[1]
    registers = connector.registers[places[count:] % connector.config.registers]
    x = torch.cat([features, registers.expand(len(features), -1, -1)], dim=1)
    rope = rope_table(places[None, None], connector.config.rope)
    for block in connector.blocks:
        assert isinstance(block, ConnectorBlock)
        x = _through(block, x, rope, bias)
    return rms_norm(x, _EPS)


def _through(block: ConnectorBlock, x: Tensor, rope: Rope, bias: Tensor) -> Tensor:
    """Do what a block does, with a bias on its keys."""
    tokens, attention = x.shape[1], block.attention
    normed = Activation(rms_norm(x, _EPS))
    kv = attention.keys_values(lambda _: normed, tokens, rope, tokens)
    mixed: Tensor = attention(normed, kv, rope, slice(0, tokens), bias)
    x = x + mixed
    fed: Tensor = block.feed_forward(Activation(rms_norm(x, _EPS)))
    return x + fed


def full_contexts(path: TextPath, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return contexts (B, 1024, W) as the runtime makes them."""
    with torch.no_grad():
        video = path.video(path.projection.video(rows[0]))
        audio = path.audio(path.projection.audio(rows[1]))
    return video, audio
