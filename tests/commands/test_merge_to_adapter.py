"""Merges of adapters into one, as PEFT loads it, against fp64 arithmetic on whole deltas.

The deltas are those that PEFT itself gives of the experts, in fp64. Differences to its
`add_weighted_adapter` that are known: its `linear` (and `dare_linear`, `magnitude_prune`, `ties`
without `_svd`) works on A and B apart, so that cross terms come out, and weights [1, -1] of one
adapter are not zero; here every method works on the products.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from personae import MergeSettings, merge
from personae.commands.merge_plan import plan_merge
from personae.errors import CheckpointError, RecipeError
from personae.methods import MERGE_METHODS
from personae.run.work import Work
from toys import WEIGHTS, load, toy_bert, toy_gpt2, toy_llama, toy_t5, toy_vit

pytestmark = pytest.mark.filterwarnings("ignore")

RECIPES = Path(__file__).parents[2] / "recipes" / "adapters"
Deltas = dict[str, Tensor]


class Family(NamedTuple):
    build: Callable[[Path], Path]
    of: str
    targets: list[str]
    others: list[str]


FAMILIES = {
    "llama": Family(toy_llama, "LlamaForCausalLM", ["q_proj", "v_proj"], ["v_proj", "up_proj"]),
    "bert": Family(toy_bert, "BertForSequenceClassification", ["query"], ["query", "value"]),
    "gpt2": Family(toy_gpt2, "GPT2LMHeadModel", ["c_attn"], ["c_attn", "c_fc", "c_proj"]),
    "t5": Family(toy_t5, "T5ForConditionalGeneration", ["q", "wi"], ["q", "v"]),
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def model_of(family: Family, directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, family.of).from_pretrained(directory)


def adapter(family: Family, base: Path, directory: Path, seed: int, **config: Any) -> Deltas:
    """Save an adapter with random factors; return its deltas as PEFT gives them, in fp64."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model_of(family, base), LoraConfig(**config))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad or ".bias" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(str(directory))
    return deltas_of(adapted)


def deltas_of(adapted: Any, name: str = "default") -> Deltas:
    """Module to the delta that PEFT adds to its weight, in fp64, as the base stores it."""
    return {
        module.removeprefix("base_model.model."): layer.get_delta_weight(name).detach()
        for module, layer in adapted.double().named_modules()
        if hasattr(layer, "get_delta_weight") and name in layer.scaling
    }


