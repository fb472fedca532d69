# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What questions refuse, in one clear sentence each; and what they need not refuse."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_macro as pm

SALES = pm.MacroVariable("sales", micro=["x1", "x2"])
NAN = float("nan")


def shop(price=3.0):
    x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    pyro.deterministic("revenue", x1 + price * x2)


def gamma_shop():
    x1 = pyro.sample("x1", dist.Gamma(2.0, 1.0))
    x2 = pyro.sample("x2", dist.Gamma(3.0, 1.0))
    pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))


def coins():
    x1 = pyro.sample("x1", dist.Bernoulli(0.3))
    x2 = pyro.sample("x2", dist.Bernoulli(0.6))
    pyro.sample("revenue", dist.Bernoulli(0.1 + 0.2 * x1 + 0.5 * x2))


def poisson_shop():
    x1 = pyro.sample("x1", dist.Poisson(2.0))
    x2 = pyro.sample("x2", dist.Poisson(3.0))
    pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))


def confounded_gammas():
    z = pyro.sample("z", dist.Exponential(1.0))
    x1 = pyro.sample("x1", dist.Gamma(2.0 + z, 1.0))
    x2 = pyro.sample("x2", dist.Gamma(3.0 + z, 1.0))
    pyro.sample("revenue", dist.Normal(x1 + 3 * x2 - z, 1.0))


def half(value):
    return pm.Allocate(value, (0.5, 0.5))


def ask(model=shop, cause=SALES, effect="revenue", realization=pm.Natural, **options):
    settings = {"num_samples": 50, "progress": False} | options
    return pm.confounding(model, cause, effect, realization, **settings)


def refused(what, kind=pm.PyroMacroError, match=None, **options):
    """The message, which is one for people."""
    with pytest.raises(kind, match=match) as error:
        what(**options)
    said = str(error.value)
    assert said[:1].isalpha() or said[:1] in "'<(" or said[:1].isdigit()
    assert said.rstrip().endswith((".", "?", ")")), said
    assert "Traceback" not in said and len(said) < 700
    return said


QUESTIONS = {
    "confounding": pm.confounding,
    "can_inhibit": pm.can_inhibit,
    "structural_coefficient": pm.structural_coefficient,
    "macro_scm_exists": pm.macro_scm_exists,
    "macro_noise": pm.macro_noise,
    "shift_confounding": lambda *a, **k: pm.shift_confounding(*a, delta=1.0, **k),
    "atomic_from_shifts": pm.atomic_from_shifts,
    "shift_from_atomics": lambda *a, **k: pm.shift_from_atomics(*a, delta=[1.0], **k),
    "blocks_backdoor": pm.blocks_backdoor,
    "macro_adjust": lambda *a, **k: pm.macro_adjust(*a, adjustment=["z"], **k),
}
every_question = pytest.mark.parametrize("ask_it", QUESTIONS.values(), ids=QUESTIONS)


# -- The program, its cause and its effect, in all questions -----------------------


@every_question
def test_unknown_effect(ask_it):
    with pytest.raises(pm.UnknownSite, match="Did you mean 'revenue'"):
        ask_it(shop, SALES, "revenu")


@every_question
def test_unknown_cause(ask_it):
    with pytest.raises(pm.UnknownSite, match="'x3'.*Did you mean 'x"):
        ask_it(shop, pm.MacroVariable("sales", ["x1", "x3"]), "revenue")


@every_question
@pytest.mark.parametrize("cause", ["sales", None, ["x1", "x2"]])
def test_cause_that_is_no_macro_variable(ask_it, cause):
    with pytest.raises(pm.PyroMacroError, match="Expected the MacroVariable"):
        ask_it(shop, cause, "revenue")


@every_question
@pytest.mark.parametrize("effect", [3, None, ["revenue"]])
def test_effect_that_is_no_site(ask_it, effect):
    with pytest.raises(
        pm.PyroMacroError, match="Expected a MacroVariable, or the name"
    ):
        ask_it(shop, SALES, effect)


