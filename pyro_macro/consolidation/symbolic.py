# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Expressions of a program in symbols, so that they can be simplified and read.

A number is a list of cases, conditions that exclude one another with a value each; a
truth value is a formula in comparisons. Composing mechanisms is then substitution, and
cases that cannot be drop out by themselves.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue
from sympy.printing.str import StrPrinter
from torch import Tensor

from pyro_macro.program.tape import CAPTURED, Expression, Leaf, part_of

CASES = 64  # of a number, at most
ATOMS = 8  # of a formula that is simplified, at most
NODES = 3000  # of a value, at most


class NotSymbolic(Exception):
    """An expression that has no symbolic form, or too large a one."""


Cases = list[tuple[Any, Any]]
Value = Any  # a sympy formula, or cases of a number


def symbolic(expression: Expression, symbols: Mapping[Leaf, Value]) -> list[Value]:
    """The outputs of an expression in symbols.

    :param symbols: the value of each leaf, a formula or cases of a number.
    :raises NotSymbolic: if it does things that are not known here.
    """
    leaves = []
    for leaf in expression.leaves:
        if leaf[0] == CAPTURED or leaf not in symbols:
            raise NotSymbolic(f"{leaf}")
        leaves.append(symbols[leaf])
    constants = [_constant(c) for c in expression.constants]
    outputs = expression.evaluate(leaves, constants, _apply)
    return [_constant(o) if isinstance(o, Tensor) else o for o in outputs]


def number(expr: Any) -> Cases:
    """A number without conditions."""
    return [(sympy.true, sympy.sympify(expr))]


def symbol(name: str, is_truth: bool) -> Value:
    """The value of a site as a symbol."""
    return sympy.Symbol(name) if is_truth else number(sympy.Symbol(name, real=True))


def as_expr(value: Value) -> Any:
    """A value as one sympy expression."""
    if not isinstance(value, list):
        return value
    if len(value) == 1:
        return value[0][1]
    return sympy.Piecewise(*((expr, condition) for condition, expr in value))


def simplified(value: Value) -> Value:
    """The same value in fewer words."""
    if isinstance(value, list):
        return [(_formula(condition), expr) for condition, expr in _merged(value)]
    return _formula(value)


def _merged(cases: Cases) -> Cases:
    """Cases of the same value as one."""
    found: dict[Any, Any] = {}
    for condition, expr in cases:
        found[expr] = sympy.Or(found.get(expr, sympy.false), condition)
    return [(c, e) for e, c in found.items() if c != sympy.false]


def _formula(formula: Any) -> Any:
    formula = sympy.sympify(formula)
    formula = formula.replace(lambda f: isinstance(f, sympy.And), _congruences)
    atoms = _atoms(formula)
    if len(formula.free_symbols) == 1 and all(isinstance(a, Relational) for a in atoms):
        formula = _on_the_line(formula)
    elif len(atoms) <= ATOMS:
        formula = sympy.simplify_logic(formula)
    else:
        formula = sympy.to_nnf(_factored_all(formula), simplify=False)
    return _factored_all(formula)


def _factored_all(formula: Any) -> Any:
    return formula.replace(lambda f: isinstance(f, sympy.Or), _factored)


def _on_the_line(formula: Any) -> Any:
    """A formula about one number, by the set of numbers for which it is true."""
    (number,) = formula.free_symbols
    try:
        found = formula.as_set().as_relational(number)
    except (NotImplementedError, TypeError, ValueError, AttributeError):
        return formula
    finite = (sympy.oo, -sympy.oo)
    if any(a.has(*finite) for a in _atoms(found)):
        found = found.replace(
            lambda r: isinstance(r, Relational) and r.has(*finite),
            lambda r: sympy.true,
        )
    return found if sympy.count_ops(found) <= sympy.count_ops(formula) else formula


