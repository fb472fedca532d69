# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Many macro values in one run, with common random numbers."""

from __future__ import annotations

import operator
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Size, Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Transform,
    TransformedDistribution,
)

from pyro_macro.errors import PyroMacroError
from pyro_macro.laws.product import StackedSites
from pyro_macro.program.inner import is_deterministic
from pyro_macro.program.noise import noise_form
from pyro_macro.program.tracking import tensors_in


class grid(pyro.plate):
    """A plate for macro values, along which all random numbers are the same.

    A dose-response curve is smooth, and differences along it have little variance, if
    its points share their random numbers. Inside, each random site has the law that it
    has inside of ``pyro.plate``, at each place of the grid; but the noise behind it is
    drawn once. So places are dependent: a grid is for simulation, and densities of a
    trace are those of each place by itself. Sites that the macro value does not act on
    are drawn once, and cost nothing along the grid.

    Gaussian sites and all families with an inverse distribution function (``icdf``) are
    coupled, and Bernoulli and categorical ones; sites of other families are drawn anew
    at each place where their parameters differ.

    :param name: of the plate.
    :param size: the number of macro values.
    :param dim: the dimension along which they lie, negative, left of all plates of the
        model; the macro values then have the shape ``(size, 1, ..., 1)``.

    >>> import pyro, torch, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    ...     return pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> values = torch.tensor([[30.0], [31.0], [32.0]])
    >>> natural = pm.macro_do(shop, {sales: pm.Natural(values)})
    >>> with pm.grid("values", 3, dim=-2), pyro.plate("draws", 1000, dim=-1):
    ...     revenue = natural()
    >>> revenue.shape, bool(((revenue.diff(dim=0) - 1.4).abs() < 1e-4).all())
    (torch.Size([3, 1000]), True)
    """

    def __init__(self, name: str, size: int, dim: int | None = None) -> None:
        try:
            count = operator.index(size)
        except TypeError:
            count = 0
        if count < 1:
            raise PyroMacroError(
                f"grid {name!r}: size is {size!r}. Expected the number of macro "
                "values, at least one."
            )
        super().__init__(name, count, dim=dim)

    def __iter__(self) -> Any:
        raise PyroMacroError(
            f"grid {self.name!r}: it cannot be run through one by one, for all places "
            "share their random numbers. Write `with pm.grid(...):`."
        )

    def _process_message(self, msg: Message) -> None:
        if self.dim is not None and _is_drawn(msg):
            fn, dims = msg["fn"], (self.dim,)
            if isinstance(fn, CommonNoise):  # of another grid inside
                fn, dims = fn.whole, (*fn.dims, *dims)
            msg["fn"] = CommonNoise(fn, dims)
        super()._process_message(msg)


def _is_drawn(msg: Message) -> bool:
    """Whether a statement is a random site that is still to be drawn, as it is."""
    if msg["type"] != "sample" or site_is_subsample(msg) or site_is_factor(msg):
        return False
    if msg["is_observed"] or msg["done"] or msg["value"] is not None:
        return False
    if (msg["infer"] or {}).get("enumerate") is not None or is_deterministic(msg):
        return False
    return isinstance(msg["fn"], TorchDistributionMixin)


class CommonNoise(TorchDistribution):
    """A distribution whose draws share their noise along some batch dimensions.

    :param base: the distribution at each place.
    :param dims: the dimensions, negative.
    """

    arg_constraints: dict[str, Any] = {}
    shares_noise = True  # which no program may hide from who reads it

    def __init__(
        self, base: Any = None, dims: tuple[int, ...] = (), **parameters: Any
    ) -> None:
        if parameters:
            raise PyroMacroError(
                "poutine.reparam is around a grid, whose distributions share their "
                "noise and cannot be written in another way. Put it inside: "
                "`with pm.grid(...): poutine.reparam(model, config)()`."
            )
        self.base, self.dims = base, dims
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "base" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.whole, name)

    def expand(self, batch_shape: Any, _instance: Any = None) -> CommonNoise:
        new = CommonNoise(self.base, self.dims)
        new._batch_shape = Size(batch_shape)
        return new

    @property
    def whole(self) -> Any:
        """The distribution at all places."""
        if self.base.batch_shape == self.batch_shape:
            return self.base
        return self.base.expand(self.batch_shape)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.base.has_rsample

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return self.base.has_enumerate_support

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return self.whole.enumerate_support(expand)

    @property
    def support(self) -> Any:
        return self.whole.support

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        return self.whole.mean

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        return self.whole.variance

    def log_prob(self, value: Tensor) -> Tensor:
        return self.whole.log_prob(value)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        with torch.no_grad():
            return self._drawn(Size(sample_shape), "sample")

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        return self._drawn(Size(sample_shape), "rsample")

    def _drawn(self, sample_shape: Size, method: str) -> Tensor:
        own, shape = self.base.batch_shape, self.batch_shape
        if all(-d > len(own) or own[d] == 1 for d in self.dims):
            # The same at all places
            once = self.base.expand(_once(shape, self.dims))
            value = getattr(once, method)(sample_shape)
        else:
            whole = self.whole
            value = _coupled(whole, self.dims, sample_shape, method)
            if value is None:
                value = getattr(whole, method)(sample_shape)
                if _is_same(whole, self.dims):
                    for dim in self.dims:
                        value = value.narrow(dim - len(self.event_shape), 0, 1)
        return value.expand(sample_shape + shape + self.event_shape)


