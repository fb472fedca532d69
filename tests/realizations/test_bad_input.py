# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Bad input for laws that are not Gaussian: a clear error for each.

Values that cannot be reached, numbers that are none, weights and plates that are empty,
states off the supports, and what no law is known for. Each test asks for the class of
the error and for the words that say what was found.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_macro as pm

NAN, INF = float("nan"), float("inf")
Infeasible, Unsupported = pm.Infeasible, pm.UnsupportedLaw
NotAMicroState, OffFibre = pm.NotAMicroState, pm.OffFibre


def run(x1, x2, realization, aggregation=None):
    """A program of two sites, whose distributions are made in the test's dtype."""
    total = pm.MacroVariable("total", ["x1", "x2"], (), aggregation)

    def model():
        pyro.sample("x1", x1())
        pyro.sample("x2", x2())

    return pm.macro_do(model, {total: realization})()


def along(size, fn, realization, aggregation=None):
    """A program of one site in a plate that is aggregated over."""
    total = pm.MacroVariable("total", "x", "parts", aggregation)

    def model():
        with pyro.plate("parts", size):
            pyro.sample("x", fn())

    return pm.macro_do(model, {total: realization})()


def bernoulli(p):
    return lambda: dist.Bernoulli(torch.tensor(p))


def categorical(*p):
    return lambda: dist.Categorical(torch.tensor(p))


def binomial(n, p):
    return lambda: dist.Binomial(n, torch.tensor(p))


def poisson(rate):
    return lambda: dist.Poisson(torch.tensor(rate))


def gamma(shape, rate=1.0):
    return lambda: dist.Gamma(torch.tensor(shape), torch.tensor(rate))


def uniform(low, high):
    return lambda: dist.Uniform(torch.tensor(low), torch.tensor(high))


def normal():
    return dist.Normal(0.0, 1.0)


def exponential():
    return dist.Exponential(1.0)


# Values that cannot be reached


