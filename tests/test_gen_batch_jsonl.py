from __future__ import annotations

import contextlib
import csv
import errno
import io
import itertools
import json
import os
import pty
import random
import re
import signal
import stat
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run

import gen_batch_jsonl as gen
from gen_batch_jsonl import main

SCRIPT = "gen_batch_jsonl.py"
SAMPLE = ROOT / "samples" / "input.csv"
TATE = ROOT.parent / "shared" / "data" / "tate_artists.csv"
HEADER = "artist_id,artist_name,artist_data\n"
STORED = ("--prompt-id", "bio_gen", "--model", "m")
FILES = ("--in", "in.csv", "--out", "out.jsonl")

pytestmark = pytest.mark.usefixtures("work")


def write(name: str, content: str | bytes) -> Path:
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def requests(path: str = "out.jsonl") -> list[Any]:
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]


def variables(path: str = "out.jsonl") -> list[tuple[str, str, str]]:
    """The requests' values: artist_id, artist_name, artist_data."""
    return [(request["custom_id"], *request["body"]["prompt"]["variables"].values()) for request in requests(path)]


def convert(content: str | bytes, *options: str) -> int:
    """main on a CSV of that content, with a stored prompt and a model."""
    write("in.csv", content)
    return main([*FILES, *STORED, *options])


def feed_stdin(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))


def open_reader(content: str | bytes, **options: Any) -> gen.CsvReader:
    encoded = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    return gen.CsvReader(io.BytesIO(encoded), "in.csv", options.pop("encoding", "utf-8"), **options)  # type: ignore


def layout(delimiter: str = ",", names: Sequence[str] = gen.COLUMNS) -> gen.Layout:
    used = [names.index(column) for column in gen.COLUMNS]
    return gen.Layout(delimiter.encode(), len(names), used, [*gen.COLUMNS], [*names])


def read_records(content: str | bytes, delimiter: str = ",", names: Sequence[str] = gen.COLUMNS) -> list[gen.Record]:
    """Every record after the header, each looked at by itself."""
    reader = open_reader(content)
    reader.skip_lines(1)
    return [*reader.records(layout(delimiter, names), sys.maxsize)]


def fields_of(record: gen.Record) -> list[str]:
    return [field.decode() for field in record.fields]


# -- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("", ""),
        ("é ü 東", "é ü 東"),
        ("a\nb", "a\\nb"),
        ("\x1b[2J", "\\u001b[2J"),
        ("\u2028", "\\u2028"),
        ("\udcff", "\\udcff"),
        ("\u202e", "\\u202e"),
    ],
)
def test_text_in_a_message_stays_on_its_line(text: str, shown: str) -> None:
    assert gen.escape_controls(text) == shown


@pytest.mark.parametrize(
    ("artist_id", "shape"),
    [("a1", "a0"), ("abc-0012", "a-0"), ("12", "0"), (" x9y ", "a0a"), ("ö_é7", "a_a0"), ("", "")],
)
def test_the_shape_of_an_id_collapses_digits_and_letters(artist_id: str, shape: str) -> None:
    assert gen.shape_of(artist_id) == shape


def test_only_the_separators_that_would_cut_a_line_are_escaped() -> None:
    line = 'é\u2027\u2028\u2029\u202a\x84\x85\x86 "\U0001f600"'
    escaped = 'é\u2027\\u2028\\u2029\u202a\x84\\u0085\x86 "\U0001f600"'
    assert gen.escape_line_separators(line.encode()).decode() == escaped


def test_a_long_value_is_cut_in_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 100
    assert convert(f"{HEADER}{long},A,\n{long},B,\n") == 0
    shown = f'"{"x" * 80}…"'
    assert f"line 3: artist_id {shown} was already used on line 2; row skipped\n" in capsys.readouterr().err


# -- CSV: well-formed --------------------------------------------------------------------------------------------

WELL_FORMED = pytest.mark.parametrize(
    ("content", "rows"),
    [
        pytest.param("artist_id,artist_name,artist_data\n1,A,x\n", [("1", "A", "x")], id="LF"),
        pytest.param("artist_id,artist_name,artist_data\r\n1,A,x\r\n2,B,y\r\n", [("1", "A", "x"), ("2", "B", "y")],
                     id="CRLF"),
        pytest.param("artist_id,artist_name,artist_data\r1,A,x\r2,B,y\r", [("1", "A", "x"), ("2", "B", "y")], id="CR"),
        pytest.param("artist_id,artist_name,artist_data\n1,A,x", [("1", "A", "x")], id="no newline at the end"),
        pytest.param("artist_id,artist_name,artist_data\n1,A,\"x\"", [("1", "A", "x")], id="ends in a quote"),
        pytest.param("\ufeffartist_id,artist_name,artist_data\n1,A,x\n", [("1", "A", "x")], id="byte-order mark"),
        pytest.param('\ufeff"artist_id","artist_name","artist_data"\n1,A,x\n', [("1", "A", "x")],
                     id="byte-order mark and quotes"),
        pytest.param('artist_id,artist_name,artist_data\n1,"A, B","x"\n', [("1", "A, B", "x")], id="embedded comma"),
        pytest.param('artist_id,artist_name,artist_data\n1,A,"x ""y"" z"\n', [("1", "A", 'x "y" z')],
                     id="doubled quotes"),
        pytest.param('artist_id,artist_name,artist_data\n1,A,"x\ny\r\n\nz"\n2,B,\n',
                     [("1", "A", "x\ny\r\n\nz"), ("2", "B", "")], id="embedded newlines"),
        pytest.param('artist_id,artist_name,artist_data\n1,A 7" single,x\n', [("1", 'A 7" single', "x")],
                     id="a quote inside an unquoted field"),
        pytest.param("artist_data,artist_id,artist_name\nx,1,A\n", [("1", "A", "x")], id="another order"),
        pytest.param(" Artist_ID , ARTIST_NAME,artist_data \n1,A,x\n", [("1", "A", "x")], id="case and blanks"),
        pytest.param("born,artist_id,artist_name,born,artist_data\n9,1,A,8,x\n", [("1", "A", "x")],
                     id="other columns, even twice"),
        pytest.param('artist_id,artist_name,artist_data,"born\nor founded"\n1,A,x,9\n', [("1", "A", "x")],
                     id="a name of two lines"),
        pytest.param("artist_id;artist_name;artist_data\n1;A, B;x\n", [("1", "A, B", "x")], id="semicolons"),
        pytest.param('artist_id\tartist_name\tartist_data\n1\tA;"\t"x\ty"\n', [("1", 'A;"', "x\ty")], id="tabs"),
        pytest.param("\n ,,\n\nartist_id,artist_name,artist_data\n1,A,x\n", [("1", "A", "x")],
                     id="blank lines before the header"),
        pytest.param('artist_id,artist_name,artist_data\n\n1,A,x\n , ,\n"","\n",""\n,,,,\n \n2,B,y\n\n',
                     [("1", "A", "x"), ("2", "B", "y")], id="blank rows"),
        pytest.param("artist_id,artist_name,artist_data\n 1 ,\tA B\u3000, x\u00a0\n", [("1", "A B", "x")],
                     id="blanks around values"),
        pytest.param("artist_id,artist_name,artist_data\n1,A\x0b\x1cB\u2028\x85C,x\n",
                     [("1", "A\x0b\x1cB\u2028\x85C", "x")], id="line separators of str.splitlines"),
        pytest.param("artist_id,artist_name,artist_data\n1,A\0B,\0\n", [("1", "A\0B", "\0")], id="NUL"),
    ],
)


@WELL_FORMED
def test_well_formed_rows_become_requests(
    content: str, rows: list[tuple[str, str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(content) == 0
    assert variables() == rows
    many = len(rows) > 1
    read = f"{len(rows)} row{'s' if many else ''} read, 0 skipped"
    assert capsys.readouterr() == ("", f"Wrote {len(rows)} request{'s' if many else ''} to out.jsonl ({read})\n")


def random_value(rng: random.Random) -> str:
    alphabets = ["ab", 'a "', "a,;\t", 'a"\n,', "é東\U0001f600\u2028\x85", '{}%\\"\0', "a\r\n"]
    return "".join(rng.choices(rng.choice(alphabets), k=rng.randrange(8)))


def written_as_csv(value: str, rng: random.Random) -> str:
    """The value in quotes where it needs them and now and then where it does not."""
    needed = re.search('[",;\t\r\n]', value)
    return '"' + value.replace('"', '""') + '"' if needed or rng.random() < 0.2 else value


def test_random_well_formed_files_are_read_as_csv_reads_them() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        names = [*gen.COLUMNS, *"xyz"[: rng.randrange(4)]]
        rng.shuffle(names)
        delimiter, newline = rng.choice(",;\t"), rng.choice(["\n", "\r\n", "\r"])
        rows = [{name: random_value(rng) for name in names} for _ in range(rng.randrange(1, 20))]
        for number, row in enumerate(rows):
            row["artist_id"] = f"{number}{row['artist_id']}!"
            row["artist_name"] += "n"
        lines = [names, *([*row.values()] for row in rows)]
        content = "".join(delimiter.join(written_as_csv(value, rng) for value in line) + newline for line in lines)
        read = [*csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter)]
        assert read == rows, seed
        assert convert(content) == 0, seed
        assert variables() == [tuple(row[name].strip() for name in gen.COLUMNS) for row in rows], seed


@pytest.mark.skipif(not TATE.exists(), reason="the real CSV is not beside this checkout")
def test_a_real_file_is_converted_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with TATE.open(newline="", encoding="utf-8-sig") as file:
        expected = [tuple(row[name].strip() for name in gen.COLUMNS) for row in csv.DictReader(file)]
    assert main(["--in", str(TATE), "--out", "out.jsonl", *STORED]) == 0
    assert variables() == expected
    number = len(expected)
    assert capsys.readouterr().err == f"Wrote {number} requests to out.jsonl ({number} rows read, 0 skipped)\n"


# -- CSV: header -------------------------------------------------------------------------------------------------

NAME_THEM = "name the right ones with --id-column and --name-column, or use --skip-header if there is no header"
BAD_HEADERS = pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the CSV is empty; it needs a header and at least one row"),
        ("\n\n , \n", "the CSV is empty; it needs a header and at least one row"),
        ("sep=;\n", "the CSV is empty; it needs a header and at least one row"),
        ("id,name,data\n1,A,x\n",
         f"line 1: the header has no artist_id and no artist_name; its columns are id, name, data; {NAME_THEM}"),
        ("\n\nartist_id;name;Data\n1;A;x\n",
         "line 3: the header has no artist_name; its columns are artist_id, name, Data; "
         f"{NAME_THEM.replace('--id-column and ', '')}"),
        ("sep=;\nartist_id,artist_name,artist_data\n1,A,x\n",
         "line 2: the header has no artist_id and no artist_name; its columns are artist_id,artist_name,artist_data; "
         f"{NAME_THEM}"),
        ('artist_id,artist_name,"artist_data\n1,A,x\n',
         'line 1: the header has a quote too many or too few; its columns are artist_id, artist_name, "artist_data'),
        ("artist_id,artist_name,artist_data,Artist-Name\n1,A,x,B\n",
         'line 1: the header names "artist_name" 2 times; its columns are artist_id, artist_name, artist_data, '
         "Artist-Name"),
    ],
)


