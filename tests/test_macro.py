# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Macro-variables, aggregation maps, and ``aggregate``."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive

import pyro_macro as pm


def test_a_macro_variable_is_a_value():
    one = pm.MacroVariable("m", ["a", "b"], aggregation=pm.Linear([1.0, 2.0]))
    same = pm.MacroVariable("m", ("a", "b"), (), pm.Linear(torch.tensor([1.0, 2.0])))
    assert one == same and hash(one) == hash(same) and {one: 1}[same] == 1
    others = [
        pm.MacroVariable("n", ["a", "b"], aggregation=pm.Linear([1.0, 2.0])),
        pm.MacroVariable("m", ["b", "a"], aggregation=pm.Linear([1.0, 2.0])),
        pm.MacroVariable("m", ["a", "b"], aggregation=pm.Linear([1.0, 3.0])),
        pm.MacroVariable("m", ["a", "b"], aggregation=pm.Linear([[1.0, 2.0]])),
        pm.MacroVariable("m", ["a", "b"]),
        pm.MacroVariable("m", ["a", "b"], over="p"),
    ]
    assert all(one != other for other in others)
    with pytest.raises(AttributeError):
        one.name = "other"


def test_readable():
    text = repr(pm.MacroVariable("stock", micro="x", over="p", aggregation=pm.Mean()))
    assert text == "MacroVariable('stock', micro='x', over='p', aggregation=Mean())"
    assert repr(pm.Linear([1.0, 2.0])) == "Linear([1.0, 2.0])"
    assert repr(pm.Linear(torch.ones(100))) == "Linear(<weights of shape (100,)>)"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "", "micro": "x"}, "Expected a string"),
        ({"name": "m", "micro": []}, "names no site"),
        ({"name": "m", "micro": ["x", "x"]}, "twice"),
        ({"name": "m", "micro": ["m", "x"]}, "name of one of its micro sites"),
        ({"name": "m", "micro": [1, 2]}, "Expected names"),
        ({"name": "m", "micro": "x", "aggregation": pm.Sum}, "Expected an instance"),
        ({"name": "m", "micro": "x", "aggregation": sum}, "Expected an instance"),
    ],
)
def test_malformed_macro_variables(arguments, message):
    with pytest.raises(TypeError, match=message):
        pm.MacroVariable(**arguments)


@pytest.mark.parametrize(
    "weights, message",
    [
        (torch.zeros(3), "dependent"),
        ([[1.0, 2.0], [2.0, 4.0]], "dependent"),
        ([1.0, float("nan")], "NaN"),
        (torch.ones(2, 2, 2), "Expected \\(K,\\)"),
        ([], "Expected \\(K,\\)"),
    ],
)
def test_malformed_weights(weights, message):
    with pytest.raises(pm.NotAMicroState, match=message):
        pm.Linear(weights)


