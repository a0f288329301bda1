"""Streams of eval, tune and demo: closed, full, left, of few letters; and Ctrl-C amid the work."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("optuna")

from shell_lines import run
from toy_suites import SUITE, toy_suite

SPLITS = "splits: {test: test, validation: {from: train, examples: 12}}"
SEARCH = "search: {merge: {method: task_arithmetic}, parameters: {scale: [0.5, 1.0]}}\n"
MADE = {"eval": "out/results.json", "tune": "out/tuned.yaml"}
LINES = {
    "eval": "personae eval suite.yaml --out out --cache cache",
    "tune": "personae tune suite.yaml --sampler grid --out out/tuned.yaml --cache cache",
    "demo": "personae demo --out out",
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = SUITE.replace("splits: {test: test}", SPLITS) + SEARCH
    return toy_suite(tmp_path_factory.mktemp("suite"), text).parent


@pytest.fixture
def work(suite: Path) -> Path:
    """The suite, without what an earlier run made; answers that are known stay."""
    subprocess.run(["rm", "-rf", "out"], cwd=suite, check=True)
    return suite


@pytest.mark.parametrize("command", MADE)
@pytest.mark.parametrize(
    ("streams", "code"),
    [(">&- 2>&- <&-", 0), ("2>/dev/full", 0), (">/dev/full", 2), (">&3", 141)],
)
def test_the_work_is_done_whoever_reads(work: Path, command: str, streams: str, code: int):
    left = "exec 3> >(:); wait $!; " if streams == ">&3" else ""
    done = run(work, f"{left}{LINES[command]} {streams}")
    assert done.returncode == code, done
    assert (work / MADE[command]).exists()
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: The report cannot be written") == (code == 2)


@pytest.mark.parametrize("command", MADE)
def test_letters_that_a_terminal_lacks(work: Path, command: str):
    done = run(work, LINES[command], PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done
    assert (done.stdout + done.stderr).isascii()


def test_ctrl_c_amid_the_work_and_again(work: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "personae", *LINES["eval"].split()[1:-1], "another"],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    process.stderr.readline()  # the first that it says of its progress
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=600)
    assert process.returncode in (0, 130)  # 0: it was done before
    assert "Traceback" not in said
    assert (work / MADE["eval"]).exists() == (process.returncode == 0)
    done = run(work, f"rm -rf out && {LINES['eval']} --json")
    assert done.returncode == 0, done
    assert len(json.loads(done.stdout)) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("streams", "code"), [(">&- 2>&- <&-", 0), (">/dev/full", 2)])
def test_the_demo_is_made_whoever_reads(work: Path, streams: str, code: int):
    done = run(work, f"{LINES['demo']} {streams}")
    assert done.returncode == code, done
    assert any((work / "out").iterdir()) and "Traceback" not in done.stderr
