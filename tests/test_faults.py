"""Every step made to fail in turn: whatever happens, nothing is paid for twice and the next run ends well."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time as real_time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import FakeTime, Killed, assert_paid_once, jsonl, kill, live_in, request, success, write_requests
from conftest import KEY, ROOT
from local_batch_api import Exchange, Fault, LocalBatchAPI

import batch_tool

OPENAPI = ROOT.parent / "shared" / "data" / "openapi.batch.json"
MANAGER = ROOT / "batch_tool.py"
CONVERTER = ROOT / "gen_batch_jsonl.py"
IDS = ["a1", "a2", "a3"]
CREATE = ("create", "--in", "requests.jsonl", "--max-requests", "2")
RUN = ("run", "--in", "requests.jsonl", "--out", "results.jsonl", "--max-requests", "2")
LEFT_BEHIND = {"logs", "requests.jsonl", "results.jsonl"}


def manage(*args: str, time: FakeTime | None = None) -> int:
    """The command in process, on a clock that only its own sleeping moves on."""
    time = time or FakeTime()
    return batch_tool.main(args, sleep=time.sleep, clock=time.clock)


def assert_results(path: str, custom_ids: list[str]) -> None:
    """One successful line per request, in request order."""
    lines = [json.loads(line) for line in Path(path).read_bytes().splitlines()]
    assert [line["custom_id"] for line in lines] == custom_ids
    assert {line["response"]["status_code"] for line in lines} <= {200}


def assert_run_once(api: LocalBatchAPI, custom_ids: list[str], failed: Counter[str] | None = None) -> None:
    """Each request was run once, and once more for each time that it was made to fail."""
    for batch in api.batches.values():
        api.look(batch)
    assert api.executions == Counter(custom_ids) + (failed or Counter())
    assert max(api.paid.values(), default=0) <= 1


def assert_clear_end(exit_code: int, err: str) -> None:
    """It ended well, or with one clear line, and without secrets."""
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if ": error: " in line]
    assert (exit_code, len(errors)) in ((0, 0), (1, 1)), err
    assert err.splitlines()[-1:] == errors or not errors
    assert KEY not in err
    assert all(KEY not in log.read_text() for log in Path("logs").iterdir())
    assert set(os.listdir()) <= LEFT_BEHIND


# ---- one HTTP exchange goes wrong ----

ANSWERS: dict[str, dict[str, Any]] = {
    "reset": {"action": "reset"},
    "garbage": {"status": 200, "body": b"\xff\x00{garbage"},
}
LOST_ANSWERS: dict[str, dict[str, Any]] = {
    "504 after": {"status": 504, "when": "after"},
    "garbage after": {"status": 200, "body": b"", "when": "after"},
}
CUTS: dict[str, dict[str, Any]] = {"cut": {"action": "cut"}, "shorten": {"action": "shorten"}}


@contextlib.contextmanager
def fresh_api(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalBatchAPI]:
    with LocalBatchAPI() as api:
        api.outcomes = {"a2": ["500", "200"]}
        monkeypatch.setenv("OPENAI_BASE_URL", api.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        for path in (Path("results.jsonl"), *Path().glob("logs/*")):
            path.unlink(missing_ok=True)
        yield api


def assert_it_recovers(api: LocalBatchAPI, command: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """The command ends well or with a clear error, in which case it ends well when run again."""
    exit_code = manage(*command)
    assert_clear_end(exit_code, capfd.readouterr().err)
    api.faults.clear()
    if exit_code:
        assert manage(*command) == 0
    if command is RUN:
        assert_results("results.jsonl", IDS)
        assert_run_once(api, IDS, Counter(["a2"]))
    else:
        assert_run_once(api, IDS)


def exchanges_of(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> dict[int, Exchange]:
    """What a clean pass asks, by its number: all POSTs, and of GETs of the same kind the first and the last."""
    with fresh_api(monkeypatch) as api:
        assert manage(*command) == 0
        exchanges = dict(enumerate(api.exchanges))
    kinds = [(each.method, re.sub("(batch_|file-)[0-9a-f]+", "ID", each.path)) for each in exchanges.values()]
    return {
        nth: exchange
        for nth, exchange in exchanges.items()
        if exchange.method == "POST" or kinds[nth] not in kinds[:nth] or kinds[nth] not in kinds[nth + 1 :]
    }


@pytest.mark.parametrize(
    ("command", "kind"),
    [*itertools.product([RUN], [*ANSWERS, "504 after", *CUTS]), *itertools.product([CREATE], LOST_ANSWERS)],
)
def test_each_request_of_a_command_fails_in_turn(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    kind: str,
) -> None:
    write_requests(*IDS)
    for nth, exchange in exchanges_of(command, monkeypatch).items():
        if exchange.method == "POST":
            kinds = [*ANSWERS, *LOST_ANSWERS]
        else:
            kinds = ["reset", *CUTS] if exchange.path.endswith("/content") else ["reset"]
        if kind not in kinds or (command is CREATE and exchange.method == "GET"):  # run asks the same, and more
            continue
        with fresh_api(monkeypatch) as api:
            api.faults = [Fault(skip=nth, **{**ANSWERS, **LOST_ANSWERS, **CUTS}[kind])]
            assert_it_recovers(api, command, capfd)


def test_the_server_goes_away_for_a_while_at_each_request_in_turn(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_requests(*IDS)
    for nth, exchange in exchanges_of(RUN, monkeypatch).items():
        for kind in ["504 after"] if exchange.method == "POST" else ["reset"]:
            with fresh_api(monkeypatch) as api:
                api.faults = [Fault(skip=nth, times=12, **{**ANSWERS, **LOST_ANSWERS}[kind])]
                assert_it_recovers(api, RUN, capfd)


# ---- killed and stopped ----


class Kill(Fault):
    """Ends the command while it waits for the answer."""

    def applies_to(self, method: str, path: str) -> bool:
        is_hit = super().applies_to(method, path)
        if is_hit:
            os.kill(os.getpid(), signal.SIGUSR1)
        return is_hit


@pytest.mark.parametrize("is_carried_out", [True, False])
@pytest.mark.parametrize("command", [CREATE, RUN], ids=["create", "run"])
def test_killed_at_each_request_in_turn_the_next_run_at_once_pays_nothing_again(
    work: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], is_carried_out: bool
) -> None:
    write_requests(*IDS)
    before = signal.signal(signal.SIGUSR1, lambda *_: kill())
    for nth, exchange in exchanges_of(command, monkeypatch).items():
        if exchange.method == "GET" and not (is_carried_out and command is RUN):
            continue
        with fresh_api(monkeypatch) as api:
            api.list_delay, api.step = 10, 2
            time = live_in(api, FakeTime())
            fault: dict[str, Any] = {"action": "delay", "when": "after"} if is_carried_out else {"action": "reset"}
            api.faults = [Kill(skip=nth, seconds=0.05, **fault)]
            with pytest.raises(Killed):
                manage(*command, time=time)
            assert manage("run", *RUN[1:5], "--max-requests", "1", time=time) == 0
            assert_results("results.jsonl", IDS)
            assert_run_once(api, IDS, Counter(["a2"]))
    signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def slow(api: LocalBatchAPI, step: float) -> Iterator[None]:
    """The stand-in with steps that take a little while, and none any more afterwards."""
    api.outcomes = {"a2": ["500", "200"], "a7": ["expired", "200"]}
    api.step = step
    yield
    api.step = 0


def start(command: tuple[str, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(MANAGER), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_log(process: subprocess.Popen[str]) -> None:
    """Until the command has begun to log, which is after it has begun to catch signals."""
    while process.poll() is None and not any(path.stat().st_size for path in Path().glob("logs/*")):
        real_time.sleep(0.005)


def test_killed_again_and_again_it_runs_nothing_twice(api: LocalBatchAPI) -> None:
    ids = [f"a{number}" for number in range(1, 9)]
    write_requests(*ids)
    chance = random.Random(2)
    run = ("run", "--in", "requests.jsonl", "--out", "results.jsonl", "--max-requests", "3", "--interval", "0.05")
    with slow(api, 0.1):
        for _ in range(3):
            for log in Path().glob("logs/*"):
                log.unlink()
            process = start(chance.choice([run, ("create", *run[1:3], *run[5:7])]))
            wait_for_log(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=chance.uniform(0.1, 0.8))
            process.kill()
            process.communicate()
    assert manage(*run) == 0
    assert_run_once(api, ids, Counter(["a2"]))
    assert_results("results.jsonl", ids)


@pytest.mark.parametrize(("command", "seconds"), [(CREATE, 0), (RUN, 60)], ids=["create", "run"])
def test_killed_around_the_answer_to_its_post_the_next_run_at_once_pays_nothing_again(
    api: LocalBatchAPI, command: tuple[str, ...], seconds: float
) -> None:
    api.list_delay = 0 if seconds else 3600  # its answer is late, or its batch is not listed for long
    api.faults = [Fault("POST", "/batches$", when="after", action="delay", seconds=seconds)] if seconds else []
    write_requests("a1")
    process = start(command)
    end = real_time.monotonic() + 20
    while not api.batches or not (seconds or b'"batch"' in note()):
        assert real_time.monotonic() < end
        real_time.sleep(0.002)
    process.kill()
    process.communicate()
    assert manage(*RUN) == 0
    assert_paid_once(api, Path("requests.jsonl").read_bytes())
    assert len(api.batches) == 1


def note() -> bytes:
    return b"".join(path.read_bytes() for path in Path(os.environ["XDG_STATE_HOME"], "batch_tool").glob("*"))


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_at_any_moment_it_leaves_nothing_behind(
    api: LocalBatchAPI, number: signal.Signals, exit_code: int
) -> None:
    write_requests(*IDS)
    Path("results.jsonl").write_bytes(old := jsonl(success("z9")))
    with slow(api, 0.2):
        process = start((*RUN, "--interval", "0.05"))
        wait_for_log(process)
        real_time.sleep(random.Random(number).uniform(0, 0.9))
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, Path("results.jsonl").read_bytes()) == (exit_code, old), err
    assert err.endswith("batch_tool.py: stopped\n")
    assert "Traceback" not in err
    assert set(os.listdir()) == LEFT_BEHIND
    assert manage(*RUN) == 0
    assert_run_once(api, IDS, Counter(["a2"]))
    assert_results("results.jsonl", [*IDS, "z9"])


# ---- nowhere to write ----


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does; the write then fails


def big_files() -> list[str]:
    """A CSV, a request file and its results, each larger than a file may be; their requests."""
    ids = [f"a{number}" for number in range(400)]
    rows = "".join(f"{custom_id},Artist {custom_id},{'x' * 100}\n" for custom_id in ids)
    Path("artists.csv").write_text(f"artist_id,artist_name,artist_data\n{rows}")
    write_requests(*ids)
    Path("bios.jsonl").write_bytes(b"".join(map(result_line, ids)))
    return ids


def result_line(custom_id: str) -> bytes:
    return jsonl(success(custom_id, "A bio. " * 20))


WRITERS = {
    "convert": (CONVERTER, "--in", "artists.csv", "--prompt-id", "p", "--model", "m"),
    "export": (MANAGER, "export", "--in", "requests.jsonl", "--results", "bios.jsonl"),
    "run": (MANAGER, "run", "--in", "requests.jsonl", "--log-file", "/dev/null", "--interval", "0.01"),
    "retrieve": (MANAGER, "retrieve", "--batch-id", "batch_1", "--log-file", "/dev/null"),
}


@pytest.mark.parametrize(
    ("command", "out"),
    [("convert", "old"), ("convert", "-"), ("export", "/dev/full"), ("export", "directory"), ("run", "old"),
     ("run", "-"), ("retrieve", "old")],
)
def test_an_output_that_cannot_be_written_is_one_line_and_no_half_file(
    api: LocalBatchAPI, command: str, out: str
) -> None:
    big_files()
    batch = api.new_batch("completed", output=Path("bios.jsonl").read_bytes())
    api.batches["batch_1"] = batch
    batch.id = "batch_1"
    Path("old").write_bytes(old := jsonl(success("z9")))
    Path("directory").mkdir()
    before = {*os.listdir()}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *map(str, WRITERS[command]), "--out", out],
            stdout=full if out == "-" else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            preexec_fn=None if out in ("-", "/dev/full") else limit_file_size,
        )
    errors = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert (done.returncode, len(errors)) == (1, 1), done.stderr
    assert re.search("No space left|File too large|irectory", errors[0])
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert ({*os.listdir()}, Path("old").read_bytes(), os.listdir("directory")) == (before, old, [])


def test_input_that_finds_no_room_to_be_copied_is_one_line(work: Path) -> None:
    big_files()
    with open("requests.jsonl", "rb") as source:
        done = subprocess.run([sys.executable, str(MANAGER), "validate", "--in", "-"], stdin=source,
                              capture_output=True, text=True, preexec_fn=limit_file_size)
    error = "cannot write a temporary file: File too large; set TMPDIR to a directory with free space"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"batch_tool.py: error: {error}\n")


def test_a_log_on_a_full_disk_ends_the_command_before_it_costs_anything(
    api: LocalBatchAPI, capfd: pytest.CaptureFixture[str]
) -> None:
    write_requests(*IDS)
    for command in (CREATE, RUN):
        assert manage(*command, "--log-file", "/dev/full") == 1
        assert capfd.readouterr().err == (
            "batch_tool.py: error: cannot write the log /dev/full: No space left on device; choose another with "
            "--log-file\n"
        )
    assert api.exchanges == []


# ---- the API's own document ----


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    if not OPENAPI.exists():
        pytest.skip("the API's document is not here")
    return dict(json.loads(OPENAPI.read_text()))


TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
    "null": type(None),
}


def violations(value: Any, schema: dict[str, Any], document: dict[str, Any], where: str = "") -> Iterator[str]:
    """What is wrong with a value by a schema of the document: the subset of JSON Schema that it uses."""
    if reference := schema.get("$ref"):
        schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    for name in ("anyOf", "oneOf"):
        if name in schema and all(any(violations(value, each, document)) for each in schema[name]):
            yield f"{where}: {value!r} is none of {name}"
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        yield f"{where}: {value!r} is no {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is not in {schema['enum']}"
    if isinstance(value, (int, float)) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{where}: {value!r} is out of range"
    if isinstance(value, dict):
        yield from object_violations(value, schema, document, where)
    for number, item in enumerate(value if isinstance(value, list) and "items" in schema else []):
        yield from violations(item, schema["items"], document, f"{where}[{number}]")


def object_violations(
    value: dict[str, Any], schema: dict[str, Any], document: dict[str, Any], where: str
) -> Iterator[str]:
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for name in schema.get("required", []):
        if name not in value:
            yield f"{where}.{name} is missing"
    for name, item in value.items():
        if name in known:
            optional = item is None and name not in schema.get("required", [])
            yield from () if optional else violations(item, known[name], document, f"{where}.{name}")
        elif isinstance(others, dict):
            yield from violations(item, others, document, f"{where}.{name}")
        elif known:
            yield f"{where}.{name} is not in the document"


def operation(exchange: Exchange, document: dict[str, Any]) -> dict[str, Any]:
    """What the document says of the method and path of an exchange."""
    path = exchange.path.removeprefix("/v1")
    for pattern, methods in document["paths"].items():
        if re.fullmatch(re.sub(r"\{[^}]+\}", "[^/]+", pattern), path):
            return dict(methods[exchange.method.lower()])
    raise AssertionError(f"{exchange.method} {exchange.path} is not in the document")


def exchange_violations(exchange: Exchange, document: dict[str, Any]) -> Iterator[str]:
    where = f"{exchange.method} {exchange.path}"
    known = operation(exchange, document)
    parameters = {each["name"] for each in known.get("parameters", []) if each["in"] == "query"}
    yield from (f"{where}: {name} is no parameter" for name in exchange.query.keys() - parameters)
    for kind, media in known.get("requestBody", {}).get("content", {}).items():
        content = dict(exchange.request_json)
        if kind == "multipart/form-data":
            content = {"purpose": content["purpose"], "file": content["filename"]}
        yield from violations(content, media["schema"], document, f"{where} request")
    answer = known["responses"]["200"]["content"]["application/json"]["schema"]
    if exchange.status == 200 and answer != {"type": "string"}:
        yield from violations(exchange.answer_json, answer, document, f"{where} answer")


def test_requests_and_answers_are_what_the_document_says(
    work: Path, monkeypatch: pytest.MonkeyPatch, document: dict[str, Any]
) -> None:
    write_requests(*IDS)
    with fresh_api(monkeypatch) as api:
        assert manage(*RUN) == 0
        for status in ("validating", "failed", "expired", "cancelled"):
            batch_id = api.new_batch(status, output=result_line("a1"), errors=b"{}\n").id
            manage("cancel", "--batch-id", batch_id)
            manage("status", "--batch-id", batch_id)
        api.faults = [Fault("POST", "/batches$", status=400)]
        write_requests("b1")
        assert manage(*CREATE) == 1  # which deletes the uploaded file
        Path("requests.jsonl").write_bytes(jsonl(request("b1", body={"input": "Bio"})))
        assert manage(*RUN) == 1
        assert manage("list") == 0
        assert {exchange.method for exchange in api.exchanges} == {"GET", "POST", "DELETE"}
        known = [exchange for exchange in api.exchanges if "/models/" not in exchange.path]  # of another document
        assert [found for exchange in known for found in exchange_violations(exchange, document)] == []


# ---- any bytes at all ----

FUZZ_SEEDS = range(40)
VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 1e308, float("nan"), "", "a1", "\ud800", "\u2028", "x" * 300, [], {}, [[]], [None],
    200, 500, "completed", "failed", {"a": {}}, 10**30, "200",
]


def mutated(chance: random.Random, value: Any) -> Any:
    """The JSON value with something in it replaced, left out or moved."""
    if chance.random() < 0.15 or not isinstance(value, (dict, list)) or not value:
        return chance.choice(VALUES)
    value = value.copy()
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if chance.random() < 0.2:
        del value[key]
    else:
        value[key] = mutated(chance, value[key])
    return value


def fuzzed_lines(chance: random.Random, lines: list[bytes]) -> bytes:
    """The lines, some of them mutated as JSON, some as bytes."""
    out = []
    for line in lines:
        kind = chance.random()
        if kind < 0.5:
            line = json.dumps(mutated(chance, json.loads(line))).encode() + b"\n"
        elif kind < 0.7:
            start = chance.randrange(len(line))
            line = line[:start] + chance.randbytes(chance.randrange(4)) + line[start + chance.randrange(4) :]
        elif kind < 0.75:
            line = chance.choice([b"\n", b"", b"\r\n", b"[" * 100_000 + b"\n", b"\xef\xbb\xbf" + line, line * 2])
        out.append(line)
    return b"".join(out)


RESULTS = [
    result_line("a1"),
    b'{"id": "x", "custom_id": "a2", "response": {"status_code": 200, "body": {"status": "completed", "choices": '
    b'[{"message": {"content": "A bio"}, "finish_reason": "length"}], "usage": {"prompt_tokens": 5}}}, '
    b'"error": null}\n',
    b'{"id": "x", "custom_id": "a3", "response": {"status_code": 200, "body": {"status": "incomplete", '
    b'"incomplete_details": {"reason": "max_output_tokens"}, "usage": {"input_tokens": 5}}}, "error": null}\n',
    b'{"id": "x", "custom_id": "a2", "response": {"status_code": 429, "body": {"error": {"code": "c", '
    b'"message": "m"}}}, "error": null}\n',
    b'{"id": "x", "custom_id": "a3", "response": null, "error": {"code": "batch_expired", "message": "m"}}\n',
]


def fuzz(check: Callable[[random.Random], None]) -> None:
    for seed in FUZZ_SEEDS:
        check(random.Random(seed))


def test_any_results_file_accounts_for_every_request(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_requests(*IDS)

    def check(chance: random.Random) -> None:
        Path("results.jsonl").write_bytes(fuzzed_lines(chance, chance.choices(RESULTS, k=6)))
        Path("again.jsonl").unlink(missing_ok=True)
        files = ("--in", "requests.jsonl", "--results", "results.jsonl")
        assert batch_tool.main(["retry", *files, "--out", "again.jsonl"]) == 0
        out, err = capfd.readouterr()
        counts = [int(number) for number in re.findall(r"(\d+) (?:succeeded|rejected|retryable|missing|outdated)", err)]
        assert sum(counts) == len(IDS), err
        again = Path("again.jsonl").read_bytes().splitlines() if Path("again.jsonl").exists() else []
        assert out == f"Requests to retry: {len(again)}\n"
        assert batch_tool.main(["export", *files, "--out", "bios.csv"]) == 0
        text = Path("bios.csv").read_bytes().decode()
        rows = list(csv.reader(io.StringIO(text, newline="")))
        assert [row[0] for row in rows] == ["artist_id", *IDS]
        assert {len(row) for row in rows} == {6}
        assert "Traceback" not in capfd.readouterr().err

    fuzz(check)


def test_any_request_file_is_judged_as_the_api_would(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def check(chance: random.Random) -> None:
        content = fuzzed_lines(chance, [jsonl(request(custom_id)) for custom_id in IDS])
        Path("requests.jsonl").write_bytes(content)
        exit_code = batch_tool.main(["validate", "--in", "requests.jsonl"])
        out, err = capfd.readouterr()
        assert exit_code in (0, 1)
        requests = content.count(b"\n") + (not content.endswith(b"\n") and bool(content))
        if exit_code == 0:
            noun = "request" if requests == 1 else "requests"
            assert out == f"OK: {requests} {noun}, {len(content)} bytes, 1 batch\n"
            assert all(isinstance(json.loads(line), dict) for line in content.split(b"\n") if line)
        else:
            assert (out, err.count(": error: ")) == ("", 1)

    fuzz(check)
