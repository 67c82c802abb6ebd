"""`batch_tool.py run`: what it leaves in --out, and what it asks of the server."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from local_batch_api import Fault, LocalBatch, LocalBatchAPI

import batch_tool

pytestmark = pytest.mark.usefixtures("api")

OUT = Path("results.jsonl")


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does: nothing of the program catches it."""


class FakeTime:
    """A clock that only sleeping moves on; each event happens during one sleep."""

    def __init__(self, *events: Callable[[], object]) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self.events = list(events)

    def sleep(self, seconds: float) -> None:
        assert len(self.slept) < 500, "it waits for ever"
        self.now += seconds
        self.slept.append(seconds)
        if self.events:
            self.events.pop(0)()

    def clock(self) -> float:
        return self.now


def nothing() -> None:
    pass


def kill() -> None:
    raise Killed


def request_line(custom_id: str, **body: Any) -> bytes:
    body = {"model": "m", "input": f"Bio of {custom_id}"} | body
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/responses", "body": body}
    return json.dumps(request).encode() + b"\n"


def write_requests(*custom_ids: str) -> bytes:
    content = b"".join(map(request_line, custom_ids))
    Path("requests.jsonl").write_bytes(content)
    return content


def run(*options: str, time: FakeTime | None = None, out: str = str(OUT), source: str = "requests.jsonl") -> int:
    time = time or FakeTime()
    argv = ["run", "--in", source, "--out", out, "--interval", "10", *options]
    return batch_tool.main(argv, sleep=time.sleep, clock=time.clock)


def posts(api: LocalBatchAPI, path: str = "/v1/batches") -> int:
    return sum((exchange.method, exchange.path) == ("POST", path) for exchange in api.exchanges)


def sent(api: LocalBatchAPI) -> list[list[str]]:
    """The custom_ids of every batch, in the order of their creation."""
    return [ids_in(api.read_file(batch.input_file_id)) for batch in api.batches.values()]


def ids_in(lines: bytes) -> list[str]:
    return [json.loads(line)["custom_id"] for line in lines.splitlines()]


def served(api: LocalBatchAPI) -> dict[str, bytes]:
    """The last line that the server has for each custom_id, a success before all others."""
    found: dict[str, bytes] = {}
    for file_id, file in api.files.items():
        for line in api.read_file(file_id).splitlines(keepends=True) if file.purpose == "batch_output" else ():
            custom_id = json.loads(line)["custom_id"]
            if b'"status": "completed"' not in found.get(custom_id, b""):
                found[custom_id] = line
    return found


def missing_line(custom_id: str) -> bytes:
    message = "the request is in no output or error file of its batches"
    error = {"code": "missing", "message": message}
    return json.dumps({"id": None, "custom_id": custom_id, "response": None, "error": error}).encode() + b"\n"


def assert_out(api: LocalBatchAPI, *custom_ids: str) -> None:
    """--out has the server's line for each of these, and nothing else."""
    lines = served(api)
    assert OUT.read_bytes() == b"".join(lines.get(custom_id) or missing_line(custom_id) for custom_id in custom_ids)


def once(*custom_ids: str) -> Counter[str]:
    return Counter(custom_ids)


def success(custom_id: str) -> bytes:
    body = {"status": "completed", "output": [], "usage": {"input_tokens": 7, "output_tokens": 3}}
    response = {"status_code": 200, "request_id": "req", "body": body}
    return json.dumps({"id": "x", "custom_id": custom_id, "response": response, "error": None}).encode() + b"\n"


def expired(custom_id: str) -> bytes:
    error = {"code": "batch_expired", "message": "not run in time"}
    return json.dumps({"id": "x", "custom_id": custom_id, "response": None, "error": error}).encode() + b"\n"


def lines(make: Callable[[str], bytes], custom_ids: Iterable[str]) -> bytes | None:
    return b"".join(map(make, custom_ids)) or None


def earlier_batch(
    api: LocalBatchAPI, status: str, requests: bytes, done: Iterable[str] = (), left: Iterable[str] = (), **more: Any
) -> LocalBatch:
    """A batch of these requests that another run has made."""
    metadata = {"input_sha256": hashlib.sha256(requests).hexdigest(), "input_file": "requests.jsonl", "part": "1/1"}
    input_file = api.new_file(requests, "batch", "requests.jsonl")
    output, errors = lines(success, done), lines(expired, left)
    return api.new_batch(status, input_file=input_file, output=output, errors=errors, metadata=metadata, **more)


