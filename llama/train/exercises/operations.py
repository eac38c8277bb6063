"""The operations that compose: filters, maps, keys and aggregates, each with its English and its Python.

An operation is a row of a table. `{x}` stands for an element, `{k}` for a constant or an argument, `{things}` for what
is spoken of. Kinds of elements: int, str (a word), char, row (a list of numbers), date; `any` suits all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

_PRIME = """\
def is_prime(n):
    if n < 2:
        return False
    for divisor in range(2, int(n ** 0.5) + 1):
        if n % divisor == 0:
            return False
    return True
"""


@dataclass(frozen=True)
class Filter:
    """Elements that pass a test. With `values`, the test has a constant `{k}`, or an argument by one of `names`."""

    name: str
    kind: str
    adjective: str
    singular: str
    plural: str
    test: str
    values: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    label: str = ""
    """In a function's name; by default the adjective."""
    before: str = ""
    """What the test needs to be defined."""
    many: bool = False
    """Whether `{k}` is a collection."""


@dataclass(frozen=True)
class Map:
    """What is made of an element: `phrase` of the plural, `noun` for one of them, `label` in names."""

    name: str
    kind: str
    out: str
    phrase: str
    noun: str
    made: str
    label: str = ""
    values: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Aggregate:
    """What comes of all elements. In `made`, {list} and {gen} are the mapped elements as a list and without brackets.

    `start`, `step` and `end` are the loop's lines, with {e} for the mapped element, {acc} for what is collected.
    """

    name: str
    kinds: tuple[str, ...]
    returns: str
    phrases: tuple[str, ...]
    labels: tuple[str, ...]
    made: str
    start: str = ""
    step: str = ""
    end: str = "return {acc}"
    acc: tuple[str, ...] = ("result",)
    named: bool = False
    """Whether {e} is used twice in a step, so that a longer one needs a name."""
    plain: bool = False
    """Whether it is of elements as they are, not of mapped ones."""
    imports: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()
    """Other expressions for `made`."""
    empty: bool = True
    """Whether it has a result where there are no elements."""
    verb: str = "Return"


