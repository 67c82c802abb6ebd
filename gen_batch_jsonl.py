#!/usr/bin/env python3
"""Turn a CSV of artists into a request file (JSONL) for OpenAI's Batch API.

  gen_batch_jsonl.py --in artists.csv --out requests.jsonl \\
      --prompt-file bio_prompt.md --model gpt-6-luna
  gen_batch_jsonl.py --in artists.csv --out requests.jsonl \\
      --prompt-id pmpt_abc --model gpt-6-luna
  zcat artists.csv.gz | gen_batch_jsonl.py --in - --out - \\
      --prompt-file bio_prompt.md --model gpt-6-luna

The CSV has a header with artist_id, artist_name and, optionally, artist_data
(or the columns that --id-column, --name-column and --data-column name). Each
valid row becomes one request. A stored prompt (--prompt-id) gets the name and
the data; a prompt template (--prompt-file) can use every column:
{{artist_name}}, {{country}}.

Invalid rows are skipped and listed on stderr, where the last line accounts for
every row. An --out file is written whole or not at all.

exit codes: 0 success, 1 fatal error, 2 invalid arguments, 130 interrupted,
143 terminated, 129 hung up
"""
from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends without a traceback

import argparse
import codecs
import contextlib
import csv
import gc
import io
import json
import math
import os
import re
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO, cast

PROG = "gen_batch_jsonl.py"
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

COLUMNS = ("artist_id", "artist_name", "artist_data")
RESPONSES = "/v1/responses"
CHAT_COMPLETIONS = "/v1/chat/completions"
PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")

# limits
MAX_FIELD_CHARS = 10_485_760  # the longest string that the Responses API accepts
MAX_METADATA_CHARS = 512  # of one metadata value; Batch API reference
MAX_EXTRA_FIELDS = 20  # a record with more extra fields than this is not read to its end
MAX_INVALID_SHARE = 0.05  # of rows that cannot be decoded; beyond it, the file is in another encoding
BLOCK_BYTES = 1 << 17  # of the CSV, read at a time
CAREFUL_BYTES = 1 << 14  # how much to read record by record before trying a block again

# reading
LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n|\Z)")
LINE_END = re.compile(rb"\r\n|\r|\n|\Z")
UNQUOTED = {delimiter.encode(): re.compile(f"[^\r\n{delimiter}]*".encode()) for delimiter in DELIMITERS}
UNDECODABLE = "mark_undecodable"  # an error handler: invalid bytes become a lone surrogate, which is not valid UTF-8
codecs.register_error(UNDECODABLE, lambda error: ("\udcff", cast(UnicodeDecodeError, error).end))

# messages
DELIMITER_NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": 'a "|"'}
NULL_NAMES = frozenset(b"NaN nan NAN NULL null Null N/A n/a #N/A #n/a #REF! #NAME? #VALUE! #DIV/0! <NA> \\N".split())
FOREIGN_FILES = {  # by their first bytes
    b"PK\x03\x04": "an Excel workbook or another zip file; open it and save it as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; open it and save it as CSV UTF-8",
    b"%PDF-": "a PDF file; export the table as CSV",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"\x1f\x8b": "a gzip file; unpack it first: zcat FILE | gen_batch_jsonl.py --in - ...",
    b"BZh91AY&SY": "a bzip2 file; unpack it first: bzcat FILE | gen_batch_jsonl.py --in - ...",
    b"\xfd7zXZ\x00": "an xz file; unpack it first: xzcat FILE | gen_batch_jsonl.py --in - ...",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it first: zstdcat FILE | gen_batch_jsonl.py --in - ...",
}

# hiding: inside the quotes of a block, bytes that UTF-8 never contains stand in for special characters
STAND_INS = {b",": b"\xf5", b";": b"\xf6", b"\t": b"\xf7", b"|": b"\xf8", b"\n": b"\xf9", b"\r": b"\xfa", b'"': b"\xfb"}
REVEAL = bytes.maketrans(b"".join(STAND_INS.values()), b"".join(STAND_INS))
SEPARATOR = b"\xff"  # another such byte, between joined values

# escaping
JSON_ESCAPES = {  # the backslash first, because the other escapes bring backslashes
    char.encode(): json.dumps(char)[1:-1].encode() for char in ["\\", '"', *map(chr, range(32))]
}
UNESCAPED_BYTES = bytes({*range(256)} - {*b"".join(JSON_ESCAPES)})
LINE_SEPARATORS = {char: json.dumps(char)[1:-1].encode() for char in "\u2028\u2029\x85"}

# blanks
BLANK_STAND_INS = STAND_INS[b"\t"] + STAND_INS[b"\n"] + STAND_INS[b"\r"]
ALL_BLANKS = BLANKS + BLANK_STAND_INS.decode("utf-8", "surrogateescape")
SHORT_BLANKS = bytes(char for char in BLANKS.encode() if char < 128) + BLANK_STAND_INS
LONG_BLANKS = frozenset(char.encode() for char in BLANKS if not char.isascii())  # two or three bytes each
BLANK_BYTES = bytes({*BLANKS.encode(), *BLANK_STAND_INS})
SQUEEZED = dict.fromkeys(map(ord, BLANKS + "-_"))  # for str.translate: leaves these out


class Problem(NamedTuple):
    """Why a row is skipped: the reason it is counted under, the details, and what to do."""

    reason: str
    detail: str
    advice: str = ""


REPEATED_HEADER = Problem("repeated header", "repeats the header")


class Layout(NamedTuple):
    """How to read the rows. `used` are the positions of the columns that the requests need: id, name, then others."""

    delimiter: bytes
    width: int
    used: list[int]
    names: list[str]  # of the used columns, for messages
    header_keys: list[str]  # column_key() of each name in the header


class Rows(NamedTuple):
    """Rows of a block: the line where each begins, and for each used column the trimmed values."""

    lines: Sequence[int]
    columns: list[list[bytes]]
    next_line: int
    swallowed: dict[int, list[int]]  # by the line of a row: lines in it that look like rows
    needs_escapes: bool  # some values may contain characters that JSON escapes, apart from the hidden ones


class Record(NamedTuple):
    """A record that was read by itself, with its problem if it has one."""

    line: int
    fields: list[bytes]
    problem: Problem | None
    size: int  # in bytes, up to where reading goes on: the next line for an invalid row, else the next record


# -- text --------------------------------------------------------------------------------------------------------


