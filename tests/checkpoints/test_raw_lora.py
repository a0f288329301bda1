"""LoRA factors without a PEFT configuration: read where alpha scales them, else refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from families import State
from personae.checkpoints import open_checkpoint
from personae.checkpoints.adapter import adapter_of
from personae.commands.merge import merge
from personae.commands.pack import pack
from personae.errors import CheckpointError
from toys import load

MODULES = {
    "down_blocks.0.attentions.1.to_q": ((6, 4), (2, 4), (6, 2)),
    "down_blocks.0.attentions.1.to_out.0": ((6, 6), (2, 6), (6, 2)),
    "down_blocks.0.conv_in": ((6, 4, 3, 3), (2, 4, 3, 3), (6, 2, 1, 1)),
}
NAMES = {  # of the factors of one module, by who writes them
    "kohya": ("lora_unet_{flat}.lora_down.weight", "lora_unet_{flat}.lora_up.weight"),
    "diffusers": ("unet.{module}.lora.down.weight", "unet.{module}.lora.up.weight"),
    "peft": ("base_model.model.{module}.lora_A.weight", "base_model.model.{module}.lora_B.weight"),
    "peft-state": ("{module}.lora_A.default.weight", "{module}.lora_B.default.weight"),
}


def family(style: str, alpha: float | None = 1.0, seed: int = 0) -> tuple[State, State, State]:
    """A base, the factors, and the model they make: W + alpha / 2 · up ∘ down, in fp64."""
    draw = torch.Generator().manual_seed(seed)
    base: State = {"norm.weight": torch.ones(4)}
    factors: State = {}
    wanted: State = {"norm.weight": torch.ones(4)}
    fixed = torch.Generator().manual_seed(99)
    for module, (shape, down, up) in MODULES.items():
        weight = torch.randn(shape, generator=fixed)
        a, b = torch.randn(down, generator=draw), torch.randn(up, generator=draw)
        names = [n.format(module=module, flat=module.replace(".", "_")) for n in NAMES[style]]
        factors |= dict(zip(names, (a, b), strict=True))
        if alpha is not None:
            owner = names[0].split(".lora")[0]
            factors[f"{owner}.alpha"] = torch.tensor(alpha)
        base[f"{module}.weight"] = weight
        product = (b.double().flatten(1) @ a.double().flatten(1)).reshape(shape)
        wanted[f"{module}.weight"] = weight.double() + (alpha or 0) / 2 * product
    return base, factors, wanted


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("style", NAMES)
def test_factors_with_alpha_are_an_adapter(style: str, tmp_path: Path) -> None:
    base, factors, wanted = family(style, alpha=3.0)
    save_file(factors, tmp_path / "lora.safetensors")
    opened = open_checkpoint(tmp_path / "lora.safetensors", base=open_checkpoint(base))
    assert adapter_of(opened) is opened
    for name, tensor in wanted.items():
        close(opened.read(name), tensor)
    assert opened.same_as_base("norm.weight")
    assert opened.factors("down_blocks.0.attentions.1.to_q.weight") is not None


def test_products_are_averaged_and_not_factors(tmp_path: Path) -> None:
    base, x, of_x = family("kohya", seed=1)
    _, y, of_y = family("kohya", seed=2)
    merge(base, {"x": x, "y": y}, tmp_path / "out")
    found = load(tmp_path / "out")
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        close(tensor, (of_x[name].double() + of_y[name].double()) / 2)


@pytest.mark.parametrize("style", NAMES)
def test_factors_without_alpha_are_refused(style: str, tmp_path: Path) -> None:
    base, x, _ = family(style, alpha=None, seed=1)
    _, y, _ = family(style, alpha=None, seed=2)
    for do in (merge, pack):
        with pytest.raises(CheckpointError, match=r"(?s)'x'.*not how they are scaled.*'y'"):
            do(base, {"x": x, "y": y}, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"(?s)The base: .* not a model: give it as an"):
        merge(x, {"y": y}, tmp_path / "out")


def test_modules_may_share_factors_and_alpha() -> None:
    """In memory and in pickles they are then one tensor under several names."""
    pair = {"lora_A.weight": DOWN, "lora_B.weight": UP, "alpha": ALPHA}
    factors = {f"{module}.{name}": tensor for module in "qk" for name, tensor in pair.items()}
    base = open_checkpoint({"q.weight": torch.zeros(4, 3), "k.weight": torch.ones(4, 3)})
    opened = open_checkpoint(factors, base=base)
    assert torch.equal(opened.read("q.weight"), torch.full((4, 3), 2.0))
    assert torch.equal(opened.read("k.weight"), torch.full((4, 3), 3.0))


def test_embeddings(tmp_path: Path) -> None:
    """PEFT's names: A is (rank, rows) and B (width, rank), the product transposed."""
    a, b = torch.arange(6.0).reshape(1, 6), torch.tensor([[1.0], [2.0]])
    factors = {"e.lora_embedding_A": a, "e.lora_embedding_B": b, "e.alpha": torch.tensor(2.0)}
    opened = open_checkpoint(factors, base=open_checkpoint({"e.weight": torch.zeros(6, 2)}))
    assert torch.equal(opened.read("e.weight"), 2 * (b @ a).T)


