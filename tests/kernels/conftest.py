"""The kernels in vectors of every width, whatever this processor has."""

from __future__ import annotations

import ctypes

import pytest

from llama.kernels import library


@pytest.fixture(scope="session", params=[4, 8, 16], ids=lambda lanes: f"{lanes} lanes")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels in vectors of another width: a compiler makes them of what the processor has."""
    if request.param == library.load().lanes():
        return library.load()
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    library.build(path, (f"-DLANES={request.param}", "-O1"))
    made = library.opened(path)
    assert made.lanes() == request.param
    return made


@pytest.fixture
def lanes(compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: compiled)