def quoted(text: str) -> str:
    """The text in quotes for a message, cut to a readable length."""
    return f'"{text[:80]}{"…" if len(text) > 80 else ""}"'


def to_text(value: bytes) -> str:
    """The value for a message or a comparison; bytes that are not UTF-8 become lone surrogates."""
    return value.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def is_blank(value: bytes) -> bool:
    return not to_text(value).strip(BLANKS)


def trim_value(value: bytes) -> bytes:
    """Remove the blanks around a value, also those that a block hides."""
    edges = (value[:2], value[:3], value[-2:], value[-3:])
    if value.strip(SHORT_BLANKS) is value and LONG_BLANKS.isdisjoint(edges):
        return value
    return to_bytes(to_text(value).strip(ALL_BLANKS))


def trim(values: list[bytes]) -> list[bytes]:
    """Remove the blanks around values. `strip` returns the same object if it removes nothing, which is fast to test."""
    return [value if value.strip(BLANK_BYTES) is value else trim_value(value) for value in values]


def escape_line_separators(text: bytes) -> bytes:
    """Escape the characters at which some readers would cut a line of JSON."""
    for char, escaped in LINE_SEPARATORS.items():
        text = text.replace(char.encode(), escaped)
    return text


def escape(text: bytes) -> bytes:
    """Escape the text for the inside of a JSON string."""
    if special := text.translate(None, UNESCAPED_BYTES):
        for char, escaped in JSON_ESCAPES.items():
            if char in special:
                text = text.replace(char, escaped)
    return escape_line_separators(text)


def count_line_ends(data: bytes, start: int = 0, end: int | None = None) -> int:
    """Count the line ends: LF, CRLF or CR."""
    found = data.count(b"\n", start, end)
    if data.find(b"\r", start, end) >= 0:
        found += data.count(b"\r", start, end) - data.count(b"\r\n", start, end)
    return found


