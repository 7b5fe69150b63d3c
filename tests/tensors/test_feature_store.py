"""Features are found where they were put, by this process and others."""

from __future__ import annotations

import os
from collections import UserDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_speedups.tensors.feature_store import FeatureStore, Kind, bytes_needed, evenly_spaced, fingerprint

KINDS = {
    "a 0 0": Kind((3, 2), torch.float32),
    "b 0 0": Kind((), torch.int64),
    "c 0 0": Kind((5,), torch.bfloat16),
    "c 1 0": Kind((1,), torch.bool),
}


def features(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (torch.randn(samples, *kind.shape, generator=generator) * 100).to(kind.dtype)
        for key, kind in KINDS.items()
    }


@pytest.mark.parametrize("in_folder", [False, True])
def test_what_is_written_is_read_in_any_order(in_folder, tmp_path):
    store = FeatureStore(KINDS, 11, tmp_path / "new" / "one" if in_folder else None)
    everything = features(11)
    for part in torch.randperm(11).split(4):
        assert not store.has(part)
        store.write(part, {key: values[part] for key, values in everything.items()})
        assert store.has(part.flip(0))
    order = torch.randperm(11)
    for key, values in everything.items():
        assert torch.equal(store.read(key, order), values[order])
        assert store.read(key, order).dtype == KINDS[key].dtype


def test_what_is_read_is_no_view():
    store = FeatureStore(KINDS, 2)
    store.write(torch.arange(2), features(2))
    store.read("a 0 0", torch.arange(2)).zero_()
    assert torch.equal(store.read("a 0 0", torch.arange(2)), features(2)["a 0 0"])


@pytest.mark.parametrize("left", [0, 20, -3])
def test_a_file_that_was_cut_off_is_made_anew(left, tmp_path):
    FeatureStore(KINDS, 6, tmp_path).write(torch.arange(6), features(6))
    (file,) = tmp_path.glob("*.bin")
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    store = FeatureStore(KINDS, 6, tmp_path)
    assert not store.has(torch.tensor([5]))
    store.write(torch.arange(6), features(6))
    assert file.read_bytes() == whole
    assert FeatureStore(KINDS, 6, tmp_path).has(torch.arange(6))


def test_fingerprints_of_objects_are_those_of_their_tensors():
    class Batch:
        def __init__(self, value):
            self.images, self.more = torch.full((2,), value), {"labels": [torch.ones(1)]}

    assert fingerprint(Batch(1.0)) == fingerprint(Batch(1.0)) != fingerprint(Batch(2.0))
    assert fingerprint(UserDict(x=torch.ones(2))) == fingerprint(UserDict(x=torch.ones(2)))


def test_two_share_a_file_and_a_third_finds_it(tmp_path):
    one, other = FeatureStore(KINDS, 6, tmp_path), FeatureStore(KINDS, 6, tmp_path)
    one.write(torch.tensor([1, 2]), {key: values[:2] for key, values in features(6).items()})
    assert other.has(torch.tensor([2, 1]))
    assert not other.has(torch.tensor([2, 3]))
    del one, other
    third = FeatureStore(KINDS, 6, tmp_path)
    assert torch.equal(third.read("a 0 0", torch.tensor([1, 2])), features(6)["a 0 0"][:2])
    assert [path.suffix for path in tmp_path.iterdir()] == [".bin"]


def test_other_kinds_or_samples_have_a_file_of_their_own(tmp_path):
    FeatureStore(KINDS, 6, tmp_path).write(torch.arange(6), features(6))
    assert not FeatureStore(KINDS, 7, tmp_path).has(torch.arange(6))
    assert not FeatureStore({"a 0 0": KINDS["a 0 0"]}, 6, tmp_path).has(torch.arange(6))
    assert len(list(tmp_path.glob("*.bin"))) == 3


def test_a_process_that_was_quicker_is_not_disturbed(tmp_path, monkeypatch):
    own = os.posix_fallocate

    def late(file, begin, size):
        monkeypatch.setattr("os.posix_fallocate", own)
        FeatureStore(KINDS, 6, tmp_path).write(torch.arange(6), features(6))
        own(file, begin, size)

    monkeypatch.setattr("os.posix_fallocate", late)
    store = FeatureStore(KINDS, 6, tmp_path)
    assert store.has(torch.arange(6))
    assert torch.equal(store.read("a 0 0", torch.arange(6)), features(6)["a 0 0"])


def test_a_system_without_fallocate(tmp_path, monkeypatch):
    monkeypatch.delattr("os.posix_fallocate", raising=False)
    FeatureStore(KINDS, 6, tmp_path).write(torch.arange(6), features(6))
    assert FeatureStore(KINDS, 6, tmp_path).has(torch.arange(6))


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(file, begin, size):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        FeatureStore(KINDS, 6, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": 100}))
    with pytest.raises(OSError, match="has 100 bytes left"):
        FeatureStore(KINDS, 6, tmp_path)


@given(
    st.integers(1, 50),
    st.lists(
        st.tuples(st.lists(st.integers(1, 4), max_size=3), st.sampled_from(["float64", "bool", "float16"])), max_size=4
    ),
)
def test_the_size_is_that_of_the_features_and_little_more(samples, kinds):
    kinds = {str(i): Kind(tuple(shape), getattr(torch, dtype)) for i, (shape, dtype) in enumerate(kinds)}
    net = samples + sum(samples * int(np.prod(shape)) * dtype.itemsize for shape, dtype in kinds.values())
    assert net <= bytes_needed(kinds, samples) <= net + 64 * len(kinds)


@pytest.mark.parametrize(
    "other",
    [
        [torch.ones(2, 3), {"a": 1}, "b"],
        [torch.ones(3, 2).double(), {"a": 1}, "b"],
        [torch.ones(3, 2) + 1e-6, {"a": 1}, "b"],
        [torch.ones(3, 2), {"a": 2}, "b"],
        [torch.ones(3, 2), {"b": 1}, "b"],
        [torch.ones(3, 2), {"a": 1}, "c"],
        [torch.ones(3, 2), {"a": 1}],
    ],
)
def test_what_differs_in_anything_has_another_fingerprint(other):
    things = [torch.ones(3, 2), {"a": 1}, "b"]
    same = [torch.ones(2, 3).t(), {"a": 1}, "b"]
    assert fingerprint(things) == fingerprint(same)
    assert fingerprint(things) != fingerprint(other)


def test_the_fingerprint_of_all_kinds_of_things():
    for things in (torch.tensor(3), torch.zeros(0), torch.tensor(True), np.ones(3), None, lambda: 1):
        assert fingerprint(things) == fingerprint(things)
    assert fingerprint(np.ones(3)) != fingerprint(np.zeros(3))
    assert fingerprint(torch.nn.Parameter(torch.ones(2))) == fingerprint(torch.ones(2))


@given(st.integers(1, 20), st.integers(1, 100))
def test_evenly_spaced(count, length):
    found = evenly_spaced(count, length)
    assert found == sorted(set(found))
    assert len(found) == min(count, length)
    assert found[0] == 0
    assert found[-1] == (length - 1 if min(count, length) > 1 else 0)
