"""batch_tool.py, every command but `run`: the SDK talks HTTP to the local mock server; only sleeping moves time on."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import random
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import (
    COMMANDS,
    MODEL,
    OFFLINE,
    ONLINE,
    WITH_JSON,
    FakeTime,
    Killed,
    custom_ids,
    expired,
    flags_of,
    jsonl,
    kill,
    message,
    nothing,
    posts,
    refused,
    request,
    response,
    result,
    sent,
    sha256_of,
    success,
    text,
)
from conftest import KEY, ROOT, run
from local_batch_api import HABITS, Fault, LocalBatch, LocalBatchAPI

import batch_tool

Tool = Callable[..., int]
Capture = pytest.CaptureFixture[str]
Environment = pytest.MonkeyPatch
Json = dict[str, Any]
DAY = 24 * 60 * 60
NOT_SECONDS = "not a number of seconds above 0 and at most 100000000: "
SAMPLE_VALUES = {"--in": "r", "--out": "o", "--results": "s", "--batch-id": "b"}
USAGE = {name: [word for flag in sorted(flags_of(name) & {*SAMPLE_VALUES}) for word in (flag, SAMPLE_VALUES[flag])]
         for name in COMMANDS}


@pytest.fixture
def clock() -> FakeTime:
    return FakeTime()


@pytest.fixture
def tool(work: Path, clock: FakeTime) -> Tool:
    """Run a command line in this process."""
    return lambda *args: batch_tool.main([str(arg) for arg in args], sleep=clock.sleep, clock=clock.clock)


@pytest.fixture
def utc(monkeypatch: Environment) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def in_short(value: object) -> str:
    """The name of a parametrized case."""
    return re.sub(r"[^a-zA-Z0-9]+", " ", str(value))[:40].strip()


def requests_file(*lines: Any, path: str = "requests.jsonl") -> Path:
    """A request file in the work folder; of two requests where none are given."""
    file = Path(path)
    file.write_bytes(jsonl(*(lines or (request("a1"), request("a2")))))
    return file


def only_batch(api: LocalBatchAPI) -> LocalBatch:
    (batch,) = api.batches.values()
    return batch


def last_batch(api: LocalBatchAPI) -> LocalBatch:
    return [*api.batches.values()][-1]


def ids(batch: LocalBatch) -> str:
    """What `create` prints for a batch."""
    return f"File ID: {batch.input_file_id}\nBatch ID: {batch.id}\n"


def asked(api: LocalBatchAPI, method: str, path: str = "") -> int:
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


@contextlib.contextmanager
def started(*args: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The same for the time of the block."""
    with popen(*args, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


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
    assert batch_tool.redact(text) == shown


@pytest.mark.parametrize("space", range(30, 79, 8))
def test_a_key_that_a_cut_would_halve_is_hidden_whole(space: int, monkeypatch: Environment) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "an-ordinary-password-of-a-proxy")
    assert "an-ordin" not in batch_tool.redact(batch_tool.quoted("x" * space + "an-ordinary-password-of-a-proxy"))


