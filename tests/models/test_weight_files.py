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
from torch.nn.utils import parametrizations

from lightning_speedups import TransferClassifier, load_weights
from lightning_speedups.models.weight_files import UNNEEDED, _skipping_unneeded, read_states
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
    (read,) = read_states(path).values()
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
    assert read_states(path)["state_dict."].keys() == state.keys()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    path = saved({"state_dict": state, "config": Settings()}, "s.pt")
    with pytest.raises(ValueError, match=r"would run code of .*Settings"):
        read_states(path)
    with torch.serialization.safe_globals([Settings]):
        assert read_states(path)["state_dict."].keys() == state.keys()
    own = [np.dtype, np.dtypes.Float64DType, np.float64(1).__reduce__()[0]]
    path = saved({"state_dict": state, "best": np.float64(0.5)}, "n.pt")
    for allowed in ([], own):
        with torch.serialization.safe_globals(allowed):
            assert read_states(path)["state_dict."].keys() == state.keys()
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
        assert read_states(f"{i}.ckpt")["state_dict."].keys() == state.keys()
    path = saved(content | {"config": Settings()}, "s.ckpt")
    with pytest.raises(ValueError, match=r"would run code of [\w.]*Settings\. Nothing"):  # and of nothing else
        read_states(path)


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
        (read,) = read_states(path).values()
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 19\n", "pointer of Git LFS.*git lfs pull"),
        (b"\n <!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b'{\n  "architectures": ["Bert"]\n}', "it is JSON"),
        (b"hello, world\n", "it is a text"),
        (b'{"weight_map": {"a": "a-00001-of-00002.bin"}}', "index of weights in parts.*save them as one"),
        (b"\x89HDF\r\n\x1a\n" + bytes(30), "it is no such file|Expected safetensors"),
        (bytes(range(256)) * 9, "it is no such file"),
    ],
)
@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.safetensors"])
def test_what_people_take_for_weights_is_called_by_its_name(content, message, name):
    Path(name).write_bytes(content)
    if content[0] == 0 and name.endswith("safetensors"):
        message = "Expected safetensors"
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(nn.Linear(2, 2), name)
    assert "pickle" not in str(caught.value)
    assert "run code" not in str(caught.value)


# --- several sets of weights in a file ----------------------------------------------------------------------------------


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def flat(**modules):
    return {f"{prefix}.{name}": value for prefix, one in modules.items() for name, value in one.state_dict().items()}


