"""The commands as typed: `codellama …` run in this process, its input scripted and what it prints read back."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures_text import ARGS, WEIGHTS
from llama import Llama, Message, Transformer, checkpoint, cli, parallel, rope
from llama.prompts import dialog
from llama.rope import SPECTRA

Outcome = tuple[int, str, str]  # exit code, stdout, stderr
Run = Callable[..., Outcome]


@pytest.fixture
def codellama(
    tiny_llama: Llama, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """A function that runs a command line, by default on the small checkpoint with short answers."""

    def run(*words: str, stdin: str = "", defaults: bool = True) -> Outcome:
        options = ["--ckpt_dir", str(tiny_checkpoint)] if defaults else []
        options += ["--temperature", "0", "--max_gen_len", "8"] if defaults and words[0] != "info" else []
        monkeypatch.setattr(sys, "argv", ["codellama", *words, *options])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        finally:
            parallel.start()  # a command leaves the groups at its end
        out, err = capsys.readouterr()
        return code, out, err

    return run


def completed(llama: Llama, text: str, **options: Any) -> str:
    return llama.text_completion([text], **{"temperature": 0, "max_gen_len": 8, **options})[0]["generation"]


# --- complete ----------------------------------------------------------------------------------------------------


def test_complete_prints_the_prompt_and_what_follows(codellama: Run, tiny_llama: Llama) -> None:
    expected = completed(tiny_llama, "def f(x):")
    assert codellama("complete", "def f(x):") == (0, f"def f(x):{expected}\n", "")
    assert codellama("complete", "def f(x):", "--noecho") == (0, f"{expected}\n", "")
    assert codellama("complete", "--prompt", "def f(x):") == (0, f"def f(x):{expected}\n", "")


def test_complete_reads_standard_input(codellama: Run, tiny_llama: Llama) -> None:
    text = "import os\n\n\ndef f(x):\n    "
    assert codellama("complete", "-", stdin=text) == (0, text + completed(tiny_llama, text) + "\n", "")


@pytest.mark.parametrize("prompt", ["123", "1e3", "[1, 2]", "{'a': 1}", "None", "True", "(x,y)", "'quoted'", "a,b"])
def test_a_prompt_that_looks_like_a_value_stays_text(codellama: Run, tiny_llama: Llama, prompt: str) -> None:
    assert codellama("complete", prompt) == (0, prompt + completed(tiny_llama, prompt) + "\n", "")


def test_complete_takes_the_settings_of_sampling(codellama: Run, tiny_llama: Llama, tiny_checkpoint: Path) -> None:
    words = ["complete", "x", "--noecho", "--temperature", "1.5", "--top_p", "1", "--seed", "3", "--max_gen_len", "12"]
    words += ["--ckpt_dir", str(tiny_checkpoint)]
    drawn = {"temperature": 1.5, "top_p": 1.0, "seed": 3, "max_gen_len": 12}
    assert codellama(*words, defaults=False)[1] == completed(tiny_llama, "x", **drawn) + "\n"
    drawn["top_k"] = 5
    assert codellama(*words, "--top_k", "5", defaults=False)[1] == completed(tiny_llama, "x", **drawn) + "\n"


def test_stop_ends_the_answer(codellama: Run, tiny_llama: Llama) -> None:
    whole = completed(tiny_llama, "x")
    expected = whole[: whole.index(whole[3:5])]
    assert codellama("complete", "x", "--noecho", "--stop", whole[3:5])[1] == expected + "\n"


@pytest.mark.parametrize("stop", ["7", "[1]", "1,2"])
def test_a_stop_that_looks_like_ids_is_text(codellama: Run, monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    given: list[Any] = []
    original = Llama.stream

    def stream(self: Llama, *args: Any, **options: Any) -> Iterator[Any]:
        given.append(options["stop"])
        return original(self, *args, **options)

    monkeypatch.setattr(Llama, "stream", stream)
    assert codellama("complete", "x", "--stop", stop)[0] == 0
    assert given == [stop]


def test_options_of_build_are_passed_on(codellama: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Llama] = []
    original = Llama.stream

    def stream(self: Llama, *args: Any, **options: Any) -> Iterator[Any]:
        built.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(Llama, "stream", stream)
    scheme = "{'rope_type': 'linear', 'factor': 2.0}"
    words = ["--dtype", "bfloat16", "--max_seq_len", "64", "--max_batch_size", "1", "--rope_scaling", scheme]
    code, _, err = codellama("complete", "x", *words, "--tokenizer_path", str(tiny_checkpoint / "tokenizer.model"))
    assert (code, err) == (0, "")
    model = built[0].model
    assert model.norm.weight.dtype == torch.bfloat16
    assert (model.args.max_seq_len, model.args.max_batch_size) == (64, 1)
    assert model.args.rope_scaling == {"rope_type": "linear", "factor": 2.0}


# --- infill ------------------------------------------------------------------------------------------------------


OWN_SCHEME = """
import torch

