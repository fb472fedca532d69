# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Theorem 3.2 and Lemma 5: confounded below, and not above."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import assert_counts, log_joint, states_of
from pyro.infer import TraceEnum_ELBO, config_enumerate

import pyro_macro as pm
from pyro_macro.questions.paradox import cancelling_kernel, paradox

FIXTURE = ([0, 0, 1, 1], [0, 0, 1, 1], [[0.3, 0.7, 0.0, 0.0], [0.0, 0.0, 0.9, 0.1]])


def tables(model):
    """P(z), P(x), P(y | x, z) and P(z | x), from the joint law that Pyro states."""
    n_x, n_z, n_y = model.p_y.shape
    states = states_of(range(n_z), range(n_x), range(n_y))
    values = dict(zip("zxy", states.T.long(), strict=True))
    joint = log_joint(model, values).exp().reshape(n_z, n_x, n_y)
    torch.testing.assert_close(joint.sum().item(), 1.0)
    xz = joint.sum(-1)
    return xz.sum(1), xz.sum(0), joint / xz[..., None], xz / xz.sum(0)


def gaps(model, cause_map, effect_map, p_do):
    """Total variations, state by state: of Y and Yb at each x, of Yb at each xb.

    :param p_do: the probability of each x given its macro value.
    """
    p_z, p_x, p_y, p_z_given_x = tables(model)
    y_gaps, yb_gaps, macro_gaps = [], [], []
    seen, done = {}, {}
    for x in range(len(cause_map)):
        seen[x] = sum(p_z_given_x[z, x] * p_y[z, x] for z in range(len(p_z)))
        done[x] = sum(p_z[z] * p_y[z, x] for z in range(len(p_z)))
        y_gaps.append((seen[x] - done[x]).abs().sum().item() / 2)
        yb_gaps.append(sum_by(effect_map, seen[x] - done[x]))
    for label in sorted(set(cause_map)):
        fibre = [x for x, own in enumerate(cause_map) if own == label]
        total = sum(p_x[x] for x in fibre)
        given = sum(p_x[x] / total * seen[x] for x in fibre)
        after = sum(p_do[x] * done[x] for x in fibre)
        macro_gaps.append(sum_by(effect_map, given - after))
    return y_gaps, yb_gaps, macro_gaps


def sum_by(effect_map, difference):
    """Half of the sum of absolute differences of the sums by label."""
    found = dict.fromkeys(effect_map, 0.0)
    for label, part in zip(effect_map, difference.tolist(), strict=True):
        found[label] += part
    return sum(map(abs, found.values())) / 2


def assert_paradox(model, cause_map, effect_map, p_do, visible=0.05):
    y_gaps, yb_gaps, macro_gaps = gaps(model, cause_map, effect_map, p_do)
    assert max(y_gaps) > visible and max(yb_gaps) > visible
    assert max(macro_gaps) < 1e-12
    assert model.micro_gap == pytest.approx(max(yb_gaps), abs=1e-12)
    assert model.micro_gap == pytest.approx(max(y_gaps), abs=1e-12)
    assert model.macro_gap < 1e-12
    for table in (model.p_z, model.p_x, model.p_y):
        assert (table > 0).all()
        torch.testing.assert_close(table.sum(-1), torch.ones(table.shape[:-1]))


def natural(model, cause_map):
    """P(x | xb) for each x, by listing states."""
    p_x = tables(model)[1].tolist()
    total = {
        label: sum(p for p, own in zip(p_x, cause_map, strict=True) if own == label)
        for label in cause_map
    }
    return [p / total[label] for p, label in zip(p_x, cause_map, strict=True)]


def random_rows(cause_map, generator, kind):
    """A probability for each x given its macro value, and the matrix of them."""
    labels = sorted(set(cause_map))
    on = torch.tensor([[own == label for own in cause_map] for label in labels])
    weights = torch.rand(on.shape, generator=generator) * on
    if kind == "uniform":
        weights = on.double()
    elif kind == "point":
        weights = torch.nn.functional.one_hot(weights.argmax(-1), on.shape[1]).double()
    elif kind == "zeros":  # one state less
        least = weights.masked_fill(~on, 2.0).argmin(-1)
        weights[on.sum(-1) > 1, least[on.sum(-1) > 1]] = 0
    rows = weights / weights.sum(-1, keepdim=True)
    return rows.sum(0).tolist(), rows