MODEL, OTHER = net(1), net(2)
M, OTHERS = MODEL.state_dict(), OTHER.state_dict()
OPTIMIZER = torch.optim.Adam(MODEL.parameters()).state_dict()
SETS = {  # what is in the file, which set is taken, from where, and what is told of as well
    "ema": ({"model": M, "ema": OTHERS, "optimizer": OPTIMIZER}, OTHER, "ema", ("model",)),
    "ema_state_dict": ({"state_dict": M, "ema_state_dict": OTHERS}, OTHER, "ema_state_dict", ("state_dict",)),
    "state_dict_ema": ({"state_dict": M, "state_dict_ema": OTHERS}, OTHER, "state_dict_ema", ("state_dict",)),
    "ema within": ({"epoch": 3, "ema": {"module": OTHERS}, "model": M}, OTHER, "ema.module", ("model",)),
    "ema_model": ({"state_dict": flat(model=MODEL, ema_model=OTHER)}, OTHER, "state_dict.ema_model", ("state_dict.model",)),
    "swa": (flat(net=MODEL, swa_net=OTHER), OTHER, "swa_net", ("net",)),
    "no ema at all": ({"ema": None, "model": M, "model_ema": {}}, MODEL, "model", ()),
    "ema without statistics": ({"ema": dict(OTHER.named_parameters()), "model": M}, MODEL, "model", ()),
    "schema": ({"schema": OTHERS, "state_dict": M}, MODEL, "state_dict", ("schema",)),
    "Lightning's average": ({"state_dict": M, "current_model_state": OTHERS}, MODEL, "state_dict", ("current_model_state",)),
    "a copy": (flat(student=MODEL, teacher=MODEL), MODEL, "student", ()),
    "one that fits": ({"generator": net(3)[:1].state_dict(), "critic": M}, MODEL, "critic", ()),
    "one set and an optimizer": ({"student": M, "optimizer": OPTIMIZER}, MODEL, "student", ()),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_of_several_sets_one_is_taken_and_the_report_says_which_and_of_the_others(name):
    content, taken, place, others = SETS[name]
    module = net(9)
    report = load_weights(module, saved(content))
    assert_same_weights(weights(module), weights(taken))
    assert (report.file_prefix.rstrip("."), report.others) == (place, others)
    assert f"from {place!r} in the file" in str(report)
    assert all(f"fit as well, not loaded ({len(others)}): {others[0]}" in str(report) for _ in others)


UNCLEAR = {
    "keys": {"student": M, "teacher": OTHERS},
    "prefixes": flat(student=MODEL, teacher=OTHER),
    "prefixes in a checkpoint": {"state_dict": flat(student=MODEL, teacher=OTHER)},
    "two averages": {"ema": M, "model_ema": OTHERS},
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_sets_that_nothing_tells_apart_are_refused_until_one_is_named(name):
    content, module = UNCLEAR[name], net(9)
    before, path = weights(module), saved(content)
    with pytest.raises(
        ValueError, match=r"w\.pt: It holds several sets of weights that fit alike: .* key='.*'\)"
    ) as caught:
        load_weights(module, path)
    assert_same_weights(before, weights(module))
    first, second = re.search(r"alike: '(.*)'; '(.*)'\. Say", str(caught.value)).groups()
    for key, expected in ((first, MODEL), (second, OTHER)):
        load_weights(module, path, key=key)
        assert_same_weights(weights(module), weights(expected))


def headless(module):
    return {name: value for name, value in module.state_dict().items() if not name.startswith("2.")}


def test_a_head_that_does_not_fit_tells_no_sets_apart():
    new = nn.Sequential(*net(9)[:2], nn.Linear(8, 7))
    with pytest.raises(ValueError, match="several sets of weights that fit alike: 'student'; 'teacher'"):
        load_weights(new, saved({"student": M, "teacher": headless(OTHER)}))
    report = load_weights(new, saved({"model": M, "ema": headless(OTHER)}))
    assert (report.file_prefix, report.others) == ("ema.", ("model",))
    assert torch.equal(new[0].weight, OTHER[0].weight)
    report = load_weights(new, saved({"student": M, "teacher": headless(MODEL)}))  # the same but for the head
    assert report.others == ()


def test_a_key_names_a_set_of_any_rank_and_an_unknown_one_is_refused():
    path, module = saved(M | {"ema": OTHERS, "optimizer": OPTIMIZER}), net(9)
    for key, expected in (("", MODEL), ("ema", OTHER), (None, OTHER)):
        load_weights(module, path, key=key)
        assert_same_weights(weights(module), weights(expected))
    with pytest.raises(ValueError, match=r"Expected `key` to be where .* but got 'em'\. It has .*ema"):
        load_weights(module, path, key="em")


def test_two_parts_of_a_module_that_the_file_fits_are_refused_until_one_is_named():
    module = nn.ModuleDict({"student": net(3), "teacher": net(4)})
    with pytest.raises(
        ValueError, match=r"fit several parts of the module: student; teacher\. .*module\.student, path"
    ):
        load_weights(module, saved(M))
    load_weights(module["teacher"], saved(M))
    assert_same_weights(weights(module["teacher"]), weights(MODEL))
    module = nn.ModuleDict({"student": net(3)})
    module["same"] = module["student"]
    load_weights(module, saved(M))
    assert_same_weights(weights(module["same"]), weights(MODEL))


# --- tensors of several names -------------------------------------------------------------------------------------------


class Language(nn.Module):
    """Its output layer shares the embedding's weight."""

    def __init__(self, words=20, tied=True):
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(words, 8), nn.Linear(8, 8), nn.Linear(8, words, bias=False)
        if tied:
            self.out.weight = self.embed.weight


@pytest.mark.parametrize("kept", ["embed.weight", "out.weight"])
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("strict", [True, False])
def test_of_tied_tensors_one_name_in_the_file_is_enough(kept, prefix, strict):
    old, new = Language(), Language()
    state = {prefix + name: value for name, value in old.state_dict().items() if name.startswith(("body", kept))}
    save_file(state, "w.safetensors")
    report = load_weights(new, "w.safetensors", strict=strict)
    assert_same_weights(weights(old), weights(new))
    assert set(report.loaded) == old.state_dict().keys()
    assert (report.missing, report.fresh, report.unexpected) == ((), (), ())
    with pytest.raises(ValueError, match=r"missing in the file \(1\): embed.weight|Not all|another model"):
        load_weights(Language(tied=False), "w.safetensors", head="body")


def test_a_tied_tensor_of_another_shape_is_no_head_that_may_stay_random():
    with pytest.raises(ValueError, match=r"embed.weight is \(30, 8\) in the file, \(20, 8\) here"):
        load_weights(Language(), saved(Language(30).state_dict()))


def test_two_tensors_of_a_file_do_not_become_one_in_silence():
    with pytest.raises(ValueError, match=r"out\.weight is another tensor in the file, a tied one here"):
        load_weights(Language(), saved(Language(tied=False).state_dict()))
    old, new = Language(tied=False), Language()
    assert load_weights(new, saved(old.state_dict()), strict=False).loaded == (
        "embed.weight",
        "body.weight",
        "body.bias",
    )
    assert torch.equal(new.out.weight, old.embed.weight)
    with torch.no_grad():
        old.out.weight.copy_(old.embed.weight)
    load_weights(new, saved(old.state_dict()))


# --- names that the module translates -----------------------------------------------------------------------------------


class Older(nn.Linear):
    """Reads what an older version wrote: other names, and the weight the other way round."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_load_state_dict_pre_hook(self.read)

    def read(self, module, state_dict, prefix, *_):
        if prefix + "kernel" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel").T


def normed(norm, width=6):
    torch.manual_seed(width)
    return nn.Sequential(norm(nn.Conv1d(3, 6, 3)), nn.BatchNorm1d(6), norm(nn.Conv1d(6, width, 3)), nn.Linear(4, 2))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("prefix", ["", "net.", "model.net."])
def test_names_of_the_older_weight_norm_are_translated_as_torch_does(prefix):
    old, new, oracle = (
        normed(nn.utils.weight_norm),
        normed(parametrizations.weight_norm),
        normed(parametrizations.weight_norm),
    )
    for parameter in old.parameters():
        nn.init.normal_(parameter)
    oracle.load_state_dict(old.state_dict())
    report = load_weights(new, saved({prefix + name: value for name, value in old.state_dict().items()}))
    assert_same_weights(weights(new), weights(oracle))
    assert (report.missing, report.unexpected, report.file_prefix) == ((), (), prefix)
    inputs = torch.randn(2, 3, 8)
    torch.testing.assert_close(new.eval()(inputs), old.eval()(inputs))
    wide = normed(parametrizations.weight_norm, 7)
    before = weights(wide)
    with pytest.raises(
        ValueError, match=r"2.parametrizations.weight.original0 is \(6, 1, 1\) in the file, \(7, 1, 1\)|missing"
    ):
        load_weights(wide, saved(old.state_dict()))
    assert_same_weights(before, weights(wide))


def test_sets_whose_names_are_to_be_translated_are_told_apart_too():
    one, other = ({"kernel": torch.randn(3, 4)} for _ in range(2))
    new = Older(3, 4, bias=False)
    with pytest.raises(ValueError, match="several sets of weights that fit alike: 'student'; 'teacher'"):
        load_weights(new, saved({"student": one, "teacher": other}))
    assert load_weights(new, saved({"model": one, "ema": other})).others == ("model",)
    assert torch.equal(new.weight, other["kernel"].T)


def test_what_hooks_do_before_the_modules_own_loading_is_done():
    new = nn.Sequential(Older(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    new[1].num_batches_tracked += 5
    state = {"0.kernel": torch.randn(3, 4), "0.bias": torch.randn(4)}
    state |= {f"1.{name}": torch.rand(4) for name in ("weight", "bias", "running_mean", "running_var")}
    load_weights(new, saved(state))
    assert torch.equal(new[0].weight, state["0.kernel"].T)
    assert int(new[1].num_batches_tracked) == 5
    assert not any(parameter.is_meta for parameter in new.parameters())
    lazy = nn.Sequential(Older(3, 4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    load_weights(lazy, saved(state))
    assert torch.equal(lazy[0].weight, state["0.kernel"].T)


def test_lazy_layers_take_the_shape_of_the_file():
    old = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    new = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))
    load_weights(new, saved(old.state_dict()))
    assert_same_weights(weights(old), weights(new))
    deep = nn.Sequential(*old[:2], nn.Linear(8, 8), nn.LazyBatchNorm1d(), *old[2:])
    for new in (
        nn.Sequential(*deep[:3], nn.LazyBatchNorm1d(), nn.LazyBatchNorm1d()),
        nn.Sequential(*deep, nn.LazyLinear(9)),
    ):
        with pytest.raises(ValueError, match=r"Not all of the backbone is in these weights|another model"):
            load_weights(new, saved(old.state_dict()))
        assert nn.parameter.is_lazy(new[-1].weight)


def test_a_module_without_tensors_is_another_model():
    with pytest.raises(ValueError, match=r"another model: 0 of 0 tensors"):
        load_weights(nn.ReLU(), saved({"model": M, "ema": OTHERS}))
