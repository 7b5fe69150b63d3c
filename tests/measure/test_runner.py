import json
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_speedups.measure import ARMS, Arm, CompareError, ImageData, Ingredients, Settings, compare
from lightning_speedups.measure.digits import digit_collages
from lightning_speedups.measure.networks import build_network
from lightning_speedups.measure.progress import Bar
from lightning_speedups.measure.runner import interleaved

TINY = {"samples": 80, "test_samples": 40, "epochs": 2, "batch_size": 16, "width": 4, "accelerator": "cpu"}


def tiny(arms, **options):
    return compare(arms=arms, progress=False, **(TINY | options))


class Spy(Callback):
    """Notes the weights a run starts from, and its batches; sees no run of the warm-up."""

    def __init__(self, log, at):
        self.notes, self.at = log, at

    def on_train_start(self, trainer, module):
        if trainer.limit_train_batches == 1.0:
            self.start = [value.clone() for value in module.model.state_dict().values()]
            self.batches = []
            self.notes.append(self)

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.limit_train_batches == 1.0:
            self.batches.append(batch[0].clone())


@pytest.fixture
def spies(monkeypatch):
    """Two arms that differ in their loss and note what they see."""
    log = []
    for name, criterion in (("spy", nn.CrossEntropyLoss), ("other", lambda: nn.CrossEntropyLoss(label_smoothing=0.3))):
        arm = Arm(name, "notes", lambda at, criterion=criterion: Ingredients([Spy(log, at)], {}, criterion()))
        monkeypatch.setitem(ARMS, name, arm)
    return log


@pytest.fixture
def bomb(monkeypatch):
    """An arm that presses Ctrl-C at the start of an epoch."""

    def arm(epoch):
        class Bomb(Callback):
            def on_train_epoch_start(self, trainer, module):
                if trainer.current_epoch == epoch and trainer.limit_train_batches == 1.0:
                    signal.raise_signal(signal.SIGINT)

        monkeypatch.setitem(ARMS, "bomb", Arm("bomb", "Ctrl-C", lambda at: Ingredients([Bomb()])))

    return arm


def test_arms_of_a_seed_start_from_the_same_weights_and_see_the_same_batches(spies):
    result = tiny(["spy", "other"], seeds=2)
    by = {(run.arm, run.seed): None for run in result.runs if run.arm != "plain"}
    for key, spy in zip(by, spies, strict=True):
        by[key] = spy
        assert spy.at.seed == key[1]
        assert len(spy.batches) == 2 * 5
    for seed in (0, 1):
        one, two = by["spy", seed], by["other", seed]
        assert all(map(torch.equal, one.start, two.start))
        assert all(map(torch.equal, one.batches, two.batches))
    assert not torch.equal(by["spy", 0].start[0], by["spy", 1].start[0])
    assert not torch.equal(by["spy", 0].batches[0], by["spy", 1].batches[0])
    assert not torch.equal(by["spy", 0].batches[0], by["spy", 0].batches[5])  # the epochs are shuffled anew
    points = {(run.arm, run.seed): run.points for run in result.runs}
    for key in (("spy", 0), ("spy", 1)):
        # "spy" adds nothing: it must train like plain, point by point
        assert [p.test_loss for p in points[key]] == [p.test_loss for p in points["plain", key[1]]]
    assert points["other", 0][-1].test_loss != points["spy", 0][-1].test_loss


def test_the_pretrained_pair_starts_from_one_pretrained_backbone(spies, monkeypatch):
    build = ARMS["spy"].build
    for name, baseline in (("base", None), ("with_trick", "base")):
        monkeypatch.setitem(ARMS, name, Arm(name, "notes", build, baseline, pretrained=True))
    result = tiny(["spy", "base", "with_trick"], seeds=1)
    start = {run.arm: None for run in result.runs if run.arm != "plain"}
    for arm, spy in zip(start, spies, strict=True):
        start[arm] = spy.start
    assert all(map(torch.equal, start["base"], start["with_trick"]))
    same = [torch.equal(a, b) for a, b in zip(start["base"], start["spy"], strict=True)]
    assert same[-2:] == [True, True]  # the seed's own classifier
    assert not any(same[:-2:6])  # every convolution was pretrained
    runs = {run.arm: run for run in result.runs}
    assert runs["base"].pretrain_seconds == runs["with_trick"].pretrain_seconds > 0
    assert runs["spy"].pretrain_seconds == 0
    assert runs["base"].points[0].epoch == 1


