# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Distributions taken apart and made again: of the same tensors, and of wider ones."""

import itertools

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution

from pyro_macro.program.parts import Parts, parts

T = dist.transforms
SLOTS = 5


def t(*numbers):
    return torch.tensor(numbers)


def known():
    zero, one = torch.zeros, torch.ones
    lower = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    table = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])
    half = dist.Normal(t(0.0, 1.0), 2.0)
    shift = T.AffineTransform(t(1.0, 2.0), 3.0)
    return {
        "normal": dist.Normal(zero(3), 1.0),
        "scalar": dist.Normal(0.5, 2.0),
        "normal, expanded": dist.Normal(0.0, 1.0).expand([3]),
        "normal, twice": dist.Normal(zero(3), 1.0).expand([2, 3]).expand([4, 2, 3]),
        "normal, wrapped": ExpandedDistribution(dist.Normal(0.0, 1.0), (3,)),
        "normal, wrapped wider": ExpandedDistribution(dist.Normal(t(0.0), 1.0), (2, 3)),
        "event": dist.Normal(zero(2, 3), one(3)).to_event(1),
        "event, scale of each": dist.Normal(0.0, t(1.0, 2.0, 3.0)).to_event(1),
        "two event dimensions": dist.Normal(zero(2, 3), 1.0).to_event(2),
        "event, expanded before": dist.Normal(0.0, 1.0).expand([4]).to_event(1),
        "event, expanded after": dist.Normal(zero(4), 1.0).to_event(1).expand([3]),
        "event in a plate": dist.Normal(zero(3, 2), one(2)).to_event(1),
        "event of an event": dist.Normal(zero(3, 2), 1.0).to_event(1).to_event(1),
        "covariance": dist.MultivariateNormal(zero(2), lower @ lower.T),
        "precision": dist.MultivariateNormal(zero(2), precision_matrix=one(2).diag()),
        "triangle": dist.MultivariateNormal(zero(3, 2), scale_tril=lower),
        "triangle, expanded": dist.MultivariateNormal(zero(2), scale_tril=lower).expand(
            [3]
        ),
        "low rank": dist.LowRankMultivariateNormal(zero(3), one(3, 1), one(3)),
        "low rank, wide": dist.LowRankMultivariateNormal(zero(4, 3), one(3, 2), one(3)),
        "Bernoulli": dist.Bernoulli(0.3),
        "Bernoulli, logits": dist.Bernoulli(logits=t(0.3, -0.2)),
        "categories": dist.Categorical(t(0.2, 0.8)),
        "categories, wide": dist.Categorical(table),
        "categories, logits": dist.Categorical(logits=table),
        "categories, expanded": dist.Categorical(t(0.2, 0.8)).expand([3]),
        "binomial": dist.Binomial(3, 0.2),
        "binomial, counts": dist.Binomial(t(3.0, 4.0), logits=torch.tensor(0.2)),
        "multinomial": dist.Multinomial(4, t(0.2, 0.8)),
        "one-hot": dist.OneHotCategorical(t(0.2, 0.8)),
        "Poisson": dist.Poisson(t(1.0, 2.0)),
        "geometric": dist.Geometric(0.2),
        "negative binomial": dist.NegativeBinomial(3.0, 0.2),
        "negative binomial, logits": dist.NegativeBinomial(t(3.0), logits=t(0.2)),
        "gamma-Poisson": dist.GammaPoisson(2.0, 3.0),
        "gamma": dist.Gamma(t(1.0, 2.0), 1.0),
        "exponential": dist.Exponential(2.0),
        "beta": dist.Beta(t(1.0, 2.0), 2.0),
        "beta, event": dist.Beta(1.0, 2.0).expand([3]).to_event(1),
        "Dirichlet": dist.Dirichlet(one(3)),
        "Dirichlet, expanded": dist.Dirichlet(one(3)).expand([2]),
        "log-normal": dist.LogNormal(0.0, t(1.0, 2.0)),
        "log-normal, event": dist.LogNormal(zero(3), 1.0).to_event(1).expand([2]),
        "uniform": dist.Uniform(0.0, t(1.0, 2.0)),
        "Student": dist.StudentT(3.0, 0.0, 1.0),
        "Cauchy": dist.Cauchy(0.0, 1.0),
        "half-Cauchy": dist.HalfCauchy(t(1.0, 2.0)),
        "half-normal": dist.HalfNormal(1.0).expand([2, 3]).to_event(1),
        "Laplace": dist.Laplace(0.0, 1.0),
        "Gumbel": dist.Gumbel(0.0, 1.0),
        "Pareto": dist.Pareto(1.0, 2.0),
        "Weibull": dist.Weibull(1.0, 2.0),
        "chi-square": dist.Chi2(2.0),
        "inverse gamma": dist.InverseGamma(2.0, 1.0),
        "von Mises": dist.VonMises(0.0, 1.0),
        "logistic": dist.Logistic(0.0, t(1.0, 2.0)),
        "skew": dist.AsymmetricLaplace(0.0, 1.0, 2.0),
        "ordered": dist.OrderedLogistic(torch.tensor(0.3), t(0.0, 1.0)),
        "Cholesky": dist.LKJCholesky(3, 1.5),
        "certain": dist.Delta(t(1.0, 2.0)),
        "certain, event": dist.Delta(zero(3, 2), event_dim=1),
        "certain, density": dist.Delta(zero(3), log_density=one(3)),
        "masked": dist.Normal(zero(3), 1.0).mask(False),
        "masked each": dist.Normal(zero(3), 1.0).mask(
            torch.tensor([True, False, True])
        ),
        "masked event": dist.Normal(0.0, 1.0)
        .mask(torch.tensor([True, False]))
        .to_event(1),
        "masked, expanded": dist.Normal(0.0, 1.0)
        .expand([3])
        .mask(torch.tensor([True, False, True]))
        .expand([2, 3]),
        "transformed": dist.TransformedDistribution(
            half, [T.AffineTransform(2.0, 3.0), T.ExpTransform()]
        ),
        "shifted": dist.TransformedDistribution(half, [shift]),
        "transformed, event": dist.TransformedDistribution(
            half.to_event(1), [T.ExpTransform()]
        ),
        "transformed, expanded": dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), [T.ExpTransform()]
        ).expand([3]),
        "back and forth": dist.TransformedDistribution(
            half, [T.SigmoidTransform(), T.SigmoidTransform().inv]
        ),
    }


