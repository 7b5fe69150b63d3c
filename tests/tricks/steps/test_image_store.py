"""One run makes the file, all others find it, whatever happens to them; its images train as decoded ones do."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as V

from lightning_speedups import ImageStore, InMemory, InMemoryLoader, RandomResizedCrops
from lightning_speedups.tensors.feature_store import evenly_spaced
from lightning_speedups.tricks.steps.image_store import PhotoFile, Photos, files_of, header
from zoo import Seer, trainer

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
FORK = multiprocessing.get_context("fork")
FILE = "stores/photos.safetensors"


def EXAMPLE():
    ImageStore([*Drawn(4)], "photos.safetensors", size=6, max_gib=1.0, workers=0)
    return {"trainer": {}}  # it is the data of the tests in here


def picture(number, width=30, height=20):
    small = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


class Drawn(Dataset):
    """Pictures that are drawn when they are asked for; counts how often, in a file that processes share."""

    def __init__(self, count=40, at=None, act=lambda: None):
        self.count, self.at, self.act, self.made = count, at, act, Counter()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError
        self.made[index] += 1
        with open("made", "a") as notes:
            notes.write(".")
        if index == self.at:
            self.act()
        return picture(index), index % 5


def made():
    """How many pictures were drawn since the last look, by all processes."""
    path = Path("made")
    count = path.stat().st_size if path.exists() else 0
    path.unlink(missing_ok=True)
    return count


def folder(count=10, quality=90):
    """A folder of photos in two classes."""
    for number in range(count):
        path = Path("photos", "ab"[number % 2], f"{number}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, 30 + number, 24).save(path, quality=quality)
    return "photos"


def expected(source, size):
    photos = Photos(source, size)
    images, labels = zip(*(photos[one] for one in range(len(photos))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def assert_holds(store, source, size=(8, 8)):
    for ours, theirs in zip(store.tensors, expected(source, size), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def names():
    return sorted(path.name for path in Path("stores").iterdir())


PROBES = 16  # samples that tell a source


# ---- what it holds


def test_it_holds_the_decoded_images_and_labels_of_a_folder():
    store = ImageStore(folder(), FILE, (8, 12))
    source = ImageFolder("photos")
    assert_holds(store, source, (8, 12))
    assert store.classes == source.classes == ["a", "b"]
    assert len(store) == 10
    image, label = store[3]
    assert image.shape == (3, 8, 12)
    assert int(label) == source[3][1]
    found = load_file(FILE)
    assert torch.equal(found["images"].permute(0, 3, 1, 2), store.tensors[0])
    assert torch.equal(found["labels"], store.tensors[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_make_the_same_in_order(workers):
    store = ImageStore(Drawn(150), FILE, 8, workers=workers)
    assert_holds(store, Drawn(150))
    assert store.classes is None


def test_one_side_stands_for_both():
    assert ImageStore(folder(), FILE, 9).tensors[0].shape == (10, 3, 9, 9)


# ---- when it is made


def test_a_second_run_draws_some_samples_only():
    ImageStore(Drawn(), FILE, 8)
    assert made() == PROBES + 40
    for _ in range(2):
        assert_holds(ImageStore(Drawn(), FILE, 8), Drawn())
        assert made() == PROBES + 40
    assert names() == ["photos.safetensors", "photos.safetensors.lock"]
    assert Path(f"{FILE}.lock").stat().st_size == 0


def test_it_is_made_anew_when_source_or_size_change():
    folder()
    inode = None
    for quality, size in ((90, 8), (30, 8), (30, 9)):
        folder(quality=quality)
        store = ImageStore("photos", FILE, size)
        assert_holds(store, ImageFolder("photos"), (size, size))
        assert os.stat(FILE).st_ino != inode
        inode = os.stat(FILE).st_ino
        ImageStore("photos", FILE, size)
        assert os.stat(FILE).st_ino == inode
    os.remove("photos/a/0.jpg")
    assert_holds(ImageStore("photos", FILE, 8), ImageFolder("photos"))


def test_one_photo_that_changes_among_many_is_seen():
    ImageStore(folder(40), FILE, 8)
    assert 1 not in evenly_spaced(PROBES, 40)
    path, _ = ImageFolder("photos").samples[1]
    picture(99).save(path)
    assert_holds(ImageStore("photos", FILE, 8), ImageFolder("photos"))


def cut():
    os.truncate(FILE, os.stat(FILE).st_size // 2)


def zeros():
    size = os.stat(FILE).st_size
    os.truncate(FILE, 0)
    os.truncate(FILE, size)


def holes():
    with open(FILE, "rb+") as file:
        file.seek(-200, os.SEEK_END)
        file.write(bytes(200))


def other_label():
    with open(FILE, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(8 + length)
        file.write(bytes([3]))


@pytest.mark.parametrize("damage", [cut, zeros, holes, other_label, lambda: Path(FILE).write_text("{}")])
def test_a_damaged_file_is_made_anew(damage):
    before = ImageStore(Drawn(), FILE, 8).tensors[0].clone()
    damage()
    store = ImageStore(Drawn(), FILE, 8)
    assert_holds(store, Drawn())
    assert torch.equal(store.tensors[0], before)


def test_making_and_finding_it_leave_the_same_random_state():
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        ImageStore(Drawn(150), FILE, 8, workers=0)
        states.append(torch.get_rng_state().tolist())
    assert states[0] == states[1]


# ---- what may go wrong


def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_nothing_behind_and_an_old_file_as_it_is():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.posix_fallocate", no_room)
        with pytest.raises(OSError, match="No space left"):
            ImageStore(Drawn(), FILE, 8)
    assert names() == ["photos.safetensors.lock"]
    ImageStore(Drawn(), FILE, 8)
    before = Path(FILE).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": 100}))
        with pytest.raises(OSError, match="has 100 bytes left"):
            ImageStore(Drawn(), FILE, 9)
    assert Path(FILE).read_bytes() == before
    assert names() == ["photos.safetensors", "photos.safetensors.lock"]


def test_an_error_in_the_middle_leaves_nothing_behind():
    def fail():
        raise KeyError("a photo that cannot be read")

    with pytest.raises(KeyError, match="a photo that cannot be read"):
        ImageStore(Drawn(130, at=100, act=fail), FILE, 8)
    assert names() == ["photos.safetensors.lock"]
    assert_holds(ImageStore(Drawn(130), FILE, 8), Drawn(130))


def dies():
    ImageStore(Drawn(130, at=100, act=lambda: os.kill(os.getpid(), signal.SIGKILL)), FILE, 8)


def test_a_process_that_is_killed_in_the_middle_leaves_what_the_next_one_removes():
    child = FORK.Process(target=dies)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert names() == ["photos.safetensors.lock", "photos.safetensors.part"]
    assert_holds(ImageStore(Drawn(130), FILE, 8), Drawn(130))
    assert names() == ["photos.safetensors", "photos.safetensors.lock"]


def test_what_was_left_of_a_larger_file_is_no_part_of_the_next_one():
    Path("stores").mkdir()
    Path(f"{FILE}.part").write_bytes(bytes(10**5))
    store = ImageStore(Drawn(20), FILE, 8)
    assert torch.equal(load_file(FILE)["images"].permute(0, 3, 1, 2), store.tensors[0])


def build(barrier, results, number):
    barrier.wait()
    store = ImageStore(Drawn(100, at=50, act=lambda: time.sleep(0.2)), FILE, 8)
    results[number] = int(store.tensors[0].long().sum()) + int(store.tensors[1].sum())


def test_of_two_processes_that_ask_at_once_one_makes_it_for_both():
    barrier, results = FORK.Barrier(2), FORK.Array("q", 2)
    children = [FORK.Process(target=build, args=(barrier, results, number)) for number in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert made() == 2 * PROBES + 100
    images, labels = expected(Drawn(100), (8, 8))
    assert [*results] == [int(images.long().sum()) + int(labels.sum())] * 2
    assert names() == ["photos.safetensors", "photos.safetensors.lock"]


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        (lambda: [(torch.rand(3, 9, 9), 1)], {}, "pairs of a PIL image, without ToTensor .* but got Tensor and int"),
        (lambda: [(picture(1), 0.5)], {}, "and a whole number, its label, but got Image and float"),
        (lambda: [(picture(1), 1, 2)], {}, "`source` to give pairs .* but got tuple and NoneType"),
        (lambda: [picture(1)], {}, "`source` to give pairs .* but got Image and NoneType"),
        (lambda: [], {}, "`source` to hold images, but got none"),
        (lambda: Flipped(), {}, "`source` to give the same each time, but its samples are random"),
        (lambda: Drawn(), {"max_gib": 1e-6}, "`max_gib`=1e-06 GiB or less, but 40 images of 8 × 8 pixels need 7.69"),
        (lambda: Drawn(), {"size": 0}, "`size` to be a whole number of 1 or more, but got 0"),
        (lambda: Drawn(), {"size": (8, 8, 8)}, "`size` to be a whole number"),
        (lambda: Drawn(), {"size": 8.5}, "`size` to be a whole number"),
        (lambda: Drawn(), {"workers": -1}, "`workers` to be a whole number of 0 or more"),
        (lambda: Drawn(), {"max_gib": None}, "`max_gib` to be a number"),
    ],
)
def test_what_it_cannot_keep_is_refused_and_nothing_is_written(source, options, told):
    with pytest.raises(ValueError, match=told):
        ImageStore(**{"source": source(), "file": FILE, "size": 8, **options})
    assert not Path(FILE).exists()


class Flipped(Drawn):
    """Mirrors its pictures at random."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else image, label


