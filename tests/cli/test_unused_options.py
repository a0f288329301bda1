"""Options that would do nothing beside the others: refused, all of them in one message."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from families import listing
from personae.cli import app

MERGE = "merge_method: ties\nbase_model: base\nmodels: [{model: news}, {model: law}]\n"
PACK = "base_model: base\nmodels: [{model: news}]\n"


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recipes and nothing else: options are looked at before what they name."""
    (tmp_path / "merge.yaml").write_text(MERGE)
    (tmp_path / "pack.yaml").write_text(PACK)
    (tmp_path / "budget.yaml").write_text(PACK + "budget: 30%\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*words: str) -> str:
    """What a command says that is refused and leaves every file as it was."""
    before = listing(Path.cwd())
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, (words, result.stderr, result.exception)
    assert result.stdout == ""
    assert listing(Path.cwd()) == before
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (
            "pack --out p --remove x --method svd --skip a --overwrite",
            "leave out --method, --skip, --overwrite.",
        ),
        (
            "pack pack.yaml --out p --remove x --add -b base -e x=news --describe x=y",
            "leave out --add, --describe, the recipe, --base, --expert.",
        ),
        (
            "pack --out p --describe x=y --base base --overwrite --workers 2 --device cpu",
            "leave out --base, --overwrite, --workers, --device. To pack",
        ),
        ("pack --out p --add --expert x=news --overwrite", "leave out --overwrite. It needs"),
        (
            "pack pack.yaml --out p --add --expert x=news --budget 1% --set a=b --private a",
            "leave out the recipe, --budget, --set, --private. It needs",
        ),
        (
            "pack --out p -b base -e x=news --counting amr_paper",
            "error: --counting is the rule of a budget",
        ),
        (
            "pack budget.yaml --out p -r 0.5 --counting amr_paper",
            "error: --counting is the rule of a budget",
        ),
        (
            "pack --out p -b base -e x=news -r 0.5 --set rank_fraction=0.1 --counting amr_paper",
            "1. --counting is the rule of a budget: give --budget, or leave it out. "
            "2. --rank-fraction and --set rank_fraction=… say the same",
        ),
        (
            "compose p --weights x=1 --base b --shard-size 1GB --device cpu",
            "leave out --base, --shard-size, --device.",
        ),
        (
            "compose p --like x --head y --overwrite --workers 1 --memory 1GB",
            "leave out --head, --overwrite, --workers, --memory.",
        ),
        (
            "compose p --weights x=1 --gamma ratio --temperature 0 --device cpu",
            "1. With --weights, leave out --gamma, --temperature: only --like has such options. "
            "2. Nothing is written without --out: leave out --device.",
        ),
        (
            "compose p --weights x=1 --encoder minilm --template {} --out o",
            "error: With --weights, leave out --encoder, --template: only",
        ),
        (
            "plan --shapes s.json --memory 1GB --workers 2",
            "plan without checkpoints: leave out --workers, --memory.",
        ),
        (
            "plan pack.yaml --architecture a -b b -e x=y --vector difference --reference ties",
            "leave out the recipe, --base, --expert, --vector, --reference.",
        ),
        (
            "plan --shapes s.json --model-class AutoModel --reference-set a=1 --counting amr_paper",
            "1. --model-class goes with --architecture. 2. --architecture and --shapes plan "
            "without checkpoints: leave out --reference-set. 3. --counting is the rule",
        ),
        (
            "plan -b b -e x=y --model-class AutoModel --tasks 3",
            "1. --model-class goes with --architecture. 2. --tasks goes with --architecture or",
        ),
        (
            "plan -b b -e x=y -r 0.5 --set rank_fraction=0.1",
            "error: --rank-fraction and --set rank_fraction=… say the same",
        ),
        (
            "plan merge.yaml -r 0.5 --tasks 2 --private x",
            "Leave out --tasks, --rank-fraction, --private: only packs have such options.",
        ),
        (
            "inspect merge.yaml --analysis rank_drop --tensors",
            "measures a family: leave out --tensors.",
        ),
        (
            "inspect p --plot p.png --set density=0.5 --tensor a --workers 1",
            "error: Leave out --tensor, --set, --plot, --workers, or give --analysis.",
        ),
        ("verify p --device cpu", "leave out --device."),
    ],
)
def test_options_that_would_do_nothing(line: str, named: str):
    assert named in refused(*line.split())


@pytest.mark.parametrize("recipe", [[], ["budget.yaml"]])
def test_a_counting_rule_goes_with_a_budget_of_options_or_recipe(recipe: list[str]):
    budget = [] if recipe else ["-b", "base", "-e", "x=news", "--budget", "30%"]
    for command in (["plan"], ["pack", "--out", "p"]):
        said = refused(*command, *recipe, *budget, "--counting", "amr_paper")
        assert "--counting" not in said  # it came as far as opening what is not there
        assert "base" in said


def parameters(command: str) -> dict[str, Any]:
    """Option (or argument) to parameter, of one command."""
    group: Any = typer.main.get_command(app)
    return {one.opts[0]: one for one in group.commands[command].params if one.name != "help"}


@pytest.mark.parametrize(
    ("line", "used"),
    [
        ("pack --out p --remove x", ""),
        ("pack --out p --describe x=y", "recipe --expert --add --remove"),  # make it another run
        ("pack --out p --add", "--expert --base --describe --remove --workers --memory --device"),
        ("compose p --like x", "--weights --out --gamma --temperature --encoder --template"),
        (
            "compose p --weights x=1 --out o",
            "--like --head --base --shard-size --overwrite --workers --memory --device",
        ),
        ("plan merge.yaml", "--workers --memory"),
        (
            "plan --shapes s.json",
            "--architecture --tasks --method --rank-fraction --budget --set --skip --private",
        ),
        ("inspect p", "--analysis --tensors"),
        ("inspect merge.yaml --analysis rank_drop", "--tensor --set --plot --workers --memory"),
        ("verify p", "--against --base --workers --memory"),
    ],
)
def test_each_option_is_of_use_or_refused(line: str, used: str):
    """So an option added to a command has to say what it is for in each of its runs."""
    command, *words = line.split()
    known = parameters(command)
    arguments = {name for name in known if not name.startswith("-")}
    there = set(words) | (arguments if not words[0].startswith("-") else set())
    idle = [name for name in known if name not in there | {"--json", *used.split()}]
    assert idle
    more = []
    for name in idle:
        if name in arguments:
            more.append("pack.yaml")
        else:
            more += [name] if known[name].is_flag else [name, "1"]
    said = refused(command, *words, *more)
    assert set(idle) <= {*re.findall(r"--[a-z-]+", said), *re.findall(r"the (recipe)", said)}
