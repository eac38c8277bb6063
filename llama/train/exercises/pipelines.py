"""Pipelines: which elements of some data, what is made of each, and what comes of them all.

A source says where elements come from: a list, the characters of a text, the digits of a number, a file's lines, the
rows of a matrix, dates, or records with fields. With a filter, a map and an aggregate it is a task; a task is written
as a loop, a comprehension, in stages, with filter and map, by recursion, or with a definition of the test.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from llama.train.exercises.exercise import INDENT, Exercise, Parameter
from llama.train.exercises.operations import AGGREGATES, FILTERS, IDENTITY, KEYS, MAPS, Aggregate, Filter, Map
from llama.train.exercises.values import draw_value, run_function

GENERIC = ("f", "solve", "compute", "process", "func", "calculate", "run", "solution", "answer", "my_function")
PYTHON = {"int": "int", "str": "str", "char": "str", "row": "list[int]", "date": "date", "same": "int"}


@dataclass(frozen=True)
class Source:
    """Where elements come from. `{a}` is the argument's name."""

    name: str
    domain: str
    kind: str
    annotation: str
    names: tuple[str, ...]
    """Of the argument."""
    elements: tuple[str, ...]
    """Names for an element, where the argument's name has no singular."""
    nouns: tuple[str, ...]
    places: tuple[str, ...]
    """In a docstring: "in {a}"."""
    wheres: tuple[str, ...]
    """In a question: "in a list"."""
    iterable: str = "{a}"
    value: str = ""
    """What `draw_value` is asked for; by default the annotation."""
    about: str = ""
    imports: tuple[str, ...] = ()
    opening: str = ""
    """A line that the rest of the body stands under."""
    indexed: bool = False
    """Whether it is a list, which can be indexed."""


SOURCES: tuple[Source, ...] = (
    Source("numbers", "lists", "int", "list[int]",
           ("numbers", "nums", "values", "items", "data", "lst", "integers", "xs", "elements", "scores"),
           ("number", "n", "x", "num", "value"), ("numbers", "numbers", "integers", "values", "elements"),
           ("in {a}", "in {a}", "of {a}"), ("in a list", "of a list", "in a list of numbers", "in a list of integers"),
           about="a list of numbers", indexed=True),
    Source("digits", "numbers", "int", "int", ("n", "number", "num", "value"), ("digit", "d"), ("digits",),
           ("of {a}", "in {a}"), ("of a number", "of an integer", "in a number"), "map(int, str({a}))", "natural",
           about="a number that is not negative"),
    Source("range", "numbers", "int", "int", ("n", "limit", "end", "number"), ("i", "number", "x", "k"),
           ("numbers", "integers"), ("from 1 to {a}", "between 1 and {a}"),
           ("from 1 to n", "between 1 and n", "from 1 up to n"), "range(1, {a} + 1)", "natural",
           about="the last number"),
    Source("below", "numbers", "int", "int", ("n", "limit", "end"), ("i", "number", "x", "k"),
           ("numbers", "integers"), ("below {a}", "less than {a} and not negative"), ("below n",), "range({a})",
           "natural", about="the limit"),
    Source("set", "sets", "int", "set[int]", ("numbers", "values", "items"), ("number", "n", "x", "value"),
           ("numbers", "values", "elements"), ("in the set {a}",), ("in a set", "of a set"), about="a set of numbers"),
    Source("tuple", "tuples", "int", "tuple[int, ...]", ("numbers", "values", "items"), ("number", "n", "x", "value"),
           ("numbers", "values", "elements"), ("in the tuple {a}",), ("in a tuple", "of a tuple"),
           about="a tuple of numbers"),
    Source("csv_numbers", "text", "int", "str", ("text", "line", "s"), ("part", "x", "number"), ("numbers",),
           ("in the comma-separated {a}",), ("in a comma-separated string",), 'map(int, {a}.split(","))',
           "numbers_text", about="numbers separated by commas"),
    Source("space_numbers", "text", "int", "str", ("text", "line", "s"), ("part", "x", "number"), ("numbers",),
           ("in {a}, which are separated by spaces,",), ("in a string of numbers separated by spaces",),
           "map(int, {a}.split())", "spaced_numbers", about="numbers separated by spaces"),
    Source("flat", "matrices", "int", "list[list[int]]", ("matrix", "grid", "rows", "lists"), ("value", "x", "cell"),
           ("numbers", "values", "elements"), ("in {a}",), ("in a matrix", "in a list of lists", "of a nested list"),
           about="a list of lists"),
    Source("words", "strings", "str", "list[str]", ("words", "strings", "names", "items", "texts", "tokens"),
           ("word", "w", "s", "string"), ("words", "strings"), ("in {a}", "in {a}", "of {a}"),
           ("in a list", "of a list", "in a list of strings", "in a list of words"), about="a list of strings",
           indexed=True),
    Source("text_words", "text", "str", "str", ("text", "sentence", "s", "line"), ("word", "w", "part"), ("words",),
           ("of {a}", "in {a}"), ("in a string", "of a sentence", "in a text", "of a text"), "{a}.split()",
           "sentence", about="a text"),
    Source("lines", "text", "str", "str", ("text", "content", "document"), ("line", "row"), ("lines",),
           ("of {a}", "in {a}"), ("of a text", "in a string", "of a multi-line string"), "{a}.splitlines()", "lines",
           about="a text of several lines"),
    Source("file", "files", "str", "str", ("path", "filename", "file_path", "name"), ("line", "row"), ("lines",),
           ("of the file at {a}", "in the file at {a}", "of a text file at {a}"),
           ("of a file", "of a text file", "in a file"), "file.read().splitlines()", "path", about="a path",
           opening="with open({a}) as file:"),
    Source("chars", "strings", "char", "str", ("text", "s", "string", "word", "sentence"), ("char", "c", "ch",
    "letter"),
           ("characters", "characters", "letters"), ("in {a}", "of {a}"),
           ("in a string", "of a string", "in a text", "of a word"), about="a string", value="sentence",
           indexed=True),
    Source("rows", "matrices", "row", "list[list[int]]", ("matrix", "rows", "grid", "lists"), ("row", "r", "line"),
           ("rows",), ("of {a}", "in {a}"), ("of a matrix", "in a matrix", "of a grid"), about="a matrix"),
    Source("lists", "lists", "row", "list[list[int]]", ("lists", "groups", "items"), ("group", "items", "x"),
           ("lists",), ("in {a}",), ("in a list of lists",), about="a list of lists"),
    Source("dates", "dates", "date", "list[date]", ("dates", "days"), ("day", "d", "date_"), ("dates",), ("in {a}",),
           ("in a list", "in a list of dates"), about="a list of dates", imports=("from datetime import date",),
           indexed=True),
)  # fmt: skip

