"""The detection task: losses, scores, pictures, predictions, and the command that trains it."""

from __future__ import annotations

import csv

import pytest
import torch
from PIL import Image
from small_runs import assert_same, checkpoint, fit_process, write_config
from torch import nn

from vssm.cli.train import main
from vssm.tasks import Detection
from vssm.tasks.detection import Pictures, Precision, draw_scenes
from vssm.tasks.finite import NonFiniteLoss

pytestmark = pytest.mark.usefixtures("one_thread")

YOLO = {"detector": "test_mamba_yolo", "detector_kwargs": {"image_size": 128, "in_chans": 1}}
FCOS = {
    "detector": "fcos", "backbone": "test_vmamba", "backbone_kwargs": {"in_chans": 1, "drop_path_rate": 0.2},
    "pyramid": {"levels": [8, 16], "out_channels": 32, "extra": None},
    "detector_kwargs": {"min_size": 128, "max_size": 128},
}  # fmt: skip


def config(root, model=FCOS, **data):
    """Two epochs of two steps on scenes of digits."""
    return {
        "model": {
            "class_path": "vssm.tasks.Detection",
            "init_args": {"num_classes": 10, "ema_decay": 0.8, "schedule": {"warmup_epochs": 1}, **model},
        },
        "data": {
            "class_path": "vssm.data.DigitScenes",
            "init_args": {
                "train_scenes": 4, "val_scenes": 3, "test_scenes": 3, "loader": {"batch_size": 2, "workers": 0}, **data
            },
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "default_root_dir": str(root),
                    "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
                    "num_sanity_val_steps": 0},
        "last_checkpoint": {"every_n_steps": 1},
    }  # fmt: skip


def test_fit_test_and_predict_leave_their_files(tmp_path, capsys):
    file = write_config(tmp_path / "small.yaml", config(tmp_path / "runs"))
    assert main(["fit", "--config", file, "--test_after_fit=best"]) == 0
    run = tmp_path / "runs" / "version_0"
    assert "test mAP 0." in capsys.readouterr().out
    with open(run / "metrics.csv", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 2
    assert {"train/loss", "train/classification_loss", "train/bbox_regression_loss", "val/map50"} <= set(rows[0])
    for name in ("curves.png", "val_predictions.png", "predictions.png", "test_metrics.json", "checkpoints/best.ckpt"):
        assert (run / name).is_file(), name
    assert Image.open(run / "predictions.png").size == (3 * 258 + 2, 258 + 2 + 16)           # the key below
    Image.new("L", (90, 120)).save(tmp_path / "a.png")
    table = tmp_path / "out.csv"
    arguments = ["--data.init_args.predict", str(tmp_path / "a.png"), "--predictions.path", str(table)]
    assert main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "best", *arguments]) == 0
    assert table.is_file()


def test_a_detector_of_the_zoo_trains_with_mosaics_on_masks_that_it_does_not_use(tmp_path):
    augment = {"mosaic": 1.0, "canvas": 128, "translate": 0.1, "scale": 0.5, "close_mosaic": 1}
    file = write_config(tmp_path / "yolo.yaml", config(tmp_path / "runs", YOLO, augment=augment, masks=True))
    assert main(["fit", "--config", file]) == 0
    rows = (tmp_path / "runs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "train/dfl_loss" in rows[0]
    assert "val/map50" in rows[0]


@pytest.mark.slow
def test_mask_rcnn_trains_on_masks_and_is_scored_by_them(tmp_path):
    model = {**FCOS, "detector": "mask_rcnn", "pyramid": {"out_channels": 32, "levels": [4, 8, 16]}}
    model["detector_kwargs"] = {**FCOS["detector_kwargs"], "box_detections_per_img": 10}
    file = write_config(tmp_path / "masks.yaml", config(tmp_path / "runs", model, masks=True))
    assert main(["fit", "--config", file]) == 0
    header = (tmp_path / "runs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert {"train/mask_loss", "val/map50", "val/segm_map50"} <= set(header.split(","))


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3], ids=["inside-epoch-0", "inside-epoch-1"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, step):
    whole = config(tmp_path / "whole")
    assert main(["fit", "--config", write_config(tmp_path / "whole.yaml", whole)]) == 0
    fit_process(tmp_path, "broken", whole, kill_at=step)
    resumed = {**whole, "trainer": {**whole["trainer"], "default_root_dir": str(tmp_path / "broken")}}
    file = write_config(tmp_path / "broken.yaml", resumed)
    assert main(["fit", "--config", file, "--ckpt_path", "last"]) == 0
    expected, found = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "broken")
    for key in ("state_dict", "trained_state_dict", "optimizer_states", "lr_schedulers", "random_state", "global_step"):
        assert_same(found[key], expected[key], key)


