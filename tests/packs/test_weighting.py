"""Weights of packed tasks for an unseen one, from an encoder whose embeddings are known."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from families import listing, saved, small_base, tuned
from personae.commands.compose import compose
from personae.commands.describe import class_names, describe
from personae.commands.pack import add_tasks, pack
from personae.commands.unpack import unpack
from personae.commands.verify import verify
from personae.errors import MethodError, PackError, RecipeError
from personae.packs.reader import Pack
from personae.packs.weighting import Weighting, weigh
from toys import load

BASE = small_base()
EXPERTS = {name: tuned(BASE, seed) for seed, name in enumerate("abc", 1)}
ABOUT = {"a": ("east",), "b": ("north", "east"), "c": "a way to the west"}


class Compass:
    """Directions in the plane, of unlike lengths, which must not matter."""

    name = "compass"
    template = "{}"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        known = {"east": (2.0, 0.0), "north": (0.0, 5.0), "a way to the west": (-3.0, 0.0)}
        return torch.tensor([known[text] for text in texts])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("described")
    saved(BASE, folder / "base")
    pack(folder / "base", EXPERTS, folder / "p", characteristics=ABOUT)
    return folder / "p"


def test_eq_8_by_hand(packed):
    # E_a = (1, 0), E_b = (0.5, 0.5), E_c = (-1, 0); E_u = (1, 0): cosines 1, 1/√2, -1.
    # Clipped at 0 they sum to 1 + 1/√2 = 1.7071: γ = 0.5858, 0.4142, 0.
    found = weigh(packed, ["east"], Compass())
    assert found.cosines == pytest.approx({"a": 1, "b": 0.5**0.5, "c": -1})
    assert found.weights == pytest.approx({"a": 2 - 2**0.5, "b": 2**0.5 - 1, "c": 0})
    assert found.notes == ["cosines below 0 count as 0 in a ratio: c"]
    assert (found.gamma, found.temperature) == ("ratio", None)
    assert (found.like, found.encoder, found.template) == (("east",), "compass", "{}")


def test_softmax_by_hand(packed):
    # E_u = (0, 1): cosines 0, 1/√2, 0; at T = 0.5: e^0 : e^√2 : e^0
    found = weigh(packed, ["north"], Compass(), gamma="softmax", temperature=0.5)
    share = torch.tensor(2**0.5).exp().item()
    expected = {"a": 1 / (2 + share), "b": share / (2 + share), "c": 1 / (2 + share)}
    assert found.weights == pytest.approx(expected)
    assert found.notes == [] and found.temperature == 0.5
    assert weigh(packed, ["north"], Compass(), gamma="softmax").temperature == 0.1


def test_a_task_like_a_packed_one_gets_that_ones_model(packed, tmp_path):
    # Of east and the way west the mean is 0: only north, which 'b' alone has, is left.
    like = ["east", "a way to the west", "north"]
    found = weigh(packed, like, Compass())
    assert found.weights == pytest.approx({"a": 0, "b": 1, "c": 0})
    compose(packed, found, tmp_path / "o")
    unpack(packed, "b", tmp_path / "b")
    torch.testing.assert_close(load(tmp_path / "o"), load(tmp_path / "b"), rtol=1e-5, atol=1e-6)
    made = json.loads((tmp_path / "o/personae.json").read_text())
    assert made["cosines"] == found.cosines and made["weights"] == found.weights
    assert (made["encoder"], made["like"], made["gamma"]) == ("compass", like, "ratio")


def test_no_cosine_above_zero(packed):
    described = describe(packed, {"b": "north"})
    assert described.task("b").characteristics == ("north",)
    describe(packed, {"c": ["east"]})
    with pytest.raises(
        MethodError, match=r"No cosine is above 0.*Cosines: a -1.000, b 0.000, c -1"
    ):
        weigh(packed, ["a way to the west"], Compass())
    softly = weigh(packed, ["a way to the west"], Compass(), gamma="softmax")
    assert softly.weights["b"] > 0.99
    describe(packed, ABOUT)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gamma": "ration"}, "Unknown gamma 'ration'. Did you mean 'ratio'"),
        ({"temperature": 0.5}, "belongs to gamma softmax"),
        ({"gamma": "softmax", "temperature": 0.0}, "temperature of 0"),
        ({"gamma": "softmax", "temperature": float("nan")}, "temperature of nan"),
    ],
)
def test_bad_options(packed, options, text):
    with pytest.raises(RecipeError, match=text):
        weigh(packed, ["east"], Compass(), **options)


@pytest.mark.parametrize("like", [[], ["east", " "]])
def test_nothing_to_be_like(packed, like):
    with pytest.raises(RecipeError, match="missing or empty"):
        weigh(packed, like, Compass())


def test_a_pack_that_does_not_say_what_its_tasks_are_about(tmp_path):
    pack(BASE, {n: EXPERTS[n] for n in "ab"}, tmp_path / "p", characteristics={"a": "east"})
    with pytest.raises(PackError, match=r"about: b\. Say it: .*--describe b=TEXT.*--weights"):
        weigh(tmp_path / "p", ["east"], Compass())


def test_describing_changes_the_manifest_alone(tmp_path):
    pack(BASE, EXPERTS, tmp_path / "p")
    before = listing(tmp_path / "p")
    assert json.loads((tmp_path / "p/pack.json").read_text())["format_version"] == 1
    describe(tmp_path / "p", {"a": "east"})
    after = listing(tmp_path / "p")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"pack.json"} and before.keys() == after.keys()
    assert json.loads((tmp_path / "p/pack.json").read_text())["format_version"] == 2
    verify(tmp_path / "p", base=BASE)
    assert weigh_names(tmp_path / "p") == {"a": ("east",), "b": (), "c": ()}


def weigh_names(directory: Path) -> dict[str, tuple[str, ...]]:
    return {n: record.characteristics for n, record in Pack(directory).manifest.tasks.items()}


def test_bad_descriptions(tmp_path):
    with pytest.raises(RecipeError, match="no expert 'd' to describe"):
        pack(BASE, EXPERTS, tmp_path / "p", characteristics={"d": "east"})
    pack(BASE, EXPERTS, tmp_path / "p")
    before = listing(tmp_path / "p")
    with pytest.raises(PackError, match="has no task 'd'"):
        describe(tmp_path / "p", {"a": "east", "d": "east"})
    with pytest.raises(RecipeError, match="'a' is empty"):
        describe(tmp_path / "p", {"a": ["east", ""]})
    with pytest.raises(PackError, match="is no pack"):
        describe(tmp_path / "q", {"a": "east"})
    assert listing(tmp_path / "p") == before


def test_class_names_are_read_from_the_config(tmp_path):
    labels = {"id2label": {"1": "dog", "0": "cat", "10": "bird"}}
    saved(EXPERTS["a"], tmp_path / "a", json.dumps(labels))
    saved(EXPERTS["b"], tmp_path / "b", json.dumps({"id2label": {"0": "LABEL_0"}}))
    saved(EXPERTS["c"], tmp_path / "c", "{}")
    paths = {name: tmp_path / name for name in "abc"}
    made = pack(BASE, paths, tmp_path / "p")
    assert weigh_names(made.directory) == {"a": ("cat", "dog", "bird"), "b": (), "c": ()}
    told = pack(BASE, {"a": paths["a"]}, tmp_path / "q", characteristics={"a": "pets"})
    assert weigh_names(told.directory) == {"a": ("pets",)}
    add_tasks(tmp_path / "q", {"z": paths["b"]}, base=BASE, characteristics={"z": ["x", "y"]})
    assert weigh_names(told.directory) == {"a": ("pets",), "z": ("x", "y")}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, ()),
        ({"id2label": {"0": "0", "1": "1"}}, ("0", "1")),  # digits are classes, as in MNIST
        ({"id2label": {"0": "yes", "1": " "}}, ()),
        ({"id2label": {"x": "yes"}}, ()),
        ({"id2label": ["yes"]}, ()),
        ({"id2label": None}, ()),
        ({}, ()),
        ([], ()),
    ],
)
def test_what_counts_as_class_names(tmp_path, config, names):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert class_names({"config.json": tmp_path / "config.json"}) == names


def test_weights_that_do_not_sum_to_one_are_told():
    assert Weighting({"a": 0.5, "b": 0.25}).notes == ["the weights sum to 0.75, not to 1"]
    assert Weighting({"a": 0.7, "b": 0.3}).notes == []
