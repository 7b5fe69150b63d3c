import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18

from lightning_speedups.modules.weights import (
    WeightReport,
    find_heads,
    find_prefixes,
    find_states,
    fit_state,
    head_names,
    last_layer,
    match_states,
    require_fit,
    shortened,
)


def network(classes=3, width=4):
    torch.manual_seed(classes + 10 * width)
    return nn.Sequential(
        nn.Conv2d(2, width, 3),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, width, 3),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


HEAD = ("4.weight", "4.bias")


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def load(content, module, **options):
    states = find_states(content)
    match = match_states(states, module.state_dict())
    fitting, report = fit_state(states[match.path], module.state_dict(), HEAD, **options)
    require_fit(report, [name for name in module.state_dict() if name not in HEAD])
    module.load_state_dict(fitting, strict=False)
    return report


STATE = network().state_dict()


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE},
        {"model": STATE, "epoch": torch.tensor(3), "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
        {"model_state_dict": STATE, "loss": 0.5},
        {"epoch": 1, "model": {"state_dict": STATE}},
        {"hyper": {"lr": 0.1}, "student": STATE},
        {"state_dict": network(7).state_dict(), "state_dict_ema": STATE},
        {"model": network(7).state_dict(), "model_ema": STATE},
        {"state_dict": STATE, "state_dict_ema": None},
        {"state_dict": STATE, "model_ema": {}},
    ],
    ids=lambda content: "+".join(list(content)[:3]),
)
def test_the_state_dict_is_found_wherever_programs_keep_it(content):
    states = find_states(content)
    found = states[match_states(states, network().state_dict()).path]
    assert found.keys() == STATE.keys()
    assert all(found[name] is STATE[name] for name in STATE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "it holds a list, not a dict"),
        (torch.zeros(1), "it holds a Tensor"),
        ({}, "but nothing"),
        ({"epoch": 3, "lr": 0.1}, "but epoch; lr"),
        ({"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}}, "but optimizer"),
    ],
)
def test_what_holds_no_state_dict_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        find_states(content)


@pytest.mark.parametrize("theirs", ["", "module.", "model.", "_orig_mod.", "net.encoder.backbone.", "student.0."])
@pytest.mark.parametrize("mine", ["", "model.", "net.backbone."])
def test_any_prefix_on_either_side_is_found(theirs, mine):
    source, target = network(), network(width=4)
    module = target
    for name in reversed(mine.split(".")[:-1]):
        holder = nn.Module()
        holder.add_module(name, module)
        module = holder
    for parameter in target.parameters():
        nn.init.constant_(parameter, 9.0)
    heads = head_names(module, [target[4]])
    fitting, report = fit_state(prefixed(theirs, source.state_dict()), module.state_dict(), heads)
    module.load_state_dict(fitting, strict=False)
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)
    assert len(report.loaded) == len(STATE)
    assert not (report.missing)
    assert not (report.unexpected)
    assert not (report.mismatched)
    assert not (report.fresh)


def test_names_of_compiled_modules_are_the_plain_ones_on_both_sides():
    content = {"0.weight".replace("0.", "0._orig_mod."): STATE["0.weight"]}
    content |= {f"_orig_mod.{name}": value for name, value in STATE.items() if name != "0.weight"}
    own = {f"model._orig_mod.{name}": value for name, value in network().state_dict().items()}
    fitting, _report = fit_state(content, own)
    assert fitting.keys() == own.keys()
    assert all(fitting[f"model._orig_mod.{name}"] is STATE[name] for name in STATE)


def test_of_two_copies_the_one_whose_shapes_fit_wins_and_of_equal_ones_the_shorter_path_then_the_first():
    wide = network(width=8).state_dict()
    fewer = {name: value for name, value in STATE.items() if "num_batches" not in name}
    for content, prefix in (
        ({**prefixed("big.", wide), **prefixed("small.", fewer)}, "small."),
        ({**prefixed("big.", wide), **prefixed("small.", STATE)}, "small."),
        ({**prefixed("small.", STATE), **prefixed("big.", wide)}, "small."),
        ({**prefixed("a.", STATE), **prefixed("b.", STATE)}, "a."),
        ({**prefixed("a.b.", STATE), **prefixed("c.", STATE)}, "c."),
    ):
        assert find_prefixes(content, network().state_dict()) == (prefix, "")


def test_where_no_shape_fits_names_decide_so_that_the_report_names_the_shapes():
    own = network(width=8).state_dict()
    report = fit_state(prefixed("net.", {"0.weight": STATE["0.weight"]}), own, HEAD)[1]
    assert report.file_prefix == "net."
    assert report.mismatched == (("0.weight", "(4, 2, 3, 3)", "(8, 2, 3, 3)"),)


def test_another_number_of_classes_leaves_the_head_as_a_whole_and_says_both_shapes():
    module = network(classes=5)
    before = {name: module.state_dict()[name].clone() for name in HEAD}
    report = load(STATE, module)
    assert report.fresh == HEAD
    assert not (report.missing)
    assert not (report.unexpected)
    assert not (report.wrong)
    assert {name for name, _, _ in report.mismatched} == set(HEAD)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before.get(name, STATE[name]))
    assert "4.weight is (3, 4) in the file, (5, 4) here" in str(report)


