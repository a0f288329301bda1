"""Several recipes in one file: as one after the other, and nothing left of what is in between."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from families import listing, saved, small_base, tuned
from personae.commands.merge import merge
from personae.commands.merge_computed import computed_as_read
from personae.commands.merge_documents import merge_recipes, plan_recipes
from personae.errors import CheckpointError, RecipeError
from personae.recipe import MergeSettings, read_merge_recipes
from personae.run.work import Work

BASE = small_base()
A, B, C = (tuned(BASE, seed) for seed in (1, 2, 3))
TWO = """\
merge_method: task_arithmetic
conventions: papers
base_model: base
models: [{model: between}, {model: c}]
parameters: {scale: 0.5}
---
name: between
merge_method: slerp
base_model: a
models: [{model: b}]
parameters: {t: 0.25}
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base and three experts."""
    for name, model in (("base", BASE), ("a", A), ("b", B), ("c", C)):
        saved(model, tmp_path / name)
    return tmp_path


def merged(
    folder: Path, text: str, out: str = "out", work: Work | None = None
) -> dict[str, Tensor]:
    (folder / "recipe.yaml").write_text(text)
    recipes = read_merge_recipes(folder / "recipe.yaml")
    merge_recipes(recipes, folder / out, work=work)
    return load_file(folder / out / "model.safetensors")


def refused(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_merge_recipes(folder / "recipe.yaml")
    return str(caught.value)


def test_the_same_as_one_after_the_other(models: Path):
    slerp = MergeSettings(method="slerp", parameters={"t": 0.25})
    merge(models / "a", {"b": models / "b"}, models / "between", settings=slerp)
    experts = {"between": models / "between", "c": models / "c"}
    arithmetic = MergeSettings(method="task_arithmetic", parameters={"scale": 0.5})
    merge(models / "base", experts, models / "apart", settings=arithmetic)
    expected = load_file(models / "apart/model.safetensors")
    (models / "between").rename(models / "elsewhere")
    found = merged(models, TWO)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not [path.name for path in models.iterdir() if path.name.startswith(".")]
    assert "| between | `between` | local |" in (models / "out/README.md").read_text()


def test_interrupted_it_leaves_nothing_and_begins_anew(models: Path):
    expected = merged(models, TWO)
    before = listing(models)

    def stop(stage: str, done: int, _: int) -> None:
        if stage == "merging (task_arithmetic)":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(models, TWO, "again", Work(workers=1, progress=stop))
    assert not (models / ".again.between").exists()
    assert listing(models).items() >= before.items()
    (models / ".again.between/between").mkdir(parents=True)  # as of a run that was killed
    found = merged(models, TWO, "again")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not [path.name for path in models.iterdir() if path.name.startswith(".")]


def test_faults_of_all_come_before_work(models: Path):
    odd = {n: t for n, t in C.items() if n != "layer.bias"}
    saved(odd, models / "odd")
    text = TWO.replace("model: c", "model: odd").replace("model: b}", "model: nowhere}")
    with pytest.raises(CheckpointError, match="between: Expert 'nowhere': ") as caught:
        merged(models, text)
    assert "lacks" not in str(caught.value)  # what is merged from a wrong model is not asked
    with pytest.raises(CheckpointError, match="the output: Expert 'odd' lacks 1 tensor"):
        merged(models, TWO.replace("model: c", "model: odd"))
    assert not (models / "out").exists()
    assert not (models / ".out.between").exists()


def test_the_plan_is_of_all(models: Path):
    (models / "recipe.yaml").write_text(TWO)
    recipes = read_merge_recipes(models / "recipe.yaml")
    plans = plan_recipes(recipes, Work(workers=1))
    assert {name: plan.method for name, plan in plans.items()} == {
        "between": "slerp",
        "the output": "task_arithmetic",
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in BASE.values())
    assert [plan.bytes_out for plan in plans.values()] == [0, size]


def test_names_that_do_not_meet(models: Path):
    told = refused(models, TWO.replace("slerp", "slrep").replace("scale: 0.5", "scael: 0.5"))
    assert "line 5: task_arithmetic has no parameter 'scael'." in told
    assert "line 8: Unknown method 'slrep'. Did you mean 'slerp'?" in told
    told = refused(models, TWO.replace("{model: between}, ", ""))
    assert "line 7: Nothing is merged from 'between'." in told
    told = refused(models, TWO.replace("model: b}", "model: between}"))
    assert "line 7: 'between' is merged from itself, through between." in told
    assert "Two documents have no 'name'." in refused(models, TWO.replace("name: between\n", ""))
    again = TWO + "---\n" + TWO.partition("---\n")[2]
    assert "line 13: Two documents are named 'between'." in refused(models, again)


def chain(length: int) -> str:
    """Recipes each of which halves the way from the model before to the base."""
    head = "merge_method: task_arithmetic\nconventions: papers\nbase_model: base\n"
    each = [
        f"name: m{n}\n{head}models: [{{model: {f'm{n - 1}' if n else 'a'}}}]\n"
        "parameters: {scale: 0.5}\n"
        for n in range(length)
    ]
    return "---\n".join(each)


def test_a_long_chain_is_merged_with_some_models_written(models: Path):
    (models / "recipe.yaml").write_text(chain(36))
    recipes = read_merge_recipes(models / "recipe.yaml")
    written = {recipe.name for recipe in recipes} - computed_as_read(recipes) - {None}
    assert written == {"m18", "m1"}  # 16 between each and the next
    result = merged(models, chain(20))
    for name, value in A.items():
        expected = BASE[name].double() + 0.5**20 * (value.double() - BASE[name].double())
        torch.testing.assert_close(result[name].double(), expected, atol=1e-6, rtol=0)


def test_thousands_of_recipes_in_one_file_are_refused(models: Path):
    told = refused(models, chain(3000))
    assert "holds 3000 documents (parted by ---), and 100 are read at most" in told
