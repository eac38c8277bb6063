"""Measures a checkpoint on code it has not seen: compression, completion, infilling, answers, and retrieval.

Each file is one measure: a function that takes a `Llama` and source files, and returns counts with their intervals.
Nothing here prints but cli.py, `codellama evals …`. The README beside this file states every protocol in full.

    from llama import Llama
    from llama.evals.functions import complete_functions
    from llama.evals.sources import read_folder

    complete_functions(Llama.build(), read_folder("some/project"), n=100).parsed

The published benchmarks are rows of a table (benchmarks.py), and what they run is locked in (sandbox.py):

    from llama.evals import HumanEval, Judge

    tasks, _, _ = HumanEval.read()
    with Judge() as judge:
        judge.one(HumanEval.program(tasks[0], tasks[0].solution)).passed
"""

from llama.evals.benchmarks import BENCHMARKS as BENCHMARKS
from llama.evals.benchmarks import MBPP as MBPP
from llama.evals.benchmarks import Benchmark as Benchmark
from llama.evals.benchmarks import HumanEval as HumanEval
from llama.evals.benchmarks import Infilling as Infilling
from llama.evals.benchmarks import Protocol as Protocol
from llama.evals.benchmarks import Task as Task
from llama.evals.judging import Judge as Judge
