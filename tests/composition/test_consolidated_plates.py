# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Consolidated programs and plates: outside, inside, subsampled, sequential."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm

from .consolidated import (
    KEPT,
    MARKET,
    SETTINGS,
    TOLERANCE,
    assert_same_law,
    done,
    fused_market,
    gaussian_law,
    market,
    tensors,
    valued,
    weather,
    weather_table,
)
from .models import assert_same_program, stochastic


def in_plate(model, n, dim, size=None):
    def run(*args, **kwargs):
        with pyro.plate("outer", n, subsample_size=size, dim=dim):
            return model(*args, **kwargs)

    return run


# Outside


@pytest.mark.parametrize("dim", [None, -1, -3])
@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_plate_outside_draws_in_each_slot(dim, values):
    model = in_plate(done(fused_market(), tensors(values)), 4, dim)
    by_hand = in_plate(MARKET.fused(KEPT, **values), 4, dim)
    trace = assert_same_program(model, by_hand, macros=("m",))
    for name in KEPT:
        assert len(trace.nodes[name]["value"].unique()) == 4


@pytest.mark.parametrize("dim", [None, -1])
def test_plate_outside_of_data(dim):
    y = torch.tensor([1.0, 4.0, 9.0, 3.0])
    model = in_plate(fused_market(), 4, dim)
    assert_same_program(model, in_plate(MARKET.fused(KEPT), 4, dim), y)


def test_plate_outside_of_a_grid_of_values():
    grid = torch.tensor([-1.0, 0.0, 2.0, 5.0])
    model = in_plate(done(fused_market(), {"m": grid}), 4, -1)
    by_hand = in_plate(MARKET.fused(KEPT, m=grid), 4, -1)
    trace = assert_same_program(model, by_hand, macros=("m",))
    torch.testing.assert_close(trace.nodes["m"]["value"], grid)


def test_plate_outside_of_a_grid_of_values_of_a_kept_site():
    grid = torch.tensor([-1.0, 0.0, 2.0, 5.0])
    model = in_plate(done(fused_market(keep=["a", "y"]), {"a": grid}), 4, -1)
    trace = poutine.trace(model).get_trace()
    for i in range(4):
        mean, cov = MARKET.law(["a", "y"], {"a": grid[i]})
        gain = cov[0, 1] / cov[0, 0]
        wanted = mean[1] + gain * (trace.nodes["a"]["value"][i] - mean[0])
        fn = trace.nodes["y"]["fn"]
        torch.testing.assert_close(fn.mean[i], wanted, **TOLERANCE)


def test_plate_outside_of_a_grid_of_values_of_a_finite_site():
    grid = torch.tensor([0, 1, 2])
    with pyro.plate("grid", 3, dim=-1):
        model = poutine.do(pm.consolidate(weather, ["b"], ["m"]), data={"m": grid})
        trace = poutine.trace(model).get_trace()
    wanted = [weather_table(["b"], {"m": m})[1] for m in range(3)]
    found = trace.nodes["b"]["fn"].probs
    torch.testing.assert_close(found, torch.stack(wanted), **TOLERANCE)


def test_plates_outside_nested_and_named_before_the_program_is_read():
    """Read within plates, run without, and the other way round."""
    with pyro.plate("read", 2, dim=-1):
        fused = fused_market()
    assert_same_program(fused, MARKET.fused(KEPT))
    model, by_hand = (
        in_plate(in_plate_named(m, "second", 3), 2, None)
        for m in (fused, MARKET.fused(KEPT))
    )
    trace = assert_same_program(model, by_hand)
    assert trace.nodes["y"]["value"].shape == (3, 2)


def in_plate_named(model, name, n, dim=None):
    def run(*args):
        with pyro.plate(name, n, dim=dim):
            return model(*args)

    return run


