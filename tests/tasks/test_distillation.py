"""Losses with a second model, and the average of a schedule-free optimiser."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from small_runs import assert_same, image_folder
from torch import nn

import vssm  # noqa: F401  registers the models
from vssm.data import ImageFolder, Loader, Pixels
from vssm.tasks import Classification, Distillation, Mesa, Mixup, Optimizer, Schedule

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
         "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
TEACHER = "test_resnet"


@pytest.fixture
def data(tmp_path):
    root, loader = image_folder(tmp_path / "data"), Loader(batch_size=4, workers=0)
    return ImageFolder(str(root), loader=loader, pixels=Pixels(image_size=16), test_folder="val")


@pytest.fixture
def teacher(tmp_path):
    """A file of weights for TEACHER, two classes."""
    file = tmp_path / "teacher.pth"
    torch.save(timm.create_model(TEACHER, num_classes=2).state_dict(), file)
    return str(file)


class Tiny(nn.Module):
    """Mean colour to logits."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, images):
        return self.head(images.mean(dim=(2, 3)))


def batch(size=4):
    return {"image": torch.randn(size, 3, 32, 32), "label": torch.arange(size) % 2, "index": torch.arange(size)}


def student(**options):
    return Classification("test_groupmamba", 2, **options).train()


def ready(task):
    """A task with its teacher, outside a trainer."""
    task._teacher = [task.distillation.build(task.model, 2)]
    task.log = lambda *args, **kwargs: None
    return task


def test_the_second_classifier_learns_the_teachers_best_class(teacher):
    """Half of the loss each: smoothed soft targets for the first, a hard target for the second."""
    distillation = Distillation(TEACHER, checkpoint_path=teacher)
    options = {"mixup": Mixup(mixup_alpha=0.8), "label_smoothing": 0.1}
    task = ready(student(distillation=distillation, **options))
    seen = {}
    task.model.register_forward_pre_hook(lambda module, args: seen.update(images=args[0].clone()))
    task.model.register_forward_hook(lambda module, args, outputs: seen.update(outputs=outputs))
    torch.manual_seed(3)
    images = batch()
    given = images["image"].clone()
    loss = task.training_step(images, 0)
    share = ((seen["images"] - given.flip(0)) / (given - given.flip(0))).mean()
    label = images["label"]
    target = 0.9 * (share * F.one_hot(label) + (1 - share) * F.one_hot(label.flip(0))) + 0.05
    pixels = seen["images"] * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    pixels = pixels + torch.tensor([0.485, 0.456, 0.406])[:, None, None]            # what the teacher sees is centred
    best = timm.create_model(TEACHER, num_classes=2, checkpoint_path=teacher).eval()(2 * pixels - 1).argmax(1)
    logits, taught = (x.log_softmax(1) for x in seen["outputs"])
    expected = -0.5 * (target * logits).sum(1).mean() - 0.5 * taught[torch.arange(4), best].mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert [n for n, p in task.model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_is_that_of_timm(teacher, kind):
    task_module = pytest.importorskip("timm.task.token_distillation")
    distillation = Distillation(TEACHER, checkpoint_path=teacher, kind=kind, alpha=0.3, temperature=2.0)
    task = ready(student(distillation=distillation))
    wrapped = task_module.DistillationTeacher(task._teacher[0].model)
    theirs = task_module.TokenDistillationTask(
        task.model, wrapped, nn.CrossEntropyLoss(), distill_type=kind, task_loss_weight=0.7, temperature=2.0,
        verbose=False,
    )  # fmt: skip
    images = batch()
    with torch.no_grad():
        torch.testing.assert_close(
            task.loss(images["image"], images["label"]), theirs(images["image"], images["label"])["loss"]
        )


def test_the_teacher_is_no_part_of_the_task(data, teacher):
    task = student(distillation=Distillation(TEACHER, checkpoint_path=teacher))
    names = set(task.state_dict())
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(task, data)
    assert set(task.state_dict()) == names
    assert not any(module.training for module in task._teacher[0].modules())
    after = dict(task._teacher[0].model.state_dict())           # batch norm's statistics among it
    assert_same(after, dict(torch.load(teacher, weights_only=True)))
    images = torch.randn(2, 3, 32, 32)
    assert task.eval()(images).shape == (2, 2)                  # both classifiers, averaged


def test_the_average_teaches_from_its_start_on(data):
    parts = []

    class Watch(Classification):
        def loss(self, images, target):
            loss = super().loss(images, target)
            with torch.no_grad():
                logits, average = self(images), self.average(images)
            plain = F.cross_entropy(logits, target)
            extra = -(average.softmax(1) * logits.log_softmax(1)).sum(1).mean()
            parts.append(((loss - plain) / extra).item())
            return loss

    task = Watch(Tiny(), 2, ema_decay=0.5, mesa=Mesa(weight=1.5, start=0.5), optimizer=Optimizer(lr=0.1))
    Trainer(**QUIET, max_epochs=2).fit(task, data)
    assert parts == pytest.approx([0.0] * 6 + [1.5] * 6, abs=1e-5)


SCHEDULE_FREE = {
    "optimizer": Optimizer("adamw_schedule_free", lr=0.05, weight_decay=0.1, ssm_decay="all"),
    "schedule": Schedule(warmup_epochs=1, warmup_lr=0.01, shape="constant"),
}


class Recorded(Classification):
    """Keeps what each step saw, the weights after it, those that are validated and the last checkpoint."""

    def on_train_start(self):
        self.batches, self.rates, self.weights, self.validated = [], [], [], []

    def training_step(self, batch, batch_idx):
        self.batches.append({name: value.clone() for name, value in batch.items()})
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args):
        self.weights.append(self.model.head.weight.detach().clone())

    def validation_step(self, *args):
        self.validated.append(self.model.head.weight.detach().clone())
        super().validation_step(*args)

    def on_train_epoch_end(self):
        self.saved = copy.deepcopy(self.trainer._checkpoint_connector.dump_checkpoint(weights_only=False))