def loaded(family: Family, base: Path, out: Path) -> Any:
    """The adapter as PEFT loads it; what it cannot find, or does not expect, is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|inconsistency).*")
        return PeftModel.from_pretrained(model_of(family, base), str(out))


def written(family: Family, base: Path, out: Path) -> Deltas:
    return deltas_of(loaded(family, base, out))


def weighted(experts: list[Deltas], weights: list[float]) -> Deltas:
    """Σ w Δ, where an absent module is a zero delta."""
    names = {name for expert in experts for name in expert}
    pairs = list(zip(experts, weights, strict=True))
    return {n: sum((w * e[n] for e, w in pairs if n in e), torch.tensor(0.0)) for n in names}


def truncated(delta: Tensor, rank: int) -> Tensor:
    u, values, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ vh[:rank]


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        error = (found[name] - delta).norm() / delta.norm()
        assert error < 1e-5, f"{name}: {error}"


def two(family: Family, folder: Path, **config: Any) -> tuple[dict[str, Path], list[Deltas]]:
    """Two adapters of other targets, ranks and alphas, the second rank-stabilised."""
    base = family.build(folder / "base")
    kinds: list[dict[str, Any]] = [
        {"r": 2, "lora_alpha": 6, "target_modules": family.targets},
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": family.others,
            "use_rslora": True,
            "rank_pattern": {family.others[-1]: 1},
            "alpha_pattern": {family.others[0]: 7},
        },
    ]
    paths = {f"a{n}": folder / f"a{n}" for n in range(2)}
    made = [
        adapter(family, base, paths[f"a{n}"], n, **kind, **config) for n, kind in enumerate(kinds)
    ]
    return paths, made


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text())


def told(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "personae.json").read_text())


def settings(method: str, **rest: Any) -> MergeSettings:
    own = {name: rest.pop(name) for name in list(rest) if name in MergeSettings.model_fields}
    return MergeSettings(method=method, parameters=rest, output="adapter", **own)


@each_family
def test_sums_of_adapters_are_exact(tmp_path: Path, family: Family) -> None:
    """With weights below zero, scaling once, and modules that only one of them adapts."""
    paths, experts = two(family, tmp_path)
    weights = [0.7, -1.3]
    own = tuple({"weight": weight} for weight in weights)
    how = settings("task_arithmetic", expert_parameters=own)
    out = merge(tmp_path / "base", paths, tmp_path / "out", settings=how)
    assert_same(written(family, tmp_path / "base", out), weighted(experts, weights))
    assert told(out)["rank"] == config_of(out)["r"] == 5 and told(out)["lost"] < 1e-10
    assert config_of(out)["fan_in_fan_out"] == (family.of == "GPT2LMHeadModel")


@each_family
def test_an_average_is_exact(tmp_path: Path, family: Family) -> None:
    paths, experts = two(family, tmp_path)
    out = merge(tmp_path / "base", paths, tmp_path / "out", settings=settings("linear"))
    assert_same(written(family, tmp_path / "base", out), weighted(experts, [0.5, 0.5]))


def test_an_adapter_less_itself_is_zero(tmp_path: Path) -> None:
    """PEFT's `linear` gives something else: it subtracts A from A and adds B to B."""
    family = FAMILIES["llama"]
    base = toy_llama(tmp_path / "base")
    adapter(family, base, tmp_path / "a", 0, r=2, target_modules=["q_proj"])
    own = ({"weight": 1.0}, {"weight": -1.0})
    how = settings("task_arithmetic", expert_parameters=own)
    paths = {"one": tmp_path / "a", "same": tmp_path / "a"}
    out = merge(base, paths, tmp_path / "out", settings=how)
    found = written(family, base, out)
    assert found and all(delta.abs().max() < 1e-8 for delta in found.values())
    assert told(out)["lost"] == 0.0


def added(family: Family, folder: Path, weights: list[float], **how: Any) -> Deltas:
    """The deltas that PEFT gives of both adapters with `add_weighted_adapter`."""
    model: Any = PeftModel.from_pretrained(model_of(family, folder / "base"), str(folder / "a0"))
    model.load_adapter(str(folder / "a1"), adapter_name="other")
    model.add_weighted_adapter(["default", "other"], weights, "both", **how)
    return deltas_of(model, "both")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_one_kind_it_is_what_peft_concatenates_and_decomposes(
    tmp_path: Path, family: str
) -> None:
    """`cat` is the default rank, `svd` is a rank that is asked for."""
    one = FAMILIES[family]
    base = one.build(tmp_path / "base")
    paths = {f"a{n}": tmp_path / f"a{n}" for n in range(2)}
    for seed, path in enumerate(paths.values()):
        adapter(one, base, path, seed, r=2, lora_alpha=3, target_modules=one.targets)
    weights = [0.6, 1.1]
    own = tuple({"weight": weight} for weight in weights)
    for how, kind in (({}, {}), ({"rank": 2}, {"svd_rank": 2})):
        given = settings("task_arithmetic", expert_parameters=own, **how)
        out = merge(base, paths, tmp_path / f"out{len(how)}", settings=given)
        combination = "svd" if kind else "cat"
        theirs = added(one, tmp_path, weights, combination_type=combination, **kind)
        assert_same(written(one, base, out), theirs)
        linear = added(one, tmp_path, weights, combination_type="linear")
        ours = written(one, base, out)
        assert all((ours[name] - linear[name]).norm() > 0.1 * ours[name].norm() for name in ours)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_peft_does_on_deltas_is_the_same(tmp_path: Path, family: str) -> None:
    """Its `ties_svd` and `magnitude_prune_svd`, which trim each matrix alone."""
    one = FAMILIES[family]
    base = one.build(tmp_path / "base")
    paths = {f"a{n}": tmp_path / f"a{n}" for n in range(2)}
    for seed, path in enumerate(paths.values()):
        adapter(one, base, path, seed, r=2, lora_alpha=3, target_modules=one.targets)
    pruned = settings("breadcrumbs", density=0.5, gamma=0.0, scale=1.0, weight=0.8, rank=4)
    hows = {
        "ties_svd": ([1.0, 1.0], settings("ties", density=0.5, scope="tensor", rank=4)),
        "magnitude_prune_svd": ([0.8, 0.8], pruned),
    }
    for kind, (weights, how) in hows.items():
        out = merge(base, paths, tmp_path / kind, settings=how)
        theirs = added(one, tmp_path, weights, combination_type=kind, density=0.5, svd_rank=4)
        assert_same(written(one, base, out), theirs)