def test_plate_outside_of_a_part_of_the_program():
    fused = fused_market()
    by_hand = MARKET.fused(KEPT)

    def run(inner):
        def model():
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
            with pyro.plate("n", 3, dim=-1):
                y = inner()
            pyro.sample("s", dist.Normal(y.sum() + t, 1.0))

        return model

    assert_same_program(run(fused), run(by_hand))


# Inside


def field(y=None, dim=-1, size=None):
    t = pyro.sample("t", dist.Normal(0.5, 1.0))
    loc = along(dim)
    with pyro.plate("n", 4, subsample_size=size, dim=dim) as i:
        h = pyro.sample("h", dist.Normal(loc[i], 1.5))
        a = pyro.sample("a", dist.Normal(2 * h + t, 1.0))
        m = pyro.sample("m", dist.Normal(a - h, 0.5))
        b = pyro.sample("b", dist.Normal(0.5 * m + h, 1.2))
        y = None if y is None else y[i]
        return pyro.sample("y", dist.Normal(b + m + 3, 0.7), obs=y)


FIELD = ("t", "a", "b", "y")


def along(dim):
    return torch.arange(4.0).reshape((4,) + (1,) * (-(dim or -1) - 1))


def field_by_hand(y=None, dim=-1, size=None, m=None):
    t = pyro.sample("t", dist.Normal(0.5, 1.0))
    loc = along(dim)
    with pyro.plate("n", 4, subsample_size=size, dim=dim) as i:
        constants = {"h": loc[i], "a": t, "y": 3.0}
        law = type(MARKET)(MARKET.weights, constants, MARKET.scales)
        values = {} if m is None else {"m": torch.as_tensor(m).expand(loc.shape)[i]}
        y = None if y is None else y[i]
        return law.emit(KEPT, values, y)


def fused_field(keep=FIELD, allow=("m", "h"), model=field, **kwargs):
    return pm.consolidate(model, keep, allow, **kwargs)


@pytest.mark.parametrize("dim", [None, -1, -2])
@pytest.mark.parametrize("m", [None, 1.5, [1.0, 2.0, 3.0, -1.0]], ids=str)
def test_plate_inside_stays_a_batch_dimension(dim, m):
    fused = fused_field(model_kwargs={"dim": dim})
    assert fused.sites == FIELD
    if m is not None:
        m = torch.tensor(m)
        m = m.reshape(along(dim).shape) if m.dim() else m
        fused = poutine.do(fused, data={"m": m})
    trace = assert_same_program(
        lambda: fused(dim=dim), lambda: field_by_hand(dim=dim, m=m), macros=("m",)
    )
    assert trace.nodes["y"]["log_prob"].shape == along(dim).shape


@pytest.mark.parametrize("names", [["m"], ["h"], ["a"], ["h", "a"], ["t"]], ids=str)
def test_plate_inside_has_the_law_of_the_program(names):
    values = {"m": torch.arange(4.0), "h": -1.0, "a": 2.0, "t": 5.0}
    data = tensors({name: values[name] for name in names})
    kept = [name for name in FIELD if name not in names]
    assert_same_law(done(fused_field(), data), done(field, data), kept)


@pytest.mark.parametrize("keep", [["y"], ["t", "y"], ["a", "y"], ["t", "b"]], ids=str)
def test_plate_inside_with_less_that_is_kept(keep):
    """What is outside of the plate and hidden correlates its slots: it stays."""
    fused = fused_field(keep)
    assert set(keep) <= set(fused.sites)
    kept = [name for name in FIELD if name in keep]
    assert_same_law(fused, field, kept)
    data = tensors({"m": torch.arange(4.0)})
    assert_same_law(done(fused, data), done(field, data), kept)


def test_plate_inside_of_data():
    y = torch.tensor([1.0, 4.0, 9.0, 3.0])
    assert_same_program(fused_field(), field_by_hand, y)
    fused = fused_field(keep=["t"], model_args=(y,))
    assert fused.sites == ("t", "y")


