import numpy as np
import pytest
import torch
from PIL import Image

from lightning_speedups.measure.errors import CompareError
from lightning_speedups.measure.loading import load_data

RNG = np.random.default_rng(0)


def arrays(**changes):
    good = {
        "x_train": RNG.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": RNG.integers(0, 256, (6, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def test_npz_becomes_channels_first(tmp_path):
    content = arrays()
    np.savez(tmp_path / "a.npz", **content)
    data = load_data(tmp_path / "a.npz")
    assert data.x_train.shape == (12, 3, 6, 5)
    assert data.x_train[4, 2, 5, 1] == content["x_train"][4, 5, 1, 2]
    assert torch.equal(data.y_test, torch.arange(6) % 3)
    assert data.y_test.dtype == torch.int64
    assert (data.num_classes, data.name) == (3, "a.npz")


def test_damage_anywhere_in_the_file_is_one_clear_error(tmp_path):
    np.savez_compressed(tmp_path / "good.npz", **arrays())
    good, told = (tmp_path / "good.npz").read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(good)
        for place in RNG.integers(0, len(good), 3):
            damaged[place] = RNG.integers(0, 256)
        (tmp_path / "bad.npz").write_bytes(damaged)
        try:
            load_data(tmp_path / "bad.npz")
        except CompareError:
            told += 1
    assert told > 50


def test_a_path_that_is_too_long_is_one_clear_error():
    with pytest.raises(CompareError, match=r"can't read aaa.* File name too long"):
        load_data("a" * 5000)


def test_grey_npz_without_a_channel_axis(tmp_path):
    np.savez(
        tmp_path / "a.npz",
        **arrays(x_train=np.zeros((12, 6, 5), np.uint8), x_test=np.ones((6, 6, 5), np.uint8)),
        classes=np.array(["a", "b", "c"]),
    )
    data = load_data(tmp_path / "a.npz")
    assert data.x_train.shape == (12, 1, 6, 5)
    assert data.x_test.float().mean() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "can't read .*y_test is not a file"),
        ({"x_train": None, "y_train": None}, "can't read .*x_train is not a file"),
        ({"x_train": np.zeros((12, 6, 5, 3))}, "x_train must be uint8 .*, got float64"),
        ({"x_test": np.zeros((6, 6, 5, 4), np.uint8)}, r"x_test must be uint8 of shape \(N, H, W\)"),
        ({"x_test": np.zeros((6, 30), np.uint8)}, r"x_test must be uint8 of shape \(N, H, W\)"),
        (
            {"x_test": np.zeros((0, 6, 5, 3), np.uint8), "y_test": np.zeros(0, int)},
            r"x_test must be uint8 of shape \(N, H, W\)",
        ),
        ({"y_train": np.zeros(12)}, "y_train must be integers"),
        ({"y_train": np.zeros((12, 1), int)}, "y_train must be integers"),
        ({"y_train": np.arange(11)}, "12 images but y_train has 11 labels"),
        (
            {"y_train": np.full(12, 2**63, np.uint64)},
            "labels must be class indices from 0, y_train has 9223372036854775808",
        ),
        ({"y_train": np.arange(12) % 3 - 1}, "labels must be class indices from 0, y_train has -1"),
        ({"x_test": np.zeros((6, 7, 5, 3), np.uint8)}, "differ in shape"),
        ({"y_test": np.array([0, 1, 2, 0, 1, 9])}, "y_test has label 9, which y_train lacks"),
        ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "one class only"),
        ({"y_train": np.array([10**9] + [0, 1, 2] * 3 + [0, 1])}, "must be class indices"),
        ({"y_test": np.array([None] * 6)}, "can't read"),
    ],
)
def test_npz_errors_name_the_array(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **arrays(**changes))
    with pytest.raises(CompareError, match=message) as caught:
        load_data(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)


