"""Patterns from their printed form, for configurations and command lines."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from typing import Any

from sparse_flax.attention.patterns import PATTERNS, Pattern


def parse(text: str) -> tuple[Pattern, ...]:
    """Read one pattern, or a comma-separated cycle of them, from its printed form.

    >>> parse("Columns(96), Local(96)")
    (Columns(stride=96), Local(window=96))

    Raises ValueError, in a sentence, for anything else; it evaluates no code.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(
            f"pattern {text!r} is not readable; write it as in 'Fixed(128, 32)' or "
            "'Columns(96), Local(96)'"
        ) from None
    value = _build(tree, text)
    patterns = value if isinstance(value, tuple) else (value,)
    for pattern in patterns:
        if not isinstance(pattern, Pattern):
            raise ValueError(
                f"pattern {text!r} holds {pattern!r}, which is no pattern; write it as "
                "in 'Fixed(128, 32)'"
            )
    if not patterns:
        raise ValueError("pattern '()' is empty; write it as in 'Fixed(128, 32)'")
    return patterns


def _build(node: ast.AST, text: str) -> Any:
    """Build constants, tuples and calls of patterns; nothing else exists here."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _build(node.operand, text)
        if isinstance(number, int | float):
            return -number  # whose pattern says what it may be
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_build(item, text) for item in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        if name not in PATTERNS:
            near = difflib.get_close_matches(name, PATTERNS, 1, 0) or ["Fixed"]
            raise ValueError(
                f"pattern {name!r} is none of {', '.join(PATTERNS)}; did you mean "
                f"{near[0]!r}?"
            )
        args = [_build(arg, text) for arg in node.args]
        kwargs = {k.arg: _build(k.value, text) for k in node.keywords if k.arg}
        if len(kwargs) < len(node.keywords):
            raise ValueError(
                f"pattern {ast.unparse(node)} must name each argument of "
                f"{_signature(name)} once"
            )
        try:
            return PATTERNS[name](*args, **kwargs)
        except TypeError:
            raise ValueError(
                f"pattern {ast.unparse(node)} does not fit {_signature(name)}"
            ) from None
    if isinstance(node, ast.Name) and node.id in PATTERNS:
        raise ValueError(
            f"pattern {node.id!r} lacks its arguments: {_signature(node.id)}"
        )
    raise ValueError(
        f"pattern {text!r} may hold patterns, numbers, True and False only, not "
        f"{ast.unparse(node)!r}"
    )


def _signature(name: str) -> str:
    """Write how a pattern is called, as 'Strided(stride)'."""
    return f"{name}({', '.join(f.name for f in dataclasses.fields(PATTERNS[name]))})"
