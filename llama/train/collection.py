"""From packages to documents: `codellama train corpus`.

Every file of every package passes the filters and is compared with all that came before it: the held-out packages
first, then the validation packages, the standard library, and the rest by name. That order is fixed, and decides
which of two duplicates stays; so no file that is trained on has even half of one that is held out, and the same wheels
give the same corpus. What is left goes into one compressed file a split, a line of JSON a document. The totals are
written last: where they are, the corpus is whole.
"""

from __future__ import annotations

import gzip
import io
import json
import platform
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama.options import MaybeOut, Out, Positional
from llama.system import replacing
from llama.train.corpus import Source, read_corpus
from llama.train.duplicates import Duplicates
from llama.train.filtering import choose, is_test
from llama.train.packages import SPLITS, Package, Split, as_source, enough_space, fetch_all, read_manifest, unpack

TOTALS = "corpus.json"
LIBRARY = "python"
"""The standard library's name among the packages; its version is the running interpreter's."""


@dataclass
class Tally:
    files: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, key: str, size: int) -> None:
        self.files[key] += 1
        self.bytes[key] += size


def corpus(out: Positional[Out], *, cache: MaybeOut = None) -> None:
    """Makes a corpus of pinned packages: fetches, filters and deduplicates them.

    Args:
        out: the corpus's folder.
        cache: where the packages are, or are fetched to (none: OUT/wheels).
    """
    packages = read_manifest()
    wheels = Path(out, "wheels") if cache is None else Path(cache)
    fetch_all(packages, wheels)
    print(describe(collect(packages, wheels, Path(out), read_corpus())))


def collect(packages: Iterable[Package], cache: Path, out: Path, library: Iterable[Source] = ()) -> dict[str, Any]:
    """Filters, deduplicates and writes the fetched packages; returns what `corpus.json` holds, sizes in bytes.

    `library` is the standard library, which counts as a package to train on.
    """
    packages = sorted(packages, key=lambda package: (SPLITS.index(package.split), package.name))
    (out / TOTALS).unlink(missing_ok=True)  # from here on, what is there is no whole corpus
    work = _Work({package.name for package in packages if package.split == "heldout"})
    with enough_space(out), tqdm(total=len(packages), desc="filtering", unit="package") as progress:
        for split in SPLITS:
            with _writing(out, split) as write:
                if split == "train":
                    write(LIBRARY, work.sift(LIBRARY, (Source(f"{LIBRARY}/{s.path}", s.text) for s in library)))
                for package in packages:
                    if package.split == split:
                        progress.set_postfix_str(package.name)
                        write(package.name, work.sift(package.name, work.read(package, cache)))
                        progress.update()
            if split == "heldout":
                work.duplicates.protect()
        totals = work.totals(packages)
        with replacing(out / TOTALS) as temporary:
            temporary.write_text(json.dumps(totals, indent=1), encoding="utf-8")
    return totals


class _Work:
    """What has been kept and dropped so far."""

    def __init__(self, held_out: set[str]) -> None:
        self.held_out = held_out
        self.duplicates = Duplicates()
        self.kept, self.tests, self.dropped = Tally(), Tally(), Tally()  # by package, by package, by reason

    def read(self, package: Package, cache: Path) -> Iterator[Source]:
        for path, content in unpack(package, cache):
            source = as_source(f"{package.name}/{path}", content)
            if source is None:
                self.dropped.add("not UTF-8", len(content))
            else:
                yield source

    def sift(self, name: str, sources: Iterable[Source]) -> Iterator[Source]:
        """Those files of a package that the corpus shall have."""
        chosen, faulty = choose(sources)
        for source, reason in faulty:
            self.dropped.add(reason, _size(source))
        for source in chosen:
            if repeated := self._repeats(name, source):
                self.dropped.add(repeated, _size(source))
                continue
            self.kept.add(name, _size(source))
            if is_test(source):
                self.tests.add(name, _size(source))
            yield source

    def _repeats(self, name: str, source: Source) -> str | None:
        match = self.duplicates.find(source.path, source.text)
        if match is None:
            return None
        is_leak = name not in self.held_out and match.name.partition("/")[0] in self.held_out
        return f"{match.degree} {'a held-out' if is_leak else 'an earlier'} file"

    def totals(self, packages: list[Package]) -> dict[str, Any]:
        library = {"version": platform.python_version(), "licence": "PSF-2.0", "split": "train"}
        facts = {LIBRARY: library, **{package.name: asdict(package) for package in packages}}
        return {
            "packages": {
                name: {
                    **{key: fact[key] for key in ("version", "licence", "split")},
                    "files": self.kept.files[name],
                    "bytes": self.kept.bytes[name],
                    "bytes_of_tests": self.tests.bytes[name],
                }
                for name, fact in facts.items()
            },
            "dropped": {
                reason: {"files": self.dropped.files[reason], "bytes": size}
                for reason, size in self.dropped.bytes.most_common()
            },
        }