@BAD_HEADERS
def test_a_bad_header_ends_the_run(content: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(content) == 1
    assert capsys.readouterr() == ("", f"gen_batch_jsonl.py: error: {message}\n")
    assert not Path("out.jsonl").exists()


def test_skip_header_names_the_columns_by_position(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert('\ufeff\n1,A,"x\ny"\n2,B,z\n', "--skip-header") == 0
    assert variables() == [("1", "A", "x\ny"), ("2", "B", "z")]
    assert capsys.readouterr().err == "Wrote 2 requests to out.jsonl (2 rows read, 0 skipped)\n"


def test_skip_header_counts_lines_from_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert('\n1,A,"x\n2,B,z\n3,,z\n', "--skip-header") == 0
    assert variables() == [("2", "B", "z")]
    assert capsys.readouterr().err.splitlines()[:2] == [
        "gen_batch_jsonl.py: warning: line 2: a quote is never closed (noticed at the end, line 4); row skipped",
        "gen_batch_jsonl.py: warning: line 4: artist_name is empty; row skipped",
    ]


def test_skip_header_takes_a_header_as_one_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("artist_data;artist_id;artist_name\nx;1;A\n", "--skip-header") == 0
    assert variables() == [("1", "A", "x")]
    assert capsys.readouterr().err == (
        "gen_batch_jsonl.py: warning: line 1: names the columns, so it is taken as the header despite --skip-header\n"
        "Wrote 1 request to out.jsonl (1 row read, 0 skipped)\n"
    )


def test_a_nul_in_the_first_row_is_not_taken_for_utf_16() -> None:
    assert convert("1\0,A,x\n", "--skip-header") == 0
    assert variables() == [("1\0", "A", "x")]


# -- CSV: invalid rows -------------------------------------------------------------------------------------------

MISSING = "a value is missing, or has a line break but no quotes around it"
COMMA = "a value with a comma in it needs quotes around it"
# what stands between the rows 1 and 9, the ids of it that are written, and the warnings
MALFORMED = pytest.mark.parametrize(
    ("rows", "written", "warnings"),
    [
        ('2,B,"x"y\n3,C,z\n', ["3"], ["line 3: text after a closing quote (noticed on line 3)"]),
        ('2,"B"" ,x\n3,C,z\n4,"D",z\n', ["3", "4"], ["line 3: text after a closing quote (noticed on line 5)"]),
        ('2,B,"x\n3,C,z\n', ["3"], ["line 3: a quote is never closed (noticed at the end, line 5)"]),
        ('2,B,"x\n3,C,"y"\n4,D,z\n', ["3", "4"], ["line 3: text after a closing quote (noticed on line 4)"]),
        ('2,B,"x\n3,C,"y\n4,D,z\n', ["4"],
         ["line 3: text after a closing quote (noticed on line 4)",
          "line 4: a quote is never closed (noticed at the end, line 6)"]),
        ('2,B,"x\n\n\n3,C,"y"z\n4,D,z\n', ["4"],
         ["line 3: text after a closing quote (noticed on line 6)",
          "line 6: text after a closing quote (noticed on line 6)"]),
        ('2,B,"x\n3,C,"y"\r\n"4",D,"z\n\nz"\n', ["3", "4"],
         ["line 3: text after a closing quote (noticed on line 4)"]),
        ('2,B\n3,C,z,q\n4,D,z\n', ["4"],
         [f'line 3: 2 fields instead of 3 in "2,B"; {MISSING}',
          f'line 4: 4 fields instead of 3 in "3,C,z,q"; {COMMA}']),
        ("2\n", [], [f'line 3: 1 field instead of 3 in "2"; {MISSING}']),
        ("2;B;z\n", [],
         ['line 3: 1 field instead of 3 in "2;B;z"; a semicolon separates its fields, and '
          "a comma those of the header"]),
        ('2,B,C,"x\n3,C,z\n4"\n5,E,z\n', ["3", "5"],
         [f'line 3: 4 fields instead of 3 in "2,B,C,"x"; {COMMA}',
          f'line 5: 1 field instead of 3 in "4""; {MISSING}']),
        ('2,"B\n3,C",x,"y\n4,D",z\n5,E,z\n', ["4", "5"],
         [f'line 3: 5 fields instead of 3 in "2,"B"; {COMMA}',
          f'line 4: 5 fields instead of 3 in "3,C",x,"y"; {COMMA}']),
    ],
)


@MALFORMED
def test_a_malformed_row_costs_itself(rows: str, written: list[str], warnings: list[str]) -> None:
    read = read_records(f"{HEADER}1,A,z\n{rows}9,Z,z\n")
    assert [fields_of(record)[0] for record in read if not record.problem] == ["1", *written, "9"]
    assert [f"line {record.line}: {record.problem.detail}" for record in read if record.problem] == warnings


@MALFORMED
def test_a_malformed_row_is_skipped_with_a_warning(
    rows: str, written: list[str], warnings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(f"{HEADER}1,A,z\n{rows}9,Z,z\n") == 0
    assert [artist_id for artist_id, _, _ in variables()] == ["1", *written, "9"]
    *warned, last = capsys.readouterr().err.splitlines()
    assert warned == [f"gen_batch_jsonl.py: warning: {warning}; row skipped" for warning in warnings]
    assert last.startswith(f"Wrote {len(written) + 2} requests to out.jsonl ({len(written) + 2 + len(warnings)} rows")


INVALID_VALUES = pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (b",B,x", "empty artist_id", "artist_id is empty"),
        (b' ,"\t\xc2\xa0",x', "empty artist_id", "artist_id is empty"),
        (b"2, ,x", "empty artist_name", "artist_name is empty"),
        (b"1,B,x", "duplicate artist_id", 'artist_id "1" was already used on line 2'),
        (b'" 1\n ",B,x', "duplicate artist_id", 'artist_id "1" was already used on line 2'),
        (b"2\xff,B,x", "not valid UTF-8", "artist_id is not valid UTF-8"),
        (b"2,\xed\xa0\x80,x", "not valid UTF-8", "artist_name is not valid UTF-8"),
        (b'2,B,"\xc3"', "not valid UTF-8", "artist_data is not valid UTF-8"),
        (b"1,\\udc80\xc3\xa9,x", "duplicate artist_id", 'artist_id "1" was already used on line 2'),
    ],
)


@INVALID_VALUES
def test_a_row_with_an_invalid_value_is_given_to_the_report(row: bytes, reason: str, detail: str) -> None:
    skipped = gen.SkipReport(gen.Console(None), strict=False, verbose=False)
    template = gen.RequestTemplate([b"", b" ", b"\n"], [0, 1])
    writer = gen.RequestWriter(template, layout(), io.BytesIO(), skipped)
    for record in read_records(f"{HEADER}1,A,x\n".encode() + row):
        writer.write_record(record)
    assert skipped.reasons == {reason: 1}


def offer(row: bytes) -> str:
    """The warning about the only row that is not valid UTF-8."""
    value = next(field for field in row.replace(b'"', b"").split(b",") if not field.isascii())
    try:
        advice = f'if "{value.decode("windows-1252")}" on line 3 looks right, add --encoding windows-1252'
    except UnicodeDecodeError:
        advice = "name the encoding of the CSV with --encoding"
    return f"gen_batch_jsonl.py: warning: 1 row is not valid UTF-8; {gen.escape_controls(advice)}\n"


@INVALID_VALUES
def test_a_row_with_an_invalid_value_is_skipped(
    row: bytes, reason: str, detail: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(HEADER.encode() + b"1,A,x\n" + row + b"\n8,C,x\n") == 0
    assert [artist_id for artist_id, _, _ in variables()] == ["1", "8"]
    assert capsys.readouterr().err == (
        f"gen_batch_jsonl.py: warning: line 3: {detail}; row skipped\n"
        f"{offer(row) if reason == 'not valid UTF-8' else ''}"
        f"Wrote 2 requests to out.jsonl (3 rows read, 1 skipped: 1 {reason})\n"
    )


def test_bytes_that_are_not_utf_8_in_another_column_are_ignored() -> None:
    assert convert(b"artist_id,note\xff,artist_name,artist_data\n1,\xff\xfe,A,x\n") == 0
    assert variables() == [("1", "A", "x")]


def test_an_id_used_by_a_skipped_row_is_still_free() -> None:
    assert convert(f"{HEADER}1,,x\n1,A,y\n") == 0
    assert variables() == [("1", "A", "y")]


def test_a_repeated_id_names_its_line_however_far_back(capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{number},A,{'x' * 100}\n" for number in range(5000))
    assert convert(f"{HEADER}{rows}7,B,\n") == 0
    assert 'line 5002: artist_id "7" was already used on line 9; row skipped\n' in capsys.readouterr().err


def test_a_field_as_long_as_the_api_takes_is_written() -> None:
    longest = "x" * gen.MAX_FIELD_CHARS
    assert gen.MAX_FIELD_CHARS == 10_485_760
    assert convert(f'{HEADER}1,A,{longest}\n2,B,"{longest}"\n') == 0
    assert [data == longest for _, _, data in variables()] == [True, True]


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_longer_field_costs_its_row(quote: str, capsys: pytest.CaptureFixture[str]) -> None:
    longer = "x" * (gen.MAX_FIELD_CHARS + 1)
    assert convert(f"{HEADER}1,A,{quote}{longer}{quote}\n2,B,y\n") == 0
    assert variables() == [("2", "B", "y")]
    assert capsys.readouterr().err == (
        "gen_batch_jsonl.py: warning: line 2: a field exceeds 10485760 characters (noticed on line 2); row skipped\n"
        "Wrote 1 request to out.jsonl (2 rows read, 1 skipped: 1 field too long)\n"
    )


def test_a_quote_never_closed_is_noticed_at_the_longest_field(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{'x' * 999_997},\n"
    assert convert(f'{HEADER}1,A,"y\n{line * 12}2,B,y\n') == 0
    assert variables() == [("2", "B", "y")]
    warned = capsys.readouterr().err.splitlines()
    assert warned[0].endswith("line 2: a field exceeds 10485760 characters (noticed on line 13); row skipped")
    assert f'line 3: 2 fields instead of 3 in "{"x" * 80}…"; {MISSING}; row skipped' in warned[1]
    assert warned[-1].endswith("(14 rows read, 13 skipped: 12 wrong number of fields, 1 field too long)")


def test_a_stray_quote_costs_only_its_own_row() -> None:
    """One fault at a random place of a file whose quoted fields begin with a letter, as names and prose do."""
    words = ["plain", '"quoted"', '"with, comma"', '"say ""so"" twice"', '"two\nlines"', '"three\n\n, lines"']
    for seed in range(120):
        rng = random.Random(seed)
        rows = [f"{number},{rng.choice(words)},{rng.choice(words)}\n" for number in range(12)]
        expected = [tuple(row) for row in csv.reader(io.StringIO("".join(rows), newline=""))]
        damaged = rng.randrange(len(rows))
        row = rows[damaged]
        at = rng.randrange(len(row))
        kind = rng.randrange(4)
        if kind == 0:
            row = row[:at] + '"' + row[at:]
        elif kind == 1:
            row = row[:at] + row[at:].replace('"', "", 1)
        elif kind == 2:
            row = row[:at] + row[at:].replace(",", "", 1)
        else:
            row = row[:at] + "," + row[at:]
        assert convert(HEADER + "".join([*rows[:damaged], row, *rows[damaged + 1 :]])) == 0, seed
        others = [values for values in variables() if values[0] in {str(n) for n in range(12) if n != damaged}]
        assert others == expected[:damaged] + expected[damaged + 1 :], (seed, row)
        assert len(variables()) - len(others) <= 1, (seed, row)


def naive_rows(content: str, width: int, delimiter: str) -> Iterator[tuple[int, str, object]]:
    """What the reader should yield: csv is started anew at the line after each row that fails."""
    lines = io.StringIO(content, newline="").readlines()
    at = 1
    while at < len(lines):
        records = csv.reader(iter(lines[at:]), delimiter=delimiter, strict=True)
        try:
            fields = next(records)
        except csv.Error as error:
            reason = "field too long" if "field larger" in str(error) else "malformed quoting"
            yield at + 1, reason, at + records.line_num
            at += 1
            continue
        if not any(field.strip(gen.BLANKS) for field in fields[width:]):
            fields = fields[:width]
        if not any(field.strip(gen.BLANKS) for field in fields):
            at += records.line_num
        elif len(fields) != width:
            yield at + 1, "wrong number of fields", len(fields)
            at += 1
        else:
            yield at + 1, "", fields
            at += records.line_num


def simplified(record: gen.Record) -> tuple[int, str, object]:
    if record.problem is None:
        return record.line, "", fields_of(record)
    numbers = re.findall(r"(?:on|end,) line (\d+)|^(\d+) field", record.problem.detail)[0]
    return record.line, record.problem.reason, int("".join(numbers))


def random_garbage(rng: random.Random, width: int) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        alphabets = ['a",\n', 'ab",\n ', '",\n', 'a"",,\n\n ']
        return "".join(rng.choices(rng.choice(alphabets), k=rng.randrange(120)))
    if kind == 1:
        pieces = ["a,b,c\n", 'a,"b\n', 'x","y\n', '",z\n', '""', '"', 'a1,"n,d"\n', ",", "\n", 'q",w\n', '"x']
        return "".join(rng.choices([*pieces, '"' + 61 * "l"], k=rng.randrange(25)))
    cells = ["a", '"b"', '"c,d"', '"e""f"', '"g\nh"', '"i\nj,k\nl"']
    if rng.random() < 0.5:
        cells += ['","', '"m', 'n"', '"o"p', 'q"r', "", '"\n', '"s","t\n']
    widths = rng.choices([width, width + 1, width - 1], weights=[5, 1, 1], k=rng.randrange(12))
    return "".join(",".join(rng.choices(cells, k=each)) + "\n" for each in widths)


@pytest.mark.parametrize("delimiter", gen.DELIMITERS)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_garbage_is_read_as_by_restarting_csv_after_every_row_that_fails(delimiter: str, newline: str) -> None:
    for seed in range(80):
        rng = random.Random(f"{seed}{delimiter}{newline}")
        names = [*gen.COLUMNS, *"xyz"[: rng.randrange(4)]]
        rng.shuffle(names)
        body = random_garbage(rng, len(names))
        content = f"{','.join(names)}\n{body}".translate({ord(","): delimiter, ord("\n"): newline})
        expected = [*naive_rows(content, len(names), delimiter)]
        assert [*map(simplified, read_records(content, delimiter, names))] == expected, (seed, body)


def convert_in_blocks(content: str, block_bytes: int, limit: int = sys.maxsize) -> list[Any]:
    """The requests of a CSV that is read in blocks of that size."""
    out = io.BytesIO()
    console = gen.Console(None)
    reader = open_reader(content, block_bytes=block_bytes)
    header = gen.read_header(reader.peek_lines(), gen.COLUMNS)
    assert header is not None
    reader.skip_lines(header.last_line)
    args = gen.build_parser().parse_args([*FILES, *STORED])
    table = gen.Table(header.delimiter, header.names, {name: header.position(name) for name in gen.COLUMNS})
    template, used = gen.build_request(args, table)
    skipped = gen.SkipReport(console, strict=True, verbose=False)
    writer = gen.RequestWriter(template, table.layout(used), out, skipped)
    gen.convert_rows(reader, table.layout(used), writer, limit, lambda: None)
    converted = [json.loads(line) for line in out.getvalue().split(b"\n")[:-1]]
    return [(each["custom_id"], *each["body"]["prompt"]["variables"].values()) for each in converted]


@pytest.mark.parametrize("delimiter", gen.DELIMITERS)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_blocks_of_any_size_are_read_as_csv_reads_them(delimiter: str, newline: str) -> None:
    for seed in range(20):
        rng = random.Random(f"{seed}{delimiter}{newline}")
        rows = [[f"{n}", random_value(rng) + "n", random_value(rng)] for n in range(rng.randrange(1, 25))]
        lines = [[*gen.COLUMNS], *rows]
        written = [delimiter.join(written_as_csv(value, rng) for value in line) for line in lines]
        content = newline.join(written) + rng.choice(["", newline])
        read = [*csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)][1:]
        assert read == rows, seed
        expected = [tuple(value.strip(gen.BLANKS) for value in row) for row in rows]
        for block_bytes in (1, 7, 30, 100, 1 << 17):
            assert convert_in_blocks(content, block_bytes) == expected, (seed, block_bytes)
        assert convert_in_blocks(content, 50, limit=3) == expected[:3], seed


def test_rows_of_a_byte_to_a_megabyte_cross_the_borders_of_blocks() -> None:
    rng = random.Random(11)
    rows = []
    for number, size in enumerate([1, 10, 1000, 131_000, 131_060, 131_072, 262_144, 1_000_000, 5, 3, 999] * 2):
        fill = rng.choice(["x", "é", "東", ",", '"', "\n", "\r\n", 'a,"b"\n'])
        rows.append((str(number), "n", fill.strip() and (fill * size)[:size].strip()))
    text = io.StringIO(newline="")
    csv.writer(text).writerows([gen.COLUMNS, *rows])
    expected = [(number, name, data.strip()) for number, name, data in rows]
    assert convert_in_blocks(text.getvalue(), gen.BLOCK_BYTES) == expected
    assert convert_in_blocks(text.getvalue(), 1000) == expected


def test_a_block_and_its_records_by_themselves_are_read_alike() -> None:
    """Where a block can be read as a whole, every record of it gives the same values and the same line."""
    as_whole = 0
    for seed in range(1000):
        rng = random.Random(seed)
        lines = ([f"{at}", random_value(rng) + "n", random_value(rng)] for at in range(rng.randrange(1, 5)))
        body = "".join(",".join(written_as_csv(value, rng) for value in line) + "\n" for line in lines)
        at = rng.randrange(len(body))
        body = rng.choice([body, body[:at] + rng.choice('",\n\ra') + body[at:], body[:at] + body[at + 1 :]])
        rows = gen.rows_of_block(body.encode(), 2, layout(), sys.maxsize) if body.count('"') % 2 == 0 else None
        if rows is not None and all(rows.columns[0]) and all(rows.columns[1]):
            as_whole += 1
            records = read_records(HEADER + body)
            assert [record.line for record in records] == [*rows.lines], body
            values = [[gen.trim_value(record.fields[column]) for record in records] for column in range(3)]
            assert [[value.translate(gen.REVEAL) for value in column] for column in rows.columns] == values, body
    assert as_whole > 100


@pytest.mark.parametrize(
    "block",
    [
        "1,A,x\n2,B\n3\n4,D,z\n",
        "1,A,x\n2\n3\n",
        "1,A,x\n\n2,B,y\n",
        '1,A,x\n2,B 7" single,y\n3,C 7" single,z\n',
        '1,"A"x,y\n',
        '1,A,"x""\n2,B,"y"\n"',
        "1,A,x\r2,B,y\n",
        "artist_id,artist_name,artist_data\n",
        '"1,2",A,x\n',
    ],
)
def test_a_block_with_anything_odd_is_not_read_as_a_whole(block: str) -> None:
    assert gen.rows_of_block(block.encode(), 1, layout(), sys.maxsize) is None


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("is_last", [True, False])
def test_a_block_that_begins_with_a_quote_never_closed_has_no_end(newline: str, is_last: bool) -> None:
    block = f'"1,A,x{newline}2,B,y{newline}'.encode()
    assert gen.block_end(block, 0, len(block), is_last) == 0


def test_a_quote_never_closed_in_a_long_file_with_cr_line_ends_costs_its_row() -> None:
    rows = [f"{number},A,{'x' * 500}" for number in range(600)]  # more than two blocks
    rows[0] = f'"{rows[0]}'
    assert convert("\r".join([HEADER.strip(), *rows])) == 0
    assert len(variables()) == 599


@pytest.mark.parametrize("block_bytes", [1, 7, 30, 10_000])
@pytest.mark.parametrize(
    ("rows", "reasons"),
    [
        ('a1,A\na2,"bad"x one,B,d\na3,C,c\n', {"wrong number of fields": 1, "malformed quoting": 1}),
        ('a1,"x"y ,B,d\n' * 50 + "a2,B,y\n", {"malformed quoting": 50}),
        ("a1" + ",x" * 60 + ",B,d\na2,B,y\n", {"wrong number of fields": 1}),
        ("a1,A,x\n,,\n , ,\t\na2,B,y\n", {}),
        ("a1,A,x\n,,\n,B,y\n", {"empty artist_id": 1}),
    ],
)
def test_rows_are_skipped_alike_however_the_bytes_arrive(rows: str, reasons: dict[str, int], block_bytes: int) -> None:
    reader = open_reader(HEADER + rows, block_bytes=block_bytes)
    reader.skip_lines(1)
    skipped = gen.SkipReport(gen.Console(None), strict=False, verbose=False)
    writer = gen.RequestWriter(gen.RequestTemplate([b"", b"\n"], [0]), layout(), io.BytesIO(), skipped)
    gen.convert_rows(reader, layout(), writer, sys.maxsize, lambda: None)
    assert skipped.reasons == reasons
    assert writer.written + skipped.reasons.total() == sum(bool(row.strip(", \t")) for row in rows.splitlines())


class Trickle:
    """A file that gives at most so many bytes at a time."""

    def __init__(self, content: bytes, most: int) -> None:
        self._content = io.BytesIO(content)
        self._most = most

    def read1(self, size: int) -> bytes:
        return self._content.read(min(size, self._most))


def outcome_of(content: bytes, most: int, block_bytes: int) -> tuple[Any, ...]:
    """The requests, the warnings and the counts of a CSV that arrives like this."""
    reader = gen.CsvReader(Trickle(content, most), "in.csv", "utf-8", block_bytes)  # type: ignore[arg-type]
    reader.skip_lines(1)
    stderr, out = io.StringIO(), io.BytesIO()
    skipped = gen.SkipReport(gen.Console(stderr), strict=False, verbose=True)
    writer = gen.RequestWriter(gen.RequestTemplate([b"", b"|", b"|", b"\n"], [0, 1, 2]), layout(), out, skipped)
    try:
        gen.convert_rows(reader, layout(), writer, sys.maxsize, lambda: None)
    except gen.CommandError as error:  # a second header
        return (str(error),)
    return out.getvalue(), stderr.getvalue(), skipped.reasons, writer.written, writer.swallowed


def test_random_bytes_give_the_same_however_they_arrive() -> None:
    odd = ['""', "\n", "\n", "\r\n", "\r", "\t", "é", "\xa0", "\u2028", "\\", "\x01", HEADER, "x,y,z\n"]
    facts = ["x", "", "y z", '"q, r"']
    for seed in range(250):
        rng = random.Random(seed)
        sound = "".join(f"a{number},B,{rng.choice(facts)}\n" for number in range(seed % 9))
        noise = "".join(rng.choices([*'ab1,,,,"" ;|', *odd], k=rng.randrange(1, 100)))
        content = (HEADER + sound + noise + sound).encode()
        expected = outcome_of(content, sys.maxsize, 1 << 17)
        for most, block_bytes in ((1, 1), (3, 7), (20, 30), (200, 64), (sys.maxsize, 16)):
            assert outcome_of(content, most, block_bytes) == expected, (seed, most, block_bytes)


def test_blank_rows_below_the_table_are_no_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}a1,A,x\n,,\n,,\n", "--strict", "--limit", "2") == 0
    assert capsys.readouterr().err == "Wrote 1 request to out.jsonl (1 row read, 0 skipped)\n"


def test_a_line_longer_than_a_field_may_be_is_skipped_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}a1,A,{'x,' * 11_000_000}\na2,B,y\na3,C,{'x' * 11_000_000}\na4,D,z\n") == 0
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("Wrote 2 requests to out.jsonl (4 rows read, 2 skipped: ")


@pytest.mark.parametrize(
    ("rows", "count"),
    [(",NewJeans,x\na2,B,y\n", 1), ("a1;X;d;extra\na2;B;y\na3;C;z\n", 2), ("sep=;\na1;X;d;extra\na2;B;y\n", 1)],
)
def test_a_bad_first_row_without_a_header_costs_only_itself(rows: str, count: int) -> None:
    assert convert(rows, "--skip-header") == 0
    assert len(variables()) == count


def test_rows_of_other_widths_that_fit_together_are_not_taken_for_rows() -> None:
    names = [*gen.COLUMNS, "born"]
    assert gen.rows_of_block(b"1,A,x,y\n2,B\n3\n4,D,z,y\n", 1, layout(",", names), sys.maxsize) is None


ALL_BLANKS = [char for char in map(chr, range(0x110000)) if char.isspace() or char in "\u200b\ufeff"]


def test_every_blank_that_strip_knows_is_trimmed() -> None:
    assert {*ALL_BLANKS} == {*gen.BLANKS}
    for delimiter in gen.DELIMITERS:
        rows = [
            (f'"{blank}1{at}{blank}"', f'"A{blank}B {blank}"', f'"{blank} x"') for at, blank in enumerate(ALL_BLANKS)
        ]
        expected = [(f"1{at}", f"A{blank}B", "x") for at, blank in enumerate(ALL_BLANKS)]
        lines = [delimiter.join(row) for row in [gen.COLUMNS, *rows]]
        for block_bytes in (1, 1 << 17):
            assert convert_in_blocks("\n".join(lines), block_bytes) == expected


@pytest.mark.parametrize("blank", [blank for blank in ALL_BLANKS if blank not in "\n\r"])
def test_a_blank_in_a_field_without_quotes_is_trimmed(blank: str) -> None:
    assert convert(f"{HEADER}{blank}1,{blank}A{blank}B{blank},x{blank}{blank}\n") == 0
    assert variables() == [("1", f"A{blank}B", "x")]


STRAY_QUOTES = pytest.mark.parametrize(
    "row",
    [
        '{0},n,"d\n',
        '{0},"n"x,d\n',
        '{0},a","b\n',
        '{0},n,"d""\n',
        '{0},n,e,"d\n","x\n","y"\n',
        '{0},"n","d"",\n',
        '"{0}\n',
        '{0}",{0},n\n{0},n,d\n{0},"n\n',
    ],
)


@STRAY_QUOTES
def test_stray_quotes_cost_work_in_proportion(row: str) -> None:
    """The work is counted in calls, once every record reaches the greatest number of fields."""

    def count_calls(number: int) -> int:
        content = HEADER + "".join(row.format(at) for at in range(number))
        calls = 0

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            read_records(content)
        finally:
            sys.setprofile(None)
        return calls

    assert count_calls(1200) < 5 * count_calls(300)


def test_a_row_with_very_many_fields_costs_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}1,A{',x' * 500}\n2,B,y{',' * 500}\n") == 0
    assert variables() == [("2", "B", "y")]
    assert 'line 2: more than 23 fields instead of 3 in "1,A,x,x,' in capsys.readouterr().err


