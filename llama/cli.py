"""The command `codellama`: its verbs, how their words are read, and what becomes of errors.

A verb is a function whose annotated parameters are its options (options.py), and tyro reads them. PyTorch is imported
when a model is loaded and not before, so that help and mistakes are answered at once. Under torchrun every rank runs
the same command; rank 0 reads and prints, the others follow. What a user got wrong ends in one paragraph.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import os
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llama import __version__
from llama.errors import LostRank
from llama.options import (
    Loading,
    Positional,
    nearest,
)

if TYPE_CHECKING:
    pass

Command = Callable[..., None]
VERBS = {
    "complete": ("llama.verbs:complete", "Continues a text."),
    "infill": ("llama.verbs:infill", "Fills in what is missing in a file."),
    "chat": ("llama.chat:chat", "A conversation."),
    "serve": ("llama.serve.cli:serve", "Serves a model to editors, OpenAI's clients, curl and a browser."),
    "info": ("llama.verbs:info", "What a checkpoint is: its sizes, parameters, bytes."),
    "plan": ("llama.interop.plan:command", "What a run takes of memory, whether it fits, and what would."),
    "download": ("llama.interop.download:command", "Downloads a checkpoint from the Hugging Face hub."),
    "check": ("llama.interop.check:command", "Verifies the files of a checkpoint, and says what to do about bad ones."),
    "convert": ("llama.interop.convert:command", "Rewrites a checkpoint in another format or number of shards."),
    "quantize": ("llama.quantize.cli:command", "Rewrites a checkpoint in 8 or 4 bits, or reports what that loses."),
    "bench": ("llama.bench.cli:command", "Measures speed and memory, beside the machine's limits and transformers."),
    "bench serve": ("llama.serve.load:command", "Measures a server of OpenAI's API under load."),
    "plan serve": ("llama.serve.simulate:command", "How many replicas hold a load, by simulating the scheduler."),
    "evals": ("llama.evals.cli:COMMANDS", "Measures a checkpoint: bits per byte, completions, infilling, retrieval."),
    "longcontext": ("llama.longcontext.cli:COMMANDS", "RoPE schemes and long contexts: perplexity, sweeps, retrieval."),
    "train": ("llama.train.cli:COMMANDS", "Trains a small checkpoint."),
    "shell_completion": ("llama.cli:shell_completion", "Prints a script by which a shell completes these commands."),
}
"""Where each verb's function, or table of functions, is, and what it does. A room is imported when it is asked for."""


def shell_completion(shell: Positional[typing.Literal["bash", "zsh", "tcsh"]]) -> None:
    """Prints a script for SHELL that completes verbs and options.

    codellama shell_completion bash > ~/.local/share/bash-completion/completions/codellama

    Args:
        shell: bash, zsh or tcsh.
    """
    from tyro import conf, extras

    every = extras.SubcommandApp()
    for verb, (place, _) in VERBS.items():
        if " " in verb:
            continue  # bench and plan are verbs by themselves, which a shell can't tell from tables
        found = _found(place)
        if callable(found):
            every.command(name=verb)(found)
        else:
            inner = extras.SubcommandApp()
            for name, command in found.items():
                inner.command(name=name)(command)
            every.command(inner, name=verb)
    words = ["--tyro-print-completion", shell]
    every.cli(prog="codellama", args=words, use_underscores=True, config=(conf.OmitArgPrefixes,))


# Words ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    """The console script `codellama`, and `python -m llama`."""
    with orderly():
        dispatch({verb: place for verb, (place, _) in VERBS.items()}, sys.argv[1:], "codellama")


def run(commands: Command | Mapping[str, Command], name: str) -> None:
    """Runs a function, or a table of them, by the words of the command line: for a room's own `python -m`."""
    with orderly():
        dispatch(commands, sys.argv[1:], name)


def run_script(main: Callable[..., None]) -> None:
    """Runs an example script's function by fire, as the published ones do, once its flags are known to be right."""
    with orderly():
        known = list(inspect.signature(main).parameters)
        flags = [word[2:].partition("=")[0].replace("-", "_") for word in sys.argv[1:] if word.startswith("--")]
        for flag in flags:
            if flag and flag != "help" and flag.removeprefix("no") not in known and flag not in known:
                every = ", ".join(f"--{name}" for name in known)
                raise ValueError(f"there is no option --{flag}{nearest(flag, known)} (there are {every})")
        import fire

        fire.Fire(main)


def dispatch(found: str | Command | Mapping[str, Any], words: Sequence[str], name: str) -> None:
    """Follows the words through tables of verbs to a function, reads the others as its options, and calls it."""
    found = _found(found) if isinstance(found, str) else found
    if callable(found):
        arguments, options = parse(found, words, name)
        found(*arguments, **options)
        return
    word = words[0] if words else "--help"
    both = " ".join(words[:2])
    if both in found:
        dispatch(found[both], words[2:], f"{name} {both}")
    elif word in found:
        dispatch(found[word], words[1:], f"{name} {word}")
    elif word in ("-h", "--help", "help"):
        _print_table(found, name)
    elif word in ("-V", "--version") and name == "codellama":
        print(f"codellama {__version__}" if leads() else "", end="\n" if leads() else "")
    else:
        known = list(found)
        mistaken(f"{name} has no verb {word!r}{nearest(word, known)} (there are {', '.join(known)})")


