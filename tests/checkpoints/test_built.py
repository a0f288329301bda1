"""A config.json that speaks of more parts than any model has: nothing is built without end."""

from typing import Any

import pytest

from personae.checkpoints import built

TOY = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 16,
}


def build(**changes: Any) -> built.BuiltModel | None:
    pytest.importorskip("transformers")
    return built.build(TOY | changes, "LlamaForCausalLM")


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels"])
def test_a_model_of_a_thousand_million_layers_or_labels_is_not_built(key: str) -> None:
    assert build(**{key: 10**9}) is None


def test_counts_in_configurations_inside_are_bounded_too() -> None:
    inside = {"text_config": TOY | {"num_hidden_layers": 10**9}, "model_type": "llava"}
    assert built.build(inside, "LlavaForConditionalGeneration") is None


def test_building_ends_where_there_are_more_modules_than_models_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each layer: attention of 4 linear layers, an MLP of 3 and its activation, 2 norms, all in one.
    monkeypatch.setattr(built, "_MOST_MODULES", 20)
    assert build() is None
    found = build(num_hidden_layers=0)
    assert found is not None
    assert "model.embed_tokens" in found.modules


def test_large_sizes_that_are_no_counts_of_parts_are_built() -> None:
    found = build(max_position_embeddings=10**7, vocab_size=10**6)
    assert found is not None
    assert "model.layers.1.mlp.up_proj" in found.linear


def test_what_is_no_class_of_models_is_not_built() -> None:
    pytest.importorskip("transformers")
    assert built.build(TOY, "TextStreamer") is None  # it takes anything for its tokenizer
