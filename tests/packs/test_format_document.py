"""docs/pack-format.md suffices: a reader written from it alone, in numpy and json, agrees."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import save_file

from personae import PackSettings, load, pack, unpack

# The reader. Nothing of personae below, until the tests.

WEIGHTS = "model.safetensors"
DTYPES = {"F32": "<f4", "BF16": "<u2", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}


def read_safetensors(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    arrays: dict[str, Any] = {}
    for name, entry in json.loads(raw[8:data]).items():
        if name != "__metadata__":
            start, stop = (data + offset for offset in entry["data_offsets"])
            values = np.frombuffer(raw[start:stop], DTYPES[entry["dtype"]])
            arrays[name] = values.reshape(entry["shape"])
    return arrays


def bits(data: Any, width: int) -> Any:
    return (data[:, None] >> np.arange(0, 8, width) & 2**width - 1).ravel()


def factors(parts: Any, shapes: list[tuple[int, int]], parameters: Any) -> list[Any]:
    width, found, byte, bit, scale = 2 if parameters["thresholding"] else 1, [], 0, 0, 0
    first = 0
    for vectors, length in shapes:
        sets = vectors if parameters["grouping"] == "vector" else 1
        size, masked = -(-vectors * length * width // 8), -(-vectors * length // 8)
        codes = bits(parts["codes"][byte : byte + size], width)[: vectors * length]
        scales = parts["scales"][scale : scale + sets * 2**width].reshape(sets, -1)
        signed = scales * np.array([1, -1, 1, -1], np.float32)[: 2**width]
        values = np.take_along_axis(signed, codes.reshape(sets, -1), 1).ravel()
        if "zeros" in parts:
            values[bits(parts["zeros"][bit : bit + masked], 1)[: values.size] > 0] = 0
        if "zero_positions" in parts:
            places = parts["zero_positions"] - first
            values[places[(places >= 0) & (places < values.size)]] = 0
        first += values.size
        found.append(values.reshape(vectors, length))
        byte, bit, scale = byte + size, bit + masked, scale + sets * 2**width
    return found


def decode_dts(parts: Any, shape: tuple[int, ...], parameters: Any) -> Any:
    if not parts or len(shape) == 0:
        return parts["exact"].reshape(shape) if parts else np.zeros(shape, np.float32)
    matrix = len(shape) == 2 or (len(shape) > 2 and parameters["conv"] == "matrix")
    if not matrix or not parameters["decomposition"]:
        return factors(parts, [(1, math.prod(shape))], parameters)[0].reshape(shape)
    m, n, sigma = shape[0], math.prod(shape[1:]), parts["singular_values"].astype(np.float32)
    rows = bits(parts["rows"], 1)[:m] > 0 if "rows" in parts else np.ones(m, bool)
    u, v = factors(parts, [(len(sigma), rows.sum()), (len(sigma), n)], parameters)
    delta = np.zeros((m, n), np.float32)
    delta[rows] = (u.T * sigma) @ v
    return delta.reshape(shape)


def decode_svd(parts: Any, shape: tuple[int, ...], _: Any) -> Any:
    if not parts or len(shape) != 2 or min(shape) == 1:
        return parts["exact"].reshape(shape) if parts else np.zeros(shape, np.float32)
    sigma = parts["singular_values"]
    return (parts["left"].reshape(-1, len(sigma)) * sigma) @ parts["right"].reshape(len(sigma), -1)


def planes(data: Any, count: int, width: int) -> Any:
    size = -(-count // 8)
    each = [bits(data[j * size : (j + 1) * size], 1)[:count].astype(int) for j in range(width)]
    return sum((plane << j for j, plane in enumerate(each)), np.zeros(count, int))


def marked(parts: Any, count: int) -> Any:
    if "mask" not in parts:
        return np.arange(count)
    ones = np.flatnonzero(bits(parts["mask"], 1))
    if "gaps" not in parts:
        return ones
    k = len(parts["gaps"]) // -(-len(ones) // 8)
    quotients = np.diff(ones, prepend=-1) - 1
    return np.cumsum(quotients * 2**k + planes(parts["gaps"], len(ones), k) + 1) - 1


def decode_masked(method: str, parts: Any, shape: tuple[int, ...], shared: Any) -> Any:
    delta = np.zeros(math.prod(shape), np.float32)
    kept = marked(parts, delta.size)
    if method in ("t_switch", "bitdelta"):
        negative = bits(parts["signs"], 1)[: len(kept)] > 0
        delta[kept] = np.where(negative, -parts["scale"], parts["scale"])
    elif method == "ultradelta":
        least, step = parts["levels"]
        delta[kept] = least + planes(parts["codes"], len(kept), 4) * step
    else:
        delta[kept] = parts.get("scale", np.float32(1)) * shared.ravel()[kept]
    return delta.reshape(shape)


def decode_bands(parts: Any, shape: tuple[int, int], parameters: Any) -> Any:
    k = len(parts["singular_values"])
    m, n = shape
    widths = [b for count, b in parameters["bands"] for _ in range(count)]
    widths = (widths + [parameters["rest_bits"]] * k)[:k]
    rows = bits(parts["rows"], 1)[:m] > 0 if "rows" in parts else np.ones(m, bool)
    byte, scale, found = 0, 0, []
    for length in (int(rows.sum()), n):
        factor, groups = np.zeros((k, length)), -(-length // 128)
        for b in sorted(set(widths), key=widths.index):
            own = [i for i in range(k) if widths[i] == b]
            size = b * -(-len(own) * (length + groups) // 8)
            codes = planes(parts["codes"][byte : byte + size], len(own) * (length + groups), b)
            codes = codes.reshape(-1, length + groups)
            zeros = np.repeat(codes[:, length:], 128, axis=1)[:, :length]
            factor[own] = codes[:, :length] - zeros
            byte += size
        scales = parts["scales"][scale : scale + k * groups].astype(float).reshape(k, groups)
        found.append(factor * np.repeat(scales, 128, axis=1)[:, :length])
        scale += k * groups
    delta = np.zeros(shape, np.float32)
    delta[rows] = (found[0].T * parts["singular_values"]) @ found[1]
    return delta


FREQUENCIES = [  # model by model, as the page lists them
    [[3236, 424, 5, 1], [28, 1980, 53, 1]],
    [[2812, 625, 15, 1, 1], [2, 1926, 117, 3, 1]],
    [[2356, 819, 49, 1, 1], [2, 1791, 244, 11, 1]],
    [[1880, 968, 130, 8, 1, 1], [2, 1632, 380, 33, 1, 1]],
    [[1472, 1000, 259, 46, 5, 1, 1], [2, 1313, 592, 125, 15, 1, 1]],
    [[1304, 957, 344, 81, 9, 3, 1, 1], [2, 1159, 660, 177, 44, 5, 1, 1]],
    [[836, 755, 479, 236, 108, 39, 10, 1, 1, 1], [2, 790, 632, 389, 151, 55, 20, 7, 2, 1]],
    [
        [496, 528, 414, 345, 244, 128, 78, 32, 19, 6, 3, 1, 1, 1],
        [2, 547, 505, 404, 251, 154, 86, 49, 28, 11, 9, 1, 1, 1],
    ],
]


def paths(codes: bytes, wanted: list[tuple[int, int]]) -> list[list[int]]:
    """The integers of vectors of these models and lengths."""
    x, rest, found = int.from_bytes(codes[:4], "big"), list(codes[4:]), list[list[int]]()
    for model, length in wanted:
        state, integers = 0, list[int]()
        for _ in range(length):
            odd, place, start, symbol = state >= 2, x % 4096, 0, -1
            zero, *others = FREQUENCIES[model][odd]
            for width in [zero, *(f for f in others for _ in range(2))]:
                symbol += 1
                if place < start + width:
                    break
                start += width
            x = width * (x // 4096) + place - start
            while x < 2**23:
                x = 256 * x + rest.pop(0)
            k = (symbol + 1) // 2
            integers.append((2 * k - odd if k else 0) * (1 if symbol % 2 else -1))
            state = [[0, 2], [2, 0], [1, 3], [3, 1]][state][k % 2]
        found.append(integers)
    assert not rest and x == 2**23
    return found


def decode_triplets(parts: Any, shape: tuple[int, ...]) -> Any:
    m, n = (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
    rows = bits(parts["rows"], 1)[:m] > 0 if "rows" in parts else np.ones(m, bool)
    sizes = (parts["singular_values"].astype("<u4") << 16).view("<f4")
    wanted = [(i, length) for i in parts["models"][::-1] for length in (n, int(rows.sum()))]
    vectors = paths(parts["codes"].tobytes(), wanted)[::-1]
    delta = np.zeros((m, n))
    for s, p, q in zip(sizes, vectors[::2], vectors[1::2], strict=True):
        delta[rows] += s * np.outer(p, q)
    if "zeros" in parts:
        delta.ravel()[bits(parts["zeros"], 1)[: m * n] > 0] = 0
    if "zero_positions" in parts:
        delta.ravel()[parts["zero_positions"]] = 0
    return delta.reshape(shape)


def decode_of_version_2(method: str, parts: Any, shape: Any, parameters: Any, shared: Any) -> Any:
    if not parts:
        return np.zeros(shape, np.float32)
    if "exact" in parts:
        delta = np.zeros(shape, np.float32)
        kept = bits(parts["rows"], 1)[: shape[0]] > 0 if "rows" in parts else ...
        delta[kept] = parts["exact"].reshape(delta[kept].shape)
        return delta
    if method == "residual":
        return decode_triplets(parts, shape)
    if method == "tsv_c":
        return decode_svd(parts, shape, parameters)
    if method == "delta_come":
        return decode_bands(parts, shape, parameters)
    return decode_masked(method, parts, shape, shared)


def read_task(directory: Path, name: str, reference: dict[str, Any]) -> dict[str, Any]:
    manifest = json.loads((directory / "pack.json").read_text("utf-8"))
    stated = manifest.pop("checksum")
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    assert manifest["format"] == "personae-pack"
    assert manifest["format_version"] in (1, 2)
    assert hashlib.sha256(canonical.encode()).hexdigest() == stated
    task = manifest["tasks"][name]
    assert hashlib.sha256((directory / task["file"]).read_bytes()).hexdigest() == task["sha256"]
    file = read_safetensors(directory / task["file"])
    method, common = manifest["method"], {}
    if manifest.get("shared"):
        path = directory / manifest["shared"]["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest["shared"]["sha256"]
        common = read_safetensors(path)
        found = {key: list(values.shape) for key, values in common.items()}
        assert found == manifest["shared"]["tensors"]
    decode = {"dts": decode_dts, "svd": decode_svd}.get(method)
    deltas: dict[str, Any] = {}
    reached: dict[str, int] = {}
    for key, tensor in task["tensors"].items():
        deltas[key] = np.zeros(tensor["shape"], np.float32)
        for block in tensor["blocks"]:
            parts: dict[str, Any] = {}
            for part, length in block["parts"].items():
                start = reached.get(part, 0)
                reached[part] = start + length
                parts[part] = file[part][start : start + length]
            place = (slice(None),) * block["axis"] + (slice(block["start"], block["stop"]),)
            if len(tensor["shape"]) == 3 and len(tensor["blocks"]) == tensor["shape"][0] > 1:
                place = (block["start"],)  # one matrix of a stack
            view = deltas[key][place] if tensor["shape"] else deltas[key]
            own = common[key][place if tensor["shape"] else ()] if key in common else None
            if decode:
                view[...] = decode(parts, view.shape, task["parameters"])
            else:
                view[...] = decode_of_version_2(method, parts, view.shape, task["parameters"], own)
    rule, rebuilt, stored = task["renaming"], {}, set[str]()
    for key, value in reference.items():
        own = rule["add"] + key.removeprefix(rule["strip"]) if key not in rule["plain"] else key
        stored.add(own)
        if key in task["absent"] or (own in task["private"] and key not in task["grown"]):
            continue
        dtype = task["dtypes"].get(key, value.dtype)
        value = value.astype(np.float32) + deltas[key] if key in deltas else value
        if key in task["grown"]:
            value = np.concatenate([value, file[f"private/{own}"]])
        rebuilt[own] = value.astype(dtype)
    rebuilt |= {key: file[f"private/{key}"] for key in task["private"] if key not in rebuilt}
    return rebuilt | {key: rebuilt[kept] for key, kept in task["tied"].items() if key in stored}


def read_router(directory: Path, features: Any) -> Any:
    """The weights of the tasks, in the order of their names, for samples of these features."""
    record = json.loads((directory / "pack.json").read_text("utf-8"))["router"]
    path = directory / record["file"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]
    examples = read_safetensors(path)
    assert {task: len(rows) for task, rows in examples.items()} == record["examples"]
    names, weights = sorted(examples), []
    owners = [number for number, name in enumerate(names) for _ in examples[name]]
    known = np.concatenate([examples[name] for name in names]).astype(float)
    for sample in features.astype(float):
        nearest = np.argsort(((known - sample) ** 2).sum(axis=1), kind="stable")
        votes = [owners[place] for place in nearest[: record["neighbours"]]]
        counts = np.bincount(votes, minlength=len(names))
        if record["mode"] == "pick":
            weights.append(np.arange(len(names)) == counts.argmax())
        else:
            weights.append(counts / len(votes))
    return np.array(weights, float)


# The tests: a family with everything the page speaks of.


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Path]:
    """A base and two experts: one has another prefix, a head, more tokens, other dtypes."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    base = {
        "embed.weight": normal(10, 8),
        "in_proj_weight": normal(24, 8),
        "proj.weight": normal(9, 7),
        "thin.weight": normal(1, 6),
        "conv.weight": normal(4, 2, 3, 3),
        "long.bias": normal(80),
        "norm.bias": normal(7),
        "scale": normal(),
        "same.weight": normal(6, 6),
        "position_ids": torch.arange(5),
    }
    experts = [{n: t + normal(*t.shape) / 8 for n, t in base.items() if t.is_floating_point()}] * 2
    experts = [expert | {"position_ids": torch.arange(5)} for expert in experts]
    experts[1] |= {name: experts[1][name] + normal(*base[name].shape) / 9 for name in experts[1]}
    other = experts[1]
    other["same.weight"] = base["same.weight"]
    other["norm.bias"][2:5] = base["norm.bias"][2:5]  # exact zeros in a flat block
    other["long.bias"][40] = base["long.bias"][40]  # a single one
    other["embed.weight"][[0, 4, 5]] = base["embed.weight"][[0, 4, 5]]  # rows that did not change
    other["embed.weight"] = torch.cat([other["embed.weight"], normal(2, 8)])
    other["proj.weight"] = other["proj.weight"].half()
    other["position_ids"] = torch.arange(5) + 1
    models = {
        "base": base,
        "plain": experts[0],
        "wrapped": {f"model.{n}": t for n, t in other.items()} | {"head.weight": normal(3, 7)},
    }
    for name, tensors in models.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / WEIGHTS, metadata={"format": "pt"})
    return {name: tmp_path / name for name in models}


