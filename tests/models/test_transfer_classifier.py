import builtins
import importlib
import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups import (
    FreezeBackboneFinetune,
    MixupCallback,
    OneCycleMomentum,
    SubsetTraining,
    TransferClassifier,
    load_weights,
)
from lightning_speedups.models.weight_files import read_states
from zoo import Memory, assert_same_weights, trainer, weights

builder, factory, hub = (importlib.import_module(f"timm.models.{name}") for name in ("_builder", "_factory", "_hub"))
SMALL = "test_resnet"


def small(classes=4, **options):
    torch.manual_seed(classes)
    return TransferClassifier(SMALL, classes, **({"weights": None} | options))


def loader(count=16, batch_size=8, classes=4, channels=3, side=32):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    images = torch.randn(count, channels, side, side, generator=generator) + labels.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def saved(state, name="w.pt"):
    torch.save(state, name)
    return name


@pytest.fixture
def no_hub(monkeypatch):
    """Whatever would go to the network fails."""

    def fails(*args, **options):
        raise OSError("there is no network")

    for owner, name in (
        (builder, "load_state_dict_from_hf"),
        (builder, "load_state_dict_from_url"),
        (hub, "hf_hub_download"),
    ):
        monkeypatch.setattr(owner, name, fails)


# --- the docs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [TransferClassifier, load_weights], ids=lambda thing: thing.__name__)
def test_the_docs_describe_every_argument_and_show_an_example(thing):
    text = inspect.getdoc(thing)
    assert ">>> " in text.split("Example:")[1]
    assert text.split("Raises:")[1].split("Example:")[0].strip()
    for parameter in inspect.signature(thing).parameters:
        assert re.search(rf"^\s*{parameter}: ", text.split("Args:")[1], re.M), f"`{parameter}` is not described"
    root = Path(__file__).parents[2]
    assert f"`{thing.__name__}`" in (root / "CHANGELOG.md").read_text()
    assert thing.__name__ in (root / "README.md").read_text()


# --- networks ---------------------------------------------------------------------------------------------------------

