"""The kernels in vectors of every width, and by matrix tiles, whatever this processor has."""

from __future__ import annotations

import ctypes

import pytest

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


def compiled_for(way: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """What this processor doesn't have, a compiler makes of what it has, and tiles are emulated."""
    if way == own_way():
        return library.load()
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    library.build(path, (*WAYS[way], "-O1"))
    made = library.opened(path)
    assert made.lanes() == (16 if way == "tiles" else int(way.split()[0]))
    assert bool(made.has_tiles()) == (way == "tiles")
    return made


@pytest.fixture(scope="session", params=WAYS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled_for(request.param, tmp_path_factory)


@pytest.fixture
def lanes(compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: compiled)
