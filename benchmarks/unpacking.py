"""Time of `unpack` over that of a plain copy of the reference.

    python benchmarks/unpacking.py                           # an expert of ViT-B/32's shapes
    python benchmarks/unpacking.py --width 96 --layers 2     # a smoke test

The copy reads every weight file of the reference, writes the same bytes and syncs file and folder
to disk, as `unpack` does. Both run in turns, `--repeats` times, after one round that fills the page
cache; figures are medians. `unpack` also hashes the reference and the task file, decodes and adds.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from personae import PackSettings, Work, pack, unpack
from setting import RUNS, machine, make_family, show

BUFFER = 16 << 20


def plain_copy(source: Path, target: Path) -> None:
    """Copy the weight files through memory and sync them, and their folder, to disk."""
    target.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb") as read, (target / file.name).open("wb", buffering=0) as write:
            while data := read.read(BUFFER):
                write.write(data)
            os.fsync(write.fileno())
    folder = os.open(target, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def timed(work: Callable[[Path], object], out: Path) -> float:
    """Wall seconds of writing `out`, which is removed before and after."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    work(out)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time both in turns; one row."""
    base, experts = make_family(options.width, options.layers, 1)
    work = Work(workers=options.workers)
    settings = PackSettings(parameters={"rank_fraction": options.rank_fraction})
    with tempfile.TemporaryDirectory(dir=RUNS) as folder:
        out, packed = Path(folder) / "out", Path(folder) / "pack"
        pack(base, experts, packed, settings=settings, work=work)
        ways: dict[str, Callable[[Path], object]] = {
            "copy": lambda out: plain_copy(base, out),
            "unpack": lambda out: unpack(packed, "expert-0", out, work=work),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(options.repeats + 1):
            for way, run in ways.items():
                taken = timed(run, out)
                if turn:  # the first round only fills the cache
                    seconds[way].append(taken)
    copied, rebuilt = (statistics.median(seconds[way]) for way in ("copy", "unpack"))
    pairs = zip(seconds["unpack"], seconds["copy"], strict=True)
    return {
        "mb": sum(file.stat().st_size for file in base.glob("*.safetensors")) / 1e6,
        "workers": work.threads,
        "copy_s": copied,
        "unpack_s": rebuilt,
        "ratio": statistics.median(one / other for one, other in pairs),
        "fastest_ratio": min(seconds["unpack"]) / min(seconds["copy"]),
    }


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank-fraction", type=float, default=0.07)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, help="one a core by default")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    row = measure(options)
    if options.json:
        print(json.dumps({"machine": machine(), "rows": [row]}, indent=1))
        return
    show(f"unpacking, rank fraction {options.rank_fraction}, median of {options.repeats}", [row])


if __name__ == "__main__":
    main()
