import json
import resource
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from personae.checkpoints import open_checkpoint
from personae.errors import CheckpointError
from toys import INDEX, load, toy_bert, write_sharded

EVERY_DTYPE: dict[str, Tensor] = {
    "f64": torch.tensor([[1.5, -2.0]], dtype=torch.float64),
    "f32": torch.arange(6.0).reshape(3, 2),
    "f16": torch.arange(4.0).half(),
    "bf16": torch.arange(8.0).reshape(2, 2, 2).bfloat16(),
    "scalar": torch.tensor(3.25),
    "empty": torch.zeros(0, 4),
    "i64": torch.tensor([[1, -2]]),
    "i16": torch.tensor([7], dtype=torch.int16),
    "u8": torch.tensor([0, 255], dtype=torch.uint8),
    "flag": torch.tensor([True, False, True]),
}


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    save_file(EVERY_DTYPE, tmp_path / "any.safetensors")
    opened = open_checkpoint(tmp_path / "any.safetensors")
    assert list(opened.specs) == sorted(EVERY_DTYPE)
    for name, tensor in EVERY_DTYPE.items():
        assert opened.specs[name].dtype == tensor.dtype
        assert opened.specs[name].shape == tuple(tensor.shape)
        assert torch.equal(opened.read(name), tensor)
        assert opened.factors(name) is None and not opened.same_as_base(name)
    assert opened.revision is None and dict(opened.auxiliary_files) == {}


@given(rows=st.integers(0, 7), data=st.data())
def test_rows_are_the_slice(
    tmp_path_factory: pytest.TempPathFactory, rows: int, data: st.DataObject
):
    directory = tmp_path_factory.mktemp("rows")
    tensor = torch.arange(rows * 6.0).reshape(rows, 3, 2)
    save_file({"before": torch.ones(3), "x": tensor}, directory / "x.safetensors")
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    opened = open_checkpoint(directory / "x.safetensors")
    assert torch.equal(opened.read_rows("x", start, stop), tensor[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4)])
def test_rows_out_of_range(tmp_path: Path, start: int, stop: int) -> None:
    save_file(EVERY_DTYPE, tmp_path / "any.safetensors")
    opened = open_checkpoint(tmp_path / "any.safetensors")
    with pytest.raises(CheckpointError, match=rf"rows {start}:{stop} of 'f32'.*within 0:3"):
        opened.read_rows("f32", start, stop)
    with pytest.raises(CheckpointError, match="rows 0:1 of 'scalar'"):
        opened.read_rows("scalar", 0, 1)


def test_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    save_file(EVERY_DTYPE, tmp_path / "any.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'scaler'\. Did you mean 'scalar'"):
        open_checkpoint(tmp_path / "any.safetensors").read("scaler")


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    toy_bert(tmp_path, max_shard_size=4000)
    assert (tmp_path / INDEX).exists()
    opened = open_checkpoint(tmp_path)
    expected = load(tmp_path)
    assert set(opened.specs) == set(expected)
    assert all(torch.equal(opened.read(name), expected[name]) for name in expected)


