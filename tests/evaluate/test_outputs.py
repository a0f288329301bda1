"""What an adapter loses of a model's outputs, beside PEFT and transformers on the same inputs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from typer.testing import CliRunner

from personae import DTS, OutputChange, export, output_change, pack
from personae.cli import app
from personae.errors import CheckpointError, RecipeError
from personae.evaluate import outputs
from toys import load, perturb, toy_bert, toy_clip_vision, toy_gpt2, toy_t5, toy_vit

INPUTS = [{"input_ids": torch.tensor([row])} for row in ([3, 5, 7, 9], [8, 1, 2, 3], [1, 1, 30, 4])]


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(**one).logits for one in INPUTS]).double()


def _matrices(base: Path) -> list[str]:
    """Names of what an adapter carries at full rank, and of the head."""
    state = load(base)
    inner = [n for n, t in state.items() if t.ndim == 2 and "layer." in n]
    return [*inner, "classifier.weight", "classifier.bias"]


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = toy_bert(tmp_path / "base")
    perturb(base, tmp_path / "expert", 1, 0.2, names=_matrices(base))
    monkeypatch.setattr(outputs, "_inputs", lambda _: iter(INPUTS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("rank", [1, 16])
def test_it_is_what_peft_computes(family: Path, rank: int):
    export("expert", "adapter", base="base", rank=rank)
    found = output_change("adapter", "expert", "base")
    of = transformers.BertForSequenceClassification
    right = _logits(of.from_pretrained(family / "expert"))
    adapted = _logits(PeftModel.from_pretrained(of.from_pretrained(family / "base"), "adapter"))
    before = _logits(of.from_pretrained(family / "base"))
    lost = (right - adapted).square().sum() / (right - before).square().sum()
    agree = (right.argmax(dim=1) == adapted.argmax(dim=1)).double().mean()
    assert found.inputs == "3 random inputs" and found.lost is not None
    assert found.lost == pytest.approx(float(lost), rel=1e-3, abs=1e-9)
    assert found.agree == pytest.approx(float(agree))
    assert (found.lost < 1e-6) == (rank == 16)  # nothing is lost at full rank
    assert found.agree == 1 or rank == 1


def test_the_base_has_lost_everything_and_the_original_nothing(family: Path):
    assert output_change("base", "expert", "base").lost == pytest.approx(1)
    assert output_change("expert", "expert", "base") == OutputChange("3 random inputs", 0.0, 1.0)
    assert output_change("expert", "base", "base").lost is None  # nothing was changed


def test_a_head_that_an_adapter_lacks_is_the_originals(family: Path, tmp_path: Path):
    """So that outputs of a body are compared under one head."""
    two = toy_bert(tmp_path / "two", num_labels=2)
    perturb(two, tmp_path / "other", 1, 0.2)
    packed = pack(tmp_path / "base", {"a": tmp_path / "other"}, tmp_path / "pack", DTS()).directory
    export(packed, "adapter", task="a")
    found = output_change("adapter", "other", "base")
    assert found.lost is not None and 0 < found.lost < 1


MAKERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "gpt2": (toy_gpt2, "h."),
    "t5": (toy_t5, "Attention."),
    "vit": (toy_vit, "attention"),
    "clip": (toy_clip_vision, "self_attn"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_inputs_are_drawn_for_models_of_any_kind(name: str, tmp_path: Path):
    make, part = MAKERS[name]
    base = make(tmp_path / "base")
    inner = [n for n, t in load(base).items() if t.ndim == 2 and part in n and "_bias" not in n]
    expert = perturb(base, tmp_path / "expert", 1, 0.3, names=inner)
    losses: list[float] = []
    for rank in (1, 8, 16):
        adapter = export(expert, tmp_path / str(rank), base=base, rank=rank, dtype="float32")
        found = output_change(adapter, expert, base)
        assert found.inputs == "16 random inputs" and found.lost is not None
        losses.append(found.lost)
    assert losses[0] > losses[1] > losses[2] and losses[2] < 1e-6
    assert output_change(adapter, expert, base) == found  # the same are drawn again


def test_the_command_prints_it(family: Path):
    run = CliRunner().invoke
    words = ["export", "expert", "--base", "base", "--rank", "2", "--out"]
    result = run(app, [*words, "one", "--against", "expert"])
    assert result.exit_code == 0, result.output
    found = output_change("one", "expert", "base")
    assert f"outputs on 3 random inputs: {100 * (found.lost or 0):.3g} % of what" in result.output
    told = json.loads(run(app, [*words, "two", "--against", "expert", "--json"]).stdout)
    assert told["outputs"] == {"inputs": found.inputs, "lost": found.lost, "agree": found.agree}
    assert "outputs" not in json.loads(run(app, [*words, "three", "--json"]).stdout)


def _lengths(text: str, **_: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[len(word) for word in text.split()]])}


def test_texts_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = toy_bert(tmp_path / "base")
    perturb(base, tmp_path / "expert", 1, 0.2, names=_matrices(base))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outputs, "_tokenizer", lambda _: _lengths)
    Path("texts.txt").write_text("a few words\n\nand some more\n")
    found = output_change("base", "expert", "base", texts="texts.txt")
    assert found.inputs == "2 texts"
    assert found.lost == pytest.approx(1)


def test_what_cannot_be_compared_is_refused_before_anything_is_written(family: Path):
    run = CliRunner().invoke
    words = ["export", "expert", "--base", "base", "--out", "out"]
    Path("empty.txt").write_text("\n \n")
    Path("texts.txt").write_text("a\n")
    (family / "nameless").mkdir()
    for file in (family / "expert").glob("*.safetensors"):
        (family / "nameless" / file.name).write_bytes(file.read_bytes())
    cases = {
        ("--against", "nowhere"): "nowhere",
        ("--against", "nameless"): "names no class",
        ("--against", "expert", "--texts", "empty.txt"): "empty.txt has no text",
        ("--against", "expert", "--texts", "none.txt"): "cannot be read as text",
        ("--against", "expert", "--texts", "texts.txt"): "has no tokenizer",
        ("--texts", "empty.txt"): "without --against: leave out --texts",
    }
    for options, text in cases.items():
        result = run(app, [*words, *options])
        assert result.exit_code == 2, result.output
        assert text in " ".join(result.stderr.split()), result.output
        assert not Path("out").exists()
    with pytest.raises(RecipeError, match="no text"):
        output_change("base", "expert", "base", texts="empty.txt")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_hidden_layers": 5}, "there is no 'bert.encoder.layer.2"),
        ({"num_hidden_layers": 0}, "it has no 'bert.encoder.layer.0"),
        ({"num_hidden_layers": 10**9}, "cannot be compared"),
        ({"hidden_size": 10**9}, "has shape"),
        ({"architectures": ["TextStreamer"]}, "cannot be compared"),
    ],
)
def test_a_configuration_of_another_model(family: Path, change: dict[str, Any], text: str):
    """Layers that the original lacks would be drawn at random, in it and in its copies."""
    config = json.loads(Path("expert/config.json").read_text())
    export("expert", "adapter", base="base", rank=1)
    Path("expert/config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=text):
        output_change("adapter", "expert", "base")


def test_without_a_tokenizer(tmp_path: Path):
    base = toy_bert(tmp_path / "base")
    expert = perturb(base, tmp_path / "expert", 1, 0.2)
    (tmp_path / "texts.txt").write_text("a\n")
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can read"):
        output_change(base, expert, base, texts=tmp_path / "texts.txt")
