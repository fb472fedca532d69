# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Deterministic sites that stay, as the simplest rule that is found for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from pyro_macro.consolidation.known import Known
from pyro_macro.consolidation.structure import Structure
from pyro_macro.consolidation.symbolic import (
    NotSymbolic,
    Value,
    as_expr,
    evaluated,
    simplified,
    size,
    symbol,
    symbolic,
)
from pyro_macro.program.inner import Site
from pyro_macro.program.tape import SITE, Leaf

TRIALS = 16  # at which a rule is compared with the program
SHORT, LONG = 20, 400  # operations that are worth, and not too many, to simplify


@dataclass(frozen=True, eq=False)
class Rule:
    """A site as a formula.

    :ivar value: the formula, in symbols named as :ivar:`leaves` says.
    :ivar leaves: by name of the symbol, what it stands for.
    :ivar requires: sites that it holds without an intervention on.
    """

    value: Value
    leaves: dict[str, Leaf]
    requires: frozenset[str]

    def at(self, known: Known) -> Tensor:
        values = {}
        for name, leaf in self.leaves.items():
            kind, which = leaf
            values[name] = known[str(which)] if kind == SITE else known.inputs[leaf]
        return evaluated(self.value, values)


def name_of(leaf: Leaf) -> str:
    """A leaf in a formula."""
    kind, which = leaf
    if kind == "argument" and isinstance(which, tuple):
        path = which[1:]
        if which[0] == 1:  # by keyword
            return ".".join(map(str, path))
        return "arg" + ".".join(map(str, path)) if len(path) > 1 else f"arg{path[0]}"
    return str(which)


class Formulas:
    """The deterministic sites of a program in symbols.

    :param names: names of arguments by position, to be read.
    """

    def __init__(self, structure: Structure, names: Mapping[str, str]) -> None:
        self.structure, self.names = structure, names
        self.leaves: dict[str, Leaf] = {}
        self._full: dict[str, Value] = {}
        self.requires: dict[str, frozenset[str]] = {}

    def symbol(self, leaf: Leaf) -> Value:
        """What stands for a leaf."""
        name = name_of(leaf)
        name = self.names.get(name, name)
        self.leaves[name] = leaf
        values = self.structure.mechanisms.values
        like = values.get(leaf)
        return symbol(name, like is not None and like.dtype == torch.bool)

    def own(self, name: str, through: Collection[str]) -> tuple[Value, frozenset[str]]:
        """A site in terms of what is not in ``through``, and what was gone through."""
        made: dict[str, Value] = {}
        passed: set[str] = set()
        stack = [name]
        while stack:
            at = stack[-1]
            expression = self.structure.of[at].expression
            missing = [p for p in expression.parents if p in through and p not in made]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            if at in made:
                continue
            symbols = {}
            for leaf in expression.leaves:
                inside = leaf[0] == SITE and leaf[1] in through
                symbols[leaf] = made[str(leaf[1])] if inside else self.symbol(leaf)
            (value,) = symbolic(expression, symbols)
            # What is short at each step stays short
            made[at] = simplified(value) if SHORT < size(value) < LONG else value
            if at != name:
                passed.add(at)
        return made[name], frozenset(passed)


def rules(
    structure: Structure, taken: Collection[str], names: Mapping[str, str]
) -> dict[str, Rule]:
    """For deterministic sites that stay, formulas that cost less than the program.

    What is computed on the way is substituted; so are, tentatively, sites that stay,
    and where the result is one of these again it takes their name. (Example D.3:
    ``G := E and F`` becomes ``G := F``.)

    :param taken: sites that are dealt with otherwise.
    """
    formulas = Formulas(structure, names)
    found: dict[str, Rule] = {}
    definitions: list[tuple[Any, str, frozenset[str]]] = []
    stays = [n for n in structure.stays if structure.sites[n].deterministic]
    stays = [n for n in stays if n not in taken and not structure.sites[n].observed]
    for name in stays:
        candidates = []
        try:
            value, passed = formulas.own(name, structure.computed)
            candidates.append((simplified(value), passed))
        except NotSymbolic:
            continue
        try:
            through = structure.computed | set(stays)
            value, passed = formulas.own(name, through)
            full = simplified(value)
            for known, other, needs in definitions:
                if as_expr(full) == known:
                    again = formulas.symbol((SITE, other))
                    candidates.append((again, passed | needs))
            candidates.append((full, passed))
            definitions.append((as_expr(full), name, passed))
        except NotSymbolic:
            pass
        best, passed = min(candidates, key=lambda c: size(c[0]))
        of = structure.of
        before = sum(of[n].expression.arithmetic for n in (name, *passed))
        if size(best) > before or (not passed and size(best) == before):
            continue
        free = {s.name for s in _symbols(best)}
        leaves = {n: leaf for n, leaf in formulas.leaves.items() if n in free}
        # A symbol for a site that stays is its value, whatever made it
        own = {str(leaf[1]) for leaf in leaves.values() if leaf[0] == SITE}
        rule = Rule(best, leaves, passed - own)
        if passed & own or _holds(rule, name, structure):
            found[name] = Rule(best, leaves, passed)
    return {n: r for n, r in found.items() if _holds(r, n, structure)}


def _symbols(value: Value) -> set[Any]:
    parts = [p for pair in value for p in pair] if isinstance(value, list) else [value]
    return {s for part in parts for s in sympy.sympify(part).free_symbols}


def _holds(rule: Rule, name: str, structure: Structure) -> bool:
    """Whether a rule says what the program says, at random values."""
    generator = torch.Generator().manual_seed(0)
    mechanisms = structure.mechanisms
    order = [n for n in mechanisms.of if n in _behind(name, structure)]
    for _ in range(TRIALS):
        values = {
            leaf: _random(value, generator) for leaf, value in mechanisms.values.items()
        }
        for at in order:
            mechanism = structure.of[at]
            if mechanism.site.deterministic:
                values[SITE, at] = mechanism.expression(values)[0]
        given = {n: values[leaf] for n, leaf in rule.leaves.items()}
        expected = values[SITE, name]
        try:
            found = evaluated(rule.value, given)
            found = found.to(expected).expand(expected.shape)
        except (NotSymbolic, TypeError, RuntimeError):
            return False
        if not torch.allclose(found, expected, 1e-4, 1e-6, equal_nan=True):
            return False
    return True


def _behind(name: str, structure: Structure) -> set[str]:
    import networkx as nx

    return {name, *nx.ancestors(structure.graph, name)}


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    half = (torch.rand(like.shape, generator=generator, device="cpu") < 0.5).to(
        like.device
    )
    if like.dtype == torch.bool:
        return half
    # Whole numbers among them, which are special to comparisons and remainders
    whole = torch.randint(-60, 60, like.shape, generator=generator, device="cpu").to(
        like
    )
    if not like.is_floating_point():
        return whole
    part = torch.randn(
        like.shape, generator=generator, dtype=torch.float64, device="cpu"
    )
    return torch.where(half, whole, like + 3 * part.to(like))


def fits(value: Tensor, site: Site) -> Tensor:
    """What a rule comes to, as a value of a site."""
    return value.to(site.value)
