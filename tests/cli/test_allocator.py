"""Freed memory stays with the process: pages are not faulted in again and again."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from personae.cli.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def turn():
    held = [torch.ones(4 << 20) for _ in range(4)]  # 16 MiB each
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, word], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_pages_are_faulted_in_once():
    # 10 turns of 4 blocks of 4096 pages: 163,840 faults if each turn faults its pages in.
    assert faults("keep") < 3 * 4096
    assert faults("leave") > 4 * 4096
