"""Wall time and memory of `personae merge`, beside mergekit and beside a plain copy of the bytes.

`python benchmarks/merging.py --size 0.5b` times whole commands on bf16 checkpoints of Qwen2's
shapes with random weights, a base and three experts. mergekit is installed on the first run, into
an environment of its own below `runs/bench`.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
import yaml

from personae._types import TensorSpec
from personae.writers import CheckpointWriter, output_directory
from setting import RUNS, machine, show

EXPERTS = ("a", "b", "c")
SIZES = {
    "0.1b": (512, 12, 2048, 128),
    "0.5b": (896, 24, 4864, 128),
    "1.5b": (1536, 28, 8960, 256),
    "tiny": (64, 2, 128, 32),
}
VOCABULARY = 151_936
METHODS: dict[str, dict[str, Any]] = {
    "average": {"merge_method": "linear", "parameters": {"weight": 1.0}},
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"weight": 0.3}},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.2, "weight": 1.0}},
    "ties_tensor": {"merge_method": "ties", "parameters": {"density": 0.2, "weight": 1.0}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"density": 0.2, "weight": 1.0}},
    "slerp": {"merge_method": "slerp", "parameters": {}},
    "karcher": {"merge_method": "karcher", "parameters": {}},
    "model_stock": {"merge_method": "model_stock", "parameters": {}},
    "della": {"merge_method": "della", "parameters": {"density": 0.2, "weight": 1.0}},
    "sce": {"merge_method": "sce", "parameters": {}},
}
USUAL = ("average", "task_arithmetic", "ties", "ties_tensor", "dare_ties")
OF_TWO = {"slerp"}
"""Methods between the base and one expert."""
ALONE = {"karcher"}
"""Methods of the experts, without a base."""
SHARED: dict[str, dict[str, Any]] = {"slerp": {"t": 0.5}, "sce": {"select_topk": 0.2}}
"""Parameters that are the recipe's, not a model's."""
OURS: dict[str, dict[str, Any]] = {"ties_tensor": {"scope": "tensor"}}
SAMPLE_SECONDS = 0.05
REST_SECONDS = 2.0


@dataclass(frozen=True)
class Copied:
    """Seconds until a copy was made, and until it was on the disk, as our output is."""

    made: float
    synced: float


@dataclass(frozen=True)
class Taken:
    """What one command took: seconds, and its peak of memory that is no file, in MiB."""

    wall: float
    user: float
    system: float
    anonymous_mib: float

    @property
    def cpu(self) -> float:
        """Seconds of processor time."""
        return self.user + self.system


def qwen2_specs(size: str, tensors: int = 0, layers: int = 0) -> list[TensorSpec]:
    """Shapes of Qwen2 (tied embeddings), or `tensors` many matrices of 64 x 16."""
    if tensors:
        names = [f"model.layers.{n // 64}.mlp.experts.{n % 64}.weight" for n in range(tensors)]
        return [TensorSpec(name, (64, 16), torch.bfloat16) for name in names]
    width, usual, inner, kv = SIZES[size]
    rows = VOCABULARY if size != "tiny" else 256
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (rows, width),
        "model.norm.weight": (width,),
    }
    for n in range(layers or usual):
        layer = f"model.layers.{n}"
        for name, out in (("q", width), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (out, width)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, width)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, width)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, width)
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    return [TensorSpec(name, shape, torch.bfloat16) for name, shape in shapes.items()]


def make_family(size: str, tensors: int = 0, layers: int = 0) -> Path:
    """Write base and experts below `runs/bench`; what is there is kept."""
    deep = f"-{layers}-layers" if layers else ""
    root = RUNS / (f"tensors-{tensors}" if tensors else f"qwen2-{size}{deep}")
    specs = qwen2_specs(size, tensors, layers)
    width, usual, inner, kv = SIZES[size]
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": width,
        "num_hidden_layers": layers or usual,
        "intermediate_size": inner,
        "num_attention_heads": max(width // 64, 1),
        "num_key_value_heads": max(kv // 64, 1),
        "vocab_size": specs[0].shape[0],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    for number, name in enumerate(("base", *EXPERTS)):
        if (root / name).is_dir():
            continue
        with (
            output_directory(root / name, overwrite=False) as partial,
            CheckpointWriter(partial, specs) as writer,
        ):
            for place, spec in enumerate(specs):
                writer.write(spec.name, _weights(spec, place, number))
            (partial / "config.json").write_text(json.dumps(config), "utf-8")
    return root


def _weights(spec: TensorSpec, place: int, number: int) -> torch.Tensor:
    weights = 0.02 * torch.randn(spec.shape, generator=torch.Generator().manual_seed(place))
    if number:
        draw = torch.Generator().manual_seed(1_000_003 * number + place)
        weights += 1e-3 * torch.randn(spec.shape, generator=draw)
    return weights.bfloat16()


def models_of(method: str) -> tuple[str, ...]:
    """The models that a method reads."""
    experts = EXPERTS[:1] if method in OF_TWO else EXPERTS
    return experts if method in ALONE else ("base", *experts)


def recipe(root: Path, method: str, ours: bool) -> Path:
    """Write the recipe of one method, for us or for mergekit."""
    given = METHODS[method]
    models: list[dict[str, Any]] = [
        {"model": str(root / name), "parameters": dict(given["parameters"])}
        for name in models_of(method)
        if name != "base" or (method in OF_TWO and not ours)
    ]
    content: dict[str, Any] = {
        "merge_method": given["merge_method"],
        "models": models,
        "dtype": "bfloat16",
    }
    if "base" in models_of(method) and (method != "average" or ours):
        content["base_model"] = str(root / "base")
    if ours:
        content["conventions"] = "papers"
        content["parameters"] = OURS.get(method, {}) | SHARED.get(method, {})
    else:
        normalize = {"normalize": method != "task_arithmetic"} if given["parameters"] else {}
        content["parameters"] = normalize | SHARED.get(method, {})
    path = root / f"{method}-{'personae' if ours else 'mergekit'}.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


def run(command: Sequence[str | Path]) -> Taken:
    """Run a command; its time, and the peak of its anonymous memory, sampled every 50 ms."""
    start = time.perf_counter()
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    child = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | quiet,
    )
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            try:
                text = Path(f"/proc/{child.pid}/smaps_rollup").read_text("utf-8")
            except OSError:
                return
            for line in text.splitlines():
                if line.startswith("Anonymous:"):
                    peak = max(peak, int(line.split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert child.stderr is not None
    errors = child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    done.set()
    watcher.join()
    if child.returncode:
        raise SystemExit(f"{command} failed: {errors.decode()[-2000:]}")
    return Taken(wall, used.ru_utime, used.ru_stime, peak / 1024)


def mergekit() -> Path:
    """The mergekit command, installed if it is not there yet."""
    home = RUNS / "mergekit-env"
    command = home / "bin" / "mergekit-yaml"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        pip = [home / "bin" / "pip", "install", "--quiet", "torch==2.13.0", "mergekit==0.1.5"]
        subprocess.run(pip, check=True)
    return command


def copy_bytes(root: Path, models: Sequence[str], out: Path) -> Copied:
    """Read models once and write the first."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    start = time.perf_counter()
    buffer = memoryview(bytearray(1 << 22))
    with (out / "copy").open("wb", buffering=0) as target:
        for name in models:
            for file in sorted((root / name).glob("*.safetensors")):
                with file.open("rb", buffering=0) as source:
                    while count := source.readinto(buffer):
                        if name == models[0]:
                            target.write(buffer[:count])
        made = time.perf_counter() - start
        os.fsync(target.fileno())
    return Copied(made, time.perf_counter() - start)


