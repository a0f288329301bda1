"""Adapters as PEFT loads them, against the expert itself or fp64 arithmetic on whole deltas."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from personae import DTS, export, pack, unpack
from personae import load as in_use
from personae.run.work import Work
from toys import (
    load,
    perturb,
    toy_bert,
    toy_clip_vision,
    toy_gpt2,
    toy_llama,
    toy_roberta,
    toy_t5,
    toy_vit,
)

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(2, 12).reshape(2, 5)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
HEADS = ("classifier", "score", "lm_head")


class Family(NamedTuple):
    build: Callable[[Path], Path]
    of: str
    inputs: dict[str, Tensor]
    fan_in_fan_out: bool = False


FAMILIES = {
    "bert": Family(toy_bert, "BertForSequenceClassification", {"input_ids": IDS}),
    "roberta": Family(toy_roberta, "RobertaForSequenceClassification", {"input_ids": IDS}),
    "vit": Family(toy_vit, "ViTForImageClassification", {"pixel_values": PIXELS}),
    "clip": Family(toy_clip_vision, "CLIPVisionModel", {"pixel_values": PIXELS}),
    "gpt2": Family(toy_gpt2, "GPT2LMHeadModel", {"input_ids": IDS}, fan_in_fan_out=True),
    "llama": Family(toy_llama, "LlamaForCausalLM", {"input_ids": IDS}),
    "llama_tied": Family(
        lambda path: toy_llama(path, tied=True), "LlamaForCausalLM", {"input_ids": IDS}
    ),
    "t5": Family(
        toy_t5, "T5ForConditionalGeneration", {"input_ids": IDS, "decoder_input_ids": IDS}
    ),
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def model_of(family: Family, directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, family.of).from_pretrained(directory).eval()


def output(family: Family, model: Any) -> Tensor:
    with torch.no_grad():
        return model(**family.inputs)[0]


def adapted(family: Family, base: Path, adapter: Path) -> Tensor:
    """What PEFT computes; what it cannot find, or does not expect, is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing adapter keys|inconsistency).*")
        return output(family, PeftModel.from_pretrained(model_of(family, base), str(adapter)))


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers, without those of heads."""
    found = {name: module for name, module in model.named_modules() if is_layer(module)}
    return {name: one for name, one in found.items() if name.split(".")[0] not in HEADS}


def truncated(delta: Tensor, rank: int) -> Tensor:
    u, values, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ vh[:rank]


def approximate(family: Family, base: Path, expert: Path, rank: int, heads: bool) -> Any:
    """The base with deltas of linear layers at this rank, in fp64, and the expert's head."""
    model, tuned = model_of(family, base), model_of(family, expert)
    theirs = dict(tuned.named_modules())
    with torch.no_grad():
        for name, module in layers(model).items():
            weight: Any = module.weight
            delta: Any = theirs[name].weight.double() - weight.double()
            weight.copy_(weight.double() + truncated(delta, rank))
        for name, parameter in model.named_parameters():
            if heads and name.split(".")[0] in HEADS[:2]:
                parameter.copy_(tuned.get_parameter(name))
    return model


def without_biases(directory: Path) -> list[str]:
    """Names of all but the biases of linear layers, which no adapter carries."""
    state = load(directory)
    return [
        name
        for name in state
        if not (name.endswith(".bias") and state[name.removesuffix("bias") + "weight"].ndim == 2)
    ]


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text())


def told(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "personae.json").read_text())


@each_family
def test_at_full_rank_with_all_modules_it_is_the_expert(tmp_path: Path, family: Family) -> None:
    """Norms, embeddings (tied ones too), convolutions, class tokens and heads are saved whole."""
    base = family.build(tmp_path / "base")
    expert = perturb(base, tmp_path / "expert", 1, scale=0.1, names=without_biases(base))
    out = export(expert, tmp_path / "out", base=base, rank=16, save_modules=["all"])
    wanted = output(family, model_of(family, expert))
    assert not torch.allclose(wanted, output(family, model_of(family, base)), atol=1e-2)
    torch.testing.assert_close(adapted(family, base, out), wanted, rtol=1e-4, atol=1e-4)
    assert told(out)["left"] == [] and told(out)["lost"] < 1e-9
    assert config_of(out)["fan_in_fan_out"] == family.fan_in_fan_out


@each_family
def test_at_low_rank_it_is_what_lapack_gives(tmp_path: Path, family: Family) -> None:
    """Heads of classifiers come along, as PEFT expects them; all else is left out and told."""
    base = family.build(tmp_path / "base")
    expert = perturb(base, tmp_path / "expert", 2, scale=0.1)
    out = export(expert, tmp_path / "out", base=base, rank=3)
    wanted = output(family, approximate(family, base, expert, 3, heads="Sequence" in family.of))
    torch.testing.assert_close(adapted(family, base, out), wanted, rtol=1e-4, atol=1e-4)
    stored = load_file(out / "adapter_model.safetensors")
    ranks = {t.shape[0] for name, t in stored.items() if ".lora_A." in name}
    assert ranks == {3} and config_of(out)["r"] == config_of(out)["lora_alpha"] == 3


