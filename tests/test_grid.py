# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A grid: at each place the law of a plate, and one noise for all places."""

import copy
import itertools
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import (
    SVI,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    config_enumerate,
)
from pyro.infer.reparam import LocScaleReparam
from scipy import stats
from torch.distributions import transforms

import pyro_macro as pm

LEVEL = 1e-4
N, COUNT = 3, 2000


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def along(*numbers):
    """Parameters at the places of the grid, left of the draws."""
    return double(numbers).reshape(-1, 1)


LOC, POS, PROB = along(0.0, 1.0, 3.0), along(0.5, 1.0, 4.0), along(0.1, 0.4, 0.9)
SCALE = along(1.0, 2.0, 0.5)
SIMPLEX = double([[[0.6, 0.3, 0.1]], [[0.2, 0.5, 0.3]], [[0.1, 0.1, 0.8]]])


def drawn(make, count=COUNT, seed=0, plate=pm.grid, n=N):
    """A site inside of a grid and a plate of draws: ``(n, count, ...)``."""
    pyro.set_rng_seed(seed)
    with plate("values", n, dim=-2), pyro.plate("draws", count, dim=-1):
        return pyro.sample("x", make())


# -- The law at each place ---------------------------------------------------------

CHANCES = double([0.1, 0.4, 0.8])

# By name: the distribution, and its law at place i, from scipy
EXP, SIGMOID = transforms.ExpTransform(), transforms.SigmoidTransform()
AFFINE = transforms.AffineTransform


def transformed(base, *parts):
    return dist.TransformedDistribution(base, list(parts))


COUPLED = {
    "Normal": (
        lambda: dist.Normal(LOC, SCALE),
        lambda i: stats.norm(LOC[i, 0], SCALE[i, 0]),
    ),
    "Normal, one scale": (
        lambda: dist.Normal(LOC, 2.0),
        lambda i: stats.norm(LOC[i, 0], 2.0),
    ),
    "Normal, masked": (
        lambda: dist.Normal(LOC, SCALE).mask(True),
        lambda i: stats.norm(LOC[i, 0], SCALE[i, 0]),
    ),
    "affine": (
        lambda: transformed(dist.Normal(LOC, 1.0), AFFINE(2.0, -3.0)),
        lambda i: stats.norm(2 - 3 * LOC[i, 0], 3.0),
    ),
    "affine, along the grid": (
        lambda: transformed(dist.Normal(0.0, 1.0), AFFINE(LOC, SCALE)),
        lambda i: stats.norm(LOC[i, 0], SCALE[i, 0]),
    ),
    "affine twice": (
        lambda: transformed(dist.Normal(LOC, 1.0), AFFINE(0.0, SCALE), AFFINE(1, -1)),
        lambda i: stats.norm(1 - SCALE[i, 0] * LOC[i, 0], SCALE[i, 0]),
    ),
    "LogNormal": (
        lambda: dist.LogNormal(LOC, SCALE),
        lambda i: stats.lognorm(SCALE[i, 0], scale=LOC[i, 0].exp()),
    ),
    "exp of a Normal": (
        lambda: transformed(dist.Normal(LOC, SCALE), EXP),
        lambda i: stats.lognorm(SCALE[i, 0], scale=LOC[i, 0].exp()),
    ),
    "minus the exp of a Normal": (
        lambda: transformed(dist.Normal(LOC, SCALE), EXP, AFFINE(0.0, -1.0)),
        lambda i: Minus(stats.lognorm(SCALE[i, 0], scale=LOC[i, 0].exp())),
    ),
    "Exponential": (
        lambda: dist.Exponential(POS),
        lambda i: stats.expon(scale=1 / POS[i, 0]),
    ),
    "minus Exponential": (
        lambda: transformed(dist.Exponential(POS), AFFINE(0.0, -1.0)),
        lambda i: Minus(stats.expon(scale=1 / POS[i, 0])),
    ),
    "Laplace": (
        lambda: dist.Laplace(LOC, SCALE),
        lambda i: stats.laplace(LOC[i, 0], SCALE[i, 0]),
    ),
    "Uniform": (
        lambda: dist.Uniform(LOC, LOC + SCALE),
        lambda i: stats.uniform(LOC[i, 0], SCALE[i, 0]),
    ),
    "Cauchy": (
        lambda: dist.Cauchy(LOC, SCALE),
        lambda i: stats.cauchy(LOC[i, 0], SCALE[i, 0]),
    ),
    "Gumbel": (
        lambda: dist.Gumbel(LOC, SCALE),
        lambda i: stats.gumbel_r(LOC[i, 0], SCALE[i, 0]),
    ),
    "HalfNormal": (
        lambda: dist.HalfNormal(POS),
        lambda i: stats.halfnorm(scale=POS[i, 0]),
    ),
    "HalfCauchy": (
        lambda: dist.HalfCauchy(POS),
        lambda i: stats.halfcauchy(scale=POS[i, 0]),
    ),
    "Weibull": (
        lambda: dist.Weibull(POS, SCALE),
        lambda i: stats.weibull_min(SCALE[i, 0], scale=POS[i, 0]),
    ),
    "Pareto": (
        lambda: dist.Pareto(POS, 2.0),
        lambda i: stats.pareto(2.0, scale=POS[i, 0]),
    ),
    "Kumaraswamy": (
        lambda: dist.Kumaraswamy(POS, 1.0),
        lambda i: stats.beta(POS[i, 0], 1.0),
    ),
    "ContinuousBernoulli": (
        lambda: dist.ContinuousBernoulli(CHANCES.unsqueeze(-1)),
        lambda i: Through(stats.uniform(), dist.ContinuousBernoulli(CHANCES[i]).cdf),
    ),
    "Logistic": (
        lambda: dist.Logistic(LOC, SCALE),
        lambda i: stats.logistic(LOC[i, 0], SCALE[i, 0]),
    ),
    "sigmoid of a Logistic": (
        lambda: transformed(dist.Logistic(0 * LOC, POS), SIGMOID),
        lambda i: Through(stats.logistic(0, POS[i, 0]), torch.logit),
    ),
}


class Minus:
    """The law of ``-X``."""

    def __init__(self, law):
        self.law = law

    def cdf(self, x):
        return self.law.sf(-np.asarray(x))


class Through(Minus):
    """The law of an increasing function of ``X``, by its inverse."""

    def __init__(self, law, inverse):
        self.law, self.inverse = law, inverse

    def cdf(self, x):
        return self.law.cdf(self.inverse(torch.as_tensor(x)).numpy())


ALONE = {  # families without a way to couple them: right by themselves
    "Gamma": (
        lambda: dist.Gamma(POS, SCALE),
        lambda i: stats.gamma(POS[i, 0], scale=1 / SCALE[i, 0]),
    ),
    "InverseGamma": (
        lambda: dist.InverseGamma(POS, 2.0),
        lambda i: stats.invgamma(POS[i, 0], scale=2.0),
    ),
    "Chi2": (lambda: dist.Chi2(POS), lambda i: stats.chi2(POS[i, 0])),
    "Beta": (lambda: dist.Beta(POS, 2.0), lambda i: stats.beta(POS[i, 0], 2.0)),
    "Beta, the second": (
        lambda: dist.Beta(2.0, POS),
        lambda i: stats.beta(2.0, POS[i, 0]),
    ),
    "StudentT": (
        lambda: dist.StudentT(5.0, LOC, SCALE),
        lambda i: stats.t(5.0, LOC[i, 0], SCALE[i, 0]),
    ),
    "StudentT, degrees": (
        lambda: dist.StudentT(3 * POS, 0.0, 1.0),
        lambda i: stats.t(3 * POS[i, 0]),
    ),
    "VonMises": (
        lambda: dist.VonMises(torch.zeros(()), POS),
        lambda i: stats.vonmises(POS[i, 0]),
    ),
    "exp of a Gamma": (
        lambda: transformed(dist.Gamma(POS, 1.0), EXP),
        lambda i: Through(stats.gamma(POS[i, 0]), torch.log),
    ),
    "affine of a StudentT": (
        lambda: transformed(dist.StudentT(5.0), AFFINE(LOC, SCALE)),
        lambda i: stats.t(5.0, LOC[i, 0], SCALE[i, 0]),
    ),
    "Normal, folded": (
        lambda: dist.FoldedDistribution(dist.Normal(LOC, SCALE)),
        lambda i: stats.foldnorm(LOC[i, 0] / SCALE[i, 0], scale=SCALE[i, 0]),
    ),
    "Exponential, masked": (
        lambda: dist.Exponential(POS).mask(True),
        lambda i: stats.expon(scale=1 / POS[i, 0]),
    ),
    "mixture, locations": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)),
            dist.Normal(LOC.unsqueeze(-1) + torch.tensor([0.0, 5.0]), 1.0),
        ),
        lambda i: Mixed(stats.norm(LOC[i, 0]), stats.norm(LOC[i, 0] + 5), 0.5),
    ),
    "mixture, weights": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.stack([PROB, 1 - PROB], -1)),
            dist.Normal(torch.tensor([0.0, 5.0]).expand(N, 1, 2), 1.0),
        ),
        lambda i: Mixed(stats.norm(0), stats.norm(5), float(PROB[i, 0])),
    ),
    "masked mixture": (
        lambda: dist.MaskedMixture(
            along(1.0, 0.0, 1.0).bool(),
            dist.Gamma(2.0, 1.0).expand([N, 1]),
            dist.Gamma(POS, 1.0),
        ),
        lambda i: stats.gamma(POS[i, 0] if i != 1 else 2.0),
    ),
    "a law of the user": (
        lambda: Hidden(lambda: dist.Gamma(POS, 1.0)),
        lambda i: stats.gamma(POS[i, 0]),
    ),
    "a law of the user, some hidden": (
        lambda: Hidden(lambda: dist.Gamma(POS, 1.0), torch.ones(N, 1)),
        lambda i: stats.gamma(POS[i, 0]),
    ),
    "a law of the user, masked": (
        lambda: Hidden(lambda: dist.Gamma(POS, 1.0), torch.ones(N, 1)).mask(True),
        lambda i: stats.gamma(POS[i, 0]),
    ),
    "a law of the user, transformed": (
        lambda: transformed(
            Hidden(lambda: dist.Gamma(POS, 1.0), torch.ones(N, 1)), EXP
        ),
        lambda i: Through(stats.gamma(POS[i, 0]), torch.log),
    ),
}