# ---- how it is used


def test_loaders_hand_out_whole_batches_of_it():
    store = ImageStore(Drawn(), FILE, 8)
    for data in (DataLoader(store, 16), InMemoryLoader(store, 16), InMemoryLoader(store.tensors, 16)):
        images, labels = zip(*data, strict=True)
        assert torch.equal(torch.cat(images), expected(Drawn(), (8, 8))[0])
        assert torch.equal(torch.cat(labels), expected(Drawn(), (8, 8))[1])


def test_a_fit_takes_it_from_memory_as_it_is_mapped():
    store, module = ImageStore(Drawn(), FILE, 8), Seer()
    run = trainer(callbacks=[InMemory(max_gib=0), RandomResizedCrops(6, seed=1)], max_epochs=1)
    run.fit(module, DataLoader(store, 16, shuffle=True))
    assert run.train_dataloader.dataset.tensors[0] is store.tensors[0]
    assert [tuple(images.shape) for images, _ in module.seen] == [(16, 3, 6, 6), (16, 3, 6, 6), (8, 3, 6, 6)]
    assert all(images.dtype == torch.uint8 for images, _ in module.seen)
    assert sorted(torch.cat([labels for _, labels in module.seen]).tolist()) == sorted(store.tensors[1].tolist())


def test_it_pickles_without_its_images():
    store = ImageStore(folder(), FILE, 64)
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    twin = pickle.loads(pickled)
    assert_holds(twin, ImageFolder("photos"), (64, 64))
    assert twin.classes == store.classes


