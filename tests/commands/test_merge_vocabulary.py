"""Merges of models with unequal vocabularies, and what stands beside the merged weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from families import listing, saved, small_base, tuned
from personae.commands.merge import merge
from personae.commands.merge_plan import plan_merge
from personae.errors import CheckpointError
from personae.recipe import MergeSettings, read_merge_recipe
from personae.run.work import Work
from toys import load

ADDED = {"base": (), "a": ("<p>",), "b": ("<q>", "<p>"), "c": ()}
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def llama(directory: Path, seed: int, tokens: tuple[str, ...]) -> Path:
    """Four words, and these added tokens."""
    config = LlamaConfig(
        vocab_size=4 + len(tokens),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(directory)
    words = {word: n for n, word in enumerate(("<unk>", "x", "y", "z"))}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    fast.add_tokens(list(tokens))
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("unequal")
    return {
        name: llama(root / name, seed, tokens) for seed, (name, tokens) in enumerate(ADDED.items())
    }


def experts(family: dict[str, Path], *names: str) -> dict[str, str]:
    return {name: str(family[name]) for name in names}


def test_unequal_vocabularies_are_refused_by_default(family, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"vocabularies of 6 and 4 rows. Choose the"
    ) as caught:
        merge(str(family["base"]), experts(family, "a", "b"), tmp_path / "out")
    assert "5 and 4 rows" in str(caught.value)
    left = MergeSettings(skip=("*embed_tokens*", "lm_head*"))
    out = merge(str(family["base"]), experts(family, "a", "b"), tmp_path / "out", settings=left)
    for name in EMBEDDINGS:
        assert torch.equal(load(out)[name], load(family["base"])[name])


def test_a_union_merges_shared_rows_and_copies_the_others(family, tmp_path):
    settings = MergeSettings(tokenizer_source="union")
    names = ("a", "b", "c")
    out = merge(str(family["base"]), experts(family, *names), tmp_path / "out", settings=settings)
    found, own = load(out), {name: load(family[name]) for name in names}
    for name in EMBEDDINGS:
        a, b, c = (own[n][name] for n in names)
        assert found[name].shape == (6, 8)
        torch.testing.assert_close(found[name][:4], (a[:4] + b[:4] + c[:4]) / 3)
        torch.testing.assert_close(found[name][4], (a[4] + b[5]) / 2)  # <p>
        torch.testing.assert_close(found[name][5], b[4])  # <q>
    tokens = AutoTokenizer.from_pretrained(out)
    assert tokens("x <p>y <q>").input_ids == [1, 4, 2, 5]
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == 6
    assert torch.equal(model.get_input_embeddings().weight, found[EMBEDDINGS[0]])
    assert model(tokens("x <p>y <q>", return_tensors="pt").input_ids).logits.shape == (1, 4, 6)
    mean: Any = AutoModelForCausalLM.from_pretrained(family["base"])  # of the rows all have
    mean.load_state_dict(
        {
            name: torch.stack([own[n][name][: len(kept)] for n in names]).mean(dim=0)
            for name, kept in load(family["base"]).items()
        }
    )
    shared = tokens("x y z z y", return_tensors="pt").input_ids
    torch.testing.assert_close(model(shared).logits[..., :4], mean(shared).logits)
    again = merge(
        str(family["base"]),
        experts(family, *names),
        tmp_path / "again",
        settings=settings,
        work=Work(workers=3),
    )
    assert listing(out) == listing(again)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare_ties", "drm"])
def test_every_kind_of_method_copies_what_one_expert_has(method, family, tmp_path):
    settings = MergeSettings(method=method, tokenizer_source="union")
    out = merge(str(family["base"]), experts(family, "a", "b"), tmp_path / "out", settings=settings)
    for name in EMBEDDINGS:
        torch.testing.assert_close(load(out)[name][5], load(family["b"])[name][4])
        assert load(out)[name].isfinite().all()


def test_the_base_s_vocabulary_drops_what_experts_added(family, tmp_path):
    settings = MergeSettings(tokenizer_source="base")
    out = merge(str(family["base"]), experts(family, "a", "b"), tmp_path / "o", settings=settings)
    for name in EMBEDDINGS:
        a, b = (load(family[n])[name] for n in "ab")
        torch.testing.assert_close(load(out)[name], (a[:4] + b[:4]) / 2)
    assert (out / "tokenizer.json").read_bytes() == (family["base"] / "tokenizer.json").read_bytes()


def test_an_expert_s_vocabulary(family, tmp_path):
    settings = MergeSettings(tokenizer_source="b")
    out = merge(str(family["base"]), experts(family, "a", "b"), tmp_path / "o", settings=settings)
    for name in EMBEDDINGS:
        a, b = (load(family[n])[name] for n in "ab")
        torch.testing.assert_close(load(out)[name][4], b[4])
        torch.testing.assert_close(load(out)[name][5], (a[4] + b[5]) / 2)
    assert AutoTokenizer.from_pretrained(out)("<q><p>").input_ids == [4, 5]


def test_a_union_without_a_base(family, tmp_path):
    settings = MergeSettings(tokenizer_source="union", vector="difference")
    out = merge(None, experts(family, "a", "b"), tmp_path / "o", settings=settings)
    for name in EMBEDDINGS:
        a, b = (load(family[n])[name] for n in "ab")
        torch.testing.assert_close(load(out)[name][:4], (a[:4] + b[:4]) / 2)
        torch.testing.assert_close(load(out)[name][4], (a[4] + b[5]) / 2)
        torch.testing.assert_close(load(out)[name][5], b[4])


def test_a_union_left_as_in_the_base_still_has_every_row(family, tmp_path):
    settings = MergeSettings(tokenizer_source="union", only=("*mlp*",), dtype="bfloat16")
    out = merge(str(family["base"]), experts(family, "a", "b"), tmp_path / "o", settings=settings)
    for name in EMBEDDINGS:
        base, b = load(family["base"])[name], load(family["b"])[name]
        assert torch.equal(load(out)[name][:4], base.bfloat16())
        assert torch.equal(load(out)[name][5], b[4].bfloat16())


def test_a_plan_knows_the_rows_that_come_out(family):
    given = str(family["base"]), experts(family, "a", "b")
    plan = plan_merge(*given, MergeSettings(tokenizer_source="union"))
    small = plan_merge(*given, MergeSettings(tokenizer_source="base"))
    assert plan.bytes_out - small.bytes_out == 2 * 2 * 8 * 4  # two rows of 8 in two tensors


# -- the model card -----------------------------------------------------------------------------


def test_a_merge_comes_with_a_card_and_its_recipe(tmp_path):
    base = small_base()
    saved(base, tmp_path / "base")
    for seed, name in enumerate("ab", 1):
        saved(tuned(base, seed), tmp_path / name)
    settings = MergeSettings(
        method="ties",
        parameters={"scale": 0.5},
        expert_parameters=({"weight": 2.0}, {"weight": 1.0}),
    )
    places = {name: str(tmp_path / name) for name in "ab"}
    out = merge(str(tmp_path / "base"), places, tmp_path / "out", settings=settings)
    card = (out / "README.md").read_text("utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["merge", "personae"]}
    assert "# a, b: merged by ties" in card
    assert "| `scale` | `0.5` |" in card and "| `density` | `0.2` |" in card
    assert f"| a | `{tmp_path / 'a'}` | local | weight = `2.0` |" in card
    (tmp_path / "again.yaml").write_text(card.split("```yaml\n")[1].split("```")[0])
    again = read_merge_recipe(tmp_path / "again.yaml")
    assert again.settings == settings and again.experts == places
    merge(again.base, again.experts, tmp_path / "again", settings=again.settings)
    assert listing(tmp_path / "again") == listing(out)


def test_a_card_quotes_the_recipe_that_was_read(tmp_path):
    base = small_base()
    saved(base, tmp_path / "base")
    saved(tuned(base, 1), tmp_path / "a")
    text = "# mine\nmerge_method: average\n"
    out = merge(str(tmp_path / "base"), {"a": str(tmp_path / "a")}, tmp_path / "out", recipe=text)
    assert "```yaml\n# mine\nmerge_method: average\n```" in (out / "README.md").read_text("utf-8")