CASES = list(known())


def is_close(one, other):
    return one.shape == other.shape and torch.allclose(one, other, 1e-12, 1e-12)


def wider(tensor, event_dim, depth):
    """With another dimension in front of all of the batch."""
    batch = tensor.dim() - event_dim
    tensor = tensor.reshape((1,) * (depth - batch) + tuple(tensor.shape))
    return tensor.expand((SLOTS, *tensor.shape))


@pytest.mark.parametrize("case", CASES)
def test_the_same_tensors_make_the_same_distribution(case):
    fn = known()[case]
    found = parts(fn)
    assert isinstance(found, Parts)
    assert len(found.tensors) == len(found.event_dims)
    made = found.build(found.tensors)
    assert (made.batch_shape, made.event_shape) == (fn.batch_shape, fn.event_shape)
    torch.manual_seed(0)
    value = fn.sample()
    torch.manual_seed(0)
    assert torch.equal(value, made.sample())
    assert is_close(made.log_prob(value), fn.log_prob(value))
    assert made.support.check(value).all() or "masked" in case


@pytest.mark.parametrize("case", CASES)
def test_wider_tensors_make_a_wider_distribution(case):
    fn = known()[case]
    found = parts(fn)
    depth = len(fn.batch_shape)
    pairs = zip(found.tensors, found.event_dims, strict=True)
    made = found.build([wider(tensor, dim, depth) for tensor, dim in pairs])
    assert made.batch_shape == (SLOTS, *fn.batch_shape)
    assert made.event_shape == fn.event_shape
    torch.manual_seed(0)
    value = fn.sample()
    log_prob = made.log_prob(value)
    assert torch.allclose(log_prob, fn.log_prob(value).expand(log_prob.shape))
    assert made.sample().shape == (SLOTS, *fn.batch_shape, *fn.event_shape)


def test_kinds_are_those_of_how_it_is_made():
    """What is equal may be built for one another."""
    cases, again = known(), known()
    found = {case: parts(fn) for case, fn in cases.items()}
    groups = {}
    for case, fn in again.items():
        assert parts(fn).kind == found[case].kind
        groups.setdefault(found[case].kind, []).append(case)
    assert len(groups) > 30 and any(len(group) > 1 for group in groups.values())
    for group in groups.values():
        for case, other in itertools.product(group, group):
            fn, value = again[case], again[case].sample()
            made = found[other].build(found[case].tensors)
            assert made.event_shape == fn.event_shape
            assert is_close(made.log_prob(value), fn.log_prob(value))


def test_other_tensors_make_another_distribution():
    found = parts(dist.Normal(torch.zeros(3), 1.0).to_event(1))
    loc, scale = torch.arange(6.0).reshape(2, 3), torch.tensor([1.0, 2.0, 3.0])
    made = found.build([loc, scale])
    value = torch.ones(3)
    wanted = dist.Normal(loc, scale).log_prob(value).sum(-1)
    assert made.batch_shape == (2,) and torch.equal(made.log_prob(value), wanted)
    found = parts(dist.Categorical(logits=torch.zeros(3)))
    made = found.build([torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]])])
    assert made.probs.argmax(-1).tolist() == [2, 0]
    found = parts(dist.Categorical(torch.ones(3) / 3))
    made = found.build([torch.tensor([0.1, 0.2, 0.7])])
    assert made.log_prob(torch.tensor(2)).exp() == pytest.approx(0.7)
    shift = T.AffineTransform(torch.tensor(1.0), torch.tensor(2.0))
    found = parts(dist.TransformedDistribution(dist.Normal(0.0, 1.0), [shift]))
    tensors = [torch.tensor(x) for x in (0.0, 1.0, 5.0, 3.0)]
    assert len(found.tensors) == 4
    made, wanted = found.build(tensors), dist.Normal(5.0, 3.0)
    x = torch.tensor(4.0)
    assert torch.allclose(made.log_prob(x), wanted.log_prob(x))