UP, DOWN = torch.ones(4, 2), torch.ones(2, 3)
ALPHA = torch.tensor(2.0)


@pytest.mark.parametrize(
    ("factors", "text"),
    [
        ({"q.lora_A.weight": DOWN, "q.alpha": ALPHA}, r"without its other factor: q\.lora_A"),
        ({"q.lora_A.weight": DOWN, "q.lora_B.weight": UP, "q.base_layer.weight": torch.ones(4, 3)},
         r"beside other tensors: q\.base_layer.* merge_and_unload"),
        ({"q.hada_w1_a": DOWN, "q.alpha": ALPHA}, r"of another kind than plain LoRA: q\.hada_w1_a"),
        ({"q.lora_A.weight": DOWN, "q.lora_B.weight": UP, "q.lora_magnitude_vector": torch.ones(4)},
         "another kind than plain LoRA"),
        ({"v.lora_A.weight": DOWN, "v.lora_B.weight": UP, "v.alpha": ALPHA},
         "adapts modules that the base does not have: v"),
        ({"q.lora_A.weight": DOWN, "q.lora_B.weight": torch.ones(5, 2), "q.alpha": ALPHA},
         r"factors \(2, 3\) and \(5, 2\) of 'q' do not fit 'a\.q\.weight' of the base, \(4, 3\)"),
        ({"q.lora_A.weight": DOWN, "q.lora_B.weight": UP, "q.alpha": ALPHA * torch.nan},
         r"'q\.alpha' is not a finite number"),
        ({"q.lora_A.weight": DOWN, "q.lora_B.weight": UP, "q.alpha": torch.ones(3)},
         r"'q\.alpha' is not a finite number"),
        ({"q.lora_A.weight": torch.ones(0, 3), "q.lora_B.weight": UP[:, :0], "q.alpha": ALPHA},
         "2 tensor.s. of size 0"),
        ({"k.lora_A.weight": DOWN, "k.lora_B.weight": UP, "k.alpha": ALPHA}, "base in two ways"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_of_this_base(factors: dict[str, Any], text: str) -> None:
    names = ("a.q.weight", "a.k.weight", "b.k.weight")
    base = open_checkpoint({name: torch.zeros(4, 3) for name in names})
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(factors, base=base)


def test_models_with_such_words_in_their_names_are_models() -> None:
    """RWKV-7 has low-rank layers of its own; Phi-4-multimodal adapters under names of its own."""
    own = ("h.w_lora.lora.0.weight", "h.w_lora.lora.2.bias", "q.lora_A.speech.weight", "s.alpha")
    assert set(open_checkpoint({name: torch.ones(2, 2) for name in own}).specs) == set(own)