_SINGULAR = {
    "numbers": "number", "nums": "num", "values": "value", "items": "item", "integers": "integer", "scores": "score",
    "elements": "element", "words": "word", "strings": "string", "names": "name", "texts": "text", "tokens": "token",
    "lines": "line", "rows": "row", "days": "day", "xs": "x", "parts": "part",
}  # fmt: skip


@dataclass(frozen=True)
class Schema:
    """Records: what many and one of them are called, and their fields (name, kind, plural)."""

    plural: str
    singular: str
    fields: tuple[tuple[str, str, str], ...]


SCHEMAS: tuple[Schema, ...] = (
    Schema("people", "person", (("name", "str", "names"), ("age", "int", "ages"), ("city", "str", "cities"))),
    Schema("students", "student", (("name", "str", "names"), ("grade", "int", "grades"), ("course", "str", "courses"))),
    Schema("products", "product", (("name", "str", "names"), ("price", "int", "prices"), ("stock", "int", "stocks"))),
    Schema("books", "book", (("title", "str", "titles"), ("year", "int", "years"), ("author", "str", "authors"))),
    Schema("employees", "employee", (("name", "str", "names"), ("salary", "int", "salaries"),
                                     ("department", "str", "departments"))),
    Schema("orders", "order", (("customer", "str", "customers"), ("total", "int", "totals"),
                               ("status", "str", "statuses"))),
    Schema("movies", "movie", (("title", "str", "titles"), ("rating", "int", "ratings"), ("genre", "str", "genres"))),
    Schema("players", "player", (("name", "str", "names"), ("score", "int", "scores"), ("team", "str", "teams"))),
    Schema("tasks", "task", (("title", "str", "titles"), ("priority", "int", "priorities"), ("owner", "str",
    "owners"))),
    Schema("animals", "animal", (("name", "str", "names"), ("weight", "int", "weights"), ("species", "str",
    "species"))),
    Schema("cities", "city", (("name", "str", "names"), ("population", "int", "populations"),
                              ("country", "str", "countries"))),
    Schema("cars", "car", (("model", "str", "models"), ("speed", "int", "speeds"), ("color", "str", "colors"))),
)  # fmt: skip
FORMS = ("mapping", "pairs", "dicts", "objects")
"""How records are kept: a dictionary of two fields, tuples of two, dictionaries, or objects of a dataclass."""


@dataclass(frozen=True)
class Task:
    """A source with operations of its kinds; names are chosen, `{k}` is not yet."""

    source: Source
    filter: Filter | None
    map: Map
    aggregate: Aggregate
    bind: str = ""
    """What the loop binds, where that is not one name: "name, score"."""
    before: str = ""

    @property
    def key(self) -> str:
        chosen = "" if self.filter is None else self.filter.name
        return f"{self.source.name}: {chosen} · {self.map.name} · {self.aggregate.name}"

    @property
    def parts(self) -> int:
        return (self.filter is not None) + bool(self.map.name) + (self.aggregate.name not in ("list", "count"))


def pipeline(rng: random.Random) -> Exercise | None:
    """A task drawn by chance, in one rendering; None where the draw makes no sense."""
    task = record_task(rng) if rng.random() < 0.25 else plain_task(rng)
    return None if task is None else render(task, rng)


def plain_task(rng: random.Random) -> Task | None:
    source = rng.choice(SOURCES[:1] * 4 + SOURCES[9:10] * 3 + SOURCES[13:14] * 2 + SOURCES)
    chosen = rng.choice([f for f in FILTERS if f.kind == source.kind]) if rng.random() < 0.66 else None
    made = rng.choice([m for m in MAPS if m.kind == source.kind]) if rng.random() < 0.4 else IDENTITY
    kind = source.kind if made is IDENTITY else made.out
    aggregate = _draw_aggregate(kind, made is IDENTITY, [k for k in KEYS if k.kind == kind], rng)
    if aggregate is None:
        return None
    task = Task(source, chosen, made, aggregate)
    return task if _makes_sense(task) else None


def _draw_aggregate(kind: str, plain: bool, keys: Sequence[Map], rng: random.Random) -> Aggregate | None:
    if rng.random() < 0.2 and keys:
        return by_key(rng.choice(keys), rng)
    if rng.random() < 0.12:
        tests = [f for f in FILTERS if f.kind == kind and not f.values and f.singular]
        return of_test(rng.choice(tests), rng) if tests else None
    fitting = [a for a in AGGREGATES if kind in a.kinds and (plain or not a.plain)]
    return rng.choice(fitting + [a for a in fitting if a.name in ("list", "sum", "count")]) if fitting else None


