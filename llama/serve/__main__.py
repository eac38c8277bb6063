"""`python -m llama.serve run …` is `codellama serve …`; `healing` measures what token healing brings."""

from __future__ import annotations

from typing_extensions import Unpack

from llama.cli import run
from llama.options import Count, Loading
from llama.serve.cli import serve


def healing(*, cursors: Count = 150, **loading: Unpack[Loading]) -> None:
    """Completes words and lines at random cursors of held-out files, with token healing and without.

    Args:
        cursors: how many of them.
    """
    from llama.evals.cli import read_sources
    from llama.evals.table import render
    from llama.front import load
    from llama.serve import healing as room

    llama = load(**{"max_batch_size": 8, "max_seq_len": 640, **loading})  # type: ignore[arg-type]
    places = room.cursors([source.text for source in read_sources(None)], cursors)
    within = sum(place.is_within_a_word for place in places)
    found = room.measure(llama, places)
    columns = ["order", "healing", f"words ({within})", f"their lines ({within})", f"all lines ({cursors})"]
    rows = [
        [
            one.order,
            "with" if one.healing else "without",
            *map("{:.1%}".format, (one.words, one.lines_of_words, one.lines)),
        ]
        for one in found
    ]
    print(render(columns, rows))


if __name__ == "__main__":
    run({"run": serve, "healing": healing}, name="python -m llama.serve")
