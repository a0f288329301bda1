"""The README's commands and examples run, on toys in the place of hub models, in their order."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from personae.cli import app
from personae.methods import CODECS, MERGE_METHODS
from toy_encoders import toy_sentence_encoder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
NOT_OURS = {"make", "pip"}
ENCODER = ["--encoder", "toys/encoder"]
"""Put to commands that read texts: the default one is a package that tests do without."""
STAND_INS = {"openai-community/gpt2": "toys/base", "tanganke/gpt2_": "toys/", "@main": ""}
"""What a hub id in the README becomes."""
TOY_BUDGETS = {"1%": "30%", "2%": "40%", "budget-2-percent": "budget-40-percent"}
"""The header of a task file, some 700 bytes, is a good part of a toy."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a GPT-2 family as on the hub.

    As there, the base has neither prefix nor head, but causal masks stored as weights.
    """
    from transformers import GPT2Config, GPT2ForSequenceClassification

    root = tmp_path_factory.mktemp("readme")
    config = GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=2, n_head=2)
    for seed, name in enumerate(("base", "cola", "sst2", "mnli")):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = GPT2ForSequenceClassification(config)
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(root / "toys" / name)
    toy_sentence_encoder(root / "toys" / "encoder")
    weights = root / "toys" / "base" / "model.safetensors"
    backbone = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(weights).items()
        if name != "score.weight"
    }
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 12, 12).tril() for layer in range(2)}
    save_file(backbone | masks, weights, metadata={"format": "pt"})
    return root


def on_toys(text: str) -> str:
    for known, stand_in in STAND_INS.items():
        text = text.replace(known, stand_in)
    for asked, possible in TOY_BUDGETS.items():
        text = re.sub(rf"(?<!\w){re.escape(asked)}", possible, text)
    return text


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def shipped(recipe: str) -> str:
    """A recipe of the repository with toys in the place of its models."""
    path = Path(recipe.replace("/", "-"))
    path.write_text(on_toys((ROOT / recipe).read_text("utf-8")))
    return str(path)


def test_every_example_runs_in_its_order(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    ran: set[str] = set()
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(on_toys(block), "README.md", "exec"), {})
            ran.add("python")
        if language == "yaml":
            Path(block.splitlines()[0].removeprefix("# ")).write_text(on_toys(block))
        for words in commands(on_toys(block)) if language == "sh" else []:
            if words[0] in NOT_OURS:
                continue
            assert words[0] == "personae"
            words = [shipped(word) if word.startswith("recipes/") else word for word in words]
            words += ENCODER if "--like" in words else []
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"
            ran.add(words[1])
    assert ran == {"python", "merge", "pack", "verify", "unpack", "plan", "inspect", "compose"}
    merged = load_file(workplace / "merged" / "gpt2" / "model.safetensors")
    assert merged.keys() == load_file(workplace / "toys" / "base" / "model.safetensors").keys()
    config = (workplace / "models" / "cola" / "config.json").read_text("utf-8")
    assert "GPT2ForSequenceClassification" in config
    rebuilt = load_file(workplace / "models" / "cola" / "model.safetensors")
    assert rebuilt.keys() == load_file(workplace / "toys" / "cola" / "model.safetensors").keys()


def test_commands_and_options_it_names_exist() -> None:
    tree = typer.main.get_command(app)
    known = tree.commands  # pyright: ignore[reportAttributeAccessIssue]
    options = {text for one in known.values() for p in one.params for text in p.opts} | {"--help"}
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`]+)`", prose)
    named = {word.rstrip("…") for text in inline for word in re.findall(r"--[a-z-]+", text)}
    assert named - options == set()
    assert {text.split()[1] for text in inline if text.startswith("personae ")} == known.keys()


def test_every_method_is_listed() -> None:
    section = README.split("## Methods")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE)) == {*CODECS, *MERGE_METHODS}


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_files_of_the_house_exist() -> None:
    section = README.split("| `src/personae/` |")[1]
    folders = re.findall(r"`(\w[\w/]*)/`", section)
    assert "methods/merge" in folders
    assert [name for name in folders if not (ROOT / "src" / "personae" / name).is_dir()] == []
