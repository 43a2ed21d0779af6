"""Options and fixtures of the whole suite."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `pytest tests/test_golden.py --golden DIR` run another set of reference values."""
    parser.addoption("--golden", type=Path, default=GOLDEN, help="folder with MANIFEST.json")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Keep torch on one thread, and let it set up its vector mathematics there.

    The tensors are tiny: on a busy machine two threads that wait for each other make the suite
    ten times slower. For the second, see docs/log.md, 2026-11-21.
    """
    torch.set_num_threads(1)
    torch.ones(1).exp()


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run as the runtime does; a test that wants gradients enables them itself."""
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a test encodes from the user's cache, and from other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def demo_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Write the demo checkpoint once: model, x2 upscaler, text encoder."""
    from ltxlite.demo import write_demo_model

    folder = tmp_path_factory.mktemp("demo")
    model, upscaler, encoder = write_demo_model(folder, lambda _: None)
    return model, upscaler, encoder
