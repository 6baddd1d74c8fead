"""GroupMamba: what timm demands, and agreement with the published code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import Backbone
from tolerance import TOLERANCE, error

from vssm.checkpoints import load_state
from vssm.cli import verify
from vssm.models.groupmamba import KEYS, VARIANTS, GroupMamba, GroupScan, published
from vssm.models.keys import to_published
from vssm.models.variant import NotCovered
from vssm.scans import scan_table

GOLDEN = Path(__file__).parent.parent / "golden" / "groupmamba"
TINY = next(v for v in VARIANTS if v.name == "test_groupmamba")


class TestGroupMamba(Backbone):
    name = "test_groupmamba"
    refused_orders = ("slices",)
    undecayed = ("skip_scale",)


@pytest.mark.parametrize(
    "name", ["groupmamba_tiny_nodist_n17", pytest.param("groupmamba_tiny", marks=pytest.mark.slow)]
)
def test_agrees_with_the_published_code_in_float64(name, capsys):
    assert verify.main([str(GOLDEN / f"{name}.json")]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


def test_two_classifiers():
    """Their mean in evaluation; both in training, if asked for."""
    model, x = TINY.build(num_classes=5), torch.randn(2, 3, 33, 49)
    pooled = model.eval().forward_head(model.forward_features(x), pre_logits=True)
    labels, teacher = model.get_classifier()
    assert torch.equal(model(x), (labels(pooled) + teacher(pooled)) / 2)
    assert model.train()(x).shape == (2, 5)
    model.set_distilled_training(True)
    logits, taught = model(x)
    assert logits.shape == taught.shape == (2, 5)
    assert not torch.equal(logits, taught)
    assert model.eval()(x).shape == (2, 5)
    model.reset_classifier(3)
    assert [head.out_features for head in model.get_classifier()] == [3, 3]
    assert model.train()(x)[1].shape == (2, 3)


def test_one_classifier():
    model, x = TINY.build(num_classes=5, distillation=False).eval(), torch.randn(2, 3, 33, 49)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(model(x), model.get_classifier()(pooled))
    assert "head.fc_dist.weight" not in model.state_dict()
    with pytest.raises(ValueError, match="create it with distillation=True"):
        model.set_distilled_training()


def test_other_classes_keep_both_classifiers():
    """A published file with other classes loads if asked; neither head comes from it."""
    source, target = TINY.build(num_classes=5), TINY.build(num_classes=3)
    own = {name: value.clone() for name, value in target.state_dict().items() if name.startswith("head.fc")}
    load_state(target, to_published(source.state_dict(), KEYS), KEYS, adapt=["classifier"])
    assert len(own) == 4
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in own.items())
    assert torch.equal(source.stem.proj.weight, target.stem.proj.weight)


def test_each_group_reads_one_direction():
    """A change of the last cell reaches the first one in the groups that read backwards, and only there."""
    scan = GroupScan(16, "cross", None).double()
    with torch.no_grad():
        scan.conv.weight[..., 0, :].zero_()                     # the middle tap alone: cells meet in the scan only
        scan.conv.weight[..., 2, :].zero_()
        scan.conv.weight[..., 1, ::2].zero_()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    other = x.clone()
    other[:, -1] += 1
    changed = (scan(x, (2, 3)) - scan(other, (2, 3)))[0, 0].view(4, 4).abs().amax(1) > 0
    assert changed.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("order", "rows"), [("raster", [0, 0, 0, 0]), ("hilbert", [0, 1, 0, 1]), ("cross", [0, 1, 2, 3])]
)
def test_groups_share_the_rows_of_an_order(order, rows):
    table = GroupScan(16, order, None).table((4, 6), torch.device("cpu"))
    assert torch.equal(table, scan_table(order, (4, 6))[rows])


def test_the_class_token_sees_no_patch():
    """As published: only the mean of the last map reaches the head."""
    model, x = TINY.build(num_classes=5).eval(), torch.randn(1, 24, 3, 4)
    shuffled = x.flatten(2)[..., torch.randperm(12)].view_as(x)
    assert error(model.forward_head(shuffled), model.forward_head(x)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("name", "count"), [("tiny", 23361917), ("small", 34781555), ("base", 57150838)])
def test_the_zoo_has_the_published_size(name, count):
    (variant,) = (v for v in VARIANTS if v.name == f"groupmamba_{name}")
    with torch.device("meta"):
        assert sum(p.numel() for p in variant.build().parameters()) == count


NORM = {"norm_layer": "LayerNorm(eps=1e-6)"}


@pytest.mark.parametrize(
    "kwargs", [{"norm_layer": "BatchNorm2d"}, {**NORM, "qkv_bias": True}, {**NORM, "num_stages": 3}]
)
def test_what_is_not_covered_says_so(kwargs):
    with pytest.raises(NotCovered, match=list(kwargs)[-1]):
        published("x.py:GroupMamba", kwargs)


def test_published_constructors():
    """The class has depths, and a norm, that no factory has."""
    with torch.device("meta"):
        plain = published("x.py:GroupMamba", NORM).model
        small = published("x.py:groupmamba_small", {"num_classes": 3, "in_chans": 1}).model
    assert [len(stage.blocks) for stage in plain.stages] == [3, 4, 6, 3]
    assert [len(stage.blocks) for stage in small.stages] == [3, 4, 16, 3]
    assert small.head.fc_dist.weight.shape == (3, 512)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"dims must be 4 multiples of 4, one a stage, .* got \(16, 18, 20, 24\)"):
        TINY.build(dims=(16, 18, 20, 24))
    with pytest.raises(ValueError, match="returns the map, which no classifier reads, got 5 classes"):
        GroupMamba(**{**TINY.kwargs, "num_classes": 5, "global_pool": ""})
