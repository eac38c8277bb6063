"""`codellama serve`: words become a Llama, an engine and an application, and a socket listens.

Under torchrun every rank loads its share; rank 0 serves, and the others follow its loop.
"""

from __future__ import annotations

import inspect
import logging
import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typing_extensions import Unpack

from llama.options import Above, Amount, Count, Loading, MaybePath, MaybeText, Words, numbers, spec

if TYPE_CHECKING:
    from llama.generation import Llama
    from llama.serve.service import Check, Facts

Port = Annotated[int, numbers("N", (int, "at least", 0, 65535))]
Host = Annotated[str, spec("ADDRESS", str)]
ROWS, SLOTS = 8, 2048
"""max_batch_size and max_seq_len of a server, unless they are given."""
EXTRA = "codellama serve needs FastAPI, uvicorn and prometheus-client: pip install 'codellama[serve]'"


def serve(
    *,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    model_name: MaybeText = None,
    api_key: MaybeText = None,
    api_key_file: MaybePath = None,
    open_paths: Words = ("/health",),
    cors: Words = (),
    max_queue: Amount = 128,
    request_timeout: Above = 600.0,
    drain: Above = 30.0,
    body_limit: Count = 2_000_000,
    filter: MaybeText = None,
    suffix_first: bool = False,
    heal: bool = True,
    metrics: bool = True,
    log: Literal["plain", "json", "none"] = "plain",
    log_prompts: bool = False,
    otlp_endpoint: MaybeText = None,
    **loading: Unpack[Loading],
) -> None:
    """Serves a model to OpenAI's, TGI's, llama.cpp's and Ollama's clients, and shows it on a page.

    It has 8 rows of 2048 tokens unless --max_batch_size and --max_seq_len say otherwise. SIGTERM or Ctrl-C ends it once
    what runs has ended.

    Args:
        host: where it listens; 0.0.0.0 for all of this machine's addresses.
        port: 0 for any free one.
        model_name: what clients see (default: the checkpoint's folder).
        api_key: what clients must send as `Authorization: Bearer KEY`; also $CODELLAMA_API_KEY.
        api_key_file: a file of such keys, one a line.
        open_paths: paths that need no key, for example /health,/metrics.
        cors: origins whose pages may use the server (default: none; * for all).
        max_queue: requests that may wait for a row; more get 429.
        request_timeout: seconds after which an answer that is not complete is given up.
        drain: seconds that running answers get after SIGTERM.
        body_limit: bytes of a request's body.
        filter: FILE.py:FUNCTION (text, "prompt" or "answer"), which returns a reason to refuse it, or None.
        suffix_first: infill in SPM order unless a request says otherwise.
        heal: where a prefix to infill ends inside a word, take its last piece back (token healing).
        metrics: Prometheus metrics at /metrics.
        log: form of the log on standard error, a line for each request.
        log_prompts: write prompts into it, too.
        otlp_endpoint: where traces are sent, for example http://127.0.0.1:4318/v1/traces.
    """
    leads = os.environ.get("RANK", "0") == "0"
    keys, check = keys_of(api_key, api_key_file), check_of(filter)
    try:
        from llama.serve.app import Settings, create_app
        from llama.serve.metrics import Metrics
        from llama.serve.running import Server, address, ignore_signals, listen
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("llama"):
            raise
        raise ValueError(f"{EXTRA} (there is no module {error.name})") from error
    from llama.front import load
    from llama.serve.engine import Engine, follow
    from llama.serve.tracing import tracer_to

    tracer = None if otlp_endpoint is None else tracer_to(otlp_endpoint)
    listening = listen(host, port) if leads else None
    given: dict[str, Any] = {"max_batch_size": ROWS, "max_seq_len": SLOTS, **loading}
    llama = load(**given)
    if listening is None:
        ignore_signals()
        follow(llama)
        return
    name = model_name or name_of(given.get("ckpt_dir"))
    facts = facts_of(llama, name, given.get("quantize"))
    counted = Metrics(name) if metrics else None
    engine = Engine(llama, max_queue=max_queue, request_timeout=request_timeout, watch=counted)
    _set_log(log)
    paths = [f"/{path.strip('/')}" for path in open_paths]
    settings = Settings(
        model_name=name, keys=keys, open_paths=paths, body_limit=body_limit, cors=cors, check=check,
        suffix_first=suffix_first, heal=heal, log_prompts=log_prompts, metrics=counted, tracer=tracer, facts=facts,
    )  # fmt: skip
    try:
        server = Server(create_app(engine, settings), engine, drain=drain)
        print("\n".join(summary(llama, facts, address(listening), name)), flush=True)
        if not keys and host not in ("127.0.0.1", "localhost", "::1"):
            print(f"note: anyone who reaches {host} may use this server: give it an --api_key", file=sys.stderr)
        server.run([listening])
    finally:
        engine.stop()
        listening.close()
    if engine.lost is not None:
        raise engine.lost


