"""Is a download whole, and is it what it says? Every file of a checkpoint's folder, with a verdict and the remedy.

What can be told from sizes and headers comes first and costs nothing: pages and pointers in place of files, files cut
short, tensors missing or of another shape than params.json or config.json and the number of shards ask for. Then all
bytes are read: md5 sums against checklist.chk, and every number, which must be finite.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from llama.config import ModelArgs
from llama.interop.gguf import GGUF
from llama.interop.layout import Shape, args_of, read_json, shard_shapes, whole_shapes
from llama.interop.names import to_huggingface
from llama.interop.stored import AGAIN, Fault, Stored, compare_crc, look_through, read_header
from llama.options import Positional
from llama.system import read_plain, some_of
from llama.tokenizer import Tokenizer

CHECKLIST = "checklist.chk"
WEIGHTS = r".*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNUSED = re.compile(r"rope\.freqs|.*\.rotary_emb\.inv_freq")  # in old files; they follow from the architecture
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
FETCH = "download it: it belongs to this checkpoint"
NO_TOKENIZER = "download it, or copy that of the model this one was made from: without it only token ids can be used"
ANEW = "delete it and download it again"
TOGETHER = "use the {} that came with these weights, or download all files again from one place"
_BLOCK = 1 << 23

Header = dict[str, Stored]


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one file."""

    file: str
    ok: bool
    found: str
    """What the file is, or what is wrong with it."""
    remedy: str = ""
    """What to do; empty where nothing is wrong."""


def check(path: str | Path, quick: bool = False, progress: bool = False) -> list[Verdict]:
    """A verdict for each file that a checkpoint in the published or in Hugging Face's format consists of.

    `quick` leaves out what needs reading all bytes, the sums and the numbers; `progress` shows bars on standard error.
    Raises ValueError where `path` is no folder of either kind. Nothing else is raised for what is wrong with it.
    """
    folder = Path(path).expanduser()
    if folder.is_file() and (folder.suffix.lower() == ".gguf" or read_plain(folder, 4) == b"GGUF"):
        return _gguf(folder, quick)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: pass the folder of a checkpoint")
    names = {file.name for file in folder.iterdir()}
    if "params.json" in names or any(re.fullmatch(r"consolidated\.\d\d+\.pth", name) for name in names):
        return _Check(folder, quick, progress).published()
    if "config.json" in names or any(re.fullmatch(WEIGHTS, name) for name in names):
        return _Check(folder, quick, progress).hugging_face()
    raise ValueError(
        f"{folder} holds neither params.json and consolidated.00.pth nor config.json and model.safetensors: pass the "
        "folder in which a checkpoint's files lie"
    )


def _gguf(path: Path, quick: bool) -> list[Verdict]:
    """The one verdict on a GGUF file: header, sizes and tokenizer, and whether every number is finite."""
    try:
        weights = GGUF(path)
        args = weights.args()
        lacking = sorted(set(whole_shapes(args)).symmetric_difference(weights.names()))
        if lacking:
            raise ValueError(f"{path}: {some_of(lacking, 3)} missing or unknown: {ANEW}")
        Tokenizer(weights.tokenizer_path)
        bad = [] if quick else [n for n in weights.names() if not bool(weights.tensor(n, args).isfinite().all())]
        if bad:
            raise ValueError(f"{path}: NaN or infinity in {some_of(bad, 3)}: {ANEW}")
    except ValueError as error:
        found, _, remedy = str(error).removeprefix(f"{path}: ").rpartition(": ")
        return [Verdict(path.name, False, found or remedy, remedy if found else AGAIN)]
    kinds = ", ".join(f"{count} {kind}" for kind, count in weights.kinds().items())
    return [Verdict(path.name, True, f"{kinds}, {_size(path)}" + ("" if quick else ", all finite"))]


