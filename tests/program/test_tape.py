# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Tapes: what was computed once is computed again, of other values.

Every function here is run twice: on a tape at some values, and by itself at others;
the expression that the tape made must give at these what the function gives.
"""

import itertools

import pytest
import torch

from pyro_macro.program.side_by_side import SideBySide, side_by_side
from pyro_macro.program.tape import Expression, Tape

A, B = ("site", "a"), ("site", "b")


def values(seed, shape=(3,)):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for _ in "ab")
    return {A: 1.2 + 0.4 * a, B: 1.2 + 0.4 * b}


def listed(result):
    return list(result) if isinstance(result, (list, tuple)) else [result]


def taped(function, at):
    """The expression of a function of two tensors, as it is run at some values."""
    with Tape() as tape:
        leaves = [tape.leaf(at[leaf].clone(), leaf) for leaf in (A, B)]
        results = listed(function(*leaves))
        return Expression([tape.node(result) for result in results])


def run(function, at):
    return listed(function(at[A].clone(), at[B].clone()))


def is_same(found, wanted):
    return (
        len(found) == len(wanted)
        and all(
            f.shape == w.shape and f.dtype == w.dtype
            for f, w in zip(found, wanted, strict=True)
        )
        and all(
            torch.allclose(f.double(), w.double(), 1e-12, 1e-12)
            for f, w in zip(found, wanted, strict=True)
        )
    )


# What can be repeated


def changed(a, b):
    x = a.clone()
    x += b
    x.mul_(2).add_(a, alpha=3)
    return x


def set_items(a, b):
    x = torch.zeros(3)
    x[1] = a[0]
    x[2] = b[1] * 2
    return x


def set_item_of_a_result(a, b):
    x = a * 2
    before = x + 1
    x[0] = b[2]
    return x + a, before


def set_slices(a, b):
    x = torch.zeros(2, 3)
    x[0] = a
    x[1, 1:] = b[:2]
    x[:, 0] = x[:, 0] + 5
    return x


def zeroed(a, b):
    x = a * 1
    x.zero_()
    return x + b


def filled(a, b):
    x, y = torch.zeros(3), torch.ones(3)
    x.fill_(a[0])
    y.copy_(b)
    return x * y


def changed_and_used_before(a, b):
    x = a * 1
    y = x * b
    x += 100
    return y, x


def unpacked(a, b):
    x, y, z = a
    return x * y + z + b


def iterated(a, b):
    return sum(x * x for x in a) + torch.stack(
        [x * y for x, y in zip(a, b, strict=True)]
    )


def unbound(a, b):
    x, *_ = torch.unbind(a)
    first, second = torch.stack([a, b]).split(1)
    return x * b, first * 2 - second


def looped(a, b):
    total = a.new_zeros(())
    for i in range(len(a)):
        total = total + (i + 1) * a[i] * b[-1]
    return total


def sorted_(a, b):
    in_order, index = torch.sort(a, descending=True)
    return in_order, b[index], a.max(dim=0).values, a.topk(2).values


def keywords(a, b):
    total = torch.add(input=a, other=b, alpha=2)
    both = torch.stack(tensors=[a, b], dim=1)
    larger = torch.where(condition=a > 1, input=a, other=b)
    return total, both.sum(dim=1, keepdim=True), larger


def nested(a, b):
    return torch.cat([torch.stack((a, b), 0), torch.ones(1, 3)], dim=0)


def indexed(a, b):
    whole = torch.stack([a, b])
    return (
        whole[:, torch.tensor([0, 2])],
        whole[..., -1],
        a[1:3],
        b[None, ::2],
        a[(b > 1.2).long()],
        a[torch.tensor([True, False, True])],
        whole[1, 2],
    )


def shaped(a, b):
    return (
        a.reshape(a.shape[0], 1).T + b,
        a.expand(2, -1),
        b.unsqueeze(0).squeeze(0) * a.numel(),
        torch.einsum("i,j->ij", a, b).flatten(),
        a.view(3, 1).mT @ b.view(3, 1),
        a.repeat(2),
        torch.diag(a) @ b,
    )


def operators(a, b):
    return 2 - a, 2 / a, 2**a, a**2, -a, 3 % a, 1 - a * b, a // b, abs(-a), +a


def compared(a, b):
    return (a > b) & (b > 1), ~(a > b), (a > b).any(), (a <= b).double(), a.eq(b)


def cast(a, b):
    return a.float() * 2, b.long(), a.to(torch.float32), b.int().double(), a.bool()


def made_alike(a, b):
    return (
        torch.zeros_like(a) + b,
        a.new_tensor([1.0, 2.0, 3.0]) * b,
        torch.full_like(b, 2.0) * a,
        torch.as_tensor(a) * 1,
    )


def functions(a, b):
    return (
        torch.nn.functional.linear(a, torch.ones(2, 3), torch.ones(2)),
        torch.nn.functional.pad(b, (1, 1)),
        torch.special.expit(a) + torch.linalg.norm(b),
        a.softmax(-1),
        torch.logsumexp(b, 0),
        a.cumsum(0),
        torch.lerp(a, b, 0.25),
        torch.addcmul(a, a, b, value=2),
        a.clamp(min=1.0) - b.clamp(max=torch.ones(3)),
        torch.nn.functional.softplus(a),
    )


def algebra(a, b):
    matrix = torch.diag(a) + 0.1 * torch.outer(b, b)
    return (
        torch.linalg.cholesky(matrix) @ b,
        torch.linalg.solve(matrix, a),
        torch.linalg.eigvalsh(matrix),
        torch.linalg.inv(matrix),
    )


def properties(a, b):
    return (
        torch.outer(a, b).T,
        a.data * b,
        torch.complex(a, b).real,
        torch.outer(a, b).mT.H,
    )


def data(a, b):
    return a.data * b


def detached(a, b):
    with torch.no_grad():
        return a.detach() * b.clone()


def broadcast(a, b):
    x, y = torch.broadcast_tensors(a, b.unsqueeze(-1))
    return x * 2, y, x + y


def scattered(a, b):
    index = torch.tensor([2, 0])
    return (
        a.gather(0, index),
        torch.zeros(3).scatter(0, index, b[:2]),
        torch.zeros(3).index_add(0, index, a[:2]),
    )


def constant(a, b):
    return a * 0 + b, torch.arange(3.0)


REPEATED = [
    *(changed, set_items, set_item_of_a_result, set_slices, zeroed, filled),
    *(changed_and_used_before, unpacked, iterated, unbound, looped, sorted_),
    *(keywords, nested, indexed, shaped, operators, compared, cast, made_alike),
    *(functions, algebra, properties, data, detached, broadcast, scattered, constant),
]


@pytest.mark.parametrize("function", REPEATED)
def test_it_is_computed_again_of_other_values(function):
    expression = taped(function, values(0))
    assert expression.trouble is None
    for seed in (0, 1, 2):
        at = values(seed)
        kept = {leaf: value.clone() for leaf, value in at.items()}
        assert is_same(expression(at), run(function, at)), function.__name__
        assert all(torch.equal(at[leaf], kept[leaf]) for leaf in at)


@pytest.mark.parametrize("function", REPEATED)
def test_expressions_stand_side_by_side(function):
    """Two runs of one function: one expression, evaluated at both at once."""
    whole = {i: values(i) for i in (1, 2, 3)}
    members, at = {}, {}
    for i, own in whole.items():
        a, b = ("site", f"a{i}"), ("site", f"b{i}")
        with Tape() as tape:
            results = function(
                tape.leaf(own[A].clone(), a), tape.leaf(own[B].clone(), b)
            )
            nodes = [tape.node(result) for result in listed(results)]
            members[str(i)] = Expression(nodes)
        other = values(10 + i)
        at |= {a: other[A], b: other[B]}
    groups = side_by_side(members, at)
    assert sum(len(group.names) for group in groups) == 3
    for group in groups:
        outputs = group.outputs(at)
        for place, name in enumerate(group.names):
            wanted = run(function, values(10 + int(name)))
            assert is_same([output[place] for output in outputs], wanted)


@pytest.mark.parametrize("function", REPEATED)
def test_leaves_are_what_it_depends_on(function):
    expression = taped(function, values(0))
    at = values(1)
    for leaf in (A, B):
        other = at | {leaf: at[leaf].flip(0) * 1.7}
        moved = not is_same(run(function, at), run(function, other))
        if moved:
            assert leaf in expression.leaves
        if leaf not in expression.leaves:
            assert not moved
    assert set(expression.parents) == {str(name) for _, name in expression.leaves}


def test_what_is_no_function_of_the_leaves_is_a_constant():
    expression = taped(lambda a, b: (torch.ones(2), 2 * torch.arange(3.0)), values(0))
    assert expression.leaves == [] and expression.operations == 0
    found = expression({})
    assert torch.equal(found[0], torch.ones(2))
    assert torch.equal(found[1], 2 * torch.arange(3.0))


def test_shapes_of_leaves_may_be_others():
    expression = taped(lambda a, b: (2 * a + b, (a * b).sum(-1)), values(0))
    at = values(1, (5, 3))
    assert is_same(expression(at), [2 * at[A] + at[B], (at[A] * at[B]).sum(-1)])


# Broadcasting leaves what nothing is done to as it is


def test_a_constant_that_is_broadcast_stays_a_constant():
    """``broadcast_tensors`` returns the very same object where shapes agree."""
    scale = torch.ones(3)

    def function(a, b):
        x, s = torch.broadcast_tensors(a, scale)
        return x, s

    at = values(0)
    with Tape() as tape:
        a = tape.leaf(at[A], A)
        x, s = torch.broadcast_tensors(a, scale)
        assert s is scale
        assert tape.node(scale) is scale
        assert tape.sources(scale) == frozenset()
        # Nor is anything that is computed from it afterwards
        assert tape.node(2 * scale) is not None
        assert Expression([tape.node(2 * scale)]).leaves == []
        assert Expression([tape.node(x)]).leaves == [A]
    assert is_same(taped(function, at)(values(1)), [values(1)[A], scale])


def test_a_leaf_that_is_broadcast_stays_that_leaf():
    at = values(0)
    with Tape() as tape:
        a, b = tape.leaf(at[A], A), tape.leaf(at[B], B)
        x, y = torch.broadcast_tensors(a, b)
        wide, _ = torch.broadcast_tensors(a, torch.ones(2, 3))
        assert Expression([tape.node(x)]).leaves == [A]
        assert Expression([tape.node(y)]).leaves == [B]
        expression = Expression([tape.node(wide)])
    assert expression.leaves == [A]
    assert is_same(expression(values(1)), [values(1)[A].expand(2, 3)])


# What cannot be repeated says so


def view_changed(a, b):
    x = a * 1
    x[1:].add_(b[1:])
    return x


def view_set(a, b):
    x = torch.zeros(3)
    y = x[1:]
    y[0] = a[0]
    return x


def column_changed(a, b):
    x = torch.ones(3, 2)
    x[:, 0] += a
    return x


def leaf_changed(a, b):
    a += 1
    return a * b


def written_out(a, b):
    result = torch.empty(3)
    torch.add(a, b, out=result)
    return result


def random_added(a, b):
    return a + torch.rand(3)


def random_like(a, b):
    return torch.randn_like(a) * b


def random_in_place(a, b):
    return torch.empty(3).normal_() + a


def bernoulli(a, b):
    return torch.bernoulli(torch.full((3,), 0.5)) * a


def dropped(a, b):
    return torch.nn.functional.dropout(a, 0.5) + b


def permuted(a, b):
    return a[torch.randperm(3)]


def multinomial(a, b):
    return a[torch.multinomial(torch.ones(3), 2)]


TROUBLE = {
    view_changed: "in place",
    view_set: "in place",
    column_changed: "in place",
    leaf_changed: "in place",
    written_out: "out=",
    random_added: "random numbers",
    random_like: "random numbers",
    random_in_place: "random numbers",
    bernoulli: "random numbers",
    dropped: "random numbers",
    permuted: "random numbers",
    multinomial: "random numbers",
}


@pytest.mark.parametrize("function", TROUBLE)
def test_what_cannot_be_repeated_is_in_trouble(function):
    expression = taped(function, values(0))
    assert expression.trouble is not None and TROUBLE[function] in expression.trouble


def test_trouble_is_only_where_it_matters():
    def function(a, b):
        noise = torch.rand(3)
        return a * 2, a + noise

    at = values(0)
    with Tape() as tape:
        first, second = function(tape.leaf(at[A], A), tape.leaf(at[B], B))
        assert Expression([tape.node(first)]).trouble is None
        assert Expression([tape.node(second)]).trouble is not None


@pytest.mark.parametrize(
    "turn",
    [
        lambda a: a[0].item(),
        lambda a: float(a[0]),
        lambda a: int(a[0]),
        lambda a: bool(a[0]),
        lambda a: a.tolist(),
        lambda a: a.detach().numpy(),
        lambda a: 1 if a[0] > 0 else 2,
        lambda a: torch.equal(a, a + 1),
        lambda a: torch.allclose(a, a + 1),
        lambda a: range(3)[a[0].long()],
    ],
)
def test_values_that_leave_the_tape_are_noticed(turn):
    with Tape() as tape:
        a = tape.mark(torch.tensor([1.0, 2.0]), {"a"})
        b = tape.mark(torch.tensor(1.0), {"b"})
        assert not tape.escaped
        turn(a)
        assert "a" in tape.escaped and "b" not in tape.escaped
        assert Expression([tape.node(b)]).leaves == [B]


def test_modules_can_be_made_on_a_tape():
    """Their weights are drawn, by functions that are called with keywords alone."""
    with Tape() as tape:
        a = tape.leaf(torch.ones(3), A)
        net = torch.nn.Linear(3, 2)
        made = Expression([tape.node(net(a))])
    assert A in made.leaves or made.trouble is not None


# Tensors to be trained


def test_what_is_trained_is_captured():
    """It is no constant: its gradient is asked for."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    expression = taped(lambda a, b: weight * a + weight.sum() * b, values(0))
    kinds = [kind for kind, _ in expression.leaves]
    assert kinds.count("captured") == 1
    assert list(expression.captured.values()) == [weight]
    at = values(1)
    (found,) = expression(at)
    found.sum().backward()
    wanted = at[A] + at[B].sum()
    assert torch.allclose(weight.grad, wanted)
    with torch.no_grad():
        weight.copy_(torch.ones(3))
    assert is_same(expression(at), [at[A] + 3 * at[B]])


