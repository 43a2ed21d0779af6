"""Schedules against the reference values, the published lists, and closed forms."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ltxlite.errors import RequestError
from ltxlite.sampling import schedules
from ltxlite.sampling.beta import beta_quantile, regularised_beta
from ltxlite.sampling.schedule_text import parse

GOLDEN = Path(__file__).parent / "golden"
BUILDERS = {
    "ltx2": schedules.ltx,
    "linear_quadratic": schedules.linear_quadratic,
    "beta": schedules.beta,
}


def golden_case() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    manifest = json.loads((GOLDEN / "MANIFEST.json").read_text())
    (case,) = (case for case in manifest["cases"] if case["name"] == "schedules")
    return case["params"], load_file(GOLDEN / case["file"])


@pytest.mark.parametrize("name", golden_case()[0])
def test_formula_equals_the_reference(name: str) -> None:
    params, expected = golden_case()
    sigmas = BUILDERS[name.rpartition("_")[0]](**params[name])
    # Two fp32 roundings of numbers up to 1; the manifest allows 2e-6.
    torch.testing.assert_close(torch.tensor(sigmas), expected[name], rtol=0, atol=1.3e-7)


@pytest.mark.parametrize("stage, table", [(1, "distilled"), (2, "stage2")])
def test_distilled_tables_equal_the_reference(stage: int, table: str) -> None:
    expected = golden_case()[1][f"distilled_stage{stage}"]
    assert torch.equal(torch.tensor(schedules.TABLES[table]), expected)


def reference_order(steps: int, tokens: int) -> torch.Tensor:
    weight = math.exp(0.95 + (tokens - 1024) * 1.1 / 3072)
    ramp = torch.linspace(1, 0, steps + 1)[:-1]
    sigmas = weight / (weight + (1 / ramp - 1))
    rest = 1 - sigmas
    return torch.cat([1 - rest / (rest[-1] / 0.9), torch.zeros(1)])


@pytest.mark.parametrize("tokens", [24_576, 32_640])
@pytest.mark.parametrize("steps", [7, 30])
def test_ltx_repeats_the_rounding_of_fp32_at_high_shifts(steps: int, tokens: int) -> None:
    # Exact arithmetic would differ by 3e-5 to 1e-3 here; the same order of operations by nothing.
    sigmas = torch.tensor(schedules.ltx(steps, tokens))
    torch.testing.assert_close(sigmas, reference_order(steps, tokens), rtol=0, atol=2e-6)


@pytest.mark.parametrize("tokens", [60_000, 111_600])
def test_ltx_survives_token_counts_that_fp32_does_not(tokens: int) -> None:
    assert not reference_order(15, tokens).diff().lt(0).all()  # why there is a closed form
    # As the shift grows, 1 - sigma tends to 0.9 (i / (n - i)) / (n - 1).
    limit = [1 - 0.9 * i / (15 - i) / 14 for i in range(15)] + [0.0]
    assert schedules.ltx(15, tokens) == pytest.approx(limit, abs=1e-6)


def test_closed_form_and_fp32_agree_where_both_are_good() -> None:
    for steps, tokens in [(9, 16), (15, 3520), (31, 4096)]:
        shift = 0.95 + (tokens - 1024) * 1.1 / 3072
        # fp32 leaves 6e-8 / (1 - the last sigma), stretched by less than 3.
        assert schedules._ltx_closed(steps, shift, 0.1) == pytest.approx(
            schedules.ltx(steps, tokens), abs=3e-7
        )


PUBLISHED = {  # features.md B1, B2, B5: four decimals
    "ltx:8": "1 .9657 .9219 .8639 .7834 .6646 .4710 .1 0",
    "ltx:15": "1 .9872 .9728 .9564 .9374 .9154 .8894 .8583 .8205 .7735 .7135 .6341 .5243 .3625"
    " .1 0",
    "ltx:15,tokens=8160": "1 .9935 .9860 .9773 .9672 .9550 .9403 .9221 .8991 .8689 .8277 .7680"
    " .6739 .5034 .1 0",
    "linq:3": "1 .975 .71875 0",
    "simple:8": "1 .9868 .9698 .9469 .9145 .8652 .7810 .6045 0",
    "simple:3,denoise=.47": ".9145 .8425 .6815 0",
}


@pytest.mark.parametrize("text", PUBLISHED)
def test_text_gives_the_published_list(text: str) -> None:
    # Half a unit of the fourth decimal, and a little for lists that were cut, not rounded.
    assert parse(text) == pytest.approx([float(v) for v in PUBLISHED[text].split()], abs=1.1e-4)


def test_linear_quadratic_of_eight_steps_is_the_distilled_table() -> None:
    assert parse("linq:8") == pytest.approx(parse("distilled"), abs=1e-15)


def test_one_step_goes_from_one_to_zero() -> None:
    assert parse("ltx:1") == parse("linq:1") == parse("simple:1") == parse("beta:1") == (1.0, 0.0)


DENOISE = {0.10: 0.543, 0.20: 0.728, 0.35: 0.852, 0.45: 0.898, 0.50: 0.915, 0.80: 0.977}


@pytest.mark.parametrize("denoise, sigma", DENOISE.items())
def test_denoise_maps_to_the_published_sigma_and_back(denoise: float, sigma: float) -> None:
    # Three published decimals, one of them (0.8975 as 0.898) rounded up generously.
    assert schedules.sigma_of_denoise(denoise) == pytest.approx(sigma, abs=5.5e-4)
    there = schedules.sigma_of_denoise(denoise)
    assert schedules.denoise_of_sigma(there) == pytest.approx(denoise, rel=1e-12)


def test_denoise_of_known_first_sigmas() -> None:
    got = [schedules.denoise_of_sigma(sigma) for sigma in (0.85, 0.909375, 0.725, 0.4219)]
    assert got == pytest.approx([0.346, 0.484, 0.198, 0.064], abs=5.1e-4)


def test_sub_schedule_is_the_tail_of_the_longer_one() -> None:
    assert schedules.sub_schedule(0.3, 3) == schedules.simple(10)[-4:]
    assert schedules.sub_schedule(1.0, 5) == schedules.simple(5)


def test_regularised_beta_equals_its_closed_forms() -> None:
    for x in (1e-9, 0.01, 0.3, 0.5, 0.77, 0.999):
        arcsine = 2 / math.pi * math.asin(math.sqrt(x))
        # The continued fraction stops at 1e-15; lgamma and exp lose a few more units.
        assert regularised_beta(0.5, 0.5, x) == pytest.approx(arcsine, rel=1e-13)
        assert regularised_beta(1, 3.5, x) == pytest.approx(-math.expm1(3.5 * math.log1p(-x)))
        assert regularised_beta(0.6, 1, x) == pytest.approx(x**0.6, rel=1e-13)


def test_beta_quantile_inverts_the_distribution() -> None:
    for a, b, share in [(0.6, 0.6, 0.03), (0.6, 0.6, 0.96), (2.0, 0.7, 0.4), (5.0, 9.0, 0.99)]:
        assert regularised_beta(a, b, beta_quantile(a, b, share)) == pytest.approx(share, rel=1e-12)
    assert beta_quantile(0.6, 0.6, 0.5) == 0.5


def test_beta_schedule_keeps_coinciding_entries_once() -> None:
    # Small alpha and beta crowd many shares into the ends of the table.
    sigmas = schedules.beta(61, 0.2, 0.2)
    assert len(sigmas) < 62
    assert schedules.check_sigmas(sigmas) == sigmas


def test_text_of_numbers_is_taken_as_it_is() -> None:
    assert parse(" 0.85, .725,0.4219 ,0") == (0.85, 0.725, 0.4219, 0.0)


def test_text_options_reach_the_formula() -> None:
    text = "ltx:steps=12,terminal=.05,max_shift=1.5,base_shift=.5"
    assert parse(text) == schedules.ltx(12, 4096, 1.5, 0.5, True, 0.05)
    assert parse("LTX:10,stretch=false") == schedules.ltx(10, stretch=False)
    assert parse("linq:7,linear_steps=2") == schedules.linear_quadratic(7, linear_steps=2)
    assert parse("beta:9,alpha=.8") == schedules.beta(9, 0.8)


def test_tokens_of_the_stage_serve_where_the_text_names_none() -> None:
    assert parse("ltx:9", tokens=3520) == schedules.ltx(9, 3520) != schedules.ltx(9)
    assert parse("ltx:9,tokens=4096", tokens=3520) == schedules.ltx(9)


def test_every_table_is_a_schedule() -> None:
    for name in schedules.TABLES:
        assert schedules.check_sigmas(parse(name)) == schedules.TABLES[name]


NONSENSE = {
    "karras:8": "linq:",
    "": "falling numbers",
    "distilled:4": "distilled",
    "ltx": "number of steps",
    "ltx:": "number of steps",
    "ltx:,steps=8": "steps=''",
    "ltx:0": "steps is 0",
    "ltx:100000": "steps is 100000",
    "ltx:8,terminal=2": "terminal is 2.0",
    "ltx:8,terminal=nan": "terminal is nan",
    "ltx:8,stretch=maybe": "stretch='maybe'",
    "ltx:8,tokens=900000": "shift at 900000 tokens",
    "ltx:8,8": "no option '8'",
    "simple:8,alpha=1": "no option 'alpha'",
    "simple:3,denoise=0": "denoise is 0",
    "simple:900,denoise=.001": "too fine",
    "linq:8,linear_steps=8": "linear_steps is 8",
    "0.9,0.5": "append 0",
    "0.5,0.9,0": "must fall",
    "0.5,0.5,0": "must fall",
    "0.5,0.49999999,0": "must fall",
    "1.5,0": "[0] is 1.5",
    "-0.5,0": "[0] is -0.5",
    "0.5,nan,0": "[1] is nan",
    "0.5,,0": "no list of numbers",
    "0": "at least two",
}


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_is_refused_with_what_is_wrong(text: str) -> None:
    with pytest.raises(RequestError) as refusal:
        parse(text)
    assert NONSENSE[text] in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_schedules_and_settings_import_no_torch() -> None:
    code = (
        "import sys, ltxlite.sampling.schedule_text, ltxlite.sampling.settings;"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
