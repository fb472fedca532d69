# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""No silent wrong answer: each refusal names the site and says what to do."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_macro as pm

SALES = pm.MacroVariable("sales", ["x1", "x2"])


def shop():
    pyro.sample("x1", dist.Normal(10.0, 2.0))
    pyro.sample("x2", dist.Normal(20.0, 1.0))


def run(realization, model=shop, macro=SALES):
    return pm.macro_do(model, {macro: realization})()


@pytest.mark.parametrize(
    "interventions, message",
    [
        (None, "Expected a dictionary"),
        ({}, "Expected a dictionary"),
        ([pm.Natural(1.0)], "Expected a dictionary"),
        ({"sales": pm.Natural(1.0)}, "use `pyro.poutine.do`"),
        ({SALES: 33.0}, "does not say what happens to its parts"),
        ({SALES: pm.Natural}, "Expected a micro-realization"),
        (
            {
                SALES: pm.Allocate(1.0, [1.0, 0.0]),
                pm.MacroVariable("b", ["x2", "y"]): pm.Natural(2.0),
            },
            "'x2' belongs to both 'sales' and 'b'",
        ),
        (
            {SALES: pm.Natural(1.0), pm.MacroVariable("sales", "y"): pm.Natural(2.0)},
            "have the name 'sales'",
        ),
    ],
)
def test_malformed_interventions(interventions, message):
    with pytest.raises(pm.PyroMacroError, match=message):
        pm.macro_do(shop, interventions)


def test_not_a_model():
    with pytest.raises(pm.PyroMacroError, match="not callable"):
        pm.macro_do({SALES: pm.Natural(1.0)}, {SALES: pm.Natural(1.0)})


def test_unknown_sites_are_named_with_near_misses():
    macro = pm.MacroVariable("sales", ["x1", "x_2"])
    with pytest.raises(pm.UnknownSite, match=r"no site 'x_2'. Did you mean 'x2'.*'x1'"):
        run(pm.Natural(33.0), macro=macro)
    with pytest.raises(pm.UnknownSite, match=r"given: .*'alpha'.*'x1', 'x2'"):
        run(pm.Natural(33.0, given=["alpha"]))
    with pytest.raises(pm.UnknownSite, match="absorb.*'x3'"):
        run(pm.Residual(33.0, absorb="x3"))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), torch.tensor([1, None][0]) / 0]
)
@pytest.mark.parametrize(
    "realization",
    [
        pm.Natural,
        pm.Proportional,
        pm.Shift,
        lambda v: pm.Residual(v, "x2"),
        lambda v: pm.Allocate(v, [0.5, 0.5]),
        lambda v: pm.Explicit(v, lambda t: dist.Delta(t.expand(2), event_dim=1)),
    ],
)
def test_a_value_that_is_no_number(realization, value):
    with pytest.raises(pm.PyroMacroError, match="'sales'.*Expected finite numbers"):
        run(realization(value))


def test_shapes_of_values():
    def stores():
        with pyro.plate("stores", 3):
            shop()

    run(pm.Natural(torch.tensor([1.0, 2.0, 3.0])), stores)
    with pytest.raises(pm.PyroMacroError, match=r"\(2,\).*\(3,\), for plate 'stores'"):
        run(pm.Natural(torch.tensor([1.0, 2.0])), stores)
    with pytest.raises(pm.PyroMacroError, match="no plate of size 2.*plate of its own"):
        run(pm.Natural(torch.tensor([[1.0], [2.0]])), stores)
    both = pm.MacroVariable(
        "both", ["x1", "x2", "x3"], aggregation=pm.Linear(torch.eye(2, 3))
    )

    def three():
        shop()
        pyro.sample("x3", dist.Normal(0.0, 1.0))

    run(pm.Natural(torch.tensor([1.0, 2.0])), three, both)
    for value in (1.0, torch.tensor([1.0, 2.0, 3.0])):
        with pytest.raises(pm.PyroMacroError, match="Expected 2 values"):
            run(pm.Natural(value), three, both)


