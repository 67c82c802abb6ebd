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

Invalid rows are skipped. stderr lists the first 20 of them (all with --verbose),
and its last line accounts for every row. An --out file is written whole or not
at all. The name in brackets behind the text of an option is the environment
variable that stands in for it.

exit codes: 0 success, 1 fatal error, 2 invalid arguments, 130 interrupted,
143 terminated, 129 hung up
"""
from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes over: no traceback for Ctrl-C during the imports

import argparse
import codecs
import contextlib
import functools
import gc
import io
import itertools
import json
import os
import re
import stat
import sys
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO, cast

PROG = "gen_batch_jsonl.py"
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

# UTF-8 that was read as Windows-1252: a character that was the first byte of a letter, then the start of one that was a
# later byte. Left out: first bytes of phonetic signs (É, as `CAFÉ»` is a word in quotes) and of rare scripts
GARBLED_BYTES = re.compile(rb"\xc3[\x82-\x85\x8e-\x91\x97-\x9b\xa0-\xb4][\xc2\xc5\xc6\xcb\xe2]")
AS_BYTES = {at: 0xDC00 + at for at in (0x81, 0x8D, 0x8F, 0x90, 0x9D)}  # Windows-1252 has no characters for these
RESPONSES, CHAT_COMPLETIONS = "/responses", "/chat/completions"  # how endpoints end
OUR_COLUMNS = ("artist_id", "artist_name", "error", "input_tokens", "output_tokens")  # of exported bios
PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")
MAX_METADATA = 512  # characters of one metadata value; Batch API reference
MAX_INVALID_SHARE = 0.05  # of rows that cannot be decoded; beyond it, the file is in another encoding
BLOCK_BYTES = 1 << 17  # of the CSV, read at a time
CAREFUL_ROWS = 100  # how many rows to read one by one before trying a block again
LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n|\Z)")
NULL_NAMES = frozenset(
    b"NaN nan NAN NULL null Null N/A n/a NA None none NONE undefined Undefined UNDEFINED (null) (NULL) (Null) #N/A "
    b"#n/a #REF! #NAME? #VALUE! #DIV/0! <NA> \\N".split()
)

FOREIGN_FILES = {  # by how they begin
    rb"PK\x03\x04|\xd0\xcf\x11\xe0": "an Excel workbook or another zip file; open it and save it as CSV UTF-8",
    rb"\x1f\x8b|BZh91AY&SY|\xfd7zXZ\x00|\x28\xb5\x2f\xfd": "a gzip file or another archive; unpack it first",
    rb"%PDF-|\{\\rtf": "a PDF or RTF document; save the table as CSV",
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch that with: git lfs pull",
    rb"\s*[\[{]\s*([\[{\"]|$)": "JSON, not CSV; convert it to a CSV with a header",
    rb"\s*<[!?a-z]": "HTML or XML, not CSV; open it in a spreadsheet and save it as CSV UTF-8",
}

# hiding: inside the quotes of a block, bytes that UTF-8 never contains stand in for special characters
STAND_INS = {b",": b"\xf5", b";": b"\xf6", b"\t": b"\xf7", b"|": b"\xf8", b"\n": b"\xf9", b"\r": b"\xfa", b'"': b"\xfb"}
REVEAL = bytes.maketrans(b"".join(STAND_INS.values()), b"".join(STAND_INS))
SEPARATOR = b"\xff"  # another such byte, between joined values

# escaping
LINE_SEPARATORS = "\u2028\u2029\x85"  # some readers would cut a line of JSON there
JSON_ESCAPES = {  # the backslash first, because the other escapes bring backslashes
    char.encode(): json.dumps(char)[1:-1].encode() for char in ["\\", '"', *map(chr, range(32)), *LINE_SEPARATORS]
}
UNESCAPED_BYTES = bytes({*range(256)} - {*b"".join(JSON_ESCAPES)})

# blanks
ALL_BLANKS = BLANKS + "".join(STAND_INS[char].decode("utf-8", "surrogateescape") for char in (b"\t", b"\n", b"\r"))
BLANK_BYTES = ALL_BLANKS.encode("utf-8", "surrogateescape")
SQUEEZED = dict.fromkeys(map(ord, BLANKS + "-_"))  # for str.translate: leaves these out


class RowProblem(NamedTuple):
    """Why a row is not used: the reason it is counted under, the details, what to do, and what such rows share."""

    reason: str
    detail: str
    advice: str = ""
    shared: str = ""


class Rows(NamedTuple):
    """Rows of a block: the line where each begins, and for each used column the trimmed values."""

    lines: Sequence[int]  # and the one behind the last row
    columns: list[list[bytes]]
    swallowed: dict[int, list[int]]  # by the line of a row: lines in it that look like rows


# ---- text


def to_text(value: bytes) -> str:
    """The value for a message or a comparison; bytes that are not UTF-8 become lone surrogates."""
    return value.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def in_quotes(text: str) -> str:
    """The text in quotes for a message, cut to a readable length."""
    return f'"{text[:80]}{"…" if len(text) > 80 else ""}"'


def trim(values: list[bytes]) -> list[bytes]:
    """Remove the blanks around values, also those that a block hides."""
    if [*map(bytes.strip, values, itertools.repeat(BLANK_BYTES))] == values:
        return values
    return [
        value if value.strip(BLANK_BYTES) == value else to_bytes(to_text(value).strip(ALL_BLANKS))
        for value in values
    ]


def escape(text: bytes) -> bytes:
    """Escape the text for the inside of a JSON string."""
    if special := text.translate(None, UNESCAPED_BYTES):
        for char, escaped in JSON_ESCAPES.items():
            if char in special:
                text = text.replace(char, escaped)
    return text


def shape_of(artist_id: str) -> str:
    """An id with its runs of digits and of letters collapsed: `a12-b` and `x7-abc` are both `a0-a`."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", artist_id.strip(BLANKS)))


