"""What training_step receives: slices of the padded images, mirrored at random or in every other epoch."""

from __future__ import annotations

import collections
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from torchvision.transforms import v2

from lightning_speedups import BatchAugmentation, InMemoryLoader
from lightning_speedups.attach.batches import BatchOrder
from lightning_speedups.core.augmentation import coins, shifted_crops
from lightning_speedups.core.randomness import generator_for
from zoo import Batches, OrderOfEpoch, ReplayLoader, Seer, fit_interrupted, images, loader, resume, trainer

SIDE = 6


def EXAMPLE():
    return {"callbacks": [BatchAugmentation(crop=2, flip="alternating", seed=3)]}


def pictures(count, dtype=torch.float32):
    """Pictures, no two pixels of one alike, and their numbers."""
    order = torch.rand(count, 2, SIDE, SIDE, generator=generator_for(0)).flatten(1).argsort(1)
    return order.view(count, 2, SIDE, SIDE).to(dtype), torch.arange(count)


def numbered(count=24, batch_size=8, **options):
    return DataLoader(TensorDataset(*pictures(count)), batch_size, **options)


def flips(module, originals):
    """For each sample, whether it was mirrored, time after time; no crop."""
    found = collections.defaultdict(list)
    for batch in module.seen:
        for image, number in zip(batch[0], batch[1].tolist(), strict=True):
            mirrored = np.ascontiguousarray(np.flip(originals[number].numpy(), -1))
            assert np.array_equal(image.numpy(), mirrored) or torch.equal(image, originals[number])
            found[number].append(bool(np.array_equal(image.numpy(), mirrored)))
    return found


