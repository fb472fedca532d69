# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Section 4.2: a tool that wears, and is renewed now and then."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm

R = 0.95
RULE = (
    "s36 := 0.95^(36-k) * v where k is the last of {12, 24} intervened on; else 0.1578"
)


def tool(steps=36, r=R, start=1.0):
    def model():
        s = pyro.deterministic("s0", torch.tensor(start))
        for t in range(1, steps + 1):
            s = pyro.deterministic(f"s{t}", r * s)

    return model


def noisy_tool(steps=36, r=R, sd=0.1, start=1.0):
    def model():
        s = pyro.deterministic("s0", torch.tensor(start))
        for t in range(1, steps + 1):
            s = pyro.sample(f"s{t}", dist.Normal(r * s, sd))

    return model


def under(program, do):
    data = {name: torch.as_tensor(value) for name, value in do.items()}
    return poutine.do(program, data) if do else program


def state(program, name, do, *args):
    return float(
        poutine.trace(under(program, do)).get_trace(*args).nodes[name]["value"]
    )


def step_by_step(steps, do, r=R, start=1.0):
    """S_t := r S_{t-1}, one after another."""
    s = [do.get("s0", start)]
    for t in range(1, steps + 1):
        s.append(do.get(f"s{t}", r * s[-1]))
    return s


RENEWALS = [{}, {"s12": 1.0}, {"s24": 1.0}, {"s12": 1.0, "s24": 1.0}]


def test_the_numbers():
    fused = pm.consolidate(tool(), keep=["s23", "s36"], allow=["s12", "s24"])
    both = {"s12": 1.0, "s24": 1.0}
    assert round(state(fused, "s23", both), 4) == 0.5688
    assert round(state(fused, "s36", both), 4) == 0.5404
    assert round(state(fused, "s36", {}), 4) == 0.1578


@pytest.mark.parametrize("do", RENEWALS, ids=str)
@pytest.mark.parametrize("keep", [["s36"], ["s23", "s36"], ["s5", "s12", "s30"]])
def test_the_model_evaluated_step_by_step(do, keep):
    fused = pm.consolidate(tool(), keep, allow=["s12", "s24"])
    expected = step_by_step(36, do)
    for name in keep:
        if name not in do:
            found = state(fused, name, do)
            assert found == pytest.approx(expected[int(name[1:])], abs=1e-12)


def test_the_equation():
    fused = pm.consolidate(tool(), keep=["s36"], allow=["s12", "s24"])
    assert fused.equations() == [RULE]
    (latex,) = fused.equations(latex=True)
    assert r"0.95^{36-k} \cdot v" in latex and "0.1578" in latex
    assert r"\{12, 24\}" in latex
    assert latex.count("{") == latex.count("}")
    # Spaces outside of words are none in a formula
    assert r"\text{else} 0.1578" not in latex


def test_36_equations_become_one():
    def model():
        s = 1.0
        for t in range(1, 37):
            s = pyro.deterministic(f"s{t}", torch.as_tensor(R * s))

    for program, before in ((tool(), 37), (noisy_tool(), 37)):
        fused = pm.consolidate(program, keep=["s36"], allow=["s12", "s24"])
        assert fused.sites == ("s36",)
        assert fused.cost.before.equations == before
        assert fused.cost.after.equations == 1
        assert fused.cost.after.operations <= 1
    fused = pm.consolidate(model, keep=["s36"])
    assert (fused.cost.before.equations, fused.cost.after.equations) == (36, 1)
    assert state(fused, "s36", {}) == pytest.approx(R**36, abs=1e-12)


def test_any_renewals_to_any_value():
    steps = 7
    allow = [f"s{t}" for t in range(steps)]
    fused = pm.consolidate(tool(steps), keep=[f"s{steps}"], allow=allow)
    rng = np.random.default_rng(0)
    for count in range(steps + 1):
        for chosen in itertools.combinations(range(steps), count):
            do = {f"s{t}": float(rng.uniform(0.5, 2)) for t in chosen}
            expected = R ** (steps - max(chosen)) * do[f"s{max(chosen)}"] if do else 0
            expected = expected if do else R**steps
            assert step_by_step(steps, do)[-1] == pytest.approx(expected)
            found = state(fused, f"s{steps}", do)
            assert found == pytest.approx(expected, abs=1e-12)


def test_the_start_is_an_argument():
    def model(r, start):
        s = pyro.deterministic("s0", start)
        for t in range(1, 37):
            s = pyro.deterministic(f"s{t}", r * s)

    args = torch.tensor(R), torch.tensor(1.0)
    fused = pm.consolidate(model, keep=["s36"], allow=["s12", "s24"], model_args=args)
    for r, start in ((R, 1.0), (0.8, 2.0), (1.1, 0.5)):
        for do in (*RENEWALS, {"s12": 0.3, "s24": 0.7}):
            found = state(fused, "s36", do, torch.tensor(r), torch.tensor(start))
            expected = step_by_step(36, do, r, start)[-1]
            assert found == pytest.approx(expected, abs=1e-8)
    (line,) = fused.equations()
    assert "12" in line and "24" in line and "start" in line


