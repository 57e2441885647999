"""The formula of a `multi` grader: arithmetic over the scores of its graders, and nothing else."""

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping

MAX_LENGTH = 500

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, tuple[Callable[..., float], int | None]] = {  # and how many arguments, if that is fixed
    "min": (min, None),
    "max": (max, None),
    "abs": (abs, 1),
    "floor": (math.floor, 1),
    "ceil": (math.ceil, 1),
    "exp": (math.exp, 1),
    "sqrt": (math.sqrt, 1),
    "log": (math.log, 1),
}


def check(formula: str, names: Collection[str]) -> None:
    """Raises ValueError for what is no formula over these names."""
    for node in ast.walk(_parsed(formula)):
        match node:
            case ast.Name(id=name) if name not in names and name not in _FUNCTIONS:
                raise ValueError(f"must name its graders ({', '.join(sorted(names))}), not {name!r}")
    evaluate(formula, dict.fromkeys(names, 0.5), lenient=True)


def evaluate(formula: str, scores: Mapping[str, float], *, lenient: bool = False) -> float:
    """Its value. Raises ValueError: it is none, or a division by zero, a root of a negative number, a number without end.

    `lenient` takes arithmetic that fails for nan.
    """
    try:
        value = _value(_parsed(formula).body, scores)
    except (ArithmeticError, ValueError) as error:
        if lenient and not isinstance(error, _Unreadable):
            return math.nan
        raise ValueError(str(error)) from None
    if not math.isfinite(value) and not lenient:
        raise ValueError("the formula's value is not a finite number")
    return value


class _Unreadable(ValueError):
    pass


def _parsed(formula: str) -> ast.Expression:
    if len(formula) > MAX_LENGTH:
        raise _Unreadable(f"must be at most {MAX_LENGTH} characters long")
    try:
        return ast.parse(formula.strip().replace("^", "**"), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _Unreadable("must be a formula such as 0.5 * first + 0.5 * second") from None


def _value(node: ast.expr, scores: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.Name(id=name) if name in scores:
            return scores[name]
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(left, scores), _value(right, scores))
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _OPERATORS:
            return _OPERATORS[type(sign)](_value(operand, scores))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments, keywords=[]) if name in _FUNCTIONS:
            function, count = _FUNCTIONS[name]
            if count is not None and len(arguments) != count:
                raise _Unreadable(f"must give {name} {count} argument")
            values = [_value(argument, scores) for argument in arguments]
            return float(function(values) if count is None else function(*values))
        case _:
            raise _Unreadable(f"must hold numbers, graders, + - * / ^ and {', '.join(_FUNCTIONS)} only")
