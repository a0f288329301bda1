"""Plans: their figures are those of the files written, or bounds on them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, RobertaConfig

from families import saved, small_base, tuned
from personae._types import TensorSpec
from personae.checkpoints import built
from personae.commands.accounting import HEADER_BYTES
from personae.commands.pack import pack
from personae.commands.pack_plan import RECORD_BYTES, plan_family, plan_pack, plan_shapes
from personae.errors import BudgetError, RecipeError
from personae.family.architecture import specs_of_architecture, specs_of_shapes
from personae.family.opened import open_family
from personae.recipe import PackSettings
from personae.run.work import Work

DATA = Path(__file__).parents[1] / "data"
HALF = PackSettings(parameters={"rank_fraction": 0.5})


def test_the_figures_are_those_of_the_file_where_everything_changed(tmp_path):
    base = small_base()
    experts = {"x": tuned(base, 1) | {"head": torch.ones(5)}, "y": tuned(base, 2)}
    made = pack(base, experts, tmp_path / "p", settings=HALF)
    planned = plan_pack(base, experts, HALF, Work(workers=2))
    for name, task in planned.tasks.items():
        record = made.task(name)
        assert task.coded.bytes == record.coded_bytes
        assert task.private_bytes == record.private_bytes
        assert task.coded.amr_percent["amr_paper"] == pytest.approx(
            100 * record.counted_bits / (32 * record.base_parameters)
        )
    assert planned.tasks["x"].private == ("head",)
    assert planned.tasks["x"].private_bytes == 20
    # 320 + 192 + 16 + 96 + 1 fp32 numbers and 6 of 8 bytes, thrice; and the head
    assert planned.bytes_in == 3 * (4 * 625 + 48) + 20
    written = sum(record.bytes for record in made.manifest.tasks.values())
    assert (
        written
        <= planned.bytes_out
        == sum(
            task.coded.bytes
            + task.coded.mask_bytes
            + task.private_bytes
            + HEADER_BYTES
            + RECORD_BYTES * task.coded.tensors
            for task in planned.tasks.values()
        )
    )
    # Two workers on the two largest tensors, 20 x 16 and 16 x 12: the delta, in chunks 24 bytes an
    # entry, the delta scaled, and 32 bytes an entry of the Gram matrix of its side in fp64. Beside
    # them the parts of one task, and what is kept: 2 MiB by the process, 11 MiB by each worker.
    first, second = (4 + 24 + 4) * 320 + 32 * 16 * 16, (4 + 24 + 4) * 192 + 32 * 12 * 12
    parts = planned.tasks["x"].coded.bytes + planned.tasks["x"].coded.mask_bytes
    kept = (2 << 20) + 2 * (11 << 20)
    assert planned.peak_memory == parts + first + second + kept


@pytest.mark.parametrize("vector", ["task", "difference"])
def test_nothing_written_exceeds_the_plan(tmp_path, vector):
    """Also where exact zeros need masks: half-frozen convolutions, rows and columns."""
    base = small_base(dtype=torch.bfloat16) | {"wide.conv": torch.zeros(32, 32, 3, 3)}
    experts = {name: tuned(base, seed) for seed, name in enumerate("xyz", 1)}
    for expert in experts.values():
        expert["wide.conv"][:, ::2] = 0
        expert["layer.weight"][:, 1::2] = base["layer.weight"][:, 1::2]
        expert["embed.weight"][::3] = base["embed.weight"][::3]
        expert["embed.weight"] = torch.cat([expert["embed.weight"], torch.ones(4, 16)])
    settings = HALF.model_copy(update={"vector": vector})
    planned = plan_pack(base, experts, settings)
    made = pack(base, experts, tmp_path / "p", settings=settings)
    written = sum(record.bytes for record in made.manifest.tasks.values())
    if vector == "difference":
        written += (tmp_path / "p/reference/model.safetensors").stat().st_size
    assert written <= planned.bytes_out


def test_a_bound_on_memory_is_a_bound_on_the_plan(tmp_path):
    base = small_base()
    family = base, {"x": tuned(base, 1)}
    free = plan_pack(*family, HALF, Work(workers=2)).peak_memory
    one = plan_pack(*family, HALF, Work(workers=1)).peak_memory
    bounded, tight = (
        plan_pack(*family, HALF, Work(workers=2, memory=memory)).peak_memory
        for memory in (19_000, 18_432)
    )
    assert bounded == tight + 19_000 - 18_432
    assert one < tight < bounded < free
    with pytest.raises(BudgetError, match=r"largest tensor needs 18,432 bytes .* is 9,000"):
        plan_pack(*family, HALF, Work(workers=1, memory=9_000))


def test_a_large_private_tensor_is_in_the_memory_planned():
    base = small_base()
    planned = plan_pack(
        base, {"x": tuned(base, 1) | {"head": torch.ones(10_000)}}, HALF, Work(workers=1)
    )
    coded = planned.tasks["x"].coded
    looked_at = (4 + 12) * 10_000
    kept = (2 << 20) + (11 << 20)
    assert planned.peak_memory == coded.bytes + coded.mask_bytes + looked_at + kept


def test_a_plan_reads_no_weight(tmp_path, monkeypatch):
    path = saved(small_base(), tmp_path / "base")
    expert = saved(tuned(small_base(), 1), tmp_path / "x")
    with open_family(str(path), {"x": str(expert)}) as family:
        for checkpoint in (family.base, family.experts["x"].checkpoint):
            monkeypatch.setattr(checkpoint, "read", lambda name: pytest.fail(f"{name} was read"))
        assert plan_family(family, HALF, Work()).tasks["x"].coded.tensors == 5


def test_notes_tell_of_prefixes_and_private_tensors():
    base = small_base()
    expert = {f"model.{n}": t for n, t in tuned(base, 1).items()} | {"head": torch.ones(5)}
    assert plan_pack(base, {"x": expert}, HALF).notes == [
        "x: adds the prefix 'model.' to the base's tensor names",
        "x: kept whole as private (20 bytes): head",
    ]


def test_a_plan_prints_as_json():
    base = small_base()
    facts = json.loads(json.dumps(plan_pack(base, {"x": tuned(base, 1)}, HALF).to_json()))
    assert set(facts) == {"tasks", "bytes_in", "bytes_out", "peak_memory", "workers", "notes"}
    assert set(facts["tasks"]["x"]) == {"coded", "private_bytes", "private", "bytes_in"}


@pytest.mark.parametrize(
    ("config", "skip", "percent", "parameters"),
    [
        (GPT2Config(), (), 3.489, 124_439_808),
        (
            RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
            ("pooler.*",),
            3.808,
            124_055_040,
        ),
    ],
)
def test_published_figures_from_a_config(tmp_path, config, skip, percent, parameters):
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        planned = plan_shapes(specs_of_architecture(path, skip=skip), PackSettings())
        assert planned.parameters == parameters
        assert round(planned.amr_percent["amr_paper"], 3) == percent
        assert planned.rank_fraction == 0.3


def test_published_figures_from_shapes():
    shapes = json.loads((DATA / "openclip_vit_b32_image_encoder.json").read_text())
    planned = plan_shapes(specs_of_shapes(shapes), PackSettings())
    assert planned.parameters == 113_448_705
    assert round(planned.amr_percent["amr_paper"], 3) == 3.680
    assert round(planned.amr_percent["amr_paper_lean"], 3) == 2.457


def test_one_percent_of_a_published_model():
    """methods.md 3.4: largest r with AMR < 1 %, and the next breakpoint exceeds it."""
    shapes = json.loads((DATA / "openclip_vit_b32_image_encoder.json").read_text())
    settings = PackSettings(budget="1%", counting="amr_paper")
    planned = plan_shapes(specs_of_shapes(shapes), settings)
    assert planned.amr_percent["amr_paper"] == pytest.approx(0.993, abs=0.0075)
    assert planned.amr_percent["amr_paper"] <= 1
    assert planned.rank_fraction == pytest.approx(0.0690, abs=0.0007)
    steps = sorted(
        {j / w for w in {min(s) for s in shapes.values() if len(s) == 2} for j in range(1, w)}
    )
    later = next(step for step in steps if step > planned.rank_fraction)
    above = PackSettings(parameters={"rank_fraction": later})
    assert plan_shapes(specs_of_shapes(shapes), above).amr_percent["amr_paper"] > 1


def test_a_class_with_a_head_has_more_parameters(tmp_path):
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10)
    config.num_labels = 7
    config.save_pretrained(tmp_path)
    bare = specs_of_architecture(tmp_path)
    headed = specs_of_architecture(tmp_path, "AutoModelForSequenceClassification")
    assert sum(s.numel for s in headed) - sum(s.numel for s in bare) == 7 * 8
    assert TensorSpec("wte.weight", (10, 8), torch.float32) in bare


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        ("{}", "AutoModel", "transformers cannot build .* as AutoModel"),
        ('{"model_type": "gpt2"}', "AutoModle", "transformers has no class 'AutoModle'"),
        ('{"model_type": "gpt2"}', "TextStreamer", "transformers has no class 'TextStreamer'"),
        ('{"model_type": "gpt2", "n_layer": 1000000000}', "AutoModel", "more layers or labels"),
        ('{"model_type": "gpt2", "n_layer": "two"}', "AutoModel", "expected int, got str"),
        ("[]", "AutoModel", "holds no configuration"),
        ("[" * 9000, "AutoModel", "config.json cannot be read: it "),
        (None, "AutoModel", "config.json: there is no such file"),
    ],
)
def test_architectures_that_cannot_be_built(tmp_path, config, name, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(RecipeError, match=message):
        specs_of_architecture(tmp_path / "config.json", name)


def test_an_architecture_without_end_is_not_built_to_its_end(tmp_path, monkeypatch):
    """Layers of GPT-2 are of a dozen modules each."""
    GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=10).save_pretrained(tmp_path)
    monkeypatch.setattr(built, "_MOST_MODULES", 10)
    with pytest.raises(RecipeError, match="of more than 10 modules"):
        specs_of_architecture(tmp_path)