def test_shapes_of_shares_and_directions():
    with pytest.raises(pm.PyroMacroError, match=r"shares have shape \(3,\).*2 in the"):
        run(pm.Allocate(33.0, [0.2, 0.3, 0.5]))
    with pytest.raises(pm.OffFibre, match="macro value 0.9.*Expected 1.0"):
        run(pm.Allocate(33.0, [0.4, 0.5]))
    with pytest.raises(pm.OffFibre, match="macro value nan"):
        run(pm.Allocate(33.0, [float("nan"), 0.5]))
    with pytest.raises(pm.PyroMacroError, match=r"along has shape \(3,\)"):
        run(pm.Shift(1.0, along=[0.2, 0.3, 0.5]))
    with pytest.raises(pm.OffFibre, match="along has macro value 2.0"):
        run(pm.Shift(1.0, along=[1.0, 1.0]))


def test_what_absorbs_the_rest():
    def products():
        with pyro.plate("products", 4):
            pyro.sample("x", dist.Normal(1.0, 1.0))

    total = pm.MacroVariable("total", "x", over="products")
    with pytest.raises(pm.PyroMacroError, match="4 elements.*absorb=0 to 3"):
        run(pm.Residual(9.0, absorb="x"), products, total)
    with pytest.raises(pm.PyroMacroError, match="absorb=4 is no element"):
        run(pm.Residual(9.0, absorb=4), products, total)
    with pytest.raises(pm.PyroMacroError, match="names 2 elements. Expected 1"):
        run(pm.Residual(9.0, absorb=[0, 1]), products, total)
    weights = pm.Linear([1.0, 1.0, 1.0, 0.0])
    total = pm.MacroVariable("total", "x", over="products", aggregation=weights)
    with pytest.raises(pm.PyroMacroError, match="weight in the macro value is zero"):
        run(pm.Residual(9.0, absorb=3), products, total)


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda v: dist.Normal(v, 1.0), r"event shape \(\). Expected.*\(2,\)"),
        (lambda v: dist.Normal(v.expand(2), 1.0), "add `.to_event"),
        (lambda v: v, "returned Tensor"),
        (lambda v: dist.Delta(torch.ones(3), event_dim=1), r"event shape \(3,\)"),
    ],
)
def test_what_explicit_returns(fn, message):
    with pytest.raises(pm.PyroMacroError, match=message):
        run(pm.Explicit(33.0, fn))


def unsupported(way):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        loc, scale = way(z, w)
        pyro.sample("x1", dist.Normal(loc, scale))
        pyro.sample("x2", dist.Normal(0.0, 1.0))

    return model


