"""The pack format, byte for byte, on a pack small enough to work by hand.

The reference has three tensors, and DTS at rank fraction 0.5 codes these deltas of them:

`bias` = [1, -2, 3, -4, 0], no decomposition. Positive {1, 3}: of two values one is large, 3; the
small group has scale 1, the large one 3. Negative {2, 4}: scales 2 and 4. Codes are
1 (negative) + 2 (large), the zero has code 0:
    codes 0 1 2 3 | 0        bytes 0 + 1·4 + 2·16 + 3·64 = 228, 0
    zeros 0 0 0 0 1          byte 16
    scales of codes 0 to 3   1 2 3 4

`corner` = [[0, 0], [4, 0]]: the first row did not change, so rows = 0 1 is byte 2 and U has the one
entry 1; Vᵀ = [1, 0], σ = 4. One positive value: none is large.
    codes 0 | 0 0            bytes 0, 0        zeros 0 | 0 1    bytes 0, 2
    scales 1 0 0 0 | 1 0 0 0

`square` = 8 u vᵀ with u = [½ ½ ½ -½], v = [½ -½ ½ ½]. Of three equal positive values one is large,
the first; the single negative one is small, so the scale of code 3 is 0.
    codes of u 2 0 0 1       byte 2 + 1·64 = 66
    codes of v 2 1 0 0       byte 2 + 1·4 = 6
    scales ½ ½ ½ 0 | ½ ½ ½ 0

By the papers' rule: 3·5 + (3·(2 + 2) + 32) + (3·(4 + 4) + 32) = 15 + 44 + 56 = 115 bits; lean with
2 bits an element: 10 + 40 + 48 = 98.
"""

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch

from families import listing
from personae._types import TensorSpec
from personae.commands.pack import add_tasks, pack, remove_task
from personae.commands.unpack import unpack
from personae.errors import PackError, RecipeError
from personae.methods.codecs.dts import DTS
from personae.packs.fingerprint import combine, tensor_digest
from personae.packs.manifest import Manifest, ReferenceRecord, RenamingRecord
from personae.packs.reader import Pack
from personae.packs.writer import CodedTensor, PackWriter
from personae.recipe import PackSettings
from toys import load

GOLDEN = Path(__file__).parents[1] / "golden" / "pack"

REFERENCE = {
    "bias": torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0]),
    "corner": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "square": torch.ones(4, 4),
}
DELTAS = {
    "bias": torch.tensor([1.0, -2.0, 3.0, -4.0, 0.0]),
    "corner": torch.tensor([[0.0, 0.0], [4.0, 0.0]]),
    "square": torch.tensor(
        [
            [2.0, -2.0, 2.0, 2.0],
            [2.0, -2.0, 2.0, 2.0],
            [2.0, -2.0, 2.0, 2.0],
            [-2.0, 2.0, -2.0, -2.0],
        ]
    ),
}
HEAD = torch.tensor([7.0, 9.0])


def _bytes(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


PARTS = {
    "bias": {
        "scales": torch.tensor([1.0, 2, 3, 4]),
        "codes": _bytes(228, 0),
        "zeros": _bytes(16),
    },
    "corner": {
        "scales": torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0]),
        "codes": _bytes(0, 0),
        "zeros": _bytes(0, 2),
        "singular_values": torch.tensor([4.0]),
        "rows": _bytes(2),
    },
    "square": {
        "scales": torch.tensor([0.5, 0.5, 0.5, 0, 0.5, 0.5, 0.5, 0]),
        "codes": _bytes(66, 6),
        "singular_values": torch.tensor([8.0]),
    },
}

# What follows the header: fp32 before bytes, then by name; blocks in the order of their names.
DATA = (
    struct.pack("<2f", 7, 9)  # private/head.bias
    + struct.pack("<4f", 1, 2, 3, 4)  # scales of bias,
    + struct.pack("<8f", 1, 0, 0, 0, 1, 0, 0, 0)  # of corner,
    + struct.pack("<8f", 0.5, 0.5, 0.5, 0, 0.5, 0.5, 0.5, 0)  # of square
    + struct.pack("<2f", 4, 8)  # singular_values
    + bytes([228, 0, 0, 0, 66, 6])  # codes
    + bytes([2])  # rows
    + bytes([16, 0, 2])  # zeros
)


def _without_versions(path: Path) -> dict[str, object]:
    content = json.loads(path.read_text())
    return {key: v for key, v in content.items() if key not in ("tool_version", "checksum")}


def test_the_file_holds_what_was_worked_by_hand():
    raw = (GOLDEN / "tasks/x.safetensors").read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_bytes])
    assert raw[8 + header_bytes :] == DATA
    assert json.loads(header.pop("__metadata__")["personae-pack"]) == {
        "format": "personae-pack",
        "format_version": 1,
        "task": "x",
        "method": "dts",
        "reference": "xxh3:59b5e6dc423a30c4291458faa13d3a74",
    }
    assert header == {
        "private/head.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "scales": {"dtype": "F32", "shape": [20], "data_offsets": [8, 88]},
        "singular_values": {"dtype": "F32", "shape": [2], "data_offsets": [88, 96]},
        "codes": {"dtype": "U8", "shape": [6], "data_offsets": [96, 102]},
        "rows": {"dtype": "U8", "shape": [1], "data_offsets": [102, 103]},
        "zeros": {"dtype": "U8", "shape": [3], "data_offsets": [103, 106]},
    }


