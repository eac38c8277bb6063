"""The peer is the same model: what is compared for speed gives the same scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llama import parallel
from llama.bench.cli import as_transformers
from llama.bench.peer import Transformers
from llama.bench.subject import Ours, work_of
from llama.config import ModelArgs
from llama.generation import EMBEDDED, Llama
from llama.tokenizer import Tokenizer
from reference import MakeModel

SCHEMES = {"MHA": {"n_kv_heads": 8}, "GQA": {}, "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}}


@pytest.fixture(params=SCHEMES)
def both(request: pytest.FixtureRequest, tiny: ModelArgs, make_model: MakeModel) -> tuple[Ours, Transformers]:
    parallel.start()
    args = dataclasses.replace(tiny, **SCHEMES[request.param])
    model, _ = make_model(args)
    llama = Llama(model, Tokenizer(EMBEDDED / "tokenizer.model"), prefill_chunk=7)
    work = work_of(model)
    return Ours(llama, work), as_transformers(llama, work)


def test_same_scores_after_a_prompt_and_after_each_step(both: tuple[Ours, Transformers]) -> None:
    """Guards against comparing with another model: rows of wq and wk in the wrong order, another theta or norm."""
    prompts = torch.randint(0, 96, (2, 20)).tolist()
    tokens = torch.randint(0, 96, (2, 5))
    for subject in both:
        subject.room(2, 128)
    expected, found = (subject.read(prompts) for subject in both)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    for i in range(5):
        expected, found = (subject.step(tokens[:, i : i + 1], 20 + i) for subject in both)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_both_can_go_back(both: tuple[Ours, Transformers]) -> None:
    """A round of decode begins where the last one did."""
    prompts = torch.randint(0, 96, (1, 20)).tolist()
    for subject in both:
        subject.room(1, 128)
        subject.read(prompts)
        first = subject.step(torch.tensor([[5]]), 20)
        for i in range(3):
            subject.step(torch.tensor([[7]]), 21 + i)
        again = subject.step(torch.tensor([[5]]), 20)
        torch.testing.assert_close(again, first, atol=1e-5, rtol=1e-5)


def test_both_write_the_same(both: tuple[Ours, Transformers]) -> None:
    prompts = torch.randint(0, 96, (2, 20)).tolist()
    counts, heads = [], []
    for subject in both:
        subject.room(2, 128)
        counts.append(sum(subject.stream(prompts, 9)))
        heads.append(subject.head(torch.tensor([[3, 4], [5, 6]])))
    assert counts == [9, 9]
    torch.testing.assert_close(heads[0], heads[1], atol=2e-4, rtol=1e-4)


def test_weights_are_shared(both: tuple[Ours, Transformers]) -> None:
    """There is no second copy of what both keep in the same order."""
    ours, theirs = both[0].llama.model.layers[0], both[1].model.model.layers[0]
    assert theirs.mlp.up_proj.weight.data_ptr() == ours.feed_forward.w3.weight.data_ptr()
    assert theirs.self_attn.v_proj.weight.data_ptr() == ours.attention.wv.weight.data_ptr()
    assert not any(tensor.is_meta for tensor in [*both[1].model.parameters(), *both[1].model.buffers()])


def test_the_cache_that_grows_is_counted(both: tuple[Ours, Transformers]) -> None:
    ours, theirs = both
    theirs.read(torch.zeros(2, 30, dtype=torch.int64).tolist())
    grown = sum(layer.keys.nbytes + layer.values.nbytes for layer in theirs._cache.layers)
    assert theirs.cache_bytes(2, 30) == grown
    assert ours.cache_bytes(2, 30) == 0
