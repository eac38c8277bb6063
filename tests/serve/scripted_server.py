"""A scripted server in a process of its own: prints its address, and ends with its standard input."""

from __future__ import annotations

import sys

import torch
from scripted_llama import Scripted
from servers import serving

if __name__ == "__main__":
    torch.set_num_threads(1)
    with serving(Scripted(rows=8, slots=256), engine={"max_queue": 1000}) as served:
        served.model.passes = type("Forgetful", (list,), {"append": lambda *_: None})()  # it would be a leak of its own
        print(served.url, flush=True)
        sys.stdin.read()
