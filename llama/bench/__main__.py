"""`python -m llama.bench run …` is `codellama bench …`; `grow` is what it starts in fresh processes."""

from llama.bench.cli import command, grow
from llama.cli import run

if __name__ == "__main__":
    run({"run": command, "grow": grow}, name="python -m llama.bench")
