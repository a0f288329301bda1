"""Whole toy models: adapters against PEFT, and what comes back loads in transformers."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import rebuilt
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from families import State
from personae.commands.pack import add_tasks, pack
from personae.commands.unpack import unpack
from personae.commands.verify import verify
from personae.errors import CheckpointError
from personae.methods.codecs.dts import DTS
from personae.recipe import PackSettings
from toys import load, perturb, toy_bert, toy_gpt2

pytestmark = pytest.mark.filterwarnings("ignore")

FULL = PackSettings(parameters={"rank_fraction": 1.0})
TOKENS = torch.tensor([[1, 5, 9, 2], [3, 3, 0, 7]])


def _adapter(base: Path, directory: Path, seed: int = 7, **settings: Any) -> State:
    """Save an adapter with random factors on a BERT; return what merging it gives."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(base)
        adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, **settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(str(directory))
        return dict(adapted.merge_and_unload().state_dict())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_bert(tmp_path_factory.mktemp("bert") / "base")


@pytest.fixture(scope="module")
def adapters(bert: Path) -> dict[str, State]:
    """Two adapters beside the base, `query` and `value`; what merging each gives."""
    return {
        name: _adapter(bert, bert.parent / name, seed, target_modules=[name])
        for seed, name in enumerate(("query", "value"), 1)
    }


def test_an_adapter_packs_at_its_own_rank_and_comes_back_merged(bert, adapters, tmp_path):
    made = pack(str(bert), {"x": str(bert.parent / "query")}, tmp_path / "p", settings=FULL)
    record = made.task("x")
    assert sorted(record.tensors) == [
        f"bert.encoder.layer.{n}.attention.self.query.weight" for n in (0, 1)
    ]
    assert {t.rank for t in record.tensors.values()} == {3}
    # 2 bits an element of both factors, σ, and 8 scales: 2·16·3/4 + 3·4 + 8·4 bytes a matrix
    assert {t.bytes for t in record.tensors.values()} == {24 + 12 + 32}
    unpack(tmp_path / "p", "x", tmp_path / "out")
    found, merged, base = load(tmp_path / "out"), adapters["query"], load(bert)
    for name, tensor in found.items():
        if name not in record.tensors:
            assert torch.equal(tensor, base[name]), name
            continue
        # As near as the recorded error says, and nearer than the base.
        delta = merged[name] - base[name]
        error = (tensor - merged[name]).norm() ** 2 / delta.norm() ** 2
        assert error == pytest.approx(record.tensors[name].relative_error, rel=1e-3)
        assert 0 < error < 0.5


def test_an_adapter_packed_exactly_is_what_merging_gives(bert, adapters, tmp_path):
    exact = PackSettings(method="svd", parameters={"rank_fraction": 1.0})
    pack(str(bert), {"x": str(bert.parent / "query")}, tmp_path / "p", settings=exact)
    unpack(tmp_path / "p", "x", tmp_path / "out")
    for name, tensor in load(tmp_path / "out").items():
        torch.testing.assert_close(tensor, adapters["query"][name], rtol=1e-5, atol=1e-6)


def test_an_adapter_in_a_difference_pack_is_coded_where_the_others_changed(
    bert, adapters, tmp_path
):
    settings = FULL.model_copy(update={"vector": "difference"})
    experts = {name: str(bert.parent / name) for name in adapters}
    made = pack(str(bert), experts, tmp_path / "p", settings=settings)
    merged = load(tmp_path / "p/reference")
    assert len(made.task("query").tensors) == 4  # its own two, and the two of the other
    for name, expert in adapters.items():
        unpack(tmp_path / "p", name, tmp_path / name)
        plain = rebuilt(DTS(rank_fraction=1.0), merged, {n: expert[n] for n in merged})
        for tensor, values in load(tmp_path / name).items():
            torch.testing.assert_close(values, plain[tensor], rtol=1e-4, atol=1e-5)


def test_an_adapter_is_not_added_to_a_difference_pack(bert, adapters, tmp_path):
    settings = FULL.model_copy(update={"vector": "difference"})
    full = {n: str(perturb(bert, tmp_path / n, s)) for s, n in enumerate("ab", 1)}
    pack(str(bert), full, tmp_path / "p", settings=settings)
    with pytest.raises(CheckpointError, match="Expert 'query' is an adapter, which a pack rel"):
        add_tasks(tmp_path / "p", {"query": str(bert.parent / "query")})
    with pytest.raises(CheckpointError, match="is a PEFT adapter and needs the model"):
        verify(tmp_path / "p", against={"a": str(bert.parent / "query")})


