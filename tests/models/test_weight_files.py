import argparse
import io
import pickle
import re
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_speedups import TransferClassifier, load_weights
from lightning_speedups.models.weight_files import UNNEEDED, _skipping_unneeded, read_weights
from zoo import assert_same_weights, weights

SMALL = "test_resnet"


def small(classes=4, **options):
    torch.manual_seed(classes)
    return TransferClassifier(SMALL, classes, **({"weights": None} | options))


def saved(state, name="w.pt"):
    torch.save(state, name)
    return name


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_what_was_read_does_not_hang_on_the_file(kind):
    """Else a program that saves to the path that it loaded from dies, with SIGBUS, where it next looks at a tensor."""
    state, path = small(4).model.state_dict(), Path("w")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    read = read_weights(path)
    size = path.stat().st_size
    with path.open("r+b") as file:  # in place: a shorter file would end this process
        file.write(bytes(size))
    assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ("resnet18", "resnet34", "of another model: .* tensors stand among those that fit"),
        ("resnet34", "resnet18", "Not all of the backbone is in these weights"),
    ],
)
def test_a_deeper_and_a_shallower_sister_are_refused(ours, theirs, message):
    path = "w.safetensors"
    save_file(timm.create_model(theirs).state_dict(), path)
    with pytest.raises(ValueError, match=message):
        TransferClassifier(ours, 4, weights=path)


def test_load_weights_reports_and_keeps_type_and_training_mode():
    path = saved(small(7).model.half().state_dict())
    module = small(4).model.double().eval()
    report = load_weights(module, path)
    assert report.fresh == ("fc.weight", "fc.bias")
    assert (report.source, report.missing, report.unexpected) == (path, (), ())
    assert {value.dtype for value in module.parameters()} == {torch.float64}
    assert not module.training


def test_load_weights_takes_any_module_and_finds_or_is_told_the_head():
    old, new = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)) for classes in (10, 3))
    assert load_weights(new, saved(old.state_dict())).fresh == ("2.weight", "2.bias")
    assert torch.equal(new[0].weight, old[0].weight)
    old, new = (nn.ModuleDict({"head": nn.Linear(8, classes), "stem": nn.Linear(4, 8)}) for classes in (10, 3))
    with pytest.raises(ValueError, match=r"Not all of the backbone|another model"):
        load_weights(new, saved(old.state_dict()))
    assert load_weights(new, saved(old.state_dict()), head="head").fresh == ("head.weight", "head.bias")
    with pytest.raises(ValueError, match=r"`head`.*no 'hat'. It has \['head', 'stem'\]"):
        load_weights(new, saved(old.state_dict()), head="hat")


def test_weights_of_another_network_are_refused_and_the_module_is_unchanged():
    path = saved(timm.create_model("test_efficientnet").state_dict())
    module = small(4)
    before = weights(module)
    with pytest.raises(ValueError, match="of another model: 0 of"):
        load_weights(module, path)
    state = small(7).model.state_dict()
    del state["layer1.0.conv1.weight"]
    with pytest.raises(ValueError, match=r"(?s)strict=False.*missing in the file \(1\): model.layer1.0.conv1.weight"):
        load_weights(module, saved(state))
    assert_same_weights(before, weights(module))
    report = load_weights(module, saved(state), strict=False)
    assert report.missing == ("model.layer1.0.conv1.weight",)
    with pytest.raises(ValueError, match="missing in the file"):
        small(4, weights=saved(state))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_input_channels_are_adapted_as_timm_does(channels):
    source = timm.create_model(SMALL)
    path = saved(source.state_dict())
    module = small(4, weights=path, in_chans=channels)
    oracle = timm.create_model(
        SMALL, pretrained=True, pretrained_cfg_overlay={"file": path}, num_classes=4, in_chans=channels
    )
    torch.testing.assert_close(module.model.conv1[0].weight, oracle.conv1[0].weight)
    assert load_weights(module, path).wrong == ()  # inside a LightningModule, too


def test_position_embeddings_are_resized_as_timm_does():
    path = saved({"model": timm.create_model("test_vit").state_dict()})
    module = TransferClassifier("test_vit", 4, weights=path, model_options={"img_size": 48})
    oracle = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay={"file": path}, num_classes=4, img_size=48
    )
    torch.testing.assert_close(module.model.pos_embed, oracle.pos_embed)


def test_names_of_the_original_files_are_translated_as_timm_does():
    source = timm.create_model("test_vit").state_dict()
    original = {f"vision_encoder.{name}": value for name, value in source.items()}
    module = TransferClassifier("test_vit", 4, weights=saved(original))
    assert torch.equal(module.model.pos_embed, source["pos_embed"])


# --- files that are no weights, or more than weights --------------------------------------------------------------------


class Evil:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self):
        return (exec, ("open('ran', 'w').close()",))


def evil_zip(path):
    torch.save({"state_dict": small().model.state_dict(), "hyper_parameters": {"x": Evil()}}, path)


def evil_legacy(path):
    torch.save({"w": torch.zeros(1), "x": Evil()}, path, _use_new_zipfile_serialization=False)


def evil_plain(path):
    Path(path).write_bytes(pickle.dumps(Evil()))


