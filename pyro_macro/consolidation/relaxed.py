# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Relaxed consolidation: clusters that cannot be fused, learned from draws.

Section 5 of *Do Not Marginalize Mechanisms, Rather Consolidate!*: what is left has, for
each allowed intervention, a distribution within ``epsilon`` of the original's. The
distance is that of Kolmogorov and Smirnov, the largest one between distribution
functions, of each site and of random combinations of all, and it is measured on draws
that were not used to fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from tqdm.auto import tqdm

from pyro_macro.consolidation.draws import Model, drawn
from pyro_macro.consolidation.known import Known
from pyro_macro.consolidation.laws import FiniteValues
from pyro_macro.consolidation.prepared import Approximation, Prepared
from pyro_macro.errors import Infeasible, InterventionNotAllowed, UnsupportedLaw
from pyro_macro.laws.finite.configurations import finite_values
from pyro_macro.program.inner import Site, preserved_random_state

PROJECTIONS = 16


class ConditionalDensity(torch.nn.Module):
    """The law of a site given others, a mixture density network (Bishop 1994).

    Mixtures of normals on the line that the support is mapped to; of finite sites the
    probabilities of their values.
    """

    def __init__(
        self, site: Site, has_parents: bool, inputs: int, how: Approximation
    ) -> None:
        super().__init__()
        self.site = site
        _refuse(site, has_parents)
        finite = None if site.deterministic else finite_values(site.fn)
        support = constraints.real if site.deterministic else site.fn.support
        self.values, self.is_real = finite, support is constraints.real
        self.map = None if finite is not None else biject_to(support)
        outputs = 3 * how.components if finite is None else len(finite)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(max(inputs, 1), how.width),
            torch.nn.Tanh(),
            torch.nn.Linear(how.width, how.width),
            torch.nn.Tanh(),
            torch.nn.Linear(how.width, outputs),
        ).to(device=site.value.device, dtype=torch.float64)
        self.place = site.value.new_zeros(2, dtype=torch.float64)
        self.place[1] = 1.0

    def standardize(self, values: Tensor) -> None:
        """Takes location and scale from the draws that it is fitted to."""
        if self.map is not None:
            flat = self.map.inv(values)
            self.place = torch.stack([flat.mean(), flat.std().clamp(min=1e-6)])

    def law(self, features: Tensor) -> Any:
        """The distribution, of the batch shape of the features."""
        found = self.net(features)
        dtype = self.site.value.dtype
        if self.values is not None:
            if isinstance(self.site.fn, torch.distributions.Bernoulli):
                return dist.Bernoulli(logits=found[..., 1] - found[..., 0])
            return FiniteValues(self.values, found)
        logits, loc, scale = found.unflatten(-1, (3, -1)).unbind(-2)
        mean, spread = self.place
        scale = (scale.clamp(-7, 7).exp() * spread).to(dtype)
        components = dist.Normal((mean + spread * loc).to(dtype), scale)
        index = dist.Categorical(logits=logits.to(dtype))
        mixture = dist.MixtureSameFamily(index, components)
        if self.is_real:
            return mixture
        return dist.TransformedDistribution(mixture, [self.map])


def _refuse(site: Site, has_parents: bool) -> None:
    """An error for sites whose laws cannot be learned."""
    support = None if site.deterministic else site.fn.support
    endless = getattr(support, "is_discrete", False) and finite_values(site.fn) is None
    moving = has_parents and any(
        isinstance(part, Tensor) for part in vars(support or site).values()
    )
    if support is None:
        moving = False
    whole = site.deterministic and not site.value.is_floating_point()
    if endless or moving or whole:
        what = "counts without end" if endless else "whole numbers or truth values"
        if moving:
            what = "values in a support that depends on other sites"
        raise UnsupportedLaw(
            f"consolidate, approximate: site {site.name!r} takes {what}. Only finite "
            "sites and continuous ones of a fixed support can be learned: keep what it "
            "depends on."
        )


