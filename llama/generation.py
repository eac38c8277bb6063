"""Llama: a checkpoint brought to life, and its three jobs, completion, infilling and chat.

All jobs take one road: a job makes `Prompt`s, `stream` writes their answers through the loop of decoding.py and
hands out `Event`s as text becomes certain, and `generate` and the jobs collect them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint import open_checkpoint
from llama.config import RopeScaling
from llama.decoding import Answer, Event, Stop, decode, last_logits, prefill
from llama.lookup import agreeing
from llama.model import Transformer
from llama.parallel import Ranks, default_dtype, start
from llama.prompts import (
    UNSAFE_ERROR,
    ChatPrediction,
    CompletionPrediction,
    Details,
    Dialog,
    InfillingPrediction,
    Message,
    Prompt,
    check_dialog,
    completion,
    dialog,
    has_special_tags,
    infilling,
)
from llama.sampling import Sampling, logprobs_of
from llama.tokenizer import Tokenizer

EMBEDDED = Path(__file__).parent / "assets" / "tiny"
"""The small checkpoint that comes with the package."""


class Llama:
    """A model and its tokenizer, ready to write."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        ranks: Ranks | None = None,
        seed: int = 1,
        prefill_chunk: int = 512,
        lookup: int = 0,
    ) -> None:
        """`prefill_chunk` tokens of each row are read at once: more is faster up to a point, and takes more memory.
        `seed` begins the series of seeds for calls that don't give their own. `lookup` is how many tokens are guessed
        at a time from what stands before (lookup.py): faster where code repeats itself, and the same text."""
        self.model = model
        self.tokenizer = tokenizer
        self.ranks = ranks or start(device=model.norm.weight.device)
        self.prefill_chunk = prefill_chunk
        self.lookup = lookup
        self._seeds = torch.Generator().manual_seed(seed)

    @classmethod
    def build(
        cls,
        ckpt_dir: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 4,
        model_parallel_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 1,
        rope_theta: float | None = None,
        rope_scaling: RopeScaling | None = None,
        prefill_chunk: int = 512,
        lookup: int = 0,
        quantize: str | None = None,
        fast: bool = False,
        compile: bool = False,
        timeout: float = 60.0,
    ) -> Llama:
        """Reads a checkpoint folder (default: the embedded one) onto this process, or onto the ranks of torchrun.

        The cache holds `max_batch_size` rows of `max_seq_len` tokens, prompt and answer together. `model_parallel_size`
        is the number of ranks that share the model (default: all), however many shards the folder has. `dtype` is
        bfloat16 on a GPU and float32 on a CPU unless given. `rope_theta` and `rope_scaling` replace params.json's.
        `prefill_chunk` and `lookup` are the constructor's. `quantize` is a scheme of llama/quantize (int8, int4 ...);
        `fast` puts in the blocks of llama/fast, and `compile` compiles them for fixed shapes. `timeout` is how many
        seconds a rank waits for the others.
        Raises ValueError, on every rank, where the folder is no whole checkpoint or does not fit its tokenizer, the
        ranks, or the memory.

        These are the steps, each public, for those who need others: parallel.start, checkpoint.open_checkpoint,
        Tokenizer, Transformer on the meta device, checkpoint.load, Llama.
        """
        ranks = start(model_parallel_size, device=device, timeout=timeout)
        dtype = dtype or default_dtype(ranks.device)
        with ranks.together():
            if dtype == torch.float16 and ranks.device.type == "cpu":
                raise ValueError("dtype float16 is too slow to use on a CPU: choose bfloat16 or float32")
            checkpoint = open_checkpoint(EMBEDDED if ckpt_dir is None else ckpt_dir)
            args = checkpoint.args(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
            args.rope_theta = args.rope_theta if rope_theta is None else rope_theta
            args.rope_scaling = args.rope_scaling if rope_scaling is None else rope_scaling
            tokenizer = Tokenizer(checkpoint.tokenizer_path if tokenizer_path is None else tokenizer_path)
            if tokenizer.n_words != args.vocab_size:
                raise ValueError(
                    f"the tokenizer has {tokenizer.n_words} pieces but the embedding in {checkpoint.path} has "
                    f"{args.vocab_size} rows: use the tokenizer.model that came with this checkpoint "
                    "(the Python models have 32000 pieces, those that infill 32016)"
                )
            # What can't fit is refused here, before a byte is read; CODELLAMA_IGNORE_PLAN=1 lets it pass.
            import_module("llama.interop.plan").require(checkpoint, args, ranks, dtype, prefill_chunk, quantize)
            with torch.device("meta"):
                model = Transformer(args)
            # Whatever was saved quantised stays so; a plain checkpoint is read by `checkpoint.load`.
            import_module("llama.quantize.layers").quantize_load(model, checkpoint, ranks, dtype, quantize)
            if fast or compile:
                import_module("llama.fast").prepare_(model, prefill_chunk, fast, compile, ranks.leads)
        return cls(model, tokenizer, ranks=ranks, seed=seed, prefill_chunk=prefill_chunk, lookup=lookup)

    # Tokens ----------------------------------------------------------------------------------------------------------

    def stream(
        self,
        prompts: Sequence[Prompt | str | Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        *,
        top_k: int | None = None,
        stop: Stop = (),
        seed: int | Sequence[int] | None = None,
        reuse: bool = False,
    ) -> Iterator[Event]:
        """Writes an answer to each prompt (a Prompt, a text, or ids) and yields what is certain of it as it comes.

        `max_gen_len` (default: all that max_seq_len has room for) limits each answer. A `seed` makes an answer
        reproducible, whatever its batch mates; one number gives every row the same draws, so that rows of one prompt
        want a list. More prompts than max_batch_size are answered in turns. `reuse` keeps what the cache holds of the
        same beginning, for one prompt at a time: a chat's next turn. Raises ValueError, before the model runs, for a
        prompt that is empty or longer than max_seq_len and for settings that can't be.
        """
        asked = [self._prompt(prompt) for prompt in prompts]
        if not asked:
            raise ValueError("there is nothing to answer: give at least one prompt")
        if max_gen_len is not None and max_gen_len < 0:
            raise ValueError(f"max_gen_len is {max_gen_len}; it must be 0 or more, or None for as much as fits")
        if seed is None:
            seed = torch.randint(2**62, (len(asked),), generator=self._seeds).tolist()
        seeds = [seed] * len(asked) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(asked):
            raise ValueError(f"{len(seeds)} seeds for {len(asked)} prompts: give one, or one for each")
        answers = []
        for row, (prompt, own_seed) in enumerate(zip(asked, seeds, strict=True)):
            self._check(row, prompt.tokens)
            room = self.model.args.max_seq_len - len(prompt.tokens)
            limit = room if max_gen_len is None else min(room, max_gen_len)
            sampling = Sampling(temperature, top_p, top_k, own_seed)
            answers.append(Answer(row, prompt, sampling, limit, stop, self.tokenizer, self.lookup))
        return self._stream(answers, reuse)

    def _prompt(self, prompt: Prompt | str | Sequence[int]) -> Prompt:
        if isinstance(prompt, str):
            return completion(self.tokenizer, prompt)
        return prompt if isinstance(prompt, Prompt) else Prompt(list(prompt), frozenset({self.tokenizer.eos_id}))

    def _check(self, row: int, tokens: Sequence[int]) -> None:
        limit, words = self.model.args.max_seq_len, self.model.args.vocab_size
        if not 0 < len(tokens) <= limit:
            raise ValueError(
                f"prompt {row} has {len(tokens)} tokens; this model was built for 1 to {limit}: shorten the prompt or "
                "build with a larger max_seq_len"
            )
        if not all(0 <= token < words for token in tokens):
            raise ValueError(f"prompt {row} has ids outside 0 to {words - 1}, the model's vocabulary")

    @torch.inference_mode()
    def _stream(self, answers: list[Answer], reuse: bool) -> Iterator[Event]:
        full = [answer for answer in answers if answer.limit == 0]
        answers = [answer for answer in answers if answer.limit > 0]
        rows = self.model.args.max_batch_size
        for first in range(0, len(answers), rows):
            active = sorted(answers[first : first + rows], key=lambda a: len(a.tokens), reverse=True)
            known = self._known(active[0].tokens) if reuse and len(active) == 1 else 0
            cache = self.model.own_cache()
            cache.owner, cache.tokens = active, []
            logits = last_logits(self.model, [a.tokens for a in active], self.prefill_chunk, known)
            cache.tokens = active[0].tokens if len(active) == 1 else []  # the very list, which grows with the answer
            if not (yield from decode(self.model, self.ranks, active, logits)):
                return
        yield from (answer.end("length") for answer in full)

    def _known(self, tokens: list[int]) -> int:
        """How many of `tokens`, short of the last, are those whose keys and values stand in row 0 of the cache."""
        read = self.model.own_cache().tokens[:-1]  # the last token was sampled, perhaps not read
        return agreeing(read, tokens[:-1])

    @torch.inference_mode()
    def score(self, texts: Sequence[str | Sequence[int]]) -> list[Details]:
        """The log-probability of each token of given texts (or ids) after those before it; None for the first.

        A text is encoded as a prompt to complete, so its first token is bos. Scores are computed a chunk of one row
        at a time, so memory does not grow with the length.
        """
        sequences = [self._prompt(text).tokens for text in texts]
        for row, tokens in enumerate(sequences):
            self._check(row, tokens)
        cache = self.model.own_cache()
        cache.owner, cache.tokens = None, []
        found: list[list[float | None]] = [[None] for _ in sequences]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
        rows = self.model.args.max_batch_size
        for turn in (order[first : first + rows] for first in range(0, len(order), rows)):
            for at, h in prefill(self.model, [sequences[i] for i in turn], self.prefill_chunk):
                for row, i in enumerate(turn[: h.shape[0]]):
                    following = torch.tensor(sequences[i][at + 1 : at + 1 + h.shape[1]], device=h.device)
                    if len(following):
                        logits = self.model.logits(h[row, : len(following)])
                        found[i] += logprobs_of(logits, following).tolist()
        pieces = ([self.tokenizer.token_piece(t) for t in tokens] for tokens in sequences)
        return [Details(tokens=t, logprobs=p) for t, p in zip(pieces, found, strict=True)]

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        stop_token: int | None = None,
        *,
        top_k: int | None = None,
        stop: Stop = (),
        seed: int | Sequence[int] | None = None,
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:
        """Ids that continue each prompt, up to eos or `stop_token`, and on request their log-probabilities.

        With `echo` both begin with the prompt's own; the first token's log-probability is None. Arguments and errors
        are those of `stream`.
        """
        ends = frozenset({self.tokenizer.eos_id} if stop_token is None else {self.tokenizer.eos_id, stop_token})
        asked = [Prompt(list(tokens), ends) for tokens in prompt_tokens]
        results = self._collect(asked, max_gen_len, temperature, top_p, top_k=top_k, stop=stop, seed=seed)
        tokens = [(p.tokens if echo else []) + r.tokens for p, r in zip(asked, results, strict=True)]
        if not logprobs:
            return tokens, None
        before = [s["logprobs"] for s in self.score([p.tokens for p in asked])] if echo else [[] for _ in asked]
        return tokens, [[*own, *r.logprobs] for own, r in zip(before, results, strict=True)]

    def _collect(self, asked: Sequence[Prompt], *settings: Any, **named: Any) -> list[Event]:
        """All events of each row in one; the settings are those of `stream`."""
        rows: list[list[Event]] = [[] for _ in asked]
        for event in self.stream(asked, *settings, **named):
            rows[event.row].append(event)
        return [
            Event(
                row,
                [token for event in events for token in event.tokens],
                "".join(event.text for event in events),
                [logprob for event in events for logprob in event.logprobs],
                events[-1].finish_reason if events else None,
            )
            for row, events in enumerate(rows)
        ]

    def _details(self, result: Event, logprobs: bool, before: Details | None = None) -> Details:
        """What a prediction holds more with `logprobs`; those of an echoed prompt come first."""
        if not logprobs:
            return {}
        start = before or Details(tokens=[], logprobs=[])
        pieces = [self.tokenizer.token_piece(token) for token in result.tokens]
        return Details(tokens=start["tokens"] + pieces, logprobs=[*start["logprobs"], *result.logprobs])

    # Jobs ------------------------------------------------------------------------------------------------------------

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        top_k: int | None = None,
        stop: Stop = (),
        seed: int | Sequence[int] | None = None,
    ) -> list[CompletionPrediction]:
        """Continues each text: `generation`, `finish_reason`, and with `logprobs` the `tokens` and their `logprobs`.

        `echo` puts the prompt before all of these. Arguments and errors are those of `stream`.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one text; give a list of texts")
        asked = [completion(self.tokenizer, text) for text in prompts]
        results = self._collect(asked, max_gen_len, temperature, top_p, top_k=top_k, stop=stop, seed=seed)
        scores = self.score([p.tokens for p in asked]) if echo and logprobs else [None] * len(asked)
        return [
            CompletionPrediction(
                generation=(text if echo else "") + result.text,
                finish_reason=result.finish_reason,
                **self._details(result, logprobs, before),
            )
            for text, result, before in zip(prompts, results, scores, strict=True)
        ]

    def text_infilling(
        self,
        prefixes: Sequence[str],
        suffixes: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
        *,
        top_k: int | None = None,
        stop: Stop = (),
        seed: int | Sequence[int] | None = None,
    ) -> list[InfillingPrediction]:
        """Writes what stands between each prefix and suffix: `generation`, `full_text` with all three parts, and as
        `text_completion`. `suffix_first` asks in SPM order. ValueError where the checkpoint has no infilling marks."""
        if isinstance(prefixes, str) or isinstance(suffixes, str):
            raise ValueError("prefixes or suffixes is one text; give two lists of texts")
        if len(prefixes) != len(suffixes):
            raise ValueError(f"{len(prefixes)} prefixes and {len(suffixes)} suffixes: give as many of both")
        parts = list(zip(prefixes, suffixes, strict=True))
        asked = [infilling(self.tokenizer, prefix, suffix, suffix_first) for prefix, suffix in parts]
        results = self._collect(asked, max_gen_len, temperature, top_p, top_k=top_k, stop=stop, seed=seed)
        return [
            InfillingPrediction(
                generation=result.text,
                full_text=prefix + result.text + suffix,
                finish_reason=result.finish_reason,
                **self._details(result, logprobs),
            )
            for (prefix, suffix), result in zip(parts, results, strict=True)
        ]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        top_k: int | None = None,
        stop: Stop = (),
        seed: int | Sequence[int] | None = None,
    ) -> list[ChatPrediction]:
        """Answers each dialog: `generation` is the assistant's message, the rest as `text_completion`.

        A dialog that contains special tags is not answered: its message is UNSAFE_ERROR, its finish_reason "refused".
        ValueError that names the dialog where the roles don't alternate or it does not end with the user.
        """
        asked: dict[int, Prompt] = {}
        for i, messages in enumerate(dialogs):
            try:
                check_dialog(messages)
                if not has_special_tags(messages):
                    asked[i] = dialog(self.tokenizer, messages)
            except ValueError as error:
                raise ValueError(f"dialog {i}: {error}") from error
        if not dialogs:
            raise ValueError("there are no dialogs: give at least one")
        refused = Event(-1, [], UNSAFE_ERROR, [], "refused")
        if isinstance(seed, Sequence) and len(seed) == len(dialogs):
            seed = [seed[i] for i in asked]
        prompts = [*asked.values()]
        settings: dict[str, Any] = {"top_k": top_k, "stop": stop, "seed": seed}
        found = self._collect(prompts, max_gen_len, temperature, top_p, **settings) if asked else []
        results = dict(zip(asked, found, strict=True))
        return [
            ChatPrediction(
                generation=Message(role="assistant", content=result.text, destination="user"),
                finish_reason=result.finish_reason,
                **self._details(result, logprobs),
            )
            for result in (results.get(i, refused) for i in range(len(dialogs)))
        ]