def test_captured_tensors_stand_side_by_side():
    weights = [torch.nn.Parameter(torch.full((3,), float(i))) for i in range(1, 4)]
    members, at = {}, {}
    for i, weight in enumerate(weights):
        leaf = ("site", f"a{i}")
        with Tape() as tape:
            result = tape.leaf(values(i)[A], leaf) * weight + i
            members[f"v{i}"] = Expression([tape.node(result)])
        at[leaf] = values(5 + i)[A]
    (group,) = side_by_side(members, at)
    (found,) = group.outputs(at)
    for i, weight in enumerate(weights):
        assert torch.allclose(found[i], at["site", f"a{i}"] * weight + i)
    found.sum().backward()
    for i, weight in enumerate(weights):
        assert torch.allclose(weight.grad, at["site", f"a{i}"])


# Groups


def affine(factor, offset, power=2):
    return lambda a, b: factor * a**power + offset - b


def group_of(functions, seed=0, dtype=None):
    members, at = {}, {}
    for i, function in enumerate(functions):
        own = values(seed + i)
        if dtype is not None:
            own = {leaf: value.to(dtype) for leaf, value in own.items()}
        a, b = ("site", f"a{i}"), ("site", f"b{i}")
        with Tape() as tape:
            result = function(tape.leaf(own[A], a), tape.leaf(own[B], b))
            nodes = [tape.node(part) for part in listed(result)]
        members[f"v{i}"] = Expression(nodes)
        at |= {a: own[A], b: own[B]}
    return members, at


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "functions",
    [
        [affine(2.0, 1.0), affine(3.0, -1.0), affine(0.5, 0.0)],
        [affine(2, 1), affine(3, 1), affine(2, 7)],
        [affine(2.0, 1, 2), affine(2.0, 1, 3), affine(2.0, 5, 1)],
        [affine(torch.tensor(i + 1.0), 0.5) for i in range(3)],
        [affine(torch.arange(3.0) + i, 0.5) for i in range(3)],
        [(lambda a, b, i=i: a[i] * b) for i in range(3)],
        [(lambda a, b, i=i: (a - i) / (i + 1.5) + b.sum()) for i in range(3)],
    ],
)
def test_constants_that_differ_are_one_group(functions, dtype):
    members, at = group_of(functions, dtype=dtype)
    assert len({e.key for e in members.values()}) == 1
    (group,) = side_by_side(members, at)
    (found,) = group.outputs(at)
    assert found.shape[0] == 3
    for i, name in enumerate(group.names):
        own = {A: at["site", f"a{i}"], B: at["site", f"b{i}"]}
        (wanted,) = members[name](at)
        direct = functions[i](own[A], own[B])
        assert found[i].dtype == wanted.dtype == direct.dtype
        assert torch.allclose(found[i], wanted) and torch.allclose(wanted, direct)