class Mixed(Minus):
    def __init__(self, one, other, share):
        self.parts = one, other, share

    def cdf(self, x):
        one, other, share = self.parts
        return share * one.cdf(x) + (1 - share) * other.cdf(x)


class Hidden(dist.TorchDistribution):
    """A distribution whose parameters are nowhere to be seen."""

    arg_constraints = {}
    support = dist.constraints.positive
    has_rsample = True

    def __init__(self, make, seen=None, shape=None):
        self.make, self.seen = make, seen
        shape = make().batch_shape if shape is None else shape
        super().__init__(torch.Size(shape), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Hidden(self.make, self.seen, batch_shape)

    def rsample(self, sample_shape=()):
        return self.make().expand(self.batch_shape).rsample(sample_shape)

    def log_prob(self, value):
        return self.make().expand(self.batch_shape).log_prob(value)


FAMILIES = COUPLED | ALONE


@pytest.mark.parametrize("name", FAMILIES)
def test_the_law_at_each_place(name):
    make, law = FAMILIES[name]
    x = drawn(make)
    assert x.shape == (N, COUNT)
    for i in range(N):
        assert len(x[i].unique()) > 0.99 * COUNT  # independent along the draws
        p = stats.kstest(x[i].numpy(), law(i).cdf).pvalue
        assert p > LEVEL, (i, p)


class ClampedNormal(dist.Normal):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).clamp(min=0.0)


class ClampedExponential(dist.Exponential):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).clamp(max=0.3)


class ClampedLogNormal(dist.LogNormal):
    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).clamp(max=0.3)


class Turned(dist.Bernoulli):
    def sample(self, sample_shape=()):
        return 1 - super().sample(sample_shape)


@pytest.mark.parametrize(
    "make, least, share",
    [
        (lambda: ClampedNormal(LOC, 1.0), 0.0, lambda i: stats.norm.cdf(-LOC[i, 0])),
        (
            lambda: ClampedExponential(POS),
            0.3,
            lambda i: stats.expon.sf(0.3 * POS[i, 0]),
        ),
        (
            lambda: ClampedLogNormal(LOC, 1.0),
            0.3,
            lambda i: stats.norm.sf(np.log(0.3) - float(LOC[i, 0])),
        ),
        (lambda: Turned(PROB), 0.0, lambda i: float(PROB[i, 0])),
    ],
    ids=["Normal", "Exponential", "LogNormal", "Bernoulli"],
)
def test_subclasses_that_draw_in_another_way(make, least, share):
    """They are drawn as they say: a share of draws is at the end."""
    x = drawn(make)
    for i in range(N):
        found, p = int((x[i] == least).sum()), float(share(i))
        assert stats.binomtest(found, COUNT, p).pvalue > LEVEL


