import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from lightning.pytorch import Callback

from lightning_speedups import cli
from lightning_speedups.measure import ARMS, Arm, Ingredients, Settings

TINY = ["compare", "--samples=64", "--test-samples=30", "--epochs=1", "--batch-size=16", "--width=4", "--seeds=1"]


def test_compare_prints_the_table_and_writes_the_files(tmp_path, capsys):
    assert cli.main([*TINY, "--arms", "plain, smoothing", "--out", str(tmp_path / "out"), "--lr=0.03"]) == 0
    out = capsys.readouterr().out
    assert "speed-up" in out
    assert "smoothing" in out
    assert "out/compare.png" in out
    document = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert document["settings"]["lr"] == 0.03
    assert document["settings"]["batch_size"] == 16
    assert [run["arm"] for run in document["runs"]] in (["plain", "smoothing"], ["smoothing", "plain"])


def test_compare_on_a_file_with_a_timm_model(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "my.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    arguments = [*TINY, "--data", "my.npz", "--model=mobilenetv3_small_050", "--arms=plain", "--no-progress"]
    assert cli.main([*arguments, "--samples=20", "--target=0.1"]) == 0
    captured = capsys.readouterr()
    assert "mobilenetv3_small_050 on my.npz" in captured.out
    assert captured.err == ""
    document = json.loads((tmp_path / "compare-results" / "compare.json").read_text())
    assert document["settings"]["samples"] == 20
    assert document["settings"]["target"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["compere"], "invalid choice: 'compere'"),
        (["compare", "--bogus"], "unrecognized arguments: --bogus"),
        (["compare", "--seeds", "many"], "--seeds: invalid int value: 'many'"),
        (["compare", "--seeds", "0"], "Expected --seeds to be a whole number in [1, 100], but got 0."),
        (["compare", "--epochs", "-1"], "--epochs to be"),
        (["compare", "--lr", "nan"], "--lr to be"),
        (["compare", "--target", "95"], "--target to be a number in (0, 1], but got 95"),
        (["compare", "--batch-size", "1000000"], "--batch-size to be"),
        (["compare", "--arms", "plain,mixip"], "unknown arm 'mixip': did you mean 'mixup'?"),
        (["compare", "--arms", ","], "no arm to train"),
        (
            ["compare", "--model", "resnet19"],
            "--model to be the name of a timm network, but got 'resnet19'. Did you mean resnet18",
        ),
        (["compare", "--weights", "gone.pt", "--arms=freeze"], "There is no file gone.pt"),
        (["compare", "--weights", "broken.npz", "--arms=freeze"], "Can't load weights from broken.npz"),
        (
            ["compare", "--weights", "broken.npz", "--arms=plain"],
            "--weights is what finetune and freeze start from, but neither is among the arms",
        ),
        (["compare", "--data", "nowhere.npz"], "can't read nowhere.npz as an .npz file"),
        (["compare", "--data", "broken.npz"], "can't read broken.npz as an .npz file"),
        (["compare", "--data", "folder"], "must hold train/CLASS/* and test/CLASS/*"),
        (["compare", "--out", "broken.npz"], "can't write to the folder broken.npz"),
        (["compare", "--accelerator", "abacus"], "--accelerator to be 'auto', 'cpu', "),
        (["compare", "--image-size", "32"], "--image-size is for folders"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 but no more")
    (tmp_path / "folder").mkdir()
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lightning-speedups")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["compare"]) == 2
    assert capsys.readouterr().err == (
        "lightning-speedups compare: error: rich.console is not installed: pip install 'lightning-speedups[bench]'\n"
    )


def test_ctrl_c_gives_130_the_table_and_the_files(monkeypatch, tmp_path, capsys):
    class Bomb(Callback):
        def on_train_start(self, trainer, module):
            if trainer.limit_train_batches == 1.0:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setitem(ARMS, "bomb", Arm("bomb", "presses Ctrl-C", lambda at: Ingredients([Bomb()])))
    assert cli.main([*TINY, "--arms=plain,bomb"]) == 130
    out = " ".join(capsys.readouterr().out.split())
    assert "Interrupted: bomb, seed 0, has 0 epochs" in out
    assert (tmp_path / "compare-results" / "compare.png").exists()
    assert json.loads((tmp_path / "compare-results" / "compare.json").read_text())["interrupted"] is True


def test_ctrl_c_before_anything_was_measured(monkeypatch, capsys):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_speedups.measure.tasks.digit_collages", pressed)
    assert cli.main(["compare"]) == 130
    assert "nothing measured" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["--version"], ["compare", "--seeds=x"]])
def test_what_can_be_told_at_once_is_told_without_an_import_of_torch_or_the_package(arguments):
    code = f"import lightning_speedups_command, sys; lightning_speedups_command.main({arguments}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout + done.stderr) > 100
    assert not {"torch", "lightning", "lightning_speedups", "rich"} & set(done.stdout.splitlines()[-1].split())


def test_the_package_is_a_command_too():
    command = [sys.executable, "-m", "lightning_speedups", "compare", "--seeds=x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("lightning-speedups compare: error: argument --seeds")


def test_a_terminal_is_told_what_is_done_and_a_pipe_is_not(monkeypatch, capsys):
    arguments = [*TINY, "--arms=plain"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().err
    told = ["importing torch and Lightning", "getting the data", "warming up", "first run", "seed 0, plain"]
    assert sorted(told, key=shown.index) == told
    assert cli.main([*arguments, "--no-progress"]) == 0
    assert capsys.readouterr().err == ""


def test_help_version_and_arms(capsys):
    assert cli.main(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--quick", "--arms", "--data", "--model", "--weights", "--seeds", "--target", "--out", "--threads"):
        assert option in shown
    for one in dataclasses.fields(Settings):
        assert f"--{one.name.replace('_', '-')}" in shown
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lightning-speedups 0.")
    assert cli.main(["compare", "--list-arms"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ARMS)