def _makes_sense(task: Task) -> bool:
    aggregate, chosen = task.aggregate, task.filter
    if chosen is None and task.map is IDENTITY:
        if aggregate.name in ("list", "first", "last", "positions", "position", "split", "first_k", "concat"):
            return False
        if task.source.kind == "char" and aggregate.name == "count":
            return False
    if aggregate.name in ("positions", "position") and not task.source.indexed:
        return False
    if task.source.name == "flat" and aggregate.name == "first_k":
        return False
    if task.source.name == "set" and aggregate.name in _ORDERED:
        return False
    if aggregate.name == "product" and task.source.name in ("range", "below"):
        return False
    return not (aggregate.name in ("positions", "position", "split") and chosen is None)


_ORDERED = ("list", "first", "last", "reversed", "running", "unique", "pairs_sum", "first_k", "split")
"""Aggregates that a set has no order for."""


def by_key(key: Map, rng: random.Random) -> Aggregate:
    """An aggregate by a key of the elements: grouped, counted, sorted, or the one with the most."""
    of, noun, label = key.made, key.noun, key.label
    if key.values:
        value = rng.choice(key.values)
        of, noun = of.replace("{k}", value), noun.replace("{k}", value)
    of = f"({of})" if " " in of and not of.endswith((")", "]")) else of
    kind = PYTHON.get(key.out, "int")
    choice = rng.choice(("group", "group", "count", "sort", "sort", "sort_down", "most", "least"))
    base = Aggregate(f"{choice} by {key.name}", ("any",), "{kind}", (), (), "", "{acc} = {{}}", named=True)
    if choice == "group":
        steps = (
            f"{{acc}}.setdefault({of}, []).append({{e}})",
            f"key = {of}\nif key not in {{acc}}:\n    {{acc}}[key] = []\n{{acc}}[key].append({{e}})",
        )
        return replace(
            base,
            returns=f"dict[{kind}, list[{{kind}}]]",
            phrases=(
                f"a dictionary that groups {{things}} by {noun}",
                f"{{things}} grouped by their {noun}",
                f"Group {{things}} by {noun}",
                f"a dictionary from each {noun} to the list of {{bare}} with it",
            ),
            labels=(f"group_by_{label}", f"group_{{things}}_by_{label}"),
            step=rng.choice(steps).replace("{x}", "{e}"),
            acc=("groups", "result", "grouped"),
        )
    if choice == "count":
        return replace(
            base,
            returns=f"dict[{kind}, int]",
            phrases=(
                f"how many {{bare}} there are for each {noun}",
                f"a dictionary that counts {{things}} by {noun}",
                f"Count {{things}} by {noun}",
            ),
            labels=(f"count_by_{label}", f"count_{{things}}_by_{label}"),
            step=f"key = {of}\n{{acc}}[key] = {{acc}}.get(key, 0) + 1".replace("{x}", "{e}"),
            acc=("counts", "result"),
        )
    function = "len" if of == "len({x})" else f"lambda {{v}}: {of.replace('{x}', '{v}')}"
    if choice in ("sort", "sort_down"):
        down = choice == "sort_down"
        tail = ", reverse=True" if down else ""
        words = (f"{noun} in descending order", f"descending {noun}") if down else (noun, f"their {noun}")
        return replace(
            base,
            returns="list[{kind}]",
            phrases=(
                *(f"{{things}} sorted by {word}" for word in words),
                f"Sort {{things}} by {words[0]}",
                f"a list of {{things}}, sorted by {words[0]}",
            ),
            labels=(f"sort_by_{label}", f"sort_{{things}}_by_{label}", f"{{things}}_by_{label}"),
            made=f"sorted({{iter}}, key={function}{tail})",
            start="{acc} = []",
            step="{acc}.append({e})",
            end=f"{{acc}}.sort(key={function}{tail})\nreturn {{acc}}",
            acc=("result", "found"),
            named=False,
        )
    word, call, sign = ("largest", "max", ">") if choice == "most" else ("smallest", "min", "<")
    step = f"if {{acc}} is None or {of} {sign} {of.replace('{x}', '{acc}')}:\n    {{acc}} = {{e}}"
    return replace(
        base,
        phrases=(f"the one of {{things}} with the {word} {noun}", f"the one with the {word} {noun} of {{things}}"),
        labels=(f"{call}_by_{label}", f"find_{call}_by_{label}"),
        made=f"{call}({{iter}}, key={function})",
        start="{acc} = None",
        step=step.replace("{x}", "{e}"),
        acc=("best", "result", "found"),
        empty=False,
    )


def of_test(test: Filter, rng: random.Random) -> Aggregate:
    """Whether any, all, or none of the elements pass a test."""
    how = rng.choice(("any", "all", "none"))
    asked = test.test.replace("{x}", "{e}")
    if test.name in ("nonempty", "row_full"):
        asked = "len({e}) > 0"
    asked = f"({asked})" if " or " in asked or " and " in asked else asked
    label = f"{how}_{test.label or test.adjective.replace('-', '_').replace(' ', '_')}"
    phrases: tuple[str, ...] = (
        f"True if none of {{things}} {test.singular}",
        f"Check that none of {{things}} {test.singular}",
    )
    step, end, made = f"if {asked}:\n    return False", "return True", f"not any({asked} for {{x}} in {{tail}})"
    if how == "any":
        phrases = (
            f"True if any of {{things}} {test.singular}",
            f"Check whether any of {{things}} {test.singular}",
            f"Check if at least one of {{things}} {test.singular}",
            f"whether any of {{things}} {test.singular}",
        )
        step, end, made = f"if {asked}:\n    return True", "return False", f"any({asked} for {{x}} in {{tail}})"
    elif how == "all":
        phrases = (
            f"True if all of {{things}} {test.plural}",
            f"Check whether all {{bare}} {test.plural}",
            f"whether each of {{things}} {test.singular}",
        )
        negated = f"not ({asked})" if " " in asked and not asked.startswith("(") else f"not {asked}"
        step, made = f"if {negated}:\n    return False", f"all({asked} for {{x}} in {{tail}})"
    return Aggregate(
        f"{how} {test.name}", ("any",), "bool", phrases, (label, f"{label}_in_{{things}}"), made, "", step, end,
        named=test.test.count("{x}") > 1,
    )  # fmt: skip


