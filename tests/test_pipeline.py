"""The whole job as a user types it: samples/pipeline.sh, by itself and in a terminal."""

from __future__ import annotations

import csv
import json
import os
import pty
import select
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from builders import jsonl, success
from faulty_api import FaultyAPI

ROOT = Path(__file__).resolve().parent.parent
PIPELINE = ROOT / "samples" / "pipeline.sh"
TEMPLATE = ROOT / "samples" / "bio_prompt.md"
IN_ITS_OWN_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
Finished = subprocess.CompletedProcess[str]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "VIRTUAL_ENV": sys.prefix, **changes}


def pipeline(*args: str | Path, script: Path = PIPELINE, **changes: str) -> Finished:
    """Run it as cron does: without a terminal."""
    command = ["bash", str(script), *map(str, args)]
    none = subprocess.DEVNULL
    return subprocess.run(
        command, stdin=none, capture_output=True, encoding="utf-8", timeout=110, env=environment(**changes)
    )


class Terminal:
    """A terminal in which the pipeline runs; `screen` is all that it has shown."""

    def __init__(self, *args: str | Path, **changes: str) -> None:
        self.ours, theirs = pty.openpty()
        command = [sys.executable, "-I", "-S", "-c", IN_ITS_OWN_TERMINAL, "bash", str(PIPELINE), *map(str, args)]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**changes))
        os.close(theirs)
        self.screen = ""

    def read(self) -> bool:
        assert select.select([self.ours], [], [], 60)[0], f"nothing more is shown:\n{self.screen}"
        try:
            new = os.read(self.ours, 65536)
        except OSError:  # how Linux says that nobody has the terminal open any more
            return False
        self.screen += new.decode().replace("\r\n", "\n")
        return bool(new)

    def wait_for(self, words: str) -> None:
        while words not in self.screen:
            assert self.read(), f"it ended without {words!r}:\n{self.screen}"

    def type(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def end(self) -> int:
        """Read until it has ended; return its exit code."""
        while self.read():
            pass
        os.close(self.ours)
        return self.process.wait(timeout=60)


def rows(path: str | Path, **options: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, **options))


def bodies(path: str | Path) -> list[dict[str, object]]:
    return [json.loads(line)["body"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"logs"}


@pytest.fixture
def artists(work: Path) -> Path:
    """The three artists, as a file that a test may change."""
    return Path(shutil.copy(ROOT / "samples" / "input.csv", work / "artists.csv"))


# ---- what it is asked


def test_without_arguments_it_shows_how_to_use_it(work: Path) -> None:
    result, help_ = pipeline(), pipeline("--help")
    assert (result.returncode, result.stdout) == (2, "")
    assert (help_.returncode, help_.stdout, help_.stderr) == (0, result.stderr, "")
    assert "bash samples/pipeline.sh [--local] [--yes] CSV OUT [OPTION...]" in help_.stdout
    assert help_.stdout.endswith("settings in samples/bio_body.json.\n")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ("artists.csv", "name one CSV and one OUT; see --help"),
        ("artists.csv bios.csv third.csv", "name one CSV and one OUT; see --help"),
        ("--local artists.csv bios.csv third.csv", "name one CSV and one OUT; see --help"),
        ("artists.csv bios.csv --model", "--model needs a value, or is no option of this script; see --help"),
        ("artists.csv bios.csv --force --yes", "--force needs a value, or is no option of this script; see --help"),
        ("artists.csv bios.csv --yes=no", "--yes takes no value; see --help"),
        ("--in artists.csv bios.csv", "CSV and OUT are named without --in; see --help"),
        ("artists.csv --out=bios.csv", "CSV and OUT are named without --out; see --help"),
        ("- bios.csv", "CSV and OUT must be files; if - is the name of one, write ./-"),
        ("-x.csv bios.csv", "CSV and OUT must be files; if -x.csv is the name of one, write ./-x.csv"),
        ("/dev/null bios.csv", "CSV must be a file, as it is read twice: /dev/null"),
        ("artists.csv bios.xlsx", "OUT must be the name of a .csv file: bios.xlsx"),
        ("artists.csv bios", "OUT must be the name of a .csv file: bios"),
        ("artists.csv folder/.csv", "OUT must be the name of a .csv file: folder/.csv"),
        ("artists.csv folder.csv", "OUT must be the name of a .csv file: folder.csv"),
        ("artists.csv link.csv", "artists.csv is both CSV and OUT; choose another OUT"),
        ("artists.csv reviewed.csv", "reviewed.csv was not written by this script; rename it, or choose another OUT"),
        ("artists.csv paid.csv --local", "paid.csv has bios that were paid for; choose another OUT for --local"),
    ],
)
def test_what_cannot_be_done_is_exit_2_before_anything(artists: Path, args: str, why: str) -> None:
    Path("folder.csv").mkdir()
    Path("link.csv").symlink_to("artists.csv")
    Path("reviewed.csv").write_text("artist_id,bio\n")
    Path("paid.results.jsonl").touch()
    before = names(artists.parent)
    result = pipeline(*args.split(), VIRTUAL_ENV="/nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"pipeline.sh: error: {why}\n"
    assert names(artists.parent) == before


LUNA = f"gpt-6-luna; body: {ROOT}/samples/bio_body.json; prices:"


@pytest.mark.parametrize(
    ("args", "variables", "used"),
    [
        ("", {}, f"{TEMPLATE}; model: {LUNA} 0.05,0.25"),
        ("--prompt-id=a", {"PROMPT_FILE": "b.md"}, f"a; model: {LUNA} 0.05,0.25"),
        ("--prices=1,2", {"PROMPT_ID": "a"}, f"a (from PROMPT_ID); model: {LUNA} 1,2"),
        ("--endpoint /v1/chat/completions", {}, f"{TEMPLATE}; model: gpt-6-luna; body: none; prices: 0.05,0.25"),
        ("--body-file c", {"PROMPT_FILE": "b"}, "b (from PROMPT_FILE); model: gpt-6-luna; body: c; prices: 0.05,0.25"),
        ("--prompt-file b --model m1", {"PROMPT_ID": "a", "MODEL": "m2"}, "b; model: m1; body: none; prices: none"),
        ("--prices 1,2", {"MODEL": "m1"}, f"{TEMPLATE}; model: m1; body: none; prices: 1,2"),
    ],
)
def test_it_says_what_it_uses(work: Path, args: str, variables: dict[str, str], used: str) -> None:
    result = pipeline("nowhere.csv", "bios.csv", *args.split(), **variables)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"pipeline.sh: prompt: {used}\n")
    assert not names(work)


