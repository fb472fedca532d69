# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""How often the Monte Carlo verdict is wrong, and how often it sees what is there.

Gamma sites of one rate given their sum are a scaled Dirichlet. Stated as ``Explicit``
it is the natural law, but not known to be, so that draws decide: whatever they call
inducing is a false alarm. Moved along the fibre it is confounded, by a known amount.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyro_macro as pm

SALES = pm.MacroVariable("sales", micro=["x1", "x2"])
SHAPES = torch.tensor([4.0, 6.0], dtype=torch.float64)
TOTAL = 10.0
SEEDS = 200
LEVEL = 1e-3  # of each test here

# Of revenue = x1 + 3 x2 + noise, given the total: x1 = TOTAL * Beta(4, 6)
SPREAD = (4 * TOTAL**2 * stats.beta(4, 6).var() + 1) ** 0.5


def shop():
    x1 = pyro.sample("x1", dist.Gamma(SHAPES[0], 1.0))
    x2 = pyro.sample("x2", dist.Gamma(SHAPES[1], 1.0))
    pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))


def shop_with_idle_cause():
    """A site that is connected with everything and moves nothing."""
    z = pyro.sample("z", dist.Exponential(1.0))
    x1 = pyro.sample("x1", dist.Gamma(SHAPES[0] + 0 * z, 1.0))
    x2 = pyro.sample("x2", dist.Gamma(SHAPES[1] + 0 * z, 1.0))
    pyro.sample("revenue", dist.Normal(x1 + 3 * x2 + 0 * z, 1.0))


def counts():
    x1 = pyro.sample("x1", dist.Poisson(2.0))
    x2 = pyro.sample("x2", dist.Poisson(3.0))
    pyro.sample("revenue", dist.Poisson(1 + x1 + 3 * x2))


def split(size):
    """The natural law, then moved so that revenue moves by ``size`` deviations."""
    step = torch.tensor([-0.5, 0.5], dtype=torch.float64) * size * SPREAD

    def law(total):
        base = dist.Dirichlet(SHAPES).expand(total.shape)
        loc = step.expand(*total.shape, 2)
        moved = dist.transforms.AffineTransform(loc, total.unsqueeze(-1), event_dim=1)
        return dist.TransformedDistribution(base, [moved])

    return lambda value: pm.Explicit(value, law)


def thinned(value):
    def law(total):
        p = torch.tensor([0.4, 0.6], dtype=torch.float64)
        first = dist.Binomial(total, p[0]).expand(total.shape)
        return _Pair(first, total)

    return pm.Explicit(value, law)


class _Pair(dist.TorchDistribution):
    """A count and the rest of a total."""

    arg_constraints = {}
    support = dist.constraints.independent(dist.constraints.nonnegative_integer, 1)

    def __init__(self, first, total):
        self.first, self.total = first, total
        super().__init__(first.batch_shape, torch.Size([2]), validate_args=False)

    def expand(self, shape, _instance=None):
        return _Pair(self.first.expand(shape), self.total.expand(shape))

    def sample(self, sample_shape=()):
        drawn = self.first.sample(sample_shape)
        return torch.stack([drawn, self.total - drawn], -1)

    def log_prob(self, value):
        return self.first.log_prob(value[..., 0])


def p_values(model, realization, num_samples, at=(TOTAL,), seeds=SEEDS):
    """The smallest of each report: they are for all macro values together."""
    found = []
    for i in range(seeds):
        report = pm.confounding(
            model,
            SALES,
            "revenue",
            realization,
            at=list(at),
            num_samples=num_samples,
            seed=i,
            progress=False,
        )
        assert report.method.startswith("Monte Carlo")
        found.append(report.p_value.min())
        expected = found[-1] <= 0.01
        assert (report.verdict == "inducing") == bool(expected)
    return torch.stack(found)


def told(what, p):
    rates = ", ".join(f"{(p <= a).double().mean():.3f} at {a}" for a in (0.05, 0.01))
    print(f"\n{what}: {rates}")


def check_level(p):
    """Rejections at the usual levels are binomial."""
    for level in (0.05, 0.01):
        rejected = int((p <= level).sum())
        law = stats.binom(len(p), level)
        assert law.ppf(LEVEL) <= rejected <= law.ppf(1 - LEVEL), (level, rejected)


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [500, 2000])
def test_false_alarms(num_samples):
    p = p_values(shop, split(0.0), num_samples)
    told(f"false alarms, N = {num_samples}", p)
    check_level(p)


@pytest.mark.slow
def test_false_alarms_with_rejection_sampling():
    """The observational law is drawn by rejection where something acts on both."""
    p = p_values(shop_with_idle_cause, split(0.0), 2000)
    told("false alarms of the conditional sampler, N = 2000", p)
    check_level(p)


@pytest.mark.slow
def test_false_alarms_at_several_macro_values():
    """The level is for all macro values together."""
    p = p_values(shop, split(0.0), 300, at=(5.0, 10.0, 15.0))
    told("false alarms, three macro values, N = 300", p)
    check_level(p)


@pytest.mark.slow
def test_false_alarms_with_ties():
    """Effects that are counts have many ties."""
    p = p_values(counts, thinned, 500, at=(5.0,))
    told("false alarms, counts, N = 500", p)
    check_level(p)


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [500, 2000])
def test_power(num_samples):
    """More is seen of what is larger, and nearly all of what is said to be seen."""
    power = {}
    for size in (0.1, 0.2, 0.3):
        p = p_values(shop, split(size), num_samples)
        told(f"power at {size} deviations, N = {num_samples}", p)
        power[size] = float((p <= 0.01).double().mean())
    assert power[0.1] <= power[0.2] + 0.05 and power[0.2] <= power[0.3] + 0.05
    # For normal laws and the mean, a test of this level would see this much
    for size, seen in power.items():
        limit = stats.norm.isf(0.005)
        best = stats.norm.sf(limit - size * (num_samples / 2) ** 0.5)
        assert seen > best - 0.25, (size, seen, best)


@pytest.mark.slow
def test_detectable_shift_is_seen_in_four_of_five_cases():
    report = pm.confounding(
        shop, SALES, "revenue", split(0.0), at=[TOTAL], num_samples=500, progress=False
    )
    size = float(report.detectable) / SPREAD
    p = p_values(shop, split(size), 500, seeds=100)
    told(f"power at the detectable shift, {size:.3f} deviations, N = 500", p)
    assert (p <= 0.01).double().mean() > 0.8 - 3.1 * 0.04
