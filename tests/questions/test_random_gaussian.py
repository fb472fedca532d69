# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The questions on random affine-Gaussian programs, against dense linear algebra.

A specification is drawn, and read twice: as a program, and as one large system
``z = c + B z + S e`` of structural equations of single numbers. Everything else is the
inverse of ``1 - B``, conditioning of one dense normal law, and matrix products.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.linalg
import torch

import pyro_macro as pm

SIZES = {"q": 2, "p": 3}
DIMS = {"q": -2, "p": -1}


@dataclass
class Site:
    """``value = bias + sum of weights * parents + noise``.

    Arrays have leading dimensions for the plates ``q`` and ``p``, ones where absent.

    :ivar event: the length of a vector, or ``None`` for a number.
    :ivar noise: shape ``(Q, P, f)`` of scales, ``(Q, P, f, f)`` of factors, or nothing.
    """

    name: str
    plates: tuple
    event: int | None
    bias: np.ndarray
    noise: np.ndarray | None
    parents: dict = field(default_factory=dict)

    @property
    def width(self):
        return 1 if self.event is None else self.event

    @property
    def shape(self):
        return (*(SIZES[k] if k in self.plates else 1 for k in "qp"), self.width)


@dataclass
class Spec:
    """A program, what is asked about it, and how it is read both ways."""

    sites: dict
    dtype: torch.dtype
    cause: pm.MacroVariable = None
    effect: object = None
    adjustment: tuple = ()

    # As a program

    def model(self):
        values = {}
        with ExitStack() as stack:
            plates = {
                k: pyro.plate(k, SIZES[k], dim=DIMS[k])
                for k in "qp"
                if any(k in s.plates for s in self.sites.values())
            }
            del stack
        for site in self.sites.values():
            loc = torch.tensor(site.bias, dtype=self.dtype)
            for name, weights in site.parents.items():
                part = torch.tensor(weights, dtype=self.dtype)
                part = (part * values[name].unsqueeze(-2)).sum(-1)
                for k, dim in (("q", -3), ("p", -2)):
                    if k in self.sites[name].plates and k not in site.plates:
                        part = part.sum(dim, keepdim=True)
                loc = loc + part
            values[site.name] = self._wide(self._sample(site, loc, plates), site)

    def _sample(self, site, loc, plates):
        depth = max((-DIMS[k] for k in site.plates), default=0)
        noise = site.noise
        if noise is not None:
            noise = torch.tensor(noise, dtype=self.dtype)
        while loc.dim() > depth + 1 and loc.shape[0] == 1:
            loc = loc[0]
        if noise is not None:
            own = 2 if site.noise.ndim == 4 else 1
            while noise.dim() > depth + own:
                noise = noise[0]
        if site.event is None:
            loc = loc[..., 0]
            noise = None if noise is None else noise[..., 0]
        with ExitStack() as stack:
            for k in site.plates:
                stack.enter_context(plates[k])
            if noise is None:
                event = 0 if site.event is None else 1
                return pyro.deterministic(site.name, loc, event_dim=event)
            if site.noise.ndim == 4:
                fn = dist.MultivariateNormal(loc, scale_tril=noise)
            else:
                fn = dist.Normal(loc, noise)
                fn = fn if site.event is None else fn.to_event(1)
            return pyro.sample(site.name, fn)

    @staticmethod
    def _wide(value, site):
        value = value.unsqueeze(-1) if site.event is None else value
        while value.dim() < 3:
            value = value.unsqueeze(0)
        return value

    # As dense linear algebra

    def __post_init__(self):
        self.index, n = {}, 0
        for site in self.sites.values():
            size = int(np.prod(site.shape))
            self.index[site.name] = np.arange(n, n + size).reshape(site.shape)
            n += size
        self.size = n
        self.c, self.B, self.S = np.zeros(n), np.zeros((n, n)), np.zeros((n, n))
        for site in self.sites.values():
            self._equations(site)
        self.mean, self.factor = solved(self.B, self.c), solved(self.B, self.S)
        self.covariance = self.factor @ self.factor.T

    def _equations(self, site):
        own = self.index[site.name]
        for q, p, f in np.ndindex(*site.shape):
            row = own[q, p, f]
            self.c[row] = site.bias[q, p, f]
            if site.noise is not None and site.noise.ndim == 3:
                self.S[row, row] = site.noise[q, p, f]
            elif site.noise is not None:
                for g in range(f + 1):
                    self.S[row, own[q, p, g]] = site.noise[q, p, f, g]
            for name, weights in site.parents.items():
                parent = self.sites[name]
                for a, b, e in np.ndindex(*parent.shape):
                    both = {"q": (a, q), "p": (b, p)}
                    apart = any(
                        k in parent.plates and k in site.plates and i != j
                        for k, (i, j) in both.items()
                    )
                    if not apart:
                        qi = (q if "q" in site.plates else a) % weights.shape[0]
                        pi = (p if "p" in site.plates else b) % weights.shape[1]
                        self.B[row, self.index[name][a, b, e]] = weights[qi, pi, f, e]

    def elements(self, thing):
        """Indices of the elements of a quantity: ``(slots, elements)``."""
        over = () if isinstance(thing, str) else thing.over
        names = (thing,) if isinstance(thing, str) else thing.micro
        parts = []
        for name in names:
            array = self.index[name]
            axes = [i for i, k in enumerate("qp") if k in over]
            kept = [i for i in range(2) if i not in axes]
            array = array.transpose(*kept, *axes, 2)
            slots = int(np.prod(array.shape[: len(kept)]))
            parts.append(array.reshape(slots, -1))
        return np.concatenate(parts, 1)

    def rows(self, thing):
        """A quantity as a matrix, ``(numbers, all elements)``."""
        elements = self.elements(thing)
        k = elements.shape[1]
        if isinstance(thing, str):
            weights = np.eye(k)
        elif isinstance(thing.aggregation, pm.Mean):
            weights = np.full((1, k), 1 / k)
        elif isinstance(thing.aggregation, pm.Linear):
            weights = np.atleast_2d(WEIGHTS[thing.aggregation])
        else:
            weights = np.ones((1, k))
        result = np.zeros((len(elements) * len(weights), self.size))
        for s, slot in enumerate(elements):
            for r, row in enumerate(weights):
                result[s * len(weights) + r, slot] = row
        return result