def ties(stack: Tensor, density: float) -> Tensor:
    """The paper's steps on one tensor, in fp64, with all of a tensor's entries trimmed together."""
    flat = stack.flatten(1)
    kept = int(density * flat.shape[1])
    thresholds = flat.abs().topk(kept, dim=1).values[:, -1:]
    trimmed = flat * (flat.abs() >= thresholds)
    signs = trimmed.sum(dim=0).sign()
    agreeing = (trimmed * signs).clamp(min=0)
    merged = signs * agreeing.sum(dim=0) / (agreeing > 0).sum(dim=0).clamp(min=1)
    return merged.view(stack.shape[1:])


@each_family
def test_other_methods_are_cut_to_a_rank_and_the_loss_is_told(
    tmp_path: Path, family: Family
) -> None:
    paths, experts = two(family, tmp_path)
    how = settings("ties", density=0.4, scope="tensor", rank=4)
    out = merge(tmp_path / "base", paths, tmp_path / "out", settings=how)
    merged: Deltas = {}
    for name in {*experts[0], *experts[1]}:
        shape = next(e[name] for e in experts if name in e)
        merged[name] = ties(
            torch.stack([e.get(name, torch.zeros_like(shape)) for e in experts]), 0.4
        )
    wanted = {name: truncated(delta, 4) for name, delta in merged.items()}
    assert_same(written(family, tmp_path / "base", out), wanted)
    total = sum(float(delta.norm()) ** 2 for delta in merged.values())
    missed = sum(float((merged[n] - wanted[n]).norm()) ** 2 for n in merged)
    assert told(out)["rank"] == 4
    assert told(out)["lost"] == pytest.approx(missed / total, rel=1e-3)


def test_a_rank_that_no_matrix_has_is_refused(tmp_path: Path) -> None:
    paths, _ = two(FAMILIES["bert"], tmp_path)
    with pytest.raises(RecipeError, match="rank is 10,000, and no matrix has more than"):
        merge(tmp_path / "base", paths, tmp_path / "out", settings=settings("ties", rank=10_000))


def usable() -> list[str]:
    """Methods of task vectors."""
    return sorted(n for n, m in MERGE_METHODS.items() if m.needs not in ("models", "experts"))


