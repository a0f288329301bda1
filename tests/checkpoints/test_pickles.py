import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from personae.checkpoints import open_checkpoint, pickles
from personae.errors import CheckpointError, Faults

TENSORS = {
    "b": torch.arange(6.0).reshape(3, 2),
    "a": torch.tensor(2.5, dtype=torch.bfloat16),
    "position_ids": torch.arange(4),
}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_state_dict(tmp_path: Path, name: str, zipped: bool) -> None:
    torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zipped)
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    for source in (tmp_path, tmp_path / name):
        opened = open_checkpoint(source)
        assert list(opened.specs) == ["a", "b", "position_ids"]
        assert opened.specs["a"].shape == () and opened.specs["a"].dtype == torch.bfloat16
        for key, tensor in TENSORS.items():
            assert torch.equal(opened.read(key), tensor)
        assert torch.equal(opened.read_rows("b", 1, 3), TENSORS["b"][1:])
        opened.close()
        assert torch.equal(opened.read("b"), TENSORS["b"])


def test_what_is_read_is_not_mapped_to_the_file(tmp_path: Path) -> None:
    """A view of the file would change, or crash, with the file."""
    path = tmp_path / "m.pt"
    torch.save(TENSORS, path)
    tensor = open_checkpoint(path).read("b")
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(tensor, TENSORS["b"])


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_nested_state_dict_is_found_and_said(
    tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({key: TENSORS, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "m.pt")
    with caplog.at_level(logging.WARNING):
        opened = open_checkpoint(tmp_path / "m.pt")
    assert set(opened.specs) == set(TENSORS)
    assert f"tensors taken from '{key}'; left out: epoch, optimizer." in caplog.text


def test_the_same_view_is_tied_once_to_the_first(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(4, 3)
    state = {"z": shared, "a": shared, "part": shared[1:], "view": shared.T, "copy": shared.clone()}
    torch.save(state, tmp_path / "m.pt")
    opened = open_checkpoint(tmp_path / "m.pt")
    assert dict(opened.tied) == {"a": "z"}
    assert list(opened.specs) == ["copy", "part", "view", "z"]
    assert torch.equal(opened.read("view"), shared.T) and opened.read("view").is_contiguous()


class Runs:
    """Unpickling this would call `print`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code was run",)


def test_code_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": TENSORS["a"], "x": Runs()}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"would run '(builtins\.)?print' when loaded"):
        open_checkpoint(tmp_path / "m.pt")
    assert "code was run" not in capsys.readouterr().out


def test_whole_modules_are_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"would run 'torch\.nn\.modules\.linear\.Linear'"):
        open_checkpoint(tmp_path / "module.pt")


@pytest.mark.parametrize("keep", [0, 5, 300])
def test_damaged(tmp_path: Path, keep: int) -> None:
    torch.save(TENSORS, tmp_path / "m.pt")
    (tmp_path / "m.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"m\.pt is not a readable torch file"):
        open_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize("content", [b"\x80", b"\x80\x02]q\x00K", b"((((", b"PK\x03\x04", b"}."])
def test_damaged_in_ways_of_which_the_unpickler_trips(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.pt (is not a readable torch file|holds)"):
        open_checkpoint(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_values(tmp_path: Path) -> None:
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    state = {
        "columns": torch.eye(3).to_sparse_csc(),
        "nested": ragged,
        "nowhere": torch.empty(3, device="meta"),
    }
    torch.save(TENSORS | state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="3 faults") as refused:
        open_checkpoint(tmp_path / "m.pt")
    text = str(refused.value)
    assert all(f"'{name}' is sparse, nested or quantised" in text for name in ("columns", "nested"))
    assert "'nowhere' has no values (meta device)" in text


def test_entries_that_are_no_tensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Numbers, texts and None are left out with a word; anything else is a fault."""
    torch.save({**TENSORS, "epoch": 3, "name": "x", "none": None}, tmp_path / "fine.pt")
    assert set(open_checkpoint(tmp_path / "fine.pt").specs) == set(TENSORS)
    assert "left out, because they are not tensors: epoch, name, none." in caplog.text

    torch.save({**TENSORS, "extra": {"a": 1}, "more": [1]}, tmp_path / "not.pt")
    with pytest.raises(CheckpointError, match="'extra' is a dict, not a tensor") as refused:
        open_checkpoint(tmp_path / "not.pt")
    assert "'more' is a list" in str(refused.value)

    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        open_checkpoint(tmp_path / "list.pt")


def sharded(directory: Path) -> dict[str, str]:
    torch.save({"b": TENSORS["b"]}, directory / "one.bin")
    torch.save({"a": TENSORS["a"]}, directory / "two.bin")
    return {"b": "one.bin", "a": "two.bin"}


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    write_index(tmp_path, sharded(tmp_path))
    opened = open_checkpoint(tmp_path)
    assert list(opened.specs) == ["a", "b"]
    assert torch.equal(opened.read("a"), TENSORS["a"])


def test_shards_and_index_disagree(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path)
    write_index(tmp_path, {"b": "one.bin", "c": "two.bin"})
    with pytest.raises(CheckpointError, match=r"does not list 'a'"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {**weight_map, "d": "three.bin"})
    with pytest.raises(CheckpointError, match=r"names three\.bin, which is not there"):
        open_checkpoint(tmp_path)
    torch.save({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "two.bin")
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"'b' is in both .*one\.bin and .*two\.bin"):
        open_checkpoint(tmp_path)


def test_float8_and_sparse_are_refused_together(tmp_path: Path) -> None:
    state = {"x": torch.ones(2).to(torch.float8_e4m3fn), "y": torch.eye(2).to_sparse()}
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="'x' has dtype float8_e4m3fn") as refused:
        open_checkpoint(tmp_path / "m.pt")
    assert "'y' is sparse, nested or quantised" in str(refused.value)


def test_mappings_are_dropped_and_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 24 bytes a mapping, `b` (24 bytes) fits once, so every read of it after maps anew."""
    monkeypatch.setattr("personae.checkpoints.pickles._MAPPED_BYTES", 24)
    torch.save(TENSORS, tmp_path / "m.pt")
    opened = open_checkpoint(tmp_path / "m.pt")
    loads: list[Path] = []
    load = pickles._load

    def count(path: Path, faults: Faults, *, warn: bool) -> dict[str, torch.Tensor]:
        loads.append(path)
        return load(path, faults, warn=warn)

    monkeypatch.setattr(pickles, "_load", count)
    for _ in range(3):
        assert torch.equal(opened.read("b"), TENSORS["b"])
    assert len(loads) == 3


def test_a_file_changed_after_opening_is_noticed(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "m.pt")
    opened = open_checkpoint(tmp_path / "m.pt")
    torch.save({"b": torch.ones(1)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"m\.pt was changed after it was opened"):
        opened.read("b")