def test_a_field_is_too_long_where_csv_says_so() -> None:
    before = csv.field_size_limit(60)
    try:
        for seed in range(500):
            content = random_garbage(random.Random(seed), 3) + "x"
            records = csv.reader(io.StringIO(content, newline=""), strict=True)
            parsed = gen.parse_record(content.encode(), 0, 1, layout(), max_chars=60)
            try:
                fields = next(records)
                assert not parsed.problem and [field.decode() for field in parsed.fields] == (fields or [""]), seed
            except csv.Error as error:
                assert parsed.problem, seed
                assert (parsed.problem.reason == "field too long") == ("field larger" in str(error)), seed
                assert f"line {records.line_num})" in parsed.problem.detail, seed
    finally:
        csv.field_size_limit(before)


def test_rows_that_cannot_be_written_leave_the_rest_of_their_block(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f'{HEADER}1,A,x\n2,"B, C",x\n,D,x\n1,E,x\n3, ,x\n4,F,"x\ny"\n2,G,x\n5,H,x\n') == 0
    assert [artist_id for artist_id, _, _ in variables()] == ["1", "2", "4", "5"]
    *warned, last = capsys.readouterr().err.splitlines()
    assert [warning.removeprefix("gen_batch_jsonl.py: warning: ") for warning in warned] == [
        "line 4: artist_id is empty; row skipped",
        'line 5: artist_id "1" was already used on line 2; row skipped',
        "line 6: artist_name is empty; row skipped",
        'line 9: artist_id "2" was already used on line 3; row skipped',
    ]
    assert last.startswith("Wrote 4 requests to out.jsonl (8 rows read, 4 skipped: ")


