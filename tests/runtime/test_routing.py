"""Auto-Switch in a pack: each row with the tasks of the examples nearest to it."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from test_loaded import KINDS, Kind, loaded
from torch import Tensor

from personae import (
    DTS,
    AutoSwitch,
    TSwitch,
    add_tasks,
    compose,
    load,
    pack,
    remove_task,
    verify,
)
from personae.errors import MethodError, PackError, WorkError
from personae.methods import Choice, Voting, build
from personae.packs.manifest import ROUTER
from personae.packs.reader import Pack
from personae.packs.writer import PackWriter
from toys import load as read_all
from toys import perturb, toy_bert, toy_gpt2, toy_t5

BERT = KINDS["bert"]


def _sentences(word: int, count: int) -> list[dict[str, Tensor]]:
    """Two batches of sentences: one word six times, but for another at the end."""
    tokens = torch.full((count, 6), word)
    tokens[:, -1] = torch.arange(word, word + count)
    return [{"input_ids": rows} for rows in tokens.split(count // 2)]


FEW = {"a": _sentences(3, 12), "b": _sentences(30, 6)}
"""Each task has a word of its own: the ten nearest of a sentence of b's are not all b's."""
ASKED = torch.tensor([[30] * 5 + [2], [3] * 5 + [2], [3] * 3 + [30] * 3, [30, 3, 3, 3, 3, 30]])


def _packed(root: Path, codec: Any = None) -> Path:
    """Two tasks with heads of two labels, around a base with three."""
    root.mkdir(exist_ok=True)
    source = toy_bert(root / "two", num_labels=2)
    base = toy_bert(root / "base")
    experts = {"a": perturb(source, root / "a", 1, 0.1), "b": perturb(source, root / "b", 2, 0.1)}
    return pack(base, experts, root / "pack", codec or DTS(rank_fraction=0.4)).directory


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return _packed(tmp_path / "family")


def _by_hand(base: Path, inputs: Tensor, k: int, count: int = 12) -> Tensor:
    """Shares of a and b among the nearest first tokens, by the plain model and `cdist`."""
    model = transformers.BertModel.from_pretrained(base).eval()

    def first(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model(tokens).last_hidden_state[:, 0].double()

    known = [torch.cat([first(batch["input_ids"]) for batch in FEW[t]])[:count] for t in "ab"]
    nearest = torch.cdist(first(inputs), torch.cat(known)).argsort(dim=1)[:, :k]
    of_b = (nearest >= len(known[0])).double().mean(dim=1)
    return torch.stack([1 - of_b, of_b], dim=1)


def _dense(rows: list[dict[str, float]]) -> Tensor:
    return torch.tensor([[row.get("a", 0.0), row.get("b", 0.0)] for row in rows])


@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_rows_are_weighed_by_their_nearest_examples(packed: Path, mode: str):
    runtime = load(packed, mode=mode)
    runtime.activate("a")
    runtime.fit_router(FEW, neighbours=10)
    right = _by_hand(packed.parent / "base", ASKED, 10)
    assert ((right > 0) & (right < 1)).any() and (right == 1).any()  # some mixed, some not
    found = runtime.route(input_ids=ASKED)
    torch.testing.assert_close(_dense(found).double(), right)
    assert all(weight for row in found for weight in row.values())
    assert runtime.task == "a"
    with torch.no_grad():
        torch.testing.assert_close(
            runtime(ASKED).logits, load(packed)(ASKED, tasks="a").logits, rtol=1e-4, atol=1e-5
        )
    # What is stored is what was fitted, in any mode.
    again = load(packed, mode="factored" if mode == "merged" else "merged")
    torch.testing.assert_close(_dense(again.route(input_ids=ASKED)).double(), right)
    runtime.fit_router(FEW, neighbours=3, mode="pick", examples=5)
    picked = _dense(load(packed).route(input_ids=ASKED)).double()
    votes = _by_hand(packed.parent / "base", ASKED, 3, count=5)
    assert torch.equal(picked[:, 0] > picked[:, 1], votes[:, 0] > votes[:, 1])
    assert {*picked.flatten().tolist()} == {0.0, 1.0}


@pytest.mark.parametrize("mode", ["merged", "factored"])
@pytest.mark.parametrize("how", ["mix", "pick"])
def test_each_row_is_computed_by_its_sum_of_tasks(
    packed: Path, tmp_path: Path, mode: str, how: Any
):
    runtime = load(packed, mode=mode)
    runtime.fit_router(FEW, neighbours=10, mode=how)
    with torch.no_grad():
        got = runtime(input_ids=ASKED, tasks="auto").logits
    sums = 0
    for row, weights in enumerate(runtime.route(input_ids=ASKED)):
        head = max(weights, key=lambda task: weights[task])
        sums += len(weights) > 1
        out = compose(packed, weights, tmp_path / "out" / str(row), head=head)
        with torch.no_grad():
            right = loaded(out)(input_ids=ASKED[row : row + 1]).logits[0]
        torch.testing.assert_close(got[row], right, rtol=1e-4, atol=1e-5)
    assert bool(sums) == (how == "mix")
    assert runtime.tasks == ("a", "b")  # sums are gone
    known = runtime._catalogue
    assert not known._mixtures and not known._holds and {*known._views} == {"a", "b"}


def test_it_is_auto_switch(tmp_path: Path):
    """The learned method of this name, on models and data in memory."""
    packed = _packed(tmp_path / "family", TSwitch(density=0.4))
    experts = {task: loaded(packed.parent / task) for task in "ab"}
    base = loaded(packed.parent / "base")
    routed = AutoSwitch(density=0.4, neighbours=10)(experts, FEW, base)
    runtime = load(packed)
    runtime.fit_router(FEW, neighbours=10)
    rows = runtime.route(input_ids=ASKED)
    assert max(map(len, rows)) > 1
    with torch.no_grad():
        got = runtime(input_ids=ASKED, tasks="auto").logits
        for row, weights in enumerate(rows):
            right = routed(max(weights, key=lambda t: weights[t]), input_ids=ASKED[row : row + 1])
            torch.testing.assert_close(got[row], right[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "clip", "roberta", "llama"])
def test_models_of_any_kind_are_routed(name: str, tmp_path: Path):
    kind: Kind = KINDS[name]
    base = kind.make(tmp_path / "base")
    experts = {task: perturb(base, tmp_path / task, seed, 0.1) for seed, task in enumerate("ab")}
    packed = pack(base, experts, tmp_path / "pack", DTS(rank_fraction=0.4)).directory
    runtime = load(packed, mode="factored")
    inputs = kind.inputs
    runtime.fit_router(
        {t: [{n: one[r : r + 1] for n, one in inputs.items()}] for r, t in enumerate("ab")},
        neighbours=1,
        pool="mean",
    )
    two = {name: one[[1, 0]] for name, one in inputs.items()}
    assert runtime.route(**two) == [{"b": 1.0}, {"a": 1.0}]
    with torch.no_grad():
        got = runtime(**two, tasks="auto")[kind.output]
        torch.testing.assert_close(got, runtime(**two, tasks=["b", "a"])[kind.output])


@pytest.mark.parametrize("make", [toy_gpt2, toy_t5])
def test_sequences_are_generated_by_routed_tasks(make: Any, tmp_path: Path):
    """An encoder-decoder's prompts are told apart by its encoder."""
    base = make(tmp_path / "base")
    experts = {task: perturb(base, tmp_path / task, seed, 0.3) for seed, task in enumerate("ab")}
    packed = pack(base, experts, tmp_path / "pack", DTS(rank_fraction=1.0)).directory
    runtime = load(packed, mode="factored")
    runtime.fit_router(FEW, neighbours=1, pool="mean")
    prompts = torch.cat([FEW[task][0]["input_ids"][:1] for task in "ba"])
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    how |= {"eos_token_id": None, "decoder_start_token_id": 0}
    found = runtime.generate(input_ids=prompts, tasks="auto", **how)
    assert torch.equal(found, runtime.generate(input_ids=prompts, tasks=["b", "a"], **how))


