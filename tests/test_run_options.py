"""`batch_tool.py run`: what it says it will send, what it asks, and what keeps it from sending."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time as real_time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import (
    OUT,
    REQUESTS,
    FakeTime,
    batch_of_a_run,
    custom_ids,
    error,
    expired,
    jsonl,
    main,
    nothing,
    numbered,
    posts,
    refused,
    release,
    request,
    run,
    sent,
    sha256_of,
    success,
    with_sha256,
    write_requests,
)
from faulty_api import FaultyAPI

Capture = pytest.CaptureFixture[str]


def known(line: bytes, result: dict[str, Any]) -> bytes:
    """A results line of this request, as run writes it."""
    return with_sha256(jsonl(result), sha256_of(line))


def changed(custom_id: str) -> dict[str, Any]:
    return request(custom_id, body={"model": "gpt-6-luna", "input": "Another prompt"})


def every_kind() -> list[bytes]:
    """Requests with, in --out: a bio, an outdated bio, a failure, a rejection; a new one; and a result that is gone."""
    lines = write_requests("bio", "old", "failed", "rejected", "new").splitlines(keepends=True)
    OUT.write_bytes(
        known(lines[0], success("bio"))
        + known(jsonl(changed("old")), success("old"))
        + known(lines[2], refused("failed"))
        + known(lines[3], refused("rejected", 400, "bad_request"))
        + known(jsonl(request("007")), success("007"))
    )
    return lines


GONE = "; 1 result of requests that are no longer in the file"
LINES: dict[tuple[str, ...], tuple[str, str]] = {
    (): ("3 of 5 requests to send: 1 new, 1 changed, 1 to try again; 1 has a bio, 1 was rejected", "new old failed"),
    ("--include-rejected",): (
        "4 of 5 requests to send: 1 new, 1 changed, 1 to try again, 1 rejected; 1 has a bio", "old failed rejected new"
    ),
    ("--force",): (
        "5 of 5 requests to send: 1 new, 1 changed, 1 to try again, 1 rejected, 1 forced",
        "bio old failed rejected new",
    ),
}


@pytest.mark.parametrize("options", LINES, ids=" ".join)
def test_what_will_be_sent_and_why(api: FaultyAPI, capsys: Capture, options: tuple[str, ...]) -> None:
    line, wanted = LINES[options]
    every_kind()
    before = OUT.read_bytes()
    assert run("--dry-run", *options) == 0
    assert capsys.readouterr().err.splitlines()[0] == line + GONE
    assert (OUT.read_bytes(), api.exchanges) == (before, [])
    assert run(*options) == (0 if options else 1)
    assert capsys.readouterr().err.splitlines()[0] == line + GONE
    assert [set(ids) for ids in sent(api)] == [set(wanted.split())]
    assert custom_ids(OUT.read_bytes()) == ["bio", "old", "failed", "rejected", "new", "old", "007"]


def test_requests_in_earlier_batches_are_counted_by_themselves(api: FaultyAPI, capsys: Capture) -> None:
    content = write_requests(*numbered(4))
    batch = batch_of_a_run(api, "in_progress", jsonl(*map(request, ["a1", "a2"])))
    output = api.new_file(jsonl(success("a1"), success("a2")), "batch_output", "output.jsonl")
    OUT.write_bytes(known(content.splitlines()[2], success("a3")))

    def complete() -> None:
        batch.status, batch.output_file_id = "completed", output.id

    assert run("--prices", "1000,2000", time=FakeTime(complete)) == 0
    err = capsys.readouterr().err
    assert "\n1 of 4 requests to send: 1 new; 1 has a bio, 2 in earlier batches\n" in err
    tokens = [(12, 4), (12, 4), *((usage["input_tokens"], usage["output_tokens"]) for usage in usages(api))]
    total = [sum(each) for each in zip(*tokens, strict=True)]
    dollars = (total[0] * 1000 + total[1] * 2000) / 1e6
    assert err.splitlines()[-1] == (
        f"new in this run: 3 results, 2 of them from earlier batches; tokens: {total[0]} input, {total[1]} output; "
        f"about ${dollars:.2f}"
    )


def test_results_that_are_known_already_are_not_new(api: FaultyAPI, capsys: Capture) -> None:
    lines = write_requests("a1", "a2").splitlines()
    batch_of_a_run(api, "completed", REQUESTS.read_bytes(), done=["a1", "a2"])
    OUT.write_bytes(known(lines[0], success("a1")))
    assert run("--prices", "1000,1000") == 0
    assert capsys.readouterr().err.splitlines()[-1] == (
        "new in this run: 1 result, 1 of them from earlier batches; tokens: 12 input, 4 output; about $0.02"
    )
    assert run("--force") == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("new in this run: 2 results; tokens: 240 input, ")


def usages(api: FaultyAPI) -> list[dict[str, int]]:
    """The usage of each answer of the batches that the server has run itself."""
    lines = [line for batch in api.batches.values() if not batch.frozen and batch.output_file_id
             for line in api.read_file(batch.output_file_id).splitlines()]
    return [json.loads(line)["response"]["body"]["usage"] for line in lines]


def test_large_numbers_have_commas(api: FaultyAPI, capsys: Capture) -> None:
    content = write_requests(*numbered(1200))
    OUT.write_bytes(b"".join(known(line, success(f"a{number}"))
                             for number, line in enumerate(content.splitlines()[:1100], 1)))
    assert run("--dry-run") == 0
    assert capsys.readouterr().err.startswith("100 of 1,200 requests to send: 100 new; 1,100 have a bio\n")


# ---- --dry-run ----


def test_a_dry_run_needs_no_key_no_server_and_no_lock(
    api: FaultyAPI, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_requests("a1", "a2")
    api.hold = "in_progress"
    codes: list[int] = []

    def meanwhile() -> None:
        with monkeypatch.context() as patch:
            patch.delenv("OPENAI_API_KEY")
            patch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
            patch.setenv("XDG_STATE_HOME", "/proc/none")
            codes.append(run("--dry-run"))

    assert run(time=FakeTime(meanwhile, release(api))) == 0
    assert codes == [0]
    monkeypatch.delenv("OPENAI_API_KEY")
    capsys.readouterr()
    assert run("--dry-run") == 0
    assert capsys.readouterr() == ("", "0 of 2 requests to send; 2 have a bio\n")


def test_a_dry_run_writes_nothing(api: FaultyAPI, capsys: Capture) -> None:
    write_requests("a1")
    assert run("--dry-run", "--prices", "1,2") == 0
    assert capsys.readouterr() == (
        "", "1 of 1 request to send: 1 new\n"
        "no answer so far says how many tokens it took; the command preview estimates them\n"
    )
    assert os.listdir() == ["requests.jsonl"]
    assert run("--dry-run", out="-") == 0
    assert capsys.readouterr().out == ""


def test_a_dry_run_judges_by_the_answers_that_are_there(work: Path, capsys: Capture) -> None:
    lines = write_requests(*numbered(4)).splitlines()
    OUT.write_bytes(known(lines[0], success("a1")))
    takes = "3 requests: about 36 input and 12 (12 to 12) output tokens, by 1 answer"
    for prices, cost in ((), ""), (("--prices", "1000,10000"), "; about $0.16, or $52.00 per 1,000 requests"):
        assert run("--dry-run", *prices) == 0
        assert capsys.readouterr().err.splitlines()[1:] == [takes + cost]


def test_a_dry_run_judges_a_new_prompt_by_the_mean_of_the_answers_to_the_old_one(capsys: Capture, work: Path) -> None:
    write_requests("a1", "a2", "a3")
    for path, options in (Path("old.jsonl"), ["--results", "old.jsonl"]), (OUT, []):
        path.write_bytes(b"".join(known(b"gone", success(each)) for each in ["a1", "a2"]))
        assert run("--dry-run", *options) == 0
        assert capsys.readouterr().err == (
            "3 of 3 requests to send: 1 new, 2 changed\n"
            "3 requests: about 36 input and 12 (12 to 12) output tokens, by 2 answers\n"
        )


def test_a_dry_run_of_a_bad_file_or_over_a_bad_out_is_an_error(work: Path, capsys: Capture) -> None:
    REQUESTS.write_bytes(jsonl(request("a1"), request("a1")))
    assert run("--dry-run") == 1
    write_requests("a1")
    OUT.write_bytes(b"artist_id,bio\n")
    assert run("--dry-run") == 1
    assert OUT.read_bytes() == b"artist_id,bio\n"
    assert capsys.readouterr().err.count("error: ") == 2


def test_a_dry_run_makes_no_folder(work: Path) -> None:
    write_requests("a1")
    assert run("--dry-run", out="new/folder/results.jsonl") == 0
    assert os.listdir() == ["requests.jsonl"]


# ---- --max-new ----


def test_more_than_max_new_sends_nothing_and_leaves_out_alone(api: FaultyAPI, capsys: Capture) -> None:
    lines = write_requests(*numbered(4)).splitlines()
    for has_out in (False, True):
        if has_out:
            OUT.write_bytes(known(lines[0], success("a1")))
        before = OUT.read_bytes() if has_out else None
        number = 3 if has_out else 4
        for options in ([], ["--dry-run"]):
            assert run("--max-new", "2", *options) == 1
            assert capsys.readouterr().err.splitlines()[-1] + "\n" == error(
                f"{number} requests to send, more than --max-new 2, so nothing is sent"
            )
            assert (OUT.read_bytes() if OUT.exists() else None) == before
    assert posts(api, "/v1/files") == 0
    assert run("--max-new", "3") == 0
    assert run("--max-new", "1") == 0


def test_max_new_counts_what_earlier_batches_do_not_have(api: FaultyAPI) -> None:
    batch_of_a_run(api, "completed", jsonl(*map(request, ["a1", "a2"])), done=["a1", "a2"])
    write_requests(*numbered(3))
    assert run("--max-new", "1") == 0
    assert sent(api)[1:] == [["a3"]]


def test_what_earlier_batches_have_is_written_although_nothing_is_sent(api: FaultyAPI, capsys: Capture) -> None:
    batch = batch_of_a_run(api, "in_progress", jsonl(*map(request, ["a1", "a2"])))
    output = api.new_file(jsonl(success("a1"), success("a2")), "batch_output", "output.jsonl")

    def complete() -> None:
        batch.status, batch.output_file_id = "completed", output.id

    write_requests(*numbered(5))
    assert run("--max-new", "2", time=FakeTime(complete)) == 1
    err = capsys.readouterr().err
    assert "3 of 5 requests to send: 3 new; 2 in earlier batches\n" in err
    assert "3 requests to send, more than --max-new 2, so nothing is sent\n" in err
    assert (posts(api), custom_ids(OUT.read_bytes())) == (0, numbered(5))
    assert OUT.read_bytes().count(b'"status_code": 200') == 2


def test_max_new_holds_for_each_round(api: FaultyAPI, capsys: Capture) -> None:
    """A batch that expires with nothing done leaves more to send than the guard allows."""
    batch = batch_of_a_run(api, "in_progress", jsonl(*map(request, ["a1", "a2"])))
    errors = api.new_file(jsonl(expired("a1"), expired("a2")), "batch_output", "errors.jsonl")

    def expire() -> None:
        batch.status, batch.error_file_id = "expired", errors.id

    write_requests(*numbered(3))
    api.outcomes = {"a3": ["500", "200"]}
    assert run("--max-new", "1", time=FakeTime(expire)) == 1
    assert sent(api)[1:] == [["a3"]]
    assert "warning: 3 requests to send, more than --max-new 1, so nothing is sent\n" in capsys.readouterr().err
    assert len(OUT.read_bytes().splitlines()) == 3


# ---- --include-rejected ----


def test_rejected_requests_are_sent_again_if_that_is_asked_for(api: FaultyAPI) -> None:
    api.outcomes = {"a1": ["400", "400", "200"]}
    write_requests("a1", "a2")
    assert [run(), run(), run("--include-rejected"), run("--include-rejected"), run("--include-rejected")] == [
        1, 1, 1, 0, 0,
    ]
    assert sent(api) == [["a1", "a2"], ["a1"], ["a1"]]


def test_a_rejection_of_an_earlier_batch_is_sent_again_once_it_is_known(api: FaultyAPI) -> None:
    """An out that is gone: the earlier batch tells what was rejected; only the next run sends that again."""
    api.outcomes = {"a1": ["400", "200"]}
    write_requests("a1", "a2")
    assert run() == 1
    OUT.unlink()
    assert run("--include-rejected") == 1
    assert run("--include-rejected") == 0
    assert sent(api) == [["a1", "a2"], ["a1"]]


def test_a_rejection_that_comes_while_it_waits_is_the_answer(api: FaultyAPI) -> None:
    """A run with --include-rejected was interrupted: its batch has the request, and rejects it once more."""
    lines = write_requests("a1", "a2").splitlines()
    before = known(lines[0], refused("a1", 400, "bad_request")) + known(lines[1], success("a2"))
    OUT.write_bytes(before)
    batch = batch_of_a_run(api, "in_progress", jsonl(request("a1")))
    errors = api.new_file(jsonl(refused("a1", 400, "again")), "batch_output", "x")

    def complete() -> None:
        batch.status, batch.error_file_id = "completed", errors.id

    assert run("--include-rejected", time=FakeTime(complete)) == 1
    assert (posts(api), OUT.read_bytes()) == (0, before)
    assert run("--include-rejected") == 0
    assert sent(api)[1:] == [["a1"]]


def test_a_rejection_stays_although_an_earlier_batch_has_a_failure_of_the_request(api: FaultyAPI) -> None:
    api.outcomes = {"a1": ["500", "400", "200"], "a2": ["500", "500", "200"]}
    write_requests("a1", "a2", "a3")
    assert run("--attempts", "2") == 1
    before = OUT.read_bytes().splitlines()[0]
    assert run() == 1
    assert sent(api) == [["a1", "a2", "a3"], ["a1", "a2"], ["a2"]]
    assert OUT.read_bytes().splitlines()[0] == before


# ---- while it waits ----


def test_who_waits_is_told_until_when_and_how_long_it_has_been(api: FaultyAPI, capsys: Capture) -> None:
    """The time is counted from the oldest batch, and the end is that of the batch that may take longest."""
    api.hold = "in_progress"
    moment = api.now()
    content = write_requests(*numbered(3))
    older = {"created_at": moment - 7200, "expires_at": moment + 7200}
    batch = batch_of_a_run(api, "in_progress", jsonl(*map(request, ["a1", "a2"])), **older)
    batch.status = "in_progress"

    def complete() -> None:
        batch.status, api.hold = "completed", None
        batch.output_file_id = api.new_file(jsonl(success("a1"), success("a2")), "batch_output", "x").id

    assert run(time=FakeTime(nothing, complete)) == 0
    err = capsys.readouterr().err
    (until,) = re.findall("the service may take until (.*?); you may close this window: the same command goes on", err)
    assert abs(real_time.mktime(real_time.strptime(until, "%Y-%m-%d %H:%M:%S")) - (moment + 24 * 3600)) < 60
    assert re.findall(r"(\d:\d\d):\d\d elapsed", err) == ["2:00"] * 3
    assert err.index("1 of 3 requests to send") < err.index("everything is submitted") < err.index("elapsed")
    assert len(content.splitlines()) == 3


def test_an_error_that_a_later_round_has_mended_is_no_example(api: FaultyAPI, capsys: Capture) -> None:
    errors = [expired("a1") | {"error": {"code": "server_error", "message": "mended"}}]
    batch = batch_of_a_run(api, "completed", write_requests("a1", "a2", "a3"), done=["a3"])
    batch.error_file_id = api.new_file(jsonl(*errors), "batch_output", "x").id
    api.outcomes = {"a2": "500"}
    assert run() == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("most common errors: ")]
    assert line.startswith("most common errors: 1 × server_error: Internal Server Error, as the ")
    assert ("mended" in line, line.count("×")) == (False, 1)


def test_ctrl_c_names_every_batch_in_the_command_that_cancels_them(api: FaultyAPI, capsys: Capture) -> None:
    api.hold = "in_progress"
    write_requests("a1", "a2")
    assert run("--max-requests", "1", time=FakeTime(lambda: signal.raise_signal(signal.SIGINT))) == 130
    command = f"batch_tool.py cancel --batch-id {' '.join(api.batches)}"
    assert (
        "no output was written; the same command goes on where this one stopped; the batches go on at the server and "
        f"will be charged; to stop them: {command}\n"
    ) in capsys.readouterr().err
    assert main(*command.split()[1:]) == 0
    assert {batch.status for batch in api.batches.values()} <= {"cancelling", "cancelled"}


# ---- --ask ----


class Terminal:
    """A pseudo-terminal as stdin and stderr. `when` says what to do once a question is shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, when_asked: Callable[[int], object]) -> None:
        self.ours, theirs = os.openpty()
        monkeypatch.setattr(sys, "stdin", os.fdopen(theirs, closefd=False))
        monkeypatch.setattr(sys, "stderr", os.fdopen(theirs, "w"))
        self.shown = ""
        self._when_asked = when_asked
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):  # nobody can write any more
            while chunk := os.read(self.ours, 10_000):
                is_new = "[Y/n]" not in self.shown
                self.shown += chunk.decode()
                if is_new and "[Y/n]" in self.shown:
                    self._when_asked(self.ours)

    def close(self) -> str:
        sys.stderr.close()
        self._thread.join()
        os.close(self.ours)
        return self.shown


