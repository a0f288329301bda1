"""How often a merge reads each model: once a pass and once to merge, counted at the reader."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from families import saved
from personae import DRM, TIES, Average, MergeMethod, TaskArithmetic, Work, merge
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
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    paths = {}
    for name in ("base", "a", "b"):
        noise = 0.1 * torch.randn(shape, generator=generator)
        paths[name] = saved({"l.weight": (base + noise).bfloat16()}, folder / name)
    merge(paths.pop("base"), paths, folder / "out", method, work=work)
    return {name: reads[name] / base.numel() for name in ("base", "a", "b")}


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
