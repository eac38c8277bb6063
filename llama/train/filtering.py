"""What of a package reads like a program: every file gets the first reason that it should be left out, or none.

A model this small has no room for text that teaches nothing. So a file is dropped if a tool wrote it or it is mostly a
table, if it is a copy of another package or under that one's licence, or if it isn't Python in ASCII letters for the
most part. Each reason is a line of one table, with the predicate that decides it. Test suites are more than half of
some packages and would teach little else than assertions, so they get a modest share of each.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache

from llama.train.corpus import LONGEST_TABLE, TEST_SHARE, Source, stable_hash

SHORTEST, LONGEST = 200, 600_000
"""Characters of a file: below are empty packages' first lines, above (in practice) tables in disguise."""
LONGEST_LINE, LONGEST_MEAN_LINE = 1000, 90
NON_ASCII = 0.02
"""The part of a file's characters: above, it is text in another language, a table of names, or art."""
DIGITS = 0.12
"""The part of a file's characters that are no white space."""
ALL_TABLES = 0.5
"""The part of a file's lines that its tables may take together; for a single one corpus.py has the bound."""
FEWEST_DISTINCT_LINES = 0.35
"""The part of a file's lines that no earlier line equals."""
TESTS = "tests beyond their share"

_HEAD = 2500
"""The characters in which a file says where it comes from."""
_COPIES = {"vendor", "vendored", "third_party", "thirdparty", "extern", "externals", "bundled"}
_GENERATED = re.compile(
    r"do not (?:edit|modify|change) (?:this|it|by hand|manually|directly)|do not edit\b|auto-?\s?generated|"
    r"automatically generated|@generated|generated automatically|machine generated|"
    r"(?:#|file|code|module|classes|stubs?|bindings?|parser)\s+(?:was|were|is|are|has been)?\s*generated\s"
    r"(?:by|from|with|using|on|at)\b",
    re.IGNORECASE,
)
_GENERATED_NAMES = re.compile(r"(_pb2|_pb2_grpc|/_version|/versioneer|/parsetab|/lextab)\.py$|migrations/")
_OTHER_LICENCE = re.compile(
    r"GNU (?:Lesser |Affero |Library )*General Public|\b[AL]?GPL(?:v?\d|\b)|Mozilla Public License|"
    r"Creative Commons|Common Public License|Eclipse Public License"
)


def fault(source: Source) -> str | None:
    """The first reason why a file should be left out, or None."""
    return next((reason for reason, is_so in FAULTS.items() if is_so(source)), None)


def choose(sources: Iterable[Source]) -> tuple[list[Source], list[tuple[Source, str]]]:
    """What to keep of a package, by path, and what not, with its reason. At most `TEST_SHARE` of it are tests."""
    kept: list[Source] = []
    dropped: list[tuple[Source, str]] = []
    tests: list[Source] = []
    for source in sources:
        if is_test(source):
            tests.append(source)
        elif reason := fault(source):
            dropped.append((source, reason))
        else:
            kept.append(source)
    room = int(TEST_SHARE / (1 - TEST_SHARE) * sum(len(source.text) for source in kept))
    for source in sorted(tests, key=lambda source: stable_hash(source.path)):
        # A suite larger than what is left is passed over, so that the share is a bound.
        reason = TESTS if len(source.text) > room else fault(source)
        if reason:
            dropped.append((source, reason))
        else:
            kept.append(source)
            room -= len(source.text)
    return sorted(kept, key=lambda source: source.path), dropped


def is_test(source: Source) -> bool:
    """Besides the standard library's habits, those of others: `model_test.py`, `tests.py`, `conftest.py`."""
    name = source.path.rpartition("/")[2]
    return source.is_test or name.endswith(("_test.py", "_tests.py")) or name in ("tests.py", "conftest.py")


def _is_copy(source: Source) -> bool:
    return any(folder.lstrip("_") in _COPIES for folder in source.path.lower().split("/")[:-1])


def _is_generated(source: Source) -> bool:
    return bool(_GENERATED_NAMES.search(source.path) or _GENERATED.search(source.text[:_HEAD]))


def _has_long_lines(source: Source) -> bool:
    lines = source.text.splitlines() or [""]
    return max(map(len, lines)) > LONGEST_LINE or len(source.text) > LONGEST_MEAN_LINE * len(lines)


def _is_foreign(source: Source) -> bool:
    return not source.text.isascii() and sum(not c.isascii() for c in source.text) > NON_ASCII * len(source.text)


def _is_numbers(source: Source) -> bool:
    white = sum(map(source.text.count, " \n\t"))
    return sum(map(source.text.count, "0123456789")) > DIGITS * (len(source.text) - white)


def _repeats_itself(source: Source) -> bool:
    lines = [line.strip() for line in source.text.splitlines()]
    # A lone bracket or keyword is in every file many times over.
    telling = [line for line in lines if len(line) > 8]
    return len(telling) > 50 and len(set(telling)) < FEWEST_DISTINCT_LINES * len(telling)


def _has_no_code(source: Source) -> bool:
    """Whether there is nothing but comments, and perhaps a docstring."""
    tree = parse(source.text)
    assert tree is not None, "files that don't parse are dropped before"
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in tree.body)


def _is_table(source: Source) -> bool:
    tree = parse(source.text)
    assert tree is not None, "files that don't parse are dropped before"
    sizes = [0]
    in_classes = [node for outer in tree.body if isinstance(outer, ast.ClassDef) for node in outer.body]
    for node in tree.body + in_classes:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, _TABLES):
            sizes.append((node.end_lineno or node.lineno) - node.lineno + 1)
    lines = source.text.count("\n")
    return max(sizes) > LONGEST_TABLE * lines or sum(sizes) > ALL_TABLES * lines


_TABLES = (ast.Dict, ast.List, ast.Tuple, ast.Set, ast.Constant)
"""A constant of many lines is a text that the file carries along."""


@lru_cache(maxsize=1)
def parse(text: str) -> ast.Module | None:
    """The tree, or None; by the grammar of the oldest Python we run on, so that the corpus is the same on a newer."""
    try:
        with warnings.catch_warnings():
            # Old code draws warnings about its escapes when it is parsed; they are no business of the reader's.
            warnings.simplefilter("ignore")
            return ast.parse(text, feature_version=(3, 10))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


FAULTS: dict[str, Callable[[Source], bool]] = {
    "copy of another package": _is_copy,
    "too short": lambda source: len(source.text) < SHORTEST,
    "too long": lambda source: len(source.text) > LONGEST,
    "generated": _is_generated,
    "another licence": lambda source: bool(_OTHER_LICENCE.search(source.text[:_HEAD])),
    "long lines": _has_long_lines,
    "not ASCII": _is_foreign,
    "numbers": _is_numbers,
    "repeats itself": _repeats_itself,
    "does not parse": lambda source: parse(source.text) is None,
    "no code": _has_no_code,
    "a table": _is_table,
}
"""Reasons to leave a file out, quick ones first."""
