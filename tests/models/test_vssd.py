"""VSSD: what timm demands, and agreement with the published code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import Backbone
from sheets import norm, unit
from timm.optim import param_groups_weight_decay
from tolerance import TOLERANCE, error
from torch.nn import functional as F

from vssm.cli import verify
from vssm.models.keys import to_published
from vssm.models.variant import NotCovered
from vssm.models.vssd import VARIANTS, VSSD, DualityMixer, published

GOLDEN = Path(__file__).parent.parent / "golden" / "vssd"


class TestVSSD(Backbone):
    name = "test_vssd"
    op = "decay"                                                # no scan, so no kernel either
    test_every_order_trains = None

    def test_weight_decay_is_that_of_the_published_recipe(self):
        """Matrices and kernels alone."""
        model = self.build()
        _, some = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        assert {id(p) for p in some["params"]} == {id(p) for p in model.parameters() if p.ndim > 1}


@pytest.mark.parametrize("name", ["vssd_tiny_backbone", "vssd_micro"])
def test_agrees_with_the_published_code_in_float64(name, capsys):
    assert verify.main([str(GOLDEN / f"{name}.json")]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


@pytest.mark.parametrize(
    ("expand", "heads", "groups", "positive"), [(2, 3, 1, True), (2, 6, 2, True), (3, 6, 3, False), (1, 2, 2, True)]
)
def test_the_mixer_is_the_sum_over_all_pairs_of_cells(expand, heads, groups, positive):
    """Every cell hears every other one, near or far: y[i] = Σ_j (C[i] · B[j]) dt[j] exp(A_log) x[j] + D x[i].

    Head h hears B and C of group h modulo the number of groups.
    """
    mixer, grid = DualityMixer(6, heads, 5, expand=expand, groups=groups, positive=positive).double(), (4, 3)
    torch.nn.init.normal_(mixer.D)
    x, width, sign = torch.randn(2, 12, 6, dtype=torch.double), 6 * expand, 1 if positive else -1
    z, u, dt = mixer.in_proj(x).split([width, width + 10 * groups, heads], -1)
    u = F.silu(mixer.conv(u.mT.unflatten(2, grid))).flatten(2).mT
    u, B, C = u.split([width, 5 * groups, 5 * groups], -1)
    dt, parts, p = F.softplus(dt + mixer.dt_bias), [], width // heads
    for h in range(heads):
        v, own = u[..., p * h : p * h + p], slice(5 * (h % groups), 5 * (h % groups) + 5)
        pairs = torch.einsum("bin,bjn,bj->bij", C[..., own], B[..., own], dt[..., h] * sign * mixer.A_log[h].exp())
        parts.append(pairs @ v + mixer.D[h] * v)
    expected = (F.layer_norm(torch.cat(parts, -1), (width,)) * z) @ mixer.out_proj.weight.T
    assert error(mixer(x, grid), expected) < TOLERANCE[torch.float64]


SIMPLE = dict(embed_dim=8, depths=[1, 1, 1, 1], d_state=4, num_heads=(2, 2, 2, 2), num_classes=3)


def test_the_simple_stem_and_downsampling():
    """One convolution each: of side 4 with a batch norm, of side 3 with a bias; then a norm of the tokens."""
    built = published("x.py VMAMBA2", {**SIMPLE, "simple_patch_embed": True, "simple_downsample": True})
    model, x = built.model.double().eval(), torch.randn(2, 3, 38, 45, dtype=torch.float64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    p = to_published(model.state_dict(), built.keys)
    y = unit(x.movedim(1, -1)[:, :36, :44], p, "patch_embed.conv1", 4, padding=0)
    y = norm(y, p, "patch_embed.norm")
    assert error(model.stem(x).movedim(1, -1), y) < TOLERANCE[torch.float64]
    y = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    expected = norm(unit(y, p, "layers.0.downsample.conv.0", 2), p, "layers.0.downsample.norm")
    assert error(model.stages[1].downsample(y.movedim(-1, 1)).movedim(1, -1), expected) < TOLERANCE[torch.float64]
    assert {name.rpartition(".")[0] for name in p if "downsample" in name and "layers.2" in name} == {
        "layers.2.downsample.conv.0.conv", "layers.2.downsample.norm",
    }  # fmt: skip
    assert "patch_embed.conv1.conv.bias" not in p
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "count"), [("micro", 13512964), ("tiny", 24270724), ("small", 40075650), ("base", 88823151)]
)
def test_the_zoo_has_the_published_size(name, count):
    (variant,) = (v for v in VARIANTS if v.name == f"vssd_{name}")
    with torch.device("meta"):
        assert sum(p.numel() for p in variant.build().parameters()) == count


def test_the_published_default_of_depths_is_not_that_of_the_tiny_model():
    with torch.device("meta"):
        built = published("x.py VMAMBA2", {"embed_dim": 16})
    assert [len(stage.blocks) for stage in built.model.stages] == [2, 4, 12, 4]


@pytest.mark.parametrize(
    "kwargs",
    [{"lepe": True}, {"linear_attn_duality": False}, {"patch_size": 8}, {"attn_types": ["causal"]}, {"window": 7}],
)  # fmt: skip
def test_what_is_not_covered_says_so(kwargs):
    with pytest.raises(NotCovered, match=next(iter(kwargs))):
        published("x.py VMAMBA2", kwargs)


def test_another_entry_is_not_covered():
    with pytest.raises(NotCovered, match="no model of this family"):
        published("x.py Mamba2", {})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dim": (8, 8)}, r"dim must name one width a stage \(4 in depths\), got \(8, 8\)"),
        ({"heads": (2, 4)}, r"heads must name one a stage \(4 in depths\), got \(2, 4\)"),
        ({"mixers": ("duality", "duality", "duality", "scan")}, "mixers must be of duality, attention, got 'scan'"),
        ({"heads": (3, 4, 8, 16)}, "heads must divide the 128 channels of the state, and groups the heads, got "),
        ({"groups": 3}, "got heads=2, groups=3"),
        ({"stem": "simple"}, "stem must be one of 'conv', 'patch', got 'simple'"),
        ({"downsample": "simple"}, "downsample must be one of 'inverted', 'conv'"),
    ],
)
def test_refuses_parts_that_do_not_fit(kwargs, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        VSSD(**kwargs)
