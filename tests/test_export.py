"""`batch_tool.py export`: a CSV of the bios, or the artists' own spreadsheet with them."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import (
    MODEL,
    OLD_BIOS,
    OTHER,
    Capture,
    Environment,
    Tool,
    chat,
    error,
    in_short,
    jsonl,
    leftovers,
    ok,
    refused,
    request,
    requests_file,
    response,
    result,
    rows,
    success,
    warning,
)
from faulty_api import Fault, FaultyAPI

import batch_tool
import gen_batch_jsonl

# ---- export ----


def export(tool: Tool, *options: object) -> int:
    """Export requests.jsonl with results.jsonl and further options to bios.csv."""
    return tool("export", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "bios.csv", *options)


def test_export_is_rfc_4180(tool: Tool, capsys: Capture) -> None:
    requests_file(request("a1"), request("a,2"), request("a3"))
    Path("results.jsonl").write_bytes(
        jsonl(success("a3", 'Say "yes",\nor\r\nno.'), success("a1", "뉴진스\u2028\x85\ud800\x00"), refused("a,2"))
    )
    assert tool("export", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "bios.csv") == 0
    assert Path("bios.csv").read_bytes().decode() == (
        "artist_id,artist_name,bio,error,input_tokens,output_tokens\r\n"
        "a1,Artist a1,뉴진스\u2028\x85?\x00,,12,4\r\n"
        '"a,2","Artist a,2",,server_error: Sorry.,,\r\n'
        'a3,Artist a3,"Say ""yes"",\nor\r\nno.",,12,4\r\n'
    )
    assert capsys.readouterr() == ("", (
        "Wrote bios.csv: 2 succeeded, 0 rejected, 1 retryable, 0 missing of 3 requests; tokens: 24 input, 8 output\n"
        "most common errors: 1 × server_error: Sorry.\n"
        "no bio: a,2 Artist a,2: server_error: Sorry.\n"
        "bios.csv: 2 of 3 artists have a bio; 1 to try again (run again)\n"
    ))


def test_the_first_twenty_artists_without_a_bio_are_named_and_why(tool: Tool, capsys: Capture) -> None:
    requests_file(*(request(f"a{number}") for number in range(1200)))
    Path("results.jsonl").write_bytes(jsonl(
        *(refused(f"a{number}", 400, "bad") for number in range(2)),
        result("a2", **ok({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}})),
        success("a3", request_sha256=OTHER),
        *(success(f"a{number}") for number in range(24, 1200)),
    ))
    assert export(tool) == 0
    assert capsys.readouterr().err.splitlines()[2:7] == [
        "no bio: a0 Artist a0: bad: Sorry.", "no bio: a1 Artist a1: bad: Sorry.",
        "no bio: a2 Artist a2: incomplete: max_output_tokens", "no bio: a3 Artist a3: outdated",
        "no bio: a4 Artist a4: missing",
    ]
    assert export(tool, "--out", "-") == 0
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "no bio: a19 Artist a19: missing",
        "stdout: 1,176 of 1,200 artists have a bio; "
        "3 rejected (change the row, or --include-rejected), 21 to try again (run again)",
    ]


@pytest.mark.parametrize(
    "body, name",
    [
        ({"prompt": {"id": "p", "variables": {"artist_name": "뉴진스"}}}, "뉴진스"),
        ({"metadata": {"artist_name": "Perfume"}}, "Perfume"),
        ({"prompt": "words", "metadata": None}, ""),
        ({"messages": []}, ""),
        ({"prompt": {"variables": {"artist_name": 7}}, "metadata": {"artist_name": "B"}}, "B"),
    ],
    ids=in_short,
)
def test_the_artists_name_is_in_the_request(body: Any, name: str, tool: Tool) -> None:
    requests_file(request("a1", body=body))
    assert rows(tool, "/dev/null") == [["a1", name, "", "missing", "", ""]]


@pytest.mark.parametrize(
    "usage, tokens",
    [
        ({"input_tokens": 3, "output_tokens": 0}, ["3", "0"]),
        ({"prompt_tokens": 3, "completion_tokens": 2}, ["3", "2"]),
        ({"input_tokens": "3", "output_tokens": True}, ["", ""]),
        (None, ["", ""]),
        ([], ["", ""]),
    ],
    ids=in_short,
)
def test_tokens_are_what_the_response_says(usage: Any, tokens: list[str], tool: Tool) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(result(response=response({"usage": usage}))))
    assert rows(tool, "results.jsonl")[0][4:] == tokens


def test_a_huge_line_is_exported(tool: Tool) -> None:
    bio = "x" * 5_000_000
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(success(bio=bio)))
    assert export(tool) == 0
    assert f",{bio},,12,4\r\n".encode() in Path("bios.csv").read_bytes()


def test_results_can_come_from_stdin(tool: Tool, monkeypatch: Environment) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(success()))
    with open("results.jsonl", encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert rows(tool, "-") == [["a1", "Artist a1", "A bio.", "", "12", "4"]]


def test_a_row_is_what_csv_would_write() -> None:
    chars = ["a", "é", "\u2028", " ", ",", '"', "\r", "\n", ";", "\t", ""]
    picked = random.Random(1)
    for _ in range(3000):
        fields = ["".join(picked.choices(chars, k=picked.randrange(6))) for _ in range(6)]
        expected = io.StringIO(newline="")
        csv.writer(expected).writerow(fields)
        assert batch_tool.csv_line(fields) == expected.getvalue().encode()


def test_an_export_that_fails_leaves_the_old_csv(tool: Tool, capsys: Capture) -> None:
    requests_file(request())
    Path("bios.csv").write_text(OLD_BIOS)
    assert tool("export", "--in", "requests.jsonl", "--results", "nope", "--out", "bios.csv") == 1
    assert capsys.readouterr() == ("", error("cannot read nope: No such file or directory"))
    assert (Path("bios.csv").read_text(), leftovers()) == (OLD_BIOS, [])


def test_export_to_stdout_is_the_csv_alone(tool: Tool, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    requests_file(request())
    Path("results.jsonl").write_bytes(jsonl(success()))
    assert tool("export", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "-") == 0
    out, err = capfdbinary.readouterr()
    assert out == b"artist_id,artist_name,bio,error,input_tokens,output_tokens\r\na1,Artist a1,A bio.,,12,4\r\n"
    assert err.startswith(b"Wrote to stdout: 1 succeeded, ")


def test_excel_gets_a_byte_order_mark_and_no_formulas(tool: Tool) -> None:
    bios = ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "Andr\u00e9", "x=1", " =1"]
    requests_file(*(request(f"a{number}") for number in range(len(bios))))
    Path("results.jsonl").write_bytes(jsonl(*(success(f"a{number}", bio) for number, bio in enumerate(bios))))
    assert export(tool) == 0
    plain = Path("bios.csv").read_bytes()
    assert export(tool, "--excel") == 0
    excel = Path("bios.csv").read_bytes()
    assert excel.startswith(b"\xef\xbb\xbfartist_id,")
    for content, guard in ((plain, ""), (excel[3:], "'")):
        found = [row["bio"] for row in csv.DictReader(io.StringIO(content.decode(), newline=""))]
        assert found == [f"{guard if number < 6 else ''}{bio}" for number, bio in enumerate(bios)]


# ---- the spreadsheet ----

HEADER = "artist_id,artist_name,artist_data"
ADDED = ",bio,error,input_tokens,output_tokens\r\n"


@pytest.fixture
def exported(work: Path) -> None:
    """Requests a1 to a3, of which a1 and a2 have results."""
    requests_file(*map(request, ("a1", "a2", "a3")))
    Path("results.jsonl").write_bytes(jsonl(success("a2", "Two."), success("a1", "One, first."), refused("a3")))


def spreadsheet(tool: Tool, content: str | bytes, *options: object) -> str:
    """Export with this spreadsheet. The CSV that is written."""
    Path("artists.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert export(tool, "--csv", "artists.csv", *options) == 0
    return Path("bios.csv").read_bytes().decode()


def test_the_spreadsheet_comes_back_with_its_rows_and_columns_as_they_are(
    exported: None, tool: Tool, capsys: Capture
) -> None:
    content = (
        "Country,Artist ID,Notes\n"
        'UK,a2," two  ""x""\nlines "\n'
        "KR,new,=1+1\n"
        "JP, a1 ,\n"
        "FR,a3,x\n"
    )
    assert spreadsheet(tool, content) == (
        f"Country,Artist ID,Notes{ADDED}"
        'UK,a2," two  ""x""\nlines ",Two.,,12,4\r\n'
        "KR,new,=1+1,,no request,,\r\n"
        'JP, a1 ,,"One, first.",,12,4\r\n'
        "FR,a3,x,,server_error: Sorry.,,\r\n"
    )
    assert capsys.readouterr() == ("", (
        "artists.csv: 1 row without a request\n"
        "Wrote bios.csv: 2 succeeded, 0 rejected, 1 retryable, 0 missing of 3 requests; tokens: 24 input, 8 output\n"
        "most common errors: 1 × server_error: Sorry.\n"
        "no bio: a3 Artist a3: server_error: Sorry.\n"
        "bios.csv: 2 of 3 artists have a bio; 1 to try again (run again)\n"
    ))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff", "sep={}{}", "\ufeffSEP={}{}", '"sep={}"{}'], ids=ascii)
def test_a_spreadsheet_is_read_as_the_converter_reads_it(
    delimiter: str, line_end: str, start: str, exported: None, tool: Tool
) -> None:
    lines = ["artist_id,artist_name", "a2,B", "", "a1,A"]
    content = line_end.join(lines).replace(",", delimiter)
    first = '"One, first."' if delimiter == "," else "One~ first."
    expected = f"artist_id,artist_name{ADDED}a2,B,Two.,,12,4\r\na1,A,{first},,12,4\r\n".replace(",", delimiter)
    mark = "\ufeff" if start.startswith("\ufeff") else ""
    assert spreadsheet(tool, start.format(delimiter, line_end) + content) == (
        mark + expected.replace("~", ",").replace(f"One{delimiter} first", "One, first")
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_beats_the_encoding(encoding: str, exported: None, tool: Tool) -> None:
    content = "artist_id,Stra\u00dfe\na2,\u00e9\ub274\n".encode(encoding)
    assert spreadsheet(tool, content, "--encoding", "ascii") == (
        f"\ufeffartist_id,Stra\u00dfe{ADDED}a2,\u00e9\ub274,Two.,,12,4\r\n"
    )


def test_the_encoding_of_the_spreadsheet_can_be_named(exported: None, tool: Tool, capsys: Capture) -> None:
    content = "artist_id,artist_name\na2,Bj\u00f6rk\n".encode("windows-1252")
    assert spreadsheet(tool, content, "--encoding", "windows-1252").endswith("a2,Bj\u00f6rk,Two.,,12,4\r\n")


def test_a_byte_that_is_wrong_draws_a_warning(exported: None, tool: Tool, capsys: Capture) -> None:
    assert spreadsheet(tool, b"artist_id,artist_name\na1,A\na2,Bj\xf6rk\n").endswith("\r\na2,Bj?rk,Two.,,12,4\r\n")
    assert capsys.readouterr().err.startswith(warning(
        "artists.csv: 1 of 2 rows cannot be decoded, first on line 3; each undecodable byte becomes a question "
        "mark; see --encoding"
    ))


@pytest.mark.parametrize(
    "content, options, reason",
    [
        (b"artist_id,x\na1,\xf6\na2,\xf6\n", [],
         ": 2 of 2 rows cannot be decoded, first on line 2; name the encoding with --encoding"),
        (b'artist_id,"x"y\na1,o\n', [],
         " line 1: the header has a quote too many or too few; its columns are artist_id, \"x\"y"),
        (b"PK\x03\x04\x14\0", [], " is an Excel workbook or another zip file; open it and save it as CSV UTF-8"),
        (b"K\xfcnstler,x\na1,o\n", ["--id-column", "Künstler"],
         ' line 1: the header has no column "Künstler"; its columns are K\\udcffnstler, x (read in the wrong encoding; '
         "name the right one with --encoding)"),
        (b"", [], " is empty; it needs a header and at least one row"),
        (b"\n ,\n", [], " is empty; it needs a header and at least one row"),
        (b"\nid,name\na1,o\n", [],
         " line 2: the header has no artist_id; its columns are id, name; name the right ones with --id-column, or use "
         "--skip-header if there is no header"),
        (b"Artist ID,artist_id\na1,o\n", [],
         ' line 1: the header names "artist_id" 2 times; its columns are Artist ID, artist_id'),
        (b"a,b\n1,2\n", ["--id-column", "c"],
         ' line 1: the header has no column "c"; its columns are a, b'),
        (b"a,b\n1,2\n", ["--name-column", "c", "--id-column", "a"],
         ' line 1: the header has no column "c"; its columns are a, b'),
        (b"artist_id,x\nb1,o\n", [],
         " has no row for any of 3 requests; choose the file that the requests were made of, or see --id-column"),

    ],
    ids=in_short,
)
def test_a_spreadsheet_that_cannot_be_matched_is_an_error(
    content: bytes, options: list[str], reason: str, exported: None, tool: Tool, capsys: Capture
) -> None:
    Path("artists.csv").write_bytes(content)
    assert export(tool, "--csv", "artists.csv", *options) == 1
    assert capsys.readouterr() == ("", error(f"artists.csv{reason}"))
    assert (Path("bios.csv").exists(), leftovers()) == (False, [])


@pytest.mark.parametrize("name", ["Kenn-Nummer", " kenn nummer ", "KENN_NUMMER"])
def test_the_id_column_can_be_named(name: str, exported: None, tool: Tool) -> None:
    content = "artist_id,Kenn Nummer\na1,a2\n"
    assert spreadsheet(tool, content, "--id-column", name).endswith("\na1,a2,Two.,,12,4\r\n")


@pytest.mark.parametrize(
    "content, expected",
    [
        ("artist_id,x\na1\na2,b\n", 'artist_id,x+a1,,"One, first.",,12,4\r\na2,b,Two.,,12,4\r\n'),
        ("x,artist_id\nb\nc,a2\n", "x,artist_id+b,,,no request,,\r\nc,a2,Two.,,12,4\r\n"),
        ("artist_id\na2,b,c\na1\n", 'artist_id,,+a2,b,c,,no request,,\r\na1,,,"One, first.",,12,4\r\n'),
        ("artist_id,x\na2,b,, \n", "artist_id,x+a2,b,Two.,,12,4\r\n"),
        ("artist_id,x\n,\n\n , \na2,b\n", "artist_id,x+a2,b,Two.,,12,4\r\n"),
        ("artist_id,x\na2,b\nArtist ID, X\na1,c\n", 'artist_id,x+a2,b,Two.,,12,4\r\na1,c,"One, first.",,12,4\r\n'),
        ("artist_id,x\na2,b\na2,c\n", "artist_id,x+a2,b,Two.,,12,4\r\na2,c,,no request,,\r\n"),
        ("artist_id,x\n,b\na2,c\n", "artist_id,x+,b,,no request,,\r\na2,c,Two.,,12,4\r\n"),
        ("artist_id,\na2,b\n", "artist_id,+a2,b,Two.,,12,4\r\n"),
        ('"artist\nid",x\na2,b\n', '"artist\nid",x+a2,b,Two.,,12,4\r\n'),
        ("\u200bartist_id,x\n\ufeffa2\u200b,b\n", "artist_id,x+\ufeffa2\u200b,b,Two.,,12,4\r\n"),
    ],
    ids=["short", "too short for an id", "long", "blank beyond", "blank rows", "repeated header", "repeated id",
         "no id", "column without a name", "lines in the header", "invisible blanks"],
)
def test_every_row_that_is_not_blank_is_accounted_for(
    content: str, expected: str, exported: None, tool: Tool
) -> None:
    assert spreadsheet(tool, content) == expected.replace("+", ADDED)


def test_requests_without_a_row_draw_a_warning(exported: None, tool: Tool, capsys: Capture) -> None:
    assert spreadsheet(tool, "artist_id,Name\nx,a1\na2,a2\n").endswith("x,a1,,no request,,\r\na2,a2,Two.,,12,4\r\n")
    assert capsys.readouterr().err.splitlines(keepends=True)[1] == warning(
        "artists.csv has no row for 2 requests, whose results are left out; see --id-column"
    )


def test_chat_completions_get_their_names_from_the_spreadsheet(tool: Tool) -> None:
    requests_file(request(url="/v1/chat/completions", body={"model": MODEL, "messages": []}))
    Path("results.jsonl").write_bytes(jsonl(result(**ok(chat(content="Bio.")))))
    assert rows(tool, "results.jsonl")[0][:3] == ["a1", "", "Bio."]
    assert spreadsheet(tool, f"{HEADER}\na1,NewJeans,x\n") == f"{HEADER}{ADDED}a1,NewJeans,x,Bio.,,,\r\n"


def test_a_changed_prompt_is_outdated_in_the_spreadsheet(exported: None, tool: Tool) -> None:
    Path("results.jsonl").write_bytes(jsonl(success("a1", request_sha256=OTHER)))
    assert spreadsheet(tool, "artist_id\na1\na2\n") == f"artist_id{ADDED}a1,,outdated,,\r\na2,,missing,,\r\n"


def test_a_spreadsheet_can_be_written_for_excel_and_come_from_stdin(
    exported: None, tool: Tool, monkeypatch: Environment
) -> None:
    Path("artists.csv").write_text("artist_id,x\na2,=1\n")
    with open("artists.csv", encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert export(tool, "--csv", "-", "--excel") == 0
    assert Path("bios.csv").read_bytes().decode() == f"\ufeffartist_id,x{ADDED}a2,=1,Two.,,12,4\r\n"


def test_a_field_of_any_length_comes_back(exported: None, tool: Tool) -> None:
    field = "x" * 300_000
    assert spreadsheet(tool, f"artist_id,x\na2,{field}\n").endswith(f"\na2,{field},Two.,,12,4\r\n")


# ---- answers with fields ----

PROPERTIES = {"bio": {"type": "string"}, "bio_short": {"type": ["string", "null"]}, "uncertain": {"type": "array"}}
SCHEMA = {"name": "bio", "strict": True, "schema": {"type": "object", "properties": PROPERTIES}}
FIELDS = ["artist_id", "artist_name", "bio", "bio_short", "uncertain", "error", "input_tokens", "output_tokens"]
AS_RESPONSE = {"text": {"format": {"type": "json_schema", **SCHEMA}}}
AS_CHAT = {"response_format": {"type": "json_schema", "json_schema": SCHEMA}}

# the text of an answer, and its cells; none are those of no JSON object
ANSWERS: dict[str, tuple[str, list[str] | None]] = {
    "all": ('{"uncertain": ["born in 1994"], "bio": "Bio.", "bio_short": "B."}', ["Bio.", "B.", '["born in 1994"]']),
    "null and numbers": ('{"bio": "뉴진스", "bio_short": null, "uncertain": 0.5}', ["뉴진스", "", "0.5"]),
    "other properties": ('{"bio": true, "more": 1}', ["true", "", ""]),
    "no properties": ("{}", ["", "", ""]),
    "an object in it": ('\n {"bio": {"de": "é"}}\n', ['{"de": "é"}', "", ""]),
    "a code fence": ('```json\n{"bio": "```"}\n```\n', ["```", "", ""]),
    "a code fence on one line": ('``` {"bio": "Bio."}```', ["Bio.", "", ""]),
    "another code fence": ('\n~~~\n{"bio": "Bio."}\n~~~', ["Bio.", "", ""]),
    "thoughts before it": ('<think>{}</think>\n{"bio": "Bio."}', ["Bio.", "", ""]),
    "words": ("Bio.", None),
    "words before it": ('Here it is: {"bio": "Bio."}', None),
    "a list": ('["Bio."]', None),
    "cut": ('{"bio": "Bi', None),
    "no JSON": ('{"bio": NaN}', None),
    "deep": ("[" * 100_000, None),
}


@pytest.mark.parametrize("words, cells", list(ANSWERS.values()), ids=list(ANSWERS))
@pytest.mark.parametrize("is_chat", [False, True], ids=["Response", "chat"])
def test_the_properties_of_the_schema_are_columns(
    is_chat: bool, words: str, cells: list[str] | None, tool: Tool, capsys: Capture
) -> None:
    body = request()["body"] | (AS_CHAT if is_chat else AS_RESPONSE)
    requests_file(request(body=body), request("a2", body=body))
    lines = jsonl(result(**ok(chat(content=words))) if is_chat else success(bio=words), refused("a2"))
    Path("results.jsonl").write_bytes(lines)
    Path("empty.jsonl").touch()
    for results in (["results.jsonl"], ["results.jsonl", "empty.jsonl"]):  # in one pass, and by the index
        (_, *answer, error, _, _), second = rows(tool, *results)
        assert (answer[1:], error) == (cells or ["", "", ""], "" if cells else "invalid_json")
        assert second == ["a2", "Artist a1", "", "", "", "server_error: Sorry.", "", ""]
    assert Path("bios.csv").read_text().partition("\n")[0] == ",".join(FIELDS)
    retry = ["retry", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "again.jsonl"]
    assert tool(*retry) == tool(*retry, "--include-rejected") == 0
    assert capsys.readouterr().out == f"Requests to retry: 1\nRequests to retry: {1 if cells else 2}\n"


def test_fields_that_only_a_later_request_wants_are_columns_too(tool: Tool) -> None:
    requests_file(request(), request("a2", body=request()["body"] | AS_RESPONSE))
    Path("results.jsonl").write_bytes(jsonl(success(bio='{"bio": 1}'), success("a2", bio='{"bio": 2}')))
    assert [row[2] for row in rows(tool, "results.jsonl")] == ["1", "2"]
    assert Path("bios.csv").read_text().partition("\n")[0] == ",".join(FIELDS)


def test_run_does_not_send_again_what_is_no_json(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    requests_file(request(body=request()["body"] | AS_RESPONSE))
    Path("results.jsonl").write_bytes(jsonl(success(bio="Words.")))
    assert tool("run", "--in", "requests.jsonl", "--out", "results.jsonl") == 1
    assert "\nmost common errors: 1 × invalid_json\n" in capsys.readouterr().err
    assert not api.batches


def test_preview_prints_the_fields_by_name(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    requests_file(*(request(name, body=request()["body"] | AS_RESPONSE) for name in ("a1", "a2")))
    for words in ('{"uncertain": [], "bio": "One.\\nTwo.", "bio_short": null}', "Sorry."):
        body = json.dumps(success(bio=words)["response"]["body"]).encode()
        api.faults.append(Fault("POST", "/responses$", status=200, body=body))
    assert tool("preview", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == (
        "a1 Artist a1\nbio: One.\nTwo.\nbio_short:\nuncertain: []\n\na2 Artist a1\nSorry.\nerror: invalid_json\n"
    )


# ---- both scripts read one file ----


def odd_sheet(rng: random.Random) -> bytes:
    """A CSV with stray quotes, blanks around quotes, short and long rows, repeated ids and headers, and bad bytes."""
    pieces = [
        "a1", "a2", "b", '"', '""', '"b', 'c"', ' "d" ', "\ufeff", "\xa0", ",", ",", ",", "\n", "\n", "\n", "x,y\n",
        ",,\n", "a1,A,x\n", 'a2,"B, C",y\n', 'a3, "D" ,"e\nf"\n', "a4,E\n", 'a5,"F" G,z\n', 'a1,"H\n', "a6,\udcff,z\n",
        "artist_id,artist_name,artist_data\n", "a7,I,\udcff\n", "a7,J,y\n", "a8,K,y,\n", "a8,L,y,z\n",
    ]
    text = "artist_id,artist_name,artist_data\n" + "".join(rng.choices(pieces, k=rng.randrange(30)))
    newline, delimiter = rng.choice(["\n", "\r\n", "\r"]), rng.choice([",", ";", "\t", "|"])
    text = text.translate({ord("\n"): newline, ord(","): delimiter})
    return rng.choice([b"", b"\xef\xbb\xbf"]) + text.encode(errors="surrogateescape") + rng.choice([b"", b"a9,Z,z"])


def test_each_request_of_an_odd_sheet_gets_its_bio_in_its_own_row(
    work: Path, tool: Tool, capsys: Capture
) -> None:
    converted = 0
    for seed in range(120):
        Path("artists.csv").write_bytes(content := odd_sheet(random.Random(seed)))
        code = gen_batch_jsonl.main(["--in", "artists.csv", "--out", "requests.jsonl", "--prompt-id", "p"])
        said = capsys.readouterr().err
        if code:
            continue
        requests = [json.loads(line) for line in Path("requests.jsonl").read_bytes().splitlines()]
        values = {each["custom_id"]: [*each["body"]["prompt"]["variables"].values()] for each in requests}
        Path("results.jsonl").write_bytes(jsonl(*(success(each, f"Bio of {each}.") for each in values)))
        assert export(tool, "--csv", "artists.csv") == 0, (seed, content)
        delimiter = re.search(b"artist_id(.)", content)[1].decode()
        text = io.StringIO(Path("bios.csv").read_bytes().decode("utf-8-sig"), newline="")
        header, *rows = csv.reader(text, delimiter=delimiter)
        read, repeated = (re.search(pattern, said) for pattern in (r"(\d+) rows? read", r"(\d+) repeated header"))
        assert len(rows) == int(read[1]) - (int(repeated[1]) if repeated else 0), (seed, content)
        with_bio = {row[header.index("bio")]: [field.strip(batch_tool.BLANKS) for field in row] for row in rows}
        assert {bio: row[:3] for bio, row in with_bio.items() if bio} == {
            f"Bio of {each}.": [each, *values[each]] for each in values
        }, (seed, content)
        assert [row[-3] for row in rows].count("no request") == len(rows) - len(values), (seed, content)
        converted += len(values)
    assert converted > 200


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ('artist_id;artist_name\na1;\na1;A "x" B\n', [],
         'artist_id;artist_name;+a1;;;no request;;\r\na1;"A ""x"" B";One, first.;;12;4\r\n'),
        ('artist_id,artist_name\na1,"A\na2,"B" b\n', [],
         'artist_id,artist_name,+"a1,""A",,,no request,,\r\na2,"""B"" b",Two.,,12,4\r\n'),
        ("artist_id,artist_name\na2,B,c\na2,B\n", [],
         "artist_id,artist_name,,+a2,B,c,,no request,,\r\na2,B,,Two.,,12,4\r\n"),
        ("Nr,Artist\na2,B\n", ["--id-column", "nr", "--name-column", "artist"], "Nr,Artist,+a2,B,Two.,,12,4\r\n"),
        ("a2,B,x\n", ["--skip-header"], "artist_id,artist_name,artist_data,+a2,B,x,Two.,,12,4\r\n"),
    ],
    ids=["a row that the converter skips", "stray quotes", "too long", "named columns", "no header"],
)
def test_the_bio_stands_in_the_row_that_the_converter_takes(
    content: str, options: list[str], expected: str, exported: None, tool: Tool
) -> None:
    delimiter = ";" if ";" in content else ","
    ours = ADDED.removeprefix(",").replace(",", delimiter)
    assert spreadsheet(tool, content, *options) == expected.replace("+", ours)


def test_a_column_named_like_one_of_ours_stays(exported: None, tool: Tool, capsys: Capture) -> None:
    assert spreadsheet(tool, "artist_id,Bio\na2,old\n") == f"artist_id,Bio{ADDED}a2,old,Two.,,12,4\r\n"
    said = capsys.readouterr().err
    assert warning('artists.csv has a column "bio" already; the new one is the last of that name') in said


def test_only_bios_are_replaced_by_bios(exported: None, tool: Tool, capsys: Capture) -> None:
    Path("bios.csv").write_text("artist_id,artist_name\na1,A\n")
    assert export(tool) == 1
    assert capsys.readouterr().err == error(
        "bios.csv holds something other than exported bios, so it was left as it is; choose another --out"
    )
    Path("bios.csv").write_text('"artist_id";"bio";"error";"input_tokens";"output_tokens"\n')
    assert export(tool) == 0


def test_an_export_into_a_workbook_is_a_usage_error(tool: Tool, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        tool("export", "--in", "requests.jsonl", "--results", "results.jsonl", "--out", "Bios.XLSX")
    assert ended.value.code == 2
    assert "choose an --out that ends in .csv: Bios.XLSX" in capsys.readouterr().err
