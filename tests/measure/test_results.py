"""Numbers of the table, from runs whose times and accuracies were written by hand."""

import json
import math

import pytest
from rich.console import Console

from lightning_speedups.measure.results import Comparison
from lightning_speedups.measure.runs import Run
from lightning_speedups.measure.stopwatch import Point

ARMS = {"plain": None, "trick": "plain", "late": "plain", "finetune": None, "freeze": "finetune"}


def run(arm, seed, accuracies, seconds_per_epoch, **options):
    points = [
        Point(epoch, epoch * seconds_per_epoch, 100 * epoch, accuracy, 1.0, 2.0)
        for epoch, accuracy in enumerate(accuracies, 1)
    ]
    return Run(arm, seed, points, **{"complete": True, **options})


def comparison(*runs, **options):
    settings = {"model": "convnet", "data": "digits", "epochs": 3, "seeds": 2}
    return Comparison(ARMS, settings, {"load": 0.0, "cores": 2}, {"torch": "1"}, 0.2, runs=list(runs), **options)


@pytest.fixture
def result():
    return comparison(
        run("plain", 0, [0.5, 0.7, 0.9], 2.0),  # reaches .8 at 6 s
        run("plain", 1, [0.6, 0.8, 0.8], 2.0),  # reaches .8 at 4 s, and ends there
        run("trick", 1, [0.8, 0.8, 0.9], 2.5),  # 2.5 s: 1.6 times
        run("trick", 0, [0.5, 0.8, 0.9], 2.5),  # 5 s: 1.2 times
        run("late", 0, [0.1, 0.2, 0.3], 1.0),
        run("late", 1, [0.1, 0.2, 0.8], 1.0),  # 3 s: 4/3 times
        run("finetune", 0, [0.5, 0.6, 0.6], 3.0, pretrain_seconds=7.0),
        run("freeze", 0, [0.7, 0.7, 0.7], 1.0, pretrain_seconds=7.0),
    )


def text(result, width=100):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(result.table())
    return console.export_text()


def test_target_is_the_lowest_that_the_baseline_ended_with(result):
    assert result.target_of("plain") == result.target_of("trick") == 0.8
    assert result.target_of("freeze") == 0.6
    assert comparison(*result.runs, target=0.55).target_of("freeze") == 0.55


def test_the_speedup_is_paired_by_seed_not_by_order(result):
    row = result.summary("trick")
    assert (row.speedup.low, row.speedup.high) == pytest.approx((1.2, 1.6))
    assert row.speedup.median == pytest.approx(1.4)
    assert (row.seconds.low, row.seconds.high, row.reached, row.runs) == (2.5, 5.0, 2, 2)
    assert (row.epochs.low, row.epochs.high) == (1, 2)
    assert row.accuracy == pytest.approx(0.9)
    assert row.throughput.median == pytest.approx(40.0)


def test_a_run_that_does_not_arrive_counts(result):
    row = result.summary("late")
    assert row.reached == 1
    assert row.seconds.median == math.inf
    assert (row.speedup.low, row.speedup.high) == pytest.approx((0.0, 4 / 3))
    assert row.accuracy == pytest.approx(0.55)
    assert row.accuracy_std == pytest.approx(0.5 / math.sqrt(2))


def test_each_trick_is_measured_against_its_own_baseline(result):
    assert result.summary("freeze").speedup.median == pytest.approx(6.0)
    assert result.summary("finetune").speedup is None


def test_the_table_says_it_all(result):
    shown = text(result)
    lines = {line.split()[0]: line for line in shown.splitlines() if line.split()}
    assert "5.0 (4.0–6.0)" in lines["plain"]
    assert "85.0 ± 7.1" in lines["plain"]
    assert "1.40× (1.20–1.60)" in lines["trick"]
    assert lines["trick"].split()[3] == "1.5"  # epochs
    assert "not reached, 1 of 2" in lines["late"]
    assert "6.00×" in lines["freeze"]
    assert "Target of plain and the arms measured against it: 80.0 %" in shown
    assert "Target of finetune and the arms measured against it: 60.0 %" in shown
    assert "7.0 s a seed" in shown
    assert "chance" not in shown


def test_a_partial_run_is_noted_and_left_out(result):
    result.runs.append(run("trick", 2, [0.9], 0.1, complete=False))
    result.interrupted = True
    assert result.summary("trick").runs == 2
    assert "Interrupted: trick, seed 2, has 1 epoch" in " ".join(text(result).split())
    assert json.loads(result.to_json())["interrupted"] is True