def _atoms(formula: Any) -> set[Any]:
    if isinstance(formula, (sympy.And, sympy.Or, sympy.Not)):
        return {a for arg in formula.args for a in _atoms(arg)}
    return set() if formula in (sympy.true, sympy.false) else {formula}


def _congruences(formula: Any) -> Any:
    """``x % a == 0 and x % b == 0`` as ``x % lcm(a, b) == 0``, for integers a, b."""
    moduli: dict[Any, int] = {}
    rest = []
    for arg in formula.args:
        left = arg.lhs if isinstance(arg, sympy.Eq) else None
        if isinstance(left, sympy.Mod) and arg.rhs == 0 and left.args[1].is_Integer:
            moduli[left.args[0]] = math.lcm(
                moduli.get(left.args[0], 1), int(left.args[1])
            )
        else:
            rest.append(arg)
    found = [sympy.Eq(sympy.Mod(x, m), 0) for x, m in moduli.items()]
    return sympy.And(*found, *rest)


def _factored(formula: Any) -> Any:
    """``(a and b) or (a and c)`` as ``a and (b or c)``."""
    if not isinstance(formula, sympy.Or):
        return formula
    parts = [
        set(arg.args) if isinstance(arg, sympy.And) else {arg} for arg in formula.args
    ]
    common = set.intersection(*parts)
    if not common:
        return formula
    rest = [sympy.And(*(part - common)) for part in parts]
    return sympy.And(*common, sympy.Or(*rest))


def _constant(thing: Any) -> Value:
    if isinstance(thing, Tensor):
        flat = thing.detach().flatten()
        if not len(flat) or not bool((flat == flat[0]).all()):
            raise NotSymbolic("a tensor of several values")
        thing = flat[0].item()
        if isinstance(thing, float) and flat.dtype == torch.float32:
            thing = float(f"{thing:.7g}")
    if isinstance(thing, bool):
        return sympy.true if thing else sympy.false
    if isinstance(thing, (int, float)):
        if not math.isfinite(thing):
            raise NotSymbolic("a number that is not finite")
        exact = int(thing) if thing == int(thing) else thing
        return number(exact)
    return thing


# What the operations of a program are in symbols


def _is_truth(value: Any) -> bool:
    return (
        isinstance(value, (Boolean, BooleanTrue, BooleanFalse))
        and not isinstance(value, list)
        or isinstance(value, sympy.Symbol)
    )


def _cases(value: Any) -> Cases:
    if isinstance(value, list):
        return value
    value = _constant(value)
    if isinstance(value, list):
        return value
    if _is_truth(value):
        return _proper(
            [(value, sympy.Integer(1)), (sympy.Not(value), sympy.Integer(0))]
        )
    raise NotSymbolic(f"{value!r} is no number")


def _truth(value: Any) -> Any:
    if isinstance(value, list):
        return sympy.Or(*(sympy.And(c, sympy.Ne(e, 0)) for c, e in value))
    return _constant(value)


def _proper(cases: Cases) -> Cases:
    found = _merged([(c, e) for c, e in cases if c != sympy.false])
    if len(found) > CASES:
        raise NotSymbolic(f"more than {CASES} cases")
    return found


def _numeric(fn: Callable[..., Any]) -> Callable[..., Value]:
    def apply(*args: Any) -> Cases:
        made: Cases = [(sympy.true, ())]
        for arg in args:
            made = [
                (sympy.And(c, d), (*parts, e))
                for c, parts in made
                for d, e in _cases(arg)
            ]
        return _proper([(c, fn(*parts)) for c, parts in made if c != sympy.false])

    return apply


def _relation(fn: Callable[..., Any]) -> Callable[..., Value]:
    def apply(one: Any, other: Any) -> Any:
        if _is_truth(one) and _is_truth(other) and fn in (sympy.Eq, sympy.Ne):
            same = sympy.Not(sympy.Xor(one, other))
            return same if fn is sympy.Eq else sympy.Xor(one, other)
        return sympy.Or(
            *(
                sympy.And(c, d, _normal(fn(a, b)))
                for c, a in _cases(one)
                for d, b in _cases(other)
            )
        )

    return apply


