# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Plates: outside, inside (staying, aggregated over, both), and subsampled."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm

from .models import (
    NATURAL,
    SALES,
    assert_only_added,
    assert_same_program,
    given_total,
    market,
    market_by_hand,
    market_by_hand_given_z,
    replayed,
    sales_total,
    shop,
    shop_by_hand,
)


def in_plate(model, n, dim):
    def run(*args, **kwargs):
        with pyro.plate("outer", n, dim=dim):
            return model(*args, **kwargs)

    return run


# Outside


@pytest.mark.parametrize("dim", [-1, -3])
def test_plate_outside_draws_a_micro_state_in_each_slot(do, dim):
    trace = assert_same_program(
        in_plate(do(shop, NATURAL), 4, dim), in_plate(shop_by_hand, 4, dim)
    )
    micro = trace.nodes["sales__micro"]
    shape = (4,) + (1,) * (-dim - 1)
    assert micro["log_prob"].shape == shape
    assert len(set(micro["value"][..., 0].flatten().tolist())) == 4
    torch.testing.assert_close(micro["value"].sum(-1), torch.full(shape, 33.0))
    torch.testing.assert_close(trace.nodes["sales"]["value"], torch.tensor(33.0))


def test_plate_outside_of_a_confounded_program():
    model = in_plate(pm.macro_do(market, NATURAL), 4, -1)
    assert_same_program(model, in_plate(market_by_hand, 4, -1))


def test_plate_outside_holds_the_given_cause_of_each_slot(do):
    model = do(market, {SALES: pm.Natural(33.0, given=["z"])})
    trace = assert_same_program(
        in_plate(model, 4, -1), in_plate(market_by_hand_given_z, 4, -1)
    )
    means = trace.nodes["sales__micro"]["fn"].mean[..., 0]
    assert len(set(means.tolist())) == 4


def test_plate_outside_takes_a_grid_of_values(do):
    grid = torch.tensor([30.0, 33.0, 40.0, 10.0])
    model = do(shop, {SALES: pm.Natural(grid)})
    trace = assert_same_program(
        in_plate(model, 4, -1), in_plate(lambda: shop_by_hand(grid), 4, -1)
    )
    torch.testing.assert_close(trace.nodes["sales"]["value"], grid)


def test_grid_of_values_without_its_plate_is_an_error_that_says_so(do):
    model = do(shop, {SALES: pm.Natural(torch.tensor([30.0, 33.0]))})
    with pytest.raises(pm.PyroMacroError, match="plate of its own"):
        model()


def test_grid_of_values_in_the_wrong_plate_is_an_error_that_says_so(do):
    model = in_plate(do(shop, {SALES: pm.Natural(torch.ones(3, 1))}), 3, -1)
    with pytest.raises(pm.PyroMacroError, match="plate of its own"):
        model()


@pytest.mark.parametrize(
    "realization",
    [
        pm.Residual(33.0, absorb="x2"),
        pm.Proportional(33.0),
        pm.Shift(5.0),
        pm.Allocate(33.0, [0.5, 0.5]),
    ],
    ids=lambda r: type(r).__name__,
)
def test_plate_outside_of_every_realization(do, realization):
    # Each slot has the density that a run of its own has at the same values
    model = do(shop, {SALES: realization})
    trace = poutine.trace(in_plate(model, 3, -1)).get_trace()
    trace.compute_log_prob()
    latent = [n for n in ("sales__micro", "w", "y") if n in trace]
    for slot in range(3):
        data = {name: trace.nodes[name]["value"][slot] for name in latent}
        single = poutine.trace(poutine.condition(model, data)).get_trace()
        single.compute_log_prob()
        for name in latent:
            torch.testing.assert_close(
                trace.nodes[name]["log_prob"][slot], single.nodes[name]["log_prob"]
            )
        for name in ("x1", "x2"):
            value = trace.nodes[name]["value"].expand(3)
            torch.testing.assert_close(value[slot], single.nodes[name]["value"])


def test_plate_outside_of_aggregate(add):
    model = in_plate(shop, 4, -2)
    assert_only_added(in_plate(add(shop, [SALES]), 4, -2), model, sales_total)


# Inside, staying


LOC = [10.0, 12.0, 14.0]