def lines_like_rows(text: bytes, line: int, artist_id: bytes, table: Table) -> list[int]:
    """The lines of a record, after its first, that look like rows: as many fields, and an id of the same shape.

    Prose can match a shape of only letters or only digits by accident; with such a shape, a line that has a blank after
    a delimiter is taken for prose. `text` is the record without quotes, `line` is its first line.
    """
    found = []
    for number, each in enumerate(text.splitlines()[1:], line + 1):
        if each.count(table.delimiter.encode()) == len(table.names) - 1:
            fields = to_text(each).split(table.delimiter)
            shape = shape_of(to_text(artist_id))
            may_be_prose = not {"a", "0"} <= {*shape} and any(field[:1].isspace() for field in fields[1:])
            if shape_of(fields[table.roles["artist_id"]]) == shape and not may_be_prose:
                found.append(number)
    return found


# ---- a block as a whole


def block_end(data: bytes, start: int, end: int, is_last: bool) -> int:
    """Behind the last LF before `end` with an even number of quotes before it; `start` if there is none.

    At the end of the file (`is_last`), the end of the data counts as a line end.
    """
    if not is_last:
        end = max(start, data.rfind(b"\n", start, end) + 1)
    quotes = data.count(b'"', start, end)
    while quotes % 2:
        previous, end = end, max(start, data.rfind(b"\n", start, data.rfind(b'"', start, end)) + 1)
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


def lines_of_rows(plain: bytes, ids: list[bytes], line: int, table: Table) -> tuple[list[int], dict[int, list[int]]]:
    """The line where each row of a plain block begins, and the next one; by row, the lines in it that look like rows.

    `ids` are those of the rows that are wanted, `line` is the first one.
    """
    line_end = STAND_INS[b"\n"]
    if STAND_INS[b"\r"] in plain:
        plain = plain.replace(STAND_INS[b"\r"] + line_end, line_end).replace(STAND_INS[b"\r"], line_end)
    records = plain.split(b"\n")[: len(ids)]
    lines = [*itertools.accumulate((1 + record.count(line_end) for record in records), initial=line)]
    swallowed = {}
    for number, artist_id, record in zip(lines, ids, records, strict=False):
        if line_end in record and (held := lines_like_rows(record.translate(REVEAL), number, artist_id, table)):
            swallowed[number] = held
    return lines, swallowed


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


def has_special_ids(artist_ids: list[bytes], table: Table) -> bool:
    """Whether rows have to be read by themselves because of an id.

    An empty id may be that of a blank row, and a column name that of a repeated header. An id with hidden characters
    would not equal the same id in a row that was read by itself.
    """
    if not all(artist_ids):
        return True
    ids = b",".join([b"", *artist_ids, b""])
    squeezed = unicodedata.normalize("NFC", to_text(ids)).casefold().translate(SQUEEZED)
    keys = [key.translate(SQUEEZED) for key in table.keys if key]
    return ids.translate(REVEAL) != ids or any(f",{key}," in squeezed for key in keys)


