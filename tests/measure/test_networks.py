import pytest
import torch
from torch import nn

from lightning_speedups.measure.digits import digit_collages
from lightning_speedups.measure.errors import CompareError
from lightning_speedups.measure.images import ImageData
from lightning_speedups.measure.networks import ConvNet, build_network, load_backbone


@pytest.fixture(scope="module")
def data():
    return digit_collages(8, 4)


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (24, 1), (32, 3), (64, 3), (224, 3)])
def test_convnet_takes_any_side_and_stays_small(side, channels):
    network = ConvNet(channels, 7, side=side, width=8)
    assert network(torch.zeros(2, channels, side, side)).shape == (2, 7)
    assert sum(p.numel() for p in network.parameters()) < 400_000


def test_the_width_is_16_unless_asked_otherwise(data):
    colour = ImageData("c", data.x_train.repeat(1, 3, 1, 1), data.y_train, data.x_test, data.y_test, 10)
    for images in (data, colour):
        assert build_network("convnet", images).backbone[0][0].out_channels == 16
        assert build_network("convnet", images, width=9).backbone[0][0].out_channels == 9


@pytest.mark.parametrize(
    ("side", "map_side", "channels"),
    [(8, 4, [8, 16, 16]), (24, 3, [8, 16, 16, 32, 32, 64, 64]), (32, 4, [8, 16, 16, 32, 32, 64, 64]),
     (64, 4, [8, 16, 16, 32, 32, 64, 64])],
)  # fmt: skip
def test_stages_double_the_channels_and_halve_the_sides_by_max_pooling(side, map_side, channels):
    network = ConvNet(1, 10, side=side, width=8)
    *blocks, pool, _ = network.backbone
    assert [block[0].out_channels for block in blocks] == channels
    assert blocks[0][0].stride == (max(1, side // 32),) * 2
    assert [any(isinstance(layer, nn.MaxPool2d) for layer in block) for block in blocks[1:]] == [
        index % 2 == 0 for index in range(len(blocks) - 1)
    ]
    assert isinstance(pool, nn.AdaptiveMaxPool2d)
    assert nn.Sequential(*blocks)(torch.zeros(2, 1, side, side)).shape[2:] == (map_side, map_side)


def test_channels_grow_eightfold_at_most():
    channels = [block[0].out_channels for block in ConvNet(1, 10, side=63, width=4).backbone[:-2]]
    assert max(channels) == 32


def test_any_timm_model(data):
    network = build_network("mobilenetv3_small_050", data)
    assert network.training
    assert network(torch.zeros(2, 1, 24, 24)).shape == (2, 10)


def test_a_transformer_is_made_for_the_images():
    data = ImageData("32", *(2 * [torch.zeros(4, 1, 32, 32, dtype=torch.uint8), torch.arange(4)]), num_classes=4)
    assert build_network("test_vit", data)(torch.zeros(2, 1, 32, 32)).shape == (2, 4)


def test_unknown_model_gets_near_matches(data):
    with pytest.raises(CompareError, match=r"`model` .* but got 'resnet81'.*resnet18"):
        build_network("resnet81", data)
    with pytest.raises(CompareError, match=r"did you mean 'convnet'.*'convnett'"):
        build_network("convnett", data)


def test_a_model_that_can_not_take_the_images_says_so(data):
    with pytest.raises(CompareError, match="'vgg11' can't take images of 24x24 pixels") as caught:
        build_network("vgg11", data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["convnet", "mobilenetv3_small_050"])
def test_load_backbone_copies_all_but_the_classifier(data, name):
    # four classes on both sides: the classifier fits, and still must not be copied
    four = ImageData("f", data.x_train, data.y_train % 4, data.x_test, data.y_test % 4, 4)
    network, pretrained = build_network(name, four), build_network(name, four)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    heads = {f"{key}.{part}" for key, module in network.named_modules() if module is network.get_classifier()
             for part in ("weight", "bias")}  # fmt: skip
    assert len(heads) == 2
    for buffer in pretrained.buffers():
        buffer.add_(1)
    load_backbone(network, pretrained)
    for key, value in network.state_dict().items():
        assert torch.equal(value, (before if key in heads else pretrained.state_dict())[key]), key


@pytest.mark.parametrize("name", ["convnet", "mobilenetv3_small_050"])
def test_weights_of_a_file_with_a_fresh_classifier_for_other_classes(name, data, tmp_path):
    four = ImageData("f", data.x_train, data.y_train % 4, data.x_test, data.y_test % 4, 4)
    source = build_network(name, four)
    torch.save({"state_dict": {f"model.{key}": value for key, value in source.state_dict().items()}}, tmp_path / "w.pt")
    network = build_network(name, data, weights=str(tmp_path / "w.pt"))
    classifier = {id(parameter) for parameter in network.get_classifier().parameters()}
    for key, value in network.state_dict(keep_vars=True).items():
        assert id(value) in classifier or torch.equal(value, source.state_dict()[key]), key
    assert network.get_classifier().out_features == 10
    assert network.training


def test_timms_own_weights_are_asked_for_by_that_word_only(data, monkeypatch):
    asked = []

    def fails(*args, **options):
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fails)
    build_network("mobilenetv3_small_050", data)
    assert not asked
    with pytest.raises(CompareError, match=r"no network.*its pretrained weights") as caught:
        build_network("mobilenetv3_small_050", data, weights="pretrained")
    assert asked
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["convnet", "mobilenetv3_small_050"])
def test_weights_that_can_not_be_had_are_one_line(name, data, tmp_path):
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "other.pt")
    for path, message in (("gone.pt", "There is no file gone.pt"), ("other.pt", "of another model: 0 of")):
        with pytest.raises(CompareError, match=message) as caught:
            build_network(name, data, weights=path)
        assert "\n" not in str(caught.value)


def test_a_wrong_tag_is_refused(data):
    with pytest.raises(CompareError, match="nonsense"):
        build_network("resnet18.nonsense", data)