@pytest.mark.parametrize("name", COUPLED)
def test_one_noise_for_all_places(name):
    """What the draws are quantiles of is the same everywhere."""
    make, law = COUPLED[name]
    x = drawn(make)
    u = torch.stack([torch.as_tensor(law(i).cdf(x[i].numpy())) for i in range(N)])
    torch.testing.assert_close(u, u[:1].expand_as(u), rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("name", ["Normal", "affine", "affine, along the grid"])
def test_gaussian_noise_is_the_same_to_the_last_digits(name):
    make, law = COUPLED[name]
    x = drawn(make)
    z = torch.stack([(x[i] - law(i).mean()) / law(i).std() for i in range(N)])
    torch.testing.assert_close(z, z[:1].expand_as(z), rtol=1e-12, atol=1e-12)


DISCRETE = {
    "Bernoulli": (
        lambda: dist.Bernoulli(PROB),
        lambda i: stats.bernoulli(PROB[i, 0]),
    ),
    "Bernoulli, logits": (
        lambda: dist.Bernoulli(logits=LOC - 1),
        lambda i: stats.bernoulli(torch.sigmoid(LOC[i, 0] - 1)),
    ),
    "Categorical": (
        lambda: dist.Categorical(SIMPLEX),
        lambda i: stats.rv_discrete(values=(range(3), SIMPLEX[i, 0].numpy())),
    ),
    "Categorical, logits": (
        lambda: dist.Categorical(logits=SIMPLEX.log() + 3.0),
        lambda i: stats.rv_discrete(values=(range(3), SIMPLEX[i, 0].numpy())),
    ),
    "Poisson": (lambda: dist.Poisson(POS), lambda i: stats.poisson(POS[i, 0])),
    "Geometric": (lambda: dist.Geometric(PROB), lambda i: stats.geom(PROB[i, 0], -1)),
    "Binomial": (lambda: dist.Binomial(5, PROB), lambda i: stats.binom(5, PROB[i, 0])),
    "Binomial, counts": (
        lambda: dist.Binomial(along(2.0, 5.0, 9.0), 0.4),
        lambda i: stats.binom((2, 5, 9)[i], 0.4),
    ),
    "NegativeBinomial": (
        lambda: dist.NegativeBinomial(POS, probs=torch.tensor(0.3)),
        lambda i: stats.nbinom(POS[i, 0], 0.7),
    ),
    "BetaBinomial": (
        lambda: dist.BetaBinomial(POS, 2.0, 5),
        lambda i: stats.betabinom(5, POS[i, 0], 2.0),
    ),
    "GammaPoisson": (
        lambda: dist.GammaPoisson(POS, 2.0),
        lambda i: stats.nbinom(POS[i, 0], 2 / 3),
    ),
    "zero-inflated": (
        lambda: dist.ZeroInflatedPoisson(torch.tensor(3.0), gate=PROB),
        lambda i: Inflated(stats.poisson(3.0), float(PROB[i, 0])),
    ),
    "OrderedLogistic": (
        lambda: dist.OrderedLogistic(LOC, CUTS),
        lambda i: ordered(float(LOC[i, 0])),
    ),
    "Bernoulli, masked": (
        lambda: dist.Bernoulli(PROB).mask(True),
        lambda i: stats.bernoulli(PROB[i, 0]),
    ),
}
CUTS = double([0.0, 2.0])


def ordered(predictor):
    below = torch.sigmoid(CUTS - predictor)
    ends = torch.cat([torch.zeros(1), below, torch.ones(1)])
    return stats.rv_discrete(values=(range(3), ends.diff().numpy()))


class Inflated:
    def __init__(self, law, gate):
        self.law, self.gate = law, gate

    def pmf(self, k):
        return (1 - self.gate) * self.law.pmf(k) + self.gate * (k == 0)


def check_counts(x, law):
    """Whole numbers against their probabilities; what is rare is taken together."""
    top = int(x.max()) + 1
    expected = np.array([law.pmf(k) for k in range(top)]) * len(x)
    found = np.bincount(x.long().numpy(), minlength=top).astype(float)
    assert not found[expected == 0].any()
    few = expected < 5
    rest = len(x) - expected[~few].sum()
    found = np.append(found[~few], found[few].sum())
    expected = np.append(expected[~few], rest)
    if rest < 1:
        assert found[-1] <= 8
        found, expected = found[:-1], expected[:-1]
        expected = expected * found.sum() / expected.sum()
    if len(found) > 1:
        assert stats.chisquare(found, expected).pvalue > LEVEL


@pytest.mark.parametrize("name", DISCRETE)
def test_the_law_of_whole_numbers_at_each_place(name):
    make, law = DISCRETE[name]
    x = drawn(make)
    assert x.shape == (N, COUNT)
    for i in range(N):
        check_counts(x[i], law(i))


@pytest.mark.parametrize("name", [n for n in DISCRETE if n.startswith(("Bern", "Cat"))])
def test_bernoulli_and_categorical_sites_are_monotone(name):
    """As many of them as can be are equal: all are steps of one uniform number."""
    if name == "Bernoulli, masked":
        pytest.skip("a mask hides the family: right at each place, and no more")
    make, law = DISCRETE[name]
    x = drawn(make).long()
    for i, j in itertools.combinations(range(N), 2):
        ends = [np.cumsum([law(k).pmf(v) for v in range(3)]) for k in (i, j)]
        for a, b in itertools.product(range(3), repeat=2):
            low = max(e[v - 1] if v else 0.0 for e, v in zip(ends, (a, b), strict=True))
            high = min(e[v] for e, v in zip(ends, (a, b), strict=True))
            p, found = max(0.0, high - low), int(((x[i] == a) & (x[j] == b)).sum())
            assert abs(found - COUNT * p) <= 5 * (COUNT * p) ** 0.5
            assert p > 1e-9 or not found


@pytest.mark.parametrize("end", [0.0, 1.0 - 2**-24, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_probability_is_not_drawn(end, dtype, monkeypatch):
    """Also at the ends of the unit interval, where sums of probabilities round."""
    rand = torch.rand

    def extreme(*args, **kwargs):
        return torch.full_like(rand(*args, **kwargs), end)

    monkeypatch.setattr(torch, "rand", extreme)
    thirds = torch.full((N, 1, 7), 1 / 7, dtype=dtype)
    no_last = torch.cat([thirds, 0 * thirds[..., :1]], -1)
    no_first = torch.cat([0 * thirds[..., :1], thirds], -1)
    generator = torch.Generator().manual_seed(0)
    ragged = rand(N, 1, 1000, generator=generator, dtype=dtype)
    ragged[..., -400:] = 0
    for probs in (no_last, no_first, ragged):
        x = drawn(lambda p=probs: dist.Categorical(p), 4)
        whole = (probs / probs.sum(-1, keepdim=True)).expand(N, 4, -1)
        assert bool((whole.gather(-1, x.unsqueeze(-1)) > 0).all())
    sure = along(0.0, 1.0, 0.5).to(dtype)
    x = drawn(lambda: dist.Bernoulli(sure), 4)
    assert bool((x[0] == 0).all() and (x[1] == 1).all())
    for make in (
        lambda: dist.Exponential(POS.to(dtype)),
        lambda: dist.LogNormal(LOC.to(dtype), SCALE.to(dtype)),
        lambda: dist.Laplace(LOC.to(dtype), SCALE.to(dtype)),
        lambda: dist.Gumbel(LOC.to(dtype), SCALE.to(dtype)),
    ):
        x = drawn(make, 4)
        assert bool(x.isfinite().all()) and x.dtype == dtype
        assert bool(make().log_prob(x).isfinite().all())


# -- Vectors -----------------------------------------------------------------------


def vector(*rows):
    return double(rows).unsqueeze(1)  # (N, 1, k)


MEANS = vector([0.0, 1.0], [5.0, -1.0], [2.0, 2.0])
TRILS = double(
    [[[1.0, 0.0], [0.5, 1.0]], [[2.0, 0.0], [-1.0, 0.5]], [[0.5, 0.0], [0.0, 3.0]]]
).unsqueeze(1)  # (N, 1, 2, 2)
FACTORS = double([[1.0], [-2.0]])
EXTRA = double([0.5, 1.5])

GAUSSIAN_VECTORS = {
    "MultivariateNormal": (
        lambda: dist.MultivariateNormal(MEANS, scale_tril=TRILS),
        lambda i: (MEANS[i, 0], TRILS[i, 0] @ TRILS[i, 0].mT),
    ),
    "MultivariateNormal, one covariance": (
        lambda: dist.MultivariateNormal(MEANS, scale_tril=TRILS[0, 0]),
        lambda i: (MEANS[i, 0], TRILS[0, 0] @ TRILS[0, 0].mT),
    ),
    "LowRank": (
        lambda: dist.LowRankMultivariateNormal(MEANS, FACTORS, EXTRA),
        lambda i: (MEANS[i, 0], FACTORS @ FACTORS.mT + torch.diag(EXTRA)),
    ),
    "LowRank, factors": (
        lambda: dist.LowRankMultivariateNormal(
            torch.zeros(2), SCALE[..., None, None] * FACTORS, EXTRA.expand(N, 1, 2)
        ),
        lambda i: (
            torch.zeros(2),
            SCALE[i, 0] ** 2 * FACTORS @ FACTORS.mT + torch.diag(EXTRA),
        ),
    ),
    "Independent": (
        lambda: dist.Normal(MEANS, EXTRA).to_event(1),
        lambda i: (MEANS[i, 0], torch.diag(EXTRA.square())),
    ),
    "affine of Independent": (
        lambda: transformed(dist.Normal(MEANS, EXTRA).to_event(1), AFFINE(1.0, -2.0)),
        lambda i: (1 - 2 * MEANS[i, 0], torch.diag(4 * EXTRA.square())),
    ),
    "affine of MultivariateNormal": (
        lambda: transformed(
            dist.MultivariateNormal(torch.zeros(2), scale_tril=TRILS[0, 0]),
            AFFINE(MEANS, SCALE.unsqueeze(-1)),
        ),
        lambda i: (MEANS[i, 0], SCALE[i, 0] ** 2 * TRILS[0, 0] @ TRILS[0, 0].mT),
    ),
}


@pytest.mark.parametrize("name", GAUSSIAN_VECTORS)
def test_gaussian_vectors(name):
    """Their law at each place: whitened, they are standard normal, and uncorrelated."""
    make, law = GAUSSIAN_VECTORS[name]
    x = drawn(make)
    assert x.shape == (N, COUNT, 2)
    white = []
    for i in range(N):
        mean, covariance = law(i)
        root = torch.linalg.cholesky(covariance)
        w = torch.linalg.solve_triangular(root, (x[i] - mean).mT, upper=False)
        for row in w:
            assert stats.kstest(row.numpy(), stats.norm.cdf).pvalue > LEVEL
        assert stats.pearsonr(*w.numpy()).pvalue > LEVEL
        white.append(w)
    if "factors" not in name:  # there noises are mixed in other proportions
        for w in white[1:]:
            same = torch.isclose(w, white[0], rtol=1e-10, atol=1e-10)
            assert bool(same.all())


def test_of_low_rank_both_noises_are_the_same():
    """The own noise of the elements, and the few that they share."""
    x = drawn(GAUSSIAN_VECTORS["LowRank, factors"][0])
    shared = (x[1] - x[0]) @ FACTORS[:, 0] / FACTORS.square().sum()  # (2 - 1) noise
    torch.testing.assert_close(x[1] - x[0], shared.unsqueeze(-1) * FACTORS[:, 0])
    torch.testing.assert_close(x[2] - x[0], -0.5 * shared.unsqueeze(-1) * FACTORS[:, 0])
    own = x[0] - shared.unsqueeze(-1) * FACTORS[:, 0]
    for k in range(2):
        assert stats.kstest(own[:, k] / EXTRA[k].sqrt(), "norm").pvalue > LEVEL


INDEPENDENT = {
    "LogNormal": lambda: dist.LogNormal(MEANS, EXTRA),
    "Exponential": lambda: dist.Exponential(MEANS.abs() + 1),
    "Uniform": lambda: dist.Uniform(MEANS, MEANS + EXTRA),
    "Laplace": lambda: dist.Laplace(MEANS, EXTRA),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_elements(name):
    """Coupled along the grid, and independent along the event."""
    make = INDEPENDENT[name]
    x = drawn(lambda: make().to_event(1))
    assert x.shape == (N, COUNT, 2)
    u = make().cdf(x)
    torch.testing.assert_close(u, u[:1].expand_as(u), rtol=0.0, atol=1e-8)
    assert stats.pearsonr(u[0, :, 0], u[0, :, 1]).pvalue > LEVEL
    for k in range(2):
        assert stats.kstest(u[0, :, k].numpy(), "uniform").pvalue > LEVEL


def test_independent_bernoulli_sites():
    probs = vector([0.2, 0.9], [0.5, 0.5], [0.8, 0.1])
    x = drawn(lambda: dist.Bernoulli(probs).to_event(1))
    for i, k in itertools.product(range(N), range(2)):
        check_counts(x[i, :, k], stats.bernoulli(float(probs[i, 0, k])))
    assert bool((x.diff(dim=0)[..., 0] >= 0).all())
    assert bool((x.diff(dim=0)[..., 1] <= 0).all())


VECTORS = {  # the law of the first element at place i
    "Dirichlet": (
        lambda: dist.Dirichlet(MEANS.abs() + 1),
        lambda i: stats.beta(MEANS[i, 0, 0] + 1, MEANS[i, 0, 1].abs() + 1),
    ),
    "MultivariateStudentT": (
        lambda: dist.MultivariateStudentT(
            torch.tensor(5.0), torch.zeros(2), scale_tril=TRILS
        ),
        lambda i: stats.t(5.0, scale=TRILS[i, 0, 0, 0]),
    ),
    "exp of independent Normals": (
        lambda: transformed(dist.Normal(MEANS, EXTRA).to_event(1), EXP),
        lambda i: stats.lognorm(EXTRA[0], scale=MEANS[i, 0, 0].exp()),
    ),
    "independent Gammas": (
        lambda: dist.Gamma(MEANS.abs() + 1, 1.0).to_event(1),
        lambda i: stats.gamma(MEANS[i, 0, 0] + 1),
    ),
    "mixture of vectors": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)),
            dist.Normal(MEANS.unsqueeze(-2).expand(N, 1, 2, 2), 1.0).to_event(1),
        ),
        lambda i: stats.norm(MEANS[i, 0, 0]),
    ),
}


@pytest.mark.parametrize("name", VECTORS)
def test_other_vectors_at_each_place(name):
    make, law = VECTORS[name]
    x = drawn(make)
    for i in range(N):
        assert stats.kstest(x[i, :, 0].numpy(), law(i).cdf).pvalue > LEVEL


def test_counts_of_kinds_at_each_place():
    probs = SIMPLEX
    x = drawn(lambda: dist.Multinomial(4, probs))
    assert bool((x.sum(-1) == 4).all())
    hot = drawn(lambda: dist.OneHotCategorical(probs))
    assert bool((hot.sum(-1) == 1).all())
    for i, k in itertools.product(range(N), range(3)):
        check_counts(x[i, :, k], stats.binom(4, float(probs[i, 0, k])))
        check_counts(hot[i, :, k], stats.bernoulli(float(probs[i, 0, k])))


