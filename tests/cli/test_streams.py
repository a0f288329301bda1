"""Streams that are closed, full or of few letters: one line, and the work is done all the same."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from families import saved, small_base, tuned
from personae.cli.console import plain
from shell_lines import run
from toys import INDEX, write_sharded

BASE = small_base()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    saved(BASE, tmp_path / "base")
    saved(tuned(BASE, 1), tmp_path / "news")
    (tmp_path / "r.yaml").write_text(
        "merge_method: average\nbase_model: base\nmodels: [{model: news}]\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        ("2>/dev/full", 0, ""),
        (">/dev/full", 2, "error: The report cannot be written: No space left on device."),
    ],
)
def test_the_work_is_done_whoever_watches(work, streams, code, said):
    done = run(work, f"personae merge r.yaml out {streams}")
    assert (work / "out" / "model.safetensors").exists()
    assert done.returncode == code, done
    assert said in done.stderr
    assert done.stderr.count("error:") == (code == 2)
    assert not list(work.glob(".out*"))


@pytest.mark.parametrize(
    ("command", "made"),
    [
        ("pack --base base --expert a=news --out out", "pack.json"),
        ("export news --base base --rank 1 --out out", "adapter_model.safetensors"),
        ("plan r.yaml", ""),
        ("check r.yaml --json", ""),
        ("diff base news", ""),
        ("methods", ""),
        ("--version", ""),
        ("plan --help", ""),
    ],
)
def test_a_report_that_nobody_can_read_is_told_once(work, command, made):
    done = run(work, f"personae {command} >/dev/full")
    assert done.returncode == 2, done
    assert done.stderr.count("error:") == done.stderr.count("No space left on device.") == 1
    assert "Traceback" not in done.stderr
    assert (work / "out" / made).exists() == bool(made)


@pytest.mark.parametrize("command", ["--help", "merge --help", "--version", "methods"])
def test_a_reader_that_has_left(work, command):
    """Of texts that rich and typer print as of ours."""
    done = run(work, f"exec 3> >(:); wait $!; personae {command} >&3")
    assert (done.returncode, done.stderr) == (141, "")


def test_letters_that_a_terminal_lacks_are_shown_by_their_codes(work):
    for encoding in ("ascii", "latin-1"):
        done = run(work, "personae methods average", PYTHONIOENCODING=encoding)
        assert done.returncode == 0, done.stderr
        assert "\\u03c4" in done.stdout  # the tau of the formula


def test_a_working_directory_that_is_gone(work):
    done = run(work, "mkdir gone && cd gone && rmdir ../gone && personae methods")
    assert done.returncode == 2
    assert done.stderr == "error: The working directory is gone. Change to one that is there.\n"


def test_ctrl_c_while_modules_load(work):
    """Wherever in the first second it comes, there is one line and no traceback."""
    for wait in (0.3, 0.6, 1.0):
        process = subprocess.Popen(
            [sys.executable, "-c", f"import personae.__main__, time; time.sleep({60 * wait})"],
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode in (130, -signal.SIGINT)  # the latter: before our first line
        assert process.returncode != 130 or said == "\nInterrupted before anything began.\n"


def test_names_cannot_give_orders_to_a_terminal(work):
    (work / "e.yaml").write_text(
        'merge_method: ties\nconventions: papers\nmodels: [{model: a}]\n"\\e[2J\\u202e": 1\n'
    )
    done = run(work, "personae merge e.yaml out")
    assert done.returncode == 2
    assert "Unknown key '\\x1b[2J\\u202e'" in done.stderr
    assert "\x1b" not in done.stderr


def test_nor_can_names_that_are_logged(work):
    folder = write_sharded(work / "sharded", {"one.safetensors": BASE})
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["gone\x1b[2J\u202e"] = "one.safetensors"
    (folder / INDEX).write_text(json.dumps(content))
    done = run(work, "personae inspect sharded")
    assert done.returncode == 0
    assert "they are ignored: gone\\x1b[2J\\u202e" in done.stderr
    assert "\x1b" not in done.stderr


def test_plain_text_stays_as_it_is():
    assert plain("τ̂ = Σ\t[x]") == "τ̂ = Σ\t[x]"
    assert plain("a\nb") == "a\\nb"
    assert plain("\x1b]0;\x07\x7f\x9b\r") == "\\x1b]0;\\x07\\x7f\\x9b\\r"
    assert plain("a\u2028b\u2066\u200e\ufeff\U000e0041") == (
        "a\\u2028b\\u2066\\u200e\\ufeff\\U000e0041"
    )
    assert plain("می\u200cخواهم") == "می\u200cخواهم"


def test_paths_that_are_no_text(work):
    """A folder named in Latin-1: merged, packed, verified and rebuilt, with undecided entries."""
    saved({k: -v + 2 * BASE[k] for k, v in tuned(BASE, 1).items()}, work / "law")  # votes cancel
    (work / "r.yaml").write_text(
        "merge_method: ties\nconventions: papers\nbase_model: base\n"
        "models: [{model: news}, {model: law}]\n"
    )
    done = run(
        work,
        r"d=$'caf\xe9' && mkdir $d && mv base news law r.yaml $d && cd $d && "
        "personae merge r.yaml out && personae pack --method emr --base base --expert a=news "
        "--expert b=law --out pack && personae verify pack && "
        "personae unpack pack --task a --out a && ls out a",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model.safetensors") == 2