@dataclass(eq=False)
class Relaxed:
    """What was learned.

    :ivar laws: by name of the site.
    :ivar inputs: the sites that each depends on.
    :ivar allowed: sites that may be set and are no longer computed.
    :ivar gone: sites that are no longer met.
    :ivar confounded: sites that depend on these.
    :ivar achieved: the distance on fresh draws, by intervention in words.
    """

    laws: dict[str, ConditionalDensity]
    inputs: dict[str, tuple[str, ...]]
    allowed: tuple[str, ...]
    gone: frozenset[str]
    confounded: frozenset[str]
    places: dict[str, tuple[float, float]] = field(default_factory=dict)
    achieved: dict[str, float] = field(default_factory=dict)

    @property
    def epsilon(self) -> float:
        """The largest distance that was found."""
        return max(self.achieved.values())

    def law(self, name: str, known: Known, interventions: frozenset[str]) -> Any:
        """The distribution of a learned site.

        :raises InterventionNotAllowed: if a site is set that tells of causes which are
            no longer met: what is learned of it is what it tells, not what it does.
        """
        for other in interventions.intersection(self.inputs[name], self.confounded):
            raise InterventionNotAllowed(
                f"do({other} = ...): the law of {name!r} was learned from {other!r} as "
                "it is by itself, and both depend on sites that were approximated "
                "away. Keep these, or consolidate without `approximate`."
            )
        columns = []
        for other in self.inputs[name]:
            columns.append(self._standard(other, known[other]))
        zero = self.laws[name].site.value.new_zeros((), dtype=torch.float64)
        like = columns[0] if columns else zero
        for other in self.allowed:
            if other in interventions:
                columns += [torch.ones_like(like), self._standard(other, known[other])]
            else:
                columns += [torch.zeros_like(like), torch.zeros_like(like)]
        if not columns:
            columns = [like]
        return self.laws[name].law(torch.stack(torch.broadcast_tensors(*columns), -1))

    def _standard(self, name: str, value: Tensor) -> Tensor:
        mean, spread = self.places[name]
        return (value.double() - mean) / spread


def relax(prepared: Prepared, model: Model, how: Approximation) -> Relaxed:
    """Learns the laws of sites that what could not be fused acts on.

    :raises UnsupportedLaw: for sites that are no single number.
    :raises Infeasible: if the distance on fresh draws is above what is accepted.
    """
    if prepared.mechanisms.params:
        raise UnsupportedLaw(
            "consolidate, approximate: the model has parameters "
            f"{sorted(prepared.mechanisms.params)}. What is learned holds for the "
            "values they have now: fix them first, as arguments of the model."
        )
    with preserved_random_state():
        return _learn(prepared, model, how)


def _learn(prepared: Prepared, model: Model, how: Approximation) -> Relaxed:
    torch.manual_seed(how.seed)
    relaxed = _planned(prepared, how)
    names = _needed(prepared, relaxed)
    allowed = list(relaxed.allowed)
    with torch.enable_grad():
        settings, chosen = _settings(prepared, allowed, how)
        samples = _samples(model, names, settings, chosen, how.seed + 1)
        for name in (*names, *allowed):
            column = samples[name] if name in samples else settings[name].double()
            spread = float(column.std().clamp(min=1e-6))
            relaxed.places[name] = float(column.mean()), spread
        for name, law in relaxed.laws.items():
            features = _features(relaxed, name, samples, settings, chosen)
            _fit(law, features, samples[name], how)
    _measure(prepared, relaxed, model, how)
    if relaxed.epsilon > how.epsilon:
        worst = max(relaxed.achieved, key=relaxed.achieved.__getitem__)
        raise Infeasible(
            f"consolidate: the approximation is {relaxed.epsilon:.3g} away from the "
            f"model under {worst}, in Kolmogorov-Smirnov distance on fresh draws; "
            f"{how.epsilon:.3g} was asked for. Allow more draws or steps "
            "(pm.Approximation), keep more sites, or ask for less."
        )
    return relaxed


