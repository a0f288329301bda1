"""The checkpoint writer, read back by safetensors and transformers."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

from personae._types import TensorSpec
from personae.errors import MethodError, OutputError, WorkError
from personae.writers import CheckpointWriter

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64,
]  # fmt: skip


def toy(dtypes: list[torch.dtype] = DTYPES) -> dict[str, Tensor]:
    """Tensors of every dtype, a scalar, an empty one, and a name that is not ASCII."""
    tensors = {
        f"{'zyx'[n % 3]}.{n}": torch.arange(n % 5 + 1).repeat(2, 3).to(dtype)
        for n, dtype in enumerate(dtypes)
    }
    extra = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "größe": torch.ones(7)}
    return tensors | extra


def specs(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def write(directory: Path, tensors: dict[str, Tensor], **settings: Any) -> list[Path]:
    directory.mkdir(exist_ok=True)
    with CheckpointWriter(directory, specs(tensors), **settings) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return writer.files


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert as_bytes(found[name]) == as_bytes(tensor), name


def test_one_file_is_byte_for_byte_what_safetensors_writes(tmp_path: Path):
    theirs = safetensors.torch._SIZE  # pyright: ignore[reportPrivateUsage] - the dtypes it writes
    tensors = toy([dtype for dtype in DTYPES if dtype in theirs])
    (path,) = write(tmp_path, tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert path.name == "model.safetensors"
    assert path.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert_same(load_file(path), tensors)


def test_shards_and_index(tmp_path: Path):
    # Sorted by name, in bytes: a 40, b 40, c 120, d 20, e 20. At most 100 each: ab, c, de.
    sizes = {"e": 5, "d": 5, "c": 30, "b": 10, "a": 10}
    tensors = {name: torch.full((size,), float(size)) for name, size in sizes.items()}
    files = write(tmp_path, tensors, shard_bytes=100)
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [file.name for file in files] == names
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 240},
        "weight_map": dict(zip("abcde", [names[0], names[0], names[1], names[2], names[2]])),  # noqa: B905
    }
    found: dict[str, Tensor] = {}
    for file in files:
        found |= load_file(file)
    assert_same(found, tensors)


def test_order_rows_and_threads_do_not_change_a_byte(tmp_path: Path):
    tensors = toy()
    expected = [path.read_bytes() for path in write(tmp_path / "whole", tensors, shard_bytes=60)]
    assert len(expected) > 3
    pieces = [
        (name, start, tensor[start : start + 1])
        for name, tensor in tensors.items()
        for start in range(len(tensor) if tensor.ndim else 0)
    ]
    random.Random(0).shuffle(pieces)
    (tmp_path / "rows").mkdir()
    shuffled = list(reversed(specs(tensors)))
    with (
        CheckpointWriter(tmp_path / "rows", shuffled, shard_bytes=60) as writer,
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(lambda piece: writer.write_rows(*piece), pieces))
        writer.write("scalar", tensors["scalar"])
    assert [path.read_bytes() for path in writer.files] == expected


def test_casts_once_to_nearest(tmp_path: Path):
    # bf16 has 8 significant bits: 257 lies between 256 and 258 and goes to the even one, 256.
    values = torch.tensor([257.0, 259.0, 1.0, float("inf")])  # infinite before, so no overflow
    with CheckpointWriter(tmp_path, [TensorSpec("x", (4,), torch.bfloat16)]) as writer:
        writer.write("x", values)
    found = load_file(writer.files[0])["x"]
    assert found.tolist() == [256.0, 260.0, 1.0, float("inf")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2])
def test_overflow_names_the_tensor(tmp_path: Path, dtype: torch.dtype):
    writer = CheckpointWriter(tmp_path, [TensorSpec("layer.weight", (2,), dtype)])
    text = r"'layer.weight' holds -70000, but the largest .* is \d+"
    with pytest.raises(MethodError, match=text):
        writer.write("layer.weight", torch.tensor([1.0, -7e4]))


@pytest.mark.parametrize(
    ("pieces", "count"), [([], 0), ([(0, 2)], 16), ([(0, 2), (3, 1)], 24), ([(0, 3), (2, 2)], 40)]
)
def test_missing_and_repeated_rows_are_found(tmp_path: Path, pieces: list, count: int):
    writer = CheckpointWriter(tmp_path, [TensorSpec("x", (4, 2), torch.float32)])
    for start, rows in pieces:
        writer.write_rows("x", start, torch.zeros(rows, 2))
    with pytest.raises(WorkError, match=f"'x' was not written exactly once: {count} bytes .* 32"):
        writer.close()


def test_an_error_inside_the_block_is_not_hidden(tmp_path: Path):
    with (
        pytest.raises(KeyError, match="the real reason"),
        CheckpointWriter(tmp_path, [TensorSpec("x", (4,), torch.float32)]),
    ):
        raise KeyError("the real reason")


def test_a_checkpoint_larger_than_the_disk_is_refused_first(tmp_path: Path):
    with pytest.raises(OutputError, match="needs 4,000,000,000,000,000,000 bytes"):
        CheckpointWriter(tmp_path, [TensorSpec("x", (10**9, 10**9), torch.float32)])
    assert list(tmp_path.iterdir()) == []


def test_tied_names_are_noted_as_safetensors_notes_them(tmp_path: Path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    save_model(model, str(tmp_path / "theirs.safetensors"), metadata={"format": "pt"})
    tensors = load_file(tmp_path / "theirs.safetensors")
    (ours,) = write(tmp_path, tensors, tied={"b.weight": "a.weight"})
    with safe_open(ours, "pt") as mine, safe_open(tmp_path / "theirs.safetensors", "pt") as other:
        assert mine.metadata() == other.metadata() == {"format": "pt", "b.weight": "a.weight"}
        assert mine.keys() == other.keys()


def test_copies_are_written_with_their_tensors(tmp_path: Path):
    """Whole, in rows, and where single values are written again; none of them is a note."""
    specs = [TensorSpec(name, (3, 2), torch.float32) for name in ("a", "b")]
    tied = {"a2": "a", "b2": "b", "b3": "b"}
    values = torch.arange(6.0).reshape(3, 2)
    copies = {"a2": torch.float32, "b2": torch.float32}
    with CheckpointWriter(tmp_path, specs, tied=tied, copies=copies) as writer:
        writer.write("a", values)
        writer.write_rows("b", 0, values[:1])
        writer.write_rows("b", 1, values[1:])
        writer.replace("b", torch.tensor([4]), torch.tensor([9.0]))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "b3": "b"}
        assert torch.equal(file.get_tensor("a2"), values)
        expected = torch.tensor([[0.0, 1.0], [2.0, 3.0], [9.0, 5.0]])
        assert torch.equal(file.get_tensor("b"), expected)
        assert torch.equal(file.get_tensor("b2"), expected)


def test_copies_in_dtypes_of_their_own_hold_what_is_stored_of_their_tensor(tmp_path: Path):
    """1 + 2^-9 is 1 in bfloat16, also in a copy of 32 bits; 1 + 2^-8 + 2^-16 is 1.0078125 there.

    What a copy cannot hold is refused, as what a tensor cannot.
    """
    specs = [TensorSpec("wide", (2,), torch.float32), TensorSpec("narrow", (2,), torch.bfloat16)]
    tied = {"rounded": "wide", "widened": "narrow"}
    copies = {"rounded": torch.bfloat16, "widened": torch.float32}
    values = torch.tensor([1 + 2**-9, 1 + 2**-8 + 2**-16])
    with CheckpointWriter(tmp_path, specs, tied=tied, copies=copies) as writer:
        writer.write("wide", torch.zeros(2))
        writer.replace("wide", torch.tensor([0, 1]), values)
        writer.write_rows("narrow", 0, values[:1])
        writer.write_rows("narrow", 1, values[1:])
    found = load_file(tmp_path / "model.safetensors")
    expected = torch.tensor([1.0, 1.0078125])
    assert torch.equal(found["wide"], values)
    assert torch.equal(found["rounded"], expected.bfloat16())
    assert torch.equal(found["narrow"], expected.bfloat16())
    assert torch.equal(found["widened"], expected)
    (tmp_path / "half").mkdir()
    half = CheckpointWriter(tmp_path / "half", specs, tied=tied, copies={"widened": torch.float16})
    with pytest.raises(MethodError, match=r"'widened' holds 70144, but the largest .*float16"):
        half.write("narrow", torch.full((2,), 7e4))


def test_tied_names_stand_with_the_tensor_they_name(tmp_path: Path):
    tensors = {"a": torch.ones(9), "b": torch.ones(9)}
    files = write(tmp_path, tensors, shard_bytes=40, tied={"z": "b"})
    metadata = []
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata.append(opened.metadata())
    assert metadata == [{"format": "pt"}, {"format": "pt", "z": "b"}]


def test_no_tensor_at_all(tmp_path: Path):
    assert load_file(write(tmp_path, {})[0]) == {}


def test_transformers_loads_it(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=16, vocab_size=32)
    model = GPT2LMHeadModel(config)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    config.save_pretrained(tmp_path)
    files = write(
        tmp_path, tensors, shard_bytes=3000, tied={"lm_head.weight": "transformer.wte.weight"}
    )
    assert len(files) > 2
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert_same(
        {name: tensor.detach() for name, tensor in loaded.state_dict().items()},
        {name: tensor.detach() for name, tensor in model.state_dict().items()},
    )


def test_single_values_are_written_again(tmp_path: Path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(4).bfloat16(),
        "c": torch.tensor(1.0),
    }
    with CheckpointWriter(tmp_path, specs(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.replace("a", torch.tensor([1, 4]), torch.tensor([-1.0, -4.0]))
        writer.replace("b", torch.tensor([3]), torch.tensor([1.001]))  # rounds to 1 in bf16
        writer.replace("c", torch.tensor([0]), torch.tensor([7.0]))
    found = load_file(tmp_path / "model.safetensors")
    assert found["a"].tolist() == [[0.0, -1.0, 2.0], [3.0, -4.0, 5.0]]
    assert (found["b"].tolist(), float(found["c"])) == ([1.0] * 4, 7.0)


def test_a_value_written_again_must_fit_too(tmp_path: Path):
    tensors = {"a": torch.ones(3).half()}
    with (
        pytest.raises(MethodError, match="holds 100000"),
        CheckpointWriter(tmp_path, specs(tensors)) as writer,
    ):
        writer.write("a", tensors["a"])
        writer.replace("a", torch.tensor([1]), torch.tensor([1e5]))
