"""What the tests build: a clock, request files, results lines, and what they ask of the mock server."""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from faulty_api import Exchange, FaultyAPI, LocalBatch

import batch_tool
import gen_batch_jsonl

Tool = Callable[..., int]
Capture = pytest.CaptureFixture[str]
Environment = pytest.MonkeyPatch
Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-local-0123456789abcdefghij"
README = (ROOT / "README.md").read_text()
MODEL = "gpt-6-luna"


class Killed(BaseException):
    """Ends a command at once, as SIGKILL does: nothing of the program catches it."""


def kill() -> None:
    raise Killed


def nothing() -> None:
    pass


class FakeTime:
    """A clock that only sleeping moves on. Each event happens during one sleep, or at its moment."""

    def __init__(self, *events: Callable[[], object], at: Mapping[float, Callable[[], object]] | None = None) -> None:
        self.now = 0.0
        self.naps: list[float] = []
        self.events = list(events)
        self.at = dict(at or {})

    def sleep(self, seconds: float) -> None:
        assert len(self.naps) < 2000, "it waits for ever"
        self.naps.append(seconds)
        end = self.now + seconds
        while due := [moment for moment in self.at if moment <= end]:
            self.now = max(self.now, min(due))
            self.at.pop(min(due))()
        self.now = max(self.now, end)
        if self.events:
            self.events.pop(0)()

    def clock(self) -> float:
        return self.now


def live_in(api: FaultyAPI, time: FakeTime) -> FakeTime:
    """Let the server's time pass with this clock."""
    start = api.clock()
    api.clock = lambda: start + time.now
    return time


