"""How much of a block must be there: low-rank factors of strength 0 are not read.

A dev checkpoint's first stage runs thirty steps with its distilled LoRA at 0, whose factors are
0.16 GB of each block. They lie at the end of a block's buffer, so that leaving them out is a
shorter copy, and a part of a file that is not read.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from ltxlite.low_rank import LowRankLinear

if TYPE_CHECKING:
    from ltxlite.memory.arena import Layout


def lateness(module: nn.Module) -> dict[str, int]:
    """Return names of tensors that belong behind all others, with their rank among those.

    Files that come first are last: a distilled LoRA is named before a user's own, and it is the
    one that some stages do without.
    """
    layers = _layers(module)
    sources = list(dict.fromkeys(source for _, layer in layers for source in layer.sources))
    return {
        f"{path}.{own}": len(sources) - sources.index(source)
        for path, layer in layers
        for own, source in _factors(layer).items()
    }


class Needed:
    """Follows the strengths of the low-rank terms in a list of blocks."""

    def __init__(self, modules: Sequence[nn.Module], layouts: Sequence["Layout"]) -> None:
        self._blocks = [_Block(*pair) for pair in zip(modules, layouts, strict=True)]
        self._layers = [layer for module in modules for _, layer in _layers(module)]
        self._strengths: list[list[float]] = []
        self._lengths = [block.length() for block in self._blocks]

    def lengths(self) -> list[int]:
        """Return of each block the bytes, from its buffer's beginning, that are read now."""
        # Asked once a step; 1632 layers of a LoRA take 0.3 ms to compare and 15 to look into.
        strengths = [list(layer.strengths) for layer in self._layers]
        if strengths != self._strengths:
            self._strengths = strengths
            self._lengths = [block.length() for block in self._blocks]
        return self._lengths


class _Block:
    """One block: the end of what it always needs, and of each low-rank term."""

    def __init__(self, module: nn.Module, layout: "Layout") -> None:
        late = lateness(module)
        # Each up to where the next one begins: the last field is padded like all others.
        begins = [item.offset for item in layout.fields]
        ends = dict(zip((f.name for f in layout.fields), [*begins[1:], layout.nbytes], strict=True))
        self._always = max((end for name, end in ends.items() if name not in late), default=0)
        # A factor that goes by another name, because two layers share it, needs all that there is.
        self._factors = [
            (layer, {own: ends.get(f"{path}.{own}", layout.nbytes) for own in _factors(layer)})
            for path, layer in _layers(module)
        ]

    def length(self) -> int:
        found = self._always
        for layer, ends in self._factors:
            if (idle := layer.idle()) != ends.keys():
                found = max(found, *(end for own, end in ends.items() if own not in idle))
        return found


def _layers(module: nn.Module) -> list[tuple[str, LowRankLinear]]:
    modules = module.named_modules()
    return [(path, layer) for path, layer in modules if isinstance(layer, LowRankLinear)]


def _factors(layer: LowRankLinear) -> dict[str, str]:
    """Return the buffers of the factors, and the file that each is from."""
    return {
        f"{factor}{number}": source
        for number, source in enumerate(layer.sources)
        for factor in "ab"
    }
