from itertools import islice

import numpy as np
import pytest

from diffusion_lit.data.stream import Key, OnePass, TrainingStream


def batches(stream: TrainingStream, count: int) -> list[list[Key]]:
    return list(islice(iter(stream), count))


def flat(parts: list[list[Key]]) -> list[Key]:
    return [key for part in parts for key in part]


@pytest.mark.parametrize(("num_images", "batch"), [(10, 4), (7, 7), (3, 8), (1, 5), (100, 16)])
def test_every_epoch_holds_every_image_once_and_epochs_join_without_a_seam(num_images: int, batch: int) -> None:
    keys = flat(batches(TrainingStream(num_images, batch, seed=3, flip=True), 6 * num_images))
    for epoch in range(6):
        seen = sorted(index for index, *_ in keys[epoch * num_images : (epoch + 1) * num_images])
        assert seen == list(range(num_images))


def test_every_batch_has_the_same_size_also_across_epochs() -> None:
    assert {len(batch) for batch in batches(TrainingStream(10, 4), 50)} == {4}


def test_epochs_differ_in_order() -> None:
    first, second = batches(TrainingStream(200, 200, seed=0), 2)
    moved = sum(a != b for (a, *_), (b, *_) in zip(first, second, strict=True))
    assert moved > 180


def test_the_order_of_an_epoch_is_not_the_order_of_the_set() -> None:
    (first,) = batches(TrainingStream(200, 200, seed=0), 1)
    correlation = np.corrcoef([index for index, *_ in first], np.arange(200))[0, 1]
    assert abs(correlation) < 0.3


def test_another_seed_is_another_order_and_the_same_seed_the_same() -> None:
    def order(seed: int) -> list[list[Key]]:
        return batches(TrainingStream(50, 10, seed=seed, flip=True), 20)

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("start", [0, 1, 4, 5, 17, 1000])
def test_a_stream_that_starts_later_is_the_tail_of_one_that_started_at_zero(start: int) -> None:
    whole = batches(TrainingStream(13, 4, seed=5, flip=True), start + 20)
    tail = batches(TrainingStream(13, 4, seed=5, flip=True, start=start), 20)
    assert tail == whole[start:]


def test_the_start_is_asked_for_at_every_new_pass() -> None:
    done = [0]
    stream = TrainingStream(13, 4, start=lambda: done[0])
    whole = batches(stream, 8)
    done[0] = 5
    assert batches(stream, 3) == whole[5:]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("num_images", [5, 30])
def test_several_ranks_together_see_the_batches_of_one(world_size: int, num_images: int) -> None:
    alone = batches(TrainingStream(num_images, 8, seed=2, flip=True), 12)
    ranks = [
        batches(TrainingStream(num_images, 8 // world_size, rank, world_size, seed=2, flip=True), 12)
        for rank in range(world_size)
    ]
    together = [flat(list(parts)) for parts in zip(*ranks, strict=True)]
    assert together == alone


def test_accumulated_micro_batches_together_are_the_batch_of_one_step() -> None:
    whole = batches(TrainingStream(30, 8, seed=2, flip=True), 12)
    halves = batches(TrainingStream(30, 4, seed=2, flip=True), 24)
    assert flat(halves) == flat(whole)


def test_about_half_the_images_are_mirrored_and_the_choice_is_fresh_every_epoch() -> None:
    epochs = batches(TrainingStream(10_000, 10_000, seed=0, flip=True), 2)
    first, second = ({key.image: key.flip for key in epoch} for epoch in epochs)
    # Binomial(10000, 1/2) has a standard deviation of 50.
    assert abs(sum(first.values()) - 5000) < 250
    assert abs(sum(first[index] != second[index] for index in first) - 5000) < 250


def test_mirroring_changes_no_order_and_none_is_mirrored_without_it() -> None:
    mirrored = flat(batches(TrainingStream(40, 8, seed=1, flip=True), 15))
    plain = flat(batches(TrainingStream(40, 8, seed=1, flip=False), 15))
    assert [index for index, *_ in mirrored] == [index for index, *_ in plain]
    assert not any(key.flip for key in plain)


def test_draws_are_fresh_every_epoch_and_uniform() -> None:
    epochs = batches(TrainingStream(10_000, 10_000, seed=0), 2)
    first, second = ({key.image: key.draw for key in epoch} for epoch in epochs)
    assert sum(first[index] == second[index] for index in first) == 0
    # A uniform variable in [0, 1) has the deviation 0.289, the mean of 10,000 of them 0.0029.
    assert np.mean(list(first.values())) / 2**63 == pytest.approx(0.5, abs=0.015)
    thirds = np.bincount([draw % 3 for draw in first.values()])
    assert all(abs(thirds - 10_000 / 3) < 250)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no image"):
        TrainingStream(0, 4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_images", [1, 3, 12, 17, 100])
@pytest.mark.parametrize("batch_size", [1, 5, 8, 200])
def test_one_pass_holds_every_image_once_over_all_ranks(world_size: int, num_images: int, batch_size: int) -> None:
    passes = [list(OnePass(num_images, batch_size, rank, world_size)) for rank in range(world_size)]
    seen = [index for rank in passes for batch in rank for index, *_ in batch]
    assert sorted(seen) == list(range(num_images))
    for rank, found in enumerate(passes):
        assert len(found) == len(OnePass(num_images, batch_size, rank, world_size))
        sizes = [len(batch) for batch in found]
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1
        assert not any(key.flip or key.draw for batch in found for key in batch)
        order = [index for batch in found for index, *_ in batch]
        assert order == sorted(order)


@pytest.mark.parametrize("num_images", [0, 1, 2, 3, 17, 33, 100, 10_000])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_all_ranks_have_the_same_number_of_batches_and_at_least_one(num_images: int, batch_size: int) -> None:
    (count,) = {len(OnePass(num_images, batch_size, rank, 4)) for rank in range(4)}
    assert count == max(1, -(-num_images // (4 * batch_size)))
