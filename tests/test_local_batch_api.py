"""The mock server, and its faults: what no test of the scripts would notice if it were wrong."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import faulty_api
import local_batch_api
import pytest
from faulty_api import HABITS, Fault, FaultyAPI


@pytest.fixture
def api() -> Iterator[FaultyAPI]:
    with FaultyAPI() as server:
        yield server


def request_line(custom_id: str, url: str = "/v1/responses", model: str = "m") -> bytes:
    body = {"model": model, "input": f'"Björk" {custom_id}'}
    if url != "/v1/responses":
        body = {"model": model, "messages": [{"role": "user", "content": body["input"]}]}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).encode() + b"\n"


def ask(api: FaultyAPI, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any, Any]:
    """The status, the content and the headers of the answer."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    request = urllib.request.Request(api.base_url + path, data, {"authorization": "Bearer k", **(headers or {})})
    request.method = method
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            status, content, head = answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        status, content, head = error.code, error.read(), error.headers
    with_json = head["content-type"] == "application/json"
    return status, json.loads(content) if with_json else content, head


def get(api: FaultyAPI, path: str) -> Any:
    return ask(api, "GET", path)[1]


def create(api: FaultyAPI, *lines: bytes, url: str = "/v1/responses", **more: Any) -> str:
    """The id of a new batch of these lines."""
    file_id = api.new_file(b"".join(lines), "batch", "requests.jsonl").id
    body = {"input_file_id": file_id, "endpoint": url, "completion_window": "24h", **more}
    return str(ask(api, "POST", "/batches", body)[1]["id"])


def results(api: FaultyAPI, batch_id: str, name: str = "output_file_id") -> bytes:
    return api.read_file(get(api, f"/batches/{batch_id}")[name])


# ---- uploads ----


@pytest.mark.parametrize("last", [b"x", b"x\n", b"x\r\n", b"x\r", b"", b"\r\n--", b"x" * (256 * 1024 - 1)], ids=repr)
@pytest.mark.parametrize("file_first", [True, False])
def test_an_upload_is_stored_byte_for_byte(api: FaultyAPI, last: bytes, file_first: bool) -> None:
    content = b"a\r\n--b\n\r\n" + last
    parts = [
        b'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + content,
        b'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch',
    ]
    body = b"".join(b"--b0\r\n" + part + b"\r\n" for part in (parts if file_first else parts[::-1])) + b"--b0--\r\n"
    status, file, _ = ask(api, "POST", "/files", body, {"content-type": "multipart/form-data; boundary=b0"})
    assert (status, file["filename"], file["bytes"]) == (200, "a.jsonl", len(content))
    assert api.read_file(file["id"]) == content


@pytest.mark.parametrize("name", ["requests.txt", "stdin", "requests.jsonl.gz", "JSONL"])
def test_an_upload_of_another_name_is_refused(api: FaultyAPI, name: str) -> None:
    parts = [f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n\r\nx\r\n',
             'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n']
    body = "".join(f"--b0\r\n{part}" for part in parts) + "--b0--\r\n"
    status, answer, _ = ask(api, "POST", "/files", body.encode(), {"content-type": "multipart/form-data; boundary=b0"})
    message = "Invalid file format for Batch API. Must be .jsonl"
    assert (status, answer["error"]["message"], api.files) == (400, message, {})


def test_a_form_that_breaks_off_is_refused(api: FaultyAPI) -> None:
    body = b'--b0\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\nx'
    status, _, _ = ask(api, "POST", "/files", body, {"content-type": "multipart/form-data; boundary=b0"})
    assert (status, api.files) == (400, {})


# ---- habits ----


def test_the_description_lists_the_habits() -> None:
    _, _, habits = (faulty_api.__doc__ or "").partition("can be combined:")
    listed = re.findall(r"^    ([a-z0-9-]+)  ", habits, re.MULTILINE)
    assert listed == list(HABITS)


