import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from personae.checkpoints import open_checkpoint
from personae.checkpoints.folders import is_auxiliary_file
from personae.errors import CheckpointError

ONE = {"x": torch.ones(2)}


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "modeling_own.py",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    ],
)
def test_auxiliary_files(name: str) -> None:
    assert is_auxiliary_file(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "adapter_config.json",
        "trainer_state.json",
        "training_args.bin",
        "optimizer.pt",
        "README.md",
        "onnx/config.json",
        ".gitattributes",
    ],
)
def test_not_auxiliary_files(name: str) -> None:
    assert not is_auxiliary_file(name)


def test_auxiliary_files_of_a_directory_are_its_files(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "model.safetensors")
    for name in ("config.json", "README.md", "vocab.txt"):
        (tmp_path / name).write_text("{}")
    auxiliary_files = open_checkpoint(tmp_path).auxiliary_files
    assert dict(auxiliary_files) == {n: tmp_path / n for n in ("config.json", "vocab.txt")}
    with pytest.raises(KeyError):
        auxiliary_files["README.md"]


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    save_file({"new": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"old": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    opened = open_checkpoint(str(tmp_path))
    assert list(opened.specs) == ["new"] and opened.source == str(tmp_path)


def test_mistyped_local_paths_never_go_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(source: str) -> None:
        raise AssertionError(f"the hub was asked for {source}")

    monkeypatch.setattr("personae.checkpoints.hub.hub_folder", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experts" / "maths").mkdir(parents=True)
    (tmp_path / "experts" / "maths" / "model.safetensors").touch()
    (tmp_path / "experts" / "mat").mkdir()  # no model is in it
    for typo in ("./experts/math", "experts/math", str(tmp_path / "experts" / "math")):
        with pytest.raises(CheckpointError, match=r"no such file.*Did you mean 'maths'"):
            open_checkpoint(typo)
    for other in ("gpt2", "org/name/more", "org/model.safetensors", "/org/name", "../org/name"):
        with pytest.raises(CheckpointError, match="no such file"):
            open_checkpoint(other)
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(Path("org/name"))  # a Path is never a hub id
    with pytest.raises(AssertionError, match="asked for org/name@v1"):
        open_checkpoint("org/name@v1")


def test_a_directory_without_weights_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"has none of model\.safetensors.*notes\.txt"):
        open_checkpoint(tmp_path)
    save_file(ONE, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"has other\.safetensors: pass the file you mean"):
        open_checkpoint(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(ONE, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"It has a\.pt, b\.pt: pass the file you mean"):
        open_checkpoint(tmp_path)


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(CheckpointError, match="is not a known kind of checkpoint"):
        open_checkpoint(tmp_path / "model.gguf")


def test_an_adapters_file_is_its_directory(tmp_path: Path) -> None:
    base = {"layer.weight": torch.zeros(2, 2)}
    factors = {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)}
    stored = {f"base_model.model.layer.{side}.weight": t for side, t in factors.items()}
    save_file(stored, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    opened = open_checkpoint(tmp_path / "adapter_model.safetensors", base=open_checkpoint(base))
    assert torch.equal(opened.read("layer.weight"), torch.full((2, 2), 2.0))  # alpha / r = 2


def test_an_adapter_without_its_configuration_is_told_what_is_lost(tmp_path: Path) -> None:
    save_file({"w.lora_A.weight": torch.zeros(1, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json, which says how"):
        open_checkpoint(tmp_path, base=open_checkpoint({"w.weight": torch.zeros(2, 2)}))
