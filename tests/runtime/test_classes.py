"""Tasks of several classes around a base without a head, and other dtypes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_loaded import KINDS, computed, loaded
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from personae import DTS, PackSettings, load, pack, unpack
from personae.errors import MethodError
from toys import perturb, toy_bert, toy_t5

INPUTS: dict[str, Any] = KINDS["bert"].inputs
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    config = BertConfig(**SIZES, intermediate_size=24, max_position_embeddings=12)
    base = BertModel(config)
    base.save_pretrained(tmp_path / "base")
    for name, cls in (("s", BertForSequenceClassification), ("t", BertForTokenClassification)):
        model: Any = cls(config)
        model.bert.load_state_dict(base.state_dict(), strict=False)
        model.save_pretrained(tmp_path / name / "made")
        perturb(tmp_path / name / "made", tmp_path / name / "expert", 1, 0.1)
    experts = {name: tmp_path / name / "expert" for name in "st"}
    return pack(tmp_path / "base", experts, tmp_path / "pack", DTS(rank_fraction=0.4)).directory


@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_classes_around_one_set_of_weights(packed: Path, tmp_path: Path, mode: str):
    runtime = load(packed, mode=mode)
    reference: Any = runtime.model
    assert type(reference) is BertModel
    got: dict[str, Any] = {}
    for task in "st":
        right = loaded(unpack(packed, task, tmp_path / "out" / task))
        with runtime.activate(task) as model, torch.no_grad():
            got[task] = model
            assert type(model) is type(right)
            torch.testing.assert_close(runtime(**INPUTS).logits, right(**INPUTS).logits)
    name = "encoder.layer.1.output.dense.weight"
    memory = reference.get_parameter(name).data_ptr()
    assert all(model.bert.get_parameter(name).data_ptr() == memory for model in got.values())
    with pytest.raises(MethodError, match="answer in unlike kinds"), torch.no_grad():
        runtime(**INPUTS, tasks=["s", "t", "s"])
    assert runtime.task is None


@pytest.mark.parametrize("mode", ["merged", "factored"])
@pytest.mark.parametrize("name, dtype", [("bert", torch.bfloat16), ("t5", torch.float16)])
def test_other_dtypes(name: str, dtype: torch.dtype, mode: str, tmp_path: Path):
    """T5 keeps some layers in fp32 where the rest is in fp16."""
    base = {"bert": toy_bert, "t5": toy_t5}[name](tmp_path / "base", dtype=dtype)
    experts = {"a": perturb(base, tmp_path / "a", 1, 0.1)}
    packed = pack(base, experts, tmp_path / "pack", DTS(rank_fraction=0.4)).directory
    right = loaded(unpack(packed, "a", tmp_path / "out"))
    runtime = load(packed, mode=mode)
    with runtime.activate("a") as model:
        assert {n: p.dtype for n, p in model.named_parameters()} == {
            n: p.dtype for n, p in right.named_parameters()
        }
        got, expected = computed(runtime, KINDS[name]), computed(right, KINDS[name])
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=0.03, rtol=0.03)
    wide = load(packed, mode=mode, dtype=torch.float32)
    with wide.activate("a"):
        exact = type(right).from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(
            computed(wide, KINDS[name]), computed(exact, KINDS[name]), atol=0.02, rtol=0.02
        )


def test_a_pack_of_difference_vectors(tmp_path: Path):
    base = toy_bert(tmp_path / "base")
    experts = {task: perturb(base, tmp_path / task, seed, 0.1) for seed, task in enumerate("ab")}
    settings = PackSettings(method="svd", vector="difference")
    packed = pack(base, experts, tmp_path / "pack", settings=settings).directory
    right = loaded(unpack(packed, "b", tmp_path / "out"))
    runtime = load(packed)
    with runtime.activate("b"):
        torch.testing.assert_close(computed(runtime, KINDS["bert"]), computed(right, KINDS["bert"]))
