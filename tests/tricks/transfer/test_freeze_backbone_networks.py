"""Freezing in networks as projects keep them: torchvision's, Hugging Face's, several encoders; layers inside others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet
from transformers_like import (
    SIZE,
    BertLike,
    BertLikeForClassification,
    GptLike,
    Lit,
    Pieces,
    RobertaLikeForClassification,
    Texts,
    padded,
    texts,
)

from lightning_speedups import FeatureCache, FreezeBackboneFinetune, FreezeProgressively
from lightning_speedups.modules.layers import layers_by_child
from zoo import OrderOfEpoch, ReplayLoader, assert_same_weights, fit_interrupted, images, resume, trainer, weights


def lit(network=BertLikeForClassification, cls=Lit, **options):
    torch.manual_seed(3)
    return cls(network(**options))


def fit(module, *callbacks, data=texts, **arguments):
    torch.manual_seed(4)
    trainer(callbacks=[*callbacks], **arguments).fit(module, data())
    return module


def names(module, *paths):
    """The network's parameters under these paths."""
    return {name for name, _ in module.net.named_parameters() if name.startswith(tuple(f"{path}." for path in paths))}


def new_in_each_epoch(module):
    """What trained in an epoch and not in the one before."""
    return [now - before for before, now in zip([set(), *module.trained], module.trained, strict=False)]


# ---- Hugging Face's


@pytest.mark.parametrize("path", ["encoder.layer", "bert.encoder.layer", "net.bert.encoder.layer"])
@pytest.mark.parametrize("backbone", [None, "net.bert"])
def test_blocks_of_a_bert_thaw_one_by_one(backbone, path):
    schedule = {0: "head", 1: f"{path}.*", 4: "all"}
    module = fit(lit(), FreezeBackboneFinetune(backbone, schedule=schedule), max_epochs=5)
    found = new_in_each_epoch(module)
    assert found[:4] == [names(module, "classifier"), *(names(module, f"bert.encoder.layer.{i}") for i in (2, 1, 0))]
    assert found[4] == names(module, "bert.embeddings", "bert.pooler")


def test_blocks_of_a_pattern_may_be_epochs_apart():
    callback = FreezeBackboneFinetune("net.bert", schedule={1: "encoder.*.*"}, every_n_epochs=2)
    module = fit(lit(), callback, max_epochs=4)
    first, second = (names(module, f"bert.encoder.layer.{i}") for i in (2, 1))
    assert new_in_each_epoch(module)[1:] == [first, set(), second]


def test_everything_outside_the_base_model_is_the_head():
    module = fit(lit(RobertaLikeForClassification), FreezeBackboneFinetune(None, None), max_epochs=1)
    assert module.trained[0] == names(module, "pre_classifier", "classifier")


def test_a_language_model_thaws_from_its_last_block_to_its_embeddings():
    callback = FreezeBackboneFinetune(None, schedule={0: "head", 1: "h.*", 3: ["h", "net.wpe"], 4: "all"})
    module = fit(lit(GptLike), callback, max_epochs=5)
    assert new_in_each_epoch(module) == [
        names(module, "projection"), names(module, "h.2", "ln_f"), names(module, "h.1"), names(module, "h.0", "wpe"),
        names(module, "wte"),
    ]  # fmt: skip


def test_rates_go_down_from_block_to_block():
    module = fit(lit(), FreezeBackboneFinetune(None, 0, lr_decay=0.5), max_epochs=1)
    depth = {"embeddings": 5, "encoder.layer.0": 4, "encoder.layer.1": 3, "encoder.layer.2": 2, "pooler": 1}
    expected = {name: 0.01 * 0.5**d for part, d in depth.items() for name in names(module, f"bert.{part}")}
    assert module.rates[-1] == pytest.approx(expected | dict.fromkeys(names(module, "classifier"), 0.01))


class Replayed(ReplayLoader):
    """Texts that go on where a checkpoint stood."""

    def __init__(self):
        DataLoader.__init__(self, Texts(), 4, sampler=OrderOfEpoch(16), collate_fn=padded)
        self.position = 0


