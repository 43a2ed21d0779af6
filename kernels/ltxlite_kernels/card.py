"""Which card a launch is for: what configurations are chosen by."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Card:
    """A card's compute capability, 86 for 8.6, and the number of its multiprocessors."""

    capability: int
    multiprocessors: int


INTERPRETED = Card(86, 28)  # what the interpreter pretends to be: an RTX 3060


def card_of(tensor: Tensor) -> Card:
    """Return the card on which a tensor lies; for one that lies on none an RTX 3060."""
    if not tensor.is_cuda:
        return INTERPRETED
    found = torch.cuda.get_device_properties(tensor.device)
    return Card(10 * found.major + found.minor, found.multi_processor_count)
