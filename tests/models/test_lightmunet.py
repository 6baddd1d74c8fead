"""LightM-UNet: what every segmenter has, and agreement with the published code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from segmenters import Segmenter
from tolerance import TOLERANCE, error
from torch.nn import functional as F

import vssm
from vssm.cli import verify
from vssm.models.keys import published_shapes, shapes_of
from vssm.models.lightmunet import LightMUNet, published
from vssm.models.variant import NotCovered

GOLDEN = Path(__file__).parent.parent / "golden" / "lightmunet" / "lightmunet_3d_lits.json"
ENTRY = "lightm-unet/nnunetv2/nets/LightMUNet.py:LightMUNet"


class TestLightMUNet(Segmenter):
    name = "test_lightmunet"
    multiple = 2


@pytest.mark.parametrize("dtype", [pytest.param("float64", marks=pytest.mark.slow), "float32"])
def test_agrees_with_the_published_code(dtype, capsys):
    assert verify.main([str(GOLDEN), "--dtype", dtype]) == 0, capsys.readouterr().out
    assert "10 passed, 0 failed\n" in capsys.readouterr().out


def test_has_the_published_entries_and_sizes():
    golden = json.loads(GOLDEN.read_text())
    with torch.device("meta"):
        built = published(ENTRY, golden["source"]["kwargs"])
        sizes = [sum(p.numel() for p in vssm.create_model(f"lightmunet_{n}d").parameters()) for n in (3, 2)]
    expected = {key: tuple(shape) for key, (shape, _) in golden["state_dict"].items()}
    assert published_shapes(shapes_of(built.model), built.keys) == expected
    assert sizes == [5_015_766, 5_011_765]


def test_the_layer_norms_twice_with_one_norm():
    layer, x = LightMUNet().enters[0].double(), torch.randn(2, 8, 3, 4, 2, dtype=torch.double)
    torch.nn.init.normal_(layer.skip_scale)
    torch.nn.init.normal_(layer.norm.weight)

    def norm(t):
        return F.layer_norm(t, (8,), layer.norm.weight, layer.norm.bias)

    tokens = x.flatten(2).mT
    y = layer.proj(norm(layer.mixer(norm(tokens), (3, 4, 2)) + layer.skip_scale * tokens))
    assert error(layer(x), y.mT.reshape(2, 16, 3, 4, 2)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("size", [(8, 8, 8), (16, 40, 24)], ids=str)
def test_takes_volumes_of_any_multiple(size):
    assert LightMUNet(out_channels=5).eval()(torch.randn(1, 1, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_filters": 12}, "LightMUNet: init_filters must be a multiple of its 8 groups, got 12"),
        ({"blocks_up": (1, 1)}, r"LightMUNet: blocks_up must have 3 entries, one less than blocks_down; got \(1, 1\)"),
    ],
)
def test_refuses_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        LightMUNet(**options)


def test_says_what_it_does_not_cover():
    with pytest.raises(NotCovered, match="is no model of this family"):
        published("nets/LightMUNet.py:ResMambaBlock", {})
    with pytest.raises(NotCovered, match="num_groups=4"):
        published(ENTRY, {"num_groups": 4})
    with pytest.raises(NotCovered, match="arguments window"):
        published(ENTRY, {"window": 7})
    with pytest.raises(NotCovered, match="upsample_mode='deconv'"):
        published(ENTRY, {"upsample_mode": "deconv"})
    published(ENTRY, {"norm": ("GROUP", {"num_groups": 8}), "act": ["RELU", {"inplace": True}]})      # as by default
