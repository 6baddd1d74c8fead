"""Swin-UMamba and Swin-UMamba-D: what every segmenter has, agreement with the published code, several outputs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from segmenters import Segmenter

from vssm.checkpoints import load_encoder, load_weights
from vssm.cli import verify
from vssm.models.keys import published_shapes, shapes_of, to_published
from vssm.models.swinumamba import SwinUMamba, SwinUMambaD, published
from vssm.models.variant import NotCovered, Variant, variants
from vssm.models.vmamba import VANILLA, VMamba, keys

GOLDEN = Path(__file__).parent.parent / "golden" / "swinumamba"
NETS = "swin_umamba/nnunetv2/nets/"


class TestSwinUMamba(Segmenter):
    name = "test_swinumamba"
    open_axes = (0, 2, 3)
    exported: ClassVar = {"depths": (1, 1), "features": (4, 8, 8)}


class TestSwinUMambaD(Segmenter):
    name = "test_swinumamba_d"
    open_axes = (0, 2, 3)
    exported: ClassVar = {"depths": (1, 1)}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("swinumamba_d_abdomenmr", "float32"), ("swinumamba_abdomenmr", "float32"),
     pytest.param("swinumamba_d_abdomenmr", "float64", marks=pytest.mark.slow),
     pytest.param("swinumamba_abdomenmr", "float64", marks=pytest.mark.slow)],
)  # fmt: skip
def test_agrees_with_the_published_code(name, dtype, capsys):
    assert verify.main([str(GOLDEN / f"{name}.json"), "--dtype", dtype]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


def test_has_the_published_size():
    sizes = {
        "swinumamba_abdomenmr": 59_889_368, "swinumamba_endovis17": 59_890_688, "swinumamba_neuripscell": 59_887_068,
        "swinumamba_d_abdomenmr": 27_497_720, "swinumamba_d_endovis17": 27_496_160,
        "swinumamba_d_neuripscell": 27_492_300,
    }  # fmt: skip
    for name, size in sizes.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in variants()[name].build().parameters()) == size


@pytest.mark.parametrize(
    ("name", "divisors"), [("test_swinumamba", (1, 2, 4, 8)), ("test_swinumamba_d", (1, 4, 8, 16))]
)
def test_training_sees_several_sizes_and_evaluation_one(name, divisors):
    model, x = variants()[name].build(out_channels=2), torch.randn(2, 3, 64, 32)
    outputs = model.train()(x)
    assert [tuple(y.shape) for y in outputs] == [(2, 2, 64 // d, 32 // d) for d in divisors]
    model.eval()
    y = model(x)
    every = model.outputs(model.encode(x), x, every=True)
    assert torch.equal(y, every[0])
    model.train().deep_supervision = False
    assert model(x).shape == y.shape


@pytest.fixture
def vmamba(monkeypatch, tmp_path):
    """A narrow first-generation VMamba of the zoo, and its file as published."""
    row = Variant("narrow_vmamba", VMamba, dict(VANILLA, depths=(1, 1, 2, 1), dim=8), keys("merge"))
    monkeypatch.setitem(variants(), row.name, row)
    for model in (SwinUMamba, SwinUMambaD):
        monkeypatch.setattr(model, "encoders", (row.name,))
    source, path = row.build(), tmp_path / "vmamba_tiny_e292.pth"
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    torch.save({"model": to_published(source.state_dict(), row.keys)}, path)
    return source, path


def test_of_the_patch_embedding_the_bias_of_the_norm_alone_is_taken(vmamba):
    source, path = vmamba
    model = SwinUMamba(features=(4, 8, 16, 32, 64), depths=(1, 1, 2, 1))
    report = load_encoder(model, path)
    taken = {n for n in model.state_dict() if n.startswith("encoder.stages.")} | {"encoder.stem.norm1.bias"}
    assert set(report.loaded) == taken
    assert torch.equal(model.encoder.stem.norm1.bias, source.stem.norm1.bias)
    assert (model.encoder.stem.norm1.weight == 1).all()
    assert torch.equal(model.encoder.stages[2].blocks[1].mixer.ssm.D, source.stages[2].blocks[1].mixer.ssm.D)


def test_the_patch_embedding_of_colour_images_starts_from_vmamba(vmamba):
    source, path = vmamba
    for channels in (3, 1):
        model = SwinUMambaD(in_channels=channels, dim=8, depths=(1, 1, 2, 1))
        report = load_encoder(model, path)
        assert ("encoder.stem.conv1.weight" in report.loaded) == (channels == 3)
        x = torch.randn(1, channels, 64, 32)
        maps = source.forward_intermediates(x.expand(-1, 3, -1, -1), intermediates_only=True)
        same = [torch.equal(a, b) for a, b in zip(model.eval().encode(x), maps, strict=True)]
        assert all(same) == (channels == 3)


def test_reads_checkpoints_of_nnunet(tmp_path):
    """The entry network_weights, perhaps of a model that was wrapped."""
    row = variants()["test_swinumamba_d"]
    source, model = row.build(), row.build()
    state = {f"module.{key}": value for key, value in to_published(source.state_dict(), row.keys).items()}
    content = {"network_weights": state, "current_epoch": 3, "_best_ema": np.float64(0.5), "optimizer_state": {"a": 1}}
    torch.save(content, tmp_path / "best.pth")
    load_weights(model, tmp_path / "best.pth")
    expected = source.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_says_what_it_does_not_cover():
    vss = {"in_chans": 1, "depths": [1, 1], "dims": 8}
    cases = [
        (f"{NETS}SwinUMamba.py:VSSM", {}, "is no model of this family"),
        (f"{NETS}SwinUMamba.py:SwinUMamba", {"feat_size": [8, 16, 32, 64, 128]}, "the published encoder has its own"),
        (f"{NETS}SwinUMamba.py:SwinUMamba", {"window": 7}, "arguments window"),
        (f"{NETS}SwinUMambaD.py:SwinUMambaD", {"vss_args": vss, "decoder_args": {"num_classes": 2,
         "features_per_stage": [8, 8]}}, "other than those of the encoder"),
        (f"{NETS}SwinUMambaD.py:SwinUMambaD", {"vss_args": vss, "decoder_args": {"num_classes": 2, "d_state": None,
         "features_per_stage": [8, 16]}}, "d_state=None"),
        (f"{NETS}SwinUMambaD.py:SwinUMambaD", {"vss_args": {**vss, "patch_size": 2}, "decoder_args": {"num_classes": 2,
         "features_per_stage": [8, 16]}}, "patch_size=2: the published decoder ends 4 times as large"),
        (f"{NETS}SwinUMambaD.py:SwinUMambaD", {"vss_args": {**vss, "patch_norm": False}, "decoder_args": {
         "num_classes": 2, "features_per_stage": [8, 16]}}, "patch_norm=False in vss_args"),
        (f"{NETS}SwinUMamba.py:SwinUMamba", {"norm_name": "batch"}, "norm_name='batch'"),
    ]  # fmt: skip
    for entry, kwargs, reason in cases:
        with pytest.raises(NotCovered, match=reason):
            published(entry, kwargs)


def test_the_published_options_are_ours():
    """The width at full resolution is free; the decoder has states of its own."""
    with torch.device("meta"):
        built = published(f"{NETS}SwinUMamba.py:SwinUMamba", {"feat_size": [32, 96, 192, 384, 768], "spatial_dims": 2})
        shapes = published_shapes(shapes_of(built.model), built.keys)
        assert shapes["stem.0.weight"] == (32, 1, 7, 7)
        assert shapes["out_layers.0.conv.conv.weight"] == (13, 32, 1, 1)
        built = published(f"{NETS}SwinUMambaD.py:SwinUMambaD", {
            "vss_args": {"depths": [1, 1], "dims": 8, "d_state": 4},
            "decoder_args": {"num_classes": 2, "features_per_stage": [8, 16]},
        })  # fmt: skip
    shapes = published_shapes(shapes_of(built.model), built.keys)
    assert shapes["vssm_encoder.layers.0.blocks.0.self_attention.A_logs"] == (64, 4)
    assert shapes["decoder.stages.0.blocks.1.self_attention.A_logs"] == (64, 16)


def test_the_published_dagger_may_have_more_stages():
    """And its options may be spelled out as they are by default."""
    usual = {"patch_size": 4, "patch_norm": True, "drop_rate": 0.0, "attn_drop_rate": 0.0, "use_checkpoint": True}
    built = published(f"{NETS}SwinUMambaD.py:SwinUMambaD", {
        "vss_args": {"depths": [1] * 5, "dims": 8, **usual},
        "decoder_args": {"num_classes": 2, "features_per_stage": [8, 16, 32, 64, 128]},
    })  # fmt: skip
    shapes = published_shapes(shapes_of(built.model), built.keys)
    assert shapes["vssm_encoder.downsamples.3.reduction.weight"] == (128, 256)
    assert built.model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 2, 64, 64)


def test_refuses_features_that_do_not_match():
    with pytest.raises(ValueError, match=r"SwinUMamba: features must have 5 entries, got \(48, 96\)"):
        SwinUMamba(features=(48, 96))
    with pytest.raises(ValueError, match="SwinUMambaD: dim must name one width a stage"):
        SwinUMambaD(dim=(8, 16))
