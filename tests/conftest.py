"""What all tests stand on."""

import gc
import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def _signals_as_in_a_terminal():
    """Under nohup, or behind an & in a script, SIGHUP and SIGINT are ignored from the start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _modules_and_tests_are_no_garbage():
    """Each run ends with a collection of garbage, which would look at all that stays as well."""
    gc.collect()
    gc.freeze()
