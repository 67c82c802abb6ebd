"""The README's commands are run and their outputs compared; its tables are held against --help."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import COMMANDS, SENTENCES
from faulty_api import FaultyAPI

import gen_batch_jsonl

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ("gen_batch_jsonl.py", "batch_tool.py", "samples", "requirements.txt")
# what differs from run to run
VARYING = (
    (r"batch_[0-9a-f]{24}", "batch_ID"),
    (r"file-[0-9a-f]{24}", "file-ID"),
    (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d", "TIME"),
    (r"\n[^\n]*elapsed(?=\n|$)", ""),
    (r"\npipeline.sh: installing [^\n]*", ""),
    (r"\ufeff", ""),
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


def test_every_command_does_what_the_readme_shows(checkout: Path, api: FaultyAPI) -> None:
    commands = console_blocks()
    script = "".join(f"echo @@@; {{ {command}; }} 2>&1\n" for command, _ in commands)
    environment = {**os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
    shell = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, text=True, timeout=110, env=environment)
    outputs = shell.stdout.split("@@@\n")[1:]
    for (command, shown), output in zip(commands, outputs, strict=True):
        output, shown = without_varying(output), without_varying(shown)
        pattern = re.escape(shown).replace("…", r"[^\0]*?")  # a line "…" stands for any lines
        if not re.fullmatch(pattern, output):
            assert f"{command}\n{output}" == f"{command}\n{shown}"


def options_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Each option of a parser as the first cell of its row in the README, and its help text."""
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = "E" if action.choices else f"{action.metavar or ''}{'…' if action.nargs == '+' else ''}"
        flags = [f"`{flag} {value}`".replace(" `", "`") for flag in action.option_strings if flag.startswith("--")]
        yield ", ".join(flags), parser._get_formatter()._expand_help(action)


def table_rows(title: str) -> list[list[str]]:
    """The cells of the tables in a section."""
    text = re.split(r"\n## ", README.split(f"\n## {title}\n")[1])[0]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_converters_options_have_the_texts_of_its_help() -> None:
    rows = [row for row in table_rows("Convert: `gen_batch_jsonl.py`") if row[0].startswith("`--")]
    shown = [(row[0], row[2] + (f" [{row[1].strip('`')}]" if row[1] else "")) for row in rows]
    assert shown == list(options_of(gen_batch_jsonl.build_parser()))


def test_the_options_of_every_command_have_the_texts_of_its_help() -> None:
    expected: dict[tuple[str, str], list[str]] = {}
    for command, parser in COMMANDS.items():
        for option in options_of(parser):
            expected.setdefault(option, []).append(f"`{command}`")
    rows = [row for row in table_rows("Manage batches: `batch_tool.py`") if row[0].startswith("`--")]
    assert [((row[0], row[2]), row[1].split(", ")) for row in rows] == list(expected.items())


def test_every_command_is_in_the_readme_with_the_text_of_its_help() -> None:
    rows = [row for row in table_rows("Manage batches: `batch_tool.py`") if row[0].strip("`") in COMMANDS]
    assert {row[0].strip("`"): row[1] for row in rows} == SENTENCES


def test_the_test_command_stands_on_one_line() -> None:
    assert re.search(r"^python3 -m venv .*requirements.txt.* -m pytest tests/ -v$", README, re.MULTILINE)
