"""The corpus from packages, on wheels made up here: nothing is fetched from anywhere."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import random
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llama.train import collection, packages
from llama.train.collection import collect, describe, read_documents
from llama.train.corpus import TEST_SHARE, Source
from llama.train.duplicates import SIMILAR, Duplicates, Match, shingles, similarity
from llama.train.filtering import DIGITS, FAULTS, TESTS, choose, fault
from llama.train.packages import LICENCES, SPLITS, Package, Split, as_source, fetch, fetch_all, read_manifest

Pip = Callable[[Package, Path], "subprocess.CompletedProcess[str]"]


def program(seed: int, functions: int = 12) -> str:
    """Python that has little in common with that of another seed."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))

    return "\n\n".join(
        f"def {word()}({word()}, {word()}):\n    {word()} = {word()}({word()}) + {word()}\n    return {word()}.{word()}"
        for _ in range(functions)
    )


def make_wheel(folder: Path, name: str, files: dict[str, str | bytes], split: Split = "train") -> Package:
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    content = wheel.read_bytes()
    return Package(name, "1.0", "MIT", split, wheel.name, hashlib.sha256(content).hexdigest(), len(content), 0.0)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of pip's index; what pip was asked for is noted in `asked`."""
    index = tmp_path / "index"
    index.mkdir()

    def run_pip(package: Package, folder: Path) -> subprocess.CompletedProcess[str]:
        with (index / "asked").open("a") as asked:
            asked.write(f"{package.name}\n")
        wheel = index / package.file
        if not wheel.is_file():
            error = f"WARNING: old\nERROR: No matching distribution found for {package.name}=={package.version}\n"
            return subprocess.CompletedProcess([], 1, "", error)
        shutil.copy(wheel, folder)
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(packages, "run_pip", run_pip)
    return index


def asked(index: Path) -> list[str]:
    return (index / "asked").read_text().split() if (index / "asked").exists() else []


def names(folder: Path, split: Split) -> list[str]:
    return [source.path for source in read_documents(folder, split)]


# Fetching


def test_what_is_in_the_cache_is_not_fetched_again(index: Path, tmp_path: Path) -> None:
    pinned = [make_wheel(index, name, {f"{name}/a.py": program(0)}) for name in ("one", "two")]
    cache = tmp_path / "cache"
    fetch_all(pinned, cache)
    fetch_all(pinned, cache)
    assert asked(index) == ["one", "two"]
    (cache / pinned[1].file).write_bytes(b"cut off")
    fetch_all(pinned, cache)
    assert asked(index) == ["one", "two", "two"]
    assert sorted(path.name for path in cache.iterdir()) == [package.file for package in pinned]


def test_package_that_cannot_be_had_is_named_and_the_others_stay(index: Path, tmp_path: Path) -> None:
    there = make_wheel(index, "there", {"there/a.py": program(0)})
    missing = replace(there, name="missing", file="missing-1.0-py3-none-any.whl")
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"missing 1\.0 can't be had: ERROR: No matching .* run the command again"):
        fetch_all([there, missing], cache)
    assert [path.name for path in cache.iterdir()] == [there.file]
    (cache / missing.file).write_bytes((index / there.file).read_bytes())  # by hand, as the message says
    fetch_all([there, missing], cache)


