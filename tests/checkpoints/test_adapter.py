"""Adapters against PEFT itself: train-like random factors, save, merge_and_unload, compare all."""

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from personae.checkpoints import Checkpoint, open_checkpoint
from personae.checkpoints.adapter import adapter_of
from personae.checkpoints.vocabulary_rows import ModelRows, WithRows
from personae.commands.merge import merge
from personae.commands.pack import pack
from personae.errors import CheckpointError
from personae.family.opened import open_family
from toys import load, toy_bert, toy_gpt2, toy_llama, toy_vit

pytestmark = pytest.mark.filterwarnings("ignore")


def save_adapter(model: Any, directory: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Randomise all that is trainable, save the adapter, return what merging it gives."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        adapted = get_peft_model(model, LoraConfig(**settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        adapted.save_pretrained(str(directory))
        # A copy read back from disk, so that the oracle depends on what was saved alone.
        return dict(adapted.merge_and_unload().state_dict())


def assert_same(opened: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    """Every tensor, whole and by rows, is the oracle's; every oracle tensor is there."""
    assert set(opened.specs) <= set(expected)
    for name, spec in opened.specs.items():
        found = opened.read(name)
        assert tuple(found.shape) == spec.shape
        torch.testing.assert_close(found.float(), expected[name].float(), rtol=1e-5, atol=1e-6)
        if spec.shape and spec.shape[0] > 2:
            assert torch.equal(opened.read_rows(name, 1, spec.shape[0] - 1), found[1:-1])
    missing = {n for n in expected if n not in opened.specs}
    for name in missing:  # only names that share the storage of one that is there
        pointers = {expected[other].data_ptr() for other in opened.specs}
        assert expected[name].data_ptr() in pointers, name


def assert_factors(opened: Checkpoint, base: Checkpoint, adapted: int) -> None:
    """`adapted` tensors have factors, and base + left @ right is what `read` gives."""
    names = [name for name in opened.specs if opened.factors(name) is not None]
    assert len(names) == adapted
    for name in names:
        left, right = opened.factors(name) or pytest.fail(name)
        assert left.dtype == right.dtype == torch.float32
        rebuilt = base.read(name).float() + left @ right
        torch.testing.assert_close(opened.read(name), rebuilt, rtol=1e-5, atol=1e-6)
        assert not opened.same_as_base(name)


BERT_CASES = {
    "plain": (dict(target_modules=["query", "value"], r=2), 4),
    "rslora": (dict(target_modules=["query"], r=4, use_rslora=True), 2),
    "bias_all": (dict(target_modules=["query"], r=2, bias="all"), 2),
    "bias_lora_only": (dict(target_modules=["dense"], r=2, bias="lora_only"), 7),
    "embedding": (dict(target_modules=["query", "word_embeddings"], r=2), 3),
    "modules_to_save": (dict(target_modules=["query"], r=2, modules_to_save=["pooler"]), 2),
    "patterns": (
        dict(
            target_modules=["query", "key", "value"],
            r=2,
            lora_alpha=3,
            rank_pattern={"key": 3, r"layer\.1\.attention\.self\.value": 1},
            alpha_pattern={"layer.0.attention.self.query": 7, "^bert.*value": 5},
        ),
        6,
    ),
}


@pytest.mark.parametrize("case", BERT_CASES)
def test_bert_is_what_peft_merges(tmp_path: Path, case: str) -> None:
    settings, adapted = BERT_CASES[case]
    model = AutoModelForSequenceClassification.from_pretrained(toy_bert(tmp_path / "base"))
    expected = save_adapter(model, tmp_path / "adapter", task_type="SEQ_CLS", **settings)
    base = open_checkpoint(tmp_path / "base")
    opened = open_checkpoint(tmp_path / "adapter", base=base)
    assert_same(opened, expected)
    assert_factors(opened, base, adapted)
    untouched = "bert.encoder.layer.0.output.dense.weight"
    assert opened.same_as_base(untouched) == (case != "bias_lora_only")
    assert (
        "config.json" in opened.auxiliary_files
        and "adapter_config.json" not in opened.auxiliary_files
    )


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["attn.c_proj"], ["wte", "c_proj"]])
def test_gpt2_conv1d_layout_square_weights_and_tied_embedding(
    tmp_path: Path, targets: list[str]
) -> None:
    """`attn.c_proj` is square (16 x 16) and stored (in, out): its shape tells nothing."""
    model = AutoModelForCausalLM.from_pretrained(toy_gpt2(tmp_path / "base"))
    expected = save_adapter(
        model, tmp_path / "adapter", task_type="CAUSAL_LM", target_modules=targets, r=2
    )
    config = tmp_path / "adapter" / "adapter_config.json"
    base = open_checkpoint(tmp_path / "base")
    for flag in (True, False):  # the flag keeps the value of the last layer wrapped, right or wrong
        config.write_text(json.dumps({**json.loads(config.read_text()), "fan_in_fan_out": flag}))
        assert_same(open_checkpoint(tmp_path / "adapter", base=base), expected)