def test_a_reference_with_causal_masks_as_old_versions_stored_them(tmp_path: Path):
    """As openai-community/gpt2 has them; without a task the reference is built, too."""
    base = toy_gpt2(tmp_path / "base")
    expert = perturb(base, tmp_path / "a", 1, 0.3)
    right = loaded(base)(ASKED).logits
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 12, 12).tril() for n in range(2)}
    save_file(read_all(base) | masks, base / "model.safetensors", metadata={"format": "pt"})
    runtime = load(pack(base, {"a": expert}, tmp_path / "pack", DTS()).directory)
    torch.testing.assert_close(runtime(ASKED).logits, right)


def test_threads_route_at_once(packed: Path):
    runtime = load(packed, mode="factored")
    runtime.fit_router(FEW, neighbours=10)
    with torch.no_grad():
        right = runtime(input_ids=ASKED, tasks="auto").logits
    wrong: list[str] = []

    def work(task: str) -> None:
        with torch.no_grad(), runtime.activate(task):
            for _ in range(10):
                got = runtime(input_ids=ASKED, tasks="auto").logits
                if not torch.allclose(got, right, rtol=1e-4, atol=1e-5) or runtime.task != task:
                    wrong.append(task)

    threads = [threading.Thread(target=work, args=(task,)) for task in "abab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not runtime._catalogue._mixtures


def test_what_is_decoded_of_sums_stays_within_the_cache(packed: Path):
    runtime = load(packed, mode="factored")
    runtime.fit_router(FEW, neighbours=10)
    with torch.no_grad():
        runtime(input_ids=ASKED, tasks="auto")
    held = runtime.cached_bytes
    small = load(packed, mode="factored", cache=held)
    for row in ASKED:
        with torch.no_grad():
            small(input_ids=row[None], tasks="auto")
        assert small.cached_bytes <= held


# Tasks that come and go


def test_a_task_that_comes_later_has_to_be_fitted(packed: Path, tmp_path: Path):
    runtime = load(packed)
    runtime.fit_router(FEW)
    add_tasks(packed, {"c": perturb(packed.parent / "a", tmp_path / "c", 7, 0.1)})
    later = load(packed)
    with pytest.raises(PackError, match=r"router of .*pack has no example of c, which came later"):
        later.route(input_ids=ASKED)
    with pytest.raises(PackError, match="Fit it again"):
        later(input_ids=ASKED, tasks="auto")
    with torch.no_grad():
        assert later(input_ids=ASKED, tasks="c").logits.shape == (4, 2)
    later.fit_router(FEW | {"c": FEW["a"]}, neighbours=1)
    assert {*load(packed).route(input_ids=FEW["b"][0]["input_ids"][:1])[0]} == {"b"}


def test_a_task_that_goes_takes_its_examples_along(packed: Path, tmp_path: Path):
    add_tasks(packed, {"c": perturb(packed.parent / "a", tmp_path / "c", 7, 0.1)})
    load(packed).fit_router(FEW | {"c": FEW["b"]}, neighbours=10)
    remove_task(packed, "c")
    found = load(packed).route(input_ids=ASKED)
    torch.testing.assert_close(_dense(found).double(), _by_hand(packed.parent / "base", ASKED, 10))
    verify(packed)
    for task in "ab":
        remove_task(packed, task)
    assert Pack(packed).manifest.router is None and not (packed / ROUTER).exists()


def test_a_router_whose_writing_fails_is_none(packed: Path, monkeypatch: pytest.MonkeyPatch):
    """No record of the one before stands beside another file."""
    runtime = load(packed)
    runtime.fit_router(FEW)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PackWriter, "_write_whole", fail)
    with pytest.raises(OSError, match="No space left"):
        runtime.fit_router(FEW, neighbours=3)
    assert Pack(packed).manifest.router is None
    verify(packed)