@pytest.mark.parametrize(
    "way",
    [
        lambda z, w: (z * w, 1.0),
        lambda z, w: (z.exp(), 1.0),
        lambda z, w: (z.relu(), 1.0),
        lambda z, w: (z.clamp(-2.0, 2.0), 1.0),
        lambda z, w: (torch.where(z > 0, z, 2 * z), 1.0),
        lambda z, w: (torch.maximum(z, w), 1.0),
        lambda z, w: (z, w.exp()),
        lambda z, w: (0.0, 1 + z.square()),
        lambda z, w: (torch.tensor(z.item()), 1.0),
        lambda z, w: (torch.tensor(1.0 if z > 0 else -1.0), 1.0),
        lambda z, w: (z.detach(), 1.0),
        # kinks that large noise need not meet
        lambda z, w: (torch.maximum(z, w + 1), 1.0),
        lambda z, w: (torch.stack([z, w]).sort()[0][0], 1.0),
        lambda z, w: ((w - z - 3).relu(), 1.0),
        lambda z, w: (z + 3 * (w > z + 3.5), 1.0),
        lambda z, w: (z + torch.where((z > 0.5) & (z < 1.5), 5.0, 0.0), 1.0),
        lambda z, w: (0.0, 1 + 10 * (w - z - 3).relu()),
        lambda z, w: (z.abs(), 1.0),
        lambda z, w: (z.long().to(z.dtype), 1.0),
        lambda z, w: (torch.nn.functional.leaky_relu(z - 20), 1.0),
        lambda z, w: (torch.randn(()) + 0 * z, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_programs_that_are_not_affine_are_refused(way, dtype):
    torch.set_default_dtype(dtype)
    with pytest.raises(pm.UnsupportedLaw, match="not jointly affine-Gaussian.*'z'"):
        run(pm.Residual(33.0, "x2"), unsupported(way))


@pytest.mark.parametrize(
    "way", [lambda z, w: (z * w, 1.0), lambda z, w: (0.0, z.exp())]
)
def test_natural_laws_of_programs_that_are_not_affine_are_sampled(way, monkeypatch):
    asked = []

    def sampled(on_fibre, chains, dtype):
        asked.append(on_fibre.counted)
        raise pm.UnsupportedLaw("chains")

    monkeypatch.setattr("pyro_macro.realizations.search.sampled_law", sampled)
    with pytest.raises(pm.UnsupportedLaw, match="chains"):
        run(pm.Natural(33.0), unsupported(way))
    assert asked and "z" in asked[0] and "x1" in asked[0]


def test_numbers_drawn_outside_of_pyro_are_not_sampled_either():
    model = unsupported(lambda z, w: (torch.randn(()) + 0 * z, 1.0))
    with pytest.raises(pm.UnsupportedLaw, match="draws numbers outside of Pyro"):
        run(pm.Natural(33.0), model)


@pytest.mark.parametrize(
    "way",
    [
        lambda z, w: (1e5 + z**2, 1.0),
        lambda z, w: (1e4 + z, torch.exp(0.2 * z)),
        lambda z, w: (1e4 + z * w, 1.0),
    ],
)
def test_small_effects_beside_large_values_count_in_float32(way):
    torch.set_default_dtype(torch.float32)
    with pytest.raises(pm.UnsupportedLaw, match="not jointly affine-Gaussian"):
        run(pm.Residual(33.0, "x2"), unsupported(way))
    affine = unsupported(lambda z, w: (1e5 + z - 2 * w, 1.0))
    run(pm.Natural(33.0), affine)


def test_a_kink_in_what_is_held_is_no_kink():
    run(pm.Natural(33.0, given=["z"]), unsupported(lambda z, w: (z.relu() + w, 1.0)))
    bounded = unsupported(lambda z, w: (w, pyro.param("s", torch.ones(())).clamp(0.1)))
    run(pm.Natural(33.0), bounded)


@pytest.mark.parametrize("value", ["33", None, True, 3 + 4j])
def test_a_value_of_the_wrong_type(value):
    with pytest.raises(pm.PyroMacroError, match="Expected a number or a tensor"):
        run(pm.Natural(value))


def test_malformed_arguments_of_realizations():
    for given in (3, [3], {"z": 1.0}, torch.ones(2)):
        with pytest.raises(pm.PyroMacroError, match="expected names of sites"):
            pm.Natural(33.0, given=given)
    for absorb in (1.0, [1.0], None):
        with pytest.raises(pm.PyroMacroError, match="Expected the name of a micro"):
            pm.Residual(33.0, absorb=absorb)


def test_a_name_that_is_taken():
    def model():
        pyro.sample("sales", dist.Normal(0.0, 1.0))
        shop()

    with pytest.raises(pm.PyroMacroError, match="a site of that name already"):
        run(pm.Natural(33.0), model)


@pytest.mark.parametrize(
    "realization",
    [
        pm.Allocate(1.0, [0.5, 0.5]),
        pm.Proportional(1.0),
        pm.Shift(1.0, along=[1.0, 0.0]),
        pm.Residual(1.0, "x1"),
        pm.Explicit(1.0, lambda v: dist.Delta(v.expand(2) / 2, event_dim=1)),
    ],
)
@pytest.mark.parametrize("micro", [["x1", "x2"], ["x2", "x1"]])
def test_a_directed_path_is_refused_whatever_the_realization(realization, micro):
    def model():
        x1 = pyro.sample("x1", dist.Normal(0.0, 1.0))
        pyro.sample("x2", dist.Normal(3 * x1, 0.1))

    with pytest.raises(pm.NotAMicroState, match="path from 'x1' to 'x2'"):
        run(realization, model, pm.MacroVariable("sales", micro))


QUIET = pm.Chains(num_samples=120, warmup_steps=60, num_chains=1, progress=False)


def latent(macro, realization, model, **data):
    """The law of the latent site, with some sites conditioned outside."""
    intervened = pm.macro_do(model, {macro: realization})
    outside = pyro.poutine.condition(intervened, data=data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pm.NotConverged)
        return pyro.poutine.trace(outside).get_trace().nodes["sales__micro"]["fn"]


def assert_mean_of_x1(law, log_weight):
    """E[x1 | x1 + x2 = 3] = (E[z | total] + 3) / 2, for x1 ~ N(z, 1), x2 ~ N(0, 1).

    :param log_weight: the log density of ``z``, but for that of the total.
    """
    z = torch.linspace(-8.0, 25.0, 60_000)[1:]
    logs = log_weight(z).nan_to_num(nan=-torch.inf)
    weight = (logs + dist.Normal(z, 2**0.5).log_prob(torch.tensor(3.0))).softmax(0)
    mean = ((weight * z).sum() + 3) / 2
    variance = (weight * (z / 2 - mean + 1.5).square()).sum() + 0.5
    error = 5 * (variance / 25).sqrt()
    assert (law.draws[:, 0].mean() - mean).abs() < error
    assert (law.draws.sum(-1) - 3).abs().max() < 1e-9


def below(law):
    def model():
        z = pyro.sample("z", law)
        pyro.sample("x1", dist.Normal(z, 1.0))
        pyro.sample("x2", dist.Normal(0.0, 1.0))

    return model


@pytest.mark.parametrize(
    "law, low",
    [
        (lambda: dist.Gamma(2.0, 2.0), 0.0),
        pytest.param(lambda: dist.LogNormal(0.0, 1.0), 0.0, marks=pytest.mark.slow),
        pytest.param(lambda: dist.StudentT(3.0), -9.0, marks=pytest.mark.slow),
    ],
    ids=["Gamma", "LogNormal", "StudentT"],
)
def test_ancestors_that_are_not_gaussian_are_integrated_out_by_draws(law, low):
    found = latent(SALES, pm.Natural(3.0, sampler=QUIET), below(law()))
    assert found.method.startswith("Monte Carlo: NUTS on the fibre")

    def log_weight(z):
        inside = z > low
        density = law().log_prob(torch.where(inside, z, torch.ones_like(z)))
        return torch.where(inside, density, -torch.inf)

    assert_mean_of_x1(found, log_weight)
    run(pm.Natural(33.0, given="z"), below(law()))


def test_finite_ancestors_are_summed_out_exactly():
    law = latent(SALES, pm.Natural(3.0), below(dist.Bernoulli(0.01)))
    assert law.method.startswith("exact: mixture of 2")
    z = torch.tensor([0.0, 1.0])
    weight = torch.tensor([0.99, 0.01]).log()
    weight = weight + dist.Normal(z, 2**0.5).log_prob(torch.tensor(3.0))
    mean = (weight.softmax(0) * (z + 3) / 2).sum()
    torch.testing.assert_close(law.mean, torch.stack([mean, 3 - mean]))


def test_an_ancestor_with_infinitely_many_values_is_named():
    with pytest.raises(pm.UnsupportedLaw, match=r"'z'.*Poisson.*given=\['z'\]"):
        run(pm.Natural(33.0, sampler=QUIET), below(dist.Poisson(3.0)))
    run(pm.Natural(33.0, given="z"), below(dist.Poisson(3.0)))


def test_micro_sites_that_are_not_gaussian_have_laws_too():
    def model():
        pyro.sample("x1", dist.Gamma(2.0, 1.0))
        pyro.sample("x2", dist.Normal(0.0, 1.0))

    law = latent(SALES, pm.Natural(3.0, sampler=QUIET), model)
    x = torch.linspace(0.0, 12.0, 20_001)[1:]
    weight = dist.Gamma(2.0, 1.0).log_prob(x) + dist.Normal(3.0, 1.0).log_prob(x)
    weight = weight.softmax(0)
    mean = (weight * x).sum()
    error = 5 * ((weight * (x - mean).square()).sum() / 25).sqrt()
    assert (law.draws[:, 0].mean() - mean).abs() < error
    law = latent(SALES, pm.Residual(3.0, "x2"), model)
    state = torch.tensor([1.7, 1.3])
    wanted = dist.Gamma(2.0, 1.0).log_prob(state[0])
    torch.testing.assert_close(law.log_prob(state), wanted)
    run(pm.Allocate(3.0, [0.5, 0.5]), model)


def test_a_map_that_is_not_linear_has_no_known_law():
    peak = pm.MacroVariable(
        "peak", ["x1", "x2"], aggregation=pm.Custom(lambda x: x.max(-1).values)
    )
    with pytest.raises(pm.UnsupportedLaw, match="monotone in no element.*Explicit"):
        run(pm.Natural(3.0), macro=peak)
    for realization in (
        pm.Residual(3.0, "x1"),
        pm.Proportional(3.0),
        pm.Shift(1.0),
    ):
        with pytest.raises(pm.UnsupportedLaw, match="not linear.*Explicit"):
            run(realization, macro=peak)
    run(pm.Allocate(3.0, [1.0, 0.5]), macro=peak)
    with pytest.raises(pm.OffFibre, match="Expected 3.0"):
        run(
            pm.Explicit(3.0, lambda v: dist.Delta(torch.ones(2), event_dim=1)),
            macro=peak,
        )


def test_a_degenerate_micro_state():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("x1", z)
        pyro.deterministic("x2", 2 * z)

    with pytest.raises(pm.UnsupportedLaw, match="degenerate.*x1"):
        run(pm.Natural(3.0), model)


def test_a_given_site_that_is_downstream():
    def model():
        shop()
        pyro.sample("y", dist.Normal(0.0, 1.0))

    def downstream():
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        pyro.sample("y", dist.Normal(x1, 1.0))
        pyro.sample("x2", dist.Normal(20.0, 1.0))

    run(pm.Natural(33.0, given="y"), model)
    for given in ("y", "x1"):
        with pytest.raises(pm.PyroMacroError, match=f"'{given}' is a micro site of an"):
            run(pm.Natural(33.0, given=given), downstream)


def test_a_given_site_that_is_not_gaussian_tells_of_its_parents():
    """Held, but neither Gaussian nor a root: what it says of ``z`` counts."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("count", dist.Poisson(z.exp()))
        pyro.sample("x1", dist.Normal(z, 1.0))
        pyro.sample("x2", dist.Normal(0.0, 1.0))

    count = torch.tensor(6.0)
    natural = pm.Natural(3.0, given="count", sampler=QUIET)
    law = latent(SALES, natural, model, count=count)

    def log_weight(z):
        seen = dist.Poisson(z.clamp(max=9.0).exp()).log_prob(count)
        return dist.Normal(0.0, 1.0).log_prob(z) + seen

    assert_mean_of_x1(law, log_weight)
    # With its parents held too, the law is exact
    law = latent(SALES, pm.Natural(3.0, given=["count", "z"]), model)
    assert law.method.startswith("exact")


def test_dependent_totals_in_one_handler():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for name in ("x1", "x2", "y1", "y2"):
            pyro.sample(name, dist.Normal(z, 1.0))

    other = pm.MacroVariable("other", ["y1", "y2"])
    for first, second in [
        (pm.Natural(1.0), pm.Residual(1.0, "y1")),
        (pm.Residual(1.0, "x1"), pm.Residual(1.0, "y1")),
    ]:
        with pytest.raises(pm.UnsupportedLaw, match=r"dependent, through \['z'\]"):
            pm.macro_do(model, {SALES: first, other: second})()
    pm.macro_do(model, {SALES: pm.Natural(1.0), other: pm.Allocate(1.0, [0.0, 1.0])})()
    held = {SALES: pm.Natural(1.0, given="z"), other: pm.Natural(1.0, given="z")}
    pm.macro_do(model, held)()


def test_an_over_plate_that_is_subsampled():
    def products():
        with pyro.plate("products", 10, subsample_size=4):
            pyro.sample("x", dist.Normal(1.0, 1.0))

    total = pm.MacroVariable("total", "x", over="products")
    with pytest.raises(pm.NotAMicroState, match="subsampled .4 of 10."):
        run(pm.Natural(9.0), products, total)


def test_a_context_manager_that_would_have_to_look_ahead():
    def hidden():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x1", dist.Normal(z, 1.0))
        pyro.sample("x2", dist.Normal(z, 1.0))

    def early():
        x1 = pyro.sample("x1", dist.Normal(0.0, 1.0))
        pyro.sample("x2", dist.Normal(x1 * 2, 1.0))

    handler = pm.macro_do(interventions={SALES: pm.Natural(3.0)})
    with pytest.raises(pm.UnsupportedLaw, match=r"depends on \['z'\]. Wrap"), handler:
        hidden()
    with pytest.raises(pm.PyroMacroError, match="'x1' is used before"), handler:
        early()
    with pytest.raises(pm.UnknownSite, match="no site 'x1'"), handler:
        pyro.sample("x2", dist.Normal(0.0, 1.0))
    assert not pyro.poutine.runtime.am_i_wrapped()


def test_empty_micro_states():
    """Pyro refuses an empty plate itself; an empty event dimension is refused here."""

    def products(size):
        with pyro.plate("products", size):
            pyro.sample("x", dist.Normal(1.0, 1.0))

    total = pm.MacroVariable("total", "x", over="products")
    with pytest.raises(ZeroDivisionError, match="size cannot be zero"):
        pm.macro_do(products, {total: pm.Natural(1.0)})(0)
    assert not pyro.poutine.runtime.am_i_wrapped()
    with pytest.raises(pm.NotAMicroState, match="1 element.*nothing is aggregated"):
        pm.macro_do(products, {total: pm.Natural(1.0)})(1)

    def empty():
        pyro.sample("x", dist.Normal(torch.zeros(0), 1.0).to_event(1))

    with pytest.raises(pm.NotAMicroState, match="0 element"):
        pm.macro_do(empty, {pm.MacroVariable("total", "x"): pm.Natural(1.0)})()


def test_the_value_zero_is_a_value():
    for realization in (
        pm.Natural(0),
        pm.Residual(0, "x2"),
        pm.Allocate(0, [0.5, 0.5]),
        pm.Proportional(0),
        pm.Shift(0),
    ):
        trace = pyro.poutine.trace(pm.macro_do(shop, {SALES: realization})).get_trace()
        total = trace.nodes["x1"]["value"] + trace.nodes["x2"]["value"]
        torch.testing.assert_close(trace.nodes["sales"]["value"], total)
        assert isinstance(realization, pm.Shift) or total.abs() < 1e-12


@pytest.mark.parametrize(
    "aggregation, total",
    [
        (pm.Mean(), lambda x: x.mean()),
        (pm.Linear([2.0, -1.0]), lambda x: 2 * x[0] - x[1]),
    ],
)
def test_other_linear_maps(aggregation, total):
    macro = pm.MacroVariable("m", ["x1", "x2"], aggregation=aggregation)
    for realization in (pm.Natural(7.0), pm.Residual(7.0, "x1"), pm.Proportional(7.0)):
        nodes = (
            pyro.poutine.trace(pm.macro_do(shop, {macro: realization}))
            .get_trace()
            .nodes
        )
        x = torch.stack([nodes["x1"]["value"], nodes["x2"]["value"]])
        torch.testing.assert_close(total(x), torch.tensor(7.0))


def test_natural_values_behind_what_is_set_are_refused():
    """They would be those of a world in which nothing was set."""

    def chain():
        a1 = pyro.sample("a1", dist.Normal(1.0, 0.1))
        a2 = pyro.sample("a2", dist.Normal(1.0, 0.1))
        pyro.sample("b1", dist.Normal(a1, 0.1))
        pyro.sample("b2", dist.Normal(a2, 0.1))

    a, b = pm.MacroVariable("a", ["a1", "a2"]), pm.MacroVariable("b", ["b1", "b2"])
    set_a = pm.Allocate(100.0, [0.5, 0.5])
    for moved in (pm.Shift(1.0, [0.5, 0.5]), pm.Proportional(3.0)):
        with pytest.raises(pm.PyroMacroError, match=r"b1.*a1.*Nest two"):
            pm.macro_do(chain, {a: set_a, b: moved})()
    nested = pm.macro_do(pm.macro_do(chain, {b: pm.Shift(1.0, [0.5, 0.5])}), {a: set_a})
    value = pyro.poutine.trace(nested).get_trace().nodes["b1"]["value"]
    assert abs(value - 50.5) < 1.0