def regions(value=None, size=None):
    """With ``value`` the program by hand under an intervention on the total."""
    with pyro.plate("regions", 3, subsample_size=size, dim=-1) as i:
        loc, scale = torch.tensor(LOC)[i], torch.tensor([1.0, 2.0, 3.0])[i]
        if value is None:
            x1 = pyro.sample("x1", dist.Normal(loc, scale))
            x2 = pyro.sample("x2", dist.Normal(2 * loc, 1.0))
        else:
            value = torch.as_tensor(value).expand(3)[i]
            gain = scale**2 / (scale**2 + 1)
            x1 = pyro.sample(
                "x1", dist.Normal(loc + gain * (value - 3 * loc), gain.sqrt())
            )
            x2 = pyro.deterministic("x2", value - x1)
        pyro.sample("y", dist.Normal(x1 + 3 * x2, 0.5))
    return x1, x2


@pytest.mark.parametrize("value", [33.0, [30.0, 33.0, 50.0]])
def test_plate_inside_stays_a_batch_dimension(do, value):
    value = torch.tensor(value)
    model = do(regions, {SALES: pm.Natural(value)})
    trace = assert_same_program(model, lambda: regions(value))
    assert trace.nodes["sales__micro"]["log_prob"].shape == (3,)
    torch.testing.assert_close(trace.nodes["sales"]["value"], value.expand(3))


def test_plate_inside_takes_no_value_of_another_size(do):
    model = do(regions, {SALES: pm.Natural(torch.ones(2))})
    with pytest.raises(pm.PyroMacroError, match="'regions' of size 3"):
        model()


@pytest.mark.parametrize("size", [None, 2])
def test_plate_inside_holds_the_given_cause_of_each_slot(do, size):
    def model():
        with pyro.plate("regions", 3, subsample_size=size, dim=-1):
            market()

    def by_hand():
        with pyro.plate("regions", 3, subsample_size=size, dim=-1):
            market_by_hand_given_z()

    intervened = do(model, {SALES: pm.Natural(33.0, given=["z"])})
    trace = assert_same_program(intervened, by_hand)
    means = trace.nodes["sales__micro"]["fn"].mean[..., 0]
    assert len(set(means.tolist())) == (size or 3)


@pytest.mark.parametrize("size", [None, 2])
def test_plate_inside_integrates_the_cause_of_each_slot_out(size):
    def model():
        with pyro.plate("regions", 3, subsample_size=size, dim=-1):
            market()

    def by_hand():
        with pyro.plate("regions", 3, subsample_size=size, dim=-1):
            market_by_hand()

    assert_same_program(pm.macro_do(model, NATURAL), by_hand)


def test_plate_inside_and_plate_outside(do):
    model = do(regions, NATURAL)
    trace = assert_same_program(
        in_plate(model, 2, -2), in_plate(lambda: regions(33.0), 2, -2)
    )
    assert trace.nodes["sales__micro"]["log_prob"].shape == (2, 3)


def test_plate_inside_of_aggregate_stays(add):
    trace = assert_only_added(add(regions, [SALES]), regions, sales_total)
    assert trace.nodes["sales"]["value"].shape == (3,)


# Inside, aggregated over

TOTAL = pm.MacroVariable("total", micro="x", over="products")
SCALE = [1.0, 2.0, 0.5, 3.0]


def products(value=None):
    with pyro.plate("products", 4, dim=-1):
        x = pyro.sample("x", dist.Normal(torch.arange(4.0), torch.tensor(SCALE)))
        pyro.sample("y", dist.Normal(2 * x, 1.0))
    pyro.sample("all", dist.Normal(x.sum(-1), 1.0))


def products_by_hand(value):
    mean, cov = torch.arange(4.0), torch.tensor(SCALE).square().diag()
    mean, cov = given_total(mean, cov, [[1.0] * 4], [value])
    free = pyro.sample("total__free", dist.MultivariateNormal(mean[:-1], cov[:-1, :-1]))
    x = torch.cat([free, (value - free.sum(-1)).unsqueeze(-1)], -1)
    with pyro.plate("products", 4, dim=-1):
        pyro.deterministic("x", x)
        pyro.sample("y", dist.Normal(2 * x, 1.0))
    pyro.sample("all", dist.Normal(x.sum(-1), 1.0))


