# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What the lines of ``equations()`` say, read as a person would read them.

Each line is taken apart by its words, its formulas are evaluated, and what comes out is
compared with the program: recursions, linear algebra and a listing of all states,
written out here. Numbers are printed with four digits.
"""

import itertools
import math
import random
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm

DIGITS = 2e-3  # of numbers with four digits that are multiplied and added
FUNCTIONS = {"exp": math.exp, "Abs": abs}


# Reading a line


def number(formula, values):
    """A formula at some values; a power binds tighter than a sign, as on paper."""
    python = formula.replace("^", "**")
    return float(eval(python, {**FUNCTIONS, "__builtins__": {}}, dict(values)))


def closing(text, start):
    """Where the parenthesis that opens at a place is closed."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise AssertionError(f"parentheses do not match: {text!r}")


def gaussian(law, values):
    """Mean and variance of ``2 * x - 1 + N(0, 3^2)``."""
    found = re.search(r"(^| \+ )N\(0, ", law)
    if found is None:
        return number(law, values), 0.0
    start = found.end() - len("(0, ")
    end = closing(law, start)
    assert end == len(law) - 1, law
    mean = law[: found.start()]
    variance = number(law[start + len("(0, ") : end], values)
    return (number(mean, values) if mean else 0.0), variance


def table(law, values):
    """The probabilities of a law in words, by value."""
    if law.startswith("Bernoulli("):
        assert law[-1] == ")"
        (p,) = {float(x) for x in applying(law[len("Bernoulli(") : -1], values)}
        return {0.0: 1 - p, 1.0: p}
    (shown,) = set(applying(law, values))
    if shown.startswith("one of {"):
        pairs = (pair.split(": ") for pair in shown[len("one of {") : -1].split(", "))
        return {float(value): float(p) for value, p in pairs}
    return {number(shown, values): 1.0}


def applying(text, values):
    """The cases of ``1 if x = 0, one of {...} if x = 1`` that apply."""
    for case in re.findall(r"(?:\{[^}]*\}|[^,{])+", text):
        what, _, condition = case.strip().partition(" if ")
        pairs = [c.split(" = ") for c in condition.split(" and ") if c]
        if all(math.isclose(values[name], float(x)) for name, x in pairs):
            yield what


class Line:
    """``y := LAW under do(b); LAW under do(a); (how); else LAW``."""

    def __init__(self, line):
        self.name, self.sign, rest = re.match(r"(\S+) (:=|~) (.*)$", line).groups()
        self.under, self.rule, self.how, self.more = {}, None, None, 0
        rest, *self.unless = re.split(r" unless | or (?=do\()", rest)
        *parts, last = rest.split("; ")
        self.plain = last.removeprefix("else ")
        assert bool(parts) == last.startswith("else ")
        for part in parts:
            law, _, site = part.partition(" under ")
            if found := re.fullmatch(r"do\((\S+)\)", site):
                assert found[1] not in self.under
                self.under[found[1]] = law
            elif found := re.fullmatch(r"\((.*)\)", part):
                self.how = found[1]
            elif found := re.fullmatch(r"\.\.\. (\d+) more", part):
                self.more = int(found[1])
            else:
                self.rule = Rule(part)

    def law(self, made=()):
        """The law under interventions, the rule of a chain apart."""
        if not made:
            return self.plain
        if len(made) == 1:
            return self.under[made[0]]
        assert self.how == "the first that applies", self.how
        return next(law for site, law in self.under.items() if site in made)


class Rule:
    """``0.9^(6-k) * v where k is the last of {2, 4} intervened on``.

    Of names without numbers: ``where k of 4 is the place of the last of {a (1)} ...``
    """

    pattern = re.compile(
        r"(.*) where (\w+) (?:of \d+ is the place of|is) the last of \{(.*)\} "
        r"intervened on"
    )

    def __init__(self, text):
        self.formula, self.letter, sites = self.pattern.fullmatch(text).groups()
        some = sites.split(", ")
        self.abbreviated = "..." in some
        self.sites = [int(n) for n in some if n.isdigit()]
        named = (re.fullmatch(r"(\S+) \((\d+)\)", one) for one in some)
        self.places = {found[1]: int(found[2]) for found in named if found}

    def place(self, site):
        if self.places:
            return self.places[site]
        place = int(re.search(r"\d+$", site)[0])
        assert self.abbreviated or place in self.sites
        return place

    def at(self, place, value, values=()):
        return gaussian(self.formula, {**dict(values), self.letter: place, "v": value})


def lines(fused):
    found = [Line(line) for line in fused.equations()]
    assert tuple(line.name for line in found) == fused.sites
    return {line.name: line for line in found}


def close(found, expected, scale=1.0):
    assert found == pytest.approx(expected, rel=DIGITS, abs=DIGITS * scale)


