"""Time of each step of the entry-wise methods, on one thread, beside a plain copy in memory.

    python benchmarks/entrywise.py                     # 3 experts, blocks of 2^18 entries
    python benchmarks/entrywise.py --experts 8 --entries 1048576 --json

A position is one entry of every expert. Task vectors are Gaussian noise; the sample that guesses
thresholds is as good as one of a model of half a billion weights. Figures are process time of the
one thread, which hardly depends on other load, and the least of `--repeats` turns; `copy` moves as
many bytes as an average reads and writes.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from personae.methods import MERGE_METHODS, MERGEKIT_METHODS, MergeMethod, Site, build, lookup
from setting import machine, show

_COPIES = 32


def steps(
    method: type[MergeMethod], settings: dict[str, Any], stack: Tensor
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every pass that a method takes but the sampled one, then the merge itself."""
    built, site = build(method, settings), Site("w", tuple(stack.shape[1:]))
    statistics = {}
    if method.has_passes():
        passes = built.passes(len(stack))
        given: Tensor | None = None
        try:
            while True:
                one = passes.send(given) if given is not None else next(passes)
                if one.sample > 1:
                    given = _COPIES * one.term(stack, built, site)
                    continue
                given = one.term(stack, built, site)
                yield one.name, lambda p=one: p.term(stack, built, site)
        except StopIteration as done:
            statistics = done.value
    yield "merge", lambda: built.apply(stack, statistics, site)


def nanoseconds(work: Callable[[], Any], entries: int, repeats: int) -> float:
    """Least thread time of a call, per position."""
    work()
    times: list[float] = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times) / entries * 1e9


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--entries", type=int, default=1 << 18)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    stack = 1e-3 * torch.randn(options.experts, options.entries // 256, 256, generator=draw)
    into, source = torch.empty(2, (options.experts + 1) * options.entries // 2)
    rows: list[dict[str, Any]] = []

    def add(method: str, step: str, work: Callable[[], Any]) -> None:
        taken = nanoseconds(work, options.entries, options.repeats)
        rows.append({"method": method, "step": step, "ns_per_position": taken})

    add("copy", "", lambda: into.copy_(source))
    cases: list[tuple[str, type[MergeMethod], dict[str, Any]]] = [
        (name, lookup(MERGE_METHODS, name), {})
        for name in ("average", "task_arithmetic", "ties", "dare", "dare_ties")
    ]
    for name in sorted(MERGEKIT_METHODS):
        settings = {"weight": 1.0} | (
            {} if name in ("linear", "task_arithmetic") else {"density": 0.2}
        )
        cases.append((f"mergekit {name}", MERGEKIT_METHODS[name], settings))
    for name, method, settings in cases:
        for step, work in steps(method, settings, stack):
            add(name, step, work)
    if options.json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    else:
        show(f"{options.experts} experts, {options.entries} entries", rows)


if __name__ == "__main__":
    main()
