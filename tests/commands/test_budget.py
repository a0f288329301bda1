"""Budgets: the largest rank that fits, by each rule, as a fraction or in bytes."""

import math

import pytest
import torch

from families import small_base, tuned
from personae._types import TensorSpec
from personae.commands.accounting import (
    HEADER_BYTES,
    Denominator,
    cost,
    is_fraction,
    largest_rank_fraction,
    task_amr_percent,
)
from personae.commands.pack import pack
from personae.commands.pack_plan import plan_shapes
from personae.errors import BudgetError, MethodError
from personae.methods.codecs.dts import DTS
from personae.recipe import COUNTING, PackSettings
from personae.run.scan import TensorScan

# Widths 4 and 10: breakpoints of the rank are at multiples of 1/4 and of 1/10.
SPECS = [
    TensorSpec("a", (4, 6), torch.float32),
    TensorSpec("b", (10, 10), torch.bfloat16),
    TensorSpec("bias", (5,), torch.float32),
    TensorSpec("ids", (9,), torch.int64),
]


def _counted(rank_a: int, rank_b: int) -> int:
    """Bits by the papers' rule: 3 an element of each factor, 32 a singular value."""
    return 3 * 5 + rank_a * (3 * (4 + 6) + 32) + rank_b * (3 * (10 + 10) + 32)


def test_the_cost_by_the_papers_rule():
    assert cost(DTS(rank_fraction=0.5), SPECS).paper == _counted(2, 5)
    assert Denominator.of(SPECS) == Denominator(parameters=129, bytes=4 * 24 + 2 * 100 + 4 * 5)


