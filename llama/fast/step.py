"""A step of a few tokens as one call: all blocks in llama/kernels, their threads together from the first to the last.

What a framework's operators cost besides the arithmetic, some microseconds each and forty of them a block, is most of
a small model's step and a part of a large one's. So where every weight is one that the kernels read, a step over a
cache of plain numbers goes to them whole, from the tokens to the last norm. On several ranks each half of a block is a
call, and the sum over the ranks stands between. Prompts, other caches and other devices are left to the blocks.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from threading import Lock
from typing import NoReturn

import torch
from torch import Tensor

from llama.cache import KVCache, Span
from llama.fast.block import FusedBlock, FusedNorm
from llama.fast.packing import matrix_of
from llama.kernels import library
from llama.kernels.matrix import FEW, PLAIN, Matrix
from llama.model import Start, Transformer
from llama.parallel import RowParallelLinear

MATRICES = ("wqkv", "wo", "w13", "w2")


class Steps:
    """`Transformer.hidden`, in one call where it can be: float32, whatever the weights are.

    Between two steps a processor's caches hold weights, not the interpreter: every line of Python and every tensor made
    here costs several times what it does in a loop of its own. So what the kernels are told is kept, and little is new.
    What it is made of stays: who puts another product or `attend` into a block takes `Steps` out again.
    """

    def __init__(self, model: Transformer, matrices: Sequence[dict[str, Matrix]]) -> None:
        """`matrices` are each block's."""
        self._model, self._made_of = weakref.ref(model), matrices
        args, D, self._ranks = model.args, model.args.head_dim, model.output.ranks
        heads, kv_heads, hidden = args.n_heads // self._ranks, model.kv_heads, matrices[0]["w2"].shape[1]
        blocks = [block for block in model.layers if isinstance(block, FusedBlock)]
        self._sums = [(block.wo, block.w2) for block in blocks]
        self._norm = FusedNorm(model.norm, torch.float32)
        self._embedding = model.tok_embeddings.weight.detach()
        widths = (heads + 2 * kv_heads) * D, heads * D, 2 * hidden
        self._room = [torch.empty(FEW * width, **library.EXACT) for width in widths]
        self._norms = [[norm.weight.float() for norm in (block.attention_norm, block.ffn_norm)] for block in blocks]
        self._blocks = (library.Block * len(blocks))(
            *(
                library.Block(*(norm.data_ptr() for norm in norms), *(own[name].struct for name in MATRICES))
                for norms, own in zip(self._norms, matrices, strict=True)
            )
        )
        self._step = library.Step(dim=args.dim, heads=heads, kv_heads=kv_heads, head_dim=D, hidden=hidden)
        self._step.eps, self._step.norm = args.norm_eps, self._norm.weight.data_ptr()
        self._step.vocabulary = len(self._embedding)
        self._step.embedding, self._step.embedding_kind = self._embedding.data_ptr(), PLAIN[self._embedding.dtype]
        self._step.qkv, self._step.mixed, self._step.gated = (tensor.data_ptr() for tensor in self._room)
        self._starts = (ctypes.c_int64 * FEW)()
        self._step.starts = ctypes.addressof(self._starts)
        self._cache: weakref.ref[KVCache] | None = None
        self._row = 0
        self._turn = Lock()  # one step at a time: all are told by the same few numbers

    def __reduce__(self) -> NoReturn:
        raise TypeError("a fast model can't be copied or stored: copy the plain one, and make both fast")

    @property
    def model(self) -> Transformer:
        model = self._model()
        assert model is not None, "the model is gone, and with it its steps"
        return model

    def __call__(self, tokens: Tensor, start_pos: Start | None = None, cache: KVCache | None = None) -> Tensor:
        """As `Transformer.hidden`."""
        B, T = tokens.shape
        if start_pos is not None and cache is None:
            cache = self.model.own_cache()
        # A cache of another kind keeps its numbers in another form.
        if start_pos is None or type(cache) is not KVCache or not 0 < B * T <= FEW or not tokens.is_cpu:
            return self.blocks(tokens, start_pos, cache)
        if isinstance(start_pos, Span):
            assert start_pos.T == T, f"a span of {start_pos.T} tokens a row for {T}"
            shared = start_pos.start
            row, given = start_pos.row, start_pos.starts if shared is None else shared
        else:
            row, given = 0, start_pos.tolist() if isinstance(start_pos, Tensor) else start_pos
        starts = [given] * B if isinstance(given, int) else list(given)
        if len(starts) != B or not 0 <= row <= cache.rows - B or min(starts) < 0 or max(starts) + T > cache.slots:
            cache.span(starts, B, T, row)
            raise AssertionError("a span that is none was made")
        if not isinstance(start_pos, Span):
            cache.forget(row, starts)
        with self._turn:
            self._tell(cache, row, starts, T)
            return self._whole(tokens) if self._ranks == 1 else self._by_halves(tokens)

    def blocks(self, tokens: Tensor, start_pos: Start | None, cache: KVCache | None) -> Tensor:
        """Block by block."""
        return Transformer.hidden(self.model, tokens, start_pos, cache)

    def _tell(self, cache: KVCache, row: int, starts: list[int], T: int) -> None:
        """The kernels, what this step is over."""
        step = self._step
        step.rows, step.tokens, step.threads = len(starts), T, torch.get_num_threads()
        for i, start in enumerate(starts):
            self._starts[i] = start
        if self._cache is None or self._cache() is not cache or self._row != row:
            # The kernels count rows from where these pointers begin.
            for block, keys, values in zip(self._blocks, cache.keys, cache.values, strict=True):
                assert keys.is_cpu
                ahead = row * keys.stride(0) * keys.itemsize
                block.keys, block.values = keys.data_ptr() + ahead, values.data_ptr() + ahead
            step.slots, step.cache_kind = cache.slots, PLAIN[cache.keys[0].dtype]
            self._cache, self._row = weakref.ref(cache), row
        self._tables = self.model.rotation(cache.slots)
        step.cos, step.sin = (table.data_ptr() for table in self._tables)

    def _whole(self, tokens: Tensor) -> Tensor:
        """From ids to the last norm."""
        ids = tokens.to(torch.int64).contiguous()
        self._step.ids = ids.data_ptr()
        x = torch.empty(*ids.shape, self._step.dim, **library.EXACT)
        step = ctypes.byref(self._step)
        good = library.load().run_blocks(self._blocks, len(self._blocks), step, x.data_ptr())
        if good < ids.numel():
            raise IndexError(f"token {ids.flatten()[good]} of a vocabulary of {self._step.vocabulary}")
        return x

    def _by_halves(self, tokens: Tensor) -> Tensor:
        """The same, with the other ranks' parts added after each half of a block."""
        x = self.model.tok_embeddings(tokens).detach().float().contiguous()
        kernels, step = library.load(), ctypes.byref(self._step)
        for block, layers in zip(self._blocks, self._sums, strict=True):
            for is_attention, layer in zip((1, 0), layers, strict=True):
                assert isinstance(layer, RowParallelLinear)
                part = torch.empty_like(x)
                kernels.run_half(ctypes.byref(block), is_attention, step, x.data_ptr(), part.data_ptr())
                x += layer.total(part)
        return self._norm(x)


def put_steps_(model: Transformer) -> None:
    """Puts `Steps` in the place of the model's `hidden`, if the kernels can read all there is."""
    blocks = [block for block in model.layers if isinstance(block, FusedBlock)]
    found = [{name: _matrix(getattr(block, name)) for name in MATRICES} for block in blocks]
    matrices = [{name: matrix for name, matrix in own.items() if matrix is not None} for own in found]
    like = model.norm.weight
    if like.device.type != "cpu" or like.dtype not in PLAIN or any(len(own) < len(MATRICES) for own in matrices):
        return
    if model.args.head_dim % (2 * library.load().lanes()) == 0:
        model.hidden = Steps(model, matrices)  # type: ignore[method-assign]


def _matrix(product: object) -> Matrix | None:
    return matrix_of(product.product if isinstance(product, RowParallelLinear) else product)  # type: ignore[arg-type]