def place_of(image, original, crop, padding):
    """The one place in the padded original, and the side, at which the image is found."""
    padded = np.pad(original.numpy(), [(0, 0), (crop, crop), (crop, crop)], mode=padding)
    size = image.shape[-1]
    found = [
        (top, left, side)
        for top in range(2 * crop + 1)
        for left in range(2 * crop + 1)
        for side in (1, -1)
        if np.array_equal(padded[:, top : top + size, left : left + size][..., ::side], image.numpy())
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(("padding", "numpys"), [("reflect", "reflect"), ("zeros", "constant")])
def test_each_image_is_a_slice_of_its_padded_self_at_a_place_drawn_uniformly(padding, numpys):
    module, originals = Seer(), pictures(60)[0] + 1
    before = originals.clone()
    data = DataLoader(TensorDataset(originals, torch.arange(60)), 20, shuffle=True)
    trick = BatchAugmentation(crop=1, padding=padding, seed=5)
    trainer(callbacks=[trick], max_epochs=60).fit(module, data)
    places = collections.Counter(
        place_of(image, originals[number], 1, numpys)
        for batch in module.seen
        for image, number in zip(*batch, strict=True)
    )
    expected = 3600 / 18
    assert len(places) == 18
    assert sum((count - expected) ** 2 / expected for count in places.values()) < 40.8  # χ² with 17 degrees, 0.1 %
    assert torch.equal(originals, before)


def test_it_draws_by_seed_rank_and_batch_alone_and_leaves_the_global_stream():
    def run(seed):
        module, data = Seer(), Batches(*zip(pictures(24)[0].split(8), strict=True))
        state = torch.get_rng_state()
        trainer(callbacks=[BatchAugmentation(crop=3, flip=None, seed=seed)], max_epochs=2).fit(module, data)
        assert torch.equal(torch.get_rng_state(), state)
        return [batch[0] for batch in module.seen]

    one, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    originals = pictures(24)[0]
    for number, seen in enumerate(one):
        offsets = torch.randint(7, (2, 8), generator=generator_for(1, 0, number, BatchOrder.AUGMENT))
        assert torch.equal(seen, shifted_crops(originals[8 * (number % 3) :][:8], offsets, 3))


def test_a_random_flip_comes_half_of_the_time_and_needs_nothing_of_the_loader():
    module, (originals, numbers) = Seer(), pictures(40)
    data = Batches(*zip(originals.split(8), numbers.split(8), strict=True))
    trainer(callbacks=[BatchAugmentation(crop=0, seed=1)], max_epochs=50).fit(module, data)
    found = flips(module, originals)
    share = np.mean(list(found.values()), 1)
    assert abs(share.mean() - 0.5) < 4 * 0.5 / 2000**0.5
    assert share.std() < 0.12  # 0.07 by chance: no sample has a side of its own


@pytest.mark.parametrize("padding", ["reflect", "zeros"])
def test_settings_of_a_sweep_that_change_nothing_run_and_are_told(padding):
    module, batch = Seer(), {"image": torch.zeros(8, 6, 6, 3), "mask": torch.zeros(8, 6, 6)}
    trick = BatchAugmentation(0, padding, flip=None, inputs="image", maps="mask")
    with pytest.warns(UserWarning, match=r"BatchAugmentation\(crop=0, flip=None\) changes nothing"):
        trainer(callbacks=[trick], max_epochs=1).fit(module, Batches(batch))
    assert module.seen[0]["image"] is batch["image"]
    assert module.seen[0]["mask"] is batch["mask"]


def test_a_random_flip_leaves_the_loaders_sampler_where_it_is():
    data = numbered(shuffle=True)
    sampler, samplers = data.batch_sampler.sampler, []
    module = Seer()
    module.on_train_batch_start = lambda *_: samplers.append(data.batch_sampler.sampler)
    trainer(callbacks=[BatchAugmentation()], max_epochs=1).fit(module, data)
    assert samplers == [sampler] * 3


def shuffled(count, batch_size, **options):
    return numbered(count, batch_size, shuffle=True, generator=torch.Generator().manual_seed(2), **options)


def of_epoch(count, batch_size):
    return numbered(count, batch_size, sampler=OrderOfEpoch(count))


def in_memory(count, batch_size):
    return InMemoryLoader(pictures(count), batch_size, shuffle=True)


@pytest.mark.parametrize("make", [shuffled, of_epoch, in_memory])
def test_an_alternating_flip_mirrors_each_sample_in_every_other_epoch(make):
    module = Seer()
    trainer(callbacks=[BatchAugmentation(crop=0, flip="alternating", seed=4)], max_epochs=5).fit(module, make(60, 16))
    found = flips(module, pictures(60)[0])
    first = coins(4, torch.arange(60))
    assert len(found) == 60
    for number, sides in found.items():
        assert sides == [(int(first[number]) + epoch) % 2 == 1 for epoch in range(5)]
    assert 15 < sum(sides[0] for sides in found.values()) < 45


def test_the_coin_is_the_samples_and_not_the_ranks():
    found = collections.defaultdict(dict)
    for rank in range(2):
        module = Seer()
        sampler = DistributedSampler(range(40), num_replicas=2, rank=rank)
        trick = BatchAugmentation(crop=0, flip="alternating", seed=4)
        trainer(callbacks=[trick], max_epochs=6).fit(module, numbered(40, 5, sampler=sampler))
        originals = pictures(40)[0]
        for step, (seen, numbers) in enumerate(module.seen):
            for image, number in zip(seen, numbers.tolist(), strict=True):
                found[number][step // 4] = rank, not torch.equal(image, originals[number])
    ranks = [{rank for rank, _ in epochs.values()} for epochs in found.values()]
    assert sum(len(both) == 2 for both in ranks) > 20
    for epochs in found.values():
        assert len({(epoch + flipped) % 2 for epoch, (_, flipped) in epochs.items()}) == 1
        assert len(epochs) == 6


@pytest.mark.parametrize("flip", ["random", "alternating"])
@pytest.mark.parametrize("kind", ["replay", "memory"])
@pytest.mark.parametrize(("stop", "epoch_end"), [(1, False), (3, False), (4, False), (4, True), (6, False)])
def test_a_resumed_run_without_a_seed_sees_the_same_images(stop, epoch_end, kind, flip):
    def data():
        return ReplayLoader() if kind == "replay" else InMemoryLoader(images(32), 8, shuffle=True, seed=8)

    def trick():
        return [BatchAugmentation(crop=2, flip=flip)]

    whole, parted = Seer(), Seer()
    torch.manual_seed(7)
    trainer(callbacks=trick()).fit(whole, data())
    torch.manual_seed(7)
    fit_interrupted(parted, data(), stop, trick(), epoch_end)
    torch.manual_seed(99)  # the resumed process has another seed; the checkpoint knows the first
    resume(parted, data(), trick())
    assert len(whole.seen) == len(parted.seen) == 12
    for one, other in zip(whole.seen, parted.seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_type_and_memory_format_stay_and_the_datasets_memory_is_not_written(dtype, memory_format):
    originals = pictures(8, dtype)[0].contiguous(memory_format=memory_format)
    before, module = originals.clone(), Seer()
    for options in ({"crop": 2}, {"crop": 0}, {"crop": 2, "flip": None}, {"crop": 2, "padding": "zeros"}):
        trainer(callbacks=[BatchAugmentation(seed=1, **options)], max_epochs=1).fit(module, Batches((originals,)))
        (seen,) = module.seen[-1]
        assert seen.dtype == dtype
        assert seen.is_contiguous(memory_format=memory_format)
        assert not torch.equal(seen, originals)
        assert torch.equal(originals, before)


@dataclass
class Scene:
    image: torch.Tensor
    mask: torch.Tensor
    edges: torch.Tensor


@pytest.mark.parametrize("padding", ["reflect", "zeros"])
def test_maps_move_with_their_images(padding):
    image, module = pictures(30)[0] + 1, Seer()
    scene = Scene(image, image[:, 0].long(), image[:, 1:].to(torch.uint8))
    trick = BatchAugmentation(2, padding, inputs="image", maps=["mask", "edges"], ignore_index=255, seed=3)
    trainer(callbacks=[trick], max_epochs=1).fit(module, Batches(scene))
    (seen,) = module.seen
    assert seen.mask.dtype == torch.int64
    assert seen.edges.dtype == torch.uint8
    inside = seen.image != 0
    assert torch.equal(seen.mask[inside[:, 0]], seen.image[:, 0].long()[inside[:, 0]])
    assert torch.equal(seen.edges[inside[:, 1:]], seen.image[:, 1:].to(torch.uint8)[inside[:, 1:]])
    assert (seen.mask[~inside[:, 0]] == 255).all()
    assert (seen.edges[~inside[:, 1:]] == 255).all()
    assert inside.all() == (padding == "reflect")
    assert torch.equal(scene.image, image)


def test_places_may_be_paths_into_a_nested_batch():
    module, image = Seer(), pictures(8)[0]
    batch = {"views": [image], "targets": {"mask": image[:, 0].long()}}
    trick = BatchAugmentation(2, inputs=("views", 0), maps=("targets", "mask"), seed=3)
    trainer(callbacks=[trick], max_epochs=1).fit(module, Batches(batch))
    seen = module.seen[0]
    assert torch.equal(seen["views"][0][:, 0].long(), seen["targets"]["mask"])
    assert not torch.equal(seen["views"][0], image)
    assert batch["views"][0] is image


def cut_by_hand(images, generator, crop, fill=None):
    """Crops and flips of a view as numpy makes them, from the draws of a generator: first all places, then all sides."""
    dims = images.ndim - 2
    places = torch.randint(2 * crop + 1, (dims, len(images)), generator=generator).T.tolist()
    sides = (torch.rand(len(images), generator=generator) < 0.5).tolist()
    around, results = [(0, 0)] + [(crop, crop)] * dims, []
    for image, place, mirrored in zip(images.numpy(), places, sides, strict=True):
        padded = np.pad(image, around, **({"mode": "reflect"} if fill is None else {"constant_values": fill}))
        cut = padded[:, *(slice(begin, begin + side) for begin, side in zip(place, image.shape[1:], strict=True))]
        results.append(cut[..., ::-1] if mirrored else cut)
    return torch.from_numpy(np.stack(results))


def draws_of_batch(number):
    return generator_for(3, 0, number, BatchOrder.AUGMENT)


def test_images_are_cut_and_mirrored_as_ever():
    module, parts = Seer(), pictures(24)[0].split(8)
    trainer(callbacks=[BatchAugmentation(2, seed=3)], max_epochs=1).fit(module, Batches(*((part,) for part in parts)))
    for number, (seen,) in enumerate(module.seen):
        assert torch.equal(seen, cut_by_hand(parts[number], draws_of_batch(number), 2))


@pytest.mark.parametrize(("padding", "fill"), [("reflect", None), ("zeros", 0)])
def test_views_get_crops_and_flips_of_their_own_one_after_the_other(padding, fill):
    module, (one, other) = Seer(), pictures(16)[0].split(8)
    batch = {"views": [one, other], "label": torch.arange(8)}
    trick = BatchAugmentation(2, padding, inputs=[("views", 0), ("views", 1)], seed=3)
    trainer(callbacks=[trick], max_epochs=1).fit(module, Batches(batch, batch))
    for number, seen in enumerate(module.seen):
        generator = draws_of_batch(number)
        for view, originals in zip(seen["views"], (one, other), strict=True):
            assert torch.equal(view, cut_by_hand(originals, generator, 2, fill))
    assert batch["views"][0] is one


def test_views_of_other_sizes_and_kinds_move_each_in_its_own_frame():
    module, flat, volumes = Seer(), pictures(8)[0], torch.randn(8, 1, 5, 9, 7, generator=generator_for(2))
    trick = BatchAugmentation(3, inputs=[0, 1], seed=3)
    trainer(callbacks=[trick], max_epochs=1).fit(module, Batches((flat, volumes)))
    generator = draws_of_batch(0)
    for view, originals in zip(module.seen[0], (flat, volumes), strict=True):
        assert torch.equal(view, cut_by_hand(originals, generator, 3))


def test_an_alternating_flip_throws_a_coin_for_each_view_and_shows_both_sides_of_it():
    module, originals = Seer(), pictures(60)[0]
    data = DataLoader(TensorDataset(originals, originals, torch.arange(60)), 16, shuffle=True)
    trick = BatchAugmentation(crop=0, flip="alternating", inputs=[0, 1], seed=4)
    trainer(callbacks=[trick], max_epochs=4).fit(module, data)
    sides = torch.zeros(2, 4, 60, dtype=torch.bool)
    for step, (*views, numbers) in enumerate(module.seen):
        for view, seen in enumerate(views):
            for image, number in zip(seen, numbers.tolist(), strict=True):
                sides[view, step // 4, number] = not torch.equal(image, originals[number])
    assert torch.equal(sides[0, 0], coins(4, torch.arange(60)) == 1)
    assert torch.equal(sides[:, 1:], ~sides[:, :-1])
    assert 15 < int((sides[0, 0] != sides[1, 0]).sum()) < 45


@pytest.mark.parametrize(("padding", "fill"), [("reflect", None), ("zeros", 0)])
@pytest.mark.parametrize("channels", [False, True])
def test_volumes_move_along_their_depth_too_and_so_do_their_maps(padding, fill, channels):
    module, volumes = Seer(), torch.randint(1, 200, (8, 2, 6, 5, 7), generator=generator_for(2)).float()
    mask = volumes[:, :1] if channels else volumes[:, 0]
    trick = BatchAugmentation(2, padding, maps=1, ignore_index=0, seed=3)
    trainer(callbacks=[trick], max_epochs=1).fit(module, Batches((volumes, mask)))
    seen, moved = module.seen[0]
    assert torch.equal(seen, cut_by_hand(volumes, draws_of_batch(0), 2, fill))
    assert torch.equal(moved if channels else moved[:, None], seen[:, :1])


def test_a_flip_alone_takes_volumes_of_few_slices():
    module, volumes = Seer(), torch.randn(8, 2, 3, 6, 7, generator=generator_for(2))
    trainer(callbacks=[BatchAugmentation(0, seed=3)], max_epochs=1).fit(module, Batches((volumes,)))
    assert torch.equal(module.seen[0][0], cut_by_hand(volumes, draws_of_batch(0), 0))


def test_one_map_needs_no_list_and_is_not_padded_with_a_crop_of_zero():
    module, image = Seer(), pictures(8)[0]
    trick = BatchAugmentation(0, "zeros", maps=1, seed=3)
    trainer(callbacks=[trick], max_epochs=1).fit(module, Batches((image, image.to(torch.uint8))))
    seen, mask = module.seen[0]
    assert torch.equal(seen.to(torch.uint8), mask)
    assert not torch.equal(seen, image)


@pytest.mark.parametrize(("strength", "reach"), [(1.0, 4), (0.5, 2), (0.1, 0)])
def test_strength_lowers_how_far_images_move(strength, reach):
    module, originals = Seer(), pictures(200)[0]
    trick = BatchAugmentation(crop=4, flip=None, padding="zeros", seed=0)
    trick.strength = strength
    trainer(callbacks=[trick], max_epochs=1).fit(module, Batches((originals + 1,)))
    seen = module.seen[0][0]
    empty = (seen == 0).all(1)
    rows, columns = empty.all(2).sum(1), empty.all(1).sum(1)
    assert int(rows.max()) == int(columns.max()) == reach


def test_validation_sees_the_images_as_they_are():
    module, data = Seer(), numbered()
    run = trainer(callbacks=[BatchAugmentation()], max_epochs=1, num_sanity_val_steps=2)
    run.fit(module, numbered(), data)
    run.validate(module, data, verbose=False)
    assert len(module.validated) == 2 + 3 + 3
    for start, batch in zip([0, 1, 0, 1, 2, 0, 1, 2], module.validated, strict=True):
        assert torch.equal(batch[0], pictures(24)[0][8 * start : 8 * start + 8])


class Normalised(Seer):
    """Bytes in, as the docs advise: the model makes numbers of them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.4, 0.5], [0.2, 0.3]))
        self.numbers = []

    def training_step(self, batch, batch_idx):
        self.numbers.append(self.first(batch[0]))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.first(batch[0]))


def test_bytes_are_normalised_by_the_model_alike_in_training_and_validation():
    module, originals = Normalised(), pictures(8, torch.uint8)[0]
    data = DataLoader(TensorDataset(originals), 8)
    trainer(callbacks=[BatchAugmentation(crop=0, seed=1)], max_epochs=1).fit(module, data, data)
    mean, std = (torch.tensor(values).view(2, 1, 1) for values in ([0.4, 0.5], [0.2, 0.3]))
    torch.testing.assert_close(module.validated[0], (originals / 255 - mean) / std)
    seen = module.seen[0][0]
    assert seen.dtype == torch.uint8
    torch.testing.assert_close(module.numbers[0], (seen / 255 - mean) / std)


def test_after_the_fit_the_loader_has_its_sampler_again():
    data = numbered(shuffle=True)
    sampler = data.batch_sampler.sampler
    trick = BatchAugmentation(flip="alternating")
    trainer(callbacks=[trick], max_epochs=1).fit(Seer(), data)
    assert data.batch_sampler.sampler is sampler
    module = Seer()
    module.on_train_batch_end = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer(callbacks=[trick], max_epochs=1).fit(module, data)
    assert data.batch_sampler.sampler is sampler


class Stream(IterableDataset):
    def __iter__(self):
        return zip(*pictures(8), strict=True)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (DataLoader(Stream(), 4), "this one is a DataLoader"),
        (Batches(pictures(8)), "this one is a Batches"),
        ([numbered(), numbered()], "there are several loaders"),
    ],
)
def test_an_alternating_flip_refuses_loaders_that_do_not_tell_the_samples(data, told):
    module = Seer()
    with pytest.raises(MisconfigurationException, match=rf'BatchAugmentation\(flip="alternating"\) needs.*{told}'):
        trainer(callbacks=[BatchAugmentation(flip="alternating")]).fit(module, data)
    assert not module.seen


def test_an_alternating_flip_refuses_more_images_than_samples():
    module = Seer()
    data = numbered(collate_fn=lambda samples: [torch.stack([image for image, _ in samples] * 2)])
    with pytest.raises(MisconfigurationException, match=r"a batch of 8 samples has 16 images\. Use `flip=\"random\"`"):
        trainer(callbacks=[BatchAugmentation(flip="alternating")]).fit(module, data)
    assert not module.seen


class ByName(TensorDataset):
    def __getitem__(self, name):
        return super().__getitem__(int(name))


def test_an_alternating_flip_refuses_samples_without_numbers():
    module, data = Seer(), DataLoader(ByName(*pictures(8)), 4, sampler=[str(number) for number in range(8)])
    with pytest.raises(MisconfigurationException, match="needs a sampler of whole numbers"):
        trainer(callbacks=[BatchAugmentation(flip="alternating")]).fit(module, data)
    assert not module.seen


@pytest.mark.parametrize(
    ("options", "batch", "told"),
    [
        ({"inputs": "x"}, pictures(8), r"inputs='x'\) found no part 'x' in a batch of type"),
        (
            {"inputs": 1},
            (pictures(8)[0], ["a"] * 8),
            r"inputs=1\) expected a tensor with a batch dimension, but found list",
        ),
        ({"inputs": 1}, pictures(8), r"expected images \(N, C, H, W\) .*, but found the shape \(8,\)"),
        (
            {"crop": SIDE},
            pictures(8),
            r"crop=6\) expected images .* above 6 pixels, but found the shape \(8, 2, 6, 6\)",
        ),
        ({"crop": 3}, (torch.zeros(8, 6, 6, 3),), "put the channels second"),
        ({"crop": 1}, (torch.zeros(8, 16, 3, 6, 6),), r"volumes \(N, C, D, H, W\), of 5 slices or more"),
        ({"crop": 1}, (torch.zeros(8, 2, 2, 6, 6, 6),), r"found the shape \(8, 2, 2, 6, 6, 6\)"),
        ({"inputs": [0, 1]}, pictures(8), r"inputs=1, crop=4\) expected images .*, but found the shape \(8,\)"),
        (
            {"crop": 1, "maps": 1},
            (torch.zeros(8, 1, 5, 6, 6), torch.zeros(8, 6, 6)),
            r"expected a map \(N, D, H, W\) or \(N, C, D, H, W\) as large as the images \(8, 1, 5, 6, 6\)",
        ),
        ({"maps": 1}, pictures(8), r"maps=1\) expected a map .* as large as the images \(8, 2, 6, 6\)"),
        ({"maps": 2}, pictures(8), r"maps=2\) found no part 2"),
        ({"maps": 1}, (pictures(8)[0], torch.zeros(4, SIDE, SIDE)), r"found the shape \(4, 6, 6\)"),
        ({"maps": 1}, (pictures(8)[0], torch.zeros(8, SIDE, 5)), r"found the shape \(8, 6, 5\)"),
        (
            {"maps": 1, "padding": "zeros"},
            (pictures(8)[0], torch.zeros(8, SIDE, SIDE, dtype=torch.uint8)),
            r"ignore_index=-100\) pads maps with a value that torch.uint8 at maps=1 cannot hold",
        ),
        (
            {"maps": 1, "padding": "zeros"},
            (pictures(8)[0], torch.zeros(8, SIDE, SIDE) > 0),
            "torch.bool at maps=1 cannot hold",
        ),
    ],
)
def test_batches_it_cannot_change_are_refused_by_name_before_the_first_step(options, batch, told):
    module = Seer()
    with pytest.raises(MisconfigurationException, match=told):
        trainer(callbacks=[BatchAugmentation(**options)]).fit(module, Batches(batch))
    assert not module.seen


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"crop": -1}, "`crop` to be a whole number of 0 or more, but got -1"),
        ({"crop": 0.5}, "`crop`"),
        ({"padding": "edge"}, "`padding` to be 'reflect' or 'zeros', but got 'edge'"),
        ({"flip": True}, "`flip` to be 'random' or 'alternating', or None, but got True"),
        ({"seed": 1.5}, "`seed`"),
        ({"ignore_index": 0.5}, "`ignore_index`"),
        ({"inputs": None}, "`inputs` to be an index, a key, an attribute name or a path .*, but got None"),
        ({"maps": [None]}, "`maps` to be an index"),
        ({"maps": 0.5}, "`maps` to be an index"),
        ({"inputs": ("image",), "maps": "image"}, "different places"),
        ({"maps": [1, 0]}, r"`inputs` and `maps` to be different places in the batch, but got 0 and \[1, 0\]"),
        ({"maps": ["mask", "mask"]}, "different places"),
        ({"inputs": [0, 0]}, "different places"),
        ({"inputs": []}, "`inputs` to name at least one place"),
        ({"inputs": [0, 1], "maps": 2}, r"`inputs` to be one place beside `maps`, .* but got \[0, 1\]"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        BatchAugmentation(**arguments)


def test_a_small_loader_trains_beside_it():
    run = trainer(callbacks=[BatchAugmentation(crop=2, flip="alternating")], max_epochs=2)
    module = Seer()
    run.fit(module, loader())
    assert len(module.seen) == 8
