"""pass@k: the chance that at least one of k samples is right, from n samples of which c are.

The estimator is unbiased (arXiv 2107.03374, section 2.1): 1 - C(n-c, k) / C(n, k), as a product, since binomials of 200
overflow a float. Intervals are over tasks: what another set of such tasks would give.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llama.evals.intervals import Estimate, ratio, share


def pass_at_k(n: int, c: int, k: int) -> float:
    """Of one task. Raises ValueError for more than there are."""
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(
            f"pass@{k} of {n} samples, {c} of them right: give k of 1 to {n}, and no more right ones than n"
        )
    if n - c < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def pass_at(counts: Sequence[tuple[int, int]], k: int, draws: int = 2000) -> Estimate:
    """The mean over tasks, of each its (n, c), with a 95 % interval: Wilson's where each task has one sample, since it
    is honest at 0 and 100 %; otherwise the bootstrap's over tasks."""
    values = [pass_at_k(n, c, k) for n, c in counts]
    if all(n == 1 for n, _ in counts):
        found = share(sum(c for _, c in counts), len(counts))
        return Estimate(found.rate, found.low, found.high, found.n)
    return ratio(values, [1.0] * len(values), draws)
