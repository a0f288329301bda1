"""Finite inputs give finite results or our own error, whatever their size; never NaN at exit 0."""

from pathlib import Path
from typing import Any

import pytest
import torch

from families import State, as_many, saved
from personae.commands.compose import compose
from personae.commands.merge import merge
from personae.commands.pack import pack
from personae.commands.state_dicts import merge_state_dicts
from personae.commands.unpack import unpack
from personae.errors import CheckpointError, MethodError, PersonaeError
from personae.methods import CODECS, MERGE_METHODS, build
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work
from toys import load

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

SIZES = {
    "tiny": 1e-38,  # squares vanish in fp32
    "large": 1e18,  # squares stay, their sums do not
    "huge": 2.5e38,  # differences leave the range
}


def state(size: float, seed: int, dtype: torch.dtype) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"h.0.mlp.weight": (24, 16), "embed.weight": (10, 16), "h.0.norm.bias": (16,)}
    drawn = {name: 2 * torch.rand(shape, generator=generator) - 1 for name, shape in shapes.items()}
    return {name: (size * tensor.double()).to(dtype) for name, tensor in drawn.items()}


def family(folder: Path, size: float, dtype: torch.dtype) -> tuple[Path, dict[str, Path]]:
    for seed, name in enumerate(("base", "a", "b")):
        saved(state(size, seed, dtype), folder / name)
    return folder / "base", {name: folder / name for name in ("a", "b")}


def finite(folder: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in load(folder).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    "method", sorted(name for name, entry in MERGE_METHODS.items() if entry.needs != "adapters")
)
def test_merges(tmp_path, method, size, dtype):
    base, experts = family(tmp_path, size, dtype)
    experts, work = as_many(MERGE_METHODS[method], experts), Work(workers=1)
    try:
        merge(base, experts, tmp_path / "out", settings=MergeSettings(method=method), work=work)
    except PersonaeError as error:
        assert error.exit_code == 2
        assert "Tensor '" in str(error)
        assert not (tmp_path / "out").exists()
    else:
        assert finite(tmp_path / "out")


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_packs(tmp_path, codec, size):
    base, experts = family(tmp_path, size, torch.float32)
    settings = PackSettings(method=codec)
    try:
        pack(base, experts, tmp_path / "p", settings=settings, work=Work(workers=1))
        unpack(tmp_path / "p", "a", tmp_path / "out")
    except PersonaeError as error:
        assert error.exit_code == 2
        assert "ensor '" in str(error) or "singular value" in str(error)
    else:
        assert finite(tmp_path / "out")


def test_a_scale_that_leaves_the_range_is_refused_with_the_tensor(tmp_path):
    base, experts = family(tmp_path, 1.0, torch.float32)
    settings = MergeSettings(method="ties", parameters={"scale": 3e38})
    with pytest.raises(MethodError, match=r"Tensor '\S+' comes out as (-?inf|nan) in \d+ place"):
        merge(base, experts, tmp_path / "out", settings=settings)


def test_a_difference_that_leaves_the_range_is_refused_with_the_tensor(tmp_path):
    sizes = {"base": -2.5e38, "a": 2.5e38}
    for name, size in sizes.items():
        saved({"w.weight": torch.full((4, 4), size)}, tmp_path / name)
    text = r"Tensor 'w.weight' holds values whose difference from the base exceeds the range"
    given: dict[str, Any] = {"a": tmp_path / "a"}
    for method in ("ties", "drm", "knots"):
        with pytest.raises(CheckpointError, match=text):
            settings = MergeSettings(method=method)
            merge(tmp_path / "base", given, tmp_path / "out", settings=settings)
    for codec in ("dts", "emr", "bitdelta"):
        with pytest.raises(CheckpointError, match=text):
            pack(tmp_path / "base", given, tmp_path / "p", settings=PackSettings(method=codec))


def test_fp64_beyond_fp32_is_refused_and_its_precision_told(tmp_path):
    for name, value in (("base", 1.0), ("a", 1.5), ("b", 1e200)):
        saved({"w.weight": torch.full((4, 4), value, dtype=torch.float64)}, tmp_path / name)
    told: list[str] = []
    work = Work(note=told.append)
    merge(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "out", work=work)
    assert "weights in float64 are computed in float32: results have its precision" in told
    with pytest.raises(CheckpointError, match="exceeds the range of float32"):
        merge(tmp_path / "base", {"b": tmp_path / "b"}, tmp_path / "other")


