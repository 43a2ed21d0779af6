"""Every reference case of a set, one test item each: `pytest tests/test_golden.py --golden DIR`.

The values were computed by the official code (LTX-2 400fd31) in fp32 on a CPU, see
tests/golden/README.md.
A case is dispatched by its `kind`; an unknown kind or an unknown stored tensor fails.
"""

from pathlib import Path

import pytest
from golden_geometry import GEOMETRY_KINDS
from golden_networks import NETWORK_KINDS
from golden_sampling import SAMPLING_KINDS
from golden_support import Case, compare, read_manifest
from golden_text import TEXT_KINDS

KINDS = {**GEOMETRY_KINDS, **NETWORK_KINDS, **TEXT_KINDS, **SAMPLING_KINDS}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one item of every case in the manifest."""
    root: Path = metafunc.config.getoption("--golden")
    if "entry" in metafunc.fixturenames:
        entries = read_manifest(root)
        metafunc.parametrize("entry", entries, ids=[entry["name"] for entry in entries])


def test_reference_case(entry: dict, request: pytest.FixtureRequest) -> None:
    assert entry["kind"] in KINDS, f"no runner for cases of kind {entry['kind']!r}"
    case = Case.load(request.config.getoption("--golden"), entry)
    outputs = KINDS[entry["kind"]](case)
    where = outputs.pop("where", None)
    unknown = case.expected.keys() - outputs.keys()
    assert not unknown, f"stored tensors that nothing computes: {sorted(unknown)}"
    errors = {name: compare(case, name, outputs[name], where) for name in case.expected}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert errors, "the case stores nothing to compare"