def test_it_is_found_from_another_folder(monkeypatch):
    store = ImageStore(os.path.abspath(folder()), FILE, 8)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert torch.equal(pickle.loads(pickle.dumps(store)).tensors[0], store.tensors[0])
    assert not list(Path().iterdir())


# ---- its parts


@pytest.mark.parametrize(
    ("width", "height", "size", "box"),
    [
        (60, 40, (20, 20), (10, 0, 50, 40)),
        (40, 60, (20, 20), (0, 10, 40, 50)),
        (60, 40, (40, 60), (0, 0, 60, 40)),
        (60, 40, (8, 24), (0, 10, 60, 30)),
        (10, 10, (20, 20), (0, 0, 10, 10)),
        (61, 40, (20, 20), (10.5, 0, 50.5, 40)),
    ],
)
def test_an_image_is_the_middle_of_the_picture_in_its_size(width, height, size, box):
    image = picture(1, width, height)
    other = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box))
    ours, label = Photos([(image, np.int64(7))], size)[0]
    assert (ours.dtype, label, type(label)) == (torch.uint8, 7, int)
    assert ours.is_contiguous()
    assert torch.equal(ours, torch.tensor(other).permute(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64)])
def test_it_is_about_what_torchvision_resizes_and_crops(width, height):
    image = picture(1, width, height)
    theirs = V.center_crop(V.resize(V.pil_to_tensor(image), [24], antialias=True), [24, 24])
    ours, _ = Photos([(image, 0)], (24, 24))[0]
    assert (ours.int() - theirs.int()).abs().float().mean() < 3


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA"])
def test_every_mode_becomes_red_green_and_blue(mode):
    image = picture(1, 20, 20).convert(mode)
    expected = torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(Photos([(image, 0)], (20, 20))[0][0], expected)


