"""What an output may replace, and what other runs may do meanwhile."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from families import listing, saved, small_base, tuned
from personae.commands.pack import add_tasks, pack, remove_task
from personae.commands.unpack import unpack
from personae.errors import OutputError
from personae.recipe import PackSettings
from personae.run.output import check_output
from personae.run.work import Work

BASE = small_base()


@pytest.fixture
def family(tmp_path: Path) -> Path:
    saved(BASE, tmp_path / "models/base")
    saved(tuned(BASE, 1), tmp_path / "models/x")
    saved(tuned(BASE, 2), tmp_path / "models/y")
    return tmp_path


def _pack(root: Path, out: str, **options) -> None:
    pack(root / "models/base", {"x": root / "models/x"}, root / out, **options)


@pytest.mark.parametrize("out", ["models/base", "models/x", "models", "models/base/inner"])
def test_an_output_never_overlaps_an_input(family, out):
    before = listing(family)
    with pytest.raises(OutputError, match="overlap: writing one would damage the other"):
        _pack(family, out, overwrite=True)
    assert listing(family) == before


def test_unpacking_spares_the_pack_and_its_reference(family):
    _pack(family, "p")
    before = listing(family)
    for out in ("p", "p/inner", "models/base", "models"):
        with pytest.raises(OutputError, match="overlap"):
            unpack(family / "p", "x", family / out, overwrite=True)
    assert listing(family) == before


ODD = {
    "deep": "[" * 100_000,
    "no text": b"\xff\xfe",
    "a number": "3",
    "a text": '"x"',
    "a list": "[3]",
    "odd values": '{"types": 3, "tasks": {"x": {"companions": [3]}}, "kind": [], "auto_map": 1}',
    "odd lists": '{"types": [[]], "tasks": [[]]}',
    "pipe": None,
}


@pytest.mark.parametrize("content", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize(
    "name",
    ["config.json", "modules.json", "router_config.json", "tokenizer_config.json", "personae.json"],
)
def test_odd_small_files_in_an_output_are_no_obstacle(tmp_path, name, content):
    (tmp_path / "model.safetensors").touch()
    _put(tmp_path / name, content)
    check_output(tmp_path, overwrite=True)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(OutputError, match=r"does not write, .*: thesis\.txt"):
        check_output(tmp_path, overwrite=True)


def _put(path: Path, content: str | bytes | None) -> None:
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_pipe_that_a_pack_records_is_not_read(tmp_path):
    companions = {"notes.txt": {"stored_in": "task", "sha256": "0" * 64}}
    (tmp_path / "pack.json").write_text(json.dumps({"tasks": {"x": {"companions": companions}}}))
    (tmp_path / "tasks/x").mkdir(parents=True)
    os.mkfifo(tmp_path / "tasks/x/notes.txt")
    with pytest.raises(OutputError, match=r"tasks/x/notes\.txt"):
        check_output(tmp_path, overwrite=True)


def test_overwrite_replaces_packs_and_models_and_nothing_else(family):
    (family / "papers").mkdir()
    (family / "papers/thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="holds neither a pack nor a model"):
        _pack(family, "papers", overwrite=True)
    assert (family / "papers/thesis.txt").read_text() == "years of work"
    _pack(family, "p")
    unpack(family / "p", "x", family / "rebuilt")
    _pack(family, "rebuilt", overwrite=True)
    assert (family / "rebuilt/pack.json").exists()


@pytest.mark.parametrize(
    "foreign",
    [
        "datasets/train.jsonl",
        "adapters/math/adapter_model.safetensors",
        "adapter_model.safetensors",
        "pytorch_model.bin",
        "results.json",
        "notes.txt",
        "train.py",
        "empty/",
    ],
)
@pytest.mark.parametrize("kind", ["model", "pack"])
def test_overwrite_spares_a_folder_that_holds_what_others_wrote(family, kind, foreign):
    _pack(family, "out")
    if kind == "model":
        unpack(family / "out", "x", family / "model")
        (family / "out").rename(family / "p")
        (family / "model").rename(family / "out")
    place = family / "out" / foreign
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir() if foreign.endswith("/") else place.write_text("mine")
    before = listing(family)
    with pytest.raises(OutputError, match=f"does not write, so it is not replaced: {foreign}"):
        _pack(family, "out", overwrite=True)
    assert listing(family) == before
    assert place.exists()


def test_overwrite_replaces_all_that_a_model_may_come_with(family):
    """What a merge or unpack copies from its models, custom code that a config names included."""
    _pack(family, "p")
    out = unpack(family / "p", "x", family / "out")
    (out / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.X"}}')
    for name in (
        "modeling_x.py",
        "generation_config.json",
        "preprocessor_config.json",
        "config_sentence_transformers.json",
        "tokenizer.json",
        "special_tokens_map.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "README.md",
    ):
        (out / name).touch()
    _pack(family, "out", overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["pack.json", "tasks"]


def test_overwrite_replaces_a_pack_with_all_that_it_has_from_its_experts(family):
    """Training scripts leave JSON files beside a model; pack.json says which ones are copies."""
    note = family / "models/x/training.json"
    note.write_text("{}")
    _pack(family, "out")
    copy = family / "out/tasks/x/training.json"
    assert copy.read_text() == "{}"
    _pack(family, "out", overwrite=True)
    copy.write_text('{"mine": 1}')
    with pytest.raises(OutputError, match=r"does not write, .*: tasks/x/training\.json"):
        _pack(family, "out", overwrite=True)


def test_a_pack_under_change_is_not_changed_by_another_run(family):
    _pack(family, "p")
    before = listing(family)
    handle = os.open(family / "p", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(OutputError, match="Another run is changing"):
            add_tasks(family / "p", {"y": family / "models/y"})
        with pytest.raises(OutputError, match="Another run is changing"):
            remove_task(family / "p", "x")
    finally:
        os.close(handle)
    assert listing(family) == before
    assert list(add_tasks(family / "p", {"y": family / "models/y"}).manifest.tasks) == ["x", "y"]


def test_a_run_killed_while_it_merged_is_taken_up(family):
    """What SIGKILL leaves: the reference half written, in its own hidden directory."""
    stale = family / ".p.partial/.reference.partial"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    experts = {name: family / "models" / name for name in "xy"}
    settings = PackSettings(vector="difference")
    pack(family / "models/base", experts, family / "p", settings=settings)
    pack(family / "models/base", experts, family / "q", settings=settings)
    assert listing(family / "p") == listing(family / "q")


def test_experts_in_another_order_are_another_pack(family, monkeypatch):
    """The order of experts is part of a merged reference, so it is of what may be resumed."""
    experts = {name: family / "models" / name for name in "xy"}
    settings = PackSettings(vector="difference")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("personae.commands.pack.add_experts", killed)
        pack(family / "models/base", experts, family / "p", settings=settings)
    turned = dict(reversed(experts.items()))
    found = pack(family / "models/base", turned, family / "p", settings=settings)
    assert found.manifest.reference.experts == ("y", "x")


def test_a_pattern_that_matches_nothing_is_told(family):
    told: list[str] = []
    settings = PackSettings(skip=("embed",), private=("scale",))
    _pack(family, "p", settings=settings, work=Work(note=told.append))
    assert [text for text in told if "pattern" in text] == [
        "the pattern 'embed' matches no tensor; '*' matches any text"
    ]