def test_plate_inside_of_a_sum_over_it():
    def model():
        with pyro.plate("n", 3, dim=-1):
            h = pyro.sample("h", dist.Normal(torch.arange(3.0), 1.5))
            a = pyro.sample("a", dist.Normal(2 * h, 1.0))
        pyro.sample("s", dist.Normal(a.sum() + h[0], 0.5))

    fused = pm.consolidate(model, ["s"], allow=["a"])
    assert_same_law(fused, model, ["s"])
    data = {"a": torch.tensor([1.0, 2.0, 4.0])}
    assert_same_law(done(fused, data), done(model, data), ["s"])
    both = pm.consolidate(model, ["a", "s"])
    assert_same_law(both, model, ["a", "s"])


def test_plates_inside_crossed():
    def model():
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
        with rows:
            r = pyro.sample("r", dist.Normal(torch.arange(2.0)[:, None], 1.0))
        with rows, columns:
            h = pyro.sample("h", dist.Normal(r, 0.5))
            a = pyro.sample("a", dist.Normal(h + r, 1.0))
            m = pyro.sample("m", dist.Normal(a + h, 1.0))
            pyro.sample("b", dist.Normal(m * torch.arange(3.0), 1.0))

    fused = pm.consolidate(model, ["r", "a", "b"], allow=["m"])
    assert fused.sites == ("r", "a", "b")
    assert_same_law(fused, model, ["r", "a", "b"])
    data = {"m": torch.arange(6.0).reshape(2, 3)}
    assert_same_law(done(fused, data), done(model, data), ["r", "a", "b"])


# Inside and outside


@pytest.mark.parametrize(
    "outer, inner", [(None, None), (-2, -1), (-1, -2), (-1, None), (-3, -1), (-2, None)]
)
@pytest.mark.parametrize("read_within, m", [(True, None), (False, 1.5)])
def test_plates_inside_and_outside(outer, inner, read_within, m):
    """Plates inside take the dimensions that those outside leave."""

    def model(dim=inner):
        t = pyro.sample("t", dist.Normal(0.5, 1.0))
        with pyro.plate("n", 4, dim=dim):
            h = pyro.sample("h", dist.Normal(1.0, 1.5))
            a = pyro.sample("a", dist.Normal(2 * h + t, 1.0))
            m = pyro.sample("m", dist.Normal(a - h, 0.5))
            b = pyro.sample("b", dist.Normal(0.5 * m + h, 1.2))
            pyro.sample("y", dist.Normal(b + m + 3, 0.7))

    def by_hand():
        t = pyro.sample("t", dist.Normal(0.5, 1.0))
        with pyro.plate("n", 4, dim=inner):
            constants = {"h": 1.0, "a": t, "y": 3.0}
            law = type(MARKET)(MARKET.weights, constants, MARKET.scales)
            law.emit(KEPT, {} if m is None else {"m": m})

    if read_within:
        with pyro.plate("outer", 3, dim=outer):
            fused = pm.consolidate(model, FIELD, allow=["m"])
    else:
        fused = pm.consolidate(model, FIELD, allow=["m"])
    run = done(fused, {} if m is None else tensors({"m": m}))
    outside, wanted = in_plate(run, 3, outer), in_plate(by_hand, 3, outer)
    trace = assert_same_program(outside, wanted, macros=("m",))
    assert trace.nodes["y"]["value"].numel() == 12
    # Without the plate outside as before, and with it again
    assert_same_program(run, by_hand, macros=("m",))
    assert_same_program(outside, wanted, macros=("m",))


@pytest.mark.parametrize("n", [3, 4])
def test_plates_that_collide_are_an_error_as_in_pyro(n):
    """An outer plate takes the first free dimension, which one inside names."""
    for model in (field, fused_field()):
        with pytest.raises(ValueError, match="collide"):
            in_plate(model, n, -1)()


