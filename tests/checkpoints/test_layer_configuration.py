"""config.json for other layers: counts, lists, periods and beginnings."""

from typing import Any

import pytest

from personae.checkpoints.layer_configuration import Origin, with_layers
from personae.errors import Faults

LLAMA = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "eos_token_id": [1, 2]}
STACKED = [0, 1, 2, 1, 2, 3]


def stacked(
    config: dict[str, Any],
    layers: list[int],
    prefix: str = "model.layers.",
    count: int = 4,
    theirs: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    faults = Faults()
    origins = [Origin("some/model", theirs or config, count, layer) for layer in layers]
    return with_layers(config, prefix, count, origins, faults), faults.messages


def told(config: dict[str, Any], layers: list[int], **more: Any) -> dict[str, Any]:
    """What changes, where nothing is wrong."""
    found, faults = stacked(config, layers, **more)
    assert not faults
    return {key: value for key, value in found.items() if config.get(key) != value}


def test_only_the_count_changes():
    assert told(LLAMA, STACKED) == {"num_hidden_layers": 6}
    assert told(LLAMA, [0, 1, 2, 3]) == {}


@pytest.mark.parametrize(
    ("prefix", "config", "changed"),
    [
        ("transformer.h.", {"n_layer": 4}, {"n_layer": 6}),
        (
            "decoder.block.",
            {"num_layers": 4, "num_decoder_layers": 4},
            {"num_decoder_layers": 6},
        ),
        ("encoder.block.", {"num_layers": 4, "num_decoder_layers": 4}, {"num_layers": 6}),
        ("decoder.block.", {"num_layers": 4}, {"num_decoder_layers": 6}),
        (
            "model.encoder.layers.",
            {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4},
            {"encoder_layers": 6, "num_hidden_layers": 6},
        ),
        (
            "model.language_model.layers.",
            {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 4}},
            {"text_config": {"num_hidden_layers": 6}},
        ),
        (
            "model.visual.blocks.",
            {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 4}},
            {"vision_config": {"depth": 6}},
        ),
    ],
)
def test_names_of_counts(prefix: str, config: dict[str, Any], changed: dict[str, Any]):
    if prefix == "decoder.block." and "num_decoder_layers" not in config:
        found, _ = stacked(config, STACKED, prefix)
        assert found["num_decoder_layers"] == 6
        return
    assert told(config, STACKED, prefix=prefix) == changed


def test_lists_follow_the_layers():
    config = LLAMA | {
        "layer_types": ["s", "f", "s", "f"],
        "no_rope_layers": [1, 1, 1, 0],
        "mlp_only_layers": [0, 3],
        "attention_types": [[["global", "local"], 2]],
        "sliding_window_pattern": 2,
    }
    assert told(config, [1, 0, 3, 3, 2]) == {
        "num_hidden_layers": 5,
        "layer_types": ["f", "s", "f", "f", "s"],
        "no_rope_layers": [1, 1, 0, 0, 1],
        "mlp_only_layers": [1, 2, 3],
        "attention_types": [[["local", "global", "local", "local", "global"], 1]],
    }


def test_lists_are_those_of_the_models_that_the_layers_are_of():
    ours, theirs = (LLAMA | {"layer_types": [kind] * 4} for kind in "ab")
    faults = Faults()
    origins = [Origin("a", ours, 4, 0), Origin("b", theirs, 4, 3)]
    found = with_layers(ours, "model.layers.", 4, origins, faults)
    assert found["layer_types"] == ["a", "b"]
    _, told_of = stacked(ours, STACKED, theirs=LLAMA)
    assert "does not say 'layer_types' of its 4 layers" in told_of[0]


def test_a_period_is_kept_or_refused():
    config = LLAMA | {"decoder_sparse_step": 2}
    assert told(config, [0, 1, 0, 1, 2, 3]) == {"num_hidden_layers": 6}
    _, faults = stacked(config, [0, 1, 2, 0])
    assert faults == [
        "'decoder_sparse_step: 2' of config.json says the kind of a layer by its number. Layer 3 "
        "would be layer 0 of some/model, which is of another kind: let the numbers differ by "
        "multiples of 2."
    ]


def test_a_beginning_is_counted_anew_or_refused():
    config = LLAMA | {"first_k_dense_replace": 1}
    assert told(config, [0, 0, 1, 2, 3]) == {"num_hidden_layers": 5, "first_k_dense_replace": 2}
    _, faults = stacked(config, [0, 1, 0, 1])
    assert "says that the first layers are of another kind" in faults[0]


def test_what_is_off_says_nothing():
    config = LLAMA | {"max_window_layers": 2, "use_sliding_window": False}
    assert told(config, STACKED) == {"num_hidden_layers": 6}
    assert told(LLAMA | {"out_indices": [4], "stage_names": ["stem"]}, STACKED).keys() == {
        "num_hidden_layers"
    }
    assert "out_indices" not in stacked(LLAMA | {"out_indices": [4]}, STACKED)[0]
