"""Methods as objects and functions: on plain tensors, on state dicts, as `merge` takes them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from registered import every_method, method_of

import personae
from families import as_many, saved, small_base, tuned
from personae import (
    DTS,
    TIES,
    Average,
    MergeSettings,
    PackSettings,
    TaskArithmetic,
    merge,
    merge_state_dicts,
    pack,
    plan_merge,
    plan_pack,
    ties,
)
from personae.errors import CheckpointError, MethodError, RecipeError
from personae.methods import MERGE_METHODS, MergeMethod
from toys import load

# Each keeps its two largest: 3 and 2; -2 and 2. The signs elected are +, -, +; the mean of what
# agrees is 3, -2 and (2 + 2) / 2.
VECTORS = [[3.0, 1.0, 2.0], [1.0, -2.0, 2.0]]
MERGED = [3.0, -2.0, 2.0]


def test_a_method_is_called_by_hand():
    assert TIES(density=0.5)(torch.tensor(VECTORS)).tolist() == MERGED
    assert ties(torch.tensor(VECTORS), density=0.5).tolist() == MERGED
    assert ties([torch.tensor(row) for row in VECTORS], density=0.5).tolist() == MERGED


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_arrays_give_numpy_arrays(dtype: type[np.floating]):
    merged = ties(np.array(VECTORS, dtype), density=0.5)
    assert isinstance(merged, np.ndarray) and merged.dtype == dtype
    assert merged.tolist() == MERGED
    assert isinstance(ties([np.array(row) for row in VECTORS]), np.ndarray)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_comes_back(dtype: torch.dtype):
    merged = ties(torch.tensor(VECTORS, dtype=dtype), density=0.5)
    assert (merged.dtype, merged.tolist()) == (dtype, MERGED)


@pytest.mark.parametrize("name", sorted(MERGE_METHODS))
def test_function_and_object_are_one(name: str):
    cls = MERGE_METHODS[name]
    function = getattr(personae, name)
    assert getattr(personae, cls.__name__) is cls
    assert function.__name__ == name and cls.summary in function.__doc__
    stack = torch.randn(cls.takes or 3, 7, 5, generator=torch.Generator().manual_seed(0))
    before = stack.clone()
    assert torch.equal(function(stack), cls()(stack))
    assert torch.equal(stack, before)


def test_the_tensors_name_tells_what_it_is():
    """CART averages embeddings."""
    stack = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    method = personae.CART(rank_fraction=0.2)
    torch.testing.assert_close(method(stack, name="embed_tokens.weight"), stack.mean(dim=0))
    assert not torch.allclose(method(stack), stack.mean(dim=0), atol=1e-3)


def test_methods_are_frozen_values():
    assert TIES(density=0.2) == TIES() and hash(TIES()) == hash(TIES(scale=1.0))
    with pytest.raises(ValueError, match="frozen"):
        TIES().density = 0.3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="density"):
        TIES(density=20)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (torch.ones(2, 3, dtype=torch.int64), "int64 .* floating"),
        (torch.tensor(1.0), "shape \\(\\)"),
        (torch.empty(0, 3), "one expert at least"),
        ([torch.ones(3), torch.ones(4)], "one shape"),
        ([], "one shape"),
        (torch.tensor([[1.0], [torch.nan], [torch.inf]]), "vectors 1, 2 of 3 .* NaN or infinite"),
    ],
)
def test_what_is_no_stack_is_refused(given: object, told: str):
    with pytest.raises(MethodError, match=told):
        ties(given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(MethodError, match="2 values for 3 experts"):
        ties(torch.ones(3, 2), weight=(1.0, 2.0))


def _family(dtype: torch.dtype = torch.float32) -> tuple[dict, dict[str, dict]]:
    base = small_base(dtype=dtype)
    return base, {name: tuned(base, seed) for seed, name in enumerate("abc", 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_method
def test_state_dicts_merge_as_checkpoints_do(
    cls: type[MergeMethod], dtype: torch.dtype, tmp_path: Path
):
    if cls.needs == "adapters":
        pytest.skip("merges adapters alone")
    base, experts = _family(dtype)
    experts = as_many(cls, experts)
    method = method_of(cls)
    before = {name: {n: t.clone() for n, t in state.items()} for name, state in experts.items()}
    merged = merge_state_dicts(base, experts, method)
    merge(base, experts, tmp_path / "out", method)
    on_disk = load(tmp_path / "out")
    assert merged.keys() == on_disk.keys()
    near = 1e-5 if dtype == torch.float32 else 1e-2
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, on_disk[name], rtol=near, atol=near)
        assert tensor.dtype == base[name].dtype
    assert all(torch.equal(experts[n][k], before[n][k]) for n in experts for k in base)


def test_state_dicts_without_a_base_and_with_skip():
    base, experts = _family()
    merged = merge_state_dicts(None, list(experts.values()), Average(), skip=["scale"])
    for name in ("embed.weight", "conv.weight"):
        mean = torch.stack([state[name] for state in experts.values()]).mean(dim=0)
        torch.testing.assert_close(merged[name], mean)
    assert torch.equal(merged["scale"], experts["a"]["scale"])
    del base


def test_misfits_among_state_dicts_are_told_at_once():
    base, experts = _family()
    del experts["a"]["layer.weight"], experts["b"]["layer.bias"]
    with pytest.raises(CheckpointError, match=r"(?s)'a' lacks.*'b' lacks"):
        merge_state_dicts(base, experts, Average())


def test_weights_of_each_expert_reach_the_files(tmp_path: Path):
    base, experts = _family()
    weights = (0.5, 1.0, -1.0)
    merge(base, experts, tmp_path / "out", TaskArithmetic(weight=weights))
    expected = base["layer.weight"].clone()
    for weight, state in zip(weights, experts.values(), strict=True):
        expected += weight * (state["layer.weight"] - base["layer.weight"])
    torch.testing.assert_close(load(tmp_path / "out")["layer.weight"], expected)
    plan = plan_merge(base, experts, method=TaskArithmetic(weight=weights))
    assert (plan.method, plan.merged) == ("task_arithmetic", 5)
    with pytest.raises(RecipeError, match="2 values for 3 experts"):
        merge(base, experts, tmp_path / "no", TaskArithmetic(weight=(1.0, 2.0)))
    with pytest.raises(RecipeError, match="Give one of them"):
        merge(base, experts, tmp_path / "no", Average(), settings=MergeSettings())
    assert not (tmp_path / "no").exists()


def test_a_codec_packs_as_its_settings_do(tmp_path: Path):
    base, experts = _family()
    folder = saved(base, tmp_path / "base")
    by_codec = pack(folder, experts, tmp_path / "a", DTS(rank_fraction=0.5))
    settings = PackSettings(method="dts", parameters={"rank_fraction": 0.5})
    by_settings = pack(folder, experts, tmp_path / "b", settings=settings)
    for name, task in by_codec.manifest.tasks.items():
        assert task.sha256 == by_settings.manifest.tasks[name].sha256
    plan = plan_pack(folder, experts, codec=DTS(), budget="60%")
    fraction = plan.tasks["a"].coded.rank_fraction
    assert fraction is not None and fraction != DTS().rank_fraction
    by_budget = pack(folder, experts, tmp_path / "c", DTS(), budget="90%")
    assert by_budget.manifest.budget == "90%"
    with pytest.raises(RecipeError, match="Give one"):
        pack(folder, experts, tmp_path / "no", DTS(), settings=settings)