@pytest.mark.parametrize(
    ("toy", "parameter", "patterns"),
    [
        # PEFT matches the whole name of a parameter: the first two patterns are for none.
        (
            toy_llama,
            "q_proj.weight",
            {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
        ),
        (toy_llama, "o_proj.weight", {"alpha_pattern": {"layers.1.self_attn.o_proj.weight": 5}}),
        (toy_gpt2, "attn.c_proj.weight", {}),  # square, and no layer to say how it is stored
    ],
)
def test_weights_that_are_targeted_as_parameters(
    tmp_path: Path, toy: Any, parameter: str, patterns: dict[str, Any]
) -> None:
    if "target_parameters" not in LoraConfig.__dataclass_fields__:
        pytest.skip("this version of PEFT adapts modules alone")
    model = AutoModelForCausalLM.from_pretrained(toy(tmp_path / "base"))
    wanted: dict[str, Any] = {"target_modules": [], "target_parameters": [parameter]}
    expected = save_adapter(model, tmp_path / "adapter", r=2, **wanted, **patterns)
    base = open_checkpoint(tmp_path / "base")
    opened = open_checkpoint(tmp_path / "adapter", base=base)
    assert_same(opened, expected)
    assert_factors(opened, base, 2)


def test_llama_in_bfloat16_gives_fp32_sums(tmp_path: Path) -> None:
    toy_llama(tmp_path / "base", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    expected = save_adapter(model, tmp_path / "adapter", target_modules="all-linear", r=2)
    base = open_checkpoint(tmp_path / "base")
    opened = open_checkpoint(tmp_path / "adapter", base=base)
    assert_same(opened, expected)
    assert_factors(opened, base, 14)  # 7 linear layers in each of 2 blocks
    name = "model.layers.0.mlp.up_proj.weight"
    assert opened.specs[name].dtype == torch.bfloat16 and opened.read(name).dtype == torch.float32


def test_convolution_on_a_base_in_memory(tmp_path: Path) -> None:
    """In memory, since recent transformers name ViT's modules otherwise than its files do."""
    model = AutoModelForImageClassification.from_pretrained(toy_vit(tmp_path / "base"))
    base = open_checkpoint({name: t.clone() for name, t in model.state_dict().items()})
    expected = save_adapter(model, tmp_path / "adapter", target_modules=["projection"], r=2)
    opened = open_checkpoint(tmp_path / "adapter", base=base)
    assert_same(opened, expected)
    conv = "vit.embeddings.patch_embeddings.projection.weight"
    assert not opened.same_as_base(conv) and opened.factors(conv) is None


def test_rows_come_out_the_same_bytes_however_asked(tmp_path: Path) -> None:
    """700 rows are three blocks of at most 256."""
    torch.manual_seed(0)
    base = {"layer.weight": torch.randn(700, 33)}
    write_adapter(tmp_path, {"layer": ((3, 33), (700, 3))})
    opened = open_checkpoint(tmp_path, base=open_checkpoint(base))
    whole = opened.read("layer.weight")
    for start, stop in [(0, 1), (255, 257), (300, 699), (511, 700), (5, 5)]:
        assert torch.equal(opened.read_rows("layer.weight", start, stop), whole[start:stop])


def test_hand_worked_scaling(tmp_path: Path) -> None:
    """alpha 6 / rank 2 = 3; B @ A = [[1, 2], [3, 4]] @ [[1, 0], [1, 1]] = [[3, 2], [7, 4]]."""
    write_adapter(tmp_path, {"q": ((2, 2), (2, 2))}, lora_alpha=6)
    a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    pair = {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    base = {"q.weight": torch.tensor([[1.0, 1.0], [0.0, -1.0]])}
    opened = open_checkpoint(tmp_path, base=open_checkpoint(base))
    assert torch.equal(opened.read("q.weight"), torch.tensor([[10.0, 7.0], [21.0, 11.0]]))
    assert torch.equal(opened.read_rows("q.weight", 1, 2), torch.tensor([[21.0, 11.0]]))


def test_backbone_prefix_is_taken_off_or_put_on(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy_gpt2(tmp_path / "full"))
    expected = save_adapter(model, tmp_path / "adapter", target_modules=["c_attn"], r=2)
    names = {n.removeprefix("transformer."): t for n, t in load(tmp_path / "full").items()}
    without = open_checkpoint(tmp_path / "adapter", base=open_checkpoint(names))
    assert_same(without, {n.removeprefix("transformer."): t for n, t in expected.items()})

    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = {n.replace("model.transformer.", "model."): t for n, t in load_file(file).items()}
    save_file(stored, file)
    with_prefix = open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "full"))
    assert_same(with_prefix, expected)


def test_saved_embedding_of_grown_vocabulary_replaces_the_base_one(tmp_path: Path) -> None:
    """PEFT stores base_layer weights of targeted embeddings when asked to."""
    base = {"emb.weight": torch.zeros(4, 2), "out.weight": torch.ones(2, 2)}
    write_adapter(tmp_path, {"out": ((1, 2), (2, 1))}, {"emb.weight": torch.ones(6, 2)})
    opened = open_checkpoint(tmp_path, base=open_checkpoint(base))
    assert opened.specs["emb.weight"].shape == (6, 2)
    assert torch.equal(opened.read("emb.weight"), torch.ones(6, 2))
    assert not opened.same_as_base("emb.weight") and opened.factors("emb.weight") is None


@pytest.mark.parametrize("adapted", ["embed_tokens", "lm_head"])
def test_one_of_two_layers_that_have_grown_is_refused(tmp_path: Path, adapted: str) -> None:
    """PEFT leaves out the one that is not adapted; its new rows are nowhere."""
    model = AutoModelForCausalLM.from_pretrained(toy_llama(tmp_path / "base"))
    rows, width = model.lm_head.weight.shape
    model.resize_token_embeddings(rows + 3)
    save_adapter(model, tmp_path / "adapter", target_modules=["q_proj", adapted])
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert [n for n, t in stored.items() if t.shape == (rows + 3, width)] == [
        f"base_model.model.{'model.' * (adapted != 'lm_head')}{adapted}.base_layer.weight"
    ]
    with pytest.raises(CheckpointError, match=f"{rows + 3} rows.*but {rows} of|{rows} rows.*but"):
        open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "base"))


