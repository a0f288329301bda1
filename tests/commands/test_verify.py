"""Verification against originals: errors measured anew, and every damaged file told."""

import pytest
import torch

from families import saved, small_base, tuned
from personae.commands.pack import pack
from personae.commands.verify import verify
from personae.errors import PackError, WorkError
from personae.methods.codecs.dts import DTS
from personae.recipe import PackSettings
from personae.run.work import Work
from toys import load

BASE = small_base()
EXPERTS = {name: tuned(BASE, seed) for seed, name in enumerate("xy", 1)}
HEAD = {"head": torch.tensor([1.0, 2.0])}


@pytest.fixture
def packed(tmp_path):
    pack(BASE, {n: e | HEAD for n, e in EXPERTS.items()}, tmp_path / "p")
    return tmp_path / "p"


def test_without_originals_the_recorded_error_is_told(packed):
    found = verify(packed)
    assert list(found) == ["x", "y"]
    assert 0 < found["x"].recorded_error < 1
    assert (found["x"].measured_error, found["x"].same_original) == (None, None)


def test_the_error_is_the_squared_distance_over_the_squared_delta(packed):
    found = verify(packed, against={"x": EXPERTS["x"] | HEAD}, base=BASE)["x"]
    lost = energy = 0.0
    for name, tensor in BASE.items():
        if tensor.is_floating_point():
            delta = EXPERTS["x"][name] - tensor
            decoded = DTS().decode(DTS().encode(delta), tuple(delta.shape))
            lost += float(((delta - decoded).double() ** 2).sum())
            energy += float((delta.double() ** 2).sum())
    assert found.measured_error == pytest.approx(lost / energy, rel=1e-5)
    assert found.recorded_error == pytest.approx(lost / energy, rel=1e-5)
    assert found.same_original is True


def test_another_original_is_told_apart(packed):
    with pytest.raises(WorkError, match=r"Task 'x': dict is not the model .* error is (1|2)\."):
        verify(packed, against={"x": EXPERTS["y"] | HEAD}, base=BASE)  # nothing in common


def test_the_original_is_known_again_though_tensors_were_skipped(tmp_path):
    settings = PackSettings(skip=("embed.*", "extra"))
    expert = EXPERTS["x"] | {"extra": torch.ones(3)}
    pack(BASE, {"x": expert}, tmp_path / "p", settings=settings)
    assert verify(tmp_path / "p", against={"x": expert}, base=BASE)["x"].same_original is True
    other = {name: tensor.clone() for name, tensor in expert.items()}
    other["layer.bias"][0] += 1
    with pytest.raises(WorkError, match="dict is not the model that was packed"):
        verify(tmp_path / "p", against={"x": other}, base=BASE)


def test_all_damaged_and_unknown_tasks_are_told_at_once(packed):
    for name in "xy":
        file = packed / f"tasks/{name}.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 4
        file.write_bytes(raw)
    with pytest.raises(PackError, match="3 faults") as caught:
        verify(packed, against={"z": EXPERTS["x"]})
    text = str(caught.value)
    assert "Task 'x'" in text and "Task 'y'" in text and "has no task 'z'. Known: x, y." in text


def test_a_wrong_base_is_refused(packed):
    with pytest.raises(PackError, match="dict is not the reference this pack was made from"):
        verify(packed, base=small_base(seed=4))


def test_an_error_that_is_not_the_recorded_one_fails(packed, monkeypatch):
    decode = DTS.decode
    monkeypatch.setattr(DTS, "decode", lambda *a: 2 * decode(*a))
    with pytest.raises(WorkError, match=r"Task 'x': rebuilt with relative error .*, recorded is"):
        verify(packed, against={"x": EXPERTS["x"] | HEAD}, base=BASE)


def test_grown_vocabularies_and_buffers_verify(tmp_path):
    expert = EXPERTS["x"] | {"position_ids": torch.zeros(1, 6, dtype=torch.int64)}
    expert["embed.weight"] = torch.cat([expert["embed.weight"], torch.ones(2, 16)])
    path = str(saved(expert, tmp_path / "x"))
    pack(str(saved(BASE, tmp_path / "base")), {"x": path}, tmp_path / "p")
    found = verify(tmp_path / "p", against={"x": path}, base=str(tmp_path / "base"))["x"]
    assert found.same_original is True
    assert found.measured_error == pytest.approx(found.recorded_error, rel=1e-6)


def test_workers_measure_the_same(packed):
    one, three = (
        verify(packed, against={"x": EXPERTS["x"] | HEAD}, base=BASE, work=Work(workers=n))
        for n in (1, 3)
    )
    assert one["x"].recorded_error == three["x"].recorded_error
    assert one["x"].measured_error == pytest.approx(three["x"].measured_error, rel=1e-12)


def test_difference_packs_verify_against_the_reference_they_hold(tmp_path):
    settings = PackSettings(vector="difference")
    pack(BASE, EXPERTS, tmp_path / "p", settings=settings)
    found = verify(tmp_path / "p", against={"x": EXPERTS["x"]})["x"]
    assert found.same_original is True
    assert set(load(tmp_path / "p/reference")) == set(BASE)
