"""The kernels in vectors of every width, and by matrix tiles, whatever this processor has."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from llama.kernels import library

WAYS = {
    "4 lanes": ("-DLANES=4",),
    "8 lanes": ("-DLANES=8",),
    "16 lanes": ("-DLANES=16", "-DNO_TILES"),
    "tiles": ("-DLANES=16", "-DEMULATED_TILES"),
}


def own_way() -> str:
    """That of this processor."""
    kernels = library.load()
    return "tiles" if kernels.has_tiles() else f"{kernels.lanes()} lanes"


@pytest.fixture(scope="session")
def compiled_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """What this processor doesn't have, a compiler makes of what it has, and tiles are emulated."""

    @cache
    def compiled_for(way: str) -> ctypes.CDLL:
        if way == own_way():
            return library.load()
        path = tmp_path_factory.mktemp("kernels") / "kernels.so"
        library.build(path, (*WAYS[way], "-O1"))
        made = library.opened(path)
        assert made.lanes() == (16 if way == "tiles" else int(way.split()[0]))
        assert bool(made.has_tiles()) == (way == "tiles")
        return made

    return compiled_for


@pytest.fixture(params=WAYS)
def lanes(
    request: pytest.FixtureRequest, compiled_for: Callable[[str], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = compiled_for(request.param)
    monkeypatch.setattr(library, "load", lambda: compiled)


@pytest.fixture
def tiles(compiled_for: Callable[[str], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compiled_for("tiles")
    monkeypatch.setattr(library, "load", lambda: compiled)


@pytest.fixture
def before_a_wall() -> Iterator[Callable[[Tensor], Tensor]]:
    """Copies of tensors whose memory ends where a page does; the next page may not be read."""
    libc, walls = ctypes.CDLL(None), []

    def copied(tensor: Tensor) -> Tensor:
        end = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        area = torch.frombuffer(mmap.mmap(-1, end + mmap.PAGESIZE), dtype=torch.uint8)
        walls.append((area, ctypes.c_void_p(area.data_ptr() + end)))
        assert libc.mprotect(walls[-1][1], mmap.PAGESIZE, 0) == 0
        return area[end - tensor.nbytes : end].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    yield copied
    for _, wall in walls:
        libc.mprotect(wall, mmap.PAGESIZE, 3)
