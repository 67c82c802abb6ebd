"""Files, streams, the command line, and what needs processes of their own: signals, kills, full disks."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
import time as real_time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import (
    COMMANDS,
    CREATE,
    IDS,
    KEY,
    LEFT_BEHIND,
    OFFLINE,
    OLD,
    ONLINE,
    ROOT,
    RUN,
    WITH_JSON,
    Capture,
    Environment,
    FakeTime,
    Json,
    Killed,
    Tool,
    asked,
    assert_paid_once,
    assert_results,
    assert_run_once,
    done_batch,
    error,
    exchanges_of,
    file_size_limit,
    flags_of,
    fresh_api,
    ids,
    in_short,
    jsonl,
    kill,
    leftovers,
    live_in,
    long_result,
    main,
    only_batch,
    popen,
    request,
    requests_file,
    run_script,
    success,
    write_requests,
)
from faulty_api import Fault, FaultyAPI

import batch_tool
import gen_batch_jsonl

NOT_SECONDS = "not a number of seconds above 0 and at most 100000000: "
SAMPLE_VALUES = {"--in": "r", "--out": "o", "--results": "s", "--batch-id": "b"}
USAGE = {name: [word for flag in sorted(flags_of(name) & {*SAMPLE_VALUES}) for word in (flag, SAMPLE_VALUES[flag])]
         for name in COMMANDS}


@contextlib.contextmanager
def started(*args: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The same for the time of the block."""
    with popen(*args, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


MANAGER = ROOT / "batch_tool.py"
CONVERTER = ROOT / "gen_batch_jsonl.py"


# ---- files ----


def test_an_output_file_replaces_the_old_one_and_keeps_its_mode(work: Path) -> None:
    Path("out").write_text("old")
    Path("out").chmod(0o640)
    with batch_tool.open_output("out") as file:
        file.write(b"new")
        assert Path("out").read_text() == "old"
    assert (Path("out").read_text(), stat.S_IMODE(Path("out").stat().st_mode)) == ("new", 0o640)


def test_a_new_output_file_has_ordinary_permissions_and_its_parent_directories_are_made(work: Path) -> None:
    umask = os.umask(0o027)
    try:
        with batch_tool.open_output("a/b/out") as file:
            file.write(b"new")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(Path("a/b/out").stat().st_mode) == 0o640


def test_an_output_file_is_as_it_was_after_a_failure(work: Path) -> None:
    Path("out").write_text("old")
    with pytest.raises(batch_tool.CommandError), batch_tool.open_output("out") as file:
        file.write(b"new")
        raise batch_tool.CommandError("no")
    assert (Path("out").read_text(), leftovers()) == ("old", [])


def test_a_symlink_is_followed(work: Path) -> None:
    Path("link").symlink_to("out")
    with batch_tool.open_output("link") as file:
        file.write(b"new")
    assert (Path("link").is_symlink(), Path("out").read_text()) == (True, "new")


def test_a_symlink_to_itself_is_an_error(work: Path) -> None:
    Path("link").symlink_to("link")
    with pytest.raises(batch_tool.CommandError, match="link: Too many levels"), batch_tool.open_output("link") as file:
        file.write(b"new")
    assert (Path("link").is_symlink(), leftovers()) == (True, [])


def test_a_pause_of_the_program_that_writes_to_stdin_is_not_the_end(work: Path) -> None:
    lines = [jsonl(request("a1")), jsonl(request("a2"))]
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    command = [sys.executable, str(ROOT / "batch_tool.py"), "validate", "--in", "-"]
    with subprocess.Popen(command, stdin=reader, stdout=subprocess.PIPE, text=True) as process:
        os.write(writer, lines[0])
        time.sleep(0.4)
        os.write(writer, lines[1])
        os.close(writer)
        assert process.communicate()[0].startswith("OK: 2 requests")


def test_an_error_of_reading_names_the_file(tool: Tool, capsys: Capture) -> None:
    unreadable = "/proc/self/mem"  # which opens, and has nothing at its beginning
    if not os.path.exists(unreadable):
        pytest.skip("no such file here")
    requests_file()
    for arguments in (["validate", "--in", unreadable],
                      ["export", "--in", "requests.jsonl", "--results", "/dev/null", unreadable, "--out", "out"]):
        assert tool(*arguments) == 1
        assert capsys.readouterr() == ("", error(f"cannot read {unreadable}: Input/output error"))


def test_a_part_of_a_file_reads_as_a_file_of_its_own(work: Path) -> None:
    path = requests_file(b"0123456789")
    with path.open("rb") as file:
        part = batch_tool.FilePart(file, 2, 5)
        assert (part.read(2), part.read(), part.read(), part.tell()) == (b"23", b"456", b"", 5)
        assert (part.seek(-1, os.SEEK_END), part.read(9), part.seek(0), part.read(1)) == (4, b"6", 0, b"2")


# ---- command line ----


def usage_error(arguments: list[str], capsys: Capture) -> str:
    """The last line of stderr of a command line that is refused."""
    with pytest.raises(SystemExit) as stopped:
        batch_tool.main(arguments)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    return err.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_can_be_abbreviated(command: str, work: Path, capsys: Capture) -> None:
    for option in flags_of(command) - {"--in"}:
        reason = usage_error([command, *USAGE[command], option[:-1] + "=1"], capsys)
        assert "unrecognized arguments: " in reason or "required: " in reason


def test_the_commands_stand_in_the_order_a_batch_lives_and_know_what_is_offline() -> None:
    assert [*COMMANDS] == ["validate", "preview", "create", "status", "wait", "retrieve", "cancel", "list", "retry",
                           "export", "run"]
    assert OFFLINE == ["validate", "retry", "export"]
    assert WITH_JSON == ["create", "status", "wait", "cancel", "list"]
    assert all({"--log-file", "--verbose"} <= flags_of(command) for command in ONLINE)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_a_result_within_80_columns(command: str | None, work: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        batch_tool.main([*([command] if command else []), "--help"])
    out, err = capsys.readouterr()
    assert (stopped.value.code, err) == (0, "")
    assert all(len(line) <= 88 for line in out.splitlines())
    assert (flags_of(command) if command else {*COMMANDS}) <= set(re.findall(r"[a-z-]+", out))


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "the following arguments are required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["validate"], "the following arguments are required: --in"),
        (["create", "--in", ""], "argument --in: must not be empty"),
        (["create", "--in", "x", "--max-requests", "0"], "not a whole number of 1 or more: '0'"),
        (["create", "--in", "x", "--max-requests", "50001"], "the limit of a batch is 50000 requests: '50001'"),
        (["create", "--in", "x", "--endpoint", "a\nb"], "has control characters or is not valid UTF-8: 'a\\nb'"),
        (["list", "--limit", "-1"], "not a whole number of 1 or more: '-1'"),
        (["list", "--limit", "1_0"], "not a whole number of 1 or more: '1_0'"),
        (["wait", "--batch-id", "b", "--interval", "0"], f"{NOT_SECONDS}'0'"),
        (["wait", "--batch-id", "b", "--interval", "nan"], f"{NOT_SECONDS}'nan'"),
        (["wait", "--batch-id", "b", "--interval", "1e9"], f"{NOT_SECONDS}'1e9'"),
        (["wait", "--batch-id", "b", "--interval", "1.2.3"], f"{NOT_SECONDS}'1.2.3'"),
        (["wait", "--batch-id", "b", "--timeout", "-3"], f"{NOT_SECONDS}'-3'"),
        (["status", "--batch-id", ".."], "not a batch id: '..'"),
        (["status", "--batch-id", "a b"], "not a batch id: 'a b'"),
        (["status", "--batch-id", "a\n"], "not a batch id: 'a\\n'"),
        (["status", "--batch-id", ""], "not a batch id: ''"),
        (["retrieve", "--batch-id", "a", "b", "--out", "x"], "--out works with a single --batch-id only"),
        (["preview", "--in", "x", "--requests", "0"], "not a whole number of 1 or more: '0'"),
        (["run", "--in", "x", "--out", "y", "--max-new", "-1"], "not a whole number of 0 or more: '-1'"),
        (["run", "--in", "x", "--out", "y", "--max-new", "1_0"], "not a whole number of 0 or more: '1_0'"),
        (["preview", "--in", "x", "--prices", "1"], "not two prices like 0.05,0.25: '1'"),
        (["preview", "--in", "x", "--prices", "1,-2"], "not two prices like 0.05,0.25: '1,-2'"),
        (["preview", "--in", "x", "--prices", "1,nan"], "not two prices like 0.05,0.25: '1,nan'"),
        (["preview", "--in", "x", "--prices", "1,2,3"], "not two prices like 0.05,0.25: '1,2,3'"),
        (["export", *USAGE["export"], "--encoding", "nope", "--csv", "c"], "not an encoding that Python knows: 'nope'"),
        (["export", *USAGE["export"], "--id-column", "x"], "--encoding and --skip-header need --csv"),
        (["export", *USAGE["export"], "--encoding", "ascii"], "--encoding and --skip-header need --csv"),
        (["export", "--in", "-", "--csv", "-", "--results", "s", "--out", "o"], "only one input can be stdin (-)"),
        (["retry", "--in", "-", "--results", "-", "--out", "x"], "only one input can be stdin (-)"),
        (["retry", "--in", "/dev/stdin", "--results", "-", "--out", "x"], "only one input can be stdin (-)"),
    ],
    ids=in_short,
)
def test_a_usage_error_is_exit_2(arguments: list[str], reason: str, work: Path, capsys: Capture) -> None:
    assert reason in usage_error(arguments, capsys)


