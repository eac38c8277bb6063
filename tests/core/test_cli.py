"""The commands as typed: `codellama …` run in this process, its input scripted and what it prints read back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run, assert_one_paragraph
from torch import Tensor

from fixtures_text import ARGS, WEIGHTS
from llama import Llama, Transformer, checkpoint, rope
from llama import __version__ as llama_version
from llama.rope import SPECTRA


def completed(llama: Llama, text: str, **options: Any) -> str:
    return llama.text_completion([text], **{"temperature": 0, "max_gen_len": 8, **options})[0]["generation"]


# --- complete ----------------------------------------------------------------------------------------------------


def test_complete_prints_the_prompt_and_what_follows(codellama: Run, tiny_llama: Llama) -> None:
    expected = completed(tiny_llama, "def f(x):")
    assert codellama("complete", "def f(x):") == (0, f"def f(x):{expected}\n", "")
    assert codellama("complete", "def f(x):", "--no_echo") == (0, f"{expected}\n", "")
    assert codellama("complete", "def f(x):", "--no-echo") == (0, f"{expected}\n", "")


def test_spellings_of_before_are_understood(codellama: Run, tiny_llama: Llama) -> None:
    """fire's: an argument by its name, --noX, a switch with a value."""
    expected = completed(tiny_llama, "def f(x):")
    for words in (["--prompt", "def f(x):"], ["--prompt=def f(x):"]):
        assert codellama("complete", *words) == (0, f"def f(x):{expected}\n", "")
    note = "note: --noecho is called --no_echo now\n"
    assert codellama("complete", "def f(x):", "--noecho") == (0, f"{expected}\n", note)
    for words in (["--echo", "false"], ["--echo=False"], ["--no_echo"]):
        assert codellama("complete", "def f(x):", *words) == (0, f"{expected}\n", "")
    assert codellama("complete", "def f(x):", "--echo", "true")[1] == f"def f(x):{expected}\n"


@pytest.mark.parametrize("prompt", ["-- list all users", "--help me", "-x", "--"])
def test_a_prompt_may_begin_with_hyphens(codellama: Run, tiny_llama: Llama, prompt: str) -> None:
    expected = (0, prompt + completed(tiny_llama, prompt) + "\n", "")
    assert codellama("complete", f"--prompt={prompt}") == expected
    assert codellama("complete", "--", prompt) == expected
    if " " in prompt and prompt.startswith("-- "):
        assert codellama("complete", prompt) == expected


def test_complete_reads_standard_input(codellama: Run, tiny_llama: Llama) -> None:
    text = "import os\n\n\ndef f(x):\n    "
    assert codellama("complete", "-", stdin=text) == (0, text + completed(tiny_llama, text) + "\n", "")


@pytest.mark.parametrize("prompt", ["123", "1e3", "[1, 2]", "{'a': 1}", "None", "True", "(x,y)", "'quoted'", "a,b"])
def test_a_prompt_that_looks_like_a_value_stays_text(codellama: Run, tiny_llama: Llama, prompt: str) -> None:
    assert codellama("complete", prompt) == (0, prompt + completed(tiny_llama, prompt) + "\n", "")


def test_complete_takes_the_settings_of_sampling(codellama: Run, tiny_llama: Llama, tiny_checkpoint: Path) -> None:
    words = ["complete", "x", "--no_echo", "--temperature", "1.5", "--top_p", "1", "--seed", "3", "--max_gen_len", "12"]
    words += ["--ckpt_dir", str(tiny_checkpoint)]
    drawn = {"temperature": 1.5, "top_p": 1.0, "seed": 3, "max_gen_len": 12}
    assert codellama(*words, defaults=False)[1] == completed(tiny_llama, "x", **drawn) + "\n"
    drawn["top_k"] = 5
    assert codellama(*words, "--top_k", "5", defaults=False)[1] == completed(tiny_llama, "x", **drawn) + "\n"


def test_stop_ends_the_answer(codellama: Run, tiny_llama: Llama) -> None:
    whole = completed(tiny_llama, "x")
    expected = whole[: whole.index(whole[3:5])]
    assert codellama("complete", "x", "--no_echo", "--stop", whole[3:5])[1] == expected + "\n"


