# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Laws of micro states by brute force, and draws compared with them.

Nothing here uses the library but to run a model: joint laws are those of Pyro, listed
state by state, and conditioned by picking states.
"""

import itertools

import numpy as np
import pyro
import torch
from pyro import poutine
from scipy import stats

import pyro_macro as pm

LEVEL = 1e-3  # of each test on draws


def law_of(model, macro, realization, *args):
    """The distribution of the latent site of an intervened program."""
    nodes = run(model, macro, realization, *args).nodes
    return nodes[f"{macro.name}__micro"]["fn"]


def run(model, macro, realization, *args):
    """A trace of an intervened program, with its log densities."""
    intervened = pm.macro_do(model, {macro: realization})
    trace = poutine.trace(intervened).get_trace(*args)
    trace.compute_log_prob()
    return trace


def states_of(*supports):
    """All joint values, shape ``(N, K)``."""
    rows = list(itertools.product(*[torch.as_tensor(s).tolist() for s in supports]))
    return torch.tensor(rows, dtype=torch.float64)


def log_joint(model, values, *args):
    """Log densities of a program at many values at once.

    :param values: by site, shape ``(N,)``, with ones for the plates around the site
        and what the site has itself.
    :returns: shape ``(N,)``.
    """
    conditioned = poutine.condition(model, data=values)
    with poutine.block(), pyro.validation_enabled(False):
        trace = poutine.trace(conditioned).get_trace(*args)
        trace.compute_log_prob()
    count = max(len(value) for value in values.values())
    total = torch.zeros(count)
    for name in values:
        part = trace.nodes[name]["unscaled_log_prob"]
        total = total + part.reshape(len(part), -1).sum(-1)
    return total


def given(log_weights, states, met):
    """The states on a fibre, their probabilities, and the log probability of it.

    States that appear several times (what else differs is summed out) are one.
    """
    weights = log_weights.exp()[met]
    unique, which = states[met].unique(dim=0, return_inverse=True)
    probs = torch.zeros(len(unique), dtype=weights.dtype).index_add(0, which, weights)
    return unique, probs / probs.sum(), probs.sum().log()


def product_of(tables, values, total, value, tolerance=1e-9):
    """``given`` for independent elements.

    :param tables: the distribution of each element.
    :param values: the values of each element.
    :param total: the map from ``(N, K)``.
    """
    states = states_of(*values)
    logs = sum(fn.log_prob(states[:, k]) for k, fn in enumerate(tables))
    return given(logs, states, (total(states) - value).abs() < tolerance)


def assert_is_law(law, states, probs, log_total=None):
    """A finite law has exactly these states, probabilities, and normalizer."""
    torch.testing.assert_close(
        law.log_prob(states.to(law_dtype(law))).exp().double(), probs.double()
    )
    support = law.enumerate_support(expand=False).reshape(-1, states.shape[-1])
    assert {tuple(s) for s in support.tolist()} == {tuple(s) for s in states.tolist()}
    assert len(support) == len(states)
    torch.testing.assert_close(law.log_prob(support).exp().sum().item(), 1.0)
    if log_total is not None:
        torch.testing.assert_close(
            law.log_total.reshape(()).double(), log_total.double()
        )


def law_dtype(law):
    return law.sample().dtype


def assert_counts(draws, states, probs, level=LEVEL):
    """A chi-squared test of draws from a finite law, rare states taken together."""
    draws = torch.as_tensor(draws).double().reshape(-1, states.shape[-1])
    same = (draws.unsqueeze(1) == states.double()).all(-1)
    assert same.any(-1).all(), "a draw off the list of states"
    observed = same.sum(0).double().numpy()
    expected = len(draws) * np.asarray(probs / probs.sum())
    assert not observed[expected == 0].any(), "a draw of probability zero"
    observed, expected = observed[expected > 0], expected[expected > 0]
    rare = expected < 5
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    if len(expected) == 1:
        return
    p = stats.chisquare(observed, expected).pvalue
    assert p > level, f"chi-squared: p = {p:.2g}"


def assert_cdf(draws, cdf, level=LEVEL):
    """A Kolmogorov-Smirnov test of independent draws."""
    p = stats.kstest(np.asarray(draws), cdf).pvalue
    assert p > level, f"Kolmogorov-Smirnov: p = {p:.2g}"


def assert_same_law(one, other, level=LEVEL):
    """A two-sample Kolmogorov-Smirnov test for each element, Bonferroni."""
    one, other = np.asarray(one), np.asarray(other)
    ps = [stats.ks_2samp(a, b).pvalue for a, b in zip(one.T, other.T, strict=True)]
    assert min(ps) > level / len(ps), f"Kolmogorov-Smirnov: p = {ps}"


def finite_difference(fn, at, step=1e-5):
    """The gradient of a function of a tensor, by central differences."""
    gradient = torch.zeros_like(at)
    for i in range(at.numel()):
        move = torch.zeros_like(at).flatten()
        move[i] = step
        move = move.reshape(at.shape)
        gradient.view(-1)[i] = (fn(at + move) - fn(at - move)) / (2 * step)
    return gradient


def assert_gradient(fn, at, step=1e-5, rtol=1e-5, atol=1e-7):
    """The gradient of ``fn`` is what differences say, and not zero."""
    at = at.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(fn(at), at)
    with torch.no_grad():
        wanted = finite_difference(fn, at.detach(), step)
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


def joint_values(sites):
    """All joint values of some sites.

    :param sites: by name, the values of an element, and the shape of the site's value
        (ones for the plates that it is not in).
    :returns: by name, shape ``(N,) + shape``.
    """
    counts = [torch.Size(shape).numel() for _, shape in sites.values()]
    supports = [
        values
        for (values, _), n in zip(sites.values(), counts, strict=True)
        for _ in range(n)
    ]
    parts = states_of(*supports).split(counts, -1)
    return {
        name: part.reshape(len(part), *shape)
        for (name, (_, shape)), part in zip(sites.items(), parts, strict=True)
    }