WEIGHTS = {}


def linear(weights):
    aggregation = pm.Linear(weights.tolist())
    WEIGHTS[aggregation] = weights
    return aggregation


def solved(B, right):
    """``z = B z + right``: each element is computed from earlier ones."""
    return scipy.linalg.solve_triangular(
        np.eye(len(B)) - B, right, lower=True, unit_diagonal=True
    )


def conditioned(mean, cov, rows, value):
    """The normal law given ``rows @ z = value``."""
    crossed = cov @ rows.T
    gain = np.linalg.solve(rows @ crossed, crossed.T).T
    return mean + gain @ (value - rows @ mean), cov - gain @ crossed.T


def wasserstein(one, other):
    (m, a), (n, b) = one, other
    means = ((m - n) ** 2).sum()
    half = symmetric_root(a)
    cross = np.linalg.eigvalsh(half @ b @ half).clip(0)
    spread = np.trace(a) + np.trace(b) - 2 * np.sqrt(cross).sum()
    return np.sqrt(max(means + spread, 0))


def symmetric_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def divergence(one, other):
    """``KL(one || other)``."""
    (m, a), (n, b) = one, other
    inverse = np.linalg.inv(b)
    logs = np.linalg.slogdet(b)[1] - np.linalg.slogdet(a)[1]
    gap = n - m
    return 0.5 * (np.trace(inverse @ a) + gap @ inverse @ gap - len(m) + logs)