def shape_of(artist_id: str) -> str:
    """An id with its runs of digits and of letters collapsed: `a12-b` and `x7-abc` are both `a0-a`."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", artist_id.strip(BLANKS)))


def lines_like_rows(text: bytes, line: int, artist_id: bytes, layout: Layout) -> list[int]:
    """The lines of a record, after its first, that look like rows: as many fields, and an id of the same shape.

    Prose can match a shape of only letters or only digits by accident; with such a shape, a line that has a blank after
    a delimiter is taken for prose. `text` is the record without quotes, `line` is its first line.
    """
    shape, found = "", []
    for number, each in enumerate(text.splitlines()[1:], line + 1):
        fields = each.split(layout.delimiter)
        if len(fields) == layout.width:
            shape = shape or shape_of(to_text(artist_id))
            may_be_prose = not {"a", "0"} <= {*shape}
            if shape_of(to_text(fields[layout.used[0]])) == shape and not (
                may_be_prose and any(field[:1].isspace() for field in fields[1:])
            ):
                found.append(number)
    return found


# -- CSV: a block as a whole -------------------------------------------------------------------------------------


def last_line_end(data: bytes, start: int, end: int) -> int:
    """Where the last line before `end` ends; `start` if there is none. A CR just before `end` may be half a CRLF."""
    found = data.rfind(b"\n", start, end)
    if found < 0:
        found = data.rfind(b"\r", start, max(start, end - 1))  # -1 would mean the end of the data
    return max(found, start - 1) + 1


def block_end(data: bytes, start: int, end: int, is_last: bool) -> int:
    """The last line end before `end` with an even number of quotes before it; `start` if there is none.

    At the end of the file (`is_last`), the end of the data counts as a line end.
    """
    if not is_last:
        end = last_line_end(data, start, end)
    quotes = data.count(b'"', start, end)
    while quotes % 2:
        previous, end = end, last_line_end(data, start, data.rfind(b'"', start, end))
        quotes -= data.count(b'"', end, previous)
    return end


def hide_quoted(block: bytes, delimiter: bytes) -> bytes | None:
    """Remove the quotes, and replace delimiters, line ends and quotes inside quoted fields by their stand-ins.

    Returns None if a quote is out of place. Split at the quotes, every second piece lies outside of quoted fields.
    Between two quotes, such a piece is empty (the two are a doubled quote), or it begins and ends with a delimiter or a
    line end.
    """
    pieces = block.split(b'"')
    outside = pieces[2:-1:2]
    kinds = {*outside}
    ends = {piece[-1:] for piece in (pieces[0], *kinds)}
    starts = {piece[:1] for piece in (*kinds, pieces[-1])}
    if not ends <= {b"", delimiter, b"\n"} or not starts <= {b"", delimiter, b"\n", b"\r"}:
        return None
    inside = b'"'.join(pieces[1::2])
    for char in (delimiter, b"\n", b"\r"):
        inside = inside.replace(char, STAND_INS[char])
    pieces[1::2] = inside.split(b'"')
    if b"" in kinds:
        pieces[2:-1:2] = [piece or STAND_INS[b'"'] for piece in outside]
    return b"".join(pieces)


def lines_of_records(
    records: list[bytes], artist_ids: list[bytes], line: int, layout: Layout
) -> tuple[list[int], int, dict[int, list[int]]]:
    """The line where each record begins, the line after them, and the lines in records that look like rows."""
    lines, swallowed = [], {}
    for record, artist_id in zip(records, artist_ids, strict=True):
        lines.append(line)
        if STAND_INS[b"\n"] in record or STAND_INS[b"\r"] in record:
            text = record.translate(REVEAL)
            if held := lines_like_rows(text, line, artist_id, layout):
                swallowed[line] = held
            line += count_line_ends(text)
        line += 1
    return lines, line, swallowed


def plain_block(block: bytes, delimiter: bytes) -> bytes | None:
    """The block with LF line ends and without quotes. None if its quotes or its line ends are out of the ordinary."""
    if not block.endswith((b"\n", b"\r")):
        block += b"\n"
    plain = hide_quoted(block, delimiter) if b'"' in block else block
    if plain and b"\r" in plain:
        plain = plain.replace(b"\r\n", b"\n")
    return None if plain and b"\r" in plain else plain


def split_rows(plain: bytes, delimiter: bytes) -> tuple[list[bytes], int] | None:
    """All fields of a plain block, each row's followed by a line end, and the width of the rows. None if widths differ.

    Each line end becomes a field of its own. All rows have the same width if these fields stand at equal distances.
    """
    width = plain.count(delimiter, 0, plain.index(b"\n")) + 1
    separated = plain.replace(b"\n", delimiter + b"\n" + delimiter)
    number = (len(separated) - len(plain)) // 2
    fields = separated.split(delimiter)
    is_even = len(fields) == number * (width + 1) + 1 and fields[width :: width + 1].count(b"\n") == number
    return (fields, width) if is_even else None


def has_special_ids(artist_ids: list[bytes], layout: Layout) -> bool:
    """Whether rows have to be read by themselves because of an id.

    An empty id may be that of a blank row, and a column name that of a repeated header. An id with hidden characters
    would not equal the same id in a row that was read by itself.
    """
    if not all(artist_ids):
        return True
    ids = b",".join([b"", *artist_ids, b""])
    squeezed = to_text(ids).casefold().translate(SQUEEZED)
    keys = [key.translate(SQUEEZED) for key in layout.header_keys if key]
    return ids.translate(REVEAL) != ids or any(f",{key}," in squeezed for key in keys)


def rows_of_block(block: bytes, first_line: int, layout: Layout, limit: int) -> Rows | None:
    """The first `limit` rows of a block. None if the block has to be read record by record.

    Each step handles the whole block at once, which is ten times as fast as handling its records one by one.
    """
    try:
        text = block.decode()
    except UnicodeDecodeError:
        return None
    plain = plain_block(block, layout.delimiter)
    if not plain or not (split := split_rows(plain, layout.delimiter)):
        return None
    fields, width = split
    step = width + 1
    if width < layout.width or any(any(trim(fields[column:-1:step])) for column in range(layout.width, width)):
        return None
    number = min(len(fields) // step, limit)
    columns = [trim(fields[column : number * step : step]) for column in layout.used]
    if has_special_ids(columns[0], layout):
        return None
    special = plain.translate(None, UNESCAPED_BYTES + b"\n" + layout.delimiter)
    needs_escapes = special != b"" or any(char in text for char in LINE_SEPARATORS)
    if STAND_INS[b"\n"] in plain or STAND_INS[b"\r"] in plain:
        records = plain.split(b"\n", number)[:number]
        lines, next_line, swallowed = lines_of_records(records, columns[0], first_line, layout)
        return Rows(lines, columns, next_line, swallowed, needs_escapes)
    next_line = first_line + number
    return Rows(range(first_line, next_line), columns, next_line, {}, needs_escapes)


# -- CSV: a record by itself -------------------------------------------------------------------------------------


class Parsed(NamedTuple):
    """The record at the beginning of some data: its fields and its end, or what is wrong with it."""

    fields: list[bytes]
    end: int
    problem: Problem | None = None
    is_open: bool = False  # more data could change the outcome


def read_field(data: bytes, at: int, delimiter: bytes) -> tuple[bytes, int]:
    """The field that begins at `at`, and where it ends: past the end of the data if its closing quote is missing."""
    if not data.startswith(b'"', at):
        unquoted = cast(re.Match[bytes], UNQUOTED[delimiter].match(data, at))
        return unquoted[0], unquoted.end()
    closing = data.find(b'"', at + 1)
    while closing >= 0 and data.startswith(b'"', closing + 1):  # a doubled quote
        closing = data.find(b'"', closing + 2)
    end = len(data) if closing < 0 else closing
    return data[at + 1 : end].replace(b'""', b'"'), end + 1


def parse_record(data: bytes, start: int, line: int, layout: Layout, max_chars: int = MAX_FIELD_CHARS) -> Parsed:
    """Read the record that begins on `line`, by the rules of csv.reader(strict=True)."""

    def line_at(end: int) -> int:
        return line + count_line_ends(data, start, end)

    fields: list[bytes] = []
    at = start
    while True:
        value, end = read_field(data, at, layout.delimiter)
        if len(value) > max_chars and len(text := to_text(value)) > max_chars:
            noticed = line_at(at) + count_line_ends(to_bytes(text[: max_chars + 1]))
            detail = f"a field exceeds {max_chars} characters (noticed on line {noticed})"
            return Parsed([], at, Problem("field too long", detail))
        if end > len(data):
            last_line = line_at(len(data)) - data.endswith((b"\n", b"\r"))
            detail = f"a quote is never closed (noticed at the end, line {last_line})"
            return Parsed([], at, Problem("malformed quoting", detail), is_open=True)
        fields.append(value)
        at = end
        if len(fields) > layout.width + MAX_EXTRA_FIELDS and not is_blank(value):
            return Parsed(fields, at)  # the wrong number of fields, whatever follows
        if not data.startswith(layout.delimiter, at):
            break
        at += len(layout.delimiter)
    line_end = LINE_END.match(data, at)
    if not line_end:
        detail = f"text after a closing quote (noticed on line {line_at(at)})"
        return Parsed([], at, Problem("malformed quoting", detail))
    end = line_end.end()
    return Parsed(fields, end, is_open=end == len(data) and not data.endswith(b"\n"))


def wrong_width(number: int, row: str, layout: Layout) -> Problem:
    """The problem of a row with `number` fields: it shows the beginning of the row, and the likely cause."""
    delimiter = to_text(layout.delimiter)
    ours = DELIMITER_NAMES[delimiter]
    others = [other for other in DELIMITERS if other != delimiter and row.count(other) == layout.width - 1]
    if number == 1 and others:
        cause = f"{DELIMITER_NAMES[others[0]]} separates its fields, and {ours} those of the header"
    elif number > layout.width:
        cause = f"a value with {ours} in it needs quotes around it"
    else:
        cause = "a value is missing, or has a line break but no quotes around it"
    fields = plural(number, "field")
    if number > layout.width + MAX_EXTRA_FIELDS:
        fields = f"more than {number - 1} fields"
    return Problem("wrong number of fields", f"{fields} instead of {layout.width} in {quoted(row)}; {cause}")


def header_or_width_problem(line: int, fields: list[bytes], beginning: bytes, layout: Layout) -> Problem | None:
    """A repeated header, or a wrong number of fields. Raises CommandError for a header that differs from the first."""
    width, id_column = layout.width, layout.used[0]
    if len(fields) > id_column and column_key(to_text(fields[id_column])) in layout.header_keys:
        keys = [column_key(to_text(field)) for field in fields]
        if keys == layout.header_keys:
            return REPEATED_HEADER
        if {layout.header_keys[column] for column in layout.used[:2]} <= {*keys}:
            raise CommandError(f"line {line}: a second header that differs from the first; "
                               "split the file before this line and convert the parts one by one")
    return None if len(fields) == width else wrong_width(len(fields), to_text(beginning.splitlines()[0]), layout)


def not_valid(encoding: str) -> str:
    return f"not valid {encoding.upper() if encoding.lower().startswith('utf') else encoding}"


def undecodable(line: int, fields: list[bytes], layout: Layout, encoding: str) -> Problem | None:
    """The problem of the first used value that is not valid in the file's encoding."""
    for column, name in zip(layout.used, layout.names, strict=True):
        try:
            fields[column].decode()
        except UnicodeDecodeError as error:
            around = fields[column][max(0, error.start - 30) : error.start + 30]
            reading = around.decode("windows-1252", "replace").strip(BLANKS)
            advice = "name the encoding of the CSV with --encoding"
            if encoding == "utf-8" and reading and "\ufffd" not in reading:
                advice = f'if "{reading}" on line {line} looks right, add --encoding windows-1252'
            return Problem(not_valid(encoding), f"{name} is {not_valid(encoding)}", advice)
    return None