def record_task(rng: random.Random) -> Task | None:
    """A task about records: their fields are tested, taken, and are what is grouped, counted and sorted by."""
    schema, form = rng.choice(SCHEMAS), rng.choice(FORMS)
    fields = schema.fields[: 2 if form in ("mapping", "pairs") else 3]
    element = rng.choice((schema.singular, schema.singular, schema.singular[0], "item", "x"))
    one = {"mapping": "{f}", "pairs": "{f}", "dicts": '{x}["{f}"]', "objects": "{x}.{f}"}[form]
    access = {field: one.replace("{f}", field) for field, _, _ in fields}
    kept = f"({fields[0][0]}, {fields[1][0]})" if form in ("mapping", "pairs") else "{x}"
    field, kind, plural = rng.choice(fields)
    chosen: Filter | None = None
    if rng.random() < 0.75:
        tests = [f for f in FILTERS if f.kind == kind and "." not in f.name and f.name not in ("capital", "numeric")]
        drawn = rng.choice(tests)
        if kind == "str" and field != fields[0][0] and rng.random() < 0.7:
            values = tuple(f'"{value}"' for value in _FIELD_VALUES[field][:3])
            drawn = Filter("equals", "str", "", "is {k}", "are {k}", "{x} == {k}", values, (field, f"wanted_{field}"),
                           f"by_{field}")  # fmt: skip
        chosen = replace(
            drawn, name=f"{field} {drawn.name}", kind="record", adjective="",
            singular=f"whose {field} {drawn.singular}", plural=f"whose {field} {drawn.singular}",
            test=drawn.test.replace("{x}", access[field]),
            label=drawn.label or f"{drawn.adjective.replace('-', '_').replace(' ', '_')}_{field}",
        )  # fmt: skip
    taken, kind, plural = rng.choice(fields)
    keys = [Map(name, f_kind, f_kind, "", name, access[name], name) for name, f_kind, _ in fields]
    if rng.random() < 0.6:
        made = Map(taken, "record", kind, f"the {plural} of {{things}}", taken, access[taken], plural)
        aggregate = _draw_aggregate(kind, False, [], rng)
    else:
        made = Map("", "record", "record", "{things}", "", kept, "")
        aggregate = _record_aggregate(keys, form, fields, access, rng)
    if aggregate is None or (chosen is None and aggregate.name in ("list", "first", "last", "count", "first_k")):
        return None
    before = ""
    imports: tuple[str, ...] = ()
    if form == "objects":
        name = schema.singular.capitalize()
        lines = [f"{INDENT}{field}: {kind}" for field, kind, _ in fields]
        before, imports = "\n".join(["@dataclass", f"class {name}:", *lines]), ("from dataclasses import dataclass",)
    annotation = {
        "mapping": f"dict[{fields[0][1]}, {fields[1][1]}]",
        "pairs": f"list[tuple[{fields[0][1]}, {fields[1][1]}]]",
        "dicts": "list[dict]",
        "objects": f"list[{schema.singular.capitalize()}]",
    }[form]
    where = {"mapping": f"in a dictionary from {fields[0][0]} to {fields[1][0]}",
             "pairs": f"in a list of ({fields[0][0]}, {fields[1][0]}) tuples",
             "dicts": "in a list of dictionaries", "objects": "in a list"}[form]  # fmt: skip
    argument = schema.plural if form != "mapping" else rng.choice((fields[1][2], schema.plural))
    source = Source(f"{form} {schema.plural}", "dictionaries" if form in ("mapping", "dicts") else "records", "record",
                    annotation, (argument, argument, "items", "data"), (element,), (schema.plural,), ("in {a}",),
                    (where,), "{a}.items()" if form == "mapping" else "{a}", f"{form} {schema.plural}",
                    f"the {schema.plural}", imports)  # fmt: skip
    bind = f"{fields[0][0]}, {fields[1][0]}" if form in ("mapping", "pairs") else ""
    return Task(source, chosen, made, aggregate, bind, before)


