# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Reading a program of finite sites: one run under all configurations at once.

The latent sites upstream of a micro state are set to all their joint values. They
share three dimensions, whatever their number: one for sites that all slots of a plate
have in common, one for those of each slot, one for those of each element.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Size, Tensor

from pyro_macro.errors import UnsupportedLaw
from pyro_macro.laws.finite.sums import NEVER
from pyro_macro.laws.upstream import Evidence, Upstream
from pyro_macro.program.inner import Site, ValuedRun, unwrapped
from pyro_macro.program.layout import Layout

CONFIGURATIONS = 1 << 20  # at most


class Grade(IntEnum):
    """What has a configuration of its own."""

    TOGETHER = 0  # all slots of the plates that stay
    SLOT = 1
    GROUP = 2  # each place along the plates that are aggregated over


def finite_values(fn: Any, most: float | None = None) -> Tensor | None:
    """The values of a univariate distribution, ``None`` if there is no end of them.

    :param most: the largest value of interest, for counts without a largest one.
    """
    base = unwrapped(fn)
    if base.event_shape:
        return None
    if isinstance(base, torch.distributions.Binomial):
        return torch.arange(1.0 + int(base.total_count.max())).to(base.total_count)
    if base.has_enumerate_support:
        return base.enumerate_support(expand=False).flatten()
    if most is not None and is_count(base):
        return torch.arange(math.floor(most + 1e-6) + 1.0).to(base.mean)
    return None


def is_count(fn: Any) -> bool:
    """Whether its values are 0, 1, 2, ... without end."""
    return unwrapped(fn).support is torch.distributions.constraints.nonnegative_integer


def log_table(fn: Any, values: Tensor) -> Tensor:
    """Log probabilities of values, shape ``(V,)`` and then that of the site."""
    base = unwrapped(fn)
    values = values.reshape((-1,) + (1,) * len(base.batch_shape))
    inside = base.support.check(values)
    result = base.log_prob(torch.where(inside, values, values[:1])).double()
    result = torch.where(inside & ~_never(base, values), result, NEVER)
    return result.nan_to_num(nan=NEVER).clamp(min=NEVER)


def _never(base: Any, values: Tensor) -> Tensor:
    """Where a probability is zero: torch keeps logarithms of these finite."""
    probs = vars(base).get("probs")
    if isinstance(base, torch.distributions.Categorical) and probs is not None:
        shape = torch.broadcast_shapes(values.shape, base.batch_shape)
        index = values.long().expand(shape).unsqueeze(-1)
        found = probs.expand(shape + probs.shape[-1:])
        return found.gather(-1, index.clamp(0, probs.shape[-1] - 1)).squeeze(-1) == 0
    if isinstance(base, torch.distributions.Bernoulli) and probs is not None:
        return ((values > 0) & (probs == 0)) | ((values < 1) & (probs == 1))
    if isinstance(base, torch.distributions.Binomial) and probs is not None:
        most = base.total_count
        return ((values > 0) & (probs == 0)) | ((values < most) & (probs == 1))
    return torch.zeros((), dtype=torch.bool, device=values.device)


def log_prob_of(fn: Any, value: Tensor, site: Site) -> Tensor:
    """The log probability of a site's value; :data:`NEVER` where it cannot be."""
    result = fn.log_prob(value).double().clamp(min=NEVER)
    never = _never(unwrapped(fn), torch.as_tensor(value))
    event = len(site.event_shape)
    if never.dim() and event:
        never = never.expand(result.shape + site.event_shape).flatten(-event).any(-1)
    return torch.where(never, NEVER, result)


class EnumeratedRun(ValuedRun):
    """An inner run in which some sites have many values at once.

    :param cut: sites whose mechanisms are replaced.
    """

    def __init__(
        self,
        upstream: Upstream,
        until: Sequence[str],
        values: Mapping[str, Tensor],
        cut: Collection[str] = (),
    ) -> None:
        super().__init__(until, upstream.shared, values)
        self.before, self._cut = upstream.sites, tuple(cut)

    @property
    def sets(self) -> Collection[str]:
        return self._cut

    def otherwise(self, site: Site) -> Tensor:
        return self.before[site.name].value


