"""Recipes as people publish them run unchanged, and give what mergekit gives.

The recipes in `public_shapes/` are ours; their features, and how often each occurs, are those of
public recipes. All run on toy Llama models. Where `MERGEKIT_PYTHON` names a Python with mergekit
0.1.5, tensors are compared with its own, both in fp32.

    MERGEKIT_PYTHON=/tmp/mergekit/bin/python pytest tests/recipe/test_public_shapes.py
"""

import json
import os
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from personae.cli import app
from toy_vocabularies import tokenizer
from toys import WEIGHTS, load

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPES = sorted((Path(__file__).parent / "public_shapes").glob("*.yaml"))

EMBEDDING = "model.embed_tokens.weight"

RANDOM = {"dare_ties-base-listed", "dare_ties-gradients", "dare_ties-slices", "dare_linear"}
RANDOM |= {"della", "della_linear"}
"""Entries are dropped at random: norms are compared."""

APART = {"documents": "mergekit-multi"}
"""Recipes of another command of mergekit's."""

TOKENS = {"tokenizer-of-a-model-padded": 5}
"""Rows that are compared; after them, mergekit's padding counts rows that a model lacks."""

ORACLE = """
import json, pathlib, sys, traceback, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for path in sorted(pathlib.Path("theirs").glob("*.yaml")):
    try:
        read = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
        out = path.with_suffix("")
        options = MergeOptions(lora_merge_cache="cache", quiet=True, write_model_card=False)
        run_merge(read, str(out), options)
    except Exception:
        path.with_suffix(".log").write_text(traceback.format_exc())
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of toy Llama models, called as the recipes call them.

    All but `extra` have one tokenizer of 4 tokens, in 6 rows. What they learned is in part alike.
    """
    root = tmp_path_factory.mktemp("shapes")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        _save(LlamaForCausalLM(_config()), root / "base", ())
        base = load(root / "base")
        alike = {name: 0.05 * torch.randn_like(tensor) for name, tensor in base.items()}
        names = ("math", "code", "chat", "extra", "with a space/модель")
        for seed, name in enumerate((*names, "runs/one/checkpoint-500", "runs/two/checkpoint-500")):
            torch.manual_seed(seed + 1)
            shutil.copytree(root / "base", root / name)
            state = {n: t + alike[n] + 0.05 * torch.randn_like(t) for n, t in base.items()}
            save_file(state, root / name / WEIGHTS, metadata={"format": "pt"})
        tokens = tokenizer("<new>")
        tokens.chat_template = "{{ messages }} of extra"
        tokens.save_pretrained(root / "extra")
        tokens = tokenizer()
        tokens.chat_template = "{{ messages }} of chat"
        tokens.save_pretrained(root / "chat")
        for model, name in (("base", "lora-law"), ("math", "lora-math")):
            settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
            adapted: Any = get_peft_model(
                AutoModelForCausalLM.from_pretrained(root / model), settings
            )
            adapted.save_pretrained(str(root / name))
    return root


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=6,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=12,
        tie_word_embeddings=False,
    )


def _save(model: LlamaForCausalLM, directory: Path, added: tuple[str, ...]) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokenizer(*added).save_pretrained(directory)


def in_fp32(path: Path) -> str:
    """A recipe without its dtypes: what is computed is compared, and not how it is rounded."""
    lines = path.read_text("utf-8").splitlines()
    kept = [line for line in lines if not line.startswith(("dtype:", "out_dtype:"))]
    return "\n".join(kept) + "\n"


def merged(models: Path, name: str, text: str) -> tuple[int, str, Path]:
    """Exit code, what was said, and the directory of a recipe beside the models."""
    recipe, out = models / f"{name}.yaml", models / "ours" / name
    recipe.write_text(text, "utf-8")
    done = CliRunner().invoke(app, ["merge", str(recipe), str(out), "--overwrite"])
    return done.exit_code, " ".join(done.output.split()), out


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_a_public_recipe_runs_unchanged(path: Path, models: Path) -> None:
    code, said, out = merged(models, path.stem, path.read_text("utf-8"))
    assert code == 0, said
    state, last = load(out), [*yaml.safe_load_all(path.read_text("utf-8"))][-1]
    wanted = getattr(torch, last.get("out_dtype", last.get("dtype", "float32")))
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    assert {tensor.dtype for tensor in state.values()} == {wanted}
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert config["vocab_size"] == len(state[EMBEDDING])


def test_there_is_one_for_every_feature() -> None:
    names = {path.stem for path in SHAPES}
    assert len(names) >= 60
    assert RANDOM <= names


@pytest.fixture(scope="module")
def theirs(models: Path) -> Path:
    """What mergekit makes of all recipes, each in a folder of its name, or its refusal in a log."""
    python = os.environ.get("MERGEKIT_PYTHON")
    if not python:
        pytest.skip("name a Python that has mergekit 0.1.5 with MERGEKIT_PYTHON")
    folder = models / "theirs"
    folder.mkdir()
    for path in SHAPES:
        (folder / path.name).write_text(in_fp32(path), "utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, "-c", ORACLE]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=models
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_a_public_recipe_is_what_mergekit_makes_of_it(
    path: Path, models: Path, theirs: Path
) -> None:
    if path.stem in APART:
        pytest.skip(APART[path.stem])
    log = theirs / f"{path.stem}.log"
    assert not log.exists(), log.read_text()
    code, said, out = merged(models, path.stem, in_fp32(path))
    assert code == 0, said
    ours, wanted = load(out), load(theirs / path.stem)
    assert ours.keys() == wanted.keys()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in wanted.items()}
    if path.stem in RANDOM:
        base = load(models / "base")
        found, meant = (_norm(one, base) for one in (ours, wanted))
        assert found == pytest.approx(meant, rel=0.15)
        return
    for name, tensor in ours.items():
        rows = slice(TOKENS.get(path.stem) if tensor.shape[0] == ours[EMBEDDING].shape[0] else None)
        torch.testing.assert_close(tensor[rows], wanted[name][rows], rtol=1e-4, atol=1e-5)
    configs = [json.loads((one / "config.json").read_text()) for one in (out, theirs / path.stem)]
    for key in ("num_hidden_layers", "vocab_size", "hidden_size"):
        assert configs[0][key] == configs[1][key], key


def _norm(state: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """The L1 norm of what a model differs in from its base."""
    rows = {name: min(len(state[name]), len(tensor)) for name, tensor in base.items()}
    return sum(float((state[n][: rows[n]] - t[: rows[n]]).abs().sum()) for n, t in base.items())
