"""Models in between that are merged as they are read: to the byte what their files would hold."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import listing, saved, small_base, tuned
from personae.commands import merge_documents
from personae.commands.merge_computed import ComputedModel, computed_as_read
from personae.commands.merge_documents import merge_recipes, plan_recipes
from personae.errors import BudgetError, CheckpointError, MethodError
from personae.family import chunks
from personae.recipe import read_merge_recipes
from personae.run.work import Work

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LINEAR = "merge_method: linear, conventions: papers, models: [{model: a}, {model: b}]"
WITH_BASE = "conventions: papers, base_model: base"
SUM = f"merge_method: task_arithmetic, {WITH_BASE}"
TIES = f"merge_method: ties, {WITH_BASE}"
THREE = "models: [{model: a}, {model: b}, {model: c}]"

TWO: dict[str, str] = {
    "an average without a base": LINEAR,
    "an average with a base": f"merge_method: average, {WITH_BASE}, {THREE}",
    "a sum": f"{SUM}, {THREE}, parameters: {{scale: 0.4}}",
    "ties over the model": f"{TIES}, {THREE}, parameters: {{density: 0.3}}",
    "ties over each tensor": f"{TIES}, {THREE}, parameters: {{density: 0.3, scope: tensor}}",
    "ties that counts heads": f"{TIES}, {THREE}, parameters: {{density: 0.5, elect: count}}",
    "dare": f"merge_method: dare, {WITH_BASE}, {THREE}, parameters: {{density: 0.5, seed: 7}}",
    "dare_ties": f"merge_method: dare_ties, {WITH_BASE}, {THREE}, parameters: {{density: 0.5}}",
    "della": f"merge_method: della, {WITH_BASE}, {THREE}, parameters: {{density: 0.5}}",
    "breadcrumbs": f"merge_method: breadcrumbs, {WITH_BASE}, {THREE}, parameters: {{gamma: 0.1}}",
    "slerp": "merge_method: slerp, base_model: a, models: [{model: b}], parameters: {t: 0.3}",
    "slerp without a base": "merge_method: slerp, vector: difference, models: [{model: a}, "
    "{model: b}]",
    "model_stock": f"merge_method: model_stock, base_model: base, {THREE}",
    "karcher": f"merge_method: karcher, {THREE}",
    "sce": f"merge_method: sce, base_model: base, {THREE}, parameters: {{select_topk: 0.5}}",
    "mergekit's ties": "merge_method: ties, base_model: base, models: "
    "[{model: a, parameters: {weight: 0.5, density: 0.5}}, {model: b, parameters: {weight: 0.5}}]",
    "mergekit's linear": "merge_method: linear, models: [{model: a, parameters: {weight: 1}}, "
    "{model: b, parameters: {weight: 2}}]",
    "mergekit's dare_ties": "merge_method: dare_ties, base_model: base, parameters: {weight: 0.5, "
    f"density: 0.6}}, {THREE}",
    "a part": f"{SUM}, {THREE}, skip: [embed*, scale]",
    "passthrough": "merge_method: passthrough, models: [{model: a}], parameters: {scale: 0.5}",
}
"""Recipes of a model `between`, in one line each."""


def family(folder: Path, dtype: torch.dtype) -> Path:
    """A base and four experts; votes on a third of the entries cancel, for a and b differ alone."""
    base = small_base(dtype=dtype)
    base["wide.weight"] = (torch.arange(24 * 40).reshape(24, 40) % 89 - 44).to(dtype) / 64
    saved(base, folder / "base")
    for seed, name in enumerate("abcd", 1):
        expert = tuned(base, seed)
        if name in "ab":
            sign = 1 if name == "a" else -1
            expert["wide.weight"] = base["wide.weight"] + sign * (base["wide.weight"] > 0) / 8
            expert["wide.weight"] = expert["wide.weight"].to(dtype)
        saved(expert, folder / name)
    return folder


@pytest.fixture(scope="module", params=DTYPES.values(), ids=DTYPES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family(tmp_path_factory.mktemp("models"), request.param)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are cut as large ones are."""
    monkeypatch.setattr(chunks, "CHUNK_ENTRIES", 128)
    monkeypatch.setattr(chunks, "ITEM_ENTRIES", 300)