@every_question
@pytest.mark.parametrize("model", [None, "shop", 3])
def test_model_that_is_not_callable(ask_it, model):
    with pytest.raises(pm.PyroMacroError, match="not callable"):
        ask_it(model, SALES, "revenue")


@every_question
@pytest.mark.parametrize("model_args", [5, None])
def test_model_args_that_are_no_tuple(ask_it, model_args):
    with pytest.raises(pm.PyroMacroError, match="model_args"):
        ask_it(shop, SALES, "revenue", model_args=model_args)


@every_question
@pytest.mark.parametrize(
    "effect", ["x1", SALES, pm.MacroVariable("m", ["x2", "revenue"])]
)
def test_effect_that_shares_sites_with_the_cause(ask_it, effect):
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        shop()

    with pytest.raises(pm.PyroMacroError, match="belongs to the effect"):
        ask_it(model, SALES, effect)


@every_question
def test_directed_path_among_micro_sites(ask_it):
    """Assumption 1, also through a site that is not aggregated."""

    def chain():
        x1 = pyro.sample("x1", dist.Normal(0.0, 1.0))
        m = pyro.sample("m", dist.Normal(x1, 1.0))
        x2 = pyro.sample("x2", dist.Normal(m, 1.0))
        pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))

    with pytest.raises(pm.NotAMicroState, match="'x1' to 'x2'"):
        ask_it(chain, SALES, "revenue")


@every_question
@pytest.mark.parametrize("observed", ["x1", "revenue"])
def test_observed_sites(ask_it, observed):
    def seen():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x1 = pyro.sample("x1", dist.Normal(z, 2.0))
        x2 = pyro.sample("x2", dist.Normal(z, 1.0))
        pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))

    model = pyro.condition(seen, data={observed: torch.tensor(1.0)})
    with pytest.raises(pm.UnsupportedLaw, match=f"{observed}.*observed"):
        ask_it(model, SALES, "revenue")


@every_question
def test_errors_of_the_model_are_its_own(ask_it):
    def broken():
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        ask_it(broken, SALES, "revenue")


@every_question
def test_state_after_a_refusal(ask_it):
    """A refusal leaves nothing behind."""
    state = torch.get_rng_state()
    with pytest.raises(pm.UnknownSite):
        ask_it(shop, SALES, "nothing")
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store().keys()) == []
    assert list(pyro.poutine.trace(shop).get_trace().nodes)[1:4] == [
        "x1",
        "x2",
        "revenue",
    ]


# -- Macro values ------------------------------------------------------------------


@pytest.mark.parametrize(
    "at",
    [[], [NAN], [float("inf")], [[1.0]], "33", ["a"], {}, [1, "b"], torch.ones(2, 2)],
)
@pytest.mark.parametrize("model", [shop, coins, gamma_shop])
def test_macro_values_that_are_none(at, model):
    said = refused(ask, model=model, at=at)
    assert "at " in said


@pytest.mark.parametrize("at", [33.0, 33, [33.0], (33.0,), torch.tensor(33.0)])
def test_one_macro_value(at):
    assert ask(at=at).at.tolist() == [33.0]


def test_vector_cause_without_macro_values():
    macro = pm.MacroVariable("s", ["x1", "x2"], aggregation=pm.Linear([[1.0, 1.0]]))
    refused(ask, match="at=", cause=macro)
    refused(ask, match="2 numbers a row. Expected 1", cause=macro, at=[[1.0, 2.0]])
    refused(ask, match=r"\(n, m\)", cause=macro, at=[1.0])
    assert ask(cause=macro, at=[[33.0]]).verdict == "inhibiting"


