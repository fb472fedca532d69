# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A fused program in words: one line a site, interventions included."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from pyro_macro.consolidation.allowed import Allowed
from pyro_macro.consolidation.compose import Affine, Table
from pyro_macro.consolidation.elimination import Chain, Elimination
from pyro_macro.consolidation.finite_elimination import FiniteElimination
from pyro_macro.consolidation.gaussian import GaussianLaw
from pyro_macro.consolidation.known import plain
from pyro_macro.consolidation.rules import Formulas, Rule
from pyro_macro.consolidation.structure import Structure
from pyro_macro.consolidation.symbolic import (
    NotSymbolic,
    as_expr,
    simplified,
    size,
    text,
)
from pyro_macro.consolidation.tables import Factor
from pyro_macro.program.inner import unwrapped
from pyro_macro.program.tape import SITE

SHOWN = 6  # interventions one by one, at most
CELLS = 8  # rows of a table, at most
LONG = 400  # operations of a formula, at most


class Equations:
    """Writes the lines.

    :param latex: for LaTeX instead of plain text.
    """

    def __init__(
        self,
        structure: Structure,
        eliminations: Mapping[str, Elimination[Any]],
        rules: Mapping[str, Rule],
        allowed: Allowed,
        names: Mapping[str, str],
        latex: bool,
    ) -> None:
        self.structure, self.eliminations, self.rules = structure, eliminations, rules
        self.allowed, self.latex = allowed, latex
        self.formulas = Formulas(structure, names)
        taken = set(structure.of)
        self._k = next(x for x in _letters("k") if x not in taken)
        self._v = next(x for x in _letters("v") if x not in taken)
        self._set: frozenset[str] = frozenset()  # by the law that is being written

    def lines(self) -> list[str]:
        lines = [self._line(name) for name in self.structure.stays]
        if not self.latex:
            return lines
        signs = ((" ~ ", r" \sim "), (" @ ", r" \cdot "), ("*", r" \cdot "))
        for sign, written in signs:
            lines = [line.replace(sign, written) for line in lines]
        return lines

    def _line(self, name: str) -> str:
        site = self.structure.sites[name]
        elimination = self.eliminations.get(name)
        if name in self.rules or (elimination is None and site.deterministic):
            return self._deterministic(name)
        if elimination is None:
            return f"{self._name(name)} ~ {self._own(name)}"
        return self._fused(name, elimination)

    # Names and numbers

    def _name(self, name: str) -> str:
        if not self.latex:
            return name
        escaped = name.replace("\\", "\0")
        escaped = re.sub(r"([_{}$&#%])", r"\\\1", escaped)
        escaped = escaped.replace("\0", r"\backslash ")
        return rf"\mathrm{{{escaped}}}"

    def _known(self, name: str) -> str:
        """A site that stays, or the formula of one that is computed on the way."""
        if name not in self.structure.computed or name in self._set:
            return self._name(name)
        try:
            value, _ = self.formulas.own(name, self.structure.computed)
            shown = self._value(simplified(value))
        except NotSymbolic:
            return self._name(name)
        return shown if re.fullmatch(r"[\w.\\{}]+", shown) else f"({shown})"

    def _do(self, name: str, value: Any = None) -> str:
        what = self._name(name)
        if value is not None:
            shown = rf"\text{{{value}}}" if self.latex else str(value)
            what = f"{what} = {shown}"
        return rf"\mathrm{{do}}({what})" if self.latex else f"do({what})"

    def _words(self, text: str) -> str:
        return rf"\text{{ {text} }}" if self.latex else text

    def _show(self, expr: Any) -> str:
        if self.latex:
            names = {s: self._name(s.name) for s in sympy.sympify(expr).free_symbols}
            floats = sympy.sympify(expr).atoms(sympy.Float)
            short = {f: sympy.Float(f"{float(f):.4g}") for f in floats}
            return sympy.latex(expr.xreplace(short), symbol_names=names)
        return text(expr)

    def _value(self, value: Any) -> str:
        if size(value) > LONG:
            raise NotSymbolic("too long to be read")
        return self._show(as_expr(value))

    # Sites that nothing was fused into

    def _own(self, name: str) -> str:
        """The distribution of a site, in terms of its parents."""
        mechanism = self.structure.of[name]
        kind = type(unwrapped(mechanism.site.fn)).__name__
        kind = rf"\mathrm{{{kind}}}" if self.latex else kind
        try:
            values, _ = self._through(name, self.structure.computed)
            return f"{kind}({', '.join(self._value(v) for v in values)})"
        except NotSymbolic:
            parents = ", ".join(map(self._name, self._behind(mechanism.parents)))
            return f"{kind}(...)" + (
                f" {self._words('given')} {parents}" * bool(parents)
            )

    def _behind(self, names: Iterable[str]) -> list[str]:
        """Sites that stay, in place of those that are computed on the way."""
        found: set[str] = set()
        for name in names:
            if name in self.structure.computed and name not in self.allowed.sites:
                found |= self.structure.computed_from(name)
            else:
                found.add(name)
        return self._ordered(found)

    def _through(self, name: str, computed: Collection[str]) -> tuple[list[Any], Any]:
        from pyro_macro.consolidation.symbolic import symbolic

        expression = self.structure.of[name].expression
        symbols = {}
        passed: set[str] = set()
        for leaf in expression.leaves:
            if leaf[0] == SITE and leaf[1] in computed:
                symbols[leaf], more = self.formulas.own(str(leaf[1]), computed)
                passed |= {str(leaf[1]), *more}
            else:
                symbols[leaf] = self.formulas.symbol(leaf)
        return [simplified(v) for v in symbolic(expression, symbols)], passed

    def _deterministic(self, name: str) -> str:
        rule = self.rules.get(name)
        left = f"{self._name(name)} :="
        blocked = self._with_interventions(name)
        try:
            if blocked is not None:
                return f"{left} {blocked}{self._unless(name)}"
            if rule is not None:
                shown = self._value(rule.value)
            else:
                (value,), _ = self._through(name, self.structure.computed)
                shown = self._value(value)
        except NotSymbolic:
            behind = self._behind(self.structure.of[name].parents)
            shown = f"f({', '.join(map(self._name, behind))})"
        return f"{left} {self._under(name, shown)}{self._unless(name)}"

    def _under(self, name: str, shown: str) -> str:
        """With what becomes of it under interventions on what it is computed from."""
        import networkx as nx

        computed = self.structure.computed
        above = nx.ancestors(self.structure.graph, name) & computed
        parts = []
        sites = self._ordered(above & self.allowed.sites)[::-1]
        for site in sites[:SHOWN]:
            try:
                (value,), _ = self._through(name, computed - {site})
                instead = self._value(value)
            except NotSymbolic:
                instead = f"f({self._name(site)}, ...)"
            if instead != shown:
                parts.append(f"{instead} {self._words('under')} {self._do(site)}")
        if not parts:
            return shown
        if len(sites) > SHOWN:
            parts.append(self._words(f"... {len(sites) - SHOWN} more"))
        if len(sites) > 1:
            parts.append(f"({self._words('several: composed')})")
        return "; ".join([*parts, f"{self._words('else')} {shown}"])

    def _ordered(self, names: Collection[str]) -> list[str]:
        return sorted(names, key=self.structure.order.__getitem__)

    def _unless(self, name: str) -> str:
        """Explicit interventions on the site itself, as in ``G := F unless ...``."""
        own = [one[name] for one in self.allowed.explicit if name in one]
        if not own:
            return ""
        shown = f" {self._words('or')} ".join(self._do(name, v) for v in own)
        return f" {self._words('unless')} {shown}"

    def _with_interventions(self, name: str) -> str | None:
        """A truth value with a symbol for each intervention on what is behind it."""
        computed = self.structure.computed
        expression = self.structure.of[name].expression
        behind = {p for p in expression.parents if p in computed}
        values = {}
        for site in behind & self.allowed.sites:
            if site in self.allowed.free:
                return None
            set_to = {bool(one[site]) for one in self.allowed.explicit if site in one}
            if self.structure.sites[site].value.dtype != torch.bool or len(set_to) > 1:
                return None
            values[site] = set_to.pop()
        if not values:
            return None
        from pyro_macro.consolidation.symbolic import symbolic

        made: dict[sympy.Symbol, str] = {}
        symbols = {}
        for leaf in expression.leaves:
            site = str(leaf[1])
            if leaf[0] == SITE and site in behind:
                symbols[leaf], _ = self.formulas.own(site, computed)
                if site in values:
                    done = sympy.Symbol(f"do_{site}")
                    made[done] = self._do(site, values[site])
                    natural = sympy.And(sympy.Not(done), symbols[leaf])
                    symbols[leaf] = natural
                    if values[site]:
                        symbols[leaf] = sympy.Or(done, natural)
            else:
                symbols[leaf] = self.formulas.symbol(leaf)
        (value,) = symbolic(expression, symbols)
        return self._logic(simplified(value), made)

    def _logic(self, formula: Any, made: Mapping[Any, str]) -> str:
        """A formula in words."""
        both, either = self._words("and"), self._words("or")
        no = self._words("not")
        if formula in made:
            return made[formula]
        if isinstance(formula, sympy.Not):
            inner = formula.args[0]
            shown = self._logic(inner, made)
            return f"{no} {shown}" if inner.is_Symbol else f"{no} ({shown})"
        if isinstance(formula, sympy.Or):
            negated = [a.args[0] for a in formula.args if isinstance(a, sympy.Not)]
            if len(negated) == len(formula.args) and all(a in made for a in negated):
                shown = f" {both} ".join(
                    sorted((made[a] for a in negated), key=_natural)
                )
                return f"{no} ({shown})"
            return f" {either} ".join(
                self._grouped(a, made) for a in sorted(formula.args, key=str)
            )
        if isinstance(formula, sympy.And):
            args = sorted(formula.args, key=lambda a: (bool(a.args), str(a)))
            return f" {both} ".join(self._grouped(a, made) for a in args)
        return self._show(formula)

    def _grouped(self, formula: Any, made: Mapping[Any, str]) -> str:
        shown = self._logic(formula, made)
        if isinstance(formula, sympy.Or) and not shown.startswith(self._words("not")):
            return f"({shown})"
        return shown

    # Fused sites

    def _fused(self, name: str, elimination: Elimination[Any]) -> str:
        relevant = self._relevant(name, elimination)
        left = f"{self._name(name)} :="
        chain = next((c for c in elimination.chains if c.end == name), None)
        plain = self._from_head(name, elimination, chain)
        if not relevant:
            return f"{left} {plain}"
        if chain is not None and set(relevant) <= {chain.head, *chain.sites}:
            rule = self._chain_rule(name, chain, relevant)
            if rule is not None:
                return f"{left} {rule}; {self._words('else')} {plain}"
        parts = []
        last = self._last_wins(name, elimination, relevant)
        for site in (relevant[::-1] if last else relevant)[:SHOWN]:
            law = self._law(name, elimination, frozenset([site]))
            parts.append(f"{law} {self._words('under')} {self._do(site)}")
        if len(relevant) > SHOWN:
            parts.append(self._words(f"... {len(relevant) - SHOWN} more"))
        if len(relevant) > 1:
            how = "the first that applies" if last else "several: composed"
            parts.append(f"({self._words(how)})")
        parts.append(f"{self._words('else')} {plain}")
        return f"{left} {'; '.join(parts)}"

    def _from_head(
        self, name: str, elimination: Elimination[Any], chain: Chain | None
    ) -> str:
        """The law without interventions; of a chain of equal links one rule."""
        law = self._law(name, elimination, frozenset())
        plan = elimination.plan(frozenset())
        if chain is None or name in plan.laws:
            return law
        if set(plan.stages[name]) - {name} - self.structure.computed:
            return law  # the head is random
        link = self._equal_links(chain, [chain.head, *chain.sites])
        if link is None:
            return law
        start = self._name(chain.head)
        if chain.head in self.structure.computed:
            try:
                value, _ = self.formulas.own(chain.head, self.structure.computed)
                start = self._value(simplified(value))
            except NotSymbolic:
                return law
        return self._repeated(link, str(len(chain.sites)), start)

    def _relevant(self, name: str, elimination: Elimination[Any]) -> list[str]:
        """Allowed interventions on eliminated sites that this one depends on."""
        plan = elimination.plan(frozenset())
        behind = {
            s
            for child in elimination.component.children
            for n in plan.stages[child]
            for s in elimination.behind(n, plan)
        }
        import networkx as nx

        above = nx.ancestors(self.structure.graph, name)
        allowed = set(elimination.component.eliminated) & self.allowed.sites
        found = allowed & behind & above
        # Causes of earlier sites change what these tell
        plain = self._law(name, elimination, frozenset())
        computed = self.structure.computed & self.allowed.sites
        for site in (allowed | computed) - found:
            if self._law(name, elimination, frozenset([site])) != plain:
                found.add(site)
        return self._ordered(found)

    def _last_wins(
        self, name: str, elimination: Elimination[Any], relevant: Sequence[str]
    ) -> bool:
        """Whether of several interventions only the last one counts."""
        pairs: Any = itertools.combinations(relevant, 2)
        if len(relevant) > 2 * SHOWN:
            pairs = [*itertools.pairwise(relevant), (relevant[0], relevant[-1])]
        for one, other in pairs:
            both = self._law(name, elimination, frozenset([one, other]))
            if both != self._law(name, elimination, frozenset([other])):
                return False
        return True

    def _law(
        self, name: str, elimination: Elimination[Any], interventions: frozenset[str]
    ) -> str:
        plan = elimination.plan(interventions)
        law = plan.laws.get(name)
        self._set = interventions
        if isinstance(law, GaussianLaw):
            return self._gaussian(law)
        if isinstance(law, Factor) and isinstance(elimination, FiniteElimination):
            return self._table(name, law, elimination)
        on = [
            p
            for n in plan.stages.get(name, ())
            for s in elimination.behind(n, plan)
            for p in self.structure.of[s].parents
            if p in self.structure.stays or p in interventions
        ]
        on += [c for c in plan.stages if self._before(c, name)]
        given = ", ".join(map(self._name, dict.fromkeys(on)))
        kind = "N"
        if isinstance(elimination, FiniteElimination):
            site = self.structure.sites[name]
            mixed = name in elimination.general
            named = type(unwrapped(site.fn)).__name__
            kind = "mixture" if mixed else "table" if site.deterministic else named
            kind = rf"\mathrm{{{kind}}}" if self.latex else kind
        return f"{kind}(...)" + (f" {self._words('given')} {given}" if given else "")

    def _before(self, one: str, other: str) -> bool:
        return self.structure.order[one] < self.structure.order[other]

    def _gaussian(self, law: GaussianLaw) -> str:
        terms = []
        for name, matrix in law.mean.terms.items():
            matrix = _one(matrix)
            if matrix.numel() == 1:
                factor = float(matrix)
                if factor:
                    terms.append((factor, self._known(name)))
            elif bool(matrix.any()):
                terms.append((1.0, f"{_shaped('A', matrix, 2)} @ {self._known(name)}"))
        const, variance = _one(law.mean.const), _one(law.covariance)
        shown = _sum(terms, float(const) if const.numel() == 1 else None, self.latex)
        if const.numel() > 1 and bool(const.any()):
            shown += f" + {_shaped('b', const, 1)}"
        if not bool(variance.any()):
            return shown
        if variance.numel() == 1:
            noise = rf"N(0, {_number(float(variance) ** 0.5)}^2)"
        else:
            noise = f"N(0, {_shaped('S', variance, 2)})"
        return noise if shown == "0" else f"{shown} + {noise}"

    def _table(self, name: str, law: Factor, elimination: FiniteElimination) -> str:
        table = law.table.reshape(law.table.shape[elimination.frame.depth :]).exp()
        plates = law.table.shape[: elimination.frame.depth]
        axes = [plain(a) for a in law.axes[:-1]]
        values = elimination.supports
        if torch.Size(plates).numel() > 1:
            given = ", ".join(map(self._name, axes))
            return self._words("table") + (f" {self._words('of')} {given}" * bool(axes))
        shape = table.shape[:-1]
        if len(axes) == 1 and _is_identity(table):
            one, other = values[axes[0]].double(), values[name].double()
            if torch.equal(one, other):
                return self._name(axes[0])
        rows = list(itertools.product(*map(range, shape)))
        if len(rows) * table.shape[-1] > 2 * CELLS:
            given = ", ".join(map(self._name, axes))
            count = self._words(f"{table.numel()} numbers")
            return f"{self._words('table of')} {given}, {count}"
        parts = []
        truth = values[name].tolist() == [0, 1]
        certain = bool(((table == 0) | (table == 1)).all())
        for row in rows:
            probs = table[row]
            condition = f" {self._words('and')} ".join(
                f"{self._name(a)} = {_number(float(values[a][i]))}"
                for a, i in zip(axes, row, strict=True)
            )
            shown = self._probabilities(probs, values[name])
            if truth and not certain:
                shown = _number(float(probs[1]))
            parts.append(f"{shown} {self._words('if')} {condition}" if axes else shown)
        shown = ", ".join(parts)
        named = r"\mathrm{Bernoulli}" if self.latex else "Bernoulli"
        return f"{named}({shown})" if truth and not certain else shown

    def _probabilities(self, probs: Tensor, values: Tensor) -> str:
        likely = int(probs.argmax())
        if float(probs[likely]) == 1:
            return _number(float(values[likely]))
        pairs = ", ".join(
            f"{_number(float(v))}: {_number(float(p))}"
            for v, p in zip(values, probs, strict=True)
        )
        left, right = (r"\{", r"\}") if self.latex else ("{", "}")
        return f"{self._words('one of')} {left}{pairs}{right}"

    def _chain_rule(
        self, name: str, chain: Chain, relevant: Sequence[str]
    ) -> str | None:
        """A chain of equal links: one rule, whatever its length."""
        if len(chain.sites) < 3 and len(relevant) < 2:
            return None
        # The first link matters only to who intervenes before it
        first = 0 if chain.head in relevant else 1
        steps, rule = self._where(chain, relevant)
        if isinstance(chain.links, Table):
            tables = chain.links.probs[first:]
            same = bool((tables == tables[:1]).all())
            if not same or tables.shape[1:-2].numel() > 1:
                return None
            identity = _is_identity(tables[0].reshape(tables.shape[-2:]))
            return f"{self._v} {rule}" if identity else None
        sites = [chain.head, *chain.sites] if not first else chain.sites
        link = self._equal_links(chain, sites)
        return (
            None if link is None else f"{self._repeated(link, steps, self._v)} {rule}"
        )

    def _repeated(self, link: tuple[Any, Any, Any], steps: str, start: str) -> str:
        """A number of equal links, from a start."""
        a, b, q = link
        shown = self._power(a, steps, start)
        if b != 0:
            if a == 1:
                shown += f" + {self._factor(b)}*({steps})"
            else:
                ratio = self._factor(b / (1 - a))
                shown += f" + {ratio}*(1 - {self._power(a, steps)})"
        if q != 0:
            sd = f"{self._factor(sympy.sqrt(q))}^2"
            if a in (1, -1):
                shown += f" + N(0, {sd}*({steps}))"
            else:
                twice = self._power(a, f"2*({steps})")
                shown += f" + N(0, {sd}*(1 - {twice})/(1 - {self._factor(a)}^2))"
        return shown

    def _equal_links(
        self, chain: Chain, sites: Sequence[str]
    ) -> tuple[Any, Any, Any] | None:
        """Matrix, offset and variance of the links of a chain, if all are the same."""
        if isinstance(chain.links, Affine):
            skipped = 1 if sites == chain.sites else 0
            parts = [p[skipped:] for p in vars(chain.links).values()]
            if any(p[0].numel() > 1 for p in parts):
                return None
            if any(not torch.allclose(p, p[:1].expand_as(p), 1e-6, 0) for p in parts):
                return None
            a, b, q = (_exact(float(p.flatten()[0])) for p in parts)
            return a, b, q
        found = {self._symbolic_link(n, p) for p, n in itertools.pairwise(sites)}
        return found.pop() if len(found) == 1 else None

    def _symbolic_link(self, name: str, parent: str) -> tuple[Any, Any, Any] | None:
        """The same of a link whose coefficients depend on other sites."""
        site = self.structure.sites[name]
        if site.shape.numel() != 1:
            return None
        try:
            values, _ = self._through(name, self.structure.computed - {parent})
        except NotSymbolic:
            return None
        loc, *spread = (as_expr(v) for v in values)
        before = next((s for s in loc.free_symbols if s.name == parent), None)
        if before is None:
            return None
        a = sympy.diff(loc, before)
        return a, loc.subs(before, 0), spread[0] ** 2 if spread else sympy.Integer(0)

    def _factor(self, expr: Any) -> str:
        shown = self._show(expr)
        return shown if expr.is_Atom and not shown.startswith("-") else f"({shown})"

    def _power(self, base: Any, steps: str, times: str = "") -> str:
        if base == 1:
            return times or "1"
        times = "" if times == "1" else times
        exponent = f"{{{steps}}}" if self.latex else f"({steps})"
        if steps.isdigit() and not self.latex:
            exponent = steps
        raised = f"{self._factor(base)}^{exponent}"
        dot = r" \cdot " if self.latex else " * "
        return raised + (dot + times if times else "")

    def _where(self, chain: Chain, relevant: Sequence[str]) -> tuple[str, str]:
        """How many links are left, and which intervention counts, in words."""
        pattern = re.compile(r"^(.*?)(\d+)$")
        names = [*([chain.head] if chain.head in relevant else []), *chain.sites]
        found = [pattern.match(n) for n in names]
        place = {n: i for i, n in enumerate(names)}
        numbers: list[int] | None = None
        if all(found):
            first = [m[1] for m in found if m]
            digits = [int(m[2]) for m in found if m]
            steps = {b - a for a, b in itertools.pairwise(digits)}
            if len(set(first)) == 1 and steps <= {1}:
                numbers = digits
        shown = list(relevant)
        if numbers is not None:
            shown = [str(numbers[place[n]]) for n in relevant]
            end = str(numbers[-1])
        else:
            shown = [self._name(n) for n in relevant]
            end = "n"
        listed = ", ".join(shown[:SHOWN])
        if len(shown) > SHOWN:
            listed = f"{shown[0]}, {shown[1]}, ..., {shown[-1]}"
        brackets = (r"\{", r"\}") if self.latex else ("{", "}")
        k, last = self._k, self._words("intervened on")
        if numbers is not None:
            where = self._words(f"where {k} is the last of")
            rule = f"{where} {brackets[0]}{listed}{brackets[1]} {last}"
            return f"{end}-{k}", rule
        places = {n: i for i, n in enumerate([chain.head, *chain.sites])}
        shown = [f"{self._name(n)} ({places[n]})" for n in relevant]
        listed = ", ".join(shown[:SHOWN]) + (", ..." if len(shown) > SHOWN else "")
        where = self._words(
            f"where {k} of {len(chain.sites)} is the place of the last of"
        )
        rule = f"{where} {brackets[0]}{listed}{brackets[1]} {last}"
        return f"{len(chain.sites)}-{k}", rule


