"""gen_batch_jsonl.py: which rows of a CSV are read, how, and what is said of the others."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from builders import (
    FILES,
    HEADER,
    MISSING,
    OLD,
    ROOT,
    STORED,
    TEMPLATE_ARGS,
    convert,
    printed,
    requests,
    said,
    variables,
    write,
)

import gen_batch_jsonl as gen
from gen_batch_jsonl import main

pytestmark = pytest.mark.usefixtures("work")

TATE = ROOT.parent / "shared" / "data" / "tate_artists.csv"


def open_reader(content: str | bytes, **options: Any) -> gen.BlockReader:
    encoded = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    return gen.BlockReader(io.BytesIO(encoded), "in.csv", options.pop("encoding", "utf-8"), **options)


def table(delimiter: str = ",", names: Sequence[str] = gen.COLUMNS) -> gen.Table:
    return gen.Table(delimiter, [*names], [*names], {role: names.index(role) for role in gen.COLUMNS}, True)


USED = [0, 1, 2]


def read_records(content: str | bytes, delimiter: str = ",", names: Sequence[str] = gen.COLUMNS) -> list[gen.Record]:
    """Every record after the header, each looked at by itself."""
    reader = open_reader(content)
    reader.skip_lines(1)
    return [*reader.records(table(delimiter, names))]


# ---- CSV: well-formed ----

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
    assert printed(capsys) == ("", f"Wrote {len(rows)} request{'s' if many else ''} to out.jsonl ({read})\n")


def random_value(rng: random.Random) -> str:
    alphabets = ["ab", 'a "', "a,;\t", 'a"\n,', "é東\U0001f600\u2028\x85", '{}%\\"\0', "a\r\n"]
    return "".join(rng.choices(rng.choice(alphabets), k=rng.randrange(8)))


def written_as_csv(value: str, rng: random.Random) -> str:
    """The value in quotes where it needs them and now and then where it does not."""
    needed = re.search('[",;\t\r\n]', value)
    return '"' + value.replace('"', '""') + '"' if needed or rng.random() < 0.2 else value


def test_random_well_formed_files_are_read_as_csv_reads_them() -> None:
    for seed in range(40):
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
    assert said(capsys) == f"Wrote {number} requests to out.jsonl ({number} rows read, 0 skipped)\n"


# ---- CSV: header ----

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
    assert printed(capsys) == ("", f"gen_batch_jsonl.py: error: {message}\n")
    assert not Path("out.jsonl").exists()


def test_skip_header_names_the_columns_by_position(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert('\ufeff\n1,A,"x\ny"\n2,B,z\n', "--skip-header") == 0
    assert variables() == [("1", "A", "x\ny"), ("2", "B", "z")]
    assert said(capsys) == "Wrote 2 requests to out.jsonl (2 rows read, 0 skipped)\n"


def test_skip_header_counts_lines_from_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert('\n1,A,"x\n2,B,z\n3,,z\n', "--skip-header") == 0
    assert variables() == [("2", "B", "z")]
    assert said(capsys).splitlines()[:2] == [
        "gen_batch_jsonl.py: warning: line 2: a quote is never closed (noticed at the end, line 4); row skipped",
        "gen_batch_jsonl.py: warning: line 4: artist_name is empty; row skipped",
    ]


def test_skip_header_takes_a_header_as_one_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("artist_data;artist_id;artist_name\nx;1;A\n", "--skip-header") == 0
    assert variables() == [("1", "A", "x")]
    assert said(capsys) == (
        "gen_batch_jsonl.py: warning: line 1: names the columns, so it is the header despite --skip-header\n"
        "Wrote 1 request to out.jsonl (1 row read, 0 skipped)\n"
    )


def test_a_nul_in_the_first_row_is_not_taken_for_utf_16() -> None:
    assert convert("1\0,A,x\n", "--skip-header") == 0
    assert variables() == [("1\0", "A", "x")]


# ---- CSV: invalid rows ----

COMMA = "a value with a comma in it needs quotes around it"
# what stands between the rows 1 and 9, the ids of it that are written, and the warnings
TAKEN = "; taken as it stands, with its quotes"
MALFORMED = pytest.mark.parametrize(
    ("rows", "written", "warnings"),
    [
        ('2,B,"x"y\n3,C,z\n', ["2", "3"], [f"line 3: text after a closing quote (noticed on line 3){TAKEN}"]),
        ('2,"B"" ,x\n3,C,z\n4,"D",z\n', ["2", "3", "4"],
         [f"line 3: text after a closing quote (noticed on line 5){TAKEN}"]),
        ('2,B,"x\n3,C,z\n', ["3"], ["line 3: a quote is never closed (noticed at the end, line 5)"]),
        ('2,B,"x\n3,C,"y"\n4,D,z\n', ["3", "4"], ["line 3: text after a closing quote (noticed on line 4)"]),
        ('2,B,"x\n3,C,"y\n4,D,z\n', ["4"],
         ["line 3: text after a closing quote (noticed on line 4)",
          "line 4: a quote is never closed (noticed at the end, line 6)"]),
        ('2,B,"x\n\n\n3,C,"y"z\n4,D,z\n', ["3", "4"],
         ["line 3: text after a closing quote (noticed on line 6)",
          f"line 6: text after a closing quote (noticed on line 6){TAKEN}"]),
        ('2,B,"x\n3,C,"y"\r\n"4",D,"z\n\nz"\n', ["3", "4"],
         ["line 3: text after a closing quote (noticed on line 4)"]),
        ('2,\n3,C,z,q\n4,D,z\n', ["4"],
         [f'line 3: 2 fields instead of 3 in "2,"; {MISSING}',
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
    assert [record.fields[0] for record in read if record.is_used] == ["1", *written, "9"]
    odd = [record for record in read if record.oddity and record.oddity != gen.ENDS_EARLY]
    found = [f"line {record.line}: {gen.problem_of(record, table()).detail}" for record in odd]
    assert found == [warning.removesuffix(TAKEN) for warning in warnings]


@MALFORMED
def test_a_malformed_row_is_skipped_with_a_warning(
    rows: str, written: list[str], warnings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(f"{HEADER}1,A,z\n{rows}9,Z,z\n") == 0
    assert [artist_id for artist_id, _, _ in variables()] == ["1", *written, "9"]
    *warned, last = said(capsys).splitlines()
    skipped = [warning for warning in warnings if not warning.endswith(TAKEN)]
    assert [warning for warning in warned if "end early" not in warning and "ends early" not in warning] == [
        f"gen_batch_jsonl.py: warning: {warning}{'; row skipped' * (warning in skipped)}" for warning in warnings
    ]
    assert last.startswith(f"Wrote {len(written) + 2} requests to out.jsonl ({len(written) + 2 + len(skipped)} rows")


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
    assert said(capsys) == (
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
    assert 'line 5002: artist_id "7" was already used on line 9; row skipped\n' in said(capsys)


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
    assert said(capsys) == (
        "gen_batch_jsonl.py: warning: line 2: a field exceeds 10485760 characters (noticed on line 2); row skipped\n"
        "Wrote 1 request to out.jsonl (2 rows read, 1 skipped: 1 field too long)\n"
    )


def test_a_quote_never_closed_is_noticed_at_the_longest_field(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{'x' * 999_997},\n"
    assert convert(f'{HEADER}1,A,"y\n{line * 12}2,B,y\n') == 0
    assert variables() == [("2", "B", "y")]
    warned = said(capsys).splitlines()
    assert warned[0].endswith("line 2: a field exceeds 10485760 characters (noticed on line 13); row skipped")
    assert f'line 3: 2 fields instead of 3 in "{"x" * 80}…"; {MISSING}; row skipped' in warned[1]
    assert warned[-1].endswith("(14 rows read, 13 skipped: 12 wrong number of fields, 1 field too long)")


def test_a_stray_quote_costs_only_its_own_row() -> None:
    """One fault at a random place of a file whose quoted fields begin with a letter, as names and prose do."""
    words = ["plain", '"quoted"', '"with, comma"', '"say ""so"" twice"', '"two\nlines"', '"three\n\n, lines"']
    for seed in range(60):
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


def naive_rows(content: str, width: int, delimiter: str, id_at: int, name_at: int) -> Iterator[tuple[int, str, object]]:
    """What the reader should yield: csv is started anew at the line after each row that fails."""
    lines = io.StringIO(content, newline="").readlines()
    at = 1
    while at < len(lines):
        line, number = lines[at].rstrip("\r\n"), at + 1
        records = csv.reader(iter(lines[at:]), delimiter=delimiter, strict=True)
        try:
            fields = next(records)
        except csv.Error:
            fields = line.split(delimiter)
            at += 1
            if len(fields) != width or any(field[:1] == '"' and field.count('"') == 1 for field in fields):
                yield number, "malformed quoting", at - 1 + records.line_num
            else:
                yield number, "", fields
            continue
        if not any(field.strip(gen.BLANKS) for field in fields[width:]):
            fields = fields[:width]
        whole = fields + [""] * (width - len(fields))
        if not any(field.strip(gen.BLANKS) for field in fields):
            at += records.line_num
        elif len(fields) > width or (len(fields) < width and not (whole[id_at].strip() and whole[name_at].strip())):
            yield number, "wrong number of fields", len(fields)
            at += 1
        else:
            yield number, "", whole
            at += records.line_num


def simplified(record: gen.Record) -> tuple[int, str, object]:
    if record.is_used:
        return record.line, "", record.fields
    noticed = re.findall(r"line (\d+)", record.detail)
    return record.line, record.oddity, int(noticed[0]) if noticed else record.width


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
        body = random_garbage(rng, len(names)).replace(" ", "b")  # csv takes blanks around quotes for text
        content = f"{','.join(names)}\n{body}".translate({ord(","): delimiter, ord("\n"): newline})
        at = names.index("artist_id"), names.index("artist_name")
        expected = [*naive_rows(content, len(names), delimiter, *at)]
        assert [*map(simplified, read_records(content, delimiter, names))] == expected, (seed, body)


def convert_in_blocks(content: str, block_bytes: int, limit: int = sys.maxsize) -> list[Any]:
    """The requests of a CSV that is read in blocks of that size."""
    out = io.BytesIO()
    console = gen.Console(None)
    reader = open_reader(content, block_bytes=block_bytes)
    table = gen.read_table(reader, {}, gen.COLUMNS, skip_header=False)
    args = gen.build_parser().parse_args([*FILES, *STORED])
    report = gen.RowReport(console, strict=True, verbose=False)
    writer = gen.RequestWriter(gen.build_request(args, table, console), table, out, report)
    gen.convert_rows(reader, writer, limit, lambda: None)
    converted = [json.loads(line) for line in out.getvalue().split(b"\n")[:-1]]
    return [(each["custom_id"], *each["body"]["prompt"]["variables"].values()) for each in converted]


@pytest.mark.parametrize("delimiter", gen.DELIMITERS)
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_blocks_of_any_size_are_read_as_csv_reads_them(delimiter: str, newline: str) -> None:
    for seed in range(7):
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
        rows = gen.rows_of_block(body.encode(), 2, table(), USED, sys.maxsize) if body.count('"') % 2 == 0 else None
        if rows is not None and all(rows.columns[0]) and all(rows.columns[1]):
            as_whole += 1
            records = read_records(HEADER + body)
            assert [record.line for record in records] == [*rows.lines][:-1], body
            values = [[record.fields[column].strip(gen.BLANKS).encode() for record in records] for column in USED]
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
    assert gen.rows_of_block(block.encode(), 1, table(), USED, sys.maxsize) is None


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
        ('a1\na2,"bad"x one,B,d\na3,C,c\n', {"wrong number of fields": 1, "malformed quoting": 1}),
        ('a1,A\na2,"bad"x one,B\na3,C,c\n', {}),
        ('a1,"x"y ,B,d\n' * 50 + "a2,B,y\n", {"malformed quoting": 50}),
        ("a1" + ",x" * 60 + ",B,d\na2,B,y\n", {"wrong number of fields": 1}),
        ("a1,A,x\n,,\n , ,\t\na2,B,y\n", {}),
        ("a1,A,x\n,,\n,B,y\n", {"empty artist_id": 1}),
    ],
)
def test_rows_are_skipped_alike_however_the_bytes_arrive(rows: str, reasons: dict[str, int], block_bytes: int) -> None:
    reader = open_reader(HEADER + rows, block_bytes=block_bytes)
    reader.skip_lines(1)
    report = gen.RowReport(gen.Console(None), strict=False, verbose=False)
    writer = gen.RequestWriter(gen.RequestTemplate([b"", b"\n"], [0], USED), table(), io.BytesIO(), report)
    gen.convert_rows(reader, writer, sys.maxsize, lambda: None)
    assert report.reasons == reasons
    assert writer.written + report.reasons.total() == sum(bool(row.strip(", \t")) for row in rows.splitlines())


class Trickle:
    """A file that gives at most so many bytes at a time."""

    def __init__(self, content: bytes, most: int) -> None:
        self._content = io.BytesIO(content)
        self._most = most

    def read1(self, size: int) -> bytes:
        return self._content.read(min(size, self._most))


def outcome_of(content: bytes, most: int, block_bytes: int) -> tuple[Any, ...]:
    """The requests, the warnings and the counts of a CSV that arrives like this."""
    source: Any = Trickle(content, most)
    reader = gen.BlockReader(source, "in.csv", "utf-8", block_bytes)
    reader.skip_lines(1)
    stderr, out = io.StringIO(), io.BytesIO()
    report = gen.RowReport(gen.Console(stderr), strict=False, verbose=True)
    writer = gen.RequestWriter(gen.RequestTemplate([b"", b"|", b"|", b"\n"], USED, USED), table(), out, report)
    try:
        gen.convert_rows(reader, writer, sys.maxsize, lambda: None)
    except gen.CommandError as error:  # a second header
        return (str(error),)
    gen.warn_of_used_rows(report, gen.Console(stderr))
    return out.getvalue(), stderr.getvalue(), report.reasons, writer.written


def test_random_bytes_give_the_same_however_they_arrive() -> None:
    odd = ['""', "\n", "\n", "\r\n", "\r", "\t", "é", "\xa0", "\u2028", "\\", "\x01", HEADER, "x,y,z\n"]
    facts = ["x", "", "y z", '"q, r"']
    for seed in range(80):
        rng = random.Random(seed)
        sound = "".join(f"a{number},B,{rng.choice(facts)}\n" for number in range(seed % 9))
        noise = "".join(rng.choices([*'ab1,,,,"" ;|', *odd], k=rng.randrange(1, 100)))
        content = (HEADER + sound + noise + sound).encode()
        expected = outcome_of(content, sys.maxsize, 1 << 17)
        for most, block_bytes in ((1, 1), (3, 7), (20, 30), (200, 64), (sys.maxsize, 16)):
            assert outcome_of(content, most, block_bytes) == expected, (seed, most, block_bytes)


def test_blank_rows_below_the_table_are_no_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}a1,A,x\n,,\n,,\n", "--strict", "--limit", "2") == 0
    assert said(capsys) == "Wrote 1 request to out.jsonl (1 row read, 0 skipped)\n"


def test_a_line_longer_than_a_field_may_be_is_skipped_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}a1,A,{'x,' * 11_000_000}\na2,B,y\na3,C,{'x' * 11_000_000}\na4,D,z\n") == 0
    *_, last = said(capsys).splitlines()
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
    assert gen.rows_of_block(b"1,A,x,y\n2,B\n3\n4,D,z,y\n", 1, table(",", names), USED, sys.maxsize) is None


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

    assert count_calls(600) < 5 * count_calls(150)


def test_a_row_with_very_many_fields_costs_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}1,A{',x' * 500}\n2,B,y{',' * 500}\n") == 0
    assert variables() == [("2", "B", "y")]
    assert 'line 2: at least 24 fields instead of 3 in "1,A,x,x,' in said(capsys)


def test_rows_that_cannot_be_written_leave_the_rest_of_their_block(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f'{HEADER}1,A,x\n2,"B, C",x\n,D,x\n1,E,x\n3, ,x\n4,F,"x\ny"\n2,G,x\n5,H,x\n') == 0
    assert [artist_id for artist_id, _, _ in variables()] == ["1", "2", "4", "5"]
    *warned, last = said(capsys).splitlines()
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
    assert 'line 5: artist_id "a,"\\n1" was already used on line 2; row skipped' in said(capsys)


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
    block = gen.rows_of_block(rows.encode(), 2, table(), USED, sys.maxsize)
    assert block is not None and block.swallowed == swallowed
    found = {record.line: lines_like_rows(record) for record in read_records(HEADER + rows)}
    assert {line: held for line, held in found.items() if held} == swallowed


def lines_like_rows(record: gen.Record) -> list[int]:
    return gen.lines_like_rows(",".join(record.fields).encode(), record.line, record.fields[0].encode(), table())


@SWALLOWING
def test_swallowed_rows_draw_a_warning_and_are_kept(
    rows: str, swallowed: dict[int, list[int]], warnings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(HEADER + rows) == 0
    *warned, last = said(capsys).splitlines()
    assert warned == [f"gen_batch_jsonl.py: warning: {warning}" for warning in warnings]
    assert last.endswith(" 0 skipped)")


def test_many_swallowed_rows_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f'{2 * n},A,"x\n{2 * n + 1},B,y"\n' for n in range(23))
    assert convert(HEADER + rows) == 0
    *warned, _ = said(capsys).splitlines()
    assert len(warned) == 20


def test_every_row_of_random_garbage_is_accounted_for(capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(50):
        rng = random.Random(seed)
        body = random_garbage(rng, 3).replace(" ", "b")
        code = convert(HEADER + body)
        last = said(capsys).splitlines()[-1]
        read, skipped = map(int, re.findall(r"\((\d+) rows? read, (\d+) skipped", last)[0])
        written = len(requests()) if code == 0 else 0
        assert read == written + skipped == len([*naive_rows(HEADER + body, 3, ",", 0, 1)]), (seed, body)
        counted = sum(map(int, re.findall(r"(\d+) (?:empty|duplicate|malformed|wrong|not|field)", last)))
        assert counted == skipped, last
        Path("out.jsonl").unlink(missing_ok=True)


# ---- CSV: files as people have them ----

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
    assert "line 4: artist_name is empty" in said(capsys)


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
    assert said(capsys) == "Wrote 1 request to out.jsonl (1 row read, 0 skipped)\n"


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
    assert said(capsys) == (
        f"gen_batch_jsonl.py: error: line 1: the header {problem}; "
        "its columns are artist_id, artist_name, artist_data, born, Born\n"
    )


def test_a_file_without_data_is_converted_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("artist_id,artist_name\n1,A\n") == 0
    assert variables() == [("1", "A", "")]
    assert said(capsys) == f"{NO_DATA}\nWrote 1 request to out.jsonl (1 row read, 0 skipped)\n"


def test_blank_fields_past_the_header_are_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f'{HEADER}1,A,x,,,\n2,B,y, ,"\n"\n3,C,z,,,!\n') == 0
    assert variables() == [("1", "A", "x"), ("2", "B", "y")]
    assert f'line 5: 6 fields instead of 3 in "3,C,z,,,!"; {COMMA}' in said(capsys)


@pytest.mark.parametrize("again", ["artist_id,artist_name,artist_data", ' Artist ID,"ARTIST-NAME",artist_data,,'])
@pytest.mark.parametrize("options", [(), ("--strict",), ("--limit", "2")])
def test_a_repeated_header_is_skipped(
    again: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(f"{HEADER}1,A,x\n{again}\n2,B,y\n", *options) == 0
    assert variables() == [("1", "A", "x"), ("2", "B", "y")]
    assert said(capsys) == (
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
    assert said(capsys) == (
        "gen_batch_jsonl.py: error: line 3: a second header that differs from the first; "
        "split the file before this line and convert the parts one by one\n"
    )


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\x03\x04\x14\0\x06\0\x08\0", "an Excel workbook or another zip file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook or another zip file"),
        (b"\x1f\x8b\x08\0", "a gzip file or another archive"),
        (b"\xfd7zXZ\0", "a gzip file or another archive"),
        (b"%PDF-1.7\n", "a PDF or RTF document"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--skip-header",), ("--encoding", "windows-1252")])
def test_a_file_that_is_no_csv_is_refused(
    content: bytes, kind: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(content, *options) == 1
    out, err = printed(capsys)
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"gen_batch_jsonl.py: error: in.csv is {kind}; ")


def test_names_that_read_like_a_null_are_kept_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}1,NaN,x\n2, #N/A ,x\n3,A,NULL\n4,\"NaN\",x\n5,\\N,x\n6,,x\n") == 0
    assert [name for _, name, _ in variables()] == ["NaN", "#N/A", "A", "NaN", "\\N"]
    assert said(capsys).splitlines()[1] == (
        "gen_batch_jsonl.py: warning: 4 names look like empty cells: NaN (2), #N/A (1), \\N (1); "
        "the requests were written anyway"
    )


# ---- CSV: encodings ----

FOREIGN = f"{HEADER}1,Björk,Reykjavík\n2,Café Tacvba,“rock”\n"
FOREIGN_VARIABLES = [("1", "Björk", "Reykjavík"), ("2", "Café Tacvba", "“rock”")]


@pytest.mark.parametrize(
    ("codec", "option"),
    [
        ("windows-1252", "windows-1252"), ("cp1252", "CP1252"), ("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be"),
        ("utf-8", "UTF8"), ("utf-8-sig", "ascii"), ("utf-16", "utf-8"), ("utf-32", "windows-1252"), ("utf-7", "utf-7"),
        ("gb18030", "gb18030"), ("mac-roman", "macintosh"), ("utf-16-le", "utf_16"), ("utf-32-le", "U32"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_file_in_its_encoding_is_read(
    codec: str, option: str, newline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(FOREIGN.replace("\n", newline).encode(codec), "--encoding", option) == 0
    assert variables() == FOREIGN_VARIABLES
    assert said(capsys) == "Wrote 2 requests to out.jsonl (2 rows read, 0 skipped)\n"


def test_characters_may_be_cut_by_the_borders_of_blocks() -> None:
    for codec in ("utf-16", "utf-32", "gb18030", "shift_jis"):
        reader = open_reader((HEADER + "1,東京,日本\n" * 50).encode(codec), encoding=codec, block_bytes=3)
        next(reader.peek_lines())
        reader.skip_lines(1)
        records = reader.records(table())
        assert [record.fields for record in records] == [["1", "東京", "日本"]] * 50


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("options", [(), ("--encoding", "windows-1252")])
def test_utf_16_without_a_mark_is_refused_with_advice(
    codec: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(FOREIGN.encode(codec), *options) == 1
    assert "(read in the wrong encoding; name the right one with --encoding)" in said(capsys)


@pytest.mark.parametrize("option", ["--name-column", "--data-column"])
def test_a_header_in_another_encoding_is_an_error_that_says_so(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = "artist_id,artist_name,Künstler\n1,A,x\n".encode("windows-1252")
    assert convert(content, option, "Künstler") == 1
    assert said(capsys) == (
        'gen_batch_jsonl.py: error: line 1: the header has no column "Künstler"; its columns are artist_id, '
        "artist_name, K\\udcfcnstler (read in the wrong encoding; name the right one with --encoding)\n"
    )
    write("prompt.md", "{{artist_name}} {{Künstler}}")
    assert main([*FILES, "--prompt-file", "prompt.md", "--model", "m"]) == 1
    assert "K\\udcfcnstler (read in the wrong encoding; " in said(capsys)


def test_a_file_in_another_encoding_is_refused_with_an_offer(capsys: pytest.CaptureFixture[str]) -> None:
    write("out.jsonl", OLD)
    rows = "".join(f"{number},A,x\n" for number in range(3, 30))
    assert convert(FOREIGN.encode("windows-1252") + rows.encode()) == 1
    assert said(capsys) == (
        "gen_batch_jsonl.py: warning: line 2: artist_name is not valid UTF-8; row skipped\n"
        "gen_batch_jsonl.py: warning: line 3: artist_name is not valid UTF-8; row skipped\n"
        "gen_batch_jsonl.py: error: 2 of 29 rows are not valid UTF-8, so the CSV has another encoding; "
        'if "Björk" on line 2 looks right, add --encoding windows-1252\n'
    )
    assert Path("out.jsonl").read_text() == OLD


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
    assert said(capsys) == (
        "gen_batch_jsonl.py: warning: line 2: artist_name is not valid windows-1252; row skipped\n"
        "gen_batch_jsonl.py: warning: 1 row is not valid windows-1252; name the encoding of the CSV with --encoding\n"
        "Wrote 1 request to out.jsonl (2 rows read, 1 skipped: 1 not valid windows-1252)\n"
    )


def test_strict_names_the_option_for_the_encoding(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(FOREIGN.encode("windows-1252"), "--strict") == 1
    assert said(capsys) == (
        "gen_batch_jsonl.py: error: line 2: artist_name is not valid UTF-8; "
        'if "Björk" on line 2 looks right, add --encoding windows-1252\n'
    )


@pytest.mark.parametrize("name", ["no-such", "base64", "undefined", "\0", "rot13", ""])
def test_an_unknown_encoding_exits_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        convert(FOREIGN, "--encoding", name)
    assert ended.value.code == 2
    assert "argument --encoding: not an encoding that Python knows" in said(capsys)


@pytest.mark.parametrize("name", ["unicode_escape", "utf-7", "cp037", "iso2022_jp"])
def test_an_unsuitable_encoding_ends_the_run_without_a_traceback(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(FOREIGN, "--encoding", name) in (0, 1)
    assert said(capsys).splitlines()[-1].startswith(("gen_batch_jsonl.py: error: ", "Wrote "))


# ---- sheets that are odd as a whole ----


@pytest.mark.parametrize(
    ("content", "written"),
    [
        (f'{HEADER}a1, "Smith, Ann" ,x\n', [("a1", "Smith, Ann", "x")]),
        (f'{HEADER}a1,\ufeff"Smith, Ann"\xa0,\u200b"x\ny" \n', [("a1", "Smith, Ann", "x\ny")]),
        (f'{HEADER}a1,A,x\n\ufeff"artist_id","artist_name","artist_data"\na2,B,y\n',
         [("a1", "A", "x"), ("a2", "B", "y")]),
        (f"{HEADER}a1,A\na2,B,y\n", [("a1", "A", ""), ("a2", "B", "y")]),
        ('artist_id\tartist_name\ta1\n1\t"Weird Bob" Smith\tx\n2\tB "C" D\ty\n',
         [("1", '"Weird Bob" Smith', ""), ("2", 'B "C" D', "")]),
        ('Artist_ID,Ku\u0308nstler,artist_name\na1,x,A\n', [("a1", "A", "")]),
    ],
)
def test_sheets_of_other_habits_are_read(content: str, written: list[tuple[str, ...]]) -> None:
    assert convert(content) == 0
    assert variables() == written


def test_column_names_are_compared_after_nfc() -> None:
    write("prompt.md", "{{artist_name}} {{K\u00fcnstler}}")
    write("in.csv", "artist_id,artist_name,Ku\u0308nstler\na1,A,x\n")
    assert main([*FILES, *TEMPLATE_ARGS, "--id-column", "artist_id"]) == 0
    assert requests()[0]["body"]["input"] == "A x"


@pytest.mark.parametrize(
    ("rows", "warning"),
    [
        ("a1,A\na2,B\n", "2 rows end early and were filled with empty values: lines 2, 3"),
        ('a1,"Weird" Al,x\n', f"line 2: text after a closing quote (noticed on line 2){TAKEN}"),
        ("a1,BjÃ¶rk,x\na2,SigurÃ°ur,y\n",
         'the text of 2 values was spoilt before it came here; first on line 2: "BjÃ¶rk", which would read "Björk"'),
        ("a1,Bj\ufffdrk,x\n", 'the text of 1 value was spoilt before it came here; first on line 2: "Bj\ufffdrk"'),
        ("1,2,3,4\n" * 3 + "a1,A,x\n",
         "3 rows were skipped; these rows have 4 fields; a value with a comma in it needs quotes around it"),
    ],
)
def test_what_is_odd_draws_a_warning(rows: str, warning: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(HEADER + rows) == 0
    assert f"gen_batch_jsonl.py: warning: {warning}" in said(capsys)


def test_a_spoilt_name_counts_once_although_the_metadata_has_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    write("prompt.md", "{{artist_name}}")
    write("in.csv", f"{HEADER}a1,BjÃ¶rk,x\n")
    assert main([*FILES, *TEMPLATE_ARGS]) == 0
    assert "spoilt" not in said(capsys)
    write("in.csv", f"{HEADER}a1,BjÃ¶rk,x\na2,SigurÃ°ur,y\n")
    assert main([*FILES, *TEMPLATE_ARGS]) == 0
    assert "the text of 2 values was spoilt" in said(capsys)


@pytest.mark.parametrize("rows", ["a1,BjÃ¶rk,x\n", "a1,CAFÉ»,x\na2,« café\xa0»,y\na3,CAFÉ»,x\n"])
def test_sound_names_draw_no_warning(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(HEADER + rows) == 0
    assert "spoilt" not in said(capsys)


@pytest.mark.parametrize("options", [(), ("--skip-header",)])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Our artists\n\nartist_id;artist_name\n1;A\n", "line 3 is the header; delete the lines above it"),
        ('"artist_id,artist_name,x"\n"a1,Ann,x"\n', "line 1: the whole line stands in quotes"),
        ('[{"artist_id": 1}]\n', "in.csv is JSON, not CSV"),
        ("<!DOCTYPE html>\n", "in.csv is HTML or XML, not CSV"),
        ("{\\rtf1\\ansi a}\n", "in.csv is a PDF or RTF document"),
        ("version https://git-lfs.github.com/spec/v1\n", "in.csv is a Git LFS pointer"),
    ],
)
def test_what_is_no_table_is_named(
    content: str, message: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(content, *options) == 1
    assert f"error: {message}" in said(capsys)


def test_a_title_of_three_fields_without_a_header_is_named_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"Artists,2024,draft\n{HEADER}1,A,x\n", "--skip-header") == 1
    assert "error: line 2 is the header; delete the lines above it" in said(capsys)


def test_rows_of_more_than_three_fields_without_a_header_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("1,A,x,y\n" * 3, "--skip-header") == 1
    assert "these rows have 4 fields; --skip-header takes 3: add a header line" in said(capsys)


@pytest.mark.parametrize(
    "row", ["a1,A\n", 'a1,"A" B,x\n']
)
def test_strict_refuses_what_is_filled_or_taken(row: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(HEADER + row, "--strict") == 1
    assert said(capsys).endswith("; without --strict the row is used\n")
