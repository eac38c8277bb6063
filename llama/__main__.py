"""`python -m llama` is the command `codellama`."""

from llama.cli import main

main()
