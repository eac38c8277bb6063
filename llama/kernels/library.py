"""kernels.cpp, compiled for this machine and loaded.

The compiler is asked for whatever the processor has (-march=native), so what it makes is kept by the processor's
features, in the user's cache folder: the next start finds it there. It is checked by a few products before it is used.

A library that is loaded runs as the user, so the folder and the file must be the user's alone. The last 32 bytes of a
file are the SHA-256 of those before them, which a loader doesn't read: a damaged file is compiled again, not loaded.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("kernels.cpp")
PARTS = (SOURCE, SOURCE.with_name("fours.h"), SOURCE.with_name("tiles.h"))
"""What is compiled: the file, and what it includes."""
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi")
EXACT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""What the kernels read and write, whatever PyTorch's defaults are."""
NF4_LEVELS = (
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0),
)
"""QLoRA's NormalFloat to four digits, to check the kernels by."""
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


class Prompt(ctypes.Structure):
    """kernels.cpp's `Prompt`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "out", "starts")),
        *((name, ctypes.c_int64) for name in ("kind", "rows", "tokens", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_token", "q_head", "kv_row", "kv_head", "threads")),
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
    "multiplies_bfloat16": (),
    "multiplies_bytes": (),
    "sum_of_threads": (_NUMBER,),
    "run_blocks": (_BLOCK, _NUMBER, _STEP, _POINTER),
    "run_half": (_BLOCK, _NUMBER, _STEP, _POINTER, _POINTER),
    "attend_prompt": (ctypes.POINTER(Prompt),),
    "turn": (_POINTER, *(_NUMBER,) * 5, _POINTER, _POINTER, _NUMBER, _NUMBER),
    "gate": (_POINTER, _NUMBER, _NUMBER, _POINTER, _NUMBER),
    "multiply": (_MATRIX, _POINTER, _NUMBER, _POINTER, _NUMBER),
    "has_tiles": (),
    "multiply_many": (_MATRIX, _POINTER, _NUMBER, _POINTER, _NUMBER),
    "decode": (_MATRIX, _NUMBER, _NUMBER, _POINTER, _NUMBER, _NUMBER),
}
"""Those of kernels.cpp, and what they take."""
RETURNING = ("lanes", "multiplies_bfloat16", "multiplies_bytes", "has_tiles", "sum_of_threads", "run_blocks")
"""Those that return a number."""


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


def is_compiled() -> bool:
    """Whether `available` would find the kernels compiled, so that nobody waits for a compiler."""
    return not os.environ.get(OFF) and _is_whole(_folder() / f"kernels-{_key()}.so")


def compile_in_background() -> bool:
    """Starts a process that compiles the kernels and outlives this one; False where there is no compiler, or no place
    to keep them."""
    folder = _folder()
    if os.environ.get(OFF) or not _compiler() or not os.access(folder if folder.is_dir() else Path.home(), os.W_OK):
        return False
    words = [sys.executable, "-c", "from llama.kernels.library import compile_alone; compile_alone()"]
    null = subprocess.DEVNULL
    subprocess.Popen(words, start_new_session=True, stdin=null, stdout=null, stderr=null)
    return True


def compile_alone() -> None:
    """Compiles the kernels, unless another process is at it."""
    os.nice(10)
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "compiling").open("w") as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        load()


@cache
def load() -> ctypes.CDLL:
    """The compiled kernels, made now if they haven't been. ValueError, in a sentence, where that can't be done."""
    try:
        path = _place()
        if not _is_whole(path):
            build(path)
        library = opened(path)
        try:
            _check(library)
        except ValueError:
            path.unlink()  # another compiler, or a newer one, shall have its try
            raise
        return library
    except (OSError, RuntimeError, AttributeError) as error:
        raise ValueError(f"the kernels of llama/kernels can't be compiled or loaded here ({error})") from error


def opened(path: Path) -> ctypes.CDLL:
    """What was compiled into `path`, its functions with their types."""
    library = ctypes.CDLL(str(path))
    for name, arguments in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int64 if name in RETURNING else None
    return library


def build(path: Path, more_flags: tuple[str, ...] = ()) -> None:
    """Compiles kernels.cpp into `path`, which is whole, with its digest, or not there. Only the user may write it."""
    compiler = _compiler()
    if not compiler:
        raise ValueError(
            "the kernels of llama/kernels need a C++ compiler, and there is neither g++ nor clang++ here: install one "
            "(apt install g++), or name it in the environment variable CXX"
        )
    if os.environ.get("RANK", "0") == "0":
        print("compiling llama/kernels for this processor: once, ten to fifty seconds", file=sys.stderr)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch, path.name)
        command = [*compiler, *FLAGS, *more_flags, str(SOURCE), "-o", str(made), *_openmp(compiler)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            reason = next((line for line in ended.stderr.splitlines() if "error" in line), ended.stderr[-300:])
            raise ValueError(
                f"{' '.join(compiler)} could not compile {SOURCE} ({reason.strip()}): update it (GCC 9 or Clang 12, "
                "with OpenMP, will do), or name another in the environment variable CXX"
            )
        with made.open("r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
        made.chmod(0o700)  # a lenient umask would let the group write it
        made.replace(path)


def _compiler() -> list[str]:
    """The compiler's command; empty where there is none."""
    named = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    return shlex.split(named) if named else []


