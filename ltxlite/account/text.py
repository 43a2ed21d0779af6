"""The account of the text path: Gemma, the projection of its states, the connectors."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ltxlite.account.phase import Blank, Components, Levers, Phase, blank, metered
from ltxlite.memory.blank import stored_bytes
from ltxlite.models.connector import Connector
from ltxlite.models.gemma import Gemma
from ltxlite.models.gemma_config import GemmaConfig
from ltxlite.models.layers import RowPieces
from ltxlite.models.text_projection import TextProjection, gather
from ltxlite.pieces import cut_linears

_CONNECTORS = ("video_connector", "audio_connector")


def text_phases(components: Components, prompts: Sequence[int], levers: Levers) -> list[Phase]:
    """Return the phases from prompts of so many tokens to contexts."""
    encoder = blank("text_encoder", components["text_encoder"], _gemma, levers.dtype)
    projection = _projection(components, levers)
    connectors = [blank(name, components[name], Connector, levers.dtype) for name in _CONNECTORS]
    width = encoder.network.config.hidden
    embedded = [torch.empty(1, count, width, dtype=levers.dtype) for count in prompts]
    found: list[Phase] = []
    with torch.inference_mode(), metered(levers) as meter:
        config = projection.network.config
        gathered = gather(config, _all_states(encoder.network, config.states, embedded))
        found.append(encoder.phase("encode prompt", meter))
        features = projection.network.project(gathered)
        found.append(projection.phase("project prompt", meter))
        contexts = []  # those of the picture are kept while those of the sound are made
        for place, connector in enumerate(connectors):
            contexts.append(connector.network.together([pair[place] for pair in features]))
            found.append(connector.phase(connector.component.replace("_", " "), meter))
    return found


def _gemma(config: GemmaConfig) -> Gemma:
    # Both kinds of layers do the same work; the table stays on the host.
    return Gemma(replace(config, global_layers=(0,), vocabulary=1))


def _all_states(gemma: Gemma, total: int, embedded: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield as many states as the whole encoder has, from a few of its layers."""
    states: list[Tensor] = []
    count = 0
    for states in gemma.together(embedded, [0] * len(embedded)):
        count += 1
        yield states
    for _ in range(total - count):
        yield states


def _projection(components: Components, levers: Levers) -> Blank[TextProjection]:
    name = "text_projection"
    made: Blank[TextProjection] = blank(name, components[name], TextProjection, levers.dtype)
    network = made.network
    cut_linears(network, [child for child, _ in network.named_children()])
    cut = [module for module in network.children() if isinstance(module, RowPieces)]
    units = tuple(stored_bytes(piece) for module in cut for piece in module.pieces)
    return Blank(name, network, made.fixed_bytes - sum(units), units)
