from llama.cli import run
from llama.train.cli import COMMANDS

run(COMMANDS, name="python -m llama.train")
