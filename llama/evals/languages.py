"""MultiPL-E: HumanEval's tasks in other languages, each with its toolchain, in namespaces of their own.

Compilers need processes and threads, so their programs can't run where Python's do: each gets a bubblewrap of its own,
with the toolchain's files to read, a folder in memory to write, no network, and limits of `setrlimit`. It has passed if
its last statement, which writes a word that differs for each run, was reached and its exit code is 0: mono, for one,
ends with 0 where an assertion fails. A language whose toolchain is missing is not measured.
"""

from __future__ import annotations

import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.evals.benchmarks import PAPER, Benchmark, Protocol, Row, Task
from llama.evals.datasets import Dataset
from llama.evals.judging import each
from llama.evals.sandbox import Verdict, has_bubblewrap

COMPILES = 97
"""The exit code of a script whose compiler refused the program."""
NOBODY = 65534
_REPOSITORY = (
    "https://raw.githubusercontent.com/deepseek-ai/DeepSeek-Coder/2f9fd85927c669dae3c0fbb2d607274023af243e/"
    "Evaluation/HumanEval/data/"
)
JAVATUPLES = Dataset(
    "multiple/javatuples-1.2.jar", "https://repo1.maven.org/maven2/org/javatuples/javatuples/1.2/javatuples-1.2.jar",
    "2eda5b19d9820e1cc2f69fcd01639a715a673c11f8507e3d1ed593cf765d5e0a", "Apache-2.0",
)  # fmt: skip


@dataclass(frozen=True)
class Language:
    file: str
    """The program's name."""
    script: str
    """Compiles and runs it in a folder where it stands."""
    tools: tuple[str, ...]
    """What must be installed."""
    prove: Callable[[str, str], str]
    """A program that writes a word when its end is reached."""
    stop: tuple[str, ...]
    sha256: str
    seconds: float = 15.0
    memory: int | None = 1 << 30
    """Bytes of address space; None for those that reserve much more than they use."""
    needs: tuple[Dataset, ...] = ()


def _appended(statement: str) -> Callable[[str, str], str]:
    return lambda program, word: f"{program}\n{statement.replace('WORD', word)}\n"


def _before_braces(statement: str, braces: int) -> Callable[[str, str], str]:
    """Puts a statement before so many closing braces at the program's end."""

    def prove(program: str, word: str) -> str:
        found = re.search(r"(\}\s*)" * braces + r"\Z", program)
        at = len(program) if found is None else found.start()
        return f"{program[:at]}{statement.replace('WORD', word)}\n{program[at:]}"

    return prove


LANGUAGES: dict[str, Language] = {
    "cpp": Language(
        "program.cpp", "g++ -std=c++17 program.cpp -o program || exit 97; ./program", ("g++",),
        _before_braces('    std::cout << std::endl << "WORD" << std::endl;', 1), ("\n}",),
        "8717eabdf202137158c84506144b0fb1e73d5ecccbe5363ec79009ca014df629",
    ),
    "java": Language(
        "Problem.java",
        "javac -encoding UTF-8 -cp javatuples-1.2.jar Problem.java || exit 97; "
        "java -ea -Xmx512m -XX:+UseSerialGC -cp .:javatuples-1.2.jar Problem",
        ("javac", "java"), _before_braces('    System.out.println("\\nWORD");', 2), ("\n    }\n",),
        "b21b015763452ec4f9f4e0e6425148ec331ace4da1232c8b4d441186185f6265", memory=None, needs=(JAVATUPLES,),
    ),
    "php": Language(
        "program.php", "php program.php", ("php",), _appended('echo "\\nWORD\\n";'),
        ("\nfunction", "\n?>", "\n//", "\n#"), "bebd86875b1d8e65a8b7e692ed7bdf64612b44aa388825ea4dab40c7047c786b",
    ),
    "ts": Language(
        "program.ts", "tsc --target esnext program.ts || exit 97; node --max-old-space-size=512 program.js",
        ("tsc", "node"), _appended('console.log("\\nWORD");'), ("\nfunction ", "\n/*", "\n//", "\nclass"),
        "4b1af1050c9f226335d54a8c80553c39454a525cace3e67bdcfcc9092ba02637", memory=None,
    ),
    "js": Language(
        "program.js", "node --max-old-space-size=512 program.js", ("node",), _appended('console.log("\\nWORD");'),
        ("\nfunction ", "\n/*", "\n//", "\nconsole.log"),
        "634e2eee8d6e22de07c121b972207683dd96be76256bf44bdfc1a3386b739287", seconds=5.0, memory=None,
    ),
    "cs": Language(
        "program.cs",
        "csc -d:DEBUG -r:System.Numerics.dll program.cs -out:program.exe || exit 97; "
        "MONO_TRACE_LISTENER=Console.Error mono program.exe 2> errors && ! grep -q Fail errors",
        ("csc", "mono"), _before_braces('    Console.WriteLine("\\nWORD");', 2), ("\n    }\n",),
        "1c3fe18be10addc2d0b96311f4db192ae3232e08628d17768d889d6ab87be224", seconds=5.0, memory=None,
    ),
    "sh": Language(
        "program.sh", "bash program.sh", ("bash",), _appended('printf "\\nWORD\\n"'), ("\n}",),
        "2f702106e9ce4aa7385de568d9248d6c57c90382d782b162cb9e072fbd01ccf8",
    ),
}  # fmt: skip


