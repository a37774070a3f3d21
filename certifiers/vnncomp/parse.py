"""VNN-LIB 1.0 as the competition uses it: ``X_i`` in boxes, linear constraints on ``Y_j``, ``and`` and ``or`` at will.

Numbers are read exactly and rounded outward to float64: the boxes and polytopes are never smaller than the text says.
"""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import InputError
from .query import Box, Polytope, Property

#: A property may be multiplied out into at most so many conjunctions.
MOST_CLAUSES = 100_000

_TOKEN = re.compile(r"[()]|[^\s();]+")
_VARIABLE = re.compile(r"([XY])_(\d+)")
Expression = str | list  # a word, or a list of expressions
Variable = tuple[str, int]


class Constraint(NamedTuple):
    """``sum(terms) + constant <= 0``; a conjunction is a list of these, None stands for false."""

    terms: dict[Variable, Fraction]
    constant: Fraction


def read_property(path: str | Path) -> Property:
    """The property in a .vnnlib or .vnnlib.gz file; InputError if it cannot be read, naming what and where."""
    path = Path(path)
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        text = content.decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"The property {path} cannot be read ({error}). Give a .vnnlib or .vnnlib.gz file.") from error
    return parse_property(text, str(path))


def parse_property(text: str, name: str = "the property") -> Property:
    """The property that a VNN-LIB text asks about; ``name`` is for messages.

    Raises InputError for what is not VNN-LIB 1.0, for a constraint that is not linear, strict, or about several
    inputs or inputs and outputs at once, and for an input without bounds.
    """
    sizes = {"X": 0, "Y": 0}
    always: list[Constraint] = []
    choices: list[list[list[Constraint]]] = []
    try:
        for statement in _statements(text):
            word = statement[0] if isinstance(statement, list) and statement else statement
            if word == "declare-const" and len(statement) == 3:
                kind, number = _variable(statement[1])
                sizes[kind] = max(sizes[kind], number + 1)
            elif word == "assert" and len(statement) == 2:
                clauses = _clauses(statement[1])
                always.extend(clauses[0]) if len(clauses) == 1 else choices.append(clauses)
            else:
                raise InputError(f"{_text(statement)} is neither a declare-const nor an assert")
        return Property(sizes["X"], sizes["Y"], tuple(_boxes(sizes, always, choices)))
    except InputError as error:
        raise InputError(
            f"{name} is not a property that can be read: {error}. Expected is VNN-LIB 1.0: declare-const of X_0, X_1, "
            "... and Y_0, ..., bounds of each X, linear constraints on the Y, joined by and, or."
        ) from None


def _statements(text: str) -> Iterator[Expression]:
    """The s-expressions of a text, comments left out."""
    stack: list[list] = []
    for line in text.splitlines():
        for token in _TOKEN.findall(line.partition(";")[0]):
            if token == "(":
                stack.append([])
                continue
            if token == ")":
                if not stack:
                    raise InputError("there is a ) too many")
                found: Expression = stack.pop()
            else:
                found = token
            if stack:
                stack[-1].append(found)
            else:
                yield found
    if stack:
        raise InputError(f"{len(stack)} ( are never closed")


def _clauses(formula: Expression) -> list[list[Constraint]]:
    """The formula as a disjunction of conjunctions."""
    if formula in ("true", "false"):
        return [[]] if formula == "true" else []
    if not isinstance(formula, list) or not formula:
        raise InputError(f"{_text(formula)} is no constraint")
    word, *parts = formula
    if word == "or":
        return _limited([clause for part in parts for clause in _clauses(part)])
    if word == "and":
        return _joined([_clauses(part) for part in parts])
    if word in ("<=", ">=", "=", "==") and len(parts) == 2:
        left, right = (_linear(part) for part in parts)
        least = [_difference(left, right)] if word != ">=" else []
        return [least + ([_difference(right, left)] if word != "<=" else [])]
    raise InputError(f"{_text(formula)} is not understood (known are and, or, <=, >=, =)")


def _joined(parts: list[list[list[Constraint]]]) -> list[list[Constraint]]:
    """The conjunction of several disjunctions, multiplied out."""
    if math.prod(map(len, parts)) > MOST_CLAUSES:
        _limited([[]] * (MOST_CLAUSES + 1))
    return [[constraint for clause in chosen for constraint in clause] for chosen in product(*parts)]


def _limited(clauses: list) -> list:
    if len(clauses) > MOST_CLAUSES:
        raise InputError(f"multiplied out it has more than {MOST_CLAUSES} conjunctions; split it into several files")
    return clauses


def _linear(expression: Expression) -> Constraint:
    """A linear term, as ``sum(terms) + constant``."""
    if isinstance(expression, str):
        if _VARIABLE.fullmatch(expression):
            return Constraint({_variable(expression): Fraction(1)}, Fraction(0))
        try:
            value = Fraction(expression)
            float(value)  # not above what a float can hold
            return Constraint({}, value)
        except (ValueError, ZeroDivisionError, OverflowError):
            raise InputError(f"{expression!r} is neither a number nor X_i or Y_j") from None
    word, *parts = expression or [""]
    values = [_linear(part) for part in parts]
    if word == "+" and values:
        return _sum(values)
    if word == "-" and values:
        return _times(values[0], Fraction(-1)) if len(values) == 1 else _difference(values[0], _sum(values[1:]))
    if word == "*" and values:
        factors, rest = [v for v in values if not v.terms], [v for v in values if v.terms]
        if len(rest) <= 1:
            factor = Fraction(math.prod(v.constant for v in factors))
            return _times(rest[0], factor) if rest else Constraint({}, factor)
    raise InputError(f"{_text(expression)} is not linear in the X and Y")