def _coupled(
    fn: Any, dims: tuple[int, ...], sample_shape: Size, method: str
) -> Tensor | None:
    """A draw with one noise for all places along ``dims``; ``None`` if unknown how."""
    if not _is_known(fn):
        return None  # it may draw in a way of its own
    form = noise_form(fn)
    if form is not None:
        depth = len(fn.batch_shape)
        factor = None
        if form.shape is not None:
            shape = _once(form.shape, _moved(dims, len(form.shape) - depth))
            factor = _normal(sample_shape + shape, form.like)
        value = form.affine(factor)
        if form.scale is None:
            return value
        at = _moved(dims, form.scale.dim() - depth)
        own = _normal(sample_shape + _once(form.scale.shape, at), form.like)
        return value + _once_if_same(form.scale, at) * own
    if isinstance(fn, Independent):
        inside = _moved(dims, fn.reinterpreted_batch_ndims)
        return _coupled(fn.base_dist, inside, sample_shape, method)
    if isinstance(fn, StackedSites):
        parts = {name: CommonNoise(part, dims) for name, part in fn.parts.items()}
        stacked = fn.expand(fn.batch_shape)
        stacked.parts = parts
        return getattr(stacked, method)(sample_shape)
    if isinstance(fn, TransformedDistribution):
        if fn.base_dist.batch_shape != fn.batch_shape or fn.event_shape:
            return None
        draw = _coupled(fn.base_dist, dims, sample_shape, method)
        for transform in fn.transforms if draw is not None else ():
            draw = transform(draw)
        return draw
    return None if fn.event_shape else _by_uniform(fn, dims, sample_shape)


def _by_uniform(fn: Any, dims: tuple[int, ...], sample_shape: Size) -> Tensor | None:
    """A draw of numbers from uniform ones, which are the same along ``dims``."""
    if isinstance(fn, Bernoulli):
        uniform = _uniform(sample_shape + _once(fn.batch_shape, dims), fn.probs)
        return (uniform < fn.probs).to(fn.probs)
    if isinstance(fn, Categorical):
        uniform = _uniform(sample_shape + _once(fn.batch_shape, dims), fn.probs)
        steps = fn.probs.cumsum(-1)
        reached = (
            uniform.unsqueeze(-1) * steps[..., -1:]
        )  # which is one but for rounding
        return (reached >= steps[..., :-1]).sum(-1)
    like = next((t for t in tensors_in(fn) if t.is_floating_point()), None)
    if like is None or not fn.has_rsample:
        return None
    try:
        return fn.icdf(_uniform(sample_shape + _once(fn.batch_shape, dims), like))
    except NotImplementedError:
        return None


def _is_same(fn: Any, dims: tuple[int, ...]) -> bool:
    """Whether a distribution is seen to be the same at all places along dimensions.

    A wrong "no" costs a fresh draw, a wrong "yes" would be wrong.
    """
    if not _is_known(fn):
        return False
    sizes, seen = {fn.batch_shape[dim] for dim in dims}, False
    for tensor in tensors_in(fn):
        for at in range(tensor.dim()):
            if tensor.shape[at] in sizes:
                seen = True
                if not torch.equal(tensor, tensor.narrow(at, 0, 1).expand_as(tensor)):
                    return False
    return seen


def _is_known(thing: Any, seen: tuple[int, ...] = ()) -> bool:
    """Whether a distribution, and all that it is made of, is of torch, Pyro or here."""
    if isinstance(thing, (list, tuple)):
        return all(_is_known(part, seen) for part in thing)
    if not isinstance(thing, (Distribution, Transform)) or id(thing) in seen:
        return True
    if type(thing).__module__.split(".")[0] not in ("torch", "pyro", "pyro_macro"):
        return False
    return all(_is_known(part, (*seen, id(thing))) for part in vars(thing).values())


def _moved(dims: tuple[int, ...], by: int) -> tuple[int, ...]:
    return tuple(dim - by for dim in dims)


def _once(shape: Size, dims: tuple[int, ...]) -> Size:
    return Size(1 if i - len(shape) in dims else size for i, size in enumerate(shape))


def _once_if_same(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Without the places along ``dims``, where all are the same memory."""
    for dim in dims:
        if tensor.stride(dim) == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _normal(shape: Size, like: Tensor) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def _uniform(shape: Size, like: Tensor) -> Tensor:
    """Uniform numbers, neither zero nor one."""
    tiny = torch.finfo(like.dtype).eps
    uniform = torch.rand(shape, dtype=like.dtype, device=like.device)
    return uniform.clamp(tiny, 1 - tiny)