@pytest.mark.parametrize("method", usable())
def test_at_full_rank_it_is_the_merged_model(tmp_path: Path, method: str) -> None:
    """Of every method, drawn masks and passes over the model included."""
    family = FAMILIES["llama"]
    paths, _ = two(family, tmp_path)
    if method == "nearswap":  # the base is one of its two
        paths = {"a1": paths["a1"]}
    base, parameters = tmp_path / "base", {"t": 0.5} if method == "nearswap" else {}
    how = settings(method, rank=16, **parameters)
    out = merge(base, paths, tmp_path / "out", settings=how)
    model = MergeSettings(method=method, parameters=parameters)
    full = load(merge(base, paths, tmp_path / "model", settings=model))
    found, before = written(family, base, out), load(base)
    for name, delta in found.items():
        wanted = full[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        assert (delta - wanted).norm() < 1e-5 * before[f"{name}.weight"].norm()
    assert any(delta.norm() > 0.01 for delta in found.values())


@each_family
def test_values_of_the_base_are_not_read(tmp_path: Path, family: Family) -> None:
    """They are not even numbers: neither a sum nor thresholds over the model ask for them."""
    paths, _ = two(family, tmp_path)
    base = tmp_path / "base"
    hows = (settings("average"), settings("ties", density=0.4), settings("drm", rank=3))
    outs = [merge(base, paths, tmp_path / f"out{n}", settings=how) for n, how in enumerate(hows)]
    state = load(base)
    save_file({n: torch.full_like(t, torch.nan) for n, t in state.items()}, base / WEIGHTS)
    for n, how in enumerate(hows):
        again = merge(base, paths, tmp_path / f"again{n}", settings=how)
        assert_same_files(outs[n], again)


@each_family
def test_no_base_has_to_be_at_hand(tmp_path: Path, family: Family) -> None:
    paths, _ = two(family, tmp_path)
    for method, parameters in {"average": {}, "ties": {"density": 0.4}}.items():
        how = settings(method, **parameters)
        out = merge(tmp_path / "base", paths, tmp_path / method, settings=how)
        again = merge(None, paths, tmp_path / f"{method}-alone", settings=how)
        assert_same(
            written(family, tmp_path / "base", again), written(family, tmp_path / "base", out)
        )
        assert config_of(again)["base_model_name_or_path"] == str(tmp_path / "base")


def assert_same_files(one: Path, other: Path) -> None:
    """But for the README, which says what it is called."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def whole_values(model: Any, module: str) -> dict[str, Tensor]:
    """The tensors of a module that is saved whole, in fp64."""
    found = model.base_model.model.get_submodule(module).modules_to_save["default"]
    return {name: value.double() for name, value in found.state_dict().items()}


def test_modules_saved_whole_are_merged_and_stay_so(tmp_path: Path) -> None:
    """The base's values are read there; an expert that does not save one leaves it alone."""
    family = FAMILIES["bert"]
    base = toy_bert(tmp_path / "base")
    common = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    adapter(family, base, tmp_path / "a0", 0, **common)
    adapter(family, base, tmp_path / "a1", 1, **common, modules_to_save=["pooler.dense"])
    paths = {f"a{n}": tmp_path / f"a{n}" for n in range(2)}
    own = ({"weight": 0.5}, {"weight": 0.25})
    how = settings("task_arithmetic", expert_parameters=own)
    out = merge(base, paths, tmp_path / "out", settings=how)
    assert config_of(out)["modules_to_save"] == ["classifier", "pooler.dense"]
    assert config_of(out)["task_type"] == "SEQ_CLS"
    models = [loaded(family, base, path) for path in (*paths.values(), out)]
    before = load(base)
    for name in ("weight", "bias"):
        head = before[f"classifier.{name}"].double()
        a, b, found = (whole_values(model, "classifier")[name] for model in models)
        wanted = head + 0.5 * (a - head) + 0.25 * (b - head)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        pooler = before[f"bert.pooler.dense.{name}"].double()
        b, found = (whole_values(model, "bert.pooler.dense")[name] for model in models[1:])
        wanted = pooler + 0.25 * (b - pooler)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    rows = {(row["kind"], row["carried"], row["tensors"]) for row in told(out)["changed"]}
    assert rows == {
        ("linear", "factors", 2),
        ("linear", "whole", 1),
        ("bias", "whole", 1),
        ("head", "whole", 2),
    }


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_adapters_are_merged(tmp_path: Path, bias: str) -> None:
    family = FAMILIES["bert"]
    base = toy_bert(tmp_path / "base")
    paths = {f"a{n}": tmp_path / f"a{n}" for n in range(2)}
    for n, path in enumerate(paths.values()):
        adapter(family, base, path, n, r=2, target_modules=["query"], bias=bias)
    out = merge(base, paths, tmp_path / "out", settings=settings("average"))
    assert config_of(out)["bias"] == bias and config_of(out)["modules_to_save"] is None
    merged, *experts = [
        dict(loaded(family, base, path).merge_and_unload().state_dict())
        for path in (out, *paths.values())
    ]
    for name, value in merged.items():
        wanted = torch.stack([expert[name].double() for expert in experts]).mean(dim=0)
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-6)
    before = load(base)
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert any(name.endswith("query.bias") for name in changed)
    assert any(name.endswith("key.bias") for name in changed) == (bias == "all")