def _normal(relation: Any) -> Any:
    """``0.5 * x < 8`` as ``x < 16``, so that equal comparisons are recognized."""
    if not isinstance(relation, Relational) or len(relation.free_symbols) != 1:
        return relation
    (x,) = relation.free_symbols
    gap = relation.lhs - relation.rhs
    slope = gap.diff(x)
    if not slope.is_number or slope == 0:
        return relation
    bound = -gap.subs(x, 0) / slope
    if bound == int(bound):
        bound = sympy.Integer(int(bound))
    kind = relation.func
    return kind(x, bound) if slope > 0 else kind(bound, x)


def _where(condition: Any, one: Any, other: Any) -> Value:
    condition = _truth(condition)
    one, other = _constant(one), _constant(other)
    if _is_truth(one) and _is_truth(other):
        return sympy.Or(
            sympy.And(condition, one), sympy.And(sympy.Not(condition), other)
        )
    return _proper(
        [(sympy.And(condition, c), e) for c, e in _cases(one)]
        + [(sympy.And(sympy.Not(condition), c), e) for c, e in _cases(other)]
    )


def _same(value: Any, *args: Any, **kwargs: Any) -> Value:
    return value


def _cast(value: Any, *args: Any, **kwargs: Any) -> Value:
    """Another type: a truth value becomes a number, and the other way round."""
    kinds = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
    if kinds and kinds[0] is torch.bool:
        return _truth(value)
    if kinds and kinds[0].is_floating_point and not isinstance(value, list):
        return _cases(value)
    if kinds and not kinds[0].is_floating_point:
        return _whole(value)
    return value


def _whole(value: Any, *args: Any) -> Value:
    cases = _cases(value)
    if not all(e.is_Integer for _, e in cases):
        raise NotSymbolic("a number is cut to an integer")
    return cases


class _Vector(tuple):
    """Values side by side."""


def _reduced(fn: Callable[..., Value]) -> Callable[..., Value]:
    def apply(value: Any, *args: Any, **kwargs: Any) -> Value:
        if not isinstance(value, _Vector):
            raise NotSymbolic("elements of one tensor are reduced")
        return functools.reduce(fn, value)

    return apply


def _either(less: bool) -> Callable[..., Value]:
    compare = _relation(operator.lt if less else operator.gt)

    def apply(one: Any, *others: Any) -> Value:
        for other in others:
            one = _where(compare(one, other), one, other)
        return one

    return apply