def rows_of_block(block: bytes, first_line: int, table: Table, used: list[int], limit: int) -> Rows | None:
    """The first `limit` rows of a block. None if the block has to be read record by record.

    Each step handles the whole block at once, which is ten times as fast as handling its records one by one.
    """
    delimiter = table.delimiter.encode()
    try:
        block.decode()
    except UnicodeDecodeError:
        return None
    plain = plain_block(block, delimiter)
    if not plain or not (split := split_rows(plain, delimiter)):
        return None
    fields, width = split
    step = width + 1
    if width < len(table.names) or any(any(trim(fields[column:-1:step])) for column in range(len(table.names), width)):
        return None
    number = min(len(fields) // step, limit)
    columns = [trim(fields[column : number * step : step]) for column in used]
    if has_special_ids(columns[0], table):
        return None
    lines: Sequence[int] = range(first_line, first_line + number + 1)
    swallowed: dict[int, list[int]] = {}
    if STAND_INS[b"\n"] in plain or STAND_INS[b"\r"] in plain:
        lines, swallowed = lines_of_rows(plain, columns[0], first_line, table)
    return Rows(lines, columns, swallowed)


# ---- a row by itself


def problem_of(record: Record, table: Table) -> RowProblem:
    """What is odd about a row, apart from its values."""
    if record.oddity not in (WRONG_WIDTH, ENDS_EARLY):
        return RowProblem(record.oddity, record.detail or "repeats the header")
    width, ours = len(table.names), DELIMITERS[table.delimiter]
    row = record.text.rstrip("\r\n")
    others = [other for other in DELIMITERS if other != table.delimiter and row.count(other) == width - 1]
    if record.width == 1 and others:
        cause = f"{DELIMITERS[others[0]]} separates its fields, and {ours} those of the header"
    elif not table.has_header:
        cause = f"--skip-header takes {width}: add a header line"
    elif record.width > width:
        cause = f"a value with {ours} in it needs quotes around it"
    else:
        cause = "a value is missing, or has a line break but no quotes around it"
    fields = ("at least " if record.width > width + MAX_EXTRA_FIELDS else "") + plural(record.width, "field")
    detail = f"{fields} instead of {width} in {in_quotes(row)}; {cause}"
    return RowProblem(WRONG_WIDTH, detail, shared=f"these rows have {fields}; {cause}")


def not_valid(encoding: str) -> str:
    return f"not valid {encoding.upper() if encoding.lower().startswith('utf') else encoding}"


def undecodable(record: Record, table: Table, used: list[int], encoding: str) -> RowProblem | None:
    """The problem of the first used value that is not valid in the file's encoding."""
    for column in used:
        value = to_bytes(record.fields[column])
        try:
            value.decode()
        except UnicodeDecodeError as error:
            around = value[max(0, error.start - 30) : error.start + 30]
            reading = around.decode("windows-1252", "replace").strip(BLANKS)
            advice = "name the encoding of the CSV with --encoding"
            if encoding == "utf-8" and reading and "\ufffd" not in reading:
                advice = f'if "{reading}" on line {record.line} looks right, add --encoding windows-1252'
            return RowProblem(not_valid(encoding), f"{table.names[column]} is {not_valid(encoding)}", advice)
    return None


# ---- reading


def open_input(path: str) -> contextlib.AbstractContextManager[io.BufferedReader]:
    if path == STDIN:
        return contextlib.nullcontext(cast(io.BufferedReader, stdin_bytes()))
    with os_errors_as(f"read {path}"):
        return open(path, "rb")


def read_text(path: str) -> str:
    """The whole of a small UTF-8 file, its line ends as they are."""
    with open_input(path) as file, os_errors_as(f"read {shown(path)}"):
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CommandError(f"{shown(path)}: not valid UTF-8 (byte {error.start + 1}); save it as UTF-8") from None


class BlockReader(LineReader):
    """Reads a CSV in any encoding as UTF-8, in lines or in blocks of several rows.

    It never waits for more than the caller needs, so that a run with --limit ends while its pipe is still open.
    """

    def __init__(self, source: io.BufferedReader, name: str, encoding: str, block_bytes: int = BLOCK_BYTES) -> None:
        super().__init__(iter(()))
        self._source = source
        self._name = name
        self._block_bytes = block_bytes
        self._data = b""  # what has been read; the part before `_at` is used up
        self._at = 0
        self._is_ended = False
        self._decoder: codecs.IncrementalDecoder | None = None
        while len(self._data) < 32 and b"\n" not in self._data and self._fill():
            pass
        start = self._data
        self.encoding = encoding_of(start, encoding)
        if codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig"):
            self._data = start.removeprefix(codecs.BOM_UTF8)
            self.encoding = "utf-8"
        elif start:
            self._decoder = codecs.getincrementaldecoder(self.encoding)(UNDECODABLE)
            self._data = self._to_utf_8(start)
        for beginning, kind in FOREIGN_FILES.items():
            if re.match(beginning, start) or re.match(beginning, self._data, re.IGNORECASE):
                raise CommandError(f"{name} is {kind}")

    def _to_utf_8(self, chunk: bytes) -> bytes:
        """Convert a chunk. What is not valid in its encoding becomes bytes that are not valid in UTF-8."""
        if self._decoder is None:
            return chunk
        return self._decoder.decode(chunk, final=self._is_ended).encode("utf-8", "surrogatepass")

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

    def peek_lines(self) -> Iterator[str]:
        offset = 0
        while True:
            line = cast(re.Match[bytes], LINE.match(self._data, self._at + offset))[0]
            is_last = self._at + offset + len(line) == len(self._data)
            if is_last and not line.endswith(b"\n") and self._fill():
                continue
            if not line:
                return
            yield to_text(line)
            offset += len(line)

    def skip_lines(self, number: int) -> None:
        self.skip(sum(len(to_bytes(line)) for line in itertools.islice(self.peek_lines(), number)), self.line + number)

    def skip(self, size: int, next_line: int) -> None:
        self._at += size
        self.line = next_line

    def peek_block(self) -> bytes:
        """The data from here to the last line end outside of quotes. Empty if there is none nearby."""
        while True:
            window = self._at + 2 * self._block_bytes
            is_last = self._is_ended and window >= len(self._data)
            end = block_end(self._data, self._at, min(window, len(self._data)), is_last)
            if end > self._at or len(self._data) >= self._at + self._block_bytes or not self._fill():
                return self._data[self._at : end]


def refuse_odd_start(reader: LineReader, wanted: set[str]) -> None:
    """Raise CommandError if the header stands further down, or if whole lines stand in quotes."""
    for number, line in enumerate(itertools.islice(reader.peek_lines(), 1, MAX_HEADER_LINE), reader.line + 1):
        if wanted <= {column_key(name.strip(BLANKS + '"')) for name in re.split("[,;\t|]", line)}:
            raise CommandError(f"line {number} is the header; delete the lines above it")
    header, record = read_header(reader, wanted)
    is_quoted = len(header.names) == 1 and record.text.lstrip(BLANKS).startswith('"')
    if is_quoted and re.search("[,;\t|]", header.names[0]):
        raise CommandError(f"line {reader.line}: the whole line stands in quotes, so it is a single field; "
                           "remove the quotes around every line, or export the table again")


def read_columns(reader: LineReader, args: argparse.Namespace, console: Console) -> Table:
    """Read the header, or with --skip-header take the columns in their order."""
    chosen = {role: getattr(args, role) for role in COLUMNS}
    wanted = {column_key(chosen[role] or role) for role in COLUMNS[:2]}
    try:
        table = read_table(reader, chosen, COLUMNS[:2], args.skip_header)
    except CommandError:
        refuse_odd_start(reader, wanted)
        raise
    if args.skip_header and table.has_header:
        console.warn(f"line {reader.line - 1}: names the columns, so it is the header despite --skip-header")
    if not table.has_header and read_record(reader.peek_lines(), reader.line, table).oddity:
        refuse_odd_start(reader, wanted)
    return table


# ---- requests

Slot = Callable[[int], str]  # makes the mark for the value of a column, by its position


class RequestTemplate(NamedTuple):
    """A request as JSON: constant pieces, and for each gap between two of them the column whose value goes there."""

    constants: list[bytes]
    columns: list[int]  # indexes into `used`; one more is the name, shortened for the metadata
    used: list[int]  # the positions of the columns that the requests need: id, name, then others

    def render(self, columns: list[list[bytes]]) -> bytes:
        """The rows as requests, one per line. `columns` are escaped."""
        height, step = len(columns[0]), 2 * len(self.columns) + 1
        pieces = [b""] * (height * step)
        for at, constant in enumerate(self.constants):
            pieces[2 * at :: step] = [constant] * height
        for at, column in enumerate(self.columns):
            pieces[2 * at + 1 :: step] = columns[column]
        return b"".join(pieces)


def data_slot(table: Table, slot: Slot, console: Console) -> str:
    """The slot of artist_data; "" with a warning if the CSV has no such column."""
    if "artist_data" in table.roles:
        return slot(table.roles["artist_data"])
    console.warn("the CSV has no artist_data column, so artist_data is empty in every request; "
                 "if another column holds the data, name it with --data-column")
    return ""


def stored_prompt_body(args: argparse.Namespace, table: Table, slot: Slot, console: Console) -> dict[str, Any]:
    prompt = {"id": args.prompt_id} | ({"version": args.prompt_version} if args.prompt_version else {})
    name, data = slot(table.roles["artist_name"]), data_slot(table, slot, console)
    body = {"prompt": prompt | {"variables": {"artist_name": name, "artist_data": data}}}
    return {"model": args.model} | body if args.model else body


def fill_placeholders(template: str, path: str, table: Table, slot: Slot, console: Console) -> str:
    """Replace the placeholders of a template by slots. {{artist_data}} is empty if the CSV has no such column.

    Raises CommandError if another one does not name exactly one column, or if the artist's name is not used.
    """

    def fill(match: re.Match[str]) -> str:
        key = column_key(match[1])
        if key in table.roles:
            return slot(table.roles[key])
        if key == "artist_data":
            return data_slot(table, slot, console)
        found = [at for at, each in enumerate(table.keys) if key and each == key]
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


def read_json(path: str) -> Any:
    """The content of a small JSON file."""
    text = read_text(path)
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()  # no NaN, no lone surrogate
    except (ValueError, RecursionError) as error:
        quotes = re.search("[“”„‟«»]", text)
        advice = f"; it has typographic quotes ({quotes[0]}), where JSON needs plain ones" if quotes else ""
        raise CommandError(f"{shown(path)}: not valid JSON: {error}{advice}") from None
    return content


def made_strict(schema: Any) -> Any:
    """A JSON Schema with what strict mode wants at every level: all properties required, and no others allowed."""
    if isinstance(schema, list):
        return [made_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    filled = {key: made_strict(value) if key in ("items", "anyOf") else value for key, value in schema.items()}
    for key in ("properties", "$defs", "definitions"):
        if isinstance(filled.get(key), dict):
            filled[key] = {name: made_strict(each) for name, each in filled[key].items()}
    if "properties" in filled:
        filled |= {"required": [*filled["properties"]], "additionalProperties": False}
    return filled


def answer_format(path: str) -> dict[str, Any]:
    """The name and the strict schema of the answers, from --schema. Raises CommandError if it is none of an object."""
    schema = read_json(path)
    properties = schema.get("properties") if isinstance(schema, dict) and schema.get("type") == "object" else None
    if not isinstance(properties, dict) or not properties:
        example = '{"type": "object", "properties": {"bio": {"type": "string"}}}'
        raise CommandError(f"{shown(path)}: not a JSON Schema of an object with properties, such as {example}")
    for name, each in properties.items():
        if column_key(name) in OUR_COLUMNS or not isinstance(each, dict):
            problem = "is no schema" if not isinstance(each, dict) else "has the name of a column of bios; rename it"
            raise CommandError(f'{shown(path)}: the property "{name}" {problem}')
    stem = os.path.splitext(os.path.basename(path))[0]
    return {"name": re.sub("[^A-Za-z0-9_-]", "_", stem)[:64], "strict": True, "schema": made_strict(schema)}


def template_body(args: argparse.Namespace, table: Table, slot: Slot, console: Console) -> dict[str, Any]:
    text = fill_placeholders(read_text(args.prompt_file), shown(args.prompt_file), table, slot, console)
    instructions = read_text(args.instructions_file) if args.instructions_file else None
    schema = answer_format(args.schema) if args.schema else None
    body: dict[str, Any] = {"model": args.model}
    if args.endpoint.endswith(CHAT_COMPLETIONS):
        system = [] if instructions is None else [{"role": "system", "content": instructions}]
        body["messages"] = [*system, {"role": "user", "content": text}]
        return body | ({"response_format": {"type": "json_schema", "json_schema": schema}} if schema else {})
    if instructions is not None:
        body["instructions"] = instructions
    body |= {"input": text, "metadata": {"artist_name": slot(len(table.names))}}
    return body | ({"text": {"format": {"type": "json_schema", **schema}}} if schema else {})


def read_body_fields(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Read --body-file. Raises CommandError if it has a field that this tool writes itself."""
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise CommandError(f'{shown(path)}: not a JSON object; write the fields as {{"max_output_tokens": 400, ...}}')
    for name in fields:
        if name in {*body, "model"}:
            advice = "name the model with --model" if name == "model" else "remove it from the file"
            raise CommandError(f'{shown(path)}: this tool writes the field "{name}" itself; {advice}')
    return fields


def build_request(args: argparse.Namespace, table: Table, console: Console) -> RequestTemplate:
    """The template of the requests.

    One request is written as JSON, with marks (slots) in place of a row's values, and then cut at these marks. They are
    random, so that no text contains one by accident.
    """
    nonce = os.urandom(16).hex()

    def slot(position: int) -> str:
        return f"<{nonce} {position}>"

    make_body = stored_prompt_body if args.prompt_id else template_body
    body = make_body(args, table, slot, console)
    if args.body_file:
        body |= read_body_fields(args.body_file, body)
    id_column, name_column, short_name = table.roles["artist_id"], table.roles["artist_name"], len(table.names)
    request = {"custom_id": slot(id_column), "method": "POST", "url": args.endpoint, "body": body}
    text = json.dumps(request, ensure_ascii=False) + "\n"
    text = re.sub(f"[{LINE_SEPARATORS}]", lambda match: json.dumps(match[0])[1:-1], text)
    pieces = re.split(f"<{nonce} ([0-9]+)>", text)
    positions = [int(position) for position in pieces[1::2]]
    used = [id_column, name_column, *sorted({*positions} - {id_column, name_column, short_name})]
    columns = [[*used, short_name].index(position) for position in positions]
    return RequestTemplate([piece.encode() for piece in pieces[::2]], columns, used)


# ---- conversion


class RowReport:
    """Counts the rows with something odd about them. Lists the first ones of a kind at once, or all with --verbose.

    With --strict, a row that is skipped, filled or taken as it stands raises CommandError.
    """

    def __init__(self, console: Console, strict: bool, verbose: bool) -> None:
        self.reasons: Counter[str] = Counter()  # of the skipped rows
        self.advice: dict[str, str] = {}  # the first for each reason
        self.null_names: Counter[bytes] = Counter()
        self.swallowed: dict[int, list[int]] = {}  # by the line of a row: lines in it that look like rows
        self.shared: Counter[str] = Counter()  # what skipped rows have in common
        self.used: dict[str, list[int]] = {ENDS_EARLY: [], TAKEN: []}  # the lines of odd rows that are used
        self.garbled = self.undecoded = 0  # values whose text was spoilt before it came here, with a sign of it
        self.first_garbled = ""  # for the message
        self._console = console
        self._strict = strict
        self._max_listed = sys.maxsize if verbose else MAX_LISTED

    def skip(self, line: int, problem: RowProblem) -> None:
        if self._strict and problem.reason != REPEATED_HEADER:
            advice = problem.advice or "without --strict the row is skipped"
            raise CommandError(f"line {line}: {problem.detail}; {advice}")
        self.reasons[problem.reason] += 1
        self.advice.setdefault(problem.reason, problem.advice)
        self.shared.update(filter(None, [problem.shared]))
        self._list(self.reasons.total(), f"line {line}: {problem.detail}; row skipped", "rows were skipped")

    def note(self, line: int, oddity: str, remark: RowProblem) -> None:
        """Report a row that is used although it ends early, or has stray quotes."""
        if self._strict:
            raise CommandError(f"line {line}: {remark.detail}; without --strict the row is used")
        self.used[oddity].append(line)
        if oddity == TAKEN:
            taken = f"line {line}: {remark.detail}; taken as it stands, with its quotes"
            self._list(len(self.used[TAKEN]), taken, "lines are taken as they stand")

    def _list(self, number: int, warning: str, others: str) -> None:
        """Warn of the first rows of a kind one by one, and once of the others."""
        if number <= self._max_listed:
            self._console.warn(warning)
        elif number == self._max_listed + 1:
            self._console.warn(f"more {others}; --verbose lists all of them")

    def look_for_garbled(self, line: int, values: Iterable[bytes]) -> None:
        """Count the values whose text was decoded wrongly before it came here."""
        for value in (to_text(value.translate(REVEAL)) for value in values):
            meant = ""  # the value as it was before its UTF-8 was read as Windows-1252
            if GARBLED_BYTES.search(to_bytes(value)):
                with contextlib.suppress(ValueError):
                    meant = value.translate(AS_BYTES).encode("windows-1252", "surrogateescape").decode()
            self.garbled += meant != ""
            self.undecoded += "\ufffd" in value
            if not self.first_garbled and (meant or "\ufffd" in value):
                would_read = f", which would read {in_quotes(meant)}" if meant else ""
                self.first_garbled = f"first on line {line}: {in_quotes(value)}{would_read}"

    def row_summary(self, written: int) -> str:
        """Account for the rows: how many were read, and how many were skipped for which reason."""
        skipped = self.reasons.total()
        by_reason = ", ".join(f"{number} {reason}" for reason, number in self.reasons.most_common())
        return f"{plural(written + skipped, 'row')} read, {skipped} skipped{': ' if skipped else ''}{by_reason}"


class Progress:
    """Shows progress on a terminal, starting after one second."""

    def __init__(self, console: Console, source: BinaryIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._source, self._clock = console, source, clock
        self._started = clock()
        self._next_report = self._started + 1
        self._size = os.fstat(source.fileno()).st_size if console.is_terminal else 0  # 0 for a pipe

    def report(self, rows: int) -> None:
        now = self._clock()
        if self._console.is_terminal and now >= self._next_report:
            self._next_report = now + 0.2
            done = f"{self._source.tell() / 1e6:.1f} of {self._size / 1e6:.1f} MB, " if self._size else ""
            self._console.progress(f"{done}{rows} rows, {rows / (now - self._started):.0f} rows/s")


def why_unused(first_line: int, artist_id: bytes) -> RowProblem:
    """The problem of a row without an id or a name, or with the id of an earlier row on `first_line`."""
    if first_line:
        detail = f"artist_id {in_quotes(artist_id.decode())} was already used on line {first_line}"
        return RowProblem("duplicate artist_id", detail)
    empty = "artist_name" if artist_id else "artist_id"
    return RowProblem(f"empty {empty}", f"{empty} is empty")


class RequestWriter:
    """Writes a request for every valid row, and reports the other rows as skipped."""

    def __init__(self, template: RequestTemplate, table: Table, out: BinaryIO, report: RowReport) -> None:
        self.template = template
        self.table = table
        self.report = report
        self.written = 0
        self._line_of: dict[bytes, int] = {}  # by the id of each request
        self._out = out

    def write_record(self, record: Record, encoding: str) -> None:
        problem = problem_of(record, self.table) if record.oddity else None
        if record.is_used and problem:
            self.report.note(record.line, record.oddity, problem)
            problem = None
        if problem := problem or undecodable(record, self.table, self.template.used, encoding):
            self.report.skip(record.line, problem)
            return
        values = [to_bytes(record.fields[column].strip(BLANKS)) for column in self.template.used]
        text = to_bytes(self.table.delimiter.join(record.fields))
        if held := lines_like_rows(text, record.line, values[0], self.table):
            self.report.swallowed[record.line] = held
        self.write_rows([record.line], [[value] for value in values])

    def write_rows(self, lines: Sequence[int], columns: list[list[bytes]]) -> None:
        """Write the rows that have a name and an id of their own; report the others as skipped."""
        ids, names = columns[:2]
        if len(columns) in self.template.columns:
            short = [name if len(name) <= MAX_METADATA else to_bytes(to_text(name)[:MAX_METADATA]) for name in names]
            columns = [*columns, short]
        line_of = self._line_of
        first_lines = [
            line_of.setdefault(artist_id, line) if artist_id and name else 0
            for line, artist_id, name in zip(lines, ids, names, strict=True)
        ]
        if first_lines != [*lines]:
            kept = [at for at, line in enumerate(lines) if first_lines[at] == line]
            for line, first_line, artist_id in zip(lines, first_lines, ids, strict=True):
                if first_line != line:
                    self.report.skip(line, why_unused(first_line, artist_id))
            lines, columns = [lines[at] for at in kept], [[column[at] for at in kept] for column in columns]
        if not lines:
            return
        text = SEPARATOR.join(itertools.chain.from_iterable(columns))  # all values at once is faster than one by one
        if b"\xef\xbf\xbd" in text or GARBLED_BYTES.search(text):
            for line, row in zip(lines, zip(*columns[: len(self.template.used)], strict=True), strict=True):
                self.report.look_for_garbled(line, row)
        if not NULL_NAMES.isdisjoint(columns[1]):
            self.report.null_names.update(filter(NULL_NAMES.__contains__, columns[1]))
        self.written += len(lines)
        values = escape(text).split(SEPARATOR)
        columns = [values[at : at + len(lines)] for at in range(0, len(values), len(lines))]
        requests = self.template.render(columns)
        for char in (self.table.delimiter.encode(), b"\n", b"\r", b'"'):
            requests = requests.replace(STAND_INS[char], JSON_ESCAPES.get(char, char))
        self._out.write(requests)


def convert_rows(reader: BlockReader, writer: RequestWriter, limit: int, progress: Callable[[], None]) -> None:
    """Convert the rows in blocks. A block that cannot be handled as a whole is converted record by record."""
    left = limit
    while left and not reader.is_at_end():
        block = reader.peek_block()
        rows = rows_of_block(block, reader.line, writer.table, writer.template.used, left) if block else None
        if rows:
            writer.report.swallowed |= rows.swallowed
            writer.write_rows(rows.lines[:-1], rows.columns)
            reader.skip(len(block), rows.lines[-1])  # if the limit is reached inside the block, nothing more is read
            left -= len(rows.lines) - 1
        else:
            for record in itertools.islice(reader.records(writer.table), CAREFUL_ROWS):
                writer.write_record(record, reader.encoding)
                left -= record.oddity != REPEATED_HEADER
                if not left:
                    break
        progress()


def check_encoding(report: RowReport, written: int, encoding: str, console: Console) -> None:
    """Raise CommandError if many rows are not valid in the file's encoding; warn if only a few are."""
    why = not_valid(encoding)
    invalid, rows = report.reasons[why], written + report.reasons.total()
    if invalid >= 2 and invalid > MAX_INVALID_SHARE * rows:
        raise CommandError(f"{invalid} of {rows} rows are {why}, so the CSV has another encoding; {report.advice[why]}")
    if invalid:
        console.warn(f"{plural(invalid, 'row is', 'rows are')} {why}; {report.advice[why]}")


def listed_lines(lines: Sequence[int]) -> str:
    """The first lines of some, for a message: `line 3` or `lines 3, 7, …`."""
    listed = ", ".join(map(str, lines[:MAX_LISTED])) + (", …" if len(lines) > MAX_LISTED else "")
    return f"lines {listed}" if len(lines) > 1 else f"line {listed}"


def warn_of_used_rows(report: RowReport, console: Console) -> None:
    """Warn of what was written although it looks odd."""
    if early := report.used[ENDS_EARLY]:
        filled = plural(len(early), "row ends early and was", "rows end early and were")
        console.warn(f"{filled} filled with empty values: {listed_lines(early)}")
    if report.undecoded or report.garbled > 1:
        spoilt = plural(report.undecoded + report.garbled, "value")
        console.warn(f"the text of {spoilt} was spoilt before it came here; {report.first_garbled}")
    for began, lines in itertools.islice(report.swallowed.items(), MAX_LISTED):
        look = "which look like rows" if len(lines) > 1 else "which looks like a row"
        held = f"{listed_lines(lines)}, {look}"
        console.warn(f"line {began}: a quoted field holds {held}; check the quotes on line {began}")
    if report.null_names:
        listed = ", ".join(f"{name.decode()} ({number})" for name, number in report.null_names.most_common())
        names = plural(report.null_names.total(), "name looks like an empty cell", "names look like empty cells")
        console.warn(f"{names}: {listed}; the requests were written anyway")


def convert(args: argparse.Namespace, console: Console) -> None:
    if not args.model:
        console.warn("no --model (or MODEL): the Batch API refuses requests without body.model")
    if args.prompt_id:
        console.warn("OpenAI shuts stored prompts down on 2026-11-30; put the prompt into a file and use --prompt-file")
    report = RowReport(console, args.strict, args.verbose)
    with open_input(args.input) as source:
        reader = BlockReader(source, shown(args.input), args.encoding)
        table = read_columns(reader, args, console)
        template = build_request(args, table, console)
        progress = Progress(console, source)
        refuse_to_replace(args.output, "requests")
        with open_output(args.output) as out:
            writer = RequestWriter(template, table, out, report)
            rows = args.limit or sys.maxsize
            convert_rows(reader, writer, rows, lambda: progress.report(writer.written + report.reasons.total()))
            summary = report.row_summary(writer.written)
            check_encoding(report, writer.written, reader.encoding, console)
            for shared, number in report.shared.items():
                if number >= 3:
                    console.warn(f"{number} rows were skipped; {shared}")
            if not writer.written:
                raise CommandError(f"no valid row in {shown(args.input)} ({summary}); nothing was written")
    warn_of_used_rows(report, console)
    console.message(f"Wrote {plural(writer.written, 'request')} to {shown(args.output)} ({summary})")


# ---- command line


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
    text = f"path of the API endpoint; ends in {CHAT_COMPLETIONS} only with --prompt-file (default: %(default)s)"
    add("--endpoint", type=text_argument, default=f"/v1{RESPONSES}", metavar="E", help=text)
    add("--model", type=text_argument, metavar="MODEL", help="sent as body.model; required with --prompt-file [MODEL]")
    add("--body-file", type=input_path, metavar="JSON", help="JSON object of further body fields for every request")
    add("--schema", type=input_path, metavar="JSON", help="JSON Schema of the answers, which become columns")
    add("--encoding", type=encoding_name, default="utf-8", metavar="NAME", help="encoding of the CSV (default: utf-8)")
    for role in COLUMNS:
        flag, text = f"--{role.removeprefix('artist_')}-column", f"column that holds the {role} (default: {role})"
        add(flag, dest=role, type=text_argument, metavar="NAME", help=text)
    add("--limit", type=positive_int, metavar="N", help="read only the first N data rows")
    add("--skip-header", action="store_true", help=f"the CSV has no header; its columns are {','.join(COLUMNS)}")
    add("--strict", action="store_true", help="stop at the first invalid row and write nothing")
    add("--verbose", action="store_true", help="list every skipped row on stderr")
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
    if bool(args.prompt_id) == bool(args.prompt_file):
        parser.error("one prompt is required: --prompt-file or --prompt-id (or else PROMPT_FILE or PROMPT_ID)")
    if args.prompt_id and not args.prompt_version:
        args.prompt_version = environment("PROMPT_VERSION", text_argument)
    args.model = args.model or environment("MODEL", text_argument)


def check_combinations(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not re.fullmatch(rf"(/[\w.~-]+)*({RESPONSES}|{CHAT_COMPLETIONS})", args.endpoint):
        parser.error(f"--endpoint: not a path that ends in {RESPONSES} or {CHAT_COMPLETIONS}: {args.endpoint!a}")
    if args.prompt_file and args.prompt_version:
        parser.error("--prompt-version goes with --prompt-id, not with a prompt file")
    if args.prompt_file and not args.model:
        parser.error("--model is required with a prompt file (or MODEL)")
    if args.prompt_id and (args.instructions_file or args.schema or args.endpoint.endswith(CHAT_COMPLETIONS)):
        parser.error("--instructions-file, --schema and --endpoint go with --prompt-file, not with a stored prompt")
    if args.skip_header and any(getattr(args, role) for role in COLUMNS):
        parser.error("--id-column, --name-column and --data-column need a header; they do not go with --skip-header")
    for path in filter(None, (args.input, args.prompt_file, args.instructions_file, args.body_file, args.schema)):
        if same_regular_file(path, args.output):
            parser.error(f"{shown(path)} is both an input and the output; choose another --out")


# ---- main


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, and return the exit code. Invalid arguments raise SystemExit(2), as in argparse."""
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
    except Exit as stopped:
        if stopped.exit_code > 128:
            console.message(f"{PROG}: stopped")
        return stopped.exit_code
    finally:
        console.close()


if __name__ == "__main__":
    raise SystemExit(main())
