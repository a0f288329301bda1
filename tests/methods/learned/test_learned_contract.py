"""What holds of every learned method: what it refuses, what it leaves alone, what it needs."""

from typing import Any

import pytest
import torch
from learned_toys import Plain, Toys, assert_same, shared_of, toys
from torch import Tensor, nn

from personae import LEARNED_METHODS, LearnedMethod
from personae.errors import MethodError

QUICK: dict[str, dict[str, Any]] = {
    "adamerging": {"steps": 2},
    "twin_merging": {"epochs": 2},
    "wemoe": {"steps": 2, "mlp": "second"},
    "auto_switch": {"neighbours": 1},
}
MERGES = sorted(name for name, method in LEARNED_METHODS.items() if not method.routed)


def _method(name: str) -> LearnedMethod:
    return LEARNED_METHODS[name](**QUICK.get(name, {}))


def _call(method: LearnedMethod, family: Toys, **options: Any) -> Any:
    assert callable(method)
    return method(family.experts, family.batches, family.base, **options)


@pytest.mark.parametrize("name", sorted(LEARNED_METHODS))
def test_it_says_what_it_sees_and_where_it_is_from(name: str):
    method = LEARNED_METHODS[name]
    assert method.sees and method.paper and method.summary
    assert ("transductive" in method.sees) == ("test" in method.sees)


@pytest.mark.parametrize("name", sorted(LEARNED_METHODS))
def test_models_are_left_as_they_were(name: str):
    family = toys()
    family.experts["a"].train()
    before = {
        t: {n: v.clone() for n, v in m.state_dict().items()} for t, m in family.experts.items()
    }
    drawn = torch.get_rng_state()
    _call(_method(name), family)
    assert torch.equal(torch.get_rng_state(), drawn)
    for task, model in family.experts.items():
        assert model.training == (task == "a") and model.get_submodule("first").training == (
            task == "a"
        )
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[task][key])
        assert all(own.grad is None for own in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [*((name, {}) for name in sorted(LEARNED_METHODS)), ("regmean", {"inputs": "merged"})],
)
def test_progress_goes_to_its_end(name: str, parameters: dict[str, Any]):
    method = _method(name).model_copy(update=parameters)
    told: list[tuple[int, int]] = []
    _call(method, toys(), progress=lambda *step: told.append(step))
    assert told and told == [(n + 1, len(told)) for n in range(len(told))]


@pytest.mark.parametrize("name", MERGES)
def test_one_expert_and_equal_experts_come_back(name: str):
    family = toys(labels=(3, 3))
    same = {"a": family.experts["a"], "b": family.experts["a"]}
    options = {"shared": shared_of(family)}
    method = _method(name)
    if method.needs_base:  # of sums: with the coefficients at 1, and at a half
        method = method.model_copy(update={"initial": 1.0, "steps": 0})
    halves = method.model_copy(update={"initial": 0.5}) if method.needs_base else method
    expected = {n: family.experts["a"].get_parameter(n).detach() for n in shared_of(family)}
    alone = Toys(family.base, {"a": same["a"]}, {"a": family.batches["a"]})
    assert_same(_call(method, alone, **options), expected)
    assert_same(_call(halves, Toys(family.base, same, family.batches), **options), expected)


@pytest.mark.parametrize("name", MERGES)
def test_dtypes_come_back_and_iterators_will_do(name: str):
    family = toys()
    for model in (family.base, *family.experts.values()):
        model.bfloat16()
    given = {t: ({"x": b["x"].bfloat16()} for b in bs) for t, bs in family.batches.items()}
    merged = _call(_method(name), Toys(family.base, family.experts, given))  # pyright: ignore[reportArgumentType]
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    assert {*merged} == {*shared_of(family)}


@pytest.mark.parametrize("name", sorted(LEARNED_METHODS))
def test_every_fault_of_the_data_is_told_at_once(name: str):
    family = toys(labels=(3, 4, 5))
    given: dict[str, Any] = {"a": [], "c": family.batches["c"], "d": family.batches["a"]}
    with pytest.raises(MethodError) as caught:
        _call(_method(name), Toys(family.base, family.experts, given))
    text = str(caught.value)
    assert "no data of the task 'a'" in text and "no data of the task 'b'" in text
    assert "batches of 'd', but no expert" in text


@pytest.mark.parametrize("name", sorted(LEARNED_METHODS))
def test_a_base_that_is_needed_is_asked_for(name: str):
    family, method = toys(), LEARNED_METHODS[name]
    if not method.needs_base:
        pytest.skip("needs no base")
    with pytest.raises(MethodError, match=f"{name} is relative to the base"):
        _method(name)(family.experts, family.batches)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("name", sorted(LEARNED_METHODS))
def test_batches_without_samples_change_nothing(name: str):
    family = toys()
    none = {"x": torch.empty(0, 5)}
    given = {
        task: [batches[0], none, *batches[1:], none] for task, batches in family.batches.items()
    }
    found = _call(_method(name), Toys(family.base, family.experts, given))
    expected = _call(_method(name), family)
    assert_same(_tensors(found), _tensors(expected))
    given["a"] = [none]
    with pytest.raises(MethodError, match="first batch of the task 'a' has no sample"):
        _call(_method(name), Toys(family.base, family.experts, given))


@pytest.mark.parametrize("name", sorted(LEARNED_METHODS))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_an_error_of_ours(name: str, value: float):
    family = toys()
    family.batches["b"][-1] = {"x": torch.full_like(family.batches["b"][-1]["x"], value)}
    try:
        found = _call(_method(name), family)
    except MethodError as error:
        assert "NaN" in str(error) or "nan" in str(error)
    else:
        assert all(one.isfinite().all() for one in _tensors(found).values())


def _tensors(result: Any) -> dict[str, Tensor]:
    said = result if isinstance(result, dict) else result.state_dict()
    return {name: one for name, one in said.items() if isinstance(one, Tensor)}


class _Odd(nn.Module):
    """Gives no logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = inner.first, inner.second, inner.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": x}


def test_what_models_give_is_looked_at_before_work():
    family = toys(labels=(3, 4, 5))
    with torch.no_grad():
        family.experts["a"].get_parameter("head.bias")[0] = torch.nan
    family.experts["b"] = _Odd(family.experts["b"])
    family.batches["c"][0] = {"y": family.batches["c"][0]["x"]}
    with pytest.raises(MethodError) as caught:
        _call(_method("fisher"), family)
    text = str(caught.value)
    assert "'a' gives logits that are NaN or infinite" in text
    assert "'b' cannot be used: the output, a dict, has no floating logits" in text
    assert "'c' fails on its first batch (y)" in text


def test_experts_of_another_architecture_are_refused():
    family = toys()
    family.experts["b"] = Plain(4, width=9)
    with pytest.raises(MethodError, match=r"first.weight is \(8, 5\), \(9, 5\), \(8, 5\)"):
        _call(_method("fisher"), family)
    family.experts["b"] = nn.Sequential(nn.Linear(5, 8))
    with pytest.raises(MethodError, match="'a' and 'b' are of different architectures"):
        _call(_method("fisher"), family)


def test_shared_names_are_held_to_the_models():
    family = toys()
    with pytest.raises(MethodError) as caught:
        _call(_method("fisher"), family, shared=["first.wieght", "head.bias"])
    assert "Did you mean 'first.weight'?" in str(caught.value)
    assert "names head.bias, whose shapes differ: a (3,), b (4,), base (7,)" in str(caught.value)
    found = _call(_method("fisher"), family, shared=["first.weight"])
    assert [*found] == ["first.weight"]
