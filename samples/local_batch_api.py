#!/usr/bin/env python3
"""Stand in for OpenAI's Files and Batches API on this machine: no key, no cost, no model.

    python samples/local_batch_api.py --port 8080
    export OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=local

Prints its base URL on stdout and answers on loopback until it is terminated; what was uploaded is then gone.
A batch spends --step seconds in each of validating, in_progress and finalizing. Results come in another order than
the requests, and every bio is made up and says so. What to ask for beyond that:

    --outcome a2=429                 request a2 fails with that HTTP status, whenever it is run
    --outcome a2=500,expired,200     one outcome each time it comes up in a batch, then success
    --fail-every 10                  every 10th request of a batch answers 500 the first time it is run
    --queue-limit 1000               a batch that would enqueue more requests fails: token_limit_exceeded

Outcomes: 200, any status from 400 to 599, and
    expired, cancelled, timeout      an error line without a response
    missing                          no line at all
    incomplete, refusal, failed      HTTP 200 without a whole answer ("failed": /v1/responses only, elsewhere a 500)

Exit codes: 0 terminated (SIGTERM, SIGINT, SIGHUP); 1 the port cannot be had; 2 invalid arguments.

Tests run it in process and can ask for more; see the attributes of LocalBatchAPI, and Fault:

    with LocalBatchAPI(step=0.1) as api:
        api.faults.append(Fault("POST", "/batches$", when="after", action="reset"))
        client = OpenAI(base_url=api.base_url, api_key="local")
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import random
import re
import secrets
import signal
import socket
import socketserver
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from email.message import Message
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qsl, urlsplit

HOST = "127.0.0.1"
CHUNK = 256 * 1024
DAY = 24 * 60 * 60
FILE_LIFE = 30 * DAY
ENDPOINTS = (
    "/v1/responses",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/completions",
    "/v1/moderations",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/videos",
)
PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data")
NEXT_STATUS = {
    "validating": "in_progress",
    "in_progress": "finalizing",
    "finalizing": "completed",
    "cancelling": "cancelled",
}
TERMINAL = {"completed", "failed", "expired", "cancelled"}
MAX_BATCH_ERRORS = 50
WINDOW = 1000  # requests in memory

SUCCESS = "200"
TEXTS = {
    SUCCESS: "@artist@: a made-up bio from the local stand-in; no model was asked.",
    "incomplete": "@artist@: a made-up bio from the",
    "refusal": "Refused, as asked at the local stand-in.",
    "failed": "Failed, as asked at the local stand-in.",
}
INPUT_TOKENS, OUTPUT_TOKENS = 120, 45
NO_RESPONSE = {
    "expired": ("batch_expired", "This request was not run before the completion window ended."),
    "cancelled": ("batch_cancelled", "This request was not run before the batch was cancelled."),
    "timeout": ("request_timeout", "This request ran out of time."),
}
ERROR_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 500: "server_error"}
ENDING_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

Json = dict[str, Any]


class Refusal(Exception):
    """An answer of 4xx, raised where the reason is known."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.envelope = error_envelope(status, message, param, code)


def error_envelope(status: int, message: str, param: str | None = None, code: str | None = None) -> Json:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def made_up_error(status: int) -> Json:
    phrase = http.client.responses.get(status, "unknown error")
    code = ERROR_CODES.get(status, phrase.lower().replace(" ", "_"))
    return error_envelope(status, f"{phrase} (asked for at the local stand-in).", code=code)


# ---- what goes over the wire ----


class Answer(NamedTuple):
    status: int
    body: bytes | Path
    headers: Mapping[str, str] = {}

    def open(self) -> BinaryIO:
        return self.body.open("rb") if isinstance(self.body, Path) else io.BytesIO(self.body)

    def size(self) -> int:
        return self.body.stat().st_size if isinstance(self.body, Path) else len(self.body)


def json_answer(content: Json, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content, indent=2).encode() + b"\n")


@dataclass
class Fault:
    """Something that goes wrong with ``times`` of the requests that match, after the first ``skip`` of them.

    ``path`` is a regular expression searched in the path. A request suffers one fault at most, the first in the list.

    answer   ``status``, ``headers`` and ``body`` (default: an error envelope with ``message`` and ``code``)
    reset    the connection is reset without an answer
    cut      the true headers and half of the body, then the end: the client can tell
    shorten  the same without Content-Length: the client cannot tell
    delay    the true answer, ``seconds`` late (the others may be late too)

    ``when`` says whether this comes "before" the service does its work, which answer and reset then keep it from
    doing, or "after" it. Without ``headers`` of its own an answer tells the SDK to retry at once.
    """

    method: str | None = None
    path: str = ""
    skip: int = 0
    times: int = 1
    when: str = "before"
    action: str = "answer"
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    seconds: float = 0
    message: str | None = None
    code: str | None = None
    seen: int = 0

    def takes(self, method: str, path: str) -> bool:
        """Whether this request suffers; counts it if it matches."""
        if self.method not in (None, method) or not re.search(self.path, path):
            return False
        self.seen += 1
        return self.skip < self.seen <= self.skip + self.times

    def answer(self) -> Answer:
        headers = self.headers or {"retry-after-ms": "1"}
        if self.body is not None:
            return Answer(self.status, self.body, headers)
        envelope = made_up_error(self.status)
        envelope["error"].update({k: v for k, v in (("message", self.message), ("code", self.code)) if v})
        return json_answer(envelope, self.status)._replace(headers=headers)