def test_matrices_at_each_place():
    """A Wishart matrix in one dimension is a chi-squared number."""
    x = drawn(lambda: dist.Wishart(5 * POS, torch.eye(1)))
    assert x.shape == (N, COUNT, 1, 1)
    for i in range(N):
        law = stats.chi2(5 * POS[i, 0])
        assert stats.kstest(x[i, :, 0, 0].numpy(), law.cdf).pvalue > LEVEL


# -- What does not differ ----------------------------------------------------------

SAME = {
    "Normal": lambda: dist.Normal(1.0, 2.0),
    "LogNormal": lambda: dist.LogNormal(1.0, 2.0),
    "Gamma": lambda: dist.Gamma(1.0, 2.0),
    "Beta": lambda: dist.Beta(1.0, 2.0),
    "Poisson": lambda: dist.Poisson(4.0),
    "Dirichlet": lambda: dist.Dirichlet(torch.ones(3)),
    "Categorical": lambda: dist.Categorical(torch.ones(3)),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.ones(2), torch.eye(2)),
    "StudentT": lambda: dist.StudentT(4.0),
    "Hidden": lambda: Hidden(lambda: dist.Gamma(torch.ones(()), 1.0)),
}


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_differ_is_drawn_once(name):
    """Equal along the grid, in memory that is held once."""
    x = drawn(SAME[name], 500, n=100)
    assert x.shape[:2] == (100, 500)
    assert torch.equal(x, x[:1].expand_as(x))
    assert x.stride(0) == 0
    each = x[0].numel() * x.element_size()
    assert x.untyped_storage().nbytes() <= 2 * each  # a Beta is drawn with its rest
    assert len(x[0].flatten().unique()) > 1


def chain():
    """Nothing here depends on a macro value."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    g = pyro.sample("g", dist.Gamma(z.exp(), 1.0))
    b = pyro.sample("b", dist.Beta(g + 1, 2.0))
    t = pyro.sample("t", dist.StudentT(5.0, b, 1.0))
    k = pyro.sample("k", dist.Poisson(g))
    m = pyro.sample("m", dist.MultivariateNormal(torch.stack([t, k], -1), torch.eye(2)))
    c = pyro.sample("c", dist.Categorical(logits=m))
    d = pyro.sample("d", dist.Dirichlet(m.exp() + 1))
    return z, g, b, t, k, m, c, d


def test_nor_does_what_follows_from_it():
    """All sites that the macro value does not act on are the same at all places."""
    pyro.set_rng_seed(0)
    with pm.grid("values", N, dim=-2), pyro.plate("draws", 50, dim=-1):
        found = chain()
    for i, x in enumerate(found):
        assert torch.equal(x, x[:1].expand_as(x)), i
        assert len(x[0].flatten().unique()) > 1


# -- Where the grid stands ---------------------------------------------------------


def nest(plates, then):
    """Runs ``then`` inside of plates, the first of them outermost."""
    if not plates:
        return then()
    with plates[0]:
        return nest(plates[1:], then)


ORDERS = list(itertools.permutations(["grid", "draws", "parts"]))


@pytest.mark.parametrize("order", ORDERS, ids=["-".join(o) for o in ORDERS])
@pytest.mark.parametrize("dims", [(-3, -1, -2), (-1, -3, -2), (-2, -1, -3)])
def test_the_grid_is_outermost_innermost_or_in_between(order, dims):
    """In any order of contexts, and along any of the dimensions."""
    sizes = {"grid": N, "draws": 400, "parts": 2}
    dim = dict(zip(sizes, dims, strict=True))
    plates = {
        name: (pm.grid if name == "grid" else pyro.plate)(name, size, dim=dim[name])
        for name, size in sizes.items()
    }
    shape = [1, 1, 1]
    shape[dim["grid"]] = N
    loc = LOC.reshape(shape)

    def run():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(loc + z, 2.0))
        e = pyro.sample("e", dist.Exponential((x / 10).exp()))
        v = dist.MultivariateNormal(x.unsqueeze(-1) * torch.ones(2), torch.eye(2))
        return z, x, e, pyro.sample("v", v)

    def standing(t):
        order = [dim["grid"], dim["draws"], dim["parts"]]
        return t.permute(*(3 + d for d in order), *range(3, t.dim()))

    z, x, e, v = map(standing, nest([plates[name] for name in order], run))
    assert z.shape == x.shape == e.shape == (N, 400, 2) and v.shape == (N, 400, 2, 2)
    assert torch.equal(z, z[:1].expand_as(z))
    own = (x - z - LOC.unsqueeze(-1)) / 2
    for part in (own, e * (x / 10).exp(), v - x.unsqueeze(-1)):
        torch.testing.assert_close(part, part[:1].expand_as(part))
    for part in (z[0], own[0], v[0, ..., 0] - x[0]):
        assert stats.kstest(part.flatten().numpy(), "norm").pvalue > LEVEL
    assert stats.kstest((e * (x / 10).exp())[0].flatten(), "expon").pvalue > LEVEL


def test_a_grid_finds_its_own_dimension():
    """Without ``dim``, as a plate does: the next that is free."""
    pyro.set_rng_seed(0)
    with pm.grid("values", N):
        x = pyro.sample("x", dist.Normal(LOC[:, 0], 1.0))
    assert x.shape == (N,)
    torch.testing.assert_close(x.diff(), LOC[:, 0].diff())
    with pyro.plate("draws", 5), pm.grid("values", N):
        x = pyro.sample("x", dist.Normal(LOC, 1.0))
    assert x.shape == (N, 5)
    torch.testing.assert_close(x.diff(dim=0), LOC.diff(dim=0).expand(2, 5))
    with pm.grid("values", N), pyro.plate("draws", 5):
        x = pyro.sample("x", dist.Normal(LOC[:, 0], 1.0))
    assert x.shape == (5, N)
    torch.testing.assert_close(x.diff(dim=-1), LOC[:, 0].diff().expand(5, 2))


def test_a_plate_of_the_model_to_the_right():
    """The grid outside, the plates of the model inside, found by themselves."""

    def model():
        with pyro.plate("parts", 4):
            x = pyro.sample("x", dist.Normal(torch.arange(4.0), 1.0))
        return x.sum(-1, keepdim=True)

    with pm.grid("values", N, dim=-2):
        x = model()
    assert x.shape == (N, 1) and torch.equal(x, x[:1].expand_as(x))


def test_a_site_outside_of_the_grid_is_not_touched():
    pyro.set_rng_seed(0)
    values = pm.grid("values", N, dim=-1)
    inside, outside = pyro.plate("draws", 4, dim=-2), pyro.sample
    z = outside("z", dist.Normal(0.0, 1.0))
    with values, inside:
        x = pyro.sample("x", dist.Normal(z + LOC[:, 0], 1.0))
    after = pyro.sample("y", dist.Normal(torch.zeros(N), 1.0).to_event(1))
    assert z.shape == () and len(after.unique()) == N
    torch.testing.assert_close(x.diff(dim=-1), LOC[:, 0].diff().expand(4, 2))


def test_a_grid_is_entered_again():
    """As an object, as a decorator, and one place alone."""
    values = pm.grid("values", N, dim=-1)
    x = []
    for name in "ab":
        with values:
            x.append(pyro.sample(name, dist.Normal(LOC[:, 0], 1.0)))
    for one in x:
        torch.testing.assert_close(one.diff(), LOC[:, 0].diff())
    assert not torch.isclose(x[0], x[1]).any()

    @pm.grid("values", N, dim=-1)
    def model():
        return pyro.sample("x", dist.Normal(LOC[:, 0], 1.0))

    torch.testing.assert_close(model().diff(), LOC[:, 0].diff())
    with pm.grid("values", 1, dim=-2), pyro.plate("draws", 5, dim=-1):
        assert pyro.sample("x", dist.Normal(along(2.0), 1.0)).shape == (1, 5)


@pytest.mark.parametrize("turned", [False, True])
def test_grids_inside_of_grids(turned):
    """One noise for all places of both."""
    plates = [pm.grid("a", N, dim=-3), pm.grid("b", 2, dim=-2)]
    plates = [*(plates[::-1] if turned else plates), pyro.plate("draws", 500, dim=-1)]
    a, b = LOC.unsqueeze(-1), torch.tensor([0.0, 10.0]).reshape(2, 1)

    def run():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        only_a = pyro.sample("x", dist.Normal(a, 1.0))
        only_b = pyro.sample("y", dist.Normal(b, 1.0))
        both = pyro.sample("both", dist.Normal(a + b + z, 2.0))
        rate = (a + b + 1).reciprocal()
        e = pyro.sample("e", dist.Exponential(rate))
        below = pyro.sample("below", dist.Laplace(e, 1.0))
        return z, only_a - a, only_b - b, (both - z - a - b) / 2, e * rate, below - e

    found = nest(plates, run)
    for part in found:
        assert part.shape == (N, 2, 500)
        torch.testing.assert_close(part, part[:1, :1].expand_as(part))
    for part in found[:4]:
        assert stats.kstest(part[0, 0].numpy(), "norm").pvalue > LEVEL
    assert stats.kstest(found[4][0, 0].numpy(), "expon").pvalue > LEVEL


# -- Seeds, dtypes, copies, gradients ----------------------------------------------


def test_a_seed_makes_the_same_draws_again():
    for make in (COUPLED["Normal"][0], COUPLED["Laplace"][0], ALONE["Gamma"][0]):
        assert torch.equal(drawn(make, 50, seed=1), drawn(make, 50, seed=1))
        assert not torch.equal(drawn(make, 50, seed=1), drawn(make, 50, seed=2))


@pytest.mark.parametrize("name", ["Normal", "LogNormal", "Exponential"])
def test_more_places_are_the_same_draws(name):
    """The noise does not depend on how many places there are."""
    make = {
        "Normal": lambda loc: dist.Normal(loc, 1.0),
        "LogNormal": lambda loc: dist.LogNormal(loc, 1.0),
        "Exponential": lambda loc: dist.Exponential(loc + 1),
    }[name]
    few = drawn(lambda: make(LOC), 20)
    many = drawn(lambda: make(LOC.repeat(4, 1)), 20, n=12)
    assert torch.equal(few.repeat(4, 1), many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_that_of_a_plate(dtype):
    torch.set_default_dtype(torch.float32)
    makes = {
        "Normal": lambda: dist.Normal(LOC.to(dtype), 1.0),
        "LogNormal": lambda: dist.LogNormal(LOC.to(dtype), 1.0),
        "Exponential": lambda: dist.Exponential(POS.to(dtype)),
        "Gamma": lambda: dist.Gamma(POS.to(dtype), 1.0),
        "Bernoulli": lambda: dist.Bernoulli(PROB.to(dtype)),
        "Categorical": lambda: dist.Categorical(SIMPLEX.to(dtype)),
        "Poisson": lambda: dist.Poisson(POS.to(dtype)),
        "MultivariateNormal": lambda: dist.MultivariateNormal(
            MEANS.to(dtype), scale_tril=TRILS.to(dtype)
        ),
        "Uniform": lambda: dist.Uniform(LOC.to(dtype), LOC.to(dtype) + 1),
        "Dirichlet": lambda: dist.Dirichlet(MEANS.to(dtype).abs() + 1),
    }
    for name, make in makes.items():
        one, other = drawn(make, 5), drawn(make, 5, plate=pyro.plate)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name


def test_sample_shapes():
    """Draws of the distribution itself, more than one."""
    with pm.grid("values", N, dim=-2), pyro.plate("draws", 4, dim=-1):
        trace = poutine.trace(lambda: pyro.sample("x", dist.Normal(LOC, 1.0)))
        fn = trace.get_trace().nodes["x"]["fn"]
    for shape in ((), (7,), (7, 2)):
        x = fn.sample(shape)
        assert x.shape == (*shape, N, 4) and not x.requires_grad
        torch.testing.assert_close(x - LOC, (x - LOC)[..., :1, :].expand_as(x))
        assert fn.rsample(shape).shape == x.shape
        assert fn.log_prob(x).shape == x.shape


def test_the_distribution_in_a_trace_is_like_the_one_of_a_plate():
    def run(plate):
        with plate("values", N, dim=-2), pyro.plate("draws", 4, dim=-1):
            return pyro.sample("x", dist.LogNormal(LOC, SCALE))

    mine, yours = (
        poutine.trace(run).get_trace(plate).nodes["x"]["fn"]
        for plate in (pm.grid, pyro.plate)
    )
    assert mine.batch_shape == yours.batch_shape
    assert mine.event_shape == yours.event_shape
    assert mine.has_rsample == yours.has_rsample
    assert mine.support is yours.support
    for what in ("mean", "variance", "loc", "scale"):
        torch.testing.assert_close(getattr(mine, what), getattr(yours, what))
    with pytest.raises(AttributeError):
        _ = mine.nonsense
    for again in (copy.copy, copy.deepcopy, lambda fn: pickle.loads(pickle.dumps(fn))):
        x = again(mine).sample()
        u = yours.cdf(x)
        torch.testing.assert_close(u, u[:1].expand_as(u))
    hash(mine), repr(mine)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: dist.Normal(p, p.exp()),
        lambda p: dist.LogNormal(p, 0.5),
        lambda p: dist.Exponential(p.exp()),
        lambda p: dist.Laplace(p, 2.0),
        lambda p: dist.Uniform(p, p + 2),
        lambda p: transformed(dist.Normal(p, 1.0), SIGMOID),
    ],
    ids=["Normal", "LogNormal", "Exponential", "Laplace", "Uniform", "sigmoid"],
)
def test_draws_have_derivatives(make):
    """Of a quantile with respect to parameters: by a small step."""
    p = LOC.clone().requires_grad_()
    x = drawn(lambda: make(p), 7)
    (found,) = torch.autograd.grad(x.sin().sum(), p)
    ends = [drawn(lambda s=s: make(LOC + s), 7).sin().sum(1) for s in (1e-6, -1e-6)]
    expected = (ends[0] - ends[1]) / 2e-6
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-7, atol=1e-7)


def test_no_derivatives_where_there_are_none():
    p = PROB.clone().requires_grad_()
    assert not drawn(lambda: dist.Bernoulli(p), 5).requires_grad
    p = LOC.clone().requires_grad_()
    assert not drawn(lambda: dist.Normal(p, 1.0).has_rsample_(False), 5).requires_grad
    with torch.no_grad():
        assert not drawn(lambda: dist.Normal(p, 1.0), 5).requires_grad


# -- Handlers ----------------------------------------------------------------------


def program(y=None):
    """Sites of many kinds, some of them below the grid's values."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    g = pyro.sample("g", dist.Gamma(POS, 1.0))
    e = pyro.sample("e", dist.LogNormal(LOC + z, SCALE))
    b = pyro.sample("b", dist.Bernoulli(PROB))
    c = pyro.sample("c", dist.Categorical(SIMPLEX))
    v = pyro.sample("v", dist.MultivariateNormal(MEANS, scale_tril=TRILS))
    d = pyro.deterministic("d", v.sum(-1) + b + c)
    s = pyro.sample("s", dist.StudentT(4.0, d, 1.0))
    return pyro.sample("y", dist.Normal(s + g + e, 0.5), obs=y)


