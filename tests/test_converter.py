"""gen_batch_jsonl.py: the requests that it writes, its files, messages, options and signals."""

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
    run_script,
    said,
    variables,
    write,
)

import gen_batch_jsonl as gen
from gen_batch_jsonl import main

pytestmark = pytest.mark.usefixtures("work")

SCRIPT = "gen_batch_jsonl.py"
SAMPLE = ROOT / "samples" / "input.csv"
TEMPLATED = ("--prompt-file", str(ROOT / "samples" / "bio_prompt.md"), "--model", "m")


def feed_stdin(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))


# ---- text ----


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
    assert gen.escape(line.encode()).decode() == escaped.replace('"', '\\"')
    write("prompt.md", "{{artist_name}} " + line)
    write("in.csv", f"{HEADER}1,A,x\n")
    assert gen.main([*FILES, *TEMPLATE_ARGS]) == 0
    assert escaped.replace('"', '\\"') in Path("out.jsonl").read_text()


def test_a_long_value_is_cut_in_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 100
    assert convert(f"{HEADER}{long},A,\n{long},B,\n") == 0
    shown = f'"{"x" * 80}…"'
    assert f"line 3: artist_id {shown} was already used on line 2; row skipped\n" in said(capsys)


# ---- files ----


def test_the_current_directory_holds_the_output_and_nothing_else() -> None:
    assert convert(f"{HEADER}1,A,x\n") == 0
    assert sorted(os.listdir()) == ["in.csv", "out.jsonl"]


def test_missing_parent_directories_are_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--in", str(SAMPLE), "--out", "new dir/é/out.jsonl", *STORED]) == 0
    assert len(requests("new dir/é/out.jsonl")) == 3
    assert said(capsys) == "Wrote 3 requests to new dir/é/out.jsonl (3 rows read, 0 skipped)\n"


def test_a_new_file_has_the_permissions_of_the_umask() -> None:
    before = os.umask(0o027)
    try:
        assert convert(f"{HEADER}1,A,x\n") == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("out.jsonl").st_mode) == 0o640


def test_an_existing_file_keeps_its_permissions() -> None:
    write("out.jsonl", OLD).chmod(0o604)
    assert convert(f"{HEADER}1,A,x\n") == 0
    assert stat.S_IMODE(os.stat("out.jsonl").st_mode) == 0o604


@pytest.mark.parametrize("exists", [True, False])
def test_a_symlink_is_followed(exists: bool) -> None:
    Path("there").mkdir()
    if exists:
        write("there/real.jsonl", OLD)
    Path("out.jsonl").symlink_to("there/real.jsonl")
    assert convert(f"{HEADER}1,A,x\n") == 0
    assert Path("out.jsonl").is_symlink()
    assert len(requests("there/real.jsonl")) == 1
    assert os.listdir("there") == ["real.jsonl"]


def test_after_a_failure_the_old_file_is_as_it_was() -> None:
    write("out.jsonl", OLD)
    assert convert(f"{HEADER}{'1,A,x' + 9000 * 'y'}\n" + "2,,x\n" * 3000, "--strict") == 1
    assert Path("out.jsonl").read_text() == OLD
    assert sorted(os.listdir()) == ["in.csv", "out.jsonl"]


