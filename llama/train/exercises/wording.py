"""The same thing said otherwise: verbs, nouns and manners of people who ask."""

from __future__ import annotations

import random
import re

_VERBS: dict[str, tuple[str, ...]] = {
    "Return": ("Give", "Get", "Give back", "Produce", "Determine", "Tell", "Compute", "Find"),
    "Compute": ("Calculate", "Work out", "Find", "Get", "Determine", "Return"),
    "Calculate": ("Compute", "Work out", "Find", "Determine"),
    "Find": ("Get", "Determine", "Look for", "Return", "Search for"),
    "Get": ("Return", "Find", "Give"),
    "Count": ("Count up", "Find the number of", "Tell how many there are of", "Determine the number of"),
    "Remove": ("Delete", "Drop", "Get rid of", "Take out", "Strip"),
    "Sort": ("Order", "Arrange", "Put in order"),
    "Join": ("Combine", "Concatenate", "Put together"),
    "Make": ("Create", "Build", "Construct"),
    "Build": ("Create", "Make", "Construct"),
    "Write": ("Code", "Program", "Create", "Implement"),
    "Implement": ("Write", "Code", "Program", "Create"),
    "Reverse": ("Turn around", "Flip"),
    "List": ("Give", "Get", "Collect", "Return"),
    "Merge": ("Combine", "Join", "Unite"),
    "Split": ("Divide", "Cut", "Break"),
    "Add": ("Sum up", "Add up"),
    "Multiply": ("Take the product of",),
    "Group": ("Collect", "Sort into groups"),
    "Read": ("Load", "Open and read", "Get"),
}
_BEGINNINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"Check (?:if|whether) ", ("Test whether ", "Determine if ", "See if ", "Tell whether ", "Find out if ", "Say if ",
                                "Decide whether ", "Verify that ")),
    (r"Return True if ", ("Tell whether ", "Check if ", "Say whether ", "True if ", "Find out whether ",
    "Return whether ",
                          "True when ")),
    (r"Return whether ", ("Tell if ", "Check if ", "Say whether ", "Determine whether ")),
)  # fmt: skip
_NOUNS: dict[str, tuple[str, ...]] = {
    "number": ("integer", "value"), "numbers": ("integers", "values"), "string": ("text", "word", "str"),
    "list": ("array", "sequence"), "elements": ("items", "entries"), "element": ("item", "entry"),
    "dictionary": ("dict", "mapping"), "characters": ("letters", "symbols"), "largest": ("biggest", "greatest",
    "highest"),
    "smallest": ("least", "lowest"), "text": ("string",), "sentence": ("text", "phrase"), "without": ("leaving out",),
    "words": ("terms",), "occurs": ("appears", "is there"), "duplicates": ("repeated elements", "repetitions"),
    "position": ("index",), "average": ("mean",), "sum": ("total",),
}  # fmt: skip
_FRONT = (
    "hi, ", "hey, ", "hello, ", "please ", "quick question: ", "in python: ", "hi! ", "ok, ", "now ",
    "i'm new to python. ",
    "for my homework: ", "could you help me? ", "python question: ",
)  # fmt: skip
_BACK = (
    " please", ", please", " thanks", ", thanks!", " in python", " using python", " in Python 3", ", thank you", "?",
    " - in python", " for me", " as a function", " with a function", " in plain Python", "!",
)  # fmt: skip


def said_otherwise(sentence: str, rng: random.Random, nouns: bool = True) -> str:
    """A sentence in the imperative with another verb, and with `nouns` now and then another noun."""
    for pattern, others in _BEGINNINGS:
        if re.match(pattern, sentence):
            return _nouns(re.sub(pattern, rng.choice(others), sentence, count=1), rng, nouns)
    turned = re.match(r"Convert (.+?) (?:to|into) (.+)$", sentence)
    if turned and rng.random() < 0.8:
        verb = rng.choice(("Turn", "Change", "Transform", "Translate"))
        return _nouns(f"{verb} {turned[1]} into {turned[2]}", rng, nouns)
    verb, space, rest = sentence.partition(" ")
    other = rng.choice(_VERBS.get(verb, (verb,)))
    if other.endswith((" of",)) and rest.startswith("how "):
        other = verb
    return _nouns(other + space + rest, rng, nouns)


def _nouns(sentence: str, rng: random.Random, wanted: bool) -> str:
    if not wanted:
        return sentence

    def other(match: re.Match[str]) -> str:
        word = match.group()
        return rng.choice(_NOUNS[word]) if word in _NOUNS and rng.random() < 0.25 else word

    changed = re.sub(r"[a-z]+", other, sentence)
    changed = re.sub(r"\ban (?=[bcdfghjklmnpqrstvwxyz])", "a ", changed)
    return re.sub(r"\ba (?=(?:integer|array|item|entry|index|element|average))", "an ", changed)


def asked_by_people(question: str, rng: random.Random) -> str:
    """A question as people type it: with a word before or after, in lower case, without a full stop."""
    if rng.random() < 0.5:
        question = question.rstrip(".")
    if rng.random() < 0.35:
        question = question.rstrip(".?") + rng.choice(_BACK)
    if rng.random() < 0.2:
        question = rng.choice(_FRONT) + question[:1].lower() + question[1:]
    return question[:1].lower() + question[1:] if rng.random() < 0.25 else question