@pytest.mark.parametrize("stop", ["7", "[1]", "1,2"])
def test_a_stop_that_looks_like_ids_is_text(codellama: Run, monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    """And several are several."""
    given: list[Any] = []
    original = Llama.stream

    def stream(self: Llama, *args: Any, **options: Any) -> Iterator[Any]:
        given.append(options["stop"])
        return original(self, *args, **options)

    monkeypatch.setattr(Llama, "stream", stream)
    assert codellama("complete", "x", "--stop", stop, "--stop", r"\n", "--stop", "\\\\n")[0] == 0
    assert given == [(stop, "\n", "\\n")]


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


@pytest.mark.parametrize(
    ("source", "found"), [("def f(:", "SyntaxError"), ("import nothing_at_all", "No module named")]
)
def test_a_scheme_from_a_file_that_cant_be_run_is_one_sentence(
    codellama: Run, tmp_path: Path, source: str, found: str
) -> None:
    (tmp_path / "mine.py").write_text(source)
    code, out, err = codellama("complete", "x", "--rope_scaling", f"{tmp_path}/mine.py:f")
    assert (code, out) == (1, "")
    assert_one_paragraph(err, f"{tmp_path}/mine.py can't be run (")
    assert found in err


@pytest.mark.parametrize("words", [["complete", ""], ["complete", "-"]])
def test_an_empty_prompt_is_refused_before_anything_is_loaded(codellama: Run, words: list[str]) -> None:
    code, out, err = codellama(*words, "--ckpt_dir", "/nowhere")
    assert (code, out) == (1, "")
    assert_one_paragraph(err, "is empty: give a text to continue")


def test_a_scheme_from_a_file_that_is_not_there_is_named(codellama: Run) -> None:
    code, _, err = codellama("complete", "x", "--rope_scaling", "nowhere.py:scheme")
    assert code == 1
    assert "no file nowhere.py" in err


CUT = "place {} was cut after 8 tokens: a larger --max_gen_len gives more\n"
FIRST = CUT.format(1)


def middle(llama: Llama, prefix: str, suffix: str, **options: Any) -> str:
    """What is filled in, with the line ends of the text around it."""
    text = llama.text_infilling([prefix], [suffix], 0, max_gen_len=8, **options)[0]["generation"]
    return text.replace("\r", "").replace("\n", "\r\n" if "\r\n" in prefix + suffix else "\n")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_infill_prints_the_file_filled_in(codellama: Run, tiny_llama: Llama, tmp_path: Path, newline: str) -> None:
    """Line ends included: `codellama infill f > g` must change nothing else."""
    prefix, suffix = f'def f(é):{newline}    """', f'"""{newline}    return 1{newline}'
    (tmp_path / "f.py").write_bytes(f"{prefix}<FILL>{suffix}".encode())
    code, out, err = codellama("infill", str(tmp_path / "f.py"))
    assert (code, err) == (0, FIRST)
    assert out == prefix + middle(tiny_llama, prefix, suffix) + suffix
    code, out, err = codellama("infill", str(tmp_path / "f.py"), "--suffix_first")
    assert out == prefix + middle(tiny_llama, prefix, suffix, suffix_first=True) + suffix


def test_infill_reads_standard_input(codellama: Run, tiny_llama: Llama) -> None:
    windows = f"a = 1\r\nx = {middle(tiny_llama, 'a = 1' + chr(13) + chr(10) + 'x = ', chr(13) + chr(10))}\r\n"
    assert codellama("infill", "-", stdin="a = 1\r\nx = <FILL>\r\n") == (0, windows, FIRST)
    assert codellama("infill", "-", stdin="x = <FILL>\n") == (0, f"x = {middle(tiny_llama, 'x = ', chr(10))}\n", FIRST)


def test_infill_fills_several_places_one_after_the_other(codellama: Run, tiny_llama: Llama, tmp_path: Path) -> None:
    """What is filled in belongs to the next prefix; marks that are still open are no part of a suffix."""
    path = tmp_path / "f.py"
    path.write_text("a = <FILL>\nb = <FILL>\n")
    first = middle(tiny_llama, "a = ", "\nb = \n")
    second = middle(tiny_llama, f"a = {first}\nb = ", "\n")
    assert codellama("infill", str(path)) == (0, f"a = {first}\nb = {second}\n", FIRST + CUT.format(2))
    assert codellama("infill", str(path), "--only") == (0, f"{first}\n{second}\n", FIRST + CUT.format(2))


def test_infill_at_a_line_and_a_column(codellama: Run, tiny_llama: Llama, tmp_path: Path) -> None:
    path = tmp_path / "f.py"
    path.write_bytes(b"def f(x):\r\n    return\r\n")
    for place, prefix in (("2:11", "def f(x):\r\n    return"), ("1:1", ""), ("3:1", "def f(x):\r\n    return\r\n")):
        suffix = path.read_bytes().decode()[len(prefix) :]
        expected = prefix + middle(tiny_llama, prefix, suffix) + suffix
        assert codellama("infill", f"{path}:{place}") == (0, expected, FIRST)
    for place, allowed in (("2:12", "line 2 has columns 1 to 11"), ("4:1", "it has lines 1 to 3"), ("0:1", "lines 1")):
        code, out, err = codellama("infill", f"{path}:{place}")
        assert (code, out) == (1, "")
        assert_one_paragraph(err, allowed)


def test_infill_in_place_changes_the_file_and_nothing_else(codellama: Run, tiny_llama: Llama, tmp_path: Path) -> None:
    path, link = tmp_path / "f.py", tmp_path / "link.py"
    path.write_bytes("# -*- coding: latin-1 -*-\ns = 'caf\xe9'\r\nx = <FILL>\r\n".encode("latin-1"))
    path.chmod(0o640)
    link.symlink_to(path)
    prefix, suffix = "# -*- coding: latin-1 -*-\ns = 'caf\xe9'\r\nx = ", "\r\n"
    filled = prefix + middle(tiny_llama, prefix, suffix) + suffix
    code, out, err = codellama("infill", str(link), "--in_place")
    assert (code, out, err) == (0, "", f"{link}: 1 place filled in\n{FIRST}")
    assert path.read_bytes() == filled.encode("latin-1")
    assert path.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()


def test_an_interrupted_infill_in_place_changes_nothing(
    codellama: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.py"
    path.write_text("x = <FILL>\n")
    original, passes = Transformer.hidden, []

    def hidden(self: Transformer, *args: Any) -> Tensor:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Transformer, "hidden", hidden)
    assert codellama("infill", str(path), "--in_place")[0] == 130
    assert path.read_text() == "x = <FILL>\n"
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith((".f", "f"))] == ["f.py"]


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (b"x = 1\n", [], "has no place marked <FILL>; mark one or several, or give "),
        (b"s = 'caf\xe9'\n<FILL>\n", [], "is not in utf-8 (byte 0xe9 at 8): save it as UTF-8, or for a file say"),
        (b"<FILL>\n", ["--encoding", "latin-9000"], "--encoding latin-9000 is unknown to Python"),
        (None, [], "f.py is missing; give a file with <FILL>, FILE:LINE:COLUMN, or - for standard input"),
    ],
)
def test_infill_says_what_is_wrong_with_a_file_before_it_loads(
    codellama: Run, tmp_path: Path, text: bytes | None, words: list[str], message: str
) -> None:
    if text is not None:
        (tmp_path / "f.py").write_bytes(text)
    code, out, err = codellama("infill", str(tmp_path / "f.py"), *words, "--ckpt_dir", "/nowhere")
    assert (code, out) == (1, "")
    assert_one_paragraph(err, message)


