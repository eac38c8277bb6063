"""Bodies: what the requests of all APIs have in common.

Editors send fields of other servers, and null for what they don't need. So a null is as good as absent, and a key that
nobody knows is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Body(BaseModel):
    """A request's JSON."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Strings = Annotated[list[str], BeforeValidator(_listed)]
"""One text, or a list of them."""
Ids = list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]]
Prompts = str | list[str] | Ids | list[Ids]
"""A text, texts, ids, or lists of ids."""


def each_prompt(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts one by one. ValueError where there is none."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise ValueError("there is no prompt: give at least one")
    if all(isinstance(one, int) for one in given):
        return [[int(one) for one in given if isinstance(one, int)]]
    return [one for one in given if not isinstance(one, int)]


def top_k_of(value: int | None) -> int | None:
    """0 and -1 are other servers' words for none."""
    return None if value is None or value in (0, -1) else value


def bias_of(biases: Mapping[str, float] | None) -> dict[int, float] | None:
    """JSON's keys are texts. ValueError for one that is no id."""
    found: dict[int, float] = {}
    for key, bias in (biases or {}).items():
        if not key.isascii() or not key.isdigit() or not math.isfinite(bias):
            raise ValueError(f"logit_bias has {key!r:.40}: {bias}; give a token's id, and a number")
        found[int(key)] = bias
    return found or None
