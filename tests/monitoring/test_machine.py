import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from monitoring import machine
from monitoring.machine import Machine, MemoryLimit

MB = 2**20
BUSY = "print(1, flush=True)\nwhile True: pass"
HOLDING = f"block = b'1' * {60 * MB}\nprint(1, flush=True)\nimport time\ntime.sleep(60)"


@pytest.fixture
def child():
    """Starts a python process that runs a text; it has printed a line when this returns."""
    started = []

    def start(text):
        process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
        started.append(process)
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


# ---------------------------------------------------------------------------- processes


def processes_of(machine, roles):
    return machine.read(roles)["processes"]


def test_a_process_is_listed_with_its_role_and_what_it_holds(child):
    pid = child(HOLDING).pid
    (one,) = processes_of(Machine(), {pid: "worker 0"})
    assert (one["pid"], one["role"], one["cpu"]) == (pid, "worker 0", None)
    assert 60 * MB < one["rss"] - one["shared"] < one["rss"] < 200 * MB
    assert one["status"] in (psutil.STATUS_SLEEPING, psutil.STATUS_RUNNING)


def test_cpu_is_percent_of_a_core_since_the_reading_before(child):
    roles = {child(BUSY).pid: "busy", child(HOLDING).pid: "idle"}
    readings = Machine()
    readings.read(roles)
    time.sleep(0.4)
    busy, idle = (one["cpu"] for one in processes_of(readings, roles))
    assert idle < 10 < busy < 250


def test_a_process_that_ended_is_left_out_and_one_not_waited_for_is_a_zombie(child):
    ended, waited = child(HOLDING), child(HOLDING)
    readings = Machine()
    roles = {ended.pid: "worker 0", waited.pid: "worker 1", 2**22 + 5: "worker 2"}
    assert [one["role"] for one in processes_of(readings, roles)] == ["worker 0", "worker 1"]
    ended.kill()
    waited.kill()
    waited.wait()
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    (one,) = processes_of(readings, roles)
    assert (one["pid"], one["rss"], one["status"]) == (ended.pid, 0, psutil.STATUS_ZOMBIE)


# ---------------------------------------------------------------------------- the machine


def test_limits_are_those_of_the_machine_its_cgroups_and_the_settings(monkeypatch):
    limit = MemoryLimit(5, 16, "memory of this machine")
    monkeypatch.setattr(machine, "rooms", lambda: [limit])
    monkeypatch.setattr(machine, "resident_memory", lambda pids: 3)
    reading = Machine().read({}, memory_limit=10)
    assert reading["tree"] == 3
    assert reading["rooms"] == [[5, 16, "memory of this machine"], [7, 10, "run.memory_gb"]]
    assert Machine().read({}, memory_limit=2)["rooms"][1][0] == 0
    assert len(Machine().read({})["rooms"]) == 1


def test_only_kills_for_memory_since_the_start_count(monkeypatch):
    counts = iter([4, 4, 6])
    monkeypatch.setattr(machine, "oom_kills", lambda: next(counts))
    readings = Machine()
    assert [readings.read({})["new_oom_kills"] for _ in range(2)] == [0, 2]


def test_file_systems_and_swap_are_told_in_bytes(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=3, total=8, used=5)
    monkeypatch.setattr(psutil, "disk_usage", {"/dev/shm": usage, str(tmp_path): usage}.get)
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(used=1, total=4))
    reading = Machine(tmp_path).read({})
    assert (reading["shm"], reading["disk"], reading["swap"]) == ([3, 8], [3, 8], [1, 4])
    assert Machine().read({})["disk"] is None


def test_what_a_system_does_not_tell_is_null_and_the_rest_is_there(monkeypatch, tmp_path):
    def nothing(*arguments, **options):
        raise OSError("no such thing here")

    for name in ("swap_memory", "disk_usage", "getloadavg"):
        monkeypatch.setattr(psutil, name, nothing, raising=False)
    for name in ("rooms", "oom_kills", "resident_memory"):
        monkeypatch.setattr(machine, name, nothing)
    reading = Machine(tmp_path).read({os.getpid(): "training"}, memory_limit=10)
    (one,) = reading.pop("processes")
    assert one["role"] == "training" and one["rss"] > MB
    assert reading.pop("cores") == os.cpu_count()
    assert {key for key, value in reading.items() if value not in (None, [])} == set()


# ---------------------------------------------------------------------------- GPUs


@pytest.fixture
def two_cards(monkeypatch):
    """torch.cuda of a process that uses CUDA, with two cards."""
    values = {
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "get_device_properties": lambda i: SimpleNamespace(name="NVIDIA H100", total_memory=80),
        "device_memory_used": lambda i: 60 + i,
        "utilization": lambda i: 97,
        "temperature": lambda i: 71,
        "power_draw": lambda i: 412_400,
        "memory_allocated": lambda i: 20 - 20 * i,  # the process uses the first
        "max_memory_allocated": lambda i: 30 - 30 * i,
        "memory_reserved": lambda i: 40 - 40 * i,
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, value)


CARD = {"name": "NVIDIA H100", "total": 80, "load": 97, "temperature": 71, "power": 412}


OWN = {"allocated": 20, "max_allocated": 30, "reserved": 40}


def test_each_gpu_is_read_in_bytes_percent_degrees_and_watts(two_cards):
    first = {"index": 0, "used": 60, **CARD, **OWN}
    second = {"index": 1, "used": 61, **CARD, **dict.fromkeys(OWN, 0)}
    assert Machine().read({})["gpus"] == [first, second]


def test_what_a_card_does_not_report_is_null_beside_what_it_does(two_cards, monkeypatch):
    for name in ("power_draw", "utilization", "temperature", "device_memory_used"):
        monkeypatch.setattr(torch.cuda, name, lambda index: 1 / 0)
    silent = dict.fromkeys(("used", "load", "temperature", "power"))
    assert Machine().read({})["gpus"][0] == {"index": 0, **CARD, **OWN, **silent}


def test_a_process_that_does_not_use_cuda_has_no_gpus_and_is_not_made_to_use_it(
    two_cards, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ("get_device_properties", "memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda index: pytest.fail("used"))
    assert Machine().read({})["gpus"] == []
