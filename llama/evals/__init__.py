"""Measures a checkpoint on code it has not seen: compression, completion, infilling, answers, and retrieval.

Each file is one measure: a function that takes a `Llama` and source files, and returns counts with their intervals.
Nothing here prints but cli.py, `codellama evals …`. The README beside this file states every protocol in full.

    from llama import Llama
    from llama.evals.functions import complete_functions
    from llama.evals.sources import read_folder

    complete_functions(Llama.build(), read_folder("some/project"), n=100).parsed
"""
