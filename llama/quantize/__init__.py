"""Weights in 8 and 4 bits: on load or from a saved folder, multiplied by PyTorch's own operators, and what is lost.

The model never hears of it: each linear layer's `product` is replaced by one that multiplies by what is kept of its
weight. The README beside this file lists the schemes, and what they cost and lose.

    from llama import Llama
    from llama.quantize.layers import quantize_

    llama = Llama.build()
    quantize_(llama.model, "int8")
"""
