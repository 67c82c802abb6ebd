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
import re
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
    seconds: float  # by the clock
    peak_mb: float
    cpu: float = 0.0  # seconds, of all threads


def run_process(command: list[str]) -> Measured:
    """The times and the peak memory of a command; its own output is dropped."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"benchmark.py: error: exit code {process.returncode}: {' '.join(command)}")
    return Measured(seconds, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime)


def medians(commands: dict[str, list[str]], runs: int = RUNS) -> dict[str, Measured]:
    """The median time and greatest memory of each command, the commands taking turns."""
    results: dict[str, list[Measured]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            results[name].append(run_process(command))
    return {
        name: Measured(
            statistics.median(each.seconds for each in taken),
            max(each.peak_mb for each in taken),
            statistics.median(each.cpu for each in taken),
        )
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


NAMES = {
    "latin": ("Björk José Zoë Émilie Anna John Łukasz Ann-Marie Jürgen", "Guðmundsdóttir Núñez Simon Müller O'Neil"),
    "cyrillic": ("Анна Виктор Земфира Пётр Мумий Юлия", "Рамазанова Цой Тролль Чичерина"),
    "japanese": ("東京 宇多田 山口 椎名 米津", "事変 ヒカル 林檎 玄師 百恵"),
    "korean": ("김 이영 방탄 박효신", "소년단 철수"),
    "arabic": ("فيروز أم عمرو", "الرحباني كلثوم دياب"),
    "greek": ("Μίκης Νάνα Χάρις", "Θεοδωράκης Μούσχουρη Αλεξίου"),
    "ascii": ("John Anna The DJ Mary", "Smith Quartet Waters Shadow Band"),
}
WORDS = {
    "latin": "chanteuse née à Reykjavík depuis 1993 avec plusieurs albums très aimés et une tournée “mondiale” – où",
    "cyrillic": "российская группа из города основанная в году известна альбомами и песнями которые знают все",
    "japanese": "日本の音楽家。 東京都出身で、 数々の名曲を発表した シンガーソングライター 作曲家として知られる。",
    "korean": "대한민국의 가수이자 작곡가로 서울에서 태어났다 많은 음반을 발표했다",
    "arabic": "مغنية لبنانية ولدت في بيروت ولها العديد من الأغاني",
    "greek": "Έλληνας συνθέτης γεννήθηκε στη Χίο με πολλά τραγούδια",
    "ascii": "post rock trio from Leeds known for three records and one long tour with many guests born in Berlin",
}
SHARES = {"latin": 50, "cyrillic": 15, "japanese": 15, "korean": 8, "arabic": 6, "greek": 6}
CORPORA = ("mixed scripts, a fifth quoted", "line breaks and quotes", "ASCII, a fifth quoted", "all quoted")


def artist(at: int, script: str, rng: random.Random) -> list[str]:
    """An artist_id, artist_name and artist_data of about 200 bytes."""
    first, last = NAMES[script]
    words = rng.choices(WORDS[script].split(), k=12 if script == "japanese" else 18)
    return [f"a{at}", f"{rng.choice(first.split())} {rng.choice(last.split())}", " ".join(words)]


def rows_of(corpus: str, number: int) -> Iterator[str]:
    """Rows. Every fifth has a comma; of "line breaks and quotes", 5 % have a line break and 10 % doubled quotes."""
    rng = random.Random(number)
    scripts = rng.choices([*SHARES], [*SHARES.values()], k=number)
    for at, script in enumerate(scripts):
        fields = artist(at, "ascii" if corpus.startswith("ASCII") else script, rng)
        if at % 5 == 0:
            fields[2] += ", and more"
        if corpus == "line breaks and quotes":
            fields[2] += '\nSays: "more"' if at % 20 == 0 else ' says "more"' if at % 20 == 7 else ""
        yield ",".join(
            '"' + field.replace('"', '""') + '"' if corpus == "all quoted" or re.search('[,"\n]', field) else field
            for field in fields
        ) + "\n"


def write_csv(path: Path, corpus: str, number: int) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.write("artist_id,artist_name,artist_data\n")
        file.writelines(rows_of(corpus, number))
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
    """CPU time, less that of a file with one row, as a ratio to a bare csv.reader pass over the same file."""
    number = 60_000 if quick else 300_000
    out = folder / "out.jsonl"
    template = folder / "prompt.md"
    template.write_text("Write a biography.\n\nName: {{artist_name}}\nFacts: {{artist_data}}\n" + "Be brief. " * 10)
    prompt = ("--prompt-file", str(template))
    one = write_csv(folder / "one.csv", CORPORA[0], 1)
    ratios, tools = [], []
    for corpus in CORPORA:
        source = write_csv(folder / "artists.csv", corpus, number)
        commands = {
            "bare": python(BARE, source),
            "stored prompt": conversion(source, out),
            "template": conversion(source, out, *prompt),
            "plain": python(PLAIN, source, out),
        }
        others = other_tools(source, out)
        starts = {"bare start": python(BARE, one), "our start": conversion(one, out)}
        taken = medians(commands | others | starts)
        bare = taken["bare"].cpu - taken["bare start"].cpu
        start = {"bare": taken["bare start"].cpu, "plain": taken["bare start"].cpu}
        cpu = {name: taken[name].cpu - start.get(name, taken["our start"].cpu) for name in commands}
        ratios.append([
            corpus, f"{bare:.2f}", *(f"{cpu[name] / bare:.2f}" for name in ("stored prompt", "template", "plain")),
            f"{taken['stored prompt'].seconds:.2f}", f"{taken['stored prompt'].peak_mb:.0f}",
        ])
        tools += [
            [corpus, name, f"{taken[name].seconds:.2f}", f"{taken[name].cpu:.2f}", f"{taken[name].peak_mb:.0f}"]
            for name in ("stored prompt", *others)
        ]
    columns = ["corpus", "bare pass, s CPU", "× with a stored prompt", "× with a template",
               "× csv.reader + json.dumps", "s by the clock", "peak MB"]
    print_table(f"The converter against a bare csv.reader pass, {number:,} rows, CPU without start-up", columns, ratios)
    print_table(f"The same job by other tools, {number:,} rows, with start-up",
                ["corpus", "tool", "s", "s CPU", "peak MB"],
                [[corpus, "gen_batch_jsonl.py" if name == "stored prompt" else name, *rest]
                 for corpus, name, *rest in tools])

    rows = 100_000 if quick else 1_000_000
    source = write_csv(folder / "artists.csv", CORPORA[0], rows)
    seconds, peak, _ = medians({"ours": conversion(source, out)}, runs=3)["ours"]
    print_table("A large file of mixed scripts", ["rows", "s", "rows/s", "peak MB"],
                [[f"{rows:,}", f"{seconds:.2f}", f"{rows / seconds:,.0f}", f"{peak:.0f}"]])


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