def halved(head_dim, theta, length, *, factor=1.0):
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim) / (2 * factor), 1.0

def short(head_dim, theta, length):
    return torch.ones(1), 1.0

linear = halved
"""


@pytest.fixture
def own_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("llama.rope.SPECTRA", dict(SPECTRA))
    monkeypatch.setattr("llama.front.SPECTRA", rope.SPECTRA)
    path = tmp_path / "my_scheme.py"
    path.write_text(OWN_SCHEME, encoding="utf-8")
    return path


def test_a_scheme_of_ones_own_comes_from_a_file(codellama: Run, tiny_checkpoint: Path, own_scheme: Path) -> None:
    for given, factor in ((f"{{'rope_type': '{own_scheme}:halved', 'factor': 3.0}}", 6), (f"{own_scheme}:halved", 2)):
        same = Llama.build(tiny_checkpoint, rope_scaling={"rope_type": "linear", "factor": factor})
        code, out, err = codellama("complete", "def f(x):", "--rope_scaling", given)
        assert (code, out, err) == (0, f"def f(x):{completed(same, 'def f(x):')}\n", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing", "no function missing"), ("linear", "another name"), ("short", "one for each of the")],
)
def test_a_scheme_that_cant_be_is_refused(codellama: Run, own_scheme: Path, name: str, message: str) -> None:
    code, out, err = codellama("complete", "x", "--rope_scaling", f"{own_scheme}:{name}")
    assert (code, out) == (1, "")
    assert message in err


def test_a_scheme_from_a_file_that_is_not_there_is_named(codellama: Run) -> None:
    code, _, err = codellama("complete", "x", "--rope_scaling", "nowhere.py:scheme")
    assert code == 1
    assert "no file nowhere.py" in err


def middle(llama: Llama, prefix: str, suffix: str, **options: Any) -> str:
    return llama.text_infilling([prefix], [suffix], 0, max_gen_len=8, **options)[0]["generation"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_infill_prints_the_file_filled_in(codellama: Run, tiny_llama: Llama, tmp_path: Path, newline: str) -> None:
    """Line ends included: `codellama infill f > g` must change nothing else."""
    prefix, suffix = f'def f(é):{newline}    """', f'"""{newline}    return 1{newline}'
    (tmp_path / "f.py").write_bytes(f"{prefix}<FILL>{suffix}".encode())
    code, out, err = codellama("infill", str(tmp_path / "f.py"))
    assert (code, err) == (0, "")
    assert out == prefix + middle(tiny_llama, prefix, suffix) + suffix
    code, out, err = codellama("infill", str(tmp_path / "f.py"), "--suffix_first")
    assert out == prefix + middle(tiny_llama, prefix, suffix, suffix_first=True) + suffix


def test_infill_reads_standard_input(codellama: Run, tiny_llama: Llama) -> None:
    windows = f"a = 1\r\nx = {middle(tiny_llama, 'a = 1' + chr(13) + chr(10) + 'x = ', chr(13) + chr(10))}\r\n"
    assert codellama("infill", "-", stdin="a = 1\r\nx = <FILL>\r\n") == (0, windows, "")
    assert codellama("infill", "-", stdin="x = <FILL>\n") == (0, f"x = {middle(tiny_llama, 'x = ', chr(10))}\n", "")


@pytest.mark.parametrize(("text", "n"), [("x = 1\n", 0), ("<FILL> = <FILL>\n", 2)])
def test_infill_wants_exactly_one_place(codellama: Run, tmp_path: Path, text: str, n: int) -> None:
    (tmp_path / "f.py").write_text(text)
    code, out, err = codellama("infill", str(tmp_path / "f.py"))
    assert (code, out) == (1, "")
    assert_one_paragraph(err, rf"{tmp_path / 'f.py'} has {n} places marked <FILL>; it needs exactly one")


def test_infill_names_a_file_that_is_not_there(codellama: Run, tmp_path: Path) -> None:
    code, _, err = codellama("infill", str(tmp_path / "absent.py"))
    assert code == 1
    assert_one_paragraph(err, f"there is no file {tmp_path / 'absent.py'}")


# --- chat --------------------------------------------------------------------------------------------------------


def scripted_chat(llama: Llama, questions: list[str], system: str | None = None) -> list[str]:
    """The answers that a chat must give: each turn from the whole conversation, nothing remembered."""
    messages: list[Message] = [Message(role="system", content=system)] if system else []
    said = []
    for question in questions:
        messages.append(Message(role="user", content=question))
        (result,) = llama.chat_completion([messages], 0, max_gen_len=8, reuse=False)
        said.append(result["generation"]["content"])
        messages.append(Message(role="assistant", content=said[-1]))
    return said


def test_chat_answers_turn_by_turn(codellama: Run, tiny_llama: Llama) -> None:
    expected = scripted_chat(tiny_llama, ["Hi", "And?"])
    assert codellama("chat", stdin="Hi\n\n  And?  \n") == (0, "".join(f"{said}\n" for said in [*expected, ""]), "")
    assert codellama("chat", stdin="Hi\n/exit\nAnd?\n") == (0, f"{expected[0]}\n", "")


def test_chat_reset_forgets_all_but_the_system_message(codellama: Run, tiny_llama: Llama) -> None:
    first, second = scripted_chat(tiny_llama, ["Hi", "And?"], "Brief.")
    (fresh,) = scripted_chat(tiny_llama, ["And?"], "Brief.")
    assert fresh != second
    code, out, _ = codellama("chat", "--system", "Brief.", stdin="Hi\n/reset\nAnd?\n/reset\nHi\nAnd?\n")
    assert (code, out) == (0, f"{first}\n{fresh}\n{first}\n{second}\n\n")


def test_a_system_message_that_looks_like_a_value_stays_text(codellama: Run, tiny_llama: Llama) -> None:
    for system in ("brief,kind", "[x]", "1.50"):
        (said,) = scripted_chat(tiny_llama, ["Hi"], system)
        assert codellama("chat", "--system", system, stdin="Hi\n/exit\n")[1] == f"{said}\n"


def test_chat_reads_of_a_turn_only_what_is_new(
    codellama: Run, tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [Message(role="user", content=text) for text in ("Hi, who are you?", "And?")]
    (said,) = scripted_chat(tiny_llama, [messages[0]["content"]])
    messages.insert(1, Message(role="assistant", content=said))
    first, second = (len(dialog(tiny_llama.tokenizer, messages[:n]).tokens) for n in (1, 3))
    read: list[int] = []
    original: Callable[..., Tensor] = Transformer.hidden

    def hidden(self: Transformer, tokens: Tensor, *args: Any) -> Tensor:
        read.append(tokens.shape[1])
        return original(self, tokens, *args)

    monkeypatch.setattr(Transformer, "hidden", hidden)
    codellama("chat", stdin="Hi, who are you?\nAnd?\n")
    prompts = [tokens for tokens in read if tokens > 1]
    assert len(prompts) == 2
    assert prompts[0] == first
    assert prompts[1] < second - first  # nor what was said


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    codellama: Run, tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the model computes. What was said so far is part of the conversation."""
    (whole,) = scripted_chat(tiny_llama, ["Hi"])
    original = Transformer.hidden
    passes: list[int] = []

    def hidden(self: Transformer, *args: Any) -> Tensor:
        passes.append(1)
        if len(passes) == 5:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "hidden", hidden)
        code, out, err = codellama("chat", stdin="Hi\nAnd?\n")
    said, rest = out.split(" [stopped]\n")
    assert (code, err) == (0, "")
    assert whole.startswith(said)
    assert 0 < len(said) < len(whole)
    history = [
        Message(role="user", content="Hi"),
        Message(role="assistant", content=said),
        Message(role="user", content="And?"),
    ]
    (result,) = tiny_llama.chat_completion([history], 0, max_gen_len=8)
    assert rest == f"{result['generation']['content']}\n\n"