FILTERS: tuple[Filter, ...] = (
    Filter("even", "int", "even", "is even", "are even", "{x} % 2 == 0"),
    Filter("odd", "int", "odd", "is odd", "are odd", "{x} % 2 == 1"),
    Filter("odd2", "int", "odd", "is odd", "are odd", "{x} % 2 != 0"),
    Filter("positive", "int", "positive", "is positive", "are positive", "{x} > 0"),
    Filter("negative", "int", "negative", "is negative", "are negative", "{x} < 0"),
    Filter("nonzero", "int", "non-zero", "is not zero", "are not zero", "{x} != 0", label="nonzero"),
    Filter("above", "int", "", "is greater than {k}", "are greater than {k}", "{x} > {k}",
           ("2", "3", "5", "7", "10", "12", "20"), ("limit", "threshold", "minimum", "k", "bound"), "above_{k}"),
    Filter("below", "int", "", "is less than {k}", "are less than {k}", "{x} < {k}",
           ("3", "4", "5", "8", "10", "15"), ("limit", "threshold", "maximum", "k", "bound"), "below_{k}"),
    Filter("at_least", "int", "", "is at least {k}", "are at least {k}", "{x} >= {k}",
           ("2", "3", "5", "6", "10", "18"), ("minimum", "lowest", "limit", "low"), "at_least_{k}"),
    Filter("at_most", "int", "", "is at most {k}", "are at most {k}", "{x} <= {k}",
           ("3", "5", "6", "10", "20"), ("maximum", "highest", "limit", "high"), "at_most_{k}"),
    Filter("divisible", "int", "", "is divisible by {k}", "are divisible by {k}", "{x} % {k} == 0",
           ("3", "4", "5", "6", "7", "10"), ("divisor", "k", "d", "factor"), "divisible_by_{k}"),
    Filter("indivisible", "int", "", "is not divisible by {k}", "are not divisible by {k}", "{x} % {k} != 0",
           ("3", "4", "5"), ("divisor", "k", "d"), "not_divisible_by_{k}"),
    Filter("between", "int", "", "is between 1 and {k}", "are between 1 and {k}", "1 <= {x} <= {k}",
           ("5", "6", "9", "10"), ("high", "maximum", "upper"), "between_1_and_{k}"),
    Filter("unequal", "int", "", "is not equal to {k}", "are not equal to {k}", "{x} != {k}",
           ("1", "3", "5"), ("target", "value", "excluded"), "not_{k}"),
    Filter("digit", "int", "single-digit", "has a single digit", "have a single digit", "0 <= {x} <= 9",
           label="single_digit"),
    Filter("two_digits", "int", "two-digit", "has two digits", "have two digits", "10 <= {x} <= 99",
           label="two_digit"),
    Filter("ends_digit", "int", "", "ends in {k}", "end in {k}", "{x} % 10 == {k}", ("0", "1", "5", "7"),
           ("digit", "last"), "ending_in_{k}"),
    Filter("fizz", "int", "", "is a multiple of 3 or 5", "are multiples of 3 or 5", "{x} % 3 == 0 or {x} % 5 == 0",
           label="multiples"),
    Filter("square", "int", "square", "is a perfect square", "are perfect squares",
           "{x} >= 0 and int({x} ** 0.5) ** 2 == {x}"),
    Filter("palindromic", "int", "palindromic", "is a palindrome", "are palindromes", "str({x}) == str({x})[::-1]"),
    Filter("prime", "int", "prime", "is prime", "are prime", "is_prime({x})", before=_PRIME),
    Filter("member", "int", "", "is in {k}", "are in {k}", "{x} in {k}", ("[1, 2, 3]", "(2, 4, 8)"),
           ("allowed", "others", "wanted"), "allowed", many=True),
    Filter("outside", "int", "", "is not in {k}", "are not in {k}", "{x} not in {k}", ("[0, 1]",),
           ("excluded", "others", "forbidden"), "not_in", many=True),
    Filter("starts", "str", "", "starts with {k}", "start with {k}", "{x}.startswith({k})",
           ('"a"', '"b"', '"s"', '"un"', '"A"'), ("prefix", "start", "letter"), "starting_with"),
    Filter("ends", "str", "", "ends with {k}", "end with {k}", "{x}.endswith({k})",
           ('"s"', '"e"', '"ing"', '"ed"'), ("suffix", "ending"), "ending_with"),
    Filter("contains", "str", "", "contains {k}", "contain {k}", "{k} in {x}",
           ('"a"', '"e"', '"o"', '"an"'), ("letter", "part", "substring", "char"), "containing"),
    Filter("lacks", "str", "", "does not contain {k}", "do not contain {k}", "{k} not in {x}",
           ('"a"', '"e"', '"o"'), ("letter", "part", "char"), "without"),
    Filter("longer", "str", "", "is longer than {k} characters", "are longer than {k} characters", "len({x}) > {k}",
           ("2", "3", "4", "5"), ("length", "limit", "n"), "longer_than_{k}"),
    Filter("shorter", "str", "", "is shorter than {k} characters", "are shorter than {k} characters", "len({x}) < {k}",
           ("3", "4", "5", "6"), ("length", "limit", "n"), "shorter_than_{k}"),
    Filter("length", "str", "", "has {k} characters", "have {k} characters", "len({x}) == {k}",
           ("3", "4", "5"), ("length", "size", "n"), "of_length_{k}"),
    Filter("nonempty", "str", "non-empty", "is not empty", "are not empty", "{x}", label="nonempty"),
    Filter("nonempty2", "str", "non-empty", "is not empty", "are not empty", 'len({x}) > 0', label="nonempty"),
    Filter("upper", "str", "uppercase", "is in upper case", "are in upper case", "{x}.isupper()", label="uppercase"),
    Filter("lower", "str", "lowercase", "is in lower case", "are in lower case", "{x}.islower()", label="lowercase"),
    Filter("capital", "str", "capitalized", "starts with a capital letter", "start with a capital letter",
           "{x}[:1].isupper()", label="capitalized"),
    Filter("numeric", "str", "numeric", "consists of digits", "consist of digits", "{x}.isdigit()"),
    Filter("alphabetic", "str", "alphabetic", "has only letters", "have only letters", "{x}.isalpha()"),
    Filter("has_digit", "str", "", "contains a digit", "contain a digit", "any(c.isdigit() for c in {x})",
           label="with_digits"),
    Filter("palindrome", "str", "palindromic", "is a palindrome", "are palindromes", "{x} == {x}[::-1]",
           label="palindrome"),
    Filter("vowel_start", "str", "", "starts with a vowel", "start with a vowel", '{x}[:1].lower() in "aeiou"',
           label="vowel_start"),
    Filter("even_length", "str", "", "has an even length", "have an even length", "len({x}) % 2 == 0",
           label="even_length"),
    Filter("same_ends", "str", "", "starts and ends with the same letter", "start and end with the same letter",
           "{x} and {x}[0] == {x}[-1]", label="same_ends"),
    Filter("not_stop", "str", "", "is not in {k}", "are not in {k}", "{x} not in {k}", ('("the", "a")',),
           ("stop_words", "excluded", "ignored"), "not_in", many=True),
    Filter("unlike", "str", "", "is not equal to {k}", "are not equal to {k}", "{x} != {k}", ('"x"', '"the"'),
           ("target", "word", "other"), "other_than"),
    Filter("vowel", "char", "", "is a vowel", "are vowels", '{x}.lower() in "aeiou"', label="vowels"),
    Filter("vowel2", "char", "", "is a vowel", "are vowels", '{x} in "aeiouAEIOU"', label="vowels"),
    Filter("consonant", "char", "", "is a consonant", "are consonants",
           '{x}.isalpha() and {x}.lower() not in "aeiou"', label="consonants"),
    Filter("isdigit", "char", "", "is a digit", "are digits", "{x}.isdigit()", label="digits"),
    Filter("isalpha", "char", "", "is a letter", "are letters", "{x}.isalpha()", label="letters"),
    Filter("isalnum", "char", "alphanumeric", "is a letter or a digit", "are letters or digits", "{x}.isalnum()",
           label="alphanumeric"),
    Filter("isupper", "char", "uppercase", "is in upper case", "are in upper case", "{x}.isupper()"),
    Filter("islower", "char", "lowercase", "is in lower case", "are in lower case", "{x}.islower()"),
    Filter("space", "char", "", "is a space", "are spaces", '{x} == " "', label="spaces"),
    Filter("nonspace", "char", "", "is not a space", "are not spaces", '{x} != " "', label="non_space"),
    Filter("notwhite", "char", "", "is not white space", "are not white space", "not {x}.isspace()",
           label="non_space"),
    Filter("char_in", "char", "", "is in {k}", "are in {k}", "{x} in {k}", ('"abc"', '"xyz"'),
           ("allowed", "letters", "chars"), "allowed"),
    Filter("char_out", "char", "", "is not in {k}", "are not in {k}", "{x} not in {k}", ('"abc"', '".,!"'),
           ("removed", "forbidden", "letters"), "not_in"),
    Filter("char_is", "char", "", "is equal to {k}", "are equal to {k}", "{x} == {k}", ('"a"', '"e"'),
           ("letter", "target", "char"), "equal_to"),
    Filter("char_not", "char", "", "is not equal to {k}", "are not equal to {k}", "{x} != {k}", ('"a"', '"e"'),
           ("letter", "target", "char"), "other_than"),
    Filter("row_sum", "row", "", "has a sum greater than {k}", "have a sum greater than {k}", "sum({x}) > {k}",
           ("5", "10"), ("limit", "threshold"), "with_sum_above_{k}"),
    Filter("row_long", "row", "", "has more than {k} elements", "have more than {k} elements", "len({x}) > {k}",
           ("1", "2"), ("size", "limit"), "longer_than_{k}"),
    Filter("row_has", "row", "", "contains {k}", "contain {k}", "{k} in {x}", ("0", "1", "3"),
           ("target", "value", "number"), "containing_{k}"),
    Filter("row_full", "row", "non-empty", "is not empty", "are not empty", "{x}", label="nonempty"),
    Filter("row_sorted", "row", "sorted", "is sorted", "are sorted", "{x} == sorted({x})"),
    Filter("row_positive", "row", "", "has only positive numbers", "have only positive numbers",
           "all(value > 0 for value in {x})", label="positive"),
    Filter("row_even_sum", "row", "", "has an even sum", "have an even sum", "sum({x}) % 2 == 0", label="even_sum"),
    Filter("weekend", "date", "", "falls on a weekend", "fall on a weekend", "{x}.weekday() >= 5", label="weekend"),
    Filter("workday", "date", "", "is a weekday", "are weekdays", "{x}.weekday() < 5", label="weekday"),
    Filter("in_year", "date", "", "is in the year {k}", "are in the year {k}", "{x}.year == {k}",
           ("2023", "2024"), ("year",), "in_{k}"),
    Filter("in_month", "date", "", "is in month {k}", "are in month {k}", "{x}.month == {k}",
           ("1", "2", "12"), ("month",), "in_month_{k}"),
    Filter("since", "date", "", "is not before the year {k}", "are not before the year {k}", "{x}.year >= {k}",
           ("2023", "2024"), ("year",), "since_{k}"),
    Filter("first_day", "date", "", "is the first of a month", "are the first of a month", "{x}.day == 1",
           label="first_of_month"),
)  # fmt: skip