def test_plate_in_over_is_added_up(do):
    model = do(products, {TOTAL: pm.Natural(9.0)})
    trace = assert_same_program(model, lambda: products_by_hand(9.0), macros=("total",))
    assert trace.nodes["total"]["value"].shape == ()
    assert trace.nodes["x"]["value"].shape == (4,)


def test_plate_in_over_of_aggregate_is_added_up(add):
    assert_only_added(
        add(products, [TOTAL]),
        products,
        lambda t: {"total": t.nodes["x"]["value"].sum()},
    )


def test_plate_outside_is_not_added_up_with_the_one_in_over(do, add):
    def model():
        with pyro.plate("products", 4, dim=-1):
            pyro.sample("x", dist.Normal(torch.arange(4.0), torch.tensor(SCALE)))

    intervened = in_plate(do(model, {TOTAL: pm.Natural(9.0)}), 5, -2)
    trace = poutine.trace(intervened).get_trace()
    x = trace.nodes["x"]["value"]
    assert x.shape == (5, 4)
    torch.testing.assert_close(x.sum(-1), torch.full((5,), 9.0))
    torch.testing.assert_close(trace.nodes["total"]["value"], torch.tensor(9.0))
    assert trace.nodes["total__micro"]["value"].shape == (5, 1, 4)
    assert_only_added(
        in_plate(add(model, [TOTAL]), 5, -2),
        in_plate(model, 5, -2),
        lambda t: {"total": t.nodes["x"]["value"].sum(-1, keepdim=True)},
    )


def test_unknown_plate_in_over_is_an_error(do, add):
    macro = pm.MacroVariable("total", micro="x", over="produkts")
    for model in (do(products, {macro: pm.Natural(9.0)}), add(products, [macro])):
        with pytest.raises(pm.NotAMicroState, match="'produkts'.*'products'"):
            model()


# Inside, one staying and one aggregated over


def stock(over_dim):
    """Three regions, four products; ``over_dim`` is the dimension of the products."""

    def model():
        regions = pyro.plate("regions", 3, dim=-3 - over_dim)
        products = pyro.plate("products", 4, dim=over_dim)
        with regions:
            r = pyro.sample("r", dist.Normal(0.0, 1.0))
        with regions, products:
            loc = torch.arange(12.0).reshape((3, 4) if over_dim == -1 else (4, 3))
            x = pyro.sample("x", dist.Normal(loc + r, 2.0))
            pyro.sample("y", dist.Normal(2 * x + r, 1.0))

    def by_hand(values):
        regions = pyro.plate("regions", 3, dim=-3 - over_dim)
        products = pyro.plate("products", 4, dim=over_dim)
        with regions:
            r = pyro.sample("r", dist.Normal(0.0, 1.0))
        rows = torch.arange(12.0).reshape((3, 4) if over_dim == -1 else (4, 3))
        rows = rows if over_dim == -1 else rows.T  # (regions, products)
        cov = 4.0 * torch.eye(4) + torch.ones(4, 4)
        laws = [
            given_total(rows[i], cov, [[1.0] * 4], [float(values[i])]) for i in range(3)
        ]
        mean = torch.stack([m for m, _ in laws])
        if over_dim == -1:
            mean = mean.unsqueeze(1)
        cov = laws[0][1]
        with regions:
            free = pyro.sample(
                "total__free",
                dist.MultivariateNormal(mean[..., :-1], cov[:-1, :-1]),
            )
        total = values.unsqueeze(-1) if over_dim == -1 else values
        whole = torch.cat([free, (total - free.sum(-1)).unsqueeze(-1)], -1)
        x = whole.squeeze(-2) if over_dim == -1 else whole.T
        with regions, products:
            pyro.deterministic("x", x)
            pyro.sample("y", dist.Normal(2 * x + r, 1.0))

    return model, by_hand


