"""Where the models of a recipe are: relative paths count from its folder, hub ids stay."""

from pathlib import Path

import pytest

from personae.commands.merge_plan import plan_merge
from personae.errors import CheckpointError, RecipeError
from personae.recipe import read_merge_recipe, read_recipe

MERGE = """\
merge_method: ties
conventions: papers
base_model: models/base
models:
  - model: models/law
  - model: models/base+lora/news
tokenizer_source: models/law
"""
PACK = MERGE.replace(
    "merge_method: ties\nconventions: papers", "pack_method: dts\nvector: task"
).replace("models/base+", "")
PACK = PACK.replace("tokenizer_source: models/law\n", "")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `deep` with recipes, beside which commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/merge.yaml").write_text(MERGE)
    (tmp_path / "deep/pack.yaml").write_text(PACK)
    return tmp_path


def folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


def test_paths_count_from_the_folder_of_the_recipe(work: Path):
    folders(work / "deep", "models/base", "models/law", "lora/news")
    folders(work, "models/law")  # another, from the working directory
    for read in (read_merge_recipe("deep/merge.yaml"), read_recipe("deep/pack.yaml")):
        assert read.base == "deep/models/base"
        assert read.experts == {"law": "deep/models/law", "news": "deep/lora/news"}
    assert read_merge_recipe("deep/merge.yaml").settings.tokenizer_source == "law"
    whole = read_recipe(work / "deep/pack.yaml")
    assert whole.base == str(work / "deep/models/base")


@pytest.mark.parametrize("kind", ["merge", "pack"])
def test_what_is_in_the_working_directory_alone_is_told_with_what_to_write(work: Path, kind: str):
    folders(work, "models/base", "lora/news")
    folders(work / "deep", "models/law")
    with pytest.raises(RecipeError, match="in 2 places") as caught:
        (read_merge_recipe if kind == "merge" else read_recipe)(f"deep/{kind}.yaml")
    where = "is not in the recipe's folder (deep), from which its paths count, but in the working"
    for line, model in (3, "models/base"), (6, "lora/news"):
        told = f"line {line}: '{model}' {where} directory. Write '../{model}'."
        assert told in str(caught.value)


def test_what_is_nowhere_is_a_hub_id_or_a_path_in_the_folder(work: Path):
    (work / "deep/merge.yaml").write_text(
        "merge_method: average\nmodels: [{model: org/a@v1}, {model: here/b}, {model: ./org/c},\n"
        "  {model: ~/d}, {model: /e/f}, {model: g}]"
    )
    folders(work / "deep", "here")  # 'here/b' is mistyped
    experts = read_merge_recipe("deep/merge.yaml").experts
    assert [*experts.values()] == ["org/a@v1", "deep/here/b", "deep/org/c", "~/d", "/e/f", "deep/g"]
    with pytest.raises(CheckpointError, match="Expert 'g': deep/g: no such file or directory"):
        plan_merge(None, {"g": experts["g"]}, read_merge_recipe("deep/merge.yaml").settings)


def test_beside_the_recipe_paths_stay_as_they_are_written(work: Path, monkeypatch):
    monkeypatch.chdir(work / "deep")
    assert read_merge_recipe("merge.yaml").experts == {"law": "models/law", "news": "lora/news"}
    assert read_recipe("pack.yaml").base == "models/base"


def test_a_name_that_no_path_can_have_is_no_crash(work: Path):
    long = "x" * 5000
    (work / "deep/pack.yaml").write_text(f"base_model: {long}\nmodels: [{{model: a, name: a}}]")
    assert read_recipe("deep/pack.yaml").base == f"deep/{long}"


@pytest.mark.parametrize("kind", ["merge", "pack"])
def test_a_model_that_is_not_there_is_told_with_the_other_faults(work: Path, kind: str):
    folders(work / "deep", "models/base", "models/law")
    (work / "deep/models/law/model.safetensors").touch()
    recipe = work / f"deep/{kind}.yaml"
    recipe.write_text(recipe.read_text().replace("models/law", "models/lav") + "\nmodles: []\n")
    with pytest.raises(RecipeError, match="Unknown key 'modles'") as caught:
        (read_merge_recipe if kind == "merge" else read_recipe)(recipe)
    (told,) = [line for line in str(caught.value).splitlines() if "models/lav" in line]
    assert "models/lav: no such file or directory. Did you mean 'law'?" in told
    number = next(n for n, line in enumerate(recipe.read_text().splitlines(), 1) if "lav" in line)
    assert f"line {number}: " in told
