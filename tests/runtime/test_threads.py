import psutil
import pytest
import torch

from runtime import threads


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    number = torch.get_num_threads()
    monkeypatch.setattr(threads, "cores_and_reason", lambda: (4, "cgroup quota, of 8 cores"))
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.4, 9.0, 9.0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(number)


def test_the_cores_are_shared_among_ranks_and_the_line_says_why():
    threads.use_threads(0)
    assert threads.describe(0, 1) == "threads    4 of the CPU (cgroup quota, of 8 cores)"
    threads.use_threads(0, 2)
    assert threads.describe(0, 2).endswith("2 of the CPU (cgroup quota, of 8 cores, for 2 ranks)")
    threads.use_threads(3)
    assert threads.describe(3, 1) == "threads    3 of the CPU (run.threads)"


def test_a_busy_machine_is_said_and_changes_no_number_of_threads(monkeypatch):
    monkeypatch.setattr(psutil, "getloadavg", lambda: (3.5, 0.0, 0.0))
    threads.use_threads(0)
    assert torch.get_num_threads() == 4
    assert "other work keeps 3.5 cores busy" in threads.describe(0, 1)


@pytest.mark.parametrize(
    "text, asked, ranks, number, reason",
    [
        ("3", 0, 1, 3, "OMP_NUM_THREADS"),
        ("1,1", 0, 1, 1, "OMP_NUM_THREADS"),
        ("3", 2, 1, 2, "run.threads"),
        ("3", 0, 2, 3, "OMP_NUM_THREADS"),
        ("1", 0, 2, 2, "cgroup quota, of 8 cores, for 2 ranks"),  # torchrun has set it
        ("all", 0, 1, 4, "cgroup quota, of 8 cores"),
    ],
)
def test_omp_num_threads_counts_below_run_threads_and_is_said(
    monkeypatch, text, asked, ranks, number, reason
):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    threads.use_threads(asked, ranks)
    assert threads.describe(asked, ranks) == f"threads    {number} of the CPU ({reason})"
