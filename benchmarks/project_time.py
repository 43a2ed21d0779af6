"""From work and cards to seconds: of a transformer step and of a clip, term by term.

A device does one thing after the other; weights arrive meanwhile and the host runs ahead:
a step takes max(sum of the device's terms, bus, host). Every number here is a projection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from benchmarks import project_work as work
from benchmarks.project_cards import RATES, Card, Efficiency, Measurement, efficiency
from benchmarks.project_issue import Bound, Speed, bound_of, read_compiled
from benchmarks.project_work import Convolving, Tokens
from benchmarks.traffic import SHAPE, block_traffic
from benchmarks.vram import Setup
from ltxlite.geometry import ClipShape
from ltxlite.linear import SCRATCH_BYTES
from ltxlite.planning import LADDER
from ltxlite.sampling.schedules import TABLES
from ltxlite_kernels import configs
from ltxlite_quant.formats import FORMATS


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to compute a transformer.

    matmul, attention: kinds of work, of `project_cards.RATES`.  value_bytes: of a decoded weight's
    element.  decoding: "torch", "one pass", or "none": the file holds what is multiplied.
    code: whose elementwise code runs, as `elementwise` knows it.  chunk: rows that are computed at
    a time, with weights decoded anew for each chunk; 0 for all.
    """

    name: str
    matmul: str
    attention: str
    value_bytes: int
    decoding: str = "one pass"
    code: str = "bf16"
    chunk: int = LADDER[0][0]  # what plans take on a card of 8 GB

    def uses(self, rows: int) -> int:
        """Return how often a weight is decoded for so many rows."""
        return -(-rows // self.chunk) if self.chunk else 1


MODES = (
    Mode("comfyui-gguf", "matmul bf16", "attention bf16", 2, "torch", "eager", chunk=0),
    Mode("bf16", "matmul bf16", "attention bf16", 2, code="bf16"),
    Mode("fp16", "matmul fp16", "attention bf16", 2, code="fp16"),
    Mode("int8", "matmul int8", "attention int8", 1, code="int8"),
    Mode("fp8", "matmul fp8", "attention int8", 1, decoding="none", code="int8"),
)


@dataclass(frozen=True, slots=True)
class Elementwise:
    """What a block does besides products: bytes of a token 4096 wide, kernels of both streams."""

    token_bytes: float
    kernels: int
    source: str


EAGER = Elementwise(1.775e6, 244, "kernels.md 0: diffusers' block, middle of both counts")


@cache
def elementwise(code: str) -> Elementwise:
    """Return what elementwise code costs: torch's own ("eager"), or ours in an arithmetic."""
    if code == "eager":
        return EAGER
    tally = block_traffic(code)
    launches = sum(tally.of(stream, "elementwise", "attention") for stream in ("video", "audio"))
    moved = tally.nbytes["elementwise"] / SHAPE.video_tokens
    return Elementwise(moved, launches, f"benchmarks traffic, {code}")


# Assumed. A kernel begins and ends with the card half idle; the host needs a while to start one.
GAP_SECONDS = 1.5e-6
ENQUEUE_SECONDS = 8e-6
# VRAM that is not for resident blocks: context, activations, two slots, desktop. An assumption.
RESERVED_BYTES = 4e9
# Of fp32 without tensor cores, in the vocoder's convolutions. An assumption.
FP32_EFFICIENCY = 0.4


@dataclass(slots=True)
class Step:
    """Seconds of a forward pass: terms of the device, in turn; bus and host, beside them."""

    terms: dict[str, float] = field(default_factory=dict)
    bus: float = 0.0
    host: float = 0.0

    @property
    def device(self) -> float:
        """Seconds that the device computes."""
        return sum(self.terms.values())

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return max(self.device, self.bus, self.host)

    @property
    def limit(self) -> str:
        """Name what the step waits for."""
        return max((self.device, "device"), (self.bus, "bus"), (self.host, "host"))[1]


@dataclass(frozen=True, slots=True)
class Machine:
    """A card with the efficiencies that are taken for it."""

    card: Card
    measurements: Sequence[Measurement] = ()
    compiled: Mapping[str, Mapping[str, object]] = field(default_factory=read_compiled)
    resident: float | None = None

    def efficiency(self, kind: str, rows: int = 14080) -> Efficiency:
        """Return the part of a peak that a kind of work reaches; rows: of its products."""
        return efficiency(self.card, kind, self.measurements, self._bound(kind, rows))

    def rate(self, kind: str, rows: int = 14080) -> float:
        """Return operations or bytes a second."""
        return self.card.peak(RATES[kind]) * self.efficiency(kind, rows).value

    def _bound(self, kind: str, rows: int) -> Bound | None:
        """Return what our compiled code allows; None for other work and for libraries."""
        found = self._kernel(kind, rows)
        if found is None:
            return None
        kernel, warps = found
        macs = self.card.peak(RATES[kind]) / 2
        speed = Speed(macs, self.card.multiprocessors, self.card.boost_ghz * 1e9)
        return bound_of(self.compiled, f"{kernel} sm_{self.card.architecture}", warps, speed)

    def _kernel(self, kind: str, rows: int) -> tuple[str, int] | None:
        """Return the kernel of ours that does a kind of work, as specimens name it, and its warps.

        Of large products and long sequences: the largest tiles.
        """
        architecture = self.card.architecture
        does, _, name = kind.partition(" ")
        if kind == "attention int8" and architecture in configs.ATTENTION[name]:
            tiles = configs.ATTENTION[name][architecture][128, False][0]
            return f"attend {name} 128 {tiles.queries}x{tiles.keys} whole", tiles.warps
        if does != "matmul" or name not in configs.MATMUL:
            return None
        for least, config in configs.MATMUL[name].get(architecture, ()):
            if rows >= least:
                return f"matmul_{name} {least}+ plain", config.warps
        return None

    def streamed(self, nbytes: float) -> float:
        """Return how many of a network's bytes cross the bus at each use."""
        if self.resident is not None:
            return nbytes * (1 - self.resident)
        return max(0.0, nbytes - max(0.0, self.card.vram_gb * 1e9 - RESERVED_BYTES))


def forward(machine: Machine, mode: Mode, tokens: Tokens, block_format: str = "Q4_K") -> Step:
    """Return the seconds of one forward pass of the transformer."""
    products, memory = work.products(tokens), machine.rate("memory")
    step = Step()
    step.terms["linear"] = sum(_product(machine, mode, one) for one in products)
    rate = machine.rate(mode.attention)
    step.terms["attention"] = sum(one.flops for one in work.mixings(tokens)) / rate
    elements = sum(one.elements for one in products)
    packed = 1.0 if mode.decoding == "none" else FORMATS[block_format].bits_per_element / 8
    decoded = sum(one.elements * mode.uses(one.rows) for one in products)
    each = _decoded_bytes(mode, block_format)
    step.terms["dequantize"] = decoded * each / _decode_rate(machine, mode)
    code = elementwise(mode.code)
    layers = products[0].count
    wide = tokens.video + tokens.audio / 2  # a token of sound has half the width
    step.terms["elementwise"] = wide * code.token_bytes * layers / memory
    launches = layers * code.kernels + _launches(mode, products, block_format)
    step.terms["gaps"] = launches * GAP_SECONDS
    step.host = launches * ENQUEUE_SECONDS
    step.bus = machine.streamed(elements * packed) / (machine.card.bus_gbs * 1e9)
    return step


def _product(machine: Machine, mode: Mode, product: work.Product) -> float:
    """Return seconds: of the tensor cores, or where rows are few of memory."""
    rows, features, columns = product.rows, product.features, product.columns
    computed = product.flops / machine.rate(mode.matmul, min(rows, mode.chunk or rows))
    weights = features * mode.uses(rows)
    each = (weights + rows) * columns * mode.value_bytes + rows * features * 2
    return max(computed, each * product.count / machine.rate("memory"))


def _decoded_bytes(mode: Mode, block_format: str) -> float:
    """Return the bytes that decoding an element moves."""
    if mode.decoding == "none":
        return 0.0
    if mode.decoding == "torch":
        return work.torch_decoding(block_format).bytes_per_element
    return FORMATS[block_format].bits_per_element / 8 + mode.value_bytes


def _decode_rate(machine: Machine, mode: Mode) -> float:
    return machine.rate("dequant" if mode.decoding == "one pass" else "memory")


def _launches(mode: Mode, products: Sequence[work.Product], block_format: str) -> int:
    """Return the kernels of all linears and attentions."""
    total = 0
    for one in products:
        decoding, pieces = 0, 1
        if mode.decoding == "torch":
            decoding = work.torch_decoding(block_format).kernels
        elif mode.decoding == "one pass":
            pieces = -(-one.features * one.columns * mode.value_bytes // SCRATCH_BYTES)
            decoding = pieces
        total += one.count * mode.uses(one.rows) * (decoding + pieces)
    return total + 6 * products[0].count


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip's seconds: parts in their order, the step of each stage, their numbers of steps."""

    parts: Mapping[str, float]
    steps: Sequence[Step]
    counts: Sequence[int]
    tokens: Sequence[Tokens]

    @property
    def seconds(self) -> float:
        """Seconds of the whole clip, warm: weights are in RAM."""
        return sum(self.parts.values())


def clip(machine: Machine, mode: Mode, size: tuple[int, int, int], block_format: str) -> Clip:
    """Return the seconds of a distilled clip in two stages.

    size: width, height, frames.
    """
    shapes = [stage.shape for stage in Setup(size, "Q4_K_M", 2).job().stages]
    counts = [len(TABLES[name]) - 1 for name in ("distilled", "stage2")]
    tokens = [Tokens(shape.video_tokens, shape.audio_frames) for shape in shapes]
    steps = [forward(machine, mode, one, block_format) for one in tokens]
    parts = {"text": _text(machine, mode, block_format)}
    for number, (step, count) in enumerate(zip(steps, counts, strict=True), start=1):
        parts[f"stage {number}"] = step.seconds * count
        if number == 1:
            parts["upscale"] = _convolved(machine, work.upscaling(shapes[0]))
    parts["picture"] = _convolved(machine, work.picture(shapes[1]))
    parts["sound"] = _sound(machine, shapes[1])
    return Clip(parts, steps, counts, tokens)


def _text(machine: Machine, mode: Mode, block_format: str) -> float:
    """Return seconds of the text path, in bf16 everywhere: its weights all cross the bus once."""
    text = work.text()
    computed = sum(text.flops.values()) / machine.rate("matmul bf16")
    elements = sum(text.elements.values())
    packed = FORMATS[block_format].bits_per_element / 8
    plain = mode if mode.decoding != "none" else MODES[1]
    moved = elements * _decoded_bytes(plain, block_format) / _decode_rate(machine, plain)
    return max(computed + moved, elements * packed / (machine.card.bus_gbs * 1e9))


def _convolved(machine: Machine, done: Convolving) -> float:
    rate = machine.rate("convolution bf16")
    return done.flops / rate + done.nbytes / machine.rate("memory") + done.kernels * GAP_SECONDS


def _sound(machine: Machine, shape: ClipShape) -> float:
    done = work.sound(shape.audio_frames)
    computed = done.flops / (machine.card.fp32 * FP32_EFFICIENCY)
    device = computed + done.nbytes / machine.rate("memory") + done.kernels * GAP_SECONDS
    return max(device, done.kernels * ENQUEUE_SECONDS)
