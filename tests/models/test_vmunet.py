"""VM-UNet: what every segmenter has, agreement with the published code, and a start from VMamba's weights."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from segmenters import Segmenter
from torch.nn import functional as F

from vssm.checkpoints import load_encoder
from vssm.cli import verify
from vssm.layers.expand import PatchExpand, spread
from vssm.models.keys import to_published
from vssm.models.variant import NotCovered, Variant, variants
from vssm.models.vmamba import VANILLA, VMamba, keys
from vssm.models.vmunet import VMUNet, published

GOLDEN = Path(__file__).parent.parent / "golden" / "vmunet"
ENTRY = "models/vmunet/vmunet.py:VMUNet"


class TestVMUNet(Segmenter):
    name = "test_vmunet"
    repeats = True
    open_axes = (0, 2, 3)
    exported: ClassVar = {"depths": (1, 1), "decoder_depths": (1, 1)}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_agrees_with_the_published_code(dtype, capsys):
    assert verify.main([str(GOLDEN / "vmunet_isic.json"), "--dtype", dtype]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


def test_has_the_published_size():
    """Parameters of the sheet's table."""
    sizes = {"vmunet_isic": 27_427_561, "vmunet_synapse": 27_427_761, "vmunet_deep": 44_274_033}
    for name, size in sizes.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in variants()[name].build().parameters()) == size


def test_maps_grow_by_rows_then_columns_then_channels():
    x = torch.arange(2 * 12.0).view(1, 12, 1, 2)                # 2 x 2 offsets, 3 channels; cells side by side
    y = spread(x, 2)
    assert y.shape == (1, 3, 2, 4)
    for row, column, channel in ((0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 1, 0)):
        assert y[0, channel, row, column] == x[0, (row * 2 + column) * 3 + channel, 0, 0]
    expand = PatchExpand(4, 5, 2, spatial_dims=3)
    assert expand(torch.randn(1, 4, 1, 2, 3)).shape == (1, 5, 2, 4, 6)


def test_volumes_are_merged_as_slices_are():
    """A volume whose slices are alike gives what each slice gives, if the first axis adds nothing."""
    flat, deep = (VMUNet(dims, dim=8, depths=(1, 1), decoder_depths=(1, 1)) for dims in (2, 3))
    merge2, merge3 = flat.merges[0], deep.merges[0]
    x = torch.randn(1, 8, 2, 6, 4)
    offsets = [(d, h, w) for w in (0, 1) for h in (0, 1) for d in (0, 1)]
    stacked = torch.cat([x[:, :, d::2, h::2, w::2] for d, h, w in offsets], 1).movedim(1, -1)
    assert torch.allclose(merge3(x).movedim(1, -1), merge3.reduction(F.layer_norm(stacked, (64,))), atol=1e-6)
    offsets = [(h, w) for w in (0, 1) for h in (0, 1)]
    stacked = torch.cat([x[:, :, 0, h::2, w::2] for h, w in offsets], 1).movedim(1, -1)
    assert torch.allclose(merge2(x[:, :, 0]).movedim(1, -1), merge2.reduction(F.layer_norm(stacked, (32,))), atol=1e-6)


def test_the_finest_map_is_never_a_skip():
    """As published: what enters the first level is not added on the way up."""
    model, x = VMUNet(dim=8, depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1, 1)).eval(), torch.randn(1, 3, 32, 64)
    deepest, entered = model.encode(x)
    assert [tuple(e.shape[1:]) for e in entered] == [(8, 8, 16), (16, 4, 8), (32, 2, 4), (64, 1, 2)]
    y = model.decode(deepest, entered)
    assert torch.equal(model.decode(deepest, [entered[0] * 0, *entered[1:]]), y)
    assert not torch.equal(model.decode(deepest, [entered[0], entered[1] * 0, *entered[2:]]), y)


