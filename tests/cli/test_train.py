"""``vssm train``: what a run leaves behind, the four commands, and what it says to a wrong configuration."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from small_runs import checkpoint, fit_process, image_folder, small_config, write_config
from tree import ROOT

from vssm.cli.train import main
from vssm.tasks.saving import AtomicCheckpointIO


def read(file):
    return yaml.safe_load(Path(file).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its folder and its configuration file."""
    root = tmp_path_factory.mktemp("run")
    config = small_config(image_folder(root / "data"))
    config["test_after_fit"] = "best"
    file = write_config(root / "small.yaml", config)
    assert main(["fit", "--config", file]) == 0
    return root / "runs" / "version_0", file


def test_a_run_leaves_its_configuration_metrics_pictures_and_checkpoints(run):
    folder, _ = run
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "curves.png", "confusion_matrix.png", "test_metrics.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "6"), ("1", "12")]
    assert list(rows[0]) == ["epoch", "step", "seconds", "lr", "train/loss", "val/acc1", "val/loss"]
    for picture in ("curves.png", "confusion_matrix.png"):
        with Image.open(folder / picture) as image:
            assert min(image.size) > 300


def test_the_last_line_is_the_test_accuracy_of_the_best_checkpoint(run, capfd):
    folder, file = run
    assert main(["test", "--config", file, "--ckpt_path", "best"]) == 0
    last = capfd.readouterr().out.strip().splitlines()[-1]
    accuracy = yaml.safe_load((folder / "test_metrics.json").read_text())["test/acc1"]
    assert last == f"test accuracy {accuracy:.4f}"
    assert accuracy == pytest.approx(float(list(csv.DictReader((folder / "metrics.csv").open()))[-1]["val/acc1"]))


def test_fit_tests_the_checkpoint_that_it_is_told(tmp_path, monkeypatch):
    tested = []
    load = AtomicCheckpointIO.load_checkpoint

    def noted(self, path, *args, **kwargs):
        tested.append(Path(path).name)
        return load(self, path, *args, **kwargs)

    monkeypatch.setattr(AtomicCheckpointIO, "load_checkpoint", noted)
    file = write_config(tmp_path / "small.yaml", small_config(image_folder(tmp_path / "data")))
    for name in ("best", "last"):
        assert main(["fit", "--config", file, "--trainer.max_epochs=1", f"--test_after_fit={name}"]) == 0
    assert tested == ["best.ckpt", "last.ckpt"]


def test_data_that_the_test_after_fit_refuses_are_refused_before_it_trains(tmp_path, capsys):
    file = write_config(tmp_path / "small.yaml", small_config(image_folder(tmp_path / "data")))
    assert main(["fit", "--config", file, "--test_after_fit=best", "--data.init_args.test_folder=exam"]) == 1
    assert re.search(r"error: ImageFolder: .*exam must be a folder of classes", capsys.readouterr().err)
    assert not (tmp_path / "runs" / "version_0" / "checkpoints").exists()


def test_a_saved_configuration_can_be_used_again(run, tmp_path, capsys):
    folder, file = run
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", file, "--print_config"])
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", str(tmp_path / "again.yaml"), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    for key in ("model", "data", "trainer", "best_checkpoint", "last_checkpoint"):
        assert saved[key] == yaml.safe_load(printed)[key]
    assert main(["validate", "--config", str(folder / "config.yaml"), "--ckpt_path", "last"]) == 0


