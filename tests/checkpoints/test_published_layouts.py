"""Tensors fused and apart, as transformers' conversion map has them: read as the base has them."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from personae._types import TensorSpec
from personae.checkpoints import open_checkpoint
from personae.checkpoints.laid_out import Kept, Made
from personae.checkpoints.published_layouts import Described, made_by

mapping = pytest.importorskip("transformers.conversion_mapping")


def _converters() -> dict[str, Any]:
    """Every converter of the map, those that are alike once, by what they do."""
    found: dict[str, Any] = {}
    for rules in mapping._build_checkpoint_conversion_mapping().values():
        for rule in rules:
            if hasattr(rule, "operations"):
                does = "+".join(map(repr, rule.operations))
                key = f"{','.join(rule._original_source_patterns)} {does}"
                found.setdefault(f"{key} {','.join(rule._original_target_patterns)}", rule)
    return found


_CONVERTERS = _converters()
_EXPERTS = 4


class _Toy(Described):
    """Two heads, and whatever shapes a test says."""

    config = SimpleNamespace(  # type: ignore[assignment]
        num_attention_heads=2,
        vision_config=SimpleNamespace(num_attention_heads=2),
        get_text_config=lambda: SimpleNamespace(split_ngram_parts=_EXPERTS),
    )


def _named(pattern: str) -> str:
    """A name that fits a pattern, of a tensor in a layer."""
    plain = pattern.replace("\\.", ".").removeprefix("^")
    return f"layers.0.{plain.removeprefix('.')}" + ("weight" if plain.endswith(".") else "")


def _old_files(rule: Any) -> dict[str, Tensor]:
    """Tensors as files hold them before a rule is used."""
    torch.manual_seed(0)
    names = [_named(pattern) for pattern in rule._original_source_patterns]
    lists = [[n.replace("*", str(i)) for i in range(_EXPERTS)] if "*" in n else [n] for n in names]
    in_stacks = any(getattr(op, "dim", 0) or getattr(op, "dim1", 0) > 1 for op in rule.operations)
    shape = (4, 6) if "*" in "".join(names) else (2, 4, 6) if in_stacks else (12, 6)
    return {name: torch.randn(shape) for one in lists for name in one}


def _as_models_hold(rule: Any, old: dict[str, Tensor], described: Described) -> dict[str, Tensor]:
    """What transformers itself makes of them."""
    own = deepcopy(rule)
    for name in old:
        key, pattern = own.rename_source_key(name)
        assert pattern is not None
        own.add_tensor(key, name, pattern, old[name])
    made = own.convert(key, model=described, config=described.config)
    return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def _shapes(rule: Any) -> dict[str, tuple[int, ...]]:
    """Of the tensors of models, where operations ask: the heads of Molmo, transposed experts."""
    names = [_named(pattern) for pattern in rule._original_target_patterns]
    if len(names) == 3:
        return dict(zip(names, [(6, 6), (3, 6), (3, 6)], strict=True))
    return {names[0]: (2, 6, 4)}


def _check(made: dict[TensorSpec, Made], stored: dict[str, Tensor], wanted: dict[str, Tensor]):
    assert {spec.name: spec.shape for spec in made} == {
        n: tuple(t.shape) for n, t in wanted.items()
    }
    model, kept = open_checkpoint(stored), Kept()
    for spec, how in made.items():
        rows = [how.read_rows(model, kept, row, row + 1) for row in range(spec.shape[0])]
        assert torch.equal(torch.cat(rows), wanted[spec.name])
        assert torch.equal(how.read_rows(model, kept, 0, spec.shape[0]), wanted[spec.name])
        assert how.read_rows(model, kept, 1, 1).shape == wanted[spec.name][1:1].shape
        assert {*how.used} <= stored.keys()


@pytest.mark.parametrize("does", _CONVERTERS)
def test_every_converter_of_transformers_both_ways(does: str):
    rule = _CONVERTERS[does]
    described = _Toy({}, _shapes(rule))
    old = _old_files(rule)
    new = _as_models_hold(rule, old, described)
    for way, stored, wanted in ((rule, old, new), (rule.reverse_transform(), new, old)):
        if wanted is old and "check_dims" in vars(rule.operations[0]):
            described = _Toy({}, {n: tuple(t.shape) for n, t in old.items()})
        specs = {n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in stored.items()}
        _check(made_by(way, {n: n for n in stored}, specs, described), stored, wanted)
