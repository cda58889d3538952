"""Makes the toys beside the tests importable, for tests and for the processes that they start."""

import multiprocessing
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def processes():
    """Starts processes from a clean server that has imported everything: quick, and without this one's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run_toy"])
    return context
