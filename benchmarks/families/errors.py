"""What codecs lose of one expert's task vector under the same budgets, and their times."""

import argparse
import tempfile
import time
from pathlib import Path

from common import RUNS

from personae import PackSettings, pack, unpack


def main() -> None:
    """Print a line for each budget and codec."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=["text", "vision"])
    parser.add_argument("expert")
    parser.add_argument("--budget", action="append", required=True, help="such as 0.25%%")
    parser.add_argument("--method", action="append", help="by default dts and residual")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where the families are")
    given = parser.parse_args()
    base, expert = (given.runs / given.family / name for name in ("base", given.expert))
    print("method budget lost file% encoding_s decoding_s")
    for budget in given.budget:
        for method in given.method or ["dts", "residual"]:
            # A head has no counterpart in the base, and is no part of the task vector.
            settings = PackSettings(method=method, budget=budget, private=("classifier*", "head*"))
            with tempfile.TemporaryDirectory() as folder:
                out, start = Path(folder), time.process_time()
                made = pack(base, {"x": expert}, out / "pack", settings=settings)
                encoded = time.process_time()
                unpack(out / "pack", "x", out / "model", base=base)
                decoded = time.process_time()
            task = made.manifest.tasks["x"]
            energy = sum(tensor.energy for tensor in task.tensors.values())
            lost = sum(t.energy * t.relative_error for t in task.tensors.values())
            stored = task.bytes - sum(tensor.bytes for tensor in task.private.values())
            print(
                f"{method} {budget} {lost / energy:.4f} {100 * stored / task.base_bytes:.4f} "
                f"{encoded - start:.1f} {decoded - encoded:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
