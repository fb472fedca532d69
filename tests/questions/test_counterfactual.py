# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Counterfactuals of one unit: closed forms, explicit noise, and what is refused."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_macro as pm
from pyro_macro.laws.finite import twin as finite_twin
from pyro_macro.laws.gaussian import twin

SALES = pm.MacroVariable("sales", micro=["x1", "x2"])
AT = [30.0, 33.0, 36.0]
SEEN = {"x1": 12.0, "x2": 21.0, "revenue": 76.0}


def shop():
    x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))


def season():
    """Figure 3 of the paper: a season acts on the sales, and on the revenue."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    x1 = pyro.sample("x1", dist.Normal(10 + z, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20 - z, 1.0))
    pyro.sample("revenue", dist.Normal(x1 + 3 * x2 + 2 * z, 1.0))


def ask(model, realization, observed, effect="revenue", at=None, **options):
    return pm.counterfactual(
        model, {SALES: realization}, observed, effect, at, **options
    )


def close(found, *expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected.reshape(found.shape))


def given(mean, cov, rows, values):
    """A normal law once ``rows @ z`` is known, by the textbook formula."""
    rows, values = np.atleast_2d(rows), np.atleast_1d(values)
    gain = cov @ rows.T @ np.linalg.inv(rows @ cov @ rows.T)
    return mean + gain @ (values - rows @ mean), cov - gain @ rows @ cov


# Closed forms


@pytest.mark.parametrize("delta", [-2.0, 0.0, 3.0])
def test_a_shift_moves_the_unit_itself(delta):
    # Revenue moves by 1.4 a sale, whatever else is not known of the week
    for seen in (SEEN, {SALES: 33.0, "revenue": 76.0}, {"revenue": 76.0}):
        report = ask(shop, pm.Shift(delta), seen)
        close(report.mean, 76 + 1.4 * delta)
        close(report.variance, 0.0)
        close(report.factual_mean, 76.0)
    report = ask(shop, pm.Shift(delta, along=[0.0, 1.0]), SEEN)
    close(report.mean, 76 + 3 * delta)


def test_a_shift_leaves_unknown_what_was_unknown():
    # Of (x1, x2, u) it is known that x1 + x2 = 33
    mean, cov = given(np.array([10.0, 20, 0]), np.diag([4.0, 1, 1]), [1, 1, 0], 33)
    row = np.array([1.0, 3, 1])
    report = ask(shop, pm.Shift(3.0), {SALES: 33.0})
    close(report.factual_mean, row @ mean)
    close(report.mean, row @ mean + 3 * 1.4)
    close(report.variance, row @ cov @ row)
    assert report.variance > 1


@pytest.mark.parametrize("seen", [{}, {"revenue": 76.0}, {SALES: 33.0}, SEEN])
def test_a_natural_micro_state_is_that_of_another_unit(seen):
    # Of (x1, x2, u): what is known of u is kept, and the micro state is drawn anew
    mean, cov = np.array([10.0, 20, 0]), np.diag([4.0, 1, 1])
    rows = {
        "x1": [1, 0, 0],
        "x2": [0, 1, 0],
        "revenue": [1, 3, 1],
        SALES: [1, 1, 0],
    }
    if seen:
        mean, cov = given(
            mean, cov, np.array([rows[k] for k in seen]), list(seen.values())
        )
    report = ask(shop, pm.Natural, seen, at=AT)
    anew = 28 + 1.4 * torch.tensor(AT)  # E[x1 + 3 x2 | sales]
    close(report.mean, *(anew + mean[2]).tolist())
    close(report.variance, *[3.2 + cov[2, 2]] * 3)


def test_other_realizations_of_a_week_that_was_seen():
    noise = 76.0 - 12 - 3 * 21
    report = ask(shop, lambda v: pm.Allocate(v, [0.25, 0.75]), SEEN, at=AT)
    close(report.mean, *[2.5 * v + noise for v in AT])
    close(report.variance, 0.0, 0.0, 0.0)
    report = ask(shop, pm.Proportional, SEEN, at=AT)
    close(report.mean, *[(12 + 3 * 21) * v / 33 + noise for v in AT])
    report = ask(shop, lambda v: pm.Residual(v, absorb="x2"), SEEN, at=AT)
    close(report.mean, *[10 + 3 * (v - 10) + noise for v in AT])
    close(report.variance, 16.0, 16.0, 16.0)  # (1 - 3)^2 Var(x1)

    def stated(value):
        loc = value * torch.tensor([0.5, 0.5])
        factor = torch.tensor([[1.0], [-1.0]])
        line = dist.LowRankMultivariateNormal(loc, factor, torch.full((2,), 1e-26))
        return line

    report = ask(shop, pm.Explicit(33.0, stated), SEEN)
    close(report.mean, 66 + noise)
    torch.testing.assert_close(report.variance, torch.tensor([4.0]))  # (1 - 3)^2


def test_hidden_causes_are_inferred_from_the_unit():
    # (z, x1, x2, u) of the confounded shop, by hand
    L = np.array([[1, 0, 0, 0], [1, 2, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 1.0]])
    mean, cov = np.array([0, 10.0, 20, 0]), L @ L.T
    revenue = np.array([2, 1, 3, 1.0])
    rows = np.array([[0, 1, 0, 0], [0, 0, 1, 0], revenue])
    mean, cov = given(mean, cov, rows, [12, 21, 76])
    report = ask(season, pm.Natural, SEEN, ["revenue", "z"], at=AT)
    # P(x | sales = v) of the program: Var x1 = 5, Var x2 = 2, Cov = -1
    within, crossed = 5.0, np.array([4.0, 1.0])
    for i, value in enumerate(AT):
        x = np.array([10, 20]) + crossed / within * (value - 30)
        left = np.array([[5, -1], [-1, 2.0]]) - np.outer(crossed, crossed) / within
        alpha, beta = np.array([1, 3.0]), np.array([2, 0, 0, 1.0])
        close(report.mean[i], alpha @ x + beta @ mean, mean[0])
        own = np.array([beta, [1, 0, 0, 0]])
        joint = own @ cov @ own.T
        joint[0, 0] += alpha @ left @ alpha
        close(report.covariance[i], *joint.ravel())
    close(report.factual_mean, 76.0, mean[0])
    close(report.factual_variance, 0.0, cov[0, 0])


def test_a_natural_micro_state_of_a_unit_like_this_one():
    # With given="z" it is P(x | sales, z) at the z of the week: 10 + z, 20 - z
    seen = {**SEEN, "z": 0.5}
    report = ask(season, lambda v: pm.Natural(v, given="z"), seen, at=AT)
    noise = 76 - 12 - 3 * 21 - 2 * 0.5
    expected = [10.5 + 0.8 * (v - 30) + 3 * (19.5 + 0.2 * (v - 30)) for v in AT]
    close(report.mean, *[e + 2 * 0.5 + noise for e in expected])
    close(report.variance, 3.2, 3.2, 3.2)


def test_what_the_intervention_does_not_act_on_stays_as_it_was():
    report = ask(season, pm.Natural(33.0), SEEN, ["z", "x1", SALES])
    was = report.factual_mean, report.factual_variance
    assert torch.equal(report.mean[0, :1], was[0][:1])
    close(report.mean[0, 1:], 10 + 4 / 5 * 3, 33.0)
    close(was[0][1:], 12.0, 33.0)
    close(report.variance[0, 2], 0.0)


@pytest.mark.parametrize("model", [shop, season])
@pytest.mark.parametrize(
    "seen", [SEEN, {"revenue": 76.0}, {"x1": 12.0, SALES: 33.0}, {}]
)
def test_consistency(model, seen):
    """Had the micro state been what it was, the effect would have been what it was."""
    report = ask(model, pm.Shift(0.0), seen, ["revenue", "x1", "x2"])
    torch.testing.assert_close(report.mean[0], report.factual_mean)
    torch.testing.assert_close(report.variance[0], report.factual_variance)
    if seen is SEEN:
        for same in (
            pm.Allocate(33.0, shares=[12 / 33, 21 / 33]),
            pm.Proportional(33.0),
            pm.Shift(0.0),
        ):
            report = ask(model, same, seen)
            close(report.mean, 76.0)
            close(report.variance, 0.0)


def test_two_interventions_at_once():
    upper = pm.MacroVariable("upper", micro=["a1", "a2"])
    lower = pm.MacroVariable("lower", micro=["b1", "b2"])

    def chain():
        a1 = pyro.sample("a1", dist.Normal(1.0, 1.0))
        a2 = pyro.sample("a2", dist.Normal(2.0, 1.0))
        b1 = pyro.sample("b1", dist.Normal(a1, 1.0))
        b2 = pyro.sample("b2", dist.Normal(a1 - a2, 2.0))
        pyro.sample("y", dist.Normal(b1 + 2 * b2 + a1, 1.0))

    seen = {"a1": 1.5, "a2": 1.0, "b1": 2.0, "b2": 0.0, "y": 4.0}
    noise = 4 - (2 + 0 + 1.5)

    def would(**done):
        done = {upper: done["on_upper"], lower: done["on_lower"]}
        return pm.counterfactual(chain, done, seen, ["b1", "b2", "y"])

    # The lower ones follow the upper ones, and are shifted from there
    both = would(on_upper=pm.Shift(1.0, [1.0, 0.0]), on_lower=pm.Shift(2.0, [0.5, 0.5]))
    close(both.mean, 3 + 1, 1 + 1, 4 + 2 * 2 + 2.5 + noise)
    close(both.variance, 0.0, 0.0, 0.0)
    point = pm.Allocate(6.0, [0.5, 0.5])
    both = would(on_upper=pm.Shift(1.0, [1.0, 0.0]), on_lower=point)
    close(both.mean, 3.0, 3.0, 3 + 2 * 3 + 2.5 + noise)
    # a1 ~ N(1.5, 1/2) and a2 = 4 - a1, both anew
    both = would(on_upper=pm.Natural(4.0), on_lower=pm.Shift(2.0, [0.5, 0.5]))
    b = [1.5 + 0.5 + 1, (1.5 - 2.5) - 0.5 + 1]
    close(both.mean, *b, b[0] + 2 * b[1] + 1.5 + noise)
    close(both.variance, 0.5, 2.0, 0.5 * (1 + 2 * 2 + 1) ** 2)


def test_what_is_moved_twice_keeps_its_noise_where_that_is_not_known():
    upper = pm.MacroVariable("upper", micro=["a1", "a2"])
    lower = pm.MacroVariable("lower", micro=["b1", "b2"])

    def chain():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        a1 = pyro.sample("a1", dist.Normal(0.0, 1.0))
        a2 = pyro.sample("a2", dist.Normal(0.0, 1.0))
        b1 = pyro.sample("b1", dist.Normal(z + z * 2 * a1, 1.0))
        b2 = pyro.sample("b2", dist.Normal(z + a2, 1.0))
        pyro.sample("y", dist.Normal(b1 + 2 * b2, 1.0))

    seen = {"a1": 1.0, "a2": 0.0, "b1": 3.0, "b2": 1.0}
    done = {upper: pm.Shift(1.0, [1.0, 0.0]), lower: pm.Shift(2.0, [1.0, 0.0])}
    alone = pm.counterfactual(chain, done, seen, "y")
    report = pm.counterfactual(chain, done, seen, ["y", "b1"])
    # b1 = 3 z + u1 = 3 and b2 = z + u2 = 1; it would be 5 z + u1 + 2 = 3 + 2 z + 2
    mean, cov = given(np.zeros(3), np.eye(3), [[3, 1, 0], [1, 0, 1]], [3, 1])
    b1 = 3 + 2 * mean[0] + 2
    close(report.mean, b1 + 2 * 1, b1)
    close(report.covariance, 4 * cov[0, 0] + 1, *[4 * cov[0, 0]] * 3)
    close(alone.mean, b1 + 2 * 1)
    close(alone.variance, 4 * cov[0, 0] + 1)


def test_what_is_moved_twice_may_be_a_vector():
    upper = pm.MacroVariable("upper", micro=["a1", "a2"])
    lower = pm.MacroVariable("lower", micro="b")
    tril = torch.tensor([[2.0, 0.0], [0.5, 1.0]])

    def chain():
        a1 = pyro.sample("a1", dist.Normal(0.0, 1.0))
        a2 = pyro.sample("a2", dist.Normal(0.0, 1.0))
        loc = torch.stack([a1, a1 + a2], -1)
        b = pyro.sample("b", dist.MultivariateNormal(loc, scale_tril=tril))
        pyro.sample("y", dist.Normal(b[..., 0] + 2 * b[..., 1], 1.0))

    seen = {"a1": 1.0, "a2": 0.0, "b": [3.0, 1.0], "y": 6.0}
    done = {upper: pm.Shift(1.0, [1.0, 0.0]), lower: pm.Shift(2.0, [1.0, 0.0])}
    report = pm.counterfactual(chain, done, seen, "y")
    close(report.mean, 6 + (1 + 2) + 2 * 1)
    close(report.variance, 0.0)


# What programs may look like


def test_observations_of_the_program_count():
    data = {k: torch.tensor(v) for k, v in SEEN.items()}
    held = pyro.poutine.condition(season, data=data)
    expected = ask(season, pm.Natural(33.0), SEEN, ["revenue", "z"])
    for model, seen in ((held, {}), (held, {"x1": 12.0}), (season, SEEN)):
        report = ask(model, pm.Natural(33.0), seen, ["revenue", "z"])
        assert torch.equal(report.mean, expected.mean)
        assert torch.equal(report.covariance, expected.covariance)
    with pytest.raises(pm.PyroMacroError, match="observed to be 12.0 in the program"):
        ask(held, pm.Natural(33.0), {"x1": 13.0})


def weeks(prices):
    with pyro.plate("weeks", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x1 = pyro.sample("x1", dist.Normal(10 + z, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20 - z, 1.0))
        mean = prices[0] * x1 + prices[1] * x2 + 2 * z
        pyro.sample("revenue", dist.Normal(mean, 1.0))


def test_units_side_by_side_in_a_plate():
    data = {
        "x1": torch.tensor([9.0, 10, 11, 12]),
        "x2": torch.tensor([19.0, 22, 21, 20]),
        "revenue": torch.tensor([70.0, 71, 72, 73]),
    }
    prices = {"model_args": (torch.tensor([1.0, 3.0]),)}
    report = ask(weeks, pm.Natural, data, at=AT, **prices)
    assert report.mean.shape == (3, 4) and report.covariance.shape == (3, 4, 4)
    values = torch.tensor([30.0, 31, 32, 33])
    each = ask(weeks, pm.Natural(values), data, **prices)
    assert each.mean.shape == (1, 4)
    for week in range(4):
        one = {k: v[week] for k, v in data.items()}
        alone = ask(season, pm.Natural, one, at=[*AT, values[week]])
        torch.testing.assert_close(report.mean[:, week], alone.mean[:3])
        torch.testing.assert_close(report.variance[:, week], alone.variance[:3])
        torch.testing.assert_close(each.mean[0, week], alone.mean[3])
    off = report.covariance - torch.diag_embed(report.variance)
    close(off.abs().max(), 0.0)
    assert [row["sales"] for row in each.rows()] == values.tolist()


def products(keepdim):
    """A plate that is summed over: with ``keepdim`` the program allows for a grid."""
    price = torch.linspace(1.0, 3.0, 5)
    with pyro.plate("products", 5):
        x = pyro.sample("x", dist.Normal(10.0 + price, price))
    total = (price * x).sum(-1, keepdim=keepdim)
    pyro.sample("revenue", dist.Normal(total, 1.0))


@pytest.mark.parametrize("keepdim", [False, True])
def test_a_grid_is_as_its_values_one_by_one(keepdim, monkeypatch):
    total = pm.MacroVariable("total", "x", over="products")
    seen = {"x": torch.linspace(9.0, 15.0, 5), "revenue": torch.tensor(140.0)}
    if keepdim:
        seen["revenue"] = seen["revenue"].reshape(1)
    at = torch.linspace(50.0, 80.0, 7)
    counted = []
    law = twin.affine_law

    def noted(*args):
        counted.append(args[3:])
        return law(*args)

    monkeypatch.setattr("pyro_macro.questions.counterfactual.affine_law", noted)
    whole = pm.counterfactual(
        products, {total: pm.Natural}, seen, "revenue", at, model_args=(keepdim,)
    )
    wide = [lead for (lead,) in (c for c in counted if c) if lead]
    assert wide == [(7,)] if keepdim else True
    assert len(counted) == (4 if keepdim else 1 + 7 + len(wide))
    for i, value in enumerate(at):
        one = pm.counterfactual(
            products,
            {total: pm.Natural(value)},
            seen,
            "revenue",
            model_args=(keepdim,),
        )
        torch.testing.assert_close(whole.mean[i], one.mean[0])
        torch.testing.assert_close(whole.covariance[i], one.covariance[0])


def test_a_program_that_adds_up_all_dimensions_is_not_run_on_a_grid():
    def greedy():
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        pyro.sample("revenue", dist.Normal((x1 + 3 * x2).sum(), 1.0))

    report = ask(greedy, pm.Natural, SEEN, at=AT)
    torch.testing.assert_close(report.mean, ask(shop, pm.Natural, SEEN, at=AT).mean)


def test_vectors_with_covariances_of_their_own():
    tril = torch.tensor([[2.0, 0.0], [0.5, 1.0]])

    def program():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
        y = pyro.sample("y", dist.MultivariateNormal(x + z, scale_tril=tril))
        factor, own = torch.tensor([[1.0], [0.5]]), torch.ones(2)
        pyro.sample("w", dist.LowRankMultivariateNormal(x - y, factor, own))

    both = pm.MacroVariable("both", "x")
    seen = {"x": [1.0, 2.0], "y": [2.0, 1.0], "w": [3.0, 4.0], "z": 0.5}
    move = pm.Shift(1.0, along=[1.5, -0.5])
    report = pm.counterfactual(program, {both: move}, seen, ["y", "w"])
    # Locations move, the noise stays: y by the shift, and w by that of x - y, nothing
    close(report.mean, 3.5, 0.5, 3.0, 4.0)
    close(report.variance, 0.0, 0.0, 0.0, 0.0)
    del seen["z"]
    report = pm.counterfactual(program, {both: move}, seen, ["y", "w"])
    close(report.mean, 3.5, 0.5, 3.0, 4.0)
    assert bool((report.variance < 1e-20).all())


def test_any_location_scale_program_if_all_that_matters_was_seen():
    def program():
        x1 = pyro.sample("x1", dist.Gamma(2.0, 1.0))
        x2 = pyro.sample("x2", dist.Normal(3.0, 1.0))
        pyro.sample("revenue", dist.Normal(torch.exp(x1 / 10) * x2, 0.1 + x2.abs()))

    seen = {"x1": 1.0, "x2": -2.0, "revenue": 8.0}
    report = ask(program, pm.Shift(3.0, [0.5, 0.5]), seen)
    noise = (8 + 2 * np.exp(0.1)) / 2.1
    close(report.mean, np.exp(0.25) * -0.5 + 0.6 * noise)
    close(report.variance, 0.0)
    with pytest.raises(pm.OffFibre, match="'x1' would get the value -0.5"):
        ask(program, pm.Shift(-3.0, [0.5, 0.5]), seen)
    with pytest.raises(pm.UnsupportedLaw, match="'revenue' is computed with .'abs'."):
        ask(program, pm.Shift(3.0, [0.5, 0.5]), {"x1": 1.0, "revenue": 8.0})


def test_a_large_unit():
    """Nothing of size K x K: what was seen has a hidden cause in common."""
    size = 20_000
    price, loc = torch.linspace(1.0, 3.0, size), torch.linspace(10.0, 20.0, size)

    def retail():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("products", size):
            x = pyro.sample("x", dist.Normal(loc + 0.1 * z, 2.0))
            y = pyro.sample("y", dist.Normal(price * x - z, 1.0))
        pyro.sample("profit", dist.Normal((0.1 * y).sum(-1) + z, 1.0))

    total = pm.MacroVariable("total", "x", over="products")
    revenue = pm.MacroVariable("revenue", "y", over="products")
    nodes = pyro.poutine.trace(retail).get_trace().nodes
    seen = {n: nodes[n]["value"] for n in ("x", "y", "profit")}
    report = pm.counterfactual(
        retail, {total: pm.Shift(100.0)}, seen, [revenue, "profit", "z"]
    )
    # The natural direction is Cov(x, total), and so nearly the same for all
    sums = 4.0 + 0.01 * size
    step = torch.full((size,), 100 * sums / (size * sums))
    moved = (price * step).sum()
    close(report.mean[0, 0], seen["y"].sum() + moved)
    close(report.mean[0, 1], seen["profit"] + 0.1 * moved)
    close(report.variance[0, :2], 0.0, 0.0)
    # z: a normal prior, and three kinds of evidence
    a = torch.full((size,), 0.1)
    precision = 1 + (a * a / 4).sum() + size + 1
    pull = (a * (seen["x"] - loc) / 4).sum() - (seen["y"] - price * seen["x"]).sum()
    pull = pull + seen["profit"] - 0.1 * seen["y"].sum()
    close(report.mean[0, 2], pull / precision)
    close(report.variance[0, 2], 1 / precision)


# Finite programs, against enumeration of explicit noise


class Scm:
    """Structural equations ``value = f(parents, noise)`` with finitely many noises.

    :param tables: by site its parents and, for each of their values, probabilities;
        or, as a function, the equation of a deterministic site.
    :param coupling: which noise the tables stand for.
    """

    def __init__(self, tables, coupling):
        self.tables, self.noises = tables, {}
        for name, (_, table) in tables.items():
            if callable(table):
                self.noises[name] = [(1.0, None)]
            elif coupling == "monotone":
                self.noises[name] = self.intervals(table)
            else:
                self.noises[name] = self.responses(table)

    @staticmethod
    def responses(table):
        """One draw for each configuration of the parents."""
        found = []
        for one in itertools.product(*(list(enumerate(p)) for p in table.values())):
            response = {k: v for k, (v, _) in zip(table, one, strict=True)}
            found.append((np.prod([p for _, p in one]), response))
        return found

    @staticmethod
    def intervals(table):
        """A uniform number, of which only an interval matters."""
        ends = {k: np.cumsum(p) for k, p in table.items()}
        cuts = sorted({0.0, *np.concatenate(list(ends.values())).round(12)})
        found = []
        for low, high in zip(cuts, cuts[1:], strict=False):
            u = (low + high) / 2
            response = {k: int(np.searchsorted(e, u)) for k, e in ends.items()}
            found.append((high - low, response))
        return found

    def run(self, noise, done=None):
        values = {}
        for name, (parents, table) in self.tables.items():
            at = tuple(values[p] for p in parents)
            values[name] = table(*at) if callable(table) else noise[name][at]
            if done and name in done:
                values[name] = done[name]
        return values

    def worlds(self):
        names = list(self.noises)
        for each in itertools.product(*self.noises.values()):
            weight = np.prod([p for p, _ in each])
            if weight:
                yield weight, dict(zip(names, [n for _, n in each], strict=True))

    def natural(self, total, **keep):
        """``P(x1, x2 | x1 + x2 = total)``, given other values."""
        found = {}
        random = {n: t for n, t in self.tables.items() if not callable(t[1])}
        ranges = [range(len(next(iter(t.values())))) for _, t in random.values()]
        for state in itertools.product(*ranges):
            values = dict(zip(random, state, strict=True))
            if any(values[k] != v for k, v in keep.items()):
                continue
            weight = 1.0
            for name, (above, table) in random.items():
                weight *= table[tuple(values[p] for p in above)][values[name]]
            key = values["x1"], values["x2"]
            if sum(key) == total:
                found[key] = found.get(key, 0) + weight
        whole = sum(found.values())
        return [({"x1": a, "x2": b}, w / whole) for (a, b), w in found.items()]

    def counterfactual(self, seen, effects, states):
        """The law of effects in both worlds.

        :param states: from a world to the micro states it is set to, with weights.
        """
        was, would = {}, {}
        for weight, noise in self.worlds():
            values = self.run(noise)
            if any(values[k] != v for k, v in seen.items()):
                continue
            key = tuple(values[e] for e in effects)
            was[key] = was.get(key, 0) + weight
            for done, share in states(values):
                other = self.run(noise, done)
                key = tuple(other[e] for e in effects)
                would[key] = would.get(key, 0) + weight * share
        return tuple(
            {k: w / sum(law.values()) for k, w in law.items()} for law in (was, would)
        )

    def model(self):
        """The same as a Pyro program, its noise inside the distributions."""
        values = {}
        for name, (parents, table) in self.tables.items():
            at = [values[p] for p in parents]
            if callable(table):
                values[name] = pyro.deterministic(name, table(*at))
                continue
            sizes = [1 + max(k[i] for k in table) for i in range(len(parents))]
            probs = torch.zeros(*sizes, len(next(iter(table.values()))))
            for key, p in table.items():
                probs[key] = torch.as_tensor(p)
            law = dist.Categorical(probs[tuple(v.long() for v in at)])
            values[name] = pyro.sample(name, law)


def drawn_tables(seed):
    rng = np.random.default_rng(seed)
    sizes = {"z": 2, "x1": 2, "x2": 3, "m": 2, "y": 2}
    parents = {"z": (), "x1": ("z",), "x2": ("z",), "m": ("x1",), "y": ("m", "x2")}
    tables = {}
    for name, above in parents.items():
        keys = itertools.product(*(range(sizes[p]) for p in above))
        table = {k: rng.dirichlet(np.ones(sizes[name])) for k in keys}
        tables[name] = above, table
    tables["w"] = ("y", "z"), lambda y, z: 2 * y + z
    return tables


def law_of(report, which=None):
    weights = report.factual_probabilities
    weights = weights if which is None else report.probabilities[which]
    rows = zip(report.outcomes.tolist(), weights.tolist(), strict=True)
    return {tuple(map(round, k)): w for k, w in rows if w > 1e-14}


def same_law(found, expected):
    expected = {k: w for k, w in expected.items() if w > 1e-14}
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        assert found[key] == pytest.approx(weight, abs=1e-9)


SEEN_SETS = [
    {"x1": 0, "x2": 1, "y": 1},
    {"y": 1},
    {"x1": 1, "x2": 1, "m": 1, "y": 0, "z": 1},
    {"w": 3},
    {},
]


@pytest.mark.parametrize("coupling", ["independent", "monotone"])
@pytest.mark.parametrize("seen", SEEN_SETS, ids=str)
def test_finite_against_explicit_noise(seen, coupling):
    for seed in range(2 if coupling == "monotone" else 1):
        scm = Scm(drawn_tables(seed), coupling)
        report = ask(scm.model, pm.Natural, seen, ["w", "m"], [1, 2], noise=coupling)
        assert report.method == f"exact: finite, {coupling} responses"
        for i, total in enumerate((1, 2)):
            done = scm.natural(total)
            was, would = scm.counterfactual(seen, ["w", "m"], lambda _, d=done: d)
            same_law(law_of(report), was)
            same_law(law_of(report, i), would)
            mean = sum(k[0] * p for k, p in would.items())
            assert report.mean[i, 0].item() == pytest.approx(mean)


@pytest.mark.parametrize("coupling", ["independent", "monotone"])
def test_finite_shift_and_allocate(coupling):
    scm = Scm(drawn_tables(3), coupling)
    seen = {"x2": 1, "y": 0}
    report = ask(scm.model, pm.Shift(1.0, along=[0.0, 1.0]), seen, "w", noise=coupling)
    was, would = scm.counterfactual(
        seen, ["w"], lambda v: [({"x1": v["x1"], "x2": v["x2"] + 1}, 1.0)]
    )
    same_law(law_of(report), was)
    same_law(law_of(report, 0), would)
    report = ask(
        scm.model, pm.Allocate(2.0, [0.5, 0.5]), seen, ["w", "y"], noise=coupling
    )
    _, would = scm.counterfactual(
        seen, ["w", "y"], lambda v: [({"x1": 1, "x2": 1}, 1.0)]
    )
    same_law(law_of(report, 0), would)


def test_finite_natural_in_a_unit_like_this_one():
    scm = Scm(drawn_tables(4), "independent")
    seen = {"x2": 1, "y": 0, "m": 1}  # z is not known
    laws = [scm.natural(2, z=z) for z in (0, 1)]
    report = ask(scm.model, pm.Natural(2.0, given="z"), seen, ["w", "z"])
    _, would = scm.counterfactual(seen, ["w", "z"], lambda v: laws[v["z"]])
    same_law(law_of(report, 0), would)
    law = scm.natural(2)
    other = scm.counterfactual(seen, ["w", "z"], lambda v: law)[1]
    assert any(abs(other[k] - would[k]) > 1e-3 for k in would)


def test_totals_that_were_seen_of_a_finite_program():
    scm = Scm(drawn_tables(5), "independent")
    report = ask(scm.model, pm.Natural(3.0), {SALES: 2.0, "y": 1}, "w")
    totals = {k: {} for k in ("was", "would")}
    law = scm.natural(3)
    for weight, noise in scm.worlds():
        values = scm.run(noise)
        if values["x1"] + values["x2"] != 2 or values["y"] != 1:
            continue
        key = (values["w"],)
        totals["was"][key] = totals["was"].get(key, 0) + weight
        for done, share in law:
            key = (scm.run(noise, done)["w"],)
            totals["would"][key] = totals["would"].get(key, 0) + weight * share
    whole = sum(totals["was"].values())
    same_law(law_of(report), {k: w / whole for k, w in totals["was"].items()})
    same_law(law_of(report, 0), {k: w / whole for k, w in totals["would"].items()})


def with_noise_of_its_own():
    """All that is random is exogenous: no coupling has to be chosen."""
    u = pyro.sample("u", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    x1 = pyro.sample("x1", dist.Bernoulli(0.3))
    x2 = pyro.sample("x2", dist.Bernoulli(0.6))
    pyro.deterministic("y", (x1 + 2 * x2 + u >= 2).double())


@pytest.mark.parametrize("coupling", ["independent", "monotone"])
def test_a_program_with_explicit_noise_is_unambiguous(coupling):
    seen = {"x1": 1.0, "x2": 0.0, "y": 1.0}  # so that u is 1 or 2
    report = ask(
        with_noise_of_its_own, pm.Natural, seen, "y", [0, 1, 2], noise=coupling
    )
    assert report.method == "exact: finite"
    close(report.probabilities, 3 / 8, 5 / 8, 0.0, 1.0, 0.0, 1.0)
    close(report.factual_probabilities, 0.0, 1.0)
    with pytest.raises(pm.Infeasible, match="'y' was seen to be"):
        ask(with_noise_of_its_own, pm.Natural(1.0), {**seen, "u": 0}, "y")


def test_a_finite_shift_of_deterministic_sites():
    def boxes():
        a = pyro.sample("a", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        b = pyro.sample("b", dist.Bernoulli(0.4))
        x1 = pyro.deterministic("x1", a + b)
        x2 = pyro.deterministic("x2", 2 * b)
        pyro.deterministic("y", (x1 + 3 * x2 + a).clamp(max=8))

    seen = {"y": 4.0}  # a = 2 and b = 0 alone; 7 and more where b = 1
    report = ask(boxes, pm.Shift(3.0, along=[0.0, 1.0]), seen, "y")
    assert report.method == "exact: finite"
    close(report.mean, 8.0)
    report = ask(boxes, pm.Shift(1.0, along=[1.0, 0.0]), {}, "y")
    chances = torch.tensor([0.2, 0.3, 0.5])
    zero = (chances * torch.tensor([1.0, 3.0, 5.0])).sum()
    one = (chances * torch.tensor([8.0, 8.0, 8.0])).sum()
    close(report.mean, 0.6 * zero + 0.4 * one)


def test_the_largest_of_what_was_seen():
    most = pm.MacroVariable("most", ["x1", "x2"], (), pm.Max())
    report = ask(shop, pm.Shift(30.0, [1.0, 0.0]), {**SEEN, most: 21.0}, most)
    close(report.factual_mean, 21.0)
    close(report.mean, 42.0)


def test_finite_consistency():
    scm = Scm(drawn_tables(6), "independent")
    for coupling in ("independent", "monotone"):
        report = ask(
            scm.model, pm.Shift(0.0, [1.0, 0.0]), {"y": 1}, ["w", "m"], noise=coupling
        )
        torch.testing.assert_close(
            report.probabilities[0], report.factual_probabilities
        )


def test_elements_of_a_plate_have_noise_of_their_own():
    def customers():
        x1 = pyro.sample("x1", dist.Bernoulli(0.5))
        x2 = pyro.sample("x2", dist.Bernoulli(0.5))
        with pyro.plate("customers", 3):
            pyro.sample("y", dist.Bernoulli(0.2 + 0.3 * x1 + 0.4 * x2))

    seen = {"x1": 0.0, "x2": 0.0, "y": [1.0, 0.0, 0.0]}
    report = ask(customers, pm.Allocate(2.0, [0.5, 0.5]), seen, "y", noise="monotone")
    # u <= 0.2 stays, and of those above 7/8 are below 0.9
    assert report.mean.shape == (1, 3)
    close(report.mean, 1.0, 7 / 8, 7 / 8)
    report = ask(customers, pm.Allocate(2.0, [0.5, 0.5]), seen, "y")
    close(report.mean, 0.9, 0.9, 0.9)
    close(report.covariance[0], *(0.09 * np.eye(3)).ravel())


def test_a_finite_effect_of_a_continuous_micro_state_that_was_seen():
    def clinic():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        x1 = pyro.sample("x1", dist.Normal(z, 1.0))
        x2 = pyro.sample("x2", dist.Normal(0.0, 1.0))
        pyro.sample("ill", dist.Bernoulli(logits=x1 + 2 * x2 - z))

    seen = {"x1": 0.2, "x2": -0.1, "ill": 0.0}
    report = ask(clinic, pm.Shift(1.0, [1.0, 0.0]), seen, "ill", noise="monotone")

    def chance(logit):
        return 1 / (1 + np.exp(-logit))

    weight = np.array([0.7, 0.3]) * np.exp(-0.5 * (0.2 - np.array([0, 1])) ** 2)
    p = chance(np.array([0.0, -1.0]))
    q = chance(np.array([1.0, 0.0]))
    posterior = weight * (1 - p)
    healthy = (posterior * (1 - q) / (1 - p)).sum() / posterior.sum()
    close(report.probabilities, healthy, 1 - healthy)


def test_a_finite_program_that_looks_at_one_world_only():
    def branching():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        x1 = pyro.sample("x1", dist.Bernoulli(0.3))
        x2 = pyro.sample("x2", dist.Bernoulli(0.8 if z.item() else 0.2))
        pyro.sample("y", dist.Bernoulli(0.1 + 0.5 * x1 + 0.3 * x2 * z))

    def plain():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        x1 = pyro.sample("x1", dist.Bernoulli(0.3))
        x2 = pyro.sample("x2", dist.Bernoulli(0.2 + 0.6 * z))
        pyro.sample("y", dist.Bernoulli(0.1 + 0.5 * x1 + 0.3 * x2 * z))

    done = pm.Allocate(2.0, [0.5, 0.5])
    one = ask(branching, done, {"x2": 1.0, "y": 1.0}, ["y", "z"])
    other = ask(plain, done, {"x2": 1.0, "y": 1.0}, ["y", "z"])
    torch.testing.assert_close(one.probabilities, other.probabilities)


# What is refused


def gammas():
    x1 = pyro.sample("x1", dist.Gamma(2.0, 1.0))
    x2 = pyro.sample("x2", dist.Gamma(3.0, 1.0))
    pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))


def product():
    x1 = pyro.sample("x1", dist.Normal(1.0, 1.0))
    x2 = pyro.sample("x2", dist.Normal(1.0, 1.0))
    pyro.sample("revenue", dist.Normal(x1 * x2, 1.0))


def counts():
    x1 = pyro.sample("x1", dist.Normal(1.0, 1.0))
    x2 = pyro.sample("x2", dist.Normal(1.0, 1.0))
    pyro.sample("revenue", dist.Poisson((x1 + x2).exp()))


def weighed():
    x1 = pyro.sample("x1", dist.Normal(1.0, 1.0))
    x2 = pyro.sample("x2", dist.Normal(1.0, 1.0))
    pyro.factor("weight", -x1.square())
    pyro.sample("revenue", dist.Normal(x1 + x2, 1.0))


def masked():
    x1 = pyro.sample("x1", dist.Normal(1.0, 1.0))
    x2 = pyro.sample("x2", dist.Normal(1.0, 1.0))
    with pyro.poutine.scale(scale=0.5):
        pyro.sample("other", dist.Normal(x1, 1.0), obs=torch.tensor(1.0))
    pyro.sample("revenue", dist.Normal(x1 + x2, 1.0))


def chance():
    x1 = pyro.sample("x1", dist.Normal(1.0, 1.0))
    x2 = pyro.sample("x2", dist.Normal(1.0, 1.0))
    pyro.sample("revenue", dist.Normal(x1 + x2 + torch.rand(()), 1.0))


def many():
    total = 0
    for i in range(21):
        total = total + pyro.sample(f"z{i}", dist.Bernoulli(0.5))
    x1 = pyro.sample("x1", dist.Bernoulli(0.01 * total))
    x2 = pyro.sample("x2", dist.Bernoulli(0.5))
    pyro.sample("revenue", dist.Bernoulli(0.1 + 0.3 * x1 + 0.3 * x2))


REFUSED = [
    (dict(model=3), pm.PyroMacroError, "not callable"),
    (dict(done=pm.Natural), pm.PyroMacroError, "at is None"),
    (dict(at=[1.0]), pm.PyroMacroError, "functions of the macro value"),
    (dict(done=33.0), pm.PyroMacroError, "Expected a micro-realization"),
    (dict(done=pm.Allocate, at=[3.0]), pm.PyroMacroError, "lambda value: Allocate"),
    (dict(done=pm.Natural, at="x"), pm.PyroMacroError, "Expected macro values"),
    (dict(done=pm.Natural, at=[[3.0]]), pm.PyroMacroError, r"Expected \(n,\)"),
    (dict(done=pm.Natural, at=[np.nan]), pm.PyroMacroError, "finite numbers"),
    (dict(done=pm.Natural(torch.tensor(AT))), pm.PyroMacroError, r"at=\[\.\.\.\]"),
    (dict(noise="gumbel"), pm.PyroMacroError, "Expected one of"),
    (dict(seen=[1.0]), pm.PyroMacroError, "Expected a dictionary"),
    (dict(seen={3: 1.0}), pm.PyroMacroError, "Expected names of sites"),
    (dict(seen={"x3": 1.0}), pm.UnknownSite, "Did you mean"),
    (dict(seen={"x1": "a"}), pm.PyroMacroError, "Expected numbers"),
    (dict(seen={"x1": [1.0, 2.0]}), pm.PyroMacroError, r"Expected numbers of shape"),
    (dict(seen={"x1": np.nan}), pm.PyroMacroError, "leave out what was not seen"),
    (dict(effect="sale"), pm.UnknownSite, "effect 'sale'"),
    (dict(effect=[]), pm.PyroMacroError, "Expected a MacroVariable"),
    (dict(seen={SALES: 30.0, "x1": 9.0, "x2": 9.0}), pm.Infeasible, "misses by 12"),
    (dict(done=pm.Proportional(33.0), seen={"x1": 9.0}), pm.UnsupportedLaw, "'x2'"),
    (
        dict(model=season, done=pm.Natural(33.0, given="z")),
        pm.UnsupportedLaw,
        r"where what is given is known.* Observe \['z'\]",
    ),
    (
        dict(
            done=pm.Explicit(3.0, lambda v: dist.Delta(v * torch.ones(2), event_dim=1))
        ),
        pm.OffFibre,
        "has the macro value 6. Expected 3",
    ),
    (
        dict(seen={pm.MacroVariable("most", ["x1", "x2"], (), pm.Max()): 50.0}),
        pm.UnsupportedLaw,
        r"Max\(\) of what was not seen is no weighted sum",
    ),
    (
        dict(seen={}, effect=pm.MacroVariable("most", ["x1", "x2"], (), pm.Max())),
        pm.UnsupportedLaw,
        r"Max\(\) of what was not seen is no weighted sum",
    ),
    (dict(model=gammas), pm.UnsupportedLaw, "depends on 'x1', which is Gamma"),
    (
        dict(model=gammas, done=pm.Shift(1.0, [0.5, 0.5]), seen={"x1": 1.0}),
        pm.UnsupportedLaw,
        "'x2' is Gamma, which is not Gaussian",
    ),
    (
        dict(model=gammas, done=pm.Shift(1.0, [0.5, 0.5]), seen={"x1": -1.0}),
        pm.Infeasible,
        "which a Gamma cannot be",
    ),
    (dict(model=product), pm.UnsupportedLaw, r"\['revenue'\] is not where"),
    (
        dict(model=product, seen={"revenue": 1.0}, effect="x1"),
        pm.UnsupportedLaw,
        r"what was seen \(\['revenue'\]\) is not where",
    ),
    (
        dict(model=counts, done=pm.Shift(1.0), seen={"x1": 1.0, "x2": 1, "revenue": 3}),
        pm.UnsupportedLaw,
        "'revenue' is Poisson",
    ),
    (dict(model=weighed, seen={"revenue": 1.0}), pm.UnsupportedLaw, "factor 'weight'"),
    (
        dict(model=masked, seen={"revenue": 1.0}),
        pm.UnsupportedLaw,
        "'other' is observed",
    ),
    (dict(model=chance), pm.UnsupportedLaw, "drawn outside of Pyro"),
    (
        dict(model=many, done=pm.Allocate(2.0, [0.5, 0.5])),
        pm.UnsupportedLaw,
        "more than 1,048,576 joint values",
    ),
]


@pytest.mark.parametrize("asked, kind, match", REFUSED, ids=range(len(REFUSED)))
def test_refusals(asked, kind, match):
    asked = {"model": shop, "done": pm.Natural(33.0), "seen": SEEN} | asked
    if asked["model"] in (gammas, product, counts, weighed, masked, chance, many):
        asked["seen"] = {} if asked["seen"] is SEEN else asked["seen"]
    with pytest.raises(kind, match=match) as error:
        ask(
            asked["model"],
            asked["done"],
            asked["seen"],
            asked.get("effect", "revenue"),
            asked.get("at"),
            noise=asked.get("noise", "independent"),
        )
    assert len(str(error.value)) < 600


def test_an_observation_that_is_weighed_counts_if_it_is_stated():
    seen = {"revenue": 2.5, "other": 1.0}
    report = ask(masked, pm.Shift(0.0, [1.0, 0.0]), seen, "x1")
    rows = np.array([[1, 0, 1, 0], [1, 1, 0, 1.0]])
    mean, cov = given(np.array([1.0, 1, 0, 0]), np.eye(4), rows, [1.0, 2.5])
    close(report.mean, mean[0])
    close(report.variance, cov[0, 0])


def test_nothing_of_the_users_is_touched():
    def program(scale):
        loc = pyro.param("loc", torch.tensor(10.0))
        x1 = pyro.sample("x1", dist.Normal(loc, scale))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))

    state = torch.get_rng_state()
    with pyro.poutine.trace() as tracer:
        report = ask(program, pm.Natural, SEEN, at=AT, model_args=(2.0,))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store().keys()) == []
    assert [n for n in tracer.trace.nodes if not n.startswith("_")] == []
    assert not report.mean.requires_grad
    expected = ask(shop, pm.Natural, SEEN, at=AT)
    assert torch.equal(report.mean, expected.mean)
    same = ask(program, pm.Natural, SEEN, at=AT, model_kwargs={"scale": 2.0})
    assert torch.equal(same.mean, report.mean)
    with torch.inference_mode():
        again = ask(program, pm.Natural, SEEN, at=AT, model_args=(2.0,))
    assert torch.equal(again.mean, report.mean)
    scm = Scm(drawn_tables(1), "independent")
    ask(scm.model, pm.Natural(2.0), {"y": 1}, "w")
    assert torch.equal(torch.get_rng_state(), state)


def test_programs_one_joint_value_at_a_time(monkeypatch):
    def coins():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        x1 = pyro.sample("x1", dist.Bernoulli(0.3 + 0.4 * z))
        x2 = pyro.sample("x2", dist.Bernoulli(0.6 - 0.2 * z))
        pyro.sample("y", dist.Bernoulli(0.1 + 0.2 * x1 + 0.4 * x2 + 0.2 * z))

    question = coins, pm.Natural(2.0), {"x1": 1.0, "y": 1.0}, ["y", "z"]
    expected = ask(*question)
    listed = finite_twin.listed

    def single(count, tables):
        def alone(index, wide):
            if wide:
                raise ValueError("not side by side")
            return tables(index, wide)

        return listed(count, alone)

    monkeypatch.setattr(finite_twin, "listed", single)
    report = ask(*question)
    torch.testing.assert_close(report.probabilities, expected.probabilities)
    monkeypatch.setattr(finite_twin, "SINGLE", 3)
    with pytest.raises(pm.UnsupportedLaw, match="too many to run one by one"):
        ask(*question)


# The report


def test_what_the_report_says():
    plt = pytest.importorskip("matplotlib.pyplot")
    report = ask(shop, pm.Natural, SEEN, ["revenue", SALES], AT)
    assert report.elements == ("revenue", "sales")
    assert "revenue, sales would have been in this unit under Natural" in str(report)
    assert "exact: affine-Gaussian" in report._repr_html_()
    frame = report.to_pandas()
    assert frame["sales"].tolist() == [30, 30, 33, 33, 36, 36]
    assert frame["as it was"].tolist() == [76.0, 33.0] * 3
    single = ask(shop, pm.Shift(3.0), SEEN)
    assert single.at.tolist() == [3.0] and single.rows()[0]["as it was"] == 76
    for each in (
        single,
        ask(shop, pm.Natural, SEEN, at=AT),
        ask(shop, pm.Natural(3.0), {}),
    ):
        ax = each.plot()
        assert ax.get_legend() is not None
    finite = ask(with_noise_of_its_own, pm.Natural, {"y": 1.0}, "y", [0, 1])
    assert list(finite.rows()[0]) == ["sales", "y", "P as it was", "P as it would be"]
    assert finite.plot().get_ylabel()
    assert ask(with_noise_of_its_own, pm.Natural(1.0), {"y": 1.0}, "y").plot()
    with pytest.raises(pm.PyroMacroError, match="one number"):
        report.plot()
    plt.close("all")
