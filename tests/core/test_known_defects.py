"""The index of what the published code got wrong: each row is guarded by tests that bear its name.

D1 to D14 gave wrong results, P1 to P9 cost time or memory, and "process" is what it did to the process around it. To
see the tests of a row, run `pytest -k d5`; to change what a row says, change the test that is named after it. A name
alone guards nothing: a test that is empty, is skipped, or asserts nothing is found here by its source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

KNOWN = {
    "d1": "log-probabilities of generated tokens are all -0.0",
    "d2": "with nothing to write, nothing is scored",
    "d3": "an eos inside the prompt cuts the echo",
    "d4": "infilling and turns don't end at eos",
    "d5": "a completion loses a leading space",
    "d6": "several tokens at a position above 0 fail",
    "d7": "a wrong state dict loads silently",
    "d8": "the tokenizer's vocabulary replaces the checkpoint's",
    "d9": "a mark in user text becomes the special id",
    "d10": "a dialog with special tags still runs the model",
    "d11": "a dialog that can't be one raises IndexError",
    "d12": "the turn format depends on the history's destinations",
    "d13": "arguments that can't be are accepted, or fail obscurely",
    "d14": "a row's draws depend on its batch mates",
    "p1": "prefill goes token by token beyond the shortest prompt",
    "p2": "an n x n mask on the host",
    "p3": "scores of all positions at once, in two precisions",
    "p4": "the cache is copied for grouped heads",
    "p5": "logits of every position of the prompt",
    "p6": "the cache is moved and cast at every step",
    "p7": "weights are read whole beside a second model",
    "p8": "a wait for the device for each row and token; finished rows go on",
    "p9": "the vocabulary is sorted at every step",
    "process": "defaults, stdout and the like are changed",
}


Function = ast.FunctionDef | ast.AsyncFunctionDef
ASSERTING = ("pytest.raises", "pytest.warns", "pytest.fail", "torch.testing.", "numpy.testing.", "np.testing.")
SKIPPING = ("pytest.skip", "pytest.xfail", "pytest.mark.skip", "pytest.mark.xfail")


class File:
    """The source of a test file: its tests, and what is wrong with one."""

    def __init__(self, source: str) -> None:
        self.body = ast.parse(source).body
        self.functions = {node.name: node for node in self.body if isinstance(node, Function)}

    def tests(self) -> Iterator[Function]:
        """Of the file, and of its classes; two of one name, of which pytest runs the last, too."""
        for node in self.body:
            inner = node.body if isinstance(node, ast.ClassDef) else [node]
            yield from (f for f in inner if isinstance(f, Function) and f.name.startswith("test_"))

    def fault(self, test: Function) -> str | None:
        """Why a test guards nothing; None where it does, as far as its source tells."""
        marks = [node.value for node in self.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)]
        if any(map(_skips, [*test.decorator_list, *marks])):
            return "is skipped, or may fail"
        for node in test.body:
            if isinstance(node, ast.Return) or (isinstance(node, ast.Expr) and _skips(node.value)):
                return "ends before it asserts anything"
            if self._asserts(node, {test.name}):
                return None
        return "asserts nothing"

    def _asserts(self, node: ast.AST, seen: set[str]) -> bool:
        """Whether a piece of a function asserts, or calls a function of the test files that does."""
        if isinstance(node, ast.Assert):
            return not isinstance(node.test, ast.Constant)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant):
            return any(self._asserts(child, seen) for child in (node.body if node.test.value else node.orelse))
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.startswith(ASSERTING):
                return True
            # Also a function that is passed to another, as the ranks' work is.
            for name in {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} - seen:
                where = self if name in self.functions else self._imported().get(name)
                body = where.functions[name].body if where is not None and name in where.functions else []
                if where is not None and any(where._asserts(child, {*seen, name}) for child in body):
                    return True
        return any(self._asserts(child, seen) for child in ast.iter_child_nodes(node))

    def _imported(self) -> dict[str, File]:
        """The files of the names that are imported from other test files."""
        found = {}
        for node in self.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                path = TESTS.joinpath(*node.module.split(".")).with_suffix(".py")
                if path.is_file():
                    found |= {alias.asname or alias.name: _file(path) for alias in node.names}
        return found


@cache
def _file(path: Path) -> File:
    return File(path.read_text(encoding="utf-8"))


def _skips(node: ast.expr) -> bool:
    """Whether a decorator, a mark or a statement skips a test, or lets it fail, wherever it runs."""
    for part in node.elts if isinstance(node, ast.List | ast.Tuple) else [node]:
        written = ast.unparse(part)
        if written.startswith("pytest.mark.skipif"):  # a condition of the machine is none of ours
            if isinstance(part, ast.Call) and part.args and isinstance(part.args[0], ast.Constant):
                return bool(part.args[0].value)
        elif written.startswith(SKIPPING):
            return True
    return False


@pytest.fixture(scope="module")
def guards() -> list[tuple[Path, File, Function]]:
    """All tests in the source of all test files."""
    files = [(path, _file(path)) for path in sorted(TESTS.rglob("test_*.py"))]
    return [(path, file, test) for path, file in files for test in file.tests()]


@pytest.mark.parametrize("row", KNOWN)
def test_each_known_defect_has_a_test_of_its_name_that_can_fail(
    row: str, guards: list[tuple[Path, File, Function]]
) -> None:
    own = [(path, file, test) for path, file, test in guards if f"_{row}_" in test.name]
    assert own, f"no test guards {row.upper()}: {KNOWN[row]}"
    for path, file, test in own:
        assert file.fault(test) is None, f"{path}: {test.name} {file.fault(test)}, so it does not guard {row.upper()}"


def fault(source: str) -> str | None:
    file = File("import pytest\n" + source)
    return file.fault(next(file.tests()))


@pytest.mark.parametrize(
    "source",
    [
        "def test_it(): pass",
        "def test_it(): ...",
        "def test_it():\n    'It is said here alone.'",
        "def test_it(): assert True",
        "def test_it():\n    if False:\n        assert f() == 1",
        "def test_it(): print(f() == 1)",
        "def test_it():\n    f() == 1",
        "def test_it(): helper()\ndef helper(): return 1",
        "def test_it(): test_it()",
        "def test_it(): a()\ndef a(): b()\ndef b(): a()",
        "def test_it():\n    return\n    assert f() == 1",
        "def test_it():\n    pytest.skip('later')\n    assert f() == 1",
        "def test_it():\n    f()\n    pytest.xfail('it does')\n    assert f() == 1",
        "@pytest.mark.skip\ndef test_it(): assert f() == 1",
        "@pytest.mark.skip(reason='later')\ndef test_it(): assert f() == 1",
        "@pytest.mark.xfail(strict=False)\ndef test_it(): assert f() == 1",
        "@pytest.mark.skipif(True, reason='later')\ndef test_it(): assert f() == 1",
        "pytestmark = pytest.mark.skip\ndef test_it(): assert f() == 1",
        "pytestmark = [pytest.mark.slow, pytest.mark.xfail]\ndef test_it(): assert f() == 1",
        "class TestIt:\n    def test_it(self): pass",
        "async def test_it(): pass",
    ],
)
def test_a_test_that_cannot_fail_is_found(source: str) -> None:
    assert fault(source) is not None


@pytest.mark.parametrize(
    "source",
    [
        "def test_it(): assert f() == 1",
        "def test_it():\n    with pytest.raises(ValueError): f()",
        "def test_it():\n    with pytest.warns(UserWarning): f()",
        "def test_it():\n    for i in range(3):\n        torch.testing.assert_close(f(i), i)",
        "def test_it():\n    if not f(): pytest.fail('it is')",
        "def test_it(): helper(f())\ndef helper(x): assert x == 1",
        "def test_it(): a()\ndef a(): b()\ndef b(): assert f() == 1",
        "def test_it(): on_ranks(work, 2)\ndef work(): assert f() == 1",
        "def test_it():\n    def work(): assert f() == 1\n    work()",
        "@pytest.mark.parametrize('x', [1])\ndef test_it(x): assert f() == x",
        "@pytest.mark.skipif(sys.platform != 'linux', reason='/proc')\ndef test_it(): assert f() == 1",
        "def test_it():\n    if not cuda(): pytest.skip('no GPU')\n    assert f() == 1",
        "def test_it():\n    assert f() == 1\n    pytest.skip('the rest')",
        "class TestIt:\n    def test_it(self): assert f() == 1",
    ],
)
def test_a_test_that_can_fail_is_none_of_them(source: str) -> None:
    assert fault(source) is None


def test_functions_of_other_test_files_are_looked_into() -> None:
    calls = "from core.test_known_defects import {name}\ndef test_it(): {name}('def test_it(): pass')"
    assert fault(calls.format(name="test_a_test_that_cannot_fail_is_found")) is None
    assert fault(calls.format(name="fault")) is not None
