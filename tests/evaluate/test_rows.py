"""The rows of the comparison tables: settings that can be, and what shares a decomposition."""

from personae.evaluate.comparison import _together
from personae.evaluate.rows import (
    RANK_FRACTIONS,
    dts_rows,
    method_rows,
    sweep_rows,
)
from personae.methods import CODECS


def test_every_codec_has_rows_on_both_vectors():
    rows = method_rows()
    for vector in ("task", "difference"):
        found = {row.method for row in rows.values() if row.vector == vector}
        assert found == set(CODECS)
    assert all(row.codec() for row in rows.values())


def test_a_sweep_shares_one_decomposition():
    rows = sweep_rows()
    assert _together(rows) == [list(rows)]
    assert len(rows) == len(RANK_FRACTIONS) + 3 + 3
    ablations = {name: row.codec() for name, row in rows.items() if "no " in name or "bin" in name}
    assert len(ablations) == 3
    assert all(codec != row.codec() for codec in ablations.values() for row in dts_rows().values())
    assert len(_together(rows | sweep_rows(vector="difference"))) == 2
