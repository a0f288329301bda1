"""What recipes say of the adapter that comes out, and what is wrong with it, with lines."""

from pathlib import Path

import pytest

from personae.errors import RecipeError
from personae.recipe import (
    MergeSettings,
    Ranks,
    merge_recipe_text,
    read_merge_recipe,
    read_merge_recipes,
)

FOLDER = Path(__file__).parents[2] / "recipes" / "adapters"


def read(folder: Path, text: str) -> MergeSettings:
    (folder / "recipe.yaml").write_text(text)
    return read_merge_recipe(folder / "recipe.yaml").settings


def refusal(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        read_merge_recipes(folder / "recipe.yaml")
    return str(error.value)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_reads_as_it_stands(path: Path) -> None:
    recipe = read_merge_recipe(path)
    assert recipe.settings.output == "adapter" and not recipe.notes
    first = recipe.text.split("\n#\n")[1].split("\n")[0]
    assert first.startswith(f"#   personae merge recipes/adapters/{path.name} adapters/")


def test_the_same_words_as_of_export(tmp_path: Path) -> None:
    text = "merge_method: ties\noutput: adapter\nmodels: [{model: a}, {model: b}]\n"
    assert read(tmp_path, text).ranks() == Ranks()
    assert read(tmp_path, text + "rank: 8").ranks() == Ranks(rank=8)
    asked = Ranks(energy=0.9, most=64, each_its_own=True)
    more = "energy: 0.9\nmax_rank: 64\nrank_pattern: true"
    assert read(tmp_path, text + more).ranks() == asked
    assert read(tmp_path, text + "budget: 50MB").ranks() == Ranks(budget_bytes=50_000_000)
    assert read(tmp_path, text + "budget: 900").ranks() == Ranks(budget_bytes=900)


def test_what_settings_say_is_read_again(tmp_path: Path) -> None:
    settings = MergeSettings(method="ties", output="adapter", energy=0.9, rank_pattern=True)
    text = merge_recipe_text(None, {"a": "org/a", "b": "org/b"}, settings)
    assert read(tmp_path, text) == settings


def test_all_faults_at_once_with_lines(tmp_path: Path) -> None:
    text = refusal(
        tmp_path,
        """merge_method: slerp
output: adapter
base_model: org/base
rank: 0
max_rank: 8
energy: 1.5
budget: none
tokenizer_source: union
models: [{model: org/a}, {model: org/b}]
parameters: {t: 0.5}
""",
    )
    assert "line 1: slerp merges models" in text
    assert "line 4: rank is 0. Give 1 or more." in text
    assert "line 5: max_rank bounds ranks" in text
    assert "line 6: energy is 1.5" in text
    assert "line 7: Give one of rank, energy, budget" in text
    assert "line 7: budget: 'none' is no size" in text
    assert "line 8: An adapter has the vocabulary of its base" in text


def test_ranks_are_of_adapters(tmp_path: Path) -> None:
    text = refusal(
        tmp_path,
        "merge_method: ties\nbase_model: org/a\nskip: [x]\nrank: 8\nmodels: [{model: org/b}]\n",
    )
    assert "line 4: rank is about adapters: write 'output: adapter'" in text
    text = refusal(
        tmp_path,
        "merge_method: ties\nbase_model: org/a\noutput: adaptor\nmodels: [{model: org/b}]\n",
    )
    assert "line 3: output = 'adaptor': Input should be 'model' or 'adapter'" in text


def test_slices_and_models_in_between_are_no_adapters(tmp_path: Path) -> None:
    text = refusal(
        tmp_path,
        """merge_method: ties
output: adapter
base_model: org/a
slices: [{sources: [{model: org/b, layer_range: [0, 2]}]}]
""",
    )
    assert "line 2: An adapter is merged whole" in text
    text = refusal(
        tmp_path,
        """name: between
merge_method: ties
output: adapter
models: [{model: org/b}]
---
merge_method: ties
base_model: org/a
models: [{model: between}]
""",
    )
    assert "line 3: An adapter is for a model that is there" in text


def test_difference_vectors_are_no_adapters(tmp_path: Path) -> None:
    text = refusal(
        tmp_path,
        "merge_method: ties\noutput: adapter\nvector: difference\nmodels: [{model: org/b}]\n",
    )
    assert "line 3: An adapter holds task vectors" in text


@pytest.mark.parametrize("wrong", ["rank: true", "max_rank: 4.5", "energy: true"])
def test_a_size_of_another_kind_is_refused(tmp_path: Path, wrong: str) -> None:
    text = f"merge_method: ties\noutput: adapter\nmodels: [{{model: a}}, {{model: b}}]\n{wrong}\n"
    assert f"line 4: {wrong.partition(':')[0]}" in refusal(tmp_path, text)
    whole = text.replace(wrong, "energy: 1")
    assert read(tmp_path, whole).energy == 1
