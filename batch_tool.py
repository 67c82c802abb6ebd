#!/usr/bin/env python3
"""Put a request file (JSONL) through OpenAI's Batch API: pay for nothing twice,
lose nothing paid for.

  batch_tool.py run --in requests.jsonl --out done.jsonl
  batch_tool.py export --in requests.jsonl --results done.jsonl --out bios.csv
  batch_tool.py create --in requests.jsonl
  batch_tool.py wait --batch-id batch_abc123

stdout carries results only, stderr everything else. Commands that talk to the
API need OPENAI_API_KEY and log every request to logs/batch_YYYYMMDD_HHMMSS.log;
validate, retry and export work offline. OPENAI_BASE_URL names another service.
COMMAND --help shows the options of a command.

exit codes: 0 success, 1 fatal error, 2 invalid arguments, 3 --timeout passed,
130 interrupted, 143 terminated, 129 hung up
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import email.utils
import fcntl
import functools
import gc
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import secrets
import signal
import stat
import sys
import tempfile
import textwrap
import time
import urllib.parse
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, TextIO, TypeVar, cast

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI, OpenAIError
    from openai._legacy_response import LegacyAPIResponse
    from openai.types import Batch, FileObject

PROG = "batch_tool.py"
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"{PROG}: error: it needs Python 3.11 or later; this is {sys.version.split()[0]}")
STDIN, STDOUT = "/dev/stdin", "/dev/stdout"  # what - stands for
MAX_REQUESTS = 50_000  # in one batch; Batch API guide, "Rate limits"
MAX_BYTES = 200_000_000  # of one input file; Batch API guide, "Rate limits"
RECENT_SECONDS = 30 * 24 * 60 * 60  # the life of an uploaded file
PAGE_SIZE = 100  # the most that a listing takes
MAX_PAGES = 500  # a listing that has not ended by then does not end
OTHERS = "others"  # batches of a request file that are none of its parts; no sha256 reads so
TERMINAL = ("completed", "failed", "expired", "cancelled")
SUCCEEDED, REJECTED, RETRYABLE, MISSING = "succeeded", "rejected", "retryable", "missing"  # how a request ended
TRIES = 3  # of one request whose answer is lost
LOOK_UP_DELAYS = (0.5, 1.5, 3, 5)  # seconds; a new batch shows in the listing after about ten
RATE_LIMIT_SECONDS = 600  # how long a 429 is waited out in all
NOTICED_SECONDS = 5  # a longer pause before a request is made again is told of
POLL_SECONDS = 60  # how long one poll may take
UPLOAD_SECONDS = 600  # how long the answer to an upload may take
MAX_SECONDS = 10**8  # of --interval and --timeout; what sleep() takes at most is not much more
IDLE_REFUSALS = 5  # for the queue limit, with no batch of ours active
MAX_LISTED = 20  # errors and warnings shown one by one
CHUNK = 1 << 20
ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
SECRET = re.compile(  # also behind a blank or line break that is written as an escape of JSON or of a URL
    r"((?i:Bearer)(?:\s|\\[nrt]|%20)+|(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf])|(?<=\\u[0-9a-f]{4})|(?<=%[0-9A-F]{2}))sk-)"
    r"[^\s\\\"',;]{16,}"
)
HIDDEN = "[secret]"
TO_QUOTE = re.compile(r'[",\r\n]')  # in a field of a CSV; RFC 4180
BIO_COLUMNS = ("artist_id", "artist_name", "bio", "error", "input_tokens", "output_tokens")
TIMESTAMPS = (
    ("Created", "created_at"),
    ("Completed", "completed_at"),
    ("Failed", "failed_at"),
    ("Expired", "expired_at"),
    ("Cancelled", "cancelled_at"),
)

T = TypeVar("T")
Json = dict[str, Any]
Subparsers = Any  # argparse has no public name for what add_subparsers returns


class Failure(Exception):
    """A foreseeable end of the command; its text is the one line that the user reads."""

    exit_code = 1


class TimedOut(Failure):
    """--timeout passed."""

    exit_code = 3


class CallFailed(Failure):
    """A request to the API without the answer that was asked for.

    Where there was an answer: its HTTP status, the error's code and type, and the seconds that it asks to wait.
    """

    def __init__(
        self, text: str, status: int | None = None, codes: tuple[Any, ...] = (), retry_after: float | None = None
    ) -> None:
        super().__init__(text)
        self.status = status
        self.codes = codes
        self.retry_after = retry_after


class Refused(CallFailed):
    """The API said no: a 4xx that the same request would get again."""


class NoAnswer(CallFailed):
    """What became of a request is unknown: connection lost, time-out, 408, 409, 5xx, or an answer without sense."""


class Stopped(BaseException):
    """The command ends here without an error: stdout was closed or a signal arrived. Carries the exit code."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


class Part(NamedTuple):
    """Consecutive lines of a request file that make one batch; `sha256` is of their bytes."""

    label: str
    offset: int
    size: int
    requests: int
    sha256: str


class Problem(NamedTuple):
    """What is wrong with a line of a request file, by the API's own code."""

    line: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.code}: {self.message}"


class Counts(NamedTuple):
    """How many requests of a batch have ended, and how; zeros while that is not known."""

    completed: int
    failed: int
    total: int


class Verdict(NamedTuple):
    """What a results line says of its request: how it ended, and why."""

    outcome: str
    code: str = ""
    message: str = ""

    def error(self) -> str:
        return ": ".join(filter(None, (self.code, self.message)))


class Entry(NamedTuple):
    """The best results line of a request: what it says, and where it stands."""

    outcome: str
    code: str
    file: int
    offset: int
    size: int


# -- text --------------------------------------------------------------------------------------------------------


def escape_controls(text: str) -> str:
    """The text on one line: line breaks, control characters and undecodable bytes as the escapes of JSON."""
    return re.sub("[^ -~]", lambda char: char[0] if char[0].isprintable() else json.dumps(char[0])[1:-1], text)


