"""`codellama download`: which files, and what it says when it fails. The hub is played by two functions."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama.interop import download as module
from llama.interop.download import command, download, wanted

hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")
TEXTS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "LICENSE", "USE_POLICY.md"]
SAFETENSORS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
BIN = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
ORIGINAL = [f"original/{name}" for name in ("consolidated.00.pth", "params.json", "tokenizer.model", "checklist.chk")]
PUBLISHED = ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model", "checklist.chk"]
OTHERS = [".gitattributes", "tf_model.h5", "model.onnx", "training_args.bin", "flax_model.msgpack", "onnx/model.onnx"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (TEXTS + SAFETENSORS + BIN + ORIGINAL + OTHERS, TEXTS + SAFETENSORS),
        (TEXTS + BIN + ORIGINAL + OTHERS, TEXTS + BIN),
        ([*TEXTS, "model.safetensors", "model.fp16.safetensors"], [*TEXTS, "model.safetensors"]),
        ([*PUBLISHED, "LICENSE", *OTHERS], [*PUBLISHED, "LICENSE"]),
        (TEXTS + ORIGINAL + OTHERS, ORIGINAL),
    ],
    ids=["safetensors", "bin", "one file", "published", "original alone"],
)
def test_one_kind_of_weights_is_enough(files: list[str], expected: list[str]) -> None:
    assert wanted(files) == sorted(expected)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (TEXTS + OTHERS, "no model.safetensors"),
        ([], "among its 0 files"),
        (["README.md", "codellama-7b.Q4_K_M.gguf", "codellama-7b.Q8_0.gguf"], "hf download"),
        (["adapter_model.safetensors", "adapter_config.json"], "whole model"),
    ],
)
def test_a_repository_without_weights_is_named(files: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        wanted(files)


Hub = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A function that sets up a hub of one repository, each file 1000 bytes, which fails in the ways given. It returns
    the list of what is asked of snapshot_download from then on."""

    def play(files: list[str], error: Exception | None = None, late: Exception | None = None) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def model_info(repo: str, *, revision: str | None = None, files_metadata: bool = False) -> Any:
            assert files_metadata
            if error is not None:
                raise error
            siblings = [SimpleNamespace(rfilename=name, size=1000) for name in files]
            return SimpleNamespace(siblings=siblings, sha=f"commit of {revision}")

        def snapshot_download(repo: str, **options: Any) -> str:
            asked.append({"repo": repo, **options})
            if late is not None:
                raise late
            for name in options["allow_patterns"]:
                path = Path(options["local_dir"], name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"." * 1000)
            return str(options["local_dir"])

        monkeypatch.setattr(hub, "model_info", model_info)
        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        return asked

    return play


def test_what_was_listed_is_what_is_fetched(play: Hub, tmp_path: Path) -> None:
    asked = play(TEXTS + SAFETENSORS + BIN)
    target = tmp_path / "deep" / "it"
    assert download("owner/name", target, "v1") == target
    (call,) = asked
    assert call["repo"] == "owner/name"
    assert call["revision"] == "commit of v1"
    assert call["local_dir"] == str(target)
    assert call["allow_patterns"] == sorted(TEXTS + SAFETENSORS)


def test_the_folder_is_named_after_the_repository(play: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(PUBLISHED)
    monkeypatch.chdir(tmp_path)
    assert download("owner/CodeLlama-7b") == Path("CodeLlama-7b")
    assert (tmp_path / "CodeLlama-7b" / "params.json").is_file()


def test_original_is_where_the_checkpoint_lies(play: Hub, tmp_path: Path) -> None:
    play(TEXTS + ORIGINAL)
    assert download("owner/name", tmp_path) == tmp_path / "original"


def test_the_command_says_what_to_type_next(play: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(TEXTS + SAFETENSORS)
    command("owner/name", out=str(tmp_path / "it"))
    said = capsys.readouterr().out
    assert f"codellama check {tmp_path / 'it'}" in said
    assert f"--ckpt_dir {tmp_path / 'it'}" in said


def answered(kind: str, status: int) -> Exception:
    """An error of the hub as the library raises it, with the answer that it came from."""
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    error: Exception = getattr(errors, kind)(f"{status} Client Error", response=response)
    return error


@pytest.mark.parametrize("late", [False, True], ids=["listing", "fetching"])
@pytest.mark.parametrize(
    ("error", "named"),
    [
        (answered("GatedRepoError", 403), r"accepted its terms.*https://huggingface.co/owner/name.*hf auth login"),
        (answered("RepositoryNotFoundError", 401), r"no repository 'owner/name'.*OWNER/NAME.*hf auth login"),
        (answered("RevisionNotFoundError", 404), r"no revision v9.*owner/name/commits"),
        (answered("HfHubHTTPError", 503), r"503.*try again later"),
        (errors.HFValidationError("Repo id must be …"), r"no repository 'owner/name'"),
        (errors.OfflineModeIsEnabled("offline"), r"can't be reached.*HF_HUB_OFFLINE"),
        (errors.LocalEntryNotFoundError("no connection"), r"can't be reached.*same command"),
        (errors.HTTPError("[Errno -2] Name or service not known"), r"can't be reached.*network"),
        (OSError(errno.ENOSPC, "No space left on device"), r"disk of .* is full.*same command"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), r"/x can't be written.*--out"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures_are_told_with_the_remedy(play: Hub, tmp_path: Path, error: Exception, named: str, late: bool) -> None:
    play(PUBLISHED, late=error) if late else play(PUBLISHED, error=error)
    with pytest.raises(ValueError, match=named):
        download("owner/name", tmp_path / "it", "v9")


def test_what_nobody_foresaw_is_not_hidden(play: Hub, tmp_path: Path) -> None:
    play(PUBLISHED, late=KeyError("a bug"))
    with pytest.raises(KeyError):
        download("owner/name", tmp_path)


def test_a_full_disk_is_told_before_anything_is_fetched(
    play: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = play(PUBLISHED)  # 5,000 bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4500))
    with pytest.raises(ValueError, match=r"would need .*--out"):
        download("owner/name", tmp_path / "it")
    assert asked == []
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "consolidated.00.pth").write_bytes(b"." * 1000)  # what is here needs no room
    download("owner/name", tmp_path / "it")
    assert len(asked) == 1


def test_without_the_library_the_pip_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'codellama\[hf\]'"):
        module.download("owner/name", tmp_path)
