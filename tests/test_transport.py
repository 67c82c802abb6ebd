"""The API: errors, retries, outages, secrets, the log, and every HTTP exchange made to fail in turn."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from builders import (
    CREATE,
    IDS,
    KEY,
    LEFT_BEHIND,
    OUT,
    ROOT,
    RUN,
    Capture,
    Environment,
    FakeTime,
    Json,
    Tool,
    asked,
    assert_out,
    assert_paid_once,
    assert_results,
    assert_run_once,
    done_batch,
    error,
    exchanges_of,
    file_size_limit,
    fresh_api,
    in_short,
    jsonl,
    log_text,
    long_result,
    main,
    release,
    request,
    requests_file,
    run,
    success,
    warning,
    write_requests,
)
from faulty_api import Exchange, Fault, FaultyAPI

import batch_tool

OPENAPI = ROOT.parent / "shared" / "data" / "openapi.batch.json"


def assert_clear_end(exit_code: int, err: str) -> None:
    """It ended well, or with one clear line, and without secrets."""
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if ": error: " in line]
    assert (exit_code, len(errors)) in ((0, 0), (1, 1)), err
    assert err.splitlines()[-1:] == errors or not errors
    assert KEY not in err
    assert all(KEY not in log.read_text() for log in Path("logs").iterdir())
    assert set(os.listdir()) <= LEFT_BEHIND


# ---- text ----


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


# ---- the API ----


def test_without_a_key_nothing_is_asked(
    api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin-0123456789abcdef")  # which the SDK would take in its place
    assert tool("list") == 1
    reason = "OPENAI_API_KEY is not set; export it with the key of your OpenAI project"
    assert capsys.readouterr() == ("", error(reason))
    assert api.exchanges == []


def test_a_key_with_blanks_around_it_is_trimmed(api: FaultyAPI, tool: Tool, monkeypatch: Environment) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\r\n")
    assert tool("list") == 0
    assert api.exchanges[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("char", ["\n", "\x1b", "\x7f", "é", "\u200b"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(
    char: str, api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY[:9]}{char}{KEY[9:]}")
    assert tool("list") == 1
    assert capsys.readouterr() == ("", error("OPENAI_API_KEY contains control or non-ASCII characters; set it again"))
    assert api.exchanges == []


def test_organization_and_project_are_sent(api: FaultyAPI, tool: Tool, monkeypatch: Environment) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1\n")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    assert tool("list") == 0
    headers = api.exchanges[0].headers
    assert (headers["openai-organization"], headers["openai-project"]) == ("org-1", "proj-1")


def test_an_organization_that_no_header_can_carry_is_one_line(
    api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "é")
    assert tool("list") == 1
    assert capsys.readouterr().err == error("OPENAI_ORG_ID contains control or non-ASCII characters; set it again")


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://x", "http://", "http://[::1", "http://h:99999/v1", "http://a b/v1", "http://é/v1",
            "http://.../v1", "http://h/\x1b", "http://" + "a" * 70 + "/v1"]
)
def test_a_malformed_base_url_is_one_line(
    url: str, api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    assert tool("list") == 1
    reason = "OPENAI_BASE_URL is not a URL like https://api.openai.com/v1; set it again or unset it"
    assert capsys.readouterr() == ("", error(reason))


def test_an_unreachable_server_is_named_without_its_password(
    api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://me:pass%40word@127.0.0.1:1/v1")
    assert tool("list") == 1
    _, err = capsys.readouterr()
    assert err == error("cannot reach http://127.0.0.1:1/v1/: [Errno 111] Connection refused")
    assert "pass%40word" not in log_text()
    assert "pass@word" not in log_text()


def test_a_dead_proxy_is_named_without_its_password(
    api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "http://me:passphrase@127.0.0.1:1")
            assert tool("list") == 1
        assert capsys.readouterr().err == error(
            f"cannot reach {api.base_url}/ through the proxy http://127.0.0.1:1: [Errno 111] Connection refused"
        )


def test_a_certificate_that_is_not_trusted_names_the_variable(monkeypatch: Environment) -> None:
    import httpx2
    import openai

    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    failure = openai.APIConnectionError(request=httpx2.Request("GET", "https://x/v1"))
    failure.__cause__ = httpx2.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    told = batch_tool.to_api_error(failure, "LIST_BATCHES", "https://x/v1")
    assert str(told) == (
        "cannot reach https://x/v1: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed; if your network has "
        "certificates of its own, name their file in SSL_CERT_FILE"
    )


def test_a_422_is_told_in_words(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    detail = [{"type": "missing", "loc": ["body", "file", 0], "msg": "Field required"}, {"loc": None, "msg": "Odd"}]
    api.faults.append(Fault("POST", "/files$", status=422, body=json.dumps({"detail": detail}).encode()))
    assert tool("create", "--in", requests_file()) == 1
    assert capsys.readouterr().err == error("UPLOAD: HTTP 422: body.file.0: Field required; Odd")


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("HTTPS_PROXY", "foo://me:password@x", "Unknown scheme for proxy URL"),
        ("HTTPS_PROXY", "http://[::", "Invalid port"),
        ("SSL_CERT_FILE", "/nonexistent", "No such file or directory"),
    ],
)
def test_an_environment_that_makes_no_client_is_one_line(
    name: str, value: str, words: str, api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv(name, value)
    assert tool("list") == 1
    _, err = capsys.readouterr()
    assert err.startswith("batch_tool.py: error: cannot set up the API client: ")
    assert words in err
    assert err.endswith("; check the proxy and certificate variables\n")
    assert err.count("\n") == 1
    assert "password" not in err


def test_a_refused_key_is_named_and_hidden(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
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
        {"status": 200, "body": b"[" * 100_000},
        {"status": 200, "body": b"\xff" * 10, "headers": {"Content-Encoding": "gzip"}},
    ],
    ids=in_short,
)
def test_a_request_without_a_usable_answer_is_made_again_and_three_times_at_most(
    fault: Json, api: FaultyAPI, tool: Tool, capsys: Capture
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


def test_a_server_that_dies_while_answering_is_named(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("GET", times=9, action="reset"))
    assert tool("list") == 1
    reason = f"LIST_BATCHES: no response from {api.base_url}/: [Errno 104] Connection reset by peer"
    assert capsys.readouterr().err == error(reason)


def test_a_rate_limit_is_waited_out_as_the_server_says(
    api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=429, times=2, headers={"Retry-After": "200"}, message="Slow down"))
    assert tool("list") == 0
    assert clock.naps == [200, 200]
    reason = "LIST_BATCHES: HTTP 429: Slow down (rate_limit_exceeded); trying again in 200 s"
    assert capsys.readouterr().err == warning(reason) * 2


def test_a_rate_limit_with_a_date_is_waited_out(api: FaultyAPI, tool: Tool, clock: FakeTime) -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    api.faults.append(Fault("GET", status=429, headers={"Retry-After": date}))
    assert tool("list") == 0
    (nap,) = clock.naps
    assert 55 < nap <= 60


@pytest.mark.parametrize("header", ["nan", "inf", "-5", "soon", "0", "", f"Mon, 01 Jan 2024 00:00:00 +{'9' * 20}"])
def test_a_senseless_retry_after_is_not_obeyed(header: str, api: FaultyAPI, tool: Tool, clock: FakeTime) -> None:
    api.faults.append(Fault("GET", status=429, headers={"Retry-After": header}))
    assert tool("list") == 0
    assert clock.naps == [0.5]


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("charset", ["utf-16", "idna", "undefined"])
def test_an_answer_in_a_charset_that_it_is_not_in_is_no_answer(
    charset: str, status: int, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    headers = {"content-type": f"text/html; charset={charset}"}
    api.faults.append(Fault("GET", times=3, status=status, body=b"<html>Bad gateway", headers=headers))
    assert tool("status", "--batch-id", "batch_1") == 1
    err = capsys.readouterr().err
    assert err.startswith("batch_tool.py: error: batch_1: GET_STATUS: ")
    assert f"{api.base_url}/" in err


def test_fields_that_no_batch_has_are_kept_and_do_no_harm(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    body = {"id": "b1", "status": "in_progress", "_fields_set": 5, "self": 1, "new": {"deep": [None]}}
    api.faults.append(Fault("GET", status=200, body=json.dumps(body).encode()))
    assert tool("status", "--batch-id", "b1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == body


@pytest.mark.parametrize(
    "seconds, naps, advice",
    [
        ("250", [250, 250], ""),
        ("601", [], "; it asks to wait 11 minutes"),
        ("1", [1, 1, 2, 4, 8, 16, 32, *[60] * 8], ""),
    ],
)
def test_a_rate_limit_is_waited_out_ten_minutes_at_most(
    seconds: str, naps: list[float], advice: str, api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=429, times=99, headers={"Retry-After": seconds}, message="Slow down"))
    assert tool("list") == 1
    assert clock.naps == naps
    *warnings, last = capsys.readouterr().err.splitlines(keepends=True)
    reason = "LIST_BATCHES: HTTP 429: Slow down (rate_limit_exceeded)"
    assert warnings == [warning(f"{reason}; trying again in {nap} s") for nap in naps]
    assert last == error(reason + advice)


def test_a_pause_is_shown_in_whole_seconds_but_never_as_none(
    api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=429, message="Slow down"))
    assert tool("list") == 0
    assert clock.naps == [0.5]
    assert capsys.readouterr().err.endswith("; trying again in 1 s\n")


def test_a_used_up_quota_is_not_a_rate_limit(api: FaultyAPI, tool: Tool, clock: FakeTime, capsys: Capture) -> None:
    api.faults.append(Fault("GET", status=429, times=9, code="insufficient_quota", message="Pay first."))
    assert tool("list") == 1
    assert clock.naps == []
    assert capsys.readouterr().err == error("LIST_BATCHES: HTTP 429: Pay first. (insufficient_quota)")


@pytest.mark.parametrize("size", [100, 1_000_000], ids=["short", "5 MB"])
def test_an_answer_that_is_a_page_is_shown_in_part_and_on_one_line(
    size: int, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    page = b"<html>\n<body>\x1b[31m Not  here\n" + b"word " * size
    api.faults.append(Fault("GET", status=403, body=page, headers={"Content-Type": "text/html"}))
    assert tool("list") == 1
    _, err = capsys.readouterr()
    assert err.startswith(r"batch_tool.py: error: LIST_BATCHES: HTTP 403: <html> <body>\u001b[31m Not here word word ")
    assert err.endswith("word …\n")
    assert (err.count("\n"), len(err) < 300) == (1, True)


def test_a_long_error_code_is_shortened(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("GET", status=403, message="No", code="c" * 5000))
    assert tool("list") == 1
    assert capsys.readouterr().err == error(f"LIST_BATCHES: HTTP 403: No ({'c' * 200} …)")


def test_a_message_of_3_mb_is_shortened(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("GET", status=403, message="No way. " * 400_000))
    assert tool("list") == 1
    _, err = capsys.readouterr()
    assert err.startswith("batch_tool.py: error: LIST_BATCHES: HTTP 403: No way. No way. ")
    assert err.endswith(" … (forbidden)\n")
    assert len(err) < 300


@pytest.mark.parametrize("base", ["", "/v2", "/v1/v1"])
def test_an_endpoint_that_is_missing_names_the_base_url(
    base: str, api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
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
def test_an_endpoint_that_a_service_lacks_is_named_with_the_base_url(
    status: int, body: bytes, words: str, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=status, body=body))
    assert tool("status", "--batch-id", "b") == 1
    reason = f"b: GET_STATUS: HTTP {status}: {words}; is {api.base_url}/ the base URL of the API?"
    assert capsys.readouterr() == ("", error(reason))


@pytest.mark.parametrize("body", [{"detail": "Batch b not found"}, {"error": "Batch b not found"},
                                  {"error": {"message": "Batch b not found"}}], ids=in_short)
def test_a_batch_that_is_unknown_does_not_make_the_base_url_doubtful(
    body: Json, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", status=404, body=json.dumps(body).encode()))
    assert tool("status", "--batch-id", "b") == 1
    assert capsys.readouterr() == ("", error("b: GET_STATUS: HTTP 404: Batch b not found"))


@pytest.mark.parametrize("location", ["http://localhost:{port}/v1/batches", "http://127.0.0.1:{other}/v1/batches",
                                      "https://127.0.0.1:{port}/v1/batches", "//localhost:{port}/v1/batches"])
def test_a_redirect_to_another_server_is_not_followed(
    location: str, api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    with FaultyAPI() as other:
        other.new_batch("completed")
        headers = {"Location": location.format(port=api.port, other=other.port)}
        api.faults.append(Fault("GET", status=307, headers=headers, body=b""))
        assert tool("list") == 1
        assert (len(api.exchanges), other.exchanges) == (1, [])
    reason = "LIST_BATCHES: HTTP 307: this redirect is not followed"
    assert capsys.readouterr() == ("", error(f"{reason}; is {api.base_url}/ the base URL of the API?"))


@pytest.mark.parametrize("location", ["http://[", "/v1/batches"], ids=ascii)
def test_a_redirect_to_nowhere_is_one_line(location: str, api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    api.faults.append(Fault("GET", status=302, headers={"Location": location}, times=9))
    assert tool("list") == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.startswith("batch_tool.py: error: LIST_BATCHES: ")) == ("", 1, True)


def test_verbose_shows_each_response(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    assert tool("list", "--verbose") == 0
    name, _, shown = capsys.readouterr().err.partition(": ")
    assert (name, json.loads(shown)) == ("LIST_BATCHES", api.exchanges[0].answer_json)


# ---- patience ----


def test_one_look_at_each_batch_an_interval(api: FaultyAPI) -> None:
    api.hold = "in_progress"
    write_requests("a1", "a2", "a3")
    time = FakeTime(at={45: release(api)})
    assert run("--max-requests", "1", time=time) == 0
    assert time.now == 50
    looks = Counter(exchange.path for exchange in api.exchanges if exchange.path.startswith("/v1/batches/"))
    assert looks == {f"/v1/batches/{batch_id}": 5 for batch_id in api.batches}


CALLS = {
    "upload": ("POST", "/files$"),
    "listing": ("GET", "/batches$"),
    "poll": ("GET", "/batches/batch_"),
    "size": ("GET", "/files/[^/]+$"),
    "download": ("GET", "/content$"),
}
TROUBLES: dict[str, dict[str, Any]] = {
    "503 for 1.5 s": {"status": 503, "times": 3},
    "one 403": {"status": 403},
    "900 s": {"status": 429, "headers": {"retry-after": "900"}},
}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("call", CALLS)
def test_a_trouble_of_any_call_is_outlived(api: FaultyAPI, call: str, trouble: str) -> None:
    method, path = CALLS[call]
    api.faults = [Fault(method, path, skip=call == "listing", **TROUBLES[trouble])]
    content = write_requests("a1")
    assert run() == 0
    assert_paid_once(api, content)
    assert_out(api)


@pytest.mark.parametrize("call", ["listing", "poll", "download"])
def test_an_hour_without_an_answer_ends_it(
    api: FaultyAPI, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    method, path = CALLS[call]
    api.faults = [Fault(method, path, skip=1 if call in ("listing", "poll") else 0, times=10_000, status=503)]
    api.hold = "in_progress"
    content = write_requests("a1")
    time = FakeTime(at={350: release(api)})
    assert run("--interval", "100", time=time) == 1
    assert 3500 < time.now < 4500
    assert "HTTP 503" in capsys.readouterr().err.splitlines()[-1]
    api.faults = []
    assert run() == 0
    assert_paid_once(api, content)


@pytest.mark.parametrize(("call", "status"), [("upload", 401), ("poll", 403), ("download", 401)])
def test_three_denials_are_fatal(api: FaultyAPI, call: str, status: int) -> None:
    api.faults = [Fault(*CALLS[call], times=3, status=status)]
    content = write_requests("a1")
    assert run() == 1
    assert not OUT.exists()
    assert run() == 0
    assert_paid_once(api, content)


def test_a_404_right_after_the_creation_is_outlived(api: FaultyAPI) -> None:
    api.faults = [Fault("GET", "/batches/batch_", times=3, status=404, message="No such batch")]
    content = write_requests("a1")
    assert run() == 0
    assert_paid_once(api, content)


def test_a_404_of_a_batch_that_is_not_new_ends_the_run(api: FaultyAPI) -> None:
    api.hold = "in_progress"
    api.faults = [Fault("GET", "/batches/batch_", skip=15, times=100, status=404, message="No such batch")]
    write_requests("a1")
    assert run(time=FakeTime()) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_polls_outlive_an_outage_of_some_minutes(api: FaultyAPI, status: int) -> None:
    api.hold = "in_progress"
    api.faults = [Fault("GET", "/batches/batch_", skip=1, times=20, status=status)]
    content = write_requests("a1")
    assert run(time=FakeTime(at={235: release(api)})) == 0
    assert_paid_once(api, content)


def test_an_answer_about_another_batch_is_no_answer(api: FaultyAPI) -> None:
    other = api.new_batch("completed")
    api.faults = [Fault("GET", "/batches/batch_", body=json.dumps(other.as_json()).encode(), status=200)]
    write_requests("a1")
    assert run() == 0
    assert_out(api)


# ---- retries, as a table ----

Failure = batch_tool.ApiError
LIMITED = batch_tool.Refused("", 429)
DENIED = batch_tool.Refused("", 403)
RETRY_TABLE: dict[str, tuple[Mapping[str, Any], Failure, list[float | None]]] = {
    "lost": ({}, batch_tool.OutcomeUnknown("", 503), [0.5, 1, None]),
    "lost, once": ({"tries": 1}, batch_tool.OutcomeUnknown("", 503), [None]),
    "lost, not to be repeated": ({"repeat_lost": False}, batch_tool.OutcomeUnknown("", 503), [None]),
    "never sent": ({"repeat_lost": False}, batch_tool.NotSent(""), [0.5, 1, None]),
    "a conflict": ({"outage_budget": 3600}, batch_tool.OutcomeUnknown("", 409), [None]),
    "an outage": (
        {"outage_budget": 180}, batch_tool.OutcomeUnknown(""), [0.5, 1, 2, 4, 8, 16, 32, 60, 56.5, None],
    ),
    "an outage with a long Retry-After": (
        {"outage_budget": 3600}, batch_tool.OutcomeUnknown("", 503, (), 7200), [3600, None],
    ),
    "a wrong size in an outage": ({"outage_budget": 3600}, batch_tool.WrongSize(""), [0.5, 1, None]),
    "a refusal": ({"outage_budget": 3600}, batch_tool.Refused("", 404), [None]),
    "denied": ({}, DENIED, [None]),
    "denied in a run": ({"outage_budget": 3600}, DENIED, [0.5, 1, None]),
    "denied at a poll of a run": ({"outage_budget": 3600}, DENIED, [0.5, 1, None]),
    "rate limit": ({"rate_limit_budget": 6}, LIMITED, [0.5, 1, 2, None]),
    "rate limit with a long pause": ({}, batch_tool.Refused("", 429, (), 400), [400, None]),
    "rate limit with too long a pause": ({}, batch_tool.Refused("", 429, (), 900), [None]),
    "refusal that asks for a day": ({"outage_budget": 3600}, batch_tool.Refused("", 403, (), 86400), [600, 600, None]),
    "rate limit in a run": ({"outage_budget": 3600}, batch_tool.Refused("", 429, (), 900), [900, 900, 900, 900, None]),
    "rate limit that says next to nothing": ({}, batch_tool.Refused("", 429, (), 0.001), [0.5, 1, 2, 4, 8, 16, 32, 60]),
    "quota used up": ({"outage_budget": 3600}, batch_tool.Refused("", 429, ("insufficient_quota",)), [None]),
}


@pytest.mark.parametrize("case", RETRY_TABLE)
def test_pauses_by_a_table(case: str) -> None:
    options, failure, pauses = RETRY_TABLE[case]
    retry = batch_tool.Retry(**options)
    assert [retry.pause_after(failure) for _ in pauses] == pauses


def test_lost_responses_in_an_outage_leave_three_tries_for_wrong_sizes() -> None:
    retry = batch_tool.Retry(outage_budget=3600)
    failures = [batch_tool.OutcomeUnknown("", 503)] * 4 + [batch_tool.WrongSize("")] * 3
    assert [retry.pause_after(failure) for failure in failures] == [0.5, 1, 2, 4, 8, 16, None]


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


def assert_it_recovers(api: FaultyAPI, command: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """The command ends well or with a clear error, in which case it ends well when run again."""
    exit_code = main(*command)
    assert_clear_end(exit_code, capfd.readouterr().err)
    api.faults.clear()
    if exit_code:
        assert main(*command) == 0
    if command is RUN:
        assert_results("results.jsonl", IDS)
        assert_run_once(api, IDS, Counter(["a2"]))
    else:
        assert_run_once(api, IDS)


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
    exchanges = exchanges_of(RUN, monkeypatch)
    kinds = {(each.method, re.sub("(batch_|file-)[0-9a-f]+", "ID", each.path)): nth for nth, each in exchanges.items()}
    for (method, _), nth in kinds.items():  # the last one of each kind
        with fresh_api(monkeypatch) as api:
            fault = LOST_ANSWERS["504 after"] if method == "POST" else ANSWERS["reset"]
            api.faults = [Fault(skip=nth, times=12, **fault)]
            assert_it_recovers(api, RUN, capfd)


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
        assert main(*RUN) == 0
        for status in ("validating", "failed", "expired", "cancelled"):
            batch_id = api.new_batch(status, output=long_result("a1"), errors=b"{}\n").id
            main("cancel", "--batch-id", batch_id)
            main("status", "--batch-id", batch_id)
        api.faults = [Fault("POST", "/batches$", status=400)]
        write_requests("b1")
        assert main(*CREATE) == 1  # which deletes the uploaded file
        Path("requests.jsonl").write_bytes(jsonl(request("b1", body={"input": "Bio"})))
        assert main(*RUN) == 1
        assert main("list") == 0
        assert {exchange.method for exchange in api.exchanges} == {"GET", "POST", "DELETE"}
        known = [exchange for exchange in api.exchanges if "/models/" not in exchange.path]  # of another document
        assert [found for exchange in known for found in exchange_violations(exchange, document)] == []


# ---- log ----


def test_the_log_is_in_logs_by_the_time_and_readable_by_its_owner_alone(api: FaultyAPI, tool: Tool) -> None:
    assert tool("list") == 0
    (path,) = Path("logs").iterdir()
    assert re.fullmatch(r"batch_\d{8}_\d{6}\.log", path.name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_log_can_be_elsewhere_and_grows(api: FaultyAPI, tool: Tool) -> None:
    Path("deep").mkdir()
    Path("deep/my.log").write_text("before\n")
    Path("deep/my.log").chmod(0o644)
    assert tool("list", "--log-file", "deep/my.log") == 0
    assert Path("deep/my.log").read_text().startswith("before\n")
    assert stat.S_IMODE(Path("deep/my.log").stat().st_mode) == 0o600
    assert not Path("logs").exists()


def test_every_operation_is_logged_with_its_request_and_its_response(api: FaultyAPI, tool: Tool) -> None:
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


def test_an_error_is_logged_with_its_stack_on_one_line(api: FaultyAPI, tool: Tool) -> None:
    api.faults.append(Fault("GET", status=403, message="First\nsecond\x1b[31m\x85\u2028"))
    assert tool("list") == 1
    lines = log_text().split("\n")
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|ERROR) \w+ ", line) for line in lines[:-1])
    (found,) = [line for line in lines if " ERROR " in line]
    assert r" ERROR LIST_BATCHES error LIST_BATCHES: HTTP 403: First second\u001b[31m (forbidden)\nTraceback " in found


@pytest.mark.parametrize("limit", [400, 900, 1400, 2200])
def test_an_answer_is_shown_although_the_log_cannot_grow(
    limit: int, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    """The disk is full after so many bytes of the log. What was paid for is shown, and nothing more is sent."""
    requests_file()
    with file_size_limit(limit):
        assert tool("preview", "--in", "requests.jsonl", "--log-file", "log") == 1
    out, err = capsys.readouterr()
    assert err.endswith(error("cannot write the log log: File too large; choose another with --log-file"))
    assert out.count("a made-up bio") == len(api.answered)


@pytest.mark.parametrize(
    "path, reason",
    [(".", "open the log .: Is a directory; choose another with --log-file"),
     ("/dev/null/x", "open the log /dev/null/x: File exists; choose another with --log-file"),
     ("/dev/full", "write the log /dev/full: No space left on device; choose another with --log-file")],
)
def test_a_log_that_cannot_be_written_ends_the_command_before_any_request(
    path: str, reason: str, api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    requests_file()
    assert tool("create", "--in", "requests.jsonl", "--log-file", path) == 1
    assert capsys.readouterr() == ("", error(f"cannot {reason}"))
    assert api.exchanges == []


def test_the_log_is_not_written_through_a_link_in_its_place(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
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
    fault: Json, options: list[str], api: FaultyAPI, tool: Tool, capsys: Capture
) -> None:
    api.faults.append(Fault("GET", **fault))
    tool("status", "--batch-id", "b", *options)
    out, err = capsys.readouterr()
    for said in (out, err, log_text()):
        assert KEY[:12] not in said
    if "--json" in options and out:
        json.loads(out)


def test_a_key_of_any_shape_is_hidden_from_eight_characters_on(
    api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
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


def test_result_files_are_kept_byte_for_byte(api: FaultyAPI, tool: Tool) -> None:
    output = jsonl(success("a1", f"Bearer {KEY}\x1b"))
    done_batch(api, output=output)
    assert tool("retrieve", "--batch-id", "batch_1") == 0
    assert Path("results_batch_1.jsonl").read_bytes() == output


@pytest.mark.parametrize("around", ["x\n{}", "a%20{}", "Bearer\t{}", "x\u0085{}", "({})"], ids=ascii)
def test_a_secret_is_hidden_also_behind_an_escape(around: str, api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    secret = "sk-proj-ABCDEFGHIJKLMNOPQRSTUV"
    batch = api.new_batch("in_progress", metadata={"note": around.format(secret)})
    assert tool("status", "--verbose", "--json", "--batch-id", batch.id) == 0
    out, err = capsys.readouterr()
    assert "ABCDEFGHIJ" not in out + err + log_text()
    assert json.loads(out)["id"] == batch.id


@pytest.mark.parametrize(("password", "shown"), [("1", "1"), ("long-enough", "[secret]")])
def test_a_short_password_in_the_url_does_not_garble_the_results(
    password: str, shown: str, work: Path, monkeypatch: Environment
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://user:{password}@127.0.0.1:9/v1")
    assert batch_tool.base_url() == f"http://user:{password}@127.0.0.1:9/v1"
    assert batch_tool.hide_secrets(f"artist {password}") == f"artist {shown}"
