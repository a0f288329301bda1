"""What plans say of memory: by hand, and beside every allocation while a tensor is worked on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from families import State, as_many, saved
from memory_count import peak_bytes
from personae._types import TensorSpec
from personae.commands import merge as merging
from personae.commands.merge_job import open_to_merge, prepare
from personae.family.deltas import Deltas
from personae.family.opened import open_family
from personae.methods import CODECS, MERGE_METHODS, Codec
from personae.methods.codecs.svd import SVD
from personae.ops.svd import svd_bytes
from personae.packs.shared_file import SharedFile
from personae.recipe import MergeSettings
from personae.run.costs import (
    checking_bytes,
    coding_bytes,
    delta_bytes,
    rebuilding_bytes,
    scanning_bytes,
    sharing_bytes,
)
from personae.run.encode import _encode_tensor  # pyright: ignore[reportPrivateUsage]
from personae.run.known import Known
from personae.run.passes import passes_over_expert
from personae.run.scan import ExpertScan, TensorScan
from personae.run.undecided import UndecidedEntries
from personae.run.work import Work
from personae.writers import CheckpointWriter

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPE = 24_000, 128  # tall, as an embedding is; a few MiB
EXPERTS = ("a", "b")
WORKSPACES = 1.1
"""Room for what LAPACK takes to work in, which its makers choose by processor."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Workers compute on one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    peak_bytes(lambda: None)  # imports
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base and two experts on disk, bf16."""
    folder = tmp_path_factory.mktemp("family")
    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    made: dict[str, str] = {"base": str(saved(state(base), folder / "base"))}
    for seed, name in enumerate(EXPERTS, 1):
        change = 1e-2 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        made[name] = str(saved(state(base + change), folder / name))
    return made


def state(tensor: torch.Tensor) -> State:
    return {NAME: tensor.bfloat16()}


def spec(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (40, 30)) -> TensorSpec:
    return TensorSpec("w", shape, dtype)


def test_reading_by_hand():
    # 1,200 entries: 4 bytes each of the delta, 12 of rows on the way; a file's own bytes; fp8 is
    # looked at in fp32.
    assert delta_bytes(1200) == 4 * 1200 + 12 * 1200
    assert checking_bytes(spec(torch.bfloat16)) == 2 * 1200
    assert checking_bytes(spec(torch.float8_e4m3fn)) == 1200 + 4 * 1200
    assert scanning_bytes(spec()) == 16 * 1200
    # Beyond 2^20 entries rows are read in blocks of that many.
    assert delta_bytes(1 << 22) == 4 * (1 << 22) + 12 * (1 << 20)
    # Three deltas and what is shared; blocks of rows.
    assert sharing_bytes(1200, 3) == 4 * 4 * 1200 + 48 * 1200


def test_a_decomposition_by_hand():
    # 500 x 10 at rank 2: the matrix scaled; in fp64 (32 bytes an entry of 10 x 10), its Gram
    # matrix beside all 500 rows, or four times both factors.
    exact, factors = 8 * 100 + 8 * 10 * 500, 4 * 100 + 16 * 2 * 510
    assert svd_bytes((500, 10), 2) == 4 * 5000 + max(32 * 100, exact, factors)
    # Of a wide one, too; of a tall one 1,024 rows are in fp64 at a time.
    assert svd_bytes((10, 5000), 2) == 4 * 50_000 + 8 * 100 + 8 * 50_000
    assert svd_bytes((5000, 10), 1) == 4 * 50_000 + max(8 * 100 + 8 * 10_240, 400 + 16 * 5010)
    assert svd_bytes((500, 10), 2, "full") == 4 * 5000 + 8 * 5000 + 8 * 100
    assert svd_bytes((500, 10), 0) == 0


def test_coding_by_hand():
    bitdelta = made("bitdelta")
    # All is coded: the delta; 8 bytes an entry, and 24 on the way in chunks.
    assert coding_bytes([bitdelta], spec()) == (4 + 8 + 24) * 1200
    # Kept exact: the delta, its copy, what is decoded.
    exact = CODECS["bitdelta"]()
    assert coding_bytes([exact], spec()) == (12 + 24) * 1200
    # Rank 3 of 40 x 30: the decomposition is more than factors and product.
    svd = SVD(rank_fraction=0.1)
    most = max(svd_bytes((40, 30), 3), 4 * 1200 + 14 * 3 * 70)
    assert coding_bytes([svd], spec()) == 4 * 1200 + 24 * 1200 + most
    # Decoded again: the reference's own bytes, the product and its factors.
    assert rebuilding_bytes(svd, spec(), [3]) == 24 * 1200 + 4 * 1200 + max(
        8 * 1200, 4 * 1200 + 14 * 3 * 70
    )


CODED: dict[str, dict[str, Any]] = {
    "bitdelta": {"tensors": "all"},
    "delta_come": {"tensors": "all"},
    "residual": {"gain": 15.0},
    "ultradelta": {"tensors": "all", "rescale": "none"},
    "tsv_c": {"tasks": 4},
}


def made(name: str) -> Codec:
    return CODECS[name](**CODED.get(name, {}))


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_codec_takes_what_is_planned(name: str, paths: dict[str, str]):
    codec = made(name)
    with open_family(paths["base"], {n: paths[n] for n in EXPERTS}) as family:
        deltas = [Deltas(expert, family.base, True) for expert in family.experts.values()]
        known = Known("a", _shared(codec, deltas) if codec.shares else None)
        scan = ExpertScan({NAME: TensorScan(True)}, (), "")
        found = passes_over_expert(codec, deltas[0], scan, known, Work(workers=1))
        known = Known("a", known.shared, found)
        cpu, planned = torch.device("cpu"), coding_bytes([codec], family.base.specs[NAME])
        _encode_tensor(deltas[0], [codec], known, cpu, NAME)  # libraries take what they keep
        counted = peak_bytes(lambda: _encode_tensor(deltas[0], [codec], known, cpu, NAME))
    most = 1.5 if codec.shares else 1.3  # masks that mark less than half take more than these do
    assert counted / WORKSPACES <= planned <= most * counted * WORKSPACES


def _shared(codec: Codec, deltas: list[Deltas]) -> SharedFile:
    """What all tasks share, made before anything is counted: packs map it from its file."""
    made = SharedFile.__new__(SharedFile)
    tensor = codec.share([one.read(NAME) for one in deltas])
    made.read = lambda _: tensor  # pyright: ignore[reportAttributeAccessIssue]
    return made


METHODS = sorted(set(MERGE_METHODS) - {"core_space"})  # of adapters alone


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_takes_what_is_planned(method: str, paths: dict[str, str], tmp_path: Path):
    parameters = {"steps": 2} if method == "wudi" else {}
    settings = MergeSettings(method=method, parameters=parameters)
    experts = as_many(MERGE_METHODS[method], {n: paths[n] for n in EXPERTS})
    with open_to_merge(paths["base"], experts, settings) as family:
        job = prepare(family, settings)
        statistics = merging._statistics(job, tmp_path, Work(workers=1))  # pyright: ignore[reportPrivateUsage]
        undecided, cpu = UndecidedEntries(tmp_path, per_tensor=job.per_tensor), torch.device("cpu")
        ratios: list[float] = []
        for item in job.items[:1]:

            def run(item: Any = item) -> None:
                with CheckpointWriter(tmp_path / "out", job.specs, again=True) as writer:
                    merging._merge_item(  # pyright: ignore[reportPrivateUsage]
                        job, statistics, writer, undecided, cpu, set(), item
                    )
                    for chunk in {p for u in job.items if u is not item for p in u.chunks}:
                        writer.mark(chunk.spec.name, chunk.start, chunk.stop)

            (tmp_path / "out").mkdir(exist_ok=True)
            run()
            job.stacks._own.__dict__.clear()  # pyright: ignore[reportPrivateUsage]
            # Passes over each tensor alone are taken by whoever merges it.
            counted = job.counting_bytes(item) if job.per_tensor else 0
            ratios.append(max(job.cost(item), counted) / peak_bytes(run))
    most = 1.6 if method == "consensus" else 1.3  # its fp64 rows leave holes between blocks
    least, most = 1 / WORKSPACES, most * WORKSPACES
    assert [ratio for ratio in ratios if not least <= ratio <= most] == []


class OnThisThread(Work):
    """Work on the thread that asks: what other threads take is not counted."""

    def map(self, items: Any, function: Any, **_: Any) -> Iterator[Any]:
        """See `Work.map`."""
        return ((item, function(item)) for item in items)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
@pytest.mark.parametrize("experts", [2, 6])
def test_passes_take_no_more_than_is_planned(method: str, experts: int, tmp_path: Path):
    """Magnitudes of fp32 spread over a window of 10^5 patterns, each counted for each expert."""
    shape = (1024, 1024)
    for name in range(experts + 1):
        draw = torch.Generator().manual_seed(name)
        saved({"w": torch.randn(shape, generator=draw)}, tmp_path / str(name))
    given = {f"e{n}": str(tmp_path / str(n)) for n in range(1, experts + 1)}
    parameters = {"trim": 0.2} if method == "dare_ties" else {}
    settings = MergeSettings(method=method, parameters=parameters)
    with open_to_merge(str(tmp_path / "0"), given, settings) as family:
        job = prepare(family, settings)
        planned = job.counting_bytes(job.items[0])
        alone = OnThisThread(workers=1)

        def run() -> None:
            merging._statistics(job, tmp_path, alone)  # pyright: ignore[reportPrivateUsage]
            for file in tmp_path.glob("statistics-*"):
                file.unlink()

        run()
        taken = peak_bytes(run)
    # How far they spread headers do not tell: at most 2^17 patterns are counted for each.
    assert taken / WORKSPACES <= planned <= 3 * taken
