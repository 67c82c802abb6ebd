"""The README's commands are run and their outputs compared; its options are held against --help."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from local_batch_api import LocalBatchAPI

import batch_tool
import gen_batch_jsonl

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ("gen_batch_jsonl.py", "batch_tool.py", "samples", "requirements.txt")
COMMANDS = ("validate", "create", "status", "wait", "retrieve", "cancel", "list", "retry", "export", "run")
OFFLINE = ("validate", "retry", "export")
# what differs from run to run
VARYING = (
    (r"batch_[0-9a-f]{24}", "batch_ID"),
    (r"file-[0-9a-f]{24}", "file-ID"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", "TIME"),
    (r"\n[^\n]*elapsed(?=\n|$)", ""),
    (r"\npipeline.sh: installing [^\n]*", ""),
)


def console_blocks() -> list[tuple[str, str]]:
    """The commands of the README's console blocks in order, each with the output shown under it."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    parts = re.split(r"^\$ (.*)\n", "".join(blocks), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def without_varying(text: str) -> str:
    text = "\n" + text
    for pattern, stand_in in VARYING:
        text = re.sub(pattern, stand_in, text)
    return text.strip("\n")


@pytest.fixture
def checkout(work: Path) -> Path:
    """A copy of what a user has, where `python3` is the interpreter of the tests."""
    for name in SCRIPTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, work / name)
    (work / "bin").mkdir()
    (work / "bin" / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (work / "bin" / "python3").chmod(0o755)
    return work


def test_every_command_does_what_the_readme_shows(checkout: Path, api: LocalBatchAPI) -> None:
    commands = console_blocks()
    script = "".join(f"echo @@@; {{ {command}; }} 2>&1\n" for command, _ in commands)
    environment = {**os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
    shell = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, text=True, timeout=110, env=environment)
    outputs = shell.stdout.split("@@@\n")[1:]
    for (command, shown), output in zip(commands, outputs, strict=True):
        assert f"{command}\n{without_varying(output)}" == f"{command}\n{without_varying(shown)}"


def section(title: str) -> str:
    """The text under a heading, up to the next one of any level."""
    return re.split(r"\n#+ ", README.split(f"\n{title}\n")[1])[0]


def options_in(text: str) -> set[str]:
    """The options in the first column of the tables."""
    cells = re.findall(r"^\| (`--.*?) \|", text, re.MULTILINE)
    return set(re.findall(r"--[a-z-]+", " ".join(cells)))


def options_of_help(capsys: pytest.CaptureFixture[str], main: object, *args: str) -> set[str]:
    with pytest.raises(SystemExit, match="0"):
        main([*args, "--help"])  # type: ignore[operator]
    listed = re.findall(r"^  -.*", capsys.readouterr().out.split("options:")[1], re.MULTILINE)
    return set(re.findall(r"--[a-z-]+", " ".join(line.split("  ")[1] for line in listed))) - {"--help"}


def test_the_converters_options_are_those_of_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    shown = options_in(section("## Convert: `gen_batch_jsonl.py`"))
    assert shown == options_of_help(capsys, gen_batch_jsonl.main)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_of_a_command_are_those_of_its_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    common = set() if command in OFFLINE else options_in(section("## The job in one command, or step by step"))
    assert options_in(section(f"### `{command}`")) | common == options_of_help(capsys, batch_tool.main, command)


def test_every_command_has_its_section_in_the_order_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(re.findall(r"^### `(\w+)`$", README, re.MULTILINE)) == COMMANDS
    with pytest.raises(SystemExit, match="0"):
        batch_tool.main(["--help"])
    listed = re.findall(r"^    (\w+) ", capsys.readouterr().out.split("commands:")[1], re.MULTILINE)
    assert tuple(listed) == COMMANDS


def test_the_test_command_stands_on_one_line() -> None:
    assert re.search(r"^python3 -m venv .*requirements.txt.* -m pytest tests/ -v$", README, re.MULTILINE)