@pytest.mark.parametrize(
    "model, at, match",
    [
        (coins, [5.0], "5.0 cannot be reached. Its values are 0.0, 1.0, 2.0"),
        (coins, [0.0, 0.5], "0.5 cannot be reached"),
        (gamma_shop, [-1.0], "-1 cannot be reached"),
        (poisson_shop, [1.5], "1.5 cannot be reached"),
        (confounded_gammas, [-1.0], "-1 cannot be reached"),
    ],
)
@pytest.mark.parametrize("realization", [pm.Natural, half], ids=["natural", "half"])
def test_macro_values_off_the_support(model, at, match, realization):
    refused(ask, pm.Infeasible, match, model=model, at=at, realization=realization)


def test_macro_value_of_probability_zero():
    """Among the values of the sites, but with no weight."""

    def never():
        x1 = pyro.sample("x1", dist.Categorical(torch.tensor([0.5, 0.0, 0.5])))
        x2 = pyro.sample("x2", dist.Categorical(torch.tensor([1.0, 0.0])))
        pyro.sample("revenue", dist.Bernoulli(0.1 + 0.2 * x1 + 0.3 * x2))

    assert ask(model=never).at.tolist() == [0.0, 2.0]
    refused(ask, pm.Infeasible, "1.0 cannot be reached", model=never, at=[1.0])


@pytest.mark.parametrize("at", [None, [3.0]])
@pytest.mark.parametrize("realization", [pm.Natural, half], ids=["natural", "half"])
def test_constant_cause(at, realization):
    """No variance, so that nothing is seen given its value."""

    def constant():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x1 = pyro.deterministic("x1", 1 + z)
        x2 = pyro.deterministic("x2", 2 - z)
        pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))

    refused(
        ask,
        pm.UnsupportedLaw,
        "same in every run",
        model=constant,
        at=at,
        realization=realization,
    )


# -- Realizations ------------------------------------------------------------------


@pytest.mark.parametrize("realization", [pm.Natural(33.0), "Natural", None, 3])
def test_realization_that_is_no_function(realization):
    refused(
        ask, match="Expected a function of the macro value", realization=realization
    )


@pytest.mark.parametrize("kind", [pm.Residual, pm.Allocate, pm.Inhibiting, pm.Explicit])
def test_realization_that_needs_more(kind):
    said = refused(ask, match=f"{kind.__name__} cannot be made", realization=kind)
    assert f"lambda value: {kind.__name__}(value, ...)" in said


def test_realization_with_unknown_arguments():
    refused(ask, match="'foo'", realization=lambda value: pm.Natural(value, foo=3))


@pytest.mark.parametrize("result", [None, 3.0, pm.Natural])
def test_realization_that_makes_none(result):
    refused(ask, match="Expected a Realization", realization=lambda value: result)


def test_shift_sets_no_value():
    refused(ask, match="shift_confounding is about shifts", realization=pm.Shift)
    refused(ask, match="Shift moves", realization=lambda value: pm.Shift(1.0, [1, 0]))


@pytest.mark.parametrize("model", [shop, coins, gamma_shop])
def test_explicit_off_the_fibre(model):
    """Definition 4, however the laws are compared."""

    def off(value):
        p = torch.ones(*value.shape, 2)
        if model is coins:
            return dist.Bernoulli(0.5 * p).to_event(1)
        return dist.Normal(5 * p, 1.0).to_event(1)

    with pytest.raises(pm.OffFibre):
        ask(model=model, at=[1.0], realization=lambda value: pm.Explicit(value, off))


def test_explicit_without_batch():
    """A law that is the same for each macro value it is asked for."""

    def always(value):
        return dist.Delta(torch.tensor([13.0, 20.0]), event_dim=1)

    report = ask(at=[33.0], realization=lambda value: pm.Explicit(value, always))
    assert report.interventional_mean.tolist() == [73.0]
    assert report.interventional_variance.tolist() == [0.0]


def test_explicit_of_a_wrong_shape():
    def flat(value):
        return dist.Normal(torch.zeros(2), 1.0)

    refused(
        ask,
        match="to_event",
        at=[33.0],
        realization=lambda value: pm.Explicit(value, flat),
    )


