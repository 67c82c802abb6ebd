"""`batch_tool.py run`: what it leaves in --out, what it asks of the server, and what that costs."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from builders import (
    MODEL,
    OUT,
    REQUESTS,
    FakeTime,
    Killed,
    another_machine,
    assert_out,
    assert_paid_once,
    batch_of_a_run,
    bios,
    create,
    custom_ids,
    edit,
    jsonl,
    kill,
    live_in,
    main,
    missing_line,
    nothing,
    numbered,
    posts,
    refused,
    release,
    replace,
    request,
    run,
    sent,
    served,
    sha256_of,
    stopped_run,
    success,
    with_sha256,
    write_requests,
)
from faulty_api import CHAT, HABITS, RESPONSES, Fault, FaultyAPI

import batch_tool

pytestmark = pytest.mark.usefixtures("api")


def once(*custom_ids: str) -> Counter[str]:
    return Counter(custom_ids)


def flat(lists: Iterable[list[str]]) -> list[str]:
    return [custom_id for each in lists for custom_id in each]


# ---- rounds ----


def test_every_request_in_request_order(api: FaultyAPI, capsys: pytest.CaptureFixture[str]) -> None:
    ids = numbered(30)
    content = write_requests(*ids)
    assert run() == 0
    assert_out(api)
    assert posts(api) == 1
    assert_paid_once(api, content)
    assert capsys.readouterr().out == ""


def test_each_line_is_the_servers_with_the_sha256_of_its_request_at_the_end(api: FaultyAPI) -> None:
    (line,) = write_requests("a1").splitlines()
    assert run() == 0
    (batch,) = api.batches.values()
    assert batch.output_file_id
    theirs = api.read_file(batch.output_file_id)
    assert OUT.read_bytes() == theirs[:-2] + f', "request_sha256": "{hashlib.sha256(line).hexdigest()}"}}\n'.encode()


def test_what_stderr_tells(api: FaultyAPI, capsys: pytest.CaptureFixture[str]) -> None:
    api.outcomes = {"a1": ["429", "200"], "a2": "400", "a3": "incomplete", "a4": "missing"}
    write_requests("a1", "a2", "a3", "a4", "a5")
    assert run("--attempts", "2") == 1
    err = re.sub("(file-|batch_)[0-9a-f]{24}", r"\1ID", capsys.readouterr().err)
    err = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", re.sub(r"\d:\d\d:\d\d elapsed", "TIME elapsed", err))
    assert err == """\
