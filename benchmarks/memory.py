"""Working memory that plans name, beside what packs and merges take.

    python benchmarks/memory.py                                # an embedding of 200,000 x 1,024
    python benchmarks/memory.py --rows 4000 --columns 256      # a smoke test
    python benchmarks/memory.py --only dts --only ties --dtype float32

A base and three experts with one large embedding and the matrices of two layers, random weights,
are written to `runs/bench` once. Each run is a process of its own, with the allocator told what the
commands tell it. `measured` is the peak of anonymous memory (`RssAnon`) above what the process had
when the same had been done to a tiny family, so that libraries had taken what they keep; it is read
every few milliseconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from personae import MergeSettings, PackSettings, Work, merge, pack, plan_merge, plan_pack
from personae._types import TensorSpec
from personae.cli.allocator import keep_freed_memory
from personae.methods import CODECS, MERGE_METHODS
from personae.writers import CheckpointWriter, output_directory
from setting import RUNS, machine, peak_memory, show

EXPERTS = ("a", "b", "c")
LAYERS = 2
CHUNK_ROWS = 4096
TINY = 512, 64
OPTIONS: dict[str, dict[str, Any]] = {
    "bitdelta": {"tensors": "all"},
    "delta_come": {"tensors": "all"},
    "ultradelta": {"tensors": "all", "rescale": "none"},
}
"""Parameters with which a codec takes the embedding too."""
ADAPTERS_ALONE = {"core_space"}


def specs(rows: int, columns: int, dtype: torch.dtype) -> list[TensorSpec]:
    """One embedding, and what two small layers have."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, columns)}
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        shapes[f"{layer}.self_attn.q_proj.weight"] = (columns, columns)
        shapes[f"{layer}.mlp.up_proj.weight"] = (4 * columns, columns)
        shapes[f"{layer}.input_layernorm.weight"] = (columns,)
    return [TensorSpec(name, shape, dtype) for name, shape in shapes.items()]


def make_family(rows: int, columns: int, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """Write base and experts below `runs/bench`, a few rows at a time; what is there is kept."""
    root = RUNS / f"memory-{rows}x{columns}-{str(dtype).removeprefix('torch.')}"
    for number, name in enumerate(("base", *EXPERTS)):
        if (root / name).is_dir():
            continue
        with (
            output_directory(root / name, overwrite=False) as part,
            CheckpointWriter(part, specs(rows, columns, dtype)) as out,
        ):
            for place, spec in enumerate(specs(rows, columns, dtype)):
                for start in range(0, spec.shape[0], CHUNK_ROWS):
                    shape = (min(CHUNK_ROWS, spec.shape[0] - start), *spec.shape[1:])
                    draw = torch.Generator().manual_seed(1_000_003 * place + start)
                    values = 0.02 * torch.randn(shape, generator=draw)
                    if number:
                        draw.manual_seed(1_000_003 * place + start + 7_777_777 * number)
                        values += 2e-3 * torch.randn(shape, generator=draw)
                    out.write_rows(spec.name, start, values)
    return str(root / "base"), {name: str(root / name) for name in EXPERTS}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Plan and run one method; one row."""
    keep_freed_memory()
    take(options, *TINY)
    return take(options, options.rows, options.columns)


def take(options: argparse.Namespace, rows: int, columns: int) -> dict[str, Any]:
    """Plan and run one method on a family of this size."""
    name, is_codec = options.child, options.child in CODECS
    base, experts = make_family(rows, columns, getattr(torch, options.dtype))
    experts = {expert: experts[expert] for expert in EXPERTS[: options.experts]}
    work = Work(workers=options.workers)
    given = OPTIONS.get(name, {}) if is_codec else {}
    with tempfile.TemporaryDirectory(dir=RUNS) as folder:
        if is_codec:
            coding = PackSettings(method=name, parameters=given)
            planned = plan_pack(base, experts, coding, work).peak_memory
        else:
            merging = MergeSettings(method=name, parameters={"steps": 2} if name == "wudi" else {})
            planned = plan_merge(base, experts, merging, work).peak_memory
        with peak_memory() as peaks:
            if is_codec:
                pack(base, experts, Path(folder) / "out", settings=coding, work=work)
            else:
                merge(base, experts, Path(folder) / "out", settings=merging, work=work)
    taken = peaks["anonymous"] - peaks["before"]
    return {
        "method": name,
        "dtype": options.dtype,
        "experts": options.experts,
        "workers": options.workers,
        "planned_mb": planned / 1e6,
        "measured_mb": taken / 1e6,
        "ratio": planned / max(taken, 1),
    }


def in_process(options: argparse.Namespace, name: str, dtype: str, workers: int) -> dict[str, Any]:
    """The same in a process of its own."""
    words = [f"--child={name}", f"--dtype={dtype}", f"--workers={workers}"]
    words += [f"--{key}={getattr(options, key)}" for key in ("rows", "columns", "experts")]
    done = subprocess.run(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout)


def main() -> None:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=3, choices=(2, 3))
    parser.add_argument("--workers", type=int, action="append")
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float32"))
    parser.add_argument("--only", action="append", help="a codec or method; all by default")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.dtype, options.workers = options.dtype[0], options.workers[0]
        print(json.dumps(measure(options)))
        return
    names = options.only or [*CODECS, *(set(MERGE_METHODS) - ADAPTERS_ALONE)]
    dtypes, workers = options.dtype or ["bfloat16"], options.workers or [1, 2]
    for dtype in dtypes:
        for size in (TINY, (options.rows, options.columns)):
            make_family(*size, getattr(torch, dtype))
    rows: list[dict[str, Any]] = []
    for name in names:
        for dtype in dtypes:
            for count in workers:
                rows.append(in_process(options, name, dtype, count))
                print(rows[-1], file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=1))
        return
    show(f"working memory, an embedding of {options.rows:,} x {options.columns:,}", rows)


if __name__ == "__main__":
    main()
