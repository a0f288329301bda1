"""Pack, unpack, compare with the plain way of doing it; to the bit."""

import json
import shutil

import pytest
import torch
from oracle import assert_same, rebuilt

from families import State, listing, saved, small_base, tuned
from personae.commands.pack import pack, pack_many
from personae.commands.unpack import unpack
from personae.methods.codecs.dts import DTS
from personae.methods.codecs.svd import SVD
from personae.recipe import PackSettings
from personae.run.work import Work
from toys import load

HALF = PackSettings(parameters={"rank_fraction": 0.5})
CODECS = {
    "dts": (DTS(rank_fraction=0.5), HALF),
    "dts, 1 bit": (
        DTS(rank_fraction=0.5, thresholding=False),
        PackSettings(parameters={"rank_fraction": 0.5, "thresholding": False}),
    ),
    "dts, convolutions as matrices": (
        DTS(rank_fraction=0.4, conv="matrix", grouping="vector"),
        PackSettings(parameters={"rank_fraction": 0.4, "conv": "matrix", "grouping": "vector"}),
    ),
    "svd": (SVD(rank_fraction=0.5), PackSettings(method="svd", parameters={"rank_fraction": 0.5})),
}


def _there_and_back(base: State, expert: State, folder, settings=HALF, **work) -> State:
    pack(base, {"x": expert}, folder / "p", settings=settings, work=Work(**work))
    unpack(folder / "p", "x", folder / "out", base=base, work=Work(**work))
    return load(folder / "out")


@pytest.mark.parametrize("codec", CODECS)
def test_every_kind_of_tensor(tmp_path, codec):
    base = small_base()
    expert = tuned(base, 1)
    plain, settings = CODECS[codec]
    found = _there_and_back(base, expert, tmp_path, settings)
    assert_same(found, rebuilt(plain, base, expert))
    assert torch.equal(found["scale"], expert["scale"])  # a scalar is exact


def test_stacked_projections_coded_apart(tmp_path):
    base = small_base() | {"attn.c_attn.weight": torch.zeros(8, 24)}
    expert = tuned(base, 1)
    settings = PackSettings(parameters={"rank_fraction": 0.5, "qkv": "split"})
    found = _there_and_back(base, expert, tmp_path, settings)
    assert_same(found, rebuilt(DTS(rank_fraction=0.5, qkv="split"), base, expert))
    record = json.loads((tmp_path / "p/pack.json").read_text())["tasks"]["x"]["tensors"]
    blocks = record["attn.c_attn.weight"]["blocks"]
    assert [(b["axis"], b["start"], b["stop"]) for b in blocks] == [
        (1, 0, 8),
        (1, 8, 16),
        (1, 16, 24),
    ]


