"""Other compositions: chains of changes to one value, decisions, and two lists at once.

A chain applies two or three changes to a text, a list or a number, one after the other. A decision returns one of
several things by tests of a number or a text. Two lists are combined element by element, and summed up.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llama.train.exercises.exercise import INDENT, Exercise, Parameter
from llama.train.exercises.operations import FILTERS
from llama.train.exercises.values import draw_value, run_function


@dataclass(frozen=True)
class Change:
    """A change of a value: `does` in the imperative with {v} for it or "it", `made` with {v}, `label` in names."""

    name: str
    does: str
    made: str
    label: str
    out: str = ""
    """The kind of what comes of it, where that is another."""
    values: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


TEXT: tuple[Change, ...] = (
    Change("strip", "strip {v}", "{v}.strip()", "strip"),
    Change("lower", "convert {v} to lower case", "{v}.lower()", "lower"),
    Change("upper", "convert {v} to upper case", "{v}.upper()", "upper"),
    Change("title", "capitalize each word of {v}", "{v}.title()", "title"),
    Change("capitalize", "capitalize {v}", "{v}.capitalize()", "capitalize"),
    Change("swapcase", "swap the case of {v}", "{v}.swapcase()", "swap_case"),
    Change("reverse", "reverse {v}", "{v}[::-1]", "reverse"),
    Change("underscores", "replace the spaces in {v} by underscores", '{v}.replace(" ", "_")', "underscore"),
    Change("hyphens", "replace the spaces in {v} by hyphens", '{v}.replace(" ", "-")', "hyphenate"),
    Change("no_spaces", "remove the spaces from {v}", '{v}.replace(" ", "")', "remove_spaces"),
    Change("no_letter", "remove every {k} from {v}", '{v}.replace({k}, "")', "remove", values=('"a"', '"e"', '"-"'),
           names=("letter", "char", "part")),
    Change("append", "append {k} to {v}", "{v} + {k}", "append", values=('"!"', '"?"', '"."', '"s"'),
           names=("suffix", "ending")),
    Change("prepend", "put {k} in front of {v}", "{k} + {v}", "prepend", values=('"> "', '"#"', '"Re: "'),
           names=("prefix", "start")),
    Change("first", "keep the first {k} characters of {v}", "{v}[:{k}]", "first", values=("1", "2", "3", "5"),
           names=("n", "count", "length")),
    Change("last", "keep the last {k} characters of {v}", "{v}[-{k}:]", "last", values=("1", "2", "3", "5"),
           names=("n", "count", "length")),
    Change("drop", "drop the first character of {v}", "{v}[1:]", "drop_first"),
    Change("drop_last", "drop the last character of {v}", "{v}[:-1]", "drop_last"),
    Change("twice", "repeat {v} twice", "{v} * 2", "repeat"),
    Change("no_vowels", "remove the vowels from {v}", '"".join(c for c in {v} if c not in "aeiou")', "remove_vowels"),
    Change("no_digits", "remove the digits from {v}", '"".join(c for c in {v} if not c.isdigit())', "remove_digits"),
    Change("sorted", "sort the characters of {v}", '"".join(sorted({v}))', "sort"),
    Change("words_reversed", "reverse the order of the words of {v}", '" ".join({v}.split()[::-1])', "reverse_words"),
    Change("words_sorted", "sort the words of {v}", '" ".join(sorted({v}.split()))', "sort_words"),
    Change("second", "keep every second character of {v}", "{v}[::2]", "every_second"),
    Change("split", "split {v} into words", "{v}.split()", "split", "list[str]"),
    Change("split_comma", "split {v} at commas", '{v}.split(",")', "split_commas", "list[str]"),
    Change("length", "return the length of {v}", "len({v})", "length", "int"),
    Change("words", "count the words of {v}", "len({v}.split())", "count_words", "int"),
)  # fmt: skip
LISTS: tuple[Change, ...] = (
    Change("sort", "sort {v}", "sorted({v})", "sort"),
    Change("sort_down", "sort {v} in descending order", "sorted({v}, reverse=True)", "sort_descending"),
    Change("reverse", "reverse {v}", "{v}[::-1]", "reverse"),
    Change("unique", "remove duplicates from {v}", "list(dict.fromkeys({v}))", "unique"),
    Change("first", "keep the first {k} elements of {v}", "{v}[:{k}]", "first", values=("1", "2", "3"),
           names=("n", "k", "count")),
    Change("last", "keep the last {k} elements of {v}", "{v}[-{k}:]", "last", values=("1", "2", "3"),
           names=("n", "k", "count")),
    Change("drop", "drop the first {k} elements of {v}", "{v}[{k}:]", "drop", values=("1", "2", "3"),
           names=("n", "k", "count")),
    Change("drop_last", "drop the last element of {v}", "{v}[:-1]", "drop_last"),
    Change("second", "keep every second element of {v}", "{v}[::2]", "every_second"),
    Change("double", "double each element of {v}", "[x * 2 for x in {v}]", "double"),
    Change("square", "square each element of {v}", "[x ** 2 for x in {v}]", "square"),
    Change("plus", "add {k} to each element of {v}", "[x + {k} for x in {v}]", "add", values=("1", "2", "5", "10"),
           names=("amount", "offset", "n")),
    Change("even", "keep the even elements of {v}", "[x for x in {v} if x % 2 == 0]", "even"),
    Change("positive", "keep the positive elements of {v}", "[x for x in {v} if x > 0]", "positive"),
    Change("append", "append {k} to {v}", "{v} + [{k}]", "append", values=("0", "1", "10"), names=("value", "item")),
    Change("prepend", "put {k} in front of {v}", "[{k}] + {v}", "prepend", values=("0", "1", "10"),
           names=("value", "item")),
    Change("twice", "repeat {v} twice", "{v} * 2", "repeat"),
    Change("rotate", "move the first element of {v} to its end", "{v}[1:] + {v}[:1]", "rotate"),
    Change("sum", "sum {v}", "sum({v})", "sum", "int"),
    Change("length", "count the elements of {v}", "len({v})", "length", "int"),
    Change("text", "join {v} with commas", '",".join(str(x) for x in {v})', "join", "str"),
)  # fmt: skip
NUMBERS: tuple[Change, ...] = (
    Change("double", "double {v}", "{v} * 2", "double"),
    Change("square", "square {v}", "{v} ** 2", "square"),
    Change("half", "halve {v}, rounding down", "{v} // 2", "halve"),
    Change("plus", "add {k} to {v}", "{v} + {k}", "add", values=("1", "2", "3", "5", "10"), names=("amount", "offset")),
    Change("minus", "subtract {k} from {v}", "{v} - {k}", "subtract", values=("1", "2", "4", "5"),
           names=("amount", "offset")),
    Change("times", "multiply {v} by {k}", "{v} * {k}", "multiply", values=("3", "4", "5", "10"),
           names=("factor", "times")),
    Change("negate", "negate {v}", "-{v}", "negate"),
    Change("absolute", "take the absolute value of {v}", "abs({v})", "absolute"),
    Change("remainder", "take the remainder of {v} divided by {k}", "{v} % {k}", "modulo", values=("2", "3", "7", "10"),
           names=("divisor", "modulus")),
    Change("text", "convert {v} to a string", "str({v})", "to_string", "str"),
)  # fmt: skip
_KINDS: dict[str, tuple[tuple[Change, ...], tuple[str, ...], str, str]] = {
    "text": (TEXT, ("text", "s", "string", "word", "name"), "str", "a string"),
    "list": (LISTS, ("numbers", "items", "values", "nums", "lst"), "list[int]", "a list of numbers"),
    "number": (NUMBERS, ("n", "x", "number", "value"), "int", "a number"),
}


def chain(rng: random.Random) -> Exercise | None:
    """Two or three changes, one after the other; one now and then."""
    domain = rng.choice(("text", "text", "list", "list", "number"))
    changes, names, kind, called = _KINDS[domain]
    size = rng.choice((1, 2, 2, 2, 3))
    same = [c for c in changes if not c.out]
    chosen = [*rng.sample(same, size - 1), rng.choice(changes)]
    if len({c.name for c in chosen}) < size:
        return None
    argument = rng.choice(names)
    others: list[Parameter] = []
    literals: list[str] = []
    says, asks, labels = [], [], []
    code, steps = argument, []
    step_name = argument if rng.random() < 0.5 else "result"
    for number, change in enumerate(chosen):
        constant = ""
        if change.values:
            name = rng.choice(change.names)
            constant = rng.choice(change.values)
            if rng.random() < 0.35 and name != argument and name not in [p.name for p in others]:
                others.append(Parameter(name, "str" if constant.startswith('"') else "int"))
                literals.append(rng.choice(change.values))
                constant = name
        it = argument if number == 0 else "it"
        says.append(change.does.replace("{v}", it).replace("{k}", constant))
        spoken = f"a given {constant}" if constant.isidentifier() else constant
        does = change.does.replace("every {k}", "{k}") if spoken != constant else change.does
        asks.append(does.replace("{v}", called if number == 0 else "it").replace("{k}", spoken))
        labels.append(change.label)
        made = change.made.replace("{k}", constant)
        steps.append(made.replace("{v}", argument if number == 0 else step_name))
        code = made.replace("{v}", _closed(code, made))
    if size > 1 and chosen[-1].does.startswith("return ") is False and rng.random() < 0.3:
        says[-1] += " and return it" if size == 2 else ""
    last = steps.pop()
    staged = [f"{step_name} = {step}" for step in steps] + [f"return {last}"]
    bodies = [[f"return {code}"], staged]
    body, other = (bodies[0], bodies[1]) if rng.random() < (0.45 if size > 1 else 1) else (bodies[1], bodies[0])
    if len(body[0]) > 100:
        return None
    name = "_and_".join(labels) if size > 1 and rng.random() < 0.6 else "_".join(labels)
    if rng.random() < 0.15:
        name = rng.choice(
            ("transform", "convert", "change", "process", "apply", f"process_{domain}", f"clean_{domain}")
        )
    returns = chosen[-1].out or kind
    exercise = Exercise(
        f"{domain} chain: {' · '.join(c.name for c in chosen)}", {"text": "strings", "list": "lists"}.get(domain,
        "numbers"),
        name, (Parameter(argument, kind, called), *others), returns, _sentence(says), tuple(body), (), _sentence(asks),
    )  # fmt: skip
    what = {"text": "sentence", "list": "list[int]", "number": "int"}[domain]
    return _with_examples(exercise, other, lambda n: ", ".join([draw_value(what, rng, n), *literals]))


def _closed(code: str, made: str) -> str:
    """The code in brackets where what is done to it binds tighter."""
    simple = code.isidentifier() or (code.endswith((")", "]")) and " + " not in code and " * " not in code)
    free = any(f"({start}" in made for start in ("{v})", "{v},")) or " in {v}" in made
    return code if simple or free else f"({code})"


def _sentence(parts: Sequence[str]) -> str:
    text = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    return text[:1].upper() + text[1:]


def _with_examples(exercise: Exercise, other: Sequence[str], draw: object) -> Exercise | None:
    function = run_function(replace(exercise, body=tuple(other)))
    examples: list[tuple[str, str]] = []
    for attempt in range(10):
        arguments = draw(attempt)  # type: ignore[operator]
        result = function(arguments)
        if result is not None and all(arguments != given for given, _ in examples):
            examples.append((arguments, result))
        if len(examples) == 4:
            break
    if len(examples) < 3 or len({result for _, result in examples}) < 2:
        return None
    return replace(exercise, examples=tuple(examples))


_LABELS = (
    ('"even"', '"odd"'), ('"yes"', '"no"'), ('"small"', '"large"'), ('"low"', '"high"'), ("True", "False"),
    ('"ok"', '"error"'), ("1", "0"), ('"red"', '"green"'), ('"pass"', '"fail"'), ('"cheap"', '"expensive"'),
    ('"young"', '"old"'), ('"cold"', '"warm"'), ('"short"', '"long"'), ('"A"', '"B"'), ('"fizz"', '"buzz"'),
    ('"left"', '"right"'), ("0", "1"), ('"light"', '"heavy"'),
)  # fmt: skip
_OUTCOMES = (
    ("{v}", "{v}"), ("twice {v}", "{v} * 2"), ("half of {v}, rounded down", "{v} // 2"), ("the square of {v}",
    "{v} ** 2"),
    ("0", "0"), ("{v} plus 1", "{v} + 1"), ("{v} minus 1", "{v} - 1"), ("the negative of {v}", "-{v}"),
    ("3 times {v}", "3 * {v}"), ("-1", "-1"), ("{v} plus 10", "{v} + 10"), ("None", "None"),
)  # fmt: skip


def decision(rng: random.Random) -> Exercise | None:
    """One of two or three things, by tests of a number or a text."""
    kind = rng.choice(("int", "int", "int", "str"))
    names = ("n", "number", "x", "value", "score", "age", "amount") if kind == "int" else ("text", "s", "word", "name")
    argument = rng.choice(names)
    tests = [f for f in FILTERS if f.kind == kind and not f.many and f.name not in ("odd2", "nonempty", "same_ends")]
    size = rng.choice((1, 1, 2, 2, 3))
    chosen = rng.sample(tests, size)
    if any(t.before for t in chosen):
        return None
    constants = [rng.choice(t.values) if t.values else "" for t in chosen]
    if kind == "int" and rng.random() < 0.6:
        pool = list(_OUTCOMES)
        drawn = rng.sample(pool, size + 1)
        said = [what for what, _ in drawn]
        made = [code.replace("{v}", argument) for _, code in drawn]
        returns = "int" if "None" not in made else "int | None"
    else:
        labels = [label for pair in rng.sample(_LABELS, 3) for label in pair]
        labels = list(dict.fromkeys(label for label in labels if label.startswith('"')))
        if size == 1 and rng.random() < 0.7:
            labels = list(rng.choice(_LABELS))
        if len(labels) < size + 1:
            return None
        said = made = labels[: size + 1]
        returns = "bool" if made[0] in ("True", "False") else "str" if made[0].startswith('"') else "int"
    conditions = [t.test.replace("{x}", argument).replace("{k}", k) for t, k in zip(chosen, constants, strict=True)]
    spoken = [t.singular.replace("{k}", k) for t, k in zip(chosen, constants, strict=True)]
    clauses = [f"{said[0]} if {{first}} {spoken[0]}"] + [f"{said[i]} if it {spoken[i]}" for i in range(1, size)]
    tail = rng.choice(("else {last}", "otherwise {last}", "and {last} otherwise")).replace("{last}", said[size])
    sentence = "Return " + ", ".join([*clauses, tail])
    says = sentence.replace("{first}", argument).replace("{v}", argument)
    a = "a number" if kind == "int" else "a string"
    asks = sentence.replace("{first}", a).replace("{v}", "the number")
    early: list[str] = []
    chained: list[str] = []
    for i, condition in enumerate(conditions):
        early += [f"if {condition}:", f"{INDENT}return {made[i]}"]
        chained += [f"{'elif' if i else 'if'} {condition}:", f"{INDENT}return {made[i]}"]
    early.append(f"return {made[size]}")
    chained += ["else:", f"{INDENT}return {made[size]}"]
    bodies = [early, chained]
    if size == 1:
        bodies.append([f"return {made[0]} if {conditions[0]} else {made[1]}"])
    body, other = rng.sample(bodies, 2)
    name = rng.choice(("classify", "check", "describe", "label", "decide", "choose", "adjust", "evaluate"))
    if rng.random() < 0.7:
        name += f"_{rng.choice(('number', 'value')) if kind == 'int' else rng.choice(('text', 'word'))}"
    key = f"decision: {' · '.join(t.name for t in chosen)} · {returns}"
    exercise = Exercise(key, "decisions", name, (Parameter(argument, kind),), returns, says, tuple(body), (), asks)
    constants_as_cases = [k for k in constants if k.isdigit()]
    cases = [*constants_as_cases, *(draw_value(kind, rng) for _ in range(12))]
    return _with_examples(exercise, other, lambda n: cases[n % len(cases)])


_PAIRED = (
    ("sums", "sum", "{p} + {q}"), ("products", "product", "{p} * {q}"), ("differences", "difference", "{p} - {q}"),
    ("larger values", "maximum", "max({p}, {q})"), ("smaller values", "minimum", "min({p}, {q})"),
    ("absolute differences", "absolute_difference", "abs({p} - {q})"),
    ("squared differences", "squared_difference", "({p} - {q}) ** 2"), ("averages", "average", "({p} + {q}) / 2"),
)  # fmt: skip
_PAIR_TESTS = (
    ("", "", ""), ("that are equal", "equal", "{p} == {q}"), ("that differ", "different", "{p} != {q}"),
    ("of which the first is larger", "increasing", "{p} > {q}"), ("of which the first is smaller", "smaller",
    "{p} < {q}"),
    ("that are both even", "even", "{p} % 2 == 0 and {q} % 2 == 0"),
    ("that are both positive", "positive", "{p} > 0 and {q} > 0"),
)  # fmt: skip
_PAIR_ENDS = (
    ("list", "a list of the {m}", "[{e} for {p}, {q} in zip({a}, {b}){c}]", "result = []", "result.append({e})",
     "return result", "list[int]"),
    ("sum", "the sum of the {m}", "sum({e} for {p}, {q} in zip({a}, {b}){c})", "total = 0", "total += {e}",
     "return total", "int"),
    ("largest", "the largest of the {m}, or 0", "max([{e} for {p}, {q} in zip({a}, {b}){c}], default=0)", "values = []",
     "values.append({e})", "return max(values, default=0)", "int"),
    ("count", "the number of different {m}", "len({{{e} for {p}, {q} in zip({a}, {b}){c}}})", "seen = set()",
     "seen.add({e})", "return len(seen)", "int"),
)  # fmt: skip


def paired(rng: random.Random) -> Exercise | None:
    """Two lists, element by element."""
    what, label, made = rng.choice(_PAIRED)
    clause, test_label, test = rng.choice(_PAIR_TESTS)
    how, phrase, one, start, step, end, returns = rng.choice(_PAIR_ENDS)
    a, b = rng.choice((("first", "second"), ("a", "b"), ("xs", "ys"), ("left", "right"), ("list1", "list2")))
    p, q = rng.choice((("x", "y"), ("p", "q"), ("m", "n")))
    values = {"p": p, "q": q, "a": a, "b": b}
    e = made.format(**values)
    condition = test.format(**values) if test else ""
    middle = f"{what} of the elements of {a} and {b}" + (f" {clause}" if clause else "")
    spoken = f"{what} of the elements of two lists" + (f" {clause}" if clause else "")
    comprehension = [f"return {one.format(**values, e=e, c=f' if {condition}' if condition else '')}"]
    inside = [f"if {condition}:", f"{INDENT}{step.format(e=e)}"] if condition else [step.format(e=e)]
    loop = [start, f"for {p}, {q} in zip({a}, {b}):", *(INDENT + line for line in inside), end]
    at = "i"
    indexed_inside = [line.replace("(", "(", 1) for line in inside]
    indexed = [start, f"for {at} in range(min(len({a}), len({b}))):", f"{INDENT}{p}, {q} = {a}[{at}], {b}[{at}]",
               *(INDENT + line for line in indexed_inside), end]  # fmt: skip
    body, other = rng.sample([comprehension, loop, comprehension, loop, indexed], 2)
    if body == other:
        other = indexed if body != indexed else loop
    name = "_".join(part for part in (how if how != "list" else "", test_label, f"{label}s") if part)
    verb = rng.choice(("Return", "Return", "Compute", "Get"))
    exercise = Exercise(
        f"paired: {label} · {test_label} · {how}", "lists", name, (Parameter(a, "list[int]"), Parameter(b,
        "list[int]")),
        returns, f"{verb} {phrase.format(m=middle)}", tuple(body), (), f"{verb} {phrase.format(m=spoken)}",
    )  # fmt: skip

    def arguments(attempt: int) -> str:
        return f"{draw_value('list[int]', rng, attempt)}, {draw_value('list[int]', rng, attempt)}"

    return _with_examples(exercise, other, arguments)
