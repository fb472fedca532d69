# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Programs with a plate of products, of a kind that is up to the caller.

Each comes with the mean and the covariance of its micro state, ancestors integrated
out, written by hand as a full vector and a full matrix.
"""

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_macro as pm

SIZE = 11  # neither by 2 nor by 4


def numbers(index: int, *shape: int) -> Tensor:
    """Fixed numbers between 1 and 2."""
    generator = torch.Generator().manual_seed(index)
    return 1 + torch.rand(shape, generator=generator, dtype=torch.float64)


MEAN, SCALE, PRICE, LOAD = (numbers(i, SIZE) for i in range(4))
WEIGHTS = numbers(4, SIZE) - 1.5
TABLE = numbers(5, SIZE, 3)
EYE = torch.eye(SIZE, dtype=torch.float64)


def sharded(dim: int | None = None) -> Any:
    return pm.sharded_plate("products", SIZE, dim=dim)


def plain(dim: int | None = None) -> Any:
    return pyro.plate("products", SIZE, dim=dim)


def indices(plate: Any, given: Any) -> Any:
    return slice(None) if given is None else given


@dataclass(frozen=True, eq=False)
class Case:
    """A program and what is known of it.

    :ivar model: from a plate factory to the values of the micro sites.
    :ivar macro: the macro-variable.
    :ivar weights: of the elements of the full micro state.
    :ivar loc: their mean.
    :ivar covariance: theirs.
    :ivar given: what is held.
    """

    model: Any
    macro: pm.MacroVariable
    weights: Tensor
    loc: Tensor
    covariance: Tensor
    given: tuple[str, ...] = ()


ONES = torch.ones(SIZE, dtype=torch.float64)
SALES = pm.MacroVariable("sales", micro="x", over="products")


def independent(plate: Any) -> None:
    with plate() as mine:
        x = pyro.sample("x", dist.Normal(MEAN[mine], SCALE[mine]))
        pyro.sample("y", dist.Normal(PRICE[mine] * x, 1.0))


def confounded(plate: Any) -> None:
    """Each product with a cause of its own, which also acts on what follows."""
    with plate() as mine:
        z = pyro.sample("z", dist.Normal(0.0, LOAD[mine]))
        x = pyro.sample("x", dist.Normal(MEAN[mine] + 0.5 * z, SCALE[mine]))
        pyro.sample("y", dist.Normal(PRICE[mine] * x + z, 1.0))


def shocked(plate: Any) -> None:
    """Two causes of all products, and one of each."""
    shock = pyro.sample("shock", dist.Normal(0.0, 0.7))
    trend = pyro.sample("trend", dist.Normal(shock, 0.3))
    with plate() as mine:
        z = pyro.sample("z", dist.Normal(0.0, LOAD[mine]))
        loc = MEAN[mine] + z + shock * LOAD[mine] + trend
        x = pyro.sample("x", dist.Normal(loc, SCALE[mine]))
        pyro.sample("y", dist.Normal(PRICE[mine] * x + shock, 1.0))


SHOCKED = (
    torch.diag(SCALE**2 + LOAD**2)
    + torch.outer(LOAD + 1, LOAD + 1) * 0.49
    + torch.ones(SIZE, SIZE, dtype=torch.float64) * 0.09
)


def told(plate: Any) -> None:
    """What is seen above tells of the shock that acts on the products."""
    shock = pyro.sample("shock", dist.Normal(0.0, 0.7))
    news = pyro.sample("news", dist.Normal(2 * shock, 0.5), obs=torch.tensor(1.0))
    with plate() as mine:
        loc = MEAN[mine] + shock * LOAD[mine] + news
        pyro.sample("x", dist.Normal(loc, SCALE[mine]))


def of_told() -> tuple[Tensor, Tensor]:
    variance = 1 / (1 / 0.49 + 4 / 0.25)
    mean = variance * 2 * 1.0 / 0.25
    loc = MEAN + mean * LOAD + 1.0
    return loc, torch.diag(SCALE**2) + variance * torch.outer(LOAD, LOAD)


def vectors(plate: Any) -> None:
    """Three sizes of each product, with a cause of their own and dependent noise."""
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.2, 0.3, 1.0]])
    with plate() as mine:
        z = pyro.sample("z", dist.Normal(0.0, LOAD[mine]))
        loc = TABLE[mine] + z.unsqueeze(-1)
        pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=factor.to(loc)))


def of_vectors() -> Tensor:
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.2, 0.3, 1.0]]).double()
    blocks = factor @ factor.mT + LOAD[:, None, None] ** 2
    return torch.block_diag(*blocks)


def pairs(plate: Any) -> None:
    """Two sites of each product, with a cause in common."""
    with plate() as mine:
        z = pyro.sample("z", dist.Normal(1.0, LOAD[mine]))
        pyro.sample("a", dist.Normal(MEAN[mine] + z, SCALE[mine]))
        pyro.sample("b", dist.Normal(2 * z, PRICE[mine]))


def of_pairs() -> tuple[Tensor, Tensor]:
    cause = torch.cat([torch.diag(LOAD), 2 * torch.diag(LOAD)])
    own = torch.diag(torch.cat([SCALE, PRICE]) ** 2)
    return torch.cat([MEAN + 1, 2 * ONES]), own + cause @ cause.mT


def grid(plate: Any) -> None:
    """Products in three stores; a plate inside, with a cause of each product."""
    with plate(-2) as mine:
        z = pyro.sample("z", dist.Normal(0.0, LOAD[mine].unsqueeze(-1)))
        with pyro.plate("stores", 3, dim=-1):
            pyro.sample("x", dist.Normal(TABLE[mine] + z, SCALE[mine].unsqueeze(-1)))


def of_grid() -> Tensor:
    blocks = SCALE[:, None, None] ** 2 * torch.eye(3, dtype=torch.float64)
    return torch.block_diag(*(blocks + LOAD[:, None, None] ** 2))


CASES = {
    "independent": Case(independent, SALES, ONES, MEAN, torch.diag(SCALE**2)),
    "confounded": Case(
        confounded, SALES, ONES, MEAN, torch.diag(SCALE**2 + 0.25 * LOAD**2)
    ),
    "shocked": Case(shocked, SALES, ONES, MEAN, SHOCKED),
    "mean": Case(
        shocked,
        pm.MacroVariable("sales", "x", "products", pm.Mean()),
        ONES / SIZE,
        MEAN,
        SHOCKED,
    ),
    "linear": Case(
        shocked,
        pm.MacroVariable("sales", "x", "products", pm.Linear(WEIGHTS)),
        WEIGHTS,
        MEAN,
        SHOCKED,
    ),
    "told": Case(told, SALES, ONES, *of_told()),
    "vectors": Case(
        vectors, SALES, numbers(0, 3 * SIZE) ** 0, TABLE.flatten(), of_vectors()
    ),
    "pairs": Case(
        pairs,
        pm.MacroVariable("sales", ["a", "b"], "products"),
        torch.cat([ONES, ONES]),
        *of_pairs(),
    ),
    "grid": Case(
        grid,
        pm.MacroVariable("sales", "x", ["products", "stores"]),
        numbers(0, 3 * SIZE) ** 0,
        TABLE.flatten(),
        of_grid(),
    ),
}


def amount(case: Case) -> Tensor:
    """A macro value away from the mean."""
    return case.weights @ case.loc + 0.5


def pieces(plate: Any) -> None:
    """One site of each of many families."""
    with plate() as mine:
        rate = LOAD[mine]
        pyro.sample("normal", dist.Normal(MEAN[mine], 2.0))
        pyro.sample("poisson", dist.Poisson(3 * rate))
        pyro.sample("gamma", dist.Gamma(rate, 2.0))
        pyro.sample("beta", dist.Beta(rate, 2 * rate))
        pyro.sample("bernoulli", dist.Bernoulli(rate - 1))
        pyro.sample("categorical", dist.Categorical(logits=TABLE[mine]))
        pyro.sample("lognormal", dist.LogNormal(rate, 0.3))
        pyro.sample("student", dist.StudentT(5.0, rate, 1.0))
        pyro.sample("dirichlet", dist.Dirichlet(TABLE[mine]))
        pyro.sample("vector", dist.Normal(TABLE[mine], 1.0).to_event(1))
        pyro.sample("binomial", dist.Binomial(5, rate - 1))
        pyro.sample("masked", dist.Exponential(rate).mask(rate > 1.5))
        square = 2 * torch.eye(3, dtype=rate.dtype)
        pyro.sample("joint", dist.MultivariateNormal(TABLE[mine], square))
        with pyro.plate("inner", 2, dim=-2):
            pyro.sample("inside", dist.Gamma(rate, 1.0))