UNREACHABLE = {
    "odd sum of even weights": (
        bernoulli(0.5),
        bernoulli(0.5),
        pm.Linear([2.0, 2.0]),
        3.0,
        "value 3 cannot be reached.*multiple of 2 from 0 to 4",
    ),
    "odd sum of even supports": (
        categorical(0.5, 0.0, 0.5),
        categorical(0.3, 0.0, 0.7),
        None,
        3.0,
        r"3.0 cannot be reached.*from 0.0 to 4.0",
    ),
    "negative sum of gammas": (
        gamma(1.0),
        gamma(2.0),
        None,
        -1.0,
        "value -1 cannot be reached.*positive number",
    ),
    "zero sum of gammas": (
        gamma(1.0),
        gamma(2.0),
        None,
        0.0,
        "value 0 cannot be reached.*positive number",
    ),
    "negative sum of gammas of two rates": (
        gamma(1.0),
        gamma(2.0, 2.0),
        None,
        -1.0,
        "value -1 cannot be reached.*between 0 and inf",
    ),
    "zero sum of gammas of two rates": (
        gamma(1.0),
        gamma(2.0, 2.0),
        None,
        0.0,
        "value 0 cannot be reached.*between 0 and inf",
    ),
    "negative sum of counts": (
        poisson(1.0),
        poisson(2.0),
        None,
        -1.0,
        "value -1 cannot be reached.*whole number from 0",
    ),
    "broken sum of counts": (
        poisson(1.0),
        poisson(2.0),
        None,
        2.5,
        "value 2.5 cannot be reached.*whole number from 0",
    ),
    "broken weighted sum of counts": (
        poisson(1.0),
        poisson(2.0),
        pm.Linear([1.0, 2.0]),
        2.5,
        r"2.5 cannot be reached.*in steps of 1.0",
    ),
    "negative weighted sum of counts": (
        poisson(1.0),
        poisson(2.0),
        pm.Linear([1.0, 2.0]),
        -2.0,
        r"-2.0 cannot be reached",
    ),
    "broken sum of coins": (
        bernoulli(0.3),
        bernoulli(0.4),
        None,
        0.5,
        r"0.5 cannot be reached.*from 0.0 to 2.0",
    ),
    "sum of binomials beyond the largest": (
        binomial(2, 0.5),
        binomial(3, 0.5),
        None,
        6.0,
        "value 6 cannot be reached.*whole number from 0 to 5",
    ),
    "sum of coins beyond the largest": (
        bernoulli(0.3),
        bernoulli(0.4),
        None,
        3.0,
        r"3.0 cannot be reached.*from 0.0 to 2.0",
    ),
    "mean of counts between its steps": (
        poisson(1.0),
        poisson(2.0),
        pm.Mean(),
        0.25,
        "value 0.25 cannot be reached.*multiple of 0.5 from 0",
    ),
    "largest beyond all supports": (
        uniform(0.0, 1.0),
        uniform(0.0, 2.0),
        pm.Max(),
        3.0,
        "value 3.0 cannot be reached: no site can have it",
    ),
    "largest below what one site has": (
        uniform(0.0, 1.0),
        uniform(2.0, 3.0),
        pm.Max(),
        0.5,
        "value 0.5 cannot be reached.*others do not lie beyond",
    ),
    "largest between the supports": (
        uniform(0.0, 1.0),
        uniform(2.0, 3.0),
        pm.Max(),
        1.5,
        "value 1.5 cannot be reached",
    ),
    "smallest below all supports": (
        exponential,
        exponential,
        pm.Min(),
        -1.0,
        "value -1.0 cannot be reached",
    ),
    "largest of finite sites beyond all": (
        categorical(0.2, 0.8),
        categorical(0.5, 0.5),
        pm.Max(),
        2.0,
        r"2.0 cannot be reached",
    ),
    "broken count": (
        bernoulli(0.3),
        bernoulli(0.4),
        pm.Count(1),
        1.5,
        r"1.5 cannot be reached",
    ),
    "count of what no site can be": (
        bernoulli(0.3),
        bernoulli(0.4),
        pm.Count(5),
        1.0,
        r"1.0 cannot be reached",
    ),
    "value that is not in the table": (
        bernoulli(0.3),
        bernoulli(0.4),
        pm.Coarsen([[0, 1], [1, 0]]),
        7.0,
        r"7.0 cannot be reached",
    ),
    "counts of rate zero": (
        poisson(0.0),
        poisson(0.0),
        None,
        3.0,
        "value 3 cannot be reached",
    ),
    "coins that never fall": (
        bernoulli(0.0),
        bernoulli(0.0),
        None,
        1.0,
        r"1.0 cannot be reached.*from 0.0 to 0.0",
    ),
    "coins that always fall": (
        bernoulli(1.0),
        bernoulli(1.0),
        None,
        1.0,
        r"1.0 cannot be reached.*from 2.0 to 2.0",
    ),
}


@pytest.mark.parametrize("name", UNREACHABLE)
def test_value_that_cannot_be_reached_says_what_can_be(name):
    x1, x2, aggregation, value, words = UNREACHABLE[name]
    with pytest.raises(Infeasible, match=f"'total'.*{words}"):
        run(x1, x2, pm.Natural(value), aggregation)


@pytest.mark.parametrize(
    "x1, x2, value, words",
    [
        (uniform(0.0, 1.0), uniform(0.0, 2.0), 4.0, "4 cannot.*between 0 and 3"),
        (uniform(0.0, 1.0), uniform(0.0, 2.0), 3.0, "3 cannot.*between 0 and 3"),
        (uniform(0.0, 1.0), uniform(0.0, 2.0), -1.0, "-1 cannot.*between 0 and 3"),
        (gamma(1.0), gamma(2.0), -1.0, "-1 cannot be reached"),
        (bernoulli(0.3), bernoulli(0.4), 3.0, r"3.0 cannot be reached"),
        (poisson(1.0), poisson(1.0), 0.5, r"0.5 cannot be reached"),
    ],
)
def test_value_that_cannot_be_reached_by_max_entropy(x1, x2, value, words):
    with pytest.raises(Infeasible, match=f"'total'.*{words}"):
        run(x1, x2, pm.MaxEntropy(value))