def test_dropped_shared_tensors_are_tied(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    save_model(model, str(tmp_path / "model.safetensors"))
    opened = open_checkpoint(tmp_path)
    assert dict(opened.tied) == {"b.weight": "a.weight"}
    assert set(opened.specs) == {"a.weight", "a.bias", "b.bias"}


def test_index_and_shards_disagree_in_every_way_at_once(tmp_path: Path) -> None:
    one = torch.ones(2)
    write_sharded(tmp_path, {"a.safetensors": {"x": one, "y": one}, "b.safetensors": {"z": one}})
    save_file({"x": one, "extra": one.clone()}, tmp_path / "a.safetensors")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["w"] = "c.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-3])
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(tmp_path)
    text = str(refused.value)
    assert text.startswith("3 faults")
    assert "names c.safetensors, which is not there" in text
    assert "a.safetensors holds 'extra'" in text
    assert "b.safetensors is cut short or padded: 5 bytes of tensors found, 8 expected" in text


def test_what_only_the_index_lists_is_told_and_passed_over(tmp_path: Path, caplog) -> None:
    one = torch.ones(2)
    write_sharded(tmp_path, {"a.safetensors": {"x": one, "y": one}, "b.safetensors": {"z": one}})
    save_file({"x": one}, tmp_path / "a.safetensors")
    assert list(open_checkpoint(tmp_path).specs) == ["x", "z"]
    assert "lists tensors that are not in a.safetensors; they are ignored: y" in caplog.text


def test_a_whole_file_beside_an_index_is_read_as_loaders_do_and_told(tmp_path, caplog) -> None:
    write_sharded(tmp_path, {"a.safetensors": {"x": torch.ones(2)}})
    save_file({"whole": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).specs) == ["whole"]
    assert f"model.safetensors is read, not {INDEX} beside it" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_malformed_index(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="is not a shard index"):
        open_checkpoint(tmp_path)


def test_index_may_not_leave_its_folder(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {"x": "../x.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"outside its folder: \.\./x\.safetensors"):
        open_checkpoint(tmp_path)


def header_file(path: Path, entries: object, data: bytes = b"") -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "data", "text"),
    [
        (b"not json", b"", "header is not valid"),
        (b'{"x": 1}', b"", "header is not valid"),
        (b"[]", b"", "header is not valid"),
        (b'{"__metadata__": 5}', b"", "header is not valid"),
        ({"x": {"dtype": "U8", "shape": [1], "data_offsets": []}}, b"", "is not valid"),
        ({"x": {"dtype": "U8", "shape": [1]}}, b"", "is not valid"),
        ({"x": entry("U8", [-1, -1], 0, 1)}, b"1", "is not valid"),
        (b'{"x":{"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}}', b"1", "is not valid"),
        (b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1e999]}}', b"1", "is not valid"),
        (b'{"x":{"dtype":"U8","shape":"1","data_offsets":[0,1]}}', b"1", "is not valid"),
        (b'{"x":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', b"1", "is not valid"),
        (b'{"x":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}}', b"1", "is not valid"),
        ({"x": entry("U8", [0, 2**63], 0, 0)}, b"", "is not valid"),
        ({"x": entry("U8", [1] * 65, 0, 1)}, b"1", "is not valid"),
        (b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":0}', b"1", "is not valid"),
        ({"x": entry("F32", [2], 0, 8)}, b"1234567", "cut short or padded: 7 bytes"),
        ({"x": entry("F32", [2], 0, 8)}, b"123456789", "cut short or padded: 9 bytes"),
        ({"x": entry("F32", [3], 0, 8)}, b"12345678", "bytes of 'x' do not fit"),
        ({"x": entry("F32", [2], 4, 12)}, b"1" * 12, "bytes of 'x' do not fit"),
        (
            {"x": entry("F32", [2], 0, 8), "y": entry("F32", [2], 4, 12)},
            b"1" * 12,
            "bytes of 'y' do not fit",
        ),
        ({"x": entry("F8_E4M3", [2], 0, 2)}, b"12", "'x' has dtype F8_E4M3.*Dequantise"),
        ({"x": entry("C64", [1], 0, 8)}, b"1" * 8, "'x' has dtype C64, which is not supported"),
        ({"x.weight": entry("U8", [2], 0, 2)}, b"12", "codes of a quantised weight"),
        ({"x.qweight": entry("I32", [1], 0, 4)}, b"1234", "codes of a quantised weight"),
    ],
)
def test_damaged_and_foreign_files(tmp_path: Path, entries: object, data: bytes, text: str) -> None:
    path = header_file(tmp_path / "model.safetensors", entries, data)
    with pytest.raises(CheckpointError, match=text) as refused:
        open_checkpoint(tmp_path)
    assert path.name in str(refused.value)


@pytest.mark.parametrize("kept", ["5", "null", "[]", '{"x": "y"}'])
def test_metadata_that_is_no_text_ties_nothing(tmp_path: Path, kept: str) -> None:
    told = f'"__metadata__": {{"y": {kept}}}'
    text = f'{{{told}, "x": {{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}}}'
    header_file(tmp_path / "model.safetensors", text.encode(), b"1")
    opened = open_checkpoint(tmp_path)
    assert list(opened.specs) == ["x"] and not opened.tied


@pytest.mark.parametrize("length", [0, 3, 8, 9, 20])
def test_truncated_header(tmp_path: Path, length: int) -> None:
    save_file({"x": torch.ones(4)}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="is not a safetensors file, or is damaged"):
        open_checkpoint(path)


def test_a_file_cut_after_opening_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(40)}, path)
    opened = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ended inside 'x'"):
        opened.read("x")


def test_threads_read_side_by_side(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((50, 40), float(i)) for i in range(8)}
    save_file(tensors, tmp_path / "x.safetensors")
    opened = open_checkpoint(tmp_path / "x.safetensors")
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            for name, tensor in tensors.items():
                if not torch.equal(opened.read(name), tensor):
                    wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_does_not_grow_with_what_was_read(tmp_path: Path) -> None:
    """64 MiB in 16 tensors read one by one; the peak may grow by a few of them, not by all."""
    count, numel = 16, 1 << 20
    path = tmp_path / "x.safetensors"
    save_file({f"t{i}": torch.full((numel,), float(i)) for i in range(count)}, path)
    opened = open_checkpoint(path)
    before = resident_bytes()
    peak = 0
    for name in opened.specs:
        opened.read(name)
        peak = max(peak, resident_bytes() - before)
    assert peak < 4 * numel * 4


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("resident memory is read from /proc, which only Linux has")
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def test_what_is_written_by_others_is_read_alike(tmp_path: Path) -> None:
    """The safetensors library itself is the oracle."""
    directory = toy_bert(tmp_path, dtype=torch.bfloat16)
    expected = load_file(directory / "model.safetensors")
    opened = open_checkpoint(directory)
    assert {n: (s.shape, s.dtype) for n, s in opened.specs.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in expected.items()
    }
    assert all(torch.equal(opened.read(n), t) for n, t in expected.items())
