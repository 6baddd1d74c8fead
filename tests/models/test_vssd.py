"""VSSD: what timm demands, and agreement with the published code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import Backbone
from timm.optim import param_groups_weight_decay
from tolerance import TOLERANCE, error
from torch.nn import functional as F

from vssm.cli import verify
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


def test_the_mixer_is_the_sum_over_all_pairs_of_cells():
    """Every cell hears every other one, near or far: y[i] = Σ_j (C[i] · B[j]) dt[j] exp(A_log) x[j] + D x[i]."""
    mixer, grid = DualityMixer(6, heads=3, d_state=5).double(), (4, 3)
    torch.nn.init.normal_(mixer.D)
    x = torch.randn(2, 12, 6, dtype=torch.double)
    z, u, dt = mixer.in_proj(x).split([12, 22, 3], -1)
    u = F.silu(mixer.conv(u.mT.unflatten(2, grid))).flatten(2).mT
    u, B, C = u.split([12, 5, 5], -1)
    dt = F.softplus(dt + mixer.dt_bias)
    heads = []
    for h in range(3):
        v = u[..., 4 * h : 4 * h + 4]
        pairs = torch.einsum("bin,bjn,bj->bij", C, B, dt[..., h] * mixer.A_log[h].exp())
        heads.append(pairs @ v + mixer.D[h] * v)
    expected = (F.layer_norm(torch.cat(heads, -1), (12,)) * z) @ mixer.out_proj.weight.T
    assert error(mixer(x, grid), expected) < TOLERANCE[torch.float64]


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
    [{"ssd_ngroups": 2}, {"simple_downsample": True}, {"ssd_positve_dA": False}, {"attn_types": ["causal"]},
     {"window": 7}],
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
        ({"heads": (3, 4, 8, 16)}, "heads must divide the 128 channels of the state, got 3"),
    ],
)
def test_refuses_parts_that_do_not_fit(kwargs, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        VSSD(**kwargs)