def test_one_value_of_a_grid_that_cannot_be_reached():
    total = pm.MacroVariable("total", ["x1", "x2"])

    def model():
        pyro.sample("x1", dist.Poisson(1.0))
        pyro.sample("x2", dist.Poisson(2.0))

    grid = torch.tensor([1.0, 2.5, 3.0])
    with pytest.raises(Infeasible, match="value 2.5 cannot be reached"):
        with pyro.plate("grid", 3):
            pm.macro_do(model, {total: pm.Natural(grid)})()


def test_value_that_only_a_cause_of_probability_zero_allows():
    def model():
        c = pyro.sample("c", dist.Bernoulli(0.0))
        pyro.sample("x1", dist.Bernoulli(0.9 * c))
        pyro.sample("x2", dist.Bernoulli(0.5))

    total = pm.MacroVariable("total", ["x1", "x2"])
    with pytest.raises(Infeasible, match=r"2.0 cannot be reached"):
        pm.macro_do(model, {total: pm.Natural(2.0)})()


# Numbers that are none


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("realization", [pm.Natural, pm.MaxEntropy, pm.Proportional])
@pytest.mark.parametrize("fn", [bernoulli(0.3), poisson(2.0), gamma(2.0)])
@pytest.mark.parametrize("aggregation", [None, pm.Max()], ids=repr)
def test_value_that_is_not_finite(value, realization, fn, aggregation):
    if aggregation and realization is pm.Proportional:
        aggregation = pm.Mean()
    with pytest.raises(pm.PyroMacroError, match="'total': value.*finite numbers"):
        run(fn, fn, realization(value), aggregation)


@pytest.mark.parametrize("value", [True, "5", None, 2j])
def test_value_that_is_no_number(value):
    with pytest.raises(pm.PyroMacroError, match="'total': value is.*Expected a number"):
        run(poisson(1.0), poisson(2.0), pm.Natural(value))


@pytest.mark.parametrize("fn", [bernoulli(0.3), poisson(2.0), gamma(2.0)])
def test_values_of_a_wrong_shape(fn):
    total = pm.MacroVariable("total", ["x1", "x2"])

    def model():
        with pyro.plate("stores", 3):
            pyro.sample("x1", fn())
            pyro.sample("x2", fn())

    pm.macro_do(model, {total: pm.Natural(torch.tensor([1.0, 2.0, 1.0]))})()
    with pytest.raises(pm.PyroMacroError, match=r"\(2,\).*plate 'stores' of size 3"):
        pm.macro_do(model, {total: pm.Natural(torch.ones(2))})()
    with pytest.raises(pm.PyroMacroError, match="no plate of size 2.*of its own"):
        pm.macro_do(model, {total: pm.Natural(torch.ones(2, 1))})()


def test_vector_of_values_of_a_wrong_length():
    rows = pm.Linear([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    for value in (2.0, torch.ones(3)):
        with pytest.raises(pm.PyroMacroError, match="Expected 2 values"):
            along(3, poisson(1.0), pm.Natural(value), rows)


# Weights and plates


def test_weights_that_are_all_zero():
    with pytest.raises(NotAMicroState, match="all zero"):
        pm.Linear([0.0, 0.0])


@pytest.mark.parametrize("bad", [NAN, INF])
def test_weights_that_are_not_finite(bad):
    with pytest.raises(NotAMicroState, match="NaN or infinity"):
        pm.Linear([1.0, bad])


def test_one_weight_of_zero_among_gammas_names_the_element():
    with pytest.raises(Unsupported, match="'total': element 1 has weight zero"):
        run(gamma(1.0), gamma(2.0), pm.Natural(1.0), pm.Linear([1.0, 0.0]))


def test_weights_of_the_wrong_number():
    with pytest.raises(NotAMicroState, match="has 3 elements, the weights are for 2"):
        along(3, poisson(1.0), pm.Natural(2.0), pm.Linear([1.0, 2.0]))


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, 0.0]])
def test_counts_without_end_under_weights_that_do_not_bound_them(weights):
    with pytest.raises(Unsupported, match="'x1' is Poisson.*infinitely many"):
        run(poisson(1.0), poisson(2.0), pm.Natural(1.0), pm.Linear(weights))