@pytest.mark.parametrize("over_dim", [-1, -2])
def test_one_plate_stays_and_one_is_added_up(over_dim):
    model, by_hand = stock(over_dim)
    values = torch.tensor([9.0, 30.0, -4.0])
    value = values.unsqueeze(-1) if over_dim == -1 else values
    intervened = pm.macro_do(model, {TOTAL: pm.Natural(value)})
    trace = assert_same_program(intervened, lambda: by_hand(values), macros=("total",))
    torch.testing.assert_close(
        trace.nodes["x"]["value"].sum(over_dim), values, msg="one total a region"
    )


@pytest.mark.parametrize("over_dim", [-1, -2])
def test_one_plate_stays_and_one_is_added_up_by_aggregate(add, over_dim):
    model, _ = stock(over_dim)

    def total(trace):
        # A dimension of size one stays behind, unless it was the leftmost
        return {
            "total": trace.nodes["x"]["value"].sum(over_dim, keepdim=over_dim == -1)
        }

    assert_only_added(add(model, [TOTAL]), model, total)


def test_shared_cause_outside_of_the_plate_couples_its_slots(do):
    # With z outside, the micro states of the slots are dependent: one joint latent
    # site, whose density is that of the joint law by hand
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("regions", 2, dim=-1):
            x1 = pyro.sample("x1", dist.Normal(z, 1.0))
            x2 = pyro.sample("x2", dist.Normal(2 * z, 1.0))
            pyro.sample("y", dist.Normal(x1 - x2 + z, 1.0))

    def by_hand():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        slope = torch.tensor([1.0, 2.0, 1.0, 2.0])  # x1, x2 of slot 0, then of slot 1
        rows = [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
        mean, cov = given_total(
            torch.zeros(4), torch.eye(4) + torch.outer(slope, slope), rows, [3.0, 5.0]
        )
        keep = [0, 2]
        first = pyro.sample(
            "x1_joint", dist.MultivariateNormal(mean[keep], cov[keep][:, keep])
        )
        second = torch.tensor([3.0, 5.0]) - first
        with pyro.plate("regions", 2, dim=-1):
            pyro.sample("y", dist.Normal(first - second + z, 1.0))

    intervened = pm.macro_do(model, {SALES: pm.Natural(torch.tensor([3.0, 5.0]))})
    trace = poutine.trace(intervened).get_trace()
    nodes = trace.nodes
    torch.testing.assert_close(
        nodes["x1"]["value"] + nodes["x2"]["value"], torch.tensor([3.0, 5.0])
    )
    data = {n: nodes[n]["value"] for n in ("z", "y")}
    data["x1_joint"] = nodes["x1"]["value"]
    expected = poutine.trace(poutine.condition(by_hand, data)).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), expected.log_prob_sum())


def test_micro_sites_in_a_sequential_plate_are_as_many_sites(do):
    def model():
        x = [
            pyro.sample(f"x{i + 1}", dist.Normal(10.0 * (i + 1), 2.0 - i))
            for i in pyro.plate("parts", 2)
        ]
        w = pyro.sample("w", dist.Normal(1.0, 3.0))
        pyro.sample("y", dist.Normal(x[0] + 3 * x[1] + w, 0.5))

    trace = poutine.trace(do(model, NATURAL)).get_trace()
    data = {n: trace.nodes[n]["value"] for n in ("x1", "w", "y")}
    expected = poutine.trace(poutine.condition(shop_by_hand, data)).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), expected.log_prob_sum())


# Subsampled


@pytest.mark.parametrize("value", [33.0, [30.0, 33.0, 50.0]])
def test_subsampled_plate_scales_the_density_and_subsamples_the_value(do, value):
    value = torch.tensor(value)
    model = do(lambda: regions(size=2), {SALES: pm.Natural(value)})
    seen = set()
    for _ in range(8):
        trace = assert_same_program(model, lambda: regions(value, size=2))
        nodes = trace.nodes
        index = nodes["regions"]["value"]
        seen.add(tuple(index.sort().values.tolist()))
        torch.testing.assert_close(nodes["sales"]["value"], value.expand(3)[index])
        for name in ("sales__micro", "y"):
            assert nodes[name]["scale"] == 1.5
            assert nodes[name]["log_prob"].shape == (2,)
            unscaled = nodes[name]["fn"].log_prob(nodes[name]["value"])
            torch.testing.assert_close(nodes[name]["log_prob"], 1.5 * unscaled)
    assert len(seen) > 1, "each run subsamples anew"


