"""Alignment of experts with their base, from names and shapes alone."""

import pytest
import torch

from families import State, saved
from personae.checkpoints import open_checkpoint
from personae.checkpoints.naming import Renaming, check_names, matches, shown
from personae.errors import CheckpointError, Faults
from personae.family.align import Alignment, align


def _state(**shapes: tuple[int, ...]) -> State:
    """Zeros of these shapes; `__` in a keyword stands for a dot."""
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


def _aligned(
    base: State, expert: State, skip: tuple[str, ...] = (), private: tuple[str, ...] = ()
) -> Alignment:
    experts = {"x": open_checkpoint(expert)}
    return align(open_checkpoint(base), experts, skip=skip, private=private)["x"]


BACKBONE = _state(embed__weight=(20, 4), layer__0__weight=(4, 4), layer__0__bias=(4,))


def _prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor.clone() for name, tensor in state.items()}


def test_equal_names_are_shared_as_they_are():
    found = _aligned(BACKBONE, dict(BACKBONE))
    assert found.shared == ("embed.weight", "layer.0.bias", "layer.0.weight")
    assert found.renaming == Renaming()
    assert found.private == found.absent == found.grown == found.buffers == ()
    assert found.notes == []


@pytest.mark.parametrize(
    ("rename", "wrapper"),
    [
        (lambda n: f"module.{n}", "module"),
        (lambda n: f"_orig_mod.{n}", "_orig_mod"),
        (lambda n: f"_orig_mod.module.{n}", "module._orig_mod"),
        (lambda n: f"module._orig_mod.{n}", "module._orig_mod"),
        (lambda n: n.replace("layer.0.", "layer.0._orig_mod."), "_orig_mod"),  # one block compiled
    ],
)
def test_wrappers_are_removed(rename, wrapper):
    found = _aligned(BACKBONE, {rename(name): tensor for name, tensor in BACKBONE.items()})
    assert found.shared == ("embed.weight", "layer.0.bias", "layer.0.weight")
    assert found.files["layer.0.weight"] == rename("layer.0.weight")
    assert found.renaming == Renaming(wrapper=wrapper)
    assert found.notes == [f"x: wrapper '{wrapper}.' removed from tensor names"]


def test_a_deep_segment_called_module_is_no_wrapper():
    base = _state(a__b__module__weight=(4, 4), a__b__bias=(4,))
    found = _aligned(base, dict(base))
    assert found.shared == ("a.b.bias", "a.b.module.weight")
    assert found.renaming.wrapper == ""


def test_names_that_would_collide_without_their_wrapper_are_left_alone():
    expert = {**BACKBONE, **_prefixed(BACKBONE, "_orig_mod.")}
    found = _aligned(BACKBONE, expert)
    assert found.renaming.wrapper == ""
    assert found.shared == ("embed.weight", "layer.0.bias", "layer.0.weight")
    assert found.private == tuple(sorted(_prefixed(BACKBONE, "_orig_mod.")))


def test_the_expert_adds_a_prefix_and_a_head():
    expert = _prefixed(BACKBONE, "bert.") | _state(classifier__weight=(3, 4), classifier__bias=(3,))
    found = _aligned(BACKBONE, expert)
    assert found.renaming == Renaming(add="bert.")
    assert found.shared == ("embed.weight", "layer.0.bias", "layer.0.weight")
    assert found.files["embed.weight"] == "bert.embed.weight"
    assert found.private == ("classifier.bias", "classifier.weight")
    assert "x: adds the prefix 'bert.' to the base's tensor names" in found.notes
    # (3·4 + 3) fp32 numbers are 60 bytes
    assert "x: kept whole as private (60 bytes): classifier.bias, classifier.weight" in found.notes


def test_the_expert_lacks_a_prefix_of_two_segments():
    found = _aligned(_prefixed(BACKBONE, "model.vision."), dict(BACKBONE))
    assert found.renaming == Renaming(strip="model.vision.")
    assert found.files["model.vision.embed.weight"] == "embed.weight"
    assert found.notes == ["x: lacks the prefix 'model.vision.' to the base's tensor names"]