def parse(command: Command, words: Sequence[str], name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the words give each parameter of a command. Help and mistakes are printed, by rank 0, and end the run."""
    import tyro

    @functools.wraps(command)
    def given(*arguments: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, options

    config = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName)
    words = respelled(command, words)
    text = "".join(f" {word}" for word in words[words.index("--") + 1 :]) if "--" in words else ""
    try:
        found: tuple[tuple[Any, ...], dict[str, Any]] = tyro.cli(
            given, args=words, prog=name, use_underscores=True, console_outputs=leads(), config=config
        )
    except SystemExit as end:
        if end.code and " --" in text:
            print_alone("What follows -- is text: options stand before it.")
        elif end.code and any(word.startswith("-") and " " in word for word in words):
            print_alone(f"A text that begins with a hyphen stands at the end, after --: {name} [OPTIONS] -- TEXT")
        raise
    return found


def respelled(command: Command, words: Sequence[str]) -> list[str]:
    """Words in spellings of before: a switch's value (--fast true, --fast=false), --noX for --no_X, and an argument
    without a name given by its name (--prompt TEXT)."""
    marker = Positional[int].__metadata__[0]  # type: ignore[attr-defined]
    hints = typing.get_type_hints(command, include_extras=True)
    places = [name for name, hint in hints.items() if marker in getattr(hint, "__metadata__", ())]
    loading = typing.get_type_hints(Loading) if "loading" in hints else {}
    switches = {name for name, hint in {**hints, **loading}.items() if hint is bool}
    end = words.index("--") if "--" in words else len(words)
    rest, new, named = list(words[:end]), [], dict[str, str]()
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        option = option[2:].replace("-", "_") if option.startswith("--") else ""
        if option in switches and (equals or (rest and rest[0].lower() in ("true", "false"))):
            value = (value if equals else rest.pop(0)).lower()
            if value not in ("true", "false"):
                mistaken(f"--{option} is {value!r}, but it takes no value: --{option} turns it on, --no_{option} off")
            new.append(f"--{option}" if value == "true" else f"--no_{option}")
        elif option.startswith("no") and option[2:] in switches:
            warnings.warn(f"--{option} is called --no_{option[2:]} now", stacklevel=2)
            new.append(f"--no_{option[2:]}")
        elif option in places and (equals or rest):
            named[option] = value if equals else rest.pop(0)
        else:
            new.append(word)
    arguments = [named[name] for name in places if name in named]
    return [*new, *(["--", *arguments] if arguments else []), *words[end + bool(arguments) :]]


def leads() -> bool:
    """Whether this process is alone, or rank 0 of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def mistaken(what: str) -> typing.NoReturn:
    """Ends a run whose words can't be."""
    print_alone(f"error: {what}")
    raise SystemExit(2)


def print_alone(text: str) -> None:
    """On rank 0's standard error."""
    if leads():
        print(text, file=sys.stderr)


def _found(place: str) -> Command | Mapping[str, Command]:
    module, _, name = place.partition(":")
    found: Command | Mapping[str, Command] = getattr(importlib.import_module(module), name)
    return found


def _print_table(found: Mapping[str, Any], name: str) -> None:
    if not leads():
        return
    print(f"usage: {name} VERB …\n")
    width = max(map(len, found)) + 2
    for verb, command in found.items():
        summary = VERBS[verb][1] if isinstance(command, str) else (inspect.getdoc(command) or "").partition("\n")[0]
        print(f"  {verb:{width}}{summary}")
    print(f"\n`{name} VERB --help` says what a verb takes.")
    if name == "codellama":
        print("Without --ckpt_dir it is the small checkpoint that comes with the package: try `codellama chat`.")


@contextmanager
def orderly() -> Iterator[None]:
    """What goes wrong in the block ends in one paragraph on rank 0's standard error, or in silence, never in a
    traceback: 1 is the exit code of an error, 130 of Ctrl-C, 141 of a pipe that nobody reads any more."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals that have fewer characters
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda note, *_, **__: print_alone(f"note: {note}")
            yield
        sys.stdout.flush()
    except ValueError as error:
        print_alone(f"error: {error}")
        raise SystemExit(1) from None
    except LostRank as error:  # rank 0 may be the lost one, so each says it
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(141) from None
    except OSError as error:
        print_alone(f"error: {error.filename or 'the system'}: {error.strerror or error}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        if "llama.parallel" in sys.modules:
            sys.modules["llama.parallel"].stop()
