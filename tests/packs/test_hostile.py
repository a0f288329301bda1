"""A pack is a hostile input: what is edited, with checksums that hold, is refused or harmless."""

import copy
import functools
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import listing, saved, small_base, tuned
from hostile import PHASES, Json, edit, places, within_bounds
from personae import PackSettings
from personae.checkpoints import open_checkpoint
from personae.commands.inspect import inspect_pack
from personae.commands.pack import add_tasks, pack, remove_task, settings_of
from personae.commands.packed import Pack
from personae.commands.unpack import unpack
from personae.commands.verify import verify
from personae.errors import PackError, PersonaeError
from personae.methods import CODECS
from personae.packs.manifest import ROUTER, SHARED, checksum
from personae.packs.writer import PackWriter
from personae.run.outline import auxiliary_files_of
from personae.run.rebuilt import Rebuilt, left_in_words
from personae.run.reference import open_reference
from personae.run.work import Work

PARAMETERS: dict[str, dict[str, Any]] = {
    "bitdelta": {"tensors": "all"},
    "delta_come": {"bands": [[1, 8], [2, 3]], "bits_per_weight": 4},
    "dts": {"rank_fraction": 0.5, "qkv": "split"},
    "residual": {"gain": 0.5},
    "t_switch": {"density": 0.1},
    "ultradelta": {"tensors": "all", "density": 0.2, "rest": "exact"},
}
"""So that every kind of part occurs."""
ROUTED = "svd"
"""The codec whose pack has a router."""
OTHER_MODELS = {"renaming", "absent", "dtypes", "tied", "grown", "parameters"}
"""What can be said otherwise without a contradiction: of names, dtypes, how codes are read."""


class Made(NamedTuple):
    folder: Path
    content: Json
    files: dict[str, bytes]
    model: dict[str, Tensor]


@functools.cache
def _family(where: Path) -> None:
    base = small_base() | {"in_proj_weight": torch.arange(48.0).reshape(12, 4) / 48}
    saved(base, where / "base", '{"of": "base"}')
    news = tuned(base, 1, scale=0.1)
    news["embed.weight"][3:9] = base["embed.weight"][3:9]
    news["embed.weight"] = torch.cat([news["embed.weight"], torch.ones(2, 16)])
    news["conv.weight"][0, 0, 0] = base["conv.weight"][0, 0, 0]
    news["layer.bias"] = news["layer.bias"].half()
    saved(news | {"head.weight": torch.ones(3, 4)}, where / "news", '{"of": "news"}')
    saved(tuned(base, 2, scale=0.1), where / "law", '{"of": "law"}')


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    where = tmp_path_factory.mktemp("hostile")
    _family(where)

    @functools.cache
    def made(method: str) -> Made:
        wanted = PackSettings(method=method, parameters=PARAMETERS.get(method, {}))
        folder = where / method
        experts = {name: str(where / name) for name in ("news", "law")}
        opened = pack(str(where / "base"), experts, folder, settings=wanted)
        if method == ROUTED:
            examples = {"news": torch.eye(3, 4), "law": torch.ones(2, 4)}
            writer = PackWriter(folder, opened.manifest)
            writer.set_router(examples, neighbours=2, mode="mix", pool="first")
            opened = Pack(folder)
        content = json.loads((folder / "pack.json").read_text())
        del content["checksum"]
        files = {k: v for k, v in listing(folder).items() if v is not None and k != "pack.json"}
        return Made(folder, content, files, _rebuild(opened))

    return made


def _write(folder: Path, content: Json) -> None:
    try:
        stated = checksum(content)
    except ValueError:
        stated = ""
    (folder / "pack.json").write_text(json.dumps({**content, "checksum": stated}))


def _rebuild(opened: Pack, task: str = "news", own_reference: bool = True) -> dict[str, Tensor]:
    """All that a command does with a pack, but for writing what comes out."""
    json.dumps(inspect_pack(opened), allow_nan=False)
    left_in_words(opened.task(task))
    settings_of(opened)
    if opened.manifest.router is not None:
        features = opened.read_router()
        assert _finite(features) and features.keys() <= opened.manifest.tasks.keys()
        assert len({len(one.T) for one in features.values()}) == 1
    base = None if own_reference else open_checkpoint(opened.directory.parent / "base")
    with closing(open_reference(opened, None, Work()) if base is None else base) as reference:
        rebuilt = Rebuilt(opened, task, reference)
        auxiliary_files_of(opened, task, reference)
        model = {name: rebuilt.read(name) for name in rebuilt.specs}
        assert all(tuple(t.shape) == rebuilt.specs[name].shape for name, t in model.items())
        return {name: t.to(rebuilt.specs[name].dtype) for name, t in model.items()}


