"""What a results line says, and the commands that decide by it: `retry` and `preview`."""

from __future__ import annotations

import csv
import functools
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import (
    DUPLICATE,
    IDS,
    KEY,
    MODEL,
    OTHER,
    Capture,
    Environment,
    FakeTime,
    Json,
    Tool,
    asked,
    chat,
    error,
    expired,
    in_short,
    jsonl,
    long_result,
    message,
    ok,
    posts,
    refused,
    request,
    requests_file,
    response,
    result,
    rows,
    sha256_of,
    success,
    text,
    warning,
    write_requests,
)
from faulty_api import Fault, FaultyAPI

import batch_tool

# ---- results ----

SUCCEEDED, REJECTED, RETRYABLE, MISSING = (
    batch_tool.SUCCEEDED, batch_tool.REJECTED, batch_tool.RETRYABLE, batch_tool.MISSING
)
REASONING = {"type": "reasoning", "summary": []}
SORRY = {"error": {"code": "server_error", "message": "Sorry."}}
ENGINE = {"error": {"error": {"message": "Engine dead.", "type": "EngineError", "code": 500}}}  # as vLLM nests it
SILENT = ({}, "", {"code": None, "message": ""}, {"error": {"message": None}})  # errors that say nothing


def words(phase: Any, *parts: str) -> Json:
    """A message of a phase."""
    return message(*map(text, parts)) | {"phase": phase}


def refusal(reason: str) -> Json:
    return message({"type": "refusal", "refusal": reason})


def output(*items: Any, **fields: Any) -> Json:
    """A results line with a Response of these output items."""
    return ok({"status": "completed", "output": [*items]} | fields)


def incomplete(reason: str) -> Json:
    return output(message(text("Bi")), status="incomplete", incomplete_details={"reason": reason})


def failed(status: Any, body: Any, **fields: Any) -> Json:
    return {"response": response(body, status)} | fields


DEEP = functools.reduce(lambda error, _: {"error": error}, range(900), 1)
BIO = {"status": "completed", "output": [message(text("Bio."))]}
NO_STATUS: Json = {"response": {"body": BIO}}