5 of 5 requests to send: 5 new
part 1/1: File ID: file-ID
part 1/1: Batch ID: batch_ID
everything is submitted; the service may take until TIME; you may close this window: the same command goes on where \
this one stops
batches: 1 validating; TIME elapsed
batches: 1 completed; requests: 4/5 (80%), 2 failed; TIME elapsed
round 2: 2 requests to send again
part 1/1: File ID: file-ID
part 1/1: Batch ID: batch_ID
batches: 1 validating; TIME elapsed
batches: 1 completed; requests: 1/2 (50%); TIME elapsed
Wrote results.jsonl: 2 succeeded, 2 rejected, 0 retryable, 1 missing of 5 requests; tokens: 360 input, 135 output
most common errors: 1 × bad_request: Bad Request, as the local mock server was told to.; \
1 × incomplete: max_output_tokens
new in this run: 4 results; tokens: 360 input, 135 output
"""


RETRYABLE = ("408", "409", "429", "500", "503", "expired", "cancelled", "timeout", "failed", "missing")
REJECTED = ("400", "401", "404", "incomplete", "content_filter", "refusal", "no_text", "error_200")


def test_what_can_be_retried_goes_into_the_next_round(api: FaultyAPI) -> None:
    api.outcomes = {outcome: [outcome, "200"] for outcome in RETRYABLE}
    content = write_requests("a1", *RETRYABLE)
    assert run() == 0
    assert sent(api) == [["a1", *RETRYABLE], [*RETRYABLE]]
    assert_out(api)
    assert_paid_once(api, content)


def test_what_would_be_refused_again_is_not_sent_again(api: FaultyAPI) -> None:
    api.outcomes = {outcome: outcome for outcome in REJECTED} | {"a1": ["500", "200"]}
    write_requests("a1", *REJECTED, "a2")
    assert run() == 1
    assert run() == 1
    assert sent(api) == [["a1", *REJECTED, "a2"], ["a1"]]
    assert_out(api)


@pytest.mark.parametrize(("options", "rounds"), [((), 3), (("--attempts", "1"), 1), (("--attempts", "5"), 5)])
def test_attempts_bound_the_rounds(api: FaultyAPI, options: tuple[str, ...], rounds: int) -> None:
    api.outcomes = {"a2": "500"}
    write_requests("a1", "a2")
    assert run(*options) == 1
    assert sent(api) == [["a1", "a2"], *[["a2"]] * (rounds - 1)]
    assert_out(api)


def test_a_request_that_is_in_no_file_is_missing(api: FaultyAPI) -> None:
    api.outcomes = {"a2": "missing"}
    write_requests("a1", "a2")
    assert run() == 1
    assert sent(api) == [["a1", "a2"], ["a2"], ["a2"]]
    assert OUT.read_bytes().splitlines(keepends=True)[1] == missing_line("a2")


@pytest.mark.parametrize("outcome", ["500", "failed"])
def test_a_round_of_the_same_bytes_is_a_new_batch(api: FaultyAPI, outcome: str) -> None:
    api.outcomes = {"a1": [outcome, "200"]}
    write_requests("a1")
    assert run() == 0
    assert sent(api) == [["a1"], ["a1"]]
    assert_out(api)


def test_parts_are_consecutive_lines(api: FaultyAPI) -> None:
    api.outcomes = {"a1": ["500", "200"], "a4": ["500", "200"], "a5": ["500", "200"]}
    write_requests(*numbered(5))
    assert run("--max-requests", "2") == 0
    assert sent(api) == [["a1", "a2"], ["a3", "a4"], ["a5"], ["a1", "a4"], ["a5"]]
    assert_out(api)
    whole = hashlib.sha256(REQUESTS.read_bytes()).hexdigest()
    assert {(batch.metadata or {})["request_file_sha256"] for batch in api.batches.values()} == {whole}


def test_a_run_that_used_up_its_attempts_started_again_sends_only_what_failed(api: FaultyAPI) -> None:
    api.outcomes = {"a2": ["500"] * 4 + ["200"]}
    content = write_requests("a1", "a2")
    assert run() == 1
    assert run() == 0
    assert sent(api) == [["a1", "a2"], *[["a2"]] * 4]
    assert_out(api)
    assert_paid_once(api, content)


# ---- earlier batches ----


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing", "paused_for_maintenance"])
def test_a_batch_under_way_is_picked_up(api: FaultyAPI, status: str) -> None:
    batch = batch_of_a_run(api, status, write_requests("a1", "a2"))
    output = api.new_file(jsonl(success("a2"), success("a1")), "batch_output", "output.jsonl")

    def complete() -> None:
        batch.status, batch.output_file_id = "completed", output.id

    assert run(time=FakeTime(nothing, complete)) == 0
    assert_out(api)
    assert posts(api) == posts(api, "/v1/files") == 0


@pytest.mark.parametrize("status", ["completed", "expired", "cancelled"])
def test_what_an_ended_batch_finished_is_taken_and_the_rest_sent(api: FaultyAPI, status: str) -> None:
    batch_of_a_run(api, status, write_requests("a1", "a2", "a3"), done=["a3"], left=["a1"])
    assert run("--attempts", "1") == 0
    assert sent(api)[1:] == [["a1", "a2"]]
    assert api.executions == once("a1", "a2")
    assert_out(api)


@pytest.mark.parametrize("status", ["failed", "completed", "expired", "cancelled"])
def test_a_batch_without_one_success_is_submitted_again(api: FaultyAPI, status: str) -> None:
    api.empty_ids = True
    batch_of_a_run(api, status, write_requests("a1", "a2"), left=["a1", "a2"], output_file_id="")
    assert run() == 0
    assert sent(api)[1:] == [["a1", "a2"]]
    assert api.executions == once("a1", "a2")


def test_a_batch_that_is_being_cancelled_is_waited_for(api: FaultyAPI) -> None:
    batch = batch_of_a_run(api, "cancelling", write_requests("a1", "a2"))
    output = api.new_file(jsonl(success("a1")), "batch_output", "output.jsonl")

    def end() -> None:
        batch.status, batch.output_file_id = "cancelled", output.id

    assert run(time=FakeTime(nothing, nothing, end)) == 0
    assert (sent(api)[1:], api.executions) == ([["a2"]], once("a2"))
    assert_out(api)


def test_all_earlier_batches_of_the_same_requests_count(api: FaultyAPI) -> None:
    content = write_requests("a1", "a2", "a3")
    batch_of_a_run(api, "cancelled", content, done=["a1"])
    batch_of_a_run(api, "expired", content, done=["a3"])
    assert run() == 0
    assert (sent(api)[2:], api.executions) == ([["a2"]], once("a2"))


def test_a_batch_of_long_ago_is_not_picked_up(api: FaultyAPI) -> None:
    batch_of_a_run(api, "completed", write_requests("a1"), done=["a1"], created_at=1_600_000_000)
    assert run() == 0
    assert api.executions == once("a1")


def test_the_endpoint_that_the_listing_shows_does_not_matter(api: FaultyAPI) -> None:
    batch_of_a_run(api, "completed", write_requests("a1"), done=["a1"], endpoint="/responses")
    batch_of_a_run(api, "completed", write_requests("a1"), done=["a1"], endpoint=None)
    assert run() == 0
    assert posts(api) == 0


@pytest.mark.parametrize("metadata", [{}, {"input_sha256": "others"}, {"request_file_sha256": ""}, None])
def test_a_batch_of_others_is_not_picked_up(api: FaultyAPI, metadata: dict[str, str] | None) -> None:
    batch_of_a_run(api, "completed", write_requests("a1"), done=["a1"], metadata=metadata)
    assert run() == 0
    assert api.executions == once("a1")


@pytest.mark.parametrize("sleeps", range(4))
def test_a_run_killed_at_any_poll_goes_on_when_started_again(api: FaultyAPI, sleeps: int) -> None:
    api.hold = "in_progress"
    api.outcomes = {"a1": ["500", "200"], "a3": ["missing", "200"]}
    content = write_requests("a1", "a2", "a3")

    def hold_again() -> None:
        api.hold = "in_progress"

    with pytest.raises(Killed):
        run("--max-requests", "2", time=FakeTime(*[nothing, release(api), hold_again, nothing][:sleeps], kill))
    assert not OUT.exists()
    api.hold = None
    assert run("--max-requests", "2") == 0
    assert sent(api)[:2] == [["a1", "a2"], ["a3"]]
    assert sorted(custom_id for batch in sent(api)[2:] for custom_id in batch) == ["a1", "a3"]
    assert_out(api)
    assert_paid_once(api, content)


def test_a_run_killed_in_its_second_round_picks_up_that_round(api: FaultyAPI) -> None:
    api.outcomes = {"a2": ["500", "200"]}
    write_requests("a1", "a2")
    with pytest.raises(Killed):
        run(time=FakeTime(nothing, kill))
    assert sent(api) == [["a1", "a2"], ["a2"]]
    assert run() == 0
    assert sent(api) == [["a1", "a2"], ["a2"]]
    assert_out(api)


def test_a_run_with_other_parts_picks_up_what_the_first_one_made(api: FaultyAPI) -> None:
    api.hold = "in_progress"
    api.outcomes = {"a2": ["500", "200"]}
    write_requests(*numbered(5))
    with pytest.raises(Killed):
        run("--max-requests", "3", time=FakeTime(kill))
    assert run("--max-requests", "2", time=FakeTime(nothing, release(api))) == 0
    assert sent(api) == [["a1", "a2", "a3"], ["a4", "a5"], ["a2"]]
    assert_out(api)


def test_a_run_in_parts_picks_up_a_batch_of_the_whole(api: FaultyAPI) -> None:
    batch_of_a_run(api, "expired", write_requests("a1", "a2", "a3"), done=["a2"])
    assert run("--max-requests", "1") == 0
    assert sent(api)[1:] == [["a1"], ["a3"]]
    assert api.executions == once("a1", "a3")


@pytest.mark.parametrize("is_running", [True, False])
def test_of_a_batch_whose_input_file_is_gone_the_results_tell_which_requests_it_has(
    api: FaultyAPI, is_running: bool
) -> None:
    content = write_requests("a1", "a2", "a3")
    whole = {"request_file_sha256": hashlib.sha256(content).hexdigest()}
    batch = batch_of_a_run(api, "completed", jsonl(request("a2")), done=["a2"], metadata=whole)
    del api.files[batch.input_file_id]
    time = FakeTime()
    if is_running:
        batch.status = "in_progress"
        time = FakeTime(nothing, lambda: setattr(batch, "status", "completed"))
    assert run(time=time) == 0
    assert sent(api)[1:] == [["a1", "a3"]]


# ---- the queue limit ----


def test_refused_parts_wait_until_a_batch_ends(api: FaultyAPI) -> None:
    api.queue_limit, api.hold = 2, "in_progress"
    content = write_requests(*numbered(6))
    time = FakeTime(nothing, nothing, nothing, release(api))
    assert run("--max-requests", "2", "--attempts", "1", time=time) == 0
    assert posts(api, "/v1/files") == 5
    assert Counter(map(tuple, sent(api))).keys() == {("a1", "a2"), ("a3", "a4"), ("a5", "a6")}
    assert len(api.batches) == 5
    assert_paid_once(api, content)
    assert_out(api)


def test_nothing_is_submitted_while_the_queue_is_full(api: FaultyAPI) -> None:
    api.queue_limit, api.hold = 1, "in_progress"
    write_requests("a1", "a2")
    counts: list[int] = []
    time = FakeTime(*[lambda: counts.append(len(api.batches))] * 5, release(api))
    assert run("--max-requests", "1", time=time) == 0
    assert counts == [2, 2, 2, 2, 2]
    assert len(api.batches) == 3


def test_a_part_that_never_fits_is_divided_until_it_does(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    api.queue_limit = 2
    content = write_requests(*numbered(7))
    time = FakeTime()
    assert run("--attempts", "1", time=time) == 0
    paid = [ids for batch, ids in zip(api.batches.values(), sent(api), strict=True) if batch.status == "completed"]
    assert sorted(flat(paid)) == numbered(7)
    assert max(map(len, paid)) <= 2
    assert_paid_once(api, content)
    assert_out(api)
    assert 'trying again in 20 s' in capsys.readouterr().err


def test_a_request_that_never_fits_ends_the_run_after_five_refusals(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    api.queue_limit = 1
    api.new_batch("in_progress", input_file=api.new_file(jsonl(request("b1")), "batch", "other.jsonl"))
    write_requests("a1")
    time = FakeTime()
    assert run(time=time) == 1
    pauses = [int(seconds) for seconds in re.findall(r"trying again in (\d+) s", capsys.readouterr().err)]
    assert pauses == [20, 40, 80, 160]
    assert (posts(api), posts(api, "/v1/files"), OUT.exists()) == (5, 5, False)


def test_the_error_of_a_request_that_never_fits(api: FaultyAPI, capsys: pytest.CaptureFixture[str]) -> None:
    api.queue_limit = 0
    content = write_requests("a1")
    assert run() == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"batch_tool.py: error: part 1/1 (1 request, {len(content)} bytes) was refused 5 times for the token limit "
        "while no batch of this run was active; the account's limit is too small for this request"
    )


def test_others_may_leave_the_queue(api: FaultyAPI) -> None:
    api.queue_limit = 2
    other = api.new_batch("in_progress", input_file=api.new_file(jsonl(request("b1")), "batch", "other.jsonl"))
    content = write_requests("a1", "a2")

    def end() -> None:
        other.status = "completed"

    assert run("--attempts", "1", time=FakeTime(nothing, end)) == 0
    assert_paid_once(api, content)


def test_a_refusal_found_after_a_lost_answer_waits_too(api: FaultyAPI) -> None:
    api.queue_limit = 1
    api.faults = [Fault("POST", "/batches$", skip=1, when="after", action="reset")]
    content = write_requests("a1", "a2")

    def hold_the_first() -> None:
        next(iter(api.batches.values())).hold = "in_progress"

    def let_go() -> None:
        next(iter(api.batches.values())).hold = None

    time = FakeTime(hold_the_first, *[nothing] * 8, let_go)
    assert run("--max-requests", "1", "--attempts", "1", time=time) == 0
    assert_paid_once(api, content)
    assert_out(api)


def test_an_earlier_batch_over_the_token_limit_is_not_sent_again_whole_where_out_has_some_of_it(
    api: FaultyAPI,
) -> None:
    api.hold = "validating"
    lines = write_requests("a1", "a2").splitlines(keepends=True)
    assert create() == 0
    (batch,) = api.batches.values()
    batch.over_limit = True
    OUT.write_bytes(with_sha256(jsonl(success("a1")), sha256_of(lines[0])))
    assert run(time=FakeTime(release(api))) == 0
    assert sent(api) == [["a1", "a2"], ["a2"]]


# ---- what ends a run early ----


def test_a_batch_that_fails_validation_ends_the_run(api: FaultyAPI, capsys: pytest.CaptureFixture[str]) -> None:
    good = jsonl(*map(request, ("a1", "a2")))
    bad = request("a3")
    bad["body"] = {"input": "Bio of a3"}
    REQUESTS.write_bytes(good + jsonl(bad))
    old = jsonl(success("z9"))
    OUT.write_bytes(old)
    assert run("--max-requests", "2") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    failed = next(batch for batch in api.batches.values() if batch.status == "failed")
    assert error == (
        f"batch_tool.py: error: batch {failed.id} failed: line 1: invalid_request: Model parameter is required.; "
        "no output was written; batches still running will be picked up by the next run"
    )
    assert OUT.read_bytes() == old

    content = write_requests("a1", "a2", "a3")
    assert run("--max-requests", "2") == 0
    assert sent(api) == [["a1", "a2"], ["a3"], ["a3"]]
    assert_paid_once(api, content)


def test_a_batch_that_someone_cancels_ends_the_run_and_a_later_one_finishes(api: FaultyAPI) -> None:
    api.queue_limit, api.hold, api.cancel_done = 4, "in_progress", 0.5
    api.outcomes = {"a3": ["500", "200"]}
    content = write_requests(*numbered(6))

    def cancel() -> None:
        api.cancel(next(iter(api.batches.values())))

    time = FakeTime(nothing, nothing, cancel, nothing, nothing, release(api))
    assert run("--max-requests", "2", time=time) == 1
    assert sent(api) == [["a1", "a2"], ["a3", "a4"], ["a5", "a6"]], "the refused part is not submitted again"
    assert api.executions == once("a1", "a3", "a4")
    assert_out(api)

    assert run("--max-requests", "2") == 0
    assert sent(api)[3:] == [["a2", "a3"], ["a5", "a6"]]
    assert_paid_once(api, content)
    assert_out(api)


@pytest.mark.parametrize("attempts", ["1", "2"])
def test_a_cancelled_run_can_be_finished_with_the_same_attempts(api: FaultyAPI, attempts: str) -> None:
    api.hold, api.cancel_done = "in_progress", 0.5
    content = write_requests("a1", "a2")

    def cancel() -> None:
        api.cancel(next(iter(api.batches.values())))
        api.hold = None

    assert run("--attempts", attempts, time=FakeTime(nothing, nothing, cancel)) == 1
    assert run("--attempts", attempts) == 0
    assert_paid_once(api, content)
    assert_out(api)


def test_timeout_writes_nothing_and_the_next_run_goes_on(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    api.hold = "in_progress"
    content = write_requests("a1", "a2")
    old = jsonl(success("z9"))
    OUT.write_bytes(old)
    time = FakeTime()
    assert run("--timeout", "25", time=time) == 3
    assert (time.now, OUT.read_bytes()) == (25, old)
    (batch_id,) = api.batches
    assert capsys.readouterr().err.splitlines()[-1] == (
        "batch_tool.py: error: --timeout passed; no output was written; the same command goes on where this one "
        "stopped; the batches go on at the server and will be charged; to stop them: batch_tool.py cancel --batch-id "
        + batch_id
    )
    api.hold = None
    assert run("--timeout", "25") == 0
    assert_paid_once(api, content)
    assert_out(api, old)


def test_timeout_also_ends_waiting_for_the_queue(api: FaultyAPI) -> None:
    api.queue_limit = 0
    write_requests("a1")
    time = FakeTime()
    assert run("--timeout", "35", time=time) == 3
    assert time.now == 35


DRIPS = [("GET", "/batches$"), ("GET", "/batches/"), ("GET", "/content$")]


@pytest.mark.parametrize(("method", "path"), DRIPS)
def test_timeout_holds_against_a_server_that_drips(api: FaultyAPI, method: str, path: str) -> None:
    content = write_requests("a1")
    api.faults = [Fault(method, path, action="drip", seconds=0.05)]
    argv = ["run", "--in", str(REQUESTS), "--out", str(OUT), "--interval", "0.01", "--timeout", "0.3"]
    assert batch_tool.main(argv) == 3
    assert api.dripping
    api.faults = []
    assert run() == 0
    assert_paid_once(api, content)


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_writes_nothing_and_the_next_run_goes_on(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str], number: signal.Signals, exit_code: int
) -> None:
    api.hold = "in_progress"
    content = write_requests("a1")
    assert run(time=FakeTime(nothing, lambda: signal.raise_signal(number))) == exit_code
    (batch_id,) = api.batches
    assert f"will be charged; to stop them: batch_tool.py cancel --batch-id {batch_id}\n" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["logs", "requests.jsonl"]
    api.hold = None
    assert run() == 0
    assert_paid_once(api, content)


def test_a_request_file_that_changes_meanwhile_is_sent_no_further(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    api.outcomes = {"a1": ["500", "200"]}
    write_requests("a1", "a2")

    def change() -> None:
        with REQUESTS.open("ab") as file:
            file.write(jsonl(request("a3")))

    assert run(time=FakeTime(change)) == 1
    assert "batch_tool.py: warning: requests.jsonl was changed, so nothing more is sent; start run again\n" in (
        capsys.readouterr().err
    )
    assert posts(api) == 1
    assert [line["response"]["status_code"] for line in map(json.loads, OUT.open())] == [500, 200]
    assert run() == 0
    assert_paid_once(api, REQUESTS.read_bytes())


# ---- the spreadsheet changes ----


def with_prompt(custom_id: str, prompt: str) -> dict[str, Any]:
    changed = request(custom_id)
    changed["body"]["input"] = prompt
    return changed


def exchanges_in(api: FaultyAPI, work: Callable[[], object]) -> int:
    before = len(api.exchanges)
    work()
    return len(api.exchanges) - before


def test_a_second_run_asks_nothing_of_the_server_and_needs_no_key(
    api: FaultyAPI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(*bios(3))
    assert run() == 0
    first = OUT.read_bytes()
    monkeypatch.delenv("OPENAI_API_KEY")
    assert exchanges_in(api, run) == 0
    assert OUT.read_bytes() == first
    assert "\n0 of 3 requests to send; 3 have a bio\n" in capsys.readouterr().err


EDITS: dict[str, tuple[Callable[[], list[Any]], set[str]]] = {
    "rows added": (lambda: [request("new"), *bios(5), request("new2")], {"new", "new2"}),
    "sorted": (lambda: bios(5)[::-1], set()),
    "removed": (lambda: bios(5)[1:3], set()),
    "one cell changed": (lambda: [*bios(3), with_prompt("a4", "x"), *bios(5)[4:]], {"a4"}),
    "prompt changed": (lambda: [with_prompt(each, "x") for each in numbered(5)], {*numbered(5)}),
    "another small file": (lambda: [request("z1"), request("z2")], {"z1", "z2"}),
    "another id": (lambda: [*bios(4), {**bios(5)[4], "custom_id": "b5"}], {"b5"}),
}


@pytest.mark.parametrize("change", EDITS)
def test_only_what_has_changed_is_sent_and_what_was_paid_stays(api: FaultyAPI, change: str) -> None:
    content = edit(*bios(5))
    assert run() == 0
    api.list_delay = 1e9  # --out alone tells
    first = served(api)
    requests, new = EDITS[change]
    changed = edit(*requests())
    assert run() == 0
    assert {*flat(sent(api)[1:])} == new
    still_there = {sha256_of(line) for line in changed.splitlines()}
    gone = [first[sha256_of(line)] for line in content.splitlines() if sha256_of(line) not in still_there]
    assert_out(api, *gone)
    assert_paid_once(api, content, changed)

    replace(content)  # and back
    assert run() == 0
    assert len(api.batches) == (2 if new else 1)
    lines = [first[sha256_of(line)] for line in content.splitlines()]
    assert OUT.read_bytes().splitlines(keepends=True)[:5] == lines
    assert_paid_once(api, content, changed)


def test_an_out_that_holds_something_else_is_refused_before_anything_is_sent(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    write_requests("a1")
    good = jsonl(success())
    others = [b"artist_id,bio\n", REQUESTS.read_bytes(), good + b"\n", good + b"{}\n", b"\xff\n"]
    for other in others:
        OUT.write_bytes(other)
        assert run() == 1
        assert re.search(
            r"error: results.jsonl holds something other than results \(line \d: .*\), so it was left as it is; choose "
            "another --out\n$",
            capsys.readouterr().err,
        )
        assert OUT.read_bytes() == other
    assert api.exchanges == []


def test_an_empty_out_is_no_problem(api: FaultyAPI) -> None:
    OUT.touch()
    content = write_requests("a1")
    assert run() == 0
    assert_paid_once(api, content)


@pytest.mark.parametrize("kept", [[], ["gone"]])
def test_what_another_run_has_written_to_out_meanwhile_is_kept(api: FaultyAPI, kept: list[str]) -> None:
    if kept:
        write_requests(*kept)
        assert run() == 0
    write_requests("b1", "a2", path="others.jsonl")
    write_requests("a1", "a2")
    own = FakeTime(lambda: run(source="others.jsonl"))
    assert run(time=own) == 0
    assert custom_ids(OUT.read_bytes()) == ["a1", "a2", *kept, "b1"]
    assert run("--dry-run", "--max-new", "1", source="others.jsonl") == 0


def test_an_out_that_is_edited_in_place_meanwhile_is_left_as_it_is(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    write_requests("gone")
    assert run() == 0
    write_requests("a1")
    edited = b"\n" + OUT.read_bytes()
    assert run(time=FakeTime(lambda: OUT.write_bytes(edited))) == 1
    assert f"{OUT} was changed while it was in use; run the same command again" in capsys.readouterr().err
    assert OUT.read_bytes() == edited
    OUT.write_bytes(edited[1:])
    assert run() == 0
    assert (custom_ids(OUT.read_bytes()), posts(api)) == (["a1", "gone"], 2)


def test_rejected_requests_keep_their_line_until_they_change(api: FaultyAPI) -> None:
    api.outcomes = {"a1": ["400", "200"]}
    edit(request("a1"), request("a2"))
    assert run() == 1
    line = OUT.read_bytes().splitlines(keepends=True)[0]
    assert exchanges_in(api, run) == 0
    assert OUT.read_bytes().splitlines(keepends=True)[0] == line
    content = edit(with_prompt("a1", "other"), request("a2"))
    assert run() == 0
    assert sent(api) == [["a1", "a2"], ["a1"]]
    assert_paid_once(api, content)


def test_results_without_request_sha256_count_by_custom_id(api: FaultyAPI) -> None:
    Path("from_retrieve.jsonl").write_bytes(jsonl(success("a1"), refused("a2"), success("gone")))
    lines = edit(*bios(3)).splitlines()
    assert run("--results", "from_retrieve.jsonl") == 0
    assert sent(api) == [["a2", "a3"]]
    assert OUT.read_bytes().splitlines(keepends=True)[0] == with_sha256(jsonl(success("a1")), sha256_of(lines[0]))
    edit(with_prompt("a1", "changed"), *bios(3)[1:])
    assert run() == 0, "its line has the sha256 by now"
    assert sent(api)[1:] == [["a1"]]


def test_an_out_without_request_sha256_counts_by_custom_id(api: FaultyAPI) -> None:
    OUT.write_bytes(jsonl(success("a1"), success("z9")))
    edit(*bios(2))
    assert run() == 0
    assert sent(api) == [["a2"]]
    assert OUT.read_bytes().splitlines(keepends=True)[2:] == [jsonl(success("z9"))]


def test_results_with_request_sha256_count_by_it(api: FaultyAPI) -> None:
    lines = edit(*bios(3)).splitlines()
    mine = with_sha256(jsonl(success("a1")), sha256_of(lines[0]))
    others = with_sha256(jsonl(success("a2")), "0" * 64)
    Path("elsewhere.jsonl").write_bytes(mine + others)
    assert run("--results", "elsewhere.jsonl") == 0
    assert sent(api) == [["a2", "a3"]]
    assert OUT.read_bytes().startswith(mine)
    assert others not in OUT.read_bytes()


def test_results_may_name_out(api: FaultyAPI) -> None:
    edit(*bios(2))
    assert run() == 0
    edit(*bios(3))
    Path("link.jsonl").symlink_to(OUT)
    assert run("--results", str(OUT), "link.jsonl") == 0
    assert sent(api) == [["a1", "a2"], ["a3"]]
    assert_out(api)


def test_force_pays_for_all_again_and_keeps_what_the_new_ones_do_not_bring(api: FaultyAPI) -> None:
    edit(*bios(2), request("z9"))
    assert run() == 0
    first = OUT.read_bytes().splitlines(keepends=True)
    edit(*bios(2))
    api.outcomes = {"a2": "500"}
    assert run("--force") == 0
    assert sent(api)[1:] == [["a1", "a2"], ["a2"], ["a2"]]
    now = OUT.read_bytes().splitlines(keepends=True)
    assert (now[0] != first[0], now[1:]) == (True, first[1:])


def test_a_forced_run_that_was_interrupted_pays_again_only_when_it_is_forced_again(api: FaultyAPI) -> None:
    content = edit(*bios(2))
    assert run() == 0
    with pytest.raises(Killed):
        run("--force", time=FakeTime(kill))
    assert exchanges_in(api, run) == 0
    assert run("--force") == 0
    assert {api.paid[sha256_of(line)] for line in content.splitlines()} == {3}


EARLIER = ["validating", "in_progress", "finalizing", "completed", "expired", "cancelled"]


@pytest.mark.parametrize("status", EARLIER)
def test_a_batch_of_an_earlier_version_is_recognized_by_its_input_file(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str], status: str
) -> None:
    has_ended = status in ("completed", "expired", "cancelled")
    earlier = jsonl(*bios(3), request("gone"))
    batch = batch_of_a_run(api, status, earlier, done=["a1", "a2", "gone"], left=["a3"])
    batch.request_counts = {"completed": 3, "failed": 1, "total": 4}
    edit(request("new"), with_prompt("a2", "changed"), request("a1"), request("a3"))
    time = FakeTime() if has_ended else FakeTime(nothing, nothing, lambda: setattr(batch, "status", "completed"))
    assert run(time=time) == 0
    assert {*flat(sent(api)[1:])} == {"new", "a2", "a3"}
    made = f"batch {batch.id} ({status}), made from an earlier version of requests.jsonl"
    message = f"{made}, already has {1 if has_ended else 2} of the requests"  # an ended one: those that it answered
    assert message in capsys.readouterr().err
    by_request = {json.loads(line)["request_sha256"] for line in OUT.read_bytes().splitlines()}
    assert by_request == {sha256_of(line) for content in (REQUESTS.read_bytes(), jsonl(request("a2"), request("gone")))
                          for line in content.splitlines()}


def test_edited_while_a_batch_is_under_way_it_is_waited_for(api: FaultyAPI) -> None:
    api.hold = "in_progress"
    api.outcomes = {"a2": ["500", "200"]}
    content = edit(*bios(3))
    with pytest.raises(Killed):
        run("--max-requests", "2", time=FakeTime(kill))
    changed = edit(request("new"), *bios(2), with_prompt("a3", "changed"))
    assert run("--max-requests", "3", time=FakeTime(nothing, release(api))) == 0
    assert sorted(flat(sent(api)[2:])) == ["a2", "a3", "new"]
    assert_paid_once(api, content, changed)


def test_done_and_not_saved_an_edit_takes_it(api: FaultyAPI) -> None:
    content = edit(*bios(3))
    assert create("--max-requests", "2") == 0
    for batch in api.batches.values():
        api.look(batch)
    changed = edit(*bios(4)[::-1])
    assert run() == 0
    assert sent(api)[2:] == [["a4"]]
    assert_paid_once(api, content, changed)
    assert_out(api)


HABITS_OF_NOTES: list[tuple[str, ...]] = [(), ("no-metadata",)]


@pytest.mark.parametrize("habits", HABITS_OF_NOTES)
@pytest.mark.parametrize("command", ["create", "run"])
def test_edited_at_once_after_the_post_its_batch_is_found_by_the_note(
    api: FaultyAPI, command: str, habits: tuple[str, ...]
) -> None:
    api.habits, api.list_delay, api.step = {*habits}, 10, 5
    time = live_in(api, FakeTime())
    content = edit(*bios(3))
    if command == "create":
        assert create("--max-requests", "2", time=time) == 0
    else:
        time.at = {0.1: kill}
        stopped_run("--max-requests", "2", time=time)
    changed = edit(request("new"), *bios(2), with_prompt("a3", "changed"))
    assert run(time=time) == 0
    assert_paid_once(api, content, changed)
    assert posts(api) == 3


@pytest.mark.parametrize("habits", HABITS_OF_NOTES)
@pytest.mark.parametrize(("when", "moment"), [("after", 1e6), ("later", 3.0), ("later", 40.0)])
def test_killed_in_the_post_and_edited_at_once_its_file_is_fenced(
    api: FaultyAPI, when: str, moment: float, habits: tuple[str, ...]
) -> None:
    api.habits, api.list_delay, api.step = {*habits}, 10, 5
    api.faults = [Fault("POST", "/batches$", when=when, action="reset")]
    time = live_in(api, FakeTime(kill, at={moment: api.carry_out}))
    content = edit(*bios(3))
    stopped_run(time=time)
    changed = edit(*bios(2))
    assert run(time=time) == 0
    time.sleep(100)
    assert_paid_once(api, changed)
    del content


def test_notes_of_files_of_another_name_or_service_are_left_alone(
    api: FaultyAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.faults = [Fault("POST", "/batches$", action="reset", times=9)]
    content = edit(*bios(2))
    Path("other.jsonl").write_bytes(jsonl(*bios(1)))
    with pytest.raises(Killed):
        run(source="other.jsonl", time=FakeTime(kill))
    monkeypatch.setenv("OPENAI_PROJECT_ID", "another")
    edit(*bios(3))
    with pytest.raises(Killed):
        run(time=FakeTime(kill))
    monkeypatch.delenv("OPENAI_PROJECT_ID")
    api.faults = []
    replace(content)
    time = FakeTime()
    assert run(time=time) == 0
    assert time.now == 10
    assert [exchange for exchange in api.exchanges if exchange.method == "DELETE"] == []


def test_the_batches_of_many_notes_that_are_gone_are_waited_for_once(api: FaultyAPI) -> None:
    for count in range(1, 5):
        edit(*bios(count))
        assert create() == 0
    api.batches.clear()
    edit(*bios(5))
    time = FakeTime()
    assert run(time=time) == 0
    assert (time.now, posts(api)) == (20, 5)


@pytest.mark.parametrize("habits", HABITS_OF_NOTES)
def test_two_versions_at_once_pay_once_for_what_they_share(api: FaultyAPI, habits: tuple[str, ...]) -> None:
    api.queue_limit, api.hold = 2, "in_progress"
    api.habits = {*habits}
    content = edit(*bios(4))
    edits: list[bytes] = []

    def edited() -> None:
        edits.append(edit(*bios(4)[::-1], request("new")))
        api.queue_limit = None
        assert run("--max-requests", "3", out="other.jsonl", time=FakeTime(nothing, nothing, release(api))) == 0

    time = FakeTime(nothing, edited)
    assert run("--max-requests", "2", "--attempts", "1", time=time) == 0
    if not habits:
        assert_paid_once(api, content, *edits)


def test_an_earlier_version_whose_input_file_is_gone_draws_a_warning(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = batch_of_a_run(api, "completed", jsonl(request("a1")), done=["a1"])
    del api.files[batch.input_file_id]
    content = edit(*bios(2))
    assert run() == 0
    assert (
        f"warning: batch {batch.id} was made from an earlier version of requests.jsonl, but its input file is not "
        "available; requests in both may be paid for twice"
    ) in capsys.readouterr().err
    assert_paid_once(api, content)


def test_the_requests_of_an_earlier_version_whose_output_file_is_gone_are_left_out(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = batch_of_a_run(api, "completed", jsonl(request("a1")), done=["a1"])
    assert batch.output_file_id
    del api.files[batch.output_file_id]
    edit(*bios(2))
    assert run() == 1
    assert f"error: the output file of batch {batch.id} is no longer on the server; 1 request that may have been" in (
        capsys.readouterr().err
    )
    assert sent(api)[1:] == [["a2"]]


def test_edits_do_not_take_batches_of_other_files(api: FaultyAPI) -> None:
    other = batch_of_a_run(api, "completed", jsonl(request("a1")), done=["a1"])
    assert other.metadata
    other.metadata["input_file"] = "other.jsonl"
    edit(*bios(2))
    assert run() == 0
    assert sent(api)[1:] == [["a1", "a2"]]


@pytest.mark.parametrize("is_last", [True, False])
def test_the_sha256_is_of_the_line_without_its_end(api: FaultyAPI, is_last: bool) -> None:
    content = edit(*bios(2))
    assert run() == 0
    replace(content.removesuffix(b"\n") if is_last else jsonl(request("a2")) + content.splitlines()[0])
    assert exchanges_in(api, run) == 0


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_last_line_without_its_end(api: FaultyAPI, rounds: int) -> None:
    api.outcomes = {"a1": ["500", "200"], "a3": ["500", "200"]} if rounds == 2 else {}
    content = write_requests("a1", "a2", "a3").removesuffix(b"\n")
    REQUESTS.write_bytes(content)
    assert run("--max-requests", "2") == 0
    assert_out(api)
    assert_paid_once(api, content)


def test_rewriting_out_again_and_again_changes_nothing(api: FaultyAPI) -> None:
    rest = jsonl(success("z")).strip().removeprefix(b"{").removesuffix(b"}")
    edit(*bios(1))
    first, second = b"{" + rest + b', "request_sha256": "odd"}\n', b'{"request_sha256":"0", ' + rest + b"}\r\n"
    OUT.write_bytes(first + second)
    assert run() == 0
    now = OUT.read_bytes()
    assert run() == 0
    assert OUT.read_bytes() == now
    assert now.count(b"\n") == 3


# ---- other services ----


CHAT_HABITS = {"thinks", "text-parts"}


@pytest.mark.parametrize("habit", HABITS)
def test_a_job_at_a_service_with_this_habit_ends_with_all_its_bios(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str], habit: str
) -> None:
    api.habits = {habit}
    api.outcomes = {"a2": ["500", "200"], "a3": ["expired", "200"], "a4": ["failed", "200"]}
    content = jsonl(*(request(each, url=CHAT if habit in CHAT_HABITS else RESPONSES) for each in numbered(4)))
    REQUESTS.write_bytes(content)
    assert run() == 0
    assert_paid_once(api, content)
    assert exchanges_in(api, run) == 0
    assert exported_bios() == {each: made_up_bio(each) for each in numbered(4)}


def made_up_bio(custom_id: str) -> str:
    return f"Artist {custom_id}: a made-up bio from the local mock server; no model was asked."


def exported_bios() -> dict[str, str]:
    assert main("export", "--in", str(REQUESTS), "--results", str(OUT), "--out", "bios.csv") == 0
    with open("bios.csv", encoding="utf-8", newline="") as file:
        return {row["artist_id"]: row["bio"] for row in csv.DictReader(file)}


SERVICES = {
    "ogx": {"no-final-newline", "string-bodies", "both-files", "cancel-loses-output", "no-models"},
    "litellm": {"odd-ids", "rewrites-uploads", "cancel-500"},
    "headroom": {"copies-uploads", "limits-after-post"},
    "batchlane": {"no-input-id", "no-metadata", "empty-listing", "long-ids"},
    "no sizes": {"byte-order-mark", "no-bytes", "no-final-newline"},
    "nearly all": {*HABITS} - {"no-has-more", "empty-listing", "limits-after-post"},
}


@pytest.mark.parametrize("service", SERVICES)
def test_a_job_at_a_service_of_several_habits_is_paid_for_once(api: FaultyAPI, service: str) -> None:
    api.habits = SERVICES[service]
    api.outcomes = {"a2": ["500", "200"]}
    content = write_requests(*numbered(3))
    assert run("--max-requests", "2") == 0
    assert exported_bios() == {each: made_up_bio(each) for each in numbered(3)}
    OUT.unlink()
    assert run() == 0
    assert exported_bios() == {each: made_up_bio(each) for each in numbered(3)}
    assert_paid_once(api, content)


UNUSABLE = {
    RESPONSES: {"cut": "unreadable", "no_utf8": "unreadable", "dry_run": "no_text", "commentary": "commentary"},
    CHAT: {"cut": "unreadable", "no_utf8": "unreadable", "dry_run": "no_text", "endless_thought": "no_text",
           "MAX_TOKENS": "incomplete: max_tokens"},
}


@pytest.mark.parametrize("url", UNUSABLE)
def test_what_was_answered_and_cannot_be_used_is_not_paid_for_again(api: FaultyAPI, url: str) -> None:
    api.outcomes = {outcome: outcome for outcome in UNUSABLE[url]} | {"a2": ["500", "200"]}
    content = jsonl(*(request(each, url=url) for each in ["a1", *UNUSABLE[url], "a2"]))
    REQUESTS.write_bytes(content)
    assert run() == 1
    assert run() == 1
    assert_paid_once(api, content)
    assert posts(api) == 2
    exported_bios()
    with open("bios.csv", encoding="utf-8", newline="") as file:
        errors = {row["artist_id"]: row["error"] for row in csv.DictReader(file)}
    assert errors.pop("a1") == errors.pop("a2") == ""
    assert all(errors[outcome].startswith(error) for outcome, error in UNUSABLE[url].items()), errors


@pytest.mark.parametrize("url", ["/responses", "/chat/completions"])
def test_a_job_at_endpoints_without_a_version(api: FaultyAPI, url: str) -> None:
    content = jsonl(*(request(each, url=url) for each in numbered(2)))
    REQUESTS.write_bytes(content)
    assert run() == 0
    assert exported_bios() == {each: made_up_bio(each) for each in numbered(2)}
    assert {batch.endpoint for batch in api.batches.values()} == {url}


def test_answers_that_a_cancelled_batch_counts_and_does_not_give_draw_a_warning(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    api.habits, api.cancel_done = {"cancel-loses-output"}, 0.5
    write_requests(*numbered(4))
    api.hold = "in_progress"
    assert create() == 0
    (batch,) = api.batches.values()
    assert main("cancel", "--batch-id", batch.id) == 0
    capsys.readouterr()
    api.hold = None
    assert run() == 0
    (warned,) = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert batch.id in warned
    assert "2" in warned


@pytest.mark.parametrize("command", ["run", "retrieve"])
def test_a_failed_batch_with_an_error_file_is_explained(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    api.habits, api.models[MODEL] = {"failed-error-file"}, None
    api.faults = [Fault("GET", "/models/", status=500)]
    write_requests("a1", "a2")
    if command == "run":
        assert run() == 1
    else:
        assert create() == 0
        assert main(command, "--batch-id", *api.batches) == 1
    out, err = capsys.readouterr()
    assert "model_not_found: The model 'gpt-6-luna' does not exist." in out + err
    assert "2 × invalid_request: The batch was refused." in out + err


def test_results_that_stay_away_for_ten_minutes_are_an_error_and_never_missing(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    api.habits, api.late_output = {"late-output"}, 10_000
    content = write_requests("a1", "a2")
    time = FakeTime()
    assert run(time=time) == 1
    assert 600 <= time.now < 640
    assert "has completed 2 requests, but has no output file after 10 minutes; run the same command again later" in (
        capsys.readouterr().err
    )
    api.late_output = 0
    assert run() == 0
    assert_paid_once(api, content)


# ---- files ----


def test_out_to_stdout(api: FaultyAPI, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    first, second = write_requests("a1", "a2").splitlines()
    assert run(out="-") == 0
    out, err = capfdbinary.readouterr()
    assert out == served(api)[sha256_of(first)] + served(api)[sha256_of(second)]
    assert b"Batch ID: batch_" in err


@pytest.mark.parametrize("out", ["folder", "folder/there/results.jsonl", "file/results.jsonl"])
def test_an_out_that_cannot_be_written_is_known_before_anything_is_paid_for(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    Path("folder/there/results.jsonl").mkdir(parents=True)
    Path("file").touch()
    write_requests("a1")
    assert run(out=out) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"batch_tool.py: error: cannot write {out}: ")
    assert api.exchanges == []


def test_folders_are_made_for_out(api: FaultyAPI) -> None:
    write_requests("a1")
    assert run(out="new/folder/results.jsonl") == 0
    assert [Path("new/folder/results.jsonl").read_bytes()] == [*served(api).values()]


def test_requests_from_stdin(api: FaultyAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    api.outcomes = {"a2": ["500", "200"]}
    content = write_requests("a1", "a2")
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    with open(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert run(source="-") == 0
    assert sent(api) == [["a1", "a2"], ["a2"]]
    assert {(batch.metadata or {})["input_file"] for batch in api.batches.values()} == {"stdin"}
    assert_out(api)


def test_bytes_of_results_are_kept(api: FaultyAPI) -> None:
    line = jsonl(success("a1")).replace(b'"output"', '"x": ["\u2028\x85 é \\u00e9", 1.50, 1e400], "output"'.encode())
    content = write_requests("a1")
    batch = batch_of_a_run(api, "completed", content)
    batch.output_file_id = api.new_file(line, "batch_output", "output.jsonl").id
    batch.request_counts = {"completed": 1, "failed": 0, "total": 1}
    assert run() == 0
    assert OUT.read_bytes() == with_sha256(line, sha256_of(content))


def test_lines_of_a_results_file_that_are_not_ours_are_named(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str]
) -> None:
    content = write_requests("a1")
    batch = batch_of_a_run(api, "completed", content)
    output = b"not json\n" + jsonl(success("b1"), success("a1"))
    batch.output_file_id = api.new_file(output, "batch_output", "output.jsonl").id
    batch.request_counts = {"completed": 1, "failed": 0, "total": 1}
    assert run() == 0
    assert OUT.read_bytes() == with_sha256(jsonl(success("a1")), sha256_of(content)) + jsonl(success("b1"))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [
        f"batch_tool.py: warning: 1 line of the results of batch {batch.id} cannot be read",
        f"batch_tool.py: warning: 1 result of batch {batch.id} has a custom_id that its input file does not have",
    ]


# ---- the queue, as a table ----


def queued(*sizes: int) -> list[batch_tool.QueuedPart]:
    """Parts of so many requests of a file."""
    lines = [jsonl(request(f"q{number}")) for number in range(sum(sizes))]
    Path("queue.jsonl").write_bytes(b"".join(lines))
    source = batch_tool.Input(Path("queue.jsonl").open("rb"), "queue.jsonl")
    parts, first = [], 0
    for number, size in enumerate(sizes, 1):
        content = b"".join(lines[first : first + size])
        offset = sum(map(len, lines[:first]))
        part = batch_tool.Part(f"{number}/{len(sizes)}", offset, len(content), first, size, sha256_of(content))
        parts.append(batch_tool.QueuedPart(source, part, range(first, first + size)))
        first += size
    return parts


def taken(queue: batch_tool.Queue) -> list[batch_tool.QueuedPart]:
    return list(iter(queue.take, None))


def labels(parts: Iterable[batch_tool.QueuedPart]) -> list[str]:
    return [each.part.label for each in parts]


# each step: (numbers of the taken parts that are refused, how many ended, idle) -> (idle refusals, what may go next)
Step = tuple[tuple[int, ...], int, bool, int, list[str]]
QUEUE_TABLE: dict[str, tuple[tuple[int, ...], list[Step]]] = {
    "no limit": ((1, 1, 1), [((), 3, True, 0, [])]),
    "one refused while others run waits for an end": (
        (1, 1), [((1,), 0, False, 0, []), ((), 0, False, 0, []), ((), 1, True, 0, ["2/2"])],
    ),
    "an end in the same look makes room at once": ((1, 1), [((1,), 1, True, 0, ["2/2"])]),
    "two refused come back in order one by one": (
        (1, 1, 1), [((1, 2), 0, False, 0, []), ((), 1, False, 0, ["2/3"]), ((), 1, True, 0, ["3/3"])],
    ),
    "with nothing active one of them is tried": ((1, 1), [((0, 1), 0, True, 1, ["1/2"]), ((0,), 0, True, 2, ["1/2"])]),
    "refused twice with nothing active it is halved": (
        (4,), [((0,), 0, True, 1, ["1/1"]), ((0,), 0, True, 2, ["1/1.1"]), ((0,), 0, True, 3, ["1/1.1"])],
    ),
    "an end begins the count anew": (
        (1, 1), [((0, 1), 0, True, 1, ["1/2"]), ((), 1, True, 0, ["2/2"]), ((0,), 0, True, 1, ["2/2"])],
    ),
}


@pytest.mark.parametrize("case", QUEUE_TABLE)
def test_the_queue_by_a_table(case: str) -> None:
    sizes, steps = QUEUE_TABLE[case]
    queue = batch_tool.Queue(queued(*sizes))
    under_way = taken(queue)
    assert labels(under_way) == [f"{number}/{len(sizes)}" for number in range(1, len(sizes) + 1)]
    for refusals, ended, is_idle, idle_refusals, next_labels in steps:
        back = [under_way[number] for number in refusals]
        assert queue.settle(back, ended, is_idle=is_idle) == idle_refusals
        under_way = taken(queue) if next_labels else under_way
        assert labels(under_way if next_labels else taken(queue)) == next_labels


def test_the_halves_of_a_part_are_its_lines() -> None:
    (whole,) = queued(5)
    (again,) = whole.after_idle_refusal()
    assert again == whole._replace(idle_refusals=1)
    halves = again.after_idle_refusal()
    content = Path("queue.jsonl").read_bytes()
    assert [(half.part.label, half.part.first, half.part.requests, [*half.positions]) for half in halves] == [
        ("1/1.1", 0, 3, [0, 1, 2]), ("1/1.2", 3, 2, [3, 4]),
    ]
    pieces = [content[half.part.offset : half.part.offset + half.part.size] for half in halves]
    assert b"".join(pieces) == content
    assert [half.part.sha256 for half in halves] == [hashlib.sha256(piece).hexdigest() for piece in pieces]


def test_a_part_of_one_request_is_given_up_after_five_refusals() -> None:
    (part,) = queued(1)
    queue = batch_tool.Queue([part])
    for number in range(1, 5):
        (part,) = taken(queue)
        assert queue.settle([part], 0, is_idle=True) == number
    (part,) = taken(queue)
    with pytest.raises(batch_tool.CommandError, match="was refused 5 times for the token limit"):
        queue.settle([part], 0, is_idle=True)


# ---- any sequence ----

SEEDS = range(8)
SEEDS_AT_ONCE = range(4)


def random_edit(chance: random.Random, requests: list[Any], number: int) -> None:
    """Add, change, remove or sort rows."""
    kind = chance.randrange(5)
    if kind == 0:
        requests.insert(chance.randrange(len(requests) + 1), request(f"b{number}"))
    elif kind == 1:
        at = chance.randrange(len(requests))
        requests[at] = with_prompt(requests[at]["custom_id"], f"Prompt {chance.randrange(2)}")
    elif kind == 2 and len(requests) > 3:
        requests.pop(chance.randrange(len(requests)))
    elif kind == 3:
        chance.shuffle(requests)


def random_faults(chance: random.Random) -> list[Fault]:
    kinds = [
        Fault("POST", "/batches$", skip=chance.randrange(3), when=chance.choice(["before", "after"]), action="reset"),
        Fault("POST", "/batches$", skip=chance.randrange(3), when="later", status=504),
        Fault("POST", "/batches$", skip=chance.randrange(3), status=429, headers={"retry-after": "30"}),
        Fault("POST", "/files$", skip=chance.randrange(3), status=503, times=3),
        Fault("GET", "/content$", skip=chance.randrange(3), action="cut"),
        Fault("GET", "/batches$", skip=chance.randrange(5), status=500, times=2),
    ]
    return chance.sample(kinds, chance.randrange(3))


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_each_request_is_paid_for_once(api: FaultyAPI, seed: int) -> None:
    """Killed at any moment, with a late listing, lost POSTs, flaky rows, a small queue, other parts, and edits."""
    chance = random.Random(seed)
    api.list_delay, api.step = chance.choice([0, 5, 10]), chance.choice([1, 20, 60])
    api.queue_limit = chance.choice([None, 3, 6])
    api.habits = {chance.choice(["short-endpoint", "both-files", "no-bytes", "late-output", "no-metadata"])}
    requests = [request(custom_id) for custom_id in numbered(chance.randrange(3, 9))]
    api.outcomes = {each["custom_id"]: [chance.choice(RETRYABLE), "200"] for each in requests if chance.random() < 0.3}
    time = live_in(api, FakeTime())
    edit(*requests)
    was_elsewhere = False
    for number in range(chance.randrange(2, 5)):
        is_elsewhere = number > 0 and "no-metadata" not in api.habits and chance.random() < 0.2
        if is_elsewhere or was_elsewhere:  # two machines must be further apart than POSTs and the listing are late
            api.carry_out()
            time.sleep(15)
        was_elsewhere = is_elsewhere
        api.faults = random_faults(chance)
        killed_after = chance.uniform(0, chance.choice([5, 500]))
        time.at = {time.now + chance.uniform(0, 60): api.carry_out, time.now + killed_after: kill}
        options = ("--max-requests", str(chance.randrange(1, 6)))
        with contextlib.suppress(Killed):
            if number == 0 and chance.random() < 0.4:  # later on the file may be another version, which it does not see
                create(*options, time=time)
            elif is_elsewhere:
                with another_machine():
                    run(*options, time=time)
            else:
                run(*options, time=time)
        time.at = {moment: action for moment, action in time.at.items() if action != kill}
        time.naps.clear()
        if chance.random() < 0.5:
            random_edit(chance, requests, number)
            edit(*requests)
    api.faults, api.queue_limit = [], api.queue_limit and 3
    api.carry_out()
    time.sleep(15)
    for _ in range(3):
        time.naps.clear()
        if run("--max-requests", "3", time=time) == 0:
            break
    time.sleep(1000)
    assert_out_is_complete()
    assert_paid_once(api, REQUESTS.read_bytes())


def random_start(chance: random.Random, api: FaultyAPI) -> tuple[list[Any], FakeTime]:
    """A server of random speed, queue and flaky rows, and three to eight requests in the request file."""
    api.step, api.queue_limit = chance.choice([1, 20, 60]), chance.choice([None, 3, 6])
    requests = [request(custom_id) for custom_id in numbered(chance.randrange(3, 9))]
    api.outcomes = {each["custom_id"]: [chance.choice(RETRYABLE), "200"] for each in requests if chance.random() < 0.3}
    edit(*requests)
    return requests, live_in(api, FakeTime())


@pytest.mark.parametrize("seed", SEEDS_AT_ONCE)
def test_whatever_others_do_meanwhile_each_request_is_paid_for_once(api: FaultyAPI, seed: int) -> None:
    """Another machine, or a run of an edited file, at work at the same time, with a listing that is whole."""
    chance = random.Random(seed)
    requests, time = random_start(chance, api)

    def meanwhile() -> None:
        before, time.at = time.at, {time.now + chance.uniform(0, 300): kill}
        random_edit(chance, requests, len(before))
        with contextlib.suppress(Killed), contextlib.ExitStack() as stack:
            if chance.random() < 0.5:
                stack.enter_context(another_machine())
            edit(*requests)
            run("--max-requests", str(chance.randrange(1, 6)), out="other.jsonl", time=time)
        time.at = {moment: action for moment, action in before.items() if moment > time.now}

    time.at = {chance.uniform(0, 200): meanwhile, chance.uniform(200, 500): meanwhile}
    run("--max-requests", str(chance.randrange(1, 6)), time=time)
    time.at, api.queue_limit = {}, api.queue_limit and 3
    for _ in range(3):
        time.naps.clear()
        if run("--max-requests", "3", time=time) == 0:
            break
    assert_out_is_complete()
    assert_paid_once(api, REQUESTS.read_bytes())


def assert_out_is_complete() -> None:
    """--out begins with a success of each request."""
    rows = [json.loads(line) for line in OUT.read_bytes().splitlines()]
    wanted = [sha256_of(line) for line in REQUESTS.read_bytes().splitlines()]
    assert [row["request_sha256"] for row in rows][: len(wanted)] == wanted
    assert {row["response"]["status_code"] for row in rows} == {200}
    assert custom_ids(OUT.read_bytes())[: len(wanted)] == custom_ids(REQUESTS.read_bytes())


@pytest.mark.parametrize("seed", SEEDS_AT_ONCE)
def test_whatever_is_lost_at_the_server_nothing_is_paid_for_twice(api: FaultyAPI, seed: int) -> None:
    """Output files disappear at any moment, between kills, edits and other parts. What is left ends up in --out."""
    chance = random.Random(seed)
    requests, time = random_start(chance, api)

    def lose() -> None:
        there = [batch.output_file_id for batch in api.batches.values() if batch.output_file_id in api.files]
        if there:
            del api.files[chance.choice(there) or ""]

    for number in range(4):
        time.at = {time.now + chance.uniform(0, 200): lose, time.now + chance.uniform(0, 400): lose}
        if chance.random() < 0.5:
            time.at[time.now + chance.uniform(0, 300)] = kill
        with contextlib.suppress(Killed):
            run("--max-requests", str(chance.randrange(1, 6)), time=time)
        time.at, time.naps = {}, []
        if chance.random() < 0.3:
            random_edit(chance, requests, number)
            edit(*requests)
    api.queue_limit = api.queue_limit and 3
    run("--max-requests", "3", time=time)
    assert not [sha256 for sha256, times in api.paid.items() if times > 1], "paid twice"
    written = OUT.read_bytes() if OUT.exists() else b""
    wanted = {sha256_of(line) for line in REQUESTS.read_bytes().splitlines()}
    left = [line for sha256, line in served(api).items() if sha256 in wanted and b'"status": "completed"' in line]
    assert all(line in written for line in left), "lost"