def test_ctrl_c_at_the_prompt_ends_the_chat(codellama: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert codellama("chat") == (0, "\n", "")


def test_chat_goes_on_after_what_it_cant_answer(codellama: Run, tiny_llama: Llama) -> None:
    """Tags, and a conversation that has outgrown the context."""
    (said,) = scripted_chat(tiny_llama, ["Hi"])
    long = "word " * 300
    code, out, err = codellama("chat", "--max_seq_len", "128", stdin=f"[INST]\n{long}\nHi\n")
    assert (code, err) == (0, "")
    refused, too_long, answer = out.rstrip("\n").split("\n", 2)
    assert refused.startswith("(Error: special tags are not allowed")
    assert "max_seq_len" in too_long
    assert too_long.endswith("/reset begins anew)")
    assert answer == said.rstrip("\n")


# --- info --------------------------------------------------------------------------------------------------------


def test_info_tells_the_numbers(codellama: Run) -> None:
    code, out, err = codellama("info")
    told = dict(line.split(maxsplit=1) for line in out.replace("KV cache", "kv").splitlines()[1:])
    attention = 64 * 64 + 2 * 16 * 64 + 64 * 64  # wq, wk and wv of 2 of the 8 heads, wo
    parameters = 2 * 1024 * 64 + 2 * (attention + 3 * 64 * 96 + 2 * 64) + 64
    assert (code, err) == (0, "")
    assert told["parameters"] == f"{parameters:,}"
    assert told["weights"] == f"{4 * parameters:,} bytes in float32"
    assert told["kv"] == f"{2 * 2 * 2 * 8 * 4:,} bytes a token in float32"  # k and v, layers, heads, width, bytes
    expected = {"dim": "64", "n_layers": "2", "n_heads": "8", "n_kv_heads": "2", "vocab_size": "1024"}
    expected |= {"head_dim": "8", "hidden_dim": "96", "rope_theta": "10000.0"}
    assert told.items() >= expected.items()


def test_info_of_bfloat16_shards(codellama: Run, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "two", ARGS, {name: w.bfloat16() for name, w in WEIGHTS.items()}, 2)
    code, out, _ = codellama("info", "--ckpt_dir", str(tmp_path / "two"), defaults=False)
    assert code == 0
    assert out.startswith(f"{tmp_path / 'two'}: 2 shards\n")
    assert "bytes in bfloat16" in out
    assert "128 bytes a token in bfloat16" in out


@pytest.mark.parametrize("name", ["123", "2024_01", "1e3"])
def test_a_folder_whose_name_looks_like_a_number_is_a_folder(
    codellama: Run, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).symlink_to(tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    assert codellama("info", "--ckpt_dir", name, defaults=False)[1].startswith(f"{name}: 1 shard\n")
    words = ["--ckpt_dir", name, "--max_gen_len", "1"]
    assert codellama("complete", "x", *words, "--tokenizer_path", f"{name}/tokenizer.model", defaults=False)[0] == 0


# --- errors ------------------------------------------------------------------------------------------------------


def assert_one_paragraph(err: str, message: str) -> None:
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert err.endswith("\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["complete", "x", "--ckpt_dir", "/nowhere/at/all"], "there is no folder /nowhere/at/all; pass --ckpt_dir"),
        (["complete", "x", "--temprature", "1"], "unknown option --temprature; there are --ckpt_dir,"),
        (["infill", "x", "--top_q", "1"], "unknown option --top_q"),
        (["chat", "--sistem", "x"], "unknown option --sistem"),
        (["complete", "x", "--dtype", "float8"], "--dtype float8 is unknown; there are float32, bfloat16, float16"),
        (["complete", "x", "--dtype", "float16", "--device", "cpu"], "choose bfloat16 or float32"),
        (["complete", "x", "--rope_scaling", "spiral"], "spiral"),
        (["complete", "x", "--top_p", "7"], "top_p is 7; give a number, at least 0 and at most 1"),
        (["complete", "word " * 600], "larger max_seq_len"),
        (["info", "--ckpt_dir", "/nowhere/at/all"], "there is no folder /nowhere/at/all"),
    ],
)
def test_an_error_is_one_paragraph(codellama: Run, tiny_checkpoint: Path, words: list[str], message: str) -> None:
    given = [] if "--ckpt_dir" in words else ["--ckpt_dir", str(tiny_checkpoint)]
    code, out, err = codellama(*words, *given, defaults=False)
    assert (code, out) == (1, "")
    assert_one_paragraph(err, message)


def test_a_warning_is_a_note(codellama: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """On stderr, so that what is printed stays the text alone."""
    checkpoint.save(tmp_path / "noted", ARGS, WEIGHTS, 1, tiny_checkpoint / "tokenizer.model")
    params = tmp_path / "noted" / "params.json"
    params.write_text(params.read_text().replace("{", '{"use_moe": true,', 1))
    code, out, err = codellama("complete", "x", "--ckpt_dir", str(params.parent), "--max_gen_len", "2", defaults=False)
    assert code == 0
    assert out.startswith("x")
    assert err == f"note: {params}: unknown keys are ignored: use_moe\n"


def test_help_names_the_commands(codellama: Run) -> None:
    code, out, err = codellama("--help", defaults=False)
    assert code == 0
    for name in ("complete", "infill", "chat", "info"):
        assert name in out + err


def test_an_unknown_command_is_named(codellama: Run) -> None:
    code, _, err = codellama("compleat", "x", defaults=False)
    assert code == 2
    assert "compleat" in err
