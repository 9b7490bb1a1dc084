"""What all tests stand on."""

import gc
import os
import signal
import sys
from multiprocessing import forkserver

import pytest

# cuBLAS reads it once, when a process first uses it: tests of `run.deterministic` may come later.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_finish():
    if "tests.processes" in sys.modules:
        forkserver.ensure_running()  # it imports packages meanwhile
    # Each run ends with a collection of garbage. It would look at all modules and tests.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _signals_as_in_a_terminal():
    """Under nohup, or behind an & in a script, SIGHUP and SIGINT are ignored from the start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _no_handler_of_dead_workers():
    """A DataLoader leaves one, which would raise an error in a later test that kills a worker."""
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, handler)
