"""What is decoded is held by small bounds: what stays, what goes, what is made again."""

import pytest
import torch
from torch import Tensor

from personae.runtime.cache import Cache


class Asking:
    """A cache of 100 bytes, and what was made for it."""

    def __init__(self, *in_use: str) -> None:
        self.in_use = {*in_use}
        self.made: list[str] = []
        self.cache: Cache[Tensor] = Cache(100, lambda: self.in_use)

    def ask(self, task: str, name: str, nbytes: int) -> list[str]:
        """Ask for an entry; what was made since then."""

        def make() -> Tensor:
            self.made.append(task + name)
            return torch.zeros(nbytes, dtype=torch.uint8)

        before = len(self.made)
        assert self.cache.get(task, name, make).nbytes == nbytes
        assert self.cache.nbytes <= 100
        return self.made[before:]


def test_a_pass_over_more_than_fits_finds_what_it_held_before():
    """Three of 40 bytes: the least recently used one would go each time, and none be found."""
    asking = Asking("a")
    assert [asking.ask("a", name, 40) for name in "xyz"] == [["ax"], ["ay"], ["az"]]
    assert [asking.ask("a", name, 40) for name in "xyz"] == [[], [], ["az"]]
    assert asking.cache.nbytes == 80


def test_small_ones_take_the_place_of_large_ones():
    """90 and 30 do not fit: 30 stays, then 20 and 50 beside it, to the full 100."""
    asking = Asking("a")
    sizes = {"w": 90, "x": 30, "y": 20, "z": 50}
    for name, nbytes in sizes.items():
        asking.ask("a", name, nbytes)
    assert [asking.ask("a", name, nbytes) for name, nbytes in sizes.items()] == [["aw"], [], [], []]
    assert asking.cache.nbytes == 100


def test_tasks_that_are_not_in_use_make_room_the_longest_unused_first():
    asking = Asking("a", "b", "c")
    for task in "abc":
        asking.ask(task, "x", 30)
    asking.ask("a", "x", 30)  # b's is now the one that was asked for longest ago
    asking.in_use = {"c"}
    asking.ask("c", "y", 40)  # 90 and 40: b's goes
    assert asking.ask("a", "x", 30) == [] and asking.ask("c", "x", 30) == []
    assert asking.ask("b", "x", 30) == ["bx"]


def test_what_is_larger_than_all_room_drives_nothing_out():
    asking = Asking()
    asking.ask("a", "x", 60)
    assert asking.ask("b", "y", 101) == ["by"] and asking.ask("a", "x", 60) == []


def test_a_task_is_dropped():
    asking = Asking("a", "b")
    for task in "ab":
        asking.ask(task, "x", 30)
    asking.cache.drop("a")
    asking.cache.drop("c")
    assert asking.cache.nbytes == 30
    assert asking.ask("b", "x", 30) == [] and asking.ask("a", "x", 30) == ["ax"]


def test_an_entry_that_cannot_be_made_leaves_nothing():
    asking = Asking("a")

    def fail() -> Tensor:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        asking.cache.get("a", "x", fail)
    assert asking.cache.nbytes == 0 and asking.ask("a", "x", 10) == ["ax"]