@pytest.mark.parametrize("name", DELTAS)
def test_the_codec_gives_these_parts_and_takes_them_back(name):
    codec = DTS(rank_fraction=0.5)
    shape = tuple(DELTAS[name].shape)
    coded = codec.encode(DELTAS[name])
    assert coded.keys() == PARTS[name].keys()
    for part, values in PARTS[name].items():
        if values.dtype == torch.uint8:
            assert torch.equal(coded[part], values), part
        else:  # a solver may miss ½ by a rounding
            torch.testing.assert_close(coded[part], values, rtol=1e-6, atol=0)
    assert torch.equal(codec.decode(PARTS[name], shape), DELTAS[name])


def test_writing_gives_these_bytes(tmp_path):
    manifest = Manifest(
        method="dts",
        parameters={"rank_fraction": 0.5},
        counting="on_disk_native",
        vector="task",
        reference=ReferenceRecord(
            kind="base", source="dict", fingerprint="xxh3:59b5e6dc423a30c4291458faa13d3a74"
        ),
    )
    coded = {
        name: CodedTensor(
            shape=tuple(delta.shape),
            blocks=((0, 0, len(delta)),),
            parts=(PARTS[name],),
            ranks=(None if name == "bias" else 1,),
            energy=float((delta**2).sum()),  # 1 + 4 + 9 + 16 = 30, 16, 16 · 4 = 64
            relative_error=0.0,
        )
        for name, delta in DELTAS.items()
    }
    PackWriter(tmp_path, manifest).add_task(
        "x",
        coded,
        {"head.bias": HEAD},
        {},
        {},
        source="dict",
        fingerprint="xxh3:98a549f7e93dbd2811e5d271d7459393",
        parameters=DTS(rank_fraction=0.5).model_dump(mode="json"),
        renaming=RenamingRecord(),
        base_parameters=5 + 4 + 16,
        base_bytes=4 * 25,
        counted_bits=115,
        counted_lean_bits=98,
    )
    written = (tmp_path / "tasks/x.safetensors").read_bytes()
    assert written == (GOLDEN / "tasks/x.safetensors").read_bytes()
    assert _without_versions(tmp_path / "pack.json") == _without_versions(GOLDEN / "pack.json")


def test_packing_the_family_gives_the_same_record_up_to_rounding(tmp_path):
    expert = {name: REFERENCE[name] + delta for name, delta in DELTAS.items()}
    settings = PackSettings(parameters={"rank_fraction": 0.5})
    packed = pack(REFERENCE, {"x": expert | {"head.bias": HEAD}}, tmp_path / "p", settings=settings)
    found, golden = packed.task("x"), Pack(GOLDEN).task("x")
    varying = {"sha256", "tensors"}
    assert found.model_dump(exclude=varying) == golden.model_dump(exclude=varying)
    for name, record in golden.tensors.items():
        assert found.tensors[name].blocks == record.blocks
        assert found.tensors[name].relative_error == pytest.approx(0, abs=1e-12)
    assert packed.manifest.reference == Pack(GOLDEN).manifest.reference


def test_reading_gives_the_expert_exactly(tmp_path):
    before = listing(GOLDEN)
    unpack(GOLDEN, "x", tmp_path / "x", base=REFERENCE)
    rebuilt = load(tmp_path / "x")
    assert rebuilt.keys() == {"bias", "corner", "square", "head.bias"}
    for name, delta in DELTAS.items():
        assert torch.equal(rebuilt[name], REFERENCE[name] + delta), name
    assert torch.equal(rebuilt["head.bias"], HEAD)
    assert listing(GOLDEN) == before


# Version 2: what all tasks share, and what a task is about. Older packs keep their bytes.


def _bare(method: str = "dts") -> Manifest:
    reference = ReferenceRecord(kind="base", source="dict", fingerprint="xxh3:" + 32 * "0")
    return Manifest(
        method=method,
        parameters={},
        counting="on_disk_native",
        vector="task",
        reference=reference,
    )


def test_the_shared_file_is_plain_safetensors(tmp_path):
    writer = PackWriter(tmp_path, _bare("emr"))
    spec = TensorSpec("bias", (2,), torch.float32)
    writer.add_shared([spec], 64, lambda file: file.write("bias", torch.tensor([1.0, -2.0])))
    raw = (tmp_path / "shared.safetensors").read_bytes()
    header_bytes = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + header_bytes])["bias"] == {
        "dtype": "F32",
        "shape": [2],
        "data_offsets": [0, 8],
    }
    assert raw[8 + header_bytes :] == struct.pack("<2f", 1, -2)
    content = json.loads((tmp_path / "pack.json").read_text())
    assert content["format_version"] == 2
    assert content["shared"] == {
        "file": "shared.safetensors",
        "sha256": hashlib.sha256(raw).hexdigest(),
        "bytes": len(raw),
        "tensors": {"bias": [2]},
        "counted_bits": 64,
    }
    shared = Pack(tmp_path).open_shared()
    assert shared is not None
    bias = shared.read("bias")
    assert bias is not None
    assert bias.tolist() == [1, -2]
    assert shared.read("other") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pack.json",
        "shared.safetensors",
        "tasks",
    ]


