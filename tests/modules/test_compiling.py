"""Which blocks are found in public networks, and what becomes of them when they are compiled, or cannot be."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
import torchvision
from functorch.compile import make_boxed_func
from torch import nn

from lightning_speedups.modules.compiling import CompiledBlocks, ForgivingBackend, find_blocks, kind_of, pick_blocks


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("make", "kind", "count", "kinds"),
    [
        (lambda: torchvision.models.resnet18(), "BasicBlock", 8, 7),
        (lambda: torchvision.models.convnext_tiny(), "CNBlock", 18, 4),
        (lambda: timm.create_model("vit_tiny_patch16_224"), "Block", 12, 1),
        (lambda: timm.create_model("convnext_atto"), "ConvNeXtBlock", 12, 4),  # in stages, which are not alike
        (lambda: timm.create_model("efficientnet_b0"), "InvertedResidual", 15, 11),
        (lambda: nn.Transformer(8, 2, 3, 0, 16).encoder, "TransformerEncoderLayer", 3, 1),
        (lambda: timm.create_model("densenet121"), "DenseNet", 1, 1),  # only its norms are alike
        (lambda: torchvision.models.vgg11(), "VGG", 1, 1),
    ],
)
def test_the_blocks_of_public_networks_are_found(make, kind, count, kinds):
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        found = find_blocks(nn.ModuleDict({"net": make()}))
    assert {type(block).__name__ for block in found.values()} == {kind}
    assert (len(found), len({kind_of(block) for block in found.values()})) == (count, kinds)
    assert all(name.startswith("net") for name in found)


def test_sequences_are_blocks_only_where_they_hold_the_same():
    same, other = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)], nn.Sequential(nn.Linear(4, 5))
    assert list(find_blocks(nn.Sequential(*same, other))) == ["0", "1"]
    assert list(find_blocks(nn.Sequential(same[0], other))) == ["0", "1"]  # nothing is repeated: both children
    assert list(find_blocks(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))) == []


def test_paths_are_taken_as_they_are_and_lists_by_their_members():
    net = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(2)), "head": nn.Linear(2, 2)})
    assert pick_blocks(net, ["blocks"]) == {"blocks.0": net["blocks"][0], "blocks.1": net["blocks"][1]}
    assert list(pick_blocks(nn.Sequential(net, nn.ReLU()), ["0", "0.head"])) == ["0"]
    for path in ("", "tail", "blocks.2"):
        with pytest.raises(LookupError):
            pick_blocks(net, [path])


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2)))


def gradients(module, inputs):
    torch.manual_seed(1)
    module.zero_grad()
    module(inputs).square().sum().backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("broken", [[], ["forward"], ["backward"]])
def test_gradients_are_those_of_the_blocks_themselves_whatever_fails(broken):
    from torch._dynamo.backends.common import aot_autograd

    tried = []

    def part(kind):
        def lower(graph, inputs):
            tried.append(kind)
            if kind in broken:
                raise KeyError("an operation\nthat is not known")
            return make_boxed_func(graph.forward)

        return lower

    backend = aot_autograd(fw_compiler=part("forward"), bw_compiler=part("backward"))
    plain, compiled, inputs = net(), net(), torch.randn(3, 4)
    blocks = CompiledBlocks(find_blocks(compiled), backend)
    blocks.compile()
    for _ in range(2):
        for one, other in zip(gradients(plain, inputs), gradients(compiled, inputs), strict=True):
            torch.testing.assert_close(one, other)
    assert blocks.failure is None or broken, blocks.failure
    assert tried == (["forward"] if broken == ["forward"] else ["forward", "backward"] * (1 if broken else 2))
    assert (blocks.failure is None) == (not broken)
    assert blocks.failure is None or blocks.failure.startswith("KeyError: 'an operation")


def test_code_is_shared_between_equal_backends_but_not_after_a_failure():
    def coded(graph, inputs):
        raise RuntimeError("no compiler")

    assert ForgivingBackend(coded) == ForgivingBackend(coded)
    for _ in range(2):  # the second one does not take over what the first one could not compile
        block = net()
        blocks = CompiledBlocks({"block": block}, coded)
        blocks.compile()
        block(torch.randn(3, 4))
        assert blocks.failure == "RuntimeError: no compiler"
        blocks.put_back()


class Pretends(torch.Tensor):
    pass


def test_calls_run_the_block_itself_when_they_are_told_to_and_with_tensors_that_pretend():
    runs, on = [], [True]

    def backend(graph, inputs):
        return lambda *inputs: runs.append(1) or graph.forward(*inputs)

    block = net()[0]
    blocks = CompiledBlocks({"block": block}, backend, when=lambda: on[0])
    blocks.compile()
    block(torch.ones(3, 4))
    assert (len(runs), blocks.called) == (1, True)
    block(torch.ones(3, 4).as_subclass(Pretends))
    on[0] = False
    block(torch.ones(3, 4))
    assert len(runs) == 1


def test_copies_and_what_is_put_back_are_plain_modules():
    with torch._dynamo.config.patch(recompile_limit=8):  # torch raises it in some of its own parts
        block, limit = net(), torch._dynamo.config.recompile_limit
        before = {name: set(vars(part)) for name, part in block.named_modules()}
        blocks = CompiledBlocks(find_blocks(block) | {str(number): net() for number in range(2, 9)}, "eager")
        blocks.compile()
        assert torch._dynamo.config.recompile_limit > limit
        twins = [copy.deepcopy(block), pickle.loads(pickle.dumps(block))]
        blocks.put_back()
        blocks.put_back()
        assert torch._dynamo.config.recompile_limit == limit
        for one in (block, *twins):
            assert {name: set(vars(part)) for name, part in one.named_modules()} == before
