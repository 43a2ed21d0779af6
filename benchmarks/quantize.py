"""Quantizers beside llama.cpp's and gguf-py's: time, and error on five kinds of weights.

Where a search takes importances, so does llama.cpp: the same ones, of three kinds. Errors are then
sums of squares weighted by them.

A gate of its own comes first: the loss of every contestant, decoded by the same decoder, may differ
from ours by no more than quantizers of one format do.
"""

import argparse
import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Case, Contestant
from ltxlite import cli
from ltxlite.importance import read_importance
from ltxlite_quant import FORMATS, QuantTensor
from ltxlite_quant.encode import ENCODERS
from ltxlite_quant.measure import relative_rmse
from ltxlite_quant.search import quantize
from ltxlite_quant.search_plan import PLANS, Effort
from tests import ggml_oracle
from tests.weight_samples import weight_samples

DESCRIPTION = "quantizers of all GGUF formats beside llama.cpp's and gguf-py's"
TOLERANCE = 0.25  # Q2_K: llama.cpp's loss exceeds ours by up to 40 % on other kinds, 14 % here
ROWS, COLUMNS = 256, 4096
SAMPLE = 128, 2048
OUTLIERS = 64  # inputs, of which one is a thousand times as large as the rest
GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "models"


class Loss(Mapping[str, Tensor]):
    """The outputs of a quantizer: its loss, computed when somebody looks, not while it is timed."""

    def __init__(self, blocks: QuantTensor, source: Tensor) -> None:
        self.blocks, self.source = blocks, source

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor([relative_rmse(self.blocks, self.source)])

    def __iter__(self) -> Iterator[str]:
        return iter(("loss",))

    def __len__(self) -> int:
        return 1


def _ours(
    source: Tensor, name: str, effort: Effort, importance: Tensor | None = None
) -> QuantTensor:
    return quantize(source, FORMATS[name], effort, importance)


def _gguf_py(source: Tensor, name: str) -> QuantTensor:
    raw = gguf.quants.quantize(source.numpy(), gguf.GGMLQuantizationType[name])
    return QuantTensor(torch.from_numpy(raw), FORMATS[name], tuple(source.shape))


def _llama(source: Tensor, name: str, importance: Tensor | None = None) -> QuantTensor:
    # As many threads as ours, each with its share of the rows; the call releases the lock.
    parts = [part.numpy() for part in source.chunk(torch.get_num_threads())]
    given = None if importance is None else importance.numpy()
    with ThreadPoolExecutor(len(parts)) as pool:
        raw = list(pool.map(lambda part: ggml_oracle.quantize(part, name, given), parts))
    return QuantTensor(torch.from_numpy(np.concatenate(raw)), FORMATS[name], tuple(source.shape))


def _contestant(name: str, call: Callable[[], QuantTensor], source: Tensor) -> Contestant:
    return Contestant(name, lambda: Loss(call(), source))


def _contestants(name: str, effort: Effort, figures: dict[str, float]) -> Iterator[Contestant]:
    missing = None if ggml_oracle.library_path() else "pywhispercpp not installed (extra test)"
    _compare_losses(name, effort, figures, missing is None)
    source = weight_samples(ROWS, COLUMNS)["gaussian"]
    yield _contestant("ltxlite", partial(_ours, source, name, effort), source)
    if missing:
        yield Contestant("llama.cpp", None, missing)
    else:
        yield _contestant("llama.cpp", partial(_llama, source, name), source)
    if name in ENCODERS:
        yield _contestant("gguf-py", partial(_gguf_py, source, name), source)


def _compare_losses(name: str, effort: Effort, figures: dict[str, float], rivalled: bool) -> None:
    ones = torch.ones(SAMPLE[1])
    for kind, source in weight_samples(*SAMPLE).items():
        loss = relative_rmse(_ours(source, name, effort), source)
        figures[f"{kind}_loss"] = loss
        if rivalled:
            _keep_worst(figures, "loss_ratio", loss, relative_rmse(_llama(source, name), source))
        if rivalled and name in PLANS:
            unit = relative_rmse(_llama(source, name, ones), source)
            _keep_worst(figures, "unit_loss_ratio", loss, unit)
            for importance in _importances().values():
                made = _ours(source, name, effort, importance), _llama(source, name, importance)
                ours, theirs = (_weighted_error(quant, source, importance) for quant in made)
                _keep_worst(figures, "importance_error_ratio", ours, theirs)


def _weighted_error(quant: QuantTensor, source: Tensor, importance: Tensor) -> float:
    miss = quant.dequantize().double() - source.double()
    return float((miss.square() @ importance.double()).sum())


@cache
def _importances() -> Mapping[str, Tensor]:
    """Return importances (K,): synthetic ones, and those that a calibration measured."""
    random = torch.Generator().manual_seed(7)
    spread = torch.randn(SAMPLE[1], generator=random).exp()
    outliers = (torch.randn(SAMPLE[1], generator=random) * 0.5).exp()
    outliers[::OUTLIERS] *= 1000
    return {"lognormal": spread, "outliers": outliers, "calibrated": _calibrated()}


def _calibrated() -> Tensor:
    """Return what the feed-forwards of the tiny reference model read, repeated to (K,).

    They are its only matrices whose rows are whole blocks of 256.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "importance.safetensors"
        arguments = ["--model", GOLDEN / "tiny-2.3-distilled.safetensors", "--output", path]
        arguments += ["--text-encoder", GOLDEN / "gemma3_tiny", "--prompt", "rain on a tin roof"]
        arguments += ["--upscaler", GOLDEN / "tiny-2.3-spatial-upscaler-x2.safetensors"]
        arguments += ["--size", "128x128", "--frames", "9", "--device", "cpu", "--quiet"]
        with contextlib.redirect_stdout(io.StringIO()):
            if cli.main(["calibrate", *map(str, arguments)]):
                raise RuntimeError("the calibration of the tiny reference model failed")
        moments = read_importance(path).moments
    rows = [value for name, value in sorted(moments.items()) if name.endswith(".ff.net.2.weight")]
    together = torch.cat([row for row in rows if len(row) % 256 == 0])
    return together.repeat(-(-SAMPLE[1] // len(together)))[: SAMPLE[1]]


def _keep_worst(figures: dict[str, float], name: str, ours: float, theirs: float) -> None:
    figures[name] = max(figures.get(name, 0.0), ours / theirs)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this benchmark can be told: nothing."""


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield every format we write, those with a search at both efforts."""
    numba = importlib.util.find_spec("numba") is not None
    for name in (*ENCODERS, *PLANS):
        efforts: tuple[Effort, ...] = ("default", "high") if name in PLANS else ("default",)
        for effort in efforts:
            title = name if effort == "default" else f"{name} {effort}"
            facts = {"rows": ROWS, "columns": COLUMNS, "effort": effort, "numba": numba}
            figures: dict[str, float] = {}
            build = partial(_contestants, name, effort, figures)
            yield Case(title, facts, TOLERANCE, build, elements=ROWS * COLUMNS, figures=figures)