def _record_aggregate(
    keys: Sequence[Map], form: str, fields: Sequence[tuple[str, str, str]], access: dict[str, str], rng: random.Random
) -> Aggregate | None:
    names = [a for a in AGGREGATES if a.name in ("list", "count", "first")]
    if form in ("dicts", "objects"):
        if rng.random() < 0.6:
            return by_key(rng.choice(keys), rng)
        if rng.random() < 0.4:
            (a, a_kind, _), (b, b_kind, plural) = rng.sample(list(fields), 2)
            return Aggregate(f"dict {a} {b}", ("record",), f"dict[{a_kind}, {b_kind}]",
                             (f"a dictionary from the {a} to the {b} of {{things}}",
                              f"a dictionary of the {plural} of {{things}} by {a}"),
                             (f"{b}_by_{a}", f"{plural}_by_{a}"),
                             f"{{{{{access[a]}: {access[b]} for {{x}} in {{tail}}}}}}", "{acc} = {{}}",
                             f"{{acc}}[{access[a]}] = {access[b]}", acc=("result",))  # fmt: skip
        return rng.choice(names)
    first, second = fields[0][0], fields[1][0]
    extra = [
        Aggregate("dict", ("record",), f"dict[{fields[0][1]}, {fields[1][1]}]",
                  (f"a dictionary of {{things}} with their {fields[1][2]}", "{things} as a dictionary"),
                  ("filter_{things}", "select_{things}", "{things}_dict"),
                  f"{{{{{first}: {second} for {{x}} in {{tail}}}}}}", "{acc} = {{}}", f"{{acc}}[{first}] = {second}"),
        Aggregate("inverse", ("record",), f"dict[{fields[1][1]}, list[{fields[0][1]}]]",
                  (f"a dictionary from each {second} to the {fields[0][2]} of {{things}} with it",),
                  (f"{fields[0][2]}_by_{second}", f"group_by_{second}"), "", "{acc} = {{}}",
                  f"{{acc}}.setdefault({second}, []).append({first})", acc=("result", "groups")),
        Aggregate("by_second", ("record",), f"list[{fields[0][1]}]",
                  (f"the {fields[0][2]} of {{things}}, sorted by {second}",),
                  (f"{fields[0][2]}_by_{second}", f"sort_by_{second}"),
                  "", "found = []", f"found.append(({second}, {first}))",
                  f"return [{first} for {second}, {first} in sorted(found)]"),
        Aggregate("best", ("record",), f"{fields[0][1]} | None",
                  (f"the {first} with the largest {second} of {{things}}, or None",),
                  (f"highest_{second}", f"find_max_{second}", f"best_{first}"), "", "best = None\nbest_value = None",
                  f"if best is None or {second} > best_value:\n    best, best_value = {first}, {second}",
                  "return best"),
        *names[1:2],
    ]  # fmt: skip
    return rng.choice(extra)


_FIELD_VALUES: dict[str, tuple[str, ...]] = {
    "city": ("Paris", "Rome", "Oslo", "Lima"), "course": ("math", "art", "history"),
    "author": ("Austen", "Orwell", "Woolf"), "department": ("sales", "research", "support"),
    "status": ("paid", "open", "shipped"), "genre": ("drama", "comedy", "action"), "team": ("red", "blue", "green"),
    "owner": ("Ana", "Ben", "Eve"), "species": ("cat", "dog", "horse"), "country": ("France", "Italy", "Norway"),
    "color": ("red", "blue", "black"),
}  # fmt: skip


# Renderings -------------------------------------------------------------------------------------------------------


def fill(template: str, **values: str) -> str:
    """`str.format`, but with braces doubled already where they are meant, and unknown names an error."""
    return template.format(**values)


def render(task: Task, rng: random.Random) -> Exercise | None:
    """A task with names, English and a body drawn by chance, its examples computed by another body than its own."""
    source, chosen, made, aggregate = task.source, task.filter, task.map, task.aggregate
    argument = rng.choice(source.names)
    x = task.bind or _element(argument, source, rng)
    others: list[Parameter] = []
    constants: dict[str, str] = {}  # of filter and map: what stands for {k}
    choices: list[tuple[str, str]] = []  # arguments besides the first, with the literals they may have
    taken = {argument, *re.findall(r"\w+", x), *(f for f, _, _ in _fields_of(task))}
    for role, operation in (("filter", chosen), ("map", made)):
        if operation is None or not operation.values:
            continue
        name = rng.choice(operation.names) if operation.names else ""
        if name and name not in taken and rng.random() < 0.45:
            kind = _kind_of(operation.values[0])
            others.append(Parameter(name, kind))
            constants[role] = name
            choices.append((name, kind))
            taken.add(name)
        else:
            constants[role] = rng.choice(operation.values)
    k_filter, k_map = constants.get("filter", ""), constants.get("map", "")
    test = "" if chosen is None else chosen.test.replace("{k}", k_filter)
    expression = made.made.replace("{k}", k_map)
    code = _Code(task, argument, x, test, expression, rng)
    bodies = code.bodies()
    if not bodies:
        return None
    style = rng.choices([b for b, _ in bodies], [_WEIGHTS[b] for b, _ in bodies])[0]
    body = dict(bodies)[style]
    oracle = dict(bodies)[next(b for b, _ in bodies if b != style or len(bodies) == 1)]
    first = Parameter(argument, source.annotation, source.about)
    parameters = (*others, first) if others and rng.random() < 0.12 else (first, *others)
    name = _name(task, k_filter, k_map, rng)
    if name in taken or name in ("list", "sum", "map", "filter", "sorted", "set"):
        name = f"get_{name}"
    noun = rng.choice(source.nouns)
    places = [p for p in source.places if p != "of {a}" or noun != argument] or ["in {a}"]
    place, where = fill(rng.choice(places), a=argument), rng.choice(source.wheres)
    phrase = rng.choice(aggregate.phrases)
    verb = _verb(aggregate, rng)
    says = _say(task, noun, place, phrase, verb, k_filter, k_map, rng)
    asks = _say(task, noun, where, phrase, verb, _spoken(k_filter, others), _spoken(k_map, others), rng)
    prime = chosen.before if chosen is not None else ""
    before = "\n\n\n".join(part.strip("\n") for part in (prime, task.before, code.before) if part)
    used = "\n".join(body) + code.before
    imports = tuple(i for i in (*aggregate.imports, *source.imports) if i.split()[-1] in used + before or "date" in i)
    if "Counter(" in used and "from collections import Counter" not in imports:
        imports = (*imports, "from collections import Counter")
    exercise = Exercise(
        f"{task.key}", source.domain, name, parameters, aggregate.returns.format(kind=_python_kind(task)), says,
        tuple(body), (), asks, imports, before,
    )  # fmt: skip
    return _with_examples(exercise, task, oracle, choices, code, rng)


