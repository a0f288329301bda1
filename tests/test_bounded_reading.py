"""Small text files are read within bounds, or refused: no hang, no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile import within_bounds
from personae._safetensors import load_safetensors, open_safetensors
from personae._small_files import MOST_YAML, Unfit, parse_json, parse_yaml_value, read_bytes
from personae.checkpoints import open_checkpoint
from personae.checkpoints.folders import AuxiliaryFiles
from personae.checkpoints.headers import read_header
from personae.checkpoints.opening import adapter_config_file
from personae.checkpoints.pickles import Pickles
from personae.errors import CheckpointError, RecipeError
from personae.packs.fingerprint import sha256_file
from personae.recipe import read_merge_recipe

_HEAD = "merge_method: ties\nbase_model: base\nmodels: [{model: a}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x]\nb: [*a, *a]\n", r"has an alias in line 2 \(\*a\): write its value out"),
        ("a: " + "[" * 1000 + "]" * 1000, "is nested deeper than 64 levels"),
        ("a: " + "[" * 100_000, "is nested deeper than 64 levels"),
        (_HEAD + "x: 2020-99-99", "holds a value that is none: month must be in 1..12"),
        (_HEAD + "x: !!int abc", "holds a value that is none: invalid literal for int"),
        (_HEAD + "x: " + "9" * 5000, "holds a value that is none: Exceeds the limit"),
        (_HEAD + "x: 0x" + "f" * 4000, "holds a whole number of more than 308 digits"),
        (_HEAD + "x: 190:" + "59:" * 3000 + "1", "holds a whole number of more than 308 digits"),
        (_HEAD + "x: !!bool abc", "holds a value that is none"),
        (_HEAD + "x: !!timestamp abc", "holds a value that is none"),
        ('merge_method: ties\nbase_model: ""\nmodels: [{model: a}]', "line 2: base_model = ''"),
        (_HEAD + 'x: "\\ud800"', "is no valid YAML"),
        (_HEAD + "parameters: {scale: 1e999}", "scale = inf: Input should be a finite number"),
        (_HEAD + "parameters: {scale: .nan}", "Input should be a finite number"),
        ("a: 1\n" * (MOST_YAML // 5 + 1), f"is larger than {MOST_YAML:,} bytes"),
    ],
    ids=lambda text: text[-30:],
)
def test_a_recipe_that_breaks_a_bound(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_merge_recipe(tmp_path / "r.yaml")


def test_many_faults_are_counted_and_the_first_hundred_told(tmp_path):
    for model in ("base", "a"):
        (tmp_path / model).touch()
    (tmp_path / "r.yaml").write_text(
        _HEAD + "conventions: papers\n" + "".join(f"k{n}: 1\n" for n in range(500))
    )
    with pytest.raises(RecipeError, match="is wrong in 500 places") as caught:
        read_merge_recipe(tmp_path / "r.yaml")
    lines = str(caught.value).splitlines()
    assert lines[1].startswith("  1. line 5: Unknown key 'k0'.")
    assert lines[-1] == "  … and 400 more"
    assert len(lines) == 102


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells memory held")
def test_json_that_takes_more_memory_than_there_is():
    """Nine megabytes of empty lists take 190; in a process that may have 100 more than it has."""
    program = """
import resource
from personae._small_files import Unfit, parse_json
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 100 * 2**20,) * 2)
try:
    parse_json("[" + "[]," * 3_000_000 + "0]")
except Unfit as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "takes more memory to read than there is\n", done.stderr


def test_pipes_and_devices_are_no_recipes(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(RecipeError, match="is no regular file"):
            read_merge_recipe(place)
    with pytest.raises(RecipeError, match="is a directory, not a YAML file"):
        read_merge_recipe(tmp_path)


@pytest.mark.parametrize("place", ["pipe", "/dev/zero"])
def test_pipes_and_devices_are_no_weights(tmp_path, place):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / place
    assert read_header(path)[1] == [f"{path} is no regular file. Copy or download it again."]
    with pytest.raises(CheckpointError, match="is no regular file"):
        Pickles("a", [path], AuxiliaryFiles((), Path))
    with pytest.raises(CheckpointError, match="is no regular file, and no directory"):
        open_checkpoint(path)
    for opened in (open_safetensors, load_safetensors):
        with pytest.raises(OSError, match="is no regular file"):
            opened(path)
    with pytest.raises(Unfit, match="is no regular file"):
        sha256_file(path)


def test_a_header_of_long_numbers_is_refused_in_no_time(tmp_path):
    numbers = ",".join(["9" * 4000] * 2000)
    text = f'{{"w": {{"dtype": "F32", "shape": [{numbers}], "data_offsets": [0, 4]}}}}'.encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with within_bounds(), pytest.raises(CheckpointError, match="its header is not valid"):
        open_checkpoint(path)


def test_no_such_user():
    for look in (open_checkpoint, adapter_config_file):
        with pytest.raises(CheckpointError, match="~nosuchuser/model: there is no such user"):
            look("~nosuchuser/model")


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("[" * 100_000, "is nested deeper than 64 levels"),
        ('{"weight_map": {"w": "\\ud800.safetensors"}}', "half a character"),
        ('{"weight_map": {"w": ' + "9" * 5000 + "}}", "Exceeds the limit"),
        ('{"weight_map": {"w": ' + "9" * 400 + "}}", "more than 308 digits"),
        ("{", "is no JSON"),
    ],
)
def test_an_index_that_breaks_a_bound(tmp_path, index, reason):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=rf"index.json .*{reason}"):
        open_checkpoint(tmp_path)


def test_a_file_of_the_system_says_no_size_and_is_read_whole():
    assert read_bytes(Path("/proc/self/status")).startswith(b"Name:")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=3), inner, max_size=3)
        ),
        max_leaves=20,
    )
)
def test_what_json_says_within_bounds_is_read_as_json_reads_it(content):
    text = json.dumps(content)
    try:
        assert parse_json(text) == content
    except Unfit as error:
        assert "nested" in str(error)


@given(st.text(max_size=200))
def test_any_text_is_a_value_or_refused(text):
    for parse in (parse_json, parse_yaml_value):
        try:
            parse(text)
        except Unfit as error:
            assert str(error).split(" ")[0] in ("is", "has", "holds")
