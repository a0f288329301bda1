"""Many architectures at toy size, with layers dropped and repeated: each loads as it should."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from personae.commands.merge import merge_parts
from personae.errors import CheckpointError
from personae.recipe import read_merge_recipe
from test_zoo import ZOO, _class, _loaded, _noise, _says

pytestmark = pytest.mark.slow

SHARED_OR_STAGED = ("albert", "convnext", "resnet", "swin")
"""Layers that are one and the same, and stages: they are not stacked."""
MODULES = {"bart": ("encoder", "decoder"), "mbart": ("encoder", "decoder")}
MODULES |= {"t5": ("encoder", "decoder"), "mt5": ("encoder", "decoder")}


def recipe(modules: tuple[str, ...], layers: int) -> str:
    """All layers, and after them the last one again."""
    slices = f"""[
    {{sources: [{{model: base, layer_range: [0, {layers}]}}]}},
    {{sources: [{{model: base, layer_range: [{layers - 1}, {layers}]}}]}}]"""
    if not modules:
        return f"merge_method: passthrough\nslices: {slices}\n"
    named = "".join(f"  {module}:\n    slices: {slices}\n" for module in modules)
    return f"merge_method: passthrough\nmodules:\n{named}"


@pytest.mark.parametrize("model_type", ZOO)
def test_a_layer_more(model_type: str, tmp_path: Path) -> None:
    kind, modules = ZOO[model_type], MODULES.get(model_type, ())
    sizes = dict(kind.sizes)
    if "num_layers" in sizes:  # of two a first one that differs can be told
        sizes["num_layers"] = 2
    config = _class("AutoConfig").for_model(model_type, **sizes)
    model = _class(kind.base).from_config(config)
    _noise(model, 1)
    model.save_pretrained(tmp_path / "base")
    layers = 2 if not modules or "num_layers" in sizes else 1
    (tmp_path / "recipe.yaml").write_text(recipe(modules, layers))
    read = read_merge_recipe(tmp_path / "recipe.yaml")
    if model_type in SHARED_OR_STAGED:
        with pytest.raises(CheckpointError, match="layers"):
            merge_parts(read.parts, tmp_path / "out")
        return
    merge_parts(read.parts, tmp_path / "out")
    loaded = _loaded(kind.base, tmp_path / "out")
    assert _says(loaded).isfinite().all()
    before = load_file(tmp_path / "base/model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    more = {name.replace(f".{layers}.", f".{layers - 1}.", 1) for name in after.keys() - before}
    assert more and more <= before.keys() and before.keys() <= after.keys()