@pytest.mark.parametrize("model", ["convnet", "mobilenetv3_small_050"])
def test_given_weights_stand_for_the_pretraining(model, spies, monkeypatch):
    build = ARMS["spy"].build
    for name, baseline in (("base", None), ("with_trick", "base")):
        monkeypatch.setitem(ARMS, name, Arm(name, "notes", build, baseline, pretrained=True))
    data = digit_collages(80, 40)
    four = ImageData("f", data.x_train, data.y_train % 4, data.x_test, data.y_test % 4, 4)
    source = build_network(model, four, width=4).state_dict()
    torch.save(source, "w.pt")
    result = tiny(["spy", "with_trick"], seeds=2, epochs=1, model=model, weights="w.pt")
    start = {(run.arm, run.seed): None for run in result.runs if run.arm != "plain"}
    for key, spy in zip(start, spies, strict=True):
        start[key] = spy.start
    names = list(source)
    backbone = [i for i, name in enumerate(names) if not name.startswith(("head.", "classifier."))]
    assert len(backbone) == len(names) - 2
    for seed in (0, 1):
        assert all(map(torch.equal, start["base", seed], start["with_trick", seed]))
        assert all(torch.equal(start["base", seed][i], source[names[i]]) for i in backbone)
        assert all(map(torch.equal, start["base", seed][-2:], start["spy", seed][-2:]))  # the seed's own classifier
        assert not torch.equal(start["spy", seed][0], source[names[0]])
    assert {run.pretrain_seconds for run in result.runs} == {0.0}
    assert (result.settings["weights"], result.settings["pretrain_epochs"]) == ("w.pt", None)