_WEIGHTS = {"loop": 34, "comprehension": 40, "stages": 9, "continue": 3, "functional": 4, "index": 4, "recursion": 5,
            "predicate": 5, "alternative": 6}  # fmt: skip


class _Code:
    """The bodies of a task."""

    def __init__(self, task: Task, argument: str, x: str, test: str, expression: str, rng: random.Random) -> None:
        self.task, self.rng, self.argument, self.x = task, rng, argument, x
        self.test = test.replace("{x}", x)
        self.expression = expression.replace("{x}", x)
        self.iterable = fill(task.source.iterable, a=argument)
        self.acc = rng.choice(task.aggregate.acc)
        if self.acc in (argument, x, *x.split(", ")):
            self.acc = "out"
        self.v = x if ", " not in x else "pair"
        self.before = ""

    def bodies(self) -> list[tuple[str, list[str]]]:
        """Every way to write it that suits, by name."""
        task, found = self.task, []
        if task.source.name == "flat":
            self.iterable = "row"
        if task.aggregate.step:
            found.append(("loop", self._loop(self.test)))
            double = " not in " in self.test or " != " in self.test
            if self.test and not double and task.source.name != "flat" and task.aggregate.start:
                found.append(("continue", self._loop(self.test, guard=True)))
        if task.aggregate.made:
            found.append(("comprehension", [f"return {self._made(task.aggregate.made)}"]))
            for other in task.aggregate.alternatives:
                if self.test or "{gen}" in other:
                    found.append(("alternative", [f"return {self._made(other)}"]))
            if self.test and not task.bind and task.source.name != "flat" and "{source}" not in task.aggregate.made:
                found += self._staged()
        if task.source.indexed and task.aggregate.step and not task.bind and task.aggregate.name not in ("first_k",):
            found.append(("index", self._indexed()))
        if task.aggregate.name in ("sum", "count", "product", "list") and task.source.indexed:
            found += self._recursive()
        if task.source.opening:
            opening = fill(task.source.opening, a=self.argument)
            found = [(b, [opening, *(INDENT + line for line in lines)]) for b, lines in found if b == "comprehension"]
        return [(b, lines) for b, lines in found if max(map(len, lines)) < 110]

    def _loop(self, test: str, guard: bool = False) -> list[str]:
        aggregate, acc = self.task.aggregate, self.acc
        value = self.expression
        inner: list[str] = []
        if aggregate.named and value != self.x and len(value) > 2 and not value.isidentifier():
            named = self.rng.choice(("value", "current", "item", "y"))
            if named in (self.argument, self.x, acc):
                named = "mapped"
            inner.append(f"{named} = {value}")
            value = named
        inner += fill(_guarded(aggregate.step), acc=acc, e=value, c=_closed(value), x=self.x, v=self.v).split("\n")
        if test and guard:
            inner = [f"if not {_closed(test)}:", f"{INDENT}continue", *inner]
        elif test:
            inner = [f"if {test}:", *(INDENT + line for line in inner)]
        if self.task.source.name == "flat":
            inner = [f"for {self.x} in row:", *(INDENT + line for line in inner)]
            head = f"for row in {self.argument}:"
        else:
            head = f"for {self.x} in {self.iterable}:"
        start = fill(aggregate.start, acc=acc).split("\n") if aggregate.start else []
        end = fill(aggregate.end, acc=acc, x=self.x, v=self.v).split("\n")
        return [*start, head, *(INDENT + line for line in inner), *end]

    def _generator(self) -> str:
        """What stands within the brackets of a comprehension."""
        return f"{self.expression} for {self.x} in {self._tail()}"

    def _tail(self) -> str:
        inside = f"{self.argument} for {self.x} in row" if self.task.source.name == "flat" else self.iterable
        inside = inside.replace(self.argument, f"{self.argument}", 1)
        if self.task.source.name == "flat":
            inside = "row"
        return inside + (f" if {self.test}" if self.test else "")

    def _made(self, template: str) -> str:
        flat = self.task.source.name == "flat"
        plain = self.expression == self.x and not self.test and not flat
        loops = f"for row in {self.argument} for {self.x} in row" if flat else f"for {self.x} in {self.iterable}"
        inside = f"{self.expression} {loops}" + (f" if {self.test}" if self.test else "")
        lazy = self.iterable.startswith("map(")
        values = {
            "gen": self.iterable if plain else inside,
            "iter": (f"iter({self.iterable})" if plain and template.startswith("next") else self.iterable)
            if plain
            else f"({inside})"
            if template.startswith("next")
            else self.rng.choice((f"({inside})", f"[{inside}]")),
            "list": (self.iterable if not lazy and self.task.aggregate.plain else f"list({self.iterable})")
            if plain
            else f"[{inside}]",
            "set": f"set({self.iterable})" if plain else "{" + inside + "}",
            "tail": loops.split(f"for {self.x} in ", 1)[-1] + (f" if {self.test}" if self.test else ""),
        }
        if flat:
            values["tail"] = f"[{self.x} {loops}]" + (f" if {self.test}" if self.test else "")
            if plain or self.expression == self.x:
                values["gen"] = inside
        e, c = self.expression, _closed(self.expression)
        return fill(_guarded(template), **values, e=e, c=c, x=self.x, v=self.v, source=self.iterable, test=self.test)

    def _staged(self) -> list[tuple[str, list[str]]]:
        """In stages, with filter and map, and with a definition of the test."""
        rng, x = self.rng, self.x
        selected = rng.choice(("selected", "kept", "filtered", "matching", "chosen"))
        if selected == self.argument:
            selected = "kept"
        lines = [f"{selected} = [{x} for {x} in {self.iterable} if {self.test}]"]
        if rng.random() < 0.15 and self.task.filter is not None:
            lines = [f"# Keep what {self.task.filter.singular.replace('{k}', 'fits')}", *lines]
        found: list[tuple[str, list[str]]] = []
        made = self._over(selected)
        if made:
            found.append(("stages", [*lines, *made]))
        lazy = f"filter(lambda {x}: {self.test}, {self.iterable})"
        if self.expression != x:
            lazy = f"map(lambda {x}: {self.expression}, {lazy})"
        template = self.task.aggregate.made
        if template.count("{") == 1 and ("{gen}" in template or "{iter}" in template or "{list}" in template):
            values = {"gen": lazy, "iter": lazy, "list": f"list({lazy})"}
            found.append(("functional", [f"return {fill(template, **values, v=x)}"]))
        return found

    def _over(self, selected: str) -> list[str]:
        """The aggregate of a list by name, mapped on the way."""
        template, x = self.task.aggregate.made, self.x
        if "{tail}" in template:
            e, c = self.expression, _closed(self.expression)
            return [f"return {fill(_guarded(template), tail=selected, e=e, c=c, x=x, v=self.v)}"]
        inside = selected if self.expression == x else f"{self.expression} for {x} in {selected}"
        as_list = selected if self.expression == x else f"[{inside}]"
        as_set = f"set({selected})" if self.expression == x else "{" + inside + "}"
        lines: list[str] = []
        if template.count("{gen}") > 1 and self.expression != x:
            lines, inside = [f"mapped = [{inside}]"], "mapped"
        iterator = f"iter({as_list})" if template.startswith("next") else as_list
        made = fill(template, gen=inside, iter=iterator, list=as_list, set=as_set, e=self.expression, x=x, v=self.v)
        return [*lines, f"return {made}"]

    def _indexed(self) -> list[str]:
        at = self.rng.choice(("i", "index", "i"))
        item = f"{self.argument}[{at}]"
        lines = self._loop(self.test)
        head = f"for {self.x} in {self.iterable}:"
        if len(re.findall(rf"\b{self.x}\b", "\n".join(lines))) > 3:
            place = lines.index(head)
            return [*lines[:place], f"for {at} in range(len({self.argument})):", f"{INDENT}{self.x} = {item}",
                    *lines[place + 1 :]]  # fmt: skip
        return [
            f"for {at} in range(len({self.argument})):"
            if line == head
            else re.sub(rf"(?<![\w\"'.]){self.x}\b(?![\"'])", item, line)
            for line in lines
        ]

    def _recursive(self) -> list[tuple[str, list[str]]]:
        name = self.task.aggregate.name
        neutral = {"sum": "0", "count": "0", "product": "1", "list": "[]"}[name]
        if self.task.source.kind == "char" and name == "list":
            return []
        x, rest = self.x, "RECURSE"
        more = {
            "sum": f"{_closed_sum(self.expression)} + {rest}",
            "count": f"1 + {rest}",
            "product": f"{_closed(self.expression)} * {rest}",
            "list": f"[{self.expression}] + {rest}",
        }[name]
        lines = [f"if not {self.argument}:", f"{INDENT}return {neutral}", f"{x} = {self.argument}[0]"]
        if self.test:
            return [("recursion", [*lines, f"if {self.test}:", f"{INDENT}return {more}", f"return {rest}"])]
        return [("recursion", [*lines, f"return {more}"])] if name != "list" else []


