#!/usr/bin/env python3
"""Put a request file (JSONL) through OpenAI's Batch API. Nothing is paid for twice,
and nothing paid for is lost.

  batch_tool.py preview --in requests.jsonl
  batch_tool.py run --in requests.jsonl --out results.jsonl
  batch_tool.py export --in requests.jsonl --results results.jsonl --out bios.csv

stdout carries results only; everything else goes to stderr. Commands that talk to
the API need OPENAI_API_KEY, and log every request to logs/batch_YYYYMMDD_HHMMSS.log.
validate, retry, export and run --dry-run work offline. OPENAI_BASE_URL chooses
another service. COMMAND --help shows the options of a command.

exit codes: 0 success, 1 fatal error, 2 invalid arguments, 3 --timeout passed,
130 interrupted, 143 terminated, 129 hung up
"""
from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes over: no traceback for Ctrl-C during the imports

import argparse
import codecs
import contextlib
import datetime
import errno
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import os
import re
import stat
import sys
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, TextIO, TypeVar, cast

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI, OpenAIError

PROG = "batch_tool.py"
if sys.version_info < (3, 11) or os.name == "nt":
    sys.exit(f"{PROG}: error: it needs Python 3.11 or later on Linux or macOS; on Windows, run it in WSL")

# ==== common block: stands in gen_batch_jsonl.py and batch_tool.py, byte for byte the same =======================

STDIN, STDOUT = "/dev/stdin", "/dev/stdout"  # what - stands for
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
    return re.sub("[^ -~]", lambda match: match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1], text)


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
        codecs.decode(b"", text, "surrogateescape")  # some codecs support no error handlers
    except (LookupError, ValueError):
        raise argparse.ArgumentTypeError(f"not an encoding that Python knows: {text!a}") from None
    # a file without a byte-order mark has no other sign of its byte order
    return {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(codecs.lookup(text).name, text)


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
    stopped_at: float | None = None

    def stop(number: int, _frame: object) -> None:
        nonlocal stopped_at
        if stopped_at is None or time.monotonic() - stopped_at > 1:
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
            signal.signal(number, handler if stopped_at is None else signal.SIG_IGN)


# ---- rows of a CSV

COLUMNS = ("artist_id", "artist_name", "artist_data")
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": 'a "|"'}
BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\u200b\ufeff"  # of str.strip(), and two more
MAX_FIELD_CHARS = 10_485_760  # the longest string that the Responses API accepts
MAX_EXTRA_FIELDS = 20  # a record with more extra fields than this is not read to its end
MAX_HEADER_LINE = 20  # how far down a header is looked for, to tell that there are lines above it
UNDECODABLE = "mark_undecodable"  # an error handler: invalid bytes become a lone surrogate, which is not valid UTF-8
codecs.register_error(UNDECODABLE, lambda error: ("\udcff", cast(UnicodeDecodeError, error).end))
BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}
ENDS_EARLY, TAKEN, REPEATED_HEADER = "ends early", "taken as it stands", "repeated header"
MALFORMED, TOO_LONG, WRONG_WIDTH = "malformed quoting", "field too long", "wrong number of fields"


class Table(NamedTuple):
    """How to read the rows of a CSV. `roles` has the positions of artist_id, artist_name and, if any, artist_data."""

    delimiter: str
    names: list[str]
    keys: list[str]  # column_key() of each name
    roles: dict[str, int]
    has_header: bool


class Record(NamedTuple):
    """A row as it was read: with as many fields as the header if it is used, with none if it is blank."""

    line: int
    lines: int  # how many it takes up in the file; one if the row is not used, as reading goes on behind that
    text: str  # its first line
    fields: list[str]
    width: int = 0  # how many fields it has in the file
    oddity: str = ""  # why it is not used, or what is odd although it is
    detail: str = ""  # what is wrong with the quoting, and where that was noticed

    @property
    def is_used(self) -> bool:
        return self.oddity in ("", ENDS_EARLY, TAKEN)


def encoding_of(start: bytes, encoding: str) -> str:
    """The encoding of a CSV by its first bytes: a byte-order mark beats the option."""
    return next((found for mark, found in BYTE_ORDER_MARKS.items() if start.startswith(mark)), encoding)


def is_blank(text: str) -> bool:
    return not text.strip(BLANKS)


def column_key(name: str) -> str:
    """A column name for comparisons: NFC, casefolded, trimmed, "_" for each run of blanks, hyphens and underscores."""
    return re.sub(r"[\s_-]+", "_", unicodedata.normalize("NFC", name).strip(BLANKS).casefold())


def listed_columns(names: Iterable[str]) -> str:
    """The column names for a message, with advice to use --encoding if they were decoded wrongly."""
    text = ", ".join(filter(None, names)) or "without names"
    is_garbled = re.search("[\0\udc80-\udcff]", text)  # UTF-16 read as bytes, or bytes that could not be decoded
    advice = " (read in the wrong encoding; name the right one with --encoding)" if is_garbled else ""
    return text[:300] + ("…" if len(text) > 300 else "") + advice


@functools.cache
def field_pattern(delimiter: str) -> re.Pattern[str]:
    """Matches one field: what stands in its quotes and the closing quote if there is one, or a field without quotes."""
    blanks = re.escape("".join({*BLANKS} - {"\r", "\n", delimiter}))
    return re.compile(rf'[{blanks}]*+"([^"]*+(?:""[^"]*+)*+)("?)[{blanks}]*+|([^\r\n{delimiter}]*+)')


def read_on(lines: Iterator[str]) -> list[str]:
    """The lines up to the one that closes a quoted field, or that makes it too long even if all is doubled quotes."""
    read, size = [], 0
    for line in lines:
        read.append(line)
        size += len(line)
        if size > 2 * MAX_FIELD_CHARS or re.match('[^"]*+(?:""[^"]*+)*+"', line):
            break
    return read


def parse_record(lines: Iterator[str], number: int, delimiter: str, max_fields: int) -> Record:
    """The record at the beginning of `lines`, by its quoting alone. `number` is that of the first line.

    The rules are those of csv.reader(strict=True), but blanks around quotes are dropped. A record with more fields than
    `max_fields` is not read to its end.
    """
    first = text = next(lines)
    read, at = 1, 0
    fields: list[str] = []

    def malformed(oddity: str, what: str, end: int) -> Record:
        noticed = number + text.count("\n", 0, end) + text.count("\r", 0, end) - text.count("\r\n", 0, end)
        return Record(number, 1, first, [], 0, oddity, f"{what} line {noticed})")

    while True:
        match = cast(re.Match[str], field_pattern(delimiter).match(text, at))
        if match[1] is not None and not match[2]:
            more = read_on(lines)
            read, text = read + len(more), text + "".join(more)
            match = cast(re.Match[str], field_pattern(delimiter).match(text, at))
        fields.append(match[3] if match[1] is None else match[1].replace('""', '"'))
        at = match.end()
        if len(fields[-1]) > MAX_FIELD_CHARS:
            end = at - len(fields[-1]) + MAX_FIELD_CHARS
            return malformed(TOO_LONG, f"a field exceeds {MAX_FIELD_CHARS} characters (noticed on", end)
        if match[2] == "":
            end = len(text.removesuffix("\n").removesuffix("\r"))
            return malformed(MALFORMED, "a quote is never closed (noticed at the end,", end)
        if not text.startswith(delimiter, at) or (len(fields) > max_fields and not is_blank(fields[-1])):
            break
        at += 1
    if text[at : at + 1] not in ("", "\r", "\n", delimiter):
        return malformed(MALFORMED, "text after a closing quote (noticed on", at)
    return Record(number, read, first, fields, len(fields))


def repeats_header(fields: list[str], table: Table, number: int) -> bool:
    """Whether the row on that line is the header again. Raises CommandError if it is a header, but another one."""
    if column_key(fields[table.roles["artist_id"]]) not in table.keys:
        return False
    keys = [*map(column_key, fields)]
    if not {table.keys[table.roles[role]] for role in COLUMNS[:2]} <= {*keys}:
        return False
    if not table.has_header and number <= MAX_HEADER_LINE:
        raise CommandError(f"line {number} is the header; delete the lines above it")
    if keys != table.keys:
        raise CommandError(f"line {number}: a second header that differs from the first; "
                           "split the file before this line and convert the parts one by one")
    return True


def read_record(lines: Iterator[str], number: int, table: Table) -> Record:
    """The row at the beginning of `lines`, of which the first has that number."""
    width = len(table.names)
    record = parse_record(lines, number, table.delimiter, width + MAX_EXTRA_FIELDS)
    line, fields = record.text.rstrip("\r\n"), record.fields
    if record.oddity == MALFORMED:
        fields = line.split(table.delimiter)
        is_half = any(field.lstrip(BLANKS).startswith('"') and field.count('"') == 1 for field in fields)
        if len(fields) == width and not is_half and max(map(len, fields)) <= MAX_FIELD_CHARS:
            record = record._replace(width=width, oddity=TAKEN)
    if not record.is_used:
        return record._replace(fields=[line])
    if is_blank("".join(fields[width:])):
        fields = fields[:width]
        if is_blank("".join(fields)):
            return record._replace(fields=[])
    whole = fields + [""] * (width - len(fields))
    if repeats_header(whole, table, number):
        return record._replace(fields=whole, oddity=REPEATED_HEADER)
    if len(fields) < width and not any(is_blank(whole[table.roles[role]]) for role in COLUMNS[:2]):
        return record._replace(fields=whole, oddity=ENDS_EARLY)
    if len(fields) != width:
        is_whole = record.lines == 1 and len(fields) <= width + MAX_EXTRA_FIELDS
        return record._replace(lines=1, fields=fields if is_whole else [line], oddity=WRONG_WIDTH)
    return record._replace(fields=fields)


class LineReader:
    """Lines of a CSV that can be looked at before they are skipped. `line` is the number of the next one."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.line = 1
        self._lines = lines
        self._ahead: deque[str] = deque()

    def peek_lines(self) -> Iterator[str]:
        for at in itertools.count():
            if at == len(self._ahead):
                self._ahead.extend(itertools.islice(self._lines, 1))
            if at == len(self._ahead):
                return
            yield self._ahead[at]

    def skip_lines(self, number: int) -> None:
        for _ in range(number):
            self._ahead.popleft()
        self.line += number

    def records(self, table: Table) -> Iterator[Record]:
        """The rows that are not blank."""
        while next(self.peek_lines(), ""):
            record = read_record(self.peek_lines(), self.line, table)
            self.skip_lines(record.lines)
            if record.fields:
                yield record


def read_header(reader: LineReader, wanted: Iterable[str]) -> tuple[Table, Record]:
    """The header, the first record that is not blank, as a table without roles. The reader then stands before it.

    If its quoting is malformed, the names are those on its first line, quotes and all. A line `sep=;` before the header
    names the delimiter. Otherwise the delimiter is the one with the most wanted columns or, among equals, columns.
    Raises CommandError if every record is blank.
    """
    delimiters: Iterable[str] = DELIMITERS
    while line := next(reader.peek_lines(), ""):
        if separator := re.fullmatch(r'[\ufeff\u200b]*"?sep=([,;\t|])"?[,;\t| ]*[\r\n]*', line, re.IGNORECASE):
            delimiters = [separator[1]]
        elif line.strip(BLANKS + '",;|'):
            break
        reader.skip_lines(1)
    else:
        raise CommandError("the CSV is empty; it needs a header and at least one row")
    headers = []
    for each in delimiters:
        lines = itertools.islice(reader.peek_lines(), 100)  # a name may hold line ends
        record = parse_record(lines, reader.line, each, sys.maxsize)
        names = [field.strip(BLANKS) for field in (line.split(each) if record.oddity else record.fields)]
        headers.append((Table(each, names, [*map(column_key, names)], {}, True), record))
    keys = {*map(column_key, wanted)}
    return max(headers, key=lambda header: (len(keys.intersection(header[0].keys)), len(header[0].names)))


def find_roles(header: Table, record: Record, columns: dict[str, str], needed: Iterable[str]) -> dict[str, int]:
    """The position of the column of each role. Raises CommandError if there is not exactly one.

    `columns` are the names for the roles. One that no option names may be missing, if it is not needed.
    """
    where, listed = f"line {record.line}: the header", f"its columns are {listed_columns(header.names)}"
    if record.oddity:
        raise CommandError(f"{where} has a quote too many or too few; {listed}")
    roles = {}
    for role, name in columns.items():
        found = [at for at, key in enumerate(header.keys) if key == column_key(name)]
        if len(found) > 1 or (not found and name != role):
            problem = f'names "{name}" {len(found)} times' if found else f'has no column "{name}"'
            raise CommandError(f"{where} {problem}; {listed}")
        if found:
            roles[role] = found[0]
    if missing := [role for role in needed if role not in roles]:
        options = " and ".join(f"--{role.removeprefix('artist_')}-column" for role in missing)
        advice = f"name the right ones with {options}, or use --skip-header if there is no header"
        raise CommandError(f"{where} has no {' and no '.join(missing)}; {listed}; {advice}")
    return roles


def read_table(reader: LineReader, chosen: dict[str, str | None], needed: Sequence[str], skip_header: bool) -> Table:
    """Read the header, or with --skip-header take the columns in their order. The reader then stands at the rows.

    `chosen` are the columns that options name, `needed` the roles that the header must have.
    """
    columns = {role: chosen.get(role) or role for role in COLUMNS}
    header, record = read_header(reader, columns.values())
    if not skip_header or {*COLUMNS} <= {*header.keys}:
        roles = find_roles(header, record, columns, needed)
        roles.setdefault("artist_name", roles["artist_id"])
        reader.skip_lines(record.lines)
        return header._replace(roles=roles)
    roles = {role: at for at, role in enumerate(COLUMNS)}
    tables = [Table(each, [*COLUMNS], [*COLUMNS], roles, False) for each in (header.delimiter, *DELIMITERS)]
    sound = (each for each in tables if not read_record(reader.peek_lines(), reader.line, each).oddity)
    return next(sound, tables[0])


def refuse_to_replace(path: str, kind: str) -> None:
    """Raise CommandError if --out is a file that does not begin like `kind`: requests, results or exported bios."""
    if path == STDOUT or not os.path.isfile(path) or not os.path.getsize(path):
        return
    with os_errors_as(f"read {path}"), open(path, "rb") as file:
        line = file.readline().decode(errors="replace").lstrip("\ufeff")
    keys: set[Any] = {column_key(name.strip('"\r\n')) for name in re.split("[,;\t|]", line)}
    if kind != "exported bios":
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            keys = {*json.loads(line)}
    signs = {"requests": {"custom_id", "body"}, "results": {"custom_id", "error"}}
    if not keys >= signs.get(kind, {"error", "output_tokens"}):
        problem = f"{path} holds something other than {kind}, so it was left as it is"
        raise CommandError(f"{problem}; choose another --out")


# ==== end of the common block ====================================================================================

MAX_BATCH_REQUESTS = 50_000  # Batch API guide, "Rate limits"
MAX_BATCH_BYTES = 200_000_000  # of one input file; Batch API guide, "Rate limits"
DEFAULT_BASE_URL = "https://api.openai.com/v1"
DAY_SECONDS = 24 * 60 * 60
FILE_LIFETIME_SECONDS = 30 * DAY_SECONDS  # of an uploaded file; Batch API guide
PAGE_SIZE = 100  # maximum `limit` of a listing; API reference
MAX_PAGES = 500  # a longer listing is considered endless
MAX_OLD_PAGES = 3  # this many full pages with nothing but older batches end the search
MAX_TRIES = 3  # of one request
MAX_TEXT_CHARS = 200  # of a text from the server, in a message
LOOK_UP_DELAYS = (0.5, 1.5, 3, 5)  # seconds; a new batch may take about ten to be listed
FENCED_LOOK_UP_DELAYS = (2, 3, 5, 10)  # seconds; longer, because a POST may take effect late
SHORT_POLL_SECONDS = 5  # between polls that end soon
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
SECRET = re.compile(  # its first group is kept; `sk-` stands at the start of a word, also behind \\n, \\u0000 or %0A
    r"((?i:Bearer)(?:\s|\\[nrt]|%20)+|(?:(?<![A-Za-z0-9])|(?<=\\[nrtbf])|(?<=\\u[0-9a-f]{4})|(?<=%[0-9A-F]{2}))sk-)"
    r"[^\s\\\"',;]{16,}"
)
REDACTED = "[secret]"
# how web servers report an unknown path, as opposed to an unknown file or batch
NO_SUCH_PATH = re.compile(r"(?is)\s*(<.*|(404 )?(page )?not found\W*|.*invalid url.*)?\s*")
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

    def __init__(self, text: str, status: int | None = None, codes: Container[Any] = (),
                 retry_after: float | None = None, *, no_endpoint: bool = False) -> None:
        super().__init__(text)
        self.status = status
        self.codes = codes
        self.retry_after = retry_after
        self.no_endpoint = no_endpoint


class Refused(ApiError):
    """The API refused the request, so it had no effect. A rate limit (429) is one of these, too."""


class NotFound(Refused):
    """HTTP 404."""


class UnusableId(CommandError):
    """The service names a file or a batch by something that is not an id."""

    def __init__(self, kind: str, value: str) -> None:
        super().__init__(f"not the id of a {kind}: {quoted(value)}")
        self.value = value


class OutcomeUnknown(ApiError):
    """The request may or may not have taken effect: lost connection, time-out, 408, 409, 5xx, unusable response."""


class NotSent(ApiError):
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
    return json.dumps(content, ensure_ascii=False, default=str)


def as_text(value: Any) -> str:
    """Text as it is, null empty, anything else as JSON."""
    return value if isinstance(value, str) else "" if value is None else to_json(value)


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


STRICT_JSON = json.JSONDecoder(parse_constant=refuse_constant)


@functools.cache
def fast_json() -> Callable[..., Any] | None:
    """The JSON decoder that comes with the openai package, which is faster; None if it is missing."""
    with contextlib.suppress(ImportError):
        from jiter import from_json

        return from_json
    return None


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
    decode = STRICT_JSON.decode if strict else json.loads
    return decode(line.rstrip(b"\r\n").decode())


def read_object(line: bytes, *, strict: bool = False) -> Json:
    """The JSON object on a line. Raises ValueError with the reason. `strict` refuses NaN and Infinity."""
    try:
        content = decode_json(line, strict)
    except (ValueError, RecursionError) as error:
        raise ValueError(json_problem(error) if line.strip() else "blank line") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def child_object(content: Json, *names: str) -> Json:
    """The object at the end of this path of names; empty if there is none."""
    for name in names:
        inner = content.get(name)
        if not isinstance(inner, dict):
            return {}
        content = inner
    return content


def objects(value: Any) -> list[Json]:
    """The objects in what should be a list of objects."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def str_field(content: Json, name: str) -> str:
    value = content.get(name)
    return value if isinstance(value, str) else ""


