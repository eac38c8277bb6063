"""docs/editors.md and test_editors.py say the same: the endpoints that settings lead to are those that tests replay."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from servers import Served

PAGE = Path(__file__).parents[2] / "docs" / "editors.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in TEXT.split("\n## ")[1:]}
CLIENTS = ["Continue", "llama.vscode", "llama.vim", "Tabby", "twinny", "llm-vscode", "Neovim", "Vim", "aider"]


def replayed() -> dict[str, set[str]]:
    """The paths that each test of test_editors.py asks for."""
    tree = ast.parse(PAGE.parents[1].joinpath("tests", "serve", "test_editors.py").read_text(encoding="utf-8"))
    found: dict[str, set[str]] = {}
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
            strings = [n.value for n in ast.walk(function) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            found[function.name] = {s for s in strings if re.fullmatch(r"/[\w./]+", s)}
    return found


def test_every_client_has_its_section() -> None:
    assert [title.partition(":")[0] for title in SECTIONS] == CLIENTS


@pytest.mark.parametrize("title", list(SECTIONS))
def test_settings_lead_to_the_endpoints_that_are_replayed(title: str, served: Served) -> None:
    section, tests = SECTIONS[title], replayed()
    sent = re.findall(r"`(GET|POST) (/[^`]+)`", section)
    named = re.findall(r"`(test_\w+)`", section)
    assert sent
    assert named
    assert set(named) <= tests.keys()
    paths = set().union(*(tests[name] for name in named))
    assert {path for _, path in sent} <= paths
    for name in named:
        assert tests[name] & {path for _, path in sent}, f"{name} replays nothing that the page names"
    addresses = re.findall(r"http://[^\s`'\"|,]+", section) or ["http://127.0.0.1:8000/api/generate"]
    for address in addresses:
        url = urlsplit(address)
        assert url.netloc == "127.0.0.1:8000"
        assert any(path.startswith(url.path.rstrip("/")) for _, path in sent), address
    with served.client() as http:
        for method, path in sent:
            assert http.request(method, path, json={}).status_code not in (404, 405), path


def test_the_settings_can_be_read() -> None:
    for kind, block in re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL):
        if kind == "json":
            assert json.loads(block)
        elif kind == "toml":
            tomllib = pytest.importorskip("tomllib", reason="Python reads TOML from 3.11 on")
            assert tomllib.loads(block)["model"]
        elif kind == "yaml":
            assert all(re.match(r"( *(- )?)\w+(: \S.*|:)?$", line) for line in block.splitlines())
    (template,) = set(re.findall(r'prompt_template = "([^"]*)"', TEXT))
    assert template == "<PRE> {prefix} <SUF>{suffix} <MID>"
    config = json.loads(re.findall(r"```json\n(.*?)```", SECTIONS["llm-vscode"], re.DOTALL)[0])
    parts = [config[f"llm.fillInTheMiddle.{name}"] for name in ("prefix", "suffix", "middle")]
    assert parts[0] + "{prefix}" + parts[1] + "{suffix}" + parts[2] == template
