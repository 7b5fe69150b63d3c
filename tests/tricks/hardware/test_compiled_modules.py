"""What a compiled fit learns against a plain one, what it leaves behind, and what it says of its price."""

import logging
import pickle
import re
import shutil
from itertools import accumulate

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_every_trick import Setup
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from lightning_speedups import CompiledModules
from lightning_speedups.tricks.hardware import compiled_modules
from zoo import (
    Batches,
    Classifier,
    ReplayLoader,
    assert_same_weights,
    fit_interrupted,
    loader,
    resume,
    scaled,
    trainer,
    weights,
)


def EXAMPLE():
    return {"callbacks": [CompiledModules(backend="eager", plain_batches=2)]}


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs as they stand; counts them, and how often they run."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*inputs):
            self.runs += 1
            return graph.forward(*inputs)

        return run


def fails(graph, inputs):
    raise RuntimeError("no compiler here\nand much more of it")


def fails_backward(graph, inputs):
    return aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=fails)(graph, inputs)


class Block(nn.Module):
    """Has statistics, and draws."""

    def __init__(self, hidden=6):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(6, hidden, 1), nn.BatchNorm2d(hidden), nn.Dropout(0.1)
        self.back = nn.Conv2d(hidden, 6, 1)

    def forward(self, x):
        return x + self.back(self.drop(self.norm(self.conv(x)).relu()))


class Broken(Block):
    """Is not a single graph."""

    def forward(self, x):
        x = self.norm(x)
        torch._dynamo.graph_break()
        return super().forward(x)


class Deep(Classifier):
    """Its backbone has three blocks."""

    def __init__(self, block=Block, hidden=(6, 6, 6)):
        torch.manual_seed(1)
        super().__init__()
        blocks = [block(channels) for channels in hidden]
        self.backbone = nn.Sequential(nn.Conv2d(2, 6, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def fit(*callbacks, module=None, data=None, **arguments):
    module = module or Deep()
    torch.manual_seed(2)
    trainer(callbacks=[*callbacks], **arguments).fit(module, ReplayLoader() if data is None else data)
    return module


def check_close(one, other, **tolerance):
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, **tolerance)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_fit_learns_what_the_plain_one_learns(backend):
    compiled = fit(CompiledModules(backend=backend, plain_batches=3))
    check_close(fit(), compiled, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "arguments", [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}]
)
def test_so_it_does_with_accumulation_clipping_and_in_half_precision(arguments):
    backend = Counting()
    compiled = fit(CompiledModules(backend=backend, plain_batches=1), **arguments)
    check_close(fit(**arguments), compiled)
    assert backend.runs == 33