class DenseQuestion:
    """Cause and effect in the dense system, with the micro state cut."""

    def __init__(self, spec):
        self.spec = spec
        self.micro = spec.elements(spec.cause)  # (slots, K)
        self.x = self.micro.reshape(-1)
        self.cause, self.effect = spec.rows(spec.cause), spec.rows(spec.effect)
        B, S, c = spec.B.copy(), spec.S.copy(), spec.c.copy()
        B[self.x], S[self.x], c[self.x] = 0, 0, 0
        G = solved(B, np.eye(spec.size))
        self.alpha = (self.effect @ G)[:, self.x]
        self.noise = self.effect @ G @ S  # the coefficients of N
        self.noise_mean = self.effect @ G @ c
        self.noise_cov = self.noise @ self.noise.T
        self.w = self.cause[:, self.x]
        self.x_mean = spec.mean[self.x]
        self.x_factor = spec.factor[self.x]
        self.x_cov = self.x_factor @ self.x_factor.T
        self.cause_mean = self.w @ self.x_mean
        self.cause_cov = self.w @ self.x_cov @ self.w.T
        self.crossed = self.x_factor @ self.noise.T  # Cov(X, N)

    def seen(self, value):
        spec = self.spec
        mean, cov = conditioned(spec.mean, spec.covariance, self.cause, value)
        return self.effect @ mean, self.effect @ cov @ self.effect.T

    def done(self, mean, cov):
        """The effect of a micro state drawn from a normal law."""
        return (
            self.alpha @ mean + self.noise_mean,
            self.alpha @ cov @ self.alpha.T + self.noise_cov,
        )

    def natural(self, value):
        return conditioned(self.x_mean, self.x_cov, self.w, value)

    def others(self):
        return np.concatenate([self.spec.rows(b) for b in self.spec.adjustment])

    def known(self):
        return np.concatenate([self.cause, self.others()])

    def natural_given(self, value):
        """``X = E[X | xb, b] + rest``, where ``b`` is correlated with the noise."""
        spec, b = self.spec, self.others()
        rows = np.concatenate([self.cause, b])
        within = rows @ spec.covariance @ rows.T
        gain = np.linalg.solve(within, rows @ spec.covariance[:, self.x]).T
        rest = self.x_cov - gain @ within @ gain.T
        k = len(self.cause)
        mean = self.x_mean + gain[:, :k] @ (value - self.cause_mean)
        moved = self.alpha @ gain[:, k:] @ b @ spec.factor + self.noise
        return (
            self.alpha @ mean + self.noise_mean,
            self.alpha @ rest @ self.alpha.T + moved @ moved.T,
        )

    def adjusted(self, value):
        """``sum_b P(Yb | xb, b) P(b)``."""
        spec, b = self.spec, self.others()
        rows = np.concatenate([self.cause, b])
        within = rows @ spec.covariance @ rows.T
        gain = np.linalg.solve(within, rows @ spec.covariance @ self.effect.T).T
        k = len(self.cause)
        mean = self.effect @ spec.mean + gain[:, :k] @ (value - self.cause_mean)
        cov = self.effect @ spec.covariance @ self.effect.T - gain @ within @ gain.T
        return mean, cov + gain[:, k:] @ within[k:, k:] @ gain[:, k:].T

    def crossed_given(self):
        """``Cov(X, N | b)`` as correlations, the largest of them."""
        spec, b = self.spec, self.others()
        within = b @ spec.covariance @ b.T
        inverse = np.linalg.pinv(within, hermitian=True)
        crossed = self.crossed - (
            spec.covariance[self.x] @ b.T @ inverse @ b @ spec.factor @ self.noise.T
        )
        spread = np.sqrt(np.diag(self.x_cov))[:, None]
        scale = spread * np.sqrt(np.diag(self.noise_cov)) + 1e-300
        return np.abs(crossed / scale).max()

    def residual(self, value, absorb):
        k = self.micro.shape[1]
        taken = [s * k + i for s in range(len(self.micro)) for i in absorb]
        rest = [i for i in range(len(self.x)) if i not in taken]
        keep = np.eye(len(self.x))[rest]
        solve = np.linalg.inv(self.w[:, taken])
        linear_map = keep.T @ keep
        linear_map[taken] = -solve @ self.w[:, rest] @ keep
        shift = np.zeros(len(self.x))
        shift[taken] = solve @ value
        return linear_map @ self.x_mean + shift, linear_map @ self.x_cov @ linear_map.T


# Drawing specifications


def numbers(rng, *shape):
    return np.round(rng.normal(size=shape), 3)


def draw_site(rng, name, plates, parents, deterministic=False):
    event = None if rng.random() < 0.55 else int(rng.integers(1, 4))
    site = Site(name, plates, event, None, None)
    site.bias = numbers(rng, *site.shape)
    if not deterministic:
        q, p, f = site.shape
        if event and rng.random() < 0.5:
            tril = np.tril(numbers(rng, q, p, f, f), -1)
            scale = np.round(rng.uniform(0.4, 1.5, (q, p, f)), 3)
            site.noise = tril + np.eye(f) * scale[..., None]
        else:
            site.noise = np.round(rng.uniform(0.4, 1.5, (q, p, f)), 3)
    for parent in parents:
        shape = [
            SIZES[k] if k in site.plates or k in parent.plates else 1 for k in "qp"
        ]
        weights = numbers(rng, *shape, site.width, parent.width)
        site.parents[parent.name] = weights
    return site


def some(rng, items, most):
    items = list(items)
    count = int(rng.integers(0, min(most, len(items)) + 1))
    return [items[i] for i in rng.permutation(len(items))[:count]]