def test_parameters_are_found_where_they_were_given():
    """Probabilities are not logits, nor the other way round."""
    probs = torch.tensor([0.2, 0.8])
    assert torch.equal(parts(dist.Categorical(probs)).tensors[0], probs)
    logits = torch.tensor([0.5, 2.0])
    found = parts(dist.Bernoulli(logits=logits))
    assert torch.equal(found.tensors[0], logits)
    fn = dist.Bernoulli(logits=logits)
    assert fn.probs is not None  # asked for, and remembered
    assert torch.equal(parts(fn).build([-logits]).logits, -logits)
    fn = dist.Bernoulli(probs)
    assert fn.logits is not None
    changed = parts(fn).build([t.flip(0) for t in parts(fn).tensors])
    assert torch.allclose(changed.probs, probs.flip(0))


def test_gradients_reach_the_tensors():
    for case, fn in known().items():
        found = parts(fn)
        if any(not tensor.is_floating_point() for tensor in found.tensors):
            continue
        tensors = [x.detach().clone().requires_grad_() for x in found.tensors]
        made = found.build(tensors)
        if "masked" in case or "certain" in case:
            continue
        torch.manual_seed(0)
        made.log_prob(fn.sample()).sum().backward()
        assert any(
            tensor.grad is not None and bool((tensor.grad != 0).any())
            for tensor in tensors
        ), case


def hidden_tensors():
    """Transforms that hold tensors out of sight."""
    base = dist.Normal(torch.zeros(2), 1.0)
    shift = T.AffineTransform(t(1.0, 2.0), torch.tensor(3.0))
    return {
        "of several": [T.ComposeTransform([shift, T.ExpTransform()])],
        "of several, nested": [T.ComposeTransform([T.ComposeTransform([shift])])],
        "inverse": [shift.inv],
        "on an event": [T.IndependentTransform(shift, 1)],
        "power": [T.ExpTransform(), T.PowerTransform(t(2.0, 3.0))],
        "in a row": [T.StackTransform([shift, T.ExpTransform()], dim=-1)],
        "one after the other": [T.ExpTransform(), T.ComposeTransform([shift])],
    }, base


@pytest.mark.parametrize("case", hidden_tensors()[0])
def test_tensors_of_transforms_are_found_or_it_is_unknown(case):
    transforms, base = hidden_tensors()
    fn = dist.TransformedDistribution(base, transforms[case])
    found = parts(fn)
    if found is None:
        return
    # All that it is made of: with other tensors it is no longer the same
    value = fn.sample()
    for i in range(len(found.tensors)):
        tensors = [x.clone() for x in found.tensors]
        tensors[i] = tensors[i] * 1.5 + 0.25
        assert not torch.allclose(
            found.build(tensors).log_prob(value), fn.log_prob(value)
        )
    numbers = [x for x in found.tensors if x.numel() == 2 and x.tolist() != [0.0, 0.0]]
    assert any(x.tolist() in ([1.0, 2.0], [2.0, 3.0]) for x in numbers)


class Odd(dist.TorchDistribution):
    arg_constraints = {"rate": dist.constraints.positive}
    support = dist.constraints.real

    def __init__(self, other, *, validate_args=None):
        self.rate = torch.exp(other)
        super().__init__(self.rate.shape, validate_args=validate_args)


def unknown():
    components = torch.distributions.Normal(torch.zeros(2), torch.ones(2))
    index = torch.distributions.Categorical(torch.ones(2))
    return {
        "made of something else": Odd(torch.tensor(1.0)),
        "mixture": dist.MixtureSameFamily(index, components),
        "mixture of torch": torch.distributions.MixtureSameFamily(index, components),
        "no distribution": object(),
        "nothing": None,
    }


@pytest.mark.parametrize("case", unknown())
def test_unknown_parts(case):
    assert parts(unknown()[case]) is None


def test_wrappers_of_unknown_parts_are_unknown():
    fn = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(3, 2)), dist.Normal(torch.zeros(3, 2), 1.0)
    )
    for wrapped in (fn.to_event(1), fn.mask(True), fn.mask(torch.ones(3).bool())):
        assert parts(wrapped) is None
    transformed = dist.TransformedDistribution(fn, [T.ExpTransform()])
    assert parts(transformed) is None


def test_a_distribution_can_register_its_parts():
    class Mine(dist.Normal):
        pass

    class Other(dist.TorchDistribution):
        arg_constraints = {}

        def __init__(self, thing):
            self.thing = thing
            super().__init__(thing.shape)

    fn = Other(torch.ones(2))
    assert parts(fn) is None

    @parts.register(Other)
    def _other(fn):
        return Parts([fn.thing], [0], lambda tensors: Other(tensors[0]), Other)

    found = parts(fn)
    assert torch.equal(found.build([torch.zeros(4)]).thing, torch.zeros(4))
    assert isinstance(parts(Mine(0.0, 1.0)).build([torch.ones(2), torch.ones(2)]), Mine)