def _fields_of(task: Task) -> list[tuple[str, str, str]]:
    return [f for s in SCHEMAS if task.source.name.endswith(f" {s.plural}") for f in s.fields]


def _python_kind(task: Task) -> str:
    kind = task.map.out if task.map.out not in ("same",) else task.source.kind
    if kind == "record":
        form, _, plural = task.source.name.partition(" ")
        schema = next(s for s in SCHEMAS if s.plural == plural)
        return {
            "dicts": "dict",
            "objects": schema.singular.capitalize(),
            "mapping": f"tuple[{schema.fields[0][1]}, {schema.fields[1][1]}]",
            "pairs": f"tuple[{schema.fields[0][1]}, {schema.fields[1][1]}]",
        }[form]
    return PYTHON[kind]


def _element(argument: str, source: Source, rng: random.Random) -> str:
    single = _SINGULAR.get(argument) if source.name != "flat" else None
    x = single if single and rng.random() < 0.6 else rng.choice(source.elements)
    return x if x != argument else source.elements[1] if source.elements[0] == argument else source.elements[0]


def _kind_of(literal: str) -> str:
    if literal.startswith('"'):
        return "str"
    return "list[int]" if literal.startswith("[") else "tuple" if literal.startswith("(") else "int"


def _guarded(template: str) -> str:
    """{e} becomes {c}, the same in brackets, where an operator would tear it apart."""
    return re.sub(r"\{e\}(?=\.|\[| [%*/]| - )", "{c}", template)


def _closed(code: str) -> str:
    return code if re.fullmatch(r"[\w.]+(\([^()]*\))?(\[[^\[\]]*\])?", code) else f"({code})"


def _closed_sum(code: str) -> str:
    return code


