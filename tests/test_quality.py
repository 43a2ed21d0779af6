"""The middle-sized transformer in every arithmetic, in the coarsest and the finest format."""

import pytest

from benchmarks import quality, report
from benchmarks.harness import Result


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_int8_and_fp16_keep_to_their_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "SEEDS", (1,))
    result: Result = quality.result_of(name)
    targets = [t for t in report.read_targets("quality") if name in t["cases"]]
    assert targets
    verdicts = report.judge([result], targets)
    assert all(item.met for item in verdicts), report.summary(verdicts)
    # int8 was computed, and scores in int8 with it.
    assert result.case.figures["int8_error"] > result.case.figures["fp16_error"]
