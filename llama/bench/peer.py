"""transformers' LlamaForCausalLM, on the very weights that ours has, put to the same calls.

It is run as a careful user of it would: eager, its default attention, its own growing cache, no `generate` (which
would add overhead of its own), scores of the last position only. Its weights are ours, by its names: the tensors are
shared, but for queries and keys, whose rows it keeps in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llama.bench.subject import Work


class Transformers:
    """A LlamaForCausalLM as a `Subject`."""

    def __init__(self, model: Any, work: Work) -> None:
        self.model, self.work = model, work
        self._cache: Any = None

    def room(self, rows: int, slots: int) -> None:
        self._cache = None

    @torch.inference_mode()
    def read(self, prompts: Sequence[list[int]]) -> Tensor:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.model.config)
        return self._forward(torch.tensor(list(prompts), device=self.model.device))

    @torch.inference_mode()
    def step(self, tokens: Tensor, position: int) -> Tensor:
        behind = self._cache.get_seq_length() - position
        assert behind >= 0, f"a step at {position}; the cache ends at {position + behind}"
        if behind:
            self._cache.crop(-behind)  # the only way that it goes back
        return self._forward(tokens)

    def stream(self, prompts: Sequence[list[int]], n: int) -> Iterator[int]:
        tokens = self.read(prompts).argmax(-1, keepdim=True)
        for i in range(n):
            tokens.tolist()  # here the user's program has them
            yield 1
            if i < n - 1:
                tokens = self.step(tokens, len(prompts[0]) + i).argmax(-1, keepdim=True)

    @torch.inference_mode()
    def head(self, tokens: Tensor) -> Tensor:
        inner = self.model.model
        scores: Tensor = self.model.lm_head(inner.norm(inner.embed_tokens(tokens))[:, -1])
        return scores.float()

    def cache_bytes(self, rows: int, tokens: int) -> int:
        return rows * tokens * self.work.kv_slot * int(self.model.dtype.itemsize)

    def _forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        return scores[:, -1].float()


def transformers_model(config: Mapping[str, Any], weights: dict[str, Tensor]) -> Any:
    """A LlamaForCausalLM of these weights, by its own names, without a copy. ValueError without transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ValueError("--against transformers needs that package: pip install transformers") from error
    like = weights["model.norm.weight"]
    settings = LlamaConfig(**config)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(settings)
    model.load_state_dict(weights, strict=True, assign=True)
    # Its table of frequencies is no weight, so it is still where the model was made: nowhere.
    model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(like.device)
    return model.requires_grad_(False).eval()
