"""Settings and fixtures for all test files."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a failure can be repeated; no limit on time, which a busy machine would break.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are slowed down by threads, the more so on busy machines."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let collections of small models follow a plan of several segments, as those of large ones do."""
    monkeypatch.setattr("gradstats.collect.walk.SMALL_BYTES", 0)
    monkeypatch.setattr("gradstats.collect.plan.SMALL_BYTES", 0)
    monkeypatch.setattr("gradstats.collect.plan._UNCUT", 0)
    monkeypatch.setattr("gradstats.collect.walk._is_uncut", lambda stages: False)
