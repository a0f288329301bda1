"""Every shipped recipe is read as it stands, and packs a toy family put in its models' place."""

from pathlib import Path

import pytest
import yaml

from personae import pack, unpack
from personae.methods import CODECS
from personae.recipe import PackRecipe, read_recipe
from toys import load, perturb, toy_bert

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_recipes_are_found() -> None:
    assert {path.stem for path in RECIPES} >= {"dts-task", "dts-budget", "svd"}
    assert {read_recipe(path).settings.method for path in RECIPES} == set(CODECS)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three experts that differ from it in one layer."""
    root = tmp_path_factory.mktemp("toys")
    base = toy_bert(root / "base")
    layer = [name for name in load(base) if ".layer.0." in name]
    return [base, *(perturb(base, root / f"expert-{n}", n, names=layer) for n in range(3))]


def on_toys(path: Path, toys: list[Path], tmp_path: Path) -> PackRecipe:
    """The recipe with its models replaced, and a budget a toy can meet.

    The header of a task file, some 700 bytes, is 3 % of a toy.
    """
    content = yaml.safe_load(path.read_text("utf-8"))
    content["base_model"] = str(toys[0])
    for entry, toy in zip(content["models"], toys[1:], strict=False):
        entry["name"] = entry.get("name") or Path(entry["model"]).name
        entry["model"] = str(toy)
    if "budget" in content:
        content["budget"] = "20%"
    replaced = tmp_path / path.name
    replaced.write_text(yaml.safe_dump(content), "utf-8")
    return read_recipe(replaced)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_packs_and_unpacks(path: Path, toys: list[Path], tmp_path: Path) -> None:
    shipped = read_recipe(path)
    recipe = on_toys(path, toys, tmp_path)
    assert list(recipe.experts) == list(shipped.experts)
    assert recipe.base is not None
    manifest = pack(
        recipe.base, recipe.experts, tmp_path / "pack", settings=recipe.settings
    ).manifest
    assert list(manifest.tasks) == list(shipped.experts)
    assert (manifest.method, manifest.vector) == (shipped.settings.method, shipped.settings.vector)
    if shipped.settings.vector == "difference":
        assert manifest.reference.method == shipped.settings.reference
    errors = [task.relative_error for task in manifest.tasks.values()]
    # UltraDelta drops 97 % of the entries at random and scales the rest up: right on average alone.
    assert min(errors) > 0 and (max(errors) < 1 or manifest.method == "ultradelta")
    task = next(iter(manifest.tasks))
    rebuilt = load(unpack(tmp_path / "pack", task, tmp_path / "rebuilt"))
    assert rebuilt.keys() == load(toys[1]).keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_parameters_are_known(path: Path) -> None:
    assert read_recipe(path).experts
