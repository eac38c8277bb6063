"""`codellama bench`: words become models, measures and records.

Every variant is a function that changes a fresh model in place, in one table; so is every peer. Whatever room makes it
fast or small is imported when it is asked for. Under torchrun every rank measures; rank 0 prints and writes.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from json import dumps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from typing_extensions import Unpack

from llama.bench import editing as editings
from llama.bench.figures import Figure, draw, figures, rows_of, table
from llama.bench.measures import (
    Machine,
    Measured,
    decode,
    first_token,
    loading,
    prefill,
    roofline,
    touch,
)
from llama.bench.memory import growth, in_fresh_process
from llama.bench.peer import Transformers, transformers_model
from llama.bench.roofline import PLAIN, Pack
from llama.bench.rounds import spread
from llama.bench.shapes import SHAPES, random_model, shape_args, tokenizer_of, write_tokenizer
from llama.bench.subject import Ours, Subject, Work, work_of
from llama.checkpoint import open_checkpoint, save
from llama.evals.cli import read_sources
from llama.evals.record import Record, begin, origin, save_record, tell
from llama.evals.table import render
from llama.front import load as build
from llama.generation import EMBEDDED, Llama
from llama.interop.huggingface import to_config
from llama.interop.names import ROTATED, to_halves, to_huggingface
from llama.model import Transformer
from llama.options import (
    Above,
    Count,
    Counts,
    Lengths,
    Loading,
    MaybeCount,
    MaybeOut,
    MaybeSources,
    MaybeText,
    choice,
    nearest,
    one_of,
    several,
    unset,
)
from llama.parallel import start
from llama.system import DTYPES

MEASURES = ("decode", "loop", "prefill", "first_token", "load", "memory")
LONG = 16384  # tokens of the prompt that --long adds
PRESET_OPTIONS = ("device", "dtype", "model_parallel_size", "prefill_chunk", "timeout")
WEIGHT_FILES = ("consolidated.*.pth", "*.safetensors", "*.bin", "*.gguf")
ROOM = 1024  # tokens of a case of --editing


# Variants ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A way to run a model."""

    change_: Callable[[Transformer], object] | None = None
    """What is done to a fresh model, in place."""
    settle_: Callable[[Llama], object] | None = None
    """What is done again for each new cache."""
    bits: float | None = None
    """Of a weight as it lies in memory, scales included; None: the dtype's."""
    arithmetic: str | None = None
    """In which matrices are multiplied; None: the dtype."""
    lookup: int = 0


def _from(module: str, name: str) -> Callable[..., Any]:
    """A function of another room, or, where this version has no such room, a sentence."""
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not module.startswith(str(error.name)):
            raise
        raise ValueError(f"that variant needs {module}.{name}, which this version of the package lacks") from error
    return found


def _speed_up_(model: Transformer) -> None:
    _from("llama.fast", "speed_up_")(model)


def _quantize_(scheme: str, model: Transformer) -> None:
    """Quantised, in fused blocks."""
    _from("llama.quantize.layers", "quantize_")(model, scheme)
    _from("llama.fast", "speed_up_")(model)


def _compile_(llama: Llama) -> None:
    llama.model.__dict__.pop("hidden", None)  # what was compiled for another cache
    _from("llama.fast.compiled", "compile_")(llama.model, llama.prefill_chunk, llama.ranks.leads, llama.lookup)


VARIANTS: dict[str, Variant] = {
    "plain": Variant(),
    "fast": Variant(_speed_up_),
    "int8": Variant(partial(_quantize_, "int8"), bits=8),
    "int4": Variant(partial(_quantize_, "int4"), bits=5),  # groups of 32, each with two more numbers of 16 bits
    "int4:128": Variant(partial(_quantize_, "int4:128"), bits=4.25),
    "int8-dynamic": Variant(partial(_quantize_, "int8-dynamic"), bits=8, arithmetic="int8"),
    "int4-dynamic": Variant(partial(_quantize_, "int4-dynamic"), bits=5),
    "nf4": Variant(partial(_quantize_, "nf4"), bits=4.25),
    "compile": Variant(settle_=_compile_),
    "lookup": Variant(lookup=8),
}
"""Names of --variants. Several are joined by +, and done in that order: fast+compile."""


