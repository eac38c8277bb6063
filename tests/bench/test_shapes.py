"""Models that nobody trained: the right shapes, every weight set, none of them twice in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llama import parallel
from llama.bench.shapes import DRAWN, SHAPES, random_model, shape_args, tokenizer_of
from llama.bench.subject import work_of
from llama.config import PRESETS, ModelArgs
from llama.generation import EMBEDDED, Llama
from llama.model import Transformer
from llama.tokenizer import Tokenizer

CPU = torch.device("cpu")
SMALL = ModelArgs(dim=256, n_layers=3, n_heads=8, n_kv_heads=2, vocab_size=6000, hidden_dim=700)


@pytest.fixture(autouse=True)
def group() -> None:
    parallel.start()


@pytest.mark.parametrize("preset", PRESETS)
def test_published_presets_are_those_of_the_core(preset: str) -> None:
    assert shape_args(preset) == ModelArgs(**PRESETS[preset])


def test_small_presets_have_their_sizes() -> None:
    """S has 110 M parameters and M 1.1 B, the embedding not counted twice."""
    for preset, millions in (("S", 109.5), ("M", 1034.5)):
        with torch.device("meta"):
            work = work_of(Transformer(shape_args(preset)))
        assert (work.layers + work.head) / 1e6 == pytest.approx(millions, rel=0.01)
    m = shape_args("M")
    assert (m.dim, m.n_layers, m.n_heads, m.n_kv_heads, m.hidden_dim, m.vocab_size) == (2048, 22, 32, 4, 5632, 32016)
    s = shape_args("S")
    assert (s.dim, s.n_layers, s.n_heads, s.n_kv_heads, s.hidden_dim, s.vocab_size) == (768, 12, 12, 12, 2048, 32016)


def test_some_layers_of_a_preset() -> None:
    assert shape_args("34B", 2).n_layers == 2
    assert shape_args("34B").n_layers == SHAPES["34B"]["n_layers"] == 48  # the table is not written to
    for layers in (0, 49):
        with pytest.raises(ValueError, match="it has 1 to 48"):
            shape_args("34B", layers)
    with pytest.raises(ValueError, match="choose 7B, 13B, 34B, 70B, S, M"):
        shape_args("8B")


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that operators make."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and not func.is_view:
                given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
                if tensor.untyped_storage().data_ptr() not in given:
                    self.total += tensor.nbytes
        return out


def test_random_weights_are_made_once_and_all_of_them() -> None:
    """Guards against float32 first and the dtype later, and against a weight left on the meta device or at zero."""
    with Allocations() as allocations:
        model = random_model(SMALL, CPU, torch.bfloat16)
    weights = dict(model.named_parameters())
    whole = sum(weight.nbytes for weight in weights.values())
    drawn = DRAWN * (4 + 2)  # in float32, and in the dtype
    assert whole <= allocations.total <= whole + drawn + 4096
    for name, weight in weights.items():
        assert (weight.dtype, weight.device, weight.requires_grad) == (torch.bfloat16, CPU, False)
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            assert weight.float().std().item() == pytest.approx(0.02, rel=0.05), name
            assert weight.float().mean().abs().item() < 0.001, name
            assert len(torch.unique(weight[:64], dim=0)) == len(weight[:64]), f"{name} repeats its rows"
    assert not torch.equal(weights["layers.0.attention.wq.weight"], weights["layers.1.attention.wq.weight"])


def test_the_same_shape_has_the_same_weights() -> None:
    one, other = (random_model(SMALL, CPU, torch.float32).state_dict() for _ in range(2))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_random_model_writes_text_whatever_ids_it_chooses() -> None:
    """The embedded tokenizer has fewer words than a published shape: its loop would stop at the first of the others."""
    args = ModelArgs(dim=64, n_layers=1, n_heads=2, vocab_size=32016, hidden_dim=64, max_seq_len=64, max_batch_size=1)
    tokenizer = tokenizer_of(args.vocab_size)
    assert tokenizer.n_words == 32016
    llama = Llama(random_model(args, CPU, torch.float32), tokenizer)
    (answer,), _ = llama.generate([[5, 6, 7]], 40, temperature=1.0, top_p=1.0, seed=1)
    own = Tokenizer(EMBEDDED / "tokenizer.model")
    assert max(answer) >= own.n_words
    text = "def f(x):\n    return [x, 'é']\n"
    assert tokenizer.encode(text, True, True) == own.encode(text, True, True)
    assert tokenizer.decode(own.encode(text, False, False)) == text
    assert tokenizer_of(100).n_words == own.n_words


def test_operations_are_those_that_pytorch_counts() -> None:
    """PyTorch's own counter sees a prompt read and its last scores computed; causal attention is half of the square."""
    model = random_model(SMALL, CPU, torch.float32)
    tokens = torch.zeros(1, 24, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.logits(model.hidden(tokens)[:, -1])
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counted.items() if "attention" not in op)
    work = work_of(model)
    attention = work.score * 24 * 25 / 2
    assert products == 2 * work.layers * 24 + 2 * work.head
    assert work.prompt_operations(24) == products + attention
    assert work.score * 24 * 24 == 4 * 24 * 24 * SMALL.dim * SMALL.n_layers


def test_bytes_are_those_of_the_tensors_that_a_step_reads() -> None:
    model = random_model(SMALL, CPU, torch.bfloat16)
    matrices = sum(p.nbytes for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    cache = model.new_cache(2, 50)
    assert work_of(model).step_bytes(2, 50) == matrices + cache.nbytes
    quarter = work_of(model, bits=4, arithmetic="int8")
    assert quarter.step_bytes(2, 50) == matrices / 4 + cache.nbytes
    assert (quarter.arithmetic, work_of(model).arithmetic) == ("int8", "bfloat16")
