"""Suites edited at random: refused in our words, or read aright."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hostile import PHASES, edit, places, within_bounds
from personae.errors import PersonaeError, RecipeError
from personae.evaluate.suite import read_suite
from toy_suites import SUITE, toy_suite

SEARCHED = SUITE + "search: {merge: {method: ties}, parameters: {density: {from: 0.1, to: 1}}}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_suite(tmp_path_factory.mktemp("suites")).parent


@settings(phases=PHASES, max_examples=150)
@given(st.data())
def test_an_edited_suite(folder: Path, data: st.DataObject):
    content = yaml.safe_load(SEARCHED)
    for _ in range(data.draw(st.integers(1, 2), "edits")):
        edit(content, data, [*places(content)])
    path = folder / "edited.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    try:
        with within_bounds():
            suite = read_suite(path)
    except PersonaeError as error:
        assert str(error)
    else:
        assert [task.name for task in suite.tasks] == [one["name"] for one in content["tasks"]]
        assert all(len(task.test["labels"]) for task in suite.tasks)


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ("{from: 0, to: 1.0e+300}", "expected numbers from and to"),
        ("{from: 0, to: 1, step: 1.0e-300}", "values; at most 10,000 are read"),
        ("{from: .nan, to: 1}", "expected numbers from and to"),
        ("[[1]]", "expected single values"),
        ("3", "expected a list of values"),
    ],
)
def test_spaces_that_are_none(folder: Path, of: str, said: str):
    path = folder / "search.yaml"
    path.write_text(f"{SUITE}search: {{merge: {{method: ties}}, parameters: {{density: {of}}}}}\n")
    with within_bounds(), pytest.raises(RecipeError, match=said):
        read_suite(path)


BAD_CONFIGURATIONS = {
    "labels that are a list": '{"id2label": [1, 2, 3]}',
    "labels without numbers": '{"id2label": {"a": "x", "b": "y", "c": "z"}}',
    "no mapping": "[]",
    "nested": "[" * 1000,
}


@contextmanager
def _with(path: Path, text: str) -> Iterator[None]:
    before = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(before)


@pytest.mark.parametrize("case", BAD_CONFIGURATIONS)
def test_a_configuration_of_an_expert_that_is_odd(folder: Path, case: str):
    with _with(folder / "a/config.json", BAD_CONFIGURATIONS[case]), pytest.raises(RecipeError):
        read_suite(folder / "suite.yaml")


@pytest.mark.parametrize("text", ["[]", "{}", '{"model": 3}', "x"])
def test_a_tokenizer_that_is_odd(folder: Path, text: str):
    with _with(folder / "a/tokenizer.json", text), pytest.raises(RecipeError, match="tokenizer"):
        read_suite(folder / "suite.yaml")
