"""Every detector keeps torchvision's protocol, on every kind of backbone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator

import vssm
from vssm.layers.pyramid import FeaturePyramid
from vssm.models.mambayolo_detector import MambaYOLODetector
from vssm.registries.torchvision import DETECTORS
from vssm.tasks.optimizer import Optimizer

NARROW = {"out_channels": 32}
LOSSES = {
    "retinanet": {"classification", "bbox_regression"},
    "fcos": {"classification", "bbox_regression", "bbox_ctrness"},
    "faster_rcnn": {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"},
    "mask_rcnn": {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"},
    "test_mamba_yolo": {"loss_box", "loss_cls", "loss_dfl"},
}
BACKBONES = ["test_vmamba", "test_vim", "test_plainmamba", "test_localvim", "test_spatialmamba"]


def detector(name, backbone="test_vmamba", num_classes=4, **kwargs):
    torch.manual_seed(0)
    if name not in DETECTORS:
        return vssm.create_detector(name, num_classes=num_classes, image_size=96, **kwargs)
    if name in ("faster_rcnn", "mask_rcnn"):
        kwargs = {"box_detections_per_img": 5, "rpn_post_nms_top_n_test": 20, "box_score_thresh": 0.0, **kwargs}
    else:
        kwargs = {"score_thresh": 0.0, "detections_per_img": 5, **kwargs}
    kwargs["pyramid"] = {**NARROW, **kwargs.get("pyramid", {})}
    return vssm.create_detector(name, backbone, num_classes=num_classes, min_size=64, max_size=96, **kwargs)


def images():
    torch.manual_seed(1)
    return [torch.rand(3, 60, 90), torch.rand(3, 100, 50)]


def targets(empty=(False, True)):
    """Two objects in an image, or none."""
    found = []
    for none, (height, width) in zip(empty, ((60, 90), (100, 50)), strict=True):
        n = 0 if none else 2
        masks = torch.zeros(n, height, width, dtype=torch.uint8)
        masks[:, 10:30, 10:30] = 1
        boxes = torch.tensor([[5.0, 5, 40, 40], [20, 10, 48, 55]])[:n]
        found.append({"boxes": boxes, "labels": torch.tensor([1, 3])[:n], "masks": masks})
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_trains_a_step_on_images_of_different_sizes_and_predicts(name):
    model = detector(name)
    assert model.training
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = model(images(), targets())
    assert losses.keys() == LOSSES[name]
    torch.stack(list(losses.values())).sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    optimizer.step()
    with torch.no_grad():
        found = model.eval()(images())
    assert len(found) == 2
    for each, image in zip(found, images()):
        n, (height, width) = len(each["boxes"]), image.shape[1:]
        assert each["boxes"].shape == (n, 4)
        assert each["labels"].dtype == torch.int64
        assert ((each["labels"] >= 1) & (each["labels"] <= 3)).all() or name in ("retinanet", "fcos")
        assert each["scores"].shape == each["labels"].shape == (n,)
        assert (each["boxes"] >= 0).all()
        assert (each["boxes"][:, [0, 2]] <= width).all()
        assert (each["boxes"][:, [1, 3]] <= height).all()
        if name == "mask_rcnn":
            assert each["masks"].shape == (n, 1, height, width)
    assert any(len(each["boxes"]) for each in found)


@pytest.mark.parametrize("name", LOSSES)
def test_images_without_objects_still_give_losses(name):
    model = detector(name)
    losses = model(images(), targets(empty=(True, True)))
    assert all(torch.isfinite(value) for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", ["fcos", "faster_rcnn"])
def test_takes_every_kind_of_backbone(name, backbone):
    model = detector(name, backbone)
    losses = model(images(), targets())
    torch.stack(list(losses.values())).sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    assert len(model.eval()(images())) == 2


def test_a_detector_is_torchvisions_own_around_our_backbone():
    """The same arguments, heads, anchors and transform as torchvision's RetinaNet."""
    ours = vssm.create_detector("retinanet", "test_vmamba", num_classes=7)
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=7)
    assert ours.anchor_generator.sizes == list(theirs.anchor_generator.sizes)
    shapes = [{k: v.shape for k, v in model.head.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert repr(ours.transform) == repr(theirs.transform)
    for name in ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.backbone.strides == [8, 16, 32, 64, 128]
    assert vssm.create_detector("mask_rcnn", "test_vmamba", num_classes=7).backbone.strides == [4, 8, 16, 32, 64]


def test_images_are_normalised_as_the_backbone_was_trained():
    grey = detector("fcos", backbone_kwargs={"in_chans": 1})
    assert grey.transform.image_mean == [pytest.approx(0.449)]
    assert len(grey([image[:1] for image in images()], targets())) == 3
    custom = vssm.create_model("test_vmamba")
    custom.pretrained_cfg = {**custom.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    assert detector("fcos", custom).transform.image_mean == [0.1, 0.2, 0.3]
    assert detector("fcos", image_mean=[0.5] * 3).transform.image_mean == [0.5] * 3


def test_the_backbone_starts_from_a_classifier_with_other_classes(tmp_path):
    source = vssm.create_model("test_vmamba", num_classes=10, in_chans=1)
    torch.save({"state_dict": {f"model.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "best.ckpt")
    made = detector("fcos", checkpoint_path=tmp_path / "best.ckpt", backbone_kwargs={"in_chans": 1})
    body = made.backbone.body
    assert torch.equal(body.stem.conv1.weight, source.stem.conv1.weight)
    assert all(torch.equal(a, b) for a, b in zip(body.stages.parameters(), source.stages[:4].parameters()))


@pytest.mark.parametrize("backbone", ["test_spatialmamba", "test_plainmamba"])
def test_frozen_stages_neither_train_nor_change_mode(backbone):
    model = detector("fcos", backbone, pyramid={"frozen_stages": 1}).train()
    body = model.backbone.body
    frozen = [body.stem, body.stages[0]] if hasattr(body, "stem") else [body.trunk.patch_embed, body.trunk.blocks[0]]
    trained = body.stages[1] if hasattr(body, "stem") else body.trunk.blocks[1]
    for part in frozen:
        assert not any(module.training for module in part.modules())
        assert not any(p.requires_grad for p in part.parameters())
    assert trained.training
    assert all(p.requires_grad for p in trained.parameters())
    before = [b.clone() for part in frozen for b in part.buffers()]
    torch.stack(list(model(images(), targets()).values())).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (b for part in frozen for b in part.buffers())))
    if not hasattr(body, "stem"):
        assert not body.trunk.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("mode", "trains", "moves"), [("train", True, True), ("eval", True, False), ("frozen", False, False)]
)
def test_batch_norms_of_the_backbone(mode, trains, moves):
    model = detector("fcos", "test_spatialmamba", pyramid={"batch_norm": mode})
    norms = [m for m in model.backbone.body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    model.eval().train()
    assert {m.training for m in norms} == {moves}
    assert {p.requires_grad for m in norms for p in m.parameters()} == {trains}


def test_checkpointing_changes_neither_losses_nor_gradients():
    plain, saving = detector("fcos"), detector("fcos")
    saving.set_grad_checkpointing()
    found = []
    for model in (plain, saving):
        losses = model(images(), targets())
        torch.stack(list(losses.values())).sum().backward()
        found.append([*losses.values(), model.backbone.body.stem.conv1.weight.grad])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*found))


@pytest.mark.parametrize("name", LOSSES)
def test_runs_in_mixed_precision(name):
    model = detector(name)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images(), targets())
        found = model.eval()(images())
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(each["boxes"]).all() for each in found)


