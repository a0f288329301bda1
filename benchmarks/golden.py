"""SHA-256 of what every method and codec writes, to hold one commit against another.

    python benchmarks/golden.py make before.json        # at the one commit
    python benchmarks/golden.py make after.json         # at the other, on the same machine
    python benchmarks/golden.py compare before.json after.json

Each runs at its defaults, with a base, without one and on adapters, on models of a toy size and of
one at which the fast decompositions begin, in fp32 and bf16. Bytes hold on one kind of processor
with one version of torch alone, so that no test asks for them: the table says where it was made.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
import yaml
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from personae.cli import app as commands
from setting import machine

_SIDES = {"toy": 24, "wide": 400}
"""Sides of the matrices; at 400 the decompositions of stacks and of codecs are the fast ones."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_EXPERTS = ("a", "b", "c")
_MERGEKIT = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")

app = typer.Typer(add_completion=False)


@app.command()
def make(table: Path) -> None:
    """Run everything, and write one hash a case."""
    outputs: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family, side in _SIDES.items():
            for dtype, kind in _DTYPES.items():
                root = Path(folder, f"{family}-{dtype}")
                _write_family(root, side, kind)
                for name, words in _cases(root):
                    outputs[f"{family} {dtype} {name}"] = _hash_of(words, root / name)
                    print(outputs[f"{family} {dtype} {name}"][:12], family, dtype, name)
    table.write_text(json.dumps({"machine": machine(), "sha256": outputs}, indent=1) + "\n")


@app.command()
def compare(before: Path, after: Path) -> None:
    """Say which cases differ, are new or gone; ends with 1 if any is."""
    old, new = (json.loads(table.read_text())["sha256"] for table in (before, after))
    unlike = sorted(case for case in old.keys() | new.keys() if old.get(case) != new.get(case))
    for case in unlike:
        print(f"{case}: {old.get(case, 'not there')[:60]} -> {new.get(case, 'not there')[:60]}")
    print(f"{len(unlike)} of {len(old.keys() | new.keys())} cases differ")
    raise typer.Exit(bool(unlike))


def _write_family(root: Path, side: int, dtype: torch.dtype) -> None:
    """A base and experts with an embedding, matrices, a convolution, vectors and a scalar."""
    shapes = {
        "model.embed_tokens.weight": (2 * side, side),
        "model.layers.0.self_attn.q_proj.weight": (side, side),
        "model.layers.0.mlp.up_proj.weight": (2 * side, side),
        "model.layers.0.mlp.down_proj.weight": (side, 2 * side),
        "model.layers.0.norm.weight": (side,),
        "model.conv.weight": (8, 3, 2, 2),
        "model.scale": (),
    }
    draw = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    _save({name: tensor.to(dtype) for name, tensor in base.items()}, root / "base")
    for expert in _EXPERTS:
        tuned = {n: t + 0.02 * torch.randn(t.shape, generator=draw) for n, t in base.items()}
        _save({name: tensor.to(dtype) for name, tensor in tuned.items()}, root / expert)
        _write_adapter(root / f"lora-{expert}", side, draw)


def _write_adapter(folder: Path, side: int, draw: torch.Generator) -> None:
    """A LoRA adapter of rank 4 on two of the matrices."""
    adapted = {"self_attn.q_proj": (side, side), "mlp.up_proj": (2 * side, side)}
    factors: dict[str, Tensor] = {}
    for module, (out, into) in adapted.items():
        name = f"base_model.model.model.layers.0.{module}"
        factors[f"{name}.lora_A.weight"] = torch.randn(4, into, generator=draw)
        factors[f"{name}.lora_B.weight"] = 0.02 * torch.randn(out, 4, generator=draw)
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(adapted)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _save(state: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")


def _cases(root: Path) -> Iterator[tuple[str, list[str]]]:
    """A name and the words of a command line for each case; `OUT` stands for where it writes."""
    known = json.loads(_personae(["methods", "--json"])[1])
    experts = [word for name in _EXPERTS for word in ("--expert", f"{name}={root / name}")]
    for method in known:
        name = method["name"]
        if method["kind"] == "merge":
            yield _merge(root, name)
            yield _merge(root, name, base=False)
            yield _merge(root, name, adapters=True)
        elif method["kind"] == "codec":
            command = ["pack", "--base", str(root / "base"), *experts, "--method", name]
            yield f"pack-{name}", [*command, "--out", "OUT"]
            yield f"pack-{name}-difference", [*command, "--vector", "difference", "--out", "OUT"]
    for name in _MERGEKIT:
        yield _merge(root, name, base=name != "linear", mergekit=True)


def _merge(
    root: Path, method: str, *, base: bool = True, adapters: bool = False, mergekit: bool = False
) -> tuple[str, list[str]]:
    """A recipe, written beside the models."""
    traits = {"no-base": not base, "adapters": adapters, "mergekit": mergekit}
    called = "-".join(["merge", method, *(trait for trait, has in traits.items() if has)])
    models: list[dict[str, Any]]
    models = [{"model": str(root / ("lora-" * adapters + name)), "name": name} for name in _EXPERTS]
    recipe: dict[str, Any] = {"merge_method": method}
    if base:
        recipe["base_model"] = str(root / "base")
    elif method not in ("average", "linear"):
        recipe["vector"] = "difference"
    recipe["conventions"] = "mergekit" if mergekit else "papers"
    if mergekit:
        for weight, model in enumerate(models, 1):
            model["parameters"] = {"weight": weight / 4, "density": 0.5}
            if method in ("linear", "task_arithmetic"):
                del model["parameters"]["density"]
    recipe["models"] = models
    file = root / f"{called}.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return called, ["merge", str(file), "OUT"]


def _hash_of(words: list[str], out: Path) -> str:
    """SHA-256 of every weight file that a command writes, or the first line of its refusal."""
    code, _, errors = _personae([str(out) if word == "OUT" else word for word in words])
    if code:
        return "refused: " + errors.replace(str(out.parent), "").strip().partition("\n")[0]
    digest = hashlib.sha256()
    for file in sorted(out.rglob("*.safetensors")):
        digest.update(str(file.relative_to(out)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _personae(words: list[str]) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, output, errors."""
    done = CliRunner().invoke(commands, words)
    return done.exit_code, done.stdout, done.stderr


if __name__ == "__main__":
    app()