class _Check:
    """One folder, and the verdicts on it so far."""

    def __init__(self, folder: Path, quick: bool, progress: bool) -> None:
        self.folder, self.quick, self.progress = folder, quick, progress
        self.verdicts: list[Verdict] = []
        self.sums: dict[str, str] = {}  # file to md5
        self.places: dict[str, str] = {}  # tensor to file, by an index
        self.args: ModelArgs | None = None
        self.tied = False

    def judge(self, file: str, examine: Callable[[Path], str], named_by: str = "") -> None:
        """`examine` says what the file is, or raises Fault; its sum is compared where one is known."""
        path = self.folder / file
        try:
            if not path.is_file():
                remedy = NO_TOKENIZER if file == "tokenizer.model" else FETCH
                raise Fault(f"missing, though {named_by} names it" if named_by else "missing", remedy)
            look_through(path)
            found = examine(path)
            if file in self.sums and not self.quick:
                self._compare_sum(path)
                found += ", md5 as listed"
            self.verdicts.append(Verdict(file, True, found))
        except Fault as fault:
            self.verdicts.append(Verdict(file, False, fault.found, fault.remedy))

    # Meta's format ---------------------------------------------------------------------------------------------------

    def published(self) -> list[Verdict]:
        if (self.folder / CHECKLIST).is_file():
            self.judge(CHECKLIST, self._read_checklist)
        else:
            self.verdicts.append(Verdict(CHECKLIST, True, "not here: no sums are compared"))
        self.judge("params.json", self._read_architecture)
        shards = self._numbered()
        opened = self._open(shards)
        header = next((found for found in opened.values() if isinstance(found, dict)), {})
        if self.args is not None and "tok_embeddings.weight" in header:
            # The published files tell no vocabulary; every shard has all rows of the embedding.
            self.args.vocab_size = header["tok_embeddings.weight"].shape[0]
            shards = [f"consolidated.{i:02d}.pth" for i in range(_count(self.args, header, len(shards)))]
        for i, name in enumerate(shards):
            self.judge(name, partial(self._examine_shard, opened=opened.get(name), shard=i, n_shards=len(shards)))
        self.judge("tokenizer.model", self._read_tokenizer)
        for name in sorted(self.sums.keys() - {verdict.file for verdict in self.verdicts}):
            self.judge(name, _size, CHECKLIST)
        return self.verdicts

    def _read_checklist(self, path: Path) -> str:
        """Lines of a sum and a name, as md5sum writes them, with the line ends of any system."""
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = re.findall(r"^([0-9a-fA-F]{32}) [ *]?(.+?)\s*$", text, re.MULTILINE)
        if not lines:
            raise Fault("it lists no checksums", AGAIN)
        self.sums = {str(Path(name)): md5.lower() for md5, name in lines if Path(name).name == str(Path(name))}
        return f"{len(lines)} checksums"

    def _compare_sum(self, path: Path) -> None:
        md5 = hashlib.md5(usedforsecurity=False)
        with path.open("rb") as file, self._bar(path.name, path.stat().st_size, "md5") as bar:
            while block := file.read(_BLOCK):
                md5.update(block)
                bar.update(len(block))
        if md5.hexdigest() != self.sums[path.name]:
            raise Fault(f"its md5 is {md5.hexdigest()}, {CHECKLIST} has {self.sums[path.name]}", ANEW)

    def _numbered(self) -> list[str]:
        """The shards that there should be: up to the last that is here or is listed."""
        names = {file.name for file in self.folder.iterdir()} | self.sums.keys()
        numbers = [int(m[1]) for name in names if (m := re.fullmatch(r"consolidated\.(\d\d+)\.pth", name))]
        return [f"consolidated.{i:02d}.pth" for i in range(max(numbers, default=0) + 1)]

    def _examine_shard(self, path: Path, opened: Header | Fault | None, shard: int, n_shards: int) -> str:
        header = _header(opened)
        if self.args is not None:
            if "tok_embeddings.weight" not in header:
                raise Fault(f"not in Meta's format: it holds {some_of(header, 3)}", TOGETHER.format("params.json"))
            try:
                expected = shard_shapes(self.args, n_shards, shard)
            except ValueError as error:
                found = f"of {n_shards} shards, which is not what params.json describes: {error}"
                raise Fault(found, TOGETHER.format("params.json")) from error
            _compare(header, expected, expected, "params.json")
        return self._examine_numbers(path, header)

    # Hugging Face's --------------------------------------------------------------------------------------------------

    def hugging_face(self) -> list[Verdict]:
        self.judge("config.json", self._read_architecture)
        files, index = self._listed()
        opened = self._open(files)
        expected = {} if self.args is None else _by_their_names(self.args)
        for name in files:
            own = [tensor for tensor, file in self.places.items() if file == name]
            self.judge(name, partial(self._examine_file, opened=opened.get(name), expected=expected, own=own), index)
        headers = [found for found in opened.values() if isinstance(found, dict)]
        if len(headers) == len(files):  # else it is known already what is lacking
            optional = {"lm_head.weight"} if self.tied else set()
            lacking = sorted(expected.keys() - optional - {tensor for header in headers for tensor in header})
            if lacking:
                found = (
                    f"{some_of(lacking, 3)} of the {len(expected)} tensors that config.json describes are in no file"
                )
                self.verdicts.append(Verdict("all weights", False, found, TOGETHER.format("config.json")))
        self.judge("tokenizer.model", self._read_tokenizer)
        return self.verdicts

    def _listed(self) -> tuple[list[str], str]:
        """The files of the weights, those that should be here too; and the index that says so, if one does."""
        names = sorted(file.name for file in self.folder.iterdir())
        if "model.safetensors" in names:  # one file needs no index, and what lies beside it is left over
            return ["model.safetensors"], ""
        for index in INDICES:
            if index in names:
                self.judge(index, self._read_index)
                if self.places:
                    return sorted(set(self.places.values())), index
        for pattern in (r"model.*\.safetensors", r".*\.safetensors", r"pytorch_model.*\.bin"):
            found = [name for name in names if re.fullmatch(pattern, name)]
            if found:
                return sorted({*found, *_other_parts(found)}), ""
        return ["model.safetensors"], ""

    def _read_index(self, path: Path) -> str:
        try:
            places = read_json(path).get("weight_map")
        except ValueError as error:
            raise Fault(str(error), AGAIN) from error
        if not isinstance(places, dict) or not all(Path(str(file)).name == file for file in places.values()):
            raise Fault("it has no weight_map from tensors to files of this folder", AGAIN)
        self.places = places
        return f"{len(places)} tensors in {len(set(places.values()))} files"

    def _examine_file(
        self, path: Path, opened: Header | Fault | None, expected: Mapping[str, Shape], own: list[str]
    ) -> str:
        header = _header(opened)
        _compare(header, expected or {name: tensor.shape for name, tensor in header.items()}, own, "config.json")
        return self._examine_numbers(path, header)

    # Both ------------------------------------------------------------------------------------------------------------

    def _read_architecture(self, path: Path) -> str:
        try:
            self.args = args_of(path)
            self.tied = path.name == "config.json" and bool(read_json(path).get("tie_word_embeddings"))
        except ValueError as error:
            raise Fault(str(error), "use the file that came with these weights") from error
        args = self.args
        if path.name == "config.json" and args.vocab_size < 1:
            raise Fault("it has no vocab_size", "use the file that came with these weights")
        return f"dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, {args.n_kv_heads} kv heads"

    def _read_tokenizer(self, path: Path) -> str:
        try:
            pieces = Tokenizer(path).n_words
        except ValueError as error:
            raise Fault("no SentencePiece model", AGAIN) from error
        rows = pieces if self.args is None or self.args.vocab_size < 1 else self.args.vocab_size
        if pieces != rows:
            raise Fault(
                f"{pieces} pieces, but the embedding has {rows} rows",
                "use the tokenizer.model that came with these weights",
            )
        return f"{pieces} pieces"

    def _open(self, files: Iterable[str]) -> dict[str, Header | Fault]:
        opened: dict[str, Header | Fault] = {}
        for name in files:
            path = self.folder / name
            if path.is_file():
                try:
                    opened[name] = {key: value for key, value in read_header(path).items() if not UNUSED.fullmatch(key)}
                except Fault as fault:
                    opened[name] = fault
        return opened

    def _examine_numbers(self, path: Path, header: Header) -> str:
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in header.values()})
        said = f"{len(header)} tensors in {' and '.join(dtypes)}, {_size(path)}"
        if self.quick:
            return said
        if path.name not in self.sums:  # an md5 says the same, of the whole file
            with self._bar(path.name, path.stat().st_size, "CRC-32") as bar:
                sums = compare_crc(path, bar.update)
            said += ", CRC-32 as stored" if sums else ""
        bad = []
        with self._bar(path.name, path.stat().st_size, "numbers") as bar:
            for name, tensor in header.items():
                bad += [] if tensor.is_finite() else [name]
                bar.update(tensor.nbytes)
        if bad:
            raise Fault(f"NaN or infinity in {some_of(bad, 3)}", f"{ANEW}; if it stays, the weights were published so")
        return said + ", all finite"

    def _bar(self, file: str, size: int, what: str) -> tqdm:
        bar = tqdm(
            desc=f"{file} {what}",
            total=size,
            unit="B",
            unit_scale=True,
            delay=2,
            leave=False,
            disable=not self.progress,
        )
        return bar