@pytest.mark.parametrize("then", ["route", "fit_router"])
def test_a_task_that_goes_while_a_pack_is_loaded(packed: Path, then: str):
    """A router that knows it would make the pack unreadable."""
    runtime = load(packed)
    runtime.fit_router(FEW)
    early = load(packed)
    remove_task(packed, "b")
    act = {
        "route": lambda: early.route(input_ids=ASKED),
        "fit_router": lambda: early.fit_router(FEW),
    }
    with pytest.raises(PackError, match=r"other tasks, or another router, .* Load it again\."):
        act[then]()
    verify(packed)
    assert load(packed).route(input_ids=ASKED[:1]) == [{"a": 1.0}]


def test_a_router_that_is_fitted_again_while_a_pack_is_loaded(packed: Path):
    load(packed).fit_router(FEW)
    early = load(packed)
    load(packed).fit_router(FEW, neighbours=1)
    with pytest.raises(PackError, match="Load it again"):
        early.route(input_ids=ASKED)


# What is refused


def test_without_a_router(packed: Path):
    runtime = load(packed)
    with pytest.raises(PackError, match=r"has no router, which says .* Fit one"):
        runtime.route(input_ids=ASKED)
    with pytest.raises(PackError, match="has no router"):
        runtime(input_ids=ASKED, tasks="auto")