def test_file_with_another_sum_is_refused(index: Path, tmp_path: Path) -> None:
    package = make_wheel(index, "changed", {"changed/a.py": program(0)})
    other = make_wheel(index, "changed", {"changed/a.py": program(1)})
    with pytest.raises(ValueError, match=rf"not the file that was pinned: its sha256 is {other.sha256}"):
        fetch_all([package], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_interrupted_fetch_leaves_nothing(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_wheel(index, "one", {"one/a.py": program(0)})

    def interrupted(package: Package, folder: Path) -> subprocess.CompletedProcess[str]:
        (folder / package.file).write_bytes(b"the first half")
        raise KeyboardInterrupt

    monkeypatch.setattr(packages, "run_pip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_all([package], tmp_path)
    assert not list(tmp_path.glob("*.whl")) + list(tmp_path.glob(".fetching*"))


def test_too_little_space_is_said_before_fetching(index: Path, tmp_path: Path) -> None:
    package = replace(make_wheel(index, "one", {"one/a.py": program(0)}), bytes=10**18)
    with pytest.raises(ValueError, match=r"MB of free space, and 1 packages of .* MB .*make room"):
        fetch_all([package], tmp_path)
    assert asked(index) == []


def test_disk_that_fills_up_while_pip_writes(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_wheel(index, "one", {"one/a.py": program(0)})
    full = subprocess.CompletedProcess([], 1, "", "ERROR: Could not install: [Errno 28] No space left on device\n")
    monkeypatch.setattr(packages, "run_pip", lambda package, folder: full)
    with pytest.raises(ValueError, match=r"no space is left for .* are kept"):
        fetch_all([package], tmp_path / "cache")


@pytest.mark.parametrize(
    ("file", "tags"),
    [
        ("one-1.0-py2.py3-none-any.whl", ["--abi=none", "--platform=any"]),
        ("one-1.0-cp39-abi3-manylinux_2_5_x86_64.manylinux1_x86_64.whl", ["--python-version=3.9", "--abi=abi3"]),
        (
            "one-1.0-cp313-cp313-manylinux_2_28_x86_64.whl",
            ["--python-version=3.13", "--platform=manylinux_2_28_x86_64"],
        ),
    ],
)
def test_pip_is_asked_for_the_pinned_tags(
    file: str, tags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: calls.append(command))
    packages.run_pip(Package("one", "1.0", "MIT", "train", file, "", 0, 0.0), tmp_path)
    assert calls[0][-1] == "one==1.0"
    assert set(tags) <= set(calls[0])
    assert "--no-deps" in calls[0]


def test_pip_itself_brings_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one test that runs pip: from a folder, without an index."""
    index = tmp_path / "index"
    index.mkdir()
    meta = "Metadata-Version: 2.1\nName: one\nVersion: 1.0\n"
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    info = {"one-1.0.dist-info/METADATA": meta, "one-1.0.dist-info/WHEEL": tags, "one-1.0.dist-info/RECORD": ""}
    package = make_wheel(index, "one", {"one/a.py": program(0), **info})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    fetch(package, tmp_path)
    assert (tmp_path / package.file).read_bytes() == (index / package.file).read_bytes()


# Filtering

BODY = program(1)
EXAMPLES: dict[str, tuple[Source, Source]] = {
    "copy of another package": (
        Source("p/p/_vendor/six/moves.py", BODY),
        Source("p/p/vendor.py", BODY),
    ),
    "too short": (Source("p/__init__.py", "import os\n"), Source("p/__init__.py", program(2, 4))),
    "too long": (Source("p/a.py", program(3, 8000)), Source("p/a.py", program(3, 1000))),
    "generated": (
        Source("p/a.py", "# Generated by the protocol compiler.  DO NOT EDIT!\n" + BODY),
        Source("p/a.py", '"""Random numbers, generated by a Mersenne twister; see the notes to edit."""\n' + BODY),
    ),
    "another licence": (
        Source("p/a.py", "# This is free software under the GNU Lesser General Public License.\n" + BODY),
        Source("p/a.py", "# Licensed under the Apache License, Version 2.0\n" + BODY),
    ),
    "long lines": (
        Source("p/a.py", BODY + "\nx = '" + "abcdefgh " * 200 + "'\n"),
        Source("p/a.py", BODY + "\nx = '" + "abcdefgh " * 20 + "'\n"),
    ),
    "not ASCII": (Source("p/a.py", BODY + "\n# " + "ж" * 60), Source("p/a.py", BODY + "\n# Jürgen Müller")),
    "numbers": (
        Source("p/a.py", BODY + "".join(f"\nf({k}, 3.14159, 2.71828)" for k in range(100))),
        Source("p/a.py", BODY + "\nf(1, 3.14159, 2.71828)"),
    ),
    "repeats itself": (
        Source("p/a.py", BODY + "\nregister(something)\nregister(anything)" * 60),
        Source("p/a.py", BODY + "\nelse_ = (\n)" * 5),
    ),
    "does not parse": (Source("p/a.py", BODY + "\nprint 'two'\n"), Source("p/a.py", BODY + "\nprint('three')\n")),
    "no code": (
        Source("p/a.py", '"""A package."""\n' + "# Copyright the authors, who reserve nothing\n" * 9),
        Source("p/a.py", '"""A package."""\n' + "# Copyright the authors, who reserve nothing\n" * 9 + "import os\n"),
    ),
    "a table": (
        Source("p/a.py", BODY + "\nNAMES = [\n" + "".join(f"    '{program(k, 1)[4:10]}',\n" for k in range(90)) + "]"),
        Source("p/a.py", BODY + "\nNAMES = [\n    'a',\n    'b',\n]"),
    ),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_each_filter_drops_and_keeps(reason: str) -> None:
    """Every reason has an example, for which it is the reason, and a near miss, for which nothing is."""
    dropped, kept = EXAMPLES[reason]
    assert fault(dropped) == reason
    assert fault(kept) is None


@pytest.mark.parametrize("path", ["p/p/api_pb2.py", "p/_version.py", "p/db/migrations/0001_initial.py"])
def test_files_that_tools_write_are_known_by_name(path: str) -> None:
    assert fault(Source(path, BODY)) == "generated"


def test_constant_of_many_lines_is_a_table_too() -> None:
    text = BODY + '\nPAGE = """\n' + "".join(f"<p>{program(k, 1)[4:10]}</p>\n" for k in range(90)) + '"""\n'
    assert fault(Source("p/a.py", text)) == "a table"


def test_number_filter_looks_at_what_is_no_space() -> None:
    text = BODY + "\n" + " " * 5000 + "# " + "1" * int(DIGITS * len(BODY.replace(" ", "").replace("\n", "")) * 1.3)
    assert FAULTS["numbers"](Source("p/a.py", text))


def test_deep_nesting_does_not_crash() -> None:
    assert fault(Source("p/a.py", BODY + "\nx = " + "-" * 900 + "1" + "\ny = " + "(" * 900)) == "does not parse"


def test_tests_get_a_share_only() -> None:
    code = [Source(f"p/{k}.py", program(k)) for k in range(10)]
    suites = [
        Source(path, program(100 + k))
        for k in range(3)
        for path in (f"p/tests/{k}.py", f"p/test_{k}.py", f"p/{k}_test.py", f"p/{k}/tests.py", f"p/{k}/conftest.py")
    ]
    kept, dropped = choose(suites + code)
    tests = [source for source in kept if source in suites]
    assert 0 < sum(len(s.text) for s in tests) <= TEST_SHARE * sum(len(s.text) for s in kept)
    assert kept == sorted(kept, key=lambda source: source.path)
    assert {reason for _, reason in dropped} == {TESTS}
    assert len(kept) + len(dropped) == 25


def test_text_is_read_as_python_reads_it() -> None:
    assert as_source("a.py", b"\xef\xbb\xbfx = 1\r\ny = 2\rz = 3\n") == Source("a.py", "x = 1\ny = 2\nz = 3\n")
    assert as_source("a.py", "# -*- coding: latin-1 -*-\nname = 'Jürgen'\n".encode("latin-1")) is None


# Duplicates


def edited(text: str, every: int) -> str:
    """The text with one word of every so many lines changed."""
    lines = text.split("\n")
    return "\n".join(line.replace("a", "q") if k % every == 0 else line for k, line in enumerate(lines))


def test_duplicates_are_found_through_small_changes() -> None:
    duplicates = Duplicates()
    text = program(1, 60)
    assert duplicates.find("a", text) is None
    assert duplicates.find("b", text.replace("    ", "\t")) == Match("a", "a copy of")
    assert duplicates.find("c", edited(text, 50)) == Match("a", "nearly")
    assert duplicates.find("d", edited(text, 50)) == Match("a", "nearly")  # not c, which isn't kept
    assert duplicates.find("e", "# Another licence, in many words\n" * 30 + text) == Match("a", "nearly")
    assert duplicates.find("f", edited(text, 2)) is None
    assert duplicates.find("g", program(2, 60)) is None


def test_protected_text_is_found_inside_a_longer_one() -> None:
    duplicates = Duplicates()
    text, other = program(1, 20), program(2, 20)
    assert duplicates.find("a", text) is None
    assert duplicates.find("longer", program(3, 100) + "\n\n" + text) is None
    assert duplicates.find("other", other) is None
    duplicates.protect()
    assert duplicates.find("later", program(4, 100) + "\n\n" + other + "\n\n" + program(5)) == Match("other", "much of")
    assert duplicates.find("later", program(4, 100) + "\n\n" + other[: int(0.6 * len(other))]) == Match(
        "other", "much of"
    )
    assert duplicates.find("part", program(4, 100) + "\n\n" + other[: int(0.4 * len(other))]) is None
    assert duplicates.find("unprotected", program(6, 100) + program(4, 100)) is None


def test_similarity_is_jaccards() -> None:
    text = program(1, 60)
    words = {tuple(tokens) for tokens in windows(text)}
    others = {tuple(tokens) for tokens in windows(edited(text, 20))}
    expected = len(words & others) / len(words | others)
    assert expected > SIMILAR
    assert similarity(shingles(text), shingles(edited(text, 20))) == pytest.approx(expected, abs=1e-3)
    assert similarity(shingles(text), shingles(text[: len(text) // 2])) == 0


def windows(text: str) -> list[list[str]]:
    words = re.findall(r"\w+|[^\w\s]", text)
    return [words[start : start + 5] for start in range(len(words) - 4)]


def test_bands_overlook_no_pair_that_is_similar_enough() -> None:
    """At 0.8 and a bit more, where overlooking is likeliest; each pair is given to an empty table."""
    found = 0
    for seed in range(40):
        text = program(seed, 40)
        other = edited(text, 10)
        if similarity(shingles(text), shingles(other)) >= SIMILAR:
            duplicates = Duplicates()
            duplicates.find("a", text)
            assert duplicates.find("b", other) == Match("a", "nearly"), seed
            found += 1
    assert found > 10


@pytest.mark.parametrize("text", ["", "x", "# only a comment"])
def test_texts_shorter_than_a_shingle(text: str) -> None:
    assert len(shingles(text)) == 1


# Collecting


def make_corpus(tmp_path: Path, out: str = "out", reverse: bool = False) -> Path:
    wheels = tmp_path / "wheels"
    wheels.mkdir(exist_ok=True)
    text = program(1, 60)
    pinned = [
        make_wheel(wheels, "alpha", {"alpha/own.py": program(2), "alpha/copied.py": text, "alpha/six.py": program(3)}),
        make_wheel(
            wheels,
            "beta",
            {"beta/six.py": program(3), "beta/own.py": program(4), "beta/all.py": program(8, 90) + "\n\n" + text},
        ),
        make_wheel(wheels, "gamma", {"gamma/own.py": edited(text, 50), "gamma/l.py": b"# \xe4"}, "heldout"),
        make_wheel(wheels, "delta", {"delta/own.py": program(5), "delta/b.py": text + "\n"}, "validation"),
    ]
    library = [Source("abc.py", program(6)), Source("six.py", program(3))]
    collect(pinned[::-1] if reverse else pinned, wheels, tmp_path / out, library)
    return tmp_path / out


def test_held_out_files_are_not_trained_on_in_any_guise(tmp_path: Path) -> None:
    out = make_corpus(tmp_path)
    assert names(out, "heldout") == ["gamma/gamma/own.py"]
    assert names(out, "validation") == ["delta/delta/own.py"]
    assert names(out, "train") == ["python/abc.py", "python/six.py", "alpha/alpha/own.py", "beta/beta/own.py"]


def test_totals_say_what_was_kept_and_dropped(tmp_path: Path) -> None:
    totals = json.loads((make_corpus(tmp_path) / "corpus.json").read_text())
    assert {reason: fact["files"] for reason, fact in totals["dropped"].items()} == {
        "nearly a held-out file": 2,
        "much of a held-out file": 1,
        "a copy of an earlier file": 2,
        "not UTF-8": 1,
    }
    assert totals["packages"]["alpha"] == {
        "version": "1.0",
        "licence": "MIT",
        "split": "train",
        "files": 1,
        "bytes": len(program(2)),
        "bytes_of_tests": 0,
    }
    assert "not UTF-8" in describe(totals)


def test_same_packages_give_the_same_corpus(tmp_path: Path) -> None:
    one, two = make_corpus(tmp_path, "one"), make_corpus(tmp_path, "two", reverse=True)
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path


def test_documents_are_lines_of_package_path_and_text(tmp_path: Path) -> None:
    out = make_corpus(tmp_path)
    with gzip.open(out / "documents-validation.jsonl.gz", "rt", encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == [
            {"package": "delta", "path": "delta/own.py", "text": program(5)}
        ]


def test_interrupted_corpus_does_not_look_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make_corpus(tmp_path)

    def interrupted(package: Package, cache: Path) -> list[tuple[str, bytes]]:
        if package.name == "beta":
            raise KeyboardInterrupt
        return [(f"{package.name}/new.py", program(7).encode())]

    monkeypatch.setattr(collection, "unpack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_corpus(tmp_path)
    with pytest.raises(ValueError, match="holds no whole corpus; make one with `codellama train corpus"):
        names(out, "heldout")
    assert all(path.name.startswith("documents-") for path in out.iterdir())


def test_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: str, encoding: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match="no space is left for"):
        make_corpus(tmp_path)


def test_corrupt_documents_are_named(tmp_path: Path) -> None:
    out = make_corpus(tmp_path)
    path = out / "documents-train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"documents-train\.jsonl\.gz can't be read .* make the corpus again"):
        names(out, "train")


def test_command_makes_the_corpus_from_an_empty_folder(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned = [make_wheel(index, split, {f"{split}/a.py": program(k)}, split) for k, split in enumerate(SPLITS)]
    monkeypatch.setattr(collection, "read_manifest", lambda: pinned)
    monkeypatch.setattr(collection, "read_corpus", lambda: [Source("abc.py", program(9))])
    collection.corpus(str(tmp_path / "out"))
    assert names(tmp_path / "out", "train") == ["python/abc.py", "train/train/a.py"]
    assert "heldout" in capsys.readouterr().out
    assert (tmp_path / "out" / "wheels" / pinned[0].file).is_file()


# The manifest


def test_manifest_is_permissive_and_splits_by_package() -> None:
    pinned = read_manifest()
    assert len({package.name for package in pinned}) == len(pinned)
    assert len({package.sha256 for package in pinned}) == len(pinned)
    for package in pinned:
        assert set(package.licence.split(" AND ")) <= LICENCES, package
        assert re.fullmatch("[0-9a-f]{64}", package.sha256), package
        assert package.file.endswith(".whl"), package
        assert package.bytes > 0, package


def test_manifest_has_enough_text_and_no_package_dominates() -> None:
    kept = {split: [package.kept for package in read_manifest() if package.split == split] for split in SPLITS}
    assert sum(kept["train"]) >= 150
    assert max(kept["train"]) <= 0.12 * sum(kept["train"])
    assert 8 <= sum(kept["heldout"]) <= 15
    assert sum(kept["validation"]) >= 3


def test_manifest_names_no_host() -> None:
    assert "://" not in packages.MANIFEST.read_text(encoding="utf-8")


def test_unknown_split_is_refused(tmp_path: Path) -> None:
    lines = packages.MANIFEST.read_text(encoding="utf-8").splitlines()
    path = tmp_path / "packages.tsv"
    path.write_text("\n".join([lines[0], re.sub(r"\t(train|heldout|validation)\t", "\ttest\t", lines[1])]))
    with pytest.raises(ValueError, match="is in split 'test'; there are heldout, validation, train"):
        read_manifest(path)
    with pytest.raises(ValueError, match="split 'test' is unknown"):
        list(read_documents(tmp_path, "test"))  # type: ignore[arg-type]
