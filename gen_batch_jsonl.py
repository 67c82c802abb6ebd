#!/usr/bin/env python3
"""Turn a CSV of artists into a request file (JSONL) for OpenAI's Batch API.

  gen_batch_jsonl.py --in artists.csv --out requests.jsonl \\
      --prompt-file bio_prompt.md --model gpt-5-mini
  gen_batch_jsonl.py --in artists.csv --out requests.jsonl \\
      --prompt-id pmpt_abc --model gpt-5-mini
  zcat artists.csv.gz | gen_batch_jsonl.py --in - --out - \\
      --prompt-file bio_prompt.md --model gpt-5-mini

The CSV has the columns artist_id, artist_name and artist_data; every valid row
becomes one request. Rows that cannot be used are skipped and named on stderr,
where the last line accounts for every row. --out is written whole or not at all.

exit codes: 0 success, 1 fatal error, 2 invalid arguments, 130 interrupted,
143 terminated, 129 hung up
"""
from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import io
import itertools
import json
import math
import os
import re
import secrets
import signal
import stat
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from json.encoder import encode_basestring
from operator import itemgetter
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO

PROG = "gen_batch_jsonl.py"
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"{PROG}: error: it needs Python 3.11 or later; this is {sys.version.split()[0]}")
STDIN, STDOUT = "/dev/stdin", "/dev/stdout"  # what - stands for
COLUMNS = ("artist_id", "artist_name", "artist_data")
DELIMITERS = (",", ";", "\t")
RESPONSES = "/v1/responses"
CHAT_COMPLETIONS = "/v1/chat/completions"
MAX_FIELD_CHARS = 10_485_760  # the longest string the Responses API takes
MAX_METADATA_CHARS = 512  # the longest metadata value, API reference
MAX_BATCH_REQUESTS = 50_000  # Batch API guide, "Rate limits"
MAX_BATCH_BYTES = 200_000_000  # Batch API guide, "Rate limits"
BLOCK_CHARS = 1 << 17  # of the CSV converted at a time
MAX_LISTED = 20  # skipped rows named one by one without --verbose
ORDINARY = bytes({*range(32, 256)} - {*b'"\\'})  # bytes that stand for themselves in a JSON string
BETWEEN = secrets.token_hex(16)  # joins values, none of which can have it
PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")
UNDECODABLE = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as surrogateescape decodes them
NOT_UTF8 = "not valid UTF-8"  # why a row is skipped
UTF16_MARKS = ("\udcff\udcfe", "\udcfe\udcff")  # its byte-order marks, decoded likewise


class Failure(Exception):
    """A foreseeable end of the run; its text is the one line that the user reads."""


class Stopped(BaseException):
    """The run ends here without an error: stdout was closed or a signal arrived. Carries the exit code."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


class Problem(NamedTuple):
    """Why a row is skipped: the reason it is counted under, and what to tell about this one."""

    reason: str
    detail: str


# the line where a row began, its fields, what is wrong with it
Row = tuple[int, list[str], Problem | None]
# from artist_ids, artist_names and artist_data to the requests' lines
Renderer = Callable[[Sequence[str], Sequence[str], Sequence[str]], bytes]


class Layout(NamedTuple):
    """How the rows of a file are read: what separates the fields, how many, and where the three columns stand."""

    delimiter: str
    width: int
    positions: tuple[int, ...]


class Header(NamedTuple):
    """What the beginning of a CSV tells: its layout, how many lines were read, and those to be read again as rows."""

    layout: Layout
    lines_read: int
    ahead: list[str]


# -- text --------------------------------------------------------------------------------------------------------


def escape_controls(text: str) -> str:
    """The text on one line: line breaks, control characters and undecodable bytes as the escapes of JSON."""
    return re.sub("[^ -~]", lambda char: char[0] if char[0].isprintable() else json.dumps(char[0])[1:-1], text)


def escape_separators(line: bytes) -> bytes:
    """The JSON line with the characters escaped at which some readers would cut it."""
    for separator in ("\u2028", "\u2029", "\x85"):
        line = line.replace(separator.encode(), f"\\u{ord(separator):04x}".encode())
    return line


def escape_values(values: Sequence[str]) -> Sequence[str]:
    """The values as they stand inside JSON strings; all at once, which takes a third of the time of one by one."""
    joined = BETWEEN.join(values)
    special = joined.encode().translate(None, ORDINARY).decode()
    if not special:
        return values
    for char in sorted(set(special), key="\\".__ne__):  # the backslash first, as the others bring backslashes
        joined = joined.replace(char, encode_basestring(char)[1:-1])
    return joined.split(BETWEEN)


def quoted(text: str) -> str:
    """The text in quotes for a message, on one line and cut to a readable length."""
    return f'"{escape_controls(text[:80])}{"…" if len(text) > 80 else ""}"'


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun if number == 1 else noun + 's'}"


def shape_of(text: str) -> str:
    """An id with its runs of digits and of letters collapsed: `a12-b` and `x7-abc` are both `a0-a`."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", text.strip()))