# -- reading -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_input(path: str) -> Iterator[io.BufferedReader]:
    if path == STDIN:
        yield cast(io.BufferedReader, stdin_bytes())
        return
    with os_errors_as(f"read {path}"):
        file = open(path, "rb")
    with file:
        yield file


def read_text(path: str) -> str:
    """The whole of a small UTF-8 file, its line ends as they are."""
    with open_input(path) as file, os_errors_as(f"read {shown(path)}"):
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CommandError(f"{shown(path)}: not valid UTF-8 (byte {error.start + 1}); save it as UTF-8") from None


class CsvReader:
    """Reads a CSV in any encoding, and hands it out as UTF-8: in blocks, or record by record.

    `line` is the number of the line that comes next. The reader never waits for more than the caller needs, so that a
    run with --limit ends while its pipe is still open.
    """

    def __init__(self, source: io.BufferedReader, path: str, encoding: str, block_bytes: int = BLOCK_BYTES) -> None:
        self.line = 1
        self._source = source
        self._name = shown(path)
        self._block_bytes = block_bytes
        self._data = b""  # what has been read; the part before `_at` is used up
        self._at = 0
        self._is_ended = False
        self._decoder: codecs.IncrementalDecoder | None = None
        while len(self._data) < 16 and b"\n" not in self._data and self._fill():
            pass
        self.encoding = self._detect_encoding(encoding)

    def _detect_encoding(self, encoding: str) -> str:
        """Choose the encoding by the first bytes, and convert them. Raises CommandError for a file that is no CSV."""
        for mark, kind in FOREIGN_FILES.items():
            if self._data.startswith(mark):
                raise CommandError(f"{self._name} is {kind}")
        encoding = encoding_of(self._data, encoding)
        codec = codecs.lookup(encoding).name
        if codec in ("utf-8", "utf-8-sig"):
            self._data = self._data.removeprefix(codecs.BOM_UTF8)
            encoding = "utf-8"
        elif self._data:
            self._decoder = codecs.getincrementaldecoder(encoding)(UNDECODABLE)
            self._data = self._to_utf_8(self._data)
        for byte_order, zeros in (("be", self._data[0:4:2]), ("le", self._data[1:4:2])):
            if zeros == b"\0\0":
                raise CommandError(f"{self._name} looks like UTF-16; if it is, add --encoding utf-16-{byte_order}")
        return encoding

    def _to_utf_8(self, chunk: bytes) -> bytes:
        """Convert a chunk. What is not valid in its encoding becomes bytes that are not valid in UTF-8."""
        if self._decoder is None:
            return chunk
        try:
            return self._decoder.decode(chunk, final=self._is_ended).encode("utf-8", "surrogatepass")
        except UnicodeError:  # some codecs do not support error handlers
            raise CommandError(f"{self._name} cannot be read in that encoding; choose another --encoding") from None

    def _fill(self) -> bool:
        """Read more of the file, as much as is there already. False at its end."""
        if self._is_ended:
            return False
        with os_errors_as(f"read {self._name}"):
            chunk = self._source.read1(max(self._block_bytes, len(self._data) - self._at))
        self._is_ended = not chunk
        if more := self._to_utf_8(chunk):
            self._data = self._data[self._at :] + more
            self._at = 0
        return bool(more) or not self._is_ended

    def is_at_end(self) -> bool:
        while self._at == len(self._data) and self._fill():
            pass
        return self._at == len(self._data)

    def peek_lines(self, max_bytes: float = MAX_FIELD_CHARS) -> Iterator[str]:
        """The lines from here on. A longer line is not read to its end."""
        offset = 0
        while True:
            line = cast(re.Match[bytes], LINE.match(self._data, self._at + offset))[0]
            is_last = self._at + offset + len(line) == len(self._data)
            if is_last and not line.endswith(b"\n") and len(line) < max_bytes and self._fill():
                continue
            if not line:
                return
            yield to_text(line)
            offset += len(line)

    def skip_lines(self, number: int) -> None:
        for _ in range(number):
            self.skip(self._line_size(), self.line + 1)

    def skip(self, size: int, next_line: int) -> None:
        self._at += size
        self.line = next_line

    def _line_size(self) -> int:
        """The size of the line that begins here, also of one that is not read to its end yet."""
        return len(to_bytes(next(self.peek_lines(math.inf), "")))

    def peek_block(self) -> bytes:
        """The data from here to the last line end outside of quotes. Empty if there is none nearby."""
        while True:
            window = self._at + 2 * self._block_bytes
            is_last = self._is_ended and window >= len(self._data)
            end = block_end(self._data, self._at, min(window, len(self._data)), is_last)
            if end > self._at or len(self._data) >= self._at + self._block_bytes or not self._fill():
                return self._data[self._at : end]

    def peek_record(self, layout: Layout) -> Record:
        """The record that begins here. A blank record has no fields and no problem."""
        parsed = parse_record(self._data, self._at, self.line, layout)
        while parsed.is_open and self._fill():
            parsed = parse_record(self._data, self._at, self.line, layout)
        if parsed.problem:
            return Record(self.line, [], parsed.problem, self._line_size())
        fields, size = parsed.fields, parsed.end - self._at
        if all(map(is_blank, fields[layout.width :])):
            fields = fields[: layout.width]
        if all(map(is_blank, fields)):
            return Record(self.line, [], None, size)
        problem = header_or_width_problem(self.line, fields, self._data[self._at : self._at + 500], layout)
        if problem not in (None, REPEATED_HEADER):
            size = self._line_size()
        return Record(self.line, fields, problem or undecodable(self.line, fields, layout, self.encoding), size)

    def records(self, layout: Layout, size: int) -> Iterator[Record]:
        """Read records for at least `size` bytes, and yield those that are not blank."""
        while size > 0 and not self.is_at_end():
            record = self.peek_record(layout)
            self.skip(record.size, self.line + count_line_ends(self._data, self._at, self._at + record.size))
            size -= record.size
            if record.fields or record.problem:
                yield record