# what a results line holds; how its request has ended; the bio and the error in the CSV
RESULTS: dict[str, tuple[Json, str, str, str]] = {
    # the text of a Response
    "a success": (ok(BIO), SUCCEEDED, "Bio.", ""),
    "reasoning first": (output(REASONING, message(text("Bio."))), SUCCEEDED, "Bio.", ""),
    "several parts": (output(message(text("A "), text("bio."))), SUCCEEDED, "A bio.", ""),
    "a draft, then the answer": (output(message(text("Bi")), message(text("Bio."))), SUCCEEDED, "Bio.", ""),
    "an answer, then nothing": (output(message(text("Bio.")), message(text(" \n")), message()), SUCCEEDED, "Bio.", ""),
    "an answer, then a refusal": (output(message(text("Bio.")), refusal("No.")), REJECTED, "", "refusal: No."),
    "a refusal, then an answer": (output(refusal("No."), message(text("Bio."))), SUCCEEDED, "Bio.", ""),
    "commentary first": (output(words("commentary", "I'll write."), words("final_answer", "Bio.")),
                         SUCCEEDED, "Bio.", ""),
    "commentary last": (output(words("final_answer", "Bio."), words("commentary", "Done.")), SUCCEEDED, "Bio.", ""),
    "commentary and no phase": (output(words(None, "Bio."), words("commentary", "Done.")), SUCCEEDED, "Bio.", ""),
    "no phase and an unknown one": (output(words("", "Bio."), words("draft", "Bi")), SUCCEEDED, "Bio.", ""),
    "an unknown phase": (output(words("summary", "B"), words({"odd": 1}, "Bio."), words("commentary", "Done.")),
                         SUCCEEDED, "Bio.", ""),
    "a final answer and no phase": (output(words("final_answer", "Bi"), words("final_answer", "Bi", "o."),
                                           message(text("x"))), SUCCEEDED, "Bio.", ""),
    "only commentary": (output(REASONING, words("commentary", "I'll write.")), REJECTED, "", "commentary"),
    "commentary and an empty answer": (output(words("commentary", "Hm."), words("final_answer", "")),
                                       REJECTED, "", "no_text"),
    # of a chat completion
    "chat": (ok(chat(content="Bio.")), SUCCEEDED, "Bio.", ""),
    "chat parts": (ok(chat(content=[{"type": "text", "text": "A b"}, {"type": "text", "text": "io."}])),
                   SUCCEEDED, "A bio.", ""),
    "thinking parts": (ok(chat(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                                        {"type": "text", "text": "Bio."}])), SUCCEEDED, "Bio.", ""),
    "only thinking parts": (ok(chat(content=[{"type": "thinking", "thinking": "Hm."}])), REJECTED, "", "no_text"),
    "thoughts": (ok(chat(content="<think>\nHm.\n</think>\n\nBio.")), SUCCEEDED, "Bio.", ""),
    "thoughts in a Response": (output(message(text(" <think></think> Bio."))), SUCCEEDED, "Bio.", ""),
    "thoughts twice": (ok(chat(content="<think>A</think>\n<think>B</think> Bio.")), SUCCEEDED, "Bio.", ""),
    "thoughts without a beginning": (ok(chat(content="Hm. </think>Bio.")), SUCCEEDED, "Bio.", ""),
    "thoughts without an end": (ok(chat(content="<think>Hm. Bio.")), REJECTED, "", "no_text"),
    "nothing but thoughts": (ok(chat(content="<think>Hm.</think>\n")), REJECTED, "", "no_text"),
    "a tag inside the bio": (ok(chat(content="Of <think>it</think>.")), SUCCEEDED, "Of <think>it</think>.", ""),
    # succeeded
    "a string": (ok(json.dumps(BIO)), SUCCEEDED, "Bio.", ""),
    "a string of a chat": (ok(json.dumps(chat(content="Bio."))), SUCCEEDED, "Bio.", ""),
    "null errors": (ok(BIO | {"error": None}, error=None), SUCCEEDED, "Bio.", ""),
    **{f"errors that say nothing: {error}": (ok(BIO | {"error": error}, error=error), SUCCEEDED, "Bio.", "")
       for error in SILENT},
    **{f"status {status!r}": (failed(status, BIO), SUCCEEDED, "Bio.", "")
       for status in (201, "200", " 201", 200.0, "200 OK")},
    "no status beside a Response": (NO_STATUS, SUCCEEDED, "Bio.", ""),
    "a blank status": (failed("", BIO), SUCCEEDED, "Bio.", ""),
    "no status beside a chat": (failed(None, chat(content="Bio.")), SUCCEEDED, "Bio.", ""),
    "a status in capitals": (output(message(text("Bio.")), status="Completed"), SUCCEEDED, "Bio.", ""),
    # rejected
    "400": (failed(400, {"error": {"code": "bad", "message": "No."}}), REJECTED, "", "bad: No."),
    "400 in quotes": (failed("400", {"error": {"code": "bad", "message": "No."}}), REJECTED, "", "bad: No."),
    "404 by type": (failed(404, {"error": {"code": None, "type": "bad", "message": ""}}), REJECTED, "", "bad"),
    "404 with a detail": (failed(404, {"detail": "Not Found"}), REJECTED, "", "http_404: Not Found"),
    "422 with details": (failed(422, {"detail": [{"type": "missing", "loc": ["body", "model"], "msg": "Field required"},
                                                 {"loc": ["body", "input", 0], "msg": "Too long"}]}),
                         REJECTED, "", "http_422: body.model: Field required; body.input.0: Too long"),
    "422 with details in a message": (failed(422, {"message": {"detail": [{"loc": "body", "msg": "Too long"}]}}),
                                      REJECTED, "", "http_422: body: Too long"),
    "an error in words": (failed(400, {"error": "No."}), REJECTED, "", "http_400: No."),
    "a nested error": (failed(400, ENGINE), REJECTED, "", "500: Engine dead."),
    "a nested error above a 400": (failed(400, None, **ENGINE), REJECTED, "", "500: Engine dead."),
    "an error above a 400 that says nothing": (failed(400, {"error": {}}, **SORRY),
                                               REJECTED, "", "server_error: Sorry."),
    "incomplete": (incomplete("max_output_tokens"), REJECTED, "", "incomplete: max_output_tokens"),
    "filtered": (incomplete("content_filter"), REJECTED, "", "incomplete: content_filter"),
    "incomplete for no reason": (ok({"status": "incomplete"}), REJECTED, "", "incomplete"),
    **{f"chat {reason}": (ok(chat(reason, content="Bi")), REJECTED, "", f"incomplete: {reason.lower()}")
       for reason in ("length", "max_tokens", "content_filter", "MAX_TOKENS", "Length")},
    "chat refusal": (ok(chat(content=None, refusal="No.")), REJECTED, "", "refusal: No."),
    "chat refusal as a part": (ok(chat(content=[{"type": "refusal", "refusal": "No."}])), REJECTED, "", "refusal: No."),
    "refusal": (output(refusal("No.")), REJECTED, "", "refusal: No."),
    "only reasoning": (output(REASONING), REJECTED, "", "no_text"),
    "only blanks": (output(message(text(" \n"))), REJECTED, "", "no_text"),
    "no choices": (ok({"choices": []}), REJECTED, "", "no_text"),
    "no content": (ok(chat(content=None)), REJECTED, "", "no_text"),
    "odd items": (output(7, {"type": "message", "content": [None, {"type": "output_text"}]}), REJECTED, "", "no_text"),
    "odd output": (ok({"output": "Bio.", "choices": {}}), REJECTED, "", "no_text"),
    "neither a Response nor a chat": (ok({"object": "list", "data": []}), REJECTED, "", "no_text"),
    "the request itself": (ok(request()["body"]), REJECTED, "", "no_text"),
    "an error in a 200": (ok(SORRY), REJECTED, "", "server_error: Sorry."),
    "an error beside a bio": (ok(BIO | SORRY), REJECTED, "", "server_error: Sorry."),
    "an error above a 200": (ok(BIO, **SORRY), REJECTED, "", "server_error: Sorry."),
    "an error above one that says nothing": (ok(BIO | {"error": {}}, **SORRY), REJECTED, "", "server_error: Sorry."),
    "an error of another shape": (ok(BIO | {"error": {"code": None, "reason": "x"}}), REJECTED, "", "error"),
    "an error in words in a 200": (ok({"error": "Overloaded"}), REJECTED, "", "error: Overloaded"),
    "an error in an error in an error…": (ok({"error": DEEP}), REJECTED, "", "error: 1"),
    "an error in a 204": (failed("204", SORRY), REJECTED, "", "server_error: Sorry."),
    "unknown status": (ok({"status": "queued"}), REJECTED, "", 'not_understood: status is "queued"'),
    "no body": (ok(None), REJECTED, "", "not_understood: body is null"),
    "words": (ok("Bad gateway"), REJECTED, "", 'not_understood: body is "Bad gateway"'),
    "a string of a list": (ok("[1]"), REJECTED, "", "not_understood: body is [1]"),
    "no body but an error": (ok(None, error={"code": "x", "message": "Why."}), REJECTED, "", "not_understood: Why."),
    "unreadable, as run writes it": ({"error": {"code": "unreadable", "message": "Cut.", "line": '{"id'}},
                                     REJECTED, "", "unreadable: Cut."),
    # retryable
    "failed": (ok({"status": "failed"} | SORRY), RETRYABLE, "", "server_error: Sorry."),
    "failed for no reason": (ok({"status": "failed", "error": None}), RETRYABLE, "", "failed"),
    "failed with a text": (ok(BIO | {"status": "failed"}), RETRYABLE, "", "failed"),
    "cancelled": (output(status="cancelled"), RETRYABLE, "", "cancelled"),
    "canceled": (output(status="canceled"), RETRYABLE, "", "cancelled"),
    "status 2000": (failed(2000, BIO), RETRYABLE, "", "http_2000"),
    "failed as a string": (ok(json.dumps({"status": "failed"} | SORRY)), RETRYABLE, "", "server_error: Sorry."),
    "no status": (failed(None, SORRY), RETRYABLE, "", "server_error: Sorry."),
    "no status and nothing else": ({"response": {}}, RETRYABLE, "", "no_status"),
    "an odd status": (failed([200], BIO), RETRYABLE, "", "http_[200]"),
    "status 0": (failed(0, {}), RETRYABLE, "", "http_0"),
    **{str(status): (failed(status, {}), RETRYABLE, "", f"http_{status}") for status in (408, 409, 429, "429", 302)},
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
    assert outcome.text == bio or kind != SUCCEEDED


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


