"""A small stack of blocks as checkpoints have them, its file, and the plain result."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ltxlite.linear import QuantLinear
from ltxlite.memory.arena import FileRange
from ltxlite_quant import FORMATS, QuantTensor

WIDTH = 33  # odd; 33 x 34 bytes of Q8_0 rows would want K % 32 == 0, so those take 64
QUANT = 64


class Layer(nn.Module):
    """fp32 and bf16, a quantized weight, a 0-dim, an empty and a non-contiguous buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.inner = nn.Linear(WIDTH, QUANT)
        self.outer = nn.Linear(QUANT, WIDTH, bias=False)
        codes = torch.randint(0, 256, (QUANT, QUANT // 32, 34), generator=random).to(torch.uint8)
        codes[..., :2] = torch.tensor([0.01], dtype=torch.half).view(torch.uint8)  # the scales
        self.packed = QuantLinear(QuantTensor(codes.flatten(1), FORMATS["Q8_0"], (QUANT, QUANT)))
        self.register_buffer("strength", torch.rand((), generator=random) + 0.5)
        self.register_buffer("nothing", torch.empty(0, 3, dtype=torch.int64))
        self.register_buffer("shift", torch.rand(WIDTH, generator=random).bfloat16())
        for linear in (self.inner, self.outer):
            for name, value in linear.named_parameters():
                drawn = torch.randn(value.shape, generator=random) / 8
                setattr(linear, name, nn.Parameter(drawn, requires_grad=False))
        self.register_buffer("gain", torch.rand(2 * WIDTH, generator=random)[::2])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.packed(self.inner(x).tanh())
        return x + self.outer(hidden) * (self.strength * self.gain) + self.shift


def layers(count: int) -> list[Layer]:
    return [Layer(seed) for seed in range(count)]


def given() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(99))


def run(blocks: Iterable[nn.Module], x: Tensor | None = None) -> Tensor:
    x = given() if x is None else x
    for block in blocks:
        x = block(x)
    return x


def plain(count: int, walks: int = 1) -> Tensor:
    """The oracle: the same layers, held in memory whole."""
    x = given()
    for _ in range(walks):
        x = run(layers(count), x)
    return x


def write(path: Path, blocks: list[Layer], but: tuple[str, ...] = ()) -> list[dict[str, FileRange]]:
    """Write tensors one after the other, oddly aligned; return where each of them stands."""
    origins: list[dict[str, FileRange]] = []
    with path.open("wb") as file:
        for block in blocks:
            found: dict[str, FileRange] = {}
            for name, value in block.state_dict().items():
                if name in but or not value.nbytes:
                    continue
                file.write(b"gap")
                raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                found[name] = FileRange(path, file.tell(), len(raw))
                file.write(raw)
            origins.append(found)
    return origins
