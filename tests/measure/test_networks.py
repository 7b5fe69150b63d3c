import pytest
import torch

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


def test_default_width_follows_the_channels(data):
    colour = ImageData("c", data.x_train.repeat(1, 3, 1, 1), data.y_train, data.x_test, data.y_test, 10)
    assert build_network("convnet", data).backbone[0][0].out_channels == 24
    assert build_network("convnet", colour).backbone[0][0].out_channels == 32
    assert build_network("convnet", colour, width=9).backbone[0][0].out_channels == 9


def test_any_timm_model(data):
    network = build_network("mobilenetv3_small_050", data)
    assert network.training
    assert network(torch.zeros(2, 1, 24, 24)).shape == (2, 10)


def test_a_transformer_is_made_for_the_images():
    data = ImageData("32", *(2 * [torch.zeros(4, 1, 32, 32, dtype=torch.uint8), torch.arange(4)]), num_classes=4)
    assert build_network("test_vit", data)(torch.zeros(2, 1, 32, 32)).shape == (2, 4)


def test_unknown_model_gets_near_matches(data):
    with pytest.raises(CompareError, match=r"unknown model 'resnet81'.*resnet18"):
        build_network("resnet81", data)
    with pytest.raises(CompareError, match=r"unknown model 'convnett'.*convnet"):
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
