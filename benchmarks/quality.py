"""What each arithmetic costs in accuracy: a middle-sized transformer against itself in fp32.

Its matrices have heavy tails (Student's t with 4 degrees of freedom) and outlier channels, its
modulation has channels that are 30 times larger than others, as trained transformers do. The same
GGUF blocks are multiplied in every mode; errors are of the predicted velocities, both streams
together, against the weights before they were quantized, in fp32.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.harness import Case, Result, Row
from benchmarks.step import Size, random_pass, settings_of
from ltxlite.checkpoint.assemble import Naming
from ltxlite.linear import swap_linears
from ltxlite.math_mode import set_math
from ltxlite.models.attention import Attention
from ltxlite.models.settings import Settings
from ltxlite.models.transformer import FLOAT32, Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite_quant import FORMATS, QuantTensor
from ltxlite_quant.search import quantize

DESCRIPTION = "error of each arithmetic on a middle-sized transformer"
# Rows of 256 and 512, which K-quants need, and the released heads of 128 and 64.
SIZE = Size(3, 4, 128, 64, (5, 4, 6), 17, 40)
NAMES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")
MODES = ("bf16", "int8", "fp16")
SEEDS = (0, 1)
_OUTLIERS = 100  # one channel of so many
_ALL_KEYS = 1  # scores are int8 from so many keys: the smallest sequences too


@cache
def exact_model(seed: int, size: Size = SIZE) -> Transformer:
    """Draw a transformer in fp32."""
    config = TransformerConfig.from_settings(Settings(settings_of(size), "quality"))
    random = torch.Generator().manual_seed(seed)
    network = Transformer(config).requires_grad_(False).eval()
    for name, value in network.named_parameters():
        value.data = _drawn(name, value.shape, random)
    return network


def _drawn(name: str, shape: torch.Size, random: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=random)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if not name.endswith(".weight"):
        return 0.1 * noise * _outliers(shape[-1], 30.0, random)  # tables and biases
    if not name.startswith("blocks."):
        return noise / shape[-1] ** 0.5
    squares = torch.randn(4, *shape, generator=random).square().mean(0)
    tails = noise / squares.sqrt() / (2 * shape[-1]) ** 0.5  # variance 2 of t with 4 degrees
    return tails * _outliers(shape[-1], 4.0, random)


def _outliers(width: int, factor: float, random: torch.Generator) -> Tensor:
    found = torch.ones(width)
    found[torch.randperm(width, generator=random)[: width // _OUTLIERS]] = factor
    return found


def quantized_model(exact: Transformer, name: str) -> Transformer:
    """Return it in bf16, the matrices of its blocks as blocks of a format."""
    weights = {
        key: quantize(module.weight, FORMATS[name])
        for key, module in exact.named_modules()
        if key.startswith("blocks.") and isinstance(module, nn.Linear)
    }
    return _with_weights(exact, weights)


def _with_weights(exact: Transformer, weights: dict[str, QuantTensor]) -> Transformer:
    with torch.device("meta"):
        network = Transformer(exact.config)
    naming = Naming(float32=FLOAT32)
    swap_linears(network, weights)
    state = {
        key: value if naming.keeps_float32(key) else value.bfloat16()
        for key, value in exact.state_dict().items()
        if key.removesuffix(".weight") not in weights
    }
    network.load_state_dict(state, strict=False, assign=True)
    return network.requires_grad_(False).eval()


def outputs(network: Transformer, seed: int) -> Tensor:
    """Return both velocities, side by side."""
    with torch.inference_mode():
        velocity = network(random_pass(SIZE, torch.float32, seed))
    assert velocity.video is not None and velocity.audio is not None
    return torch.cat([velocity.video.flatten(), velocity.audio.flatten()])


@cache
def wanted(seed: int) -> Tensor:
    """Return what fp32 predicts."""
    return outputs(exact_model(seed), seed)


def errors(name: str, seed: int) -> dict[str, float]:
    """Return the relative error of each mode on the same blocks."""
    network, exact = quantized_model(exact_model(seed), name), wanted(seed)
    found = {}
    for mode in MODES:
        set_math(network, mode, None)
        for module in network.modules():
            if mode == "int8" and isinstance(module, Attention) and module.int8_from:
                module.int8_from = _ALL_KEYS
        found[mode] = float((outputs(network, seed) - exact).norm() / exact.norm())
    return found


def result_of(name: str) -> Result:
    """Measure a format: the largest of all draws."""
    case = Case(name, {"seeds": len(SEEDS), **SIZE.facts}, 0.0, tuple)
    measured = [errors(name, seed) for seed in SEEDS]
    for mode in MODES:
        case.figures[f"{mode}_error"] = max(one[mode] for one in measured)
    case.figures["int8_over_bf16"] = max(one["int8"] / one["bf16"] for one in measured)
    case.figures["fp16_over_bf16"] = max(one["fp16"] / one["bf16"] for one in measured)
    return Result(case, [Row("ltxlite")])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a format and, as the last line, JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks quality", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with targets.toml")
    parser.add_argument("--out", action="store_true", help="also keep the JSON under results/")
    options = parser.parse_args(arguments)
    results = [result_of(name) for name in NAMES]
    for result in results:
        line = ", ".join(f"{key} {value:.4f}" for key, value in result.case.figures.items())
        print(f"{result.case.name}: {line}", file=sys.stderr)
    document = report.as_json("quality", report.conditions("cpu", 1), results)
    return report.conclude(document, results, options.check, options.out)
