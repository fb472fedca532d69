# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What users are told: one table of errors, and of warnings.

Each row has a program that provokes a message, and what the message has to say: whom it
is about, what was found, what was expected, and what to do, in this order.
"""

import ast
import re
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm

SALES = pm.MacroVariable("sales", micro=["x1", "x2"])
TOP = pm.MacroVariable("top", ["x1", "x2"], aggregation=pm.Max())


def shop():
    x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))


def season():
    """Section 3.2.1, with prices so close that no realization inhibits."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    x1, x2 = pyro.deterministic("x1", z[0]), pyro.deterministic("x2", z[1])
    noise = pyro.sample("noise", dist.Normal(z.sum() / 2, 0.5**0.5))
    pyro.deterministic("revenue", 0.5 * x1 + x2 + noise)


def pair(first, second):
    def model():
        x1, x2 = pyro.sample("x1", first), pyro.sample("x2", second)
        pyro.deterministic("y", x1 + 2 * x2)

    return model


COINS = pair(dist.Bernoulli(0.3), dist.Bernoulli(0.6))
GAMMAS = pair(dist.Gamma(2.0, 1.0), dist.Gamma(3.0, 1.0))
UNIFORMS = pair(dist.Uniform(0.0, 1.0), dist.Uniform(0.0, 1.0))


def series():
    s = pyro.sample("s1", dist.Normal(0.0, 1.0))
    for t in range(2, 5):
        s = pyro.sample(f"s{t}", dist.Normal(0.9 * s, 1.0))


def hidden_rate():
    z = pyro.sample("z", dist.Gamma(2.0, 1.0))
    pyro.sample("x1", dist.Poisson(z))
    pyro.sample("x2", dist.Poisson(2 * z))


def path():
    x1 = pyro.sample("x1", dist.Normal(0.0, 1.0))
    pyro.sample("x2", dist.Normal(x1, 1.0))


def one_in_a_plate():
    with pyro.plate("days", 3):
        pyro.sample("x1", dist.Normal(0.0, 1.0))
    pyro.sample("x2", dist.Normal(0.0, 1.0))


def subsampled():
    with pyro.plate("days", 4, subsample_size=2):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def run(model, realization, macro=SALES):
    return pm.macro_do(model, {macro: realization})()


def fused():
    return pm.consolidate(series, ["s4"], ["s2", {"s3": torch.tensor(1.0)}])


def fused_vectors():
    def model():
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(v.sum(), 1.0))

    return pm.consolidate(model, keep=["y"], allow=["v"])


def off_the_line(value):
    return dist.Normal(torch.zeros(2), 1.0).to_event(1)


def in_the_batch(value):
    return dist.Normal(torch.zeros(2), 1.0)


def learned():
    def model():
        x = pyro.sample("x", dist.Gamma(0.3, 1.0))
        pyro.sample("y", dist.Normal(torch.sin(20 * x), 0.01))

    poor = pm.Approximation(1e-4, draws=200, steps=5, components=1, width=2)
    return pm.consolidate(model, keep=["y"], approximate=poor)


