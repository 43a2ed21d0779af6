"""A whole block of LTX-2.3 at the size of a 1280x704 clip of 5 s: ours in each math mode, and bf16.

Weights are Q4_K, the same values for all. The rivals are the same block with its weights decoded
beforehand, cuBLAS in bf16 and torch's attention; and with weights that torch operations decode at
each use, as ComfyUI-GGUF does.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import kernels_torch_decode as torch_decode
from benchmarks.kernels_inputs import calm_q4_k
from benchmarks.kernels_run import Bench, Contender, Prepared, Trial, relative_error
from ltxlite.geometry import AudioGrid, LatentGrid, audio_positions, video_positions
from ltxlite.linear import swap_linears
from ltxlite.math_mode import capability_of, set_math
from ltxlite.models.layers import TOKEN_CHUNK
from ltxlite.models.passes import Pass, StreamInput, Timesteps
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import StreamConfig, TransformerConfig
from ltxlite_kernels.dispatch import Math
from ltxlite_quant import FORMATS, QuantTensor, decode

# Of what a block adds to the residual stream, against the same weights in float32: bf16 rounds
# every result on the way; int8 each input of a product by .01 besides, scores of attention too.
ALLOWED = {Math.BF16: 0.03, Math.FP16: 0.03, Math.INT8: 0.06}
WHOLE = 1 << 30  # tokens at a time: rivals work on all of them
TEXT = 1024
SIGMA = 0.725


def blocks(small: bool) -> Iterator[Trial]:
    """Yield the one trial."""
    latent = (2, 3, 5) if small else (16, 22, 40)
    tokens = latent[0] * latent[1] * latent[2]
    facts = {"video_tokens": tokens, "audio_tokens": 126, "format": "Q4_K"}
    yield Trial(f"block {tokens} tokens", "block", facts, partial(_block, latent))


def _config(small: bool) -> TransformerConfig:
    video, audio = (128, 64) if not small else (128, 128)
    heads = 2 if small else 32
    return TransformerConfig(
        video=StreamConfig(128, 128, heads, video, heads * video, (20, 2048, 2048)),
        audio=StreamConfig(128, 128, heads, audio, heads * audio, (20,)),
        layers=1,
        cross_width=heads * audio,
    )


def _block(latent: tuple[int, int, int], bench: Bench) -> Prepared:
    config = _config(bench.small)
    weights = _weights(config, bench)
    network = _network(config, bench, torch.bfloat16)
    given = _pass(config, latent, bench)
    state = network.begin(given)
    before = [stream.x.clone() for stream in (state.video, state.audio) if stream is not None]

    def run(which: Transformer, chunk: int, _: int) -> list[Tensor]:
        copied = replace(state.copied(), chunk=chunk)
        which.blocks[0](copied, 0)
        return [stream.x for stream in (copied.video, copied.audio) if stream is not None]

    plain = _with_linears(network, lambda name, bias: _plain(weights[name], bias, torch.bfloat16))
    wanted = _wanted(network, weights, given) if bench.small else run(plain, WHOLE, 0)

    def error(after: list[Tensor]) -> float:
        pairs = zip(after, wanted, before, strict=True)
        return max(relative_error(a.double() - c, b.double() - c) for a, b, c in pairs)

    found = list(_ours(network, weights, bench, run))
    slack = ALLOWED[Math.BF16]
    found.append(Contender("bf16 cuBLAS + SDPA", partial(run, plain, WHOLE), slack))
    theirs = _with_linears(network, lambda name, bias: _TorchDecoded(weights[name], bias))
    found.append(Contender("torch ops + cuBLAS + SDPA", partial(run, theirs, WHOLE), slack))
    return Prepared(found, error)


def _ours(
    network: Transformer,
    weights: dict[str, QuantTensor],
    bench: Bench,
    run: Callable[[Transformer, int, int], list[Tensor]],
) -> Iterator[Contender]:
    capability = capability_of(torch.device(bench.device))
    # fp8 is for files that hold it; with these weights it means int8.
    for mode in (Math.INT8, Math.FP16, Math.BF16):
        ours = _copy(network)
        swap_linears(ours, weights)
        set_math(ours, mode.value, capability)
        yield Contender(
            f"ltxlite {mode.value}", partial(run, ours, TOKEN_CHUNK), ALLOWED[mode], ours=True
        )


def _weights(config: TransformerConfig, bench: Bench) -> dict[str, QuantTensor]:
    """Return all linears of the block as Q4_K."""
    with torch.device("meta"):
        network = Transformer(config)
    found: dict[str, QuantTensor] = {}
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear) or not name.startswith("blocks."):
            continue
        shape = (module.weight.shape[0], module.weight.shape[1])
        blocks_ = calm_q4_k(bench, shape, seed=len(found))
        found[name] = QuantTensor(blocks_, FORMATS["Q4_K"], shape)
    return found


def _network(config: TransformerConfig, bench: Bench, dtype: torch.dtype) -> Transformer:
    """Return the network with small random numbers; the block's matrices stay on meta."""
    with torch.device("meta"):
        network = Transformer(config).to(dtype).eval()
    linears = {id(m.weight) for m in network.blocks.modules() if isinstance(m, nn.Linear)}
    for name, value in list(network.named_parameters()):
        if id(value) in linears:
            continue
        owner = network.get_submodule(name.rpartition(".")[0])
        seed = sum(name.encode())
        made = bench.normal(*value.shape, seed=seed, dtype=dtype) * value.shape[-1] ** -0.5
        if name.endswith("norm.weight"):
            made = 1 + made
        setattr(owner, name.rpartition(".")[2], nn.Parameter(made, requires_grad=False))
    return network