def int_field(content: Json, name: str) -> int | None:
    value = content.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def hide_secrets(text: str) -> str:
    """Replace the API key and the password in the base URL, in every form, and anything that looks like an API key."""
    from urllib.parse import unquote, urlsplit  # takes a while to import

    key, password = os.environ.get("OPENAI_API_KEY", "").strip(), ""
    with contextlib.suppress(ValueError):
        password = urlsplit(os.environ.get("OPENAI_BASE_URL", "").strip()).password or ""
    for secret in (key, json.dumps(key)[1:-1], password, unquote(password)):
        if len(secret) >= 8:
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

    def sleep(self, seconds: float) -> None:
        """Raises TimedOut once the limit has passed."""
        left = self._deadline - self.now()
        if left > 0:
            self._sleep(min(seconds, left))
        if self.now() >= self._deadline:
            raise TimedOut

    @contextlib.contextmanager
    def limit(self, seconds: float | None) -> Iterator[None]:
        """Raise TimedOut in the block after this many seconds, if given, even during a call to a very slow server."""

        def time_out(_number: int, _frame: object) -> None:
            raise TimedOut

        before = signal.signal(signal.SIGALRM, time_out)
        self._deadline = self.now() + (seconds or math.inf)
        signal.setitimer(signal.ITIMER_REAL, seconds or 0, 1)  # every second: a callback may swallow the exception
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


class Input:
    """An open input file that can be read more than once, and its name for messages."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file = file
        self.name = name
        self._stamp = self._size_and_time()

    def _size_and_time(self) -> tuple[int, int]:
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns

    def lines(self) -> Iterator[bytes]:
        with os_errors_as(f"read {self.name}"):
            self.file.seek(0)
            for line in self.file:  # noqa: UP028  `yield from` closes the file when the reader stops early
                yield line

    def is_changed(self) -> bool:
        return self._size_and_time() != self._stamp

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
        yield Input(file, shown(path))


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
    file.seek(start)
    last = deque(filter(bytes.strip, file), maxlen=1)
    try:
        read_object(last.pop().removeprefix(codecs.BOM_UTF8))
    except (IndexError, ValueError):
        return False
    return True


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

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
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
    """What a file is whose first line is no request, and what to do about it. Empty if the line may be one."""
    text = first_line.strip()
    with contextlib.suppress(ValueError):
        line = read_object(text)
        is_result = "body" not in line and ("response" in line or "error" in line)
        return "a results file: name the request file that gen_batch_jsonl.py wrote" if is_result else ""
    if text.startswith((b"PK\x03\x04", b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff")):
        return "an Excel workbook, an archive or UTF-16: convert the CSV in it with gen_batch_jsonl.py"
    if text.startswith((b"{", b"[", b"\xef\xbb\xbf{")) or not text:
        return ""
    kind = "it looks like a CSV" if any(each.encode() in text for each in DELIMITERS) else "it looks like text"
    return f"not JSONL; {kind}: convert it with gen_batch_jsonl.py first"


class PartDivider:
    """Divides lines into parts within the limits of a batch. `file_size` is the number of bytes of all lines so far."""

    def __init__(self, max_requests: int = MAX_BATCH_REQUESTS, max_bytes: int = MAX_BATCH_BYTES) -> None:
        self.file_size = 0
        self.max_bytes = max_bytes
        self._max_requests = max_requests
        self._parts: list[Part] = []
        self._start_part()

    def _start_part(self) -> None:
        self._offset = self.file_size
        self._requests = 0
        self._hash = hashlib.sha256()

    def _end_part(self) -> None:
        if self._requests:
            first, size = sum(part.requests for part in self._parts), self.file_size - self._offset
            self._parts.append(Part("", self._offset, size, first, self._requests, self._hash.hexdigest()))
        self._start_part()

    def add(self, line: bytes) -> None:
        if self._requests == self._max_requests or self.file_size - self._offset + len(line) > self.max_bytes:
            self._end_part()
        self.file_size += len(line)
        self._requests += 1
        self._hash.update(line)

    def parts(self) -> list[Part]:
        """The parts of all lines added."""
        self._end_part()
        return [part._replace(label=f"{n}/{len(self._parts)}") for n, part in enumerate(self._parts, 1)]


class RequestIndex(NamedTuple):
    """The requests of a file, in order.

    It has the position of each custom_id, the sha256 of each line (32 bytes, one after another), and the names of the
    fields that the requests want in an answer; without a schema there are none.
    """

    position_of: dict[str, int]
    digests: bytearray
    fields: dict[str, None]

    def digest(self, position: int) -> bytes:
        return bytes(self.digests[32 * position : 32 * position + 32])


def digest_of(line: bytes) -> bytes:
    """The sha256 of a request's line, without its line end."""
    return hashlib.sha256(line.removesuffix(b"\n")).digest()


def schema_fields(body: Json) -> Iterable[str]:
    """The names of the properties that the schema of a request wants in the answer. Empty without a schema."""
    of_chat = child_object(body, "response_format", "json_schema", "schema", "properties")
    return child_object(body, "text", "format", "schema", "properties") or of_chat


class InputCheck:
    """Finds the errors that the API would find in a request file, and indexes its requests on the way.

    `endpoint` is the first url that is a path, if none is given. Lines are hashed for the index with `hashes_lines`.
    """

    def __init__(self, endpoint: str | None = None, *, hashes_lines: bool = False) -> None:
        self.endpoint = endpoint or ""
        self.index = RequestIndex({}, bytearray(), {})
        self.model: Any = None  # of the first request that has one
        self.without_model = 0
        self._hashes_lines = hashes_lines

    def problems(self, lines: Iterable[bytes], divider: PartDivider | None = None) -> Iterator[Problem]:
        """Add all lines to the index and the divider, and yield what is wrong with them.

        Without a divider, only what every command needs is checked: each line is a request with an id of its own.
        """
        number = 0
        for number, line in enumerate(lines, 1):
            if number == 1 and (guess := guess_content(line)):
                yield Problem(1, "invalid_json_line", guess)
                return
            if self._hashes_lines:
                self.index.digests.extend(digest_of(line))
            if divider:
                divider.add(line)
                if len(line) > divider.max_bytes:
                    message = f"{len(line)} bytes; the limit of a batch is {divider.max_bytes}"
                    yield Problem(number, "invalid_request", message)
            try:
                request = read_object(line, strict=divider is not None)
            except ValueError as error:
                yield Problem(number, "invalid_json_line", str(error))
                continue
            for code, message in itertools.chain(self._add(number, request), self._compare(request) if divider else ()):
                yield Problem(number, code, message)
        if divider and not number:
            yield Problem(1, "empty_file", "the file has no requests")

    def _add(self, number: int, request: Json) -> Iterator[tuple[str, str]]:
        """Index a request, and yield the code and message of each reason why it is none."""
        custom_id, body = request.get("custom_id"), request.get("body")
        if custom_id is None:
            yield "missing_required_parameter", "custom_id is missing"
        elif not isinstance(custom_id, str) or not custom_id:
            yield "invalid_request", "custom_id is not a non-empty string"
        elif (first := self.index.position_of.setdefault(custom_id, number - 1)) != number - 1:
            yield "duplicate_custom_id", f"custom_id {quoted(custom_id)} was already used on line {first + 1}"
        if not isinstance(body, dict):
            yield "invalid_request", "body is not a JSON object"
        else:
            self.index.fields.update(dict.fromkeys(schema_fields(body)))

    def _compare(self, request: Json) -> Iterator[tuple[str, str]]:
        """Note the url and model of a request, and yield the code and message of each reason why a batch refuses it."""
        method, url, body = request.get("method"), request.get("url"), child_object(request, "body")
        if method != "POST":
            yield "invalid_request", f'method is {quoted(method)}, not "POST"'
        if not self.endpoint and isinstance(url, str) and url.startswith("/") and url.isprintable():
            self.endpoint = url
        if not url or url != self.endpoint:
            endpoint = self.endpoint or "a path like /v1/responses"
            yield "url_mismatch", f"url is {quoted(url)}, not {endpoint[:80]}"
        if body.get("stream") is True:
            yield "invalid_request", "body.stream is true; a batch cannot stream"
        if (model := body.get("model")) is None:
            self.without_model += 1
        elif self.model is None:
            self.model = model
        elif model != self.model:
            yield "model_mismatch", f"model is {quoted(model)}, not {quoted(self.model)}; a batch has one model"


class Checked(NamedTuple):
    """A request file without errors: its parts and its index, and what all of its requests have in common."""

    parts: list[Part]
    requests: RequestIndex
    size: int  # in bytes
    endpoint: str
    model: Any


def check_input(requests: Input, console: Console, endpoint: str | None = None,
                max_requests: int = MAX_BATCH_REQUESTS, *, hashes_lines: bool = False) -> Checked:
    """Check a request file, divide it into parts and index it, in one pass.

    If it has errors, print them and raise CommandError.
    """
    check, divider = InputCheck(endpoint, hashes_lines=hashes_lines), PartDivider(max_requests)
    found = 0
    for found, problem in enumerate(check.problems(requests.lines(), divider), 1):
        if found <= MAX_LISTED:
            console.message(str(problem))
    if found > MAX_LISTED:
        console.message(f"… and {found - MAX_LISTED} more")
    if found:
        raise CommandError(f"{requests.name}: {plural(found, 'error')}; correct the file; nothing was uploaded")
    if check.without_model:
        console.warn(f"{plural(check.without_model, 'request')} without body.model, which the Batch API refuses")
    requests.refuse_changes()
    return Checked(divider.parts(), check.index, divider.file_size, check.endpoint, check.model)


def index_requests(requests: Input) -> RequestIndex:
    """Index a request file. Raises CommandError for a line that is not a request, or a custom_id used twice."""
    check = InputCheck(hashes_lines=True)
    for problem in check.problems(requests.lines()):
        raise CommandError(f"{requests.name} {problem}; is --in the request file?")
    return check.index