def test_runs_are_interleaved_seed_by_seed():
    arms = [ARMS[name] for name in ("plain", "warmup", "onecycle", "mixup", "smoothing")]
    order = interleaved(arms, range(4))
    assert [seed for seed, _ in order] == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    rounds = [[arm.name for _, arm in order[5 * seed : 5 * seed + 5]] for seed in range(4)]
    assert all(sorted(names) == sorted(arm.name for arm in arms) for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    assert order == interleaved(arms, range(4))


def test_single_tricks_run_with_the_first_seed_only_if_no_arms_were_named():
    arms = [ARMS[name] for name in ("plain", "fast", "onecycle")]
    full, once = interleaved(arms, range(5, 8)), interleaved(arms, range(5, 8), once=True)
    assert [run for run in full if run[0] == 5 or not run[1].single] == once
    assert sorted(arm.name for seed, arm in once if seed == 5) == ["fast", "onecycle", "plain"]
    assert sorted((seed, arm.name) for seed, arm in once if seed > 5) == [
        (6, "fast"), (6, "plain"), (7, "fast"), (7, "plain"),
    ]  # fmt: skip


def test_singles_of_a_comparison(monkeypatch):
    for name in list(ARMS):
        monkeypatch.delitem(ARMS, name) if name not in ("plain", "onecycle", "smoothing") else None
    counted = {"plain": 2, "onecycle": 1}
    result = tiny(None, seeds=2, epochs=1)
    assert {name: len(result.complete(name)) for name in counted} == counted
    assert result.settings["singles"] == ["onecycle"]
    assert {run.seed for run in result.complete("onecycle")} == {0}
    assert len(tiny(["onecycle"], seeds=2, epochs=1).complete("onecycle")) == 2


def test_the_bar_counts_the_samples_of_all_runs(monkeypatch):
    begun, counts = {}, []
    monkeypatch.setattr(Bar, "begin", lambda self, what, parts: begun.update({what: parts}))
    advance = Bar.advance
    monkeypatch.setattr(Bar, "advance", lambda self, task, parts=1: (counts.append(parts), advance(self, task, parts)))
    tiny(["plain", "short"], seeds=2, epochs=4)
    assert begun["first run"] == 80 * 2 * (4 + 3)
    assert sum(count for count in counts if count > 1) == begun["first run"]


def test_an_arm_with_a_loader_of_its_own_is_counted_by_what_it_hands_out(monkeypatch):
    seen = {}

    def build(at):
        loader = DataLoader(TensorDataset(at.data.x_train[:50], at.data.y_train[:50]), 10)
        seen["images"] = at.data.x_train.dtype
        return Ingredients(loader=loader)

    monkeypatch.setitem(ARMS, "own", Arm("own", "", build))
    result = tiny(["own"], seeds=1)
    assert seen["images"] == torch.uint8
    assert [point.samples for point in result.complete("own")[0].points] == [50, 100]


def test_a_comparison_from_end_to_end(tmp_path):
    seen = []
    result = tiny(
        ["smoothing"], seeds=2, out=tmp_path / "new" / "folder", on_run=lambda so_far: seen.append(len(so_far.runs))
    )
    assert seen == [1, 2, 3, 4]
    assert {(run.arm, run.seed, run.complete, len(run.points)) for run in result.runs} == {
        (arm, seed, True, 2) for arm in ("plain", "smoothing") for seed in (0, 1)
    }
    document = json.loads((tmp_path / "new" / "folder" / "compare.json").read_text())
    assert document == json.loads(result.to_json())
    assert document["settings"]["samples"] == 80
    assert document["settings"]["arms"].keys() == {"plain", "smoothing"}
    assert document["versions"]["torch"] == torch.__version__
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["cpu"]
    assert document["interrupted"] is False
    for run in document["runs"]:
        first, last = run["points"]
        assert 0 < first["seconds"] < last["seconds"]
        assert (first["samples"], last["samples"]) == (80, 160)
        assert 0 <= last["accuracy"] <= 1
    assert sorted(entry.name for entry in (tmp_path / "new" / "folder").iterdir()) == ["compare.json", "compare.png"]
    assert result.summary("plain").reached == 2  # by the definition of the target
    assert result.table().row_count == 2


@pytest.mark.slow
def test_every_arm_trains():
    result = tiny(list(ARMS), seeds=1, samples=128, epochs=4)
    assert {run.arm for run in result.runs if run.complete} == set(ARMS)
    lengths = dict.fromkeys(ARMS, 4) | {
        "tuned": 2,
        "onecycle": 2,
        "short": 3,
        "fast": 4,
    }  # fast is looked at within its epoch
    assert {run.arm: len(run.points) for run in result.runs} == lengths
    assert result.table().row_count == len(ARMS)


@pytest.mark.filterwarnings("ignore:FastStart finds no convolutions to begin as the identity")
@pytest.mark.filterwarnings("ignore:CyclicMomentum. a cycle of 1.5 optimizer steps is too short")
@pytest.mark.filterwarnings("ignore:FreezeBackboneFinetune thaws or freezes layers in epoch 1, but the run ends before")
@pytest.mark.slow
def test_every_arm_trains_a_timm_model():
    result = tiny(list(ARMS), seeds=1, samples=96, epochs=1, model="mobilenetv3_small_050")
    assert {run.arm for run in result.runs if run.complete} == set(ARMS)


def test_own_images_are_taken_as_they_are():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, 3, 16, 16), generator=g, dtype=torch.uint8)
    labels = torch.arange(64) % 2
    images[labels == 1] //= 2
    data = ImageData("halves", images, labels, images, labels, 2)
    result = compare(
        data, ["plain"], progress=False, **(TINY | {"samples": None, "test_samples": None, "epochs": 10, "seeds": 1})
    )
    assert result.settings["image"] == [3, 16, 16]
    assert result.settings["data"] == "halves"
    assert result.chance == 0.5
    assert result.runs[0].points[-1].accuracy > 0.9


def test_options_win_over_settings_and_one_arm_needs_no_list():
    settings = Settings(seeds=1, epochs=1, samples=64, test_samples=30, batch_size=16, width=4)
    result = compare(arms="plain", settings=settings, epochs=2, progress=False)
    assert [len(run.points) for run in result.runs] == [2]


