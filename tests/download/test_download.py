"""download.sh against a small server on 127.0.0.1, once with wget and once with curl.

The scripts run with a PATH of symbolic links to just the tools they need, so that the downloader not under
test is not found, and with a HOME of their own, so that nobody's ~/.wgetrc or ~/.curlrc takes part.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from urllib.parse import unquote

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "download.sh"
SIGNATURE = "S3cretSignature"
SHARDS = {"7b": 1, "13b": 2, "34b": 4, "70b": 8}
MODELS = [size + kind for kind in ("", "-Python", "-Instruct") for size in SHARDS]
TOOLS = [
    "bash",
    "awk",
    "cut",
    "grep",
    "head",
    "mkdir",
    "mktemp",
    "mv",
    "rm",
    "sed",
    "seq",
    "sleep",
    "tr",
    "wc",
]
HTML = b"\xef\xbb\xbf  <!DOCTYPE html>\r\n  <html><body>Log in to go on</body></html>"
XML = b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>'


class Server(ThreadingTCPServer):
    """Serves `files`; each fault named in `faults[path]` spoils one request for that path, in turn.

    Not an HTTPServer, as that one asks the name server for the name of 127.0.0.1.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str | None]] = []  # the path, and the Range header
        self.queries: set[str] = set()
        self.ranges = True
        self.tells_size = True  # does a 416 tell the whole size?

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/*?Policy=p_~-&Signature={SIGNATURE}&Key-Pair-Id={{K,L}}[1-2]"

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def ranges_of(self, path: str) -> list[str | None]:
        return [asked for where, asked in self.requests if where == path]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        server = self.server
        path, _, query = self.path.lstrip("/").partition("?")
        asked = self.headers.get("Range")
        server.requests.append((path, asked))
        server.queries.add(unquote(query))
        binary = {"Content-Type": "binary/octet-stream"} if not path.endswith(".json") else {}  # need not be told
        faults = server.faults.get(path, [])
        fault = faults.pop(0) if faults else ""
        if path not in server.files:
            fault = "404"
        if fault.isdigit():
            return self.answer(int(fault), XML, {"Content-Type": "application/xml"})
        if fault == "html":
            return self.answer(200, HTML, {"Content-Type": "text/html; charset=utf-8"})
        if fault in ("html as binary", "xml as binary"):
            return self.answer(200, HTML if fault.startswith("html") else XML, binary)
        if fault == "redirect":
            return self.answer(302, HTML, {"Location": self.path, "Content-Type": "text/html"})
        body = server.files[path]
        if asked and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
            if start >= len(body):
                told = {"Content-Range": f"bytes */{len(body)}"} if server.tells_size else {}
                return self.answer(416, b"", told)
            place = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            return self.answer(206, body[start:], binary | place)
        if fault == "cut":  # the connection breaks half way
            return self.answer(200, body[: len(body) // 2], binary, len(body))
        return self.answer(200, body, binary)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as it:
        thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        it.files |= {"LICENSE": b"The licence", "USE_POLICY.md": b"# The policy"}
        yield it
        it.shutdown()
        thread.join()


def checklist(files: dict[str, bytes]) -> bytes:
    return b"".join(f"{hashlib.md5(data).hexdigest()}  {name}\n".encode() for name, data in files.items())


def publish(server: Server, model: str) -> dict[str, bytes]:
    """Puts a model of small fake files on the server; returns them by their names in its folder."""
    files = {}
    for n in range(SHARDS[model.partition("-")[0]]):
        start = f"PK\x03\x04 {model} {n}\n".encode()
        files[f"consolidated.{n:02d}.pth"] = start + bytes(range(256)) * 20
    files["params.json"] = b'{"dim": 16}\n'
    files["tokenizer.model"] = b"\n\x0e\n\x05<unk>\x15" + bytes(50)
    files["checklist.chk"] = checklist(files)
    server.files |= {f"CodeLlama-{model}/{name}": data for name, data in files.items()}
    return files


class Shell:
    """Runs download.sh with the chosen downloaders and checksum tool only."""

    def __init__(self, tmp_path: Path, *downloaders: str, md5: str = "md5sum") -> None:
        self.target = tmp_path / "the weights"
        self.bin = tmp_path / "bin"
        self.home = tmp_path / "home"
        self.bin.mkdir()
        self.home.mkdir()
        self.tmp = tmp_path / "tmp"
        self.tmp.mkdir()
        for tool in [*TOOLS, *downloaders, md5]:
            found = shutil.which(tool)
            if tool == "md5sum" and found is None:
                tool, found = "md5", shutil.which("md5")
            if tool == "md5" and found is None:
                self.fake(
                    "md5",
                    "import hashlib, sys; assert sys.argv[1] == '-q'; "
                    "print(hashlib.md5(open(sys.argv[2], 'rb').read()).hexdigest())",
                )
            elif found is None:
                pytest.skip(f"{tool} is not installed here")
            elif tool == "wget" and not self.version(found).startswith("GNU Wget 1"):
                pytest.skip("the wget here is not GNU wget 1.x, and the script would not use it")
            else:
                (self.bin / tool).symlink_to(found)

    @staticmethod
    def version(tool: str) -> str:
        return subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout

    def fake(self, name: str, code: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!{sys.executable} -S\n{code}\n")
        path.chmod(0o755)

    def run(self, *args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        clean = {"PATH": str(self.bin), "HOME": str(self.home), "RETRY_WAIT": "0", "no_proxy": "127.0.0.1"}
        clean["TMPDIR"] = str(self.tmp)
        done = subprocess.run(
            [str(self.bin / "bash"), str(SCRIPT), *args],
            input=stdin,
            env=clean | env,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert SIGNATURE not in done.stdout
        assert not list(self.tmp.iterdir())
        return done

    def get(self, server: Server, models: str = "7b") -> subprocess.CompletedProcess[str]:
        return self.run("--url", server.url, "--models", models, "--target", str(self.target))

    def folder(self, model: str = "7b") -> Path:
        return self.target / f"CodeLlama-{model}"

    def holds(self, files: dict[str, bytes], model: str = "7b") -> bool:
        """Does the model's folder hold these files and nothing else?"""
        return {path.name: path.read_bytes() for path in self.folder(model).iterdir()} == files


@pytest.fixture(params=["wget", "curl"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Shell:
    return Shell(tmp_path, request.param)


@pytest.fixture
def either(tmp_path: Path) -> Shell:
    """For what does not depend on the downloader: the one that is there."""
    return Shell(tmp_path, "curl" if shutil.which("curl") else "wget")


@pytest.fixture
def offline(tmp_path: Path) -> Shell:
    """For what ends before the first request: the downloader is there, but could not download."""
    shell = Shell(tmp_path)
    shell.fake("curl", "raise SystemExit('a request was made')")
    return shell


# --- what works -----------------------------------------------------------------------------------


def test_asks_downloads_and_verifies(shell: Shell, server: Server) -> None:
    files = publish(server, "13b-Python")
    done = shell.run(stdin=f"{server.url}\n13b-Python\n", TARGET_FOLDER=str(shell.target))
    assert done.returncode == 0, done.stdout
    assert "Enter the URL from email:" in done.stdout
    assert f"without spaces ({','.join(MODELS)}), or press Enter for all:" in done.stdout
    assert shell.holds(files, "13b-Python")
    assert (shell.target / "LICENSE").read_bytes() == b"The licence"
    assert (shell.target / "USE_POLICY.md").read_bytes() == b"# The policy"
    assert sorted(server.paths()) == sorted(server.files)
    assert server.queries == {server.url.partition("?")[2]}


def test_enter_means_all_models_with_all_their_shards(either: Shell, server: Server) -> None:
    published = {model: publish(server, model) for model in MODELS}
    done = either.run("--target", str(either.target), stdin=f"{server.url}\r\n\r\n")
    assert done.returncode == 0, done.stdout
    for model, files in published.items():
        assert either.holds(files, model), model
    assert len(list(either.folder("34b").glob("consolidated.*.pth"))) == 4
    assert len(list(either.target.rglob("consolidated.*.pth"))) == 3 * (1 + 2 + 4 + 8)


def test_two_models_from_the_environment_into_the_current_folder(either: Shell, server: Server) -> None:
    seven, instruct = publish(server, "7b"), publish(server, "7b-Instruct")
    done = either.run(PRESIGNED_URL=server.url, MODEL_SIZE="7b,7b-Instruct")
    assert done.returncode == 0, done.stdout
    either.target = either.home
    assert either.holds(seven)
    assert either.holds(instruct, "7b-Instruct")


def test_input_without_a_last_line_end(either: Shell, server: Server) -> None:
    publish(server, "7b")
    assert either.run("--models", "7b", stdin=server.url).returncode == 0
    assert either.run("--url", server.url, stdin="7b").returncode == 0


@pytest.mark.parametrize("wrapped", ['  "{}"\r', "'{}' ", r"\{}"])
def test_what_pasting_adds_to_the_url_is_dropped(either: Shell, server: Server, wrapped: str) -> None:
    files = publish(server, "7b")
    done = either.run("--target", str(either.target), stdin=f"{wrapped.format(server.url)}\n7b\r\n")
    assert done.returncode == 0, done.stdout
    assert either.holds(files)


def test_complete_files_are_not_fetched_again(either: Shell, server: Server) -> None:
    files = publish(server, "34b")
    assert either.get(server, "34b").returncode == 0
    server.requests.clear()
    assert either.get(server, "34b").returncode == 0
    assert server.requests == []
    assert either.holds(files, "34b")


@pytest.mark.parametrize("name", ["consolidated.00.pth.part", "consolidated.00.pth"])
def test_resumes_what_another_run_or_downloader_left(shell: Shell, server: Server, name: str) -> None:
    files = publish(server, "7b")
    shell.folder().mkdir(parents=True)
    (shell.folder() / name).write_bytes(files["consolidated.00.pth"][:1234])
    done = shell.get(server)
    assert done.returncode == 0, done.stdout
    assert server.ranges_of("CodeLlama-7b/consolidated.00.pth") == ["bytes=1234-"]
    assert shell.holds(files)


def test_resumes_when_the_connection_broke(shell: Shell, server: Server) -> None:
    files = publish(server, "7b")
    path = "CodeLlama-7b/consolidated.00.pth"
    server.faults[path] = ["cut"]
    done = shell.get(server)
    assert done.returncode == 0, done.stdout
    assert server.ranges_of(path) == [None, f"bytes={len(files['consolidated.00.pth']) // 2}-"]
    assert shell.holds(files)


@pytest.mark.parametrize("tells_size", [True, False])
def test_a_complete_part_is_taken_as_complete(shell: Shell, server: Server, tells_size: bool) -> None:
    files = publish(server, "7b")
    server.tells_size = tells_size
    shell.folder().mkdir(parents=True)
    (shell.folder() / "consolidated.00.pth.part").write_bytes(files["consolidated.00.pth"])
    done = shell.get(server)
    assert done.returncode == 0, done.stdout
    assert len(server.ranges_of("CodeLlama-7b/consolidated.00.pth")) == 1  # the one answered with 416
    assert shell.holds(files)


def test_an_older_curl_that_fails_on_416(tmp_path: Path, server: Server) -> None:
    shell = Shell(tmp_path, "curl")
    shell.fake(
        "curl",
        "import subprocess, sys\n"
        f"code = subprocess.run([{shutil.which('curl')!r}, *sys.argv[1:]]).returncode\n"
        "sys.exit(22 if ' 416 ' in open(sys.argv[sys.argv.index('--dump-header') + 1]).read() else code)",
    )
    files = publish(server, "7b")
    server.tells_size = False
    shell.folder().mkdir(parents=True)
    (shell.folder() / "consolidated.00.pth.part").write_bytes(files["consolidated.00.pth"])
    done = shell.get(server)
    assert done.returncode == 0, done.stdout
    assert shell.holds(files)


def test_a_part_too_long_is_fetched_from_the_start(shell: Shell, server: Server) -> None:
    files = publish(server, "7b")
    shell.folder().mkdir(parents=True)
    (shell.folder() / "consolidated.00.pth.part").write_bytes(files["consolidated.00.pth"] + b"more")
    done = shell.get(server)
    assert done.returncode == 0, done.stdout
    assert shell.holds(files)


@pytest.mark.parametrize("kept", [1234, -1, None])
def test_a_server_that_cannot_resume(shell: Shell, server: Server, kept: int | None) -> None:
    files = publish(server, "7b")
    server.ranges = False
    shell.folder().mkdir(parents=True)
    (shell.folder() / "consolidated.00.pth.part").write_bytes(files["consolidated.00.pth"][:kept])
    done = shell.get(server)
    assert done.returncode == 0, done.stdout
    assert shell.holds(files)


def test_a_web_page_saved_by_another_downloader_is_replaced(either: Shell, server: Server) -> None:
    files = publish(server, "7b")
    either.folder().mkdir(parents=True)
    (either.folder() / "consolidated.00.pth").write_bytes(HTML)
    (either.folder() / "checklist.chk").write_bytes(HTML)
    done = either.get(server)
    assert done.returncode == 0, done.stdout
    assert either.holds(files)


def test_tries_again_after_a_server_error_and_follows_redirects(shell: Shell, server: Server) -> None:
    files = publish(server, "7b")
    server.faults["CodeLlama-7b/params.json"] = ["503", "429", "redirect"]
    done = shell.get(server)
    assert done.returncode == 0, done.stdout
    assert server.paths().count("CodeLlama-7b/params.json") == 4
    assert shell.holds(files)


@pytest.mark.parametrize("change", ["CRLF", "binary marks", "capitals", "no last line end"])
def test_checklists_of_other_systems(either: Shell, server: Server, change: str) -> None:
    files = publish(server, "13b")
    text = files["checklist.chk"]
    if change == "CRLF":
        text = text.replace(b"\n", b"\r\n")
    elif change == "binary marks":
        text = text.replace(b"  ", b" *")
    elif change == "capitals":
        text = re.sub(rb"^\w{32}", lambda found: found[0].upper(), text, flags=re.M)
    else:
        text = text[:-1]
    assert text != files["checklist.chk"]
    files["checklist.chk"] = server.files["CodeLlama-13b/checklist.chk"] = text
    done = either.get(server, "13b")
    assert done.returncode == 0, done.stdout
    assert "not verified" not in done.stdout
    assert either.holds(files, "13b")


def test_a_file_that_the_checklist_does_not_list(either: Shell, server: Server) -> None:
    files = publish(server, "7b")
    listed = {name: data for name, data in files.items() if name not in ("tokenizer.model", "checklist.chk")}
    files["checklist.chk"] = server.files["CodeLlama-7b/checklist.chk"] = checklist(listed)
    done = either.get(server)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("not verified") == 1
    assert "does not list tokenizer.model" in done.stdout
    assert either.holds(files)


def test_works_with_the_md5_of_macos(tmp_path: Path, server: Server) -> None:
    shell = Shell(tmp_path, "curl" if shutil.which("curl") else "wget", md5="md5")
    files = publish(server, "7b")
    done = shell.get(server)
    assert done.returncode == 0, done.stdout
    assert shell.holds(files)
    (shell.folder() / "params.json").write_bytes(b"{}")
    server.files["CodeLlama-7b/params.json"] = b"{} "
    assert shell.get(server).returncode == 1


def test_the_signature_is_not_in_the_list_of_processes(shell: Shell, server: Server) -> None:
    publish(server, "7b")
    (name,) = {"wget", "curl"} & {path.name for path in shell.bin.iterdir()}
    real, args = (shell.bin / name).resolve(), shell.home / "args"
    shell.fake(
        name,
        f"import os, sys; open({str(args)!r}, 'a').write(repr(sys.argv)); "
        f"os.execv({str(real)!r}, [{name!r}, *sys.argv[1:]])",
    )
    assert shell.get(server).returncode == 0
    assert "LICENSE.part" in args.read_text()
    assert SIGNATURE not in args.read_text()


# --- what fails, and how it is told ---------------------------------------------------------------


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_wrong_checksum(either: Shell, server: Server, line_end: bytes) -> None:
    files = publish(server, "34b")
    files["checklist.chk"] = files["checklist.chk"].replace(b"\n", line_end)
    server.files["CodeLlama-34b/checklist.chk"] = files["checklist.chk"]
    path = "CodeLlama-34b/consolidated.01.pth"
    server.files[path] = server.files[path][:-1] + b"?"  # the right size, the wrong bytes
    done = either.get(server, "34b")
    assert done.returncode == 1
    assert f"FAILED {path}: its checksum is wrong" in done.stdout
    assert "run again" in done.stdout
    assert "All files are here" not in done.stdout
    bad = {"consolidated.01.pth.bad": server.files[path]}
    good = {name: data for name, data in files.items() if name != "consolidated.01.pth"}
    assert either.holds(good | bad, "34b")  # the files after it came all the same

    server.files[path] = files["consolidated.01.pth"]
    server.requests.clear()
    assert either.get(server, "34b").returncode == 0
    assert server.requests == [(path, None)]
    assert either.holds(files | bad, "34b")


@pytest.mark.parametrize("fault", ["html", "html as binary", "xml as binary", "403", "401"])
def test_an_expired_url(shell: Shell, server: Server, fault: str) -> None:
    publish(server, "7b")
    server.faults["CodeLlama-7b/params.json"] = [fault] * 9
    done = shell.get(server)
    assert done.returncode == 1
    assert "CodeLlama-7b/params.json: the URL has expired" in done.stdout
    assert "ask for a new one" in done.stdout
    assert server.paths()[-1] == "CodeLlama-7b/params.json"  # no other file is tried with it
    assert server.paths().count("CodeLlama-7b/params.json") == 1
    assert [path.name for path in shell.folder().iterdir()] == ["checklist.chk"]


@pytest.mark.parametrize("fault", ["html", "403"])
def test_an_expired_url_leaves_what_was_there_to_resume(shell: Shell, server: Server, fault: str) -> None:
    files = publish(server, "7b")
    path = "CodeLlama-7b/consolidated.00.pth"
    shell.folder().mkdir(parents=True)
    part = shell.folder() / "consolidated.00.pth.part"
    part.write_bytes(files["consolidated.00.pth"][:1234])
    server.faults[path] = [fault]
    done = shell.get(server)
    assert done.returncode == 1
    assert "the URL has expired" in done.stdout
    assert part.read_bytes() == files["consolidated.00.pth"][:1234]
    assert shell.get(server).returncode == 0
    assert server.ranges_of(path) == ["bytes=1234-"] * 2
    assert shell.holds(files)


def test_a_web_page_is_never_joined_to_a_short_part(shell: Shell, server: Server) -> None:
    files = publish(server, "7b")
    shell.folder().mkdir(parents=True)
    (shell.folder() / "consolidated.00.pth.part").write_bytes(files["consolidated.00.pth"][:5])
    server.faults["CodeLlama-7b/consolidated.00.pth"] = ["html"]
    assert shell.get(server).returncode == 1
    assert shell.get(server).returncode == 0
    assert shell.holds(files)


def test_a_missing_file_is_named_and_the_others_come(shell: Shell, server: Server) -> None:
    files = publish(server, "13b")
    del server.files["CodeLlama-13b/consolidated.00.pth"], files["consolidated.00.pth"]
    done = shell.get(server, "13b")
    assert done.returncode == 1
    assert "HTTP status 404" in done.stdout
    assert done.stdout.rstrip().endswith(": CodeLlama-13b/consolidated.00.pth")
    assert server.paths().count("CodeLlama-13b/consolidated.00.pth") == 1
    assert shell.holds(files, "13b")


def test_an_empty_file_is_no_file(shell: Shell, server: Server) -> None:
    files = publish(server, "7b")
    server.files["LICENSE"] = b""
    done = shell.get(server)
    assert done.returncode == 1
    assert "FAILED LICENSE" in done.stdout
    assert sorted(path.name for path in shell.target.iterdir()) == ["CodeLlama-7b", "USE_POLICY.md"]
    assert shell.holds(files)


def test_without_a_checklist_nothing_of_the_model_is_taken(either: Shell, server: Server) -> None:
    publish(server, "7b")
    other = publish(server, "7b-Python")
    server.files["CodeLlama-7b/checklist.chk"] = b"no checksums at all\n"
    done = either.get(server, "7b,7b-Python")
    assert done.returncode == 1
    assert "FAILED CodeLlama-7b/checklist.chk: it lists no checksums" in done.stdout
    assert not list(either.folder().glob("consolidated*"))
    del server.files["CodeLlama-7b/checklist.chk"]
    done = either.get(server)
    assert done.returncode == 1
    assert done.stdout.count("FAILED CodeLlama-7b/checklist.chk") == 1
    assert not list(either.folder().glob("consolidated*"))
    assert either.holds(other, "7b-Python")


def test_waits_between_some_tries_then_gives_up(either: Shell, server: Server) -> None:
    publish(server, "7b")
    server.faults["LICENSE"] = ["500"] * 99
    waits = either.home / "waits"
    either.fake("sleep", f"import sys; open({str(waits)!r}, 'a').write(sys.argv[1] + ' ')")
    done = either.run("--url", server.url, "--models", "7b", RETRY_WAIT="7")
    assert done.returncode == 1
    assert "FAILED LICENSE" in done.stdout
    assert server.paths().count("LICENSE") == 5
    assert waits.read_text() == "7 " * 4


def test_no_server_at_all_says_why(shell: Shell, server: Server) -> None:
    url = server.url
    server.server_close()
    done = shell.run("--url", url, "--models", "7b", "--target", str(shell.target))
    assert done.returncode == 1
    assert re.search("connection refused|failed to connect|couldn't connect", done.stdout, re.I), done.stdout


@pytest.mark.parametrize("models", ["8b", "7b,13b-python", "7B", "b,", "*", "7b,,x"])
def test_an_unknown_model(offline: Shell, server: Server, models: str) -> None:
    (offline.home / "7b").touch()  # what `*` must not become
    done = offline.run("--url", server.url, "--models", models)
    assert done.returncode == 1
    named = next(name for name in models.split(",") if name and name not in MODELS)
    assert f"unknown model '{named}'" in done.stdout
    assert all(name in done.stdout.partition("known: ")[2] for name in MODELS)
    assert "a request was made" not in done.stdout


@pytest.mark.parametrize("url", ["https://127.0.0.1/7b?Signature=x", "127.0.0.1/*", "file:///*", "*"])
def test_a_url_that_cannot_be_right(offline: Shell, url: str) -> None:
    done = offline.run(stdin=f"{url}\n7b\n")
    assert done.returncode == 1
    assert "contain a '*'" in done.stdout
    assert "list of models" not in done.stdout
    assert "a request was made" not in done.stdout


@pytest.mark.parametrize("models", [",", " , "])
def test_a_list_of_no_models_is_not_all_of_them(offline: Shell, server: Server, models: str) -> None:
    done = offline.run("--url", server.url, "--models", models)
    assert done.returncode == 1
    assert "no models were given" in done.stdout


def test_the_end_of_the_input_is_not_an_answer(offline: Shell, server: Server) -> None:
    done = offline.run()
    assert done.returncode == 1
    assert "no URL was given" in done.stdout
    done = offline.run(stdin=f"{server.url}\n")
    assert done.returncode == 1
    assert "no models were given" in done.stdout
    assert "a request was made" not in done.stdout


def test_help_and_unknown_options(offline: Shell) -> None:
    done = offline.run("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ["--url", "--models", "--target", *MODELS])
    for args in (["--frobnicate", "1"], ["--frobnicate"], ["--url"]):
        done = offline.run(*args)
        assert done.returncode == 1
        assert args[0] in done.stdout


def test_missing_tools_are_named(tmp_path: Path, server: Server) -> None:
    shell = Shell(tmp_path)
    done = shell.get(server)
    assert done.returncode == 1
    assert "neither GNU wget nor curl is installed" in done.stdout
    shell.fake("wget", "print('GNU Wget2 2.1.0')")  # it logs differently: as good as none
    done = shell.get(server)
    assert done.returncode == 1
    assert "neither GNU wget nor curl is installed" in done.stdout
    shell.fake("curl", "")
    for name in ("md5sum", "md5"):
        (shell.bin / name).unlink(missing_ok=True)
    done = shell.get(server)
    assert done.returncode == 1
    assert "neither md5sum nor md5 is installed" in done.stdout


def test_is_executable() -> None:
    assert os.access(SCRIPT, os.X_OK)