def test_factors_of_embeddings_and_convolutions(tmp_path: Path) -> None:
    gpt2 = FAMILIES["gpt2"]
    vit = Family(toy_vit, "ViTForImageClassification", [], [])
    for number, (family, target) in enumerate([(gpt2, "wte"), (vit, "projection")]):
        folder = tmp_path / str(number)
        base = family.build(folder / "base")
        paths = {f"a{n}": folder / f"a{n}" for n in range(2)}
        experts = [
            adapter(family, base, path, n, r=2 + n, target_modules=[target, "query", "c_attn"])
            for n, path in enumerate(paths.values())
        ]
        own = ({"weight": 1.0}, {"weight": -0.5})
        how = settings("task_arithmetic", expert_parameters=own)
        out = merge(base, paths, folder / "out", settings=how)
        assert any(target in name for name in experts[0])
        assert_same(written(family, base, out), weighted(experts, [1.0, -0.5]))
        how = settings("ties", density=0.5, rank=16)
        out = merge(base, paths, folder / "ties", settings=how)
        model = MergeSettings(method="ties", parameters={"density": 0.5})
        full = load(merge(base, paths, folder / "model", settings=model))
        for name, value in loaded(family, base, out).merge_and_unload().state_dict().items():
            if name in full:
                torch.testing.assert_close(value, full[name], rtol=1e-4, atol=1e-5)


def test_an_output_layer_that_the_base_ties_is_adapted_under_its_own_name(tmp_path: Path) -> None:
    family, base = FAMILIES["llama"], toy_llama(tmp_path / "base", tied=True)
    common: dict[str, Any] = {"r": 2, "target_modules": ["v_proj", "lm_head"]}
    deltas = [adapter(family, base, tmp_path / name, n, **common) for n, name in enumerate("ab")]
    experts = {name: tmp_path / name for name in "ab"}
    settings = MergeSettings(method="task_arithmetic", output="adapter")
    out = merge(base, experts, tmp_path / "out", settings=settings)
    assert config_of(out)["target_modules"] == ["lm_head", "v_proj"]
    assert_same(written(family, base, out), weighted(deltas, [1.0, 1.0]))


def test_modules_that_the_base_calls_otherwise_are_adapted_under_their_own_names(
    tmp_path: Path,
) -> None:
    """Files of ViT have `query` where transformers since 5 has `q_proj`."""
    family = Family(toy_vit, "ViTForImageClassification", [], [])
    base = toy_vit(tmp_path / "base")
    model = model_of(family, base)
    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if "q_proj" not in last or not any(".query." in name for name in load(base)):
        pytest.skip("this version of transformers has one name for each module")
    deltas = [
        adapter(family, base, tmp_path / name, n, r=2, target_modules=r".*layers\.0.*q_proj")
        for n, name in enumerate("ab")
    ]
    experts = {name: tmp_path / name for name in "ab"}
    settings = MergeSettings(method="task_arithmetic", output="adapter")
    out = merge(base, experts, tmp_path / "out", settings=settings)
    assert_same(written(family, base, out), weighted(deltas, [1.0, 1.0]))


def test_factors_on_two_modules_that_are_one_weight_are_refused(tmp_path: Path) -> None:
    family, base = FAMILIES["llama"], toy_llama(tmp_path / "base", tied=True)
    both: dict[str, Any] = {
        "target_modules": ["lm_head", "embed_tokens"],
        "ensure_weight_tying": True,
    }
    for n, name in enumerate("ab"):
        try:
            adapter(family, base, tmp_path / name, n, r=2, **both)
        except TypeError:
            pytest.skip("this version of PEFT ties no adapters")
    settings = MergeSettings(method="task_arithmetic", output="adapter")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight"):
        merge(base, {n: tmp_path / n for n in "ab"}, tmp_path / "out", settings=settings)


