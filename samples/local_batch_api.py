#!/usr/bin/env python3
"""A local mock server for OpenAI's Files and Batches API: no key, no cost, no model.

    python samples/local_batch_api.py --port 8080
    export OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=local

The server prints its base URL on stdout and answers on loopback until it is terminated; it then deletes what was
uploaded. A batch spends --step seconds in each of validating, in_progress and finalizing. Results come in another
order than the requests, and every bio is made up and says so; where a request has a JSON schema, the answer is an
object of made-up values. /v1/responses and /v1/chat/completions answer at once, too. Every model exists, except
"local-dead"; "local-dying" is to be shut down in ten days.

With --fail-every 10, every 10th request of a batch fails with a 500 the first time that it is run.

Exit codes: 0 terminated (SIGTERM, SIGINT, SIGHUP); 1 the port is not available; 2 invalid arguments.
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
import socketserver
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, ClassVar, NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlsplit

HOST = "127.0.0.1"
CHUNK = 256 * 1024
DAY = 24 * 60 * 60
FILE_LIFE = 30 * DAY
RESPONSES, CHAT = ("/v1/responses", "/v1/chat/completions")
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
INPUT_TOKENS, OUTPUT_TOKENS = 120, 45  # of each answer; at once, the input tokens depend on the body
ERROR_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 500: "server_error"}
ENDING_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

Json = dict[str, Any]


class Refusal(Exception):
    """A 4xx answer. Code raises it where the reason is known."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.content = error_envelope(status, message, param, code)


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
    content_type: str = "application/json"

    def open(self) -> BinaryIO:
        return self.body.open("rb") if isinstance(self.body, Path) else io.BytesIO(self.body)

    def size(self) -> int:
        return self.body.stat().st_size if isinstance(self.body, Path) else len(self.body)


def json_answer(content: Json, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content, indent=2).encode() + b"\n")


@dataclass
class Request:
    """A request as received. Of a form, ``request_json`` has the text fields, ``filename`` and ``bytes``."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    request_json: Any
    size: int  # of the request's body
    upload: Path  # where the form's file is


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

    id: str
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
    done: int = 0  # requests that were run before the batch was cancelled

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


def check_creation(content: Any, endpoints: Sequence[str]) -> None:
    """Refuse what ``POST /batches`` does not accept."""
    if not isinstance(content, dict):
        raise Refusal(400, "The body of the request is not a JSON object.")
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(content.get(name), str):
            raise Refusal(400, f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
    if content["endpoint"] not in endpoints:
        raise Refusal(400, f"Invalid value for 'endpoint': not one of {', '.join(endpoints)}.", "endpoint")
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


def schema_of(body: Json) -> Any:
    """The JSON Schema of the answer, where the request asks for one."""
    asked: Any = body.get("text") or body.get("response_format")
    for name in ("format", "json_schema", "schema"):  # chat completions have no "format", Responses no "json_schema"
        asked = asked.get(name, asked) if isinstance(asked, dict) else None
    return asked if isinstance(asked, dict) and "properties" in asked else None


def made_up_value(schema: Any, artist: str, name: str = "answer") -> Any:
    """A value of the schema's type; of several types the first that is not null."""
    if "anyOf" in schema:
        return made_up_value(schema["anyOf"][0], artist, name)
    if "enum" in schema:
        return schema["enum"][0]
    kinds = [schema.get("type")] if isinstance(schema.get("type"), str) else schema.get("type", [])
    kind = next((each for each in kinds if each != "null"), "null")
    if kind == "object":
        return {each: made_up_value(value, artist, each) for each, value in schema.get("properties", {}).items()}
    if kind == "array":
        return [made_up_value(schema.get("items", {}), artist, name)]
    text = f"{artist}: made-up text for {name}; no model was asked."
    return {"string": text, "integer": 1, "number": 0.5, "boolean": True, "null": None}[kind]


