"""Segmentation end to end: train, kill, resume, predict and evaluate, bit for bit as without the kill."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from small_runs import EXACT, assert_same, checkpoint, fit_process, write_config

pytest.importorskip("monai", reason="needs the extra medical")

import nibabel
from small_volumes import AFFINE, blob, nnunet_folder, save, volume_config

from vssm.cli.predict import main as predict
from vssm.cli.train import main as train
from vssm.tasks.measures import dice

pytestmark = pytest.mark.usefixtures("one_thread")

NAMED = {"model": "test_segmamba", "model_kwargs": {"spatial_dims": 3}, "in_channels": 1}


def test_train_kill_resume_predict_evaluate(tmp_path, capfd):
    """Six steps an epoch, saved every two: killed at 11 it resumes from 10; both checkpoints then answer alike."""
    root = nnunet_folder(tmp_path / "raw")
    config = volume_config(root, tmp_path / "runs", **NAMED)
    run = {**config, "trainer": {**config["trainer"], "default_root_dir": str(tmp_path / "whole")}}
    assert train(["fit", "--config", write_config(tmp_path / "whole.yaml", run)]) == 0
    whole = checkpoint(tmp_path / "whole")
    fit_process(tmp_path, "broken", config, kill_at=11)
    assert checkpoint(tmp_path / "broken")["global_step"] == 10
    run["trainer"]["default_root_dir"] = str(tmp_path / "broken")
    assert train(["fit", "--config", write_config(tmp_path / "broken.yaml", run), "--ckpt_path", "last"]) == 0
    resumed = checkpoint(tmp_path / "broken")
    assert resumed["global_step"] == 12
    for key in EXACT:
        assert_same(resumed[key], whole[key], key)

    answers, scores = {}, {}
    for name in ("whole", "broken"):
        folder = tmp_path / name / "version_0"
        capfd.readouterr()
        assert train(["test", "--config", str(folder / "config.yaml"), "--ckpt_path",
                      str(folder / "checkpoints" / "last.ckpt")]) == 0
        scores[name] = capfd.readouterr().out.strip().splitlines()[-1]
        assert predict([str(folder / "checkpoints" / "last.ckpt"), str(root / "imagesTr"), "--output",
                        str(tmp_path / f"out_{name}"), "--quiet", "--probabilities"]) == 0
        files = sorted((tmp_path / f"out_{name}").iterdir())
        answers[name] = {file.name: nibabel.load(file).get_fdata() for file in files if file.suffix != ".csv"}
    assert scores["whole"] == scores["broken"]
    assert scores["whole"].startswith("test mean Dice 0.")
    assert len(answers["whole"]) == 10
    for name, volume in answers["whole"].items():
        np.testing.assert_array_equal(answers["broken"][name], volume)

    [case] = csv.DictReader((tmp_path / "whole" / "version_0" / "test_cases.csv").open())
    label = nibabel.load(root / "labelsTr" / f"{case['case']}.nii.gz").get_fdata()
    ours = answers["whole"][f"{case['case']}.nii.gz"]
    assert dice(label == 1, ours == 1) == pytest.approx(float(case["dice_box"]), abs=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step, and a folder of volumes."""
    root = tmp_path_factory.mktemp("predict")
    config = volume_config(nnunet_folder(root / "raw"), root / "runs", **NAMED)
    config["trainer"].update(max_steps=1, limit_val_batches=0)
    config["best_checkpoint"] = {"monitor": "train/loss", "mode": "min"}
    assert train(["fit", "--config", write_config(root / "small.yaml", config)]) == 0
    folder = root / "runs" / "version_0"
    (folder / "checkpoints" / "last.ckpt").rename(folder / "checkpoints" / "best.ckpt")
    return folder


def test_predictions_keep_the_grid_of_the_input(run, tmp_path):
    save(tmp_path / "in" / "scan.nii.gz", blob(5, (13, 31, 22))[0])
    assert predict([str(run), str(tmp_path / "in" / "scan.nii.gz"), "--output", str(tmp_path / "out"), "--quiet",
                    "--probabilities", "--flips", "0", "2", "--overlap", "0.5"]) == 0
    label, shares = (nibabel.load(tmp_path / "out" / name) for name in ("scan.nii.gz", "scan_probabilities.nii"))
    assert (label.shape, shares.shape) == ((13, 31, 22), (13, 31, 22, 3))
    for image in (label, shares):
        np.testing.assert_allclose(image.affine, AFFINE)
    assert label.get_data_dtype() == np.uint8
    values = shares.get_fdata()
    np.testing.assert_allclose(values.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(values.argmax(-1), label.get_fdata())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "scan.nii.gz", "scan_probabilities.nii", "volumes.csv"
    ]
    [row] = csv.DictReader((tmp_path / "out" / "volumes.csv").open())
    assert float(row["volume_ml_box"]) == pytest.approx((label.get_fdata() == 1).sum() * 3 / 1000, abs=1e-3)


def test_train_predict_writes_the_same(run, tmp_path):
    save(tmp_path / "in" / "scan.nii.gz", blob(5)[0])
    assert predict([str(run), str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    assert train(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "best", "--data.init_args.predict",
                  str(tmp_path / "in"), "--predictions.path", str(tmp_path / "table.csv")]) == 0
    [row] = csv.DictReader((tmp_path / "table.csv").open())
    assert row["prediction"] == str(tmp_path / "table" / "scan.nii.gz")
    a, b = (nibabel.load(tmp_path / name / "scan.nii.gz").get_fdata() for name in ("out", "table"))
    np.testing.assert_array_equal(a, b)


def test_what_cannot_be_predicted_is_refused(run, tmp_path, capsys):
    def said(*arguments):
        assert predict(["--output", str(tmp_path / "out"), "--quiet", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    image, unfinished = blob(0)[0], tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    (unfinished / "checkpoints" / "last.ckpt").write_bytes(b"")
    save(tmp_path / "good.nii.gz", image)
    save(tmp_path / "two" / "good.nii.gz", np.stack([image, image], -1))
    (tmp_path / "broken.nii.gz").write_bytes((tmp_path / "good.nii.gz").read_bytes()[:-2000])
    (tmp_path / "text.nii").write_text("no volume")
    save(tmp_path / "holes.nii.gz", np.where(image > 150, np.nan, image).astype(np.float32))
    assert "must be a run folder with checkpoints/best.ckpt" in said(tmp_path / "nothing", tmp_path / "good.nii.gz")
    assert "volumes must have 1 channels for this network, got 2" in said(run, tmp_path / "two")
    assert "good twice" in said(run, tmp_path / "good.nii.gz", tmp_path / "good.nii.gz")
    assert "broken.nii.gz cannot be read" in said(run, tmp_path / "good.nii.gz", tmp_path / "broken.nii.gz")
    [row] = csv.DictReader((tmp_path / "out" / "volumes.csv").open())  # of what was predicted before
    assert row["case"] == "good"
    assert "holes.nii.gz holds NaN or infinity" in said(run, tmp_path / "holes.nii.gz")
    assert said(run, tmp_path / "two" / "nowhere").startswith(f"vssm predict: {tmp_path / 'two' / 'nowhere'} must be")
    assert "last.ckpt is there: name it to use it" in said(unfinished, tmp_path / "good.nii.gz")
    assert "text.nii cannot be read" in said(run, tmp_path / "text.nii")
    assert "out must be a folder that can be written to" in said(
        run, tmp_path / "good.nii.gz", "--output", tmp_path / "text.nii" / "out"
    )
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "must be a checkpoint of vssm.tasks.segmentation" in said(tmp_path / "other.ckpt", tmp_path / "good.nii.gz")