def _header(opened: Header | Fault | None) -> Header:
    """What was opened; what went wrong then is raised now, when the file has its turn."""
    if isinstance(opened, Fault):
        raise opened
    assert opened is not None
    return opened


def _compare(header: Header, expected: Mapping[str, Shape], required: Iterable[str], description: str) -> None:
    """Raises Fault for tensors that are missing, that nobody knows, of another shape, or that hold no plain numbers."""
    remedy = TOGETHER.format(description)
    if missing := [name for name in required if name not in header]:
        raise Fault(f"lacks {some_of(missing, 3)}", remedy)
    if unknown := [name for name in header if name not in expected]:
        raise Fault(f"holds {some_of(unknown, 3)}, which {description} does not describe", remedy)
    for name, tensor in header.items():
        if tensor.shape != tuple(expected[name]):
            raise Fault(f"{name} is {tensor.shape} instead of {tuple(expected[name])}", remedy)
        if tensor.dtype not in FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise Fault(
                f"{name} is in {dtype}", "take the weights in bfloat16, float16 or float32: these are another program's"
            )


def _by_their_names(args: ModelArgs) -> dict[str, Shape]:
    return {to_huggingface(name) or name: shape for name, shape in whole_shapes(args).items()}


def _count(args: ModelArgs, header: Header, present: int) -> int:
    """How many shards there must be by the shapes in one of them: more than `present` where the last are missing."""
    part = header.get("layers.0.feed_forward.w1.weight")
    if part is None or not part.shape[0] or args.hidden_dim % part.shape[0]:
        return present
    n = args.hidden_dim // part.shape[0]
    try:
        expected = shard_shapes(args, n)
    except ValueError:
        return present
    alike = all(tensor.shape == expected.get(name, tensor.shape) for name, tensor in header.items())
    return max(n, present) if alike else present