def discard(file: BinaryIO | TextIO) -> None:
    """Drop what is left in the file's buffer and whatever follows, or the interpreter complains of it at its end."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), file.fileno())


class Console:
    """stderr: messages, a line each, and on a terminal one line of progress that is written over."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._shown = 0  # characters of progress on the terminal's line
        self.live = stream is not None and stream.isatty()

    def _write(self, text: str) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # a lost message must not end the work that it tells of
                self._stream.write(text)
                self._stream.flush()

    def close(self) -> None:
        """Drop what stderr has not taken to the end, which would change the exit code."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except OSError:
                discard(self._stream)

    def say(self, text: str) -> None:
        self.clear()
        self._write(escape_controls(text) + "\n")

    def warn(self, text: str) -> None:
        self.say(f"{PROG}: warning: {text}")

    def progress(self, text: str) -> None:
        if self._stream is None:
            return
        columns = 80
        with contextlib.suppress(OSError):  # the terminal may be gone
            columns = os.get_terminal_size(self._stream.fileno()).columns or columns
        text = text[: columns - 1]
        self._write("\r" + text.ljust(self._shown))
        self._shown = len(text)

    def clear(self) -> None:
        if self._shown:
            self._write("\r" + " " * self._shown + "\r")
            self._shown = 0


# -- CSV ---------------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """The lines that csv took for one record, and its fields: None where its quoting is malformed."""

    lines: list[str]
    fields: list[str] | None
    error: str = ""
    never_closed: bool = False


def read_record(line: str, following: Iterator[str], delimiter: str) -> Record:
    """The record that begins with `line`, as csv reads it; takes lines from `following` while a quote is open."""
    taken = [line]
    ended = False

    def source() -> Iterator[str]:
        nonlocal ended
        yield line
        for more in following:
            taken.append(more)
            yield more
        ended = True

    try:
        return Record(taken, next(csv.reader(source(), delimiter=delimiter, strict=True)))
    except csv.Error as error:
        return Record(taken, None, str(error), never_closed=ended)


def line_parser(delimiter: str) -> Callable[[str], list[str] | None]:
    """A function from a line to its fields, or to None where the line is no record by itself.

    One csv.reader serves all lines, as making one for each takes three times as long as its work; asking it for more
    than the one line that waits is an IndexError.
    """
    waiting: list[str] = []
    records = csv.reader(iter(waiting.pop, None), delimiter=delimiter, strict=True)

    def parse(line: str) -> list[str] | None:
        waiting.append(line)
        try:
            return next(records)
        except (csv.Error, IndexError):
            return None

    return parse


def split_leniently(line: str, delimiter: str) -> list[str]:
    """The fields of the line by itself, even if the last is still open at its end."""
    return next(csv.reader([line], delimiter=delimiter))


def fields_begun(lines: Sequence[str], delimiter: str) -> list[int]:
    """For each line of a record that spans several: how many of its fields have begun by the end of the line."""
    first, *others = lines
    further = (len(split_leniently('"' + line, delimiter)) - 1 for line in others)
    return list(itertools.accumulate(further, initial=len(split_leniently(first, delimiter))))


def ragged(found: int, width: int) -> Problem:
    return Problem("wrong number of fields", f"{count_of(found, 'field')} instead of {width}")


def malformed(record: Record, noticed: int) -> Problem:
    """What to tell of a record without fields; `noticed` is the line where csv gave up."""
    if "field larger" in record.error:
        return Problem("field too long", f"a field exceeds {MAX_FIELD_CHARS} characters (noticed on line {noticed})")
    if record.never_closed:
        return Problem("malformed quoting", f"a quote is never closed (noticed at the end, line {noticed})")
    return Problem("malformed quoting", f"text after a closing quote (noticed on line {noticed})")


def is_blank(fields: Sequence[str]) -> bool:
    return not any(field.strip() for field in fields)


def last_filled(fields: Sequence[str]) -> int:
    """The position of the last field that is not blank; 0 where all are."""
    return max((position for position, field in enumerate(fields) if field.strip()), default=0)


def drain(lines: deque[str]) -> Iterator[str]:
    while lines:
        yield lines.popleft()


class RowReader:
    """Reads the rows of a CSV; one that is malformed or has the wrong width costs itself and no other."""

    def __init__(self, text: TextIO, header: Header) -> None:
        self.swallowing: list[tuple[int, list[int]]] = []  # rows that seem to hold others: first line, those lines
        self._text = text
        self._layout = header.layout
        self._number = header.lines_read  # of the line read last
        self._ahead = deque(header.ahead)  # lines read too far, to be read again

    def batches(self, limit: int | None = None, block_chars: int = BLOCK_CHARS) -> Iterator[list[Row]]:
        """Every row that is not blank, once, in order, or the first `limit`; as many at a time as a block holds.

        A line without quotes is what csv would make of it by a mere split, in a fifth of the time. A block never has
        more characters, so never more lines, than there are rows to come: none is waited for that is not needed.
        """
        delimiter, width, _ = self._layout
        parse_line = line_parser(delimiter)
        left = sys.maxsize if limit is None else limit
        while left and (block := [*drain(self._ahead)] or self._text.readlines(min(block_chars, left))):
            batch: list[Row] = []
            lines = iter(block)
            number = self._number
            for line in lines:
                number += 1
                fields: list[str] | None
                if '"' in line or len(line) > MAX_FIELD_CHARS:
                    fields = parse_line(line)
                else:
                    fields = line.rstrip("\r\n").split(delimiter)
                if fields is None:
                    self._number = number
                    batch += self._read_across(line, itertools.chain(lines, self._text))
                    number = self._number
                elif len(fields) == width and fields[0].strip():
                    batch.append((number, fields, None))
                else:
                    batch += self._checked(number, fields)
            self._number = number
            if batch := batch[:left]:
                left -= len(batch)
                yield batch

    def _checked(self, number: int, fields: list[str]) -> Iterator[Row]:
        """The row, with its problem where its width is wrong; nothing where it is blank."""
        width = self._layout.width
        if not is_blank(fields):
            yield number, fields, None if len(fields) == width else ragged(len(fields), width)

    def _read_across(self, line: str, lines: Iterator[str]) -> Iterator[Row]:
        """The rows of the record that begins with `line` or, where that one fails, of its lines."""
        self._ahead.append(line)
        self._number -= 1
        while self._ahead:
            self._number += 1
            began = self._number
            first, following = self._ahead.popleft(), itertools.chain(drain(self._ahead), lines)
            record = read_record(first, following, self._layout.delimiter)
            self._number += len(record.lines) - 1
            if record.fields is None:
                yield began, [], malformed(record, self._number)
                yield from self._resume(began, record)
            elif len(record.fields) == self._layout.width:
                yield from self._checked(began, record.fields)
                self._look_for_swallowed(began, record.fields, record.lines)
            elif not is_blank(record.fields):
                yield from self._checked(began, record.fields)
                yield from self._resume(began, record)

    def _resume(self, began: int, failed: Record) -> Iterator[Row]:
        """The rows after line `began`, up to where the failed record ended, in one pass.

        A line whose own record is still open at its end leaves csv in the state in which the failed record left it,
        so both end on the same line: in the same error, or with as many further fields. Nothing is read on from it.
        """
        delimiter, width, _ = self._layout
        noticed = self._number
        begun = fields_begun(failed.lines, delimiter) if failed.fields is not None else []
        filled = last_filled(failed.fields or [])
        last = len(failed.lines) if failed.never_closed else max(1, len(failed.lines) - 1)
        for index in range(1, last):
            number, line = began + index, failed.lines[index]
            alone = read_record(line, iter(()), delimiter)
            if alone.fields is not None:
                yield from self._checked(number, alone.fields)
            elif not alone.never_closed:
                yield number, [], malformed(alone, number)
            elif failed.fields is None:
                yield number, [], malformed(failed, noticed)
            else:
                own = split_leniently(line, delimiter)  # the last of them is the field that failed has open here
                width_from_here = len(own) + len(failed.fields) - begun[index]
                if width_from_here == width or (is_blank(own) and begun[index] - 1 > filled):
                    last = index  # a row or a blank one, and failed ends where it does
                    break
                yield number, [], ragged(width_from_here, width)
        self._ahead.extendleft(reversed(failed.lines[last:]))
        self._number = began + last - 1

    def _look_for_swallowed(self, began: int, fields: list[str], lines: list[str]) -> None:
        """Note the lines inside a quoted field that look like rows.

        Where ids are words or numbers, prose may begin like one, but has a blank behind its commas.
        """
        delimiter, width, (id_at, *_) = self._layout
        shape = shape_of(fields[id_at])
        prose_like = not {"a", "0"} <= set(shape)
        swallowed = []
        for number, line in enumerate(lines[1:], began + 1):
            inner = line.split(delimiter)
            if len(inner) != width or shape_of(inner[id_at]) != shape:
                continue
            if not (prose_like and any(field[:1].isspace() for field in inner[1:])):
                swallowed.append(number)
        if swallowed:
            self.swallowing.append((began, swallowed))


def find_layout(names: Sequence[str], delimiter: str) -> Layout | None:
    """The layout that a header tells, or None where it lacks one of the three names."""
    found = [name.strip().lower() for name in names]
    for column in COLUMNS:
        if found.count(column) > 1:
            raise Failure(f"the header names {column} twice; rename one of the two")
    if not set(COLUMNS) <= set(found):
        return None
    return Layout(delimiter, len(found), tuple(found.index(column) for column in COLUMNS))


def read_header(text: TextIO, skip_header: bool, console: Console) -> Header:
    """The layout by the first line that is not blank or, with --skip-header, the three columns in their order."""
    blank = 0
    while (first := text.readline()) and not first.strip(" ,;\t\r\n"):
        blank += 1
    if not first:
        raise Failure("the CSV is empty; it needs a header and at least one row")
    if first.startswith(UTF16_MARKS) or "\0\0" in (first[:4:2], first[1:4:2]):
        raise Failure("the CSV is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8 IN.csv > OUT.csv")
    ahead: deque[str] = deque()
    found: list[str] = []
    for delimiter in DELIMITERS:
        record = read_record(first, itertools.chain(drain(ahead), text), delimiter)
        if layout := find_layout(record.fields or [], delimiter):
            if skip_header:
                console.warn(f"line {blank + 1}: names the columns, so it is taken as the header despite --skip-header")
            return Header(layout, blank + len(record.lines), [*ahead])
        ahead.extendleft(reversed(record.lines[1:]))
        found = max(found, record.fields or first.split(delimiter), key=len)
    if skip_header:
        return Header(Layout(",", len(COLUMNS), (0, 1, 2)), blank, [first, *ahead])
    missing = ", ".join(column for column in COLUMNS if column not in [name.strip().lower() for name in found])
    raise Failure(f"line {blank + 1}: the header lacks {missing} (found: {', '.join(map(str.strip, found))[:200]}); "
                  "rename the columns, or use --skip-header for a file without a header")


# -- files -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def failing_to(do: str) -> Iterator[None]:
    """Turn an OSError into the Failure that says what could not be done and why."""
    try:
        yield
    except OSError as error:
        raise Failure(f"cannot {do}: {error.strerror or error}") from None


@contextlib.contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    with failing_to(f"read {path}"):
        if path != STDIN:
            with open(path, "rb") as file:
                yield file
        elif sys.stdin is None:
            raise Failure("stdin is closed; there is nothing to read")
        else:
            with contextlib.suppress(io.UnsupportedOperation):  # of a stdin that is no file
                os.set_blocking(sys.stdin.fileno(), True)  # else a pause of the writer would look like the end
            yield sys.stdin.buffer


def read_text(path: str) -> str:
    """The whole of a small UTF-8 file, its line ends as they are."""
    try:
        with open_input(path) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Failure(f"{path}: not valid UTF-8 (byte {error.start + 1}); save it as UTF-8") from None


def read_through(batches: Iterator[list[Row]], path: str) -> Iterator[list[Row]]:
    """The batches; unlike open_input, this keeps an error of reading apart from one of whoever uses them."""
    with failing_to(f"read {path}"):
        yield from batches


@contextlib.contextmanager
def decoded(source: BinaryIO) -> Iterator[TextIO]:
    """The source as text, its line ends as they are and bytes that are not UTF-8 as lone surrogates."""
    text = io.TextIOWrapper(source, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield text
    finally:
        text.detach()


@contextlib.contextmanager
def streaming(file: BinaryIO | None) -> Iterator[BinaryIO]:
    """The file, flushed at the end; where it fails or the run is stopped, nothing waits for its reader any more."""
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
        with open(temporary, "xb", buffering=1 << 17) as file:
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
        elif os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as opened, streaming(opened) as file:
                yield file
        else:
            with replacing(os.path.realpath(path)) as file:
                yield file
    except OSError as error:
        if path == STDOUT and isinstance(error, BrokenPipeError):
            raise Stopped(1) from None
        raise Failure(f"cannot write {path}: {error.strerror or error}") from None


def same_regular_file(source: str, destination: str) -> bool:
    try:
        there = os.fstat(0) if source == STDIN else os.stat(source)
        here = os.fstat(1) if destination == STDOUT else os.stat(destination)
    except OSError:
        return False
    return stat.S_ISREG(there.st_mode) and os.path.samestat(there, here)


# -- requests ----------------------------------------------------------------------------------------------------


class Slots(NamedTuple):
    """Stand-ins for a row's values in the request that every line is made from; random, so that no text has them."""

    artist_id: str
    artist_name: str
    artist_data: str
    short_name: str