@pytest.mark.parametrize(
    ("name", "backbone"), [("fcos", "test_vmamba"), ("fcos", "test_plainmamba"), ("test_mamba_yolo", None)]
)
def test_learning_rates_fall_towards_the_stem(name, backbone):
    """Pyramid and head at the full rate, each layer below at half the rate of the next."""
    model = detector(name, backbone)
    groups = Optimizer(layer_decay=0.5, ssm_decay="published").groups(model)
    names = {id(p): key for key, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert rates.keys() == dict(model.named_parameters()).keys()
    heads = [key for key in rates if key.startswith(("head.", "backbone.fpn", "model.head", "model.neck"))]
    assert {rates[key] for key in heads} == {1.0}
    first, last = {
        "test_vmamba": ("backbone.body.stem.conv1.weight", "backbone.body.stages.3.blocks.0.mixer.in_proj.weight"),
        "test_plainmamba": ("backbone.body.trunk.blocks.0.", "backbone.body.trunk.blocks.2."),
        None: ("model.stem.0.conv.weight", "model.stages.3.blocks.0.mlp.fc1.weight"),
    }[backbone]
    low, high = ({rates[key] for key in rates if key.startswith(part)} for part in (first, last))
    assert max(low) < min(high) == max(high) == 0.5
    undecayed = model.no_weight_decay()
    assert undecayed <= decays.keys()
    assert all(decays[key] == 0 for key in undecayed)


def test_other_levels_get_anchors_of_their_strides():
    model = detector("fcos", pyramid={"levels": [4, 8], "extra": None})
    assert model.anchor_generator.sizes == [(4,), (8,)]
    assert model.backbone.strides == [4, 8]
    two_stage = detector("faster_rcnn", pyramid={"levels": [8, 16], "extra": "pool"})
    assert two_stage.rpn.anchor_generator.sizes == [(64,), (128,), (256,)]
    assert two_stage.roi_heads.box_roi_pool.featmap_names == ["0", "1"]
    own = AnchorGenerator([(16,)] * 2, [(1.0,)] * 2)
    assert detector("fcos", pyramid={"levels": [4, 8], "extra": None}, anchor_generator=own).anchor_generator is own


def test_only_the_maps_that_are_read_are_made():
    model = detector("fcos", "test_plainmamba")
    assert isinstance(model.backbone.body.pyramid[0], nn.Identity)  # stride 4
    assert list(detector("fcos").backbone.body.out_norms) == ["1", "2", "3"]


@pytest.mark.parametrize("norm", [None, "batch", "group"])
def test_the_pyramid_may_have_norms(norm):
    model = detector("fcos", pyramid={"norm": norm})
    kinds = {type(m) for m in model.backbone.fpn.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))}
    assert kinds == {None: set(), "batch": {nn.BatchNorm2d}, "group": {nn.GroupNorm}}[norm]