def test_an_id_is_the_same_in_a_block_and_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    odd = '7,A 7" single,x\n'
    assert convert(f'{HEADER}"a,""\n1",A,x\n{odd}"a,""\n1",B,x\nb,C,x\n') == 0
    assert [artist_id for artist_id, _, _ in variables()] == ['a,"\n1', "7", "b"]
    assert 'line 5: artist_id "a,"\\n1" was already used on line 2; row skipped' in capsys.readouterr().err


SWALLOWING = pytest.mark.parametrize(
    ("rows", "swallowed", "warnings"),
    [
        ('a1,A,"x\na2,B,y\na3,C,z"\n', {2: [3, 4]},
         ["line 2: a quoted field holds lines 3, 4, which look like rows; check the quotes on line 2"]),
        ('a1,A,"x\nborn in 1950\na30,C,z"\n', {2: [4]},
         ["line 2: a quoted field holds line 4, which looks like a row; check the quotes on line 2"]),
        ('7,A,x\n8,"B\n9,C"",y\n10,D"",z\n",x\n', {3: [4, 5]},
         ["line 3: a quoted field holds lines 4, 5, which look like rows; check the quotes on line 3"]),
        ('a1,A,"Born in Leeds, lives in York, paints\nSculptor, painter, teacher"\n', {}, []),
        ('a1,A,"x\nsculptor,painter,teacher"\n', {}, []),
        ('a1,A,"x\na2,B"\n', {}, []),
        ('a1,A,"x\na2, B, y"\n', {2: [3]},
         ["line 2: a quoted field holds line 3, which looks like a row; check the quotes on line 2"]),
        ('ab,A,"x\ncd, B, y"\n', {}, []),
        ('1930,A,"x\n1999, Berlin, y"\n', {}, []),
        ('a1,A,"x\n\n\ny"\n', {}, []),
    ],
)


@SWALLOWING
def test_lines_that_look_like_rows_are_noted(
    rows: str, swallowed: dict[int, list[int]], warnings: list[str]
) -> None:
    block = gen.rows_of_block(rows.encode(), 2, layout(), sys.maxsize)
    assert block is not None and block.swallowed == swallowed
    found = {record.line: lines_like_rows(record) for record in read_records(HEADER + rows)}
    assert {line: held for line, held in found.items() if held} == swallowed


def lines_like_rows(record: gen.Record) -> list[int]:
    return gen.lines_like_rows(b",".join(record.fields), record.line, record.fields[0], layout())


@SWALLOWING
def test_swallowed_rows_draw_a_warning_and_are_kept(
    rows: str, swallowed: dict[int, list[int]], warnings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(HEADER + rows) == 0
    *warned, last = capsys.readouterr().err.splitlines()
    assert warned == [f"gen_batch_jsonl.py: warning: {warning}" for warning in warnings]
    assert last.endswith(" 0 skipped)")


def test_many_swallowed_rows_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f'{2 * n},A,"x\n{2 * n + 1},B,y"\n' for n in range(23))
    assert convert(HEADER + rows) == 0
    *warned, summed, _ = capsys.readouterr().err.splitlines()
    assert len(warned) == 20
    assert summed == "gen_batch_jsonl.py: warning: 3 more quoted fields hold lines that look like rows"


# -- CSV: files as people have them ------------------------------------------------------------------------------

NO_DATA = (
    "gen_batch_jsonl.py: warning: the CSV has no artist_data column, so artist_data is empty in every request; "
    "if another column holds the data, name it with --data-column"
)


@pytest.mark.parametrize(
    "header",
    [
        "Artist ID,Artist Name,Artist Data",
        "ARTIST-ID,artist - name, Artist_DATA\u200b",
        "\ufeff\ufeffartist id,artist  name,artist\u00a0data",
        '"Artist ID","ARTIST_NAME","artist-data"',
    ],
)
def test_names_of_columns_are_compared_loosely(header: str) -> None:
    assert convert(f"{header}\n1,A,x\n") == 0
    assert variables() == [("1", "A", "x")]


