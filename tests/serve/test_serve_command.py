"""The command: what it refuses before it serves, how it begins, how it ends."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from running import bert_pack
from typer.testing import CliRunner

from personae import DTS, pack
from personae.cli import app, serve
from toys import perturb, toy_bert


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_pack(tmp_path_factory.mktemp("served"))


@pytest.fixture
def unserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends where the server would begin."""
    monkeypatch.setattr(serve, "_run_until_stopped", lambda app, listener: None)


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, words), "--port", "0"])


def test_every_wrong_option_at_once(packed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "_NEEDED", ("fastapi", "no_such_package"))
    done = run(packed, "--dtype", "float64", "--packs", "nowhere", "--max-body", "much")
    assert done.exit_code == 2 and "4 faults" in done.output
    assert "needs no_such_package, which is not installed" in done.output
    assert "pip install 'personae[serve]'" in done.output
    assert "Unknown dtype 'float64'" in done.output and "nowhere is no folder" in done.output
    assert "--max-body: 'much' is no size" in done.output
    assert all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn"))


def test_a_port_in_use(packed: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", str(packed), "--port", str(port)])
    assert done.exit_code == 2 and f"Port {port} of 127.0.0.1 is in use" in done.output


def test_a_host_that_is_not_here(packed: Path):
    done = run(packed, "--host", "192.0.2.1")
    assert done.exit_code == 2 and "Cannot listen at 192.0.2.1" in done.output


@pytest.mark.usefixtures("unserved")
def test_other_machines_are_let_in_with_a_warning(packed: Path):
    done = run(packed, "--host", "0.0.0.0")
    assert done.exit_code == 0 and "asks for no password" in done.output
    done = run(packed)
    assert done.exit_code == 0 and "password" not in done.output
    assert "three, two, value at http://127.0.0.1:" in done.output


@pytest.mark.usefixtures("unserved")
def test_tasks_of_one_name(packed: Path, tmp_path: Path):
    shutil.copytree(packed, tmp_path / "other")
    done = run(packed, tmp_path / "other")
    assert done.exit_code == 2 and "3 faults" in done.output
    assert "A task 'two' is served already" in done.output
    done = run(packed, f"news={tmp_path / 'other'}")
    assert done.exit_code == 0 and "three, two, value, news/three, news/two" in done.output


def test_without_a_tokenizer(tmp_path: Path):
    base = toy_bert(tmp_path / "base")
    expert = perturb(base, tmp_path / "a", 1)
    packed = pack(base, {"a": expert}, tmp_path / "pack", DTS(rank_fraction=0.4)).directory
    done = run(packed)
    assert done.exit_code == 2 and "has no tokenizer. Put the tokenizer's files" in done.output


def test_a_pack_that_is_damaged(packed: Path, tmp_path: Path):
    shutil.copytree(packed, tmp_path / "pack")
    (tmp_path / "pack/tasks/two.safetensors").write_bytes(b"")
    (tmp_path / "pack/tasks/value.safetensors").unlink()
    done = run(tmp_path / "pack")
    assert done.exit_code == 2 and "two.safetensors is damaged" in done.output
    assert "value.safetensors is missing" in done.output
    assert "pack.json" in run(tmp_path).output


def test_where_nobody_can_read_what_is_served(packed: Path):
    """It is served all the same, and told where notes go."""
    words = ["-m", "personae", "serve", str(packed), "--port", "0"]
    source = str(Path(serve.__file__).parents[2])
    with Path("/dev/full").open("w") as full:
        server = subprocess.Popen(
            [sys.executable, *words],
            env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        assert server.stderr is not None
        told = next(line for line in server.stderr if " at http://" in line)
        with urllib.request.urlopen(f"{told.split()[-1]}/health", timeout=60) as answer:
            assert json.load(answer)["status"] == "ok"
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 2 and "Traceback" not in errors
    assert "Stopped.\nerror: The report cannot be written: No space left on device." in errors


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_what_is_let_in_and_what_ends_it(packed: Path, stop: signal.Signals):
    words = ["-m", "personae", "serve", str(packed), "--port", "0"]
    source = str(Path(serve.__file__).parents[2])
    server = subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        place = server.stdout.readline().split()[-1]
        with urllib.request.urlopen(f"{place}/health", timeout=60) as answer:
            assert json.load(answer)["status"] == "ok"
        # A page of the web whose name is made to mean this machine is not let in.
        other = urllib.request.Request(f"{place}/v1/tasks", headers={"Host": "example.com"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(other, timeout=60)
        server.send_signal(stop)
        _, errors = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0 and errors.splitlines()[-1] == "Stopped."
    assert "Traceback" not in errors