@pytest.mark.parametrize(
    ("of_base", "of_expert"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
)
def test_dtypes(tmp_path, of_base, of_expert):
    base = small_base(dtype=of_base)
    wide = tuned({n: t.float() if t.is_floating_point() else t for n, t in base.items()}, 1)
    expert = {n: t.to(of_expert) if t.is_floating_point() else t for n, t in wide.items()}
    found = _there_and_back(base, expert, tmp_path)
    assert_same(found, rebuilt(DTS(rank_fraction=0.5), base, expert))


def test_mixed_dtypes_in_one_expert(tmp_path):
    base = small_base(dtype=torch.bfloat16)
    expert = tuned(base, 1)
    expert["layer.bias"] = expert["layer.bias"].float() + 1e-4
    found = _there_and_back(base, expert, tmp_path)
    assert_same(found, rebuilt(DTS(rank_fraction=0.5), base, expert))
    assert found["layer.bias"].dtype == torch.float32


@pytest.mark.parametrize("names", [("layer.weight",), ("scale",), ("conv.weight", "layer.bias")])
def test_unchanged_tensors_cost_nothing_and_come_back_as_they_were(tmp_path, names):
    base = small_base()
    expert = tuned(base, 1, names=names)
    made = pack(base, {"x": expert}, tmp_path / "p", settings=HALF)
    assert set(made.task("x").tensors) == set(names)
    unpack(tmp_path / "p", "x", tmp_path / "out", base=base)
    found = load(tmp_path / "out")
    for name in base.keys() - set(names):
        assert torch.equal(found[name], base[name]), name
    assert_same(found, rebuilt(DTS(rank_fraction=0.5), base, expert))


def test_untouched_embedding_rows_come_back_as_they_were(tmp_path):
    base = small_base()
    expert = tuned(base, 1)
    expert["embed.weight"][5:15] = base["embed.weight"][5:15]
    found = _there_and_back(base, expert, tmp_path)
    assert torch.equal(found["embed.weight"][5:15], base["embed.weight"][5:15])
    assert not torch.equal(found["embed.weight"][:5], base["embed.weight"][:5])
    assert_same(found, rebuilt(DTS(rank_fraction=0.5), base, expert))


def test_exact_zeros_of_a_bias_come_back_as_zeros(tmp_path):
    base = small_base()
    expert = tuned(base, 1)
    for name in ("layer.bias", "conv.weight"):
        expert[name].flatten()[::3] = base[name].flatten()[::3]
    found = _there_and_back(base, expert, tmp_path)
    for name in ("layer.bias", "conv.weight"):
        assert torch.equal(found[name].flatten()[::3], base[name].flatten()[::3])


def test_integer_buffers_that_differ_are_kept(tmp_path):
    base = small_base() | {"mask": torch.tensor([True, False]), "same": torch.tensor([3, 4])}
    expert = tuned(base, 1) | {"position_ids": torch.tensor([[9, 8, 7, 6, 5, 4]])}
    found = _there_and_back(base, expert, tmp_path)
    assert_same(found, rebuilt(DTS(rank_fraction=0.5), base, expert))


def test_an_integer_buffer_of_another_width_keeps_it(tmp_path):
    base = small_base()
    expert = tuned(base, 1) | {"position_ids": torch.arange(6, dtype=torch.int32).reshape(1, 6)}
    found = _there_and_back(base, expert, tmp_path)
    assert found["position_ids"].dtype == torch.int32
    assert torch.equal(found["position_ids"], expert["position_ids"])


def test_heads_and_grown_vocabularies_come_back_whole(tmp_path):
    base = small_base() | {"head.weight": torch.zeros(2, 4)}
    expert = tuned(small_base(), 1) | {"head.weight": torch.randn(5, 4), "head.bias": torch.ones(5)}
    extra = torch.randn(3, 16)
    shared = rebuilt(
        DTS(rank_fraction=0.5), base, {n: t for n, t in expert.items() if n in small_base()}
    )
    expert["embed.weight"] = torch.cat([expert["embed.weight"], extra])
    found = _there_and_back(base, expert, tmp_path)
    shared["embed.weight"] = torch.cat([shared["embed.weight"], extra])
    heads = {name: expert[name] for name in ("head.weight", "head.bias")}
    assert_same(found, shared | heads)


def test_extra_rows_keep_a_dtype_finer_than_the_base(tmp_path):
    base = small_base(dtype=torch.bfloat16)
    expert = {n: t.float() if t.is_floating_point() else t for n, t in tuned(base, 1).items()}
    extra = torch.full((2, 16), 1 + 2**-12)  # no bfloat16 value
    expert["embed.weight"] = torch.cat([base["embed.weight"].float(), extra])  # the rest unchanged
    found = _there_and_back(base, expert, tmp_path)
    assert torch.equal(found["embed.weight"], expert["embed.weight"])


def test_names_with_wrapper_and_prefix_come_back_without_the_wrapper(tmp_path):
    base = small_base()
    expert = tuned(base, 1)
    named = {f"module.model.{name}": tensor for name, tensor in expert.items()}
    named["module.model.scale"] = named.pop("module.model.scale")
    found = _there_and_back(base, named, tmp_path)
    plain = rebuilt(DTS(rank_fraction=0.5), base, expert)
    assert_same(found, {f"model.{name}": tensor for name, tensor in plain.items()})


def test_an_expert_without_the_prefix_of_the_base(tmp_path):
    base = {f"bert.{name}": tensor for name, tensor in small_base().items()}
    expert = {n.removeprefix("bert."): t for n, t in tuned(base, 1).items()}
    found = _there_and_back(base, expert, tmp_path)
    plain = {n.removeprefix("bert."): t for n, t in base.items()}
    assert_same(found, rebuilt(DTS(rank_fraction=0.5), plain, expert))


def test_tied_tensors_stay_tied(tmp_path):
    base = small_base()
    expert = tuned(base, 1)
    tied = expert | {"lm_head.weight": expert["embed.weight"]}
    made = pack(base, {"x": tied}, tmp_path / "p")
    assert made.task("x").tied == {"lm_head.weight": "embed.weight"}
    assert made.task("x").private == {}
    unpack(tmp_path / "p", "x", tmp_path / "out", base=base)
    assert set(load(tmp_path / "out")) == set(base)


def test_skipped_tensors_are_the_bases(tmp_path):
    base = small_base()
    expert = tuned(base, 1) | {"head.weight": torch.ones(2, 2), "embed.weight": torch.ones(3, 3)}
    settings = PackSettings(parameters={"rank_fraction": 0.5}, skip=("embed.*", "head.*"))
    found = _there_and_back(base, expert, tmp_path, settings)
    kept = {n: t for n, t in expert.items() if n != "head.weight"}
    kept["embed.weight"] = base["embed.weight"]
    expected = rebuilt(DTS(rank_fraction=0.5), base, kept)
    assert_same(found, expected)


def test_tensors_kept_private_on_request_are_exact(tmp_path):
    base = small_base()
    expert = tuned(base, 1)
    settings = PackSettings(parameters={"rank_fraction": 0.5}, private=("layer.*",))
    found = _there_and_back(base, expert, tmp_path, settings)
    expected = rebuilt(DTS(rank_fraction=0.5), base, expert)
    exact = {name: expert[name] for name in ("layer.weight", "layer.bias")}
    assert_same(found, expected | exact)


def test_pickled_experts(tmp_path):
    base = small_base()
    expert = tuned(base, 1)
    torch.save(expert, tmp_path / "pytorch_model.bin")
    pack(base, {"x": str(tmp_path / "pytorch_model.bin")}, tmp_path / "p", settings=HALF)
    unpack(tmp_path / "p", "x", tmp_path / "out", base=base)
    assert_same(load(tmp_path / "out"), rebuilt(DTS(rank_fraction=0.5), base, expert))


def test_one_worker_and_three_write_the_same_bytes(tmp_path):
    base = saved(
        small_base() | {f"h.{n}.weight": torch.randn(16, 16) for n in range(6)}, tmp_path / "b"
    )
    experts = {n: str(saved(tuned(load(base), s), tmp_path / n)) for s, n in enumerate("xyz", 1)}
    for workers in (1, 3):
        pack(
            str(base), experts, tmp_path / f"p{workers}", settings=HALF, work=Work(workers=workers)
        )
        unpack(tmp_path / f"p{workers}", "y", tmp_path / f"y{workers}", work=Work(workers=workers))
    assert listing(tmp_path / "p1") == listing(tmp_path / "p3")
    assert listing(tmp_path / "y1") == listing(tmp_path / "y3")


def test_a_memory_bound_changes_no_byte(tmp_path):
    base = small_base()
    expert = tuned(base, 1)
    pack(base, {"x": expert}, tmp_path / "p")
    pack(base, {"x": expert}, tmp_path / "q", work=Work(workers=3, memory=18_432))
    assert listing(tmp_path / "p") == listing(tmp_path / "q")


def test_a_sweep_gives_what_packs_of_their_own_give(tmp_path):
    """To the bit at the largest rank; at smaller ones a subspace of more vectors was searched."""
    base = small_base()
    experts = {"x": tuned(base, 1), "y": tuned(base, 2)}
    asked = {
        "tenth": PackSettings(parameters={"rank_fraction": 0.1}),
        "by size": PackSettings(budget="1050B", counting="on_disk_native"),
        "half": HALF,
    }
    many = pack_many(base, experts, {tmp_path / "many" / n: s for n, s in asked.items()})
    for swept, (name, settings) in zip(many, asked.items(), strict=True):
        alone = pack(base, experts, tmp_path / "one" / name, settings=settings)
        for task in experts:
            assert swept.task(task).bytes == alone.task(task).bytes
            assert swept.task(task).parameters == alone.task(task).parameters
            for tensor, record in alone.task(task).tensors.items():
                found = swept.task(task).tensors[tensor]
                assert found.blocks == record.blocks
                assert found.relative_error == pytest.approx(record.relative_error, rel=1e-5)
    assert listing(tmp_path / "many/half") == listing(tmp_path / "one/half")


@pytest.mark.parametrize("method", ["dts", "svd"])
def test_a_sweep_decomposes_each_matrix_once(tmp_path, monkeypatch, method):
    codec = {"dts": DTS, "svd": SVD}[method]
    ranks: list[int] = []
    decompose = codec.decompose
    monkeypatch.setattr(
        codec,
        "decompose",
        lambda self, delta, rank: ranks.append(rank) or decompose(self, delta, rank),
    )
    base = small_base()
    fractions = {
        tmp_path / f"{r}": PackSettings(method=method, parameters={"rank_fraction": r})
        for r in (0.1, 0.3, 0.5)
    }
    pack_many(base, {"x": tuned(base, 1)}, fractions, work=Work(workers=1))
    # embed (20, 16) and layer (16, 12) at the largest fraction: 8 and 6 triplets
    assert sorted(ranks) == [6, 8]


def test_packs_move_and_their_base_is_given(tmp_path):
    base = saved(small_base(), tmp_path / "base")
    expert = tuned(load(base), 1)
    pack(str(base), {"x": expert}, tmp_path / "p", settings=HALF)
    shutil.move(tmp_path / "p", tmp_path / "moved")
    shutil.move(base, tmp_path / "elsewhere")
    unpack(tmp_path / "moved", "x", tmp_path / "out", base=str(tmp_path / "elsewhere"))
    assert_same(load(tmp_path / "out"), rebuilt(DTS(rank_fraction=0.5), small_base(), expert))


def test_shards_hold_what_one_file_holds(tmp_path):
    base = small_base()
    pack(base, {"x": tuned(base, 1)}, tmp_path / "p")
    unpack(tmp_path / "p", "x", tmp_path / "one", base=base)
    unpack(tmp_path / "p", "x", tmp_path / "many", base=base, shard_bytes=1000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert_same(load(tmp_path / "many"), load(tmp_path / "one"))
