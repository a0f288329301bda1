"""Adapters of parameters (PEFT's target_parameters) against PEFT's own merge_and_unload."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from test_adapter import assert_same, save_adapter, write_adapter
from torch import nn

from personae.checkpoints import open_checkpoint
from personae.checkpoints.adapter_files import AdapterConfig
from personae.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        "target_parameters" not in LoraConfig.__dataclass_fields__,
        reason="this version of PEFT adapts modules alone",
    ),
]
_TEXT: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 16},
}
_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def _mixtral(inner: int = 24) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**_TEXT, **sizes, intermediate_size=inner))


def _gpt_oss(inner: int = 24) -> nn.Module:
    """Its stacks are (experts, in, out), and each has a stack of biases beside it."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes: dict[str, Any] = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
    return GptOssForCausalLM(GptOssConfig(**_TEXT, **sizes, intermediate_size=inner))


_CASES: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "both": (_mixtral, 24, dict(target_parameters=_EXPERTS)),
    "by their last names": (
        _mixtral,
        24,
        dict(target_modules=["q_proj"], target_parameters=["down_proj", "gate_up_proj"]),
    ),
    "the second alone": (_mixtral, 24, dict(target_parameters=["mlp.experts.down_proj"])),
    "of one layer, with modules": (
        _mixtral,
        24,
        dict(
            target_modules=["q_proj", "v_proj"],
            target_parameters=[f"model.layers.1.mlp.{name}" for name in _EXPERTS],
        ),
    ),
    "patterns": (
        _mixtral,
        24,
        dict(
            target_parameters=_EXPERTS,
            use_rslora=True,
            lora_alpha=3,
            rank_pattern={"gate_up_proj": 3, r"layers\.1\.mlp\.experts\.down_proj": 1},
            alpha_pattern={r".*\.down_proj": 5, "experts": 9},
        ),
    ),
    "square, (out, in)": (_mixtral, 16, dict(target_parameters=_EXPERTS)),
    "first square, (out, in)": (_mixtral, 8, dict(target_parameters=_EXPERTS)),
    "(in, out)": (_gpt_oss, 24, dict(target_parameters=_EXPERTS)),
    "square, (in, out)": (_gpt_oss, 16, dict(target_parameters=_EXPERTS)),
    "stacks of biases": (
        _gpt_oss,
        24,
        dict(target_parameters=[*_EXPERTS, "gate_up_proj_bias", "down_proj_bias"]),
    ),
    "a router, and experts": (_mixtral, 24, dict(target_parameters=["gate.weight", *_EXPERTS])),
    "names of other models": (_mixtral, 24, dict(target_parameters=["up_proj", "w1", *_EXPERTS])),
}


@pytest.mark.parametrize("case", _CASES)
def test_stacks_are_what_peft_merges(tmp_path: Path, case: str) -> None:
    build, inner, settings = _CASES[case]
    settings = {"target_modules": [], "r": 2, **settings}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build(inner).save_pretrained(tmp_path / "base", save_original_format=False)
    model = build(inner).from_pretrained(tmp_path / "base")
    expected = save_adapter(model, tmp_path / "adapter", **settings)
    base = open_checkpoint(tmp_path / "base")
    opened = open_checkpoint(tmp_path / "adapter", base=base)
    assert_same(opened, expected)
    changed = [name for name in base.specs if not opened.same_as_base(name)]
    assert changed == [n for n in base.specs if not torch.equal(base.read(n), expected[n])]
    assert changed


class _Twins(nn.Module):
    """Two parameters of one shape in a module: only their order tells which pair is whose."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.a = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))


def test_parameters_that_are_alike_in_a_class_that_is_not_known(tmp_path: Path) -> None:
    model = nn.ModuleDict({"twins": _Twins()})
    base = open_checkpoint({name: t.clone() for name, t in model.state_dict().items()})
    save_adapter(model, tmp_path, target_modules=[], target_parameters=["twins.a", "twins.b"])
    with pytest.raises(CheckpointError, match=r"several parameters of 'twins' that are alike"):
        open_checkpoint(tmp_path, base=base)


def test_a_hand_worked_stack(tmp_path: Path) -> None:
    """Rank 1, alpha 2: A holds a row a matrix, B a column a matrix; matrix e grows by 2 b_e a_e."""
    shapes = {"experts": ((2, 2), (3, 2))}
    write_adapter(tmp_path, shapes, r=1, lora_alpha=2, target_parameters=["experts.w"])
    stored = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.experts.lora_{side}.weight"] for side in "AB")
    base = open_checkpoint({"experts.w": torch.ones(2, 3, 2)})
    opened = open_checkpoint(tmp_path, base=base)
    for expert in range(2):
        wanted = 1 + 2 * torch.outer(b[:, expert], a[expert])
        torch.testing.assert_close(opened.read_rows("experts.w", expert, expert + 1)[0], wanted)
    assert opened.factors("experts.w") is None


@pytest.mark.parametrize("version", [None, "0.18.1", "0.21.2", "9" * 5000])
def test_square_matrices_of_a_version_or_class_that_is_not_known(
    tmp_path: Path, version: str | None
) -> None:
    """Up to 0.19.0 PEFT took A for the rows of every stack."""
    shapes = {"experts": ((2, 3), (3, 2))}
    settings = {"target_parameters": ["experts.w"], "r": 1, "peft_version": version}
    write_adapter(tmp_path, shapes, **settings)
    base = open_checkpoint({"experts.w": torch.ones(2, 3, 3)})
    with pytest.raises(CheckpointError, match=r"matrices of 'experts\.w' are square"):
        open_checkpoint(tmp_path, base=base)


def test_what_an_older_version_stored_otherwise_is_told_by_its_shape(tmp_path: Path) -> None:
    shapes = {"experts": ((2, 3), (4, 2))}  # A is of the rows, B of the columns
    write_adapter(tmp_path, shapes, target_parameters=["experts.w"], r=1, lora_alpha=1)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.experts.lora_{side}.weight"] for side in "AB")
    base = open_checkpoint({"experts.w": torch.zeros(2, 3, 4)})
    found = open_checkpoint(tmp_path, base=base).read("experts.w")
    for expert in range(2):
        torch.testing.assert_close(found[expert], torch.outer(a[expert], b[:, expert]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"r": 2}, r"has rank 1, but adapter_config\.json says 2"),
        ({"target_parameters": ["w"]}, r"A \(2, 2\) and B \(3, 2\) of 'experts' do not fit"),
        ({"target_parameters": []}, r"whose weight the base does not have: experts"),
        ({"target_parameters": ["experts.v", "experts.w"]}, r"adapts 1 parameters of 'experts'"),
    ],
)
def test_parameters_that_do_not_fit(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    write_adapter(tmp_path, {"experts": ((2, 2), (3, 2))}, r=1, target_parameters=["experts.w"])
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    wide = change == {"target_parameters": ["w"]}
    weights = {"experts.w": torch.ones(2, 3, 5 if wide else 2), "experts.v": torch.ones(2, 3, 2)}
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(tmp_path, base=open_checkpoint(weights))


def test_parameters_of_a_module_by_how_its_name_ends() -> None:
    """Worked by hand: '' is of any module, a longer name of those that end as it does."""
    names = ["w", "b.w", "b.v", "a.b.u", "x.b.t", "b"]
    config = AdapterConfig(peft_type="LORA", r=1, lora_alpha=1, target_parameters=names)
    assert config.parameters_of("a.b") == ["b", "u", "v", "w"]
    assert config.parameters_of("ab") == ["b", "w"]