@pytest.mark.parametrize(
    "line, reason",
    [
        (jsonl(success())[:80], "not valid JSON: Unterminated string starting at (character 75 of the line)"),
        (jsonl(success()).rstrip().replace(b"A bio.", b"A\xff bio."), "not valid UTF-8 (byte 207 of the line)"),
    ],
    ids=["cut", "no UTF-8"],
)
def test_a_line_that_cannot_be_read_is_not_paid_for_again(
    line: bytes, reason: str, tool: Tool, capsys: Capture
) -> None:
    requests_file(request("a1"), request("a2"))
    Path("results.jsonl").write_bytes(jsonl(line + b"\n", success("a2")))
    assert retry(tool, "results.jsonl") == 0
    out, err = capsys.readouterr()
    assert out == "Requests to retry: 0\n"
    assert err.splitlines()[:3] == [
        f"batch_tool.py: warning: results.jsonl line 1: {reason}; its request counts as rejected",
        "1 succeeded, 1 rejected, 0 retryable, 0 missing of 2 requests; tokens: 12 input, 4 output",
        f"most common errors: 1 × unreadable: {reason}",
    ]
    assert rows(tool, "results.jsonl")[0] == ["a1", "Artist a1", "", f"unreadable: {reason}", "", ""]


@pytest.mark.parametrize("custom_id", ["a1", 'a"1\\', "뉴진스 \ud800"])
def test_what_run_writes_for_an_unreadable_line_is_rejected_again(custom_id: str) -> None:
    line = jsonl(success(custom_id))[:-9] + b"\xff\n"
    written = batch_tool.results_object(line)
    assert written == {
        "id": None, "custom_id": custom_id, "response": None,
        "error": {"code": "unreadable", "message": written["error"]["message"],
                  "line": line[:-2].decode() + "\\xff"},
    }
    assert batch_tool.classify(json.loads(json.dumps(written))).kind == REJECTED


