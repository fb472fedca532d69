# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``Natural`` on random programs, against what they say by brute force.

A specification is drawn, and read twice. As a program: sites in a plate ``k`` that
stays and a plate ``o`` that is aggregated over, ancestors that are latent, given or
observed, and a site beside the micro state that tells of them. By hand: a finite
program as the table of all joint values of its ancestors and micro sites, jointly over
the slots of ``k``; a Gaussian one as one dense normal law.
"""

import itertools
import math
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro import poutine

import pyro_macro as pm

DIMS = {"k": -2, "o": -1}
WORLDS = 128  # joint values of the ancestors, at most
CELLS = 100_000  # of a table by hand, at most
ROLES = ("latent", "latent", "latent", "given", "observed")
ROLES_BESIDE = ("none", "none", "given", "ignored", "observed")


def several(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Node:
    """A site: its plates, its parents, and what is known of it."""

    name: str
    plates: tuple[str, ...]
    kind: str
    parents: tuple[str, ...] = ()
    role: str = "latent"
    width: int = 0


@dataclass(frozen=True)
class Spec:
    """A program and its macro-variable."""

    sizes: dict
    above: tuple[Node, ...]
    micro: tuple[Node, ...]
    beside: tuple[Node, ...]  # at most one site
    aggregation: str
    seed: int
    alike: bool  # whether micro sites have the same parameters
    same_value: bool  # in all slots
    beside_first: bool

    @property
    def nodes(self):
        return self.above + self.beside + self.micro

    @property
    def order(self):
        ends = (self.beside, self.micro)
        first, last = ends if self.beside_first else ends[::-1]
        return self.above + first + last

    def shape(self, node):
        return tuple(self.sizes[p] if p in node.plates else 1 for p in DIMS)

    def elements(self, node):
        """How many elements of one micro state the site has."""
        return (self.sizes["o"] if "o" in node.plates else 1) * (node.width or 1)

    @property
    def size(self):
        return sum(self.elements(node) for node in self.micro)

    @property
    def slots(self):
        return self.sizes.get("k", 1)

    @property
    def counted(self):
        """The sites that are known: given, or observed where they act on a part."""
        acting = {p for node in self.micro for p in node.parents}
        for node in reversed(self.above):
            if node.name in acting and node.role == "latent":
                acting |= set(node.parents)
        return [
            node
            for node in self.above + self.beside
            if node.role == "given"
            or (node in self.beside and node.role == "observed")
            or (node.role == "observed" and node.name in acting)
        ]

    @property
    def given(self):
        """What ``Natural`` is told to hold: an observed ancestor is held anyway."""
        beside = [n.name for n in self.beside if n.role in ("given", "observed")]
        return [n.name for n in self.above if n.role == "given"] + beside

    def macro(self):
        micro = [node.name for node in self.micro]
        over = "o" if any("o" in node.plates for node in self.micro) else ()
        return pm.MacroVariable(
            "total", micro, over, AGGREGATIONS[self.aggregation](self)
        )

    def numbers(self):
        return torch.Generator().manual_seed(self.seed)


def weights_of(spec):
    generator = torch.Generator().manual_seed(spec.seed + 1)
    return torch.rand(spec.size, generator=generator) + 0.5


def incommensurable(spec):
    """Weights without a common step, some of them equal."""
    return torch.tensor([1.0, 2**0.5, math.pi])[torch.arange(spec.size) * 2 % 3 % 2]


def halves(spec):
    """Weights that are multiples of one half."""
    return (weights_of(spec) * 2).round() / 2


def two_rows(spec):
    """The sum, and a sum with rising weights."""
    rising = 1 + torch.arange(spec.size) / 2
    return torch.stack([torch.ones(spec.size), rising])


def signed(spec):
    """Weights of both signs, the last one zero."""
    weights = halves(spec)
    weights[::2] *= -1
    return torch.cat([weights[:-1], torch.zeros(1)]) if len(weights) > 2 else weights


def wheel(state):
    """A function that is neither a sum nor monotone."""
    return (state * torch.arange(1.0, state.shape[-1] + 1)).sum(-1) % 3


def parity_table(spec):
    """Whether the sum is odd, as a table."""
    return {
        state: float(sum(state) % 2)
        for state in itertools.product(*[range(3)] * spec.size)
    }


AGGREGATIONS = {
    "sum": lambda spec: pm.Sum(),
    "mean": lambda spec: pm.Mean(),
    "halves": lambda spec: pm.Linear(halves(spec)),
    "incommensurable": lambda spec: pm.Linear(incommensurable(spec)),
    "signed": lambda spec: pm.Linear(signed(spec)),
    "pair": lambda spec: pm.Linear(two_rows(spec)),
    "count": lambda spec: pm.Count(1),
    "max": lambda spec: pm.Max(),
    "min": lambda spec: pm.Min(),
    "custom": lambda spec: pm.Custom(wheel),
    "table": lambda spec: pm.Coarsen(parity_table(spec)),
}
FINITE = list(AGGREGATIONS)
LINEAR = ["sum", "mean", "halves", "incommensurable", "signed", "pair"]
# Where no element of a state on the fibre can be beyond all bounds
BOUNDED = {"sum", "mean", "halves", "incommensurable", "pair", "max"}
COUNTS = {"poisson", "geometric"}


@st.composite
def specs(draw, kinds, kinds_above, aggregations, widths, switched=False):
    def some(things, chance=0.5):
        return tuple(t for t in things if draw(st.floats(0, 1)) < chance)

    pick = st.sampled_from
    sizes = draw(
        pick([{}, {"o": 2}, {"o": 3}, {"k": 2}, {"k": 2, "o": 2}] + [{"k": 2}])
    )
    kept = tuple(p for p in sizes if p == "k")
    above, worlds = [], 1
    if switched:  # one latent mixes, others are apart from it and from other slots
        plates = kept + some([p for p in sizes if p == "o"])
        above.append(Node("z0", plates, "bernoulli", (), draw(pick(ROLES))))
    for i in range(len(above), max(len(above), draw(pick([0, 1, 2, 2])))):
        kind, plates = draw(pick(kinds_above)), some(sizes, 0.6)
        plates = tuple({*kept, *plates}) if switched else plates
        role = draw(pick(ROLES))
        if kind == "normal" and kinds_above != ["normal"] and role == "latent":
            role = draw(pick(["given", "given", "observed", "observed", "latent"]))
        if kind != "normal" and role == "latent":
            own = {"bernoulli": 2, "three": 3}[kind]
            count = own ** math.prod(sizes[p] for p in plates)
            if worlds * count > WORLDS:
                plates, count = (), own
            worlds *= count
        parents = some([node.name for node in above], 0.7) if not switched else ()
        above.append(Node(f"z{i}", plates, kind, parents, role))
    names = [node.name for node in above]
    count = draw(st.integers(1, 3))
    micro = []
    for i in range(count):
        plates = kept + (
            ("o",) if "o" in sizes and (i == 0 or draw(st.booleans())) else ()
        )
        width = draw(pick(widths))
        if count == 1 and "o" not in sizes:
            width = 2
        kind = draw(pick(kinds)) if i == 0 or draw(st.booleans()) else micro[0].kind
        micro.append(Node(f"x{i}", plates, kind, some(names, 0.7), "latent", width))
    beside = []
    role = draw(pick(ROLES_BESIDE))
    if names and role != "none":
        kind = "bernoulli" if kinds_above != ["normal"] else "normal"
        plates, parents = some(sizes), some(names, 0.8)
        if switched:
            plates, parents = tuple({*kept, *plates}), (draw(pick(names)),)
        beside = [Node("e", plates, kind, parents, role)]
    spec = Spec(
        sizes,
        tuple(above),
        tuple(micro),
        tuple(beside),
        draw(pick(aggregations)),
        draw(st.integers(0, 10**6)),
        draw(st.integers(0, 3)) == 0,
        draw(st.booleans()),
        draw(st.booleans()),
    )
    most = 5 if spec.sizes.get("k") else 6
    if spec.size > most or (spec.size > 3 and COUNTS & {n.kind for n in micro}):
        alone = 0 if "o" in micro[0].plates else 2
        spec = replace(spec, micro=(replace(micro[0], width=alone),))
    if COUNTS & {n.kind for n in micro} and draw(st.integers(0, 3)):
        bounded = [a for a in aggregations if a in BOUNDED]
        spec = replace(spec, aggregation=draw(pick(bounded)))
    if spec.aggregation == "pair" and spec.size < 3:
        spec = replace(spec, aggregation="sum")
    return spec


class Numbers:
    """The coefficients of a specification: of each edge, and of each site."""

    def __init__(self, spec):
        generator, self.spec = spec.numbers(), spec

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        self.edges, self.slopes, self.centre, self.scale, self.root = {}, {}, {}, {}, {}
        width = {node.name: node.width or 1 for node in spec.nodes}
        for node in spec.nodes:
            shape, own = spec.shape(node), width[node.name]
            alike = spec.alike and node in spec.micro
            first = spec.micro[0].name
            self.centre[node.name] = normal(*shape, own)
            if alike:
                self.centre[node.name] = torch.full((*shape, own), 0.3)
            self.scale[node.name] = 0.5 + torch.rand(*shape, own, generator=generator)
            square = normal(own, own)
            self.root[node.name] = torch.linalg.cholesky(
                square @ square.mT + torch.eye(own)
            )
            for parent in node.parents:
                matrix, slope = normal(own, width[parent]), normal(*shape, 1)
                if alike and node.name != first and (first, parent) in self.edges:
                    matrix = self.edges[first, parent][:1].expand(own, -1)
                    slope = torch.ones(*shape, 1)
                self.edges[node.name, parent] = matrix
                self.slopes[node.name, parent] = slope


def batch_shape(spec, node):
    """The shape of a site within its plates, as Pyro has it."""
    shape = spec.shape(node)
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def program_of(spec, law, numbers, observed):
    """The program: ``law(node, location)`` is a distribution with an event dim."""

    def program():
        plates = {p: pyro.plate(p, n, dim=DIMS[p]) for p, n in spec.sizes.items()}
        where = {node.name: node.plates for node in spec.nodes}
        values = {}
        for node in spec.order:
            location = numbers.centre[node.name]
            for parent in node.parents:
                term = values[parent] @ numbers.edges[node.name, parent].mT
                for p in set(where[parent]) - set(node.plates):
                    term = term.mean(DIMS[p] - 1, keepdim=True)
                location = location + term * numbers.slopes[node.name, parent]
            depth = len(batch_shape(spec, node))
            while location.dim() > depth + 1 and location.shape[0] == 1:
                location = location.squeeze(0)
            with ExitStack() as stack:
                for p in node.plates:
                    stack.enter_context(plates[p])
                value = pyro.sample(
                    node.name, law(node, location), obs=observed.get(node.name)
                )
            value = torch.as_tensor(value, dtype=torch.get_default_dtype())
            values[node.name] = value if node.width else value.unsqueeze(-1)

    return program


def elements(spec, node, value):
    """The value of a site, shape ``(k, o, width)``."""
    value = value.double() if node.width else value.double().unsqueeze(-1)
    return value.expand(*spec.shape(node), node.width or 1)


def observations(spec):
    """What is seen of the sites that the program observes."""
    generator = torch.Generator().manual_seed(spec.seed + 2)
    return {
        node.name: torch.randint(
            2, batch_shape(spec, node), generator=generator
        ).double()
        for node in spec.above + spec.beside
        if node.role in ("observed", "ignored")
    }


# Finite programs


def finite_law(node, location):
    width = len(location.shape) > 0 and node.width
    t = location if width else location[..., 0]
    if node.kind == "normal":
        fn = dist.Normal(t, 1.0)
    elif node.kind == "bernoulli":
        fn = dist.Bernoulli(logits=t)
    elif node.kind in ("categorical", "three"):
        fn = dist.Categorical(logits=torch.stack([0.3 * t, -t, 0.0 * t], -1))
    elif node.kind == "binomial":
        fn = dist.Binomial(2, logits=t)
    elif node.kind == "poisson":
        fn = dist.Poisson((t / 2).clamp(-2, 2).exp())
    else:
        fn = dist.Geometric(logits=t.clamp(-2, 2))
    return fn.to_event(1) if width else fn


def is_refused(spec):
    """What has no law, as documented: the fibre, or what is upstream, is infinite."""
    if COUNTS & {node.kind for node in spec.micro} and spec.aggregation not in BOUNDED:
        return True
    by_name = {node.name: node for node in spec.above}

    def sources(names):
        found = {n for n in names if by_name[n].role == "latent"}
        return found.union(*(sources(by_name[n].parents) for n in found))

    relevant = set().union(*(sources(node.parents) for node in spec.micro))
    for _ in spec.counted:
        for node in spec.counted:
            tells_of = sources(node.parents)
            relevant |= tells_of if tells_of & relevant else set()
    return any(by_name[name].kind == "normal" for name in relevant)


def support(node, top):
    """The values of a site, counts up to ``top``."""
    ends = {"bernoulli": 1, "categorical": 2, "binomial": 2}
    return torch.arange(ends.get(node.kind, top) + 1.0)


def states_of(spec, top):
    """All micro states of one slot, shape ``(n, K)``."""
    supports = [
        support(node, top).tolist()
        for node in spec.micro
        for _ in range(spec.elements(node))
    ]
    return torch.tensor(list(itertools.product(*supports)))


def is_injective(spec, macro, top):
    """Whether nothing is aggregated: no two micro states have the same macro value."""
    endless = COUNTS & {node.kind for node in spec.micro}
    if spec.aggregation in ("count", "max", "min"):
        return False
    if endless and spec.aggregation != "incommensurable":
        return False
    states = states_of(spec, top + 2 if endless else top)
    totals = macro.aggregation(states).reshape(len(states), -1).mul(1e6).round()
    return 1 < len(totals) == len(totals.unique(dim=0))


class Table:
    """A finite program as a table: log ``P(worlds)``, log ``P(states | world)``.

    :ivar states: micro states of one slot, shape ``(n, K)``.
    :ivar each: shape ``(n, worlds, slots)``.
    """

    def __init__(self, spec, program, held, top):
        latent = [
            node
            for node in spec.above
            if node.role == "latent" and node.kind != "normal"
        ]
        shapes = [spec.shape(node) for node in latent]
        choices = [
            range(3 if node.kind == "three" else 2)
            for node, shape in zip(latent, shapes, strict=True)
            for _ in range(math.prod(shape))
        ]
        worlds = torch.tensor(list(itertools.product(*choices))).reshape(
            math.prod(len(c) for c in choices), len(choices)
        )
        data, start = dict(held), 0
        for node in spec.above:
            if node.role == "latent":
                data[node.name] = torch.zeros(spec.shape(node))  # if it does not matter
        for node, shape in zip(latent, shapes, strict=True):
            own = worlds[:, start : start + math.prod(shape)]
            data[node.name] = own.reshape(-1, *shape).double()
            start += math.prod(shape)
        with pyro.plate("worlds", len(worlds), dim=-3):
            trace = poutine.trace(poutine.condition(program, data)).get_trace()
        nodes = trace.nodes
        self.weight = torch.zeros(len(worlds))
        for node in [*latent, *spec.counted]:
            site = nodes[node.name]
            part = site["fn"].log_prob(site["value"])
            self.weight = self.weight + part.sum((-1, -2))

        self.states = states_of(spec, top)
        assert len(self.states) * len(worlds) * spec.slots <= 40 * CELLS
        index, tables = self.states.long(), []
        for node in spec.micro:
            fn = nodes[node.name]["fn"]
            while hasattr(fn, "base_dist"):
                fn = fn.base_dist
            shape = (len(worlds), *fn.batch_shape[1:3], node.width or 1)
            own = torch.stack([fn.log_prob(v) for v in support(node, top)])
            own = own.reshape(-1, *shape).expand(-1, -1, spec.slots, -1, -1)
            tables += own.flatten(3).unbind(-1)  # (values, worlds, slots)
        self.each = sum(
            table[i] for table, i in zip(tables, index.unbind(-1), strict=True)
        )

    def condition(self, on):
        """Keeps the states on the fibre of each slot, ``on``, shape ``(n, slots)``."""
        self.on = on
        self.own = torch.where(on.unsqueeze(1), self.each, -torch.inf)
        self.slots = self.own.logsumexp(0)  # (worlds, slots)
        self.log_total = (self.weight + self.slots.sum(-1)).logsumexp(0)

    def joint(self, rows):
        """The log probability of a state for each slot, given the macro values."""
        slot = torch.arange(self.each.shape[-1])
        each = self.own[rows, :, slot].sum(0)
        return (self.weight + each).logsumexp(0) - self.log_total

    def marginal(self, slot):
        """The log probabilities of all states of one slot, given all macro values."""
        rest = self.weight + self.slots.sum(-1) - self.slots[:, slot]
        return (self.own[..., slot] + rest).logsumexp(-1) - self.log_total


def macro_values(spec, macro):
    """A macro value for each slot, of some states that can be: ``(slots, m)``."""
    generator = torch.Generator().manual_seed(spec.seed + 3)
    parts = []
    for node in spec.micro:
        most = 2 if node.kind in ("categorical", "binomial") else 1
        shape = (spec.slots, spec.elements(node))
        parts.append(torch.randint(most + 1, shape, generator=generator).double())
    states = torch.cat(parts, -1)
    if spec.same_value:
        states = states[:1].expand(spec.slots, -1)
    return macro.aggregation(states).reshape(spec.slots, -1)


def largest_count(spec, values, macro):
    """The largest value of a count in a state with these macro values."""
    if spec.aggregation == "max":
        return int(values.max())
    weights = macro.aggregation.weights(torch.zeros(spec.size))[0]
    return math.floor(float(values[:, 0].max() / weights.min()) + 1e-6)


def as_value(spec, macro, values):
    """Macro values as a tensor that broadcasts against the plate that stays."""
    values = values if macro.aggregation.event_dim else values.squeeze(-1)
    return values.unsqueeze(1) if "k" in spec.sizes else values[0]


def check_finite(spec):
    numbers, macro, seen = Numbers(spec), spec.macro(), observations(spec)
    program = program_of(spec, finite_law, numbers, seen)
    values = macro_values(spec, macro)
    realization = pm.Natural(as_value(spec, macro, values), given=spec.given)
    pyro.set_rng_seed(spec.seed)
    intervened = pm.macro_do(program, {macro: realization})
    if is_refused(spec):
        with pytest.raises(
            pm.UnsupportedLaw, match="infinitely many|not finite|given="
        ):
            intervened()
        return
    has_counts = COUNTS & {node.kind for node in spec.micro}
    top = largest_count(spec, values, macro) if has_counts else 2
    if is_injective(spec, macro, top):
        with pytest.raises(pm.NotAMicroState, match="injective on its"):
            intervened()
        return
    nodes = poutine.trace(intervened).get_trace().nodes
    law = nodes["total__micro"]["fn"]
    held = {n: nodes[n]["value"] for n in spec.given if n not in seen}
    table = Table(spec, program, held, top)
    macro_of = macro.aggregation(table.states).reshape(len(table.states), 1, -1)
    table.condition(torch.isclose(macro_of, values, atol=1e-6).all(-1))

    # The state that was drawn
    parts = [
        elements(spec, node, nodes[node.name]["value"]).reshape(spec.slots, -1)
        for node in spec.micro
    ]
    drawn = torch.cat(parts, -1)
    rows = torch.stack(
        [(table.states == state).all(-1).nonzero()[0, 0] for state in drawn]
    )
    found = law.log_prob(nodes["total__micro"]["value"]).sum()
    torch.testing.assert_close(found, table.joint(rows), rtol=1e-8, atol=1e-8)

    if not spec.counted:
        total = law.log_total.expand(law.batch_shape).sum()
        torch.testing.assert_close(total, table.log_total, rtol=1e-8, atol=1e-8)

    draws = law.sample(torch.Size([300]))
    if law.event_shape[0] == spec.size:  # slots apart: all states of each
        draws = draws.flatten(1, -2) if draws.dim() > 2 else draws.unsqueeze(1)
        law._validate_args = False  # a state of one slot is none of another
        batch = (1,) * len(law.batch_shape)
        for slot in range(spec.slots):
            states = table.states[table.on[:, slot]]
            wanted = table.marginal(slot)[table.on[:, slot]]
            torch.testing.assert_close(wanted.exp().sum(), torch.tensor(1.0))
            found = law.log_prob(states.reshape(-1, *batch, spec.size))
            found = found.reshape(len(states), -1).expand(-1, spec.slots)[:, slot]
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
            assert_draws_follow(draws[:, slot], states, wanted.exp())
    elif law.has_enumerate_support:
        states = law.enumerate_support()
        probability = law.log_prob(states).exp()
        torch.testing.assert_close(probability.sum(), torch.tensor(1.0))
        assert_draws_follow(draws, states, probability)


def assert_draws_follow(draws, states, probability):
    """The mean of a function of the draws, within six standard errors."""
    wave = torch.cos(torch.arange(1.0, states.shape[-1] + 1))
    found, at = draws.double() @ wave, states @ wave
    mean = (probability * at).sum()
    spread = (probability * (at - mean).square()).sum().sqrt()
    # A rare state that was drawn is no error
    rare = 3 * (at.max() - at.min()) / len(draws)
    assert (found.mean() - mean).abs() <= 6 * spread / len(draws) ** 0.5 + rare + 1e-9


# Gaussian programs


def gaussian_law(numbers):
    def law(node, location):
        if node.kind == "bernoulli":
            return dist.Bernoulli(logits=location[..., 0])
        scale = numbers.scale[node.name]
        scale = scale.reshape(*batch_shape(numbers.spec, node), -1)
        if not node.width:
            return dist.Normal(location[..., 0], scale[..., 0])
        if node.kind == "normal":
            return dist.Normal(location, scale).to_event(1)
        return dist.MultivariateNormal(location, scale_tril=numbers.root[node.name])

    return law


class Dense:
    """A Gaussian program as one normal law of all its elements, by its equations.

    :param switches: the values of sites that are not Gaussian, by name.
    :ivar place: where the elements of each site are, shape ``(k, o, width)``.
    """

    def __init__(self, spec, numbers, switches):
        self.place, count = {}, 0
        for node in spec.nodes:
            shape = (*spec.shape(node), node.width or 1)
            self.place[node.name] = (
                torch.arange(math.prod(shape)).reshape(shape) + count
            )
            count += math.prod(shape)
        acts, centre = torch.zeros(count, count), torch.zeros(count)
        noise = torch.zeros(count, count)
        for node in spec.nodes:
            own, name = self.place[node.name], node.name
            centre[own] = switches.get(name, numbers.centre[name]).expand(own.shape)
            if name in switches:
                continue
            for k, o in itertools.product(*map(range, own.shape[:2])):
                at = own[k, o]
                root = numbers.root[name]
                if node.kind == "normal" or not node.width:
                    root = numbers.scale[name][k, o].diag()
                noise[at[:, None], at] = root
                for parent in node.parents:
                    slope = (
                        numbers.edges[name, parent] * numbers.slopes[name, parent][k, o]
                    )
                    self._add(acts, at, self.place[parent], (k, o), own.shape, slope)
        effect = torch.linalg.inv(torch.eye(count) - acts)
        self.mean, root = effect @ centre, effect @ noise
        self.covariance = root @ root.mT

    @staticmethod
    def _add(acts, at, parent, slot, shape, slope):
        """A parent in a plate that the child is not in acts by its average."""
        places = [
            [slot[d]]
            if parent.shape[d] > 1 and shape[d] > 1
            else range(parent.shape[d])
            for d in range(2)
        ]
        cells = list(itertools.product(*places))
        for cell in cells:
            acts[at[:, None], parent[cell]] += slope / len(cells)

    def condition(self, rows, values):
        """Conditions on ``rows @ x == values``, whose log density it returns."""
        law = dist.MultivariateNormal(
            rows @ self.mean, rows @ self.covariance @ rows.mT
        )
        crossed = self.covariance @ rows.mT
        gain = torch.linalg.solve(rows @ crossed, crossed.mT).mT
        self.mean = self.mean + gain @ (values - rows @ self.mean)
        self.covariance = self.covariance - gain @ crossed.mT
        return law.log_prob(values)


def switches_of(spec, numbers, nodes):
    """The joint values of the sites that mix, and the log weight of each."""
    mixing = [node for node in spec.above if node.kind == "bernoulli"]
    if not mixing:
        return [({}, 0.0)]
    (node,) = mixing
    shape = spec.shape(node)
    if node.role != "latent":
        return [({node.name: elements(spec, node, nodes[node.name]["value"])}, 0.0)]
    law, found = dist.Bernoulli(logits=numbers.centre[node.name]), []
    for bits in itertools.product([0.0, 1.0], repeat=math.prod(shape)):
        value = torch.tensor(bits).reshape(*shape, 1)
        found.append(({node.name: value}, law.log_prob(value).sum()))
    return found


def check_gaussian(spec):
    numbers, macro, seen = Numbers(spec), spec.macro(), observations(spec)
    program = program_of(spec, gaussian_law(numbers), numbers, seen)
    rows_of_one = macro.aggregation.weights(torch.zeros(spec.size))
    m = len(rows_of_one)
    generator = torch.Generator().manual_seed(spec.seed + 3)
    values = 3 * torch.randn(spec.slots, m, generator=generator)
    if spec.same_value:
        values = values[:1].expand(spec.slots, m)
    realization = pm.Natural(as_value(spec, macro, values), given=spec.given)
    pyro.set_rng_seed(spec.seed)
    intervened = pm.macro_do(program, {macro: realization})
    nodes = poutine.trace(intervened).get_trace().nodes
    law, latent = nodes["total__micro"]["fn"], nodes["total__micro"]["value"]

    worlds = switches_of(spec, numbers, nodes)
    laws = [Dense(spec, numbers, switches) for switches, _ in worlds]
    place, size = laws[0].place, len(laws[0].mean)
    micro = [place[node.name].reshape(spec.slots, -1) for node in spec.micro]
    micro = torch.cat(micro, -1)  # where the elements of each slot are
    rows = torch.zeros(spec.slots, m, size)
    index = micro.unsqueeze(1).expand(-1, m, -1)
    rows.scatter_(2, index, rows_of_one.expand(spec.slots, -1, -1))
    rows, target = rows.flatten(0, 1), values.flatten()
    drawn = torch.zeros(size)
    for node in spec.micro:
        value = elements(spec, node, nodes[node.name]["value"])
        drawn[place[node.name].flatten()] = value.flatten()
    torch.testing.assert_close(rows @ drawn, target, rtol=1e-9, atol=1e-9)

    # Each world: what is known, then the macro values; its weight and its density
    free = micro[:, without_last(rows_of_one)].flatten()
    known = [n for n in spec.counted if n.kind != "bernoulli"]
    weights, densities = [], []
    for dense, (_, weight) in zip(laws, worlds, strict=True):
        for node in known:
            value = elements(spec, node, nodes[node.name]["value"])
            at = torch.eye(size)[place[node.name].flatten()]
            told = dense.condition(at, value.flatten())
            weight = weight + (told if len(worlds) > 1 else 0.0)
        weights.append(weight + dense.condition(rows, target))
        law_of_free = dist.MultivariateNormal(
            dense.mean[free], dense.covariance[free][:, free]
        )
        densities.append(law_of_free.log_prob(drawn[free]))
    weights, densities = torch.stack(weights), torch.stack(densities)
    share = weights.softmax(0)
    wanted = (share.log() + densities).logsumexp(0)
    found = law.log_prob(latent).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    if len(worlds) == 1 or not known:
        found = law.log_total.expand(law.batch_shape).sum()
        torch.testing.assert_close(found, weights.logsumexp(0), rtol=1e-7, atol=1e-7)

    # Draws differ: they tell which element of the law is which of the program
    every = micro.flatten()
    order = (latent.reshape(-1, 1) - drawn[every]).abs().argmin(1)
    assert len(order.unique()) == len(every)
    order = every[order]
    wanted = sum(p * dense.mean for p, dense in zip(share, laws, strict=True))[order]
    found = law.mean.expand(latent.shape).reshape(-1)
    assert ((found - wanted).abs() <= 1e-7 * (1 + wanted.abs())).all()
    assert_means_follow(law.sample(torch.Size([300])), law)
    if len(worlds) == 1:
        covariance = laws[0].covariance[order][:, order]
        blocks = law.covariance_matrix.expand(latent.shape + latent.shape[-1:])
        blocks = torch.block_diag(*blocks.reshape(-1, *blocks.shape[-2:]))
        torch.testing.assert_close(blocks, covariance, rtol=1e-7, atol=1e-7)


def assert_means_follow(draws, law):
    """The means of the elements of draws, within six standard errors."""
    miss = (draws.mean(0) - law.mean).abs()
    error = (law.variance.clamp(min=0) / len(draws)).sqrt()
    # A world that is rare, but far away, need not have been drawn
    rare = 3 * (draws - law.mean).abs().amax(0) / len(draws)
    assert (miss <= 6 * error + rare + 1e-9).all()


def without_last(rows):
    """The elements but the last ones that can be solved for."""
    m, keep, solved = len(rows), list(range(rows.shape[1])), []
    for k in reversed(range(rows.shape[1])):
        if torch.linalg.matrix_rank(rows[:, [*solved, k]]) > len(solved):
            solved.append(k)
            keep.remove(k)
    assert len(solved) == m
    return keep


# The suites

finite_specs = specs(
    ["bernoulli", "categorical", "binomial", "poisson", "geometric"],
    ["bernoulli", "bernoulli", "three", "normal"],
    FINITE,
    [0, 0, 0, 2],
)
gaussian_specs = specs(["normal", "full"], ["normal"], LINEAR, [0, 0, 2])
mixed_specs = specs(["normal", "full"], ["normal"], LINEAR, [0, 0, 2], switched=True)


@several(350)
@given(finite_specs)
def test_natural_law_of_a_random_finite_program_is_that_of_its_table(spec):
    check_finite(spec)


@several(150)
@given(gaussian_specs)
def test_natural_law_of_a_random_gaussian_program_is_that_of_its_dense_law(spec):
    check_gaussian(spec)


@several(100)
@given(mixed_specs)
def test_natural_law_of_a_random_mixture_is_that_of_its_dense_laws(spec):
    check_gaussian(spec)


def test_joint_law_of_vectors_of_macro_values_can_be_enumerated():
    """A cause in the plate that is aggregated over, two values for each slot."""
    node = Node("z0", ("o",), "bernoulli")
    micro = tuple(Node(f"x{i}", ("k", "o"), "categorical", ("z0",)) for i in range(2))
    sizes = {"k": 2, "o": 2}
    spec = Spec(sizes, (node,), micro, (), "pair", 0, True, False, False)
    check_finite(spec)


@pytest.mark.slow
@several(3000)
@given(finite_specs)
def test_natural_law_of_many_random_finite_programs(spec):
    check_finite(spec)


@pytest.mark.slow
@several(2000)
@given(st.one_of(gaussian_specs, mixed_specs))
def test_natural_law_of_many_random_gaussian_programs_and_mixtures(spec):
    check_gaussian(spec)
