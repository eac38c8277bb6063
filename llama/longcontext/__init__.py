"""The long-context laboratory: what a RoPE scheme does to a checkpoint, measured.

Each file is one experiment: a function that takes a `Llama` (or, for `spectra`, a few numbers) and returns a dataclass
of figures, and a `command` that writes them as CSV, JSON and PNG: `codellama longcontext …`. The README beside this
file states every protocol.

    from llama import Llama
    from llama.evals.sources import read_folder
    from llama.longcontext.attention import attention_by_distance
    from llama.longcontext.spectra import spectra

    spectra(["default", "linear", "yarn"], factor=4).curves[0].first_zero
    attention_by_distance(Llama.build(), read_folder("some/project")).mean_distance
"""