OTHERS = re.compile("emb|wte|wpe|shared|relative|lm_head|position|classifier")
"""Matrices that are no linear layers of blocks."""


@each_family
def test_an_exported_task_is_what_the_runtime_computes(tmp_path: Path, family: Family) -> None:
    """Merged, factored, in a mixed batch, unpacked and through PEFT: one answer."""
    base = family.build(tmp_path / "base")
    inner = [n for n, t in load(base).items() if t.ndim == 2 and not OTHERS.search(n)]
    experts = {t: perturb(base, tmp_path / t, n, 0.1, names=inner) for n, t in enumerate("ab")}
    packed = pack(base, experts, tmp_path / "pack", DTS(rank_fraction=0.5)).directory
    out = export(packed, tmp_path / "out", task="a", base=base, dtype="float32")
    wanted = output(family, model_of(family, unpack(packed, "a", tmp_path / "unpacked")))
    assert not torch.allclose(wanted, output(family, model_of(family, base)), atol=1e-3)
    torch.testing.assert_close(adapted(family, base, out), wanted, rtol=1e-4, atol=1e-4)
    for mode in ("merged", "factored"):
        runtime: Any = in_use(packed, mode=mode)
        with torch.no_grad(), runtime.activate("a"):
            torch.testing.assert_close(runtime(**family.inputs)[0], wanted, rtol=1e-4, atol=1e-4)
        twice = {name: torch.cat([one, one]) for name, one in family.inputs.items()}
        rows = len(wanted)
        with torch.no_grad():
            mixed = runtime(**twice, tasks=["b"] * rows + ["a"] * rows)[0]
        torch.testing.assert_close(mixed[rows:], wanted, rtol=1e-4, atol=1e-4)


def saved_adapter(family: Family, base: Path, directory: Path, **settings: Any) -> Tensor:
    """Save an adapter with random factors, and return what PEFT computes with it."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        model = get_peft_model(model_of(family, base), LoraConfig(**settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(str(directory))
        return output(family, model)


def test_an_adapter_is_written_again_without_patterns_and_scaling(tmp_path: Path) -> None:
    """Its own factors, at the largest of its ranks; rsLoRA's scaling is in them."""
    family, base = FAMILIES["llama"], toy_llama(tmp_path / "base")
    wanted = saved_adapter(
        family,
        base,
        tmp_path / "adapter",
        target_modules=["q_proj", "down_proj"],
        r=3,
        lora_alpha=5,
        use_rslora=True,
        rank_pattern={"down_proj": 4},
        task_type="CAUSAL_LM",
    )
    out = export(tmp_path / "adapter", tmp_path / "out", base=base)
    torch.testing.assert_close(adapted(family, base, out), wanted, rtol=1e-5, atol=1e-5)
    config = config_of(out)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert config["rank_pattern"] == {} and config["target_modules"] == ["down_proj", "q_proj"]
    before, after = (
        load_file(d / "adapter_model.safetensors") for d in (tmp_path / "adapter", out)
    )
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert torch.equal(after[name][:3], before[name]) and not after[name][3:].any()


def test_ranks_of_each_module_are_read_by_peft(tmp_path: Path) -> None:
    """GPT-2, whose modules differ in rank; energies are those of LAPACK's singular values."""
    family, base = FAMILIES["gpt2"], toy_gpt2(tmp_path / "base")
    expert = perturb(base, tmp_path / "expert", 3, scale=0.1)
    out = export(expert, tmp_path / "out", base=base, energy=0.7, rank_pattern=True)
    before, after = load(base), load(expert)
    wanted: dict[str, int] = {}
    model, state = model_of(family, base), load(base)
    for module in layers(model):
        name = f"{module}.weight"
        delta = after[name].double() - before[name].double()
        sums = torch.linalg.svdvals(delta).square().cumsum(0)
        wanted[module] = next(k + 1 for k, s in enumerate(sums) if s >= 0.7 * sums[-1])
        state[name] = (before[name].double() + truncated(delta, wanted[module])).float()
    assert config_of(out)["rank_pattern"] == config_of(out)["alpha_pattern"] == wanted
    assert len({*wanted.values()}) > 1 and config_of(out)["r"] == max(wanted.values())
    model.load_state_dict(state, strict=False)
    torch.testing.assert_close(
        adapted(family, base, out), output(family, model), rtol=1e-4, atol=1e-4
    )


def test_names_of_files_stand_where_transformers_cannot_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied embedding is left out then: under which name it is to be saved, too, nobody says."""
    monkeypatch.setattr("personae.commands.export_sources.build", lambda *_: None)
    family, base = FAMILIES["gpt2"], toy_gpt2(tmp_path / "base")
    expert = perturb(base, tmp_path / "expert", 1, scale=0.1)
    notes: list[str] = []
    work = Work(note=notes.append)
    out = export(expert, tmp_path / "out", base=base, rank=16, save_modules=["all"], work=work)
    assert "transformer.wte.weight" in told(out)["left"]
    assert any("tied to an output layer" in note for note in notes)
    assert config_of(out)["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    adapted(family, base, out)
