"""Merges of LoRA adapters: what they consist of is what they train."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from families import saved
from personae.commands.merge import merge
from personae.errors import CheckpointError, PersonaeError
from personae.recipe import MergeSettings
from toys import load, toy_llama

pytestmark = pytest.mark.filterwarnings("ignore")


def adapters(
    folder: Path, count: int = 2, rank: int = 2
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base and adapters of its q_proj and v_proj; the state dicts of all, merged by PEFT."""
    toy_llama(folder / "base")
    merged: list[dict[str, Tensor]] = []
    for number in range(count):
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(number)
            targets = ["q_proj", "v_proj"]
            config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
            model = LlamaForCausalLM.from_pretrained(folder / "base")
            adapted: Any = get_peft_model(model, config)
            adapted.save_pretrained(str(folder / f"adapter{number}"))
            merged.append(dict(adapted.merge_and_unload().state_dict()))
    return load(folder / "base"), merged


def ties(task_vectors: Tensor, density: float) -> Tensor:
    """The paper's steps on flat vectors, in fp64."""
    kept = int(density * task_vectors.shape[1])
    thresholds = task_vectors.abs().topk(kept, dim=1).values[:, -1:]
    trimmed = task_vectors * (task_vectors.abs() >= thresholds)
    signs = trimmed.sum(dim=0).sign()
    agreeing = (trimmed * signs).clamp(min=0)
    return signs * agreeing.sum(dim=0) / (agreeing > 0).sum(dim=0).clamp(min=1)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("ties", {"density": 0.2}), ("dare_ties", {"density": 1.0, "trim": 0.2})],
)
def test_the_density_of_ties_is_of_what_adapters_train(tmp_path, method, parameters):
    """Over the whole model, whose most tensors no adapter changes, nothing would be trimmed.

    DARE that drops nothing is TIES.
    """
    base, experts = adapters(tmp_path)
    names = [name for name in base if "q_proj" in name or "v_proj" in name]
    flat = torch.stack(
        [
            torch.cat([(expert[n].double() - base[n].double()).flatten() for n in names])
            for expert in experts
        ]
    )
    assert flat.shape[1] < 0.2 * sum(tensor.numel() for tensor in base.values())
    expected = ties(flat, 0.2)
    settings = MergeSettings(method=method, parameters=parameters)
    paths = {f"a{n}": tmp_path / f"adapter{n}" for n in range(2)}
    merge(tmp_path / "base", paths, tmp_path / "out", settings=settings)
    found = load(tmp_path / "out")
    merged = torch.cat([(found[n].double() - base[n].double()).flatten() for n in names])
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
    assert (expected == 0).double().mean() > 0.5  # it did trim
    untouched = [name for name in base if name not in names]
    assert all(torch.equal(found[name], base[name]) for name in untouched)


def test_the_density_of_knots_is_of_the_coordinates_of_what_adapters_train(tmp_path):
    """Σ V_nᵀ of each layer's [τ_1 τ_2] = U Σ [V_1 V_2]ᵀ, trimmed over all adapted layers."""
    base, experts = adapters(tmp_path)
    names = [name for name in base if "q_proj" in name or "v_proj" in name]
    bases: dict[str, Tensor] = {}
    coordinates: list[Tensor] = []
    for name in names:
        deltas = [expert[name].double() - base[name].double() for expert in experts]
        u, values, vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
        kept = values > 1e-5
        bases[name] = u[:, kept]
        coordinates.append(torch.stack((values[kept, None] * vh[kept]).chunk(2, dim=1)))
    merged = ties(torch.cat([own.flatten(1) for own in coordinates], dim=1), 0.2)
    settings = MergeSettings(method="knots", parameters={"density": 0.2})
    paths = {f"a{n}": tmp_path / f"adapter{n}" for n in range(2)}
    merge(tmp_path / "base", paths, tmp_path / "out", settings=settings)
    found = load(tmp_path / "out")
    pieces = merged.split([own[0].numel() for own in coordinates])
    for name, own, piece in zip(names, coordinates, pieces, strict=True):
        expected = bases[name] @ piece.view(own.shape[1:])
        change = found[name].double() - base[name].double()
        torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)


