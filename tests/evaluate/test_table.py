import io

import pytest
from rich.console import Console

from personae.evaluate import Record, record
from personae.report.table import accuracy_size_table, markdown

TASKS = (
    "mnist",
    "fashion_mnist",
    "kmnist",
    "notmnist",
    "sign_digits",
    "bccd_cells",
    "omniglot_alphabets",
    "quickdraw3",
)
INDIVIDUAL = {task: 0.911 + 0.01 * number for number, task in enumerate(TASKS)}
RECORDS = [
    record(
        "individual models", INDIVIDUAL, individual=INDIVIDUAL, amr_paper=100.0, amr_on_disk=100.0
    ),
    record(
        "DTS-T, budget of 1 %",
        {task: score - 0.1 for task, score in INDIVIDUAL.items()},
        individual=INDIVIDUAL,
        amr_paper=1.49,
        amr_on_disk=0.98,
    ),
]


def lines(records: list[Record], width: int) -> list[str]:
    file = io.StringIO()
    Console(width=width, file=file).print(accuracy_size_table(records, width))
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_one_line_a_method_holds_every_value(width: int):
    printed = lines(RECORDS, width)
    assert max(map(len, printed)) <= width
    # average 0.911 + 0.035 = 0.946; 0.846 after the drop; ADR 100 * 0.1 / 0.946 = 10.57
    scores = "91.1 92.1 93.1 94.1 95.1 96.1 97.1 98.1 94.60 0.00 100 100"
    assert any(" ".join(line.split()).endswith(scores) for line in printed)
    scores = "81.1 82.1 83.1 84.1 85.1 86.1 87.1 88.1 84.60 10.57 1.49 0.98"
    assert any(" ".join(line.split()).endswith(scores) for line in printed)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_full_task_names_are_found(width: int):
    printed = lines(RECORDS, width)
    text = " ".join(" ".join(printed).split())
    if width < 120:  # cut in the header, so listed below
        assert f"Tasks: {', '.join(TASKS)}." in text
    else:
        assert "Tasks:" not in text
        assert "omniglot" in text and "alphabets" in text


def test_what_does_not_fit_is_continued_below():
    printed = lines(RECORDS, 60)
    assert max(map(len, printed)) <= 60
    assert sum("method" in line for line in printed) == 2
    assert sum("84.60" in line for line in printed) == 1  # what it costs is told once


def test_a_score_of_one_and_a_negative_score_fit():
    scores = {"a": 1.0, "b": -0.123}
    one = record("x", scores, individual={"a": 1.0, "b": 0.0}, amr_paper=0.0, amr_on_disk=0.0)
    row = next(line for line in lines([one], 80) if line.startswith("x"))
    # average (1 - 0.123) / 2 = 0.4385; ADR 100 * (0.5 - 0.4385) / 0.5 = 12.3
    assert row.split() == ["x", "100", "-12", "43.85", "12.30", "0.00", "0.00"]


def test_no_loss_has_no_sign():
    scores, better = {"a": 0.80002}, {"a": 0.8}  # ADR -0.0025
    one = record("x", scores, individual=better, amr_paper=0.0, amr_on_disk=0.0)
    assert markdown([one]).splitlines()[-1] == "| x | 80.0 | 80.00 | 0.00 | 0.00 | 0.00 |"


def test_markdown_has_full_names_and_values():
    header, rule, _, row = markdown(RECORDS).splitlines()
    assert header.split(" | ")[1:-4] == list(TASKS)
    assert rule.count("---:") == len(TASKS) + 4
    assert row == (
        "| DTS-T, budget of 1 % | 81.1 | 82.1 | 83.1 | 84.1 | 85.1 | 86.1 | 87.1 | 88.1 "
        "| 84.60 | 10.57 | 1.49 | 0.98 |"
    )