def test_damaged_and_foreign_files(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("hello\nworld")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "array.npy", np.zeros(3))
    flipped = bytearray(whole)
    flipped[200] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    for name in ("cut.npz", "text.npz", "empty.npz", "array.npy", "flipped.npz"):
        with pytest.raises(CompareError, match=f"can't read .*{name} as an .npz file") as caught:
            load_data(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(CompareError, match=r"can't read .* no such file"):
        load_data(tmp_path / "nowhere.npz")


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for label, kind in enumerate(("cat", "dog")):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20 + i, 12), (200 * label, i, 7)).save(tmp_path / split / kind / f"{i}.png")
    return tmp_path


def test_folder_is_resized_and_labelled(folder):
    data = load_data(folder)
    assert data.x_train.shape == (8, 3, 12, 12)  # the median short side
    assert data.x_test.shape == (4, 3, 12, 12)
    assert torch.equal(data.x_train[:, 0, 5, 5], (200 * data.y_train).to(torch.uint8))
    assert torch.equal(data.x_test[:, 0, 5, 5], (200 * data.y_test).to(torch.uint8))
    assert load_data(folder, image_size=9).x_train.shape == (8, 3, 9, 9)
    assert load_data(folder, samples=3).x_train.shape == (3, 3, 12, 12)


def test_test_folder_may_lack_a_class_but_not_add_one(folder):
    (folder / "train" / "ant").mkdir()
    Image.new("RGB", (20, 12), (100, 0, 0)).save(folder / "train" / "ant" / "0.png")
    data = load_data(folder)  # test/ numbers its two classes 0 and 1, train/ three: cat is 1, dog is 2
    assert data.num_classes == 3
    assert data.y_test.tolist() == [1, 1, 2, 2]
    (folder / "test" / "eel").mkdir()
    Image.new("RGB", (20, 12)).save(folder / "test" / "eel" / "0.png")
    with pytest.raises(CompareError, match="test/ has the class 'eel'"):
        load_data(folder)


def test_folder_errors(folder, tmp_path_factory):
    bare = tmp_path_factory.mktemp("bare")
    with pytest.raises(CompareError, match="must hold train/CLASS"):
        load_data(bare)
    (bare / "train").mkdir()
    with pytest.raises(CompareError, match="must hold train/CLASS"):
        load_data(bare)
    (bare / "train" / "cat").mkdir()
    with pytest.raises(CompareError, match="must hold train/CLASS"):
        load_data(bare)
    (folder / "train" / "dog" / "0.png").write_bytes(b"not an image")
    with pytest.raises(CompareError, match=r"can't read the image .*0\.png"):
        load_data(folder)


def test_a_truncated_picture_is_named(folder):
    picture = folder / "test" / "dog" / "1.png"
    picture.write_bytes(picture.read_bytes()[:50])
    with pytest.raises(CompareError, match=r"can't read the image .*1\.png"):
        load_data(folder)


@pytest.fixture
def photos(tmp_path):
    """A folder as it should be."""
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "photos" / place).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "photos" / place / "0.png")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("photos/train", r"has no train/ and no test/, but a/; b/; did you mean .*photos\?$"),
        ("photos/train/a", r"has no train/ and no test/, but 0.png; did you mean .*photos\?$"),
        ("photos/test/b/0.png", "it is none; for images in files name the folder"),
        ("other", r"has no test/, but train/; val/$"),
        ("bare", r"has no train/ and no test/, but nothing$"),
        ("nowhere", "there is no such file or folder"),
        ("nowhere.npz", "there is no such file or folder"),
        ("table.csv", "it is none; for images in files name the folder"),
    ],
)
def test_a_wrong_path_is_told_with_what_is_there(place, message, photos, monkeypatch):
    root = photos.parent
    for folder in ("other/train/a", "other/val/a", "bare"):
        (root / folder).mkdir(parents=True)
    (root / "table.csv").write_text("a,b")
    monkeypatch.chdir(root)
    for path in (place, root / place):
        with pytest.raises(CompareError, match=message) as caught:
            load_data(path)
        assert "Errno" not in str(caught.value)
    assert load_data("photos").num_classes == 2