def new_slots() -> Slots:
    return Slots(*(secrets.token_hex(16) for _ in Slots._fields))


def fill_placeholders(template: str, slots: Slots, path: str) -> str:
    """The prompt template with slots for its placeholders; raises Failure for any other, with its line."""

    def slot(match: re.Match[str]) -> str:
        name = match[1].strip()
        if name not in ("artist_name", "artist_data"):
            line = template.count("\n", 0, match.start()) + 1
            raise Failure(f"{path} line {line}: unknown placeholder {match[0]}; "
                          "there are {{artist_name}} and {{artist_data}}")
        return str(getattr(slots, name))

    filled = PLACEHOLDER.sub(slot, template)
    if slots.artist_name not in filled:
        raise Failure(f"{path}: the template has no {{{{artist_name}}}}; every prompt would be for nobody")
    return filled


def stored_prompt_body(args: argparse.Namespace, slots: Slots) -> dict[str, Any]:
    prompt: dict[str, Any] = {"id": args.prompt_id}
    if args.prompt_version:
        prompt["version"] = args.prompt_version
    prompt["variables"] = {"artist_name": slots.artist_name, "artist_data": slots.artist_data}
    return {"model": args.model, "prompt": prompt} if args.model else {"prompt": prompt}


def template_body(args: argparse.Namespace, slots: Slots) -> dict[str, Any]:
    text = fill_placeholders(read_text(args.prompt_file), slots, args.prompt_file)
    instructions = read_text(args.instructions_file) if args.instructions_file else None
    body: dict[str, Any] = {"model": args.model}
    if args.endpoint == CHAT_COMPLETIONS:
        system = [] if instructions is None else [{"role": "system", "content": instructions}]
        return body | {"messages": [*system, {"role": "user", "content": text}]}
    if instructions is not None:
        body["instructions"] = instructions
    return body | {"input": text, "metadata": {"artist_name": slots.short_name}}