def _planned(prepared: Prepared, how: Approximation) -> Relaxed:
    """Which sites are learned, and from what."""
    structure = prepared.structure
    if structure is None:
        kept = [n for n in prepared.of if n in prepared.wanted]
        gone = frozenset(n for n in prepared.of if n not in kept)
    else:
        asked = prepared.wanted
        gone = frozenset(structure.retained) - asked - prepared.border
        kept = [n for n in structure.stays if n not in gone]
    allowed = [n for n in prepared.of if n in prepared.allowed.sites and n not in kept]
    learned: dict[str, tuple[str, ...]] = {}
    for name in kept:
        if structure is None or _depends(prepared, name, gone):
            before = kept[: kept.index(name)]
            learned[name] = tuple(before)
    laws = {}
    for name, inputs in learned.items():
        site = prepared.of[name].site
        for n in (name, *inputs, *allowed):
            if prepared.of[n].site.shape.numel() != 1:
                raise UnsupportedLaw(
                    f"consolidate, approximate: site {n!r} has "
                    f"{prepared.of[n].site.shape.numel()} elements. Only sites of "
                    "one number each can be learned."
                )
        parents = bool(prepared.of[name].parents)
        count = len(inputs) + 2 * len(allowed)
        laws[name] = ConditionalDensity(site, parents, count, how)
    graph = prepared.mechanisms.graph()
    confounded = frozenset(
        n for n in kept if not gone.isdisjoint(nx.ancestors(graph, n))
    )
    return Relaxed(laws, learned, tuple(allowed), gone, confounded)


def _depends(prepared: Prepared, name: str, gone: frozenset[str]) -> bool:
    """Whether the law of a site that stays depends on sites that are to go."""
    assert prepared.structure is not None
    elimination = prepared.eliminations.get(name)
    names = [name] if elimination is None else list(elimination.component.sites)
    stack, seen = list(names), set()
    while stack:
        for p in prepared.of[stack.pop()].parents:
            if p in gone:
                return True
            if p not in prepared.structure.stays and p not in seen:
                seen.add(p)
                stack.append(p)
    return False


def _needed(prepared: Prepared, relaxed: Relaxed) -> list[str]:
    used = {n for name, inputs in relaxed.inputs.items() for n in (name, *inputs)}
    return [n for n in prepared.of if n in used]


def _settings(
    prepared: Prepared, allowed: Sequence[str], how: Approximation
) -> tuple[dict[str, Tensor], Tensor]:
    """Values for allowed sites, and in which draws each is set."""
    count = how.draws
    settings, columns = {}, []
    explicit = prepared.allowed.explicit
    for name in allowed:
        values = [one[name] for one in explicit if name in one]
        site = prepared.of[name].site
        if name in prepared.allowed.free:
            settings[name] = _spread(prepared, name, count)
        else:
            table = torch.stack([torch.as_tensor(v).to(site.value) for v in values])
            settings[name] = table[torch.randint(len(table), (count,))]
        columns.append(torch.rand(count) < 1 / (1 + len(allowed)))
    chosen = torch.stack(columns, -1) if columns else torch.zeros(count, 0).bool()
    device = next(iter(prepared.of.values())).site.value.device
    return settings, chosen.to(device)


def _spread(prepared: Prepared, name: str, count: int) -> Tensor:
    """Values that a site may well be set to: wider than it takes by itself."""
    site = prepared.of[name].site
    finite = None if site.deterministic else finite_values(site.fn)
    if finite is not None:
        return finite[torch.randint(len(finite), (count,))]
    sample = drawn((prepared.model, *prepared.arguments), [name], 500, {}, 1)[:, 0]
    mean, spread = sample.mean(), sample.std().clamp(min=1e-6)
    if not site.deterministic and site.fn.support is not constraints.real:
        index = torch.randint(len(sample), (count,))
        return sample[index].to(site.value.dtype)
    noise = torch.randn(count).to(sample)
    return (mean + 2 * spread * noise).to(site.value.dtype)


def _samples(
    model: Model,
    names: Sequence[str],
    settings: Mapping[str, Tensor],
    chosen: Tensor,
    seed: int,
) -> dict[str, Tensor]:
    """Draws of sites, each under the interventions chosen for it."""
    shape = len(chosen), len(names)
    found = torch.zeros(shape, dtype=torch.float64, device=chosen.device)
    if not chosen.shape[1]:
        found = drawn(model, names, len(chosen), {}, seed, "Drawing to fit")
        return dict(zip(names, found.unbind(-1), strict=True))
    patterns, which = chosen.unique(dim=0, return_inverse=True)
    for i, pattern in enumerate(patterns):
        rows = (which == i).nonzero()[:, 0]
        pairs = zip(settings.items(), pattern, strict=True)
        made = {n: v[rows] for (n, v), on in pairs if on}
        found[rows] = drawn(model, names, len(rows), made, seed + i, "Drawing to fit")
    return dict(zip(names, found.unbind(-1), strict=True))