# Each: what it is about, the error, a program, and what the message says, in order
ERRORS = [
    # Names that the program does not have
    (
        "a misspelt micro site",
        pm.UnknownSite,
        lambda: run(shop, pm.Natural(33.0), pm.MacroVariable("sales", ["x1", "x_2"])),
        ["macro-variable 'sales'", "no site 'x_2'", "Did you mean 'x2'", "sites are: "],
    ),
    (
        "a misspelt effect",
        pm.UnknownSite,
        lambda: pm.confounding(shop, SALES, "revenues"),
        ["effect 'revenues'", "no site", "Did you mean 'revenue'", "'x1', 'x2'"],
    ),
    (
        "a misspelt element",
        pm.UnknownSite,
        lambda: run(shop, pm.Residual(33.0, absorb="x3")),
        ["'sales': absorb", "no site 'x3'", "Did you mean 'x"],
    ),
    (
        "a misspelt condition",
        pm.UnknownSite,
        lambda: run(shop, pm.Natural(33.0, given="z")),
        ["'sales': given", "no site 'z'", "Its sites are: 'revenue', 'x1', 'x2'"],
    ),
    (
        "a misspelt site to keep",
        pm.UnknownSite,
        lambda: pm.consolidate(series, keep=["s5"]),
        ["consolidate, keep", "no site 's5'", "Did you mean", "Its sites are: 's1'"],
    ),
    (
        "a misspelt intervention to allow",
        pm.UnknownSite,
        lambda: pm.consolidate(series, keep=["s4"], allow=["t2"]),
        ["consolidate, allow", "no site 't2'", "Did you mean 's2'"],
    ),
    # What is no micro state
    (
        "a path among the parts",
        pm.NotAMicroState,
        lambda: run(path, pm.Natural(1.0)),
        ["'sales'", "path from 'x1' to 'x2'", "Assumption 1", "Aggregate the two in"],
    ),
    (
        "parts in different plates",
        pm.NotAMicroState,
        lambda: run(one_in_a_plate, pm.Natural(1.0)),
        ["'sales'", "'x1' is in plate 'days'", "Expected plates around", "over='days'"],
    ),
    (
        "a plate that there is not",
        pm.NotAMicroState,
        lambda: run(shop, pm.Natural(1.0), pm.MacroVariable("s", ["x1"], over="days")),
        ["'s'", "over='days' is no plate of \\['x1'\\]", "Their plates are: none"],
    ),
    (
        "a plate of which a part is drawn",
        pm.NotAMicroState,
        lambda: run(
            subsampled, pm.Natural(1.0), pm.MacroVariable("total", "x", over="days")
        ),
        ["'total'", "'days' is subsampled \\(2 of 4\\)", "Run the plate whole"],
    ),
    (
        "a map that aggregates nothing",
        pm.NotAMicroState,
        lambda: run(shop, pm.Natural(1.0), pm.MacroVariable("s", ["x1"])),
        ["'s'", "injective on a micro state of 1", "Definition 2", "Aggregate more"],
    ),
    (
        "weights of another number",
        pm.NotAMicroState,
        lambda: run(
            shop,
            pm.Natural(1.0),
            pm.MacroVariable("s", ["x1", "x2"], aggregation=pm.Linear([1.0, 2.0, 3.0])),
        ),
        ["Linear", "has 2 elements", "weights are for 3", "Give one weight for each"],
    ),
    (
        "rows that follow from others",
        pm.NotAMicroState,
        lambda: pm.Linear([[1.0, 1.0], [2.0, 2.0]]),
        ["Linear", "rows of the weights are dependent", "Leave out the rows"],
    ),
    (
        "a table with gaps",
        pm.NotAMicroState,
        lambda: run(
            COINS,
            pm.Natural(1.0),
            pm.MacroVariable(
                "either",
                ["x1", "x2"],
                aggregation=pm.Coarsen({(0.0, 0.0): 0.0, (0.0, 1.0): 0.0}),
            ),
        ),
        ["Coarsen", "no entry for the micro state \\[1.0, 0.0\\]", "Expected one for"],
    ),
    # Micro states that have another macro value
    (
        "shares that do not add up",
        pm.OffFibre,
        lambda: run(shop, pm.Allocate(33.0, shares=[0.5, 0.6])),
        ["'sales'", "shares have macro value 1.1", "Expected 1.0", "divide by it"],
    ),
    (
        "a direction that does not add up",
        pm.OffFibre,
        lambda: run(shop, pm.Shift(1.0, along=[1.0, 1.0])),
        ["'sales'", "along has macro value 2", "Expected 1", "divide by it"],
    ),
    (
        "a distribution off the fibre",
        pm.OffFibre,
        lambda: run(shop, pm.Explicit(33.0, off_the_line)),
        ["'sales'", "has macro value", "Expected 33.0", "Look at the distribution"],
    ),
    (
        "a value off a site's support",
        pm.OffFibre,
        lambda: run(GAMMAS, pm.Allocate(4.0, shares=[2.0, -1.0])),
        ["'sales'", "'x2' gets the value -4.0", "off its support", "Choose a macro"],
    ),
    (
        "nothing to rescale",
        pm.OffFibre,
        lambda: run(
            pair(dist.Delta(torch.tensor(0.0)), dist.Delta(torch.tensor(0.0))),
            pm.Proportional(4.0),
        ),
        ["'sales'", "natural value is zero", "no factor", "Use Natural, Shift or All"],
    ),
    # What no distribution can meet
    (
        "a number of heads",
        pm.Infeasible,
        lambda: run(COINS, pm.Natural(3.0)),
        ["'sales'", "3.0 cannot be reached", "lie from 0.0 to 2.0", "Choose one"],
    ),
    (
        "a negative total of positive parts",
        pm.Infeasible,
        lambda: run(GAMMAS, pm.Natural(-1.0)),
        ["'sales'", "-1 cannot be reached", "Expected a positive", "Choose a value"],
    ),
    (
        "a total beyond the bounds",
        pm.Infeasible,
        lambda: run(UNIFORMS, pm.MaxEntropy(3.0)),
        ["'sales'", "3 cannot be reached", "Expected a number between 0 and 2"],
    ),
    (
        "a macro value that is asked about",
        pm.Infeasible,
        lambda: pm.confounding(COINS, SALES, "y", at=[5.0]),
        ["'sales'", "5.0 cannot be reached", "Its values are 0.0, 1.0, 2.0"],
    ),
    (
        "prices too close to inhibit",
        pm.Infeasible,
        lambda: run(season, pm.Inhibiting(2.0, "revenue")),
        [
            "'sales'",
            "'revenue'",
            "Var\\(effect \\| value\\) = 0.625 < Var\\(N\\) = 1",
            "\\(9\\) asks for at least that",
            "Prices \\(alpha\\) further apart",
        ],
    ),
    (
        "a coefficient that equal prices do not have",
        pm.Infeasible,
        lambda: pm.direction_of([1.0, 1.0], 2.0),
        ["direction_of", "coefficient is 2", "Lemma 14", "Ask for that one, or give"],
    ),
    (
        "an approximation that is too coarse",
        pm.Infeasible,
        learned,
        ["consolidate", "away from the model", "0.0001 was asked", "Allow more draws"],
    ),
    # What a consolidated program was not prepared for
    (
        "a site that was fused away",
        pm.InterventionNotAllowed,
        lambda: poutine.do(fused(), {"s1": torch.tensor(1.0)})(),
        [
            "do\\(s1 = 1.0\\)",
            "consolidated without",
            "Allowed: any values of s2",
            "Add",
        ],
    ),
    (
        "another value than the allowed one",
        pm.InterventionNotAllowed,
        lambda: poutine.do(fused(), {"s3": torch.tensor(2.0)})(),
        ["do\\(s3 = 2.0\\)", "consolidated without", "do\\(s3 = 1.0\\)", "Add it to"],
    ),
    (
        "a value of another shape",
        pm.InterventionNotAllowed,
        lambda: poutine.do(fused_vectors(), {"v": torch.zeros(3)})(),
        [
            "do\\(v = ",
            "found .* shape \\(3,\\)",
            "expected .* \\(2,\\), the event shape",
        ],
    ),
    (
        "an observation of what was fused away",
        pm.PyroMacroError,
        lambda: poutine.condition(fused(), {"s2": torch.tensor(1.0)})(),
        ["site 's2'", "conditioned on, but was fused away", "Keep it: keep="],
    ),
    # Clusters in a circle
    (
        "clusters that need one another",
        pm.CyclicPartition,
        lambda: pm.consolidate(
            series, keep=["s4"], partition=[{"s1", "s3"}, {"s2", "s4"}]
        ),
        [
            "consolidate, partition",
            "need one another",
            "'s1', 's3'.* before .*'s1' acts on 's2'",
            "Join them, or divide",
        ],
    ),
    # Laws that are not known
    (
        "counts with a continuous ancestor",
        pm.UnsupportedLaw,
        lambda: run(hidden_rate, pm.Natural(4.0)),
        ["'sales'", "'x1' is Poisson", "Expected finite sites", "given=\\['z'\\]"],
    ),
    (
        "their own law, with an ancestor",
        pm.UnsupportedLaw,
        lambda: run(hidden_rate, pm.Residual(4.0, absorb="x1")),
        [
            "'sales'",
            "depend on \\['z'\\]",
            "Hold them at their values, given=\\['z'\\]",
        ],
    ),
    (
        "entropy without a measure",
        pm.UnsupportedLaw,
        lambda: run(shop, pm.MaxEntropy(3.0)),
        ["'sales'", "'x1', 'x2'", "unbounded", "Give one: .*reference=.*\\(2,\\)"],
    ),
    (
        "a map that does not scale",
        pm.UnsupportedLaw,
        lambda: run(shop, pm.Proportional(3.0), TOP),
        ["'top'", "Max\\(\\) is not linear", "known for linear ones", "Use Explicit"],
    ),
    (
        "a coefficient of coins",
        pm.UnsupportedLaw,
        lambda: pm.structural_coefficient(COINS, SALES, "y"),
        ["'sales'", "'x1' is not Gaussian", "Expected a jointly affine-Gaussian"],
    ),
    (
        "data of the effect",
        pm.UnsupportedLaw,
        lambda: pm.confounding(
            poutine.condition(shop, {"revenue": torch.tensor(70.0)}), SALES, "revenue"
        ),
        ["'sales'", "'revenue' is observed", "\\['x1', 'x2'\\]", "Leave the obs"],
    ),
    # Arguments
    (
        "a value without a realization",
        pm.PyroMacroError,
        lambda: pm.macro_do(shop, {SALES: 33.0}),
        ["macro_do", "'sales' is set to 33.0", "Expected a micro-realization", "Say N"],
    ),
    (
        "a grid without a plate",
        pm.PyroMacroError,
        lambda: run(shop, pm.Natural(torch.tensor([30.0, 33.0]))),
        ["'sales'", "shape \\(2,\\)", "no plate of size 2", "needs a plate", "run the"],
    ),
    (
        "a value that is no number",
        pm.PyroMacroError,
        lambda: run(shop, pm.Natural(float("nan"))),
        ["'sales'", "value is nan", "Expected finite numbers"],
    ),
    (
        "shares of another shape",
        pm.PyroMacroError,
        lambda: run(shop, pm.Allocate(33.0, shares=[0.2, 0.3, 0.5])),
        ["'sales'", "shape \\(3,\\)", "Expected 2 in the rightmost", "1 of 'x1'"],
    ),
    (
        "a distribution of another shape",
        pm.PyroMacroError,
        lambda: run(shop, pm.Explicit(33.0, in_the_batch)),
        [
            "'sales'",
            "event shape \\(\\)",
            "Expected .*\\(2,\\)",
            "add `.to_event\\(1\\)`",
        ],
    ),
    (
        "two interventions on a site",
        pm.PyroMacroError,
        lambda: poutine.do(
            pm.macro_do(shop, {SALES: pm.Natural(33.0)}), {"x1": torch.tensor(1.0)}
        )(),
        ["'sales'", "'x1' is also set", "Both cannot hold", "drop one of the two"],
    ),
    (
        "an adjustment for an effect",
        pm.PyroMacroError,
        lambda: pm.macro_adjust(shop, SALES, "revenue", adjustment=["x1"]),
        ["'sales'", "'x1' is to be adjusted for", "Definition 12", "Adjust for what"],
    ),
]


