"""Llama: a checkpoint brought to life, and its three jobs, completion, infilling and chat.

All jobs take one road: a job makes `Prompt`s, `stream` makes requests of them and yields the loop's `Event`s as text
becomes certain, and `generate` and the jobs collect them. Any number of calls may be under way at once, in threads or
as streams that are read in turn: they share the rows of the cache, and each gets the text it would have got alone
(in float32; in 16 bits, rounding depends on what is computed side by side, unless the model's kernels prevent it).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from llama import prompts as forms
from llama.arguments import Stop, checked, listed, stops
from llama.checkpoint import Weights, open_checkpoint
from llama.checkpoint import load as load_plain
from llama.config import RopeScaling
from llama.decoding import Loop
from llama.errors import CheckpointError
from llama.model import Transformer
from llama.parallel import Ranks, start
from llama.prompts import Details, Dialog, Message, Prompt
from llama.requests import Allowed, Event, Request
from llama.sampling import Sampling
from llama.system import default_dtype
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

EMBEDDED = Path(__file__).parent / "assets" / "tiny"
"""The small checkpoint that comes with the package."""
Load = Callable[[Transformer, Weights, Ranks, torch.dtype], None]
"""Gives a model on the meta device its weights: `checkpoint.load`, or one that quantises them."""


class Settings(TypedDict, total=False):
    """What every call takes by keyword besides `temperature`, `top_p` and `max_gen_len`. Those of sampling are
    explained at `sampling.Sampling`."""

    top_k: int | None
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    allowed: Allowed | None
    """Restricts what may come next: a function of the answer's tokens so far to a mask (V,), or None."""
    stop: Stop
    seed: int | Iterable[int] | None
    """Makes answers reproducible. One number gives every row the same draws, so rows of one prompt want a list."""
    reuse: bool
    """False reads every prompt whole, whatever the cache holds of it."""


