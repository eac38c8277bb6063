"""A model cut over ranks is the model: logits, gradients and first weights, and each layer equals fairscale's own."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale
from torch import Tensor, nn

import reference
from llama import parallel
from llama.config import ModelArgs
from llama.model import Transformer
from parallel.ranks import on_ranks
from parallel.shards import part, shard

ATOL = 5e-5
ARGS = ModelArgs(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=96, hidden_dim=96, max_batch_size=2, max_seq_len=64
)
KV_HEADS = {"MHA": 8, "GQA": 4, "fewer KV heads than ranks": 2, "MQA": 1}
CASES = [dataclasses.replace(ARGS, n_kv_heads=n) for n in KV_HEADS.values()]


# --- the whole model ---------------------------------------------------------------------------------------------


def _forward_and_backward(init_method: str, cases: list[ModelArgs], tokens: Tensor) -> list[tuple[Any, ...]]:
    ranks = parallel.start(init_method=init_method, device="cpu")
    results = []
    for args in cases:
        model = Transformer(args)
        model.load_state_dict(shard(reference.random_weights(args), args, ranks.rank, ranks.world_size), strict=True)
        logits = model(tokens)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        with torch.inference_mode():
            steps = [model(tokens[:, :20], 0), model(tokens[:, 20:30], 20)]
            steps += [model(tokens[:, at : at + 1], at) for at in range(30, tokens.shape[1])]
        results.append((logits.detach(), torch.cat(steps, 1), gradients, model.own_cache().keys[0].shape[1]))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_logits_and_gradients_on_any_number_of_ranks_are_the_references(world_size: int) -> None:
    tokens = torch.randint(ARGS.vocab_size, (2, 36))
    results = on_ranks(_forward_and_backward, world_size, CASES, tokens)
    for case, args in enumerate(CASES):
        exact = {name: w.double().requires_grad_() for name, w in reference.random_weights(args).items()}
        expected = reference.llama(args, exact, tokens)
        F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for rank in range(world_size):
            logits, stepwise, gradients, kv_heads = results[rank][case]
            torch.testing.assert_close(logits.double(), expected.detach(), rtol=0, atol=ATOL)
            torch.testing.assert_close(stepwise.double(), expected.detach(), rtol=0, atol=ATOL)
            assert kv_heads == max(1, args.n_kv_heads // world_size)
            for name, gradient in gradients.items():
                if ("wk" in name or "wv" in name) and world_size > args.n_kv_heads:
                    # Each neighbour sees what its own query heads ask of the head they share: the sum is the whole.
                    n = world_size // args.n_kv_heads
                    gradient = sum(results[rank // n * n + i][case][2][name] for i in range(n))
                whole = exact[name].grad
                assert whole is not None
                error = (gradient - part(name, whole, rank, world_size, args.n_kv_heads)).abs().max()
                assert error < 1e-4 * whole.abs().max(), (name, rank)


def _first_weights(init_method: str, cases: list[ModelArgs]) -> list[dict[str, Tensor]]:
    parallel.start(init_method=init_method, device="cpu")
    results = []
    for args in cases:
        torch.manual_seed(3)
        results.append(Transformer(args).state_dict())
    return results


@pytest.mark.parametrize("case", range(len(CASES)), ids=list(KV_HEADS))
def test_one_seed_gives_one_model_on_any_number_of_ranks(case: int) -> None:
    args = CASES[case]
    ((alone,),) = on_ranks(_first_weights, 1, [args])
    assert alone["output.weight"].std() == pytest.approx(0.02, rel=0.1)
    for world_size in (2, 4):
        for rank, (own,) in enumerate(on_ranks(_first_weights, world_size, [args])):
            expected = shard(alone, args, rank, world_size)
            assert own.keys() == expected.keys()
            for name, weight in own.items():
                assert torch.equal(weight, expected[name]), (name, rank, world_size)


IMPOSSIBLE = {
    "heads not whole": dataclasses.replace(ARGS, dim=48, n_heads=6, n_kv_heads=6),
    "KV heads not whole": dataclasses.replace(ARGS, dim=96, n_heads=12, n_kv_heads=6),
    "KV heads that neighbours cannot share evenly": dataclasses.replace(ARGS, dim=96, n_heads=12, n_kv_heads=3),
    "hidden_dim not whole": dataclasses.replace(ARGS, hidden_dim=97),
    "vocabulary not whole": dataclasses.replace(ARGS, vocab_size=97),
}


def _errors(init_method: str, cases: list[ModelArgs]) -> list[str]:
    parallel.start(init_method=init_method, device="cpu")
    said = []
    for args in cases:
        try:
            Transformer(args)
            said.append("no error")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("case", range(len(IMPOSSIBLE)), ids=list(IMPOSSIBLE))
def test_a_model_that_cannot_be_cut_says_so_when_it_is_made(case: int) -> None:
    for (said,) in on_ranks(_errors, 4, [list(IMPOSSIBLE.values())[case]]):
        assert "can't be" in said
        assert "ranks" in said


# --- each layer --------------------------------------------------------------------------------------------------


def _outcome(layer: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    x = x.clone().requires_grad_(x.is_floating_point())
    out = layer(x)
    out.backward(upstream)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.grad is not None
    return out.detach(), layer.weight.grad, x.grad


def _compare_layers(init_method: str) -> list[str]:
    """Ours, fairscale's own and the plain matrix product on the same weights; returns what was compared."""
    ranks = parallel.start(init_method=init_method, device="cpu")
    rank, n = ranks.rank, ranks.world_size
    torch.manual_seed(0)  # the same on every rank
    ids = torch.randint(10, (2, 5))
    x, wide, out, embedded = (torch.randn(2, 5, size) for size in (12, 8, 12, 8))
    linear, table = torch.randn(8, 12), torch.randn(10, 8)  # 12 in, 8 out

    def mine(t: Tensor, dim: int) -> Tensor:
        return t.chunk(n, dim)[rank].contiguous()

    no_bias: dict[str, Any] = {"bias": False}
    for name, ours, theirs, weight, cut, given, upstream, whole in [
        (
            "column",
            parallel.ColumnParallelLinear(12, 8),
            fairscale.ColumnParallelLinear(12, 8, gather_output=False, **no_bias),
            linear,
            0,
            x,
            mine(wide, -1),
            (x, wide, lambda t: mine(t, -1), lambda t: t),
        ),
        (
            "column gathered",
            parallel.ColumnParallelLinear(12, 8, gather_output=True),
            fairscale.ColumnParallelLinear(12, 8, gather_output=True, **no_bias),
            linear,
            0,
            x,
            wide,
            (x, wide, lambda t: t, lambda t: t),
        ),
        (
            "row",
            parallel.RowParallelLinear(8, 12),
            fairscale.RowParallelLinear(8, 12, input_is_parallel=True, **no_bias),
            linear.T.contiguous(),
            1,
            mine(wide, -1),
            out,
            (wide, out, lambda t: t, lambda t: mine(t, -1)),
        ),
        (
            "embedding",
            parallel.ParallelEmbedding(10, 8),
            fairscale.ParallelEmbedding(10, 8),
            table,
            1,
            ids,
            embedded,
            (ids, embedded, lambda t: t, lambda t: t),
        ),
    ]:
        assert ours.weight.shape == theirs.weight.shape, name
        for layer in (ours, theirs):
            layer.load_state_dict({"weight": mine(weight, cut)}, strict=True)
        got, expected = _outcome(ours, given, upstream), _outcome(theirs, given, upstream)
        for a, b in zip(got, expected, strict=True):
            assert a is b is None or torch.equal(a, b), name

        plain_x, plain_upstream, of_output, of_input = whole
        leaf = weight.clone().requires_grad_()
        plain_x = plain_x.clone().requires_grad_(plain_x.is_floating_point())
        plain = F.embedding(plain_x, leaf) if name == "embedding" else plain_x @ leaf.T
        plain.backward(plain_upstream)
        torch.testing.assert_close(got[0], of_output(plain.detach()))
        torch.testing.assert_close(got[1], mine(leaf.grad, cut))
        if got[2] is not None:
            torch.testing.assert_close(got[2], of_input(plain_x.grad))
    return ["compared"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_our_layers_are_fairscales_and_the_plain_product(world_size: int) -> None:
    assert on_ranks(_compare_layers, world_size) == [["compared"]] * world_size


def _loaded_for_meta(init_method: str) -> set[str]:
    parallel.start(init_method=init_method, device="cpu")
    before = set(sys.modules)
    with torch.device("meta"):
        Transformer(ARGS)
    return (set(sys.modules) - before) & {"sympy", "torch._dynamo", "torch._inductor"}


@pytest.mark.parametrize("world_size", [1, 2])
def test_on_the_meta_device_torchs_compiler_is_not_loaded(world_size: int) -> None:
    """Some operations on meta tensors (arange, clone) would bring it in: seconds and up to 70 MB for every build."""
    assert on_ranks(_loaded_for_meta, world_size) == [set()] * world_size


def test_on_the_meta_device_no_weight_is_drawn() -> None:
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = Transformer(ARGS)
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
