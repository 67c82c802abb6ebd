"""What the tests build: a clock, request files, results lines, and what they ask of the mock server."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from local_batch_api import LocalBatchAPI

import batch_tool

MODEL = "gpt-6-luna"


class Killed(BaseException):
    """Ends a command at once, as SIGKILL does: nothing of the program catches it."""


def kill() -> None:
    raise Killed


def nothing() -> None:
    pass


class FakeTime:
    """A clock that only sleeping moves on. Each event happens during one sleep, or at its moment."""

    def __init__(self, *events: Callable[[], object], at: Mapping[float, Callable[[], object]] | None = None) -> None:
        self.now = 0.0
        self.naps: list[float] = []
        self.events = list(events)
        self.at = dict(at or {})

    def sleep(self, seconds: float) -> None:
        assert len(self.naps) < 2000, "it waits for ever"
        self.naps.append(seconds)
        end = self.now + seconds
        while due := [moment for moment in self.at if moment <= end]:
            self.now = max(self.now, min(due))
            self.at.pop(min(due))()
        self.now = max(self.now, end)
        if self.events:
            self.events.pop(0)()

    def clock(self) -> float:
        return self.now


def live_in(api: LocalBatchAPI, time: FakeTime) -> FakeTime:
    """Let the server's time pass with this clock."""
    start = api.clock()
    api.clock = lambda: start + time.now
    return time


def subparsers() -> argparse._SubParsersAction[argparse.ArgumentParser]:
    parser = batch_tool.build_parser()
    (action,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return action


COMMANDS = dict(subparsers().choices)  # the parser of every command, in the order of the help
SENTENCES = {str(each.dest): each.help for each in subparsers()._choices_actions}  # what the help says of each


def flags_of(command: str) -> set[str]:
    return {flag for action in COMMANDS[command]._actions for flag in action.option_strings if flag.startswith("--")}


ONLINE = [name for name in COMMANDS if "--log-file" in flags_of(name)]
OFFLINE = [name for name in COMMANDS if name not in ONLINE]
WITH_JSON = [name for name in COMMANDS if "--json" in flags_of(name)]


def request(custom_id: Any = "a1", **changes: Any) -> dict[str, Any]:
    """A request as the converter writes it. `changes` replace its fields, or add to them."""
    body = {"model": MODEL, "input": f"Bio of {custom_id}", "metadata": {"artist_name": f"Artist {custom_id}"}}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/responses", "body": body} | changes


def jsonl(*lines: Any) -> bytes:
    """Each line as it is if it is bytes, else as JSON."""
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


def write_requests(*custom_ids: str, path: str = "requests.jsonl") -> bytes:
    content = jsonl(*map(request, custom_ids))
    Path(path).write_bytes(content)
    return content


def sha256_of(line: bytes) -> str:
    """The sha256 of a request's line, without its line end."""
    return hashlib.sha256(line.removesuffix(b"\n")).hexdigest()


def response(body: Any, status: Any = 200) -> dict[str, Any]:
    return {"status_code": status, "request_id": "req_1", "body": body}


def result(custom_id: str = "a1", **fields: Any) -> dict[str, Any]:
    return {"id": "batch_req_1", "custom_id": custom_id, "response": None, "error": None} | fields


def message(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "message", "content": list(parts)}


def text(words: str) -> dict[str, Any]:
    return {"type": "output_text", "text": words}


def success(custom_id: str = "a1", bio: str = "A bio.", **fields: Any) -> dict[str, Any]:
    body = {"status": "completed", "output": [message(text(bio))], "usage": {"input_tokens": 12, "output_tokens": 4}}
    return result(custom_id, response=response(body), **fields)


def refused(custom_id: str = "a1", status: int = 500, code: str = "server_error") -> dict[str, Any]:
    return result(custom_id, response=response({"error": {"code": code, "message": "Sorry."}}, status))


def expired(custom_id: str = "a1") -> dict[str, Any]:
    return result(custom_id, error={"code": "batch_expired", "message": "Not run in time."})


def posts(api: LocalBatchAPI, path: str = "/v1/batches") -> int:
    return sum((exchange.method, exchange.path) == ("POST", path) for exchange in api.exchanges)


def assert_paid_once(api: LocalBatchAPI, *contents: bytes) -> None:
    """The server has charged once for each request of these files, and for none twice."""
    for batch in api.batches.values():
        api.look(batch)
    assert not [sha256 for sha256, times in api.paid.items() if times > 1], "paid twice"
    lines = {sha256_of(line) for content in contents for line in content.splitlines(keepends=True)}
    assert {sha256 for sha256 in lines if not api.paid[sha256]} == set(), "not carried out"


def custom_ids(lines: bytes) -> list[str]:
    return [json.loads(line)["custom_id"] for line in lines.splitlines()]


def sent(api: LocalBatchAPI) -> list[list[str]]:
    """The custom_ids of every batch, in the order of their creation."""
    return [custom_ids(batch.input_file.path.read_bytes()) for batch in api.batches.values()]