def moments(model, name, made=None, given=None):
    """Mean and variance that a program has for one site."""
    made = {n: torch.as_tensor(float(v)) for n, v in (made or {}).items()}
    given = {n: torch.as_tensor(float(v)) for n, v in (given or {}).items()}
    model = poutine.condition(poutine.do(model, made), given)
    fn = poutine.trace(model).get_trace().nodes[name]["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    if isinstance(fn, dist.Delta):
        return float(fn.v), 0.0
    return float(fn.mean), float(fn.variance)


# Chains


def chain(names, factor, offset=0.0, scale=0.0, first=None):
    def model():
        s = pyro.sample(names[0], dist.Normal(1.0, 0.5)) if first is None else None
        if s is None:
            s = pyro.deterministic(names[0], torch.tensor(first))
        for name in names[1:]:
            loc = factor * s + offset
            if scale:
                s = pyro.sample(name, dist.Normal(loc, scale))
            else:
                s = pyro.deterministic(name, loc)

    return model


def after(steps, value, variance, factor, offset, scale):
    """Mean and variance, step by step."""
    for _ in range(steps):
        value = factor * value + offset
        variance = factor**2 * variance + scale**2
    return value, variance


LINKS = {
    "shrinks": (0.95, 0.0, 0.0),
    "shrinks, noise": (0.95, 0.0, 0.5),
    "shrinks, offset": (0.9, 0.25, 0.0),
    "shrinks, offset, noise": (0.9, -0.4, 0.2),
    "grows": (1.5, 0.5, 0.25),
    "grows by a whole number": (2.0, 1.0, 1.0),
    "walk": (1.0, 0.0, 0.5),
    "walk, offset": (1.0, 0.3, 0.5),
    "counts up": (1.0, 2.0, 0.0),
    "counts down": (1.0, -1.0, 0.0),
    "identity": (1.0, 0.0, 0.0),
    "changes sign": (-0.5, 0.0, 0.0),
    "changes sign, offset": (-0.5, 1.0, 0.0),
    "changes sign, noise": (-0.9, 0.5, 0.3),
    "turns over": (-1.0, 1.0, 0.5),
    "little noise": (0.5, 0.0, 1e-5),
    "tiny factor": (1e-5, 0.0, 1.0),
    "large": (0.999, 1e6, 1.0),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("names", ["s0 s1 s2 s3 s4 s5 s6", "x_07 x_08 x_09 x_10 x_11"])
def test_the_rule_of_a_chain(names, link):
    names, numbers = names.split(), LINKS[link]
    last, middle = names[-1], names[1:-1]
    model = chain(names, *numbers)
    fused = pm.consolidate(model, last, middle)
    (line,) = lines(fused).values()
    places = {name: int(re.search(r"\d+$", name)[0]) for name in names}
    assert line.rule.sites == [places[n] for n in middle]
    end = places[last]
    for name in middle:
        for value in (1.7, -2.0):
            steps = end - places[name]
            expected = after(steps, value, 0.0, *numbers)
            found = line.rule.at(places[name], value)
            close(found[0], expected[0], 0.05)
            close(found[1] ** 0.5, expected[1] ** 0.5, 1e-6)
            exact = moments(fused, last, {name: value})
            assert exact == pytest.approx(expected, 1e-8, 1e-12)
    expected = after(len(names) - 1, 1.0, 0.25, *numbers)
    found = gaussian(line.plain, {})
    close(found[0], expected[0], 0.05)
    close(found[1] ** 0.5, expected[1] ** 0.5, 1e-6)


def test_of_two_interventions_on_a_chain_the_last_wins():
    names = [f"s{i}" for i in range(8)]
    fused = pm.consolidate(chain(names, 0.9, 0.1, 0.3), "s7", ["s2", "s5"])
    (line,) = lines(fused).values()
    for made in ({"s2": 4.0, "s5": -1.0}, {"s5": -1.0, "s2": 4.0}):
        close(line.rule.at(5, -1.0), moments(fused, "s7", made))


def test_a_chain_from_a_site_that_is_kept():
    names = [f"s{i}" for i in range(6)]
    fused = pm.consolidate(chain(names, 0.9, 0.1, 0.3), ["s0", "s5"], ["s3"])
    first, last = lines(fused).values()
    assert (first.sign, first.plain) == ("~", "Normal(1, 0.5)")
    assert last.rule.sites == [3]
    for start in (-1.0, 2.0):
        expected = after(5, start, 0.0, 0.9, 0.1, 0.3)
        close(gaussian(last.plain, {"s0": start}), expected)
        close(moments(fused, "s5", given={"s0": start}), expected)


def test_a_chain_from_a_number():
    names = [f"s{i}" for i in range(37)]
    model = chain(names, 0.95, first=1.0)
    fused = pm.consolidate(model, "s36", ["s12", "s24"])
    assert fused.equations() == [
        "s36 := 0.95^(36-k) * v where k is the last of {12, 24} intervened on; "
        "else 0.1578"
    ]


def test_a_chain_whose_links_differ_has_no_rule():
    def model():
        s = pyro.sample("s0", dist.Normal(1.0, 0.5))
        for i in range(1, 6):
            s = pyro.sample(f"s{i}", dist.Normal((i - 2.5) * s + i, 0.1 * i))

    fused = pm.consolidate(model, "s5", ["s1", "s3"])
    (line,) = lines(fused).values()
    assert line.rule is None and line.how == "the first that applies"
    assert list(line.under) == ["s3", "s1"]
    for made in ({}, {"s1": 2.0}, {"s3": -1.0}, {"s1": 2.0, "s3": -1.0}):
        law = line.law(list(made))
        close(gaussian(law, made), moments(fused, "s5", made))


@pytest.mark.parametrize("odd", ["factor", "offset", "scale", "last"])
def test_a_rule_is_of_equal_links_alone(odd):
    """One link is another: wherever it is, the printed laws are right."""

    def model():
        s = pyro.sample("s0", dist.Normal(1.0, 0.5))
        for i in range(1, 6):
            this = {"last": 5}.get(odd, 2) == i
            factor = 0.8 if this and odd in ("factor", "last") else 0.9
            offset = 0.2 if this and odd == "offset" else 0.1
            scale = 0.4 if this and odd == "scale" else 0.3
            s = pyro.sample(f"s{i}", dist.Normal(factor * s + offset, scale))

    allowed = ["s1", "s2", "s3", "s4"]
    fused = pm.consolidate(model, "s5", allowed)
    (line,) = lines(fused).values()
    for site in allowed:
        expected = moments(fused, "s5", {site: 2.0})
        if line.rule is not None:
            found = line.rule.at(int(site[1:]), 2.0)
        else:
            found = gaussian(line.under[site], {site: 2.0})
        close(found, expected)
    close(gaussian(line.plain, {}), moments(fused, "s5"))


def test_a_chain_whose_coefficients_are_sites_parameters_and_arguments():
    def model(shift):
        r = pyro.sample("r", dist.Beta(2.0, 2.0))
        p = pyro.param("p", torch.tensor(0.3))
        s = pyro.sample("s0", dist.Normal(0.0, 1.0))
        for i in range(1, 6):
            s = pyro.sample(f"s{i}", dist.Normal(r * s + p, shift))

    shift = torch.tensor(0.5)
    fused = pm.consolidate(model, ["r", "s5"], ["s2", "s3"], model_args=(shift,))
    line = lines(fused)["s5"]
    for r, place, value in itertools.product((0.25, 0.9), (2, 3), (1.0, -2.0)):
        known = {"r": r, "p": 0.3, "shift": 0.5}
        found = line.rule.at(place, value, known)
        close(found, after(5 - place, value, 0.0, r, 0.3, 0.5))
    assert re.fullmatch(r"N\(\.\.\.\) given .*\br\b.*", line.plain)


@pytest.mark.parametrize("name", ["k", "v", "r"])
def test_letters_of_a_rule_are_no_sites(name):
    def model():
        r = pyro.sample(name, dist.Beta(2.0, 2.0))
        s = pyro.sample("s0", dist.Normal(0.0, 1.0))
        for i in range(1, 6):
            s = pyro.sample(f"s{i}", dist.Normal(r * s, 1.0))

    fused = pm.consolidate(model, [name, "s5"], ["s2", "s3"])
    rule = lines_of(fused, "s5").partition("; else ")[0]
    if " where " in rule:
        formula, words = rule.split(" where ")
        place = words.split()[0]
        base, power, value = re.search(r"(\w+)\^\(5-(\w+)\) \* (\w+)", formula).groups()
        assert base == name and power == place
        assert len({name, place, value}) == 3


def lines_of(fused, name):
    (line,) = (x for x in fused.equations() if x.startswith(f"{name} "))
    return line


def test_many_allowed_sites_are_abbreviated():
    names = [f"s{i}" for i in range(31)]
    fused = pm.consolidate(chain(names, 0.9, 0.1, 0.2), "s30", names[1:-1])
    (line,) = lines(fused).values()
    assert line.rule.abbreviated and line.rule.sites == [1, 2, 29]
    assert len(fused.equations()[0]) < 200
    for k in (1, 15, 29):
        close(line.rule.at(k, 3.0), after(30 - k, 3.0, 0.0, 0.9, 0.1, 0.2))


def test_a_chain_of_which_many_that_are_scattered_are_allowed():
    names = [f"s{i}" for i in range(40)]
    allowed = [f"s{i}" for i in range(3, 38, 4)]
    fused = pm.consolidate(chain(names, 0.9, 0.1, 0.2), "s39", allowed)
    (line,) = lines(fused).values()
    assert line.rule.abbreviated and {3, 7, 35} <= {*line.rule.sites}


@pytest.mark.parametrize(
    "names",
    [
        "red green blue cyan pink",
        "x4 x3 x2 x1 x0",  # numbers that fall
        "x0 x2 x4 x6 x8",  # with gaps
        "a1 b2 c3 d4 e5",  # of several letters
        "x0 x1 y2 x3 x4",
        "2 3 4 5 6",
    ],
)
def test_names_that_are_no_places(names):
    first, *between, last = names.split()
    numbers = 0.5, 2.0, 1.0
    fused = pm.consolidate(chain([first, *between, last], *numbers), last, between)
    (line,) = lines(fused).values()
    close(gaussian(line.plain, {}), after(4, 1.0, 0.25, *numbers))
    for steps, site in zip((3, 2, 1), between, strict=True):
        if line.rule is None:
            found = gaussian(line.under[site], {site: 3.0})
        else:
            found = line.rule.at(line.rule.place(site), 3.0)
        close(found, after(steps, 3.0, 0.0, *numbers))


def test_identities():
    """Appendix B.1: a mechanism and its inverse fuse to nothing."""

    def model():
        s = pyro.sample("s0", dist.Normal(0.0, 1.0))
        for i in range(6):
            s = pyro.deterministic(f"s{i + 1}", s / 4 if i % 2 else 4 * s)

    fused = pm.consolidate(model, ["s0", "s6"])
    assert fused.equations() == ["s0 ~ Normal(0, 1)", "s6 := s0"]
    fused = pm.consolidate(model, ["s0", "s6"], ["s2", "s3"])
    line = lines(fused)["s6"]
    assert line.plain == "s0" and line.under["s2"] == "s2"
    close(gaussian(line.under["s3"], {"s3": 2.0}), (0.5, 0.0))
    close(gaussian(line.law(["s2", "s3"]), {"s2": 1.0, "s3": 2.0}), (0.5, 0.0))


@pytest.mark.parametrize("kind", ["Gaussian", "finite"])
@pytest.mark.parametrize("keep", [["s5"], ["s0", "s5"]])
def test_identity_chains(kind, keep):
    def model():
        first = dist.Normal(2.0, 1.0) if kind == "Gaussian" else dist.Bernoulli(0.25)
        s = pyro.sample("s0", first)
        for i in range(1, 6):
            s = pyro.deterministic(f"s{i}", s + 0)

    fused = pm.consolidate(model, keep, ["s2", "s3"])
    line = lines(fused)["s5"]
    if line.rule is not None:
        assert line.rule.formula == "v" and line.rule.sites == [2, 3]
    else:  # which of two wins must be said
        assert line.law(["s2"]) == "s2" and line.law(["s3"]) == "s3"
        assert line.law(["s2", "s3"]) == "s3"
    if "s0" in keep:
        assert line.plain == "s0"
    elif kind == "Gaussian":
        assert gaussian(line.plain, {}) == (2.0, 1.0)
    else:
        assert table(line.plain, {}) == {0.0: 0.75, 1.0: 0.25}


# Forks and colliders: laws of Gaussian sites, under each intervention


class Linear:
    """A random program of Gaussian and deterministic sites."""

    def __init__(self, seed, count=7):
        draw = random.Random(seed)
        self.names = [f"v{i}" for i in range(count)]
        self.weights, self.offsets, self.scales = {}, {}, {}
        for i, name in enumerate(self.names):
            few = draw.sample(self.names[:i], min(i, draw.randint(0, 3)))
            self.weights[name] = {p: draw.choice([-2.0, -0.7, 0.6, 1.0]) for p in few}
            self.offsets[name] = draw.choice([0.0, 1.0, -2.0])
            certain = few and draw.random() < 0.2
            self.scales[name] = 0.0 if certain else draw.choice([0.5, 1.0, 2.0])

    def __call__(self):
        values = {}
        for name, weights in self.weights.items():
            loc = torch.tensor(self.offsets[name])
            for parent, weight in weights.items():
                loc = loc + weight * values[parent]
            if self.scales[name]:
                values[name] = pyro.sample(name, dist.Normal(loc, self.scales[name]))
            else:
                values[name] = pyro.deterministic(name, loc)

    def law(self, name, given, made):
        """Mean and variance given some sites, by linear algebra."""
        count = len(self.names)
        mean, gain = {}, {}
        for i, (site, weights) in enumerate(self.weights.items()):
            if site in made:
                mean[site], gain[site] = made[site], np.zeros(count)
                continue
            mean[site] = self.offsets[site]
            gain[site] = self.scales[site] * np.eye(count)[i]
            for parent, weight in weights.items():
                mean[site] += weight * mean[parent]
                gain[site] = gain[site] + weight * gain[parent]
        if not given:
            return mean[name], float(gain[name] @ gain[name])
        known = np.array([gain[n] for n in given])
        gap = np.array([given[n] - mean[n] for n in given])
        slope = np.linalg.lstsq(known.T, gain[name], rcond=1e-10)[0]
        rest = gain[name] - slope @ known
        return mean[name] + float(slope @ gap), float(rest @ rest)

    def possible(self, names, made, seed):
        """Values that some sites may have together."""
        rng = np.random.default_rng(seed)
        values = {}
        for site, weights in self.weights.items():
            loc = self.offsets[site] + sum(w * values[p] for p, w in weights.items())
            values[site] = made.get(site, loc + self.scales[site] * rng.normal())
        return {n: values[n] for n in names}


def check_linear(program, keep, allow, seed=0):
    fused = pm.consolidate(program, keep, allow)
    kept = list(fused.sites)
    allow = [site for site in allow if site not in kept]
    singles = [{site: 1.5} for site in allow]
    both = [{a: 1.5, b: -2.5} for a, b in itertools.combinations(allow, 2)]
    for name, line in lines(fused).items():
        before = kept[: kept.index(name)]
        if line.sign == "~":  # as in the program
            kind, args = re.fullmatch(r"(\w+)\((.*)\)", line.plain).groups()
            assert kind == "Normal"
            values = program.possible(before, {}, seed)
            loc, scale = (number(x, values) for x in args.split(", "))
            close((loc, scale**2), program.law(name, values, {}))
            continue
        assert not line.more
        for made in [{}, *singles, *both]:
            values = program.possible(before, made, seed)
            found = said(line, values, made)
            if found is not None:
                close(found, program.law(name, values, made))


def said(line, values, made):
    """Mean and variance of a line under an intervention.

    ``None`` if the line leaves it to the reader to compose two.
    """
    if line.rule is not None:
        acting = [s for s in made if s in line.rule.places or number_of(s, line.rule)]
        places = {line.rule.place(site): made[site] for site in acting}
        if places:
            return line.rule.at(max(places), places[max(places)], values)
        return gaussian(line.plain, values)
    relevant = [site for site in made if site in line.under]
    if len(relevant) > 1 and line.how != "the first that applies":
        assert line.how == "several: composed"
        return None
    # Of what is not mentioned is nothing to be said
    return gaussian(line.law(relevant), {**values, **made})


def number_of(site, rule):
    found = re.search(r"\d+$", site)
    return found is not None and int(found[0]) in rule.sites


def random_case(seed):
    draw = random.Random(1000 + seed)
    program = Linear(seed)
    keep = sorted(draw.sample(program.names, draw.randint(1, 4)))
    rest = [n for n in program.names if n not in keep]
    return program, keep, draw.sample(rest, min(len(rest), draw.randint(1, 3)))


@pytest.mark.parametrize("seed", range(25))
def test_lines_of_random_programs(seed):
    program, keep, allow = random_case(seed)
    check_linear(program, keep, allow, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25, 300))
def test_lines_of_more_random_programs(seed):
    program, keep, allow = random_case(seed)
    check_linear(program, keep, allow, seed)


def test_a_fork():
    def model():
        b = pyro.sample("b", dist.Normal(1.0, 0.5))
        pyro.sample("c", dist.Normal(3 * b, 1.0))
        pyro.sample("d", dist.Normal(-b, 1.0))

    fused = pm.consolidate(model, ["c", "d"], ["b"])
    first, second = fused.equations()
    assert first == "c := 3 * b + N(0, 1^2) under do(b); else 3 + N(0, 1.803^2)"
    assert second.startswith("d := -b + N(0, 1^2) under do(b); else -")
    line = Line(second)
    # cov(c, d) = -0.75, var(c) = 3.25, var(d) = 1.25
    for c in (0.0, 4.0):
        mean, variance = -1 - 0.75 / 3.25 * (c - 3), 1.25 - 0.75**2 / 3.25
        close(gaussian(line.plain, {"c": c}), (mean, variance))


def test_parallel_paths_are_composed():
    """A collider: no intervention makes another one forgotten."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        c = pyro.sample("c", dist.Normal(2 * a, 1.0))
        pyro.sample("y", dist.Normal(b - c, 1.0))

    fused = pm.consolidate(model, "y", ["b", "c"])
    (line,) = lines(fused).values()
    assert line.how == "several: composed" and set(line.under) == {"b", "c"}
    close(gaussian(line.under["b"], {"b": 2.0}), (2.0, 6.0))
    close(gaussian(line.under["c"], {"c": 2.0}), (-2.0, 3.0))
    close(gaussian(line.plain, {}), (0.0, 4.0))


def test_what_wins_is_decided_by_all_that_is_allowed():
    """The first six of eight allowed sites are a row, the others are not in it."""

    def model():
        s = pyro.sample("x0", dist.Normal(0.0, 1.0))
        for i in range(1, 6):
            s = pyro.sample(f"x{i}", dist.Normal((i + 1.0) * s, 1.0))
        w0 = pyro.sample("w0", dist.Normal(0.0, 1.0))
        w1 = pyro.sample("w1", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(s + w0 + w1, 1.0))

    allowed = [*(f"x{i}" for i in range(6)), "w0", "w1"]
    fused = pm.consolidate(model, "y", allowed)
    (line,) = lines(fused).values()
    both = moments(fused, "y", {"w0": 1.0, "w1": 10.0})
    assert both[0] == 11.0
    if {"w0", "w1"} <= set(line.under):
        assert line.how == "several: composed"
    assert line.how != "the first that applies"


def test_many_allowed_sites_side_by_side():
    def model():
        xs = [pyro.sample(f"x{i}", dist.Normal(0.0, 1.0)) for i in range(20)]
        pyro.sample("y", dist.Normal(sum(xs), 2.0))

    fused = pm.consolidate(model, "y", [f"x{i}" for i in range(20)])
    (line,) = lines(fused).values()
    assert len(line.under) + line.more == 20 and 0 < len(line.under) < 10
    assert line.how == "several: composed"
    for site, law in line.under.items():
        close(gaussian(law, {site: 3.0}), (3.0, 23.0))
    close(gaussian(line.plain, {}), (0.0, 24.0))


def test_vectors_are_named_by_their_shapes():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        x = pyro.sample("x", dist.Normal(z @ torch.ones(2, 3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x[:2] + 1, 1.0).to_event(1))

    fused = pm.consolidate(model, ["z", "y"], ["x"])
    line = lines(fused)["y"]
    assert line.under["x"] == "A[2x3] @ x + b[2] + N(0, S[2x2])"
    assert line.plain == "A[2x2] @ z + b[2] + N(0, S[2x2])"


# Tables


OF_X = [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]


def tables():
    h = pyro.sample("h", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    x = pyro.sample("x", dist.Bernoulli(torch.tensor([0.1, 0.5, 0.9])[h]))
    y = pyro.sample("y", dist.Categorical(torch.tensor(OF_X)[x.long()]))
    pyro.sample("z", dist.Bernoulli(0.1 + 0.2 * y + 0.4 * x))


def joint(made=()):
    made = dict(made)
    found = {}
    for h, x, y, z in itertools.product(range(3), range(2), range(3), range(2)):
        at = {"h": h, "x": x, "y": y, "z": z} | made
        p = [0.2, 0.3, 0.5][h]
        one = [0.1, 0.5, 0.9][at["h"]]
        p *= one if x else 1 - one
        p *= OF_X[at["x"]][y]
        one = 0.1 + 0.2 * at["y"] + 0.4 * at["x"]
        p *= one if z else 1 - one
        found[h, x, y, z] = p
    return found


def probabilities(name, given, made=()):
    place = "hxyz".index
    found, total = {}, 0.0
    for state, p in joint(made).items():
        if all(state[place(n)] == v for n, v in given.items()):
            total += p
            value = float(state[place(name)])
            found[value] = found.get(value, 0.0) + p
    return {value: p / total for value, p in found.items()}


@pytest.mark.parametrize(
    "keep, allow",
    [
        ("z", ["h", "x", "y"]),
        ("y", ["h", "x"]),
        ("xz", ["h"]),
        ("hz", ["x", "y"]),
        ("hy", ["x"]),
        ("yz", ["x"]),
        ("xyz", []),
    ],
)
def test_tables(keep, allow):
    sizes = {"h": 3, "x": 2, "y": 3, "z": 2}
    fused = pm.consolidate(tables, list(keep), allow)
    assert fused.sites == tuple(keep)
    for name, line in lines(fused).items():
        if line.sign == "~" or line.rule is not None:
            continue
        before = keep[: keep.index(name)]
        for made in [{}, *({site: v} for site in allow for v in range(sizes[site]))]:
            relevant = [site for site in made if site in line.under]
            law = line.law(relevant)
            if law.startswith("table of"):
                continue
            for values in itertools.product(*(range(sizes[n]) for n in before)):
                given = dict(zip(before, values, strict=True))
                expected = probabilities(name, given, made)
                found = table(law, {**given, **made})
                assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_large_tables_are_named_by_what_they_are_of():
    fused = pm.consolidate(tables, ["x", "z"], ["h", "y"])
    line = lines(fused)["z"]
    for law in (line.plain, *line.under.values()):
        assert law.startswith(("table of ", "Bernoulli(", "one of {"))
    words = " ".join(pm.consolidate(wide_table, ["c", "d", "e"], ["a"]).equations()[1:])
    assert re.search(r"table of [a-e, ]*c", words)
    assert len(words) < 600


def wide_table():
    a = pyro.sample("a", dist.Categorical(torch.ones(7)))
    b = pyro.sample("b", dist.Categorical(torch.arange(1.0, 6.0)[:5]))
    c = pyro.sample("c", dist.Categorical(torch.arange(1.0, 13.0).roll(3) * (1 + a)))
    d = pyro.sample("d", dist.Binomial(9, (1.0 + a + b + c) / 40))
    pyro.sample("e", dist.Bernoulli((1.0 + a + d) / 40))


def test_shared_noise_is_certain_of_what_came_before():
    def model():
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.deterministic("c", b)
        pyro.deterministic("d", 1 - b)

    fused = pm.consolidate(model, ["c", "d"], ["b"])
    c, d = lines(fused).values()
    assert table(c.plain, {}) == {0.0: 0.7, 1.0: 0.3}
    assert c.under["b"] == "b"
    for value in (0.0, 1.0):
        assert table(d.plain, {"c": value}) == {1 - value: 1.0}
        if "b" in d.under:
            law = table(d.under["b"], {"b": value, "c": value})
            assert law == {1 - value: 1.0}


def test_a_noisy_row():
    def model():
        s = pyro.sample("s0", dist.Bernoulli(0.6))
        for i in range(1, 6):
            s = pyro.sample(f"s{i}", dist.Bernoulli(0.1 + 0.7 * s))

    fused = pm.consolidate(model, ["s0", "s5"], ["s2", "s3"])
    line = lines(fused)["s5"]
    step = np.array([[0.9, 0.1], [0.2, 0.8]])
    for made in ({}, {"s2": 1}, {"s3": 0}, {"s2": 1, "s3": 0}, {"s2": 0, "s3": 1}):
        start = max(made, default="s0")
        power = np.linalg.matrix_power(step, 5 - int(start[1:]))
        for s0 in (0, 1):
            row = power[{**made, "s0": s0}[start]]
            found = table(line.law(list(made)), {**made, "s0": s0})
            assert found == pytest.approx({0.0: row[0], 1.0: row[1]}, abs=1e-4)


# Deterministic sites and explicit interventions


def gates(a, b):
    x = pyro.deterministic("x", a > 0.5)
    y = pyro.deterministic("y", b > 2)
    z = pyro.deterministic("z", x & y)
    pyro.deterministic("w", ~z | (b > 8))


ONES = (torch.tensor(1.0), torch.tensor(1.0))


def truth(formula, a, b, **made):
    """A printed formula, with what is done as ``do(x = True)`` in it."""

    def holds(found):
        site, value = found[1], found[2] == "True"
        return str(site in made and made[site] == value)

    python = re.sub(r"do\((\w+) = (True|False)\)", holds, formula)
    return eval(python, {"__builtins__": {}}, {"a": a, "b": b, **made})


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("site", ["x", "y", "z"])
def test_truth_values_with_explicit_interventions(site, value):
    keep = ["w"]
    fused = pm.consolidate(gates, keep, [{site: value}], model_args=ONES)
    (line,) = fused.equations()
    formula = line.removeprefix("w := ")
    for a, b, made in itertools.product((0.0, 1.0), (1.0, 3.0, 9.0), (False, True)):
        args = torch.tensor(a), torch.tensor(b)
        setting = {site: value} if made else {}
        done = poutine.do(gates, {n: torch.tensor(v) for n, v in setting.items()})
        expected = poutine.trace(done).get_trace(*args).nodes["w"]["value"]
        found = formula
        if "else" in formula:
            found = Line(line).law(list(setting)) if made else Line(line).plain
        assert truth(found, a, b, **setting) == bool(expected), (line, a, b, made)


def test_explicit_interventions_on_a_kept_site_are_said():
    settings = [{"z": True}, {"z": False}]
    fused = pm.consolidate(gates, ["z"], settings, model_args=ONES)
    (line,) = fused.equations()
    assert line == (
        "z := a > 0.5 and b > 2 unless do(z = True) or do(z = False)"
    ) or line == ("z := b > 2 and a > 0.5 unless do(z = True) or do(z = False)")


def test_explicit_interventions_on_a_kept_site_and_before_it_are_said():
    settings = [{"x": True}, {"z": False}]
    fused = pm.consolidate(gates, ["z"], settings, model_args=ONES)
    (line,) = fused.equations()
    assert "do(x = True)" in line
    assert line.endswith(" unless do(z = False)")


def test_numbers_that_are_set():
    def model(a):
        b = pyro.deterministic("b", 2 * a)
        pyro.deterministic("c", b + 1)

    settings = [{"c": 1.5}, {"c": -2.0}]
    fused = pm.consolidate(model, ["c"], settings, model_args=ONES[:1])
    (line,) = fused.equations()
    left, right = line.split(" unless ")
    assert number(left.removeprefix("c := "), {"a": 3.0}) == 7.0
    shown = [re.fullmatch(r"do\(c = (.*)\)", part)[1] for part in right.split(" or ")]
    assert [float(x) for x in shown] == [1.5, -2.0]


def test_formulas_under_interventions():
    def model(a, b):
        x = pyro.deterministic("x", a * b + 1)
        y = pyro.deterministic("y", torch.exp(x / 4))
        pyro.deterministic("z", y - b**2)

    fused = pm.consolidate(model, ["z"], ["x", "y"], model_args=ONES)
    (line,) = lines(fused).values()
    for made in ({}, {"x": 2.0}, {"y": -1.0}):
        law = line.law(list(made))
        found = number(law, {"a": 1.5, "b": 0.5, **made})
        done = poutine.do(model, {n: torch.tensor(v) for n, v in made.items()})
        args = torch.tensor(1.5), torch.tensor(0.5)
        expected = poutine.trace(done).get_trace(*args).nodes["z"]["value"]
        close(found, float(expected))
    if line.how == "the first that applies":  # x acts on z through y alone
        assert line.law(["x", "y"]) == line.under["y"]


# What is not fused


def opaque():
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.lgamma(a), 1.0))
    c = pyro.sample("c", dist.StudentT(3.0, b, 1.0))
    d = pyro.deterministic("d", torch.special.i0(c))
    pyro.sample("e", dist.Normal(d - 2 * b, torch.exp(a)))


def test_opaque_sites():
    fused = pm.consolidate(opaque, ["d", "e"], ["a"])
    assert fused.equations() == [
        "a ~ Gamma(2, 1)",
        "b ~ Normal(...) given a",
        "c ~ StudentT(3, b, 1)",
        "d := f(c)",
        "e ~ Normal(-2*b + d, exp(a))",
    ]


def test_lines_name_only_what_is_there():
    fused = pm.consolidate(opaque, ["e"], [])
    assert fused.sites == ("a", "b", "c", "e")
    *_, line = fused.equations()
    named = set(re.findall(r"\b[a-e]\b", line.partition("~")[2]))
    assert named == {"a", "b", "c"}, line


def test_a_program_that_cannot_be_taken_apart():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(1.0 if a > 0 else 2.0, 1.0))
        pyro.sample("c", dist.Normal(a + b, 1.0))

    found = pm.consolidate(model, ["c"]).equations()
    assert [line.partition(":")[0] for line in found] == ["a", "b", "c"]
    assert all("as in the program" in line and "branches" in line for line in found)


def test_one_line_a_site():
    for seed in range(5):
        program, keep, allow = random_case(seed)
        fused = pm.consolidate(program, keep, allow)
        for latex in (False, True):
            found = fused.equations(latex=latex)
            assert len(found) == len(fused.sites)
            assert not any("\n" in line for line in found)


def test_plates():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("plate", 3):
            x = pyro.sample("x", dist.Normal(2 * z, 1.0))
            pyro.sample("y", dist.Normal(x + 1, 1.0))

    fused = pm.consolidate(model, ["z", "y"], ["x"])
    line = lines(fused)["y"]
    close(gaussian(line.plain, {"z": 1.5}), (4.0, 2.0))
    law = line.rule.formula if line.rule else line.under["x"]
    if line.rule is None:
        close(gaussian(law, {"x": 1.5}), (2.5, 1.0))


# LaTeX


def flaws(line):
    """What would not compile, or not be read as it is meant."""
    found = []
    depth = 0
    for i, char in enumerate(line):
        if char in "{}" and line[i - 1 : i] != "\\":
            depth += {"{": 1, "}": -1}[char]
    if depth:
        found.append("braces do not match")
    pieces, rest = [], line
    while (at := rest.find(r"\text{")) >= 0:
        end, depth = at + len(r"\text{"), 1
        while depth:
            escaped = rest[end - 1] == "\\"
            depth += 0 if escaped else {"{": 1, "}": -1}.get(rest[end], 0)
            end += 1
        pieces.append(rest[at + len(r"\text{") : end - 1])
        rest = rest[:at] + " " + rest[end:]
    for piece in pieces:
        outside = re.sub(r"\$[^$]*\$", "", piece)
        if re.search(r"\\[a-zA-Z]", outside):
            found.append(f"a command of formulas in a text: {piece!r}")
        if re.search(r"(?<!\\)[_^&#%]", outside):
            found.append(f"a special character in a text: {piece!r}")
    bare = re.sub(r"\\(?:mathrm|operatorname)\{(?:[^{}\\]|\\.)*\}", " ", rest)
    bare = re.sub(r"\\[a-zA-Z]+", " ", bare)
    if words := re.findall(r"[A-Za-z]{2,}", bare):
        found.append(f"words in a formula: {words}")
    if signs := re.findall(r"[~*@%#&]", bare.replace(r"\%", "")):
        found.append(f"signs that are none: {signs}")
    if re.search(r"(?:^|[\s(,])\{", rest):
        found.append("braces that are not seen")
    if re.search(r"\^\{[^{}]*\}\^|\^\w\^", rest):
        found.append("two exponents")
    return found


LATEX = {
    "chain": (chain([f"s_{i}" for i in range(7)], 0.9, 0.1, 0.2), ["s_6"], ["s_2"]),
    "chain from a kept site": (
        chain([f"s{i}" for i in range(7)], -0.5, 0.1, 0.2),
        ["s0", "s6"],
        ["s2", "s3"],
    ),
    "names": (chain(["a", "b_1", "c", "d"], 0.9, 0.1, 0.2), ["d"], ["b_1", "c"]),
    "small numbers": (chain(["a0", "a1", "a2"], 0.5, 0.0, 1e-5), ["a2"], ["a1"]),
    "tables": (tables, ["z"], ["h", "x", "y"]),
    "tables of two": (tables, ["x", "z"], ["h"]),
    "roots": (tables, ["h", "x", "y", "z"], []),
    "large tables": (wide_table, ["c", "d", "e"], ["a"]),
    "opaque": (opaque, ["e"], ["a"]),
    "deterministic, opaque": (opaque, ["d", "e"], ["a"]),
    "gates": (gates, ["z"], ["x"]),
    "gates, explicit": (gates, ["w"], [{"x": True}, {"w": False}]),
    "random": random_case(3),
}


@pytest.mark.parametrize("case", LATEX)
def test_latex(case):
    model, keep, allow = LATEX[case]
    fused = pm.consolidate(
        model, keep, allow, model_args=ONES if "gates" in case else ()
    )
    for line in fused.equations(latex=True):
        assert not flaws(line), f"{flaws(line)}: {line}"


@pytest.mark.parametrize("case", LATEX)
def test_latex_can_be_drawn(case):
    mathtext = pytest.importorskip("matplotlib.mathtext")
    model, keep, allow = LATEX[case]
    fused = pm.consolidate(
        model, keep, allow, model_args=ONES if "gates" in case else ()
    )
    for line in fused.equations(latex=True):
        if not re.search(r"\\begin|\\bmod|\\operatorname", line):
            mathtext.MathTextParser("agg").parse(f"${line}$")


def test_latex_says_the_same():
    names = [f"s{i}" for i in range(7)]
    fused = pm.consolidate(chain(names, 0.9, 0.5, 0.2), ["s0", "s6"], ["s2", "s4"])
    first, last = fused.equations(latex=True)
    assert r"\mathrm{s0}" in first and r"\mathrm{Normal}(1, 0.5)" in first
    assert last.startswith(r"\mathrm{s6} := 0.9^{6-k} \cdot v")
    for number in ("0.2", "0.5314"):
        assert number in last
    assert r"\mathrm{s0}" in last and r"\text" in last


@pytest.mark.parametrize("name", ["50%_of{x}", "a&b", "$x$", "#1", "a\\b", "x^2"])
def test_special_characters_in_names(name):
    mathtext = pytest.importorskip("matplotlib.mathtext")

    def model():
        a = pyro.sample(name, dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("c", dist.Normal(2 * b, 1.0))

    fused = pm.consolidate(model, [name, "c"], ["b"])
    assert fused.equations()[0] == f"{name} ~ Normal(0, 1)"
    for line in fused.equations(latex=True):
        if "&" not in name:  # not known there
            mathtext.MathTextParser("agg").parse(f"${line}$")
        assert not re.search(r"(?<!\\)[%&#$]", line)