def test_a_missing_csv_ends_it_with_the_error_of_the_converter(work: Path) -> None:
    result = pipeline("nowhere.csv", "out/bios.csv", "--prompt-id", "a")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.endswith("\ngen_batch_jsonl.py: error: cannot read nowhere.csv: No such file or directory\n")
    assert not list(work.iterdir())


def test_an_unknown_option_ends_it_with_the_error_of_the_converter(artists: Path) -> None:
    result = pipeline(artists, "bios.csv", "--force")
    assert result.returncode == 2
    assert names(artists.parent) == {"artists.csv"}


# ---- the job


def test_any_sheet_in_one_command_comes_back_with_its_columns(api: FaultyAPI, work: Path) -> None:
    folder = work / "Bestände für 'Müller' & Co"
    folder.mkdir()
    sheet = "Inventory No;Artist;Born\r\n0041;Anna Müller;Köln\r\n0042;Björk;Reykjavík\r\n0043;Cher;\r\n"
    (folder / "-x.csv").write_bytes(sheet.encode("windows-1252"))
    (folder / "prompt.md").write_text("Bio of {{Artist}}, born in {{Born}}")
    os.chdir(folder)
    columns = ("--id-column", "Inventory No", "--name-column=Artist", "--encoding", "windows-1252")
    own = ("--interval=0.1", "--max-new", "2")
    result = pipeline(*own, "./-x.csv", "out/all bios.CSV", *columns, "--prompt-file", "prompt.md", "--limit=2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("OK: 2 requests, ")
    raw = (folder / "out" / "all bios.CSV").read_bytes().decode()
    assert raw.startswith("\ufeffInventory No;Artist;Born;bio;error;input_tokens;output_tokens\r\n")
    bios = rows("out/all bios.CSV", delimiter=";")
    assert [(row["Inventory No"], row["Artist"], row["Born"]) for row in bios] == [
        ("0041", "Anna Müller", "Köln"), ("0042", "Björk", "Reykjavík"), ("0043", "Cher", "")
    ]
    assert ["made-up" in row["bio"] for row in bios] == [True, True, False]
    assert [row["error"] for row in bios] == ["", "", "no request"]
    assert names(folder / "out") == {
        "all bios.CSV", "all bios.requests.jsonl", "all bios.results.jsonl", "all bios.written"
    }
    (first, _) = bodies("out/all bios.requests.jsonl")
    assert first == {
        "model": "gpt-6-luna",
        "input": "Bio of Anna Müller, born in Köln",
        "metadata": {"artist_name": "Anna Müller"},
        "reasoning": {"effort": "none"},
        "max_output_tokens": 2000,
    }


def test_run_again_it_pays_for_the_changes_and_keeps_what_a_person_has_written(
    api: FaultyAPI, artists: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request without a bio does not keep the others from being exported."""
    api.outcomes["a2"] = "400"
    first = pipeline(artists, "bios.csv", "--interval", "0.1")
    assert first.returncode == 1, first.stderr
    assert [row["artist_id"] for row in rows("bios.csv") if row["bio"]] == ["a1", "a3"]

    api.outcomes["a2"] = "200"
    with artists.open("a", encoding="utf-8") as file:
        file.write("a4,Björk,Icelandic singer\n")
    Path("bios.csv").write_text("all of it\nchecked by Eva\n")
    second = pipeline(artists, "bios.csv", "--include-rejected", "--interval", "0.1")
    assert second.returncode == 0, second.stderr
    assert [row["artist_id"] for row in rows("bios.csv") if row["bio"]] == ["a1", "a2", "a3", "a4"]
    (copy,) = artists.parent.glob("bios.edited-????????-??????.csv")
    assert copy.read_text() == "all of it\nchecked by Eva\n"
    told = f"pipeline.sh: bios.csv was edited, so it was copied to {copy.name} before it is written again\n"
    assert told in second.stderr

    monkeypatch.delenv("OPENAI_API_KEY")
    assert pipeline(artists, "bios.csv").returncode == 0, "no key is needed where nothing is to be sent"
    assert len(list(artists.parent.glob("bios.edited-*"))) == 1
    assert api.executions == Counter(["a1", "a2", "a2", "a3", "a4"])


def test_further_results_are_not_paid_for_again(api: FaultyAPI, work: Path) -> None:
    Path("artists.csv").write_text("1,Cher\n2,Prince\n3,Björk,singer\n", encoding="utf-8")
    Path("one.jsonl").write_bytes(jsonl(success("1", "One.")))
    Path("two.jsonl").write_bytes(jsonl(success("2", "Two.")))
    results = ("--results", "one.jsonl", "--results=two.jsonl")
    result = pipeline("artists.csv", "bios.csv", "--skip-header", *results, "--interval", "0.1")
    assert result.returncode == 0, result.stderr
    assert api.executions == Counter(["3"])
    bios = rows("bios.csv")
    assert [row["artist_name"] for row in bios] == ["Cher", "Prince", "Björk"]
    assert [row["bio"] for row in bios][:2] == ["One.", "Two."]


def test_more_than_max_new_is_not_sent_and_nothing_is_exported(api: FaultyAPI, artists: Path) -> None:
    result = pipeline(artists, "bios.csv", "--max-new=2")
    assert result.returncode == 1
    assert not api.batches
    assert names(artists.parent) == {"artists.csv", "bios.requests.jsonl"}


def test_without_a_key_nothing_is_exported(work: Path, artists: Path) -> None:
    result = pipeline(artists, "bios.csv")
    assert result.returncode == 1
    assert "OPENAI_API_KEY is not set" in result.stderr
    assert names(work) == {"artists.csv", "bios.requests.jsonl"}


def test_on_this_machine_it_needs_nothing_and_keeps_its_files_apart(work: Path, artists: Path) -> None:
    with_stdin_closed = ["bash", "-c", 'exec bash "$0" --local <&-', str(PIPELINE)]
    changed = environment(HTTP_PROXY="http://127.0.0.1:9", NO_PROXY="")
    subprocess.run(with_stdin_closed, env=changed, check=True, timeout=60)
    assert all("made-up" in row["bio"] for row in rows("bios.csv"))
    local = {"bios.local.requests.jsonl", "bios.local.results.jsonl", "bios.csv", "bios.written"}
    assert names(work) == {"artists.csv", *local}


# ---- in a terminal


def test_the_first_time_it_shows_bios_and_asks(api: FaultyAPI, artists: Path) -> None:
    terminal = Terminal(artists, "bios.csv", "--interval", "0.1")
    terminal.wait_for("Send 3 requests? [Y/n] ")
    assert "first a few bios to read; the batch pays for them again\nsending 3 requests" in terminal.screen
    assert "a1 NewJeans\nNewJeans: a made-up bio" in terminal.screen
    assert not api.batches
    terminal.type("n\n")
    assert terminal.end() == 1
    assert not api.batches
    assert names(artists.parent) == {"artists.csv", "bios.requests.jsonl"}


def test_where_there_are_results_it_only_asks(api: FaultyAPI, artists: Path) -> None:
    Path("bios.results.jsonl").write_bytes(jsonl(success("a1")))
    terminal = Terminal(artists, "bios.csv", "--interval", "0.1")
    terminal.wait_for("Send 2 requests? [Y/n] ")
    assert "made-up" not in terminal.screen
    assert not api.batches
    terminal.type("\n")
    assert terminal.end() == 0, terminal.screen
    assert api.executions == Counter(["a2", "a3"])
    assert all(row["bio"] for row in rows("bios.csv"))


def test_where_the_first_bios_fail_nothing_is_asked(artists: Path) -> None:
    terminal = Terminal(artists, "bios.csv")  # without a key
    assert terminal.end() == 1
    assert terminal.screen.endswith("batch_tool.py: error: OPENAI_API_KEY is not set; export it with the key of your "
                                    "OpenAI project\n")
    assert "[Y/n]" not in terminal.screen
    assert names(artists.parent) == {"artists.csv", "bios.requests.jsonl"}


@pytest.mark.parametrize(("how", "exit_code"), [("Ctrl-C", 130), ("kill", 143)])
def test_stopped_it_ends_its_run_too(api: FaultyAPI, artists: Path, how: str, exit_code: int) -> None:
    """With --yes it has neither shown nor asked anything before."""
    api.step = 1000
    terminal = Terminal("--yes", artists, "bios.csv", "--interval", "0.1")
    terminal.wait_for("1 validating")
    assert "made-up" not in terminal.screen
    assert "[Y/n]" not in terminal.screen
    if how == "kill":
        terminal.process.terminate()
    else:
        terminal.type("\x03")
    assert terminal.end() == exit_code  # the terminal is closed only once `run` has ended, too
    assert "batch_tool.py: stopped\n" in terminal.screen
    assert not Path("bios.csv").exists()


# ---- Python

INTERPRETER = f"""#!/bin/sh
echo "$(basename "$0") $*" | head -n 1 >> "$CALLS"
case "$1 $2" in
    "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip") touch "$CALLS.installed" ;;
    *openai*) test -e "$CALLS.installed" ;;
    "-c "*) exit OLD ;;
    *) exec "{sys.executable}" "$@" ;;