@pytest.mark.parametrize(
    ("name", "backbone", "kwargs", "message"),
    [
        ("retinanett", "test_vmamba", {}, "no detector named 'retinanett'; did you mean retinanet"),
        ("fcos", None, {}, "fcos needs a backbone"),
        ("fcos", "vmamba_tinny", {}, "create_detector: no model named 'vmamba_tinny'; did you mean vmamba_tiny"),
        ("fcos", "mamba_yolo_t", {}, "must be a classifier of the zoo, mamba_yolo_t does detection"),
        ("fcos", "test_vmamba", {"num_classes": 1}, "num_classes must be 2 or more"),
        ("fcos", "test_vmamba", {"box_score_thresh": 0.1}, "fcos takes no box_score_thresh; it takes anchor_generator"),
        ("fcos", "test_vmamba", {"pyramid": {"levels": [2, 4]}}, r"strides of the backbone's maps, \[4, 8, 16, 32\]"),
        ("fcos", "test_vmamba", {"pyramid": {"levels": [8, 4]}}, "rising"),
        ("fcos", "test_vmamba", {"pyramid": {"extra": "p6"}}, "extra must be one of None, 'pool', 'p6p7', got 'p6'"),
        ("fcos", "test_vmamba", {"pyramid": {"frozen_stages": 5}}, "frozen_stages must be 0 to 4, got 5"),
        ("fcos", nn.Conv2d(3, 3, 1), {}, "must be a classifier of the zoo, got a Conv2d"),
        ("fcos", nn.Identity(), {"pretrained": True}, "are for a backbone given by name, got a Identity"),
        ("mamba_yolo_t", "test_vmamba", {}, "mamba_yolo_t has its own backbone; drop backbone, got 'test_vmamba'"),
        ("test_mamba_yolo", None, {"image_size": 100}, "image_size must be a multiple of 32, got 100"),
    ],
)
def test_refuses_what_does_not_go_together(name, backbone, kwargs, message):
    with pytest.raises(ValueError, match=message):
        vssm.create_detector(name, backbone, **{"num_classes": 3, **kwargs})