def test_each_module_its_rank(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    paths, experts = two(family, tmp_path)
    how = settings("task_arithmetic", rank_pattern=True)
    out = merge(tmp_path / "base", paths, tmp_path / "out", settings=how)
    stored = load_file(out / "adapter_model.safetensors")
    ranks = {n.split(".")[-3]: t.shape[0] for n, t in stored.items() if "lora_A" in n}
    assert ranks == {"q_proj": 2, "v_proj": 5, "up_proj": 1}
    assert_same(written(family, tmp_path / "base", out), weighted(experts, [1.0, 1.0]))


def test_ranks_by_energy_and_by_budget(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    paths, experts = two(family, tmp_path)
    base, wanted = tmp_path / "base", weighted(experts, [0.5, 0.5])
    out = merge(base, paths, tmp_path / "energy", settings=settings("average", energy=0.9))
    rank = max(
        1 + int((torch.linalg.svdvals(d).square().cumsum(0) < 0.9 * d.norm() ** 2).sum())
        for d in wanted.values()
    )
    assert told(out)["rank"] == rank < 5
    assert_same(written(family, base, out), {n: truncated(d, rank) for n, d in wanted.items()})
    how = settings("average", budget=3000, dtype="bfloat16")
    out = merge(base, paths, tmp_path / "budget", settings=how)
    size = (out / "adapter_model.safetensors").stat().st_size
    larger = plan_merge(
        base, paths, settings("average", rank=told(out)["rank"] + 1, dtype="bfloat16")
    )
    assert size == told(out)["bytes"] <= 3000 < larger.bytes_out
    assert {t.dtype for t in load_file(out / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("method", ["average", "ties"])
def test_the_plan_is_what_comes_out(tmp_path: Path, method: str) -> None:
    paths, _ = two(FAMILIES["bert"], tmp_path)
    how = settings(method)
    plan = plan_merge(tmp_path / "base", paths, how)
    out = merge(
        tmp_path / "base", paths, tmp_path / "out", settings=how, work=Work(memory=plan.largest)
    )
    size = (out / "adapter_model.safetensors").stat().st_size
    assert plan.adapter is not None
    assert plan.adapter.rank == told(out)["rank"] == (5 if method == "average" else 3)
    assert plan.adapter.exact == (method == "average")
    assert plan.bytes_out == plan.adapter.bytes == size
    assert plan.adapter.modules == told(out)["modules"]


def refused(*arguments: Any, **named: Any) -> str:
    with pytest.raises((CheckpointError, RecipeError)) as error:
        merge(*arguments, **named)
    return str(error.value)


def test_what_is_no_adapter_is_refused_with_all_else(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    base = toy_llama(tmp_path / "base")
    toy_llama(tmp_path / "full", seed=3)
    adapter(family, base, tmp_path / "a", 0, r=2, target_modules=["q_proj"])
    adapter(family, base, tmp_path / "dora", 0, r=2, target_modules=["q_proj"], use_dora=True)
    adapter(family, base, tmp_path / "biased", 0, r=2, target_modules=["q_proj"], lora_bias=True)
    tokens = {"trainable_token_indices": [1, 2]}
    adapter(family, base, tmp_path / "tokens", 0, r=2, target_modules=["q_proj"], **tokens)
    given = {name: tmp_path / name for name in ("a", "full", "dora", "biased", "tokens")}
    text = refused(base, given, tmp_path / "out", settings=settings("ties"))
    assert "'use_dora' is True" in text and "'lora_bias' is True" in text
    assert "'trainable_token_indices' is [1, 2]" in text and "personae export" in text
    text = refused(
        base, {"a": given["a"], "f": given["full"]}, tmp_path / "out", settings=settings("ties")
    )
    assert "Expert 'f' is not a LoRA adapter, and 'output: adapter'" in text
    assert not (tmp_path / "out").exists()


def test_the_base_may_be_named_as_without_a_head(tmp_path: Path) -> None:
    """Heads that it lacks have no difference to merge; modules are called as the experts do."""
    family = FAMILIES["bert"]
    base = toy_bert(tmp_path / "base")
    small, paths = tmp_path / "headless", {f"a{n}": tmp_path / f"a{n}" for n in range(2)}
    model_of(family, base).bert.save_pretrained(small)
    common = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    experts = [adapter(family, base, path, n, **common) for n, path in enumerate(paths.values())]
    text = refused(small, paths, tmp_path / "out", settings=settings("average"))
    assert "Expert 'a0' stores whole what the base does not have" in text
    assert "classifier.bias" in text and "skip" in text
    how = settings("average", skip=("classifier.*",))
    out = merge(small, paths, tmp_path / "out", settings=how)
    assert config_of(out)["modules_to_save"] is None
    model = PeftModel.from_pretrained(model_of(family, base), str(out))
    assert_same(deltas_of(model), weighted(experts, [0.5, 0.5]))
    plain = Family(toy_bert, "BertModel", [], [])
    adapter(plain, small, paths["a1"], 1, r=2, target_modules=["query"])
    text = refused(small, paths, tmp_path / "mixed", settings=how)
    assert "Expert 'a1' adapts encoder.layer.0.attention.self.query.weight where 'a0' has " in text
    assert "bert.encoder.layer.0.attention.self.query.weight" in text


def test_adapters_of_unlike_bases_are_refused(tmp_path: Path) -> None:
    paths, _ = two(FAMILIES["llama"], tmp_path)
    wide = toy_bert(tmp_path / "bert")
    text = refused(wide, paths, tmp_path / "out", settings=settings("average"))
    assert "adapts modules whose weight the base does not have" in text
    other = json.loads((paths["a1"] / "adapter_config.json").read_text())
    other["base_model_name_or_path"] = "org/other"
    (paths["a1"] / "adapter_config.json").write_text(json.dumps(other))
    text = refused(None, paths, tmp_path / "out", settings=settings("average"))
    assert "'a1' org/other" in text and "base_model" in text
    merge(tmp_path / "base", paths, tmp_path / "out", settings=settings("average"))
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == str(tmp_path / "base")


def test_factors_of_image_trainers_become_an_adapter_of_peft(tmp_path: Path) -> None:
    """Their alphas are folded in; modules are called as the base's."""
    family = FAMILIES["llama"]
    base = toy_llama(tmp_path / "base")
    draw = torch.Generator().manual_seed(0)
    module, wanted = "model.layers.1.self_attn.q_proj", torch.zeros(16, 16, dtype=torch.float64)
    for n in range(2):
        down, up = (torch.randn(shape, generator=draw) for shape in ((2, 16), (16, 2)))
        wanted += 0.5 * (3.0 + n) / 2 * up.double() @ down.double()
        state = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(3.0 + n)}
        save_file({f"{module}.{k}": t for k, t in state.items()}, tmp_path / f"a{n}.safetensors")
    paths = {f"a{n}": tmp_path / f"a{n}.safetensors" for n in range(2)}
    out = merge(base, paths, tmp_path / "out", settings=settings("average"))
    assert_same(written(family, base, out), {module: wanted})
    assert config_of(out)["target_modules"] == [module]


def test_weights_that_are_not_finite_leave_nothing(tmp_path: Path) -> None:
    paths, _ = two(FAMILIES["llama"], tmp_path)
    file = paths["a1"] / "adapter_model.safetensors"
    state = load_file(file)
    name = next(name for name in state if "layers.1" in name and "v_proj.lora_B" in name)
    state[name][0, 0] = torch.inf
    save_file(state, file)
    for method in ("average", "ties"):
        text = refused(tmp_path / "base", paths, tmp_path / "out", settings=settings(method))
        assert "Expert 'a1'" in text and "layers.1.self_attn.v_proj.weight" in text
        assert not (tmp_path / "out").exists()


def command(*arguments: str) -> str:
    from typer.testing import CliRunner

    from personae.cli import app

    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_merged_as_they_stand(tmp_path: Path, path: Path) -> None:
    """By the command, after its plan; without a base where the recipe names none."""
    family = FAMILIES["llama"]
    base = toy_llama(tmp_path / "models" / "llama")
    for n, name in enumerate(("news", "law", "code")):
        adapter(family, base, tmp_path / "adapters" / name, n, r=2, target_modules=["q_proj"])
    recipe = tmp_path / path.name
    recipe.write_text(path.read_text("utf-8"), "utf-8")
    planned = command("plan", str(recipe))
    out = tmp_path / "out"
    output = command("merge", str(recipe), str(out))
    rank = told(out)["rank"]
    assert rank == (4 if path.stem == "linear" else 16)
    assert f"rank {rank} (exact) for 2 modules, float32" in planned or rank == 16
    assert f"rank {rank} for 2 modules, float32" in output
    assert "lost in all" in output and "% of the squared norm" in output
    assert len(written(family, base, out)) == 2
    facts = json.loads(command("merge", str(recipe), str(out), "--overwrite", "--json"))
    assert facts["adapter"]["lost"] == told(out)["lost"]
    assert path.read_text("utf-8").rstrip() in (out / "README.md").read_text("utf-8")
