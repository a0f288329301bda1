"""Bases that store an embedding and its copies: merged, packed and adapted as the one it is.

Expected logits come from models of transformers whose one embedding is set by hand.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from personae.commands.compose import compose
from personae.commands.merge import merge
from personae.commands.merge_plan import plan_merge
from personae.commands.pack import add_tasks, pack
from personae.commands.unpack import unpack
from personae.commands.verify import verify
from personae.errors import CheckpointError
from personae.recipe import MergeSettings, PackSettings
from personae.run.work import Work
from toys import WEIGHTS, load, perturb, toy_llama, toy_t5

pytestmark = pytest.mark.filterwarnings("ignore")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
T5_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
EXACT = PackSettings(method="svd", parameters={"rank_fraction": 1.0})
IDS = torch.arange(8)[None]


def with_copies(directory: Path, kept: str, *copies: str) -> Path:
    """Store a tensor under further names too, as older versions of transformers did."""
    file = directory / WEIGHTS
    tensors = load_file(file)
    tensors |= {name: tensors[kept].clone() for name in copies}
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def logits(directory: Path, kind: Any = AutoModelForCausalLM) -> Tensor:
    model, told = kind.from_pretrained(directory, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    more = {"decoder_input_ids": IDS} if kind is AutoModelForSeq2SeqLM else {}
    return model.eval()(IDS, **more).logits


def logits_of(template: Path, tensors: dict[str, Tensor]) -> Tensor:
    """Of the tied model of these tensors, in which the embedding stands once."""
    model = AutoModelForCausalLM.from_pretrained(template)
    model.load_state_dict({n: t.float() for n, t in tensors.items() if n != HEAD}, strict=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model.eval()(IDS).logits


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A tied base with the copy, an expert with it and one without."""
    toy_llama(tmp_path / "plain", tied=True)
    perturb(tmp_path / "plain", tmp_path / "lean", seed=1)
    with_copies(perturb(tmp_path / "plain", tmp_path / "full", seed=2), EMBED, HEAD)
    toy_llama(tmp_path / "base", tied=True)
    with_copies(tmp_path / "base", EMBED, HEAD)
    return tmp_path


def experts(family: Path) -> dict[str, Path]:
    return {name: family / name for name in ("lean", "full")}


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "task_arithmetic", "parameters": {"scale": 0.5}},
        {"method": "ties", "parameters": {"density": 0.5}},
        {"method": "dare_ties", "parameters": {"density": 0.5, "seed": 3}},
        {"method": "task_arithmetic", "parameters": {"scale": 0.5}, "skip": (HEAD,)},
    ],
)
def test_merged_once_and_written_under_every_name(family, settings):
    """As the same family without copies is merged, where there is one embedding anyway."""
    with_copies(family / "lean", EMBED)
    base, given = family / "base", experts(family)
    toy_llama(family / "bare", tied=True)
    perturb(family / "bare", family / "bare-full", seed=2)
    chosen = MergeSettings(**settings)
    merge(base, given, family / "out", settings=chosen)
    alone = {"lean": family / "lean", "full": family / "bare-full"}
    without = chosen.model_copy(update={"skip": ()})
    merge(family / "bare", alone, family / "expected", settings=without)
    out, expected = load(family / "out"), load(family / "expected")
    assert out.keys() == load(base).keys() and HEAD in out
    assert torch.equal(out[HEAD], out[EMBED]) and not torch.equal(out[EMBED], load(base)[EMBED])
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())
    assert torch.equal(logits(family / "out"), logits_of(family / "plain", expected))


def test_task_arithmetic_is_the_sum_worked_by_hand(family):
    settings = MergeSettings(method="task_arithmetic", parameters={"scale": 1.0})
    merge(family / "base", {"full": family / "full"}, family / "out", settings=settings)
    torch.testing.assert_close(logits(family / "out"), logits(family / "full"), rtol=0, atol=1e-5)