@pytest.mark.parametrize("stop", [1, 6, 8, 11])
def test_resumed_it_equals_the_whole_run(stop):
    def callback():
        schedule = {0: "head", 1: "encoder.layer.*", 2: "encoder.layer.0.dense"}
        return FreezeBackboneFinetune(None, schedule=schedule, refreeze={2: "encoder.layer.2"}, lr_decay=0.7)

    def still():
        module = lit()
        for part in module.modules():
            part.p = 0.0  # random states are not restored
        return module

    whole = fit(still(), callback(), data=Replayed)
    fit_interrupted(still(), Replayed(), stop, [callback()])
    parted = still()
    resume(parted, Replayed(), [callback()])
    assert_same_weights(weights(whole), weights(parted))


class AsBefore(FreezeBackboneFinetune):
    """With the layers that it found in a BERT when it knew only of children."""

    state_key = FreezeBackboneFinetune.__qualname__

    def find_layers(self, pl_module):
        super().find_layers(pl_module)
        return layers_by_child(pl_module.net.bert)


@pytest.mark.parametrize("options", [{"lr_decay": 0.5}, {"gradual": True}, {"schedule": {1: "encoder"}}], ids=str)
def test_a_run_that_was_begun_with_children_for_layers_goes_on_so(options):
    fit_interrupted(lit(), Replayed(), 6, [AsBefore("net.bert", **options)])
    new, old = lit(), lit()
    for module, kind in ((new, FreezeBackboneFinetune), (old, AsBefore)):
        torch.manual_seed(4)
        callback = kind("net.bert", **options)
        resume(module, Replayed(), [callback])
        assert list(callback.saved.labels) == ["embeddings", "encoder", "pooler"]
    assert new.rates == old.rates
    assert new.trained == old.trained


# ---- torchvision's


class Pictures(Lit):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(F.interpolate(batch[0], 16)), batch[1])


def resnet():
    net = ResNet(BasicBlock, [1, 2, 1, 1], num_classes=4)
    net.conv1 = nn.Conv2d(2, 64, 3, stride=4)
    return net


def pictures():
    return DataLoader(TensorDataset(*images(4)), 2)


def test_a_resnet_of_torchvision_thaws_by_its_stages_and_inside_one():
    callback = FreezeBackboneFinetune(None, schedule={0: "head", 1: "layer2.*", 3: ["net.layer3", "conv1"]})
    module = fit(lit(resnet, Pictures), callback, data=pictures, max_epochs=4)
    assert new_in_each_epoch(module) == [
        names(module, "fc"), names(module, "layer2.1"), names(module, "layer2.0"), names(module, "layer3", "conv1", "bn1")
    ]  # fmt: skip


# ---- several encoders