def test_given_that_the_cause_acts_on():
    for name in ("revenue", "x1"):
        refused(ask, match="downstream", realization=lambda v, n=name: pm.Natural(v, n))
    with pytest.raises(pm.UnknownSite):
        ask(realization=lambda value: pm.Natural(value, "zzz"))


# -- Numbers of the test -----------------------------------------------------------


@pytest.mark.parametrize("num_samples", [0, 3, 19, -5, "100", 100.5, None])
@pytest.mark.parametrize("model", [shop, gamma_shop])
def test_number_of_draws(num_samples, model):
    refused(ask, match="num_samples", model=model, num_samples=num_samples)


@pytest.mark.parametrize("level", [0, 1, -0.1, 2.0, NAN, "0.1", None])
def test_level(level):
    refused(ask, match="level", level=level)


@pytest.mark.parametrize("seed", ["a", 1.5, None])
def test_seed(seed):
    refused(ask, match="seed", model=gamma_shop, at=[3.0], realization=half, seed=seed)


# -- Models with odd numbers -------------------------------------------------------


def test_nan_in_a_micro_site():
    def model():
        x1 = pyro.sample("x1", dist.Normal(torch.tensor(NAN), 2.0, validate_args=False))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        pyro.deterministic("revenue", x1 + 3 * x2)

    with pyro.validation_enabled(False):
        for at in (None, [33.0]):
            said = refused(ask, match="(?i)nan|finite", model=model, at=at)
            assert "at is" not in said  # which is not what is wrong


@pytest.mark.slow
@pytest.mark.parametrize("model", [shop, gamma_shop])
@pytest.mark.parametrize("realization", [pm.Natural, half], ids=["natural", "half"])
def test_nan_in_the_effect(model, realization):
    """No verdict is made of numbers that are none."""

    def broken():
        x1, x2 = (pyro.sample(n, dist.Gamma(2.0, 1.0)) for n in ("x1", "x2"))
        pyro.deterministic("revenue", x1 + 3 * x2 * NAN)

    used = broken if model is gamma_shop else lambda: shop(NAN)
    refused(ask, match="revenue", model=used, at=[33.0], realization=realization)


def baskets(size=4, part=None):
    with pyro.plate("p", size, subsample_size=part):
        x = pyro.sample("x", dist.Normal(10.0, 2.0))
    pyro.sample("revenue", dist.Normal(x.sum(-1), 1.0))


BASKET = pm.MacroVariable("sales", "x", over="p")


@pytest.mark.parametrize("realization", [pm.Natural, pm.Proportional])
def test_subsampled_plate(realization):
    """The total of a part is not the total, as macro_do says as well."""
    refused(
        ask,
        pm.NotAMicroState,
        "subsampled",
        model=baskets,
        cause=BASKET,
        realization=realization,
        model_args=(4, 2),
    )


def test_injective_map():
    """Definition 2: one element is no aggregate."""
    refused(
        ask,
        pm.NotAMicroState,
        "injective",
        model=baskets,
        cause=BASKET,
        model_args=(1,),
    )


def test_empty_micro_state():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(0), 1.0).to_event(1))
        pyro.sample("revenue", dist.Normal(x.sum(-1), 1.0))

    macro = pm.MacroVariable("sales", "x")
    refused(ask, model=model, cause=macro)


# -- What need not be refused ------------------------------------------------------


