"""Time and accuracy of `truncated_svd` against LAPACK's reduced SVD.

    python benchmarks/svd.py                      # squares and projections, σ_i ∝ i^-0.5
    python benchmarks/svd.py --shape 30522x384 --fraction 0.07 --decay noise --json

Other processes may use the machine: solvers run in turns, `--repeats` times, and each figure is the
median of its turns. `cpu_s` is process time over all threads: with `--threads 1` it barely depends
on the load. `matmul_s` is the wall time a square product needs for as many operations as the solver
(by its leading terms), timed in the same turn.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from personae._types import SVD
from personae.ops import svd as solvers

SHAPES = ["768x768", "768x3072", "1024x4096", "4096x4096"]


@dataclass(frozen=True)
class Row:
    """One solver on one matrix at one rank."""

    shape: str
    decay: str
    rank: int
    solver: str
    wall_s: float
    cpu_s: float
    speedup_wall: float
    speedup_cpu: float
    energy_missed: float
    matmul_s: float


def make(shape: tuple[int, int], decay: str) -> Tensor:
    """A matrix with σ_i ∝ i^-decay, or Gaussian noise; seeded."""
    generator = torch.Generator().manual_seed(0)
    out, into = shape
    noise = torch.randn(out, into, generator=generator)
    if decay == "noise":
        return noise
    small = min(shape)
    left, _ = torch.linalg.qr(torch.randn(out, small, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(into, small, generator=generator))
    return (left * torch.arange(1, small + 1).float() ** -float(decay)) @ right.T


def flops(solver: str, small: int, large: int, rank: int) -> float:
    """Leading terms: products, QR, eigendecompositions (9·n³ with vectors) of each solver."""
    finish = 2 * small * large * rank + 8 * large * rank**2
    if solver == "svd":
        return 6 * large * small**2 + 16 * small**3
    if solver == "gram":
        return 2 * small**2 * large + 9 * small**3 + finish
    basis = 2.5 * rank
    return 4 * small * large * basis + 4 * small * basis**2 + 9 * basis**3 + finish


def timed(work: Callable[[], SVD]) -> tuple[SVD, float, float]:
    """Result, wall seconds, CPU seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def matmul_seconds(operations: float) -> float:
    """Wall seconds of square fp32 products of that many operations, at the speed of a 1536² one."""
    square = torch.ones(1536, 1536)
    start = time.perf_counter()
    torch.mm(square, square)
    return (time.perf_counter() - start) * operations / (2 * 1536**3)


def measure(
    shape: tuple[int, int],
    decay: str,
    fractions: list[float],
    names: list[solvers.Solver],
    repeats: int,
) -> list[Row]:
    """Run LAPACK and every (solver, fraction) in turns; return one row each."""
    matrix = make(shape, decay)
    small, large = min(shape), max(shape)
    ranks = {int(fraction * small + 1e-9) for fraction in fractions}
    cases: dict[tuple[str, int], Callable[[], SVD]] = {
        ("svd", small): lambda: SVD(*torch.linalg.svd(matrix, full_matrices=False))
    }
    for rank in sorted(ranks):
        for name in names:
            cases[name, rank] = lambda name=name, rank=rank: solvers.truncated_svd(
                matrix, rank, solver=name
            )
    runs: dict[tuple[str, int], list[tuple[float, float, float]]] = {case: [] for case in cases}
    results: dict[tuple[str, int], SVD] = {}
    for _ in range(repeats):
        for case, work in cases.items():
            results[case], wall, cpu = timed(work)
            runs[case].append((wall, cpu, matmul_seconds(flops(case[0], small, large, case[1]))))
    exact = results["svd", small].singular_values.double().square()
    baseline = [statistics.median(column) for column in zip(*runs["svd", small], strict=True)]
    rows: list[Row] = []
    for (name, rank), found in runs.items():
        wall, cpu, product = (statistics.median(column) for column in zip(*found, strict=True))
        captured = (results[name, rank].u.T @ matrix).double().square().sum()
        missed = 1 - float(captured / exact[:rank].sum())
        rows.append(
            Row(
                f"{shape[0]}x{shape[1]}",
                decay,
                rank,
                name,
                wall,
                cpu,
                baseline[0] / wall,
                baseline[1] / cpu,
                missed,
                product,
            )
        )
    return rows


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", help="OUTxIN, repeatable")
    parser.add_argument("--fraction", action="append", type=float, help="rank fraction, repeatable")
    parser.add_argument("--solver", action="append", choices=get_args(solvers.Solver))
    parser.add_argument("--decay", default="0.5", help="exponent of the spectrum, or 'noise'")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.linalg.svd(torch.eye(64))  # the first call loads LAPACK
    rows: list[Row] = []
    for text in options.shape or SHAPES:
        out, into = (int(side) for side in text.split("x"))
        rows += measure(
            (out, into),
            options.decay,
            options.fraction or [0.07, 0.3],
            options.solver or ["auto", "randomised", "gram"],
            options.repeats,
        )
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    table = Table(*Row.__dataclass_fields__)
    for row in rows:
        table.add_row(
            *(
                f"{value:.3g}" if isinstance(value, float) else str(value)
                for value in asdict(row).values()
            )
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