@pytest.mark.parametrize("changed", [False, True])
def test_factors_only_if_the_stored_base_layer_is_the_bases(tmp_path: Path, changed: bool) -> None:
    base = torch.arange(4.0).reshape(2, 2)
    own = base + 1 if changed else base
    write_adapter(tmp_path, {"out": ((1, 2), (2, 1))}, {"out.base_layer.weight": own})
    opened = open_checkpoint(tmp_path, base=open_checkpoint({"out.weight": base}))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.out.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(opened.read("out.weight"), own + b @ a)  # alpha 1 / rank 1
    assert (opened.factors("out.weight") is None) == changed


def write_adapter(
    directory: Path,
    pairs: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    full: dict[str, torch.Tensor] | None = None,
    **config: Any,
) -> None:
    """An adapter by hand: random A and B of the shapes given, scaling 1."""
    generator = torch.Generator().manual_seed(3)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in (full or {}).items()}
    for module, (a, b) in pairs.items():
        for side, shape in (("A", a), ("B", b)):
            key = f"base_model.model.{module}.lora_{side}.weight"
            tensors[key] = torch.randn(shape, generator=generator)
    rank = next((a[0] for a, _ in pairs.values()), 1)
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))


BASE = {"a.q.weight": torch.zeros(4, 3), "a.k.weight": torch.zeros(4, 3), "a.q.bias": torch.ones(4)}
FITTING: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {"a.q": ((2, 3), (4, 2))}