def test_plates_inside_and_outside_of_data_of_each_slot():
    y = torch.randn(2, 4)

    def model(y=None):
        with pyro.plate("n", 4, dim=-1):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(h, 1.0), obs=y)

    def by_hand(y=None):
        with pyro.plate("n", 4, dim=-1):
            pyro.sample("y", dist.Normal(torch.tensor(0.0), 2.0**0.5), obs=y)

    fused = pm.consolidate(model, "y")
    assert_same_program(in_plate(fused, 2, -2), in_plate(by_hand, 2, -2), y)
    assert_same_program(fused, by_hand, y[0])


# Subsampled


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_subsampled_plate_outside_scales(values):
    model = in_plate(done(fused_market(), tensors(values)), 10, -1, size=2)
    by_hand = in_plate(MARKET.fused(KEPT, **values), 10, -1, size=2)
    trace = assert_same_program(model, by_hand, macros=("m",))
    for name in KEPT:
        site = trace.nodes[name]
        assert site["value"].shape == (2,)
        assert site["scale"] == 5.0


@pytest.mark.parametrize("dim", [None, -1])
@pytest.mark.parametrize("m", [None, 1.5])
def test_subsampled_plate_inside_scales(dim, m):
    fused = fused_field(model_kwargs={"dim": dim, "size": 2})
    assert fused.sites == FIELD
    run = done(fused, {} if m is None else tensors({"m": m}))
    trace = assert_same_program(
        lambda: run(dim=dim, size=2),
        lambda: field_by_hand(dim=dim, size=2, m=m),
        macros=("m",),
    )
    for name in KEPT:
        assert trace.nodes[name]["value"].shape == (2,)
        assert trace.nodes[name]["scale"] == 2.0
    assert trace.nodes["t"]["scale"] == 1.0


def test_subsampled_plate_inside_draws_indices_anew():
    y = torch.tensor([10.0, 20.0, 30.0, 40.0])
    fused = fused_field(model_args=(y,), model_kwargs={"size": 2})
    found = set()
    for _ in range(20):
        trace = poutine.trace(fused).get_trace(y, size=2)
        index = trace.nodes["n"]["value"]
        torch.testing.assert_close(trace.nodes["y"]["value"], y[index])
        found.add(tuple(index.tolist()))
    assert len(found) > 5


def test_subsampled_plate_inside_draws_the_indices_of_the_program():
    """The same seed takes the same slots: as in a program that is not fused."""
    fused = fused_field(model_kwargs={"size": 2})
    for seed in range(3):
        indices = []
        for program in (fused, field):
            pyro.set_rng_seed(seed)
            t = {"t": torch.tensor(0.0)}
            trace = poutine.trace(poutine.condition(program, t)).get_trace(size=2)
            indices.append(trace.nodes["n"]["value"])
        torch.testing.assert_close(*indices)


def test_subsampled_plate_inside_is_unbiased():
    """The mean over all subsamples is the density of the whole."""
    y = torch.tensor([1.0, 4.0, 9.0, 3.0])
    data = {"t": torch.tensor(0.3)}
    fused = fused_field(["t", "y"], model_args=(y,), model_kwargs={"size": 2})
    losses = []
    for i in range(4):
        for j in range(i + 1, 4):
            source = valued(poutine.condition(fused, data), {})
            start = poutine.trace(poutine.condition(fused, data)).get_trace(y, size=2)
            start.nodes["n"]["value"] = torch.tensor([i, j])
            for name in ("t", "y"):
                start.remove_node(name)
            source = poutine.replay(poutine.condition(fused, data), trace=start)
            losses.append(poutine.trace(source).get_trace(y, size=2).log_prob_sum())
    whole = poutine.trace(poutine.condition(field_of(y), data)).get_trace()
    torch.testing.assert_close(
        torch.stack(losses).mean(), whole.log_prob_sum(), **TOLERANCE
    )