def _with_linears(
    network: Transformer, make: Callable[[str, Tensor | None], nn.Module]
) -> Transformer:
    """Return a copy whose block has other linears; `make` is given a name and its bias."""
    changed = _copy(network)
    for name, module in list(changed.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            parent, _, child = name.rpartition(".")
            setattr(changed.get_submodule(parent), child, make(name, module.bias))
    return changed


def _copy(network: Transformer) -> Transformer:
    """Return other modules around the same parameters."""
    return copy.deepcopy(network, {id(one): one for one in network.parameters()})


def _plain(weight: QuantTensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    values = decode.dequantize(weight.blocks, weight.format, weight.shape, dtype)
    linear.weight = nn.Parameter(values, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear


class _TorchDecoded(nn.Module):
    """A Linear whose weight torch operations decode at each use."""

    def __init__(self, weight: QuantTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.weight.shape[0], self.weight.shape[1])
        return F.linear(x, torch_decode.decoded("Q4_K", self.weight.blocks, shape), self.bias)


def _wanted(network: Transformer, weights: dict[str, QuantTensor], given: Pass) -> list[Tensor]:
    """Return what the block makes in float32, from the same state."""
    exact = _with_linears(network, lambda name, bias: _plain(weights[name], bias, torch.float32))
    exact = copy.deepcopy(exact).float()
    state = network.begin(given)
    for stream in (state.video, state.audio):
        assert stream is not None
        stream.x, stream.context = stream.x.float(), stream.context.float()
    exact.blocks[0](state, 0)
    return [stream.x for stream in (state.video, state.audio) if stream is not None]


def _pass(config: TransformerConfig, latent: tuple[int, int, int], bench: Bench) -> Pass:
    sound = 17 if bench.small else 126
    positions = (video_positions(latent, 24.0, LatentGrid()), audio_positions(sound, AudioGrid()))
    streams: list[StreamInput] = []
    for seed, (where, stream) in enumerate(
        zip(positions, (config.video, config.audio), strict=True)
    ):
        level = torch.tensor([SIGMA], device=bench.device)
        index = torch.zeros(1, 1, dtype=torch.long, device=bench.device)
        text = 40 if bench.small else TEXT
        streams.append(
            StreamInput(
                latent=bench.normal(1, where.shape[2], stream.channels, seed=seed),
                sigma=level,
                timesteps=Timesteps(level, index),
                positions=where.to(bench.device),
                context=bench.normal(1, text, stream.context, seed=10 + seed),
            )
        )
    return Pass(streams[0], streams[1])
