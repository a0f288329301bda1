"""How often merging and packing read each model, counted at the reader.

Merging: once a pass and once to merge. Packing: once to look, at base and experts side by side, and
once to code each expert, against the base.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from families import saved
from personae import (
    DRM,
    DTS,
    TIES,
    Average,
    MergeMethod,
    PackSettings,
    TaskArithmetic,
    Work,
    add_tasks,
    merge,
    pack,
)
from personae.checkpoints.safetensors_files import SafetensorsFiles
from personae.family.effects import PROBED

ROWS, WIDTH = 3000, 512  # two chunks


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Entries read of each model, by its folder's name."""
    counted: Counter[str] = Counter()
    read, read_rows = SafetensorsFiles.read, SafetensorsFiles.read_rows

    def whole(self: Any, name: str) -> torch.Tensor:
        tensor = read(self, name)
        counted[Path(self.source).name] += tensor.numel()
        return tensor

    def rows(self: Any, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = read_rows(self, name, start, stop)
        counted[Path(self.source).name] += tensor.numel()
        return tensor

    monkeypatch.setattr(SafetensorsFiles, "read", whole)
    monkeypatch.setattr(SafetensorsFiles, "read_rows", rows)
    return counted


def times(
    reads: Counter[str],
    method: MergeMethod,
    folder: Path,
    shape: tuple[int, ...],
    work: Work | None = None,
) -> dict[str, float]:
    """How often each of a base and two experts of one matrix in bf16 is read."""
    base, experts = family(folder, shape)
    merge(base, experts, folder / "out", method, work=work)
    return {name: reads[name] / math.prod(shape) for name in ("base", "a", "b")}


def family(folder: Path, shape: tuple[int, ...]) -> tuple[Path, dict[str, Path]]:
    """Base and experts of one matrix in bf16."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    paths: dict[str, Path] = {}
    for name in ("base", "a", "b"):
        noise = 0.1 * torch.randn(shape, generator=generator)
        paths[name] = saved({"l.weight": (base + noise).bfloat16()}, folder / name)
    return paths.pop("base"), paths


def test_a_mean_reads_each_expert_once_and_of_the_base_a_few_entries(reads, tmp_path: Path):
    found = times(reads, Average(), tmp_path, (ROWS, WIDTH))
    assert (found["a"], found["b"]) == (1, 1)
    assert found["base"] <= 2 * (PROBED + WIDTH) / (ROWS * WIDTH)


def test_a_sum_reads_each_model_once(reads, tmp_path: Path):
    found = times(reads, TaskArithmetic(scale=0.3), tmp_path, (ROWS, WIDTH))
    assert (found["a"], found["b"]) == (1, 1)
    assert 1 <= found["base"] <= 1 + 2 * (PROBED + WIDTH) / (ROWS * WIDTH)


def test_ties_reads_each_model_once_a_pass_and_once_to_merge(reads, tmp_path: Path):
    stages: set[str] = set()
    work = Work(workers=1, progress=lambda stage, *_: stages.add(stage))
    found = times(reads, TIES(density=0.2), tmp_path, (ROWS, WIDTH), work)
    passes = sum("thresholds" in stage for stage in stages)  # beside the sample, of a 64th
    assert 1 <= passes <= 2
    for name, often in found.items():
        assert passes + 1 <= often <= passes + 1.1, name


def test_drm_reads_each_expert_once(reads, tmp_path: Path):
    found = times(reads, DRM(), tmp_path, (96, 64))
    assert (found["a"], found["b"]) == (1, 1)


def test_packing_reads_experts_twice_and_the_base_once_and_for_each(reads, tmp_path: Path):
    entries = ROWS * WIDTH
    base, experts = family(tmp_path, (ROWS, WIDTH))
    pack(base, experts, tmp_path / "pack", DTS(rank_fraction=0.01))
    assert (reads["a"], reads["b"]) == (2 * entries, 2 * entries)
    probed = len(experts) * (PROBED + WIDTH)  # does what is decoded show?
    assert 3 * entries <= reads["base"] <= 3 * entries + probed
    reads.clear()
    added = family(tmp_path / "more", (ROWS, WIDTH))[1]["a"]
    add_tasks(tmp_path / "pack", {"c": added})
    assert reads["a"] == 2 * entries
    assert 2 * entries <= reads["base"] <= 2 * entries + probed


def test_packing_against_an_average_reads_it_as_a_base(reads, tmp_path: Path):
    entries = ROWS * WIDTH
    base, experts = family(tmp_path, (ROWS, WIDTH))
    settings = PackSettings(vector="difference", parameters={"rank_fraction": 0.01})
    pack(base, experts, tmp_path / "pack", settings=settings)
    # The base is looked at, and a few entries of it beside the average. Experts are looked at
    # beside the base, averaged, looked at beside the average, and coded.
    assert entries <= reads["base"] <= entries + 2 * (PROBED + WIDTH)
    assert reads["a"] == reads["b"] == 4 * entries