@pytest.mark.parametrize("gone", HEAD)
def test_a_head_of_which_a_part_fits_is_left_as_a_whole(gone):
    for content in (
        {name: value for name, value in STATE.items() if name != gone},
        {**STATE, gone: torch.zeros(7, *STATE[gone].shape[1:])},
    ):
        module = network(classes=3, width=4)
        nn.init.constant_(module[4].weight, 0.5), nn.init.constant_(module[4].bias, 0.5)
        report = load(content, module)
        assert report.fresh == HEAD
        assert set(report.loaded) == STATE.keys() - set(HEAD)
        assert bool((module[4].weight == 0.5).all())
        assert bool((module[4].bias == 0.5).all())
        assert not report.missing


def test_a_fitting_head_is_loaded():
    module = network()
    nn.init.zeros_(module[4].weight)
    report = load(STATE, module)
    assert (report.fresh, report.head) == ((), HEAD)
    assert "the head, too, came from the file (2): 4.weight; 4.bias" in str(report)
    assert load(STATE, network(classes=5)).head == ()
    assert torch.equal(module[4].weight, STATE["4.weight"])


def test_counters_of_batchnorm_may_be_missing_and_nothing_else():
    content = {name: value for name, value in STATE.items() if "num_batches" not in name}
    module = network()
    module[1].num_batches_tracked += 3
    report = load(content, module)
    assert not report.missing
    assert int(module[1].num_batches_tracked) == 3
    del content["1.running_mean"]
    with pytest.raises(ValueError, match=r"Not all of the backbone[\s\S]*missing in the file \(1\): 1.running_mean"):
        load(content, network())


def test_what_the_module_lacks_is_only_reported():
    content = {**STATE, "decoder.weight": torch.zeros(2), "extra": "text", "4.n": 3}
    report = load(content, network())
    assert report.unexpected == ("decoder.weight", "extra", "4.n")


def blocks(depth):
    """Names as timm gives them: a stem, blocks, a norm, a head."""
    names = ["stem.weight", *(f"blocks.{i}.{part}" for i in range(depth) for part in "abc"), "norm.weight"]
    return {name: torch.zeros(2) for name in [*names, "fc.weight"]}