def test_a_baseline_without_a_complete_run(result):
    result = comparison(run("trick", 0, [0.9], 1.0))
    assert result.target_of("trick") is None
    row = result.summary("trick")
    assert (row.speedup, row.seconds, row.runs) == (None, None, 1)
    assert "not run" in text(result)
    result.figure()


def test_a_target_that_only_the_trick_reaches():
    result = comparison(run("plain", 0, [0.5], 1.0), run("trick", 0, [0.9], 1.0), target=0.8)
    assert result.summary("trick").speedup.median == math.inf
    assert "only trick" in text(result)
    assert "as asked for" in text(result)


def test_no_better_than_chance_is_said():
    result = comparison(run("plain", 0, [0.2, 0.21], 1.0))
    assert "no better than chance (20.0 %)" in " ".join(text(result).split())


def test_a_busy_machine_is_said(result):
    assert "busy" not in text(result)
    result.machine["load"] = 1.7
    assert "busy" in text(result)


def test_diverged_runs_do_not_break_anything(result):
    result.runs[2] = run("trick", 1, [math.nan, math.nan, math.nan], 2.5)
    assert result.summary("trick").reached == 1
    text(result)
    result.figure()
    summary = {row["arm"]: row for row in json.loads(result.to_json())["summary"]}
    assert summary["trick"]["seconds"]["high"] is None


def test_json_round_trip(result, tmp_path):
    (tmp_path / "compare.json").write_text("an older one")
    path = result.save_json(tmp_path)
    document = json.loads(path.read_text())
    assert [entry.name for entry in tmp_path.iterdir()] == ["compare.json"]
    assert len(document["runs"]) == len(result.runs)
    assert document["runs"][0]["points"][2] == {
        "epoch": 3, "seconds": 6.0, "samples": 300, "accuracy": 0.9, "test_loss": 1.0, "train_loss": 2.0,
    }  # fmt: skip
    assert document["summary"][1]["speedup"]["median"] == pytest.approx(1.4)
    assert document["summary"][2]["seconds"]["median"] is None  # JSON knows no infinity
    assert document["machine"]["cores"] == 2


