"""Names come from files that anybody may have written: none adds a line to what is shown."""

import logging
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from families import saved, small_base, tuned
from personae.cli import app
from personae.cli.console import show_warnings_plainly

NAME = "x\nforged: all is well\r\x1b[2J\u2028y"
SHOWN = "x\\nforged: all is well\\r\\x1b[2J\\u2028y"
BASE = small_base()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, an expert with one more tensor, and one with another shape; a line as their name."""
    own = torch.ones(3, 16)
    saved(BASE | {NAME: own}, tmp_path / "base")
    saved(tuned(BASE, 1) | {NAME: 2 * own, f"private/{NAME}": own}, tmp_path / "news")
    saved(tuned(BASE, 2) | {NAME: torch.ones(4, 16)}, tmp_path / "wrong")
    (tmp_path / "r.yaml").write_text(
        "merge_method: average\nbase_model: base\nmodels: [{model: news}]\n"
    )
    (tmp_path / "wrong.yaml").write_text(
        "merge_method: ties\nconventions: papers\nbase_model: base\n"
        "models: [{model: wrong}, {model: wrong2}]\n"
    )
    saved(tuned(BASE, 3) | {NAME: torch.ones(5, 16)}, tmp_path / "wrong2")
    (tmp_path / "key.yaml").write_text(
        "merge_method: average\nbase_model: base\nmodels: [{model: news}]\n"
        r'"x\nforged: all is well\r\e[2J\u2028y": 1' + "\n" + r'"z\nforged": 2' + "\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    return tmp_path


def shown(line: str | list[str], code: int) -> str:
    """What a command shows, all of it."""
    words = line.split() if isinstance(line, str) else line
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, (result.output, result.exception)
    found = result.stdout + result.stderr
    assert not re.search("^ *(\\d+[.] )?forged", found, re.MULTILINE), found
    assert "\x1b" not in found and "\r" not in found and "\u2028" not in found
    return found


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("plan r.yaml", 0),
        ("check r.yaml", 0),
        ("merge r.yaml out", 0),
        ("pack --method bitdelta --base base --expert n=news --out p", 0),
        ("plan --base base --expert n=news", 0),
        ("inspect base --tensors", 0),
        ("diff base news --all", 1),
        ("merge wrong.yaml out", 2),
        ("plan wrong.yaml", 2),
        ("check wrong.yaml", 2),
        ("plan key.yaml", 2),
        ("pack --base base --expert n=wrong --expert m=wrong2 --method svd --out p", 0),
    ],
)
def test_names_are_shown_on_the_line_they_are_told_of(work: Path, line: str, code: int):
    assert SHOWN in shown(line, code)


def test_packs_of_such_tensors(work: Path):
    shown("pack --method bitdelta --base base --expert n=news --out p", 0)
    assert SHOWN in shown("inspect p --tensors", 0)
    shown("verify p --against n=wrong", 1)
    assert SHOWN in shown(["verify", "p", "--against", f"n={NAME}"], 2)
    shown("unpack p --task n --out back", 0)


@pytest.mark.parametrize("command", ["pack --base base --out p", "plan --base base"])
def test_an_expert_of_such_a_name(work: Path, command: str):
    assert SHOWN in shown([*command.split(), "--expert", f"{NAME}=news"], 2)
    assert SHOWN in shown([*command.split(), "--expert", f"n={NAME}"], 2)


def test_what_a_library_logs():
    """Formatted as Python's last resort does it, once a command has begun."""
    show_warnings_plainly()
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s is ignored", (NAME,), None)
    assert logging.lastResort is not None
    assert logging.lastResort.format(record) == f"{SHOWN} is ignored"