class Llama:
    """A model and its tokenizer, ready to write."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, ranks: Ranks | None = None, seed: int = 1,
        prefill_chunk: int = 512, lookup: int = 0,
    ) -> None:  # fmt: skip
        """`prefill_chunk` is the most prompt tokens that are read in one step: more is faster up to a point, takes more
        memory, and makes others wait longer. `seed` begins the series of seeds for calls that don't give their own.
        `lookup` is how many tokens are guessed at a time from what stands before (lookup.py): faster where code repeats
        itself, and the same text."""
        self.model, self.tokenizer, self.lookup = model, tokenizer, lookup
        self.ranks = ranks or start(device=model.norm.weight.device, silence=None)
        self.loop = Loop(model, self.ranks, chunk=prefill_chunk)
        self._seeds = torch.Generator("cpu").manual_seed(seed)

    @classmethod
    def build(
        cls, ckpt_dir: str | Path | None = None, tokenizer_path: str | Path | None = None, max_seq_len: int = 512,
        max_batch_size: int = 4, model_parallel_size: int | None = None, *,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, seed: int = 1,
        rope_theta: float | None = None, rope_scaling: RopeScaling | None = None,
        prefill_chunk: int = 512, lookup: int = 0, timeout: float = 60.0, silence: bool = True,
        load: Load = load_plain, prepare: Callable[[Transformer, Ranks], object] | None = None,
    ) -> Llama:  # fmt: skip
        """Reads a checkpoint folder (default: the embedded one) onto this process, or onto the ranks of torchrun.

        The cache holds `max_batch_size` rows of `max_seq_len` tokens, prompt and answer together. `model_parallel_size`
        is the number of ranks that share the model (default: all), however many shards the folder has. `dtype` is
        bfloat16 on a GPU and float32 on a CPU unless given. `rope_theta` and `rope_scaling` replace params.json's.
        `prefill_chunk` and `lookup` are the constructor's. `timeout` is how many seconds a rank waits for the others.
        What ranks other than the first print is dropped until `parallel.stop`; with `silence=False` all print.
        `load` reads the weights, and `prepare` changes the loaded model: `llama.load` makes both from words such as
        quantize="int8", fast=True. Raises, on every rank, CheckpointError where the folder is no whole checkpoint or
        does not fit its tokenizer, NotEnoughMemory, and ValueError for what else can't be: both are ValueErrors.

        These are the steps, each public, for those who need others: parallel.start, checkpoint.open_checkpoint,
        Tokenizer, Transformer on the meta device, checkpoint.load, Llama.
        """
        ranks = start(model_parallel_size, device=device, timeout=timeout, silence=silence)
        dtype = dtype or default_dtype(ranks.device)
        with ranks.all_ranks():
            if dtype == torch.float16 and ranks.device.type == "cpu":
                raise ValueError("dtype float16 is too slow to use on a CPU: choose bfloat16 or float32")
            checkpoint = open_checkpoint(EMBEDDED if ckpt_dir is None else ckpt_dir)
            args = checkpoint.args(max_seq_len=max_seq_len, max_batch_size=max_batch_size)
            args.rope_theta = args.rope_theta if rope_theta is None else rope_theta
            args.rope_scaling = args.rope_scaling if rope_scaling is None else rope_scaling
            tokenizer = Tokenizer(checkpoint.tokenizer_path if tokenizer_path is None else tokenizer_path)
            if tokenizer.n_words != args.vocab_size:
                found = f"{tokenizer.n_words} pieces but the embedding in {checkpoint.path} has {args.vocab_size} rows"
                remedy = "use the tokenizer.model that came with this checkpoint (32000 pieces; 32016 with infilling)"
                raise CheckpointError(f"the tokenizer has {found}: {remedy}")
            with torch.device("meta"):
                model = Transformer(args)
            load(model, checkpoint, ranks, dtype)
            if prepare is not None:
                with ranks.patience():  # one rank may compile for longer than another
                    prepare(model, ranks)
        return cls(model, tokenizer, ranks=ranks, seed=seed, prefill_chunk=prefill_chunk, lookup=lookup)

    @property
    def prefill_chunk(self) -> int:
        return self.loop.chunk

    # Tokens ----------------------------------------------------------------------------------------------------------

    def stream(
        self, prompts: Iterable[Prompt | str | Sequence[int | Message]], max_gen_len: int | None = None,
        temperature: float = 0.6, top_p: float = 0.9, *, logprobs: bool | int = False, **settings: Unpack[Settings],
    ) -> Generator[Event, None, None]:  # fmt: skip
        """Writes an answer to each prompt (a text, a dialog, ids, or a Prompt) and yields what is certain of it as it
        comes. A dialog, as `chat_completion` takes, may contain no special tags.

        `max_gen_len` (default: all that max_seq_len has room for) limits each answer. More prompts than max_batch_size
        wait for a free row. `logprobs` gives each token's log-probability, and a number as many alternatives of it. Of
        a prompt that begins like what a row of the cache holds, only the rest is read. Raises ValueError, before the
        model runs, for prompts and settings that can't be (PromptTooLong, which is one, for more than max_seq_len
        tokens); later NotFinite and LostRank.
        """
        asked = [self._prompt(row, prompt) for row, prompt in enumerate(listed("prompts", prompts))]
        told = None if logprobs is False else 0 if logprobs is True else logprobs
        return self.loop.run(self._requests(asked, max_gen_len, temperature, top_p, told, False, settings))

    def _requests(
        self, asked: Sequence[Prompt], max_gen_len: int | None, temperature: float, top_p: float,
        logprobs: int | None, score: bool, settings: Settings,
    ) -> list[Request]:  # fmt: skip
        if not asked:
            raise ValueError("there is nothing to answer: give at least one prompt")
        rest: dict[str, Any] = dict(settings)
        seed, stop = rest.pop("seed", None), stops(rest.pop("stop", ()))
        reuse, allowed, drawn = bool(rest.pop("reuse", True)), rest.pop("allowed", None), seed is None
        if max_gen_len is not None:
            max_gen_len = checked("max_gen_len", max_gen_len, (int, "at least", 0, 2**31 - 1))
        if seed is None:
            seed = torch.randint(2**62, (len(asked),), generator=self._seeds, device="cpu").tolist()
        seeds = list(seed) if isinstance(seed, Iterable) else [seed] * len(asked)
        if len(seeds) != len(asked):
            raise ValueError(f"{len(seeds)} seeds for {len(asked)} prompts: give one, or one for each")
        requests = []
        for row, (prompt, own) in enumerate(zip(asked, seeds, strict=True)):
            room = self.model.args.max_seq_len - len(prompt.tokens)
            limit = room if max_gen_len is None else min(room, max_gen_len)
            sampling = Sampling(temperature, top_p, seed=own, **rest)
            told = prompt, limit, sampling, stop, logprobs, score, reuse, self.lookup
            requests.append(Request(self.tokenizer, *told, row=row, allowed=allowed, drawn=drawn))
            self.loop.check(requests[-1])
        return requests

    def _prompt(self, row: int, prompt: Prompt | str | Sequence[int | Message]) -> Prompt:
        if isinstance(prompt, (str, Prompt)):
            return forms.completion(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
        try:
            items: list[Any] = list(prompt)
            if items and isinstance(items[0], Mapping):
                return forms.dialog(self.tokenizer, items)
            return Prompt([operator.index(token) for token in items], frozenset({self.tokenizer.eos_id}))
        except TypeError:
            raise ValueError(f"prompt {row} is {prompt!r:.80}; give a text, a dialog, ids, or a Prompt") from None
        except ValueError as error:
            raise ValueError(f"prompt {row}: {error}") from error

    def score(self, texts: Iterable[str | Sequence[int]]) -> list[Details]:
        """The log-probability of each token of given texts (or ids) after those before it; None for the first.

        A text is encoded as a prompt to complete, so its first token is bos. Scores are computed a chunk at a time, so
        memory does not grow with the length.
        """
        asked = [self._prompt(row, text) for row, text in enumerate(listed("texts", texts))]
        if not asked:
            return []
        requests = self._requests(asked, 0, 0.0, 1.0, None, True, {})
        for _ in self.loop.run(requests):
            pass
        return [self._scored(request) for request in requests]

    def _scored(self, request: Request) -> Details:
        pieces = [self.tokenizer.token_piece(token) for token in request.prompt.tokens]
        return Details(tokens=pieces, logprobs=list(request.prompt_logprobs))

    def generate(
        self, prompt_tokens: Iterable[Sequence[int]], max_gen_len: int | None = None, temperature: float = 0.6,
        top_p: float = 0.9, logprobs: bool = False, echo: bool = False, stop_token: int | None = None,
        **settings: Unpack[Settings],
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:  # fmt: skip
        """Ids that continue each prompt, up to eos or `stop_token`, and on request their log-probabilities.

        With `echo` both begin with the prompt's own; the first token's log-probability is None. Arguments and errors
        are those of `stream`.
        """
        asked = [self._prompt(row, tokens) for row, tokens in enumerate(listed("prompt_tokens", prompt_tokens))]
        ends = frozenset({self.tokenizer.eos_id} if stop_token is None else {self.tokenizer.eos_id, stop_token})
        asked = [Prompt(prompt.tokens, ends) for prompt in asked]
        results, details = self._collect(asked, max_gen_len, temperature, top_p, logprobs, echo, settings)
        tokens = [(p.tokens if echo else []) + r.tokens for p, r in zip(asked, results, strict=True)]
        return tokens, [d["logprobs"] for d in details] if logprobs else None

    def _collect(
        self, asked: Sequence[Prompt], max_gen_len: int | None, temperature: float, top_p: float, logprobs: bool,
        echo: bool, settings: Settings,
    ) -> tuple[list[Event], list[Details]]:  # fmt: skip
        """All events of each prompt in one, and what its prediction holds more with `logprobs`; those of an echoed
        prompt come first."""
        told = 0 if logprobs else None
        requests = self._requests(asked, max_gen_len, temperature, top_p, told, logprobs and echo, settings)
        rows: list[list[Event]] = [[] for _ in asked]
        for event in self.loop.run(requests):
            rows[event.row].append(event)
        results, details = [], []
        for request, events in zip(requests, rows, strict=True):
            tokens = [token for event in events for token in event.tokens]
            numbers = [logprob for event in events for logprob in event.logprobs]
            text, reason = "".join(event.text for event in events), events[-1].finish_reason if events else None
            results.append(Event(request.row, tokens, text, numbers, reason))
            before = self._scored(request) if request.score else Details(tokens=[], logprobs=[])
            pieces = [self.tokenizer.token_piece(token) for token in tokens]
            own = Details(tokens=before["tokens"] + pieces, logprobs=[*before["logprobs"], *numbers])
            details.append(own if logprobs else Details())
        return results, details

    # Jobs ------------------------------------------------------------------------------------------------------------

    def text_completion(
        self, prompts: Iterable[str], temperature: float = 0.6, top_p: float = 0.9, max_gen_len: int | None = None,
        logprobs: bool = False, echo: bool = False, **settings: Unpack[Settings],
    ) -> list[forms.CompletionPrediction]:  # fmt: skip
        """Continues each text: `generation`, `finish_reason`, and with `logprobs` the `tokens` and their `logprobs`.

        `echo` puts the prompt before all of these. Arguments and errors are those of `stream`.
        """
        texts = listed("prompts", prompts, str)
        asked = [forms.completion(self.tokenizer, text) for text in texts]
        found = self._collect(asked, max_gen_len, temperature, top_p, logprobs, echo, settings)
        return [
            forms.CompletionPrediction(
                generation=(text if echo else "") + result.text, finish_reason=result.finish_reason, **details
            )
            for text, result, details in zip(texts, *found, strict=True)
        ]

    def text_infilling(
        self, prefixes: Iterable[str], suffixes: Iterable[str], temperature: float = 0.6, top_p: float = 0.9,
        max_gen_len: int | None = None, logprobs: bool = False, suffix_first: bool = False,
        **settings: Unpack[Settings],
    ) -> list[forms.InfillingPrediction]:  # fmt: skip
        """Writes what stands between each prefix and suffix: `generation`, `full_text` with all three parts, and as
        `text_completion`. `suffix_first` asks in SPM order. ValueError where the checkpoint has no infilling marks."""
        prefixes, suffixes = listed("prefixes", prefixes, str), listed("suffixes", suffixes, str)
        if len(prefixes) != len(suffixes):
            raise ValueError(f"{len(prefixes)} prefixes and {len(suffixes)} suffixes: give as many of both")
        parts = list(zip(prefixes, suffixes, strict=True))
        asked = [forms.infilling(self.tokenizer, prefix, suffix, suffix_first) for prefix, suffix in parts]
        found = self._collect(asked, max_gen_len, temperature, top_p, logprobs, False, settings)
        return [
            forms.InfillingPrediction(
                generation=result.text,
                full_text=prefix + result.text + suffix,
                finish_reason=result.finish_reason,
                **details,
            )
            for (prefix, suffix), result, details in zip(parts, *found, strict=True)
        ]

    def chat_completion(
        self, dialogs: Iterable[Dialog], temperature: float = 0.6, top_p: float = 0.9,
        max_gen_len: int | None = None, logprobs: bool = False, **settings: Unpack[Settings],
    ) -> list[forms.ChatPrediction]:  # fmt: skip
        """Answers each dialog: `generation` is the assistant's message, the rest as `text_completion`.

        A dialog that contains special tags is not answered: its message is UNSAFE_ERROR, its finish_reason "refused".
        ValueError that names the dialog where the roles don't alternate or it does not end with the user.
        """
        asked: dict[int, Prompt] = {}
        given = listed("dialogs", dialogs)
        for i, messages in enumerate(given):
            if isinstance(messages, (Mapping, str)):
                raise ValueError("dialogs is one dialog, or something else; give a list of dialogs, each of messages")
            try:
                forms.check_dialog(messages)
                if not forms.has_special_tags(messages):
                    asked[i] = forms.dialog(self.tokenizer, messages)
            except ValueError as error:
                raise ValueError(f"dialog {i}: {error}") from error
        if not given:
            raise ValueError("there are no dialogs: give at least one")
        refused = (
            Event(-1, [], forms.UNSAFE_ERROR, [], "refused"),
            Details(tokens=[], logprobs=[]) if logprobs else Details(),
        )
        seed = settings.get("seed")
        if isinstance(seed, Iterable):
            seeds = list(seed)
            settings["seed"] = [seeds[i] for i in asked] if len(seeds) == len(given) else seeds
        found = {}
        if asked:
            answered = self._collect([*asked.values()], max_gen_len, temperature, top_p, logprobs, False, settings)
            found = dict(zip(asked, zip(*answered, strict=True), strict=True))
        return [
            forms.ChatPrediction(
                generation=Message(role="assistant", content=result.text, destination="user"),
                finish_reason=result.finish_reason,
                **details,
            )
            for result, details in (found.get(i, refused) for i in range(len(given)))
        ]