READ_AND_WRITTEN = " would be read and written at once; choose another path to write"


@pytest.mark.parametrize("command", ["retry", "export"])
@pytest.mark.parametrize("out", ["requests.jsonl", "results.jsonl", "link", "artists.csv"])
def test_a_file_cannot_be_read_and_written_at_once(command: str, out: str, work: Path, capsys: Capture) -> None:
    requests_file()
    Path("results.jsonl").write_bytes(jsonl(success()))
    Path("artists.csv").write_text("artist_id\n")
    Path("link").symlink_to("requests.jsonl")
    inputs = {"--in": "requests.jsonl", "--results": "results.jsonl", "--csv": "artists.csv"}
    arguments = [word for flag in flags_of(command) & {*inputs} for word in (flag, inputs[flag])]
    if os.path.realpath(out) in [os.path.realpath(path) for path in arguments]:
        assert usage_error([command, *arguments, "--out", out], capsys).endswith(READ_AND_WRITTEN)


def test_the_log_cannot_be_stdout(work: Path, capsys: Capture) -> None:
    said = usage_error(["list", "--log-file", "-"], capsys)
    assert said.endswith("argument --log-file: stdout is for results; name a file, or /dev/stderr")


def test_the_log_cannot_be_the_request_file(work: Path, capsys: Capture) -> None:
    requests_file()
    arguments = ["create", "--in", "requests.jsonl", "--log-file", "requests.jsonl"]
    assert usage_error(arguments, capsys).endswith(READ_AND_WRITTEN)