@pytest.mark.parametrize(
    ("source", "message"),
    [("missing.csv", "cannot read missing.csv: No such file or directory"), (".", "cannot read .: Is a directory")],
)
def test_an_input_that_cannot_be_read_is_named(
    source: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--in", source, "--out", "out.jsonl", *STORED]) == 1
    assert printed(capsys) == ("", f"gen_batch_jsonl.py: error: {message}\n")


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
    assert printed(capsys) == ("", f"gen_batch_jsonl.py: error: {message}\n")


def test_an_error_of_reading_is_not_blamed_on_the_output() -> None:
    class Failing(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            if self.tell() > len(HEADER):
                raise OSError(errno.EIO, "Input/output error")
            return super().read1(size)

    reader = gen.BlockReader(Failing(f"{HEADER}1,A,x\n".encode()), "in.csv", "utf-8")  # type: ignore[arg-type]
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
        out, err = printed(capsys)
        assert json.loads(out)["custom_id"] == "1"
        assert err == "Wrote 1 request to stdout (1 row read, 0 skipped)\n"


def test_what_was_written_to_stdout_before_a_failure_stays(capsys: pytest.CaptureFixture[str]) -> None:
    write("in.csv", f"{HEADER}1,A,{'x' * 300_000}\n2,,x\n")  # more than a block
    assert main(["--in", "in.csv", "--out", "-", *STORED, "--strict"]) == 1
    out, err = printed(capsys)
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
    assert said(capsys) == error
    assert sorted(os.listdir()) == ["in.csv", "out.jsonl"]


# ---- requests ----

TEMPLATE = "Write about {{artist_name}}.\nFacts: {{ artist_data }}\n"


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
    names = [*gen.COLUMNS, "born", "Born", "", "country"]
    table = gen.Table(",", names, [*map(gen.column_key, names)], roles, True)
    with pytest.raises(gen.CommandError) as error:
        gen.fill_placeholders(text, "prompt.md", table, str, gen.Console(None))
    assert gen.escape_controls(str(error.value)) == message


@BAD_TEMPLATES
def test_a_bad_template_ends_the_run(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("prompt.md", text)
    write("in.csv", "artist_id,artist_name,artist_data,born,Born,,country\n1,A,x,1,2,,3\n")
    assert main([*FILES, *TEMPLATE_ARGS]) == 1
    assert printed(capsys) == ("", f"gen_batch_jsonl.py: error: {message}\n")
    assert not Path("out.jsonl").exists()


@pytest.mark.parametrize("option", ["--prompt-file", "--instructions-file", "--body-file"])
@pytest.mark.usefixtures("template")
def test_a_text_file_that_is_missing_or_not_utf_8_ends_the_run(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("in.csv", f"{HEADER}1,A,x\n")
    write("bad", b"ab\xff")
    assert main([*FILES, *TEMPLATE_ARGS, option, "bad"]) == 1
    assert said(capsys) == (
        "gen_batch_jsonl.py: error: bad: not valid UTF-8 (byte 3); save it as UTF-8\n"
    )
    assert main([*FILES, *TEMPLATE_ARGS, option, "no"]) == 1
    assert said(capsys) == "gen_batch_jsonl.py: error: cannot read no: No such file or directory\n"


BAD_BODY_FILES = pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "body.json: not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        ('{"a": NaN}', "body.json: not valid JSON: Out of range float values are not JSON compliant"),
        ('{"a": -Infinity}', "body.json: not valid JSON: Out of range float values are not JSON compliant"),
        ("[1]", 'body.json: not a JSON object; write the fields as {"max_output_tokens": 400, ...}'),
        ('{"model": "x"}', 'body.json: this tool writes the field "model" itself; name the model with --model'),
        ('{"prompt": 1}', 'body.json: this tool writes the field "prompt" itself; remove it from the file'),
    ],
)


@BAD_BODY_FILES
def test_a_bad_body_file_is_refused(text: str, message: str) -> None:
    write("body.json", text)
    with pytest.raises(gen.CommandError) as failure:
        gen.read_body_fields("body.json", {"prompt": {}})
    assert str(failure.value).startswith(message)


@BAD_BODY_FILES
def test_a_bad_body_file_ends_the_run(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("body.json", text)
    assert convert(f"{HEADER}1,A,x\n", "--body-file", "body.json") == 1
    out, err = printed(capsys)
    assert (out, err.count("\n"), err.startswith(f"gen_batch_jsonl.py: error: {message}")) == ("", 1, True)


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


# ---- conversion ----


def test_without_a_model_one_warning_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--in", str(SAMPLE), "--out", "out.jsonl", "--prompt-id", "p"]) == 0
    assert printed(capsys) == ("", (
        "gen_batch_jsonl.py: warning: no --model (or MODEL): the Batch API refuses requests without body.model\n"
        "Wrote 3 requests to out.jsonl (3 rows read, 0 skipped)\n"
    ))


def test_skips_are_counted_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}1,A,x\n,B,x\n1,C,x\n,D,x\n3,E,y,z\n") == 0
    assert said(capsys).splitlines()[-1] == (
        "Wrote 1 request to out.jsonl (5 rows read, 4 skipped: 2 empty artist_id, 1 duplicate artist_id, "
        "1 wrong number of fields)"
    )


def test_twenty_skipped_rows_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}1,A,x\n" + "1,B,x\n" * 20) == 0
    assert said(capsys).count("; row skipped\n") == 20
    assert convert(f"{HEADER}1,A,x\n" + "1,B,x\n" * 25) == 0
    *listed, more, _ = said(capsys).splitlines()
    assert len(listed) == 20
    assert more == "gen_batch_jsonl.py: warning: more rows were skipped; --verbose lists all of them"


def test_verbose_lists_every_skipped_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("artist_name;artist_id;x;artist_data\nA;1;;x\n" + "B;1;;x\n" * 25, "--verbose") == 0
    *listed, _ = said(capsys).splitlines()
    assert [line.split(": ")[2] for line in listed] == [f"line {number}" for number in range(3, 28)]


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ("2,,x\n", "line 3: artist_name is empty"),
        ("2\n", f'line 3: 1 field instead of 3 in "2"; {MISSING}'),
        ('2,B,"x\n', "line 3: a quote is never closed (noticed at the end, line 4)"),
    ],
)
def test_strict_ends_at_the_first_invalid_row(row: str, detail: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}1,A,x\n{row},,y\n", "--strict") == 1
    assert printed(capsys) == ("", f"gen_batch_jsonl.py: error: {detail}; without --strict the row is skipped\n")
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
    write("out.jsonl", OLD)
    assert convert(HEADER + rows) == 1
    assert said(capsys).splitlines()[-1] == (
        f"gen_batch_jsonl.py: error: no valid row in in.csv ({accounted}); nothing was written"
    )
    assert Path("out.jsonl").read_text() == OLD


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
    assert f"({written} row{'s' if written > 1 else ''} read, 0 skipped)" in said(capsys)