esac
"""


def interpreter(path: Path, old: bool = False) -> None:
    """Put a Python there that makes its virtual environments without the network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(INTERPRETER.replace("OLD", str(int(old))))
    path.chmod(0o755)


@pytest.fixture
def fresh(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new checkout on a machine where no Python is on the PATH."""
    folder = work / "new machine"
    shutil.copytree(ROOT / "samples", folder / "samples")
    for name in ("gen_batch_jsonl.py", "batch_tool.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    commands = work / "bin"
    commands.mkdir()
    for name in ("bash", "sh", "basename", "dirname", "sed", "head", "cat", "cp", "mkdir", "touch", "test", "env"):
        (commands / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(commands))
    monkeypatch.setenv("CALLS", str(work / "calls"))
    return folder


def on_a_new_machine(fresh: Path, virtual_env: str = "") -> list[str]:
    """What it says before the converter finds no CSV, and how often each Python was called, in order."""
    result = pipeline("nowhere.csv", "bios.csv", script=fresh / "samples" / "pipeline.sh", VIRTUAL_ENV=virtual_env)
    assert result.returncode == 1
    return result.stderr.splitlines()


def test_a_virtual_environment_is_made_with_the_newest_python(fresh: Path, work: Path) -> None:
    for name, old in (("python3.13", True), ("python3.12", False), ("python3.11", False), ("python3", False)):
        interpreter(work / "bin" / name, old)
    first = on_a_new_machine(fresh)
    assert first[0] == f"pipeline.sh: installing requirements.txt into {fresh}/.venv"
    assert first[-1] == "gen_batch_jsonl.py: error: cannot read nowhere.csv: No such file or directory"
    calls = (work / "calls").read_text().splitlines()
    assert [call for call in calls if " -m " in call] == [
        f"python3.12 -m venv --clear {fresh}/.venv",
        f"python -m pip install --quiet --disable-pip-version-check -r {fresh}/requirements.txt",
    ]
    assert on_a_new_machine(fresh)[0].startswith("pipeline.sh: prompt: "), "the second time it is there"


def test_a_virtual_environment_of_an_older_python_is_made_anew(fresh: Path, work: Path) -> None:
    interpreter(work / "bin" / "python3")
    interpreter(fresh / ".venv" / "bin" / "python", old=True)
    on_a_new_machine(fresh)
    assert f"python3 -m venv --clear {fresh}/.venv" in (work / "calls").read_text().splitlines()


def test_nothing_is_installed_into_the_active_virtual_environment(fresh: Path, work: Path) -> None:
    interpreter(work / "active" / "bin" / "python")
    interpreter(work / "bin" / "python3")
    on_a_new_machine(fresh, str(work / "active"))
    (made,) = (call for call in (work / "calls").read_text().splitlines() if " -m venv" in call)
    assert made == f"python3 -m venv --clear {fresh}/.venv"
    assert names(work / "active" / "bin") == {"python"}


def test_without_any_python_it_says_so_in_one_line(fresh: Path) -> None:
    assert on_a_new_machine(fresh) == [
        "pipeline.sh: error: no Python 3.11 or later with the module venv was found; install one"
    ]