@pytest.mark.parametrize(
    ("budget", "fraction"),
    [
        (_counted(0, 1), 0.1),
        (_counted(0, 2), 0.2),
        (_counted(1, 2), 0.25),  # at 0.25 the narrow one gains a triplet
        (_counted(1, 3), 0.3),
        (_counted(2, 5) - 1, 0.4),
        (_counted(2, 5), 0.5),
        (_counted(4, 10), 1.0),
        (10 * _counted(4, 10), 1.0),
    ],
)
def test_the_largest_rank_that_fits_worked_by_hand(budget, fraction):
    as_fraction = budget / (32 * 129) * (1 + 1e-12)
    assert largest_rank_fraction(DTS(), SPECS, as_fraction, "amr_paper") == fraction
    if budget % 8 == 0:
        assert largest_rank_fraction(DTS(), SPECS, budget // 8, "amr_paper") == fraction


def test_a_budget_that_cannot_be_met_names_the_smallest_that_can():
    least = 100 * _counted(0, 1) / (32 * 129)  # 107 of 4128 bits
    with pytest.raises(BudgetError) as caught:
        largest_rank_fraction(DTS(), SPECS, 0.01, "amr_paper")
    assert str(caught.value) == (
        f"The budget of 1 % cannot be met: the smallest pack of this family costs "
        f"{math.ceil(1000 * least) / 1000:g} % counted as 'amr_paper'. Give that much or more, "
        "or keep fewer tensors with 'skip'."
    )
    with pytest.raises(
        BudgetError, match=r"budget of 13 bytes cannot be met.* costs 14 bytes.* its sign: 13%\.$"
    ):
        largest_rank_fraction(DTS(), SPECS, 13, "amr_paper")  # 107 bits are 13.4 bytes


def test_what_is_named_as_the_smallest_fits():
    with pytest.raises(BudgetError, match="costs 14 bytes"):
        largest_rank_fraction(DTS(), SPECS, 13, "amr_paper")
    assert largest_rank_fraction(DTS(), SPECS, 14, "amr_paper") == 0.1


def test_only_a_codec_with_a_rank_has_one_to_choose():
    plain = DTS(decomposition=False)  # 3 bits an element of 32: 9.375 %, whatever the rank
    assert largest_rank_fraction(plain, SPECS, 0.5, "amr_paper") == plain.rank_fraction
    with pytest.raises(BudgetError, match=r"budget of 9 % cannot be met.* costs 9\.\d+ %"):
        largest_rank_fraction(plain, SPECS, 0.09, "amr_paper")


@pytest.mark.parametrize("counting", COUNTING)
@pytest.mark.parametrize("budget", ["60%", "35%", "1500B"])
def test_a_pack_fits_its_budget_and_the_next_rank_would_not(tmp_path, counting, budget):
    base = small_base(dtype=torch.bfloat16) | {
        "h.weight": torch.zeros(60, 50, dtype=torch.bfloat16)
    }
    expert = tuned(base, 1)
    settings = PackSettings(budget=budget, counting=counting)
    made = pack(base, {"x": expert}, tmp_path / "p", settings=settings)
    record = made.task("x")
    fraction = record.parameters["rank_fraction"]
    specs = [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in base.items()]
    if budget.endswith("%"):
        assert task_amr_percent(record, made.manifest)[counting] <= float(budget[:-1])
    elif counting.startswith("on_disk"):
        assert record.bytes <= 1500
    steps = sorted({j / w for w in (16, 12, 50) for j in range(1, w + 1)})
    later = [step for step in steps if step > fraction]
    if not later:
        assert fraction == 1
        return
    facts = {n: TensorScan(True) for n in base}  # no zeros: nothing but the next rank counts
    bits = cost(DTS(rank_fraction=later[0]), specs, facts)
    size = {"amr_paper": bits.paper, "amr_paper_lean": bits.paper_lean}.get(
        counting, bits.stored + 8 * HEADER_BYTES + 8 * 400
    )
    whole = 16 * 3433 if counting == "on_disk_native" else 32 * 3433
    limit = 8 * 1500 if budget.endswith("B") else float(budget[:-1]) / 100 * whole
    assert size > limit


def test_zeros_that_need_masks_are_in_the_budget(tmp_path):
    """A bias and a convolution mostly left alone, a matrix with columns and rows left alone."""
    base = small_base() | {"wide.conv": torch.zeros(16, 16, 3, 3), "h.weight": torch.zeros(90, 90)}
    expert = tuned(base, 1)
    expert["wide.conv"][::2] = 0
    expert["h.weight"][:, ::2] = 0
    expert["h.weight"][::3] = 0
    for budget in ("2500B", "2700B", "3000B", "4000B"):
        made = pack(base, {"x": expert}, tmp_path / budget, settings=PackSettings(budget=budget))
        assert made.task("x").bytes <= int(budget[:-1])


def test_the_budget_is_for_each_task_by_what_changed_in_it(tmp_path):
    base = small_base() | {"h.weight": torch.zeros(50, 50)}
    experts = {"all": tuned(base, 1), "one": tuned(base, 2, names=["h.weight"])}
    settings = PackSettings(budget="1500B")
    made = pack(base, experts, tmp_path / "p", settings=settings)
    fractions = {n: made.task(n).parameters["rank_fraction"] for n in experts}
    assert fractions["one"] > fractions["all"]
    assert all(made.task(n).bytes <= 1500 for n in experts)
    assert made.manifest.budget == "1500B"
    assert made.manifest.parameters == {}


def test_an_impossible_budget_is_refused_before_any_work(tmp_path):
    base = small_base()
    with pytest.raises(BudgetError, match=r"Task 'x': The budget of 0.01 % cannot be met"):
        pack(base, {"x": tuned(base, 1)}, tmp_path / "p", settings=PackSettings(budget="0.01%"))
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_only_the_values_rule_out_leaves_nothing_behind(tmp_path):
    """From headers it fits; the mask for exact zeros then takes 400 bytes more."""
    base = {"conv": torch.zeros(64, 64, 3, 1), "layer.weight": torch.zeros(8, 8)}
    expert = {n: torch.ones_like(t) for n, t in base.items()}
    expert["conv"][0] = 0
    floor = plan_shapes(
        [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in base.items()],
        PackSettings(parameters={"rank_fraction": 1 / 8}),
    ).bytes
    settings = PackSettings(budget=f"{floor + HEADER_BYTES + 50}B")
    with pytest.raises(BudgetError, match=r"Task 'x': The budget of .* cannot be met"):
        pack(base, {"x": expert}, tmp_path / "p", settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_a_bound_by_fraction_is_told_from_bytes():
    assert is_fraction(0.01) and not is_fraction(1)


def test_a_codec_without_rank_takes_no_budget():
    settings = PackSettings(method="emr", budget="1%")
    with pytest.raises(MethodError, match="emr has no parameter that a budget could set"):
        settings.codec()