def _sum(values: list[Constraint]) -> Constraint:
    terms: dict[Variable, Fraction] = {}
    for value in values:
        for variable, factor in value.terms.items():
            terms[variable] = terms.get(variable, Fraction(0)) + factor
    return Constraint({v: f for v, f in terms.items() if f}, sum((v.constant for v in values), Fraction(0)))


def _times(value: Constraint, factor: Fraction) -> Constraint:
    return Constraint({v: f * factor for v, f in value.terms.items() if factor}, value.constant * factor)


def _difference(left: Constraint, right: Constraint) -> Constraint:
    return _sum([left, _times(right, Fraction(-1))])


def _variable(name: Expression) -> Variable:
    match = _VARIABLE.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise InputError(f"{_text(name)} is no variable X_i or Y_j")
    return match[1], int(match[2])


def _boxes(sizes: dict[str, int], always: list[Constraint], choices: list) -> Iterator[Box]:
    """Boxes of inputs with what is forbidden there; conjunctions of one box come together."""
    if not sizes["X"] or not sizes["Y"]:
        raise InputError("it declares no X or no Y")
    shared = _Bounds(sizes, always)
    if shared.impossible:
        return
    found: dict[tuple, tuple[_Bounds, list[Polytope]]] = {}
    for clause in _joined(choices):
        bounds = _Bounds(sizes, clause, shared) if clause else shared
        if not bounds.impossible:
            found.setdefault(bounds.key(), (bounds, []))[1].append(bounds.polytope())
    for bounds, polytopes in found.values():
        for number in range(sizes["X"]):
            if number not in bounds.lower or number not in bounds.upper:
                raise InputError(f"X_{number} has no {'lower' if number not in bounds.lower else 'upper'} bound")
        lower = torch.tensor([_outward(bounds.lower[i], -1) for i in range(sizes["X"])], dtype=torch.float64)
        upper = torch.tensor([_outward(bounds.upper[i], 1) for i in range(sizes["X"])], dtype=torch.float64)
        yield Box(lower, upper, tuple(polytopes))


class _Bounds:
    """The bounds of inputs and the rows on outputs of one conjunction, on top of those that always hold."""

    def __init__(self, sizes: dict[str, int], clause: list[Constraint], shared: _Bounds | None = None) -> None:
        self.sizes = sizes
        self.impossible = False
        self.rows: list[Constraint] = [] if shared is None else list(shared.rows)
        fresh = any(variable[0] == "X" for constraint in clause for variable in constraint.terms)
        self.lower: dict[int, Fraction] = {} if shared is None else dict(shared.lower) if fresh else shared.lower
        self.upper: dict[int, Fraction] = {} if shared is None else dict(shared.upper) if fresh else shared.upper
        self._key = None if fresh or shared is None else shared.key()
        for constraint in clause:
            self._add(constraint)
        if fresh or shared is None:
            self.impossible |= any(v > self.upper[i] for i, v in self.lower.items() if i in self.upper)

    def _add(self, constraint: Constraint) -> None:
        kinds = {kind for kind, _ in constraint.terms}
        for kind, number in constraint.terms:
            if number >= self.sizes[kind]:
                raise InputError(f"{kind}_{number} is used but not declared")
        if not kinds:
            self.impossible |= constraint.constant > 0
        elif kinds == {"Y"}:
            self.rows.append(constraint)
        elif len(constraint.terms) > 1:
            raise InputError(
                "a constraint joins several inputs, or inputs with outputs; only boxes of inputs are known"
            )
        else:
            (((_, number), factor),) = constraint.terms.items()
            value = -constraint.constant / factor
            if factor > 0:
                self.upper[number] = min(value, self.upper.get(number, value))
            else:
                self.lower[number] = max(value, self.lower.get(number, value))

    def key(self) -> tuple:
        if self._key is None:
            self._key = (tuple(sorted(self.lower.items())), tuple(sorted(self.upper.items())))
        return self._key

    def polytope(self) -> Polytope:
        a = torch.zeros(max(len(self.rows), 1), self.sizes["Y"], dtype=torch.float64)
        b = torch.zeros(len(a), dtype=torch.float64)
        for place, row in enumerate(map(_within_floats, self.rows)):
            b[place] = _outward(-row.constant, 1)
            for (_, number), factor in row.terms.items():
                a[place, number] = float(factor)
        return Polytope(a, b)


def _within_floats(row: Constraint) -> Constraint:
    """The same constraint, its largest factor 1 where a float would lose it."""
    largest = max(map(abs, row.terms.values()))
    return row if 1e-100 <= largest <= 1e100 else _times(row, 1 / largest)


def _outward(value: Fraction, sign: int) -> float:
    """The nearest float that is not below (``sign`` 1) or not above (-1) ``value``."""
    try:
        near = float(value)
    except OverflowError:
        raise InputError("a constraint comes to a bound that is too large for a float") from None
    wrong = Fraction(near) < value if sign > 0 else Fraction(near) > value
    return math.nextafter(near, math.inf * sign) if wrong else near


def _text(expression: Expression) -> str:
    text = expression if isinstance(expression, str) else f"({' '.join(map(_text, expression))})"
    return text if len(text) <= 80 else f"{text[:77]}..."