@pytest.mark.parametrize(
    ("config", "texts"),
    [
        ({"use_dora": True}, ["'use_dora' is True", "Merge the adapter"]),
        ({"lora_bias": True}, ["'lora_bias' is True"]),
        ({"peft_type": "IA3"}, ["'peft_type' is 'IA3'", "Only LoRA adapters"]),
        ({"r": "many"}, ["'r' is 'many'"]),
        ({"init_lora_weights": "pissa"}, ["'init_lora_weights' is 'pissa'"]),
        ({"use_dora": True, "lora_bias": True}, ["2 faults", "use_dora", "lora_bias"]),
        ({"r": 5}, ["has rank 2, but adapter_config.json says 5"]),
        ({"r": 0}, ["'r' is 0: .* greater than or equal to 1"]),
        ({"r": 2**70}, ["'r' is 1180591620717411303424"]),
        ({"rank_pattern": {"q": 0}}, ["'rank_pattern.q' is 0"]),
        ({"lora_alpha": math.nan}, ["'lora_alpha' is nan: .* finite"]),
        ({"alpha_pattern": {"q": math.inf}}, ["'alpha_pattern.q' is inf: .* finite"]),
        ({"rank_pattern": {"[": 1}}, [r"the pattern '\[' is not a regular expression"]),
    ],
)
def test_configurations_refused(tmp_path: Path, config: dict[str, Any], texts: list[str]) -> None:
    write_adapter(tmp_path, FITTING, **config)
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path, base=open_checkpoint(BASE))
    for text in texts:
        assert refused.match(text)


def test_a_field_that_is_missing(tmp_path: Path) -> None:
    write_adapter(tmp_path, FITTING)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["r"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'r' is missing\. Copy it again") as refused:
        open_checkpoint(tmp_path, base=open_checkpoint(BASE))
    assert "Only LoRA" not in str(refused.value)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (torch.tensor(1.0), torch.ones(4, 2), r"A \(\) and B \(4, 2\) of 'a.q' do not fit"),
        (torch.ones(2, 3), torch.tensor(1.0), r"A \(2, 3\) and B \(\) of 'a.q' do not fit"),
        (torch.ones(0, 3), torch.ones(4, 0), "2 tensor.s. of size 0 .* ZeRO-3"),
        (torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 2), "int8 codes of a quantised weight"),
    ],
)
def test_factors_that_are_none(tmp_path: Path, a: torch.Tensor, b: torch.Tensor, text: str) -> None:
    write_adapter(tmp_path, FITTING)
    pair = {"base_model.model.a.q.lora_A.weight": a, "base_model.model.a.q.lora_B.weight": b}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=text):
        open_checkpoint(tmp_path, base=open_checkpoint(BASE))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factors_that_are_not_finite(tmp_path: Path, value: float) -> None:
    write_adapter(tmp_path / "x", FITTING)
    stored = load_file(tmp_path / "x" / "adapter_model.safetensors")
    stored["base_model.model.a.q.lora_A.weight"][0, 0] = value
    save_file(stored, tmp_path / "x" / "adapter_model.safetensors")
    for do in (pack, merge):
        with pytest.raises(CheckpointError, match=r"Expert 'x': tensor 'a.q.weight' holds"):
            do(BASE, {"x": str(tmp_path / "x")}, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_saved_modules_of_size_0(tmp_path: Path) -> None:
    write_adapter(tmp_path, FITTING, {"a.k.weight": torch.empty(0)}, modules_to_save=["k"])
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) of size 0 .*a\.k\.weight"):
        open_checkpoint(tmp_path, base=open_checkpoint(BASE))