@pytest.mark.parametrize("order", [list, sorted], ids=["as built", "as safetensors sorts"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_deeper_network_of_the_same_names_is_another_model_and_a_little_more_is_not(order, prefix):
    own = prefixed(prefix, blocks(4))
    backbone = [name for name in own if "fc" not in name]

    def report(content):
        content = prefixed(prefix, content)
        return fit_state({name: content[name] for name in order(content)}, own, (f"{prefix}fc.weight",))[1]

    deeper = report(blocks(6))
    assert len(deeper.surplus) == 6
    with pytest.raises(ValueError, match=r"of another model: 6 tensors stand among[\s\S]*in the file only \(6\)"):
        require_fit(deeper, backbone)
    require_fit(deeper, backbone, strict=False)
    require_fit(report(blocks(4) | {"blocks.0.mask": torch.zeros(1), "blocks.1.mask": torch.zeros(1)}), backbone)
    with pytest.raises(ValueError, match="missing in the file"):
        require_fit(report(blocks(3)), backbone)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_extras_beside_the_network_are_no_other_model(prefix):
    copy, own = blocks(4), prefixed(prefix, blocks(4))
    beside = prefixed("average.", copy) | prefixed("projector.", blocks(2)) | prefixed("zloss.", blocks(2))
    for content in (beside | copy, copy | beside, dict(sorted((copy | beside).items()))):
        report = fit_state(prefixed(prefix, content), own)[1]
        assert len(report.unexpected) == len(beside)
        assert not report.surplus
        require_fit(report, own)


@pytest.mark.parametrize("stem", [[], ["stem"]])
def test_the_end_of_a_network_may_stay_away(stem):
    layers = {f"{part}.weight": torch.zeros(2) for part in [*stem, *(f"net.{i}" for i in range(6))]}
    own = {name: layers[name] for name in list(layers)[:3]}
    require_fit(fit_state(layers, own)[1], own)


def test_counters_of_another_kind_are_as_good_as_absent():
    content = {name: value.half() for name, value in STATE.items()}
    module = network()
    module[1].num_batches_tracked += 3
    report = load(content, module)
    assert set(report.loaded) == STATE.keys() - {"1.num_batches_tracked"}
    assert (report.missing, report.mismatched, report.unexpected) == ((), (), ())
    assert int(module[1].num_batches_tracked) == 3


def test_a_part_that_the_file_is_not_about_stays_as_it_is():
    module = nn.ModuleDict({"backbone": network(), "criterion": nn.Linear(2, 2)})
    fitting, report = fit_state(STATE, module.state_dict())
    assert report.module_prefix == "backbone."
    assert report.fresh == ("criterion.weight", "criterion.bias")
    assert len(fitting) == len(STATE)


@pytest.mark.parametrize(("lost", "strict", "loads"), [(1, True, False), (1, False, True), (7, False, False)])
def test_how_much_of_the_backbone_must_fit(lost, strict, loads):
    backbone = [name for name in STATE if name not in HEAD]
    content = {name: value for i, (name, value) in enumerate(STATE.items()) if i >= lost}
    report = fit_state(content, network().state_dict(), HEAD)[1]
    assert len(report.missing) == lost - (lost > 6)  # one of them is a counter
    if loads:
        require_fit(report, backbone, strict)
    else:
        with pytest.raises(ValueError, match="missing in the file"):
            require_fit(report, backbone, strict)


def test_half_of_the_backbone_is_enough_when_not_strict_and_less_is_not():
    names = [f"{i}.weight" for i in range(5)]
    own = {name: torch.zeros(2) for name in names}
    for count in range(5):
        report = fit_state({name: torch.ones(2) for name in names[:count]} | {"x": torch.ones(1)}, own)[1]
        if count >= 3:
            require_fit(report, names, strict=False)
        else:
            with pytest.raises(ValueError, match=f"of another model: {count} of 5 tensors"):
                require_fit(report, names, strict=False)


def test_another_shape_in_the_backbone_is_an_error_with_both_shapes():
    content = {**STATE, "0.weight": torch.zeros(4, 1, 3, 3)}
    with pytest.raises(ValueError, match=r"0.weight is \(4, 1, 3, 3\) in the file, \(4, 2, 3, 3\) here"):
        load(content, network())


def test_whole_numbers_are_not_loaded_as_weights():
    content = {**STATE, "0.weight": torch.zeros(4, 2, 3, 3, dtype=torch.int8)}
    with pytest.raises(ValueError, match=r"0.weight is \(4, 2, 3, 3\) of int8 in the file"):
        load(content, network())


def test_types_become_the_modules_and_what_came_in_is_left_alone():
    content = {name: value.half() if value.is_floating_point() else value for name, value in STATE.items()}
    before = {name: value.clone() for name, value in content.items()}
    module = network().double()
    load(content, module)
    assert {value.dtype for value in module.parameters()} == {torch.float64}
    assert torch.equal(module[0].weight, content["0.weight"].double())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert all(
        torch.equal(content[name], before[name]) and content[name].dtype == before[name].dtype for name in before
    )


def test_the_report_is_short_and_says_everything():
    many = tuple(f"layer{i}.weight" for i in range(40))
    report = WeightReport(
        "r.pt", ("a",), ("fc.bias",), many, ("x",), (("c", "(1,)", "(2,)"), ("fc.bias", "(3,)", "(4,)")), "net.", "m."
    )
    assert str(report).splitlines() == [
        "r.pt: 1 of 43 tensors loaded, from 'net' in the file, into 'm' of the module",
        "  missing in the file (40): layer0.weight; layer1.weight; layer2.weight; layer3.weight; layer4.weight and 35 more",
        "  other shape or kind (1): c is (1,) in the file, (2,) here",
        "  left as they were (the head, or another part) (1): fc.bias is (3,) in the file, (4,) here",
        "  in the file only (1): x",
    ]
    assert str(WeightReport("r.pt", ("a", "b"))) == "r.pt: 2 of 2 tensors loaded"


def test_lists_are_shortened_from_six_on():
    assert shortened("abcde") == "a; b; c; d; e"
    assert shortened("abcdef") == "a; b; c; d; e and 1 more"
    assert shortened("") == ""


def test_the_head_is_the_last_layer_where_it_can_be_one():
    linear, pointwise = nn.Linear(4, 2), nn.Conv2d(4, 2, 1)
    assert last_layer(nn.Sequential(nn.Linear(4, 4), linear)) == [linear]
    assert last_layer(nn.Sequential(nn.Linear(4, 4), pointwise, nn.AdaptiveAvgPool2d(1))) == [pointwise]
    for last in (nn.Conv2d(4, 2, 3), nn.LayerNorm(4), nn.Embedding(3, 4)):
        assert last_layer(nn.Sequential(nn.Linear(4, 4), last)) == []
    assert last_layer(nn.ReLU()) == []


def test_a_head_that_would_be_everything_is_none():
    linear = nn.Linear(4, 2)
    assert head_names(linear, [linear]) == frozenset()


def test_heads_are_found_in_torchvision_and_timm_or_at_a_path():
    one, other = resnet18(), timm.create_model("convnext_atto")
    assert find_heads(one) == [one.fc]
    assert find_heads(nn.Sequential(other)) == [other.head.fc]
    assert find_heads(one, "layer4.1") == [one.layer4[1]]
    assert find_heads(nn.Sequential(nn.BatchNorm2d(3))) == []
    with pytest.raises(ValueError, match=r"`head` to be the path of a submodule, but ResNet has no 'nothing'.*'fc'"):
        find_heads(one, "nothing")
