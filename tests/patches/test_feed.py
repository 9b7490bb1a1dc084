"""The same batches however they are loaded: workers, ranks, caches, stores, resumed runs."""

import h5py
import pytest
import torch

import data
from patches import feed
from settings import Augment
from tests.test_data import HUGE, SHAPES, augment_batch, patches, same_sample, write
from volumes import casefile

EVERYTHING = Augment(
    rotation=0.5, scaling=0.5, elastic=0.5, roll=0.5, illumination=0.5, low_resolution=0.5
).model_dump()


@pytest.fixture
def stored(tmp_path):
    return [write(tmp_path, i, shape) for i, shape in enumerate(SHAPES)]


def batches(stored, first=0, last=3, *, budget=HUGE, workers=0, epoch=3, size=2, **plan):
    """Batches of samples with everything in them, as a list."""
    dataset = patches(stored, budget=budget, augmentation=EVERYTHING, skeletons=True)
    how = {"prefetch": 2, "pin": False, "persistent": True, "workers": workers, **plan}
    return list(data.Batches(dataset, first, last, batches_per_epoch=epoch, batch_size=size, **how))


def check_same(some, others):
    """Every field of every sample, and every voxel of the patches."""
    assert len(some) == len(others) > 0
    for a, b in zip(some, others, strict=True):
        assert len(a) == len(b) and all(map(same_sample, a, b))
        assert all(map(torch.equal, augment_batch(a), augment_batch(b)))


# ---------------------------------------------------------------------------- the same batches


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_same_with_any_number_of_workers(stored, workers):
    check_same(batches(stored, 1, 6), batches(stored, 1, 6, workers=workers))


def test_batches_are_different_from_each_other(stored):
    samples = [sample for batch in batches(stored, 0, 6) for sample in batch]
    for i, a in enumerate(samples):
        assert not any(same_sample(a, b) for b in samples[:i])


def test_the_batches_of_two_ranks_are_those_of_one_with_twice_the_size(stored):
    one = batches(stored, 1, 5, size=4)
    ranks = [batches(stored, 1, 5, rank=rank, ranks=2) for rank in (0, 1)]
    check_same(one, [a + b for a, b in zip(*ranks, strict=True)])


@pytest.mark.parametrize("budget", [0, 20_000])
def test_batches_are_the_same_with_any_budget_of_the_cache(stored, budget):
    check_same(batches(stored, 0, 6), batches(stored, 0, 6, budget=budget))


@pytest.mark.parametrize("budget", [0, 20_000, HUGE])
def test_batches_are_the_same_from_a_compressed_store(stored, tmp_path, budget):
    packed = []
    for case in stored:
        path = tmp_path / "packed" / f"{case.id}.h5"
        path.parent.mkdir(exist_ok=True)
        with h5py.File(case.path) as plain, h5py.File(path, "w") as file:
            file.attrs.update(plain.attrs)
            for name in plain:
                plain.copy(name, file)
            for name in ("image", "label"):
                del file[name]
                chunks = tuple(min(8, n) for n in plain[name].shape)
                file.create_dataset(name, data=plain[name], chunks=chunks, compression="lzf")
        packed.append(casefile.read_case(path))
    check_same(batches(stored, 0, 6), batches(packed, 0, 6, budget=budget))


@pytest.mark.parametrize("persistent", [True, False])
def test_a_run_that_starts_in_mid_epoch_gets_what_an_uninterrupted_one_gets(stored, persistent):
    whole = batches(stored, 0, 8, persistent=persistent)
    check_same(whole[4:], batches(stored, 4, 8, persistent=persistent))


def test_epochs_sample_other_patches_and_do_not_depend_on_their_length(stored):
    short, long = batches(stored, 0, 6, epoch=3), batches(stored, 0, 6, epoch=6)
    check_same(short[:3], long[:3])
    assert not any(map(same_sample, short[0], short[3]))


def test_the_generator_of_the_network_is_left_alone(stored):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(stored)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------- the plan


def test_the_plan_counts_samples_within_each_epoch():
    plan = feed.PatchPlan(batches_per_epoch=2, batch_size=3)
    assert [plan.sample_indices(number) for number in (1, 2, 3)] == [
        [(0, 3), (0, 4), (0, 5)],
        [(1, 0), (1, 1), (1, 2)],
        [(1, 3), (1, 4), (1, 5)],
    ]


def test_each_rank_takes_its_part_of_every_batch():
    plans = [feed.PatchPlan(batches_per_epoch=2, batch_size=2, rank=r, ranks=3) for r in range(3)]
    ranks = [[plan.sample_indices(0), plan.sample_indices(1)] for plan in plans]
    assert ranks[0] == [[(0, 0), (0, 1)], [(0, 6), (0, 7)]]
    assert ranks[2] == [[(0, 4), (0, 5)], [(0, 10), (0, 11)]]
    indices = [index for rank in ranks for batch in rank for index in batch]
    assert sorted(indices) == [(0, i) for i in range(12)]


@pytest.mark.parametrize("persistent", [True, False])
def test_no_batches_left_is_an_empty_stream(stored, persistent):
    assert batches(stored, 3, 3, persistent=persistent) == []
