"""batch_tool.py, every command but `run`: the SDK talks HTTP to the stand-in, and sleeping is what makes time pass."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import KEY, ROOT, run
from local_batch_api import Fault, LocalBatch, LocalBatchAPI

import batch_tool

Tool = Callable[..., int]
Capture = pytest.CaptureFixture[str]
COMMANDS = ("validate", "create", "status", "wait", "retrieve", "cancel", "list", "retry", "export", "run")
OFFLINE = ("validate", "retry", "export")
WITH_JSON = ("create", "status", "wait", "cancel", "list")
USAGE = {
    "validate": ["--in", "r"],
    "create": ["--in", "r"],
    "status": ["--batch-id", "b"],
    "wait": ["--batch-id", "b"],
    "retrieve": ["--batch-id", "b"],
    "cancel": ["--batch-id", "b"],
    "list": [],
    "retry": ["--in", "r", "--results", "s", "--out", "o"],
    "export": ["--in", "r", "--results", "s", "--out", "o"],
    "run": ["--in", "r", "--out", "o"],
}
DAY = 24 * 60 * 60
NOT_SECONDS = "not a number of seconds above 0 and at most 100000000: "


class Time:
    """A clock that only sleeping moves on; what is in `then` happens during the naps, one each."""

    def __init__(self) -> None:
        self.now = 0.0
        self.naps: list[float] = []
        self.then: list[Callable[[], object]] = []

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds
        if self.then:
            self.then.pop(0)()


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def tool(work: Path, clock: Time) -> Tool:
    """Run a command line in this process."""
    return lambda *args: batch_tool.main([str(arg) for arg in args], sleep=clock.sleep, clock=lambda: clock.now)


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def in_short(value: object) -> str:
    """The name of a parametrized case."""
    return re.sub(r"[^a-zA-Z0-9]+", " ", str(value))[:40].strip()


def request(custom_id: Any = "a1", **changes: Any) -> dict[str, Any]:
    body = {"model": "gpt-5-mini", "input": "Who?", "metadata": {"artist_name": f"Artist {custom_id}"}}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/responses", "body": body} | changes


def jsonl(*lines: Any) -> bytes:
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


def requests_file(*lines: Any, path: str = "requests.jsonl") -> Path:
    """A request file in the work folder; of two requests where none are given."""
    file = Path(path)
    file.write_bytes(jsonl(*(lines or (request("a1"), request("a2")))))
    return file


def response(body: Any, status: Any = 200) -> dict[str, Any]:
    return {"status_code": status, "request_id": "req_1", "body": body}


def result(custom_id: str = "a1", **fields: Any) -> dict[str, Any]:
    return {"id": "batch_req_1", "custom_id": custom_id, "response": None, "error": None} | fields


def message(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "message", "content": list(parts)}


def text(words: str) -> dict[str, Any]:
    return {"type": "output_text", "text": words}


def success(custom_id: str = "a1", bio: str = "A bio.") -> dict[str, Any]:
    body = {"status": "completed", "output": [message(text(bio))], "usage": {"input_tokens": 12, "output_tokens": 4}}
    return result(custom_id, response=response(body))


def refused(custom_id: str = "a1", status: int = 500, code: str = "server_error") -> dict[str, Any]:
    return result(custom_id, response=response({"error": {"code": code, "message": "Sorry."}}, status))


def only_batch(api: LocalBatchAPI) -> LocalBatch:
    """The one batch there is."""
    (batch,) = api.batches.values()
    return batch


def ids(batch: LocalBatch) -> str:
    return f"File ID: {batch.input_file_id}\nBatch ID: {batch.id}\n"


def sent(api: LocalBatchAPI, method: str, path: str = "") -> int:
    """How many such requests arrived."""
    return sum(each.method == method and re.search(path, each.path) is not None for each in api.exchanges)


def log_text() -> str:
    return "".join(path.read_text() for path in Path("logs").glob("*.log"))


def leftovers() -> list[Path]:
    """Temporary files in the work folder."""
    return [path for path in Path().iterdir() if path.name.endswith(".tmp")]


# -- text ---------------------------------------------------------------------------------------------------------


def test_a_printable_text_is_shown_as_it_is() -> None:
    assert batch_tool.escape_controls("뉴진스 × “x”") == "뉴진스 × “x”"


@pytest.mark.parametrize("char", ["\n", "\r", "\x1b", "\x00", "\x7f", "\x85", "\u2028", "\ud800", "\U000e0001"])
def test_a_control_character_is_escaped_so_that_json_stays_json(char: str) -> None:
    escaped = batch_tool.escape_controls(f'"a{char}b"')
    assert escaped.isprintable()
    assert json.loads(escaped) == f"a{char}b"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("Bearer abcdefghijklmnop", "Bearer [secret]"),
        ("bearer  abcdefghijklmnop!", "bearer  [secret]"),
        ("key sk-abcdefghijklmnop.", "key sk-[secret]"),
        ('{"key": "sk-abcdefghijklmnop"}', '{"key": "sk-[secret]"}'),
        (r'"sk-abcdefghijklmnop\"x"', r'"sk-[secret]\"x"'),
        ("risk-abcdefghijklmnopqrst", "risk-abcdefghijklmnopqrst"),
        ("sk-short", "sk-short"),
    ],
)
def test_what_looks_like_a_key_is_hidden(text: str, shown: str) -> None:
    assert batch_tool.Console(None).scrub(text) == shown


# -- files --------------------------------------------------------------------------------------------------------


def test_an_output_file_replaces_the_old_one_and_keeps_its_mode(work: Path) -> None:
    Path("out").write_text("old")
    Path("out").chmod(0o640)
    with batch_tool.open_output("out") as file:
        file.write(b"new")
        assert Path("out").read_text() == "old"
    assert (Path("out").read_text(), stat.S_IMODE(Path("out").stat().st_mode)) == ("new", 0o640)


def test_a_new_output_file_has_ordinary_permissions_and_its_parent_directories_are_made(work: Path) -> None:
    umask = os.umask(0o027)
    try:
        with batch_tool.open_output("a/b/out") as file:
            file.write(b"new")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(Path("a/b/out").stat().st_mode) == 0o640


def test_an_output_file_is_as_it_was_after_a_failure(work: Path) -> None:
    Path("out").write_text("old")
    with pytest.raises(batch_tool.Failure), batch_tool.open_output("out") as file:
        file.write(b"new")
        raise batch_tool.Failure
    assert (Path("out").read_text(), leftovers()) == ("old", [])


def test_a_symlink_is_followed(work: Path) -> None:
    Path("link").symlink_to("out")
    with batch_tool.open_output("link") as file:
        file.write(b"new")
    assert (Path("link").is_symlink(), Path("out").read_text()) == (True, "new")


def test_a_symlink_to_itself_is_an_error(work: Path) -> None:
    Path("link").symlink_to("link")
    with pytest.raises(batch_tool.Failure, match="link: Too many levels"), batch_tool.open_output("link") as file:
        file.write(b"new")
    assert (Path("link").is_symlink(), leftovers()) == (True, [])


def test_a_pause_of_whoever_writes_to_stdin_is_not_the_end(work: Path) -> None:
    lines = [jsonl(request("a1")), jsonl(request("a2"))]
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    command = [sys.executable, ROOT / "batch_tool.py", "validate", "--in", "-"]
    with subprocess.Popen(command, stdin=reader, stdout=subprocess.PIPE, text=True) as process:
        os.write(writer, lines[0])
        time.sleep(0.4)
        os.write(writer, lines[1])
        os.close(writer)
        assert process.communicate()[0].startswith("OK: 2 requests")


def test_an_error_of_reading_names_the_file(tool: Tool, capsys: Capture) -> None:
    unreadable = "/proc/self/mem"  # which opens, and has nothing at its beginning
    if not os.path.exists(unreadable):
        pytest.skip("no such file here")
    requests_file()
    for arguments in (["validate", "--in", unreadable],
                      ["export", "--in", "requests.jsonl", "--results", "/dev/null", unreadable, "--out", "out"]):
        assert tool(*arguments) == 1
        error = f"batch_tool.py: error: cannot read {unreadable}: Input/output error\n"
        assert capsys.readouterr() == ("", error)


def test_a_part_of_a_file_reads_as_a_file_of_its_own(work: Path) -> None:
    path = requests_file(b"0123456789")
    with path.open("rb") as file:
        part = batch_tool.FilePart(file, batch_tool.Part("1/1", 2, 5, 1, ""))
        assert (part.read(2), part.read(), part.read(), part.tell()) == (b"23", b"456", b"", 5)
        assert (part.seek(-1, os.SEEK_END), part.read(9), part.seek(0), part.read(1)) == (4, b"6", 0, b"2")


# -- validate -----------------------------------------------------------------------------------------------------


def test_a_valid_file_is_counted(tool: Tool, capsys: Capture) -> None:
    path = requests_file(request("a1"))
    assert tool("validate", "--in", path) == 0
    assert capsys.readouterr() == (f"OK: 1 request, {path.stat().st_size} bytes, 1 batch\n", "")


def test_the_number_of_batches_is_told(tool: Tool, capsys: Capture) -> None:
    path = Path("many.jsonl")
    path.write_bytes(b"".join(jsonl(request(str(number))) for number in range(50_001)))
    assert tool("validate", "--in", path) == 0
    assert capsys.readouterr().out == f"OK: 50001 requests, {path.stat().st_size} bytes, 2 batches\n"


DUPLICATE = 'custom_id "a1" was already used on line 1'
INVALID = pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"custom_id": "\xff"}\n', "invalid_json_line: not valid UTF-8 (byte 16 of the line)"),
        (b"{\n", "invalid_json_line: not valid JSON: Expecting property name enclosed in double quotes"),
        (b'{"n": NaN}\n', "invalid_json_line: not valid JSON: NaN is not allowed"),
        (b"\n", "invalid_json_line: blank line"),
        (b"[]\n", "invalid_json_line: not a JSON object"),
        (b"[" * 100_000 + b"\n", "invalid_json_line: "),
        (request("a1"), f"duplicate_custom_id: {DUPLICATE}"),
        (request(None), "missing_required_parameter: custom_id is missing"),
        (request(""), "invalid_request: custom_id is not a string with at least one character"),
        (request(7), "invalid_request: custom_id is not a string with at least one character"),
        (request("b", method="GET"), 'invalid_request: method is "GET", not "POST"'),
        (request("b", url="/v1/embeddings"), 'url_mismatch: url is "/v1/embeddings", not /v1/responses'),
        (request("b", url=None), "url_mismatch: url is null, not /v1/responses"),
        (request("b", body=[]), "invalid_request: body is not a JSON object"),
        (request("b", body={"model": "gpt-5-mini", "stream": True}), "invalid_request: body.stream is true"),
        (request("b", body={"model": "x"}), 'model_mismatch: model is "x", not "gpt-5-mini"; a batch has one model'),
    ],
    ids=in_short,
)


@INVALID
def test_an_invalid_line_is_a_problem_with_its_number(line: Any, problem: str) -> None:
    check = batch_tool.InputCheck()
    (found,) = check.problems([jsonl(request("a1")), jsonl(line)])
    assert str(found).startswith(f"line 2: {problem}")


@INVALID
def test_an_invalid_file_is_exit_1(line: Any, problem: str, tool: Tool, capsys: Capture) -> None:
    requests_file(request("a1"), line)
    assert tool("validate", "--in", "requests.jsonl") == 1
    out, err = capsys.readouterr()
    first, last = err.splitlines()
    assert (out, last) == ("", "batch_tool.py: error: requests.jsonl: 1 error; correct the file; nothing was uploaded")
    assert first.startswith(f"line 2: {problem}")


def test_a_file_that_would_be_refused_is_never_uploaded(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests_file(request("a1"), request("a1"))
    assert tool("create", "--in", "requests.jsonl") == 1
    assert capsys.readouterr().err.startswith(f"line 2: duplicate_custom_id: {DUPLICATE}\n")
    assert api.exchanges == []


def test_an_empty_file_is_an_error(tool: Tool, capsys: Capture) -> None:
    requests_file(b"")
    assert tool("validate", "--in", "requests.jsonl") == 1
    assert capsys.readouterr().err.splitlines()[0] == "line 1: empty_file: the file has no requests"


def test_a_line_longer_than_a_batch_may_be_is_an_error() -> None:
    line = b" " * (batch_tool.MAX_BYTES + 1)
    (first, *_) = batch_tool.InputCheck().problems([line])
    assert str(first) == "line 1: invalid_request: 200000001 bytes; a batch takes 200000000 at most"


def test_the_first_twenty_errors_are_shown_and_then_a_count(tool: Tool, capsys: Capture) -> None:
    requests_file(*[b"x\n"] * 23)
    assert tool("validate", "--in", "requests.jsonl") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[19].startswith("line 20: ")
    assert lines[20:] == [
        "… and 3 more", "batch_tool.py: error: requests.jsonl: 23 errors; correct the file; nothing was uploaded"
    ]


def test_requests_without_a_model_draw_one_warning(tool: Tool, capsys: Capture) -> None:
    requests_file(request("a1", body={}), request("a2", body={}))
    assert tool("validate", "--in", "requests.jsonl") == 0
    warning = "batch_tool.py: warning: 2 requests without body.model, which the Batch API refuses\n"
    assert capsys.readouterr().err == warning


def test_the_endpoint_is_what_the_first_request_names_or_the_option(tool: Tool, capsys: Capture) -> None:
    requests_file(request("a1", url="/v1/chat/completions"))
    assert tool("validate", "--in", "requests.jsonl") == 0
    assert tool("validate", "--in", "requests.jsonl", "--endpoint", "/v1/responses") == 1
    assert "line 1: url_mismatch: url is \"/v1/chat/completions\", not /v1/responses\n" in capsys.readouterr().err


def test_a_first_url_that_cannot_be_an_endpoint_is_named(tool: Tool, capsys: Capture) -> None:
    requests_file(request("a1", url="\ud800"))
    assert tool("validate", "--in", "requests.jsonl") == 1
    assert 'url_mismatch: url is "\\ud800", not a path like /v1/responses' in capsys.readouterr().err


def test_separators_inside_values_do_not_cut_a_line(tool: Tool, capsys: Capture) -> None:
    requests_file(json.dumps(request("a\u2028\x85\u2029"), ensure_ascii=False).encode() + b"\n")
    assert tool("validate", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out.startswith("OK: 1 request, ")


def test_stdin_is_validated(tool: Tool, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with requests_file().open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert tool("validate", "--in", "-") == 0
    assert capsys.readouterr().out.startswith("OK: 2 requests, ")


@pytest.mark.parametrize("path, reason", [("nope", "No such file or directory"), (".", "Is a directory")])
def test_an_input_that_cannot_be_read_is_one_line(path: str, reason: str, tool: Tool, capsys: Capture) -> None:
    assert tool("validate", "--in", path) == 1
    assert capsys.readouterr() == ("", f"batch_tool.py: error: cannot read {path}: {reason}\n")


def test_parts_are_consecutive_lines_within_the_most_requests() -> None:
    lines = [jsonl(request(str(number))) for number in range(5)]
    check = batch_tool.InputCheck(max_requests=2)
    assert list(check.problems(lines)) == []
    first, second, third = check.parts()
    assert (first.label, second.label, third.label) == ("1/3", "2/3", "3/3")
    assert (second.offset, second.size, second.requests) == (first.size, len(lines[2] + lines[3]), 2)
    assert second.sha256 == hashlib.sha256(lines[2] + lines[3]).hexdigest()


def test_parts_stay_within_the_most_bytes() -> None:
    half = batch_tool.MAX_BYTES // 2
    lines = [jsonl(request("a1")).rjust(half), jsonl(request("a2")).rjust(half), jsonl(request("a3"))]
    check = batch_tool.InputCheck()
    assert list(check.problems(lines)) == []
    assert [(part.requests, part.size) for part in check.parts()] == [(2, 200_000_000), (1, len(lines[2]))]


# -- the API ------------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_asked(api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin-0123456789abcdef")  # which the SDK would take in its place
    assert tool("list") == 1
    error = "batch_tool.py: error: OPENAI_API_KEY is not set; export it with the key of your OpenAI project\n"
    assert capsys.readouterr() == ("", error)
    assert api.exchanges == []


def test_a_key_with_blanks_around_it_is_trimmed(api: LocalBatchAPI, tool: Tool, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\r\n")
    assert tool("list") == 0
    assert api.exchanges[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("char", ["\n", "\x1b", "\x7f", "é", "\u200b"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(
    char: str, api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY[:9]}{char}{KEY[9:]}")
    assert tool("list") == 1
    error = "batch_tool.py: error: OPENAI_API_KEY has control or non-ASCII characters in it; set it again\n"
    assert capsys.readouterr() == ("", error)
    assert api.exchanges == []


def test_organization_and_project_are_sent(api: LocalBatchAPI, tool: Tool, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1\n")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    assert tool("list") == 0
    headers = api.exchanges[0].headers
    assert (headers["openai-organization"], headers["openai-project"]) == ("org-1", "proj-1")


def test_an_organization_that_no_header_can_carry_is_one_line(
    api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Any
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "é")
    assert tool("list") == 1
    error = "batch_tool.py: error: OPENAI_ORG_ID has control or non-ASCII characters in it; set it again\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://x", "http://", "http://[::1", "http://h:99999/v1", "http://a b/v1", "http://é/v1",
            "http://.../v1", "http://h/\x1b", "http://" + "a" * 70 + "/v1"]
)
def test_a_malformed_base_url_is_one_line(
    url: str, api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Any
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    assert tool("list") == 1
    reason = "OPENAI_BASE_URL is not a URL like https://api.openai.com/v1; set it again or unset it"
    assert capsys.readouterr() == ("", f"batch_tool.py: error: {reason}\n")


def test_an_unreachable_server_is_named_without_its_password(
    api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Any
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:pass%40word@127.0.0.1:1/v1")
    assert tool("list") == 1
    _, err = capsys.readouterr()
    assert err == "batch_tool.py: error: cannot reach http://127.0.0.1:1/v1/: [Errno 111] Connection refused\n"
    assert "pass%40word" not in log_text()
    assert "pass@word" not in log_text()


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("HTTPS_PROXY", "foo://me:password@x", "Unknown scheme for proxy URL"),
        ("HTTPS_PROXY", "http://[::", "Invalid port"),
        ("SSL_CERT_FILE", "/nonexistent", "No such file or directory"),
    ],
)
def test_an_environment_that_makes_no_client_is_one_line(
    name: str, value: str, words: str, api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Any
) -> None:
    monkeypatch.setenv(name, value)
    assert tool("list") == 1
    _, err = capsys.readouterr()
    assert err.startswith("batch_tool.py: error: no client can be made: ")
    assert words in err
    assert err.count("\n") == 1
    assert "password" not in err


def test_a_refused_key_is_named_and_hidden(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.key = "another"
    assert tool("list") == 1
    error = "batch_tool.py: error: HTTP 401: Incorrect API key provided. (invalid_api_key); check OPENAI_API_KEY\n"
    assert capsys.readouterr() == ("", error)
    assert sent(api, "GET") == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 503, "headers": {"Retry-After": "2"}},
        {"status": 408},
        {"action": "reset"},
        {"action": "cut"},
        {"status": 200, "body": b"<html>"},
        {"status": 200, "body": b"[]"},
        {"status": 200, "body": b'{"data": null}'},
        {"status": 200, "body": b'{"data": [{}]}'},
        {"status": 200, "body": b"[" * 100_000},
        {"status": 200, "body": b"\xff" * 10, "headers": {"Content-Encoding": "gzip"}},
    ],
    ids=in_short,
)
def test_a_request_without_a_usable_answer_is_made_again_and_three_times_at_most(
    fault: dict[str, Any], api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", "/batches$", times=2, **fault))
    assert tool("list") == 0
    assert capsys.readouterr() == ("No batches found.\n", "")
    api.faults[:] = [Fault("GET", "/batches$", times=9, **fault)]
    assert tool("list") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"batch_tool.py: error: .*\w.*\n", err)
    assert sent(api, "GET") == 6


def test_a_server_that_dies_while_answering_is_named(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("GET", times=9, action="reset"))
    assert tool("list") == 1
    error = f"batch_tool.py: error: cannot reach {api.base_url}/: [Errno 104] Connection reset by peer\n"
    assert capsys.readouterr().err == error


def test_a_rate_limit_is_waited_out_as_the_server_says(
    api: LocalBatchAPI, tool: Tool, clock: Time, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=429, times=2, headers={"Retry-After": "200"}, message="Slow down"))
    assert tool("list") == 0
    assert clock.naps == [200, 200]
    warning = "batch_tool.py: warning: HTTP 429: Slow down (rate_limit_exceeded); trying again in 200 s\n"
    assert capsys.readouterr().err == warning * 2


def test_a_rate_limit_with_a_date_is_waited_out(api: LocalBatchAPI, tool: Tool, clock: Time) -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    api.faults.append(Fault("GET", status=429, headers={"Retry-After": date}))
    assert tool("list") == 0
    (nap,) = clock.naps
    assert 55 < nap <= 60


@pytest.mark.parametrize("header", ["nan", "inf", "-5", "soon", "0", "", f"Mon, 01 Jan 2024 00:00:00 +{'9' * 20}"])
def test_a_senseless_retry_after_is_not_obeyed(header: str, api: LocalBatchAPI, tool: Tool, clock: Time) -> None:
    api.faults.append(Fault("GET", status=429, headers={"Retry-After": header}))
    assert tool("list") == 0
    assert clock.naps == [0.5]


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("charset", ["utf-16", "idna", "undefined"])
def test_an_answer_in_a_charset_that_it_is_not_in_is_no_answer(
    charset: str, status: int, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    headers = {"content-type": f"text/html; charset={charset}"}
    api.faults.append(Fault("GET", times=3, status=status, body=b"<html>Bad gateway", headers=headers))
    assert tool("status", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err.startswith("batch_tool.py: error: batch_1: the answer ")


def test_fields_that_no_batch_has_do_no_harm(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    body = {"id": "b1", "status": "in_progress", "_fields_set": 5, "_BaseModel__cls": 1, "new": [1]}
    api.faults.append(Fault("GET", status=200, body=json.dumps(body).encode()))
    assert tool("status", "--batch-id", "b1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"id": "b1", "status": "in_progress", "new": [1]}


def test_what_is_too_deep_to_be_written_is_said_to_be() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert batch_tool.quoted(value) == '"nested too deeply"'


@pytest.mark.parametrize("seconds, naps", [("250", [250, 250]), ("601", [])])
def test_a_rate_limit_is_waited_out_ten_minutes_at_most(
    seconds: str, naps: list[float], api: LocalBatchAPI, tool: Tool, clock: Time, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=429, times=99, headers={"Retry-After": seconds}, message="Slow down"))
    assert tool("list") == 1
    assert clock.naps == naps
    assert capsys.readouterr().err.endswith("error: HTTP 429: Slow down (rate_limit_exceeded)\n")


def test_an_empty_purse_is_not_a_rate_limit(api: LocalBatchAPI, tool: Tool, clock: Time, capsys: Capture) -> None:
    api.faults.append(Fault("GET", status=429, times=9, code="insufficient_quota", message="Pay first."))
    assert tool("list") == 1
    assert clock.naps == []
    assert capsys.readouterr().err == "batch_tool.py: error: HTTP 429: Pay first. (insufficient_quota)\n"


def test_an_answer_that_is_a_page_is_shown_in_part_and_on_one_line(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    page = b"<html>\n<body>\x1b[31m Not  here\n" + b"word " * 100
    api.faults.append(Fault("GET", status=403, body=page, headers={"Content-Type": "text/html"}))
    assert tool("list") == 1
    _, err = capsys.readouterr()
    assert err.startswith(r"batch_tool.py: error: HTTP 403: <html> <body>\u001b[31m Not here word word ")
    assert err.endswith("word …\n")
    assert err.count("\n") == 1


def test_verbose_shows_each_response(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    assert tool("list", "--verbose") == 0
    name, _, shown = capsys.readouterr().err.partition(": ")
    assert (name, json.loads(shown)) == ("LIST_BATCHES", api.exchanges[0].answer_json)


# -- create -------------------------------------------------------------------------------------------------------


def test_create_prints_the_ids_and_uploads_the_file_as_it_is(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    path = requests_file()
    assert tool("create", "--in", path) == 0
    batch = only_batch(api)
    assert capsys.readouterr() == (ids(batch), "")
    assert (batch.endpoint, batch.completion_window) == ("/v1/responses", "24h")
    assert batch.metadata == {
        "input_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "input_file": "requests.jsonl",
        "part": "1/1",
    }
    assert api.read_file(batch.input_file_id) == path.read_bytes()
    assert (api.files[batch.input_file_id].purpose, api.files[batch.input_file_id].filename) == ("batch", path.name)


def test_create_as_json_is_the_batch_as_the_api_gave_it(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests_file()
    assert tool("create", "--in", "requests.jsonl", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == api.exchanges[-1].answer_json


def test_the_endpoint_and_the_completion_window_can_be_chosen(api: LocalBatchAPI, tool: Tool) -> None:
    requests_file(request(url="/v1/chat/completions"))
    options = ("--endpoint", "/v1/chat/completions", "--completion-window", "24h")
    assert tool("create", "--in", "requests.jsonl", *options) == 0
    assert only_batch(api).endpoint == "/v1/chat/completions"


def test_a_completion_window_that_the_api_refuses_is_said_and_the_file_deleted(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    assert tool("create", "--in", "requests.jsonl", "--completion-window", "1h") == 1
    out, err = capsys.readouterr()
    assert out.startswith("File ID: file-")
    assert "error: HTTP 400: Invalid value for 'completion_window': only '24h' is supported." in err
    assert (api.files, api.batches) == ({}, {})


def test_a_file_beyond_the_most_requests_becomes_several_batches(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    lines = [request(str(number)) for number in range(5)]
    requests_file(*lines)
    assert tool("create", "--in", "requests.jsonl", "--max-requests", 2) == 0
    batches = list(api.batches.values())
    assert capsys.readouterr().out == "".join(map(ids, batches))
    assert [batch.metadata and batch.metadata["part"] for batch in batches] == ["1/3", "2/3", "3/3"]
    parts = [jsonl(*lines[:2]), jsonl(*lines[2:4]), jsonl(*lines[4:])]
    assert [api.read_file(batch.input_file_id) for batch in batches] == parts
    for batch, part in zip(batches, parts, strict=True):
        assert batch.metadata and batch.metadata["input_sha256"] == hashlib.sha256(part).hexdigest()


def test_stdin_is_submitted(api: LocalBatchAPI, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    with requests_file().open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert tool("create", "--in", "-") == 0
    batch = only_batch(api)
    assert batch.metadata and batch.metadata["input_file"] == "stdin"
    assert api.read_file(batch.input_file_id) == Path("requests.jsonl").read_bytes()


@pytest.mark.parametrize("name", [b"\xff.jsonl", b"a\nb.jsonl", '뉴진스 "x".jsonl'.encode()], ids=in_short)
def test_a_file_of_any_name_is_submitted(name: bytes, api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    path = requests_file(path=os.fsdecode(name))
    assert tool("create", "--in", path) == 0
    assert capsys.readouterr().out == ids(only_batch(api))


def test_an_input_file_that_another_create_holds_is_left_to_it(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    with requests_file().open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert tool("create", "--in", "requests.jsonl") == 1
    error = "another create or run of requests.jsonl is at work; wait for it to end"
    assert capsys.readouterr() == ("", f"batch_tool.py: error: {error}\n")
    assert api.exchanges == []
    assert tool("create", "--in", "requests.jsonl") == 0


def test_two_creates_at_the_same_time_make_one_batch(api: LocalBatchAPI) -> None:
    requests_file()
    command = [sys.executable, str(ROOT / "batch_tool.py"), "create", "--in", "requests.jsonl"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert ids(only_batch(api)) in outputs
    assert {process.returncode for process in both} <= {0, 1}


LOST = pytest.mark.parametrize(
    "lost",
    [
        {"action": "reset"},
        {"action": "cut"},
        {"action": "shorten"},
        {"action": "delay", "seconds": 0.2},
        {"status": 408},
        {"status": 409},
        {"status": 500},
        {"status": 504},
        {"status": 200, "body": b"\xff\x00"},
        {"status": 200, "body": b"<html></html>", "headers": {"Content-Type": "text/html"}},
        {"status": 200, "body": b"{}"},
        {"status": 200, "body": b""},
        {"status": 200, "body": b'{"id": null, "status": null}'},
        {"status": 200, "body": b'{"id": "../x", "status": "validating"}'},
    ],
    ids=in_short,
)


@LOST
def test_one_batch_is_made_whatever_happens_to_the_answer(
    lost: dict[str, Any], api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/batches$", when="after", **lost))
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == ids(only_batch(api))
    assert sent(api, "POST", "/files$") == 1
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == ids(only_batch(api))


@pytest.mark.parametrize("lost", [{"action": "reset"}, {"status": 409}, {"status": 502}], ids=in_short)
def test_a_post_that_was_lost_is_repeated_after_looking_for_ten_seconds(
    lost: dict[str, Any], api: LocalBatchAPI, tool: Tool, clock: Time
) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/batches$", **lost))
    assert tool("create", "--in", "requests.jsonl") == 0
    assert (len(api.batches), clock.naps) == (1, [0.5, 1.5, 3, 5])
    assert (sent(api, "POST", "/batches$"), sent(api, "GET", "/batches$")) == (2, 5)


def test_a_post_is_made_three_times_at_most(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/batches$", times=9))
    assert tool("create", "--in", "requests.jsonl") == 1
    (file_id,) = api.files
    out, err = capsys.readouterr()
    assert out == f"File ID: {file_id}\n"
    advice = f"no answer whether the batch of file {file_id} was created; run the same command again: "
    assert err.endswith(f"batch_tool.py: error: {advice}it adopts the batch if it exists\n")
    assert sent(api, "POST", "/batches$") == 3


def test_a_batch_that_the_listing_shows_late_is_found(api: LocalBatchAPI, tool: Tool, clock: Time) -> None:
    requests_file()
    api.list_delay = 60
    api.faults.append(Fault("POST", "/batches$", when="after"))
    clock.then = [lambda: None, lambda: None, lambda: setattr(api, "list_delay", 0)]
    assert tool("create", "--in", "requests.jsonl") == 0
    assert len(api.batches) == 1
    assert clock.naps == [0.5, 1.5, 3]


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 403}, {"action": "reset"}], ids=in_short)
def test_a_batch_that_cannot_be_looked_for_is_adopted_by_the_next_create(
    fault: dict[str, Any], api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    api.faults += [Fault("POST", "/batches$", when="after"), Fault("GET", "/batches$", skip=1, times=99, **fault)]
    assert tool("create", "--in", "requests.jsonl") == 1
    batch = only_batch(api)
    out, err = capsys.readouterr()
    assert out == f"File ID: {batch.input_file_id}\n"
    assert err.endswith(f"batch_tool.py: error: no answer whether the batch of file {batch.input_file_id} was created; "
                        "run the same command again: it adopts the batch if it exists\n")
    assert batch.input_file_id in api.files
    api.faults.clear()
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == ids(only_batch(api))


def test_an_upload_whose_answer_is_lost_is_made_again(api: LocalBatchAPI, tool: Tool) -> None:
    path = requests_file()
    api.faults.append(Fault("POST", "/files$", when="after", action="reset", times=2))
    assert tool("create", "--in", path) == 0
    assert api.read_file(only_batch(api).input_file_id) == path.read_bytes()


def test_an_upload_that_is_refused_ends_the_command(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/files$", status=413, message="Too large", code="too_large"))
    assert tool("create", "--in", "requests.jsonl") == 1
    assert capsys.readouterr() == ("", "batch_tool.py: error: HTTP 413: Too large (too_large)\n")
    assert (sent(api, "POST"), api.batches) == (1, {})


@pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
def test_a_refused_batch_deletes_its_file(status: int, api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/batches$", status=status, times=9, message="No", code="no"))
    assert tool("create", "--in", "requests.jsonl") == 1
    assert capsys.readouterr().err == f"batch_tool.py: error: HTTP {status}: No (no)\n"
    assert (sent(api, "POST", "/batches$"), api.files) == (1, {})


def test_a_file_that_cannot_be_deleted_is_said(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests_file()
    api.faults += [Fault("POST", "/batches$", status=422, message="No"), Fault("DELETE", status=403, message="Never")]
    assert tool("create", "--in", "requests.jsonl") == 1
    (file_id,) = api.files
    warning = f"batch_tool.py: warning: file {file_id} was not deleted: HTTP 403: Never (forbidden)\n"
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize("status", [400, 404])
def test_a_file_that_is_not_known_yet_is_given_some_seconds(
    status: int, api: LocalBatchAPI, tool: Tool, clock: Time, capsys: Capture
) -> None:
    requests_file()

    def deny_the_file() -> None:
        (file_id,) = api.files
        api.faults.append(Fault("POST", "/batches$", times=3, status=status, message=f"There is no {file_id}"))

    api.faults.append(Fault("POST", "/batches$", status=429, headers={"Retry-After": "7"}))
    clock.then = [deny_the_file]
    assert tool("create", "--in", "requests.jsonl") == 0
    assert clock.naps == [7, 0.5, 1.5, 3]
    assert capsys.readouterr().out == ids(only_batch(api))


def test_a_file_that_stays_unknown_ends_the_command(api: LocalBatchAPI, tool: Tool, clock: Time) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/batches$", status=429, headers={"Retry-After": "7"}))
    clock.then = [api.files.clear]
    assert tool("create", "--in", "requests.jsonl") == 1
    assert clock.naps == [7, 0.5, 1.5, 3, 5]
    assert api.batches == {}


def test_a_rate_limit_on_the_post_is_waited_out(api: LocalBatchAPI, tool: Tool, clock: Time) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/batches$", status=429, times=3, headers={"Retry-After": "100"}))
    assert tool("create", "--in", "requests.jsonl") == 0
    assert (clock.naps, len(api.batches)) == ([100, 100, 100], 1)


def test_a_file_that_changes_during_the_upload_is_not_submitted(
    api: LocalBatchAPI, tool: Tool, clock: Time, capsys: Capture
) -> None:
    path = requests_file()
    api.faults.append(Fault("POST", "/files$", status=429, headers={"Retry-After": "1"}))
    clock.then = [lambda: path.write_bytes(path.read_bytes() + jsonl(request("a3")))]
    assert tool("create", "--in", path) == 1
    error = "batch_tool.py: error: requests.jsonl was changed while it was in use; run the same command again\n"
    assert capsys.readouterr().err.endswith(error)
    assert (api.files, api.batches) == ({}, {})


@pytest.mark.parametrize("path, when", [("/files$", "after"), ("/batches$", "after")])
def test_a_create_that_was_killed_is_run_again(
    path: str, when: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    api.faults.append(Fault("POST", path, when=when, action="reset", seconds=0.2))
    command = [sys.executable, str(ROOT / "batch_tool.py"), "create", "--in", "requests.jsonl"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not sent(api, "POST", path):
            time.sleep(0.001)
        process.kill()
    time.sleep(0.3)  # the server goes on with what it has received
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == ids(only_batch(api))


EARLIER = pytest.mark.parametrize(
    "status, output, fate",
    [
        ("validating", None, "adopted"),
        ("in_progress", None, "adopted"),
        ("finalizing", None, "adopted"),
        ("queued", None, "adopted"),
        ("completed", b"{}\n", "adopted"),
        ("completed", None, "submitted"),
        ("completed", b"", "submitted"),
        ("failed", None, "submitted"),
        ("expired", None, "submitted"),
        ("expired", b"{}\n", "left out"),
        ("cancelled", None, "submitted"),
        ("cancelled", b"{}\n", "left out"),
        ("cancelling", None, "left out"),
    ],
)


def earlier_batch(api: LocalBatchAPI, path: Path, status: str = "in_progress", **fields: Any) -> LocalBatch:
    """A batch that an earlier create made of the file."""
    metadata = {"input_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    input_file = api.new_file(path.read_bytes(), "batch", path.name)
    return api.new_batch(status, **{"input_file": input_file, "metadata": metadata} | fields)


@EARLIER
def test_nothing_is_paid_for_twice(
    status: str, output: bytes | None, fate: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    path = requests_file()
    empty = {"output_file_id": ""} if output == b"" else {}
    batch = earlier_batch(api, path, status, output=output, id="batch_1", **empty)
    expected = {"adopted": (0, 1), "submitted": (0, 2), "left out": (1, 1)}[fate]
    assert (tool("create", "--in", path), len(api.batches)) == expected
    out, err = capsys.readouterr()
    if fate == "adopted":
        assert (out, err) == (ids(batch), f"part 1/1 is batch batch_1 ({status}) already; not submitted again\n")
    elif fate == "left out":
        done = f"{1 if output else 0} of its 2 requests"
        when = "once it has ended, " if status == "cancelling" else ""
        assert (out, err) == ("", (
            f"batch_tool.py: warning: part 1/1 not submitted: batch batch_1 ({status}) has finished {done}; "
            f"{when}get them with retrieve --batch-id batch_1, and the rest with retry, without paying for all of it "
            "again\n"
        ))
    else:
        assert (out, err) == (ids([*api.batches.values()][-1]), "")


def test_an_adopted_batch_is_printed_as_json(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    earlier_batch(api, requests_file(), id="batch_1")
    assert tool("create", "--in", "requests.jsonl", "--json") == 0
    assert json.loads(capsys.readouterr().out)["id"] == "batch_1"


def test_only_the_parts_that_were_not_submitted_are(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests_file(request("a1"))
    earlier_batch(api, Path("requests.jsonl"), "expired", output=b"{}\n")
    requests_file(request("a1"), request("a2"))
    assert tool("create", "--in", "requests.jsonl", "--max-requests", 1) == 1
    assert capsys.readouterr().out == ids([*api.batches.values()][-1])
    assert len(api.batches) == 2


@pytest.mark.parametrize(
    "changes", [{"endpoint": "/v1/embeddings"}, {"metadata": None}, {"metadata": {}}, {"metadata": "odd"}], ids=str
)
def test_a_batch_of_other_input_is_not_adopted(changes: dict[str, Any], api: LocalBatchAPI, tool: Tool) -> None:
    earlier_batch(api, requests_file(), **changes)
    assert tool("create", "--in", "requests.jsonl") == 0
    assert len(api.batches) == 2


@pytest.mark.parametrize("age, batches", [(29 * DAY, 1), (31 * DAY, 2)])
def test_a_batch_is_adopted_for_thirty_days(age: int, batches: int, api: LocalBatchAPI, tool: Tool) -> None:
    earlier_batch(api, requests_file(), created_at=int(time.time()) - age)
    assert tool("create", "--in", "requests.jsonl") == 0
    assert len(api.batches) == batches


def test_force_submits_again(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    earlier_batch(api, requests_file())
    assert tool("create", "--in", "requests.jsonl", "--force") == 0
    assert capsys.readouterr() == (ids([*api.batches.values()][-1]), "")
    assert (len(api.batches), sent(api, "GET")) == (2, 0)


def test_an_earlier_batch_is_found_behind_many_pages(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    batch = earlier_batch(api, requests_file(), created_at=int(time.time()) - 60)
    for _ in range(250):
        api.new_batch("completed", input_file=api.files[batch.input_file_id])
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == ids(batch)
    assert sent(api, "GET") == 3


def test_pages_that_repeat_come_to_an_end(api: LocalBatchAPI, tool: Tool) -> None:
    page = {"data": [{"id": "b1", "status": "completed"}], "has_more": True}
    api.faults.append(Fault("GET", "/batches$", status=200, body=json.dumps(page).encode(), times=9))
    requests_file()
    assert tool("create", "--in", "requests.jsonl") == 0
    assert sent(api, "GET") == 2


def test_a_listing_without_has_more_is_read_to_its_end(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    path = requests_file()
    metadata = {"input_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    known = {"id": "b2", "status": "in_progress", "endpoint": "/v1/responses", "metadata": metadata}
    pages = {"data": [{"id": "b1", "status": "failed"}]}, {"data": [known]}, {"data": []}
    api.faults += [Fault("GET", "/batches$", status=200, body=json.dumps(page).encode()) for page in pages]
    assert tool("create", "--in", path) == 0
    assert capsys.readouterr().out == "Batch ID: b2\n"
    assert sent(api, "POST") == 0


def test_an_earlier_batch_with_few_fields_is_adopted(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    path = requests_file()
    metadata = {"input_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    known = {"id": "b1", "status": "validating", "endpoint": "/v1/responses", "metadata": metadata, "created_at": "?"}
    page = {"data": [{"id": "b2", "status": "validating", "metadata": metadata}, known], "has_more": False}
    api.faults.append(Fault("GET", "/batches$", status=200, body=json.dumps(page).encode()))
    assert tool("create", "--in", path) == 0
    assert capsys.readouterr().out == "Batch ID: b1\n"


def test_a_used_up_quota_is_known_by_its_type_too(api: LocalBatchAPI, tool: Tool, clock: Time) -> None:
    error = {"error": {"message": "Pay first.", "type": "insufficient_quota", "code": None}}
    api.faults.append(Fault("POST", "/batches$", status=429, times=9, body=json.dumps(error).encode()))
    assert tool("create", "--in", requests_file()) == 1
    assert (sent(api, "POST", "/batches$"), clock.now) == (1, 0)


@pytest.mark.parametrize("cut", [{"action": "cut"}, {"status": 500}], ids=in_short)
def test_without_a_listing_nothing_is_uploaded(cut: dict[str, Any], api: LocalBatchAPI, tool: Tool) -> None:
    requests_file()
    api.faults.append(Fault("GET", "/batches$", times=9, **cut))
    assert tool("create", "--in", "requests.jsonl") == 1
    assert sent(api, "POST") == 0


# -- status -------------------------------------------------------------------------------------------------------

MORNING = 1_705_314_600  # 2024-01-15T10:30:00 UTC
COUNTS = {"total": 1000, "completed": 990, "failed": 10}


def done_batch(api: LocalBatchAPI, status: str = "completed", **fields: Any) -> LocalBatch:
    """A batch with the id `batch_1` that was made in the morning and has ended, by default with all it can have."""
    known = {"id": "batch_1", "created_at": MORNING, "output": jsonl(success("a1")), "errors": jsonl(refused("a2"))}
    return api.new_batch(status, **known | fields)


def test_status_shows_and_saves_a_completed_batch(
    api: LocalBatchAPI, tool: Tool, utc: None, capsys: Capture
) -> None:
    output, errors = b"x" * 15_419 + b"\n", b"y" * 2_209 + b"\n"
    usage = {"input_tokens": 120_000, "output_tokens": 45_000, "total_tokens": 165_000}
    done_batch(api, id="batch-def456", completed_at=MORNING + 4500, output=output, errors=errors,
               request_counts=COUNTS, usage=usage)
    assert tool("status", "--batch-id", "batch-def456") == 0
    assert capsys.readouterr() == (
        "Status: completed\n"
        "Created: 2024-01-15T10:30:00\n"
        "Completed: 2024-01-15T11:45:00\n"
        "Requests: 990 completed, 10 failed of 1000\n"
        "Tokens: 120000 input, 45000 output\n"
        "Results saved: results_batch-def456.jsonl (15420 bytes)\n"
        "Errors saved: errors_batch-def456.jsonl (2210 bytes)\n",
        "",
    )
    assert Path("results_batch-def456.jsonl").read_bytes() == output
    assert Path("errors_batch-def456.jsonl").read_bytes() == errors


def test_times_are_local(api: LocalBatchAPI, tool: Tool, utc: None, capsys: Capture, monkeypatch: Any) -> None:
    monkeypatch.setenv("TZ", "EST5")
    time.tzset()
    api.new_batch("validating", id="batch_1", created_at=MORNING)
    assert tool("status", "--batch-id", "batch_1") == 0
    assert "Created: 2024-01-15T05:30:00\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "status, line",
    [
        ("failed", "Failed: 2024-01-15T10:31:00\n"),
        ("expired", "Expired: 2024-01-15T10:31:00\n"),
        ("cancelled", "Cancelled: 2024-01-15T10:31:00\n"),
        ("in_progress", "Expires: 2024-01-16T10:30:00\n"),
        ("paused", "Expires: 2024-01-16T10:30:00\n"),
    ],
)
def test_each_status_shows_its_own_time(
    status: str, line: str, api: LocalBatchAPI, tool: Tool, utc: None, capsys: Capture
) -> None:
    api.new_batch(status, id="batch_1", created_at=MORNING, **{f"{status}_at": MORNING + 60})
    assert tool("status", "--batch-id", "batch_1") == 0
    assert capsys.readouterr().out == f"Status: {status}\nCreated: 2024-01-15T10:30:00\n{line}"


def test_a_failed_batch_shows_its_errors(api: LocalBatchAPI, tool: Tool, utc: None, capsys: Capture) -> None:
    errors = [
        {"code": "duplicate_custom_id", "line": 3, "message": "Used twice.", "param": "custom_id"},
        {"code": "token_limit_exceeded", "line": None, "message": "Too many."},
        {"code": None, "message": "Only words\nand more."},
        {"line": "odd"},
        7,
    ]
    api.new_batch("failed", id="batch_1", created_at=MORNING, failed_at=None).errors = {"data": errors}
    assert tool("status", "--batch-id", "batch_1") == 0
    assert capsys.readouterr().out == (
        "Status: failed\n"
        "Created: 2024-01-15T10:30:00\n"
        "line 3: duplicate_custom_id: Used twice.\n"
        "token_limit_exceeded: Too many.\n"
        "Only words\\nand more.\n"
    )


@pytest.mark.parametrize("odd", [None, "odd", 10**30, [], {}, {"data": "odd"}, {"total": "x"}], ids=str)
def test_fields_that_are_null_or_odd_are_left_out(odd: Any, api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    names = ["request_counts", "usage", "errors", "expires_at", "in_progress_at", "completed_at", "metadata", "model"]
    api.new_batch("in_progress", id="batch_1").__dict__.update(dict.fromkeys(names, odd))
    assert tool("status", "--batch-id", "batch_1") == 0
    assert re.fullmatch(r"Status: in_progress\nCreated: .*\n", capsys.readouterr().out)


def test_fields_that_are_absent_are_left_out_and_unknown_ones_kept(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    answer = {"id": "batch_1", "status": "dreaming", "self": 1, "new": {"deep": [None]}}
    api.faults.append(Fault("GET", status=200, body=json.dumps(answer).encode(), times=2))
    assert tool("status", "--batch-id", "batch_1") == 0
    assert capsys.readouterr().out == "Status: dreaming\n"
    assert tool("status", "--batch-id", "batch_1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == answer


def test_status_as_json_is_the_batch_and_where_its_files_are(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api, metadata={"note": "\x85\u2028\ud800\x1b뉴진스"})
    assert tool("status", "--batch-id", "batch_1", "--json") == 0
    out, err = capsys.readouterr()
    paths = {"results_path": "results_batch_1.jsonl", "errors_path": "errors_batch_1.jsonl"}
    assert json.loads(out) == api.exchanges[0].answer_json | paths
    assert out.count("\n") == 1
    assert [line.split(":")[0] for line in err.splitlines()] == ["Results saved", "Errors saved"]


def test_no_auto_save_leaves_the_files_at_the_server(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api)
    assert tool("status", "--batch-id", "batch_1", "--no-auto-save", "--json") == 0
    assert "results_path" not in json.loads(capsys.readouterr().out)
    assert not list(Path().glob("*.jsonl"))


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_what_a_batch_that_ended_early_left_is_saved(status: str, api: LocalBatchAPI, tool: Tool) -> None:
    done_batch(api, status)
    assert tool("status", "--batch-id", "batch_1") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == jsonl(success("a1"))
    assert Path("errors_batch_1.jsonl").read_bytes() == jsonl(refused("a2"))


@pytest.mark.parametrize("empty", [None, ""])
def test_a_file_that_there_is_not_is_not_saved(empty: Any, api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, error_file_id=empty)
    assert tool("status", "--batch-id", "batch_1") == 0
    assert "Errors saved" not in capsys.readouterr().out
    assert [path.name for path in Path().glob("*.jsonl")] == ["results_batch_1.jsonl"]


def test_a_file_that_is_complete_is_not_downloaded_again(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, errors=None)
    assert tool("status", "--batch-id", "batch_1") == 0
    first = capsys.readouterr().out
    assert tool("status", "--batch-id", "batch_1") == 0
    assert capsys.readouterr().out == first
    assert sent(api, "GET", "/content$") == 1


def test_a_file_that_is_not_complete_is_replaced_and_the_log_says_so(api: LocalBatchAPI, tool: Tool) -> None:
    done_batch(api, errors=None)
    Path("results_batch_1.jsonl").write_bytes(b"old\n")
    assert tool("status", "--batch-id", "batch_1") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == jsonl(success("a1"))
    assert 'DOWNLOAD_RESULTS replaces "results_batch_1.jsonl"' in log_text()


def test_several_batches_are_headed_by_their_ids(api: LocalBatchAPI, tool: Tool, utc: None, capsys: Capture) -> None:
    for number in (1, 2):
        api.new_batch("in_progress", id=f"batch_{number}", created_at=MORNING, expires_at=None)
    assert tool("status", "--batch-id", "batch_1", "batch_2") == 0
    block = "Batch ID: batch_{}\nStatus: in_progress\nCreated: 2024-01-15T10:30:00\n"
    assert capsys.readouterr().out == block.format(1) + block.format(2)


@pytest.mark.parametrize("command", ["status", "retrieve", "cancel"])
def test_a_batch_that_fails_does_not_keep_the_others_from_it(
    command: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.new_batch("in_progress" if command == "cancel" else "completed", id="batch_2", output=jsonl(success()))
    assert tool(command, "--batch-id", "batch_1", "batch_2") == 1
    out, err = capsys.readouterr()
    assert err == "batch_tool.py: error: batch_1: HTTP 404: No such batch: batch_1\n"
    assert out


def test_saving_that_fails_is_exit_1(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api)
    Path("results_batch_1.jsonl").mkdir()
    assert tool("status", "--batch-id", "batch_1") == 1
    error = "batch_tool.py: error: batch_1: cannot write results_batch_1.jsonl: Is a directory\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize("answer", [{"id": "../../x"}, {"id": "x/y"}, {"id": ".x"}, {"id": "another"}], ids=str)
def test_an_id_of_the_server_chooses_no_directory(
    answer: dict[str, str], api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    file = api.new_file(b"{}\n", "batch_output", "x")
    body = json.dumps({"status": "completed", "output_file_id": file.id} | answer).encode()
    api.faults.append(Fault("GET", "/batches/", status=200, body=body, times=9))
    assert tool("status", "--batch-id", "batch_1") == 1
    assert not list(Path().rglob("results_*"))
    assert "error: batch_1: the answer is " in capsys.readouterr().err


@pytest.mark.parametrize("file_id", ["../batches", "a/b", 7, ["x"]], ids=str)
def test_a_file_id_that_can_be_none_is_not_asked_for(
    file_id: Any, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api, output_file_id=file_id)
    assert tool("status", "--batch-id", "batch_1") == 1
    reason = f"output_file_id of batch batch_1 is no file id: {json.dumps(file_id)}"
    assert capsys.readouterr().err == f"batch_tool.py: error: batch_1: {reason}\n"


# -- wait ---------------------------------------------------------------------------------------------------------


def test_wait_shows_each_change_and_then_the_status(
    api: LocalBatchAPI, tool: Tool, clock: Time, utc: None, capsys: Capture
) -> None:
    counts = {"total": 3, "completed": 0, "failed": 0}
    batch = done_batch(api, "validating", request_counts=None, errors=None, expires_at=None)

    def change(status: str, **fields: int) -> Callable[[], None]:
        return lambda: batch.__dict__.update(status=status, request_counts=counts | fields)

    clock.then = [
        change("in_progress"), change("in_progress"), change("in_progress", completed=1, failed=1),
        lambda: batch.__dict__.update(status="completed", completed_at=MORNING, request_counts=counts),
    ]
    assert tool("wait", "--batch-id", "batch_1", "--interval", "2.5") == 0
    assert clock.naps == [2.5] * 4
    assert capsys.readouterr() == (
        "Status: completed\n"
        "Created: 2024-01-15T10:30:00\n"
        "Completed: 2024-01-15T10:30:00\n"
        "Requests: 0 completed, 0 failed of 3\n"
        f"Results saved: results_batch_1.jsonl ({len(jsonl(success()))} bytes)\n",
        "batches: 1 validating; 0:00:00 elapsed\n"
        "batches: 1 in_progress; requests: 0/3 (0%); 0:00:02 elapsed\n"
        "batches: 1 in_progress; requests: 2/3 (66%), 1 failed; 0:00:07 elapsed\n"
        "batches: 1 completed; requests: 0/3 (0%); 0:00:10 elapsed\n",
    )


def test_on_a_terminal_progress_is_one_line(api: LocalBatchAPI, tool: Tool, clock: Time, monkeypatch: Any) -> None:
    batch = api.new_batch("in_progress", id="batch_1")
    clock.then = [lambda: None, lambda: batch.enter("completed", batch.born)]
    ours, terminal = os.openpty()
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert tool("wait", "--batch-id", "batch_1") == 0
        shown = os.read(ours, 10_000).decode()
        while not shown.endswith(" \r"):  # a terminal hands on what was written bit by bit
            shown += os.read(ours, 10_000).decode()
    os.close(ours)
    blank = " " * len("batches: 1 in_progress; 0:00:00 elapsed")
    assert shown == (
        "\rbatches: 1 in_progress; 0:00:00 elapsed\rbatches: 1 in_progress; 0:00:30 elapsed"
        f"\rbatches: 1 completed; 0:01:00 elapsed  \r{blank[:-2]}\r"
    )


def test_a_terminal_that_goes_away_does_not_end_the_waiting(
    api: LocalBatchAPI, tool: Tool, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = api.new_batch("in_progress", id="batch_1")
    ours, terminal = os.openpty()
    clock.then = [lambda: os.close(ours), lambda: batch.enter("completed", batch.born)]
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert tool("wait", "--batch-id", "batch_1") == 0


def test_the_time_for_waiting_is_not_one_for_saving(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.new_batch("completed", output=jsonl(success()), id="batch_1")
    api.faults.append(Fault("GET", "/files/", status=503, headers={"Retry-After": "30"}))
    assert tool("wait", "--batch-id", "batch_1", "--timeout", "3") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == jsonl(success())


@pytest.mark.parametrize("status, code", [("completed", 0), ("failed", 1), ("expired", 1), ("cancelled", 1)])
def test_wait_is_0_only_if_all_completed(status: str, code: int, api: LocalBatchAPI, tool: Tool) -> None:
    api.new_batch("completed", id="batch_1")
    api.new_batch(status, id="batch_2")
    assert tool("wait", "--batch-id", "batch_1", "batch_2") == code


def test_wait_polls_a_batch_until_it_has_ended_and_no_longer(api: LocalBatchAPI, tool: Tool, clock: Time) -> None:
    api.new_batch("completed", id="batch_1")
    batch = api.new_batch("paused", id="batch_2")
    clock.then = [lambda: None, lambda: batch.enter("completed", batch.born)]
    assert tool("wait", "--batch-id", "batch_1", "batch_2") == 0
    assert clock.naps == [30, 30]
    assert (sent(api, "GET", "batch_1"), sent(api, "GET", "batch_2")) == (1, 3)


def test_wait_saves_unless_told_not_to(api: LocalBatchAPI, tool: Tool) -> None:
    done_batch(api)
    assert tool("wait", "--batch-id", "batch_1", "--no-auto-save") == 0
    assert not list(Path().glob("*.jsonl"))
    assert tool("wait", "--batch-id", "batch_1") == 0
    assert len(list(Path().glob("*.jsonl"))) == 2


def test_wait_as_json_is_one_line_a_batch(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api)
    api.new_batch("completed", id="batch_2")
    assert tool("wait", "--batch-id", "batch_1", "batch_2", "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["id"], first["results_path"]) == ("batch_1", "results_batch_1.jsonl")
    assert (second["id"], "results_path" in second) == ("batch_2", False)


def test_wait_ends_with_3_when_its_time_is_up(api: LocalBatchAPI, tool: Tool, clock: Time, capsys: Capture) -> None:
    api.new_batch("in_progress", id="batch_1")
    assert tool("wait", "--batch-id", "batch_1", "--timeout", "45") == 3
    assert clock.naps == [30, 15]
    resume = "the batches go on at the server; to go on waiting: batch_tool.py wait --batch-id batch_1"
    assert capsys.readouterr().err.endswith(f"batch_tool.py: error: --timeout passed; {resume}\n")


@pytest.mark.parametrize(
    "outage",
    [{"status": 500}, {"status": 429}, {"status": 503}, {"action": "reset"}, {"action": "cut"},
     {"status": 200, "body": b"<html>"}],
    ids=in_short,
)
def test_an_outage_after_the_first_answer_is_outlived(
    outage: dict[str, Any], api: LocalBatchAPI, tool: Tool, clock: Time, capsys: Capture
) -> None:
    batch = api.new_batch("in_progress", id="batch_1")
    clock.then = [
        lambda: api.faults.append(Fault("GET", times=20, **outage)), *[lambda: None] * 19,
        lambda: batch.enter("completed", batch.born),
    ]
    assert tool("wait", "--batch-id", "batch_1") == 0
    assert clock.naps == [30] * 21
    _, err = capsys.readouterr()
    assert err.count("batch_tool.py: warning: batch_1: ") == err.count("; still waiting\n") == 20


def test_a_rate_limit_does_not_outlast_the_timeout(api: LocalBatchAPI, tool: Tool, clock: Time) -> None:
    batch = api.new_batch("in_progress")
    api.faults.append(Fault("GET", status=429, headers={"Retry-After": "100"}, times=9))
    assert tool("wait", "--batch-id", batch.id, "--timeout", "3") == 3
    assert clock.now == 3


def test_a_first_poll_that_fails_ends_the_wait(api: LocalBatchAPI, tool: Tool, clock: Time, capsys: Capture) -> None:
    api.new_batch("in_progress", id="batch_1")
    api.faults.append(Fault("GET", times=3, message="Out", code="out"))
    assert tool("wait", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err == "batch_tool.py: error: HTTP 500: Out (out)\n"


def test_a_batch_that_disappears_ends_the_wait(api: LocalBatchAPI, tool: Tool, clock: Time, capsys: Capture) -> None:
    api.new_batch("in_progress", id="batch_1")
    clock.then = [api.batches.clear]
    assert tool("wait", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err.endswith("batch_tool.py: error: HTTP 404: No such batch: batch_1\n")


# -- retrieve -----------------------------------------------------------------------------------------------------


def test_retrieve_saves_both_files(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api)
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    output, errors = jsonl(success("a1")), jsonl(refused("a2"))
    assert capsys.readouterr() == (
        f"Results saved: results_batch_1.jsonl ({len(output)} bytes)\n"
        f"Errors saved: errors_batch_1.jsonl ({len(errors)} bytes)\n",
        "",
    )
    assert (Path("results_batch_1.jsonl").read_bytes(), Path("errors_batch_1.jsonl").read_bytes()) == (output, errors)


def test_out_names_the_results_and_the_errors_beside_them(api: LocalBatchAPI, tool: Tool) -> None:
    done_batch(api)
    Path("deep").mkdir()
    Path("deep/bios.jsonl").write_bytes(b"old")
    assert tool("retrieve", "--batch-id", "batch_1", "--out", "deep/bios.jsonl") == 0
    assert Path("deep/bios.jsonl").read_bytes() == jsonl(success("a1"))
    assert Path("deep/bios.errors.jsonl").read_bytes() == jsonl(refused("a2"))
    assert 'DOWNLOAD_RESULTS replaces "deep/bios.jsonl"' in log_text()


def test_out_can_be_stdout(api: LocalBatchAPI, tool: Tool, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    done_batch(api)
    assert tool("retrieve", "--batch-id", "batch_1", "--out", "-") == 0
    out, err = capfdbinary.readouterr()
    assert out == jsonl(success("a1"))
    assert err.decode() == (
        f"Results saved: /dev/stdout ({len(out)} bytes)\n"
        f"Errors saved: errors_batch_1.jsonl ({len(jsonl(refused('a2')))} bytes)\n"
    )


def test_out_can_be_a_fifo(api: LocalBatchAPI, tool: Tool) -> None:
    done_batch(api, errors=None)
    os.mkfifo("fifo")
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert tool("retrieve", "--batch-id", "batch_1", "--out", "fifo") == 0
    assert os.read(reader, 10_000) == jsonl(success("a1"))
    os.close(reader)


@pytest.mark.parametrize("out, reason", [(".", "it is a directory"), ("/proc/x/y", "No such file or directory")])
def test_an_out_that_cannot_be_written_is_said_before_any_request(
    out: str, reason: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    assert tool("retrieve", "--batch-id", "batch_1", "--out", out) == 1
    assert capsys.readouterr() == ("", f"batch_tool.py: error: cannot write {out}: {reason}; choose another --out\n")
    assert api.exchanges == []


def test_an_out_on_a_full_disk_is_exit_1(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api)
    assert tool("retrieve", "--batch-id", "batch_1", "--out", "/dev/full") == 1
    error = "batch_tool.py: error: batch_1: cannot write /dev/full: No space left on device\n"
    assert capsys.readouterr() == ("", error)


def test_a_batch_that_has_not_ended_is_not_completed(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.new_batch("in_progress", id="batch_1")
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    error = "batch_tool.py: error: batch_1: Batch not completed (status: in_progress)\n"
    assert capsys.readouterr() == ("", error)


def test_a_batch_without_a_success_saves_its_errors_and_shows_the_commonest(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    errors = jsonl(refused("a1"), refused("a2", 400, "bad"), refused("a3"), b"[\n", b"7\n")
    done_batch(api, output=None, errors=errors)
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == (
        f"Errors saved: errors_batch_1.jsonl ({len(errors)} bytes)\n",
        "batch_tool.py: error: batch_1: Batch has no results (status: completed): "
        "2 × server_error: Sorry., 1 × bad: Sorry.\n",
    )
    assert Path("errors_batch_1.jsonl").read_bytes() == errors


def test_a_batch_without_any_file_has_no_results(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, "cancelled", output=None, errors=None)
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    error = "batch_tool.py: error: batch_1: Batch has no results (status: cancelled)\n"
    assert capsys.readouterr() == ("", error)


def test_a_failed_batch_gives_the_reasons(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    batch = api.new_batch("failed", id="batch_1")
    batch.errors = {"data": [{"line": 3, "code": "bad", "message": "No."}]}
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err == "batch_tool.py: error: batch_1: Batch failed: line 3: bad: No.\n"


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_a_partial_batch_is_saved_and_exit_1(status: str, api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, status, request_counts=COUNTS)
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == ["Results saved", "Errors saved"]
    reason = f"Batch {status} with 990 of 1000 requests completed; get the rest with retry"
    assert err == f"batch_tool.py: error: batch_1: {reason}\n"


BROKEN = pytest.mark.parametrize(
    "broken",
    [{"action": "cut"}, {"action": "shorten"}, {"action": "reset"}, {"status": 500}, {"status": 503},
     {"status": 200, "body": b""}, {"status": 200, "body": b"<html>\n"}],
    ids=in_short,
)


@BROKEN
def test_a_download_that_breaks_off_is_made_again(broken: dict[str, Any], api: LocalBatchAPI, tool: Tool) -> None:
    output = jsonl(*[success(str(number)) for number in range(3000)])
    done_batch(api, output=output, errors=None)
    api.faults.append(Fault("GET", "/content$", times=2, **broken))
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == output


@BROKEN
def test_a_download_that_stays_broken_leaves_the_old_file(
    broken: dict[str, Any], api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api)
    Path("results_batch_1.jsonl").write_bytes(b"old\n")
    api.faults.append(Fault("GET", "/content$", times=9, **broken))
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert re.fullmatch(r"batch_tool.py: error: batch_1: .*\w.*\n", capsys.readouterr().err)
    assert (Path("results_batch_1.jsonl").read_bytes(), leftovers()) == (b"old\n", [])
    assert sent(api, "GET", "/content$") == 3


def test_a_rate_limit_on_a_download_is_waited_out(api: LocalBatchAPI, tool: Tool, clock: Time) -> None:
    done_batch(api)
    api.faults.append(Fault("GET", "/content$", status=429, headers={"Retry-After": "9"}))
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    assert clock.naps == [9]


def test_a_file_of_another_size_is_not_kept(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    batch = done_batch(api)
    api.files[batch.output_file_id or ""].bytes += 1
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    size = len(jsonl(success("a1")))
    reason = f"download of {batch.output_file_id} was cut off ({size} of {size + 1} bytes); try again"
    assert capsys.readouterr() == ("", f"batch_tool.py: error: batch_1: {reason}\n")
    assert not list(Path().glob("*.jsonl"))


def test_a_file_without_a_last_line_end_is_not_kept(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, output=b"{}\n{}")
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert "was cut off (no line end at its end); try again" in capsys.readouterr().err
    assert not list(Path().glob("*.jsonl"))


def test_a_file_that_is_gone_is_named(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    batch = done_batch(api, output_file_id="file-gone")
    assert tool("retrieve", "--batch-id", batch.id) == 1
    assert capsys.readouterr().err == "batch_tool.py: error: batch_1: HTTP 404: No such File object: file-gone\n"


# -- cancel -------------------------------------------------------------------------------------------------------


def test_cancel_says_that_it_takes_a_while(api: LocalBatchAPI, tool: Tool, utc: None, capsys: Capture) -> None:
    batch = api.new_batch("in_progress", id="batch-def456", created_at=MORNING)
    assert tool("cancel", "--batch-id", "batch-def456") == 0
    assert capsys.readouterr() == (
        "Batch cancellation initiated: batch-def456\n"
        "Status: cancelling\n"
        "Created: 2024-01-15 10:30:00\n"
        "Note: Batch cancellation in progress. This may take up to 10 minutes.\n",
        "",
    )
    assert batch.status == "cancelling"


def test_cancel_says_what_a_cancelled_batch_costs(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    answer = json.dumps({"id": "batch_1", "status": "cancelled"}).encode()
    api.faults.append(Fault("POST", status=200, body=answer))
    assert tool("cancel", "--batch-id", "batch_1") == 0
    assert capsys.readouterr().out == (
        "Batch cancellation initiated: batch_1\n"
        "Status: cancelled\n"
        "Note: Batch was successfully cancelled. Any completed requests have been processed and you will be charged "
        "for them.\n"
    )


def test_cancel_as_json_is_the_batch(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.new_batch("in_progress", id="batch_1")
    assert tool("cancel", "--batch-id", "batch_1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == api.exchanges[0].answer_json


def test_a_batch_that_has_ended_cannot_be_cancelled(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.new_batch("completed", id="batch_1")
    assert tool("cancel", "--batch-id", "batch_1") == 1
    error = "batch_tool.py: error: batch_1: HTTP 409: Cannot cancel a batch with status 'completed'.\n"
    assert capsys.readouterr() == ("", error)
    assert sent(api, "POST") == 1


def test_a_cancellation_whose_answer_is_lost_is_asked_for_again(api: LocalBatchAPI, tool: Tool) -> None:
    api.new_batch("in_progress", id="batch_1")
    api.faults.append(Fault("POST", when="after", action="reset"))
    assert tool("cancel", "--batch-id", "batch_1") == 0


# -- list ---------------------------------------------------------------------------------------------------------


def test_list_is_an_aligned_table_newest_first(api: LocalBatchAPI, tool: Tool, utc: None, capsys: Capture) -> None:
    file = api.new_file(b"", "batch", "x")
    api.new_batch("completed", id="batch_1", created_at=MORNING, request_counts=COUNTS, metadata={"input_file": "a\nb"})
    api.new_batch("in_progress", id="batch_20", created_at=MORNING + 1, request_counts=None, input_file=file)
    assert tool("list") == 0
    assert capsys.readouterr() == (
        "BATCH ID  STATUS       CREATED              REQUESTS  FAILED  INPUT FILE\n"
        f"batch_20  in_progress  2024-01-15T10:30:01  0/0       0       {file.id}\n"
        "batch_1   completed    2024-01-15T10:30:00  990/1000  10      a\\nb\n",
        "",
    )


def test_an_empty_list_says_so(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    assert tool("list") == 0
    assert capsys.readouterr() == ("No batches found.\n", "")


@pytest.mark.parametrize("options, shown, requests", [([], 20, 1), (["--limit", "1"], 1, 1),
                                                      (["--limit", "150"], 150, 2), (["--limit", "999"], 210, 3)])
def test_the_limit_is_the_number_printed(
    options: list[str], shown: int, requests: int, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    file = api.new_file(b"", "batch", "x")
    for number in range(210):
        api.new_batch("completed", id=f"batch_{number}", input_file=file, created_at=MORNING + number)
    assert tool("list", *options) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == [f"batch_{number}" for number in range(209, 209 - shown, -1)]
    assert sent(api, "GET") == requests


def test_a_stdout_of_any_encoding_takes_any_name(api: LocalBatchAPI, tool: Tool, monkeypatch: Any) -> None:
    api.new_batch("completed", id="batch_1", metadata={"input_file": "뉴진스.jsonl"})
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert tool("list") == 0
    assert stdout.buffer.getvalue().endswith(b"  \\ub274\\uc9c4\\uc2a4.jsonl\n")  # type: ignore[attr-defined]


def test_list_as_json_is_one_line_a_batch(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.new_batch("completed")
    api.new_batch("failed")
    assert tool("list", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == api.exchanges[0].answer_json["data"]


def test_an_empty_list_as_json_is_nothing(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    assert tool("list", "--json") == 0
    assert capsys.readouterr() == ("", "")


# -- results ------------------------------------------------------------------------------------------------------

SUCCEEDED, REJECTED, RETRYABLE = batch_tool.SUCCEEDED, batch_tool.REJECTED, batch_tool.RETRYABLE
REASONING = {"type": "reasoning", "summary": []}
TOO_LONG = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
SERVER_ERROR = {"error": {"code": "server_error", "message": "Sorry."}}


def chat(finish_reason: str = "stop", **words: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant"} | words, "finish_reason": finish_reason}, {"message": 7}]}


# what a results line holds; what becomes of the request; its bio and its error in the CSV
RESULTS = {
    "a success": (response({"status": "completed", "output": [message(text("Bio."))]}), SUCCEEDED, "Bio.", ""),
    "reasoning first": (response({"output": [REASONING, message(text("Bio."))]}), SUCCEEDED, "Bio.", ""),
    "several parts": (response({"output": [message(text("A"), text("B")), message(text("C"))]}), SUCCEEDED, "ABC", ""),
    "chat": (response(chat(content="Bio.")), SUCCEEDED, "Bio.", ""),
    "chat cut off": (response(chat("length", content="Bi")), SUCCEEDED, "Bi", "incomplete: length"),
    "chat parts": (response(chat(content=[{"type": "text", "text": "A b"}, {"text": "io."}])), SUCCEEDED, "A bio.", ""),
    "chat refusal": (response(chat(content=None, refusal="No.")), SUCCEEDED, "", "refusal: No."),
    "refusal": (response({"output": [message({"type": "refusal", "refusal": "No."})]}), SUCCEEDED, "", "refusal: No."),
    "no text": (response({"object": "list", "data": []}), SUCCEEDED, "", ""),
    "incomplete": (response(TOO_LONG | {"output": [message(text("Bi"))]}), REJECTED, "Bi",
                   "incomplete: max_output_tokens"),
    "incomplete for no reason": (response({"status": "incomplete"}), REJECTED, "", "incomplete"),
    "failed": (response({"status": "failed"} | SERVER_ERROR), RETRYABLE, "", "server_error: Sorry."),
    "failed for no reason": (response({"status": "failed", "error": None}), RETRYABLE, "", "failed"),
    "unknown status": (response({"status": "queued"}), RETRYABLE, "", "queued"),
    "no body": (response(None), RETRYABLE, "", "no_body"),
    "no status": (response(SERVER_ERROR, None), RETRYABLE, "", "server_error: Sorry."),
    "status 0": (response({}, 0), RETRYABLE, "", "http_0"),
    "408": (response({}, 408), RETRYABLE, "", "http_408"),
    "409": (response({}, 409), RETRYABLE, "", "http_409"),
    "429": (response({}, 429), RETRYABLE, "", "http_429"),
    "500": (response(SERVER_ERROR, 500), RETRYABLE, "", "server_error: Sorry."),
    "400": (response({"error": {"code": "bad", "message": "No."}}, 400), REJECTED, "", "bad: No."),
    "404 by type": (response({"error": {"code": None, "type": "bad", "message": ""}}, 404), REJECTED, "", "bad"),
    "an odd error": (response({"error": "No."}, 400), REJECTED, "", "http_400"),
    "an odd response": ("odd", RETRYABLE, "", "no_response"),
    "odd items": (response({"output": [7, {"type": "message", "content": [None, {"type": "output_text"}]}]}),
                  SUCCEEDED, "", ""),
    "odd output": (response({"output": "Bio.", "choices": {}}), SUCCEEDED, "", ""),
}
LINES = pytest.mark.parametrize("answer, outcome, bio, error", list(RESULTS.values()), ids=list(RESULTS))


@LINES
def test_a_results_line_is_judged(answer: Any, outcome: str, bio: str, error: str) -> None:
    verdict = batch_tool.judge(result(response=answer))
    assert verdict.outcome == outcome
    assert error.startswith(verdict.error())


@LINES
def test_retry_writes_what_can_be_retried(
    answer: Any, outcome: str, bio: str, error: str, tool: Tool, capsys: Capture
) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(result(response=answer)))
    assert tool("retry", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "again.jsonl") == 0
    again = outcome == RETRYABLE
    assert capsys.readouterr().out == f"Requests to retry: {int(again)}\n"
    assert Path("again.jsonl").exists() == again


@LINES
def test_export_writes_the_text_or_the_error(answer: Any, outcome: str, bio: str, error: str, tool: Tool) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(result(response=answer)))
    assert rows(tool, "results.jsonl") == [["a1", "Artist a1", bio, error, "", ""]]


@pytest.mark.parametrize("code", ["batch_expired", "batch_cancelled", "request_timeout", "new"])
def test_a_line_with_an_error_of_its_own_is_retryable(code: str) -> None:
    verdict = batch_tool.judge(result(error={"code": code, "message": "Late."}))
    assert verdict == (RETRYABLE, code, "Late.")


UNUSABLE = pytest.mark.parametrize(
    "line, reason",
    [
        (b"x\n", "not valid JSON: Expecting value (character 1 of the line)"),
        (jsonl(success())[:44], "not valid JSON: Unterminated string starting at (character 42 of the line)"),
        (b'{"custom_id": "\xff"}\n', "not valid UTF-8 (byte 16 of the line)"),
        (b"[" * 100_000 + b"\n", ""),
        (b"[]\n", "not a JSON object"),
        (b"\n", "blank line"),
        (result(None), "not a results line (no custom_id)"),
        (success("zz\n"), 'custom_id "zz\\n" is not in the request file'),
    ],
    ids=in_short,
)


@UNUSABLE
@pytest.mark.parametrize("command", ["retry", "export"])
def test_an_unusable_results_line_is_warned_about(
    line: Any, reason: str, command: str, tool: Tool, capsys: Capture
) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(success(), line))
    assert tool(command, "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "out") == 0
    warning = capsys.readouterr().err.splitlines()[0]
    assert warning.startswith(f"batch_tool.py: warning: results.jsonl line 2: {reason}")
    assert warning.endswith("; line ignored")


@pytest.mark.parametrize("command", ["retry", "export"])
@pytest.mark.parametrize(("unusable", "counted"), [(0, ""), (1, "; 1 results line ignored"),
                                                   (30, "; 30 results lines ignored")])
def test_twenty_unusable_lines_are_named_and_all_counted(
    unusable: int, counted: str, command: str, tool: Tool, capsys: Capture
) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(success()) + b"x\n" * unusable)
    assert tool(command, "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "out") == 0
    *warnings, totals = capsys.readouterr().err.splitlines()
    assert len(warnings) == min(unusable, 20)
    assert totals.endswith(counted) and ("ignored" in totals) == bool(counted)


# -- retry --------------------------------------------------------------------------------------------------------


def test_retry_counts_what_became_of_the_requests(tool: Tool, capsys: Capture) -> None:
    requests_file(*map(request, "abcdef"))
    Path("out.jsonl").write_bytes(jsonl(success("a")))
    Path("err.jsonl").write_bytes(jsonl(refused("b", 400, "bad"), refused("c"), refused("d")))
    assert tool("retry", "--in", "requests.jsonl", "--results", "out.jsonl", "err.jsonl", "--out", "again.jsonl") == 0
    assert capsys.readouterr() == (
        "Requests to retry: 4\n",
        "1 succeeded, 1 rejected (not sent again), 2 failed otherwise, 2 missing\n"
        "commonest errors: 2 × server_error, 1 × bad\n",
    )
    assert Path("again.jsonl").read_bytes() == jsonl(*map(request, "cdef"))


def test_include_rejected_writes_those_too(tool: Tool, capsys: Capture) -> None:
    requests_file(*map(request, "ab"))
    Path("err.jsonl").write_bytes(jsonl(refused("b", 400, "bad")))
    arguments = ("--in", "requests.jsonl", "--results", "err.jsonl", "--out", "again.jsonl", "--include-rejected")
    assert tool("retry", *arguments) == 0
    assert capsys.readouterr().out == "Requests to retry: 2\n"
    assert Path("again.jsonl").read_bytes() == jsonl(*map(request, "ab"))


def test_requests_are_written_byte_for_byte_in_their_order(tool: Tool) -> None:
    lines = [
        json.dumps(request("b\u2028"), ensure_ascii=False).encode() + b"\n",
        b' {"body" :{"x":"\\ud800\\u0000\xc2\x85"}, "custom_id":"a\\ud800" }\r\n',
        jsonl(request("뉴진스")).rstrip(),
    ]
    requests_file(*lines)
    assert tool("retry", "--in", "requests.jsonl", "--results", "/dev/null", "--out", "again.jsonl") == 0
    assert Path("again.jsonl").read_bytes() == b"".join(lines)


def test_nothing_to_retry_leaves_out_alone(tool: Tool, capsys: Capture) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(success()))
    Path("again.jsonl").write_bytes(b"old")
    assert tool("retry", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "again.jsonl") == 0
    assert capsys.readouterr() == ("Requests to retry: 0\n", "1 succeeded, 0 rejected, 0 failed otherwise, 0 missing\n")
    assert Path("again.jsonl").read_bytes() == b"old"


def test_retry_to_stdout_reports_on_stderr(tool: Tool, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    requests_file(request())
    assert tool("retry", "--in", "requests.jsonl", "--results", "/dev/null", "--out", "-") == 0
    out, err = capfdbinary.readouterr()
    assert (out, err.splitlines()[0]) == (jsonl(request()), b"Requests to retry: 1")


@pytest.mark.parametrize("lines", [[refused(), success()], [success(), refused()]], ids=["last", "first"])
def test_of_several_lines_of_a_request_a_success_wins(lines: list[Any], tool: Tool, capsys: Capture) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(*lines))
    assert tool("retry", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "again.jsonl") == 0
    assert capsys.readouterr().out == "Requests to retry: 0\n"


def test_of_several_failures_of_a_request_the_last_counts(tool: Tool) -> None:
    requests_file(request())
    Path("1.jsonl").write_bytes(jsonl(refused(status=400, code="first")))
    Path("2.jsonl").write_bytes(jsonl(refused(code="last")))
    assert rows(tool, "1.jsonl", "2.jsonl")[0][3] == "last: Sorry."
    assert rows(tool, "2.jsonl", "1.jsonl")[0][3] == "first: Sorry."


@pytest.mark.parametrize(
    "lines, reason",
    [
        ([b"x\n"], "requests.jsonl line 1: not valid JSON: Expecting value (character 1 of the line)"),
        ([b"[" * 100_000 + b"\n"], "requests.jsonl line 1: "),
        ([request(), b"\xff\n"], "requests.jsonl line 2: not valid UTF-8 (byte 1 of the line)"),
        ([b"{}\n"], "requests.jsonl line 1: no custom_id"),
        ([request(7)], "requests.jsonl line 1: no custom_id"),
        ([request(), request()], 'requests.jsonl line 2: custom_id "a1" was used before; see validate'),
    ],
    ids=in_short,
)
@pytest.mark.parametrize("command", ["retry", "export"])
def test_a_bad_request_file_is_an_error(
    lines: list[Any], reason: str, command: str, tool: Tool, capsys: Capture
) -> None:
    requests_file(*lines)
    assert tool(command, "--in", "requests.jsonl", "--results", "/dev/null", "--out", "out") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"batch_tool.py: error: {reason}")
    assert err.count("\n") == 1
    assert not Path("out").exists()


class Meddler(threading.Thread):
    """Changes a file while a command waits for the last of its results, which come through a FIFO."""

    def __init__(self, change: Callable[[], object]) -> None:
        super().__init__()
        self._change = change
        os.mkfifo("fifo")

    def run(self) -> None:
        with open("fifo", "wb") as fifo:  # once the command has opened it, and so the others
            self._change()
            fifo.write(jsonl(success("a2")))


@pytest.mark.parametrize("command", ["retry", "export"])
@pytest.mark.parametrize(("path", "content"), [
    ("results.jsonl", b""),
    ("results.jsonl", jsonl(success("a1", "Another bio."))),
    ("requests.jsonl", jsonl(request("a1"))),
    ("requests.jsonl", jsonl(request("a1"), request("a2"), request("a3"), request("a4"))),
])
def test_a_file_that_changes_meanwhile_is_an_error(
    command: str, path: str, content: bytes, tool: Tool, capsys: Capture
) -> None:
    requests_file(*map(request, ("a1", "a2", "a3")))
    Path("results.jsonl").write_bytes(jsonl(success("a1")))
    meddler = Meddler(lambda: Path(path).write_bytes(content))
    meddler.start()
    assert tool(command, "--in", "requests.jsonl", "--results", "results.jsonl", "fifo", "--out", "out") == 1
    meddler.join()
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"batch_tool.py: error: {path} was changed while it was in use; run the same command again"
    )
    assert (Path("out").exists(), leftovers()) == (False, [])


def test_a_signal_counts_more_than_a_file_that_changed(work: Path) -> None:
    path = requests_file()
    with pytest.raises(batch_tool.Stopped), path.open("rb") as file, batch_tool.unchanged(file, "requests.jsonl"):
        path.write_bytes(b"")
        raise batch_tool.Stopped(130)


def test_a_number_of_tokens_that_cannot_be_is_none(tool: Tool, capsys: Capture) -> None:
    requests_file(request())
    for tokens in ("9" * 4300, "-1", "true", '"7"'):
        line = jsonl(success()).decode().replace('"input_tokens": 12', f'"input_tokens": {tokens}')
        Path("results.jsonl").write_text(line)
        assert tool("export", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "out") == 0
        assert "tokens: 0 input, 4 output" in capsys.readouterr().err
        assert Path("out").read_bytes().endswith(b",,4\r\n")


# -- export -------------------------------------------------------------------------------------------------------


def rows(tool: Tool, *results: str) -> list[list[str]]:
    """The exported rows, without the header."""
    assert tool("export", "--in", "requests.jsonl", "--results", *results, "--out", "bios.csv") == 0
    with open("bios.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file, strict=True))[1:]


def test_export_is_rfc_4180(tool: Tool, capsys: Capture) -> None:
    requests_file(request("a1"), request("a,2"), request("a3"))
    Path("results.jsonl").write_bytes(
        jsonl(success("a3", 'Say "yes",\nor\r\nno.'), success("a1", "뉴진스\u2028\x85\ud800\x00"), refused("a,2"))
    )
    assert tool("export", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "bios.csv") == 0
    assert Path("bios.csv").read_bytes().decode() == (
        "artist_id,artist_name,bio,error,input_tokens,output_tokens\r\n"
        "a1,Artist a1,뉴진스\u2028\x85?\x00,,12,4\r\n"
        '"a,2","Artist a,2",,server_error: Sorry.,,\r\n'
        'a3,Artist a3,"Say ""yes"",\nor\r\nno.",,12,4\r\n'
    )
    assert capsys.readouterr() == ("", (
        "Wrote bios.csv: 2 succeeded, 1 failed, 0 incomplete, 0 missing of 3 requests; tokens: 24 input, 8 output; "
        "errors: 1 × server_error\n"
    ))


def test_a_request_without_a_results_line_is_missing(tool: Tool, capsys: Capture) -> None:
    requests_file(request("a1"))
    assert rows(tool, "/dev/null") == [["a1", "Artist a1", "", "missing", "", ""]]
    summary = "Wrote bios.csv: 0 succeeded, 0 failed, 0 incomplete, 1 missing of 1 request; tokens: 0 input, 0 output\n"
    assert capsys.readouterr().err == summary


@pytest.mark.parametrize(
    "body, name",
    [
        ({"prompt": {"id": "p", "variables": {"artist_name": "뉴진스"}}}, "뉴진스"),
        ({"metadata": {"artist_name": "Perfume"}}, "Perfume"),
        ({"prompt": "words", "metadata": None}, ""),
        ({"messages": []}, ""),
        ("odd", ""),
    ],
    ids=in_short,
)
def test_the_artists_name_is_in_the_request(body: Any, name: str, tool: Tool) -> None:
    requests_file(request("a1", body=body))
    assert rows(tool, "/dev/null") == [["a1", name, "", "missing", "", ""]]


@pytest.mark.parametrize(
    "usage, tokens",
    [
        ({"input_tokens": 3, "output_tokens": 0}, ["3", "0"]),
        ({"prompt_tokens": 3, "completion_tokens": 2}, ["3", "2"]),
        ({"input_tokens": "3", "output_tokens": True}, ["", ""]),
        (None, ["", ""]),
        ([], ["", ""]),
    ],
    ids=in_short,
)
def test_tokens_are_what_the_response_says(usage: Any, tokens: list[str], tool: Tool) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(result(response=response({"usage": usage}))))
    assert rows(tool, "results.jsonl")[0][4:] == tokens


def test_a_huge_line_is_exported(tool: Tool) -> None:
    bio = "x" * 5_000_000
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(success(bio=bio)))
    assert tool("export", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "bios.csv") == 0
    assert f",{bio},,12,4\r\n".encode() in Path("bios.csv").read_bytes()


def test_results_can_come_from_stdin(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(success()))
    with open("results.jsonl") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert rows(tool, "-") == [["a1", "Artist a1", "A bio.", "", "12", "4"]]


def test_a_row_is_what_csv_would_write() -> None:
    chars = ["a", "é", "\u2028", " ", ",", '"', "\r", "\n", ";", "\t", ""]
    picked = random.Random(1)
    for _ in range(3000):
        fields = ["".join(picked.choices(chars, k=picked.randrange(6))) for _ in range(6)]
        expected = io.StringIO(newline="")
        csv.writer(expected).writerow(fields)
        assert batch_tool.csv_line(fields) == expected.getvalue().encode()


def test_an_export_that_fails_leaves_the_old_csv(tool: Tool, capsys: Capture) -> None:
    requests_file(request())
    Path("bios.csv").write_text("old")
    assert tool("export", "--in", "requests.jsonl", "--results", "nope", "--out", "bios.csv") == 1
    assert capsys.readouterr() == ("", "batch_tool.py: error: cannot read nope: No such file or directory\n")
    assert (Path("bios.csv").read_text(), leftovers()) == ("old", [])


# -- log ----------------------------------------------------------------------------------------------------------


def test_the_log_is_in_logs_by_the_time_and_readable_by_its_owner_alone(api: LocalBatchAPI, tool: Tool) -> None:
    assert tool("list") == 0
    (path,) = Path("logs").iterdir()
    assert re.fullmatch(r"batch_\d{8}_\d{6}\.log", path.name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_log_can_be_elsewhere_and_grows(api: LocalBatchAPI, tool: Tool) -> None:
    Path("deep").mkdir()
    Path("deep/my.log").write_text("before\n")
    Path("deep/my.log").chmod(0o644)
    assert tool("list", "--log-file", "deep/my.log") == 0
    assert Path("deep/my.log").read_text().startswith("before\n")
    assert stat.S_IMODE(Path("deep/my.log").stat().st_mode) == 0o600
    assert not Path("logs").exists()


def test_every_operation_is_logged_with_its_request_and_its_response(api: LocalBatchAPI, tool: Tool) -> None:
    requests_file()
    batch = done_batch(api, "completed")
    running = api.new_batch("in_progress")
    tool("create", "--in", "requests.jsonl")
    tool("create", "--in", "requests.jsonl", "--completion-window", "7d", "--force")
    tool("retrieve", "--batch-id", batch.id)
    tool("cancel", "--batch-id", running.id)
    log = log_text()
    for operation in ("LIST_BATCHES", "UPLOAD", "CREATE_BATCH", "DELETE_FILE", "GET_STATUS", "DOWNLOAD_RESULTS",
                      "CANCEL_BATCH"):
        for event in ("request", "response"):
            for found in re.findall(rf"^[-\d]+ [:\d]+,\d+ INFO {operation} {event} (.*)$", log, re.MULTILINE):
                assert isinstance(json.loads(found), dict)
            assert f" INFO {operation} {event} {{" in log
    assert 'INFO DOWNLOAD_RESULTS response {"path": "results_batch_1.jsonl", "bytes": ' in log
    assert "A bio." not in log


def test_an_error_is_logged_with_its_stack_on_one_line(api: LocalBatchAPI, tool: Tool) -> None:
    api.faults.append(Fault("GET", status=403, message="First\nsecond\x1b[31m\x85\u2028"))
    assert tool("list") == 1
    lines = log_text().split("\n")
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|ERROR) \w+ ", line) for line in lines[:-1])
    (error,) = [line for line in lines if " ERROR " in line]
    assert r" ERROR LIST_BATCHES error HTTP 403: First\nsecond\u001b[31m\u0085\u2028 (forbidden)\nTraceback " in error


@pytest.mark.parametrize(
    "path, reason",
    [(".", "open the log .: Is a directory; choose another with --log-file"),
     ("/dev/null/x", "open the log /dev/null/x: File exists; choose another with --log-file"),
     ("/dev/full", "write the log: [Errno 28] No space left on device")],
)
def test_a_log_that_cannot_be_written_ends_the_command_before_any_request(
    path: str, reason: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    assert tool("create", "--in", "requests.jsonl", "--log-file", path) == 1
    assert capsys.readouterr() == ("", f"batch_tool.py: error: cannot {reason}\n")
    assert api.exchanges == []


ECHOES = pytest.mark.parametrize(
    "fault",
    [
        {"status": 400, "message": f"No such key: {KEY}, nor Bearer {KEY}"},
        {"status": 500, "message": f"{KEY}", "times": 9},
        {"status": 403, "body": f"<html>\n<p>Authorization: Bearer {KEY}</p>".encode()},
        {"status": 200, "body": f"<html>{'x ' * 95}{KEY}".encode(), "times": 9},
        {"status": 200, "body": json.dumps({"id": KEY}).encode(), "times": 9},
        {"status": 200, "body": json.dumps({"id": "b", "status": f"{KEY}"}).encode()},
        {"status": 200, "body": json.dumps({"id": "b", "status": "x", "metadata": {KEY: f'"{KEY}"'}}).encode()},
    ],
    ids=in_short,
)


@ECHOES
@pytest.mark.parametrize("options", [[], ["--json", "--verbose"]], ids=["text", "json"])
def test_a_key_that_the_server_echoes_is_seen_nowhere(
    fault: dict[str, Any], options: list[str], api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", **fault))
    tool("status", "--batch-id", "b", *options)
    out, err = capsys.readouterr()
    for said in (out, err, log_text()):
        assert KEY[:12] not in said
    if "--json" in options and out:
        json.loads(out)


def test_a_key_of_any_shape_is_hidden_from_eight_characters_on(
    api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.new_batch("in_progress", id="batch_1", metadata={"input_file": 'x"y\\z123 and short12'})
    monkeypatch.setenv("OPENAI_API_KEY", 'x"y\\z123')
    assert tool("list", "--verbose") == 0
    monkeypatch.setenv("OPENAI_API_KEY", "short12")
    assert tool("list") == 0
    out, err = capsys.readouterr()
    assert [line.split("  ")[-1].strip() for line in out.splitlines() if "batch_1" in line] == [
        "[secret] and short12", 'x"y\\z123 and short12'
    ]
    assert "z123" not in err


def test_result_files_are_kept_byte_for_byte(api: LocalBatchAPI, tool: Tool) -> None:
    output = jsonl(success("a1", f"Bearer {KEY}\x1b"))
    done_batch(api, output=output)
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == output


# -- command line -------------------------------------------------------------------------------------------------


def usage_error(arguments: list[str], capsys: Capture) -> str:
    """The last line of stderr of a command line that is refused."""
    with pytest.raises(SystemExit) as stopped:
        batch_tool.main(arguments)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    return err.splitlines()[-1]


def options_of(command: str, capsys: Capture) -> set[str]:
    with pytest.raises(SystemExit) as stopped:
        batch_tool.main([command, "--help"])
    assert stopped.value.code == 0
    return set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_can_be_abbreviated(command: str, work: Path, capsys: Capture) -> None:
    for option in options_of(command, capsys):
        reason = usage_error([command, *USAGE[command], option[:-1] + "=1"], capsys)
        assert "unrecognized arguments: " in reason or "required: " in reason


def test_every_online_command_has_the_options_of_all(capsys: Capture) -> None:
    for command in COMMANDS:
        options = options_of(command, capsys)
        assert ({"--log-file", "--verbose"} <= options) == (command not in OFFLINE)
        assert ("--json" in options) == (command in WITH_JSON)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "the following arguments are required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["validate"], "the following arguments are required: --in"),
        (["create", "--in", ""], "argument --in: must not be empty"),
        (["create", "--in", "x", "--max-requests", "0"], "not a whole number of 1 or more: '0'"),
        (["create", "--in", "x", "--max-requests", "50001"], "a batch takes 50000 requests at most: '50001'"),
        (["create", "--in", "x", "--endpoint", "a\nb"], "has control characters or is not valid UTF-8: 'a\\nb'"),
        (["list", "--limit", "-1"], "not a whole number of 1 or more: '-1'"),
        (["list", "--limit", "1_0"], "not a whole number of 1 or more: '1_0'"),
        (["wait", "--batch-id", "b", "--interval", "0"], f"{NOT_SECONDS}'0'"),
        (["wait", "--batch-id", "b", "--interval", "nan"], f"{NOT_SECONDS}'nan'"),
        (["wait", "--batch-id", "b", "--interval", "1e9"], f"{NOT_SECONDS}'1e9'"),
        (["wait", "--batch-id", "b", "--interval", "1.2.3"], f"{NOT_SECONDS}'1.2.3'"),
        (["wait", "--batch-id", "b", "--timeout", "-3"], f"{NOT_SECONDS}'-3'"),
        (["status", "--batch-id", "../x"], "not a batch id: '../x'"),
        (["status", "--batch-id", ".x"], "not a batch id: '.x'"),
        (["status", "--batch-id=-x"], "not a batch id: '-x'"),
        (["status", "--batch-id", "é"], "not a batch id: '\\xe9'"),
        (["status", "--batch-id", "a\n"], "not a batch id: 'a\\n'"),
        (["status", "--batch-id", ""], "not a batch id: ''"),
        (["retrieve", "--batch-id", "a", "b", "--out", "x"], "--out goes with one --batch-id"),
        (["retry", "--in", "-", "--results", "-", "--out", "x"], "only one input can be stdin (-)"),
        (["retry", "--in", "/dev/stdin", "--results", "-", "--out", "x"], "only one input can be stdin (-)"),
    ],
    ids=in_short,
)
def test_a_usage_error_is_exit_2(arguments: list[str], reason: str, work: Path, capsys: Capture) -> None:
    assert reason in usage_error(arguments, capsys)


@pytest.mark.parametrize("command", ["retry", "export"])
@pytest.mark.parametrize("out", ["requests.jsonl", "results.jsonl", "link"])
def test_a_file_cannot_be_read_and_written_at_once(command: str, out: str, work: Path, capsys: Capture) -> None:
    requests_file()
    Path("results.jsonl").write_bytes(jsonl(success()))
    Path("link").symlink_to("requests.jsonl")
    arguments = [command, "--in", "requests.jsonl", "--results", "results.jsonl", "--out", out]
    assert usage_error(arguments, capsys).endswith(" would be read and written at once; choose another path to write")


def test_the_log_cannot_be_stdout(work: Path, capsys: Capture) -> None:
    error = usage_error(["list", "--log-file", "-"], capsys)
    assert error.endswith("argument --log-file: stdout is for results; name a file, or /dev/stderr")


def test_the_log_cannot_be_the_request_file(work: Path, capsys: Capture) -> None:
    requests_file()
    arguments = ["create", "--in", "requests.jsonl", "--log-file", "requests.jsonl"]
    assert usage_error(arguments, capsys).endswith(" would be read and written at once; choose another path to write")


def test_the_results_cannot_go_into_the_log(work: Path, capsys: Capture) -> None:
    requests_file()
    arguments = ["run", "--in", "requests.jsonl", "--out", "x", "--log-file", "./x"]
    assert usage_error(arguments, capsys).endswith("--out and --log-file are the same file; choose another for the log")


@pytest.mark.parametrize("arguments", [[KEY], ["list", "--api-key", KEY], ["status", "--batch-id", f"Bearer {KEY}"],
                                       ["list", "--limit", "my-own-key"]], ids=in_short)
def test_a_usage_error_does_not_show_the_key(
    arguments: list[str], work: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "my-own-key")
    error = usage_error(arguments, capsys)
    assert "[secret]" in error and KEY[10:] not in error and "my-own" not in error


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: Capture) -> None:
    assert {"--help", *USAGE[command][::2]} - {"r", "s"} <= options_of(command, capsys) | {"o", "b"}


# -- processes of their own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["gen_batch_jsonl.py", "batch_tool.py"])
def test_an_old_python_is_told_what_is_needed(script: str) -> None:
    old = "import runpy, sys; sys.version_info, sys.version = (3, 10, 1), '3.10.1 (main)'; runpy.run_path(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", old, ROOT / script], capture_output=True, text=True)
    error = f"{script}: error: it needs Python 3.11 or later; this is 3.10.1\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", error)


@pytest.mark.parametrize(("redirection", "code", "out", "err"), [
    ("validate --in requests.jsonl 2> /dev/full", 0, "OK: 2 requests, 308 bytes, 1 batch\n", ""),
    ("validate --nonsense 2> /dev/full", 2, "", ""),
    ("validate --nonsense 2>&-", 2, "", ""),
    ("--help > /dev/full", 1, "", "batch_tool.py: error: cannot write /dev/stdout: No space left on device\n"),
    ("run --help | true; exit $PIPESTATUS", 1, "", ""),
])
def test_a_stream_that_takes_nothing_does_not_change_the_exit_code(
    redirection: str, code: int, out: str, err: str, work: Path
) -> None:
    requests_file()
    command = f"'{sys.executable}' '{ROOT}/batch_tool.py' {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_json_is_json_in_any_encoding(api: LocalBatchAPI) -> None:
    api.new_batch("in_progress", id="batch_1", metadata={"input_file": "é😀.jsonl"})
    done = run("batch_tool.py", "list", "--json", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert json.loads(done.stdout)["metadata"]["input_file"] == "é😀.jsonl"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_the_interpreter_swallowed_can_be_sent_again() -> None:
    class Callback:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # in which the handler raises, for nobody to catch

    with pytest.raises(batch_tool.Stopped), batch_tool.stopping_on_signals():
        Callback()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.1)  # the second after a first signal is left to the cleaning up
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def bare(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run without any installed package, which the SDK is one of."""
    command = [sys.executable, "-S", "-I", str(ROOT / "batch_tool.py"), *map(str, args)]
    return subprocess.run(command, **{"capture_output": True, "encoding": "utf-8", "timeout": 60} | options)


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["list", "--limit", "x"], 2),
        (["validate", "--in", "requests.jsonl"], 0),
        (["retry", "--in", "requests.jsonl", "--results", "/dev/null", "--out", "out"], 0),
        (["export", "--in", "requests.jsonl", "--results", "/dev/null", "--out", "out"], 0),
    ],
    ids=in_short,
)
def test_what_is_offline_needs_no_sdk_and_no_key(arguments: list[str], code: int, work: Path) -> None:
    requests_file()
    assert bare(*arguments).returncode == code