@pytest.mark.parametrize("arguments", [
    ["run", "--in", "requests.jsonl", "--out", "x", "--log-file", "./x"],
    ["retrieve", "--batch-id", "b1", "--out", "x.jsonl", "--log-file", "./x.jsonl"],
], ids=in_short)
def test_the_results_cannot_go_into_the_log(arguments: list[str], work: Path, capsys: Capture) -> None:
    requests_file()
    assert usage_error(arguments, capsys).endswith(
        "the log would be the same file as the output; choose another --log-file"
    )


@pytest.mark.parametrize("arguments", [[KEY], ["list", "--api-key", KEY], ["status", "--batch-id", f"Bearer {KEY}"],
                                       ["list", "--limit", "my-own-key"]], ids=in_short)
def test_a_usage_error_does_not_show_the_key(
    arguments: list[str], work: Path, monkeypatch: Environment, capsys: Capture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "my-own-key")
    said = usage_error(arguments, capsys)
    assert "[secret]" in said and KEY[10:] not in said and "my-own" not in said


# ---- processes of their own ----


@pytest.mark.parametrize("script", ["gen_batch_jsonl.py", "batch_tool.py"])
def test_an_old_python_gets_a_line_that_says_what_is_needed(script: str) -> None:
    old = "import runpy, sys; sys.version_info, sys.version = (3, 10, 1), '3.10.1 (main)'; runpy.run_path(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", old, ROOT / script], capture_output=True, text=True)
    reason = f"{script}: error: it needs Python 3.11 or later on Linux or macOS; on Windows, run it in WSL\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", reason)