def test_blocks_are_dropped_most_at_the_bottom():
    model = VMUNet(dim=8, depths=(1, 2), decoder_depths=(2, 2), drop_path_rate=0.3)
    rates = [getattr(b.drop_path1, "drop_prob", 0) for part in (*model.encoder, *model.decoder) for b in part]
    assert rates == pytest.approx([0, 0.15, 0.3, 0.3, 0.2, 0.1, 0])


@pytest.fixture
def vmamba(monkeypatch, tmp_path):
    """A narrow first-generation VMamba of the zoo, and its file as published."""
    row = Variant(
        "narrow_vmamba", VMamba, dict(VANILLA, depths=(2, 1, 3, 1), dim=8, num_classes=7), keys("merge")
    )  # fmt: skip
    monkeypatch.setitem(variants(), row.name, row)
    monkeypatch.setattr(VMUNet, "encoders", (row.name,))
    model, path = row.build(), tmp_path / "vmamba.pth"
    entries = to_published(model.state_dict(), row.keys)
    torch.save({"model": {key.replace(".op.", ".self_attention."): v for key, v in entries.items()}}, path)
    return model, path


def test_both_ways_start_from_the_blocks_of_vmamba(vmamba):
    source, path = vmamba
    model = VMUNet(dim=8, depths=(2, 1, 2, 1), decoder_depths=(1, 3, 1, 1))
    before = model.expands[0].expand.weight.clone()
    report = load_encoder(model, path)
    assert torch.equal(model.stem.conv1.weight, source.stem.conv1.weight)
    assert torch.equal(model.merges[1].reduction.weight, source.stages[2].downsample.reduction.weight)
    for ours, theirs in ((model.encoder[2][1], (2, 1)), (model.decoder[1][2], (2, 2)), (model.decoder[3][0], (0, 0))):
        expected = source.stages[theirs[0]].blocks[theirs[1]].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    assert torch.equal(model.expands[0].expand.weight, before)
    assert set(report.kept) == {n for n in model.state_dict() if n.startswith(("expands.", "final.", "head."))}
    assert set(report.loaded) | set(report.kept) == set(model.state_dict())
    assert set(report.unused) == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    assert "vmamba.pth (entry 'model') (narrow_vmamba)" in str(report)


def test_a_start_that_does_not_fit_is_refused(vmamba, tmp_path, monkeypatch):
    _, path = vmamba
    monkeypatch.setattr("vssm.checkpoints.fit.looks_like", lambda state: [])        # it builds the whole zoo
    with pytest.raises(ValueError, match=r"does not fit this VMUNet .*\n  encoder.1.1.norm1.weight \(16,\) starts"):
        load_encoder(VMUNet(dim=8, depths=(2, 2, 2, 1)), path)
    with pytest.raises(ValueError, match=r"stem.conv1.weight \(8, 1, 4, 4\) starts from .* is \(8, 3, 4, 4\) there"):
        load_encoder(VMUNet(in_channels=1, dim=8, depths=(1, 1, 1, 1), decoder_depths=(1, 1, 1, 1)), path)
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"holds none of the classifiers that VMUNet starts from \(narrow_vmamba\)"):
        load_encoder(VMUNet(dim=8), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="VMamba starts from no published classifier"):
        load_encoder(VMamba(depths=(1, 1), dim=8), path)


def test_says_what_it_does_not_cover():
    with pytest.raises(NotCovered, match=r"entry 'models/vmunet/vmamba\.py:VSSM' is no model of this family"):
        published("models/vmunet/vmamba.py:VSSM", {})
    with pytest.raises(NotCovered, match="arguments dims"):
        published(ENTRY, {"num_classes": 1, "dims": 96})


def test_refuses_levels_that_do_not_match():
    with pytest.raises(ValueError, match=r"VMUNet: decoder_depths must name 4 levels, as depths, got \(1, 1\)"):
        VMUNet(decoder_depths=(1, 1))
    with pytest.raises(ValueError, match="VMUNet: dim must name one width a stage"):
        VMUNet(dim=(8, 16))