def test_the_number_of_classes_is_that_of_the_data(tmp_path, capsys):
    wrong = config(tmp_path / "runs", {**FCOS, "num_classes": 9})
    assert main(["fit", "--config", write_config(tmp_path / "wrong.yaml", wrong)]) == 1
    assert "Detection: num_classes must be the number of classes in the data, 10, got 9" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_and_names_the_module(tmp_path, monkeypatch):
    task = Detection(num_classes=3, **FCOS)
    nn.init.constant_(task.model.backbone.fpn.inner_blocks[0][0].weight, torch.inf)
    task.run_folder = str(tmp_path)
    monkeypatch.setattr(task, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(Detection, "global_step", 0)
    monkeypatch.setattr(Detection, "current_epoch", 0)
    target = [{"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([1])}]
    batch = {"image": [torch.rand(1, 64, 64)], "target": target, "index": torch.tensor([0])}
    with pytest.raises(NonFiniteLoss, match=r"backbone\.fpn\.inner_blocks\.0"):
        task.training_step(batch, 0)


def test_a_module_may_be_the_detector_and_then_takes_no_further_arguments():
    task = Detection(num_classes=3, **FCOS)
    assert Detection(task.model, 3).model is task.model
    with pytest.raises(ValueError, match="are for detectors given by name, got a FCOS"):
        Detection(task.model, 3, backbone="test_vmamba")


def found(boxes, labels, scores, masks=None):
    made = there(boxes, labels, masks)
    return {**made, "scores": torch.tensor(scores, dtype=torch.float32)}


def there(boxes, labels, masks=None, crowd=None):
    made = {"boxes": torch.tensor(boxes).float().view(-1, 4), "labels": torch.tensor(labels, dtype=torch.long)}
    made |= {} if masks is None else {"masks": masks}
    return made if crowd is None else {**made, "iscrowd": torch.tensor(crowd)}


def test_precision_is_cocos():
    """One of two objects is found, exactly: recall stops at one half, which COCO's 101 points read as 51 / 101."""
    precision = Precision()
    box, two = [0, 0, 10, 10], [[0, 0, 10, 10], [20, 20, 40, 40]]
    precision.update([found(box, [1], [0.9])], [there(two, [1, 1])])
    values = precision.compute()
    assert values["map"].item() == pytest.approx(51 / 101)
    assert values["map50"].item() == pytest.approx(51 / 101)
    precision.reset()
    precision.update([found(box, [1], [0.9])], [there(two, [1, 1], crowd=[0, 1])])
    assert precision.compute()["map"].item() == pytest.approx(1.0)
    precision.reset()
    precision.update([found([], [], [])], [there([], [])])
    assert precision.compute()["map"] == 0


def test_masks_have_a_precision_of_their_own():
    """The box is right, the mask covers another part of it."""
    precision = Precision()
    left, right = torch.zeros(1, 12, 12), torch.zeros(1, 12, 12)
    left[:, :10, :5], right[:, :10, 5:10] = 1, 1
    box = [0, 0, 10, 10]
    precision.update([found(box, [1], [0.9], left[None])], [there(box, [1], right.to(torch.uint8))])
    values = precision.compute()
    assert values["map"].item() == pytest.approx(1.0)
    assert values["segm_map"] == 0
    assert "segm_map50" in values


def test_predictions_are_rows_of_a_table():
    task = Detection(num_classes=3, **FCOS)
    task.class_names = ["cat", "dog", "cow"]
    sure, unsure = found([[1, 2, 3, 4.5]], [2], [0.75]), found([[0, 0, 1, 1]], [1], [0.1])
    assert task.prediction_rows({"index": torch.tensor([4, 2]), "found": [sure, unsure]}) == [
        (4, {"class": "dog", "score": "0.7500", "x1": "1.00", "y1": "2.00", "x2": "3.00", "y2": "4.50"})
    ]


def test_the_background_is_nothing_that_is_found(monkeypatch):
    task = Detection(num_classes=3, **FCOS)
    monkeypatch.setattr(task.model, "forward", lambda images: [found([[0, 0, 1, 1]] * 2, [0, 2], [0.9, 0.8])])
    (each,) = task.find([torch.zeros(1, 8, 8)])
    assert (each["labels"].tolist(), each["scores"].tolist(), len(each["boxes"])) == ([2], [pytest.approx(0.8)], 1)


def test_pictures_show_what_was_found_and_what_is_there(tmp_path):
    image = torch.zeros(1, 30, 50)
    shown = (image, found([[2, 2, 20, 20], [30, 5, 40, 15]], [1, 1], [0.9, 0.1]), there([[25, 10, 45, 25]], [1]))
    draw_scenes(tmp_path / "x.png", [shown, (torch.zeros(1, 160, 20), found([], [], []), there([], []))], ["cat"])
    pixels = torch.frombuffer(bytearray(Image.open(tmp_path / "x.png").tobytes()), dtype=torch.uint8).view(340, -1, 3)
    colours = {tuple(c) for c in pixels.view(-1, 3).tolist()}
    assert {(0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00)} <= colours
    assert pixels.shape == (324 + 16, 2 * 302 + 2, 3)
    assert isinstance(Detection(num_classes=3, **FCOS).configure_callbacks()[-1], Pictures)