@pytest.mark.parametrize(
    "one, other",
    [
        (lambda a, b: a + b, lambda a, b: a - b),
        (lambda a, b: a.sum(0), lambda a, b: a.sum(-1)),
        (lambda a, b: a.clamp(min=0.5), lambda a, b: a.clamp(min=1.0)),
        (lambda a, b: a[:1], lambda a, b: a[:2]),
        (lambda a, b: a * 2, lambda a, b: a * 2.0),
        (lambda a, b: a * torch.ones(3), lambda a, b: a * torch.ones(())),
        (lambda a, b: a * b, lambda a, b: a * a),
        (lambda a, b: (a + b) * b, lambda a, b: (a + b) * a),
        (lambda a, b: a.float(), lambda a, b: a.double()),
    ],
)
def test_what_computes_otherwise_is_another_group(one, other):
    members, at = group_of([one, other])
    first, second = members.values()
    assert first.key != second.key or one is other
    assert len(side_by_side(members, at)) == 2
    for group in side_by_side(members, at):
        (name,) = group.names
        outputs = group.outputs(at)
        assert is_same([o[0] for o in outputs], members[name](at))


def test_leaves_of_other_shapes_are_another_group():
    function = affine(2.0, 1.0)
    members, at = group_of([function, function])
    for leaf in (("site", "a1"), ("site", "b1")):
        at[leaf] = at[leaf][:2]
    assert [group.names for group in side_by_side(members, at)] == [["v0"], ["v1"]]
    at = {leaf: value[:2] for leaf, value in at.items()}
    assert [group.names for group in side_by_side(members, at)] == [["v0", "v1"]]


