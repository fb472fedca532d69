# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Random programs of finite sites, read twice: by Pyro, and by listing all states.

A specification is a list of nodes with tables. ``Spec.model`` is a program of it, which
indexes into the tables and runs under any dimensions to the left. ``Oracle`` multiplies
the tables out with numpy, state by state, and knows neither Pyro nor the library.
"""

import itertools
from contextlib import ExitStack
from dataclasses import dataclass, field

import networkx as nx
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch.distributions import constraints

import pyro_macro as pm

DIMS = {"k": -2, "o": -1}  # a plate that may stay, and one that is aggregated over
STATES = 3000  # joint states of a program, at most


@dataclass(frozen=True, eq=False)
class Node:
    """A site. Its row of the table is ``(offset + sum of c * parent) mod rows``.

    :ivar table: probabilities, shape ``(rows, values)``; of a deterministic node only
        the number of rows counts: its value is the index of the row.
    :ivar offset: shape ``(k, o, width)``, with ones for the plates it is not in.
    """

    name: str
    kind: str
    table: np.ndarray
    offset: np.ndarray
    plates: tuple = ()
    width: int = 0
    parents: tuple = ()  # of pairs: name, coefficient

    @property
    def values(self):
        return range(self.table.shape[1])


@dataclass(frozen=True, eq=False)
class Macro:
    """An aggregation, as the library has it, and by hand on ``(..., K)``."""

    name: str
    micro: tuple
    over: tuple
    aggregation: object
    by_hand: object

    @property
    def variable(self):
        return pm.MacroVariable(self.name, self.micro, self.over, self.aggregation)

    @property
    def is_vector(self):
        return self.aggregation.event_dim == 1


@dataclass(frozen=True, eq=False)
class Spec:
    nodes: tuple
    sizes: dict = field(default_factory=lambda: {"k": 2, "o": 2})

    def __getitem__(self, name):
        return next(node for node in self.nodes if node.name == name)

    @property
    def graph(self):
        graph = nx.DiGraph()
        graph.add_nodes_from(node.name for node in self.nodes)
        for node in self.nodes:
            graph.add_edges_from((parent, node.name) for parent, _ in node.parents)
        return graph

    def model(self):
        values = {}
        plates = {p: pyro.plate(p, self.sizes[p], dim=DIMS[p]) for p in DIMS}
        for node in self.nodes:
            row = self._offset(node)
            for name, c in node.parents:
                row = row + c * self._seen(self[name], node, values[name])
            row = row.remainder(len(node.table))
            with ExitStack() as stack:
                for plate in node.plates:
                    stack.enter_context(plates[plate])
                values[node.name] = self._site(node, row)

    def _offset(self, node):
        shape = [self.sizes[p] if p in node.plates else 1 for p in DIMS]
        while shape and shape[0] == 1:
            shape.pop(0)
        shape += [node.width] * bool(node.width)
        return torch.as_tensor(node.offset.reshape(shape)).double()

    @staticmethod
    def _seen(parent, node, value):
        """A parent as its child sees it: summed where the child has no place."""
        value = value.double()
        if parent.width:
            value = value.sum(-1)
        for plate in ("o", "k"):
            if plate in parent.plates and plate not in node.plates:
                value = value.sum(DIMS[plate], keepdim=True)
        return value.unsqueeze(-1) if node.width else value

    @staticmethod
    def _site(node, row):
        event = int(bool(node.width))
        if node.kind == "deterministic":
            return pyro.deterministic(node.name, row, event_dim=event)
        probs = torch.as_tensor(node.table)[row.long()]
        if node.kind == "bernoulli":
            fn = dist.Bernoulli(probs[..., 1])
        elif node.kind == "binomial":
            # The table has the probability of one success behind all others
            fn = dist.Binomial(len(node.values) - 1, success(probs))
        else:
            fn = dist.Categorical(probs)
        return pyro.sample(node.name, fn.to_event(event))


def success(probs):
    """Of binomial probabilities: that of a success, their mean over their number."""
    n = probs.shape[-1] - 1
    return (probs @ torch.arange(n + 1.0, dtype=probs.dtype) / n).clamp(0, 1)


class Oracle:
    """All joint states of a specification, with their probabilities."""

    def __init__(self, spec):
        self.spec = spec
        random = [n for n in spec.nodes if n.kind != "deterministic"]
        supports = [list(n.values) for n in random for _ in range(n.offset.size)]
        grid = np.array(list(itertools.product(*supports)), dtype=float)
        self.values, self.probs, at = {}, {}, 0
        for node in spec.nodes:
            row = node.offset[None].astype(float)
            for name, c in node.parents:
                row = row + c * self._seen(spec[name], node, self.values[name])
            row = np.broadcast_to(row, (len(grid),) + node.offset.shape)
            row = np.remainder(row, len(node.table)).astype(int)
            if node.kind == "deterministic":
                self.values[node.name] = row.astype(float)
                continue
            size = node.offset.size
            value = grid[:, at : at + size].reshape((-1,) + node.offset.shape)
            at += size
            self.values[node.name] = value
            probs = node.table[row, value.astype(int)]
            self.probs[node.name] = probs.reshape(len(grid), -1).prod(-1)

    @staticmethod
    def _seen(parent, node, value):
        if parent.width:
            value = value.sum(3, keepdims=True)
        for axis, plate in [(2, "o"), (1, "k")]:
            if plate in parent.plates and plate not in node.plates:
                value = value.sum(axis, keepdims=True)
        return value

    @classmethod
    def of_runs(cls, model, sites, *args):
        """Of a program as it is: run under each joint state, one at a time.

        :param sites: for each random site its values, and its shape ``(k, o, width)``.
        """
        self = cls.__new__(cls)
        counts = [int(np.prod(shape)) for _, shape in sites.values()]
        supports = [
            list(values)
            for (values, _), n in zip(sites.values(), counts, strict=True)
            for _ in range(n)
        ]
        rows = {}
        self.probs = {name: [] for name in sites}
        drawn = pyro.poutine.trace(model).get_trace(*args)
        for state in itertools.product(*supports):
            parts = np.split(np.array(state, dtype=float), np.cumsum(counts)[:-1])
            held = {
                name: torch.as_tensor(part).to(drawn.nodes[name]["value"].dtype)
                for name, part in zip(sites, parts, strict=True)
            }
            held = {
                n: v.reshape(drawn.nodes[n]["value"].shape) for n, v in held.items()
            }
            conditioned = pyro.poutine.condition(model, data=held)
            with pyro.poutine.block():
                trace = pyro.poutine.trace(conditioned).get_trace(*args)
            trace.compute_log_prob()
            for name, node in trace.nodes.items():
                if name in sites:
                    log_prob = node["log_prob"].double().sum()
                    impossible = log_prob < -30  # torch clamps logarithms of zero
                    self.probs[name].append(
                        0.0 if impossible else log_prob.exp().item()
                    )
                    shape = sites[name][1]
                elif node["type"] == "sample" and node["fn"].has_rsample is not None:
                    shape = (1, 1, -1)
                else:
                    continue
                value = node["value"].detach().double().numpy()
                rows.setdefault(name, []).append(value.reshape(shape))
        self.values = {name: np.stack(value) for name, value in rows.items()}
        self.probs = {name: np.array(value) for name, value in self.probs.items()}
        return self

    def stacked(self, names, over=()):
        """The micro states of each slot: ``(N, slots, K)``."""
        parts = []
        for name in names:
            value = self.values[name]  # (N, k, o, w)
            order = [0] + [a for a, p in ((1, "k"), (2, "o")) if p not in over]
            order += [a for a, p in ((1, "k"), (2, "o")) if p in over] + [3]
            kept = 3 - len(over)
            value = value.transpose(order)
            slots = int(np.prod(value.shape[1:kept]))
            parts.append(value.reshape(len(value), slots, -1))
        return np.concatenate(parts, -1)

    def of(self, thing):
        """The value of a macro-variable or site in each state, ``(N, size)``."""
        if isinstance(thing, str):
            return self.values[thing].reshape(len(self.values[thing]), -1)
        state = self.stacked(thing.micro, thing.over)
        return thing.by_hand(state).reshape(len(state), -1)

    def joint(self):
        return np.prod(list(self.probs.values()), axis=0)

    def question(self, cause, effect, given=()):
        return Truth(self, cause, effect, given)


def distinct(rows):
    """The different rows but for rounding, and which each one is."""
    _, first, index = np.unique(
        np.round(rows, 9) + 0.0, axis=0, return_index=True, return_inverse=True
    )
    return rows[first], index.reshape(-1)


class Truth:
    """What is seen and what is done, from the list of states."""

    def __init__(self, oracle, cause, effect, given=()):
        self.oracle, self.cause, self.given = oracle, cause, given
        self.slot_states = oracle.stacked(cause.micro, cause.over)
        n, self.slots, self.size = self.slot_states.shape
        self.macro = oracle.of(cause).reshape(n, self.slots, -1)
        self.outcomes, self.outcome = distinct(oracle.of(effect))
        self.states, self.state = distinct(self.slot_states.reshape(n, -1))
        self.joint = oracle.joint()
        micro = cause.micro
        self.cut = np.prod(
            [p for m, p in oracle.probs.items() if m not in micro] + [np.ones(n)],
            axis=0,
        )
        self.context = np.zeros(n, dtype=int)
        if given:
            rows = np.concatenate([oracle.of(g) for g in given], -1)
            self.context = distinct(rows)[1]
        self.kernel = self._table(self.state, self.outcome, self.cut)

    def _table(self, first, second, weight):
        size = first.max() + 1, second.max() + 1
        table = np.zeros(size)
        np.add.at(table, (first, second), weight)
        return table

    def inside(self, value):
        """Which states have a macro value, in all slots."""
        value = np.asarray(value, dtype=float).reshape(-1)
        return np.isclose(self.macro, value).all((1, 2))

    def reachable(self):
        """The macro values of positive probability, the same in all slots."""
        same = (np.abs(self.macro - self.macro[:, :1]) < 1e-9).all((1, 2))
        rows = self.macro[same & (self.joint > 0)][:, 0]
        rows = distinct(rows)[0]
        return rows if self.cause.is_vector else rows[:, 0]

    def reachable_in_all_contexts(self):
        contexts = [c for c in set(self.context) if self.cut_of(c) > 0]
        return [
            value
            for value in self.reachable()
            if all(
                (self.joint * self.inside(value))[self.context == c].sum() > 0
                for c in contexts
            )
        ]

    def cut_of(self, context):
        """The probability of a context, which the micro state does not act on."""
        return self.joint[self.context == context].sum()

    def seen(self, value):
        """``P(yb | xb)``."""
        weight = self.joint * self.inside(value)
        row = np.bincount(self.outcome, weight, minlength=len(self.outcomes))
        return row / row.sum()

    def natural(self, value, within=True):
        """``P(x | xb)``, a row over micro states."""
        weight = self.joint * self.inside(value) * within
        row = np.bincount(self.state, weight, minlength=len(self.states))
        return row / row.sum()

    def done(self, weights):
        """``P(yb | do(xb))`` of a micro-realization, by the truncated factorization."""
        return weights @ self.kernel

    def done_given(self, value):
        """The same under ``P(x | xb, b)``, with the ``b`` of each state."""
        result = np.zeros(len(self.outcomes))
        for c in set(self.context):
            if self.cut_of(c) > 0:
                weights = self.natural(value, self.context == c)[self.state]
                weight = weights * self.cut * (self.context == c)
                result += np.bincount(
                    self.outcome, weight, minlength=len(self.outcomes)
                )
        return result

    def fibre(self, value, slot=None):
        """The states of one slot with a macro value, whatever their probability.

        :param slot: without those with an element that never has its value there.
        """
        rows = self.slot_states
        states = distinct(rows.reshape(-1, self.size))[0]
        if slot is not None:
            known = rows[self.joint > 0, slot]
            can = [(np.abs(known - state) < 1e-9).any(0).all() for state in states]
            states = states[can]
        value = np.asarray(value, dtype=float).reshape(-1)
        macro = self.cause.by_hand(states).reshape(len(states), -1)
        return states[np.isclose(macro, value).all(-1)]

    def uniform(self, value):
        """A row over micro states: in each slot those that it can have, alike."""
        rows = self.states.reshape(len(self.states), self.slots, -1)
        result = np.ones(len(rows))
        for slot in range(self.slots):
            states = self.fibre(value, slot)
            same = np.isclose(rows[:, slot, None], states[None]).all(-1).any(-1)
            result *= same / len(states)
        return result

    def independent(self, states, weights):
        """A row over micro states: slots are independent, and alike."""
        rows = self.states.reshape(len(self.states), self.slots, -1)
        same = np.isclose(rows[:, :, None], states[None, None]).all(-1)
        return (same @ weights).prod(-1)

    def moments(self, row):
        mean = row @ self.outcomes
        return mean, row @ (self.outcomes - mean) ** 2


class AnyRow(constraints.Constraint):
    event_dim, is_discrete = 1, True

    def check(self, value):
        return torch.ones(value.shape[:-1], dtype=torch.bool)


class Listed(TorchDistribution):
    """Rows of numbers with probabilities: a law of the tests, for ``Explicit``."""

    arg_constraints = {}

    def __init__(self, states, weights):
        self.states, self.weights = states, weights
        super().__init__(weights.shape[:-1], states.shape[-1:])

    support = AnyRow()

    def sample(self, sample_shape=()):
        index = torch.distributions.Categorical(self.weights).sample(sample_shape)
        return self.states[index]

    def log_prob(self, value):
        same = torch.isclose(value.double().unsqueeze(-2), self.states).all(-1)
        return (same * self.weights).sum(-1).log()

    def expand(self, batch_shape, _instance=None):
        batch = torch.Size(batch_shape)
        return Listed(self.states, self.weights.expand(batch + self.weights.shape[-1:]))


def explicit(laws):
    """A realization with a listed law for each macro value.

    :param laws: pairs of a macro value, and states and weights.
    """
    every = np.unique(np.concatenate([s for _, (s, _) in laws]), axis=0)
    known = torch.tensor(np.array([np.atleast_1d(v) for v, _ in laws], dtype=float))
    table = np.zeros((len(laws), len(every)))
    for i, (_, (states, weights)) in enumerate(laws):
        for s, w in zip(states, weights, strict=True):
            table[i, (every == s).all(-1).argmax()] = w
    table, every = torch.tensor(table), torch.tensor(every)
    vector = known.shape[-1] > 1

    def fn(value):
        value = value.double() if vector else value.double().unsqueeze(-1)
        same = torch.isclose(value.unsqueeze(-2), known).all(-1)
        return Listed(every, table[same.byte().argmax(-1)])

    return lambda value: pm.Explicit(value, fn)


# Random ones


def random_table(rng, kind, rows, values, zeros):
    if kind == "binomial":
        p = rng.uniform(0.1, 0.9, rows)
        if zeros:
            p[rng.integers(rows)] = rng.integers(2)
        n = values - 1
        k = np.arange(values)
        choose = np.array([1, 1] if n == 1 else [1, 2, 1] if n == 2 else [1, 3, 3, 1])
        return choose * p[:, None] ** k * (1 - p[:, None]) ** (n - k)
    table = rng.dirichlet(np.ones(values), rows) * 0.9 + 0.1 / values
    if zeros:
        row, value = rng.integers(rows), rng.integers(values)
        table[row, value] = 0.0
        table[row] /= table[row].sum()
    return table


def random_node(rng, name, earlier, plates, width, kinds, zeros, sizes):
    kind = str(rng.choice(kinds))
    values = {"bernoulli": 2, "deterministic": 2}.get(kind, int(rng.integers(2, 4)))
    values = 3 if kind == "categorical" and rng.random() < 0.5 else values
    rows = int(rng.integers(2, 5))
    table = random_table(
        rng, "bernoulli" if kind == "deterministic" else kind, rows, values, zeros
    )
    parents = tuple((e, int(rng.integers(1, 3))) for e in earlier)
    shape = [sizes[p] if p in plates else 1 for p in DIMS] + [width or 1]
    offset = rng.integers(0, rows, shape)
    return Node(name, kind, table, offset, tuple(plates), width, parents)


def aggregations(rng, spec, names, over, vectors):
    """Those that suit some sites, each with itself by hand."""
    k, axes = 0, []
    for name in names:
        node = spec[name]
        n = elements(spec, name, over)
        k += n
        values = range(len(node.table)) if is_fixed(node) else node.values
        axes += [list(values)] * n
    choices = [(pm.Count(1), lambda x: np.isclose(x, 1).sum(-1))]
    total = int(np.prod([len(a) for a in axes]))
    if total <= 600:
        keys = list(itertools.product(*axes))
        labels = rng.integers(0, min(3, len(keys) - 1), len(keys)).astype(float)
        table = dict(zip(keys, labels.tolist(), strict=True))
        look = np.vectorize(
            lambda *row: table[tuple(int(round(r)) for r in row)], otypes=[float]
        )
        choices += [(pm.Coarsen(table), lambda x: look(*np.moveaxis(x, -1, 0)))] * (
            3 if k == 1 else 1
        )
    if k > 1:
        weights = rng.choice([1.0, 2.0, -1.0, 0.5], k)
        choices += [
            (pm.Sum(), lambda x: x.sum(-1)),
            (pm.Sum(), lambda x: x.sum(-1)),
            (pm.Mean(), lambda x: x.mean(-1)),
            (pm.Max(), lambda x: x.max(-1)),
            (pm.Min(), lambda x: x.min(-1)),
            (pm.Linear(weights.tolist()), lambda x: x @ weights),
            (
                pm.Custom(lambda x: x.square().sum(-1)),
                lambda x: (x**2).sum(-1),
            ),
        ]
    if k > 2 and vectors:
        rows = np.stack([np.ones(k), np.arange(k)])
        choices += [
            (pm.Linear(rows.tolist()), lambda x: x @ rows.T),
            (
                pm.Custom(lambda x: torch.stack([x.sum(-1), x[..., 0]], -1), 1),
                lambda x: np.stack([x.sum(-1), x[..., 0]], -1),
            ),
        ]
    return choices


def is_fixed(node):
    return node.kind == "deterministic"


def random_macro(rng, spec, name, names, vectors=False):
    """A macro-variable of some sites, or ``None`` if their plates do not fit."""
    plates = [set(spec[n].plates) for n in names]
    some = sorted(set.union(*plates))
    over = [p for p in some if rng.random() < (0.75 if p == "o" else 0.3)]
    if any((p - set(over)) != (plates[0] - set(over)) for p in plates):
        return None
    choices = aggregations(rng, spec, names, over, vectors)
    made, by_hand = choices[rng.integers(len(choices))]
    return Macro(name, tuple(names), tuple(over), made, by_hand)


KINDS = ("bernoulli", "bernoulli", "categorical", "binomial", "deterministic")


def random_spec(rng, count, density=0.55, kinds=KINDS, plain=False):
    names = "abcdefgh"[:count]
    in_k, in_o = rng.random() < 0.3, rng.random() < 0.45
    zeros = rng.random() < 0.3
    sizes = {"k": 2, "o": 2 if in_k else int(rng.integers(2, 4))}
    nodes = []
    for i, name in enumerate(names):
        plates = (
            []
            if plain
            else (
                ["k"] * (in_k and rng.random() < 0.6)
                + ["o"] * (in_o and rng.random() < 0.5)
            )
        )
        width = 2 * (not plain and rng.random() < 0.15)
        earlier = [e for e in names[:i] if rng.random() < density]
        own = [k for k in kinds if k != "deterministic"] if not earlier else kinds
        nodes.append(random_node(rng, name, earlier, plates, width, own, zeros, sizes))
    return Spec(tuple(nodes), sizes)


def is_injective(spec, macro):
    """Whether a macro-variable tells the micro states of a slot apart."""
    axes = [
        list(spec[name].values)
        for name in macro.micro
        for _ in range(elements(spec, name, macro.over))
    ]
    states = np.array(list(itertools.product(*axes)), dtype=float)
    return len(distinct(macro.by_hand(states).reshape(len(states), -1))[0]) == len(
        states
    )


def elements(spec, name, over):
    """How many elements a site has in a slot."""
    node = spec[name]
    n = int(np.prod([spec.sizes[p] for p in over if p in node.plates]))
    return n * (node.width or 1)


def count_states(spec):
    return float(
        np.prod(
            [
                len(n.values) ** float(n.offset.size)
                for n in spec.nodes
                if not is_fixed(n)
            ]
        )
    )


def random_question(seed, vectors=True, plain=False, **kwargs):
    """A program, a cause and an effect, and what may be held."""
    rng = np.random.default_rng(seed)
    while True:
        spec = random_spec(rng, int(rng.integers(3, 7)), plain=plain, **kwargs)
        if not 4 <= count_states(spec) <= STATES:
            continue
        graph = spec.graph
        free = [n.name for n in spec.nodes if not is_fixed(n)]
        count = 1 if rng.random() < 0.45 else 2
        if len(free) < count + 1:
            continue
        micro = sorted(rng.choice(free, count, replace=False).tolist())
        below = set().union(*(nx.descendants(graph, m) for m in micro))
        if below & set(micro) or not below:
            continue
        cause = random_macro(rng, spec, "cause", micro, vectors)
        if cause is None or is_injective(spec, cause):
            continue
        rest = [n for n in graph if n not in micro]
        effect = str(rng.choice(sorted(below if rng.random() < 0.85 else rest)))
        if rng.random() < 0.5:
            others = [n for n in rest if n != effect]
            parts = [effect]
            if others and rng.random() < 0.5:
                parts = sorted([effect, str(rng.choice(others))])
            macro = random_macro(rng, spec, "effect", parts)
            effect = effect if macro is None else macro
        # What may be held: sites that the cause does not act on, or one macro of two
        held = [n for n in rest if n not in below]
        given = [n for n in held if rng.random() < 0.6]
        if len(given) == 2 and rng.random() < 0.4:
            macro = random_macro(rng, spec, "held", given)
            given = given if macro is None else [macro]
        return rng, spec, cause, effect, tuple(given)


def thing(part):
    """A macro-variable or site as the library wants it."""
    return part if isinstance(part, str) else part.variable
