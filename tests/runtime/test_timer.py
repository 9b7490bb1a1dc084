import time
from types import SimpleNamespace

import pytest
import torch

from runtime import timer

CPU = torch.device("cpu")


@pytest.fixture
def watch(monkeypatch):
    """A clock whose time the test sets: watch.now, in seconds."""
    watch = timer.StepTimer(CPU)
    watch.now = 100.0
    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=lambda: watch.now))
    return watch


def spend(watch, **seconds):
    for name, length in seconds.items():
        watch.now += length
        watch.mark(name)


def test_every_part_gets_the_time_up_to_its_mark_per_step(watch):
    watch.start()
    spend(watch, wait=1.0, augment=2.0, forward=4.0)
    spend(watch, wait=3.0, augment=2.0, forward=0.0)
    assert watch.means(2) == {"wait": 2.0, "augment": 2.0, "forward": 2.0}


def test_parts_come_in_the_order_of_a_step_and_those_without_a_mark_are_left_out(watch):
    watch.start()
    spend(watch, optimizer=1.0, loss=1.0, wait=1.0, transfer=1.0)
    assert list(watch.means(1)) == ["wait", "transfer", "loss", "optimizer"]


def test_parts_that_repeat_within_a_step_add_up(watch):
    watch.start()
    for _ in range(3):  # batches of one optimizer step
        spend(watch, wait=1.0, forward=2.0, backward=3.0)
    spend(watch, optimizer=5.0)
    assert watch.means(1) == {"wait": 3.0, "forward": 6.0, "backward": 9.0, "optimizer": 5.0}


def test_what_was_before_a_start_counts_for_nothing(watch):
    watch.start()
    spend(watch, wait=1.0)
    watch.now += 50.0  # an evaluation
    watch.start()
    spend(watch, wait=3.0, augment=1.0)
    assert watch.means(2) == {"wait": 2.0, "augment": 0.5}


def test_means_begin_anew_at_the_last_mark(watch):
    watch.start()
    spend(watch, wait=1.0, augment=1.0)
    assert watch.means(1) == {"wait": 1.0, "augment": 1.0}
    spend(watch, wait=4.0)
    assert watch.means(1) == {"wait": 4.0}
    assert watch.means(1) == {}


def test_no_steps_have_no_means_and_are_forgotten(watch):
    assert watch.means(0) == {} and watch.means(1) == {}
    watch.start()
    spend(watch, wait=1.0)
    assert watch.means(0) == {}
    spend(watch, wait=2.0)
    assert watch.means(1) == {"wait": 2.0}


def test_the_parts_of_a_real_step_sum_to_the_time_that_passed():
    watch, before = timer.StepTimer(CPU), time.perf_counter()
    watch.start()
    for name in timer.PARTS:
        time.sleep(0.002)
        watch.mark(name)
    passed = time.perf_counter() - before
    means = watch.means(1)
    assert tuple(means) == timer.PARTS and min(means.values()) >= 0.002
    assert sum(means.values()) <= passed and sum(means.values()) > 0.9 * passed


def test_shares_are_percent_of_the_step_and_of_the_small_ones_only_wait_is_told():
    means = {"wait": 0.004, "augment": 0.001, "forward": 0.3, "backward": 0.695}
    assert timer.shares(means) == "wait 0% forward 30% backward 70%"
    assert timer.shares({}) == "" and timer.shares({"wait": 0.0}) == ""
