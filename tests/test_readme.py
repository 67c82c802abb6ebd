"""The README's commands are run and their outputs compared; its tables are held against --help."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator

from builders import COMMANDS, README, SENTENCES, console_blocks

import gen_batch_jsonl

# what differs from run to run
VARYING = (
    (r"batch_[0-9a-f]{24}", "batch_ID"),
    (r"file-[0-9a-f]{24}", "file-ID"),
    (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d", "TIME"),
    (r"\n[^\n]*elapsed(?=\n|$)", ""),
    (r"\npipeline.sh: installing [^\n]*", ""),
    (r"\ufeff", ""),
)


def without_varying(text: str) -> str:
    text = "\n" + text
    for pattern, shown in VARYING:
        text = re.sub(pattern, shown, text)
    return text.strip("\n")


def test_every_command_does_what_the_readme_shows(readme_shell: subprocess.Popen[str]) -> None:
    printed, _ = readme_shell.communicate(timeout=300)
    commands, outputs = console_blocks(), printed.split("@@@\n")[1:]
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
