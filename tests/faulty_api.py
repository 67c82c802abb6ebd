"""The local mock server with faults, habits of other services, a clock of its own, and a record of what it was asked.

    with FaultyAPI(step=0.1) as api:
        api.faults.append(Fault("POST", "/batches$", when="after", action="reset"))
        client = OpenAI(base_url=api.base_url, api_key="local")

Batches may be of the endpoints /responses and /chat/completions, too, as at Azure. ``outcomes`` says what becomes of
requests, by custom_id; a list is used up, then comes success ("200"). Outcomes are
    400 to 599                       this HTTP status
    expired, cancelled, timeout      an error line without a response
    missing                          no line at all
    cut, no_utf8                     a results line that is cut; one with bytes that are no UTF-8
    incomplete, content_filter       HTTP 200 with half an answer
    MAX_TOKENS                       the same with this finish_reason, in chat completions only
    refusal                          HTTP 200 with a refusal
    commentary                       HTTP 200 with nothing but a commentary message
    endless_thought                  HTTP 200 with a <think> block that never closes
    no_text, error_200               HTTP 200 without any text, with an error as its body
    dry_run                          HTTP 200 with the request as the body
    failed                           HTTP 200 with a failed response (/v1/responses only, elsewhere a 500)

Some services do some things differently. ``habits`` imitate them, and can be combined:

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
    copies-uploads                   a batch is made of a rewritten copy of its input file, and names that
    rewrites-uploads                 uploads are rewritten, always in the same way, and larger than they were sent
    no-input-id                      batches say "input_file_id": ""
    empty-listing                    the listing is empty
    odd-entries                      the listing has entries without an id, without a status, and a list
    odd-ids                          ids have "=", ":", "%" and "/" in them
    long-ids                         ids are longer than 255 characters
    limits-after-post                the first POST of each input file makes its batch and is answered with a 429
    text-statuses                    status_code is "200" instead of 200
    status-201                       status_code is 201 instead of 200
    no-status-code                   a success has no status_code
    empty-errors                     "error" is {} where there is none, in the line and in the body
    blank-errors                     "error" is "" where there is none, in the line and in the body
    nested-errors                    the error of a refused request is nested twice
    byte-order-mark                  results files begin with one
    commentary                       a commentary message before each final answer
    fragments                        a part of the answer, as a message of its own, before the whole
    thinks                           chat completions begin with a <think> block
    text-parts                       the content of chat completions is a list with a thinking part and a text part
    reasoning                        usage tells how many tokens were reasoning
    cancel-loses-output              a cancelled batch has counts, but no output file
    cancel-500                       a cancellation after the end is answered with a 500
    failed-error-file                a failed batch has an error file with a line for each request
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from local_batch_api import CHAT as CHAT
from local_batch_api import (
    NEXT_STATUS,
    RESPONSES,
    SUCCESS,
    Answer,
    Handler,
    Json,
    LocalBatch,
    LocalBatchAPI,
    Refusal,
    Request,
    StoredFile,
    batch_error,
    counts,
    json_answer,
    json_or_none,
    made_up_error,
)

HABITS = (
    "no-final-newline", "string-bodies", "both-files", "upper-case", "no-bytes", "zero-bytes", "no-file-info",
    "late-output", "no-metadata", "no-delete", "no-models", "ignores-after", "no-has-more", "short-endpoint",
    "copies-uploads", "rewrites-uploads", "no-input-id", "empty-listing", "odd-entries", "odd-ids",
    "long-ids", "limits-after-post", "text-statuses", "status-201", "no-status-code", "empty-errors", "blank-errors",
    "nested-errors", "byte-order-mark", "commentary", "fragments", "thinks", "text-parts", "reasoning",
    "cancel-loses-output", "cancel-500", "failed-error-file",
)


def not_there(status: int) -> Refusal:
    """The answer of a web framework where the service has no such path or method."""
    refusal = Refusal(status, http.client.responses[status])
    refusal.content = {"detail": http.client.responses[status]}
    return refusal


@dataclass
class Fault:
    """Something that goes wrong with ``times`` of the matching requests, after the first ``skip`` of them.

    ``path`` is a regular expression that is searched in the path. The first matching fault in the list applies.

    answer   ``status``, ``headers`` and ``body`` (default: an error envelope with ``message`` and ``code``)
    reset    the connection is reset without an answer
    cut      the true headers and half of the body, then the end: the client can tell
    shorten  the same without Content-Length: the client cannot tell
    delay    the true answer, ``seconds`` late (the other actions can be late, too)
    close    the true answer, and from then on no connection is taken, until FaultyAPI.listen()
    drip     the true answer byte by byte, headers included, with ``seconds`` between two bytes

    ``when`` says when the fault strikes:

    before   answer and reset keep the service from doing its work
    after    the service has done its work
    later    answer or reset comes at once; the service does its work at FaultyAPI.carry_out(), or by itself
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
        if self.body is not None:
            return Answer(self.status, self.body)
        envelope = made_up_error(self.status)
        envelope["error"].update({k: v for k, v in (("message", self.message), ("code", self.code)) if v})
        return json_answer(envelope, self.status)