def common_block(script: str) -> str:
    content = (ROOT / script).read_text()
    block = re.search(r"^# ==== common block.*?^# ==== end of the common block[^\n]*\n", content, re.S | re.M)
    return block[0] if block else ""


def test_what_stands_in_both_scripts_is_the_same_byte_for_byte() -> None:
    block = common_block("gen_batch_jsonl.py")
    if not block:
        pytest.skip("gen_batch_jsonl.py has no common block")
    assert block == common_block("batch_tool.py")


def test_the_description_of_the_program_is_in_its_help(work: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        batch_tool.main(["--help"])
    assert (batch_tool.__doc__ or "nothing") in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_the_interpreter_swallowed_can_be_sent_again() -> None:
    class Callback:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # in which the handler raises, for nobody to catch

    with pytest.raises(batch_tool.Exit), batch_tool.stopping_on_signals():
        Callback()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.1)  # the second after a first signal is left to the cleaning up
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def bare(*args: object, python: Iterable[str] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    """Run without any installed package, so without the SDK. `python` are options of the interpreter."""
    command = [sys.executable, "-S", "-I", *python, str(ROOT / "batch_tool.py"), *map(str, args)]
    defaults: Json = {"capture_output": True, "encoding": "utf-8", "timeout": 60}
    done: subprocess.CompletedProcess[str] = subprocess.run(command, **defaults | options)
    return done


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["--help"], 0),
        (["run", "--help"], 0),
        (["list", "--limit", "x"], 2),
        (["validate", "--in", "requests.jsonl"], 0),
        (["retry", "--in", "requests.jsonl", "--results", "/dev/null", "--out", "out"], 0),
        (["export", "--in", "requests.jsonl", "--results", "/dev/null", "--out", "out"], 0),
    ],
    ids=in_short,
)
def test_what_is_offline_needs_no_sdk_and_no_key(arguments: list[str], code: int, work: Path) -> None:
    requests_file()
    assert bare(*arguments).returncode == code


def test_without_the_sdk_an_online_command_says_how_to_get_it(work: Path, monkeypatch: Environment) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    done = bare("list")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"batch_tool.py: error: the openai package cannot be imported \(.*\); pip install -r requirements.txt, "
        r"or use the Python of a virtual environment that has it\n",
        done.stderr,
    )


# ---- what stdout takes, with a buffer and without one ----

UNBUFFERED = pytest.mark.parametrize("python", [[], ["-u"]], ids=["buffered", "unbuffered"])
TO_STDOUT = pytest.mark.parametrize(
    "arguments", [["validate"], ["export", "--results", "/dev/null", "--out", "-"]], ids=in_short
)


def bare_to(stdout: Any, python: list[str], arguments: list[str]) -> tuple[int, str]:
    """Run on requests.jsonl with this stdout. The exit code and what is on stderr."""
    done = bare(*arguments, "--in", "requests.jsonl", python=python, capture_output=False, stdout=stdout,
                stderr=subprocess.PIPE)
    return done.returncode, done.stderr


@UNBUFFERED
@TO_STDOUT
def test_a_closed_stdout_ends_the_program_quietly(arguments: list[str], python: list[str], work: Path) -> None:
    requests_file()
    ours, theirs = os.pipe()
    os.close(ours)
    assert bare_to(theirs, python, arguments) == (1, "")
    os.close(theirs)


@UNBUFFERED
@TO_STDOUT
def test_a_full_disk_behind_stdout_is_one_line(arguments: list[str], python: list[str], work: Path) -> None:
    requests_file()
    with open("/dev/full", "w") as full:
        assert bare_to(full, python, arguments) == (1, error("cannot write stdout: No space left on device"))


@UNBUFFERED
def test_a_slow_reader_of_a_non_blocking_pipe_gets_every_byte(python: list[str], work: Path) -> None:
    content = requests_file(*(request(str(number)) for number in range(2000))).read_bytes()
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    arguments = ["retry", "--in", "requests.jsonl", "--results", "/dev/null", "--out", "-"]
    command = [sys.executable, *python, str(ROOT / "batch_tool.py"), *arguments]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL) as process:
        os.close(theirs)
        time.sleep(0.3)  # the pipe is full
        with open(ours, "rb") as reader:
            assert reader.read() == content
    assert (process.returncode, len(content) > 300_000) == (0, True)