def test_a_schedule_free_optimiser_validates_and_saves_its_average(data):
    """Against the package's own loop: train mode for steps, evaluation mode for the average."""
    schedulefree = pytest.importorskip("schedulefree")
    torch.manual_seed(0)
    model = Tiny()
    reference = copy.deepcopy(model)
    task = Recorded(model, 2, **SCHEDULE_FREE)
    Trainer(**QUIET, max_epochs=2).fit(task, data)
    assert task.rates == pytest.approx([0.01 + 0.04 * min(i / 6, 1) for i in range(12)])
    optimizer = schedulefree.AdamWScheduleFree(reference.parameters(), weight_decay=0.1)
    for i, (images, rate) in enumerate(zip(task.batches, task.rates, strict=True)):
        optimizer.train()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(reference(images["image"]), images["label"]).backward()
        optimizer.step()
        torch.testing.assert_close(task.weights[i], reference.head.weight, rtol=1e-4, atol=1e-6)
    trained = reference.head.weight.clone()
    optimizer.eval()
    average = reference.head.weight
    assert not torch.allclose(trained, average, atol=1e-3)
    for found in (task.validated[-1], task.saved["state_dict"]["model.head.weight"], task.model.head.weight):
        torch.testing.assert_close(found, average, rtol=1e-4, atol=1e-6)
    assert torch.equal(task.saved["trained_state_dict"]["model.head.weight"], task.weights[-1])


def test_validating_changes_no_bit_of_the_training(data):
    pytest.importorskip("schedulefree")
    found = []
    for options in ({"val_check_interval": 1}, {"limit_val_batches": 0}):
        torch.manual_seed(0)
        task = Recorded(Tiny(), 2, **SCHEDULE_FREE)
        Trainer(**QUIET, max_epochs=2, **options).fit(task, data)
        found.append(torch.stack(task.weights))
    assert torch.equal(*found)


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="teacher must be a model of timm or vssm, got 'resnot'"):
        Distillation("resnot")
    with pytest.raises(ValueError, match=r"alpha must be from 0 to 1 and temperature positive, got 2 and 1.0"):
        Distillation(TEACHER, alpha=2)
    with pytest.raises(ValueError, match=rf"know the classes of the data, 2, {TEACHER} was pretrained on 1000"):
        Distillation(TEACHER).build(Tiny(), 2)
    with pytest.raises(ValueError, match=r"weight must be positive and start from 0 to below 1, got 1.0 and 75"):
        Mesa(1.0, start=75)
    with pytest.raises(ValueError, match=r"needs a model with a second classifier .* got a Tiny"):
        Classification(Tiny(), 2, distillation=Distillation(TEACHER))
    with pytest.raises(ValueError, match="distilled training needs two classifiers"):
        student(model_kwargs={"distillation": False}, distillation=Distillation(TEACHER))
    with pytest.raises(ValueError, match="mesa needs ema_decay"):
        Classification(Tiny(), 2, mesa=Mesa(1.0))
    with pytest.raises(ValueError, match=r"set schedule.shape='constant' and ema_decay=null, got 'cosine' and None"):
        Classification(Tiny(), 2, optimizer=Optimizer("adamw_schedule_free"))
    with pytest.raises(ValueError, match="ssm_decay 'all' makes one group"):
        Optimizer(ssm_decay="all", layer_decay=0.9)
    monkeypatch.setitem(__import__("sys").modules, "schedulefree", None)
    with pytest.raises(ImportError, match="pip install schedulefree"):
        Optimizer("adamw_schedule_free").build(Tiny(), 4)
