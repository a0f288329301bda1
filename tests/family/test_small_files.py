"""What is rebuilt loads with `from_pretrained` of the class the expert had."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from families import listing
from personae.commands.compose import compose
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.recipe import PackSettings
from personae.run.work import Work
from toys import load, perturb, toy_bert, toy_llama

EXACT = PackSettings(method="svd", parameters={"rank_fraction": 1.0})
IDS = torch.tensor([[1, 7, 3, 9]])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return toy_llama(tmp_path_factory.mktemp("llama") / "base")


def _rebuilt(base: Path, expert: Path, folder: Path, **settings) -> tuple[Path, list[str]]:
    notes: list[str] = []
    settings = EXACT.model_copy(update=settings)
    pack(base, {"x": expert}, folder / "p", settings=settings, work=Work(note=notes.append))
    return unpack(folder / "p", "x", folder / "out"), notes


def _adapter(model, folder: Path, **options) -> torch.Tensor:
    """Adapt a model at random and save the adapter; returns what it says of `IDS`."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted(IDS).logits


def _says(model_class, folder: Path) -> torch.Tensor:
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("rows", [48, 30])
def test_an_adapter_with_another_vocabulary(base, tmp_path, rows):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    saved = ["embed_tokens", "lm_head"]
    expected = _adapter(model, tmp_path / "lora", modules_to_save=saved, task_type="CAUSAL_LM")
    out, notes = _rebuilt(base, tmp_path / "lora", tmp_path)
    torch.testing.assert_close(_says(AutoModelForCausalLM, out), expected, atol=1e-5, rtol=1e-4)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
    assert f"x: config.json is the base's, changed to vocab_size {rows}" in notes


@pytest.mark.parametrize("labels", [1, 3])
def test_an_adapter_that_classifies(base, tmp_path, labels):
    from transformers import AutoModelForSequenceClassification

    kept = {"num_labels": labels, "pad_token_id": 0}
    model = AutoModelForSequenceClassification.from_pretrained(base, **kept)
    expected = _adapter(model, tmp_path / "lora", task_type="SEQ_CLS")
    out, notes = _rebuilt(base, tmp_path / "lora", tmp_path)
    found = _says(AutoModelForSequenceClassification, out)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    said = json.loads((out / "config.json").read_text())
    assert said["architectures"] == ["LlamaForSequenceClassification"]
    assert any(f"changed to {labels} labels, LlamaForSequence" in note for note in notes)


def test_composing_with_an_adapters_head(base, tmp_path):
    """The base's config.json would say two labels."""
    from transformers import AutoModelForSequenceClassification

    pack(base, {"x": perturb(base, tmp_path / "x", 1)}, tmp_path / "p", settings=EXACT)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
    expected = _adapter(model, tmp_path / "lora", task_type="SEQ_CLS")
    out = compose(tmp_path / "p", {"x": 1.0}, tmp_path / "out", head=tmp_path / "lora")
    found = _says(AutoModelForSequenceClassification, out)
    assert found.shape == expected.shape  # the backbone is the composed one


def test_a_bare_file_with_another_head(tmp_path):
    from transformers import AutoModelForSequenceClassification as Classifier

    base = toy_bert(tmp_path / "base", num_labels=2)
    expert = toy_bert(tmp_path / "expert", seed=1, num_labels=4)
    expected = _says(Classifier, expert)
    out, notes = _rebuilt(base, expert / "model.safetensors", tmp_path)
    torch.testing.assert_close(_says(Classifier, out), expected, atol=1e-4, rtol=1e-3)
    assert "x: config.json is the base's, changed to 4 labels" in notes


def test_an_experts_own_configuration_is_kept_to_the_byte(tmp_path):
    base = toy_bert(tmp_path / "base", num_labels=2)
    expert = toy_bert(tmp_path / "expert", seed=1, num_labels=4)
    config = (expert / "config.json").read_text() + "\n\n"
    (expert / "config.json").write_text(config)
    out, notes = _rebuilt(base, expert, tmp_path)
    assert (out / "config.json").read_text() == config
    assert not [note for note in notes if "config.json" in note]


def test_a_vocabulary_left_as_in_the_base(base, tmp_path):
    """The expert's own config.json would say the rows it had."""
    from transformers import AutoModelForCausalLM

    tuned = perturb(base, tmp_path / "tuned", 1)
    model = AutoModelForCausalLM.from_pretrained(tuned)
    model.resize_token_embeddings(48, mean_resizing=False)
    model.save_pretrained(tmp_path / "expert")
    skip = ("*embed_tokens*", "lm_head*")
    out, notes = _rebuilt(base, tmp_path / "expert", tmp_path, skip=skip)
    assert _says(AutoModelForCausalLM, out).shape[-1] == 40
    assert "x: config.json is its own, changed to vocab_size 40" in notes


def test_packs_without_a_configuration_stay_without(base, tmp_path):
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.json"))
    perturb(tmp_path / "base", tmp_path / "expert", 1)
    out, _ = _rebuilt(tmp_path / "base", tmp_path / "expert", tmp_path)
    assert list(listing(out)) == ["model.safetensors"] and load(out).keys() == load(base).keys()