def test_ctrl_c_leaves_what_was_measured(bomb, tmp_path):
    bomb(1)
    handler = signal.getsignal(signal.SIGINT)
    result = tiny(["plain", "bomb"], seeds=3, epochs=3, out=tmp_path)
    assert result.interrupted
    assert signal.getsignal(signal.SIGINT) is handler
    partial = result.runs[-1]
    assert (partial.arm, partial.complete, len(partial.points)) == ("bomb", False, 1)
    assert all(run.arm == "plain" and run.complete for run in result.runs[:-1])
    document = json.loads((tmp_path / "compare.json").read_text())
    assert document["interrupted"] is True
    assert [run["complete"] for run in document["runs"]] == [run.complete for run in result.runs]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_before_the_first_point(bomb, tmp_path):
    bomb(0)
    result = tiny(["bomb"], seeds=1, out=tmp_path)
    assert result.interrupted
    assert result.runs[-1].points == []
    assert (tmp_path / "compare.png").exists()
    result.table()


def test_results_so_far_are_on_disk_when_a_run_dies(monkeypatch, tmp_path):
    class Dies(Callback):
        def on_train_start(self, trainer, module):
            if trainer.limit_train_batches == 1.0:
                assert json.loads((tmp_path / "compare.json").read_text())["runs"][0]["arm"] == "plain"
                raise RuntimeError("out of luck")

    monkeypatch.setitem(ARMS, "dies", Arm("dies", "", lambda at: Ingredients([Dies()])))
    monkeypatch.setattr("lightning_speedups.measure.runner.random.Random.sample", lambda self, arms, k: list(arms))
    with pytest.raises(RuntimeError, match="out of luck"):
        tiny(["dies"], seeds=1, out=tmp_path)
    assert (tmp_path / "compare.json").exists()


def test_an_arm_that_can_not_run_is_found_before_anything_trains(monkeypatch, tmp_path):
    class Refuses(Callback):
        def setup(self, trainer, module, stage):
            raise MisconfigurationException("two owners\nof the learning rate")

    monkeypatch.setitem(ARMS, "refuses", Arm("refuses", "", lambda at: Ingredients([Refuses()])))
    with pytest.raises(CompareError, match="the arm 'refuses' can't run: two owners of the learning rate"):
        tiny(["refuses"], seeds=1, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_arm_that_nobody_named_is_left_out_if_it_can_not_run(monkeypatch):
    class Refuses(Callback):
        def setup(self, trainer, module, stage):
            raise MisconfigurationException("not with this network")

    for name in list(ARMS):
        monkeypatch.delitem(ARMS, name) if name not in ("plain", "smoothing") else None
    monkeypatch.setitem(ARMS, "refuses", Arm("refuses", "", lambda at: Ingredients([Refuses()])))
    result = tiny(None, seeds=1, epochs=1)
    assert [run.arm for run in result.runs] == list(result.baselines) == ["plain"]
    assert "Left out: the arm 'refuses' can't run: not with this network" in result.notes()
    assert list(json.loads(result.to_json())["settings"]["left_out"]) == ["refuses"]
    monkeypatch.setitem(ARMS, "plain", Arm("plain", "", lambda at: Ingredients([Refuses()]), baseline=None))
    with pytest.raises(CompareError, match="'plain' can't run"):
        tiny(None, seeds=1, epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 81}, "`batch_size` 81 is more than the 80 training images"),
        ({"image_size": 32}, "`image_size` is for folders"),
        ({"image_size": 32, "data": digit_collages(20, 20)}, "`image_size` is for folders"),
        ({"model": "resnet81"}, "`model` to be the name of a timm network"),
        ({"weights": "w.pt"}, "`weights` .* neither is among the arms"),
        ({"seeds": 0}, "`seeds`"),
        ({"data": "/nowhere"}, "can't read /nowhere .* no such file"),
        ({"out": "/dev/null/results"}, "can't write to the folder /dev/null/results"),
    ],
)
def test_what_can_not_be_done_is_refused(options, message):
    with pytest.raises(CompareError, match=message):
        tiny(["plain"], **options)


def test_threads_are_put_back():
    torch.set_num_threads(1)
    assert tiny(["plain"], seeds=1, epochs=1, threads=2).machine["threads"] == 2
    assert torch.get_num_threads() == 1
