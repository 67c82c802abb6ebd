"""How a request file is checked and submitted, by `create` and `run`: nothing is paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import stat
import sys
import time
import time as real_time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import (
    DUPLICATE,
    LATE,
    MODEL,
    OUT,
    REQUESTS,
    Capture,
    Environment,
    FakeTime,
    Json,
    Killed,
    Tool,
    another_machine,
    asked,
    assert_out,
    assert_paid_once,
    batch_of_a_run,
    create,
    earlier_batch,
    error,
    ids,
    in_short,
    jsonl,
    kill,
    late_batch,
    live_in,
    main,
    nothing,
    numbered,
    only_batch,
    posts,
    release,
    replace,
    request,
    requests_file,
    run,
    sent,
    sha256,
    stopped_run,
    success,
    times_paid,
    warning,
    write_requests,
)
from faulty_api import Fault, FaultyAPI, LocalBatch

import batch_tool

DAY = 24 * 60 * 60


def last_batch(api: FaultyAPI) -> LocalBatch:
    return [*api.batches.values()][-1]


DAY = 24 * 60 * 60


# ---- validate ----


def test_a_valid_file_is_counted(tool: Tool, capsys: Capture) -> None:
    path = requests_file(request("a1"))
    assert tool("validate", "--in", path) == 0
    assert capsys.readouterr() == (f"OK: 1 request, {path.stat().st_size} bytes, 1 batch\n", "")


def test_the_number_of_batches_is_shown(tool: Tool, capsys: Capture) -> None:
    path = Path("many.jsonl")
    line = jsonl(request("ID"))
    path.write_bytes(b"".join(line.replace(b"ID", b"%d" % number) for number in range(50_001)))
    assert tool("validate", "--in", path) == 0
    assert capsys.readouterr().out == f"OK: 50001 requests, {path.stat().st_size} bytes, 2 batches\n"


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
    (found,) = check.problems([jsonl(request("a1")), jsonl(line)], batch_tool.PartDivider())
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
    (problem,) = batch_tool.InputCheck().problems([line], batch_tool.PartDivider(max_bytes=len(line) - 1))
    assert str(problem) == f"line 1: invalid_request: {len(line)} bytes; the limit of a batch is {len(line) - 1}"


def test_the_first_twenty_errors_are_shown_and_then_a_count(tool: Tool, capsys: Capture) -> None:
    requests_file(*[b"{\n"] * 23)
    assert tool("validate", "--in", "requests.jsonl") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[19].startswith("line 20: ")
    assert lines[20] == "… and 3 more"
    assert lines[21:] == error("requests.jsonl: 23 errors; correct the file; nothing was uploaded").splitlines()


ODD_FILE = "an Excel workbook, an archive or UTF-16: convert the CSV in it with gen_batch_jsonl.py"


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"artist_id,artist_name\r\na1,NewJeans\r\n" * 20,
         "not JSONL; it looks like a CSV: convert it with gen_batch_jsonl.py first"),
        (b"\xef\xbb\xbfid;name\n" * 9, "not JSONL; it looks like a CSV: convert it with gen_batch_jsonl.py first"),
        (b"\xff\xfea\0,\0\n\0" * 9, ODD_FILE),
        (b"PK\x03\x04\x14\n\n\n", ODD_FILE),
        (b"NewJeans\n" * 9, "not JSONL; it looks like text: convert it with gen_batch_jsonl.py first"),
        (jsonl(success()) * 9, "a results file: name the request file that gen_batch_jsonl.py wrote"),
    ],
    ids=in_short,
)
@pytest.mark.parametrize("command", ["validate", "create"])
def test_a_file_of_another_kind_is_one_error_that_says_what_to_do(
    content: bytes, problem: str, command: str, api: FaultyAPI, tool: Tool, capsys: Capture
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
    divider = batch_tool.PartDivider(max_requests=2)
    for line in lines:
        divider.add(line)
    first, second, third = divider.parts()
    assert (first.label, second.label, third.label) == ("1/3", "2/3", "3/3")
    assert (second.offset, second.size, second.first, second.requests) == (first.size, len(lines[2] + lines[3]), 2, 2)
    assert second.sha256 == hashlib.sha256(lines[2] + lines[3]).hexdigest()


def test_parts_stay_within_the_most_bytes() -> None:
    lines = [jsonl(request(custom_id)) for custom_id in ("a1", "a2", "a3")]
    divider = batch_tool.PartDivider(max_bytes=2 * len(lines[0]))
    for line in lines:
        divider.add(line)
    assert [(part.requests, part.size) for part in divider.parts()] == [(2, 2 * len(lines[0])), (1, len(lines[2]))]


# ---- create ----


def test_create_prints_the_ids_and_uploads_the_file_as_it_is(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    path = requests_file()
    assert tool("create", "--in", path) == 0
    batch = only_batch(api)
    assert capsys.readouterr() == (ids(batch), "")
    assert (batch.endpoint, batch.completion_window) == ("/v1/responses", "24h")
    assert batch.metadata == {"input_sha256": sha256(path.read_bytes()), "input_file": path.name, "part": "1/1"}
    assert api.read_file(batch.input_file_id) == path.read_bytes()
    assert (api.files[batch.input_file_id].purpose, api.files[batch.input_file_id].filename) == ("batch", path.name)


def test_create_as_json_is_the_batch_as_the_api_gave_it(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    assert tool("create", "--in", requests_file(), "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == api.exchanges[-1].answer_json


def test_the_endpoint_and_the_completion_window_can_be_chosen(api: FaultyAPI, tool: Tool) -> None:
    path = requests_file(request(url="/v1/chat/completions"))
    assert tool("create", "--in", path, "--endpoint", "/v1/chat/completions", "--completion-window", "24h") == 0
    assert only_batch(api).endpoint == "/v1/chat/completions"


def test_a_completion_window_that_the_api_refuses_is_an_error_and_the_file_is_deleted(
    api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    assert tool("create", "--in", requests_file(), "--completion-window", "1h") == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"File ID: file-\w+\n", out)
    words = "Invalid value for 'completion_window': only '24h' is supported."
    assert err == error(f"CREATE_BATCH: HTTP 400: {words}")
    assert (api.files, api.batches) == ({}, {})


def test_a_file_whose_id_cannot_be_printed_is_deleted(
    api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    assert tool("create", "--in", requests_file()) == 1
    assert capsys.readouterr().err == error("cannot write stdout: No space left on device")
    assert (asked(api, "POST", "/files"), asked(api, "DELETE", "/files/"), api.files) == (1, 1, {})


def test_a_file_beyond_the_most_requests_becomes_several_batches(
    api: FaultyAPI, tool: Tool, capsys: Capture
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


def test_stdin_is_submitted(api: FaultyAPI, tool: Tool, monkeypatch: Environment) -> None:
    with requests_file().open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert tool("create", "--in", "-") == 0
    batch = only_batch(api)
    assert batch.metadata and batch.metadata["input_file"] == "stdin"
    assert api.read_file(batch.input_file_id) == Path("requests.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["stdin", "requests.txt", ".jsonl", "a.jsonl.gz", "ünï cödé", "requests.jsonl"])
def test_the_name_of_an_upload_ends_in_jsonl(api: FaultyAPI, monkeypatch: Environment, name: str) -> None:
    path = requests_file(path=name)
    with path.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main("create", "--in", "-" if name == "stdin" else name) == 0
    (file,), (batch,) = api.files.values(), api.batches.values()
    assert file.filename == name + ("" if name.endswith(".jsonl") else ".jsonl")
    assert (batch.metadata or {})["input_file"] == name


@pytest.mark.parametrize(
    "name", [b"\xff.jsonl", b"a\nb.jsonl", b"requests.txt", b".jsonl", '뉴진스 "x".jsonl'.encode()], ids=in_short
)
def test_a_file_of_any_name_is_submitted(name: bytes, api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    assert tool("create", "--in", requests_file(path=os.fsdecode(name))) == 0
    assert capsys.readouterr().out == ids(only_batch(api))


def test_create_looks_at_the_file_before_the_key_the_log_and_the_network(
    api: FaultyAPI, monkeypatch: Environment, capsys: Capture
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    requests_file(request("a1"), request("a1"))
    assert create() == 1
    assert "duplicate_custom_id" in capsys.readouterr().err
    assert (api.exchanges, os.listdir()) == ([], ["requests.jsonl"])


# ---- the model ----


def test_a_model_that_does_not_exist_is_an_error_before_the_upload(
    api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    path = requests_file(request(body={"model": "local-dead", "input": "Who?"}))
    assert tool("create", "--in", path) == 1
    advice = "choose another model; nothing was sent"
    reason = f'the model "local-dead" does not exist at {api.base_url}/; {advice}'
    assert capsys.readouterr() == ("", error(reason))
    assert (asked(api, "POST"), asked(api, "GET", "/v1/models/local-dead$")) == (0, 1)


@pytest.mark.parametrize("days, words", [(-1, "was"), (0, "will be"), (29, "will be"), (32, "")])
def test_a_model_that_is_soon_shut_down_draws_a_warning(
    days: int, words: str, api: FaultyAPI, tool: Tool, capsys: Capture
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
    answer: Json, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", "/models/", times=9, **answer))
    assert tool("create", "--in", requests_file()) == 0
    assert capsys.readouterr() == (ids(only_batch(api)), "")
    assert asked(api, "GET", "/models/") == 1


# ---- uploads and refusals ----


def test_an_upload_whose_answer_is_lost_is_made_again(api: FaultyAPI, tool: Tool) -> None:
    path = requests_file()
    api.faults.append(Fault("POST", "/files$", when="after", action="reset", times=2))
    assert tool("create", "--in", path) == 0
    assert api.read_file(only_batch(api).input_file_id) == path.read_bytes()


def test_an_upload_that_is_refused_ends_the_command(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("POST", "/files$", status=413, message="Too large", code="too_large"))
    assert tool("create", "--in", requests_file()) == 1
    assert capsys.readouterr() == ("", error("UPLOAD: HTTP 413: Too large (too_large)"))
    assert (asked(api, "POST"), api.batches) == (1, {})


def truncate_uploads(api: FaultyAPI, times: int) -> list[Fault]:
    """Faults that answer to uploads with a file that has only the first 10 bytes."""
    files = [api.new_file(b"0123456789", "batch", "x") for _ in range(times)]
    bodies = [json.dumps({"id": file.id, "object": "file", "bytes": 10}).encode() for file in files]
    return [Fault("POST", "/files$", status=200, body=body) for body in bodies]


def test_an_upload_that_arrived_in_part_is_deleted_and_made_again(
    api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults += truncate_uploads(api, 2)
    assert tool("create", "--in", requests_file()) == 0
    assert capsys.readouterr() == (ids(only_batch(api)), "")
    assert ([*api.files], posts(api, "/v1/files")) == ([only_batch(api).input_file_id], 3)


def test_an_upload_is_made_three_times_at_most(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    api.faults += truncate_uploads(api, 4)
    last = [*api.files][2]
    path = requests_file()
    assert tool("create", "--in", path) == 1
    size = path.stat().st_size
    assert capsys.readouterr() == ("", error(f"file {last} has 10 bytes, but {size} were uploaded; it was deleted"))
    assert (len(api.files), posts(api, "/v1/files"), api.batches) == (1, 3, {})


@pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
def test_a_refused_batch_deletes_its_file(status: int, api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("POST", "/batches$", status=status, times=9, message="No", code="no"))
    assert tool("create", "--in", requests_file()) == 1
    assert capsys.readouterr().err == error(f"CREATE_BATCH: HTTP {status}: No (no)")
    assert (posts(api), api.files) == (1, {})


def test_a_file_that_cannot_be_deleted_draws_a_warning(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
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
    status: int, api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    def deny_the_file() -> None:
        (file_id,) = api.files
        api.faults.append(Fault("POST", "/batches$", times=3, status=status, message=f"There is no {file_id}"))

    api.faults.append(Fault("POST", "/batches$", status=429, headers={"Retry-After": "7"}))
    clock.events = [deny_the_file]
    assert tool("create", "--in", requests_file()) == 0
    assert clock.naps == [7, 0.5, 1.5, 3]
    assert capsys.readouterr().out == ids(only_batch(api))


def test_a_file_that_stays_unknown_ends_the_command(api: FaultyAPI, tool: Tool, clock: FakeTime) -> None:
    api.faults.append(Fault("POST", "/batches$", status=429, headers={"Retry-After": "7"}))
    clock.events = [api.files.clear]
    assert tool("create", "--in", requests_file()) == 1
    assert clock.naps == [7, 0.5, 1.5, 3, 5]
    assert api.batches == {}


@pytest.mark.parametrize("habits", [("limits-after-post",), ("copies-uploads",)], ids=in_short)
@pytest.mark.parametrize("command", [create, run])
def test_one_post_is_enough_and_its_file_stays(
    api: FaultyAPI, command: Callable[..., int], habits: tuple[str, ...]
) -> None:
    """A 429 to a POST that was carried out; a batch that names a copy of its input file."""
    api.habits = {*habits}
    content = write_requests("a1", "a2")
    assert command() == 0
    assert (posts(api), posts(api, "/v1/files"), asked(api, "DELETE")) == (1, 1, 0)
    assert create() == 0
    assert (posts(api), times_paid(api)) == (1, [1, 1])
    assert api.read_file(next(iter(api.files))) == content


@pytest.mark.parametrize("command", [create, run])
def test_a_connection_that_is_refused_at_the_post_only_costs_some_seconds(
    api: FaultyAPI, command: Callable[..., int]
) -> None:
    api.faults = [Fault("GET", "/batches$", skip=1, action="close")]
    write_requests("a1")
    time = FakeTime(nothing, api.listen)
    assert command(time=time) == 0
    assert (posts(api), posts(api, "/v1/files"), asked(api, "DELETE")) == (1, 1, 0)
    assert sum(time.naps[:2]) < 5


@pytest.mark.parametrize("command", [create, run])
def test_a_service_that_stays_away_at_the_post_ends_it(
    api: FaultyAPI, command: Callable[..., int], capsys: Capture
) -> None:
    api.faults = [Fault("GET", "/batches$", skip=1, action="close")]
    write_requests("a1")
    assert command() == 1
    assert capsys.readouterr().err.splitlines()[-1] + "\n" == error(
        f"cannot reach {api.base_url}/: [Errno 111] Connection refused"
    )
    api.faults = []
    api.listen()
    assert command() == 0
    assert times_paid(api) == [1]


@pytest.mark.parametrize("command", [create, run])
def test_a_file_whose_id_cannot_be_used_is_an_error_at_once(
    api: FaultyAPI, command: Callable[..., int], capsys: Capture
) -> None:
    api.faults = [Fault("POST", "/files$", status=200, body=b'{"id": "file 1", "object": "file"}', times=99)]
    write_requests("a1")
    time = FakeTime()
    assert command(time=time) == 1
    assert '"file 1"' in capsys.readouterr().err.splitlines()[-1]
    assert (posts(api, "/v1/files"), posts(api), time.now) == (1, 0, 0)


def test_a_batch_whose_id_cannot_be_used_is_an_error_at_once(api: FaultyAPI, capsys: Capture) -> None:
    body = b'{"id": "batch 1", "object": "batch", "status": "validating"}'
    api.faults = [Fault("POST", "/batches$", status=200, body=body, times=99)]
    write_requests("a1")
    time = FakeTime()
    assert run(time=time) == 1
    assert '"batch 1"' in capsys.readouterr().err.splitlines()[-1]
    assert (posts(api, "/v1/files"), posts(api), time.now) == (1, 1, 0)


def test_a_service_that_rewrites_uploads_costs_one_more_of_them_and_a_warning(api: FaultyAPI, capsys: Capture) -> None:
    api.habits = {"rewrites-uploads"}
    write_requests(*numbered(6))
    assert create("--max-requests", "2") == 0
    assert capsys.readouterr().err.count("warning: this service rewrites what is uploaded: ") == 1
    assert (posts(api, "/v1/files"), asked(api, "DELETE"), times_paid(api)) == (4, 1, [1] * 6)


def test_an_upload_that_is_larger_in_another_way_each_time_is_not_whole(api: FaultyAPI, capsys: Capture) -> None:
    for size in (1001, 1002, 1003):
        body = json.dumps({"id": api.new_file(b"", "batch", "x").id, "object": "file", "bytes": size}).encode()
        api.faults.append(Fault("POST", "/files$", status=200, body=body))
    write_requests("a1")
    assert create() == 1
    assert "has 1003 bytes, but " in capsys.readouterr().err
    assert (api.files, posts(api)) == ({}, 0)


def test_odd_entries_in_the_listing_draw_one_warning_and_stop_nothing(api: FaultyAPI, capsys: Capture) -> None:
    api.habits = {"odd-entries"}
    content = write_requests(*numbered(3))
    assert run("--max-requests", "1") == 0
    assert capsys.readouterr().err.count("warning: ") == 1
    assert_paid_once(api, content)


def test_a_rate_limit_on_the_post_is_waited_out(api: FaultyAPI, tool: Tool, clock: FakeTime) -> None:
    api.faults.append(Fault("POST", "/batches$", status=429, times=3, headers={"Retry-After": "100"}))
    assert tool("create", "--in", requests_file()) == 0
    assert (clock.naps, len(api.batches)) == ([100, 100, 100], 1)


def test_a_used_up_quota_is_known_by_its_type_too(api: FaultyAPI, tool: Tool, clock: FakeTime) -> None:
    body = json.dumps({"error": {"message": "Pay first.", "type": "insufficient_quota", "code": None}}).encode()
    api.faults.append(Fault("POST", "/batches$", status=429, times=9, body=body))
    assert tool("create", "--in", requests_file()) == 1
    assert (posts(api), clock.naps) == (1, [])


def test_a_file_that_changes_during_the_upload_is_not_submitted(
    api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    path = requests_file()
    api.faults.append(Fault("POST", "/files$", status=429, headers={"Retry-After": "1"}))
    clock.events = [lambda: path.write_bytes(path.read_bytes() + jsonl(request("a3")))]
    assert tool("create", "--in", path) == 1
    assert capsys.readouterr().err.endswith(
        error("requests.jsonl was changed while it was in use; run the same command again")
    )
    assert (api.files, api.batches) == ({}, {})


# ---- a POST whose outcome is unknown ----

LOOKS = [0.5, 1.5, 3, 5]
FENCED_LOOKS = [2, 3, 5, 10]


def test_a_post_that_was_lost_is_fenced_and_made_again_with_another_file(
    api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
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


# ---- when the outcome of a POST is unknown ----

LOST: dict[str, dict[str, Any]] = {
    "reset": {"action": "reset"},
    "504": {"status": 504},
    "408": {"status": 408},
    "409": {"status": 409},
    "garbage": {"status": 200, "body": b"{"},
    "no utf-8": {"status": 200, "body": b"\xff\x00"},
    "a page": {"status": 200, "body": b"<html></html>", "headers": {"Content-Type": "text/html"}},
    "nothing": {"status": 200, "body": b""},
    "nobody": {"status": 200, "body": b'{"id": null, "status": null}'},
    "cut": {"action": "cut"},
    "shorten": {"action": "shorten"},
}


@pytest.mark.parametrize(("kind", "when"), [("reset", "before"), *[(kind, "after") for kind in LOST]])
def test_a_lost_answer_makes_no_second_batch(api: FaultyAPI, kind: str, when: str) -> None:
    api.list_delay, api.step = 10, 5
    time = live_in(api, FakeTime())
    api.faults = [Fault("POST", "/batches$", when=when, **LOST[kind])]
    content = write_requests("a1", "a2")
    assert run(time=time) == 0
    assert_paid_once(api, content)
    assert len(api.batches) == 1


@pytest.mark.parametrize(("moment", "list_delay"), [(3, 0), (0.6, 10), (9, 10), (14, 0), (40, 10), (300, 0)])
def test_a_post_that_is_carried_out_late_is_paid_for_once(
    api: FaultyAPI, moment: float, list_delay: float
) -> None:
    api.list_delay, api.step = list_delay, 60
    api.faults = [Fault("POST", "/batches$", when="later", status=504)]
    time = live_in(api, FakeTime(at={moment: api.carry_out}))
    content = write_requests("a1", "a2")
    assert run(time=time) == 0
    time.sleep(400)
    assert_paid_once(api, content)


def test_each_of_three_posts_has_its_fence(api: FaultyAPI, capsys: pytest.CaptureFixture[str]) -> None:
    api.faults = [Fault("POST", "/batches$", when="later", action="reset", times=3)]
    time = live_in(api, FakeTime())
    content = write_requests("a1")
    assert run(time=time) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no response to 3 tries to create its batch" in error
    assert (len(api.carry_out()), len(api.batches), len(api.files)) == (3, 0, 0)
    assert run(time=time) == 0
    assert_paid_once(api, content)


def test_a_batch_that_cannot_be_looked_for_is_picked_up_by_the_next_create(api: FaultyAPI, capsys: Capture) -> None:
    api.faults = [Fault("POST", "/batches$", when="after"), Fault("GET", "/batches$", skip=2, times=99)]
    content = write_requests("a1")
    assert create() == 1
    (batch,) = api.batches.values()
    out, err = capsys.readouterr()
    assert out == f"File ID: {batch.input_file_id}\n"
    assert err.endswith(error(
        f"cannot tell whether a batch was created for file {batch.input_file_id}; run the same command again later, "
        "and it will pick up the batch if there is one (--force would pay again)"
    ))
    assert batch.input_file_id in api.files
    api.faults.clear()
    assert create() == 0
    assert_paid_once(api, content)


@pytest.mark.parametrize("moment", [3, 14, 40])
def test_where_files_cannot_be_deleted_a_later_run_picks_up_the_batch(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str], moment: float
) -> None:
    api.habits = {"no-delete"}
    api.faults = [Fault("POST", "/batches$", when="later", status=504)]
    time = live_in(api, FakeTime(at={moment: api.carry_out}))
    content = write_requests("a1")
    if moment > 10:
        assert run(time=time) == 1
        (file_id,) = api.files
        assert f"cannot tell whether a batch was created for file {file_id}; run the same command again later" in (
            capsys.readouterr().err.splitlines()[-1]
        )
        time.sleep(60)
    assert run(time=time) == 0
    assert_paid_once(api, content)
    assert posts(api) == 1


def test_a_batch_that_is_found_after_the_fence_and_runs_is_the_batch(api: FaultyAPI) -> None:
    api.list_delay = 12
    api.hold = "in_progress"
    api.faults = [Fault("POST", "/batches$", when="after", status=504)]

    def begin() -> None:
        for batch in api.batches.values():
            api.look(batch)

    time = live_in(api, FakeTime(at={5: begin, 60: release(api)}))
    content = write_requests("a1")
    assert run(time=time) == 0
    assert posts(api) == 1
    assert_paid_once(api, content)


def test_a_batch_that_is_found_validating_after_the_fence_may_still_fail(api: FaultyAPI) -> None:
    api.list_delay, api.step = 12, 40
    api.faults = [Fault("POST", "/batches$", when="after", status=504)]
    time = live_in(api, FakeTime())
    content = write_requests("a1")
    assert run(time=time) == 0
    assert [batch.status for batch in api.batches.values()] == ["failed", "completed"]
    assert_paid_once(api, content)


@pytest.mark.parametrize(("when", "moment"), [("before", 0.0), ("after", 0.0), ("later", 3.0), ("later", 40.0)])
@pytest.mark.parametrize(("command", "habits"), [("create", ("no-metadata",)), ("run", ())])
def test_killed_between_the_post_and_its_answer_the_next_one_looks_and_fences(
    api: FaultyAPI, command: str, when: str, moment: float, habits: tuple[str, ...]
) -> None:
    api.habits, api.list_delay, api.step = {*habits}, 10, 5
    api.faults = [Fault("POST", "/batches$", when=when, action="reset")]
    time = live_in(api, FakeTime(kill, at={moment or 1e6: api.carry_out}))
    content = write_requests("a1", "a2")
    with pytest.raises(Killed):
        run(time=time) if command == "run" else create(time=time)
    assert run("--max-requests", "1", time=time) == 0
    time.sleep(100)
    assert_paid_once(api, content)


def test_killed_in_the_second_post_of_a_file_the_next_run_looks_for_its_batch(api: FaultyAPI) -> None:
    api.queue_limit, api.list_delay, api.step = 1, 10, 1
    write_requests("a1", "a2")
    time = live_in(api, FakeTime())

    def make_room() -> None:
        api.queue_limit = None
        api.faults = [Fault("POST", "/batches$", when="after", action="reset")]
        time.events = [kill]

    time.events = [nothing, make_room]  # refused, then room while it waits, then lost and killed
    with pytest.raises(Killed):
        run(time=time)
    assert posts(api) == 2
    assert run(time=time) == 0
    assert_paid_once(api, REQUESTS.read_bytes())


@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.parametrize("command", [create, run])
def test_a_lost_answer_about_a_copy_makes_no_second_batch(
    api: FaultyAPI, command: Callable[..., int], status: int
) -> None:
    api.habits = {"copies-uploads"}
    api.faults = [Fault("POST", "/batches$", when="after", status=status)]
    content = write_requests("a1", "a2")
    assert command() == 0
    assert run() == 0
    assert posts(api) == 1
    assert_paid_once(api, content)


def test_an_answer_that_is_the_batch_of_another_file_is_not_believed(api: FaultyAPI) -> None:
    other = api.new_batch("completed", output=jsonl(success("b1")))
    api.faults = [Fault("POST", "/batches$", status=200, body=json.dumps(other.as_json()).encode())]
    content = write_requests("a1")
    assert run() == 0
    assert_paid_once(api, content)


@pytest.mark.parametrize("seconds", [5, 900])
def test_the_listing_is_looked_at_again_after_a_rate_limit_was_waited_out(api: FaultyAPI, seconds: int) -> None:
    api.faults = [Fault("POST", "/batches$", status=429, headers={"retry-after": str(seconds)})]
    content = write_requests("a1")

    def elsewhere() -> None:
        api.faults = []
        with another_machine():
            assert create() == 0

    assert run(time=FakeTime(elsewhere)) == 0
    assert_paid_once(api, content)


# ---- the lock and the note ----


def note_path() -> Path:
    (path,) = Path(os.environ["XDG_STATE_HOME"], "batch_tool").iterdir()
    return path


def test_the_note_names_the_file_before_the_post_and_the_batch_after_it(
    api: FaultyAPI, tool: Tool, clock: FakeTime
) -> None:
    path = requests_file()
    notes: list[bytes] = []
    api.faults.append(Fault("POST", "/batches$", status=429, headers={"Retry-After": "1"}))
    clock.events = [lambda: notes.append(note_path().read_bytes())]
    assert tool("create", "--in", path) == 0
    batch = only_batch(api)
    before = {"file": batch.input_file_id, "sha256": sha256(path.read_bytes()), "name": path.name}
    after = {"file": batch.input_file_id, "batch": batch.id}
    assert [json.loads(line) for line in notes[0].splitlines() if line] == [before]
    assert [json.loads(line) for line in note_path().read_bytes().splitlines() if line] == [before, before, after]
    assert stat.S_IMODE(note_path().stat().st_mode) == 0o600
    assert stat.S_IMODE(note_path().parent.stat().st_mode) == 0o700


def test_another_service_has_a_note_of_its_own(api: FaultyAPI, tool: Tool, monkeypatch: Environment) -> None:
    path = requests_file()
    assert tool("create", "--in", path) == 0
    with FaultyAPI() as other:
        monkeypatch.setenv("OPENAI_BASE_URL", other.base_url)
        assert tool("create", "--in", path) == 0
        assert (len(other.batches), asked(other, "GET", "/batches/")) == (1, 0)


@pytest.mark.parametrize(
    ("state", "reason"), [("/dev/null/x", "Not a directory"), ("relative", "it is not an absolute path")]
)
def test_a_note_that_cannot_be_written_draws_a_warning(
    state: str, reason: str, api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", state)
    assert tool("create", "--in", requests_file()) == 0
    words = "until this command ends, do not start another create or run of requests.jsonl"
    told = warning(f"cannot lock a note in {state}/batch_tool: {reason}; {words}")
    assert capsys.readouterr() == (ids(only_batch(api)), told)
    assert not Path("relative").exists()


# ---- when the truth is late: this machine ----


@pytest.mark.parametrize("command", ["create", "run"])
def test_two_at_once_of_the_same_bytes_are_one(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    content = write_requests("a1")
    codes: list[int] = []

    def again() -> None:
        replace(content)  # as the converter does
        Path("copy.jsonl").write_bytes(content)
        codes.append(run(out="other.jsonl") if command == "run" else create())
        codes.append(run(source="copy.jsonl", out="other.jsonl"))

    assert run(time=FakeTime(again)) == 0
    assert codes == [1, 1]
    assert capsys.readouterr().err.count(".jsonl is in use by another create or run; wait for it to finish") == 2
    assert posts(api) == 1
    assert run() == 0


STOPS: dict[str, Callable[[], None]] = {
    "kill": kill,
    "ctrl-c": lambda: signal.raise_signal(signal.SIGINT),
}


@pytest.mark.parametrize("habits", [(), ("no-metadata", "no-delete")])
@pytest.mark.parametrize(("stop", "options"), [("kill", ()), ("ctrl-c", ("--max-requests", "1"))])
def test_stopped_after_the_post_the_same_command_at_once_pays_nothing_again(
    api: FaultyAPI, habits: tuple[str, ...], stop: str, options: tuple[str, ...]
) -> None:
    api.habits, api.list_delay, api.step = {*habits}, 10, 5
    time = live_in(api, FakeTime(at={0.1: STOPS[stop]}))
    content = write_requests("a1", "a2", "a3")
    stopped_run("--max-requests", "2", time=time)
    assert run(*options, time=time) == 0
    assert_paid_once(api, content)


@pytest.mark.parametrize("habits", [(), ("no-metadata",)])
def test_run_at_once_after_create_takes_its_batches(api: FaultyAPI, habits: tuple[str, ...]) -> None:
    api.habits, api.list_delay, api.step = {*habits}, 10, 5
    time = live_in(api, FakeTime())
    content = write_requests(*numbered(5))
    assert create("--max-requests", "2", time=time) == 0
    assert run("--max-requests", "3", time=time) == 0
    assert_paid_once(api, content)
    assert posts(api) == 3


@pytest.mark.parametrize(("options", "code"), [(("--max-requests", "2"), 0), (("--max-requests", "3"), 1), ((), 1)])
def test_create_at_once_after_run_submits_nothing_again(
    api: FaultyAPI, options: tuple[str, ...], code: int
) -> None:
    api.habits, api.list_delay, api.step = {"no-metadata"}, 10, 5
    time = live_in(api, FakeTime(at={0.1: kill}))
    content = write_requests(*numbered(5))
    stopped_run("--max-requests", "2", time=time)
    assert create(*options, time=time) == code
    assert posts(api) == 3
    assert run(time=time) == 0
    assert_paid_once(api, content)


def test_create_of_other_parts_names_the_batches_and_the_ways_on(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    write_requests(*numbered(3))
    assert create("--max-requests", "2") == 0
    assert create() == 1
    first, second = sorted(api.batches)
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        rf"batch_tool.py: error: these batches already have requests of this file: ({first}|{second}) \(completed\), "
        rf"({first}|{second}) \(completed\); nothing more was submitted; use run, which takes what they finish and "
        "sends only the rest", error
    )
    assert posts(api) == 2


def test_create_does_not_take_a_later_round_for_the_whole(api: FaultyAPI) -> None:
    api.outcomes = {"a2": ["500", "200"]}
    write_requests("a1", "a2")
    assert run() == 0
    del api.batches[next(iter(api.batches))]
    assert create() == 1
    assert sent(api) == [["a2"]]


def test_create_and_run_pick_up_the_batches_of_each_other(api: FaultyAPI) -> None:
    content = write_requests("a1", "a2", "a3")
    assert create("--max-requests", "2") == 0
    assert run("--max-requests", "2") == 0
    assert create("--max-requests", "2") == 0
    assert posts(api) == 2
    assert_paid_once(api, content)


@pytest.mark.parametrize("habits", [(), ("no-metadata",)])
def test_a_note_that_is_gone_or_broken_costs_nothing_once_the_listing_is_whole(
    api: FaultyAPI, habits: tuple[str, ...]
) -> None:
    content = write_requests("a1", "a2")
    assert create() == 0
    (note,) = Path(os.environ["XDG_STATE_HOME"], "batch_tool").iterdir()
    if habits:
        note.write_bytes(b"{cut\n" + note.read_bytes() + b'\x00\xff\n[]\n{"file": 3}\n{"file": "../x"}\n{"fi')
    else:
        note.unlink()
    assert run() == 0
    assert posts(api) == 1
    assert_paid_once(api, content)


def test_notes_of_more_than_30_days_ago_are_removed(api: FaultyAPI) -> None:
    folder = Path(os.environ["XDG_STATE_HOME"], "batch_tool")
    folder.mkdir(parents=True)
    old, young = folder / "old.jsonl", folder / "young.jsonl"
    for path, days in ((old, 31), (young, 29)):
        path.touch()
        os.utime(path, (real_time.time() - days * DAY,) * 2)
    write_requests("a1")
    assert create() == 0
    assert (old.exists(), young.exists()) == (False, True)


def test_without_a_place_for_notes_it_warns_and_works(
    api: FaultyAPI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(Path("file").absolute()))
    content = write_requests("a1")
    assert run() == 0
    message = "/file/batch_tool: Not a directory; until this command ends, do not start another create or run"
    assert message in capsys.readouterr().err
    assert_paid_once(api, content)


def test_a_service_without_metadata_draws_one_warning(api: FaultyAPI, capsys: pytest.CaptureFixture[str]) -> None:
    api.habits = {"no-metadata"}
    write_requests("a1", "a2")
    assert run("--max-requests", "1") == 0
    assert capsys.readouterr().err.count("warning: this service keeps no metadata; only a note on this machine") == 1


@pytest.mark.parametrize("first", [create, run])
def test_the_note_alone_is_enough(api: FaultyAPI, first: Callable[..., int]) -> None:
    """Batches name neither an input file nor metadata, and the listing is empty."""
    api.habits = {"no-input-id", "no-metadata", "empty-listing"}
    content = write_requests("a1", "a2")
    assert first() == 0
    OUT.unlink(missing_ok=True)
    assert (create(), run()) == (0, 0)
    assert posts(api) == posts(api, "/v1/files") == 1
    assert_paid_once(api, content)


def test_a_batch_of_the_note_that_is_not_found_for_some_seconds_is_looked_for_again(api: FaultyAPI) -> None:
    api.list_delay = 10
    time = live_in(api, FakeTime())
    content = write_requests("a1")
    assert create(time=time) == 0
    api.faults = [Fault("GET", "/batches/batch_", times=2, status=404, message="No such batch")]
    assert run(time=time) == 0
    assert posts(api) == 1
    assert_paid_once(api, content)


def test_a_batch_of_the_note_that_is_gone_counts_for_nothing(api: FaultyAPI) -> None:
    write_requests("a1")
    assert create() == 0
    api.batches.clear()
    assert run() == 0
    assert posts(api) == 2


# ---- when the truth is late: another machine ----


@pytest.mark.parametrize("options", [("--max-requests", "1"), ("--max-requests", "3"), ()])
@pytest.mark.parametrize("command", ["create", "run"])
def test_another_machine_submits_while_parts_wait_for_the_queue(
    api: FaultyAPI, command: str, options: tuple[str, ...]
) -> None:
    api.queue_limit, api.hold = 1, "in_progress"
    content = write_requests(*numbered(4))

    def elsewhere() -> None:
        api.queue_limit = None
        with another_machine():
            if command == "run":
                assert run(*options, time=FakeTime(release(api))) == 0
            else:
                create(*options)
        api.hold = None

    assert run("--max-requests", "1", "--attempts", "1", time=FakeTime(nothing, elsewhere)) == 0
    assert_paid_once(api, content)
    assert_out(api)


def test_another_machine_submits_before_a_later_round(api: FaultyAPI) -> None:
    api.outcomes = {"a2": ["500", "200"]}
    content = write_requests("a1", "a2")

    def elsewhere() -> None:
        api.look(next(iter(api.batches.values())))  # has ended
        with another_machine():
            assert run() == 0

    assert run(time=FakeTime(elsewhere)) == 0
    assert sent(api) == [["a1", "a2"], ["a2"]]
    assert_paid_once(api, content)
    assert_out(api)


def test_all_parts_that_another_machine_has_submitted_meanwhile_are_taken(api: FaultyAPI) -> None:
    content = write_requests(*numbered(4))
    begun: list[int] = []

    def elsewhere() -> None:
        api.faults = []
        with another_machine():
            begun.append(create("--max-requests", "1"))

    api.faults = [Fault("POST", "/batches$", status=429, headers={"retry-after": "60"})]
    time = FakeTime(elsewhere)
    assert run("--max-requests", "1", "--attempts", "1", time=time) == 0
    assert begun == [0]
    assert posts(api) == 5
    assert_paid_once(api, content)


def test_create_ends_where_another_machine_submits_other_parts_meanwhile(api: FaultyAPI, capsys: Capture) -> None:
    content = write_requests("a1", "a2")

    def elsewhere() -> None:
        with another_machine():
            assert create("--max-requests", "1") == 0

    api.faults = [Fault("POST", "/files$", status=429, headers={"retry-after": "60"})]
    assert create(time=FakeTime(elsewhere)) == 1
    err = capsys.readouterr().err
    assert "these batches already have requests of this file: " in err
    assert all(batch_id in err for batch_id in api.batches)
    assert sorted(api.files) == sorted({each.input_file_id for each in api.batches.values()} |
                                       {each.output_file_id for each in api.batches.values()} - {None})
    assert_paid_once(api, content)


def test_a_refused_part_is_not_submitted_again_where_another_machine_has_its_requests(api: FaultyAPI) -> None:
    api.hold = "validating"
    api.faults = [Fault("POST", "/batches$", skip=1, status=429, headers={"retry-after": "60"})]
    content = write_requests(*numbered(4))

    def elsewhere() -> None:
        api.faults, api.hold = [], None
        (own,) = api.batches.values()
        own.over_limit = True
        with another_machine():
            assert create("--force") == 0

    assert run("--max-requests", "2", "--attempts", "1", time=FakeTime(elsewhere)) == 0
    assert sent(api) == [["a1", "a2"], numbered(4)]
    assert_paid_once(api, content)
    assert_out(api)


# ---- earlier batches ----

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


@EARLIER
def test_nothing_is_paid_for_twice(
    status: str, output: bytes | None, fields: Json, fate: str, api: FaultyAPI, tool: Tool, capsys: Capture
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
        assert capsys.readouterr() == ("", error(
            f"these batches already have requests of this file: batch_1 ({name}); nothing more was submitted; "
            "use run, which takes what they finish and sends only the rest"
        ))
    else:
        assert capsys.readouterr() == (ids(last_batch(api)), "")


@LATE
def test_a_batch_whose_output_file_is_late_counts_as_submitted(
    late: Json, api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    batch = late_batch(api, late)
    assert tool("create", "--in", "requests.jsonl") == 0
    said = "part 1/1 was already submitted as batch batch_1 (completed); skipping\n"
    assert capsys.readouterr() == (ids(batch), said)
    assert (clock.naps, len(api.batches)) == ([], 1)


def test_a_reused_batch_is_printed_as_json(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    earlier_batch(api, requests_file())
    assert tool("create", "--in", "requests.jsonl", "--json") == 0
    assert json.loads(capsys.readouterr().out)["id"] == "batch_1"


def test_only_the_parts_that_were_not_submitted_are(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("POST", "/batches$", skip=1, status=403))
    assert tool("create", "--in", requests_file(), "--max-requests", 1) == 1
    capsys.readouterr()
    assert tool("create", "--in", "requests.jsonl", "--max-requests", 1) == 0
    first, second = api.batches.values()
    said = f"part 1/2 was already submitted as batch {first.id} (completed); skipping\n"
    assert capsys.readouterr() == (ids(first) + ids(second), said)
    assert (sent(api), times_paid(api)) == ([["a1"], ["a2"]], [1, 1])


def test_force_submits_again(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    earlier_batch(api, requests_file())
    api.faults.append(Fault("GET", "/batches$", status=404, times=9))
    assert tool("create", "--in", "requests.jsonl", "--force") == 0
    assert capsys.readouterr() == (ids(last_batch(api)), "")
    assert len(api.batches) == 2


# ---- the listing ----


def listed(batch_id: str, content: bytes = b"", created_at: Any = None, **fields: Any) -> Json:
    metadata = {"input_sha256": sha256(content)}
    return {"id": batch_id, "status": "in_progress", "metadata": metadata, "created_at": created_at} | fields


def test_a_listing_without_an_end_is_an_error() -> None:
    class Endless(batch_tool.Api):
        def page(self, query: Json) -> batch_tool.Page:
            number = query.get("after", "b0")[1:]
            batch = batch_tool.Batch.parse(listed(f"b{int(number) + 1}"))
            return batch_tool.Page([batch], 0, True, time.time())

    nobody: Any = None
    with pytest.raises(batch_tool.IncompleteListing, match=r"has more than 500 pages$"):
        Endless(nobody, "", nobody, nobody, nobody, False, set()).recent_batches()


def listing(*batches: LocalBatch, **fields: Any) -> bytes:
    content = {"object": "list", "data": [batch.as_json() for batch in batches], "has_more": False}
    return json.dumps(content | fields).encode()


@pytest.mark.parametrize("command", ["create", "run"])
@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"object": "list", "data": [{}], "has_more": true}',
        b'{"object": "list", "data": [], "has_more": true}',
        b'{"object": "list", "data": [{"id": "batch_1", "status": "completed"}], "has_more": true}',
    ],
)
def test_an_incomplete_listing_is_not_an_empty_one(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str], body: bytes, command: str
) -> None:
    api.faults = [Fault("GET", "/batches$", times=10_000, status=200, body=body)]
    write_requests("a1")
    assert (run() if command == "run" else create()) == 1
    assert capsys.readouterr().err.count("error: ") == 1
    assert posts(api) == posts(api, "/v1/files") == 0


def test_a_server_that_ignores_after_is_an_incomplete_listing_only_where_there_is_more(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    api.habits = {"ignores-after"}
    content = write_requests("a1")
    batch_of_a_run(api, "completed", content, done=["a1"])
    for _ in range(99):
        api.new_batch("completed", created_at=api.now() + 1)
    assert run() == 0
    api.new_batch("completed", created_at=api.now() + 1)
    assert run(out="other.jsonl") == 1
    assert "error: the server repeats a page of its listing of batches" in capsys.readouterr().err
    assert posts(api) == 0


def test_pages_of_older_batches_and_one_old_entry_hide_nothing(api: FaultyAPI) -> None:
    content = write_requests("a1")
    old = api.new_batch("completed", created_at=1_600_000_000)
    batch = batch_of_a_run(api, "completed", content, done=["a1"])
    api.faults = [
        Fault("GET", "/batches$", status=200, body=listing(old, has_more=True)),
        Fault("GET", "/batches$", status=200, body=listing(old, batch)),
    ]
    assert run() == 0
    assert posts(api) == 0


def test_a_listing_ends_after_some_full_pages_of_older_batches(api: FaultyAPI) -> None:
    input_file = api.new_file(b"", "batch", "requests.jsonl")
    for number in range(500):
        api.new_batch("completed", input_file=input_file, created_at=1_600_000_000 + number)
    write_requests("a1")
    assert run() == 0
    first, *_ = (n for n, exchange in enumerate(api.exchanges) if exchange.path == "/v1/models/gpt-6-luna")
    assert sum(exchange.path == "/v1/batches" for exchange in api.exchanges[:first]) == 3


@pytest.mark.parametrize("days", [-31, 31])
def test_recent_is_by_the_clock_of_the_server(api: FaultyAPI, days: int) -> None:
    api.clock_offset = days * DAY
    batch_of_a_run(api, "completed", write_requests("a1"), done=["a1"])
    assert run() == 0
    assert posts(api) == 0


def test_batches_without_a_date_are_recent(api: FaultyAPI) -> None:
    batch = batch_of_a_run(api, "completed", write_requests("a1"), done=["a1"])
    body = listing(batch).replace(b'"created_at"', b'"no"')
    api.faults = [Fault("GET", "/batches$", times=9, status=200, body=body)]
    assert run() == 0
    assert posts(api) == 0
