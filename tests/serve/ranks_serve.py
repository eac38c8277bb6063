"""Started by a test as one rank of a server: `python ranks_serve.py STORE RANK PORT_FILE`. The ranks find each other
through a file, as in tests/parallel/ranks.py, and rank 0 writes its address into another."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch

from llama import parallel
from llama.cli import run
from llama.serve import running
from llama.serve.cli import serve

if __name__ == "__main__":
    store, rank, found = sys.argv[1:4]
    timeout = os.environ.get("TIMEOUT", "20")
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    parallel.start(init_method=f"file://{store}", timeout=float(timeout))
    original = running.address

    def noting(listening: socket.socket) -> str:
        Path(found).write_text(original(listening))
        return original(listening)

    running.address = noting
    sys.argv = ["serve", "--port", "0", "--log", "none", "--timeout", timeout, "--max_seq_len", "512"]
    run(serve, name="serve")
