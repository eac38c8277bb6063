"""A model from the Hugging Face hub: the files that are needed, and no others.

A repository often holds the same weights two or three times: as safetensors, as pickles, and in `original/` as they
were first published. One of these is enough. Transfers, their resumption and the access tokens are huggingface_hub's
own; what is decided here is which files, whether there is room for them, and what to do when it fails.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama.options import MaybeOut, MaybeText, Positional

PART = r"(-\d+-of-\d+)?"
WEIGHTS = {
    "safetensors": rf"model{PART}\.safetensors",
    "bin": rf"pytorch_model{PART}\.bin",
    "pth": r"consolidated\.\d\d+\.pth",
}
"""The kinds of weights that can be read, the best first, by the names of their files."""
INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}
TEXTS = r".*\.(json|model|txt|md|jinja|chk)|(LICENSE|USE_POLICY|NOTICE).*"
ORIGINAL = "original/"


def wanted(files: Sequence[str]) -> list[str]:
    """Of a repository's files those to download: one kind of weights, and the small files that go with them.

    `original/` is taken only where the repository's own folder has no weights. Raises ValueError where there are none
    at all of a kind that can be read.
    """
    for folder in ("", ORIGINAL):
        names = [file[len(folder) :] for file in files if file.startswith(folder) and "/" not in file[len(folder) :]]
        for kind, pattern in WEIGHTS.items():
            weights = [name for name in names if re.fullmatch(pattern, name)]
            if weights:
                others = {index for other, index in INDEX.items() if other != kind}
                texts = [name for name in names if re.fullmatch(TEXTS, name) and name not in others]
                return sorted(folder + name for name in {*weights, *texts})
    gguf = [file for file in files if file.endswith(".gguf")]
    if gguf:
        raise ValueError(
            f"the repository holds gguf files ({', '.join(gguf[:4])}), of which one is enough: download that one with "
            "`hf download REPO FILE --local-dir DIR`"
        )
    raise ValueError(
        f"the repository holds no model.safetensors, pytorch_model.bin or consolidated.00.pth among its {len(files)} "
        "files: choose the repository of a whole model, such as codellama/CodeLlama-7b-hf"
    )


def download(repo: str, out: str | Path | None = None, revision: str | None = None) -> Path:
    """Downloads a repository (`owner/name`) into `out` (default: its name, in this folder); returns where the
    checkpoint then lies, which may be `out`/original.

    What `out` already holds whole is not fetched again, what is half there is resumed. Raises ValueError, saying what
    to do, where there is no such repository or revision, access is not granted, the hub can't be reached, or the disk
    has no room; and what `wanted` raises.
    """
    target = Path(out if out is not None else repo.rstrip("/").rpartition("/")[2])
    hub = _hub()
    try:
        info = hub.model_info(repo, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        files = wanted(list(sizes))
        _check_room(target, sum(sizes[file] for file in files if not (target / file).is_file()))
        # By its commit, so that what is fetched is what was listed.
        hub.snapshot_download(repo, revision=info.sha or revision, local_dir=str(target), allow_patterns=files)
    except Exception as error:
        refusal = _refusal(hub.errors, error, repo, revision, target)
        if refusal is None:
            raise
        raise ValueError(refusal) from error
    return target / ORIGINAL if all(file.startswith(ORIGINAL) for file in files) else target


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ValueError("downloading needs huggingface_hub: pip install 'codellama[hf]'") from None
    return huggingface_hub


def _check_room(target: Path, needed: int) -> None:
    existing = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"{target} would need {needed / 1e9:,.1f} GB more, and its disk has {free / 1e9:,.1f} GB free: make room, "
            "or pass --out with a folder on another disk"
        )


def _refusal(errors: Any, error: Exception, repo: str, revision: str | None, target: Path) -> str | None:
    """What to tell the user; None for what is not foreseen. A gated repository is a kind of missing one, and every
    answer of the hub a kind of failed request, so the special cases come first."""
    log_in = "log in with `hf auth login`, or set HF_TOKEN to a token from https://huggingface.co/settings/tokens"
    page = f"https://huggingface.co/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is given only to those who have accepted its terms: do so at {page}, then {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision}: choose a branch, a tag or a commit of {page}/commits"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return f"the hub shows no repository {repo!r}: check its name, OWNER/NAME; if it is private, {log_in}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {target} is full: make room and give the same command again; it goes on where it was"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.filename or target} can't be written: pass --out with a folder of your own"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub answered {error.response.status_code} for {repo}: try again later; what has come is kept"
    offline = (errors.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError)
    if isinstance(error, (*offline, TimeoutError)):
        return (
            f"the hub can't be reached ({type(error).__name__}): look to the network, a proxy (HTTPS_PROXY) or "
            "HF_HUB_OFFLINE, and give the same command again; what has come is kept"
        )
    return None


def command(repo: Positional[str], *, revision: MaybeText = None, out: MaybeOut = None) -> None:
    """Downloads REPO (owner/name) from the Hugging Face hub, without what is there twice.

    Args:
        repo: for example codellama/CodeLlama-7b-hf.
        revision: a branch, tag or commit (none: the main branch).
        out: where to (none: a folder of the repository's name).
    """
    folder = download(repo, out, revision)
    print(f"{repo} is in {folder}. What to type now:")
    print(f"  codellama check {folder}")
    print(f"  codellama plan {folder}")
    print(f'  codellama complete "def fibonacci(n):" --ckpt_dir {folder}')
