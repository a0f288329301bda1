"""Patterns that messages advise: they fit all that is meant, and nothing else."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from families import small_base, tuned
from personae.checkpoints.naming import matches, patterns
from personae.commands.pack_plan import plan_pack
from personae.errors import CheckpointError
from personae.recipe import PackSettings
from toys import load, toy_gpt2

LAYERS = [f"h.{n}.{part}" for n in range(12) for part in ("attn.bias", "attn.weight", "mlp.bias")]


@pytest.mark.parametrize(
    ("names", "advised"),
    [
        ([name for name in LAYERS if name.endswith("attn.bias")], ["h.*.attn.bias"]),
        ([name for name in LAYERS if ".11." in name or ".10." in name], ["h.10.*", "h.11.*"]),
        (
            ["lm_head.weight", "lm_head.bias", "x.pooler.a", "x.pooler.b"],
            ["x.pooler.*", "lm_head.*"],
        ),
        (["one"], ["one"]),
        (LAYERS, ["h.*"]),
    ],
)
def test_the_fewest_words_that_fit(names, advised):
    others = ["wte.weight", *(name for name in LAYERS if name not in names)]
    assert json.loads(patterns(names, others)) == advised


NAMES = st.sets(st.lists(st.sampled_from("ab01"), min_size=1, max_size=4).map(".".join))


@given(meant=NAMES, others=NAMES)
def test_all_are_fitted_and_no_other_is(meant, others):
    advised = yaml.safe_load(patterns(meant, others))
    assert all(matches(name, advised) for name in meant)
    assert not any(matches(name, advised) for name in others - meant)


def test_what_is_advised_is_all_that_is_needed(tmp_path: Path):
    base = load(toy_gpt2(tmp_path / "gpt2")) | {"lm_head.weight": small_base()["embed.weight"]}
    expert = {n: t for n, t in tuned(base, 1).items() if ".mlp." not in n and "lm_head" not in n}
    with pytest.raises(CheckpointError) as caught:
        plan_pack(base, {"x": expert})
    advised = yaml.safe_load(str(caught.value).rpartition("skip: ")[2].rstrip("."))
    assert advised == ["transformer.h.0.mlp.*", "transformer.h.1.mlp.*"]  # it needs no head
    plan_pack(base, {"x": expert}, PackSettings(skip=tuple(advised)))