def summary(llama: Llama, facts: Facts, url: str, name: str) -> list[str]:
    """What is printed when a server starts: its address, the model, and what it costs."""
    args, rows = llama.model.args, llama.model.own_cache().rows
    ranks = f" on each of {llama.ranks.world_size} ranks" if llama.ranks.world_size > 1 else ""
    infills = "infills" if llama.tokenizer.can_infill else "has no infilling marks"
    kind = facts.quantization or facts.dtype
    return [
        f"Code Llama at {url} (endpoints: {url}/docs)",
        f"  model   {name}: {facts.parameters:,} parameters{ranks}, {kind} on {facts.device}; it {infills}",
        f"  memory  {facts.weights / 1e6:,.0f} MB of weights, {facts.cache / 1e6:,.0f} MB of KV cache{ranks}: "
        f"{rows} rows of {args.max_seq_len} tokens",
    ]


def facts_of(llama: Llama, name: str, quantize: str | None) -> Facts:
    from llama import __version__
    from llama.serve.service import Facts

    tensors = {t.data_ptr(): t for t in (*llama.model.parameters(), *llama.model.buffers())}
    return Facts(
        parameters=sum(p.numel() for p in llama.model.parameters()),
        weights=sum(t.nbytes for t in tensors.values()), cache=llama.model.own_cache().nbytes,
        dtype=str(llama.model.norm.weight.dtype).removeprefix("torch."), device=llama.ranks.device.type,
        quantization=quantize or "", version=__version__, path=name,
    )  # fmt: skip


def name_of(ckpt_dir: str | None) -> str:
    """A model's name for clients: that of its folder, or of its file. Some editors look for "codellama" in it."""
    if ckpt_dir is None:
        return "codellama-tiny"
    path = Path(ckpt_dir).resolve()
    return path.stem if path.suffix == ".gguf" else path.name


def keys_of(key: str | None, file: str | None) -> list[str]:
    """API keys from the option, the environment and a file. ValueError for an empty one, which anyone could send."""
    found = [one for one in (key, os.environ.get("CODELLAMA_API_KEY")) if one is not None]
    if file is not None:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ValueError(f"{file} has no key: write one a line")
    if any(not one.strip() or not one.isascii() for one in found):
        raise ValueError("an API key is empty or not ASCII: give letters, digits and signs")
    return found


def check_of(place: str | None) -> Check | None:
    """A filter: FILE.py:FUNCTION."""
    if place is None:
        return None
    path, _, name = place.rpartition(":")
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path!r}; give a filter as FILE.py:FUNCTION")
    found = runpy.run_path(path).get(name)
    if not callable(found):
        raise ValueError(f"{path} has no function {name!r}; a filter is one of (text, which)")
    try:
        inspect.signature(found).bind("", "prompt")
    except TypeError as error:
        raise ValueError(f"{name} in {path} can't be called with (text, which): {error}") from error
    checked: Check = found
    return checked


def _set_log(form: str) -> None:
    """The log of requests on standard error. Prompts are no part of it."""
    from llama.serve.edge import JSONLines

    if form == "none":
        logging.getLogger("llama.serve").setLevel(logging.WARNING)
        return
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(JSONLines() if form == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("llama.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(lines)
        logger.setLevel(logging.INFO if name == "llama.serve" else logging.WARNING)
        logger.propagate = False