class TwoEncoders(nn.Module):
    """Texts beside texts, as images would be."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.head = BertLike(3), BertLike(1), nn.Linear(2 * SIZE, 2)

    def forward(self, labels, **batch):
        found = [encoder(**batch).pooler_output for encoder in (self.one, self.other)]
        return (
            Pieces(None, None) if labels is None else self.loss(F.cross_entropy(self.head(torch.cat(found, 1)), labels))
        )

    def loss(self, value):
        return type("Output", (), {"loss": value})


def test_several_encoders_have_rates_and_patterns_of_their_own():
    schedule = {0: "head", 1: ["net.one.encoder.layer.*", "net.other"], 3: "all"}
    callback = FreezeBackboneFinetune(["net.one", "net.other"], schedule=schedule, lr_decay=0.5)
    module = fit(lit(TwoEncoders), callback, max_epochs=4)
    assert new_in_each_epoch(module) == [
        names(module, "head"), names(module, "one.encoder.layer.2", "other"), names(module, "one.encoder.layer.1"),
        names(module, "one.embeddings", "one.encoder.layer.0", "one.pooler"),
    ]  # fmt: skip
    rates = module.rates[-1]
    assert rates["head.weight"] == 0.01
    assert rates["one.pooler.dense.weight"] == rates["other.pooler.dense.weight"] == pytest.approx(0.005)
    assert rates["one.encoder.layer.0.dense.bias"] == pytest.approx(0.01 / 16)
    assert rates["other.embeddings.LayerNorm.bias"] == pytest.approx(0.01 / 8)


def test_several_encoders_thaw_in_turn_from_their_last_layers():
    module = fit(lit(TwoEncoders), FreezeBackboneFinetune(["net.one", "net.other"], gradual=True), max_epochs=5)
    order = ["head", "other.pooler", "one.pooler", "other.encoder.layer.0", "one.encoder.layer.2"]
    assert new_in_each_epoch(module) == [names(module, path) for path in order]


def test_several_encoders_freeze_in_turn_from_their_first_layers():
    callback = FreezeProgressively(["net.one", "net.other"], start=0.25, until=0.99)
    fit(lit(TwoEncoders), callback)
    assert callback.saved.labels.keys() >= {"net.one.embeddings", "net.other.pooler"}
    order = [name.removeprefix("net.") for name in callback.saved.labels]
    assert order[:4] == ["one.embeddings", "one.encoder.layer.0", "one.encoder.layer.1", "other.embeddings"]


# ---- refusals


@pytest.mark.parametrize("backbone", [[], [""], ["a", "a"], ["a", 3]], ids=str)
def test_lists_of_anything_but_paths_are_refused(backbone):
    with pytest.raises(
        ValueError, match=r"Expected `backbone` to be an attribute path, a list of such paths, .*, but got"
    ):
        FreezeBackboneFinetune(backbone)


@pytest.mark.parametrize(
    ("backbone", "schedule", "told"),
    [
        (
            None,
            {1: "encoder.blocks.*"},
            r"no layer 'encoder.blocks.\*'. Its layers are \['embeddings', 'encoder.layer.0'",
        ),
        (["net.bert", "net.dropouts"], {}, r"has no such submodule. It has \['net'\]"),
        (
            "net",
            {0: "head"},
            r"Name a part .* of \['bert.embeddings', .*\]\. `backbone=None` is a network without its head",
        ),
    ],
)
def test_what_is_not_there_is_refused_with_the_names_to_choose_from(backbone, schedule, told):
    callback = FreezeBackboneFinetune(backbone, schedule=schedule)
    with pytest.raises(MisconfigurationException, match=told):
        fit(lit(), callback)


def test_several_heads_are_refused_by_name():
    module = lit()
    module.head = nn.Linear(2, 2)
    with pytest.raises(MisconfigurationException, match=r"found the heads \['head', 'net.classifier'\]. Give the"):
        fit(module, FreezeBackboneFinetune(None))


# ---- with the cache


def cached(network, data=texts, **options):
    """Train with and without the cache, and return it."""
    cache, runs = FeatureCache(inputs="input_ids"), []
    for more in ([], [cache]):
        module = lit(network, **options)
        runs.append(fit(module, FreezeBackboneFinetune(None, None), *more, data=data))
    one, other = runs
    torch.testing.assert_close(weights(one), weights(other))
    assert one.losses == pytest.approx(other.losses, rel=1e-4)
    return cache


@pytest.mark.parametrize("output", [None, Pieces])
def test_a_bert_is_computed_once_for_each_text_though_batches_are_padded_to_their_longest(output):
    assert len({batch["input_ids"].shape[1] for batch in texts()}) > 1
    cache = cached(BertLikeForClassification, **({} if output is None else {"output": output}))
    assert (cache.hits, cache.misses) == (7, 5)


def test_heads_that_take_all_tokens_need_texts_of_one_length():
    assert cached(RobertaLikeForClassification, lambda: texts(collate=lambda some: padded(some, 10))).hits == 7
    with pytest.raises(MisconfigurationException, match="texts be padded to one length"):
        fit(lit(RobertaLikeForClassification), FreezeBackboneFinetune(None, None), FeatureCache(inputs="input_ids"))