def test_an_adapter_is_verified_against_its_base(bert, adapters, tmp_path):
    pack(str(bert), {"x": str(bert.parent / "query")}, tmp_path / "p", settings=FULL)
    found = verify(tmp_path / "p", against={"x": str(bert.parent / "query")})["x"]
    assert found.same_original
    assert found.measured_error == pytest.approx(found.recorded_error, rel=1e-3)


def test_a_classifier_comes_back_with_its_own_head_and_labels(bert, tmp_path):
    base = toy_bert(tmp_path / "base", num_labels=2)
    expert = perturb(toy_bert(tmp_path / "start", seed=0, num_labels=5), tmp_path / "expert", 3)
    config = json.loads((expert / "config.json").read_text())
    config["id2label"] = {str(n): word for n, word in enumerate("abcde")}
    config["label2id"] = {word: n for n, word in enumerate("abcde")}
    (expert / "config.json").write_text(json.dumps(config))
    made = pack(str(base), {"x": str(expert)}, tmp_path / "p")
    assert sorted(made.task("x").private) == ["classifier.bias", "classifier.weight"]
    unpack(tmp_path / "p", "x", tmp_path / "out")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert found.config.id2label == dict(enumerate("abcde"))
    # The same by hand: decode every shared tensor, take the head as it is.
    base_state, own = load(base), load(expert)
    shared = {n: t for n, t in own.items() if not n.startswith("classifier")}
    by_hand = AutoModelForSequenceClassification.from_pretrained(expert)
    heads = {n: t for n, t in own.items() if n.startswith("classifier")}
    by_hand.load_state_dict(rebuilt(DTS(), base_state, shared) | heads, strict=False)
    with torch.no_grad():
        assert torch.equal(found(TOKENS).logits, by_hand(TOKENS).logits)
        original = AutoModelForSequenceClassification.from_pretrained(expert)
        assert not torch.equal(found(TOKENS).logits, original(TOKENS).logits)


def test_a_backbone_as_base_of_task_models(bert, tmp_path):
    """The base has no head and no prefix, as when it was saved by AutoModel."""
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    model.bert.save_pretrained(tmp_path / "backbone")
    expert = perturb(bert, tmp_path / "expert", 4)
    made = pack(str(tmp_path / "backbone"), {"x": str(expert)}, tmp_path / "p")
    assert made.task("x").renaming.add == "bert."
    unpack(tmp_path / "p", "x", tmp_path / "out")
    base = {f"bert.{n}": t for n, t in load(tmp_path / "backbone").items()}
    own = load(expert)
    expected = rebuilt(DTS(), base, {n: t for n, t in own.items() if n in base})
    found = load(tmp_path / "out")
    assert found.keys() == own.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected.get(name, own[name])), name


@pytest.mark.parametrize("toy", [toy_gpt2, toy_bert])
def test_a_grown_vocabulary_round_trips(toy, tmp_path):
    base = toy(tmp_path / "base")
    kind = AutoModelForCausalLM if toy is toy_gpt2 else AutoModelForSequenceClassification
    model = kind.from_pretrained(perturb(base, tmp_path / "start", 5))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(45, mean_resizing=False)
    model.save_pretrained(tmp_path / "expert")
    own, old = load(tmp_path / "expert"), load(base)
    name = "transformer.wte.weight" if toy is toy_gpt2 else "bert.embeddings.word_embeddings.weight"
    assert own[name].shape == (45, 16)
    made = pack(str(base), {"x": str(tmp_path / "expert")}, tmp_path / "p")
    record = made.task("x")
    assert record.grown == (name,)
    assert record.private[name].shape == (5, 16)
    assert record.tensors[name].shape == (40, 16)
    unpack(tmp_path / "p", "x", tmp_path / "out")
    found = load(tmp_path / "out")
    cut = own | {name: own[name][:40]}
    expected = rebuilt(DTS(), old, cut)
    expected[name] = torch.cat([expected[name], own[name][40:]])
    assert found.keys() == own.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key
    again: Any = kind.from_pretrained(tmp_path / "out")
    assert again.get_input_embeddings().weight.shape == (45, 16)
    if toy is toy_gpt2:  # the tie is there again
        assert again.lm_head.weight.data_ptr() == again.transformer.wte.weight.data_ptr()
