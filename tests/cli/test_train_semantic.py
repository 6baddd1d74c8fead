"""UPerNet through ``vssm train`` on an ADE20K-style folder: fit, kill, resume, test, predict."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scene_runs import scene_config, scene_folder
from small_runs import EXACT, assert_same, checkpoint, fit_process, write_config

from vssm.checkpoints import write_checkpoint
from vssm.cli.train import main
from vssm.registries.zoo import create_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scene_folder(tmp_path_factory.mktemp("scenes") / "data")


def run(tmp_path, config, name, *arguments):
    config = {**config, "trainer": {**config["trainer"], "default_root_dir": str(tmp_path / name)}}
    file = write_config(tmp_path / f"{name}.yaml", config)
    assert main(["fit", "--config", file, *arguments]) == 0
    return file


def test_a_run_finds_the_disks(tmp_path, folder, capfd):
    """Six epochs; the last line of ``test`` is the mIoU of the best checkpoint; ``predict`` writes label maps."""
    config = scene_config(folder, ema_decay=None)
    config["trainer"]["max_epochs"] = 6
    file = run(tmp_path, config, "disks", "--data.init_args.augment.photometric=false")
    last = list(csv.DictReader((tmp_path / "disks" / "version_0" / "metrics.csv").open()))[-1]
    assert {"val/miou", "val/acc", "val/loss", "train/loss"} <= set(last)
    capfd.readouterr()
    assert main(["test", "--config", file, "--ckpt_path", "best"]) == 0
    said = capfd.readouterr().out.strip().splitlines()[-1]
    assert float(re.fullmatch(r"test mIoU (0\.\d{4})", said)[1]) > 0.6  # about 0.4 without a disk
    assert (tmp_path / "disks" / "version_0" / "confusion_matrix.png").is_file()

    images, table = folder / "images" / "validation", tmp_path / "out.csv"
    assert main(["predict", "--config", file, "--ckpt_path", "best", "--predictions.path", str(table),
                 "--data.init_args.predict", str(images)]) == 0
    rows = list(csv.DictReader(table.open()))
    assert [row["file"] for row in rows] == sorted(map(str, images.iterdir()))
    for row in rows:
        with Image.open(row["prediction"]) as image:
            found = np.asarray(image)
        assert found.shape == (72, 80)
        assert set(np.unique(found)) <= {0, 1}


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, folder):
    """Four steps an epoch, saved at 3 and at the end of epochs: killed before step 7 it resumes from 6."""
    config = scene_config(folder)
    run(tmp_path, config, "whole")
    fit_process(tmp_path, "broken", config, kill_at=7)
    assert checkpoint(tmp_path / "broken")["global_step"] == 6
    run(tmp_path, config, "broken", "--ckpt_path", "last")
    whole, resumed = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "broken")
    for key in EXACT:
        assert_same(resumed[key], whole[key], key)


def test_windows_and_a_backbone_of_weights(tmp_path, folder):
    """The backbone starts from a classifier's file; evaluation in windows gives scores too."""
    classifier = create_model("test_vmamba")
    write_checkpoint(classifier.state_dict(), tmp_path / "classifier.safetensors")
    config = scene_config(
        folder, ema_decay=None, backbone_checkpoint_path=str(tmp_path / "classifier.safetensors"), window=[48, 48],
        optimizer={"lr": 0.0}, schedule={"shape": "poly", "warmup_epochs": 0, "min_lr": 0.0},
    )  # fmt: skip
    config["trainer"]["max_epochs"] = 1
    run(tmp_path, config, "windows")
    trained = checkpoint(tmp_path / "windows")["state_dict"]
    weight = classifier.state_dict()["stages.2.blocks.0.mixer.ssm.A_log"]
    assert torch.equal(trained["model.backbone.stages.2.blocks.0.mixer.ssm.A_log"], weight)


@pytest.mark.parametrize(("argument", "said"), [
    ("--model.init_args.num_classes=3", "num_classes must be the number of classes in the data, 2, got 3"),
    ("--model.init_args.model=test_vmamba", "test_vmamba is for classification"),
    ("--model.init_args.model_kwargs={chanels: 3}", "model_kwargs do not fit test_upernet"),
    ("--model.init_args.overlap=1.0", "overlap must be 0 or more and below 1, got 1.0"),
    ("--data.init_args.class_names=[one]", "class_names must be num_classes=2 names, got 1"),
    ("--data.init_args.size.long=8", "long at least short"),
])
def test_a_wrong_value_is_refused_by_name(tmp_path, folder, argument, said, capsys):
    file = write_config(tmp_path / "wrong.yaml", scene_config(folder))
    with pytest.raises(SystemExit, match=r"[12]"):
        raise SystemExit(main(["fit", "--config", file, argument]))  # 2 where it is refused before anything is built
    assert said in capsys.readouterr().err


def test_the_config_of_a_run_repeats_it(tmp_path, folder):
    config = scene_config(folder)
    config["trainer"]["max_epochs"] = 1
    run(tmp_path, config, "first")
    saved = yaml.safe_load((tmp_path / "first" / "version_0" / "config.yaml").read_text())
    assert saved["data"]["init_args"]["size"]["crop"] == [64, 64]
    assert main(["validate", "--config", str(tmp_path / "first" / "version_0" / "config.yaml"), "--ckpt_path",
                 "last"]) == 0