def split_part(part: Part, requests: BinaryIO) -> list[Part]:
    """The two halves of a part of at least two requests. `requests` is the file that contains it."""
    divider = PartDivider(-(-part.requests // 2))
    requests.seek(part.offset)
    for line in itertools.islice(requests, part.requests):
        divider.add(line)
    return [half._replace(label=f"{part.label}.{n}", offset=part.offset + half.offset, first=part.first + half.first)
            for n, half in enumerate(divider.parts(), 1)]


# ---- batches as the API describes them


class Counts(NamedTuple):
    """The request counts of a batch. Each is None if the API does not give it."""

    completed: int | None
    failed: int | None
    total: int | None


def is_id(value: Any) -> bool:
    """Whether it can be the id of a file or a batch: any text without blanks and control characters."""
    is_plain = isinstance(value, str) and value.isprintable() and not re.search(r"\s", value)
    return is_plain and value not in ("", ".", "..")


def object_id(content: Json, kind: str) -> str:
    """The id of a response. Raises OutcomeUnknown if it has none, so that it is no `kind`, or UnusableId."""
    value = str_field(content, "id")
    if not value:
        raise OutcomeUnknown(f"the response is not a {kind}: {shorten(to_json(content))}")
    if not is_id(value):
        raise UnusableId(kind, value)
    return value


def file_id_field(content: Json, name: str) -> str:
    """A file id of a Batch; empty if null or missing. An odd one is refused where it is used, by `Api.size_of`."""
    value = content.get(name) or ""
    return value if isinstance(value, str) else f"{to_json(value)} (not text)"


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
        """Raises OutcomeUnknown if the content is not a Batch, and UnusableId."""
        if not isinstance(content, dict) or not str_field(content, "status"):
            raise OutcomeUnknown(f"the response is not a batch: {shorten(to_json(content))}")
        counts, usage, metadata = (child_object(content, name) for name in ("request_counts", "usage", "metadata"))
        problems = [
            Problem(int_field(error, "line"), str_field(error, "code"), shorten(str_field(error, "message")))
            for error in objects(child_object(content, "errors").get("data"))
        ]
        return cls(
            id=object_id(content, "batch"),
            status=content["status"].lower().replace("canceled", "cancelled"),
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
    def has_ended(self) -> bool:
        """Whether the status is terminal. An unknown one is not."""
        return self.status in TERMINAL_STATUSES

    @property
    def claims_successes(self) -> bool:
        """Whether it is completed with successes, so that there must be an output file."""
        return self.status == "completed" and bool(self.counts.completed)

    @property
    def says_nothing(self) -> bool:
        """Whether it is completed without a word on its requests: neither counts nor files. They may be answered."""
        return self.status == "completed" and not self.files and not any(self.counts)

    @property
    def may_have_success(self) -> bool:
        """Whether it has not ended, or may have a success by its counts and its output file."""
        completed, failed, total = self.counts
        none_succeeded = completed == 0 and bool(failed or total)
        has_output = bool(self.output_file_id) and not none_succeeded and self.status != "failed"
        return not self.has_ended or has_output or self.claims_successes or self.says_nothing

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
    return sorted(batches, key=lambda batch: (batch.created_at or 0, batch.id))


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
    return json.dumps({**batch.raw, **(saved or {})})


# ---- responses of the API


def json_object(content: bytes) -> Json:
    """The JSON object of a response. Parsed here because the SDK returns a `str` if the content type is not JSON."""
    try:
        return read_object(content)
    except ValueError:
        text = shorten(content.decode(errors="replace"))
        raise NotJson(f"the response is not a JSON object: {text}" if text else "the response is empty") from None


def http_date(text: str) -> float:
    """An HTTP date as Unix seconds; 0 if it is not one."""
    from email.utils import parsedate_to_datetime  # takes a while to import

    try:
        return parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return 0


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a response asks to wait, given as a number or as a date."""
    milliseconds, text = headers.get("retry-after-ms"), headers.get("retry-after", "")
    try:
        seconds = float(milliseconds) / 1000 if milliseconds else float(text)
    except ValueError:
        seconds = http_date(text) - time.time()
    return seconds if 0 < seconds < math.inf else None


def in_words(message: Any) -> str:
    """The message of an error. For a 422, many services send a list of objects: `loc`, what is wrong, and `msg`."""
    texts = []
    for problem in objects(message):
        where = problem.get("loc")
        place = ".".join(map(as_text, where if isinstance(where, list) else [where]))
        texts.append(": ".join(filter(None, (place, as_text(problem.get("msg"))))))
    return "; ".join(filter(None, texts)) or as_text(message)


def error_fields(value: Any) -> tuple[str, str]:
    """Code and message of an error. It may be an object, nested objects as vLLM has them, or a plain string."""
    code: Any = ""
    while isinstance(value, dict):
        code = value.get("code") or value.get("type") or code
        value = value.get("message") or value.get("detail") or value.get("error")
    return str(code), in_words(value)


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
    if no_endpoint and operation == "PREVIEW":
        advice += f" if it is, it has no {error.request.url.path}; choose another --endpoint in gen_batch_jsonl.py"
    kind: type[ApiError] = NotFound if status == 404 else Refused
    if status in (408, 409) or (status >= 500 and status != 501):
        kind = OutcomeUnknown
    text = f"{operation}: HTTP {status}: {shorten(text)}{code}{advice}"
    return kind(text, status, (body.get("code"), body.get("type")), wait, no_endpoint=no_endpoint)


def without_password(url: str) -> str:
    return re.sub("^([a-z0-9]+://)[^/?#]*@", r"\1", url)


def proxy_for(url: str) -> str:
    """The proxy of the environment that requests to the URL go through, for a message. Empty if there is none."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    parts, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return f" through the proxy {without_password(proxy)}" if proxy and not proxy_bypass(parts.netloc) else ""


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
    if isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        why = str(error.__cause__)
        advice = "; if your network has certificates of its own, name their file in SSL_CERT_FILE"
        return NotSent(f"cannot reach {url}{proxy_for(url)}: {why}{advice if 'CERTIFICATE' in why.upper() else ''}")
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
    seconds. With an `outage_budget`, the pauses for both may add up to that many seconds instead, and a 401 or 403 is
    repeated twice. With `repeat_lost=False`, a lost response is not repeated; a request that was not sent always is.
    """

    def __init__(self, tries: int = MAX_TRIES, rate_limit_budget: float = RATE_LIMIT_BUDGET,
                 outage_budget: float = 0, *, repeat_lost: bool = True) -> None:
        self._tries_left = tries
        self._seconds_left = outage_budget or rate_limit_budget
        self._outlives_outages = bool(outage_budget)
        self._repeat_lost = repeat_lost
        self._failures = 0

    def pause_after(self, failure: ApiError) -> float | None:
        """Seconds to wait after a failure; None to give up."""
        self._failures += 1
        pause = max(failure.retry_after or 0, min(0.5 * 2.0 ** min(self._failures - 1, 10), MAX_PAUSE))
        is_lost = isinstance(failure, OutcomeUnknown)
        if is_lost and (failure.status == 409 or not self._repeat_lost):
            return None  # a conflict would recur, and a lost request may have taken effect
        is_lost = is_lost or isinstance(failure, NotSent)
        if is_rate_limit(failure) or (is_lost and self._outlives_outages and not isinstance(failure, WrongSize)):
            if self._outlives_outages:
                pause = min(pause, self._seconds_left)
            self._seconds_left -= pause
            return pause if pause and self._seconds_left >= 0 else None
        if is_lost:
            self._tries_left -= 1
            return min(pause, RATE_LIMIT_BUDGET) if self._tries_left > 0 else None
        is_denied = failure.status in (401, 403) and self._outlives_outages
        return min(pause, RATE_LIMIT_BUDGET) if is_denied and self._failures < MAX_TRIES else None


# ---- the log


class Log:
    """Writes each event as one line, flushed immediately, without secrets.

    A line that cannot be written does not keep what was paid for from being used. `failure` says why; from then on, no
    request is made.
    """

    def __init__(self, file: BinaryIO, path: str) -> None:
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
        line = f"{redact(f'{moment} {level} {message}')}\n".encode(errors="backslashreplace")
        try:
            with os_errors_as(f"write the log {self._path}", "; choose another with --log-file"):
                while line:  # a disk that is nearly full takes a part
                    line = line[self._file.write(line) :]
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
    with open(descriptor, "ab", buffering=0) as file:
        log = Log(file, path)
        yield log
    if log.failure:
        raise log.failure


# ---- the API


class Page(NamedTuple):
    """One page of the listing of batches. Entries without an id or a status are left out, and counted as `odd`."""

    batches: list[Batch]
    odd: int
    has_more: bool | None  # None if the API does not say
    server_time: float  # Unix seconds, by the server's Date header; else by this machine's clock

    @classmethod
    def parse(cls, content: Json, headers: Mapping[str, str]) -> Page:
        data, has_more = content.get("data"), content.get("has_more")
        if not isinstance(data, list):
            raise OutcomeUnknown("the response is not a list of batches")
        batches = []
        for item in data:
            with contextlib.suppress(OutcomeUnknown, UnusableId):
                batches.append(Batch.parse(item))
        has_more = has_more if isinstance(has_more, bool) else None
        return cls(batches, len(data) - len(batches), has_more, http_date(headers.get("date", "")) or time.time())


class FileInfo(NamedTuple):
    """A File object of the API. `size` is None if the API does not give it (no `bytes`, or 0)."""

    id: str
    size: int | None

    @classmethod
    def parse(cls, content: Json) -> FileInfo:
        return cls(object_id(content, "file"), int_field(content, "bytes") or None)


class Api(NamedTuple):
    """The API calls that the commands make. Each is logged, and repeated after a failure if that cannot cost anything.

    They raise Refused if the API refuses, and OutcomeUnknown if no try got a usable response. It is a NamedTuple so
    that `_replace(outage_budget=…)` makes a patient copy, which keeps trying for that many seconds during an outage.
    """

    client: OpenAI
    url: str  # the base URL without a password, for messages
    log: Log
    console: Console
    clock: Clock
    verbose: bool
    told: set[str]  # warnings that were given and models that were looked at: each once
    outage_budget: float = 0

    def warn_once(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            self.console.warn(text)

    def call_with_retries(self, operation: str, logged_as: Json, attempt: Callable[[], tuple[T, Any]],
                          retry: Retry | None = None) -> T:
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

    def call_sdk(self, operation: str, parameters: Json, send: Callable[..., Any], parse: Callable[[Json], T],
                 retry: Retry | None = None) -> T:
        """Call a raw-response method of the SDK, and parse the JSON object of its response."""

        def attempt() -> tuple[T, Json]:
            content = json_object(send(**parameters).content)
            return parse(content), content

        return self.call_with_retries(operation, parameters, attempt, retry)

    def upload(self, requests: Input, part: Part, name: str) -> FileInfo:
        def send(**_logged: Any) -> Any:  # the log names the part; the SDK gets a new file object for each try
            file = cast(BinaryIO, FilePart(requests.file, part.offset, part.size))
            create = self.client.files.with_raw_response.create
            return create(file=(name, file), purpose="batch", timeout=UPLOAD_SECONDS)

        return self.call_sdk("UPLOAD", {"file": name, **part._asdict()}, send, FileInfo.parse)

    def create_batch(self, request: Json) -> Batch:
        """POST a batch once. It is never repeated here, because each POST could be charged for."""
        send = self.client.batches.with_raw_response.create
        return self.call_sdk("CREATE_BATCH", request, send, Batch.parse, Retry(tries=1, rate_limit_budget=0))

    def batch(self, batch_id: str) -> Batch:
        return self._call_for_batch("GET_STATUS", batch_id, self.client.batches.with_raw_response.retrieve)

    def cancel(self, batch_id: str) -> Batch:
        send = self.client.batches.with_raw_response.cancel
        return self._call_for_batch("CANCEL_BATCH", batch_id, send, Retry(repeat_lost=False))

    def _call_for_batch(self, operation: str, batch_id: str, send: Callable[..., Any],
                        retry: Retry | None = None) -> Batch:
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
            if page.odd:
                self.warn_once("an entry in the listing of batches has no id or no status, so it is passed over")
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

        Raises NotFound if the file is gone, and UnusableId.
        """
        if not is_id(file_id):
            raise UnusableId("file", file_id)
        send = self.client.files.with_raw_response.retrieve
        size = None
        try:
            size = self.call_sdk("DOWNLOAD_RESULTS", {"file_id": file_id}, send, FileInfo.parse).size
        except Refused as failure:
            if failure.status not in (404, 405, 501):  # a service may lack this endpoint
                raise

        def is_empty() -> tuple[bool, Json]:
            empty = not any(self._stream(file_id))
            return empty, {"empty": empty}

        logged = {"file_id": file_id, "range": "first bytes"}
        return 0 if size is None and self.call_with_retries("DOWNLOAD_RESULTS", logged, is_empty) else size

    def _stream(self, file_id: str) -> Iterator[bytes]:
        import httpx2

        try:
            with self.client.files.with_streaming_response.content(file_id) as response:
                yield from response.iter_bytes(CHUNK_BYTES)
        except httpx2.HTTPError as error:
            why = str(error) or type(error).__name__
            raise OutcomeUnknown(f"download of {file_id} from {self.url} was interrupted: {why}") from error

    def fetch(self, file_id: str, out: BinaryIO, name: str) -> int:
        """Append the file to `out`, unless it is empty, and return its size."""
        size = self.size_of(file_id)
        return 0 if size == 0 else self.download(file_id, size, out, name)

    def download(self, file_id: str, size: int | None, out: BinaryIO, name: str) -> int:
        """Append the file to `out`, and return its size.

        If `size` is unknown, check that the last line is a JSON object.
        """
        start = out.tell()

        def attempt() -> tuple[int, Json]:
            out.seek(start)
            out.truncate()
            out.writelines(self._stream(file_id))
            received = out.tell() - start
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
        """Look at the model, once. Raise CommandError if it does not exist. Warn if it is or will soon be shut down."""
        if not isinstance(model, str) or model in ("", ".", "..", *self.told):  # the SDK refuses a path of dots
            return
        self.told.add(model)
        send = functools.partial(self.client.models.with_raw_response.retrieve, timeout=MODEL_SECONDS)
        try:
            content = self.call_sdk("GET_MODEL", {"model": model}, send, dict, Retry(tries=1, rate_limit_budget=0))
        except ApiError as failure:
            if failure.status == 404 and "model_not_found" in failure.codes:
                problem = f"the model {quoted(model)} does not exist at {self.url}"
                raise CommandError(f"{problem}; choose another model; nothing was sent") from None
            return
        with contextlib.suppress(ValueError):
            shutdown = datetime.date.fromisoformat(str_field(content, "shutdown_date")[:10])
            today = datetime.date.today()
            if shutdown <= today + datetime.timedelta(days=SHUTDOWN_WARNING_DAYS):
                when = f"{'was' if shutdown < today else 'will be'} shut down on {shutdown}"
                self.console.warn(f"the model {quoted(model)} {when}; choose a newer one")

    def send_now(self, request: Json) -> Json:
        """Send one request to its endpoint, not as a batch, and return its results line.

        It is repeated only if it was not carried out.
        """
        import httpx2
        import openai

        def attempt() -> tuple[Json, Json]:
            try:
                response = self.client.post(
                    request["url"].removeprefix("/v1"), cast_to=httpx2.Response,
                    content=json.dumps(request["body"], separators=(",", ":")).encode(),
                    options={"timeout": ANSWER_SECONDS, "headers": {"Content-Type": "application/json"}},
                )
            except openai.APIStatusError as error:
                if error.status_code not in (400, 413, 422) or not isinstance(error.body, dict):
                    raise
                response = error.response  # only this request was refused
            field = {"status_code": response.status_code, "body": json_object(response.content)}
            return {"custom_id": request["custom_id"], "response": field}, field

        try:
            return self.call_with_retries("PREVIEW", request, attempt, Retry(repeat_lost=False))
        except OutcomeUnknown as failure:
            error = {"code": "outcome_unknown", "message": str(failure)}
            return {"custom_id": request["custom_id"], "response": None, "error": error}


def header_value(name: str) -> str:
    """An environment variable that is sent in a header, without the blanks around it."""
    value = os.environ.get(name, "").strip()
    if not value.isascii() or not value.isprintable():
        raise CommandError(f"{name} contains control or non-ASCII characters; set it again")
    return value


def base_url() -> str:
    from urllib.parse import urlsplit

    url = os.environ.get("OPENAI_BASE_URL", "").strip() or DEFAULT_BASE_URL
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if re.fullmatch("(?i:https?)://[!-~]+", url) and parts.port != 0 and (parts.hostname or "").encode("idna"):
            return url
    raise CommandError("OPENAI_BASE_URL is not a URL like https://api.openai.com/v1; set it again or unset it")


@contextlib.contextmanager
def connect(args: argparse.Namespace, console: Console, clock: Clock) -> Iterator[Api]:
    """Open the log and a client for the service that the environment names. Sends nothing yet."""
    if not (key := header_value("OPENAI_API_KEY")):
        raise CommandError("OPENAI_API_KEY is not set; export it with the key of your OpenAI project")
    url = base_url()
    organization, project = header_value("OPENAI_ORG_ID") or None, header_value("OPENAI_PROJECT_ID") or None
    with open_log(args.log_file) as log:
        log.info(f"START {to_json([PROG, *args.argv])}")
        # signals wait: an interpreter callback during the imports would swallow the exception that they raise
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:
            import httpx2
            import openai
        except ImportError as error:
            advice = "pip install -r requirements.txt, or use the Python of a virtual environment that has it"
            raise CommandError(f"the openai package cannot be imported ({error}); {advice}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            http = openai.DefaultHttpxClient(follow_redirects=False)  # the key goes to no other server
            client = openai.OpenAI(api_key=key, organization=organization, project=project, base_url=url,
                                   max_retries=0, timeout=REQUEST_SECONDS, http_client=http)
        except (httpx2.InvalidURL, ValueError, ImportError, OSError) as error:  # unusable proxy or certificate settings
            advice = "check the proxy and certificate variables"
            raise CommandError(f"cannot set up the API client: {error}; {advice}") from None
        with client:
            yield Api(client, without_password(str(client.base_url)), log, console, clock, args.verbose, set())


# ---- results lines

SUCCEEDED, REJECTED, RETRYABLE, MISSING, OUTDATED = "succeeded", "rejected", "retryable", "missing", "outdated"
PHASE_RANKS = {"final_answer": 3, "": 2, "commentary": 0}  # of the messages of a Response; others have 1
UNREADABLE = "unreadable"  # code of a results line that is no JSON or no UTF-8
TO_SEND = frozenset({RETRYABLE, MISSING, OUTDATED})


class Tokens(NamedTuple):
    """The tokens of a response, of which those for reasoning are output; each None if the response does not say."""

    input: int | None = None
    output: int | None = None
    reasoning: int | None = None

    def plus(self, other: Tokens) -> Tokens:
        return Tokens((self.input or 0) + (other.input or 0), (self.output or 0) + (other.output or 0))


class Outcome(NamedTuple):
    """How a request ended, according to its results line, and why.

    `text` is the text of the answer, `values` the JSON object in it if the requests carry a schema.
    """

    kind: str  # SUCCEEDED, REJECTED, RETRYABLE, MISSING or OUTDATED
    code: str = ""
    message: str = ""
    text: str = ""
    values: Json | None = None
    tokens: Tokens = Tokens()

    def error(self) -> str:
        return ": ".join(filter(None, (self.code, self.message)))


def results_object(line: bytes) -> Json:
    """A results line decoded. One that is no JSON or no UTF-8 becomes what `run` writes in its place.

    Raises ValueError with the reason if such a line names no custom_id.
    """
    try:
        return read_object(line)
    except ValueError as error:
        found = re.search(rb'"custom_id"\s*:\s*("([^"\\]|\\.)+")', line)
        with contextlib.suppress(ValueError):  # the custom_id may be the part that cannot be read
            custom_id = json.loads(found[1] if found else b"")
            text = line.decode(errors="backslashreplace").rstrip()
            problem = {"code": UNREADABLE, "message": str(error), "line": text}
            return {"id": None, "custom_id": custom_id, "response": None, "error": problem}
        raise


def text_and_refusal(parts: Any, kind: str) -> tuple[str, str]:
    """The texts in the parts of a message that are of this type, joined, and its refusal."""
    found = objects(parts)
    text = "".join(str(part.get("text") or "") for part in found if part.get("type") == kind)
    return text, "".join(str(part.get("refusal") or "") for part in found if part.get("type") == "refusal")


def response_words(output: Any) -> tuple[str, str, str]:
    """The text and the refusal of a Response, and the code for it if it has neither.

    They are those of the last message of the best phase that has one: those before it are drafts. Commentary is no
    answer.
    """
    best, text, refusal = -1, "", ""
    for item in objects(output):
        if item.get("type") == "message":
            rank = PHASE_RANKS.get(str(item.get("phase") or ""), 1)
            words, refused = text_and_refusal(item.get("content"), "output_text")
            if rank > best or (rank == best and (refused or words.strip())):
                best, text, refusal = rank, words, refused
    return ("", "", "commentary") if best == 0 else (text, refusal, "no_text")


def chat_words(choice: Json) -> tuple[str, str, str]:
    """The same of a chat completion. Its content is a string, or parts, of which only those of type `text` count."""
    message = child_object(choice, "message")
    content = message.get("content")
    text, refusal = text_and_refusal(content, "text")
    return content if isinstance(content, str) else text, str(message.get("refusal") or refusal), "no_text"


def without_thinking(text: str) -> str:
    """Leave out `<think>…</think>` at the beginning, also without its opening, and all of a block that never closes."""
    while "</think>" in text:
        thought, _, rest = text.partition("</think>")
        if "<think>" in thought and not thought.lstrip().startswith("<think>"):
            return text
        text = rest.lstrip()
    return "" if text.lstrip().startswith("<think>") else text


def json_answer(text: str) -> Json | None:
    """The JSON object that a text is, with or without a code fence around it; None if it is none."""
    fenced = re.fullmatch(r"\s*(```+|~~~+)[^\n{]*(.*)\1\s*", text, re.DOTALL)
    try:
        content = STRICT_JSON.decode((fenced[2] if fenced else text).strip(BLANKS))
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def says_something(error: Any, depth: int = 9) -> bool:
    """Whether there is an error: null, {}, "" and an object of nulls and empty strings say nothing."""
    if isinstance(error, dict) and depth:
        return any(says_something(value, depth - 1) for value in error.values())
    return bool(error)


def token_usage(body: Json) -> Tokens:
    usage = child_object(body, "usage")
    details = child_object(usage, "output_tokens_details") or child_object(usage, "completion_tokens_details")
    counts = (usage.get("input_tokens", usage.get("prompt_tokens")),
              usage.get("output_tokens", usage.get("completion_tokens")), details.get("reasoning_tokens"))
    return Tokens(*[count if type(count) is int and 0 <= count < 10**15 else None for count in counts])


def classify_2xx(body: Any, top_error: Any, fields: Collection[str]) -> Outcome:
    """The outcome of a response that the service counts as answered, and charges for.

    It is sent again only if its status is `failed` or `cancelled`. What is not understood is rejected.
    """
    if not isinstance(body, dict):
        return Outcome(REJECTED, "not_understood", error_fields(top_error)[1] or f"body is {quoted(body)}")
    choice = {} if "output" in body else next(iter(objects(body.get("choices"))), {})
    text, refusal, nothing = response_words(body["output"]) if "output" in body else chat_words(choice)
    text = without_thinking(text)
    values = json_answer(text) if fields else None
    status = str(body.get("status") or "completed").lower().replace("canceled", "cancelled")
    errors = [error for error in (body.get("error"), top_error) if says_something(error)]
    code, message = error_fields(errors[0]) if errors else ("", "")
    if status == "completed" and text.strip() and not (errors or refusal or fields or choice):  # nearly all of them
        return Outcome(SUCCEEDED, text=text, tokens=token_usage(body))
    cut_off = str(child_object(body, "incomplete_details").get("reason") or "")
    finish_reason = str(choice.get("finish_reason")).lower()
    cases = (
        (status in ("failed", "cancelled"), RETRYABLE, code or status, message),
        (status == "incomplete", REJECTED, "incomplete", cut_off),
        (finish_reason in ("length", "max_tokens", "content_filter"), REJECTED, "incomplete", finish_reason),
        (bool(errors), REJECTED, code or "error", message),
        (status != "completed", REJECTED, "not_understood", f'status is "{status}"'),
        (bool(refusal), REJECTED, "refusal", refusal),
        (not text.strip(), REJECTED, nothing, ""),
        (bool(fields) and values is None, REJECTED, "invalid_json", ""),
        (True, SUCCEEDED, "", ""),
    )
    kind, code, message = next(words for is_so, *words in cases if is_so)
    return Outcome(kind, code, message, text, values, token_usage(body))


def classify(result: Json, fields: Collection[str] = ()) -> Outcome:
    """How the request of a results line ended. `run`, `retry`, `export` and `preview` all use this.

    `fields` are the properties of the schema that the requests carry, if any.
    """
    response, top_error = result.get("response"), result.get("error")
    if not isinstance(response, dict):
        code, message = error_fields(top_error)
        kind = {MISSING: MISSING, UNREADABLE: REJECTED}.get(code, RETRYABLE)
        return Outcome(kind, code or "no_response", message)
    status, body = response.get("status_code"), response.get("body")
    if isinstance(body, str):
        with contextlib.suppress(ValueError, RecursionError):
            body = json.loads(body)
    if status in (None, "") and isinstance(body, dict) and ("output" in body or "choices" in body):
        status = 200
    digits = re.match(r"\s*([0-9]{3})(?![0-9])", str(status))  # it may stand in quotes, as "200" or "200 OK"
    number = int(digits[1]) if digits else 0
    if 200 <= number < 300:
        return classify_2xx(body, top_error, fields)
    errors = (body.get("error"), body, top_error) if isinstance(body, dict) else (body, top_error)
    code, message = next(filter(any, map(error_fields, errors)), ("", ""))
    kind = REJECTED if 400 <= number < 500 and number not in (408, 409, 429) else RETRYABLE
    return Outcome(kind, code or ("no_status" if status is None else f"http_{status}"), message)


def ranked(counts: Counter[str], shown_as: Callable[[str], str] = str) -> str:
    """The five most common texts, each with its count."""
    return "; ".join(f"{number} × {shown_as(text)}" for text, number in counts.most_common(5))


class ResultsLine(NamedTuple):
    """A results line: the outcome, and where its bytes are.

    `sha256` is the hash of the request, if that is another one than in the request file: `unknown` if its batch did not
    send it, empty if nothing says it.
    """

    outcome: str  # the kind of an Outcome
    code: str
    file: BinaryIO
    offset: int
    size: int
    sha256: str = ""

    def read(self) -> bytes:
        """The line without a byte-order mark and its line end."""
        return os.pread(self.file.fileno(), self.size, self.offset).removeprefix(codecs.BOM_UTF8).rstrip()


class Match(NamedTuple):
    """What a results line belongs to.

    `position` is that of the request with its custom_id, None if there is none. `is_current` says whether that request
    is the one that was answered.
    """

    position: int | None
    is_current: bool
    outcome: Outcome


class BatchLines(NamedTuple):
    """What a file of a batch has: how its requests ended, and how many lines match no request."""

    outcomes: dict[int, str]  # kinds by position
    unknown: int  # lines with a custom_id that the batch's input file does not have
    unreadable: int  # lines that name no custom_id
    tokens: Tokens  # of the lines that count


Place = tuple[BinaryIO, int, int]  # where a line is: its file, its offset, its size


def lines_with_places(file: BinaryIO, name: str, start: int = 0) -> Iterator[tuple[int, Place, bytes]]:
    """The lines of a file from the offset `start` on without byte-order marks, each with its number and its place."""
    offset = start
    with os_errors_as(f"read {name}"):
        file.seek(start)
        for number, line in enumerate(file, 1):
            yield number, (file, offset, len(line)), line.removeprefix(codecs.BOM_UTF8)
            offset += len(line)


class Results:
    """The best results line of every request.

    A success wins, then the last line of this request, then a line of another version of it. The lines stay in their
    files, which must stay open.
    """

    def __init__(self, requests: RequestIndex, console: Console) -> None:
        self.requests = requests
        self.best: list[ResultsLine | None] = [None] * len(requests.position_of)  # in request order
        self.others: list[ResultsLine] = []  # answers to other requests that the output keeps
        self.of_other_requests = 0  # successes of other requests, whether kept or not
        self.gone = 0  # those in --out whose custom_id the request file does not have
        self.ignored = 0  # lines that are not results of any request
        self.tokens = Tokens(0, 0)  # where lines of a request have the same outcome, only the first counts
        self._console = console

    def read(self, source: Input) -> None:
        """Index a file of --results. Warns of lines that are no results of this request file.

        Raises CommandError if it has lines, but no results line.
        """
        problems: list[str] = []  # of the first lines that have one
        found, ignored, seems = 0, 0, ""
        for number, place, line in lines_with_places(source.file, source.name):
            problem = ""
            try:
                result = results_object(line)
                match = self.add(result, place, keeps=False)
                found += 1
                if match.position is None and not str_field(result, "request_sha256"):
                    problem = f"custom_id {quoted(result['custom_id'])} is not in the request file"
                elif match.outcome.code == UNREADABLE and UNREADABLE.encode() not in line:  # not as `run` writes it
                    problems.append(f"line {number}: {match.outcome.message}; its request counts as rejected")
            except ValueError as error:
                problem = str(error)
                seems = seems or guess_content(line).partition(":")[0] or problem
            ignored += problem != ""
            if problem and len(problems) < MAX_LISTED:
                problems.append(f"line {number}: {problem}; line ignored")
        if ignored and not found:
            raise CommandError(f"{source.name} has no results line ({seems}); name a file that run, status, wait or "
                               "retrieve wrote")
        for problem in problems[: MAX_LISTED - min(self.ignored, MAX_LISTED)]:
            self._console.warn(f"{source.name} {problem}")
        self.ignored += ignored

    def read_out(self, out: Input, *, yields: bool = False) -> None:
        """Index the file that --out is to replace. Raises CommandError if it holds anything but results lines.

        With `yields`, its answers do not replace those that are known.
        """
        for number, place, line in lines_with_places(out.file, out.name):
            try:
                match = self.add(read_object(line), place, yields=yields)
            except ValueError as error:
                raise CommandError(f"{out.name} holds something other than results (line {number}: {error}), so it was "
                                   "left as it is; choose another --out") from None
            self.gone += match.position is None and match.outcome.kind == SUCCEEDED

    def read_batch(self, file: BinaryIO, name: str, start: int, sent_digests: Mapping[str, bytes] | None, *,
                   is_earlier: bool) -> BatchLines:
        """Index a file of a batch, from `start` on.

        `sent_digests` has the digest of each of its requests by custom_id, if they may differ from the request file.
        The successes of an earlier batch do not replace those that were there before the run.
        """
        outcomes: dict[int, str] = {}
        tokens, unknown, unreadable = Tokens(0, 0), 0, 0
        for _, place, line in lines_with_places(file, name, start):
            try:
                result = results_object(line)
                sha256 = ""
                if sent_digests is not None:
                    sha256 = sent_digests.get(str_field(result, "custom_id"), b"").hex() or "unknown"
                match = self.add(result, place, sha256, yields=is_earlier)
            except ValueError:
                unreadable += 1
                continue
            if match.position is not None and match.is_current:
                outcomes[match.position] = match.outcome.kind
                if (best := self.best[match.position]) and (best.file, best.offset) == place[:2]:
                    tokens = tokens.plus(match.outcome.tokens)
            unknown += sha256 == "unknown" or (match.position is None and not sha256)
        return BatchLines(outcomes, unknown, unreadable, tokens)

    def add(self, result: Json, place: Place, sha256: str = "", *, keeps: bool = True, yields: bool = False) -> Match:
        """Index a results line. `sha256` is the hash of its request, if the line does not say.

        Raises ValueError if it is not a results line. With `keeps`, an answer to another request is kept for the
        output. With `yields`, it replaces no success of another file, and a rejection there only if it is a success.
        """
        custom_id = result.get("custom_id")
        if not isinstance(custom_id, str):
            raise ValueError("not a results line (no custom_id)")
        if not ("response" in result or "error" in result):
            missing = "it is a request" if "body" in result else "no response and no error"
            raise ValueError(f"not a results line ({missing})")
        sha256 = str_field(result, "request_sha256") or sha256
        outcome = classify(result, self.requests.fields)
        code = outcome.error() if outcome.code == "incomplete" else outcome.code  # with the reason, if incomplete
        line = ResultsLine(outcome.kind, sys.intern(code[:80]), *place)
        position = self.requests.position_of.get(custom_id)
        if position is not None and (not sha256 or sha256 == self.requests.digest(position).hex()):
            self._add_current(position, line, outcome, yields=yields)
            return Match(position, True, outcome)
        if position is not None and self.best[position] is None:
            self.best[position] = line._replace(outcome=OUTDATED, code="")
        if keeps and outcome.kind in (SUCCEEDED, REJECTED):
            self.others.append(line._replace(sha256=sha256))
        self.of_other_requests += outcome.kind == SUCCEEDED and (keeps or bool(sha256))
        return Match(position, False, outcome)

    def _add_current(self, position: int, line: ResultsLine, outcome: Outcome, *, yields: bool) -> None:
        known = self.best[position]
        is_older = yields and known is not None and known.file != line.file
        is_success = line.outcome == SUCCEEDED
        # whether the known line stays, by its outcome; one that is not here never does
        stays = {SUCCEEDED: is_older or not is_success, REJECTED: is_older and not is_success}
        if line.outcome == MISSING or (known and stays.get(known.outcome)):
            return
        if known is None or known.outcome != line.outcome:  # otherwise it may be the same line, from a second file
            self.tokens = self.tokens.plus(outcome.tokens)
        self.best[position] = line

    def outcome_at(self, position: int) -> str:
        line = self.best[position]
        return line.outcome if line else MISSING

    def outcomes(self) -> Counter[str]:
        return Counter(line.outcome if line else MISSING for line in self.best)

    def positions(self, wanted: Container[str]) -> set[int]:
        """The positions of the requests with one of the wanted outcomes."""
        return {position for position in range(len(self.best)) if self.outcome_at(position) in wanted}

    def most_common_errors(self) -> str:
        """The five most common errors, each with its count and an example of its message."""
        examples = {line.code: line for line in reversed(self.best) if line and line.code}

        def shown_as(code: str) -> str:
            outcome = classify(results_object(examples[code].read()), self.requests.fields)
            return ": ".join(filter(None, (outcome.code, shorten(outcome.message))))

        return ranked(Counter(line.code for line in self.best if line and line.code), shown_as)

    def summary(self) -> str:
        """The totals, worded the same for every command."""
        outcomes = self.outcomes()
        kinds = [SUCCEEDED, REJECTED, RETRYABLE, MISSING, *([OUTDATED] if outcomes[OUTDATED] else [])]
        counted = ", ".join(f"{outcomes[kind]} {kind}" for kind in kinds)
        text = f"{counted} of {plural(len(self.best), 'request')}"
        if any(self.tokens):
            text += f"; tokens: {self.tokens.input} input, {self.tokens.output} output"
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


def with_request_sha256(results_line: ResultsLine, sha256: str) -> bytes:
    """A results line as `run` writes it: with the sha256 of its request as the last key, and a line end."""
    line = results_line.read()
    if results_line.code == UNREADABLE:
        line = to_json(results_object(line)).encode(errors="backslashreplace")
    if not sha256 or re.search(rb'"request_sha256":\s*"[^"\\]+"\s*\}$', line):
        return line + b"\n"
    return line[:-1].rstrip() + f', "request_sha256": "{sha256}"}}\n'.encode()


def missing_line(custom_id: str) -> bytes:
    error = {"code": MISSING, "message": "the request is in no output or error file of its batches"}
    line = to_json({"id": None, "custom_id": custom_id, "response": None, "error": error})
    return line.encode(errors="backslashreplace") + b"\n"


def result_lines(results: Results) -> Iterator[bytes]:
    """The lines of `run`'s output: one for each request in request order, then the answers to other requests."""
    index = results.requests
    for position, (custom_id, line) in enumerate(zip(index.position_of, results.best, strict=True)):
        if line is None or line.outcome == OUTDATED:
            yield missing_line(custom_id)
        else:
            yield with_request_sha256(line, index.digest(position).hex())
    seen: set[bytes] = set()
    for other in results.others:
        content = with_request_sha256(other, other.sha256)
        if (digest := hashlib.sha256(content).digest()) not in seen:  # the same line may have been read from two files
            seen.add(digest)
            yield content


# ---- bios

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # Excel treats a cell that begins with one of these as a formula


def artist_name(request: Json) -> str:
    """The name that the converter put into a request: in the prompt's variables, or in the metadata."""
    body = child_object(request, "body")
    variables, metadata = child_object(body, "prompt", "variables"), child_object(body, "metadata")
    return str_field(variables, "artist_name") or str_field(metadata, "artist_name")


def artist_label(request: Json) -> str:
    return f"{request['custom_id']} {artist_name(request)}".rstrip()


def bio_columns(fields: Collection[str]) -> list[str]:
    """The columns of an export. `fields` are the properties of the schema, if the requests carry one."""
    return ["artist_id", "artist_name", *(fields or ["bio"]), "error", "input_tokens", "output_tokens"]


def answer_texts(outcome: Outcome, fields: Iterable[str]) -> dict[str, str]:
    """The text of an answer, or of each of its fields by name."""
    return {"": outcome.text} if outcome.values is None else {key: as_text(outcome.values.get(key)) for key in fields}


def outcome_of(line: ResultsLine | None, fields: Collection[str]) -> Outcome:
    """The outcome of a request, by its best results line."""
    if line is None or line.outcome == OUTDATED:
        return Outcome(OUTDATED, OUTDATED) if line else Outcome(MISSING, MISSING)
    return classify(results_object(line.read()), fields)


def bio_cells(outcome: Outcome, fields: Collection[str]) -> list[str]:
    """The cells of a request, from the bio on. The bio is left out where there is an error."""
    tokens = ["" if count is None else str(count) for count in outcome.tokens[:2]]
    if outcome.kind != SUCCEEDED:
        return [*[""] * max(1, len(fields)), outcome.error(), *tokens]
    return [*answer_texts(outcome, fields).values(), "", *tokens]


def csv_field(field: str, delimiter: str) -> str:
    if delimiter in field or '"' in field or "\n" in field or "\r" in field:
        return '"' + field.replace('"', '""') + '"'
    return field


def csv_line(fields: Iterable[str], delimiter: str = ",") -> bytes:
    """The fields as csv.writer writes them, in a quarter of the time. A lone surrogate becomes a question mark."""
    return (delimiter.join([csv_field(field, delimiter) for field in fields]) + "\r\n").encode(errors="replace")


def guarded(fields: Iterable[str]) -> Iterator[str]:
    """The fields with a `'` before each that Excel would treat as a formula."""
    return ("'" + field if field.startswith(FORMULA_STARTS) else field for field in fields)


# ---- submitting


class NotedFile(NamedTuple):
    """What a note says of an uploaded file."""

    sha256: str  # of the part
    name: str  # of the request file
    batch: str | None  # its id; empty if the file can no longer become a batch, None if a POST has no outcome yet


class Note:
    """A record, on this machine, of the files uploaded from one request file and of their batches.

    A file is noted before its POST, its batch after it. The server has the final say; the note only covers what the
    listing does not show. It may be deleted at any time. `files` are by their id, `others` are the paths of the notes
    of other request files at the same service.
    """

    def __init__(self, console: Console, file: BinaryIO | None = None, others: Sequence[str] = ()) -> None:
        self.files: dict[str, NotedFile] = {}
        self.others = others
        self._file_of_batch: dict[str, str] = {}
        self._console = console
        self._file = file
        for line in file or ():
            with contextlib.suppress(ValueError):  # a crash may have cut a line short
                self._apply(read_object(line))

    def _apply(self, entry: Json) -> None:
        file_id, batch = str_field(entry, "file"), entry.get("batch")
        known = self.files.get(file_id) or NotedFile(str_field(entry, "sha256"), str_field(entry, "name"), None)
        if is_id(file_id):
            self.files[file_id] = known._replace(batch=batch if isinstance(batch, str) else None)
            self._file_of_batch[str_field(entry, "batch")] = file_id

    def add(self, file_id: str, **fields: str) -> None:
        """Note the `sha256` and the `name` of an uploaded file before each POST of it, or its `batch` afterwards.

        The line is on disk when this returns. If it cannot be written, warn: a full disk must not stop the command.
        """
        entry = {"file": file_id, **fields}
        self._apply(entry)
        try:
            if self._file:  # a line end before it, too: the line there may be cut short
                self._file.write(b"\n" + to_json(entry).encode(errors="replace") + b"\n")
                os.fsync(self._file.fileno())
        except OSError as error:
            self._console.warn(f"cannot write the note of what was submitted: {error.strerror}")

    def batch_ids(self) -> set[str]:
        return {noted.batch for noted in self.files.values() if noted.batch}

    def file_of(self, batch: Batch) -> str:
        """The id of the uploaded file of a batch: the one it names, or the one noted for it. Empty if not noted."""
        return batch.input_file_id if batch.input_file_id in self.files else self._file_of_batch.get(batch.id, "")


def remove_old_notes(directory: str) -> None:
    for entry in os.scandir(directory):
        with contextlib.suppress(FileNotFoundError):  # another process may have removed it
            if entry.is_file() and time.time() - entry.stat().st_mtime > FILE_LIFETIME_SECONDS:
                os.unlink(entry.path)


def open_note_file(path: str) -> BinaryIO:
    """Open and lock a note. Raises BlockingIOError if another process has locked it."""
    import fcntl  # does not exist on Windows

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
    """Other batches have requests of the same request file."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        names = ", ".join(f"{batch.id} ({batch.status})" for batch in batches)
        super().__init__(f"these batches already have requests of this file: {names}; nothing more was submitted; use "
                         "run, which takes what they finish and sends only the rest")
        self.batches = batches


class Submitter:
    """Creates exactly one batch for each part of a request file, even if responses are lost.

    With `finds_versions`, it also finds batches of other versions of the file.
    """

    def __init__(self, api: Api, args: argparse.Namespace, request_file_sha256: str, checked: Checked, note: Note, *,
                 finds_versions: bool = False) -> None:
        self.api = api
        self._name = "stdin" if args.input == STDIN else escape_controls(os.path.basename(args.input))
        self._args = args
        self._checked = checked
        self._request_file_sha256 = request_file_sha256
        self._own_hashes = {request_file_sha256, *(part.sha256 for part in checked.parts)}
        self._note = note
        self._finds_versions = finds_versions
        self._notes_of_versions: list[Note] = []
        self._listed: set[str] = set()  # ids of all batches that a listing has shown
        self._ignored: set[str] = set()  # ids of batches that need no further attention
        self._larger_by = 0  # bytes that the service adds to an upload

    # finding batches

    def ignore(self, batch: Batch) -> None:
        """The batch is taken care of: it does not keep anything from being submitted."""
        self._ignored.add(batch.id)

    def input_file_of(self, batch: Batch) -> str:
        """The id of the file that we uploaded for a batch; a gateway may show the id of a copy, or none."""
        noted = (note.file_of(batch) for note in (self._note, *self._notes_of_versions))
        return next(filter(None, noted), batch.input_file_id)

    def part_sha256(self, batch: Batch) -> str:
        """The sha256 of the batch's input file; empty if it is unknown."""
        noted = self._note.files.get(self._note.file_of(batch))
        return batch.metadata.get("input_sha256") or (noted.sha256 if noted else "")

    def is_of_file(self, batch: Batch) -> bool:
        """Whether the batch has requests of this request file, whatever the parts that were made of it."""
        return (
            self.part_sha256(batch) in self._own_hashes
            or batch.metadata.get("request_file_sha256") == self._request_file_sha256
            or bool(self._note.file_of(batch))
        )

    def has_name(self, batch: Batch) -> bool:
        """Whether the batch was made of a file of this name, as far as it says."""
        return batch.metadata.get("input_file", self._name)[:512] == self._name[:512]

    def _is_ours(self, batch: Batch) -> bool:
        """Whether the batch is of this file or, with `finds_versions`, of another one of the same name."""
        is_named = {"input_sha256", "input_file"} <= batch.metadata.keys() and self.has_name(batch)
        is_version = is_named or any(note.file_of(batch) for note in self._notes_of_versions)
        return self.is_of_file(batch) or (self._finds_versions and is_version)

    def list_batches(self, api: Api) -> list[Batch]:
        """The recent batches. With --force, a listing that cannot be used does not matter."""
        try:
            listed = api.recent_batches()
        except (ApiError, IncompleteListing) as failure:
            if not self._args.force or isinstance(failure, NotSent):
                raise
            return []
        self._listed.update(batch.id for batch in listed)
        return listed

    def earlier_batches(self, listed: Iterable[Batch]) -> list[Batch]:
        """The batches of this file and of other versions of it that may have a success, oldest first.

        They are in the listing, or only in notes. Empty with --force.
        """
        if self._args.force:
            return []
        found = {batch.id: batch for batch in listed}
        noted = self._resolve(self._note, found)
        for path in self._note.others if self._finds_versions else ():
            with contextlib.suppress(OSError), open(path, "rb") as file:
                version = Note(self.api.console, file)
                if any(noted_file.name == self._name for noted_file in version.files.values()):
                    self._notes_of_versions.append(version)
                    noted |= version.batch_ids()
                    with open_note_file(path) as locked:  # if it is locked, its process takes care of its POSTs
                        noted |= self._resolve(Note(self.api.console, locked), found)
        self._add_unlisted(noted, found)
        ours = by_age(filter(self._is_ours, found.values()))
        for batch in ours:
            self.warn_of_lost_answers(batch)
        return [batch for batch in ours if batch.may_have_success]

    def warn_of_lost_answers(self, batch: Batch) -> None:
        """Warn of a batch that ended early, with answers by its counts, but without an output file."""
        if batch.status in ("expired", "cancelled") and batch.counts.completed and not batch.output_file_id:
            self.api.warn_once(f"batch {batch.id} ({batch.status}) counts {batch.counts.completed} completed requests, "
                               "but names no output file; they are sent, and perhaps paid for, again")

    def _resolve(self, note: Note, found: dict[str, Batch]) -> set[str]:
        """Find out what became of each POST of a note that has no outcome yet, and return the ids of its batches.

        Adds the batches found to `found`.
        """
        for file_id, noted in list(note.files.items()):
            if noted.batch is None:
                self.api.console.message(f"file {file_id}: checking whether its batch was created")
                if batch := self._find_or_fence(file_id, noted.sha256, self._ignored):
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
            for batch_id in sorted(unlisted):
                with contextlib.suppress(NotFound):
                    found[batch_id] = self.api.batch(batch_id)
            unlisted -= found.keys()

    # creating a batch

    def submit(self, requests: Input, part: Part, on_upload: Callable[[str], None]) -> Batch:
        """Create a batch for the part. `on_upload` is called with the id of each uploaded file.

        Raises AlreadySubmitted if another batch of this request file has shown up in the listing, and CommandError if
        the API refuses or if it stays unknown whether a batch exists.
        """
        for _ in range(MAX_TRIES):
            file_id = self._upload(requests, part)
            try:
                on_upload(file_id)
            except (CommandError, Exit):
                self.api.delete_file(file_id)
                raise
            if batch := self._post(part, file_id):
                self.ignore(batch)
                if batch.metadata.get("input_sha256") != part.sha256:
                    self.api.warn_once("this service keeps no metadata; only a note on this machine prevents the same "
                                       "requests from being submitted and paid for again")
                return batch
            self.api.console.message(f"part {part.label}: no batch was created for file {file_id}, "
                                     "so the file was deleted")
        raise CommandError(f"part {part.label}: no response to {MAX_TRIES} tries to create its batch (last file: "
                           f"{file_id}); run the same command again later")

    def _upload(self, requests: Input, part: Part) -> str:
        """Upload a part, and return the id of its file. The name ends in .jsonl, as OpenAI wants it.

        Looks at the model before the first upload. A wrong size is tried again, but a service that adds the same number
        of bytes twice rewrites what it gets.
        """
        self.api.check_model(self._checked.model)
        name = self._name if self._name.endswith(".jsonl") else f"{self._name}.jsonl"
        for _ in range(MAX_TRIES):
            file = self.api.upload(requests, part, name)
            more = 0 if file.size is None else file.size - part.size
            is_whole = more == 0 or more == self._larger_by
            if more > 0 and is_whole:
                self.api.warn_once("this service rewrites what is uploaded: its files are larger than what was sent")
            if is_whole and not requests.is_changed():
                return file.id
            self._larger_by = max(0, more)
            self.api.delete_file(file.id)
            requests.refuse_changes()
        raise WrongSize(f"file {file.id} has {file.size} bytes, but {part.size} were uploaded; it was deleted")

    def _post(self, part: Part, file_id: str) -> Batch | None:
        """Create the batch of an uploaded file. None if certainly none was created; the file is deleted then.

        Before each POST, the listing is looked at and the file is noted. A POST is repeated only if it had no effect.
        """
        metadata = {"input_sha256": part.sha256, "input_file": self._name[:512], "part": part.label}
        if part.sha256 != self._request_file_sha256:
            metadata["request_file_sha256"] = self._request_file_sha256
        request = {"input_file_id": file_id, "endpoint": self._checked.endpoint,
                   "completion_window": self._args.completion_window, "metadata": metadata}
        retry = Retry(outage_budget=self.api.outage_budget, repeat_lost=False)
        delays, is_posted = iter(LOOK_UP_DELAYS), False
        while True:
            batch = self._look(part, file_id, is_posted=is_posted)
            before = self._listed | self._ignored
            if not batch:
                self._note.add(file_id, sha256=part.sha256, name=self._name)
                is_posted = True
                try:
                    batch = self.api.create_batch(request)
                    if batch.id in before:
                        raise OutcomeUnknown(f"the response to the POST is an earlier batch: {batch.id}")
                except OutcomeUnknown as failure:
                    self.api.console.warn(f"{failure}; checking whether the batch was created")
                    batch = self._find_or_fence(file_id, part.sha256, before)
                except UnusableId as failure:
                    self._note.add(file_id, batch=failure.value)  # so that the next command stops at it, too
                    raise
                except (Refused, NotSent) as failure:
                    is_late = failure.status in (400, 404) and file_id[:50] in str(failure)  # not visible yet
                    pause = next(delays, None) if is_late else retry.pause_after(failure)
                    if pause is None:
                        self._drop(file_id)
                        raise
                    if is_rate_limit(failure) or pause > QUIET_PAUSE_SECONDS:
                        self.api.console.warn(f"{failure}; trying again in {math.ceil(pause)} s")
                    self.api.clock.sleep(pause)
                    continue
            self._note.add(file_id, batch=batch.id if batch else "")
            return batch

    def _look(self, part: Part, file_id: str, *, is_posted: bool) -> Batch | None:
        """Look at the listing right before a POST. Returns the batch of the part, if an earlier POST has created it.

        If other batches of this request file have shown up, or the listing cannot be had, the POST is not made. A file
        that may have become a batch is not deleted then.
        """
        if self._args.force and not is_posted:
            return None
        before = {*self._listed}
        try:
            listed = by_age(self.list_batches(self.api))
        except (ApiError, IncompleteListing) as failure:  # about the listing; it must not look like one of the POST
            if not is_posted:
                self._drop(file_id)
            raise CommandError(str(failure)) from None
        if batch := self._batch_of(listed, file_id, part.sha256 if is_posted else "", before):
            return batch
        others = [each for each in listed if each.may_have_success and self._is_ours(each)]
        new = [each for each in others if each.id not in self._ignored]
        if new and not self._args.force:
            self._drop(file_id)
            raise AlreadySubmitted(new)
        return None

    @staticmethod
    def _batch_of(listed: list[Batch], file_id: str, sha256: str, before: Container[str]) -> Batch | None:
        """The batch of an uploaded file: it names the file or, as a gateway may have posted a copy, it has its hash.

        By its hash only one that was not in the listing `before`.
        """
        by_hash = (
            each for each in listed
            if sha256 and each.metadata.get("input_sha256") == sha256
            and each.id not in before and each.status != "failed"
        )
        return next((each for each in listed if each.input_file_id == file_id), None) or next(by_hash, None)

    def _drop(self, file_id: str) -> None:
        """Delete a file that no batch was made of."""
        self._note.add(file_id, batch="")
        self.api.delete_file(file_id)

    # when the outcome of a POST is unknown

    def _find_or_fence(self, file_id: str, sha256: str, before: Container[str]) -> Batch | None:
        """Find the batch of a file whose POST has an unknown outcome. Those in `before` were there already.

        If there is none, fence the POST: delete the file, so that the POST fails if it takes effect later. Return None.
        """
        batch = self._find(file_id, sha256, before, LOOK_UP_DELAYS)
        if batch and batch.input_file_id == file_id:
            return batch
        if not self.api.delete_file(file_id) and not batch:
            raise CommandError(self._in_doubt(file_id))
        batch = batch or self._find(file_id, sha256, before, FENCED_LOOK_UP_DELAYS)
        while batch and batch.status == "validating":  # it may still fail because its file was deleted
            self.api.clock.sleep(SHORT_POLL_SECONDS)
            batch = self.api.batch(batch.id)
        return None if batch and batch.status == "failed" else batch

    @staticmethod
    def _in_doubt(file_id: str) -> str:
        return (f"cannot tell whether a batch was created for file {file_id}; run the same command again later, and it "
                "will pick up the batch if there is one (--force would pay again)")

    def _find(self, file_id: str, sha256: str, before: Container[str], delays: Iterable[float]) -> Batch | None:
        """Look repeatedly for the batch of a file, or else for a new one with our metadata; None if there is none.

        Raises CommandError if the last look-up failed.
        """
        is_answered = False
        for delay in delays:
            self.api.clock.sleep(delay)
            try:
                listed = by_age(self.api.recent_batches())
            except ApiError as failure:
                is_answered = False
                self.api.console.warn(str(failure))
                continue
            is_answered = True
            if batch := self._batch_of(listed, file_id, sha256, before):
                return batch
        if not is_answered:
            raise CommandError(self._in_doubt(file_id))
        return None


# ---- watching


def lacks_output(api: Api, batch: Batch) -> bool:
    """Whether a batch completed with successes but has no output file yet, or an empty one."""
    if not batch.claims_successes:
        return False
    try:
        return not batch.output_file_id or api.size_of(batch.output_file_id) == 0
    except (Refused, UnusableId):  # it is gone, or cannot be had; the download will report that
        return False


@contextlib.contextmanager
def advice_if_stopped(advice: Callable[[], str], console: Console) -> Iterator[None]:
    """Say how to continue if a signal or --timeout stops the block."""
    try:
        yield
    except TimedOut:
        raise TimedOut(f"--timeout passed; {advice()}") from None
    except Exit:
        console.message(advice())
        raise


class Poller:
    """Polls batches. Once the API has answered, it outlives outages: as long as `api` allows, else without end.

    `latest` has the last known state of each batch, by id.
    """

    def __init__(self, api: Api) -> None:
        self.latest: dict[str, Batch] = {}
        self._api = api
        self._patient_api = api._replace(outage_budget=api.outage_budget or math.inf)
        self._lacks_output_since: dict[str, float] = {}
        self._last_report = ""

    def poll(self, batch_ids: Iterable[str]) -> dict[str, Batch | CommandError]:
        """Poll each batch once. Return those that have ended, and the errors of those that cannot be polled, by id."""
        ends: dict[str, Batch | CommandError] = {}
        for batch_id in batch_ids:
            api = self._patient_api if self.latest else self._api
            try:
                self.latest[batch_id] = batch = api.batch(batch_id)
                if batch.status not in KNOWN_STATUSES:
                    api.warn_once(f"{batch_id}: status {quoted(batch.raw['status'])} is not known; still waiting")
                if self._is_finished(batch):
                    ends[batch_id] = batch
            except (OutputMissing, ApiError) as failure:
                ends[batch_id] = failure
        return ends

    def _is_finished(self, batch: Batch) -> bool:
        """Whether it has ended and no longer lacks its output file, which may be late."""
        if not lacks_output(self._patient_api, batch):
            return batch.has_ended
        now = self._api.clock.now()
        if now - self._lacks_output_since.setdefault(batch.id, now) >= OUTPUT_DELAY_SECONDS:
            raise OutputMissing(f"batch {batch.id} has completed {batch.counts.completed} requests, but has no output "
                                f"file after {OUTPUT_DELAY_SECONDS // 60} minutes; run the same command again later")
        return False

    def report(self, seconds: float) -> None:
        """Print the progress of all batches: on a terminal every time, otherwise only after a change.

        `seconds` have elapsed so far.
        """
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
            self._api.console.progress(f"{text}; {datetime.timedelta(seconds=int(seconds))} elapsed")
        self._last_report = text


# ---- saving the files of a batch

OUTPUT_GONE = ("its output file is no longer on the server; an earlier download may still have its results; "
               "run --force sends, and pays for, all requests of its file again")


def batch_paths(batch_id: str, out: str | None = None) -> dict[str, str]:
    """Where the output file (`results`) and the error file (`errors`) of a batch are saved."""
    name = re.sub(r"^\.|[^A-Za-z0-9._-]", "_", batch_id)[:100]
    if name != batch_id:  # so that no two ids share a file
        name += f"-{hashlib.sha256(batch_id.encode()).hexdigest()[:8]}"
    paths = {"results": out or f"results_{name}.jsonl", "errors": f"errors_{name}.jsonl"}
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
    sizes: dict[str, int] = {}
    failures: list[CommandError] = []
    lost = set()
    for kind, file_id in batch.files.items():
        try:
            if size := save_file(api, file_id, paths[kind], skip_complete=skip_complete):
                sizes[kind] = size
        except CommandError as failure:
            lost.add(kind)
            if kind == "errors" and isinstance(failure, NotFound):
                api.console.warn(f"the error file of batch {batch.id} is no longer on the server")
            else:
                failures.append(CommandError(OUTPUT_GONE) if isinstance(failure, NotFound) else failure)
    if "results" in sizes and "errors" not in sizes.keys() | lost:
        with os_errors_as(f"remove {paths['errors']}"), contextlib.suppress(FileNotFoundError):
            os.unlink(paths["errors"])
    return Saved(sizes, failures)


def errors_in(errors: Input) -> str:
    """The most common errors of an error file, each with its count."""
    counts: Counter[str] = Counter()
    for line in errors.lines():
        with contextlib.suppress(ValueError):
            counts[shorten(classify(read_object(line)).error())] += 1
    return ranked(counts)


# ---- commands, in the order a batch lives

# validate


def cmd_validate(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    with open_input(args.input) as requests:
        checked = check_input(requests, console, args.endpoint)
    counted = plural(len(checked.requests.position_of), "request")
    size, batches = plural(checked.size, "byte"), plural(len(checked.parts), "batch", "batches")
    print_result(f"OK: {counted}, {size}, {batches}", console)
    return 0


# preview


class Usage(NamedTuple):
    """The tokens of one response, and the size of its request's body."""

    body_bytes: int
    tokens: Tokens


def spread_evenly(count: int, total: int) -> set[int]:
    """`count` positions, or all if there are fewer, spread evenly over `total`."""
    count = min(count, total)
    return {(2 * number + 1) * total // (2 * count) for number in range(count)}


def body_sizes(requests: Input) -> list[int]:
    """The size of the body of each request, in bytes."""
    return [len(to_json(read_object(line)["body"]).encode(errors="replace")) for line in requests.lines()]


def rounded(number: float) -> str:
    """The number with three significant digits, and commas between thousands."""
    digits = max(0, len(str(int(number))) - 3)
    return f"{round(number, -digits):,.0f}"


def dollars(input_tokens: float, output_tokens: float, prices: tuple[float, float]) -> str:
    """What tokens cost. `prices` are dollars per million input and output tokens."""
    amount = (input_tokens * prices[0] + output_tokens * prices[1]) / 1e6
    return f"about ${amount:,.2f}" if amount >= 0.01 else "less than $0.01"


def estimate(usages: Iterable[Usage], body_bytes: int, total: int, prices: tuple[float, float] | None) -> str:
    """Estimate the tokens of all requests from those of a few; empty if none says them."""
    known = [usage for usage in usages if None not in usage.tokens[:2]]
    if not known:
        return ""
    outputs = [usage.tokens.output or 0 for usage in known]
    input_tokens = sum(usage.tokens.input or 0 for usage in known) * body_bytes / sum(each.body_bytes for each in known)
    output_tokens = sum(outputs) / len(outputs) * total
    spread = f"{rounded(min(outputs) * total)} to {rounded(max(outputs) * total)}"
    text = f"{with_commas(total, 'request')}: about {rounded(input_tokens)} input and "
    text += f"{rounded(output_tokens)} ({spread}) output tokens"
    if reasoning := sum(usage.tokens.reasoning or 0 for usage in known):
        text += f", {reasoning * 100 / max(1, sum(outputs)):.0f} % of them reasoning"
    text += f", by {with_commas(len(known), 'answer')}"
    if prices:
        whole = dollars(input_tokens, output_tokens, prices)
        share = dollars(input_tokens * 1000 / total, output_tokens * 1000 / total, prices).removeprefix("about ")
        text += f"; {whole}, or {share} per 1,000 requests"
    return text


def prompt_text(body: Json) -> str:
    """The prompt of a request as the service gets it: a stored prompt with its variables, instructions, messages."""
    entries = body.get("input") or body.get("messages")
    messages = [entry.get("content") for entry in objects(entries)] or [entries]
    contents = [body.get("prompt"), body.get("instructions"), *messages]
    texts = ("".join(str_field(part, "text") for part in objects(content)) or as_text(content) for content in contents)
    return "\n\n".join(filter(None, texts))


def preview_lines(request: Json, outcome: Outcome) -> Iterator[str]:
    """The custom_id and the artist's name, then the text of the answer, or its fields by name, and its error."""
    yield artist_label(request)
    for name, text in answer_texts(outcome, schema_fields(request["body"])).items():
        yield from (f"{name}: {text}" if name else text).strip().splitlines()
    if outcome.kind != SUCCEEDED:
        yield f"error: {outcome.error()}"


def cmd_preview(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    usages: list[Usage] = []
    succeeded = 0
    with contextlib.ExitStack() as stack:
        requests = stack.enter_context(open_input(args.input))
        check = check_input(requests, console)
        sizes = body_sizes(requests)
        chosen = spread_evenly(args.requests, len(sizes))
        samples = [(sizes[at], read_object(line)) for at, line in enumerate(requests.lines()) if at in chosen]
        _, first = samples[0]
        api = stack.enter_context(connect(args, console, clock))
        api.check_model(check.model)
        console.message(f"sending {plural(len(samples), 'request')} right away, at the ordinary price, not as a batch")
        for line in (f"the prompt of {first['custom_id']}:", *prompt_text(first["body"]).splitlines(), ""):
            console.message(line)
        for size, request in samples:
            outcome = classify(api.send_now(request), [*schema_fields(request["body"])])
            succeeded += outcome.kind == SUCCEEDED
            for text in [*([""] if usages else []), *preview_lines(request, outcome)]:
                print_result(text, console)
            usages.append(Usage(size, outcome.tokens))
    no_estimate = "no response says how many tokens it used, so there is no estimate"
    console.message(estimate(usages, sum(sizes), len(sizes), args.prices) or no_estimate)
    return 0 if succeeded else 1


# create


def cmd_create(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    with contextlib.ExitStack() as stack:
        requests = stack.enter_context(open_input(args.input))
        checked = check_input(requests, console, args.endpoint, args.max_requests)
        api = stack.enter_context(connect(args, console, clock))
        sha256 = requests.sha256()
        note = stack.enter_context(locked_note(sha256, requests, console))
        submitter = Submitter(api, args, sha256, checked, note)
        earlier = submitter.earlier_batches(submitter.list_batches(api))
        own = {part.sha256 for part in checked.parts}
        reused: dict[str, Batch] = {}
        others = []
        for batch in earlier:
            submitter.ignore(batch)
            is_whole = batch.status == "completed" or not (batch.has_ended or batch.status == "cancelling")
            if (part_sha256 := submitter.part_sha256(batch)) in own and is_whole:
                reused.setdefault(part_sha256, batch)
            else:
                others.append(batch)
        if others and len(reused) < len(own):
            raise AlreadySubmitted(others)

        def print_file_id(file_id: str) -> None:
            if file_id and not args.json:
                print_result(f"File ID: {file_id}", console)

        for part in checked.parts:
            if part.sha256 in reused:
                batch = reused[part.sha256]
                console.message(f"part {part.label} was already submitted as batch {batch.id} ({batch.status}); "
                                "skipping")
                print_file_id(batch.input_file_id)
            else:
                batch = submitter.submit(requests, part, print_file_id)
            print_result(batch_json(batch) if args.json else f"Batch ID: {batch.id}", console)
    return 0


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
    if not args.json:
        for line in [*([f"Batch ID: {batch.id}"] if len(args.batch_ids) > 1 else []), *status_lines(batch)]:
            print_result(line, api.console)
    paths = batch_paths(batch.id)
    saved = save_files(api, batch, paths, skip_complete=True) if args.auto_save and batch.has_ended else Saved({}, [])
    if args.json:
        print_result(batch_json(batch, {f"{kind}_path": paths[kind] for kind in saved.sizes}), api.console)
    saved.report(paths, result_printer(api.console, to_stderr=args.json))


def cmd_status(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    with connect(args, console, clock) as api:
        return each_batch(args.batch_ids, console, lambda batch_id: show_and_save(args, api, api.batch(batch_id)))


# wait


def wait_for_end(api: Api, args: argparse.Namespace) -> dict[str, Batch | CommandError]:
    """Poll until every batch has ended or cannot be polled."""
    poller, started = Poller(api), api.clock.now()
    ends: dict[str, Batch | CommandError] = {}
    while True:
        ends |= poller.poll(each for each in dict.fromkeys(args.batch_ids) if each not in ends)
        poller.report(api.clock.now() - started)
        if ends.keys() == {*args.batch_ids}:
            return ends
        api.clock.sleep(args.interval)


def save_or_fail(args: argparse.Namespace, api: Api, end: Batch | CommandError) -> None:
    """Show and save a batch that was waited for. Raises CommandError if it could not be polled."""
    if isinstance(end, CommandError):
        raise end
    show_and_save(args, api, end)


def cmd_wait(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    resume = f"to resume waiting: {PROG} wait --batch-id {' '.join(args.batch_ids)}"
    with connect(args, console, clock) as api, clock.limit(args.timeout):
        with advice_if_stopped(lambda: f"the batches keep running on the server; {resume}", console):
            ends = wait_for_end(api, args)
        with advice_if_stopped(lambda: resume, console):
            exit_code = each_batch(args.batch_ids, console, lambda each: save_or_fail(args, api, ends[each]))
        return exit_code or int(any(isinstance(end, Batch) and end.status != "completed" for end in ends.values()))


# retrieve


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
    errors = ""
    if saved.sizes.keys() == {"errors"}:
        with open_input(paths["errors"]) as error_file:
            errors = f": {errors_in(error_file)}"
    if batch.status == "failed":
        raise CommandError(f"Batch failed: {batch.failure_reasons()}{errors}")
    if "results" not in saved.sizes:
        raise CommandError(f"Batch has no results (status: {batch.raw['status']}){errors}")
    if batch.status != "completed":
        counted = f" with {batch.counts.completed or 0} of {batch.counts.total} requests completed"
        raise CommandError(f"Batch {batch.status}{counted if batch.counts.total else ''}; run on the same request file "
                           "sends only the rest")


def cmd_retrieve(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    if args.output:
        refuse_unwritable(args.output)
    for batch_id in args.batch_ids:
        for path in batch_paths(batch_id, args.output).values():
            refuse_to_replace(path, "results")
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


def table(batches: Sequence[Batch]) -> list[str]:
    """The lines of a table of the batches, with its columns aligned."""
    if not batches:
        return ["No batches found."]
    rows = [("BATCH ID", "STATUS", "CREATED", "REQUESTS", "FAILED", "INPUT FILE")]
    for batch in batches:
        completed, failed, total = (str(number or 0) for number in batch.counts)
        name = escape_controls(batch.metadata.get("input_file") or batch.input_file_id)
        created = local_time(batch.created_at)
        rows.append((batch.id, batch.raw["status"], created, f"{completed}/{total}", failed, name))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def cmd_list(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    batches: dict[str, Batch] = {}  # by id: a batch may stand on two pages if another one is submitted meanwhile
    with connect(args, console, clock) as api:
        for page in api.pages(min(args.limit, PAGE_SIZE)):
            batches |= {batch.id: batch for batch in page.batches}
            if len(batches) >= args.limit:
                break
        newest = [*batches.values()][: args.limit]
        for line in map(batch_json, newest) if args.json else table(newest):
            print_result(line, console)
    return 0


# retry, export


def read_results(args: argparse.Namespace, index: RequestIndex, console: Console,
                 stack: contextlib.ExitStack) -> Results:
    """The best results in the files of --results but --out, if it is one of them. The files stay open in `stack`."""
    results = Results(index, console)
    for path in args.results:
        if not same_regular_file(path, args.output):
            results.read(stack.enter_context(open_input(path)))
    return results


def cmd_retry(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    with contextlib.ExitStack() as stack:
        requests = stack.enter_context(open_input(args.input))
        results = read_results(args, index_requests(requests), console, stack)
        kinds = TO_SEND | {REJECTED} if args.include_rejected else TO_SEND
        if positions := results.positions(kinds):
            refuse_to_replace(args.output, "requests")
            with open_output(args.output) as out:
                out.writelines(line for position, line in enumerate(requests.lines()) if position in positions)
        result_printer(console, to_stderr=args.output == STDOUT)(f"Requests to retry: {len(positions)}")
        report_results("", results, console)
    if not args.include_rejected and results.outcomes()[REJECTED]:
        console.message("rejected requests would be rejected again, so they are not written; see --include-rejected")
    return 0


def bio_rows(requests: Input, results: Results) -> Iterator[Sequence[str]]:
    fields = results.requests.fields
    yield bio_columns(fields)
    for line, best in zip(requests.lines(), results.best, strict=True):
        request = read_object(line)
        yield request["custom_id"], artist_name(request), *bio_cells(outcome_of(best, fields), fields)


@contextlib.contextmanager
def open_sheet(sheet: Input, args: argparse.Namespace) -> Iterator[tuple[Table, Iterator[Record]]]:
    """The artists' spreadsheet: how to read it, and its rows without repeated headers.

    It needs a column of names only if an option names one; the converter has looked at the names.
    """
    descriptor = sheet.file.fileno()
    start = os.pread(descriptor, 4, 0)
    if start == b"PK\x03\x04":
        raise CommandError(f"{sheet.name} is an Excel workbook or another zip file; open it and save it as CSV UTF-8")
    encoding = encoding_of(start, args.encoding or "utf-8")
    try:
        with open(descriptor, encoding=encoding, errors=UNDECODABLE, newline="", closefd=False) as text:
            text.seek(0)
            reader = LineReader(text)
            chosen = {"artist_id": args.id_column, "artist_name": args.name_column}
            table = read_table(reader, chosen, COLUMNS[:1], args.skip_header)
            yield table, (record for record in reader.records(table) if record.oddity != REPEATED_HEADER)
    except CommandError as error:
        raise CommandError(f"{sheet.name} {str(error).removeprefix('the CSV ')}") from None
    except UnicodeError as error:
        raise CommandError(f"{sheet.name} cannot be decoded: {error}; see --encoding") from None


def survey_sheet(sheet: Input, args: argparse.Namespace, index: RequestIndex,
                 console: Console) -> tuple[int, dict[int, int]]:
    """The number of columns of the spreadsheet, and by line the position of the request that was made of that row.

    The converter took the first row of an id that can be used. It looks only at the values that the prompt uses, so a
    row with an undecodable value is taken if there is no better one.
    """
    width = rows = 0
    undecodable = []  # line numbers
    best: dict[str, tuple[bool, bool, int]] = {}  # by id: whether its name, or any value, is undecodable, and its line
    with open_sheet(sheet, args) as (table, records):
        for record in records:
            rows += 1
            width = max(width, len(record.fields))
            if record.is_used:
                if is_odd := "\udcff" in "".join(record.fields):
                    undecodable.append(record.line)
                artist_id, name = (record.fields[table.roles[role]].strip(BLANKS) for role in COLUMNS[:2])
                if artist_id in index.position_of and name:
                    row = "\udcff" in name, is_odd, record.line
                    best[artist_id] = min(row, best.get(artist_id, row))
    if undecodable:
        counted = f"{len(undecodable)} of {plural(rows, 'row')}"
        problem = f"{sheet.name}: {counted} cannot be decoded, first on line {undecodable[0]}"
        if len(undecodable) > max(1, 0.05 * rows):  # the limits of gen_batch_jsonl.py
            raise CommandError(f"{problem}; name the encoding with --encoding")
        console.warn(f"{problem}; each undecodable byte becomes a question mark; see --encoding")
    if not best:
        raise CommandError(f"{sheet.name} has no row for any of {plural(len(index.position_of), 'request')}; "
                           "choose the file that the requests were made of, or see --id-column")
    if unsent := rows - len(best):
        console.message(f"{sheet.name}: {with_commas(unsent, 'row')} without a request")
    if left := len(index.position_of) - len(best):
        missing = f"{sheet.name} has no row for {plural(left, 'request')}"
        console.warn(f"{missing}, whose results are left out; see --id-column")
    return max(width, len(table.names)), {line: index.position_of[artist_id] for artist_id, (*_, line) in best.items()}


def sheet_lines(sheet: Input, args: argparse.Namespace, results: Results, console: Console) -> Iterator[bytes]:
    """The spreadsheet as it came, with the bio columns behind its own."""
    index = results.requests
    ours = bio_columns(index.fields)[2:]
    width, position_at = survey_sheet(sheet, args, index, console)
    with open_sheet(sheet, args) as (table, records):
        for name in ours:
            if column_key(name) in table.keys:
                console.warn(f'{sheet.name} has a column "{name}" already; the new one is the last of that name')
        if encoding_of(os.pread(sheet.file.fileno(), 4, 0), "") and not args.excel:
            yield codecs.BOM_UTF8
        yield csv_line([*table.names, *[""] * (width - len(table.names)), *ours], table.delimiter)
        for record in records:
            outcome = Outcome(MISSING, "no request")
            if record.line in position_at:
                outcome = outcome_of(results.best[position_at[record.line]], index.fields)
            cells = bio_cells(outcome, index.fields)
            fields = record.fields + [""] * (width - len(record.fields))
            yield csv_line([*fields, *(guarded(cells) if args.excel else cells)], table.delimiter)


def report_bios(path: str, requests: Input, results: Results, console: Console) -> None:
    """Name the first artists without a bio, and why. The last line says what can be done about all of them."""
    without = results.positions(TO_SEND | {REJECTED})
    lines = ((position, line) for position, line in enumerate(requests.lines()) if position in without)
    for position, line in itertools.islice(lines, MAX_LISTED):
        error = outcome_of(results.best[position], results.requests.fields).error()
        console.message(f"no bio: {artist_label(read_object(line))}: {shorten(error)}")
    total, rejected = len(results.best), results.outcomes()[REJECTED]
    bios, again = total - len(without), len(without) - rejected
    text = f"{shown(path)}: {bios:,} of {with_commas(total, 'artist')} {'has' if bios == 1 else 'have'} a bio"
    ways = {"rejected (change the row, or --include-rejected)": rejected, "to try again (run again)": again}
    left = ", ".join(f"{number:,} {way}" for way, number in ways.items() if number)
    console.message(f"{text}; {left}" if left else text)


def cmd_export(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    with contextlib.ExitStack() as stack:
        requests = stack.enter_context(open_input(args.input))
        results = read_results(args, index_requests(requests), console, stack)
        if args.csv:
            lines = sheet_lines(stack.enter_context(open_input(args.csv)), args, results, console)
        else:
            rows = bio_rows(requests, results)
            lines = map(csv_line, map(guarded, rows) if args.excel else rows)
        refuse_to_replace(args.output, "exported bios")
        with open_output(args.output) as out:
            if args.excel:
                out.write(codecs.BOM_UTF8)
            out.writelines(lines)
        report_results(wrote_prefix(args.output), results, console)
        report_bios(args.output, requests, results, console)
    return 0


# ---- run


def positions_of(part: Part) -> range:
    """The positions of the requests of a part of the request file."""
    return range(part.first, part.first + part.requests)


class QueuedPart(NamedTuple):
    """A part to submit, the file that contains it, and the positions of its requests in the request file."""

    source: Input
    part: Part
    positions: Sequence[int]
    idle_refusals: int = 0  # for the token limit, with no batch of this run active

    def after_idle_refusal(self) -> list[QueuedPart]:
        """What to submit after a refusal with no batch active: this part or, after two of them, its halves.

        Raises CommandError if a single request is refused again and again.
        """
        refusals = self.idle_refusals + 1
        if self.part.requests > 1 and refusals >= MAX_IDLE_REFUSALS:
            first, second = split_part(self.part, self.source.file)
            left, right = self.positions[: first.requests], self.positions[first.requests :]
            return [QueuedPart(self.source, first, left), QueuedPart(self.source, second, right)]
        if refusals >= MAX_SINGLE_REFUSALS:
            raise CommandError(f"part {self.part.label} (1 request, {plural(self.part.size, 'byte')}) was refused "
                               f"{MAX_SINGLE_REFUSALS} times for the token limit while no batch of this run was "
                               "active; the account's limit is too small for this request")
        return [self._replace(idle_refusals=refusals)]


class Queue:
    """Decides which parts may be submitted now. The API does not report its token limit in advance.

    After a refusal, each batch that ends makes room for one part. If none is active, waiting may help.
    """

    def __init__(self, parts: Iterable[QueuedPart]) -> None:
        self.waiting = deque(parts)
        self._room = math.inf  # how many more batches may be admitted
        self._idle_refusals = 0  # in a row

    def take(self) -> QueuedPart | None:
        """The next part to submit now, if any."""
        if not self.waiting or self._room < 1:
            return None
        self._room -= 1
        return self.waiting.popleft()

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
        self.waiting.extendleft(reversed(refused))
        return self._idle_refusals if is_stuck else 0


class ActiveBatch(NamedTuple):
    """A batch whose results a run needs, until they are downloaded. `batch` is as it was first seen."""

    batch: Batch
    positions: Collection[int] | None  # of its requests in the request file; None if they are unknown
    is_earlier: bool  # not submitted by this run
    submitted_at: float = -math.inf  # by this run
    queued: QueuedPart | None = None  # what to submit again after a refusal
    sent_digests: Mapping[str, bytes] | None = None  # of its requests by custom_id, if they may be of another version
    problem: str = ""  # why its output file cannot be had


class Withheld(NamedTuple):
    """Requests that are not sent, because they may have been paid for, and why."""

    reason: str
    positions: set[int]


def requests_to_repeat(args: argparse.Namespace, results: Results) -> set[int]:
    """The positions of the requests that the user wants to be sent although they have an answer."""
    if args.force:
        return set(range(len(results.best)))
    return results.positions({REJECTED}) if args.include_rejected else set()


def what_to_send(results: Results, sending: Iterable[int], in_batches: int = 0, left_out: int = 0) -> str:
    """The line that says how many requests will be sent and why, and what becomes of the others."""
    sent, every = Counter(map(results.outcome_at, sending)), results.outcomes()
    reasons = {MISSING: "new", OUTDATED: "changed", RETRYABLE: "to try again", REJECTED: "rejected",
               SUCCEEDED: "forced"}
    bios, rejected = every[SUCCEEDED] - sent[SUCCEEDED], every[REJECTED] - sent[REJECTED]
    kept = {"has a bio" if bios == 1 else "have a bio": bios,
            "was rejected" if rejected == 1 else "were rejected": rejected,
            "in earlier batches": in_batches, "left out": left_out}
    text = f"{sent.total():,} of {with_commas(len(results.best), 'request')} to send"
    for mark, counts in ((":", {word: sent[kind] for kind, word in reasons.items()}), (";", kept)):
        if listed := ", ".join(f"{number:,} {word}" for word, number in counts.items() if number):
            text += f"{mark} {listed}"
    if results.gone:
        text += f"; {with_commas(results.gone, 'result')} of requests that are no longer in the file"
    return text


def too_many(args: argparse.Namespace, number: int) -> str:
    """The error if more would be sent than --max-new allows. Empty if not."""
    if args.max_new is None or number <= args.max_new:
        return ""
    return f"{with_commas(number, 'request')} to send, more than --max-new {args.max_new:,}, so nothing is sent"


def what_it_takes(args: argparse.Namespace, requests: Input, results: Results, sending: Container[int]) -> str:
    """An estimate for the requests to send, judged by the answers that are known. Empty if none says its tokens.

    Answers to requests of this file count in proportion to the size of the bodies. Without any, all others count by
    their mean.
    """
    sizes = body_sizes(requests)
    to_send = [size for position, size in enumerate(sizes) if position in sending]
    known = zip(sizes, results.best, strict=True)
    answers = [(size, line) for size, line in known if line and line.outcome == SUCCEEDED]
    others = results.others or [line for line in results.best if line and line.outcome == OUTDATED]  # of --results
    answers = answers or [(sum(to_send) // len(to_send), line) for line in others]
    usages = (Usage(size, classify(results_object(line.read())).tokens) for size, line in answers)
    return estimate(usages, sum(to_send), len(to_send), args.prices)


def confirm(args: argparse.Namespace, requests: Input, results: Results, sending: set[int], console: Console) -> None:
    """Ask before requests are sent, with --ask on a terminal. Raises CommandError unless the answer is yes."""
    if not (args.ask and console.is_terminal and sys.stdin and sys.stdin.isatty()):
        return
    if takes := what_it_takes(args, requests, results, sending):
        console.message(takes)
    console.progress(f"Send {with_commas(len(sending), 'request')}? [Y/n] ")
    answer = sys.stdin.readline()
    console.clear_progress()
    if answer.strip().casefold() not in ("", "y", "yes") or not answer:
        raise CommandError("nothing was sent")


def until_when(batches: Iterable[Batch]) -> str:
    """The line for the person who waits, once everything is submitted."""
    now = int(time.time())
    ends = [int_field(batch.raw, "expires_at") or (batch.created_at or now) + DAY_SECONDS for batch in batches]
    return (f"everything is submitted; the service may take until {local_time(max(ends), ' ')}; you may close this "
            "window: the same command goes on where this one stops")


class Run:
    """Sends requests, in rounds, until each has succeeded or the attempts are used up.

    Its state can be rebuilt from the request file, --out and the server.
    """

    def __init__(self, args: argparse.Namespace, submitter: Submitter, requests: Input, checked: Checked,
                 results: Results, spools: tuple[BinaryIO, BinaryIO]) -> None:
        self.active: dict[str, ActiveBatch] = {}  # batches whose results are not downloaded yet, by id
        self.withheld: list[Withheld] = []  # requests that are left out of this run
        self.is_stopped = False  # whether nothing more is sent: the file was changed, --max-new, a batch was cancelled
        self.tokens = Tokens(0, 0)  # of the results that were downloaded and that count
        self._args = args
        self._submitter = submitter
        self._api = submitter.api
        self._clock = submitter.api.clock
        self._console = submitter.api.console
        self._requests = requests
        self._parts = checked.parts  # of the whole request file
        self._results = results
        self._spools = spools  # temporary files for the results of this run's batches, and of earlier ones
        self._poller = Poller(submitter.api)
        self._again = requests_to_repeat(args, results)  # positions to send although they have an answer
        self._is_announced = False  # whether the line that says what will be sent was printed
        self._is_told = False  # whether the line for the person who waits was printed

    def rounds(self, listed: Iterable[Batch]) -> None:
        """Collect what earlier batches have. Then send the rest in at most --attempts rounds."""
        earlier = self._submitter.earlier_batches(listed)
        for batch in sorted(earlier, key=lambda batch: not batch.output_file_id):  # those that may be done come first
            self._pick_up(batch)
        attempt = 1
        while True:
            pending = self._pending()
            if not self._may_send(pending, attempt):
                pending = set()
            if not pending and not self.active:
                return
            with temporary_file() as copy:
                attempt += self._round(Queue(self._divide(pending, copy)))

    def advice(self) -> str:
        """How to go on, if the run is stopped."""
        text = "no output was written; the same command goes on where this one stopped"
        if self.active:
            text += (f"; the batches go on at the server and will be charged; to stop them: {PROG} cancel --batch-id "
                     + " ".join(self.active))
        return text

    def _pending(self) -> set[int]:
        """The positions of the requests to send."""
        return self._unanswered().difference(*(each.positions for each in self.withheld))

    def _unanswered(self) -> set[int]:
        """The positions of the requests without an answer that counts that are in no active batch.

        Empty while a batch is active whose requests are unknown.
        """
        active = [each.positions for each in self.active.values()]
        if None in active:
            return set()  # we only learn from its results which requests it has
        return self._wanted().difference(*filter(None, active))

    def _wanted(self) -> set[int]:
        """The positions of the requests without an answer that counts."""
        return self._results.positions(TO_SEND) | self._again

    def _may_send(self, pending: set[int], attempt: int) -> bool:
        """Say what will be sent, and ask if the user wants to be asked. Returns whether it may be sent.

        Raises CommandError if the user says no, or if --max-new forbids it and there is nothing to write.
        """
        if attempt == 1 and (pending or not self._is_announced):
            self._is_announced = True
            wanted = self._wanted()
            left_out = wanted.intersection(itertools.chain(*(each.positions for each in self.withheld)))
            in_batches = len(wanted - pending - left_out)
            self._console.message(what_to_send(self._results, pending, in_batches, len(left_out)))
        if not pending or self.is_stopped or attempt > self._args.attempts:
            return False
        if self._requests.is_changed():
            self._stop(f"{self._requests.name} was changed, so nothing more is sent; start run again")
        elif problem := too_many(self._args, len(pending)):
            if not self.active and not any(spool.seek(0, os.SEEK_END) for spool in self._spools):
                raise CommandError(problem)  # there is nothing to write
            self._stop(problem)
        elif attempt == 1:
            confirm(self._args, self._requests, self._results, pending, self._console)
        else:
            self._console.message(f"round {attempt}: {with_commas(len(pending), 'request')} to send again")
            self._poller.latest.clear()
        return not self.is_stopped

    def _stop(self, reason: str) -> None:
        """Send nothing more. What is active is still waited for."""
        self._console.warn(reason)
        self.is_stopped = True

    def _divide(self, pending: set[int], copy: BinaryIO) -> list[QueuedPart]:
        """The parts to submit: those of the whole file, or of a copy of the pending lines."""
        if len(pending) == len(self._results.best):
            return [QueuedPart(self._requests, part, positions_of(part)) for part in self._parts]
        divider = PartDivider(self._args.max_requests)
        if pending:
            for position, line in enumerate(self._requests.lines()):
                if position in pending:
                    divider.add(line)
                    copy.write(line)
            copy.flush()
        source, order = Input(copy, "a temporary file"), sorted(pending)
        return [QueuedPart(source, part, order[part.first : part.first + part.requests]) for part in divider.parts()]

    def _round(self, queue: Queue) -> bool:
        """Submit the parts, and download the results of every batch, until none is active.

        Returns whether it counts as an attempt. It does not if another process has submitted some of the requests: then
        it ends early, as the batches of that process may have requests of later parts, too.
        """
        is_submitted = is_cut_short = False
        while True:
            while queued := queue.take():
                if self._submit(queued):
                    is_submitted = True
                else:
                    is_cut_short = True
                    queue.waiting.clear()
            if self.active and not queue.waiting and not self._is_told:
                self._is_told = True
                self._console.message(until_when([each.batch for each in self.active.values()]))
            oldest = min((batch.created_at or math.inf for batch in self._poller.latest.values()), default=math.inf)
            self._poller.report(max(0.0, time.time() - oldest))
            if not self.active and not queue.waiting:
                return is_submitted and not is_cut_short
            self._clock.sleep(self._args.interval)
            refused, ended = [], 0
            for batch, watched in self._ended():
                if batch.status != "failed":
                    ended += 1
                    self._download_results(batch, watched)
                elif (queued := watched.queued) and batch.is_over_token_limit and (
                    self._pending().issuperset(queued.positions)  # they have no result, and are in no other batch
                ):
                    self._console.message(f"part {queued.part.label}: batch {batch.id} was refused for the token limit")
                    del self._poller.latest[batch.id]
                    refused.append(queued)
                elif not batch.is_over_token_limit and watched.sent_digests is None:
                    raise CommandError(f"batch {batch.id} failed: {self._failure_reasons(batch)}; no output was "
                                       "written; batches still running will be picked up by the next run")
                else:  # its requests are in other batches, but it makes room, too
                    ended += 1
            if self.is_stopped or is_cut_short:
                queue.waiting.clear()
            elif idle_refusals := queue.settle(refused, ended, is_idle=not self.active):
                seconds = self._args.interval * 2 ** min(idle_refusals, 5)
                self._console.message(f"no batch of this run is active; trying again in {seconds:g} s")
                self._clock.sleep(seconds)

    def _ended(self) -> Iterator[tuple[Batch, ActiveBatch]]:
        """Poll every active batch once. Yield those that have ended, and stop watching them."""
        for batch_id, end in self._poller.poll([*self.active]).items():
            watched = self.active[batch_id]
            if isinstance(end, NotFound) and self._clock.now() - watched.submitted_at < YOUNG_SECONDS:
                self._console.warn(f"{batch_id}: {end}; the batch is new and may not be visible yet; still waiting")
                continue
            problem = str(end) if isinstance(end, OutputMissing) else ""
            if isinstance(end, CommandError) and not problem:
                raise end
            if isinstance(end, Batch) and end.status == "cancelled" and watched.batch.status != "cancelling":
                self._stop(f"batch {batch_id} was cancelled; this run ends when its other batches have ended; run "
                           "again to send the rest")
            yield self._poller.latest[batch_id], self.active.pop(batch_id)._replace(problem=problem)

    def _failure_reasons(self, batch: Batch) -> str:
        """Why a batch failed: its errors, and the most common ones of its error file."""
        reasons = batch.failure_reasons()
        if batch.error_file_id:
            with temporary_file() as copy, contextlib.suppress(Refused, UnusableId):
                self._api.fetch(batch.error_file_id, copy, f"errors of {batch.id}")
                reasons += f": {errors_in(Input(copy, 'its error file'))}"
        return reasons

    # submitting

    def _submit(self, queued: QueuedPart) -> bool:
        """Submit a part. Returns False if another process has submitted some of its requests meanwhile.

        Then the batches of that process are picked up instead.
        """
        label = queued.part.label
        try:
            batch = self._submitter.submit(
                queued.source, queued.part, lambda file_id: self._console.message(f"part {label}: File ID: {file_id}")
            )
        except AlreadySubmitted as found:
            picked_up = [self._pick_up(batch) for batch in found.batches]
            return False if any(picked_up) else self._submit(queued)
        self._console.message(f"part {label}: Batch ID: {batch.id}")
        self._poller.latest[batch.id] = batch
        self.active[batch.id] = ActiveBatch(batch, queued.positions, False, self._clock.now(), queued)
        return True

    # earlier batches

    def _pick_up(self, batch: Batch) -> bool:
        """Download the results of a batch that this run has not made, or watch it, if it may have what we need.

        Its requests are known if it is a part of this file as it is divided now; else its input file tells. Returns
        whether it was needed.
        """
        is_of_file = self._submitter.is_of_file(batch)
        self._submitter.ignore(batch)
        digests, queued = None, None
        positions: Collection[int] | None = None
        part = next((each for each in self._parts if each.sha256 == self._submitter.part_sha256(batch)), None)
        if part:
            positions = positions_of(part)
            queued = QueuedPart(self._requests, part, positions)
        elif (digests := self._input_digests(batch, is_of_file=is_of_file)) is not None:
            index = self._results.requests
            found = ((index.position_of.get(custom_id), digest) for custom_id, digest in digests.items())
            positions = {at for at, digest in found if at is not None and index.digest(at) == digest}
        elif not is_of_file:
            self._console.warn(f"batch {batch.id} was made from an earlier version of {self._requests.name}, but its "
                               "input file is not available; requests in both may be paid for twice")
            return False
        needed = self._unanswered() if positions is None else self._unanswered().intersection(positions)
        if not needed:
            return False
        is_done = batch.has_ended and not lacks_output(self._api, batch)
        self._poller.latest[batch.id] = batch
        watched = ActiveBatch(batch, positions, True, queued=queued, sent_digests=digests)
        if is_done:
            self._download_results(batch, watched)
            needed -= self._unanswered()
        else:
            self.active[batch.id] = watched
        if needed:
            origin = "" if is_of_file else f", made from an earlier version of {self._requests.name},"
            have = "some" if positions is None and not is_done else f"{len(needed):,}"
            self._console.message(f"batch {batch.id} ({batch.status}){origin} already has {have} of the requests")
        return True

    def _input_digests(self, batch: Batch, *, is_of_file: bool) -> dict[str, bytes] | None:
        """The digests of a batch's requests by custom_id, from its input file. None if that is gone or rewritten.

        In a batch of this request file, a custom_id alone tells the request, also where a gateway has rewritten the
        file.
        """
        index, file_id = self._results.requests, self._submitter.input_file_of(batch)
        digests: dict[str, bytes] = {}
        try:
            with temporary_file() as copy:
                name = f"the input file of {batch.id}"
                self._api.fetch(file_id, copy, name)
                sent = Input(copy, name)
                if not is_of_file and batch.metadata.get("input_sha256") not in (None, sent.sha256()):
                    return None
                for line in sent.lines():
                    custom_id = str_field(read_object(line), "custom_id")
                    position = index.position_of.get(custom_id) if is_of_file else None
                    digests[custom_id] = digest_of(line) if position is None else index.digest(position)
        except (Refused, UnusableId, ValueError) as failure:  # ValueError: a line that is not a request
            if isinstance(failure, ApiError) and failure.status in (401, 429):
                raise
            return None
        return digests

    # results

    def _download_results(self, batch: Batch, watched: ActiveBatch) -> None:
        """Download and index the files of a batch that has ended. Withhold its requests whose results are lost."""
        spool = self._spools[watched.is_earlier]
        outcomes: dict[int, str] = {}
        reasons = [watched.problem] if watched.problem else []
        for kind, file_id in batch.files.items():
            name = f"{kind} of {batch.id}"
            start = spool.seek(0, os.SEEK_END)
            try:
                self._api.fetch(file_id, spool, name)
            except (Refused, WrongSize, UnusableId) as failure:
                if isinstance(failure, ApiError) and failure.status in (401, 403, 429):
                    raise
                problem = "is no longer on the server" if isinstance(failure, NotFound) else f"cannot be had: {failure}"
                if kind == "results":
                    reasons.append(f"the output file of batch {batch.id} {problem}")
                else:
                    self._console.warn(f"the error file of batch {batch.id} {problem}")
                continue
            lines = self._results.read_batch(spool, name, start, watched.sent_digests, is_earlier=watched.is_earlier)
            outcomes |= lines.outcomes
            self.tokens = self.tokens.plus(lines.tokens)
            if lines.unreadable:
                reasons.append(f"{plural(lines.unreadable, 'line')} of the {kind} of batch {batch.id} cannot be read")
            of_others = lines.outcomes.keys() - set(lines.outcomes if watched.positions is None else watched.positions)
            if unknown := lines.unknown + len(of_others):
                has = "has a custom_id" if unknown == 1 else "have custom_ids"
                reasons.append(f"{plural(unknown, 'result')} of batch {batch.id} {has} that its "
                               "input file does not have")
        if batch.says_nothing:
            reasons.append(f"batch {batch.id} is completed, but names neither results nor counts")
        for reason in reasons:
            self._console.warn(reason)
        if reasons:
            self._withhold(watched, "; ".join(reasons), outcomes)
        self._submitter.warn_of_lost_answers(batch)
        # a rejection that was there before the run is no reason not to send the request again
        is_new = not (watched.is_earlier and watched.batch.has_ended)
        answers = (SUCCEEDED, REJECTED) if is_new else (SUCCEEDED,)
        self._again -= {position for position, outcome in outcomes.items() if outcome in answers}

    def _withhold(self, watched: ActiveBatch, reason: str, outcomes: Container[int]) -> None:
        """Leave those requests of a batch out for which it has no line; all that are pending, if they are unknown.

        If the batch was made of a file of another name, none is left out: a file that `retry` wrote may be the same.
        """
        if not self._submitter.has_name(watched.batch):
            return
        positions = self._wanted() if watched.positions is None else watched.positions
        self.withheld.append(Withheld(reason, {each for each in positions if each not in outcomes}))


def what_is_new(run: Run, results: Results, spools: Sequence[BinaryIO], prices: tuple[float, float] | None) -> str:
    """What a run has brought and used; empty if nothing."""
    new = Counter(line.file for line in results.best if line and line.outcome in (SUCCEEDED, REJECTED))
    own, earlier = (new[spool] for spool in spools)
    text = f"new in this run: {with_commas(own + earlier, 'result')}"
    if earlier:
        text += f", {earlier:,} of them from earlier batches"
    if any(run.tokens):
        text += f"; tokens: {run.tokens.input:,} input, {run.tokens.output:,} output"
        text += f"; {dollars(run.tokens.input or 0, run.tokens.output or 0, prices)}" if prices else ""
    return text if own + earlier else ""


def refuse_withheld(withheld: Sequence[Withheld], results: Results) -> None:
    """Raise CommandError if requests were left out of the run, and say how to go on."""
    to_send = results.positions(TO_SEND)
    if left := to_send.intersection(itertools.chain.from_iterable(each.positions for each in withheld)):
        reasons = "; ".join(each.reason for each in withheld if not to_send.isdisjoint(each.positions))
        raise CommandError(
            f"{reasons}; {plural(len(left), 'request')} that may have been paid for "
            f"{'was' if len(left) == 1 else 'were'} not sent again; name an earlier download with --results, or write "
            "them to a file with retry and run that file into the same --out, or use --force, which sends all requests "
            "of the file again"
        )


def open_out(path: str, stack: contextlib.ExitStack) -> Input | None:
    """Open the file that --out is to replace, if there is one."""
    if is_stream(path) or not os.path.exists(path):
        return None
    return stack.enter_context(open_input(path))


def cmd_run(args: argparse.Namespace, console: Console, clock: Clock) -> int:
    with contextlib.ExitStack() as stack:
        requests = stack.enter_context(open_input(args.input))
        checked = check_input(requests, console, args.endpoint, args.max_requests, hashes_lines=True)
        if not args.dry_run:
            refuse_unwritable(args.output)
            sha256 = requests.sha256()
            note = stack.enter_context(locked_note(sha256, requests, console))
        results = read_results(args, checked.requests, console, stack)
        if before := open_out(args.output, stack):
            results.read_out(before)
        sending = results.positions(TO_SEND) | requests_to_repeat(args, results)
        if args.dry_run or not sending:
            console.message(what_to_send(results, sending))
        if args.dry_run:
            if sending:
                takes = what_it_takes(args, requests, results, sending)
                unknown = "no answer so far says how many tokens it took; the command preview estimates them"
                console.message(takes or unknown)
            if problem := too_many(args, len(sending)):
                raise CommandError(problem)
            return 0
        run = None
        if sending:
            spools = stack.enter_context(temporary_file()), stack.enter_context(temporary_file())
            api = stack.enter_context(connect(args, console, clock))
            patient_api = api._replace(outage_budget=OUTAGE_BUDGET)
            submitter = Submitter(patient_api, args, sha256, checked, note, finds_versions=True)
            run = Run(args, submitter, requests, checked, results, spools)
            with advice_if_stopped(run.advice, console), clock.limit(args.timeout):
                run.rounds(submitter.list_batches(api))
        if before:
            before.refuse_changes()  # its lines may no longer be where they were
        now = open_out(args.output, stack)
        if now and not (before and os.path.sameopenfile(before.file.fileno(), now.file.fileno())):
            results.read_out(now, yields=True)  # another run has written it meanwhile
        advice = "; free some space and run the same command again: it fetches the results without paying again"
        with open_output(args.output, advice) as out:
            out.writelines(result_lines(results))
        report_results(wrote_prefix(args.output), results, console)
        if run:
            if news := what_is_new(run, results, spools, args.prices):
                console.message(news)
            refuse_withheld(run.withheld, results)
        return int(results.outcomes()[SUCCEEDED] < len(results.best) or bool(run and run.is_stopped))


# ---- command line


def log_path(text: str) -> str:
    if text in ("-", STDOUT):
        raise argparse.ArgumentTypeError("stdout is for results; name a file, or /dev/stderr")
    return output_path(text)


def id_argument(text: str) -> str:
    if not is_id(text):
        raise argparse.ArgumentTypeError(f"not a batch id: {text!a}")
    return text


def whole_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"not a whole number of 0 or more: {text!a}")
    return int(text)


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
    "--batch-id": {"dest": "batch_ids", "action": "extend", "nargs": "+", "required": True, "type": id_argument,
                   "metavar": "ID", "help": "ids of batches, as create, run and list print them"},
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
    "--results": {"action": "extend", "nargs": "+", "required": True, "type": input_path, "metavar": "JSONL",
                  "help": "results: output and error files, or files that run wrote"},
    "--include-rejected": {"action": "store_true",
                           "help": "include rejected requests, which the API would probably reject again"},
    "--ask": {"action": "store_true", "help": "on a terminal, ask before requests are sent"},
    "--dry-run": {"action": "store_true", "help": "say what would be sent, and send nothing"},
    "--max-new": {"type": whole_number, "metavar": "N",
                  "help": "send nothing if more than N requests would be sent"},
    "--requests": {"type": positive_int, "default": 3, "metavar": "N",
                   "help": "how many requests to send (default: %(default)s)"},
    "--prices": {"type": price_pair, "metavar": "IN,OUT",
                 "help": "dollars per million input and output tokens, for an estimate of the cost"},
    "--csv": {"type": input_path, "metavar": "CSV",
              "help": "the artists' spreadsheet: write its rows, with the bio columns added"},
    "--id-column": {"type": text_argument, "metavar": "NAME",
                    "help": "column of --csv that holds the ids (default: artist_id)"},
    "--name-column": {"type": text_argument, "metavar": "NAME",
                      "help": "column of --csv that holds the names (default: artist_name)"},
    "--encoding": {"type": encoding_name, "metavar": "NAME", "help": "encoding of --csv (default: utf-8)"},
    "--skip-header": {"action": "store_true", "help": f"--csv has no header; its columns are {','.join(COLUMNS)}"},
    "--excel": {"action": "store_true",
                "help": "write for Excel: add a byte-order mark, and put a ' before cells that look like formulas"},
    "--log-file": {"type": log_path, "metavar": "PATH",
                   "help": "log to append to (default: logs/batch_YYYYMMDD_HHMMSS.log)"},
    "--verbose": {"action": "store_true", "help": "show each API response on stderr"},
    "retrieve --out": {"dest": "output", "type": output_path, "metavar": "PATH",
                       "help": "output file, with the error file beside it (default: results_ID.jsonl, "
                               "errors_ID.jsonl); with one --batch-id only"},
    "retry --out": {"dest": "output", "required": True, "type": output_path, "metavar": "JSONL",
                    "help": "request file to write, - for stdout"},
    "export --out": {"dest": "output", "required": True, "type": output_path, "metavar": "CSV",
                     "help": "CSV to write, - for stdout"},
    "run --out": {"dest": "output", "required": True, "type": output_path, "metavar": "JSONL",
                  "help": "results file to bring up to date, - for stdout"},
    "run --results": {"action": "extend", "nargs": "+", "default": [], "type": input_path, "metavar": "JSONL",
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
        subparser.set_defaults(command=command, input=None, csv=None, results=[], batch_ids=[])
        subparser.set_defaults(output=None, log_file=None)
        for flag in flags:
            subparser.add_argument(flag, **OPTIONS.get(f"{name} {flag}") or OPTIONS[flag])

    add(cmd_validate, "check a request file, without uploading it", "--in", "--endpoint")
    add(cmd_preview, "send a few requests right away, show the answers, and estimate the whole",
        "--in", "--requests", "--prices", *ONLINE)
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
        "--in", "--results", "--out", "--csv", "--id-column", "--name-column", "--encoding", "--skip-header", "--excel")
    add(cmd_run, "the whole job: bring a results file up to date with a request file",
        "--in", "--out", "--results", "--ask", "--dry-run", "--prices", "--max-new", "--include-rejected", "--force",
        "--endpoint", "--completion-window", "--max-requests", "--interval", "--timeout", "--attempts", *ONLINE)
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
    if args.log_file and args.output and os.path.realpath(args.log_file) == os.path.realpath(args.output):
        parser.error("the log would be the same file as the output; choose another --log-file")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_paths(parser, args)
    if args.output and len(args.batch_ids) > 1:
        parser.error("--out works with a single --batch-id only")
    if args.command is cmd_export:
        if not args.csv and (args.id_column or args.name_column or args.encoding or args.skip_header):
            parser.error("--id-column, --name-column, --encoding and --skip-header need --csv")
        if args.skip_header and (args.id_column or args.name_column):
            parser.error("--id-column and --name-column need a header; they do not go with --skip-header")
        if args.output.lower().endswith((".xlsx", ".xls")):
            parser.error(f"export writes CSV, not Excel's own format; choose an --out that ends in .csv: {args.output}")
    args.argv = [*(sys.argv[1:] if argv is None else argv)]
    return args


# ---- main


def main(argv: Sequence[str] | None = None, *, sleep: Callable[[float], None] = time.sleep,
         clock: Callable[[], float] = time.monotonic) -> int:
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