_and = lambda a, b: sympy.And(_truth(a), _truth(b))  # noqa: E731
_or = lambda a, b: sympy.Or(_truth(a), _truth(b))  # noqa: E731
_xor = lambda a, b: sympy.Xor(_truth(a), _truth(b))  # noqa: E731
_add = _numeric(operator.add)
_OPERATIONS: dict[str, Callable[..., Value]] = {
    **dict.fromkeys(["add", "radd"], _add),
    **dict.fromkeys(["mul", "rmul"], _numeric(operator.mul)),
    "sub": _numeric(operator.sub),
    "rsub": _numeric(lambda a, b: b - a),
    **dict.fromkeys(["div", "truediv", "true_divide"], _numeric(operator.truediv)),
    **dict.fromkeys(["rdiv", "rtruediv"], _numeric(lambda a, b: b / a)),
    "pow": _numeric(operator.pow),
    "rpow": _numeric(lambda a, b: b**a),
    **dict.fromkeys(["neg", "negative"], _numeric(operator.neg)),
    **dict.fromkeys(["remainder", "mod"], _numeric(sympy.Mod)),
    **dict.fromkeys(["abs", "absolute"], _numeric(sympy.Abs)),
    "square": _numeric(lambda a: a**2),
    "exp": _numeric(sympy.exp),
    "log": _numeric(sympy.log),
    "sqrt": _numeric(sympy.sqrt),
    "sin": _numeric(sympy.sin),
    "cos": _numeric(sympy.cos),
    "tanh": _numeric(sympy.tanh),
    "sigmoid": _numeric(lambda a: 1 / (1 + sympy.exp(-a))),
    "floor": _numeric(sympy.floor),
    **dict.fromkeys(["eq", "equal"], _relation(sympy.Eq)),
    **dict.fromkeys(["ne", "not_equal"], _relation(sympy.Ne)),
    **dict.fromkeys(["lt", "less"], _relation(operator.lt)),
    **dict.fromkeys(["le", "less_equal"], _relation(operator.le)),
    **dict.fromkeys(["gt", "greater"], _relation(operator.gt)),
    **dict.fromkeys(["ge", "greater_equal"], _relation(operator.ge)),
    **dict.fromkeys(["and", "rand", "bitwise_and", "logical_and"], _and),
    **dict.fromkeys(["or", "ror", "bitwise_or", "logical_or"], _or),
    **dict.fromkeys(["xor", "rxor", "bitwise_xor", "logical_xor"], _xor),
    **dict.fromkeys(
        ["invert", "bitwise_not", "logical_not"], lambda a: sympy.Not(_truth(a))
    ),
    "where": _where,
    "maximum": _either(False),
    "minimum": _either(True),
    **dict.fromkeys(["any"], _reduced(_or)),
    **dict.fromkeys(["all"], _reduced(_and)),
    "sum": _reduced(_add),
    **dict.fromkeys(["amax", "max"], _reduced(_either(False))),
    **dict.fromkeys(["amin", "min"], _reduced(_either(True))),
    **dict.fromkeys(["stack"], lambda parts, *a, **k: _Vector(map(_constant, parts))),
    **dict.fromkeys(
        [
            "clone",
            "contiguous",
            "detach",
            "expand",
            "expand_as",
            "reshape",
            "view",
            "view_as",
            "unsqueeze",
            "squeeze",
            "broadcast_to",
            "alias",
        ],
        _same,
    ),
    **dict.fromkeys(["to", "type"], _cast),
    **dict.fromkeys(["float", "double"], lambda a: _cases(a)),
    **dict.fromkeys(["int", "long"], _whole),
    "bool": _truth,
    "broadcast_tensors": lambda *parts: tuple(map(_constant, parts)),
}


def _limited(value: Value) -> Value:
    """A value that is not too long to be simplified."""
    parts = [p for c in value for p in c] if isinstance(value, list) else [value]
    count = 0
    for part in parts:
        if isinstance(part, sympy.Basic):
            for _ in sympy.preorder_traversal(part):
                count += 1
                if count > NODES:
                    raise NotSymbolic(f"more than {NODES} symbols")
    return value


