"""Difference vectors: packs relative to a merged model, which is a checkpoint inside the pack."""

import shutil
from typing import Any

import pytest
import torch
from oracle import assert_same, rebuilt

from families import State, listing, saved, small_base, tuned
from personae.checkpoints import open_checkpoint
from personae.commands.pack import add_tasks, pack
from personae.commands.unpack import unpack
from personae.commands.verify import verify
from personae.errors import Faults, MethodError, PackError, PersonaeError
from personae.methods import MERGE_METHODS, build
from personae.methods.codecs.dts import DTS
from personae.recipe import PackSettings
from personae.run.scan import fingerprint
from personae.run.work import Work
from toys import load

CODEC = DTS(rank_fraction=0.5)


def _settings(**more: Any) -> PackSettings:
    return PackSettings(parameters={"rank_fraction": 0.5}, vector="difference", **more)


def _family(dtype: torch.dtype = torch.float32) -> tuple[State, dict[str, State]]:
    base = small_base(dtype=dtype)
    return base, {name: tuned(base, seed) for seed, name in enumerate("xyz", 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relative_to_the_average(tmp_path, dtype):
    base, experts = _family(dtype)
    made = pack(base, experts, tmp_path / "p", settings=_settings())
    merged = load(tmp_path / "p/reference")
    for name, tensor in base.items():
        if not tensor.is_floating_point():
            assert torch.equal(merged[name], tensor)
            continue
        vectors = torch.stack([e[name].float() - tensor.float() for e in experts.values()])
        mean = (tensor.float() + vectors.mean(dim=0)).to(dtype)
        torch.testing.assert_close(
            merged[name], mean, rtol=1e-6 if dtype == torch.float32 else 0.01, atol=1e-7
        )
    # What is decoded is relative to the merged model as it stands on disk, rounding and all.
    for name, expert in experts.items():
        unpack(tmp_path / "p", name, tmp_path / name)
        assert_same(load(tmp_path / name), rebuilt(CODEC, merged, expert))
    record = made.manifest.reference
    assert (record.kind, record.method, record.source) == ("merged", "average", "reference")
    assert record.experts == ("x", "y", "z")
    on_disk = open_checkpoint(tmp_path / "p/reference")
    assert record.fingerprint == fingerprint(on_disk, "", Work(), Faults())


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_relative_to_ties(tmp_path, reduce):
    base, experts = _family()
    parameters = {"density": 0.4, "scope": "tensor", "reduce": reduce}
    settings = _settings(reference="ties", reference_parameters=parameters)
    pack(base, experts, tmp_path / "p", settings=settings)
    merged = load(tmp_path / "p/reference")
    vectors = torch.stack([e["layer.weight"] - base["layer.weight"] for e in experts.values()])
    method = MERGE_METHODS["ties"]
    expected = build(method, parameters).apply(vectors)
    assert torch.equal(merged["layer.weight"], base["layer.weight"] + expected)
    unpack(tmp_path / "p", "y", tmp_path / "y")
    assert_same(load(tmp_path / "y"), rebuilt(CODEC, merged, experts["y"]))


def test_passes_over_the_family_leave_nothing_in_the_reference(tmp_path):
    base, experts = _family()
    pack(base, experts, tmp_path / "p", settings=_settings(reference="ties"))
    assert [path.name for path in (tmp_path / "p/reference").iterdir()] == ["model.safetensors"]


def test_heads_stay_private_and_the_merged_model_has_none(tmp_path):
    base, experts = _family()
    heads = {
        name: {"head.weight": torch.full((2 + n, 4), float(n))} for n, name in enumerate(experts)
    }
    with_heads = {name: state | heads[name] for name, state in experts.items()}
    pack(base, with_heads, tmp_path / "p", settings=_settings())
    assert set(load(tmp_path / "p/reference")) == set(base)
    unpack(tmp_path / "p", "z", tmp_path / "z")
    assert torch.equal(load(tmp_path / "z")["head.weight"], heads["z"]["head.weight"])


def test_a_tensor_one_expert_left_alone_is_coded_against_the_merged_model(tmp_path):
    base, experts = _family()
    experts["x"] = tuned(base, 1, names=["layer.bias"])
    made = pack(base, experts, tmp_path / "p", settings=_settings())
    assert "layer.weight" in made.task("x").tensors
    unpack(tmp_path / "p", "x", tmp_path / "x")
    merged = load(tmp_path / "p/reference")
    assert_same(load(tmp_path / "x"), rebuilt(CODEC, merged, experts["x"]))


def test_the_merged_model_keeps_the_auxiliary_files_of_the_base(tmp_path):
    base, experts = _family()
    path = saved(base, tmp_path / "base", '{"model": "base"}')
    pack(str(path), experts, tmp_path / "p", settings=_settings())
    assert (tmp_path / "p/reference/config.json").read_text() == '{"model": "base"}'
    shutil.rmtree(path)  # the pack is whole by itself
    unpack(tmp_path / "p", "x", tmp_path / "x")
    assert (tmp_path / "x/config.json").read_text() == '{"model": "base"}'


def test_workers_change_no_byte(tmp_path):
    base, experts = _family()
    for workers in (1, 3):
        out = tmp_path / f"p{workers}"
        pack(base, experts, out, settings=_settings(reference="ties"), work=Work(workers=workers))
    assert listing(tmp_path / "p1") == listing(tmp_path / "p3")


def test_a_damaged_reference_is_refused(tmp_path):
    base, experts = _family()
    pack(base, experts, tmp_path / "p", settings=_settings())
    file = tmp_path / "p/reference/model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(PackError, match="is not the reference this pack was made from"):
        unpack(tmp_path / "p", "x", tmp_path / "out")
    with pytest.raises(PackError, match="is not the reference this pack was made from"):
        verify(tmp_path / "p")
    assert not (tmp_path / "out").exists()


def test_a_task_added_later_is_relative_to_the_merged_model_too(tmp_path):
    base, experts = _family()
    last = experts.pop("z")
    pack(base, experts, tmp_path / "p", settings=_settings())
    merged = load(tmp_path / "p/reference")
    made = add_tasks(tmp_path / "p", {"z": last})
    assert made.manifest.reference.experts == ("x", "y")
    unpack(tmp_path / "p", "z", tmp_path / "z")
    assert_same(load(tmp_path / "z"), rebuilt(CODEC, merged, last))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (_settings(reference="tie"), "Unknown method 'tie'. Did you mean 'ties'?"),
        (
            _settings(reference="ties", reference_parameters={"densty": 1}),
            "ties has no parameter 'densty'. Did you mean 'density'?",
        ),
    ],
)
def test_a_merge_method_that_cannot_be_is_refused_before_any_work(tmp_path, settings, message):
    base, experts = _family()
    with pytest.raises(MethodError) as caught:
        pack(base, experts, tmp_path / "p", settings=settings)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_memory_bound_too_small_for_merging_is_refused_before_any_work(tmp_path):
    base, experts = _family()
    # Packing 20 x 16 needs 18,432 bytes. Consensus on three experts holds, of each entry, base and
    # experts and the result in fp32, and as all is one block 4 bytes for each delta, 4 for the base
    # and 28 to work.
    assert 320 * (4 * 4 + 4 + 3 * 4 + 4 + 28) == 20_480
    settings = _settings(reference="consensus")
    with pytest.raises(PersonaeError, match=r"The largest tensor needs 20,480 bytes"):
        pack(base, experts, tmp_path / "p", settings=settings, work=Work(memory=18_432))
    assert list(tmp_path.iterdir()) == []
