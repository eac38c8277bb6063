"""What people pass: numbers of any kind, one text where a list is wanted, lists that are iterators.

A number is checked before it is used, and the message says what was given and what is allowed. Nothing here knows what
a Llama is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, cast

Range = tuple[type[int] | type[float], str, float, float]
"""The values that a number may have: its kind, "at least" or "above", the lowest, the highest."""
Stop = str | int | Iterable[str | int] | None
"""What ends an answer besides its own end: strings, wherever they fall among the tokens, and token ids."""


def checked(name: str, value: Any, allowed: Range) -> Any:
    """`value` as an int or a float. ValueError, which calls it `name`, where it is anything else or out of range.

    256.0 is 256, since JSON has one kind of number; a string, a bool or null is no number.
    """
    kind, bound, low, high = allowed
    inside = isinstance(value, Real) and not isinstance(value, bool) and low <= cast(float, value) <= high
    if not inside or (bound == "above" and value == low) or (kind is int and value != int(value)):
        number = "whole number" if kind is int else "number"
        raise ValueError(f"{name} is {value!r:.80}; give a {number}, {bound} {low} and at most {high}")
    return kind(value)


def listed(name: str, values: Iterable[Any], each: type | None = None) -> list[Any]:
    """What is iterated over once. ValueError for a single text, whose letters would be taken one by one, and for items
    that are not of the type `each`."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r:.80}; give a list")
    found = list(values)
    for i, value in enumerate(found):
        if each is not None and not isinstance(value, each):
            raise ValueError(f"{name} {i} is {value!r:.80}; give a list of texts")
    return found


def stops(stop: Stop) -> tuple[str | int, ...]:
    """Whatever is said of `stop`, as strings and ids."""
    given = (stop,) if isinstance(stop, (str, bytes)) or not isinstance(stop, Iterable) else stop
    ends: list[str | int] = []
    for s in given if stop is not None else ():
        if not isinstance(s, (str, Integral)):
            raise ValueError(f"stop has {s!r:.80}; give a text, a token's id, or a list of such")
        ends.append(s if isinstance(s, str) else int(s))
    return tuple(ends)
