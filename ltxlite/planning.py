"""From a request and a budget to a plan: where blocks live, how large chunks and windows are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from ltxlite.account import Levers, components_of, job_of, phases, text_phases
from ltxlite.checkpoint.lora import Lora
from ltxlite.errors import BudgetError, RequestError
from ltxlite.geometry import ClipShape, size_multiple
from ltxlite.math_mode import capability_of
from ltxlite.memory.budget import Budget
from ltxlite.memory.machine import CpuMachine, CudaMachine
from ltxlite.memory.place import Memory
from ltxlite.memory.plan import Need, Plan, fit
from ltxlite.models.layers import TOKEN_CHUNK
from ltxlite.models.rolling import GROUP_BYTES
from ltxlite.models.tiling import Span, Tiling
from ltxlite.models.window import DecodeWindow, choose_window, classical_window, narrower
from ltxlite.networks import Networks
from ltxlite.request import Request
from ltxlite.stage_shapes import stage_shape

# Chunks are halved until the job fits: each time the largest temporary halves. Every chunk decodes
# the block's weights again, 5 % of an RTX 3060's time for a product of 1.8k to 3.1k tokens, of a
# 4090's for 4.2k to 7.2k (kernels.md 5). Below 256 rows there is nothing left to gain.
LADDER = (
    (4 * TOKEN_CHUNK, GROUP_BYTES),
    (2 * TOKEN_CHUNK, GROUP_BYTES),
    *((TOKEN_CHUNK >> step, GROUP_BYTES >> step) for step in range(4)),
)
RUNGS = len(LADDER)  # how often a job is tried again when memory runs out
_SMALLER = tuple(Fraction(eighths, 8) for eighths in (7, 6, 5, 4, 3, 2))


@dataclass(frozen=True, slots=True)
class JobPlan:
    """A plan of where weights live, the chunks it was made for, how the picture is decoded."""

    plan: Plan
    levers: Levers
    window: DecodeWindow
    has_picture: bool = True

    def memory(self, device: torch.device) -> Memory:
        """Return where networks are to put their blocks."""
        machine = CudaMachine(device) if device.type == "cuda" else CpuMachine()
        return Memory(machine, self.plan.placements, self.levers.chunk)

    def lines(self) -> list[str]:
        """Return the plan as text."""
        if not self.has_picture:
            return [*self.plan.lines(), f"{self.levers.chunk} tokens at a time"]
        window = self.window.group_bytes >> 20
        text = f"{self.levers.chunk} tokens, and {window} MiB of frames, at a time"
        if not self.window.is_whole:
            text += "; the picture is decoded in tiles, which blends their borders"
        return [*self.plan.lines(), text]


def plan_job(
    networks: Networks,
    request: Request,
    budget: Budget,
    loras: Sequence[Lora] = (),
    rung: int = 0,
) -> JobPlan:
    """Plan a request on the user's files; reads headers only.

    rung: how often memory ran out: so many sizes of chunks are left out, and each time an eighth
    of the budget.
    Raises BudgetError, with the nearest requests that would fit.
    """
    error = None
    budget = replace(budget, vram=int(budget.vram * 0.875**rung))
    planner = _Planner(networks, request, budget, loras)
    base = Levers(networks.dtype, math=networks.math, capability=capability_of(networks.device))
    for chunk, group_bytes in LADDER[min(rung, RUNGS - 1) :]:
        levers = replace(base, chunk=chunk, group_bytes=group_bytes)
        try:
            return planner.fitted(request, levers)
        except BudgetError as found:
            error = found
    nearest = list(planner.nearest(request, levers))
    advice = f"; {' or '.join(nearest)} would fit" if nearest else ""
    raise BudgetError(f"{error}{advice}") from None


class _Planner:
    """Fits variants of one request into one budget; what they share is counted once."""

    def __init__(
        self, networks: Networks, request: Request, budget: Budget, loras: Sequence[Lora]
    ) -> None:
        self._networks, self._budget = networks, budget
        self._components = components_of(networks, loras)
        prompts = job_of(request, networks).prompts
        self._text = text_phases(self._components, prompts, Levers(networks.dtype))

    def fitted(self, request: Request, levers: Levers) -> JobPlan:
        """Return the plan of a request. Raises BudgetError, or RequestError for its size."""
        job = job_of(request, self._networks)
        found = phases(self._components, job, levers, self._text)
        if not request.picture:
            needs = beside_transformer([phase.need() for phase in found])
            window = DecodeWindow(levers.group_bytes)
            return JobPlan(fit(needs, self._budget), levers, window, has_picture=False)
        *needs, decode = [phase.need() for phase in found]
        window = window_of(self._networks, request, levers.group_bytes)
        if window.is_classical:
            decode = replace(decode, activations=window.need_bytes * 21 // 20)
        elif decode.least() > self._budget.usable:
            room = self._budget.usable - decode.fixed - decode.workspace
            latents, itemsize = _extent(job.stages[-1].shape), levers.dtype.itemsize
            window = choose_window(self._networks.video_config(), latents, room, itemsize)
            decode = replace(decode, activations=window.need_bytes)
        return JobPlan(fit([*beside_transformer(needs), decode], self._budget), levers, window)

    def nearest(self, request: Request, levers: Levers) -> Iterator[str]:
        """Name the largest smaller size, and the largest smaller length, that fit."""
        for variants in (_smaller_sizes, _shorter) if request.picture else (_shorter,):
            for candidate, text in variants(self._networks, request):
                try:
                    self.fitted(candidate, levers)
                except (BudgetError, RequestError):
                    continue
                yield text
                break


def window_of(networks: Networks, request: Request, group_bytes: int) -> DecodeWindow:
    """Return how a request wants its picture decoded: in one piece, or in the classical tiles."""
    tiles = request.output.tiles
    if tiles is None:
        return DecodeWindow(group_bytes)
    spans = Span(tiles.size, tiles.overlap), Span(tiles.frames, tiles.frames_overlap)
    tiling = Tiling.auto(request.height, request.width, *spans)
    latents = _extent(stage_shape(request, request.stages[-1], networks))
    itemsize = networks.dtype.itemsize
    return classical_window(networks.video_config(), latents, tiling, group_bytes, itemsize)


def smaller_window(networks: Networks, latents: tuple[int, int, int]) -> DecodeWindow:
    """Return a window that needs less than the present one. Raises BudgetError if none does.

    latents: frames, rows and columns of the clip.
    """
    itemsize = networks.dtype.itemsize
    return narrower(networks.video_config(), latents, networks.window, itemsize)


def _extent(shape: ClipShape) -> tuple[int, int, int]:
    return shape.frames, shape.rows, shape.columns


def beside_transformer(needs: Sequence[Need]) -> list[Need]:
    """Let what runs between the first stage and the last find the transformer still there."""
    stages = [place for place, need in enumerate(needs) if need.component == "transformer"]
    transformer = next(needs[place] for place in stages if needs[place].units)
    found = list(needs)
    for place in range(stages[0], stages[-1] + 1):
        need = needs[place]
        found[place] = replace(need, units=transformer.units)
        if need.component != "transformer":
            fixed = need.fixed + transformer.fixed
            found[place] = replace(found[place], component="transformer", fixed=fixed, rests=True)
    return found


def _smaller_sizes(networks: Networks, request: Request) -> Iterator[tuple[Request, str]]:
    step = size_multiple([stage.fraction for stage in request.stages], networks.latent_grid().space)
    for share in _SMALLER:
        width, height = (
            max(step, int(size * share) // step * step) for size in (request.width, request.height)
        )
        yield replace(request, width=width, height=height), f"--size {width}x{height}"


def _shorter(networks: Networks, request: Request) -> Iterator[tuple[Request, str]]:
    grid = networks.latent_grid()
    for share in _SMALLER:
        frames = max(grid.time + 1, int(request.frames * share))
        frames = grid.snap_frames(frames) if request.picture else frames
        if frames < request.frames:
            shorter = replace(request, frames=frames)
            length = f"--frames {frames}" if request.picture else f"--seconds {shorter.seconds:.2f}"
            yield shorter, length