SETTINGS = {
    "dts": PackSettings(),
    "every option": PackSettings(
        parameters={
            "rank_fraction": 0.6,
            "grouping": "vector",
            "split": "median",
            "scales": "mean",
            "conv": "matrix",
            "qkv": "split",
            "singular_value_dtype": "float16",
        }
    ),
    "one bit": PackSettings(parameters={"thresholding": False}),
    "no decomposition": PackSettings(parameters={"decomposition": False}),
    "difference": PackSettings(vector="difference"),
    "svd": PackSettings(method="svd", parameters={"rank_fraction": 0.5}),
    "private": PackSettings(private=("proj.*",), skip=("thin.*",)),
    "tsv_c": PackSettings(method="tsv_c"),
    "t_switch": PackSettings(method="t_switch"),
    "t_switch, sparse": PackSettings(method="t_switch", parameters={"density": 0.1}),
    "t_switch, model": PackSettings(method="t_switch", parameters={"scope": "model"}),
    "emr": PackSettings(method="emr"),
    "emr, difference": PackSettings(method="emr", vector="difference"),
    "tall_mask": PackSettings(method="tall_mask", parameters={"threshold": 1.5}),
    "bitdelta": PackSettings(method="bitdelta"),
    "bitdelta, all": PackSettings(method="bitdelta", parameters={"tensors": "all"}),
    "delta_come": PackSettings(
        method="delta_come", parameters={"bands": [[1, 8], [2, 3]], "bits_per_weight": 4}
    ),
    "ultradelta": PackSettings(
        method="ultradelta", parameters={"tensors": "all", "density": 0.2, "rest": "exact"}
    ),
    "residual": PackSettings(method="residual", parameters={"gain": 0.2}),
    "residual, difference": PackSettings(
        method="residual", parameters={"size": 700}, vector="difference"
    ),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_reader_written_from_the_page_agrees(
    settings: PackSettings, family: dict[str, Path], tmp_path: Path
) -> None:
    base = family.pop("base")
    packed = pack(base, family, tmp_path / "pack", settings=settings)
    where = tmp_path / "pack" / "reference" if settings.vector == "difference" else base
    reference = read_safetensors(where / WEIGHTS)
    for name, expert in family.items():
        out = unpack(packed.directory, name, tmp_path / "out" / name)
        rebuilt = read_safetensors(out / WEIGHTS)
        found = read_task(packed.directory, name, reference)
        assert found.keys() == rebuilt.keys() == read_safetensors(expert / WEIGHTS).keys()
        for key, values in rebuilt.items():
            assert found[key].dtype == values.dtype
            # Sums of products may be taken in another order; one unit in the last place of F16.
            tolerance = 1e-3 if values.dtype == np.float16 else 2e-6
            np.testing.assert_allclose(found[key], values, rtol=tolerance, atol=tolerance)


class Widened(torch.nn.Linear):
    """A model whose last layer is given its inputs: they are its features."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs)


@pytest.mark.parametrize("mode", ["mix", "pick"])
def test_a_router_as_the_page_says(mode: Any, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    base = {"weight": torch.randn(3, 4, generator=draw), "bias": torch.zeros(3)}
    experts = {
        task: {name: one + torch.randn(one.shape, generator=draw) for name, one in base.items()}
        for task in ("b", "a", "Z")
    }
    packed = pack(base, experts, tmp_path / "pack").directory
    runtime = load(packed, base=base, model=Widened(4, 3))
    samples = {task: torch.randn(5, 4, generator=draw) for task in experts}
    samples["a"][2:4] = samples["b"][:2] = samples["Z"][0]  # equally far
    runtime.fit_router({t: [{"inputs": s}] for t, s in samples.items()}, neighbours=6, mode=mode)
    asked = torch.cat([*samples.values(), torch.randn(9, 4, generator=draw)])
    found = runtime.route(inputs=asked)
    right = read_router(packed, asked.numpy())
    assert json.loads((packed / "pack.json").read_text())["format_version"] == 2
    for row, weights in zip(found, right, strict=True):
        np.testing.assert_allclose([row.get(task, 0) for task in ("Z", "a", "b")], weights)


def test_the_family_needs_every_rule(family: dict[str, Path], tmp_path: Path) -> None:
    """Were a rule of the page not exercised, the agreement above would say nothing of it."""
    base = family.pop("base")
    manifest = pack(base, family, tmp_path / "pack").manifest
    task = manifest.tasks["wrapped"]
    parts = {part for t in task.tensors.values() for b in t.blocks for part in b.parts}
    assert parts == {
        "singular_values",
        "codes",
        "scales",
        "zeros",
        "zero_positions",
        "rows",
        "exact",
    }
    assert task.renaming.add == "model."
    assert task.grown == ("embed.weight",)
    assert task.dtypes == {"proj.weight": "float16"}
    assert set(task.private) == {"head.weight", "model.embed.weight", "model.position_ids"}
    assert "same.weight" not in task.tensors
    assert task.tensors["thin.weight"].blocks[0].parts == {}  # ⌊0.3 · 1⌋ = 0: dropped
    exact = pack(base, family, tmp_path / "exact", settings=SETTINGS["bitdelta"]).manifest
    kept = exact.tasks["wrapped"].tensors.values()
    assert any(tensor.blocks[0].parts.keys() == {"exact", "rows"} for tensor in kept)


def test_copies_are_written_as_the_page_says(tmp_path: Path) -> None:
    """A reference that stores its embedding twice, and an expert that stores it once."""
    embed = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    once = {"model.embed_tokens.weight": embed, "model.proj.weight": torch.eye(8)}
    for name, state in {
        "base": once | {"lm_head.weight": embed.clone()},
        "x": {key: values + 0.1 * values.flip(0) for key, values in once.items()},
    }.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / WEIGHTS)
    packed = pack(tmp_path / "base", {"x": tmp_path / "x"}, tmp_path / "pack")
    reference = read_safetensors(tmp_path / "base" / WEIGHTS)
    found = read_task(packed.directory, "x", reference)
    rebuilt = read_safetensors(unpack(packed.directory, "x", tmp_path / "out") / WEIGHTS)
    assert found.keys() == rebuilt.keys() == reference.keys()
    assert np.array_equal(rebuilt["lm_head.weight"], rebuilt["model.embed_tokens.weight"])
    for key, values in rebuilt.items():
        np.testing.assert_allclose(found[key], values, rtol=2e-6, atol=2e-6)


def test_fingerprints_are_what_the_page_says(family: dict[str, Path], tmp_path: Path) -> None:
    base = family.pop("base")
    manifest = pack(base, family, tmp_path / "pack").manifest
    found = {"base": manifest.reference.fingerprint}
    found |= {name: task.fingerprint for name, task in manifest.tasks.items()}
    for name, directory in {"base": base, **family}.items():
        lines = [
            f"{key} {xxhash.xxh3_128_hexdigest(text.encode() + values.tobytes())}"
            for key, values in sorted(read_safetensors(directory / WEIGHTS).items())
            for text in [f"torch.{values.dtype} {values.shape}"]
        ]
        assert found[name] == "xxh3:" + xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


def test_example_of_the_page() -> None:
    """Codes 2, 1, 0, 3, 1 are bytes 198, 1, and decode to +s₂ −s₁ +s₀ −s₃ −s₁."""
    page = (Path(__file__).parents[2] / "docs" / "pack-format.md").read_text("utf-8")
    assert "codes 2, 1, 0, 3, 1 are 0b11000110, 0b00000001 = 198, 1" in page
    assert bits(np.array([0b11000110, 0b00000001], np.uint8), 2)[:5].tolist() == [2, 1, 0, 3, 1]
    parts = {"codes": np.array([198, 1], np.uint8), "scales": np.arange(1, 5, dtype=np.float32)}
    parameters = {"thresholding": True, "grouping": "matrix"}
    assert factors(parts, [(1, 5)], parameters)[0].tolist() == [[3, -2, 1, -4, -2]]