@pytest.mark.parametrize("seed", range(5))
def test_theorem_3_2(seed):
    """|X| = |Y| = 4, |Z| = 3, |Xb| = |Yb| = 2, any Pdo."""
    rows = [[0.0] * 4, [0.0] * 4]
    one, other = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
    rows[0][:2], rows[1][2:] = [one, 1 - one], [other, 1 - other]
    model = paradox(FIXTURE[0], FIXTURE[1], rows, num_confounder_values=3, seed=seed)
    assert model.p_y.shape == (4, 3, 4)
    p_do = [one, 1 - one, other, 1 - other]
    assert_paradox(model, FIXTURE[0], FIXTURE[1], p_do, visible=0.1)
    # The interventions are not the natural ones
    differ = [abs(a - b) for a, b in zip(natural(model, FIXTURE[0]), p_do, strict=True)]
    assert max(differ) > 1e-3


CASES = {
    "unequal fibres": ([0, 0, 0, 0, 1, 1], [0, 0, 0, 1], 3),
    "a singleton": ([0, 0, 0, 1], [0, 1, 1], 3),
    "one fibre of two, else singletons": ([3, 0, 1, 2, 4, 4], [0, 1, 1], 3),
    "one fibre": ([7, 7, 7], [0, 0, 1], 4),
    "three macro effects": ([0, 0, 0, 1, 1], [0, 1, 2, 2], 4),
    "five macro effects": ([0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 4, 4], 6),
    "many confounders": ([0, 0, 1, 1], [0, 0, 1], 40),
    "labels out of order": ([5.5, -1.0, 5.5, -1.0], [1, 0, 1, 0], 3),
}


@pytest.mark.parametrize("kind", ["any", "uniform", "point", "zeros"])
@pytest.mark.parametrize("case", CASES)
def test_theorem_3_2_cases(case, kind):
    cause_map, effect_map, n_z = CASES[case]
    p_do, rows = random_rows(cause_map, torch.Generator().manual_seed(1), kind)
    model = paradox(cause_map, effect_map, rows, num_confounder_values=n_z)
    assert_paradox(model, cause_map, effect_map, p_do)


@pytest.mark.parametrize("seed", range(30))
def test_theorem_3_2_random(seed):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    n_x, n_yb = number(3, 7), number(2, 3)
    n_x = max(n_x, n_yb + 1)
    n_xb = number(1, n_x - 1)
    order = torch.randperm(n_x, generator=generator).tolist()
    cause_map = [i if i < n_xb else number(0, n_xb - 1) for i in order]
    n_y = number(n_yb + 1, 6)
    effect_map = [i if i < n_yb else number(0, n_yb - 1) for i in range(n_y)]
    kind = ["any", "uniform", "point", "zeros"][number(0, 3)]
    p_do, rows = random_rows(cause_map, generator, kind)
    n_z = number(n_yb + 1, 6)
    model = paradox(
        cause_map, effect_map, rows, num_confounder_values=n_z, seed=number(0, 999)
    )
    assert_paradox(model, cause_map, effect_map, p_do)


def test_a_realization_that_is_natural_on_one_fibre(monkeypatch):
    """There v is a multiple of u in each row; the other fibre is not natural."""
    monkeypatch.setitem(paradox.__globals__, "DRAWS", 1)  # P(Z), P(X | Z) are known
    first = natural(paradox(*FIXTURE, seed=3), FIXTURE[0])
    rows = [[*first[:2], 0.0, 0.0], [0.0, 0.0, 0.9, 0.1]]
    model = paradox(FIXTURE[0], FIXTURE[1], rows, seed=3)
    assert natural(model, FIXTURE[0])[:2] == pytest.approx(first[:2], abs=1e-15)
    assert_paradox(model, FIXTURE[0], FIXTURE[1], [*first[:2], 0.9, 0.1])
    # The natural one of both fibres is no intervention of the theorem
    rows = [[*first[:2], 0.0, 0.0], [0.0, 0.0, *first[2:]]]
    with pytest.raises(pm.Infeasible, match="none of 1 draws"):
        paradox(FIXTURE[0], FIXTURE[1], rows, seed=3)