def test_infill_reads_another_encoding(codellama: Run, tiny_llama: Llama, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_bytes(b"s = 'caf\xe9'\nx = <FILL>\n")
    prefix = "s = 'caf\xe9'\nx = "
    expected = prefix + middle(tiny_llama, prefix, "\n") + "\n"
    assert codellama("infill", str(tmp_path / "f.py"), "--encoding", "latin-1") == (0, expected, FIRST)


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["complete", "x", "--ckpt_dir", "/nowhere/at/all"], "there is no folder /nowhere/at/all; pass --ckpt_dir"),
        (["complete", "x", "--dtype", "float16", "--device", "cpu"], "choose bfloat16 or float32"),
        (["complete", "x", "--rope_scaling", "spiral"], "spiral"),
        (["complete", "word " * 600, "--max_seq_len", "512"], "larger max_seq_len"),
        (["info", "--ckpt_dir", "/nowhere/at/all"], "there is no folder /nowhere/at/all"),
    ],
)
def test_an_error_is_one_paragraph(codellama: Run, tiny_checkpoint: Path, words: list[str], message: str) -> None:
    given = [] if "--ckpt_dir" in words else ["--ckpt_dir", str(tiny_checkpoint)]
    code, out, err = codellama(*words, *given, defaults=False)
    assert (code, out) == (1, "")
    assert_one_paragraph(err, message)


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["complete", "x", "--temprature", "1"], ["Unrecognized options: --temprature", "--temperature X"]),
        (["infill", "x", "--top_q", "1"], ["--top_q", "--top_p"]),
        (["chat", "--sistem", "x"], ["--sistem", "--system TEXT"]),
        (["complete", "x", "--dtype", "float8"], ["'float8'", "'float32', 'bfloat16', 'float16'"]),
        (["complete", "x", "--device", "gpu"], ["'gpu' is no device: give cpu, cuda, cuda:N or mps"]),
        (["complete", "x", "--top_p", "7"], ["--top_p: it is 7; give a number, at least 0 and at most 1"]),
        (["complete", "x", "--temperature", "warm"], ["it is 'warm'; give a number"]),
        (["complete", "x", "--temperature", "nan"], ["it is nan; give a number"]),
        (["complete", "x", "--rope_theta", "0"], ["it is 0; give a number, above 0"]),
        (["complete", "x", "--max_gen_len", "1.5"], ["it is 1.5; give a whole number"]),
        (["complete", "x", "--quantize", "int5"], ["'int5' is unknown; did you mean int8?"]),
        (["complete", "x", "--rope_scaling", "{1: 2}"], ["can't be read"]),
        (["complete", "x", "--load_cache", "/nowhere"], ["there is no file or folder /nowhere"]),
        (["chat", "--talk", "/nowhere"], ["there is no file or folder /nowhere"]),
        (
            ["complete", "x", "--save_cache", "/dev/null/c"],
            ["/dev/null can't be written, since"],
        ),
        (["complete"], ["Required options", "PROMPT"]),
        (["complete", "x", "y"], ["Unrecognized options: y"]),
        (["complete", "x", "--fast=maybe"], ["--fast is 'maybe', but it takes no value"]),
    ],
)
def test_mistakes_in_words_are_answered_before_anything_is_loaded(
    codellama: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], messages: list[str]
) -> None:
    monkeypatch.setattr("llama.front.load", lambda *_, **__: pytest.fail("something was loaded"))
    code, out, err = codellama(*words, defaults=False)
    assert (code, out) == (2, "")
    told = " ".join(line.strip("│╭╮╰╯─ ") for line in err.splitlines())
    for message in messages:
        assert message in told


