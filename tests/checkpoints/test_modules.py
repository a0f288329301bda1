import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from personae.checkpoints import open_checkpoint
from personae.checkpoints.modules import weight_layout
from personae.errors import CheckpointError

OUTER = {"embeddings.weight": torch.arange(8.0).reshape(4, 2)}
DENSE = {"linear.weight": torch.arange(4.0).reshape(2, 2), "linear.bias": torch.ones(2)}


def _modules(*entries: tuple[str, str]) -> str:
    return json.dumps([{"path": path, "type": f"st.models.{kind}"} for path, kind in entries])


def _sentence_model(directory: Path) -> Path:
    for name in ("1_Pooling", "2_Dense"):
        (directory / name).mkdir(parents=True)
        (directory / name / "config.json").write_text("{}")
    save_file(OUTER, directory / "model.safetensors")
    save_file(DENSE, directory / "2_Dense/model.safetensors")
    kinds = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")
    (directory / "modules.json").write_text(_modules(*kinds, ("3_Normalize", "Normalize")))
    return directory


def test_modules_are_part_of_the_model(tmp_path: Path) -> None:
    model = open_checkpoint(_sentence_model(tmp_path))
    assert list(model.specs) == [
        "2_Dense/linear.bias",
        "2_Dense/linear.weight",
        "embeddings.weight",
    ]
    assert torch.equal(model.read("2_Dense/linear.weight"), DENSE["linear.weight"])
    assert torch.equal(model.read_rows("2_Dense/linear.weight", 1, 2), DENSE["linear.weight"][1:])
    assert torch.equal(model.read("embeddings.weight"), OUTER["embeddings.weight"])
    assert dict(model.auxiliary_files) == {
        name: tmp_path / name
        for name in ("1_Pooling/config.json", "2_Dense/config.json", "modules.json")
    }
    assert weight_layout(model.auxiliary_files).folders == ("1_Pooling", "2_Dense", "3_Normalize")


def test_pickled_modules_and_no_outer_weights(tmp_path: Path) -> None:
    """As sentence-transformers wrote models of its first years."""
    for name in ("0_Transformer", "1_Dense"):
        (tmp_path / name).mkdir()
    save_file(OUTER, tmp_path / "0_Transformer/model.safetensors")
    torch.save(DENSE, tmp_path / "1_Dense/pytorch_model.bin")
    kinds = ("0_Transformer", "Transformer"), ("1_Dense", "Dense")
    (tmp_path / "modules.json").write_text(_modules(*kinds))
    model = open_checkpoint(tmp_path)
    assert "0_Transformer/embeddings.weight" in model.specs
    assert torch.equal(model.read("1_Dense/linear.bias"), DENSE["linear.bias"])


def test_routes_are_modules_too(tmp_path: Path) -> None:
    types = {f"{side}_0_StaticEmbedding": "st.StaticEmbedding" for side in ("query", "document")}
    for name in types:
        (tmp_path / name).mkdir()
        save_file(OUTER, tmp_path / name / "model.safetensors")
    (tmp_path / "modules.json").write_text(_modules(("", "Router")))
    (tmp_path / "router_config.json").write_text(json.dumps({"types": types}))
    assert set(open_checkpoint(tmp_path).specs) == {f"{name}/embeddings.weight" for name in types}


def test_what_is_named_and_not_there_is_refused(tmp_path: Path) -> None:
    save_file(OUTER, tmp_path / "model.safetensors")
    kinds = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")
    (tmp_path / "modules.json").write_text(_modules(*kinds))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert all(f"names '{name}', which is not there" in str(error.value) for name, _ in kinds[1:])


@pytest.mark.parametrize("said", ["[1]", '[{"path": "1_Dense"}]', "3", "{", '{"a": 1}'])
def test_a_damaged_list_of_modules_is_refused(tmp_path: Path, said: str) -> None:
    save_file(OUTER, tmp_path / "model.safetensors")
    (tmp_path / "modules.json").write_text(said)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("said", ["[1]", "3", '"x"', "{", '{"types": 3}', '{"types": [1]}'])
def test_damaged_routes_are_refused(tmp_path: Path, said: str) -> None:
    save_file(OUTER, tmp_path / "model.safetensors")
    (tmp_path / "router_config.json").write_text(said)
    with pytest.raises(CheckpointError, match=r"router_config\.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b"])
def test_modules_elsewhere_are_refused(tmp_path: Path, path: str) -> None:
    save_file(OUTER, tmp_path / "model.safetensors")
    (tmp_path / "modules.json").write_text(_modules((path, "Dense")))
    with pytest.raises(CheckpointError, match="outside of it"):
        open_checkpoint(tmp_path)


def test_a_pipeline_of_diffusers_is_taken_by_its_parts(tmp_path: Path) -> None:
    for name, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"_diffusers_version": "0.30.0"}')
        save_file(OUTER, tmp_path / name / f"{file}.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/text_encoder, {tmp_path}/unet"):
        open_checkpoint(tmp_path)
    unet = open_checkpoint(tmp_path / "unet")
    assert list(unet.specs) == list(OUTER) and list(unet.auxiliary_files) == ["config.json"]
    assert weight_layout(unet.auxiliary_files).stem == "diffusion_pytorch_model"
    for part in ("unet", "text_encoder"):
        (tmp_path / part / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of them has a config\.json\.$"):
        open_checkpoint(tmp_path)
