"""What the tests of the Hugging Face format share: small random Llamas made by transformers, and answers of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import parallel
from llama.checkpoint import load, open_checkpoint
from llama.model import Transformer

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "MHA, 32000, theta 1e4": {"num_key_value_heads": 8, "vocab_size": 32000, "rope_parameters": {"rope_theta": 1e4}},
    "GQA, 32016, theta 1e6": {"vocab_size": 32016, "rope_parameters": {"rope_theta": 1e6}},
    "MQA": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6}},
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 1e6}},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 32}},
}


def make(seed: int = 0, **changes: Any) -> Any:
    """A LlamaForCausalLM in float32, loud enough that greedy answers have no near-ties; it never writes ids 0 to 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=draw)
            p.copy_(1 + 0.2 * noise if p.dim() == 1 else noise * (2 / p.shape[1]) ** 0.5)
        head = model.get_output_embeddings().weight
        head[:3] = 0
        if head is not model.get_input_embeddings().weight:
            head *= 4
    return model


def read(path: Path) -> Any:
    """What transformers makes of a folder, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def read_ours(path: Path, rows: int = 2, slots: int = 128, init_method: str | None = None) -> Transformer:
    """What the core makes of a folder, in float32, on as many ranks as there are."""
    ranks = parallel.start(init_method=init_method, device="cpu")
    opened = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(opened.args(max_batch_size=rows, max_seq_len=slots))
    load(model, opened, ranks, torch.float32)
    return model


def logits(model: Any, tokens: Tensor) -> Tensor:
    """(B, T, V) of transformers' model."""
    with torch.inference_mode():
        found: Tensor = model(tokens).logits
    return found


def greedy(step: Callable[[Tensor, int], Tensor], tokens: Tensor, n: int) -> Tensor:
    """(B, n) tokens by a model of ours, `step` (tokens, start_pos) to logits: the likeliest, one after the other."""
    written, start = [tokens], 0
    with torch.inference_mode():
        for _ in range(n):
            scores = step(written[-1], start)
            start += written[-1].shape[1]
            written.append(scores[:, -1:].argmax(-1))
    return torch.cat(written[1:], 1)


def greedy_of_transformers(model: Any, tokens: Tensor, n: int) -> Tensor:
    """The same by transformers' own generate, with nothing to stop at."""
    model.generation_config.eos_token_id = None
    everything: Tensor = model.generate(tokens, max_new_tokens=n, do_sample=False, pad_token_id=0)
    return everything[:, tokens.shape[1] :]
