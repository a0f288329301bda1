"""Shapes and dtypes in signatures are checked while tests run, and only then."""

import os

from jaxtyping import install_import_hook

# One hook for the whole package; it must stand before the first import of personae.
_hook = install_import_hook("personae", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ci")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors: threads cost more than they give, and workers may run side by side."""
    torch.set_num_threads(1)