def evil_tensor(path):
    class Tricked(dict):
        def __reduce__(self):
            return (eval, ("open('ran', 'w').close() or {}",))

    torch.save(Tricked(w=torch.zeros(1)), path)


@pytest.mark.parametrize("name", ["m.pt", "m.ckpt", "m.bin", "m.pth.tar", "m.safetensors"])
@pytest.mark.parametrize("write", [evil_zip, evil_legacy, evil_plain, evil_tensor])
def test_no_code_of_a_weight_file_runs(name, write):
    write(name)
    module = small()
    before = weights(module)
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        load_weights(module, name)
    assert not Path("ran").exists()
    if not name.endswith("safetensors"):
        text = str(caught.value)
        assert "is refused" in text
        assert "Nothing in it has been run" in text
        assert "safetensors" in text
        assert "add_safe_globals" in text
        assert write is evil_plain or "exec" in text or "eval" in text
    assert_same_weights(before, weights(module))
    if write is evil_plain:
        pickle.loads(Path(name).read_bytes())
    else:
        torch.load(Path(name).rename("trusted.pt"), weights_only=False)
    assert Path("ran").exists()  # it would have


class Settings:
    """A class of the user's."""


def test_what_the_user_allows_is_read_and_a_namespace_needs_no_leave():
    state = small(7).model.state_dict()
    path = saved({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, "n.pth.tar")
    assert read_weights(path).keys() == state.keys()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    path = saved({"state_dict": state, "config": Settings()}, "s.pt")
    with pytest.raises(ValueError, match=r"would run code of .*Settings"):
        read_weights(path)
    with torch.serialization.safe_globals([Settings]):
        assert read_weights(path).keys() == state.keys()
    own = [np.dtype, np.dtypes.Float64DType, np.float64(1).__reduce__()[0]]
    path = saved({"state_dict": state, "best": np.float64(0.5)}, "n.pt")
    for allowed in ([], own):
        with torch.serialization.safe_globals(allowed):
            assert read_weights(path).keys() == state.keys()
            assert set(torch.serialization.get_safe_globals()) >= set(allowed)
            with _skipping_unneeded():
                names = {each[1] for each in torch.serialization.get_safe_globals() if isinstance(each, tuple)}
            assert any(name.startswith("numpy") for name in names) != bool(allowed)  # one of them, not a mixture
            assert "pathlib.PosixPath" in names


def test_paths_and_numpys_values_beside_the_weights_are_skipped_and_never_made():
    state = small(7).model.state_dict()
    beside = [
        Path("a/b"),
        PureWindowsPath("c:/d"),
        np.float32(1.5),
        np.bool_(True),
        np.int64(3),
        np.zeros(3),
        np.dtype("f8"),
    ]
    content = {"state_dict": state, "hyper_parameters": {"values": beside}, "callbacks": {"best": np.float64(0.5)}}
    for i, legacy in enumerate((False, True)):
        torch.save(content, f"{i}.ckpt", _use_new_zipfile_serialization=not legacy)
        assert read_weights(f"{i}.ckpt").keys() == state.keys()
    path = saved(content | {"config": Settings()}, "s.ckpt")
    with pytest.raises(ValueError, match=r"would run code of [\w.]*Settings\. Nothing"):  # and of nothing else
        read_weights(path)


def test_on_older_pythons_and_numpys_the_names_of_the_same_things_are_known():
    def pickled(module, name):
        return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")R."

    for module, name in (
        ("pathlib", "PosixPath"), ("pathlib._local", "WindowsPath"), ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"), ("argparse", "Namespace"),
    ):  # fmt: skip
        with torch.serialization.safe_globals(UNNEEDED):
            value = torch._weights_only_unpickler.load(io.BytesIO(pickled(module, name)))
        assert type(value).__name__ == "_Unneeded"


def test_old_files_without_zip_and_safetensors_of_any_name_are_read():
    state = small(7).model.state_dict()
    torch.save(state, "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, "model.bin")
    for path in ("old.pt", Path("model.bin")):
        read = read_weights(path)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], state[name]) for name in state)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no file gone\.pt"):
        small(weights="gone.pt")


def broken(kind):
    path = Path(f"{kind}.pt")
    if kind == "folder":
        path.mkdir()
    elif kind == "cut":
        torch.save(small().model.state_dict(), path)
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "number":
        torch.save(3, path)
    elif kind == "npz":
        np.savez("npz", a=np.zeros(2))
        Path("npz.npz").rename(path)
    elif kind == "script":
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    elif kind == "cut_safetensors":
        path = Path("cut.safetensors")
        save_file({"w": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:-50])
    else:
        path.write_bytes({"empty": b"", "text": b"hello, world\n", "noise": bytes(range(256)) * 9}[kind])
    return path


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("folder", "is a folder"),
        ("empty", "it is empty"),
        ("text", "Expected safetensors|is refused"),
        ("noise", "Expected safetensors|is refused"),
        ("cut", "Expected safetensors"),
        ("cut_safetensors", "Expected safetensors"),
        ("module", "is refused.*Linear"),
        ("number", "holds a int, not a dict"),
        ("npz", "Expected safetensors"),
        ("script", "Expected safetensors"),
    ],
)
def test_what_is_no_weight_file_is_refused_by_name(kind, message):
    path = broken(kind)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(small(), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
