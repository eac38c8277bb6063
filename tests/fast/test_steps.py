"""A step as one call: the same hidden states as block by block, and what is left to the blocks.

What these guard against: a pointer to what is no longer there, a position or a token that is none, heads that read
another's keys, softmax over more slots than it takes at once.
"""

from __future__ import annotations

import copy
import heapq
import inspect
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama import Llama, ModelArgs, Transformer, parallel
from llama.fast import speed_up_
from llama.fast.step import Steps
from llama.kernels.matrix import FEW, multiplies_bfloat16
from llama.longcontext.int8_cache import int8_cache
from llama.model import Start
from llama.quantize.layers import quantize_
from parallel.ranks import on_ranks

ROUNDED = 3e-3
"""What x in 16 bits (llama/kernels) may make of scores of some units: less than bfloat16 would."""
ARGS = {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "multiple_of": 64}


def model(dtype: torch.dtype = torch.float32, **sizes: int) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(ModelArgs(**{"max_seq_len": 64, "max_batch_size": 3, **ARGS, **sizes}))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else weight * 6)
    return made.to(dtype).requires_grad_(False)


def in_one_call(made: Transformer) -> Steps:
    """A fast model's steps; whoever leaves one to the blocks fails."""
    steps = made.hidden
    assert isinstance(steps, Steps)

    def blocks(tokens: Tensor, *rest: object) -> Tensor:
        assert tokens.numel() > FEW, f"{tuple(tokens.shape)} tokens were left to the blocks"
        return Steps.blocks(steps, tokens, *rest)

    steps.blocks = blocks
    return steps


def built(fast: bool, **settings: Any) -> Llama:
    """The embedded checkpoint."""
    llama = Llama.build(**settings)
    if fast:
        speed_up_(llama.model)
    return llama


def scores(made: Transformer, tokens: Tensor, starts: Start) -> Tensor:
    """Over the model's own cache."""
    with torch.inference_mode():
        return made.logits(made.hidden(tokens, starts, made.own_cache()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "dim"), [(4, 4, 256), (8, 2, 256), (4, 1, 256), (6, 1, 384)])
