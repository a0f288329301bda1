"""The command: what it prints is what it wrote, and it is the function of that name."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from families import listing, saved, small_base, tuned
from personae import export
from personae.cli import app

BASE = small_base()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    saved(BASE, tmp_path / "base")
    saved(tuned(BASE, 1), tmp_path / "news")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> Any:
    return CliRunner().invoke(app, line.split())


def test_exporting_is_the_function_of_that_name(work: Path) -> None:
    done = run("export news --base base --rank 3 --dtype float16 --skip conv* --out a")
    assert done.exit_code == 0, done.output
    assert "rank 3 for 1 modules, float16" in done.stdout
    assert "relative error of the factors" in done.stdout
    for kind in ("linear", "bias", "embedding", "convolution", "other"):
        assert kind in done.stdout
    export("news", "b", base="base", rank=3, dtype="float16", skip=["conv*"])
    assert listing(work / "a") == listing(work / "b")


def test_what_json_tells_is_what_was_written(work: Path) -> None:
    done = run("export news --base base --energy 0.9 --out a --json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    stored = load_file(work / "a/adapter_model.safetensors")
    assert told["path"] == str(work / "a")
    assert {t.shape[0] for name, t in stored.items() if "lora_A" in name} == {told["rank"]}
    assert told["bytes"] == (work / "a/adapter_model.safetensors").stat().st_size
    assert sum(row["norm_share"] for row in told["changed"]) == pytest.approx(1)
    assert told["relative_error"] < 0.1


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("export news --out a", "give the base"),
        ("export news --base base --rank 3 --budget 1MB --out a", "Give one of rank, budget"),
        ("export base --base base --out a", "is the base itself"),
        ("export news --base missing --out a", "no such file or directory"),
        ("export news --base base --rank 3 --out news", "overlap"),
    ],
)
def test_refused_input_ends_with_2(work: Path, line: str, text: str) -> None:
    done = run(line)
    assert done.exit_code == 2 and text in done.stderr
    assert not (work / "a").exists()


def test_a_task_of_a_pack_in_either_form(work: Path) -> None:
    assert run("pack --base base --expert news=news --rank-fraction 0.5 --out p").exit_code == 0
    for form in ("peft", "hf"):
        done = run(f"export p --task news --to {form} --out {form}")
        assert done.exit_code == 0, done.output
    assert (work / "peft/adapter_config.json").is_file() and (
        work / "hf/model.safetensors"
    ).is_file()
