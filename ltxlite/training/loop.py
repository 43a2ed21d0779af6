"""The loop that every network is trained in: steps, rates, checkpoints, going on after a kill."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ltxlite.errors import CheckpointError
from ltxlite.media.atomic import written_beside
from ltxlite.training.muon import Muon

_SAVE_SECONDS = 60.0
_NOTE_SECONDS = 15.0
_KEPT = 0.98  # of the running means that are shown
# Parameters whose rows are values of their own, no matrices. Muon moves the few rows of a gate so
# far that its sigmoid closes for good: sound and picture never found each other.
_ROWS = ("table", "registers", "to_gate_logits.weight")
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long and how fast a network learns.

    The rate rises over `warmup` steps, stays, and falls to nothing over the last `decay` of the
    steps; so a run can be given more or fewer steps while the rate still stays.
    matrix_rate: that of matrices and kernels, which Muon moves; 0 leaves them to AdamW.
    """

    steps: int
    rate: float
    warmup: int = 100
    decay: float = 0.4
    clip: float = 1.0
    matrix_rate: float = 0.0

    def share_at(self, step: int) -> float:
        """Return how much of the rates a step has, 0 to 1; steps count from 0."""
        begin = self.steps * (1 - self.decay)
        rising = min(1.0, (step + 1) / self.warmup)
        falling = (
            1.0
            if step < begin
            else 0.5
            + 0.5 * math.cos(math.pi * min(1.0, (step - begin) / max(1.0, self.steps - begin)))
        )
        return rising * falling

    def progress(self, step: int) -> float:
        """Return how much of the run is done, 0 to 1."""
        return step / self.steps


CPU = torch.device("cpu")


def narrow_products(device: torch.device) -> torch.autocast:
    """Return a context in which convolutions and products are computed from 16 bits."""
    return torch.autocast(device.type, torch.bfloat16)


class Loop:
    """Optimizes some networks on a device and keeps their state in a folder.

    networks: by name, as they stand in the state.  Chance comes from a generator on the CPU, so
    that a run sees the same clips everywhere.  In `FOLDER/NAME.state.safetensors` lie weights,
    Adam's moments, the step and the generator, written beside and then renamed, so that a killed
    run goes on at its last minute; `FOLDER/NAME.jsonl` keeps the curve.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        networks: Mapping[str, nn.Module],
        pace: Pace,
        device: torch.device = CPU,
    ) -> None:
        self.name, self.folder, self.pace, self.device = name, folder, pace, device
        self.networks = nn.ModuleDict(networks).to(device)
        self.parameters = {
            key: value for key, value in self.networks.named_parameters() if value.requires_grad
        }
        self.optimizers = _optimizers(self.parameters, pace)
        self.generator = torch.Generator().manual_seed(1)
        self.step = 0
        self._mean: dict[str, float] = {}
        self._noted = 0.0

    @property
    def path(self) -> Path:
        """The file of the state."""
        return self.folder / f"{self.name}.state.safetensors"

    def steps(self, note: Note, until: float = 1.0) -> Iterator[int]:
        """Yield the numbers of the steps that are left; call `learn` once in each.

        until: the share of the run to stop after; another loop may go on from there.
        What was saved is gone on with; the state is saved every minute and at the end.
        """
        self.resume(note)
        saved = time.monotonic()
        while self.pace.progress(self.step) < until:
            yield self.step
            if time.monotonic() - saved > _SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def learn(self, losses: Mapping[str, Tensor], note: Note) -> None:
        """Take one step down the sum of the losses."""
        total = torch.stack(list(losses.values())).sum()
        if not bool(total.isfinite()):
            raise CheckpointError(
                f"training {self.name}: the loss of step {self.step} is no number"
            )
        share = self.pace.share_at(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * optimizer.defaults["lr"]
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.pace.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self._follow(
            {key: float(value.detach()) for key, value in losses.items()}, float(norm), note
        )

    def save(self) -> None:
        """Write the state."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        with written_beside(self.path) as unfinished:
            save_file(self._state(), unfinished, {"pace": json.dumps(asdict(self.pace))})

    def resume(self, note: Note) -> None:
        """Go on with the state in the folder, if there is one."""
        if not self.path.is_file():
            return
        state = _read(self.path)
        weights = {key[2:]: value for key, value in state.items() if key.startswith("w.")}
        self.networks.load_state_dict(weights)
        self.step = int(state["step"])
        self.generator.set_state(state["generator"])
        for key, moments in self._moments():
            if f"m.{key}" not in state:
                continue
            moments["exp_avg"] = state[f"m.{key}"].to(self.device)
            if f"v.{key}" in state:
                moments["exp_avg_sq"] = state[f"v.{key}"].to(self.device)
                moments["step"] = torch.tensor(float(self.step), device=self.device)
        note(f"{self.name}: going on at step {self.step} of {self.pace.steps}")

    def _state(self) -> dict[str, Tensor]:
        state = {f"w.{key}": value for key, value in self.networks.state_dict().items()}
        for key, moments in self._moments():
            for letter, name in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                if name in moments:
                    state[f"{letter}.{key}"] = moments[name]
        state["step"] = torch.tensor(self.step)
        state["generator"] = self.generator.get_state()
        return {
            key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()
        }

    def _moments(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield what the optimizers keep of each parameter, by its name."""
        names = {value: key for key, value in self.parameters.items()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for value in group["params"]:
                    yield names[value], optimizer.state[value]

    def _follow(self, losses: Mapping[str, float], norm: float, note: Note) -> None:
        self._mean = {
            key: _KEPT * self._mean.get(key, value) + (1 - _KEPT) * value
            for key, value in losses.items()
        }
        now = time.monotonic()
        if now - self._noted < _NOTE_SECONDS and self.step < self.pace.steps:
            return
        self._noted = now
        shown = "  ".join(f"{key} {value:.4g}" for key, value in self._mean.items())
        note(f"{self.name} {self.step}/{self.pace.steps}  {shown}  |g| {norm:.2g}")
        line = {"step": self.step, **{k: round(v, 6) for k, v in self._mean.items()}}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _optimizers(parameters: Mapping[str, nn.Parameter], pace: Pace) -> list[torch.optim.Optimizer]:
    """Share parameters out: matrices go to Muon where the pace has a rate for them."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, value in parameters.items():
        mixes = value.ndim > 1 and not name.endswith(_ROWS)
        (matrices if mixes and pace.matrix_rate else rest).append(value)
    adam = torch.optim.AdamW(rest, lr=pace.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [Muon(matrices, pace.matrix_rate), adam] if matrices else [adam]


def trained(path: Path, name: str, network: nn.Module) -> None:
    """Load the weights of one network out of a loop's state; the network is frozen."""
    state = _read(path)
    prefix = f"w.{name}."
    weights = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    network.load_state_dict(weights)
    network.requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path}: no such state; train what comes before it first")
    tensors: dict[str, Tensor] = load_file(path)
    return tensors
