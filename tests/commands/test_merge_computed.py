"""Models in between that are merged as they are read: to the byte what their files would hold."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import State, listing, saved, small_base, tuned
from personae.checkpoints import open_checkpoint
from personae.commands import merge_documents
from personae.commands.merge_computed import ComputedModel, computed_as_read
from personae.commands.merge_documents import merge_recipes, plan_recipes
from personae.commands.merge_parts import open_parts
from personae.errors import BudgetError, CheckpointError, MethodError
from personae.family import chunks
from personae.recipe import read_merge_recipes
from personae.run.work import Work
from toy_vocabularies import model, tokenizer

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


@pytest.fixture(scope="module", params=DTYPES.values(), ids=[*DTYPES])
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
def test_two_recipes(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: str):
    documents = document(LAST), document(between, "between")
    both_ways(models, tmp_path, monkeypatch, *documents, computed="between")


@pytest.mark.parametrize(
    "last",
    [
        f"merge_method: tsv_m, {WITH_BASE}, models: [{{model: between}}, {{model: d}}]",
        f"{TIES}, models: [{{model: between}}, {{model: c}}, {{model: d}}]",
        "merge_method: linear, models: [{model: between}, {model: d, parameters: {weight: 3}}], "
        "parameters: {weight: 1}",
        "merge_method: task_arithmetic, conventions: papers, base_model: between, models: "
        "[{model: c}, {model: d}]",
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
        document(
            "merge_method: linear, models: [{model: one}, {model: b}], parameters: {weight: 1}",
            "two",
        ),
        document(f"merge_method: tsv_m, {WITH_BASE}, models: [{{model: a}}, {{model: b}}]", "one"),
    ),
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_three_recipes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chain: tuple[str, ...]
):
    computed, *documents = chain
    both_ways(models, tmp_path, monkeypatch, *documents, computed=computed)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return family(tmp_path / "models", torch.float32)


@pytest.mark.parametrize(
    "last",
    [
        LAST.replace("between", "between+FOLDER/lora"),
        "merge_method: task_arithmetic, conventions: papers, base_model: between, models: "
        "[{model: FOLDER/lora}, {model: d}]",
    ],
    ids=["merged into it", "an expert beside it"],
)
def test_an_adapter_on_a_model_in_between(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"]}
    factors = {"lora_A": torch.randn(2, 12), "lora_B": torch.randn(16, 2)}
    saved({}, tmp_path / "lora")
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.layer.{n}.weight": tensor for n, tensor in factors.items()}
    save_file(named, tmp_path / "lora/adapter_model.safetensors")
    (tmp_path / "lora/model.safetensors").unlink()
    documents = document(last.replace("FOLDER", str(tmp_path))), document(TWO["a sum"], "between")
    both_ways(small, tmp_path, monkeypatch, *documents, computed="between")
    assert ".out.between" not in (tmp_path / "out/README.md").read_text()


def stack_of_layers(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"model.layers.{n}.q_proj.weight": (12, 16) for n in range(4)}
    shapes["model.embed_tokens.weight"] = (20, 16)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


SLICES = (
    "slices: [{sources: [{model: ONE, layer_range: [0, 2]}]}, "
    "{sources: [{model: c, layer_range: [2, 4]}]}]"
)


@pytest.mark.parametrize(
    "documents",
    [
        (
            document(f"merge_method: passthrough, {SLICES.replace('ONE', 'between')}"),
            document(LINEAR, "between"),
        ),
        (
            document(
                "merge_method: linear, parameters: {weight: 1}, "
                "models: [{model: between}, {model: b}]"
            ),
            document(f"merge_method: passthrough, {SLICES.replace('ONE', 'a')}", "between"),
        ),
    ],
    ids=["of it", "in it"],
)
def test_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: tuple[str, str]):
    for seed, name in enumerate(("base", *"abcd")):
        config = json.dumps({"num_hidden_layers": 4})
        saved(stack_of_layers(seed), tmp_path / "models" / name, config)
    both_ways(tmp_path / "models", tmp_path, monkeypatch, *documents, computed="between")


@pytest.mark.parametrize("reader", ["union", ""])
def test_a_union_of_vocabularies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str):
    """Rows are merged apart in a model; whoever picks rows of one has it written."""
    words = {"base": (), "a": ("<p>",), "b": ("<p>", "<q>"), "c": ("<q>",), "d": ()}
    for name, added in words.items():
        model(tmp_path / "models" / name, 4 + len(added), tokenizer(*added))
    between = "merge_method: linear, parameters: {weight: 1}, tokenizer_source: union, models: "
    last = "merge_method: linear, parameters: {weight: 1}, models: [{model: between}, {model: b}]"
    documents = (
        document(last + (", tokenizer_source: union" if reader else "")),
        document(between + "[{model: a}, {model: c}]", "between"),
    )
    computed = "" if reader else "between"
    both_ways(tmp_path / "models", tmp_path, monkeypatch, *documents, computed=computed)


def refused(
    folder: Path, into: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], *docs: str
) -> str:
    """What is said; the same where every model in between is written."""
    with pytest.raises(error) as caught:
        merged(folder, into / "out", *docs)
    with monkeypatch.context() as patch, pytest.raises(error) as written:
        patch.setattr(merge_documents, "computed_as_read", lambda _: frozenset())
        merged(folder, into / "written", *docs)
    assert sorted(str(caught.value).split()) == sorted(str(written.value).split())
    assert not [path.name for path in into.iterdir() if path.name.endswith(".between")]
    return str(caught.value)


LEFT_ALONE = (
    "merge_method: task_arithmetic, conventions: papers, base_model: between, only: [embed*], "
    "models: [{model: d}]"
)


@pytest.mark.parametrize("between", ["a sum", "ties over the model", "ties over each tensor"])
@pytest.mark.parametrize("last", [LAST, LEFT_ALONE], ids=["merged", "left alone"])
def test_values_that_are_not_finite(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: str, last: str
):
    odd = tuned(small_base(), 1)
    odd["layer.weight"][3, 4] = torch.nan
    odd["layer.bias"][:2] = torch.inf
    shutil.rmtree(small / "a")
    wide = load_file(small / "b/model.safetensors")["wide.weight"]
    saved(odd | {"wide.weight": wide}, small / "a")
    documents = document(last), document(TWO[between], "between")
    told = refused(small, tmp_path, monkeypatch, CheckpointError, *documents)
    assert "between: Expert 'a': tensor 'layer.weight' holds 1 value(s) that are NaN" in told
    assert "between: Expert 'a': tensor 'layer.bias' holds 2 value(s) that are NaN" in told


def test_values_beyond_the_dtype(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    between = f"{SUM}, {THREE}, only: [scale], dtype: float16, parameters: {{scale: 1e8}}"
    last = f"{LAST}, dtype: float32"
    documents = document(last), document(between, "between")
    told = refused(small, tmp_path, monkeypatch, MethodError, *documents)
    assert "between: Tensor 'scale' holds" in told


def test_what_is_lost_in_between_is_told(small: Path, tmp_path: Path):
    notes: list[str] = []
    between = f"{TIES}, {THREE}, parameters: {{scale: 0.0}}"
    work = Work(note=notes.append)
    merged(small, tmp_path / "out", document(LAST), document(between, "between"), work=work)
    (told,) = [note for note in notes if "merged to exactly 0" in note]
    assert "conv.weight, embed.weight, layer.bias, layer.weight, scale and 1 more" in told


def test_an_interrupted_run_goes_on(small: Path, tmp_path: Path):
    documents = document(LAST), document(TWO["ties over the model"], "between")
    expected = merged(small, tmp_path / "whole", *documents)

    def stop(stage: str, done: int, _: int) -> None:
        if stage == "merging (task_arithmetic)" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(small, tmp_path / "out", *documents, work=Work(workers=1, progress=stop))
    assert not (tmp_path / ".out.between").exists()
    notes: list[str] = []
    assert merged(small, tmp_path / "out", *documents, work=Work(note=notes.append)) == expected
    assert any("going on with an interrupted run: 2 of" in note for note in notes)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_nothing_of_it_is_written(small: Path, tmp_path: Path):
    """Its file is as long as it would be, and takes no room."""
    seen: list[tuple[int, int]] = []

    def look(stage: str, done: int, _: int) -> None:
        if stage == "merging (task_arithmetic)" and done:
            status = (tmp_path / ".out.between/between/model.safetensors").stat()
            seen.append((status.st_size, status.st_blocks * 512))

    big = {"wide.weight": torch.ones(512, 1024)}
    for name in ("base", *"abcd"):
        shutil.rmtree(small / name)
        saved(big, small / name)
    documents = document(LAST), document(LINEAR, "between")
    merged(small, tmp_path / "out", *documents, work=Work(progress=look))
    size, room = seen[-1]
    assert size > 512 * 1024 * 4
    assert room < size / 10


def test_the_plan_tells_memory_and_what_is_written(small: Path, tmp_path: Path):
    documents = (
        document(f"{SUM}, models: [{{model: one}}, {{model: two}}]"),
        document(LINEAR, "one"),
        document(f"merge_method: tsv_m, {WITH_BASE}, models: [{{model: c}}, {{model: d}}]", "two"),
    )
    recipe = small / "plan.yaml"
    recipe.write_text("\n---\n".join(documents))
    recipes = read_merge_recipes(recipe)
    plans = plan_recipes(recipes, Work(workers=1))
    assert {name: plan.computed for name, plan in plans.items()} == {
        "one": True,
        "two": False,
        "the output": False,
    }
    assert plans["one"].bytes_out == 0
    assert plans["two"].bytes_out == plans["the output"].bytes_out > 0
    alone = document(f"{SUM}, models: [{{model: a}}, {{model: b}}]")
    recipe.write_text(alone)
    (single,) = plan_recipes(read_merge_recipes(recipe), Work(workers=1)).values()
    assert plans["the output"].largest == single.largest + plans["one"].largest
    with pytest.raises(BudgetError, match="the bound is"):
        plan_recipes(recipes, Work(memory=plans["the output"].largest - 1))


def test_which_are_computed(small: Path):
    def computed(*documents: str) -> str:
        recipe = small / "recipe.yaml"
        recipe.write_text("\n---\n".join(documents))
        return " ".join(sorted(computed_as_read(read_merge_recipes(recipe))))

    ties = document(f"{TIES}, {THREE}", "between")
    linear = document(LINEAR, "between")
    matrices = document(f"merge_method: tsv_m, {WITH_BASE}, {THREE}", "between")
    by_passes = document(f"{TIES}, models: [{{model: between}}, {{model: d}}]")
    assert computed(document(LAST), ties) == "between"
    assert computed(document(LAST), matrices) == ""
    assert computed(by_passes, ties) == ""  # its passes would be taken, and it merged, twice
    assert computed(by_passes, linear) == "between"
    thrice = "models: [{model: between}, {model: between, name: n}, {model: between, name: m}]"
    assert computed(document(f"{SUM}, {thrice}"), linear) == ""
    assert computed(document(f"{LAST}, tokenizer_source: union"), linear) == ""


def test_read_by_many_threads_at_once(small: Path, tmp_path: Path):
    """Passes over one tensor are taken once, whoever asks first."""
    recipe = small / "recipe.yaml"
    recipe.write_text("\n---\n".join([document(TWO["ties over each tensor"])]))
    (read,) = read_merge_recipes(recipe)
    merge_recipes([read], tmp_path / "expected")
    expected = load_file(tmp_path / "expected/model.safetensors")
    with open_parts(read.parts, at_once=True) as opened:
        hollow = open_checkpoint(tmp_path / "expected")
        computed = ComputedModel("between", hollow, opened, Work())
        names = [name for name in expected for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(computed.read, names))
        for name, tensor in zip(names, found, strict=True):
            assert torch.equal(tensor, expected[name]), name
        assert torch.equal(computed.read_rows("wide.weight", 5, 17), expected["wide.weight"][5:17])


def test_an_output_layer_stored_beside_its_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In some models it is a copy of it, in others a matrix of its own; config.json may not say."""
    wide = dict[str, torch.Tensor]()
    for seed, name in enumerate(("base", *"abcd")):
        drawn = torch.Generator().manual_seed(seed)
        embedding, other = torch.randn(2, 20, 16, generator=drawn)
        wide = {"copies": embedding, "narrow copies": embedding.bfloat16(), "apart": other}
        for kind, output in wide.items():
            state = {"model.embed_tokens.weight": embedding, "lm_head.weight": output.clone()}
            saved(state, tmp_path / kind / "models" / name)
    documents = document(LAST), document(TWO["a sum"], "between")
    for kind in wide:
        folder = tmp_path / kind
        both_ways(folder / "models", folder, monkeypatch, *documents, computed="between")
        found = load_file(folder / "out/model.safetensors")
        output, embedding = found["lm_head.weight"], found["model.embed_tokens.weight"]
        assert torch.equal(output, embedding.to(output.dtype)) == (kind != "apart")
        assert output.dtype == wide[kind].dtype


def test_modules_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    modules = [{"path": "", "type": "Transformer"}, {"path": "2_Dense", "type": "Dense"}]
    for seed, name in enumerate(("base", *"abcd")):
        folder = saved(tuned(small_base(), seed + 1), tmp_path / "models" / name)
        (folder / "modules.json").write_text(json.dumps(modules))
        drawn = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        saved({"linear.weight": drawn}, folder / "2_Dense")
    documents = document(LAST), document(TWO["a sum"], "between")
    both_ways(tmp_path / "models", tmp_path, monkeypatch, *documents, computed="between")
    assert load_file(tmp_path / "out/2_Dense/model.safetensors")["linear.weight"].shape == (8, 16)