# -- columns -----------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A CSV's delimiter, its column names, and the positions of artist_id, artist_name and, if any, artist_data."""

    delimiter: str
    names: list[str]
    roles: dict[str, int]

    def layout(self, used: list[int]) -> Layout:
        names = {position: role for role, position in reversed(self.roles.items())}  # a column's first role wins
        keys = [column_key(name) for name in self.names]
        return Layout(self.delimiter.encode(), len(keys), used, [names.get(at, self.names[at]) for at in used], keys)


def find_roles(header: Header, chosen: dict[str, str | None]) -> dict[str, int]:
    """The position of each role's column: the one an option names, or the one with the role's own name."""
    where = f"line {header.line}: the header"
    columns = listed_columns(header.names)
    if header.is_malformed:
        raise CommandError(f"{where} has a quote too many or too few; its columns are {columns}")
    missing = [role for role in COLUMNS[:2] if not chosen[role] and not header.find(role)]
    if missing:
        options = " and ".join(f"--{role.removeprefix('artist_')}-column" for role in missing)
        advice = f"name the right ones with {options}, or use --skip-header if there is no header"
        raise CommandError(f"{where} has no {' and no '.join(missing)}; its columns are {columns}; {advice}")
    return {role: header.position(name or role) for role, name in chosen.items() if name or header.find(role)}


def delimiter_of_row(reader: CsvReader, likely: str) -> str:
    """The delimiter that splits the first row into three fields: the likely one if it does, or if none does."""

    def width(delimiter: str) -> int:
        return len(reader.peek_record(Layout(delimiter.encode(), len(COLUMNS), [0], [""], [])).fields)

    return next((delimiter for delimiter in (likely, *DELIMITERS) if width(delimiter) == len(COLUMNS)), likely)


def read_table(reader: CsvReader, args: argparse.Namespace, console: Console) -> Table:
    """Read the header, or with --skip-header take the columns in their order. The reader then stands at the rows."""
    chosen = {"artist_id": args.id_column, "artist_name": args.name_column, "artist_data": args.data_column}
    header = read_header(reader.peek_lines(), [name or role for role, name in chosen.items()])
    if not header:
        raise CommandError("the CSV is empty; it needs a header and at least one row")
    if args.skip_header and not all(map(header.find, COLUMNS)):
        reader.skip_lines(header.line - 1)
        roles = {role: position for position, role in enumerate(COLUMNS)}
        return Table(delimiter_of_row(reader, header.delimiter), [*COLUMNS], roles)
    if args.skip_header:
        console.warn(f"line {header.line}: names the columns, so it is taken as the header despite --skip-header")
    reader.skip_lines(header.last_line)
    return Table(header.delimiter, header.names, find_roles(header, chosen))


def warn_of_missing_data(table: Table, is_stored_prompt: bool, console: Console) -> None:
    if "artist_data" in table.roles:
        return
    advice = "if another column holds the data, name it with --data-column"
    others = [name for at, name in enumerate(table.names) if name and at not in table.roles.values()]
    if is_stored_prompt and others:
        advice += "; a stored prompt receives only the name and data; a template (--prompt-file) can use every column"
    console.warn(f"the CSV has no artist_data column, so artist_data is empty in every request; {advice}")


# -- requests ----------------------------------------------------------------------------------------------------

SHORT_NAME = -1  # the artist's name, shortened for the metadata; RequestWriter appends it as the last column
Slot = Callable[[int], str]


class RequestTemplate(NamedTuple):
    """A request as JSON: constant pieces, and for each gap between two of them the column whose value goes there."""

    constants: list[bytes]
    columns: list[int]  # indexes into the used columns, or SHORT_NAME

    def render(self, columns: list[list[bytes]]) -> bytes:
        """The rows as requests, one per line. `columns` are escaped; short names, if used, are the last one."""
        height, step = len(columns[0]), 2 * len(self.columns) + 1
        pieces = [b""] * (height * step)
        for at, constant in enumerate(self.constants):
            pieces[2 * at :: step] = [constant] * height
        for at, column in enumerate(self.columns):
            pieces[2 * at + 1 :: step] = columns[column]
        return b"".join(pieces)


def stored_prompt_body(args: argparse.Namespace, table: Table, slot: Slot) -> dict[str, Any]:
    prompt: dict[str, Any] = {"id": args.prompt_id}
    if args.prompt_version:
        prompt["version"] = args.prompt_version
    facts = slot(table.roles["artist_data"]) if "artist_data" in table.roles else ""
    prompt["variables"] = {"artist_name": slot(table.roles["artist_name"]), "artist_data": facts}
    return {"model": args.model, "prompt": prompt} if args.model else {"prompt": prompt}


def fill_placeholders(template: str, path: str, table: Table, slot: Slot) -> str:
    """Replace the placeholders of a template by slots. {{artist_data}} is empty if the CSV has no such column.

    Raises CommandError if another one does not name exactly one column, or if the artist's name is not used.
    """

    def fill(match: re.Match[str]) -> str:
        key = column_key(match[1])
        if key in table.roles:
            return slot(table.roles[key])
        if key == "artist_data":
            return ""
        found = [at for at, name in enumerate(table.names) if key and column_key(name) == key]
        if len(found) == 1:
            return slot(found[0])
        line = template.count("\n", 0, match.start()) + 1
        problem = f"names {len(found)} columns; rename one of them in the CSV" if found else "names no column"
        names = listed_columns(dict.fromkeys([*COLUMNS, *table.names]))
        raise CommandError(f"{path} line {line}: the placeholder {match[0]} {problem}; the columns are {names}")

    filled = PLACEHOLDER.sub(fill, template)
    if slot(table.roles["artist_name"]) not in filled:
        raise CommandError(f"{path}: the template has no {{{{artist_name}}}}, so no prompt would name its artist")
    return filled