def test_a_damaged_shared_file_is_noticed(tmp_path):
    writer = PackWriter(tmp_path, _bare("emr"))
    spec = TensorSpec("bias", (2,), torch.float32)
    writer.add_shared([spec], 64, lambda file: file.write("bias", torch.ones(2)))
    file = tmp_path / "shared.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(PackError, match=r"shared.safetensors is damaged: its SHA-256"):
        Pack(tmp_path).open_shared()
    file.unlink()
    with pytest.raises(PackError, match=r"shared.safetensors, which all tasks need, is missing"):
        Pack(tmp_path).open_shared()


def test_what_version_1_can_say_stays_version_1():
    content = json.loads(_bare().to_json())
    assert content["format_version"] == 1
    assert "shared" not in content
    assert json.loads(_bare("t_switch").to_json())["format_version"] == 2


def test_characteristics_are_kept(tmp_path):
    expert = {name: REFERENCE[name] + delta for name, delta in DELTAS.items()}
    words = {"x": ["cat", "a dog"]}
    made = pack(REFERENCE, {"x": expert, "y": expert}, tmp_path / "p", characteristics=words)
    assert made.task("x").characteristics == ("cat", "a dog")
    assert made.task("y").characteristics == ()
    content = json.loads((tmp_path / "p/pack.json").read_text())
    assert content["format_version"] == 2
    assert content["shared"] is None
    assert content["tasks"]["x"]["characteristics"] == ["cat", "a dog"]
    again = remove_task(tmp_path / "p", "x")
    assert again.manifest.format_version == 1
    again = add_tasks(tmp_path / "p", {"z": expert}, base=REFERENCE, characteristics={"z": ["emu"]})
    assert again.task("z").characteristics == ("emu",)
    with pytest.raises(RecipeError, match="There is no expert 'w' to describe"):
        pack(REFERENCE, {"x": expert}, tmp_path / "q", characteristics={"w": ["cat"]})


def test_residual_triplets_byte_for_byte(tmp_path):
    """Integers of the matrix as in `tests/methods/test_residual.py`; the vector is worked there."""
    coded_matrix = list(bytes.fromhex("01f2aefaeac200d0"))
    coded_vector = list(bytes.fromhex("3863e8dc"))
    parts = {
        "matrix": {
            "singular_values": torch.tensor([0.5, 1.0]).bfloat16(),
            "models": _bytes(3, 3),
            "codes": _bytes(*coded_matrix),
            "rows": _bytes(6),
        },
        "vector": {
            "singular_values": torch.tensor([0.25]).bfloat16(),
            "models": _bytes(3),
            "codes": _bytes(*coded_vector),
            "zeros": _bytes(4),
        },
    }
    shapes = {"matrix": (3, 4), "vector": (3,)}
    reference = {name: torch.ones(shape) for name, shape in shapes.items()}
    coded = {
        name: CodedTensor(
            shape=shapes[name],
            blocks=((0, 0, 3),),
            parts=(own,),
            ranks=(len(own["models"]),),
            energy=1.0,
            relative_error=0.5,
        )
        for name, own in parts.items()
    }
    fingerprint = combine({name: tensor_digest(each) for name, each in reference.items()})
    manifest = _bare("residual")
    manifest = manifest.model_copy(
        update={"reference": manifest.reference.model_copy(update={"fingerprint": fingerprint})}
    )
    (tmp_path / "p").mkdir()
    PackWriter(tmp_path / "p", manifest).add_task(
        "x",
        coded,
        {},
        {},
        {},
        source="dict",
        fingerprint="xxh3:" + 32 * "0",
        parameters={"gain": 10.0, "size": None},
        base_parameters=15,
        base_bytes=60,
        counted_bits=256,
        counted_lean_bits=256,
    )
    raw = (tmp_path / "p/tasks/x.safetensors").read_bytes()
    assert raw[8 + int.from_bytes(raw[:8], "little") :] == (
        bytes([0x00, 0x3F, 0x80, 0x3F, 0x80, 0x3E])  # singular_values 0.5, 1, 0.25
        + bytes([*coded_matrix, *coded_vector])  # codes
        + bytes([3, 3, 3])  # models
        + bytes([6])  # rows
        + bytes([4])  # zeros
    )
    assert Pack(tmp_path / "p").manifest.format_version == 2
    unpack(tmp_path / "p", "x", tmp_path / "out", base=reference)
    rebuilt = load(tmp_path / "out")
    assert rebuilt["matrix"].tolist() == [[1, 1, 1, 1], [9, 1, -3, 3], [-5, 0, 6, 0]]
    assert rebuilt["vector"].tolist() == [2, 0.5, 1]