def inside(fn, plate=pm.grid, count=6):
    def run(*args, **kwargs):
        with plate("values", N, dim=-2), pyro.plate("draws", count, dim=-1):
            return fn(*args, **kwargs)

    return run


@pytest.mark.parametrize("observed", [False, True])
def test_densities_are_those_of_a_plate(observed):
    """Of each site, of all, and of the parts, at the same values."""
    y = torch.linspace(-1, 1, 6) if observed else None
    mine = poutine.trace(inside(program)).get_trace(y)
    plated = inside(program, pyro.plate)
    yours = poutine.trace(poutine.replay(plated, trace=mine)).get_trace(y)
    for trace in (mine, yours):
        trace.compute_log_prob()
        trace.compute_score_parts()
    assert list(mine.nodes) == list(yours.nodes)
    for name, node in mine.nodes.items():
        if node["type"] != "sample" or "log_prob" not in node:
            continue
        other = yours.nodes[name]
        torch.testing.assert_close(node["value"], other["value"])
        torch.testing.assert_close(node["log_prob"], other["log_prob"])
        assert node["cond_indep_stack"] == other["cond_indep_stack"]
        for mine_part, yours_part in zip(
            node["score_parts"], other["score_parts"], strict=True
        ):
            torch.testing.assert_close(mine_part, yours_part)
    torch.testing.assert_close(mine.log_prob_sum(), yours.log_prob_sum())


def test_validation_of_values():
    """As of a plate: what is off the support is refused, where pyro validates."""
    bad = {"e": -torch.ones(N, 6)}
    trace = poutine.trace(poutine.condition(inside(program), bad)).get_trace()
    with pytest.raises(ValueError):
        trace.compute_log_prob()
    trace = poutine.trace(inside(poutine.condition(program, bad))).get_trace()
    with pytest.raises(ValueError):
        trace.compute_log_prob()


@pytest.mark.parametrize("handler", [poutine.condition, poutine.do])
@pytest.mark.parametrize("outside", [False, True])
def test_condition_and_do(handler, outside):
    """The value propagates, and is the same inside and outside of the grid."""
    data = {"v": torch.ones(N, 6, 2), "z": torch.full((N, 6), 2.0)}
    if outside:
        run = handler(inside(program), data=data)
    else:
        run = inside(handler(program, data=data))
    pyro.set_rng_seed(0)
    nodes = poutine.trace(run).get_trace().nodes
    torch.testing.assert_close(
        nodes["d"]["value"], 2 + nodes["b"]["value"] + nodes["c"]["value"]
    )
    own = (nodes["e"]["value"].log() - LOC - 2.0) / SCALE
    torch.testing.assert_close(own, own[:1].expand_as(own))
    if handler is poutine.condition:
        assert nodes["v"]["is_observed"]
        assert torch.equal(nodes["v"]["value"], data["v"])


@pytest.mark.parametrize("outside", [False, True])
def test_replay(outside):
    guide = poutine.trace(inside(program)).get_trace()
    plain = poutine.replay if outside else None
    if outside:
        run = plain(inside(program), trace=guide)
    else:
        run = inside(poutine.replay(program, trace=guide))
    again = poutine.trace(run).get_trace()
    for name in ("z", "g", "e", "b", "c", "v", "s", "y"):
        assert torch.equal(again.nodes[name]["value"], guide.nodes[name]["value"])