def test_effect_upstream_of_the_cause():
    """``P(Yb | do(xb)) = P(Yb)``: what is upstream does not notice."""

    def model():
        z = pyro.sample("z", dist.Normal(1.0, 2.0))
        pyro.sample("x1", dist.Normal(z, 1.0))
        pyro.sample("x2", dist.Normal(z, 1.0))

    for realization in (pm.Natural, half):
        report = ask(model=model, effect="z", at=[0.0, 5.0], realization=realization)
        assert report.verdict == "inducing" and report.method.startswith("exact")
        torch.testing.assert_close(report.interventional_mean, torch.ones(2).double())
        spread = torch.full((2,), 4.0).double()
        torch.testing.assert_close(report.interventional_variance, spread)
        # Cov(z, total) = 8, Var(total) = 18
        seen = 1 + 8 / 18 * (torch.tensor([0.0, 5.0]).double() - 2)
        torch.testing.assert_close(report.observational_mean, seen)


def test_effect_upstream_of_the_cause_by_draws():
    def model():
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x1", dist.Normal(z, 1.0))
        pyro.sample("x2", dist.Normal(z, 1.0))

    report = ask(
        model=model, effect="z", at=[0.0, 8.0], realization=half, num_samples=1000
    )
    assert report.verdict == "inducing"
    assert (report.interventional_mean - 2).abs().max() < 0.25
    assert report.observational_mean[1] - report.observational_mean[0] > 2


def test_effect_beside_the_cause():
    def model():
        shop()
        pyro.sample("weather", dist.Normal(3.0, 2.0))

    report = ask(model=model, effect="weather", at=[33.0])
    assert report.verdict == "inhibiting"
    assert report.observational_mean.tolist() == [3.0]


# -- Adjustment --------------------------------------------------------------------


def adjust(adjustment, model=shop, **options):
    return pm.macro_adjust(model, SALES, "revenue", adjustment, **options)


@pytest.mark.parametrize("name", ["revenue", "x1"])
def test_adjustment_for_what_the_cause_acts_on(name):
    refused(lambda: adjust([name]), match="downstream")
    refused(lambda: pm.blocks_backdoor(shop, SALES, "revenue", [name]), match="downstr")


@pytest.mark.parametrize("adjustment", [[3], 3, None, [None]])
def test_adjustment_that_is_none(adjustment):
    refused(lambda: adjust(adjustment), match="Expected")


def test_unknown_adjustment():
    with pytest.raises(pm.UnknownSite, match="'zz'"):
        adjust(["zz"])


def test_no_adjustment():
    refused(lambda: adjust([]), match="nothing is adjusted for")


def test_adjustment_by_draws():
    refused(
        lambda: adjust(["z"], model=confounded_gammas),
        pm.UnsupportedLaw,
        "not Gaussian",
    )


# -- Inhibiting realizations -------------------------------------------------------


@pytest.mark.parametrize("levers", [[], "x1", 1, [2], [-1], [1.5], [None], ["x3"]])
def test_levers(levers):
    refused(
        lambda: pm.can_inhibit(shop, SALES, "revenue", levers=levers), match="lever"
    )


def test_levers_in_finite_programs():
    refused(
        lambda: pm.can_inhibit(coins, SALES, "revenue", levers=["x1"]),
        pm.UnsupportedLaw,
        "levers are for affine-Gaussian",
    )


def test_inhibiting_by_draws():
    refused(
        lambda: pm.can_inhibit(gamma_shop, SALES, "revenue"),
        pm.UnsupportedLaw,
        "not Gaussian",
    )


@pytest.mark.parametrize("effect", [3, None, "x1", "revenu"])
def test_inhibiting_another_effect(effect):
    refused(ask, match="effect|revenue", realization=lambda v: pm.Inhibiting(v, effect))


def test_inhibiting_as_context_manager():
    """It looks downstream, where a context manager cannot look."""

    def inside():
        with pm.macro_do(interventions={SALES: pm.Inhibiting(33.0, "revenue")}):
            shop()

    said = refused(inside)
    assert "already set by a macro_do inside" not in said


def test_inhibiting_twice_is_refused():
    inner = pm.macro_do(shop, {SALES: pm.Natural(30.0)})
    with pytest.raises(pm.PyroMacroError):
        pm.macro_do(inner, {SALES: pm.Inhibiting(33.0, "revenue")})()