def typing(text: bytes) -> Callable[[int], object]:
    return lambda terminal: os.write(terminal, text)


ANSWERS = {b"\n": 0, b" YES \n": 0, b"n\n": 1, b"what?\n": 1, b"\x04": 1}


@pytest.mark.parametrize("answer", ANSWERS)
def test_it_asks_before_it_sends(api: FaultyAPI, monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    lines = write_requests(*numbered(3)).splitlines()
    before = known(lines[0], success("a1"))
    OUT.write_bytes(before)
    terminal = Terminal(monkeypatch, typing(answer))
    assert run("--ask", "--prices", "10000,100000") == ANSWERS[answer]
    shown = terminal.close()
    assert "2 of 3 requests to send: 2 new; 1 has a bio\r\n" in shown
    assert re.search(r"\r\n2 requests: about 24 input .*; about \$1\.04.*\r\n\rSend 2 requests\? \[Y/n\] ", shown)
    if ANSWERS[answer]:
        assert shown.endswith("batch_tool.py: error: nothing was sent\r\n")
        assert (OUT.read_bytes(), posts(api, "/v1/files")) == (before, 0)
    else:
        assert sent(api) == [["a2", "a3"]]


def test_ctrl_c_at_the_question_sends_nothing(api: FaultyAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    write_requests("a1")
    terminal = Terminal(monkeypatch, lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert run("--ask") == 130
    assert "will be charged" not in terminal.close()
    assert (OUT.exists(), posts(api, "/v1/files")) == (False, 0)


def test_it_asks_once_and_not_where_nothing_is_sent(api: FaultyAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    api.outcomes = {"a1": ["500", "200"]}
    write_requests("a1", "a2")
    terminal = Terminal(monkeypatch, typing(b"\n"))
    assert [run("--ask"), run("--ask"), run("--ask", "--dry-run")] == [0, 0, 0]
    assert terminal.close().count("[Y/n]") == 1
    batch_of_a_run(api, "completed", jsonl(request("a3")), done=["a3"])
    write_requests("a1", "a2", "a3")
    terminal = Terminal(monkeypatch, typing(b"n\n"))
    assert run("--ask") == 0
    assert "[Y/n]" not in terminal.close()


def test_without_a_terminal_it_does_not_ask(api: FaultyAPI, capsys: Capture) -> None:
    write_requests("a1")
    assert run("--ask") == 0
    assert "[Y/n]" not in capsys.readouterr().err


def test_an_ended_batch_that_brings_nothing_is_not_spoken_of(api: FaultyAPI, capsys: Capture) -> None:
    api.outcomes = {"a2": "500"}
    write_requests("a1", "a2")
    assert run("--attempts", "1") == 1
    capsys.readouterr()
    assert run("--attempts", "1") == 1
    err = capsys.readouterr().err
    assert err.startswith("1 of 2 requests to send: 1 to try again; 1 has a bio\n")
    assert "already has" not in err


def test_max_new_of_none_only_collects(api: FaultyAPI) -> None:
    batch_of_a_run(api, "completed", write_requests("a1", "a2"), done=["a1"], left=["a2"])
    assert run("--max-new", "0") == 1
    assert custom_ids(OUT.read_bytes()) == ["a1", "a2"]
    assert posts(api) == 0