@dataclass(frozen=True, eq=False)
class Ancestor:
    """A latent site of finite support, and how its values are numbered.

    :ivar values: its values, shape ``(V,)``.
    :ivar shape: of its value: one where slots share a configuration.
    :ivar first: the number of configurations of the sites before it in its grade.
    """

    site: Site
    grade: Grade
    values: Tensor
    shape: Size
    first: int

    @property
    def count(self) -> int:
        return len(self.values) ** self.shape.numel()

    def at(self, configuration: Tensor) -> Tensor:
        """Its values in some configurations, shape ``(...,)`` + that of the site."""
        places = torch.arange(self.shape.numel(), device=configuration.device)
        places = self.first * len(self.values) ** places
        digits = configuration.unsqueeze(-1) // places % len(self.values)
        return self.values[digits].reshape(configuration.shape + self.shape)

    def across(self, configuration: Tensor, depth: int) -> Tensor:
        """Its values where slots have different configurations.

        :param configuration: shape ``(n,)`` and then ``depth`` dimensions.
        :returns: the same shape, and then the event shape.
        """
        event = len(self.site.event_shape)
        own = len(self.shape) - event
        values = self.at(configuration)  # (n, depth, own, event)
        for dim in range(-own, 0):
            # Along each dimension either the configurations differ or the digits
            if self.shape[dim - event] > 1:
                values = values.transpose(1 + depth + dim, 1 + depth + own + dim)
        return values.reshape(values.shape[: 1 + depth] + self.site.event_shape)


