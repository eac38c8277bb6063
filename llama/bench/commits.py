"""Two checkouts of this project, measured in interleaved rounds: is this one slower than the last?

    git worktree add ../before HEAD~1
    python -m llama.bench.commits ../before . --rounds 15 --threads 2

Each checkout runs in a process of its own, on its own code and its embedded checkpoint, and the two take turns, so that
what else the machine does hits both alike. Printed is the second's speed over the first's: the median, and the ratio
of the fastest rounds.

- `loop1`, `loop8`: a prompt of 40 tokens, or eight, and 160 or 100 tokens after each, greedily.
- `drawn1`: as loop1, at a temperature of 0.8 with top_p 0.95.
- `batch64`: 64 prompts of 10 to 500 tokens, 64 tokens after each, in 8 rows.
- `mixed64`: the same prompts, and answers of 8 to 200 tokens.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

if __name__ != "__main__" or sys.argv[1:2] != ["serve"]:  # the other checkout may be older than this module
    from llama.options import Count, Dtype, Positional, one_of, several

MEASURES = ("loop1", "drawn1", "loop8", "batch64", "mixed64")


def serve(fast: bool, dtype: str, threads: int) -> None:
    """In a checkout's own process: answers each line of standard input, a measure, with seconds and tokens."""
    import torch

    import llama
    from llama import Llama, Prompt

    torch.set_num_threads(threads)
    build: Any = getattr(llama, "load", Llama.build)
    new = hasattr(llama, "load")
    options = {"dtype": getattr(torch, dtype), "fast": fast}
    one, eight = (build(max_seq_len=slots, max_batch_size=rows, **options) for rows, slots in ((1, 256), (8, 1024)))
    rng = random.Random(1)
    prompts = [[1, *(rng.randrange(3, 4000) for _ in range(rng.choice([9, 30, 60, 120, 250, 500])))] for _ in range(64)]
    lengths = [rng.choice([8, 16, 32, 64, 128, 200]) for _ in prompts]
    afresh: dict[str, Any] = {"reuse": False} if new else {}

    def written(model: Any, asked: list[list[int]], n: int, temperature: float = 0.0) -> int:
        events = model.stream([Prompt(p, frozenset()) for p in asked], n, temperature, 0.95, seed=1, **afresh)
        return sum(len(event.tokens) for event in events)

    def mixed() -> int:
        """Each answer ends where it should: by an id that the same answer is known to have there."""
        ends = [Prompt(p, frozenset({ids[n - 1]})) for p, ids, n in zip(prompts, answers, lengths, strict=True)]
        return sum(len(event.tokens) for event in eight.stream(ends, 200, 0.0, **afresh))

    answers: list[list[int]] = []
    tasks = {
        "loop1": lambda: written(one, [prompts[3][:40]], 160),
        "drawn1": lambda: written(one, [prompts[3][:40]], 160, 0.8),
        "loop8": lambda: written(eight, [p[:40] for p in prompts if len(p) > 40][:8], 100),
        "batch64": lambda: written(eight, prompts, 64),
        "mixed64": mixed,
    }
    print(json.dumps(llama.__file__), flush=True)
    for line in sys.stdin:
        if line.strip() == "mixed64" and not answers:
            answers += eight.generate(prompts, 200, 0.0)[0]
            answers = [ids or [2] for ids in answers]
            lengths = [min(n, len(ids)) for n, ids in zip(lengths, answers, strict=True)]
        began = time.perf_counter()
        tokens = tasks[line.strip()]()
        print(json.dumps([time.perf_counter() - began, tokens]), flush=True)


def compare(
    before: Positional[str],
    now: Positional[str],
    *,
    measures: Annotated[tuple[str, ...], several("MEASURE", one_of(MEASURES))] = MEASURES,
    rounds: Count = 15,
    threads: Count = 2,
    fast: bool = False,
    dtype: Dtype = "float32",
) -> None:
    """Prints for each measure the speed of the checkout NOW over that of BEFORE.

    Args:
        before: a folder with a checkout of this project.
        now: another.
        measures: some of loop1,drawn1,loop8,batch64,mixed64.
        rounds: in which both take turns.
        threads: of each.
        fast: with fused blocks.
        dtype: of the weights.
    """
    workers = [_started(Path(root), fast, dtype, threads) for root in (before, now)]
    for name in measures:
        seconds: tuple[list[float], list[float]] = ([], [])
        for turn in range(rounds + 1):
            for which in (0, 1) if turn % 2 else (1, 0):
                spent, tokens = _asked(workers[which], name)
                if turn:  # the first warms up
                    seconds[which].append(spent / tokens)
        ratios = [a / b for a, b in zip(*seconds, strict=True)]
        best = [min(own) for own in seconds]
        print(
            f"{name:8} {statistics.median(ratios):6.3f} ({min(ratios):.2f} to {max(ratios):.2f}); fastest rounds "
            f"{best[0] / best[1]:.3f}, {best[0] * 1e6:.0f} and {best[1] * 1e6:.0f} us a token",
            flush=True,
        )
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()


def _started(root: Path, fast: bool, dtype: str, threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "serve", str(int(fast)), dtype, str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(root.resolve())}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    worker = subprocess.Popen(command, env=environment, cwd=root, text=True, **pipes)  # type: ignore[call-overload]
    assert worker.stdout is not None
    loaded = json.loads(worker.stdout.readline() or '""')
    if not loaded.startswith(str(root.resolve())):
        raise ValueError(f"{root} is no checkout of this project: it runs {loaded or 'nothing'}")
    return worker  # type: ignore[no-any-return]


def _asked(worker: subprocess.Popen[str], name: str) -> tuple[float, int]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(name + "\n")
    worker.stdin.flush()
    seconds, tokens = json.loads(worker.stdout.readline())
    return seconds, tokens


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.path.pop(0)  # this folder: the checkout's package is on PYTHONPATH
        serve(bool(int(sys.argv[2])), sys.argv[3], int(sys.argv[4]))
    else:
        from llama.cli import run

        run(compare, "python -m llama.bench.commits")