def shared_group():
    """Three expressions of a leaf in common and one of their own."""
    members, at = {}, {}
    for i in range(3):
        leaf = ("site", f"a{i}")
        with Tape() as tape:
            both = tape.leaf(torch.ones(2), leaf), tape.leaf(torch.ones(2), B)
            members[f"v{i}"] = Expression([tape.node((i + 1) * both[0] - both[1])])
        at[leaf] = torch.tensor([1.0, 2.0]) * (i + 1)
    return SideBySide(members), at | {B: torch.tensor([0.5, -0.5])}


def test_leaves_in_common():
    group, at = shared_group()
    (found,) = group.outputs(at)
    for i in range(3):
        assert torch.allclose(found[i], (i + 1) * at["site", f"a{i}"] - at[B])


@pytest.mark.parametrize(
    "wide", [[B], [("site", "a1")], [B, ("site", "a0"), ("site", "a1"), ("site", "a2")]]
)
def test_worlds(wide):
    """Some leaves have values in several worlds, in front of everything."""
    group, at = shared_group()
    generator = torch.Generator().manual_seed(0)
    for leaf in wide:
        at[leaf] = torch.randn(4, 2, generator=generator)
    (found,) = group.outputs(at, frozenset(wide))
    assert found.shape == (4, 3, 2)
    for world, i in itertools.product(range(4), range(3)):
        own = ("site", f"a{i}")
        a, b = (at[x][world] if x in wide else at[x] for x in (own, B))
        assert torch.allclose(found[world, i], (i + 1) * a - b)