def test_limit_counts_skipped_rows_and_not_blank_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}\n1,,x\n\n2,B,x\n3,,x\n", "--limit", "2") == 0
    assert said(capsys).endswith("(2 rows read, 1 skipped: 1 empty artist_name)\n")


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


# ---- progress ----


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
    finished = run_script(SCRIPT, "--in", SAMPLE, "--out", "out.jsonl", *TEMPLATED, capture_output=False,
                          stderr=terminal.stream)
    assert finished.returncode == 0
    assert terminal.shown() == "Wrote 3 requests to out.jsonl (3 rows read, 0 skipped)\r\n"


# ---- command line ----

USAGE_ERRORS = pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ("--out o --prompt-id p", {}, "the following arguments are required: --in"),
        ("--in i --prompt-id p", {}, "the following arguments are required: --out"),
        ("--in i --out o", {},
         "one prompt is required: --prompt-file or --prompt-id (or else PROMPT_FILE or PROMPT_ID)"),
        ("--in i --out o", {"PROMPT_ID": "", "PROMPT_FILE": ""},
         "one prompt is required: --prompt-file or --prompt-id (or else PROMPT_FILE or PROMPT_ID)"),
        ("--in i --out o --prompt-id p --prompt-file f", {},
         "argument --prompt-file: not allowed with argument --prompt-id"),
        ("--in i --out o", {"PROMPT_ID": "p", "PROMPT_FILE": "f"},
         "one prompt is required: --prompt-file or --prompt-id (or else PROMPT_FILE or PROMPT_ID)"),
        ("--in i --out o --prompt-file f", {}, "--model is required with a prompt file (or MODEL)"),
        ("--in i --out o", {"PROMPT_FILE": "f", "MODEL": ""}, "--model is required with a prompt file (or MODEL)"),
        ("--in i --out o --prompt-file f --model m --prompt-version 1", {},
         "--prompt-version goes with --prompt-id, not with a prompt file"),
        ("--in i --out o --prompt-version 1", {"PROMPT_FILE": "f", "MODEL": "m"},
         "--prompt-version goes with --prompt-id, not with a prompt file"),
        ("--in i --out o --prompt-id p --instructions-file f", {},
         "--instructions-file, --schema and --endpoint go with --prompt-file, not with a stored prompt"),
        ("--in i --out o --prompt-id p --endpoint /v1/chat/completions", {},
         "--instructions-file, --schema and --endpoint go with --prompt-file, not with a stored prompt"),
        ("--in i --out o --prompt-id p --limit 0", {}, "argument --limit: not a whole number of 1 or more: '0'"),
        ("--in i --out o --prompt-id p --limit ١", {}, "argument --limit: not a whole number of 1 or more: '\\u0661'"),
        ("--in i --out o --prompt-id p --str", {}, "unrecognized arguments: --str"),
        ("--in i --out o --prompt-id p x\x1b", {}, "unrecognized arguments: x\\u001b"),
        ("--in i --out o/ --prompt-id p", {}, "argument --out: not the name of a file: 'o/'"),
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
    out, err = printed(capsys)
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
    assert "not a path that ends in /responses or /chat/completions: '/v1/embeddings'" in said(capsys)


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
        source = "-" if how == "stdin" else "in.csv"
        finished = run_script(SCRIPT, "--in", source, "--out", destination, *STORED, stdin=stdin)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].endswith("is both an input and the output; choose another --out")
    assert Path("in.csv").read_text() == content