IDENTITY = Map("", "any", "same", "{things}", "", "{x}")
MAPS: tuple[Map, ...] = (
    Map("square", "int", "int", "the squares of {things}", "square", "{x} ** 2", "squares"),
    Map("square2", "int", "int", "the squares of {things}", "square", "{x} * {x}", "squares"),
    Map("cube", "int", "int", "the cubes of {things}", "cube", "{x} ** 3", "cubes"),
    Map("double", "int", "int", "the doubles of {things}", "double", "{x} * 2", "doubles"),
    Map("double2", "int", "int", "twice {things}", "double", "2 * {x}", "doubled"),
    Map("half", "int", "int", "the halves of {things}, rounded down,", "half", "{x} // 2", "halves"),
    Map("negate", "int", "int", "the negatives of {things}", "negative", "-{x}", "negated"),
    Map("absolute", "int", "int", "the absolute values of {things}", "absolute value", "abs({x})", "absolute_values"),
    Map("plus", "int", "int", "{things}, each increased by {k},", "sum", "{x} + {k}", "increased",
        ("1", "2", "3", "5", "10"), ("amount", "increment", "offset", "n")),
    Map("minus", "int", "int", "{things}, each decreased by {k},", "difference", "{x} - {k}", "decreased",
        ("1", "2", "5"), ("amount", "offset", "n")),
    Map("times", "int", "int", "{things}, each multiplied by {k},", "product", "{x} * {k}", "multiplied",
        ("3", "4", "5", "10"), ("factor", "n", "multiplier")),
    Map("remainder", "int", "int", "the remainders of {things} divided by {k}", "remainder", "{x} % {k}",
        "remainders", ("2", "3", "5", "7"), ("divisor", "modulus", "n")),
    Map("last_digit", "int", "int", "the last digits of {things}", "last digit", "abs({x}) % 10", "last_digits"),
    Map("digits", "int", "int", "the numbers of digits of {things}", "number of digits", "len(str(abs({x})))",
        "digit_counts"),
    Map("digit_sum", "int", "int", "the digit sums of {things}", "digit sum",
        "sum(int(digit) for digit in str(abs({x})))", "digit_sums"),
    Map("capped", "int", "int", "{things}, each capped at {k},", "value", "min({x}, {k})", "capped",
        ("5", "10"), ("limit", "maximum", "cap")),
    Map("text", "int", "str", "{things} as strings", "string", "str({x})", "strings"),
    Map("binary", "int", "str", "{things} in binary", "binary form", "bin({x})[2:]", "binary"),
    Map("size", "str", "int", "the lengths of {things}", "length", "len({x})", "lengths"),
    Map("upper", "str", "str", "{things} in upper case", "word in upper case", "{x}.upper()", "uppercase"),
    Map("lower", "str", "str", "{things} in lower case", "word in lower case", "{x}.lower()", "lowercase"),
    Map("title", "str", "str", "{things}, each capitalized,", "capitalized word", "{x}.capitalize()", "capitalized"),
    Map("reverse", "str", "str", "{things}, each reversed,", "reversed word", "{x}[::-1]", "reversed"),
    Map("strip", "str", "str", "{things} without surrounding spaces", "stripped word", "{x}.strip()", "stripped"),
    Map("initial", "str", "str", "the first letters of {things}", "first letter", "{x}[:1]", "initials"),
    Map("final", "str", "str", "the last letters of {things}", "last letter", "{x}[-1:]", "last_letters"),
    Map("start", "str", "str", "the first {k} characters of {things}", "start", "{x}[:{k}]", "prefixes",
        ("2", "3"), ("length", "n", "size")),
    Map("vowels", "str", "int", "the numbers of vowels of {things}", "number of vowels",
        'sum(c in "aeiou" for c in {x})', "vowel_counts"),
    Map("plus_text", "str", "str", "{things} with {k} appended", "word", "{x} + {k}", "extended",
        ('"!"', '"s"', '"."'), ("suffix", "ending")),
    Map("plus_front", "str", "str", "{things} with {k} in front", "word", "{k} + {x}", "prefixed",
        ('"#"', '"- "', '"re"'), ("prefix", "start")),
    Map("twice", "str", "str", "{things}, each written twice,", "word", "{x} * 2", "repeated"),
    Map("no_spaces", "str", "str", "{things} without spaces", "word", '{x}.replace(" ", "")', "compact"),
    Map("upper_char", "char", "char", "{things} in upper case", "letter", "{x}.upper()", "uppercase"),
    Map("lower_char", "char", "char", "{things} in lower case", "letter", "{x}.lower()", "lowercase"),
    Map("swap_char", "char", "char", "{things} with their case swapped", "letter", "{x}.swapcase()", "swapped"),
    Map("code_char", "char", "int", "the character codes of {things}", "code", "ord({x})", "codes"),
    Map("twice_char", "char", "str", "{things}, each written twice,", "letter", "{x} * 2", "doubled"),
    Map("row_sum", "row", "int", "the sums of {things}", "sum", "sum({x})", "sums"),
    Map("row_max", "row", "int", "the largest elements of {things}", "largest element", "max({x})", "maxima"),
    Map("row_min", "row", "int", "the smallest elements of {things}", "smallest element", "min({x})", "minima"),
    Map("row_len", "row", "int", "the lengths of {things}", "length", "len({x})", "lengths"),
    Map("row_first", "row", "int", "the first elements of {things}", "first element", "{x}[0]", "first_elements"),
    Map("row_last", "row", "int", "the last elements of {things}", "last element", "{x}[-1]", "last_elements"),
    Map("row_sorted", "row", "row", "{things}, each sorted,", "sorted row", "sorted({x})", "sorted"),
    Map("row_reversed", "row", "row", "{things}, each reversed,", "reversed row", "{x}[::-1]", "reversed"),
    Map("year", "date", "int", "the years of {things}", "year", "{x}.year", "years"),
    Map("month", "date", "int", "the months of {things}", "month", "{x}.month", "months"),
    Map("day", "date", "int", "the days of {things}", "day", "{x}.day", "days"),
    Map("iso", "date", "str", "{things} in ISO format", "text", "{x}.isoformat()", "iso"),
)  # fmt: skip