def _openmp(compiler: Sequence[str]) -> list[str]:
    """PyTorch's own OpenMP, so that its threads and these are the same, and don't wait for each other's processors. It
    is GCC's: Clang brings another, and takes functions of this one for its own."""
    folder = Path(torch.__file__).parent
    found = sorted([*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")])
    return [str(found[0])] if found and "clang" not in Path(compiler[0]).name else []


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codellama"


def _place() -> Path:
    """Where what was compiled is, or is to be: in the user's cache folder, or in a new scratch folder where that
    can't be written to, or others can write to it."""
    name = f"kernels-{_key()}.so"
    folder = _folder()
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    foreign = next((path for path in (folder, folder / name) if path.exists() and not _is_private(path)), None)
    if foreign:
        warnings.warn(
            f"{foreign} belongs to another user, or others can write to it, so kernels are not kept there: remove "
            "it, or make it yours alone (chown, chmod go-w)",
            stacklevel=2,
        )
    elif _is_whole(folder / name) or (folder.is_dir() and os.access(folder, os.W_OK)):
        return folder / name
    scratch = tempfile.mkdtemp(prefix="codellama-")  # nobody else can have put anything there
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return Path(scratch, name)


def _is_private(path: Path) -> bool:
    """Whether it is this user's, and nobody else can write to it."""
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_whole(path: Path) -> bool:
    """Whether a file is there, and ends in the digest of what stands before it."""
    if not path.is_file():
        return False
    contents = path.read_bytes()
    return hashlib.sha256(contents[:-32]).digest() == contents[-32:]


def _key() -> str:
    """Of what the result depends on: the source, the compiler's command, and the processor."""
    features = [platform.machine(), platform.processor(), *_compiler(), torch.__version__]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    sources = [part.read_bytes() for part in PARTS]
    return hashlib.sha256(repr((sources, FLAGS, features)).encode()).hexdigest()[:16]


def _must_be_near(found: torch.Tensor, right: torch.Tensor, most: float) -> None:
    if not (found - right).abs().amax() <= most:
        raise ValueError(f"what {SOURCE} was compiled to multiplies wrongly here: name another compiler in CXX")


def _check(library: ctypes.CDLL) -> None:
    """Products of 1 to 127, by rows of which no two columns beside each other are alike, of one vector and of several,
    and two threads that know which they are: where a compiler or a processor gets those wrong, it stops here."""
    columns, rows = 320, 35
    x = torch.arange(columns, **EXACT) % 127 + 1  # whole numbers that bfloat16 has, and 8 bits
    weight = (7 * x % 15 - 7).repeat(rows, 1)  # -7 to 7
    places = (weight + 8).to(torch.uint8)
    fours = places[:, ::2] << 4 | places[:, 1::2]
    levels = torch.tensor(NF4_LEVELS, **EXACT)[places.long()]
    one = torch.ones(rows, 10, dtype=torch.bfloat16, device="cpu")
    of_rows = one[:, 0].contiguous()
    # `most` is how far off it may be: 127 is no part of what 16 bits have, and nf4's levels are rounded to 12 or 13.
    for kind, stored, scale, zero, group, most in (
        (0, weight, None, None, 0, 0.0),
        (1, weight.bfloat16(), None, None, 0, 0.0),
        (2, weight.to(torch.int8), of_rows, None, 0, 0.5),
        (3, weight.to(torch.int8), of_rows, None, 0, 0.0),
        (4, fours, one, torch.zeros_like(one), 32, 0.5),
        (5, fours, one, torch.zeros_like(one), 32, 20.0),
        (6, fours, one[:, :5].contiguous(), None, 64, 10.0),
    ):
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in (stored, scale, zero))
        matrix = Matrix(*pointers, kind, rows, columns, group)
        right = (levels if kind == 6 else weight) @ x
        for n in (1, 5):
            vectors, out = x.repeat(n, 1), torch.full((n, rows), torch.nan, **EXACT)
            library.multiply(ctypes.byref(matrix), vectors.data_ptr(), n, out.data_ptr(), 2)
            _must_be_near(out, right, most)
            if kind and library.has_tiles():  # what comes out is rounded to bfloat16, and so are weights of 4 bits
                halves, of_halves = vectors.bfloat16(), torch.full_like(out, torch.nan, dtype=torch.bfloat16)
                library.multiply_many(ctypes.byref(matrix), halves.data_ptr(), n, of_halves.data_ptr(), 2)
                _must_be_near(of_halves.float(), right, 4 * most + float(right.abs().max()) / 200)
    if library.sum_of_threads(2) != 1:
        raise ValueError(f"what {SOURCE} was compiled to has OpenMP's threads mixed up: name another compiler in CXX")