def random_lemma(generator, sizes, n_z):
    """Vectors v, whose sum is zero in each fibre, and u with rows of sum zero."""
    fibre = torch.tensor([k for k, n in enumerate(sizes) for _ in range(n)])
    v, u = torch.randn(2, len(fibre), n_z, generator=generator)
    for k, n in enumerate(sizes):
        v[fibre == k] -= v[fibre == k].sum() / (n * n_z)
    return v, u - u.mean(-1, keepdim=True), fibre


def assert_lemma_5(v, u, fibre, kernel, independent, visible=1e-3):
    assert (kernel > 0).all()
    torch.testing.assert_close(kernel.sum(-1), torch.ones(v.shape))
    for k in range(int(fibre.max()) + 1):
        total = torch.zeros(kernel.shape[-1])
        for x in (fibre == k).nonzero()[:, 0].tolist():
            for z in range(v.shape[1]):
                total += v[x, z] * kernel[x, z]
        assert total.abs().max() < 1e-13 * (1 + v.abs().sum())
    for x in independent:
        image = sum(u[x, z] * kernel[x, z] for z in range(u.shape[1]))
        assert image.abs().sum() > visible * u[x].abs().sum()


@pytest.mark.parametrize("seed", range(20))
def test_lemma_5(seed):
    """The sum vanishes in each fibre, and no image of u does."""
    generator = torch.Generator().manual_seed(seed)
    n_yb = 2 + seed % 3
    v, u, fibre = random_lemma(generator, [3, 1, 2, 4], 3 + seed % 4)
    start = torch.rand(*v.shape, n_yb, generator=generator) + 0.1
    start /= start.sum(-1, keepdim=True)
    kernel = cancelling_kernel(v, u, fibre, start)
    assert_lemma_5(v, u, fibre, kernel, range(len(v)))


def test_lemma_5_rows_that_need_the_nudge():
    """Rows of one sign get one vector, which u maps to zero; so do equal ones."""
    generator = torch.Generator().manual_seed(0)
    v = torch.rand(3, 4, generator=generator) + 0.1
    v[0] *= -v[1:].sum() / v[0].sum()  # the first row is negative, the others positive
    u = torch.randn(3, 4, generator=generator)
    u -= u.mean(-1, keepdim=True)
    kernel = cancelling_kernel(
        v, u, torch.zeros(3, dtype=torch.long), torch.full((3, 4, 2), 0.5)
    )
    assert_lemma_5(v, u, torch.zeros(3), kernel, range(3), visible=0.05)


