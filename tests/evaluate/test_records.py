import pytest

from personae.evaluate import record, records_from_json, records_to_json

INDIVIDUAL = {"a": 1.0, "b": 0.5}


def test_adr_is_a_ratio_of_averages():
    # A_ind = (1.0 + 0.5) / 2 = 0.75; A = (0.9 + 0.3) / 2 = 0.6; 100 * (0.75 - 0.6) / 0.75 = 20.
    # The average of ratios would be (10 + 40) / 2 = 25.
    one = record(
        "merged", {"a": 0.9, "b": 0.3}, individual=INDIVIDUAL, amr_paper=0.0, amr_on_disk=0.0
    )
    assert one.average == pytest.approx(0.6)
    assert one.adr == pytest.approx(20.0)


def test_adr_of_a_better_method_is_negative():
    one = record("x", {"a": 1.0, "b": 0.8}, individual=INDIVIDUAL, amr_paper=1.0, amr_on_disk=1.0)
    assert one.adr == pytest.approx(-20.0)  # 100 * (0.75 - 0.9) / 0.75


def test_other_tasks_are_refused():
    with pytest.raises(ValueError, match=r"'x' was scored on \['a'\].*\['a', 'b'\]"):
        record("x", {"a": 1.0}, individual=INDIVIDUAL, amr_paper=1.0, amr_on_disk=1.0)


def test_json_round_trip():
    records = [
        record("é", {"b": 0.1, "a": 0.2}, individual=INDIVIDUAL, amr_paper=3.7, amr_on_disk=2.5)
    ]
    text = records_to_json(records)
    assert records_from_json(text) == records
    assert '"adr": ' in text and "é" in text and text.endswith("]\n")
    assert list(records_from_json(text)[0].scores) == ["b", "a"]