@UNBUFFERED
def test_a_disk_that_takes_only_a_part_of_the_last_line_is_exit_1(python: list[str], work: Path) -> None:
    content = requests_file(jsonl(request()).rstrip().rjust(8 * 1024 + 9) + b"\n").read_bytes()
    script = " ".join([sys.executable, *python, str(ROOT / "batch_tool.py")])
    command = f"ulimit -f 8; trap '' XFSZ; exec {script} retry --in requests.jsonl --results /dev/null --out - > out"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, error("cannot write stdout: File too large"))
    assert Path("out").read_bytes() == content[: 8 * 1024]


@pytest.mark.parametrize(("redirection", "code", "out", "err"), [
    ("validate --in requests.jsonl 2> /dev/full", 0, "OK: 2 requests, {size} bytes, 1 batch\n", ""),
    ("validate --nonsense 2> /dev/full", 2, "", ""),
    ("validate --nonsense 2>&-", 2, "", ""),
    ("--help > /dev/full", 1, "", error("cannot write stdout: No space left on device")),
    ("run --help | true; exit $PIPESTATUS", 1, "", ""),
    ("validate --in - <&-", 1, "", error("stdin is closed; there is nothing to read")),
    ("validate --in requests.jsonl >&-", 1, "", ""),
])
def test_a_stream_that_takes_or_gives_nothing_is_foreseen(
    redirection: str, code: int, out: str, err: str, work: Path
) -> None:
    size = requests_file().stat().st_size
    command = f"'{sys.executable}' '{ROOT}/batch_tool.py' {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, out.format(size=size), err)


def test_a_full_disk_leaves_the_old_file(work: Path) -> None:
    requests_file(*[request(str(number)) for number in range(500)])
    Path("out").write_text(OLD)
    command = f"ulimit -f 8; trap '' XFSZ; exec {sys.executable} {ROOT / 'batch_tool.py'} " \
              "retry --in requests.jsonl --results /dev/null --out out"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, error("cannot write out: File too large"))
    assert (Path("out").read_text(), leftovers()) == (OLD, [])


def test_a_signal_leaves_the_batch_running_and_says_how_to_resume(api: FaultyAPI) -> None:
    batch = api.new_batch("in_progress", id="batch_1")
    numbers = (signal.SIGINT, signal.SIGHUP)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        wait = ("wait", "--batch-id", "batch_1", "--log-file")
        processes = [stack.enter_context(started(*wait, f"{number}.log")) for number in numbers]
        for number, process in zip(numbers, processes, strict=True):
            assert process.stderr
            progress = process.stderr.readline()
            process.send_signal(number)
            said = [process.stderr.readline(), process.stderr.readline()]
            process.send_signal(number)  # while the interpreter ends
            assert process.communicate(timeout=30) == ("", "")
            assert process.returncode == 128 + number
            assert progress == "batches: 1 in_progress; 0:00:00 elapsed\n"
            assert said == [
                "the batches keep running on the server; to resume waiting: batch_tool.py wait --batch-id batch_1\n",
                "batch_tool.py: stopped\n",
            ]
    assert (batch.status, asked(api, "POST")) == ("in_progress", 0)


INTERRUPT = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.01)\n"
IN_CALLBACK = f"class Callback:\n def __del__(self):\n  {'; '.join(INTERRUPT.splitlines())}\nCallback()\n"


@pytest.mark.parametrize("module, code", [("hashlib", INTERRUPT), ("openai", INTERRUPT), ("openai", IN_CALLBACK)],
                         ids=["hashlib", "openai", "callback"])
