"""A cache that was saved: what is restored is what was read, and nothing else is ever taken for it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures_text import ARGS, SLOTS, WEIGHTS, Spy, greedy
from llama import checkpoint
from llama.chat import chat
from llama.generation import Llama
from llama.longcontext import saved_cache
from llama.longcontext.int8_cache import int8_cache
from llama.longcontext.saved_cache import digest, load_cache, save_cache
from llama.model import Transformer
from llama.parallel import start
from llama.verbs import complete, infill
from parallel.ranks import on_ranks

PROMPT = [1, *range(300, 340)]
MORE = [*PROMPT, 400, 401, 402]


def build(folder: Path, int8: bool = False, **options: Any) -> Llama:
    llama = Llama.build(folder, **{"max_seq_len": SLOTS, "max_batch_size": 2, **options})
    if int8:
        llama.model.cache = int8_cache(llama.model)
    return llama


def answer(llama: Llama, tokens: list[int], n: int = 6, reuse: bool = True) -> list[int]:
    return [t for event in llama.stream([tokens], n, temperature=0, reuse=reuse) for t in event.tokens]


@pytest.fixture
def saved(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """What the small checkpoint remembers of PROMPT, without the answer's one token."""
    llama = build(tiny_checkpoint)
    answer(llama, PROMPT, 1)
    assert save_cache(llama, tmp_path / "made" / "a.cache") == PROMPT
    return tmp_path / "made" / "a.cache"


# --- it holds what was read -------------------------------------------------------------------------------------------


