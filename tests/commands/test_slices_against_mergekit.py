"""mergekit's own command as oracle, on recipes with slices; see `methods/test_against_mergekit`.

Everything is in fp32. The models are toy Llamas of four layers.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from personae.commands.merge import merge_parts
from personae.recipe import read_merge_recipe
from toys import perturb

ORACLE = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
for path in sys.argv[1:]:
    config = MergeConfiguration.model_validate(yaml.safe_load(open(path)))
    run_merge(config, path.replace(".yaml", "-theirs"), options)
"""
RECIPES = {
    "stacked": """\
slices:
- sources: [{model: A, layer_range: [0, 3]}]
- sources:
  - {model: B, layer_range: [1, 4], parameters: {scale: [{filter: o_proj, value: 0.5}]}}
merge_method: passthrough
""",
    "whole": """\
slices:
- sources: [{model: A, layer_range: [0, 4]}, {model: B, layer_range: [0, 4]}]
merge_method: slerp
base_model: A
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - value: 0.5
""",
    "several": """\
slices:
- sources: [{model: A, layer_range: [0, 3]}, {model: B, layer_range: [0, 3]}]
  base_model: A
  parameters: {t: [0.1, 0.9]}
- sources: [{model: B, layer_range: [1, 4]}, {model: A, layer_range: [0, 3]}]
merge_method: slerp
base_model: B
parameters: {t: [{filter: mlp, value: [0, 0.5, 0.3]}, {value: 0.25}]}
""",
    "linear": """\
slices:
- sources:
  - {model: A, layer_range: [0, 2], parameters: {weight: 0.3}}
  - {model: B, layer_range: [2, 4], parameters: {weight: [0.1, 0.9]}}
- sources:
  - {model: B, layer_range: [0, 1], parameters: {weight: [0.2, 0.7]}}
  - {model: C, layer_range: [3, 4]}
  parameters: {weight: 0.6}
merge_method: linear
""",
    "ties": """\
slices:
- sources:
  - {model: A, layer_range: [0, 3]}
  - {model: B, layer_range: [0, 3], parameters: {weight: 0.3, density: 0.5}}
  - {model: C, layer_range: [1, 4], parameters: {weight: 0.7, density: [0.3, 0.8]}}
- sources:
  - {model: A, layer_range: [3, 4]}
  - {model: B, layer_range: [3, 4], parameters: {weight: 1.0, density: 0.4}}
merge_method: ties
base_model: A
parameters: {normalize: true}
""",
    "arithmetic": """\
modules:
  default:
    parameters: {weight: 0.4}
    slices:
    - sources: [{model: A, layer_range: [0, 4]}, {model: B, layer_range: [0, 4]}]
      parameters: {weight: [{filter: mlp, value: 0.9}]}
      residual_weight: 0.5
merge_method: task_arithmetic
base_model: A
""",
}


def interpreter() -> str | None:
    """The Python to ask."""
    if "MERGEKIT_PYTHON" in os.environ:
        return os.environ["MERGEKIT_PYTHON"]
    return sys.executable if importlib.util.find_spec("mergekit") else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, the recipes, and what mergekit makes of them."""
    python = interpreter()
    if python is None:
        pytest.skip("mergekit is not installed; name a Python that has it with MERGEKIT_PYTHON")
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("mergekit")
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(root / "A")
    for seed, name in enumerate("BC", 1):
        perturb(root / "A", root / name, seed)
    for name, text in RECIPES.items():
        named = text
        for model in "ABC":
            named = named.replace(f"model: {model}", f"model: {root / model}")
        (root / f"{name}.yaml").write_text(f"{named}dtype: float32\n")
    paths = [str(root / f"{name}.yaml") for name in RECIPES]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", ORACLE, *paths], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_model(name: str, folder: Path):
    read = read_merge_recipe(folder / f"{name}.yaml")
    merge_parts(read.parts, folder / f"{name}-ours", small_files=read.small_files)
    found = load_file(folder / f"{name}-ours" / "model.safetensors")
    theirs: dict[str, torch.Tensor] = {}
    for path in (folder / f"{name}-theirs").glob("*.safetensors"):
        theirs |= load_file(path)
    assert found.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    layers = [
        json.loads((folder / f"{name}-{whose}" / "config.json").read_text())["num_hidden_layers"]
        for whose in ("ours", "theirs")
    ]
    assert layers[0] == layers[1]