def _apply(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Value:
    if function is part_of:
        return args[0][args[1]]
    name = getattr(function, "__name__", type(function).__name__).strip("_")
    operation = _OPERATIONS.get(name)
    if operation is None:
        raise NotSymbolic(name)
    if any(isinstance(a, _Vector) for a in args) and not name.startswith(
        ("any", "all", "sum", "amax", "amin", "max", "min")
    ):
        raise NotSymbolic(f"{name} of several values")
    try:
        return _limited(operation(*args, **kwargs))
    except (TypeError, AttributeError, ValueError) as error:
        raise NotSymbolic(f"{name}: {error}") from error


# And back


def evaluated(value: Value, values: Mapping[str, Tensor]) -> Tensor:
    """A symbolic value at some tensors, by name of the symbol."""
    if not isinstance(value, list):
        return torch.as_tensor(_tensor(value, values))
    result: Any = None
    for condition, expr in value:
        found = torch.as_tensor(_tensor(expr, values))
        if result is None:
            result = found
        else:
            result = torch.where(
                torch.as_tensor(_tensor(condition, values)), found, result
            )
    return result


_TORCH: dict[Any, Callable[..., Any]] = {
    sympy.Add: lambda *a: functools.reduce(operator.add, a),
    sympy.Mul: lambda *a: functools.reduce(operator.mul, a),
    sympy.Pow: operator.pow,
    sympy.Mod: operator.mod,
    sympy.Abs: torch.abs,
    sympy.exp: torch.exp,
    sympy.log: torch.log,
    sympy.sin: torch.sin,
    sympy.cos: torch.cos,
    sympy.tanh: torch.tanh,
    sympy.floor: torch.floor,
    sympy.And: lambda *a: functools.reduce(operator.and_, a),
    sympy.Or: lambda *a: functools.reduce(operator.or_, a),
    sympy.Xor: lambda *a: functools.reduce(operator.xor, a),
    sympy.Not: lambda a: ~a if isinstance(a, Tensor) else not a,
    sympy.Equality: operator.eq,
    sympy.Unequality: operator.ne,
    sympy.StrictLessThan: operator.lt,
    sympy.LessThan: operator.le,
    sympy.StrictGreaterThan: operator.gt,
    sympy.GreaterThan: operator.ge,
}


def _tensor(expr: Any, values: Mapping[str, Tensor]) -> Any:
    if expr in (sympy.true, sympy.false):
        return torch.tensor(expr == sympy.true)
    if isinstance(expr, sympy.Symbol):
        return values[expr.name]
    if expr.is_Number or expr.is_number:
        return int(expr) if expr.is_Integer else float(expr)
    made = _TORCH.get(expr.func)
    if made is None:
        raise NotSymbolic(str(expr.func))
    return made(*(_tensor(arg, values) for arg in expr.args))


class _Printer(StrPrinter):
    """As one would write it in a program."""

    def _print_Relational(self, expr: Any) -> str:  # noqa: N802
        sign = {sympy.Equality: "==", sympy.Unequality: "!="}
        shown = sign.get(type(expr), expr.rel_op)
        return f"{self._print(expr.lhs)} {shown} {self._print(expr.rhs)}"

    def _print_Mod(self, expr: Any) -> str:  # noqa: N802
        one, other = (self._print(a) for a in expr.args)
        return f"{one if expr.args[0].is_Atom else f'({one})'} % {other}"

    def _print_Not(self, expr: Any) -> str:  # noqa: N802
        inner = expr.args[0]
        shown = self._print(inner)
        grouped = isinstance(inner, (sympy.And, sympy.Or, Relational))
        return f"not ({shown})" if grouped else f"not {shown}"

    def _joined(self, expr: Any, word: str) -> str:
        parts = sorted(expr.args, key=lambda a: (not a.is_Symbol, str(a)))
        shown = [
            f"({self._print(a)})"
            if isinstance(a, (sympy.And, sympy.Or))
            else self._print(a)
            for a in parts
        ]
        return f" {word} ".join(shown)

    def _print_And(self, expr: Any) -> str:  # noqa: N802
        return self._joined(expr, "and")

    def _print_Or(self, expr: Any) -> str:  # noqa: N802
        return self._joined(expr, "or")

    def _print_Piecewise(self, expr: Any) -> str:  # noqa: N802
        parts = [
            self._print(e)
            if c == sympy.true
            else f"{self._print(e)} if {self._print(c)}"
            for e, c in expr.args
        ]
        return " else ".join(parts)

    def _print_Float(self, expr: Any) -> str:  # noqa: N802
        return f"{float(expr):.4g}"


def text(expr: Any) -> str:
    """An expression in one line."""
    return _Printer().doprint(expr)


def size(value: Value) -> int:
    """The number of operations of a value."""
    return int(sympy.count_ops(as_expr(value))) + len(
        value if isinstance(value, list) else ()
    )
