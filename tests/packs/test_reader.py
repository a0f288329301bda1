"""Packs on disk: sizes as declared, and nothing damaged, foreign or newer is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from families import saved, small_base, tuned
from personae.commands.pack import add_tasks, pack, remove_task
from personae.commands.unpack import unpack
from personae.errors import PackError
from personae.packs.manifest import checksum as _checksum
from personae.packs.reader import Pack
from personae.packs.soundness import parse_manifest
from personae.packs.task_file import TaskFile
from personae.recipe import PackSettings

HEAD = {"classifier.weight": torch.arange(12.0).reshape(3, 4), "classifier.bias": torch.ones(3)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of two experts, beside its base."""
    folder = tmp_path_factory.mktemp("made")
    base = small_base()
    saved(base, folder / "base", '{"labels": 0}')
    for seed, name in enumerate(("news", "law"), 1):
        saved(tuned(base, seed) | HEAD, folder / name, f'{{"labels": {seed}}}')
    pack(str(folder / "base"), {n: str(folder / n) for n in ("news", "law")}, folder / "pack")
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of that pack to be spoilt."""
    return shutil.copytree(made / "pack", tmp_path / "pack")


def _rewrite(path: Path, sound: bool = True, **changes: object) -> None:
    """Change fields of a pack.json; with a checksum that holds unless it shall not be `sound`."""
    content = json.loads(path.read_text())
    stated = content.pop("checksum")
    content |= changes
    checksum = _checksum(content) if sound else stated
    path.write_text(json.dumps(content | {"checksum": checksum}))


def test_the_size_on_disk_is_what_was_declared(made):
    for name, record in Pack(made / "pack").manifest.tasks.items():
        raw = (made / "pack" / record.file).read_bytes()
        header_bytes = int.from_bytes(raw[:8], "little")
        assert record.bytes == len(raw)
        assert len(raw) == 8 + header_bytes + record.coded_bytes + record.private_bytes
        assert record.private_bytes == 4 * 12 + 4 * 3, name
        sizes = {"scales": 4, "singular_values": 4, "exact": 4, "codes": 1, "rows": 1, "zeros": 1}
        for tensor in record.tensors.values():
            parts = [p for block in tensor.blocks for p in block.parts.items()]
            assert tensor.bytes == sum(count * sizes[part] for part, count in parts)


def test_nothing_but_the_pack_is_left_in_its_folder(made):
    found = sorted(str(p.relative_to(made / "pack")) for p in (made / "pack").rglob("*.*"))
    files = ["law.safetensors", "law/config.json", "news.safetensors", "news/config.json"]
    assert found == ["pack.json", *(f"tasks/{file}" for file in files)]


def test_equal_auxiliary_files_are_not_stored_twice(made, tmp_path):
    base = small_base()
    saved(base, tmp_path / "base", '{"same": true}')
    saved(tuned(base, 1), tmp_path / "x", '{"same": true}')
    made = pack(str(tmp_path / "base"), {"x": str(tmp_path / "x")}, tmp_path / "p")
    assert made.task("x").companions["config.json"].stored_in == "reference"
    assert not (tmp_path / "p/tasks/x").exists()
    unpack(tmp_path / "p", "x", tmp_path / "out")
    assert (tmp_path / "out/config.json").read_text() == '{"same": true}'


@pytest.mark.parametrize("position", [0, 7, 8, 60, 300, -100, -1])
def test_a_flipped_byte_of_a_task_file_is_noticed(copied, position):
    file = copied / "tasks/news.safetensors"
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)
    with pytest.raises(PackError, match=r"Task 'news': .*news.safetensors is damaged: its SHA-256"):
        Pack(copied).open_task("news")
    assert isinstance(Pack(copied).open_task("law"), TaskFile)


def test_a_truncated_task_file_is_noticed(copied):
    file = copied / "tasks/news.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(PackError, match=r"Task 'news': .* is damaged"):
        Pack(copied).open_task("news")


def test_a_changed_auxiliary_file_is_noticed(copied):
    (copied / "tasks/news/config.json").write_text("{}")
    with pytest.raises(PackError, match=r"Task 'news': .*config.json is damaged"):
        Pack(copied).open_task("news")


def test_all_missing_files_of_a_task_are_told(copied):
    (copied / "tasks/news.safetensors").unlink()
    shutil.rmtree(copied / "tasks/news")
    with pytest.raises(PackError, match="2 faults") as caught:
        Pack(copied).open_task("news")
    assert "news.safetensors is missing" in str(caught.value)
    assert "config.json is missing" in str(caught.value)


def test_one_task_file_may_be_away_while_another_is_used(copied, made, tmp_path):
    (copied / "tasks/news.safetensors").unlink()
    unpack(copied, "law", tmp_path / "law", base=str(made / "base"))
    assert (tmp_path / "law/model.safetensors").is_file()


def test_a_sound_file_that_does_not_fit_its_record_is_refused(copied):
    record = Pack(copied).task("news")
    save_file({"codes": torch.zeros(3, dtype=torch.uint8)}, copied / record.file)
    with pytest.raises(
        PackError,
        match=r"fit its record in pack.json: found codes uint8 \[3\], .*expected codes uint8",
    ):
        TaskFile(copied / record.file, record, Pack(copied).codec("news"))


@pytest.mark.parametrize("raw", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"not safetensors at all"])
def test_a_file_of_another_kind_is_refused(copied, raw):
    record = Pack(copied).task("news")
    (copied / record.file).write_bytes(raw)
    with pytest.raises(PackError, match=r"cannot be read|does not fit its record"):
        TaskFile(copied / record.file, record, Pack(copied).codec("news"))


@pytest.mark.parametrize("field", ["method", "tasks", "reference"])
def test_a_changed_pack_json_is_noticed(copied, field):
    _rewrite(copied / "pack.json", sound=False, **{field: {"changed": 1}})
    with pytest.raises(PackError, match=r"pack.json is damaged: its checksum does not hold"):
        Pack(copied)


def test_a_pack_json_without_checksum_is_refused(copied):
    content = json.loads((copied / "pack.json").read_text())
    del content["checksum"]
    (copied / "pack.json").write_text(json.dumps(content))
    with pytest.raises(PackError, match="its checksum does not hold"):
        Pack(copied)


def test_a_newer_version_is_refused_before_anything_else(copied):
    _rewrite(copied / "pack.json", sound=False, format_version=3, tasks="in another form")
    with pytest.raises(
        PackError, match=r"is of pack format 3; this tool \(.*\) reads formats 1 and 2"
    ):
        Pack(copied)


def test_a_field_of_the_wrong_kind_is_refused(copied):
    _rewrite(copied / "pack.json", vector="sideways")
    with pytest.raises(PackError, match=r"is malformed: (?s:.*)vector"):
        Pack(copied)


@pytest.mark.parametrize("text", ["{}", "[1]", '"x"', '{"format": "other-pack"}', "null"])
def test_foreign_json_is_refused(tmp_path, text):
    (tmp_path / "pack.json").write_text(text)
    with pytest.raises(PackError, match='does not say "format": "personae-pack"'):
        parse_manifest(tmp_path / "pack.json")


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe\x00"])
def test_what_is_no_json_is_refused(tmp_path, raw):
    (tmp_path / "pack.json").write_bytes(raw)
    with pytest.raises(PackError, match=r"pack.json cannot be read"):
        parse_manifest(tmp_path / "pack.json")


def test_a_folder_without_pack_json_is_no_pack(tmp_path):
    with pytest.raises(PackError, match=r"is no pack: it has no pack.json"):
        Pack(tmp_path)


@pytest.mark.parametrize("name", ["../../outside", "a/b", ""])
def test_a_task_name_that_leads_out_of_the_pack_is_refused(copied, name):
    tasks = json.loads((copied / "pack.json").read_text())["tasks"]
    _rewrite(copied / "pack.json", tasks={name: tasks["news"]})
    with pytest.raises(PackError, match=r"is malformed: (?s:.*)no safe task name"):
        Pack(copied)


@pytest.mark.parametrize("path", ["../outside.json", "/etc/outside.json", "a/../../outside.json"])
def test_paths_that_lead_out_of_the_pack_are_refused(copied, path):
    tasks = json.loads((copied / "pack.json").read_text())["tasks"]
    kept = tasks["news"]["companions"]["config.json"]
    spoilt = tasks | {"news": tasks["news"] | {"companions": {path: kept}}}
    _rewrite(copied / "pack.json", tasks=spoilt)
    with pytest.raises(PackError, match=r"is malformed: .*is no small file of a model"):
        Pack(copied)
    _rewrite(copied / "pack.json", tasks=tasks | {"news": tasks["news"] | {"file": path}})
    with pytest.raises(PackError, match=r"is malformed: .*, expected tasks/news.safetensors"):
        Pack(copied)


def test_an_unknown_task_suggests_the_nearest(made):
    with pytest.raises(PackError, match=r"has no task 'newz'. Did you mean 'news'\?"):
        Pack(made / "pack").task("newz")
    with pytest.raises(PackError, match=r"has no task 'poetry'. Known: law, news."):
        Pack(made / "pack").open_task("poetry")


def test_a_task_added_later_is_the_one_packed_at_once(made, tmp_path):
    base, both = str(made / "base"), Pack(made / "pack")
    pack(base, {"news": str(made / "news")}, tmp_path / "p")
    grown = add_tasks(tmp_path / "p", {"law": str(made / "law")})
    assert list(grown.manifest.tasks) == ["news", "law"]
    assert grown.manifest == both.manifest
    file = "tasks/law.safetensors"
    assert (tmp_path / "p" / file).read_bytes() == (made / "pack" / file).read_bytes()


def test_a_task_taken_out_leaves_the_pack_as_it_was_without_it(made, copied, tmp_path):
    pack(str(made / "base"), {"news": str(made / "news")}, tmp_path / "alone")
    remove_task(copied, "law")
    left = {str(p.relative_to(copied)): p.read_bytes() for p in copied.rglob("*.*")}
    alone = tmp_path / "alone"
    assert left == {str(p.relative_to(alone)): p.read_bytes() for p in alone.rglob("*.*")}
    assert not (copied / "tasks/law").exists()


def test_tasks_that_are_there_are_not_added_again(made, copied):
    before = (copied / "pack.json").read_bytes()
    with pytest.raises(PackError, match="already has a task 'news'"):
        add_tasks(copied, {"news": str(made / "law")}, base=str(made / "base"))
    with pytest.raises(PackError, match="already has a task 'law'"):  # one file on some systems
        add_tasks(copied, {"LAW": str(made / "law")}, base=str(made / "base"))
    assert (copied / "pack.json").read_bytes() == before
    add_tasks(copied, {"news": str(made / "news")}, base=str(made / "base"))  # an interrupted run
    assert (copied / "pack.json").read_bytes() == before


def test_a_task_is_not_added_to_another_base(made, copied, tmp_path):
    other = saved(small_base(seed=5), tmp_path / "other")
    with pytest.raises(PackError, match="is not the reference this pack was made from"):
        add_tasks(copied, {"third": str(made / "law")}, base=str(other))
    assert list(Pack(copied).manifest.tasks) == ["news", "law"]


def test_a_task_that_is_not_there_is_not_removed(copied):
    with pytest.raises(PackError, match=r"no task 'low'. Did you mean 'law'\?"):
        remove_task(copied, "low")


def test_rules_of_budgets_keep_their_names_on_disk(made, tmp_path):
    base, news = str(made / "base"), str(made / "news")
    settings = PackSettings(budget="90%", counting="amr_paper")
    opened = pack(base, {"news": news}, tmp_path / "p", settings=settings)
    assert opened.manifest.counting == "amr_paper"
    assert json.loads((tmp_path / "p/pack.json").read_text())["counting"] == "counted"
    assert Pack(tmp_path / "p").manifest == opened.manifest
    assert PackSettings.model_validate({"counting": "counted_lean"}).counting == "amr_paper_lean"
