"""Print the measured tables of CLAUDE.md, in Markdown.

  python tests/benchmark.py [converter|manager] [--quick]

Every time is the median of five runs, interleaved with those that it is compared with, as the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CONVERTER = ROOT / "gen_batch_jsonl.py"
RUNS = 5


class Measured(NamedTuple):
    seconds: float
    peak_mb: float


def run_process(command: list[str]) -> Measured:
    """Wall-clock time and peak memory of a command; its own output is dropped."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"benchmark.py: error: exit code {process.returncode}: {' '.join(command)}")
    return Measured(seconds, usage.ru_maxrss / 1024)


def medians(commands: dict[str, list[str]], runs: int = RUNS) -> dict[str, Measured]:
    """The median time and greatest memory of each command, the commands taking turns."""
    results: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            results[name].append(run_process(command))
    return {
        name: Measured(statistics.median(each.seconds for each in taken), max(each.peak_mb for each in taken))
        for name, taken in results.items()
    }


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


# -- converter ---------------------------------------------------------------------------------------------------

BARE = """
import csv, sys
with open(sys.argv[1], newline="", encoding="utf-8-sig") as file:
    for row in csv.reader(file):
        pass
"""
PLAIN = """
import csv, json, sys
with open(sys.argv[1], newline="", encoding="utf-8-sig") as file, open(sys.argv[2], "w", encoding="utf-8") as out:
    rows = csv.reader(file)
    next(rows)
    for artist_id, name, facts in rows:
        variables = {"artist_name": name, "artist_data": facts}
        body = {"model": "m", "prompt": {"id": "p", "version": "1", "variables": variables}}
        request = {"custom_id": artist_id, "method": "POST", "url": "/v1/responses", "body": body}
        out.write(json.dumps(request, ensure_ascii=False) + "\\n")
"""
PANDAS = """
import json, pandas, sys
frame = pandas.read_csv(sys.argv[1], dtype=str, keep_default_na=False)
with open(sys.argv[2], "w", encoding="utf-8") as out:
    for artist_id, name, facts in frame.itertuples(index=False):
        variables = {"artist_name": name, "artist_data": facts}
        body = {"model": "m", "prompt": {"id": "p", "version": "1", "variables": variables}}
        request = {"custom_id": artist_id, "method": "POST", "url": "/v1/responses", "body": body}
        out.write(json.dumps(request, ensure_ascii=False) + "\\n")
"""
POLARS = """
import polars, sys
from polars import col, lit, struct
variables = struct(artist_name="artist_name", artist_data="artist_data")
prompt = struct(id=lit("p"), version=lit("1"), variables=variables)
frame = polars.read_csv(sys.argv[1], infer_schema=False).select(
    custom_id="artist_id", method=lit("POST"), url=lit("/v1/responses"), body=struct(model=lit("m"), prompt=prompt))
frame.write_ndjson(sys.argv[2])
"""
DUCKDB = """
COPY (SELECT artist_id AS custom_id, 'POST' AS method, '/v1/responses' AS url, {{'model': 'm', 'prompt': {{'id': 'p',
'version': '1', 'variables': {{'artist_name': artist_name, 'artist_data': artist_data}}}}}} AS body
FROM read_csv('{source}', all_varchar=true, header=true)) TO '{out}' (FORMAT JSON)
"""
MLR = (
    '$custom_id=$artist_id; $method="POST"; $url="/v1/responses"; $body={"model":"m","prompt":{"id":"p","version":"1",'
    '"variables":{"artist_name":$artist_name,"artist_data":$artist_data}}}; '
    "unset $artist_id,$artist_name,$artist_data"
)


class Shape(NamedTuple):
    """What the rows of a CSV look like: which field is quoted in a quarter of them, and the words it is made of."""

    quoted: int = 2
    words: str = "post rock trio from Leeds known for three records and one long tour with many guests"
    doubled: bool = False  # quotes inside the quoted fields
    stray_quotes: int = 0


