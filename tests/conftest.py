"""Every test draws the same random numbers, whatever ran before it."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Seed before the test's fixtures are made.

    Which files a worker of pytest-xdist gets depends on how busy the
    machine is, and so would the numbers of a test that sets no seed.
    """
    torch.manual_seed(0)
