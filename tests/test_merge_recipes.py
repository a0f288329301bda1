"""Every shipped merge recipe is read as it stands, and merges toy families as its method says.

What comes out is compared with the method on whole state dicts in memory.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor

from families import State
from personae.checkpoints.naming import matches
from personae.commands.merge import merge
from personae.methods import MERGE_METHODS, Site
from personae.recipe import MergeRecipe, count_layers, read_merge_recipe, recipe_kind
from toys import load, perturb, toy_bert, toy_gpt2, toy_llama, toy_t5, toy_vit

RECIPES = sorted((Path(__file__).parents[1] / "recipes" / "merge").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
FAMILIES = {"bert": toy_bert, "vit": toy_vit, "gpt2": toy_gpt2, "llama": toy_llama, "t5": toy_t5}
CONV1D = re.compile(r"\.(c_attn|c_fc|c_proj)\.weight$")


class Toys(NamedTuple):
    """A family on disk, and in memory as whole models."""

    base: Path
    experts: list[Path]
    states: list[State]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Toys]:
    """Five architectures with three experts each, and three adapters of the Llama."""
    root = tmp_path_factory.mktemp("families")
    made: dict[str, Toys] = {}
    for name, build in FAMILIES.items():
        base = build(root / name / "base")
        experts = [perturb(base, root / name / f"e{n}", n) for n in (1, 2, 3)]
        made[name] = Toys(base, experts, [load(expert) for expert in experts])
    adapters = [root / "lora" / f"e{n}" for n in (1, 2, 3)]
    base = made["llama"].base
    states = [adapter(base, path, seed) for seed, path in enumerate(adapters, 1)]
    made["lora"] = Toys(base, adapters, states)
    return made


def adapter(base: Path, directory: Path, seed: int) -> State:
    """Save an adapter with random factors; return what merging it into the base gives."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        targets = ["q_proj", "v_proj", "up_proj"]
        adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(str(directory))
        return dict(adapted.merge_and_unload().state_dict())


def on_toys(path: Path, toys: Toys, folder: Path) -> MergeRecipe:
    """The recipe with its models replaced by toys, all else as it stands."""
    content = yaml.safe_load(path.read_text("utf-8"))
    if "base_model" in content:
        content["base_model"] = str(toys.base)
    for entry, toy in zip(content["models"], toys.experts, strict=False):
        entry["name"] = entry.get("name") or Path(entry["model"]).name
        entry["model"] = str(toy)
    replaced = folder / path.name
    replaced.write_text(yaml.safe_dump(content), "utf-8")
    return read_merge_recipe(replaced)


def by_hand(recipe: MergeRecipe, toys: Toys, adapters: bool = False) -> State:
    """Every tensor of the result, from whole models in memory.

    Statistics of adapters are those of the tensors that one of them trains.
    """
    settings, base = recipe.settings, load(toys.base)
    layers, experts = count_layers(base), len(recipe.experts)
    result, method = dict(base), settings.merge_method()
    stacks: dict[str, tuple[Site, Tensor]] = {}
    for name, tensor in base.items():
        stack = torch.stack([state[name].float() for state in toys.states[:experts]])
        reference = stack.mean(dim=0) if recipe.base is None else tensor.float()
        if not tensor.is_floating_point() or matches(name, settings.skip):
            continue
        site = Site(name, tuple(tensor.shape), transposed=bool(CONV1D.search(name)))
        stacks[name] = site, stack - reference
        result[name] = reference
        if method.of_models():
            first = [reference] if method.needs == "models" and recipe.base else []
            stacks[name] = site, torch.stack([*first, *stack])
            result[name] = torch.zeros_like(reference)
    common = settings.for_tensor("", layers, experts)
    is_wide = common.has_passes() and common.passes_over == "model"
    read = [given for given in stacks.values() if not adapters or bool(given[1].any())]
    statistics = common.statistics(read) if is_wide else None
    for name, (site, stack) in stacks.items():
        method = settings.for_tensor(name, layers, experts)
        merged = result[name] + method.apply(stack, statistics, site)
        result[name] = merged.to(getattr(torch, settings.dtype or "float32"))
    return result


def test_recipes_are_called_as_their_methods() -> None:
    assert {"average", "ties"} <= set(NAMES) <= set(MERGE_METHODS)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_shipped_recipe_reads_as_it_stands(path: Path) -> None:
    recipe = read_merge_recipe(path)
    assert recipe_kind(path) == "merge"
    assert recipe.settings.merge_method() is MERGE_METHODS[path.stem]
    method = recipe.settings.merge_method()
    assert len(recipe.experts) == (3 if method.takes is None else method.takes - 1)
    assert recipe.text == path.read_text("utf-8")
    assert not recipe.notes
    first = recipe.text.split("\n#\n")[1].split("\n")[0]
    assert first.startswith(f"#   personae merge recipes/merge/{path.name} merged/")


def pairs() -> list[Any]:
    """Each recipe with two of the architectures in turn, or with adapters, or both."""
    names = list(FAMILIES)
    found: list[tuple[Path, str]] = []
    for n, path in enumerate(RECIPES):
        if path.stem != "core_space":
            found += [(path, names[n % 5]), (path, names[(n + 2) % 5])]
        if path.stem in ("average", "drm", "iso_c", "knots", "core_space", "tsv_m"):
            found.append((path, "lora"))
    return [pytest.param(path, name, id=f"{path.stem}-{name}") for path, name in found]


@pytest.mark.parametrize(("path", "family"), pairs())
def test_shipped_recipe_merges_as_its_method_says(
    path: Path, family: str, families: Mapping[str, Toys], tmp_path: Path
) -> None:
    toys = families[family]
    recipe = on_toys(path, toys, tmp_path)
    out = merge(recipe.base, recipe.experts, tmp_path / "out", settings=recipe.settings)
    found, wanted, base = load(out), by_hand(recipe, toys, family == "lora"), load(toys.base)
    assert found.keys() == base.keys()
    if (path.stem, family) == ("knots", "lora"):
        # From factors and from whole matrices, coordinates differ by rounding, and the one that
        # is the threshold of an expert may fall either way.
        error = sum(float((found[n] - wanted[n]).norm() ** 2) for n in base)
        change = sum(float((wanted[n] - base[n]).norm() ** 2) for n in base)
        assert error < 0.02 * change
        return
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype
        torch.testing.assert_close(
            tensor, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert any(not torch.equal(found[name].float(), base[name].float()) for name in base)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_family_loads(family: str, families: Mapping[str, Toys], tmp_path: Path) -> None:
    import transformers

    toys = families[family]
    recipe = on_toys(RECIPES[NAMES.index("ties")], toys, tmp_path)
    out = merge(recipe.base, recipe.experts, tmp_path / "out", settings=recipe.settings)
    config: Any = transformers.AutoConfig.from_pretrained(out)
    model = getattr(transformers, config.architectures[0]).from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    written, again = load(out), load(tmp_path / "again")
    assert again.keys() <= written.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in again.items())
