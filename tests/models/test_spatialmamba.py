"""Spatial-Mamba: what timm demands, and agreement with the published code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import Backbone
from tolerance import TOLERANCE, error
from torch.nn import functional as F

from vssm.cli import verify
from vssm.models.spatialmamba import VARIANTS, FusedStateMixer, SpatialMamba, StateFusion, published
from vssm.models.variant import NotCovered
from vssm.scans import scan_table

GOLDEN = Path(__file__).parent.parent / "golden" / "spatialmamba"


class TestSpatialMamba(Backbone):
    name = "test_spatialmamba"
    decayed = frozenset({"A_log"})
    undecayed = ("fusion.alpha",)


@pytest.mark.parametrize(
    "name", ["narrow_d1", "narrow_d1_mlp2", pytest.param("spatialmamba_tiny_backbone", marks=pytest.mark.slow)]
)
def test_agrees_with_the_published_code_in_float64(name, capsys):
    assert verify.main([str(GOLDEN / f"{name}.json")]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


@pytest.mark.parametrize("size", [(13, 12), (3, 4), (1, 1)], ids=str)
def test_fusion_is_the_merged_kernel_of_the_published_inference(size):
    """11 x 11 taps, indices clamped to the map."""
    fusion, x = StateFusion(2).double(), torch.randn(1, 2, *size, dtype=torch.double)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    expected = torch.zeros_like(x)
    rows, columns = torch.arange(size[0]), torch.arange(size[1])
    for m, dilation in enumerate((1, 3, 5)):
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                tap = fusion.alpha[m] * fusion.weight[m, :, 1 + i, 1 + j]
                r, c = (rows + dilation * i).clamp(0, size[0] - 1), (columns + dilation * j).clamp(0, size[1] - 1)
                expected = expected + tap[:, None, None] * x[:, :, r][..., c]
    assert error(fusion(x), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("scan", ["raster", "bidirectional"])
def test_the_mixer_reads_out_fused_states(scan):
    """Step by step, from the sheet; the rows of an order add up."""
    mixer, grid = FusedStateMixer(16, scan).double(), (4, 3)
    x = torch.randn(2, 12, 16, dtype=torch.double)
    u, z = mixer.in_proj(x).chunk(2, -1)
    u = F.silu(mixer.conv(u.mT.unflatten(2, grid))).flatten(2).mT
    y, ssm = 0, mixer.ssm
    for k, order in enumerate(scan_table(scan, grid).tolist()):
        dt, B, C = (u @ ssm.x_proj[k].T).split([1, 1, 1], -1)
        dt = F.softplus(dt @ ssm.dt_weight[k].T + ssm.dt_bias[k])
        h, states = torch.zeros(2, 32, dtype=torch.double), torch.empty(2, 12, 32, dtype=torch.double)
        for cell in order:
            h = torch.exp(-dt[:, cell] * ssm.A_log[k, :, 0].exp()) * h + dt[:, cell] * B[:, cell] * u[:, cell]
            states[:, cell] = h
        y = y + mixer.fusion(states.mT.unflatten(2, grid)).flatten(2).mT * C + ssm.D[k] * u
    expected = (F.layer_norm(y, (32,)) * F.silu(z)) @ mixer.out_proj.weight.T
    assert error(mixer(x, grid), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(("name", "count"), [("tiny", 26748862), ("small", 43074280), ("base", 95745592)])
def test_the_zoo_has_the_published_size(name, count):
    (variant,) = (v for v in VARIANTS if v.name == f"spatialmamba_{name}")
    with torch.device("meta"):
        assert sum(p.numel() for p in variant.build().parameters()) == count


def test_files_of_one_drive_are_not_cached_under_one_name():
    assert len({w.hf_hub_filename for v in VARIANTS for w in v.weights.values()}) == 3


@pytest.mark.parametrize("kwargs", [{"d_state": 2}, {"norm_layer": "bn"}, {"window": 7}])
def test_what_is_not_covered_says_so(kwargs):
    with pytest.raises(NotCovered, match=next(iter(kwargs))):
        published("x.py:SpatialMamba", kwargs)


def test_the_published_class_has_defaults_of_its_own():
    with torch.device("meta"):
        model = published("x.py:SpatialMamba", {}).model
    assert [len(stage.blocks) for stage in model.stages] == [2, 2, 9, 2]
    assert model.num_features == 768


def test_another_entry_is_not_covered():
    with pytest.raises(NotCovered, match="no model of this family"):
        published("x.py:StateFusion", {})


def test_one_width_a_stage():
    with pytest.raises(ValueError, match=r"dim must name one width a stage \(4 in depths\), got \(8, 8\)"):
        SpatialMamba(dim=(8, 8))
