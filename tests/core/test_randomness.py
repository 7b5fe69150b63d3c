"""Streams are fixed by their coordinates and independent of each other and of the global one."""

import torch

from lightning_speedups.core.randomness import generator_for


def test_same_coordinates_same_stream_others_another():
    draws = {c: tuple(torch.rand(4, generator=generator_for(5, *c)).tolist()) for c in [(0, 0), (0, 1), (1, 0), (1,)]}
    assert len(set(draws.values())) == 4
    assert tuple(torch.rand(4, generator=generator_for(5, 0, 1)).tolist()) == draws[0, 1]


def test_first_draws_of_neighbouring_streams_are_uncorrelated_and_uniform():
    first = torch.stack([torch.rand(1, generator=generator_for(0, 0, step)) for step in range(4000)]).flatten()
    assert abs(first.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]) < 0.05


def test_the_global_stream_is_left_alone():
    state = torch.get_rng_state()
    torch.rand(3, generator=generator_for(1))
    assert torch.equal(torch.get_rng_state(), state)