@pytest.mark.parametrize(
    "error, program, says", [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS]
)
def test_errors(error, program, says):
    with pytest.raises(pm.PyroMacroError) as raised:
        program()
    assert type(raised.value) is error
    message = str(raised.value)
    assert re.search(".*?".join(says), message, re.DOTALL), message
    assert message.endswith((".", "]")) and "  " not in message


def test_every_class_of_errors_has_a_row():
    public = {
        value
        for value in vars(pm).values()
        if isinstance(value, type) and issubclass(value, pm.PyroMacroError)
    }
    assert public == {row[1] for row in ERRORS}


def not_adjusted():
    def model():
        pyro.sample("weather", dist.Normal(0.0, 1.0))
        season()

    pm.macro_adjust(model, SALES, "revenue", adjustment="weather")


def not_a_chain():
    def model():
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        y = pyro.sample("y", dist.Normal(x + u, 1.0).to_event(1))
        pyro.sample("z", dist.Normal(y.sum() + u, 1.0))

    pm.irrelevant_cause(
        model, pm.MacroVariable("xb", "x"), pm.MacroVariable("yb", "y"), "z"
    )


def not_converged():
    chains = pm.Chains(num_samples=20, warmup_steps=2, num_chains=2, progress=False)
    unlike = pair(dist.Gamma(2.0, 1.0), dist.Gamma(3.0, 5.0))
    run(unlike, pm.Natural(4.0, sampler=chains))


# Each: the category, a program, and what the warning says, in order
WARNINGS = [
    (
        pm.NotAdjusted,
        not_adjusted,
        ["'sales'", "weather", "\\(15\\) \\(dev", "Adjust for more, or"],
    ),
    (
        pm.NotAChain,
        not_a_chain,
        ["'yb'", "no chain, \\['u'\\]", "Lemma 10", "Use blocks_backdoor"],
    ),
    (
        pm.NotConverged,
        not_converged,
        ["'sales'", "R-hat", "expected", "Ask for more draws"],
    ),
]


@pytest.mark.parametrize("category, program, says", WARNINGS)
def test_warnings(category, program, says):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program()
    (message,) = {str(w.message) for w in caught if w.category is category}
    assert re.search(".*?".join(says), message, re.DOTALL), message


def test_all_warnings_have_a_public_category():
    """So that users can filter, or turn into errors, what this library says."""
    found = set()
    for path in Path(pm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
                given = node.args[1:2] + [
                    k.value for k in node.keywords if k.arg == "category"
                ]
                assert given, f"{path.name}:{node.lineno} warns without a category"
                found.add(ast.unparse(given[0]))
    assert found == {category.__name__ for category, _, _ in WARNINGS}
    assert found <= set(pm.__all__)
