"""Freed memory stays with the process: pages are not faulted in again and again."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from personae.cli.allocator import keep_freed_memory
keep_freed_memory()
def turn():
    held = [torch.ones(4 << 20) for _ in range(4)]  # 16 MiB each
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_pages_are_faulted_in_once():
    # 40 turns of 4 blocks of 4096 pages: 655,360 faults if each turn faults its pages in, as most
    # processes do that are not told (where something happens to lie above, memory stays anyway).
    # A process that is told needs those of a turn, or of a few where blocks fall badly at first.
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 655_360 / 8