@pytest.mark.parametrize("command", ["retry", "export"])
def test_a_byte_order_mark_before_the_results_is_passed_over(command: str, tool: Tool, capsys: Capture) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(success()))
    assert tool(command, "--in", "requests.jsonl", "--results", "results.jsonl", "/dev/null", "--out", "out") == 0
    err = capsys.readouterr().err
    assert ("1 succeeded" in err, "warning" in err) == (True, False)
    assert command == "retry" or b"A bio." in Path("out").read_bytes()


def test_answers_that_were_cut_off_and_that_were_filtered_are_counted_apart(tool: Tool, capsys: Capture) -> None:
    requests_file(*map(request, "abc"))
    reasons = {"a": "max_output_tokens", "b": "content_filter", "c": "max_output_tokens"}
    Path("results.jsonl").write_bytes(jsonl(*(result(name, **incomplete(reasons[name])) for name in reasons)))
    assert retry(tool, "results.jsonl") == 0
    errors = "2 × incomplete: max_output_tokens; 1 × incomplete: content_filter"
    assert capsys.readouterr().err.splitlines()[1] == f"most common errors: {errors}"


UNUSABLE = pytest.mark.parametrize(
    "line, reason",
    [
        (b"x\n", "not valid JSON: Expecting value (character 1 of the line)"),
        (jsonl(success())[:30], "not valid JSON: Unterminated string starting at (character 23 of the line)"),
        (b'{"custom_id": "\xff"}\n', "not valid UTF-8 (byte 16 of the line)"),
        (b"[" * 100_000 + b"\n", ""),
        (b"[]\n", "not a JSON object"),
        (b"\n", "blank line"),
        (result(None), "not a results line (no custom_id)"),  # type: ignore[arg-type]
        (request(), "not a results line (it is a request)"),
        ({"custom_id": "a1"}, "not a results line (no response and no error)"),
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
    lines = capsys.readouterr().err.splitlines()
    warnings = sum(line.startswith("batch_tool.py: warning: ") for line in lines)
    assert warnings == min(unusable, 20)
    assert lines[warnings].endswith(f"tokens: 12 input, 4 output{counted}")


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
        "1 result of other requests\nbios.csv: 1 of 1 artist has a bio\n"
    )


# ---- retry ----


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


def test_the_example_of_an_error_is_the_first_one_and_short(tool: Tool, capsys: Capture) -> None:
    requests_file(*map(request, "abc"))
    messages = ["Very\nlong. " * 100_000, "Other.", ""]
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
        ([b"x\n"], "requests.jsonl line 1: invalid_json_line: not JSONL; it looks like text: convert"),
        ([b"[" * 100_000 + b"\n"], "requests.jsonl line 1: "),
        ([request(), b"\xff\n"], "requests.jsonl line 2: invalid_json_line: not valid UTF-8 (byte 1 of the line)"),
        ([b"a,b\n", b"1,2\n"], "requests.jsonl line 1: invalid_json_line: not JSONL; it looks like a CSV: convert it"),
        ([success()], "requests.jsonl line 1: "),
        ([b"{}\n"], "requests.jsonl line 1: missing_required_parameter: custom_id is missing; is --in"),
        ([request(7)], "requests.jsonl line 1: invalid_request: custom_id is not a non-empty string; is --in"),
        ([request(), request()], 'requests.jsonl line 2: duplicate_custom_id: custom_id "a1" was already used'),
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


@pytest.mark.parametrize("lines, seems", [
    ([request()], "not a results line (it is a request)"),
    ([b"artist_id,artist_name\n", b"a1,Perfume\n"], "not JSONL; it looks like a CSV"),
    ([b"x\n"] * 30, "not JSONL; it looks like text"),
], ids=["requests", "CSV", "text"])
@pytest.mark.parametrize("command", ["retry", "export"])
def test_a_file_without_results_is_named_once(
    command: str, lines: list[Any], seems: str, tool: Tool, capsys: Capture
) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(*lines))
    assert tool(command, "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "out") == 1
    assert capsys.readouterr() == ("", error(
        f"results.jsonl has no results line ({seems}); name a file that run, status, wait or retrieve wrote"
    ))
    assert not Path("out").exists()


def test_an_impossible_number_of_tokens_is_left_out(tool: Tool, capsys: Capture) -> None:
    requests_file(request())
    for tokens in ("9" * 4300, "-1", "true", '"7"'):
        line = jsonl(success()).decode().replace('"input_tokens": 12', f'"input_tokens": {tokens}')
        Path("results.jsonl").write_text(line)
        assert tool("export", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "out") == 0
        assert "; tokens: 0 input, 4 output\n" in capsys.readouterr().err
        assert Path("out").read_bytes().endswith(b",,4\r\n")


# ---- preview ----


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


def answering(api: FaultyAPI, *bodies: Json, status: int = 200) -> None:
    """Let the service answer the next requests so."""
    for body in bodies:
        api.faults.append(Fault("POST", "(responses|completions)$", status=status, body=json.dumps(body).encode()))


PROMPT = "the prompt of a1:\nBio of a1\n\n"
NO_ESTIMATE = "no response says how many tokens it used, so there is no estimate\n"


def test_preview_shows_the_answers_and_estimates_the_whole(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    requests = nine_requests()
    assert tool("preview", "--in", "requests.jsonl") == 0
    input_tokens = 9 * (api.exchanges[-1].size // 4)
    assert capsys.readouterr() == (
        f"a2 Artist a2\n{bio_of('a2')}\n\na5 Artist a5\n{bio_of('a5')}\n\na8 Artist a8\n{bio_of('a8')}\n",
        f"{sending(3)}the prompt of a2:\nBio of a2\n\n"
        f"9 requests: about {input_tokens} input and 405 (405 to 405) output tokens, by 3 answers\n",
    )
    assert api.answered == [requests[number]["body"] for number in (1, 4, 7)]
    assert (posts(api, "/v1/responses"), api.files, api.batches) == (3, {}, {})


@pytest.mark.parametrize(
    "count, total, positions",
    [(1, 9, {4}), (3, 9, {1, 4, 7}), (3, 4, {0, 2, 3}), (3, 3, {0, 1, 2}), (9, 2, {0, 1}), (2, 1000, {250, 750})],
)
def test_the_requests_are_spread_evenly(count: int, total: int, positions: set[int]) -> None:
    assert batch_tool.spread_evenly(count, total) == positions


def test_more_requests_than_there_are_are_all(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    requests_file()
    assert tool("preview", "--in", "requests.jsonl", "--requests", 9) == 0
    assert capsys.readouterr().err.startswith(sending(2))
    assert len(api.answered) == 2


USAGES = [batch_tool.Usage(size, batch_tool.Tokens(*tokens))
          for size, *tokens in ((100, 40, 100), (300, 120, 149), (200, 80, 99), (999, None, 7))]


@pytest.mark.parametrize(
    "prices, cost",
    [
        (None, ""),
        ((0.05, 0.25), "; about $0.17, or $0.05 per 1,000 requests"),
        ((500.0, 2500.0), "; about $1,749.28, or $495.27 per 1,000 requests"),
        ((0.0, 0.0), "; less than $0.01, or less than $0.01 per 1,000 requests"),
    ],
)
def test_the_estimate_is_in_proportion_to_bytes_and_by_the_mean(prices: Any, cost: str) -> None:
    text = "3,532 requests: about 1,450,000 input and 410,000 (350,000 to 526,000) output tokens, by 3 answers"
    assert batch_tool.estimate(USAGES, 3_625_000, 3532, prices) == text + cost


def test_the_prices_are_dollars_for_a_million_tokens(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    nine_requests()
    assert tool("preview", "--in", "requests.jsonl", "--prices", "0,10000") == 0
    cost = "about $4.05, or $450.00 per 1,000 requests"
    assert capsys.readouterr().err.endswith(f"(405 to 405) output tokens, by 3 answers; {cost}\n")


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
    answer: str, shown: str, code: int, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file(request())
    api.answers = [answer]
    assert tool("preview", "--in", "requests.jsonl") == code
    assert capsys.readouterr().out == f"a1 Artist a1\n{shown}\n"
    assert len(api.answered) == 1


@pytest.mark.parametrize("status", [413, 422])
def test_a_request_that_is_refused_by_itself_does_not_keep_the_others_from_being_sent(
    status: int, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    api.faults.append(Fault("POST", status=status, message="Too long", code="too_long"))
    assert tool("preview", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == f"a1 Artist a1\nerror: too_long: Too long\n\na2 Artist a2\n{bio_of('a2')}\n"


def test_one_success_is_enough(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    requests_file()
    api.answers = ["400"]
    assert tool("preview", "--in", "requests.jsonl") == 0
    out, err = capsys.readouterr()
    assert out.endswith(f"\n\na2 Artist a2\n{bio_of('a2')}\n")
    assert err.endswith(" output tokens, by 1 answer\n")


def test_an_answer_is_shown_on_lines_of_its_own_without_control_characters(
    api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file(request("a\n1", body={"model": MODEL, "metadata": {"artist_name": "\x1b[31m"}}))
    body = json.dumps({"output": [message(text(f"\n뉴진스\r\nand \x1b[0m{KEY}\n\n"))]}).encode()
    api.faults.append(Fault("POST", "/responses$", status=200, body=body))
    assert tool("preview", "--in", "requests.jsonl") == 0
    assert capsys.readouterr() == (
        "a\\n1 \\u001b[31m\n뉴진스\nand \\u001b[0m[secret]\n", f"{sending(1)}the prompt of a\\n1:\n\n{NO_ESTIMATE}"
    )


def test_a_rate_limit_is_waited_out_before_an_answer(
    api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
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
    lost: Json, api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/responses$", when="after", **lost))
    assert tool("preview", "--in", "requests.jsonl") == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert re.fullmatch(r"a1 Artist a1\nerror: outcome_unknown: .*", first)
    assert second == f"a2 Artist a2\n{bio_of('a2')}\n"
    assert (posts(api, "/v1/responses"), clock.naps) == (2, [])


@pytest.mark.parametrize("status", [400, 422])
def test_a_refusal_that_is_a_page_ends_the_command(
    status: int, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/responses$", status=status, body=b"<html>Bad request</html>"))
    assert tool("preview", "--in", "requests.jsonl") == 1
    assert capsys.readouterr() == ("", sending(2) + PROMPT + error(f"PREVIEW: HTTP {status}: <html>Bad request</html>"))


def test_a_server_that_cannot_be_reached_ends_the_preview(
    tool: Tool, clock: FakeTime, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    requests_file()
    assert tool("preview", "--in", "requests.jsonl") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{sending(2)}{PROMPT}batch_tool.py: error: cannot reach http://127.0.0.1:9/v1/: ")


def test_a_lone_surrogate_is_sent_as_it_stands_in_the_file(api: FaultyAPI, tool: Tool) -> None:
    requests_file(request(body={"model": MODEL, "input": "\udfff"}))
    assert tool("preview", "--in", "requests.jsonl") == 0
    assert api.answered == [{"model": MODEL, "input": "\udfff"}]


@pytest.mark.parametrize("model", [".", "..", "a/../b", "%2e"])
def test_a_model_that_cannot_be_looked_at_is_sent_all_the_same(model: str, api: FaultyAPI, tool: Tool) -> None:
    requests_file(request(body={"model": model, "input": "Who?"}))
    assert tool("preview", "--in", "requests.jsonl") == 0
    assert [body["model"] for body in api.answered] == [model]


@pytest.mark.parametrize("status, reason", [
    (401, "PREVIEW: HTTP 401: No (no); check OPENAI_API_KEY"),
    (403, "PREVIEW: HTTP 403: No (no)"),
    (404, "PREVIEW: HTTP 404: No (no)"),
])
def test_a_refusal_that_is_not_of_one_request_ends_the_command(
    status: int, reason: str, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    api.faults.append(Fault("POST", "/responses$", status=status, message="No", code="no"))
    assert tool("preview", "--in", "requests.jsonl") == 1
    assert capsys.readouterr() == ("", sending(2) + PROMPT + error(reason))
    assert posts(api, "/v1/responses") == 1


@pytest.mark.parametrize("slash", ["", "/"])
def test_chat_completions_are_previewed(
    slash: str, api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", api.base_url + slash)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Artist a1"}]}
    requests_file(request(url="/v1/chat/completions", body=body))
    assert tool("preview", "--in", "requests.jsonl") == 0
    out, err = capsys.readouterr()
    assert out == f"a1\n{bio_of('a1')}\n"
    assert re.search(r"\n1 request: about \d+ input and 45 \(45 to 45\) output tokens, by 1 answer\n", err)
    assert (posts(api, "/v1/chat/completions"), api.answered) == (1, [body])


def test_a_dead_model_is_an_error_before_anything_is_sent(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    nine_requests(body={"model": "local-dead", "input": "Who?"})
    assert tool("preview", "--in", "requests.jsonl") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f'batch_tool.py: error: the model "local-dead" does not exist at {api.base_url}/; ')
    assert asked(api, "POST") == 0


def test_a_dying_model_draws_a_warning(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    nine_requests(body={"model": "local-dying", "input": "Who?"})
    assert tool("preview", "--in", "requests.jsonl") == 0
    reason = f'the model "local-dying" will be shut down on {api.models["local-dying"]}; choose a newer one'
    assert capsys.readouterr().err.startswith(warning(reason) + sending(3))


@pytest.mark.parametrize(
    "body, prompt",
    [
        ({"instructions": "Be brief.", "input": "Bio of\n뉴진스"}, "Be brief.\n\nBio of\n뉴진스"),
        ({"input": [{"role": "user", "content": "Bio"}, {"content": [{"type": "input_text", "text": "of B."}]}]},
         "Bio\n\nof B."),
        ({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Bio"}]},
         "Be brief.\n\nBio"),
        ({"prompt": {"id": "p", "version": "1", "variables": {"artist_name": "뉴진스"}}},
         '{"id": "p", "version": "1", "variables": {"artist_name": "뉴진스"}}'),
        ({"input": "sk-0123456789abcdefghi \x1b[0m"}, "sk-[secret] \\u001b[0m"),
        ({}, ""),
    ],
    ids=["instructions", "messages of a Response", "chat", "stored prompt", "secret", "nothing"],
)
def test_the_first_prompt_is_shown_as_the_service_gets_it(
    body: Json, prompt: str, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file(request(body={"model": MODEL} | body))
    tool("preview", "--in", "requests.jsonl")
    err = capsys.readouterr().err
    assert err.startswith(f"{sending(1)}the prompt of a1:\n{prompt}\n\n1 request: about " if prompt else sending(1))


def test_nothing_is_written_but_the_log_which_names_the_requests(api: FaultyAPI, tool: Tool) -> None:
    requests_file(*map(request, ("a1", "a2")))
    assert tool("preview", "--in", "requests.jsonl") == 0
    assert sorted(path.name for path in Path().iterdir()) == ["logs", "requests.jsonl"]
    (log,) = Path("logs").glob("*.log")
    sent = [json.loads(line.partition(" PREVIEW request ")[2]) for line in log.read_text().splitlines()
            if " PREVIEW request " in line]
    assert [line["custom_id"] for line in sent] == ["a1", "a2"]
    with pytest.raises(SystemExit, match="2"):
        tool("preview", "--in", "requests.jsonl", "--out", "results.jsonl")


def test_reasoning_is_shown_as_a_share_of_the_output(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    requests_file(*map(request, ("a1", "a2")))
    answering(api, BIO | {"usage": {"input_tokens": 9, "output_tokens": 300,
                                    "output_tokens_details": {"reasoning_tokens": 200}}},
              chat("Bio.") | {"usage": {"prompt_tokens": 9, "completion_tokens": 100,
                                        "completion_tokens_details": {"reasoning_tokens": 48}}})
    assert tool("preview", "--in", "requests.jsonl", "--prices", "1000,5000") == 0
    assert capsys.readouterr().err.endswith(
        "\n2 requests: about 18 input and 400 (200 to 600) output tokens, 62 % of them reasoning, by 2 answers; "
        "about $2.02, or $1,009.00 per 1,000 requests\n"
    )


def test_an_endpoint_that_the_service_does_not_have_is_named(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    requests_file(request())
    answering(api, {"detail": "Not Found"}, status=404)
    assert tool("preview", "--in", "requests.jsonl") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"batch_tool.py: error: PREVIEW: HTTP 404: Not Found; is {api.base_url}/ the base URL of the API? "
        "if it is, it has no /v1/responses; choose another --endpoint in gen_batch_jsonl.py"
    )


def test_a_422_is_shown_in_words(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    requests_file(request())
    answering(api, RESULTS["422 with details"][0]["response"]["body"], status=422)
    assert tool("preview", "--in", "requests.jsonl") == 1
    assert capsys.readouterr().out == f"a1 Artist a1\nerror: {RESULTS['422 with details'][3]}\n"


def test_an_invalid_file_is_not_previewed(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    requests_file(request(), request())
    assert tool("preview", "--in", "requests.jsonl") == 1
    assert capsys.readouterr().err.startswith(f"line 2: duplicate_custom_id: {DUPLICATE}\n")
    assert api.exchanges == []


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


FUZZED_RESULTS = [
    long_result("a1"),
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
        Path("results.jsonl").write_bytes(fuzzed_lines(chance, chance.choices(FUZZED_RESULTS, k=6)))
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
