"""Extraction of a LoRA adapter, beside the full SVD of the same deltas and mergekit-extract-lora.

    python benchmarks/extraction.py                        # 0.5 B in Qwen2's shapes, rank 32
    python benchmarks/extraction.py --layers 4             # fewer layers of that width
    python benchmarks/extraction.py --size tiny --rank 4   # a smoke test
    python benchmarks/extraction.py --mergekit ENV/bin/mergekit-extract-lora

The base is `merging.py`'s, bf16 with random weights; the expert's deltas are `packing.py`'s: their
singular values fall as i^-0.5, and there is a little noise. Each way is a whole command in a
process of its own, in turns, `--repeats` times; figures are medians. `full` is `personae export`
with `torch.linalg.svd` in the place of the truncated solver. mergekit needs an environment of its
own, which is given.

`missed` is the share of the squared norm of the linear layers' deltas that an adapter does not
have, measured here from its file. Ratios are of processor time, less what a command that extracts
nothing takes (`--help`): other work on the machine changes wall time first.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from merging import Taken, make_family, qwen2_specs, run
from personae.checkpoints import Checkpoint, open_checkpoint
from personae.cli import main as command_line
from personae.ops import svd
from personae.writers import CheckpointWriter, output_directory
from setting import _delta, machine, show

FULL = "--by-full-svd"


def make_expert(root: Path, size: str, layers: int) -> Path:
    """The base with deltas on every linear layer; what is there is kept."""
    out = root / "slow"
    if out.is_dir():
        return out
    base, specs = open_checkpoint(root / "base"), qwen2_specs(size, 0, layers)
    with output_directory(out, overwrite=False) as part:
        with CheckpointWriter(part, specs) as writer:
            for number, spec in enumerate(specs):
                value = base.read(spec.name).float()
                if "proj.weight" in spec.name:
                    value += _delta(spec, number)
                writer.write(spec.name, value.to(spec.dtype))
        shutil.copy(root / "base" / "config.json", part)
    return out


def missed(base: Checkpoint, expert: Checkpoint, adapter: Path) -> float:
    """The share of the squared norm that factors miss, over all linear layers."""
    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    alphas, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}
    error = energy = 0.0
    for name in (name for name in base.specs if "proj.weight" in name):
        module = name.removesuffix(".weight")
        a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"].float() for side in "AB")
        scale = _of(alphas, module, config["lora_alpha"]) / _of(ranks, module, config["r"])
        delta = expert.read(name).float() - base.read(name).float()
        error += float((delta - scale * b @ a).square().sum())
        energy += float(delta.square().sum())
    return error / energy


def _of(pattern: dict[str, float], module: str, default: float) -> float:
    return next((v for key, v in pattern.items() if module.endswith(key)), default)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all ways in turns; a row each."""
    root = make_family(options.size, 0, options.layers)
    expert = make_expert(root, options.size, options.layers)
    out, rank = root / "adapters", str(options.rank)
    ours = ["export", expert, "--base", root / "base", "--rank", rank, "--overwrite", "--out"]
    plain: dict[str, list[Any]] = {
        "export": [sys.executable, "-m", "personae"],
        "full": [sys.executable, __file__, FULL],
    }
    ways: dict[str, Callable[[Path], list[Any]]] = {
        name: lambda to, own=own: [*own, *ours, to] for name, own in plain.items()
    }
    if options.mergekit:
        plain["mergekit"] = [options.mergekit]
        theirs = ["--model", expert, "--base-model", root / "base", "--max-rank", rank]
        theirs += ["--exclude-regex", "embed_tokens|lm_head", "--out-path"]
        ways["mergekit"] = lambda to: [options.mergekit, *theirs, to]
    found: dict[str, list[Taken]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way, command in ways.items():
            shutil.rmtree(out / way, ignore_errors=True)
            found[way].append(run(command(out / way)))
    idle = {way: run([*command, "--help"]).cpu for way, command in plain.items()}
    base, tuned = open_checkpoint(root / "base"), open_checkpoint(expert)
    cpu = {way: statistics.median(t.cpu for t in turns) - idle[way] for way, turns in found.items()}
    return [
        {
            "way": way,
            "wall_s": statistics.median(turn.wall for turn in turns),
            "cpu_s": statistics.median(turn.cpu for turn in turns),
            "of_it_start_up": idle[way],
            "times_export": cpu[way] / cpu["export"],
            "memory_mib": max(turn.anonymous_mib for turn in turns),
            "missed": missed(base, tuned, out / way),
        }
        for way, turns in found.items()
    ]


def main() -> None:
    """Parse options, measure, print."""
    if FULL in sys.argv:
        sys.argv.remove(FULL)
        svd._choose = lambda *_: ("full", False)
        command_line()
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["tiny", "0.5b", "1.5b"], default="0.5b")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--mergekit", type=Path, help="mergekit-extract-lora of some environment")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options)
    if options.json:
        print(json.dumps({"machine": machine(), "rows": rows}))
        return
    show(f"rank {options.rank} of {options.size} in Qwen2's shapes", rows)


if __name__ == "__main__":
    main()
