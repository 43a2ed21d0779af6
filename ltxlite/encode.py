"""From prompts to contexts: tokenizer, Gemma, text projection, connectors, one after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltxlite.errors import CheckpointError
from ltxlite.models.connector import CONTEXT_LENGTH, Connector
from ltxlite.networks import Networks


@dataclass(frozen=True, slots=True)
class Contexts:
    """A prompt as the transformer sees it: (1, 1024, W) for picture and for sound."""

    video: Tensor
    audio: Tensor


def encode_prompts(
    networks: Networks, prompts: Sequence[str], note: Callable[[str], None]
) -> list[Contexts]:
    """Encode prompts; each network is gone before the next one is loaded.

    Prompts beyond 1024 tokens are cut, which is told through `note`, as is an empty prompt.
    """
    encoded = _tokenize(networks, prompts, note)
    features = _features(networks, encoded)
    video = _connect(networks.video_connector(), [pair[0] for pair in features])
    audio = _connect(networks.audio_connector(), [pair[1] for pair in features])
    return [Contexts(*pair) for pair in zip(video, audio, strict=True)]


def _tokenize(
    networks: Networks, prompts: Sequence[str], note: Callable[[str], None]
) -> list[list[int]]:
    tokenizer = networks.tokenizer()
    rows = []
    for prompt in prompts:
        encoded = tokenizer.encode(prompt)
        if encoded.cut:
            note(
                f"the prompt has {len(encoded.ids) + encoded.cut} tokens; only the first "
                f"{len(encoded.ids)} count, it is cut after them: {prompt[:40]!r}..."
            )
        rows.append(list(encoded.ids))
    return rows


def _features(networks: Networks, rows: Sequence[list[int]]) -> list[tuple[Tensor, Tensor]]:
    gemma, projection = networks.gemma(), networks.text_projection()
    found = []
    for ids in rows:
        # The official code pads on the left to 1024: starting there gives its rotary rounding.
        first = CONTEXT_LENGTH - len(ids)
        states = gemma.states(torch.tensor([ids], device=networks.device), first)
        pair = projection.features(states)
        if not all(bool(feature.isfinite().all()) for feature in pair):
            raise CheckpointError(
                "the text encoder's features hold NaN: Gemma or the text projection is damaged, "
                "or float16 overflows in it; use --dtype bfloat16 or download them again"
            )
        found.append(pair)
    return found


def _connect(connector: Connector, features: Sequence[Tensor]) -> list[Tensor]:
    return [connector(feature, CONTEXT_LENGTH) for feature in features]
