"""The classification task: losses, metrics, weight averages, precision, and what it refuses."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from small_runs import image_folder
from torch import nn

import vssm
from vssm.data import ImageFolder, Loader, Pixels
from vssm.tasks import Classification, Mixup, Optimizer, Schedule
from vssm.tasks.finite import NonFiniteLoss
from vssm.tasks.report import PredictionWriter

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
         "enable_progress_bar": False, "enable_model_summary": False}


class Tiny(nn.Module):
    """Mean colour to logits."""

    def __init__(self, classes=2):
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, images):
        return self.head(images.mean(dim=(2, 3)))


class Poisoned(Tiny):
    """Returns NaN from its norm once it has seen ``good`` batches."""

    def __init__(self, good):
        super().__init__()
        self.norm, self.seen, self.good, self.drop = nn.LayerNorm(3), 0, good, nn.Dropout(0.5)

    def forward(self, images):
        self.seen += 1
        if self.seen > self.good:
            self.norm.weight.data[0] = torch.nan
        return self.head(self.drop(self.norm(images.mean(dim=(2, 3)))))


@pytest.fixture
def data(tmp_path):
    root, loader = image_folder(tmp_path / "data"), Loader(batch_size=4, workers=0)
    return ImageFolder(str(root), loader=loader, pixels=Pixels(image_size=16), test_folder="val")


def batch(size=4, classes=2):
    return {"image": torch.rand(size, 3, 8, 8), "label": torch.arange(size) % classes, "index": torch.arange(size)}


def test_backward_runs_on_the_calling_thread(data):
    seen = []
    task = Classification(Tiny(), num_classes=2)
    task.model.head.weight.register_hook(lambda grad: seen.append(torch.autograd.is_multithreading_enabled()))
    Trainer(**QUIET, max_steps=1).fit(task, data)
    assert seen == [False]
    assert torch.autograd.is_multithreading_enabled()


def step(task, batch):
    """One training step outside a trainer."""
    task.log = lambda *args, **kwargs: None
    return task.training_step(batch, 0)


def test_the_loss_is_cross_entropy_smoothed_as_asked():
    task, images = Classification(Tiny(), 2, label_smoothing=0.1), batch()
    logits = task(images["image"])
    hard = torch.tensor([[0.95, 0.05], [0.05, 0.95]] * 2)
    torch.testing.assert_close(step(task, images), -(hard * logits.log_softmax(1)).sum(1).mean())


def test_mixup_trains_on_soft_labels():
    task = Classification(Tiny(), 2, mixup=Mixup(mixup_alpha=1.0), label_smoothing=0.1)
    images = batch()
    before = images["image"].clone()
    seen = []
    task.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    loss = step(task, images)
    share = ((seen[0] - before.flip(0)) / (before - before.flip(0))).mean()
    target = 0.9 * (share * F.one_hot(images["label"]) + (1 - share) * F.one_hot(images["label"].flip(0))) + 0.05
    torch.testing.assert_close(loss, -(target * task.model(seen[0]).log_softmax(1)).sum(1).mean())


def test_metrics_are_those_of_all_images(data):
    task = Classification(Tiny(), 2)
    trainer = Trainer(**QUIET)
    [result] = trainer.validate(task, data, verbose=False)
    data.trainer = trainer
    logits = torch.cat([task(images["image"]) for images in data.val_dataloader()])
    target = torch.cat([images["label"] for images in data.val_dataloader()])
    assert result["val/acc1"] == pytest.approx((logits.argmax(1) == target).float().mean().item())
    assert result["val/loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    assert task.confusion.tolist() == [
        [int(((target == row) & (logits.argmax(1) == column)).sum()) for column in (0, 1)] for row in (0, 1)
    ]
    assert "val/acc5" not in result


def test_batches_without_a_readable_image_are_passed_over(data, tmp_path):
    for number in range(4):  # the first batch
        (tmp_path / "data" / "val" / "cat" / f"{number:02}.png").write_bytes(b"no image")
    data.predict = str(tmp_path / "data" / "val")
    with pytest.warns(UserWarning, match="cannot be read"):
        [result] = Trainer(**QUIET).validate(Classification(Tiny(), 2), data, verbose=False)
    assert 0 <= result["val/acc1"] <= 1
    writer = PredictionWriter(str(tmp_path / "out.csv"))
    with pytest.warns(UserWarning, match="cannot be read"):
        Trainer(**QUIET, callbacks=[writer]).predict(Classification(Tiny(), 2), data)
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + 6
    Trainer(**QUIET, callbacks=[writer]).predict(Classification(Tiny(), 2), data)
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + 6  # nothing is left of the first time


def test_top5_is_there_from_six_classes_on():
    assert "acc5" in Classification(Tiny(6), 6).val_metrics.keys(keep_base=True)


def test_an_average_is_validated_and_saved_and_training_goes_on_with_the_weights(data, tmp_path):
    class Watch(Classification):
        """Keeps the weights after each step and those that were validated."""

        def on_train_start(self):
            self.weights, self.validated = [], []

        def on_train_epoch_end(self):
            self.saved = copy.deepcopy(self.trainer._checkpoint_connector.dump_checkpoint(weights_only=False))

        def on_train_batch_end(self, *args):
            self.weights.append(self.model.head.weight.detach().clone())

        def validation_step(self, *args):
            self.validated.append(self.model.head.weight.detach().clone())
            super().validation_step(*args)

    options = {"optimizer": Optimizer(lr=0.1), "schedule": Schedule(warmup_epochs=0), "ema_decay": 0.5}
    task = Watch(Tiny(), 2, **options)
    trainer = Trainer(**QUIET, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(task, data)
    average = task.weights[0]
    for weights in task.weights[1:]:
        average = average.lerp(weights, 0.5)
    assert len(task.weights) == 6
    torch.testing.assert_close(task.validated[0], average)
    torch.testing.assert_close(task.model.head.weight, average)
    assert not torch.equal(task.weights[-1], average)
    file = tmp_path / "averaged.ckpt"
    saved = task.saved
    torch.save(saved, file)
    torch.testing.assert_close(saved["state_dict"]["model.head.weight"], average)
    torch.testing.assert_close(saved["trained_state_dict"]["model.head.weight"], task.weights[-1])
    trainer.test(task, data, ckpt_path=str(file), verbose=False)  # in the same process, after fit
    torch.testing.assert_close(task.model.head.weight, average)


def test_resuming_with_an_average_needs_one_in_the_checkpoint(data, tmp_path):
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(Classification(Tiny(), 2), data)
    trainer.save_checkpoint(tmp_path / "plain.ckpt", weights_only=False)
    with pytest.raises(ValueError, match=r"WeightAverage: .* without a weight average"):
        Trainer(**QUIET, max_epochs=2).fit(
            Classification(Tiny(), 2, ema_decay=0.5), data, ckpt_path=str(tmp_path / "plain.ckpt")
        )


def test_a_non_finite_loss_stops_the_run_and_names_the_module(data, tmp_path):
    task = Classification(Poisoned(good=3), 2)
    expected = r"step 3: .* norm \(LayerNorm; its parameter weight is not finite\)"
    with pytest.raises(NonFiniteLoss, match=expected) as error:
        Trainer(**QUIET, max_epochs=1, num_sanity_val_steps=0, default_root_dir=tmp_path / "run").fit(task, data)
    file = tmp_path / "run" / "nonfinite_step3_rank0.pt"
    assert str(file) in str(error.value)
    saved = torch.load(file, weights_only=True)
    assert saved["image"].shape == (4, 3, 16, 16)
    assert saved["index"].shape == saved["label"].shape == (4,)
    assert "model.norm.weight" in saved["state_dict"]


@pytest.mark.parametrize(("images", "logits", "origin"), [
    (torch.inf, 1.0, "the images themselves are not finite"),
    (1.0, -3e38, "the logits are finite, the loss function overflowed"),
])
def test_a_non_finite_loss_without_a_module_says_so(images, logits, origin, tmp_path):
    task = Classification(Tiny(), 2)
    task.run_folder, task._trainer = tmp_path, SimpleNamespace(global_step=7, current_epoch=1, global_rank=0)
    nn.init.zeros_(task.model.head.weight)
    task.model.head.bias.data = torch.tensor([logits, -logits])
    poisoned = batch()
    poisoned["image"][0] = images
    with pytest.raises(NonFiniteLoss, match=origin):
        step(task, poisoned)


def test_parameters_stay_float32_under_mixed_precision(data):
    class Watch(Classification):
        def training_step(self, *args):
            with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu")):
                self.seen = self(args[0]["image"]).dtype
            return super().training_step(*args)

    task = Watch("test_vit", 2, model_kwargs={"img_size": 16, "patch_size": 8})
    Trainer(**QUIET, max_epochs=1, limit_train_batches=1, precision="bf16-mixed").fit(task, data)
    assert task.seen == torch.bfloat16
    assert {parameter.dtype for parameter in task.parameters()} == {torch.float32}


def test_gradients_are_recomputed_and_models_compiled_on_request(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    task = Classification("test_vit", 2, grad_checkpointing=True, compile=True)
    assert task.model.grad_checkpointing
    assert compiled == [task.model]
    with pytest.raises(ValueError, match=r"needs a model with set_grad_checkpointing, .* got a Flatten; set model"):
        Classification(nn.Flatten(), 2, grad_checkpointing=True)


def test_a_task_is_restored_from_its_checkpoint(data, tmp_path):
    task = Classification("test_vit", 2, model_kwargs={"img_size": 16, "patch_size": 8}, ema_decay=0.9)
    trainer = Trainer(**QUIET, max_epochs=1, limit_train_batches=2)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "task.ckpt", weights_only=False)
    again = Classification.load_from_checkpoint(tmp_path / "task.ckpt")
    assert again.class_names == ["cat", "dog"]
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again.eval()(images), task.eval()(images))


def test_weights_go_from_a_file_into_a_run_and_from_a_run_into_a_plain_model(data, tmp_path):
    kwargs = {"img_size": 16, "patch_size": 4}
    torch.save(vssm.create_model("test_vim", img_size=24, patch_size=4).state_dict(), tmp_path / "start.pth")
    with pytest.raises(ValueError, match="does not fit"):
        Classification("test_vim", 2, model_kwargs=kwargs, checkpoint_path=str(tmp_path / "start.pth"))
    task = Classification("test_vim", 2, model_kwargs=kwargs, checkpoint_path=str(tmp_path / "start.pth"),
                          adapt=("classifier", "img_size"))
    trainer = Trainer(**QUIET, max_epochs=1, limit_train_batches=1)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "task.ckpt", weights_only=False)
    model = vssm.create_model("test_vim", num_classes=2, **kwargs)
    vssm.load_weights(model, tmp_path / "task.ckpt", prefix="model.")
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(images), task.eval()(images))


def test_a_checkpoint_is_not_used_for_other_classes(data, tmp_path):
    trainer = Trainer(**QUIET, max_epochs=1, limit_train_batches=1)
    trainer.fit(Classification(Tiny(), 2), data)
    trainer.save_checkpoint(tmp_path / "task.ckpt", weights_only=False)
    for split in ("train", "val"):
        (tmp_path / "data" / split / "cat").rename(tmp_path / "data" / split / "eel")
    with pytest.raises(ValueError, match="must be those of the checkpoint, cat, dog, …, got dog, eel"):
        Trainer(**QUIET).validate(Classification(Tiny(), 2), data, ckpt_path=str(tmp_path / "task.ckpt"))


def test_what_does_not_fit_is_refused(data):
    with pytest.raises(ValueError, match="num_classes must be the number of classes in the data, 2, got 3"):
        Trainer(**QUIET).validate(Classification(Tiny(3), 3), data)
    with pytest.raises(ValueError, match="pretrained and model_kwargs are for models given by name, got a Tiny"):
        Classification(Tiny(), 2, pretrained=True)
    with pytest.raises(ValueError, match="num_classes and pretrained stand beside model_kwargs"):
        Classification("test_vit", 2, model_kwargs={"num_classes": 3})
    data.loader = Loader(batch_size=3, workers=0)
    with pytest.raises(ValueError, match=r"mixup pairs the images of a batch, .* must be even, got 3"):
        Trainer(**QUIET, max_epochs=1).fit(Classification(Tiny(), 2, mixup=Mixup(cutmix_alpha=1.0)), data)
    assert copy.deepcopy(Classification(Tiny(), 2)).num_classes == 2
