"""Seconds and memory that packing takes, beside the same loop with LAPACK's reduced SVD.

    python benchmarks/packing.py                             # eight experts of ViT-B/32's shapes
    python benchmarks/packing.py --width 96 --layers 2       # a smoke test

The checkpoints are written to `runs/bench` once (3.2 GB for the default) and used again. Each run
is a process of its own, so that peaks are clean. `read_s` is the first pass over base and experts
(fingerprints, finite?, changed?), `pack_s` what follows; both are per expert, and `read_s` has the
base in it. `full` is `torch.linalg.svd(full_matrices=False)` (codec parameter `solver`), on
`--full-experts` of them, as it takes long.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from personae import PackSettings, Work, inspect, pack
from setting import RUNS, machine, make_family, peak_memory, show


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Pack the family into a temporary directory on the same disk; one row."""
    base, experts = make_family(options.width, options.layers, options.experts)
    read_until = 0.0

    def progress(stage: str, _done: int, _total: int) -> None:
        nonlocal read_until
        if stage == "reading the family":
            read_until = time.perf_counter()

    parameters = {"rank_fraction": options.rank_fraction, "solver": options.solver}
    settings = PackSettings(parameters=parameters)
    work = Work(workers=options.workers, memory=options.memory, progress=progress)
    with tempfile.TemporaryDirectory(dir=RUNS) as folder, peak_memory() as peaks:
        start = time.perf_counter()
        opened = pack(base, experts, Path(folder) / "pack", settings=settings, work=work)
        end = time.perf_counter()
        described = inspect(opened.directory)["tasks"].values()
        manifest_bytes = (opened.directory / "pack.json").stat().st_size
    return {
        "solver": options.solver,
        "experts": len(experts),
        "workers": work.threads,
        "read_s": (read_until - start) / len(experts),
        "pack_s": (end - read_until) / len(experts),
        "total_s": (end - start) / len(experts),
        "peak_rss_mb": peaks["rss"] / 1e6,
        "peak_anonymous_mb": peaks["anonymous"] / 1e6,
        "task_mb": sum(one["bytes"] for one in described) / len(described) / 1e6,
        "manifest_mb": manifest_bytes / len(experts) / 1e6,
        "relative_error": sum(one["relative_error"] for one in described) / len(described),
    }


def in_process(options: argparse.Namespace, solver: str, experts: int) -> dict[str, Any]:
    """The same measurement in a process of its own."""
    given = vars(options) | {"solver": solver, "experts": experts}
    kept = ("width", "layers", "rank_fraction", "workers", "memory", "solver", "experts")
    words = [f"--{k.replace('_', '-')}={given[k]}" for k in kept if given[k] is not None]
    command = [sys.executable, __file__, "--child", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--full-experts", type=int, default=1, help="for solver full; 0: leave out")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank-fraction", type=float, default=0.07)
    parser.add_argument("--workers", type=int, help="one a core by default")
    parser.add_argument("--memory", type=int, help="bound on working memory, in bytes")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--solver", default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options)))
        return
    make_family(options.width, options.layers, options.experts)
    rows = [in_process(options, options.solver, options.experts)]
    if options.full_experts:
        rows.append(in_process(options, "full", options.full_experts))
    if options.json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=1))
        return
    show(f"packing, rank fraction {options.rank_fraction}; seconds per expert", rows)


if __name__ == "__main__":
    main()