def rows_of(number: int, shape: Shape) -> Iterator[str]:
    """Rows of about 200 bytes."""
    rng = random.Random(number)
    words = shape.words.split()
    stray = set(range(number // 20, number, max(1, number // 10))) if shape.stray_quotes else set()
    for at in range(number):
        prose = " ".join(rng.choices(words, k=33))
        fields = [f"artist{at}", f"Name {at}", prose[:180]]
        if at % 4 == 0:
            more = ' ""more""' if shape.doubled else ""
            fields[shape.quoted] = f'"{fields[shape.quoted]}, and{more}"'
        if at in stray:
            fields[1] = f'"{fields[1]}'
        yield ",".join(fields) + "\n"


def write_csv(path: Path, number: int, shape: Shape) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.write("artist_id,artist_name,artist_data\n")
        file.writelines(rows_of(number, shape))
    return path


def conversion(source: Path, out: Path, *prompt: str) -> list[str]:
    prompt = prompt or ("--prompt-id", "p", "--prompt-version", "1")
    return [sys.executable, str(CONVERTER), "--in", str(source), "--out", str(out), "--model", "m", *prompt]


def python(program: str, *paths: Path) -> list[str]:
    return [sys.executable, "-c", program, *map(str, paths)]


def other_tools(source: Path, out: Path) -> dict[str, list[str]]:
    """The same job by whatever else is installed; none of it checks ids, trims or writes the file atomically."""
    commands = {}
    if shutil.which("mlr"):
        commands["mlr"] = ["mlr", "--icsv", "--ojsonl", "-S", "put", MLR, "then", "cat", str(source)]
    if shutil.which("duckdb"):
        commands["duckdb"] = ["duckdb", "-c", DUCKDB.format(source=source, out=out)]
    elif importlib.util.find_spec("duckdb"):
        program = f"import duckdb; duckdb.sql({DUCKDB.format(source=source, out=out)!r})"
        commands["duckdb (Python)"] = python(program)
    for name, program in (("polars", POLARS), ("pandas", PANDAS)):
        if importlib.util.find_spec(name):
            commands[name] = python(program, source, out)
    return commands


def benchmark_converter(folder: Path, quick: bool) -> None:
    out = folder / "out.jsonl"
    table = []
    for number in (10_000, 100_000) if quick else (10_000, 100_000, 1_000_000):
        source = write_csv(folder / f"{number}.csv", number, Shape())
        commands = {"ours": conversion(source, out), "bare": python(BARE, source), "plain": python(PLAIN, source, out)}
        taken = medians(commands)
        seconds, peak = taken["ours"]
        speed = [f"{seconds:.2f}", f"{number / seconds:,.0f}"]
        ratios = [f"{seconds / taken[other].seconds:.2f}" for other in ("bare", "plain")]
        table.append([f"{number:,}", *speed, *ratios, f"{peak:.0f}", f"{40 + number * 125 / 1e6:.0f}"])
    columns = ["rows", "s", "rows/s", "× bare csv.reader pass", "× csv.reader + json.dumps", "peak MB", "limit MB"]
    print_table("Rows of 200 bytes, a quarter with the data quoted; each run in a process of its own", columns, table)

    number = 100_000 if quick else 1_000_000
    clean = folder / f"{number}.csv"
    stray = write_csv(folder / "stray.csv", number, Shape(stray_quotes=10))
    doubled = write_csv(folder / "doubled.csv", number, Shape(doubled=True))
    middle = write_csv(folder / "middle.csv", number, Shape(quoted=1))
    foreign = write_csv(folder / "foreign.csv", number, Shape(words="трио из Лидса 東京 ambient électronique пост-рок"))
    taken = medians({
        "10 stray quotes": conversion(stray, out),
        "clean": conversion(clean, out),
        "doubled quotes": conversion(doubled, out),
        "quoted name": conversion(middle, out),
        "its bare pass": python(BARE, middle),
        "not ASCII": conversion(foreign, out),
        "its bare pass ": python(BARE, foreign),
    })
    base = taken["clean"].seconds
    print_table(f"Other content, {number:,} rows", ["file", "s", "× clean"],
                [[name.strip(), f"{each.seconds:.2f}", f"{each.seconds / base:.2f}"] for name, each in taken.items()])

    source = folder / "100000.csv"
    template = folder / "prompt.md"
    template.write_text("Write a biography.\n\nName: {{artist_name}}\nFacts: {{artist_data}}\n" + "Be brief. " * 10)
    taken = medians({
        "stored prompt": conversion(source, out),
        "prompt template": conversion(source, out, "--prompt-file", str(template)),
    })
    base = taken["stored prompt"].seconds
    print_table("Prompt template against stored prompt, 100,000 rows", ["prompt", "s", "× stored"],
                [[name, f"{each.seconds:.2f}", f"{each.seconds / base:.2f}"] for name, each in taken.items()])

    source = clean
    commands = {"gen_batch_jsonl.py": conversion(source, out), **other_tools(source, out)}
    taken = medians(commands, runs=3)
    print_table(f"The same job by other tools, {number:,} rows", ["tool", "s", "peak MB"],
                [[name, f"{each.seconds:.2f}", f"{each.peak_mb:.0f}"] for name, each in taken.items()])


def benchmark_manager(_folder: Path, quick: bool) -> None:
    from benchmark_manager import tables  # it measures with what is above

    print()
    for line in tables(quick):
        print(line, flush=True)


# -- command line ------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Path, bool], None]] = {
    "converter": benchmark_converter,
    "manager": benchmark_manager,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="?", choices=[*SECTIONS], help="one section (default: all)")
    parser.add_argument("--quick", action="store_true", help="leave out the large sizes")
    args = parser.parse_args()
    versions = f"Python {platform.python_version()}, openai {importlib.metadata.version('openai')}"
    print(f"{datetime.date.today()}, {versions}, {os.cpu_count()} CPUs")
    for name in [args.section] if args.section else [*SECTIONS]:
        with tempfile.TemporaryDirectory() as folder:
            SECTIONS[name](Path(folder), args.quick)


if __name__ == "__main__":
    main()