# Noise


def law(program, name, do, *args):
    """Mean and variance, from the log density at three points."""
    at = torch.tensor([-1.0, 0.0, 1.0])
    trace = poutine.trace(under(program, do)).get_trace(*args)
    logs = [float(trace.nodes[name]["fn"].log_prob(x)) for x in at]
    curve = logs[0] + logs[2] - 2 * logs[1]
    variance = -1 / curve
    mean = (logs[2] - logs[0]) / 2 * variance
    norm = -0.5 * mean**2 / variance - 0.5 * math.log(2 * math.pi * variance)
    assert logs[1] == pytest.approx(norm, abs=1e-8)  # it is a density
    return mean, variance


def noise(sd, links, r=R):
    return sd**2 * sum(r ** (2 * i) for i in range(links))


@pytest.mark.parametrize("sd", [0.05, 0.3])
@pytest.mark.parametrize(
    "do", [*RENEWALS, {"s12": 0.4}, {"s12": 2.0, "s24": -0.5}], ids=str
)
def test_noise_adds_up_since_the_last_renewal(sd, do):
    fused = pm.consolidate(noisy_tool(sd=sd), keep=["s36"], allow=["s12", "s24"])
    k = max((int(name[1:]) for name in do), default=0)
    mean, variance = law(fused, "s36", do)
    assert mean == pytest.approx(R ** (36 - k) * do.get(f"s{k}", 1.0), abs=1e-8)
    assert variance == pytest.approx(noise(sd, 36 - k), abs=1e-8)


@pytest.mark.parametrize("do", RENEWALS, ids=str)
def test_two_states_of_one_tool(do):
    """The joint density of S_23 and S_36: a Markov chain, cut at renewals."""
    sd = 0.2
    fused = pm.consolidate(noisy_tool(sd=sd), keep=["s23", "s36"], allow=["s12", "s24"])
    for s23, s36 in ((0.5, 0.4), (0.1, 0.9), (-0.3, 0.2)):
        data = {"s23": torch.tensor(s23), "s36": torch.tensor(s36)}
        program = poutine.condition(under(fused, do), data=data)
        found = float(poutine.trace(program).get_trace().log_prob_sum())
        k = 12 if "s12" in do else 0
        expected = normal(s23, R ** (23 - k), noise(sd, 23 - k))
        if "s24" in do:
            expected += normal(s36, R**12, noise(sd, 12))
        else:
            expected += normal(s36, R**13 * s23, noise(sd, 13))
        assert found == pytest.approx(expected, abs=1e-8)


def normal(x, mean, variance):
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * math.log(2 * math.pi * variance)


def test_the_noisy_equation_gives_the_law():
    fused = pm.consolidate(noisy_tool(), keep=["s36"], allow=["s12", "s24"])
    (line,) = fused.equations()
    assert line.startswith("s36 := 0.95^(36-k) * v + N(0, ")
    head, _, rest = line.partition(" where k is the last of {12, 24} intervened on; ")
    variance = head.partition("N(0, ")[2][:-1].replace("^", "**")
    for k in (12, 24):
        found = eval(variance, {"k": k})
        assert found == pytest.approx(noise(0.1, 36 - k), abs=1e-12)
    # S_0 is no random site, but can be read off as a number or by its name
    assert rest.startswith("else 0.1578")
    assert rest.endswith(f"N(0, {noise(0.1, 36) ** 0.5:.4g}^2)")


def test_the_rate_may_be_learnt():
    """The fused density is differentiable in the rate, as the sum over paths is."""
    sd, steps, seen = 0.3, 12, 0.7

    def model():
        r = pyro.param("r", torch.tensor(0.8))
        s = torch.tensor(1.0)
        for t in range(1, steps + 1):
            s = pyro.sample(f"s{t}", dist.Normal(r * s, sd))

    fused = pm.consolidate(model, keep=["s12"], allow=["s5"])
    for do, k, start in (({}, 0, 1.0), ({"s5": 1.7}, 5, 1.7)):
        data = {"s12": torch.tensor(seen)}
        program = poutine.condition(under(fused, do), data=data)
        found = poutine.trace(program).get_trace().log_prob_sum()
        r = pyro.param("r")
        r.grad = None
        found.backward()

        def closed(rate, k=k, start=start):
            links = steps - k
            return normal(seen, rate**links * start, noise(sd, links, rate))

        step = 1e-5
        slope = (closed(0.8 + step) - closed(0.8 - step)) / (2 * step)
        assert float(found.detach()) == pytest.approx(closed(0.8), abs=1e-8)
        assert float(r.grad) == pytest.approx(slope, rel=1e-6)


def test_other_renewals_are_errors():
    fused = pm.consolidate(tool(), keep=["s36"], allow=["s12", "s24"])
    with pytest.raises(pm.InterventionNotAllowed) as error:
        state(fused, "s36", {"s13": 1.0})
    assert "s13" in str(error.value) and "s12, s24" in str(error.value)