def test_empty_plate_is_refused_by_pyro_itself():
    with pytest.raises(ZeroDivisionError, match="size cannot be zero"):
        along(0, lambda: dist.Poisson(torch.ones(0)), pm.Natural(0.0))


@pytest.mark.parametrize("aggregation", [None, pm.Max(), pm.Count(1)], ids=repr)
@pytest.mark.parametrize(
    "kind", [dist.Poisson, dist.Bernoulli, dist.Exponential], ids=lambda k: k.__name__
)
def test_empty_event_dimension_is_nothing_to_aggregate(kind, aggregation):
    total = pm.MacroVariable("total", "x", (), aggregation)

    def model():
        pyro.sample("x", kind(0.5 * torch.ones(0)).to_event(1))

    with pytest.raises(NotAMicroState, match="'total'"):
        pm.macro_do(model, {total: pm.Natural(0.0)})()


@pytest.mark.parametrize("aggregation", [None, pm.Mean(), pm.Max(), pm.Min()], ids=repr)
@pytest.mark.parametrize(
    "fn", [bernoulli(0.3), poisson(2.0), gamma(2.0), binomial(3, 0.5)]
)
@pytest.mark.parametrize("realization", [pm.Natural, pm.MaxEntropy])
def test_one_scalar_site_is_nothing_to_aggregate(fn, aggregation, realization):
    total = pm.MacroVariable("total", "x", (), aggregation)
    with pytest.raises(NotAMicroState, match="injective on a micro state of 1"):
        pm.macro_do(lambda: pyro.sample("x", fn()), {total: realization(1.0)})()
    with pytest.raises(NotAMicroState, match="injective on a micro state of 1"):
        along(1, fn, realization(1.0), aggregation)


# States off the supports


@pytest.mark.parametrize(
    "x1, x2, realization, site, value, miss",
    [
        (
            categorical(1.0, 0.0, 0.0),
            categorical(0.2, 0.3, 0.5),
            pm.Residual(4.0, absorb="x2"),
            "x2",
            "4.0",
            ", by 2",
        ),
        (
            categorical(0.0, 1.0, 0.0),
            categorical(0.2, 0.3, 0.5),
            pm.Residual(0.0, absorb="x2"),
            "x2",
            "-1.0",
            ", by 1",
        ),
        (
            categorical(0.0, 1.0, 0.0),
            categorical(0.2, 0.3, 0.5),
            pm.Residual(2.5, absorb="x2"),
            "x2",
            "1.5",
            "whole numbers only",
        ),
        (
            categorical(1.0, 0.0, 0.0),
            categorical(1.0, 0.0, 0.0),
            pm.Shift(5.0, along=[1.0, 0.0]),
            "x1",
            "5.0",
            ", by 3",
        ),
        (
            categorical(1.0, 0.0, 0.0),
            categorical(1.0, 0.0, 0.0),
            pm.Shift(1.0, along=[0.5, 0.5]),
            "x1",
            "0.5",
            "whole numbers only",
        ),
        (
            categorical(0.2, 0.8),
            categorical(0.5, 0.5),
            pm.Shift(1.0),
            "x1",
            "[01].[0-9]*",
            "by 0|whole numbers only",
        ),
        (
            categorical(0.0, 1.0),
            categorical(0.0, 1.0),
            pm.Proportional(3.0),
            "x1",
            "1.5",
            ", by 0.5",
        ),
        (
            poisson(0.0),
            poisson(2.0),
            pm.Residual(-2.0, absorb="x2"),
            "x2",
            "-2.0",
            ", by 2",
        ),
        (
            lambda: dist.Gamma(torch.tensor(5000.0), torch.tensor(1000.0)),
            gamma(1.0),
            pm.Residual(1.0, absorb="x2"),
            "x2",
            "-[34]",
            ", by [34]",
        ),
        (
            bernoulli(1.0),
            bernoulli(1.0),
            pm.Allocate(1.0, [1.5, -0.5]),
            "x1",
            "1.5",
            "x1|by 0.5|whole numbers",
        ),
        (
            gamma(1.0),
            gamma(1.0),
            pm.Proportional(-3.0),
            "x1",
            "-",
            ", by ",
        ),
    ],
)
def test_state_off_the_support_says_which_site_and_by_how_much(
    x1, x2, realization, site, value, miss
):
    words = f"'total': micro site '{site}' gets the value {value}.*off its support"
    with pytest.raises(OffFibre, match=f"{words}.*({miss})"):
        run(x1, x2, realization)