def test_results_can_lack_their_last_line_end_and_hold_strings(api: FaultyAPI) -> None:
    api.habits = {"no-final-newline", "string-bodies"}
    output = results(api, create(api, request_line("a1"), request_line("a2")))
    assert (output.count(b"\n"), output[-1:]) == (1, b"}")
    bodies = [json.loads(json.loads(line)["response"]["body"]) for line in output.splitlines()]
    texts = {body["output"][1]["content"][0]["text"].partition(":")[0] for body in bodies}
    assert texts == {'"Björk" a1', '"Björk" a2'}


@pytest.mark.parametrize(("outcome", "empty"), [("200", "error_file_id"), ("500", "output_file_id")])
def test_both_files_can_always_be_there(api: FaultyAPI, outcome: str, empty: str) -> None:
    api.habits, api.outcomes["a1"] = {"both-files", "no-final-newline"}, outcome
    assert results(api, create(api, request_line("a1")), empty) == b""


def test_a_batch_can_look_different(api: FaultyAPI) -> None:
    api.habits = {"upper-case", "no-metadata", "short-endpoint"}
    batch_id = create(api, request_line("a1"), metadata={"a": "b"})
    shown, (listed,) = get(api, f"/batches/{batch_id}"), get(api, "/batches")["data"]
    assert (shown["status"], shown["metadata"], shown["endpoint"]) == ("COMPLETED", None, "/v1/responses")
    assert listed == shown | {"endpoint": "/responses"}


@pytest.mark.parametrize(("habit", "size"), [("no-bytes", None), ("zero-bytes", 0)])
def test_a_file_can_hide_its_size(api: FaultyAPI, habit: str, size: int | None) -> None:
    api.habits = {habit}
    assert get(api, f"/files/{api.new_file(b'x', 'batch', 'x').id}").get("bytes") == size


def test_endpoints_can_be_absent(api: FaultyAPI) -> None:
    file_id = api.new_file(b"x", "batch", "x").id
    api.habits = {"no-file-info", "no-delete", "no-models"}
    assert ask(api, "GET", f"/files/{file_id}")[:2] == (404, {"detail": "Not Found"})
    assert ask(api, "DELETE", f"/files/{file_id}")[:2] == (405, {"detail": "Method Not Allowed"})
    assert ask(api, "GET", "/models/local-dead")[:2] == (404, {"detail": "Not Found"})
    assert ask(api, "GET", f"/files/{file_id}/content")[:2] == (200, b"x")


def test_the_output_file_can_come_late(api: FaultyAPI) -> None:
    api.habits = {"late-output"}
    path = f"/batches/{create(api, request_line('a1'))}"
    looks = [get(api, path) for _ in range(4)]
    assert [look["request_counts"]["completed"] for look in looks] == [1] * 4
    assert [bool(look["output_file_id"]) for look in looks] == [False, False, True, True]


def test_pages_can_repeat_or_say_nothing_of_more(api: FaultyAPI) -> None:
    newest, middle, oldest = [api.new_batch("completed", created_at=number).id for number in (3, 2, 1)]
    page = get(api, f"/batches?limit=1&after={newest}")
    assert ([batch["id"] for batch in page["data"]], page["has_more"]) == ([middle], True)
    assert get(api, f"/batches?limit=1&after={middle}")["has_more"] is False
    api.habits = {"ignores-after"}
    page = get(api, f"/batches?limit=1&after={oldest}")
    assert ([batch["id"] for batch in page["data"]], page["has_more"]) == ([newest], True)
    api.habits = {"no-has-more"}
    assert "has_more" not in get(api, "/batches?limit=1")


# ---- faults ----


def test_a_post_can_be_carried_out_later(api: FaultyAPI) -> None:
    api.faults = [Fault("POST", "/batches$", when="later", status=504)]
    file_id = api.new_file(request_line("a1"), "batch", "x").id
    body = {"input_file_id": file_id, "endpoint": "/v1/responses", "completion_window": "24h"}
    assert (ask(api, "POST", "/batches", body)[0], api.batches) == (504, {})
    assert (api.carry_out(), api.carry_out()) == ([200], [])
    assert [batch.input_file_id for batch in api.batches.values()] == [file_id]