@pytest.mark.parametrize("outside", [False, True])
def test_mask_and_scale(outside):
    """They weigh densities, and do not change draws."""
    mask = torch.tensor([True, False, True, True, False, True])

    def weighted(fn):
        return poutine.scale(poutine.mask(fn, mask=mask), scale=2.5)

    pyro.set_rng_seed(0)
    plain = poutine.trace(inside(program)).get_trace()
    pyro.set_rng_seed(0)
    run = weighted(inside(program)) if outside else inside(weighted(program))
    trace = poutine.trace(run).get_trace()
    trace.compute_log_prob()
    plain.compute_log_prob()
    for name in ("z", "g", "e", "b", "c", "v", "s", "y"):
        node, other = trace.nodes[name], plain.nodes[name]
        assert torch.equal(node["value"], other["value"])
        expected = torch.where(mask, 2.5 * other["log_prob"], 0.0)
        torch.testing.assert_close(node["log_prob"], expected)


@pytest.mark.parametrize("outside", [False, True])
def test_block_and_scope(outside):
    blocked = poutine.block(hide=["y"])
    scoped = scope(prefix="shop")
    pyro.set_rng_seed(0)
    expected = poutine.trace(inside(program)).get_trace().nodes
    for handler, rename in ((blocked, ""), (scoped, "shop/")):
        pyro.set_rng_seed(0)
        run = handler(inside(program)) if outside else inside(handler(program))
        nodes = poutine.trace(run).get_trace().nodes
        for name in ("z", "g", "e", "b", "c", "v", "s"):
            assert torch.equal(nodes[rename + name]["value"], expected[name]["value"])
        assert "y" not in nodes


def test_a_site_that_is_hidden_inside_of_the_grid():
    """The grid does not see it; its law is right, and it does not differ in shape."""

    def model():
        with poutine.block():
            z = pyro.sample("z", dist.Normal(LOC, 1.0))
        return pyro.sample("x", dist.Normal(z, 1.0))

    x = poutine.trace(inside(model)).get_trace().nodes["x"]
    assert x["value"].shape == (N, 6)
    own = x["value"] - x["fn"].loc
    torch.testing.assert_close(own, own[:1].expand_as(own))


def test_reparam_inside():
    config = {"x": LocScaleReparam(0.0), "w": LocScaleReparam(0.3)}

    def model():
        x = pyro.sample("x", dist.Normal(LOC, SCALE))
        return pyro.sample("w", dist.Normal(x, 2.0))

    nodes = poutine.trace(inside(poutine.reparam(model, config))).get_trace().nodes
    x, w = nodes["x"]["value"], nodes["w"]["value"]
    assert "x_decentered" in nodes
    z = (x - LOC) / SCALE
    torch.testing.assert_close(z, z[:1].expand_as(z))
    torch.testing.assert_close((w - x)[1:], (w - x)[:1].expand(2, 6))


def test_reparam_outside_is_refused():
    def model():
        return pyro.sample("x", dist.Normal(LOC, SCALE))

    run = poutine.reparam(inside(model), {"x": LocScaleReparam(0.0)})
    with pytest.raises(pm.PyroMacroError, match="inside"):
        run()


def mixture(data):
    k = pyro.sample("k", dist.Bernoulli(PROB), infer={"enumerate": "parallel"})
    c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    return pyro.sample("y", dist.Normal(3 * k + c + LOC, 1.0), obs=data)


def log_evidence(data):
    """Of one datum at each place, by sums over all states."""
    total = torch.zeros(N, len(data))
    for k, c in itertools.product(range(2), range(3)):
        p = PROB if k else 1 - PROB
        weight = p * torch.tensor([0.2, 0.3, 0.5])[c]
        density = dist.Normal(3.0 * k + c + LOC, 1.0).log_prob(data).exp()
        total = total + weight * density
    return total.log().sum()


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("where", ["inside", "outside", "model"])
def test_enumeration(expand, where):
    """Enumerated sites are none that are drawn: the grid leaves them alone."""
    data = torch.tensor([0.3, 2.5, -1.0, 4.0])

    def configured(fn):
        return config_enumerate(fn, "parallel", expand)

    if where == "inside":
        model = inside(configured(mixture), count=4)
    elif where == "outside":
        model = configured(inside(mixture, count=4))
    else:

        def explicit(data):
            p = torch.tensor([0.2, 0.3, 0.5])
            infer = {"enumerate": "parallel", "expand": expand}
            k = pyro.sample("k", dist.Bernoulli(PROB), infer=infer)
            c = pyro.sample("c", dist.Categorical(p), infer=infer)
            return pyro.sample("y", dist.Normal(3 * k + c + LOC, 1.0), obs=data)

        model = inside(explicit, count=4)
    elbo = TraceEnum_ELBO(max_plate_nesting=2)
    loss = elbo.loss(model, lambda data: None, data)
    torch.testing.assert_close(double(-loss), log_evidence(data))


def test_enumeration_beside_draws():
    """Below an enumerated site, draws are coupled for each of its states."""

    def model():
        k = pyro.sample("k", dist.Bernoulli(PROB), infer={"enumerate": "parallel"})
        return pyro.sample("x", dist.Normal(3 * k + LOC, 1.0))

    run = poutine.enum(inside(model, count=50), first_available_dim=-3)
    nodes = poutine.trace(run).get_trace().nodes
    x, k = nodes["x"]["value"], nodes["k"]["value"]
    assert k.shape[0] == 2 and x.shape == (2, N, 50)
    noise = x - 3 * k - LOC
    torch.testing.assert_close(noise, noise[:, :1].expand_as(noise))