def test_the_pyramid_reads_all_maps_if_not_told_which():
    body = vssm.create_model("test_vmamba")
    maps = FeaturePyramid(vssm.models.backbone.as_backbone(body), out_channels=16)(torch.rand(1, 3, 64, 96))
    assert {key: tuple(x.shape) for key, x in maps.items()} == {
        "0": (1, 16, 16, 24), "1": (1, 16, 8, 12), "2": (1, 16, 4, 6), "3": (1, 16, 2, 3)
    }  # fmt: skip


# ---- Mamba-YOLO under the protocol ----


def yolo(**kwargs) -> MambaYOLODetector:
    return detector("test_mamba_yolo", **kwargs)


def test_letterbox_keeps_the_ratio_and_fills_with_grey():
    model = yolo().train()
    batch, (wide, high) = model.letterbox([torch.ones(3, 48, 96), torch.zeros(3, 50, 25)])
    assert batch.shape == (2, 3, 96, 96)
    assert (wide.scale, wide.left, wide.top) == (1.0, 0, 24)
    assert (high.scale, high.left, high.top) == (1.92, 24, 0)
    assert torch.allclose(batch[0, :, :24], torch.tensor(114 / 255))
    assert (batch[0, :, 24:72] == 1).all()
    boxes = torch.tensor([[1.0, 2, 20, 40]])
    assert torch.allclose(high.to_image(high.to_batch(boxes)), boxes, atol=1e-5)
    small, _ = model.eval().letterbox([torch.ones(3, 40, 96), torch.ones(3, 48, 90)])
    assert small.shape == (2, 3, 64, 96)                        # no larger than its images ask for


def test_finds_what_the_maps_say():
    """A cell that is sure of two classes gives two boxes, if it may; a second cell with the same box gives none."""
    model, single = yolo(num_classes=4).eval(), yolo(num_classes=4, multi_label=False).eval()
    decoded = torch.zeros(7, 3)
    decoded[:4] = torch.tensor([[50.0, 40, 20, 30], [50, 40, 20, 30], [10, 10, 5, 5]]).T
    decoded[4:, 0] = torch.tensor([0.9, 0.0, 0.6])
    decoded[4, 1] = 0.8
    placement = model.letterbox([torch.zeros(3, 96, 96)])[1][0]
    found = model.found(decoded, placement)
    assert found["labels"].tolist() == [1, 3]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.6])
    assert found["boxes"].tolist() == [[40, 25, 60, 55]] * 2
    assert {name: x.tolist() for name, x in single.found(decoded, placement).items()} == {
        name: x[:1].tolist() for name, x in found.items()
    }


def test_training_needs_targets_that_fit():
    model = yolo(num_classes=3)
    with pytest.raises(ValueError, match="MambaYOLODetector: training needs targets, one an image"):
        model(images())
    bad = targets()
    bad[0]["labels"] = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="MambaYOLODetector: labels must be 1 to 2, got 0 to 1"):
        model(images(), bad)
    bad[0]["boxes"] = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"a target has boxes \(n, 4\) and labels \(n\), got \(2, 5\)"):
        model(images(), bad)
