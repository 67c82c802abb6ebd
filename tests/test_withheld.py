"""`batch_tool.py run`: what was answered is not paid again. What beats what; unreadable lines; what is withheld."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import (
    OUT,
    REQUESTS,
    Capture,
    FakeTime,
    assert_out,
    assert_paid_once,
    batch_of_a_run,
    bios,
    create,
    custom_ids,
    done_batch,
    edit,
    jsonl,
    main,
    missing_line,
    nothing,
    numbered,
    posts,
    refused,
    replace,
    request,
    run,
    sent,
    sha256_of,
    success,
    times_paid,
    with_sha256,
    write_requests,
)
from faulty_api import Fault, FaultyAPI

WAYS_ON = (
    "not sent again; name an earlier download with --results, or write them to a file with retry and run that file "
    "into the same --out, or use --force, which sends all requests of the file again\n"
)


def lines_of(path: Path = OUT) -> dict[str, bytes]:
    """The lines of a results file by custom_id."""
    lines = path.read_bytes().splitlines(keepends=True)
    return dict(zip(custom_ids(b"".join(lines)), lines, strict=True))


def kinds() -> dict[str, str]:
    """What --out has for each request: ok, or the code of its error."""
    found = {}
    for custom_id, line in lines_of().items():
        content = json.loads(line)
        failure = content["error"] or content["response"]["body"].get("error")
        found[custom_id] = failure["code"] if failure else "ok"
    return found


# ---- what beats what ----


def test_bios_that_were_redone_stay_when_an_earlier_batch_is_picked_up(api: FaultyAPI) -> None:
    api.outcomes = {"a2": ["500", "500", "200"], "gone": "400"}
    write_requests(*numbered(3), "gone")
    assert run("--attempts", "1") == 1
    first = lines_of()
    write_requests("a1", "a3", path="redo.jsonl")
    assert run("--force", source="redo.jsonl") == 0
    redone = lines_of()
    assert list(redone) == ["a1", "a3", "gone"], "the failure of a2 is no answer"
    assert (redone["gone"], redone["a1"] != first["a1"], redone["a3"] != first["a3"]) == (first["gone"], True, True)
    replace(jsonl(*map(request, [*numbered(4)])))
    assert run() == 0
    assert sent(api)[2:] == [["a2", "a4"], ["a2"]]
    assert list(lines_of()) == [*numbered(4), "gone"]
    assert {each: lines_of()[each] for each in redone} == redone


def test_a_success_of_an_earlier_batch_beats_a_rejection(api: FaultyAPI) -> None:
    lines = write_requests("a1", "a2").splitlines()
    batch_of_a_run(api, "completed", REQUESTS.read_bytes(), done=["a1", "a2"])
    OUT.write_bytes(with_sha256(jsonl(refused("a1", 400, "bad_request")), sha256_of(lines[0])))
    assert run() == 0
    assert (posts(api), kinds()) == (0, {"a1": "ok", "a2": "ok"})


# ---- lines that cannot be read ----


@pytest.mark.parametrize("outcome", ["cut", "no_utf8"])
def test_an_unreadable_line_is_kept_and_not_paid_for_again(api: FaultyAPI, capsys: Capture, outcome: str) -> None:
    api.outcomes = {"a2": [outcome, "200"]}
    content = write_requests(*numbered(3))
    assert run() == 1
    assert "1 × unreadable: " in capsys.readouterr().err
    (batch,) = api.batches.values()
    theirs = api.read_file(batch.output_file_id or "").splitlines()
    (raw,) = (line for line in theirs if b'"a2"' in line)
    before = lines_of()
    line = json.loads(before["a2"])
    kept, message = line["error"].pop("line"), line["error"].pop("message")
    assert line == {"id": None, "custom_id": "a2", "response": None, "error": {"code": "unreadable"},
                    "request_sha256": sha256_of(content.splitlines()[1])}
    assert (kept.encode("utf-8", "replace")[:40], bool(message)) == (raw[:40], True)
    assert run() == 1
    assert (lines_of(), len(api.batches)) == (before, 1)
    write_requests(*numbered(4))
    assert run() == 1
    assert (lines_of()["a2"], sent(api)[1:]) == (before["a2"], [["a4"]])
    assert run("--include-rejected") == 0
    assert sent(api)[2:] == [["a2"]]
    assert times_paid(api) == [1, 1, 1, 2]


def test_an_unreadable_line_in_out_itself_is_an_error(api: FaultyAPI, capsys: Capture) -> None:
    write_requests("a1", "a2")
    content = jsonl(success("a1")) + jsonl(success("a2"))[:-30] + b"\n"
    OUT.write_bytes(content)
    assert run() == 1
    assert "error: results.jsonl holds something other than results (line 2: " in capsys.readouterr().err
    assert (OUT.read_bytes(), api.exchanges) == (content, [])


@pytest.mark.parametrize("where", ["--out", "--results", "batch"])
def test_a_byte_order_mark_before_results_costs_nothing(api: FaultyAPI, where: str) -> None:
    content = write_requests("a1", "a2")
    marked = b"\xef\xbb\xbf" + jsonl(success("a1"), success("a2"))
    Path("other.jsonl").write_bytes(marked)
    if where == "--out":
        OUT.write_bytes(marked)
    if where == "batch":
        batch = batch_of_a_run(api, "completed", content, done=["a1", "a2"])
        batch.output_file_id = api.new_file(marked, "batch_output", "x").id
    assert run(*(["--results", "other.jsonl"] if where == "--results" else [])) == 0
    assert (posts(api), kinds()) == (0, {"a1": "ok", "a2": "ok"})
    assert OUT.read_bytes().startswith(b'{"id"')


# ---- withheld ----


def lose_output(api: FaultyAPI, batch: Any) -> None:
    del api.files[batch.output_file_id]


def cannot_be_read(api: FaultyAPI, batch: Any) -> None:
    """The line of a2 is cut before its custom_id."""
    lines = api.read_file(batch.output_file_id).splitlines(keepends=True)
    content = b"".join(b'{"id": "batch_req\n' if b'"a2"' in line else line for line in lines)
    batch.output_file_id = api.new_file(content, "batch_output", "x").id


def other_ids(api: FaultyAPI, batch: Any) -> None:
    content = api.read_file(batch.output_file_id).replace(b'"custom_id": "a2"', b'"custom_id": "A2"')
    batch.output_file_id = api.new_file(content, "batch_output", "x").id


def no_output(api: FaultyAPI, batch: Any) -> None:
    batch.output_file_id = None


# what goes wrong with the first part (a1, a2): (a word of the reason, what is withheld)
LOSSES: dict[str, tuple[Callable[[FaultyAPI, Any], None], str, list[str]]] = {
    "gone": (lose_output, "is no longer on the server", ["a1", "a2"]),
    "never comes": (no_output, "but has no output file after 10 minutes", ["a1", "a2"]),
    "unreadable": (cannot_be_read, "1 line of the results of batch ", ["a2"]),
    "other ids": (other_ids, "1 result of batch ", ["a2"]),
}


@pytest.mark.parametrize(("loss", "is_earlier"), [*((loss, False) for loss in LOSSES), ("never comes", True)])
def test_what_is_lost_is_left_out_and_everything_else_goes_on(
    api: FaultyAPI, capsys: Capture, loss: str, is_earlier: bool
) -> None:
    lose, reason, left_out = LOSSES[loss]
    api.outcomes = {"a3": ["500", "200"]}
    api.hold = "in_progress"
    content = write_requests(*numbered(4))

    def end() -> None:
        first, second = [*api.batches.values()][:2]
        api.hold, first.hold = None, "completed"
        for batch in (first, second):
            api.look(batch)
        lose(api, first)

    options = ["--max-requests", "2", "--interval", "200"]
    if is_earlier:
        assert create("--max-requests", "2") == 0
        end()
    time = FakeTime() if is_earlier else FakeTime(end)
    assert run(*options, time=time) == 1
    err = capsys.readouterr().err
    assert reason in err.splitlines()[-1]
    counted = {1: "1 request that may have been paid for was ", 2: "2 requests that may have been paid for were "}
    assert err.endswith(f"; {counted[len(left_out)]}{WAYS_ON}")
    of_others = {"A2": "ok"} if loss == "other ids" else {}
    assert kinds() == {each: "missing" if each in left_out else "ok" for each in numbered(4)} | of_others
    assert sent(api) == [["a1", "a2"], ["a3", "a4"], ["a3"]]

    assert run(*options) == 1
    write_requests(*numbered(5))
    assert run(*options) == 1
    assert sent(api)[3:] == [["a5"]]
    assert_paid_once(api, content)

    assert main("retry", "--in", str(REQUESTS), "--results", str(OUT), "--out", "redo.jsonl") == 0
    assert run("--interval", "200", source="redo.jsonl") == 0
    assert run("--interval", "200") == 0
    assert sent(api)[4:] == [left_out]
    assert {kinds()[each] for each in numbered(5)} == {"ok"}


def test_an_earlier_download_is_a_way_on(api: FaultyAPI) -> None:
    batch = batch_of_a_run(api, "completed", write_requests("a1", "a2"), done=["a1", "a2"])
    Path("download.jsonl").write_bytes(api.read_file(batch.output_file_id or ""))
    lose_output(api, batch)
    assert run() == 1
    assert run("--results", "download.jsonl") == 0
    assert (posts(api), run()) == (0, 0)


def test_a_lost_result_keeps_nothing_back_of_a_file_of_another_name(api: FaultyAPI) -> None:
    """The file that `retry` wrote may be the request file again, byte for byte."""
    lose_output(api, batch_of_a_run(api, "completed", write_requests("a1", "a2"), done=["a1", "a2"]))
    assert run() == 1
    write_requests("a1", "a2", path="redo.jsonl")
    assert (run(source="redo.jsonl"), run(source="redo.jsonl"), run()) == (0, 0, 0)
    assert sent(api)[1:] == [["a1", "a2"]]


def test_a_file_that_is_refused_is_withheld(api: FaultyAPI, capsys: Capture) -> None:
    api.faults = [Fault("GET", "/content$", status=410, message="Not this one.", times=99)]
    write_requests("a1", "a2")
    assert run("--max-requests", "1", "--attempts", "1") == 1
    assert "2 requests that may have been paid for were not sent" in capsys.readouterr().err
    assert (posts(api), OUT.exists()) == (2, True)
    api.faults = []
    assert run() == 0
    assert times_paid(api) == [1, 1]


@pytest.mark.parametrize("counts", [None, {"completed": 0, "failed": 0, "total": 0}])
def test_a_batch_that_is_completed_without_files_and_counts_is_withheld(
    api: FaultyAPI, capsys: Capture, counts: Any
) -> None:
    batch = batch_of_a_run(api, "completed", write_requests("a1", "a2"), request_counts=counts)
    for _ in range(2):
        assert run() == 1
        assert f"error: batch {batch.id} is completed, but names neither results nor counts; 2 requests" in (
            capsys.readouterr().err
        )
    assert create() == 0
    batch.output_file_id = api.new_file(jsonl(success("a1"), success("a2")), "batch_output", "x").id
    assert run() == 0
    assert posts(api) == 0


@pytest.mark.parametrize("odd", ["file 1", ["x"], ".."])
def test_an_id_of_an_output_file_that_cannot_be_used_is_withheld(api: FaultyAPI, capsys: Capture, odd: Any) -> None:
    batch_of_a_run(api, "completed", write_requests("a1"), output_file_id=odd,
                   request_counts={"completed": 1, "failed": 0, "total": 1})
    assert run() == 1
    assert "cannot be had: not the id of a file: " in capsys.readouterr().err.splitlines()[-1]
    assert posts(api, "/v1/files") == 0


def test_a_new_batch_whose_id_cannot_be_used_stops_the_next_run_too(api: FaultyAPI, capsys: Capture) -> None:
    new_id = api.new_id
    api.new_id = lambda prefix: "batch_1 1" if prefix == "batch_" else new_id(prefix)  # type: ignore[method-assign]
    write_requests("a1")
    for command in (run, run, create, run):
        assert command() == 1
        assert capsys.readouterr().err.endswith('error: not the id of a batch: "batch_1 1"\n')
    assert posts(api) == 1


def test_force_is_a_way_on_and_pays_again(api: FaultyAPI) -> None:
    batch = batch_of_a_run(api, "completed", write_requests("a1", "a2"), done=["a1", "a2"])
    lose_output(api, batch)
    assert (run(), run("--force"), run()) == (1, 0, 0)
    assert sent(api)[1:] == [["a1", "a2"]]


def test_all_that_is_pending_is_left_out_where_nothing_tells_which_requests_are_lost(
    api: FaultyAPI, capsys: Capture
) -> None:
    lines = write_requests(*numbered(3)).splitlines()
    whole = {"request_file_sha256": hashlib.sha256(REQUESTS.read_bytes()).hexdigest()}
    batch = batch_of_a_run(api, "completed", jsonl(request("a2")), done=["a2"], metadata=whole)
    del api.files[batch.input_file_id], api.files[batch.output_file_id or ""]
    OUT.write_bytes(with_sha256(jsonl(success("a1")), sha256_of(lines[0])))
    for _ in range(2):
        assert run() == 1
        err = capsys.readouterr().err
        assert err.endswith(f"; 2 requests that may have been paid for were {WAYS_ON}")
        assert "0 of 3 requests to send; 1 has a bio, 2 left out\n" in err
    assert posts(api) == 0
    assert kinds() == {"a1": "ok", "a2": "missing", "a3": "missing"}


@pytest.mark.parametrize("lose", [lose_output, no_output])
def test_what_another_batch_has_is_not_withheld(api: FaultyAPI, lose: Callable[[FaultyAPI, Any], None]) -> None:
    content = write_requests("a1", "a2")
    whole = {"request_file_sha256": hashlib.sha256(content).hexdigest()}
    moment = api.now()
    lose(api, batch_of_a_run(api, "completed", content, done=["a1", "a2"], created_at=moment - 9))
    batch_of_a_run(api, "completed", jsonl(request("a2")), done=["a2"], metadata=whole, created_at=moment - 8)
    batch_of_a_run(api, "completed", jsonl(request("a1")), done=["a1"], metadata=whole, created_at=moment - 7)
    assert run("--interval", "200") == 0
    assert (posts(api), kinds()) == (0, {"a1": "ok", "a2": "ok"})


def test_a_cancelled_batch_that_names_no_output_file_draws_a_warning(api: FaultyAPI, capsys: Capture) -> None:
    api.habits, api.cancel_done, api.hold = {"cancel-loses-output"}, 0.5, "in_progress"
    write_requests("a1", "a2")

    def cancel() -> None:
        api.cancel(next(iter(api.batches.values())))
        api.hold = None

    assert run(time=FakeTime(nothing, nothing, cancel)) == 1
    (batch_id,) = api.batches
    assert (f"warning: batch {batch_id} (cancelled) counts 1 completed requests, but names no output file; they are "
            "sent, and perhaps paid for, again\n") in capsys.readouterr().err
    assert run() == 0


def test_a_failed_batch_with_an_error_file_is_explained(api: FaultyAPI, capsys: Capture) -> None:
    api.habits = {"failed-error-file"}
    bad = request("a1", body={"input": "no model"})
    REQUESTS.write_bytes(jsonl(bad))
    assert run() == 1
    assert "Model parameter is required.: 1 × invalid_request: The batch was refused.; no output was written" in (
        capsys.readouterr().err.splitlines()[-1]
    )
    (batch_id,) = api.batches
    assert main("retrieve", "--batch-id", batch_id) == 1
    assert capsys.readouterr().err.endswith(": 1 × invalid_request: The batch was refused.\n")
    done_batch(api, "failed", output=None, errors=jsonl(refused("a1", 400, "odd")))
    assert main("retrieve", "--batch-id", "batch_1") == 1
    assert "1 × odd: Sorry." in capsys.readouterr().err


def test_a_foreign_custom_id_counts_once(api: FaultyAPI, capsys: Capture) -> None:
    batch_of_a_run(api, "completed", write_requests("a1"), done=["a1", "b1"])
    assert run() == 0
    err = capsys.readouterr().err
    assert "warning: 1 result of batch " in err
    assert "; 1 result of other requests\n" in err
    assert "new in this run: 1 result, 1 of them from earlier batches" in err
    assert custom_ids(OUT.read_bytes()) == ["a1", "b1"]


# ---- withheld, by the way in which results are lost ----


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_batch_whose_output_file_is_gone_counts_for_nothing_where_out_has_its_requests(
    api: FaultyAPI, capsys: Capture, is_complete: bool
) -> None:
    lines = edit(*bios(2)).splitlines()
    batch = batch_of_a_run(api, "completed", jsonl(request("a1")), done=["a1"],
                          metadata={"request_file_sha256": hashlib.sha256(REQUESTS.read_bytes()).hexdigest()})
    assert batch.output_file_id
    del api.files[batch.output_file_id]
    if is_complete:
        OUT.write_bytes(with_sha256(jsonl(success("a1")), sha256_of(lines[0])))
        assert run() == 0
        assert sent(api)[1:] == [["a2"]]
    else:
        assert run() == 1
        assert sent(api)[1:] == [["a2"]]
        assert capsys.readouterr().err.endswith(
            "is no longer on the server; 1 request that may have been paid for was not sent again; name an earlier "
            "download with --results, or write them to a file with retry and run that file into the same --out, or use "
            "--force, which sends all requests of the file again\n"
        )
        retry = main("retry", "--in", str(REQUESTS), "--results", str(OUT), "--out", "redo.jsonl")
        assert (retry, run(source="redo.jsonl"), run()) == (0, 0, 0)
        assert [custom_ids(OUT.read_bytes()), posts(api)] == [["a1", "a2"], 2]


@pytest.mark.parametrize("options", [["--interval", "0.1"], ["--interval", "30"], ["--attempts", "1"]], ids=" ".join)
def test_an_output_file_that_is_gone_of_an_own_batch_is_not_paid_for_again(
    options: list[str], api: FaultyAPI, capsys: Capture
) -> None:
    edit(*bios(2))
    api.faults.append(Fault("GET", "/files/", status=404, message="No such File object", times=99))
    assert run(*options) == 1
    assert "is no longer on the server; 2 requests that may have been paid for were not sent" in capsys.readouterr().err
    assert posts(api) == 1


@pytest.mark.parametrize("status", ["completed", "expired", "cancelled"])
def test_results_that_match_no_request_are_not_paid_for_again(
    status: str, api: FaultyAPI, capsys: Capture
) -> None:
    lines = edit(*bios(3)).splitlines()
    batch = batch_of_a_run(api, status, REQUESTS.read_bytes(), done=["a1", "A2", "A3"])
    assert run() == 1
    assert (
        f"error: 2 results of batch {batch.id} have custom_ids that its input file does not have; 2 requests that may "
        "have been paid for were not sent again"
    ) in capsys.readouterr().err
    assert posts(api) == 0
    first, *rest = OUT.read_bytes().splitlines(keepends=True)
    assert first == with_sha256(jsonl(success("a1")), sha256_of(lines[0]))  # what was paid for is kept
    assert rest == [missing_line("a2"), missing_line("a3"), *map(jsonl, map(success, ["A2", "A3"]))]
    assert run() == 1
    assert (posts(api), OUT.read_bytes()) == (0, first + b"".join(rest))


def test_results_of_other_parts_are_written_where_those_of_one_are_gone(
    api: FaultyAPI, capsys: Capture
) -> None:
    lines = edit(*bios(4)).splitlines(keepends=True)
    gone = batch_of_a_run(api, "completed", b"".join(lines[:2]), done=["a1", "a2"])
    batch_of_a_run(api, "completed", b"".join(lines[2:]), done=["a3", "a4"])
    assert gone.output_file_id
    del api.files[gone.output_file_id]
    assert run("--max-requests", "2") == 1
    err = capsys.readouterr().err
    assert err.index("Wrote results.jsonl: 2 succeeded") < err.index(f"error: the output file of batch {gone.id} is ")
    assert posts(api) == 0
    assert custom_ids(OUT.read_bytes()) == ["a1", "a2", "a3", "a4"]
    assert run("--max-requests", "2") == 1
    assert (posts(api), OUT.read_bytes().count(b'"status_code": 200')) == (0, 2)


def test_a_batch_that_fails_and_is_not_needed_makes_room_for_a_refused_part(api: FaultyAPI) -> None:
    """A batch of an earlier version fails while a part that was refused for the token limit waits for room."""
    earlier = batch_of_a_run(api, "validating", edit(*bios(1)))
    edit(*bios(2))
    api.queue_limit = 1
    earlier.total = 1

    def fail() -> None:
        earlier.frozen = False
        earlier.over_limit = True

    assert run(time=FakeTime(nothing, nothing, nothing, fail)) == 0
    assert_out(api)


def test_a_deleted_error_file_withholds_no_success(api: FaultyAPI) -> None:
    batch = batch_of_a_run(api, "completed", edit(*bios(2)), done=["a1"], left=["a2"])
    assert batch.error_file_id
    del api.files[batch.error_file_id]
    assert run() == 0
    assert sent(api)[1:] == [["a2"]]


def test_where_the_output_never_comes_those_of_the_error_file_are_sent_again(api: FaultyAPI) -> None:
    batch = batch_of_a_run(api, "completed", write_requests(*numbered(4)), done=["a1", "a2"], left=["a3", "a4"])
    batch.output_file_id = None
    assert run() == 1
    assert sent(api)[1:] == [["a3", "a4"]]
    assert OUT.read_bytes().splitlines(keepends=True)[:2] == [missing_line("a1"), missing_line("a2")]