def test_lemma_5_cells_of_zero():
    """A free cell has to be one with u_ij != 0; a fibre of zeros is free altogether."""
    u = torch.tensor([[0.0, 0.5, -0.5], [0.2, -0.1, -0.1], [0.4, -0.4, 0.0]])
    v = torch.tensor([[0.0, 0.3, -0.3], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    fibre = torch.tensor([0, 0, 1])
    kernel = cancelling_kernel(v, u, fibre, torch.full((3, 3, 2), 0.5))
    assert_lemma_5(v, u, fibre, kernel, [1, 2], visible=0.05)  # u_0 is 5/3 v_0


def test_lemma_5_fibres_of_one_row():
    """There v = u, so that confounding below cannot be there: no step along nothing."""
    generator = torch.Generator().manual_seed(4)
    _, u, _ = random_lemma(generator, [5], 4)
    start = torch.rand(5, 4, 3, generator=generator)
    start /= start.sum(-1, keepdim=True)
    kernel = cancelling_kernel(u, u, torch.arange(5), start)
    assert_lemma_5(u, u, torch.arange(5), kernel, [])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_draws_of_the_intervened_model(value):
    """A chi-squared test on (x, y), and the trace's density of each state."""
    cause_map, effect_map, rows = FIXTURE
    model = paradox(cause_map, effect_map, rows)
    p_z, _, p_y, _ = tables(model)
    intervened = pm.macro_do(model, {model.cause: model.realization(value)})
    with pyro.plate("draws", 20_000):
        nodes = pyro.poutine.trace(intervened).get_trace().nodes
    states = states_of(range(4), range(4))
    row = rows[int(value)]
    probs = torch.tensor(
        [
            row[int(x)] * sum(p_z[z] * p_y[z, int(x), int(y)] for z in range(3))
            for x, y in states
        ]
    )
    drawn = torch.stack([nodes["x"]["value"], nodes["y"]["value"]], -1)
    assert_counts(drawn, states, probs)
    trace = pyro.poutine.trace(intervened).get_trace()
    trace.compute_log_prob()
    z, x, y = (int(trace.nodes[name]["value"]) for name in "zxy")
    expected = p_z[z] * row[x] * p_y[z, x, y]
    torch.testing.assert_close(trace.log_prob_sum().exp(), expected)
    assert trace.nodes["cause"]["value"] == value


def test_the_paradox_in_runs_of_the_model():
    """Enumerated: P(yb | do(xb)) = P(yb | xb), though not with the natural draw."""
    cause_map, effect_map, rows = FIXTURE
    model = paradox(cause_map, effect_map, rows)
    p_z, p_x, p_y, p_z_given_x = tables(model)
    for value, fibre in [(0.0, (0, 1)), (1.0, (2, 3))]:
        total = sum(p_x[x] for x in fibre)
        seen = sum(
            p_x[x] / total * p_z_given_x[z, x] * p_y[z, x]
            for x in fibre
            for z in range(3)
        )
        found = {}
        for realization in (model.realization(value), pm.Natural(value)):
            intervened = pm.macro_do(model, {model.cause: realization})
            probs = []
            for y in range(4):
                held = pyro.poutine.condition(intervened, {"y": torch.tensor(y)})
                elbo = TraceEnum_ELBO(max_plate_nesting=0)
                loss = elbo.loss(config_enumerate(held), lambda: None)
                probs.append(torch.tensor(-loss).exp())
            found[type(realization)] = torch.stack(probs)
        # Y is spread evenly over the fibres of Yb, so that both are unconfounded
        torch.testing.assert_close(found[pm.Explicit], seen)
        assert (found[pm.Natural][:2].sum() - seen[:2].sum()).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_grid_of_macro_values(dtype):
    torch.set_default_dtype(dtype)
    cause_map = [0.1, 0.1, 0.7, 0.7]  # 0.1 is another number in float32
    model = paradox(cause_map, FIXTURE[1], FIXTURE[2])
    values = torch.tensor([[0.1], [0.7], [0.1]])
    intervened = pm.macro_do(model, {model.cause: model.realization(values)})
    intervened = pm.aggregate(intervened, [model.effect])
    with pyro.plate("grid", 3, dim=-2), pyro.plate("draws", 500, dim=-1):
        nodes = pyro.poutine.trace(intervened).get_trace().nodes
    x = nodes["x"]["value"]
    assert x.shape == nodes["effect"]["value"].shape == (3, 500)
    for row, fibre, p in zip(x, [(0, 1), (2, 3), (0, 1)], [0.3, 0.9, 0.3], strict=True):
        states = torch.tensor(fibre).unsqueeze(-1)
        assert_counts(row, states, torch.tensor([p, 1 - p], dtype=torch.float64))
    law = nodes["cause__micro"]["fn"]
    with pytest.raises(NotImplementedError, match="differs along the batch"):
        getattr(law, "base_dist", law).enumerate_support()


def test_the_law_of_the_realization():
    model = paradox([0, 0, 0, 1], [0, 0, 1], [[0.0, 0.25, 0.75, 0.0], [0, 0, 0, 1]])
    intervened = pm.macro_do(model, {model.cause: model.realization(0.0)})
    law = pyro.poutine.trace(intervened).get_trace().nodes["cause__micro"]["fn"]
    assert law.event_shape == (1,) and law.has_enumerate_support
    assert law.enumerate_support().tolist() == [[1.0], [2.0]]
    probs = law.log_prob(torch.arange(4.0).unsqueeze(-1)).exp()
    assert probs.tolist() == pytest.approx([0.0, 0.25, 0.75, 0.0])
    with pytest.raises(ValueError, match="within the support"):
        law.log_prob(torch.tensor([4.0]))


def test_mappings_tensors_and_sequences_say_the_same():
    cause_map, effect_map, rows = FIXTURE
    one = paradox(cause_map, effect_map, rows)
    other = paradox(
        dict(enumerate(cause_map)),
        torch.tensor(effect_map),
        {1: torch.tensor(rows[1]), 0: rows[0]},
    )
    third = paradox(cause_map, effect_map, [torch.tensor(row) for row in rows])
    for model in (other, third):
        assert torch.equal(one.p_y, model.p_y) and torch.equal(one.p_do, model.p_do)
        assert model.cause == one.cause and model.effect == one.effect
    assert repr(one).startswith(
        "Paradox(<|X| = 4, |Y| = 4, |Z| = 3, |Xb| = 2, |Yb| = 2: confounded by 0."
    )


def test_realizations_in_float32_are_normalized():
    rows = torch.tensor([[1.0, 2.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0, 8.0]])
    rows = (rows / rows.sum(-1, keepdim=True)).float()
    assert (rows.double().sum(-1) != 1).any()
    cause_map = [0, 0, 0, 1, 1]
    model = paradox(cause_map, FIXTURE[1], rows)
    assert (model.p_do.sum(-1) - 1).abs().max() < 1e-15
    assert_paradox(model, cause_map, FIXTURE[1], model.p_do.sum(0).tolist())


def test_the_random_state_is_left_alone_and_the_seed_counts():
    before = torch.get_rng_state()
    one, other, again = (paradox(*FIXTURE, seed=seed) for seed in (0, 1, 0))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.p_y, again.p_y) and not torch.equal(one.p_y, other.p_y)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"cause_map": [0, 1, 2, 3]}, pm.NotAMicroState, "cause_map is injective: 4"),
        ({"effect_map": [0, 1, 2]}, pm.NotAMicroState, "effect_map is injective: 3"),
        ({"effect_map": []}, pm.NotAMicroState, "effect_map is injective: 0"),
        ({"effect_map": [5, 5]}, pm.Infeasible, r"\|Yb\| = 1 macro value"),
        ({"effect_map": [0, 1, 2, 3, 3]}, pm.Infeasible, r"\|X\| = 4 values.*min\("),
        ({"num_confounder_values": 2}, pm.Infeasible, r"\|Z\| = 2\. Expected 2 <="),
        ({"cause_map": "abcd"}, pm.PyroMacroError, "cause_map is 'abcd'. Expected a"),
        ({"cause_map": 3.0}, pm.PyroMacroError, "cause_map is 3.0"),
        (
            {"effect_map": [0, 0, float("nan")]},
            pm.PyroMacroError,
            "effect_map is .*nan",
        ),
        ({"effect_map": {0: 0, 2: 0, 3: 1}}, pm.PyroMacroError, r"\[0, 2, 3\].*0 to 2"),
        ({"realizations": {0: [1, 0, 0, 0]}}, pm.PyroMacroError, r"values \[0\].*each"),
        ({"realizations": [[1, 0, 0, 0]]}, pm.PyroMacroError, r"table of shape \(2, 4"),
        ({"realizations": [[1, 0], [0, 1, 0]]}, pm.PyroMacroError, r"all 4 micro"),
        ({"realizations": None}, pm.PyroMacroError, r"table of shape \(2, 4\)"),
        (
            {"realizations": [[0.5, 0.4, 0, 0], [0, 0, 1, 0]]},
            pm.PyroMacroError,
            r"sums \[0\.9, 1\.0\]\. Expected probabilities",
        ),
        (
            {"realizations": [[1.5, -0.5, 0, 0], [0, 0, 1, 0]]},
            pm.PyroMacroError,
            "least entry -0.5",
        ),
        (
            {"realizations": [[1, 0, 0, 0], [0, 0, float("nan"), 0]]},
            pm.PyroMacroError,
            "least entry nan",
        ),
        (
            {"realizations": [[0.5, 0, 0.5, 0], [0, 0, 1, 0]]},
            pm.OffFibre,
            "value 0 gives the micro value 2 probability 0.5, whose macro value is 1",
        ),
    ],
)
def test_errors(change, error, words):
    names = ["cause_map", "effect_map", "realizations"]
    arguments = dict(zip(names, FIXTURE, strict=True)) | change
    with pytest.raises(error, match=words):
        paradox(**arguments)


def test_a_macro_value_that_there_is_not():
    model = paradox(*FIXTURE)
    with pytest.raises(pm.Infeasible, match=r"macro value 2\.0.*\[0\.0, 1\.0\]"):
        pm.macro_do(model, {model.cause: model.realization(2.0)})()


def test_a_plate_of_the_model():
    """The sites are categorical tables, which broadcast against any plate."""
    model = paradox(*FIXTURE)
    with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 5, dim=-1):
        nodes = pyro.poutine.trace(model).get_trace().nodes
    for name in "zxy":
        assert nodes[name]["value"].shape == (3, 5)
        assert isinstance(nodes[name]["fn"], dist.Categorical)