def change_time():
    stat = os.stat("photos/b/1.jpg")
    os.utime("photos/b/1.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


@pytest.mark.parametrize(
    "change",
    [
        change_time,
        lambda: picture(99).save("photos/b/1.jpg", quality=70),
        lambda: os.remove("photos/b/1.jpg"),
        lambda: os.rename("photos/b/1.jpg", "photos/b/9.jpg"),
        lambda: os.rename("photos/b/1.jpg", "photos/a/1.jpg"),
        lambda: picture(9).save("photos/b/7.jpg"),
    ],
)
def test_any_change_of_a_folder_shows_and_its_place_does_not(change):
    first = files_of(ImageFolder(folder(6)))
    os.rename("photos", "moved")
    assert files_of(ImageFolder("moved")) == first
    os.rename("moved", "photos")
    change()
    assert files_of(ImageFolder("photos")) != first
    assert files_of([1, 2]) == []


def kept(photos=None):
    return PhotoFile(Path("photos.safetensors").absolute(), photos or Photos([*Drawn(20)], (5, 7)))


def written():
    one = kept()
    one.write(DataLoader(Photos([*Drawn(20)], (5, 7)), 8))
    return one


def test_it_is_a_file_that_safetensors_reads():
    one = written()
    images, labels = expected([*Drawn(20)], (5, 7))
    found = load_file(one.path)
    assert found.keys() == {"labels", "images"}
    assert torch.equal(found["images"].permute(0, 3, 1, 2), images)
    assert torch.equal(found["labels"], labels)
    with safe_open(one.path, "pt") as opened:
        assert len(opened.metadata()["source"]) == 64
    assert one.path.stat().st_size == one.bytes
    for count in range(1, 40):
        assert len(header((count, 3, 5, 7), "here")) % 64 == 0


def test_what_is_written_into_what_was_read_stays_in_this_process():
    one = written()
    one.parts(one.path)[2].zero_()
    assert one.is_whole()


def test_another_number_of_photos_or_another_size_is_another_file():
    assert not kept().is_whole()
    assert written().is_whole()
    assert kept().is_whole()
    assert not kept(Photos([*Drawn(19)], (5, 7))).is_whole()
    assert not kept(Photos([*Drawn(20)], (7, 5))).is_whole()


@pytest.mark.parametrize("place", [0, 5, 40, -1])
def test_a_byte_that_differs_in_head_or_photos_is_found(place):
    one = written()
    with one.path.open("rb+") as opened:
        opened.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        (byte,) = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))
    assert not one.is_whole()


def test_who_has_the_old_file_open_keeps_what_it_was():
    old = ImageStore(Drawn(20), FILE, 8)
    ImageStore(Drawn(20), FILE, 9)
    assert_holds(old, Drawn(20))


def test_a_system_without_fallocate(monkeypatch):
    monkeypatch.delattr("os.posix_fallocate", raising=False)
    assert written().is_whole()