def rest() -> None:
    """Wait until the disk has what was written before: else the next turn waits for it."""
    os.sync()
    time.sleep(REST_SECONDS)


def forget(root: Path) -> None:
    """Drop a family from the page cache."""
    os.sync()
    for file in root.rglob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(root: Path, method: str, turns: int, theirs: Path | None, cold: bool) -> dict[str, Any]:
    """One method on one family: medians over interleaved turns."""
    out = root / "out"
    program = Path(sys.executable).parent / "personae"
    copies: list[Copied] = []
    ours: list[Taken] = []
    others: list[Taken] = []
    for _ in range(turns):
        rest()
        if cold:
            forget(root)
        copies.append(copy_bytes(root, models_of(method), out))
        shutil.rmtree(out, ignore_errors=True)
        rest()
        if cold:
            forget(root)
        ours.append(run([program, "merge", recipe(root, method, True), out, "--overwrite"]))
        shutil.rmtree(out, ignore_errors=True)
        if theirs is not None:
            rest()
            others.append(run([theirs, recipe(root, method, False), out, "--allow-crimes"]))
            shutil.rmtree(out, ignore_errors=True)
    row: dict[str, Any] = {
        "family": root.name,
        "method": method,
        "copy_s": median(copy.made for copy in copies),
        "synced_copy_s": median(copy.synced for copy in copies),
        "wall_s": median(t.wall for t in ours),
        "cpu_s": median(t.cpu for t in ours),
        "anonymous_mib": max(t.anonymous_mib for t in ours),
    }
    if others:
        row["mergekit_s"] = median(t.wall for t in others)
        row["mergekit_mib"] = max(t.anonymous_mib for t in others)
        row["times_faster"] = row["mergekit_s"] / row["wall_s"]
    return row


def main(
    size: str = "0.5b",
    methods: str = ",".join(USUAL),
    turns: int = 3,
    against: Annotated[bool, typer.Option(help="Run mergekit too.")] = True,
    cold: Annotated[bool, typer.Option(help="Drop the family from the page cache first.")] = False,
    tensors: Annotated[int, typer.Option(help="Instead: so many tensors of 64 x 16.")] = 0,
    layers: Annotated[int, typer.Option(help="So many layers, not those of the size.")] = 0,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Time whole commands side by side; start-up is what the tiny family takes."""
    theirs = mergekit() if against else None
    tiny = make_family("tiny")
    root = make_family("tiny" if tensors else size, tensors, layers)
    rows: list[dict[str, Any]] = []
    for method in methods.split(","):
        start = measure(tiny, method, turns, theirs, cold=False)
        row = measure(root, method, turns, theirs, cold)
        row["start_s"] = start["wall_s"]
        for which in ("copy", "synced_copy"):
            row[f"over_{which}"] = (row["wall_s"] - start["wall_s"]) / row[f"{which}_s"]
        if theirs is not None:
            row["mergekit_start_s"] = start["mergekit_s"]
        rows.append(row)
    if as_json:
        typer.echo(json.dumps({"rows": rows, "machine": machine()}, indent=2))
    else:
        show("personae merge", rows)


if __name__ == "__main__":
    typer.run(main)
