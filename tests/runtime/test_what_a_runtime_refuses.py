"""What a runtime refuses: in our own words, and with the model left as it was."""

import json
import shutil
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from personae import DTS, EMR, load, pack
from personae.errors import (
    CheckpointError,
    MethodError,
    PackError,
    PersonaeError,
    RecipeError,
    WorkError,
)
from toys import perturb, toy_bert, toy_gpt2

TOKENS = torch.tensor([[3, 5, 7, 9]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("refusals")
    base = toy_bert(root / "base")
    experts = {task: perturb(base, root / task, seed) for seed, task in enumerate(("sst2", "cola"))}
    pack(base, experts, root / "pack", DTS(rank_fraction=0.4))
    pack(base, experts, root / "emr", EMR())
    return root


def logits(runtime: Any) -> torch.Tensor:
    with torch.no_grad():
        return runtime(input_ids=TOKENS).logits


@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_an_unknown_task(made: Path, mode: str):
    runtime = load(made / "pack", mode=mode)
    with runtime.activate("cola"):
        before = logits(runtime)
        with pytest.raises(PackError, match=r"no task 'sst'\. Did you mean 'sst2'"):
            runtime.activate("sst")
        assert runtime.task == "cola"
        torch.testing.assert_close(logits(runtime), before)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no layer": ({"num_hidden_layers": 0}, "it has no 'bert.encoder.layer.0.attention"),
    "more layers": ({"num_hidden_layers": 5}, "there is no 'bert.encoder.layer.2.attention"),
    "wider": ({"hidden_size": 32}, r"'bert.*' has shape \(40, 16\), expected is \(40, 32\)"),
    "wider heads alone": ({"architectures": ["BertForMaskedLM"], "vocab_size": 10**13}, "shape"),
    "layers without end": ({"num_hidden_layers": 10**9}, "cannot build 'BertFor.* config"),
    "no class of models": ({"architectures": ["DataCollatorWithPadding"]}, "cannot build 'DataC"),
    "a function": ({"architectures": ["pipeline"]}, "cannot build 'pipeline'"),
    "a key that is a method": ({"to_dict": 5}, "cannot build 'BertFor.* config"),
    "no activation": ({"hidden_act": "nosuch"}, "cannot build 'BertFor.* config"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_of_another_model(made: Path, tmp_path: Path, case: str):
    """Layers that it counts too many would be drawn at random, others left out."""
    change, text = CONFIGS[case]
    base = shutil.copytree(made / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    pack(base, {"a": made / "sst2"}, tmp_path / "pack", DTS(rank_fraction=0.4))
    with pytest.raises(CheckpointError, match=text):
        load(tmp_path / "pack")(input_ids=TOKENS)


@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_a_closed_pack_activates_nothing(made: Path, mode: str):
    runtime = load(made / "pack", mode=mode)
    reference = logits(runtime)
    with runtime.activate("cola"):
        assert not torch.equal(logits(runtime), reference)
    runtime.close()
    with pytest.raises(WorkError, match="the pack was closed"):
        runtime.activate("cola")
    with pytest.raises(WorkError, match="the pack was closed"):
        runtime(input_ids=TOKENS, tasks="cola")
    torch.testing.assert_close(logits(runtime), reference)


def test_a_dtype_that_is_no_floating_one(made: Path):
    with pytest.raises(RecipeError, match=r"Give a floating one, such as torch\.bfloat16"):
        load(made / "pack", dtype=torch.int8)


def test_every_wrong_option_at_once(made: Path):
    with pytest.raises(RecipeError) as caught:
        load(made / "pack", mode="merge", cache="much", device="tpu")
    text = str(caught.value)
    assert "3 faults" in text and "Did you mean 'merged'?" in text
    assert "cache: 'much' is no size" in text and "Unknown device 'tpu'" in text


def test_a_codec_without_factors(made: Path):
    with pytest.raises(MethodError, match=r"Codec 'emr' stores .* mode=.merged"):
        load(made / "emr", mode="factored")
    assert load(made / "emr").activate("sst2")


def test_another_reference(made: Path):
    with pytest.raises(PackError, match="is not the reference this pack was made from"):
        load(made / "pack", base=made / "sst2")


def test_a_module_that_has_not_the_experts_tensors(made: Path):
    with pytest.raises(CheckpointError) as caught:
        load(made / "pack", base=made / "base", model=nn.Linear(2, 2)).activate("sst2")
    assert "Linear, given as model=, has no tensor 'bert.embeddings" in str(caught.value)
    assert len(caught.value.faults) == 41


def test_a_merged_task_in_another_thread(made: Path):
    runtime = load(made / "pack")
    runtime.activate("sst2")
    before = logits(runtime)
    faults: list[PersonaeError] = []

    def other() -> None:
        for refused in (lambda: runtime.activate("cola"), lambda: logits(runtime)):
            try:
                refused()
            except PersonaeError as error:
                faults.append(error)
        runtime.deactivate()  # of nothing

    _run(other)
    assert [type(fault) for fault in faults] == [WorkError, WorkError]
    assert all("thread 'MainThread' has task 'sst2' active" in str(fault) for fault in faults)
    assert 'mode="factored"' in str(faults[0])
    assert runtime.task == "sst2"
    torch.testing.assert_close(logits(runtime), before)
    runtime.deactivate()
    _run(lambda: runtime.activate("cola"))
    assert runtime.task is None
    torch.testing.assert_close(logits(runtime), logits(load(made / "pack")))


def test_a_merged_task_while_another_thread_computes(made: Path):
    runtime = load(made / "pack")
    inside, done = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        assert done.wait(10)

    hook = runtime.model.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: logits(runtime), name="slow")
    thread.start()
    assert inside.wait(10)
    with pytest.raises(WorkError, match="Cannot activate 'cola': thread 'slow' computes"):
        runtime.activate("cola")
    hook.remove()
    done.set()
    thread.join()
    assert runtime.task is None and runtime.activate("cola") and runtime.task == "cola"


@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_a_task_is_activated_while_another_thread_generates(tmp_path: Path, mode: str):
    """The sequence goes on as it began; `factored` lets both threads have their tasks."""
    base = toy_gpt2(tmp_path / "base")
    experts = {task: perturb(base, tmp_path / task, seed, 0.3) for seed, task in enumerate("ab", 1)}
    runtime = load(pack(base, experts, tmp_path / "pack", DTS(rank_fraction=1.0)), mode=mode)
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    right = {task: runtime.generate(TOKENS, tasks=task, **how) for task in "ab"}
    assert not torch.equal(right["a"], right["b"])
    begun, done, steps, got = threading.Event(), threading.Event(), [], []

    def pause(*_: Any) -> None:
        steps.append(runtime.task)
        if len(steps) == 2:  # in the middle of a sequence
            begun.set()
            assert done.wait(10)

    def generate() -> None:
        with runtime.activate("a") as model:
            hook = model.register_forward_pre_hook(pause)
            got.append(runtime.generate(TOKENS, **how))
            hook.remove()

    thread = threading.Thread(target=generate, name="slow")
    thread.start()
    assert begun.wait(10)
    if mode == "merged":
        with pytest.raises(WorkError, match="Cannot activate 'b': thread 'slow' has task 'a'"):
            runtime.activate("b")
    else:
        runtime.activate("b")
    done.set()
    thread.join()
    assert torch.equal(got[0], right["a"]) and steps[:2] == ["a", "a"]
    with runtime.activate("b"):
        assert torch.equal(runtime.generate(TOKENS, **how), right["b"])


@pytest.mark.parametrize("mode", ["merged", "factored"])
def test_a_pack_that_is_deleted_or_damaged_while_loaded(made: Path, tmp_path: Path, mode: str):
    directory = Path(shutil.copytree(made / "pack", tmp_path / "pack"))
    runtime = load(directory, mode=mode)
    with runtime.activate("sst2"):
        before = logits(runtime)
        file = directory / "tasks" / "cola.safetensors"
        tensors = load_file(file)
        save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, file)
        with pytest.raises(PackError, match="is damaged"):
            runtime.activate("cola")
        shutil.rmtree(directory)
        with pytest.raises(PackError, match=r"cola.safetensors is missing"):
            runtime.activate("cola")
        assert runtime.task == "sst2"
        torch.testing.assert_close(logits(runtime), before)
    runtime.activate("sst2")
    torch.testing.assert_close(logits(runtime), before)


def _run(target: Any) -> None:
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()


def test_a_cache_below_nothing(made: Path):
    with pytest.raises(RecipeError, match="cache: -1 is below 0"):
        load(made / "pack", cache=-1)


def test_a_manifest_in_place_of_its_pack(made: Path):
    with pytest.raises(PackError, match=r"is a file of a pack: give its folder"):
        load(made / "pack/pack.json")


def test_tasks_of_rows_may_be_a_generator(made: Path):
    with closing(load(made / "pack")) as runtime, torch.no_grad():
        rows, tasks = TOKENS.repeat(2, 1), ("cola", "sst2")
        expected = runtime(input_ids=rows, tasks=tasks).logits
        assert torch.equal(runtime(input_ids=rows, tasks=(t for t in tasks)).logits, expected)