@dataclass
class Exchange:
    """One HTTP exchange as a test sees it. ``status`` is None where no answer was sent."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    request_json: Any
    status: int | None = None
    answer_json: Any = None


class Form(NamedTuple):
    """A multipart body: its text fields, and its one file as received on disk."""

    fields: dict[str, str]
    filename: str | None = None
    path: Path | None = None


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    content: Any = None
    form: Form | None = None


def json_or_none(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return None


def blocks(source: BinaryIO, size: int) -> Iterator[bytes]:
    """The next ``size`` bytes of a file, a chunk at a time."""
    while size > 0 and (block := source.read(min(size, CHUNK))):
        size -= len(block)
        yield block


class RequestBody:
    """The body of an HTTP request, framed by Content-Length or in chunks."""

    def __init__(self, stream: io.BufferedIOBase, headers: Message) -> None:
        self.stream = stream
        self.chunked = "chunked" in headers.get("Transfer-Encoding", "").lower()
        self.left = 0 if self.chunked else int(headers.get("Content-Length", 0))

    def read(self) -> bytes:
        """Some more bytes; none at the end. Raises ConnectionError if the client went away."""
        if self.chunked and not self.left:
            self.left = self._next_chunk()
        wanted = min(self.left, CHUNK)
        block = self.stream.read(wanted)
        if len(block) < wanted:
            raise ConnectionAbortedError("request cut off")
        self.left -= wanted
        if self.chunked and not self.left:
            self.stream.readline()
        return block

    def read_all(self) -> bytes:
        return b"".join(iter(self.read, b""))

    def _next_chunk(self) -> int:
        size = int(self.stream.readline().split(b";")[0], 16)
        if not size:
            self.chunked = False
            while self.stream.readline().strip():
                pass  # trailers
        return size


class Multipart:
    """A multipart body, read forwards in bounded memory."""

    def __init__(self, body: RequestBody) -> None:
        self.body = body
        self.buffer = bytearray(b"\r\n")  # makes the first boundary look like the others

    def copy_until(self, mark: bytes, target: BinaryIO) -> None:
        while (end := self.buffer.find(mark)) < 0:
            safe = max(0, len(self.buffer) - len(mark) + 1)  # the mark may have begun behind it
            target.write(self.buffer[:safe])
            del self.buffer[:safe]
            self._fill()
        target.write(self.buffer[:end])
        del self.buffer[: end + len(mark)]

    def text_until(self, mark: bytes) -> str:
        target = io.BytesIO()
        self.copy_until(mark, target)
        return target.getvalue().decode()

    def at_end(self) -> bool:
        while len(self.buffer) < 2:
            self._fill()
        return self.buffer.startswith(b"--")

    def _fill(self) -> None:
        block = self.body.read()
        if not block:
            raise ValueError("no closing boundary")
        self.buffer += block


def read_form(body: RequestBody, content_type: str, spool: Path) -> Form | None:
    """The multipart body with its file streamed to ``spool``; None if it is malformed."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    try:
        form = parse_form(Multipart(body), b"\r\n--" + boundary[1].encode(), spool) if boundary else None
    except ValueError:
        form = None
    body.read_all()
    return form


def parse_form(parts: Multipart, mark: bytes, spool: Path) -> Form:
    form = Form({})
    parts.text_until(mark)
    while not parts.at_end():
        names = dict(re.findall(r'\b(name|filename)="([^"]*)"', parts.text_until(b"\r\n\r\n")))
        if "filename" in names:
            with spool.open("wb") as file:
                parts.copy_until(mark, file)
            form = form._replace(filename=names["filename"].replace("%22", '"'), path=spool)
        else:
            form.fields[names.get("name", "")] = parts.text_until(mark)
    return form


# ---- what the service keeps ----


@dataclass
class StoredFile:
    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None
    path: Path

    def as_json(self) -> Json:
        shown = asdict(self) | {"object": "file", "status": "processed", "status_details": None}
        del shown["path"]
        return shown


def no_requests() -> Json:
    return {"total": 0, "completed": 0, "failed": 0}


@dataclass(kw_only=True)
class Batch:
    """The Batch object, field for field as it is answered."""

    id: str
    object: str = "batch"
    endpoint: str
    model: str | None = None
    errors: Json | None = None
    input_file_id: str
    completion_window: str = "24h"
    status: str = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Json | None = field(default_factory=no_requests)
    usage: Json | None = None
    metadata: dict[str, str] | None = None


@dataclass(kw_only=True)
class LocalBatch(Batch):
    """A batch and what moves it on; ``born`` and ``since`` (in this status) are on the monotonic clock."""

    input_file: StoredFile
    total: int  # requests in the input file
    born: float
    since: float
    file_life: int = FILE_LIFE
    expire: float | None = None
    over_limit: bool = False
    done: int = 0  # requests that were run by the time of its cancellation
    hold: str | None = None
    frozen: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    def as_json(self) -> Json:
        return {shown.name: getattr(self, shown.name) for shown in fields(Batch)}

    def enter(self, status: str, moment: float) -> None:
        self.status, self.since = status, moment
        setattr(self, f"{status}_at", self.created_at + int(moment - self.born))