def test_inference_and_predictive():
    """Conditioned on data at all places; a guide inside of its own grid."""
    torch.manual_seed(0)
    data = torch.tensor([[1.0], [2.0], [3.0]]).expand(N, 4)

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pm.grid("values", N, dim=-2), pyro.plate("draws", 4, dim=-1):
            pyro.sample("y", dist.Normal(m, 1.0), obs=data)

    def guide():
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("m", dist.Normal(loc, 0.1))

    elbo = Trace_ELBO(10, max_plate_nesting=2, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(150):
        svi.step()
    expected = data.sum() / (12 + 0.01)
    assert abs(float(pyro.param("loc")) - float(expected)) < 0.1
    for parallel in (False, True):
        found = Predictive(inside(program), num_samples=5, parallel=parallel)()
        own = (found["e"].log() - LOC - found["z"]) / SCALE
        torch.testing.assert_close(own, own[:, :1].expand_as(own))
        assert found["y"].shape == (5, N, 6)
        assert len(found["y"].unique()) > 80


def test_rendering_and_shapes():
    assert "values" in pyro.render_model(inside(program)).source
    shapes = poutine.trace(inside(program)).get_trace().format_shapes()
    assert "y dist 3 6 |" in shapes


def test_parameters_that_are_lifted():
    def model():
        p = pyro.param("p", torch.tensor(0.0))
        return pyro.sample("x", dist.Normal(p + LOC, 1.0))

    lifted = poutine.lift(model, prior={"p": dist.Normal(0.0, 5.0)})
    nodes = poutine.trace(inside(lifted)).get_trace().nodes
    x, p = nodes["x"]["value"], nodes["p"]["value"]
    torch.testing.assert_close((x - p - LOC)[1:], (x - p - LOC)[:1].expand(2, 6))
    assert torch.equal(p, p[:1].expand_as(p))


# -- Macro interventions -----------------------------------------------------------

PAIR = pm.MacroVariable("s", ["x1", "x2"])
AT = along(30.0, 31.0, 33.0)


def shop():
    x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    return pyro.sample("y", dist.Normal(x1 + 3 * x2, 1.0))


def market():
    """Var X = [[13, -4.5], [-4.5, 3.25]], its sums of rows are 8.5 and -1.25."""
    z = pyro.sample("z", dist.Normal(1.0, 1.5))
    x1 = pyro.sample("x1", dist.Normal(10 + 2 * z, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20 - z, 1.0))
    return pyro.sample("y", dist.Normal(x1 + 3 * x2 + 5 * z, 0.5))


def hidden():
    """Sales and revenue have causes in common: Cov(y, s) = 9, Var(s) = 4."""
    z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
    x1 = pyro.sample("x1", dist.Normal(z1, 1.0))
    x2 = pyro.sample("x2", dist.Normal(z2, 1.0))
    return pyro.sample("y", dist.Normal(x1 + 3 * x2 + (z1 + z2) / 2, 0.1))


def even(total):
    return dist.Delta(torch.stack([0.25 * total, 0.75 * total], -1), event_dim=1)


def gaussian_split(total):
    noise = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    parts = torch.stack([total / 2, total / 2], -1)
    across = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / 2
    return OnFibre(parts, across, noise)


class OnFibre(dist.TorchDistribution):
    """A law of the user: a point plus noise along the fibre. No noise form."""

    arg_constraints = {}
    support = dist.constraints.real_vector

    def __init__(self, loc, across, noise, shape=None):
        self.loc, self.across, self.noise = loc, across, noise
        super().__init__(shape or loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        shape = torch.Size(batch_shape)
        return OnFibre(self.loc.expand(*shape, 2), self.across, self.noise, shape)

    def sample(self, sample_shape=()):
        noise = self.noise.sample(sample_shape + self.batch_shape)
        return self.loc + noise @ self.across

    def log_prob(self, value):
        return torch.zeros(value.shape[:-1])


IDENTITY = dist.MultivariateNormal(double([0.0, 0.0]), torch.eye(2).double())

# By name: the program, the realization, and the structural coefficient
SLOPES = {
    "Natural": (shop, pm.Natural(AT), 1.4),
    "Natural, confounded": (market, pm.Natural(AT), 4.75 / 7.25),
    "Natural, given": (market, pm.Natural(AT, given="z"), 1.4),
    "Residual": (shop, pm.Residual(AT, "x2"), 3.0),
    "Residual, confounded": (market, pm.Residual(AT, "x1"), 1.0),
    "Residual, given": (market, pm.Residual(AT, "x2", given="z"), 3.0),
    "Allocate": (market, pm.Allocate(AT, [0.3, 0.7]), 2.4),
    "MaxEntropy": (shop, pm.MaxEntropy(AT, reference=IDENTITY), 2.0),
    "MaxEntropy, confounded": (market, pm.MaxEntropy(AT, reference=IDENTITY), 2.0),
    "Explicit": (market, pm.Explicit(AT, even), 2.5),
    "Inhibiting": (hidden, pm.Inhibiting(AT, "y"), 2.25),
    "Inhibiting, levers": (hidden, pm.Inhibiting(AT, "y", ["x1", "x2"]), 2.25),
    "Inhibiting, shop": (shop, pm.Inhibiting(AT, "y"), 1.4),
}
SHIFTS = {
    "Shift": (shop, pm.Shift(AT), 1.4),
    "Shift, along": (shop, pm.Shift(AT, [0.5, 0.5]), 2.0),
    "Shift, confounded": (market, pm.Shift(AT), 4.75 / 7.25),
    "Shift, confounded, along": (market, pm.Shift(AT, [0.5, 0.5]), 2.0),
    "Shift, given": (market, pm.Shift(AT, given="z"), 1.4),
}


def traced(model, realization, count=200, plate=pm.grid, macro=PAIR):
    fn = pm.macro_do(model, {macro: realization})
    pyro.set_rng_seed(7)
    return poutine.trace(inside(fn, plate, count)).get_trace()


@pytest.mark.parametrize("name", SLOPES | SHIFTS)
def test_the_derivative_is_the_structural_coefficient(name):
    """Without noise, and the macro value is met at each place."""
    model, realization, slope = (SLOPES | SHIFTS)[name]
    nodes = traced(model, realization).nodes
    total = nodes["x1"]["value"] + nodes["x2"]["value"]
    y = nodes["y"]["value"]
    assert y.shape == (N, 200)
    if name in SHIFTS:
        total = total - total[:1] + AT[0]
        assert len(y[0].unique()) == 200
    else:
        assert torch.equal(nodes["s"]["value"], AT)
    wanted = AT.expand(total.shape)
    torch.testing.assert_close(total, wanted, rtol=1e-10, atol=1e-10)
    expected = (slope * AT.diff(dim=0)).expand(2, 200)
    torch.testing.assert_close(y.diff(dim=0), expected, rtol=1e-8, atol=1e-8)


EFFECTS = {  # mean and standard deviation of y at AT[0] = 30, computed by hand
    "Natural": (70.0, (3.2 + 1) ** 0.5),
    "Residual": (10 + 3 * 20, (4 + 9 * 4 - 2 * 3 * 4 + 1) ** 0.5),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_the_law_under_an_intervention(name):
    model, realization, slope = SLOPES[name]
    y = traced(model, realization, COUNT).nodes["y"]["value"]
    mean, scale = EFFECTS[name]
    for i in range(N):
        law = stats.norm(mean + slope * float(AT[i, 0] - 30), scale)
        assert stats.kstest(y[i].numpy(), law.cdf).pvalue > LEVEL


@pytest.mark.parametrize("name", SLOPES | SHIFTS)
def test_laws_are_those_of_a_plate(name):
    """The same moments of the micro state and of the effect at each place."""
    model, realization, _ = (SLOPES | SHIFTS)[name]
    mine = traced(model, realization, COUNT).nodes
    yours = traced(model, realization, COUNT, pyro.plate).nodes
    for site in ("x1", "x2", "y"):
        one, other = mine[site]["value"], yours[site]["value"]
        for i in range(N):
            if one[i].numel() == 1 or one[i].std() < 1e-8:
                torch.testing.assert_close(one[i], other[i])
                continue
            p = stats.ks_2samp(one[i].numpy(), other[i].numpy()).pvalue
            assert p > LEVEL, (site, i, p)


@pytest.mark.parametrize("name", SLOPES | SHIFTS)
def test_densities_under_an_intervention_are_those_of_a_plate(name):
    if name == "Explicit":
        pytest.skip("a point has no density")
    model, realization, _ = (SLOPES | SHIFTS)[name]
    mine = traced(model, realization, 5)
    fn = pm.macro_do(model, {PAIR: realization})
    run = poutine.replay(inside(fn, pyro.plate, 5), trace=mine)
    yours = poutine.trace(run).get_trace()
    torch.testing.assert_close(mine.log_prob_sum(), yours.log_prob_sum())


@pytest.mark.parametrize("model", [shop, market])
def test_proportional(model):
    """One natural state for all places, rescaled to each."""
    nodes = traced(model, pm.Proportional(AT)).nodes
    x = torch.stack([nodes["x1"]["value"], nodes["x2"]["value"]], -1)
    torch.testing.assert_close(x.sum(-1), AT.expand(N, 200))
    shares = x / AT.unsqueeze(-1)
    torch.testing.assert_close(shares, shares[:1].expand_as(shares))
    natural = nodes["s__micro"]["value"]
    torch.testing.assert_close(natural, natural[:1].expand_as(natural))
    y = nodes["y"]["value"]
    slopes = y.diff(dim=0) / AT.diff(dim=0)
    torch.testing.assert_close(slopes[0], slopes[1])


def test_a_law_of_the_user():
    """Right at each place, whatever its noise is."""
    nodes = traced(shop, pm.Explicit(AT, gaussian_split), COUNT).nodes
    x1, x2 = nodes["x1"]["value"], nodes["x2"]["value"]
    torch.testing.assert_close(x1 + x2, AT.expand(N, COUNT))
    for i in range(N):
        law = stats.norm(float(AT[i, 0]) / 2, 0.5**0.5)
        assert stats.kstest(x1[i].numpy(), law.cdf).pvalue > LEVEL


def two_of(make):
    def model():
        x1 = pyro.sample("x1", make(1))
        x2 = pyro.sample("x2", make(2))
        return pyro.sample("y", dist.Normal(x1 + 3.0 * x2, 1.0))

    return model


NOT_GAUSSIAN = {  # the law of x1 at macro value v
    "Poisson": (
        lambda k: dist.Poisson(1.0 * k),
        along(3.0, 4.0, 8.0),
        lambda v: stats.binom(int(v), 1 / 3),
    ),
    "Gamma": (
        lambda k: dist.Gamma(1.0 * k, 2.0),
        along(0.5, 1.0, 4.0),
        lambda v: stats.beta(1.0, 2.0, scale=v),
    ),
    "Exponential": (
        lambda k: dist.Exponential(2.0),
        along(0.5, 1.0, 4.0),
        lambda v: stats.uniform(0, v),
    ),
    "Binomial": (
        lambda k: dist.Binomial(3 * k, 0.3),
        along(2.0, 3.0, 6.0),
        lambda v: stats.hypergeom(9, 3, int(v)),
    ),
    "Bernoulli": (
        lambda k: dist.Bernoulli(0.2 * k),
        along(0.0, 1.0, 2.0),
        lambda v: stats.bernoulli({0: 0.0, 1: 3 / 11, 2: 1.0}[int(v)]),
    ),
    "Categorical": (
        lambda k: dist.Categorical(torch.tensor([0.5, 0.2, 0.3])),
        along(1.0, 2.0, 3.0),
        lambda v: stats.rv_discrete(values=(range(3), CATEGORICAL[int(v)])),
    ),
}
CATEGORICAL = {
    1: (0.5, 0.5, 0.0),
    2: (15 / 34, 4 / 34, 15 / 34),
    3: (0.0, 0.5, 0.5),
}


CONTINUOUS = ["Gamma", "Exponential"]


def check_met(nodes, at):
    total = nodes["x1"]["value"] + nodes["x2"]["value"]
    torch.testing.assert_close(total.double(), at.expand(total.shape))
    return nodes["x1"]["value"].expand(N, COUNT)


@pytest.mark.parametrize("name", NOT_GAUSSIAN)
def test_natural_laws_of_other_families(name):
    make, at, law = NOT_GAUSSIAN[name]
    x1 = check_met(traced(two_of(make), pm.Natural(at), COUNT).nodes, at)
    for i in range(N):
        if name in CONTINUOUS:
            assert stats.kstest(x1[i].numpy(), law(float(at[i, 0])).cdf).pvalue > LEVEL
        else:
            check_counts(x1[i], law(float(at[i, 0])))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_largest_entropy_of_positive_sites(name):
    """Uniform on what adds up to the macro value."""
    make, at, _ = NOT_GAUSSIAN[name]
    x1 = check_met(traced(two_of(make), pm.MaxEntropy(at), COUNT).nodes, at)
    for i in range(N):
        uniform = stats.uniform(0, float(at[i, 0]))
        assert stats.kstest(x1[i].numpy(), uniform.cdf).pvalue > LEVEL


def test_largest_entropy_of_finite_sites():
    make, at, _ = NOT_GAUSSIAN["Categorical"]
    x1 = check_met(traced(two_of(make), pm.MaxEntropy(at), COUNT).nodes, at)
    for i, support in enumerate([(0, 1), (0, 1, 2), (1, 2)]):
        p = [1 / len(support)] * len(support)
        check_counts(x1[i], stats.rv_discrete(values=(support, p)))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_shares_of_positive_sites(name):
    make, at, _ = NOT_GAUSSIAN[name]
    x1 = check_met(traced(two_of(make), pm.Allocate(at, [0.3, 0.7])).nodes, at)
    torch.testing.assert_close(x1, (0.3 * at).expand(x1.shape))


def test_residual_of_sites_that_are_not_gaussian():
    """``x1`` keeps its own law."""

    def make(k):
        return dist.StudentT(5.0, 1.0 * k, 2.0)

    nodes = traced(two_of(make), pm.Residual(AT, "x2"), COUNT).nodes
    x1 = check_met(nodes, AT)
    for i in range(N):
        assert stats.kstest(x1[i].numpy(), stats.t(5.0, 1.0, 2.0).cdf).pvalue > LEVEL


def test_a_vector_of_macro_values():
    """Sum and weighted sum at once, along the grid."""
    rows = [[1.0, 1.0, 0.0], [0.0, 1.0, 2.0]]
    macro = pm.MacroVariable("s", "x", "parts", pm.Linear(rows))

    def model():
        with pyro.plate("parts", 3):
            x = pyro.sample("x", dist.Normal(torch.arange(3.0), 1.0))
        return pyro.sample("y", dist.Normal(x.sum(-1, keepdim=True), 1.0).mask(True))

    values = torch.tensor([[1.0, 2.0], [2.0, 2.0], [2.0, 5.0]]).reshape(N, 1, 1, 2)
    fn = pm.macro_do(model, {macro: pm.Natural(values)})
    pyro.set_rng_seed(0)
    with pm.grid("values", N, dim=-3), pyro.plate("draws", 50, dim=-2):
        nodes = poutine.trace(fn).get_trace().nodes
    x = nodes["x"]["value"]
    found = x @ torch.tensor(rows).mT
    torch.testing.assert_close(found, values[:, 0].expand(N, 50, 2))
    weights = torch.tensor(rows)
    gain = weights.mT @ torch.linalg.inv(weights @ weights.mT)
    moved = values.diff(dim=0)[:, 0] @ gain.mT
    torch.testing.assert_close(x.diff(dim=0), moved.expand(2, 50, 3))


def test_plates_that_stay():
    """A total for each shop, over goods; the grid is left of both plates."""
    macro = pm.MacroVariable("s", "x", over="goods")
    scale = torch.tensor([1.0, 2.0, 3.0])

    def model():
        with pyro.plate("shops", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("goods", 3, dim=-2):
                x = pyro.sample("x", dist.Normal(z, scale.unsqueeze(-1)))
            return pyro.sample("y", dist.Normal(x.sum(-2, keepdim=True) + z, 1.0))

    at = torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 9.0]]).reshape(N, 1, 1, 2)
    for realization, step in (
        (pm.Natural(at), (scale.square() + 3) / (14 + 9)),
        (pm.Residual(at, absorb=1), torch.tensor([0.0, 1.0, 0.0])),
        (pm.Shift(at), (scale.square() + 3) / (14 + 9)),
    ):
        fn = pm.macro_do(model, {macro: realization})
        pyro.set_rng_seed(0)
        with pm.grid("values", N, dim=-4), pyro.plate("draws", 50, dim=-3):
            x = poutine.trace(fn).get_trace().nodes["x"]["value"]
        assert x.shape == (N, 50, 3, 2)
        expected = at.diff(dim=0) * step.unsqueeze(-1)
        torch.testing.assert_close(x.diff(dim=0), expected.expand(2, 50, 3, 2))


def test_two_interventions_at_once():
    """One along the grid, another at a number."""
    other = pm.MacroVariable("t", ["w1", "w2"])

    def model():
        y = shop()
        w1 = pyro.sample("w1", dist.Normal(y, 1.0))
        w2 = pyro.sample("w2", dist.Normal(-y, 3.0))
        return pyro.sample("v", dist.Normal(w1 - w2 + y, 1.0))

    what = {PAIR: pm.Natural(AT), other: pm.Allocate(4.0, [0.5, 0.5])}
    v = poutine.trace(inside(pm.macro_do(model, what))).get_trace().nodes["v"]["value"]
    torch.testing.assert_close(v.diff(dim=0), (1.4 * AT.diff(dim=0)).expand(2, 6))


def test_downstream_outcomes_that_are_not_gaussian_are_coupled():
    def model():
        y = shop()
        u = pyro.sample("u", dist.LogNormal(y / 100, 0.3))
        return pyro.sample("bought", dist.Bernoulli(logits=u - 2))

    nodes = traced(model, pm.Natural(AT)).nodes
    own = nodes["u"]["value"].log() - nodes["y"]["value"] / 100
    torch.testing.assert_close(own, own[:1].expand_as(own))
    assert bool((nodes["bought"]["value"].diff(dim=0) >= 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_totals_are_met_in_both_precisions(dtype):
    torch.set_default_dtype(dtype)
    nodes = traced(shop, pm.Natural(AT.to(dtype))).nodes
    total = nodes["x1"]["value"] + nodes["x2"]["value"]
    assert total.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert float((total - AT.to(dtype)).abs().max()) <= 4 * eps * 33
    slope = nodes["y"]["value"].diff(dim=0) / AT.to(dtype).diff(dim=0)
    assert float((slope - 1.4).abs().max()) <= 100 * eps * 100


@pytest.mark.parametrize("turned", [False, True])
def test_contexts(turned):
    """``macro_do`` as a context inside of the grid, in between, and outside."""
    do = pm.macro_do(None, {PAIR: pm.Natural(AT)})
    values = pm.grid("values", N, dim=-2)
    draws = pyro.plate("draws", 5, dim=-1)
    order = [values, do, draws] if turned else [values, draws, do]
    y = nest(order, shop)
    torch.testing.assert_close(y.diff(dim=0), (1.4 * AT.diff(dim=0)).expand(2, 5))


# -- A grid inside of what is intervened on ----------------------------------------


def gridded():
    with pm.grid("g", N, dim=-1):
        x1 = pyro.sample("x1", dist.Normal(torch.arange(3.0), 1.0))
        x2 = pyro.sample("x2", dist.Normal(0.0, 2.0))
        return pyro.sample("y", dist.Normal(x1 + 2 * x2, 1.0))


ALONG = pm.MacroVariable("t", "x1", over="g")
BELOW = {
    "Natural": (PAIR, pm.Natural(torch.arange(3.0))),
    "Natural, over": (ALONG, pm.Natural(3.0)),
    "Residual": (PAIR, pm.Residual(torch.arange(3.0), "x2")),
    "Residual, over": (ALONG, pm.Residual(3.0, 0)),
    "Shift": (PAIR, pm.Shift(1.0)),
    "Shift, over": (ALONG, pm.Shift(1.0)),
    "Proportional, over": (ALONG, pm.Proportional(3.0)),
}


@pytest.mark.parametrize("name", BELOW)
@pytest.mark.parametrize("form", ["run", "describe", "context"])
def test_a_grid_below_macro_do_is_refused(name, form):
    """Its places are dependent, which no law of the micro state knows."""
    macro, realization = BELOW[name]
    with pytest.raises(pm.PyroMacroError, match="grid"):
        if form == "run":
            pm.macro_do(gridded, {macro: realization})()
        elif form == "describe":
            pm.macro_do(gridded, {macro: realization}).describe()
        else:
            with pm.macro_do(None, {macro: realization}):
                gridded()


@pytest.mark.parametrize("macro", [PAIR, ALONG], ids=["sites", "over the grid"])
@pytest.mark.parametrize("ask", [pm.confounding, pm.dose_response])
def test_questions_about_a_grid_are_refused(macro, ask):
    with pytest.raises(pm.PyroMacroError, match="grid"):
        ask(gridded, macro, "y", at=[1.0], num_samples=50, progress=False)


def test_aggregates_of_a_grid():
    """They are sums of what is there, and need no law."""
    nodes = poutine.trace(pm.aggregate(gridded, [PAIR, ALONG])).get_trace().nodes
    x1, x2 = nodes["x1"]["value"], nodes["x2"]["value"]
    torch.testing.assert_close(nodes["s"]["value"], x1 + x2)
    torch.testing.assert_close(nodes["t"]["value"], x1.sum())


# -- Refusals ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, 2.5, None, "3", torch.tensor(2.5), [3]])
def test_wrong_sizes(size):
    with pytest.raises(pm.PyroMacroError, match="size"):
        pm.grid("values", size)


@pytest.mark.parametrize("size", [3, np.int64(3), torch.tensor(3), len("abc")])
def test_sizes(size):
    with pm.grid("values", size, dim=-1):
        assert pyro.sample("x", dist.Normal(torch.zeros(3), 1.0)).shape == (3,)


def test_it_cannot_be_iterated_over():
    with pytest.raises(pm.PyroMacroError, match="with pm.grid"):
        for _ in pm.grid("values", 3):
            pass


def test_shapes_that_do_not_fit_are_refused():
    """As by a plate."""
    with pytest.raises(ValueError, match="values"):
        drawn(lambda: dist.Normal(torch.zeros(4, 1), 1.0))
    natural = pm.macro_do(shop, {PAIR: pm.Natural(torch.zeros(4, 1))})
    with pytest.raises((ValueError, pm.PyroMacroError)):
        inside(natural)()
    natural = pm.macro_do(shop, {PAIR: pm.Natural(AT)})
    with pytest.raises(pm.PyroMacroError):
        natural()


def test_the_same_dimension_twice_is_refused():
    with pytest.raises(ValueError):
        with pm.grid("values", 3, dim=-1), pyro.plate("draws", 3, dim=-1):
            pass