# ---- rounds ----


def test_every_request_in_request_order(api: LocalBatchAPI, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [f"a{number}" for number in range(30)]
    write_requests(*ids)
    assert run() == 0
    assert_out(api, *ids)
    assert (posts(api), api.executions) == (1, once(*ids))
    assert capsys.readouterr().out == ""


def test_what_stderr_tells(api: LocalBatchAPI, capsys: pytest.CaptureFixture[str]) -> None:
    api.outcomes = {"a1": ["429", "200"], "a2": "400", "a3": "incomplete", "a4": "missing"}
    write_requests("a1", "a2", "a3", "a4", "a5")
    assert run("--attempts", "2") == 1
    told = re.sub("(file-|batch_)[0-9a-f]{24}", r"\1ID", capsys.readouterr().err)
    assert told == """\
part 1/1: File ID: file-ID
part 1/1: Batch ID: batch_ID
batches: 1 validating; 0:00:00 elapsed
batches: 1 completed; requests: 4/5 (80%), 2 failed; 0:00:10 elapsed
round 2: 2 requests to send again
part 1/1: File ID: file-ID
part 1/1: Batch ID: batch_ID
batches: 1 validating; 0:00:10 elapsed
batches: 1 completed; requests: 1/2 (50%); 0:00:20 elapsed
Wrote results.jsonl: 2 succeeded, 1 failed, 1 incomplete, 1 missing of 5 requests; tokens: 360 input, 135 output; \
errors: 1 × bad_request, 1 × incomplete
"""


RETRYABLE = ("408", "409", "429", "500", "503", "expired", "cancelled", "timeout", "failed", "missing")
REJECTED = ("400", "401", "404", "incomplete")


@pytest.mark.parametrize("outcome", RETRYABLE)
def test_what_can_be_retried_goes_into_the_next_round(api: LocalBatchAPI, outcome: str) -> None:
    api.outcomes = {"a2": [outcome, "200"]}
    write_requests("a1", "a2", "a3")
    assert run() == 0
    assert sent(api) == [["a1", "a2", "a3"], ["a2"]]
    assert_out(api, "a1", "a2", "a3")


@pytest.mark.parametrize("outcome", REJECTED)
def test_what_would_be_refused_again_is_not_sent_again(api: LocalBatchAPI, outcome: str) -> None:
    api.outcomes = {"a2": outcome, "a3": ["500", "200"]}
    write_requests("a1", "a2", "a3")
    assert run() == 1
    assert sent(api) == [["a1", "a2", "a3"], ["a3"]]
    assert_out(api, "a1", "a2", "a3")


@pytest.mark.parametrize(("options", "rounds"), [((), 3), (("--attempts", "1"), 1), (("--attempts", "5"), 5)])
def test_attempts_bound_the_rounds(api: LocalBatchAPI, options: tuple[str, ...], rounds: int) -> None:
    api.outcomes = {"a2": "500"}
    write_requests("a1", "a2")
    assert run(*options) == 1
    assert sent(api) == [["a1", "a2"], *[["a2"]] * (rounds - 1)]
    assert_out(api, "a1", "a2")


def test_a_request_that_is_in_no_file_is_missing(api: LocalBatchAPI) -> None:
    api.outcomes = {"a2": "missing"}
    write_requests("a1", "a2")
    assert run() == 1
    assert sent(api) == [["a1", "a2"], ["a2"], ["a2"]]
    assert OUT.read_bytes().splitlines(keepends=True)[1] == missing_line("a2")
    assert_out(api, "a1", "a2")


@pytest.mark.parametrize("outcome", ["500", "failed"])
def test_a_round_of_the_same_bytes_is_a_new_batch(api: LocalBatchAPI, outcome: str) -> None:
    api.outcomes = {"a1": [outcome, "200"]}
    write_requests("a1")
    assert run() == 0
    assert sent(api) == [["a1"], ["a1"]]
    assert_out(api, "a1")


def test_parts_are_consecutive_lines(api: LocalBatchAPI) -> None:
    api.outcomes = {"a1": ["500", "200"], "a4": ["500", "200"], "a5": ["500", "200"]}
    content = write_requests("a1", "a2", "a3", "a4", "a5")
    assert run("--max-requests", "2") == 0
    assert sent(api) == [["a1", "a2"], ["a3", "a4"], ["a5"], ["a1", "a4"], ["a5"]]
    labels = [(batch.metadata or {})["part"] for batch in api.batches.values()]
    assert labels == ["1/3", "2/3", "3/3", "1/2", "2/2"]
    first = [batch.input_file_id for batch in api.batches.values()][:3]
    assert b"".join(map(api.read_file, first)) == content
    assert_out(api, "a1", "a2", "a3", "a4", "a5")


def test_every_batch_says_what_it_is_of(api: LocalBatchAPI) -> None:
    content = write_requests("a1")
    assert run("--completion-window", "24h") == 0
    (batch,) = api.batches.values()
    sha256 = hashlib.sha256(content).hexdigest()
    assert batch.metadata == {"input_sha256": sha256, "input_file": "requests.jsonl", "part": "1/1"}
    assert (batch.endpoint, batch.completion_window) == ("/v1/responses", "24h")


# ---- adoption ----


def test_a_finished_run_started_again_submits_nothing(api: LocalBatchAPI) -> None:
    api.outcomes = {"a2": ["429", "200"], "a3": "400"}
    write_requests("a1", "a2", "a3")
    assert run() == 1
    first, asked = OUT.read_bytes(), posts(api)
    assert run(time=FakeTime(kill)) == 1, "nothing to wait for"
    assert (OUT.read_bytes(), posts(api), posts(api, "/v1/files")) == (first, asked, asked)


def test_a_run_that_used_up_its_attempts_started_again_sends_only_what_failed(api: LocalBatchAPI) -> None:
    api.outcomes = {"a2": ["500"] * 4}
    write_requests("a1", "a2")
    assert run() == 1
    assert run() == 0
    assert sent(api) == [["a1", "a2"], *[["a2"]] * 4]
    assert_out(api, "a1", "a2")


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing", "paused_for_maintenance"])
def test_a_batch_under_way_is_adopted(api: LocalBatchAPI, status: str) -> None:
    batch = earlier_batch(api, status, write_requests("a1", "a2"))
    output = api.new_file(success("a2") + success("a1"), "batch_output", "output.jsonl")

    def complete() -> None:
        batch.status, batch.output_file_id = "completed", output.id

    assert run(time=FakeTime(nothing, complete)) == 0
    assert OUT.read_bytes() == success("a1") + success("a2")
    assert posts(api) == posts(api, "/v1/files") == 0


@pytest.mark.parametrize("status", ["completed", "expired", "cancelled"])
def test_what_an_ended_batch_finished_is_taken_and_the_rest_sent(api: LocalBatchAPI, status: str) -> None:
    earlier_batch(api, status, write_requests("a1", "a2", "a3"), done=["a3"], left=["a1"])
    assert run("--attempts", "1") == 0
    assert sent(api)[1:] == [["a1", "a2"]]
    assert api.executions == once("a1", "a2")
    assert_out(api, "a1", "a2", "a3")


@pytest.mark.parametrize("status", ["failed", "completed", "expired", "cancelled"])
def test_a_batch_without_one_success_is_submitted_again(api: LocalBatchAPI, status: str) -> None:
    api.empty_ids = True
    earlier_batch(api, status, write_requests("a1", "a2"), left=["a1", "a2"], output_file_id="")
    assert run() == 0
    assert sent(api)[1:] == [["a1", "a2"]]
    assert api.executions == once("a1", "a2")


def test_a_batch_that_is_being_cancelled_is_waited_for(api: LocalBatchAPI) -> None:
    batch = earlier_batch(api, "cancelling", write_requests("a1", "a2"))
    output = api.new_file(success("a1"), "batch_output", "output.jsonl")

    def end() -> None:
        batch.status, batch.output_file_id = "cancelled", output.id

    assert run(time=FakeTime(nothing, nothing, end)) == 0
    assert (sent(api)[1:], api.executions) == ([["a2"]], once("a2"))
    assert_out(api, "a1", "a2")


def test_all_earlier_batches_of_the_same_requests_count(api: LocalBatchAPI) -> None:
    content = write_requests("a1", "a2", "a3")
    earlier_batch(api, "cancelled", content, done=["a1"])
    earlier_batch(api, "expired", content, done=["a3"])
    assert run() == 0
    assert (sent(api)[2:], api.executions) == ([["a2"]], once("a2"))


@pytest.mark.parametrize("change", [{"endpoint": "/v1/embeddings"}, {"created_at": 1_600_000_000}])
def test_a_batch_at_another_endpoint_or_long_ago_is_not_adopted(api: LocalBatchAPI, change: dict[str, Any]) -> None:
    earlier_batch(api, "completed", write_requests("a1"), done=["a1"], **change)
    assert run() == 0
    assert api.executions == once("a1")


@pytest.mark.parametrize("sleeps", range(4))
@pytest.mark.parametrize("outcome", ["500", "expired", "missing"])
def test_a_run_killed_at_any_poll_goes_on_when_started_again(
    api: LocalBatchAPI, sleeps: int, outcome: str
) -> None:
    api.hold = "in_progress"
    api.outcomes = {"a1": ["500", "200"], "a3": [outcome, "200"]}
    write_requests("a1", "a2", "a3")

    def hold_again() -> None:
        api.hold = "in_progress"

    with pytest.raises(Killed):
        run("--max-requests", "2", time=FakeTime(*[nothing, release(api), hold_again, nothing][:sleeps], kill))
    assert not OUT.exists()
    api.hold = None
    assert run("--max-requests", "2") == 0
    assert sent(api)[:2] == [["a1", "a2"], ["a3"]]
    assert sorted(custom_id for batch in sent(api)[2:] for custom_id in batch) == ["a1", "a3"]
    assert_out(api, "a1", "a2", "a3")


def release(api: LocalBatchAPI) -> Callable[[], None]:
    def end_the_hold() -> None:
        api.hold = None

    return end_the_hold


def test_a_run_killed_in_its_second_round_adopts_that_round(api: LocalBatchAPI) -> None:
    api.outcomes = {"a2": ["500", "200"]}
    write_requests("a1", "a2")
    with pytest.raises(Killed):
        run(time=FakeTime(nothing, kill))
    assert sent(api) == [["a1", "a2"], ["a2"]]
    assert run() == 0
    assert sent(api) == [["a1", "a2"], ["a2"]]
    assert_out(api, "a1", "a2")


def test_a_run_with_other_parts_adopts_what_the_first_one_made(api: LocalBatchAPI) -> None:
    api.hold = "in_progress"
    api.outcomes = {"a2": ["500", "200"]}
    ids = [f"a{number}" for number in range(1, 6)]
    write_requests(*ids)
    with pytest.raises(Killed):
        run("--max-requests", "3", time=FakeTime(kill))
    assert run("--max-requests", "2", time=FakeTime(nothing, release(api))) == 0
    assert sent(api) == [["a1", "a2", "a3"], ["a4", "a5"], ["a2"]]
    assert_out(api, *ids)


def test_a_run_in_parts_adopts_a_batch_of_the_whole(api: LocalBatchAPI) -> None:
    earlier_batch(api, "expired", write_requests("a1", "a2", "a3"), done=["a2"])
    assert run("--max-requests", "1") == 0
    assert sent(api)[1:] == [["a1"], ["a3"]]
    assert api.executions == once("a1", "a3")


def test_create_does_not_take_a_later_round_for_the_whole(api: LocalBatchAPI) -> None:
    api.outcomes = {"a2": ["500", "200"]}
    write_requests("a1", "a2")
    assert run() == 0
    first = next(iter(api.batches))
    del api.batches[first]
    assert batch_tool.main(["create", "--in", "requests.jsonl"]) == 0
    assert sent(api) == [["a2"], ["a1", "a2"]]


# ---- the queue limit ----


def test_refused_parts_wait_until_a_batch_ends(api: LocalBatchAPI) -> None:
    api.queue_limit, api.hold = 2, "in_progress"
    ids = [f"a{number}" for number in range(1, 7)]
    write_requests(*ids)
    time = FakeTime(nothing, nothing, release(api))
    assert run("--max-requests", "2", "--attempts", "1", time=time) == 0
    assert posts(api, "/v1/files") == 3
    assert Counter(map(tuple, sent(api))).keys() == {("a1", "a2"), ("a3", "a4"), ("a5", "a6")}
    assert (api.executions, len(api.batches)) == (once(*ids), 5)
    assert set(time.slept) == {10}
    assert_out(api, *ids)


def test_nothing_is_submitted_while_the_queue_is_full(api: LocalBatchAPI) -> None:
    api.queue_limit, api.hold = 1, "in_progress"
    write_requests("a1", "a2")
    counts: list[int] = []
    time = FakeTime(*[lambda: counts.append(len(api.batches))] * 5, release(api))
    assert run("--max-requests", "1", time=time) == 0
    assert counts == [2, 2, 2, 2, 2]
    assert len(api.batches) == 3


def test_with_nothing_active_it_waits_longer_each_time(
    api: LocalBatchAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    api.queue_limit = 1
    write_requests("a1", "a2")
    time = FakeTime()
    assert run(time=time) == 1
    assert time.slept == [10, 20, 10, 40, 10, 80, 10, 160, 10]
    *told, error = capsys.readouterr().err.splitlines()
    assert [line for line in told if "trying" in line] == [
        f"no batch of this run is active; trying again in {seconds} s" for seconds in (20, 40, 80, 160)
    ]
    assert sum("was refused for the token limit of the queue" in line for line in told) == 5
    assert error == (
        f"batch_tool.py: error: part 1/1 (2 requests, {os.path.getsize('requests.jsonl')} bytes) was refused 5 times "
        "for the token limit of the queue with no batch of this run active; make batches smaller with --max-requests"
    )
    assert (posts(api), posts(api, "/v1/files"), OUT.exists()) == (5, 1, False)


def test_others_may_leave_the_queue(api: LocalBatchAPI) -> None:
    api.queue_limit = 2
    other = api.new_batch("in_progress", input_file=api.new_file(request_line("b1"), "batch", "other.jsonl"))
    write_requests("a1", "a2")

    def end() -> None:
        other.status = "completed"

    assert run("--attempts", "1", time=FakeTime(nothing, nothing, nothing, end)) == 0
    assert api.executions == once("a1", "a2")
    assert posts(api, "/v1/files") == 1


def test_a_refusal_found_after_a_lost_answer_waits_too(api: LocalBatchAPI) -> None:
    api.queue_limit = 1
    api.faults = [Fault("POST", "/batches$", skip=1, when="after", action="reset")]
    write_requests("a1", "a2")

    def hold_the_first() -> None:
        next(iter(api.batches.values())).hold = "in_progress"

    hold_later = FakeTime(hold_the_first)
    first = run("--max-requests", "1", "--attempts", "1", time=hold_later)
    assert first == 0
    assert api.executions == once("a1", "a2")
    assert_out(api, "a1", "a2")


# ---- what ends a run early ----


def test_a_batch_that_fails_validation_ends_the_run(api: LocalBatchAPI, capsys: pytest.CaptureFixture[str]) -> None:
    good = b"".join(map(request_line, ("a1", "a2")))
    Path("requests.jsonl").write_bytes(good + request_line("a3", model=None))
    OUT.write_text("old\n")
    assert run("--max-requests", "2") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    failed = next(batch for batch in api.batches.values() if batch.status == "failed")
    assert error == (
        f"batch_tool.py: error: batch {failed.id} (part 2/2) failed: line 1: invalid_request: Model parameter is "
        "required.; nothing is written, batches under way go on and a later run adopts them"
    )
    assert OUT.read_text() == "old\n"

    write_requests("a1", "a2", "a3")
    assert run("--max-requests", "2") == 0
    assert sent(api) == [["a1", "a2"], ["a3"], ["a3"]]
    assert api.executions == once("a1", "a2", "a3")


def test_a_batch_that_someone_cancels_ends_the_run_and_a_later_one_finishes(api: LocalBatchAPI) -> None:
    api.queue_limit, api.hold, api.cancel_done = 4, "in_progress", 0.5
    api.outcomes = {"a3": ["500", "200"]}
    ids = [f"a{number}" for number in range(1, 7)]
    write_requests(*ids)

    def cancel() -> None:
        api.cancel(next(iter(api.batches.values())))

    assert run("--max-requests", "2", time=FakeTime(nothing, cancel, nothing, release(api))) == 1
    assert sent(api) == [["a1", "a2"], ["a3", "a4"], ["a5", "a6"]], "the refused part is not submitted again"
    assert api.executions == once("a1", "a3", "a4")
    assert_out(api, *ids)

    assert run("--max-requests", "2") == 0
    assert sent(api)[3:] == [["a5", "a6"], ["a2", "a3"]]
    assert api.executions == once("a1", "a3", "a3", "a2", "a4", "a5", "a6")
    assert_out(api, *ids)


@pytest.mark.parametrize("attempts", ["1", "2"])
def test_a_cancelled_run_can_be_finished_with_the_same_attempts(api: LocalBatchAPI, attempts: str) -> None:
    api.hold, api.cancel_done = "in_progress", 0.5
    write_requests("a1", "a2")

    def cancel() -> None:
        api.cancel(next(iter(api.batches.values())))
        api.hold = None

    assert run("--attempts", attempts, time=FakeTime(nothing, cancel)) == 1
    assert run("--attempts", attempts) == 0
    assert api.executions == once("a1", "a2")
    assert_out(api, "a1", "a2")


def test_timeout_writes_nothing_and_the_next_run_goes_on(
    api: LocalBatchAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    api.hold = "in_progress"
    write_requests("a1", "a2")
    OUT.write_text("old\n")
    time = FakeTime()
    assert run("--timeout", "25", time=time) == 3
    assert (time.slept, OUT.read_text()) == ([10, 10, 5], "old\n")
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "nothing is written yet; the batches go on at the server; run the same command again to go on",
        "batch_tool.py: error: --timeout passed",
    ]
    api.hold = None
    assert run("--timeout", "25") == 0
    assert api.executions == once("a1", "a2")
    assert_out(api, "a1", "a2")


def test_timeout_also_ends_waiting_for_the_queue(api: LocalBatchAPI) -> None:
    api.queue_limit = 1
    write_requests("a1", "a2")
    time = FakeTime()
    assert run("--timeout", "35", time=time) == 3
    assert time.slept == [10, 20, 5]


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_writes_nothing_and_the_next_run_goes_on(
    api: LocalBatchAPI, capsys: pytest.CaptureFixture[str], number: signal.Signals, exit_code: int
) -> None:
    api.hold = "in_progress"
    write_requests("a1")
    assert run(time=FakeTime(nothing, lambda: signal.raise_signal(number))) == exit_code
    assert "run the same command again to go on" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["logs", "requests.jsonl"]
    api.hold = None
    assert run() == 0
    assert api.executions == once("a1")


def test_a_request_file_that_changes_meanwhile_is_sent_no_further(
    api: LocalBatchAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    api.outcomes = {"a1": ["500", "200"]}
    write_requests("a1", "a2")

    def change() -> None:
        with open("requests.jsonl", "ab") as file:
            file.write(request_line("a3"))

    assert run(time=FakeTime(change)) == 1
    assert (
        "batch_tool.py: warning: requests.jsonl was changed, so there is no further round; "
        "retry --results results.jsonl writes what is left\n"
    ) in capsys.readouterr().err
    assert posts(api) == 1
    assert [line["response"]["status_code"] for line in map(json.loads, OUT.open())] == [500, 200]


# ---- polling ----


def test_one_look_at_each_batch_an_interval(api: LocalBatchAPI) -> None:
    api.hold = "in_progress"
    write_requests("a1", "a2", "a3")
    time = FakeTime(*[nothing] * 4, release(api))
    assert run("--max-requests", "1", time=time) == 0
    assert time.slept == [10] * 5
    looks = Counter(exchange.path for exchange in api.exchanges if exchange.path.startswith("/v1/batches/"))
    assert looks == {f"/v1/batches/{batch_id}": 5 for batch_id in api.batches}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_polls_outlive_an_outage(api: LocalBatchAPI, status: int) -> None:
    api.hold = "in_progress"
    api.faults = [Fault("GET", "/batches/batch_", skip=1, times=20, status=status)]
    write_requests("a1")
    assert run(time=FakeTime(*[nothing] * 22, release(api))) == 0
    assert api.executions == once("a1")


def test_an_answer_about_another_batch_is_no_answer(api: LocalBatchAPI) -> None:
    other = api.new_batch("completed")
    api.faults = [Fault("GET", "/batches/batch_", body=json.dumps(other.as_json()).encode(), status=200)]
    write_requests("a1")
    assert run() == 0
    assert_out(api, "a1")


def test_downloads_wait_out_a_rate_limit(api: LocalBatchAPI) -> None:
    api.faults = [Fault("GET", "/content$", status=429, times=5)]
    write_requests("a1")
    assert run() == 0
    assert_out(api, "a1")


# ---- files ----


def test_out_to_stdout(api: LocalBatchAPI, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    write_requests("a1", "a2")
    assert run(out="-") == 0
    out, err = capfdbinary.readouterr()
    assert out == served(api)["a1"] + served(api)["a2"]
    assert b"Batch ID: batch_" in err


@pytest.mark.parametrize("out", ["folder", "folder/there/results.jsonl", "file/results.jsonl"])
def test_an_out_that_cannot_be_written_is_known_before_anything_is_paid_for(
    api: LocalBatchAPI, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    Path("folder/there/results.jsonl").mkdir(parents=True)
    Path("file").touch()
    write_requests("a1")
    assert run(out=out) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"batch_tool.py: error: cannot write {out}: ")
    assert api.exchanges == []


def test_folders_are_made_for_out(api: LocalBatchAPI) -> None:
    write_requests("a1")
    assert run(out="new/folder/results.jsonl") == 0
    assert Path("new/folder/results.jsonl").read_bytes() == served(api)["a1"]


def test_requests_from_stdin(api: LocalBatchAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    api.outcomes = {"a2": ["500", "200"]}
    content = b"".join(map(request_line, ("a1", "a2")))
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    with open(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert run(source="-") == 0
    assert sent(api) == [["a1", "a2"], ["a2"]]
    assert {(batch.metadata or {})["input_file"] for batch in api.batches.values()} == {"stdin"}
    assert_out(api, "a1", "a2")


def test_a_last_line_without_its_end(api: LocalBatchAPI) -> None:
    api.outcomes = {"a1": ["500", "200"], "a3": ["500", "200"]}
    content = write_requests("a1", "a2", "a3").removesuffix(b"\n")
    Path("requests.jsonl").write_bytes(content)
    assert run() == 0
    assert sent(api) == [["a1", "a2", "a3"], ["a1", "a3"]]
    assert_out(api, "a1", "a2", "a3")


def test_bytes_of_results_are_kept(api: LocalBatchAPI) -> None:
    line = success("a1").replace(b"[]", '["\u2028\x85 é \\u00e9", 1.50, 1e400]'.encode())
    batch = earlier_batch(api, "completed", write_requests("a1"))
    batch.output_file_id = api.new_file(line, "batch_output", "output.jsonl").id
    assert run() == 0
    assert OUT.read_bytes() == line


def test_lines_of_a_results_file_that_are_not_ours_are_told(
    api: LocalBatchAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = earlier_batch(api, "completed", write_requests("a1"))
    output = b"not json\n" + success("b1") + success("a1")
    batch.output_file_id = api.new_file(output, "batch_output", "output.jsonl").id
    assert run() == 0
    assert OUT.read_bytes() == success("a1")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    where = f"batch_tool.py: warning: results of {batch.id}"
    assert warnings == [
        f"{where} line 1: not valid JSON: Expecting value (character 1 of the line); line ignored",
        f'{where} line 2: custom_id "b1" is not in the request file; line ignored',
    ]


def test_two_runs_of_a_file_at_once_are_one(api: LocalBatchAPI, capsys: pytest.CaptureFixture[str]) -> None:
    write_requests("a1")
    codes: list[int] = []
    assert run(time=FakeTime(lambda: codes.append(run(out="other.jsonl")))) == 0
    assert codes == [1]
    assert "another create or run of requests.jsonl is at work; wait for it to end" in capsys.readouterr().err
    assert posts(api) == 1


def test_create_and_run_adopt_each_other(api: LocalBatchAPI) -> None:
    write_requests("a1", "a2", "a3")
    assert batch_tool.main(["create", "--in", "requests.jsonl", "--max-requests", "2"]) == 0
    assert run("--max-requests", "2") == 0
    assert batch_tool.main(["create", "--in", "requests.jsonl", "--max-requests", "2"]) == 0
    assert (posts(api), api.executions) == (2, once("a1", "a2", "a3"))