def test_subsampled_plate_takes_the_indices_of_the_guide(do):
    model = do(lambda: regions(size=2), {SALES: pm.Natural(torch.tensor(LOC))})
    guide = poutine.trace(lambda: regions(size=2)).get_trace()
    for name in ("x1", "x2"):
        guide.remove_node(name)
    trace = poutine.trace(poutine.replay(model, trace=guide)).get_trace()
    index = guide.nodes["regions"]["value"]
    assert torch.equal(trace.nodes["regions"]["value"], index)
    torch.testing.assert_close(trace.nodes["sales"]["value"], torch.tensor(LOC)[index])


def test_subsampled_plate_outside_scales_every_site(do):
    def outer(model):
        def run():
            with pyro.plate("outer", 40, subsample_size=4, dim=-1):
                return model()

        return run

    trace = assert_same_program(outer(do(shop, NATURAL)), outer(shop_by_hand))
    assert trace.nodes["sales__micro"]["scale"] == 10.0


def test_subsampled_plate_outside_takes_the_values_of_the_subsample(do):
    # The handler cannot see the plate outside before it runs: the values are indexed
    # by hand, as everything else in such a plate
    grid = torch.arange(40.0)

    def run():
        with pyro.plate("outer", 40, subsample_size=4, dim=-1) as i:
            return do(shop, {SALES: pm.Natural(grid[i])})()

    trace = poutine.trace(run).get_trace()
    index = trace.nodes["outer"]["value"]
    torch.testing.assert_close(trace.nodes["sales"]["value"], grid[index])


def test_subsampled_plate_is_an_unbiased_estimate_of_the_whole(do):
    # Over all subsamples of two of three, the scaled densities have that of the whole
    # as their mean
    whole = poutine.trace(do(regions, NATURAL)).get_trace()
    whole.compute_log_prob()
    x = whole.nodes["sales__micro"]["value"]
    totals = []
    for index in ([0, 1], [0, 2], [1, 2]):
        index = torch.tensor(index)
        source = poutine.Trace()
        for name, value in (("regions", index), ("sales__micro", x[index])):
            node = {**whole.nodes["sales__micro"], "name": name, "value": value}
            source.add_node(name, **node)
        model = do(lambda: regions(size=2), NATURAL)
        trace = poutine.trace(poutine.replay(model, trace=source)).get_trace()
        trace.compute_log_prob()
        totals.append(trace.nodes["sales__micro"]["log_prob_sum"])
    torch.testing.assert_close(
        torch.stack(totals).mean(), whole.nodes["sales__micro"]["log_prob_sum"]
    )


def test_subsampled_plate_under_a_shared_cause_is_an_error_that_says_why():
    # All slots depend on z, those that are not in the subsample too
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("regions", 3, subsample_size=2, dim=-1):
            pyro.sample("x1", dist.Normal(z, 1.0))
            pyro.sample("x2", dist.Normal(2 * z, 1.0))

    with pytest.raises(pm.UnsupportedLaw, match="'regions'.*subsampled"):
        pm.macro_do(model, NATURAL)()


def test_subsampled_plate_in_over_is_an_error_that_says_why(do):
    def model():
        with pyro.plate("products", 4, subsample_size=2, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    for realization in (pm.Natural(9.0), pm.Allocate(9.0, [0.5, 0.5])):
        intervened = do(model, {TOTAL: realization})
        with pytest.raises(pm.NotAMicroState, match="'products' is subsampled"):
            intervened()


def test_subsampled_plate_of_aggregate_shows_the_totals_of_the_subsample(add):
    def model():
        return regions(size=2)

    assert_only_added(add(model, [SALES]), model, sales_total)


def test_subsampled_plate_in_over_is_an_error_of_aggregate(add):
    def model():
        with pyro.plate("products", 4, subsample_size=2, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(pm.NotAMicroState, match="'products' is subsampled"):
        add(model, [TOTAL])()


def test_comparison_sees_a_lost_scale():
    """The comparison itself must be able to fail."""
    trace = poutine.trace(regions).get_trace()
    expected = poutine.trace(poutine.scale(replayed(regions, trace), 2.0)).get_trace()
    assert trace.log_prob_sum() != expected.log_prob_sum()
