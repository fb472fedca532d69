# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Models with parameters on a device, and interventions on them.

A case is a function from a place (a device and a dtype, which makes tensors there) to a
model and interventions.
"""

import pyro
import pyro.distributions as dist

import pyro_macro as pm

VECTOR = pm.MacroVariable("total", "x")
PLATE = pm.MacroVariable("total", "x", over="k")
PAIR = pm.MacroVariable("total", ["x1", "x2"])


def over(*names, **kwargs):
    return pm.MacroVariable("total", list(names), **kwargs)


def vector(t):
    """Independent Gaussian elements of one site."""
    mean, spread = t(1.0, 1.5, 2.0, 3.0), t(1.0, 0.5, 2.0, 1.5)
    prices, one = t(0.5, 1.0, -1.0, 2.0), t(1.0)

    def model():
        x = pyro.sample("x", dist.Normal(mean, spread).to_event(1))
        return pyro.sample("y", dist.Normal(x @ prices, one))

    return model


def plate(t):
    """The same in a plate."""
    mean, spread = t(1.0, 1.5, 2.0, 3.0), t(1.0, 0.5, 2.0, 1.5)
    prices, one = t(0.5, 1.0, -1.0, 2.0), t(1.0)

    def model():
        with pyro.plate("k", 4, dim=-1):
            x = pyro.sample("x", dist.Normal(mean, spread))
        return pyro.sample("y", dist.Normal((x * prices).sum(-1, keepdim=True), one))

    return model


def shop(t):
    ten, twenty, two, one = t(10.0), t(20.0), t(2.0), t(1.0)

    def model():
        x1 = pyro.sample("x1", dist.Normal(ten, two))
        x2 = pyro.sample("x2", dist.Normal(twenty, one))
        return pyro.sample("y", dist.Normal(x1 + 3 * x2, one))

    return model


def confounded(t):
    """With a cause that the elements of the micro state and the effect share."""
    loadings, ones, prices = t(0.5, 1.0, 1.5), t(1.0, 2.0, 1.0), t(1.0, -1.0, 2.0)
    zero, one = t(0.0), t(1.0)

    def model():
        z = pyro.sample("z", dist.Normal(zero, one))
        x = pyro.sample("x", dist.Normal(z.unsqueeze(-1) * loadings, ones).to_event(1))
        return pyro.sample("y", dist.Normal(x @ prices + z, one))

    return model


def hierarchy(t):
    """Slots of a plate that share a parent, itself in a plate that stays."""
    zero, one = t(0.0), t(1.0)

    def model():
        top = pyro.sample("top", dist.Normal(zero, one))
        with pyro.plate("g", 3, dim=-1):
            mean = pyro.sample("mean", dist.Normal(top, one))
            with pyro.plate("k", 4, dim=-2):
                x = pyro.sample("x", dist.Normal(mean, one))
        return x.sum(-2)

    return model


def correlated(t):
    mean, factor = t(1.0, 2.0, 3.0), t([1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.2, 0.3, 1])
    one = t(1.0)

    def model():
        x = pyro.sample("x", dist.MultivariateNormal(mean, scale_tril=factor))
        return pyro.sample("y", dist.Normal(x[..., 0], one))

    return model


def low_rank(t):
    mean, factor, own = t(1.0, 2.0, 3.0), t(1.0, 1.0, 2.0).unsqueeze(-1), t(1.0, 2.0, 3)

    def model():
        return pyro.sample("x", dist.LowRankMultivariateNormal(mean, factor, own))

    return model


def noisy(t):
    """An effect that depends on the micro state and on the noise behind it."""
    zero, one = t(0.0), t(1.0)

    def model():
        z1 = pyro.sample("z1", dist.Normal(zero, one))
        z2 = pyro.sample("z2", dist.Normal(zero, one))
        x1, x2 = pyro.deterministic("x1", z1), pyro.deterministic("x2", z2)
        pyro.deterministic("y", x1 + 3 * x2 + (z1 + z2) / 2)

    return model


def coins(t):
    """Finite sites with a finite common cause."""
    half, first, second, effect = (
        t(0.5),
        t(0.3, 0.7),
        t(0.5, 0.2),
        t(0.1, 0.3, 0.2, 0.2),
    )

    def model():
        z = pyro.sample("z", dist.Bernoulli(half))
        x1 = pyro.sample("x1", dist.Bernoulli(first[0] + first[1] * z))
        x2 = pyro.sample("x2", dist.Bernoulli(second[0] - second[1] * z))
        p = effect[0] + effect[1] * x1 + effect[2] * x2 + effect[3] * z
        return pyro.sample("y", dist.Bernoulli(p))

    return model


def mixed(t):
    """Gaussian sites with a finite common cause."""
    half, one = t(0.5), t(1.0)

    def model():
        z = pyro.sample("z", dist.Bernoulli(half))
        x1 = pyro.sample("x1", dist.Normal(z, one))
        pyro.sample("x2", dist.Normal(2 * z, one))
        pyro.sample("y", dist.Normal(x1 + z, one))

    return model


def sites(*fns):
    """Independent sites ``x1``, ``x2``, ... of any kind, and their sum."""

    def model():
        values = [pyro.sample(f"x{i}", fn) for i, fn in enumerate(fns, 1)]
        return pyro.deterministic("y", sum(values))

    return model


def copies(fn, count=4):
    """One site in a plate."""

    def model():
        with pyro.plate("k", count, dim=-1):
            x = pyro.sample("x", fn)
        return pyro.deterministic("y", x.sum(-1, keepdim=True), event_dim=0)

    return model


FAMILIES = {
    "poisson": lambda t: [dist.Poisson(t(r)) for r in (1.0, 2.5, 0.4)],
    "gamma": lambda t: [dist.Gamma(t(a), t(2.0)) for a in (1.0, 2.5, 0.4)],
    "exponential": lambda t: [dist.Exponential(t(2.0)) for _ in range(3)],
    "chi-squared": lambda t: [dist.Chi2(t(a)) for a in (1.0, 2.5, 4.0)],
    "binomial": lambda t: [
        dist.Binomial(4, t(0.3)),
        dist.Binomial(2, t(0.3)),
        dist.Bernoulli(t(0.3)),
    ],
    "binomial, counts on the device": lambda t: [
        dist.Binomial(t(4.0), t(0.3)),
        dist.Binomial(t(2.0), t(0.3)),
    ],
    "Bernoulli": lambda t: [dist.Bernoulli(t(p)) for p in (0.2, 0.4, 0.7)],
    "negative binomial": lambda t: [
        dist.NegativeBinomial(t(3.0), t(0.35)),
        dist.NegativeBinomial(t(0.7), t(0.35)),
        dist.Geometric(t(0.65)),
    ],
    "counts of several families": lambda t: [
        dist.NegativeBinomial(t(3.0), t(0.35)),
        dist.Poisson(t(0.65)),
    ],
    "categorical": lambda t: [
        dist.Categorical(t(0.2, 0.3, 0.5)),
        dist.Categorical(t(0.1, 0.3, 0.6)),
    ],
}


def family(name):
    def case(t):
        fns = FAMILIES[name](t)
        macro = over(*(f"x{i}" for i in range(1, len(fns) + 1)))
        return sites(*fns), {macro: pm.Natural(2.0)}

    return case


def family_in_plate(name):
    def case(t):
        return copies(FAMILIES[name](t)[0].expand([4])), {PLATE: pm.Natural(3.0)}

    return case


def finite(name, aggregation, value=1.0):
    def case(t):
        fns = FAMILIES[name](t)[:2]
        return sites(*fns), {
            over("x1", "x2", aggregation=aggregation): pm.Natural(value)
        }

    return case


def of(model, macro, realization):
    """:param realization: from the place."""
    return lambda t: (model(t), {macro: realization(t)})


def split(t):
    """An explicit law of two parts."""

    def law(value):
        shares = dist.Dirichlet(t(1.0, 2.0))
        scale = dist.transforms.AffineTransform(0.0, value, event_dim=1)
        return dist.TransformedDistribution(shares, [scale])

    return law


def two_totals(t):
    zero, one = t(0.0), t(1.0)

    def model():
        x = [pyro.sample(f"x{i}", dist.Normal(zero, one)) for i in range(4)]
        return pyro.sample("y", dist.Normal(sum(x), one))

    first, second = (
        pm.MacroVariable("a", ["x0", "x1", "x2"]),
        pm.MacroVariable("b", ["x2", "x3"]),
    )
    return model, {first: pm.Natural(5.0), second: pm.Natural(1.0)}


def _weighted(weights):
    return over("x", aggregation=pm.Linear(weights))


XOR = pm.Coarsen({(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 0})
PARTS = [0.1, 0.2, 0.3, 0.4]
# Known by a point, or by a normal law, and by what needs no more than these
GAUSSIAN = {
    "natural": of(vector, VECTOR, lambda t: pm.Natural(5.0)),
    "natural, value on the device": of(vector, VECTOR, lambda t: pm.Natural(t(5.0))),
    "natural, weighted": of(
        vector, _weighted([1.0, 2.0, 3.0, 4.0]), lambda t: pm.Natural(5.0)
    ),
    "natural, two rows": of(
        vector,
        _weighted([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 0.0, 0.0]]),
        lambda t: pm.Natural(t(5.0, 2.0)),
    ),
    "natural, mean": of(
        vector, over("x", aggregation=pm.Mean()), lambda t: pm.Natural(2.0)
    ),
    "natural, plate": of(plate, PLATE, lambda t: pm.Natural(5.0)),
    "natural, sites": of(shop, PAIR, lambda t: pm.Natural(33.0)),
    "natural, confounded": of(confounded, VECTOR, lambda t: pm.Natural(5.0)),
    "natural, given": of(confounded, VECTOR, lambda t: pm.Natural(5.0, given="z")),
    "natural, hierarchy": of(hierarchy, PLATE, lambda t: pm.Natural(5.0)),
    "natural, correlated": of(correlated, VECTOR, lambda t: pm.Natural(5.0)),
    "natural, low rank": of(low_rank, VECTOR, lambda t: pm.Natural(5.0)),
    "natural, two totals": two_totals,
    "residual": of(vector, VECTOR, lambda t: pm.Residual(5.0, absorb=1)),
    "residual, plate": of(plate, PLATE, lambda t: pm.Residual(5.0, absorb=1)),
    "residual, sites": of(shop, PAIR, lambda t: pm.Residual(33.0, absorb="x2")),
    "residual, confounded": of(
        confounded, VECTOR, lambda t: pm.Residual(5.0, absorb=1)
    ),
    "allocate": of(vector, VECTOR, lambda t: pm.Allocate(5.0, PARTS)),
    "allocate, all on the device": of(
        vector, VECTOR, lambda t: pm.Allocate(t(5.0), t(*PARTS))
    ),
    "allocate, plate": of(plate, PLATE, lambda t: pm.Allocate(5.0, t(*PARTS))),
}
OTHERS = {
    "residual, other kinds": lambda t: (
        sites(dist.Gamma(t(1.0), t(2.0)), dist.Normal(t(1.0), t(2.0))),
        {PAIR: pm.Residual(5.0, absorb="x2")},
    ),
    "shift": of(vector, VECTOR, lambda t: pm.Shift(2.0)),
    "shift along": of(vector, VECTOR, lambda t: pm.Shift(2.0, along=PARTS)),
    "shift, confounded": of(confounded, VECTOR, lambda t: pm.Shift(t(2.0))),
    "shift, gamma": lambda t: (sites(*FAMILIES["gamma"](t)[:2]), {PAIR: pm.Shift(1.0)}),
    "proportional": of(vector, VECTOR, lambda t: pm.Proportional(5.0)),
    "explicit": of(shop, PAIR, lambda t: pm.Explicit(33.0, split(t))),
    "inhibiting": of(noisy, PAIR, lambda t: pm.Inhibiting(2.0, "y")),
    "inhibiting, levers": of(
        noisy, PAIR, lambda t: pm.Inhibiting(2.0, "y", levers=["x1", "x2"])
    ),
    "inhibiting, finite": of(coins, PAIR, lambda t: pm.Inhibiting(1.0, "y")),
    "even, finite": lambda t: (
        sites(*FAMILIES["categorical"](t)),
        {PAIR: pm.MaxEntropy(2.0)},
    ),
    "even, simplex": lambda t: (
        sites(*FAMILIES["gamma"](t)[:2]),
        {PAIR: pm.MaxEntropy(2.0)},
    ),
    "even, polytope": lambda t: (
        sites(dist.Uniform(t(0.0), t(1.0)), dist.Beta(t(1.0), t(2.0))),
        {PAIR: pm.MaxEntropy(0.7)},
    ),
    "even, reference": of(
        vector,
        VECTOR,
        lambda t: pm.MaxEntropy(
            2.0, reference=dist.Normal(t(1.0, 2.0, 3.0, 4.0), t(1.0)).to_event(1)
        ),
    ),
    **{f"natural, {name}": family(name) for name in FAMILIES},
    **{
        f"natural, {name} in a plate": family_in_plate(name)
        for name in ("poisson", "gamma", "binomial", "Bernoulli", "categorical")
    },
    "natural, count": finite("categorical", pm.Count(1)),
    "natural, coarsen": finite("Bernoulli", XOR),
    "natural, largest of finite": finite("categorical", pm.Max()),
    "natural, largest": lambda t: (
        sites(dist.Normal(t(1.0), t(1.0)), dist.Gamma(t(1.0), t(1.0))),
        {over("x1", "x2", aggregation=pm.Max()): pm.Natural(2.0)},
    ),
    "natural, smallest": lambda t: (
        sites(dist.Normal(t(1.0), t(1.0)), dist.Gamma(t(1.0), t(1.0))),
        {over("x1", "x2", aggregation=pm.Min()): pm.Natural(0.5)},
    ),
    "natural, finite confounder": of(coins, PAIR, lambda t: pm.Natural(1.0)),
    "natural, mixture": of(mixed, PAIR, lambda t: pm.Natural(1.0)),
}
CASES = GAUSSIAN | OTHERS


def shares(t):
    """Two sites whose law given their sum is in no table."""
    return sites(dist.Beta(t(2.0), t(3.0)), dist.Beta(t(1.0), t(3.0)))