KEYS: tuple[Map, ...] = (
    Map("remainder", "int", "int", "", "remainder by {k}", "{x} % {k}", "remainder", ("2", "3", "4", "10")),
    Map("absolute", "int", "int", "", "absolute value", "abs({x})", "absolute_value"),
    Map("last_digit", "int", "int", "", "last digit", "abs({x}) % 10", "last_digit"),
    Map("digits", "int", "int", "", "number of digits", "len(str(abs({x})))", "digits"),
    Map("length", "str", "int", "", "length", "len({x})", "length"),
    Map("initial", "str", "str", "", "first letter", "{x}[:1]", "first_letter"),
    Map("final", "str", "str", "", "last letter", "{x}[-1:]", "last_letter"),
    Map("lower", "str", "str", "", "lowercase form", "{x}.lower()", "lowercase"),
    Map("vowels", "str", "int", "", "number of vowels", 'sum(c in "aeiou" for c in {x})', "vowels"),
    Map("sum", "row", "int", "", "sum", "sum({x})", "sum"),
    Map("length", "row", "int", "", "length", "len({x})", "length"),
    Map("year", "date", "int", "", "year", "{x}.year", "year"),
    Map("month", "date", "int", "", "month", "{x}.month", "month"),
    Map("weekday", "date", "int", "", "weekday", "{x}.weekday()", "weekday"),
)
"""What to group, count, sort or choose by. `{things}` has no place in them, so `phrase` is empty."""

