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
from local_batch_api import LocalBatchAPI

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


def test_the_sample_goes_through_with_no_key_and_a_stored_prompt(work: Path) -> None:
    result = pipeline("--local", "--prompt-id", "bio_gen", MODEL="m1", PROMPT_FILE="nowhere.md")
    assert (result.returncode, result.stdout) == (0, "OK: 3 requests, 658 bytes, 1 batch\n"), result.stderr
    assert '"body": {"model": "m1", "prompt": {"id": "bio_gen"' in (work / "bios.requests.jsonl").read_text()
    assert [row["artist_name"] for row in rows(work / "bios.csv")] == ["NewJeans", "Stereolab", "Perfume"]
    assert all("made-up" in row["bio"] and not row["error"] for row in rows(work / "bios.csv"))
    names = {path.name for path in work.iterdir()}
    assert names == {"bios.csv", "bios.requests.jsonl", "bios.local.results.jsonl", "logs"}


@pytest.mark.skipif(not TATE.exists(), reason="the real CSV is not here")
def test_a_real_csv_goes_through_in_its_order(work: Path) -> None:
    result = pipeline("--local", TATE, "out/tate bios.csv")
    assert result.returncode == 0, result.stderr
    with TATE.open(encoding="utf-8-sig", newline="") as file:
        expected = [(row["artist_id"], row["artist_name"].strip()) for row in csv.DictReader(file)]
    assert len(expected) == 3532
    assert [(row["artist_id"], row["artist_name"]) for row in rows(work / "out" / "tate bios.csv")] == expected


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


@pytest.mark.parametrize("args", [("--nonsense",), ("a.csv", "b.csv", "c.csv")])
def test_invalid_arguments_exit_2(work: Path, args: tuple[str, ...]) -> None:
    result = pipeline(*args)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("pipeline.sh: error: ")


def test_run_again_with_a_changed_spreadsheet_it_pays_for_the_changes(api: LocalBatchAPI, work: Path) -> None:
    artists = work / "artists.csv"
    shutil.copy(ROOT / "samples" / "input.csv", artists)
    for row in ("", "a4,Björk,Icelandic singer\n"):
        with artists.open("a", encoding="utf-8") as file:
            file.write(row)
        result = pipeline(artists, INTERVAL="0.1")
        assert result.returncode == 0, result.stderr
    assert api.executions == Counter(["a1", "a2", "a3", "a4"])
    assert [row["artist_name"] for row in rows(work / "bios.csv")] == ["NewJeans", "Stereolab", "Perfume", "Björk"]


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


def test_bios_are_exported_even_where_some_requests_failed(api: LocalBatchAPI, work: Path) -> None:
    api.outcomes["a2"] = "400"
    result = pipeline(INTERVAL="0.1")
    assert result.returncode == 1, result.stderr
    assert [bool(row["bio"]) for row in rows(work / "bios.csv")] == [True, False, True]