def test_without_the_sdk_an_online_command_says_how_to_get_it(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    done = bare("list")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"batch_tool.py: error: the openai package cannot be imported \(.*\); pip install -r requirements.txt, "
        r"or use the Python of a virtual environment that has it\n",
        done.stderr,
    )


@pytest.mark.parametrize("command", ["validate", "retry", "export"])
def test_a_closed_stdout_ends_the_program_quietly(command: str, work: Path) -> None:
    requests_file()
    ours, theirs = os.pipe()
    os.close(ours)
    results = [] if command == "validate" else ["--results", "/dev/null", "--out", "-"]
    done = bare(command, "--in", "requests.jsonl", *results, capture_output=False, stdout=theirs,
                stderr=subprocess.PIPE)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("command", ["validate", "retry", "export"])
def test_a_full_disk_behind_stdout_is_one_line(command: str, work: Path) -> None:
    requests_file()
    results = [] if command == "validate" else ["--results", "/dev/null", "--out", "-"]
    with open("/dev/full", "w") as full:
        done = bare(command, "--in", "requests.jsonl", *results, capture_output=False, stdout=full,
                    stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == "batch_tool.py: error: cannot write /dev/stdout: No space left on device\n"


def test_a_full_disk_leaves_the_old_file(work: Path) -> None:
    requests_file(*[request(str(number)) for number in range(500)])
    Path("out").write_text("old")
    command = f"ulimit -f 8; trap '' XFSZ; exec {sys.executable} {ROOT / 'batch_tool.py'} " \
              "retry --in requests.jsonl --results /dev/null --out out"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "batch_tool.py: error: cannot write out: File too large\n")
    assert (Path("out").read_text(), leftovers()) == ("old", [])