def test_composed_weights_that_leave_the_range(tmp_path):
    base, experts = family(tmp_path, 1.0, torch.float32)
    pack(base, experts, tmp_path / "p")
    with pytest.raises(MethodError, match="comes out as"):
        compose(tmp_path / "p", {"a": 3e38}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_beyond_float32_are_refused_before_anything_is_read(tmp_path):
    base, experts = family(tmp_path, 1.0, torch.float32)
    pack(base, experts, tmp_path / "p")
    for file in tmp_path.glob("*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    beyond: dict[str, dict[str, Any]] = {
        "drm": {"weight": 1e39},
        "ties": {"scale": -1e300},
        "della": {"weight": [1.0, 1e39]},
    }
    for method, parameters in beyond.items():
        with pytest.raises(PersonaeError, match="exceeds the range of float32"):
            settings = MergeSettings(method=method, parameters=parameters)
            merge(base, experts, tmp_path / "out", settings=settings)
    with pytest.raises(MethodError, match=r"gain = 1e.300: It exceeds the range of float32"):
        build(CODECS["residual"], {"gain": 1e300})
    with pytest.raises(PersonaeError, match=r"The weight of 'b' is 1e.39.* float32's range"):
        compose(tmp_path / "p", {"a": 1.0, "b": 1e39}, tmp_path / "out")


OVERFLOWING: dict[str, tuple[float, dict[str, Any]]] = {
    "dare_ties": (1e38, {"density": 0.01, "trim": 1e-6}),
    "drm": (1.5e38, {"renormalise": False}),
    "ace_merging": (1e38, {}),
}
"""Methods whose steps, not their inputs, leave the range: magnitudes compared, matrices solved."""


@pytest.mark.parametrize("method", OVERFLOWING)
def test_steps_that_leave_the_range(tmp_path, method):
    size, parameters = OVERFLOWING[method]
    base, experts = family(tmp_path, size, torch.float32)
    settings = MergeSettings(method=method, parameters=parameters)
    with pytest.raises(MethodError, match=r"float32|cannot be decomposed"):
        merge(base, experts, tmp_path / "out", settings=settings)
    states = [state(size, seed, torch.float32) for seed in range(3)]
    with pytest.raises(MethodError, match=r"float32|cannot be decomposed"):
        merge_state_dicts(states[0], states[1:], build(MERGE_METHODS[method], parameters))


def test_a_pass_of_a_codec_that_leaves_the_range(tmp_path):
    base, experts = family(tmp_path, 1.5e38, torch.float32)
    settings = PackSettings(method="ultradelta", parameters={"tensors": "all", "density": 0.2})
    with pytest.raises(MethodError, match=r"Tensor '\S+' cannot be (decomposed|coded)"):
        pack(base, experts, tmp_path / "p", settings=settings)


def test_what_float16_cannot_hold_exits_2_with_the_tensor(tmp_path):
    """Values up to 70,000; the largest float16 is 65,504."""
    base, experts = family(tmp_path, 7e4, torch.float32)
    settings = MergeSettings(method="average", dtype="float16")
    with pytest.raises(MethodError, match=r"Tensor '\S+' holds .*float16 is 65504") as caught:
        merge(base, experts, tmp_path / "out", settings=settings)
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("work", ["merge", "pack"])
def test_a_decomposition_that_does_not_converge_names_its_tensor(
    tmp_path, monkeypatch: pytest.MonkeyPatch, work: str
):
    def fails(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("it failed to converge")  # pyright: ignore[reportPrivateImportUsage]

    base, experts = family(tmp_path, 1.0, torch.float32)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(
        MethodError, match=r"Tensor '\S+' cannot be decomposed: it failed"
    ) as caught:
        if work == "merge":
            merge(base, experts, tmp_path / "out", settings=MergeSettings(method="drm"))
        else:
            pack(base, experts, tmp_path / "out")
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()
