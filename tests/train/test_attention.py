"""Attention written out gives what the model's own gives, forward and backward."""

from __future__ import annotations

import pytest
import torch

from llama.config import ModelArgs
from llama.model import Transformer
from llama.train import attention
from llama.train.attention import causal_attention


@pytest.mark.parametrize("block", [1, 5, 17, 256])
def test_written_out_attention_is_the_models_own(block: int, tiny: ModelArgs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    models = Transformer(tiny), Transformer(tiny)
    models[1].load_state_dict(models[0].state_dict())
    for layer in models[1].layers:
        layer.attention.attend = causal_attention  # type: ignore[union-attr]
    tokens = torch.randint(tiny.vocab_size, (3, 17))
    losses = [model(tokens).square().mean() for model in models]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1])
    for mine, own in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, own.grad, rtol=1e-4, atol=1e-7)
