"""Small classes: records with a few methods, and collections of records.

A record has attributes and methods that compute with them, by hand or as a dataclass. A collection keeps items in a
list or a dictionary, adds and removes them, and says how many there are and what they come to.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from llama.train.exercises.exercise import INDENT, Exercise


@dataclass(frozen=True)
class Thing:
    """What a record is about: attributes as (name, kind, value of an example)."""

    name: str
    attributes: tuple[tuple[str, str, str], ...]


THINGS: tuple[Thing, ...] = (
    Thing("Point", (("x", "int", "3"), ("y", "int", "4"))),
    Thing("Vector", (("x", "int", "1"), ("y", "int", "2"), ("z", "int", "2"))),
    Thing("Person", (("name", "str", "'Ana'"), ("age", "int", "30"))),
    Thing("Employee", (("name", "str", "'Ben'"), ("salary", "int", "2000"), ("department", "str", "'sales'"))),
    Thing("Student", (("name", "str", "'Eve'"), ("grade", "int", "85"))),
    Thing("Product", (("name", "str", "'tea'"), ("price", "int", "4"), ("stock", "int", "10"))),
    Thing("Book", (("title", "str", "'Emma'"), ("author", "str", "'Austen'"), ("pages", "int", "400"))),
    Thing("Car", (("brand", "str", "'Fiat'"), ("speed", "int", "120"), ("fuel", "int", "30"))),
    Thing("Rectangle", (("width", "int", "3"), ("height", "int", "5"))),
    Thing("Box", (("width", "int", "2"), ("height", "int", "3"), ("depth", "int", "4"))),
    Thing("City", (("name", "str", "'Rome'"), ("population", "int", "3000"))),
    Thing("Movie", (("title", "str", "'Up'"), ("year", "int", "2009"), ("rating", "int", "8"))),
    Thing("Song", (("title", "str", "'Help'"), ("artist", "str", "'Ivy'"), ("seconds", "int", "180"))),
    Thing("Player", (("name", "str", "'Max'"), ("score", "int", "7"), ("lives", "int", "3"))),
    Thing("Item", (("name", "str", "'nut'"), ("weight", "int", "5"))),
    Thing("Order", (("customer", "str", "'Dan'"), ("total", "int", "50"))),
    Thing("Animal", (("name", "str", "'Rex'"), ("weight", "int", "12"))),
    Thing("Task", (("title", "str", "'wash'"), ("priority", "int", "2"))),
    Thing("House", (("address", "str", "'Main St'"), ("rooms", "int", "4"), ("price", "int", "900"))),
    Thing("Message", (("sender", "str", "'Ana'"), ("text", "str", "'hello'"))),
    Thing("Coordinate", (("latitude", "int", "10"), ("longitude", "int", "20"))),
    Thing("Pair", (("first", "int", "1"), ("second", "int", "2"))),
    Thing("Range", (("start", "int", "2"), ("end", "int", "9"))),
    Thing("Account", (("owner", "str", "'Ivy'"), ("balance", "int", "100"))),
)  # fmt: skip


def record(rng: random.Random) -> Exercise:
    """A class with attributes, and some methods about them."""
    thing = rng.choice(THINGS)
    attributes = thing.attributes if rng.random() < 0.7 else thing.attributes[:2]
    names = [name for name, _, _ in attributes]
    numbers = [name for name, kind, _ in attributes if kind == "int"]
    values = {name: value for name, _, value in attributes}
    as_data = rng.random() < 0.3
    annotated = rng.random() < 0.4
    made = f"{thing.name}({', '.join(values.values())})"
    methods: list[tuple[str, list[str], str, str]] = []  # name, lines, what it is in words, a check
    shown = ", ".join(f"{name}={{self.{name}!r}}" if rng.random() < 0.5 else f"{{self.{name}}}" for name in names)
    methods.append(
        ("__repr__", [f'return f"{thing.name}({shown})"'], "", f"assert repr(a).startswith('{thing.name}(')")
    )
    both = " and ".join(f"self.{name} == other.{name}" for name in names)
    methods.append(("__eq__", [f"return {both}"], "", f"assert a == {made}"))
    if len(numbers) > 1:
        one, two = numbers[:2]
        which = rng.choice((("total", "+"), ("difference", "-"), ("product", "*")))
        label = {"total": "sum", "difference": "difference", "product": "product"}[which[0]]
        expected = eval(f"{values[one]} {which[1]} {values[two]}")
        methods.append((which[0], [f"return self.{one} {which[1]} self.{two}"], f"the {label} of {one} and {two}",
                        f"assert a.{which[0]}() == {expected}"))  # fmt: skip
        larger = max(int(values[n]) for n in numbers[:2])
        methods.append(("largest", [f"return max(self.{one}, self.{two})"], f"the larger of {one} and {two}",
                        f"assert a.largest() == {larger}"))  # fmt: skip
    if numbers:
        one = rng.choice(numbers)
        verb = rng.choice(("increase", "add", "raise"))
        methods.append((f"{verb}_{one}", [f"self.{one} += amount"], f"{one} by amount",
                        f"a.{verb}_{one}(2)\nassert a.{one} == {int(values[one]) + 2}"))  # fmt: skip
        limit = int(values[one]) - 1
        adjective = rng.choice(("large", "high", "big"))
        methods.append((f"is_{adjective}", [f"return self.{one} > {limit}"], f"whether {one} is greater than {limit}",
                        f"assert {made}.is_{adjective}()"))  # fmt: skip
        sign = rng.choice((">", "<"))
        word = "more" if sign == ">" else "less"
        methods.append((f"has_{word}_{one}", [f"return self.{one} {sign} other.{one}"],
                        f"whether this has {word} {one} than other", f"assert not a.has_{word}_{one}(a)"))  # fmt: skip
    texts = [name for name, kind, _ in attributes if kind == "str"]
    if texts:
        one, last = texts[0], names[-1]
        shown = f"{eval(values[one])}: {eval(values[last])}"
        methods.append(("describe", [f'return f"{{self.{one}}}: {{self.{last}}}"'], f"{one} and {last} as text",
                        f"assert {made}.describe() == {shown!r}"))  # fmt: skip
        methods.append((f"rename_{one}", [f"self.{one} = new_{one}"], f"{one} to new_{one}",
                        f"a.rename_{one}('Z')\nassert a.{one} == 'Z'"))  # fmt: skip
    if as_data:
        methods = methods[2:]
    chosen = rng.sample(methods, min(len(methods), rng.choice((0, 1, 1, 2, 2, 3))))
    documented = rng.random() < 0.35
    lines = ["@dataclass"] if as_data else []
    lines.append(f"class {thing.name}:")
    listed = ", ".join(names[:-1]) + f" and {names[-1]}"
    article = "An" if thing.name[0] in "AEIOU" else "A"
    if rng.random() < 0.6:
        lines += [f'{INDENT}"""{article} {thing.name.lower()} with {listed}."""', ""]
    if as_data:
        lines += [f"{INDENT}{name}: {kind}" for name, kind, _ in attributes]
    else:
        inside = ", ".join(f"{name}: {kind}" if annotated else name for name, kind, _ in attributes)
        lines.append(f"{INDENT}def __init__(self, {inside}){' -> None' if annotated else ''}:")
        lines += [f"{INDENT * 2}self.{name} = {name}" for name in names]
    for name, body, words, _ in chosen:
        lines.append("")
        lines += _method(name, body, words if documented else "")
    checks = [f"a = {made}", *(f"assert a.{name} == {value}" for name, value in values.items())]
    checks += [check for name, _, _, check in chosen if not check.startswith("a.")]
    checks += [check for name, _, _, check in chosen if check.startswith("a.")]
    public = [name for name, _, _, _ in chosen if not name.startswith("__")]
    form = rng.choice(("class for", "class for"))
    small = f"{'an' if article == 'An' else 'a'} {thing.name.lower()}"
    asks = f"Write a {'dataclass for' if as_data else form} {small} with {listed}"
    if public:
        asks += f"{' and' if len(public) == 1 else ', and'} the method{'s' * (len(public) > 1)} {' and '.join(public)}"
    key = f"record: {thing.name} · {' · '.join(sorted(name for name, _, _, _ in chosen))}"
    return Exercise(key, "records", thing.name, (), "", asks, (), (), asks,
                    ("from dataclasses import dataclass",) if as_data else (), whole="\n".join(lines),
                    checks=tuple(checks))  # fmt: skip


def _method(name: str, body: list[str], words: str) -> list[str]:
    other = any("other" in line for line in body)
    new = name.removeprefix("rename_") if name.startswith("rename_") else ""
    argument = "other" if other else f"new_{new}" if new else "amount" if "amount" in body[0] else ""
    head = f"{INDENT}def {name}(self{', ' + argument if argument else ''}):"
    if not words:
        return [head, *(INDENT * 2 + line for line in body)]
    verb = "Change" if new else "Increase" if argument == "amount" else "Return"
    return [head, f'{INDENT * 2}"""{verb} {words}."""', *(INDENT * 2 + line for line in body)]


KEEPERS = (
    ("Library", "book", "books"), ("Team", "member", "members"), ("Playlist", "song", "songs"),
    ("Garage", "car", "cars"), ("Zoo", "animal", "animals"), ("Course", "student", "students"),
    ("Inventory", "item", "items"), ("Garden", "plant", "plants"), ("Menu", "dish", "dishes"),
    ("Album", "photo", "photos"), ("Fleet", "ship", "ships"), ("Club", "guest", "guests"), ("Cart", "product",
    "products"),
    ("Schedule", "event", "events"), ("Shelf", "box", "boxes"), ("Notebook", "note", "notes"), ("Bag", "thing",
    "things"),
    ("History", "page", "pages"), ("Company", "employee", "employees"), ("Wallet", "card", "cards"),
)  # fmt: skip


def collection(rng: random.Random) -> Exercise:
    """A class that keeps things in a list, or amounts in a dictionary."""
    name, one, many = rng.choice(KEEPERS)
    private = "_" if rng.random() < 0.2 else ""
    kept = f"self.{private}{many}"
    as_dict = rng.random() < 0.4
    documented = rng.random() < 0.35
    add, remove = rng.choice((("add", "remove"), (f"add_{one}", f"remove_{one}")))
    if as_dict:
        amount = rng.choice(("price", "amount", "score", "weight", "count"))
        total = f"total_{amount}" if rng.random() < 0.5 else "total"
        methods = [
            (add, f"self, {one}, {amount}", rng.choice((
                [f"{kept}[{one}] = {amount}"], [f"{kept}[{one}] = {kept}.get({one}, 0) + {amount}"])),
             f"Add {one} with its {amount}", f"k.{add}('a', 3)\nk.{add}('b', 5)"),
            (remove, f"self, {one}", rng.choice(([f"del {kept}[{one}]"], [f"{kept}.pop({one}, None)"])),
             f"Remove {one}", f"k.{remove}('a')\nassert len(k.{private}{many}) == 1"),
            (total, "self", [f"return sum({kept}.values())"], f"Return the sum of all {amount}s",
             f"assert k.{total}() == 8"),
            (f"get_{amount}", f"self, {one}", [f"return {kept}.get({one}, 0)"], f"Return the {amount} of {one}, or 0",
             f"assert k.get_{amount}('b') == 5\nassert k.get_{amount}('z') == 0"),
            ("best", "self", [f"return max({kept}, key={kept}.get)"], f"Return the {one} with the largest {amount}",
             "assert k.best() == 'b'"),
            ("above", "self, limit", [f"return [{one} for {one}, {amount} in {kept}.items() if {amount} > limit]"],
             f"Return the {many} whose {amount} is greater than limit", "assert k.above(4) == ['b']"),
        ]  # fmt: skip
        start = "{}"
    else:
        methods = [
            (add, f"self, {one}", [f"{kept}.append({one})"], f"Add {one} at the end", f"k.{add}('a')\nk.{add}('b')"),
            (remove, f"self, {one}", rng.choice(([f"{kept}.remove({one})"],
             [f"if {one} in {kept}:", f"{INDENT}{kept}.remove({one})"])), f"Remove {one}",
             f"k.{remove}('a')\nassert k.{private}{many} == ['b']"),
            ("count", "self", [f"return len({kept})"], f"Return the number of {many}", "assert k.count() == 2"),
            (f"has_{one}" if rng.random() < 0.5 else "contains", f"self, {one}", [f"return {one} in {kept}"],
             f"Return True if {one} is there", ""),
            ("is_empty", "self", [f"return not {kept}"], f"Return True if there are no {many}",
            "assert not k.is_empty()"),
            ("first", "self", [f"return {kept}[0] if {kept} else None"], f"Return the first {one}, or None",
             "assert k.first() == 'a'"),
            ("last", "self", [f"return {kept}[-1] if {kept} else None"], f"Return the last {one}, or None",
             "assert k.last() == 'b'"),
            (f"sorted_{many}", "self", [f"return sorted({kept})"], f"Return the {many} in order",
             f"assert k.sorted_{many}() == ['a', 'b']"),
            ("clear", "self", [f"{kept} = []" if rng.random() < 0.5 else f"{kept}.clear()"], f"Remove all {many}", ""),
            ("__len__", "self", [f"return len({kept})"], "", "assert len(k) == 2"),
            ("__contains__", f"self, {one}", [f"return {one} in {kept}"], "", "assert 'a' in k"),
            ("__iter__", "self", [f"return iter({kept})"], "", "assert list(k) == ['a', 'b']"),
        ]  # fmt: skip
        start = "[]"
    chosen = [methods[0], *rng.sample(methods[1:], rng.choice((1, 2, 2, 3)))]
    lines = [f"class {name}:"]
    article = "An" if name[0] in "AEIOU" else "A"
    if rng.random() < 0.6:
        lines += [f'{INDENT}"""{article} {name.lower()} of {many}."""', ""]
    lines += [f"{INDENT}def __init__(self):", f"{INDENT * 2}{kept} = {start}"]
    for method, arguments, body, words, _ in chosen:
        lines += ["", f"{INDENT}def {method}({arguments}):"]
        lines += [f'{INDENT * 2}"""{words}."""'] if documented and words else []
        lines += [INDENT * 2 + line for line in body]
    checks = [f"k = {name}()"]
    checks += [
        check for _, _, _, _, check in chosen if check and ".remove" not in check and f"k.{remove}(" not in check
    ]
    checks += [check for _, _, _, _, check in chosen if f"k.{remove}(" in check]
    public = [method for method, _, _, _, _ in chosen if not method.startswith("__")]
    listed = ", ".join(public[:-1]) + f" and {public[-1]}" if len(public) > 1 else public[0]
    asks = f"Write a class {name} that keeps {many}, with {listed}"
    if rng.random() < 0.4:
        asks = f"Write a {name} class for {many} with {listed}"
    key = (
        f"collection: {'dict' if as_dict else 'list'} {name} · {' · '.join(sorted(m for m, _, _, _, _ in chosen[1:]))}"
    )
    return Exercise(key, "collections", name, (), "", asks, (), (), asks, (), whole="\n".join(lines),
                    checks=tuple(checks))  # fmt: skip
