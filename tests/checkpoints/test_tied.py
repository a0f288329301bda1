"""Stored copies of tied tensors, as they are found in a base and beside it in its experts."""

import json
from pathlib import Path

import pytest
import torch

from families import State, saved
from personae.checkpoints import Checkpoint, open_checkpoint
from personae.checkpoints.tied import as_stored, each_once, is_copy
from personae.family.align import align, trained_apart

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED, UNTIED = '{"tie_word_embeddings": true}', '{"tie_word_embeddings": false}'


def state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBED: (12, 4), "model.layer.weight": (4, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def with_head(tensors: State, head: torch.Tensor | None = None) -> State:
    return tensors | {HEAD: tensors[EMBED].clone() if head is None else head}


def opened(tmp_path: Path, name: str, tensors: State, config: str | None = "{}") -> Checkpoint:
    return open_checkpoint(saved(tensors, tmp_path / name, config))


@pytest.mark.parametrize("config", [TIED, "{}", None, '{"text_config": ' + TIED + "}"])
def test_a_copy_is_one_more_name_of_its_tensor(tmp_path, config):
    base = each_once(opened(tmp_path, "base", with_head(state()), config))
    assert HEAD not in base.specs and EMBED in base.specs
    assert dict(base.tied) == {HEAD: EMBED} and base.copies.keys() == {HEAD}
    assert HEAD in as_stored(base).specs
    assert isinstance(base, Checkpoint)


@pytest.mark.parametrize(
    "tensors, config",
    [
        (with_head(state(), state(1)[EMBED]), TIED),  # other values
        (with_head(state(), state()[EMBED].bfloat16() * 1.01), TIED),  # another dtype and values
        (with_head(state()), UNTIED),  # the model says they are two
        (state() | {"other.weight": state()[EMBED]}, TIED),  # no embedding or output layer by name
        (state(), TIED),
    ],
)
def test_what_is_no_copy_stays(tmp_path, tensors, config):
    model = opened(tmp_path, "base", tensors, config)
    assert each_once(model) is model


def test_one_differing_bit_in_the_last_row_makes_two_tensors(tmp_path):
    """-0.0 equals 0.0 as a number; what is stored is not the same."""
    tensors = with_head(state() | {EMBED: torch.zeros(12, 4)})
    tensors[HEAD][-1, -1] = -0.0
    model = opened(tmp_path, "base", tensors, TIED)
    assert not is_copy(model, HEAD, model, EMBED) and is_copy(model, EMBED, model, EMBED)
    assert each_once(model) is model


@pytest.mark.parametrize(
    "kept, copy",
    [
        (torch.float32, torch.bfloat16),  # the embedding, rounded
        (torch.bfloat16, torch.float32),  # the embedding to the bit, in more bits
        (torch.float16, torch.bfloat16),
    ],
)
def test_a_copy_may_have_a_dtype_of_its_own(tmp_path, kept, copy):
    tensors = state()
    tensors[EMBED] = tensors[EMBED].to(kept)
    tensors[HEAD] = tensors[EMBED].to(copy)
    base = each_once(opened(tmp_path, "base", tensors, TIED))
    assert base.copies == {HEAD: copy} and base.specs[EMBED].dtype == kept
    found = align(base, {"x": opened(tmp_path, "x", with_head(state(1)), TIED)})["x"]
    assert trained_apart(found, base) == {} and found.private == ()
    tensors[HEAD] = (tensors[HEAD].float() * 1.25).to(copy)
    assert each_once(opened(tmp_path, "apart", tensors, TIED)).copies == {}


def test_a_head_of_more_bits_than_the_embedding_is_no_copy(tmp_path):
    """The embedding is the head rounded, 1 + 2^-7 for 1 + 2^-7 + 2^-20: the head has more."""
    head = torch.full((12, 4), 1 + 2**-7 + 2**-20)
    tensors = with_head(state() | {EMBED: head.bfloat16()}, head)
    assert torch.equal(tensors[EMBED].float(), torch.full((12, 4), 1 + 2**-7))
    model = opened(tmp_path, "base", tensors, TIED)
    assert each_once(model) is model


def test_encoder_and_decoder_share_though_the_head_is_untied(tmp_path):
    """T5 1.1: tie_word_embeddings is about the output layer alone."""
    shared = torch.randn(12, 4)
    tensors = {
        n: shared.clone()
        for n in ("decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "shared.weight")
    }
    tensors["lm_head.weight"] = shared.clone()
    inputs = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    base = each_once(opened(tmp_path, "v1_1", tensors, UNTIED))
    assert base.copies.keys() == inputs and set(base.tied.values()) == {"shared.weight"}
    base = each_once(opened(tmp_path, "v1", tensors, TIED))
    assert base.copies.keys() == inputs | {"lm_head.weight"}


def test_biases_of_output_layers_are_tied_too(tmp_path):
    words = torch.randn(12, 4)
    tensors = {
        "bert.embeddings.word_embeddings.weight": words,
        "cls.predictions.decoder.weight": words.clone(),
        "cls.predictions.bias": torch.zeros(12),
        "cls.predictions.decoder.bias": torch.zeros(12),
        "bert.layer.output.bias": torch.zeros(4),
        "bert.other.output.bias": torch.zeros(4),  # equal, and no vocabulary's
    }
    base = each_once(opened(tmp_path, "base", tensors))
    assert dict(base.tied) == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


@pytest.mark.parametrize("expert", [state(1), with_head(state(1))])
def test_experts_may_store_the_copy_or_lack_it(tmp_path, expert):
    base = each_once(opened(tmp_path, "base", with_head(state()), TIED))
    found = align(base, {"x": opened(tmp_path, "x", expert, TIED)})["x"]
    assert found.shared == (EMBED, "model.layer.weight")
    assert found.private == found.absent == () and found.copies == (HEAD,)
    assert found.tied == {HEAD: EMBED} and found.stored_again == {HEAD}
    assert trained_apart(found, base) == {}


def test_an_expert_that_kept_only_the_other_name_is_found(tmp_path):
    base = each_once(opened(tmp_path, "base", with_head(state()), TIED))
    tensors = with_head(state(1))
    del tensors[EMBED]
    found = align(base, {"x": opened(tmp_path, "x", tensors, TIED)})["x"]
    assert found.files[EMBED] == HEAD and found.private == ()


def test_a_classifier_is_given_no_copy_of_the_base(tmp_path):
    base = each_once(opened(tmp_path, "base", with_head(state()), TIED))
    classifier = state(1) | {"score.weight": torch.randn(2, 4)}
    found = align(base, {"x": opened(tmp_path, "x", classifier)})["x"]
    assert found.copies == (HEAD,) and found.tied == {} and found.private == ("score.weight",)


@pytest.mark.parametrize("stored", [True, False])
def test_a_head_trained_apart_is_told(tmp_path, stored):
    base = with_head(state()) if stored else state()
    base = each_once(opened(tmp_path, "base", base, TIED))
    expert = opened(tmp_path, "x", with_head(state(1), state(2)[EMBED]), UNTIED)
    found = align(base, {"x": expert})["x"]
    assert found.private == (HEAD,) and found.copies == ()
    assert trained_apart(found, base) == {HEAD: EMBED}


def test_a_copy_the_base_lacks_goes_where_both_say_tied(tmp_path):
    base = each_once(opened(tmp_path, "base", state(), TIED))
    found = align(base, {"x": opened(tmp_path, "x", with_head(state(1)), TIED)})["x"]
    assert found.private == () and found.tied == {HEAD: EMBED}
    loose = align(base, {"x": open_checkpoint(with_head(state(1)))})["x"]
    assert loose.private == ()  # rebuilt, it has the base's config
    untied = align(base, {"x": opened(tmp_path, "y", with_head(state(1)), UNTIED)})["x"]
    assert untied.private == (HEAD,)  # whoever loads it wants both


def test_names_of_a_wrapper_are_found(tmp_path):
    base = each_once(opened(tmp_path, "base", with_head(state()), TIED))
    wrapped = {f"module.{name}": tensor for name, tensor in with_head(state(1)).items()}
    found = align(base, {"x": opened(tmp_path, "x", wrapped, TIED)})["x"]
    assert found.private == () and found.copies == (HEAD,)


def test_config_of_a_head_apart_is_untied(tmp_path):
    from personae.checkpoints.configuration import fit_config

    base = opened(tmp_path, "base", state(), TIED)
    expert = opened(tmp_path, "x", with_head(state(1), state(2)[EMBED]))
    for said in (json.loads(TIED), {}, {"text_config": json.loads(TIED)}):
        fitted, changes = fit_config(said, base.specs, expert.specs)
        assert fitted["tie_word_embeddings"] is False
        assert changes == ["tie_word_embeddings false"]
    assert fit_config(json.loads(TIED), expert.specs, expert.specs)[1] == []