def program():
    with pyro.plate("stores", 2, dim=-1):
        base = pyro.sample("base", dist.Normal(0.0, 1.0))
        with pyro.plate("products", 3, dim=-2):
            pyro.sample("x", dist.Normal(base, 1.0))
            pyro.sample("v", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.deterministic("d", 2 * base + torch.zeros(3, 1))


VARIABLES = {
    "sum over one plate": (pm.MacroVariable("m", "x", over="products"), (2,)),
    "sum over the other": (pm.MacroVariable("m", "x", over="stores"), (3, 1)),
    "sum over both": (pm.MacroVariable("m", "x", over=["stores", "products"]), ()),
    "event only": (pm.MacroVariable("m", "v"), (3, 2)),
    "event and plate": (pm.MacroVariable("m", "v", over="products"), (2,)),
    "two sites": (pm.MacroVariable("m", ["x", "v"]), (3, 2)),
    "two sites, one outside": (pm.MacroVariable("m", ["base", "x"], "products"), (2,)),
    "deterministic": (pm.MacroVariable("m", "d", over="products"), (2,)),
    "mean": (pm.MacroVariable("m", "v", aggregation=pm.Mean()), (3, 2)),
    "custom": (
        pm.MacroVariable("m", "v", aggregation=pm.Custom(lambda x: x.max(-1).values)),
        (3, 2),
    ),
}


def by_hand(case, x):
    return {
        "sum over one plate": lambda: x["x"].sum(-2),
        "sum over the other": lambda: x["x"].sum(-1, keepdim=True),
        "sum over both": lambda: x["x"].sum((-1, -2)),
        "event only": lambda: x["v"].sum(-1),
        "event and plate": lambda: x["v"].sum((-1, -3)),
        "two sites": lambda: x["x"] + x["v"].sum(-1),
        "two sites, one outside": lambda: (
            x["base"].squeeze(-2) + x["x"].sum(-2)
            if x["base"].dim() > 1
            else x["base"] + x["x"].sum(-2)
        ),
        "deterministic": lambda: x["d"].sum(-2),
        "mean": lambda: x["v"].mean(-1),
        "custom": lambda: x["v"].max(-1).values,
    }[case]()


@pytest.mark.parametrize("case", VARIABLES)
def test_aggregation_runs_over_what_was_declared(case):
    macro, shape = VARIABLES[case]
    trace = pyro.poutine.trace(pm.aggregate(program, [macro])).get_trace()
    values = {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample"}
    assert values["m"].shape == shape
    torch.testing.assert_close(values["m"], by_hand(case, values))
    trace.compute_log_prob()  # the site's shape fits its plates
    assert trace.nodes["m"]["infer"] == {"_deterministic": True}


@pytest.mark.parametrize("case", VARIABLES)
def test_never_over_the_particles(case):
    macro, shape = VARIABLES[case]
    draws = Predictive(pm.aggregate(program, [macro]), num_samples=5, parallel=True)()
    assert draws["m"].shape[0] == 5
    for i in range(5):
        one = {name: value[i] for name, value in draws.items()}
        found = one["m"].reshape(shape)
        torch.testing.assert_close(found, by_hand(case, one).reshape(shape))


def test_aggregate_changes_nothing_else():
    macro = VARIABLES["event and plate"][0]
    pyro.set_rng_seed(1)
    plain = pyro.poutine.trace(program).get_trace()
    pyro.set_rng_seed(1)
    trace = pyro.poutine.trace(pm.aggregate(program, [macro])).get_trace()
    assert set(trace.nodes) - set(plain.nodes) == {"m"}
    assert trace.log_prob_sum() == plain.log_prob_sum()


def test_three_forms_of_aggregate():
    sales = pm.MacroVariable("sales", ["x1", "x2"])

    def shop():
        return pyro.sample("x1", dist.Normal(0.0, 1.0)) + pyro.sample(
            "x2", dist.Normal(0.0, 1.0)
        )

    @pm.aggregate(macros=[sales])
    def decorated():
        """My shop."""
        return shop()

    assert decorated.__doc__ == "My shop."
    with pm.aggregate(macros=sales):
        inside = pyro.poutine.trace(shop).get_trace()
    for trace in (
        pyro.poutine.trace(pm.aggregate(shop, [sales])).get_trace(),
        pyro.poutine.trace(decorated).get_trace(),
        inside,
    ):
        assert trace.nodes["sales"]["value"] == trace.nodes["_RETURN"]["value"]


def test_aggregate_sees_what_propagates():
    sales = pm.MacroVariable("sales", ["x1", "x2"])

    def shop():
        pyro.sample("x1", dist.Normal(0.0, 1.0))
        pyro.sample("x2", dist.Normal(0.0, 1.0))

    counted = pm.aggregate(shop, [sales])
    set_to = {"x1": torch.tensor(5.0), "x2": torch.tensor(7.0)}
    for model in (
        pyro.poutine.condition(counted, set_to),
        pyro.poutine.do(counted, set_to),
        pm.aggregate(pyro.poutine.condition(shop, set_to), [sales]),
    ):
        assert pyro.poutine.trace(model).get_trace().nodes["sales"]["value"] == 12
    with pytest.raises(pm.PyroMacroError, match="Turn the two round"):
        pm.aggregate(pyro.poutine.do(shop, set_to), [sales])()


def test_aggregate_errors():
    def shop():
        pyro.sample("x1", dist.Normal(0.0, 1.0))
        with pyro.plate("p", 2):
            pyro.sample("x2", dist.Normal(0.0, 1.0))

    with pytest.raises(pm.UnknownSite, match="'x3'. Did you mean 'x2' or 'x1'"):
        pm.aggregate(shop, [pm.MacroVariable("m", ["x1", "x3"])])()
    with pytest.raises(pm.NotAMicroState, match="'x2' is in plate 'p'.*over='p'"):
        pm.aggregate(shop, [pm.MacroVariable("m", ["x1", "x2"])])()
    with pytest.raises(pm.NotAMicroState, match="over='q' is no plate.*'p'"):
        pm.aggregate(shop, [pm.MacroVariable("m", ["x2"], over="q")])()
    with pytest.raises(pm.NotAMicroState, match="3 elements, the weights are for 2"):
        linear = pm.Linear([1.0, 1.0])
        pm.aggregate(shop, [pm.MacroVariable("m", ["x1", "x2"], "p", linear)])()
    with pytest.raises(pm.PyroMacroError, match="two macro-variables have the name"):
        pm.aggregate(shop, [pm.MacroVariable("m", "x1"), pm.MacroVariable("m", "x2")])
    with pytest.raises(pm.PyroMacroError, match="is no MacroVariable"):
        pm.aggregate(shop, ["x1"])
    with pytest.raises(pm.PyroMacroError, match="not callable"):
        pm.aggregate([pm.MacroVariable("m", "x1")], ())


def test_several_runs_in_one_context():
    """The second run is not aggregated with what is left of the first."""
    sales = pm.MacroVariable("sales", ["x1", "x2"])

    def shop():
        pyro.sample("x1", dist.Normal(0.0, 1.0))
        pyro.sample("x2", dist.Normal(0.0, 1.0))

    for handler in (
        pm.aggregate(macros=[sales]),
        pm.macro_do(interventions={sales: pm.Natural(5.0)}),
    ):
        with handler:
            traces = [pyro.poutine.trace(shop).get_trace() for _ in range(3)]
        for trace in traces:
            total = trace.nodes["x1"]["value"] + trace.nodes["x2"]["value"]
            torch.testing.assert_close(trace.nodes["sales"]["value"], total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_micro_values_keep_their_dtype_in_each_form(dtype):
    sales = pm.MacroVariable("sales", ["x1", "x2"])

    def shop():
        x1 = pyro.sample("x1", dist.Normal(torch.tensor(1.0, dtype=dtype), 1.0))
        x2 = pyro.sample("x2", dist.Normal(torch.tensor(2.0, dtype=dtype), 1.0))
        return x1, x2

    interventions = {sales: pm.Natural(5.0)}
    with pm.macro_do(interventions=interventions):
        inside = shop()
    for x1, x2 in (inside, pm.macro_do(shop, interventions)()):
        assert x1.dtype == x2.dtype == dtype
        assert abs((x1 + x2).item() - 5) < 1e-5