NETWORKS = {
    "resnet18": {},
    "mobilenetv3_small_050": {},
    "efficientnet_b0": {},
    "vit_tiny_patch16_224": {"img_size": 32},
    "test_vit": {"img_size": 32},
    "convnext_atto": {},
    "deit_tiny_distilled_patch16_224": {"img_size": 32},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_trains_and_its_weights_make_a_round_trip_into_one_of_other_classes(name, no_hub):
    module = TransferClassifier(name, 4, weights=None, model_options=NETWORKS[name])
    before = weights(module)
    run = trainer(max_steps=1, callbacks=[FreezeBackboneFinetune(None, unfreeze_at_epoch=0)])
    run.fit(module, loader(4, 4), loader(4, 4))
    after = weights(module)
    assert sum(torch.equal(before[key], after[key]) for key in before) < len(before) / 4
    assert {"val_loss", "val_accuracy"} <= run.callback_metrics.keys()

    run.save_checkpoint("last.ckpt")
    save_file(module.model.state_dict(), "w.safetensors")
    for path in ("last.ckpt", "w.safetensors", saved({"state_dict_ema": module.model.state_dict()})):
        twin = TransferClassifier(name, 3, weights=path, model_options=NETWORKS[name])
        classifier = twin.model.get_classifier()
        heads = classifier if isinstance(classifier, tuple) else (classifier,)
        assert all(head.out_features == 3 for head in heads)
        own = {id(tensor) for head in heads for tensor in head.parameters()}
        for key, value in twin.model.state_dict(keep_vars=True).items():
            assert id(value) in own or torch.equal(value, after[f"model.{key}"]), key
    same = TransferClassifier.load_from_checkpoint("last.ckpt")
    assert_same_weights(weights(same), after)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet81", 4), r"`model` to be the name of a timm network, but got 'resnet81'. Did you mean resnet18"),
        (("qqqqqq", 4), "timm.list_models"),
        (("timm/resnet18", 4), r"hf-hub:"),
        (
            ("resnet18.nonsense", 4),
            r"no pretrained weights for 'resnet18.nonsense'; for resnet18 it knows resnet18.a1_in1k",
        ),
        ((3, 4), "but got 3"),
        (("", 4), "but got ''"),
        (("resnet18",), "`num_classes` to be a whole number of 2 or more, but got None"),
        (("resnet18", 1), "`num_classes`"),
        (("resnet18", 4.0), "`num_classes`"),
    ],
)
def test_wrong_names_and_classes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransferClassifier(*arguments, weights=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_chans": 0}, "`in_chans`"),
        ({"lr": 0}, "`lr`"),
        ({"weight_decay": -1}, "`weight_decay`"),
        ({"momentum": 1.0}, "`momentum`"),
        ({"smoothing": 1.0}, "`smoothing`"),
        ({"drop_rate": 1.0}, "`drop_rate`"),
        ({"optimizer": "lion"}, "`optimizer` to be 'adamw' or 'sgd', but got 'lion'"),
        ({"weights": ""}, "`weights`"),
        ({"weights": True}, "`weights` to be 'pretrained', the path of a file or None, but got True"),
        ({"model_options": {"num_classes": 3, "pretrained": True}}, "without num_classes; pretrained"),
        ({"model_options": {"bogus": 3}}, r"can't create 'test_resnet' \(TypeError: .*bogus.*its options"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_dropout_and_further_options_reach_the_network():
    assert small(drop_rate=0.25).model.drop_rate == 0.25
    options = {"img_size": 48}
    module = TransferClassifier("test_vit", 4, weights=None, model_options=options)
    assert module(torch.zeros(1, 3, 48, 48)).shape == (1, 4)
    assert options == {"img_size": 48}


# --- timm's own weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k"])
def test_pretrained_weights_come_from_timms_hub_with_a_new_head(name, monkeypatch):
    source, asked = timm.create_model(SMALL), []

    def given(model_id, *args, **options):
        asked.append((model_id, os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")))
        return {key: value.clone() for key, value in source.state_dict().items()}

    monkeypatch.setattr(builder, "load_state_dict_from_hf", given)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    module = TransferClassifier(name, 4)
    assert asked == [("timm/test_resnet.r160_in1k", "1")]
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    for key, value in module.model.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, source.state_dict()[key])
    assert module.model.fc.out_features == 4


class Offline(Exception):
    """As httpx's errors: no OSError."""


@pytest.mark.parametrize(
    "error", [OSError("no route to host"), Offline("no route to host"), RuntimeError("no route to host")]
)
def test_a_network_failure_says_the_way_out(error, monkeypatch):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(builder, "load_state_dict_from_hf", fails)
    with pytest.raises(
        ValueError, match=r"no route to host.*its pretrained weights. Use `weights=None`.*local file"
    ) as caught:
        TransferClassifier(SMALL, 4)
    assert caught.value.__cause__ is error
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    with pytest.raises(ValueError, match=r"bogus.*At fault: its options"):
        TransferClassifier(SMALL, 4, model_options={"bogus": 1})
    monkeypatch.setattr(hub, "hf_hub_download", fails)
    with pytest.raises(ValueError, match=r"no route to host.*its files on the hub"):
        TransferClassifier("hf-hub:timm/test_resnet.r160_in1k", 4)


def test_a_network_without_pretrained_weights_is_named(no_hub):
    bare = next(name for name in timm.list_models("resnet*") if not timm.list_pretrained(f"{name}.*"))
    with pytest.raises(ValueError, match=rf"no pretrained weights for '{bare}'.*weights=None"):
        TransferClassifier(bare, 4)


def test_a_name_on_a_hub_is_resolved_once_and_checkpoints_need_no_hub(monkeypatch, no_hub):
    config = {"input_size": (3, 64, 64), "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "num_classes": 7}
    config |= {"classifier": "head", "fixed_input_size": True, "first_conv": "patch_embed.proj"}
    described = lambda model_id, **options: (  # noqa: E731
        {**config, "hf_hub_id": model_id, "source": "hf-hub"}, "test_vit", {"img_size": 64, "num_classes": 7},
    )  # fmt: skip
    source = timm.create_model("test_vit", num_classes=7, img_size=64)
    with monkeypatch.context() as online:
        online.setattr(factory, "load_model_config_from_hf", described)
        online.setattr(hub, "load_model_config_from_hf", described)
        online.setattr(builder, "load_state_dict_from_hf", lambda *args, **options: dict(source.state_dict()))
        module = TransferClassifier("hf-hub:someone/their-vit", 4)
    assert torch.equal(module.model.pos_embed, source.pos_embed)
    run = trainer()
    run.strategy.connect(module)
    run.save_checkpoint("one.ckpt", weights_only=True)
    twin = TransferClassifier.load_from_checkpoint("one.ckpt")
    assert_same_weights(weights(twin), weights(module))
    assert twin.hparams["model"] == "test_vit"
    assert str(twin.transforms()) == str(module.transforms())
    assert "64" in str(twin.transforms())


# --- weight files -----------------------------------------------------------------------------------------------------


def test_the_checkpoint_of_a_fit_loads_without_hub_and_weight_file(no_hub):
    first = small(7)
    path = Path(saved(first.model.state_dict()))
    module = small(4, weights=path, smoothing=0.1, optimizer="sgd", model_options={"global_pool": "max"})
    assert torch.equal(module.model.layer1[0].conv1.weight, first.model.layer1[0].conv1.weight)
    run = trainer(max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint("end.ckpt")
    path.unlink()
    twin = TransferClassifier.load_from_checkpoint("end.ckpt", weights_only=True)
    assert twin.hparams["weights"] is None
    assert (twin.criterion.smoothing, twin.optimizer) == (0.1, "sgd")
    assert_same_weights(weights(twin), weights(module))
    assert module.hparams_initial["weights"] == path  # what a logger is told


def test_training_does_not_write_into_the_file_or_the_tensors_that_were_read():
    path = saved(small(4).model.state_dict())
    content = Path(path).read_bytes()
    (state,) = read_states(path).values()
    before = {name: value.clone() for name, value in state.items()}
    module = small(4, weights=path)
    trainer(max_epochs=1).fit(module, loader())
    assert Path(path).read_bytes() == content
    assert all(torch.equal(state[name], before[name]) for name in before)


# --- training -----------------------------------------------------------------------------------------------------------


def test_losses_and_accuracies_are_what_they_are_called():
    module, data, log = small(smoothing=0.2), loader(12, 5), Memory()
    run = trainer(logger=log, max_epochs=1, log_every_n_steps=1)
    images, labels = next(iter(data))
    expected = F.cross_entropy(module.train()(images), labels, label_smoothing=0.2).item()
    twin = small(smoothing=0.2)
    run.fit(twin, data, data)
    assert log["train_loss"][0] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        all_images, all_labels = data.dataset.tensors
        scores = twin.eval()(all_images)
    for stage, result in (
        ("val", run.validate(twin, data, verbose=False)),
        ("test", run.test(twin, data, verbose=False)),
    ):
        assert result[0][f"{stage}_accuracy"] == pytest.approx((scores.argmax(1) == all_labels).float().mean().item())
        assert result[0][f"{stage}_loss"] == pytest.approx(F.cross_entropy(scores, all_labels).item(), rel=1e-4)
    predicted = torch.cat(run.predict(twin, data))
    torch.testing.assert_close(predicted, scores.softmax(1))
    bare = DataLoader(all_images, batch_size=5)
    assert torch.equal(torch.cat(run.predict(twin, bare)), predicted)


def as_dicts(names):
    """Gives batches in dicts, with something else beside what is wanted."""
    images, labels = loader().dataset.tensors
    data = [
        dict(zip((*names, "id"), (*pair, str(i)), strict=True))
        for i, pair in enumerate(zip(images, labels, strict=True))
    ]
    return DataLoader(data, batch_size=8)


@pytest.mark.parametrize("names", [("image", "label"), ("pixel_values", "labels")])
def test_batches_may_be_dicts_with_usual_names(names):
    one, other = small(), small()
    trainer(max_epochs=1).fit(one, loader(), loader())
    run = trainer(max_epochs=1)
    run.fit(other, as_dicts(names), as_dicts(names))
    assert_same_weights(weights(one), weights(other))
    ours, theirs = (torch.cat(run.predict(other, data)) for data in (as_dicts(names), loader()))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("batch", "seen"),
    [
        ({"img": torch.zeros(2, 3, 32, 32), "label": torch.zeros(2).long()}, "a dict of img; label"),
        (
            {"image": torch.zeros(2, 3, 32, 32), "images": torch.zeros(2, 3, 32, 32), "label": torch.zeros(2).long()},
            "a dict of image; images; label",
        ),
        ((torch.zeros(2, 3, 32, 32),), "a tuple of Tensor"),
        ((torch.zeros(2, 3, 32, 32), torch.zeros(2).long(), ["a", "b"]), "a tuple of Tensor; Tensor; list"),
        ((["a", "b"], torch.zeros(2).long()), "a tuple of list; Tensor"),
        (torch.zeros(2, 3, 32, 32), "a Tensor of Tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_batches_are_refused_with_what_is_taken(batch, seen):
    said = rf"batches of images and labels: .* under 'images' and 'labels'. It got {seen}\."
    for step in (small().training_step, small().validation_step):
        with pytest.raises(ValueError, match=said):
            step(batch, 0)


def test_predictions_need_no_labels():
    module, images = small().eval(), torch.randn(2, 3, 32, 32)
    expected = module(images).softmax(1)
    for batch in (images, (images,), [images, 1, 2], {"image": images, "id": ["a", "b"]}):
        torch.testing.assert_close(module.predict_step(batch, 0), expected)
    with pytest.raises(ValueError, match=r"batches of images: .* under 'images'. It got a dict of img"):
        module.predict_step({"img": images}, 0)


def test_it_learns():
    module = small(lr=3e-3)
    trainer(max_epochs=6).fit(module, loader(64, 16))
    (result,) = trainer().test(module, loader(64, 16), verbose=False)
    assert result["test_accuracy"] > 0.6


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_norms_and_biases_have_no_weight_decay_and_all_is_in_the_optimizer(name):
    module = TransferClassifier("test_vit", 4, weights=None, optimizer=name, lr=0.2, momentum=0.8)
    optimizer = module.configure_optimizers()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == {id(p) for p in module.parameters()}
    for key, parameter in module.model.named_parameters():
        plain = parameter.ndim <= 1 or key in ("pos_embed", "cls_token")
        assert decay[id(parameter)] == (0.0 if plain else {"adamw": 0.05, "sgd": 5e-4}[name]), key
    assert {group["lr"] for group in optimizer.param_groups} == {0.2}
    assert type(optimizer) is {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    if name == "sgd":
        assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(0.8, True)}
        assert not small(optimizer="sgd", momentum=0.0).configure_optimizers().param_groups[0]["nesterov"]
    assert {group["weight_decay"] for group in small(weight_decay=0.3).configure_optimizers().param_groups} == {
        0.3,
        0.0,
    }
    assert {group["weight_decay"] for group in small(weight_decay=0).configure_optimizers().param_groups} == {0.0}


def test_the_tricks_work_with_it():
    module = small()
    before = weights(module)
    callbacks = [
        FreezeBackboneFinetune(None, unfreeze_at_epoch=None),
        MixupCallback(0.4),
        OneCycleMomentum(max_lr=0.01),
    ]
    trainer(max_epochs=2, callbacks=callbacks).fit(module, loader(), loader())
    after = weights(module)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.fc.weight", "model.fc.bias"}
    trainer(max_epochs=2, callbacks=[SubsetTraining(seed=0)]).fit(small(smoothing=0.1), loader(32))


def test_the_rate_finders_own_attribute_is_followed():
    module = small()
    module.lr = 0.5
    assert module.configure_optimizers().param_groups[0]["lr"] == 0.5


# --- images -------------------------------------------------------------------------------------------------------------


def test_transforms_fit_the_weights():
    module = small()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    from timm.data import create_transform, resolve_model_data_config

    oracle = create_transform(**resolve_model_data_config(module.model), is_training=False)
    assert torch.equal(module.transforms()(picture), oracle(picture))
    assert torch.equal(module.transforms()(picture), module.transforms(train=False)(picture))
    train = module.transforms(train=True)
    assert train(picture).shape == (3, 160, 160)
    assert not torch.equal(train(picture), train(picture))
    assert "ColorJitter" not in str(train)
    assert "Flip" in str(train)


@pytest.mark.parametrize("size", [48, (48, 32)])
def test_transforms_follow_the_size_and_the_channels(size):
    module = TransferClassifier("test_vit", 4, weights=None, in_chans=1, model_options={"img_size": size})
    images = module.transforms()(Image.new("RGB", (64, 64), (255, 255, 255))).unsqueeze(0)
    assert images.shape == (1, 1, *((48, 48) if size == 48 else size))
    mean, std = (np.mean(module.model.pretrained_cfg[name]) for name in ("mean", "std"))
    torch.testing.assert_close(images, torch.full_like(images, (1 - mean) / std))
    assert module(images).shape == (1, 4)
    with pytest.raises(ValueError, match="1 or 3 channels, but `in_chans` is 4"):
        small(in_chans=4).transforms()


def test_without_torchvision_the_extra_is_named(monkeypatch):
    module, real = small(), builtins.__import__

    def lacking(name, *args, **options):
        if name.startswith("torchvision"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-speedups\[bench\]"):
        module.transforms()