@pytest.mark.parametrize(("deleted", "made"), [(False, 1), (True, 0)])
def test_a_late_post_can_carry_itself_out_if_its_file_is_still_there(
    api: FaultyAPI, deleted: bool, made: int
) -> None:
    api.faults = [Fault("POST", "/batches$", when="later", action="reset", seconds=0.05)]
    with pytest.raises(OSError, match="reset"):
        create(api, request_line("a1"))
    if deleted:
        api.files.clear()
    time.sleep(0.15)
    assert (len(api.batches), api.postponed) == (made, [])


def test_a_batch_fails_if_its_input_file_is_deleted_before_it_is_validated(api: FaultyAPI) -> None:
    api.hold = "validating"
    lost = create(api, request_line("a1"))
    api.files.clear()
    api.hold = "in_progress"
    (error,) = get(api, f"/batches/{lost}")["errors"]["data"]
    assert error["code"] == "invalid_request"
    assert api.batches[lost].input_file_id in error["message"]
    running = create(api, request_line("a2"))
    assert get(api, f"/batches/{running}")["status"] == "in_progress"
    ask(api, "DELETE", f"/files/{api.batches[running].input_file_id}")
    api.hold = None
    assert (get(api, f"/batches/{running}")["status"], api.executions) == ("completed", {"a2": 1})


def test_an_answer_can_drip(api: FaultyAPI) -> None:
    api.faults = [Fault("GET", action="drip", seconds=0.0005)]
    assert ask(api, "GET", "/batches")[:2] == (200, get(api, "/batches"))
    assert (api.dripping, api.faults[0].seen) == (0, 2)


def test_a_stopped_server_and_a_client_that_left_end_the_drip() -> None:
    with FaultyAPI() as api:
        api.faults = [Fault(action="drip", seconds=0.2)]
        with pytest.raises(OSError, match="timed out"):
            urllib.request.urlopen(f"{api.base_url}/batches", timeout=0.05)
    assert api.dripping


def test_a_redirect_is_an_answer(api: FaultyAPI) -> None:
    api.faults = [Fault("GET", "/batches$", status=301, headers={"location": f"{api.base_url}/models/m"})]
    status, model, headers = ask(api, "GET", "/batches")
    assert (status, model["id"], headers["retry-after-ms"]) == (200, "m", None)


def test_the_servers_clock_can_be_wrong(api: FaultyAPI) -> None:
    api.clock_offset = 86400
    batch_id = create(api, request_line("a1"))
    _, batch, headers = ask(api, "GET", f"/batches/{batch_id}")
    for moment in (batch["created_at"], batch["completed_at"], parsedate_to_datetime(headers["date"]).timestamp()):
        assert abs(moment - time.time() - 86400) < 5


# ---- money, models, answers ----


@pytest.mark.parametrize(
    ("outcome", "executed", "paid"),
    [("200", 1, 1), ("incomplete", 1, 1), ("refusal", 1, 1), ("content_filter", 1, 1), ("no_text", 1, 1),
     ("error_200", 1, 1), ("failed", 1, 0), ("500", 1, 0), ("expired", 0, 0), ("missing", 0, 0)],
)
def test_a_request_is_paid_for_if_a_model_has_answered(
    api: FaultyAPI, outcome: str, executed: int, paid: int
) -> None:
    line = request_line("a1")
    api.outcomes["a1"] = outcome
    get(api, f"/batches/{create(api, line)}")
    sha256 = hashlib.sha256(line.removesuffix(b"\n")).hexdigest()
    assert (api.executions["a1"], api.paid) == (executed, {sha256: 1} if paid else {})


def test_models_can_be_dying_or_dead(api: FaultyAPI) -> None:
    api.models["org/old"] = "2020-01-01"
    assert (get(api, "/models/m")["id"], get(api, "/models/m")["shutdown_date"]) == ("m", None)
    assert get(api, "/models/org%2Fold")["shutdown_date"] == "2020-01-01"
    assert get(api, "/models/local-dying")["shutdown_date"] > time.strftime("%Y-%m-%d")
    for status, answer, _ in (
        ask(api, "GET", "/models/local-dead"), ask(api, "POST", "/responses", {"model": "local-dead", "input": "x"})
    ):
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
    batch_id = create(api, request_line("a1", model="local-dead"))
    (error,) = get(api, f"/batches/{batch_id}")["errors"]["data"]
    assert (error["code"], error["line"]) == ("model_not_found", 1)


