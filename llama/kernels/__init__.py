"""A step of a few tokens in C++: products by weights of 32, 16, 8 and 4 bits, and the transformer's blocks.

kernels.cpp is compiled once for the machine it runs on, by its own C++ compiler, and kept. Where there is none, the
rooms that use this one (fast, quantize) multiply by PyTorch's operators, and say so once.

    from llama.kernels.matrix import Matrix

    Matrix.of(weight)(x)  # x·weightᵀ
"""