def read_body_fields(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The further body fields of --body-file; raises Failure where one is in `body` already, or is the model."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not allowed")

    try:
        fields = json.loads(read_text(path), parse_constant=refuse)
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()  # no lone surrogate, no number out of range
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise Failure(f"{path}: not a JSON object; write the body fields as {{\"max_output_tokens\": 400, ...}}")
    for name in fields:
        if name in body or name == "model":
            hint = "use --model" if name == "model" else "take it out of the file"
            raise Failure(f'{path}: the field "{name}" is written by this tool; {hint}')
    return fields


def request_renderer(args: argparse.Namespace) -> Renderer:
    """A function from the artist_ids, artist_names and artist_data of some rows to their requests, a line each.

    The request is written as JSON once, with slots, and only a row's values are put in. The function raises
    UnicodeEncodeError where a value was not valid UTF-8.
    """
    slots = new_slots()
    body = stored_prompt_body(args, slots) if args.prompt_id else template_body(args, slots)
    if args.body_file:
        body |= read_body_fields(args.body_file, body)
    request = {"custom_id": slots.artist_id, "method": "POST", "url": args.endpoint, "body": body}
    text = json.dumps(request, ensure_ascii=False) + "\n"
    slot = re.compile("|".join(slots))
    in_order = itemgetter(*(slots.index(found) for found in slot.findall(text)))
    fill = slot.sub("%s", text.replace("%", "%%")).__mod__

    def render(artist_ids: Sequence[str], artist_names: Sequence[str], artist_data: Sequence[str]) -> bytes:
        short_names = [name[:MAX_METADATA_CHARS] for name in artist_names]
        columns = map(escape_values, in_order((artist_ids, artist_names, artist_data, short_names)))
        lines = "".join(map(fill, zip(*columns, strict=True))).encode()
        return lines if lines.isascii() else escape_separators(lines)

    return render


