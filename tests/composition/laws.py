# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Programs with micro sites of each kind of law, and what they become, by hand.

Each has two parts, ``x1`` and ``x2``, a site ``w`` beside them, and an effect ``y``. By
hand the micro state is one site ``sales__micro`` with a density written out.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution
from pyro.infer import TraceEnum_ELBO
from torch.distributions import constraints

import pyro_macro as pm

from .models import SALES, under

LARGEST = pm.MacroVariable("sales", micro=["x1", "x2"], aggregation=pm.Max())


class ByHand(TorchDistribution):
    """A law of two elements by its log density and how it is drawn."""

    arg_constraints: dict = {}
    support = constraints.real_vector

    def __init__(self, log_density, draw, batch_shape=()):
        self.log_density, self.draw = log_density, draw
        super().__init__(torch.Size(batch_shape), torch.Size([2]), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return ByHand(self.log_density, self.draw, batch_shape)

    def sample(self, sample_shape=()):
        return self.draw(torch.Size(sample_shape) + self.batch_shape)

    def log_prob(self, value):
        density = self.log_density(value)
        return density.expand(torch.broadcast_shapes(density.shape, self.batch_shape))


@dataclass(frozen=True, eq=False)
class Case:
    """A kind of law.

    :ivar parts: draws the two parts, given the cause.
    :ivar realization: what is done to them.
    :ivar log_density: of the micro state by hand, given the cause.
    :ivar draw: draws it, given a shape and the cause.
    :ivar cause: whether the program has the site ``c``.
    :ivar off: a state that the supports allow, with another macro value.
    :ivar why: why there are no coordinates for NUTS and autoguides, in words.
    """

    name: str
    parts: Callable[[Any], tuple]
    realization: Any
    log_density: Callable[[Any, Any], Any]
    draw: Callable[[Any, Any], Any]
    macro: pm.MacroVariable = SALES
    cause: bool = False
    why: str = ""
    value: float = 0.0
    off: tuple = (1.0, 1.0)

    @property
    def interventions(self):
        return {self.macro: self.realization}

    @property
    def is_discrete(self):
        return "continuous coordinates" in self.why

    def held(self, *names):
        """The same with more sites in ``given``, where it has a ``given``."""
        realization = type(self.realization)(self.value, given=[*names])
        return {self.macro: realization}

    def total(self, x):
        return x.amax(-1) if self.macro is LARGEST else x.sum(-1)

    def model(self, y=None):
        c = pyro.sample("c", dist.Bernoulli(0.4)) if self.cause else None
        x1, x2 = self.parts(c)
        return self._after(c, x1, x2, y)

    def by_hand(self, y=None):
        c = pyro.sample("c", dist.Bernoulli(0.4)) if self.cause else None
        law = ByHand(
            lambda x: self.log_density(x, c), lambda shape: self.draw(shape, c)
        )
        x = pyro.sample("sales__micro", law)
        x1 = pyro.deterministic("x1", x[..., 0])
        x2 = pyro.deterministic("x2", x[..., 1])
        return self._after(c, x1, x2, y)

    def _after(self, c, x1, x2, y):
        w = pyro.sample("w", dist.Normal(1.0, 3.0))
        mean = x1 + 3 * x2 + w + (0.0 if c is None else 5 * c)
        return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    def __repr__(self):
        return self.name


def first(x):
    return x[..., 0]


def pair(x1, total):
    return torch.stack([x1, total - x1], -1)


# Gamma sites of one rate: a Dirichlet, scaled


def gamma_parts(c):
    x1 = pyro.sample("x1", dist.Gamma(2.0, 3.0))
    return x1, pyro.sample("x2", dist.Gamma(1.5, 3.0))


def shares():
    return dist.Dirichlet(torch.tensor([2.0, 1.5]))


GAMMA = Case(
    "gamma",
    gamma_parts,
    pm.Natural(4.0),
    lambda x, c: shares().log_prob(x / 4) - torch.tensor(4.0).log(),
    lambda shape, c: 4 * shares().sample(shape),
    value=4.0,
)


# Poisson sites: a multinomial


def poisson_parts(c):
    x1 = pyro.sample("x1", dist.Poisson(2.0))
    return x1, pyro.sample("x2", dist.Poisson(3.0))


def splits():
    return dist.Multinomial(5, torch.tensor([0.4, 0.6]))


POISSON = Case(
    "Poisson",
    poisson_parts,
    pm.Natural(5.0),
    lambda x, c: splits().log_prob(x),
    lambda shape, c: splits().sample(shape),
    why="counts has no continuous coordinates",
    value=5.0,
)


# Finite sites with a cause in common, summed out or given


P1, P2 = [0.2, 0.7], [0.3, 0.6]


def finite_parts(c):
    x1 = pyro.sample("x1", dist.Bernoulli(torch.tensor(P1)[c.long()]))
    return x1, pyro.sample("x2", dist.Binomial(2, torch.tensor(P2)[c.long()]))


def chance_of_one(c=None, prior=(0.6, 0.4)):
    """``P(x1 = 1 | x1 + x2 = 2)``, and ``c``: the states are (0, 2) and (1, 1)."""
    p1, p2 = torch.tensor(P1), torch.tensor(P2)
    states = torch.stack([(1 - p1) * p2**2, p1 * 2 * p2 * (1 - p2)])
    both = states @ torch.tensor(prior) if c is None else states[:, c.long()]
    return both[1] / both.sum(0)


FINITE = Case(
    "finite",
    finite_parts,
    pm.Natural(2.0),
    lambda x, c: dist.Bernoulli(chance_of_one()).log_prob(first(x)),
    lambda shape, c: pair(dist.Bernoulli(chance_of_one()).sample(shape), 2.0),
    cause=True,
    why="finite support has no continuous coordinates",
    value=2.0,
    off=(0.0, 1.0),
)
GIVEN = Case(
    "finite, given the cause",
    finite_parts,
    pm.Natural(2.0, given=["c"]),
    lambda x, c: dist.Bernoulli(chance_of_one(c)).log_prob(first(x)),
    lambda shape, c: pair(torch.bernoulli(chance_of_one(c).expand(shape)), 2.0),
    cause=True,
    why="finite support has no continuous coordinates",
    value=2.0,
    off=(0.0, 1.0),
)


# The largest of two sites


def extreme_parts(c):
    x1 = pyro.sample("x1", dist.Exponential(1.0))
    return x1, pyro.sample("x2", dist.Uniform(0.0, 4.0))


def extreme_density(x, c):
    """``f1(x1) f2(x2) / (f1(2) F2(2) + F1(2) f2(2))`` where one of the two is 2."""
    f = torch.exp(-x[..., 0]) * 0.25
    total = (
        torch.exp(torch.tensor(-2.0)) * 0.5 + (1 - torch.exp(torch.tensor(-2.0))) / 4
    )
    inside = (x.amax(-1) == 2) & (x.amin(-1) > 0)
    return torch.where(inside, f, 0.0).log() - total.log()


def extreme_draw(shape, c):
    e = torch.exp(torch.tensor(-2.0))
    is_first = torch.rand(shape) < 0.5 * e / (0.5 * e + 0.25 * (1 - e))
    u = torch.rand(shape)
    x1 = torch.where(is_first, torch.tensor(2.0), -torch.log1p(-u * (1 - e)))
    return torch.stack([x1, torch.where(is_first, 2 * u, torch.tensor(2.0))], -1)


EXTREME = Case(
    "extreme",
    extreme_parts,
    pm.Natural(2.0),
    extreme_density,
    extreme_draw,
    macro=LARGEST,
    why="mixed.*no coordinates",
    value=2.0,
)


# Uniform on what the supports leave


def bounded_parts(c):
    x1 = pyro.sample("x1", dist.Uniform(0.0, 2.0))
    return x1, pyro.sample("x2", dist.Uniform(1.0, 5.0))


def segment():
    return dist.Uniform(0.0, 2.0, validate_args=False)


POLYTOPE = Case(
    "polytope",
    bounded_parts,
    pm.MaxEntropy(4.0),
    lambda x, c: segment().log_prob(first(x)),
    lambda shape, c: pair(segment().sample(shape), 4.0),
    value=4.0,
    off=(1.0, 2.0),
)


# Draws by NUTS: no density


def skewed_parts(c):
    x1 = pyro.sample("x1", dist.LogNormal(0.0, 0.5))
    return x1, pyro.sample("x2", dist.LogNormal(0.5, 0.7))


CHAINS = pm.Chains(num_samples=60, warmup_steps=40, num_chains=1, progress=False)
SAMPLED = Case(
    "sampled",
    skewed_parts,
    pm.Natural(4.0, sampler=CHAINS),
    lambda x, c: torch.zeros(x.shape[:-1]),
    lambda shape, c: pair(torch.rand(shape) * 4, 4.0),
    why="known by draws",
    value=4.0,
)

EXACT = [GAMMA, POISSON, FINITE, GIVEN, EXTREME, POLYTOPE]
CASES = [*EXACT, SAMPLED]


# Discrete micro states, summed out by hand


STATES = {
    POISSON: [[float(i), 5.0 - i] for i in range(6)],
    FINITE: [[0.0, 2.0], [1.0, 1.0]],
    GIVEN: [[0.0, 2.0], [1.0, 1.0]],
}


def elbo(nesting=0):
    return TraceEnum_ELBO(max_plate_nesting=nesting, strict_enumeration_warning=False)


def log_joint(case, x, c, y, w=1.0):
    """By hand: ``log P(c, x, y | w)``, without the density of ``w``."""
    x = torch.tensor(x)
    mean = x[0] + 3 * x[1] + w + (5 * c if case.cause else 0.0)
    prior = torch.tensor(0.4 if c else 0.6).log() if case.cause else 0.0
    own = case.log_density(x, torch.tensor(c))
    return prior + own + dist.Normal(mean, 0.5).log_prob(y)


def evidence(case, y, w=1.0):
    causes = (0, 1) if case.cause else (0,)
    rows = itertools.product(STATES[case], causes)
    return torch.stack([log_joint(case, x, c, y, w) for x, c in rows]).logsumexp(0)


def w_guide(*args):
    pyro.sample("w", dist.Delta(torch.tensor(1.0)))


def log_w():
    return dist.Normal(1.0, 3.0).log_prob(torch.tensor(1.0))


# Forms of the handler


class Under:
    """A case under ``macro_do`` in one of its three forms."""

    def __init__(self, case, form):
        self.case, self.form = case, form

    def __repr__(self):
        return f"{self.case}-{self.form}"

    def do(self, program, interventions=None):
        interventions = interventions or self.case.interventions
        return under(self.form, pm.macro_do, program, interventions)

    @property
    def intervened(self):
        return self.do(self.case.model)


FORMS = ["wrapper", "decorator", "context"]
# A context cannot sum a cause out that it has seen drawn
UNDERS = [
    Under(case, form)
    for case in EXACT
    for form in FORMS
    if not (case is FINITE and form == "context")
]


def every_law(test):
    """Runs a test for each law and each form of the handler."""
    return pytest.mark.parametrize("law", UNDERS, ids=repr)(test)