def test_appending_stdout_to_the_input_exits_2() -> None:
    write("in.csv", f"{HEADER}1,A,x\n")
    with open("in.csv", "ab") as stdout:
        finished = run_script(SCRIPT, "--in", "in.csv", "--out", "-", *STORED,
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
    assert said(capsys).endswith("text is both an input and the output; choose another --out\n")


def test_a_terminal_or_dev_null_may_be_read_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--in", "/dev/null", "--out", "/dev/null", *STORED]) == 1
    assert "the CSV is empty" in said(capsys)


def test_help_is_the_manual_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out, err = printed(capsys)
    assert err == ""
    assert gen.__doc__ and gen.__doc__.strip() in out
    options = ("--in CSV", "--out JSONL", "--prompt-id ID", "--prompt-file FILE", "--prompt-version V", "--endpoint",
               "--instructions-file FILE", "--model MODEL", "--body-file JSON", "--limit N", "--skip-header",
               "--encoding NAME", "--id-column NAME", "--name-column NAME", "--data-column NAME",
               "--strict", "--verbose")
    assert all(option in out for option in options)


# ---- main ----


def wait_for_temporary_file() -> None:
    deadline = time.monotonic() + 30
    while not any(name.endswith(".tmp") for name in os.listdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def waiting_conversion(**options: Any) -> Iterator[subprocess.Popen[str]]:
    """A conversion over an old out.jsonl that has begun its output and waits for more rows on stdin."""
    write("out.jsonl", OLD)
    command = [sys.executable, str(ROOT / SCRIPT), "--in", "-", "--out", "out.jsonl", *TEMPLATED]
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
    assert Path("out.jsonl").read_text() == OLD


def test_a_kill_leaves_the_old_file() -> None:
    with waiting_conversion() as process:
        process.kill()
    assert Path("out.jsonl").read_text() == OLD


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
    for _ in range(6):
        write("out.jsonl", OLD)
        command = [sys.executable, ROOT / SCRIPT, *FILES, *TEMPLATED]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            time.sleep(rng.uniform(0.03, 0.2))
            process.terminate()
        codes[process.returncode] += 1
        assert sorted(os.listdir()) == ["in.csv", "out.jsonl"]
        content = Path("out.jsonl").read_bytes()
        assert content == OLD.encode() or content.count(b"\n") == 20_000
    assert set(codes) <= {0, 143, -signal.SIGTERM}


@pytest.mark.parametrize("output", ["stdout", "fifo"])
def test_a_signal_ends_a_run_whose_reader_stands_still(output: str) -> None:
    write("in.csv", HEADER + "".join(f"{number},A,{'x' * 200}\n" for number in range(5_000)))
    os.mkfifo("fifo")
    destination = "-" if output == "stdout" else "fifo"
    command = [sys.executable, str(ROOT / SCRIPT), "--in", "in.csv", "--out", destination, *TEMPLATED]
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
    command = [sys.executable, "-X", "importtime", str(ROOT / SCRIPT), "--in", "-", "--out", "out.jsonl", *TEMPLATED]
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
        command = [sys.executable, str(ROOT / SCRIPT), "--in", "in.csv", "--out", "-", *TEMPLATED]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        with subprocess.Popen(command, stdout=writing, stderr=subprocess.DEVNULL, env=environment) as process:
            os.close(writing)
            time.sleep(0.3)
            with open(reading, "rb") as pipe:
                assert pipe.read().count(b"\n") == 5000
        assert process.returncode == 0


def shell(command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a bash command in which GEN stands for the script with a prompt template."""
    command = command.replace("GEN", f"{sys.executable} {ROOT / SCRIPT} {' '.join(TEMPLATED)}")
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
def test_closed_and_full_streams_end_the_run_without_a_traceback(command: str, code: int, message: str) -> None:
    for unbuffered in ["", "1"] if "--out -" in command or "--help" in command else [""]:
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
    write("out.jsonl", OLD)
    finished = shell("ulimit -f 100; GEN --in in.csv --out out.jsonl")
    assert finished.returncode == 1
    assert finished.stderr == "gen_batch_jsonl.py: error: cannot write out.jsonl: File too large\n"
    assert sorted(os.listdir()) == ["in.csv", "out.jsonl"]
    assert Path("out.jsonl").read_text() == OLD


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
    finished = run_script(SCRIPT, "--in", "ü é/in.csv", "--out", "ü é/out.jsonl", *TEMPLATE_ARGS, env=environment)
    assert finished.returncode == 0
    assert requests("ü é/out.jsonl")[0]["body"]["input"] == "Über Björk: 東"
    piped = run_script(SCRIPT, "--in", "ü é/in.csv", "--out", "-", *TEMPLATE_ARGS, env=environment)
    assert piped.stdout == Path("ü é/out.jsonl").read_text(encoding="utf-8")


def test_the_script_runs_alone_on_the_standard_library() -> None:
    command = [sys.executable, "-S", "-I", str(write("copy.py", (ROOT / SCRIPT).read_bytes()))]
    finished = subprocess.run([*command, "--in", SAMPLE, "--out", "out.jsonl", *TEMPLATED], capture_output=True)
    assert (finished.returncode, finished.stdout) == (0, b"")
    assert len(requests()) == 3


def test_importing_the_script_is_cheap_and_does_nothing() -> None:
    heavy = {"asyncio", "dataclasses", "http.client", "inspect", "logging", "openai", "shutil", "ssl", "subprocess"}
    program = f"import sys, gen_batch_jsonl; print(sorted({heavy} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (finished.stdout, finished.stderr) == ("[]\n", "")


def test_the_exit_code_of_the_process_is_that_of_main() -> None:
    assert run_script(SCRIPT, "--in", SAMPLE, "--out", "out.jsonl", *TEMPLATED).returncode == 0
    assert run_script(SCRIPT, "--in", "missing.csv", "--out", "out.jsonl", *TEMPLATED).returncode == 1
    assert run_script(SCRIPT, "--in", SAMPLE).returncode == 2


# ---- what stands at --out, other systems ----


@pytest.mark.parametrize("old", [HEADER, "notes\n", '{"custom_id": "a1", "response": {}, "error": null}\n', "[1]"])
def test_a_file_of_another_kind_is_not_replaced(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("out.jsonl", old)
    assert convert(f"{HEADER}1,A,x\n") == 1
    assert said(capsys) == (
        "gen_batch_jsonl.py: error: out.jsonl holds something other than requests, so it was left as it is; "
        "choose another --out\n"
    )
    assert Path("out.jsonl").read_text() == old


def test_an_empty_file_and_earlier_requests_are_replaced() -> None:
    write("out.jsonl", "")
    assert [convert(f"{HEADER}{number},A,x\n") for number in range(2)] == [0, 0]
    assert variables() == [("1", "A", "x")]


@pytest.mark.parametrize("script", ["gen_batch_jsonl.py", "batch_tool.py"])
def test_windows_is_told_of_wsl(script: str) -> None:
    program = f"import os, runpy; os.name = 'nt'; runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    said = "it needs Python 3.11 or later on Linux or macOS; on Windows, run it in WSL"
    assert done.stderr.startswith(f"{script}: error: {said}")


def test_a_stored_prompt_draws_a_warning_that_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(f"{HEADER}1,A,x\n") == 0
    assert "OpenAI shuts stored prompts down on 2026-11-30" in capsys.readouterr().err


@pytest.mark.parametrize("endpoint", ["/chat/completions", "/openai/v1/chat/completions", "/v2/responses"])
def test_the_endpoint_is_a_path_by_its_end(endpoint: str) -> None:
    write("prompt.md", "{{artist_name}}")
    write("in.csv", f"{HEADER}1,A,x\n")
    assert main([*FILES, *TEMPLATE_ARGS, "--endpoint", endpoint]) == 0
    assert requests()[0]["url"] == endpoint
    assert ("messages" in requests()[0]["body"]) == endpoint.endswith("/chat/completions")


def test_typographic_quotes_in_the_body_file_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    write("body.json", "{“max_output_tokens”: 400}")
    assert convert(f"{HEADER}1,A,x\n", "--body-file", "body.json") == 1
    assert "it has typographic quotes (“), where JSON needs plain ones" in said(capsys)


def test_the_warning_that_data_is_missing_comes_only_if_the_prompt_uses_it(capsys: pytest.CaptureFixture[str]) -> None:
    write("in.csv", "artist_id,artist_name,born\n1,A,x\n")
    for template, warned in (("{{artist_name}} {{born}}", False), ("{{artist_name}} {{artist_data}}", True)):
        write("prompt.md", template)
        assert main([*FILES, *TEMPLATE_ARGS]) == 0
        assert ("has no artist_data column" in said(capsys)) == warned


# ---- answers with fields ----

SCHEMA = '{"type": "object", "properties": {"bio": {"type": "string"}, "more": {"type": "object", "required": ["x"], ' \
         '"properties": {"x": {"type": "string"}, "properties": {"type": ["number", "null"]}}}}}'


@pytest.mark.parametrize("endpoint", ["/v1/responses", "/v1/chat/completions"])
def test_a_schema_is_made_strict_at_every_level(endpoint: str) -> None:
    write("long bio.json", SCHEMA)
    write("prompt.md", "{{artist_name}}")
    write("in.csv", f"{HEADER}1,A,x\n")
    assert main([*FILES, *TEMPLATE_ARGS, "--schema", "long bio.json", "--endpoint", endpoint]) == 0
    body = requests()[0]["body"]
    written = body["response_format"]["json_schema"] if "messages" in body else body["text"]["format"]
    expected = json.loads(SCHEMA)
    expected |= {"required": ["bio", "more"], "additionalProperties": False}
    expected["properties"]["more"] |= {"required": ["x", "properties"], "additionalProperties": False}
    assert (written["name"], written["strict"], written["schema"]) == ("long_bio", True, expected)


def test_the_schema_among_the_samples_is_one() -> None:
    options = ("--prompt-file", str(ROOT / "samples" / "bio_prompt.md"), "--model", "m")
    assert main(["--in", str(SAMPLE), "--out", "out.jsonl", *options,
                 "--schema", str(ROOT / "samples" / "bio_schema.json")]) == 0
    schema = requests()[0]["body"]["text"]["format"]["schema"]
    assert schema["required"] == ["bio", "bio_short", "uncertain"]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("[]", "not a JSON Schema of an object with properties"),
        ('{"properties": {"bio": {}}}', "not a JSON Schema of an object with properties"),
        ('{"type": "object", "properties": {}}', "not a JSON Schema of an object with properties"),
        ('{"type": "object", "properties": {"error": {}}}', 'the property "error" has the name of a column of bios'),
        ('{"type": "object", "properties": {"bio": 1}}', 'the property "bio" is no schema'),
    ],
)
def test_what_is_no_schema_of_an_object_is_refused(
    schema: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("bio.json", schema)
    write("prompt.md", "{{artist_name}}")
    write("in.csv", f"{HEADER}1,A,x\n")
    assert main([*FILES, *TEMPLATE_ARGS, "--schema", "bio.json"]) == 1
    assert f"error: bio.json: {message}" in said(capsys)
