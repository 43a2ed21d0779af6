"""Options and fixtures of the whole suite."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `pytest tests/test_golden.py --golden DIR` run another set of reference values."""
    parser.addoption("--golden", type=Path, default=GOLDEN, help="folder with MANIFEST.json")


@pytest.fixture(autouse=True)
def _no_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run as the runtime does; a test that wants gradients enables them itself."""
    with torch.no_grad():
        yield