def template_body(args: argparse.Namespace, table: Table, slot: Slot) -> dict[str, Any]:
    text = fill_placeholders(read_text(args.prompt_file), shown(args.prompt_file), table, slot)
    instructions = read_text(args.instructions_file) if args.instructions_file else None
    body: dict[str, Any] = {"model": args.model}
    if args.endpoint == CHAT_COMPLETIONS:
        system = [] if instructions is None else [{"role": "system", "content": instructions}]
        return body | {"messages": [*system, {"role": "user", "content": text}]}
    if instructions is not None:
        body["instructions"] = instructions
    return body | {"input": text, "metadata": {"artist_name": slot(SHORT_NAME)}}


def read_body_fields(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Read --body-file. Raises CommandError if it has a field that this tool writes itself."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not allowed")

    text = read_text(path)
    try:
        fields = json.loads(text, parse_constant=refuse)
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()  # no lone surrogate, no number out of range
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{shown(path)}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CommandError(f'{shown(path)}: not a JSON object; write the fields as {{"max_output_tokens": 400, ...}}')
    if "model" in fields:
        raise CommandError(f'{shown(path)}: the field "model" does not belong here; name the model with --model')
    for name in fields:
        if name in body:
            raise CommandError(f'{shown(path)}: this tool writes the field "{name}" itself; remove it from the file')
    return fields


def build_request(args: argparse.Namespace, table: Table) -> tuple[RequestTemplate, list[int]]:
    """The template of the requests, and the positions of the columns that it uses.

    One request is written as JSON, with marks (slots) in place of a row's values, and then cut at these marks. They are
    random, so that no text contains one by accident.
    """
    nonce = os.urandom(16).hex()

    def slot(position: int) -> str:
        return f"<{nonce} {position}>"

    body = stored_prompt_body(args, table, slot) if args.prompt_id else template_body(args, table, slot)
    if args.body_file:
        body |= read_body_fields(args.body_file, body)
    id_column, name_column = table.roles["artist_id"], table.roles["artist_name"]
    request = {"custom_id": slot(id_column), "method": "POST", "url": args.endpoint, "body": body}
    pieces = re.split(f"<{nonce} (-?[0-9]+)>", json.dumps(request, ensure_ascii=False) + "\n")
    positions = [int(position) for position in pieces[1::2]]
    used = [id_column, name_column, *sorted({*positions} - {id_column, name_column, SHORT_NAME})]
    columns = [SHORT_NAME if position == SHORT_NAME else used.index(position) for position in positions]
    return RequestTemplate([escape_line_separators(piece.encode()) for piece in pieces[::2]], columns), used


# -- conversion --------------------------------------------------------------------------------------------------


class SkipReport:
    """Counts the skipped rows by reason, and lists the first ones, or all with --verbose.

    With --strict, an invalid row raises CommandError.
    """

    def __init__(self, console: Console, strict: bool, verbose: bool) -> None:
        self.reasons: Counter[str] = Counter()
        self.advice: dict[str, str] = {}  # the first for each reason
        self._console = console
        self._strict = strict
        self._max_listed = sys.maxsize if verbose else MAX_LISTED

    def add(self, line: int, problem: Problem) -> None:
        if self._strict and problem != REPEATED_HEADER:
            advice = problem.advice or "without --strict the row is skipped"
            raise CommandError(f"line {line}: {problem.detail}; {advice}")
        self.reasons[problem.reason] += 1
        self.advice.setdefault(problem.reason, problem.advice)
        skipped = self.reasons.total()
        if skipped <= self._max_listed:
            self._console.warn(f"line {line}: {problem.detail}; row skipped")
        elif skipped == self._max_listed + 1:
            self._console.warn("more rows were skipped; --verbose lists all of them")

    def row_summary(self, written: int) -> str:
        """Account for the rows: how many were read, and how many were skipped for which reason."""
        skipped = self.reasons.total()
        by_reason = ", ".join(f"{number} {reason}" for reason, number in self.reasons.most_common())
        return f"{plural(written + skipped, 'row')} read, {skipped} skipped{': ' if skipped else ''}{by_reason}"