def test_every_misfit_is_named_at_once(tmp_path: Path) -> None:
    write_adapter(
        tmp_path,
        {"a.q": ((2, 3), (5, 2)), "a.k": ((2, 3), (4, 2))},
        {
            "a.q.bias": torch.ones(9),
            "a.v.weight": torch.ones(2),
            "a.k.lora_magnitude_vector": torch.ones(4),
            "a.o.lora_A.weight": torch.ones(2, 3),
        },
    )
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path, base=open_checkpoint(BASE))
    text = str(refused.value)
    assert text.startswith("5 faults")
    assert "A (2, 3) and B (5, 2) of 'a.q' do not fit 'a.q.weight' of the base, (4, 3)" in text
    assert "a.q.bias' has shape (9,), 'a.q.bias' of the base (4,)" in text
    assert "a.v.weight' is not a LoRA tensor" in text
    assert "lora_magnitude_vector' is not part of plain LoRA" in text
    assert "'a.o' has only lora_A" in text


def test_modules_the_base_lacks_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, {"a.q": ((2, 3), (4, 2)), "lm_head": ((2, 3), (4, 2))})
    with pytest.raises(
        CheckpointError, match=r"does not have: lm_head .* version .* ties its output layer"
    ):
        open_checkpoint(tmp_path, base=open_checkpoint(BASE))


def test_ambiguous_part_of_the_base_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, {"q": ((2, 3), (4, 2))})
    base = {"encoder.q.weight": torch.zeros(4, 3), "decoder.q.weight": torch.zeros(4, 3)}
    with pytest.raises(CheckpointError, match="matches several parts of its base"):
        open_checkpoint(tmp_path, base=open_checkpoint(base))


def test_without_base_or_weights(tmp_path: Path) -> None:
    write_adapter(tmp_path, FITTING)
    with pytest.raises(CheckpointError, match="is a PEFT adapter and needs the model"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is a PEFT adapter and needs the model"):
        open_checkpoint(tmp_path / "adapter_model.safetensors")  # it stands for its directory
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"but neither adapter_model\.safetensors nor"):
        open_checkpoint(tmp_path, base=open_checkpoint(BASE))


def test_an_adapter_is_known_under_another_vocabulary(tmp_path: Path) -> None:
    write_adapter(tmp_path, FITTING)
    reference = open_checkpoint(BASE)
    opened = open_checkpoint(str(tmp_path), base=reference)
    seen = WithRows(opened, ModelRows(4, torch.tensor([0, 1, 2, 3, -1])))
    assert adapter_of(seen) is adapter_of(opened) is opened
    assert adapter_of(reference) is None


def test_pickled_adapter(tmp_path: Path) -> None:
    write_adapter(tmp_path / "new", FITTING)
    stored = load_file(tmp_path / "new" / "adapter_model.safetensors")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    (tmp_path / "old" / "adapter_model.safetensors").unlink()
    torch.save(stored, tmp_path / "old" / "adapter_model.bin")
    base = open_checkpoint(BASE)
    new, old = (open_checkpoint(tmp_path / age, base=base) for age in ("new", "old"))
    assert torch.equal(new.read("a.q.weight"), old.read("a.q.weight"))
    shared = stored | {name.replace("a.q", "a.k"): tensor for name, tensor in stored.items()}
    torch.save(shared, tmp_path / "old" / "adapter_model.bin")
    both = open_checkpoint(tmp_path / "old", base=base)
    assert torch.equal(both.read("a.k.weight"), both.read("a.q.weight"))


@pytest.mark.parametrize(
    ("trained_on", "told"),
    [("org/other", True), ("hub/Base", False), ("elsewhere/base/", False), (None, False)],
)
def test_an_adapter_of_another_base_is_named(
    tmp_path: Path, trained_on: str | None, told: bool
) -> None:
    """Only the last part of a name is compared: a copy of a hub's model lies anywhere."""
    for name in ("base", "full"):
        (tmp_path / name).mkdir()
        save_file(BASE, tmp_path / name / "model.safetensors")
    write_adapter(tmp_path / "adapter", FITTING, base_model_name_or_path=trained_on)
    with open_family(str(tmp_path / "base"), {"x": str(tmp_path / "adapter")}) as family:
        assert family.notes == family.base_notes
        said = [note for note in family.notes if f"trained on '{trained_on}'" in note]
    assert len(said) == told
    with open_family(BASE, {"x": str(tmp_path / "adapter")}) as family:
        assert family.base_notes == []  # a base in memory has no name