def draw_spec(seed, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    contexts = [[()], [(), ("p",)], [(), ("p",), ("q", "p"), ("q",)]][seed % 3]

    def context():
        return contexts[int(rng.integers(len(contexts)))]

    sites = {}

    def add(name, plates, parents, chance):
        deterministic = len(parents) > 0 and rng.random() < chance
        sites[name] = draw_site(rng, name, plates, parents, deterministic)

    for i in range(int(rng.integers(1, 4))):
        add(f"u{i}", context(), some(rng, sites.values(), 2), 0.15)
    above = list(sites.values())
    plates = context()
    over = tuple(k for k in plates if rng.random() < 0.6)
    micro = [f"x{i}" for i in range(int(rng.integers(1, 4)))]
    for name in micro:
        parents = some(rng, above, 2)
        mixed = over == plates and over and rng.random() < 0.3
        add(name, () if mixed and name != "x0" else plates, parents, 0.08)
    aside = some(rng, above, 2)
    if rng.random() < 0.5:
        add("a", context(), aside, 0.3)  # beside the micro state
    for i in range(int(rng.integers(1, 4))):
        add(f"y{i}", context(), some(rng, sites.values(), 4), 0.3)
    last = some(rng, [s for n, s in sites.items() if n not in micro], 2)
    add("y", context(), [sites[n] for n in micro[:2]] + last, 0.3)
    spec = Spec(sites, dtype)
    if spec.elements(pm.MacroVariable("xb", micro, over=over)).shape[1] < 3:
        return draw_spec(seed + 1000, dtype)
    spec.cause = draw_macro(rng, spec, "xb", micro, over, vectors=0.15)
    spec.effect = draw_effect(rng, spec)
    spec.adjustment = draw_adjustment(rng, spec, micro)
    return spec


def draw_macro(rng, spec, name, micro, over, vectors):
    size = spec.elements(pm.MacroVariable(name, micro, over=over)).shape[1]
    kind = rng.random()
    aggregation = pm.Sum()
    if kind < vectors:
        aggregation = linear(numbers(rng, 2, size))
    elif kind < 0.4 + vectors / 2:
        aggregation = linear(numbers(rng, size))
    elif kind < 0.55:
        aggregation = pm.Mean()
    return pm.MacroVariable(name, micro, over=over, aggregation=aggregation)


def draw_effect(rng, spec):
    below = [n for n in spec.sites if n.startswith("y")]
    name = below[int(rng.integers(len(below)))] if rng.random() < 0.3 else "y"
    site = spec.sites[name]
    if rng.random() < 0.35:
        return name
    size = spec.elements(pm.MacroVariable("yb", name, over=site.plates)).shape[1]
    if size < 2:
        return name
    over = tuple(k for k in site.plates if rng.random() < 0.7)
    size = spec.elements(pm.MacroVariable("yb", name, over=over)).shape[1]
    if size < 2:
        over = site.plates
        size = spec.elements(pm.MacroVariable("yb", name, over=over)).shape[1]
    vectors = 0.2 if size > 2 else 0.0
    return draw_macro(rng, spec, "yb", [name], over, vectors)


def draw_adjustment(rng, spec, micro):
    names = [n for n in spec.sites if n[0] in "ua"]
    found = []
    for name in some(rng, names, 2):
        site = spec.sites[name]
        size = spec.elements(pm.MacroVariable("b", name, over=site.plates)).shape[1]
        if size > 1 and rng.random() < 0.6:
            found.append(pm.MacroVariable(f"{name}b", name, over=site.plates))
        else:
            found.append(name)
    return tuple(found)


# The comparisons

N_FAST, N_ALL = 60, 200


def close(found, expected, scale, spec, what=""):
    limit = 1e-8 if spec.dtype == torch.float64 else 3e-5
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    assert found.shape == expected.shape, what
    gap = np.abs(found - expected).max() / scale
    assert gap < limit, f"{what}: {gap:.3g}"


def check(report, spec, values, laws, what):
    """A report against ``(seen, done)`` for each macro value."""
    n = len(values)
    assert report.method == "exact: affine-Gaussian", what
    assert report.distance_kind == "Wasserstein-2"
    assert report.observational_mean.dtype == torch.float64
    own = report.observational_mean.shape[1:]
    assert report.interventional_variance.shape == (n, *own)
    parts = {
        "observational_mean": [seen[0] for seen, _ in laws],
        "observational_variance": [np.diag(seen[1]) for seen, _ in laws],
        "interventional_mean": [done[0] for _, done in laws],
        "interventional_variance": [np.diag(done[1]) for _, done in laws],
    }
    means = max(1, *(np.abs(s[0]).max() for pair in laws for s in pair))
    spread = max(1, *(np.trace(s[1]) for pair in laws for s in pair))
    for name, expected in parts.items():
        found = getattr(report, name).reshape(n, -1)
        scale = means if name.endswith("mean") else spread
        close(found, np.stack(expected), scale, spec, f"{what}: {name}")
    unit = means + spread**0.5
    single = spec.dtype != torch.float64
    for i, (seen, done) in enumerate(laws):
        apart = wasserstein(seen, done)
        # Of matrices, the square is known to the root of the rounding
        limit = 1e-11 if len(seen[0]) == 1 else 3e-8
        gap = abs(float(report.distance[i]) ** 2 - apart**2) / unit**2
        assert gap < (1e-4 if single else limit), f"{what}: distance {gap:.3g}"
        if apart < (1e-5 if single else 1e-9) * unit:
            assert report.verdicts[i] == "inhibiting", what
            assert float(report.divergence[i]) == pytest.approx(0, abs=1e-8), what
        elif apart > (1e-2 if single else 1e-6) * unit:
            assert report.verdicts[i] == "inducing", what
            least = min(np.linalg.eigvalsh(m[1]).min() for m in (seen, done))
            if least > (1e-2 if single else 1e-6) * spread:
                close(
                    float(report.divergence[i]),
                    divergence(done, seen),
                    1 + divergence(done, seen),
                    spec,
                    f"{what}: KL",
                )
    assert report.verdict == (
        "inducing" if "inducing" in report.verdicts else "inhibiting"
    )


def macro_values(question):
    """Three macro values, the same in all slots: as asked, and over all slots."""
    spec = question.spec
    slots = len(question.micro)
    m = len(question.cause) // slots
    mean = question.cause_mean.reshape(slots, m).mean(0)
    sd = np.sqrt(np.diag(question.cause_cov)).reshape(slots, m).mean(0)
    rows = [mean + sd * t for t in (-1.0, 0.5, 2.0)]
    at = np.stack(rows) if getattr(spec.cause.aggregation, "event_dim", 0) else None
    at = np.concatenate(rows) if at is None else at
    return torch.tensor(at), [np.tile(row, slots) for row in rows]


def draw_question(seed):
    spec = draw_spec(seed, torch.float32 if seed % 7 == 3 else torch.float64)
    return spec, DenseQuestion(spec)


def is_regular(matrix, limit=1e7):
    return np.linalg.cond(matrix) < limit


def ask(spec, realization, at):
    return pm.confounding(spec.model, spec.cause, spec.effect, realization, at)


def draws_of(spec, fn, n):
    """All elements of all sites, ``(n, size)``."""
    with pyro.plate("draws", n, dim=-3):
        nodes = pyro.poutine.trace(fn).get_trace().nodes
    draws = []
    for site in spec.sites.values():
        value = Spec._wide(nodes[site.name]["value"], site)
        value = value.expand((-1, *site.shape))
        draws.append(value.reshape(-1, int(np.prod(site.shape))).expand(n, -1))
    return torch.cat(draws, -1).double().numpy()


def assert_moments(draws, mean, cov):
    """Means and covariances within 5.5 standard errors: level 1e-5 and below."""
    n = len(draws)
    sd = np.sqrt(np.diag(cov))
    live = sd > 1e-6 * max(1, sd.max())
    gap = draws.mean(0) - mean
    assert np.abs(gap[~live]).max(initial=0) < 1e-4 * (1 + np.abs(mean).max())
    assert np.abs(gap[live] / sd[live] * n**0.5).max(initial=0) < 5.5
    found, want = np.cov(draws.T).reshape(cov.shape), cov[np.ix_(live, live)]
    scale = np.sqrt(np.outer(np.diag(want), np.diag(want)) + want**2)
    gap = (found[np.ix_(live, live)] - want) / scale * n**0.5
    assert np.abs(gap).max(initial=0) < 5.5


@pytest.mark.parametrize("seed", range(5))
def test_the_dense_system_is_the_program(seed):
    spec = draw_spec(seed)
    assert_moments(draws_of(spec, spec.model, 4000), spec.mean, spec.covariance)


@pytest.mark.parametrize("kind", ["natural", "given", "residual", "inhibiting"])
@pytest.mark.parametrize("seed", [0, 1, 5, 8, 9, 15, 17, 28])
def test_draws_of_the_intervened_program(seed, kind):
    """What is said of ``P(Yb | do(xb))`` is what ``macro_do`` draws."""
    spec, question = draw_question(seed)
    at, values = macro_values(question)
    rng = np.random.default_rng(seed)
    slots, k = question.micro.shape
    m = len(question.cause) // slots
    if kind == "natural":
        realization = pm.Natural(at[1])
        law = question.done(*question.natural(values[1]))
    elif kind == "given":
        if not spec.adjustment:
            return
        realization = pm.Natural(at[1], given=list(spec.adjustment))
        law = question.natural_given(values[1])
    elif kind == "residual":
        absorb = rng.permutation(k)[:m].tolist()
        realization = pm.Residual(at[1], absorb=absorb)
        law = question.done(*question.residual(values[1], absorb))
    else:
        if len(question.effect) > 1 or slots > 1 or not feasible(question)[0]:
            return
        realization = pm.Inhibiting(at[1], spec.effect)
        law = question.seen(values[1])
    n = 20_000
    draws = draws_of(spec, pm.macro_do(spec.model, {spec.cause: realization}), n)
    miss = np.abs(draws @ question.cause.T - values[1]).max()
    assert miss < (1e-4 if spec.dtype == torch.float32 else 1e-9)
    assert_moments(draws @ question.effect.T, *law)


class DoesNotApply(Exception):
    """A question that a program is not for."""


def compare_natural(seed):
    spec, question = draw_question(seed)
    if not is_regular(question.cause_cov):
        raise DoesNotApply
    at, values = macro_values(question)
    laws = [(question.seen(v), question.done(*question.natural(v))) for v in values]
    check(ask(spec, pm.Natural, at), spec, values, laws, "Natural")
    known = question.known() if spec.adjustment else question.cause
    if not spec.adjustment or not is_regular(known @ spec.covariance @ known.T):
        return
    laws = [(question.seen(v), question.natural_given(v)) for v in values]
    given = [b for b in spec.adjustment]
    report = ask(spec, lambda v: pm.Natural(v, given=given), at)
    check(report, spec, values, laws, "Natural, given")


def compare_residual(seed):
    spec, question = draw_question(seed)
    if not is_regular(question.cause_cov) or not is_regular(question.x_cov):
        raise DoesNotApply
    at, values = macro_values(question)
    rng = np.random.default_rng(seed)
    slots, k = question.micro.shape
    m = len(question.cause) // slots
    absorb = sorted(rng.permutation(k)[:m].tolist())
    own = question.w[:m, absorb]
    if not is_regular(own, 1e3) or abs(np.linalg.det(own)) < 0.05:
        raise DoesNotApply
    laws = [
        (question.seen(v), question.done(*question.residual(v, absorb))) for v in values
    ]
    report = ask(spec, lambda v: pm.Residual(v, absorb=absorb), at)
    check(report, spec, values, laws, "Residual")


def compare_point(seed):
    spec, question = draw_question(seed)
    slots, k = question.micro.shape
    if len(question.cause) > slots or not is_regular(question.cause_cov):
        raise DoesNotApply
    at, values = macro_values(question)
    rng = np.random.default_rng(seed)
    weights = question.w[0, :k]
    shares = rng.uniform(0.2, 1.0, k) * np.sign(weights)
    shares = shares / (weights @ shares)
    laws = []
    for v in values:
        mean = np.concatenate([shares * one for one in v])
        laws.append((question.seen(v), question.done(mean, np.zeros((len(mean),) * 2))))
    shares = torch.tensor(shares, dtype=spec.dtype)
    report = ask(spec, lambda v: pm.Allocate(v, shares=shares), at)
    check(report, spec, values, laws, "Allocate")


def compare_explicit(seed):
    """Any normal law on the fibre: a factor whose last row makes up for the others."""
    spec, question = draw_question(seed)
    slots, k = question.micro.shape
    weights = question.w[0, :k]
    if len(question.cause) > 1 or abs(weights[-1]) < 0.1:
        raise DoesNotApply
    if not is_regular(question.cause_cov):
        raise DoesNotApply
    at, values = macro_values(question)
    rng = np.random.default_rng(seed)
    factor = np.tril(rng.normal(size=(k, k)))
    factor[-1] = -weights[:-1] @ factor[:-1] / weights[-1]
    base, step = rng.normal(size=k), rng.normal(size=k)
    base[-1] = -weights[:-1] @ base[:-1] / weights[-1]
    step[-1] = (1 - weights[:-1] @ step[:-1]) / weights[-1]
    tensors = [torch.tensor(t, dtype=spec.dtype) for t in (base, step, factor)]

    def fn(value):
        loc = tensors[0] + value.unsqueeze(-1) * tensors[1]
        return dist.MultivariateNormal(loc, scale_tril=tensors[2], validate_args=False)

    laws = [
        (question.seen(v), question.done(base + step * v[0], factor @ factor.T))
        for v in values
    ]
    report = ask(spec, lambda v: pm.Explicit(v, fn), at)
    check(report, spec, values, laws, "Explicit")


def feasible(question):
    """Whether a normal law on the fibre inhibits, and both sides of (9)."""
    value = question.cause_mean
    left, right = question.seen(value)[1][0, 0], question.noise_cov[0, 0]
    alpha, w = question.alpha[0], question.w
    rest = alpha - w.T @ np.linalg.lstsq(w.T, alpha, rcond=None)[0]
    spread = np.sqrt(left + right)
    if np.abs(rest).max() > 1e-9 * max(1, np.abs(alpha).max()):
        return left > right, left, right, rest
    # What the macro value determines is the same under all realizations
    crossed = w @ question.crossed[:, 0]
    unconfounded = np.abs(crossed).max() < 1e-9 * spread
    return unconfounded, left, right, None


def compare_inhibiting(seed):
    spec, question = draw_question(seed)
    if len(question.effect) > 1 or len(question.micro) > 1:
        raise DoesNotApply
    if not is_regular(question.cause_cov) or not is_regular(question.x_cov):
        raise DoesNotApply
    at, values = macro_values(question)
    possible, left, right, rest = feasible(question)
    if rest is not None and abs(left - right) < 1e-4 * (left + right):
        raise DoesNotApply
    report = pm.can_inhibit(spec.model, spec.cause, spec.effect, at)
    assert report.feasible == possible, (seed, left, right)
    assert report.feasible_at == (possible,) * 3
    close(report.observational_variance, left, left + 1, spec, "left of (9)")
    close(report.noise_variance, right, right + 1, spec, "right of (9)")
    realization = lambda v: pm.Inhibiting(v, spec.effect)  # noqa: E731
    if not possible:
        assert report.reason and bool(report.distance.isnan().all())
        with pytest.raises(pm.Infeasible):
            ask(spec, realization, at)
        return
    seen = [question.seen(v) for v in values]
    found = ask(spec, realization, at)
    assert found.verdict == "inhibiting"
    check(found, spec, values, [(s, s) for s in seen], "Inhibiting")
    if rest is None:
        assert float(report.distance.max()) < 1e-6
        return
    # The least move of one direction that changes alpha.X as it must
    distances = []
    for v, (mean, _) in zip(values, seen, strict=True):
        m0, c0 = question.natural(v)
        alpha = question.alpha[0]
        shift = mean[0] - question.noise_mean[0] - alpha @ m0
        spread = np.sqrt(left - right) - np.sqrt(max(alpha @ c0 @ alpha, 0))
        distances.append(np.hypot(shift, spread) / np.linalg.norm(rest))
    close(report.distance, distances, 1 + max(distances), spec, "distance")


def compare_adjustment(seed):
    spec, question = draw_question(seed)
    if not spec.adjustment:
        raise DoesNotApply
    known = question.known()
    if not is_regular(known @ spec.covariance @ known.T):
        raise DoesNotApply
    at, values = macro_values(question)
    deviation = question.crossed_given()
    holds = deviation < 1e-9
    args = (spec.model, spec.cause, spec.effect, spec.adjustment)
    single = spec.dtype != torch.float64
    if not 1e-9 < deviation < (1e-3 if single else 1e-6):
        report = pm.blocks_backdoor(*args)
        assert report.holds == holds, (deviation, report.deviation)
        assert report.method == "exact: affine-Gaussian"
        assert (report.deviation > 0 or holds) and bool(report) == holds
    if holds:
        report = pm.macro_adjust(*args, at)
    else:
        with pytest.warns(pm.NotAdjusted):
            report = pm.macro_adjust(*args, at)
    n = len(values)
    for prefix, law in [
        ("", question.adjusted),
        ("observational_", question.seen),
        ("interventional_", question.natural_given),
    ]:
        laws = [law(v) for v in values]
        means = np.stack([m for m, _ in laws])
        variances = np.stack([np.diag(c) for _, c in laws])
        found = getattr(report, f"{prefix}mean").reshape(n, -1)
        close(found, means, 1 + np.abs(means).max(), spec, f"{prefix}mean")
        found = getattr(report, f"{prefix}variance").reshape(n, -1)
        close(found, variances, 1 + variances.max(), spec, f"{prefix}variance")
    if holds:  # Theorem 4.1
        for v in values:
            one, other = question.adjusted(v), question.natural_given(v)
            np.testing.assert_allclose(one[0], other[0], atol=1e-7)
            np.testing.assert_allclose(one[1], other[1], atol=1e-7)


def compare_coefficient(seed):
    spec, question = draw_question(seed)
    if len(question.cause) > 1 or not is_regular(question.cause_cov):
        raise DoesNotApply
    delta = question.x_cov @ question.w[0] / question.cause_cov[0, 0]
    scale = 1 + np.abs(question.alpha).max() * np.abs(delta).sum()
    found = pm.structural_coefficient(spec.model, spec.cause, spec.effect)
    found = np.asarray(found).reshape(-1)
    close(found, question.alpha @ delta, scale, spec, "natural coefficient")
    rng = np.random.default_rng(seed)
    along = rng.normal(size=len(question.x))
    along = along / (question.w[0] @ along)
    along = along.astype(np.float32).astype(float)
    if abs(question.w[0] @ along - 1) > 5e-7:
        along = along / (question.w[0] @ along)
    found = pm.structural_coefficient(
        spec.model, spec.cause, spec.effect, along=along.tolist()
    )
    found = np.asarray(found).reshape(-1)
    scale = 1 + np.abs(question.alpha).max() * np.abs(along).sum()
    close(found, question.alpha @ along, scale, spec, "coefficient")
    # Definition 13 and equations (16), (18): the same from shifts
    if len(question.effect) > 1:
        return
    args = (spec.model, spec.cause, spec.effect)
    at, values = macro_values(question)
    beta = float(question.alpha[0] @ along)
    crossed = (question.cause @ spec.covariance @ question.effect.T)[0, 0]
    within = question.cause_cov[0, 0]
    total = (question.effect @ spec.covariance @ question.effect.T)[0, 0]
    start = (question.effect @ spec.mean)[0]
    away = np.concatenate(values) - question.cause_mean[0]
    rest = total - crossed**2 / within
    unit = 1 + total + abs(beta) * (np.abs(away).max() + np.abs(crossed)) + beta**2
    unit = unit * (1 + within)
    found = pm.atomic_from_shifts(*args, along.tolist(), at)
    close(found.mean.reshape(-1), start + beta * away, unit, spec, "(16)")
    spread = rest + (crossed / within - beta) ** 2 * within
    close(found.variance.reshape(-1), np.full(3, spread), unit, spec, "(16)")
    found = pm.shift_from_atomics(*args, [0.5, -2.0], along.tolist())
    shifted = start + beta * np.array([0.5, -2.0])
    close(found.mean.reshape(-1), shifted, unit, spec, "(18)")
    close(found.variance.reshape(-1), np.full(2, total), unit, spec, "(18)")
    found = pm.shift_confounding(*args, 1.5, along.tolist(), at)
    moved = start + crossed / within * (away - 1.5) + 1.5 * beta
    close(found.interventional_mean.reshape(-1), moved, unit, spec, "(19)")
    close(found.interventional_variance.reshape(-1), np.full(3, rest), unit, spec, "")


def compare_irrelevance(seed):
    """Lemma 10: ``Cov(B, Yb | xb)``, with what is upstream as the earlier cause."""
    spec, question = draw_question(seed)
    if not spec.adjustment or not is_regular(question.cause_cov):
        raise DoesNotApply
    earlier = spec.adjustment[0]
    rows = spec.rows(earlier)
    _, cov = conditioned(spec.mean, spec.covariance, question.cause, 0)
    both = np.concatenate([rows, question.effect])
    before = np.sqrt(np.diag(both @ spec.covariance @ both.T))
    after = np.sqrt(np.diag(both @ cov @ both.T).clip(0))
    if (after < 1e-3 * before).any():
        raise DoesNotApply  # determined by the cause
    k = len(rows)
    crossed = rows @ cov @ question.effect.T
    deviation = np.abs(crossed / np.outer(after[:k], after[k:])).max()
    report = pm.irrelevant_cause(spec.model, earlier, spec.cause, spec.effect)
    single = spec.dtype != torch.float64
    if not 1e-10 < deviation < (1e-3 if single else 1e-6):
        assert report.holds == (deviation <= 1e-10)
    close(report.deviation, deviation, 10.0, spec, "deviation")


COMPARISONS = [
    compare_natural,
    compare_residual,
    compare_point,
    compare_explicit,
    compare_inhibiting,
    compare_adjustment,
    compare_coefficient,
    compare_irrelevance,
]


def compare_next(compare, seed):
    """The first program from here that the question is for."""
    for attempt in range(100):
        try:
            return compare(seed + 10_000 * attempt)
        except DoesNotApply:
            continue
    raise AssertionError(f"{compare.__name__} applies to hardly any program")


@pytest.mark.parametrize("seed", range(N_FAST))
@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda c: c.__name__[8:])
def test_random_programs(compare, seed):
    compare_next(compare, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(N_FAST, N_ALL))
@pytest.mark.parametrize("compare", COMPARISONS, ids=lambda c: c.__name__[8:])
def test_more_random_programs(compare, seed):
    compare_next(compare, seed)