def _letters(first: str) -> Iterator[str]:
    """A letter, and what to take if it is the name of a site."""
    yield first
    yield from (f"{first}{i}" for i in itertools.count(1))


def _exact(value: float) -> Any:
    return sympy.Integer(int(value)) if value == int(value) else sympy.Float(value)


def _one(tensor: Tensor) -> Tensor:
    """One element if all slots of all plates have the same single one."""
    flat = tensor.flatten()
    single = tensor.shape[-1] == 1 and bool((flat == flat[:1]).all())
    return flat[:1] if single else tensor


def _shaped(letter: str, tensor: Tensor, right: int) -> str:
    """A letter with the shape of what it stands for, within the plates."""
    return f"{letter}[{'x'.join(map(str, tensor.shape[-right:]))}]"


def _is_identity(table: Tensor) -> bool:
    return table.shape[0] == table.shape[1] and torch.equal(
        table, torch.eye(len(table), dtype=table.dtype, device=table.device)
    )


def _natural(text: str) -> list[Any]:
    """Sorts numbers in names as numbers."""
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", text)]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _sum(terms: Sequence[tuple[float, str]], const: float | None, latex: bool) -> str:
    """``2*x - y + 1`` of its parts."""
    dot = r" \cdot " if latex else " * "
    text = ""
    for factor, name in terms:
        size = "" if abs(factor) == 1 else f"{_number(abs(factor))}{dot}"
        sign = "-" if factor < 0 else "+"
        text += f" {sign} {size}{name}" if text else f"{'-' * (factor < 0)}{size}{name}"
    if const or not text:
        shown = _number(abs(const or 0.0))
        sign = "-" if (const or 0.0) < 0 else "+"
        text += f" {sign} {shown}" if text else f"{'-' * (sign == '-')}{shown}"
    return text