class Configurations:
    """The sites upstream of a micro state, under all their joint values.

    :param upstream: the program.
    :param layout: the micro state.
    :param causes: the sites to be integrated out.
    :param known: what is known besides.
    :param what: how to call the micro state in messages.
    :param grouped: whether sites inside the plates that are aggregated over may have
        configurations for each place.
    :param apart: whether slots may have configurations of their own at all.
    :param depth: the least number of dimensions for plates.
    :ivar joint: the plates whose slots share a configuration.
    """

    def __init__(
        self,
        upstream: Upstream,
        layout: Layout,
        causes: Collection[str],
        known: Sequence[Evidence],
        what: str,
        grouped: bool = True,
        apart: bool = True,
        depth: int = 0,
    ) -> None:
        self.upstream, self.layout, self.what = upstream, layout, what
        self.known = known
        self._kept = [f for f in layout.frames if f.vectorized]
        self._apart = apart
        sites = upstream.sites
        self.latent = [n for n in sites if n in causes]
        self.over = self._common_over() if grouped else []
        self._grade_all()
        # A run meets sites beside the way, too
        self.depth = max(
            [s.value.dim() - len(s.event_shape) for s in sites.values()]
            + [-(f.dim or 0) for s in sites.values() for f in s.frames]
            + [-dim for s in upstream.shared.values() for dim in s.outside]
            + [e.value.dim() - len(e.event_shape) for e in known]
            + [depth]
        )
        self._number()
        values = {a.site.name: self._place(a) for a in self.ancestors}
        self.until = [*layout.names, *self.latent, *(n for e in known for n in e.sites)]
        run = EnumeratedRun(upstream, self.until, {**upstream.held, **values})
        run.run(*upstream.model)
        self.sites, self.values = run.sites, values

    def _common_over(self) -> list[Any]:
        """The plates in the vector, if all micro sites are in them alike."""
        sites = [self.upstream.sites[name] for name in self.layout.names]
        frames = [
            sorted(
                (f for f in s.frames if f.vectorized and f.name in self.layout.over),
                key=lambda f: f.dim,
            )
            for s in sites
        ]
        return frames[0] if all(f == frames[0] for f in frames) else []

    def _grade_all(self) -> None:
        upstream = self.upstream
        needs = {name: upstream.sites[name].frames for name in self.latent}
        grades = {name: self._grade(frames) for name, frames in needs.items()}
        bounds = [(name, [name], grades[name]) for name in self.latent]
        for e in self.known:
            bounds.append((e.name, list(e.sites), self.grade_of(e)))
        for _, names, grade in bounds:
            for name in upstream.ancestors(names) | set(names):
                if name in grades:
                    grades[name] = min(grades[name], grade)
        if not self._apart:
            grades = {name: Grade.TOGETHER for name in grades}
        self.grades = grades
        together = Grade.TOGETHER in grades.values() or any(
            self._grade(e.frames) == Grade.TOGETHER for e in self.known
        )
        self.joint = [f for f in self._kept if together]

    def grade_of(self, known: Evidence) -> Grade:
        """The grade of something known."""
        # What is known as a whole has no groups
        most = Grade.SLOT if known.macro is not None else Grade.GROUP
        own = min(self._grade(known.frames), most)
        return own if self._apart else Grade.TOGETHER

    def _grade(self, frames: Sequence[Any]) -> Grade:
        names = {f.name for f in frames}
        if any(f.name not in names for f in self._kept):
            return Grade.TOGETHER
        if self.over and all(f.name in names for f in self.over):
            return Grade.GROUP
        return Grade.SLOT

    def _number(self) -> None:
        self.ancestors: list[Ancestor] = []
        self.counts = dict.fromkeys(Grade, 1)
        for name in self.latent:
            site = self.upstream.sites[name]
            grade, values = self.grades[name], finite_values(site.fn)
            assert values is not None
            own = self.kept_by(grade)
            depth = site.value.dim() - len(site.event_shape)
            unrolled = {
                f.dim: f.size for f in site.frames if f.vectorized and f not in own
            }
            batch = Size(unrolled.get(dim, 1) for dim in range(-depth, 0))
            ancestor = Ancestor(
                site, grade, values, batch + site.event_shape, self.counts[grade]
            )
            self.ancestors.append(ancestor)
            self.counts[grade] *= ancestor.count
            if math.prod(self.counts.values()) > CONFIGURATIONS:
                raise UnsupportedLaw(
                    f"{self.what}: the sites upstream ({', '.join(self.latent)}) have "
                    f"more than {CONFIGURATIONS} joint values, up to {name!r} alone. "
                    f"Hold some at their values: given={self.latent}."
                )

    def _place(self, ancestor: Ancestor) -> Tensor:
        """All values of an ancestor, along the dimension of its grade."""
        values = ancestor.at(torch.arange(self.counts[ancestor.grade]))
        event = len(ancestor.site.event_shape)
        batch = ancestor.shape[: len(ancestor.shape) - event]
        # Dimensions of the grades, from the left: together, slot, group
        behind = self.depth - len(batch) + (2 - ancestor.grade)
        return values.reshape(values.shape[:1] + (1,) * behind + ancestor.shape)

    def padded(self, table: Tensor, event: int, ahead: int = 0) -> Tensor:
        """With all dimensions: ``ahead``, three grades, ``depth``, ``event``."""
        full = ahead + 3 + self.depth + event
        shape = table.shape[:ahead] + (1,) * (full - table.dim()) + table.shape[ahead:]
        return table.reshape(shape)

    def arrange(
        self,
        table: Tensor,
        batch: Size,
        into: Sequence[Any] = (),
        ahead: int = 0,
        event: int = 0,
    ) -> Tensor:
        """``(ahead, G, S, C, depth, event)`` to ``(ahead, B, G, Bs, S, O, C, event)``.

        :param batch: sizes of the dimensions that are no slots, shape ``(depth,)``.
        :param into: the plates that become ``O``.
        """
        g, depth = ahead, self.depth
        slots = [f.dim for f in sorted(self.joint, key=lambda f: f.dim)]
        over = [f.dim for f in sorted(into, key=lambda f: f.dim)]
        sizes = {f.dim: f.size for f in [*self.joint, *into]}
        wanted = [sizes.get(dim, batch[dim]) for dim in range(-depth, 0)]
        lead, tail = list(table.shape[: g + 3]), list(table.shape[g + 3 + depth :])
        table = table.expand(lead + wanted + tail)
        at = {dim: g + 3 + depth + dim for dim in range(-depth, 0)}
        rest = [d for d in range(-depth, 0) if d not in slots and d not in over]
        order = list(range(g)) + [at[d] for d in rest] + [g] + [at[d] for d in slots]
        order += [g + 1] + [at[d] for d in over] + [g + 2]
        order += range(g + 3 + depth, table.dim())
        table = table.permute(order)
        groups = [len(rest), 1, len(slots), 1, len(over), 1]
        shape, i = list(table.shape[:g]), g
        for n in groups:
            shape.append(math.prod(table.shape[i : i + n]))
            i += n
        return table.reshape(shape + tail)

    def _log_prob(self, run: Any, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """The log probability of a site's own value, shape ``(1, ...)``."""
        site = run.sites[name]
        value = values.get(name, site.value)
        return log_prob_of(site.fn, value, site).unsqueeze(0)

    def weight(self, name: str, keep: Sequence[Any]) -> Tensor:
        """The log probability of a site's value, ``(G, S, C, depth)``.

        :param keep: the plates along which it is not summed up.
        """
        result = self.padded(self._log_prob(self, name, self.values)[0], 0)
        return self.summed(result, self.sites[name].frames, keep)

    def summed(
        self, table: Tensor, frames: Sequence[Any], keep: Sequence[Any]
    ) -> Tensor:
        """A table of log probabilities, summed along plates but for some."""
        kept = {f.name for f in keep}
        dims = [f.dim for f in frames if f.vectorized and f.name not in kept]
        if not dims:
            return table
        sizes = {f.dim: f.size for f in frames if f.dim in dims}
        shape = [sizes.get(i - table.dim(), size) for i, size in enumerate(table.shape)]
        return table.expand(shape).sum(dims, keepdim=True)

    def kept_by(self, grade: Grade) -> list[Any]:
        """The plates that a site of some grade has a configuration for each slot of."""
        if grade == Grade.TOGETHER:
            return []
        return self._kept if grade == Grade.SLOT else [*self._kept, *self.over]

    def is_coupled(self, supports: Mapping[str, Tensor]) -> bool:
        """Whether some slots act on one another, and must share configurations.

        The program is run with a different configuration in each slot, and compared
        with what it said for all slots in the same one.

        :param supports: the values of each micro site.
        """
        probes, generator = 4, torch.Generator().manual_seed(0)
        drawn = {}
        for grade in Grade:
            plates = self.kept_by(grade) if self.counts[grade] > 1 else []
            sizes = {f.dim: f.size for f in plates}
            shape = [probes] + [sizes.get(d, 1) for d in range(-self.depth, 0)]
            drawn[grade] = torch.randint(
                self.counts[grade], shape, generator=generator, device="cpu"
            )
        values = {
            a.site.name: a.across(drawn[a.grade], self.depth) for a in self.ancestors
        }
        run = EnumeratedRun(self.upstream, self.until, {**self.upstream.held, **values})
        run.run(*self.upstream.model)
        for name, site in self.sites.items():
            index = torch.zeros([1] * (1 + self.depth), dtype=torch.long, device="cpu")
            for grade in Grade:
                # What is outside of a plate does not depend on its slots
                inside = all(f in site.frames for f in self.kept_by(grade))
                own = drawn[grade] if inside else torch.zeros_like(index)
                index = index * self.counts[grade] + own
            if name in supports:
                event = len(site.event_shape)
                one = log_table(site.fn, supports[name])
                other = log_table(run.sites[name].fn, supports[name])
            elif name in self.grades or any(name in e.sites for e in self.known):
                event = 0
                one = self._log_prob(self, name, self.values)
                other = self._log_prob(run, name, values)
            else:
                continue
            if not self._agree(one, other, index, event):
                return True
        return False

    def _agree(self, one: Tensor, other: Tensor, index: Tensor, event: int) -> bool:
        """Whether a table for all configurations predicts one for the probes."""
        one = self.padded(one, event, 1)  # (V, G, S, C, depth, event)
        one = one.expand((len(one), *self.counts.values()) + one.shape[4:])
        one = one.flatten(1, 3)
        missing = (1,) * (one.dim() - other.dim())
        other = other.reshape(other.shape[:1] + missing + other.shape[1:])
        index = index.reshape((1,) + index.shape + (1,) * event).to(one.device)
        shape = torch.broadcast_shapes(one[:, :1].shape, other.shape, index.shape)
        one = one.expand(one.shape[:2] + shape[2:]).gather(1, index.expand(shape))
        return torch.allclose(one, other.expand(shape), rtol=1e-4, atol=1e-5)


def mixing_configurations(
    upstream: Upstream,
    layout: Layout,
    given: Sequence[Evidence],
    what: str,
    depth: int,
) -> tuple[Configurations, Tensor] | None:
    """The finite sites upstream of a continuous micro state, if it has some.

    :returns: their configurations, each slot having its own, and their log weights,
        ``(C, 1, depth)``; ``None`` if there are none, or they depend on others.
    """
    relevant, known = upstream.relevant(layout.names, given, what)
    names = set(layout.names)
    finite = {
        name
        for name in relevant - names
        if not upstream.is_fixed(name)
        and not upstream.sites[name].deterministic
        and finite_values(upstream.sites[name].fn) is not None
    }
    if not finite:
        return None
    branches = sorted(finite & upstream.zero.tracker.escaped)
    if branches:
        raise UnsupportedLaw(
            f"{what}: the program branches on {branches}, or makes Python numbers of "
            "it, and all its values at once are needed for the law of the micro state. "
            f"Hold it, given={branches}, or write the choice with torch.where."
        )
    evidence = [e for e in known if upstream.latent_sources(e.sites) & finite]
    above = {*finite, *(n for e in evidence for n in e.sites)}
    for name in upstream.latent_sources(sorted(above)) - above:
        if not upstream.sites[name].deterministic:
            return None
    if any(e.macro is not None for e in evidence):
        return None
    read = Configurations(
        upstream, layout, finite, evidence, what, grouped=False, depth=depth
    )
    together = Grade.TOGETHER in read.grades.values() or any(
        read.grade_of(e) == Grade.TOGETHER for e in evidence
    )
    if (together and read.joint) or read.is_coupled({}):
        return None
    weights = [read.weight(n, read.kept_by(Grade.SLOT)) for n in sorted(above)]
    total = torch.stack(torch.broadcast_tensors(*weights)).sum(0)  # (1, C, 1, depth)
    count = read.counts[Grade.SLOT]
    return read, total[0].expand((count,) + total.shape[2:])