def field_of(y):
    def by_hand():
        t = pyro.sample("t", dist.Normal(0.5, 1.0))
        with pyro.plate("n", 4, dim=-1):
            constants = {"h": torch.arange(4.0), "a": t, "y": 3.0}
            law = type(MARKET)(MARKET.weights, constants, MARKET.scales)
            law.emit(["y"], {}, y)

    return by_hand


def test_subsampled_plate_inside_within_a_plate_outside():
    fused = fused_field(model_kwargs={"size": 2})
    model = in_plate(lambda: fused(size=2), 3, -2)
    trace = assert_same_program(model, in_plate(lambda: field_by_hand(size=2), 3, -2))
    assert trace.nodes["y"]["value"].shape == (3, 2)


def test_subsampled_plate_with_indices_that_are_given():
    def model(i):
        with pyro.plate("n", 4, subsample=i, dim=-1):
            h = pyro.sample("h", dist.Normal(torch.arange(4.0)[i], 1.0))
            pyro.sample("a", dist.Normal(h, 1.0))

    def by_hand(i):
        with pyro.plate("n", 4, subsample=i, dim=-1):
            pyro.sample("a", dist.Normal(torch.arange(4.0)[i], 2**0.5))

    fused = pm.consolidate(model, "a", model_args=(torch.tensor([0, 1]),))
    for i in ([0, 1], [3, 2], [1, 3]):
        trace = assert_same_program(fused, by_hand, torch.tensor(i))
        assert trace.nodes["a"]["scale"] == 2.0


# Sequential


def sequence():
    t = pyro.sample("t", dist.Normal(0.5, 1.0))
    for i in pyro.plate("i", 3):
        h = pyro.sample(f"h{i}", dist.Normal(t, 1.5))
        a = pyro.sample(f"a{i}", dist.Normal(2 * h, 1.0))
        m = pyro.sample(f"m{i}", dist.Normal(a - h, 0.5))
        pyro.sample(f"b{i}", dist.Normal(m + h, 1.0))


def test_sequential_plate_inside():
    names = ["t", *(f"{n}{i}" for i in range(3) for n in "ab")]
    fused = pm.consolidate(sequence, names, allow=["m1", "h2"])
    assert list(fused.sites) == names
    assert_same_law(fused, sequence, names)
    data = tensors({"m1": 5.0, "h2": -1.0})
    assert_same_law(done(fused, data), done(sequence, data), names)


def test_sequential_plate_inside_is_subsampled():
    def model():
        for i in pyro.plate("i", 6, subsample_size=2):
            h = pyro.sample(f"h{i}", dist.Normal(float(i), 1.0))
            pyro.sample(f"a{i}", dist.Normal(h, 1.0))

    # Its sites differ from run to run: nothing can be fused, and nothing is wrong
    with pytest.raises(pm.PyroMacroError):
        pm.consolidate(model, "a7")
    fused = pm.consolidate(model, ())
    trace = poutine.trace(fused).get_trace()
    assert all(
        node["scale"] == 3.0
        for node in stochastic(trace).values()
        if node["name"][0] in "ha"
    )


def test_sequential_plate_outside_with_scopes():
    from pyro.contrib.autoname import scope

    fused = fused_market()

    def model(inner):
        def run():
            for i in pyro.plate("outer", 2):
                with scope(prefix=f"s{i}"):
                    inner()

        return run

    assert_same_program(model(fused), model(MARKET.fused(KEPT)))


def test_law_of_the_plates_by_hand_is_that_of_the_program():
    """The comparison itself."""
    wanted = gaussian_law(field, list(FIELD))
    found = gaussian_law(field_by_hand, list(FIELD))
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    assert len(wanted[0]) == 13
    mean, cov = gaussian_law(in_plate(market, 2, -1), list(KEPT))
    torch.testing.assert_close(mean[::2], MARKET.law(KEPT, {})[0], **TOLERANCE)
    torch.testing.assert_close(cov[::2, ::2], MARKET.law(KEPT, {})[1], **TOLERANCE)
