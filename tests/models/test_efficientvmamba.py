"""EfficientVMamba: what timm demands, and agreement with the published code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import Backbone
from tolerance import TOLERANCE, error

from vssm.cli import verify
from vssm.models.efficientvmamba import VARIANTS, AtrousMixer, EfficientVMamba, published
from vssm.models.keys import published_shapes, shapes_of
from vssm.models.variant import NotCovered

GOLDEN = Path(__file__).parent.parent / "golden" / "efficientvmamba"


class TestEfficientVMamba(Backbone):
    name = "test_efficientvmamba"

    def cells(self, reduction):
        """The stem drops what is left of a patch; later stages pad."""
        return [-(-(size // 4) // (reduction // 4)) for size in self.size]


@pytest.mark.parametrize("name", ["efficientvmamba_tiny_backbone", "efficientvmamba_small_d64", "ops_efficient_scan"])
def test_agrees_with_the_published_code_in_float64(name, capsys):
    assert verify.main([str(GOLDEN / f"{name}.json")]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


@pytest.mark.parametrize("grid", [(6, 4), (5, 7), (1, 1)], ids=str)
def test_projecting_what_a_direction_reads_changes_nothing(grid):
    """Values and gradients are those of a mixer that projects every cell for every direction."""
    mixer = AtrousMixer(16, expand=2.0, scan="atrous").double()
    assert mixer.leaves_out
    x = torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64, requires_grad=True)
    found = []
    for mixer.leaves_out in (True, False):
        y = mixer(x, grid)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
    for actual, expected in zip(*found, strict=True):
        assert error(actual, expected) < TOLERANCE[torch.float64]


def test_orders_that_leave_nothing_out_project_every_cell():
    assert not AtrousMixer(16, expand=2.0, scan="cross").leaves_out


@pytest.mark.parametrize(
    ("name", "count"),
    [("tiny", 6493660), ("small", 24757456), ("small_d64", 11273688), ("base", 33717136)],
)
def test_the_zoo_has_the_published_size(name, count):
    (variant,) = (v for v in VARIANTS if v.name == f"efficientvmamba_{name}")
    with torch.device("meta"):
        assert sum(p.numel() for p in variant.build().parameters()) == count


def test_arguments_that_the_published_code_ignores_are_ignored():
    """d_state never reaches its blocks."""
    with torch.device("meta"):
        built = published("x.py:EfficientVSSM", {"dims": 16, "depths": [1, 1, 1, 1], "d_state": 4, "ssm_ratio": 1.0})
    assert built.model.stages[0].blocks[0].mixer.ssm.A_log.shape == (4, 16, 16)


def test_an_mlp_may_follow_the_mixers():
    """Norm, MLP, add; in the blocks that scan alone."""
    built = published("x.py:EfficientVSSM", {"dims": 16, "depths": [1, 1, 1, 1], "mlp_ratio": 1.5, "num_classes": 3})
    model = built.model.double().eval()
    entries = published_shapes(shapes_of(model), built.keys)
    assert {name for name in entries if ".mlp." in name and name.endswith("weight")} == {
        f"layers.{i}.blocks.0.mlp.fc{n}.weight" for i in (0, 1) for n in (1, 2)
    }
    assert entries["layers.0.blocks.0.mlp.fc1.weight"] == (24, 16)
    block, x = model.stages[0].blocks[0], torch.randn(2, 16, 5, 6, dtype=torch.float64)
    y, (norm, mlp) = block(x), (block.norm2, block.mlp)
    block.mlp = None
    x = block(x).movedim(1, -1)
    h = torch.nn.functional.layer_norm(x, (16,), norm.weight, norm.bias)
    expected = x + mlp.fc2(torch.nn.functional.gelu(mlp.fc1(h)))
    assert error(y.movedim(1, -1), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("kwargs", [{"step_size": 3}, {"window_shift": 1}, {"depths": [1]}])
def test_what_is_not_covered_says_so(kwargs):
    reason = "the published defaults of dims" if "depths" in kwargs else next(iter(kwargs))
    with pytest.raises(NotCovered, match=reason):
        published("x.py:EfficientVSSM", kwargs)


def test_one_width_a_stage():
    with pytest.raises(ValueError, match=r"dim must name one width a stage \(4 in depths\), got \(8, 8\)"):
        EfficientVMamba(dim=(8, 8))