@pytest.mark.parametrize("sep", ["sep=;", "SEP=;", '"sep=;"', "sep=;;;", "\ufeffsep=;"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_line_of_excel_tells_the_delimiter(sep: str, newline: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(newline.join([sep, "artist_id;artist_name;artist_data", "1;A, B;x", "2;;y"])) == 0
    assert variables() == [("1", "A, B", "x")]
    assert "line 4: artist_name is empty" in capsys.readouterr().err


@pytest.mark.parametrize("delimiter", gen.DELIMITERS)
def test_a_header_may_be_separated_by(delimiter: str) -> None:
    assert convert(f"{HEADER}1,A,x\n".replace(",", delimiter)) == 0
    assert variables() == [("1", "A", "x")]


@pytest.mark.parametrize("delimiter", gen.DELIMITERS)
def test_a_file_without_a_header_may_be_separated_by(delimiter: str) -> None:
    assert convert(delimiter.join(["1", "A", "x"]) + "\n", "--skip-header") == 0
    assert variables() == [("1", "A", "x")]


def test_options_name_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--id-column", "ID", "--name-column", "stage name", "--data-column", "Bio-Facts")
    assert convert("id,Stage_Name,bio facts,artist_name\n1,A,x,other\n", *options) == 0
    assert variables() == [("1", "A", "x")]
    assert capsys.readouterr().err == "Wrote 1 request to out.jsonl (1 row read, 0 skipped)\n"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--id-column", "nr"), 'has no column "nr"'),
        (("--name-column", "born"), 'names "born" 2 times'),
        (("--data-column", "facts"), 'has no column "facts"'),
    ],
)
def test_an_option_that_names_no_single_column_ends_the_run(
    options: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("artist_id,artist_name,artist_data,born,Born,\n1,A,x,,,\n", *options) == 1
    assert capsys.readouterr().err == (
        f"gen_batch_jsonl.py: error: line 1: the header {problem}; "
        "its columns are artist_id, artist_name, artist_data, born, Born\n"
    )


def test_a_file_without_data_is_converted_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("artist_id,artist_name\n1,A\n") == 0
    assert variables() == [("1", "A", "")]
    assert capsys.readouterr().err == f"{NO_DATA}\nWrote 1 request to out.jsonl (1 row read, 0 skipped)\n"


def test_where_a_template_would_help_the_warning_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("artist_id,artist_name,born\n1,A,1960\n") == 0
    assert capsys.readouterr().err.splitlines()[0] == (
        f"{NO_DATA}; a stored prompt receives only the name and data; a template (--prompt-file) can use every column"
    )
    write("prompt.md", "{{artist_name}} {{artist_data}} {{born}}")
    assert main([*FILES, *TEMPLATE_ARGS]) == 0
    assert capsys.readouterr().err.splitlines()[0] == NO_DATA
    assert requests()[0]["body"]["input"] == "A  1960"


def test_blank_fields_past_the_header_are_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f'{HEADER}1,A,x,,,\n2,B,y, ,"\n"\n3,C,z,,,!\n') == 0
    assert variables() == [("1", "A", "x"), ("2", "B", "y")]
    assert f'line 5: 6 fields instead of 3 in "3,C,z,,,!"; {COMMA}' in capsys.readouterr().err


@pytest.mark.parametrize("again", ["artist_id,artist_name,artist_data", ' Artist ID,"ARTIST-NAME",artist_data,,'])
@pytest.mark.parametrize("options", [(), ("--strict",), ("--limit", "2")])
def test_a_repeated_header_is_skipped(
    again: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(f"{HEADER}1,A,x\n{again}\n2,B,y\n", *options) == 0
    assert variables() == [("1", "A", "x"), ("2", "B", "y")]
    assert capsys.readouterr().err == (
        "gen_batch_jsonl.py: warning: line 3: repeats the header; row skipped\n"
        "Wrote 2 requests to out.jsonl (3 rows read, 1 skipped: 1 repeated header)\n"
    )


def test_an_artist_with_the_name_of_a_column_is_an_artist() -> None:
    assert convert(f"{HEADER}artist_id,Artist ID,artist_data\nartist-id-7,artist_name,artist_data\n") == 0
    assert variables() == [
        ("artist_id", "Artist ID", "artist_data"), ("artist-id-7", "artist_name", "artist_data"),
    ]


@pytest.mark.parametrize("again", ["artist_name,artist_id,artist_data", "artist_id,artist_data,artist_name"])
def test_a_header_in_another_order_ends_the_run(again: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}1,A,x\n{again}\nB,2,y\n") == 1
    assert capsys.readouterr().err == (
        "gen_batch_jsonl.py: error: line 3: a second header that differs from the first; "
        "split the file before this line and convert the parts one by one\n"
    )


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\x03\x04\x14\0\x06\0\x08\0", "an Excel workbook or another zip file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook"),
        (b"\x1f\x8b\x08\0", "a gzip file"),
        (b"\xfd7zXZ\0", "an xz file"),
        (b"%PDF-1.7\n", "a PDF file"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--skip-header",), ("--encoding", "windows-1252")])
def test_a_file_that_is_no_csv_is_refused(
    content: bytes, kind: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(content, *options) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"gen_batch_jsonl.py: error: in.csv is {kind}; ")


def test_names_that_read_like_a_null_are_kept_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}1,NaN,x\n2, #N/A ,x\n3,A,NULL\n4,\"NaN\",x\n5,\\N,x\n6,,x\n") == 0
    assert [name for _, name, _ in variables()] == ["NaN", "#N/A", "A", "NaN", "\\N"]
    assert capsys.readouterr().err.splitlines()[1] == (
        "gen_batch_jsonl.py: warning: 4 names look like empty cells: NaN (2), #N/A (1), \\N (1); "
        "the requests were written anyway"
    )


# -- CSV: encodings ----------------------------------------------------------------------------------------------

FOREIGN = f"{HEADER}1,Björk,Reykjavík\n2,Café Tacvba,“rock”\n"
FOREIGN_VARIABLES = [("1", "Björk", "Reykjavík"), ("2", "Café Tacvba", "“rock”")]


@pytest.mark.parametrize(
    ("codec", "option"),
    [
        ("windows-1252", "windows-1252"), ("cp1252", "CP1252"), ("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be"),
        ("utf-8", "UTF8"), ("utf-8-sig", "ascii"), ("utf-16", "utf-8"), ("utf-32", "windows-1252"), ("utf-7", "utf-7"),
        ("gb18030", "gb18030"), ("mac-roman", "macintosh"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_file_in_its_encoding_is_read(
    codec: str, option: str, newline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(FOREIGN.replace("\n", newline).encode(codec), "--encoding", option) == 0
    assert variables() == FOREIGN_VARIABLES
    assert capsys.readouterr().err == "Wrote 2 requests to out.jsonl (2 rows read, 0 skipped)\n"


def test_characters_may_be_cut_by_the_borders_of_blocks() -> None:
    for codec in ("utf-16", "utf-32", "gb18030", "shift_jis"):
        reader = open_reader((HEADER + "1,東京,日本\n" * 50).encode(codec), encoding=codec, block_bytes=3)
        next(reader.peek_lines())
        reader.skip_lines(1)
        records = reader.records(layout(), sys.maxsize)
        assert [fields_of(record) for record in records] == [["1", "東京", "日本"]] * 50


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("options", [(), ("--skip-header",), ("--encoding", "windows-1252")])
def test_utf_16_without_a_mark_is_refused_with_advice(
    codec: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(FOREIGN.encode(codec), *options) == 1
    assert capsys.readouterr().err == (
        f"gen_batch_jsonl.py: error: in.csv looks like UTF-16; if it is, add --encoding {codec}\n"
    )


@pytest.mark.parametrize("option", ["--name-column", "--data-column"])
def test_a_header_in_another_encoding_is_told(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = "artist_id,artist_name,Künstler\n1,A,x\n".encode("windows-1252")
    assert convert(content, option, "Künstler") == 1
    assert capsys.readouterr().err == (
        'gen_batch_jsonl.py: error: line 1: the header has no column "Künstler"; its columns are artist_id, '
        "artist_name, K\\udcfcnstler (read in the wrong encoding; name the right one with --encoding)\n"
    )
    write("prompt.md", "{{artist_name}} {{Künstler}}")
    assert main([*FILES, "--prompt-file", "prompt.md", "--model", "m"]) == 1
    assert "K\\udcfcnstler (read in the wrong encoding; " in capsys.readouterr().err


def test_a_file_in_another_encoding_is_refused_with_an_offer(capsys: pytest.CaptureFixture[str]) -> None:
    write("out.jsonl", "old")
    rows = "".join(f"{number},A,x\n" for number in range(3, 30))
    assert convert(FOREIGN.encode("windows-1252") + rows.encode()) == 1
    assert capsys.readouterr().err == (
        "gen_batch_jsonl.py: warning: line 2: artist_name is not valid UTF-8; row skipped\n"
        "gen_batch_jsonl.py: warning: line 3: artist_name is not valid UTF-8; row skipped\n"
        "gen_batch_jsonl.py: error: 2 of 29 rows are not valid UTF-8, so the CSV has another encoding; "
        'if "Björk" on line 2 looks right, add --encoding windows-1252\n'
    )
    assert Path("out.jsonl").read_text() == "old"


@pytest.mark.parametrize(("valid", "code"), [(38, 0), (37, 1)])
def test_the_encoding_is_another_where_more_than_a_twentieth_of_the_rows_is_not_valid(valid: int, code: int) -> None:
    rows = "".join(f"{number},A,x\n" for number in range(3, valid + 3))
    assert convert(FOREIGN.encode("windows-1252") + rows.encode()) == code


def test_a_row_that_is_not_valid_in_an_encoding_that_was_named_gets_no_offer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = f"{HEADER}1,Bj\x81rk,x\n2,A,y\n".encode("latin-1")
    assert convert(content, "--encoding", "windows-1252") == 0
    assert variables() == [("2", "A", "y")]
    assert capsys.readouterr().err == (
        "gen_batch_jsonl.py: warning: line 2: artist_name is not valid windows-1252; row skipped\n"
        "gen_batch_jsonl.py: warning: 1 row is not valid windows-1252; name the encoding of the CSV with --encoding\n"
        "Wrote 1 request to out.jsonl (2 rows read, 1 skipped: 1 not valid windows-1252)\n"
    )


def test_strict_names_the_option_for_the_encoding(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(FOREIGN.encode("windows-1252"), "--strict") == 1
    assert capsys.readouterr().err == (
        "gen_batch_jsonl.py: error: line 2: artist_name is not valid UTF-8; "
        'if "Björk" on line 2 looks right, add --encoding windows-1252\n'
    )


@pytest.mark.parametrize("name", ["no-such", "base64", "undefined", "\0", "rot13", ""])
def test_an_unknown_encoding_exits_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        convert(FOREIGN, "--encoding", name)
    assert ended.value.code == 2
    assert "argument --encoding: not an encoding that Python knows" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["idna", "punycode", "unicode_escape", "utf-7", "cp037", "iso2022_jp"])
def test_an_unsuitable_encoding_ends_the_run_without_a_traceback(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(FOREIGN, "--encoding", name) in (0, 1)
    assert capsys.readouterr().err.splitlines()[-1].startswith(("gen_batch_jsonl.py: error: ", "Wrote "))


# -- files -------------------------------------------------------------------------------------------------------


def test_the_current_directory_holds_the_output_and_nothing_else() -> None:
    assert convert(f"{HEADER}1,A,x\n") == 0
    assert sorted(os.listdir()) == ["in.csv", "out.jsonl"]


def test_missing_parent_directories_are_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--in", str(SAMPLE), "--out", "new dir/é/out.jsonl", *STORED]) == 0
    assert len(requests("new dir/é/out.jsonl")) == 3
    assert capsys.readouterr().err == "Wrote 3 requests to new dir/é/out.jsonl (3 rows read, 0 skipped)\n"


def test_a_new_file_has_the_permissions_of_the_umask() -> None:
    before = os.umask(0o027)
    try:
        assert convert(f"{HEADER}1,A,x\n") == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("out.jsonl").st_mode) == 0o640


def test_an_existing_file_keeps_its_permissions() -> None:
    write("out.jsonl", "old").chmod(0o604)
    assert convert(f"{HEADER}1,A,x\n") == 0
    assert stat.S_IMODE(os.stat("out.jsonl").st_mode) == 0o604


@pytest.mark.parametrize("exists", [True, False])
def test_a_symlink_is_followed(exists: bool) -> None:
    Path("there").mkdir()
    if exists:
        write("there/real.jsonl", "old")
    Path("out.jsonl").symlink_to("there/real.jsonl")
    assert convert(f"{HEADER}1,A,x\n") == 0
    assert Path("out.jsonl").is_symlink()
    assert len(requests("there/real.jsonl")) == 1
    assert os.listdir("there") == ["real.jsonl"]


def test_after_a_failure_the_old_file_is_as_it_was() -> None:
    write("out.jsonl", "old")
    assert convert(f"{HEADER}{'1,A,x' + 9000 * 'y'}\n" + "2,,x\n" * 3000, "--strict") == 1
    assert Path("out.jsonl").read_text() == "old"
    assert sorted(os.listdir()) == ["in.csv", "out.jsonl"]


@pytest.mark.parametrize(
    ("source", "message"),
    [("missing.csv", "cannot read missing.csv: No such file or directory"), (".", "cannot read .: Is a directory")],
)
def test_an_input_that_cannot_be_read_is_named(
    source: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--in", source, "--out", "out.jsonl", *STORED]) == 1
    assert capsys.readouterr() == ("", f"gen_batch_jsonl.py: error: {message}\n")


@pytest.mark.parametrize(
    ("destination", "message"),
    [
        (".", "cannot write .: Is a directory"),
        ("in.csv/out.jsonl", "cannot write in.csv/out.jsonl: Not a directory"),
        ("/dev/full", "cannot write /dev/full: No space left on device"),
        ("/proc/no/out.jsonl", "cannot write /proc/no/out.jsonl: No such file or directory"),
    ],
)
def test_an_output_that_cannot_be_written_is_named(
    destination: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("in.csv", f"{HEADER}1,A,x\n")
    assert main(["--in", "in.csv", "--out", destination, *STORED]) == 1
    assert capsys.readouterr() == ("", f"gen_batch_jsonl.py: error: {message}\n")


def test_an_error_of_reading_is_not_blamed_on_the_output() -> None:
    class Failing(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            if self.tell() > len(HEADER):
                raise OSError(errno.EIO, "Input/output error")
            return super().read1(size)

    reader = gen.CsvReader(Failing(f"{HEADER}1,A,x\n".encode()), "in.csv", "utf-8")  # type: ignore[arg-type]
    with (
        pytest.raises(gen.CommandError, match=r"^cannot read in\.csv: Input/output error$"),
        gen.open_output("out.jsonl") as out,
    ):
        reader.skip_lines(2)
        out.write(b"{}")
        reader.is_at_end()
    assert os.listdir() == []


def test_stdin_and_stdout_are_dashes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for source, destination in [("-", "-"), ("/dev/stdin", "/dev/stdout")]:
        feed_stdin(monkeypatch, f"{HEADER}1,A,x\n")
        assert main(["--in", source, "--out", destination, *STORED]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["custom_id"] == "1"
        assert err == "Wrote 1 request to stdout (1 row read, 0 skipped)\n"


def test_what_was_written_to_stdout_before_a_failure_stays(capsys: pytest.CaptureFixture[str]) -> None:
    write("in.csv", f"{HEADER}1,A,{'x' * 300_000}\n2,,x\n")  # more than a block
    assert main(["--in", "in.csv", "--out", "-", *STORED, "--strict"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["custom_id"] == "1"
    assert err == "gen_batch_jsonl.py: error: line 3: artist_name is empty; without --strict the row is skipped\n"


def test_fifos_are_read_and_written() -> None:
    os.mkfifo("in.fifo")
    os.mkfifo("out.fifo")
    feeder = threading.Thread(target=write, args=("in.fifo", f"{HEADER}1,A,x\n"))
    feeder.start()
    with subprocess.Popen([sys.executable, ROOT / SCRIPT, "--in", "in.fifo", "--out", "out.fifo", *STORED],
                          stderr=subprocess.DEVNULL) as process:
        assert variables("out.fifo") == [("1", "A", "x")]
    feeder.join()
    assert process.returncode == 0
    assert stat.S_ISFIFO(os.stat("out.fifo").st_mode)


def test_a_pause_of_whoever_writes_to_stdin_is_not_the_end() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    command = [sys.executable, str(ROOT / SCRIPT), "--in", "-", "--out", "out.jsonl", *STORED]
    with subprocess.Popen(command, stdin=reader, stderr=subprocess.DEVNULL) as process, open(writer, "w") as text:
        text.write(f"{HEADER}1,A,x\n")
        text.flush()
        time.sleep(0.4)
        text.write("2,B,y\n")
    assert [artist_id for artist_id, _, _ in variables()] == ["1", "2"]
    assert process.returncode == 0


def test_a_symlink_to_itself_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.jsonl").symlink_to("out.jsonl")
    assert convert(f"{HEADER}1,A,x\n") == 1
    error = "gen_batch_jsonl.py: error: cannot write out.jsonl: Too many levels of symbolic links\n"
    assert capsys.readouterr().err == error
    assert sorted(os.listdir()) == ["in.csv", "out.jsonl"]


# -- requests ----------------------------------------------------------------------------------------------------

TEMPLATE = "Write about {{artist_name}}.\nFacts: {{ artist_data }}\n"
TEMPLATE_ARGS = ("--prompt-file", "prompt.md", "--model", "m")


@pytest.fixture
def template(work: Path) -> Path:
    return write("prompt.md", TEMPLATE)


def only_line(*options: str, content: str = f"{HEADER}a1,NewJeans,x\n") -> str:
    """The one line that main writes for a CSV of one row."""
    write("in.csv", content)
    assert main([*FILES, *options]) == 0
    [line] = Path("out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return line


def test_the_sample_becomes_these_bytes() -> None:
    assert main(["--in", str(SAMPLE), "--out", "out.jsonl", "--prompt-id", "bio_gen", "--prompt-version", "v1.0"]) == 0
    prompt = '{"prompt": {"id": "bio_gen", "version": "v1.0", "variables"'
    begin = f'"method": "POST", "url": "/v1/responses", "body": {prompt}'
    assert Path("out.jsonl").read_bytes().decode() == (
        f'{{"custom_id": "a1", {begin}: {{"artist_name": "NewJeans", '
        """"artist_data": "K-pop group; ADOR; 'Supernatural' era"}}}}\n"""
        f'{{"custom_id": "a2", {begin}: {{"artist_name": "Stereolab", '
        r'"artist_data": "Franco-UK post-rock; \"Dots and Loops\""}}}}' "\n"
        f'{{"custom_id": "a3", {begin}: {{"artist_name": "Perfume", '
        r""""artist_data": "Japanese technopop trio\nKnown for 'love the world'"}}}}""" "\n"
    )


@pytest.mark.parametrize(
    ("options", "body"),
    [
        (("--prompt-id", "p"),
         '{"prompt": {"id": "p", "variables": {"artist_name": "NewJeans", "artist_data": "x"}}}'),
        (("--prompt-id", "p", "--prompt-version", "2"),
         '{"prompt": {"id": "p", "version": "2", "variables": {"artist_name": "NewJeans", "artist_data": "x"}}}'),
        (("--prompt-id", "p", "--model", "M"),
         '{"model": "M", "prompt": {"id": "p", "variables": {"artist_name": "NewJeans", "artist_data": "x"}}}'),
        (("--prompt-id", "p", "--body-file", "body.json"),
         '{"prompt": {"id": "p", "variables": {"artist_name": "NewJeans", "artist_data": "x"}}, '
         '"z": 1, "input": "100%", "a": {"b": [null, 1.5]}}'),
        (("--prompt-file", "prompt.md", "--model", "M"),
         r'{"model": "M", "input": "Write about NewJeans.\nFacts: x\n", "metadata": {"artist_name": "NewJeans"}}'),
        (("--prompt-file", "prompt.md", "--model", "M", "--instructions-file", "instructions.txt"),
         r'{"model": "M", "instructions": "Be {{brief}} \"\\\"", "input": "Write about NewJeans.\nFacts: x\n", '
         '"metadata": {"artist_name": "NewJeans"}}'),
        (("--prompt-file", "prompt.md", "--model", "M", "--endpoint", "/v1/chat/completions"),
         r'{"model": "M", "messages": [{"role": "user", "content": "Write about NewJeans.\nFacts: x\n"}]}'),
        (("--prompt-file", "prompt.md", "--model", "M", "--endpoint", "/v1/chat/completions", "--instructions-file",
          "instructions.txt", "--body-file", "body.json"),
         r'{"model": "M", "messages": [{"role": "system", "content": "Be {{brief}} \"\\\""}, '
         r'{"role": "user", "content": "Write about NewJeans.\nFacts: x\n"}], '
         '"z": 1, "input": "100%", "a": {"b": [null, 1.5]}}'),
    ],
)
@pytest.mark.usefixtures("template")
def test_the_body_is_exactly(options: tuple[str, ...], body: str) -> None:
    write("instructions.txt", '\ufeffBe {{brief}} "\\"')
    write("body.json", '{"z": 1, "input": "100%", "a": {"b": [null, 1.5]}}')
    url = "/v1/chat/completions" if "--endpoint" in options else "/v1/responses"
    assert only_line(*options) == f'{{"custom_id": "a1", "method": "POST", "url": "{url}", "body": {body}}}'


STRANGE_VALUES = pytest.mark.parametrize(
    "value",
    [
        "{{artist_data}} {{artist_name}} {{ other }} {{{",
        "100% %s %(x)s %%",
        'say "so"',
        "C:\\new \\u0041 \\",
        "a\nb\r\nc\td",
        "".join(map(chr, range(1, 32))) + "x\x7f",
        "line\u2028paragraph\u2029next\x85end",
        "\\\u2028",
        "\U0001f600 👩‍👩‍👧 é 東京 \ufffe",
        "nul\0nul",
        "\ufeffmark",
        "</script>&amp;",
        "0123456789abcdef" * 4,
    ],
)


@STRANGE_VALUES
@pytest.mark.parametrize("prompt", ["stored", "template"])
def test_a_value_is_written_as_it_is(value: str, prompt: str) -> None:
    write("prompt.md", TEMPLATE)
    text = io.StringIO(newline="")
    rows = [("1", f"<{value}>", "x"), ("2", "B", f"<{value}>"), (f"<{value}>", "C", "y")]
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([gen.COLUMNS, *rows])
    write("in.csv", text.getvalue())
    assert main([*FILES, *(STORED if prompt == "stored" else TEMPLATE_ARGS)]) == 0
    check_rendered(Path("out.jsonl").read_bytes(), rows, prompt)


def check_rendered(lines: bytes, rows: Sequence[tuple[str, str, str]], prompt: str) -> None:
    """Compare the requests with their rows, and that no reader of text would cut a line."""
    text = lines.decode()
    assert len(text.splitlines()) == text.count("\n") == len(rows)
    for line, (artist_id, name, facts) in zip(text.splitlines(), rows, strict=True):
        request = json.loads(line)
        assert request["custom_id"] == artist_id
        if prompt == "stored":
            assert request["body"]["prompt"]["variables"] == {"artist_name": name, "artist_data": facts}
        else:
            assert request["body"]["input"] == f"Write about {name}.\nFacts: {facts}\n"
            assert request["body"]["metadata"] == {"artist_name": name}
        escaped = json.dumps(request, ensure_ascii=False)
        for separator in "\u2028\u2029\x85":
            escaped = escaped.replace(separator, f"\\u{ord(separator):04x}")
        assert line == escaped


def test_text_that_is_not_ascii_is_written_as_is() -> None:
    assert '"artist_name": "Björk 東"' in only_line("--prompt-id", "p", content=f"{HEADER}1,Björk 東,x\n")


@pytest.mark.parametrize("length", [511, 512, 513, 2000])
def test_the_metadata_is_cut_to_what_the_api_takes(length: int) -> None:
    write("prompt.md", TEMPLATE)
    name = ("\U0001f600é\\" * 700)[:length]
    body = json.loads(only_line(*TEMPLATE_ARGS, content=f"{HEADER}1,{name},x\n"))["body"]
    assert body["metadata"] == {"artist_name": name[:512]}
    assert name in body["input"]


def test_a_template_can_use_every_column() -> None:
    write("prompt.md", "{{artist_name}} ({{artist_id}}), {{ Place-of-Birth }}: {{artist_data}}{{born}}{{country}}")
    rows = '1,A,"{{born}} ""x""",Reykjavík,1965,"Iceland, \t\\"\n2,B,,,,\n'
    content = f"artist_id,artist_name,artist_data,Place of birth,born,country,\n{rows.replace(chr(10), ',' + chr(10))}"
    write("in.csv", content)
    assert main([*FILES, *TEMPLATE_ARGS]) == 0
    assert [request["body"]["input"] for request in requests()] == [
        'A (1), Reykjavík: {{born}} "x"1965Iceland, \t\\', "B (2), : ",
    ]


def test_the_column_that_an_option_names_may_stand_in_the_template() -> None:
    write("in.csv", "id,Künstler,artist_name\n1,A,other\n")
    write("prompt.md", "{{ künstler }}")
    assert main([*FILES, *TEMPLATE_ARGS, "--id-column", "ID", "--name-column", "KÜNSTLER"]) == 0
    assert requests()[0]["body"] == {"model": "m", "input": "A", "metadata": {"artist_name": "A"}}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{{artist_name}}", "N"),
        ("{{  artist_name\t}}{{artist_name}}", "NN"),
        ("{{{artist_name}}} {artist_data} { {artist_data}}", "{N} {artist_data} { {artist_data}}"),
        ("{{artist_name}} } }} {{ {", "N } }} {{ {"),
        ("100% of {{artist_name}}'s %s \\ \" \u2028", "100% of N's %s \\ \" \u2028"),
        ("\ufeff{{artist_name}}\r\n{{artist_data}}\r\n", "N\r\nD\r\n"),
    ],
)
def test_placeholders_are_replaced_by_the_values(text: str, filled: str) -> None:
    write("prompt.md", text)
    line = only_line(*TEMPLATE_ARGS, content=f"{HEADER}1,N,D\n")
    assert json.loads(line)["body"]["input"] == filled


LISTED = "the columns are artist_id, artist_name, artist_data, born, Born, country"
BAD_TEMPLATES = pytest.mark.parametrize(
    ("text", "message"),
    [
        ("For {{artist_name}}\n\n{{ name }}",
         f"prompt.md line 3: the placeholder {{{{ name }}}} names no column; {LISTED}"),
        ("{{artist_name}} {{}}", f"prompt.md line 1: the placeholder {{{{}}}} names no column; {LISTED}"),
        ("{{artist_name}} {{a\nb}}", f"prompt.md line 1: the placeholder {{{{a\\nb}}}} names no column; {LISTED}"),
        ("{{artist_name}} {{ BORN }}",
         f"prompt.md line 1: the placeholder {{{{ BORN }}}} names 2 columns; rename one of them in the CSV; {LISTED}"),
        ("Facts: {{artist_data}}",
         "prompt.md: the template has no {{artist_name}}, so no prompt would name its artist"),
        ("", "prompt.md: the template has no {{artist_name}}, so no prompt would name its artist"),
    ],
)


@BAD_TEMPLATES
def test_a_bad_template_is_refused(text: str, message: str) -> None:
    roles = {role: at for at, role in enumerate(gen.COLUMNS)}
    table = gen.Table(",", [*gen.COLUMNS, "born", "Born", "", "country"], roles)
    with pytest.raises(gen.CommandError) as error:
        gen.fill_placeholders(text, "prompt.md", table, str)
    assert gen.escape_controls(str(error.value)) == message


@BAD_TEMPLATES
def test_a_bad_template_ends_the_run(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("prompt.md", text)
    write("in.csv", "artist_id,artist_name,artist_data,born,Born,,country\n1,A,x,1,2,,3\n")
    assert main([*FILES, *TEMPLATE_ARGS]) == 1
    assert capsys.readouterr() == ("", f"gen_batch_jsonl.py: error: {message}\n")
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize("option", ["--prompt-file", "--instructions-file", "--body-file"])
@pytest.mark.usefixtures("template")
def test_a_text_file_that_is_missing_or_not_utf_8_ends_the_run(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("in.csv", f"{HEADER}1,A,x\n")
    write("bad", b"ab\xff")
    assert main([*FILES, *TEMPLATE_ARGS, option, "bad"]) == 1
    assert capsys.readouterr().err == (
        "gen_batch_jsonl.py: error: bad: not valid UTF-8 (byte 3); save it as UTF-8\n"
    )
    assert main([*FILES, *TEMPLATE_ARGS, option, "no"]) == 1
    assert capsys.readouterr().err == "gen_batch_jsonl.py: error: cannot read no: No such file or directory\n"


BAD_BODY_FILES = pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "body.json: not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        ('{"a": NaN}', "body.json: not valid JSON: NaN is not allowed"),
        ('{"a": -Infinity}', "body.json: not valid JSON: -Infinity is not allowed"),
        ("[1]", 'body.json: not a JSON object; write the fields as {"max_output_tokens": 400, ...}'),
        ('{"model": "x"}', 'body.json: the field "model" does not belong here; name the model with --model'),
        ('{"prompt": 1}', 'body.json: this tool writes the field "prompt" itself; remove it from the file'),
    ],
)


@BAD_BODY_FILES
def test_a_bad_body_file_is_refused(text: str, message: str) -> None:
    write("body.json", text)
    with pytest.raises(gen.CommandError) as failure:
        gen.read_body_fields("body.json", {"prompt": {}})
    assert str(failure.value) == message


@BAD_BODY_FILES
def test_a_bad_body_file_ends_the_run(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("body.json", text)
    assert convert(f"{HEADER}1,A,x\n", "--body-file", "body.json") == 1
    assert capsys.readouterr() == ("", f"gen_batch_jsonl.py: error: {message}\n")


@pytest.mark.parametrize("text", ['{"a": 1e999}', '{"a": "\\ud800"}', "[" * 100_000])
def test_a_body_file_that_python_could_not_write_again_is_not_valid_json(text: str) -> None:
    write("body.json", text)
    with pytest.raises(gen.CommandError, match=r"^body\.json: not valid JSON: "):
        gen.read_body_fields("body.json", {})


@pytest.mark.parametrize("field", ["model", "messages"])
@pytest.mark.usefixtures("template")
def test_only_fields_that_this_run_writes_are_refused_in_the_body_file(field: str) -> None:
    write("body.json", json.dumps({field: 1}))
    chat = ("--endpoint", "/v1/chat/completions")
    write("in.csv", f"{HEADER}1,A,x\n")
    assert main([*FILES, *TEMPLATE_ARGS, *chat, "--body-file", "body.json"]) == 1
    write("body.json", '{"metadata": {"mine": "yes"}, "input": "more"}')
    assert main([*FILES, *TEMPLATE_ARGS, *chat, "--body-file", "body.json"]) == 0
    assert requests()[0]["body"]["metadata"] == {"mine": "yes"}


# -- conversion --------------------------------------------------------------------------------------------------


def test_without_a_model_one_warning_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--in", str(SAMPLE), "--out", "out.jsonl", "--prompt-id", "p"]) == 0
    assert capsys.readouterr() == ("", (
        "gen_batch_jsonl.py: warning: no --model (or MODEL): the Batch API refuses requests without body.model\n"
        "Wrote 3 requests to out.jsonl (3 rows read, 0 skipped)\n"
    ))


def test_skips_are_counted_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}1,A,x\n,B,x\n1,C,x\n,D,x\n3,E\n") == 0
    assert capsys.readouterr().err.splitlines()[-1] == (
        "Wrote 1 request to out.jsonl (5 rows read, 4 skipped: 2 empty artist_id, 1 duplicate artist_id, "
        "1 wrong number of fields)"
    )


def test_twenty_skipped_rows_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}1,A,x\n" + "1,B,x\n" * 20) == 0
    assert capsys.readouterr().err.count("; row skipped\n") == 20
    assert convert(f"{HEADER}1,A,x\n" + "1,B,x\n" * 25) == 0
    *listed, more, _ = capsys.readouterr().err.splitlines()
    assert len(listed) == 20
    assert more == "gen_batch_jsonl.py: warning: more rows were skipped; --verbose lists all of them"


def test_verbose_lists_every_skipped_row_and_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("artist_name;artist_id;x;artist_data\nA;1;;x\n" + "B;1;;x\n" * 25, "--verbose") == 0
    first, *listed, _ = capsys.readouterr().err.splitlines()
    assert first == (
        "artist_id is column 2, artist_name is column 1, artist_data is column 4 of 4, separated by a semicolon, "
        "read as utf-8"
    )
    assert [line.split(": ")[2] for line in listed] == [f"line {number}" for number in range(3, 28)]


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ("2,,x\n", "line 3: artist_name is empty"),
        ("2,B\n", f'line 3: 2 fields instead of 3 in "2,B"; {MISSING}'),
        ('2,B,"x\n', "line 3: a quote is never closed (noticed at the end, line 4)"),
    ],
)
def test_strict_ends_at_the_first_invalid_row(row: str, detail: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}1,A,x\n{row},,y\n", "--strict") == 1
    assert capsys.readouterr() == ("", f"gen_batch_jsonl.py: error: {detail}; without --strict the row is skipped\n")
    assert not Path("out.jsonl").exists()


def test_strict_writes_a_file_of_valid_rows() -> None:
    assert main(["--in", str(SAMPLE), "--out", "out.jsonl", *STORED, "--strict"]) == 0
    assert len(requests()) == 3


@pytest.mark.parametrize(
    ("rows", "accounted"),
    [("", "0 rows read, 0 skipped"), ("\n1,,x\n", "1 row read, 1 skipped: 1 empty artist_name")],
)
def test_no_valid_row_is_an_error_and_no_output(
    rows: str, accounted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("out.jsonl", "old")
    assert convert(HEADER + rows) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"gen_batch_jsonl.py: error: no valid row in in.csv ({accounted}); nothing was written"
    )
    assert Path("out.jsonl").read_text() == "old"


def test_every_row_of_random_garbage_is_accounted_for(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(120):
        rng = random.Random(seed)
        body = random_garbage(rng, 3)
        code = convert(HEADER + body)
        last = capsys.readouterr().err.splitlines()[-1]
        read, skipped = map(int, re.findall(r"\((\d+) rows? read, (\d+) skipped", last)[0])
        written = len(requests()) if code == 0 else 0
        assert read == written + skipped == len([*naive_rows(HEADER + body, 3, ",")]), (seed, body)
        counted = sum(map(int, re.findall(r"(\d+) (?:empty|duplicate|malformed|wrong|not|field)", last)))
        assert counted == skipped, last
        Path("out.jsonl").unlink(missing_ok=True)


def test_random_rows_of_all_kinds_are_written_in_order() -> None:
    """Valid rows among invalid ones are found however the blocks fall."""
    rng = random.Random(7)
    rows, expected, used = [], [], set()
    for number in range(3000):
        artist_id = str(rng.choice([number, number, number, rng.randrange(3000)]))
        name = rng.choice(["", *["name"] * 30])
        rows.append(f"{artist_id},{name},{'x' * rng.randrange(300)}\n")
        if name and artist_id not in used:
            used.add(artist_id)
            expected.append(artist_id)
    assert convert(HEADER + "".join(rows)) == 0
    assert [artist_id for artist_id, _, _ in variables()] == expected


@pytest.mark.parametrize(("limit", "written"), [("1", 1), ("2", 2), ("0003", 3), ("99", 3)])
def test_limit_reads_only_the_first_rows(
    limit: str, written: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--in", str(SAMPLE), "--out", "out.jsonl", *STORED, "--limit", limit]) == 0
    assert len(requests()) == written
    assert f"({written} row{'s' if written > 1 else ''} read, 0 skipped)" in capsys.readouterr().err


def test_limit_counts_skipped_rows_and_not_blank_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}\n1,,x\n\n2,B,x\n3,,x\n", "--limit", "2") == 0
    assert capsys.readouterr().err.endswith("(2 rows read, 1 skipped: 1 empty artist_name)\n")


@pytest.mark.parametrize("rows", ["1,A,x\n2,B,y\n", '1,A,x\n2,B,"y\nz"\n', "1,A,x\n2\n"])
def test_limit_does_not_wait_for_another_row(rows: str) -> None:
    reading, writing = os.pipe()
    with subprocess.Popen([sys.executable, ROOT / SCRIPT, "--in", "-", "--out", "out.jsonl", *STORED, "--limit", "2"],
                          stdin=reading, stderr=subprocess.DEVNULL) as process:
        os.close(reading)
        os.write(writing, f"{HEADER}{rows}".encode())
        assert process.wait(timeout=30) == 0
        os.close(writing)
    assert requests()[0]["custom_id"] == "1"


def test_a_large_limit_reads_as_many_rows() -> None:
    assert convert(HEADER + "".join(f"{n},A,{'x' * 200}\n" for n in range(3000)), "--limit", "2500") == 0
    assert [artist_id for artist_id, _, _ in variables()] == [str(n) for n in range(2500)]


def test_more_requests_than_a_batch_takes_are_announced(capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f"{number},A,\n" for number in range(gen.MAX_BATCH_REQUESTS + 1))
    assert convert(HEADER + rows) == 0
    assert capsys.readouterr().err == (
        "Wrote 50001 requests to out.jsonl (50001 rows read, 0 skipped); "
        "batch_tool.py create will split them into 2 batches\n"
    )
    assert convert(HEADER + rows, "--limit", "50000") == 0
    assert capsys.readouterr().err == "Wrote 50000 requests to out.jsonl (50000 rows read, 0 skipped)\n"


def test_batches_are_counted_by_bytes() -> None:
    parts = gen.BatchCounter()
    half = bytes(gen.MAX_BATCH_BYTES // 2)
    parts.add(half, 1)
    parts.add(half, 1)
    assert parts.count == 1
    parts.add(b"\n", 1)
    assert parts.count == 2


def test_batches_are_counted_alike_however_the_lines_come() -> None:
    rng = random.Random(3)
    together, apart = gen.BatchCounter(), gen.BatchCounter()
    for _ in range(400):
        number = rng.randrange(1, 700)
        together.add(b"{}\n" * number, number)
        for _ in range(number):
            apart.add(b"{}\n", 1)
    assert together.count == apart.count == 3


# -- progress ----------------------------------------------------------------------------------------------------


class Terminal:
    """A pseudo-terminal: `stream` to write to, `shown()` for all that was written to it."""

    def __init__(self, columns: int) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, columns))
        self.stream = os.fdopen(slave, "w")

    def shown(self) -> str:
        self.stream.close()
        chunks = []
        with contextlib.suppress(OSError):  # the end, once nobody can write any more
            while chunk := os.read(self.master, 100_000):
                chunks.append(chunk)
        os.close(self.master)
        return b"".join(chunks).decode()


def run_on_terminal(terminal: Terminal, rows: int, started: float = 0) -> None:
    """Progress over a file of 10 MB, asked twice a second; the console prints a line at the end."""
    with open("in.csv", "wb") as file:
        file.truncate(10_000_000)
    console = gen.Console(terminal.stream)
    ticks = itertools.count(started, 0.5)
    with open("in.csv", "rb") as source:
        progress = gen.Progress(console, source, clock=lambda: next(ticks))
        for number in range(1, rows + 1):
            source.seek(number * 1_000_000)
            progress.report(number * 100)
    console.message("done")


def test_a_run_of_less_than_a_second_shows_no_progress() -> None:
    terminal = Terminal(80)
    run_on_terminal(terminal, rows=1)
    assert terminal.shown() == "done\r\n"


def test_progress_is_one_line_written_over() -> None:
    terminal = Terminal(80)
    run_on_terminal(terminal, rows=3)
    first, second = "2.0 of 10.0 MB, 200 rows, 200 rows/s", "3.0 of 10.0 MB, 300 rows, 200 rows/s"
    assert terminal.shown() == f"\r{first}\r{second}\r{' ' * len(second)}\rdone\r\n"


@pytest.mark.parametrize(("columns", "width"), [(20, 19), (0, 36)])
def test_progress_fits_the_terminal(columns: int, width: int) -> None:
    terminal = Terminal(columns)
    run_on_terminal(terminal, rows=2)
    assert terminal.shown().startswith("\r" + "2.0 of 10.0 MB, 200 rows, 200 rows/s"[:width] + "\r")


def test_a_terminal_shows_messages_as_they_are() -> None:
    terminal = Terminal(80)
    finished = run(SCRIPT, "--in", SAMPLE, "--out", "out.jsonl", *STORED, capture_output=False, stderr=terminal.stream)
    assert finished.returncode == 0
    assert terminal.shown() == "Wrote 3 requests to out.jsonl (3 rows read, 0 skipped)\r\n"


# -- command line ------------------------------------------------------------------------------------------------

USAGE_ERRORS = pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ("--out o --prompt-id p", {}, "the following arguments are required: --in"),
        ("--in i --prompt-id p", {}, "the following arguments are required: --out"),
        ("--in i --out o", {},
         "a prompt is required: --prompt-file or --prompt-id (or PROMPT_FILE or PROMPT_ID)"),
        ("--in i --out o", {"PROMPT_ID": "", "PROMPT_FILE": ""},
         "a prompt is required: --prompt-file or --prompt-id (or PROMPT_FILE or PROMPT_ID)"),
        ("--in i --out o --prompt-id p --prompt-file f", {},
         "argument --prompt-file: not allowed with argument --prompt-id"),
        ("--in i --out o", {"PROMPT_ID": "p", "PROMPT_FILE": "f"},
         "PROMPT_ID and PROMPT_FILE are both set; unset one, or choose with --prompt-id or --prompt-file"),
        ("--in i --out o --prompt-file f", {}, "--model is required with a prompt file (or MODEL)"),
        ("--in i --out o", {"PROMPT_FILE": "f", "MODEL": ""}, "--model is required with a prompt file (or MODEL)"),
        ("--in i --out o --prompt-file f --model m --prompt-version 1", {},
         "--prompt-version goes with --prompt-id, not with a prompt file"),
        ("--in i --out o --prompt-version 1", {"PROMPT_FILE": "f", "MODEL": "m"},
         "--prompt-version goes with --prompt-id, not with a prompt file"),
        ("--in i --out o --prompt-id p --instructions-file f", {},
         "--instructions-file and --endpoint go with --prompt-file, not with a stored prompt"),
        ("--in i --out o --prompt-id p --endpoint /v1/chat/completions", {},
         "--instructions-file and --endpoint go with --prompt-file, not with a stored prompt"),
        ("--in i --out o --prompt-id p --limit 0", {}, "argument --limit: not a whole number of 1 or more: '0'"),
        ("--in i --out o --prompt-id p --limit ١", {}, "argument --limit: not a whole number of 1 or more: '\\u0661'"),
        ("--in i --out o --prompt-id p --str", {}, "unrecognized arguments: --str"),
        ("--in i --out o --prompt-id p x\x1b", {}, "unrecognized arguments: x\\u001b"),
        ("--in i --out o/ --prompt-id p", {}, "argument --out: not the name of a file: 'o/'"),
        ("--in - --out o --prompt-file - --model m", {}, "only one input can be stdin (-)"),
        ("--in i --out o", {"PROMPT_ID": "a\nb"},
         "environment variable PROMPT_ID: has control characters or is not valid UTF-8: 'a\\nb'"),
        ("--in i --out o --prompt-id p", {"MODEL": "a\tb"},
         "environment variable MODEL: has control characters or is not valid UTF-8: 'a\\tb'"),
        ("--in i --out o --prompt-id p --skip-header --id-column x", {},
         "--id-column, --name-column and --data-column need a header; they do not go with --skip-header"),
        ("--in i --out o --prompt-id p", {"PROMPT_VERSION": "\udcff"},
         "environment variable PROMPT_VERSION: has control characters or is not valid UTF-8: '\\udcff'"),
    ],
)


@USAGE_ERRORS
def test_invalid_arguments_exit_2(
    arguments: str, environment: dict[str, str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.splitlines()[-1] == f"gen_batch_jsonl.py: error: {message}"
    assert os.listdir() == []


@pytest.mark.parametrize("option", ["--in", "--out", "--prompt-id", "--prompt-file", "--model", "--body-file"])
def test_an_empty_value_is_invalid(option: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--in", "i", "--out", "o", "--prompt-id", "p", option, ""])
    assert ended.value.code == 2


def test_an_endpoint_that_is_not_offered_is_invalid(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*FILES, *TEMPLATE_ARGS, "--endpoint", "/v1/embeddings"])
    assert ended.value.code == 2
    assert "argument --endpoint: invalid choice: '/v1/embeddings'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "environment", "prompt"),
    [
        ((), {"PROMPT_ID": "e"}, {"id": "e"}),
        ((), {"PROMPT_ID": "e", "PROMPT_VERSION": "2"}, {"id": "e", "version": "2"}),
        ((), {"PROMPT_ID": "e", "PROMPT_VERSION": ""}, {"id": "e"}),
        (("--prompt-id", "f"), {"PROMPT_ID": "e", "PROMPT_VERSION": "2"}, {"id": "f", "version": "2"}),
        (("--prompt-version", "3"), {"PROMPT_ID": "e", "PROMPT_VERSION": "2"}, {"id": "e", "version": "3"}),
        (("--prompt-id", "f"), {"PROMPT_FILE": "prompt.md"}, {"id": "f"}),
    ],
)
def test_a_flag_beats_its_environment_variable(
    flags: tuple[str, ...], environment: dict[str, str], prompt: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    written = json.loads(only_line(*flags))["body"]["prompt"]
    assert {name: value for name, value in written.items() if name != "variables"} == prompt


@pytest.mark.parametrize(("flags", "model"), [((), "from-env"), (("--model", "flag"), "flag")])
def test_the_model_can_come_from_the_environment(
    flags: tuple[str, ...], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL", "from-env")
    assert json.loads(only_line("--prompt-id", "p", *flags))["body"]["model"] == model


@pytest.mark.usefixtures("template")
def test_a_flag_for_a_prompt_file_beats_a_stored_prompt_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPT_ID", "e")
    monkeypatch.setenv("PROMPT_VERSION", "2")
    assert "prompt" not in json.loads(only_line(*TEMPLATE_ARGS))["body"]


@pytest.mark.usefixtures("template")
def test_the_prompt_file_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPT_FILE", "prompt.md")
    assert json.loads(only_line("--model", "m"))["body"]["input"].startswith("Write about NewJeans.")


def test_the_prompt_can_come_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    feed_stdin(monkeypatch, "For {{artist_name}}")
    assert json.loads(only_line("--prompt-file", "-", "--model", "m"))["body"]["input"] == "For NewJeans"


@pytest.mark.parametrize("how", ["name", "path", "symlink", "hard link", "stdin"])
def test_reading_and_writing_one_file_exits_2(how: str) -> None:
    content = f"{HEADER}1,A,x\n"
    write("in.csv", content)
    destination = {"name": "in.csv", "path": "./in.csv", "stdin": "in.csv"}.get(how, "other")
    if how == "symlink":
        Path("other").symlink_to("in.csv")
    if how == "hard link":
        Path("other").hardlink_to("in.csv")
    with open("in.csv", "rb") as stdin:
        finished = run(SCRIPT, "--in", "-" if how == "stdin" else "in.csv", "--out", destination, *STORED, stdin=stdin)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].endswith("is both an input and the output; choose another --out")
    assert Path("in.csv").read_text() == content


def test_appending_stdout_to_the_input_exits_2() -> None:
    write("in.csv", f"{HEADER}1,A,x\n")
    with open("in.csv", "ab") as stdout:
        finished = run(SCRIPT, "--in", "in.csv", "--out", "-", *STORED,
                       capture_output=False, stdout=stdout, stderr=subprocess.DEVNULL)
    assert finished.returncode == 2
    assert Path("in.csv").read_text() == f"{HEADER}1,A,x\n"


@pytest.mark.parametrize("option", ["--prompt-file", "--instructions-file", "--body-file"])
@pytest.mark.usefixtures("template")
def test_the_output_may_not_be_another_input(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("text", "{}")
    with pytest.raises(SystemExit) as ended:
        main(["--in", str(SAMPLE), "--out", "text", *TEMPLATE_ARGS, option, "text"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("text is both an input and the output; choose another --out\n")


def test_a_terminal_or_dev_null_may_be_read_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--in", "/dev/null", "--out", "/dev/null", *STORED]) == 1
    assert "the CSV is empty" in capsys.readouterr().err


def test_help_is_the_manual_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert gen.__doc__ and gen.__doc__.strip() in out
    options = ("--in CSV", "--out JSONL", "--prompt-id ID", "--prompt-file FILE", "--prompt-version V", "--endpoint",
               "--instructions-file FILE", "--model MODEL", "--body-file JSON", "--limit N", "--skip-header",
               "--encoding NAME", "--id-column NAME", "--name-column NAME", "--data-column NAME",
               "--strict", "--verbose")
    assert all(option in out for option in options)


# -- main --------------------------------------------------------------------------------------------------------


def wait_for_temporary_file() -> None:
    deadline = time.monotonic() + 30
    while not any(name.endswith(".tmp") for name in os.listdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def waiting_conversion(**options: Any) -> Iterator[subprocess.Popen[str]]:
    """A conversion over an old out.jsonl that has begun its output and waits for more rows on stdin."""
    write("out.jsonl", "old")
    command = [sys.executable, str(ROOT / SCRIPT), "--in", "-", "--out", "out.jsonl", *STORED]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stderr=pipe, encoding="utf-8", **options) as process:
        assert process.stdin
        process.stdin.write(f"{HEADER}1,A,x\n")
        process.stdin.flush()
        wait_for_temporary_file()
        yield process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_the_old_file_and_no_other(number: int, code: int) -> None:
    with waiting_conversion() as process:
        assert process.stderr
        process.send_signal(number)
        assert process.stderr.readline() == "gen_batch_jsonl.py: stopped\n"
        process.send_signal(number)  # while the interpreter ends
        assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == code
    assert os.listdir() == ["out.jsonl"]
    assert Path("out.jsonl").read_text() == "old"


def test_a_kill_leaves_the_old_file() -> None:
    with waiting_conversion() as process:
        process.kill()
    assert Path("out.jsonl").read_text() == "old"


def test_a_hangup_that_nohup_ignores_is_ignored() -> None:
    with waiting_conversion(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "Wrote 1 request to out.jsonl (1 row read, 0 skipped)\n")
    assert os.listdir() == ["out.jsonl"]


def test_a_signal_at_any_moment_leaves_a_whole_file_or_the_old_one() -> None:
    write("in.csv", HEADER + "".join(f"{number},A,{'x' * 200}\n" for number in range(20_000)))
    rng = random.Random(1)
    codes: Counter[int] = Counter()
    for _ in range(12):
        write("out.jsonl", "old")
        with subprocess.Popen([sys.executable, ROOT / SCRIPT, *FILES, *STORED], stderr=subprocess.DEVNULL) as process:
            time.sleep(rng.uniform(0.03, 0.2))
            process.terminate()
        codes[process.returncode] += 1
        assert sorted(os.listdir()) == ["in.csv", "out.jsonl"]
        content = Path("out.jsonl").read_bytes()
        assert content == b"old" or content.count(b"\n") == 20_000
    assert set(codes) <= {0, 143, -signal.SIGTERM}


@pytest.mark.parametrize("output", ["stdout", "fifo"])
def test_a_signal_ends_a_run_whose_reader_stands_still(output: str) -> None:
    write("in.csv", HEADER + "".join(f"{number},A,{'x' * 200}\n" for number in range(5_000)))
    os.mkfifo("fifo")
    destination = "-" if output == "stdout" else "fifo"
    command = [sys.executable, str(ROOT / SCRIPT), "--in", "in.csv", "--out", destination, *STORED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        reading = open("fifo", "rb") if output == "fifo" else process.stdout
        assert reading and process.stderr
        with reading:
            reading.read(1)
            time.sleep(0.2)  # until the pipe is full
            process.terminate()
            assert process.wait(timeout=30) == 143
        assert process.stderr.read() == b"gen_batch_jsonl.py: stopped\n"


def test_an_interrupt_during_the_imports_is_no_traceback() -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / SCRIPT), "--in", "-", "--out", "out.jsonl", *STORED]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stderr=pipe, encoding="utf-8") as process:
        assert process.stderr
        while " argparse" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode in (130, -signal.SIGINT)
    assert "KeyboardInterrupt" not in err
    assert os.listdir() == []


def test_every_byte_reaches_a_slow_reader_of_a_pipe_that_does_not_block() -> None:
    write("in.csv", HEADER + "".join(f"{number},A,{'x' * 200}\n" for number in range(5000)))
    for unbuffered in ("", "1"):
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        command = [sys.executable, str(ROOT / SCRIPT), "--in", "in.csv", "--out", "-", *STORED]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        with subprocess.Popen(command, stdout=writing, stderr=subprocess.DEVNULL, env=environment) as process:
            os.close(writing)
            time.sleep(0.3)
            with open(reading, "rb") as pipe:
                assert pipe.read().count(b"\n") == 5000
        assert process.returncode == 0


def shell(command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a bash command in which GEN stands for the script with a stored prompt."""
    command = command.replace("GEN", f"{sys.executable} {ROOT / SCRIPT} {' '.join(STORED)}")
    return subprocess.run(["bash", "-c", command], capture_output=True, encoding="utf-8", timeout=60, **options)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (f"GEN --in {SAMPLE} --out - | true; exit $PIPESTATUS", 1, ""),
        (f"GEN --in {SAMPLE} --out - >&-", 1, ""),
        (f"GEN --in <(cat {SAMPLE}; echo a1,,) --out - --strict | true; exit $PIPESTATUS", 1, ""),
        (f"GEN --in {SAMPLE} --out - > /dev/full", 1,
         "gen_batch_jsonl.py: error: cannot write stdout: No space left on device\n"),
        ("GEN --in - --out out.jsonl <&-", 1,
         "gen_batch_jsonl.py: error: stdin is closed; there is nothing to read\n"),
        (f"GEN --in {SAMPLE} --out out.jsonl >&- <&-", 0, "Wrote 3 requests to out.jsonl (3 rows read, 0 skipped)\n"),
        (f"GEN --in {SAMPLE} --out out.jsonl 2>&-", 0, ""),
        (f"GEN --in {SAMPLE} --out out.jsonl 2> /dev/full", 0, ""),
        ("GEN --help > /dev/full", 1,
         "gen_batch_jsonl.py: error: cannot write stdout: No space left on device\n"),
        ("GEN --help | true; exit $PIPESTATUS", 1, ""),
        ("GEN --nonsense 2>&-", 2, ""),
        ("GEN --nonsense 2> /dev/full", 2, ""),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_and_full_streams_end_the_run_without_a_traceback(
    command: str, code: int, message: str, unbuffered: str
) -> None:
    finished = shell(command, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    if "--strict" in command:
        assert (finished.returncode, finished.stdout) == (1, "")
        assert "Traceback" not in finished.stderr and "Exception" not in finished.stderr
    else:
        assert (finished.returncode, finished.stdout, finished.stderr) == (code, "", message)


def test_messages_never_go_to_stdout_where_stderr_is_closed() -> None:
    finished = shell(f"GEN --in {SAMPLE} --out - --verbose 2>&-")
    assert finished.returncode == 0
    assert [json.loads(line)["custom_id"] for line in finished.stdout.splitlines()] == ["a1", "a2", "a3"]


def test_a_file_that_outgrows_its_limit_leaves_the_old_one() -> None:
    write("in.csv", HEADER + "".join(f"{number},A,{'x' * 200}\n" for number in range(5000)))
    write("out.jsonl", "old")
    finished = shell("ulimit -f 100; GEN --in in.csv --out out.jsonl")
    assert finished.returncode == 1
    assert finished.stderr == "gen_batch_jsonl.py: error: cannot write out.jsonl: File too large\n"
    assert sorted(os.listdir()) == ["in.csv", "out.jsonl"]
    assert Path("out.jsonl").read_text() == "old"


def test_the_reader_of_a_fifo_that_goes_away_is_an_error() -> None:
    write("in.csv", HEADER + "".join(f"{number},A,{'x' * 200}\n" for number in range(5000)))
    os.mkfifo("fifo")
    finished = shell("(read -n 1 < fifo) & GEN --in in.csv --out fifo; code=$?; wait; exit $code")
    assert (finished.returncode, finished.stderr) == (1, "gen_batch_jsonl.py: error: cannot write fifo: Broken pipe\n")


def test_the_c_locale_changes_nothing() -> None:
    Path("ü é").mkdir()
    write("ü é/in.csv", f"{HEADER}é,Björk,東\n")
    write("prompt.md", "Über {{artist_name}}: {{artist_data}}")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    finished = run(SCRIPT, "--in", "ü é/in.csv", "--out", "ü é/out.jsonl", *TEMPLATE_ARGS, env=environment)
    assert finished.returncode == 0
    assert requests("ü é/out.jsonl")[0]["body"]["input"] == "Über Björk: 東"
    piped = run(SCRIPT, "--in", "ü é/in.csv", "--out", "-", *TEMPLATE_ARGS, env=environment)
    assert piped.stdout == Path("ü é/out.jsonl").read_text(encoding="utf-8")


def test_the_script_runs_alone_on_the_standard_library() -> None:
    command = [sys.executable, "-S", "-I", str(write("copy.py", (ROOT / SCRIPT).read_bytes()))]
    finished = subprocess.run([*command, "--in", SAMPLE, "--out", "out.jsonl", *STORED], capture_output=True)
    assert (finished.returncode, finished.stdout) == (0, b"")
    assert len(requests()) == 3


def test_importing_the_script_is_cheap_and_does_nothing() -> None:
    heavy = {"asyncio", "dataclasses", "http.client", "inspect", "logging", "openai", "shutil", "ssl", "subprocess"}
    program = f"import sys, gen_batch_jsonl; print(sorted({heavy} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (finished.stdout, finished.stderr) == ("[]\n", "")


def test_the_exit_code_of_the_process_is_that_of_main() -> None:
    assert run(SCRIPT, "--in", SAMPLE, "--out", "out.jsonl", *STORED).returncode == 0
    assert run(SCRIPT, "--in", "missing.csv", "--out", "out.jsonl", *STORED).returncode == 1
    assert run(SCRIPT, "--in", SAMPLE).returncode == 2