_N = ("int",)
_S = ("str",)
_NS = ("int", "str")
_ANY = ("int", "str", "char", "row", "date")
AGGREGATES: tuple[Aggregate, ...] = (
    Aggregate("sum", _N, "int", ("the sum of {things}", "the total of {things}"),
              ("sum_{things}", "sum_of_{things}", "total_{things}", "{things}_sum"), "sum({gen})",
              "{acc} = 0", "{acc} += {e}", acc=("total", "result", "total", "s")),
    Aggregate("product", _N, "int", ("the product of {things}",), ("product_of_{things}", "multiply_{things}"),
              "math.prod({gen})", "{acc} = 1", "{acc} *= {e}", acc=("product", "result", "total"),
              imports=("import math",)),
    Aggregate("count", _ANY, "int", ("the number of {things}", "how many {bare} there are", "Count {things}"),
              ("count_{things}", "number_of_{things}", "{things}_count"), "len({list})", "{acc} = 0", "{acc} += 1",
              acc=("count", "total", "n", "result"), plain=True, alternatives=("sum(1 for {x} in {tail})",)),
    Aggregate("max", _N, "int", ("the largest of {things}", "the maximum of {things}"),
              ("max_{things}", "largest_{things}", "maximum_of_{things}"), "max({gen})", empty=False),
    Aggregate("min", _N, "int", ("the smallest of {things}", "the minimum of {things}"),
              ("min_{things}", "smallest_{things}", "minimum_of_{things}"), "min({gen})", empty=False),
    Aggregate("max_none", _N, "int | None",
              ("the largest of {things}, or None if there are none", "the maximum of {things}, or None"),
              ("max_{things}", "largest_{things}", "find_largest_{things}"), "max({iter}, default=None)",
              "{acc} = None", "if {acc} is None or {e} > {acc}:\n    {acc} = {e}", acc=("largest", "best", "maximum"),
              named=True),
    Aggregate("min_none", _N, "int | None",
              ("the smallest of {things}, or None if there are none", "the minimum of {things}, or None"),
              ("min_{things}", "smallest_{things}", "find_smallest_{things}"), "min({iter}, default=None)",
              "{acc} = None", "if {acc} is None or {e} < {acc}:\n    {acc} = {e}", acc=("smallest", "best", "minimum"),
              named=True),
    Aggregate("max_zero", _N, "int", ("the largest of {things}, or 0 if there are none",),
              ("max_{things}", "largest_{things}"), "max({iter}, default=0)"),
    Aggregate("average", _N, "float", ("the average of {things}, or 0 if there are none", "the mean of {things}, or 0"),
              ("average_{things}", "mean_of_{things}", "average_of_{things}"), "",
              "{acc} = 0\ncount = 0", "{acc} += {e}\ncount += 1",
              "return {acc} / count if count else 0", acc=("total",)),
    Aggregate("list", _ANY, "list[{kind}]", ("a list of {things}", "{things} as a list", "{things}"),
              ("get_{things}", "{things}", "find_{things}", "list_{things}", "select_{things}"), "{list}",
              "{acc} = []", "{acc}.append({e})", acc=("result", "result", "found", "selected", "output")),
    Aggregate("sorted", _NS, "list[{kind}]",
              ("a sorted list of {things}", "{things} in ascending order", "{things}, sorted"),
              ("sorted_{things}", "sort_{things}"), "sorted({gen})", "{acc} = []", "{acc}.append({e})",
              "return sorted({acc})", acc=("result", "found", "selected")),
    Aggregate("descending", _NS, "list[{kind}]",
              ("{things} in descending order", "{things}, sorted from largest to smallest"),
              ("{things}_descending", "sort_{things}_descending"), "sorted({iter}, reverse=True)",
              "{acc} = []", "{acc}.append({e})", "{acc}.sort(reverse=True)\nreturn {acc}", acc=("result", "found")),
    Aggregate("reversed", _ANY, "list[{kind}]", ("{things} in reverse order", "a reversed list of {things}"),
              ("reversed_{things}", "reverse_{things}"), "{list}[::-1]", "{acc} = []", "{acc}.append({e})",
              "return {acc}[::-1]", acc=("result", "found")),
    Aggregate("set", _NS, "set[{kind}]", ("the set of {things}", "a set of {things}"),
              ("set_of_{things}", "{things}_set", "unique_{things}"), "{set}", "{acc} = set()", "{acc}.add({e})",
              acc=("result", "seen", "found")),
    Aggregate("distinct", _ANY[:3], "int", ("how many different {bare} there are", "the number of distinct {bare}"),
              ("count_distinct_{things}", "count_unique_{things}"), "len({set})", "{acc} = set()", "{acc}.add({e})",
              "return len({acc})", acc=("seen", "found"), plain=True),
    Aggregate("unique", _ANY[:3], "list[{kind}]",
              ("{things} without duplicates, in order", "a list of {things} without repetition"),
              ("unique_{things}", "distinct_{things}"), "list(dict.fromkeys({gen}))", "{acc} = []",
              "if {e} not in {acc}:\n    {acc}.append({e})", acc=("result", "seen", "unique"), named=True),
    Aggregate("counts", _ANY[:3], "dict[{kind}, int]",
              ("a dictionary of how often each of {things} occurs", "how often each of {things} occurs"),
              ("count_each_{things}", "{things}_counts", "frequencies_of_{things}"), "dict(Counter({gen}))",
              "{acc} = {{}}", "{acc}[{e}] = {acc}.get({e}, 0) + 1", acc=("counts", "frequencies", "result"), named=True,
              imports=("from collections import Counter",)),
    Aggregate("most_common", _ANY[:3], "{kind}", ("the most common of {things}", "the most frequent of {things}"),
              ("most_common_{things}", "most_frequent_{things}"), "Counter({gen}).most_common(1)[0][0]",
              imports=("from collections import Counter",), empty=False),
    Aggregate("first", _ANY, "{kind} | None", ("the first of {things}, or None if there are none",
              "the first of {things}, or None"), ("first_{things}", "find_first_{things}"),
              "next({iter}, None)", "", "return {e}", "return None"),
    Aggregate("last", _ANY, "{kind} | None", ("the last of {things}, or None if there are none",
              "the last of {things}, or None"), ("last_{things}", "find_last_{things}"),
              "", "{acc} = None", "{acc} = {e}", acc=("last", "result", "found")),
    Aggregate("first_k", _ANY, "list[{kind}]", ("the first 3 of {things}", "a list of the first 3 of {things}"),
              ("first_three_{things}",), "{list}[:3]", "{acc} = []",
              "{acc}.append({e})\nif len({acc}) == 3:\n    break", acc=("result", "found")),
    Aggregate("largest_k", _N, "list[int]", ("the 2 largest of {things}, largest first", "the top 2 of {things}"),
              ("two_largest_{things}", "top_two_{things}"), "sorted({iter}, reverse=True)[:2]"),
    Aggregate("range", _N, "int", ("the difference between the largest and the smallest of {things}",
              "the range of {things}"), ("range_of_{things}", "spread_of_{things}"), "max({gen}) - min({gen})",
              empty=False),
    Aggregate("running", _N, "list[int]", ("the running totals of {things}", "a list of cumulative sums of {things}"),
              ("running_totals", "cumulative_{things}", "running_sum_of_{things}"), "list(accumulate({gen}))",
              "{acc} = []\ntotal = 0", "total += {e}\n{acc}.append(total)", acc=("result", "totals", "sums"),
              imports=("from itertools import accumulate",)),
    Aggregate("join_comma", _S, "str", ("{things} joined by commas", "a string of {things} separated by commas"),
              ("join_{things}", "{things}_joined"), '",".join({gen})', "{acc} = []", "{acc}.append({e})",
              'return ",".join({acc})', acc=("parts", "result")),
    Aggregate("join_space", _S, "str", ("{things} joined by spaces", "a string of {things} separated by spaces"),
              ("join_{things}", "{things}_joined"), '" ".join({gen})', "{acc} = []", "{acc}.append({e})",
              'return " ".join({acc})', acc=("parts", "result")),
    Aggregate("join_dash", _S, "str", ("{things} joined by dashes", "{things} joined with hyphens"),
              ("join_{things}", "hyphenate_{things}"), '"-".join({gen})', "{acc} = []", "{acc}.append({e})",
              'return "-".join({acc})', acc=("parts", "result")),
    Aggregate("concat", ("str", "char"), "str", ("{things} as one string", "a string of {things}",
              "{things} joined into one string"), ("join_{things}", "{things}_string", "concatenate_{things}"),
              '"".join({gen})', '{acc} = ""', "{acc} += {e}", acc=("result", "text", "out")),
    Aggregate("longest", _S, "str", ("the longest of {things}", "the longest of {things}"),
              ("longest_{things}", "find_longest_{things}"), "max({iter}, key=len)", empty=False),
    Aggregate("shortest", _S, "str", ("the shortest of {things}", "the shortest of {things}"),
              ("shortest_{things}", "find_shortest_{things}"), "min({iter}, key=len)", empty=False),
    Aggregate("longest_empty", _S, "str", ("the longest of {things}, or an empty string",),
              ("longest_{things}", "find_longest_{things}"), 'max({iter}, key=len, default="")',
              '{acc} = ""', "if len({e}) > len({acc}):\n    {acc} = {e}", acc=("longest", "best"), named=True),
    Aggregate("total_length", _S, "int", ("the total length of {things}", "the sum of the lengths of {things}"),
              ("total_length_of_{things}", "sum_of_lengths"), "sum(len({e}) for {x} in {tail})", "{acc} = 0",
              "{acc} += len({e})", acc=("total", "length", "result")),
    Aggregate("alphabetic_first", _S, "str", ("the alphabetically first of {things}",),
              ("first_by_alphabet", "alphabetically_first"), "min({gen})", empty=False),
    Aggregate("pairs_sum", _N, "list[int]", ("the sums of neighbouring {bare}",), ("neighbour_sums",),
              "", "{acc} = []\nprevious = None",
              "if previous is not None:\n    {acc}.append(previous + {e})\nprevious = {e}", acc=("result",),
              named=True, plain=True),
    Aggregate("positions", _ANY[:3], "list[int]", ("the positions of {things}", "a list of the indices of {things}"),
              ("positions_of_{things}", "indices_of_{things}"),
              "[i for i, {x} in enumerate({source}) if {test}]", plain=True),
    Aggregate("position", _ANY[:3], "int", ("the index of the first of {things}, or -1 if there are none",
              "the position of the first of {things}, or -1"), ("index_of_first_{things}", "first_index_of_{things}"),
              "next((i for i, {x} in enumerate({source}) if {test}), -1)", plain=True),
    Aggregate("split", ("int", "str"), "tuple[list[{kind}], list[{kind}]]",
              ("a pair of lists: {things}, and all others", "two lists: {things}, and the rest"),
              ("split_{things}", "partition_{things}"),
              "[{x} for {x} in {source} if {test}], [{x} for {x} in {source} if not ({test})]", plain=True),
)  # fmt: skip
"""Those by a key (group, count, sort, choose) are made from `KEYS` in pipelines.py."""