def _other_parts(names: list[str]) -> Iterator[str]:
    """All three of model-00002-of-00003.safetensors, by the name of one."""
    for name in names:
        if m := re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\..*)", name):
            yield from (f"{m[1]}{i:0{len(m[2])}d}{m[3]}{m[4]}{m[5]}" for i in range(1, int(m[4]) + 1))


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes"


def render(verdicts: list[Verdict]) -> str:
    """A table: file, verdict, what it is or what is wrong, and under that the remedy."""
    width = max(len(verdict.file) for verdict in verdicts)
    lines = []
    for verdict in verdicts:
        lines.append(f"{verdict.file:{width}}  {'ok ' if verdict.ok else 'BAD'}  {verdict.found}")
        lines += [f"{'':{width}}       {verdict.remedy}"] if verdict.remedy else []
    return "\n".join(lines)


def command(ckpt_dir: Positional[str], *, quick: bool = False) -> None:
    """A verdict on each file of a checkpoint in CKPT_DIR, with the remedy; exit code 1 where one is bad.

    Args:
        ckpt_dir: a folder in the published or in Hugging Face's format, or a .gguf file.
        quick: leave out what needs reading all bytes: md5 sums, and whether every number is finite.
    """
    verdicts = check(ckpt_dir, quick, progress=True)
    print(render(verdicts))
    bad = [verdict.file for verdict in verdicts if not verdict.ok]
    if bad:
        print(f"{len(bad)} of {len(verdicts)} need attention")
        raise SystemExit(1)
    print(
        "the checkpoint is whole" if not quick else "nothing is wrong with sizes and headers; the numbers were not read"
    )
