"""The rules of the house that a program can check: who imports whom, fairscale in one place, how long things are."""

from __future__ import annotations

import ast
import io
import re
import runpy
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llama
from llama.checkpoint import FORMATS

PACKAGE = Path(__file__).parents[2] / "llama"
ROOT = PACKAGE.parent
READING_ORDER = [
    "arguments",
    "errors",
    "system",
    "control",
    "config",
    "rope",
    "cache",
    "parallel",
    "model",
    "tokenizer",
    "prompts",
    "sampling",
    "checkpoint",
    "lookup",
    "requests",
    "decoding",
    "generation",
    "options",
    "front",
    "verbs",
    "terminal",
    "writers",
    "chat",
    "cli",
    "__main__",
]
WORDS = {"options", "front", "verbs", "terminal", "writers", "chat", "cli", "__main__"}
"""What turns words into objects, and answers at a terminal. These alone may import a room, and their own libraries."""
EDGES = {"arguments", "errors", "system", "control"} | WORDS
"""Files and memory, ranks that die, words: what a program needs besides, from which nothing is learned about a
Llama."""
RUN_TIME = {"torch", "sentencepiece", "fairscale", "fire", "numpy", "tqdm", "llama"} | set(sys.stdlib_module_names)
RUN_TIME |= {"typing_extensions"}  # what types need, and PyTorch brings
OF_WORDS = {"tyro", "prompt_toolkit"}
CORE = [PACKAGE / f"{name}.py" for name in READING_ORDER]
LEANS_ON = {
    "longcontext": {"evals"},
    "quantize": {"evals", "kernels"},
    "bench": {"evals"},
    "serve": {"evals"},
    "train": {"evals"},
    "fast": {"kernels"},
}
"""Rooms that measure build on the one that knows how: its intervals, sources and records. Those that multiply build on
the one with the kernels. Both build on none."""
ROOMS = sorted(folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file())
ROOM_NAMES = {room.name for room in ROOMS}


def imports(path: Path) -> Iterator[str]:
    """Full dotted names of all that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def lines_of_code(path: Path) -> set[int]:
    """Line numbers that hold code: not blank, not a comment, not a docstring."""
    source = path.read_text(encoding="utf-8")
    prose: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            code |= set(range(token.start[0], token.end[0] + 1))
    return code - prose


def test_reading_order_lists_every_core_file() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*READING_ORDER, "__init__"}


@pytest.mark.parametrize("name", READING_ORDER)
def test_core_imports_only_what_stands_above_it(name: str) -> None:
    above = set(READING_ORDER[: READING_ORDER.index(name)])
    for imported in imports(PACKAGE / f"{name}.py"):
        top, _, rest = imported.partition(".")
        allowed = RUN_TIME | {"__future__"} | (OF_WORDS if name in WORDS else set())
        assert top in allowed, f"{name}.py imports {imported}, which the core may not need"
        room = rest.split(".")[0] in ROOM_NAMES and name in WORDS
        if top == "llama" and not room and rest != "__version__":
            assert rest.split(".")[0] in above, f"{name}.py imports {imported}, which stands below it"


def roads_to_rooms(source: str) -> list[str]:
    """Whatever in a file could lead to a room without an import statement: its name in a string, and calls that import
    by a name. Docstrings lead nowhere."""
    tree = ast.parse(source)
    prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    rooms = re.compile(rf"llama[./]({'|'.join(sorted(ROOM_NAMES))})\b")
    found = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
        if rooms.search(node.value)
    ]
    named = [node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in ast.walk(tree)]
    imported = [
        i.rpartition(".")[2] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for i in [n.names[0].name]
    ]
    calls = {"import_module", "__import__", "run_module", "run_path", "find_spec", "exec", "eval"}
    return found + sorted(calls & {*named, *imported})


def test_the_core_reaches_a_room_by_one_table_alone() -> None:
    """FORMATS, the other formats of a checkpoint, which is opened lazily."""
    for name in READING_ORDER:
        found = roads_to_rooms((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        if name == "checkpoint":
            assert found == [*FORMATS.values(), "import_module"]
        elif name not in WORDS:
            assert found == [], f"{name}.py leads to {found}"


@pytest.mark.parametrize(
    "source",
    [
        'from importlib import import_module\nimport_module("llama." + word)',
        "import importlib\nimportlib.import_module(name)",
        '__import__("llama.fast")',
        'TABLE = {"fast": "llama.fast"}',
        'import runpy\nrunpy.run_module(f"llama.quantize")',
    ],
)
def test_hidden_roads_are_seen(source: str) -> None:
    assert roads_to_rooms(source)


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_room_imports_other_rooms_only_in_its_command_line(room: Path) -> None:
    allowed = {room.name} | LEANS_ON.get(room.name, set())
    others = {f"llama.{other.name}" for other in ROOMS if other.name not in allowed}
    for path in room.rglob("*.py"):
        if path.name not in ("cli.py", "__main__.py"):
            strangers = [i for i in imports(path) if ".".join(i.split(".")[:2]) in others]
            assert not strangers, f"{path} imports {strangers}"


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_room_has_a_readme(room: Path) -> None:
    assert (room / "README.md").is_file()


def test_fairscale_is_imported_in_parallel_alone() -> None:
    users = [path.name for path in PACKAGE.rglob("*.py") if any(i.startswith("fairscale") for i in imports(path))]
    assert users == ["parallel.py"]


def test_core_is_short_enough_to_be_read() -> None:
    sizes = {path.name: len(lines_of_code(path)) for path in CORE}
    assert sum(size for name, size in sizes.items() if name.removesuffix(".py") not in EDGES) <= 1800, sizes
    assert max(sizes.values()) <= 320, sizes


def test_functions_fit_on_a_screen() -> None:
    for path in CORE:
        code = lines_of_code(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                size = len(code & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
                assert size <= 60, f"{path.name}: {node.name} has {size} lines"


GIVEN_NAMES = {"EndpointHandler"}
"""Hugging Face's Inference Endpoints look for a class of this name in a repository."""


