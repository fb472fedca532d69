# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Appendix D: which interventions a causal model of the macro-variables can explain."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from finite_programs import Macro, Oracle, explicit
from scipy.optimize import linprog

import pyro_macro as pm


def random_model(seed):
    """Z acts on X and Y; X has four or five values, Xb two or three, Y up to three."""
    rng = np.random.default_rng(seed)
    n_x, n_xb, n_y = (int(rng.integers(*ends)) for ends in [(4, 6), (2, 4), (2, 4)])
    concentration = rng.choice([0.2, 1.0, 5.0])
    p_x = torch.tensor(rng.dirichlet(np.ones(n_x), 3))
    p_y = torch.tensor(rng.dirichlet(np.full(n_y, concentration), (n_x, 3)))
    labels = rng.permutation([*range(n_xb), *rng.integers(0, n_xb, n_x - n_xb)])

    def model():
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        x = pyro.sample("x", dist.Categorical(p_x[z]))
        pyro.sample("y", dist.Categorical(p_y[x, z]))

    cause = Macro(
        "cause",
        ("x",),
        (),
        pm.Coarsen(labels.tolist()),
        lambda x: labels[x[..., 0].astype(int)],
    )
    sites = {
        "z": (range(3), (1, 1, 1)),
        "x": (range(n_x), (1, 1, 1)),
        "y": (range(n_y), (1, 1, 1)),
    }
    truth = Oracle.of_runs(model, sites).question(cause, "y")
    weights = []
    for value in truth.reachable():
        states = truth.fibre(value)
        kind = rng.integers(3)
        w = rng.dirichlet(np.ones(len(states)))
        w = np.eye(len(states))[rng.integers(len(states))] if kind else w
        weights.append((value, (states, w)))
    return model, cause, truth, weights


def explained(joint, done):
    """Whether some P(xb, response function) gives both regimes: a linear program.

    A causal model of Xb and Yb, confounded as it may be, is a law of Xb and of the
    function from the value that Xb is set to, to Yb.

    :param joint: ``P(xb, yb)``.
    :param done: ``P(yb | do(xb))``.
    """
    n_xb, n_yb = joint.shape
    responses = list(itertools.product(range(n_yb), repeat=n_xb))
    cells = list(itertools.product(range(n_xb), responses))
    rows, values = [], []
    for x, y in itertools.product(range(n_xb), range(n_yb)):
        rows.append([float(at == x and r[x] == y) for at, r in cells])
        values.append(joint[x, y])
        rows.append([float(r[x] == y) for _, r in cells])
        values.append(done[x, y])
    found = linprog(np.zeros(len(cells)), A_eq=rows, b_eq=values, method="highs")
    return found.status == 0


def test_appendix_d_iff():
    """P(xb, yb) <= P(yb | do(xb)) for all pairs: both directions, many models."""
    found = []
    for seed in range(60):
        model, cause, truth, laws = random_model(seed)
        at = truth.reachable()
        p = [(truth.joint * truth.inside(v)).sum() for v in at]
        joint = np.stack([truth.seen(v) * q for v, q in zip(at, p, strict=True)])
        done = np.stack([truth.done(truth.independent(*law)) for _, law in laws])
        report = pm.macro_scm_exists(model, cause.variable, "y", explicit(laws))
        excess = (joint - done).max(-1)
        assert np.abs(excess).min() > 1e-6, "neither here nor there"
        assert report.exists == explained(joint, done)
        assert report.exists_at == tuple((excess <= 0).tolist())
        np.testing.assert_allclose(report.excess, np.clip(excess, 0, None), atol=1e-10)
        found.append(report.exists)
    assert 10 < sum(found) < 50


@pytest.mark.parametrize("seed", range(10))
def test_the_observational_law_is_always_explained(seed):
    """The natural realization, too, if it has the effect of seeing: P(xb) <= 1."""
    model, cause, truth, _ = random_model(seed)
    report = pm.macro_scm_exists(
        model, cause.variable, "y", lambda v: pm.Natural(v, given=["z"])
    )
    # Held in each case, the effect of the micro state is that of the case itself
    for value in truth.reachable():
        row = truth.seen(value) * (truth.joint * truth.inside(value)).sum()
        held = Oracle.question(truth.oracle, cause, "y", ["z"]).done_given(value)
        assert (row <= held + 1e-12).all()
    assert report.exists and report.excess.max() == 0


def test_the_third_shop_of_a_finite_town():
    """A deterministic effect cannot explain outcomes that are seen to differ."""

    def shop():
        x1 = pyro.sample("x1", dist.Bernoulli(0.5))
        x2 = pyro.sample("x2", dist.Bernoulli(0.5))
        pyro.deterministic("revenue", x1 + 3 * x2)

    sales = pm.MacroVariable("sales", ["x1", "x2"])
    report = pm.macro_scm_exists(
        shop, sales, "revenue", lambda v: pm.Allocate(v, [1.0, 0.0]), at=[0.0, 1.0]
    )
    # P(sales = 1, revenue = 3) = 1/4, and under do it is never 3
    assert report.exists_at == (True, False) and not report.exists
    torch.testing.assert_close(report.excess, torch.tensor([0.0, 0.25]))
    assert "No causal model" in report.summary()
    assert pm.macro_scm_exists(shop, sales, "revenue").exists