def test_one_person_has_one_row_the_whole_context_and_fast_kernels(
    codellama: Run, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Llama] = []
    original = Llama.stream

    def stream(self: Llama, *args: Any, **options: Any) -> Iterator[Any]:
        built.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(Llama, "stream", stream)
    for kernels, words in ((True, []), (False, []), (True, ["--no_fast"])):
        assert codellama("complete", "x", *words, kernels=kernels)[0] == 0
    assert [type(llama.model.layers[0]).__name__ for llama in built] == ["FusedBlock", *["TransformerBlock"] * 2]
    args = built[0].model.args
    assert (args.max_batch_size, args.max_seq_len) == (1, 4096)  # Llama 2's context, by its theta
    monkeypatch.setattr("llama.interop.plan.free_memory", lambda device: 2_000_000)
    monkeypatch.setenv("CODELLAMA_IGNORE_PLAN", "1")
    assert codellama("complete", "x")[0] == 0
    assert 512 <= built[-1].model.args.max_seq_len < 4096


def test_a_warning_is_a_note(codellama: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """On stderr, so that what is printed stays the text alone."""
    checkpoint.save(tmp_path / "noted", ARGS, WEIGHTS, 1, tiny_checkpoint / "tokenizer.model")
    params = tmp_path / "noted" / "params.json"
    params.write_text(params.read_text().replace("{", '{"use_moe": true,', 1))
    code, out, err = codellama("complete", "x", "--ckpt_dir", str(params.parent), "--max_gen_len", "2", defaults=False)
    assert code == 0
    assert out.startswith("x")
    assert err == f"note: {params}: unknown keys are ignored: use_moe\n"


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help_names_the_commands(codellama: Run, words: list[str]) -> None:
    code, out, err = codellama(*words, defaults=False)
    assert (code, err) == (0, "")
    for name in ("complete", "infill", "chat", "info"):
        assert f"\n  {name} " in out


@pytest.mark.parametrize("verb", ["complete", "infill", "chat", "info"])
def test_help_of_a_verb_explains_every_option(codellama: Run, verb: str) -> None:
    """On standard output, with its default."""
    code, out, err = codellama(verb, "--help", defaults=False)
    assert (code, err) == (0, "")
    options = re.findall(r"│ --(\w+)", out)
    assert len(options) == len(set(options))
    explained = re.split(r"│ --", out)[1:]
    for option in explained:
        text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", option).split())
        assert re.search(r"\((default: .*|repeatable)\)", text), text
        assert len(text) > 30, text


def test_the_version_is_told(codellama: Run) -> None:
    assert codellama("--version", defaults=False) == (0, f"codellama {llama_version}\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_verbs_and_options(codellama: Run, shell: str) -> None:
    code, out, err = codellama("shell_completion", shell, defaults=False)
    assert (code, err) == (0, "")
    for word in ("complete", "infill", "longcontext", "perplexity", "--max_gen_len", "--ckpt_dir"):
        assert word in out
    assert "longcontext perplexity" not in out  # which a shell would offer as one word


def test_an_unknown_command_is_named(codellama: Run) -> None:
    code, _, err = codellama("compleat", "x", defaults=False)
    assert code == 2
    assert "'compleat'; did you mean complete? (there are complete, infill," in err