def count_of(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def shorten(text: str) -> str:
    """The first words of an answer; whole ones, as half a secret would not be known for one."""
    return textwrap.shorten(text[:10_000], 200, placeholder=" …").strip()


def commonest(counts: Counter[str]) -> str:
    return ", ".join(f"{number} × {code}" for code, number in counts.most_common(5))


def to_json(content: Any) -> str:
    try:
        return json.dumps(content, ensure_ascii=False, default=str)
    except RecursionError:  # what could just be read may be too deep to be written
        return '"nested too deeply"'


def quoted(value: Any) -> str:
    """A value as JSON for a message, cut to a readable length."""
    return to_json(value)[:80]


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


JSON_LINE = json.JSONDecoder()
STRICT_JSON_LINE = json.JSONDecoder(parse_constant=refuse_constant)


def json_problem(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8 (byte {error.start + 1} of the line)"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (character {error.pos + 1} of the line)"
    return f"not valid JSON: {error}"


def read_object(line: bytes, decoder: json.JSONDecoder = JSON_LINE) -> Json:
    """The JSON object on a line. Raises ValueError with what is wrong in words."""
    try:
        text = line.decode().strip(" \t\r\n")
        content, end = decoder.raw_decode(text)  # decode() spends a fifth of its time on looking for blanks
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except (ValueError, RecursionError) as error:
        raise ValueError(json_problem(error) if line.strip() else "blank line") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def object_in(content: Json, name: str) -> Json:
    """The object under a name; empty where there is none."""
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def dicts(value: Any) -> list[Json]:
    """The objects in what ought to be a list of them."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


# -- files -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def failing_to(do: str, advice: str = "") -> Iterator[None]:
    """Turn an OSError into the Failure that says what could not be done, and why."""
    try:
        yield
    except OSError as error:
        raise Failure(f"cannot {do}: {error.strerror or error}{advice}") from None


@contextlib.contextmanager
def temporary_file() -> Iterator[BinaryIO]:
    """A file without a name that lasts as long as the block."""
    advice = "; set TMPDIR to a directory with room"
    with failing_to("write a temporary file", advice), tempfile.TemporaryFile() as file:
        yield cast(BinaryIO, file)


def blocks(file: BinaryIO, path: str) -> Iterator[bytes]:
    """The file's bytes, some at a time; keeps an error of reading apart from one of whoever uses them."""
    with failing_to(f"read {path}"):
        while block := file.read(CHUNK):
            yield block


def lines_of(file: BinaryIO, path: str) -> Iterator[bytes]:
    """The file's lines, likewise."""
    with failing_to(f"read {path}"):
        for line in file:  # noqa: UP028  `yield from` closes the file when nobody wants the next line
            yield line


@contextlib.contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """The file's bytes; stdin and what is not a regular file as a temporary copy, to be read more than once."""
    if path == STDIN and sys.stdin is None:
        raise Failure("stdin is closed; there is nothing to read")
    with contextlib.ExitStack() as stack:
        with failing_to(f"read {path}"):
            file = sys.stdin.buffer if path == STDIN else stack.enter_context(open(path, "rb"))
            with contextlib.suppress(io.UnsupportedOperation):  # of a stdin that is no file
                os.set_blocking(file.fileno(), True)  # else a pause of the writer would look like the end
        if path == STDIN or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            copy = stack.enter_context(temporary_file())
            copy.writelines(blocks(file, path))
            copy.seek(0)
            file = copy
        yield file


def is_stream(path: str) -> bool:
    """Whether what is written there cannot be replaced: stdout, a pipe, a device."""
    return path == STDOUT or (os.path.exists(path) and not os.path.isfile(path))


def discard(file: BinaryIO | TextIO) -> None:
    """Drop what is left in the file's buffer and whatever follows, or the interpreter complains of it at its end."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())


@contextlib.contextmanager
def streaming(file: BinaryIO | None) -> Iterator[BinaryIO]:
    """The file, flushed at the end; where it fails or the command is stopped, nothing waits for its reader any more."""
    if file is None:
        raise BrokenPipeError
    try:
        try:
            yield file
        except Failure:
            file.flush()
            raise
        file.flush()
    except (OSError, Stopped):
        discard(file)
        raise


@contextlib.contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A temporary file beside `path`, which replaces it once it is whole and on disk."""
    directory = os.path.dirname(path)
    with contextlib.suppress(FileExistsError):  # a file there makes a clearer error when it is opened as a directory
        os.makedirs(directory)
    temporary = os.path.join(directory, f".{PROG}-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x+b", buffering=CHUNK) as file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(path).st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextlib.contextmanager
def open_output(path: str) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well, or leaves it as it was.

    stdout and what is not a regular file are written as they come.
    """
    try:
        if path == STDOUT:
            with streaming(sys.stdout.buffer if sys.stdout else None) as file:
                yield file
        elif is_stream(path):
            with open(path, "wb") as opened, streaming(opened) as file:
                yield file
        else:
            with replacing(os.path.realpath(path)) as file:
                yield file
    except OSError as error:
        if path == STDOUT and isinstance(error, BrokenPipeError):
            raise Stopped(1) from None
        raise Failure(f"cannot write {path}: {error.strerror or error}") from None


def refuse_unwritable(path: str) -> None:
    """Raise Failure now for what would otherwise be one after the download, or after a day of waiting."""
    if os.path.isdir(path):
        raise Failure(f"cannot write {path}: it is a directory; choose another --out")
    if is_stream(path):
        return
    directory = os.path.dirname(os.path.realpath(path))
    with failing_to(f"write {path}", "; choose another --out"):
        with contextlib.suppress(FileExistsError):
            os.makedirs(directory)
        tempfile.TemporaryFile(dir=directory).close()


def same_regular_file(source: str, destination: str) -> bool:
    try:
        there = os.fstat(0) if source == STDIN else os.stat(source)
        here = os.fstat(1) if destination == STDOUT else os.stat(destination)
    except OSError:
        return False
    return stat.S_ISREG(there.st_mode) and os.path.samestat(there, here)


def file_signature(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def refuse_changes(file: BinaryIO, signature: tuple[int, int], path: str) -> None:
    if file_signature(file) != signature:
        raise Failure(f"{path} was changed while it was in use; run the same command again")


@contextlib.contextmanager
def unchanged(file: BinaryIO, path: str) -> Iterator[None]:
    """Raise Failure where the file does not stay as it is until the block ends."""
    signature = file_signature(file)
    try:
        yield
    except Exception:
        refuse_changes(file, signature, path)
        raise
    refuse_changes(file, signature, path)


@contextlib.contextmanager
def locked(file: BinaryIO, path: str, console: Console) -> Iterator[None]:
    """Hold the request file, so that no second create or run on this machine submits it at the same time."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Failure(f"another create or run of {path} is at work; wait for it to end") from None
    except OSError as error:  # NFS locks only what is open for writing, other file systems nothing at all
        console.warn(f"cannot lock {path}: {error.strerror}; start no other create or run of it meanwhile")
    yield


def last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


class FilePart(io.BufferedIOBase):
    """The bytes of one part of a file, as a file that the SDK uploads in chunks and rewinds.

    It has no file descriptor of its own, as its size would be taken from that.
    """

    def __init__(self, file: BinaryIO, part: Part) -> None:
        self._file = file
        self._part = part
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._part.size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = self._part.size - self._position
        wanted = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._file.fileno(), wanted, self._part.offset + self._position)
        self._position += len(data)
        return data


# -- stdout and stderr -------------------------------------------------------------------------------------------


class Console:
    """stdout for results and stderr for the rest, a line at a time, without secrets."""

    def __init__(self, stderr: TextIO | None) -> None:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        self.secrets = [key, json.dumps(key)[1:-1]] if len(key) >= 8 else []
        self._stderr = stderr
        self._shown = 0  # characters of progress on the terminal's line
        self.live = stderr is not None and stderr.isatty()

    def scrub(self, text: str) -> str:
        """The text without the API key or anything that looks like one, on one line."""
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return escape_controls(SECRET.sub(lambda found: found[1] + HIDDEN, text))

    def emit(self, text: str) -> None:
        """A line of the results, flushed; what the encoding of stdout cannot say as backslash escapes."""
        self.clear()
        with open_output(STDOUT) as stdout:
            stdout.write((self.scrub(text) + "\n").encode(sys.stdout.encoding, "backslashreplace"))

    def say(self, text: str) -> None:
        self.clear()
        self._write(self.scrub(text) + "\n")

    def warn(self, text: str) -> None:
        self.say(f"{PROG}: warning: {text}")

    def progress(self, text: str) -> None:
        """On a terminal, write over the progress shown before; elsewhere, a line."""
        if self._stderr is None or not self.live:
            self.say(text)
            return
        columns = 80
        with contextlib.suppress(OSError):  # the terminal may be gone
            columns = os.get_terminal_size(self._stderr.fileno()).columns or columns
        text = self.scrub(text)[: columns - 1]
        self._write("\r" + text.ljust(self._shown))
        self._shown = len(text)

    def clear(self) -> None:
        if self._shown:
            self._write("\r" + " " * self._shown + "\r")
            self._shown = 0

    def _write(self, text: str) -> None:
        if self._stderr is not None:
            with contextlib.suppress(OSError):  # a lost message must not end the work that it tells of
                self._stderr.write(text)
                self._stderr.flush()

    def close(self) -> None:
        """Drop what stderr has not taken to the end, which would change the exit code."""
        if self._stderr is not None:
            try:
                self._stderr.flush()
            except OSError:
                discard(self._stderr)


# -- request files -----------------------------------------------------------------------------------------------


class InputCheck:
    """Checks a request file as the API will, and divides it into parts, in one pass.

    `endpoint` is what the first request names, where none is given. The memory it takes is one id a request.
    """

    def __init__(self, endpoint: str | None = None, max_requests: int = MAX_REQUESTS) -> None:
        self.endpoint = endpoint or ""
        self.size = 0
        self.without_model = 0
        self.line_of: dict[str, int] = {}
        self._model: Any = None
        self._max_requests = max_requests
        self._parts: list[Part] = []
        self._start_part()

    def _start_part(self) -> None:
        self._part_offset = self.size
        self._part_requests = 0
        self._part_hash = hashlib.sha256()

    def _end_part(self) -> None:
        size = self.size - self._part_offset
        self._parts.append(Part("", self._part_offset, size, self._part_requests, self._part_hash.hexdigest()))
        self._start_part()

    def parts(self) -> list[Part]:
        """The parts of the file that has been read: consecutive lines within the limits of a batch."""
        if self._part_requests:
            self._end_part()
        return [part._replace(label=f"{n}/{len(self._parts)}") for n, part in enumerate(self._parts, 1)]

    def problems(self, lines: Iterable[bytes]) -> Iterator[Problem]:
        number = 0
        for number, line in enumerate(lines, 1):
            full = self._part_requests == self._max_requests or self.size - self._part_offset + len(line) > MAX_BYTES
            if full and self._part_requests:
                self._end_part()
            self.size += len(line)
            self._part_requests += 1
            self._part_hash.update(line)
            if len(line) > MAX_BYTES:
                yield Problem(number, "invalid_request", f"{len(line)} bytes; a batch takes {MAX_BYTES} at most")
            yield from self._line_problems(number, line)
        if not number:
            yield Problem(1, "empty_file", "the file has no requests")

    def _line_problems(self, number: int, line: bytes) -> Iterator[Problem]:
        try:
            request = read_object(line, STRICT_JSON_LINE)
        except ValueError as error:
            yield Problem(number, "invalid_json_line", str(error))
            return
        yield from self._id_problems(number, request.get("custom_id"))
        method, url, body = request.get("method"), request.get("url"), request.get("body")
        if method != "POST":
            yield Problem(number, "invalid_request", f'method is {quoted(method)}, not "POST"')
        if not self.endpoint and isinstance(url, str) and url.startswith("/") and url.isprintable():
            self.endpoint = url
        if not url or url != self.endpoint:
            endpoint = self.endpoint or "a path like /v1/responses"
            yield Problem(number, "url_mismatch", f"url is {quoted(url)}, not {endpoint[:80]}")
        if isinstance(body, dict):
            yield from self._body_problems(number, body)
        else:
            yield Problem(number, "invalid_request", "body is not a JSON object")

    def _id_problems(self, number: int, custom_id: Any) -> Iterator[Problem]:
        if custom_id is None:
            yield Problem(number, "missing_required_parameter", "custom_id is missing")
        elif not isinstance(custom_id, str) or not custom_id:
            yield Problem(number, "invalid_request", "custom_id is not a string with at least one character")
        elif (first := self.line_of.setdefault(custom_id, number)) != number:
            message = f"custom_id {quoted(custom_id)} was already used on line {first}"
            yield Problem(number, "duplicate_custom_id", message)

    def _body_problems(self, number: int, body: Json) -> Iterator[Problem]:
        if body.get("stream") is True:
            yield Problem(number, "invalid_request", "body.stream is true; a batch cannot stream")
        model = body.get("model")
        if model is None:
            self.without_model += 1
        elif self._model is None:
            self._model = model
        elif model != self._model:
            message = f"model is {quoted(model)}, not {quoted(self._model)}; a batch has one model"
            yield Problem(number, "model_mismatch", message)


def check_input(file: BinaryIO, path: str, check: InputCheck, console: Console) -> list[Part]:
    """The parts of a request file that the API will take; raises Failure after showing what it would refuse."""
    signature = file_signature(file)
    found = 0
    for problem in check.problems(lines_of(file, path)):
        found += 1
        if found <= MAX_LISTED:
            console.say(str(problem))
    if found > MAX_LISTED:
        console.say(f"… and {found - MAX_LISTED} more")
    if found:
        raise Failure(f"{path}: {count_of(found, 'error')}; correct the file; nothing was uploaded")
    if check.without_model:
        console.warn(f"{count_of(check.without_model, 'request')} without body.model, which the Batch API refuses")
    refuse_changes(file, signature, path)
    return check.parts()


# -- batches and files of the API --------------------------------------------------------------------------------


def is_id(value: Any) -> bool:
    return isinstance(value, str) and ID.fullmatch(value) is not None


def as_batch(content: Any) -> Batch:
    """The Batch that an answer is; raises NoAnswer for any other. Of its fields only id and status are certain."""
    from openai.types import Batch

    if not isinstance(content, dict) or not is_id(content.get("id")) or not isinstance(content.get("status"), str):
        raise NoAnswer(f"the answer is not a batch: {shorten(to_json(content))}")
    return Batch.construct(**{name: value for name, value in content.items() if not name.startswith("_")})


def as_page(content: Json) -> tuple[list[Batch], bool]:
    """The batches of one page of the listing, and whether there may be more."""
    page = content.get("data")
    if not isinstance(page, list):
        raise NoAnswer("the answer is not a list of batches")
    return [as_batch(item) for item in page], content.get("has_more") is not False


def as_file(content: Json) -> FileObject:
    """The FileObject that an answer is; raises NoAnswer for any other. Only its id and bytes are certain."""
    from openai.types import FileObject

    if not is_id(content.get("id")) or not isinstance(content.get("bytes"), int):
        raise NoAnswer(f"the answer is not a file: {shorten(to_json(content))}")
    return FileObject.construct(id=content["id"], bytes=content["bytes"])


def text_of(thing: Any, name: str) -> str:
    """A field of an SDK object as text; empty where the answer had it null, empty, or not as text."""
    value = getattr(thing, name, None)
    return value if isinstance(value, str) else ""


def number_of(thing: Any, name: str) -> int | None:
    value = getattr(thing, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def metadata_of(batch: Batch, name: str) -> str:
    value = batch.metadata.get(name) if isinstance(batch.metadata, dict) else None
    return value if isinstance(value, str) else ""


def has_ended(batch: Batch) -> bool:
    """Whether the status is terminal; one that is not known is not."""
    return batch.status in TERMINAL


def file_id_of(batch: Batch, name: str) -> str:
    """The id of its output or error file; empty where it has none. Raises NoAnswer for what cannot be an id."""
    file_id = getattr(batch, name, None)
    if file_id and not is_id(file_id):
        raise NoAnswer(f"{name} of batch {batch.id} is no file id: {quoted(file_id)}")
    return file_id or ""


def has_output(batch: Batch) -> bool:
    return bool(file_id_of(batch, "output_file_id"))


def result_files(batch: Batch) -> Iterator[tuple[str, str]]:
    """The files that a batch has left: what is in it, `results` or `errors`, and its id."""
    for kind, name in (("results", "output_file_id"), ("errors", "error_file_id")):
        if file_id := file_id_of(batch, name):
            yield kind, file_id


def request_counts(batch: Batch) -> Counts:
    counts = getattr(batch, "request_counts", None)
    return Counts(*(number_of(counts, name) or 0 for name in Counts._fields))


def error_list(batch: Batch) -> list[Any]:
    errors = getattr(getattr(batch, "errors", None), "data", None)
    return errors if isinstance(errors, list) else []


def batch_errors(batch: Batch) -> list[str]:
    """The errors of a failed batch, a line each: `line 3: duplicate_custom_id: …`."""
    lines = []
    for error in error_list(batch):
        line = number_of(error, "line")
        words = [f"line {line}" if line is not None else "", text_of(error, "code"), text_of(error, "message")]
        lines.append(": ".join(filter(None, words)))
    return [*filter(None, lines)]


def reasons(batch: Batch) -> str:
    """Why a batch failed, on one line."""
    return "; ".join(batch_errors(batch)[:MAX_LISTED]) or "no reason given"


def is_over_queue_limit(batch: Batch) -> bool:
    codes = [text_of(error, "code") for error in error_list(batch)]
    return batch.status == "failed" and "token_limit_exceeded" in codes


def local_time(moment: int | None, separator: str = "T") -> str:
    """Unix seconds as local time; empty where there is none."""
    try:
        return datetime.datetime.fromtimestamp(moment).isoformat(separator, "seconds") if moment else ""
    except (OverflowError, OSError, ValueError):
        return ""


def describe(batch: Batch) -> Iterator[str]:
    """What `status` shows of a batch; lines without a value are left out."""
    yield f"Status: {batch.status}"
    stamps = [*TIMESTAMPS, *([] if has_ended(batch) else [("Expires", "expires_at")])]
    for label, name in stamps:
        if moment := local_time(number_of(batch, name)):
            yield f"{label}: {moment}"
    counts = request_counts(batch)
    if counts.total:
        yield f"Requests: {counts.completed} completed, {counts.failed} failed of {counts.total}"
    usage = getattr(batch, "usage", None)
    input_tokens, output_tokens = number_of(usage, "input_tokens") or 0, number_of(usage, "output_tokens") or 0
    if input_tokens or output_tokens:
        yield f"Tokens: {input_tokens} input, {output_tokens} output"
    yield from batch_errors(batch)


def batch_json(batch: Batch, saved: Mapping[str, str] | None = None) -> str:
    """The Batch object as the API gave it, on one line, and where its files were saved."""
    return json.dumps({**batch.to_dict(mode="json", warnings=False), **(saved or {})}, default=str)


# -- answers of the API ------------------------------------------------------------------------------------------


def json_object(response: LegacyAPIResponse[Any]) -> Json:
    """The answer's JSON object; read here, as the SDK makes a str of what is not labelled JSON."""
    try:
        return read_object(response.content)
    except ValueError:
        text = shorten(response.content.decode(errors="replace"))
        raise NoAnswer(f"the answer is not a JSON object: {text or 'it is empty'}") from None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that an answer asks to wait before the request is made again, given as a number or as a date."""
    milliseconds, text = headers.get("retry-after-ms"), headers.get("retry-after", "")
    try:
        seconds = float(milliseconds) / 1000 if milliseconds else float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return seconds if 0 < seconds < math.inf else None


def explain_status(error: APIStatusError) -> CallFailed:
    status = error.status_code
    body = error.body if isinstance(error.body, Mapping) else {}
    words = body.get("message") or shorten(error.response.text) or error.response.reason_phrase
    code = f" ({body['code']})" if body.get("code") else ""
    advice = "; check OPENAI_API_KEY" if status == 401 else ""
    kind = NoAnswer if status in (408, 409) or status >= 500 else Refused
    codes = body.get("code"), body.get("type")
    return kind(f"HTTP {status}: {words}{code}{advice}", status, codes, retry_after(error.response.headers))


def explain(error: OpenAIError | NoAnswer | UnicodeError, url: str) -> CallFailed:
    """What an error of the SDK means, in the API's words where there are any."""
    import openai

    if isinstance(error, NoAnswer):
        return error
    if isinstance(error, openai.APIStatusError):
        return explain_status(error)
    if isinstance(error, openai.APITimeoutError):
        return NoAnswer(f"no answer from {url} in time")
    if isinstance(error, UnicodeError):
        return NoAnswer(f"the answer from {url} cannot be decoded: {error}")
    return NoAnswer(f"cannot reach {url}: {error.__cause__ or error}")


def is_rate_limit(failure: CallFailed) -> bool:
    """Whether waiting helps; it does not where the account's quota is used up."""
    return failure.status == 429 and "insufficient_quota" not in failure.codes


# -- the API -----------------------------------------------------------------------------------------------------


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes the log: an event a line, errors with their stack, no secrets. What cannot be written is a Failure."""

    def __init__(self, file: TextIO, console: Console) -> None:
        super().__init__(file)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._console = console

    def format(self, record: logging.LogRecord) -> str:
        return self._console.scrub(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        raise Failure(f"cannot write the log: {sys.exc_info()[1]}") from None


@contextlib.contextmanager
def open_log(path: str | None, console: Console) -> Iterator[logging.Logger]:
    """A log that only its owner can read; a run that costs money leaves its trace there, or does not begin."""
    path = path or time.strftime("logs/batch_%Y%m%d_%H%M%S.log")
    with failing_to(f"open the log {path}", "; choose another with --log-file"):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o600)
    file = open(descriptor, "w", encoding="utf-8", errors="backslashreplace")
    log = logging.Logger(PROG)
    log.addHandler(LogHandler(file, console))
    try:
        yield log
    finally:
        with contextlib.suppress(OSError):  # a line that could not be written has ended the command already
            file.close()


def header_value(name: str) -> str:
    """An environment variable that is sent in a header, without the blanks or line end around it."""
    value = os.environ.get(name, "").strip()
    if not value.isascii() or not value.isprintable():
        raise Failure(f"{name} has control or non-ASCII characters in it; set it again")
    return value


def api_key() -> str:
    key = header_value("OPENAI_API_KEY")
    if not key:
        raise Failure("OPENAI_API_KEY is not set; export it with the key of your OpenAI project")
    return key


def base_url(console: Console) -> str:
    """OPENAI_BASE_URL, or OpenAI's own; a password in it is hidden from now on."""
    url = os.environ.get("OPENAI_BASE_URL", "").strip() or "https://api.openai.com/v1"
    try:
        parts = urllib.parse.urlsplit(url)
        usable = re.fullmatch("(?i:https?)://[!-~]+", url) and parts.port != 0 and (parts.hostname or "").encode("idna")
    except ValueError:
        usable = False
    if not usable:
        raise Failure("OPENAI_BASE_URL is not a URL like https://api.openai.com/v1; set it again or unset it")
    password = parts.password or ""
    if len(password) >= 8:
        console.secrets += [password, urllib.parse.unquote(password)]
    return url


def without_password(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


class Api:
    """The operations of the Files and Batches API that the commands use, each logged, with one loop for all calls.

    They raise Refused for a definite no, and NoAnswer where several tries got no usable answer.
    """

    def __init__(self, client: OpenAI, log: logging.Logger, args: argparse.Namespace) -> None:
        self.client = client
        self.url = without_password(str(client.base_url))
        self.sleep: Callable[[float], None] = args.sleep
        self.seconds_left: Callable[[], float] = lambda: math.inf
        self.console: Console = args.console
        self.log = log
        self._verbose: bool = args.verbose

    def call(
        self,
        operation: str,
        about: Json,
        send: Callable[[], Json],
        read: Callable[[Json], T],
        *,
        tries: int = TRIES,
        patience: float = RATE_LIMIT_SECONDS,
    ) -> T:
        """What `read` makes of the answer to `send`; a lost answer is tried again, a 429 waited out for `patience`."""
        import openai

        lost = limited = 0
        while True:
            self.log.info("%s request %s", operation, to_json(about))
            try:
                content = send()
                answer = read(content)
            except (openai.OpenAIError, NoAnswer, UnicodeError) as error:  # the last of an answer in no charset
                failure = explain(error, self.url)
                self.log.exception("%s error %s", operation, failure)
            else:
                self.log.info("%s response %s", operation, to_json(content))
                if self._verbose:
                    self.console.say(f"{operation}: {to_json(content)}")
                return answer
            lost, limited = lost + isinstance(failure, NoAnswer), limited + is_rate_limit(failure)
            pause = failure.retry_after or 0.5 * 2 ** min(lost + limited - 1, 10)
            if is_rate_limit(failure) and pause <= patience:
                patience -= pause
            elif not isinstance(failure, NoAnswer) or failure.status == 409 or lost >= tries:  # a conflict stays one
                raise failure
            pause = min(pause, RATE_LIMIT_SECONDS)
            if is_rate_limit(failure) or pause > NOTICED_SECONDS:
                self.console.warn(f"{failure}; trying again in {pause:.0f} s")
            self.sleep(pause)

    def ask(
        self,
        operation: str,
        send: Callable[..., LegacyAPIResponse[Any]],
        read: Callable[[Json], T],
        parameters: Json,
        **limits: Any,
    ) -> T:
        """What `read` makes of the SDK's answer to these parameters, which the log shows as they are."""
        return self.call(operation, parameters, lambda: json_object(send(**parameters)), read, **limits)

    def upload(self, file: BinaryIO, part: Part, name: str) -> FileObject:
        send = self.client.with_options(timeout=UPLOAD_SECONDS).files.with_raw_response.create
        content = (name, cast(BinaryIO, FilePart(file, part)))
        about = {"file": name, "part": part.label, "bytes": part.size, "requests": part.requests, "sha256": part.sha256}

        def read(answer: Json) -> FileObject:
            uploaded = as_file(answer)
            if uploaded.bytes != part.size:
                raise NoAnswer(f"file {uploaded.id} has {uploaded.bytes} bytes where {part.size} were uploaded")
            return uploaded

        return self.call("UPLOAD", about, lambda: json_object(send(file=content, purpose="batch")), read)

    def create_batch(self, request: Json) -> Batch:
        """One POST, as each repetition could be a batch of its own, and be charged."""
        return self.ask("CREATE_BATCH", self.client.batches.with_raw_response.create, as_batch, request, tries=1)

    def batch(self, batch_id: str, **limits: Any) -> Batch:
        client = self.client.with_options(timeout=max(1, min(POLL_SECONDS, self.seconds_left())))

        def read(answer: Json) -> Batch:
            batch = as_batch(answer)
            if batch.id != batch_id:
                raise NoAnswer(f"the answer is another batch: {batch.id}")
            return batch

        send = client.batches.with_raw_response.retrieve
        return self.ask("GET_STATUS", send, read, {"batch_id": batch_id}, **limits)

    def cancel(self, batch_id: str) -> Batch:
        return self.ask("CANCEL_BATCH", self.client.batches.with_raw_response.cancel, as_batch, {"batch_id": batch_id})

    def batches(self, page_size: int = PAGE_SIZE) -> Iterator[Batch]:
        """All batches, newest first, a request a page; ends where a page brings nothing new."""
        seen: set[str] = set()
        query: Json = {"limit": page_size}
        for _ in range(MAX_PAGES):
            page, has_more = self.ask("LIST_BATCHES", self.client.batches.with_raw_response.list, as_page, query)
            new = [batch for batch in page if batch.id not in seen]
            yield from new
            if not has_more or not new:
                return
            seen.update(batch.id for batch in new)
            query = {"limit": page_size, "after": page[-1].id}

    def recent_batches(self) -> Iterator[Batch]:
        """The batches of the last 30 days, newest first."""
        oldest = time.time() - RECENT_SECONDS
        for batch in self.batches():
            if (number_of(batch, "created_at") or oldest) < oldest:
                return
            yield batch

    def file(self, file_id: str) -> FileObject:
        return self.ask("DOWNLOAD_RESULTS", self.client.files.with_raw_response.retrieve, as_file, {"file_id": file_id})

    def delete_file(self, file_id: str) -> None:
        """Delete an uploaded file that no batch uses; not worth a failure of its own."""
        try:
            self.ask("DELETE_FILE", self.client.files.with_raw_response.delete, bool, {"file_id": file_id})
        except Failure as failure:
            self.console.warn(f"file {file_id} was not deleted: {failure}")

    def download(self, file_id: str, out: BinaryIO, path: str) -> int:
        """Append the file to `out`, and return its size; checked against the size that the API gives, tried again."""
        size = self.file(file_id).bytes
        start = out.tell()

        def receive() -> Json:
            out.seek(start)
            out.truncate()
            received = self._stream(file_id, out)
            if received != size:
                raise NoAnswer(f"download of {file_id} was cut off ({received} of {size} bytes); try again")
            if received and last_byte(out) != b"\n":
                raise NoAnswer(f"download of {file_id} was cut off (no line end at its end); try again")
            return {"path": path, "bytes": received}

        return self.call("DOWNLOAD_RESULTS", {"file_id": file_id, "path": path}, receive, lambda _: size)

    def _stream(self, file_id: str, out: BinaryIO) -> int:
        """Copy the file's content as it comes, in bounded memory; the number of bytes."""
        import httpx2

        received = 0
        try:
            with self.client.files.with_streaming_response.content(file_id) as response:
                for block in response.iter_bytes(CHUNK):
                    out.write(block)
                    received += len(block)
        except httpx2.HTTPError as error:
            why = str(error) or type(error).__name__
            raise NoAnswer(f"download of {file_id} from {self.url} broke off: {why}") from error
        return received


@contextlib.contextmanager
def holding_signals() -> Iterator[None]:
    """Keep signals back while the block runs: a callback of the interpreter would swallow what they raise."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def connect(args: argparse.Namespace) -> Iterator[Api]:
    """The API as the environment names it; no request is made yet."""
    console: Console = args.console
    key, url = api_key(), base_url(console)
    organization, project = header_value("OPENAI_ORG_ID") or None, header_value("OPENAI_PROJECT_ID") or None
    with open_log(args.log_file, console) as log:
        log.info("START %s", to_json([PROG, *args.argv]))
        try:
            with holding_signals():
                import httpx2
                import openai
        except ImportError as error:
            raise Failure(f"the openai package cannot be imported ({error}); pip install -r requirements.txt, "
                          "or use the Python of a virtual environment that has it") from None
        try:
            client = openai.OpenAI(api_key=key, organization=organization, project=project, base_url=url,
                                   max_retries=0, timeout=POLL_SECONDS)
        except (httpx2.InvalidURL, ValueError, ImportError, OSError) as error:  # unusable proxy or certificate settings
            raise Failure(f"no client can be made: {error}; check the proxy and certificate variables") from None
        with client:
            yield Api(client, log, args)


# -- submitting and watching -------------------------------------------------------------------------------------


class Submission:
    """Makes batches of the parts of a request file, each exactly once, whatever happens to the answers.

    With the sha256 of a whole request file, they are found again as batches of that file, whatever its parts.
    """

    def __init__(
        self, api: Api, args: argparse.Namespace, file: BinaryIO, endpoint: str, request_file_sha256: str = ""
    ) -> None:
        self._api = api
        self._console: Console = args.console
        self._file = file
        self._name = "stdin" if args.input == STDIN else escape_controls(os.path.basename(args.input))
        self._endpoint = endpoint
        self._window: str = args.completion_window
        self._signature = file_signature(file)
        self._request_file_sha256 = request_file_sha256

    def find_earlier(self, parts: Sequence[Part]) -> dict[str, list[Batch]]:
        """The recent batches at the same endpoint, newest first: by the sha256 of each part, and OTHERS of the file."""
        earlier: dict[str, list[Batch]] = {OTHERS: [], **{part.sha256: [] for part in parts}}
        whole = self._request_file_sha256
        for batch in self._api.recent_batches():
            if text_of(batch, "endpoint") != self._endpoint:
                continue
            sha256 = metadata_of(batch, "input_sha256")
            if sha256 in earlier:
                earlier[sha256].append(batch)
            elif whole and whole in (sha256, metadata_of(batch, "request_file_sha256")):
                earlier[OTHERS].append(batch)
        return earlier

    def upload(self, part: Part) -> str:
        """The id of the part as an uploaded file."""
        file_id = self._api.upload(self._file, part, self._name).id
        try:
            refuse_changes(self._file, self._signature, self._name)
        except Failure:
            self._api.delete_file(file_id)
            raise
        return file_id

    def create(self, part: Part, file_id: str, known: Iterable[str] = ()) -> Batch:
        """The batch of an uploaded part; raises Failure where it is refused, or its existence stays unknown.

        `known` are batches of the same file that it cannot be.
        """
        request = {
            "input_file_id": file_id,
            "endpoint": self._endpoint,
            "completion_window": self._window,
            "metadata": self._metadata(part),
        }
        for attempt in range(TRIES):
            try:
                return self._create_visible(request)
            except NoAnswer as failure:
                self._console.warn(f"{failure}; looking whether the batch exists")
            except Refused:
                if not attempt:  # else an earlier POST may have made a batch of the file
                    self._api.delete_file(file_id)
                raise
            batch, answered = self._look_up(file_id, set(known))
            if batch:
                return batch
            if not answered:
                break
        raise Failure(f"no answer whether the batch of file {file_id} was created; run the same command again: "
                      "it adopts the batch if it exists")

    def _metadata(self, part: Part) -> dict[str, str]:
        metadata = {"input_sha256": part.sha256, "input_file": self._name[:512], "part": part.label}
        if self._request_file_sha256 not in ("", part.sha256):
            metadata["request_file_sha256"] = self._request_file_sha256
        return metadata

    def _create_visible(self, request: Json) -> Batch:
        """One batch; a file that was just uploaded and is not found yet is given some seconds."""
        for delay in LOOK_UP_DELAYS:
            try:
                return self._api.create_batch(request)
            except Refused as failure:
                if failure.status not in (400, 404) or request["input_file_id"] not in str(failure):
                    raise
            self._api.sleep(delay)
        return self._api.create_batch(request)

    def _look_up(self, file_id: str, known: set[str]) -> tuple[Batch | None, bool]:
        """The batch of an uploaded file, where it is listed; and whether the last look got an answer."""
        answered = False
        for delay in LOOK_UP_DELAYS:
            self._api.sleep(delay)
            try:
                for batch in self._api.recent_batches():
                    if text_of(batch, "input_file_id") == file_id and batch.id not in known:
                        return batch, True
                answered = True
            except CallFailed as failure:
                self._console.warn(str(failure))
                answered = False
        return None, answered


class Watch:
    """Keeps time and looks at batches while they run, saying how far they are."""

    def __init__(self, api: Api, args: argparse.Namespace, *, answered: bool = False) -> None:
        self.latest: dict[str, Batch] = {}
        self._answered = answered  # the API, once; from then on, outages are outlived
        self._api = api
        self._sleep: Callable[[float], None] = args.sleep
        self._clock: Callable[[], float] = args.clock
        self._started = args.clock()
        self.deadline = math.inf if args.timeout is None else self._started + args.timeout
        self._said = ""
        api.sleep, api.seconds_left = self.pause, self.seconds_left  # no wait inside a call outlasts --timeout

    def seconds_left(self) -> float:
        return self.deadline - self._clock()

    def pause(self, seconds: float) -> None:
        """Sleep; raises TimedOut once --timeout has passed."""
        if self.seconds_left() > 0:
            self._sleep(min(seconds, self.seconds_left()))
        if self.seconds_left() <= 0:
            raise TimedOut("--timeout passed")

    def look(self, batch_ids: Iterable[str]) -> list[Batch]:
        """Ask once for each of the batches; those that have ended. After a first answer, outages are outlived."""
        ended = []
        for batch_id in batch_ids:
            limits = {"tries": 1, "patience": 0} if self._answered else {}
            try:
                batch = self._api.batch(batch_id, **limits)
            except CallFailed as failure:
                if not self._answered or not (isinstance(failure, NoAnswer) or is_rate_limit(failure)):
                    raise
                self._api.console.warn(f"{batch_id}: {failure}; still waiting")
            else:
                self._answered = True
                self.latest[batch_id] = batch
                if has_ended(batch):
                    ended.append(batch)
        return ended

    def show(self) -> None:
        """Progress over all batches: on a terminal every time, elsewhere when it has changed."""
        batches = self.latest.values()
        counts = [request_counts(batch) for batch in batches]
        failed, total = sum(each.failed for each in counts), sum(each.total for each in counts)
        done = sum(each.completed for each in counts) + failed
        statuses = Counter(batch.status for batch in batches)
        said = "batches: " + ", ".join(f"{number} {status}" for status, number in statuses.items())
        if total:
            said += f"; requests: {done}/{total} ({100 * done // total}%)"
        if failed:
            said += f", {failed} failed"
        if said != self._said or self._api.console.live:
            elapsed = datetime.timedelta(seconds=int(self._clock() - self._started))
            self._api.console.progress(f"{said}; {elapsed} elapsed")
        self._said = said


# -- results -----------------------------------------------------------------------------------------------------


def error_verdict(outcome: str, error: Any, otherwise: str) -> Verdict:
    """The verdict of an error object of the API, of which any field may be missing or odd."""
    fields = error if isinstance(error, dict) else {}
    code, message = fields.get("code") or fields.get("type"), fields.get("message")
    return Verdict(outcome, str(code or otherwise), str(message) if message else "")


def judge(result: Json) -> Verdict:
    response = result.get("response")
    if not isinstance(response, dict):
        return error_verdict(RETRYABLE, result.get("error"), "no_response")
    status, body = response.get("status_code"), object_in(response, "body")
    if status == 200 and isinstance(response.get("body"), dict) and body.get("status") in (None, "completed"):
        return Verdict(SUCCEEDED)
    if status == 200 and body.get("status") == "incomplete":
        return Verdict(REJECTED, "incomplete", str(object_in(body, "incomplete_details").get("reason") or ""))
    rejected = isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 429)
    otherwise = str(body.get("status") or "no_body") if status == 200 else f"http_{status}"
    return error_verdict(REJECTED if rejected else RETRYABLE, body.get("error") or result.get("error"), otherwise)


def body_of(result: Json) -> Json:
    return object_in(object_in(result, "response"), "body")


def token_count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 10**15 else None


def usage_of(body: Json) -> tuple[int | None, int | None]:
    """Input and output tokens of a response; None where it does not say."""
    usage = object_in(body, "usage")
    input_tokens = usage.get("input_tokens", usage.get("prompt_tokens"))
    output_tokens = usage.get("output_tokens", usage.get("completion_tokens"))
    return token_count(input_tokens), token_count(output_tokens)


def request_ids(file: BinaryIO, path: str) -> dict[str, Entry | None]:
    """The custom_ids of a request file in its order, each without an entry yet; raises Failure for a bad line."""
    ids: dict[str, Entry | None] = {}
    for number, line in enumerate(lines_of(file, path), 1):
        try:
            custom_id = read_object(line).get("custom_id")
        except ValueError as error:
            raise Failure(f"{path} line {number}: {error}; is this the request file?") from None
        if not isinstance(custom_id, str) or not custom_id:
            raise Failure(f"{path} line {number}: no custom_id; is this the request file?")
        if custom_id in ids:
            raise Failure(f"{path} line {number}: custom_id {quoted(custom_id)} was used before; see validate")
        ids[custom_id] = None
    file.seek(0)
    return ids


class Results:
    """The best results line of every request: a success wins, else the last one read.

    `best` has every custom_id of the request file in its order; the lines stay in their files.
    """

    def __init__(self, best: dict[str, Entry | None], console: Console) -> None:
        self.best = best
        self.ignored = 0  # lines that are no result of any request
        self.input_tokens = 0  # of all lines read: what was charged
        self.output_tokens = 0
        self._console = console
        self._files: list[BinaryIO] = []

    def read(self, file: BinaryIO, path: str) -> None:
        """Index the lines of a file from where it stands; it must stay open."""
        if file not in self._files:
            self._files.append(file)
        index = self._files.index(file)
        offset = file.tell()
        for number, line in enumerate(lines_of(file, path), 1):
            try:
                self._add(read_object(line), index, offset, len(line))
            except ValueError as error:
                self._ignore(f"{path} line {number}: {error}; line ignored")
            offset += len(line)

    def _add(self, result: Json, file: int, offset: int, size: int) -> None:
        custom_id = result.get("custom_id")
        if not isinstance(custom_id, str):
            raise ValueError("not a results line (no custom_id)")
        if custom_id not in self.best:
            raise ValueError(f"custom_id {quoted(custom_id)} is not in the request file")
        outcome, code, _ = judge(result)
        known = self.best[custom_id]
        if known is None or known.outcome != SUCCEEDED or outcome == SUCCEEDED:
            self.best[custom_id] = Entry(outcome, sys.intern(code[:80]), file, offset, size)
        input_tokens, output_tokens = usage_of(body_of(result))
        self.input_tokens += input_tokens or 0
        self.output_tokens += output_tokens or 0

    def _ignore(self, text: str) -> None:
        self.ignored += 1
        if self.ignored <= MAX_LISTED:
            self._console.warn(text)

    def line(self, entry: Entry) -> bytes:
        """The results line itself, with a line end."""
        line = os.pread(self._files[entry.file].fileno(), entry.size, entry.offset)
        return line if line.endswith(b"\n") else line + b"\n"

    def outcomes(self) -> Counter[str]:
        """How many requests ended how: succeeded, rejected, retryable, missing."""
        return Counter(entry.outcome if entry else MISSING for entry in self.best.values())

    def errors(self) -> Counter[str]:
        return Counter(entry.code for entry in self.best.values() if entry and entry.code)

    def summary(self) -> str:
        """The totals, the tokens and the commonest errors, for stderr."""
        outcomes, errors = self.outcomes(), self.errors()
        incomplete = errors["incomplete"]
        failed = outcomes[REJECTED] + outcomes[RETRYABLE] - incomplete
        text = (
            f"{outcomes[SUCCEEDED]} succeeded, {failed} failed, {incomplete} incomplete, "
            f"{outcomes[MISSING]} missing of {count_of(len(self.best), 'request')}; "
            f"tokens: {self.input_tokens} input, {self.output_tokens} output"
        )
        return text + (f"; errors: {commonest(errors)}" if errors else "") + self.ignored_lines()

    def ignored_lines(self) -> str:
        return f"; {count_of(self.ignored, 'results line')} ignored" if self.ignored else ""


def lines_to_send(
    lines: Iterable[bytes], best: Mapping[str, Entry | None], wanted: Iterable[str]
) -> Iterator[bytes]:
    """The lines of a request file whose requests ended in one of the wanted ways, as they stand there."""
    for line, entry in zip(lines, best.values(), strict=True):
        if (entry.outcome if entry else MISSING) in wanted:
            yield line


# -- bios --------------------------------------------------------------------------------------------------------


def joined(parts: Iterable[Json], kind: str, field: str) -> str:
    """The text in the parts of one type."""
    return "".join([str(part.get(field) or "") for part in parts if part.get("type") == kind])


def chat_text(content: Any) -> str:
    """The content of a chat message, which is a text or a list of parts."""
    return content if isinstance(content, str) else "".join(str(part.get("text") or "") for part in dicts(content))


def answer_text(body: Json) -> tuple[str, str]:
    """The text of a response and what there is to say against it: `refusal: …`, or that it was cut off."""
    parts = []
    for item in dicts(body.get("output")):
        if item.get("type") == "message":
            parts += dicts(item.get("content"))
    text, refusal = joined(parts, "output_text", "text"), joined(parts, "refusal", "refusal")
    choice = next(iter(dicts(body.get("choices"))), {})
    if message := object_in(choice, "message"):
        text, refusal = chat_text(message.get("content")), str(message.get("refusal") or "")
    if refusal:
        return text, f"refusal: {refusal}"
    return text, "incomplete: length" if choice.get("finish_reason") == "length" else ""


def artist_name(request: Json) -> str:
    """The name that the converter put into a request: in the prompt's variables, or in the metadata."""
    body = object_in(request, "body")
    for holder in (object_in(object_in(body, "prompt"), "variables"), object_in(body, "metadata")):
        if isinstance(name := holder.get("artist_name"), str):
            return name
    return ""


def bio_row(request: Json, outcome: str, result: Json) -> tuple[str, ...]:
    """The row of the exported CSV for a request, how it ended and its best results line, empty where there is none."""
    body = body_of(result)
    text, objection = answer_text(body)
    if outcome != SUCCEEDED:
        objection = judge(result).error() if result else MISSING
    tokens = ("" if number is None else str(number) for number in usage_of(body))
    return request["custom_id"], artist_name(request), text, objection, *tokens


def csv_line(fields: Iterable[str]) -> bytes:
    """The fields as csv.writer writes them, in half the time; half a surrogate pair becomes a question mark."""
    written = ['"' + field.replace('"', '""') + '"' if TO_QUOTE.search(field) else field for field in fields]
    return (",".join(written) + "\r\n").encode(errors="replace")


# -- arguments ---------------------------------------------------------------------------------------------------


def text_argument(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    if not text.isprintable():
        raise argparse.ArgumentTypeError(f"has control characters or is not valid UTF-8: {text!a}")
    return text


def input_path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return STDIN if text == "-" else text


def output_path(text: str) -> str:
    if not text or text.endswith("/"):
        raise argparse.ArgumentTypeError(f"not the name of a file: {text!a}")
    return STDOUT if text == "-" else text


def log_path(text: str) -> str:
    if text in ("-", STDOUT):
        raise argparse.ArgumentTypeError("stdout is for results; name a file, or /dev/stderr")
    return output_path(text)


def id_argument(text: str) -> str:
    if not is_id(text):
        raise argparse.ArgumentTypeError(f"not a batch id: {text!a}")
    return text


def positive_int(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", text):
        raise argparse.ArgumentTypeError(f"not a whole number of 1 or more: {text!a}")
    return int(text)


def batch_size(text: str) -> int:
    number = positive_int(text)
    if number > MAX_REQUESTS:
        raise argparse.ArgumentTypeError(f"a batch takes {MAX_REQUESTS} requests at most: {text!a}")
    return number


def positive_seconds(text: str) -> float:
    seconds = float(text) if re.fullmatch(r"([0-9]+\.?|[0-9]*\.[0-9]+)(e-?[0-9]+)?", text) else 0
    if not 0 < seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"not a number of seconds above 0 and at most {MAX_SECONDS}: {text!a}")
    return seconds


def add_command(
    commands: Subparsers, name: str, text: str, parents: Sequence[argparse.ArgumentParser] = ()
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, parents=parents)
    return parser


def add_input(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--in", dest="input", required=True, type=input_path, metavar="JSONL", help="request file, - for stdin")


def add_output(parser: argparse.ArgumentParser, metavar: str, text: str, *, required: bool = True) -> None:
    parser.add_argument("--out", dest="output", required=required, type=output_path, metavar=metavar, help=text)


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    text = "endpoint that every request must name (default: the url of the first request)"
    parser.add_argument("--endpoint", type=text_argument, metavar="E", help=text)


def add_submission(parser: argparse.ArgumentParser) -> None:
    add_input(parser)
    add_endpoint(parser)
    add = parser.add_argument
    text = "how long the API may take (default: %(default)s)"
    add("--completion-window", type=text_argument, default="24h", metavar="W", help=text)
    text = "requests in one batch (default: %(default)s); fewer for an account with a small token queue"
    add("--max-requests", type=batch_size, default=MAX_REQUESTS, metavar="N", help=text)


def add_batch_ids(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-id", dest="batch_ids", nargs="+", required=True, type=id_argument, metavar="ID",
                        help="ids of batches, as create, run and list print them")


def add_auto_save(parser: argparse.ArgumentParser) -> None:
    text = "save the results of a batch that has ended (default: yes)"
    parser.add_argument("--auto-save", action=argparse.BooleanOptionalAction, default=True, help=text)


def add_waiting(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--interval", type=positive_seconds, default=30.0, metavar="S", help="seconds between polls (default: 30)")
    add("--timeout", type=positive_seconds, metavar="S", help="stop waiting after S seconds, with exit 3")


def add_results(parser: argparse.ArgumentParser) -> None:
    text = "output and error files"
    parser.add_argument("--results", nargs="+", required=True, type=input_path, metavar="JSONL", help=text)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print each batch as one line of JSON")


# -- commands, in the order a batch lives ------------------------------------------------------------------------


def add_validate(commands: Subparsers) -> None:
    parser = add_command(commands, "validate", "check a request file, without uploading it")
    add_input(parser)
    add_endpoint(parser)
    parser.set_defaults(run=cmd_validate)


def cmd_validate(args: argparse.Namespace) -> int:
    check = InputCheck(args.endpoint)
    with open_input(args.input) as file:
        parts = check_input(file, args.input, check, args.console)
    requests = count_of(len(check.line_of), "request")
    args.console.emit(f"OK: {requests}, {count_of(check.size, 'byte')}, {count_of(len(parts), 'batch', 'batches')}")
    return 0


def stands_for_its_part(batch: Batch) -> bool:
    """Whether a batch runs, or has completed with at least one success."""
    if batch.status == "completed":
        return has_output(batch)
    return not has_ended(batch) and batch.status != "cancelling"


def is_partial(batch: Batch) -> bool:
    return batch.status == "cancelling" or (batch.status in ("expired", "cancelled") and has_output(batch))


def what_is_left(part: Part, batch: Batch) -> str:
    counts = request_counts(batch)
    when = "" if has_ended(batch) else "once it has ended, "
    return (
        f"part {part.label} not submitted: batch {batch.id} ({batch.status}) has finished {counts.completed} of its "
        f"{counts.total or part.requests} requests; {when}get them with retrieve --batch-id {batch.id}, and the rest "
        "with retry, without paying for all of it again"
    )


def add_create(commands: Subparsers, online: argparse.ArgumentParser) -> None:
    parser = add_command(commands, "create", "upload a request file and create its batches", [online])
    add_submission(parser)
    parser.add_argument("--force", action="store_true", help="submit even what was submitted before, and pay again")
    add_json(parser)
    parser.set_defaults(run=cmd_create)


def cmd_create(args: argparse.Namespace) -> int:
    console: Console = args.console
    check = InputCheck(args.endpoint, args.max_requests)
    with open_input(args.input) as file, locked(file, args.input, console), connect(args) as api:
        parts = check_input(file, args.input, check, console)
        submission = Submission(api, args, file, check.endpoint)
        earlier = {} if args.force else submission.find_earlier(parts)
        exit_code = 0
        for part in parts:
            batches = earlier.get(part.sha256, [])
            adopted = next(filter(stands_for_its_part, batches), None)
            partial = next(filter(is_partial, batches), None)
            if adopted:
                console.say(f"part {part.label} is batch {adopted.id} ({adopted.status}) already; not submitted again")
            elif partial:
                exit_code = 1
                console.warn(what_is_left(part, partial))
                continue
            file_id = text_of(adopted, "input_file_id") if adopted else submission.upload(part)
            if file_id and not args.json:
                console.emit(f"File ID: {file_id}")
            batch = adopted or submission.create(part, file_id)
            console.emit(batch_json(batch) if args.json else f"Batch ID: {batch.id}")
    return exit_code


def each_batch(args: argparse.Namespace, action: Callable[[str], None]) -> int:
    """Do it for every --batch-id; one that fails does not keep the others from it. The exit code."""
    exit_code = 0
    for batch_id in dict.fromkeys(args.batch_ids):
        try:
            action(batch_id)
        except Failure as failure:
            args.console.say(f"{PROG}: error: {batch_id}: {failure}")
            exit_code = 1
    return exit_code


def batch_paths(batch_id: str, out: str | None = None) -> dict[str, str]:
    """Where the output and the error file of a batch are saved; beside a stream, errors keep their own name."""
    paths = {"results": out or f"results_{batch_id}.jsonl", "errors": f"errors_{batch_id}.jsonl"}
    if out and not is_stream(out):
        root, extension = os.path.splitext(out)
        paths["errors"] = f"{root}.errors{extension}"
    return paths


def is_complete(path: str, size: int) -> bool:
    """Whether the file was downloaded whole before."""
    with failing_to(f"read {path}"), open(path, "rb") as file:
        return os.path.getsize(path) == size and (not size or last_byte(file) == b"\n")


def save_file(api: Api, file_id: str, path: str, skip_complete: bool) -> int:
    """Download a file, to a stream only once it is whole; its size."""
    if is_stream(path):
        with temporary_file() as copy:
            size = api.download(file_id, copy, path)
            copy.seek(0)
            with open_output(path) as out:
                out.writelines(blocks(copy, path))
        return size
    if os.path.isfile(path):
        if skip_complete and is_complete(path, api.file(file_id).bytes):
            return os.path.getsize(path)
        api.log.info("DOWNLOAD_RESULTS replaces %s", to_json(path))
    with open_output(path) as out:
        return api.download(file_id, out, path)


def save_files(
    api: Api, batch: Batch, paths: Mapping[str, str], report: Callable[[str], None], *, skip_complete: bool = False
) -> Iterator[str]:
    """Save the files that a batch has and report each; yields which it is, `results` or `errors`, once it is saved."""
    for kind, file_id in result_files(batch):
        size = save_file(api, file_id, paths[kind], skip_complete)
        report(f"{kind.capitalize()} saved: {paths[kind]} ({size} bytes)")
        yield kind


def show_and_save(args: argparse.Namespace, api: Api, batch: Batch) -> None:
    """Print a batch; where it has ended, save its files and print where."""
    console: Console = args.console
    if not args.json:
        if len(args.batch_ids) > 1:
            console.emit(f"Batch ID: {batch.id}")
        for line in describe(batch):
            console.emit(line)
    paths = batch_paths(batch.id)
    saved: dict[str, str] = {}
    try:
        if args.auto_save and has_ended(batch):
            report = console.say if args.json else console.emit
            for kind in save_files(api, batch, paths, report, skip_complete=True):
                saved[f"{kind}_path"] = paths[kind]
    finally:
        if args.json:
            console.emit(batch_json(batch, saved))


def add_status(commands: Subparsers, online: argparse.ArgumentParser) -> None:
    parser = add_command(commands, "status", "show batches, and save their results once ended", [online])
    add_batch_ids(parser)
    add_auto_save(parser)
    add_json(parser)
    parser.set_defaults(run=cmd_status)


def cmd_status(args: argparse.Namespace) -> int:
    with connect(args) as api:
        return each_batch(args, lambda batch_id: show_and_save(args, api, api.batch(batch_id)))


def wait_for_end(api: Api, args: argparse.Namespace) -> dict[str, Batch]:
    """The batches, by id, once all have ended."""
    watch, active = Watch(api, args), dict.fromkeys(args.batch_ids)
    while True:
        for batch in watch.look([*active]):
            del active[batch.id]
        watch.show()
        if not active:
            watch.deadline = math.inf  # saving is not waiting
            return watch.latest
        watch.pause(args.interval)


def add_wait(commands: Subparsers, online: argparse.ArgumentParser) -> None:
    parser = add_command(commands, "wait", "wait until batches have ended, then do what status does", [online])
    add_batch_ids(parser)
    add_waiting(parser)
    add_auto_save(parser)
    add_json(parser)
    parser.set_defaults(run=cmd_wait)


def cmd_wait(args: argparse.Namespace) -> int:
    resume = f"{PROG} wait --batch-id {' '.join(args.batch_ids)}"
    with connect(args) as api:
        try:
            batches = wait_for_end(api, args)
        except TimedOut:
            raise TimedOut(f"--timeout passed; the batches go on at the server; to go on waiting: {resume}") from None
        except Stopped:
            args.console.say(f"the batches go on at the server; to go on waiting: {resume}")
            raise
        exit_code = each_batch(args, lambda batch_id: show_and_save(args, api, batches[batch_id]))
    return exit_code or int(any(batch.status != "completed" for batch in batches.values()))


def count_errors(path: str) -> Counter[str]:
    """The errors of an error file, by code and message."""
    counts: Counter[str] = Counter()
    with open_input(path) as file:
        for line in lines_of(file, path):
            with contextlib.suppress(ValueError):
                counts[judge(read_object(line)).error()[:200]] += 1
    return counts


def retrieve(args: argparse.Namespace, api: Api, batch_id: str) -> None:
    """Save what there is of a batch; raises Failure where that is not everything."""
    batch = api.batch(batch_id)
    if not has_ended(batch):
        raise Failure(f"Batch not completed (status: {batch.status})")
    paths = batch_paths(batch.id, args.output)
    report = args.console.say if args.output == STDOUT else args.console.emit
    saved = [*save_files(api, batch, paths, report)]
    if batch.status == "failed":
        raise Failure(f"Batch failed: {reasons(batch)}")
    if "results" not in saved:
        errors = f": {commonest(count_errors(paths['errors']))}" if saved else ""
        raise Failure(f"Batch has no results (status: {batch.status}){errors}")
    if batch.status != "completed":
        completed, _, total = request_counts(batch)
        raise Failure(f"Batch {batch.status} with {completed} of {total} requests completed; get the rest with retry")


def add_retrieve(commands: Subparsers, online: argparse.ArgumentParser) -> None:
    parser = add_command(commands, "retrieve", "download the output and error file of batches", [online])
    add_batch_ids(parser)
    text = "where the output file goes, and the error file beside it (default: results_ID.jsonl, errors_ID.jsonl); "
    text += "with one --batch-id only"
    add_output(parser, "PATH", text, required=False)
    parser.set_defaults(run=cmd_retrieve)


def cmd_retrieve(args: argparse.Namespace) -> int:
    if args.output:
        refuse_unwritable(args.output)
    with connect(args) as api:
        return each_batch(args, lambda batch_id: retrieve(args, api, batch_id))


def cancel(args: argparse.Namespace, batch: Batch) -> None:
    """Say what became of the cancellation of a batch."""
    emit: Callable[[str], None] = args.console.emit
    if args.json:
        emit(batch_json(batch))
        return
    emit(f"Batch cancellation initiated: {batch.id}")
    emit(f"Status: {batch.status}")
    if created := local_time(number_of(batch, "created_at"), " "):
        emit(f"Created: {created}")
    if batch.status == "cancelled":
        emit("Note: Batch was successfully cancelled. Any completed requests have been processed and you will be "
             "charged for them.")
    else:
        emit("Note: Batch cancellation in progress. This may take up to 10 minutes.")


def add_cancel(commands: Subparsers, online: argparse.ArgumentParser) -> None:
    parser = add_command(commands, "cancel", "cancel batches", [online])
    add_batch_ids(parser)
    add_json(parser)
    parser.set_defaults(run=cmd_cancel)


def cmd_cancel(args: argparse.Namespace) -> int:
    with connect(args) as api:
        return each_batch(args, lambda batch_id: cancel(args, api.cancel(batch_id)))


def list_row(batch: Batch) -> tuple[str, ...]:
    completed, failed, total = request_counts(batch)
    name = metadata_of(batch, "input_file") or text_of(batch, "input_file_id")
    created = local_time(number_of(batch, "created_at"))
    return batch.id, batch.status, created, f"{completed}/{total}", str(failed), escape_controls(name)


def table(batches: Iterable[Batch]) -> Iterator[str]:
    """The lines of a table of the batches, its columns aligned."""
    rows = [list_row(batch) for batch in batches]
    if not rows:
        yield "No batches found."
        return
    rows.insert(0, ("BATCH ID", "STATUS", "CREATED", "REQUESTS", "FAILED", "INPUT FILE"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def add_list(commands: Subparsers, online: argparse.ArgumentParser) -> None:
    parser = add_command(commands, "list", "list batches, newest first", [online])
    text = "how many to show (default: %(default)s)"
    parser.add_argument("--limit", type=positive_int, default=20, metavar="N", help=text)
    add_json(parser)
    parser.set_defaults(run=cmd_list)


def cmd_list(args: argparse.Namespace) -> int:
    with connect(args) as api:
        batches = itertools.islice(api.batches(min(args.limit, PAGE_SIZE)), args.limit)
        for line in map(batch_json, batches) if args.json else table(batches):
            args.console.emit(line)
    return 0


def read_results(args: argparse.Namespace, files: contextlib.ExitStack) -> tuple[BinaryIO, Results]:
    """The request file, and the best results of its requests from all of --results.

    They stay open in `files`, which when closed raises Failure where one of them has been changed since.
    """
    gc.disable()  # nothing here makes reference cycles; looking for them among the entries takes a fifth of the time
    inputs = []
    for path in (args.input, *args.results):
        inputs.append(files.enter_context(open_input(path)))
        files.enter_context(unchanged(inputs[-1], path))
    results = Results(request_ids(inputs[0], args.input), args.console)
    for file, path in zip(inputs[1:], args.results, strict=True):
        results.read(file, path)
    return inputs[0], results


def add_retry(commands: Subparsers) -> None:
    parser = add_command(commands, "retry", "write the requests that have no result yet")
    add_input(parser)
    add_results(parser)
    add_output(parser, "JSONL", "request file to write, - for stdout")
    text = "also those that the API would refuse again as they are (4xx, incomplete)"
    parser.add_argument("--include-rejected", action="store_true", help=text)
    parser.set_defaults(run=cmd_retry)


def cmd_retry(args: argparse.Namespace) -> int:
    console: Console = args.console
    with contextlib.ExitStack() as files:
        file, results = read_results(args, files)
        outcomes, errors = results.outcomes(), results.errors()
        wanted = {RETRYABLE, MISSING, *([REJECTED] if args.include_rejected else [])}
        count = sum(outcomes[outcome] for outcome in wanted)
        if count:
            with open_output(args.output) as out:
                out.writelines(lines_to_send(lines_of(file, args.input), results.best, wanted))
                files.close()
    report = console.say if args.output == STDOUT else console.emit
    report(f"Requests to retry: {count}")
    note = " (not sent again)" if outcomes[REJECTED] and not args.include_rejected else ""
    console.say(f"{outcomes[SUCCEEDED]} succeeded, {outcomes[REJECTED]} rejected{note}, {outcomes[RETRYABLE]} failed "
                f"otherwise, {outcomes[MISSING]} missing{results.ignored_lines()}")
    if errors:
        console.say(f"commonest errors: {commonest(errors)}")
    return 0


def add_export(commands: Subparsers) -> None:
    parser = add_command(commands, "export", "write one CSV row per request, in request order")
    add_input(parser)
    add_results(parser)
    add_output(parser, "CSV", "CSV to write, - for stdout")
    parser.set_defaults(run=cmd_export)


def cmd_export(args: argparse.Namespace) -> int:
    with contextlib.ExitStack() as files:
        file, results = read_results(args, files)
        with open_output(args.output) as out:
            out.write(csv_line(BIO_COLUMNS))
            for line, entry in zip(lines_of(file, args.input), results.best.values(), strict=True):
                outcome, result = (entry.outcome, read_object(results.line(entry))) if entry else (MISSING, {})
                out.write(csv_line(bio_row(read_object(line), outcome, result)))
            files.close()
    args.console.say(f"Wrote {args.output}: {results.summary()}")
    return 0


def missing_line(custom_id: str) -> bytes:
    error = {"code": MISSING, "message": "the request is in no output or error file of its batches"}
    line = to_json({"id": None, "custom_id": custom_id, "response": None, "error": error})
    return line.encode(errors="backslashreplace") + b"\n"


def adoptable(batches: Iterable[Batch]) -> list[Batch]:
    """The batches, given newest first, that have or may yet have a success; oldest first."""
    return [batch for batch in batches if not has_ended(batch) or has_output(batch)][::-1]


def sha256_of(file: BinaryIO) -> str:
    file.seek(0)
    return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()


class QueuedPart:
    """A part on its way through the queue: its uploaded file, and the batches that were refused for its limit."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.file_id = ""
        self.refused: list[str] = []


class Run:
    """The rounds of `run`. Parts and rounds follow from the request file and the batches at the server alone."""

    def __init__(
        self, api: Api, args: argparse.Namespace, file: BinaryIO, check: InputCheck, results: Results, spool: BinaryIO
    ) -> None:
        self._api = api
        self._args = args
        self._console: Console = args.console
        self._file = file
        self._signature = file_signature(file)
        self._endpoint = check.endpoint
        self._sha256 = sha256_of(file)
        self._results = results
        self._spool = spool  # what was downloaded
        self._watch = Watch(api, args, answered=True)  # the listing or a submission comes before any poll
        self._waiting: deque[QueuedPart] = deque()
        self._active: dict[str, QueuedPart | None] = {}  # by batch id; None for one that is not sent again as it is
        self._cancelling: set[str] = set()  # active batches that were being cancelled before this run saw them
        self._room = math.inf  # how many more batches the queue may admit
        self._idle_refusals = 0
        self._cancelled = False

    def rounds(self, parts: Sequence[Part]) -> None:
        """Bring every request to its success or its last error; --attempts bounds the rounds that submit something."""
        submission = self._submission(self._file)
        parts = self._adopt_earlier(submission, parts)
        self._round(submission, parts)
        rounds_left: int = self._args.attempts - (1 if parts else 0)
        for number in range(2, 2 + rounds_left):
            outcomes = self._results.outcomes()
            left = outcomes[RETRYABLE] + outcomes[MISSING]
            if not left or self._cancelled:
                return
            if file_signature(self._file) != self._signature:
                self._console.warn(f"{self._args.input} was changed, so there is no further round; "
                                   f"retry --results {self._args.output} writes what is left")
                return
            self._console.say(f"round {number}: {count_of(left, 'request')} to send again")
            self._watch.latest.clear()
            with temporary_file() as pending:
                parts = self._write_pending(pending)
                self._round(self._submission(pending), parts)

    def _submission(self, file: BinaryIO) -> Submission:
        return Submission(self._api, self._args, file, self._endpoint, self._sha256)

    def _write_pending(self, pending: BinaryIO) -> list[Part]:
        """Write what is to be sent again to `pending`; its parts."""
        self._file.seek(0)
        lines = lines_of(self._file, self._args.input)
        pending.writelines(lines_to_send(lines, self._results.best, (RETRYABLE, MISSING)))
        pending.seek(0)
        check = InputCheck(self._endpoint, self._args.max_requests)
        return check_input(pending, "the next round", check, self._console)

    def _adopt_earlier(self, submission: Submission, parts: Sequence[Part]) -> list[Part]:
        """Take in or follow every earlier batch of the request file; the parts that can be submitted at once.

        Batches of other parts of it, from a later round or another --max-requests, have to end first: only their
        results tell which requests they had.
        """
        earlier = submission.find_earlier(parts)
        new = []
        for part in parts:
            batches = adoptable(earlier[part.sha256])
            for batch in batches:
                self._console.say(f"part {part.label} is batch {batch.id} ({batch.status}) already")
                self._adopt(batch, QueuedPart(part) if len(batches) == 1 else None)
            if not batches:
                new.append(part)
        others = adoptable(earlier[OTHERS])
        for batch in others:
            self._console.say(f"batch {batch.id} ({batch.status}) has some of the requests already")
            self._adopt(batch, None)
        return [] if others else new

    def _adopt(self, batch: Batch, queued: QueuedPart | None) -> None:
        self._watch.latest[batch.id] = batch
        if has_ended(batch):
            self._take(batch)
            return
        self._active[batch.id] = queued
        if batch.status == "cancelling":
            self._cancelling.add(batch.id)

    def _round(self, submission: Submission, parts: Sequence[Part]) -> None:
        """Submit the parts, and take in what comes of them and of the batches that were adopted."""
        self._waiting.extend(map(QueuedPart, parts))
        self._submit(submission)
        while self._active:
            self._watch.show()
            self._watch.pause(self._args.interval)
            self._poll()
            self._submit(submission)
        self._watch.show()

    def _submit(self, submission: Submission) -> None:
        """Make batches of waiting parts, as many as the queue may have room for."""
        while self._waiting and self._room:
            queued = self._waiting.popleft()
            part = queued.part
            if not queued.file_id:
                queued.file_id = submission.upload(part)
                self._console.say(f"part {part.label}: File ID: {queued.file_id}")
            batch = submission.create(part, queued.file_id, queued.refused)
            self._console.say(f"part {part.label}: Batch ID: {batch.id}")
            self._watch.latest[batch.id], self._active[batch.id] = batch, queued
            self._room -= 1

    def _poll(self) -> None:
        """Look at the active batches, and deal with those that have ended."""
        refused: list[QueuedPart] = []
        ended = 0
        for batch in self._watch.look([*self._active]):
            queued = self._active.pop(batch.id)
            if batch.status == "failed" and not is_over_queue_limit(batch):
                raise Failure(f"batch {batch.id} (part {metadata_of(batch, 'part')}) failed: {reasons(batch)}; nothing "
                              "is written, batches under way go on and a later run adopts them")
            if batch.status == "failed" and queued:
                part = queued.part
                self._console.say(f"part {part.label}: batch {batch.id} was refused for the token limit of the queue")
                queued.refused.append(batch.id)
                refused.append(queued)
                del self._watch.latest[batch.id]
            else:
                ended += 1
                self._take(batch)
                if batch.status == "cancelled" and batch.id not in self._cancelling:
                    self._cancelled = True
                    self._console.warn(f"batch {batch.id} was cancelled; this run ends with what is under way, and a "
                                       "later one does the rest")
        if self._cancelled:
            self._waiting.clear()
        else:
            self._make_room(refused, ended)

    def _make_room(self, refused: Sequence[QueuedPart], ended: int) -> None:
        """After a refusal for the queue limit, a batch that ends makes room for one; with none active, time may.

        So there is room whenever none is active.
        """
        self._waiting.extendleft(reversed(refused))
        self._room = ended if refused else self._room + ended
        if ended:
            self._idle_refusals = 0
        if not refused or self._active or ended:
            return
        self._idle_refusals += 1
        if self._idle_refusals == IDLE_REFUSALS:
            label, _, size, requests, _ = refused[0].part
            raise Failure(f"part {label} ({count_of(requests, 'request')}, {count_of(size, 'byte')}) was refused "
                          f"{IDLE_REFUSALS} times for the token limit of the queue with no batch of this run active; "
                          "make batches smaller with --max-requests")
        seconds = self._args.interval * 2**self._idle_refusals
        self._console.say(f"no batch of this run is active; trying again in {seconds:g} s")
        self._watch.pause(seconds)
        self._room = 1

    def _take(self, batch: Batch) -> None:
        """Download what a batch that has ended left, and index it."""
        for kind, file_id in result_files(batch):
            start = self._spool.seek(0, os.SEEK_END)
            self._api.download(file_id, self._spool, f"{kind} of {batch.id}")
            self._spool.seek(start)
            self._results.read(self._spool, f"{kind} of {batch.id}")


def add_run(commands: Subparsers, online: argparse.ArgumentParser) -> None:
    text = "the whole job: submit, wait, download, send again what failed"
    parser = add_command(commands, "run", text, [online])
    add_submission(parser)
    add_output(parser, "JSONL", "results file to write, - for stdout")
    add_waiting(parser)
    text = "rounds in all; what can be retried goes into the next (default: %(default)s)"
    parser.add_argument("--attempts", type=positive_int, default=3, metavar="N", help=text)
    parser.set_defaults(run=cmd_run)


def cmd_run(args: argparse.Namespace) -> int:
    console: Console = args.console
    check = InputCheck(args.endpoint, args.max_requests)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_input(args.input))
        stack.enter_context(locked(file, args.input, console))
        refuse_unwritable(args.output)
        api = stack.enter_context(connect(args))
        parts = check_input(file, args.input, check, console)
        spool = stack.enter_context(temporary_file())
        results = Results(dict.fromkeys(check.line_of), console)
        try:
            Run(api, args, file, check, results, spool).rounds(parts)
        except (TimedOut, Stopped):
            console.say("nothing is written yet; the batches go on at the server; run the same command again to go on")
            raise
        with open_output(args.output) as out:
            out.writelines(results.line(entry) if entry else missing_line(custom_id)
                           for custom_id, entry in results.best.items())
    console.say(f"Wrote {args.output}: {results.summary()}")
    return 0 if results.outcomes()[SUCCEEDED] == len(results.best) else 1


# -- command line ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Speaks through the console: no secrets, and nothing but the help on stdout. No option can be abbreviated."""

    def __init__(self, console: Console, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._console = console

    def print_help(self, file: object = None) -> None:
        with open_output(STDOUT) as stdout:
            stdout.write(self.format_help().encode())

    def error(self, message: str) -> NoReturn:
        for line in self.format_usage().splitlines():
            self._console.say(line)
        self._console.say(f"{self.prog}: error: {message}")
        raise SystemExit(2)


def online_options() -> argparse.ArgumentParser:
    """The options of every command that talks to the API."""
    parser = argparse.ArgumentParser(add_help=False)
    text = "log to append to (default: logs/batch_YYYYMMDD_HHMMSS.log)"
    parser.add_argument("--log-file", type=log_path, metavar="PATH", help=text)
    parser.add_argument("--verbose", action="store_true", help="show each API response on stderr")
    return parser


def build_parser(console: Console) -> argparse.ArgumentParser:
    parser = Parser(console, prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser_class: Any = functools.partial(Parser, console)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=parser_class)
    online = online_options()
    add_validate(commands)
    add_create(commands, online)
    add_status(commands, online)
    add_wait(commands, online)
    add_retrieve(commands, online)
    add_cancel(commands, online)
    add_list(commands, online)
    add_retry(commands)
    add_export(commands)
    add_run(commands, online)
    return parser


def parse_args(argv: Sequence[str] | None, console: Console) -> argparse.Namespace:
    parser = build_parser(console)
    args = parser.parse_args(argv)
    inputs = [path for path in (getattr(args, "input", None), *getattr(args, "results", [])) if path]
    outputs = [path for path in (getattr(args, "output", None), getattr(args, "log_file", None)) if path]
    if inputs.count(STDIN) > 1:
        parser.error("only one input can be stdin (-)")
    for path, output in itertools.product(inputs, outputs):
        if same_regular_file(path, output):
            parser.error(f"{path} would be read and written at once; choose another path to write")
    if len({*map(os.path.realpath, outputs)}) < len(outputs):
        parser.error("--out and --log-file are the same file; choose another for the log")
    if getattr(args, "output", None) and len(getattr(args, "batch_ids", [])) > 1:
        parser.error("--out goes with one --batch-id")
    args.argv = [*(sys.argv[1:] if argv is None else argv)]
    return args


# -- main --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into Stopped; none within a second after, so that cleaning up is not cut.

    Once stopped, the process ends, and they are ignored to its end.
    """
    stopped_at = -math.inf

    def stop(number: int, _frame: object) -> None:
        nonlocal stopped_at
        if time.monotonic() - stopped_at > 1:  # the one before may have been lost in a callback of the interpreter
            stopped_at = time.monotonic()
            raise Stopped(128 + number)

    before: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's choice stays
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler if stopped_at == -math.inf else signal.SIG_IGN)


def main(
    argv: Sequence[str] | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run the command line; the exit code."""
    console = Console(sys.stderr)
    try:
        with stopping_on_signals():
            args = parse_args(argv, console)
            args.console, args.sleep, args.clock = console, sleep, clock
            return int(args.run(args))
    except Failure as failure:
        console.say(f"{PROG}: error: {failure}")
        return failure.exit_code
    except OSError as error:  # of which nothing above says what it was about
        console.say(f"{PROG}: error: {error}")
        return 1
    except Stopped as stopped:
        if stopped.exit_code > 128:
            console.say(f"{PROG}: stopped")
        return stopped.exit_code
    finally:
        console.close()


if __name__ == "__main__":
    raise SystemExit(main())
