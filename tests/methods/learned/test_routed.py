"""Routed results: each sample by itself, whatever is in its batch; their state is all they are."""

from typing import Any

import pytest
import torch
from learned_toys import BUILDERS, Toys, arithmetic, shared_of, toys
from torch import Tensor
from torch.func import functional_call

from personae import AutoSwitch, RoutedModel, TSwitch, TwinMerging, WEMoE
from personae.errors import MethodError
from personae.methods._routers import NearestNeighbours, Perceptron, Router


def _logits(
    family: Toys, task: str, weights: dict[str, Tensor], batch: dict[str, Tensor]
) -> Tensor:
    model = family.experts[task]
    fitted = {name: one.to(model.get_parameter(name).dtype) for name, one in weights.items()}
    output = functional_call(model, fitted, (), batch)
    return getattr(output, "logits", output).detach()


def _rows(batch: dict[str, Tensor], which: list[int]) -> dict[str, Tensor]:
    return {name: one[which] for name, one in batch.items()}


def _methods(kind: str) -> list[Any]:
    mlp = r"first|second" if kind == "plain" else None
    return [
        TwinMerging(rank_fraction=0.5, epochs=20, learning_rate=0.01, batch_size=4),
        AutoSwitch(neighbours=3),
        WEMoE(steps=3, learning_rate=0.05, mlp=mlp),
    ]


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_sample_gets_the_same_in_any_company(kind: str, number: int):
    family = toys(kind, noise=0.3)
    routed = _methods(kind)[number](family.experts, family.batches, family.base)
    assert isinstance(routed, RoutedModel)
    mixed = {
        name: torch.cat([family.batches[task][1][name] for task in "ab"])
        for name in family.batches["a"][0]
    }
    together = routed("b", **mixed)
    assert together.shape == (8, 4)
    apart = torch.cat([routed("b", **_rows(mixed, [n])) for n in range(8)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    turned = routed("b", **_rows(mixed, [*range(7, -1, -1)])).flip(0)
    torch.testing.assert_close(together, turned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_its_state_is_all_that_it_is(number: int):
    family, other = toys(seed=1), toys(seed=2)
    method = _methods("plain")[number]
    routed = method(family.experts, family.batches, family.base)
    again = method(other.experts, other.batches, other.base)
    x = family.batches["a"][0]["x"]
    assert not torch.allclose(routed("a", x=x), again("a", x=x))
    again.load_state_dict(routed.state_dict())
    assert torch.equal(routed("a", x=x), again("a", x=x))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_head_that_is_not_there_is_told(number: int):
    family = toys()
    routed = _methods("plain")[number](family.experts, family.batches, family.base)
    with pytest.raises(MethodError, match="There is no task 'c'"):
        routed("c", x=family.batches["a"][0]["x"])


def test_twin_merging_at_full_rank_and_a_certain_router_is_the_expert():
    """θ* + v_n = θ_n; the router tells apart what lies far apart."""
    family = toys("bert", noise=0.1)
    routed: Any = TwinMerging(rank_fraction=1.0)(family.experts, family.batches, family.base)
    routed.router.weights = lambda seen: torch.tensor([[0.0, 1.0]]).expand(len(seen), 2)
    batch = family.batches["b"][0]
    expected = _logits(family, "b", {}, batch)
    torch.testing.assert_close(routed("b", **batch), expected, rtol=1e-4, atol=1e-4)
    routed.router.weights = lambda seen: torch.zeros(len(seen), 2)
    expected = _logits(family, "b", arithmetic(family, 0.3), batch)
    torch.testing.assert_close(routed("b", **batch), expected, rtol=1e-4, atol=1e-4)


def test_auto_switch_adds_what_t_switch_codes_by_the_share_of_neighbours():
    family = toys(noise=0.3)
    with torch.no_grad():  # tasks that features tell apart
        family.batches["a"][0]["x"] += 20
        family.batches["a"][1]["x"] += 20
        family.batches["b"][0]["x"] -= 20
        family.batches["b"][1]["x"] -= 20
    routed = AutoSwitch(density=0.5, neighbours=4)(family.experts, family.batches, family.base)
    weights = {}
    for name in shared_of(family):
        base = family.base.get_parameter(name).detach()
        delta = family.experts["b"].get_parameter(name).detach() - base
        code = TSwitch(density=0.5)
        weights[name] = base + code.decode(code.encode(delta), tuple(delta.shape))
    batch = family.batches["b"][0]
    torch.testing.assert_close(routed("b", **batch), _logits(family, "b", weights, batch))


def test_neighbours_vote_and_ties_go_to_the_first():
    examples = {"a": torch.tensor([[0.0], [1.0]]), "b": torch.tensor([[2.0], [9.0], [9.5]])}
    asked = torch.tensor([[0.9], [9.2], [1.4]])
    # Nearest three of 0.9: 1, 0, 2; of 9.2: 9, 9.5, 2; of 1.4: 1, 2, 0.
    votes = torch.tensor([[2 / 3, 1 / 3], [0, 1], [2 / 3, 1 / 3]])
    assert torch.equal(NearestNeighbours(examples, 3).weights(asked), votes)
    assert NearestNeighbours(examples, 3, "pick").weights(asked).tolist() == [
        [1, 0],
        [0, 1],
        [1, 0],
    ]
    assert NearestNeighbours(examples, 2, "pick").weights(torch.tensor([[1.5]])).tolist() == [
        [1, 0]
    ]
    assert NearestNeighbours(examples, 99).weights(asked)[0].tolist() == pytest.approx([0.4, 0.6])


def test_neighbours_that_are_no_numbers_are_told():
    with pytest.raises(MethodError, match="Features of b are NaN"):
        NearestNeighbours({"a": torch.zeros(1, 2), "b": torch.full((1, 2), torch.nan)})


def test_a_perceptron_learns_to_tell_tasks_apart():
    draws = torch.Generator().manual_seed(0)
    seen = {t: torch.randn(40, 6, generator=draws) + shift for t, shift in (("a", 2), ("b", -2))}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        router = Perceptron(("a", "b"), 6)
        router.fit(seen, epochs=30, batch_size=16, learning_rate=0.01)
    assert isinstance(router, Router)
    found = router.weights(torch.cat([*seen.values()]))
    torch.testing.assert_close(found.sum(dim=1), torch.ones(80))
    assert (found[:40, 0] > 0.9).all() and (found[40:, 1] > 0.9).all()


@pytest.mark.parametrize("kind", BUILDERS)
def test_wemoe_starts_as_task_arithmetic(kind: str):
    family = toys(kind, noise=0.3)
    mlp = "first|second" if kind == "plain" else None
    routed = WEMoE(steps=0, scale=0.4, mlp=mlp)(family.experts, family.batches, family.base)
    if kind != "plain":
        assert len(routed.blocks) == 2  # pyright: ignore[reportArgumentType]
    for task, batches in family.batches.items():
        expected = _logits(family, task, arithmetic(family, 0.4), batches[0])
        torch.testing.assert_close(routed(task, **batches[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "bert", "gpt2", "vit"])
def test_the_entropy_of_wemoe_falls_and_its_gates_differ_by_sample(kind: str):
    family = toys(kind, noise=0.5, batches=1)
    mlp = "first|second" if kind == "plain" else None

    def entropy(steps: int) -> float:
        method = WEMoE(steps=steps, learning_rate=0.02, mlp=mlp)
        routed, total = method(family.experts, family.batches, family.base), 0.0
        for task, batches in family.batches.items():
            p = routed(task, **batches[0]).double().softmax(dim=-1)
            total -= float((p * p.log()).sum(dim=-1).mean())
        return total

    found = [entropy(steps) for steps in (0, 10, 40)]
    assert found[0] > found[1] > found[2]


def test_wemoe_mixes_weights_as_its_gates_say():
    """By hand: gates of each sample from the router, weights put together for it, run alone."""
    family = toys(noise=0.3)
    method = WEMoE(steps=5, learning_rate=0.1, mlp="second")
    routed: Any = method(family.experts, family.batches, family.base)
    merged = arithmetic(family, 0.3)
    base = {n: family.base.get_parameter(n).detach().double() for n in shared_of(family)}
    for n, x in enumerate(family.batches["a"][0]["x"].double()):
        hidden = torch.tanh(x @ merged["first.weight"].T + merged["first.bias"])
        gates = routed.routers[0](hidden.float()).double()
        for kind in ("second.weight", "second.bias"):
            each = [m.get_parameter(kind).double() - base[kind] for m in family.experts.values()]
            merged[kind] = base[kind] + sum(g * v for g, v in zip(gates, each, strict=True))
        expected = _logits(family, "a", merged, {"x": x.float().unsqueeze(0)})
        found = routed("a", **family.batches["a"][0])[n : n + 1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_mlps_is_refused():
    family = toys()
    with pytest.raises(MethodError, match="wemoe finds no MLP: no linear layer is in a numbered"):
        WEMoE()(family.experts, family.batches, family.base)
    with pytest.raises(MethodError, match="has a name with 'ffn' in it"):
        WEMoE(mlp="ffn")(family.experts, family.batches, family.base)