def test_what_was_found_is_told_and_bytes_are_counted(family):
    notes: list[str] = []
    plan = plan_merge(family / "base", experts(family), MergeSettings())
    merge(family / "base", experts(family), family / "out", work=Work(note=notes.append))
    told = f"stored twice with equal values, and treated as one tensor: {HEAD} as {EMBED}"
    assert told in notes and told in plan.notes
    assert plan.bytes_out == sum(t.nbytes for t in load(family / "out").values())
    skip = MergeSettings(skip=(HEAD,))
    (note,) = [
        n for n in plan_merge(family / "base", experts(family), skip).notes if "is treated" in n
    ]
    assert note.startswith(f"'{HEAD}' is treated as '{EMBED}' is")


def test_without_a_base_the_first_models_copies_are_written(family):
    settings = MergeSettings(vector="difference")
    merge(
        None, {"full": family / "full", "lean": family / "lean"}, family / "out", settings=settings
    )
    out, full, lean = load(family / "out"), load(family / "full"), load(family / "lean")
    assert torch.equal(out[HEAD], out[EMBED])
    torch.testing.assert_close(out[EMBED], (full[EMBED] + lean[EMBED]) / 2)


def test_shards_hold_copies_too(family):
    merge(family / "base", experts(family), family / "out", shard_bytes=3000)
    out = load(family / "out")
    assert torch.equal(out[HEAD], out[EMBED])
    index = json.loads((family / "out" / "model.safetensors.index.json").read_text())
    assert {HEAD, EMBED} <= index["weight_map"].keys()
    logits(family / "out")


@pytest.mark.parametrize("vector", ["task", "difference"])
def test_packs_code_it_once_and_rebuild_every_name(family, vector):
    settings = EXACT.model_copy(update={"vector": vector})
    made = pack(family / "base", experts(family), family / "p", settings=settings)
    base = None if vector == "difference" else family / "base"
    for task in ("lean", "full"):
        record = made.task(task)
        assert EMBED in record.tensors and HEAD not in record.tensors and record.private == {}
        assert record.absent == (HEAD,) and record.tied == {HEAD: EMBED}
        unpack(family / "p", task, family / f"out-{task}", base=base)
        out = load(family / f"out-{task}")
        assert out.keys() == load(family / "base").keys()
        assert torch.equal(out[HEAD], out[EMBED])
        off = logits(family / f"out-{task}") - logits(family / task)
        assert off.abs().max() < 0.05 * logits(family / task).abs().max()
    checked = verify(family / "p", against=experts(family), base=base)
    assert all(one.same_original for one in checked.values())


def test_packs_in_which_copies_have_codes_of_their_own_stay_readable(family, monkeypatch):
    """Earlier versions coded each stored tensor: its pack is what is made without seeing copies."""
    monkeypatch.setattr("personae.family.opened.each_once", lambda model: model)
    made = pack(family / "base", {"full": family / "full"}, family / "p", settings=EXACT)
    assert {HEAD, EMBED} <= made.task("full").tensors.keys()
    monkeypatch.undo()
    (checked,) = verify(
        family / "p", against={"full": family / "full"}, base=family / "base"
    ).values()
    assert checked.same_original
    unpack(family / "p", "full", family / "back", base=family / "base")
    torch.testing.assert_close(load(family / "back"), load(family / "full"), rtol=0, atol=1e-4)
    compose(family / "p", {"full": 1.0}, family / "out", base=family / "base")
    torch.testing.assert_close(load(family / "out"), load(family / "full"), rtol=0, atol=1e-4)


def test_experts_are_added_to_a_pack_with_copies(family):
    pack(family / "base", {"lean": family / "lean"}, family / "p", settings=EXACT)
    add_tasks(family / "p", {"full": family / "full"}, base=family / "base")
    unpack(family / "p", "full", family / "back", base=family / "base")
    torch.testing.assert_close(load(family / "back"), load(family / "full"), rtol=0, atol=1e-4)


def test_raw_factors_of_a_copy_adapt_its_tensor(family):
    """A file without a configuration, whose alpha scales: alpha / rank * B @ A."""
    a, b = torch.randn(2, 16), torch.randn(40, 2)
    factors = {"lm_head.lora_down.weight": a, "lm_head.lora_up.weight": b}
    save_file(factors | {"lm_head.alpha": torch.tensor(6.0)}, family / "raw.safetensors")
    settings = MergeSettings(method="task_arithmetic", parameters={"scale": 1.0})
    merge(family / "base", {"x": family / "raw.safetensors"}, family / "out", settings=settings)
    out = load(family / "out")
    torch.testing.assert_close(out[EMBED], load(family / "base")[EMBED] + 3 * b @ a)
    assert torch.equal(out[HEAD], out[EMBED])