@dataclass
class Exchange(Request):
    """A request as received and its answer. ``status`` is None where no answer was sent."""

    status: int | None = None
    answer_json: Any = None


@dataclass(kw_only=True)
class FaultyBatch(LocalBatch):
    """A batch that may stand still, expire or be over the queue limit."""

    expire: float | None = None  # the share of its requests that is run before it expires
    over_limit: bool = False
    looks: int = 0  # GETs since it is completed
    hold: str | None = None  # it does not leave this status
    frozen: bool = False  # it does not leave its status


class FaultyHandler(Handler):
    """Records each exchange and lets faults strike."""

    def answer(self, request: Request) -> None:
        api: FaultyAPI = self.server.api  # type: ignore[assignment]
        exchange = Exchange(**vars(request))
        if api.recording:
            api.exchanges.append(exchange)
        if fault := api.take_fault(exchange):
            self.suffer(api, fault, exchange)
        else:
            self.reply(api.answer_to(exchange), exchange)

    def suffer(self, api: FaultyAPI, fault: Fault, exchange: Exchange) -> None:
        answer, headers = fault.answer(), fault.headers or {"retry-after-ms": "1"}
        if fault.when == "before":
            api.wait(fault.delay())
        if fault.when == "later":
            api.postpone(exchange, fault.seconds)
        elif fault.action not in ("answer", "reset"):
            answer, headers = api.answer_to(exchange), {}
        elif fault.when == "after":
            api.answer_to(exchange)
        if fault.when == "after":
            api.wait(fault.delay())
        if fault.action == "reset":
            self.reset()
        elif fault.action == "drip":
            self.drip(api, answer, exchange, fault.seconds)
        else:
            if fault.action == "close":
                api.stop_listening()
                headers = {"connection": "close"}
            self.reply(answer, exchange, headers, fault.action)

    def reply(
        self, answer: Answer, exchange: Exchange, headers: Mapping[str, str] | None = None, action: str = "answer"
    ) -> None:
        exchange.status = answer.status
        exchange.answer_json = json_or_none(answer.body) if isinstance(answer.body, bytes) else None
        own = {name.lower(): value for name, value in (headers or {}).items()}
        self.close_connection = self.close_connection or action == "close"
        if action not in ("cut", "shorten"):
            self.send(answer, own)
            return
        length = {"connection": "close"} if action == "shorten" else {"content-length": str(answer.size())}
        self.send_head(answer, length | own)
        self.close_connection = True
        with answer.open() as body:
            self.wfile.write(body.read(answer.size() // 2))

    def drip(self, api: FaultyAPI, answer: Answer, exchange: Exchange, seconds: float) -> None:
        wire, self.wfile = self.wfile, io.BytesIO()
        self.reply(answer, exchange)
        whole, self.wfile = self.wfile.getvalue(), wire
        api.dripping = len(whole)
        for number in range(len(whole)):
            wire.write(whole[number : number + 1])
            wire.flush()
            api.dripping -= 1
            api.wait(seconds)

    def reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())  # past socketserver, which would end the stream in order first

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(self.server.api.now() if timestamp is None else timestamp)


class FaultyAPI(LocalBatchAPI):
    """The mock server. ``exchanges`` has every HTTP exchange in the order of arrival; ``faults`` says what goes wrong.

    ``clock`` may be replaced by one that only the tests' sleeping moves on.
    """

    handler = FaultyHandler
    batch_class = FaultyBatch
    endpoints = (*LocalBatchAPI.endpoints, "/responses", "/chat/completions")
    texts = LocalBatchAPI.texts | {
        "incomplete": "{artist}: a made-up bio from the",
        "refusal": "Refused, as the local mock server was told to.",
        "content_filter": "{artist}: a made-up",
        "MAX_TOKENS": "{artist}: a made-up",
        "commentary": "I shall write about {artist}.",
        "endless_thought": "<think>Who is {artist}?",
        "cut": LocalBatchAPI.texts[SUCCESS],
        "no_utf8": LocalBatchAPI.texts[SUCCESS],
        "dry_run": "",
        "failed": "Failed, as the local mock server was told to.",
        "no_text": "",
        "error_200": "",
    }
    no_response = LocalBatchAPI.no_response | {
        "expired": ("batch_expired", "This request was not run before the completion window ended."),
        "timeout": ("request_timeout", "This request timed out."),
    }
    batches: dict[str, FaultyBatch]  # type: ignore[assignment]

    def __init__(self, port: int = 0, *, step: float = 0.0) -> None:
        super().__init__(port, step=step)
        self.faults: list[Fault] = []
        self.habits: set[str] = set()  # see HABITS
        self.exchanges: list[Exchange] = []
        self.postponed: list[Exchange] = []
        self.answered: list[Json] = []  # the bodies of the requests that are answered at once
        self.paid: Counter[str] = Counter()  # by sha256 of a request's line: how often a batch has charged for it
        self.recording = True  # fills exchanges, answered and paid
        self.key: str | None = None  # None: any key will do
        self.outcomes: dict[str, str | list[str]] = {}  # by custom_id; a list is used up, then comes success
        self.answers: list[str] = []  # outcomes of requests that are answered at once; then comes success
        self.queue_limit: int | None = None  # requests in batches that have not ended
        self.hold: str | None = None  # no batch leaves this status
        self.expire: float | list[float | None] | None = None  # share that is run; a list: of the next batches
        self.cancel_done: float | None = None  # share that is run; None: by the clock
        self.empty_ids = False  # "" for a file that does not exist, instead of null
        self.list_delay: float = 0  # seconds until the listing shows a new batch
        self.dripping = 0  # bytes of the latest answer that drips that have not been sent
        self.limited: set[str] = set()  # input files whose POST has been answered with a 429
        self.originals: dict[bytes, bytes] = {}  # lines as they were sent, by those into which they were rewritten
        self.clock_offset: float = 0  # seconds by which the server's clock is ahead
        self.late_output = 2  # GETs of a completed batch without its output file, for the habit late-output

    def now(self) -> int:
        return int(time.time() + self.clock_offset)

    # Faults

    def take_fault(self, request: Request) -> Fault | None:
        with self.lock:
            return next((fault for fault in self.faults if fault.applies_to(request.method, request.path)), None)

    def wait(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            raise ConnectionAbortedError("the server is stopping")

    def stop_listening(self) -> None:
        """Refuse connections. The file descriptor, which a thread polls, becomes that of a socket that says nothing."""
        self.server.socket.shutdown(socket.SHUT_RDWR)  # a poll that is under way would keep it open for a moment
        with socket.socket(type=socket.SOCK_DGRAM) as silent:
            os.dup2(silent.fileno(), self.server.socket.fileno())

    def listen(self) -> None:
        with socket.create_server(self.server.server_address) as listening:
            os.dup2(listening.fileno(), self.server.socket.fileno())

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
        return [self.answer_to(request).status for request in due]

    def check_key(self, request: Request) -> None:
        super().check_key(request)
        if self.key not in (None, request.headers["authorization"].removeprefix("Bearer ").strip()):
            raise Refusal(401, "Incorrect API key provided.", code="invalid_api_key")

    # Files and models

    def new_file(self, content: bytes, purpose: str, filename: str) -> StoredFile:
        path = self.new_path()
        path.write_bytes(content)
        return self.store(path, purpose, filename)

    def new_id(self, prefix: str) -> str:
        middle = "=:%2F/" if "odd-ids" in self.habits else ""
        return super().new_id(prefix + middle + "x" * (300 if "long-ids" in self.habits else 0))

    def create_file(self, request: Request) -> Answer:
        if "rewrites-uploads" in self.habits and request.upload.exists():
            self.rewrite(request.upload, request.upload, {"user": "a gateway"})
        return super().create_file(request)

    def rewrite(self, source: Path, target: Path, fields: Json) -> None:
        """Write the requests as a gateway does that parses them: other bytes, further fields."""
        lines = source.read_bytes().splitlines(keepends=True)
        rewritten = []
        for line in lines:
            request = json.loads(line)
            rewritten.append(json.dumps(request | {"body": request["body"] | fields}).encode() + b"\n")
            self.originals[rewritten[-1]] = self.originals.get(line, line)
        target.write_bytes(b"".join(rewritten))

    def read_file(self, file_id: str) -> bytes:
        return self.files[file_id].path.read_bytes()

    def shown_file(self, file: StoredFile) -> Json:
        shown = super().shown_file(file)
        if "zero-bytes" in self.habits:
            shown["bytes"] = 0
        if "no-bytes" in self.habits:
            del shown["bytes"]
        return shown

    def get_file(self, request: Request, file_id: str) -> Answer:
        if "no-file-info" in self.habits:
            raise not_there(404)
        return super().get_file(request, file_id)

    def delete_file(self, request: Request, file_id: str) -> Answer:
        if "no-delete" in self.habits:
            raise not_there(405)
        return super().delete_file(request, file_id)

    def get_model(self, request: Request, quoted: str) -> Answer:
        if "no-models" in self.habits:
            raise not_there(404)
        return super().get_model(request, quoted)

    # Answers

    def outcome_at_once(self, body: Json) -> str:
        return self.checked(self.answers.pop(0) if self.answers else SUCCESS)

    def answer_at_once(self, request: Request) -> Answer:
        if self.recording:
            self.answered.append(request.request_json)
        return super().answer_at_once(request)

    def outcome(self, custom_id: str, position: int) -> str:
        asked = self.outcomes.get(custom_id)
        if isinstance(asked, list):
            asked = asked.pop(0) if asked else SUCCESS
        return self.checked(asked or super().outcome(custom_id, position))

    def checked(self, outcome: str) -> str:
        known = outcome in self.texts or outcome in self.no_response or outcome == "missing"
        if not known and not re.fullmatch("[45][0-9][0-9]", outcome):
            raise ValueError(f"no such outcome: {outcome!r}")
        return outcome

    def is_paid(self, outcome: str) -> bool:
        return super().is_paid(outcome) and outcome != "failed"

    def response_to(
        self, endpoint: str, body: Json, outcome: str, created_at: int, input_tokens: int
    ) -> tuple[int, Json]:
        is_chat = not endpoint.endswith("/responses")
        if outcome == "error_200":
            return 200, made_up_error(500)
        if outcome == "dry_run":
            return 200, body
        if outcome == "failed" and is_chat:
            return 500, made_up_error(500)
        status, answer = super().response_to(endpoint, body, outcome, created_at, input_tokens)
        if outcome not in self.texts:
            return status, {"error": answer} if "nested-errors" in self.habits else answer
        (self.change_chat if is_chat else self.change_response)(answer, outcome)
        if "reasoning" in self.habits and answer["usage"]:
            answer["usage"][("completion" if is_chat else "output") + "_tokens_details"] = {"reasoning_tokens": 30}
        for habit, nothing in (("empty-errors", {}), ("blank-errors", "")):
            if habit in self.habits and not answer.get("error"):
                answer["error"] = nothing
        return status, answer

    def change_chat(self, answer: Json, outcome: str) -> None:
        (choice,) = answer["choices"]
        if outcome in ("incomplete", "content_filter", "MAX_TOKENS"):
            choice["finish_reason"] = "length" if outcome == "incomplete" else outcome
        if outcome == "refusal":
            choice["message"] |= {"content": None, "refusal": self.texts["refusal"]}
        if outcome == "no_text":
            choice["message"]["content"] = None
        text = choice["message"]["content"]
        if text and "thinks" in self.habits:
            text = choice["message"]["content"] = f"<think>\nA bio is wanted.\n</think>\n\n{text}"
        if text and "text-parts" in self.habits:
            thought = {"type": "thinking", "thinking": [{"type": "text", "text": "A bio is wanted."}]}
            choice["message"]["content"] = [thought, {"type": "text", "text": text}]

    def change_response(self, answer: Json, outcome: str) -> None:
        reasons = {"incomplete": "max_output_tokens", "content_filter": "content_filter"}
        if outcome in reasons:
            answer |= {"status": "incomplete", "incomplete_details": {"reason": reasons[outcome]}}
            answer["output"][1]["status"] = "incomplete"
        if outcome == "refusal":
            answer["output"][1]["content"] = [{"type": "refusal", "refusal": self.texts["refusal"]}]
        if outcome == "no_text":
            answer["output"] = [item for item in answer["output"] if item["type"] != "message"]
        if outcome == "failed":
            error = {"code": "server_error", "message": self.texts["failed"]}
            answer |= {"status": "failed", "error": error, "output": [], "usage": None}
        messages = [item for item in answer["output"] if item["type"] == "message"]
        if outcome == "commentary":
            messages[0]["phase"] = "commentary"
        elif messages and "commentary" in self.habits:
            messages[0]["phase"] = "final_answer"
            self.put_before(answer, messages[0], "I shall write a short bio.", phase="commentary")
        if messages and "fragments" in self.habits:
            self.put_before(answer, messages[0], "A short")

    def put_before(self, answer: Json, message: Json, text: str, **fields: str) -> None:
        """Put a message with this text before another one."""
        content = [{"type": "output_text", "text": text, "annotations": []}]
        extra = {**message, "id": f"{message['id']}0", "content": content, **fields}
        answer["output"].insert(answer["output"].index(message), extra)

    def results_line(self, batch: LocalBatch, request: Json, outcome: str) -> bytes:
        if outcome == "missing":
            return b""
        line = super().results_line(batch, request, outcome)
        if outcome == "cut":
            return line[: len(line) // 2] + b"\n"
        if outcome == "no_utf8":
            return line.replace(b"made-up", b"made\xff-up")
        return self.changed_line(line) if self.habits else line

    def changed_line(self, line: bytes) -> bytes:
        """The results line as the habits have it."""
        content = json.loads(line)
        response = content["response"]
        if response and "string-bodies" in self.habits:
            response["body"] = json.dumps(response["body"])
        if response and response["status_code"] == 200 and "status-201" in self.habits:
            response["status_code"] = 201
        if response and "text-statuses" in self.habits:
            response["status_code"] = str(response["status_code"])
        if response and str(response["status_code"])[0] == "2" and "no-status-code" in self.habits:
            del response["status_code"]
        for habit, nothing in (("empty-errors", {}), ("blank-errors", "")):
            if habit in self.habits and not content["error"]:
                content["error"] = nothing
        return json.dumps(content).encode() + b"\n"

    def count_execution(self, custom_id: str, line: bytes, outcome: str) -> None:
        super().count_execution(custom_id, line, outcome)
        if self.recording and self.is_paid(outcome):
            sent = self.originals.get(line, line)
            self.paid[hashlib.sha256(sent.removesuffix(b"\n")).hexdigest()] += 1

    def store_results(self, path: Path, filename: str) -> str | None:
        size = path.stat().st_size
        if not size and "both-files" in self.habits:
            return self.store(path, "batch_output", filename).id
        if size and "no-final-newline" in self.habits:
            with path.open("r+b") as file:
                file.truncate(size - 1)
        if size and "byte-order-mark" in self.habits:
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        return super().store_results(path, filename) or self.no_file()

    def no_file(self) -> str | None:
        return "" if self.empty_ids else None

    # Batches

    def new_batch(
        self, status: str, *, input_file: StoredFile | None = None, endpoint: str = RESPONSES,
        output: bytes | None = None, errors: bytes | None = None, metadata: dict[str, str] | None = None,
        created_at: int | None = None, **overrides: Any,
    ) -> FaultyBatch:
        """A batch that is in this status and stays there; if it is cancelled, it stays ``cancelling``.

        ``overrides`` are other fields of the Batch object, or other values of these.
        """
        input_file = input_file or self.new_file(b"", "batch", "requests.jsonl")
        now = int(created_at or self.now())
        batch = FaultyBatch(id=self.new_id("batch_"), input_file=input_file, endpoint=endpoint, metadata=metadata,
                            created_at=now, born=self.clock(), frozen=True)
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

    def create_batch(self, request: Request) -> Answer:
        answer = super().create_batch(request)
        file_id = request.request_json["input_file_id"]
        if "limits-after-post" in self.habits and file_id not in self.limited:
            self.limited.add(file_id)
            raise Refusal(429, "Too many requests.", code="rate_limit_exceeded")
        return answer

    def begin(self, input_file: StoredFile, content: Json) -> LocalBatch:
        if "copies-uploads" in self.habits:
            copy = self.new_path()
            self.rewrite(input_file.path, copy, {})
            input_file = self.store(copy, "batch", input_file.filename)
        batch = super().begin(input_file, content)
        assert isinstance(batch, FaultyBatch)
        if self.queue_limit is not None:
            for other in self.batches.values():
                self.advance(other)  # those that have ended by now make room
            active = [other for other in self.batches.values() if other.status in NEXT_STATUS]
            batch.over_limit = sum(other.total for other in [*active, batch]) > self.queue_limit
        batch.expire = self.expire if not isinstance(self.expire, list) else (self.expire or [None]).pop(0)
        return batch

    def list_batches(self, request: Request) -> Answer:
        if "ignores-after" in self.habits:
            request = replace(request, query={"limit": request.query.get("limit", "20")})
        return super().list_batches(request)

    def listed(self) -> list[LocalBatch]:
        moment = self.clock() - self.list_delay
        batches = [] if "empty-listing" in self.habits else list(self.batches.values())
        return [batch for batch in batches if batch.frozen or batch.born <= moment]

    def listing(self, shown: list[Json], has_more: bool) -> Json:
        content = super().listing(shown, has_more)
        if "short-endpoint" in self.habits:
            content["data"] = [each | {"endpoint": each["endpoint"].removeprefix("/v1")} for each in shown]
        if "odd-entries" in self.habits:
            content["data"] = [{"object": "batch", "status": "completed"}, {"id": "batch_odd"}, [], *content["data"]]
        if "no-has-more" in self.habits:
            del content["has_more"]
        return content

    def get_batch(self, request: Request, batch_id: str) -> Answer:
        answer = super().get_batch(request, batch_id)
        batch = self.batches[batch_id]
        batch.looks += batch.status == "completed"
        return answer

    def look(self, batch: Any) -> Json:
        return self.shown(batch) if self.batches[batch.id].frozen else super().look(batch)

    def shown(self, batch: Any) -> Json:
        content = super().shown(batch)
        late = batch.looks < self.late_output
        if "late-output" in self.habits and batch.status == "completed" and late:
            content["output_file_id"] = self.no_file()
        if "upper-case" in self.habits:
            content["status"] = batch.status.upper()
        if "no-metadata" in self.habits:
            content["metadata"] = None
        if "no-input-id" in self.habits:
            content["input_file_id"] = ""
        return content

    def cancel_batch(self, request: Request, batch_id: str) -> Answer:
        try:
            return super().cancel_batch(request, batch_id)
        except Refusal as refusal:
            if refusal.status == 409 and "cancel-500" in self.habits:
                return json_answer(made_up_error(500), 500)
            raise

    def cancel(self, batch: Any) -> None:
        super().cancel(batch)
        if self.cancel_done is not None:
            batch.done = int(batch.total * self.cancel_done)

    def progress(self, batch: Any) -> float:
        return 0.0 if batch.frozen else super().progress(batch)

    def is_due(self, batch: Any) -> bool:
        held = (batch.frozen or batch.status in (self.hold, batch.hold))
        return not held and super().is_due(batch)

    def leave(self, batch: Any) -> str:
        if batch.status == "in_progress" and batch.expire is not None:
            self.execute(batch, int(batch.total * batch.expire), rest="expired")
            return "expired"
        status = super().leave(batch)
        if status == "failed" and "failed-error-file" in self.habits:
            batch.error_file_id = self.new_file(self.errors_of(batch), "batch_output", "errors.jsonl").id
        if status == "cancelled" and "cancel-loses-output" in self.habits:
            batch.output_file_id = batch.error_file_id = None
        return status

    def errors_of(self, batch: LocalBatch) -> bytes:
        """A line for each request of a failed batch."""
        error = {"code": "invalid_request", "message": "The batch was refused."}
        requests = map(json.loads, batch.input_file.path.read_bytes().splitlines())
        lines = [{"custom_id": each["custom_id"], "response": None, "error": error} for each in requests]
        return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    def input_errors(self, batch: Any) -> list[Json]:
        errors = super().input_errors(batch)
        if not errors and batch.over_limit:
            message = f"Enqueued token limit reached for {batch.model}: wait until a batch has ended, or send fewer."
            return [batch_error("token_limit_exceeded", message)]
        return errors