def test_beside_a_full_checkpoint_the_density_is_of_the_whole_model(tmp_path):
    base, experts = adapters(tmp_path)
    saved(experts[1], tmp_path / "full")
    names = list(base)
    flat = torch.stack(
        [
            torch.cat([(expert[n].double() - base[n].double()).flatten() for n in names])
            for expert in (experts[0], load(tmp_path / "full"))
        ]
    )
    settings = MergeSettings(method="ties", parameters={"density": 0.2})
    paths = {"a0": tmp_path / "adapter0", "full": tmp_path / "full"}
    merge(tmp_path / "base", paths, tmp_path / "out", settings=settings)
    found = load(tmp_path / "out")
    merged = torch.cat([(found[n].double() - base[n].double()).flatten() for n in names])
    # Fewer than 0.2 of the entries are changed at all, so that all of these are kept.
    signs = flat.sum(dim=0).sign()
    agreeing = (flat * signs).clamp(min=0)
    expected = signs * agreeing.sum(dim=0) / (agreeing > 0).sum(dim=0).clamp(min=1)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [3, 6, 12])
def test_core_space_has_the_bases_of_the_factors(tmp_path: Path, rank: int):
    """Also of ranks that add up to more than a side (16, of v_proj 8)."""
    base, experts = adapters(tmp_path, rank=rank)
    stored = [load_file(tmp_path / f"adapter{n}" / "adapter_model.safetensors") for n in range(2)]
    settings = MergeSettings(method="core_space", parameters={"rule": "ties", "density": 0.3})
    paths = {f"a{n}": tmp_path / f"adapter{n}" for n in range(2)}
    merge(tmp_path / "base", paths, tmp_path / "out", settings=settings)
    found = load(tmp_path / "out")
    for name in (name for name in base if "q_proj" in name or "v_proj" in name):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        down = torch.cat([state[f"{module}.lora_A.weight"] for state in stored]).double()
        up = torch.cat([state[f"{module}.lora_B.weight"] for state in stored], dim=1).double()
        u = torch.linalg.svd(up, full_matrices=False).U
        vh = torch.linalg.svd(down, full_matrices=False).Vh
        stack = torch.stack([expert[name].double() - base[name].double() for expert in experts])
        cores = u.T @ stack @ vh.T
        expected = u @ ties(cores.flatten(1), 0.3).view(cores.shape[1:]) @ vh
        change = found[name].double() - base[name].double()
        assert (change - expected).norm() < 1e-5 * expected.norm()


def change(folder: Path, side: str, tensor: Tensor) -> str:
    """Replace one factor of the first layer's q_proj; its module."""
    file = folder / "adapter_model.safetensors"
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(load_file(file) | {f"{module}.lora_{side}.weight": tensor}, file)
    return module


@pytest.mark.parametrize("method", ["core_space", "drm", "knots", "iso_c", "ties", "average"])
@pytest.mark.parametrize("output", ["model", "adapter"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_factors_that_are_not_finite_are_named(tmp_path, method, output, value):
    adapters(tmp_path)
    change(tmp_path / "adapter1", "B", torch.full((16, 2), value))
    paths = {f"a{n}": tmp_path / f"adapter{n}" for n in range(2)}
    settings = MergeSettings(method=method, output=output)
    told = r"Expert 'a1': tensor 'model.layers.0.self_attn.q_proj.weight' holds 256 value"
    with pytest.raises(PersonaeError, match=told):
        merge(tmp_path / "base", paths, tmp_path / "out", settings=settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("at_hand", [True, False])
def test_factors_that_are_no_matrices_are_refused(tmp_path, side, at_hand):
    adapters(tmp_path)
    module = change(tmp_path / "adapter1", side, torch.tensor(1.0))
    paths = {f"a{n}": tmp_path / f"adapter{n}" for n in range(2)}
    settings = MergeSettings(method="average", output="adapter")
    base = tmp_path / "base" if at_hand else None
    module = module.removeprefix("base_model.model.")
    with pytest.raises(CheckpointError, match=f"of '{module}'"):
        merge(base, paths, tmp_path / "out", settings=settings)
