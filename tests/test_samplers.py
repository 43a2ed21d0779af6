"""Samplers: second implementations, problems with known answers, and what the table announces."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sampler_bench import SHAPES, Bench, curved, draws, other_curved
from torch import Tensor

from ltxlite.errors import RequestError
from ltxlite.sampling import multistep
from ltxlite.sampling.cfg_pp import fresh_share
from ltxlite.sampling.contract import Prediction, State, Tools
from ltxlite.sampling.noise import SdeNoise
from ltxlite.sampling.samplers import SAMPLERS, sample
from ltxlite.sampling.schedules import TABLES, ltx
from ltxlite.sampling.settings import SAMPLER_OPTIONS

DISTILLED = TABLES["distilled"]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sigmas", [DISTILLED, TABLES["stage2"], (0.6, 0.0)])
def test_a_model_that_is_sure_is_believed(name: str, sigmas: tuple[float, ...]) -> None:
    target = 1.7
    end = Bench(lambda x, _: torch.full_like(x, target)).run(name, draws(1), sigmas)
    # The last step returns the prediction itself, whatever came before.
    assert all(torch.equal(stream, torch.full_like(stream, target)) for stream in end)


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_are_those_that_the_table_announces(name: str) -> None:
    bench = Bench(curved)
    bench.run(name, draws(1), DISTILLED)
    record = SAMPLERS[name]
    assert bench.log.count("denoise") == record.evaluations(8)
    assert [entry for entry in bench.log if entry.isdigit()] == [str(step) for step in range(8)]
    assert {entry for entry in bench.log if entry in ("step", "sub")} == set(record.noise)
    assert record.stochastic == bool(bench.noises)


def test_a_step_is_reported_before_the_next_evaluation() -> None:
    bench = Bench(curved)
    bench.run("res_2s", draws(1), (0.9, 0.4, 0.0))
    step = ["denoise", "sub", "denoise", "step"]
    assert bench.log == [*step, "0", *step, "1", "denoise"]


def test_option_defaults_are_those_of_the_functions() -> None:
    assert SAMPLERS.keys() == SAMPLER_OPTIONS.keys()
    for name, sampler in SAMPLERS.items():
        parameters = list(inspect.signature(sampler.step).parameters.values())[3:]
        assert {p.name: p.default for p in parameters} == SAMPLER_OPTIONS[name]


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not SAMPLERS[name].stochastic])
def test_streams_do_not_touch_each_other_and_may_be_absent(name: str) -> None:
    both = Bench(curved).run(name, draws(1), DISTILLED)
    alone = Bench(curved, shapes=SHAPES[:1]).run(name, draws(1)[:1], DISTILLED)
    assert torch.equal(alone[0], both[0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_sigmas_may_be_a_tensor_or_numbers(name: str) -> None:
    sigmas = ltx(6)
    numbers = Bench(curved).run(name, draws(1), sigmas)
    tensor = Bench(curved).run(name, draws(1), torch.tensor(sigmas))
    assert all(map(torch.equal, numbers, tensor))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if SAMPLERS[name].stochastic])
def test_kept_tokens_stay_clean_when_noise_is_added(name: str) -> None:
    clean, mask = draws(5), (torch.zeros(2, 7, 1), torch.ones(2, 3, 1))
    mask[0][:, 3:] = 1

    def blend(x: State) -> State:
        return tuple(a * m + c * (1 - m) for a, m, c in zip(x, mask, clean, strict=True))

    seen: list[Tensor] = []

    def model(x: Tensor, sigma: float) -> Tensor:
        if x.shape == clean[0].shape:
            seen.append(x[:, :3])
            return blend((curved(x, sigma), clean[1]))[0]
        return curved(x, sigma)

    end = Bench(model, blend=blend).run(name, blend(draws(1)), DISTILLED)
    for kept in [*seen, end[0][:, :3]]:
        # Nothing but the rounding of a few fp32 operations between two blends.
        torch.testing.assert_close(kept, clean[0][:, :3], rtol=0, atol=2e-6)


# Second implementations, in fp64 and as the formulas are usually written. Samplers work in fp32
# on values of about 3 for 8 steps: a hundred roundings of 2e-7, some amplified by the model.
SECOND = {"rtol": 0.0, "atol": 2e-5}


def compare(name: str, expected: Callable[[Tensor, Tensor, Bench], Tensor], **options: Any) -> None:
    sigmas = torch.tensor(DISTILLED)
    bench = Bench(curved, other_curved)
    got = bench.run(name, draws(1), sigmas, **options)
    for stream, x in enumerate(draws(1)):
        again = Bench(curved, other_curved, noises=[(n[stream],) for n in bench.noises])
        torch.testing.assert_close(
            got[stream].double(), expected(x.double(), sigmas.double(), again), **SECOND
        )


def test_dpmpp_2m_equals_the_k_diffusion_form() -> None:
    def form(x: Tensor, sigmas: Tensor, _: Bench) -> Tensor:
        old = None
        for i in range(len(sigmas) - 1):
            x0 = curved(x, float(sigmas[i]))
            t, t_next = -sigmas[i].log(), -sigmas[i + 1].log()
            h = t_next - t
            if old is None or sigmas[i + 1] == 0:
                lead = x0
            else:
                r = (t + sigmas[i - 1].log()) / h
                lead = (1 + 1 / (2 * r)) * x0 - old / (2 * r)
            x = torch.exp(-t_next) / torch.exp(-t) * x - torch.expm1(-h) * lead
            old = x0
        return x

    compare("dpmpp_2m", form)


@pytest.mark.parametrize("max_stage", [1, 2, 3])
def test_er_sde_equals_the_published_recursion(max_stage: int) -> None:
    def scaler(point: Tensor) -> Tensor:
        return point * ((point**0.3).exp() + 10)

    def form(x: Tensor, sigmas: Tensor, bench: Bench) -> Tensor:
        e, position = math.exp(2.37), 1 - 1e-4
        sigmas = sigmas.clone()
        sigmas[0] = e / (e + 1 / position - 1)
        lam = sigmas / (1 - sigmas)
        x0s: list[Tensor] = []
        firsts: list[Tensor] = []
        for i in range(len(sigmas) - 1):
            x0 = curved(x, float(sigmas[i]))
            if sigmas[i + 1] == 0:
                return x0
            s, t, alpha = lam[i], lam[i + 1], 1 - sigmas[i + 1]
            r = scaler(t) / scaler(s)
            x = alpha / (1 - sigmas[i]) * r * x + alpha * (1 - r) * x0
            points = t + torch.arange(200) * (s - t) / 200
            if i >= 1 and max_stage >= 2:
                first = (x0 - x0s[-1]) / (s - lam[i - 1])
                weight = (t - s) + (1 / scaler(points)).sum() * (s - t) / 200 * scaler(t)
                x = x + alpha * weight * first
                if i >= 2 and max_stage >= 3:
                    second = (first - firsts[-1]) / ((s - lam[i - 2]) / 2)
                    area = ((points - s) / scaler(points)).sum() * (s - t) / 200
                    x = x + alpha * ((t - s) ** 2 / 2 + area * scaler(t)) * second
                firsts.append(first)
            x0s.append(x0)
            x = x + alpha * bench.noises[i][0] * (t**2 - s**2 * r**2).sqrt()
        return x

    compare("er_sde", form, max_stage=max_stage)


@pytest.mark.parametrize("eta, s_noise", [(1.0, 1.0), (0.5, 1.0), (0.7, 0.9)])
def test_ancestral_euler_equals_the_written_formula(eta: float, s_noise: float) -> None:
    def form(x: Tensor, sigmas: Tensor, bench: Bench) -> Tensor:
        for i in range(len(sigmas) - 1):
            s, n = sigmas[i], sigmas[i + 1]
            x0 = curved(x, float(s))
            if n == 0:
                return x0
            down = n * (1 + (n / s - 1) * eta)
            up = (n**2 - down**2 * (1 - n) ** 2 / (1 - down) ** 2).sqrt()
            x = down / s * x + (1 - down / s) * x0
            x = (1 - n) / (1 - down) * x + s_noise * up * bench.noises[i][0]
        return x

    compare("euler_ancestral", form, eta=eta, s_noise=s_noise)


@pytest.mark.parametrize("eta, s_noise", [(1.0, 1.0), (0.6, 0.8)])
def test_ancestral_cfg_pp_equals_the_formula_in_noise_to_signal(eta: float, s_noise: float) -> None:
    def form(x: Tensor, sigmas: Tensor, bench: Bench) -> Tensor:
        for i in range(len(sigmas) - 1):
            s, n = sigmas[i], sigmas[i + 1]
            a, b = 1 - s, 1 - n
            x0, negative = curved(x, float(s)), other_curved(x, float(s))
            if n == 0:
                return x0
            k, k_next = s / a, n / b  # k is infinite in the first step
            full = k_next if i == 0 else (k_next**2 * (k**2 - k_next**2) / k**2).sqrt()
            up = torch.minimum(k_next, eta * full)
            down = (k_next**2 - up**2).sqrt()
            x = b * x0 + b * down * (x - a * negative) / s + b * s_noise * up * bench.noises[i][0]
        return x

    compare("euler_ancestral_cfg_pp", form, eta=eta, s_noise=s_noise)


def test_euler_cfg_pp_equals_the_written_formula() -> None:
    def form(x: Tensor, sigmas: Tensor, _: Bench) -> Tensor:
        for i in range(len(sigmas) - 1):
            s, n = sigmas[i], sigmas[i + 1]
            direction = (x - (1 - s) * other_curved(x, float(s))) / s
            x = (1 - n) * curved(x, float(s)) + n * direction
        return x

    compare("euler_cfg_pp", form)


@pytest.mark.parametrize(
    "name, options",
    [
        ("euler_cfg_pp", {}),
        ("euler_ancestral", {"eta": 0.0}),
        ("euler_ancestral_cfg_pp", {"eta": 0.0}),
        ("euler_gradient", {"gamma": 1.0}),
    ],
)
def test_variants_are_euler_where_they_must_be(name: str, options: dict[str, float]) -> None:
    bench = Bench(curved)  # the negative prediction is the positive one
    got = bench.run(name, draws(1), DISTILLED, **options)
    assert not bench.noises
    for one, other in zip(got, Bench(curved).run("euler", draws(1), DISTILLED), strict=True):
        torch.testing.assert_close(one, other, **SECOND)


def test_ancestral_cfg_pp_replaces_all_noise_when_it_starts_at_one() -> None:
    bench = Bench(lambda x, _: torch.full_like(x, 0.25), shapes=SHAPES[:1])
    (x,) = bench.run("euler_ancestral_cfg_pp", draws(1)[:1], torch.tensor([1.0, 0.6]))
    # Exact in the formula: (1 - 0.6) x0 + 0.6 noise, nothing of the state it came from.
    torch.testing.assert_close(x, 0.4 * 0.25 + 0.6 * bench.noises[0][0], rtol=0, atol=2e-7)
    assert fresh_share(1.0, 0.6, 1.0) == 1.0
    assert fresh_share(1.0 - 1e-9, 0.6, 0.5) == pytest.approx(fresh_share(1.0, 0.6, 0.5))


# A problem with a known answer: data that are normal with mean M and deviation D. The best
# prediction is linear, the flow scales x - (1 - sigma) M with the deviation at sigma.
M, D = 0.8, 0.35


def deviation(sigma: float) -> float:
    return math.hypot((1 - sigma) * D, sigma)


def normal_data(x: Tensor, sigma: float) -> Tensor:
    gain = (1 - sigma) * D**2 / deviation(sigma) ** 2
    return M + gain * (x - (1 - sigma) * M)


def flow_error(name: str, sigmas: Tensor, **options: float) -> float:
    start, end = float(sigmas[0]), float(sigmas[-1])
    z = draws(3)[0].double()
    x = ((1 - start) * M + deviation(start) * z).float()
    (got,) = Bench(normal_data).run(name, (x,), sigmas, **options)
    return float((got - ((1 - end) * M + deviation(end) * z)).abs().max())


@pytest.mark.parametrize(
    "name, options, order, spacing",
    [
        ("euler", {}, 1, "even"),
        ("euler_cfg_pp", {}, 1, "even"),
        ("euler_gradient", {"gamma": 1.5}, 2, "even"),  # Adams-Bashforth of two steps
        ("dpmpp_2m", {}, 2, "even"),
        ("dpmpp_2m", {}, 2, "geometric"),
    ],
)
def test_flow_samplers_converge_with_their_order(
    name: str, options: dict[str, float], order: int, spacing: str
) -> None:
    def sigmas(steps: int) -> Tensor:
        if spacing == "even":
            return torch.linspace(0.95, 0.4, steps + 1)
        return torch.logspace(math.log10(0.95), math.log10(0.4), steps + 1)

    coarse, fine = (flow_error(name, sigmas(steps), **options) for steps in (12, 24))
    # Halving the step divides the error by 2^order; higher terms shift that by some 10 percent.
    assert coarse / fine == pytest.approx(2**order, rel=0.1)
    assert fine > 5e-5  # far enough above fp32 rounding for the ratio to mean something


@pytest.mark.parametrize(
    "name, options",
    [
        ("euler_ancestral", {}),
        ("euler_ancestral", {"eta": 0.5}),
        ("euler_ancestral_cfg_pp", {}),
        ("er_sde", {}),
    ],
)
def test_noise_samplers_keep_mean_and_spread_of_the_data(
    name: str, options: dict[str, float]
) -> None:
    shape = ((1, 401, 101),)
    bench = Bench(normal_data, shapes=shape)
    (x,) = bench.run(name, draws(4, shape), torch.linspace(1, 0, 301), **options)
    # 40,501 values: standard errors are D / 201 = 1.7e-3 (mean) and 1.2e-3 (deviation); 300 steps
    # leave 2.4e-3 of discretisation. res_2s is not here: its substep noise costs 4 percent of the
    # spread at any number of steps, in the reference as well.
    assert float(x.mean()) == pytest.approx(M, abs=6e-3)
    assert float(x.std()) == pytest.approx(D, abs=6e-3)
    (x,) = bench.run(name, draws(4, shape), torch.linspace(1, 0, 301), **options, s_noise=0.9)
    assert float(x.std()) < D - 0.015  # what a wrong scale of the noise would do


def test_er_sde_moves_a_first_sigma_of_one_only() -> None:
    assert abs(multistep.FIRST_SIGMA - 0.99999065) < 1e-8
    asked: list[float] = []

    def model(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return x * 0.5

    for start in (1.0, 0.9):
        Bench(model, shapes=SHAPES[:1]).run("er_sde", draws(1)[:1], (start, 0.5, 0.0))
    distinct = list(dict.fromkeys(asked))
    assert distinct == [multistep.FIRST_SIGMA, 0.5, pytest.approx(0.9)]


@pytest.mark.parametrize(
    "first, second, refined",
    [(0.9, 0.6, True), (0.9, 0.5, False), (0.031, 0.02, True), (0.029, 0.02, False)],
)
def test_res_2s_refines_short_steps_above_its_lowest_sigma(
    first: float, second: float, refined: bool
) -> None:
    # The one step, whose end is the input of the second: log(.9 / .6) = .41, log(.9 / .5) = .59.
    ends = []
    for bong in (True, False):
        seen: list[Tensor] = []
        tools = Tools(
            lambda x, _, seen=seen: seen.append(x[0]) or Prediction((curved(x[0], 0.5),)),
            SdeNoise(SHAPES[:1], {"step": 91, "sub": 92}, standardised=True),
            lambda x: x,
        )
        sample("res_2s", draws(1)[:1], (first, second, 0.0), tools, {"bong": bong})
        ends.append(seen[2])
    assert torch.equal(*ends) != refined


def test_res_2s_blends_after_every_substep_and_step_even_without_noise() -> None:
    blends: list[int] = []
    bench = Bench(curved, blend=lambda x: blends.append(len(x)) or x)
    bench.run("res_2s", draws(1), DISTILLED, eta=0.0)
    assert blends == [2] * 16
    assert bench.log.count("step") == 0


@pytest.mark.parametrize("sigmas", [(0.9, 0.4), (1.0, 0.0011, 0.0), (0.0,), ()])
def test_res_2s_refuses_schedules_that_it_cannot_end(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(RequestError, match="ends in 0"):
        Bench(curved).run("res_2s", draws(1), sigmas)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if SAMPLERS[name].needs_uncond])
def test_missing_negative_prediction_is_said(name: str) -> None:
    tools = Tools(lambda x, _: Prediction(x), lambda _: draws(2), lambda x: x)
    with pytest.raises(RequestError, match="negative prediction"):
        sample(name, draws(1), DISTILLED, tools)


def test_unknown_sampler_or_option_is_refused_before_any_evaluation() -> None:
    bench = Bench(curved)
    with pytest.raises(RequestError, match="'heun' is unknown"):
        # The bench asks the table itself, so go past it.
        sample("heun", draws(1), DISTILLED, Tools(bench._denoise, bench._noise, bench.blend))
    with pytest.raises(RequestError, match="no option 'eta'"):
        bench.run("euler", draws(1), DISTILLED, eta=0.5)
    assert bench.log == []