def test_ctrl_c_during_the_imports_is_no_traceback(
    module: str, code: str, api: FaultyAPI, monkeypatch: Environment
) -> None:
    Path("modules").mkdir()
    Path("modules", f"{module}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(Path("modules").absolute()))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that the process does not inherit that it is ignored
    done = run_script("batch_tool.py", "list")
    assert (done.returncode, done.stdout, done.stderr) in [
        (-signal.SIGINT, "", ""), (128 + signal.SIGINT, "", "batch_tool.py: stopped\n")
    ]


class Signalled(Fault):
    """A signal comes while the command waits for the answer."""

    def applies_to(self, method: str, path: str) -> bool:
        is_hit = super().applies_to(method, path)
        if is_hit:
            os.kill(os.getpid(), self.status)
        return is_hit


def test_a_signal_during_a_download_leaves_the_old_file(api: FaultyAPI, tool: Tool, capsys: Capture) -> None:
    done_batch(api)
    Path("results_batch_1.jsonl").write_text(OLD)
    api.faults.append(Signalled("GET", "/content$", action="delay", seconds=30, status=signal.SIGTERM))
    assert tool("retrieve", "--batch-id", "batch_1") == 143
    assert capsys.readouterr() == ("", "batch_tool.py: stopped\n")
    assert (Path("results_batch_1.jsonl").read_text(), leftovers()) == (OLD, [])


def test_a_create_whose_reader_is_gone_is_run_again(
    api: FaultyAPI, tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", os.fdopen(theirs, "w"))
        assert tool("create", "--in", requests_file()) == 1
    assert capsys.readouterr().err == ""
    assert tool("create", "--in", "requests.jsonl") == 0
    assert capsys.readouterr().out == ids(only_batch(api))


# ---- killed and stopped ----


@pytest.mark.parametrize("is_carried_out", [True, False])
@pytest.mark.parametrize("command", [CREATE, RUN], ids=["create", "run"])
def test_killed_at_each_request_in_turn_the_next_run_at_once_pays_nothing_again(
    work: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], is_carried_out: bool
) -> None:
    write_requests(*IDS)
    before = signal.signal(signal.SIGUSR1, lambda *_: kill())
    for nth, exchange in exchanges_of(command, monkeypatch).items():
        if exchange.method == "GET" and not (is_carried_out and command is RUN):
            continue
        with fresh_api(monkeypatch) as api:
            api.list_delay, api.step = 10, 2
            time = live_in(api, FakeTime())
            fault: dict[str, Any] = {"action": "delay", "when": "after"} if is_carried_out else {"action": "reset"}
            api.faults = [Signalled(skip=nth, seconds=0.05, status=signal.SIGUSR1, **fault)]
            with pytest.raises(Killed):
                main(*command, time=time)
            assert main("run", *RUN[1:5], "--max-requests", "1", time=time) == 0
            assert_results("results.jsonl", IDS)
            assert_run_once(api, IDS, Counter(["a2"]))
    signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def slow(api: FaultyAPI, step: float) -> Iterator[None]:
    """The mock server with steps that take a little while, and none any more afterwards."""
    api.outcomes = {"a2": ["500", "200"], "a7": ["expired", "200"]}
    api.step = step
    yield
    api.step = 0


def start(command: tuple[str, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(MANAGER), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_log(process: subprocess.Popen[str]) -> None:
    """Until the command has begun to log, which is after it has begun to catch signals."""
    while process.poll() is None and not any(path.stat().st_size for path in Path().glob("logs/*")):
        real_time.sleep(0.005)


def test_killed_again_and_again_it_runs_nothing_twice(api: FaultyAPI) -> None:
    ids = [f"a{number}" for number in range(1, 9)]
    write_requests(*ids)
    chance = random.Random(2)
    run = ("run", "--in", "requests.jsonl", "--out", "results.jsonl", "--max-requests", "3", "--interval", "0.05")
    with slow(api, 0.1):
        for _ in range(3):
            for log in Path().glob("logs/*"):
                log.unlink()
            process = start(chance.choice([run, ("create", *run[1:3], *run[5:7])]))
            wait_for_log(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=chance.uniform(0.1, 0.8))
            process.kill()
            process.communicate()
    assert main(*run) == 0
    assert_run_once(api, ids, Counter(["a2"]))
    assert_results("results.jsonl", ids)


@pytest.mark.parametrize(("command", "seconds"), [(CREATE, 0), (RUN, 60)], ids=["create", "run"])
def test_killed_around_the_answer_to_its_post_the_next_run_at_once_pays_nothing_again(
    api: FaultyAPI, command: tuple[str, ...], seconds: float
) -> None:
    api.list_delay = 0 if seconds else 3600  # its answer is late, or its batch is not listed for long
    api.faults = [Fault("POST", "/batches$", when="after", action="delay", seconds=seconds)] if seconds else []
    write_requests("a1")
    process = start(command)
    end = real_time.monotonic() + 20
    while not api.batches or not (seconds or b'"batch"' in note()):
        assert real_time.monotonic() < end
        real_time.sleep(0.002)
    process.kill()
    process.communicate()
    assert main(*RUN) == 0
    assert_paid_once(api, Path("requests.jsonl").read_bytes())
    assert len(api.batches) == 1


def note() -> bytes:
    return b"".join(path.read_bytes() for path in Path(os.environ["XDG_STATE_HOME"], "batch_tool").glob("*"))


def test_stopped_at_any_moment_it_leaves_nothing_behind(api: FaultyAPI) -> None:
    write_requests(*IDS)
    Path("results.jsonl").write_bytes(old := jsonl(success("z9")))
    with slow(api, 0.2):
        process = start((*RUN, "--interval", "0.05"))
        wait_for_log(process)
        real_time.sleep(random.random() * 0.6)
        process.terminate()
        _, err = process.communicate(timeout=20)
    assert (process.returncode, Path("results.jsonl").read_bytes()) == (143, old), err
    assert err.endswith("batch_tool.py: stopped\n")
    assert "Traceback" not in err
    assert set(os.listdir()) == LEFT_BEHIND
    assert main(*RUN) == 0
    assert_run_once(api, IDS, Counter(["a2"]))
    assert_results("results.jsonl", [*IDS, "z9"])


# ---- nowhere to write ----


def big_files() -> list[str]:
    """A CSV, a request file and its results, each larger than a file may be; their requests."""
    ids = [f"a{number}" for number in range(400)]
    rows = "".join(f"{custom_id},Artist {custom_id},{'x' * 100}\n" for custom_id in ids)
    Path("artists.csv").write_text(f"artist_id,artist_name,artist_data\n{rows}")
    write_requests(*ids)
    Path("bios.jsonl").write_bytes(b"".join(map(long_result, ids)))
    return ids


WRITERS = {
    "convert": ("--in", "artists.csv", "--prompt-id", "p", "--model", "m"),
    "export": ("export", "--in", "requests.jsonl", "--results", "bios.jsonl"),
    "run": ("run", "--in", "small.jsonl", "--log-file", "/dev/null", "--interval", "0.01"),
    "retrieve": ("retrieve", "--batch-id", "batch_1", "--log-file", "/dev/null"),
}


@pytest.mark.parametrize(
    ("command", "out"),
    [("convert", "old"), ("convert", "-"), ("export", "/dev/full"), ("export", "directory"), ("run", "old"),
     ("run", "-"), ("retrieve", "old")],
)
def test_an_output_that_cannot_be_written_is_one_line_and_no_half_file(
    api: FaultyAPI, capsys: Capture, monkeypatch: Environment, command: str, out: str
) -> None:
    big_files()
    write_requests("new", path="small.jsonl")
    api.new_batch("completed", output=Path("bios.jsonl").read_bytes(), id="batch_1")
    old = jsonl(request("z9")) if command == "convert" else Path("bios.jsonl").read_bytes()
    Path("old").write_bytes(old)
    Path("directory").mkdir()
    before = {*os.listdir()}
    if out == "-":
        monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    with file_size_limit(20_000):
        assert (gen_batch_jsonl if command == "convert" else batch_tool).main([*WRITERS[command], "--out", out]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(errors) == 1
    assert re.search("No space left|File too large|irectory", errors[0])
    assert ({*os.listdir()}, Path("old").read_bytes(), os.listdir("directory")) == (before, old, [])


def test_input_that_finds_no_room_to_be_copied_is_one_line(
    tool: Tool, capsys: Capture, monkeypatch: Environment
) -> None:
    big_files()
    with open("requests.jsonl") as source, file_size_limit(20_000):
        monkeypatch.setattr(sys, "stdin", source)
        assert tool("validate", "--in", "-") == 1
    reason = "cannot write a temporary file: File too large; set TMPDIR to a directory with free space"
    assert capsys.readouterr() == ("", error(reason))


def test_a_log_on_a_full_disk_ends_the_command_before_it_costs_anything(
    api: FaultyAPI, capfd: pytest.CaptureFixture[str]
) -> None:
    write_requests(*IDS)
    for command in (CREATE, RUN):
        assert main(*command, "--log-file", "/dev/full") == 1
        assert capfd.readouterr().err == (
            "batch_tool.py: error: cannot write the log /dev/full: No space left on device; choose another with "
            "--log-file\n"
        )
    assert api.exchanges == []