def _size(source: Source) -> int:
    return len(source.text.encode())


def documents_file(folder: Path, split: Split) -> Path:
    return folder / f"documents-{split}.jsonl.gz"


@contextmanager
def _writing(folder: Path, split: Split) -> Iterator[Callable[[str, Iterable[Source]], None]]:
    """Yields a function that writes a package's files; the split's file appears when the block ends, or not at all."""
    with (
        replacing(documents_file(folder, split)) as temporary,
        temporary.open("wb") as raw,
        # Neither name nor time in it, so that the same corpus is the same file.
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as lines,
    ):

        def write(package: str, sources: Iterable[Source]) -> None:
            for source in sources:
                path = source.path.removeprefix(f"{package}/")
                json.dump({"package": package, "path": path, "text": source.text}, lines, ensure_ascii=False)
                lines.write("\n")

        yield write


def whole_corpus(folder: str | Path | None) -> None:
    """ValueError where a folder is given that holds no whole corpus."""
    if folder is not None and not Path(folder, TOTALS).is_file():
        raise ValueError(f"{folder} holds no whole corpus; make one with `codellama train corpus {folder}`")


def read_documents(folder: str | Path, split: Split) -> Iterator[Source]:
    """The documents of a corpus in their fixed order; each path begins with the package's name."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; there are {', '.join(SPLITS)}")
    whole_corpus(folder)
    path = documents_file(Path(folder), split)
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                entry = json.loads(line)
                yield Source(f"{entry['package']}/{entry['path']}", entry["text"])
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(
            f"{path} can't be read ({error}); make the corpus again with `codellama train corpus {folder}`"
        ) from error


def describe(totals: dict[str, Any]) -> str:
    """The totals as tables: what was kept by split and package, and what was dropped by reason."""
    packages = totals["packages"]
    text = [f"{'split':12}{'packages':>9}{'files':>8}{'MB':>9}{'of it tests':>13}"]
    for split in SPLITS:
        own = [fact for fact in packages.values() if fact["split"] == split]
        files, size, tests = (sum(fact[key] for fact in own) for key in ("files", "bytes", "bytes_of_tests"))
        text.append(f"{split:12}{len(own):9}{files:8}{size / 1e6:9.2f}{tests / max(1, size):13.1%}")
    text += ["", f"{'dropped because':30}{'files':>8}{'MB':>9}"]
    for reason, fact in totals["dropped"].items():
        text.append(f"{reason:30}{fact['files']:8}{fact['bytes'] / 1e6:9.2f}")
    text += ["", f"{'package':26}{'version':>14}  {'licence':24}{'split':12}{'files':>6}{'MB':>9}"]
    for name, fact in packages.items():
        text.append(
            f"{name:26}{fact['version']:>14}  {fact['licence']:24}{fact['split']:12}{fact['files']:6}"
            f"{fact['bytes'] / 1e6:9.2f}"
        )
    return "\n".join(text)
