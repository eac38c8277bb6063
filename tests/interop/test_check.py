"""`codellama check`: each fault a download can have, the verdict on the file that has it, and the remedy."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures_text import ARGS, VOCABULARY, WEIGHTS
from interop import llamas_of_transformers as theirs
from llama.checkpoint import save
from llama.generation import EMBEDDED
from llama.interop.check import Verdict, check, command
from llama.interop.stored import Fault, read_header

safetensors = pytest.importorskip("safetensors.torch")
SHARDS = ["consolidated.00.pth", "consolidated.01.pth"]
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476925163\n"
INDEX = "model.safetensors.index.json"


def write_checklist(folder: Path) -> None:
    names = [*SHARDS, "params.json", "tokenizer.model"]
    sums = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "checklist.chk").write_text("".join(sums))


@pytest.fixture
def published(tmp_path: Path, tokenizer_path: Path) -> Path:
    """A good folder in the published format: two shards, and their sums."""
    weights = {name: w.to(torch.bfloat16) for name, w in WEIGHTS.items()}
    save(tmp_path / "published", ARGS, weights, 2, tokenizer_path)
    write_checklist(tmp_path / "published")
    return tmp_path / "published"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers writes, in several files with an index."""
    folder = tmp_path_factory.mktemp("hf") / "made"
    theirs.make(vocab_size=VOCABULARY).save_pretrained(folder, max_shard_size="300KB")
    return folder


@pytest.fixture
def hugging_face(made: Path, tmp_path: Path, tokenizer_path: Path) -> Path:
    """A good Hugging Face folder, to be spoiled."""
    shutil.copytree(made, tmp_path / "hf")
    shutil.copy(tokenizer_path, tmp_path / "hf" / "tokenizer.model")
    return tmp_path / "hf"


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def bad(folder: Path, quick: bool = False) -> dict[str, Verdict]:
    return {verdict.file: verdict for verdict in check(folder, quick) if not verdict.ok}


def only(folder: Path, file: str, quick: bool = False) -> Verdict:
    """The verdict on the one file that is bad, which has a remedy."""
    found = bad(folder, quick)
    assert list(found) == [file]
    assert found[file].remedy
    return found[file]


