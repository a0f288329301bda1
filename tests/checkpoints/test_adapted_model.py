"""`MODEL+ADAPTER` opened as one model, against PEFT, and where paths hold a `+` of their own."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from personae.checkpoints import open_checkpoint
from personae.checkpoints.adapted_model import split_adapter
from personae.checkpoints.adapter import adapter_of
from personae.commands.merge import merge
from personae.errors import CheckpointError
from personae.recipe import read_merge_recipe
from toys import load, perturb, toy_llama

pytestmark = pytest.mark.filterwarnings("ignore")


def adapt(model: Path, directory: Path, seed: int) -> dict[str, Tensor]:
    """Save an adapter of a model with random factors; what PEFT merges of the two."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        adapted.save_pretrained(str(directory))
        return dict(adapted.merge_and_unload().state_dict())


@pytest.mark.parametrize("folder", ["plain", "with space", "c++", "наука"])
def test_a_model_with_an_adapter_is_what_peft_merges(tmp_path: Path, folder: str):
    model, adapter = toy_llama(tmp_path / folder / "model"), tmp_path / folder / "adapter"
    wanted = adapt(model, adapter, 1)
    opened = open_checkpoint(f"{model}+{adapter}")
    assert adapter_of(opened) is None
    assert opened.auxiliary_files.keys() == open_checkpoint(model).auxiliary_files.keys()
    for name, spec in opened.specs.items():
        found = opened.read(name)
        assert found.dtype == spec.dtype
        torch.testing.assert_close(found, wanted[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(opened.read_rows(name, 1, 3), found[1:3])
        assert opened.factors(name) is None and not opened.same_as_base(name)


def test_a_path_that_exists_is_no_adapter_of_another(tmp_path: Path):
    toy_llama(tmp_path / "a")
    both = toy_llama(tmp_path / "a+b", seed=1)
    assert torch.equal(
        open_checkpoint(both).read("model.norm.weight"), load(both)["model.norm.weight"]
    )


def test_where_a_name_is_split():
    known = {"a", "c++", "org/x@v1"}.__contains__
    assert split_adapter("a+b", known) == ("a", "b")
    assert split_adapter("c+++b+d", known) == ("c++", "b+d")
    assert split_adapter("org/x@v1+org/y", known) == ("org/x@v1", "org/y")
    for text in ("a", "z+b", "a+", "+a"):
        assert split_adapter(text, known) is None


def test_what_stands_after_the_plus_is_an_adapter(tmp_path: Path):
    one, two = toy_llama(tmp_path / "a"), toy_llama(tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"'.*/b' is a whole model, and after a '.' stands"):
        open_checkpoint(f"{one}+{two}")
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_checkpoint(f"{one}+{tmp_path}/c")


RECIPES = {
    "of the base": "base_model: base\nmodels: [{model: base+l1}, {model: base+l2}]",
    "without a base": "models: [{model: base+l1}, {model: base+l2}]",
    "of another": "base_model: base\nmodels: [{model: base+l1}, {model: other+l2}]",
    "base with one": "base_model: other+l2\nmodels: [{model: base+l1}, {model: base}]",
    "one folder name": "base_model: base\nmodels: [{model: x/m}, {model: y/m+l2}]",
}


@pytest.mark.parametrize("case", RECIPES)
def test_wherever_a_model_stands(tmp_path: Path, case: str):
    """The equal average of what PEFT merges, with and without a base."""
    base = toy_llama(tmp_path / "base")
    other = perturb(base, tmp_path / "other", 5)
    x, y = (perturb(base, tmp_path / one / "m", seed) for one, seed in (("x", 6), ("y", 7)))
    first = adapt(base, tmp_path / "l1", 1)
    second = {model: adapt(model, tmp_path / "l2", 2) for model in (other, y, base)}
    pairs = {
        "of the base": (first, second[base]),
        "without a base": (first, second[base]),
        "of another": (first, second[other]),
        "base with one": (first, load(base)),
        "one folder name": (load(x), second[y]),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge_method: average\n{RECIPES[case]}\ntokenizer_source:\n")
    recipe = read_merge_recipe(path)
    out = merge(recipe.base, recipe.experts, tmp_path / "out", settings=recipe.settings)
    one, two = pairs[case]
    for name, tensor in load(out).items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-6)
    assert not (out / "adapter_config.json").exists()
