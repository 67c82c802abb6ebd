"""The whole job as a user types it."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from faulty_api import FaultyAPI

ROOT = Path(__file__).resolve().parent.parent
TATE = ROOT.parent / "shared" / "data" / "tate_artists.csv"


def pipeline(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "samples" / "pipeline.sh"), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "VIRTUAL_ENV": sys.prefix, **environment},
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("source", [TATE if TATE.exists() else ROOT / "samples" / "input.csv"], ids=["real"])
def test_a_csv_goes_through_in_its_order_with_no_key_and_a_stored_prompt(work: Path, source: Path) -> None:
    arguments = ("--local", "--prompt-id", "bio_gen", source, "out/all bios.csv")
    result = pipeline(*arguments, MODEL="m1", PROMPT_FILE="nowhere.md")
    with source.open(encoding="utf-8-sig", newline="") as file:
        expected = [(row["artist_id"], row["artist_name"].strip()) for row in csv.DictReader(file)]
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"OK: {len(expected)} requests, ")
    requests = (work / "out" / "all bios.requests.jsonl").read_text()
    assert '"body": {"model": "m1", "prompt": {"id": "bio_gen"' in requests
    bios = rows(work / "out" / "all bios.csv")
    assert [(row["artist_id"], row["artist_name"]) for row in bios] == expected
    assert all("made-up" in row["bio"] and not row["error"] for row in bios)
    names = {path.name for path in (work / "out").iterdir()}
    assert names == {"all bios.csv", "all bios.requests.jsonl", "all bios.local.results.jsonl"}


def test_without_a_key_it_says_so_before_anything_else(work: Path) -> None:
    result = pipeline()
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "pipeline.sh: error: OPENAI_API_KEY is not set; export it, or try --local\n"
    assert not list(work.iterdir())


def test_a_missing_csv_ends_it_with_the_converters_error(work: Path) -> None:
    result = pipeline("nowhere.csv", OPENAI_API_KEY="unused")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.endswith("\ngen_batch_jsonl.py: error: cannot read nowhere.csv: No such file or directory\n")
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    "args",
    [("--nonsense",), ("--prompt-id",), ("a.csv", "b.csv", "c.csv"), ("a.csv", "-"), ("a.csv", "out/"), ("a.csv", ".")],
)
def test_invalid_arguments_exit_2(work: Path, args: tuple[str, ...]) -> None:
    result = pipeline(*args, OPENAI_API_KEY="unused")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("pipeline.sh: error: ")
    assert not list(work.iterdir())


@pytest.mark.parametrize("args", [("bios.csv",), ("artists.csv", "bios.csv")])
def test_the_spreadsheet_is_not_written_over(work: Path, args: tuple[str, ...]) -> None:
    (work / "bios.csv").write_text("artist_id,artist_name\n1,A\n")
    (work / "artists.csv").symlink_to("bios.csv")
    result = pipeline("--local", *args)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"pipeline.sh: error: {args[0]} is both CSV and OUT; choose another OUT\n"
    assert (work / "bios.csv").read_text() == "artist_id,artist_name\n1,A\n"


def test_run_again_with_a_changed_spreadsheet_it_pays_for_the_changes(api: FaultyAPI, work: Path) -> None:
    """A request without a bio does not keep the others from being exported."""
    api.outcomes["a2"] = "400"
    artists = work / "artists.csv"
    shutil.copy(ROOT / "samples" / "input.csv", artists)
    for row, expected in (("", ["a1", "", "a3"]), ("a4,Björk,Icelandic singer\n", ["a1", "", "a3", "a4"])):
        with artists.open("a", encoding="utf-8") as file:
            file.write(row)
        result = pipeline(artists, INTERVAL="0.1")
        assert result.returncode == 1, result.stderr
        assert [row["bio"] and row["artist_id"] for row in rows(work / "bios.csv")] == expected
    assert api.executions == Counter(["a1", "a2", "a3", "a4"])


@pytest.mark.parametrize(
    "environment, used",
    [
        ({}, f"{ROOT}/samples/bio_prompt.md; model: gpt-6-luna"),
        ({"PROMPT_ID": "left_over", "MODEL": "m1"}, "stored prompt left_over (from PROMPT_ID); model: m1"),
        ({"PROMPT_FILE": "nowhere.md"}, "nowhere.md (from PROMPT_FILE); model: gpt-6-luna"),
    ],
)
def test_it_says_which_prompt_and_model_it_uses(work: Path, environment: dict[str, str], used: str) -> None:
    result = pipeline("nowhere.csv", OPENAI_API_KEY="unused", **environment)
    assert result.stderr.startswith(f"pipeline.sh: prompt: {used}\n")