def test_composed_models_have_the_sum_under_every_name(family):
    """Rank 1 of 1: both deltas in full, so that half of each is the mean of the experts."""
    settings = EXACT
    pack(family / "base", experts(family), family / "p", settings=settings)
    weights = {"lean": 0.5, "full": 0.5}
    for head in (None, "lean", str(family / "lean")):
        out = family / f"out-{Path(head or 'none').name}-{len(head or '')}"
        compose(family / "p", weights, out, base=family / "base", head=head)
        found = load(out)
        assert torch.equal(found[HEAD], found[EMBED])
        assert not torch.equal(found[EMBED], load(family / "base")[EMBED])
        logits(out)


def test_t5_has_four_names_for_one(tmp_path):
    toy_t5(tmp_path / "base")
    perturb(tmp_path / "base", tmp_path / "a", seed=1)
    with_copies(perturb(tmp_path / "base", tmp_path / "b", seed=2), "shared.weight", *T5_COPIES[:2])
    with_copies(tmp_path / "base", "shared.weight", *T5_COPIES)
    given = {name: tmp_path / name for name in "ab"}
    settings = MergeSettings(method="dare_ties", parameters={"density": 0.5, "seed": 1})
    merge(tmp_path / "base", given, tmp_path / "out", settings=settings)
    out = load(tmp_path / "out")
    assert out.keys() == load(tmp_path / "base").keys()
    assert all(torch.equal(out[name], out["shared.weight"]) for name in T5_COPIES)
    logits(tmp_path / "out", AutoModelForSeq2SeqLM)
    made = pack(tmp_path / "base", given, tmp_path / "p", settings=EXACT)
    assert set(made.task("b").absent) == set(T5_COPIES)
    unpack(tmp_path / "p", "b", tmp_path / "back", base=tmp_path / "base")
    ours, theirs = (logits(tmp_path / name, AutoModelForSeq2SeqLM) for name in ("back", "b"))
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


def apart(family: Path, config: dict[str, Any]) -> Path:
    """An expert whose output layer was trained apart from its embedding."""
    expert = perturb(family / "full", family / "apart", seed=5, names=(HEAD,), scale=0.5)
    said = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps(said | config))
    return expert


@pytest.mark.parametrize("base", ["base", "plain"])
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": False}])
def test_a_head_trained_apart_is_not_merged_and_packs_whole(family, base, config):
    given = {"lean": family / "lean", "apart": apart(family, config)}
    with pytest.raises(CheckpointError) as refused:
        merge(family / base, given, family / "out")
    assert f"Expert 'apart': '{HEAD}' was trained separately from '{EMBED}'" in str(refused.value)
    assert "skip" not in str(refused.value) and not (family / "out").exists()
    settings = EXACT
    made = pack(family / base, given, family / "p", settings=settings)
    assert set(made.task("apart").private) == {HEAD}
    unpack(family / "p", "apart", family / "back", base=family / base)
    assert torch.equal(load(family / "back")[HEAD], load(family / "apart")[HEAD])
    ours, theirs = logits(family / "back"), logits(family / "apart")
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