# -- conversion --------------------------------------------------------------------------------------------------


class Skipped:
    """Counts the skipped rows by reason and names the first of them; with --strict, raises Failure instead."""

    def __init__(self, console: Console, strict: bool, verbose: bool) -> None:
        self.reasons: Counter[str] = Counter()
        self._console = console
        self._strict = strict
        self._listed = sys.maxsize if verbose else MAX_LISTED

    def add(self, line: int, problem: Problem) -> None:
        if self._strict:
            raise Failure(f"line {line}: {problem.detail}; without --strict the row is skipped")
        self.reasons[problem.reason] += 1
        skipped = self.reasons.total()
        if skipped <= self._listed:
            self._console.warn(f"line {line}: {problem.detail}; row skipped")
        elif skipped == self._listed + 1:
            self._console.warn("more rows are skipped; --verbose names every one")


class Progress:
    """From its second second on, says on a terminal how far the reading is."""

    def __init__(self, console: Console, source: BinaryIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._source = source
        self._clock = clock
        self._started = self._shown = clock()
        status = os.fstat(source.fileno()) if console.live else None
        self._size = status.st_size if status and stat.S_ISREG(status.st_mode) else 0

    def show(self, rows: int) -> None:
        now = self._clock()
        if not self._console.live or now - self._shown < (0.2 if self._shown > self._started else 1):
            return
        self._shown = now
        done = f"{self._source.tell() / 1e6:.1f} of {self._size / 1e6:.1f} MB, " if self._size else ""
        self._console.progress(f"{done}{rows} rows, {rows / (now - self._started):.0f} rows/s")


class Parts:
    """Counts the batches that `batch_tool.py create` makes of the requests: consecutive lines within the limits."""

    def __init__(self) -> None:
        self.count = 1
        self._requests_left = MAX_BATCH_REQUESTS
        self._bytes_left = MAX_BATCH_BYTES

    def add(self, lines: bytes, requests: int) -> None:
        if requests > self._requests_left or len(lines) > self._bytes_left:
            if requests > 1:
                for line in lines.splitlines(keepends=True):
                    self.add(line, 1)
                return
            self.count += 1
            self._requests_left, self._bytes_left = MAX_BATCH_REQUESTS, MAX_BATCH_BYTES
        self._requests_left -= requests
        self._bytes_left -= len(lines)


class RequestWriter:
    """Writes a request for every valid row and gives every other one to `skipped`."""

    def __init__(self, positions: tuple[int, ...], render: Renderer, out: BinaryIO, skipped: Skipped) -> None:
        self.line_of: dict[bytes, int] = {}  # by the artist_ids written; bytes take less memory than str
        self.parts = Parts()
        self._values = itemgetter(*positions)
        self._render = render
        self._out = out
        self._skipped = skipped

    def write(self, batch: Sequence[Row]) -> None:
        if self._write_valid(batch):
            return
        if len(batch) > 1:
            half = len(batch) // 2
            self.write(batch[:half])
            self.write(batch[half:])
        else:
            [(line, fields, problem)] = batch
            self._skipped.add(line, problem or self._find_problem(fields))

    def _write_valid(self, batch: Sequence[Row]) -> bool:
        """Write all rows of the batch, column by column, which is three times as fast as row by row; or none."""
        numbers, rows, problems = zip(*batch, strict=True)
        if any(problems):
            return False
        columns = zip(*map(self._values, rows), strict=True)
        artist_ids, artist_names, artist_data = ([value.strip() for value in column] for column in columns)
        try:
            line_of = dict(zip(map(str.encode, artist_ids), numbers, strict=True))
            unique = len(line_of) == len(batch) and self.line_of.keys().isdisjoint(line_of)
            if not unique or not all(artist_ids) or not all(artist_names):
                return False
            lines = self._render(artist_ids, artist_names, artist_data)
        except UnicodeEncodeError:
            return False
        self._out.write(lines)
        self.line_of.update(line_of)
        self.parts.add(lines, len(batch))
        return True

    def _find_problem(self, fields: list[str]) -> Problem:
        """Why a row of the right width cannot be written."""
        values = [value.strip() for value in self._values(fields)]
        for column, value in zip(COLUMNS, values, strict=True):
            if UNDECODABLE.search(value):
                return Problem(NOT_UTF8, f"{column} is {NOT_UTF8}")
            if not value and column != "artist_data":
                return Problem(f"empty {column}", f"{column} is empty")
        earlier = self.line_of[values[0].encode()]
        return Problem("duplicate artist_id", f"artist_id {quoted(values[0])} was already used on line {earlier}")


def account(requests: int, reasons: Counter[str]) -> str:
    """Where the rows went: every row read was written or skipped."""
    skipped = reasons.total()
    by_reason = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    return f"{count_of(requests + skipped, 'row')} read, {skipped} skipped{': ' if skipped else ''}{by_reason}"


def warn_of_swallowing(swallowing: list[tuple[int, list[int]]], console: Console) -> None:
    for began, lines in swallowing[:MAX_LISTED]:
        named = ", ".join(map(str, lines[:MAX_LISTED])) + (", …" if len(lines) > MAX_LISTED else "")
        one, many = f"line {named}, which looks like a row of its own", f"lines {named}, which look like rows"
        held = one if len(lines) == 1 else many
        console.warn(f"line {began}: a quoted field holds {held}; check the quotes on line {began}")
    if len(swallowing) > MAX_LISTED:
        console.warn(f"rows may have been swallowed in {len(swallowing) - MAX_LISTED} more places")


def convert(args: argparse.Namespace, console: Console) -> None:
    render = request_renderer(args)
    if not args.model:
        console.warn("no --model (or MODEL): the Batch API refuses requests without body.model")
    skipped = Skipped(console, args.strict, args.verbose)
    with open_input(args.input) as source, decoded(source) as text:
        header = read_header(text, args.skip_header, console)
        if args.verbose:
            delimiter, width, positions = header.layout
            at = ", ".join(str(position + 1) for position in positions)
            console.say(f"{', '.join(COLUMNS)} are columns {at} of {width}, separated by {delimiter!r}")
        reader = RowReader(text, header)
        progress = Progress(console, source)
        with open_output(args.output) as out:
            writer = RequestWriter(header.layout.positions, render, out, skipped)
            for batch in read_through(reader.batches(args.limit), args.input):
                writer.write(batch)
                progress.show(len(writer.line_of) + skipped.reasons.total())
            accounted = account(len(writer.line_of), skipped.reasons)
            if skipped.reasons[NOT_UTF8]:
                console.warn("some rows are not valid UTF-8; if the CSV comes from Excel, convert it first: "
                             "iconv -f WINDOWS-1252 -t UTF-8 IN.csv > OUT.csv")
            if not writer.line_of:
                raise Failure(f"no valid row in {args.input} ({accounted}); {args.output} is not written")
    warn_of_swallowing(reader.swallowing, console)
    batches = f"; batch_tool.py create will make {writer.parts.count} batches of it" if writer.parts.count > 1 else ""
    console.say(f"Wrote {count_of(len(writer.line_of), 'request')} to {args.output} ({accounted}){batches}")


# -- command line ------------------------------------------------------------------------------------------------


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


class Parser(argparse.ArgumentParser):
    """Writes the help to stdout, where that fails is an error like any other, and nothing else there."""

    def print_help(self, file: object = None) -> None:
        with open_output(STDOUT) as stdout:
            stdout.write(self.format_help().encode())

    def print_usage(self, file: Any = None) -> None:
        if file is not None:
            super().print_usage(file)

    def error(self, message: str) -> NoReturn:
        super().error(escape_controls(message))


def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=PROG, description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--in", dest="input", required=True, type=input_path, metavar="CSV", help="CSV to read, - for stdin")
    add("--out", dest="output", required=True, type=output_path, metavar="JSONL", help="JSONL to write, - for stdout")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt-id", type=text_argument, metavar="ID", help="id of a stored prompt [PROMPT_ID]")
    prompt.add_argument(
        "--prompt-file", type=input_path, metavar="FILE", help="prompt template, instead of --prompt-id [PROMPT_FILE]"
    )
    add("--prompt-version", type=text_argument, metavar="V", help="version of the stored prompt [PROMPT_VERSION]")
    add("--instructions-file", type=input_path, metavar="FILE", help="text sent as instructions with every request")
    add(
        "--endpoint",
        choices=(RESPONSES, CHAT_COMPLETIONS),
        default=RESPONSES,
        help="what the requests are for; chat completions only with --prompt-file (default: %(default)s)",
    )
    text = "sent as body.model; required with --prompt-file [MODEL]"
    add("--model", type=text_argument, metavar="MODEL", help=text)
    add("--body-file", type=input_path, metavar="JSON", help="JSON object of further body fields for every request")
    add("--limit", type=positive_int, metavar="N", help="read only the first N data rows")
    add("--skip-header", action="store_true", help=f"the CSV has no header; its columns are {','.join(COLUMNS)}")
    add("--strict", action="store_true", help="the first invalid row ends the run, with no output")
    add("--verbose", action="store_true", help="say more on stderr: every skipped row, the columns")
    return parser


def complete_from_environment(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what no flag gives; --prompt-id and --prompt-file each beat both variables."""

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


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    complete_from_environment(parser, args)
    if args.prompt_file:
        if args.prompt_version:
            parser.error("--prompt-version goes with --prompt-id, not with a prompt file")
        if not args.model:
            parser.error("--model is required with a prompt file (or MODEL)")
    elif args.instructions_file or args.endpoint != RESPONSES:
        parser.error("--instructions-file and --endpoint go with --prompt-file, not with a stored prompt")
    inputs = [path for path in (args.input, args.prompt_file, args.instructions_file, args.body_file) if path]
    if inputs.count(STDIN) > 1:
        parser.error("only one input can be stdin (-)")
    for path in inputs:
        if same_regular_file(path, args.output):
            parser.error(f"{path} would be read and written at once; choose another --out")
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    csv.field_size_limit(MAX_FIELD_CHARS)
    gc.disable()  # nothing here makes reference cycles; looking for them among the rows takes a fifth of the time
    console = Console(sys.stderr)
    try:
        with stopping_on_signals():
            convert(parse_args(argv), console)
        return 0
    except Failure as error:
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
