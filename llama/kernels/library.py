"""kernels.cpp, compiled for this machine and loaded.

The compiler is asked for whatever the processor has (-march=native), so what it makes is kept by the processor's
features, in the user's cache folder: the next start finds it there. It is checked by a few products before it is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")
OFF = "CODELLAMA_NO_KERNELS"
"""Set to anything, this environment variable leaves products to PyTorch's operators."""


class Matrix(ctypes.Structure):
    """kernels.cpp's `Matrix`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero")),
        *((name, ctypes.c_int64) for name in ("kind", "rows", "columns", "group")),
    )


class Block(ctypes.Structure):
    """kernels.cpp's `Block`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention_norm", "ffn_norm")),
        *((name, Matrix) for name in ("wqkv", "wo", "w13", "w2")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    )


class Step(ctypes.Structure):
    """kernels.cpp's `Step`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "dim", "heads", "kv_heads", "head_dim", "hidden")),
        *((name, ctypes.c_int64) for name in ("slots", "cache_kind", "threads")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("vocabulary", "embedding_kind")),
        *((name, ctypes.c_void_p) for name in ("embedding", "ids", "starts", "norm", "cos", "sin")),
        *((name, ctypes.c_void_p) for name in ("qkv", "mixed", "gated")),
    )


_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_MATRIX, _BLOCK, _STEP = (ctypes.POINTER(kind) for kind in (Matrix, Block, Step))
FUNCTIONS = {
    "lanes": (),
    "run_blocks": (_BLOCK, _NUMBER, _STEP, _POINTER),
    "run_half": (_BLOCK, _NUMBER, _STEP, _POINTER, _POINTER),
    "multiply": (_MATRIX, _POINTER, _NUMBER, _POINTER, _NUMBER),
    "decode": (_MATRIX, _NUMBER, _NUMBER, _POINTER, _NUMBER),
}
"""Those of kernels.cpp, and what they take."""


@cache
def available() -> bool:
    """Whether there are kernels here. Where they can't be had, a warning says why, once."""
    if os.environ.get(OFF):
        return False
    try:
        load()
    except ValueError as error:
        warnings.warn(f"{error}. Until then PyTorch's own operators multiply, which is slower", stacklevel=2)
        return False
    return True


@cache
def load() -> ctypes.CDLL:
    """The compiled kernels, made now if they haven't been. ValueError, in a sentence, where that can't be done."""
    path = _folder() / f"kernels-{_key()}.so"
    if not path.exists():
        build(path)
    library = opened(path)
    _check(library)
    return library


def opened(path: Path) -> ctypes.CDLL:
    """What was compiled into `path`, its functions with their types."""
    library = ctypes.CDLL(str(path))
    for name, arguments in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int64 if name in ("lanes", "run_blocks") else None
    return library


def build(path: Path, more_flags: tuple[str, ...] = ()) -> None:
    """Compiles kernels.cpp into `path`, which is whole or not there."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise ValueError(
            "the kernels of llama/kernels need a C++ compiler, and there is neither g++ nor clang++ here: install one "
            "(apt install g++), or name it in the environment variable CXX"
        )
    if os.environ.get("RANK", "0") == "0":
        print("compiling llama/kernels for this processor: once, some ten seconds", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch, path.name)
        command = [*compiler.split(), *FLAGS, *more_flags, str(SOURCE), "-o", str(made), *_openmp()]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            reason = next((line for line in ended.stderr.splitlines() if "error" in line), ended.stderr[-300:])
            raise ValueError(
                f"{compiler} could not compile {SOURCE} ({reason.strip()}): update it (GCC 9 or Clang 12 will do), or "
                "name another in the environment variable CXX"
            )
        made.replace(path)


def _openmp() -> list[str]:
    """PyTorch's own OpenMP, so that its threads and these are the same, and don't wait for each other's processors."""
    folder = Path(torch.__file__).parent
    found = sorted([*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")])
    return [str(found[0])] if found else []


def _folder() -> Path:
    """Where what was compiled is kept: the user's cache folder, or a scratch folder where that can't be written to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codellama"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="codellama-"))


def _key() -> str:
    """Of the source, the flags and the processor: what the result depends on."""
    features = [platform.machine(), platform.processor(), str(_openmp())]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, features)).encode()).hexdigest()[:16]


def _check(library: ctypes.CDLL) -> None:
    """A product of each row of 1 to 300 times 1, by weights of 2: a compiler's or a processor's mistake stops here."""
    columns, rows = 300, 7
    weight, x, out = torch.full((rows, columns), 2.0), torch.arange(1.0, columns + 1), torch.zeros(rows)
    for kind, tensor in ((0, weight), (1, weight.bfloat16())):
        matrix = Matrix(tensor.data_ptr(), None, None, kind, rows, columns, 0)
        library.multiply(ctypes.byref(matrix), x.data_ptr(), 1, out.data_ptr(), 2)
        if not torch.equal(out, torch.full((rows,), float(columns * (columns + 1)))):
            raise ValueError(f"what {SOURCE} was compiled to multiplies wrongly here: name another compiler in CXX")