def test_an_untied_base_is_not_given_half_of_a_tied_expert(family):
    """Left as in the base, the output layer would not go with the embedding: no such advice."""
    base = apart(family, {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError) as refused:
        merge(base, {"lean": family / "lean"}, family / "out")
    assert "save it untied (tie_word_embeddings: false, both stored)" in str(refused.value)
    assert "skip" not in str(refused.value)


def adapter(base: Path, out: Path, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """A PEFT adapter with random factors; the model in which it was trained, and what it stores."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base)
        config = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        adapted: Any = get_peft_model(model, config)
        adapted.save_pretrained(str(out))
    return adapted.eval(), load_file(out / "adapter_model.safetensors")


def merged_alone(family: Path, base: str) -> Path:
    out = family / f"out-{base}"
    settings = MergeSettings(method="task_arithmetic", parameters={"scale": 1.0})
    merge(family / base, {"x": family / "adapter"}, out, settings=settings)
    return out


@pytest.mark.parametrize("base", ["base", "plain"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_factors_on_one_name_adapt_both(family, base, target):
    """As PEFT's merge does, whose weight is one parameter."""
    model, stored = adapter(family / base, family / "adapter", target_modules=[target, "q_proj"])
    if target == "lm_head":
        a, b = (stored[f"base_model.model.lm_head.lora_{side}.weight"] for side in "AB")
    else:
        key = "base_model.model.model.embed_tokens.lora_embedding_"
        b, a = stored[f"{key}A"].T, stored[f"{key}B"].T
    config = model.peft_config["default"]
    embedding = load(family / "base")[EMBED] + config.lora_alpha / config.r * b @ a
    out = load(merged_alone(family, base))
    torch.testing.assert_close(out[EMBED], embedding)
    assert (HEAD in out) == (base == "base")
    assert HEAD not in out or torch.equal(out[HEAD], out[EMBED])
    expected = {n: t for n, t in model.merge_and_unload().state_dict().items()}
    ours, theirs = logits(family / f"out-{base}"), logits_of(family / "plain", expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["base", "plain"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_ensure_weight_tying_is_taken_once(family, base, settings):
    """Both modules are stored, with one weight: the model's own logits, adapter in place."""
    model, stored = adapter(family / base, family / "adapter", ensure_weight_tying=True, **settings)
    assert any("lm_head" in key for key in stored) and any("embed_tokens" in key for key in stored)
    for out in (merged_alone(family, base), unpacked(family, base)):
        close = 1e-4 if "out" in out.name else 0.05 * model(IDS).logits.abs().max().item()
        torch.testing.assert_close(logits(out), model(IDS).logits, rtol=1e-4, atol=close)


def unpacked(family: Path, base: str) -> Path:
    settings = EXACT
    pack(family / base, {"x": family / "adapter"}, family / "p", settings=settings)
    return unpack(family / "p", "x", family / "back", base=family / base)


@pytest.mark.parametrize("base", ["base", "plain"])
def test_a_saved_head_of_its_own_is_kept_and_the_config_untied(family, base):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapter(family / base, family / "adapter", **settings)
    file = family / "adapter" / "adapter_model.safetensors"
    key = "base_model.model.lm_head.weight"
    save_file(load_file(file) | {key: torch.randn(40, 16)}, file)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' was trained separately"):
        merged_alone(family, base)
    out = unpacked(family, base)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.lm_head.weight, load_file(file)[key])
    assert torch.equal(model.model.embed_tokens.weight, load(family / "base")[EMBED])


@pytest.mark.parametrize("base", ["base", "plain"])
@pytest.mark.parametrize(
    "settings, told",
    [
        ({"target_modules": ["lm_head", "embed_tokens"]}, "separately, but they are one weight"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "the output layer"),
        (
            {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
            "the output layer",
        ),
    ],
)
def test_modules_of_one_weight_trained_apart_are_refused(family, base, settings, told):
    adapter(family / base, family / "adapter", **settings)
    with pytest.raises(CheckpointError, match=told):
        merged_alone(family, base)


def test_a_classifier_lacks_the_language_models_head_and_its_own_pooler_is_kept(tmp_path):
    """No skip is needed to pack it, nor is it given what it has not."""
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
    config = BertConfig(num_attention_heads=2, intermediate_size=16, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertForMaskedLM(config).save_pretrained(tmp_path / "base")
        model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
        [p.data.add_(0.05 * torch.randn_like(p)) for p in model.parameters()]
        model.save_pretrained(tmp_path / "x")
    decoder = "cls.predictions.decoder."
    with_copies(tmp_path / "base", "bert.embeddings.word_embeddings.weight", f"{decoder}weight")
    with_copies(tmp_path / "base", "cls.predictions.bias", f"{decoder}bias")
    notes: list[str] = []
    settings = EXACT
    work = Work(note=notes.append)
    pack(tmp_path / "base", {"x": tmp_path / "x"}, tmp_path / "p", settings=settings, work=work)
    told = (
        "x: these tensors are missing, and will be missing when it is rebuilt: cls.predictions.bias"
    )
    assert any(note.startswith(told) for note in notes)
    out = unpack(tmp_path / "p", "x", tmp_path / "out", base=tmp_path / "base")
    assert load(out).keys() == load(tmp_path / "x").keys()
    ours, theirs = (
        BertForSequenceClassification.from_pretrained(folder).eval()(IDS).logits
        for folder in (out, tmp_path / "x")
    )
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    with pytest.raises(CheckpointError, match=r'skip: \["cls\.predictions\.\*"\]'):
        merge(tmp_path / "base", {"x": tmp_path / "x"}, tmp_path / "merged")


@pytest.mark.parametrize("with_base", [True, False])
def test_an_encoder_and_a_decoder_that_began_as_one_are_merged_each(
    with_base: bool, tmp_path: Path
):
    """Their embeddings are equal in the base alone; the output layer goes with the decoder's."""
    sizes: Any = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 12}
    decoder = BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**sizes), decoder)
    words, ours = "embeddings.word_embeddings.weight", "decoder.bert.embeddings.word_embeddings"
    head, states = "decoder.cls.predictions.decoder.weight", dict[str, dict[str, Tensor]]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = EncoderDecoderModel(config=config)
        model.decoder.bert.load_state_dict(model.encoder.state_dict(), strict=False)
        for name in ("base", "a", "b"):
            model.save_pretrained(tmp_path / name)
            # Cloned: what is loaded may be the file's memory, which is written below.
            states[name] = {key: tensor.clone() for key, tensor in load(tmp_path / name).items()}
            states[name][head] = states[name][f"{ours}.weight"].clone()
            save_file(states[name], tmp_path / name / WEIGHTS, {"format": "pt"})
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
    assert torch.equal(states["base"][f"encoder.{words}"], states["base"][f"{ours}.weight"])
    given = {name: tmp_path / name for name in (("a", "b") if with_base else states)}
    base, settings = tmp_path / "base" if with_base else None, MergeSettings(method="average")
    merge(base, given, tmp_path / "out", settings=settings)
    out = load(tmp_path / "out")
    assert out.keys() == states["base"].keys()
    for name, found in out.items():
        mean = torch.stack([states[expert][name].double() for expert in given]).mean(0)
        torch.testing.assert_close(found.double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("began_as_one", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query", "predictions.decoder"]},
        {"target_modules": ["word_embeddings"]},
        {"target_modules": ["encoder.embeddings.word_embeddings"]},
        {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]},
    ],
)
def test_an_adapter_of_an_encoder_and_a_decoder_adapts_its_own(
    began_as_one: bool, settings: dict[str, Any], tmp_path: Path
):
    """As PEFT merges it: the decoder's output layer is its embedding, and not the encoder's."""
    sizes: Any = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 12}
    decoder = BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**sizes), decoder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = EncoderDecoderModel(config=config)
        if began_as_one:
            model.decoder.bert.load_state_dict(model.encoder.state_dict(), strict=False)
        model.save_pretrained(tmp_path / "base")
        lora = LoraConfig(r=2, task_type="SEQ_2_SEQ_LM", init_lora_weights=False, **settings)
        adapted: Any = get_peft_model(model, lora)
        adapted.save_pretrained(str(tmp_path / "x"))
    expected = adapted.merge_and_unload().eval()(input_ids=IDS, decoder_input_ids=IDS).logits
    whole = MergeSettings(method="task_arithmetic", parameters={"scale": 1.0})
    merge(tmp_path / "base", {"x": tmp_path / "x"}, tmp_path / "out", settings=whole)
    out: Any = EncoderDecoderModel.from_pretrained(tmp_path / "out")
    found = out.eval()(input_ids=IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_a_stored_output_layer_of_whisper_is_the_decoders_embedding(tmp_path: Path):
    """Whisper calls it proj_out; models saved by older versions have it in their files."""
    sizes: Any = {"vocab_size": 40, "d_model": 16, "num_mel_bins": 4, "max_source_positions": 8}
    sizes |= {"encoder_layers": 1, "decoder_layers": 1, "max_target_positions": 12}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
    embed, head = "model.decoder.embed_tokens.weight", "proj_out.weight"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(WhisperConfig(**sizes))
        model.save_pretrained(tmp_path / "base")
    perturb(tmp_path / "base", tmp_path / "lean", seed=1)
    for name, seed in (("full", 2), ("base", None)):
        if seed:
            perturb(tmp_path / "base", tmp_path / name, seed=seed)
        with_copies(tmp_path / name, embed, head)
    given = {name: tmp_path / name for name in ("lean", "full")}
    settings = MergeSettings(method="dare_ties", parameters={"density": 0.5, "seed": 3})
    merge(tmp_path / "base", given, tmp_path / "out", settings=settings)
    out = load(tmp_path / "out")
    assert torch.equal(out[head], out[embed])
    assert not torch.equal(out[embed], load(tmp_path / "base")[embed])
    kind: Any = WhisperForConditionalGeneration
    _, told = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]


