"""Deltas decomposed and decoded on another device than the CPU; results come back to it."""

from functools import partial

import pytest
import torch

from families import small_base, tuned
from personae.checkpoints import open_checkpoint
from personae.commands.compose import compose
from personae.commands.pack import pack
from personae.commands.unpack import unpack
from personae.commands.verify import verify
from personae.errors import RecipeError
from personae.packs.reader import Pack
from personae.recipe import PackSettings
from personae.run import encode
from personae.run.composed import open_composed
from personae.run.rebuilt import Rebuilt
from personae.run.work import Work
from pretend_device import DEVICE, PretendDevice
from toys import load

BASE = small_base()
EXPERT = tuned(BASE, 1)
QKV = PackSettings(parameters={"qkv": "split", "rank_fraction": 0.5})


@pytest.fixture(params=["whole", "blocks"])
def family(request: pytest.FixtureRequest):
    """Base, expert, settings; once with a tensor that is coded in blocks."""
    if request.param == "whole":
        return BASE, EXPERT, PackSettings()
    name = "h.0.attn.in_proj_weight"
    base = BASE | {name: torch.zeros(24, 8)}
    fused = torch.randn(24, 8, generator=torch.Generator().manual_seed(3))
    return base, EXPERT | {name: fused}, QKV


@pytest.fixture
def on_pretend_device(monkeypatch: pytest.MonkeyPatch):
    """Work on that device; in one thread, since it exists in the thread that enters it alone."""

    def run(_, items, function, **__):
        with PretendDevice():
            return [(item, function(item)) for item in items]

    monkeypatch.setattr(Work, "map", run)
    monkeypatch.setattr(Work, "torch_device", property(lambda _: DEVICE))


def test_a_pack_and_what_is_rebuilt_are_the_same(family, tmp_path, request):
    base, expert, settings = family
    make = partial(pack, base, {"x": expert}, settings=settings)
    make(tmp_path / "here")
    unpack(tmp_path / "here", "x", tmp_path / "x", base=base)
    composed = dict(open_composed(tmp_path / "here", {"x": 0.5}, base=base))
    request.getfixturevalue("on_pretend_device")
    make(tmp_path / "there")
    for file in ("pack.json", "tasks/x.safetensors"):
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()
    unpack(tmp_path / "here", "x", tmp_path / "y", base=base)
    one, other = load(tmp_path / "x"), load(tmp_path / "y")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    compose(tmp_path / "here", {"x": 0.5}, tmp_path / "z", base=base)
    third = load(tmp_path / "z")
    assert third.keys() == composed.keys()
    assert all(torch.equal(third[n], composed[n]) for n in composed)
    assert verify(tmp_path / "here", against={"x": expert}, base=base)["x"].same_original is True


def test_deltas_are_decomposed_and_decoded_there(family, tmp_path, monkeypatch):
    base, expert, settings = family
    pack(base, {"x": expert}, tmp_path / "p", settings=settings)
    rebuilt = Rebuilt(Pack(tmp_path / "p"), "x", open_checkpoint(base), DEVICE)
    codec, seen = type(rebuilt._codec), []
    decode, decompose = codec.decode, codec.decompose

    def decode_seen(self, parts, shape, *given):
        seen.extend(part.device for part in parts.values())
        return decode(self, parts, shape, *given)

    def decompose_seen(self, delta, rank):
        seen.append(delta.device)
        return decompose(self, delta, rank)

    monkeypatch.setattr(codec, "decode", decode_seen)
    with PretendDevice():
        for name in rebuilt.record.tensors:
            assert rebuilt.delta(name).device == torch.device("cpu")
        assert seen and set(seen) == {DEVICE}
        monkeypatch.setattr(codec, "decode", decode)
        monkeypatch.setattr(codec, "decompose", decompose_seen)
        seen.clear()
        delta = expert["layer.weight"] - base["layer.weight"]
        codec, context = rebuilt._codec, rebuilt._codec.alone(delta)
        encode._encode_block(delta, [codec], "code", context, DEVICE, lambda decoded: True)
        assert seen == [DEVICE]


@pytest.mark.parametrize(
    ("command", "arguments"), [(unpack, ("x", "out")), (compose, ({"x": 1.0}, "out")), (verify, ())]
)
def test_an_absent_device_is_refused_before_anything_is_read(command, arguments, tmp_path):
    with pytest.raises(RecipeError, match="no device 'cuda:99' here"):
        command(tmp_path / "gone", *arguments, work=Work(device="cuda:99"))
