"""Mamba-YOLO against its golden files and its sheet; its loss against a loop over anchors and objects."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import error
from torch import nn
from torch.nn import functional as F
from tree import ROOT

import vssm
from vssm.cli import verify
from vssm.models.boxes import cell_centres, complete_iou, corners, distances_to_sides, expected_distances
from vssm.models.keys import published_shapes, shapes_of
from vssm.models.mambayolo import KEYS, SIZES, VARIANTS, MambaYOLO, VisionClueMerge, published, published_loss
from vssm.models.mambayolo_loss import TaskAlignedLoss
from vssm.models.variant import NotCovered

GOLDEN = ROOT / "tests" / "golden" / "mambayolo"
ENTRY = "ultralytics.nn.tasks.DetectionModel"


def tiny(**kwargs) -> MambaYOLO:
    return vssm.create_model("test_mamba_yolo", **kwargs)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "name",
    ["loss", "mambayolo_t", *(pytest.param(f"mambayolo_{size}", marks=pytest.mark.slow) for size in "bl")],
)
def test_agrees_with_the_published_code(name, dtype, capsys):
    assert verify.main([str(GOLDEN / f"{name}.json"), "--dtype", dtype]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


@pytest.mark.parametrize(("size", "parameters"), [("t", 6131704), ("b", 21828000), ("l", 57631024)])
def test_has_the_published_size(size, parameters):
    """The sheet counts the 16 bins, which are no parameter here."""
    with torch.device("meta"):
        model = vssm.create_model(f"mamba_yolo_{size}")
    assert sum(p.numel() for p in model.parameters()) + model.head.bins.numel() == parameters


@pytest.mark.parametrize(
    ("classes", "width"), [(1, 64), (80, 80), (99, 99), (200, 100)], ids=lambda value: str(value)
)
def test_the_head_is_as_wide_as_its_classes_ask_for(classes, width):
    built = published(ENTRY, {"cfg": "mamba-yolo/Mamba-YOLO-T.yaml", "ch": 4, "nc": classes})
    shapes = published_shapes(shapes_of(built.model), built.keys)
    assert shapes["model.21.cv3.0.0.conv.weight"] == (width, 64, 3, 3)
    assert shapes["model.21.cv3.2.2.weight"] == (classes, width, 1, 1)
    assert shapes["model.0.conv.0.weight"] == (16, 4, 3, 3)
    bias = built.model.head.classes[1][-1].bias
    assert torch.allclose(bias, torch.full_like(bias, math.log(5 / classes / 40**2)))


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (61, 94)], ids=str)
def test_returns_maps_in_training_and_boxes_in_evaluation(size):
    """Sizes that the stem rounds up to a multiple of 32 are as good as it."""
    model, x = tiny(num_classes=3), torch.rand(2, 3, *size)
    rows, columns = -(-size[0] // 32), -(-size[1] // 32)
    maps = model(x)
    assert [tuple(y.shape) for y in maps] == [(2, 67, rows * n, columns * n) for n in (4, 2, 1)]
    boxes = model.eval()(x)
    assert boxes.shape == (2, 7, 21 * rows * columns)
    assert (boxes[:, 2:4] >= 0).all()
    assert ((boxes[:, 4:] > 0) & (boxes[:, 4:] < 1)).all()


@pytest.mark.parametrize("size", [(48, 64), (64, 60 - 1), (16, 32)], ids=str)
def test_refuses_other_sizes(size):
    with pytest.raises(ValueError, match=r"MambaYOLO: H and W must be multiples of 32, got \("):
        tiny()(torch.rand(1, 3, *size))


def test_every_parameter_learns_and_images_of_a_batch_do_not_mix():
    model = tiny(num_classes=3)
    x = torch.rand(2, 3, 64, 64)
    torch.stack([y.square().mean() for y in model(x)]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    together, alone = model(x), torch.cat([model(each) for each in x.split(1)])
    assert error(together, alone) < 1e-4


def test_checkpointing_changes_nothing():
    model, x = tiny(num_classes=3), torch.rand(2, 3, 64, 64)
    plain = model(x)
    model.set_grad_checkpointing()
    saving = model(x)
    torch.stack([y.mean() for y in saving]).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, saving))
    assert model.stages[0].blocks[0].mixers[0].ssm.A_log.grad is not None


def test_starts_as_published():
    model = tiny()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all((norm.eps, norm.momentum) == (1e-3, 0.03) for norm in norms)
    ssm = model.neck.top_down[0].mixers[1].ssm
    assert (ssm.A_log == 0).all()
    assert (ssm.D == 1).all()
    assert 0.5 < ssm.dt_bias.std() < 1.5
    assert (model.head.box[0][-1].bias == 1).all()
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if name.endswith("dt_bias")}


def test_boxes_of_large_maps_are_decoded_in_float32():
    """In bfloat16 the cells around the 150th would share their centre."""
    head = tiny(num_classes=1).head
    raw = [torch.zeros(1, 65, 1, 160 // s, dtype=torch.bfloat16) for s in (1, 2, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        boxes = head.decode(raw)
    assert boxes.dtype == torch.float32
    assert boxes[0, 0, :160].tolist() == [8 * (i + 0.5) for i in range(160)]


def test_merges_phases_column_by_column():
    merge = VisionClueMerge(1, 1)
    seen = []
    merge.project.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    merge(torch.arange(8.0).view(1, 1, 2, 4))
    assert seen[0][0].flatten(1).tolist() == [[0, 2], [4, 6], [1, 3], [5, 7]]


@pytest.mark.parametrize(
    ("entry", "kwargs", "reason"),
    [
        (ENTRY, {"cfg": "yolo-mamba-seg.yaml", "nc": 80}, "the detectors are Mamba-YOLO-T, -B and -L.yaml"),
        (ENTRY, {"cfg": "Mamba-YOLO-T.yaml", "fuse": True}, "arguments fuse"),
        ("ultralytics.nn.tasks.SegmentationModel", {"cfg": "Mamba-YOLO-T.yaml"}, "no model of this family"),
    ],
)
def test_says_what_it_does_not_cover(entry, kwargs, reason):
    with pytest.raises(NotCovered, match=reason):
        published(entry, kwargs)


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="MambaYOLO: num_classes must be 1 or more, got 0"):
        MambaYOLO(num_classes=0)
    with pytest.raises(ValueError, match="MambaYOLO: dims and depths must name four stages"):
        MambaYOLO(depths=(1, 1, 1))


def test_rows_are_the_sizes():
    rows = {row.name: row for row in VARIANTS}
    assert rows["mamba_yolo_b"].kwargs == SIZES["b"]
    assert list(map(str, rows["mamba_yolo_t"].keys)) == list(map(str, KEYS))
    assert vssm.list_models("mamba_yolo*", task="detection") == ["mamba_yolo_b", "mamba_yolo_l", "mamba_yolo_t"]


# ---- boxes ----


def test_distances_and_corners_are_inverse():
    centres, pixels = cell_centres([torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 1)], [8, 16])
    assert centres.tolist() == [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [0.5, 1.5], [1.5, 1.5], [2.5, 1.5], [0.5, 0.5]]
    assert pixels.flatten().tolist() == [8] * 6 + [16]
    boxes = torch.tensor([[0.0, 0.25, 2.0, 1.0]])
    assert torch.equal(corners(centres, distances_to_sides(centres, boxes)), boxes.expand(7, -1))
    logits = torch.full((4, 16), -1e4).scatter_(1, torch.tensor([[0], [3], [15], [7]]), 0.0)
    assert expected_distances(logits, torch.arange(16.0)).tolist() == [0, 3, 15, 7]


def test_complete_iou_is_that_of_the_paper():
    """One box beside another of the same shape: only the distance of the centres counts beside the overlap."""
    a, b = torch.tensor([0.0, 0.0, 4.0, 2.0]).double(), torch.tensor([2.0, 0.0, 6.0, 2.0]).double()
    assert complete_iou(a, a).item() == pytest.approx(1, abs=1e-6)
    assert complete_iou(a, b).item() == pytest.approx(4 / 12 - 4 / 40, abs=1e-6)
    tall = torch.tensor([1.0, -1.0, 3.0, 3.0]).double()
    shape = 4 / math.pi**2 * (math.atan(2 / 4) - math.atan(4 / 2)) ** 2
    iou = 4 / 12
    assert complete_iou(a, tall).item() == pytest.approx(iou - shape**2 / (shape - iou + 1), abs=1e-6)


# ---- loss ----


def objects(*rows):
    """A target of rows x1, y1, x2, y2, label."""
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
    return {"boxes": table[:, :4], "labels": table[:, 4].long()}


def maps(classes: int = 3, images: int = 2, bins: int = 16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(images, 4 * bins + classes, 64 // s, 96 // s, dtype=torch.float64) for s in (8, 16, 32)]


def slow_loss(raw, targets, bins=16):
    """The sheet, anchor by anchor."""
    box = 4 * bins
    flat = torch.cat([x.flatten(2) for x in raw], 2).mT
    centres, pixels = cell_centres(raw, (8, 16, 32))
    places = torch.arange(bins, dtype=torch.float64)
    wanted = torch.zeros_like(flat[..., box:])
    pairs, assigned = [], []
    for i, target in enumerate(targets):
        logits, scores = flat[i, :, :box].unflatten(1, (4, bins)), flat[i, :, box:].sigmoid()
        boxes = corners(centres, expected_distances(logits, places))
        n, cells = len(target["labels"]), len(centres)
        align, iou = torch.zeros(n, cells, dtype=torch.float64), torch.zeros(n, cells, dtype=torch.float64)
        inside = set()
        for g in range(n):
            for a in range(cells):
                x, y = (centres[a] * pixels[a]).tolist()
                x1, y1, x2, y2 = target["boxes"][g].tolist()
                if min(x - x1, y - y1, x2 - x, y2 - y) > 1e-9 and x1 + y1 + x2 + y2 != 0:
                    inside.add((g, a))
                    iou[g, a] = complete_iou(target["boxes"][g], boxes[a] * pixels[a]).clamp(min=0)
                    align[g, a] = scores[a, target["labels"][g]] ** 0.5 * iou[g, a] ** 6
        claims = {a: [] for a in range(cells)}
        for g in range(n):
            for a in align[g].topk(10).indices.tolist():          # which of those aligned by 0, topk alone knows
                if (g, a) in inside:
                    claims[a].append(g)
        owner = {a: (c[0] if len(c) == 1 else int(iou[:, a].argmax())) for a, c in claims.items() if c}
        for g in range(n):
            mine = [a for a, o in owner.items() if o == g]
            for a in mine:
                top, best = max(align[g, b] for b in mine), max(iou[g, b] for b in mine)
                score = (align[g, a] * best / (top + 1e-9)).detach()
                wanted[i, a, target["labels"][g]] = score
                pairs.append((i, a, score, target["boxes"][g] / pixels[a]))
                assigned.append((i, a, g))
    norm = max(float(wanted.sum()), 1.0)
    items = {"loss_cls": F.binary_cross_entropy_with_logits(flat[..., box:], wanted, reduction="sum") / norm}
    items["loss_box"] = items["loss_dfl"] = flat.sum() * 0
    for i, a, score, goal in pairs:
        logits = flat[i, a, :box].view(4, bins)
        found = corners(centres[a], expected_distances(logits, places))
        items["loss_box"] = items["loss_box"] + (1 - complete_iou(found, goal)) * score / norm
        distances = distances_to_sides(centres[a], goal).clamp(0, bins - 1.01).tolist()
        for side, distance in zip(logits, distances, strict=True):
            low = int(distance)
            log = side.log_softmax(0)
            term = (low + 1 - distance) * log[low] + (distance - low) * log[low + 1]
            items["loss_dfl"] = items["loss_dfl"] - term * score / norm / 4
    gains = {"loss_box": 7.5, "loss_cls": 0.5, "loss_dfl": 1.5}
    return {name: items[name] * gain * len(targets) for name, gain in gains.items()}, sorted(assigned)


CROWD = objects((4, 4, 60, 60, 0), (8, 8, 56, 60, 1), (10, 4, 44, 40, 2), (0, 0, 96, 64, 0), (70, 40, 90, 60, 1))
THIN = objects((20, 50, 110, 58, 1), (60, 50, 90, 56, 2), (10, 50, 100, 56, 0), (80, 50, 110, 56, 1))


@pytest.mark.parametrize(
    "targets",
    [[CROWD, objects((30, 10, 90, 30, 2))], [objects(), CROWD], [objects(), objects()],
     [objects((-40, -30, 40, 30, 1), (4, 4, 60, 60, 0)), objects((-40, -30, 40, 30, 1))], [THIN, CROWD]],
    ids=["crowd", "one empty", "all empty", "around the corner", "thin"],
)  # fmt: skip
def test_the_loss_and_its_gradient_are_those_of_the_sheet(targets):
    """Among them objects that claim the same cells, or cells that are not aligned at all, and a clamped distance."""
    raw = [x.requires_grad_() for x in maps()]
    loss = TaskAlignedLoss()
    found, (expected, assigned) = loss(raw, targets), slow_loss(raw, targets)
    for name in expected:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-10, abs=1e-12), name
    assignment = loss.assign(raw, targets)
    pairs = assignment.positive.nonzero().tolist()
    assert [(i, a, int(assignment.index[i, a])) for i, a in pairs] == assigned
    gradients = (torch.autograd.grad(sum(x.values()), raw) for x in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_loss_is_computed_in_float32_from_half_precision_maps():
    raw = [x.half() for x in maps()]
    losses = TaskAlignedLoss()(raw, [CROWD, objects()])
    assert {x.dtype for x in losses.values()} == {torch.float32}
    assert all(torch.isfinite(x) for x in losses.values())


def test_the_loss_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="TaskAlignedLoss: targets must be one an image, 2, got 1"):
        TaskAlignedLoss()(maps(), [CROWD])
    with pytest.raises(ValueError, match="TaskAlignedLoss: labels must be 0 to 1, got 0 to 2"):
        TaskAlignedLoss()(maps(classes=2), [CROWD, CROWD])


def test_the_published_loss_has_any_number_of_bins():
    rows = [[1, 0, 0.3, 0.4, 0.5, 0.7], [1, 2, 0.6, 0.5, 0.9, 0.3]]
    table = torch.tensor(rows, dtype=torch.float64)
    centre, half = table[:, 2:4], table[:, 4:] / 2
    corner = torch.cat([centre - half, centre + half], 1) * torch.tensor([96, 64, 96, 64])
    expected, _ = slow_loss(maps(bins=6), [objects(), {"boxes": corner, "labels": table[:, 1].long()}], bins=6)
    found = published_loss({"box": 7.5, "cls": 0.5, "dfl": 1.5, "reg_max": 6}, maps(bins=6), (8, 16, 32), rows)
    assert found["loss_total"].item() == pytest.approx(sum(expected.values()).item(), rel=1e-10)
