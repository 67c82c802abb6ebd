#!/usr/bin/env python3
"""Put a request file (JSONL) through OpenAI's Batch API. Nothing is paid for twice,
and nothing paid for is lost.

  batch_tool.py preview --in requests.jsonl
  batch_tool.py run --in requests.jsonl --out results.jsonl
  batch_tool.py export --in requests.jsonl --results results.jsonl --out bios.csv

stdout carries results only; everything else goes to stderr. Commands that talk to
the API need OPENAI_API_KEY, and log every request to logs/batch_YYYYMMDD_HHMMSS.log.
validate, retry and export work offline. OPENAI_BASE_URL chooses another service.
COMMAND --help shows the options of a command.

exit codes: 0 success, 1 fatal error, 2 invalid arguments, 3 --timeout passed,
130 interrupted, 143 terminated, 129 hung up
"""
from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes over: no traceback for Ctrl-C during the imports

import argparse
import contextlib
import csv
import datetime
import errno
import fcntl
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import re
import stat
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, TextIO, TypeVar, cast

if TYPE_CHECKING:
    import httpx2
    from openai import APIStatusError, OpenAI, OpenAIError

PROG = "batch_tool.py"
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"{PROG}: error: it needs Python 3.11 or later; this is {sys.version.split()[0]}")

# ==== common block: stands in gen_batch_jsonl.py and batch_tool.py, byte for byte the same =======================

STDIN, STDOUT = "/dev/stdin", "/dev/stdout"  # what - stands for
MAX_BATCH_REQUESTS = 50_000  # Batch API guide, "Rate limits"
MAX_BATCH_BYTES = 200_000_000  # of one input file; Batch API guide, "Rate limits"
MAX_LISTED = 20  # problems shown one by one
CHUNK_BYTES = 1 << 20  # read or written at a time


class CommandError(Exception):
    """An expected error. Its text is the one-line message shown to the user."""


class Exit(BaseException):
    """Ends the command without an error message: a signal arrived, or the reader of stdout is gone."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


def escape_controls(text: str) -> str:
    """Keep the text on one line: write line breaks, control characters and undecodable bytes as JSON escapes."""
    return re.sub("[^ -~]", lambda char: char[0] if char[0].isprintable() else json.dumps(char[0])[1:-1], text)


def plural(number: int, noun: str, nouns: str = "") -> str:
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"


def shown(path: str) -> str:
    """The path as messages name it."""
    return {STDIN: "stdin", STDOUT: "stdout"}.get(path, path)


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


def positive_int(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", text):
        raise argparse.ArgumentTypeError(f"not a whole number of 1 or more: {text!a}")
    return int(text)


def encoding_name(text: str) -> str:
    try:
        "".encode(text)
    except (LookupError, ValueError):
        raise argparse.ArgumentTypeError(f"not an encoding that Python knows: {text!a}") from None
    return text


def same_regular_file(source: str, destination: str) -> bool:
    try:
        there = os.fstat(0) if source == STDIN else os.stat(source)
        here = os.fstat(1) if destination == STDOUT else os.stat(destination)
    except OSError:
        return False
    return stat.S_ISREG(there.st_mode) and os.path.samestat(there, here)


@contextlib.contextmanager
def os_errors_as(action: str, advice: str = "") -> Iterator[None]:
    """Turn an OSError into a CommandError: `cannot <action>: <reason><advice>`."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot {action}: {error.strerror or error}{advice}") from None


def stdin_bytes() -> BinaryIO:
    if sys.stdin is None:
        raise CommandError("stdin is closed; there is nothing to read")
    with contextlib.suppress(io.UnsupportedOperation):  # stdin has no file descriptor in some tests
        os.set_blocking(sys.stdin.fileno(), True)  # on a non-blocking pipe, a slow writer looks like end of file
    return sys.stdin.buffer


def redirect_to_null(file: BinaryIO | TextIO) -> None:
    """Drop what the file still buffers and all that follows, so that exit never blocks or fails on it."""
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), file.fileno())


@contextlib.contextmanager
def flushed(file: BinaryIO) -> Iterator[BinaryIO]:
    """Flush the file at the end. After a write error or a signal, drop the rest."""
    try:
        try:
            yield file
        except CommandError:
            file.flush()
            raise
        file.flush()
    except (OSError, Exit):
        redirect_to_null(file)
        raise


@contextlib.contextmanager
def stdout_bytes() -> Iterator[BinaryIO]:
    """stdout as a file that takes every byte, flushed at the end. Raises Exit if nobody reads it any more."""
    if sys.stdout is None:
        raise Exit(1)
    file = sys.stdout.buffer
    with contextlib.suppress(io.UnsupportedOperation):  # stdout has no file descriptor in some tests
        os.set_blocking(file.fileno(), True)  # a full non-blocking pipe refuses bytes
    raw = getattr(file, "raw", file)  # with PYTHONUNBUFFERED, stdout is raw, and a raw write may take only a part
    buffered = io.BufferedWriter(raw)
    try:
        with flushed(buffered):
            yield buffered
    except BrokenPipeError:
        raise Exit(1) from None
    finally:
        buffered.detach()  # else it closes stdout


