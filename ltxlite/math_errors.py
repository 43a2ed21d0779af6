"""Which layers int8 arithmetic hurts: measured on real activations, kept as a small JSON file.

`ltxlite calibrate --math-errors FILE` writes it, `generate --exact FILE` leaves the layers that are
off by more than a limit in bf16.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ltxlite.arithmetic import Int8, Operands
from ltxlite.checkpoint.config import parse_json
from ltxlite.errors import RequestError
from ltxlite.linear import QuantLinear
from ltxlite.low_rank import LowRankLinear
from ltxlite.math_mode import as_stored
from ltxlite.media.atomic import written_beside
from ltxlite.models.activation import Activation
from ltxlite.models.transformer import Transformer

# Relative error of a layer's outputs from which it stays in bf16. Q4_K alone is off by 7 %, and
# int8 with rotation adds about 1 % on every kind of activation that was tried (kernels/README.md).
LIMIT = 0.03
_ROWS, _CALLS = 64, 8  # rows of so many calls of each layer are compared
_KIND, _VERSION = "ltxlite_math_errors", 1
_FILE_LIMIT = 4 << 20  # bytes; 48 blocks have 1600 linears


class MathErrors:
    """Running sums of what int8 products are off by, and of the products, by layer."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # squares of errors and of products, fp64
        self._calls: dict[str, int] = {}

    def watch(self, network: Transformer) -> None:
        """Compare every linear of the blocks from now on, for as long as the network lives."""
        for number, block in enumerate(nn.ModuleList.children(network.blocks)):
            for name, module in block.named_modules():
                inside = name.endswith(".base")
                if isinstance(module, nn.Linear | QuantLinear | LowRankLinear) and not inside:
                    layer = f"blocks.{number}.{name}"
                    module.register_forward_pre_hook(partial(self._compare, layer))

    def taken(self) -> dict[str, float]:
        """Return the relative error of each layer so far."""
        return {
            name: float((total[0] / total[1].clamp(min=1e-300)).sqrt())
            for name, total in self._sums.items()
        }

    def _compare(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._calls[name] = self._calls.get(name, 0) + 1
        if self._calls[name] > _CALLS:
            return
        base = module.base if isinstance(module, LowRankLinear) else module
        assert isinstance(base, nn.Linear | QuantLinear)
        linear = base if isinstance(base, QuantLinear) else as_stored(base)
        x = inputs[0].detach().flatten(0, -2)[:_ROWS]
        exact = torch.nn.functional.linear(x.float(), linear.decoded(torch.float32))
        kept, linear.scales = linear.scales, None
        found = Int8().multiply(Operands(Activation(x[None]), None, linear.out_features), linear)
        linear.scales = kept
        sums = torch.stack([(found[0].float() - exact).square().sum(), exact.square().sum()])
        self._sums[name] = self._sums.get(name, 0.0) + sums.double()


def write_errors(path: Path, errors: Mapping[str, float]) -> None:
    """Write what was measured; the file appears under its name when it is complete."""
    document = {_KIND: _VERSION, "errors": dict(sorted(errors.items()))}
    with written_beside(path) as unfinished:
        unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def exact_layers(path: Path, limit: float = LIMIT) -> tuple[str, ...]:
    """Return the layers of a file that are off by more than a limit, by name.

    Raises RequestError for a file that is something else.
    """
    if not path.is_file():
        raise RequestError(
            f"--exact {path}: no such file; `ltxlite calibrate --math-errors` makes it"
        )
    if path.stat().st_size > _FILE_LIMIT:
        raise RequestError(f"--exact {path}: {path.stat().st_size} bytes, wanted a list of layers")
    document = parse_json(path.read_text(encoding="utf-8", errors="replace"), f"--exact {path}")
    errors = document.get("errors")
    if document.get(_KIND) != _VERSION or not isinstance(errors, dict):
        raise RequestError(f"--exact {path}: not a list that `calibrate --math-errors` wrote")
    if wrong := [name for name, value in errors.items() if not isinstance(value, int | float)]:
        raise RequestError(f"--exact {path}: {wrong[0]!r:.60} has no number for an error")
    return tuple(sorted(name for name, value in errors.items() if not value <= limit))