def variant_of(name: str) -> Variant:
    """That of a name, or of several joined by +. ValueError for a name that there is not."""
    parts = []
    for word in name.split("+"):
        if word not in VARIANTS:
            near = nearest(word, list(VARIANTS))
            raise ValueError(
                f"there is no variant {word}{near} (there are {', '.join(VARIANTS)}, or several joined by +)"
            )
        parts.append(VARIANTS[word])
    changes = [part.change_ for part in parts if part.change_]
    settles = [part.settle_ for part in parts if part.settle_]

    def change_(model: Transformer) -> None:
        for one in changes:
            one(model)

    def settle_(llama: Llama) -> None:
        for one in settles:
            one(llama)

    return Variant(
        change_,
        settle_ if settles else None,
        next((part.bits for part in parts if part.bits), None),
        next((part.arithmetic for part in parts if part.arithmetic), None),
        max(part.lookup for part in parts),
    )


def as_transformers(llama: Llama, work: Work) -> Transformers:
    """transformers' model of a fresh model's weights."""
    if llama.ranks.world_size > 1:
        raise ValueError("--against transformers runs in one process: leave torchrun out, or the peer")
    args, dtype = llama.model.args, llama.model.norm.weight.dtype
    weights = {}
    for name, weight in llama.model.named_parameters():
        theirs = to_huggingface(name)
        assert theirs is not None
        weights[theirs] = to_halves(weight, args.head_dim) if ROTATED.fullmatch(name) else weight.detach()
    config = {key: value for key, value in to_config(args, dtype).items() if key != "torch_dtype"}
    return Transformers(transformers_model(config, weights), work)


PEERS: dict[str, Callable[[Llama, Work], Subject]] = {"transformers": as_transformers}
"""Names of --against."""


# Models --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where fresh models come from: a checkpoint, or a preset."""

    preset: str | None
    layers: int | None
    options: Mapping[str, Any]
    """Those of Llama.build."""

    def fresh(self) -> Llama:
        """A Llama that nothing has changed yet; room for its tokens is made when it is measured."""
        if self.preset is None:
            return build(**{"max_seq_len": 128, "max_batch_size": 1, **self.options})
        wrong = [name for name in self.options if name not in PRESET_OPTIONS]
        if wrong:
            raise ValueError(
                f"--{wrong[0]} with --preset; a preset takes {', '.join('--' + n for n in PRESET_OPTIONS)}"
            )
        options = dict(self.options)
        dtype = str(options.pop("dtype"))
        chunk = int(options.pop("prefill_chunk", 512))
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype} is unknown; there are {', '.join(DTYPES)}")
        ranks = start(**options)
        args = shape_args(self.preset, self.layers)
        args.max_batch_size, args.max_seq_len = 1, 128
        model = random_model(args, ranks.device, DTYPES[dtype])
        return Llama(model, tokenizer_of(args.vocab_size), ranks=ranks, prefill_chunk=chunk)

    def changed(self, name: str) -> tuple[Llama, Work, Variant]:
        """The same as a variant, and what it must do."""
        variant = variant_of(name)
        llama = self.fresh()
        llama.lookup = variant.lookup
        work = work_of(llama.model, variant.bits, variant.arithmetic)
        if variant.change_ is not None:
            variant.change_(llama.model)
        return llama, work, variant

    def subject(self, name: str) -> Subject:
        """A variant, or a peer, to be measured."""
        if name in PEERS:
            llama = self.fresh()
            return PEERS[name](llama, work_of(llama.model))
        llama, work, variant = self.changed(name)
        return Ours(llama, work, variant.settle_)

    def model(self, name: str) -> Transformer:
        """A variant's model alone."""
        return self.changed(name)[0].model

    @property
    def whole_layers(self) -> int | None:
        """How many layers the preset has, where fewer are measured."""
        whole = None if self.preset is None else int(SHAPES[self.preset]["n_layers"])
        return None if self.layers in (None, whole) else whole

    def files(self) -> list[Path]:
        """The files of a checkpoint's weights."""
        path = Path(self.options.get("ckpt_dir") or EMBEDDED)
        if path.is_file():
            return [path]
        found = [sorted(path.glob(pattern)) for pattern in WEIGHT_FILES]
        return next((files for files in found if files), [])