def test_natural_value_of_zero_cannot_be_rescaled():
    with pytest.raises(OffFibre, match="'total'"):
        run(poisson(0.0), poisson(0.0), pm.Proportional(3.0))


def test_natural_direction_of_sites_without_variance_is_asked_for():
    with pytest.raises(Unsupported, match="variance.*along"):
        run(lambda: dist.Cauchy(0.0, 1.0), gamma(1.0), pm.Shift(1.0))


@pytest.mark.parametrize(
    "realization", [pm.Residual(1.0, "x1"), pm.Shift(1.0), pm.Natural(1.0)], ids=repr
)
def test_own_law_of_counts_with_a_random_rate_names_the_site(realization):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x1", dist.Poisson(z.exp()))
        pyro.sample("x2", dist.Poisson(1.0))

    total = pm.MacroVariable("total", ["x1", "x2"])
    words = "'total': (its sites depend on|micro site 'x1' is Poisson).*given=\\['z'\\]"
    with pytest.raises(Unsupported, match=words):
        pm.macro_do(model, {total: realization})()


# MaxEntropy


@pytest.mark.parametrize(
    "x1, x2",
    [(normal, normal), (normal, gamma(1.0)), (gamma(1.0), normal)],
)
def test_unbounded_fibre_without_a_reference_asks_for_one(x1, x2):
    with pytest.raises(Unsupported, match=r"'x1', 'x2'.*unbounded.*reference=.*\(2,\)"):
        run(x1, x2, pm.MaxEntropy(1.0))


def test_positive_sites_with_weights_of_both_signs_are_unbounded():
    with pytest.raises(Unsupported, match="unbounded.*reference="):
        run(gamma(1.0), gamma(1.0), pm.MaxEntropy(1.0), pm.Linear([1.0, -1.0]))


@pytest.mark.parametrize(
    "reference, found",
    [
        (lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), r"\(3,\)"),
        (lambda: dist.Normal(torch.zeros(2), 1.0), r"\(\)"),
        (lambda: dist.Normal(torch.zeros(2, 2), 1.0).to_event(2), r"\(2, 2\)"),
        (lambda: "flat", "None"),
    ],
)
def test_reference_of_a_wrong_shape(reference, found):
    words = rf"'total': reference has event shape {found}.*event shape \(2,\)"
    with pytest.raises(pm.PyroMacroError, match=words):
        run(normal, normal, pm.MaxEntropy(1.0, reference=reference()))