def test_a_closed_stdin_is_one_line(work: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {ROOT / 'batch_tool.py'} validate --in - <&-"], capture_output=True, text=True
    )
    error = "batch_tool.py: error: stdin is closed; there is nothing to read\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", error)


@contextlib.contextmanager
def started(*args: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(ROOT / "batch_tool.py"), *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_batch_running_and_says_how_to_go_on(number: signal.Signals, api: LocalBatchAPI) -> None:
    batch = api.new_batch("in_progress", id="batch_1")
    with started("wait", "--batch-id", "batch_1") as process:
        assert process.stderr
        progress = process.stderr.readline()
        process.send_signal(number)
        said = [process.stderr.readline(), process.stderr.readline()]
        process.send_signal(number)  # while the interpreter ends
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 128 + number
    assert progress == "batches: 1 in_progress; 0:00:00 elapsed\n"
    assert said == [
        "the batches go on at the server; to go on waiting: batch_tool.py wait --batch-id batch_1\n",
        "batch_tool.py: stopped\n",
    ]
    assert (batch.status, sent(api, "POST")) == ("in_progress", 0)


def test_a_signal_during_a_download_leaves_the_old_file(api: LocalBatchAPI) -> None:
    done_batch(api)
    Path("results_batch_1.jsonl").write_text("old")
    api.faults.append(Fault("GET", "/content$", action="delay", seconds=30))
    with started("retrieve", "--batch-id", "batch_1") as process:
        until(leftovers)
        until(lambda: sent(api, "GET", "/content$"))
        process.terminate()
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (143, "", "batch_tool.py: stopped\n")
    assert (Path("results_batch_1.jsonl").read_text(), leftovers()) == ("old", [])


def test_a_create_whose_reader_is_gone_is_run_again(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests_file()
    ours, theirs = os.pipe()
    os.close(ours)
    done = run("batch_tool.py", "create", "--in", "requests.jsonl", capture_output=False, stdout=theirs,
               stderr=subprocess.PIPE)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (1, "")
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == ids(only_batch(api))


@pytest.mark.parametrize("around", ["x\n{}", "a%20{}", "Bearer\t{}", "x\u0085{}", "({})"], ids=ascii)
def test_a_secret_is_hidden_also_behind_an_escape(around: str, api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    secret = "sk-proj-ABCDEFGHIJKLMNOPQRSTUV"
    batch = api.new_batch("in_progress", metadata={"note": around.format(secret)})
    assert tool("status", "--verbose", "--json", "--batch-id", batch.id) == 0
    out, err = capsys.readouterr()
    assert "ABCDEFGHIJ" not in out + err + log_text()
    assert json.loads(out)["id"] == batch.id


@pytest.mark.parametrize(("password", "hidden"), [("1", []), ("long-enough", ["long-enough"])])
def test_a_short_password_in_the_url_does_not_garble_the_results(
    password: str, hidden: list[str], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://user:{password}@127.0.0.1:9/v1")
    console = batch_tool.Console(None)
    assert batch_tool.base_url(console) == f"http://user:{password}@127.0.0.1:9/v1"
    assert sorted(set(console.secrets)) == hidden


def test_a_stream_has_its_error_file_in_the_current_folder(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    batch = api.new_batch("completed", output=jsonl(success()), errors=jsonl(refused("a2")))
    assert tool("retrieve", "--batch-id", batch.id, "--out", "/dev/null") == 0
    assert Path(f"errors_{batch.id}.jsonl").read_bytes() == jsonl(refused("a2"))
