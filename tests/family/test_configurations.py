"""What configurations disagree in: keys and values, head counts apart."""

import json
import re
from typing import Any

import pytest

from families import saved, small_base, tuned
from personae.checkpoints import open_checkpoint
from personae.commands.merge import merge
from personae.commands.merge_plan import plan_merge
from personae.errors import CheckpointError
from personae.family.configurations import disagreements, said_by
from personae.recipe import MergeSettings
from personae.run.work import Work

BASE = {
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "transformers_version": "4.40.0",
}
STATE = {name.replace("layer", "self_attn"): tensor for name, tensor in small_base().items()}


def found(tmp_path, *configs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    models = {
        f"m{n}": open_checkpoint(saved(STATE, tmp_path / f"m{n}", json.dumps(config)))
        for n, config in enumerate(configs)
    }
    return disagreements(models)


def plan(tmp_path, expert: dict[str, Any], **settings: Any) -> list[str]:
    base = saved(STATE, tmp_path / "base", json.dumps(BASE))
    x = saved(tuned(STATE, 1), tmp_path / "x", json.dumps(expert))
    y = saved(tuned(STATE, 2), tmp_path / "y", json.dumps(BASE))
    experts = {"x": str(x), "y": str(y)}
    return plan_merge(str(base), experts, MergeSettings(**settings)).notes


def test_keys_and_values_are_named(tmp_path):
    other = BASE | {"rope_theta": 1e6, "hidden_act": "gelu", "rms_norm_eps": 1e-5}
    assert found(tmp_path, BASE, other, BASE) == {
        "hidden_act": {"m0": "silu", "m1": "gelu", "m2": "silu"},
        "rms_norm_eps": {"m0": 1e-6, "m1": 1e-5, "m2": 1e-6},
        "rope_theta": {"m0": 1e4, "m1": 1e6, "m2": 1e4},
    }
    assert said_by({"m0": 1e4, "m1": 1e6, "m2": 1e4}) == "10000.0 (m0, m2), 1000000.0 (m1)"


def test_what_says_nothing_of_weights_is_left_out(tmp_path):
    other = {
        **BASE,
        **{"transformers_version": "5.0.0", "_name_or_path": "elsewhere", "torch_dtype": "float16"},
        **{"id2label": {"0": "yes"}, "attention_dropout": 0.1, "use_cache": False},
        **{"rope_theta": 10000, "rope_scaling": None, "attention_bias": False},
    }
    assert found(tmp_path, BASE, other) == {}


def test_positions_are_compared_across_versions_of_transformers(tmp_path):
    old = {k: v for k, v in BASE.items() if k != "rope_theta"}
    plain = old | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    yarn = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0}
    scaled = BASE | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert found(tmp_path / "a", BASE, plain) == {}
    assert found(tmp_path / "b", scaled, old | {"rope_parameters": yarn}) == {}
    assert found(tmp_path / "c", plain, scaled) == {
        "rope_scaling.factor": {"m0": None, "m1": 4.0},
        "rope_scaling.rope_type": {"m0": None, "m1": "yarn"},
    }
    text = {"text_config": plain}
    assert found(tmp_path / "d", text, {"text_config": BASE | {"rope_theta": 5.0}}) == {
        "text_config.rope_theta": {"m0": 10000.0, "m1": 5.0}
    }


def test_a_plan_notes_them(tmp_path):
    (note,) = [n for n in plan(tmp_path, BASE | {"rope_theta": 5e5}) if "rope_theta" in n]
    assert "rope_theta 10000.0 (the base, y), 500000.0 (x)" in note


@pytest.mark.parametrize("key", ["num_attention_heads", "num_key_value_heads", "head_dim"])
def test_other_heads_are_refused(tmp_path, key):
    with pytest.raises(CheckpointError, match=rf"heads.*{key} is \d \(the base, y\), 16 \(x\)"):
        plan(tmp_path, BASE | {key: 16})


def test_other_heads_do_not_matter_where_attention_is_left_alone(tmp_path):
    other = BASE | {"num_attention_heads": 16}
    notes = plan(tmp_path, other, skip=("self_attn.*",))
    assert any("num_attention_heads 8 (the base, y), 16 (x)" in note for note in notes)


def family(tmp_path, **generation: dict[str, Any] | None) -> dict[str, str]:
    """A base and two experts, some with a generation_config.json."""
    made: dict[str, str] = {}
    for seed, name in enumerate(("base", "x", "y")):
        state = STATE if name == "base" else tuned(STATE, seed)
        folder = saved(state, tmp_path / name, json.dumps(BASE))
        if (said := generation.get(name)) is not None:
            (folder / "generation_config.json").write_text(json.dumps(said))
        made[name] = str(folder)
    return made


@pytest.mark.parametrize(
    ("generation", "kept", "told"),
    [
        ({"base": {"t": 1}, "x": {"t": 2}}, {"t": 1}, "that of the base; .* t 1 .*, 2 \\(x\\)"),
        ({"base": {"t": 1}, "x": {"t": 1, "transformers_version": "5"}}, {"t": 1}, None),
        ({"y": {"t": 3}}, {"t": 3}, "that of y$"),
        ({"x": {"t": 2}, "y": {"t": 3}}, {"t": 2}, "that of x; .* t 2 \\(x\\), 3 \\(y\\)"),
        ({}, None, None),
    ],
)
def test_whose_generation_config_comes_out_is_told(tmp_path, generation, kept, told):
    paths, notes = family(tmp_path, **generation), list[str]()
    base, work = paths.pop("base"), Work(note=notes.append)
    out = merge(base, paths, tmp_path / "out", work=work)
    file = out / "generation_config.json"
    assert (json.loads(file.read_text()) if file.exists() else None) == kept
    found = [note for note in notes if "generation_config" in note]
    assert len(found) == (told is not None)
    assert told is None or re.search(told, found[0])
