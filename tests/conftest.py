"""Fixtures: a work folder with a clean environment, the API on loopback, and the scripts as a user runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "samples")]

from builders import KEY, FakeTime, Tool, run_script  # noqa: E402
from faulty_api import FaultyAPI  # noqa: E402

import batch_tool  # noqa: E402

READ_BY_THE_SCRIPTS = ("PROMPT_", "MODEL", "OPENAI_")


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