def _verb(aggregate: Aggregate, rng: random.Random) -> str:
    if aggregate.returns in ("int", "float"):
        return rng.choice(("Return", "Return", "Return", "Compute", "Calculate", "Find", "Get"))
    return rng.choice(("Return", "Return", "Return", "Return", "Get", "Find"))


def _spoken(constant: str, others: list[Parameter]) -> str:
    """A constant in a question: an argument is "a given limit"."""
    return f"a given {constant}" if any(p.name == constant for p in others) else constant


def _say(
    task: Task, noun: str, place: str, phrase: str, verb: str, k_filter: str, k_map: str, rng: random.Random
) -> str:
    chosen = task.filter
    adjective, clause = "", ""
    if chosen is not None:
        if chosen.adjective and rng.random() < 0.85:
            adjective = f"{chosen.adjective} "
        else:
            said = chosen.plural.replace("{k}", k_filter)
            clause = f" {said}" if said.startswith("whose") else f" that {said}"
    bare = f"{adjective}{noun} {place}{clause}"
    things = task.map.phrase.replace("{k}", k_map).replace("{things}", f"the {bare}")
    if task.map.name:
        bare = things.removeprefix("the ")
    text = phrase.replace("{things}", things).replace("{bare}", bare)
    if not text[0].isupper() or text.startswith("True"):
        text = f"{verb} {text}"
    if task.aggregate.returns == "bool" and text.split()[0] in ("Compute", "Calculate", "Find", "Get"):
        text = "Return " + text.partition(" ")[2]
    if rng.random() < 0.12:
        text = text.replace(" of the ", " of ")
    return text.rstrip(",").replace(",,", ",")


def _name(task: Task, k_filter: str, k_map: str, rng: random.Random) -> str:
    if rng.random() < 0.06:
        return rng.choice(GENERIC)
    chosen = task.filter
    noun = task.source.nouns[0] if task.map is IDENTITY or not task.map.label else ""
    label = ""
    if chosen is not None:
        label = (chosen.label or chosen.adjective).replace("{k}", k_filter)
        if label == noun or (noun and rng.random() < 0.3 and chosen.label != chosen.adjective):
            noun = "" if label in ("vowels", "digits", "letters", "consonants", "spaces", "multiples") else noun
    mapped = task.map.label.replace("{k}", k_map)
    first = [label, mapped or noun] if "_" not in label or rng.random() < 0.5 else [mapped or noun, label]
    things = "_".join(part for part in first if part)
    name = rng.choice(task.aggregate.labels).replace("{things}", things)
    name = re.sub(r"\W+", "_", name).strip("_").lower()
    name = re.sub(r"_+", "_", name)
    if len(name) > 40 or not name.isidentifier():
        name = re.sub(r"\W+", "_", rng.choice(task.aggregate.labels).replace("{things}", noun or mapped)).strip("_")
    return name if name.isidentifier() else "compute"


def _with_examples(
    exercise: Exercise, task: Task, oracle: list[str], choices: list[tuple[str, str]], code: _Code, rng: random.Random
) -> Exercise | None:
    """Examples with results by another body; None where all results are alike, or there is hardly any."""
    body = tuple(line.replace("RECURSE", _recursion(exercise, code)) for line in exercise.body)
    other = tuple(line.replace("RECURSE", _recursion(exercise, code)) for line in oracle)
    exercise = replace(exercise, body=body)
    function = run_function(replace(exercise, body=other, imports=(*exercise.imports, *task.aggregate.imports)))
    of_text = function
    literals = {p.name: task.filter.values if task.filter and p.name in task.filter.names else task.map.values
                for p in exercise.parameters}  # fmt: skip
    examples: list[tuple[str, str]] = []
    setup = ""
    for attempt in range(9):
        value = draw_value(task.source.value or task.source.annotation, rng, attempt)
        if task.source.value == "path":
            if examples:
                break
            setup = f"with open('lines.txt', 'w') as file:\n    file.write({value})"
            value = "'lines.txt'"
            function = _reading(of_text, setup)
        arguments = []
        for parameter in exercise.parameters:
            first = parameter.name == code.argument
            arguments.append(value if first else rng.choice(literals[parameter.name]))
        text = ", ".join(arguments)
        result = function(text)
        raises = result == "None" and not task.aggregate.empty
        if result is not None and not raises and (text, result) not in examples:
            examples.append((text, result))
        if len(examples) == 4:
            break
    enough = 1 if setup else 2
    if len(examples) < enough or (enough == 2 and len({result for _, result in examples}) < 2):
        return None
    return replace(exercise, examples=tuple(examples), setup=setup)


def _recursion(exercise: Exercise, code: _Code) -> str:
    inside = ", ".join(f"{p.name}[1:]" if p.name == code.argument else p.name for p in exercise.parameters)
    return f"{exercise.name}({inside})"


def _reading(function: Callable[[str], str | None], setup: str) -> Callable[[str], str | None]:
    """The function, where `open` gives the text that a test would have written first."""

    def read(arguments: str) -> str | None:
        return function(f"{arguments}\0{setup}")

    return read


def compositions() -> int:
    """How many different pipelines over plain sources there are, renderings and constants aside."""
    found = 0
    for source in SOURCES:
        filters: list[Filter | None] = [None, *(f for f in FILTERS if f.kind == source.kind)]
        maps = [IDENTITY, *(m for m in MAPS if m.kind == source.kind)]
        for chosen, made in product(filters, maps):
            kind = source.kind if made is IDENTITY else made.out
            for aggregate in AGGREGATES:
                if kind in aggregate.kinds and (made is IDENTITY or not aggregate.plain):
                    found += _makes_sense(Task(source, chosen, made, aggregate))
    return found