def _finite(model: dict[str, Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in model.values())


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# Edits of pack.json


@pytest.mark.parametrize("method", sorted(CODECS))
def test_an_edited_manifest_is_refused_or_gives_the_right_model(
    method: str, make: Callable[[str], Made]
):
    made = make(method)
    # The record of one task is most of what can be edited; the other's is like it.
    paths = [path for path in places(made.content) if path[:2] != ("tasks", "law")]
    whole = [path for path in paths if len(path) < 4]

    @settings(phases=PHASES, max_examples=150)
    @given(st.data(), st.booleans())
    def fuzz(data: st.DataObject, shallow: bool) -> None:
        content = copy.deepcopy(made.content)
        path = edit(content, data, whole if shallow else paths)
        _write(made.folder, content)
        try:
            with within_bounds():
                model = _rebuild(Pack(made.folder), own_reference=path[0] == "reference")
        except PersonaeError as error:
            assert str(error)
        else:
            assert _finite(model)
            assert _same(model, made.model) or set(path) & OTHER_MODELS, path

    try:
        fuzz()
    finally:
        _write(made.folder, made.content)


def test_an_edited_router_is_refused_or_reads_as_before(make: Callable[[str], Made]):
    made = make(ROUTED)
    paths = [path for path in places(made.content) if path[0] == "router"]
    taken = set[str]()

    @settings(phases=PHASES, max_examples=200)
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        content = copy.deepcopy(made.content)
        path = edit(content, data, paths)
        _write(made.folder, content)
        try:
            with within_bounds():
                model = _rebuild(Pack(made.folder))
        except PersonaeError as error:
            assert str(error)
        else:
            assert _same(model, made.model)
            if content != made.content:
                taken.add(path[-1])

    try:
        fuzz()
    finally:
        _write(made.folder, made.content)
    # Only what stands in the manifest alone may be said otherwise.
    assert {"neighbours"} <= taken <= {"neighbours", "mode", "pool", "router"}


NAMES = [
    *("", ".", "/", "..", "../x", "/x", "a/b", "layer/weight", "\0", "x\n", "é", "\U0001f600", "'"),
    *("__metadata__", "head.weight", "embed.weight", "layer.weight", "layer.bias", "tensor", "x"),
    *("a" * 300, "a" * 100_000, "\ud800", "model.safetensors", "tasks/news", "~", "private/x"),
]
"""What a pack may say that an expert calls its tensors."""


def test_given_names_are_refused_or_are_those_of_the_rebuilt_model(
    make: Callable[[str], Made], tmp_path: Path
):
    """To the file that is written: each tensor as before, under the name that is given."""
    made = make("dts")
    base = load_file(made.folder.parent / "base/model.safetensors")
    names = st.sampled_from([*base, "head.weight", "nothing"])

    taken = list[dict[str, str]]()

    @settings(phases=PHASES, max_examples=60)
    @given(st.dictionaries(names, st.sampled_from(NAMES) | st.text(max_size=8), max_size=4))
    def fuzz(given_names: dict[str, str]) -> None:
        content = copy.deepcopy(made.content)
        content["tasks"]["news"]["renaming"]["given"] = given_names
        content["format_version"] = 2  # which has such names
        _write(made.folder, content)
        try:
            with within_bounds():
                out = unpack(made.folder, "news", tmp_path / "out", overwrite=True)
        except PersonaeError as error:
            assert str(error)
        else:
            expected = {given_names.get(name, name): t for name, t in made.model.items()}
            assert len(expected) == len(made.model)
            assert _same(load_file(out / "model.safetensors"), expected)
            assert {*out.parent.iterdir()} == {out}
            taken.append(given_names)

    try:
        fuzz()
    finally:
        _write(made.folder, made.content)
    assert any(taken)  # not all are refused


# Edits of the task file, and of what all tasks share

BYTES = [b"\xff", b"\0", struct.pack("<f", 3e38), struct.pack("<f", float("nan")), b"\x80\x7f"]


def _edited_file(raw: bytes, data: st.DataObject) -> bytes:
    """A file of the pack with one thing about one of its tensors changed."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header: Json = json.loads(raw[8:start])
    values = bytearray(raw[start:])
    about = header.pop("__metadata__", {})
    name = data.draw(st.sampled_from(sorted(header)), "name")
    entry = header[name]
    begin, end = entry["data_offsets"]
    how = data.draw(st.sampled_from(["bytes", "fill", "dtype", "shape", "rename", "drop", "cut"]))
    if how in ("bytes", "fill") and end > begin:
        what = data.draw(st.sampled_from(BYTES))
        place = data.draw(st.integers(begin, end - 1)) if how == "bytes" else begin
        count = len(what) if how == "bytes" else end - begin
        values[place : min(place + count, end)] = (what * count)[: min(count, end - place)]
    elif how == "dtype":
        entry["dtype"] = data.draw(st.sampled_from(["F32", "F16", "BF16", "U8", "I32", "F64", "x"]))
    elif how == "shape":
        entry["shape"] = data.draw(st.sampled_from([[], [0], [1, *entry["shape"]], [2**40], [-1]]))
    elif how == "rename":
        header[data.draw(st.sampled_from(["rows", "exact", "x", "private/x"]))] = header.pop(name)
    elif how == "drop":
        del header[name]
    else:
        values = values[: data.draw(st.integers(0, len(values)))]
    text = json.dumps({**header, "__metadata__": about}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(values)


TASK_FILE = "tasks/news.safetensors"
EDITED = [(method, TASK_FILE) for method in sorted(CODECS)] + [
    (method, SHARED) for method in sorted(CODECS) if CODECS[method].shares
]
EDITED.append((ROUTED, ROUTER))


@pytest.mark.parametrize(("method", "file"), EDITED)
def test_an_edited_file_is_refused_or_gives_a_finite_model(
    method: str, file: str, make: Callable[[str], Made]
):
    made = make(method)

    @settings(phases=PHASES, max_examples=80)
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        raw = _edited_file(made.files[file], data)
        content = copy.deepcopy(made.content)
        whole = {SHARED: content.get("shared"), ROUTER: content.get("router")}
        record = whole.get(file) or content["tasks"]["news"]
        record |= {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
        (made.folder / file).write_bytes(raw)
        _write(made.folder, content)
        try:
            with within_bounds():
                model = _rebuild(Pack(made.folder), own_reference=False)
        except PersonaeError as error:
            assert str(error)
        else:
            kept_whole = ("head.weight", "embed.weight")
            assert _finite({name: model[name] for name in model if name not in kept_whole})
            assert {n: t.shape for n, t in model.items()} == {
                n: t.shape for n, t in made.model.items()
            }

    try:
        fuzz()
    finally:
        (made.folder / file).write_bytes(made.files[file])
        _write(made.folder, made.content)


# One by one, what an attack found


@pytest.fixture
def spoilt(make: Callable[[str], Made], tmp_path: Path) -> Path:
    """A copy of the pack by DTS, beside its base."""
    made = make("dts")
    shutil.copytree(made.folder.parent / "base", tmp_path / "base")
    return shutil.copytree(made.folder, tmp_path / "pack")


def _change(folder: Path, change: Callable[[Json], object]) -> None:
    content = json.loads((folder / "pack.json").read_text())
    del content["checksum"]
    change(content)
    _write(folder, content)


@pytest.mark.parametrize("method", sorted(CODECS))
def test_shapes_beyond_the_references_are_refused_before_anything_is_read(
    method, make, tmp_path, monkeypatch
):
    made = make(method)
    folder = shutil.copytree(made.folder, tmp_path / "pack")

    def grow(content: Json) -> None:
        record = content["tasks"]["law"]["tensors"]["layer.weight"]
        record["shape"] = [30_000_000, 32]
        record["blocks"] = [{"axis": 0, "start": 0, "stop": 30_000_000, "rank": 0, "parts": {}}]
        content["tasks"]["law"]["bytes"] += 1
        record["bytes"] = 0

    _change(folder, grow)
    monkeypatch.setattr(Pack, "open_task", lambda *_: pytest.fail("was opened"))
    told = r"'layer.weight' is coded as \[30000000, 32\], the ref"
    if CODECS[method].shares:
        told = "'layer.weight': what tasks share of it has another shape"
    with within_bounds(), pytest.raises(PackError, match=told):
        unpack(folder, "law", tmp_path / "out", base=made.folder.parent / "base")


def test_norms_of_zero_are_no_fault(spoilt):
    def silence(content: Json) -> None:
        tensors = content["tasks"]["law"]["tensors"]
        for record in tensors.values():
            record["energy"] = 0
        block = tensors["scale"]["blocks"][0] | {"rank": 0, "parts": {}}
        tensors["scale"] |= {"bytes": 0, "blocks": [block]}

    _change(spoilt, silence)
    assert Pack(spoilt).task("law").left == {"scale": 0.0}


def test_more_singular_values_than_sides_are_refused(spoilt):
    def widen(content: Json) -> None:
        block = content["tasks"]["law"]["tensors"]["layer.weight"]["blocks"][0]
        block["rank"] = block["parts"]["singular_values"] = 2_000_000

    _change(spoilt, widen)
    with pytest.raises(
        PackError, match=r"'singular_values' has 2000000 elements, expected 1 to 12"
    ):
        Pack(spoilt)


@pytest.fixture
def routed(make: Callable[[str], Made], tmp_path: Path) -> Path:
    """A copy of the pack that has a router."""
    return shutil.copytree(make(ROUTED).folder, tmp_path / "pack")


ROUTERS: dict[str, tuple[Json, str]] = {
    "sizes beyond the file": ({"examples": {"law": 2**50, "news": 3}}, "cannot hold its features"),
    "wider than the file": ({"width": 2**50}, "cannot hold its features"),
    "examples of no task": ({"examples": {"law": 2, "x": 3}}, "examples of 'x', which is no task"),
    "no examples": ({"examples": {}}, "it has no examples"),
    "nothing votes": ({"neighbours": 0}, "nothing that votes"),
    "another file": ({"file": "../x.safetensors"}, r"file '../x.safetensors', expected router\."),
    "another way": ({"mode": "guess"}, r"router\.mode: Input should be 'mix' or 'pick'"),
    "fewer than stored": ({"examples": {"law": 1, "news": 3}}, "holds other features"),
    "a task less": ({"examples": {"law": 2}}, "holds other features"),
}


@pytest.mark.parametrize("case", ROUTERS)
def test_a_router_that_contradicts_itself(routed: Path, case: str):
    change, text = ROUTERS[case]
    _change(routed, lambda content: content["router"].update(change))
    with pytest.raises(PackError, match=text):
        Pack(routed).read_router()


def test_a_router_that_is_damaged_missing_or_a_link(routed: Path, tmp_path: Path):
    file = routed / ROUTER
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    for use in (Pack(routed).read_router, lambda: verify(routed)):
        with pytest.raises(PackError, match=r"router\.safetensors is damaged: its SHA-256"):
            use()
    with pytest.raises(PackError, match=r"router\.safetensors is damaged"):
        remove_task(routed, "law")
    assert {*Pack(routed).manifest.tasks} == {"news", "law"}
    file.unlink()
    with pytest.raises(PackError, match=r"which the router needs, is missing"):
        verify(routed)
    file.symlink_to(tmp_path / "x")
    with pytest.raises(PackError, match="is a link"):
        Pack(routed).read_router()


def test_all_that_is_wrong_is_told_at_once(spoilt):
    def spoil(content: Json) -> None:
        task = content["tasks"]["law"]
        task["dtypes"] = {"layer.bias": "load"}
        task["bytes"] = -1
        task["companions"]["model.safetensors"] = task["companions"]["config.json"]

    _change(spoilt, spoil)
    with pytest.raises(PackError) as caught:
        Pack(spoilt)
    for told in ("'load' is no dtype", "tasks.law.bytes", "'model.safetensors' is no small file"):
        assert told in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "pack.json/x"),
        *(".git/hooks/post-checkout", "inner/code.py", "model.safetensors.index.json", "..", ""),
        *("con\nfig.json", "\x1b[2J.json", "a" * 300 + ".json", "personae.json", "a/b/c.json"),
    ],
)
def test_what_is_no_small_file_of_a_model_is_no_companion(spoilt, name):
    def add(content: Json) -> None:
        companions = content["tasks"]["law"]["companions"]
        companions[name] = companions["config.json"]

    _change(spoilt, add)
    with pytest.raises(PackError, match="is no small file of a model"):
        Pack(spoilt)


@pytest.mark.parametrize("file", ["tasks/lnk/x", "pack.json", "tasks/news.safetensors"])
def test_a_task_removes_no_file_but_its_own(spoilt, file):
    _change(spoilt, lambda content: content["tasks"]["law"].update(file=file))
    before = listing(spoilt)
    with pytest.raises(PackError, match=r"expected tasks/law.safetensors"):
        remove_task(spoilt, "law")
    assert listing(spoilt) == before


@pytest.mark.parametrize("link", ["tasks", "tasks/law", "tasks/law.safetensors"])
def test_nothing_is_removed_or_written_through_a_link(spoilt, make, tmp_path, link):
    (spoilt / link).rename(tmp_path / "elsewhere")
    (spoilt / link).symlink_to(tmp_path / "elsewhere")
    before = listing(tmp_path)
    law = {"law": str(make("dts").folder.parent / "law")}
    for change in (
        lambda: remove_task(spoilt, "law"),
        lambda: unpack(spoilt, "law", tmp_path / "out", base=tmp_path / "base"),
    ):
        with pytest.raises(PackError, match="is a link"):
            change()
    _change(spoilt, lambda content: content["tasks"].pop("law"))
    with pytest.raises(PackError, match="is a link"):
        add_tasks(spoilt, law, base=str(tmp_path / "base"))
    after = listing(tmp_path)
    assert {k: v for k, v in after.items() if k != "pack/pack.json"} == {
        k: v for k, v in before.items() if k != "pack/pack.json"
    }


@pytest.mark.parametrize("place", ["tasks/law", "tasks/law.safetensors", "tasks/law/config.json"])
def test_pipes_in_the_place_of_a_task_s_files_are_removed_with_it(spoilt, place):
    path = spoilt / place
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    os.mkfifo(path)
    with pytest.raises(PackError, match="is missing"):
        unpack(spoilt, "law", spoilt.parent / "out", base=spoilt.parent / "base")
    remove_task(spoilt, "law")
    assert not any(name.startswith("tasks/law") for name in listing(spoilt))


def test_a_parameter_that_the_family_decided_is_needed(make, tmp_path):
    shutil.copytree(make("tsv_c").folder, tmp_path / "pack")
    _change(tmp_path / "pack", lambda content: content["tasks"]["law"]["parameters"].pop("tasks"))
    with pytest.raises(PackError, match=r"tasks\.law: parameters: tasks is missing"):
        Pack(tmp_path / "pack")


def test_code_in_a_pack_is_named(spoilt):
    folder = spoilt / "tasks/law"
    (folder / "modeling_law.py").write_text("print('run')")
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_law.Law"}}')

    def add(content: Json) -> None:
        for file in folder.iterdir():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            kept = {"stored_in": "task", "sha256": digest}
            content["tasks"]["law"]["companions"][file.name] = kept

    _change(spoilt, add)
    notes: list[str] = []
    unpack(spoilt, "law", spoilt.parent / "out", work=Work(note=notes.append))
    assert notes[0].startswith("the reference, as the pack names it: ")
    assert notes[1].startswith("code comes from the pack: config.json, modeling_law.py; read it")


@pytest.mark.parametrize("source", ["~nosuchuser/model", "/dev/zero", "\0", "a" * 5000])
def test_a_source_that_is_none_is_our_error(spoilt, source):
    _change(spoilt, lambda content: content["reference"].update(source=source))
    with pytest.raises(PackError, match="Say where it is with --base"):
        unpack(spoilt, "law", spoilt.parent / "out")


def test_an_original_with_a_head_that_the_pack_lacks(spoilt, make):
    where = make("dts").folder.parent
    original = load_file(where / "law/model.safetensors")
    (spoilt.parent / "other").mkdir()
    save_file(
        original | {"head.weight": torch.ones(3, 4)}, spoilt.parent / "other/model.safetensors"
    )
    with pytest.raises(PersonaeError, match="is not the model that was packed"):
        verify(spoilt, against={"law": str(spoilt.parent / "other")})