@pytest.mark.parametrize("url", ["/v1/responses", "/v1/chat/completions"])
@pytest.mark.parametrize("outcome", ["200", "incomplete", "content_filter", "refusal", "no_text", "error_200", "429"])
def test_an_answer_at_once_is_like_one_of_a_batch(api: FaultyAPI, url: str, outcome: str) -> None:
    def same(body: dict[str, Any]) -> str:
        return re.sub(r'"(id|created|created_at)": ("[^"]*"|\d+)', "", json.dumps(body | {"usage": None}))

    line = request_line("a1", url)
    body = json.loads(line)["body"]
    api.outcomes["a1"], api.answers = outcome, [outcome]
    status, answer, _ = ask(api, "POST", url.removeprefix("/v1"), body)
    output = "error_file_id" if outcome == "429" else "output_file_id"
    response = json.loads(results(api, create(api, line, url=url), output))["response"]
    assert (status, same(answer)) == (response["status_code"], same(response["body"]))
    assert (api.answers, api.answered) == ([], [body])
    if usage := answer.get("usage"):
        assert usage.get("input_tokens", usage.get("prompt_tokens")) == len(json.dumps(body)) // 4


SCHEMA = {
    "type": "object",
    "properties": {
        "bio": {"type": "string"}, "born": {"type": ["null", "integer"]}, "share": {"type": "number"},
        "alive": {"type": "boolean"}, "genre": {"enum": ["pop", "rock"]}, "albums": {"type": "array", "items": {
            "type": "object", "properties": {"title": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}},
        "none": {"type": "null"},
    },
}
MADE_UP = {
    "bio": "Björk: made-up text for bio; no model was asked.", "born": 1, "share": 0.5, "alive": True, "genre": "pop",
    "albums": [{"title": "Björk: made-up text for title; no model was asked."}], "none": None,
}


def test_a_schema_is_answered_with_values_of_its_types(api: FaultyAPI) -> None:
    form = {"name": "bio", "strict": True, "schema": SCHEMA}
    body = {"model": "m", "input": "x", "metadata": {"artist_name": "Björk"}}
    answer = ask(api, "POST", "/responses", body | {"text": {"format": {"type": "json_schema", **form}}})[1]
    assert json.loads(answer["output"][1]["content"][0]["text"]) == MADE_UP
    body = {"model": "m", "messages": [{"role": "user", "content": "Björk"}]}
    answer = ask(api, "POST", "/chat/completions",
                 body | {"response_format": {"type": "json_schema", "json_schema": form}})[1]
    assert json.loads(answer["choices"][0]["message"]["content"]) == MADE_UP
    answer = ask(api, "POST", "/chat/completions", body | {"response_format": {"type": "text"}})[1]
    assert answer["choices"][0]["message"]["content"].startswith("Björk: a made-up bio")


# ---- the program ----


@pytest.mark.parametrize(
    "options",
    [("--fail-every", "0"), ("--step", "-1"), ("--port", "65536"), ("--fail", "2")],
    ids=" ".join,
)
def test_invalid_options_exit_2(options: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        local_batch_api.main(options)


def test_a_port_that_is_in_use_is_one_line(api: FaultyAPI, run: Callable[..., Any]) -> None:
    done = run("samples/local_batch_api.py", "--port", api.port)
    error = f"local_batch_api.py: error: port {api.port}: Address already in use; try another --port\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", error)


def test_the_program_serves_until_it_is_terminated() -> None:
    command = [sys.executable, local_batch_api.__file__, "--fail-every", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        url = server.stdout.readline().strip()
        request = urllib.request.Request(f"{url}/models/m", headers={"authorization": "Bearer k"})
        assert json.load(urllib.request.urlopen(request))["id"] == "m"
        server.terminate()
        assert server.wait(5) == 0