@contextlib.contextmanager
def atomic_replace(path: str) -> Iterator[BinaryIO]:
    """A temporary file beside `path`. It replaces `path` once it is whole and on disk."""
    directory = os.path.dirname(path)
    with contextlib.suppress(FileExistsError):  # a file there makes a clearer error when the temporary file is opened
        os.makedirs(directory)
    temporary = os.path.join(directory, f".{PROG}-{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "x+b", buffering=CHUNK_BYTES) as file:
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(path).st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def is_stream(path: str) -> bool:
    """Whether the path cannot be replaced: stdout, a pipe, a device."""
    return path == STDOUT or (os.path.exists(path) and not os.path.isfile(path))


@contextlib.contextmanager
def open_output(path: str, advice: str = "") -> Iterator[BinaryIO]:
    """Open a file to write. It replaces `path` when the block ends well; otherwise `path` stays as it was.

    A stream is written directly.
    """
    with os_errors_as(f"write {shown(path)}", advice):
        if path == STDOUT:
            with stdout_bytes() as file:
                yield file
        elif is_stream(path):
            with open(path, "wb") as opened, flushed(opened) as file:
                yield file
        else:
            with atomic_replace(os.path.realpath(path)) as file:
                yield file


class Console:
    """stderr: one line per message and, on a terminal, one progress line that is written over.

    `redact` is applied to every text. A message that cannot be printed does not abort the work.
    """

    def __init__(self, stream: TextIO | None, redact: Callable[[str], str] = escape_controls) -> None:
        self.redact = redact
        self.is_terminal = stream is not None and stream.isatty()
        self._stream = stream
        self._progress_width = 0  # characters of progress on the terminal's line

    def message(self, text: str) -> None:
        self.clear_progress()
        self._write(self.redact(text) + "\n")

    def warn(self, text: str) -> None:
        self.message(f"{PROG}: warning: {text}")

    def error(self, text: str) -> None:
        self.message(f"{PROG}: error: {text}")

    def progress(self, text: str) -> None:
        """Write over the progress line of a terminal; elsewhere print a line."""
        if self._stream is None or not self.is_terminal:
            self.message(text)
            return
        columns = 80
        with contextlib.suppress(OSError):  # the terminal may be gone
            columns = os.get_terminal_size(self._stream.fileno()).columns or columns
        text = self.redact(text)[: columns - 1]
        self._write("\r" + text.ljust(self._progress_width))
        self._progress_width = len(text)

    def clear_progress(self) -> None:
        if self._progress_width:
            self._write("\r" + " " * self._progress_width + "\r")
            self._progress_width = 0

    def _write(self, text: str) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.write(text)
                self._stream.flush()

    def close(self) -> None:
        """Flush stderr. If that fails, drop the rest: a second failure at exit would change the exit code."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except OSError:
                redirect_to_null(self._stream)


class UsageError(Exception):
    """The arguments are invalid. Its text is what the user sees: the usage, then the error."""


class Parser(argparse.ArgumentParser):
    """Prints help to stdout, and raises UsageError. Accepts no abbreviated option."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def print_help(self, file: object = None) -> None:
        with open_output(STDOUT) as stdout:
            stdout.write(self.format_help().encode())

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.format_usage()}{self.prog}: error: {escape_controls(message)}")


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into Exit.

    After a signal, further ones are ignored for one second, so that they do not interrupt the cleaning up. Then they
    work again: Python can lose the first Exit if it is raised in a callback of the interpreter. When the block ends
    after a signal, all three stay ignored, because the process is about to exit.
    """
    stopped_at = -math.inf

    def stop(number: int, _frame: object) -> None:
        nonlocal stopped_at
        if time.monotonic() - stopped_at > 1:
            stopped_at = time.monotonic()
            raise Exit(128 + number)

    before: dict[signal.Signals, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # keep the choice of nohup
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if stopped_at == -math.inf else signal.SIG_IGN)


# ---- CSV headers, in both scripts

DELIMITERS = (",", ";", "\t", "|")
BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\ufeff"  # of str.strip(), and two more
BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def column_key(name: str) -> str:
    """A column name for comparisons: casefolded, trimmed, with "_" for each run of blanks, hyphens and underscores."""
    return re.sub(r"[\s_-]+", "_", name.strip(BLANKS).casefold())


def encoding_of(start: bytes, encoding: str) -> str:
    """The encoding of a CSV by its first bytes: a byte-order mark beats the option."""
    return next((found for mark, found in BYTE_ORDER_MARKS.items() if start.startswith(mark)), encoding)


def listed_columns(names: Iterable[str]) -> str:
    """The column names for a message, with advice to use --encoding if they were decoded wrongly."""
    text = ", ".join(filter(None, names)) or "without names"
    is_garbled = re.search("[\0\udc80-\udcff]", text)  # UTF-16 read as bytes, or bytes that could not be decoded
    advice = " (read in the wrong encoding; name the right one with --encoding)" if is_garbled else ""
    return text[:300] + ("…" if len(text) > 300 else "") + advice


class Header(NamedTuple):
    """The header of a CSV: its delimiter, its column names, and its first and last line.

    If its quoting is malformed, the names are those on its first line, split without regard to quotes.
    """

    delimiter: str
    names: list[str]
    line: int
    last_line: int
    is_malformed: bool

    def find(self, name: str) -> list[int]:
        """The positions of the columns of that name."""
        return [at for at, each in enumerate(self.names) if column_key(each) == column_key(name)]

    def position(self, name: str) -> int:
        """The position of the one column of that name. Raises CommandError if there is none, or more than one."""
        found = self.find(name)
        if len(found) != 1:
            problem = f'names "{name}" {len(found)} times' if found else f'has no column "{name}"'
            raise CommandError(f"line {self.line}: the header {problem}; its columns are {listed_columns(self.names)}")
        return found[0]


def read_header(lines: Iterator[str], required: Iterable[str]) -> Header | None:
    """Read up to the end of the header, the first record that is not blank. Returns None if every record is blank.

    A line `sep=;` before the header names the delimiter. Otherwise it is the one that gives the most required columns
    or, among equals, the most columns.
    """
    delimiters: Sequence[str] = DELIMITERS
    number = 0
    for line in lines:
        number += 1
        line = line.lstrip("\ufeff\u200b")
        if separator := re.fullmatch(r'"?sep=([,;\t|])"?[,;\t| ]*[\r\n]*', line, re.IGNORECASE):
            delimiters = [separator[1]]
        elif line.strip(BLANKS + '",;|'):
            break
    else:
        return None
    text, last = line, number
    while text.count('"') % 2 and last < number + 100 and (more := next(lines, "")):  # a name may hold a line end
        text, last = text + more, last + 1
    keys = {column_key(name) for name in required}

    def split(delimiter: str) -> Header:
        try:
            fields = next(csv.reader([text], delimiter=delimiter, strict=True))
        except csv.Error:
            names = [field.strip(BLANKS) for field in line.split(delimiter)]
            return Header(delimiter, names, number, number, is_malformed=True)
        return Header(delimiter, [field.strip(BLANKS) for field in fields], number, last, is_malformed=False)

    def fit(header: Header) -> tuple[int, int]:
        return len(keys.intersection(map(column_key, header.names))), len(header.names)

    return max(map(split, delimiters), key=fit)


# ==== end of the common block ====================================================================================

DEFAULT_BASE_URL = "https://api.openai.com/v1"
FILE_LIFETIME_SECONDS = 30 * 24 * 60 * 60  # of an uploaded file; Batch API guide
PAGE_SIZE = 100  # maximum `limit` of a listing; API reference
MAX_PAGES = 500  # a longer listing is considered endless
MAX_OLD_PAGES = 3  # this many full pages with nothing but older batches end the search
MAX_TRIES = 3  # of one request
MAX_TEXT_CHARS = 200  # of a text from the server, in a message
LOOK_UP_DELAYS = (0.5, 1.5, 3, 5)  # seconds; a new batch may take about ten to be listed
FENCED_LOOK_UP_DELAYS = (2, 3, 5, 10)  # seconds; longer, because a POST may take effect late
SHORT_POLL_SECONDS = 5  # between polls that end soon
RIVAL_CHECK_SECONDS = 12  # after a POST; by then the listing shows what was submitted in the same second
OUTPUT_DELAY_SECONDS = 600  # how long a completed batch may lack its output file
RATE_LIMIT_BUDGET = 600.0  # seconds; total time that one call waits because of 429s
OUTAGE_BUDGET = 3600.0  # seconds; how long `run` keeps trying during an outage
MAX_PAUSE = 60.0  # seconds between two tries, unless the server asks for more
QUIET_PAUSE_SECONDS = 5  # a longer pause is reported
REQUEST_SECONDS = 60  # time-out of a request, unless another one is given
UPLOAD_SECONDS = 600  # time-out of the response to an upload
MODEL_SECONDS = 10  # time-out of the model check, which is skipped without a response
ANSWER_SECONDS = 600  # time-out of one request of `preview`, which waits for the model
MAX_SECONDS = 10**8  # of --interval and --timeout; sleep() fails on much larger values
YOUNG_SECONDS = 120  # a batch this new may still get a 404
SHUTDOWN_WARNING_DAYS = 30
MAX_IDLE_REFUSALS = 2  # token-limit refusals, with no batch of ours active, before a part is halved
MAX_SINGLE_REFUSALS = 5  # and before a single request is given up
ID_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
SECRET = re.compile(
    r"""
    (                                # kept: what introduces a secret
        (?i:Bearer) (?:\s|\\[nrt]|%20)+
      | (?:
            (?<![A-Za-z0-9])         # `sk-` at the start of a word,
          | (?<=\\[nrtbf])           # after a JSON escape such as \n,
          | (?<=\\u[0-9a-f]{4})      # after \u0000,
          | (?<=%[0-9A-F]{2})        # or after a URL escape
        )
        sk-
    )
    [^\s\\"',;]{16,}                 # replaced
    """,
    re.VERBOSE,
)
REDACTED = "[secret]"
NO_SUCH_PATH = re.compile(  # how web servers report an unknown path, as opposed to an unknown file or batch
    r"\s*(<.*|(404 )?(page )?not found\W*|.*invalid url.*)?\s*", re.DOTALL | re.IGNORECASE
)
TERMINAL_STATUSES = ("completed", "failed", "expired", "cancelled")
KNOWN_STATUSES = (*TERMINAL_STATUSES, "validating", "in_progress", "finalizing", "cancelling")

T = TypeVar("T")
Json = dict[str, Any]


class TimedOut(Exit):
    """--timeout passed. Its text is the message shown to the user."""

    def __init__(self, message: str = "--timeout passed") -> None:
        super().__init__(3)
        self.message = message


class ApiError(CommandError):
    """A request to the API that got no usable response.

    The attributes describe the response, if there was one: its HTTP status, the code and the type of its error, the
    pause in seconds that it asks for, and whether it says that there is no such endpoint.
    """

    def __init__(
        self,
        text: str,
        status: int | None = None,
        codes: tuple[Any, ...] = (),
        retry_after: float | None = None,
        *,
        no_endpoint: bool = False,
    ) -> None:
        super().__init__(text)
        self.status = status
        self.codes = codes
        self.retry_after = retry_after
        self.no_endpoint = no_endpoint


class Refused(ApiError):
    """The API refused the request, so it had no effect. A rate limit (429) is one of these, too."""


class NotFound(Refused):
    """HTTP 404."""


class OutcomeUnknown(ApiError):
    """The request may or may not have taken effect: lost connection, time-out, 408, 409, 5xx, unusable response."""


class NotSent(OutcomeUnknown):
    """No connection was made, so the request took no effect."""


class WrongSize(OutcomeUnknown):
    """A file was not transferred whole. A transfer is slow, so it is retried a few times only, even by `run`."""


class NotJson(OutcomeUnknown):
    """The response is not a JSON object, so it may not come from the API at all."""


class OutputMissing(CommandError):
    """A completed batch reports successes but has no output file."""


class IncompleteListing(CommandError):
    """The API did not list all batches, so there may be batches that we do not know."""


# ---- text and JSON


def with_commas(number: int, noun: str) -> str:
    """The number with commas between thousands, and the noun in the right number."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def to_json(content: Any) -> str:
    try:
        return json.dumps(content, ensure_ascii=False, default=str)
    except RecursionError:  # the encoder allows less nesting than the decoder
        return '"nested too deeply"'


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


LENIENT_JSON = json.JSONDecoder()
STRICT_JSON = json.JSONDecoder(parse_constant=refuse_constant)


@functools.cache
def fast_json() -> Callable[..., Any] | None:
    """The JSON decoder that comes with the openai package, which is faster; None if it is missing."""
    try:
        from jiter import from_json
    except ImportError:
        return None
    return from_json


def json_problem(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not valid UTF-8 (byte {error.start + 1} of the line)"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (character {error.pos + 1} of the line)"
    return f"not valid JSON: {error}"


def decode_json(line: bytes, strict: bool) -> Any:
    """Decode with the fast decoder. If that rejects the line, let `json` decide. Raises ValueError, RecursionError."""
    if from_json := fast_json():
        try:
            return from_json(line, allow_inf_nan=not strict)
        except ValueError:  # also a lone surrogate or deep nesting, which `json` may take
            pass
    return (STRICT_JSON if strict else LENIENT_JSON).decode(line.decode())


def read_object(line: bytes, *, strict: bool = False) -> Json:
    """The JSON object on a line. Raises ValueError with the reason. `strict` refuses NaN and Infinity."""
    try:
        content = decode_json(line, strict)
    except (ValueError, RecursionError) as error:
        raise ValueError(json_problem(error) if line.strip() else "blank line") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def child_object(content: Json, name: str) -> Json:
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def objects(value: Any) -> list[Json]:
    """The objects in what should be a list of objects."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def str_field(content: Json, name: str) -> str:
    value = content.get(name)
    return value if isinstance(value, str) else ""


def int_field(content: Json, name: str) -> int | None:
    value = content.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def secrets_in_environment() -> list[str]:
    """The API key and the password in the base URL, each in every form in which it may be printed."""
    from urllib.parse import unquote, urlsplit  # takes a while to import

    key = os.environ.get("OPENAI_API_KEY", "").strip()
    try:
        password = urlsplit(os.environ.get("OPENAI_BASE_URL", "").strip()).password or ""
    except ValueError:
        password = ""
    forms = [key, json.dumps(key)[1:-1], password, unquote(password)]
    return [secret for secret in dict.fromkeys(forms) if len(secret) >= 8]


def hide_secrets(text: str) -> str:
    """Replace the secrets of the environment, and anything that looks like an API key."""
    for secret in secrets_in_environment():
        text = text.replace(secret, REDACTED)
    return SECRET.sub(lambda found: found[1] + REDACTED, text)


def redact(text: str) -> str:
    """Keep the text on one line, without secrets."""
    return escape_controls(hide_secrets(text))


def quoted(value: Any) -> str:
    """The value as JSON for a message, cut to a readable length. Secrets go first: `redact` would miss half of one."""
    return hide_secrets(to_json(value)[:10_000])[:80]


def shorten(text: str) -> str:
    """Put the text on one line, and cut it to a readable length between words."""
    words = " ".join(hide_secrets(text[:10_000]).split())
    if len(words) <= MAX_TEXT_CHARS:
        return words
    start = words[:MAX_TEXT_CHARS]
    whole = start.rpartition(" ")[0]
    return (whole if len(whole) > MAX_TEXT_CHARS / 2 else start) + " …"


# ---- output


def print_result(text: str, console: Console) -> None:
    """Print one line to stdout and flush it. Characters outside its encoding become backslash escapes."""
    console.clear_progress()
    with open_output(STDOUT) as stdout:
        stdout.write((console.redact(text) + "\n").encode(sys.stdout.encoding, "backslashreplace"))


def result_printer(console: Console, *, to_stderr: bool) -> Callable[[str], None]:
    """print_result, or console.message if stdout carries a file or JSON."""
    return console.message if to_stderr else functools.partial(print_result, console=console)


# ---- time


class Clock:
    """The time of a command. Tests pass functions that do not really wait."""

    def __init__(self, sleep: Callable[[float], None], monotonic: Callable[[], float]) -> None:
        self.now = monotonic
        self._sleep = sleep
        self._deadline = math.inf

    def seconds_left(self) -> float:
        return self._deadline - self.now()

    def sleep(self, seconds: float) -> None:
        """Raises TimedOut once the limit has passed."""
        left = self.seconds_left()
        if left > 0:
            self._sleep(min(seconds, left))
        if self.seconds_left() <= 0:
            raise TimedOut

    @contextlib.contextmanager
    def limit(self, seconds: float | None) -> Iterator[None]:
        """Raise TimedOut in the block after this many seconds, even during a call to a very slow server."""
        if seconds is None:
            yield
            return

        def time_out(_number: int, _frame: object) -> None:
            raise TimedOut

        before = signal.signal(signal.SIGALRM, time_out)
        self._deadline = self.now() + seconds
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # repeat every second: a callback may swallow the exception
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self._deadline = math.inf


# ---- files


@contextlib.contextmanager
def temporary_file() -> Iterator[BinaryIO]:
    """A file without a name. It lasts as long as the block."""
    import tempfile  # takes a while to import

    advice = "; set TMPDIR to a directory with free space"
    with os_errors_as("write a temporary file", advice), tempfile.TemporaryFile() as file:
        yield cast(BinaryIO, file)


def chunks(file: BinaryIO, name: str) -> Iterator[bytes]:
    """The rest of the file, in chunks."""
    with os_errors_as(f"read {name}"):
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


class Input(NamedTuple):
    """An open input file that can be read more than once, and its name for messages."""

    file: BinaryIO
    name: str
    stamp: tuple[int, int]

    @classmethod
    def of(cls, file: BinaryIO, name: str) -> Input:
        return cls(file, name, cls._stamp(file))

    @staticmethod
    def _stamp(file: BinaryIO) -> tuple[int, int]:
        status = os.fstat(file.fileno())
        return status.st_size, status.st_mtime_ns

    def lines(self) -> Iterator[bytes]:
        with os_errors_as(f"read {self.name}"):
            self.file.seek(0)
            for line in self.file:  # noqa: UP028  `yield from` closes the file when the reader stops early
                yield line

    def is_changed(self) -> bool:
        return self._stamp(self.file) != self.stamp

    def refuse_changes(self) -> None:
        """Raise CommandError if the file was changed since it was opened."""
        if self.is_changed():
            raise CommandError(f"{self.name} was changed while it was in use; run the same command again")

    def sha256(self) -> str:
        with os_errors_as(f"read {self.name}"):
            self.file.seek(0)
            return hashlib.file_digest(cast(io.BufferedReader, self.file), "sha256").hexdigest()


@contextlib.contextmanager
def open_input(path: str) -> Iterator[Input]:
    """Open a file to read. stdin and other streams are copied to a temporary file first."""
    with contextlib.ExitStack() as stack:
        with os_errors_as(f"read {shown(path)}"):
            file = stdin_bytes() if path == STDIN else stack.enter_context(open(path, "rb"))
        if path == STDIN or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            copy = stack.enter_context(temporary_file())
            copy.writelines(chunks(file, shown(path)))
            copy.flush()
            file = copy
        yield Input.of(file, shown(path))


def refuse_unwritable(path: str) -> None:
    """Check that --out is writable before starting, not after a day of waiting."""
    import tempfile

    if os.path.isdir(path):
        raise CommandError(f"cannot write {path}: it is a directory; choose another --out")
    if is_stream(path):
        return
    directory = os.path.dirname(os.path.realpath(path))
    with os_errors_as(f"write {path}", "; choose another --out"):
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # its name may be too long
        with contextlib.suppress(FileExistsError):
            os.makedirs(directory)
        tempfile.TemporaryFile(dir=directory).close()


def ends_with_an_object(file: BinaryIO, start: int) -> bool:
    """Whether the last line that is not blank, of the bytes from `start` on, is a JSON object."""
    file.flush()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = len(content)
        while end > start and content[end - 1 : end].isspace():
            end -= 1
        line = content[max(start, content.rfind(b"\n", start, end) + 1) : end]
    with contextlib.suppress(ValueError):
        read_object(line)
        return True
    return False


class FilePart(io.BufferedIOBase):
    """Part of a file, as a file object that the SDK uploads in chunks and rewinds.

    It has no `fileno`: with one, the SDK would take the size of the whole file.
    """

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file = file
        self._offset = offset
        self._size = size
        self._position = 0

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = self._size - self._position
        wanted = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._file.fileno(), wanted, self._offset + self._position)
        self._position += len(data)
        return data


# ---- request files


class Part(NamedTuple):
    """Consecutive lines of a request file, sent as one batch. `sha256` is the hash of their bytes."""

    label: str
    offset: int
    size: int
    first: int  # position of its first request in the file
    requests: int
    sha256: str


class Problem(NamedTuple):
    """An error in a request file, found here or by the API. Each field may be empty."""

    line: int | None
    code: str
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, ("" if self.line is None else f"line {self.line}", self.code, self.message)))


def guess_content(first_line: bytes) -> str:
    """What a file that is not JSONL probably is, and what to do about it. Empty if the first line looks like JSON."""
    if first_line.startswith(b"PK\x03\x04"):
        return "an Excel workbook or a zip file, not JSONL; save it as CSV and convert it with gen_batch_jsonl.py"
    if first_line.startswith(b"\x1f\x8b"):
        return "a gzip file, not JSONL; decompress it first"
    if first_line.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16, but JSONL is UTF-8; if it is a CSV, convert it with gen_batch_jsonl.py"
    text = first_line.removeprefix(b"\xef\xbb\xbf").strip()
    if text != first_line.strip() and text.startswith(b"{"):
        return "the file begins with a byte-order mark; save it without one"
    if not text or text.startswith((b"{", b"[")):
        return ""
    if any(delimiter.encode() in text for delimiter in DELIMITERS):
        return "not JSONL; it looks like a CSV: convert it with gen_batch_jsonl.py first"
    return "not JSONL; is this the request file that gen_batch_jsonl.py wrote?"


class PartDivider:
    """Divides lines into parts within the limits of a batch."""

    def __init__(self, max_requests: int = MAX_BATCH_REQUESTS, max_bytes: int = MAX_BATCH_BYTES) -> None:
        self.size = 0
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._parts: list[Part] = []
        self._start_part()

    def _start_part(self) -> None:
        self._offset = self.size
        self._requests = 0
        self._hash = hashlib.sha256()

    def _end_part(self) -> None:
        first = self._parts[-1].first + self._parts[-1].requests if self._parts else 0
        size = self.size - self._offset
        self._parts.append(Part("", self._offset, size, first, self._requests, self._hash.hexdigest()))
        self._start_part()

    def add(self, line: bytes) -> None:
        is_full = self._requests == self._max_requests or self.size - self._offset + len(line) > self._max_bytes
        if is_full and self._requests:
            self._end_part()
        self.size += len(line)
        self._requests += 1
        self._hash.update(line)

    def parts(self) -> list[Part]:
        """The parts of all lines added."""
        if self._requests:
            self._end_part()
        return [part._replace(label=f"{n}/{len(self._parts)}") for n, part in enumerate(self._parts, 1)]


class RequestIndex(NamedTuple):
    """The requests of a file: the line number of each custom_id, and the sha256 of each line (32 bytes, in order)."""

    line_of: dict[str, int]
    digests: bytearray

    def digest(self, custom_id: str) -> bytes:
        end = 32 * self.line_of[custom_id]
        return bytes(self.digests[end - 32 : end])


def digest_of(line: bytes) -> bytes:
    """The sha256 of a request's line, without its line end."""
    return hashlib.sha256(line.removesuffix(b"\n")).digest()


class InputCheck:
    """Checks a request file as the API will, divides it into parts and indexes it, in one pass.

    `endpoint` is the first url that is a path, if none is given. The index has digests only with `hashes_lines`.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        max_requests: int = MAX_BATCH_REQUESTS,
        max_bytes: int = MAX_BATCH_BYTES,
        *,
        hashes_lines: bool = False,
    ) -> None:
        self.endpoint = endpoint or ""
        self.without_model = 0
        self.model: Any = None
        self.index = RequestIndex({}, bytearray())
        self.divider = PartDivider(max_requests, max_bytes)
        self._max_bytes = max_bytes
        self._hashes_lines = hashes_lines

    def problems(self, lines: Iterable[bytes]) -> Iterator[Problem]:
        number = 0
        for number, line in enumerate(lines, 1):
            self.divider.add(line)
            if self._hashes_lines:
                self.index.digests.extend(digest_of(line))
            if len(line) > self._max_bytes:
                message = f"{len(line)} bytes; the limit of a batch is {self._max_bytes}"
                yield Problem(number, "invalid_request", message)
            try:
                request = read_object(line, strict=True)
            except ValueError as error:
                if number == 1 and (guess := guess_content(line)):
                    yield Problem(1, "invalid_json_line", guess)
                    return
                yield Problem(number, "invalid_json_line", str(error))
            else:
                for code, message in self._add(number, request):
                    yield Problem(number, code, message)
        if not number:
            yield Problem(1, "empty_file", "the file has no requests")

    def _add(self, number: int, request: Json) -> list[tuple[str, str]]:
        """Note the custom_id, url and model of a request, and return the code and message of each of its problems."""
        found = []
        custom_id, method, url, body = map(request.get, ("custom_id", "method", "url", "body"))
        if custom_id is None:
            found.append(("missing_required_parameter", "custom_id is missing"))
        elif not isinstance(custom_id, str) or not custom_id:
            found.append(("invalid_request", "custom_id is not a non-empty string"))
        elif (first := self.index.line_of.setdefault(custom_id, number)) != number:
            found.append(("duplicate_custom_id", f"custom_id {quoted(custom_id)} was already used on line {first}"))
        if method != "POST":
            found.append(("invalid_request", f'method is {quoted(method)}, not "POST"'))
        if not self.endpoint and isinstance(url, str) and url.startswith("/") and url.isprintable():
            self.endpoint = url
        if not url or url != self.endpoint:
            endpoint = self.endpoint or "a path like /v1/responses"
            found.append(("url_mismatch", f"url is {quoted(url)}, not {endpoint[:80]}"))
        if not isinstance(body, dict):
            found.append(("invalid_request", "body is not a JSON object"))
            return found
        if body.get("stream") is True:
            found.append(("invalid_request", "body.stream is true; a batch cannot stream"))
        if (model := body.get("model")) is None:
            self.without_model += 1
        elif self.model is None:
            self.model = model
        elif model != self.model:
            message = f"model is {quoted(model)}, not {quoted(self.model)}; a batch has one model"
            found.append(("model_mismatch", message))
        return found


def check_input(requests: Input, check: InputCheck, console: Console) -> list[Part]:
    """Check a request file, and return its parts. If it has problems, print them and raise CommandError."""
    found = 0
    for problem in check.problems(requests.lines()):
        found += 1
        if found <= MAX_LISTED:
            console.message(str(problem))
    if found > MAX_LISTED:
        console.message(f"… and {found - MAX_LISTED} more")
    if found:
        raise CommandError(f"{requests.name}: {plural(found, 'error')}; correct the file; nothing was uploaded")
    if check.without_model:
        console.warn(f"{plural(check.without_model, 'request')} without body.model, which the Batch API refuses")
    requests.refuse_changes()
    return check.divider.parts()


def indexed_requests(requests: Input, index: RequestIndex) -> Iterator[Json]:
    """The requests of a file, each added to an index that is empty at first.

    Raises CommandError for a line that is not a request, or a custom_id used twice.
    """
    for number, line in enumerate(requests.lines(), 1):
        index.digests.extend(digest_of(line))
        try:
            request = read_object(line)
        except ValueError as error:
            raise CommandError(f"{requests.name} line {number}: {error}; --in must be the request file") from None
        custom_id = request.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            raise CommandError(f"{requests.name} line {number}: no custom_id; --in must be the request file")
        if index.line_of.setdefault(custom_id, number) != number:
            problem = f"custom_id {quoted(custom_id)} was used before; see validate"
            raise CommandError(f"{requests.name} line {number}: {problem}")
        yield request


def index_requests(requests: Input) -> RequestIndex:
    index = RequestIndex({}, bytearray())
    deque(indexed_requests(requests, index), maxlen=0)
    return index


def split_part(part: Part, requests: BinaryIO) -> list[Part]:
    """The two halves of a part of at least two requests. `requests` is the file that contains it."""
    divider = PartDivider(-(-part.requests // 2))
    requests.seek(part.offset)
    for line in itertools.islice(requests, part.requests):
        divider.add(line)
    return [
        half._replace(label=f"{part.label}.{n}", offset=part.offset + half.offset, first=part.first + half.first)
        for n, half in enumerate(divider.parts(), 1)
    ]


# ---- batches as the API describes them


class Counts(NamedTuple):
    """The request counts of a batch. Each is None if the API does not give it."""

    completed: int | None
    failed: int | None
    total: int | None


def is_id(value: Any) -> bool:
    return isinstance(value, str) and ID_PATTERN.fullmatch(value) is not None


def file_id_field(content: Json, name: str) -> str:
    """A file id of a Batch as it came; empty if null or missing. `Api.size_of` refuses a string that is not an id."""
    value = content.get(name) or ""
    if not isinstance(value, str):
        raise OutcomeUnknown(f"{name} of batch {content['id']} is not a file id: {quoted(value)}")
    return value


class Batch(NamedTuple):
    """A Batch object of the API. `raw` is the object as it came; only `id` and `status` are guaranteed."""

    id: str
    status: str  # lower case, `canceled` spelled `cancelled`; `raw` has the original
    created_at: int | None  # Unix seconds
    input_file_id: str
    output_file_id: str
    error_file_id: str
    counts: Counts
    input_tokens: int
    output_tokens: int
    metadata: dict[str, str]
    problems: list[Problem]
    raw: Json

    @classmethod
    def parse(cls, content: Any) -> Batch:
        """Raises OutcomeUnknown if the content is not a Batch."""
        if not isinstance(content, dict) or not is_id(content.get("id")) or not str_field(content, "status"):
            raise OutcomeUnknown(f"the response is not a batch: {shorten(to_json(content))}")
        status = content["status"].lower()
        counts, usage = child_object(content, "request_counts"), child_object(content, "usage")
        metadata = child_object(content, "metadata")
        problems = [
            Problem(int_field(error, "line"), str_field(error, "code"), shorten(str_field(error, "message")))
            for error in objects(child_object(content, "errors").get("data"))
        ]
        return cls(
            id=content["id"],
            status="cancelled" if status == "canceled" else status,
            created_at=int_field(content, "created_at"),
            input_file_id=file_id_field(content, "input_file_id"),
            output_file_id=file_id_field(content, "output_file_id"),
            error_file_id=file_id_field(content, "error_file_id"),
            counts=Counts(*(int_field(counts, name) for name in Counts._fields)),
            input_tokens=int_field(usage, "input_tokens") or 0,
            output_tokens=int_field(usage, "output_tokens") or 0,
            metadata={name: value for name, value in metadata.items() if isinstance(value, str)},
            problems=[problem for problem in problems if any(problem)],
            raw=content,
        )

    @property
    def age_key(self) -> tuple[int, str]:
        """Of two batches with the same requests, the one with the smaller key stays."""
        return self.created_at or 0, self.id

    @property
    def has_ended(self) -> bool:
        """Whether the status is terminal. An unknown one is not."""
        return self.status in TERMINAL_STATUSES

    @property
    def claims_successes(self) -> bool:
        """Whether it is completed with successes, so that there must be an output file."""
        return self.status == "completed" and bool(self.counts.completed)

    @property
    def may_have_success(self) -> bool:
        """Whether it has not ended, or may have a success by its counts and its output file."""
        completed, failed, total = self.counts
        none_succeeded = completed == 0 and bool(failed or total)
        has_output = bool(self.output_file_id) and not none_succeeded and self.status != "failed"
        return not self.has_ended or has_output or self.claims_successes

    @property
    def files(self) -> dict[str, str]:
        """The ids of the output file (`results`) and the error file (`errors`), if it has them."""
        files = {"results": self.output_file_id, "errors": self.error_file_id}
        return {kind: file_id for kind, file_id in files.items() if file_id}

    @property
    def is_over_token_limit(self) -> bool:
        return self.status == "failed" and any(problem.code == "token_limit_exceeded" for problem in self.problems)

    def failure_reasons(self) -> str:
        return "; ".join(map(str, self.problems[:MAX_LISTED])) or "no reason given"


def by_age(batches: Iterable[Batch]) -> list[Batch]:
    """The batches, oldest first."""
    return sorted(batches, key=lambda batch: batch.age_key)


def local_time(moment: int | None, separator: str = "T") -> str:
    """Unix seconds as local time; empty if there are none."""
    try:
        return datetime.datetime.fromtimestamp(moment).isoformat(separator, "seconds") if moment else ""
    except (OverflowError, OSError, ValueError):
        return ""


def status_lines(batch: Batch) -> Iterator[str]:
    """The lines that `status` prints for a batch. Those without a value are left out."""
    yield f"Status: {batch.raw['status']}"
    for name in ("created", "completed", "failed", "expired", "cancelled", *([] if batch.has_ended else ["expires"])):
        if moment := local_time(int_field(batch.raw, f"{name}_at")):
            yield f"{name.capitalize()}: {moment}"
    completed, failed, total = batch.counts
    if total:
        yield f"Requests: {completed or 0} completed, {failed or 0} failed of {total}"
    if batch.input_tokens or batch.output_tokens:
        yield f"Tokens: {batch.input_tokens} input, {batch.output_tokens} output"
    yield from map(str, batch.problems)


def batch_json(batch: Batch, saved: Mapping[str, str] | None = None) -> str:
    """The Batch object on one line as the API gave it, and the paths of its saved files."""
    try:
        return json.dumps({**batch.raw, **(saved or {})}, default=str)
    except RecursionError:
        raise CommandError(f"batch {batch.id} is nested too deeply to be printed as JSON") from None


# ---- responses of the API


def json_object(content: bytes) -> Json:
    """The JSON object of a response. Parsed here because the SDK returns a `str` if the content type is not JSON."""
    try:
        return read_object(content)
    except ValueError:
        text = shorten(content.decode(errors="replace"))
        raise NotJson(f"the response is not a JSON object: {text}" if text else "the response is empty") from None


def http_date(text: str) -> float | None:
    """An HTTP date as Unix seconds; None if it is not one."""
    from email.utils import parsedate_to_datetime  # takes a while to import

    try:
        return parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a response asks to wait, given as a number or as a date."""
    milliseconds, text = headers.get("retry-after-ms"), headers.get("retry-after", "")
    try:
        seconds = float(milliseconds) / 1000 if milliseconds else float(text)
    except ValueError:
        seconds = (http_date(text) or 0) - time.time()
    return seconds if 0 < seconds < math.inf else None


def error_fields(value: Any) -> tuple[str, str]:
    """Code and message of an error. It may be an object, nested objects as vLLM has them, or a plain string."""
    if isinstance(value, str):
        return "", value
    if not isinstance(value, dict):
        return "", "" if value is None else to_json(value)
    code, message = value.get("code") or value.get("type") or "", value.get("message") or value.get("detail") or ""
    if not message and value.get("error"):
        inner_code, message = error_fields(value["error"])
        code = inner_code or code
    return str(code), message if isinstance(message, str) else to_json(message)


def to_status_error(error: APIStatusError, operation: str, url: str) -> ApiError:
    """Map an HTTP error status to an ApiError: 408, 409 and 5xx (not 501) leave the outcome unknown; others refuse."""
    status = error.status_code
    body = error.body if isinstance(error.body, dict) else {}
    _, message = error_fields(error.body)
    text = message or error.response.text or error.response.reason_phrase
    is_about_endpoint = operation in ("UPLOAD", "LIST_BATCHES") or NO_SUCH_PATH.fullmatch(message)
    no_endpoint = status == 405 or (status == 404 and bool(is_about_endpoint))
    code = f" ({shorten(str(body['code']))})" if body.get("code") else ""
    advice = "; check OPENAI_API_KEY" if status == 401 else ""
    wait = retry_after(error.response.headers)
    if status == 429 and wait and wait > RATE_LIMIT_BUDGET:
        advice = f"; it asks to wait {math.ceil(wait / 60)} minutes"
    if 300 <= status < 400:
        text = "this redirect is not followed"
    if no_endpoint or 300 <= status < 400:
        advice = f"; is {url} the base URL of the API?"
    kind: type[ApiError] = NotFound if status == 404 else Refused
    if status in (408, 409) or (status >= 500 and status != 501):
        kind = OutcomeUnknown
    return kind(
        f"{operation}: HTTP {status}: {shorten(text)}{code}{advice}",
        status,
        (body.get("code"), body.get("type")),
        wait,
        no_endpoint=no_endpoint,
    )


def to_api_error(error: OpenAIError | ApiError | UnicodeError, operation: str, url: str) -> ApiError:
    """Translate an error of the SDK. Use the API's own words if it sent any."""
    import httpx2
    import openai

    if isinstance(error, NotJson):
        return OutcomeUnknown(f"{operation}: {error}; is {url} the base URL of the API?")
    if isinstance(error, ApiError):
        return error
    if isinstance(error, openai.APIStatusError):
        return to_status_error(error, operation, url)
    if isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout):
        return NotSent(f"cannot reach {url}: {error.__cause__}")
    if isinstance(error, openai.APITimeoutError):
        return OutcomeUnknown(f"{operation}: no response from {url} in time")
    if isinstance(error, UnicodeError):
        return OutcomeUnknown(f"{operation}: the response from {url} cannot be decoded: {error}")
    return OutcomeUnknown(f"{operation}: no response from {url}: {error.__cause__ or error}")


def is_rate_limit(failure: ApiError) -> bool:
    """Whether it is a rate limit. An exhausted quota also has status 429, but waiting does not help."""
    return failure.status == 429 and "insufficient_quota" not in failure.codes


class Retry:
    """Decides how long to wait before a call is tried again.

    A call gives up at the `tries`-th lost response, or once its pauses because of 429s exceed `rate_limit_budget`
    seconds. With an `outage_budget`, the pauses for both may add up to that many seconds instead. NotSent had no
    effect, so it is repeated even with `repeat_lost=False`. `repeat_denied` repeats a 401 or 403 twice.
    """

    def __init__(
        self,
        tries: int = MAX_TRIES,
        rate_limit_budget: float = RATE_LIMIT_BUDGET,
        outage_budget: float = 0,
        *,
        repeat_lost: bool = True,
        repeat_denied: bool = False,
    ) -> None:
        self._tries_left = tries
        self._seconds_left = outage_budget or rate_limit_budget
        self._outlives_outages = bool(outage_budget)
        self._repeat_lost = repeat_lost
        self._repeat_denied = repeat_denied or bool(outage_budget)
        self._failures = 0

    def pause_after(self, failure: ApiError) -> float | None:
        """Seconds to wait after a failure; None to give up."""
        self._failures += 1
        pause = max(failure.retry_after or 0, min(0.5 * 2.0 ** min(self._failures - 1, 10), MAX_PAUSE))
        is_lost = isinstance(failure, OutcomeUnknown)
        if is_lost and (failure.status == 409 or not (self._repeat_lost or isinstance(failure, NotSent))):
            return None  # a conflict would recur, and a lost request may have taken effect
        if is_rate_limit(failure) or (is_lost and self._outlives_outages and not isinstance(failure, WrongSize)):
            if self._outlives_outages:
                pause = min(pause, self._seconds_left)
            self._seconds_left -= pause
            return pause if pause and self._seconds_left >= 0 else None
        if is_lost:
            self._tries_left -= 1
            return min(pause, RATE_LIMIT_BUDGET) if self._tries_left > 0 else None
        is_denied = failure.status in (401, 403) and self._repeat_denied
        return pause if is_denied and self._failures < MAX_TRIES else None


# ---- the log


class Log:
    """Writes each event as one line, flushed immediately, without secrets.

    A line that cannot be written does not keep what was paid for from being used. `failure` says why; from then on, no
    request is made.
    """

    def __init__(self, file: TextIO, path: str) -> None:
        self.failure: CommandError | None = None
        self._file = file
        self._path = path

    def request(self, message: str) -> None:
        """Write a line about a request before it is made. Raises CommandError if a line could not be written."""
        self.info(message)
        if self.failure:
            raise self.failure

    def info(self, message: str, level: str = "INFO") -> None:
        moment = datetime.datetime.now().isoformat(" ", "milliseconds").replace(".", ",")
        try:
            with os_errors_as(f"write the log {self._path}", "; choose another with --log-file"):
                self._file.write(redact(f"{moment} {level} {message}") + "\n")
                self._file.flush()
        except CommandError as failure:
            self.failure = self.failure or failure

    def error(self, message: str) -> None:
        """Write a message and the stack of the exception that is being handled."""
        import traceback

        self.info(f"{message}\n{traceback.format_exc().rstrip()}", "ERROR")


@contextlib.contextmanager
def open_log(path: str | None) -> Iterator[Log]:
    """A log that only its owner can read. Requests cost money: without a log none is made.

    Raises CommandError if the log cannot be opened or, at the end, if it could not be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    if path is None:
        path = time.strftime("logs/batch_%Y%m%d_%H%M%S.log")
        flags |= os.O_NOFOLLOW  # the name is predictable, so somebody else may have put a link there
    with os_errors_as(f"open the log {path}", "; choose another with --log-file"):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        descriptor = os.open(path, flags, 0o600)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o600)
    file = open(descriptor, "w", encoding="utf-8", errors="backslashreplace")
    log = Log(file, path)
    try:
        yield log
    finally:
        with contextlib.suppress(OSError):  # `failure` has it
            file.close()
    if log.failure:
        raise log.failure


# ---- the API


class Page(NamedTuple):
    """One page of the listing of batches."""

    batches: list[Batch]
    has_more: bool | None  # None if the API does not say
    server_time: float  # Unix seconds, by the server's Date header; else by this machine's clock

    @classmethod
    def parse(cls, content: Json, headers: Mapping[str, str]) -> Page:
        data, has_more = content.get("data"), content.get("has_more")
        if not isinstance(data, list):
            raise OutcomeUnknown("the response is not a list of batches")
        date = http_date(headers.get("date", ""))
        return cls(
            [Batch.parse(item) for item in data],
            has_more if isinstance(has_more, bool) else None,
            time.time() if date is None else date,
        )


class FileInfo(NamedTuple):
    """A File object of the API. `size` is None if the API does not give it (no `bytes`, or 0)."""

    id: str
    size: int | None

    @classmethod
    def parse(cls, content: Json) -> FileInfo:
        if not is_id(content.get("id")):
            raise OutcomeUnknown(f"the response is not a file: {shorten(to_json(content))}")
        return cls(content["id"], int_field(content, "bytes") or None)


class Api(NamedTuple):
    """The API calls that the commands make. Each is logged, and repeated after a failure if that cannot cost anything.

    They raise Refused if the API refuses, and OutcomeUnknown if no try got a usable response. `outage_budget` is how
    many seconds a call keeps trying during an outage.
    """

    client: OpenAI
    url: str  # the base URL without a password, for messages
    log: Log
    console: Console
    clock: Clock
    verbose: bool
    outage_budget: float = 0

    def call_with_retries(
        self, operation: str, logged_as: Json, attempt: Callable[[], tuple[T, Any]], retry: Retry | None = None
    ) -> T:
        """Call `attempt`, which returns a result and the response to log, until it succeeds or `retry` gives up."""
        import openai

        retry = retry or Retry(outage_budget=self.outage_budget)
        while True:
            self.log.request(f"{operation} request {to_json(logged_as)}")
            try:
                result, response = attempt()
            except (openai.OpenAIError, ApiError, UnicodeError) as error:  # UnicodeError: an unknown charset
                failure = to_api_error(error, operation, self.url)
                self.log.error(f"{operation} error {failure}")
            else:
                self.log.info(f"{operation} response {to_json(response)}")
                if self.verbose:
                    self.console.message(f"{operation}: {to_json(response)}")
                return result
            pause = retry.pause_after(failure)
            if pause is None:
                raise failure
            if is_rate_limit(failure) or pause > QUIET_PAUSE_SECONDS:
                self.console.warn(f"{failure}; trying again in {math.ceil(pause)} s")
            self.clock.sleep(pause)

    def call_sdk(
        self,
        operation: str,
        parameters: Json,
        send: Callable[..., Any],
        parse: Callable[[Json], T],
        retry: Retry | None = None,
    ) -> T:
        """Call a raw-response method of the SDK, and parse the JSON object of its response."""

        def attempt() -> tuple[T, Json]:
            content = json_object(send(**parameters).content)
            return parse(content), content

        return self.call_with_retries(operation, parameters, attempt, retry)

    def upload(self, requests: Input, part: Part, name: str) -> str:
        """Upload a part, and return the id of its file. If the size is wrong, delete the file and upload again."""
        send = functools.partial(self.client.files.with_raw_response.create, timeout=UPLOAD_SECONDS)
        logged = {"file": name, **part._asdict()}

        def attempt() -> tuple[str, Json]:
            file = cast(BinaryIO, FilePart(requests.file, part.offset, part.size))
            content = json_object(send(file=(name, file), purpose="batch").content)
            uploaded = FileInfo.parse(content)
            if uploaded.size not in (None, part.size):
                self.delete_file(uploaded.id)
                raise WrongSize(f"file {uploaded.id} has {uploaded.size} bytes, but {part.size} were uploaded")
            return uploaded.id, content

        return self.call_with_retries("UPLOAD", logged, attempt)

    def create_batch(self, request: Json, before_post: Callable[[], None]) -> Batch:
        """Create a batch. Calls `before_post` before each POST.

        The POST is repeated only if it had no effect, because each one could be charged for.
        """

        def send(**parameters: Any) -> Any:
            before_post()  # each time: a rate limit may have been waited out meanwhile
            return self.client.batches.with_raw_response.create(**parameters)

        def parse(content: Json) -> Batch:
            batch = Batch.parse(content)
            if batch.input_file_id not in ("", request["input_file_id"]):
                raise OutcomeUnknown(f"the response is a batch of another file: {batch.id}")
            return batch

        retry = Retry(outage_budget=self.outage_budget, repeat_lost=False)
        return self.call_sdk("CREATE_BATCH", request, send, parse, retry)

    def batch(self, batch_id: str, retry: Retry | None = None) -> Batch:
        timeout = max(1, min(REQUEST_SECONDS, self.clock.seconds_left()))
        send = functools.partial(self.client.batches.with_raw_response.retrieve, timeout=timeout)
        return self._call_for_batch("GET_STATUS", batch_id, send, retry)

    def cancel(self, batch_id: str) -> Batch:
        return self._call_for_batch("CANCEL_BATCH", batch_id, self.client.batches.with_raw_response.cancel)

    def _call_for_batch(
        self, operation: str, batch_id: str, send: Callable[..., Any], retry: Retry | None = None
    ) -> Batch:
        def parse(content: Json) -> Batch:
            batch = Batch.parse(content)
            if batch.id != batch_id:
                raise OutcomeUnknown(f"the response is another batch: {batch.id}")
            return batch

        return self.call_sdk(operation, {"batch_id": batch_id}, send, parse, retry)

    def page(self, query: Json) -> Page:
        def attempt() -> tuple[Page, Json]:
            response = self.client.batches.with_raw_response.list(**query)
            content = json_object(response.content)
            return Page.parse(content, response.headers), content

        return self.call_with_retries("LIST_BATCHES", query, attempt)

    def pages(self, page_size: int = PAGE_SIZE) -> Iterator[Page]:
        """All pages, newest batches first. Raises IncompleteListing if the listing repeats itself or does not end."""
        seen: set[str] = set()
        query: Json = {"limit": page_size}
        for _ in range(MAX_PAGES):
            page = self.page(query)
            ids = {batch.id for batch in page.batches}
            is_new = not ids <= seen
            # without `has_more`, a short page with nothing new is the end
            is_last = page.has_more is False or (page.has_more is None and not is_new and len(ids) < page_size)
            if not is_new and not is_last:
                raise IncompleteListing("the server repeats a page of its listing of batches")
            yield page
            if is_last:
                return
            seen |= ids
            query = {"limit": page_size, "after": page.batches[-1].id}
        raise IncompleteListing(f"the server's listing of batches has more than {MAX_PAGES} pages")

    def recent_batches(self) -> list[Batch]:
        """The batches of the last 30 days, by the server's clock. Raises IncompleteListing rather than omit one."""
        found: dict[str, Batch] = {}
        old_pages = 0
        for page in self.pages():
            oldest = page.server_time - FILE_LIFETIME_SECONDS
            recent = [batch for batch in page.batches if (batch.created_at or oldest) >= oldest]
            found.update((batch.id, batch) for batch in recent)
            old_pages = 0 if recent else old_pages + (len(page.batches) >= PAGE_SIZE)
            if old_pages >= MAX_OLD_PAGES:
                break
        return list(found.values())

    def size_of(self, file_id: str) -> int | None:
        """The size of a file in bytes: 0 if it is empty, None if the API does not give it.

        Raises NotFound if the file is gone.
        """
        if not is_id(file_id):
            raise Refused(f"not the id of a file: {quoted(file_id)}")
        send = self.client.files.with_raw_response.retrieve
        size = None
        try:
            size = self.call_sdk("DOWNLOAD_RESULTS", {"file_id": file_id}, send, FileInfo.parse).size
        except Refused as failure:
            if failure.status not in (404, 405, 501):  # a service may lack this endpoint
                raise
        return size or (None if self._has_content(file_id) else 0)

    def _has_content(self, file_id: str) -> bool:
        """Whether the file has any bytes. Used if the API does not give its size."""

        def attempt() -> tuple[bool, Json]:
            has_content = any(self._stream(file_id))
            return has_content, {"empty": not has_content}

        return self.call_with_retries("DOWNLOAD_RESULTS", {"file_id": file_id, "range": "first bytes"}, attempt)

    def _stream(self, file_id: str) -> Iterator[bytes]:
        import httpx2

        try:
            with self.client.files.with_streaming_response.content(file_id) as response:
                yield from response.iter_bytes(CHUNK_BYTES)
        except httpx2.HTTPError as error:
            why = str(error) or type(error).__name__
            raise OutcomeUnknown(f"download of {file_id} from {self.url} was interrupted: {why}") from error

    def download(self, file_id: str, size: int | None, out: BinaryIO, name: str) -> int:
        """Append the file to `out`, and return its size.

        If `size` is unknown, check that the last line is a JSON object.
        """
        start = out.tell()

        def attempt() -> tuple[int, Json]:
            out.seek(start)
            out.truncate()
            received = 0
            for chunk in self._stream(file_id):
                out.write(chunk)
                received += len(chunk)
            if size is not None and received != size:
                raise WrongSize(f"download of {file_id} was cut off ({received} of {size} bytes)")
            if size is None and received and not ends_with_an_object(out, start):
                raise WrongSize(f"download of {file_id} was cut off (its last line is not a JSON object)")
            return received, {"path": name, "bytes": received}

        return self.call_with_retries("DOWNLOAD_RESULTS", {"file_id": file_id, "path": name}, attempt)

    def delete_file(self, file_id: str) -> bool:
        """Delete a file. Return False, with a warning, if it may still be there."""
        try:
            self.call_sdk("DELETE_FILE", {"file_id": file_id}, self.client.files.with_raw_response.delete, dict)
        except ApiError as failure:
            if not isinstance(failure, NotFound) or failure.no_endpoint:
                self.console.warn(f"file {file_id} was not deleted: {failure}")
                return False
        return True

    def check_model(self, model: Any) -> None:
        """Raise CommandError if the model does not exist. Warn if it was shut down or will be soon."""
        if not isinstance(model, str) or model in ("", ".", ".."):  # the SDK refuses to build a path of these
            return
        send = functools.partial(self.client.models.with_raw_response.retrieve, timeout=MODEL_SECONDS)
        try:
            content = self.call_sdk("GET_MODEL", {"model": model}, send, dict, Retry(tries=1, rate_limit_budget=0))
        except ApiError as failure:
            if failure.status == 404 and "model_not_found" in failure.codes:
                advice = "choose another --model in gen_batch_jsonl.py; nothing was sent"
                raise CommandError(f"the model {quoted(model)} does not exist at {self.url}; {advice}") from None
            return
        with contextlib.suppress(ValueError):
            shutdown = datetime.date.fromisoformat(str_field(content, "shutdown_date")[:10])
            today = datetime.date.today()
            if shutdown <= today + datetime.timedelta(days=SHUTDOWN_WARNING_DAYS):
                when = f"{'was' if shutdown < today else 'will be'} shut down on {shutdown}"
                self.console.warn(f"the model {quoted(model)} {when}; choose a newer one")

    def send_now(self, url: str, body: Json) -> Json:
        """Send one request to its endpoint, not as a batch, and return the `response` of its results line.

        It is repeated only if it was not carried out.
        """
        import httpx2
        import openai

        def attempt() -> tuple[Json, Json]:
            try:
                response = self.client.post(
                    url.removeprefix("/v1"),
                    cast_to=httpx2.Response,
                    content=json.dumps(body, separators=(",", ":")).encode(),
                    options={"timeout": ANSWER_SECONDS, "headers": {"Content-Type": "application/json"}},
                )
            except openai.APIStatusError as error:
                if error.status_code not in (400, 413, 422) or not isinstance(error.body, dict):
                    raise
                response = error.response  # only this request was refused
            field = {
                "status_code": response.status_code,
                "request_id": response.headers.get("x-request-id"),
                "body": json_object(response.content),
            }
            return field, field

        return self.call_with_retries("PREVIEW", {"url": url, "body": body}, attempt, Retry(repeat_lost=False))


def header_value(name: str) -> str:
    """An environment variable that is sent in a header, without the blanks around it."""
    value = os.environ.get(name, "").strip()
    if not value.isascii() or not value.isprintable():
        raise CommandError(f"{name} contains control or non-ASCII characters; set it again")
    return value


def api_key() -> str:
    key = header_value("OPENAI_API_KEY")
    if not key:
        raise CommandError("OPENAI_API_KEY is not set; export it with the key of your OpenAI project")
    return key


def base_url() -> str:
    from urllib.parse import urlsplit

    url = os.environ.get("OPENAI_BASE_URL", "").strip() or DEFAULT_BASE_URL
    try:
        parts = urlsplit(url)
        usable = re.fullmatch("(?i:https?)://[!-~]+", url) and parts.port != 0 and (parts.hostname or "").encode("idna")
    except ValueError:
        usable = False
    if not usable:
        raise CommandError("OPENAI_BASE_URL is not a URL like https://api.openai.com/v1; set it again or unset it")
    return url


def without_password(url: str) -> str:
    return re.sub("^([a-z]+://)[^/?#]*@", r"\1", url)


def refuse_foreign_redirect(response: httpx2.Response) -> None:
    """Remove the location of a redirect to another scheme, host or port, so that the client reports an error."""
    import httpx2

    try:
        target = response.url.join(response.headers.get("location", ""))
        is_foreign = (target.scheme, target.host, target.port) != (
            response.url.scheme, response.url.host, response.url.port
        )
    except (httpx2.InvalidURL, ValueError):
        is_foreign = True
    if is_foreign:
        del response.headers["location"]


@contextlib.contextmanager
def holding_signals() -> Iterator[None]:
    """Delay signals until the block ends. An interpreter callback in it would swallow the exception that they raise."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def connect(args: argparse.Namespace, console: Console, clock: Clock) -> Iterator[Api]:
    """Open the log and a client for the service that the environment names. Sends nothing yet."""
    key, url = api_key(), base_url()
    organization, project = header_value("OPENAI_ORG_ID") or None, header_value("OPENAI_PROJECT_ID") or None
    with open_log(args.log_file) as log:
        log.info(f"START {to_json([PROG, *args.argv])}")
        try:
            with holding_signals():
                import httpx2
                import openai
        except ImportError as error:
            advice = "pip install -r requirements.txt, or use the Python of a virtual environment that has it"
            raise CommandError(f"the openai package cannot be imported ({error}); {advice}") from None
        try:
            http = openai.DefaultHttpxClient(event_hooks={"response": [refuse_foreign_redirect]})
            client = openai.OpenAI(api_key=key, organization=organization, project=project, base_url=url,
                                   max_retries=0, timeout=REQUEST_SECONDS, http_client=http)
        except (httpx2.InvalidURL, ValueError, ImportError, OSError) as error:  # unusable proxy or certificate settings
            advice = "check the proxy and certificate variables"
            raise CommandError(f"cannot set up the API client: {error}; {advice}") from None
        with client:
            yield Api(client, without_password(str(client.base_url)), log, console, clock, args.verbose)


# ---- results lines

SUCCEEDED, REJECTED, RETRYABLE, MISSING, OUTDATED = "succeeded", "rejected", "retryable", "missing", "outdated"
TO_SEND = frozenset({RETRYABLE, MISSING, OUTDATED})


class Outcome(NamedTuple):
    """How a request ended, according to its results line, and why."""

    kind: str  # SUCCEEDED, REJECTED, RETRYABLE, MISSING or OUTDATED
    code: str = ""
    message: str = ""

    def error(self) -> str:
        return ": ".join(filter(None, (self.code, self.message)))


SUCCESS = Outcome(SUCCEEDED)


def body_of(result: Json) -> Any:
    """The body of the response, decoded if the service wrote it as a JSON string; None if there is none."""
    response = result.get("response")
    body = response.get("body") if isinstance(response, dict) else None
    if isinstance(body, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(body)
    return body


def chat_text(content: Any) -> str:
    """The content of a chat message, which is a string or a list of parts."""
    return content if isinstance(content, str) else "".join(str(part.get("text") or "") for part in objects(content))


def response_text(body: Any) -> tuple[str, str]:
    """The text and the refusal in the body of a Response or a chat completion. Each may be empty."""
    if not isinstance(body, dict):
        return "", ""
    if "output" in body:
        text = refusal = ""
        for item in objects(body["output"]):
            for part in objects(item.get("content")) if item.get("type") == "message" else ():
                if part.get("type") == "output_text":
                    text += str(part.get("text") or "")
                elif part.get("type") == "refusal":
                    refusal += str(part.get("refusal") or "")
        return text, refusal
    choice = next(iter(objects(body.get("choices"))), {})
    message = child_object(choice, "message")
    return chat_text(message.get("content")), str(message.get("refusal") or "")


def classify_text(body: Json) -> Outcome:
    """The outcome of a complete Response or chat completion, judged by its text."""
    text, refusal = response_text(body)
    choice = next(iter(objects(body.get("choices"))), {})  # as in response_text
    if (finish_reason := choice.get("finish_reason")) in ("length", "content_filter"):
        return Outcome(REJECTED, "incomplete", finish_reason)
    if refusal:
        return Outcome(REJECTED, "refusal", refusal)
    return SUCCESS if text.strip() else Outcome(REJECTED, "no_text")


def classify_body(body: Any, top_error: Any) -> Outcome:
    """The outcome of a response with HTTP 200.

    A body that is not understood is rejected rather than sent again, as it may have been paid for.
    """
    if not isinstance(body, dict):
        return Outcome(REJECTED, "not_understood", error_fields(top_error)[1] or f"body is {quoted(body)}")
    error = body.get("error") if body.get("error") is not None else top_error
    status = body.get("status")
    if status in ("failed", "cancelled"):
        code, message = error_fields(error)
        return Outcome(RETRYABLE, code or status, message)
    if status == "incomplete":
        return Outcome(REJECTED, "incomplete", str(child_object(body, "incomplete_details").get("reason") or ""))
    if error is not None:
        code, message = error_fields(error)
        return Outcome(REJECTED, code or "error", message)
    if status not in (None, "completed"):
        return Outcome(REJECTED, "not_understood", f"status is {quoted(status)}")
    return classify_text(body) if "output" in body or "choices" in body else SUCCESS


def classify(result: Json) -> Outcome:
    """How the request of a results line ended. `run`, `retry`, `export` and `preview` all use this."""
    response, top_error = result.get("response"), result.get("error")
    if not isinstance(response, dict):
        code, message = error_fields(top_error)
        return Outcome(MISSING if code == MISSING else RETRYABLE, code or "no_response", message)
    status, body = response.get("status_code"), body_of(result)
    if status == 200:
        return classify_body(body, top_error)
    is_refusal = isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 429)
    inner = (body.get("error") or body) if isinstance(body, dict) else body
    code, message = error_fields(inner or top_error)
    return Outcome(REJECTED if is_refusal else RETRYABLE, code or f"http_{status}", message)


def token_count(usage: Json, name: str, chat_name: str) -> int | None:
    value = usage[name] if name in usage else usage.get(chat_name)
    return value if type(value) is int and 0 <= value < 10**15 else None


def token_usage(body: Any) -> tuple[int | None, int | None]:
    """Input and output tokens of a response; None if it does not say."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None, None
    return token_count(usage, "input_tokens", "prompt_tokens"), token_count(usage, "output_tokens", "completion_tokens")


def ranked(counts: Counter[str], shown_as: Callable[[str], str] = str) -> str:
    """The five most common texts, each with its count."""
    return "; ".join(f"{number} × {shown_as(text)}" for text, number in counts.most_common(5))


class ResultsLine(NamedTuple):
    """A results line: the outcome, and where its bytes are."""

    outcome: str
    code: str
    file: BinaryIO
    offset: int
    size: int

    def read(self) -> bytes:
        """The line without its line end."""
        return os.pread(self.file.fileno(), self.size, self.offset).rstrip()


class OtherLine(NamedTuple):
    """A success of a request that is not in the request file.

    `sha256` is the hash of that request, `unknown` if its batch did not send it, or empty if the line does not say.
    """

    line: ResultsLine
    sha256: str


def lines_with_offsets(file: BinaryIO, name: str, start: int) -> Iterator[tuple[int, int, bytes]]:
    """The lines of a file from the offset `start` on, each with its number and its offset."""
    offset = start
    with os_errors_as(f"read {name}"):
        file.seek(start)
        for number, line in enumerate(file, 1):
            yield number, offset, line
            offset += len(line)


class Results:
    """The best results line of every request.

    A success wins, then the last line of this request, then a line of another version of it. The lines stay in their
    files, which must stay open.
    """

    def __init__(self, requests: RequestIndex, console: Console) -> None:
        self.requests = requests
        self.best: list[ResultsLine | None] = [None] * len(requests.line_of)  # in request order
        self.others: list[OtherLine] = []  # successes of other requests that the output keeps
        self.of_other_requests = 0  # successes of other requests, whether kept or not
        self.unmatched = 0  # those of which nothing tells the request
        self.ignored = 0  # lines that are not results of any request
        self.input_tokens = 0  # of several lines with the same outcome only the first counts: they may be one
        self.output_tokens = 0
        self._examples: dict[str, str] = {}  # a message for each error code
        self._console = console

    def read(
        self,
        file: BinaryIO,
        name: str,
        start: int = 0,
        sent_digests: Mapping[str, bytes] | None = None,
        *,
        is_own: bool = False,
    ) -> None:
        """Index the lines of a file from `start` on.

        `sent_digests` has the digest of each request as it was sent, by custom_id, if it may differ from the request
        file. A line that `add` refuses draws a warning or, in the file that `run` wrote before (`is_own`), raises
        CommandError.
        """
        keep_others = is_own or sent_digests is not None
        for number, offset, line in lines_with_offsets(file, name, start):
            try:
                self.add(read_object(line), (file, offset, len(line)), sent_digests, keep_others=keep_others)
            except ValueError as error:
                if is_own:
                    advice = "it holds something other than results, so it was left as it is; choose another --out"
                    raise CommandError(f"{name} line {number}: {error}; {advice}") from None
                self.ignored += 1
                if self.ignored <= MAX_LISTED:
                    self._console.warn(f"{name} line {number}: {error}; line ignored")

    def add(
        self,
        result: Json,
        place: tuple[BinaryIO, int, int],
        sent_digests: Mapping[str, bytes] | None = None,
        *,
        keep_others: bool = False,
    ) -> None:
        """Index a results line.

        Raises ValueError if it is not one or, without `keep_others`, if the request file has no such custom_id.
        """
        custom_id = result.get("custom_id")
        if not isinstance(custom_id, str):
            raise ValueError("not a results line (no custom_id)")
        if not ("response" in result or "error" in result):
            raise ValueError("not a results line (no response and no error)")
        sha256 = str_field(result, "request_sha256")
        if not sha256 and sent_digests is not None:
            sha256 = sent_digests.get(custom_id, b"").hex() or "unknown"  # never a result of this file
        outcome = classify(result)
        line = ResultsLine(outcome.kind, outcome.code and sys.intern(outcome.code[:80]), *place)
        position = self.requests.line_of.get(custom_id, 0) - 1
        if position >= 0 and (not sha256 or sha256 == self.requests.digest(custom_id).hex()):
            self._add_current(position, line, outcome, token_usage(body_of(result)))
            return
        if outcome.kind == SUCCEEDED:
            self.of_other_requests += 1
            self.unmatched += position < 0 and not sha256
            if keep_others:
                self.others.append(OtherLine(line, sha256))
        if position >= 0 and self.best[position] is None:
            self.best[position] = line._replace(outcome=OUTDATED, code="")
        if position < 0 and not sha256 and not keep_others:
            raise ValueError(f"custom_id {quoted(custom_id)} is not in the request file")

    def _add_current(
        self, position: int, line: ResultsLine, outcome: Outcome, tokens: tuple[int | None, int | None]
    ) -> None:
        known = self.best[position]
        if outcome.kind == MISSING or (known and known.outcome == SUCCEEDED and outcome.kind != SUCCEEDED):
            return
        if known is None or known.outcome != outcome.kind:  # otherwise it may be the same line, from a second file
            self.input_tokens += tokens[0] or 0
            self.output_tokens += tokens[1] or 0
        self.best[position] = line
        if line.code and not self._examples.get(line.code):
            self._examples[line.code] = shorten(outcome.message)

    def fall_back_on(self, earlier: Results) -> None:
        """For requests without a success, take one from the earlier results. Keep their lines of other requests too."""
        for position, line in enumerate(earlier.best):
            known = self.best[position]
            if line and line.outcome == SUCCEEDED and (known is None or known.outcome != SUCCEEDED):
                self.best[position] = line
        self.others += earlier.others

    def outcome_at(self, position: int) -> str:
        line = self.best[position]
        return line.outcome if line else MISSING

    def outcomes(self) -> Counter[str]:
        return Counter(line.outcome if line else MISSING for line in self.best)

    def positions(self, wanted: Iterable[str]) -> set[int]:
        """The positions of the requests with one of the wanted outcomes."""
        return {position for position in range(len(self.best)) if self.outcome_at(position) in wanted}

    def most_common_errors(self) -> str:
        """The five most common error codes, each with its count and an example of its message."""
        codes = Counter(line.code for line in self.best if line and line.code)
        return ranked(codes, lambda code: ": ".join(filter(None, (code, self._examples[code]))))

    def summary(self) -> str:
        """The totals, worded the same for every command."""
        outcomes = self.outcomes()
        kinds = [SUCCEEDED, REJECTED, RETRYABLE, MISSING, *([OUTDATED] if outcomes[OUTDATED] else [])]
        counted = ", ".join(f"{outcomes[kind]} {kind}" for kind in kinds)
        text = f"{counted} of {plural(len(self.best), 'request')}"
        if self.input_tokens or self.output_tokens:
            text += f"; tokens: {self.input_tokens} input, {self.output_tokens} output"
        if self.of_other_requests:
            text += f"; {plural(self.of_other_requests, 'result')} of other requests"
        if self.ignored:
            text += f"; {plural(self.ignored, 'results line')} ignored"
        return text


def report_results(prefix: str, results: Results, console: Console) -> None:
    console.message(f"{prefix}{results.summary()}")
    if errors := results.most_common_errors():
        console.message(f"most common errors: {errors}")


def wrote_prefix(path: str) -> str:
    return "Wrote to stdout: " if path == STDOUT else f"Wrote {path}: "


def with_request_sha256(line: bytes, sha256: str) -> bytes:
    """A results line as `run` writes it: with the sha256 of its request as the last key, and a line end."""
    if not sha256 or re.search(rb'"request_sha256":\s*"[^"\\]+"\s*\}$', line):
        return line + b"\n"
    return line[:-1].rstrip() + f', "request_sha256": "{sha256}"}}\n'.encode()


def missing_line(custom_id: str) -> bytes:
    error = {"code": MISSING, "message": "the request is in no output or error file of its batches"}
    line = to_json({"id": None, "custom_id": custom_id, "response": None, "error": error})
    return line.encode(errors="backslashreplace") + b"\n"


def result_lines(results: Results) -> Iterator[bytes]:
    """The lines of `run`'s output: one for each request in request order, then the successes of other requests."""
    index = results.requests
    for custom_id, line in zip(index.line_of, results.best, strict=True):
        if line is None or line.outcome == OUTDATED:
            yield missing_line(custom_id)
        else:
            yield with_request_sha256(line.read(), index.digest(custom_id).hex())
    seen: set[bytes] = set()
    for other in results.others:
        content = with_request_sha256(other.line.read(), other.sha256)
        digest = hashlib.sha256(content).digest()
        if digest not in seen:  # the same line may have been read from two files
            seen.add(digest)
            yield content


def out_stamp(path: str) -> tuple[int, int, int] | None:
    """Changes whenever the file is replaced or written to. None if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_out(path: str | None, results: Results, stack: contextlib.ExitStack) -> None:
    """Index the existing --out file, if any. It stays open in `stack`."""
    if path and not is_stream(path) and os.path.exists(path):
        with os_errors_as(f"read {path}"):
            file = stack.enter_context(open(path, "rb"))
        results.read(file, path, is_own=True)


# ---- bios

BIO_COLUMNS = ("artist_id", "artist_name", "bio", "error", "input_tokens", "output_tokens")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # Excel treats a cell that begins with one of these as a formula


class Bio(NamedTuple):
    """The exported fields of a request. Unknown token counts are empty."""

    text: str = ""
    error: str = ""
    input_tokens: str = ""
    output_tokens: str = ""


def artist_name(request: Json) -> str:
    """The name that the converter put into a request: in the prompt's variables, or in the metadata."""
    body = child_object(request, "body")
    for holder in (child_object(child_object(body, "prompt"), "variables"), child_object(body, "metadata")):
        if isinstance(name := holder.get("artist_name"), str):
            return name
    return ""


def bio_of(line: ResultsLine | None, result: Json | None = None) -> Bio:
    """The bio of a request from its results line. `result` is that line decoded, if the caller has it."""
    if line is None or line.outcome == OUTDATED:
        return Bio(error=MISSING if line is None else OUTDATED)
    result = result or read_object(line.read())
    body = body_of(result)
    error = "" if line.outcome == SUCCEEDED else classify(result).error()
    tokens = ("" if count is None else str(count) for count in token_usage(body))
    return Bio(response_text(body)[0], error, *tokens)


def csv_field(field: str) -> str:
    if "," in field or '"' in field or "\n" in field or "\r" in field:
        return '"' + field.replace('"', '""') + '"'
    return field


def csv_line(fields: Iterable[str]) -> bytes:
    """The fields as csv.writer writes them, in a quarter of the time. A lone surrogate becomes a question mark."""
    return (",".join(map(csv_field, fields)) + "\r\n").encode(errors="replace")


def excel_line(fields: Iterable[str]) -> bytes:
    """Like csv_line, with a `'` before each cell that Excel would treat as a formula."""
    return csv_line("'" + field if field.startswith(FORMULA_STARTS) else field for field in fields)


# ---- submitting


class Note:
    """A record, on this machine, of the files uploaded from one request file and of their batches.

    A file is noted before its POST, its batch after it. The server has the final say; the note only covers what the
    listing does not show yet. It may be deleted at any time.
    """

    def __init__(self, console: Console, file: BinaryIO | None = None, others: Sequence[str] = ()) -> None:
        self._console = console
        self._file = file
        self.others = others  # paths of the notes of other request files at the same service
        self.names: set[str] = set()  # of the request file
        self.sha256_of: dict[str, str] = {}  # of the part, by file id
        self.batches_of: dict[str, list[str]] = {}  # ids by file id; several if the token limit was hit
        self._posted: set[str] = set()  # files whose last POST has no outcome yet
        *lines, cut_line = (file.read() if file else b"").split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # a crash may have cut a line short
                self._apply(read_object(line))
        if file and cut_line:
            with contextlib.suppress(OSError):
                file.write(b"\n")

    def _apply(self, entry: Json) -> None:
        file_id, batch_id = str_field(entry, "file"), entry.get("batch")
        if not is_id(file_id):
            return
        self.names.add(str_field(entry, "name"))
        self.sha256_of.setdefault(file_id, str_field(entry, "sha256"))
        batches = self.batches_of.setdefault(file_id, [])
        if not isinstance(batch_id, str):
            self._posted.add(file_id)
            return
        self._posted.discard(file_id)
        if is_id(batch_id) and batch_id not in batches:
            batches.append(batch_id)

    def add(self, file_id: str, **fields: str) -> None:
        """Note the `sha256` and the `name` of an uploaded file before each POST of it, or its `batch` afterwards.

        An empty `batch` means that the file can no longer become a batch. The line is on disk when this returns. If it
        cannot be written, warn: a full disk must not stop the command.
        """
        entry = {"file": file_id, **fields}
        self._apply(entry)
        try:
            if self._file:
                self._file.write(to_json(entry).encode(errors="replace") + b"\n")
                os.fsync(self._file.fileno())
        except OSError as error:
            self._console.warn(f"cannot write the note of what was submitted: {error.strerror}")

    def assume_resolved(self) -> None:
        """Treat every POST as finished; the process that made it takes care of it."""
        self._posted.clear()

    def batch_ids(self) -> set[str]:
        return {*itertools.chain.from_iterable(self.batches_of.values())}

    def unresolved(self) -> list[str]:
        """Uploaded files whose POST may still be on its way."""
        return [file_id for file_id in self.sha256_of if file_id in self._posted]


def remove_old_notes(directory: str) -> None:
    for entry in os.scandir(directory):
        with contextlib.suppress(FileNotFoundError):  # another process may have removed it
            if entry.is_file() and time.time() - entry.stat().st_mtime > FILE_LIFETIME_SECONDS:
                os.unlink(entry.path)


def open_note_file(path: str) -> BinaryIO:
    """Open and lock a note. Raises BlockingIOError if another process has locked it."""
    while True:
        file = open(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise
        if os.fstat(file.fileno()).st_nlink:  # otherwise another process has just deleted it as an old one
            file.seek(0)
            return file
        file.close()


@contextlib.contextmanager
def locked_note(request_file_sha256: str, requests: Input, console: Console) -> Iterator[Note]:
    """Open and lock the note of a request file. The name depends on its bytes and the service, not on its path.

    Raises CommandError if another `create` or `run` is using the same bytes.
    """
    service = [os.environ.get(name, "").strip() for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID")]
    service[0] = (service[0] or DEFAULT_BASE_URL).rstrip("/")
    prefix = hashlib.sha256("\n".join(service).encode(errors="replace")).hexdigest()[:16]
    entry = f"{prefix}-{request_file_sha256}.jsonl"
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    directory = os.path.join(state, "batch_tool")
    with contextlib.ExitStack() as stack:
        file, others = None, []
        try:
            if not os.path.isabs(directory):
                raise OSError(errno.ENOENT, "it is not an absolute path")
            os.makedirs(directory, mode=0o700, exist_ok=True)
            remove_old_notes(directory)
            file = stack.enter_context(open_note_file(os.path.join(directory, entry)))
            os.utime(file.fileno())
            names = [name for name in os.listdir(directory) if name.startswith(prefix) and name != entry]
            others = [os.path.join(directory, name) for name in sorted(names)]
        except BlockingIOError:
            raise CommandError(f"{requests.name} is in use by another create or run; wait for it to finish") from None
        except OSError as error:
            console.warn(f"cannot lock a note in {directory}: {error.strerror}; until this command ends, do not start "
                         f"another create or run of {requests.name}")
        yield Note(console, file, others)


class AlreadySubmitted(CommandError):
    """Other batches of the same request file have shown up in the listing."""

    def __init__(self, batches: list[Batch]) -> None:
        names = ", ".join(batch.id for batch in batches)
        super().__init__(
            f"other batches already have requests of this file: {names}; nothing more was submitted; use their "
            "--max-requests, or use run, which takes their results and sends only the rest"
        )
        self.batches = batches


class Submitter:
    """Creates exactly one batch for each part of a request file, even if responses are lost.

    `known` has the ids of batches that need no further attention: those it created, and earlier ones already handled.
    With `finds_versions`, it also looks for batches of other versions of the file.
    """

    def __init__(
        self,
        api: Api,
        args: argparse.Namespace,
        request_file_sha256: str,
        check: InputCheck,
        note: Note,
        *,
        finds_versions: bool = False,
    ) -> None:
        self.api = api
        self.known: set[str] = set()
        self._name = "stdin" if args.input == STDIN else escape_controls(os.path.basename(args.input))
        self._endpoint = check.endpoint
        self._model = check.model
        self._window: str = args.completion_window
        self._force: bool = args.force
        self._request_file_sha256 = request_file_sha256
        self._note = note
        self._finds_versions = finds_versions
        self._files_of_versions: set[str] = set()  # from the notes of other versions
        self._is_metadata_checked = False

    # finding batches

    def part_sha256(self, batch: Batch) -> str:
        """The sha256 of the batch's input file; empty if it is unknown."""
        return batch.metadata.get("input_sha256") or self._note.sha256_of.get(batch.input_file_id, "")

    def is_of_file(self, batch: Batch, part_hashes: Container[str]) -> bool:
        """Whether the batch has requests of this request file: one of these parts, or a part of another division."""
        whole = self._request_file_sha256
        return (
            self.part_sha256(batch) in part_hashes
            or whole in (self.part_sha256(batch), batch.metadata.get("request_file_sha256"))
            or batch.input_file_id in self._note.sha256_of
        )

    def is_of_other_version(self, batch: Batch) -> bool:
        """Whether a batch that is not of this file is of one with the same name. False without `finds_versions`."""
        has_name = bool(batch.metadata.get("input_sha256")) and batch.metadata.get("input_file") == self._name[:512]
        return self._finds_versions and (has_name or batch.input_file_id in self._files_of_versions)

    def earlier_batches(self, listed: Iterable[Batch]) -> list[Batch]:
        """The batches of all request files that may have a success, listed ones and those only in notes, oldest first.

        Empty with --force.
        """
        if self._force:
            return []
        found = {batch.id: batch for batch in listed}
        noted = self._resolve(self._note, found)
        for path in self._note.others if self._finds_versions else ():
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                try:
                    other = Note(self.api.console, stack.enter_context(open_note_file(path)))
                except BlockingIOError:
                    other = Note(self.api.console, stack.enter_context(open(path, "rb")))
                    other.assume_resolved()
                if self._name in other.names:
                    self._files_of_versions |= other.sha256_of.keys()
                    noted |= self._resolve(other, found)
        self._add_unlisted(noted, found)
        return by_age(batch for batch in found.values() if batch.may_have_success)

    def _resolve(self, note: Note, found: dict[str, Batch]) -> set[str]:
        """Find out what became of each unresolved POST of a note, and return the ids of its batches.

        Adds the batches found to `found`.
        """
        for file_id in note.unresolved():
            self.api.console.message(f"file {file_id}: checking whether its batch was created")
            if batch := self._find_or_fence(file_id, set(note.batches_of[file_id])):
                found[batch.id] = batch
            note.add(file_id, batch=batch.id if batch else "")
        return note.batch_ids()

    def _add_unlisted(self, batch_ids: set[str], found: dict[str, Batch]) -> None:
        """Fetch the batches that are not listed yet, by id.

        A new batch may get a 404 for some seconds, so this is tried several times.
        """
        unlisted = batch_ids - found.keys()
        for delay in (0, *LOOK_UP_DELAYS):
            if unlisted:
                self.api.clock.sleep(delay)
            for batch in filter(None, map(self._batch_if_there, sorted(unlisted))):
                found[batch.id] = batch
            unlisted -= found.keys()

    def _batch_if_there(self, batch_id: str) -> Batch | None:
        try:
            return self.api.batch(batch_id)
        except NotFound:
            return None

    def new_batches(self, part_hashes: Container[str]) -> list[Batch]:
        """New batches of this request file, or of another version of it, that may have a success. Oldest first."""
        if self._force:
            return []
        return by_age(
            batch
            for batch in self.api.recent_batches()
            if batch.id not in self.known
            and batch.may_have_success
            and (self.is_of_file(batch, part_hashes) or self.is_of_other_version(batch))
        )

    # creating a batch

    def _upload(self, requests: Input, part: Part) -> str:
        """Upload a part, and return the id of its file. Checks the model before the first upload."""
        model, self._model = self._model, None
        self.api.check_model(model)
        file_id = self.api.upload(requests, part, self._name)
        if requests.is_changed():
            self.api.delete_file(file_id)
            requests.refuse_changes()
        return file_id

    def submit(
        self,
        requests: Input,
        part: Part,
        on_upload: Callable[[str], None],
        file_id: str = "",
        excluded: Sequence[str] = (),
    ) -> Batch:
        """Create a batch for the part. `on_upload` is called with the id of each uploaded file.

        `file_id` is an earlier upload to use, and `excluded` are its batches that failed. Raises AlreadySubmitted if
        another batch of this request file is listed, and CommandError if the API refuses or if it stays unknown whether
        a batch exists.
        """
        for _ in range(MAX_TRIES):
            if not file_id:
                file_id, excluded = self._upload(requests, part), ()
                try:
                    on_upload(file_id)
                except (CommandError, Exit):
                    self.api.delete_file(file_id)
                    raise
            batch = self._post_once(part, file_id, excluded)
            self._note.add(file_id, batch=batch.id if batch else "")
            if batch:
                self.known.add(batch.id)
                self._warn_without_metadata(batch, part)
                return batch
            self.api.console.message(f"part {part.label}: no batch was created for file {file_id}, "
                                     "so the file was deleted")
            last_file_id, file_id = file_id, ""
        raise CommandError(f"part {part.label}: no response to {MAX_TRIES} tries to create its batch (last file: "
                           f"{last_file_id}); run the same command again later")

    def _before_post(self, part: Part, file_id: str, excluded: Sequence[str]) -> None:
        """Check the listing for other batches, then note the file. If the POST must not be made, delete the file.

        A file whose earlier batches have failed stays, for the next try.
        """
        try:
            if new := self.new_batches([part.sha256]):
                raise AlreadySubmitted(new)
        except CommandError as error:
            self._note.add(file_id, batch="")
            if not excluded:
                self.api.delete_file(file_id)
            if isinstance(error, ApiError):  # about the listing; it must not look like an error of the POST
                raise CommandError(str(error)) from None
            raise
        self._note.add(file_id, sha256=part.sha256, name=self._name)

    def _post_once(self, part: Part, file_id: str, excluded: Sequence[str]) -> Batch | None:
        """Try once to create the batch. None if certainly none was created; the file is deleted then."""
        metadata = {"input_sha256": part.sha256, "input_file": self._name[:512], "part": part.label}
        if part.sha256 != self._request_file_sha256:
            metadata["request_file_sha256"] = self._request_file_sha256
        request = {
            "input_file_id": file_id,
            "endpoint": self._endpoint,
            "completion_window": self._window,
            "metadata": metadata,
        }
        try:
            return self._post_until_visible(request, lambda: self._before_post(part, file_id, excluded))
        except Refused:
            self._note.add(file_id, batch="")
            self.api.delete_file(file_id)
            raise
        except OutcomeUnknown as failure:
            self.api.console.warn(f"{failure}; checking whether the batch was created")
        return self._find_or_fence(file_id, set(excluded))

    def _post_until_visible(self, request: Json, before_post: Callable[[], None]) -> Batch:
        """POST. If the API does not find the new file yet, try again for some seconds."""
        for delay in LOOK_UP_DELAYS:
            try:
                return self.api.create_batch(request, before_post)
            except Refused as failure:
                if failure.status not in (400, 404) or request["input_file_id"] not in str(failure):
                    raise
            self.api.clock.sleep(delay)
        return self.api.create_batch(request, before_post)

    def _warn_without_metadata(self, batch: Batch, part: Part) -> None:
        if not self._is_metadata_checked and batch.metadata.get("input_sha256") != part.sha256:
            self.api.console.warn("this service keeps no metadata; only a note on this machine prevents the same "
                                  "requests from being submitted and paid for again")
        self._is_metadata_checked = True

    # when the outcome of a POST is unknown

    def _find_or_fence(self, file_id: str, excluded: set[str]) -> Batch | None:
        """Find the batch of a file whose POST has an unknown outcome.

        If there is none, fence the POST: delete the file, so that the POST fails if it takes effect later. Return None.
        """
        if batch := self._find_by_input_file(file_id, excluded, LOOK_UP_DELAYS):
            return batch
        if not self.api.delete_file(file_id):
            raise CommandError(self._in_doubt(file_id))
        batch = self._find_by_input_file(file_id, excluded, FENCED_LOOK_UP_DELAYS)
        while batch and batch.status == "validating":  # it may still fail because its file was deleted
            self.api.clock.sleep(SHORT_POLL_SECONDS)
            batch = self.api.batch(batch.id)
        return None if batch and batch.status == "failed" else batch

    @staticmethod
    def _in_doubt(file_id: str) -> str:
        return (f"cannot tell whether a batch was created for file {file_id}; run the same command again later, and it "
                "will pick up the batch if there is one (--force would pay again)")

    def _find_by_input_file(self, file_id: str, excluded: set[str], delays: Iterable[float]) -> Batch | None:
        """The oldest batch of a file, looked up repeatedly; None if there is none. Cancels any others.

        Raises CommandError if the last look-up failed.
        """
        is_answered = False
        for delay in delays:
            self.api.clock.sleep(delay)
            try:
                listed = self.api.recent_batches()
            except ApiError as failure:
                is_answered = False
                self.api.console.warn(str(failure))
                continue
            is_answered = True
            if batches := [each for each in listed if each.input_file_id == file_id and each.id not in excluded]:
                first, *rest = by_age(batches)
                for batch in rest:
                    self.cancel_duplicate(batch, first)
                return first
        if not is_answered:
            raise CommandError(self._in_doubt(file_id))
        return None

    def cancel_duplicate(self, batch: Batch, other: Batch) -> bool:
        """Cancel our batch, which duplicates `other`, unless it has already started. Whether it was cancelled."""
        self.api.console.warn(f"batch {batch.id} has the same requests as batch {other.id}")
        self.known.add(batch.id)
        if self.api.batch(batch.id).status != "validating":
            self.api.console.warn(f"batch {batch.id} has already started, so it was not cancelled")
            return False
        self.api.cancel(batch.id)
        self.api.console.message(f"batch {batch.id} is being cancelled")
        return True


def first_listing(api: Api, *, force: bool) -> list[Batch]:
    """The recent batches. This is the first call: if the API cannot be reached, the command ends at once.

    With `force`, a listing that cannot be used does not matter.
    """
    try:
        return api.recent_batches()
    except (ApiError, IncompleteListing) as failure:
        if not force or isinstance(failure, NotSent):
            raise
        return []


# ---- watching


def lacks_output(api: Api, batch: Batch) -> bool:
    """Whether a batch completed with successes but has no output file yet, or an empty one."""
    if not batch.claims_successes:
        return False
    try:
        return not batch.output_file_id or api.size_of(batch.output_file_id) == 0
    except Refused:  # it is gone, or cannot be had; the download will report that
        return False


@contextlib.contextmanager
def advice_if_stopped(advice: str, console: Console) -> Iterator[None]:
    """Say how to continue if a signal or --timeout stops the block."""
    try:
        yield
    except TimedOut:
        raise TimedOut(f"--timeout passed; {advice}") from None
    except Exit:
        console.message(advice)
        raise


class Polled(NamedTuple):
    """The result of polling, by batch id: batches that have ended, and errors of those that cannot be polled."""

    ended: dict[str, Batch]
    lost: dict[str, CommandError]


class Poller:
    """Polls batches. After the first response, it puts up with outages of up to `outage_budget` seconds.

    `latest` has the last known state of each batch, by id.
    """

    def __init__(
        self, api: Api, *, outage_budget: float = math.inf, is_answered: bool = False, repeat_denied: bool = False
    ) -> None:
        self.latest: dict[str, Batch] = {}
        self._api = api
        self._clock = api.clock
        self._started = api.clock.now()
        self._silent_since: float | None = None  # when an outage began
        self._is_answered = is_answered
        self._outage_budget = outage_budget
        self._repeat_denied = repeat_denied
        self._lacks_output_since: dict[str, float] = {}
        self._warned_statuses: set[str] = set()
        self._last_report = ""

    def poll(self, batch_ids: Iterable[str]) -> Polled:
        """Poll each batch once."""
        polled = Polled({}, {})
        for batch_id in batch_ids:
            try:
                batch = self._fetch(batch_id)
                if self._is_finished(batch):
                    polled.ended[batch_id] = batch
            except (OutputMissing, ApiError) as failure:
                if self._may_pass(failure):
                    self._api.console.warn(f"{batch_id}: {failure}; still waiting")
                else:
                    polled.lost[batch_id] = failure
        return polled

    def _may_pass(self, failure: CommandError) -> bool:
        """Note when an outage began, and return whether to keep waiting."""
        is_outage = isinstance(failure, OutcomeUnknown) or (isinstance(failure, ApiError) and is_rate_limit(failure))
        if self._silent_since is None:
            self._silent_since = self._clock.now()
        return is_outage and self._is_answered and self._clock.now() - self._silent_since <= self._outage_budget

    def _fetch(self, batch_id: str) -> Batch:
        """Fetch a batch, and remember that the API responded."""
        retry = Retry(1, 0, repeat_denied=self._repeat_denied) if self._is_answered else None
        batch = self._api.batch(batch_id, retry)
        self._is_answered = True
        self._silent_since = None
        self.latest[batch_id] = batch
        if batch.status not in KNOWN_STATUSES and batch.status not in self._warned_statuses:
            self._warned_statuses.add(batch.status)
            self._api.console.warn(f"{batch_id}: status {quoted(batch.raw['status'])} is not known; still waiting")
        return batch

    def _is_finished(self, batch: Batch) -> bool:
        """Whether it has ended and no longer lacks its output file, which may be late."""
        if not batch.has_ended:
            return False
        if not lacks_output(self._api, batch):
            return True
        since = self._lacks_output_since.setdefault(batch.id, self._clock.now())
        if self._clock.now() - since >= OUTPUT_DELAY_SECONDS:
            raise OutputMissing(
                f"batch {batch.id} has completed {batch.counts.completed} requests, but has no output file after "
                f"{OUTPUT_DELAY_SECONDS // 60} minutes; run the same command again later"
            )
        return False

    def report(self) -> None:
        """Print the progress of all batches: on a terminal every time, otherwise only after a change."""
        batches = self.latest.values()
        if not batches:
            return
        failed = sum(batch.counts.failed or 0 for batch in batches)
        total = sum(batch.counts.total or 0 for batch in batches)
        done = sum(batch.counts.completed or 0 for batch in batches) + failed
        statuses = Counter(batch.status for batch in batches)
        text = "batches: " + ", ".join(f"{number} {status}" for status, number in statuses.items())
        if total:
            text += f"; requests: {done}/{total} ({100 * done // total}%)"
        if failed:
            text += f", {failed} failed"
        if text != self._last_report or self._api.console.is_terminal:
            elapsed = datetime.timedelta(seconds=int(self._clock.now() - self._started))
            self._api.console.progress(f"{text}; {elapsed} elapsed")
        self._last_report = text


# ---- saving the files of a batch


def batch_paths(batch_id: str, out: str | None = None) -> dict[str, str]:
    """Where the output file (`results`) and the error file (`errors`) of a batch are saved."""
    paths = {"results": out or f"results_{batch_id}.jsonl", "errors": f"errors_{batch_id}.jsonl"}
    if out and not is_stream(out):
        root, extension = os.path.splitext(out)
        paths["errors"] = f"{root}.errors{extension}"
    return paths


def save_file(api: Api, file_id: str, path: str, *, skip_complete: bool) -> int:
    """Download a file to a path, and return its size. An empty file is not saved. A stream gets complete files only."""
    size = api.size_of(file_id)
    if size == 0:
        return 0
    if is_stream(path):
        with temporary_file() as copy:
            received = api.download(file_id, size, copy, shown(path))
            copy.seek(0)
            with open_output(path) as out:
                out.writelines(chunks(copy, "a temporary file"))
        return received
    if os.path.isfile(path):
        if skip_complete and os.path.getsize(path) == size:
            return size
        api.log.info(f"DOWNLOAD_RESULTS replaces {to_json(path)}")
    with open_output(path) as out:
        return api.download(file_id, size, out, path)


OUTPUT_GONE = ("its output file is no longer on the server; an earlier download may still have its results; "
               "run --force sends, and pays for, all requests of its file again")


class Saved(NamedTuple):
    """What was saved of a batch: the size of each file by `results` and `errors`, and why others were not saved."""

    sizes: dict[str, int]
    failures: list[CommandError]

    def report(self, paths: Mapping[str, str], show: Callable[[str], None]) -> None:
        """Show what was saved. Raises CommandError if something was not."""
        for kind, size in self.sizes.items():
            show(f"{kind.capitalize()} saved: {shown(paths[kind])} ({size} bytes)")
        if self.failures:
            raise CommandError("; ".join(map(str, self.failures)))


def save_files(api: Api, batch: Batch, paths: Mapping[str, str], *, skip_complete: bool = False) -> Saved:
    """Save the files of a batch. If the error file is gone, warn.

    Remove an old error file beside new results.
    """
    saved = Saved({}, [])
    lost = set()
    for kind, file_id in batch.files.items():
        try:
            if size := save_file(api, file_id, paths[kind], skip_complete=skip_complete):
                saved.sizes[kind] = size
        except NotFound:
            lost.add(kind)
            if kind == "results":
                saved.failures.append(CommandError(OUTPUT_GONE))
            else:
                api.console.warn(f"the error file of batch {batch.id} is no longer on the server")
        except CommandError as failure:
            lost.add(kind)
            saved.failures.append(failure)
    if "results" in saved.sizes and "errors" not in saved.sizes.keys() | lost:
        try:
            with os_errors_as(f"remove {paths['errors']}"), contextlib.suppress(FileNotFoundError):
                os.unlink(paths["errors"])
        except CommandError as failure:
            saved.failures.append(failure)
    return saved


# ---- commands, in the order a batch lives


def cmd_validate(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    check = InputCheck(args.endpoint)
    with open_input(args.input) as requests:
        parts = check_input(requests, check, console)
    counted = plural(len(check.index.line_of), "request")
    size, batches = plural(check.divider.size, "byte"), plural(len(parts), "batch", "batches")
    print_result(f"OK: {counted}, {size}, {batches}", console)
    return 0


# preview


class Usage(NamedTuple):
    """The tokens of one response. `body_bytes` is the size of its request's body."""

    body_bytes: int
    input_tokens: int
    output_tokens: int


def spread_evenly(count: int, total: int) -> set[int]:
    """`count` positions, or all if there are fewer, spread evenly over `total`."""
    count = min(count, total)
    return {(2 * number + 1) * total // (2 * count) for number in range(count)}


def body_size(request: Json) -> int:
    return len(to_json(request["body"]).encode(errors="replace"))


def read_samples(requests: Input, positions: set[int]) -> tuple[dict[int, Json], int]:
    """The requests at these positions, and the bytes of all bodies in the file."""
    samples, body_bytes = {}, 0
    for position, line in enumerate(requests.lines()):
        request = read_object(line)
        body_bytes += body_size(request)
        if position in positions:
            samples[position] = request
    return samples, body_bytes


def rounded(number: float) -> str:
    """The number with three significant digits, and commas between thousands."""
    digits = max(0, len(str(int(number))) - 3)
    return f"{round(number, -digits):,.0f}"


def estimate(usages: Sequence[Usage], body_bytes: int, total: int, prices: tuple[float, float] | None) -> str:
    """Estimate the tokens of all requests from a few. `prices` are dollars per million input and output tokens."""
    outputs = [usage.output_tokens for usage in usages]
    input_tokens = sum(usage.input_tokens for usage in usages) * body_bytes / sum(usage.body_bytes for usage in usages)
    output_tokens = sum(outputs) / len(outputs) * total
    spread = f"{rounded(min(outputs) * total)} to {rounded(max(outputs) * total)}"
    text = (
        f"{with_commas(total, 'request')}: about {rounded(input_tokens)} input and "
        f"{rounded(output_tokens)} ({spread}) output tokens, by {plural(len(usages), 'answer')}"
    )
    if prices:
        dollars = (input_tokens * prices[0] + output_tokens * prices[1]) / 1e6
        text += f"; about ${dollars:,.2f}" if dollars >= 0.01 else "; less than $0.01"
    return text


def append_line(path: str, line: bytes) -> None:
    """Append a line by replacing the file atomically."""
    with open_output(path) as out:
        if os.path.exists(path):
            with open(path, "rb") as old:
                out.writelines(chunks(old, path))
                if old.tell() and os.pread(old.fileno(), 1, old.tell() - 1) != b"\n":
                    out.write(b"\n")
        out.write(line)


@contextlib.contextmanager
def line_writer(path: str | None) -> Iterator[Callable[[bytes], object]]:
    """A function that adds a line to the file, or to the stream, immediately. Without a path, it does nothing."""
    if path is None:
        yield lambda line: None
    elif not is_stream(path):
        yield functools.partial(append_line, path)
    else:
        with open_output(path) as out:
            yield lambda line: (out.write(line), out.flush())


def preview_result(api: Api, request: Json) -> Json:
    """Send a request right away, and return its results line. It has no response if the outcome is unknown."""
    result: Json = {"id": None, "custom_id": request["custom_id"], "response": None, "error": None}
    try:
        return result | {"response": api.send_now(request["url"], request["body"])}
    except NotSent:
        raise
    except OutcomeUnknown as failure:
        return result | {"error": {"code": "outcome_unknown", "message": str(failure)}}


def preview_lines(request: Json, result: Json) -> Iterator[str]:
    """The custom_id and the artist's name, then the text of the response, or its error."""
    yield f"{request['custom_id']} {artist_name(request)}".rstrip()
    yield from response_text(body_of(result))[0].strip().splitlines()
    if (outcome := classify(result)).kind != SUCCEEDED:
        yield f"error: {outcome.error()}"


def preview(args: argparse.Namespace, api: Api, results: Results, samples: Mapping[int, Json]) -> Iterator[Json]:
    """Show the responses to the samples: those that --out has, and new ones. Yields their results lines."""
    show = result_printer(api.console, to_stderr=args.output == STDOUT)
    with line_writer(args.output) as write:
        for number, (position, request) in enumerate(samples.items()):
            line = results.best[position]
            is_new = line is None or line.outcome in TO_SEND
            result = preview_result(api, request) if line is None or is_new else read_object(line.read())
            try:
                if is_new and result["response"]:
                    content = to_json(result).encode(errors="backslashreplace")
                    write(with_request_sha256(content, results.requests.digest(request["custom_id"]).hex()))
            finally:  # what was paid for is shown in any case
                for text in [*([""] if number else []), *preview_lines(request, result)]:
                    show(text)
            yield result


def cmd_preview(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    check = InputCheck(hashes_lines=True)
    usages = []
    succeeded = 0
    with contextlib.ExitStack() as stack:
        requests = stack.enter_context(open_input(args.input))
        if args.output:
            refuse_unwritable(args.output)
        check_input(requests, check, console)
        results = Results(check.index, console)
        read_out(args.output, results, stack)
        total = len(results.best)
        samples, body_bytes = read_samples(requests, spread_evenly(args.requests, total))
        api = stack.enter_context(connect(args, console, clock))
        if new := sum(results.outcome_at(position) in TO_SEND for position in samples):
            api.check_model(check.model)
            console.message(f"sending {plural(new, 'request')} right away, at the ordinary price, not as a batch")
        for request, result in zip(samples.values(), preview(args, api, results, samples), strict=True):
            succeeded += classify(result).kind == SUCCEEDED
            input_tokens, output_tokens = token_usage(body_of(result))
            if input_tokens is not None and output_tokens is not None:
                usages.append(Usage(body_size(request), input_tokens, output_tokens))
    if usages:
        console.message(estimate(usages, body_bytes, total, args.prices))
    else:
        console.message("no response says how many tokens it used, so there is no estimate")
    return 0 if succeeded else 1


# create


def is_reusable(batch: Batch) -> bool:
    """Whether a batch that may have a success is running or completed, so that its part need not be submitted."""
    return batch.status == "completed" or not (batch.has_ended or batch.status == "cancelling")


def partial_warning(part: Part, batch: Batch) -> str:
    when = "" if batch.has_ended else " once the batch has ended"
    return (
        f"part {part.label} not submitted: batch {batch.id} ({batch.status}) has finished "
        f"{batch.counts.completed or 0} of its {batch.counts.total or part.requests} requests; to get those and "
        f"send only the rest, use run on the same file{when}"
    )


def wait_for_output(api: Api, batch: Batch) -> None:
    """Wait for the output file of a completed batch with successes. Raises OutputMissing after ten minutes."""
    if not lacks_output(api, batch):
        return
    poller = Poller(api)
    while not (polled := poller.poll([batch.id])).ended:
        if polled.lost:
            raise polled.lost[batch.id]
        api.clock.sleep(SHORT_POLL_SECONDS)


def create_part(
    args: argparse.Namespace, submitter: Submitter, requests: Input, part: Part, batches: Sequence[Batch]
) -> bool:
    """Submit a part unless one of these earlier batches has it, and print its batch.

    Returns False if an earlier batch finished only some of it.
    """
    console = submitter.api.console

    def print_batch(batch: Batch) -> None:
        print_result(batch_json(batch) if args.json else f"Batch ID: {batch.id}", console)

    def print_file_id(file_id: str) -> None:
        if file_id and not args.json:
            print_result(f"File ID: {file_id}", console)

    if reused := next(filter(is_reusable, batches), None):
        console.message(f"part {part.label} was already submitted as batch {reused.id} ({reused.status}); skipping")
        wait_for_output(submitter.api, reused)
        print_file_id(reused.input_file_id)
        print_batch(reused)
        return True
    if batches:
        console.warn(partial_warning(part, batches[-1]))
        return False
    try:
        print_batch(submitter.submit(requests, part, print_file_id))
        return True
    except AlreadySubmitted as found:
        batches = [batch for batch in found.batches if submitter.part_sha256(batch) == part.sha256]
        if not batches:
            raise
        submitter.known.update(batch.id for batch in batches)  # not the others: later parts must find those
    return create_part(args, submitter, requests, part, batches)


def cmd_create(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    check = InputCheck(args.endpoint, args.max_requests)
    with contextlib.ExitStack() as stack:
        requests = stack.enter_context(open_input(args.input))
        api = stack.enter_context(connect(args, console, clock))
        sha256 = requests.sha256()
        note = stack.enter_context(locked_note(sha256, requests, console))
        parts = check_input(requests, check, console)
        submitter = Submitter(api, args, sha256, check, note)
        of_part: dict[str, list[Batch]] = {part.sha256: [] for part in parts}
        of_other_parts: list[Batch] = []
        for batch in submitter.earlier_batches(first_listing(api, force=args.force)):
            if submitter.is_of_file(batch, of_part):
                submitter.known.add(batch.id)
                of_part.get(submitter.part_sha256(batch), of_other_parts).append(batch)
        if of_other_parts and not all(of_part.values()):
            raise AlreadySubmitted(of_other_parts)
        created = [create_part(args, submitter, requests, part, of_part[part.sha256]) for part in parts]
    return 0 if all(created) else 1


# status


def each_batch(batch_ids: Iterable[str], console: Console, action: Callable[[str], None]) -> int:
    """Call `action` for every id, also after one has failed. Return the exit code."""
    exit_code = 0
    for batch_id in dict.fromkeys(batch_ids):
        try:
            action(batch_id)
        except CommandError as error:
            console.error(f"{batch_id}: {error}")
            exit_code = 1
    return exit_code


def show_and_save(args: argparse.Namespace, api: Api, batch: Batch) -> None:
    """Print a batch. If it has ended, save its files and print their paths."""
    show = result_printer(api.console, to_stderr=False)
    if not args.json:
        for line in [*([f"Batch ID: {batch.id}"] if len(args.batch_ids) > 1 else []), *status_lines(batch)]:
            show(line)
    paths = batch_paths(batch.id)
    saved = save_files(api, batch, paths, skip_complete=True) if args.auto_save and batch.has_ended else Saved({}, [])
    if args.json:
        show(batch_json(batch, {f"{kind}_path": paths[kind] for kind in saved.sizes}))
    saved.report(paths, result_printer(api.console, to_stderr=args.json))


def cmd_status(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    with connect(args, console, clock) as api:
        return each_batch(args.batch_ids, console, lambda batch_id: show_and_save(args, api, api.batch(batch_id)))


# wait


def wait_for_end(api: Api, args: argparse.Namespace) -> Polled:
    """Poll until every batch has ended or cannot be polled."""
    poller, found = Poller(api), Polled({}, {})
    while True:
        active = [each for each in dict.fromkeys(args.batch_ids) if each not in found.ended and each not in found.lost]
        polled = poller.poll(active)
        found.ended.update(polled.ended)
        found.lost.update(polled.lost)
        poller.report()
        if len(polled.ended) + len(polled.lost) == len(active):
            return found
        api.clock.sleep(args.interval)


def save_polled(args: argparse.Namespace, api: Api, polled: Polled) -> int:
    """Show and save each batch that was waited for, and return the exit code."""

    def save_or_fail(batch_id: str) -> None:
        if batch_id in polled.lost:
            raise polled.lost[batch_id]
        show_and_save(args, api, polled.ended[batch_id])

    exit_code = each_batch(args.batch_ids, api.console, save_or_fail)
    return exit_code or int(any(batch.status != "completed" for batch in polled.ended.values()))


def cmd_wait(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    resume = f"to resume waiting: {PROG} wait --batch-id {' '.join(args.batch_ids)}"
    with connect(args, console, clock) as api, clock.limit(args.timeout):
        with advice_if_stopped(f"the batches keep running on the server; {resume}", console):
            polled = wait_for_end(api, args)
        with advice_if_stopped(resume, console):
            return save_polled(args, api, polled)


# retrieve


def errors_in(path: str) -> str:
    """The most common errors of an error file, each with its count."""
    counts: Counter[str] = Counter()
    with open_input(path) as errors:
        for line in errors.lines():
            with contextlib.suppress(ValueError):
                counts[shorten(classify(read_object(line)).error())] += 1
    return ranked(counts)


def retrieve(args: argparse.Namespace, api: Api, batch_id: str) -> None:
    """Save the files of a batch. Raises CommandError if it is running or failed, or if it lacks some results."""
    batch = api.batch(batch_id)
    if not batch.has_ended:
        raise CommandError(f"Batch not completed (status: {batch.raw['status']})")
    if lacks_output(api, batch):
        raise CommandError(f"Batch completed, but its results are not there yet ({batch.counts.completed} requests "
                           "succeeded); try again in a minute")
    paths = batch_paths(batch.id, args.output)
    saved = save_files(api, batch, paths)
    saved.report(paths, result_printer(api.console, to_stderr=args.output == STDOUT))
    if batch.status == "failed":
        raise CommandError(f"Batch failed: {batch.failure_reasons()}")
    if "results" not in saved.sizes:
        errors = f": {errors_in(paths['errors'])}" if saved.sizes else ""
        raise CommandError(f"Batch has no results (status: {batch.raw['status']}){errors}")
    if batch.status != "completed":
        counted = f" with {batch.counts.completed or 0} of {batch.counts.total} requests completed"
        raise CommandError(f"Batch {batch.status}{counted if batch.counts.total else ''}; run on the same request file "
                           "sends only the rest")


def cmd_retrieve(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    if args.output:
        refuse_unwritable(args.output)
    with connect(args, console, clock) as api:
        return each_batch(args.batch_ids, console, lambda batch_id: retrieve(args, api, batch_id))


# cancel, list


def cancellation_lines(batch: Batch) -> Iterator[str]:
    yield f"Batch cancellation initiated: {batch.id}"
    yield f"Status: {batch.raw['status']}"
    if created := local_time(batch.created_at, " "):
        yield f"Created: {created}"
    if batch.status == "cancelled":
        yield ("Note: Batch was successfully cancelled. Any completed requests have been processed and you will be "
               "charged for them.")
    else:
        yield "Note: Batch cancellation in progress. This may take up to 10 minutes."


def cmd_cancel(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    def cancel(batch_id: str) -> None:
        batch = api.cancel(batch_id)
        if batch.has_ended and batch.status != "cancelled":
            raise CommandError(f"Batch has already ended (status: {batch.raw['status']})")
        for line in [batch_json(batch)] if args.json else cancellation_lines(batch):
            print_result(line, console)

    with connect(args, console, clock) as api:
        return each_batch(args.batch_ids, console, cancel)


def table_row(batch: Batch) -> tuple[str, ...]:
    completed, failed, total = (number or 0 for number in batch.counts)
    name = batch.metadata.get("input_file") or batch.input_file_id
    created = local_time(batch.created_at)
    return batch.id, batch.raw["status"], created, f"{completed}/{total}", str(failed), escape_controls(name)


def table(batches: Iterable[Batch]) -> Iterator[str]:
    """The lines of a table of the batches, with its columns aligned."""
    rows = [table_row(batch) for batch in batches]
    if not rows:
        yield "No batches found."
        return
    rows.insert(0, ("BATCH ID", "STATUS", "CREATED", "REQUESTS", "FAILED", "INPUT FILE"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def listed_batches(api: Api, limit: int) -> Iterator[Batch]:
    """The newest batches. Warns if the server's listing does not come to an end."""
    seen: set[str] = set()
    try:
        for page in api.pages(min(limit, PAGE_SIZE)):
            for batch in page.batches:
                if batch.id not in seen:
                    seen.add(batch.id)
                    yield batch
    except IncompleteListing as error:
        if not seen:
            raise
        api.console.warn(str(error))


def cmd_list(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    with connect(args, console, clock) as api:
        batches = itertools.islice(listed_batches(api, args.limit), args.limit)
        for line in map(batch_json, batches) if args.json else table(batches):
            print_result(line, console)
    return 0


# retry, export


def open_inputs(args: argparse.Namespace, stack: contextlib.ExitStack) -> list[Input]:
    """The request file and all of --results, open in `stack`."""
    return [stack.enter_context(open_input(path)) for path in (args.input, *args.results)]


def read_results(inputs: Sequence[Input], console: Console) -> Results:
    """The best results of the requests, by the request file and the results files."""
    results = Results(index_requests(inputs[0]), console)
    for each in inputs[1:]:
        results.read(each.file, each.name)
    return results


def refuse_changes(inputs: Iterable[Input]) -> None:
    for each in inputs:
        each.refuse_changes()


@contextlib.contextmanager
def whole_output(path: str, inputs: Iterable[Input]) -> Iterator[BinaryIO]:
    """Like open_output, but the file is kept only if no input has changed meanwhile."""
    with open_output(path) as out:
        try:
            yield out
        except (ValueError, LookupError):  # a line that is not as it was in the first pass
            refuse_changes(inputs)
            raise
        refuse_changes(inputs)


def cmd_retry(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    with contextlib.ExitStack() as stack:
        inputs = open_inputs(args, stack)
        results = read_results(inputs, console)
        kinds = TO_SEND | {REJECTED} if args.include_rejected else TO_SEND
        outcomes = results.outcomes()
        count = sum(outcomes[kind] for kind in kinds)
        if count:
            with whole_output(args.output, inputs) as out:
                lines = enumerate(inputs[0].lines())
                out.writelines(line for position, line in lines if results.outcome_at(position) in kinds)
        else:
            refuse_changes(inputs)
    result_printer(console, to_stderr=args.output == STDOUT)(f"Requests to retry: {count}")
    report_results("", results, console)
    if not args.include_rejected and outcomes[REJECTED]:
        console.message("rejected requests would be rejected again, so they are not written; see --include-rejected")
    return 0


class NotInOrder(Exception):
    """The results are not in request order, one line for each request."""


def rows_in_order(requests: Input, lines: Input, results: Results) -> Iterator[Sequence[str]]:
    """The header and rows of the bios in one pass, if the results are in request order, as `run` writes them.

    Indexes requests and results on the way. Raises NotInOrder if anything about the results needs a second look.
    """
    yield BIO_COLUMNS
    answers = lines_with_offsets(lines.file, lines.name, 0)
    end = 0
    try:
        for request in indexed_requests(requests, results.requests):
            _, offset, line = next(answers)
            end = offset + len(line)
            result = read_object(line)
            if result.get("custom_id") != request["custom_id"]:
                raise NotInOrder
            results.best.append(None)
            results.add(result, (lines.file, offset, len(line)))
            yield request["custom_id"], artist_name(request), *bio_of(results.best[-1], result)
        for _, offset, line in answers:  # results of other requests, or better ones of these
            results.add(read_object(line), (lines.file, offset, len(line)))
    except (StopIteration, ValueError):
        raise NotInOrder from None
    if any(line and line.offset >= end for line in results.best):
        raise NotInOrder


def bio_rows(requests: Input, results: Results) -> Iterator[Sequence[str]]:
    yield BIO_COLUMNS
    for line, best in zip(requests.lines(), results.best, strict=True):
        request = read_object(line)
        yield request["custom_id"], artist_name(request), *bio_of(best)


def records(spreadsheet: Input, encoding: str, id_column: str) -> Iterator[tuple[int, list[str]]]:
    """The header of a CSV and its rows, each with its line number; without blank rows and repeated headers.

    Raises CommandError if a row's quoting is malformed, or if the header has no such id column.
    """
    descriptor = spreadsheet.file.fileno()
    start = os.pread(descriptor, 4, 0)
    if start == b"PK\x03\x04":
        raise CommandError(f"{spreadsheet.name} is an Excel workbook or another zip file; save it as CSV UTF-8")
    encoding = encoding_of(start, encoding)
    number = 0
    try:
        with open(descriptor, encoding=encoding, errors="surrogateescape", newline="", closefd=False) as text:
            text.seek(0)
            lines = iter(text)
            header = read_header(lines, [id_column])
            if header is None:
                raise CommandError(f"{spreadsheet.name} is empty; it needs a header and at least one row")
            if header.is_malformed:
                raise CommandError(f"{spreadsheet.name} line {header.line}: malformed quoting; correct the quotes")
            try:
                header.position(id_column)
            except CommandError as error:
                raise CommandError(f"{spreadsheet.name} {error}; see --id-column") from None
            yield header.line, header.names
            keys = [*map(column_key, header.names)]
            number = header.last_line
            reader = csv.reader(lines, delimiter=header.delimiter, strict=True)
            for row in reader:
                if any(field.strip(BLANKS) for field in row) and [*map(column_key, row)] != keys:
                    yield number + 1, row
                number = header.last_line + reader.line_num
    except csv.Error as error:
        problem = f"malformed quoting ({error}); correct the quotes"
        raise CommandError(f"{spreadsheet.name} line {number + 1}: {problem}") from None
    except UnicodeError as error:
        raise CommandError(f"{spreadsheet.name} cannot be decoded: {error}; see --encoding") from None


def check_spreadsheet(spreadsheet: Input, encoding: str, id_column: str, console: Console) -> int:
    """The number of columns: those of the header, or more if a row has more.

    Warns of rows that cannot be decoded. Raises CommandError if there are so many that the encoding must be wrong.
    """
    width = rows = 0  # the header is a row, too
    undecodable = []  # line numbers
    for number, row in records(spreadsheet, encoding, id_column):
        filled = [at for at, field in enumerate(row, 1) if field.strip(BLANKS)]
        width = max(width, filled[-1] if rows else len(row))  # blank cells behind the header's last column do not count
        rows += 1
        if re.search("[\udc80-\udcff]", "\0".join(row)):
            undecodable.append(number)
    if undecodable:
        counted = f"{len(undecodable)} of {plural(rows - 1, 'row')}"
        problem = f"{spreadsheet.name}: {counted} cannot be decoded, first on line {undecodable[0]}"
        if len(undecodable) > 1 and len(undecodable) > 0.05 * rows:  # the limits of gen_batch_jsonl.py
            raise CommandError(f"{problem}; name the encoding with --encoding")
        console.warn(f"{problem}; each undecodable byte becomes a question mark; see --encoding")
    return width


def spreadsheet_rows(
    spreadsheet: Input, encoding: str, id_column: str, results: Results, console: Console
) -> Iterator[Sequence[str]]:
    """The header and rows of a spreadsheet, each with the bio columns added."""
    width = check_spreadsheet(spreadsheet, encoding, id_column, console)
    rows = (row for _, row in records(spreadsheet, encoding, id_column))
    header = next(rows)
    id_at = [*map(column_key, header)].index(column_key(id_column))  # records has checked that there is exactly one
    yield *header, *[""] * (width - len(header)), *BIO_COLUMNS[2:]
    line_of = results.requests.line_of
    exported: set[str] = set()
    for row in rows:
        artist_id = row[id_at].strip(BLANKS) if id_at < len(row) else ""
        bio = Bio(error="no request")
        if artist_id in line_of and artist_id not in exported:
            exported.add(artist_id)
            bio = bio_of(results.best[line_of[artist_id] - 1])
        yield *row[:width], *[""] * (width - len(row)), *bio
    if left := len(line_of) - len(exported):
        missing = f"{spreadsheet.name} has no row for {plural(left, 'request')}"
        console.warn(f"{missing}, whose results are left out; see --id-column")


def write_csv(args: argparse.Namespace, inputs: Sequence[Input], rows: Iterable[Sequence[str]]) -> None:
    with whole_output(args.output, inputs) as out:
        if args.excel:
            out.write("\ufeff".encode())
        out.writelines(map(excel_line if args.excel else csv_line, rows))


def export_in_order(args: argparse.Namespace, inputs: Sequence[Input], console: Console) -> Results | None:
    """Export in one pass, if the results are in request order. Otherwise nothing is written, and None returned."""
    if len(inputs) > 2 or args.csv or is_stream(args.output):
        return None
    requests, lines = inputs
    results = Results(RequestIndex({}, bytearray()), console)
    try:
        write_csv(args, inputs, rows_in_order(requests, lines, results))
    except NotInOrder:
        return None
    return results


def cmd_export(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    with contextlib.ExitStack() as stack:
        inputs = open_inputs(args, stack)
        if not (results := export_in_order(args, inputs, console)):
            results = read_results(inputs, console)
            if args.csv:
                spreadsheet = stack.enter_context(open_input(args.csv))
                csv.field_size_limit(sys.maxsize)
                inputs.append(spreadsheet)
                rows = spreadsheet_rows(spreadsheet, args.encoding, args.id_column, results, console)
            else:
                rows = bio_rows(inputs[0], results)
            write_csv(args, inputs, rows)
    report_results(wrote_prefix(args.output), results, console)
    return 0


# ---- run


def positions_of(part: Part) -> range:
    """The positions of the requests of a part of the request file."""
    return range(part.first, part.first + part.requests)


class QueuedPart:
    """A part to submit, the file that contains it, and the positions of its requests in the request file."""

    def __init__(self, source: Input, part: Part, positions: Sequence[int]) -> None:
        self.source = source
        self.part = part
        self.positions = positions
        self.file_id = ""  # of its upload
        self.refused: list[str] = []  # batches of that upload that exceeded the token limit
        self.idle_refusals = 0

    def after_idle_refusal(self) -> list[QueuedPart]:
        """What to submit after a refusal with no batch active: this part or, after two of them, its halves.

        Raises CommandError if a single request is refused again and again.
        """
        self.idle_refusals += 1
        if self.part.requests > 1 and self.idle_refusals >= MAX_IDLE_REFUSALS:
            first, second = split_part(self.part, self.source.file)
            left, right = self.positions[: first.requests], self.positions[first.requests :]
            return [QueuedPart(self.source, first, left), QueuedPart(self.source, second, right)]
        if self.idle_refusals >= MAX_SINGLE_REFUSALS:
            raise CommandError(
                f"part {self.part.label} (1 request, {plural(self.part.size, 'byte')}) was refused "
                f"{MAX_SINGLE_REFUSALS} times for the token limit while no batch of this run was active; the account's "
                "limit is too small for this request"
            )
        return [self]


class Queue:
    """Decides which parts may be submitted now. The API does not report its token limit in advance.

    After a refusal, each batch that ends makes room for one part. If none is active, waiting may help.
    """

    def __init__(self, parts: Iterable[QueuedPart]) -> None:
        self._waiting = deque(parts)
        self._room = math.inf  # how many more batches may be admitted
        self._idle_refusals = 0  # in a row

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self) -> QueuedPart | None:
        """The next part to submit now, if any."""
        if not self._waiting or self._room < 1:
            return None
        self._room -= 1
        return self._waiting.popleft()

    def clear(self) -> None:
        self._waiting.clear()

    def settle(self, refused: Sequence[QueuedPart], ended: int, *, is_idle: bool) -> int:
        """Put refused parts back in front, and make room for as many parts as batches have ended.

        If parts were refused with no batch active, returns how many times in a row that has happened; otherwise 0.
        """
        is_stuck = bool(refused) and is_idle and not ended
        if is_stuck:
            self._room = 1
            self._idle_refusals += 1
            refused = [piece for queued in refused for piece in queued.after_idle_refusal()]
        else:
            self._room = ended if refused else self._room + ended
            if ended:
                self._idle_refusals = 0
        self._waiting.extendleft(reversed(refused))
        return self._idle_refusals if is_stuck else 0


class ActiveBatch:
    """A batch whose results a run needs, until they are downloaded."""

    def __init__(
        self,
        batch: Batch,
        positions: Collection[int] | None,
        *,
        sent_digests: Mapping[str, bytes] | None = None,
        queued: QueuedPart | None = None,
        submitted_at: float = -math.inf,
    ) -> None:
        self.batch = batch  # as first seen
        self.positions = positions  # of its requests in the request file; None if they are unknown
        self.sent_digests = sent_digests  # of its requests by custom_id, if they may differ from the request file
        self.queued = queued  # what to submit again after a refusal
        self.submitted_at = submitted_at  # by this run; -inf: by another
        self.rival_check_at = submitted_at + RIVAL_CHECK_SECONDS if submitted_at > -math.inf else math.inf
        self.cancel_is_expected = batch.status == "cancelling"  # when it was found, or cancelled by this run


class ResultsLost(CommandError):
    """Requests would have to be paid for again, because the results of their batch are gone or match no request."""


class Round(NamedTuple):
    """The result of a round: whether it counts as an attempt, and whether somebody cancelled a batch."""

    is_attempt: bool
    cancelled: bool


class Run:
    """Sends requests, in rounds, until each has succeeded or the attempts are used up.

    Its state can be rebuilt from the request file, --out and the server. `active` are the active batches by id,
    `spool` is a temporary file for downloads.
    """

    def __init__(
        self, args: argparse.Namespace, submitter: Submitter, requests: Input, results: Results, spool: BinaryIO
    ) -> None:
        self.active: dict[str, ActiveBatch] = {}
        self._args = args
        self._submitter = submitter
        self._api = submitter.api
        self._clock = submitter.api.clock
        self._console = submitter.api.console
        self._requests = requests
        self._results = results
        self._spool = spool
        self._poller = Poller(submitter.api, outage_budget=OUTAGE_BUDGET, is_answered=True, repeat_denied=True)
        self._lost: list[tuple[ActiveBatch, str]] = []  # batches with results that cannot be used, and why

    def rounds(self, parts: Sequence[Part], listed: Iterable[Batch]) -> None:
        """Use the results of listed batches, then submit the rest in at most --attempts rounds.

        Raises ResultsLost, once no batch is active, if requests would have to be paid for again.
        """
        self._pick_up_earlier(parts, listed)
        attempts_left: int = self._args.attempts
        while True:
            pending = self._pending()
            lost = self._lost_results(pending)
            if pending and self._requests.is_changed():
                self._console.warn(f"{self._requests.name} was changed, so nothing more is sent; start run again")
                attempts_left = 0
            if lost or not attempts_left:
                pending = set()
            if lost and not self.active:
                raise lost
            if not pending and not self.active:
                return
            if pending and attempts_left < self._args.attempts:
                number = self._args.attempts - attempts_left + 1
                self._console.message(f"round {number}: {plural(len(pending), 'request')} to send again")
                self._poller.latest.clear()
            with temporary_file() as copy:
                done = self._round(Queue(self._divide(pending, parts, copy)))
            attempts_left = 0 if done.cancelled else attempts_left - int(done.is_attempt)

    def _pending(self) -> set[int]:
        """The positions of the requests to send: without a final result, and not in an active batch.

        Empty while a batch is active whose requests are unknown.
        """
        active = self.active.values()
        if any(each.positions is None for each in active):
            return set()  # we only learn from its results which requests it has
        return self._results.positions(TO_SEND).difference(*(each.positions or () for each in active))

    def _lost_results(self, pending: set[int]) -> ResultsLost | None:
        """Why some of these requests cannot be sent without paying for them twice."""
        for lost, reason in self._lost:
            if left := len(pending if lost.positions is None else pending.intersection(lost.positions)):
                return ResultsLost(
                    f"{reason}, so {left} of its requests would have to be sent, and perhaps paid for, again; name an "
                    "earlier download with --results, or use --force, which sends all requests of the file "
                    f"({len(self._results.best):,}) again"
                )
        return None

    def _divide(self, pending: set[int], parts: Sequence[Part], copy: BinaryIO) -> list[QueuedPart]:
        """The parts to submit: those of the whole file, or of a copy of the pending lines."""
        if len(pending) == len(self._results.best):
            return [QueuedPart(self._requests, part, positions_of(part)) for part in parts]
        divider = PartDivider(self._args.max_requests)
        if pending:
            for position, line in enumerate(self._requests.lines()):
                if position in pending:
                    divider.add(line)
                    copy.write(line)
            copy.flush()
        source, order = Input.of(copy, "a temporary file"), sorted(pending)
        return [QueuedPart(source, part, order[part.first : part.first + part.requests]) for part in divider.parts()]

    def _round(self, queue: Queue) -> Round:
        """Submit the parts, and download the results of every batch, until none is active."""
        submitted = cancelled = cut_short = False
        while True:
            while queued := queue.take():
                if self._submit(queued):
                    submitted = True
                else:  # the batches found may have requests of later parts, too; another round does what is left
                    cut_short = True
                    queue.clear()
            self._poller.report()
            if not self.active and not queue:
                return Round(submitted and not cut_short, cancelled)
            self._wait(self._args.interval)
            refused, ended = [], 0
            for batch, watched in self._ended():
                if batch.status != "failed":
                    ended += 1
                    self._download_results(batch, watched)
                    cancelled = cancelled or (batch.status == "cancelled" and not watched.cancel_is_expected)
                elif (queued := watched.queued) and batch.is_over_token_limit and self._is_still_to_send(watched):
                    self._console.message(f"part {queued.part.label}: batch {batch.id} was refused for the token limit")
                    del self._poller.latest[batch.id]
                    queued.refused.append(batch.id)
                    refused.append(queued)
                elif not batch.is_over_token_limit and watched.sent_digests is None:
                    raise CommandError(f"batch {batch.id} failed: {batch.failure_reasons()}; no output was written; "
                                       "batches still running will be picked up by the next run")
                else:  # its requests are in other batches, but it makes room, too
                    ended += 1
            if cancelled or cut_short:
                queue.clear()
            elif idle_refusals := queue.settle(refused, ended, is_idle=not self.active):
                seconds = self._args.interval * 2 ** min(idle_refusals, 5)
                self._console.message(f"no batch of this run is active; trying again in {seconds:g} s")
                self._clock.sleep(seconds)

    def _ended(self) -> Iterator[tuple[Batch, ActiveBatch]]:
        """Poll every active batch once. Yield those that have ended, and stop watching them."""
        polled = self._poller.poll([*self.active])
        for batch_id, failure in polled.lost.items():
            age = self._clock.now() - self.active[batch_id].submitted_at
            if not (isinstance(failure, NotFound) and age < YOUNG_SECONDS):
                raise failure
            self._console.warn(f"{batch_id}: {failure}; the batch is new and may not be visible yet; still waiting")
        for batch in polled.ended.values():
            if batch.status == "cancelled" and not self.active[batch.id].cancel_is_expected:
                self._console.warn(f"batch {batch.id} was cancelled; this run ends when its other batches have ended; "
                                   "run again to send the rest")
            yield batch, self.active.pop(batch.id)

    def _is_still_to_send(self, watched: ActiveBatch) -> bool:
        """Whether its requests still have no result and are in no other active batch."""
        return watched.positions is not None and self._pending().issuperset(watched.positions)

    def _wait(self, seconds: float) -> None:
        """Sleep. Meanwhile, look for rivals of each new batch when that is due."""
        end = self._clock.now() + seconds
        while (due := min((each.rival_check_at for each in self.active.values()), default=math.inf)) <= end:
            self._clock.sleep(max(0.0, due - self._clock.now()))
            self._look_for_rivals()
        if (rest := end - self._clock.now()) > 0:
            self._clock.sleep(rest)

    # submitting

    def _submit(self, queued: QueuedPart) -> bool:
        """Submit a part. Returns False if another process has submitted some of its requests meanwhile.

        Then the batches of that process are picked up instead.
        """
        label = queued.part.label

        def on_upload(file_id: str) -> None:
            queued.file_id, queued.refused = file_id, []
            self._console.message(f"part {label}: File ID: {file_id}")

        try:
            batch = self._submitter.submit(queued.source, queued.part, on_upload, queued.file_id, queued.refused)
        except AlreadySubmitted as found:
            if not queued.refused:
                queued.file_id = ""  # the file was deleted
            picked_up = [self._pick_up_found(batch, queued.part) for batch in found.batches]
            return False if any(picked_up) else self._submit(queued)
        self._console.message(f"part {label}: Batch ID: {batch.id}")
        now = self._clock.now()
        self._poller.latest[batch.id] = batch
        self.active[batch.id] = ActiveBatch(batch, queued.positions, queued=queued, submitted_at=now)
        return True

    def _pick_up_found(self, batch: Batch, part: Part) -> bool:
        """Pick up a batch that was found just before a POST.

        Returns False if it is of another version and has nothing that we need.
        """
        if not self._submitter.is_of_file(batch, [part.sha256]):
            self._submitter.known.add(batch.id)  # in any case: otherwise the next look finds it again
            return self._pick_up_other_version(batch)
        self._pick_up(batch, None)
        return True

    def _look_for_rivals(self) -> None:
        """Look for rivals: batches of the same requests that another machine submitted at the same time."""
        now = self._clock.now()
        own: dict[str, ActiveBatch] = {}  # by the sha256 of the part
        for watched in self.active.values():
            if watched.queued and watched.rival_check_at <= now:
                watched.rival_check_at = math.inf
                own[watched.queued.part.sha256] = watched
        for rival in self._submitter.new_batches(own):
            if mine := own.get(self._submitter.part_sha256(rival)):
                self._settle_rival(mine, rival)
            else:  # it is found again before the next POST
                self._console.warn(f"batch {rival.id} may contain some of the same requests")

    def _settle_rival(self, watched: ActiveBatch, rival: Batch) -> None:
        """Keep the older of two batches with the same requests. Each process cancels only its own."""
        self._submitter.known.add(rival.id)
        if watched.batch.age_key < rival.age_key:
            self._console.warn(f"batch {rival.id} has the same requests as batch {watched.batch.id}, which is older "
                               "and is kept")
        elif self._submitter.cancel_duplicate(watched.batch, rival):
            watched.cancel_is_expected = True
            self.active[rival.id] = ActiveBatch(rival, watched.positions)

    # earlier batches

    def _pick_up_earlier(self, parts: Sequence[Part], listed: Iterable[Batch]) -> None:
        """Download the results of earlier batches that have ended, and watch those that are running."""
        part_of = {part.sha256: part for part in parts}
        batches = self._submitter.earlier_batches(listed)
        for batch in batches:
            if self._submitter.is_of_file(batch, part_of):
                self._pick_up(batch, part_of.get(self._submitter.part_sha256(batch)))
        for batch in reversed(batches):  # the newest version first: it has most of the requests
            if batch.id not in self._submitter.known and self._submitter.is_of_other_version(batch):
                self._pick_up_other_version(batch)

    def _pick_up(self, batch: Batch, part: Part | None) -> None:
        """Pick up a batch of this request file. `part` is its part, if the file is divided as it was then."""
        self._submitter.known.add(batch.id)
        if part:
            self._console.message(f"part {part.label} was already submitted as batch {batch.id} ({batch.status})")
            positions = positions_of(part)
            watched = ActiveBatch(batch, positions, queued=QueuedPart(self._requests, part, positions))
        else:
            self._console.message(f"batch {batch.id} ({batch.status}) already has some of the requests")
            digests = self._input_digests(batch)
            watched = ActiveBatch(batch, None if digests is None else self._same_requests(digests))
        self._take_or_watch(watched)

    def _pick_up_other_version(self, batch: Batch) -> bool:
        """Pick up a batch of another version of the file if it has requests that we need. Whether it has."""
        if not (pending := self._pending()):
            return False
        self._submitter.known.add(batch.id)
        digests = self._input_digests(batch)
        same = set() if digests is None else self._same_requests(digests) & pending
        if digests is None:
            self._console.warn(f"batch {batch.id} was made from an earlier version of {self._requests.name}, but its "
                               "input file is not available; requests in both may be paid for twice")
        elif same:
            self._console.message(f"batch {batch.id} ({batch.status}), made from an earlier version of "
                                  f"{self._requests.name}, already has {len(same)} of the requests")
            self._take_or_watch(ActiveBatch(batch, same, sent_digests=digests))
        return bool(same)

    def _take_or_watch(self, watched: ActiveBatch) -> None:
        """Download the results of a batch that has ended; watch one that is running."""
        batch = watched.batch
        self._poller.latest[batch.id] = batch
        if batch.has_ended and not lacks_output(self._api, batch):
            self._download_results(batch, watched)
        else:
            self.active[batch.id] = watched

    def _input_digests(self, batch: Batch) -> dict[str, bytes] | None:
        """The digests of a batch's requests by custom_id, from its input file. None if that is gone or unusable."""
        digests: dict[str, bytes] = {}
        try:
            with temporary_file() as copy:
                name = f"the input file of {batch.id}"
                self._api.download(batch.input_file_id, self._api.size_of(batch.input_file_id), copy, name)
                for line in Input.of(copy, name).lines():
                    digests[str_field(read_object(line), "custom_id")] = digest_of(line)
        except (Refused, ValueError) as failure:  # ValueError: a line that is not a request
            if isinstance(failure, ApiError) and failure.status in (401, 429):
                raise
            return None
        return digests

    def _same_requests(self, digests: Mapping[str, bytes]) -> set[int]:
        """The positions of the requests of the request file with these digests."""
        index = self._results.requests
        return {
            index.line_of[custom_id] - 1
            for custom_id, digest in digests.items()
            if custom_id in index.line_of and index.digest(custom_id) == digest
        }

    # results

    def _download_results(self, batch: Batch, watched: ActiveBatch) -> None:
        """Download and index the files of a batch that has ended."""
        unmatched = self._results.unmatched
        for kind, file_id in batch.files.items():
            name = f"{kind} of {batch.id}"
            start = self._spool.seek(0, os.SEEK_END)
            try:
                if (size := self._api.size_of(file_id)) == 0:
                    continue
                self._api.download(file_id, size, self._spool, name)
            except NotFound:
                self._console.warn(f"the {kind} file of batch {batch.id} is no longer on the server")
                if kind == "results":
                    self._lost.append((watched, f"the output file of batch {batch.id} is no longer on the server"))
                continue
            self._results.read(self._spool, name, start, watched.sent_digests)
        if count := self._results.unmatched - unmatched:
            has = "has a custom_id" if count == 1 else "have custom_ids"
            reason = f"{plural(count, 'result')} of batch {batch.id} {has} that {self._requests.name} does not have"
            self._lost.append((watched, reason))


def known_results(
    args: argparse.Namespace, index: RequestIndex, console: Console, stack: contextlib.ExitStack
) -> Results:
    """The results that --results and --out have already. Their files stay open in `stack`."""
    known = Results(index, console)
    for path in args.results:
        if not same_regular_file(path, args.output):
            file = stack.enter_context(open_input(path))
            known.read(file.file, file.name)
    read_out(args.output, known, stack)
    return known


def cmd_run(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    check = InputCheck(args.endpoint, args.max_requests, hashes_lines=True)
    lost = None
    with contextlib.ExitStack() as stack:
        requests = stack.enter_context(open_input(args.input))
        refuse_unwritable(args.output)
        sha256 = requests.sha256()
        note = stack.enter_context(locked_note(sha256, requests, console))
        parts = check_input(requests, check, console)
        stamp = out_stamp(args.output)
        earlier = known_results(args, check.index, console, stack)
        results = Results(check.index, console) if args.force else earlier
        outcomes = results.outcomes()
        to_send = sum(outcomes[kind] for kind in TO_SEND)
        if have := len(results.best) - to_send:
            requests_in_all = with_commas(len(results.best), "request")
            console.message(f"{have:,} of {requests_in_all} {'has' if have == 1 else 'have'} a result already")
        if to_send:
            spool = stack.enter_context(temporary_file())
            api = stack.enter_context(connect(args, console, clock))
            resume = "batches still running will be picked up by the next run of the same command"
            with advice_if_stopped(f"no output was written; {resume}", console), clock.limit(args.timeout):
                listed = first_listing(api, force=args.force)
                patient_api = api._replace(outage_budget=OUTAGE_BUDGET)
                submitter = Submitter(patient_api, args, sha256, check, note, finds_versions=True)
                try:
                    Run(args, submitter, requests, results, spool).rounds(parts, listed)
                except ResultsLost as error:
                    if not spool.seek(0, os.SEEK_END):  # nothing to write
                        raise
                    lost = error
        if out_stamp(args.output) != stamp:  # preview may have added to it meanwhile
            latest = Results(check.index, console)
            read_out(args.output, latest, stack)
            results.fall_back_on(latest)
        if args.force:
            results.fall_back_on(earlier)
        advice = "; free some space and run the same command again: it fetches the results without paying again"
        with open_output(args.output, advice) as out:
            out.writelines(result_lines(results))
    report_results(wrote_prefix(args.output), results, console)
    if lost:
        raise lost
    return 0 if results.outcomes()[SUCCEEDED] == len(results.best) else 1


# ---- command line


def log_path(text: str) -> str:
    if text in ("-", STDOUT):
        raise argparse.ArgumentTypeError("stdout is for results; name a file, or /dev/stderr")
    return output_path(text)


def id_argument(text: str) -> str:
    if not is_id(text):
        raise argparse.ArgumentTypeError(f"not a batch id: {text!a}")
    return text


def batch_size(text: str) -> int:
    number = positive_int(text)
    if number > MAX_BATCH_REQUESTS:
        raise argparse.ArgumentTypeError(f"the limit of a batch is {MAX_BATCH_REQUESTS} requests: {text!a}")
    return number


def positive_seconds(text: str) -> float:
    seconds = float(text) if re.fullmatch(r"([0-9]+\.?|[0-9]*\.[0-9]+)(e-?[0-9]+)?", text) else 0
    if not 0 < seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"not a number of seconds above 0 and at most {MAX_SECONDS}: {text!a}")
    return seconds


def price_pair(text: str) -> tuple[float, float]:
    if not re.fullmatch(r"[0-9]+(\.[0-9]*)?,[0-9]+(\.[0-9]*)?", text):
        raise argparse.ArgumentTypeError(f"not two prices like 0.05,0.25: {text!a}")
    price_in, price_out = map(float, text.split(","))
    return price_in, price_out


# Options by flag, or by `COMMAND FLAG` if a command needs other words.
OPTIONS: dict[str, dict[str, Any]] = {
    "--in": {"dest": "input", "required": True, "type": input_path, "metavar": "JSONL",
             "help": "request file, - for stdin"},
    "--endpoint": {"type": text_argument, "metavar": "E",
                   "help": "endpoint that every request must name (default: the url of the first request)"},
    "--completion-window": {"type": text_argument, "default": "24h", "metavar": "W",
                            "help": "how long the API may take (default: %(default)s)"},
    "--max-requests": {"type": batch_size, "default": MAX_BATCH_REQUESTS, "metavar": "N",
                       "help": "maximum number of requests per batch (default: %(default)s); lower it if the account's "
                               "token limit is small"},
    "--force": {"action": "store_true", "help": "submit everything, even what was submitted before, and pay again"},
    "--json": {"action": "store_true", "help": "print each batch as one line of JSON, as the API gave it"},
    "--batch-id": {"dest": "batch_ids", "nargs": "+", "required": True, "type": id_argument, "metavar": "ID",
                   "help": "ids of batches, as create, run and list print them"},
    "--auto-save": {"action": argparse.BooleanOptionalAction, "default": True,
                    "help": "save the results of a batch that has ended (default: yes)"},
    "--interval": {"type": positive_seconds, "default": 30.0, "metavar": "S",
                   "help": "seconds between polls, fractions allowed (default: 30)"},
    "--timeout": {"type": positive_seconds, "metavar": "S", "help": "stop waiting after S seconds, with exit code 3"},
    "--limit": {"type": positive_int, "default": 20, "metavar": "N",
                "help": "how many batches to show (default: %(default)s)"},
    "--attempts": {"type": positive_int, "default": 3, "metavar": "N",
                   "help": "maximum number of rounds; each later one sends the retryable requests again "
                           "(default: %(default)s)"},
    "--results": {"nargs": "+", "required": True, "type": input_path, "metavar": "JSONL",
                  "help": "results: output and error files, or files that run wrote"},
    "--include-rejected": {"action": "store_true",
                           "help": "also write requests that the API would probably refuse again"},
    "--requests": {"type": positive_int, "default": 3, "metavar": "N",
                   "help": "how many requests to send (default: %(default)s)"},
    "--prices": {"type": price_pair, "metavar": "IN,OUT",
                 "help": "dollars per million input and output tokens, for an estimate of the cost"},
    "--csv": {"type": input_path, "metavar": "CSV",
              "help": "the artists' spreadsheet: write its rows, with the bio columns added"},
    "--id-column": {"type": text_argument, "metavar": "NAME",
                    "help": "column of --csv that holds the ids (default: artist_id)"},
    "--encoding": {"type": encoding_name, "metavar": "NAME", "help": "encoding of --csv (default: utf-8)"},
    "--excel": {"action": "store_true",
                "help": "write for Excel: add a byte-order mark, and put a ' before cells that look like formulas"},
    "--log-file": {"type": log_path, "metavar": "PATH",
                   "help": "log to append to (default: logs/batch_YYYYMMDD_HHMMSS.log)"},
    "--verbose": {"action": "store_true", "help": "show each API response on stderr"},
    "preview --out": {"dest": "output", "type": output_path, "metavar": "JSONL",
                      "help": "results file to add the responses to, - for stdout; run keeps them if it writes the "
                              "same file"},
    "retrieve --out": {"dest": "output", "type": output_path, "metavar": "PATH",
                       "help": "output file, with the error file beside it (default: results_ID.jsonl, "
                               "errors_ID.jsonl); with one --batch-id only"},
    "retry --out": {"dest": "output", "required": True, "type": output_path, "metavar": "JSONL",
                    "help": "request file to write, - for stdout"},
    "export --out": {"dest": "output", "required": True, "type": output_path, "metavar": "CSV",
                     "help": "CSV to write, - for stdout"},
    "run --out": {"dest": "output", "required": True, "type": output_path, "metavar": "JSONL",
                  "help": "results file to bring up to date, - for stdout"},
    "run --results": {"nargs": "+", "default": [], "type": input_path, "metavar": "JSONL",
                      "help": "more files with results that you already have"},
}
ONLINE = ("--log-file", "--verbose")
Command = Callable[[argparse.Namespace, Console, Clock], int]


@functools.cache
def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROG, description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(command: Command, text: str, *flags: str) -> None:
        name = command.__name__.removeprefix("cmd_")
        subparser = commands.add_parser(name, help=text, description=text)
        subparser.set_defaults(command=command, input=None, csv=None, results=(), batch_ids=())
        subparser.set_defaults(output=None, log_file=None)
        for flag in flags:
            subparser.add_argument(flag, **OPTIONS.get(f"{name} {flag}") or OPTIONS[flag])

    add(cmd_validate, "check a request file, without uploading it", "--in", "--endpoint")
    add(cmd_preview, "send a few requests right away, show the answers, and estimate the whole",
        "--in", "--requests", "--out", "--prices", *ONLINE)
    add(cmd_create, "upload a request file and create its batches",
        "--in", "--endpoint", "--completion-window", "--max-requests", "--force", "--json", *ONLINE)
    add(cmd_status, "show batches, and save their results once they have ended",
        "--batch-id", "--auto-save", "--json", *ONLINE)
    add(cmd_wait, "wait until batches have ended, then do what status does",
        "--batch-id", "--interval", "--timeout", "--auto-save", "--json", *ONLINE)
    add(cmd_retrieve, "download the output and error file of batches", "--batch-id", "--out", *ONLINE)
    add(cmd_cancel, "cancel batches", "--batch-id", "--json", *ONLINE)
    add(cmd_list, "list batches, newest first", "--limit", "--json", *ONLINE)
    add(cmd_retry, "write the requests that have no result yet", "--in", "--results", "--out", "--include-rejected")
    add(cmd_export, "write one CSV row per request, or the spreadsheet with the bios",
        "--in", "--results", "--out", "--csv", "--id-column", "--encoding", "--excel")
    add(cmd_run, "the whole job: bring a results file up to date with a request file",
        "--in", "--out", "--results", "--endpoint", "--completion-window", "--max-requests", "--interval", "--timeout",
        "--attempts", "--force", *ONLINE)
    return parser


def check_paths(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Report a usage error if a file would be read and written at once, or written twice."""
    inputs = [path for path in (args.input, args.csv, *args.results) if path]
    if inputs.count(STDIN) > 1:
        parser.error("only one input can be stdin (-)")
    for path, destination in itertools.product(inputs, filter(None, (args.output, args.log_file))):
        is_own_result = args.command is cmd_run and destination == args.output and path in args.results  # it is kept
        if same_regular_file(path, destination) and not is_own_result:
            parser.error(f"{shown(path)} would be read and written at once; choose another path to write")
    written = [path for batch_id in args.batch_ids for path in batch_paths(batch_id, args.output).values()]
    if args.output:
        written.append(args.output)
    if args.log_file and os.path.realpath(args.log_file) in map(os.path.realpath, written):
        parser.error("the log would be the same file as the output; choose another --log-file")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_paths(parser, args)
    if args.output and len(args.batch_ids) > 1:
        parser.error("--out works with a single --batch-id only")
    if args.command is cmd_export:
        if not args.csv and (args.id_column or args.encoding):
            parser.error("--id-column and --encoding need --csv")
        args.id_column, args.encoding = args.id_column or "artist_id", args.encoding or "utf-8"
    args.argv = [*(sys.argv[1:] if argv is None else argv)]
    return args


# ---- main


def main(
    argv: Sequence[str] | None = None,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Run a command, and return its exit code. Invalid arguments raise SystemExit(2), as in argparse."""
    gc.disable()  # few reference cycles are made, and looking for them takes a fifth of the time
    console = Console(sys.stderr, redact)
    try:
        with stopping_on_signals():
            args = parse_args(argv)
            command: Command = args.command
            return command(args, console, Clock(sleep, clock))
    except UsageError as error:
        for line in str(error).splitlines():
            console.message(line)
        raise SystemExit(2) from None
    except (CommandError, OSError) as error:  # an OSError that nothing above put into words
        console.error(str(error))
        return 1
    except TimedOut as timed_out:
        console.error(timed_out.message)
        return timed_out.exit_code
    except Exit as stopped:
        if stopped.exit_code > 128:
            console.message(f"{PROG}: stopped")
        return stopped.exit_code
    finally:
        console.close()


if __name__ == "__main__":
    raise SystemExit(main())