def test_no_names_that_say_nothing() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert path.stem not in ("utils", "common", "helpers"), path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Global), f"{path}: global"
            if isinstance(node, ast.ClassDef) and node.name not in GIVEN_NAMES:
                assert not re.search(r"Manager$|Handler$|^Base", node.name), f"{path}: {node.name}"


def test_model_file_contains_the_model_and_nothing_else() -> None:
    names = set(imports(PACKAGE / "model.py"))
    assert not any("inference_mode" in name or "argparse" in name or "checkpoint" in name for name in names)
    assert "inference_mode" not in (PACKAGE / "model.py").read_text(encoding="utf-8")


def test_license_and_version_are_one() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall("^## ([0-9.]+)", changelog, re.MULTILINE)[0] == llama.__version__


def test_setup_reads_the_version_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, Any] = {}
    fake = SimpleNamespace(setup=said.update, find_packages=lambda **options: [])
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    runpy.run_path(str(ROOT / "setup.py"))
    assert said["version"] == llama.__version__
    assert (ROOT / "setup.py").read_text(encoding="utf-8").count(llama.__version__) == 0


def test_the_front_door_shows_types_what_it_opens() -> None:
    """Its table, by which a name is imported when it is asked for, says the same as its imports for type checkers."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (shown,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = {
        str(node.module).removeprefix("llama."): tuple(alias.name for alias in node.names)
        for node in shown.body
        if isinstance(node, ast.ImportFrom)
    }
    assert imported == llama._PLACES
    assert sorted(llama.__all__) == sorted([*sum(imported.values(), ()), "__version__"])
    for name in llama.__all__:
        assert getattr(llama, name) is not None
    assert dir(llama) == sorted(llama.__all__)


def test_an_error_is_caught_without_pytorch() -> None:
    """`import llama` costs a second where PyTorch comes with it; a client that catches our errors need not pay it."""
    line = "import sys, llama; llama.LlamaError; print(*({'torch', 'numpy', 'sentencepiece'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", line], capture_output=True, check=True, text=True).stdout == "\n"
