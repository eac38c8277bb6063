"""Structured output: whatever the model would rather write, the whole answer is a text of the grammar.

What comes out is read by others: `re.fullmatch`, `json.loads`, Python's own parser, a list of choices.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.prompts import Prompt, completion, dialog, infilling
from llama.requests import Event
from llama.tokenizer import Detokenizer, Tokenizer

pytest.importorskip("llguidance", reason="grammars are compiled by llguidance: pip install 'codellama[grammar]'")
from llama.serve.grammar import Answer, Grammar, compile_grammar

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b b", 'q"\\', "ü😀"]}, "maxItems": 3},
        "point": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}]},
    },
    "required": ["name", "age", "tags", "point"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", "not at all", " leading", "  two", "a😀b", "naïve\n", "x" * 30]
DATE = r"\d{4}-(0[1-9]|1[0-2])-\d\d"
SUM = 'start: term (" + " term){0,5}\nterm: NUMBER | "(" NUMBER "*" NUMBER ")"\nNUMBER: /[1-9][0-9]{0,3}/'
CALL = 'root ::= name "(" (name (", " name){0,3})? ")"\nname ::= [a-z] [a-z0-9_]{0,8}'


def is_person(text: str) -> bool:
    found = json.loads(text)
    items = PERSON["properties"]["tags"]["items"]["enum"]  # type: ignore[index]
    return (
        list(found) == ["name", "age", "tags", "point"]
        and isinstance(found["name"], str)
        and len(found["name"]) <= 12
        and type(found["age"]) is int
        and 0 <= found["age"] <= 150
        and len(found["tags"]) <= 3
        and all(tag in items for tag in found["tags"])
        and (found["point"] is None or (len(found["point"]) <= 2 and all(type(p) is bool for p in found["point"])))
    )


def is_sum(text: str) -> bool:
    return isinstance(ast.parse(text, mode="eval").body, (ast.BinOp, ast.Constant))


CASES: dict[str, tuple[dict[str, Any], Callable[[str], object]]] = {
    "regex": ({"regex": DATE}, lambda text: re.fullmatch(DATE, text)),
    "json_schema": ({"json_schema": PERSON}, is_person),
    "lark": ({"lark": SUM}, is_sum),
    "gbnf": ({"gbnf": CALL}, lambda text: re.fullmatch(r"[a-z]\w*\((\w+(, \w+)*)?\)", text)),
    "choice": ({"choice": CHOICES}, lambda text: text in CHOICES),
}


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(max_seq_len=512, max_batch_size=4)


def prompts_of(tokenizer: Tokenizer) -> list[Prompt]:
    """One of each kind: an answer ends by other ids in each, and its first space means something else."""
    return [
        completion(tokenizer, "def f(x):\n    return "),
        infilling(tokenizer, "a = ", "\nprint(a)\n"),
        dialog(tokenizer, [{"role": "user", "content": "Say something."}]),
        completion(tokenizer, ""),
    ]


def answers(llama: Llama, grammar: Grammar, prompts: Sequence[Prompt], **settings: Any) -> list[tuple[str, str | None]]:
    """All answers at once, as they stream, and why each ended."""
    from llama.requests import Request
    from llama.sampling import Sampling

    seed, temperature = settings.pop("seed", 0), settings.pop("temperature", 0.0)
    requests = [
        Request(
            llama.tokenizer,
            prompt,
            settings.get("limit", 200),
            Sampling(temperature, 1.0, seed=seed + row),
            settings.get("stop", ()),
            lookup=settings.get("lookup", 0),
            row=row,
            allowed=grammar.start(prompt),
        )
        for row, prompt in enumerate(prompts)
    ]
    events: list[list[Event]] = [[] for _ in prompts]
    for event in llama.loop.run(requests):
        events[event.row].append(event)
    return [("".join(event.text for event in own), own[-1].finish_reason) for own in events]


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("lookup", [0, 8])
def test_every_answer_is_a_text_of_the_grammar(llama: Llama, kind: str, lookup: int) -> None:
    """Greedily and drawn, four rows at a time, with and without tokens proposed ahead."""
    asked, holds = CASES[kind]
    grammar, prompts = compile_grammar(llama.tokenizer, **asked), prompts_of(llama.tokenizer)
    for temperature, seed in [(0.0, 0), *((1.5, 10 * seed) for seed in range(2))]:
        for text, reason in answers(llama, grammar, prompts, temperature=temperature, seed=seed, lookup=lookup):
            assert reason == "stop"
            assert holds(text), text


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_many_seeds_at_every_temperature(llama: Llama, kind: str) -> None:
    asked, holds = CASES[kind]
    grammar, prompts = compile_grammar(llama.tokenizer, **asked), prompts_of(llama.tokenizer)
    for seed in range(60):
        found = answers(llama, grammar, prompts, temperature=(0.3, 1.0, 5.0)[seed % 3], seed=seed * 7, lookup=seed % 9)
        assert all(reason == "stop" and holds(text) for text, reason in found), found


def test_proposed_tokens_change_nothing(llama: Llama) -> None:
    grammar, prompts = compile_grammar(llama.tokenizer, json_schema=PERSON), prompts_of(llama.tokenizer)
    for seed in range(2):
        both = [answers(llama, grammar, prompts, temperature=1.0, seed=seed, lookup=lookup) for lookup in (0, 8)]
        assert both[0] == both[1]


def test_a_json_object_ends_or_was_cut_by_the_limit(llama: Llama) -> None:
    """Any object has no bound: those that the model ends parse, the others are the beginning of one."""
    grammar, prompts = compile_grammar(llama.tokenizer, json_object=True), prompts_of(llama.tokenizer)
    ended = 0
    for seed in range(4):
        for text, reason in answers(llama, grammar, prompts, temperature=1.0, seed=seed, limit=60):
            assert text.startswith("{") or not text
            if reason == "stop":
                assert isinstance(json.loads(text), dict)
                ended += 1
    assert ended


def test_a_stop_string_cuts_what_the_grammar_allows(llama: Llama) -> None:
    """What stands before the stop is the beginning of a text of the grammar."""
    grammar, prompts = compile_grammar(llama.tokenizer, gbnf=CALL), prompts_of(llama.tokenizer)
    for text, reason in answers(llama, grammar, prompts, stop=("(",)):
        assert reason == "stop"
        assert re.fullmatch(r"[a-z]\w*", text)


def text_of(tokenizer: Tokenizer, tokens: Sequence[int], continues: bool) -> str:
    reader = Detokenizer(tokenizer, continues)
    return "".join(reader.push(token) for token in tokens) + reader.flush()


@pytest.mark.parametrize("continues", [True, False])
def test_a_mask_allows_what_the_definition_allows(llama: Llama, continues: bool) -> None:
    """Of a few choices the definition is: the text so far and the piece's begin one of them, and an answer may end
    where its text is one. The mask may hold fewer, where the next character is certain; then it holds at least one."""
    tokenizer, rng = llama.tokenizer, random.Random(0)
    prompt = Prompt([1], frozenset({tokenizer.eos_id}), continues)
    grammar = compile_grammar(tokenizer, choice=CHOICES)
    whole = [i for i in range(3, tokenizer.n_words) if not tokenizer.byte_of(i)]
    marks = {tokenizer.prefix_id, tokenizer.middle_id, tokenizer.suffix_id, tokenizer.eot_id}
    for _ in range(4):
        allowed, answer = grammar.start(prompt), list[int]()
        for _ in range(40):
            mask, text = allowed(answer), text_of(tokenizer, answer, continues)
            assert bool(mask[tokenizer.eos_id]) == (text in CHOICES and not text.endswith("\ufffd"))
            following = [t for t in mask.nonzero().flatten().tolist() if t != tokenizer.eos_id]
            if not text.endswith("\ufffd"):
                fits = {
                    t
                    for t in rng.sample(whole, 200) + [t for t in following if t in whole]
                    if any(c.startswith(text_of(tokenizer, [*answer, t], continues)) for c in CHOICES)
                    and t not in marks
                }
                assert {t for t in following if t in whole} <= fits
                certain = {c[len(text) : len(text) + 1] for c in CHOICES if c.startswith(text)}
                if len(certain) > 1:
                    assert fits <= set(following)
            assert following or mask[tokenizer.eos_id]
            if not following:
                break
            answer.append(rng.choice(following))
        assert text_of(tokenizer, answer, continues) in CHOICES


def test_it_may_be_called_with_any_list(llama: Llama) -> None:
    """Shorter, longer, another, impossible: the mask is that of a fresh start."""
    grammar, rng = compile_grammar(llama.tokenizer, json_schema=PERSON), random.Random(1)
    for prompt in prompts_of(llama.tokenizer):
        allowed, lists = grammar.start(prompt), [list[int]()]
        for _ in range(60):
            base = rng.choice(lists)[: rng.choice([0, 3, 9, 100])]
            for _ in range(rng.choice([1, 1, 5])):
                following = allowed(base).nonzero().flatten().tolist()
                base = [*base, rng.choice(following) if rng.random() < 0.9 else rng.randrange(llama.tokenizer.n_words)]
            lists.append(base)
            assert torch.equal(allowed(base), grammar.start(prompt)(base))


def test_an_answer_ends_by_the_prompts_own_ids(llama: Llama) -> None:
    tokenizer = llama.tokenizer
    grammar = compile_grammar(tokenizer, choice=["ab", "abc"])
    for prompt in prompts_of(tokenizer):
        allowed = grammar.start(prompt)
        for text, ends in (("a", False), ("ab", True), ("abc", True), ("x", True)):  # "x": nothing else may come
            mask = allowed(tokenizer.encode_infilling(text))
            assert {t for t in (tokenizer.eos_id, tokenizer.eot_id) if mask[t]} == (set(prompt.stop) if ends else set())


def test_text_never_contains_a_mark(llama: Llama) -> None:
    grammar = compile_grammar(llama.tokenizer, regex=r"(.|\n)*")
    mask = grammar.start()([])
    tokenizer = llama.tokenizer
    marks = tokenizer.prefix_id, tokenizer.middle_id, tokenizer.suffix_id, tokenizer.eot_id
    assert not any(mask[t] for t in (0, 1, *marks))
    assert int(mask.sum()) > tokenizer.n_words * 0.9


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "nothing; give one of"),
        ({"regex": "a", "lark": 'start: "a"'}, "regex, lark; give one of"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "a(b"}, "unclosed group"),
        ({"regex": 3}, "give a text"),
        ({"regex": "x" * 2_000_000}, "at most"),
        ({"json_schema": {"type": "objct"}}, "objct"),
        ({"json_schema": "{"}, "can't be read"),
        ({"json_schema": [1]}, "a schema is an object"),
        ({"json_schema": {"not": {"type": "string"}}}, "Unimplemented"),
        ({"json_schema": {"$ref": "http://example.com/x"}}, "does not fetch|not present"),
        ({"json_schema": {"$ref": "#"}}, "no text fits"),
        ({"lark": "start"}, "lark can't be compiled"),
        ({"lark": "start: start"}, "no text fits"),
        ({"gbnf": 'root ::= "a'}, "gbnf can't be read"),
        ({"gbnf": "root ::= other"}, "'other' not found"),
        ({"choice": []}, "at least one"),
        ({"choice": "ab"}, "give a list"),
        ({"choice": ["\ud800"]}, "surrogate"),
    ],
)
def test_what_cannot_be_compiled_is_said(llama: Llama, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compile_grammar(llama.tokenizer, **asked)


def test_anchors_around_a_regex_say_nothing(llama: Llama) -> None:
    tokenizer = llama.tokenizer
    for regex, text in ((r"^ab$", "ab"), (r"a\$", "a$"), (r"a\\$", "a\\")):
        allowed, ids = compile_grammar(tokenizer, regex=regex).start(), tokenizer.encode_infilling(text)
        assert all(allowed(ids[:i])[token] for i, token in enumerate(ids))
        assert allowed(ids)[tokenizer.eos_id]


def test_classes_of_a_regex_are_those_of_ascii(llama: Llama) -> None:
    """Python's and Rust's Unicode are of different years: a digit of one is none of the other."""
    tokenizer = llama.tokenizer
    for regex in (r"\d/\w", r"[\d_]/[^\W]"):
        grammar = compile_grammar(tokenizer, regex=regex)
        for text in ("7/é", "٣/a", "7/a"):
            allowed, ids = grammar.start(), tokenizer.encode_infilling(text)
            reads = all(allowed(ids[:i])[token] for i, token in enumerate(ids)) and bool(allowed(ids)[tokenizer.eos_id])
            assert reads == bool(re.fullmatch(regex, text, re.ASCII))


def test_without_llguidance_a_sentence(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"pip install 'codellama\[grammar\]'"):
        compile_grammar(llama.tokenizer, regex="a")


def test_a_grammar_that_grows_too_complex_ends_its_own_answer_alone(llama: Llama) -> None:
    def too_complex(answer: list[int]) -> torch.Tensor:
        raise ValueError("the grammar is too complex")

    good = compile_grammar(llama.tokenizer, regex=DATE)
    prompt = completion(llama.tokenizer, "a = ")
    events = llama.loop.run(
        [
            _request(llama, prompt, 0, good.start(prompt)),
            _request(llama, prompt, 1, too_complex),
        ]
    )
    with pytest.raises(ValueError, match="too complex"):
        list(events)


def _request(llama: Llama, prompt: Prompt, row: int, allowed: Any) -> Any:
    from llama.requests import Request

    return Request(llama.tokenizer, prompt, 30, row=row, allowed=allowed)


def seconds_of_masks(answer: Answer, tokens: list[int]) -> list[float]:
    found = []
    for n in range(len(tokens) + 1):
        begin = time.perf_counter()
        answer(tokens[:n])
        found.append(time.perf_counter() - begin)
    return found


@pytest.mark.slow
def test_a_mask_costs_little_at_the_published_vocabulary(tmp_path: Path) -> None:
    """32016 pieces, trained on the standard library. A decode step of M takes 40 ms and more here (docs/LOG.md); a
    tenth of that is the bar for the mean, while a text is read token by token."""
    tokenizer = big_tokenizer(tmp_path / "tokenizer.model")
    text = json.dumps(
        {"name": "Ada Byron", "age": 36, "tags": ["a", "ü😀"], "point": [True, False]}, ensure_ascii=False
    )
    code = "def area(width, height):\n    return width * height\n" * 20
    cases = [({"json_schema": PERSON}, text), ({"json_object": True}, text), ({"regex": r"(.|\n)*"}, code)]
    for asked, written in cases:
        begin = time.perf_counter()
        grammar = compile_grammar(tokenizer, **asked)
        compiled = time.perf_counter() - begin
        seconds = seconds_of_masks(grammar.start(), tokenizer.encode_infilling(written))
        seconds += seconds_of_masks(grammar.start(), tokenizer.encode_infilling(written))
        mean, worst = sum(seconds) / len(seconds), max(seconds)
        times = ", ".join(f"{value * 1e3:.3f}" for value in (compiled, mean, worst))
        print(f"{next(iter(asked))}: ms to compile, of a mask on average and at most: {times}")
        assert mean < 0.004


def big_tokenizer(path: Path) -> Tokenizer:
    from llama.train.tokenizer import train_tokenizer

    library = sorted(Path(ast.__file__).parent.rglob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="ignore") for file in library if "site-packages" not in str(file)]
    train_tokenizer(texts, 32016, path)
    return Tokenizer(path)