def test_so_it_does_under_a_scaler():
    compiled = fit(CompiledModules(backend="eager", plain_batches=1), plugins=scaled(), max_epochs=1)
    check_close(fit(plugins=scaled(), max_epochs=1), compiled)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_so_it_does_with_torchs_own_compiler():
    plain, compiled = Deep(), Deep()
    for module in (plain, compiled):
        for block in module.backbone[1:4]:
            block.drop.p = 0.0  # the compiler draws other numbers
    check_close(fit(module=plain), fit(CompiledModules(plain_batches=3), module=compiled), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("plain_batches", [0, 5])
def test_training_alone_is_compiled_and_not_in_the_first_batches(plain_batches):
    backend, module = Counting(), Deep()
    run = trainer(callbacks=[CompiledModules(backend=backend, plain_batches=plain_batches)], num_sanity_val_steps=2)
    run.fit(module, ReplayLoader(), loader())
    assert backend.runs == 3 * (12 - plain_batches)


def test_blocks_of_one_kind_share_a_graph_and_many_kinds_have_one_each():
    before = torch._dynamo.config.recompile_limit
    for hidden, graphs in (([6, 6, 6], 1), ([6, 6, *range(7, 18)], 12), ([6, 6, 4], 2)):
        backend = Counting()
        fit(CompiledModules(backend=backend, plain_batches=0), module=Deep(hidden=hidden))
        assert (backend.graphs, backend.runs) == (graphs, 12 * len(hidden))
    assert torch._dynamo.config.recompile_limit == before


def test_a_second_size_compiles_once_more_and_a_third_does_not():
    backend = Counting()
    batches = [(torch.randn(size, 2, 8, 8), torch.randint(0, 4, (size,))) for size in (8, 8, 4, 6, 5)]
    fit(CompiledModules(backend=backend, plain_batches=0), data=Batches(*batches))
    assert (backend.graphs, backend.runs) == (2, 45)


def test_given_modules_are_compiled_instead():
    backend = Counting()
    fit(CompiledModules(["backbone.1", "head"], backend=backend, plain_batches=0))
    assert (backend.graphs, backend.runs) == (2, 24)


@pytest.mark.parametrize("backend", [fails, fails_backward, "nonsense"])
def test_where_the_compiler_fails_one_warning_says_why_and_the_step_is_right(backend):
    why = "nonsense" if backend == "nonsense" else "RuntimeError: no compiler here$"
    with pytest.warns(UserWarning, match="^CompiledModules goes on without, as 3 × Block") as warned:
        compiled = fit(CompiledModules(backend=backend, plain_batches=2))
    assert re.search(f"do not compile: .*{why}", the_one(warned))
    check_close(fit(), compiled, rtol=0, atol=0)


def the_one(warned):
    """The warning of the trick, which is one, among Lightning's."""
    (text,) = [text for one in warned if (text := str(one.message)).startswith("CompiledModules")]
    return text


def test_blocks_of_several_graphs_run_in_parts_also_where_the_compiler_fails():
    with pytest.warns(UserWarning, match="no compiler") as warned:
        compiled = fit(CompiledModules(backend=fails, plain_batches=2), module=Deep(Broken))
    assert the_one(warned)
    plain = fit(module=Deep(Broken))
    check_close(plain, compiled, rtol=0, atol=0)
    check_close(plain, fit(CompiledModules(backend="eager", plain_batches=2), module=Deep(Broken)))


BESIDE = [
    "FreezeBackboneFinetune", "FreezeProgressively", "FeatureCache", "SubsetTraining", "MixupCallback",
    "BatchAugmentation", "ProgressiveResizing", "LabelSmoothingLoss", "SmoothingSchedule",
]  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_beside_other_tricks_it_changes_nothing(name):
    backend, one, other = Counting(), Setup(name), Setup(name)
    one.trainer().fit(one.module, ReplayLoader())
    other.callbacks.append(CompiledModules(["backbone", "head"], backend=backend, plain_batches=1))
    other.trainer().fit(other.module, ReplayLoader())
    check_close(one.module, other.module)
    assert backend.runs > 0


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_a_resumed_run_ends_with_the_same_bits(stop):
    """The backend rounds to another type, so that a batch which is not compiled in both runs shows."""

    def coarse(graph, inputs):
        return lambda *inputs: [part.bfloat16().float() for part in graph.forward(*inputs)]

    make = lambda: CompiledModules(backend=coarse, plain_batches=5)  # noqa: E731
    whole, parted = fit(make(), module=without_draws()), without_draws()
    fit_interrupted(parted, ReplayLoader(), stop, [make()])
    resume(parted, ReplayLoader(), [make()])
    assert_same_weights(weights(whole), weights(parted))
    with pytest.raises(AssertionError):
        assert_same_weights(weights(whole), weights(fit(module=without_draws())))


def without_draws():
    module = Deep()
    for block in module.backbone[1:4]:
        block.drop.p = 0.0
    return module


class Looks(Callback):
    """Pickles what is compiled, and notes what a checkpoint and the module itself name."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.save_checkpoint("at.ckpt")
        self.names = [*pl_module.state_dict()]
        self.twin = pickle.loads(pickle.dumps(pl_module.backbone))


def test_names_checkpoints_and_copies_know_nothing_of_it():
    looks, module = Looks(), Deep()
    names = [*module.state_dict()]
    fit(CompiledModules(backend="eager", plain_batches=0), looks, module=module)
    assert looks.names == names == [*torch.load("at.ckpt", weights_only=True)["state_dict"]]
    assert not any("_compiled_call_impl" in vars(part) for part in [*looks.twin.modules(), *module.modules()])
    assert_same_weights(weights(looks.twin), weights(module.backbone))


# ---- what it says


def said(caplog, monkeypatch, plain, compiled, **arguments):
    """The line that is logged when batches take these seconds."""
    ticks = accumulate([0.0, *(part for seconds in (*plain, *compiled) for part in (seconds, 0.0))][:-1])
    monkeypatch.setattr(compiled_modules, "_now", lambda _: next(ticks, 0.0))
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(CompiledModules(backend="eager", plain_batches=len(plain)), **arguments)
    (line,) = [record.message for record in caplog.records if record.message.startswith("CompiledModules")]
    return line


FIRST = [8.04, *[0.04] * 9]


def test_it_says_what_compiling_took_and_from_when_on_it_pays(caplog, monkeypatch):
    line = said(caplog, monkeypatch, [0.9, 0.05, 0.05], FIRST, max_epochs=-1, max_steps=810)
    assert line == (
        "CompiledModules: 3 × Block compiled in 8.0 s; a batch takes 40.0 instead of 50.0 ms: pays from batch 803 on."
    )


def test_it_says_so_if_that_is_beyond_the_end_of_the_run(caplog, monkeypatch):
    line = said(caplog, monkeypatch, [0.05] * 3, FIRST, max_epochs=5)
    assert line.endswith("would pay from batch 803 on, but the run has 20; leave it out.")


def test_it_says_so_if_compiled_batches_take_no_less(caplog, monkeypatch):
    assert said(caplog, monkeypatch, [0.03], FIRST).endswith("40.0 instead of 30.0 ms: never pays; leave it out.")


def test_without_plain_batches_it_compares_nothing(caplog, monkeypatch):
    assert said(caplog, monkeypatch, [], FIRST).endswith("compiled in 8.0 s; a batch takes 40.0 ms.")


def test_it_says_so_if_the_run_is_too_short(caplog, monkeypatch):
    assert "ended before" in said(caplog, monkeypatch, [0.03] * 10, FIRST)


def test_it_warns_where_blocks_are_passed_by():
    module = Deep()
    module.backbone.forward = lambda x: nn.Sequential.forward(module.backbone[4:], module.backbone[0](x))
    with pytest.warns(UserWarning, match="no block was called"):
        fit(CompiledModules(backend="eager", plain_batches=0), module=module)


def test_it_warns_if_there_is_nothing_to_compile():
    class Shallow(Classifier):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Flatten(), nn.Linear(128, 4)

    with pytest.warns(UserWarning, match="finds no module"):
        fit(CompiledModules(), module=Shallow())


# ---- what it refuses


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"backend": 3}, "backend"),
        ({"plain_batches": -1}, "plain_batches"),
        ({"plain_batches": 1.5}, "plain_batches"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, name):
    with pytest.raises(ValueError, match=f"Expected `{name}` to be"):
        CompiledModules(**arguments)


def test_what_cannot_be_compiled_is_refused_at_the_start(monkeypatch):
    with pytest.raises(MisconfigurationException, match="finds no module 'net' in Deep"):
        fit(CompiledModules("net"))
    with pytest.raises(MisconfigurationException, match="two such callbacks"):
        fit(CompiledModules("head"), type("Own", (CompiledModules,), {})("backbone"))
    module = Deep()
    module.head.compile(backend="eager")
    with pytest.raises(MisconfigurationException, match="`head` is compiled"):
        fit(CompiledModules(), module=module)
    monkeypatch.setattr("lightning_speedups.attach.copies.may_split_model", lambda _: True)
    with pytest.raises(MisconfigurationException, match="may split"):
        fit(CompiledModules())