def known_variant(name: str) -> str:
    variant_of(name)
    return name


# Commands ------------------------------------------------------------------------------------------------------------


Preset = Annotated[str | None, choice(SHAPES)]


def command(
    *,
    preset: Preset = None,
    layers: MaybeCount = None,
    variants: Annotated[tuple[str, ...], several("VARIANT", known_variant), unset("plain,fast")] = (),
    against: Annotated[tuple[str, ...], several("PEER", one_of(PEERS)), unset("none")] = (),
    measures: Annotated[
        tuple[str, ...],
        several("MEASURE", one_of(MEASURES)),
        unset("all, but load for checkpoints only: for a preset it writes the weights to a scratch folder"),
    ] = (),
    batches: Counts = (1, 8, 32),
    lengths: Lengths = (512, 2048),
    long: bool = False,
    prompt: Count = 128,
    tokens: Count = 32,
    rounds: Count = 7,
    size: Above = 1.0,
    editing: bool = False,
    prompts: Count = 8,
    sources: MaybeSources = None,
    out: MaybeOut = None,
    json: bool = False,
    **loading: Unpack[Loading],
) -> None:
    """How fast a model decodes, reads prompts, gives its first token and loads, and the memory that it takes.

    Each figure is the median of rounds in which all variants take turns, with the lowest and the highest round; ratios
    are taken within rounds. Beside it stands what the machine would allow, measured in the same rounds. The model is
    in bfloat16 unless --dtype says otherwise; --max_seq_len and --max_batch_size follow from the measures.

    Args:
        preset: a shape with random weights instead of a checkpoint; S has 110 M parameters, M 1.1 B.
        layers: how many of the preset's layers; figures for all are then extrapolated, and say so.
        variants: plain, fast, int8, int4, int4:128, int8-dynamic, int4-dynamic, nf4, compile, lookup; + joins several:
            fast+compile.
        against: a peer with the same weights: transformers.
        measures: some of decode,loop,prefill,first_token,load,memory.
        batches: rows that are decoded together.
        lengths: tokens of the prompts of prefill; the first also of first_token, the last of memory.
        long: a prompt of 16,384 tokens as well.
        prompt: tokens before those that are decoded.
        tokens: how many are decoded in a round.
        rounds: that count, after one that doesn't.
        size: of the probes of the machine; 1 for figures, less to try.
        editing: measure what prompt lookup brings instead, of --lookup tokens at a time (8).
        prompts: of each kind for --editing.
        sources: a folder of .py files or a corpus for --editing.
        out: a folder for CSV, JSON and PNG.
        json: print JSON instead of the table.
    """
    if layers is not None and preset is None:
        raise ValueError("--layers without --preset: a checkpoint is measured whole")
    if not (batches and lengths):
        raise ValueError("--batches and --lengths are empty: give at least one of each, or choose other --measures")
    taken = [name for name in ("max_seq_len", "max_batch_size") if name in loading]
    if taken:
        raise ValueError(f"--{taken[0]} is chosen by the measures: give --batches, --lengths and --tokens instead")
    twice = [name for name in ("fast", "quantize", "compile") if name in loading]
    if twice:
        raise ValueError(f"--{twice[0]} is a variant here: name it in --variants, so that it takes turns with others")
    if preset is not None:
        shape_args(preset, layers)
    lookup = loading.pop("lookup", None) or 8
    began = begin(out, draws=not editing)
    source = Source(preset, layers, {"dtype": "bfloat16", **loading})
    names = list(variants or _default_variants())
    asked = {"preset": preset, "layers": layers, "variants": names, "rounds": rounds, **source.options}
    if editing:
        asked["sources"] = sources
        _edit(source, names, lookup, prompts, rounds, read_sources(sources), out, asked, began, json)
        return
    wanted = measures or [m for m in MEASURES if preset is None or m != "load"]
    peers = against
    sizes = [*lengths, *([LONG] if long else [])]
    bases = list(dict.fromkeys([*peers, names[0]]))
    subjects = {name: source.subject(name) for name in [*peers, *names]}
    lead = next(subject.llama for subject in subjects.values() if isinstance(subject, Ours))
    device, chunk, leads = lead.ranks.device, lead.prefill_chunk, lead.ranks.leads
    machine = Machine(lead.model.args, device, chunk, rounds, ways=_ways(), size=size, progress=leads)
    found = roofline(machine, list(dict.fromkeys(["float32", *(s.work.arithmetic for s in subjects.values()), "int8"])))
    alone, loop = "decode" in wanted, "loop" in wanted
    for rows in batches if alone or loop else ():
        found += decode(machine, subjects, rows, prompt, tokens, source.whole_layers, alone=alone, loop=loop)
    for length in sizes if "prefill" in wanted else ():
        found += prefill(machine, subjects, length, source.whole_layers)
    if "first_token" in wanted:
        found.append(first_token(machine, subjects, sizes[0]))
    if "load" in wanted:
        found.append(_loading(machine, source, names, subjects))
    shown = [figure for measured in found for figure in figures(measured, bases)]
    if "memory" in wanted and lead.ranks.world_size == 1:
        del subjects, machine  # the processes need the room
        shown += _memory(source, [*peers, *names], sizes[-1])
    if leads:
        used = {"against": list(peers), "prompt": prompt, "tokens": tokens, "prefill_chunk": chunk, "size": size}
        made_of = {**asked, **used}
        if out is not None:
            save_record(Record("bench", rows_of(shown), made_of), out, began, lead, partial(draw, shown))
        values = {"measure": "bench", **origin(lead), **made_of, "figures": _given(shown)}
        tell(table(shown, bases), values, json)


