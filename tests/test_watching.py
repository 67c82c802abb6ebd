"""`status`, `wait`, `retrieve`, `cancel` and `list`: what they show of batches and save of their results."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import (
    LATE,
    MORNING,
    OLD,
    Capture,
    Environment,
    FakeTime,
    Json,
    Tool,
    asked,
    bring_output,
    done_batch,
    error,
    in_short,
    jsonl,
    late_batch,
    leftovers,
    log_text,
    nothing,
    only_batch,
    output_missing,
    posts,
    refused,
    request,
    requests_file,
    success,
    times_paid,
    warning,
)
from faulty_api import HABITS, Fault, FaultyAPI

import batch_tool


@pytest.fixture
def utc(monkeypatch: Environment) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


REPEATED = "the server repeats a page of its listing of batches"


# ---- status ----

COUNTS = {"total": 1000, "completed": 990, "failed": 10}


def test_status_shows_and_saves_a_completed_batch(
    api: FaultyAPI, tool: Tool, utc: None, capsys: Capture
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


def test_times_are_local(api: FaultyAPI, tool: Tool, utc: None, capsys: Capture, monkeypatch: Environment) -> None:
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
    status: str, line: str, api: FaultyAPI, tool: Tool, utc: None, capsys: Capture
) -> None:
    ended = line.split(":")[0].lower()
    moment = {} if ended == "expires" else {f"{ended}_at": MORNING + 60}
    api.new_batch(status, id="batch_1", created_at=MORNING, **moment)
    assert tool("status", "--batch-id", "batch_1") == 0
    assert capsys.readouterr() == (f"Status: {status}\nCreated: 2024-01-15T10:30:00\n{line}", "")


def test_a_failed_batch_shows_its_errors(api: FaultyAPI, tool: Tool, utc: None, capsys: Capture) -> None:
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
def test_fields_that_are_null_or_odd_are_left_out(odd: Any, api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    names = ["request_counts", "usage", "errors", "expires_at", "in_progress_at", "completed_at", "metadata", "model"]
    api.new_batch("in_progress", id="batch_1").__dict__.update(dict.fromkeys(names, odd))
    assert tool("status", "--batch-id", "batch_1") == 0
    assert re.fullmatch(r"Status: in_progress\nCreated: .*\n", capsys.readouterr().out)


def test_status_as_json_is_the_batch_and_where_its_files_are(
    api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api, metadata={"note": "\x85\u2028\ud800\x1b뉴진스"})
    assert tool("status", "--batch-id", "batch_1", "--json") == 0
    out, err = capsys.readouterr()
    paths = {"results_path": "results_batch_1.jsonl", "errors_path": "errors_batch_1.jsonl"}
    assert json.loads(out) == api.exchanges[0].answer_json | paths
    assert out.count("\n") == 1
    assert [line.split(":")[0] for line in err.splitlines()] == ["Results saved", "Errors saved"]


def test_no_auto_save_leaves_the_files_at_the_server(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api)
    assert tool("status", "--batch-id", "batch_1", "--no-auto-save", "--json") == 0
    assert "results_path" not in json.loads(capsys.readouterr().out)
    assert not list(Path().glob("*.jsonl"))


@pytest.mark.parametrize("status", ["expired", "cancelled", "canceled", "EXPIRED", "Completed"])
def test_what_a_batch_that_has_ended_left_is_saved(status: str, api: FaultyAPI, tool: Tool) -> None:
    done_batch(api, status)
    assert tool("status", "--batch-id", "batch_1") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == jsonl(success("a1"))
    assert Path("errors_batch_1.jsonl").read_bytes() == jsonl(refused("a2"))


@pytest.mark.parametrize("empty", [None, ""])
def test_a_file_that_there_is_not_is_not_saved(empty: Any, api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, error_file_id=empty)
    assert tool("status", "--batch-id", "batch_1") == 0
    assert "Errors saved" not in capsys.readouterr().out
    assert [path.name for path in Path().glob("*.jsonl")] == ["results_batch_1.jsonl"]


def test_a_file_that_is_complete_is_not_downloaded_again(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, errors=None)
    assert tool("status", "--batch-id", "batch_1") == 0
    first = capsys.readouterr().out
    assert tool("status", "--batch-id", "batch_1") == 0
    assert capsys.readouterr().out == first
    assert asked(api, "GET", "/content$") == 1


def test_a_file_that_is_not_complete_is_replaced_and_the_log_says_so(api: FaultyAPI, tool: Tool) -> None:
    done_batch(api, errors=None)
    Path("results_batch_1.jsonl").write_bytes(b"old\n")
    assert tool("status", "--batch-id", "batch_1") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == jsonl(success("a1"))
    assert 'DOWNLOAD_RESULTS replaces "results_batch_1.jsonl"' in log_text()


def test_several_batches_are_headed_by_their_ids(api: FaultyAPI, tool: Tool, utc: None, capsys: Capture) -> None:
    for number in (1, 2):
        api.new_batch("in_progress", id=f"batch_{number}", created_at=MORNING, expires_at=None)
    assert tool("status", "--batch-id", "batch_1", "batch_2") == 0
    block = "Batch ID: batch_{}\nStatus: in_progress\nCreated: 2024-01-15T10:30:00\n"
    assert capsys.readouterr().out == block.format(1) + block.format(2)


@pytest.mark.parametrize("command", ["status", "retrieve", "cancel"])
def test_a_batch_that_fails_does_not_keep_the_others_from_it(
    command: str, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    api.new_batch("in_progress" if command == "cancel" else "completed", id="batch_2", output=jsonl(success()))
    assert tool(command, "--batch-id", "batch_1", "batch_2") == 1
    out, err = capsys.readouterr()
    operation = "CANCEL_BATCH" if command == "cancel" else "GET_STATUS"
    assert err == error(f"batch_1: {operation}: HTTP 404: No such batch: batch_1")
    assert out


def test_saving_that_fails_is_exit_1(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api)
    Path("results_batch_1.jsonl").mkdir()
    assert tool("status", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err == error("batch_1: cannot write results_batch_1.jsonl: Is a directory")


@pytest.mark.parametrize("answer", [{"id": "../../x"}, {"id": "x/y"}, {"id": ".x"}, {"id": "another"}], ids=str)
def test_an_id_of_the_server_chooses_no_directory(
    answer: dict[str, str], api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    file = api.new_file(b"{}\n", "batch_output", "x")
    body = json.dumps({"status": "completed", "output_file_id": file.id} | answer).encode()
    api.faults.append(Fault("GET", "/batches/", status=200, body=body, times=9))
    assert tool("status", "--batch-id", "batch_1") == 1
    assert not list(Path().rglob("results_*"))
    assert "error: batch_1: the response is " in capsys.readouterr().err


@pytest.mark.parametrize("file_id", [7, ["x"]], ids=str)
def test_a_file_id_that_is_no_text_is_an_error(file_id: Any, api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, output_file_id=file_id)
    assert tool("status", "--batch-id", "batch_1") == 1
    shown = json.dumps(f"{json.dumps(file_id)} (not text)")
    assert capsys.readouterr().err == error(f"batch_1: not the id of a file: {shown}")


@pytest.mark.parametrize("file_id", ["..", "a b", "a\u200b", "a\n"], ids=ascii)
def test_a_file_id_that_can_be_none_is_not_asked_for(
    file_id: Any, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api, output_file_id=file_id)
    assert tool("status", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err == error(f"batch_1: not the id of a file: {json.dumps(file_id)}")
    assert Path("errors_batch_1.jsonl").exists()


def test_a_batch_with_an_odd_file_id_does_not_keep_others_from_being_listed_and_created(
    api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api, output_file_id="files/x")
    assert tool("list") == 0
    assert tool("create", "--in", requests_file()) == 0
    assert len(api.batches) == 2


@pytest.mark.parametrize("answer", [{"status": 0}, {"status": ""}, {"status": None}, {}, {"id": 7}], ids=str)
def test_an_answer_that_is_no_batch_is_one_line(answer: Json, api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    body = json.dumps({"id": "batch_1"} | answer)
    api.faults.append(Fault("GET", "/batches/", status=200, body=body.encode(), times=9))
    assert tool("status", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == ("", error(f"batch_1: the response is not a batch: {body}"))


def test_metadata_that_is_nested_deeply_is_printed_as_it_is(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    deep: Any = "end"
    for _ in range(300):
        deep = {"a": [deep]}
    done_batch(api, metadata=deep)
    assert tool("status", "--batch-id", "batch_1", "--json", "--verbose") == 0
    assert json.loads(capsys.readouterr().out)["metadata"] == deep


@pytest.mark.parametrize("depth", [3_000, 100_000])
def test_metadata_that_is_nested_too_deeply_is_one_line(
    depth: int, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    body = b'{"id": "batch_1", "status": "in_progress", "metadata": ' + b'[' * depth + b"]" * depth + b"}"
    api.faults.append(Fault("GET", status=200, body=body, times=9))
    code = tool("status", "--batch-id", "batch_1", "--json")
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (1, "", 1) or (code, err, out.count("\n")) == (0, "", 1)


@LATE
def test_status_shows_a_batch_whose_output_file_is_late_as_it_is(
    late: Json, api: FaultyAPI, tool: Tool, utc: None, capsys: Capture
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


def test_empty_files_are_neither_saved_nor_named(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, output=b"", errors=b"", request_counts=None)
    assert tool("status", "--batch-id", "batch_1") == 0
    assert "saved" not in capsys.readouterr().out
    assert not list(Path().glob("*.jsonl"))


# ---- wait ----


def test_wait_shows_each_change_and_then_the_status(
    api: FaultyAPI, tool: Tool, clock: FakeTime, utc: None, capsys: Capture
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
    api: FaultyAPI, tool: Tool, clock: FakeTime, monkeypatch: Environment
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
    api: FaultyAPI, tool: Tool, clock: FakeTime, monkeypatch: Environment
) -> None:
    batch = api.new_batch("in_progress", id="batch_1")
    ours, terminal = os.openpty()
    clock.events = [lambda: os.close(ours), lambda: batch.enter("completed", batch.born)]
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert tool("wait", "--batch-id", "batch_1") == 0


def test_the_timeout_is_one_for_saving_too(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
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
    status: str, code: int, api: FaultyAPI, tool: Tool, clock: FakeTime
) -> None:
    api.new_batch("completed", id="batch_1")
    api.new_batch(status, id="batch_2")
    assert tool("wait", "--batch-id", "batch_1", "batch_2") == code
    assert clock.naps == []


def test_wait_polls_a_batch_until_it_has_ended_and_no_longer(api: FaultyAPI, tool: Tool, clock: FakeTime) -> None:
    api.new_batch("completed", id="batch_1")
    batch = api.new_batch("in_progress", id="batch_2")
    clock.events = [nothing, lambda: batch.enter("completed", batch.born)]
    assert tool("wait", "--batch-id", "batch_1", "batch_2") == 0
    assert clock.naps == [30, 30]
    assert (asked(api, "GET", "batch_1"), asked(api, "GET", "batch_2")) == (1, 3)


def test_wait_warns_once_of_a_status_that_it_does_not_know(
    api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    batch = api.new_batch("Paused", id="batch_1")
    clock.events = [nothing, nothing, lambda: batch.enter("completed", batch.born)]
    assert tool("wait", "--batch-id", "batch_1") == 0
    assert capsys.readouterr().err == (
        warning('batch_1: status "Paused" is not known; still waiting')
        + "batches: 1 paused; 0:00:00 elapsed\nbatches: 1 completed; 0:01:30 elapsed\n"
    )


def test_a_batch_that_is_unknown_does_not_keep_the_others_from_being_saved(
    api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
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
    late: Json, api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    batch = late_batch(api, late)
    clock.events = [nothing, lambda: bring_output(api, batch)]
    assert tool("wait", "--batch-id", "batch_1") == 0
    assert clock.naps == [30, 30]
    assert Path("results_batch_1.jsonl").read_bytes() == jsonl(success("a1"), success("a2"))


@LATE
def test_wait_gives_up_after_ten_minutes_without_an_output_file(
    late: Json, api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    late_batch(api, late)
    assert tool("wait", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == ("", (
        f"batches: 1 completed; requests: 2/2 (100%); 0:00:00 elapsed\n{error('batch_1: ' + output_missing())}"
    ))
    assert clock.now == 600


def test_wait_saves_unless_told_not_to(api: FaultyAPI, tool: Tool) -> None:
    done_batch(api)
    assert tool("wait", "--batch-id", "batch_1", "--no-auto-save") == 0
    assert not list(Path().glob("*.jsonl"))
    assert tool("wait", "--batch-id", "batch_1") == 0
    assert len(list(Path().glob("*.jsonl"))) == 2


def test_wait_as_json_is_one_line_a_batch(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api)
    api.new_batch("completed", id="batch_2")
    assert tool("wait", "--batch-id", "batch_1", "batch_2", "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["id"], first["results_path"]) == ("batch_1", "results_batch_1.jsonl")
    assert (second["id"], "results_path" in second) == ("batch_2", False)


def test_wait_ends_with_3_when_its_time_is_up(api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture) -> None:
    api.new_batch("in_progress", id="batch_1")
    assert tool("wait", "--batch-id", "batch_1", "--timeout", "45") == 3
    assert clock.naps == [30, 15]
    resume = "the batches keep running on the server; to resume waiting: batch_tool.py wait --batch-id batch_1"
    assert capsys.readouterr().err.endswith(error(f"--timeout passed; {resume}"))


@pytest.mark.parametrize("path, output", [("/batches/", b""), ("/content$", b""), ("/content$", b"{}" * 99)],
                         ids=["poll", "look for output", "download"])
def test_a_server_that_drips_does_not_outlast_the_timeout(
    path: str, output: bytes, api: FaultyAPI, capsys: Capture
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
    outage: Json, api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    batch = api.new_batch("in_progress", id="batch_1")
    clock.events = [
        lambda: api.faults.append(Fault("GET", times=20, **outage)), *[nothing] * 19,
        lambda: batch.enter("completed", batch.born),
    ]
    assert tool("wait", "--batch-id", "batch_1") == 0
    assert clock.naps == [30.0, 0.5, 1, 2, 4, 8, 16, 32, *[60.0] * 12, 60.0][: len(clock.naps)]
    _, err = capsys.readouterr()
    assert err.count("; trying again in 60 s\n") == 13


def test_a_rate_limit_does_not_outlast_the_timeout(api: FaultyAPI, tool: Tool, clock: FakeTime) -> None:
    batch = api.new_batch("in_progress")
    api.faults.append(Fault("GET", status=429, headers={"Retry-After": "100"}, times=9))
    assert tool("wait", "--batch-id", batch.id, "--timeout", "3") == 3
    assert clock.now == 3


@pytest.mark.parametrize("failure", [{"status": 500, "times": 3}, {"status": 403}], ids=in_short)
def test_a_first_poll_that_fails_ends_the_wait(
    failure: Json, api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    api.new_batch("in_progress", id="batch_1")
    api.faults.append(Fault("GET", message="Out", code="out", **failure))
    assert tool("wait", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err.endswith(f"GET_STATUS: HTTP {failure['status']}: Out (out)\n")
    assert clock.now < 30


def test_a_batch_that_disappears_draws_an_error(api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture) -> None:
    api.new_batch("in_progress", id="batch_1")
    clock.events = [api.batches.clear]
    assert tool("wait", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err.endswith(error("batch_1: GET_STATUS: HTTP 404: No such batch: batch_1"))


# ---- retrieve ----


def test_retrieve_saves_both_files(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api)
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    output, errors = jsonl(success("a1")), jsonl(refused("a2"))
    assert capsys.readouterr() == (
        f"Results saved: results_batch_1.jsonl ({len(output)} bytes)\n"
        f"Errors saved: errors_batch_1.jsonl ({len(errors)} bytes)\n",
        "",
    )
    assert (Path("results_batch_1.jsonl").read_bytes(), Path("errors_batch_1.jsonl").read_bytes()) == (output, errors)


def test_out_names_the_results_and_the_errors_beside_them(api: FaultyAPI, tool: Tool) -> None:
    done_batch(api)
    Path("deep").mkdir()
    Path("deep/bios.jsonl").write_text(OLD)
    assert tool("retrieve", "--batch-id", "batch_1", "--out", "deep/bios.jsonl") == 0
    assert Path("deep/bios.jsonl").read_bytes() == jsonl(success("a1"))
    assert Path("deep/bios.errors.jsonl").read_bytes() == jsonl(refused("a2"))
    assert 'DOWNLOAD_RESULTS replaces "deep/bios.jsonl"' in log_text()


def test_out_can_be_stdout(api: FaultyAPI, tool: Tool, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    done_batch(api)
    assert tool("retrieve", "--batch-id", "batch_1", "--out", "-") == 0
    out, err = capfdbinary.readouterr()
    assert out == jsonl(success("a1"))
    assert err.decode() == (
        f"Results saved: stdout ({len(out)} bytes)\n"
        f"Errors saved: errors_batch_1.jsonl ({len(jsonl(refused('a2')))} bytes)\n"
    )


def test_out_can_be_a_fifo(api: FaultyAPI, tool: Tool) -> None:
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
    out: str, reason: str, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    assert tool("retrieve", "--batch-id", "batch_1", "--out", out) == 1
    assert capsys.readouterr() == ("", error(f"cannot write {out}: {reason}; choose another --out"))
    assert api.exchanges == []


def test_an_out_on_a_full_disk_is_exit_1(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api)
    assert tool("retrieve", "--batch-id", "batch_1", "--out", "/dev/full") == 1
    saved = f"Errors saved: errors_batch_1.jsonl ({len(jsonl(refused('a2')))} bytes)\n"
    assert capsys.readouterr() == (saved, error("batch_1: cannot write /dev/full: No space left on device"))


def test_a_batch_that_has_not_ended_is_not_completed(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    api.new_batch("in_progress", id="batch_1")
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == ("", error("batch_1: Batch not completed (status: in_progress)"))


@LATE
def test_retrieve_says_that_the_results_are_not_there_yet(
    late: Json, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    late_batch(api, late)
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    reason = "Batch completed, but its results are not there yet (2 requests succeeded); try again in a minute"
    assert capsys.readouterr() == ("", error(f"batch_1: {reason}"))


def test_a_batch_without_a_success_saves_its_errors_and_shows_the_most_common(
    api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    errors = jsonl(refused("a1"), refused("a2", 400, "bad"), refused("a3"), b"[\n", b"7\n")
    done_batch(api, output=None, errors=errors)
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == (
        f"Errors saved: errors_batch_1.jsonl ({len(errors)} bytes)\n",
        error("batch_1: Batch has no results (status: completed): 2 × server_error: Sorry.; 1 × bad: Sorry."),
    )
    assert Path("errors_batch_1.jsonl").read_bytes() == errors


def test_a_batch_without_any_file_has_no_results(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, "cancelled", output=None, errors=None)
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == ("", error("batch_1: Batch has no results (status: cancelled)"))


def test_a_failed_batch_gives_the_reasons(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    batch = api.new_batch("failed", id="batch_1")
    batch.errors = {"data": [{"line": 3, "code": "bad", "message": "No."}]}
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err == error("batch_1: Batch failed: line 3: bad: No.")


@pytest.mark.parametrize("status", ["expired", "cancelled", "canceled", "EXPIRED"])
def test_a_partial_batch_is_saved_and_exit_1(status: str, api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, status, request_counts=COUNTS)
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == ["Results saved", "Errors saved"]
    name = "expired" if status == "EXPIRED" else "cancelled" if status == "canceled" else status
    reason = f"Batch {name} with 990 of 1000 requests completed; run on the same request file sends only the rest"
    assert err == error(f"batch_1: {reason}")


def test_empty_files_are_not_results(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, output=b"", errors=b"", request_counts=None)
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == ("", error("batch_1: Batch has no results (status: completed)"))
    assert not list(Path().glob("*.jsonl"))


@pytest.mark.parametrize("out", [[], ["--out", "bios.jsonl"]], ids=in_short)
def test_an_error_file_of_an_earlier_job_is_not_left_beside_new_results(
    out: list[str], api: FaultyAPI, tool: Tool
) -> None:
    stale = Path("bios.errors.jsonl" if out else "errors_batch_1.jsonl")
    stale.write_bytes(jsonl(refused("old")))
    done_batch(api, errors=None)
    assert tool("retrieve", "--batch-id", "batch_1", *out) == 0
    assert not stale.exists()


def test_an_error_file_of_an_earlier_job_stays_where_there_are_no_new_results(api: FaultyAPI, tool: Tool) -> None:
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
def test_a_download_that_breaks_off_is_made_again(broken: Json, api: FaultyAPI, tool: Tool) -> None:
    output = jsonl(*[success(str(number)) for number in range(3000)])
    done_batch(api, output=output, errors=None)
    api.faults.append(Fault("GET", "/content$", times=2, **broken))
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == output


@BROKEN
def test_a_download_that_stays_broken_leaves_the_old_file(
    broken: Json, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api)
    Path("results_batch_1.jsonl").write_text(OLD)
    api.faults.append(Fault("GET", "/content$", times=3, **broken))
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(r"batch_tool.py: error: batch_1: .*\w.*\n", err)
    assert (Path("results_batch_1.jsonl").read_bytes(), leftovers()) == (OLD.encode(), [])
    assert out.startswith("Errors saved: errors_batch_1.jsonl")  # it is not given up for the other one
    assert asked(api, "GET", "/content$") == 4


def test_a_rate_limit_on_a_download_is_waited_out(api: FaultyAPI, tool: Tool, clock: FakeTime) -> None:
    done_batch(api)
    api.faults.append(Fault("GET", "/content$", status=429, headers={"Retry-After": "9"}))
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    assert clock.naps == [9]


def test_a_file_of_another_size_is_not_kept(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    batch = done_batch(api)
    api.files[batch.output_file_id or ""].bytes += 1
    assert tool("retrieve", "--batch-id", "batch_1") == 1
    size = len(jsonl(success("a1")))
    reason = f"download of {batch.output_file_id} was cut off ({size} of {size + 1} bytes)"
    out, err = capsys.readouterr()
    assert (out[:12], err) == ("Errors saved", error(f"batch_1: {reason}"))
    assert [*Path().glob("*.jsonl")] == [Path("errors_batch_1.jsonl")]


def test_an_old_error_file_that_cannot_be_removed_is_an_error(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api, errors=b"")
    Path("errors_batch_1.jsonl").mkdir()
    assert tool("status", "--batch-id", "batch_1") == 1
    assert capsys.readouterr().err == error("batch_1: cannot remove errors_batch_1.jsonl: Is a directory")


NO_SIZE = pytest.mark.parametrize("habit", ["no-bytes", "zero-bytes", "no-file-info"])
NO_LINE_END = pytest.mark.parametrize("output", [jsonl(success("a1")), jsonl(success("a1")).rstrip(), b"x" * 99],
                                      ids=["line end", "no line end", "no JSON"])


@NO_LINE_END
def test_a_file_of_the_right_size_is_kept_byte_for_byte(output: bytes, api: FaultyAPI, tool: Tool) -> None:
    done_batch(api, output=output, errors=None)
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == output


@NO_SIZE
@NO_LINE_END
def test_a_file_of_unknown_size_is_kept_if_its_last_line_is_an_object(
    output: bytes, habit: str, api: FaultyAPI, tool: Tool, capsys: Capture
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
    habit: str, api: FaultyAPI, tool: Tool
) -> None:
    api.habits.add(habit)
    output = jsonl(*(success(str(number)) for number in range(3)))
    done_batch(api, output=output, errors=None)
    api.faults.append(Fault("GET", "/content$", skip=1, times=2, action="shorten"))
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == output


@NO_SIZE
def test_a_file_that_is_uploaded_to_a_service_that_tells_no_size_is_taken_as_it_is(
    habit: str, api: FaultyAPI, tool: Tool
) -> None:
    api.habits.add(habit)
    assert tool("create", "--in", requests_file()) == 0
    assert (posts(api, "/v1/files"), asked(api, "DELETE"), len(api.files)) == (1, 0, 1)


@pytest.mark.parametrize("command", ["status", "wait", "retrieve"])
def test_an_output_file_that_is_gone_is_an_error_that_names_the_batch(
    command: str, api: FaultyAPI, tool: Tool, capsys: Capture
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
    api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api, output_file_id="file-gone")
    assert tool("status", "--batch-id", "batch_1", "--json") == 1
    shown = json.loads(capsys.readouterr().out)
    assert (shown["errors_path"], "results_path" in shown) == ("errors_batch_1.jsonl", False)


@pytest.mark.parametrize("command", ["status", "wait", "retrieve"])
def test_an_error_file_that_is_gone_is_a_warning(
    command: str, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    done_batch(api, error_file_id="file-gone")
    assert tool(command, "--batch-id", "batch_1") == 0
    assert capsys.readouterr().err.endswith(warning("the error file of batch batch_1 is no longer on the server"))
    assert Path("results_batch_1.jsonl").read_bytes() == jsonl(success("a1"))


@pytest.mark.parametrize("url", ["/v1/responses", "/v1/chat/completions"])
def test_a_job_of_single_commands_at_a_service_of_nearly_all_habits_ends_with_all_its_bios(
    url: str, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    api.habits |= {*HABITS} - {"no-file-info", "no-bytes", "limits-after-post"}
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
        "bios.csv: 3 of 3 artists have a bio\n"
    )
    assert tool("create", "--in", "requests.jsonl") == 0
    assert times_paid(api) == [1, 1, 1]
    assert {batch.output_file_id, batch.error_file_id} <= api.files.keys()


def test_no_two_ids_share_a_file() -> None:
    long = "batch_" + "x" * 300
    ids = ["batch_1", "batch=1", "batch:1", "batch%1", "batch/1", "batch_1 ", "..", ".batch_1", "_batch_1", "ä", "ö",
           long, long + "y", long[:100]]
    paths = [path for batch_id in ids for path in batch_tool.batch_paths(batch_id).values()]
    assert len({*paths}) == 2 * len(ids)
    assert all(re.fullmatch(r"(results|errors)_[A-Za-z0-9_][A-Za-z0-9._-]{0,120}\.jsonl", path) for path in paths)
    assert batch_tool.batch_paths("batch_1") == {"results": "results_batch_1.jsonl", "errors": "errors_batch_1.jsonl"}


@pytest.mark.parametrize("habit", ["odd-ids", "long-ids"])
def test_ids_of_any_shape_are_asked_for_and_saved(api: FaultyAPI, tool: Tool, habit: str) -> None:
    api.habits = {habit}
    requests_file()
    assert tool("create", "--in", "requests.jsonl") == 0
    (batch_id,) = api.batches
    assert tool("wait", "--batch-id", batch_id) == 0
    (path,) = Path().glob("results_*.jsonl")
    assert (path.name, path.stat().st_size > 0) == (batch_tool.batch_paths(batch_id)["results"], True)
    assert tool("cancel", "--batch-id", batch_id) == 1


def test_a_stream_has_its_error_file_in_the_current_folder(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    batch = api.new_batch("completed", output=jsonl(success()), errors=jsonl(refused("a2")))
    assert tool("retrieve", "--batch-id", batch.id, "--out", "/dev/null") == 0
    assert Path(f"errors_{batch.id}.jsonl").read_bytes() == jsonl(refused("a2"))


# ---- cancel ----


def test_cancel_says_that_it_takes_a_while(api: FaultyAPI, tool: Tool, utc: None, capsys: Capture) -> None:
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


def test_cancel_says_what_a_cancelled_batch_costs(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    answer = json.dumps({"id": "batch_1", "status": "cancelled"}).encode()
    api.faults.append(Fault("POST", status=200, body=answer))
    assert tool("cancel", "--batch-id", "batch_1") == 0
    assert capsys.readouterr().out == (
        "Batch cancellation initiated: batch_1\n"
        "Status: cancelled\n"
        "Note: Batch was successfully cancelled. Any completed requests have been processed and you will be charged "
        "for them.\n"
    )


def test_cancel_as_json_is_the_batch(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    api.new_batch("in_progress", id="batch_1")
    assert tool("cancel", "--batch-id", "batch_1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == api.exchanges[0].answer_json


def test_a_batch_that_has_ended_cannot_be_cancelled(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
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
    body: Json, reason: str, api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    api.faults.append(Fault("POST", "/cancel$", status=200, body=json.dumps(body).encode(), times=3))
    assert tool("cancel", "--batch-id", "batch_1") == 1
    assert capsys.readouterr() == ("", error(f"batch_1: {reason}"))


def test_a_cancellation_that_fails_is_not_asked_for_again(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    api.new_batch("in_progress", id="batch_1")
    api.faults.append(Fault("POST", status=500, times=9))
    assert tool("cancel", "--batch-id", "batch_1") == 1
    assert "CANCEL_BATCH: HTTP 500: " in capsys.readouterr().err
    assert posts(api, "/v1/batches/batch_1/cancel") == 1


# ---- list ----


def test_list_is_an_aligned_table_newest_first(api: FaultyAPI, tool: Tool, utc: None, capsys: Capture) -> None:
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


def test_a_list_that_never_ends_is_an_error(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    api.habits.add("ignores-after")
    for number in range(101):
        api.new_batch("completed", created_at=MORNING + number)
    assert tool("list", "--limit", "500") == 1
    assert capsys.readouterr() == ("", error(REPEATED))


@pytest.mark.parametrize("page, code, out", [
    ({"data": [{"id": "batch_1", "status": "completed"}]}, 0, "batch_1"),
    ({"data": [], "has_more": True}, 1, ""),
])
def test_a_page_that_is_repeated_is_shown_once_and_an_empty_one_is_not_an_empty_list(
    page: Json, code: int, out: str, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=200, body=json.dumps(page).encode(), times=9))
    assert tool("list", "--limit", 5) == code
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [*filter(None, [out])]


def test_an_empty_list_says_so(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    assert tool("list") == 0
    assert capsys.readouterr() == ("No batches found.\n", "")


@pytest.mark.parametrize("options, shown, requests", [([], 20, 1), (["--limit", "1"], 1, 1),
                                                      (["--limit", "150"], 150, 2), (["--limit", "999"], 210, 3)])
def test_the_limit_is_the_number_printed(
    options: list[str], shown: int, requests: int, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    file = api.new_file(b"", "batch", "x")
    for number in range(210):
        api.new_batch("completed", id=f"batch_{number}", input_file=file, created_at=MORNING + number)
    assert tool("list", *options) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == [f"batch_{number}" for number in range(209, 209 - shown, -1)]
    assert asked(api, "GET") == requests


def test_a_stdout_of_any_encoding_takes_any_name(api: FaultyAPI, tool: Tool, monkeypatch: Environment) -> None:
    api.new_batch("completed", id="batch_1", metadata={"input_file": "뉴진스.jsonl"})
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert tool("list") == 0
    assert written.getvalue().endswith(b"  \\ub274\\uc9c4\\uc2a4.jsonl\n")
    written.truncate(0)
    assert tool("list", "--json") == 0
    assert json.loads(written.getvalue().lstrip(b"\0"))["metadata"]["input_file"] == "뉴진스.jsonl"


def test_list_as_json_is_one_line_a_batch(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    api.new_batch("completed")
    api.new_batch("failed")
    assert tool("list", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == api.exchanges[0].answer_json["data"]


def test_an_empty_list_as_json_is_nothing(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    assert tool("list", "--json") == 0
    assert capsys.readouterr() == ("", "")