def test_plain_names_are_those_the_prefix_does_not_apply_to():
    base = {**BACKBONE, **_state(pooler__weight=(4, 4))}
    expert = _prefixed(BACKBONE, "bert.") | _state(pooler__weight=(4, 4))
    found = _aligned(base, expert)
    assert found.renaming == Renaming(add="bert.", plain=frozenset({"pooler.weight"}))
    assert found.files["pooler.weight"] == "pooler.weight"
    assert found.renaming.expert_name("pooler.weight") == "pooler.weight"
    assert found.renaming.expert_name("embed.weight") == "bert.embed.weight"
    assert found.private == ()


def test_wrapper_and_prefix_together():
    found = _aligned(BACKBONE, _prefixed(BACKBONE, "module.bert."))
    assert found.renaming == Renaming(add="bert.", wrapper="module")
    assert found.files["embed.weight"] == "module.bert.embed.weight"


def test_a_head_of_another_shape_is_private():
    base = {**BACKBONE, **_state(score__weight=(2, 4))}
    found = _aligned(base, {**BACKBONE, **_state(score__weight=(5, 4))})
    assert found.private == ("score.weight",)
    assert found.grown == ()  # more rows, but by its name no vocabulary
    assert found.private_spec("score.weight").shape == (5, 4)


@pytest.mark.parametrize("name", ["embed.weight", "wte.weight", "lm_head.weight", "shared.weight"])
def test_a_vocabulary_with_more_rows_is_grown(name):
    rest = _state(layer__weight=(8, 8))
    found = _aligned({name: torch.zeros(20, 4)} | rest, {name: torch.zeros(23, 4)} | rest)
    assert found.shared == tuple(sorted([name, "layer.weight"]))
    assert found.grown == (name,)
    assert found.private == ()
    assert found.notes == [f"x: extra rows kept whole as private: {name}"]


@pytest.mark.parametrize("shape", [(17, 4), (23, 5), (23, 4, 1), (20,)])
def test_a_vocabulary_of_another_shape_is_private(shape):
    rest = _state(layer__weight=(16, 16))
    base = _state(embed__weight=(20, 4)) | rest
    found = _aligned(base, {"embed.weight": torch.zeros(shape)} | rest)
    assert (found.grown, found.private) == ((), ("embed.weight",))


def test_integer_tensors_are_buffers_where_they_fit_and_private_where_not():
    numbers = {"ids": torch.arange(4), "mask": torch.arange(3)}
    found = _aligned(BACKBONE | numbers, BACKBONE | numbers | {"mask": torch.arange(5)})
    assert found.buffers == ("ids",)
    assert found.private == ("mask",)


def test_an_absent_integer_buffer_is_no_fault():
    found = _aligned(BACKBONE | {"ids": torch.arange(4)}, dict(BACKBONE))
    assert found.absent == ("ids",)


def test_a_floating_tensor_where_the_base_has_integers_is_private():
    found = _aligned(BACKBONE | {"ids": torch.arange(4)}, BACKBONE | {"ids": torch.zeros(4)})
    assert found.private == ("ids",)


def test_missing_tensors_of_all_experts_are_told_at_once():
    base = open_checkpoint({f"h.{n}.weight": torch.zeros(4, 4) for n in range(9)})
    math = {f"h.{n}.weight": torch.zeros(4, 4) for n in range(2)}
    law = {f"h.{n}.weight": torch.zeros(4, 4) for n in range(8)}
    with pytest.raises(CheckpointError) as caught:
        align(base, {"math": open_checkpoint(math), "law": open_checkpoint(law)})
    assert str(caught.value) == (
        "2 faults:\n"
        "  1. Expert 'math' lacks 7 tensor(s) of the base: h.2.weight, h.3.weight, h.4.weight, "
        "h.5.weight, h.6.weight and 2 more (base: 'h.2.weight' of shape (4, 4)). Was 'math' "
        'fine-tuned from the base? To leave them out: skip: ["h.2.weight", "h.3.weight", '
        '"h.4.weight", "h.5.weight", "h.6.weight", "h.7.weight", "h.8.weight"].\n'
        "  2. Expert 'law' lacks 1 tensor(s) of the base: h.8.weight (base: 'h.8.weight' of shape "
        "(4, 4)). Was 'law' fine-tuned from the base? To leave them out: skip: "
        '["h.8.weight"].'
    )