def test_the_figure_has_a_named_line_for_each_arm(result, tmp_path):
    axes = result.figure().axes[0]
    named = {line.get_label().split()[0]: line for line in axes.lines if not line.get_label().startswith("_")}
    assert set(named) == set(ARMS)
    assert list(named["trick"].get_xdata()) == [2.5, 5.0, 7.5]
    assert list(named["trick"].get_ydata()) == pytest.approx([65.0, 80.0, 90.0])
    legend = [entry.get_text() for entry in axes.get_legend().get_texts()]
    assert legend[0] == "trick  90.0 %"
    assert legend[-1] == "late  55.0 %"
    path = result.save_figure(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_figure_has_a_logarithmic_axis_and_single_tricks_are_pale(result):
    result.settings["singles"] = ["trick"]
    axes = result.figure().axes[0]
    assert axes.get_xscale() == "log"
    named = {line.get_label().split()[0]: line for line in axes.lines if not line.get_label().startswith("_")}
    assert named["trick"].get_alpha() < named["late"].get_alpha() == named["plain"].get_alpha()
    assert named["trick"].get_linewidth() < named["late"].get_linewidth()


@pytest.fixture
def rivals(monkeypatch):
    monkeypatch.setitem(ARMS, "tuned", "plain")
    monkeypatch.setitem(ARMS, "fast", "plain")
    return [
        run("tuned", 0, [0.5, 0.7, 0.9], 2.0),  # reaches .8 at 6 s
        run("tuned", 1, [0.6, 0.8, 0.8], 2.0),  # at 4 s, the lowest end
        run("fast", 1, [0.8], 2.5),  # 1.6 times
        run("fast", 0, [0.5, 0.9], 1.0),  # 3 times
    ]


def test_fast_against_tuned_at_the_lowest_end_of_tuned(rivals):
    result = comparison(*rivals)
    assert result.target_of("fast") is None  # plain did not run
    times = result.sooner("fast", "tuned")
    assert (times.low, times.median, times.high) == pytest.approx((1.6, 2.3, 3.0))
    assert "fast reaches what tuned ends with 2.30 (1.60–3.00) times sooner." in result.notes()


def test_one_seed_has_no_range(rivals):
    assert "fast reaches what tuned ends with 3.00 times sooner." in comparison(rivals[0], rivals[3]).notes()


def test_no_word_of_fast_if_it_does_not_get_there_or_is_missing(rivals):
    late = comparison(*rivals[:3], run("fast", 0, [0.5, 0.7], 1.0))
    assert late.sooner("fast", "tuned").low == 0
    for result in (late, comparison(*rivals[:2]), comparison(*rivals[2:])):
        assert not [note for note in result.notes() if note.startswith("fast")]
    assert comparison(*rivals[2:]).sooner("fast", "tuned") is None
    assert comparison(rivals[0], rivals[2]).sooner("fast", "tuned") is None  # no seed of both


def test_nothing_measured_at_all():
    result = comparison()
    text(result)
    result.figure()
    assert json.loads(result.to_json())["runs"] == []


# ---- by loss


@pytest.fixture
def by_loss():
    """Runs of which lower is better."""

    def of(arm, seed, losses, seconds):
        points = [Point(1, i * seconds, 1_000_000 * i, 0.5, loss, 2.0) for i, loss in enumerate(losses, 1)]
        return Run(arm, seed, points, complete=True)

    runs = [
        of("plain", 0, [3.0, 2.0, 1.5], 2.0),  # reaches 1.6 at 6 s
        of("plain", 1, [3.0, 1.55, 1.6], 2.0),  # at 4 s, and ends there
        of("trick", 1, [1.6, 1.6, 1.0], 2.5),  # at 2.5 s: 1.6 times
        of("trick", 0, [2.0, 1.59, 1.2], 2.5),  # at 5 s: 1.2 times
        of("late", 0, [3.0, 2.0, 1.61], 1.0),
        of("late", 1, [math.nan, 2.0, 1.9], 1.0),
    ]
    return comparison(*runs, metric="test_loss")


def test_the_target_of_losses_is_the_highest_that_the_baseline_ended_with(by_loss):
    assert by_loss.target_of("plain") == by_loss.target_of("trick") == 1.6
    assert comparison(*by_loss.runs, target=1.0, metric="test_loss").target_of("trick") == 1.0


def test_lower_is_reached_sooner(by_loss):
    row = by_loss.summary("trick")
    assert (row.speedup.low, row.speedup.high) == pytest.approx((1.2, 1.6))
    assert (row.seconds.low, row.seconds.high, row.reached) == (2.5, 5.0, 2)
    assert (row.samples.low, row.samples.high) == (1_000_000, 2_000_000)
    assert (row.loss, row.loss_std) == pytest.approx((1.1, 0.1414), rel=1e-3)
    assert by_loss.summary("late").reached == 0
    assert by_loss.sooner("trick", "plain").median == pytest.approx(1.4)


def test_the_table_of_losses(by_loss):
    by_loss.chance = 3.1
    shown = text(by_loss)
    lines = {line.split()[0]: line for line in shown.splitlines() if line.split()}
    assert "5.0 (4.0–6.0)" in lines["plain"]
    assert "1.550 ± 0.071" in lines["plain"]
    assert "1.40× (1.20–1.60)" in lines["trick"]
    assert lines["trick"].split()[3] == "1.50"  # million tokens
    assert "Target of plain and the arms measured against it: 1.600, the highest that a run of plain" in shown
    assert "chance" not in shown
    by_loss.chance = 1.6
    assert "no better than chance (1.600)" in " ".join(text(by_loss).split())


def test_the_figure_of_losses(by_loss):
    axes = by_loss.figure().axes[0]
    assert axes.get_ylabel() == "validation loss"
    named = {line.get_label().split()[0]: line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(named["trick"].get_ydata()) == pytest.approx([1.8, 1.595, 1.1])
    assert [entry.get_text() for entry in axes.get_legend().get_texts()][-1] == "trick  1.100"
    assert "target 1.600" in [one.get_text() for one in axes.texts]


def test_results_without_a_metric_go_by_accuracy(result):
    old = json.loads(result.to_json())
    del old["metric"]
    given = {name: old[name] for name in ("baselines", "settings", "machine", "versions", "chance", "target")}
    runs = [Run(**{**run, "points": [Point(**point) for point in run["points"]]}) for run in old["runs"]]
    again = Comparison(**given, runs=runs)
    assert again.goal.name == "accuracy"
    assert again.summaries() == result.summaries()
