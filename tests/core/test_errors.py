"""Errors that a program tells apart: each is raised where it is promised, is a ValueError too, and may travel."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llama
from fixtures_text import ARGS, SLOTS, WEIGHTS
from llama import CheckpointError, Llama, LlamaError, LostRank, NotEnoughMemory, NotFinite, PromptTooLong, QueueFull
from llama import checkpoint as checkpoints


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("x"),
        LostRank("x"),
        NotEnoughMemory("x"),
        NotFinite(),
        PromptTooLong(3, 500, 128),
        QueueFull("x"),
    ],
)
def test_errors_are_of_one_family_and_travel_between_ranks(error: LlamaError) -> None:
    """As ranks tell each other what they raised: NotFinite, made without its message, could not be unpickled."""
    assert isinstance(error, RuntimeError if isinstance(error, LostRank) else ValueError)
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error)
    assert str(there) == str(error)
    assert vars(there) == vars(error)


@pytest.mark.parametrize(
    "ask",
    [
        lambda llama, text: llama.stream(["short", text]),
        lambda llama, text: llama.text_completion(["short", text]),
        lambda llama, text: llama.text_infilling(["", text], ["", ""]),
        lambda llama, text: llama.chat_completion([[{"role": "user", "content": part}] for part in ("a", text)]),
        lambda llama, text: llama.score(["short", text]),
    ],
)
def test_a_prompt_that_is_too_long_says_how_long(tiny_llama: Llama, ask: Callable[[Llama, str], Any]) -> None:
    with pytest.raises(PromptTooLong, match=f"tokens; this model was built for 1 to {SLOTS}: shorten it") as caught:
        ask(tiny_llama, "x = 1\n" * SLOTS)
    assert caught.value.row == 1
    assert caught.value.tokens > caught.value.max_seq_len == SLOTS
    assert f"prompt 1 has {caught.value.tokens} tokens" in str(caught.value)


def test_an_empty_prompt_is_another_mistake(tiny_llama: Llama) -> None:
    with pytest.raises(ValueError, match="has 0 tokens") as caught:
        tiny_llama.stream([[]])
    assert not isinstance(caught.value, LlamaError)


def truncated(folder: Path) -> None:
    shard = folder / "consolidated.00.pth"
    shard.write_bytes(shard.read_bytes()[:1000])


def without_layer(folder: Path) -> None:
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "n_layers": params["n_layers"] + 1}))


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        without_layer,
        lambda folder: (folder / "params.json").write_text("{"),
        lambda folder: (folder / "params.json").unlink(),
        lambda folder: (folder / "tokenizer.model").unlink(),
        lambda folder: (folder / "tokenizer.model").write_text("no"),
        lambda folder: (folder / "consolidated.00.pth").rename(folder / "consolidated.01.pth"),
        lambda folder: (folder / "consolidated.00.pth").rename(folder / "other"),
        lambda folder: [(folder / "params.json").unlink(), (folder / "config.json").write_text("{}")],
        lambda folder: [(folder / "params.json").unlink(), (folder / "config.json").write_text("no")],
    ],
)
def test_a_damaged_checkpoint_is_one_error(damage: Callable[[Path], Any], tmp_path: Path, tokenizer_path: Path) -> None:
    folder = tmp_path / "it"
    checkpoints.save(folder, ARGS, WEIGHTS, 1, tokenizer_path)
    damage(folder)
    with pytest.raises(CheckpointError):
        Llama.build(folder, max_seq_len=SLOTS)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "it.gguf").write_bytes(b"GGUF, or not")
    for path in (tmp_path / "none", tmp_path / "it.gguf"):
        with pytest.raises(CheckpointError, match=path.name):
            Llama.build(path)


@pytest.mark.parametrize("build", [Llama.build, llama.load])
def test_too_little_memory_is_known_before_weights_are_read(
    build: Callable[..., Llama], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("llama.system", "llama.interop.plan"):
        monkeypatch.setattr(f"{module}.free_memory", lambda device: 10_000)
    with pytest.raises(NotEnoughMemory, match="free"):
        build(tiny_checkpoint)


def test_a_wrong_setting_is_a_plain_value_error(tiny_llama: Llama) -> None:
    with pytest.raises(ValueError, match="temperature") as caught:
        tiny_llama.stream(["a"], temperature=-1)
    assert not isinstance(caught.value, LlamaError)