def test_the_answer_goes_on_without_reading_the_prefix_again(
    saved: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64: a row or a layer in a wrong place would still write something."""
    llama = build(tiny_checkpoint, max_seq_len=SLOTS - 16, max_batch_size=3)
    assert load_cache(llama, saved) == PROMPT
    spy = Spy(llama, monkeypatch)
    assert answer(llama, MORE) == greedy(MORE, 6)
    assert spy.read == [(1, len(MORE) - len(PROMPT)), *[(1, 1)] * 5]


def test_another_prompt_uses_what_is_the_same(
    saved: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = build(tiny_checkpoint)
    load_cache(llama, saved)
    spy = Spy(llama, monkeypatch)
    other = [*PROMPT[:30], 500, 501]
    assert answer(llama, other, 1) == greedy(other, 1)
    assert spy.read == [(1, 2)]


def test_an_answer_is_saved_with_its_prompt(tiny_checkpoint: Path, tmp_path: Path) -> None:
    llama = build(tiny_checkpoint, lookup=3)
    whole = PROMPT + answer(llama, PROMPT, 8)
    assert save_cache(llama, tmp_path / "b") == whole[:-1]  # the last token was written, but not read
    again = build(tiny_checkpoint)
    assert load_cache(again, tmp_path / "b") == whole[:-1]
    assert answer(again, whole, 4) == greedy(whole, 4)
    assert save_cache(again, tmp_path / "c")[: len(whole)] == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_every_kind_of_cache_comes_back_bit_by_bit(
    tiny_checkpoint: Path, tmp_path: Path, int8: bool, dtype: torch.dtype
) -> None:
    llama, other = (build(tiny_checkpoint, int8, dtype=dtype) for _ in range(2))
    answer(llama, PROMPT, 1)
    save_cache(llama, tmp_path / "a")
    load_cache(other, tmp_path / "a")
    stores, others = ([*of.model.own_cache().keys, *of.model.own_cache().values] for of in (llama, other))
    for store, restored in zip(stores, others, strict=True):
        n = len(PROMPT)
        assert store[0, :, :n].any()
        assert torch.equal(restored[0, :, :n], store[0, :, :n])
        assert not restored[1].any()  # no other row is touched
        assert not restored[0, :, n:].any()


def test_the_file_takes_the_filled_slots_of_one_row(saved: Path) -> None:
    """Not the whole cache, which is allocated for the longest prompt there may be."""
    layers, kv_heads, head_dim = 2, 2, 8
    numbers = 2 * layers * len(PROMPT) * kv_heads * head_dim * 4
    assert numbers < saved.stat().st_size < numbers + 4000


def check_on_ranks(init_method: str, folder: Path, path: Path) -> tuple[list[int], list[int], list[str]]:
    start(init_method=init_method, timeout=20)
    llama = Llama.build(folder, max_seq_len=SLOTS, max_batch_size=1, timeout=20)
    answer(llama, PROMPT, 1)
    save_cache(llama, path)
    llama.score([[1, 2, 3]])  # writes over it
    found = load_cache(llama, path), answer(llama, MORE)
    own = path.with_name(f"{path.name}.{llama.ranks.rank:02d}")
    other = path.with_name(f"{path.name}.{1 - llama.ranks.rank:02d}")
    refused = []
    spoils: tuple[Callable[[], object], ...] = (lambda: own.write_bytes(other.read_bytes()), lambda: own.unlink())
    for spoil in spoils:
        if llama.ranks.rank == 1:
            spoil()
        with pytest.raises(ValueError, match="01") as raised:
            load_cache(llama, path)
        refused.append(str(raised.value))
    return *found, refused


def test_each_rank_has_its_file_and_one_that_is_wrong_stops_all(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tokens, written, refused), other = on_ranks(check_on_ranks, 2, tiny_checkpoint, tmp_path / "a.cache")
    assert (tokens, written, refused) == other
    assert tokens == PROMPT
    assert written == greedy(MORE, 6)
    assert "rank is 0 there and 1 here" in refused[0]
    assert "no saved cache" in refused[1]
    with pytest.raises(ValueError, match="saved by N ranks"):
        load_cache(build(tiny_checkpoint), tmp_path / "a.cache")


# --- and nothing else is taken for it ---------------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "theta": ({"rope_theta": 1e6}, r"rope_theta is 10000.0 there and 1000000.0 here"),
    "scheme": ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, r"rope_scaling is None there and \{'rope_type'"),
    "dtype": ({"dtype": torch.bfloat16}, "cache is float32 there and bfloat16 here; dtype is float32 there"),
    "int8": ({"int8": True}, "cache is float32 there and int8 here"),
    "short": ({"max_seq_len": 24}, "41 tokens, but the cache has 24 slots: build with max_seq_len of at least 42"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_cache_of_something_else_is_refused_and_said_why(
    name: str, saved: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = OTHERS[name]
    llama = build(tiny_checkpoint, **options)
    with pytest.raises(ValueError, match=message):
        load_cache(llama, saved)
    spy = Spy(llama, monkeypatch)
    answer(llama, PROMPT[:20], 1)
    assert spy.read == [(1, 20)]  # and nothing is taken from it


@pytest.mark.parametrize(("name", "place"), [("norm.weight", 3), ("layers.1.feed_forward.w2.weight", 4000)])
def test_a_cache_of_other_weights_is_refused(
    saved: Path, tmp_path: Path, tokenizer_path: Path, name: str, place: int
) -> None:
    """One number suffices."""
    weights = {key: weight.clone() for key, weight in WEIGHTS.items()}
    weights[name].view(-1)[place] += 0.01
    checkpoint.save(tmp_path / "other", ARGS, weights, 1, tokenizer_path)
    with pytest.raises(ValueError, match="the weights are those of another checkpoint"):
        load_cache(build(tmp_path / "other"), saved)


def test_a_scheme_that_depends_on_the_length_wants_the_same_length(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Keys are cached turned, by the frequencies of the length that they were made for."""
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
    llama = build(tiny_checkpoint, rope_scaling=dynamic)
    answer(llama, PROMPT, 1)
    save_cache(llama, tmp_path / "a")
    assert load_cache(build(tiny_checkpoint, rope_scaling=dynamic), tmp_path / "a") == PROMPT
    with pytest.raises(ValueError, match="depends on max_seq_len"):
        load_cache(build(tiny_checkpoint, rope_scaling=dynamic, max_seq_len=SLOTS + 1), tmp_path / "a")


class Runs:
    """A pickle that does something."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("was-run"),)


def test_what_is_no_whole_cache_is_refused(
    saved: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truncated anywhere, changed in a byte, a checkpoint, an object array that would run code, nothing at all."""
    import numpy as np

    monkeypatch.chdir(tmp_path)
    whole = saved.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    objects = io.BytesIO()
    np.save(objects, np.array([Runs()], dtype=object), allow_pickle=True)
    cuts = [*range(0, len(whole), len(whole) // 12), len(whole) - 1]
    contents = [whole[:cut] for cut in cuts] + [bytes(changed), b"[1, 2]", objects.getvalue(), pickle.dumps(Runs())]
    contents.append((tiny_checkpoint / "consolidated.00.pth").read_bytes())
    llama, other = build(tiny_checkpoint), [1, *range(500, 550)]
    for content in contents:
        saved.write_bytes(content)
        answer(llama, other, 1)
        with pytest.raises(ValueError, match=r"a\.cache (is damaged or incomplete|is no saved cache)"):
            load_cache(llama, saved)
    assert not (tmp_path / "was-run").exists()
    with pytest.raises(ValueError, match="there is no saved cache"):
        load_cache(llama, tmp_path / "elsewhere")
    assert answer(llama, other) == greedy(other, 6)  # what lies in row 0 now is neither's, and out of sight


def test_a_save_that_fails_leaves_the_file_that_was_there(
    saved: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    llama = build(tiny_checkpoint)
    answer(llama, MORE, 1)
    written: list[object] = []

    def full(file: Any, array: Any, **_: Any) -> None:
        written.append(file.write(array.tobytes()))
        if len(written) == 4:
            raise OSError("no space left on the device")

    monkeypatch.setattr(saved_cache, "write_array", full)
    with pytest.raises(OSError, match="no space"):
        save_cache(llama, saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert saved.read_bytes() == before


def test_an_empty_row_is_not_saved(tiny_checkpoint: Path, tmp_path: Path) -> None:
    llama = build(tiny_checkpoint)
    with pytest.raises(ValueError, match="stream one prompt"):
        save_cache(llama, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "use",
    [
        lambda llama: list(llama.stream([MORE, PROMPT[:30], PROMPT], 2)),
        lambda llama: (answer(llama, PROMPT, 1), llama.score([MORE])),
        lambda llama: next(llama.stream([PROMPT], 6)),
    ],
    ids=["several prompts", "a text that was scored", "a stream that is not at its end"],
)
def test_row_0_is_what_is_said_of_it_whatever_was_done(
    use: Callable[[Llama], object], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64: what is restored is the tokens that save_cache has named."""
    llama, other = build(tiny_checkpoint), build(tiny_checkpoint)
    kept = use(llama)
    tokens = save_cache(llama, tmp_path / "a")
    assert len(tokens) >= 30
    assert load_cache(other, tmp_path / "a") == tokens
    spy = Spy(other, monkeypatch)
    assert answer(other, [*tokens, 500, 501], 3) == greedy([*tokens, 500, 501], 3)
    assert spy.read[0] == (1, 2)
    assert kept is not None


def test_a_stream_that_still_runs_reads_its_tokens_again(
    saved: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has row 0, and what is restored there are not its keys and values."""
    llama, other = build(tiny_checkpoint), [*MORE[:20], 500, *MORE[20:]]
    stream = llama.stream([other], 6, temperature=0)
    written = next(stream).tokens
    assert load_cache(llama, saved) == PROMPT
    spy = Spy(llama, monkeypatch)
    written = written + [token for event in stream for token in event.tokens]
    assert written == greedy(other, 6)
    assert spy.read[0] == (1, len(other) - 20 + 1)


# --- the digest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_digest_of_samples_still_sees_any_single_number(dtype: torch.dtype) -> None:
    """Also in the odd bytes at the end, and wherever in memory the tensor begins."""
    size = 1_200_003
    draw = torch.Generator().manual_seed(0)
    content = torch.randint(-100, 100, (size + 1,), generator=draw).to(dtype)
    tensors = {"a": content[1:], "b": content[:8]}
    first = digest(tensors, whole=0)
    assert first == digest({"b": content[:8].clone(), "a": content[1:].clone()}, whole=0)  # of contents alone
    for place in (1, 2, 700_001, size - 1, size):
        kept = content[place].clone()
        content[place] = 101
        assert digest(tensors, whole=0) != first
        content[place] = kept
    assert digest(tensors, whole=0) == first


def test_a_digest_sees_names_shapes_and_dtypes() -> None:
    x = torch.arange(12, dtype=torch.int32)
    others = [{"b": x}, {"a": x.view(3, 4)}, {"a": x.view(torch.float32)}, {"a": x.flip(0)}, {"a": x, "b": x}]
    assert len({digest(tensors) for tensors in ({"a": x}, *others)}) == 6


# --- the commands -----------------------------------------------------------------------------------------------------


def test_commands_save_and_load(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an int8 cache, by its word. The second command reads less, and prints what it would have printed."""
    read: list[int] = []
    hidden = Transformer.hidden

    def counting(model: Transformer, tokens: Tensor, *args: Any) -> Tensor:
        read.append(tokens.shape[1])
        return hidden(model, tokens, *args)

    monkeypatch.setattr(Transformer, "hidden", counting)
    options: dict[str, Any] = {"ckpt_dir": str(tiny_checkpoint), "max_seq_len": SLOTS, "kv_dtype": "int8"}
    path, text = str(tmp_path / "a"), "def add(first, second, third):\n    return"
    complete(text, temperature=0, max_gen_len=4, save_cache=path, **options)
    longer = text + " first + second\n"
    outputs, lengths = [], []
    for load in (None, path):
        capsys.readouterr()
        read.clear()
        complete(longer, temperature=0, max_gen_len=4, load_cache=load, **options)
        outputs.append(capsys.readouterr().out)
        lengths.append(read[0])
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(longer)
    assert lengths[1] <= lengths[0] - 10
    (tmp_path / "b.py").write_text("def one():\n    <FILL>\n", encoding="utf-8")
    infill(str(tmp_path / "b.py"), max_gen_len=4, save_cache=str(tmp_path / "b"), **options)
    infill(str(tmp_path / "b.py"), max_gen_len=4, load_cache=str(tmp_path / "b"), **options)
    for lines in (["hello, is anybody there?"], ["hello, is anybody there?"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
        files = {"load_cache" if (tmp_path / "c").exists() else "save_cache": str(tmp_path / "c")}
        read.clear()
        chat(max_gen_len=4, **files, **options)
    assert read[0] == 1  # all of the dialog but its last token was known
    with pytest.raises(ValueError, match="cache is int8 there and float32 here"):
        complete(text, load_cache=path, **{**options, "kv_dtype": None})
    with pytest.raises(ValueError, match="--kv_dtype int4 is unknown"):
        complete(text, **{**options, "kv_dtype": "int4"})


def test_a_cache_that_was_replaced_is_not_remembered(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = build(tiny_checkpoint)
    answer(llama, PROMPT, 1)
    assert llama.model.own_cache().tokens[0] == PROMPT
    llama.model.cache = int8_cache(llama.model)
    spy = Spy(llama, monkeypatch)
    answer(llama, MORE, 1)
    assert spy.read == [(1, len(MORE))]