def document(text: str, name: str | None = None) -> str:
    named = "" if name is None else f"name: {name}, "
    return f"{{{named}{text}}}"


def merged(
    folder: Path, out: Path, *documents: str, work: Work | None = None
) -> dict[str, bytes | None]:
    recipe = out.with_suffix(".yaml")
    recipe.write_text("\n---\n".join(documents))
    for name in ("base", *"abcd"):
        if not (recipe.parent / name).exists():
            (recipe.parent / name).symlink_to(folder / name)
    return listing(merge_recipes(read_merge_recipes(recipe), out, work=work))


def both_ways(
    folder: Path, into: Path, monkeypatch: pytest.MonkeyPatch, *documents: str, computed: str
) -> None:
    """What comes out is what does where every model in between is written."""
    found = merged(folder, into / "out", *documents)
    recipes = read_merge_recipes(into / "out.yaml")
    assert " ".join(sorted(computed_as_read(recipes))) == computed
    with monkeypatch.context() as patch:
        patch.setattr(merge_documents, "computed_as_read", lambda _: frozenset())
        written = merged(folder, into / "written", *documents)
    assert found.keys() == written.keys()
    assert [name for name in found if found[name] != written[name]] == []


LAST = f"{SUM}, models: [{{model: between}}, {{model: d}}], parameters: {{scale: 0.5}}"


@pytest.mark.parametrize("between", TWO.values(), ids=TWO)
def test_two_recipes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: str
):
    documents = document(LAST), document(between, "between")
    both_ways(models, tmp_path, monkeypatch, *documents, computed="between")


@pytest.mark.parametrize(
    "last",
    [
        f"merge_method: tsv_m, {WITH_BASE}, models: [{{model: between}}, {{model: d}}]",
        f"{TIES}, models: [{{model: between}}, {{model: c}}, {{model: d}}]",
        "merge_method: linear, models: [{model: between}, {model: d, parameters: {weight: 3}}], "
        "parameters: {weight: 1}",
        f"{SUM}, models: [{{model: c}}, {{model: d}}]".replace("base_model: base", "base_model: between"),
    ],
    ids=["matrices", "passes over the model", "no base", "as the base"],
)
def test_readers(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str):
    documents = document(last), document(TWO["a sum"], "between")
    both_ways(models, tmp_path, monkeypatch, *documents, computed="between")


CHAINS = {
    "three in a row": (
        "two",
        document(LAST.replace("between", "two")),
        document(f"{TIES}, models: [{{model: one}}, {{model: b}}, {{model: c}}]", "two"),
        document("merge_method: slerp, base_model: a, models: [{model: b}]", "one"),
    ),
    "two beside each other": (
        "one two",
        document(f"{SUM}, models: [{{model: one}}, {{model: two}}]"),
        document(LINEAR, "one"),
        document(f"{TIES}, models: [{{model: c}}, {{model: d}}]", "two"),
    ),
    "one read twice": (
        "one two",
        document(f"{SUM}, models: [{{model: one}}, {{model: two}}]"),
        document(f"{SUM}, models: [{{model: one}}, {{model: d}}]", "two"),
        document(LINEAR, "one"),
    ),
    "matrices written beneath one that is computed": (
        "two",
        document(LAST.replace("between", "two")),
        document("merge_method: linear, models: [{model: one}, {model: b}], parameters: "
                 "{weight: 1}", "two"),
        document(f"merge_method: tsv_m, {WITH_BASE}, models: [{{model: a}}, {{model: b}}]", "one"),
    ),
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_three_recipes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chain: tuple[str, ...]
):
    computed, *documents = chain
    both_ways(models, tmp_path, monkeypatch, *documents, computed=computed)