@pytest.mark.parametrize(
    "text, shown",
    [
        ("two\n words ", "two words"),
        ("名" * 500, "名" * 200 + " …"),
        ("word " * 100, "word " * 40 + "…"),
        ("HTTP " + "x" * 300, "HTTP " + "x" * 195 + " …"),
        ("x" * 190 + f" {KEY} ", "x" * 190 + " [secret]"),
        ("x" * 190 + KEY, "x" * 190 + "[secret]"),
    ],
)
def test_a_long_text_is_cut_between_words_where_there_are_some(
    text: str, shown: str, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert batch_tool.shorten(text) == shown


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
    with pytest.raises(batch_tool.CommandError), batch_tool.open_output("out") as file:
        file.write(b"new")
        raise batch_tool.CommandError("no")
    assert (Path("out").read_text(), leftovers()) == ("old", [])


def test_a_symlink_is_followed(work: Path) -> None:
    Path("link").symlink_to("out")
    with batch_tool.open_output("link") as file:
        file.write(b"new")
    assert (Path("link").is_symlink(), Path("out").read_text()) == (True, "new")


def test_a_symlink_to_itself_is_an_error(work: Path) -> None:
    Path("link").symlink_to("link")
    with pytest.raises(batch_tool.CommandError, match="link: Too many levels"), batch_tool.open_output("link") as file:
        file.write(b"new")
    assert (Path("link").is_symlink(), leftovers()) == (True, [])


def test_a_pause_of_the_program_that_writes_to_stdin_is_not_the_end(work: Path) -> None:
    lines = [jsonl(request("a1")), jsonl(request("a2"))]
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    command = [sys.executable, str(ROOT / "batch_tool.py"), "validate", "--in", "-"]
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
        assert capsys.readouterr() == ("", error(f"cannot read {unreadable}: Input/output error"))


def test_a_part_of_a_file_reads_as_a_file_of_its_own(work: Path) -> None:
    path = requests_file(b"0123456789")
    with path.open("rb") as file:
        part = batch_tool.FilePart(file, 2, 5)
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
        (request(""), "invalid_request: custom_id is not a non-empty string"),
        (request(7), "invalid_request: custom_id is not a non-empty string"),
        (request("b", method="GET"), 'invalid_request: method is "GET", not "POST"'),
        (request("b", url="/v1/embeddings"), 'url_mismatch: url is "/v1/embeddings", not /v1/responses'),
        (request("b", url=None), "url_mismatch: url is null, not /v1/responses"),
        (request("b", body=[]), "invalid_request: body is not a JSON object"),
        (request("b", body={"model": MODEL, "stream": True}), "invalid_request: body.stream is true"),
        (request("b", body={"model": "x"}), f'model_mismatch: model is "x", not "{MODEL}"; a batch has one model'),
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
    assert (out, last + "\n") == ("", error("requests.jsonl: 1 error; correct the file; nothing was uploaded"))
    assert first.startswith(f"line 2: {problem}")


def test_an_empty_file_is_an_error(tool: Tool, capsys: Capture) -> None:
    assert tool("validate", "--in", "/dev/null") == 1
    last = error("/dev/null: 1 error; correct the file; nothing was uploaded")
    assert capsys.readouterr() == ("", f"line 1: empty_file: the file has no requests\n{last}")


def test_a_line_longer_than_a_batch_may_be_is_an_error() -> None:
    line = jsonl(request())
    (problem,) = batch_tool.InputCheck(max_bytes=len(line) - 1).problems([line])
    assert str(problem) == f"line 1: invalid_request: {len(line)} bytes; the limit of a batch is {len(line) - 1}"


def test_the_first_twenty_errors_are_shown_and_then_a_count(tool: Tool, capsys: Capture) -> None:
    requests_file(*[b"{\n"] * 23)
    assert tool("validate", "--in", "requests.jsonl") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[19].startswith("line 20: ")
    assert lines[20] == "… and 3 more"
    assert lines[21:] == error("requests.jsonl: 23 errors; correct the file; nothing was uploaded").splitlines()


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"artist_id,artist_name\r\na1,NewJeans\r\n" * 20,
         "not JSONL; it looks like a CSV: convert it with gen_batch_jsonl.py first"),
        (b"\xef\xbb\xbfid;name\n" * 9, "not JSONL; it looks like a CSV: convert it with gen_batch_jsonl.py first"),
        (b"\xff\xfea\0,\0\n\0" * 9,
         "UTF-16, but JSONL is UTF-8; if it is a CSV, convert it with gen_batch_jsonl.py"),
        (b"PK\x03\x04\x14\n\n\n",
         "an Excel workbook or a zip file, not JSONL; save it as CSV and convert it with gen_batch_jsonl.py"),
        (b"\x1f\x8b\x08\n\n", "a gzip file, not JSONL; decompress it first"),
        (b'\xef\xbb\xbf{"custom_id": "a1"}\n',
         "the file begins with a byte-order mark; save it without one"),
        (b"NewJeans\n" * 9, "not JSONL; is this the request file that gen_batch_jsonl.py wrote?"),
    ],
    ids=in_short,
)
@pytest.mark.parametrize("command", ["validate", "create"])
def test_a_file_of_another_kind_is_one_error_that_says_what_to_do(
    content: bytes, problem: str, command: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    Path("artists").write_bytes(content)
    assert tool(command, "--in", "artists") == 1
    last = error("artists: 1 error; correct the file; nothing was uploaded")
    assert capsys.readouterr() == ("", f"line 1: invalid_json_line: {problem}\n{last}")
    assert api.exchanges == []


def test_requests_without_a_model_draw_one_warning(tool: Tool, capsys: Capture) -> None:
    requests_file(request("a1", body={}), request("a2", body={}))
    assert tool("validate", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().err == warning("2 requests without body.model, which the Batch API refuses")


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


def test_stdin_is_validated(tool: Tool, capsys: Capture, monkeypatch: Environment) -> None:
    with requests_file().open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert tool("validate", "--in", "-") == 0
    assert capsys.readouterr().out.startswith("OK: 2 requests, ")


@pytest.mark.parametrize("path, reason", [("nope", "No such file or directory"), (".", "Is a directory")])
def test_an_input_that_cannot_be_read_is_one_line(path: str, reason: str, tool: Tool, capsys: Capture) -> None:
    assert tool("validate", "--in", path) == 1
    assert capsys.readouterr() == ("", error(f"cannot read {path}: {reason}"))


def test_parts_are_consecutive_lines_within_the_most_requests() -> None:
    lines = [jsonl(request(str(number))) for number in range(5)]
    check = batch_tool.InputCheck(max_requests=2)
    assert list(check.problems(lines)) == []
    first, second, third = check.divider.parts()
    assert (first.label, second.label, third.label) == ("1/3", "2/3", "3/3")
    assert (second.offset, second.size, second.first, second.requests) == (first.size, len(lines[2] + lines[3]), 2, 2)
    assert second.sha256 == hashlib.sha256(lines[2] + lines[3]).hexdigest()


def test_parts_stay_within_the_most_bytes() -> None:
    lines = [jsonl(request(custom_id)) for custom_id in ("a1", "a2", "a3")]
    check = batch_tool.InputCheck(max_bytes=2 * len(lines[0]))
    assert list(check.problems(lines)) == []
    assert [(part.requests, part.size) for part in check.divider.parts()] == [
        (2, 2 * len(lines[0])), (1, len(lines[2]))
    ]


# -- the API ------------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_asked(
    api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin-0123456789abcdef")  # which the SDK would take in its place
    assert tool("list") == 1
    reason = "OPENAI_API_KEY is not set; export it with the key of your OpenAI project"
    assert capsys.readouterr() == ("", error(reason))
    assert api.exchanges == []


def test_a_key_with_blanks_around_it_is_trimmed(api: LocalBatchAPI, tool: Tool, monkeypatch: Environment) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\r\n")
    assert tool("list") == 0
    assert api.exchanges[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("char", ["\n", "\x1b", "\x7f", "é", "\u200b"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(
    char: str, api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY[:9]}{char}{KEY[9:]}")
    assert tool("list") == 1
    assert capsys.readouterr() == ("", error("OPENAI_API_KEY contains control or non-ASCII characters; set it again"))
    assert api.exchanges == []


def test_organization_and_project_are_sent(api: LocalBatchAPI, tool: Tool, monkeypatch: Environment) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1\n")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    assert tool("list") == 0
    headers = api.exchanges[0].headers
    assert (headers["openai-organization"], headers["openai-project"]) == ("org-1", "proj-1")


def test_an_organization_that_no_header_can_carry_is_one_line(
    api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "é")
    assert tool("list") == 1
    assert capsys.readouterr().err == error("OPENAI_ORG_ID contains control or non-ASCII characters; set it again")


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://x", "http://", "http://[::1", "http://h:99999/v1", "http://a b/v1", "http://é/v1",
            "http://.../v1", "http://h/\x1b", "http://" + "a" * 70 + "/v1"]
)
def test_a_malformed_base_url_is_one_line(
    url: str, api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    assert tool("list") == 1
    reason = "OPENAI_BASE_URL is not a URL like https://api.openai.com/v1; set it again or unset it"
    assert capsys.readouterr() == ("", error(reason))


def test_an_unreachable_server_is_named_without_its_password(
    api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:pass%40word@127.0.0.1:1/v1")
    assert tool("list") == 1
    _, err = capsys.readouterr()
    assert err == error("cannot reach http://127.0.0.1:1/v1/: [Errno 111] Connection refused")
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
    name: str, value: str, words: str, api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv(name, value)
    assert tool("list") == 1
    _, err = capsys.readouterr()
    assert err.startswith("batch_tool.py: error: cannot set up the API client: ")
    assert words in err
    assert err.endswith("; check the proxy and certificate variables\n")
    assert err.count("\n") == 1
    assert "password" not in err


def test_a_refused_key_is_named_and_hidden(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.key = "another"
    assert tool("list") == 1
    reason = "LIST_BATCHES: HTTP 401: Incorrect API key provided. (invalid_api_key); check OPENAI_API_KEY"
    assert capsys.readouterr() == ("", error(reason))
    assert asked(api, "GET") == 1


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
    fault: Json, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", "/batches$", times=2, **fault))
    assert tool("list") == 0
    assert capsys.readouterr() == ("No batches found.\n", "")
    api.faults[:] = [Fault("GET", "/batches$", times=9, **fault)]
    assert tool("list") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"batch_tool.py: error: .*\w.*\n", err)
    assert asked(api, "GET") == 6


def test_a_server_that_dies_while_answering_is_named(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("GET", times=9, action="reset"))
    assert tool("list") == 1
    reason = f"LIST_BATCHES: no response from {api.base_url}/: [Errno 104] Connection reset by peer"
    assert capsys.readouterr().err == error(reason)


def test_a_rate_limit_is_waited_out_as_the_server_says(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=429, times=2, headers={"Retry-After": "200"}, message="Slow down"))
    assert tool("list") == 0
    assert clock.naps == [200, 200]
    reason = "LIST_BATCHES: HTTP 429: Slow down (rate_limit_exceeded); trying again in 200 s"
    assert capsys.readouterr().err == warning(reason) * 2


def test_a_rate_limit_with_a_date_is_waited_out(api: LocalBatchAPI, tool: Tool, clock: FakeTime) -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    api.faults.append(Fault("GET", status=429, headers={"Retry-After": date}))
    assert tool("list") == 0
    (nap,) = clock.naps
    assert 55 < nap <= 60


@pytest.mark.parametrize("header", ["nan", "inf", "-5", "soon", "0", "", f"Mon, 01 Jan 2024 00:00:00 +{'9' * 20}"])
def test_a_senseless_retry_after_is_not_obeyed(header: str, api: LocalBatchAPI, tool: Tool, clock: FakeTime) -> None:
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
    err = capsys.readouterr().err
    assert err.startswith("batch_tool.py: error: batch_1: GET_STATUS: ")
    assert f"{api.base_url}/" in err


def test_fields_that_no_batch_has_are_kept_and_do_no_harm(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    body = {"id": "b1", "status": "in_progress", "_fields_set": 5, "self": 1, "new": {"deep": [None]}}
    api.faults.append(Fault("GET", status=200, body=json.dumps(body).encode()))
    assert tool("status", "--batch-id", "b1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == body


def test_what_is_too_deep_to_be_written_is_said_to_be() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert batch_tool.quoted(value) == '"nested too deeply"'


@pytest.mark.parametrize(
    "seconds, naps, advice",
    [
        ("250", [250, 250], ""),
        ("601", [], "; it asks to wait 11 minutes"),
        ("1", [1, 1, 2, 4, 8, 16, 32, *[60] * 8], ""),
    ],
)
def test_a_rate_limit_is_waited_out_ten_minutes_at_most(
    seconds: str, naps: list[float], advice: str, api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=429, times=99, headers={"Retry-After": seconds}, message="Slow down"))
    assert tool("list") == 1
    assert clock.naps == naps
    *warnings, last = capsys.readouterr().err.splitlines(keepends=True)
    reason = "LIST_BATCHES: HTTP 429: Slow down (rate_limit_exceeded)"
    assert warnings == [warning(f"{reason}; trying again in {nap} s") for nap in naps]
    assert last == error(reason + advice)


def test_a_pause_is_shown_in_whole_seconds_but_never_as_none(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=429, message="Slow down"))
    assert tool("list") == 0
    assert clock.naps == [0.5]
    assert capsys.readouterr().err.endswith("; trying again in 1 s\n")


def test_a_used_up_quota_is_not_a_rate_limit(api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture) -> None:
    api.faults.append(Fault("GET", status=429, times=9, code="insufficient_quota", message="Pay first."))
    assert tool("list") == 1
    assert clock.naps == []
    assert capsys.readouterr().err == error("LIST_BATCHES: HTTP 429: Pay first. (insufficient_quota)")


@pytest.mark.parametrize("size", [100, 1_000_000], ids=["short", "5 MB"])
def test_an_answer_that_is_a_page_is_shown_in_part_and_on_one_line(
    size: int, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    page = b"<html>\n<body>\x1b[31m Not  here\n" + b"word " * size
    api.faults.append(Fault("GET", status=403, body=page, headers={"Content-Type": "text/html"}))
    assert tool("list") == 1
    _, err = capsys.readouterr()
    assert err.startswith(r"batch_tool.py: error: LIST_BATCHES: HTTP 403: <html> <body>\u001b[31m Not here word word ")
    assert err.endswith("word …\n")
    assert (err.count("\n"), len(err) < 300) == (1, True)


def test_a_long_error_code_is_shortened(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("GET", status=403, message="No", code="c" * 5000))
    assert tool("list") == 1
    assert capsys.readouterr().err == error(f"LIST_BATCHES: HTTP 403: No ({'c' * 200} …)")


def test_a_message_of_3_mb_is_shortened(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("GET", status=403, message="No way. " * 400_000))
    assert tool("list") == 1
    _, err = capsys.readouterr()
    assert err.startswith("batch_tool.py: error: LIST_BATCHES: HTTP 403: No way. No way. ")
    assert err.endswith(" … (forbidden)\n")
    assert len(err) < 300


@pytest.mark.parametrize("base", ["", "/v2", "/v1/v1"])
def test_an_endpoint_that_is_missing_names_the_base_url(
    base: str, api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    url = f"http://127.0.0.1:{api.port}{base}" + ("/" if base else "")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    invalid = f"Invalid URL (GET {base}/batches)"
    assert tool("list") == 1
    assert capsys.readouterr() == ("", error(
        f"LIST_BATCHES: HTTP 404: {invalid}; is {url} the base URL of the API?"
    ))


@pytest.mark.parametrize(
    "status, body, words",
    [
        (404, b'{"detail": "Not Found"}', "Not Found"),
        (404, b"", "Not Found"),
        (404, b"404 page not found\n", "404 page not found"),
        (404, b"<html>\n<h1>Not here</h1>", "<html> <h1>Not here</h1>"),
        (405, b'{"detail": "Method Not Allowed"}', "Method Not Allowed"),
        (405, b'{"error": {"message": "No."}}', "No."),
    ],
    ids=in_short,
)
def test_an_endpoint_that_a_service_lacks_is_told_with_the_base_url(
    status: int, body: bytes, words: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=status, body=body))
    assert tool("status", "--batch-id", "b") == 1
    reason = f"b: GET_STATUS: HTTP {status}: {words}; is {api.base_url}/ the base URL of the API?"
    assert capsys.readouterr() == ("", error(reason))


@pytest.mark.parametrize("body", [{"detail": "Batch b not found"}, {"error": "Batch b not found"},
                                  {"error": {"message": "Batch b not found"}}], ids=in_short)
def test_a_batch_that_is_unknown_does_not_make_the_base_url_doubtful(
    body: Json, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=404, body=json.dumps(body).encode()))
    assert tool("status", "--batch-id", "b") == 1
    assert capsys.readouterr() == ("", error("b: GET_STATUS: HTTP 404: Batch b not found"))


@pytest.mark.parametrize("location", ["http://localhost:{port}/v1/batches", "http://127.0.0.1:{other}/v1/batches",
                                      "https://127.0.0.1:{port}/v1/batches", "//localhost:{port}/v1/batches"])
def test_a_redirect_to_another_server_is_not_followed(
    location: str, api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    with LocalBatchAPI() as other:
        other.new_batch("completed")
        headers = {"Location": location.format(port=api.port, other=other.port)}
        api.faults.append(Fault("GET", status=307, headers=headers, body=b""))
        assert tool("list") == 1
        assert (len(api.exchanges), other.exchanges) == (1, [])
    reason = "LIST_BATCHES: HTTP 307: this redirect is not followed"
    assert capsys.readouterr() == ("", error(f"{reason}; is {api.base_url}/ the base URL of the API?"))


@pytest.mark.parametrize("location", ["/v1/batches", "?limit=20", "http://127.0.0.1:{port}/v1/batches"])
def test_a_redirect_to_the_same_server_is_followed(
    location: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=308, headers={"Location": location.format(port=api.port)}))
    assert tool("list") == 0
    assert capsys.readouterr() == ("No batches found.\n", "")


@pytest.mark.parametrize("location", ["http://[", "http://h:x/", "\x7f"], ids=ascii)
def test_a_redirect_to_nowhere_is_one_line(location: str, api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("GET", status=302, headers={"Location": location}, times=9))
    assert tool("list") == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.startswith("batch_tool.py: error: LIST_BATCHES: ")) == ("", 1, True)


def test_verbose_shows_each_response(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    assert tool("list", "--verbose") == 0
    name, _, shown = capsys.readouterr().err.partition(": ")
    assert (name, json.loads(shown)) == ("LIST_BATCHES", api.exchanges[0].answer_json)


# -- preview ------------------------------------------------------------------------------------------------------


def bio_of(name: str) -> str:
    """The bio that the mock server makes up for the artist of a request."""
    return f"Artist {name}: a made-up bio from the local mock server; no model was asked."


def nine_requests(**changes: Any) -> list[Json]:
    """A request file whose requests have bodies of the same size."""
    requests = [request(f"a{number}", **changes) for number in range(1, 10)]
    requests_file(*requests)
    return requests


def sending(number: int) -> str:
    return f"sending {number} request{'' if number == 1 else 's'} right away, at the ordinary price, not as a batch\n"


NO_ESTIMATE = "no response says how many tokens it used, so there is no estimate\n"


def test_preview_shows_the_answers_and_estimates_the_whole(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests = nine_requests()
    assert tool("preview", "--in", "requests.jsonl") == 0
    input_tokens = 9 * (api.exchanges[-1].size // 4)
    assert capsys.readouterr() == (
        f"a2 Artist a2\n{bio_of('a2')}\n\na5 Artist a5\n{bio_of('a5')}\n\na8 Artist a8\n{bio_of('a8')}\n",
        f"{sending(3)}9 requests: about {input_tokens} input and 405 (405 to 405) output tokens, by 3 answers\n",
    )
    assert api.answered == [requests[number]["body"] for number in (1, 4, 7)]
    assert (posts(api, "/v1/responses"), api.files, api.batches) == (3, {}, {})


@pytest.mark.parametrize(
    "count, total, positions",
    [(1, 9, {4}), (3, 9, {1, 4, 7}), (3, 4, {0, 2, 3}), (3, 3, {0, 1, 2}), (9, 2, {0, 1}), (2, 1000, {250, 750})],
)
def test_the_requests_are_spread_evenly(count: int, total: int, positions: set[int]) -> None:
    assert batch_tool.spread_evenly(count, total) == positions


def test_more_requests_than_there_are_are_all(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests_file()
    assert tool("preview", "--in", "requests.jsonl", "--requests", 9) == 0
    assert capsys.readouterr().err.startswith(sending(2))
    assert len(api.answered) == 2


USAGES = [batch_tool.Usage(100, 40, 100), batch_tool.Usage(300, 120, 149), batch_tool.Usage(200, 80, 99)]


@pytest.mark.parametrize(
    "prices, cost",
    [
        (None, ""),
        ((0.05, 0.25), "; about $0.17"),
        ((500.0, 2500.0), "; about $1,749.28"),
        ((0.0, 0.0), "; less than $0.01"),
    ],
)
def test_the_estimate_is_in_proportion_to_bytes_and_by_the_mean(prices: Any, cost: str) -> None:
    text = "3,532 requests: about 1,450,000 input and 410,000 (350,000 to 526,000) output tokens, by 3 answers"
    assert batch_tool.estimate(USAGES, 3_625_000, 3532, prices) == text + cost


def test_the_prices_are_dollars_for_a_million_tokens(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    nine_requests()
    assert tool("preview", "--in", "requests.jsonl", "--prices", "0,10000") == 0
    assert capsys.readouterr().err.endswith("(405 to 405) output tokens, by 3 answers; about $4.05\n")


@pytest.mark.parametrize(
    "answer, shown, code",
    [
        ("400", "error: bad_request: Bad Request, as the local mock server was told to.", 1),
        ("refusal", "error: refusal: Refused, as the local mock server was told to.", 1),
        ("no_text", "error: no_text", 1),
        ("error_200", "error: server_error: Internal Server Error, as the local mock server was told to.", 1),
        ("incomplete", "Artist a1: a made-up bio from the\nerror: incomplete: max_output_tokens", 1),
        ("content_filter", "Artist a1: a made-up\nerror: incomplete: content_filter", 1),
        ("200", bio_of("a1"), 0),
    ],
)
def test_an_answer_without_a_bio_shows_its_error_and_is_exit_1_if_it_is_the_only_one(
    answer: str, shown: str, code: int, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file(request())
    api.answers = [answer]
    assert tool("preview", "--in", "requests.jsonl") == code
    assert capsys.readouterr().out == f"a1 Artist a1\n{shown}\n"
    assert len(api.answered) == 1


@pytest.mark.parametrize("status", [413, 422])
def test_a_request_that_is_refused_by_itself_does_not_keep_the_others_from_being_sent(
    status: int, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    api.faults.append(Fault("POST", status=status, message="Too long", code="too_long"))
    assert tool("preview", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == f"a1 Artist a1\nerror: too_long: Too long\n\na2 Artist a2\n{bio_of('a2')}\n"


def test_one_success_is_enough(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests_file()
    api.answers = ["400"]
    assert tool("preview", "--in", "requests.jsonl") == 0
    out, err = capsys.readouterr()
    assert out.endswith(f"\n\na2 Artist a2\n{bio_of('a2')}\n")
    assert err.endswith(" output tokens, by 1 answer\n")


def test_an_answer_is_shown_on_lines_of_its_own_without_control_characters(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file(request("a\n1", body={"model": MODEL, "metadata": {"artist_name": "\x1b[31m"}}))
    body = json.dumps({"output": [message(text(f"\n뉴진스\r\nand \x1b[0m{KEY}\n\n"))]}).encode()
    api.faults.append(Fault("POST", "/responses$", status=200, body=body))
    assert tool("preview", "--in", "requests.jsonl") == 0
    assert capsys.readouterr() == (
        "a\\n1 \\u001b[31m\n뉴진스\nand \\u001b[0m[secret]\n", f"{sending(1)}{NO_ESTIMATE}"
    )


def test_a_rate_limit_is_waited_out_before_an_answer(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    requests_file(request())
    api.faults.append(Fault("POST", status=429, headers={"Retry-After": "9"}))
    assert tool("preview", "--in", "requests.jsonl") == 0
    assert clock.naps == [9]


@pytest.mark.parametrize(
    "lost",
    [{"status": 500}, {"status": 503}, {"status": 408}, {"status": 409}, {"action": "reset"}, {"action": "cut"},
     {"status": 200, "body": b"<html>"}],
    ids=in_short,
)
def test_an_answer_that_is_lost_is_not_asked_for_again(
    lost: Json, api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/responses$", when="after", **lost))
    assert tool("preview", "--in", "requests.jsonl", "--out", "results.jsonl") == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert re.fullmatch(r"a1 Artist a1\nerror: outcome_unknown: .*", first)
    assert second == f"a2 Artist a2\n{bio_of('a2')}\n"
    assert (posts(api, "/v1/responses"), clock.naps) == (2, [])
    assert custom_ids(Path("results.jsonl").read_bytes()) == ["a2"]


@pytest.mark.parametrize("status", [400, 422])
def test_a_refusal_that_is_a_page_ends_the_command(
    status: int, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/responses$", status=status, body=b"<html>Bad request</html>"))
    assert tool("preview", "--in", "requests.jsonl") == 1
    assert capsys.readouterr() == ("", sending(2) + error(f"PREVIEW: HTTP {status}: <html>Bad request</html>"))


def test_a_server_that_cannot_be_reached_ends_the_preview(
    tool: Tool, clock: FakeTime, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    requests_file()
    assert tool("preview", "--in", "requests.jsonl") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{sending(2)}batch_tool.py: error: cannot reach http://127.0.0.1:9/v1/: ")


def test_a_lone_surrogate_is_sent_as_it_stands_in_the_file(api: LocalBatchAPI, tool: Tool) -> None:
    requests_file(request(body={"model": MODEL, "input": "\udfff"}))
    assert tool("preview", "--in", "requests.jsonl") == 0
    assert api.answered == [{"model": MODEL, "input": "\udfff"}]


@pytest.mark.parametrize("model", [".", "..", "a/../b", "%2e"])
def test_a_model_that_cannot_be_looked_at_is_sent_all_the_same(model: str, api: LocalBatchAPI, tool: Tool) -> None:
    requests_file(request(body={"model": model, "input": "Who?"}))
    assert tool("preview", "--in", "requests.jsonl") == 0
    assert [body["model"] for body in api.answered] == [model]


def test_a_pipe_takes_all_answers(api: LocalBatchAPI, tool: Tool) -> None:
    requests_file()
    os.mkfifo("pipe")
    with subprocess.Popen(["cat", "pipe"], stdout=subprocess.PIPE) as reader:
        assert tool("preview", "--in", "requests.jsonl", "--out", "pipe") == 0
        assert custom_ids(reader.communicate(timeout=30)[0]) == ["a1", "a2"]


def test_an_answer_that_cannot_be_kept_is_shown(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests_file()
    assert tool("preview", "--in", "requests.jsonl", "--out", "/dev/full") == 1
    out, err = capsys.readouterr()
    assert out == f"a1 Artist a1\n{bio_of('a1')}\n"
    assert err == sending(2) + error("cannot write /dev/full: No space left on device")


@pytest.mark.parametrize("status, reason", [
    (401, "PREVIEW: HTTP 401: No (no); check OPENAI_API_KEY"),
    (403, "PREVIEW: HTTP 403: No (no)"),
    (404, "PREVIEW: HTTP 404: No (no)"),
])
def test_a_refusal_that_is_not_of_one_request_ends_the_command(
    status: int, reason: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/responses$", status=status, message="No", code="no"))
    assert tool("preview", "--in", "requests.jsonl") == 1
    assert capsys.readouterr() == ("", sending(2) + error(reason))
    assert posts(api, "/v1/responses") == 1


def test_a_base_url_without_its_version_is_named(
    api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    url = f"http://127.0.0.1:{api.port}"
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    requests_file()
    assert tool("preview", "--in", "requests.jsonl") == 1
    reason = f"PREVIEW: HTTP 404: Invalid URL (POST /responses); is {url} the base URL of the API?"
    assert capsys.readouterr() == ("", sending(2) + error(reason))


@pytest.mark.parametrize("slash", ["", "/"])
def test_chat_completions_are_previewed(
    slash: str, api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", api.base_url + slash)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Artist a1"}]}
    requests_file(request(url="/v1/chat/completions", body=body))
    assert tool("preview", "--in", "requests.jsonl") == 0
    out, err = capsys.readouterr()
    assert out == f"a1\n{bio_of('a1')}\n"
    assert re.search(r"\n1 request: about \d+ input and 45 \(45 to 45\) output tokens, by 1 answer\n", err)
    assert (posts(api, "/v1/chat/completions"), api.answered) == (1, [body])


def test_a_dead_model_is_an_error_before_anything_is_sent(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    nine_requests(body={"model": "local-dead", "input": "Who?"})
    assert tool("preview", "--in", "requests.jsonl") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f'batch_tool.py: error: the model "local-dead" does not exist at {api.base_url}/; ')
    assert asked(api, "POST") == 0


def test_a_dying_model_draws_a_warning(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    nine_requests(body={"model": "local-dying", "input": "Who?"})
    assert tool("preview", "--in", "requests.jsonl") == 0
    reason = f'the model "local-dying" will be shut down on {api.models["local-dying"]}; choose a newer one'
    assert capsys.readouterr().err.startswith(warning(reason) + sending(3))


def test_the_answers_are_kept_and_not_paid_for_again(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests = nine_requests()
    assert tool("preview", "--in", "requests.jsonl", "--out", "results.jsonl") == 0
    lines = [json.loads(line) for line in Path("results.jsonl").read_bytes().splitlines()]
    assert [(line["custom_id"], list(line)[-1], line["request_sha256"]) for line in lines] == [
        (f"a{number}", "request_sha256", sha256_of(jsonl(requests[number - 1]))) for number in (2, 5, 8)
    ]
    first = capsys.readouterr()
    assert tool("preview", "--in", "requests.jsonl", "--out", "results.jsonl") == 0
    assert capsys.readouterr() == (first.out, first.err.removeprefix(sending(3)))
    assert tool("run", "--in", "requests.jsonl", "--out", "results.jsonl") == 0
    assert (sent(api), len(api.answered)) == ([["a1", "a3", "a4", "a6", "a7", "a9"]], 3)
    assert custom_ids(Path("results.jsonl").read_bytes()) == [f"a{number}" for number in range(1, 10)]


def test_what_out_has_stays_in_it_and_a_changed_request_is_sent(api: LocalBatchAPI, tool: Tool) -> None:
    requests_file(request())
    old = jsonl(success(request_sha256="0" * 64)).rstrip()
    Path("results.jsonl").write_bytes(old)
    assert tool("preview", "--in", "requests.jsonl", "--out", "results.jsonl") == 0
    before, after = Path("results.jsonl").read_bytes().splitlines()
    assert (before, json.loads(after)["request_sha256"]) == (old, sha256_of(jsonl(request())))


def test_a_rejected_answer_is_kept_and_a_failed_one_is_sent_again(api: LocalBatchAPI, tool: Tool) -> None:
    requests_file()
    api.answers = ["incomplete", "failed"]
    assert tool("preview", "--in", "requests.jsonl", "--out", "results.jsonl") == 1
    assert tool("preview", "--in", "requests.jsonl", "--out", "results.jsonl") == 0
    assert [body["metadata"]["artist_name"][-2:] for body in api.answered] == ["a1", "a2", "a2"]


def test_the_answers_before_ctrl_c_are_kept(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    nine_requests()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in a background job
    api.faults.append(Fault("POST", skip=1, status=429, headers={"Retry-After": "9"}, message="Slow"))
    clock.events = [lambda: os.kill(os.getpid(), signal.SIGINT)]
    assert tool("preview", "--in", "requests.jsonl", "--out", "results.jsonl") == 130
    slow = warning("PREVIEW: HTTP 429: Slow (rate_limit_exceeded); trying again in 9 s")
    assert capsys.readouterr() == (f"a2 Artist a2\n{bio_of('a2')}\n", f"{sending(3)}{slow}batch_tool.py: stopped\n")
    assert custom_ids(Path("results.jsonl").read_bytes()) == ["a2"]


def test_out_on_stdout_has_the_results_and_stderr_the_texts(
    api: LocalBatchAPI, tool: Tool, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    requests_file(request())
    assert tool("preview", "--in", "requests.jsonl", "--out", "-") == 0
    out, err = capfdbinary.readouterr()
    assert custom_ids(out) == ["a1"]
    assert err.decode().startswith(f"{sending(1)}a1 Artist a1\n{bio_of('a1')}\n1 request: about ")


def test_an_out_that_holds_something_else_is_refused_before_anything_is_sent(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    Path("artists.csv").write_text("artist_id\n")
    assert tool("preview", "--in", "requests.jsonl", "--out", "artists.csv") == 1
    assert capsys.readouterr() == ("", error(
        "artists.csv line 1: not valid JSON: Expecting value (character 1 of the line); it holds something other than "
        "results, so it was left as it is; choose another --out"
    ))
    assert (api.exchanges, Path("artists.csv").read_text()) == ([], "artist_id\n")


def test_an_invalid_file_is_not_previewed(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    requests_file(request(), request())
    assert tool("preview", "--in", "requests.jsonl") == 1
    assert capsys.readouterr().err.startswith(f"line 2: duplicate_custom_id: {DUPLICATE}\n")
    assert api.exchanges == []


# -- create -------------------------------------------------------------------------------------------------------


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def times_paid(api: LocalBatchAPI) -> list[int]:
    """How often each request was paid for, once every batch has ended."""
    for batch in api.batches.values():
        api.look(batch)
    return sorted(api.paid.values())


def test_create_prints_the_ids_and_uploads_the_file_as_it_is(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    path = requests_file()
    assert tool("create", "--in", path) == 0
    batch = only_batch(api)
    assert capsys.readouterr() == (ids(batch), "")
    assert (batch.endpoint, batch.completion_window) == ("/v1/responses", "24h")
    assert batch.metadata == {"input_sha256": sha256(path.read_bytes()), "input_file": path.name, "part": "1/1"}
    assert api.read_file(batch.input_file_id) == path.read_bytes()
    assert (api.files[batch.input_file_id].purpose, api.files[batch.input_file_id].filename) == ("batch", path.name)


def test_create_as_json_is_the_batch_as_the_api_gave_it(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    assert tool("create", "--in", requests_file(), "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == api.exchanges[-1].answer_json


def test_the_endpoint_and_the_completion_window_can_be_chosen(api: LocalBatchAPI, tool: Tool) -> None:
    path = requests_file(request(url="/v1/chat/completions"))
    assert tool("create", "--in", path, "--endpoint", "/v1/chat/completions", "--completion-window", "24h") == 0
    assert only_batch(api).endpoint == "/v1/chat/completions"


def test_a_completion_window_that_the_api_refuses_is_an_error_and_the_file_is_deleted(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    assert tool("create", "--in", requests_file(), "--completion-window", "1h") == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"File ID: file-\w+\n", out)
    words = "Invalid value for 'completion_window': only '24h' is supported."
    assert err == error(f"CREATE_BATCH: HTTP 400: {words}")
    assert (api.files, api.batches) == ({}, {})


def test_a_file_whose_id_cannot_be_printed_is_deleted(api: LocalBatchAPI, work: Path) -> None:
    requests_file()
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, str(ROOT / "batch_tool.py"), "create", "--in", "requests.jsonl"],
                              stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, error("cannot write stdout: No space left on device"))
    assert (asked(api, "POST", "/files"), asked(api, "DELETE", "/files/"), api.files) == (1, 1, {})


def test_a_file_beyond_the_most_requests_becomes_several_batches(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    lines = [request(str(number)) for number in range(5)]
    path = requests_file(*lines)
    assert tool("create", "--in", path, "--max-requests", 2) == 0
    batches = list(api.batches.values())
    assert capsys.readouterr() == ("".join(map(ids, batches)), "")
    parts = [jsonl(*lines[:2]), jsonl(*lines[2:4]), jsonl(*lines[4:])]
    assert [api.read_file(batch.input_file_id) for batch in batches] == parts
    assert [batch.metadata for batch in batches] == [
        {
            "input_sha256": sha256(part),
            "input_file": "requests.jsonl",
            "part": f"{number}/3",
            "request_file_sha256": sha256(path.read_bytes()),
        }
        for number, part in enumerate(parts, 1)
    ]


def test_stdin_is_submitted(api: LocalBatchAPI, tool: Tool, monkeypatch: Environment) -> None:
    with requests_file().open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert tool("create", "--in", "-") == 0
    batch = only_batch(api)
    assert batch.metadata and batch.metadata["input_file"] == "stdin"
    assert api.read_file(batch.input_file_id) == Path("requests.jsonl").read_bytes()


@pytest.mark.parametrize("name", [b"\xff.jsonl", b"a\nb.jsonl", '뉴진스 "x".jsonl'.encode()], ids=in_short)
def test_a_file_of_any_name_is_submitted(name: bytes, api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    assert tool("create", "--in", requests_file(path=os.fsdecode(name))) == 0
    assert capsys.readouterr().out == ids(only_batch(api))


# the model


def test_a_model_that_does_not_exist_is_an_error_before_the_upload(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    path = requests_file(request(body={"model": "local-dead", "input": "Who?"}))
    assert tool("create", "--in", path) == 1
    advice = "choose another --model in gen_batch_jsonl.py; nothing was sent"
    reason = f'the model "local-dead" does not exist at {api.base_url}/; {advice}'
    assert capsys.readouterr() == ("", error(reason))
    assert (asked(api, "POST"), asked(api, "GET", "/v1/models/local-dead$")) == (0, 1)


@pytest.mark.parametrize("days, words", [(-1, "was"), (0, "will be"), (29, "will be"), (32, "")])
def test_a_model_that_is_soon_shut_down_draws_a_warning(
    days: int, words: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    date = time.strftime("%Y-%m-%d", time.localtime(time.time() + days * DAY))
    api.models[MODEL] = date
    assert tool("create", "--in", requests_file()) == 0
    reason = f'the model "{MODEL}" {words} shut down on {date}; choose a newer one'
    assert capsys.readouterr() == (ids(only_batch(api)), warning(reason) if words else "")


@pytest.mark.parametrize(
    "answer",
    [{"status": 404}, {"status": 403}, {"status": 429}, {"status": 500}, {"action": "reset"},
     {"status": 200, "body": b"<html>"}, {"status": 200, "body": b'{"shutdown_date": "soon"}'},
     {"status": 200, "body": b'{"shutdown_date": 5}'}],
    ids=in_short,
)
def test_any_other_answer_about_the_model_changes_nothing(
    answer: Json, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", "/models/", times=9, **answer))
    assert tool("create", "--in", requests_file()) == 0
    assert capsys.readouterr() == (ids(only_batch(api)), "")
    assert asked(api, "GET", "/models/") == 1


# uploads and refusals


def test_an_upload_whose_answer_is_lost_is_made_again(api: LocalBatchAPI, tool: Tool) -> None:
    path = requests_file()
    api.faults.append(Fault("POST", "/files$", when="after", action="reset", times=2))
    assert tool("create", "--in", path) == 0
    assert api.read_file(only_batch(api).input_file_id) == path.read_bytes()


def test_an_upload_that_is_refused_ends_the_command(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("POST", "/files$", status=413, message="Too large", code="too_large"))
    assert tool("create", "--in", requests_file()) == 1
    assert capsys.readouterr() == ("", error("UPLOAD: HTTP 413: Too large (too_large)"))
    assert (asked(api, "POST"), api.batches) == (1, {})


def truncate_uploads(api: LocalBatchAPI, times: int) -> list[Fault]:
    """Faults that answer to uploads with a file that has only the first 10 bytes."""
    files = [api.new_file(b"0123456789", "batch", "x") for _ in range(times)]
    bodies = [json.dumps({"id": file.id, "object": "file", "bytes": 10}).encode() for file in files]
    return [Fault("POST", "/files$", status=200, body=body) for body in bodies]


def test_an_upload_that_arrived_in_part_is_deleted_and_made_again(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults += truncate_uploads(api, 2)
    assert tool("create", "--in", requests_file()) == 0
    assert capsys.readouterr() == (ids(only_batch(api)), "")
    assert ([*api.files], posts(api, "/v1/files")) == ([only_batch(api).input_file_id], 3)


def test_an_upload_is_made_three_times_at_most(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.faults += truncate_uploads(api, 4)
    last = [*api.files][2]
    path = requests_file()
    assert tool("create", "--in", path) == 1
    size = path.stat().st_size
    assert capsys.readouterr() == ("", error(f"file {last} has 10 bytes, but {size} were uploaded"))
    assert (len(api.files), posts(api, "/v1/files"), api.batches) == (1, 3, {})


@pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
def test_a_refused_batch_deletes_its_file(status: int, api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("POST", "/batches$", status=status, times=9, message="No", code="no"))
    assert tool("create", "--in", requests_file()) == 1
    assert capsys.readouterr().err == error(f"CREATE_BATCH: HTTP {status}: No (no)")
    assert (posts(api), api.files) == (1, {})


def test_a_file_that_cannot_be_deleted_is_told(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.faults += [Fault("POST", "/batches$", status=422, message="No", code="no"),
                   Fault("DELETE", status=403, message="Never")]
    assert tool("create", "--in", requests_file()) == 1
    (file_id,) = api.files
    assert capsys.readouterr().err == (
        warning(f"file {file_id} was not deleted: DELETE_FILE: HTTP 403: Never (forbidden)")
        + error("CREATE_BATCH: HTTP 422: No (no)")
    )


@pytest.mark.parametrize("status", [400, 404])
def test_a_file_that_is_not_known_yet_is_given_some_seconds(
    status: int, api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    def deny_the_file() -> None:
        (file_id,) = api.files
        api.faults.append(Fault("POST", "/batches$", times=3, status=status, message=f"There is no {file_id}"))

    api.faults.append(Fault("POST", "/batches$", status=429, headers={"Retry-After": "7"}))
    clock.events = [deny_the_file]
    assert tool("create", "--in", requests_file()) == 0
    assert clock.naps == [7, 0.5, 1.5, 3]
    assert capsys.readouterr().out == ids(only_batch(api))


def test_a_file_that_stays_unknown_ends_the_command(api: LocalBatchAPI, tool: Tool, clock: FakeTime) -> None:
    api.faults.append(Fault("POST", "/batches$", status=429, headers={"Retry-After": "7"}))
    clock.events = [api.files.clear]
    assert tool("create", "--in", requests_file()) == 1
    assert clock.naps == [7, 0.5, 1.5, 3, 5]
    assert api.batches == {}


def test_a_rate_limit_on_the_post_is_waited_out(api: LocalBatchAPI, tool: Tool, clock: FakeTime) -> None:
    api.faults.append(Fault("POST", "/batches$", status=429, times=3, headers={"Retry-After": "100"}))
    assert tool("create", "--in", requests_file()) == 0
    assert (clock.naps, len(api.batches)) == ([100, 100, 100], 1)


def test_a_used_up_quota_is_known_by_its_type_too(api: LocalBatchAPI, tool: Tool, clock: FakeTime) -> None:
    body = json.dumps({"error": {"message": "Pay first.", "type": "insufficient_quota", "code": None}}).encode()
    api.faults.append(Fault("POST", "/batches$", status=429, times=9, body=body))
    assert tool("create", "--in", requests_file()) == 1
    assert (posts(api), clock.naps) == (1, [])


def test_a_file_that_changes_during_the_upload_is_not_submitted(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    path = requests_file()
    api.faults.append(Fault("POST", "/files$", status=429, headers={"Retry-After": "1"}))
    clock.events = [lambda: path.write_bytes(path.read_bytes() + jsonl(request("a3")))]
    assert tool("create", "--in", path) == 1
    assert capsys.readouterr().err.endswith(
        error("requests.jsonl was changed while it was in use; run the same command again")
    )
    assert (api.files, api.batches) == ({}, {})


# a POST whose outcome is unknown

LOOKS = [0.5, 1.5, 3, 5]
FENCED_LOOKS = [2, 3, 5, 10]
LOST = pytest.mark.parametrize(
    "lost",
    [
        {"action": "reset"},
        {"action": "cut"},
        {"action": "shorten"},
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
        {"status": 200, "body": b'{"id": "batch_other", "status": "validating", "input_file_id": "file-other"}'},
    ],
    ids=in_short,
)


def in_doubt(file_id: str) -> str:
    return error(f"cannot tell whether a batch was created for file {file_id}; run the same command again later, and "
                 "it will pick up the batch if there is one (--force would pay again)")


@LOST
def test_one_batch_is_made_whatever_happens_to_the_answer(
    lost: Json, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("POST", "/batches$", when="after", **lost))
    assert tool("create", "--in", requests_file()) == 0
    out, err = capsys.readouterr()
    assert out == ids(only_batch(api))
    assert re.fullmatch(r"batch_tool.py: warning: .*; checking whether the batch was created\n", err)
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == ids(only_batch(api))
    assert (posts(api, "/v1/files"), posts(api), times_paid(api)) == (1, 1, [1, 1])


def test_a_file_that_is_gone_already_is_a_fence(api: LocalBatchAPI, tool: Tool, clock: FakeTime) -> None:
    body = b'{"detail": "File with id file-1 not found"}'
    api.faults += [Fault("POST", "/batches$", action="reset"), Fault("DELETE", status=404, body=body)]
    clock.events = [nothing, api.files.clear]
    assert tool("create", "--in", requests_file()) == 0
    assert (posts(api), times_paid(api)) == (2, [1, 1])


def test_a_post_that_was_lost_is_fenced_and_made_again_with_another_file(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    api.faults.append(Fault("POST", "/batches$", action="reset"))
    assert tool("create", "--in", requests_file()) == 0
    out, err = capsys.readouterr()
    lost, *_ = out.splitlines()
    lost_id = lost.removeprefix("File ID: ")
    assert out == f"File ID: {lost_id}\n{ids(only_batch(api))}"
    assert err == (
        warning(f"CREATE_BATCH: no response from {api.base_url}/: [Errno 104] Connection reset by peer; checking "
                "whether the batch was created")
        + f"part 1/1: no batch was created for file {lost_id}, so the file was deleted\n"
    )
    assert clock.naps == [*LOOKS, *FENCED_LOOKS]
    assert ([*api.files], posts(api)) == ([only_batch(api).input_file_id], 2)


@pytest.mark.parametrize("moment", [0, 3, 4, 5, 8])
def test_a_post_that_is_carried_out_late_makes_nothing_paid_twice(
    moment: int, api: LocalBatchAPI, tool: Tool, clock: FakeTime
) -> None:
    api.faults.append(Fault("POST", "/batches$", when="later", action="reset"))
    clock.events = [*[nothing] * moment, api.carry_out]
    assert tool("create", "--in", requests_file()) == 0
    api.carry_out()
    assert (times_paid(api), len(api.batches)) == ([1, 1], 1)


@pytest.mark.parametrize("moment", [3, 4, 8])
def test_a_post_that_is_carried_out_late_and_listed_late_makes_nothing_paid_twice(
    moment: int, api: LocalBatchAPI, tool: Tool, clock: FakeTime
) -> None:
    def carry_out_unlisted() -> None:
        api.list_delay = 3600
        api.carry_out()

    api.faults.append(Fault("POST", "/batches$", when="later", action="reset"))
    clock.events = [*[nothing] * moment, carry_out_unlisted, nothing, lambda: setattr(api, "list_delay", 0)]
    assert tool("create", "--in", requests_file()) == 0
    assert times_paid(api) == [1, 1]


def held_at_the_fence(api: LocalBatchAPI, clock: FakeTime, *events: Callable[[], object]) -> None:
    """A POST is carried out, its answer is lost, and the batch is listed, `validating`, after its file is deleted."""
    api.hold, api.list_delay = "validating", 3600
    api.faults.append(Fault("POST", "/batches$", when="after", action="reset"))
    clock.events = [*[nothing] * 4, lambda: setattr(api, "list_delay", 0), nothing, *events]


def test_a_batch_that_fails_for_its_deleted_file_is_made_again(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime
) -> None:
    held_at_the_fence(api, clock, lambda: setattr(api, "hold", None))
    assert tool("create", "--in", requests_file()) == 0
    assert [api.look(batch)["status"] for batch in api.batches.values()] == ["failed", "completed"]
    assert (clock.naps, times_paid(api)) == ([*LOOKS, 2, 5, 5], [1, 1])


def test_a_batch_that_runs_although_its_file_is_deleted_is_the_batch(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    held_at_the_fence(api, clock, lambda: only_batch(api).enter("in_progress", time.monotonic()))
    assert tool("create", "--in", requests_file()) == 0
    assert capsys.readouterr().out == ids(only_batch(api))
    assert times_paid(api) == [1, 1]


def test_a_post_is_made_three_times_at_most_and_the_last_one_is_fenced_too(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    api.faults.append(Fault("POST", "/batches$", times=9))
    assert tool("create", "--in", requests_file()) == 1
    out, err = capsys.readouterr()
    *_, last = out.splitlines()
    reason = f"no response to 3 tries to create its batch (last file: {last.removeprefix('File ID: ')})"
    assert err.endswith(error(f"part 1/1: {reason}; run the same command again later"))
    assert clock.naps == [*LOOKS, *FENCED_LOOKS] * 3
    assert (posts(api), asked(api, "DELETE"), api.files) == (3, 3, {})


@pytest.mark.parametrize("when, batches", [("after", 1), ("before", 0), ("later", 0)])
def test_a_file_that_cannot_be_deleted_is_no_fence(
    when: str, batches: int, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.habits.add("no-delete")
    api.list_delay = 3600
    api.faults.append(Fault("POST", "/batches$", when=when, action="reset"))
    assert tool("create", "--in", requests_file()) == 1
    (file_id,) = api.files
    assert capsys.readouterr().err.endswith(in_doubt(file_id))
    assert (len(api.batches), posts(api)) == (batches, 1)
    api.carry_out()
    api.list_delay = 0
    assert tool("create", "--in", "requests.jsonl") == (1 if when == "before" else 0)
    assert posts(api) == 1
    assert times_paid(api) == ([] if when == "before" else [1, 1])


def test_a_batch_that_the_listing_shows_late_is_found(api: LocalBatchAPI, tool: Tool, clock: FakeTime) -> None:
    api.list_delay = 3600
    api.faults.append(Fault("POST", "/batches$", when="after"))
    clock.events = [nothing, nothing, lambda: setattr(api, "list_delay", 0)]
    assert tool("create", "--in", requests_file()) == 0
    assert (clock.naps, times_paid(api)) == ([0.5, 1.5, 3], [1, 1])


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 403}, {"action": "reset"}], ids=in_short)
def test_a_batch_that_cannot_be_looked_for_is_picked_up_by_the_next_create(
    fault: Json, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults += [Fault("POST", "/batches$", when="after"), Fault("GET", "/batches$", skip=2, times=99, **fault)]
    assert tool("create", "--in", requests_file()) == 1
    batch = only_batch(api)
    out, err = capsys.readouterr()
    assert out == f"File ID: {batch.input_file_id}\n"
    assert err.endswith(in_doubt(batch.input_file_id))
    assert batch.input_file_id in api.files
    api.faults.clear()
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == ids(only_batch(api))


def test_a_second_batch_of_one_file_is_told_and_cancelled(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    def post_twice() -> None:
        batch = only_batch(api)
        api.new_batch("validating", input_file=batch.input_file, metadata=batch.metadata, id="batch_twin",
                      created_at=batch.created_at + 1)

    api.hold = "validating"
    api.faults.append(Fault("POST", "/batches$", when="after"))
    clock.events = [post_twice]
    assert tool("create", "--in", requests_file()) == 0
    first, twin = api.batches.values()
    out, err = capsys.readouterr()
    assert out == ids(first)
    assert err.endswith(
        warning(f"batch batch_twin has the same requests as batch {first.id}")
        + "batch batch_twin is being cancelled\n"
    )
    assert (first.status, twin.status) == ("validating", "cancelling")


# the lock and the note


def note_path() -> Path:
    (path,) = Path(os.environ["XDG_STATE_HOME"], "batch_tool").iterdir()
    return path


def test_the_note_names_the_file_before_the_post_and_the_batch_after_it(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime
) -> None:
    path = requests_file()
    notes: list[bytes] = []
    api.faults.append(Fault("POST", "/batches$", status=429, headers={"Retry-After": "1"}))
    clock.events = [lambda: notes.append(note_path().read_bytes())]
    assert tool("create", "--in", path) == 0
    batch = only_batch(api)
    before = {"file": batch.input_file_id, "sha256": sha256(path.read_bytes()), "name": path.name}
    assert notes == [jsonl(before)]
    assert note_path().read_bytes() == jsonl(before, before, {"file": batch.input_file_id, "batch": batch.id})
    assert stat.S_IMODE(note_path().stat().st_mode) == 0o600
    assert stat.S_IMODE(note_path().parent.stat().st_mode) == 0o700


def test_a_second_create_of_the_same_bytes_ends_at_once_whatever_its_path(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    Path("copy.jsonl").write_bytes(requests_file().read_bytes())
    codes: list[int] = []
    api.faults.append(Fault("POST", "/files$", status=429, headers={"Retry-After": "1"}, message="Slow"))
    clock.events = [lambda: codes.append(tool("create", "--in", "copy.jsonl", "--max-requests", 1, "--force"))]
    assert tool("create", "--in", "requests.jsonl") == 0
    assert codes == [1]
    assert capsys.readouterr() == (ids(only_batch(api)), (
        warning("UPLOAD: HTTP 429: Slow (rate_limit_exceeded); trying again in 1 s")
        + error("copy.jsonl is in use by another create or run; wait for it to finish")
    ))


def test_two_creates_at_the_same_time_make_one_batch(api: LocalBatchAPI) -> None:
    requests_file()
    both = [popen("create", "--in", "requests.jsonl") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert ids(only_batch(api)) in outputs
    assert {process.returncode for process in both} <= {0, 1}


def test_another_service_has_a_note_of_its_own(api: LocalBatchAPI, tool: Tool, monkeypatch: Environment) -> None:
    path = requests_file()
    assert tool("create", "--in", path) == 0
    with LocalBatchAPI() as other:
        monkeypatch.setenv("OPENAI_BASE_URL", other.base_url)
        assert tool("create", "--in", path) == 0
        assert (len(other.batches), asked(other, "GET", "/batches/")) == (1, 0)


@pytest.mark.parametrize("habits", [set(), {"no-metadata"}], ids=["metadata", "no metadata"])
def test_a_batch_that_the_listing_does_not_show_yet_is_known_by_the_note(
    habits: set[str], api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.habits, api.list_delay = habits, 3600
    assert tool("create", "--in", requests_file()) == 0
    assert capsys.readouterr().out == ids(only_batch(api))
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == ids(only_batch(api))


def test_a_noted_batch_that_is_unknown_at_the_server_counts_for_nothing(api: LocalBatchAPI, tool: Tool) -> None:
    assert tool("create", "--in", requests_file()) == 0
    api.batches.clear()
    assert tool("create", "--in", "requests.jsonl") == 0
    assert len(api.batches) == 1


@pytest.mark.parametrize("when", ["before", "after", "later"])
@pytest.mark.parametrize("list_delay", [0, 3600])
@pytest.mark.parametrize("nap", [0, 4])
def test_a_create_that_was_killed_before_its_answer_is_run_again(
    when: str, list_delay: int, nap: int, api: LocalBatchAPI, tool: Tool, clock: FakeTime
) -> None:
    api.list_delay = 3600
    api.faults.append(Fault("POST", "/batches$", when=when, action="reset"))
    clock.events = [*[nothing] * nap, kill]
    with pytest.raises(Killed):
        tool("create", "--in", requests_file())
    api.list_delay = list_delay
    clock.events = [nothing, api.carry_out, *[nothing] * 4, lambda: setattr(api, "list_delay", 0)]
    assert tool("create", "--in", "requests.jsonl") == 0
    assert times_paid(api) == [1, 1]


def test_a_create_that_was_killed_by_the_system_is_run_again(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/batches$", when="after", action="reset", seconds=0.2))
    with started("create", "--in", "requests.jsonl") as process:
        until(lambda: posts(api))
        process.kill()
    time.sleep(0.3)  # the server goes on with what it has received
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == ids(only_batch(api))


def test_a_note_that_is_cut_or_deleted_is_no_error(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    assert tool("create", "--in", requests_file()) == 0
    note_path().write_bytes(b'{"file": 7}\n[]\n{"file": "../x", "batch": "b"}\n{"fil')
    assert tool("create", "--in", "requests.jsonl") == 0
    note_path().unlink()
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == ids(only_batch(api)) * 3


def test_notes_older_than_thirty_days_are_removed(api: LocalBatchAPI, tool: Tool) -> None:
    assert tool("create", "--in", requests_file()) == 0
    old = note_path()
    os.utime(old, (time.time() - 31 * DAY,) * 2)
    assert tool("create", "--in", requests_file(request("b1"))) == 0
    assert note_path() != old


@pytest.mark.parametrize(
    ("state", "reason"), [("/dev/null/x", "Not a directory"), ("relative", "it is not an absolute path")]
)
def test_a_note_that_cannot_be_written_draws_a_warning(
    state: str, reason: str, api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", state)
    assert tool("create", "--in", requests_file()) == 0
    words = "until this command ends, do not start another create or run of requests.jsonl"
    told = warning(f"cannot lock a note in {state}/batch_tool: {reason}; {words}")
    assert capsys.readouterr() == (ids(only_batch(api)), told)
    assert not Path("relative").exists()


def test_a_service_that_keeps_no_metadata_draws_one_warning(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.habits.add("no-metadata")
    assert tool("create", "--in", requests_file(), "--max-requests", 1) == 0
    reason = ("this service keeps no metadata; only a note on this machine prevents the same requests from being "
              "submitted and paid for again")
    assert capsys.readouterr() == ("".join(map(ids, api.batches.values())), warning(reason))


# earlier batches

EARLIER = pytest.mark.parametrize(
    "status, output, fields, fate",
    [
        ("validating", None, {}, "reused"),
        ("in_progress", None, {}, "reused"),
        ("finalizing", None, {}, "reused"),
        ("queued", None, {}, "reused"),
        ("IN_PROGRESS", None, {}, "reused"),
        ("completed", b"{}\n", {}, "reused"),
        ("COMPLETED", b"{}\n", {}, "reused"),
        ("completed", b"{}\n", {"request_counts": None}, "reused"),
        ("completed", None, {}, "submitted"),
        ("completed", None, {"output_file_id": ""}, "submitted"),
        ("completed", b"", {}, "submitted"),
        ("failed", None, {}, "submitted"),
        ("FAILED", b"", {}, "submitted"),
        ("expired", None, {}, "submitted"),
        ("expired", b"", {}, "submitted"),
        ("expired", b"{}\n", {}, "left out"),
        ("expired", b"{}\n", {"request_counts": None}, "left out"),
        ("cancelled", None, {}, "submitted"),
        ("cancelled", b"", {}, "submitted"),
        ("cancelled", b"{}\n", {}, "left out"),
        ("canceled", b"{}\n", {}, "left out"),
        ("Cancelled", b"{}\n", {}, "left out"),
        ("cancelling", None, {}, "left out"),
    ],
)


def earlier_batch(api: LocalBatchAPI, path: Path, status: str = "in_progress", **fields: Any) -> LocalBatch:
    """A batch that an earlier create made of the file, on another machine."""
    metadata = {"input_sha256": sha256(path.read_bytes())}
    input_file = api.new_file(path.read_bytes(), "batch", path.name)
    return api.new_batch(status, **{"input_file": input_file, "metadata": metadata, "id": "batch_1"} | fields)


@EARLIER
def test_nothing_is_paid_for_twice(
    status: str, output: bytes | None, fields: Json, fate: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    path = requests_file()
    batch = earlier_batch(api, path, status, output=output, **fields)
    expected = {"reused": (0, 1), "submitted": (0, 2), "left out": (1, 1)}[fate]
    assert (tool("create", "--in", path), len(api.batches)) == expected
    name = "cancelled" if status == "canceled" else status.lower()
    if fate == "reused":
        said = f"part 1/1 was already submitted as batch batch_1 ({name}); skipping\n"
        assert capsys.readouterr() == (ids(batch), said)
        assert asked(api, "GET", "/models/") == 0
    elif fate == "left out":
        done = f"{1 if output and not fields else 0} of its 2 requests"
        when = " once the batch has ended" if status == "cancelling" else ""
        assert capsys.readouterr() == ("", warning(
            f"part 1/1 not submitted: batch batch_1 ({name}) has finished {done}; to get those and send only "
            f"the rest, use run on the same file{when}"
        ))
    else:
        assert capsys.readouterr() == (ids(last_batch(api)), "")


LATE = pytest.mark.parametrize(
    "late", [{"output_file_id": None}, {"output_file_id": ""}, {"output": b""}], ids=["null", "no id", "empty"]
)


def late_batch(api: LocalBatchAPI, late: Json) -> LocalBatch:
    """A completed batch of requests.jsonl with two successes, whose output file does not show yet."""
    counts = {"total": 2, "completed": 2, "failed": 0}
    return earlier_batch(api, requests_file(), "completed", request_counts=counts, **late)


def bring_output(api: LocalBatchAPI, batch: LocalBatch) -> None:
    batch.output_file_id = api.new_file(jsonl(success("a1"), success("a2")), "batch_output", "x").id


@LATE
def test_create_waits_for_an_output_file_that_is_late(
    late: Json, api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    batch = late_batch(api, late)
    clock.events = [nothing, nothing, lambda: bring_output(api, batch)]
    assert tool("create", "--in", "requests.jsonl") == 0
    said = "part 1/1 was already submitted as batch batch_1 (completed); skipping\n"
    assert capsys.readouterr() == (ids(batch), said)
    assert (clock.naps, len(api.batches)) == ([5, 5, 5], 1)


def output_missing() -> str:
    return ("batch batch_1 has completed 2 requests, but has no output file after 10 minutes; run the same command "
            "again later")


def test_create_gives_up_after_ten_minutes_without_an_output_file(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    late_batch(api, {})
    assert tool("create", "--in", "requests.jsonl") == 1
    assert capsys.readouterr().err.endswith(error(output_missing()))
    assert (clock.now, posts(api)) == (600, 0)


def test_a_reused_batch_is_printed_as_json(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    earlier_batch(api, requests_file())
    assert tool("create", "--in", "requests.jsonl", "--json") == 0
    assert json.loads(capsys.readouterr().out)["id"] == "batch_1"


def test_only_the_parts_that_were_not_submitted_are(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("POST", "/batches$", skip=1, status=403))
    assert tool("create", "--in", requests_file(), "--max-requests", 1) == 1
    capsys.readouterr()
    assert tool("create", "--in", "requests.jsonl", "--max-requests", 1) == 0
    first, second = api.batches.values()
    said = f"part 1/2 was already submitted as batch {first.id} (completed); skipping\n"
    assert capsys.readouterr() == (ids(first) + ids(second), said)
    assert (sent(api), times_paid(api)) == ([["a1"], ["a2"]], [1, 1])


def test_a_part_that_is_left_out_does_not_keep_the_others_from_being_submitted(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    earlier_batch(api, requests_file(request("a1")), "expired", output=b"{}\n")
    requests_file(request("a1"), request("a2"))
    assert tool("create", "--in", "requests.jsonl", "--max-requests", 1) == 1
    assert capsys.readouterr().out == ids(last_batch(api))
    assert sent(api) == [["a1"], ["a2"]]


@pytest.mark.parametrize("first, second", [([], ["--max-requests", 1]), (["--max-requests", 1], [])], ids=in_short)
@pytest.mark.parametrize("known_by", ["metadata", "note"])
def test_another_division_of_the_same_file_is_refused_with_both_ways_on(
    first: list[Any], second: list[Any], known_by: str, api: LocalBatchAPI, tool: Tool, capsys: Capture,
    monkeypatch: Environment,
) -> None:
    if known_by == "note":
        api.habits.add("no-metadata")
    assert tool("create", "--in", requests_file(), *first) == 0
    if known_by == "metadata":
        monkeypatch.setenv("XDG_STATE_HOME", os.environ["XDG_STATE_HOME"] + "-of-another-machine")
    capsys.readouterr()
    assert tool("create", "--in", "requests.jsonl", *second) == 1
    names = ", ".join(sorted(api.batches, key=lambda batch_id: (api.batches[batch_id].created_at, batch_id)))
    assert capsys.readouterr() == ("", error(
        f"other batches already have requests of this file: {names}; nothing more was submitted; use "
        "their --max-requests, or use run, which takes their results and sends only the rest"
    ))
    assert times_paid(api) == [1, 1]


@pytest.mark.parametrize("same_part", [True, False])
def test_the_listing_is_looked_at_again_right_before_the_post(
    same_part: bool, api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    path = requests_file()
    metadata = {"input_sha256": "0" * 64, "request_file_sha256": sha256(path.read_bytes())}
    api.faults.append(Fault("POST", "/files$", status=429, headers={"Retry-After": "60"}))
    fields: Json = {} if same_part else {"metadata": metadata}
    clock.events = [lambda: earlier_batch(api, path, **fields)]
    assert tool("create", "--in", path) == int(not same_part)
    batch = only_batch(api)
    out, err = capsys.readouterr()
    assert out.endswith(ids(batch)) == same_part
    refusal = "other batches already have requests of this file: batch_1; nothing more was submitted; "
    assert (refusal in err) != same_part
    assert ([*api.files], posts(api)) == ([batch.input_file_id], 0)


@pytest.mark.parametrize(
    "metadata",
    [None, {}, "odd", {"input_sha256": "others"}, {"input_sha256": "others", "input_file": "requests.jsonl"}],
    ids=str,
)
def test_a_batch_of_other_input_is_not_reused(metadata: Any, api: LocalBatchAPI, tool: Tool) -> None:
    earlier_batch(api, requests_file(), metadata=metadata)
    assert tool("create", "--in", "requests.jsonl") == 0
    assert len(api.batches) == 2


def test_force_submits_again(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    earlier_batch(api, requests_file())
    api.faults.append(Fault("GET", "/batches$", status=404, times=9))
    assert tool("create", "--in", "requests.jsonl", "--force") == 0
    assert capsys.readouterr() == (ids(last_batch(api)), "")
    assert len(api.batches) == 2


# the listing


@pytest.mark.parametrize("age, batches", [(29 * DAY, 1), (31 * DAY, 2)])
@pytest.mark.parametrize("offset", [0, -31 * DAY, 31 * DAY])
def test_a_batch_is_reused_for_thirty_days_by_the_clock_of_the_server(
    age: int, batches: int, offset: int, api: LocalBatchAPI, tool: Tool
) -> None:
    api.clock_offset = offset
    earlier_batch(api, requests_file(), created_at=api.now() - age)
    assert tool("create", "--in", "requests.jsonl") == 0
    assert len(api.batches) == batches


@pytest.mark.parametrize("habits", [set(), {"no-has-more"}, {"short-endpoint"}], ids=in_short)
def test_an_earlier_batch_is_found_behind_many_pages(
    habits: set[str], api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.habits = habits
    batch = earlier_batch(api, requests_file(), created_at=int(time.time()) - 60)
    for _ in range(250):
        api.new_batch("completed", input_file=batch.input_file)
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == ids(batch)
    assert asked(api, "GET", "/batches$") == 3 + ("no-has-more" in habits)


def serve_pages(api: LocalBatchAPI, *pages: Any) -> None:
    """Let the listing be these pages, for the first requests of it."""
    api.faults += [Fault("GET", "/batches$", status=200, body=json.dumps(page).encode()) for page in pages]


def listed(batch_id: str, content: bytes = b"", created_at: Any = None, **fields: Any) -> Json:
    metadata = {"input_sha256": sha256(content)}
    return {"id": batch_id, "status": "in_progress", "metadata": metadata, "created_at": created_at} | fields


@pytest.mark.parametrize("old", [1, 100, 250])
def test_old_entries_before_a_recent_one_do_not_hide_it(
    old: int, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    content = requests_file().read_bytes()
    entries = [listed(f"old_{number}", created_at=1) for number in range(old)]
    entries.append(listed("batch_1", content, created_at=int(time.time()), endpoint="/responses"))
    pages = [entries[first : first + 100] for first in range(0, len(entries), 100)]
    serve_pages(api, *({"data": page, "has_more": page is not pages[-1]} for page in pages))
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == "Batch ID: batch_1\n"
    assert asked(api, "POST") == 0


def test_three_full_pages_of_old_batches_end_the_search(api: LocalBatchAPI, tool: Tool) -> None:
    path = requests_file()
    file = api.new_file(b"", "batch", "x")
    for _ in range(420):
        api.new_batch("completed", input_file=file, created_at=1)
    assert tool("create", "--in", path) == 0
    assert asked(api, "GET", "/batches$") == 2 * 3  # at the start, and right before the POST


@pytest.mark.parametrize("created_at", [None, "?", 0])
def test_an_earlier_batch_with_few_fields_is_reused(
    created_at: Any, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    serve_pages(api, {"data": [listed("b1", requests_file().read_bytes(), created_at)], "has_more": False})
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == "Batch ID: b1\n"


REPEATED = "the server repeats a page of its listing of batches"


def test_a_listing_that_ignores_after_is_not_whole(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.habits.add("ignores-after")
    file = api.new_file(b"", "batch", "x")
    for _ in range(101):
        api.new_batch("completed", input_file=file)
    assert tool("create", "--in", requests_file()) == 1
    assert capsys.readouterr() == ("", error(REPEATED))
    assert asked(api, "POST") == 0


@pytest.mark.parametrize("page", [{"data": [listed("b1")], "has_more": True}, {"data": [], "has_more": True},
                                  {"data": [listed(f"b{number}") for number in range(100)]}], ids=in_short)
def test_a_page_that_brings_nothing_new_while_there_is_more_is_an_error(
    page: Json, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    serve_pages(api, page, page)
    assert tool("create", "--in", requests_file()) == 1
    assert capsys.readouterr() == ("", error(REPEATED))
    assert asked(api, "POST") == 0


def test_a_listing_that_ignores_after_is_whole_where_it_has_one_page(api: LocalBatchAPI, tool: Tool) -> None:
    api.habits |= {"ignores-after", "no-has-more"}
    for _ in range(3):
        api.new_batch("completed")
    assert tool("create", "--in", requests_file()) == 0
    assert len(api.batches) == 4


def test_a_listing_without_an_end_is_an_error() -> None:
    class Endless(batch_tool.Api):
        def page(self, query: Json) -> batch_tool.Page:
            number = query.get("after", "b0")[1:]
            batch = batch_tool.Batch.parse(listed(f"b{int(number) + 1}"))
            return batch_tool.Page([batch], True, time.time())

    nobody: Any = None
    with pytest.raises(batch_tool.IncompleteListing, match=r"has more than 500 pages$"):
        Endless(nobody, "", nobody, nobody, nobody, False).recent_batches()


@pytest.mark.parametrize("cut", [{"action": "cut"}, {"status": 500}, {"status": 404}], ids=in_short)
def test_without_a_listing_nothing_is_uploaded(cut: Json, api: LocalBatchAPI, tool: Tool) -> None:
    api.faults.append(Fault("GET", "/batches$", times=9, **cut))
    assert tool("create", "--in", requests_file()) == 1
    assert asked(api, "POST") == 0


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


def test_times_are_local(api: LocalBatchAPI, tool: Tool, utc: None, capsys: Capture, monkeypatch: Environment) -> None:
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
        ("FAILED", "Failed: 2024-01-15T10:31:00\n"),
        ("canceled", "Cancelled: 2024-01-15T10:31:00\n"),
        ("in_progress", "Expires: 2024-01-16T10:30:00\n"),
        ("paused", "Expires: 2024-01-16T10:30:00\n"),
    ],
)
def test_each_status_shows_its_own_time(
    status: str, line: str, api: LocalBatchAPI, tool: Tool, utc: None, capsys: Capture
) -> None:
    ended = line.split(":")[0].lower()
    moment = {} if ended == "expires" else {f"{ended}_at": MORNING + 60}
    api.new_batch(status, id="batch_1", created_at=MORNING, **moment)
    assert tool("status", "--batch-id", "batch_1") == 0
    assert capsys.readouterr() == (f"Status: {status}\nCreated: 2024-01-15T10:30:00\n{line}", "")


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
        "Only words and more.\n"
    )


@pytest.mark.parametrize("odd", [None, "odd", 10**30, [], {}, {"data": "odd"}, {"total": "x"}], ids=str)
def test_fields_that_are_null_or_odd_are_left_out(odd: Any, api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    names = ["request_counts", "usage", "errors", "expires_at", "in_progress_at", "completed_at", "metadata", "model"]
    api.new_batch("in_progress", id="batch_1").__dict__.update(dict.fromkeys(names, odd))
    assert tool("status", "--batch-id", "batch_1") == 0
    assert re.fullmatch(r"Status: in_progress\nCreated: .*\n", capsys.readouterr().out)


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


@pytest.mark.parametrize("status", ["expired", "cancelled", "canceled", "EXPIRED", "Completed"])
def test_what_a_batch_that_has_ended_left_is_saved(status: str, api: LocalBatchAPI, tool: Tool) -> None:
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
    assert asked(api, "GET", "/content$") == 1


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
    operation = "CANCEL_BATCH" if command == "cancel" else "GET_STATUS"
    assert err == error(f"batch_1: {operation}: HTTP 404: No such batch: batch_1")
    assert out


def test_saving_that_fails_is_exit_1(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api)
    Path("results_batch_1.jsonl").mkdir()
    assert tool("status", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err == error("batch_1: cannot write results_batch_1.jsonl: Is a directory")


@pytest.mark.parametrize("answer", [{"id": "../../x"}, {"id": "x/y"}, {"id": ".x"}, {"id": "another"}], ids=str)
def test_an_id_of_the_server_chooses_no_directory(
    answer: dict[str, str], api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    file = api.new_file(b"{}\n", "batch_output", "x")
    body = json.dumps({"status": "completed", "output_file_id": file.id} | answer).encode()
    api.faults.append(Fault("GET", "/batches/", status=200, body=body, times=9))
    assert tool("status", "--batch-id", "batch_1") == 1
    assert not list(Path().rglob("results_*"))
    assert "error: batch_1: the response is " in capsys.readouterr().err


@pytest.mark.parametrize("file_id", [7, ["x"]], ids=str)
def test_a_file_id_that_is_no_text_is_an_error(file_id: Any, api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, output_file_id=file_id)
    assert tool("status", "--batch-id", "batch_1") == 1
    reason = f"output_file_id of batch batch_1 is not a file id: {json.dumps(file_id)}"
    assert capsys.readouterr().err == error(f"batch_1: {reason}")


@pytest.mark.parametrize("file_id", ["../batches", "a/b", ".."], ids=str)
def test_a_file_id_that_can_be_none_is_not_asked_for(
    file_id: Any, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api, output_file_id=file_id)
    assert tool("status", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err == error(f"batch_1: not the id of a file: {json.dumps(file_id)}")
    assert Path("errors_batch_1.jsonl").exists()


def test_a_batch_with_an_odd_file_id_does_not_keep_others_from_being_listed_and_created(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api, output_file_id="files/x")
    assert tool("list") == 0
    assert tool("create", "--in", requests_file()) == 0
    assert len(api.batches) == 2


@pytest.mark.parametrize("answer", [{"status": 0}, {"status": ""}, {"status": None}, {}, {"id": 7}], ids=str)
def test_an_answer_that_is_no_batch_is_one_line(answer: Json, api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    body = json.dumps({"id": "batch_1"} | answer)
    api.faults.append(Fault("GET", "/batches/", status=200, body=body.encode(), times=9))
    assert tool("status", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == ("", error(f"batch_1: the response is not a batch: {body}"))


def test_metadata_that_is_nested_deeply_is_printed_as_it_is(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    deep: Any = "end"
    for _ in range(300):
        deep = {"a": [deep]}
    done_batch(api, metadata=deep)
    assert tool("status", "--batch-id", "batch_1", "--json", "--verbose") == 0
    assert json.loads(capsys.readouterr().out)["metadata"] == deep


@pytest.mark.parametrize("depth", [3_000, 100_000])
def test_metadata_that_is_nested_too_deeply_is_one_line(
    depth: int, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    body = b'{"id": "batch_1", "status": "in_progress", "metadata": ' + b'[' * depth + b"]" * depth + b"}"
    api.faults.append(Fault("GET", status=200, body=body, times=9))
    code = tool("status", "--batch-id", "batch_1", "--json")
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (1, "", 1) or (code, err, out.count("\n")) == (0, "", 1)


@LATE
def test_status_shows_a_batch_whose_output_file_is_late_as_it_is(
    late: Json, api: LocalBatchAPI, tool: Tool, utc: None, capsys: Capture
) -> None:
    late_batch(api, late).__dict__.update(created_at=MORNING, completed_at=MORNING)
    assert tool("status", "--batch-id", "batch_1") == 0
    assert capsys.readouterr() == (
        "Status: completed\n"
        "Created: 2024-01-15T10:30:00\n"
        "Completed: 2024-01-15T10:30:00\n"
        "Requests: 2 completed, 0 failed of 2\n",
        "",
    )
    assert [path.name for path in Path().glob("*.jsonl")] == ["requests.jsonl"]


def test_empty_files_are_neither_saved_nor_told(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, output=b"", errors=b"", request_counts=None)
    assert tool("status", "--batch-id", "batch_1") == 0
    assert "saved" not in capsys.readouterr().out
    assert not list(Path().glob("*.jsonl"))


# -- wait ---------------------------------------------------------------------------------------------------------


def test_wait_shows_each_change_and_then_the_status(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, utc: None, capsys: Capture
) -> None:
    counts = {"total": 3, "completed": 0, "failed": 0}
    batch = done_batch(api, "validating", request_counts=None, errors=None, expires_at=None)

    def change(status: str, **fields: int) -> Callable[[], None]:
        return lambda: batch.__dict__.update(status=status, request_counts=counts | fields)

    clock.events = [
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


def test_on_a_terminal_progress_is_one_line(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, monkeypatch: Environment
) -> None:
    batch = api.new_batch("in_progress", id="batch_1")
    clock.events = [nothing, lambda: batch.enter("completed", batch.born)]
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
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, monkeypatch: Environment
) -> None:
    batch = api.new_batch("in_progress", id="batch_1")
    ours, terminal = os.openpty()
    clock.events = [lambda: os.close(ours), lambda: batch.enter("completed", batch.born)]
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert tool("wait", "--batch-id", "batch_1") == 0


def test_the_timeout_is_one_for_saving_too(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.new_batch("completed", output=jsonl(success()), id="batch_1")
    api.faults.append(Fault("GET", "/content$", status=503, headers={"Retry-After": "30"}))
    assert tool("wait", "--batch-id", "batch_1", "--timeout", "3") == 3
    resume = "to resume waiting: batch_tool.py wait --batch-id batch_1"
    assert capsys.readouterr().err.endswith(error(f"--timeout passed; {resume}"))
    assert tool("wait", "--batch-id", "batch_1", "--timeout", "3") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == jsonl(success())


@pytest.mark.parametrize(
    "status, code",
    [("completed", 0), ("COMPLETED", 0), ("failed", 1), ("expired", 1), ("cancelled", 1), ("canceled", 1)],
)
def test_wait_is_0_only_if_all_completed(
    status: str, code: int, api: LocalBatchAPI, tool: Tool, clock: FakeTime
) -> None:
    api.new_batch("completed", id="batch_1")
    api.new_batch(status, id="batch_2")
    assert tool("wait", "--batch-id", "batch_1", "batch_2") == code
    assert clock.naps == []


def test_wait_polls_a_batch_until_it_has_ended_and_no_longer(api: LocalBatchAPI, tool: Tool, clock: FakeTime) -> None:
    api.new_batch("completed", id="batch_1")
    batch = api.new_batch("in_progress", id="batch_2")
    clock.events = [nothing, lambda: batch.enter("completed", batch.born)]
    assert tool("wait", "--batch-id", "batch_1", "batch_2") == 0
    assert clock.naps == [30, 30]
    assert (asked(api, "GET", "batch_1"), asked(api, "GET", "batch_2")) == (1, 3)


def test_wait_warns_once_of_a_status_that_it_does_not_know(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    batch = api.new_batch("Paused", id="batch_1")
    clock.events = [nothing, nothing, lambda: batch.enter("completed", batch.born)]
    assert tool("wait", "--batch-id", "batch_1") == 0
    assert capsys.readouterr().err == (
        warning('batch_1: status "Paused" is not known; still waiting')
        + "batches: 1 paused; 0:00:00 elapsed\nbatches: 1 completed; 0:01:30 elapsed\n"
    )


def test_a_batch_that_is_unknown_does_not_keep_the_others_from_being_saved(
    api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    batch = api.new_batch("in_progress", id="batch_2", output=jsonl(success()))
    clock.events = [lambda: batch.enter("completed", batch.born)]
    assert tool("wait", "--batch-id", "batch_1", "batch_2") == 1
    out, err = capsys.readouterr()
    assert out.startswith("Batch ID: batch_2\nStatus: completed\n")
    assert out.endswith(f"Results saved: results_batch_2.jsonl ({len(jsonl(success()))} bytes)\n")
    assert err.endswith(error("batch_1: GET_STATUS: HTTP 404: No such batch: batch_1"))
    assert (err.count("\n"), asked(api, "GET", "batch_1")) == (3, 1)


@LATE
def test_wait_waits_for_an_output_file_that_is_late(
    late: Json, api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    batch = late_batch(api, late)
    clock.events = [nothing, lambda: bring_output(api, batch)]
    assert tool("wait", "--batch-id", "batch_1") == 0
    assert clock.naps == [30, 30]
    assert Path("results_batch_1.jsonl").read_bytes() == jsonl(success("a1"), success("a2"))


@LATE
def test_wait_gives_up_after_ten_minutes_without_an_output_file(
    late: Json, api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    late_batch(api, late)
    assert tool("wait", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == ("", (
        f"batches: 1 completed; requests: 2/2 (100%); 0:00:00 elapsed\n{error('batch_1: ' + output_missing())}"
    ))
    assert clock.now == 600


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


def test_wait_ends_with_3_when_its_time_is_up(api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture) -> None:
    api.new_batch("in_progress", id="batch_1")
    assert tool("wait", "--batch-id", "batch_1", "--timeout", "45") == 3
    assert clock.naps == [30, 15]
    resume = "the batches keep running on the server; to resume waiting: batch_tool.py wait --batch-id batch_1"
    assert capsys.readouterr().err.endswith(error(f"--timeout passed; {resume}"))


@pytest.mark.parametrize("path, output", [("/batches/", b""), ("/content$", b""), ("/content$", b"{}" * 99)],
                         ids=["poll", "look for output", "download"])
def test_a_server_that_drips_does_not_outlast_the_timeout(
    path: str, output: bytes, api: LocalBatchAPI, capsys: Capture
) -> None:
    late_batch(api, {"output": output})
    api.faults.append(Fault("GET", path, action="drip", seconds=0.3))  # some hundred bytes
    assert batch_tool.main(["wait", "--batch-id", "batch_1", "--timeout", "0.3"]) == 3
    assert "error: --timeout passed; " in capsys.readouterr().err


@pytest.mark.parametrize(
    "outage",
    [{"status": 500}, {"status": 429}, {"status": 503}, {"action": "reset"}, {"action": "cut"},
     {"status": 200, "body": b"<html>"}],
    ids=in_short,
)
def test_an_outage_after_the_first_answer_is_outlived(
    outage: Json, api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    batch = api.new_batch("in_progress", id="batch_1")
    clock.events = [
        lambda: api.faults.append(Fault("GET", times=20, **outage)), *[nothing] * 19,
        lambda: batch.enter("completed", batch.born),
    ]
    assert tool("wait", "--batch-id", "batch_1") == 0
    assert clock.naps == [30] * 21
    _, err = capsys.readouterr()
    assert err.count("batch_tool.py: warning: batch_1: ") == err.count("; still waiting\n") == 20


def test_a_rate_limit_does_not_outlast_the_timeout(api: LocalBatchAPI, tool: Tool, clock: FakeTime) -> None:
    batch = api.new_batch("in_progress")
    api.faults.append(Fault("GET", status=429, headers={"Retry-After": "100"}, times=9))
    assert tool("wait", "--batch-id", batch.id, "--timeout", "3") == 3
    assert clock.now == 3


@pytest.mark.parametrize("failure", [{"status": 500, "times": 3}, {"status": 403}], ids=in_short)
def test_a_first_poll_that_fails_ends_the_wait(
    failure: Json, api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    api.new_batch("in_progress", id="batch_1")
    api.faults.append(Fault("GET", message="Out", code="out", **failure))
    assert tool("wait", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err.endswith(f"GET_STATUS: HTTP {failure['status']}: Out (out)\n")
    assert clock.now < 30


def test_a_batch_that_disappears_is_told(api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture) -> None:
    api.new_batch("in_progress", id="batch_1")
    clock.events = [api.batches.clear]
    assert tool("wait", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err.endswith(error("batch_1: GET_STATUS: HTTP 404: No such batch: batch_1"))


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
        f"Results saved: stdout ({len(out)} bytes)\n"
        f"Errors saved: errors_batch_1.jsonl ({len(jsonl(refused('a2')))} bytes)\n"
    )


def test_out_can_be_a_fifo(api: LocalBatchAPI, tool: Tool) -> None:
    done_batch(api, errors=None)
    os.mkfifo("fifo")
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert tool("retrieve", "--batch-id", "batch_1", "--out", "fifo") == 0
    assert os.read(reader, 10_000) == jsonl(success("a1"))
    os.close(reader)


@pytest.mark.parametrize("out, reason", [
    (".", "it is a directory"),
    ("/proc/x/y", "No such file or directory"),
    ("x" * 300, "File name too long"),
])
def test_an_out_that_cannot_be_written_is_said_before_any_request(
    out: str, reason: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    assert tool("retrieve", "--batch-id", "batch_1", "--out", out) == 1
    assert capsys.readouterr() == ("", error(f"cannot write {out}: {reason}; choose another --out"))
    assert api.exchanges == []


def test_an_out_on_a_full_disk_is_exit_1(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api)
    assert tool("retrieve", "--batch-id", "batch_1", "--out", "/dev/full") == 1
    saved = f"Errors saved: errors_batch_1.jsonl ({len(jsonl(refused('a2')))} bytes)\n"
    assert capsys.readouterr() == (saved, error("batch_1: cannot write /dev/full: No space left on device"))


def test_a_batch_that_has_not_ended_is_not_completed(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.new_batch("in_progress", id="batch_1")
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == ("", error("batch_1: Batch not completed (status: in_progress)"))


@LATE
def test_retrieve_says_that_the_results_are_not_there_yet(
    late: Json, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    late_batch(api, late)
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    reason = "Batch completed, but its results are not there yet (2 requests succeeded); try again in a minute"
    assert capsys.readouterr() == ("", error(f"batch_1: {reason}"))


def test_a_batch_without_a_success_saves_its_errors_and_shows_the_most_common(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    errors = jsonl(refused("a1"), refused("a2", 400, "bad"), refused("a3"), b"[\n", b"7\n")
    done_batch(api, output=None, errors=errors)
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == (
        f"Errors saved: errors_batch_1.jsonl ({len(errors)} bytes)\n",
        error("batch_1: Batch has no results (status: completed): 2 × server_error: Sorry.; 1 × bad: Sorry."),
    )
    assert Path("errors_batch_1.jsonl").read_bytes() == errors


def test_a_batch_without_any_file_has_no_results(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, "cancelled", output=None, errors=None)
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == ("", error("batch_1: Batch has no results (status: cancelled)"))


def test_a_failed_batch_gives_the_reasons(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    batch = api.new_batch("failed", id="batch_1")
    batch.errors = {"data": [{"line": 3, "code": "bad", "message": "No."}]}
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err == error("batch_1: Batch failed: line 3: bad: No.")


@pytest.mark.parametrize("status", ["expired", "cancelled", "canceled", "EXPIRED"])
def test_a_partial_batch_is_saved_and_exit_1(status: str, api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, status, request_counts=COUNTS)
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == ["Results saved", "Errors saved"]
    name = "expired" if status == "EXPIRED" else "cancelled" if status == "canceled" else status
    reason = f"Batch {name} with 990 of 1000 requests completed; run on the same request file sends only the rest"
    assert err == error(f"batch_1: {reason}")


def test_empty_files_are_not_results(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, output=b"", errors=b"", request_counts=None)
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == ("", error("batch_1: Batch has no results (status: completed)"))
    assert not list(Path().glob("*.jsonl"))


@pytest.mark.parametrize("out", [[], ["--out", "bios.jsonl"]], ids=in_short)
def test_an_error_file_of_an_earlier_job_is_not_left_beside_new_results(
    out: list[str], api: LocalBatchAPI, tool: Tool
) -> None:
    stale = Path("bios.errors.jsonl" if out else "errors_batch_1.jsonl")
    stale.write_bytes(jsonl(refused("old")))
    done_batch(api, errors=None)
    assert tool("retrieve", "--batch-id", "batch_1", *out) == 0
    assert not stale.exists()


def test_an_error_file_of_an_earlier_job_stays_where_there_are_no_new_results(api: LocalBatchAPI, tool: Tool) -> None:
    Path("bios.errors.jsonl").write_bytes(b"old")
    done_batch(api, output=None, errors=None)
    assert tool("retrieve", "--batch-id", "batch_1", "--out", "bios.jsonl") == 1
    assert Path("bios.errors.jsonl").read_bytes() == b"old"


BROKEN = pytest.mark.parametrize(
    "broken",
    [{"action": "cut"}, {"action": "shorten"}, {"action": "reset"}, {"status": 500}, {"status": 503},
     {"status": 200, "body": b""}, {"status": 200, "body": b"<html>\n"}],
    ids=in_short,
)


@BROKEN
def test_a_download_that_breaks_off_is_made_again(broken: Json, api: LocalBatchAPI, tool: Tool) -> None:
    output = jsonl(*[success(str(number)) for number in range(3000)])
    done_batch(api, output=output, errors=None)
    api.faults.append(Fault("GET", "/content$", times=2, **broken))
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == output


@BROKEN
def test_a_download_that_stays_broken_leaves_the_old_file(
    broken: Json, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api)
    Path("results_batch_1.jsonl").write_bytes(b"old\n")
    api.faults.append(Fault("GET", "/content$", times=3, **broken))
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"batch_tool.py: error: batch_1: .*\w.*\n", err)
    assert (Path("results_batch_1.jsonl").read_bytes(), leftovers()) == (b"old\n", [])
    assert out.startswith("Errors saved: errors_batch_1.jsonl")  # it is not given up for the other one
    assert asked(api, "GET", "/content$") == 4


def test_a_rate_limit_on_a_download_is_waited_out(api: LocalBatchAPI, tool: Tool, clock: FakeTime) -> None:
    done_batch(api)
    api.faults.append(Fault("GET", "/content$", status=429, headers={"Retry-After": "9"}))
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    assert clock.naps == [9]


def test_a_file_of_another_size_is_not_kept(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    batch = done_batch(api)
    api.files[batch.output_file_id or ""].bytes += 1
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    size = len(jsonl(success("a1")))
    reason = f"download of {batch.output_file_id} was cut off ({size} of {size + 1} bytes)"
    out, err = capsys.readouterr()
    assert (out[:12], err) == ("Errors saved", error(f"batch_1: {reason}"))
    assert [*Path().glob("*.jsonl")] == [Path("errors_batch_1.jsonl")]


def test_a_saved_file_is_told_although_an_old_error_file_cannot_be_removed(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api, errors=b"")
    Path("errors_batch_1.jsonl").mkdir()
    assert tool("status", "--batch-id", "batch_1") == 1
    out, err = capsys.readouterr()
    assert out.endswith(f"Results saved: results_batch_1.jsonl ({len(jsonl(success('a1')))} bytes)\n")
    assert err == error("batch_1: cannot remove errors_batch_1.jsonl: Is a directory")


NO_SIZE = pytest.mark.parametrize("habit", ["no-bytes", "zero-bytes", "no-file-info"])
NO_LINE_END = pytest.mark.parametrize("output", [jsonl(success("a1")), jsonl(success("a1")).rstrip(), b"x" * 99],
                                      ids=["line end", "no line end", "no JSON"])


@NO_LINE_END
def test_a_file_of_the_right_size_is_kept_byte_for_byte(output: bytes, api: LocalBatchAPI, tool: Tool) -> None:
    done_batch(api, output=output, errors=None)
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == output


@NO_SIZE
@NO_LINE_END
def test_a_file_of_unknown_size_is_kept_if_its_last_line_is_an_object(
    output: bytes, habit: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.habits.add(habit)
    batch = done_batch(api, output=output, errors=None)
    is_whole = output[-1:] != b"x"
    assert tool("retrieve", "--batch-id", "batch_1") == int(not is_whole)
    if is_whole:
        assert Path("results_batch_1.jsonl").read_bytes() == output
    else:
        reason = f"download of {batch.output_file_id} was cut off (its last line is not a JSON object)"
        assert capsys.readouterr() == ("", error(f"batch_1: {reason}"))
        assert not list(Path().glob("*.jsonl"))


@NO_SIZE
def test_a_file_of_unknown_size_that_breaks_off_is_downloaded_again(
    habit: str, api: LocalBatchAPI, tool: Tool
) -> None:
    api.habits.add(habit)
    output = jsonl(*(success(str(number)) for number in range(3)))
    done_batch(api, output=output, errors=None)
    api.faults.append(Fault("GET", "/content$", skip=1, times=2, action="shorten"))
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == output


@NO_SIZE
def test_a_file_that_is_uploaded_to_a_service_that_tells_no_size_is_taken_as_it_is(
    habit: str, api: LocalBatchAPI, tool: Tool
) -> None:
    api.habits.add(habit)
    assert tool("create", "--in", requests_file()) == 0
    assert (posts(api, "/v1/files"), asked(api, "DELETE"), len(api.files)) == (1, 0, 1)


@pytest.mark.parametrize("command", ["status", "wait", "retrieve"])
def test_an_output_file_that_is_gone_is_an_error_that_names_the_batch(
    command: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api, output_file_id="file-gone")
    assert tool(command, "--batch-id", "batch_1") == 1
    out, err = capsys.readouterr()
    assert err.endswith(error(
        "batch_1: its output file is no longer on the server; an earlier download may still have its results; run "
        "--force sends, and pays for, all requests of its file again"
    ))
    assert out.endswith(f"Errors saved: errors_batch_1.jsonl ({len(jsonl(refused('a2')))} bytes)\n")


def test_with_json_a_saved_error_file_is_named_although_the_output_file_is_gone(
    api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api, output_file_id="file-gone")
    assert tool("status", "--batch-id", "batch_1", "--json") == 1
    shown = json.loads(capsys.readouterr().out)
    assert (shown["errors_path"], "results_path" in shown) == ("errors_batch_1.jsonl", False)


@pytest.mark.parametrize("command", ["status", "wait", "retrieve"])
def test_an_error_file_that_is_gone_is_a_warning(
    command: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api, error_file_id="file-gone")
    assert tool(command, "--batch-id", "batch_1") == 0
    assert capsys.readouterr().err.endswith(warning("the error file of batch batch_1 is no longer on the server"))
    assert Path("results_batch_1.jsonl").read_bytes() == jsonl(success("a1"))


@pytest.mark.parametrize(
    "habit, url",
    [*((habit, "/v1/responses") for habit in HABITS), ("all", "/v1/responses"), ("all", "/v1/chat/completions")],
)
def test_a_job_at_a_service_of_each_habit_ends_with_all_its_bios(
    habit: str, url: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.habits |= {*HABITS} - {"no-file-info", "no-bytes"} if habit == "all" else {habit}
    names = ("a1", "a2", "a3")
    requests_file(*(request(name, url=url) for name in names))
    assert tool("create", "--in", "requests.jsonl") == 0
    batch = only_batch(api)
    assert tool("wait", "--batch-id", batch.id, "--no-auto-save") == 0
    assert tool("retrieve", "--batch-id", batch.id, "--out", "results.jsonl") == 0
    assert tool("export", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "bios.csv") == 0
    bios = [row["bio"] for row in csv.DictReader(Path("bios.csv").read_text().splitlines())]
    assert bios == [f"Artist {name}: a made-up bio from the local mock server; no model was asked." for name in names]
    assert capsys.readouterr().err.endswith(
        "Wrote bios.csv: 3 succeeded, 0 rejected, 0 retryable, 0 missing of 3 requests; tokens: 360 input, 135 output\n"
    )
    assert tool("create", "--in", "requests.jsonl") == 0
    assert times_paid(api) == [1, 1, 1]
    assert sorted(api.files) == sorted({batch.input_file_id, batch.output_file_id, batch.error_file_id} - {None})


def test_a_stream_has_its_error_file_in_the_current_folder(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    batch = api.new_batch("completed", output=jsonl(success()), errors=jsonl(refused("a2")))
    assert tool("retrieve", "--batch-id", batch.id, "--out", "/dev/null") == 0
    assert Path(f"errors_{batch.id}.jsonl").read_bytes() == jsonl(refused("a2"))


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
    reason = "batch_1: CANCEL_BATCH: HTTP 409: Cannot cancel a batch with status 'completed'."
    assert capsys.readouterr() == ("", error(reason))
    assert asked(api, "POST") == 1


@pytest.mark.parametrize(
    "body, reason",
    [
        ({"id": "batch_1", "status": "Completed"}, "Batch has already ended (status: Completed)"),
        ({"id": "batch_2", "status": "cancelling"}, "the response is another batch: batch_2"),
    ],
)
def test_an_answer_that_is_no_cancellation_is_not_taken_for_one(
    body: Json, reason: str, api: LocalBatchAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    api.faults.append(Fault("POST", "/cancel$", status=200, body=json.dumps(body).encode(), times=3))
    assert tool("cancel", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == ("", error(f"batch_1: {reason}"))


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


def test_a_list_that_never_ends_is_shown_with_a_warning(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    api.habits.add("ignores-after")
    for number in range(101):
        api.new_batch("completed", created_at=MORNING + number)
    assert tool("list", "--limit", "500") == 0
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (101, warning(REPEATED))


@pytest.mark.parametrize("page, code, out", [
    ({"data": [{"id": "batch_1", "status": "completed"}]}, 0, "batch_1"),
    ({"data": [], "has_more": True}, 1, ""),
])
def test_a_page_that_is_repeated_is_shown_once_and_an_empty_one_is_not_an_empty_list(
    page: Json, code: int, out: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=200, body=json.dumps(page).encode(), times=9))
    assert tool("list", "--limit", 5) == code
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [*filter(None, [out])]


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
    assert asked(api, "GET") == requests


def test_a_stdout_of_any_encoding_takes_any_name(api: LocalBatchAPI, tool: Tool, monkeypatch: Environment) -> None:
    api.new_batch("completed", id="batch_1", metadata={"input_file": "뉴진스.jsonl"})
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert tool("list") == 0
    assert written.getvalue().endswith(b"  \\ub274\\uc9c4\\uc2a4.jsonl\n")
    written.truncate(0)
    assert tool("list", "--json") == 0
    assert json.loads(written.getvalue().lstrip(b"\0"))["metadata"]["input_file"] == "뉴진스.jsonl"


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

SUCCEEDED, REJECTED, RETRYABLE, MISSING = (
    batch_tool.SUCCEEDED, batch_tool.REJECTED, batch_tool.RETRYABLE, batch_tool.MISSING
)
REASONING = {"type": "reasoning", "summary": []}
SORRY = {"error": {"code": "server_error", "message": "Sorry."}}
ENGINE = {"error": {"error": {"message": "Engine dead.", "type": "EngineError", "code": 500}}}  # as vLLM nests it
BIO = {"status": "completed", "output": [message(text("Bio."))]}


def incomplete(reason: str) -> Json:
    return {"status": "incomplete", "incomplete_details": {"reason": reason}, "output": [message(text("Bi"))]}


def chat(finish_reason: str = "stop", **words: Any) -> Json:
    return {"choices": [{"message": {"role": "assistant"} | words, "finish_reason": finish_reason}, {"message": 7}]}


def ok(body: Any, **fields: Any) -> Json:
    return {"response": response(body)} | fields


def failed(status: Any, body: Any) -> Json:
    return {"response": response(body, status)}


# what a results line holds; how its request has ended; the bio and the error in the CSV
RESULTS: dict[str, tuple[Json, str, str, str]] = {
    "a success": (ok(BIO), SUCCEEDED, "Bio.", ""),
    "reasoning first": (ok({"output": [REASONING, message(text("Bio."))]}), SUCCEEDED, "Bio.", ""),
    "several parts": (ok({"output": [message(text("A"), text("B")), message(text("C"))]}), SUCCEEDED, "ABC", ""),
    "chat": (ok(chat(content="Bio.")), SUCCEEDED, "Bio.", ""),
    "chat parts": (ok(chat(content=[{"type": "text", "text": "A b"}, {"text": "io."}])), SUCCEEDED, "A bio.", ""),
    "a string": (ok(json.dumps(BIO)), SUCCEEDED, "Bio.", ""),
    "a string of a chat": (ok(json.dumps(chat(content="Bio."))), SUCCEEDED, "Bio.", ""),
    "null errors": (ok(BIO | {"error": None}, error=None), SUCCEEDED, "Bio.", ""),
    "neither response nor chat": (ok({"object": "list", "data": []}), SUCCEEDED, "", ""),
    "incomplete": (ok(incomplete("max_output_tokens")), REJECTED, "Bi", "incomplete: max_output_tokens"),
    "filtered": (ok(incomplete("content_filter")), REJECTED, "Bi", "incomplete: content_filter"),
    "incomplete for no reason": (ok({"status": "incomplete"}), REJECTED, "", "incomplete"),
    "chat cut off": (ok(chat("length", content="Bi")), REJECTED, "Bi", "incomplete: length"),
    "chat filtered": (ok(chat("content_filter", content="Bi")), REJECTED, "Bi", "incomplete: content_filter"),
    "chat refusal": (ok(chat(content=None, refusal="No.")), REJECTED, "", "refusal: No."),
    "refusal": (ok({"output": [message({"type": "refusal", "refusal": "No."})]}), REJECTED, "", "refusal: No."),
    "only reasoning": (ok({"status": "completed", "output": [REASONING]}), REJECTED, "", "no_text"),
    "only blanks": (ok({"output": [message(text(" \n"))]}), REJECTED, " \n", "no_text"),
    "no choices": (ok({"choices": []}), REJECTED, "", "no_text"),
    "no content": (ok(chat(content=None)), REJECTED, "", "no_text"),
    "odd items": (ok({"output": [7, {"type": "message", "content": [None, {"type": "output_text"}]}]}),
                  REJECTED, "", "no_text"),
    "odd output": (ok({"output": "Bio.", "choices": {}}), REJECTED, "", "no_text"),
    "an error in a 200": (ok(SORRY), REJECTED, "", "server_error: Sorry."),
    "an error beside a bio": (ok(BIO | SORRY), REJECTED, "Bio.", "server_error: Sorry."),
    "an error above a 200": (ok(BIO, **SORRY), REJECTED, "Bio.", "server_error: Sorry."),
    "an error in words in a 200": (ok({"error": "Overloaded"}), REJECTED, "", "error: Overloaded"),
    "unknown status": (ok({"status": "queued"}), REJECTED, "", 'not_understood: status is "queued"'),
    "no body": (ok(None), REJECTED, "", "not_understood: body is null"),
    "words": (ok("Bad gateway"), REJECTED, "", 'not_understood: body is "Bad gateway"'),
    "a string of a list": (ok("[1]"), REJECTED, "", "not_understood: body is [1]"),
    "no body but an error": (ok(None, error={"code": "x", "message": "Why."}), REJECTED, "", "not_understood: Why."),
    "400": (failed(400, {"error": {"code": "bad", "message": "No."}}), REJECTED, "", "bad: No."),
    "404 by type": (failed(404, {"error": {"code": None, "type": "bad", "message": ""}}), REJECTED, "", "bad"),
    "404 with a detail": (failed(404, {"detail": "Not Found"}), REJECTED, "", "http_404: Not Found"),
    "an error in words": (failed(400, {"error": "No."}), REJECTED, "", "http_400: No."),
    "a nested error": (failed(400, ENGINE), REJECTED, "", "500: Engine dead."),
    "failed": (ok({"status": "failed"} | SORRY), RETRYABLE, "", "server_error: Sorry."),
    "failed for no reason": (ok({"status": "failed", "error": None}), RETRYABLE, "", "failed"),
    "cancelled": (ok({"status": "cancelled", "output": []}), RETRYABLE, "", "cancelled"),
    "failed as a string": (ok(json.dumps({"status": "failed"} | SORRY)), RETRYABLE, "", "server_error: Sorry."),
    "no status": (failed(None, SORRY), RETRYABLE, "", "server_error: Sorry."),
    "status 0": (failed(0, {}), RETRYABLE, "", "http_0"),
    "408": (failed(408, {}), RETRYABLE, "", "http_408"),
    "409": (failed(409, {}), RETRYABLE, "", "http_409"),
    "429": (failed(429, {}), RETRYABLE, "", "http_429"),
    "500": (failed(500, SORRY), RETRYABLE, "", "server_error: Sorry."),
    "500 as a string": (failed(500, json.dumps(SORRY)), RETRYABLE, "", "server_error: Sorry."),
    "502 in words": (failed(502, "Bad gateway"), RETRYABLE, "", "http_502: Bad gateway"),
    "an odd response": ({"response": "odd"}, RETRYABLE, "", "no_response"),
    "no response": ({}, RETRYABLE, "", "no_response"),
    "vLLM's error": (ENGINE, RETRYABLE, "", "500: Engine dead."),
    "an error of its own in words": ({"error": "Late."}, RETRYABLE, "", "no_response: Late."),
    **{code: ({"error": {"code": code, "message": "Late."}}, RETRYABLE, "", f"{code}: Late.")
       for code in ("batch_expired", "batch_cancelled", "request_timeout", "new")},
    "missing": ({"error": {"code": "missing", "message": "Nowhere."}}, MISSING, "", "missing"),
}
LINES = pytest.mark.parametrize("fields, kind, bio, reason", list(RESULTS.values()), ids=list(RESULTS))


@LINES
def test_a_results_line_is_classified(fields: Json, kind: str, bio: str, reason: str) -> None:
    outcome = batch_tool.classify(result(**fields))
    assert (outcome.kind, outcome.error() if kind != MISSING else outcome.code) == (kind, reason)


@LINES
def test_retry_and_export_decide_and_count_alike(
    fields: Json, kind: str, bio: str, reason: str, tool: Tool, capsys: Capture
) -> None:
    path = requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(result(**fields)))
    is_to_send, is_to_send_at_all = kind in (RETRYABLE, MISSING), kind != SUCCEEDED
    assert retry(tool, "results.jsonl") == 0
    out, err = capsys.readouterr()
    assert (out, Path("again.jsonl").exists()) == (f"Requests to retry: {int(is_to_send)}\n", is_to_send)
    assert retry(tool, "results.jsonl", "--include-rejected") == 0
    assert capsys.readouterr().out == f"Requests to retry: {int(is_to_send_at_all)}\n"
    assert not is_to_send_at_all or Path("again.jsonl").read_bytes() == path.read_bytes()
    assert rows(tool, "results.jsonl") == [["a1", "Artist a1", bio, reason, "", ""]]
    counted = ", ".join(f"{int(kind == each)} {each}" for each in (SUCCEEDED, REJECTED, RETRYABLE, MISSING))
    assert err.splitlines()[0] == f"{counted} of 1 request"
    assert capsys.readouterr().err.splitlines()[0] == f"Wrote bios.csv: {counted} of 1 request"


UNUSABLE = pytest.mark.parametrize(
    "line, reason",
    [
        (b"x\n", "not valid JSON: Expecting value (character 1 of the line)"),
        (jsonl(success())[:44], "not valid JSON: Unterminated string starting at (character 42 of the line)"),
        (b'{"custom_id": "\xff"}\n', "not valid UTF-8 (byte 16 of the line)"),
        (b"[" * 100_000 + b"\n", ""),
        (b"[]\n", "not a JSON object"),
        (b"\n", "blank line"),
        (result(None), "not a results line (no custom_id)"),  # type: ignore[arg-type]
        (request(), "not a results line (no response and no error)"),
        (success("zz\n"), 'custom_id "zz\\n" is not in the request file'),
    ],
    ids=in_short,
)


@UNUSABLE
@pytest.mark.parametrize("command", ["retry", "export"])
def test_an_unusable_results_line_draws_a_warning(
    line: Any, reason: str, command: str, tool: Tool, capsys: Capture
) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(success(), line))
    assert tool(command, "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "out") == 0
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(f"batch_tool.py: warning: results.jsonl line 2: {reason}")
    assert said.endswith("; line ignored")


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
    assert totals.endswith(f"tokens: 12 input, 4 output{counted}")


OTHER = "0" * 64


@pytest.mark.parametrize(
    "lines, bio, reason",
    [
        ([refused(), success()], "A bio.", ""),
        ([success(), refused()], "A bio.", ""),
        ([success(bio="First."), success(bio="Last.")], "Last.", ""),
        ([refused(code="first"), refused(status=400, code="last")], "", "last: Sorry."),
        ([success(request_sha256=OTHER)], "", "outdated"),
        ([refused() | {"request_sha256": OTHER}], "", "outdated"),
        ([success(request_sha256=OTHER), success(bio="Mine.")], "Mine.", ""),
        ([success(bio="Mine."), success(request_sha256=OTHER)], "Mine.", ""),
        ([success(request_sha256=OTHER), refused()], "", "server_error: Sorry."),
        ([refused(), success(request_sha256=OTHER)], "", "server_error: Sorry."),
        ([success(bio="Mine.", request_sha256=sha256_of(jsonl(request())))], "Mine.", ""),
        ([refused(), result(error={"code": "missing"})], "", "server_error: Sorry."),
        ([success(request_sha256=OTHER), result(error={"code": "missing"})], "", "outdated"),
        ([success(request_sha256=7)], "A bio.", ""),
        ([], "", "missing"),
    ],
    ids=in_short,
)
def test_of_several_lines_a_success_of_this_request_wins_and_then_its_last_one(
    lines: list[Json], bio: str, reason: str, tool: Tool, capsys: Capture
) -> None:
    requests_file(request())
    Path("1.jsonl").write_bytes(jsonl(*lines[:1]))
    Path("2.jsonl").write_bytes(jsonl(*lines[1:]))
    ((_, _, found_bio, found_reason, _, _),) = rows(tool, "1.jsonl", "2.jsonl")
    assert (found_bio, found_reason) == (bio, reason)
    assert ("1 outdated of 1 request" in capsys.readouterr().err) == (reason == "outdated")
    assert retry(tool, "1.jsonl", "2.jsonl") == 0
    to_send = not bio and reason != "last: Sorry."
    assert capsys.readouterr().out == f"Requests to retry: {int(to_send)}\n"


def test_a_prompt_that_is_changed_back_has_its_bios_again(tool: Tool, capsys: Capture) -> None:
    new = request(body={"model": MODEL, "input": "New prompt"})
    both = [success(bio="Old.", request_sha256=sha256_of(jsonl(request()))),
            success(bio="New.", request_sha256=sha256_of(jsonl(new)))]
    Path("results.jsonl").write_bytes(jsonl(*both))
    for each, bio in ((request(), "Old."), (new, "New.")):
        requests_file(each)
        assert rows(tool, "results.jsonl")[0][2] == bio
    assert "1 succeeded, 0 rejected, 0 retryable, 0 missing of 1 request; " in capsys.readouterr().err


def test_results_that_run_keeps_of_other_requests_are_only_counted(tool: Tool, capsys: Capture) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(success(), success("old", request_sha256=OTHER)))
    assert rows(tool, "results.jsonl") == [["a1", "Artist a1", "A bio.", "", "12", "4"]]
    assert capsys.readouterr().err == (
        "Wrote bios.csv: 1 succeeded, 0 rejected, 0 retryable, 0 missing of 1 request; tokens: 12 input, 4 output; "
        "1 result of other requests\n"
    )


# -- retry --------------------------------------------------------------------------------------------------------


def retry(tool: Tool, *results: str) -> int:
    """Retry with these results files, or further options."""
    return tool("retry", "--in", "requests.jsonl", "--out", "again.jsonl", "--results", *results)


def test_retry_counts_how_the_requests_have_ended(tool: Tool, capsys: Capture) -> None:
    requests_file(*map(request, "abcdef"))
    Path("out.jsonl").write_bytes(jsonl(success("a")))
    Path("err.jsonl").write_bytes(jsonl(refused("b", 400, "bad"), refused("c"), refused("d"), expired("e")))
    assert retry(tool, "out.jsonl", "err.jsonl") == 0
    assert capsys.readouterr() == (
        "Requests to retry: 4\n",
        "1 succeeded, 1 rejected, 3 retryable, 1 missing of 6 requests; tokens: 12 input, 4 output\n"
        "most common errors: 2 × server_error: Sorry.; 1 × bad: Sorry.; 1 × batch_expired: Not run in time.\n"
        "rejected requests would be rejected again, so they are not written; see --include-rejected\n",
    )
    assert Path("again.jsonl").read_bytes() == jsonl(*map(request, "cdef"))


def test_include_rejected_writes_those_too(tool: Tool, capsys: Capture) -> None:
    requests_file(*map(request, "abc"))
    Path("err.jsonl").write_bytes(jsonl(refused("b", 400, "bad"), success("c")))
    assert retry(tool, "err.jsonl", "--include-rejected") == 0
    assert capsys.readouterr() == (
        "Requests to retry: 2\n",
        "1 succeeded, 1 rejected, 0 retryable, 1 missing of 3 requests; tokens: 12 input, 4 output\n"
        "most common errors: 1 × bad: Sorry.\n",
    )
    assert Path("again.jsonl").read_bytes() == jsonl(*map(request, "ab"))


def test_the_example_of_an_error_is_the_first_one_with_a_message_and_short(tool: Tool, capsys: Capture) -> None:
    requests_file(*map(request, "abc"))
    messages = ["", "Very\nlong. " * 100_000, "Other."]
    Path("err.jsonl").write_bytes(jsonl(
        *(result(name, error={"code": "x", "message": words}) for name, words in zip("abc", messages, strict=True))
    ))
    assert retry(tool, "err.jsonl") == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("most common errors: 3 × x: Very long. Very long. ")
    assert len(last) < 250


def test_requests_are_written_byte_for_byte_in_their_order(tool: Tool) -> None:
    lines = [
        json.dumps(request("b\u2028"), ensure_ascii=False).encode() + b"\n",
        b' {"body" :{"x":"\\ud800\\u0000\xc2\x85"}, "custom_id":"a\\ud800" }\r\n',
        jsonl(request("뉴진스")).rstrip(),
    ]
    requests_file(*lines)
    assert retry(tool, "/dev/null") == 0
    assert Path("again.jsonl").read_bytes() == b"".join(lines)


def test_nothing_to_retry_leaves_out_alone(tool: Tool, capsys: Capture) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(success()))
    Path("again.jsonl").write_bytes(b"old")
    assert retry(tool, "results.jsonl") == 0
    assert capsys.readouterr() == (
        "Requests to retry: 0\n",
        "1 succeeded, 0 rejected, 0 retryable, 0 missing of 1 request; tokens: 12 input, 4 output\n",
    )
    assert Path("again.jsonl").read_bytes() == b"old"


def test_retry_to_stdout_reports_on_stderr(tool: Tool, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    requests_file(request())
    assert tool("retry", "--in", "requests.jsonl", "--results", "/dev/null", "--out", "-") == 0
    out, err = capfdbinary.readouterr()
    assert (out, err.splitlines()[0]) == (jsonl(request()), b"Requests to retry: 1")


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
    with (
        pytest.raises(batch_tool.Exit),
        path.open("rb") as file,
        batch_tool.whole_output("out", [batch_tool.Input.of(file, "requests.jsonl")]),
    ):
        path.write_bytes(b"")
        raise batch_tool.Exit(130)
    assert not Path("out").exists()


def test_an_impossible_number_of_tokens_is_left_out(tool: Tool, capsys: Capture) -> None:
    requests_file(request())
    for tokens in ("9" * 4300, "-1", "true", '"7"'):
        line = jsonl(success()).decode().replace('"input_tokens": 12', f'"input_tokens": {tokens}')
        Path("results.jsonl").write_text(line)
        assert tool("export", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "out") == 0
        assert capsys.readouterr().err.endswith("; tokens: 0 input, 4 output\n")
        assert Path("out").read_bytes().endswith(b",,4\r\n")


# -- export -------------------------------------------------------------------------------------------------------


def export(tool: Tool, *options: object) -> int:
    """Export requests.jsonl with results.jsonl and further options to bios.csv."""
    return tool("export", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "bios.csv", *options)


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
        "Wrote bios.csv: 2 succeeded, 0 rejected, 1 retryable, 0 missing of 3 requests; tokens: 24 input, 8 output\n"
        "most common errors: 1 × server_error: Sorry.\n"
    ))


@pytest.mark.parametrize(
    "body, name",
    [
        ({"prompt": {"id": "p", "variables": {"artist_name": "뉴진스"}}}, "뉴진스"),
        ({"metadata": {"artist_name": "Perfume"}}, "Perfume"),
        ({"prompt": "words", "metadata": None}, ""),
        ({"messages": []}, ""),
        ({"prompt": {"variables": {"artist_name": 7}}, "metadata": {"artist_name": "B"}}, "B"),
        ("odd", ""),
    ],
    ids=in_short,
)
def test_the_artists_name_is_in_the_request(body: Any, name: str, tool: Tool) -> None:
    requests_file(request("a1", body=body))
    assert rows(tool, "/dev/null") == [["a1", name, "", "missing", "", ""]]


def random_results(rng: random.Random, custom_ids: list[str], digests: dict[str, str]) -> bytes:
    """Results lines, most of them one for each request in request order, as `run` writes them."""
    lines = []
    for custom_id in custom_ids:
        sha256 = rng.choice([{}, {"request_sha256": digests[custom_id]}, {"request_sha256": digests[custom_id]}])
        line = rng.choice([success(custom_id, f"Bio {rng.random()}", **sha256)] * 4 + [refused(custom_id) | sha256])
        lines.append(jsonl(line))
    for _ in range(rng.randrange(3)):
        odd = [success("other"), success("other", request_sha256="0" * 64), success("a1", request_sha256="0" * 64),
               success("a1"), refused("a1"), result("a1", error={"code": "missing"}), b"nonsense\n", b'{"x": 1}\n']
        lines.insert(rng.choice([0, len(lines), len(lines)]), jsonl(rng.choice(odd)))
    if rng.random() < 0.2:
        lines.pop(rng.randrange(len(lines)))
    if rng.random() < 0.1:
        rng.shuffle(lines)
    return b"".join(lines)


def test_results_in_request_order_are_exported_as_any_others(tool: Tool, capsys: Capture) -> None:
    """One pass and the index give the same CSV and the same messages. An empty second file makes it use the index."""
    Path("empty.jsonl").touch()
    in_one_pass = 0
    for seed in range(150):
        rng = random.Random(seed)
        custom_ids = [f"a{number}" for number in range(1, rng.randrange(2, 5))]
        lines = [jsonl(request(custom_id)) for custom_id in custom_ids]
        Path("requests.jsonl").write_bytes(b"".join(lines))
        digests = {custom_id: sha256_of(line) for custom_id, line in zip(custom_ids, lines, strict=True)}
        Path("results.jsonl").write_bytes(random_results(rng, custom_ids, digests))
        shown = []
        for results in (["results.jsonl"], ["results.jsonl", "empty.jsonl"]):
            assert tool("export", "--in", "requests.jsonl", "--results", *results, "--out", "bios.csv") == 0
            shown.append((Path("bios.csv").read_bytes(), capsys.readouterr()))
        assert shown[0] == shown[1], seed
        with Path("requests.jsonl").open("rb") as requests, Path("results.jsonl").open("rb") as results_file:
            inputs = batch_tool.Input.of(requests, "requests"), batch_tool.Input.of(results_file, "results")
            index = batch_tool.Results(batch_tool.RequestIndex({}, bytearray()), batch_tool.Console(None))
            with contextlib.suppress(batch_tool.NotInOrder):
                in_one_pass += len([*batch_tool.rows_in_order(*inputs, index)]) == len(lines) + 1
    assert 50 < in_one_pass < 130


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
    assert export(tool) == 0
    assert f",{bio},,12,4\r\n".encode() in Path("bios.csv").read_bytes()


def test_results_can_come_from_stdin(tool: Tool, monkeypatch: Environment) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(success()))
    with open("results.jsonl", encoding="utf-8") as stdin:
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
    assert capsys.readouterr() == ("", error("cannot read nope: No such file or directory"))
    assert (Path("bios.csv").read_text(), leftovers()) == ("old", [])


def test_export_to_stdout_is_the_csv_alone(tool: Tool, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(success()))
    assert tool("export", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "-") == 0
    out, err = capfdbinary.readouterr()
    assert out == b"artist_id,artist_name,bio,error,input_tokens,output_tokens\r\na1,Artist a1,A bio.,,12,4\r\n"
    assert err.startswith(b"Wrote to stdout: 1 succeeded, ")


def test_excel_gets_a_byte_order_mark_and_no_formulas(tool: Tool) -> None:
    bios = ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "Andr\u00e9", "x=1", " =1"]
    requests_file(*(request(f"a{number}") for number in range(len(bios))))
    Path("results.jsonl").write_bytes(jsonl(*(success(f"a{number}", bio) for number, bio in enumerate(bios))))
    assert export(tool) == 0
    plain = Path("bios.csv").read_bytes()
    assert export(tool, "--excel") == 0
    excel = Path("bios.csv").read_bytes()
    assert excel.startswith(b"\xef\xbb\xbfartist_id,")
    for content, guard in ((plain, ""), (excel[3:], "'")):
        found = [row["bio"] for row in csv.DictReader(io.StringIO(content.decode(), newline=""))]
        assert found == [f"{guard if number < 6 else ''}{bio}" for number, bio in enumerate(bios)]


# the spreadsheet


HEADER = "artist_id,artist_name,artist_data"
ADDED = ",bio,error,input_tokens,output_tokens\r\n"


@pytest.fixture
def exported(work: Path) -> None:
    """Requests a1 to a3, of which a1 and a2 have results."""
    requests_file(*map(request, ("a1", "a2", "a3")))
    Path("results.jsonl").write_bytes(jsonl(success("a2", "Two."), success("a1", "One, first."), refused("a3")))


def spreadsheet(tool: Tool, content: str | bytes, *options: object) -> str:
    """Export with this spreadsheet. The CSV that is written."""
    Path("artists.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert export(tool, "--csv", "artists.csv", *options) == 0
    return Path("bios.csv").read_bytes().decode()


def test_the_spreadsheet_comes_back_with_its_rows_and_columns_as_they_are(
    exported: None, tool: Tool, capsys: Capture
) -> None:
    content = (
        "Country,Artist ID,Notes\n"
        'UK,a2," two  ""x""\nlines "\n'
        "KR,new,=1+1\n"
        "JP, a1 ,\n"
        "FR,a3,x\n"
    )
    assert spreadsheet(tool, content) == (
        f"Country,Artist ID,Notes{ADDED}"
        'UK,a2," two  ""x""\nlines ",Two.,,12,4\r\n'
        "KR,new,=1+1,,no request,,\r\n"
        'JP, a1 ,,"One, first.",,12,4\r\n'
        "FR,a3,x,,server_error: Sorry.,,\r\n"
    )
    assert capsys.readouterr() == ("", (
        "Wrote bios.csv: 2 succeeded, 0 rejected, 1 retryable, 0 missing of 3 requests; tokens: 24 input, 8 output\n"
        "most common errors: 1 × server_error: Sorry.\n"
    ))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff", "sep={}{}", "\ufeffSEP={}{}", '"sep={}"{}'], ids=ascii)
def test_a_spreadsheet_is_read_as_the_converter_reads_it(
    delimiter: str, line_end: str, start: str, exported: None, tool: Tool
) -> None:
    lines = ["artist_id,artist_name", "a2,B", "", "a1,A"]
    content = line_end.join(lines).replace(",", delimiter)
    assert spreadsheet(tool, start.format(delimiter, line_end) + content) == (
        f'artist_id,artist_name{ADDED}a2,B,Two.,,12,4\r\na1,A,"One, first.",,12,4\r\n'
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_beats_the_encoding(encoding: str, exported: None, tool: Tool) -> None:
    content = "artist_id,Stra\u00dfe\na2,\u00e9\ub274\n".encode(encoding)
    assert spreadsheet(tool, content, "--encoding", "ascii") == (
        f"artist_id,Stra\u00dfe{ADDED}a2,\u00e9\ub274,Two.,,12,4\r\n"
    )


def test_the_encoding_of_the_spreadsheet_can_be_named(exported: None, tool: Tool, capsys: Capture) -> None:
    content = "artist_id,artist_name\na2,Bj\u00f6rk\n".encode("windows-1252")
    assert spreadsheet(tool, content, "--encoding", "windows-1252").endswith("a2,Bj\u00f6rk,Two.,,12,4\r\n")


def test_a_byte_that_is_wrong_draws_a_warning(exported: None, tool: Tool, capsys: Capture) -> None:
    assert spreadsheet(tool, b"artist_id,artist_name\na1,A\na2,Bj\xf6rk\n").endswith("\r\na2,Bj?rk,Two.,,12,4\r\n")
    assert capsys.readouterr().err.startswith(warning(
        "artists.csv: 1 of 2 rows cannot be decoded, first on line 3; each undecodable byte becomes a question "
        "mark; see --encoding"
    ))


@pytest.mark.parametrize(
    "content, options, reason",
    [
        (b"artist_id,x\na1,\xf6\na2,\xf6\n", [],
         ": 2 of 2 rows cannot be decoded, first on line 2; name the encoding with --encoding"),
        (b"artist_id,x\na1,o\na2,\"o\"x\n", [],
         " line 3: malformed quoting (',' expected after '\"'); correct the quotes"),
        (b'artist_id,x\n\na1,"o\no\n', [], " line 3: malformed quoting (unexpected end of data); correct the quotes"),
        (b'artist_id,"x"y\na1,o\n', [], " line 1: malformed quoting; correct the quotes"),
        (b"PK\x03\x04\x14\0", [], " is an Excel workbook or another zip file; save it as CSV UTF-8"),
        (b"K\xfcnstler,x\na1,o\n", ["--id-column", "Künstler"],
         ' line 1: the header has no column "Künstler"; its columns are K\\udcfcnstler, x (read in the wrong encoding; '
         "name the right one with --encoding); see --id-column"),
        (b"", [], " is empty; it needs a header and at least one row"),
        (b"\n ,\n", [], " is empty; it needs a header and at least one row"),
        (b"\nid,name\na1,o\n", [],
         ' line 2: the header has no column "artist_id"; its columns are id, name; see --id-column'),
        (b"Artist ID,artist_id\na1,o\n", [],
         ' line 1: the header names "artist_id" 2 times; its columns are Artist ID, artist_id; see --id-column'),
        (b"a,b\n1,2\n", ["--id-column", "c"],
         ' line 1: the header has no column "c"; its columns are a, b; see --id-column'),
        (b"\xff\xfea", [],
         " cannot be decoded: 'utf-16-le' codec can't decode byte 0x61 in position 0: truncated data; see --encoding"),
    ],
    ids=in_short,
)
def test_a_spreadsheet_that_cannot_be_matched_is_an_error(
    content: bytes, options: list[str], reason: str, exported: None, tool: Tool, capsys: Capture
) -> None:
    Path("artists.csv").write_bytes(content)
    assert export(tool, "--csv", "artists.csv", *options) == 1
    assert capsys.readouterr() == ("", error(f"artists.csv{reason}"))
    assert (Path("bios.csv").exists(), leftovers()) == (False, [])


@pytest.mark.parametrize("name", ["Kenn-Nummer", " kenn nummer ", "KENN_NUMMER"])
def test_the_id_column_can_be_named(name: str, exported: None, tool: Tool) -> None:
    content = "artist_id,Kenn Nummer\na1,a2\n"
    assert spreadsheet(tool, content, "--id-column", name).endswith("\na1,a2,Two.,,12,4\r\n")


@pytest.mark.parametrize(
    "content, expected",
    [
        ("artist_id,x\na1\na2,b\n", 'artist_id,x+a1,,"One, first.",,12,4\r\na2,b,Two.,,12,4\r\n'),
        ("x,artist_id\nb\n", "x,artist_id+b,,,no request,,\r\n"),
        ("artist_id\na2,b,c\na1\n", 'artist_id,,+a2,b,c,Two.,,12,4\r\na1,,,"One, first.",,12,4\r\n'),
        ("artist_id,x\na2,b,, \n", "artist_id,x+a2,b,Two.,,12,4\r\n"),
        ("artist_id,x\n,\n\n , \na2,b\n", "artist_id,x+a2,b,Two.,,12,4\r\n"),
        ("artist_id,x\na2,b\nArtist ID, X\na1,c\n", 'artist_id,x+a2,b,Two.,,12,4\r\na1,c,"One, first.",,12,4\r\n'),
        ("artist_id,x\na2,b\na2,c\n", "artist_id,x+a2,b,Two.,,12,4\r\na2,c,,no request,,\r\n"),
        ("artist_id,x\n,b\n", "artist_id,x+,b,,no request,,\r\n"),
        ("artist_id,\na2,b\n", "artist_id,+a2,b,Two.,,12,4\r\n"),
        ('"artist\nid",x\na2,b\n', '"artist\nid",x+a2,b,Two.,,12,4\r\n'),
        ("\u200bartist_id,x\n\ufeffa2\u200b,b\n", "artist_id,x+\ufeffa2\u200b,b,Two.,,12,4\r\n"),
    ],
    ids=["short", "too short for an id", "long", "blank beyond", "blank rows", "repeated header", "repeated id",
         "no id", "column without a name", "lines in the header", "invisible blanks"],
)
def test_every_row_that_is_not_blank_is_accounted_for(
    content: str, expected: str, exported: None, tool: Tool
) -> None:
    assert spreadsheet(tool, content) == expected.replace("+", ADDED)


def test_requests_without_a_row_draw_a_warning(exported: None, tool: Tool, capsys: Capture) -> None:
    assert spreadsheet(tool, "artist_id,Name\nx,a1\na2,a2\n").endswith("x,a1,,no request,,\r\na2,a2,Two.,,12,4\r\n")
    assert capsys.readouterr().err.splitlines(keepends=True)[0] == warning(
        "artists.csv has no row for 2 requests, whose results are left out; see --id-column"
    )


def test_chat_completions_get_their_names_from_the_spreadsheet(tool: Tool) -> None:
    requests_file(request(url="/v1/chat/completions", body={"model": MODEL, "messages": []}))
    Path("results.jsonl").write_bytes(jsonl(result(**ok(chat(content="Bio.")))))
    assert rows(tool, "results.jsonl")[0][:3] == ["a1", "", "Bio."]
    assert spreadsheet(tool, f"{HEADER}\na1,NewJeans,x\n") == f"{HEADER}{ADDED}a1,NewJeans,x,Bio.,,,\r\n"


def test_a_changed_prompt_is_outdated_in_the_spreadsheet(exported: None, tool: Tool) -> None:
    Path("results.jsonl").write_bytes(jsonl(success("a1", request_sha256=OTHER)))
    assert spreadsheet(tool, "artist_id\na1\na2\n") == f"artist_id{ADDED}a1,,outdated,,\r\na2,,missing,,\r\n"


def test_a_spreadsheet_can_be_written_for_excel_and_come_from_stdin(
    exported: None, tool: Tool, monkeypatch: Environment
) -> None:
    Path("artists.csv").write_text("artist_id,x\na2,=1\n")
    with open("artists.csv", encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert export(tool, "--csv", "-", "--excel") == 0
    assert Path("bios.csv").read_bytes().decode() == f"\ufeffartist_id,x{ADDED}a2,'=1,Two.,,12,4\r\n"


def test_a_field_of_any_length_comes_back(exported: None, tool: Tool) -> None:
    field = "x" * 300_000
    assert spreadsheet(tool, f"artist_id,x\na2,{field}\n").endswith(f"\na2,{field},Two.,,12,4\r\n")


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
    tool("preview", "--in", "requests.jsonl")
    log = log_text()
    for operation in ("LIST_BATCHES", "UPLOAD", "CREATE_BATCH", "DELETE_FILE", "GET_STATUS", "DOWNLOAD_RESULTS",
                      "CANCEL_BATCH", "GET_MODEL", "PREVIEW"):
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
    (found,) = [line for line in lines if " ERROR " in line]
    assert r" ERROR LIST_BATCHES error LIST_BATCHES: HTTP 403: First second\u001b[31m (forbidden)\nTraceback " in found


@pytest.mark.parametrize("limit", [400, 900, 1400, 2200])
def test_an_answer_is_shown_although_the_log_cannot_grow(limit: int, api: LocalBatchAPI, work: Path) -> None:
    """The disk is full after so many bytes of the log. What was paid for is shown, and nothing more is sent."""
    requests_file()

    def fill_the_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run([sys.executable, str(ROOT / "batch_tool.py"), "preview", "--in", "requests.jsonl"],
                          capture_output=True, text=True, preexec_fn=fill_the_disk)
    assert done.returncode == 1
    reason = r"error: cannot write the log logs/\S+: File too large; choose another with --log-file\n$"
    assert re.search(reason, done.stderr)
    assert done.stdout.count("a made-up bio") == len(api.answered)


@pytest.mark.parametrize(
    "path, reason",
    [(".", "open the log .: Is a directory; choose another with --log-file"),
     ("/dev/null/x", "open the log /dev/null/x: File exists; choose another with --log-file"),
     ("/dev/full", "write the log /dev/full: No space left on device; choose another with --log-file")],
)
def test_a_log_that_cannot_be_written_ends_the_command_before_any_request(
    path: str, reason: str, api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    assert tool("create", "--in", "requests.jsonl", "--log-file", path) == 1
    assert capsys.readouterr() == ("", error(f"cannot {reason}"))
    assert api.exchanges == []


def test_the_log_is_not_written_through_a_link_in_its_place(api: LocalBatchAPI, tool: Tool, capsys: Capture) -> None:
    Path("target").write_text("Mine.\n")
    mode = Path("target").stat().st_mode
    Path("logs").mkdir()
    for second in range(120):
        name = time.strftime("batch_%Y%m%d_%H%M%S.log", time.localtime(time.time() + second))
        Path("logs", name).symlink_to("../target")
    assert tool("list") == 1
    assert re.fullmatch(
        r"batch_tool.py: error: cannot open the log logs/batch_\d+_\d+\.log: Too many levels of symbolic links; choose "
        r"another with --log-file\n", capsys.readouterr().err,
    )
    assert (Path("target").read_text(), Path("target").stat().st_mode, api.exchanges) == ("Mine.\n", mode, [])
    assert tool("list", "--log-file", next(Path("logs").iterdir())) == 0  # as the user says


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
    fault: Json, options: list[str], api: LocalBatchAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", **fault))
    tool("status", "--batch-id", "b", *options)
    out, err = capsys.readouterr()
    for said in (out, err, log_text()):
        assert KEY[:12] not in said
    if "--json" in options and out:
        json.loads(out)


def test_a_key_of_any_shape_is_hidden_from_eight_characters_on(
    api: LocalBatchAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
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
    password: str, hidden: list[str], work: Path, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://user:{password}@127.0.0.1:9/v1")
    assert batch_tool.base_url() == f"http://user:{password}@127.0.0.1:9/v1"
    assert batch_tool.secrets_in_environment() == hidden


# -- command line -------------------------------------------------------------------------------------------------


def usage_error(arguments: list[str], capsys: Capture) -> str:
    """The last line of stderr of a command line that is refused."""
    with pytest.raises(SystemExit) as stopped:
        batch_tool.main(arguments)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    return err.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_can_be_abbreviated(command: str, work: Path, capsys: Capture) -> None:
    for option in flags_of(command) - {"--in"}:
        reason = usage_error([command, *USAGE[command], option[:-1] + "=1"], capsys)
        assert "unrecognized arguments: " in reason or "required: " in reason


def test_the_commands_stand_in_the_order_a_batch_lives_and_know_what_is_offline() -> None:
    assert [*COMMANDS] == ["validate", "preview", "create", "status", "wait", "retrieve", "cancel", "list", "retry",
                           "export", "run"]
    assert OFFLINE == ["validate", "retry", "export"]
    assert WITH_JSON == ["create", "status", "wait", "cancel", "list"]
    assert all({"--log-file", "--verbose"} <= flags_of(command) for command in ONLINE)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_a_result_within_80_columns(command: str | None, work: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        batch_tool.main([*([command] if command else []), "--help"])
    out, err = capsys.readouterr()
    assert (stopped.value.code, err) == (0, "")
    assert all(len(line) <= 88 for line in out.splitlines())
    assert (flags_of(command) if command else {*COMMANDS}) <= set(re.findall(r"[a-z-]+", out))


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "the following arguments are required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["validate"], "the following arguments are required: --in"),
        (["create", "--in", ""], "argument --in: must not be empty"),
        (["create", "--in", "x", "--max-requests", "0"], "not a whole number of 1 or more: '0'"),
        (["create", "--in", "x", "--max-requests", "50001"], "the limit of a batch is 50000 requests: '50001'"),
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
        (["retrieve", "--batch-id", "a", "b", "--out", "x"], "--out works with a single --batch-id only"),
        (["preview", "--in", "x", "--requests", "0"], "not a whole number of 1 or more: '0'"),
        (["preview", "--in", "x", "--prices", "1"], "not two prices like 0.05,0.25: '1'"),
        (["preview", "--in", "x", "--prices", "1,-2"], "not two prices like 0.05,0.25: '1,-2'"),
        (["preview", "--in", "x", "--prices", "1,nan"], "not two prices like 0.05,0.25: '1,nan'"),
        (["preview", "--in", "x", "--prices", "1,2,3"], "not two prices like 0.05,0.25: '1,2,3'"),
        (["export", *USAGE["export"], "--encoding", "nope", "--csv", "c"], "not an encoding that Python knows: 'nope'"),
        (["export", *USAGE["export"], "--id-column", "x"], "--id-column and --encoding need --csv"),
        (["export", *USAGE["export"], "--encoding", "ascii"], "--id-column and --encoding need --csv"),
        (["export", "--in", "-", "--csv", "-", "--results", "s", "--out", "o"], "only one input can be stdin (-)"),
        (["retry", "--in", "-", "--results", "-", "--out", "x"], "only one input can be stdin (-)"),
        (["retry", "--in", "/dev/stdin", "--results", "-", "--out", "x"], "only one input can be stdin (-)"),
    ],
    ids=in_short,
)
def test_a_usage_error_is_exit_2(arguments: list[str], reason: str, work: Path, capsys: Capture) -> None:
    assert reason in usage_error(arguments, capsys)


READ_AND_WRITTEN = " would be read and written at once; choose another path to write"


@pytest.mark.parametrize("command", ["retry", "export", "preview"])
@pytest.mark.parametrize("out", ["requests.jsonl", "results.jsonl", "link", "artists.csv"])
def test_a_file_cannot_be_read_and_written_at_once(command: str, out: str, work: Path, capsys: Capture) -> None:
    requests_file()
    Path("results.jsonl").write_bytes(jsonl(success()))
    Path("artists.csv").write_text("artist_id\n")
    Path("link").symlink_to("requests.jsonl")
    inputs = {"--in": "requests.jsonl", "--results": "results.jsonl", "--csv": "artists.csv"}
    arguments = [word for flag in flags_of(command) & {*inputs} for word in (flag, inputs[flag])]
    if os.path.realpath(out) in [os.path.realpath(path) for path in arguments]:
        assert usage_error([command, *arguments, "--out", out], capsys).endswith(READ_AND_WRITTEN)


def test_the_log_cannot_be_stdout(work: Path, capsys: Capture) -> None:
    said = usage_error(["list", "--log-file", "-"], capsys)
    assert said.endswith("argument --log-file: stdout is for results; name a file, or /dev/stderr")


def test_the_log_cannot_be_the_request_file(work: Path, capsys: Capture) -> None:
    requests_file()
    arguments = ["create", "--in", "requests.jsonl", "--log-file", "requests.jsonl"]
    assert usage_error(arguments, capsys).endswith(READ_AND_WRITTEN)


@pytest.mark.parametrize("arguments", [
    ["run", "--in", "requests.jsonl", "--out", "x", "--log-file", "./x"],
    ["status", "--batch-id", "b1", "b2", "--log-file", "results_b2.jsonl"],
    ["retrieve", "--batch-id", "b1", "--out", "x.jsonl", "--log-file", "./x.errors.jsonl"],
], ids=in_short)
def test_the_results_cannot_go_into_the_log(arguments: list[str], work: Path, capsys: Capture) -> None:
    requests_file()
    assert usage_error(arguments, capsys).endswith(
        "the log would be the same file as the output; choose another --log-file"
    )


@pytest.mark.parametrize("arguments", [[KEY], ["list", "--api-key", KEY], ["status", "--batch-id", f"Bearer {KEY}"],
                                       ["list", "--limit", "my-own-key"]], ids=in_short)
def test_a_usage_error_does_not_show_the_key(
    arguments: list[str], work: Path, monkeypatch: Environment, capsys: Capture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "my-own-key")
    said = usage_error(arguments, capsys)
    assert "[secret]" in said and KEY[10:] not in said and "my-own" not in said


# -- processes of their own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["gen_batch_jsonl.py", "batch_tool.py"])
def test_an_old_python_is_told_what_is_needed(script: str) -> None:
    old = "import runpy, sys; sys.version_info, sys.version = (3, 10, 1), '3.10.1 (main)'; runpy.run_path(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", old, ROOT / script], capture_output=True, text=True)
    reason = f"{script}: error: it needs Python 3.11 or later; this is 3.10.1\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", reason)


def common_block(script: str) -> str:
    content = (ROOT / script).read_text()
    block = re.search(r"^# ==== common block.*?^# ==== end of the common block[^\n]*\n", content, re.S | re.M)
    return block[0] if block else ""


def test_what_stands_in_both_scripts_is_the_same_byte_for_byte() -> None:
    block = common_block("gen_batch_jsonl.py")
    if not block:
        pytest.skip("gen_batch_jsonl.py has no common block")
    assert block == common_block("batch_tool.py")


def test_the_description_of_the_program_is_in_its_help(work: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        batch_tool.main(["--help"])
    assert (batch_tool.__doc__ or "nothing") in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_the_interpreter_swallowed_can_be_sent_again() -> None:
    class Callback:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # in which the handler raises, for nobody to catch

    with pytest.raises(batch_tool.Exit), batch_tool.stopping_on_signals():
        Callback()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.1)  # the second after a first signal is left to the cleaning up
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def bare(*args: object, python: Iterable[str] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    """Run without any installed package, so without the SDK. `python` are options of the interpreter."""
    command = [sys.executable, "-S", "-I", *python, str(ROOT / "batch_tool.py"), *map(str, args)]
    defaults: Json = {"capture_output": True, "encoding": "utf-8", "timeout": 60}
    done: subprocess.CompletedProcess[str] = subprocess.run(command, **defaults | options)
    return done


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


def test_without_the_sdk_an_online_command_says_how_to_get_it(work: Path, monkeypatch: Environment) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    done = bare("list")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"batch_tool.py: error: the openai package cannot be imported \(.*\); pip install -r requirements.txt, "
        r"or use the Python of a virtual environment that has it\n",
        done.stderr,
    )


# what stdout takes, with a buffer and without one

UNBUFFERED = pytest.mark.parametrize("python", [[], ["-u"]], ids=["buffered", "unbuffered"])
TO_STDOUT = pytest.mark.parametrize(
    "arguments", [["validate"], ["export", "--results", "/dev/null", "--out", "-"]], ids=in_short
)


def bare_to(stdout: Any, python: list[str], arguments: list[str]) -> tuple[int, str]:
    """Run on requests.jsonl with this stdout. The exit code and what is on stderr."""
    done = bare(*arguments, "--in", "requests.jsonl", python=python, capture_output=False, stdout=stdout,
                stderr=subprocess.PIPE)
    return done.returncode, done.stderr


@UNBUFFERED
@TO_STDOUT
def test_a_closed_stdout_ends_the_program_quietly(arguments: list[str], python: list[str], work: Path) -> None:
    requests_file()
    ours, theirs = os.pipe()
    os.close(ours)
    assert bare_to(theirs, python, arguments) == (1, "")
    os.close(theirs)


@UNBUFFERED
@TO_STDOUT
def test_a_full_disk_behind_stdout_is_one_line(arguments: list[str], python: list[str], work: Path) -> None:
    requests_file()
    with open("/dev/full", "w") as full:
        assert bare_to(full, python, arguments) == (1, error("cannot write stdout: No space left on device"))


@UNBUFFERED
def test_a_slow_reader_of_a_non_blocking_pipe_gets_every_byte(python: list[str], work: Path) -> None:
    content = requests_file(*(request(str(number)) for number in range(2000))).read_bytes()
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    arguments = ["retry", "--in", "requests.jsonl", "--results", "/dev/null", "--out", "-"]
    command = [sys.executable, *python, str(ROOT / "batch_tool.py"), *arguments]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL) as process:
        os.close(theirs)
        time.sleep(0.3)  # the pipe is full
        with open(ours, "rb") as reader:
            assert reader.read() == content
    assert (process.returncode, len(content) > 300_000) == (0, True)


@UNBUFFERED
def test_a_disk_that_takes_only_a_part_of_the_last_line_is_exit_1(python: list[str], work: Path) -> None:
    content = requests_file(jsonl(request()).rstrip().rjust(8 * 1024 + 9) + b"\n").read_bytes()
    script = " ".join([sys.executable, *python, str(ROOT / "batch_tool.py")])
    command = f"ulimit -f 8; trap '' XFSZ; exec {script} retry --in requests.jsonl --results /dev/null --out - > out"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, error("cannot write stdout: File too large"))
    assert Path("out").read_bytes() == content[: 8 * 1024]


@pytest.mark.parametrize(("redirection", "code", "out", "err"), [
    ("validate --in requests.jsonl 2> /dev/full", 0, "OK: 2 requests, {size} bytes, 1 batch\n", ""),
    ("validate --nonsense 2> /dev/full", 2, "", ""),
    ("validate --nonsense 2>&-", 2, "", ""),
    ("--help > /dev/full", 1, "", error("cannot write stdout: No space left on device")),
    ("run --help | true; exit $PIPESTATUS", 1, "", ""),
    ("validate --in - <&-", 1, "", error("stdin is closed; there is nothing to read")),
    ("validate --in requests.jsonl >&-", 1, "", ""),
])
def test_a_stream_that_takes_or_gives_nothing_is_foreseen(
    redirection: str, code: int, out: str, err: str, work: Path
) -> None:
    size = requests_file().stat().st_size
    command = f"'{sys.executable}' '{ROOT}/batch_tool.py' {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, out.format(size=size), err)


def test_a_full_disk_leaves_the_old_file(work: Path) -> None:
    requests_file(*[request(str(number)) for number in range(500)])
    Path("out").write_text("old")
    command = f"ulimit -f 8; trap '' XFSZ; exec {sys.executable} {ROOT / 'batch_tool.py'} " \
              "retry --in requests.jsonl --results /dev/null --out out"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, error("cannot write out: File too large"))
    assert (Path("out").read_text(), leftovers()) == ("old", [])


def test_a_signal_leaves_the_batch_running_and_says_how_to_resume(api: LocalBatchAPI) -> None:
    batch = api.new_batch("in_progress", id="batch_1")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        wait = ("wait", "--batch-id", "batch_1", "--log-file")
        processes = [stack.enter_context(started(*wait, f"{number}.log")) for number in numbers]
        for number, process in zip(numbers, processes, strict=True):
            assert process.stderr
            progress = process.stderr.readline()
            process.send_signal(number)
            said = [process.stderr.readline(), process.stderr.readline()]
            process.send_signal(number)  # while the interpreter ends
            assert process.communicate(timeout=30) == ("", "")
            assert process.returncode == 128 + number
            assert progress == "batches: 1 in_progress; 0:00:00 elapsed\n"
            assert said == [
                "the batches keep running on the server; to resume waiting: batch_tool.py wait --batch-id batch_1\n",
                "batch_tool.py: stopped\n",
            ]
    assert (batch.status, asked(api, "POST")) == ("in_progress", 0)


INTERRUPT = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.01)\n"
IN_CALLBACK = f"class Callback:\n def __del__(self):\n  {'; '.join(INTERRUPT.splitlines())}\nCallback()\n"


@pytest.mark.parametrize("module, code", [("csv", INTERRUPT), ("openai", INTERRUPT), ("openai", IN_CALLBACK)],
                         ids=["csv", "openai", "callback"])
def test_ctrl_c_during_the_imports_is_no_traceback(
    module: str, code: str, api: LocalBatchAPI, monkeypatch: Environment
) -> None:
    Path("modules").mkdir()
    Path("modules", f"{module}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(Path("modules").absolute()))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that the process does not inherit that it is ignored
    done = run("batch_tool.py", "list")
    assert (done.returncode, done.stdout, done.stderr) in [
        (-signal.SIGINT, "", ""), (128 + signal.SIGINT, "", "batch_tool.py: stopped\n")
    ]


def test_a_signal_during_a_download_leaves_the_old_file(api: LocalBatchAPI) -> None:
    done_batch(api)
    Path("results_batch_1.jsonl").write_text("old")
    api.faults.append(Fault("GET", "/content$", action="delay", seconds=30))
    with started("retrieve", "--batch-id", "batch_1") as process:
        until(leftovers)
        until(lambda: asked(api, "GET", "/content$"))
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