@pytest.mark.parametrize(
    ("kept", "copy"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
)
def test_a_copy_is_written_in_the_dtype_that_it_has_in_the_base(
    family: Path, kept: torch.dtype, copy: torch.dtype
):
    """An embedding in one dtype and a head in another, in the base and in one of two experts."""
    for name in ("base", "full", "lean"):
        tensors = {key: tensor.to(kept) for key, tensor in load(family / name).items()}
        if name != "lean":
            tensors[HEAD] = tensors[EMBED].to(copy)
        save_file(tensors, family / name / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((family / name / "config.json").read_text())
        config["dtype"] = str(kept).removeprefix("torch.")
        (family / name / "config.json").write_text(json.dumps(config))
    base, given = family / "base", experts(family)
    average = MergeSettings(method="average")
    plan = plan_merge(base, given, average)
    merge(base, given, family / "out", settings=average)
    out, full, lean = load(family / "out"), load(family / "full"), load(family / "lean")
    mean = (full[EMBED].double() + lean[EMBED].double()) / 2
    torch.testing.assert_close(out[EMBED], mean.to(kept))
    assert plan.bytes_out == sum(tensor.nbytes for tensor in out.values())
    same = average.model_copy(update={"dtype": str(kept).removeprefix("torch.")})
    merge(base, given, family / "asked", settings=same)
    asked = load(family / "asked")
    assert asked[HEAD].dtype == kept and torch.equal(asked[HEAD], asked[EMBED])

    made = pack(base, given, family / "p", settings=EXACT)
    assert not made.task("full").private and not made.task("lean").private
    verify(family / "p", against=given, base=base)
    for name, expert in (("full", full), ("lean", lean)):
        unpack(family / "p", name, family / f"back-{name}", base=base)
        torch.testing.assert_close(load(family / f"back-{name}")[EMBED], expert[EMBED])
    compose(family / "p", {"full": 0.5, "lean": 0.5}, family / "composed", base=base)
    torch.testing.assert_close(load(family / "composed")[EMBED], mean.to(kept))
    for name in ("out", "back-full", "back-lean", "composed"):
        written = load(family / name)
        assert (written[EMBED].dtype, written[HEAD].dtype) == (kept, copy)
        assert torch.equal(written[HEAD], written[EMBED].to(copy))
        logits(family / name)


def test_where_an_expert_has_another_dtype_than_the_base_its_copies_have_it_too(family: Path):
    """Base in 16 bits with a head in 32, and an expert in the other 16: nothing is widened."""
    kept, own = torch.bfloat16, torch.float16
    for name, dtype in (("base", kept), ("full", own)):
        tensors = {key: tensor.to(dtype) for key, tensor in load(family / name).items()}
        tensors[HEAD] = tensors[EMBED].float() if name == "base" else tensors[EMBED].clone()
        save_file(tensors, family / name / WEIGHTS, metadata={"format": "pt"})
    pack(family / "base", {"full": family / "full"}, family / "p", settings=EXACT)
    unpack(family / "p", "full", family / "back", base=family / "base")
    back = load(family / "back")
    assert {tensor.dtype for tensor in back.values()} == {own}
    assert torch.equal(back[HEAD], back[EMBED])
