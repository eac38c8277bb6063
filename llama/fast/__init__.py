"""The fast version of the model: the same numbers in fewer and better steps. model.py stays the one to read.

from llama import Llama
from llama.fast import speed_up_

llama = Llama.build("CodeLlama-7b")
speed_up_(llama.model)
"""

from llama.fast.block import speed_up_

__all__ = ["speed_up_"]