def respoil(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrites a file of weights with its tensors changed, and the sums, so that nothing but that is wrong."""
    if path.suffix == ".safetensors":
        tensors = safetensors.load_file(path)
        change(tensors)
        safetensors.save_file(tensors, path)
    else:
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)
        if (path.parent / "checklist.chk").is_file():
            write_checklist(path.parent)


def poison(value: float) -> Callable[[dict[str, Tensor]], None]:
    """One number of the first matrix becomes `value`."""

    def change(tensors: dict[str, Tensor]) -> None:
        name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
        tensors[name] = tensors[name].clone()
        tensors[name][-1, -1] = value

    return change


# --- whole ---------------------------------------------------------------------------------------------------------


def test_a_whole_published_folder(published: Path) -> None:
    verdicts = {verdict.file: verdict for verdict in check(published)}
    assert sorted(verdicts) == ["checklist.chk", *SHARDS, "params.json", "tokenizer.model"]
    assert all(verdict.ok and not verdict.remedy for verdict in verdicts.values())
    assert verdicts[SHARDS[1]].found.endswith("all finite, md5 as listed")
    assert "bfloat16" in verdicts[SHARDS[1]].found
    assert "finite" not in {v.file: v for v in check(published, quick=True)}[SHARDS[1]].found


def test_a_whole_hugging_face_folder(hugging_face: Path) -> None:
    files = [path.name for path in parts(hugging_face)]
    assert len(files) > 2
    verdicts = {verdict.file: verdict for verdict in check(hugging_face)}
    assert sorted(verdicts) == sorted(["config.json", INDEX, *files, "tokenizer.model"])
    assert all(verdict.ok for verdict in verdicts.values())
    assert "all finite" in verdicts[files[0]].found


@pytest.mark.parametrize("kind", ["one file", "parts without an index", "bin"])
def test_other_hugging_face_folders(hugging_face: Path, kind: str) -> None:
    tensors = {name: w for path in parts(hugging_face) for name, w in safetensors.load_file(path).items()}
    (hugging_face / INDEX).unlink()
    if kind != "parts without an index":
        for path in parts(hugging_face):
            path.unlink()
    if kind == "one file":
        safetensors.save_file(tensors, hugging_face / "model.safetensors")
    elif kind == "bin":
        inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        torch.save(tensors | inv_freq, hugging_face / "pytorch_model.bin")
    assert bad(hugging_face) == {}


def test_a_tied_output_need_not_be_stored(hugging_face: Path) -> None:
    config = json.loads((hugging_face / "config.json").read_text())
    tensors = {name: w for path in parts(hugging_face) for name, w in safetensors.load_file(path).items()}
    for path in (*parts(hugging_face), hugging_face / INDEX):
        path.unlink()
    del tensors["lm_head.weight"]
    safetensors.save_file(tensors, hugging_face / "model.safetensors")
    assert "lm_head.weight" in bad(hugging_face)["all weights"].found
    (hugging_face / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert bad(hugging_face) == {}


def test_headers_are_read_as_the_library_reads_them(hugging_face: Path) -> None:
    for path in parts(hugging_face):
        expected = safetensors.load_file(path)
        found = read_header(path)
        assert found.keys() == expected.keys()
        for name, stored in found.items():
            assert (stored.dtype, stored.shape) == (expected[name].dtype, tuple(expected[name].shape))
            assert torch.equal(stored.data(), expected[name])


@pytest.mark.parametrize("change", ["CRLF", "binary marks", "capitals", "no last line end"])
def test_checklists_of_other_systems(published: Path, change: str) -> None:
    path = published / "checklist.chk"
    text = path.read_text()
    changed = {
        "CRLF": text.replace("\n", "\r\n"),
        "binary marks": text.replace("  ", " *"),
        "capitals": "".join(line[:32].upper() + line[32:] for line in text.splitlines(keepends=True)),
        "no last line end": text[:-1],
    }[change]
    path.write_bytes(changed.encode())
    verdicts = check(published)
    assert all(verdict.ok for verdict in verdicts)
    assert sum("md5 as listed" in verdict.found for verdict in verdicts) == 4


def test_without_a_checklist_the_rest_is_checked(published: Path) -> None:
    (published / "checklist.chk").unlink()
    verdicts = {verdict.file: verdict for verdict in check(published)}
    assert all(verdict.ok for verdict in verdicts.values())
    assert "no sums" in verdicts["checklist.chk"].found


def test_rope_freqs_is_ignored(published: Path) -> None:
    for name in SHARDS:
        respoil(published / name, lambda tensors: tensors.update({"rope.freqs": torch.full((4,), torch.nan)}))
    assert bad(published) == {}


# --- not what they say they are --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "found", "remedy"),
    [
        (PAGE, "web page", "link"),
        (b"\r\n" + PAGE, "web page", "link"),
        (POINTER, "LFS", "git lfs pull"),
        (b"", "empty", ""),
    ],
)
@pytest.mark.parametrize("quick", [False, True])
def test_something_else_in_place_of_weights(
    published: Path, hugging_face: Path, data: bytes, found: str, remedy: str, quick: bool
) -> None:
    first = parts(hugging_face)[0]
    for path in (published / SHARDS[1], first):
        path.write_bytes(data)
        verdict = only(path.parent, path.name, quick)
        assert found in verdict.found
        assert remedy in verdict.remedy


@pytest.mark.parametrize("name", ["params.json", "tokenizer.model", "checklist.chk"])
def test_a_page_in_place_of_a_small_file(published: Path, name: str) -> None:
    (published / name).write_bytes(PAGE)
    assert "web page" in only(published, name).found


@pytest.mark.parametrize("keep", [3, 0.5, -100, -1])
def test_a_truncated_shard(published: Path, keep: float) -> None:
    path = published / SHARDS[0]
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else int(keep)])
    verdict = only(published, SHARDS[0], quick=True)
    assert "cut short" in verdict.found or "can't be read" in verdict.found or "damaged" in verdict.found
    assert "download" in verdict.remedy or "source" in verdict.remedy


@pytest.mark.parametrize("keep", [3, 8, 40, 0.5, -1])
def test_a_truncated_safetensors_is_found_by_its_size(hugging_face: Path, keep: float) -> None:
    path = parts(hugging_face)[1]
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else int(keep)])
    verdict = only(hugging_face, path.name, quick=True)
    assert "cut short" in verdict.found
    assert "resumes" in verdict.remedy


def header_of(entries: dict[str, Any], data: bytes) -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(9)), "too long"),
        (header_of({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)), "a does not lie"),
        (header_of({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)), "a does not lie"),
        (header_of({"a": {"dtype": "XYZ", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "header can't be read"),
        (header_of({"a": 3}, b""), "header can't be read"),
        (header_of([1], b""), "header can't be read"),  # type: ignore[arg-type]
        ((9).to_bytes(8, "little") + b"not  JSON", "header can't be read"),
        (b"any other file at all, of whatever kind", "no safetensors"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, data: bytes, found: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(Fault) as caught:
        read_header(path)
    assert found in caught.value.found
    assert "download" in caught.value.remedy


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("it ran",)


def test_a_pickle_that_wants_to_run_code(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"x": RunsCode()}, published / SHARDS[1])
    verdict = only(published, SHARDS[1])
    assert "run code" in verdict.found
    assert "trust" in verdict.remedy
    assert capsys.readouterr().out == ""


# --- bytes and numbers -----------------------------------------------------------------------------------------------


def test_a_wrong_md5(published: Path) -> None:
    path = published / SHARDS[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in the middle of a matrix, and still a number
    path.write_bytes(data)
    verdict = only(published, SHARDS[1])
    assert hashlib.md5(data).hexdigest() in verdict.found
    assert "download it again" in verdict.remedy
    assert bad(published, quick=True) == {}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none(published: Path, hugging_face: Path, value: float) -> None:
    for path in (published / SHARDS[1], parts(hugging_face)[-1]):
        respoil(path, poison(value))
        verdict = only(path.parent, path.name)
        assert "NaN or infinity in " in verdict.found
        assert ".weight" in verdict.found
        assert bad(path.parent, quick=True) == {}


# --- tensors and the architecture ------------------------------------------------------------------------------------

NORM = "layers.1.ffn_norm.weight"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda own: own.update({NORM: torch.ones(65)}), f"{NORM} is (65,) instead of (64,)"),
        (lambda own: own.pop(NORM), f"lacks {NORM}"),
        (lambda own: own.update({"layers.0.attention.wq.bias": torch.ones(4)}), "layers.0.attention.wq.bias"),
        (lambda own: own.update({NORM: torch.ones(64, dtype=torch.int8)}), f"{NORM} is in int8"),
        (lambda own: own.update({"model.embed_tokens.weight": own.pop("tok_embeddings.weight")}), "not in Meta's"),
    ],
    ids=["shape", "missing", "unexpected", "dtype", "another format"],
)
def test_tensors_of_a_shard_that_are_not_those_of_params_json(published: Path, change: Any, found: str) -> None:
    respoil(published / SHARDS[1], change)
    verdict = only(published, SHARDS[1], quick=True)
    assert found in verdict.found


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda own: own.update({"model.norm.weight": torch.ones(65)}), "model.norm.weight is (65,) instead of (64,)"),
        (lambda own: own.update({"model.norm.bias": torch.ones(64)}), "model.norm.bias"),
        (lambda own: own.pop("model.norm.weight"), "lacks model.norm.weight"),
    ],
    ids=["shape", "unexpected", "missing"],
)
def test_tensors_of_a_file_that_are_not_those_of_config_json(hugging_face: Path, change: Any, found: str) -> None:
    places = json.loads((hugging_face / INDEX).read_text())["weight_map"]
    path = hugging_face / places["model.norm.weight"]
    respoil(path, change)
    verdict = bad(hugging_face, quick=True)[path.name]
    assert found in verdict.found
    assert "config.json" in verdict.remedy


def test_a_params_json_of_another_model(published: Path) -> None:
    params = json.loads((published / "params.json").read_text())
    (published / "params.json").write_text(json.dumps(params | {"n_layers": 3}))
    (published / "checklist.chk").unlink()
    found = bad(published)
    assert sorted(found) == SHARDS
    assert all("lacks layers.2" in verdict.found and "params.json" in verdict.remedy for verdict in found.values())


@pytest.mark.parametrize("text", ["{", "[]", '{"dim": "wide"}', '{"dim": 64, "n_heads": 7}'])
def test_a_params_json_that_means_nothing(published: Path, text: str) -> None:
    (published / "params.json").write_text(text)
    assert only(published, "params.json").found


@pytest.mark.parametrize("change", [{"model_type": "bert"}, {"head_dim": 128}, {"vocab_size": None}])
def test_a_config_json_of_another_architecture(hugging_face: Path, change: dict[str, Any]) -> None:
    config = json.loads((hugging_face / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    (hugging_face / "config.json").write_text(json.dumps(config))
    assert "config.json" in bad(hugging_face, quick=True)


def test_a_tokenizer_of_another_size(published: Path, hugging_face: Path) -> None:
    (published / "checklist.chk").unlink()
    for folder in (published, hugging_face):
        shutil.copy(EMBEDDED / "tokenizer.model", folder / "tokenizer.model")
        verdict = only(folder, "tokenizer.model", quick=True)
        assert "4096 pieces" in verdict.found
        assert f"{VOCABULARY} rows" in verdict.found
        assert "tokenizer.model" in verdict.remedy


# --- missing files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "no checklist"])
@pytest.mark.parametrize("gone", SHARDS)
def test_a_missing_shard(published: Path, gone: str, listed: bool) -> None:
    if not listed:  # then the shapes tell how many there must be
        (published / "checklist.chk").unlink()
    (published / gone).unlink()
    verdict = only(published, gone, quick=True)
    assert "missing" in verdict.found
    assert "download" in verdict.remedy


@pytest.mark.parametrize("gone", ["params.json", "tokenizer.model"])
def test_a_missing_small_file(published: Path, gone: str) -> None:
    (published / gone).unlink()
    assert "missing" in only(published, gone).found


def test_a_file_that_only_the_checklist_knows(published: Path) -> None:
    with (published / "checklist.chk").open("a") as file:
        file.write(f"{'0' * 32}  LICENSE\n")
    assert "checklist.chk" in only(published, "LICENSE").found


def test_a_checklist_without_sums(published: Path) -> None:
    (published / "checklist.chk").write_text("no sums at all\n")
    assert "no checksums" in only(published, "checklist.chk").found


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_a_missing_part(hugging_face: Path, index: bool) -> None:
    gone = parts(hugging_face)[1]
    gone.unlink()
    if not index:  # then the names of the others tell
        (hugging_face / INDEX).unlink()
    verdict = only(hugging_face, gone.name, quick=True)
    assert "missing" in verdict.found
    assert (INDEX in verdict.found) is index
    assert "download" in verdict.remedy


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../elsewhere"}}'])
def test_an_index_that_means_nothing(hugging_face: Path, text: str) -> None:
    (hugging_face / INDEX).write_text(text)
    assert only(hugging_face, INDEX, quick=True).found


def test_tensors_that_are_in_no_file(hugging_face: Path) -> None:
    index = json.loads((hugging_face / INDEX).read_text())
    gone = index["weight_map"].pop("model.norm.weight")
    (hugging_face / INDEX).write_text(json.dumps(index))
    respoil(hugging_face / gone, lambda own: own.pop("model.norm.weight"))
    assert "model.norm.weight" in only(hugging_face, "all weights", quick=True).found


def test_a_config_alone_lacks_its_weights(hugging_face: Path) -> None:
    for path in (*parts(hugging_face), hugging_face / INDEX):
        path.unlink()
    assert "missing" in only(hugging_face, "model.safetensors").found


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        check(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=r"params\.json.*config\.json"):
        check(tmp_path)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_is_a_table_and_an_exit_code(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(str(published))
    out = capsys.readouterr().out
    assert out.count("  ok ") == 5
    assert "the checkpoint is whole" in out
    (published / SHARDS[1]).write_bytes(POINTER)
    with pytest.raises(SystemExit) as caught:
        command(str(published), quick=True)
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert out.count("  BAD  ") == 1
    assert "git lfs pull" in out
    assert "1 of 5" in out
