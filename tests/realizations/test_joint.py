# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Several macro-variables at once: the joint natural realization.

``P(X_A, X_B | a, b)``, for macro-variables that depend on one another, and for several
aggregates of the same sites.
"""

from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from composition.models import A, B, given_total, stores, stores_law
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal

import pyro_macro as pm

NAMES = ["a1", "a2", "b1", "b2"]


def draw(model, names, n):
    with pyro.plate("draws", n, dim=-3):
        nodes = pyro.poutine.trace(model).get_trace().nodes
    return torch.stack([nodes[k]["value"].double().expand(n, 1, 1) for k in names], -1)


# Gaussian


def conditional(rows, values):
    return given_total(*stores_law(), rows, values)


def test_dependent_totals_of_a_gaussian_program_have_their_joint_law():
    model = pm.macro_do(stores, {A: pm.Natural(5.0), B: pm.Natural(2.0)})
    mean, cov = conditional([[1, 1, 0, 0], [0, 0, 1, 1]], [5.0, 2.0])
    for _ in range(5):
        nodes = pyro.poutine.trace(model).get_trace().nodes
        x = torch.stack([nodes[k]["value"] for k in NAMES])
        found = sum(
            nodes[k]["fn"].log_prob(nodes[k]["value"]) for k in ("A__micro", "B__micro")
        )
        free = [0, 2]
        expected = dist.MultivariateNormal(mean[free], cov[free][:, free])
        assert torch.isclose(found, expected.log_prob(x[free]))
        assert nodes["A"]["value"] == 5.0 and nodes["B"]["value"] == 2.0


def test_draws_of_dependent_totals_have_the_joint_moments():
    model = pm.macro_do(stores, {A: pm.Natural(5.0), B: pm.Natural(2.0)})
    mean, cov = conditional([[1, 1, 0, 0], [0, 0, 1, 1]], [5.0, 2.0])
    x = draw(model, NAMES, 40_000).reshape(-1, 4)
    assert ((x.mean(0) - mean).abs() < 5 * (cov.diag() / 40_000).sqrt() + 1e-9).all()
    assert torch.allclose(torch.cov(x.T), cov, atol=0.06)


def test_the_order_in_the_dictionary_does_not_matter():
    one = pm.macro_do(stores, {A: pm.Natural(5.0), B: pm.Natural(2.0)})
    other = pm.macro_do(stores, {B: pm.Natural(2.0), A: pm.Natural(5.0)})
    pyro.set_rng_seed(1)
    first = pyro.poutine.trace(one).get_trace()
    pyro.set_rng_seed(1)
    second = pyro.poutine.trace(other).get_trace()
    assert list(first.nodes) == list(second.nodes)
    assert first.log_prob_sum() == second.log_prob_sum()


def test_gradients_of_the_joint_density_are_those_of_differences():
    def model(shift):
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        a1 = pyro.sample("a1", dist.Normal(shift * z, 1.0))
        a2 = pyro.sample("a2", dist.Normal(2 + z, 2.0))
        b1 = pyro.sample("b1", dist.Normal(3 - z, 1.0))
        b2 = pyro.sample("b2", dist.Normal(1 + 3 * z * shift, 1.5))
        return a1 + a2 + b1 + b2

    both = pm.macro_do(model, {A: pm.Natural(5.0), B: pm.Natural(2.0)})
    values = {
        "z": torch.tensor(0.3),
        "A__micro": torch.tensor([3.0, 2.0]),
        "B__micro": torch.tensor([0.5, 1.5]),
    }

    def density(shift):
        fixed = pyro.poutine.condition(both, values)
        return pyro.poutine.trace(fixed).get_trace(shift).log_prob_sum()

    shift = torch.tensor(0.7, requires_grad=True)
    (found,) = torch.autograd.grad(density(shift), shift)
    h = 1e-5
    expected = (density(torch.tensor(0.7 + h)) - density(torch.tensor(0.7 - h))) / 2 / h
    assert torch.isclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dim", [-1, -2])
def test_totals_over_different_plates(dim):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("a", 3, dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0))
        with pyro.plate("b", 2, dim=dim):
            pyro.sample("y", dist.Normal(-z, 2.0))

    x = pm.MacroVariable("X", "x", over="a")
    y = pm.MacroVariable("Y", "y", over="b")
    both = pm.macro_do(model, {x: pm.Natural(3.0), y: pm.Natural(-4.0)})
    cov = torch.diag(torch.tensor([1.0, 1, 1, 4, 4])) + torch.outer(
        s := torch.tensor([1.0, 1, 1, -1, -1]), s
    )
    rows = torch.tensor([[1.0, 1, 1, 0, 0], [0, 0, 0, 1, 1]])
    gain = cov @ rows.T @ torch.linalg.inv(rows @ cov @ rows.T)
    mean, cov = gain @ torch.tensor([3.0, -4.0]), cov - gain @ rows @ cov
    nodes = pyro.poutine.trace(both).get_trace().nodes
    micro = [nodes[k]["value"].flatten() for k in ("x", "y")]
    found = sum(
        nodes[k]["fn"].log_prob(nodes[k]["value"]).sum()
        for k in ("X__micro", "Y__micro")
    )
    free = [0, 1, 3]
    law = dist.MultivariateNormal(mean[free], cov[free][:, free])
    assert torch.isclose(found, law.log_prob(torch.cat(micro)[free]))


# Finite


def days():
    z = pyro.sample("z", dist.Bernoulli(0.4))
    table = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.4, 0.1]])
    a1 = pyro.sample("a1", dist.Categorical(table[z.long()]))
    b1 = pyro.sample("b1", dist.Binomial(4, 0.2 + 0.5 * z))
    a2 = pyro.sample("a2", dist.Bernoulli(0.3 + 0.4 * z))
    b2 = pyro.sample("b2", dist.Poisson(1 + 2 * z))
    return a1 + a2 + b1 + b2


def table_of(values):
    """Probabilities of the states on the fibre, by enumeration."""
    found = {}
    grid = product(range(3), range(2), range(5), range(9))
    for state in (torch.tensor(s, dtype=torch.float64) for s in grid):
        a1, a2, b1, b2 = state
        if a1 + a2 != values[0] or b1 + b2 != values[1]:
            continue
        total = 0.0
        for z in (0.0, 1.0):
            fixed = {"z": z, "a1": a1.long(), "a2": a2, "b1": b1, "b2": b2}
            fixed = {k: torch.as_tensor(v) for k, v in fixed.items()}
            trace = pyro.poutine.trace(pyro.poutine.condition(days, fixed)).get_trace()
            total = total + trace.log_prob_sum().exp()
        found[tuple(state.tolist())] = total
    norm = sum(found.values())
    return {state: float(p / norm) for state, p in found.items()}


def test_dependent_totals_of_a_finite_program_have_their_joint_law():
    both = pm.macro_do(days, {A: pm.Natural(2.0), B: pm.Natural(3.0)})
    expected = table_of([2.0, 3.0])
    seen = {}
    for _ in range(60):
        nodes = pyro.poutine.trace(both).get_trace().nodes
        state = tuple(float(nodes[k]["value"]) for k in NAMES)
        found = sum(
            nodes[k]["fn"].log_prob(nodes[k]["value"]) for k in ("A__micro", "B__micro")
        )
        seen[state] = found.exp().item()
    assert len(seen) > 5
    for state, probability in seen.items():
        assert abs(probability - expected[state]) < 1e-9, state


def test_draws_of_dependent_finite_totals_are_as_often_as_they_should():
    both = pm.macro_do(days, {A: pm.Natural(2.0), B: pm.Natural(3.0)})
    expected = table_of([2.0, 3.0])
    x = draw(both, NAMES, 20_000).reshape(-1, 4)
    states = torch.tensor(list(expected))
    counts = (x.unsqueeze(1) == states).all(-1).sum(0)
    assert counts.sum() == 20_000
    mean = 20_000 * torch.tensor(list(expected.values()))
    chi_squared = ((counts - mean) ** 2 / mean).sum()
    law = torch.distributions.Chi2(float(len(states) - 1))
    assert 1 - law.cdf(chi_squared) > 1e-3


# Several aggregates of the same sites

SUM = pm.MacroVariable("S", ["a", "b", "c"])
WEIGHTED = pm.MacroVariable("W", ["c", "a"], aggregation=pm.Linear([1.0, 3.0]))


def gaussian():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("a", dist.Normal(1 + z, 1.0))
    pyro.sample("b", dist.Normal(2.0, 2.0))
    pyro.sample("c", dist.Normal(3 - z, 0.5))


def test_two_rows_of_the_same_sites_are_met_together():
    both = pm.macro_do(gaussian, {SUM: pm.Natural(5.0), WEIGHTED: pm.Natural(2.0)})
    nodes = pyro.poutine.trace(both).get_trace().nodes
    law = nodes["S_W__micro"]["fn"]
    cov = torch.diag(torch.tensor([1.0, 4.0, 0.25]))
    cov = cov + torch.outer(s := torch.tensor([1.0, 0.0, -1.0]), s)
    rows = torch.tensor([[1.0, 1.0, 1.0], [3.0, 0.0, 1.0]])
    gain = cov @ rows.T @ torch.linalg.inv(rows @ cov @ rows.T)
    mean = torch.tensor([1.0, 2.0, 3.0])
    expected = mean + gain @ (torch.tensor([5.0, 2.0]) - rows @ mean)
    assert torch.allclose(law.mean, expected)
    assert torch.allclose(law.covariance_matrix, cov - gain @ rows @ cov)
    assert nodes["S"]["value"] == 5.0 and nodes["W"]["value"] == 2.0
    vector = pm.MacroVariable("V", ["a", "b", "c"], aggregation=pm.Linear(rows))
    alone = pm.macro_do(gaussian, {vector: pm.Natural(torch.tensor([5.0, 2.0]))})
    other = pyro.poutine.trace(alone).get_trace().nodes["V__micro"]["fn"]
    assert torch.allclose(law.mean, other.mean)


def test_a_sum_and_a_maximum_of_the_same_finite_sites():
    def dice():
        for name in "abc":
            pyro.sample(name, dist.Categorical(torch.tensor([1.0, 2, 3, 4])))

    top = pm.MacroVariable("top", ["a", "b", "c"], aggregation=pm.Max())
    both = pm.macro_do(dice, {SUM: pm.Natural(5.0), top: pm.Natural(3.0)})
    law = pyro.poutine.trace(both).get_trace().nodes["S_top__micro"]["fn"]
    states = torch.tensor(
        [s for s in product(range(4), repeat=3) if sum(s) == 5 and max(s) == 3]
    ).double()
    weight = (states + 1).prod(-1)
    assert len(law.enumerate_support()) == len(states)
    assert torch.allclose(law.log_prob(states).exp(), weight / weight.sum())


def test_dependent_rows_are_refused():
    double = pm.MacroVariable("D", ["a", "b", "c"], aggregation=pm.Linear([2.0] * 3))
    with pytest.raises(pm.NotAMicroState, match="share micro sites are dependent"):
        pm.macro_do(gaussian, {SUM: pm.Natural(5.0), double: pm.Natural(10.0)})()


def test_only_natural_realizations_can_share_sites():
    with pytest.raises(pm.PyroMacroError, match="'a' belongs to both 'S' and 'W'"):
        pm.macro_do(
            gaussian, {SUM: pm.Allocate(5.0, [1, 0, 0]), WEIGHTED: pm.Natural(2.0)}
        )
    with pytest.raises(pm.PyroMacroError, match="belongs to both"):
        pm.macro_do(
            gaussian, {SUM: pm.Natural(5.0), WEIGHTED: pm.Natural(2.0, given="z")}
        )


# Inference


def test_svi_infers_both_micro_states():
    both = pm.macro_do(stores, {A: pm.Natural(5.0), B: pm.Natural(2.0)})
    seen = pyro.poutine.condition(both, {"y": torch.tensor(20.0)})
    guide = AutoMultivariateNormal(seen)
    svi = SVI(seen, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step() for _ in range(100)]
    assert sum(losses[-30:]) < sum(losses[:30])
    values = guide.median()
    assert torch.isclose(values["A__micro"].sum(), torch.tensor(5.0))
    assert torch.isclose(values["B__micro"].sum(), torch.tensor(2.0))


def test_enumeration_around_two_finite_totals():
    both = pm.macro_do(days, {A: pm.Natural(2.0), B: pm.Natural(3.0)})

    def model():
        total = both()
        pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(4.0))

    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    loss = elbo.loss(config_enumerate(model), lambda: None)
    # The sum of all parts is 5 in every state
    assert abs(loss + dist.Normal(5.0, 1.0).log_prob(torch.tensor(4.0))) < 1e-9
