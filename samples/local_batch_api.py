#!/usr/bin/env python3
"""A local mock server for OpenAI's Files and Batches API: no key, no cost, no model.

    python samples/local_batch_api.py --port 8080
    export OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=local

The server prints its base URL on stdout and answers on loopback until it is terminated; it then deletes what was
uploaded. A batch spends --step seconds in each of validating, in_progress and finalizing. Results come in another
order than the requests, and every bio is made up and says so. /v1/responses and /v1/chat/completions answer at once,
too. Every model exists, except "local-dead"; "local-dying" is to be shut down in ten days.

You can ask for failures:

    --outcome a2=429                 request a2 fails with this HTTP status whenever a batch runs it
    --outcome a2=500,expired,200     one outcome each time a batch runs it, then success
    --fail-every 10                  every 10th request of a batch answers 500 the first time it is run
    --queue-limit 1000               a batch that would enqueue more requests fails: token_limit_exceeded

Outcomes are 200, any status from 400 to 599, and
    expired, cancelled, timeout      an error line without a response
    missing                          no line at all
    incomplete, content_filter       HTTP 200 with half an answer
    refusal, no_text, error_200      HTTP 200 with a refusal, without any text, with an error as its body
    failed                           HTTP 200 with a failed response (/v1/responses only, elsewhere a 500)

Other services do some things differently. --habit NAME, which can be repeated, imitates them:

    no-final-newline                 the last line of a results file has no line end
    string-bodies                    response.body is a string that holds JSON
    both-files                       a batch that ran always names an output and an error file; one may be empty
    upper-case                       statuses are in upper case
    no-bytes                         File objects have no "bytes"
    zero-bytes                       File objects say "bytes": 0
    no-file-info                     there is no GET /v1/files/{id}
    late-output                      a completed batch names its output file only at the third GET
    no-metadata                      batches keep no metadata
    no-delete                        files cannot be deleted
    no-models                        there is no GET /v1/models/{model}
    ignores-after                    the listing always starts with the newest batch
    no-has-more                      the listing has no "has_more"
    short-endpoint                   the listing says "/responses" instead of "/v1/responses"

Exit codes: 0 terminated (SIGTERM, SIGINT, SIGHUP); 1 the port is not available; 2 invalid arguments.

Tests run the server in process and can ask for more; see the attributes of BatchService, and Fault:

    with LocalBatchAPI(step=0.1) as api:
        api.faults.append(Fault("POST", "/batches$", when="after", action="reset"))
        client = OpenAI(base_url=api.base_url, api_key="local")
"""

from __future__ import annotations

import argparse
import hashlib
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
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

HOST = "127.0.0.1"
CHUNK = 256 * 1024
DAY = 24 * 60 * 60
FILE_LIFE = 30 * DAY
RESPONSES, CHAT = ENDPOINTS = ("/v1/responses", "/v1/chat/completions")
HABITS = (
    "no-final-newline", "string-bodies", "both-files", "upper-case", "no-bytes", "zero-bytes", "no-file-info",
    "late-output", "no-metadata", "no-delete", "no-models", "ignores-after", "no-has-more", "short-endpoint",
)
NEXT_STATUS = {"validating": "in_progress", "in_progress": "finalizing", "finalizing": "completed",
               "cancelling": "cancelled"}
BATCH_FIELDS = (
    "id", "endpoint", "model", "errors", "input_file_id", "completion_window", "status", "output_file_id",
    "error_file_id", "created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at",
    "expired_at", "cancelling_at", "cancelled_at", "request_counts", "usage", "metadata",
)
TERMINAL = {"completed", "failed", "expired", "cancelled"}
MAX_BATCH_ERRORS = 50
WINDOW = 1000  # requests in memory

SUCCESS = "200"
TEXTS = {
    SUCCESS: "{artist}: a made-up bio from the local mock server; no model was asked.",
    "incomplete": "{artist}: a made-up bio from the",
    "content_filter": "{artist}: a made-up",
    "refusal": "Refused, as the local mock server was told to.",
    "failed": "Failed, as the local mock server was told to.",
    "no_text": "",
    "error_200": "",
}
INCOMPLETE_REASONS = {"incomplete": "max_output_tokens", "content_filter": "content_filter"}
FINISH_REASONS = {"incomplete": "length", "content_filter": "content_filter"}
INPUT_TOKENS, OUTPUT_TOKENS = 120, 45  # of each answer; at once, the input tokens depend on the body
NO_RESPONSE = {
    "expired": ("batch_expired", "This request was not run before the completion window ended."),
    "cancelled": ("batch_cancelled", "This request was not run before the batch was cancelled."),
    "timeout": ("request_timeout", "This request timed out."),
}
ERROR_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 500: "server_error"}
ENDING_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

Json = dict[str, Any]