@pytest.mark.parametrize("aggregation", [pm.Count(1), pm.Min()], ids=repr)
def test_entropy_on_a_fibre_of_counts_without_end_is_refused(aggregation):
    with pytest.raises(Unsupported, match="'total'"):
        run(poisson(1.0), poisson(1.0), pm.MaxEntropy(1.0), aggregation)


def test_entropy_given_the_largest_of_continuous_sites_is_refused():
    with pytest.raises(Unsupported, match=r"Max\(\) is not linear"):
        run(uniform(0.0, 1.0), uniform(0.0, 2.0), pm.MaxEntropy(0.5), pm.Max())


# Causes, and what no law is known for


@pytest.mark.parametrize(
    "kind", [lambda z: dist.Bernoulli(logits=z), lambda z: dist.Poisson(z.exp())]
)
@pytest.mark.parametrize("aggregation", [None, pm.Max()], ids=repr)
def test_discrete_site_with_a_continuous_cause_asks_to_hold_it(kind, aggregation):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x1", kind(z))
        pyro.sample("x2", kind(-z))

    total = pm.MacroVariable("total", ["x1", "x2"], (), aggregation)
    words = r"'total': micro site 'x1' is .*'z'.*Hold.*given=\['z'\]"
    with pytest.raises(Unsupported, match=words):
        pm.macro_do(model, {total: pm.Natural(1.0)})()
    pm.macro_do(model, {total: pm.Natural(1.0, given=["z"])})()


@pytest.mark.parametrize(
    "aggregation",
    [pm.Count(1), pm.Min(), pm.Custom(lambda x: x.sum(-1) % 2), pm.Custom(torch.sum)],
    ids=["Count", "Min", "parity", "sum"],
)
def test_map_that_leaves_counts_without_a_bound_names_the_site(aggregation):
    with pytest.raises(Unsupported, match="'total': micro site 'x1' is Poisson"):
        run(poisson(1.0), poisson(2.0), pm.Natural(1.0), aggregation)


@pytest.mark.parametrize("fn", [gamma(1.0), normal, uniform(0.0, 2.0)])
def test_count_of_continuous_sites_is_refused(fn):
    with pytest.raises(Unsupported, match=r"'total'.*Count\(category=1\)"):
        run(fn, fn, pm.Natural(1.0), pm.Count(1))


def test_discrete_and_continuous_sites_in_one_variable_are_refused():
    with pytest.raises(Unsupported, match="'x1' is Bernoulli") as error:
        run(bernoulli(0.5), normal, pm.Natural(1.0))
    assert "infinitely many" not in str(error.value)


@pytest.mark.parametrize(
    "kind",
    [
        lambda: dist.Dirichlet(torch.ones(3)),
        lambda: dist.OneHotCategorical(torch.ones(3)),
        lambda: dist.Multinomial(3, torch.ones(3)),
    ],
)
def test_site_with_a_constraint_between_its_elements_is_refused(kind):
    rows = pm.Linear([1.0, 2.0, 3.0])
    total = pm.MacroVariable("total", "x1", (), rows)
    with pytest.raises(Unsupported, match="'total': micro site 'x1'"):
        pm.macro_do(lambda: pyro.sample("x1", kind()), {total: pm.Natural(2.0)})()


# Aggregations


@pytest.mark.parametrize("category", ["red", NAN, INF, None, [1]])
def test_category_that_is_no_number(category):
    with pytest.raises(NotAMicroState, match="Count: category is"):
        pm.Count(category)


@pytest.mark.parametrize("table", [{0: 0, 1: 1}, [3.0, 4.0], [[0, 1], [2, 3]]])
def test_table_that_is_injective(table):
    with pytest.raises(NotAMicroState, match="Coarsen: the table is injective"):
        pm.Coarsen(table)


@pytest.mark.parametrize("table", [{}, {0: 0, (1, 2): 0}])
def test_table_whose_keys_do_not_fit_together(table):
    with pytest.raises(NotAMicroState, match="keys.*different lengths"):
        pm.Coarsen(table)


