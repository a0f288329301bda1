"""What only an expert has: heads and modules of its own are private, layers are not."""

import pytest
import torch

from personae.checkpoints import open_checkpoint
from personae.errors import CheckpointError, Faults
from personae.family.align import align

LAYER = ("self_attn.q_proj.weight", "mlp.weight")
BASE = {f"model.layers.{n}.{name}": torch.ones(4, 4) for n in (0, 1) for name in LAYER}
BASE |= {"model.embed_tokens.weight": torch.ones(8, 4), "model.norm.weight": torch.ones(4)}


def aligned(*own: str, prefix: str = "", **more: object) -> tuple[tuple[str, ...], list[str]]:
    """Private tensors of an expert that has some of its own, and the faults."""
    shapes = {"bias": (1, 1, 4, 4), "inv_freq": (2,)}
    extra = {name: torch.ones(shapes.get(name.rpartition(".")[2], (4,))) for name in own}
    expert = {prefix + name: 2 * tensor for name, tensor in BASE.items()} | extra
    faults, base = Faults(), open_checkpoint(BASE)
    found = align(base, {"x": open_checkpoint(expert)}, faults=faults, **more)  # pyright: ignore[reportArgumentType]
    return found["x"].private, faults.messages


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.mlp.offset",
        "model.layers.2.mlp.weight",
    ],
)
@pytest.mark.parametrize("prefix", ["", "wrapped."])
def test_a_tensor_in_a_layer_is_a_fault(name: str, prefix: str):
    _, (fault,) = aligned(prefix + name, prefix=prefix)
    assert fault.startswith(
        f"Expert 'x' has 1 tensor(s) in the base's layers that the base lacks: {prefix + name}. "
        "Perhaps they were saved by another version of transformers"
    )


@pytest.mark.parametrize(
    "name",
    [
        *("score.weight", "model.pooler.dense.weight", "classifier.0.weight", "model.mask_token"),
        *("lm_head.weight", "model.decoder.layers.0.weight"),
    ],
)
def test_heads_and_modules_beside_the_layers_are_its_own(name: str):
    assert aligned(name) == ((name,), [])


@pytest.mark.parametrize("heads", ["heads", "medusa_head", "lm_heads", "model.classifiers"])
def test_further_heads_in_a_list_are_its_own(heads: str):
    base = BASE | {f"{heads}.0.linear.weight": torch.ones(4, 4)}
    more = {f"{heads}.{n}.linear.weight": torch.ones(4, 4) for n in (0, 1, 2)}
    faults = Faults()
    found = align(open_checkpoint(base), {"x": open_checkpoint(BASE | more)}, faults=faults)
    assert found["x"].private == (f"{heads}.1.linear.weight", f"{heads}.2.linear.weight")
    assert faults.messages == []


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.0.attn.bias", "model.layers.0.rotary_emb.inv_freq"),
        "model.layers.0.attention.self.rotary_embeddings.inv_freq",  # ESM
        *("model.layers.0.embed_tokens.weight",),  # a copy, perhaps
    ],
)
def test_what_loaders_make_or_tie_is_no_training(name: str):
    assert aligned(name)[1] == []


def test_it_is_left_out_or_kept_by_name():
    name = "model.layers.0.self_attn.q_norm.weight"
    assert aligned(name, skip=("*.q_norm.*",)) == ((), [])
    assert aligned(name, private=("*.q_norm.*",)) == ((name,), [])


def test_what_it_lacks_besides_is_told_alone():
    base = open_checkpoint(BASE)
    expert = dict(BASE)
    expert["model.layers.0.mlp.other.weight"] = expert.pop("model.layers.0.mlp.weight")
    with pytest.raises(
        CheckpointError, match=r"lacks 1 tensor.*another version of transformers"
    ) as caught:
        align(base, {"x": open_checkpoint(expert)})
    assert "in the base's layers" not in str(caught.value)
