"""Memory in large pages: what is in it, where it begins, and that it is given back."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from llama.kernels.memory import PAGE, empty, joined


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 1500])
def test_rows_come_one_after_the_other(dtype: torch.dtype, rows: int) -> None:
    parts = [torch.randint(0, 100, (rows + i, 2048)).to(dtype) for i in range(3)]
    found = joined(parts)
    assert found.dtype == dtype
    assert torch.equal(found, torch.cat(parts))
    assert found.is_contiguous()


def test_one_alone_stays_where_it_is() -> None:
    for size in (8, PAGE):
        alone = torch.ones(2, size)
        assert joined([alone]) is alone


def test_columns_of_another_tensor_are_copied_in_order() -> None:
    wide = torch.arange(4.0 * PAGE // 4).view(2, -1)
    assert torch.equal(joined([wide.t(), wide.t()]), torch.cat((wide.t(), wide.t())))


def test_other_devices_are_left_to_pytorch() -> None:
    on_meta = torch.empty(PAGE, 4, device="meta")
    assert joined([on_meta, on_meta]).shape == (2 * PAGE, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux only")
def test_it_begins_with_a_large_page_and_is_given_back() -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * mmap.PAGESIZE

    before = mapped()
    tensors = [empty((size,), torch.bfloat16) for size in (0, 1, PAGE // 2, 40 * PAGE)]
    assert all(tensor.data_ptr() % PAGE == 0 for tensor in tensors[1:])
    assert mapped() - before > 80 * PAGE
    view = tensors.pop()[5:].view(torch.int16)
    assert mapped() - before > 80 * PAGE
    del tensors, view
    assert mapped() - before < 40 * PAGE


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this kernel has no transparent huge pages"
)
def test_large_pages_are_asked_for() -> None:
    """The mapping that holds the tensor has the flag that `madvise` gives (proc(5), VmFlags: hg)."""
    tensor = empty((PAGE,), torch.bfloat16)
    flags: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= tensor.data_ptr() < last
        elif inside and head == "VmFlags:":
            flags = rest.split()
    assert "hg" in flags