def count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


# ---- validating a batch ----


def check_creation(content: Any) -> None:
    """Refuse what ``POST /batches`` does not take."""
    if not isinstance(content, dict):
        raise Refusal(400, "The body of the request is not a JSON object.")
    for name in ("input_file_id", "endpoint", "completion_window"):
        if name not in content:
            raise Refusal(400, f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
        if not isinstance(content[name], str):
            raise Refusal(400, f"Invalid type for '{name}': a string is expected.", name, "invalid_type")
    if content["endpoint"] not in ENDPOINTS:
        raise Refusal(400, f"Invalid value for 'endpoint': not one of {', '.join(ENDPOINTS)}.", "endpoint")
    if content["completion_window"] != "24h":
        raise Refusal(400, "Invalid value for 'completion_window': only '24h' is supported.", "completion_window")
    check_metadata(content.get("metadata"))


def check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refusal(400, "Invalid type for 'metadata': strings are expected.", "metadata", "invalid_type")
    if len(metadata) > 16 or any(len(key) > 64 or len(value) > 512 for key, value in metadata.items()):
        raise Refusal(400, "'metadata' may have 16 keys of 64 and values of 512 characters.", "metadata")


def file_life(policy: Any, param: str) -> int:
    """The seconds of an ``expires_after`` policy."""
    if policy is None:
        return FILE_LIFE
    seconds = str(policy.get("seconds", "")) if isinstance(policy, dict) else ""
    if not seconds.isdecimal() or not 3600 <= int(seconds) <= FILE_LIFE or policy.get("anchor") != "created_at":
        raise Refusal(400, f"'{param}' needs anchor 'created_at' and 3600 to {FILE_LIFE} seconds.", param)
    return int(seconds)


class BatchError(NamedTuple):
    code: str
    message: str
    param: str | None = None
    line: int | None = None


class InputCheck:
    """The errors of an input file's lines, in one pass; keeps the ids seen and the model."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.ids: set[str] = set()
        self.model: str | None = None

    def errors(self, lines: Iterator[bytes]) -> Iterator[BatchError]:
        for number, line in enumerate(lines, 1):
            request = json_or_none(line)
            if not isinstance(request, dict):
                yield BatchError("invalid_json_line", "This line is not a valid JSON object.", None, number)
            elif error := self.missing(request) or self.misused(request) or self.model_error(request["body"]):
                yield error._replace(line=number)

    def missing(self, request: Json) -> BatchError | None:
        for name, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
            if not request.get(name) and request.get(name) != {}:
                return BatchError("missing_required_parameter", f"Missing required parameter: '{name}'.", name)
            if not isinstance(request[name], kind):
                return BatchError("invalid_request", f"Invalid type for '{name}'.", name)
        return None

    def misused(self, request: Json) -> BatchError | None:
        custom_id = request["custom_id"]
        if custom_id in self.ids:
            return BatchError("duplicate_custom_id", f"The custom_id {custom_id!r} is used twice.", "custom_id")
        self.ids.add(custom_id)
        if request["method"] != "POST":
            return BatchError("invalid_request", "The method has to be POST.", "method")
        if request["url"] != self.endpoint:
            return BatchError("url_mismatch", f"The url is not the batch's endpoint, {self.endpoint}.", "url")
        return None

    def model_error(self, body: Json) -> BatchError | None:
        model = body.get("model")
        if not model or not isinstance(model, str):
            return BatchError("invalid_request", "Model parameter is required.", "body.model")
        self.model = self.model or model
        if model != self.model:
            return BatchError("model_mismatch", f"The model {model!r} differs from {self.model!r}.", "body.model")
        if body.get("stream"):
            return BatchError("invalid_request", "A batch cannot stream.", "body.stream")
        return None


# ---- running a request ----


def artist_name(body: Json) -> str:
    """Whom the request is about: prompt variables, metadata, or else the first line of its text."""
    prompt = body.get("prompt")
    variables = prompt.get("variables") if isinstance(prompt, dict) else None
    for values in (variables, body.get("metadata")):
        if isinstance(values, dict) and isinstance(values.get("artist_name"), str):
            return str(values["artist_name"])
    text = input_text(body.get("input") or body.get("messages") or prompt)
    return (text.strip().splitlines() or ["Somebody"])[0][:200]


def input_text(content: Any) -> str:
    """The text of a prompt, of the last message, or of the last part of that."""
    while isinstance(content, list) and content and isinstance(content[-1], dict):
        content = content[-1].get("content") or content[-1].get("text")
    return content if isinstance(content, str) else ""


def responses_body(model: str, outcome: str, created_at: int) -> Json:
    content: Json = {"type": "output_text", "text": TEXTS[outcome], "annotations": []}
    if outcome == "refusal":
        content = {"type": "refusal", "refusal": TEXTS[outcome]}
    status = outcome if outcome in ("incomplete", "failed") else "completed"
    message = {"id": "msg_@id@", "type": "message", "role": "assistant", "status": status, "content": [content]}
    failed = status == "failed"
    return {
        "id": "resp_@id@",
        "object": "response",
        "created_at": created_at,
        "status": status,
        "error": {"code": "server_error", "message": TEXTS[outcome]} if failed else None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": model,
        "output": [] if failed else [{"id": "rs_@id@", "type": "reasoning", "summary": []}, message],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": None if failed else usage(1),
    }


def chat_body(model: str, outcome: str, created_at: int) -> Json:
    message: Json = {"role": "assistant", "content": TEXTS[outcome], "refusal": None}
    if outcome == "refusal":
        message |= {"content": None, "refusal": TEXTS[outcome]}
    finish_reason = "length" if outcome == "incomplete" else "stop"
    return {
        "id": "chatcmpl-@id@",
        "object": "chat.completion",
        "created": created_at,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}],
        "usage": chat_usage(),
    }


def other_body(model: str, outcome: str, created_at: int) -> Json:
    body = {"id": "local-@id@", "object": "list", "created": created_at, "model": model, "data": []}
    return body | {"usage": chat_usage()}


BODIES = {"/v1/responses": responses_body, "/v1/chat/completions": chat_body}


def usage(answers: int) -> Json:
    return {
        "input_tokens": INPUT_TOKENS * answers,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": OUTPUT_TOKENS * answers,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": (INPUT_TOKENS + OUTPUT_TOKENS) * answers,
    }


def chat_usage() -> Json:
    total = INPUT_TOKENS + OUTPUT_TOKENS
    return {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS, "total_tokens": total}


def is_outcome(text: str) -> bool:
    return text in TEXTS or text in NO_RESPONSE or text == "missing" or bool(re.fullmatch("[45][0-9][0-9]", text))


def result_line(url: str, model: str, outcome: str, created_at: int) -> Json:
    """A line of the output or error file, with @id@, @custom_id@ and @artist@ where a request's own values go."""
    response, error = None, None
    if outcome in NO_RESPONSE:
        error = dict(zip(("code", "message"), NO_RESPONSE[outcome], strict=True))
    elif outcome in TEXTS:
        body = BODIES.get(url, other_body)(model, outcome, created_at)
        response = {"status_code": 200, "request_id": "req_@id@", "body": body}
    else:
        response = {"status_code": int(outcome), "request_id": "req_@id@", "body": made_up_error(int(outcome))}
    return {"id": "batch_req_@id@", "custom_id": "@custom_id@", "response": response, "error": error}


class LineFormat(NamedTuple):
    """A result line written once for all requests with the same outcome: 50,000 would take seconds one by one."""

    text: str
    status: int | None
    charged: bool

    def fill(self, **own: str) -> str:
        return self.text % {name: json.dumps(value)[1:-1] for name, value in own.items()}


@lru_cache
def line_format(url: str, model: str, outcome: str, created_at: int) -> LineFormat:
    """Raises ValueError for an outcome there is not."""
    if not is_outcome(outcome):
        raise ValueError(f"no such outcome: {outcome!r}")
    if outcome == "failed" and url != "/v1/responses":
        outcome = "500"
    line = result_line(url, model, outcome, created_at)
    text = re.sub("@(id|custom_id|artist)@", r"%(\1)s", json.dumps(line).replace("%", "%%"))
    response = line["response"] or {"status_code": None, "body": {}}
    return LineFormat(text + "\n", response["status_code"], bool(response["body"].get("usage")))


def in_other_order(lines: Iterator[bytes], seed: str) -> Iterator[tuple[int, bytes]]:
    """The lines with their positions, shuffled within a window; the same every time for the same seed."""
    numbered, chance = enumerate(lines), random.Random(seed)
    while window := list(islice(numbered, WINDOW)):
        order = chance.sample(window, len(window))
        yield from order if order != window else reversed(window)


# ---- the service ----


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def page(items: Sequence[Any], query: Mapping[str, str], most: int, default: int) -> tuple[Sequence[Any], bool]:
    """The items that ``limit`` and ``after`` ask for, and whether there are more."""
    limit = query.get("limit", str(default))
    if not limit.isdecimal() or not 1 <= int(limit) <= most:
        raise Refusal(400, f"Invalid 'limit': an integer from 1 to {most} is expected.", "limit")
    start = 0
    if after := query.get("after"):
        start = next((number for number, item in enumerate(items, 1) if item.id == after), 0)
        if not start:
            raise Refusal(400, f"Invalid 'after': there is no {after}.", "after")
    return items[start : start + int(limit)], len(items) > start + int(limit)


def listing(shown: list[Json], more: bool) -> Json:
    first, last = (shown[0]["id"], shown[-1]["id"]) if shown else ("", "")
    return {"object": "list", "data": shown, "first_id": first, "last_id": last, "has_more": more}


class BatchService:
    """What the service keeps and does, without HTTP. Batches move on when they are looked at."""

    def __init__(self, *, step: float, key: str | None, queue_limit: int | None) -> None:
        self.step = step
        self.key = key  # None: any will do
        self.queue_limit = queue_limit  # requests in batches that have not ended
        self.max_requests = 50_000
        self.hold: str | None = None  # no batch leaves this status
        self.outcomes: dict[str, str | list[str]] = {}  # by custom_id; a list is used up, then comes success
        self.fail_every: int | None = None
        self.expire: float | list[float | None] | None = None  # share that is run; a list: of the next batches
        self.cancel_done: float | None = None  # share that is run; None: by the clock
        self.empty_ids = False  # "" for a file there is not, instead of null
        self.list_delay: float = 0
        self.files: dict[str, StoredFile] = {}
        self.batches: dict[str, LocalBatch] = {}
        self.executions: Counter[str] = Counter()  # by custom_id, what was run and charged
        self.folder = Path()
        self.lock = threading.Lock()

    # Files

    def new_file(self, content: bytes, purpose: str, filename: str) -> StoredFile:
        path = self.new_path()
        path.write_bytes(content)
        return self.store(path, purpose, filename)

    def read_file(self, file_id: str) -> bytes:
        return self.files[file_id].path.read_bytes()

    def new_path(self) -> Path:
        return self.folder / new_id("file-")

    def store(self, path: Path, purpose: str, filename: str, life: int = FILE_LIFE) -> StoredFile:
        now = int(time.time())
        file = StoredFile(path.name, filename, purpose, path.stat().st_size, now, now + life, path)
        with self.lock:
            self.files[file.id] = file
        return file

    def find_file(self, file_id: str) -> StoredFile:
        if file_id not in self.files:
            raise Refusal(404, f"No such File object: {file_id}", "id")
        return self.files[file_id]

    def create_file(self, request: Request) -> Answer:
        form = request.form
        if form is None or form.path is None or form.filename is None:
            raise Refusal(400, "Missing required parameter: 'file'.", "file", "missing_required_parameter")
        purpose = form.fields.get("purpose")
        if purpose not in PURPOSES:
            raise Refusal(400, f"Invalid value for 'purpose': not one of {', '.join(PURPOSES)}.", "purpose")
        policy = {name[len("expires_after[") : -1]: value for name, value in form.fields.items() if "[" in name}
        life = file_life(policy or None, "expires_after")
        path = form.path.rename(self.new_path())
        return json_answer(self.store(path, purpose, form.filename, life).as_json())

    def list_files(self, request: Request) -> Answer:
        purpose, order = request.query.get("purpose"), request.query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise Refusal(400, "Invalid 'order': asc or desc is expected.", "order")
        files = [file for file in list(self.files.values()) if purpose in (None, file.purpose)]
        shown, more = page(files if order == "asc" else files[::-1], request.query, most=10_000, default=10_000)
        return json_answer(listing([file.as_json() for file in shown], more))

    def get_file(self, request: Request, file_id: str) -> Answer:
        return json_answer(self.find_file(file_id).as_json())

    def get_content(self, request: Request, file_id: str) -> Answer:
        return Answer(200, self.find_file(file_id).path, {"Content-Type": "application/octet-stream"})

    def delete_file(self, request: Request, file_id: str) -> Answer:
        self.find_file(file_id)
        with self.lock:
            self.files.pop(file_id, None)  # its bytes stay: a batch may be reading them
        return json_answer({"id": file_id, "object": "file", "deleted": True})

    # Batches

    def new_batch(
        self,
        status: str,
        *,
        input_file: StoredFile | None = None,
        endpoint: str = "/v1/responses",
        output: bytes | None = None,
        errors: bytes | None = None,
        metadata: dict[str, str] | None = None,
        created_at: int | None = None,
        **overrides: Any,
    ) -> LocalBatch:
        """A batch that is in this status and stays there, unless it is cancelled: then it stays ``cancelling``.

        ``overrides`` are other fields of the Batch object, or other values of these.
        """
        input_file = input_file or self.new_file(b"", "batch", "requests.jsonl")
        batch = self.local_batch(input_file, endpoint, metadata, int(created_at or time.time()))
        batch.frozen = True
        batch.enter(status, batch.born)
        counts = {"completed": (output or b"").count(b"\n"), "failed": (errors or b"").count(b"\n")}
        batch.request_counts = {"total": batch.total or sum(counts.values())} | counts
        if output is not None:
            batch.output_file_id = self.new_file(output, "batch_output", f"{batch.id}_output.jsonl").id
        if errors is not None:
            batch.error_file_id = self.new_file(errors, "batch_output", f"{batch.id}_error.jsonl").id
        for name, value in overrides.items():
            setattr(batch, name, value)
        with self.lock:
            self.batches[batch.id] = batch
        return batch

    def local_batch(
        self, input_file: StoredFile, endpoint: str, metadata: dict[str, str] | None, created_at: int
    ) -> LocalBatch:
        now = time.monotonic()
        return LocalBatch(
            id=new_id("batch_"),
            endpoint=endpoint,
            input_file_id=input_file.id,
            created_at=created_at,
            expires_at=created_at + DAY,
            metadata=metadata,
            input_file=input_file,
            total=count_lines(input_file.path),
            born=now,
            since=now,
        )

    def create_batch(self, request: Request) -> Answer:
        content = request.content
        check_creation(content)
        input_file = self.files.get(content["input_file_id"])
        if input_file is None or input_file.purpose != "batch":
            message = f"Invalid 'input_file_id': there is no file {content['input_file_id']} with purpose 'batch'."
            raise Refusal(400, message, "input_file_id")
        batch = self.local_batch(input_file, content["endpoint"], content.get("metadata"), int(time.time()))
        batch.file_life = file_life(content.get("output_expires_after"), "output_expires_after")
        answer = json_answer(batch.as_json())
        self.enqueue(batch)
        return answer

    def enqueue(self, batch: LocalBatch) -> None:
        if self.queue_limit is not None:
            for other in list(self.batches.values()):
                self.advance(other)  # so that those whose time is up make room
        with self.lock:
            active = [other for other in self.batches.values() if other.status in NEXT_STATUS]
            queued = sum(other.total for other in [*active, batch])
            batch.over_limit = self.queue_limit is not None and queued > self.queue_limit
            batch.expire = self.next_expire()
            self.batches[batch.id] = batch

    def next_expire(self) -> float | None:
        if isinstance(self.expire, list):
            return self.expire.pop(0) if self.expire else None
        return self.expire

    def list_batches(self, request: Request) -> Answer:
        listed = time.monotonic() - self.list_delay
        batches = [batch for batch in list(self.batches.values()) if batch.frozen or batch.born <= listed]
        newest_first = sorted(batches, key=lambda batch: batch.created_at)[::-1]
        shown, more = page(newest_first, request.query, most=100, default=20)
        return json_answer(listing([self.look(batch) for batch in shown], more))

    def get_batch(self, request: Request, batch_id: str) -> Answer:
        return json_answer(self.look(self.find_batch(batch_id)))

    def cancel_batch(self, request: Request, batch_id: str) -> Answer:
        batch = self.find_batch(batch_id)
        with batch.lock:
            self.advance(batch)
            if batch.status in TERMINAL:
                raise Refusal(409, f"Cannot cancel a batch with status '{batch.status}'.")
            if batch.status != "cancelling":
                self.cancel(batch)
            return json_answer(batch.as_json())

    def find_batch(self, batch_id: str) -> LocalBatch:
        if batch_id not in self.batches:
            raise Refusal(404, f"No such batch: {batch_id}", "id")
        return self.batches[batch_id]

    def cancel(self, batch: LocalBatch) -> None:
        if batch.status == "validating":
            batch.total = 0  # none of its requests was taken on
        share = self.progress(batch) if self.cancel_done is None else self.cancel_done
        batch.done = int(batch.total * share)
        batch.enter("cancelling", time.monotonic())

    def look(self, batch: LocalBatch) -> Json:
        """The Batch object as it is now. One lock per batch: those that run do not keep the others waiting."""
        with batch.lock:
            self.advance(batch)
            if batch.status == "in_progress" and not batch.frozen:
                done = int(batch.total * self.progress(batch))
                batch.request_counts = {"total": batch.total, "completed": done, "failed": 0}
            return batch.as_json()

    def progress(self, batch: LocalBatch) -> float:
        """The share of the requests that have been run, by the clock."""
        if batch.frozen or batch.status == "validating":
            return 0.0
        elapsed = time.monotonic() - batch.since
        return 1.0 if batch.status == "finalizing" or elapsed >= self.step else elapsed / self.step

    def advance(self, batch: LocalBatch) -> None:
        with batch.lock:
            while (
                not batch.frozen
                and batch.status in NEXT_STATUS
                and batch.status not in (self.hold, batch.hold)
                and time.monotonic() >= batch.since + self.step
            ):
                self.leave(batch, batch.since + self.step)

    def leave(self, batch: LocalBatch, moment: float) -> None:
        status = NEXT_STATUS[batch.status]
        if batch.status == "validating" and self.validate(batch):
            status = "failed"
        elif batch.status == "in_progress" and batch.expire is not None:
            status = "expired"
            self.execute(batch, int(batch.total * batch.expire), rest="expired")
        elif batch.status == "cancelling":
            self.execute(batch, batch.done, rest="cancelled")
        elif batch.status == "finalizing":
            self.execute(batch, batch.total, rest=SUCCESS)
        batch.enter(status, moment)

    def validate(self, batch: LocalBatch) -> bool:
        """Whether the input file is refused; the batch then has the errors."""
        check = InputCheck(batch.endpoint)
        errors = self.size_errors(batch)
        if not errors:
            with batch.input_file.path.open("rb") as lines:
                errors = list(islice(check.errors(lines), MAX_BATCH_ERRORS))
        batch.model = check.model
        if not errors and batch.over_limit:
            message = f"Enqueued token limit reached for {check.model}: wait until a batch has ended, or send fewer."
            errors = [BatchError("token_limit_exceeded", message)]
        if errors:
            batch.errors = {"object": "list", "data": [error._asdict() for error in errors]}
        else:
            batch.request_counts = no_requests() | {"total": batch.total}
        return bool(errors)

    def size_errors(self, batch: LocalBatch) -> list[BatchError]:
        if not batch.total:
            return [BatchError("empty_file", "The input file is empty.")]
        if batch.total > self.max_requests:
            return [BatchError("too_many_tasks", f"The input file has more than {self.max_requests} requests.")]
        return []

    def execute(self, batch: LocalBatch, done: int, rest: str) -> None:
        """Run the first ``done`` requests of the input file; the others get the outcome ``rest``."""
        output, errors = self.new_path(), self.new_path()
        counts: Counter[LineFormat] = Counter()
        executed: list[str] = []
        with output.open("w", encoding="ascii") as successes, errors.open("w", encoding="ascii") as failures:
            for custom_id, layout, line in self.results(batch, done, rest):
                (successes if layout.status == 200 else failures).write(line)
                counts[layout] += 1
                if layout.status is not None:
                    executed.append(custom_id)
        batch.output_file_id = self.store_results(output, f"{batch.id}_output.jsonl", batch.file_life)
        batch.error_file_id = self.store_results(errors, f"{batch.id}_error.jsonl", batch.file_life)
        completed = sum(count for layout, count in counts.items() if layout.status == 200)
        batch.request_counts = {"total": batch.total, "completed": completed, "failed": counts.total() - completed}
        batch.usage = usage(sum(count for layout, count in counts.items() if layout.charged))
        with self.lock:
            self.executions.update(executed)

    def results(self, batch: LocalBatch, done: int, rest: str) -> Iterator[tuple[str, LineFormat, str]]:
        """The custom_id, the format and the text of every result line."""
        with batch.input_file.path.open("rb") as lines:
            for position, line in in_other_order(islice(lines, batch.total), batch.id):
                request = json.loads(line.decode())
                custom_id, body = request["custom_id"], request["body"]
                outcome = self.outcome(custom_id, position) if position < done else rest
                if outcome != "missing":
                    layout = line_format(batch.endpoint, body["model"], outcome, batch.created_at)
                    own_id = f"{batch.id.removeprefix('batch_')}_{position}"
                    yield custom_id, layout, layout.fill(id=own_id, custom_id=custom_id, artist=artist_name(body))

    def outcome(self, custom_id: str, position: int) -> str:
        asked = self.outcomes.get(custom_id)
        if isinstance(asked, list):
            return asked.pop(0) if asked else SUCCESS
        if asked is None and self.fail_every and not (position + 1) % self.fail_every:
            return SUCCESS if self.executions[custom_id] else "500"
        return asked or SUCCESS

    def store_results(self, path: Path, filename: str, life: int) -> str | None:
        if path.stat().st_size:
            return self.store(path, "batch_output", filename, life).id
        path.unlink()
        return "" if self.empty_ids else None


Action = Callable[..., Answer]
ROUTES: list[tuple[str, str, Action]] = [
    ("POST", "/v1/files", BatchService.create_file),
    ("GET", "/v1/files", BatchService.list_files),
    ("GET", "/v1/files/([^/]+)", BatchService.get_file),
    ("DELETE", "/v1/files/([^/]+)", BatchService.delete_file),
    ("GET", "/v1/files/([^/]+)/content", BatchService.get_content),
    ("POST", "/v1/batches", BatchService.create_batch),
    ("GET", "/v1/batches", BatchService.list_batches),
    ("GET", "/v1/batches/([^/]+)", BatchService.get_batch),
    ("POST", "/v1/batches/([^/]+)/cancel", BatchService.cancel_batch),
]


def answer_to(request: Request, service: BatchService) -> Answer:
    try:
        check_key(request.headers.get("authorization", ""), service.key)
        action, ids = find_route(request)
        return action(service, request, *ids)
    except Refusal as refusal:
        return json_answer(refusal.envelope, refusal.status)


def check_key(authorization: str, key: str | None) -> None:
    given = authorization.removeprefix("Bearer ").strip() if authorization.startswith("Bearer ") else ""
    if not given:
        raise Refusal(401, "You didn't provide an API key in the header Authorization: Bearer.")
    if key not in (None, given):
        raise Refusal(401, "Incorrect API key provided.", code="invalid_api_key")


def find_route(request: Request) -> tuple[Action, tuple[str, ...]]:
    matches = {
        method: (action, found.groups())
        for method, pattern, action in ROUTES
        if (found := re.fullmatch(pattern, request.path))
    }
    if not matches:
        raise Refusal(404, f"Invalid URL ({request.method} {request.path})")
    if request.method not in matches:
        raise Refusal(405, f"Not allowed to {request.method} on {request.path}.", code="method_not_supported")
    return matches[request.method]


# ---- HTTP ----


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = 64 * 1024  # headers and a short body leave as one packet
    disable_nagle_algorithm = True

    def respond(self) -> None:
        spool = self.server.api.folder / new_id("upload-")
        try:
            request = self.received(spool)
            exchange = self.server.api.record(request)
            fault = self.server.api.take_fault(request)
            if fault:
                self.suffer(fault, request, exchange)
            else:
                self.send(answer_to(request, self.server.api), exchange)
        finally:
            spool.unlink(missing_ok=True)

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = respond

    def received(self, spool: Path) -> Request:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, url.path, dict(parse_qsl(url.query)), headers)
        body = RequestBody(self.rfile, self.headers)
        content_type = headers.get("content-type", "")
        if content_type.startswith("multipart/form-data"):
            return request._replace(form=read_form(body, content_type, spool))
        return request._replace(content=json_or_none(body.read_all()))

    def suffer(self, fault: Fault, request: Request, exchange: Exchange) -> None:
        api = self.server.api
        if fault.when == "before":
            api.wait(fault.seconds)
        if fault.when == "after" or fault.action in ("cut", "shorten", "delay"):
            answer = answer_to(request, api)
        if fault.when == "after":
            api.wait(fault.seconds)
        if fault.action == "answer":
            answer = fault.answer()
        if fault.action == "reset":
            self.reset()
        else:
            self.send(answer, exchange, fault.action)

    def send(self, answer: Answer, exchange: Exchange, action: str = "answer") -> None:
        exchange.status = answer.status
        exchange.answer_json = json_or_none(answer.body) if isinstance(answer.body, bytes) else None
        size = answer.size()
        self.send_response(answer.status)
        self.send_headers(answer, {"Connection": "close"} if action == "shorten" else {"Content-Length": str(size)})
        if action in ("cut", "shorten"):
            size //= 2
            self.close_connection = True
        with answer.open() as body:
            for block in blocks(body, size):
                self.wfile.write(block)

    def send_headers(self, answer: Answer, framing: Mapping[str, str]) -> None:
        own = {name.lower() for name in answer.headers}
        if "content-type" not in own:
            self.send_header("Content-Type", "application/json")
        if "x-request-id" not in own:
            self.send_header("x-request-id", new_id("req_"))
        for name, value in (*answer.headers.items(), *framing.items()):
            self.send_header(name, value)
        self.end_headers()

    def reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())  # past socketserver, which would end the stream in order first

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    allow_reuse_port = False  # a port in use is an error

    def __init__(self, port: int, api: LocalBatchAPI) -> None:
        self.api = api
        self.connections: dict[socket.socket, threading.Thread] = {}
        super().__init__((HOST, port), Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the DNS for a name that nobody reads

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self.connections[request] = thread
        thread.start()

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.connections.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        gone = isinstance(sys.exception(), ConnectionError)
        if not gone and not self.api.stopping.is_set():
            super().handle_error(request, client_address)

    def close(self) -> None:
        """Stop listening, and end the connections that clients keep open."""
        self.shutdown()
        self.server_close()
        for connection, thread in list(self.connections.items()):
            with suppress(OSError):  # it has just ended by itself
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(timeout=2)


class LocalBatchAPI(BatchService):
    """The service on a loopback port (0: a free one), with its files in a temporary folder of ``directory``.

    ``exchanges`` has every HTTP exchange in the order of arrival; ``faults`` what shall go wrong.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        step: float = 0.0,
        key: str | None = None,
        queue_limit: int | None = None,
        directory: Path | str | None = None,
    ) -> None:
        super().__init__(step=step, key=key, queue_limit=queue_limit)
        self.port = port
        self.directory = directory
        self.faults: list[Fault] = []
        self.exchanges: list[Exchange] = []
        self.recording = True
        self.stopping = threading.Event()

    @property
    def base_url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    def start(self) -> None:
        """Raises OSError if the port cannot be had."""
        self.server = Server(self.port, self)
        self.port = self.server.server_address[1]
        self.temporary = tempfile.TemporaryDirectory(
            prefix="local_batch_api.", dir=self.directory, ignore_cleanup_errors=True
        )
        self.folder = Path(self.temporary.name)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.stopping.set()
        self.server.close()
        self.temporary.cleanup()

    def __enter__(self) -> LocalBatchAPI:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def record(self, request: Request) -> Exchange:
        content = request.content
        if request.form is not None:
            size = request.form.path.stat().st_size if request.form.path else 0
            purpose = request.form.fields.get("purpose")
            content = {"purpose": purpose, "filename": request.form.filename, "bytes": size}
        exchange = Exchange(request.method, request.path, request.query, request.headers, content)
        if self.recording:
            self.exchanges.append(exchange)
        return exchange

    def take_fault(self, request: Request) -> Fault | None:
        with self.lock:
            return next((fault for fault in self.faults if fault.takes(request.method, request.path)), None)

    def wait(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            raise ConnectionAbortedError("the server is stopping")


# ---- the program ----


def port_number(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"not a port: {text!r}")
    return int(text)


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"not a positive integer: {text!r}")
    return int(text)


def seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
        raise argparse.ArgumentTypeError(f"not a number of seconds: {text!r}")
    return float(text)


def outcome_option(text: str) -> tuple[str, str | list[str]]:
    custom_id, _, listed = text.rpartition("=")
    outcomes = listed.split(",")
    if not custom_id or not all(map(is_outcome, outcomes)):
        raise argparse.ArgumentTypeError(f"not CUSTOM_ID=OUTCOME[,OUTCOME...]: {text!r}")
    return custom_id, outcomes if len(outcomes) > 1 else outcomes[0]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--port", type=port_number, default=0, metavar="N", help="port (default: a free one)")
    parser.add_argument(
        "--step", type=seconds, default=0.3, metavar="SECONDS", help="time in each status (default: %(default)s)"
    )
    parser.add_argument(
        "--queue-limit", type=positive_int, metavar="N", help="requests in active batches (default: any number)"
    )
    parser.add_argument(
        "--outcome",
        type=outcome_option,
        action="append",
        default=[],
        metavar="CUSTOM_ID=OUTCOME[,OUTCOME...]",
        help="what becomes of a request; repeatable",
    )
    parser.add_argument("--fail-every", type=positive_int, metavar="N", help="fail every Nth request once")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)  # so that one at any moment waits for sigwait
    api = LocalBatchAPI(args.port, step=args.step, queue_limit=args.queue_limit)
    api.outcomes, api.fail_every = dict(args.outcome), args.fail_every
    api.recording = False
    try:
        api.start()
    except OSError as error:
        print(f"local_batch_api.py: error: port {args.port}: {error.strerror}; try another --port", file=sys.stderr)
        return 1
    print(api.base_url, flush=True)
    signal.sigwait(ENDING_SIGNALS)
    api.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
