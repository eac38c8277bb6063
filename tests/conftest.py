"""Fixtures of general use: small architectures and models whose weights the oracle of reference.py knows too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from llama import checkpoint, parallel
from llama.config import ModelArgs
from llama.generation import Llama
from llama.model import Transformer
from llama.tokenizer import Tokenizer
from llama.train.tokenizer import train_tokenizer

# So that every test finds reference.py and parallel/ranks.py, in whatever way pytest imports its own files.
sys.path.insert(0, str(Path(__file__).parent))

from fixtures_text import ARGS, ROWS, SLOTS, VOCABULARY, WEIGHTS, training_texts
from reference import MakeModel, random_weights

torch.set_num_threads(1)  # models this small lose more by waiting for a second thread than they gain

# The same examples at each run, however slow the machine is.
settings.register_profile("project", derandomize=True, deadline=None, database=None)
settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow what stands on a fixture that takes most of a minute to make, and the kernels in vectors of another
    width than this processor's, which have to be compiled and emulated."""
    for item in items:
        given = set(getattr(item, "fixturenames", ()))
        way = getattr(item, "callspec", None) and item.callspec.params.get("lanes")  # type: ignore[attr-defined]
        way = "tiles" if "tiles" in given else way
        whole = item.path.stem in ("test_report", "test_reproduce", "test_chapter") and given & {"made", "printed"}
        if whole or (item.path.parent.name == "kernels" and way not in (None, own_vectors())):
            item.add_marker(pytest.mark.slow)


def own_vectors() -> str:
    """This processor's own way in tests/kernels, as far as PyTorch knows it: nothing is compiled to find out."""
    if getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return "tiles"
    return {"AVX512": "16 lanes", "AVX2": "8 lanes"}.get(torch.backends.cpu.get_cpu_capability(), "4 lanes")


@pytest.fixture(autouse=True)
def seed() -> None:
    """What a test draws, it draws again whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> ModelArgs:
    """Two layers with grouped heads; a forward pass takes a millisecond."""
    return ModelArgs(
        dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=96, hidden_dim=96, max_batch_size=4, max_seq_len=160
    )


@pytest.fixture
def make_model() -> MakeModel:
    """A function (args, seed=0) to a Transformer and the weights it was given, by Meta's names."""

    def make(args: ModelArgs, seed: int = 0) -> tuple[Transformer, dict[str, Tensor]]:
        weights = random_weights(args, seed)
        model = Transformer(args)
        model.load_state_dict(weights, strict=True)
        return model, weights

    return make


# --- text: small tokenizers with the published pieces, and a small checkpoint that uses one ------------------------


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model of 1024 pieces with the infilling marks."""
    path = tmp_path_factory.mktemp("infilling") / "tokenizer.model"
    train_tokenizer(training_texts(), VOCABULARY, path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Without infilling marks, as the Python models'."""
    path = tmp_path_factory.mktemp("plain") / "tokenizer.model"
    train_tokenizer(training_texts(), VOCABULARY, path, infilling=False)
    return Tokenizer(path)


@pytest.fixture(scope="session")
def step_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With `<step>`, as that of 70B Instruct."""
    path = tmp_path_factory.mktemp("step") / "tokenizer.model"
    train_tokenizer(training_texts(), VOCABULARY, path, step=True)
    return Tokenizer(path)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """A folder in the published format: the weights of fixtures_text.py, which its oracle knows, and the tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    checkpoint.save(folder, ARGS, WEIGHTS, 1, tokenizer_path)
    return folder


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, Any]]]:
    """What commands of the rooms print: the lines of each table, and what --json prints in its place."""
    found: list[tuple[list[str], dict[str, Any]]] = []

    def tell(text: str, values: dict[str, Any], as_json: bool) -> None:
        found.append((text.splitlines(), json.loads(json.dumps(values, default=str))))

    for name, module in list(sys.modules.items()):
        if name.startswith("llama.") and name != "llama.evals.record" and hasattr(module, "tell"):
            monkeypatch.setattr(module, "tell", tell)
    return found


@pytest.fixture(scope="session")
def built_llama(tiny_checkpoint: Path) -> Llama:
    return Llama.build(tiny_checkpoint, max_seq_len=SLOTS, max_batch_size=ROWS)


@pytest.fixture
def tiny_llama(built_llama: Llama) -> Llama:
    """That checkpoint, built once, with an empty cache; the group of one that its layers need is there again if another
    test has left it."""
    parallel.start()
    built_llama.model.own_cache().forget()
    return built_llama