def responses_body(body: Json, text: str, created_at: int, input_tokens: int) -> Json:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    reasoning = {"id": new_id("rs_"), "type": "reasoning", "summary": []}
    message = {"id": new_id("msg_"), "type": "message", "role": "assistant", "status": "completed", "content": content}
    return {
        "id": new_id("resp_"), "object": "response", "created_at": created_at, "model": body["model"],
        "status": "completed", "error": None, "incomplete_details": None, "output": [reasoning, message],
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
        "usage": usage(RESPONSES, input_tokens, OUTPUT_TOKENS),
    }


def chat_body(body: Json, text: str, created_at: int, input_tokens: int) -> Json:
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
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


def in_other_order(lines: Iterator[bytes], seed: str) -> Iterator[tuple[int, bytes]]:
    """The lines with their positions, shuffled within a window. The same seed gives the same order."""
    numbered, chance = enumerate(lines), random.Random(seed)
    while window := list(islice(numbered, WINDOW)):
        order = chance.sample(window, len(window))
        yield from order if order != window else reversed(window)


# ---- the service ----


class BatchService:
    """The service without HTTP. Batches proceed when someone looks at them."""

    # what becomes of a request: an answer with one of these texts, an error line, or the HTTP status that it is
    texts: ClassVar = {SUCCESS: "{artist}: a made-up bio from the local mock server; no model was asked."}
    no_response: ClassVar = {
        "cancelled": ("batch_cancelled", "This request was not run before the batch was cancelled."),
    }

    batch_class = LocalBatch
    endpoints: tuple[str, ...] = (RESPONSES, CHAT)

    def __init__(self, step: float = 0.0) -> None:
        self.step = step  # seconds in each status
        self.max_requests = 50_000
        self.fail_every: int | None = None
        self.files: dict[str, StoredFile] = {}
        self.batches: dict[str, LocalBatch] = {}
        self.executions: Counter[str] = Counter()  # by custom_id: how often a batch has got a response to it
        dying = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 10 * DAY))
        self.models: dict[str, str | None] = {"local-dying": dying, "local-dead": None}  # shutdown dates; None: dead
        self.folder = Path()
        self.lock = threading.RLock()

    def now(self) -> int:
        return int(time.time())

    def clock(self) -> float:
        return time.monotonic()

    def answer_to(self, request: Request) -> Answer:
        try:
            self.check_key(request)
            for method, pattern, action in ROUTES:
                if method == request.method and (found := re.fullmatch(pattern, request.path)):
                    with self.lock:
                        answer: Answer = getattr(self, action)(request, *map(unquote, found.groups()))
                        return answer
            raise Refusal(404, f"Invalid URL ({request.method} {request.path})")
        except Refusal as refusal:
            return json_answer(refusal.content, refusal.status)

    def check_key(self, request: Request) -> None:
        if not re.match(r"Bearer +\S", request.headers.get("authorization", "")):
            raise Refusal(401, "You didn't provide an API key in the header Authorization: Bearer.")

    # Files

    def new_path(self) -> Path:
        return self.folder / new_id("")

    def new_id(self, prefix: str) -> str:
        return new_id(prefix)

    def store(self, path: Path, purpose: str, filename: str) -> StoredFile:
        now, size = self.now(), path.stat().st_size
        file = StoredFile(self.new_id("file-"), filename, purpose, size, now, now + FILE_LIFE, path)
        self.files[file.id] = file
        return file

    def find_file(self, file_id: str) -> StoredFile:
        if file_id not in self.files:
            raise Refusal(404, f"No such File object: {file_id}", "id")
        return self.files[file_id]

    def shown_file(self, file: StoredFile) -> Json:
        """The File object."""
        shown = asdict(file) | {"object": "file", "status": "processed", "status_details": None}
        del shown["path"]
        return shown

    def create_file(self, request: Request) -> Answer:
        form = request.request_json if isinstance(request.request_json, dict) else {}
        if not request.upload.exists() or "filename" not in form:
            raise Refusal(400, "Missing required parameter: 'file'.", "file", "missing_required_parameter")
        if form.get("purpose") != "batch":
            raise Refusal(400, "Invalid value for 'purpose': the local mock server takes 'batch'.", "purpose")
        if not form["filename"].endswith(".jsonl"):
            raise Refusal(400, "Invalid file format for Batch API. Must be .jsonl", "file")
        return json_answer(self.shown_file(self.store(request.upload, "batch", form["filename"])))

    def get_file(self, request: Request, file_id: str) -> Answer:
        return json_answer(self.shown_file(self.find_file(file_id)))

    def get_content(self, request: Request, file_id: str) -> Answer:
        return Answer(200, self.find_file(file_id).path, "application/octet-stream")

    def delete_file(self, request: Request, file_id: str) -> Answer:
        self.find_file(file_id)
        del self.files[file_id]  # its bytes stay: a batch that has begun needs them
        return json_answer({"id": file_id, "object": "file", "deleted": True})

    # Models, and answers at once

    def get_model(self, request: Request, model: str) -> Answer:
        self.check_model(model)
        shown = {"id": model, "object": "model", "created": self.now() - 100 * DAY, "owned_by": "local"}
        return json_answer(shown | {"shutdown_date": self.models.get(model)})

    def check_model(self, model: str) -> None:
        if model in self.dead_models():
            raise Refusal(404, f"The model {model!r} does not exist.", "model", "model_not_found")

    def dead_models(self) -> set[str]:
        return {model for model, shutdown_date in self.models.items() if shutdown_date is None}

    def answer_at_once(self, request: Request) -> Answer:
        body = request.request_json
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            raise Refusal(400, "Missing required parameter: 'model'.", "model", "missing_required_parameter")
        self.check_model(body["model"])
        outcome = self.outcome_at_once(body)
        status, answer = self.response_to(request.path, body, outcome, self.now(), max(1, request.size // 4))
        return json_answer(answer, status)

    def outcome_at_once(self, body: Json) -> str:
        return SUCCESS

    def response_to(
        self, endpoint: str, body: Json, outcome: str, created_at: int, input_tokens: int
    ) -> tuple[int, Json]:
        """The status and the body of the answer to a request."""
        if outcome not in self.texts:
            return int(outcome), made_up_error(int(outcome))
        artist, schema = artist_name(body), schema_of(body)
        text = self.texts[outcome].format(artist=artist)
        if schema and outcome == SUCCESS:
            text = json.dumps(made_up_value(schema, artist), ensure_ascii=False)
        answer = responses_body if endpoint.endswith("/responses") else chat_body
        return 200, answer(body, text, created_at, input_tokens)

    # Batches

    def begin(self, input_file: StoredFile, content: Json) -> LocalBatch:
        """The batch that a POST asks for."""
        return self.batch_class(id=self.new_id("batch_"), input_file=input_file, endpoint=content["endpoint"],
                                metadata=content.get("metadata"), created_at=self.now(), born=self.clock())

    def create_batch(self, request: Request) -> Answer:
        content = request.request_json
        check_creation(content, self.endpoints)
        input_file = self.files.get(content["input_file_id"])
        if input_file is None or input_file.purpose != "batch":
            message = f"Invalid 'input_file_id': there is no file {content['input_file_id']} with purpose 'batch'."
            raise Refusal(400, message, "input_file_id")
        batch = self.begin(input_file, content)
        self.batches[batch.id] = batch
        return json_answer(self.shown(batch))

    def list_batches(self, request: Request) -> Answer:
        limit, after = request.query.get("limit", "20"), request.query.get("after")
        if not limit.isdecimal() or not 1 <= int(limit) <= 100:
            raise Refusal(400, "Invalid 'limit': an integer from 1 to 100 is expected.", "limit")
        batches = sorted(self.listed(), key=lambda batch: batch.created_at)[::-1]  # newest first
        if after:
            if after not in [batch.id for batch in batches]:
                raise Refusal(400, f"Invalid 'after': there is no {after}.", "after")
            del batches[: [batch.id for batch in batches].index(after) + 1]
        shown = [self.look(batch) for batch in batches[: int(limit)]]
        return json_answer(self.listing(shown, len(batches) > int(limit)))

    def listing(self, shown: list[Json], has_more: bool) -> Json:
        first, last = (shown[0]["id"], shown[-1]["id"]) if shown else ("", "")
        return {"object": "list", "data": shown, "first_id": first, "last_id": last, "has_more": has_more}

    def listed(self) -> list[LocalBatch]:
        """The batches that the listing has, in the order of their creation."""
        return list(self.batches.values())

    def get_batch(self, request: Request, batch_id: str) -> Answer:
        return json_answer(self.look(self.find_batch(batch_id)))

    def cancel_batch(self, request: Request, batch_id: str) -> Answer:
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
        batch.done = int(batch.total * self.progress(batch))
        batch.enter("cancelling", self.clock())

    def look(self, batch: LocalBatch) -> Json:
        """The Batch object as it is now."""
        with self.lock:
            self.advance(batch)
            if batch.status == "in_progress":
                batch.request_counts = counts(batch.total, int(batch.total * self.progress(batch)))
            return self.shown(batch)

    def shown(self, batch: LocalBatch) -> Json:
        """The Batch object."""
        return batch.as_json()

    def progress(self, batch: LocalBatch) -> float:
        """The share of the requests that have been run, by the clock."""
        if batch.status == "validating":
            return 0.0
        elapsed = self.clock() - batch.since
        return 1.0 if batch.status == "finalizing" or elapsed >= self.step else elapsed / self.step

    def advance(self, batch: LocalBatch) -> None:
        """Let the batch pass through the statuses that it has left by now."""
        while batch.status in NEXT_STATUS and self.is_due(batch):
            moment = batch.since + self.step
            batch.enter(self.leave(batch), moment)

    def is_due(self, batch: LocalBatch) -> bool:
        return self.clock() >= batch.since + self.step

    def leave(self, batch: LocalBatch) -> str:
        """Do what the batch does at the end of its status. Returns the next one."""
        if batch.status == "validating":
            if errors := self.input_errors(batch):
                batch.errors = {"object": "list", "data": errors}
                return "failed"
            batch.request_counts = counts(batch.total)
        elif batch.status == "cancelling":
            self.execute(batch, batch.done, rest="cancelled")
        elif batch.status == "finalizing":
            self.execute(batch, batch.total, rest=SUCCESS)
        return NEXT_STATUS[batch.status]

    def input_errors(self, batch: LocalBatch) -> list[Json]:
        """What is wrong with the input file. Fills in the batch's model."""
        if batch.input_file.id not in self.files:
            return [batch_error("invalid_request", f"The input file {batch.input_file.id} does not exist.")]
        if not batch.total:
            return [batch_error("empty_file", "The input file is empty.")]
        if batch.total > self.max_requests:
            return [batch_error("too_many_tasks", f"The input file has more than {self.max_requests} requests.")]
        check = InputCheck(batch.endpoint, self.dead_models())
        with batch.input_file.path.open("rb") as lines:
            errors = list(islice(check.errors(lines), MAX_BATCH_ERRORS))
        batch.model = check.model
        return errors

    def execute(self, batch: LocalBatch, done: int, rest: str) -> None:
        """Run the first ``done`` requests of the input file; the others get the outcome ``rest``."""
        output, errors = self.new_path(), self.new_path()
        outcomes: Counter[str] = Counter()
        with (
            batch.input_file.path.open("rb") as lines,
            output.open("wb") as successes,
            errors.open("wb") as failures,
        ):
            for position, line in in_other_order(islice(lines, batch.total), batch.id):
                request = json.loads(line.decode())
                outcome = self.outcome(request["custom_id"], position) if position < done else rest
                result = self.results_line(batch, request, outcome)
                if result:
                    (successes if outcome in self.texts else failures).write(result)
                    outcomes[outcome] += 1
                    self.count_execution(request["custom_id"], line, outcome)
        batch.output_file_id = self.store_results(output, f"{batch.id}_output.jsonl")
        batch.error_file_id = self.store_results(errors, f"{batch.id}_error.jsonl")
        completed = sum(count for outcome, count in outcomes.items() if outcome in self.texts)
        batch.request_counts = counts(batch.total, completed, outcomes.total() - completed)
        charged = sum(count for outcome, count in outcomes.items() if self.is_paid(outcome))
        batch.usage = usage(RESPONSES, INPUT_TOKENS * charged, OUTPUT_TOKENS * charged)

    def outcome(self, custom_id: str, position: int) -> str:
        fails = self.fail_every and not (position + 1) % self.fail_every and not self.executions[custom_id]
        return "500" if fails else SUCCESS

    def is_paid(self, outcome: str) -> bool:
        return outcome in self.texts

    def results_line(self, batch: LocalBatch, request: Json, outcome: str) -> bytes:
        response, error = None, None
        if outcome in self.no_response:
            error = dict(zip(("code", "message"), self.no_response[outcome], strict=True))
        else:
            status, body = self.response_to(batch.endpoint, request["body"], outcome, batch.created_at, INPUT_TOKENS)
            response = {"status_code": status, "request_id": new_id("req_"), "body": body}
        own = {"id": new_id("batch_req_"), "custom_id": request["custom_id"]}
        return json.dumps(own | {"response": response, "error": error}).encode() + b"\n"

    def count_execution(self, custom_id: str, line: bytes, outcome: str) -> None:
        self.executions[custom_id] += outcome not in self.no_response

    def store_results(self, path: Path, filename: str) -> str | None:
        """The id of the file of results. An empty one is no file."""
        if path.stat().st_size:
            return self.store(path, "batch_output", filename).id
        path.unlink()
        return None


ROUTES = [
    ("POST", "/v1/files", "create_file"),
    ("GET", "/v1/files/([^/]+)", "get_file"),
    ("DELETE", "/v1/files/([^/]+)", "delete_file"),
    ("GET", "/v1/files/([^/]+)/content", "get_content"),
    ("POST", "/v1/batches", "create_batch"),
    ("GET", "/v1/batches", "list_batches"),
    ("GET", "/v1/batches/([^/]+)", "get_batch"),
    ("POST", "/v1/batches/([^/]+)/cancel", "cancel_batch"),
    ("GET", "/v1/models/(.+)", "get_model"),
    ("POST", "/v1/responses", "answer_at_once"),
    ("POST", "/v1/chat/completions", "answer_at_once"),
]


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
        else:
            self.answer(self.received())

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = respond

    def received(self) -> Request:
        url, upload = urlsplit(self.path), self.server.api.new_path()
        headers = {name.lower(): value for name, value in self.headers.items()}
        size = int(headers.get("content-length", 0))
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionAbortedError("the client went away")
        boundary = re.match(r'multipart/form-data;.*boundary="?([^";]+)', headers.get("content-type", ""))
        content = read_form(body, boundary[1].encode(), upload) if boundary else json_or_none(body)
        return Request(self.command, url.path, dict(parse_qsl(url.query)), headers, content, size, upload)

    def answer(self, request: Request) -> None:
        self.send(self.server.api.answer_to(request))

    def send(self, answer: Answer, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_head(answer, {"content-length": str(answer.size())} | dict(headers))
        with answer.open() as body:
            while block := body.read(CHUNK):
                self.wfile.write(block)

    def send_head(self, answer: Answer, headers: Mapping[str, str]) -> None:
        self.send_response(answer.status)
        ids = {"content-type": answer.content_type, "x-request-id": new_id("req_")}
        for name, value in (ids | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True  # a client may keep its connection open
    request_queue_size = 128

    def __init__(self, port: int, api: LocalBatchAPI) -> None:
        self.api = api
        super().__init__((HOST, port), api.handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError) and not self.api.stopping.is_set():
            super().handle_error(request, client_address)


class LocalBatchAPI(BatchService):
    """The service on a loopback port (0: a free one), with its files in a temporary folder."""

    handler = Handler

    def __init__(self, port: int = 0, *, step: float = 0.0) -> None:
        super().__init__(step)
        self.port = port
        self.stopping = threading.Event()

    @property
    def base_url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    def __enter__(self) -> Self:
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--port", type=port_number, default=0, metavar="N", help="port (default: a free one)")
    add("--step", type=seconds, default=0.3, metavar="SECONDS", help="time in each status (default: %(default)s)")
    add("--fail-every", type=positive_int, metavar="N", help="fail every Nth request once")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)  # sigwait gets them, even those that come early
    api = LocalBatchAPI(args.port, step=args.step)
    api.fail_every = args.fail_every
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