def subparsers() -> argparse._SubParsersAction[argparse.ArgumentParser]:
    parser = batch_tool.build_parser()
    (action,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return action


COMMANDS = dict(subparsers().choices)  # the parser of every command, in the order of the help
SENTENCES = {str(each.dest): each.help for each in subparsers()._choices_actions}  # what the help says of each


def flags_of(command: str) -> set[str]:
    return {flag for action in COMMANDS[command]._actions for flag in action.option_strings if flag.startswith("--")}


ONLINE = [name for name in COMMANDS if "--log-file" in flags_of(name)]
OFFLINE = [name for name in COMMANDS if name not in ONLINE]
WITH_JSON = [name for name in COMMANDS if "--json" in flags_of(name)]


def request(custom_id: Any = "a1", **changes: Any) -> dict[str, Any]:
    """A request as the converter writes it. `changes` replace its fields, or add to them."""
    body = {"model": MODEL, "input": f"Bio of {custom_id}", "metadata": {"artist_name": f"Artist {custom_id}"}}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/responses", "body": body} | changes


def jsonl(*lines: Any) -> bytes:
    """Each line as it is if it is bytes, else as JSON."""
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


def write_requests(*custom_ids: str, path: str = "requests.jsonl") -> bytes:
    content = jsonl(*map(request, custom_ids))
    Path(path).write_bytes(content)
    return content


def sha256_of(line: bytes) -> str:
    """The sha256 of a request's line, without its line end."""
    return hashlib.sha256(line.removesuffix(b"\n")).hexdigest()


def response(body: Any, status: Any = 200) -> dict[str, Any]:
    return {"status_code": status, "request_id": "req_1", "body": body}


def result(custom_id: str = "a1", **fields: Any) -> dict[str, Any]:
    return {"id": "batch_req_1", "custom_id": custom_id, "response": None, "error": None} | fields


def message(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "message", "content": list(parts)}


def text(words: str) -> dict[str, Any]:
    return {"type": "output_text", "text": words}


def success(custom_id: str = "a1", bio: str = "A bio.", **fields: Any) -> dict[str, Any]:
    body = {"status": "completed", "output": [message(text(bio))], "usage": {"input_tokens": 12, "output_tokens": 4}}
    return result(custom_id, response=response(body), **fields)


def refused(custom_id: str = "a1", status: int = 500, code: str = "server_error") -> dict[str, Any]:
    return result(custom_id, response=response({"error": {"code": code, "message": "Sorry."}}, status))


def expired(custom_id: str = "a1") -> dict[str, Any]:
    return result(custom_id, error={"code": "batch_expired", "message": "Not run in time."})


def posts(api: FaultyAPI, path: str = "/v1/batches") -> int:
    return sum((exchange.method, exchange.path) == ("POST", path) for exchange in api.exchanges)


def assert_paid_once(api: FaultyAPI, *contents: bytes) -> None:
    """The server has charged once for each request of these files, and for none twice."""
    for batch in api.batches.values():
        api.look(batch)
    assert not [sha256 for sha256, times in api.paid.items() if times > 1], "paid twice"
    lines = {sha256_of(line) for content in contents for line in content.splitlines(keepends=True)}
    assert {sha256 for sha256 in lines if not api.paid[sha256]} == set(), "not carried out"


def custom_ids(lines: bytes) -> list[str]:
    return [json.loads(line)["custom_id"] for line in lines.splitlines()]


def sent(api: FaultyAPI) -> list[list[str]]:
    """The custom_ids of every batch, in the order of their creation."""
    return [custom_ids(batch.input_file.path.read_bytes()) for batch in api.batches.values()]


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process can grow further than this, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_script(script: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script of the project in a process of its own; the options are those of subprocess.run."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, **{"capture_output": True, "encoding": "utf-8", "timeout": 60, **options})


def console_blocks() -> list[tuple[str, str]]:
    """The commands of the README's console blocks in order, each with the output shown under it."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    parts = re.split(r"^\$ (.*)\n", "".join(blocks), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


# ---- what most tests of batch_tool.py need ----


def in_short(value: object) -> str:
    """The name of a parametrized case."""
    return re.sub(r"[^a-zA-Z0-9]+", " ", str(value))[:40].strip()


def requests_file(*lines: Any, path: str = "requests.jsonl") -> Path:
    """A request file in the work folder; of two requests where none are given."""
    file = Path(path)
    file.write_bytes(jsonl(*(lines or (request("a1"), request("a2")))))
    return file


def only_batch(api: FaultyAPI) -> LocalBatch:
    (batch,) = api.batches.values()
    return batch


def ids(batch: LocalBatch) -> str:
    """What `create` prints for a batch."""
    return f"File ID: {batch.input_file_id}\nBatch ID: {batch.id}\n"


def asked(api: FaultyAPI, method: str, path: str = "") -> int:
    """How many such requests arrived."""
    return sum(each.method == method and re.search(path, each.path) is not None for each in api.exchanges)


def error(reason: str) -> str:
    return f"batch_tool.py: error: {reason}\n"


def warning(reason: str) -> str:
    return f"batch_tool.py: warning: {reason}\n"


def popen(*args: object, **options: Any) -> subprocess.Popen[str]:
    """Start the program in a process of its own."""
    command = [sys.executable, str(ROOT / "batch_tool.py"), *map(str, args)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **streams | options, text=True)


def log_text() -> str:
    return "".join(path.read_text() for path in Path("logs").glob("*.log"))


def leftovers() -> list[Path]:
    """Temporary files in the work folder."""
    return [path for path in Path().iterdir() if path.name.endswith(".tmp")]


DUPLICATE = 'custom_id "a1" was already used on line 1'


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def times_paid(api: FaultyAPI) -> list[int]:
    """How often each request was paid for, once every batch has ended."""
    for batch in api.batches.values():
        api.look(batch)
    return sorted(api.paid.values())


def earlier_batch(api: FaultyAPI, path: Path, status: str = "in_progress", **fields: Any) -> LocalBatch:
    """A batch that an earlier create made of the file, on another machine."""
    metadata = {"input_sha256": sha256(path.read_bytes())}
    input_file = api.new_file(path.read_bytes(), "batch", path.name)
    return api.new_batch(status, **{"input_file": input_file, "metadata": metadata, "id": "batch_1"} | fields)


LATE = pytest.mark.parametrize(
    "late", [{"output_file_id": None}, {"output_file_id": ""}, {"output": b""}], ids=["null", "no id", "empty"]
)


def late_batch(api: FaultyAPI, late: Json) -> LocalBatch:
    """A completed batch of requests.jsonl with two successes, whose output file does not show yet."""
    counts = {"total": 2, "completed": 2, "failed": 0}
    return earlier_batch(api, requests_file(), "completed", request_counts=counts, **late)


def bring_output(api: FaultyAPI, batch: LocalBatch) -> None:
    batch.output_file_id = api.new_file(jsonl(success("a1"), success("a2")), "batch_output", "x").id


def output_missing() -> str:
    return ("batch batch_1 has completed 2 requests, but has no output file after 10 minutes; run the same command "
            "again later")


MORNING = 1_705_314_600  # 2024-01-15T10:30:00 UTC


def done_batch(api: FaultyAPI, status: str = "completed", **fields: Any) -> LocalBatch:
    """A batch with the id `batch_1` that was made in the morning and has ended, by default with all it can have."""
    known = {"id": "batch_1", "created_at": MORNING, "output": jsonl(success("a1")), "errors": jsonl(refused("a2"))}
    return api.new_batch(status, **known | fields)


def chat(finish_reason: str = "stop", **words: Any) -> Json:
    return {"choices": [{"message": {"role": "assistant"} | words, "finish_reason": finish_reason}, {"message": 7}]}


def ok(body: Any, **fields: Any) -> Json:
    return {"response": response(body)} | fields


OTHER = "0" * 64


def rows(tool: Tool, *results: str) -> list[list[str]]:
    """The exported rows, without the header."""
    assert tool("export", "--in", "requests.jsonl", "--results", *results, "--out", "bios.csv") == 0
    with open("bios.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file, strict=True))[1:]


# ---- `run` and `create` ----

OUT = Path("results.jsonl")
REQUESTS = Path("requests.jsonl")


def main(*argv: str, time: FakeTime | None = None) -> int:
    time = time or FakeTime()
    return batch_tool.main(argv, sleep=time.sleep, clock=time.clock)


def run(*options: str, time: FakeTime | None = None, out: str = str(OUT), source: str = str(REQUESTS)) -> int:
    return main("run", "--in", source, "--out", out, "--interval", "10", *options, time=time)


def create(*options: str, time: FakeTime | None = None) -> int:
    return main("create", "--in", str(REQUESTS), *options, time=time)


def with_sha256(line: bytes, sha256: str) -> bytes:
    return line.rstrip()[:-1] + f', "request_sha256": "{sha256}"}}\n'.encode()


def served(api: FaultyAPI) -> dict[str, bytes]:
    """The last line that the server has for each request, by its sha256; a success before all others."""
    found: dict[str, bytes] = {}
    for batch in api.batches.values():
        lines = batch.input_file.path.read_bytes().splitlines()
        sha256s = {json.loads(line)["custom_id"]: sha256_of(line) for line in lines}
        for file_id in (batch.output_file_id, batch.error_file_id):
            for line in api.read_file(file_id).splitlines() if file_id in api.files else ():
                sha256 = sha256s[json.loads(line)["custom_id"]]
                if b'"status": "completed"' not in found.get(sha256, b""):
                    found[sha256] = with_sha256(line, sha256)
    return found


def missing_line(custom_id: str) -> bytes:
    message = "the request is in no output or error file of its batches"
    error = {"code": "missing", "message": message}
    return json.dumps({"id": None, "custom_id": custom_id, "response": None, "error": error}).encode() + b"\n"


def assert_out(api: FaultyAPI, *kept: bytes) -> None:
    """--out has the server's line for each request, and then these lines."""
    lines = served(api)
    expected = [
        lines.get(sha256_of(line)) or missing_line(json.loads(line)["custom_id"])
        for line in REQUESTS.read_bytes().splitlines()
    ]
    assert OUT.read_bytes() == b"".join([*expected, *kept])


def numbered(count: int) -> list[str]:
    return [f"a{number}" for number in range(1, count + 1)]


def batch_of_a_run(
    api: FaultyAPI, status: str, requests: bytes, done: Iterable[str] = (), left: Iterable[str] = (), **more: Any
) -> LocalBatch:
    """A batch of these requests that another run has made."""
    metadata = {"input_sha256": hashlib.sha256(requests).hexdigest(), "input_file": "requests.jsonl", "part": "1/1"}
    input_file = api.new_file(requests, "batch", "requests.jsonl")
    output, errors = jsonl(*map(success, done)) or None, jsonl(*map(expired, left)) or None
    return api.new_batch(
        status, **{"input_file": input_file, "output": output, "errors": errors, "metadata": metadata} | more
    )


def release(api: FaultyAPI) -> Callable[[], None]:
    def end_the_hold() -> None:
        api.hold = None

    return end_the_hold


@contextlib.contextmanager
def another_machine(number: int = 2) -> Iterator[None]:
    """The notes and the folder of another machine."""
    before, folder, requests = os.environ["XDG_STATE_HOME"], os.getcwd(), REQUESTS.read_bytes()
    os.environ["XDG_STATE_HOME"] = f"{before}-{number}"
    Path(f"machine{number}").mkdir(exist_ok=True)
    os.chdir(f"machine{number}")
    REQUESTS.write_bytes(requests)
    try:
        yield
    finally:
        os.chdir(folder)
        os.environ["XDG_STATE_HOME"] = before


def replace(content: bytes) -> None:
    Path("new").write_bytes(content)
    os.replace("new", REQUESTS)


def bios(count: int) -> list[dict[str, Any]]:
    return [request(custom_id) for custom_id in numbered(count)]


def edit(*requests: Any) -> bytes:
    """The request file, replaced as the converter does."""
    content = jsonl(*requests)
    replace(content)
    return content


def stopped_run(*options: str, time: FakeTime) -> None:
    with contextlib.suppress(Killed):
        assert run(*options, time=time) == 130


# ---- a pass of a command, made to fail ----

IDS = ["a1", "a2", "a3"]
CREATE = ("create", "--in", "requests.jsonl", "--max-requests", "2")
RUN = ("run", "--in", "requests.jsonl", "--out", "results.jsonl", "--max-requests", "2")
LEFT_BEHIND = {"logs", "requests.jsonl", "results.jsonl"}


def assert_results(path: str, custom_ids: list[str]) -> None:
    """One successful line per request, in request order."""
    lines = [json.loads(line) for line in Path(path).read_bytes().splitlines()]
    assert [line["custom_id"] for line in lines] == custom_ids
    assert {line["response"]["status_code"] for line in lines} <= {200}


def assert_run_once(api: FaultyAPI, custom_ids: list[str], failed: Counter[str] | None = None) -> None:
    """Each request was run once, and once more for each time that it was made to fail."""
    for batch in api.batches.values():
        api.look(batch)
    assert api.executions == Counter(custom_ids) + (failed or Counter())
    assert max(api.paid.values(), default=0) <= 1


@contextlib.contextmanager
def fresh_api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyAPI]:
    with FaultyAPI() as api:
        api.outcomes = {"a2": ["500", "200"]}
        monkeypatch.setenv("OPENAI_BASE_URL", api.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        for path in (Path("results.jsonl"), *Path().glob("logs/*")):
            path.unlink(missing_ok=True)
        yield api


def exchanges_of(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> dict[int, Exchange]:
    """What a clean pass asks, by its number: of requests of the same kind the first and the last."""
    with fresh_api(monkeypatch) as api:
        assert main(*command) == 0
        exchanges = dict(enumerate(api.exchanges))
    kinds = [(each.method, re.sub("(batch_|file-)[0-9a-f]+", "ID", each.path)) for each in exchanges.values()]
    return {
        nth: exchange
        for nth, exchange in exchanges.items()
        if kinds[nth] not in kinds[:nth] or kinds[nth] not in kinds[nth + 1 :]
    }


def long_result(custom_id: str) -> bytes:
    return jsonl(success(custom_id, "A bio. " * 20))


# ---- the converter ----

HEADER = "artist_id,artist_name,artist_data\n"
STORED = ("--prompt-id", "bio_gen", "--model", "m")
FILES = ("--in", "in.csv", "--out", "out.jsonl")


def write(name: str, content: str | bytes) -> Path:
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def requests(path: str = "out.jsonl") -> list[Any]:
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]


def variables(path: str = "out.jsonl") -> list[tuple[str, str, str]]:
    """The requests' values: artist_id, artist_name, artist_data."""
    return [(request["custom_id"], *request["body"]["prompt"]["variables"].values()) for request in requests(path)]


OLD = '{"custom_id": "z9", "body": {}, "response": null, "error": null}\n'  # may be replaced by requests and by results
OLD_BIOS = "artist_id,bio,error,input_tokens,output_tokens\n"
SHUTDOWN = (
    "gen_batch_jsonl.py: warning: OpenAI shuts stored prompts down on 2026-11-30; put the prompt into a file and use "
    "--prompt-file\n"
)


def printed(capsys: Capture) -> tuple[str, str]:
    """What the converter has printed to stdout and stderr, without the warning that stored prompts end."""
    out, err = capsys.readouterr()
    return out, err.replace(SHUTDOWN, "")


def said(capsys: Capture) -> str:
    return printed(capsys)[1]


def convert(content: str | bytes, *options: str) -> int:
    """main on a CSV of that content, with a stored prompt and a model."""
    write("in.csv", content)
    return gen_batch_jsonl.main([*FILES, *STORED, *options])


MISSING = "a value is missing, or has a line break but no quotes around it"
TEMPLATE_ARGS = ("--prompt-file", "prompt.md", "--model", "m")
