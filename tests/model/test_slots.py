"""What an engine and the steps of its slots say to each other survives the way to the devices and back."""

import dataclasses

import jax
import numpy as np
import pytest

from grokjax.model import DrawnTokens, RowSettings, SlotSettings

ROWS = {
    0: RowSettings(temperature=0.7, top_p=0.9, min_p=0.05, top_k=2**31 - 1, seed=2**32 - 1, active=True),
    2: RowSettings(temperature=0.0, top_p=1.0, seed=3, active=True, biased=True, wants_top=True),
}


def test_slots_that_are_not_named_do_not_draw() -> None:
    settings = SlotSettings.of(ROWS, 4)
    assert settings.active.tolist() == [True, False, True, False]
    assert settings.biased.tolist() == settings.wants_top.tolist() == [False, False, True, False]
    assert settings.seed.tolist() == [2**32 - 1, 0, 3, 0]


@pytest.mark.parametrize("where", [np.asarray, jax.numpy.asarray, jax.jit(lambda packed: packed)])
def test_settings_arrive_as_they_were(where) -> None:
    settings = SlotSettings.of(ROWS, 4)
    assert (settings.packed.shape, settings.packed.dtype) == ((4, 8), np.int32)
    there = SlotSettings.unpack(where(settings.packed))
    for field in dataclasses.fields(settings):
        ours, theirs = getattr(settings, field.name), getattr(there, field.name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
        for slot, row in ROWS.items():
            assert ours[slot] == np.asarray(getattr(row, field.name), ours.dtype)


def test_settings_are_told_apart_inside_a_program() -> None:
    settings = SlotSettings.of(ROWS, 4)
    seeds = jax.jit(lambda packed: SlotSettings.unpack(packed).seed)(settings.packed)
    np.testing.assert_array_equal(seeds, settings.seed)


@pytest.mark.parametrize("num_top", [0, 3])
def test_what_was_drawn_arrives_as_it_was(num_top: int) -> None:
    random = np.random.default_rng(0)
    top = random.integers(0, 99, (2, num_top), np.int32), random.normal(size=(2, num_top)).astype(np.float32)
    drawn = DrawnTokens(np.array([5, 7], np.int32), np.array([-0.5, -np.inf], np.float32), *top)
    packed = np.asarray(jax.jit(lambda *arrays: DrawnTokens(*arrays).pack())(*vars(drawn).values()))
    assert (packed.shape, packed.dtype) == ((2, 2 + 2 * num_top), np.int32)
    there = DrawnTokens.unpack(packed)
    for ours, theirs in zip(vars(drawn).values(), vars(there).values(), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    one = there.of(1)
    assert (one.token_id, one.logprob, one.top_ids.tolist()) == (7, -np.inf, top[0][1].tolist())