class Refusal(Exception):
    """A 4xx answer. Code raises it where the reason is known."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.content = error_envelope(status, message, param, code)


def not_there(status: int) -> Refusal:
    """The answer of a web framework where the service has no such path or method."""
    refusal = Refusal(status, http.client.responses[status])
    refusal.content = {"detail": http.client.responses[status]}
    return refusal


def error_envelope(status: int, message: str, param: str | None = None, code: str | None = None) -> Json:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def made_up_error(status: int) -> Json:
    phrase = http.client.responses.get(status, "unknown error")
    code = ERROR_CODES.get(status, phrase.lower().replace(" ", "_"))
    return error_envelope(status, f"{phrase}, as the local mock server was told to.", code=code)


# ---- what goes over the wire ----


class Answer(NamedTuple):
    status: int
    body: bytes | Path
    headers: Mapping[str, str] = {}

    def open(self) -> BinaryIO:
        return self.body.open("rb") if isinstance(self.body, Path) else io.BytesIO(self.body)


def json_answer(content: Json, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content, indent=2).encode() + b"\n")


@dataclass
class Fault:
    """Something that goes wrong with ``times`` of the matching requests, after the first ``skip`` of them.

    ``path`` is a regular expression that is searched in the path. The first matching fault in the list applies.

    answer   ``status``, ``headers`` and ``body`` (default: an error envelope with ``message`` and ``code``)
    reset    the connection is reset without an answer
    cut      the true headers and half of the body, then the end: the client can tell
    shorten  the same without Content-Length: the client cannot tell
    delay    the true answer, ``seconds`` late (the other actions can be late, too)
    drip     the true answer byte by byte, headers included, with ``seconds`` between two bytes

    ``when`` says when the fault strikes:

    before   answer and reset keep the service from doing its work
    after    the service has done its work
    later    answer or reset comes at once; the service does its work at LocalBatchAPI.carry_out(), or by itself
             after ``seconds``, if these are not 0

    An answer without ``headers`` of its own tells the SDK to retry at once.
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

    def applies_to(self, method: str, path: str) -> bool:
        """Whether the fault strikes this request. Counts the request if it matches."""
        if self.method not in (None, method) or not re.search(self.path, path):
            return False
        self.seen += 1
        return self.skip < self.seen <= self.skip + self.times

    def delay(self) -> float:
        return 0 if self.when == "later" or self.action == "drip" else self.seconds

    def answer(self) -> Answer:
        headers = self.headers or {"retry-after-ms": "1"}
        if self.body is not None:
            return Answer(self.status, self.body, headers)
        envelope = made_up_error(self.status)
        envelope["error"].update({k: v for k, v in (("message", self.message), ("code", self.code)) if v})
        return json_answer(envelope, self.status)._replace(headers=headers)


@dataclass
class Exchange:
    """A request as received and its answer. ``status`` is None where no answer was sent.

    Where the request is a form, ``request_json`` has its text fields, and its file's ``filename`` and ``bytes``.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    request_json: Any
    size: int  # of the request's body
    upload: Path  # where the form's file is
    status: int | None = None
    answer_json: Any = None


def json_or_none(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return None


def read_form(body: bytes, boundary: bytes, upload: Path) -> Json:
    """The text fields of a multipart body. The content of its file goes to ``upload``."""
    content: Json = {}
    for part in body.split(b"--" + boundary)[1:-1]:
        head, _, value = part.removesuffix(b"\r\n").partition(b"\r\n\r\n")
        names = dict(re.findall(r'\b(name|filename)="([^"]*)"', head.decode(errors="replace")))
        if "filename" in names:
            upload.write_bytes(value)
            content |= {"filename": names["filename"].replace("%22", '"'), "bytes": len(value)}
        else:
            content[names.get("name", "")] = value.decode(errors="replace")
    return content


# ---- what the service keeps ----


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


@dataclass
class StoredFile:
    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int
    path: Path


def counts(total: int, completed: int = 0, failed: int = 0) -> Json:
    return {"total": total, "completed": completed, "failed": failed}


@dataclass(kw_only=True)
class LocalBatch:
    """A batch with its state. ``born`` and ``since`` (when it entered its status) are on the service's clock."""

    id: str = field(default_factory=lambda: new_id("batch_"))
    input_file: StoredFile
    endpoint: str
    metadata: dict[str, str] | None
    created_at: int
    status: str = "validating"
    completion_window: str = "24h"
    model: str | None = None
    errors: Json | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    request_counts: Json | None = field(default_factory=lambda: counts(0))
    usage: Json | None = None
    born: float
    expire: float | None = None
    over_limit: bool = False
    done: int = 0  # requests that were run before the batch was cancelled
    looks: int = 0  # GETs since it is completed
    hold: str | None = None
    frozen: bool = False

    def __post_init__(self) -> None:
        self.input_file_id = self.input_file.id
        self.expires_at = self.created_at + DAY
        self.since = self.born
        with self.input_file.path.open("rb") as lines:
            self.total = sum(1 for _ in lines)  # requests in the input file

    def as_json(self) -> Json:
        return {"object": "batch"} | {name: getattr(self, name, None) for name in BATCH_FIELDS}

    def enter(self, status: str, moment: float) -> None:
        self.status, self.since = status, moment
        setattr(self, f"{status}_at", self.created_at + int(moment - self.born))


# ---- validating a batch ----