def test_missing_tensors_may_be_skipped():
    expert = {name: tensor for name, tensor in BACKBONE.items() if name != "embed.weight"}
    found = _aligned(BACKBONE, expert, skip=("embed.*",))
    assert found.absent == ("embed.weight",)
    assert found.shared == ("layer.0.bias", "layer.0.weight")


def test_skip_takes_names_of_the_reference_and_of_the_expert():
    expert = _prefixed(BACKBONE, "bert.") | _state(head__weight=(3, 4), other__weight=(3, 4))
    found = _aligned(BACKBONE, expert, skip=("embed.*", "bert.layer.0.bias", "head.*"))
    assert found.skipped == ("embed.weight", "layer.0.bias")
    assert found.shared == ("layer.0.weight",)
    assert found.private == ("other.weight",)


def test_private_patterns_keep_what_could_be_coded():
    expert = _prefixed(BACKBONE, "bert.")
    found = _aligned(BACKBONE, expert, private=("*.bias",))
    assert found.private == ("bert.layer.0.bias",)
    assert found.shared == ("embed.weight", "layer.0.weight")
    assert found.private_files == {"bert.layer.0.bias": "bert.layer.0.bias"}
    assert "layer.0.bias" not in found.files


def test_the_base_given_as_expert_is_refused(tmp_path):
    path = saved(BACKBONE, tmp_path / "base")
    base = open_checkpoint(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(CheckpointError, match=r"2 faults") as caught:
        align(base, {"x": base, "y": open_checkpoint(link)})
    assert f"Expert 'x' is the base itself ({path})" in str(caught.value)
    assert "Expert 'y' is the base itself" in str(caught.value)


def test_an_unrelated_architecture_is_refused():
    with pytest.raises(CheckpointError, match=r"'x' \(dict\) shares no tensor with the base"):
        _aligned(BACKBONE, _state(wte__weight=(20, 4), h__0__attn__weight=(4, 12)))


def test_the_same_architecture_of_another_width_is_refused():
    wide = _state(embed__weight=(20, 6), layer__0__weight=(6, 6), layer__0__bias=(4,))
    with pytest.raises(CheckpointError, match="shapes of 2 tensors differ") as caught:
        _aligned(BACKBONE, wide)
    assert "'embed.weight' is (20, 6), the base has (20, 4)" in str(caught.value)


def test_shapes_that_disagree_may_be_kept_on_request():
    wide = _state(embed__weight=(20, 6), layer__0__weight=(6, 6), layer__0__bias=(4,))
    found = _aligned(BACKBONE, wide, private=("*.weight",))
    assert found.private == ("embed.weight", "layer.0.weight")


def test_unsafe_and_double_names_are_told_at_once():
    faults = Faults()
    unsafe = ["", "../up", "a/b", ".hidden", "-r", "a b", "é", "x" * 101, "dot.", "x.safetensors"]
    check_names([*unsafe, "News", "news", "ok-1_2.b"], faults)
    assert [m for m in faults.messages if "not a safe file name" not in m] == [
        "Two experts are named 'news' (case is ignored). Give each its own name: "
        "--expert NAME=PATH."
    ]
    assert [m.split("'")[1] for m in faults.messages if "not a safe file name" in m] == unsafe


def test_patterns_span_dots_and_mind_the_case():
    assert matches("bert.layer.0.bias", ["*.bias"])
    assert not matches("bert.layer.0.Bias", ["*.bias"])
    assert not matches("anything", [])


def test_long_lists_are_cut():
    assert shown(["a", "b"]) == "a, b"
    assert shown(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_causal_masks_of_old_checkpoints_may_be_absent():
    base = BACKBONE | _state(h__0__attn__bias=(1, 1, 4, 4), h__0__attn__masked_bias=())
    found = _aligned(base, BACKBONE)
    assert found.absent == ("h.0.attn.bias", "h.0.attn.masked_bias")
    assert found.shared == tuple(sorted(BACKBONE))


@pytest.mark.parametrize(
    "part",
    [
        _state(final_logits_bias=(1, 20)),  # BART
        _state(logit_scale=()),  # CLIP
        _state(language_model__lm_head__weight=(20, 4), language_model__lm_head__bias=(20,)),
        _state(lm_head__weight=(20, 4)),
    ],
)
def test_a_packed_expert_may_lack_what_stands_at_the_top_and_output_layers(part):
    rest = _state(model__embed_tokens__weight=(20, 4), model__layers__0__weight=(9, 4))
    rest = _prefixed(rest, "language_model.")
    base, expert = rest | part, open_checkpoint(rest)
    found = align(open_checkpoint(base), {"x": expert}, may_lack_parts=True)["x"]
    assert found.absent == tuple(sorted(part)) and found.shared == tuple(rest)
    with pytest.raises(CheckpointError, match=f"lacks {len(part)} tensor"):
        align(open_checkpoint(base), {"x": expert})


def test_a_head_shaped_like_one_that_the_expert_lacks_is_another_one():
    """DistilBERT's `pre_classifier` is a square matrix and a bias, as is `vocab_transform`."""
    base = BACKBONE | _state(vocab_transform__weight=(4, 4), vocab_transform__bias=(4,))
    own = _state(pre_classifier__weight=(4, 4), pre_classifier__bias=(4,))
    classifier = open_checkpoint(BACKBONE | own | _state(classifier__weight=(3, 4)))
    found = align(open_checkpoint(base), {"x": classifier}, may_lack_parts=True)["x"]
    assert found.absent == ("vocab_transform.bias", "vocab_transform.weight")
    assert found.private == ("classifier.weight", *sorted(own))
    renamed = open_checkpoint(BACKBONE | own)
    with pytest.raises(CheckpointError, match=r"'pre_classifier.bias'.*another version"):
        align(open_checkpoint(base), {"x": renamed}, may_lack_parts=True)


def test_a_packed_expert_may_not_lack_a_layer_called_like_an_output_layer():
    rest = _state(model__embed_tokens__weight=(20, 4), model__layer__0__weight=(4, 4))
    base, expert = rest | _state(model__layer__0__output__weight=(4, 4)), open_checkpoint(rest)
    with pytest.raises(CheckpointError, match="lacks 1 tensor"):
        align(open_checkpoint(base), {"x": expert}, may_lack_parts=True)


def test_a_bias_that_is_no_mask_may_not():
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor\(s\) of the base: h.0.attn.bias"):
        _aligned(BACKBONE | _state(h__0__attn__bias=(4,)), BACKBONE)


def test_a_head_may_be_called_like_a_tensor_of_the_base():
    base = BACKBONE | _state(norm__weight=(4,))
    expert = _prefixed(base, "backbone.") | _state(norm__weight=(7,))
    found = _aligned(base, expert)
    assert found.files["norm.weight"] == "backbone.norm.weight"
    assert found.private_files == {"norm.weight": "norm.weight"}
    assert found.spec("norm.weight").shape == (4,)
    assert found.private_spec("norm.weight").shape == (7,)
    assert found.taken == {
        "backbone.embed.weight": "embed.weight",
        "backbone.layer.0.bias": "layer.0.bias",
        "backbone.layer.0.weight": "layer.0.weight",
        "backbone.norm.weight": "norm.weight",
        "norm.weight": None,
    }


@pytest.mark.parametrize("name", ["encoder.module.weight", "layers.0._orig_mod.weight"])
@pytest.mark.parametrize("prefix", ["", "module.", "bert."])
def test_wrappers_that_the_base_has_too_stay(name, prefix):
    base = BACKBONE | {name: torch.zeros(4, 4)}
    found = _aligned(base, _prefixed(base, prefix))
    assert found.shared == tuple(sorted(base))
    assert found.private == ()
    assert found.renaming.add == ("bert." if prefix == "bert." else "")
    assert found.files[name] == prefix + name
    assert bool(found.notes) == bool(prefix)


def test_wrappers_of_the_base_alone_are_given_to_the_expert():
    base = {n.replace("layer.0.", "layer.0._orig_mod."): t for n, t in BACKBONE.items()}
    found = _aligned(base, dict(BACKBONE))
    assert found.shared == tuple(sorted(base))
    assert found.files["layer.0._orig_mod.bias"] == "layer.0.bias"
    assert found.renaming == Renaming()
    assert found.notes == [
        "x: stored under the base's names: layer.0.bias as layer.0._orig_mod.bias, "
        "layer.0.weight as layer.0._orig_mod.weight"
    ]


def test_running_statistics_are_buffers():
    numbers = _state(bn__running_mean=(4,), bn__running_var=(4,), bn__weight=(4,))
    found = _aligned(BACKBONE | numbers, BACKBONE | numbers)
    assert found.buffers == ("bn.running_mean", "bn.running_var")
    assert found.shared == tuple(sorted([*BACKBONE, "bn.weight"]))


def _tied(state: State, dropped: str, kept: str) -> State:
    return state | {dropped: state[kept]}


def test_ties_to_tensors_left_out_are_dropped():
    expert = _tied(BACKBONE | _state(a__head=(3, 4)), "b.head", "a.head")
    assert _aligned(BACKBONE, expert).tied == {"b.head": "a.head"}
    assert _aligned(BACKBONE, expert, skip=("a.head",)).tied == {}


def test_ties_to_a_tensor_skipped_but_rebuilt_stay():
    expert = _tied(BACKBONE, "lm_head.weight", "embed.weight")
    found = _aligned(BACKBONE, expert, skip=("embed.weight",))
    assert found.skipped == ("embed.weight",)
    assert found.tied == {"lm_head.weight": "embed.weight"}


@pytest.mark.parametrize("prefix", ["", "module.", "transformer."])
def test_a_tied_tensor_kept_under_its_other_name_is_found(prefix):
    """The expert keeps 'a_head.weight' and drops the name that the base knows it by."""
    expert = _prefixed(BACKBONE, prefix)
    kept = "module.a_head.weight" if prefix == "module." else "a_head.weight"
    expert = {kept: expert[prefix + "embed.weight"]} | expert
    opened = open_checkpoint(expert)
    assert opened.tied == {prefix + "embed.weight": kept}
    found = align(open_checkpoint(BACKBONE), {"x": opened})["x"]
    assert found.shared == tuple(sorted(BACKBONE))
    assert found.files["embed.weight"] == kept
    assert found.private == found.absent == ()
    plain = prefix.removeprefix("module.") + "embed.weight"
    assert found.tied == {"a_head.weight": plain}
    assert f"x: stored under the base's names: {kept} as {plain}" in found.notes


def test_a_tied_tensor_whose_kept_name_the_base_has_too_is_absent():
    """The base holds both apart; what the expert ties is rebuilt once."""
    base = BACKBONE | _state(a_head__weight=(20, 4))
    expert = {"a_head.weight": BACKBONE["embed.weight"]} | BACKBONE
    found = _aligned(base, expert)
    assert found.absent == ("embed.weight",)
    assert found.shared == ("a_head.weight", "layer.0.bias", "layer.0.weight")
    assert found.tied == {"embed.weight": "a_head.weight"}


def test_a_model_of_another_size_is_told_as_that() -> None:
    with pytest.raises(CheckpointError) as refused:
        _aligned(_state(a__weight=(4, 3), b=(3,)), _state(a__weight=(4, 5), b=(5,)))
    text = str(refused.value)
    assert "'x' (dict) is of another size than the base (dict): every tensor that both" in text
    assert "such as 'a.weight', (4, 5) here and (4, 3) in the base." in text


def test_a_model_of_other_names_is_told_what_both_have() -> None:
    with pytest.raises(CheckpointError, match="it has 'q', say, and the base 'a'"):
        _aligned(_state(a=(4,)), _state(q=(3,)))