def missing_tools(word: str) -> list[str]:
    return [tool for tool in LANGUAGES[word].tools if shutil.which(tool) is None]


def _task(row: Row) -> Task:
    return Task(row["name"], row["prompt"], row=row)


def _program(task: Task, completion: str) -> str:
    for stop in task.row["stop_tokens"]:
        completion = completion.split(stop, 1)[0]
    return f"{task.prompt}{completion}\n{task.row['tests']}"


def _benchmark(word: str, language: Language) -> Benchmark:
    file = f"humaneval-{word}.jsonl"
    licence = "BSD-3-Clause, not to be trained on"
    dataset = Dataset(f"multiple/{file}.gz", f"{_REPOSITORY}{file}", language.sha256, licence)
    paper = Protocol(f"{PAPER}, table 4: zero-shot; prompts and stops of MultiPL-E", stop=language.stop)
    name, seconds = f"multiple:{word}", language.seconds
    return Benchmark(name, dataset, _task, _program, {"paper": paper}, seconds=seconds, title=f"MultiPL-E, {word}")


MultiPLE = {word: _benchmark(word, language) for word, language in LANGUAGES.items()}


class Foreign:
    """A judge, as judging.Judge is one, of one language's programs."""

    layers: tuple[str, ...] = ("rlimits", "bubblewrap")

    def __init__(
        self, word: str, files: Sequence[Path] = (), workers: int | None = None, seconds: float | None = None
    ) -> None:
        """`files` are what the language needs besides. Raises ValueError where the toolchain or bubblewrap is missing:
        there is no other layer in which a compiler can run."""
        self.language = LANGUAGES[word]
        self.files, self.workers = files, workers or len(os.sched_getaffinity(0))
        self.seconds = seconds or self.language.seconds
        if missing := missing_tools(word):
            raise ValueError(f"multiple:{word} is not measured, since {missing[0]} is not installed here")
        if not has_bubblewrap():
            raise ValueError(
                f"multiple:{word} is not measured, since bubblewrap is missing: apt-get install bubblewrap"
            )

    def __enter__(self) -> Foreign:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def all(self, programs: Sequence[str]) -> Iterator[tuple[int, Verdict]]:
        """The number and the verdict of each program, as they come."""
        return each(self.one, programs, self.workers)

    def one(self, program: str) -> Verdict:
        word, began = secrets.token_hex(16), time.monotonic()
        with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
            place = Path(folder, "given")
            place.mkdir()
            (place / self.language.file).write_text(self.language.prove(program, word), encoding="utf-8")
            for file in self.files:
                shutil.copy(file, place)
            os.chmod(folder, 0o755)
            with open(Path(folder, "output"), "w+b") as output:
                ended = self._run(place, output.fileno())
                output.seek(0, os.SEEK_END)
                output.seek(max(0, output.tell() - 2000))
                text = output.read().decode(errors="replace")
        return verdict(ended, text, word, round(time.monotonic() - began, 4))

    def _run(self, place: Path, output: int) -> int | None:
        """The exit code; None where its time was over. As root, it is run as nobody, whose processes can be counted."""
        script = f"cp /given/* . && {{ {self.language.script}; }}"
        root: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": ()} if os.geteuid() == 0 else {}
        process = subprocess.Popen(
            [*_namespaces(place), "bash", "-c", script], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            cwd="/", start_new_session=True, preexec_fn=lambda: _limit(self.seconds, self.language.memory), **root,
        )  # fmt: skip
        try:
            return int(process.wait(self.seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def verdict(ended: int | None, text: str, word: str, seconds: float) -> Verdict:
    lines = text.rstrip().split("\n")
    if ended is None:
        return Verdict(False, "timeout", seconds=seconds)
    if ended == 0 and lines[-1] == word:
        return Verdict(True, seconds=seconds)
    error = "compile" if ended == COMPILES else "exit" if ended == 0 else "killed" if 128 < ended <= 192 else "failed"
    error = "AssertionError" if ended != COMPILES and re.search(r"Assert|Test failed", text) else error
    return Verdict(False, error, text.replace(word, "")[-300:].strip(), seconds)


def _namespaces(place: Path) -> list[str]:
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    words += ["--setenv", "PATH", "/usr/bin:/bin", "--setenv", "LANG", "C.UTF-8", "--setenv", "HOME", "/work"]
    words += ["--proc", "/proc", "--dev", "/dev", "--size", str(64 << 20), "--tmpfs", "/tmp"]
    java = [str(path) for path in Path("/etc").glob("java*")]
    for path in ["/usr", "/bin", "/lib", "/lib64", "/etc/alternatives", "/etc/ld.so.cache", *java]:
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            words += ["--ro-bind", path, path]
    return [*words, "--ro-bind", str(place), "/given", "--size", str(256 << 20), "--tmpfs", "/work", "--chdir", "/work"]


def _limit(seconds: float, memory: int | None) -> None:
    limits: Mapping[int, int | None] = {
        resource.RLIMIT_CPU: int(seconds) + 1, resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: 64 << 20,
        resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 256, resource.RLIMIT_NPROC: 256,
    }  # fmt: skip
    for name, value in limits.items():
        if value is not None:
            resource.setrlimit(name, (value, value))