def _default_variants() -> list[str]:
    return ["plain", *(["fast"] if importlib.util.find_spec("llama.fast") else [])]


def _ways() -> dict[str, Pack]:
    """Ways to lay out a weight, of which the best is the limit: plain, and the one that the room `fast` has."""
    try:
        return {**PLAIN, ", packed": _from("llama.fast.packing", "packed")}
    except ValueError:
        return dict(PLAIN)


def _loading(machine: Machine, source: Source, names: Sequence[str], subjects: Mapping[str, Subject]) -> Measured:
    """Of a checkpoint; of a preset's weights, written as one; and by a peer of the same, in its own format."""
    with TemporaryDirectory() as folder:
        scratch, stored = Path(folder), source
        if source.preset is not None:
            stored = _written(source, scratch)
        builds: dict[str, Callable[[], Any]] = {}
        for name, subject in subjects.items():
            if isinstance(subject, Transformers):
                subject.model.save_pretrained(scratch / name)
                builds[name] = partial(type(subject.model).from_pretrained, scratch / name, dtype=subject.model.dtype)
        builds |= {name: partial(stored.model, name) for name in names}
        return loading(machine, builds, stored.files())


def _written(source: Source, scratch: Path) -> Source:
    """A preset's random weights as a checkpoint in a folder."""
    llama = source.fresh()
    if llama.ranks.world_size > 1:
        raise ValueError("--measures load of a --preset runs in one process: leave torchrun out, or load")
    tokenizer = scratch / "tokenizer.model"
    write_tokenizer(llama.model.args.vocab_size, tokenizer)
    save(scratch / "ours", llama.model.args, dict(llama.model.named_parameters()), 1, tokenizer)
    return Source(None, None, {**source.options, "ckpt_dir": str(scratch / "ours")})