class Progress:
    """Shows progress on a terminal, starting after one second."""

    def __init__(self, console: Console, source: BinaryIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._source = source
        self._clock = clock
        self._started = clock()
        self._next_report = self._started + 1
        status = os.fstat(source.fileno()) if console.is_terminal else None
        self._size = status.st_size if status and stat.S_ISREG(status.st_mode) else 0

    def report(self, rows: int) -> None:
        now = self._clock()
        if not self._console.is_terminal or now < self._next_report:
            return
        self._next_report = now + 0.2
        done = f"{self._source.tell() / 1e6:.1f} of {self._size / 1e6:.1f} MB, " if self._size else ""
        self._console.progress(f"{done}{rows} rows, {rows / (now - self._started):.0f} rows/s")


class BatchCounter:
    """Counts the batches that `batch_tool.py create` will split the requests into."""

    def __init__(self) -> None:
        self.count = 1
        self._requests_left = MAX_BATCH_REQUESTS
        self._bytes_left = MAX_BATCH_BYTES

    def add(self, lines: bytes, requests: int) -> None:
        if requests <= self._requests_left and len(lines) <= self._bytes_left:
            self._requests_left -= requests
            self._bytes_left -= len(lines)
        elif requests > 1:
            for line in lines.splitlines(keepends=True):
                self.add(line, 1)
        else:
            self.count += 1
            self._requests_left, self._bytes_left = MAX_BATCH_REQUESTS - 1, MAX_BATCH_BYTES - len(lines)


def restore_hidden(lines: bytes, delimiter: bytes) -> bytes:
    """Replace the stand-ins in lines of JSON by what they stand for."""
    for char in (delimiter, b"\n", b"\r", b'"'):
        lines = lines.replace(STAND_INS[char], JSON_ESCAPES.get(char, char))
    return lines


def escape_columns(columns: list[list[bytes]]) -> list[list[bytes]]:
    """Escape all values at once, which is faster than one by one."""
    values = escape(SEPARATOR.join(chain.from_iterable(columns))).split(SEPARATOR)
    height = len(columns[0])
    return [values[at : at + height] for at in range(0, len(values), height)]


def shorten_names(names: list[bytes]) -> list[bytes]:
    """Cut names to the length that the API accepts as metadata."""
    if max(map(len, names)) <= MAX_METADATA_CHARS:
        return names
    return [to_bytes(to_text(name)[:MAX_METADATA_CHARS]) for name in names]


class UsedIds:
    """The ids of the requests, and the line of each.

    A set is enough as long as no id is repeated, and takes 0.6 of the time of a dict. The dict is filled only when rows
    have to be looked at one by one.
    """

    def __init__(self) -> None:
        self._ids: set[bytes] = set()
        self._line_of: dict[bytes, int] = {}
        self._later_ids: list[bytes] = []  # not in `_line_of` yet
        self._later_lines: list[int] = []

    def add_all(self, ids: list[bytes], lines: Sequence[int]) -> bool:
        """Add new ids. Returns False if one of them is not new; then call `add` for each."""
        before = len(self._ids)
        self._ids.update(ids)
        if len(self._ids) < before + len(ids):
            return False
        self._later_ids += ids
        self._later_lines += lines
        return True

    def add(self, artist_id: bytes, line: int) -> int:
        """Add an id. Returns the line where it was used first, which is `line` if it is new."""
        self._line_of.update(zip(self._later_ids, self._later_lines, strict=True))
        self._later_ids, self._later_lines = [], []
        self._ids.add(artist_id)
        return self._line_of.setdefault(artist_id, line)


class RequestWriter:
    """Writes a request for every valid row, and reports the other rows as skipped."""

    def __init__(self, template: RequestTemplate, layout: Layout, out: BinaryIO, skipped: SkipReport) -> None:
        self.written = 0
        self._used_ids = UsedIds()
        self.null_names: Counter[bytes] = Counter()
        self.swallowed: dict[int, list[int]] = {}
        self.batches = BatchCounter()
        self._template = template
        self._layout = layout
        self._out = out
        self._skipped = skipped

    def write_block(self, rows: Rows) -> None:
        self.swallowed |= rows.swallowed
        self._write_rows(rows.lines, rows.columns, rows.needs_escapes)

    def write_record(self, record: Record) -> None:
        if record.problem:
            self._skipped.add(record.line, record.problem)
            return
        values = [trim_value(record.fields[column]) for column in self._layout.used]
        if held := lines_like_rows(self._layout.delimiter.join(record.fields), record.line, values[0], self._layout):
            self.swallowed[record.line] = held
        self._write_rows([record.line], [[value] for value in values], needs_escapes=True)

    def _write_rows(self, lines: Sequence[int], columns: list[list[bytes]], needs_escapes: bool) -> None:
        """Write the rows that have a name and an id of their own; report the others as skipped."""
        ids, names = columns[:2]
        if not all(ids) or not all(names) or not self._used_ids.add_all(ids, lines):
            kept = [at for at, row in enumerate(zip(lines, ids, names, strict=True)) if self._accept(*row)]
            columns = [[column[at] for at in kept] for column in columns]
        if columns[0]:
            self._write_requests(columns, needs_escapes)

    def _write_requests(self, columns: list[list[bytes]], needs_escapes: bool) -> None:
        names = columns[1]
        if SHORT_NAME in self._template.columns:
            columns = [*columns, shorten_names(names)]
        if needs_escapes:
            columns = escape_columns(columns)
        requests = restore_hidden(self._template.render(columns), self._layout.delimiter)
        self._out.write(requests)
        self.written += len(names)
        self.batches.add(requests, len(names))
        if not NULL_NAMES.isdisjoint(names):
            self.null_names.update(filter(NULL_NAMES.__contains__, names))

    def _accept(self, line: int, artist_id: bytes, name: bytes) -> bool:
        """Note the line of an id, or report why its row cannot be written."""
        if not artist_id or not name:
            empty = "artist_name" if artist_id else "artist_id"
            problem = Problem(f"empty {empty}", f"{empty} is empty")
        elif (first_line := self._used_ids.add(artist_id, line)) != line:
            detail = f"artist_id {quoted(artist_id.decode())} was already used on line {first_line}"
            problem = Problem("duplicate artist_id", detail)
        else:
            return True
        self._skipped.add(line, problem)
        return False


def convert_rows(
    reader: CsvReader, layout: Layout, writer: RequestWriter, limit: int, report: Callable[[], None]
) -> None:
    """Convert the rows in blocks. A block that cannot be handled as a whole is converted record by record."""
    left = limit
    while left and not reader.is_at_end():
        block = reader.peek_block()
        rows = rows_of_block(block, reader.line, layout, left) if block else None
        if rows:
            writer.write_block(rows)
            reader.skip(len(block), rows.next_line)  # if the limit is reached inside the block, nothing more is read
            left -= len(rows.lines)
        else:
            for record in reader.records(layout, CAREFUL_BYTES):
                writer.write_record(record)
                left -= record.problem != REPEATED_HEADER
                if not left:
                    break
        report()


def check_encoding(skipped: SkipReport, written: int, encoding: str, console: Console) -> None:
    """Raise CommandError if many rows are not valid in the file's encoding; warn if only a few are."""
    what = not_valid(encoding)
    invalid, rows = skipped.reasons[what], written + skipped.reasons.total()
    if invalid >= 2 and invalid > MAX_INVALID_SHARE * rows:
        share = f"{invalid} of {rows} rows are {what}"
        raise CommandError(f"{share}, so the CSV has another encoding; {skipped.advice[what]}")
    if invalid:
        console.warn(f"{plural(invalid, 'row is', 'rows are')} {what}; {skipped.advice[what]}")


def warn_of_swallowed_rows(swallowed: dict[int, list[int]], console: Console) -> None:
    for began, lines in islice(swallowed.items(), MAX_LISTED):
        listed = ", ".join(map(str, lines[:MAX_LISTED])) + (", …" if len(lines) > MAX_LISTED else "")
        held = f"lines {listed}, which look like rows" if len(lines) > 1 else f"line {listed}, which looks like a row"
        console.warn(f"line {began}: a quoted field holds {held}; check the quotes on line {began}")
    if len(swallowed) > MAX_LISTED:
        fields = plural(len(swallowed) - MAX_LISTED, "more quoted field holds", "more quoted fields hold")
        console.warn(f"{fields} lines that look like rows")


def warn_of_null_names(null_names: Counter[bytes], console: Console) -> None:
    if null_names:
        listed = ", ".join(f"{name.decode()} ({number})" for name, number in null_names.most_common())
        names = plural(null_names.total(), "name looks like an empty cell", "names look like empty cells")
        console.warn(f"{names}: {listed}; the requests were written anyway")


def column_positions(table: Table) -> str:
    roles = ", ".join(f"{role} is column {at + 1}" for role, at in table.roles.items())
    return f"{roles} of {len(table.names)}, separated by {DELIMITER_NAMES[table.delimiter]}"


def convert(args: argparse.Namespace, console: Console) -> None:
    if not args.model:
        console.warn("no --model (or MODEL): the Batch API refuses requests without body.model")
    skipped = SkipReport(console, args.strict, args.verbose)
    with open_input(args.input) as source:
        reader = CsvReader(source, args.input, args.encoding)
        table = read_table(reader, args, console)
        template, used = build_request(args, table)
        layout = table.layout(used)
        warn_of_missing_data(table, bool(args.prompt_id), console)
        if args.verbose:
            console.message(f"{column_positions(table)}, read as {reader.encoding}")
        progress = Progress(console, source)
        with open_output(args.output) as out:
            writer = RequestWriter(template, layout, out, skipped)
            convert_rows(
                reader, layout, writer, args.limit or sys.maxsize,
                lambda: progress.report(writer.written + skipped.reasons.total()),
            )
            written = writer.written
            summary = skipped.row_summary(written)
            check_encoding(skipped, written, reader.encoding, console)
            if not written:
                raise CommandError(f"no valid row in {shown(args.input)} ({summary}); nothing was written")
    warn_of_swallowed_rows(writer.swallowed, console)
    warn_of_null_names(writer.null_names, console)
    number = writer.batches.count
    batches = f"; batch_tool.py create will split them into {number} batches" if number > 1 else ""
    console.message(f"Wrote {plural(written, 'request')} to {shown(args.output)} ({summary}){batches}")


# -- command line ------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("--in", dest="input", required=True, type=input_path, metavar="CSV", help="CSV to read, - for stdin")
    add("--out", dest="output", required=True, type=output_path, metavar="JSONL", help="JSONL to write, - for stdout")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt-id", type=text_argument, metavar="ID", help="id of a stored prompt [PROMPT_ID]")
    text = "prompt template, instead of --prompt-id [PROMPT_FILE]"
    prompt.add_argument("--prompt-file", type=input_path, metavar="FILE", help=text)
    add("--prompt-version", type=text_argument, metavar="V", help="version of the stored prompt [PROMPT_VERSION]")
    add("--instructions-file", type=input_path, metavar="FILE", help="file with the instructions for every request")
    text = "API endpoint of the requests; /v1/chat/completions only with --prompt-file (default: %(default)s)"
    add("--endpoint", choices=(RESPONSES, CHAT_COMPLETIONS), default=RESPONSES, help=text)
    add("--model", type=text_argument, metavar="MODEL", help="sent as body.model; required with --prompt-file [MODEL]")
    add("--body-file", type=input_path, metavar="JSON", help="JSON object of further body fields for every request")
    text = "encoding of the CSV, unless it has a byte-order mark (default: %(default)s)"
    add("--encoding", type=encoding_name, default="utf-8", metavar="NAME", help=text)
    for role in COLUMNS:
        text = f"column of the CSV that holds the {role} (default: {role})"
        add(f"--{role.removeprefix('artist_')}-column", type=text_argument, metavar="NAME", help=text)
    add("--limit", type=positive_int, metavar="N", help="read only the first N data rows")
    add("--skip-header", action="store_true", help=f"the CSV has no header; its columns are {','.join(COLUMNS)}")
    add("--strict", action="store_true", help="stop at the first invalid row and write nothing")
    add("--verbose", action="store_true", help="list every skipped row, and the columns, on stderr")
    return parser


def complete_from_environment(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in missing options from the environment. A flag for the prompt beats both PROMPT_ID and PROMPT_FILE."""

    def environment(name: str, check: Callable[[str], str]) -> str | None:
        try:
            return check(os.environ[name]) if os.environ.get(name) else None
        except argparse.ArgumentTypeError as error:
            parser.error(f"environment variable {name}: {error}")

    if not args.prompt_id and not args.prompt_file:
        args.prompt_id = environment("PROMPT_ID", text_argument)
        args.prompt_file = environment("PROMPT_FILE", input_path)
    if args.prompt_id and args.prompt_file:
        parser.error("PROMPT_ID and PROMPT_FILE are both set; unset one, or choose with --prompt-id or --prompt-file")
    if not args.prompt_id and not args.prompt_file:
        parser.error("a prompt is required: --prompt-file or --prompt-id (or PROMPT_FILE or PROMPT_ID)")
    if args.prompt_id and not args.prompt_version:
        args.prompt_version = environment("PROMPT_VERSION", text_argument)
    args.model = args.model or environment("MODEL", text_argument)


def check_combinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.prompt_file and args.prompt_version:
        parser.error("--prompt-version goes with --prompt-id, not with a prompt file")
    if args.prompt_file and not args.model:
        parser.error("--model is required with a prompt file (or MODEL)")
    if args.prompt_id and (args.instructions_file or args.endpoint != RESPONSES):
        parser.error("--instructions-file and --endpoint go with --prompt-file, not with a stored prompt")
    if args.skip_header and (args.id_column or args.name_column or args.data_column):
        parser.error("--id-column, --name-column and --data-column need a header; they do not go with --skip-header")
    inputs = [path for path in (args.input, args.prompt_file, args.instructions_file, args.body_file) if path]
    if inputs.count(STDIN) > 1:
        parser.error("only one input can be stdin (-)")
    for path in inputs:
        if same_regular_file(path, args.output):
            parser.error(f"{shown(path)} is both an input and the output; choose another --out")


# -- main --------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    gc.disable()  # there are no reference cycles here; looking for them takes a fifth of the time
    console = Console(sys.stderr)
    try:
        with stopping_on_signals():
            parser = build_parser()
            args = parser.parse_args(argv)
            complete_from_environment(parser, args)
            check_combinations(parser, args)
            convert(args, console)
        return 0
    except UsageError as error:
        for line in str(error).splitlines():
            console.message(line)
        raise SystemExit(2) from None
    except CommandError as error:
        console.error(str(error))
        return 1
    except Exit as ending:
        if ending.exit_code > 128:
            console.message(f"{PROG}: stopped")
        return ending.exit_code
    finally:
        console.close()


if __name__ == "__main__":
    raise SystemExit(main())
