"""A pack in Python: what it tells of its tasks, and each expert as a lazy state dict."""

from pathlib import Path

import pytest
import torch
from oracle import assert_same, rebuilt

from families import saved, small_base, tuned
from personae import DTS, Pack, PackedTask, inspect, pack, unpack
from personae.errors import PackError
from toys import load


@pytest.fixture
def packed(tmp_path: Path) -> Pack:
    """Two experts, one with a head of its own."""
    base = small_base(dtype=torch.bfloat16)
    experts = {"a": tuned(base, 1), "b": tuned(base, 2)}
    experts["b"]["classifier.weight"] = torch.ones(3, 8, dtype=torch.bfloat16)
    saved(base, tmp_path / "base")
    paths = {name: saved(state, tmp_path / name) for name, state in experts.items()}
    return pack(tmp_path / "base", paths, tmp_path / "pack", DTS(rank_fraction=0.5))


def test_tasks_tell_what_inspect_tells(packed: Pack):
    told = inspect(packed.directory)["tasks"]
    assert list(packed.tasks) == ["a", "b"]
    for name, task in packed.tasks.items():
        assert isinstance(task, PackedTask) and task.name == name
        percent = told[name]["amr_percent"]
        assert task.amr.on_disk == percent["on_disk_native"] > 0
        assert task.amr.on_disk_fp32 == percent["on_disk_fp32"] == task.amr.on_disk / 2
        assert task.amr.paper == percent["amr_paper"] >= task.amr.paper_lean
        assert task.amr.paper_lean == percent["amr_paper_lean"] > 0
        assert task.relative_error == told[name]["relative_error"] > 0
        assert task.bytes == (packed.directory / "tasks" / f"{name}.safetensors").stat().st_size
        assert task.parameters["rank_fraction"] == 0.5
    assert packed.tasks["b"].private == ("classifier.weight",)


def test_a_lazy_expert_is_what_is_unpacked(packed: Pack, tmp_path: Path):
    for name in packed.tasks:
        packed.unpack(name, tmp_path / "out" / name)
        with packed.state_dict(name) as expert:
            assert_same(dict(expert), load(tmp_path / "out" / name))
            assert len(expert) == len(list(expert)) and "no.such" not in expert
            with pytest.raises(KeyError):
                expert["no.such"]


def test_a_lazy_expert_is_the_codecs(packed: Pack, tmp_path: Path):
    base, expert = load(tmp_path / "base"), load(tmp_path / "a")
    assert_same(dict(packed.state_dict("a")), rebuilt(DTS(rank_fraction=0.5), base, expert))


def test_looking_a_tensor_up_decodes_that_one_alone(packed: Pack, monkeypatch: pytest.MonkeyPatch):
    expert, read = packed.state_dict("a"), []
    original = type(expert._rebuilt).read
    monkeypatch.setattr(
        type(expert._rebuilt), "read", lambda self, name: read.append(name) or original(self, name)
    )
    assert read == [] and expert["layer.bias"].dtype == torch.bfloat16
    assert read == ["layer.bias"]


def test_a_lazy_expert_loads_into_a_model_with_tied_weights(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=8))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "a")
    packed = pack(tmp_path / "base", {"a": tmp_path / "a"}, tmp_path / "p", DTS(rank_fraction=1.0))
    on_disk = GPT2LMHeadModel.from_pretrained(unpack(packed.directory, "a", tmp_path / "out"))
    with packed.state_dict("a") as expert:
        missing, unexpected = model.load_state_dict(dict(expert), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied to the embedding
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, on_disk.eval()(tokens).logits)


def test_what_is_looked_up_is_the_callers_own(packed: Pack, tmp_path: Path):
    base = {name: tensor.clone() for name, tensor in load(tmp_path / "base").items()}
    expert = packed.state_dict("b", base=base)
    for name in ("position_ids", "classifier.weight", "layer.weight"):
        before = expert[name].clone()
        expert[name].zero_()
        assert torch.equal(expert[name], before)
    assert torch.equal(base["position_ids"], load(tmp_path / "base")["position_ids"])


def test_what_others_removed_is_said(packed: Pack):
    Pack(packed.directory).remove("a")
    with pytest.raises(PackError, match="has no task 'a'"):
        packed.state_dict("a")


def test_adding_and_removing_show_at_once(packed: Pack, tmp_path: Path):
    new = saved(tuned(small_base(dtype=torch.bfloat16), 3), tmp_path / "c")
    packed.add({"c": new}, characteristics={"c": "what c is about"})
    assert list(packed.tasks) == ["a", "b", "c"]
    assert packed.tasks["c"].characteristics == ("what c is about",)
    packed.remove("a")
    assert list(packed.tasks) == list(Pack(packed.directory).tasks) == ["b", "c"]
    with pytest.raises(PackError, match="has no task 'a'"):
        packed.remove("a")
    with pytest.raises(PackError, match="has no task 'a'"):
        packed.state_dict("a")


def test_another_reference_is_refused(packed: Pack, tmp_path: Path):
    other = saved(small_base(seed=9, dtype=torch.bfloat16), tmp_path / "other")
    with pytest.raises(PackError, match="is not the reference this pack was made from"):
        packed.state_dict("a", base=other)
    assert dict(packed.state_dict("a", base=tmp_path / "base"))