def _memory(source: Source, names: Sequence[str], tokens: int) -> list[Figure]:
    """Two figures for each model, each model in a process of its own."""
    found = []
    for name in names:
        asked = {"variant": name, "tokens": tokens, "preset": source.preset, "layers": source.layers, **source.options}
        memory = in_fresh_process(asked)
        for measure, size in (("memory, all", memory.total), ("memory above weights and cache", memory.above)):
            found.append(Figure(measure, name, 1, tokens, None, "MB", spread([size / 1e6]), "", None, {}))
    return sorted(found, key=lambda figure: figure.measure)


def grow(
    *, variant: str, tokens: Count, preset: MaybeText = None, layers: MaybeCount = None, **loading: Unpack[Loading]
) -> None:
    """Prints by how many bytes a run makes this process grow: to be started in a fresh one, as `bench` does.

    Args:
        variant: or a peer.
        tokens: of the prompt that is read.
        preset: as of bench.
        layers: as of bench.
    """
    source = Source(preset, layers, {"dtype": "bfloat16", **loading})

    def warm_up() -> None:
        small = Source(None, None, {key: value for key, value in source.options.items() if key in PRESET_OPTIONS})
        subject = small.subject(variant)
        subject.room(1, 128)
        subject.read([[3] * 100])

    def make() -> Subject:
        subject = source.subject(variant)
        touch(subject.llama.model if isinstance(subject, Ours) else subject.model)  # type: ignore[attr-defined]
        return subject

    words = open_checkpoint(source.options.get("ckpt_dir") or EMBEDDED).args().vocab_size if preset is None else 0
    device = start(device=loading.get("device")).device
    found = growth(warm_up, make, words or shape_args(str(preset)).vocab_size, tokens, device)
    print(dumps(asdict(found)))


def _given(shown: Sequence[Figure]) -> list[dict[str, Any]]:
    """The figures without what they don't have."""
    return [{key: value for key, value in row.items() if value is not None} for row in rows_of(shown)]


def _edit(
    source: Source,
    names: Sequence[str],
    lookup: int,
    prompts: int,
    rounds: int,
    files: Sequence[Any],
    out: str | None,
    asked: Mapping[str, Any],
    began: float,
    as_json: bool,
) -> None:
    """`--editing`: prompt lookup on each variant by itself."""
    rows: list[dict[str, Any]] = []
    for name in names:
        llama, work, variant = source.changed(name)
        Ours(llama, work, variant.settle_).room(1, ROOM)
        cases = editings.cases(
            llama.tokenizer,
            llama.model.args.vocab_size,
            files,
            ROOM,
            most=ROOM // 8,
            each=prompts,
            own=source.preset is None,
        )
        found = editings.editing(llama, cases, lookup, rounds, progress=llama.ranks.leads)
        rows += [{"variant": name, **asdict(one)} for one in found]
    if not llama.ranks.leads:
        return
    header = ["", "", "tokens/s without", f"with {lookup}", "ratio (lowest–highest)", "guesses right", "tokens a pass"]
    if out is not None:
        flat = [{key: _median(value) for key, value in row.items()} for row in rows]
        save_record(Record("editing", flat, {**asked, "lookup": lookup}), out, began, llama)
    values = {"measure": "editing", **origin(llama), **asked, "lookup": lookup, "kinds": rows}
    tell(render(header, [_edit_row(row) for row in rows]), values, as_json)


def _edit_row(row: Mapping[str, Any]) -> list[str]:
    ratio, accepted = row["ratio"], row["accepted"]
    return [
        row["variant"],
        row["kind"],
        f"{row['without']['median']:,.1f}",
        f"{row['with_lookup']['median']:,.1f}",
        f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})",
        f"{accepted['rate']:.0%} of {accepted['n']}" if accepted else "none",
        f"{row['tokens_per_pass']:.2f}",
    ]


def _median(value: Any) -> Any:
    """Of a spread or a share as a dictionary, its one figure."""
    if not isinstance(value, dict):
        return value
    return value["median"] if "median" in value else value["rate"]
