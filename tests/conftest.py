"""Fixtures: a work folder with a clean environment, the API on loopback, and the scripts as a user runs them."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "samples")]

from builders import KEY, ROOT, FakeTime, Tool, console_blocks, run_script  # noqa: E402
from faulty_api import FaultyAPI  # noqa: E402

import batch_tool  # noqa: E402

READ_BY_THE_SCRIPTS = ("PROMPT_", "MODEL", "OPENAI_")
IN_MEMORY = "/dev/shm"
if os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > 2**30:
    # of pytest and the mock server: on a disk each fsync takes some milliseconds
    tempfile.tempdir = tempfile.mkdtemp(dir=IN_MEMORY)
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

SIGNALS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Handle signals as an ordinary process does, also under nohup, and after a main that was stopped."""
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)
    yield
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def readme_shell(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str] | None]:
    """All commands of the README in a folder of their own. They run beside the other tests, as they take a while."""
    if not any(item.name == "test_every_command_does_what_the_readme_shows" for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("readme")
    for name in ("gen_batch_jsonl.py", "batch_tool.py", "samples", "requirements.txt"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python3").chmod(0o755)
    script = "".join(f"echo @@@; {{ {command}; }} 2>&1\n" for command, _ in console_blocks())
    server = subprocess.Popen([sys.executable, "samples/local_batch_api.py", "--step", "0"], cwd=folder,
                              stdout=subprocess.PIPE, text=True)
    assert server.stdout
    kept = {name: each for name, each in os.environ.items() if not name.startswith((*READ_BY_THE_SCRIPTS, "SSL_"))}
    environment = kept | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix, "LANGUAGE": "C",
        "XDG_STATE_HOME": str(folder / "state"), "OPENAI_API_KEY": KEY, "NO_PROXY": "127.0.0.1",
        "OPENAI_BASE_URL": server.stdout.readline().strip(), "SSL_CERT_DIR": str(folder),
    }
    with server, subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True, cwd=folder,
                                  env=environment) as shell:
        yield shell
        shell.kill()
        server.terminate()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and none of the variables that the scripts read."""
    for name in list(os.environ):
        if name.startswith(READ_BY_THE_SCRIPTS):
            monkeypatch.delenv(name)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # hides what is left in a buffer
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path.parent / f"{tmp_path.name}-state"))
    monkeypatch.setenv("LANGUAGE", "C")  # of argparse's messages
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))  # no TLS here, and reading the authorities takes most of a test
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def api(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyAPI]:
    """The mock server on a loopback port, with the environment pointed at it."""
    with FaultyAPI() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield server


@pytest.fixture(name="run")
def run_fixture() -> Callable[..., subprocess.CompletedProcess[str]]:
    return run_script


@pytest.fixture
def clock() -> FakeTime:
    return FakeTime()


@pytest.fixture
def tool(work: Path, clock: FakeTime) -> Tool:
    """Run a command line in this process."""
    return lambda *args: batch_tool.main([str(arg) for arg in args], sleep=clock.sleep, clock=clock.clock)