def _features(
    relaxed: Relaxed,
    name: str,
    samples: Mapping[str, Tensor],
    settings: Mapping[str, Tensor],
    chosen: Tensor,
) -> Tensor:
    columns = [relaxed._standard(n, samples[n]) for n in relaxed.inputs[name]]
    for i, n in enumerate(relaxed.allowed):
        on = chosen[:, i].double()
        columns += [on, on * relaxed._standard(n, settings[n])]
    none = chosen.new_zeros(len(chosen), dtype=torch.float64)
    return torch.stack(columns or [none], -1)


def _fit(
    law: ConditionalDensity, features: Tensor, values: Tensor, how: Approximation
) -> None:
    law.standardize(values)
    values = values.to(law.site.value.dtype)
    optimizer = torch.optim.Adam(law.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    batch = min(len(values), 1024)
    bar = tqdm(range(how.steps), desc=f"Learning {law.site.name}", leave=False)
    for _ in bar:
        rows = torch.randint(len(values), (batch,), device=values.device)
        loss = -law.law(features[rows]).log_prob(values[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    law.requires_grad_(False)


def _measure(
    prepared: Prepared, relaxed: Relaxed, model: Model, how: Approximation
) -> None:
    """The distance on fresh draws, for none and each allowed intervention."""
    names = _needed(prepared, relaxed)
    made: list[dict[str, Any]] = [{}]
    for name in relaxed.allowed:
        if name in prepared.allowed.free:
            values = (
                _spread(prepared, name, 64)
                .double()
                .cpu()
                .quantile(torch.tensor([0.2, 0.8], dtype=torch.float64))
            )
            site = prepared.of[name].site
            made += [{name: v.to(site.value)} for v in values]
    made += [dict(one) for one in prepared.allowed.explicit]
    for i, one in enumerate(tqdm(made, desc="Checking", leave=False)):
        settings = {
            n: torch.as_tensor(v).to(prepared.of[n].site.value).expand(how.draws)
            for n, v in one.items()
        }
        seed = how.seed + 1000 + 2 * i
        true = drawn(model, names, how.draws, settings, seed, "Drawing to check")
        learned = _learned(prepared, relaxed, true, names, one, seed + 1)
        what = ", ".join(f"do({n} = {float(v):.3g})" for n, v in one.items()) or "none"
        relaxed.achieved[what] = _kolmogorov(true, learned, how.seed)


def _learned(
    prepared: Prepared,
    relaxed: Relaxed,
    true: Tensor,
    names: Sequence[str],
    made: Mapping[str, Any],
    seed: int,
) -> Tensor:
    """Draws of the learned sites, given true ones of those that are not learned."""
    columns = dict(zip(names, true.unbind(-1), strict=True))
    order = list(range(len(true)))
    with preserved_random_state(), torch.no_grad():
        torch.manual_seed(seed)
        for name in names:
            if name not in relaxed.laws:
                continue
            size = len(order)
            inputs = [relaxed._standard(n, columns[n]) for n in relaxed.inputs[name]]
            for n in relaxed.allowed:
                on = true.new_full((size,), float(n in made))
                value = torch.as_tensor(made.get(n, 0.0)).to(true)
                inputs += [on, on * relaxed._standard(n, value)]
            features = torch.stack(inputs or [true.new_zeros(size)], -1)
            columns[name] = relaxed.laws[name].law(features).sample().double()
    return torch.stack([columns[n] for n in names], -1)


def _kolmogorov(one: Tensor, other: Tensor, seed: int) -> float:
    """The largest distance of distribution functions, of columns and combinations."""
    generator = torch.Generator().manual_seed(seed)
    one, other = one.cpu(), other.cpu()
    spread = one.std(0).clamp(min=1e-12)
    size = one.shape[-1]
    mixed = torch.randn(
        PROJECTIONS, size, generator=generator, dtype=torch.float64, device="cpu"
    )
    mixed = torch.cat([torch.eye(size, dtype=torch.float64), mixed]) / spread
    first, second = (mixed @ x.T for x in (one, other))
    points = torch.cat([first, second], -1).sort(-1).values
    below = [
        torch.searchsorted(x.sort(-1).values, points, right=True) / x.shape[-1]
        for x in (first, second)
    ]
    return float((below[0] - below[1]).abs().max())
