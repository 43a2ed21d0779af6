"""From prompts to contexts: tokenizer, Gemma, text projection, connectors, one after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltxlite.context_cache import ContextCache
from ltxlite.errors import CheckpointError
from ltxlite.memory import place
from ltxlite.models.connector import CONTEXT_LENGTH
from ltxlite.models.text_projection import Gathered, gather
from ltxlite.networks import Networks

# What a context is made by; another file of any of these makes another context.
ENCODERS = ("text_encoder", "text_projection", "video_connector", "audio_connector")
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Contexts:
    """A prompt as the transformer sees it: (1, 1024, W) for picture and for sound."""

    video: Tensor
    audio: Tensor


def encode_prompts(
    networks: Networks, prompts: Sequence[str], note: Note, cache: ContextCache | None = None
) -> list[Contexts]:
    """Encode prompts; each network is gone before the next one is loaded.

    Every layer is needed once for all prompts; a prompt's context does not depend on the others.
    Prompts beyond 1024 tokens are cut, which is told through `note`.
    cache: contexts of earlier runs; where it has all, no network is loaded.
    """
    found: dict[str, Contexts] = {}
    at_load = "" if networks.at_load is None else networks.at_load.format.name
    makers = f"{networks.identity(ENCODERS)}; {networks.device.type}; {networks.dtype}; {at_load}"
    for text in dict.fromkeys(prompts):
        if cache and (pair := cache.find(makers, text)):
            found[text] = Contexts(*(context.to(networks.device) for context in pair))
    missing = [text for text in dict.fromkeys(prompts) if text not in found]
    if found:
        note(f"{len(found)} of {len(found) + len(missing)} prompts encoded in an earlier run")
    for text, contexts in zip(missing, _encode(networks, missing, note), strict=True):
        found[text] = contexts
        if cache:
            cache.keep(makers, text, (contexts.video, contexts.audio))
    return [found[text] for text in prompts]


def _encode(networks: Networks, prompts: Sequence[str], note: Note) -> list[Contexts]:
    if not prompts:
        return []
    features = _features(networks, _tokenize(networks, prompts, note))
    video = networks.video_connector().together([pair[0] for pair in features])
    audio = networks.audio_connector().together([pair[1] for pair in features])
    return [Contexts(*pair) for pair in zip(video, audio, strict=True)]


def _tokenize(networks: Networks, prompts: Sequence[str], note: Note) -> list[list[int]]:
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
    gathered = _gathered(networks, rows)  # and Gemma is gone
    features = networks.text_projection().project(gathered)
    if not all(bool(feature.isfinite().all()) for pair in features for feature in pair):
        raise CheckpointError(
            "the text encoder's features hold NaN: Gemma or the text projection is damaged, "
            "or float16 overflows in it; use --dtype bfloat16 or download them again"
        )
    return features


def _gathered(networks: Networks, rows: Sequence[list[int]]) -> list[Gathered]:
    gemma = networks.gemma()
    embedded = [gemma.embed(torch.tensor([ids])) for ids in rows]
    # The official code pads on the left to 1024: starting there gives its rotary rounding.
    firsts = [CONTEXT_LENGTH - len(ids) for ids in rows]
    gathered = gather(networks.projection_config(), gemma.together(embedded, firsts))
    place.close(gemma)
    return gathered