def test_validate_reports_what_training_found(run):
    folder, file = run
    assert main(["validate", "--config", file, "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]) == 0
    metrics = yaml.safe_load((folder / "val_metrics.json").read_text())
    last = list(csv.DictReader((folder / "metrics.csv").open()))[-1]
    assert metrics["val/loss"] == pytest.approx(float(last["val/loss"]), rel=1e-5)
    assert metrics["val/acc1"] == pytest.approx(float(last["val/acc1"]))


def test_predictions_are_written_in_the_order_of_the_files(run, tmp_path):
    _, file = run
    images = ROOT.joinpath(read(file)["data"]["init_args"]["root"], "val")
    out = tmp_path / "out.csv"
    assert main(["predict", "--config", file, "--ckpt_path", "best", "--predictions.path", str(out),
                 "--data.init_args.predict", str(images)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert list(rows[0]) == ["file", "class", "probability"]
    assert [row["file"] for row in rows] == sorted(str(path) for path in images.rglob("*.png"))
    assert {row["class"] for row in rows} <= {"cat", "dog"}
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)


def test_fit_says_where_its_results_are(tmp_path, capsys):
    config = small_config(image_folder(tmp_path / "data"))
    config["trainer"]["max_epochs"] = 1
    assert main(["fit", "--config", write_config(tmp_path / "small.yaml", config)]) == 0
    printed = capsys.readouterr()
    assert "litlogger" not in printed.out + printed.err
    *_, folder, score = printed.out.splitlines()
    assert folder == f"run folder {tmp_path / 'runs' / 'version_0'}"
    assert re.fullmatch(r"last validation accuracy [01]\.\d{4}", score)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_without_weights_is_refused(run, command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command, "--config", run[1], "--data.init_args.predict=."])
    assert f"{command} needs trained weights, got none: give --ckpt_path best" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "said"), [
    (["--data.init_args.root=nowhere"], "error: ImageFolder: nowhere/train must be a folder of classes"),
    (["--model.init_args.num_classes=3"], "error: Classification: num_classes must be the number of classes in the da"),
    (["--data.init_args.pixels.in_chans=1"], "must take images of 1 channels, as data.init_args.pixels.in_chans says"),
    (["--ckpt_path=best", "--model.init_args.model_kwargs.patch_size=8"], "the network must be that of the checkpoint"),
])
def test_what_data_and_checkpoints_refuse_is_said_in_one_line(run, arguments, said, capsys):
    assert main(["fit", "--config", run[1], *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_checkpoint_needs_none_of_the_weights_that_training_started_from(run):
    start = ["--model.init_args.pretrained=true", "--model.init_args.checkpoint_path=gone.pth"]
    assert main(["validate", "--config", run[1], "--ckpt_path=best", *start]) == 0


def test_a_checkpoint_of_another_network_is_told_by_its_arguments(run, capsys):
    assert main(["test", "--config", run[1], "--ckpt_path=best", "--model.init_args.model=test_vit2"]) == 1
    assert "model was test_vit, got test_vit2; use the config.yaml of the run" in capsys.readouterr().err


def test_a_file_of_weights_is_no_checkpoint_of_a_run(run, tmp_path, capsys):
    torch.save({"model": {}}, tmp_path / "published.pth")
    assert main(["test", "--config", run[1], f"--ckpt_path={tmp_path / 'published.pth'}"]) == 1
    assert "must be a checkpoint of a run, got a file with model" in capsys.readouterr().err


@pytest.mark.parametrize(("argument", "said"), [
    ("--model.init_args.optimiser.lr=1", "optimiser"),
    ("--model.init_args.optimizer.lr=fast", "fast"),
    ("--data.init_args.loader.batch=1", "batch"),
    ("--trainer.epochs=1", "epochs"),
    ("--ckpt_path=nothing.ckpt", "nothing.ckpt must be a checkpoint file"),
    ("--model.init_args.optimizer.name=adamww", "no optimizer named 'adamww'; did you mean"),
    ("--model.init_args.num_classes=1", "num_classes must be 2 or more, got 1"),
    ("--model.init_args.checkpoint_path=nothing.pth", "error: read_checkpoint: no file nothing.pth"),
    ("--trainer.strategy=ddp_spawnn", "error: You selected an invalid strategy name"),
])
def test_a_wrong_key_or_value_is_refused_by_name(run, argument, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", run[1], argument])
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) < 12  # no usage, no traceback


def test_a_wrong_key_in_a_file_is_refused_by_name(run, tmp_path, capsys):
    config = read(run[1])
    config["model"]["init_args"]["schedule"]["warmup"] = 3
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", write_config(tmp_path / "wrong.yaml", config)])
    assert "warmup" in capsys.readouterr().err


@pytest.mark.parametrize(("argument", "said"), [
    ("--model.init_args.model=vmamba_tinny", "vmamba_tinny"),
    ("--model.init_args.model=umamba_nano", "umamba_nano is for segmentation"),
    ("--model.init_args.model_kwargs.drop_paths=0.1", "drop_paths"),
])
def test_a_model_that_does_not_exist_is_refused_by_name(run, argument, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", run[1], argument])
    assert said in capsys.readouterr().err


def test_any_module_can_be_trained(run, tmp_path):
    config = read(run[1])
    net = {"class_path": "timm.layers.ClassifierHead", "init_args": {"in_features": 3, "num_classes": 2}}
    config["model"]["init_args"].update(model=net, model_kwargs=None)
    config["trainer"].update(max_epochs=1, default_root_dir=str(tmp_path / "net"))
    assert main(["fit", "--config", write_config(tmp_path / "net.yaml", config)]) == 0
    assert checkpoint(tmp_path / "net")["state_dict"]["model.fc.weight"].shape == (2, 3)


def test_fast_dev_run_leaves_nothing(run, tmp_path):
    assert main(["fit", "--config", run[1], "--trainer.fast_dev_run=true", "--trainer.default_root_dir",
                 str(tmp_path / "dev")]) == 0
    assert not (tmp_path / "dev").exists() or not list((tmp_path / "dev").rglob("*.ckpt"))


@pytest.mark.slow
def test_two_processes_train_as_one_on_the_same_global_batch(tmp_path):
    """gloo, without what is random inside a process, and without Adam, which makes whole steps of rounding errors."""
    sgd = {"name": "sgd", "lr": 0.05}
    config = small_config(image_folder(tmp_path / "data"), mixup={}, ema_decay=None, optimizer=sgd)
    config["model"]["init_args"]["model_kwargs"] = {"img_size": 32, "patch_size": 16}
    ends = {}
    for processes, batch in ((1, 4), (2, 2)):
        config["data"]["init_args"]["loader"]["batch_size"] = batch
        config["trainer"].update(devices=processes, strategy="ddp" if processes > 1 else "auto")
        said = fit_process(tmp_path, str(processes), config, "--test_after_fit=last")
        ends[processes] = checkpoint(tmp_path / str(processes)), said
    one, two = ends[1][0]["state_dict"], ends[2][0]["state_dict"]
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    assert ends[1][1] == ends[2][1]
    assert len(ends[2][0]["random_state"]) == 2


@pytest.mark.slow
def test_the_training_loss_is_the_mean_over_all_processes(tmp_path):
    """Without learning, the mean over an epoch does not depend on how the images are shared out."""
    rate = {"optimizer": {"lr": 1e-12}, "schedule": {"warmup_epochs": 0, "min_lr": 0.0}}
    config = small_config(image_folder(tmp_path / "data"), **rate, mixup={}, ema_decay=None)
    config["model"]["init_args"]["model_kwargs"] = {"img_size": 32, "patch_size": 16}
    config["data"]["init_args"]["augment"] = None
    config["trainer"]["max_epochs"] = 1
    losses = []
    for processes in (1, 2):
        config["trainer"]["devices"] = processes
        config["data"]["init_args"]["loader"]["batch_size"] = 4 // processes
        fit_process(tmp_path, f"on{processes}", config)
        with open(tmp_path / f"on{processes}" / "version_0" / "metrics.csv") as file:
            losses.append(float(next(csv.DictReader(file))["train/loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
