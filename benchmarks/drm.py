"""Time of a whole DRM merge against LAPACK decomposing the same stacks and doing nothing else.

    python benchmarks/drm.py                               # eight experts, ViT-B/32's three shapes
    python benchmarks/drm.py --shape 768x768 --direction horizontal --repeats 5 --threads 1

For each weight shape (out x in) and direction: `drm_s` is the merge at the published defaults,
`svd_s` is `torch.linalg.svd(full_matrices=False)` of [W1 … WN] (horizontal) or [W1; …; WN]
(vertical), in fp32. The two run in turns; figures are medians. `cpu_s` is process time over all
threads: with `--threads 1` it barely depends on what else runs, with more threads it counts their
waiting too, so that wall time needs a quiet machine. Freed memory is kept, as the commands do. The
last row of each direction is the sum over a ViT-B/32: 48 weights of 768x768, 12 of 3072x768, 12 of
768x3072; it appears where all three were measured.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from personae.cli.allocator import keep_freed_memory
from personae.methods import MERGE_METHODS, Site, build, lookup
from setting import show

VIT_B_32 = {"768x768": 48, "3072x768": 12, "768x3072": 12}


@dataclass(frozen=True)
class Row:
    """One weight shape in one direction."""

    direction: str
    shape: str
    count: int
    drm_s: float
    drm_cpu_s: float
    svd_s: float
    svd_cpu_s: float
    faster_wall: float
    faster_cpu: float


def make(shape: tuple[int, int], experts: int) -> Tensor:
    """Task vectors whose singular values fall as i^-0.5, with some noise; seeded."""
    rows, columns = shape
    small = min(shape)
    draw = torch.Generator().manual_seed(0)
    decay = torch.arange(1, small + 1) ** -0.5
    stack = torch.empty(experts, rows, columns)
    for vector in stack:
        slow = torch.randn(rows, small, generator=draw) * decay
        slow = slow @ torch.randn(small, columns, generator=draw)
        noise = torch.randn(rows, columns, generator=draw)
        vector.copy_(1e-3 * (slow / slow.square().mean().sqrt() + 0.1 * noise))
    return stack


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds, processor seconds of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(text: str, direction: str, experts: int, repeats: int) -> Row:
    """Merge and decompose in turns; medians."""
    out, into = (int(side) for side in text.split("x"))
    stack = make((out, into), experts)
    beside = torch.cat(list(stack), dim=1 if direction == "horizontal" else 0)
    method = lookup(MERGE_METHODS, "drm")
    built, site = build(method, {"direction": direction}), Site("layer.weight", (out, into))
    works = (
        lambda: built.apply(stack, site=site),
        lambda: torch.linalg.svd(beside, full_matrices=False),
    )
    turns = [[timed(work) for work in works] for _ in range(repeats)]
    (drm, drm_cpu), (svd, svd_cpu) = (
        [statistics.median(column) for column in zip(*of_work, strict=True)]
        for of_work in zip(*turns, strict=True)
    )
    count = VIT_B_32.get(text, 1)
    return Row(direction, text, count, drm, drm_cpu, svd, svd_cpu, svd / drm, svd_cpu / drm_cpu)


def total(rows: list[Row]) -> Row:
    """The sum over a ViT-B/32."""
    drm, drm_cpu, svd, svd_cpu = (
        sum(row.count * getattr(row, name) for row in rows)
        for name in ("drm_s", "drm_cpu_s", "svd_s", "svd_cpu_s")
    )
    ratios = svd / drm, svd_cpu / drm_cpu
    return Row(rows[0].direction, "ViT-B/32", 1, drm, drm_cpu, svd, svd_cpu, *ratios)


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", help="OUTxIN of one weight, repeatable")
    parser.add_argument("--direction", action="append", choices=["horizontal", "vertical"])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    for work in (torch.linalg.svd, torch.linalg.eigh):  # the first call loads LAPACK
        work(torch.eye(64))
    rows: list[Row] = []
    for direction in options.direction or ["horizontal", "vertical"]:
        shapes = options.shape or list(VIT_B_32)
        found = [measure(text, direction, options.experts, options.repeats) for text in shapes]
        rows += [*found, total(found)] if set(shapes) == set(VIT_B_32) else found
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        show(
            f"DRM, {options.experts} experts, {options.threads} threads", [asdict(r) for r in rows]
        )


if __name__ == "__main__":
    main()