def test_hundreds_of_slots_are_attended_to_as_by_the_blocks(
    dtype: torch.dtype, n_heads: int, n_kv_heads: int, dim: int
) -> None:
    """Beyond the slots whose scores are made at a time; tokens of one row, of rows at positions of their own, several
    at once; heads that are whole fours, which meet a key together, and not; a float32 model of the same weights is what
    is exact."""
    sizes = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "dim": dim, "max_seq_len": 512}
    exact, fast = model(dtype, **sizes).float(), speed_up_(model(dtype, **sizes))
    steps = in_one_call(fast)
    tokens = torch.randint(96, (3, 400), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for made in (exact, fast):
            made(tokens[:, :390], 0)
        for part, starts in (
            (tokens[:, 390:391], 390),
            (tokens[:, 391:392], [391, 64, 1]),
            (tokens[:2, 392:397], [200, 63]),
            (tokens[:1, 397:398], torch.tensor([0])),
        ):
            found, right = steps(part, starts, fast.own_cache()), exact.hidden(part, starts, exact.own_cache())
            assert found.dtype == torch.float32
            loss = float((found - right).norm() / right.norm())
            # Where the processor multiplies in bfloat16, x is rounded to it as well.
            bound = 3e-2 if multiplies_bfloat16() else 2e-2
            assert loss < (1e-5 if dtype == torch.float32 else bound), (starts, loss)


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int4", "int4-dynamic", "nf4"])
def test_quantised_weights_are_read_by_the_same_call(scheme: str) -> None:
    """In 8 bits what is a little larger than half a step in one of the two may be a little smaller in the other."""
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    quantised = quantize_(model(), scheme)
    fast = speed_up_(copy.deepcopy(quantised))
    in_one_call(fast)
    tokens = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    first = 16 if multiplies_bfloat16() else 30  # a longer one is left to the blocks, which multiply in it
    parts = (
        (tokens[:, :first], 0),
        (tokens[:, first : first + 4], first),
        (tokens[:, first + 4 : first + 5], [first + 4, 7]),
    )
    for part, starts in parts:
        right = scores(quantised, part, starts)
        assert right.abs().max() > 1
        found = scores(fast, part, starts)
        assert float((found - right).norm() / right.norm()) < 0.02
        if "dynamic" not in scheme:
            torch.testing.assert_close(found, right, rtol=0, atol=ROUNDED)


@pytest.mark.parametrize(("n_heads", "n_kv_heads", "multiple_of"), [(4, 4, 40), (8, 2, 40), (4, 1, 40), (4, 2, 4104)])
def test_threads_share_a_step_and_change_nothing(n_heads: int, n_kv_heads: int, multiple_of: int) -> None:
    """Bit by bit: nothing is added up in another order, and nobody reads what another has not written yet. The last
    model's feed-forward is cut in pieces, which go to whoever comes first."""
    fast = speed_up_(model(torch.bfloat16, n_heads=n_heads, n_kv_heads=n_kv_heads, multiple_of=multiple_of))
    in_one_call(fast)
    tokens, before = torch.arange(60).view(3, 20), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for _ in range(5):
                parts = (scores(fast, tokens[:, :9], 0), scores(fast, tokens[:, 9:11], [9, 5, 0]))
                found.append(torch.cat((*parts, scores(fast, tokens[:, 11:12], 11)), 1))
    finally:
        torch.set_num_threads(before)
    assert found[0].abs().max() > 1
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_pytorchs_defaults_change_nothing() -> None:
    """Memory that is handed over is float32 on the CPU, whatever new tensors are by default."""
    fast, token = speed_up_(model()), torch.tensor([[5, 6]])
    right = scores(fast, token, 0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(scores(fast, token, 0), right)
        with torch.device("meta"):
            assert torch.equal(scores(fast, token, 0), right)
    finally:
        torch.set_default_dtype(before)


def test_a_fast_model_says_that_it_is_not_copied() -> None:
    with pytest.raises(TypeError, match="copy the plain one, and make both fast"):
        copy.deepcopy(speed_up_(model()))


def test_a_model_that_is_let_go_is_gone() -> None:
    """Not when Python next looks for circles: its weights may be all the memory there is."""
    import gc

    gc.disable()
    try:
        fast = speed_up_(model())
        scores(fast, torch.tensor([[5]]), 0)
        gone = weakref.ref(fast)
        del fast
        assert gone() is None
    finally:
        gc.enable()


def test_float32_writes_the_same_200_tokens() -> None:
    plain, fast = (built(fast, max_seq_len=256, max_batch_size=1) for fast in (False, True))
    in_one_call(fast.model)
    prompt = "import os\n\n\nclass Reader:\n"
    found, right = (each.generate([each.tokenizer.encode(prompt, True, False)], 200, 0.0)[0] for each in (fast, plain))
    assert found == right
    assert len(found[0]) == 200


def test_bfloat16_weights_lose_less_than_a_thousandth_of_perplexity() -> None:
    """Token by token, over the cache in bfloat16, against the same weights in float32 throughout: the embedded ones."""
    exact = Llama.build(max_seq_len=512, max_batch_size=1)
    fast = built(True, max_seq_len=512, max_batch_size=1, dtype=torch.bfloat16)
    for weight in exact.model.parameters():
        weight.data = weight.data.bfloat16().float()
    text = inspect.getsource(heapq)  # 512 tokens: of 187, chance alone made a thousandth
    tokens = torch.tensor([exact.tokenizer.encode(text, bos=True, eos=False)[:512]])
    steps = in_one_call(fast.model)

    def losses(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores[0, :-1], tokens[0, 1:])

    with torch.inference_mode():
        right = losses(exact.model(tokens))
        one_by_one = [steps(tokens[:, i : i + 1], i, fast.model.own_cache()) for i in range(tokens.shape[1])]
        found = losses(fast.model.logits(torch.cat(one_by_one, 1)))
    assert abs(float((found - right).exp()) - 1) < 1e-3


def test_what_is_no_position_or_no_token_is_said() -> None:
    fast = speed_up_(model())
    token = torch.zeros(1, 1, dtype=torch.int64)
    with torch.inference_mode():
        for starts, B in ((64, 1), (-1, 1), ([0, 1], 1), (0, 4)):
            with pytest.raises(ValueError, match=r"positions|rows"):
                fast.hidden(token.expand(B, 1), starts, fast.own_cache())
        for wrong in (-1, 96):
            with pytest.raises(IndexError, match=f"token {wrong} of a vocabulary of 96"):
                fast.hidden(torch.tensor([[5, wrong]]), 0, fast.own_cache())
        right = fast.hidden(torch.tensor([[5, 95]]), 62, fast.own_cache())
        assert torch.equal(fast.hidden(torch.tensor([[5, 95]], dtype=torch.int32), 62, fast.own_cache()), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_at_an_offset_are_the_first_rows_bit_by_bit(dtype: torch.dtype) -> None:
    """The same tokens after the same tokens, in whichever rows; and no other row is touched."""
    fast = speed_up_(model(dtype, max_batch_size=4))
    steps, cache = in_one_call(fast), fast.own_cache()
    tokens = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    stores = (*cache.keys, *cache.values)
    with torch.inference_mode():
        found = []
        for row in (0, 2, 1, 0):
            for store in stores:
                store.normal_(generator=torch.Generator().manual_seed(2))
            before = [store.clone() for store in stores]
            given = []
            for starts, T in ((0, 10), (10, 1), ([11, 3], 2), ([13, 5], 1)):
                span = cache.span(starts, 2, T, row)
                given.append(steps(tokens[:, :T], span, cache))
            found.append([torch.cat(given, 1), *(store[row : row + 2].clone() for store in stores)])
            for store, was in zip(stores, before, strict=True):
                assert not torch.equal(store[row : row + 2, :, :10], was[row : row + 2, :, :10])
                assert torch.equal(store[:row], was[:row])
                assert torch.equal(store[row + 2 :], was[row + 2 :])
    for part, *others in zip(*found, strict=True):
        for other in others:  # a first row's own slots: the noise behind them differs
            assert torch.equal(other[0, :, :13], part[0, :, :13])
            assert torch.equal(other[1, :, :10], part[1, :, :10])


def test_a_span_is_the_positions_that_it_was_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """One position for all rows or one for each; and one at an offset that is none is refused by whoever makes it."""
    fast = speed_up_(model())
    steps, cache = in_one_call(fast), fast.own_cache()
    token = torch.tensor([[5], [6]])
    with torch.inference_mode():
        steps(torch.arange(30).view(3, 10), 0, cache)
        for starts in (7, [7, 3], torch.tensor([7, 3])):
            right = steps(token, starts, cache)
            monkeypatch.setattr("llama.cache.Span.positions", None)  # a tensor that no step needs
            span = cache.span(starts, 2, 1, 0, torch.tensor([[7], [3]]))
            assert torch.equal(steps(token, span, cache), right)
            assert torch.equal(steps(token.int(), span, cache), right)
            monkeypatch.undo()
        with pytest.raises(ValueError, match="2 rows of tokens from row 2 on"):
            cache.span(0, 2, 1, 2)
        with pytest.raises(AssertionError, match="a span of 2 tokens"):
            steps(token, cache.span(0, 2, 2), cache)


def test_what_a_step_overwrites_is_forgotten() -> None:
    """Whoever steps, by whatever kind of position, and where the step fails too."""
    fast = speed_up_(model())
    steps, cache = in_one_call(fast), fast.own_cache()
    token = torch.tensor([[5], [6]])
    with torch.inference_mode():
        for starts, left in (
            (4, [4, 4, 8]),
            ([2, 6], [2, 6, 8]),
            (torch.tensor([1, 7]), [1, 7, 8]),
            (None, [8, 3, 3]),
        ):
            for row in range(3):
                cache.tokens[row] = list(range(8))
            steps(token, cache.span(3, 2, 1, 1) if starts is None else starts, cache)
            assert [len(own) for own in cache.tokens] == left
        cache.tokens[0] = list(range(8))
        with pytest.raises(IndexError):
            steps(torch.tensor([[96]]), 5, cache)
        assert cache.tokens[0] == [0, 1, 2, 3, 4]


def test_the_models_own_cache_needs_no_name() -> None:
    fast = speed_up_(model())
    in_one_call(fast)
    with torch.inference_mode():
        right = fast.hidden(torch.tensor([[5]]), 0, fast.own_cache())
        assert torch.equal(fast.hidden(torch.tensor([[5]]), 0), right)


def test_another_cache_is_written_to_and_then_the_first_again() -> None:
    exact, fast = model(), speed_up_(model())
    steps = in_one_call(fast)
    first, second = fast.own_cache(), fast.new_cache(1, 32)
    one, two = torch.tensor([[5]]), torch.tensor([[7, 8]])
    with torch.inference_mode():
        steps(one, 3, first)
        kept = [tensor.clone() for tensor in (*first.keys, *first.values)]
        other = exact.new_cache(1, 32)
        torch.testing.assert_close(steps(two, 0, second), exact.hidden(two, 0, other), rtol=0, atol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(kept, (*first.keys, *first.values), strict=True))
        for found, right in zip((*second.keys, *second.values), (*other.keys, *other.values), strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-4)
        steps(one, 0, first)
        assert not torch.equal(kept[0], first.keys[0])


def test_other_caches_and_prompts_are_left_to_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = speed_up_(model())
    steps, left = in_one_call(fast), []
    monkeypatch.setattr(steps, "blocks", lambda tokens, start, cache: left.append(tuple(tokens.shape)))
    with torch.inference_mode():
        steps(torch.zeros(1, FEW + 1, dtype=torch.int64), 0, fast.own_cache())
        steps(torch.zeros(1, 2, dtype=torch.int64), 0, int8_cache(fast))
        steps(torch.zeros(1, 3, dtype=torch.int64))
        steps(torch.zeros(1, 0, dtype=torch.int64), 0, fast.own_cache())
    assert left == [(1, FEW + 1), (1, 2), (1, 3), (1, 0)]


def on_a_rank(init_method: str, scheme: str | None) -> Tensor:
    ranks = parallel.start(init_method=init_method, timeout=60)
    with ranks.all_ranks():
        made = model()
        if scheme:
            quantize_(made, scheme)
        fast = speed_up_(made)
        in_one_call(fast)
        return read(fast, left_to_the_blocks=not (scheme and multiplies_bfloat16()))


def read(fast: Transformer, left_to_the_blocks: bool) -> Tensor:
    """Scores of a prompt, longer than a step may be or not, and of steps after it."""
    prompt = 36 if left_to_the_blocks else FEW // 2
    tokens = torch.arange(2 * (prompt + 4)).view(2, -1)
    parts = (
        (tokens[:, :prompt], 0),
        (tokens[:, prompt : prompt + 1], prompt),
        (tokens[:, prompt + 1 : prompt + 2], [prompt + 1, 11]),
        (tokens[:, prompt + 2 :], prompt + 2),
    )
    found = [scores(fast, part, starts) for part, starts in parts]
    row_1 = fast.own_cache().span(prompt + 3, 1, 1, row=1)
    return torch.cat([*found, scores(fast, tokens[1:, -1:], row_1).expand(2, -1, -1)], 1)


@pytest.mark.parametrize(("ranks", "scheme"), [(2, None), (2, "int4"), (4, None)])
def test_ranks_together_compute_what_one_does(ranks: int, scheme: str | None) -> None:
    """On four there are more ranks than kv heads. Blocks may read a quantised prompt in bfloat16: there only steps."""
    made = model()
    left = not (scheme and multiplies_bfloat16())
    expected = read(speed_up_(quantize_(made, scheme) if scheme else made), left_to_the_blocks=left)
    assert expected.abs().max() > 1
    assert not torch.equal(expected[:, -1], expected[:, -2])
    for found in on_ranks(on_a_rank, ranks, scheme, limit=120):
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDED if scheme else 2e-4)
