"""The manager's part of the benchmark: offline commands, transfers, and whole runs against the local mock server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmark import ROOT, SHARES, Measured, artist, medians, run_process

sys.path.insert(0, str(ROOT / "samples"))

from faulty_api import FaultyAPI

MANAGER = str(ROOT / "batch_tool.py")
LOADS = "import json, sys\nfor path in sys.argv[1:]:\n    for line in open(path, 'rb'):\n        json.loads(line)"
PASS = "import sys\nfor path in sys.argv[1:]:\n    for line in open(path, 'rb'):\n        pass"
START = "pass"
SERVER = """
import sys
sys.path[:0] = [f"{sys.argv[1]}/samples", f"{sys.argv[1]}/tests"]
from faulty_api import FaultyAPI
with FaultyAPI() as api:
    api.queue_limit, api.recording = int(sys.argv[2]), False
    print(api.base_url, flush=True)
    sys.stdin.read()
"""


def artist_of(number: int) -> list[str]:
    """The id, name and facts of an artist, in one of many scripts."""
    rng = random.Random(number)
    (script,) = rng.choices([*SHARES], [*SHARES.values()])
    return artist(number, script, rng)


def request_line(number: int) -> str:
    """A request of about 600 bytes."""
    custom_id, name, facts = artist_of(number)
    text = f"Write a biography of 80 to 120 words.\n\nName: {name}\nFacts: {facts}\n{'Be brief. ' * 10}"
    body = {"model": "gpt-x", "input": text, "metadata": {"artist_name": name}}
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/responses", "body": body}
    return json.dumps(request, ensure_ascii=False) + "\n"


UNSET = ("background", "incomplete_details", "instructions", "max_output_tokens", "max_tool_calls",
         "previous_response_id", "prompt_cache_key", "safety_identifier", "user")


def response_body(number: int, name: str, text: str) -> dict[str, object]:
    """A Response with the fields that the OpenAPI document lists."""
    content = [{"type": "output_text", "annotations": [], "logprobs": [], "text": text}]
    return {
        "id": f"resp_{number:048x}", "object": "response", "created_at": 1790000000 + number, "status": "completed",
        "error": None, **dict.fromkeys(UNSET), "model": "gpt-x-2026-09-22",
        "output": [
            {"id": f"rs_{number:048x}", "type": "reasoning", "summary": []},
            {"id": f"msg_{number:048x}", "type": "message", "status": "completed", "content": content,
             "role": "assistant"},
        ],
        "parallel_tool_calls": True, "reasoning": {"effort": "medium", "summary": None}, "service_tier": "default",
        "store": True, "temperature": 1.0, "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto", "tools": [], "top_logprobs": 0, "top_p": 1.0, "truncation": "disabled",
        "usage": {"input_tokens": 120, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 150,
                  "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 270},
        "metadata": {"artist_name": name},
    }


def result_line(number: int, request_sha256: str = "") -> str:
    """A result of about two kilobytes; one in a hundred is a server error."""
    custom_id, name, facts = artist_of(number)
    if number % 100 == 7:
        response = {"status_code": 500, "request_id": "r", "body": {"error": {"code": "server_error", "message": "m"}}}
    else:
        body = response_body(number, name, f"{name}: {facts}. " * 4)
        response = {"status_code": 200, "request_id": f"req_{number:032x}", "body": body}
    result = {"id": f"batch_req_{number:032x}", "custom_id": custom_id, "response": response, "error": None}
    if request_sha256:
        result["request_sha256"] = request_sha256
    return json.dumps(result, ensure_ascii=False) + "\n"


def write_lines(path: Path, lines: Iterator[str]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    return path


def manager(*args: str | Path) -> list[str]:
    return [sys.executable, MANAGER, *map(str, args)]


def bare(program: str, *paths: Path) -> list[str]:
    return [sys.executable, "-c", program, *map(str, paths)]


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def seconds(measured: Measured) -> str:
    return f"{measured.seconds:.2f} s"


def megabytes(measured: Measured) -> str:
    return f"{measured.peak_mb:.0f} MB"


def offline_commands(folder: Path, number: int) -> dict[str, list[str]]:
    """The offline commands over so many requests."""
    folder.mkdir()
    requests = write_lines(folder / "requests.jsonl", map(request_line, range(number)))
    in_order = write_lines(folder / "in_order.jsonl", map(result_line, range(number)))
    in_reverse = write_lines(folder / "in_reverse.jsonl", map(result_line, reversed(range(number))))
    out, bios = folder / "out.jsonl", folder / "bios.csv"
    return {
        "validate": manager("validate", "--in", requests),
        "retry": manager("retry", "--in", requests, "--results", in_order, "--out", out),
        "export, results in order": manager("export", "--in", requests, "--results", in_order, "--out", bios),
        "export, results in reverse": manager("export", "--in", requests, "--results", in_reverse, "--out", bios),
    }


def offline_table(folder: Path, number: int) -> Iterator[str]:
    commands, starts = offline_commands(folder / "many", number), offline_commands(folder / "one", 1)
    requests, in_order = folder / "many" / "requests.jsonl", folder / "many" / "in_order.jsonl"
    others = {"requests": bare(LOADS, requests), "both": bare(LOADS, requests, in_order), "start": bare(START),
              "help": manager("--help")}
    times = medians({**commands, **others, **{f"start of {name}": command for name, command in starts.items()}})
    yield f"{number:,} requests of {requests.stat().st_size // number} bytes, results of " \
          f"{in_order.stat().st_size // number} bytes, mixed scripts, CPU:"
    yield ""
    yield row("command", "CPU", "peak memory", "`json.loads` of the same lines", "ratio", "without start-up")
    yield "|---|---|---|---|---|---|"
    for name in commands:
        base, cpu = times["requests" if name == "validate" else "both"].cpu, times[name].cpu
        without = (cpu - times[f"start of {name}"].cpu) / (base - times["start"].cpu)
        yield row(name, f"{cpu:.2f} s", megabytes(times[name]), f"{base:.2f} s", f"{cpu / base:.2f}", f"{without:.2f}")
    yield ""
    yield f"`--help`: {times['help'].cpu / times['start'].cpu:.1f} × a bare interpreter."


def update_table(folder: Path, number: int, new: int) -> Iterator[str]:
    """`run` where nearly all requests have a result already, beside a plain pass over both files."""
    requests, results = folder / "requests.jsonl", folder / "results.jsonl"
    with requests.open("w", encoding="utf-8") as to_send, results.open("w", encoding="utf-8") as have:
        for at in range(number):
            line = request_line(at)
            to_send.write(line)
            if at % (number // new) and at % 100 != 7:
                have.write(result_line(at, hashlib.sha256(line.rstrip("\n").encode()).hexdigest()))
    with mock_server(queue_limit=number):
        measured = run_process(manager("run", "--in", requests, "--out", results, "--interval", "0.5"))
    plain = run_process(bare(PASS, requests, results))
    loads = run_process(bare(LOADS, requests, results))
    yield row(f"{number:,} requests, about {number // 100 + new:,} of them new", "CPU", "by the clock", "peak memory")
    yield "|---|---|---|---|"
    for name, each in (("`run`", measured), ("a plain pass over both files", plain), ("`json.loads` of both", loads)):
        yield row(name, f"{each.cpu:.2f} s", seconds(each), megabytes(each))


def transfer_table(folder: Path, api: FaultyAPI, download_mb: int, upload_mb: int) -> Iterator[str]:
    output = write_lines(folder / "output.jsonl", map(result_line, range(download_mb * 1000)))
    batch = api.new_batch("completed", output=b"")
    size = output.stat().st_size
    batch.output_file_id = api.store(output.rename(api.new_path()), "batch_output", "output.jsonl").id
    yield row("transfer", "time", "peak memory")
    yield "|---|---|---|"
    measured = run_process(manager("retrieve", "--batch-id", batch.id, "--out", folder / "out"))
    yield row(f"`retrieve` of {size / 1e6:.0f} MB", seconds(measured), megabytes(measured))
    requests = write_lines(folder / "upload.jsonl", map(request_line, range(upload_mb * 2300)))
    size = requests.stat().st_size
    api.max_requests = 10**9
    measured = run_process(manager("create", "--in", requests, "--max-requests", "50000"))
    yield row(f"`create` of {size / 1e6:.0f} MB in parts of 50,000", seconds(measured), megabytes(measured))


@contextlib.contextmanager
def mock_server(queue_limit: int) -> Iterator[None]:
    """The API in a process of its own, as a child's peak memory is never below its parent's."""
    command = [sys.executable, "-c", SERVER, str(ROOT), str(queue_limit)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        os.environ["OPENAI_BASE_URL"] = server.stdout.readline().strip()
        yield


def run_table(folder: Path, numbers: list[int]) -> Iterator[str]:
    yield row("`run` of", "parts", "time", "requests a second", "peak memory", "bytes a request")
    yield "|---|---|---|---|---|---|"
    with mock_server(queue_limit=1):
        small = run_process(manager("list")).peak_mb
    for number in numbers:
        requests = write_lines(folder / "requests.jsonl", map(request_line, range(number)))
        command = manager("run", "--in", requests, "--out", folder / "out", "--interval", "0.5")
        with mock_server(queue_limit=number // 4):
            measured = run_process([*command, "--max-requests", str(number // 20)])
        speed, grown = number / measured.seconds, (measured.peak_mb - small) * 1e6 / number
        yield row(f"{number:,} requests", 20, seconds(measured), f"{speed:,.0f}", megabytes(measured), f"{grown:.0f}")


def tables(quick: bool) -> Iterator[str]:
    """The lines of the manager's tables, in Markdown."""
    with tempfile.TemporaryDirectory() as name, FaultyAPI() as api:
        folder = Path(name)
        os.environ.update(OPENAI_BASE_URL=api.base_url, OPENAI_API_KEY="local")
        os.chdir(folder)
        api.recording = False
        yield from offline_table(folder, 10_000 if quick else 100_000)
        yield ""
        yield from run_table(folder, [5_000, 20_000] if quick else [250_000, 1_000_000])
        yield ""
        yield from update_table(folder, 20_000 if quick else 1_000_000, 100 if quick else 1_000)
        yield ""
        os.environ["OPENAI_BASE_URL"] = api.base_url
        yield from transfer_table(folder, api, *((30, 20) if quick else (300, 200)))  # last: the server takes memory


if __name__ == "__main__":
    for line in tables("--quick" in sys.argv):
        print(line, flush=True)