@pytest.mark.parametrize("table", [[[0, NAN], [1, 0]], {0: 0, 1: 0, 2: INF}])
def test_table_with_numbers_that_are_none(table):
    with pytest.raises(NotAMicroState, match="Coarsen.*(finite|NaN)"):
        pm.Coarsen(table)


def test_table_with_a_missing_entry_names_the_state():
    table = pm.Coarsen({(0, 0): 0, (0, 1): 1, (1, 0): 1})
    with pytest.raises(NotAMicroState, match=r"no entry for.*\[1.0, 1.0\]"):
        run(bernoulli(0.3), bernoulli(0.4), pm.Natural(1.0), table)


def test_table_with_an_entry_for_each_state_that_can_be_is_enough():
    table = pm.Coarsen({(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 0})
    run(categorical(0.5, 0.5), categorical(0.4, 0.6), pm.Natural(1.0), table)


def test_table_for_another_number_of_elements():
    with pytest.raises(NotAMicroState, match="has 2 element.*the table have 1"):
        table = pm.Coarsen({0: 0, 1: 0})
        run(bernoulli(0.3), bernoulli(0.4), pm.Natural(0.0), table)


def test_table_of_continuous_sites_names_a_state_without_entry():
    with pytest.raises(NotAMicroState, match="no entry for the micro state"):
        run(normal, normal, pm.Natural(1.0), pm.Coarsen([[0, 1], [1, 0]]))


@pytest.mark.parametrize(
    "aggregation",
    [
        pm.Custom(lambda x: x @ torch.tensor([1.0, 2.0])),
        pm.Linear([1.0, 2.0]),
        pm.Linear([1.0, 2**0.5]),
        pm.Coarsen({(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 3, (2, 2): 3}),
    ],
    ids=["Custom", "Linear", "incommensurable", "Coarsen"],
)
def test_map_that_is_injective_on_the_supports(aggregation):
    with pytest.raises(NotAMicroState, match="is injective on its 4 micro states"):
        run(bernoulli(0.3), bernoulli(0.4), pm.Natural(1.0), aggregation)


def test_too_many_states_to_enumerate_says_what_needs_no_enumeration():
    odd = pm.Custom(lambda x: x.sum(-1) % 2)
    with pytest.raises(Unsupported, match="has to be enumerated.*Use a sum, Count"):
        along(40, bernoulli(0.5), pm.Natural(1.0), odd)


def test_too_many_causes_to_sum_out_names_them():
    def model():
        with pyro.plate("parts", 30):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * c))
        pyro.sample("y", dist.Bernoulli(c.mean()))

    total = pm.MacroVariable("total", ["x", "y"], "parts")
    with pytest.raises(Unsupported, match="joint values.*given=.*'c'"):
        pm.macro_do(model, {total: pm.Natural(3.0)})()


# Chains


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"num_samples": 3}, "num_samples=3.*at least 4"),
        ({"num_samples": 10.5}, "num_samples=10.5"),
        ({"warmup_steps": 0}, "warmup_steps=0.*at least 1"),
        ({"num_chains": -1}, "num_chains=-1"),
    ],
)
def test_chains_of_no_length(kwargs, words):
    with pytest.raises(pm.PyroMacroError, match=f"Chains: {words}"):
        pm.Chains(**kwargs)


def test_program_that_draws_numbers_outside_of_pyro_is_refused_by_the_chains():
    def model():
        pyro.sample("x1", dist.LogNormal(torch.randn(()), 0.5))
        pyro.sample("x2", dist.LogNormal(0.0, 0.5))

    total = pm.MacroVariable("total", ["x1", "x2"])
    chains = pm.Chains(num_samples=4, warmup_steps=1, num_chains=1, progress=False)
    with pytest.raises(Unsupported, match="outside of Pyro|another distribution"):
        pm.macro_do(model, {total: pm.Natural(4.0, sampler=chains)})()