BAD: dict[str, tuple[Mapping[str, Any], dict[str, Any], str]] = {
    "no data of a task": ({"a": FEW["a"]}, {}, "no data of the task 'b'"),
    "another task": (FEW | {"c": FEW["a"]}, {}, r"no task 'c'\. Known: a, b\."),
    "an empty task": (FEW | {"b": []}, {}, "data of the task 'b' has no sample"),
    "more neighbours than a pack can say": (FEW, {"neighbours": 10**17}, "neighbours = 10+:"),
    "no neighbour": (FEW, {"neighbours": 0}, "router: neighbours = 0"),
    "no example": (FEW, {"examples": 0}, "router: examples = 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_fitted(packed: Path, case: str):
    batches, parameters, text = BAD[case]
    with pytest.raises(MethodError, match=text):
        load(packed).fit_router(batches, **parameters)
    assert Pack(packed).manifest.router is None


def test_words_that_a_router_does_not_know():
    with pytest.raises(MethodError, match=r"(?s)router: mode = 'best'.*router: pool = 'last'"):
        build(Voting, {"mode": "best", "pool": "last"})


def test_inputs_without_names(packed: Path):
    runtime = load(packed)
    runtime.fit_router(FEW)
    with pytest.raises(MethodError, match="takes inputs by their names alone"):
        runtime(ASKED, tasks="auto")
    with pytest.raises(MethodError, match="No input is a tensor"):
        runtime.route(input_ids=ASKED.tolist())


def _store(packed: Path, examples: dict[str, Tensor], mode: Choice = "mix") -> None:
    writer = PackWriter(packed, Pack(packed).manifest)
    writer.set_router(examples, neighbours=2, mode=mode, pool="first")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite(packed: Path, value: float):
    """Of NaN all examples are equally far, and the first task would have all votes."""
    runtime = load(packed)
    runtime.fit_router(FEW)
    inputs = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(0))
    inputs[1, 0] = value
    with pytest.raises(MethodError, match="Features of row 1 are NaN or infinite"):
        runtime.route(inputs_embeds=inputs)


def test_a_file_that_does_not_fit_its_record_is_not_verified(packed: Path):
    _store(packed, {"a": torch.ones(2, 16), "b": torch.full((2, 16), torch.nan)})
    with pytest.raises(PackError, match="features of b are not finite"):
        verify(packed)


def test_features_of_another_width(packed: Path):
    _store(packed, {"a": torch.zeros(2, 5), "b": torch.ones(2, 5)})
    with pytest.raises(MethodError, match=r"features of 5 numbers; this model's have 16"):
        load(packed).route(input_ids=ASKED)


def test_a_task_of_that_name_goes_first(packed: Path, tmp_path: Path):
    runtime = load(packed)
    with pytest.raises(PackError, match="begin with 'auto' are the router's"):
        runtime.compose("auto", {"a": 1.0})
    add_tasks(packed, {"auto": perturb(packed.parent / "a", tmp_path / "c", 7, 0.1)})
    runtime = load(packed)
    with pytest.raises(MethodError, match="'auto' is a task here"):
        runtime.fit_router(FEW | {"auto": FEW["a"]})
    with torch.no_grad():
        called = runtime(ASKED, tasks="auto").logits
        with runtime.activate("auto"):
            assert torch.equal(runtime(ASKED).logits, called)


def test_a_closed_pack_routes_nothing(packed: Path):
    runtime = load(packed)
    runtime.fit_router(FEW)
    runtime.close()
    with pytest.raises(WorkError, match="pack was closed"):
        runtime.route(input_ids=ASKED)


def test_another_threads_merged_weights(packed: Path):
    runtime = load(packed)
    runtime.fit_router(FEW)
    began, done = threading.Event(), threading.Event()

    def hold() -> None:
        with runtime.activate("a"):
            began.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    began.wait()
    try:
        with pytest.raises(WorkError, match="Cannot use the reference"):
            runtime.route(input_ids=ASKED)
    finally:
        done.set()
        thread.join()
    assert runtime.route(input_ids=ASKED)
