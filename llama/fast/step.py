"""A step of a few tokens as one call: all blocks in llama/kernels, their threads together from the first to the last.

What a framework's operators cost besides the arithmetic, some microseconds each and forty of them a block, is most of a
small model's step and a tenth of a large one's. So where every weight is one that the kernels read, a step over the
model's own cache goes to them whole: tokens are looked up here, the blocks run there, and what comes back is normalised.
On several ranks each half of a block is a call, and the sum over the ranks stands between. Prompts, other caches and
other devices are left to the blocks.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.fast.block import FusedBlock, FusedNorm
from llama.fast.packing import matrix_of
from llama.kernels import library
from llama.kernels.matrix import FEW, PLAIN, Matrix
from llama.model import Transformer
from llama.parallel import RowParallelLinear

MATRICES = ("wqkv", "wo", "w13", "w2")


class Steps:
    """`Transformer.hidden`, in one call where it can be: float32, whatever the weights are.

    Between two steps a processor's caches hold weights, not the interpreter: every line of Python and every tensor made
    here costs several times what it does in a loop of its own. So what the kernels are told is kept, and little is new.
    """

    def __init__(self, model: Transformer, matrices: Sequence[dict[str, Matrix]]) -> None:
        """`matrices` are each block's."""
        self.model, self.plain = model, model.hidden
        args, D, self._ranks = model.args, model.args.head_dim, model.output.ranks
        heads, kv_heads, hidden = args.n_heads // self._ranks, model.kv_heads, matrices[0]["w2"].shape[1]
        blocks = [block for block in model.layers if isinstance(block, FusedBlock)]
        self._sums = [(block.wo, block.w2) for block in blocks]
        self._norm = FusedNorm(model.norm, torch.float32)
        self._embedding = model.tok_embeddings.weight.detach()
        widths = (heads + 2 * kv_heads) * D, heads * D, 2 * hidden
        room = [torch.empty(FEW * width) for width in widths]
        norms = [[norm.weight.float() for norm in (block.attention_norm, block.ffn_norm)] for block in blocks]
        self._blocks = (library.Block * len(blocks))(
            *(
                library.Block(*(norm.data_ptr() for norm in both), *(own[name].struct for name in MATRICES))
                for both, own in zip(norms, matrices, strict=True)
            )
        )
        self._step = library.Step(dim=args.dim, heads=heads, kv_heads=kv_heads, head_dim=D, hidden=hidden)
        self._step.eps, self._step.norm = args.norm_eps, self._norm.weight.data_ptr()
        self._step.vocabulary = len(self._embedding)
        self._step.embedding, self._step.embedding_kind = self._embedding.data_ptr(), PLAIN[self._embedding.dtype]
        self._step.qkv, self._step.mixed, self._step.gated = (tensor.data_ptr() for tensor in room)
        self._starts = (ctypes.c_int64 * FEW)()
        self._step.starts = ctypes.addressof(self._starts)
        self._cache: weakref.ref[KVCache] | None = None
        self._alive = [room, norms, matrices]  # what the kernels are told points to these

    def __call__(
        self, tokens: Tensor, start_pos: int | Sequence[int] | Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """As `Transformer.hidden`."""
        # A cache of another kind keeps its numbers in another form.
        if start_pos is None or type(cache) is not KVCache or not 0 < tokens.numel() <= FEW:
            return self.plain(tokens, start_pos, cache)
        B, T = tokens.shape
        given = start_pos.tolist() if isinstance(start_pos, Tensor) else start_pos
        starts = [given] * B if isinstance(given, int) else list(given)
        if len(starts) != B or cache.rows < B or min(starts) < 0 or max(starts) + T > cache.slots:
            cache.span(start_pos, B, T)  # says what is wrong
        self._starts[:B] = starts
        self._tell(cache, B, T)
        kernels, step = library.load(), ctypes.byref(self._step)
        if self._ranks == 1:
            ids = tokens.contiguous()
            self._step.ids = ids.data_ptr()
            x = torch.empty(B, T, self._step.dim)
            good = kernels.run_blocks(self._blocks, len(self._blocks), step, x.data_ptr())
            if good < B * T:
                raise IndexError(f"token {ids.flatten()[good]} of a vocabulary of {self._step.vocabulary}")
            return x
        x = self.model.tok_embeddings(tokens).detach().float().contiguous()
        for block, layers in zip(self._blocks, self._sums, strict=True):
            for is_attention, layer in zip((1, 0), layers, strict=True):
                assert isinstance(layer, RowParallelLinear)
                part = torch.empty_like(x)
                kernels.run_half(ctypes.byref(block), is_attention, step, x.data_ptr(), part.data_ptr())
                x += layer.total(part)
        return self._norm(x)

    def _tell(self, cache: KVCache, B: int, T: int) -> None:
        """The kernels, what this step is over."""
        step = self._step
        step.rows, step.tokens, step.threads = B, T, torch.get_num_threads()
        if self._cache is None or self._cache() is not cache:
            for block, keys, values in zip(self._blocks, cache.keys, cache.values, strict=True):
                block.keys, block.values = keys.data_ptr(), values.data_ptr()
            step.slots, step.cache_kind = cache.slots, PLAIN[cache.keys[0].dtype]
            self._cache = weakref.ref(cache)
        cos, sin = self.model.rotation(cache.slots)
        step.cos, step.sin = cos.data_ptr(), sin.data_ptr()


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
