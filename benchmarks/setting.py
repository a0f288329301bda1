"""What packing and unpacking are measured on: a synthetic family, the machine, peaks of memory."""

import os
import platform
import subprocess
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import personae
from personae._types import TensorSpec
from personae.writers import CheckpointWriter, output_directory

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench"
SAMPLE_SECONDS = 0.004


def vit_specs(width: int, layers: int) -> list[TensorSpec]:
    """Shapes of the vision model of CLIP ViT-B/32 as on the hub; 87,456,000 weights at 768, 12."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, 32, 32),
        "embeddings.position_embedding.weight": (50, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for number in range(layers):
        layer = f"encoder.layers.{number}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        linear = {f"self_attn.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
        linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, shape in linear.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
    for norm in norms:
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return [
        TensorSpec(f"vision_model.{name}", shape, torch.float32) for name, shape in shapes.items()
    ]


def make_family(width: int, layers: int, experts: int) -> tuple[Path, dict[str, Path]]:
    """Write a base and experts of random weights below `runs/bench`; what is there is kept."""
    specs = vit_specs(width, layers)
    root = RUNS / f"vit-{width}x{layers}"
    base, names = root / "base", [f"expert-{n}" for n in range(experts)]
    if not base.is_dir():
        _write(base, specs, {s.name: _base_tensor(s, n) for n, s in enumerate(specs)})
    for number, name in enumerate(names):
        if not (root / name).is_dir():
            weights = {
                s.name: _base_tensor(s, n) + _delta(s, 1_000_003 * (number + 1) + n)
                for n, s in enumerate(specs)
            }
            _write(root / name, specs, weights)
    return base, {name: root / name for name in names}


def _write(directory: Path, specs: list[TensorSpec], weights: Mapping[str, Tensor]) -> None:
    with output_directory(directory, overwrite=False) as part, CheckpointWriter(part, specs) as out:
        for name, tensor in weights.items():
            out.write(name, tensor)


def _base_tensor(spec: TensorSpec, seed: int) -> Tensor:
    return 0.02 * torch.randn(spec.shape, generator=torch.Generator().manual_seed(seed))


def _delta(spec: TensorSpec, seed: int) -> Tensor:
    """Entries of about 1e-3; the singular values of a matrix fall slowly, as i^-0.5; some noise."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(spec.shape, generator=draw)
    if len(spec.shape) != 2:
        return 1e-3 * noise
    rows, columns = spec.shape
    small = min(rows, columns)
    left = torch.randn(rows, small, generator=draw) * torch.arange(1, small + 1) ** -0.5
    slow = left @ torch.randn(small, columns, generator=draw)
    return 1e-3 * (slow / slow.square().mean().sqrt() + 0.1 * noise)


def machine() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("diff", "HEAD") else ""),
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "personae": personae.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
    }


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


@contextmanager
def peak_memory() -> Generator[dict[str, int]]:
    """Yield a mapping that has, after the block, this process's peaks in bytes.

    `rss` is the kernel's own high-water mark, mapped files included. `anonymous` leaves them out;
    it is sampled, so that a peak shorter than the interval may be missed. `before` is that of the
    beginning.
    """
    before = _kibibytes("status", "RssAnon")
    peaks = {"rss": 0, "anonymous": 0, "before": before}
    done = threading.Event()

    def watch() -> None:
        while True:
            peaks["anonymous"] = max(peaks["anonymous"], _kibibytes("status", "RssAnon"))
            if done.wait(SAMPLE_SECONDS):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()
        peaks["rss"] = _kibibytes("status", "VmHWM")


def _kibibytes(file: str, key: str) -> int:
    """One figure of /proc/self, in bytes. `ru_maxrss` would include what the parent once had."""
    for line in Path("/proc/self", file).read_text("utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    return 0


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table and the machine beneath it."""
    table = Table(*(key.replace("_", "\n") for key in rows[0]), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console = Console(width=130)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), style="dim")
