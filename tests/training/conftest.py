"""Makes the toys beside the tests importable, for tests and for the processes that they start."""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

os.environ["ACCELERATE_USE_CPU"] = "true"  # bit for bit is promised there only
HERE = str(Path(__file__).parent)
sys.path.append(HERE)


@pytest.fixture(scope="session")
def processes():
    """Starts processes from a clean server that has imported everything: quick, and without this one's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run_toy"])
    with pytest.MonkeyPatch.context() as patch:
        # The server looks for what it preloads along PYTHONPATH only.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH", "")])))
        forkserver.ensure_running()
    return context
