"""Adapters whose modules their base stores fused, stacked or apart, against PEFT's merging.

Each is merged and packed as from the command line, and what comes out is loaded by transformers.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from test_renamed_modules import _TEXT, _family, _says
from torch import Tensor

from personae.commands.merge import merge
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.errors import CheckpointError
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work
from toys import WEIGHTS, load

pytest.importorskip("transformers.conversion_mapping")
pytestmark = pytest.mark.filterwarnings("ignore")
_WORK = Work(workers=1)
_WHOLE = PackSettings(method="svd", parameters={"rank_fraction": 1.0})
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

# What PEFT adapts in memory, where files hold it otherwise.
_IN_MEMORY: dict[str, tuple[str, dict[str, Any]]] = {
    "q and v of a fused matrix": ("gte", {"target_modules": ["q_proj", "v_proj"]}),
    "all of two fused matrices": ("gte", {"target_modules": "all-linear"}),
    "one of a fused pair": ("hrm_text", {"target_modules": ["up_proj", "o_proj"]}),
    "experts that are stored one by one": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": _EXPERTS, "use_rslora": True},
    ),
    "one kind of matrix of experts": (
        "mixtral",
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    ),
    "stacks that are stored transposed": (
        "aria_text",
        {"target_modules": ["v_proj"], "target_parameters": _EXPERTS},
    ),
}


def _adapter(loaded: type[Any], base: Path, out: Path, **settings: Any) -> None:
    """Random factors, saved by PEFT; the model as PEFT merges them beside it, in `expected`."""
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        get_peft_model(loaded.from_pretrained(base), config).save_pretrained(str(out))
    merged: Any = PeftModel.from_pretrained(loaded.from_pretrained(base), str(out))
    merged.merge_and_unload().save_pretrained(out.with_name("expected"))


def _check(loaded: type[Any], base: Path, adapter: Path, expected: Tensor, folder: Path) -> None:
    """Merged alone and rebuilt from a pack, the adapter says what is expected."""
    assert not torch.allclose(_says(loaded, base), expected, atol=1e-3)
    settings = MergeSettings(method="task_arithmetic")
    merge(base, {"x": adapter}, folder / "m", settings=settings, work=_WORK)
    assert load(folder / "m").keys() == load(base).keys()
    torch.testing.assert_close(_says(loaded, folder / "m"), expected, atol=1e-5, rtol=1e-4)
    pack(base, {"x": adapter}, folder / "p", settings=_WHOLE, work=_WORK)
    out = unpack(folder / "p", "x", folder / "out", work=_WORK)
    assert load(out).keys() == load(base).keys()
    torch.testing.assert_close(_says(loaded, out), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("case", _IN_MEMORY)
def test_modules_in_memory_that_files_hold_otherwise(case: str, tmp_path: Path) -> None:
    kind, settings = _IN_MEMORY[case]
    loaded = _family(kind, tmp_path)
    _adapter(loaded, tmp_path / "base", tmp_path / "adapter", **settings)
    expected = _says(loaded, tmp_path / "expected")
    _check(loaded, tmp_path / "base", tmp_path / "adapter", expected, tmp_path)


# Modules as hubs' files name them, which models of an older transformers had in memory.
_ON_HUBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "experts of their own, and a router": (
        "mixtral",
        ("experts.2.w1", "experts.0.w3", "experts.1.w2", "block_sparse_moe.gate", "q_proj"),
    ),
    "q, k and v in one": ("gte", ("qkv_proj", "o_proj")),
    "gate and up in one": ("hrm_text", ("gate_up_proj", "down_proj")),
}


@pytest.mark.parametrize("case", _ON_HUBS)
def test_modules_of_hubs_files_that_the_base_holds_as_in_memory(case: str, tmp_path: Path) -> None:
    kind, ends = _ON_HUBS[case]
    loaded = _family(kind, tmp_path)
    (tmp_path / "plain").mkdir()
    loaded.from_pretrained(tmp_path / "base").save_pretrained(
        tmp_path / "plain", save_original_format=False
    )
    stored, factors, merged = load(tmp_path / "base"), dict[str, Tensor](), dict[str, Tensor]()
    generator = torch.Generator().manual_seed(2)
    for name, tensor in stored.items():
        merged[name] = tensor
        module = name.removesuffix(".weight")
        if tensor.ndim == 2 and module.endswith(ends):
            a = torch.randn(2, tensor.shape[1], generator=generator)
            b = torch.randn(tensor.shape[0], 2, generator=generator)
            merged[name] = tensor + 0.5 * b @ a
            factors |= {f"base_model.model.{module}.lora_A.weight": a}
            factors |= {f"base_model.model.{module}.lora_B.weight": b}
    assert factors
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": [*ends]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(tmp_path / "base", tmp_path / "expected")
    save_file(merged, tmp_path / "expected" / WEIGHTS, {"format": "pt"})
    expected = _says(loaded, tmp_path / "expected")
    for base in ("base", "plain"):
        (tmp_path / f"on {base}").mkdir()
        _check(loaded, tmp_path / base, tmp_path / "adapter", expected, tmp_path / f"on {base}")


@pytest.mark.parametrize(
    ("as_hubs_do", "text"),
    [(True, "adapts modules that the base stores otherwise"), (False, "adapts stacks of matrices")],
)
def test_they_are_not_merged_into_one_adapter(as_hubs_do: bool, text: str, tmp_path: Path) -> None:
    loaded = _family("mixtral", tmp_path)
    base = tmp_path / ("base" if as_hubs_do else "tuned")
    _adapter(loaded, base, tmp_path / "adapter", target_modules=[], target_parameters=_EXPERTS)
    settings = MergeSettings(method="average", output="adapter")
    with pytest.raises(CheckpointError, match=f"Expert 'x' {text}.*Leave output out"):
        merge(base, {"x": tmp_path / "adapter"}, tmp_path / "m", settings=settings, work=_WORK)


def _from_before_version_5(base: Path, out: Path) -> None:
    """An adapter of linear layers of experts, as PEFT saved it when Mixtral had such."""
    generator = torch.Generator().manual_seed(3)
    factors = dict[str, Tensor]()
    ends = ("w1", "w2", "w3", "q_proj", "gate")
    for name, tensor in load(base).items():
        module = name.removesuffix(".weight")
        if module.endswith(ends):
            key = f"base_model.model.{module}.lora_"
            factors[f"{key}A.weight"] = torch.randn(2, tensor.shape[1], generator=generator) / 4
            factors[f"{key}B.weight"] = torch.randn(tensor.shape[0], 2, generator=generator) / 4
    out.mkdir()
    save_file(factors, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [*ends]}
    (out / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_from_before_version_5_is_what_peft_loads(tmp_path: Path) -> None:
    """PEFT turns it into one of stacks; saved again, it names parameters without their modules."""
    pytest.importorskip("peft.utils.transformers_weight_conversion")
    loaded = _family("mixtral", tmp_path)
    base, plain = tmp_path / "base", tmp_path / "plain"
    loaded.from_pretrained(base).save_pretrained(plain, save_original_format=False)
    _from_before_version_5(base, tmp_path / "older")
    model: Any = PeftModel.from_pretrained(loaded.from_pretrained(base), tmp_path / "older")
    model.save_pretrained(str(tmp_path / "newer"))
    model.merge_and_unload().save_pretrained(tmp_path / "expected")
    expected = _says(loaded, tmp_path / "expected")
    for adapter in ("older", "newer"):
        for place in (base, plain):
            folder = tmp_path / f"{adapter} on {place.name}"
            folder.mkdir()
            _check(loaded, place, tmp_path / adapter, expected, folder)


@pytest.mark.parametrize("kind", ["older", "newer"])
def test_an_adapter_of_a_base_with_more_experts_is_refused(kind: str, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    loaded = _family("mixtral", tmp_path)
    if kind == "older":
        _from_before_version_5(tmp_path / "base", tmp_path / "adapter")
    else:
        wanted = {"target_modules": [], "target_parameters": _EXPERTS}
        _adapter(loaded, tmp_path / "base", tmp_path / "adapter", **wanted)
    sizes: dict[str, Any] = {"num_key_value_heads": 1, "num_local_experts": 2}
    for place, as_hubs_do in (("hubs", True), ("memory", False)):
        few = MixtralForCausalLM(MixtralConfig(**_TEXT, **sizes, num_experts_per_tok=2))
        few.save_pretrained(tmp_path / place, save_original_format=as_hubs_do)
        with pytest.raises(CheckpointError, match="Expert 'x'"):
            merge(tmp_path / place, {"x": tmp_path / "adapter"}, tmp_path / "m", work=_WORK)


def test_a_fused_base_with_a_tied_embedding_stored_twice(tmp_path: Path) -> None:
    """Adapted once, under either name, as are experts that lie elsewhere."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"num_key_value_heads": 1, "num_local_experts": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**_TEXT, **sizes, tie_word_embeddings=True))
    base = tmp_path / "base"
    model.save_pretrained(base)
    stored = load(base)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, base / WEIGHTS, {"format": "pt"})
    wanted = {"target_modules": ["v_proj", "embed_tokens"], "target_parameters": _EXPERTS[1:]}
    _adapter(MixtralForCausalLM, base, tmp_path / "adapter", **wanted)
    expected = _says(MixtralForCausalLM, tmp_path / "expected")
    _check(MixtralForCausalLM, base, tmp_path / "adapter", expected, tmp_path)


def test_what_does_not_fit_where_the_modules_are_is_what_is_told(tmp_path: Path) -> None:
    """Not that the base, as it is stored, calls them otherwise."""
    loaded = _family("gte", tmp_path)
    _adapter(loaded, tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 5}))
    with pytest.raises(CheckpointError, match="has rank 2, but adapter_config") as told:
        merge(tmp_path / "base", {"x": tmp_path / "adapter"}, tmp_path / "m", work=_WORK)
    assert "the names differ" not in str(told.value)
