"""Identity guidance: away from how a clip would sound without the voice that it is given.

Source: ComfyUI nodes_lt.py LTXVReferenceAudio (ID-LoRA); features.md G7.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ltxlite.sampling.schedules import denoise_of_sigma

_LEAST = 1e-9  # noise levels have a place in the schedule from here on


@dataclass(frozen=True, slots=True)
class Identity:
    """How strongly, and in which part of the schedule.

    scale: 0 is off, and costs no pass.  begin, end: places in the schedule, 0 to 1, as ComfyUI
    counts them: at 0.2 sigma is 0.977, at 0.9 it is 0.543.
    """

    scale: float
    begin: float = 0.0
    end: float = 1.0

    def active(self, sigma: float) -> bool:
        """Tell whether it leads at a noise level."""
        place = 1 - denoise_of_sigma(max(sigma, _LEAST))
        return self.scale != 0 and self.begin <= place <= self.end

    def led(self, guided: Tensor, cond: Tensor, unvoiced: Tensor) -> Tensor:
        """Return a guided prediction (B, T, C) led on by what the voice changes of `cond`.

        unvoiced: (B, t, C), the prediction without the voice's tokens, which are the last ones.
        """
        heard = unvoiced.shape[1]
        change = self.scale * (cond[:, :heard] - unvoiced)
        return torch.cat([guided[:, :heard] + change, guided[:, heard:]], dim=1)
