"""personae eval: what it prints, and every file that it leaves."""

import csv
import json
from html.parser import HTMLParser
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from personae.cli import app
from personae.evaluate import Record, records_from_json, suite_records
from toy_suites import SUITE, toy_suite


class Page(HTMLParser):
    """The cells of a page's table, and what it would load from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.cells: list[str] = []
        self.loaded: list[Any] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [v for k, v in attrs if k == "src" or (k == "href" and tag != "a")]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("td", "th"):
            self.cells[-1] += data.strip()


def run(*words: object):
    return CliRunner().invoke(app, ["eval", *map(str, words)])


def test_one_table_in_every_form(tmp_path):
    suite = toy_suite(tmp_path, SUITE.replace("name: TIES", 'name: "TIES <b>|$x$"'))
    out, cache = tmp_path / "out", tmp_path / "cache"
    done = run(suite, "--out", out, "--cache", cache)
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "individual" in done.stdout and "interval" in done.stdout
    records = records_from_json((out / "results.json").read_text("utf-8"))
    methods = ["individual", "base", "TIES <b>|$x$", "DTS"]
    assert [one.method for one in records] == methods
    rows = list(csv.DictReader((out / "results.csv").open(encoding="utf-8", newline="")))
    assert [row["method"] for row in rows] == methods
    for row, one in zip(rows, records, strict=True):
        assert float(row["average"]) == one.average == (one.scores["a"] + one.scores["b"]) / 2
        assert [float(row[task]) for task in "ab"] == [*one.scores.values()]
        assert one.interval == (float(row["interval_low"]), float(row["interval_high"]))
    table = (out / "results.md").read_text("utf-8")
    assert "| 95 % interval | seconds | peak MB |" in table and "| TIES <b>\\|$x$ |" in table
    page = Page((out / "report.html").read_text("utf-8"))
    assert page.tags.count("svg") == 1 and "script" not in page.tags and "b" not in page.tags
    assert all(one.startswith("#") for one in page.loaded)
    assert page.cells[0] == "method" and "TIES <b>|$x$" in page.cells
    again = run(suite, "--cache", cache, "--json")
    assert json.loads(again.stdout) == json.loads((out / "results.json").read_text("utf-8"))


def test_a_wrong_suite_is_refused_before_work(tmp_path):
    suite = toy_suite(tmp_path, SUITE.replace("method: ties", "method: tees"))
    done = run(suite, "--cache", tmp_path / "cache")
    assert done.exit_code == 2 and "Did you mean 'ties'?" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_what_json_tells_gives_no_orders_to_a_terminal(tmp_path, monkeypatch):
    told = Record("a\x9b2J\u202e", {"a": 0.5}, 0.5, 0.0, 0.0, 0.0, interval=(0.4, 0.6))
    monkeypatch.setattr(suite_records, "evaluate_suite", lambda *_, **__: [told])
    done = run("suite.yaml", "--json")
    assert records_from_json(done.stdout) == [told]
    assert done.stdout.isascii()