def check_creation(content: Any) -> None:
    """Refuse what ``POST /batches`` does not accept."""
    if not isinstance(content, dict):
        raise Refusal(400, "The body of the request is not a JSON object.")
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(content.get(name), str):
            raise Refusal(400, f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
    if content["endpoint"] not in ENDPOINTS:
        raise Refusal(400, f"Invalid value for 'endpoint': not one of {', '.join(ENDPOINTS)}.", "endpoint")
    if content["completion_window"] != "24h":
        raise Refusal(400, "Invalid value for 'completion_window': only '24h' is supported.", "completion_window")
    metadata = {} if content.get("metadata") is None else content["metadata"]
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refusal(400, "Invalid type for 'metadata': strings are expected.", "metadata", "invalid_type")
    if len(metadata) > 16 or any(len(key) > 64 or len(value) > 512 for key, value in metadata.items()):
        raise Refusal(400, "'metadata' may have 16 keys of 64 and values of 512 characters.", "metadata")


def batch_error(code: str, message: str, param: str | None = None) -> Json:
    return {"code": code, "message": message, "param": param, "line": None}


class InputCheck:
    """Finds the errors in the lines of an input file. Keeps the ids and the model that it has seen."""

    def __init__(self, endpoint: str, dead_models: set[str]) -> None:
        self.endpoint = endpoint
        self.dead_models = dead_models
        self.ids: set[str] = set()
        self.model: str | None = None

    def errors(self, lines: Iterator[bytes]) -> Iterator[Json]:
        for number, line in enumerate(lines, 1):
            if error := self.error(json_or_none(line)):
                yield error | {"line": number}

    def error(self, request: Any) -> Json | None:
        if not isinstance(request, dict):
            return batch_error("invalid_json_line", "This line is not a valid JSON object.")
        for name, kind in (("custom_id", str), ("method", str), ("url", str), ("body", dict)):
            if not request.get(name) and request.get(name) != {}:
                return batch_error("missing_required_parameter", f"Missing required parameter: '{name}'.", name)
            if not isinstance(request[name], kind):
                return batch_error("invalid_request", f"Invalid type for '{name}'.", name)
        custom_id, model = request["custom_id"], request["body"].get("model")
        if custom_id in self.ids:
            return batch_error("duplicate_custom_id", f"The custom_id {custom_id!r} is used twice.", "custom_id")
        self.ids.add(custom_id)
        if request["method"] != "POST":
            return batch_error("invalid_request", "The method has to be POST.", "method")
        if request["url"] != self.endpoint:
            return batch_error("url_mismatch", f"The url is not the batch's endpoint, {self.endpoint}.", "url")
        if not model or not isinstance(model, str):
            return batch_error("invalid_request", "Model parameter is required.", "body.model")
        self.model = self.model or model
        if model != self.model:
            return batch_error("model_mismatch", f"The model {model!r} differs from {self.model!r}.", "body.model")
        if model in self.dead_models:
            return batch_error("model_not_found", f"The model {model!r} does not exist.", "body.model")
        return None


# ---- running a request ----


def artist_name(body: Json) -> str:
    """Whom the request is about: from prompt variables or metadata, else the first line of its text."""
    prompt = body.get("prompt")
    variables = prompt.get("variables") if isinstance(prompt, dict) else None
    for values in (variables, body.get("metadata")):
        if isinstance(values, dict) and isinstance(values.get("artist_name"), str):
            return str(values["artist_name"])
    text = input_text(body.get("input") or body.get("messages") or prompt)
    return (text.strip().splitlines() or ["Somebody"])[0][:200]


def input_text(content: Any) -> str:
    """The text of a prompt: for a list, that of its last message or part."""
    while isinstance(content, list) and content and isinstance(content[-1], dict):
        content = content[-1].get("content") or content[-1].get("text")
    return content if isinstance(content, str) else ""


def responses_body(body: Json, outcome: str, created_at: int, input_tokens: int) -> Json:
    text = TEXTS[outcome].format(artist=artist_name(body))
    content: Json = {"type": "output_text", "text": text, "annotations": []}
    if outcome == "refusal":
        content = {"type": "refusal", "refusal": text}
    failed, reason = outcome == "failed", INCOMPLETE_REASONS.get(outcome)
    status = "failed" if failed else "incomplete" if reason else "completed"
    reasoning = {"id": new_id("rs_"), "type": "reasoning", "summary": []}
    message = {"id": new_id("msg_"), "type": "message", "role": "assistant", "status": status, "content": [content]}
    return {
        "id": new_id("resp_"), "object": "response", "created_at": created_at, "model": body["model"], "status": status,
        "error": {"code": "server_error", "message": text} if failed else None,
        "incomplete_details": {"reason": reason} if reason else None,
        "output": [] if failed else [reasoning] if outcome == "no_text" else [reasoning, message],
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
        "usage": None if failed else usage(RESPONSES, input_tokens, OUTPUT_TOKENS),
    }


def chat_body(body: Json, outcome: str, created_at: int, input_tokens: int) -> Json:
    text = TEXTS[outcome].format(artist=artist_name(body)) or None
    message: Json = {"role": "assistant", "content": text, "refusal": None}
    if outcome == "refusal":
        message |= {"content": None, "refusal": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": FINISH_REASONS.get(outcome, "stop")}
    return {
        "id": new_id("chatcmpl-"), "object": "chat.completion", "created": created_at, "model": body["model"],
        "choices": [choice], "usage": usage(CHAT, input_tokens, OUTPUT_TOKENS),
    }


def usage(endpoint: str, input_tokens: int, output_tokens: int) -> Json:
    total = input_tokens + output_tokens
    if endpoint == CHAT:
        return {"prompt_tokens": input_tokens, "completion_tokens": output_tokens, "total_tokens": total}
    return {
        "input_tokens": input_tokens, "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": output_tokens, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": total,
    }


def is_outcome(text: str) -> bool:
    return text in TEXTS or text in NO_RESPONSE or text == "missing" or bool(re.fullmatch("[45][0-9][0-9]", text))


def at_endpoint(outcome: str, endpoint: str) -> str:
    """The outcome as it is at this endpoint. Raises ValueError for an unknown one."""
    if not is_outcome(outcome):
        raise ValueError(f"no such outcome: {outcome!r}")
    return "500" if outcome == "failed" and endpoint == CHAT else outcome


def is_paid(outcome: str) -> bool:
    return outcome in TEXTS and outcome != "failed"


def response_to(endpoint: str, body: Json, outcome: str, created_at: int, input_tokens: int) -> tuple[int, Json]:
    """The status and the body of the answer to a request."""
    if outcome == "error_200":
        return 200, made_up_error(500)
    if outcome in TEXTS:
        return 200, (chat_body if endpoint == CHAT else responses_body)(body, outcome, created_at, input_tokens)
    return int(outcome), made_up_error(int(outcome))


def in_other_order(lines: Iterator[bytes], seed: str) -> Iterator[tuple[int, bytes]]:
    """The lines with their positions, shuffled within a window. The same seed gives the same order."""
    numbered, chance = enumerate(lines), random.Random(seed)
    while window := list(islice(numbered, WINDOW)):
        order = chance.sample(window, len(window))
        yield from order if order != window else reversed(window)


# ---- the service ----


class BatchService:
    """The service without HTTP. Batches proceed when someone looks at them."""

    def __init__(self, step: float = 0.0) -> None:
        self.step = step  # seconds in each status
        self.clock: Callable[[], float] = time.monotonic  # tests may pass one that only their sleeping moves on
        self.key: str | None = None  # None: any key will do
        self.queue_limit: int | None = None  # requests in batches that have not ended
        self.max_requests = 50_000
        self.hold: str | None = None  # no batch leaves this status
        self.outcomes: dict[str, str | list[str]] = {}  # by custom_id; a list is used up, then comes success
        self.answers: list[str] = []  # outcomes of requests that are answered at once; then comes success
        self.fail_every: int | None = None
        self.expire: float | list[float | None] | None = None  # share that is run; a list: of the next batches
        self.cancel_done: float | None = None  # share that is run; None: by the clock
        self.empty_ids = False  # "" for a file that does not exist, instead of null
        self.list_delay: float = 0  # seconds until the listing shows a new batch
        self.clock_offset: float = 0  # seconds by which the server's clock is ahead
        self.habits: set[str] = set()  # see HABITS
        self.late_output = 2  # GETs of a completed batch without its output file, for the habit late-output
        self.files: dict[str, StoredFile] = {}
        self.batches: dict[str, LocalBatch] = {}
        self.executions: Counter[str] = Counter()  # by custom_id: how often a batch has got a response to it
        self.paid: Counter[str] = Counter()  # by sha256 of a request's line: how often a batch has charged for it
        self.answered: list[Json] = []  # the bodies of the requests that are answered at once
        dying = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 10 * DAY))
        self.models: dict[str, str | None] = {"local-dying": dying, "local-dead": None}  # shutdown dates; None: dead
        self.recording = True  # fills paid, answered and exchanges
        self.folder = Path()
        self.lock = threading.RLock()

    def now(self) -> int:
        return int(time.time() + self.clock_offset)

    # Files

    def new_file(self, content: bytes, purpose: str, filename: str) -> StoredFile:
        path = self.new_path()
        path.write_bytes(content)
        return self.store(path, purpose, filename)

    def read_file(self, file_id: str) -> bytes:
        return self.files[file_id].path.read_bytes()

    def new_path(self) -> Path:
        return self.folder / new_id("file-")

    def store(self, path: Path, purpose: str, filename: str) -> StoredFile:
        now = self.now()
        file = StoredFile(path.name, filename, purpose, path.stat().st_size, now, now + FILE_LIFE, path)
        self.files[file.id] = file
        return file

    def find_file(self, file_id: str) -> StoredFile:
        if file_id not in self.files:
            raise Refusal(404, f"No such File object: {file_id}", "id")
        return self.files[file_id]

    def shown_file(self, file: StoredFile) -> Answer:
        shown = asdict(file) | {"object": "file", "status": "processed", "status_details": None}
        del shown["path"]
        if "zero-bytes" in self.habits:
            shown["bytes"] = 0
        if "no-bytes" in self.habits:
            del shown["bytes"]
        return json_answer(shown)

    def create_file(self, request: Exchange) -> Answer:
        form = request.request_json if isinstance(request.request_json, dict) else {}
        if not request.upload.exists() or "filename" not in form:
            raise Refusal(400, "Missing required parameter: 'file'.", "file", "missing_required_parameter")
        if form.get("purpose") != "batch":
            raise Refusal(400, "Invalid value for 'purpose': the local mock server takes 'batch'.", "purpose")
        return self.shown_file(self.store(request.upload, "batch", form["filename"]))

    def get_file(self, request: Exchange, file_id: str) -> Answer:
        if "no-file-info" in self.habits:
            raise not_there(404)
        return self.shown_file(self.find_file(file_id))

    def get_content(self, request: Exchange, file_id: str) -> Answer:
        return Answer(200, self.find_file(file_id).path, {"Content-Type": "application/octet-stream"})

    def delete_file(self, request: Exchange, file_id: str) -> Answer:
        if "no-delete" in self.habits:
            raise not_there(405)
        self.find_file(file_id)
        del self.files[file_id]  # its bytes stay: a batch that has begun needs them
        return json_answer({"id": file_id, "object": "file", "deleted": True})

    # Models, and answers at once

    def get_model(self, request: Exchange, quoted: str) -> Answer:
        if "no-models" in self.habits:
            raise not_there(404)
        model = unquote(quoted)
        self.check_model(model)
        shown = {"id": model, "object": "model", "created": self.now() - 100 * DAY, "owned_by": "local"}
        return json_answer(shown | {"shutdown_date": self.models.get(model)})

    def check_model(self, model: str) -> None:
        if model in self.dead_models():
            raise Refusal(404, f"The model {model!r} does not exist.", "model", "model_not_found")

    def dead_models(self) -> set[str]:
        return {model for model, shutdown_date in self.models.items() if shutdown_date is None}

    def answer_at_once(self, request: Exchange) -> Answer:
        body = request.request_json
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            raise Refusal(400, "Missing required parameter: 'model'.", "model", "missing_required_parameter")
        if self.recording:
            self.answered.append(body)
        self.check_model(body["model"])
        outcome = at_endpoint(self.answers.pop(0) if self.answers else SUCCESS, request.path)
        status, answer = response_to(request.path, body, outcome, self.now(), max(1, request.size // 4))
        return json_answer(answer, status)

    # Batches

    def new_batch(
        self, status: str, *, input_file: StoredFile | None = None, endpoint: str = RESPONSES,
        output: bytes | None = None, errors: bytes | None = None, metadata: dict[str, str] | None = None,
        created_at: int | None = None, **overrides: Any,
    ) -> LocalBatch:
        """A batch that is in this status and stays there; if it is cancelled, it stays ``cancelling``.

        ``overrides`` are other fields of the Batch object, or other values of these.
        """
        input_file = input_file or self.new_file(b"", "batch", "requests.jsonl")
        now = int(created_at or self.now())
        batch = LocalBatch(input_file=input_file, endpoint=endpoint, metadata=metadata, created_at=now,
                           born=self.clock(), frozen=True)
        batch.enter(status, batch.born)
        completed, failed = len((output or b"").splitlines()), len((errors or b"").splitlines())
        batch.request_counts = counts(batch.total or completed + failed, completed, failed)
        if output is not None:
            batch.output_file_id = self.new_file(output, "batch_output", f"{batch.id}_output.jsonl").id
        if errors is not None:
            batch.error_file_id = self.new_file(errors, "batch_output", f"{batch.id}_error.jsonl").id
        for name, value in overrides.items():
            setattr(batch, name, value)
        self.batches[batch.id] = batch
        return batch

    def create_batch(self, request: Exchange) -> Answer:
        content = request.request_json
        check_creation(content)
        input_file = self.files.get(content["input_file_id"])
        if input_file is None or input_file.purpose != "batch":
            message = f"Invalid 'input_file_id': there is no file {content['input_file_id']} with purpose 'batch'."
            raise Refusal(400, message, "input_file_id")
        endpoint, metadata, now = content["endpoint"], content.get("metadata"), self.now()
        batch = LocalBatch(input_file=input_file, endpoint=endpoint, metadata=metadata, created_at=now,
                           born=self.clock())
        answer = json_answer(self.shown(batch))
        self.enqueue(batch)
        return answer

    def enqueue(self, batch: LocalBatch) -> None:
        if self.queue_limit is not None:
            for other in self.batches.values():
                self.advance(other)  # those that have ended by now make room
            active = [other for other in self.batches.values() if other.status in NEXT_STATUS]
            batch.over_limit = sum(other.total for other in [*active, batch]) > self.queue_limit
        batch.expire = self.expire if not isinstance(self.expire, list) else (self.expire or [None]).pop(0)
        self.batches[batch.id] = batch

    def list_batches(self, request: Exchange) -> Answer:
        limit, after = request.query.get("limit", "20"), request.query.get("after")
        if not limit.isdecimal() or not 1 <= int(limit) <= 100:
            raise Refusal(400, "Invalid 'limit': an integer from 1 to 100 is expected.", "limit")
        listed = self.clock() - self.list_delay
        batches = [batch for batch in list(self.batches.values()) if batch.frozen or batch.born <= listed]
        batches = sorted(batches, key=lambda batch: batch.created_at)[::-1]  # newest first
        if after and "ignores-after" not in self.habits:
            if after not in [batch.id for batch in batches]:
                raise Refusal(400, f"Invalid 'after': there is no {after}.", "after")
            del batches[: [batch.id for batch in batches].index(after) + 1]
        shown = [self.look(batch) for batch in batches[: int(limit)]]
        return json_answer(self.listing(shown, len(batches) > int(limit)))

    def listing(self, shown: list[Json], has_more: bool) -> Json:
        if "short-endpoint" in self.habits:
            shown = [each | {"endpoint": each["endpoint"].removeprefix("/v1")} for each in shown]
        first, last = (shown[0]["id"], shown[-1]["id"]) if shown else ("", "")
        content = {"object": "list", "data": shown, "first_id": first, "last_id": last}
        return content if "no-has-more" in self.habits else content | {"has_more": has_more}

    def get_batch(self, request: Exchange, batch_id: str) -> Answer:
        batch = self.find_batch(batch_id)
        shown = self.look(batch)
        batch.looks += batch.status == "completed"
        return json_answer(shown)

    def cancel_batch(self, request: Exchange, batch_id: str) -> Answer:
        batch = self.find_batch(batch_id)
        self.advance(batch)
        if batch.status in TERMINAL:
            raise Refusal(409, f"Cannot cancel a batch with status '{batch.status}'.")
        if batch.status != "cancelling":
            self.cancel(batch)
        return json_answer(self.shown(batch))

    def find_batch(self, batch_id: str) -> LocalBatch:
        if batch_id not in self.batches:
            raise Refusal(404, f"No such batch: {batch_id}", "id")
        return self.batches[batch_id]

    def cancel(self, batch: LocalBatch) -> None:
        if batch.status == "validating":
            batch.total = 0  # the batch has accepted no request yet
        share = self.progress(batch) if self.cancel_done is None else self.cancel_done
        batch.done = int(batch.total * share)
        batch.enter("cancelling", self.clock())

    def look(self, batch: LocalBatch) -> Json:
        """The Batch object as it is now."""
        with self.lock:
            self.advance(batch)
            if batch.status == "in_progress" and not batch.frozen:
                batch.request_counts = counts(batch.total, int(batch.total * self.progress(batch)))
            return self.shown(batch)

    def shown(self, batch: LocalBatch) -> Json:
        """The Batch object with the service's habits."""
        content = batch.as_json()
        if "late-output" in self.habits and batch.status == "completed" and batch.looks < self.late_output:
            content["output_file_id"] = "" if self.empty_ids else None
        if "upper-case" in self.habits:
            content["status"] = batch.status.upper()
        if "no-metadata" in self.habits:
            content["metadata"] = None
        return content

    def progress(self, batch: LocalBatch) -> float:
        """The share of the requests that have been run, by the clock."""
        if batch.frozen or batch.status == "validating":
            return 0.0
        elapsed = self.clock() - batch.since
        return 1.0 if batch.status == "finalizing" or elapsed >= self.step else elapsed / self.step

    def advance(self, batch: LocalBatch) -> None:
        while batch.status in NEXT_STATUS and batch.status not in (self.hold, batch.hold) and not batch.frozen:
            if self.clock() < batch.since + self.step:
                return
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
        """Whether the batch fails. Fills in its errors, or the number of its requests."""
        check = InputCheck(batch.endpoint, self.dead_models())
        if batch.input_file_id not in self.files:
            errors = [batch_error("invalid_request", f"The input file {batch.input_file_id} does not exist.")]
        elif not batch.total:
            errors = [batch_error("empty_file", "The input file is empty.")]
        elif batch.total > self.max_requests:
            errors = [batch_error("too_many_tasks", f"The input file has more than {self.max_requests} requests.")]
        else:
            with batch.input_file.path.open("rb") as lines:
                errors = list(islice(check.errors(lines), MAX_BATCH_ERRORS))
        batch.model = check.model
        if not errors and batch.over_limit:
            message = f"Enqueued token limit reached for {check.model}: wait until a batch has ended, or send fewer."
            errors = [batch_error("token_limit_exceeded", message)]
        if errors:
            batch.errors = {"object": "list", "data": errors}
        else:
            batch.request_counts = counts(batch.total)
        return bool(errors)

    def execute(self, batch: LocalBatch, done: int, rest: str) -> None:
        """Run the first ``done`` requests of the input file; the others get the outcome ``rest``."""
        output, errors = self.new_path(), self.new_path()
        outcomes: Counter[str] = Counter()
        with (
            batch.input_file.path.open("rb") as lines,
            output.open("w", encoding="ascii") as successes,
            errors.open("w", encoding="ascii") as failures,
        ):
            for position, line in in_other_order(islice(lines, batch.total), batch.id):
                request = json.loads(line.decode())
                outcome = self.outcome(request["custom_id"], position) if position < done else rest
                outcome = at_endpoint(outcome, batch.endpoint)
                if outcome != "missing":
                    (successes if outcome in TEXTS else failures).write(self.results_line(batch, request, outcome))
                    outcomes[outcome] += 1
                    self.count_execution(request["custom_id"], line, outcome)
        batch.output_file_id = self.store_results(output, f"{batch.id}_output.jsonl")
        batch.error_file_id = self.store_results(errors, f"{batch.id}_error.jsonl")
        completed = sum(count for outcome, count in outcomes.items() if outcome in TEXTS)
        batch.request_counts = counts(batch.total, completed, outcomes.total() - completed)
        charged = sum(count for outcome, count in outcomes.items() if is_paid(outcome))
        batch.usage = usage(RESPONSES, INPUT_TOKENS * charged, OUTPUT_TOKENS * charged)

    def results_line(self, batch: LocalBatch, request: Json, outcome: str) -> str:
        response, error = None, None
        if outcome in NO_RESPONSE:
            error = dict(zip(("code", "message"), NO_RESPONSE[outcome], strict=True))
        else:
            status, body = response_to(batch.endpoint, request["body"], outcome, batch.created_at, INPUT_TOKENS)
            shown = json.dumps(body) if "string-bodies" in self.habits else body
            response = {"status_code": status, "request_id": new_id("req_"), "body": shown}
        own = {"id": new_id("batch_req_"), "custom_id": request["custom_id"]}
        return json.dumps(own | {"response": response, "error": error}) + "\n"

    def count_execution(self, custom_id: str, line: bytes, outcome: str) -> None:
        if outcome not in NO_RESPONSE:
            self.executions[custom_id] += 1
        if self.recording and is_paid(outcome):
            self.paid[hashlib.sha256(line.removesuffix(b"\n")).hexdigest()] += 1

    def outcome(self, custom_id: str, position: int) -> str:
        asked = self.outcomes.get(custom_id)
        if isinstance(asked, list):
            return asked.pop(0) if asked else SUCCESS
        if asked is None and self.fail_every and not (position + 1) % self.fail_every:
            return SUCCESS if self.executions[custom_id] else "500"
        return asked or SUCCESS

    def store_results(self, path: Path, filename: str) -> str | None:
        size = path.stat().st_size
        if not size and "both-files" not in self.habits:
            path.unlink()
            return "" if self.empty_ids else None
        if size and "no-final-newline" in self.habits:
            with path.open("r+b") as file:
                file.truncate(size - 1)
        return self.store(path, "batch_output", filename).id


Action = Callable[..., Answer]
ROUTES: list[tuple[str, str, Action]] = [
    ("POST", "/v1/files", BatchService.create_file),
    ("GET", "/v1/files/([^/]+)", BatchService.get_file),
    ("DELETE", "/v1/files/([^/]+)", BatchService.delete_file),
    ("GET", "/v1/files/([^/]+)/content", BatchService.get_content),
    ("POST", "/v1/batches", BatchService.create_batch),
    ("GET", "/v1/batches", BatchService.list_batches),
    ("GET", "/v1/batches/([^/]+)", BatchService.get_batch),
    ("POST", "/v1/batches/([^/]+)/cancel", BatchService.cancel_batch),
    ("GET", "/v1/models/(.+)", BatchService.get_model),
    ("POST", "/v1/responses", BatchService.answer_at_once),
    ("POST", "/v1/chat/completions", BatchService.answer_at_once),
]


def answer_to(request: Exchange, service: BatchService) -> Answer:
    try:
        check_key(request.headers.get("authorization", ""), service.key)
        for method, pattern, action in ROUTES:
            if method == request.method and (found := re.fullmatch(pattern, request.path)):
                with service.lock:
                    return action(service, request, *found.groups())
        raise Refusal(404, f"Invalid URL ({request.method} {request.path})")
    except Refusal as refusal:
        return json_answer(refusal.content, refusal.status)


def check_key(authorization: str, key: str | None) -> None:
    given = authorization.removeprefix("Bearer ").strip() if authorization.startswith("Bearer ") else ""
    if not given:
        raise Refusal(401, "You didn't provide an API key in the header Authorization: Bearer.")
    if key not in (None, given):
        raise Refusal(401, "Incorrect API key provided.", code="invalid_api_key")


# ---- HTTP ----


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    rbufsize = CHUNK
    wbufsize = 64 * 1024  # headers and a short body leave as one packet
    disable_nagle_algorithm = True

    def respond(self) -> None:
        if "Transfer-Encoding" in self.headers:
            self.send_error(411)  # closes the connection
            return
        api = self.server.api
        request = self.received()
        if api.recording:
            api.exchanges.append(request)
        if fault := api.take_fault(request):
            self.suffer(fault, request)
        else:
            self.send(answer_to(request, api), request)

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = respond

    def received(self) -> Exchange:
        url, upload = urlsplit(self.path), self.server.api.new_path()
        headers = {name.lower(): value for name, value in self.headers.items()}
        size = int(headers.get("content-length", 0))
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionAbortedError("the client went away")
        boundary = re.match(r'multipart/form-data;.*boundary="?([^";]+)', headers.get("content-type", ""))
        content = read_form(body, boundary[1].encode(), upload) if boundary else json_or_none(body)
        return Exchange(self.command, url.path, dict(parse_qsl(url.query)), headers, content, size, upload)

    def suffer(self, fault: Fault, request: Exchange) -> None:
        api, answer = self.server.api, fault.answer()
        if fault.when == "before":
            api.wait(fault.delay())
        if fault.when == "later":
            api.postpone(request, fault.seconds)
        elif fault.action not in ("answer", "reset"):
            answer = answer_to(request, api)
        elif fault.when == "after":
            answer_to(request, api)
        if fault.when == "after":
            api.wait(fault.delay())
        if fault.action == "reset":
            self.reset()
        elif fault.action == "drip":
            self.drip(answer, request, fault.seconds)
        else:
            self.send(answer, request, fault.action)

    def send(self, answer: Answer, exchange: Exchange, action: str = "answer") -> None:
        exchange.status = answer.status
        exchange.answer_json = json_or_none(answer.body) if isinstance(answer.body, bytes) else None
        size = len(answer.body) if isinstance(answer.body, bytes) else answer.body.stat().st_size
        headers = {"content-type": "application/json", "x-request-id": new_id("req_")}
        headers |= {"connection": "close"} if action == "shorten" else {"content-length": str(size)}
        self.send_response(answer.status)
        for name, value in (headers | {name.lower(): value for name, value in answer.headers.items()}).items():
            self.send_header(name, value)
        self.end_headers()
        if action in ("cut", "shorten"):
            size //= 2
            self.close_connection = True
        with answer.open() as body:
            while block := body.read(min(size, CHUNK)):
                size -= self.wfile.write(block)

    def drip(self, answer: Answer, exchange: Exchange, seconds: float) -> None:
        wire, self.wfile = self.wfile, io.BytesIO()
        self.send(answer, exchange)
        whole, self.wfile = self.wfile.getvalue(), wire
        for number in range(len(whole)):
            wire.write(whole[number : number + 1])
            wire.flush()
            self.server.api.wait(seconds)

    def reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())  # past socketserver, which would end the stream in order first

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(self.server.api.now() if timestamp is None else timestamp)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True  # a client may keep its connection open
    request_queue_size = 128

    def __init__(self, port: int, api: LocalBatchAPI) -> None:
        self.api = api
        super().__init__((HOST, port), Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError) and not self.api.stopping.is_set():
            super().handle_error(request, client_address)


class LocalBatchAPI(BatchService):
    """The service on a loopback port (0: a free one), with its files in a temporary folder.

    ``exchanges`` has every HTTP exchange in the order of arrival; ``faults`` says what goes wrong.
    """

    def __init__(self, port: int = 0, *, step: float = 0.0) -> None:
        super().__init__(step)
        self.port = port
        self.faults: list[Fault] = []
        self.exchanges: list[Exchange] = []
        self.postponed: list[Exchange] = []
        self.stopping = threading.Event()

    @property
    def base_url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    def __enter__(self) -> LocalBatchAPI:
        """Start. Raises OSError if the port is not available."""
        self.server = Server(self.port, self)
        self.port = self.server.server_address[1]
        self.temporary = tempfile.TemporaryDirectory(prefix="local_batch_api.", ignore_cleanup_errors=True)
        self.folder = Path(self.temporary.name)
        threading.Thread(target=self.server.serve_forever, args=(0.002,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
        self.temporary.cleanup()

    def take_fault(self, request: Exchange) -> Fault | None:
        with self.lock:
            return next((fault for fault in self.faults if fault.applies_to(request.method, request.path)), None)

    def wait(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            raise ConnectionAbortedError("the server is stopping")

    def postpone(self, request: Exchange, seconds: float) -> None:
        """Keep the request for carry_out(); if ``seconds`` is not 0, carry it out by then."""
        with self.lock:
            self.postponed.append(request)
        if seconds:
            threading.Thread(target=self.carry_out_after, args=(seconds, request), daemon=True).start()

    def carry_out_after(self, seconds: float, request: Exchange) -> None:
        if not self.stopping.wait(seconds):
            self.carry_out(request)

    def carry_out(self, only: Exchange | None = None) -> list[int]:
        """Carry out the requests that a fault postponed. Returns the statuses that nobody gets to see."""
        with self.lock:
            due = [request for request in self.postponed if only is None or request is only]
            self.postponed = [request for request in self.postponed if request not in due]
        return [answer_to(request, self).status for request in due]


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
    add = parser.add_argument
    add("--port", type=port_number, default=0, metavar="N", help="port (default: a free one)")
    add("--step", type=seconds, default=0.3, metavar="SECONDS", help="time in each status (default: %(default)s)")
    add("--queue-limit", type=positive_int, metavar="N", help="requests in active batches (default: any number)")
    add("--outcome", type=outcome_option, action="append", default=[], metavar="CUSTOM_ID=OUTCOME[,OUTCOME...]",
        help="what becomes of a request; repeatable")
    add("--fail-every", type=positive_int, metavar="N", help="fail every Nth request once")
    add("--list-delay", type=seconds, default=0, metavar="SECONDS",
        help="time until the listing shows a new batch (default: %(default)s)")
    add("--habit", action="append", default=[], choices=HABITS, metavar="NAME",
        help="do as another service does; repeatable")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)  # sigwait gets them, even those that come early
    api = LocalBatchAPI(args.port, step=args.step)
    api.queue_limit, api.outcomes, api.fail_every = args.queue_limit, dict(args.outcome), args.fail_every
    api.list_delay, api.habits, api.recording = args.list_delay, set(args.habit), False
    with ExitStack() as stack:
        try:
            stack.enter_context(api)
        except OSError as error:
            print(f"local_batch_api.py: error: port {args.port}: {error.strerror}; try another --port", file=sys.stderr)
            return 1
        print(api.base_url, flush=True)
        signal.sigwait(ENDING_SIGNALS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