def test_nothing_but_constants():
    members = {}
    for name in ("x", "y"):
        with Tape() as tape:
            members[name] = Expression([tape.node(torch.arange(3.0))])
    (group,) = side_by_side(members, {})
    (found,) = group.outputs({})
    assert torch.equal(found, torch.arange(3.0).expand(2, 3))
    members["z"] = Expression([torch.ones(3)])
    (group,) = side_by_side(members, {})
    (found,) = group.outputs({})
    assert torch.equal(found[2], torch.ones(3))
    assert torch.equal(found[0], torch.arange(3.0))


# What an expression says about itself


def test_operations_are_counted():
    expression = taped(lambda a, b: (2 * a + b).reshape(3, 1).squeeze(-1), values(0))
    assert expression.operations == 4 and expression.arithmetic == 2


@pytest.mark.parametrize(
    "function, in_a, in_b",
    [
        (lambda a, b: 2 * a + b - 1, True, True),
        (lambda a, b: a @ torch.ones(3, 2) + b.sum(), True, True),
        (lambda a, b: torch.stack([a, b])[:, 1:].flatten(), True, True),
        (lambda a, b: a / b, True, None),
        (lambda a, b: torch.exp(a) + b, False, True),
        (lambda a, b: torch.relu(a) - b, False, True),
        (lambda a, b: a.abs() + b, False, True),
        (lambda a, b: a * torch.exp(b), True, False),
        (lambda a, b: a.clamp(min=-100.0) + b, False, True),
        (lambda a, b: (a > 0).double() + b, False, True),
        (lambda a, b: a.cumsum(0) + b.mean(), True, True),
        (set_items, True, True),
        (torch.special.expit, False, None),
        (lambda a, b: torch.sigmoid(9 * (a - 60)) + b, False, True),
    ],
)
def test_what_may_be_affine(function, in_a, in_b):
    """Nothing that is not may be taken to be; ``None`` where both are right."""
    if function is torch.special.expit:
        expression = taped(lambda a, b: torch.special.expit(a), values(0))
    else:
        expression = taped(function, values(0))
    for leaf, expected in ((A, in_a), (B, in_b)):
        if expected is not None and leaf in expression.leaves:
            assert expression.may_be_affine([leaf]) is expected
    if in_a is False or in_b is False:
        assert not expression.may_be_affine([A, B])


def test_without_noting_nothing_is_noted():
    with Tape(noting=False) as tape:
        a = tape.leaf(torch.ones(3), A)
        b = 2 * a + 1
        assert torch.equal(b, torch.full((3,), 3.0))
        assert tape.node(b) is b


def test_tapes_within_one_another():
    with Tape() as outer:
        a = outer.leaf(torch.ones(3), A)
        with Tape() as inner:
            b = inner.leaf(2 * a, B)
            c = b + 1
            inside = Expression([inner.node(c)])
        outside = Expression([outer.node(3 * a)])
    assert inside.leaves == [B] and outside.leaves == [A]
    assert torch.equal(inside({B: torch.zeros(3)})[0], torch.ones(3))
    assert torch.equal(outside({A: torch.ones(3)})[0], torch.full((3,), 3.0))


def test_a_site_is_a_leaf_whatever_it_was_computed_from():
    with Tape() as tape:
        a = tape.leaf(torch.ones(3), A)
        b = tape.mark(2 * a, ["b"])
        expression = Expression([tape.node(b + 1)])
    assert expression.leaves == [B]
    assert torch.equal(expression({B: torch.zeros(3)})[0], torch.ones(3))
