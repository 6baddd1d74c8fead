"""MSVM-UNet: what every segmenter has, agreement with the published code, and a start from VMamba's weights."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from segmenters import Segmenter
from torch.nn import functional as F

from vssm.checkpoints import load_encoder
from vssm.cli import verify
from vssm.models.keys import to_published
from vssm.models.msvmunet import LargeKernelExpand, MSVMUNet, MultiScaleMlp, published
from vssm.models.variant import NotCovered, Variant, variants
from vssm.models.vmamba import VMamba, keys

GOLDEN = Path(__file__).parent.parent / "golden" / "msvmunet"
ENTRY = "model/__init__.py:MSVMUNet"


class TestMSVMUNet(Segmenter):
    name = "test_msvmunet"
    repeats = True
    open_axes = (0, 2, 3)
    exported: ClassVar = {"depths": (1, 1)}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_agrees_with_the_published_code(dtype, capsys):
    assert verify.main([str(GOLDEN / "msvmunet_synapse.json"), "--dtype", dtype]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


def test_has_the_published_size():
    for name, size in {"msvmunet_synapse": 35_925_513, "msvmunet_acdc": 35_925_028}.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in variants()[name].build().parameters()) == size


def test_the_mlp_convolves_at_three_scales():
    mlp, x = MultiScaleMlp(4, 2.0, 2).double(), torch.randn(2, 4, 6, 5, dtype=torch.double)
    hidden = F.gelu(F.linear(x.movedim(1, -1), mlp.fc1.weight, mlp.fc1.bias)).movedim(-1, 1)
    total = hidden + sum(F.conv2d(hidden, mlp.convs[i].weight, padding=i, groups=8) for i in range(3))
    expected = F.linear(total.movedim(1, -1), mlp.fc2.weight, mlp.fc2.bias).movedim(-1, 1)
    assert torch.allclose(mlp(x), expected)


def test_maps_are_convolved_before_they_are_spread():
    expand, x = LargeKernelExpand(4, 2, 2, 2).eval(), torch.randn(1, 4, 3, 5)
    wide = F.relu(expand.batch_norm(expand.widen(x)))
    wide = F.conv2d(wide, expand.conv.weight, expand.conv.bias, padding=1, groups=8)
    window = wide[0, :, 1, 4].view(2, 2, 2)                     # row offset, column offset, channel
    y = expand(x)[0, :, 2:4, 8:10].movedim(0, -1)
    assert torch.allclose(y, F.layer_norm(window, (2,)), atol=1e-5)


def test_blocks_are_dropped_less_on_the_way_up():
    model = MSVMUNet(dim=8, depths=(1, 1, 1), drop_path_rate=0.2, decoder_drop_path_rate=0.3)
    blocks = [block for part in (*model.stages, *model.ups) for block in part.blocks]
    rates = [getattr(block.drop_path1, "drop_prob", 0) for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.2, 0.1, 0])


def test_the_encoder_starts_from_vmamba(monkeypatch, tmp_path):
    row = Variant("narrow_vmamba", VMamba, dict(depths=(1, 2, 1, 1), dim=8), keys("conv3"))
    monkeypatch.setitem(variants(), row.name, row)
    monkeypatch.setattr(MSVMUNet, "encoders", (row.name,))
    source = row.build()
    torch.save({"model": to_published(source.state_dict(), row.keys)}, tmp_path / "vmamba.pth")
    model = MSVMUNet(dim=8, depths=(1, 2, 1, 1))
    report = load_encoder(model, tmp_path / "vmamba.pth")
    assert set(report.loaded) == {name for name in model.state_dict() if name.startswith(("stem.", "stages."))}
    x = torch.randn(1, 3, 64, 32)
    maps = source.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model.eval().encode(x), maps, strict=True))


def test_says_what_it_does_not_cover():
    with pytest.raises(NotCovered, match="entry 'model/encoder:Encoder' is no model of this family"):
        published("model/encoder:Encoder", {})
    for kwargs, reason in (({"enc_name": "base"}, "enc_name='base'"), ({"depth": 3}, "arguments depth")):
        with pytest.raises(NotCovered, match=reason):
            published(ENTRY, kwargs)
