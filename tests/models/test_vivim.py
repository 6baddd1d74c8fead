"""Vivim: what every segmenter has, for clips; agreement with the published code; clips of other lengths."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from segmenters import Segmenter
from tolerance import TOLERANCE, error
from torch.nn import functional as F

from vssm.checkpoints import load_state
from vssm.cli import verify
from vssm.layers.mixer import ScanMixer
from vssm.layers.mlp import ConvMlp
from vssm.models.keys import to_published
from vssm.models.variant import NotCovered, variants
from vssm.models.vivim import MixerLayer, ReducedAttention, Vivim, published

GOLDEN = Path(__file__).parent.parent / "golden" / "vivim"
ENTRY = "modeling/vivim.py:Vivim"


class TestVivim(Segmenter):
    name = "test_vivim"
    spatial_dims = (2,)
    exported: ClassVar = {"depths": (1, 0, 0, 0)}

    def images(self, spatial_dims=2, batch=2, channels=3, cells=(3, 2)):
        return torch.randn(batch, 5, channels, *(32 * n for n in cells))

    def test_logits_have_the_size_of_the_image(self):
        for frames, classes, size, edge in ((5, 1, (33, 64), True), (10, 3, (64, 45), False)):
            model = self.build(out_channels=classes, in_channels=2, edge=edge).eval()
            with torch.no_grad():
                y = model(torch.randn(2, frames, 2, *size))
            shapes = [tuple(output.shape) for output in (y if edge else [y])]
            assert shapes == [(2, frames, classes, *size), (2, frames, 1, *size)][: 1 + edge]

    def test_refuses_images_that_it_cannot_read(self):
        model, x = self.build(), self.images()
        for clip, message in (
            (x[:, 0], r"clips must be \(B, T, C, H, W\), got \(2, 3, 96, 64\)"),
            (x[:, :, :2], r"frames must have 3 channels, got 2 in "),
            (x[..., :28], r"each side of a frame must be 29 or more, got \(96, 28\); pad it to \(96, 29\)"),
            (x[:, :4], r"stage 0 has 1536 tokens for 4 frames of \(96, 64\), .* 5 slices; give clips of a multiple"),
        ):
            with pytest.raises(ValueError, match=message):
                model(clip)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_agrees_with_the_published_code(dtype, capsys):
    assert verify.main([str(GOLDEN / "vivim_b3_edge_shallow.json"), "--dtype", dtype]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


def test_has_the_published_size():
    """But for what the published network has and does not use: SegFormer's classifier and the norms of its stages."""
    unused = 150 * 768 + 150 + 2 * (64 + 128 + 320 + 512)
    for name, size in {"vivim_b3": 59_620_439, "vivim_b3_edge": 59_620_439 + 65}.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in variants()[name].build().parameters()) == size - unused


def sequence(mixer, k, tokens):
    """Direction k of the mixer over (B, T, C) tokens in the order of reading, before the output projection."""
    x, z = F.linear(tokens, mixer.in_proj.weight).chunk(2, -1)
    d, ssm = x.shape[-1], mixer.ssm
    weight, bias = mixer.sequence_conv.weight[k, :, None], mixer.sequence_conv.bias[k]
    u = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight, bias, groups=d)).mT
    n, r = ssm.A_log.shape[-1], ssm.dt_weight.shape[-1]
    dt, B, C = (u @ ssm.x_proj[k].T).split([r, n, n], -1)
    dt = F.softplus(dt @ ssm.dt_weight[k].T + ssm.dt_bias[k])
    h, y = torch.zeros(len(u), d, n, dtype=u.dtype), []
    for t in range(u.shape[1]):
        h = torch.exp(-dt[:, t, :, None] * ssm.A_log[k].exp()) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1) + ssm.D[k] * u[:, t])
    return torch.stack(y, 1) * F.silu(z)


@pytest.mark.parametrize("frames", [5, 10, 1])
def test_slices_are_five_whatever_the_clip(frames):
    """With ten frames a slice is two of them; with one frame it is a fifth of its tokens."""
    model = Vivim(dims=(8, 8, 8, 8), depths=(0, 0, 0, 0), num_heads=(1, 1, 1, 1)).double()
    mixer = model.stages[0].clip_layers[0].mixer
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    grid = (frames, 2, 5)
    length = frames * 10
    x, m = torch.randn(2, length, 8, dtype=torch.double), length // 5
    path = [s * m + j for j in range(m) for s in range(5)]
    forward, backward = sequence(mixer, 0, x), sequence(mixer, 1, x.flip(1)).flip(1)
    across = torch.empty_like(forward)
    across[:, path] = sequence(mixer, 2, x[:, path])
    expected = F.linear((forward + backward + across) / 3, mixer.out_proj.weight)
    assert isinstance(mixer, ScanMixer)
    assert error(mixer(x, grid), expected) < TOLERANCE[torch.float64]


def test_slices_may_follow_the_frames():
    model = variants()["test_vivim"].build(slices=None, edge=False).eval()
    with torch.no_grad():
        for frames in (1, 3):
            assert model(torch.randn(1, frames, 3, 32, 32)).shape == (1, frames, 1, 32, 32)


def test_frames_do_not_see_one_another_but_in_the_layers_for_clips():
    model = variants()["test_vivim"].build(clip_depth=0, edge=False).eval()
    x = torch.randn(1, 5, 3, 32, 64)
    with torch.no_grad():
        y, other = model(x), model(torch.cat([x[:, :4], torch.randn(1, 1, 3, 32, 64)], 1))
        assert error(y[:, :4], other[:, :4]) < TOLERANCE[torch.float32]
        seeing = variants()["test_vivim"].build(edge=False).eval()
        y, other = seeing(x), seeing(torch.cat([x[:, :4], torch.randn(1, 1, 3, 32, 64)], 1))
    assert error(y[:, :4], other[:, :4]) > 1e-4


def test_attention_reads_a_reduced_map():
    attention, x, grid = ReducedAttention(8, 2, 2).double(), torch.randn(1, 20, 8, dtype=torch.double), (4, 5)
    source = F.conv2d(x.mT.unflatten(2, grid), attention.reduce.weight, attention.reduce.bias, stride=2).flatten(2).mT
    source = F.layer_norm(source, (8,))
    q, k, v = attention.query(x), attention.key(source), attention.value(source)
    heads = [(q[..., s] @ k[..., s].mT / 2).softmax(-1) @ v[..., s] for s in (slice(0, 4), slice(4, 8))]
    assert torch.allclose(attention(x, grid), attention.proj(torch.cat(heads, -1)))


def test_starts_as_published():
    """The initialisation of linear layers passes over the mixers, too."""
    model = Vivim(dims=(8, 8, 8, 64), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    ssm = model.stages[3].clip_layers[0].mixer.ssm
    assert (ssm.dt_bias == 0).all()
    assert ssm.x_proj.std().item() == pytest.approx(0.02, rel=0.1)
    assert ssm.dt_weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (ssm.D == 1).all()


def test_the_backbone_starts_from_a_segformer_file(monkeypatch):
    """Under the names of transformers, strictly but for what is named."""
    monkeypatch.setattr("vssm.checkpoints.fit.looks_like", lambda state: [])        # it builds the whole zoo
    row = variants()["test_vivim"]
    source, model = row.build(), row.build()
    published_state = to_published(source.state_dict(), row.keys)
    segformer = {
        key.replace("encoder.downsample_layers.", "segformer.encoder.").replace("decoder.", "decode_head."): value
        for key, value in published_state.items()
        if key.startswith(("encoder.downsample_layers.", "decoder."))
    }
    segformer |= {"decode_head.classifier.bias": torch.zeros(150), "segformer.encoder.layer_norm.0.bias": torch.ones(8)}
    with pytest.raises(ValueError, match="missing keys"):
        load_state(model, segformer)
    report = load_state(model, segformer, allow_partial=("encoder.stages", "out", "edgeocr_cls_head"))
    ours, theirs = (m.stages[2].frame_layers[0].mixer.key.weight for m in (model, source))
    assert torch.equal(ours, theirs)
    assert torch.equal(model.head.fuse.weight, source.head.fuse.weight)
    assert all(key.startswith(("encoder.stages.", "out.", "edgeocr_cls_head.")) for key in report.skipped.missing)


def test_layers_are_residual():
    layer, x = MixerLayer(8, ScanMixer(8, scan="raster"), 2), torch.randn(2, 6, 8)
    mixed = x + layer.mixer(layer.norm1(x), (2, 3))
    assert torch.allclose(layer(x, (2, 3)), mixed + layer.mlp(layer.norm2(mixed), (2, 3)), atol=1e-6)
    assert ConvMlp(4, 6, 3)(torch.randn(1, 12, 4), (2, 2, 3)).shape == (1, 12, 4)


def test_the_published_options_are_ours():
    model = published(ENTRY, {"with_edge": True, "segformer_config": {"depths": [1, 1, 1, 1]}, "depths": [9] * 4}).model
    assert [len(stage.clip_layers) for stage in model.stages] == [2, 2, 2, 2]
    for kwargs, reason in (
        ({"in_chans": 1}, "the published backbone reads three channels"),
        ({"feat_size": [8, 8, 8, 8]}, "other than the backbone's"),
        ({"segformer_config": {"mlp_ratios": [2, 2, 2, 2]}}, r"mlp_ratios=\[2, 2, 2, 2\] in segformer_config"),
        ({"window": 7}, "arguments window"),
    ):
        with pytest.raises(NotCovered, match=reason):
            published(ENTRY, kwargs)
    with pytest.raises(NotCovered, match="is no model of this family"):
        published("modeling/vivim.py:Encoder", {})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"spatial_dims": 3}, "Vivim: spatial_dims must be 2, a frame is an image; got 3"),
        ({"num_heads": (1, 2)}, r"Vivim: num_heads must have one entry a stage \(4\), got \(1, 2\)"),
    ],
)
def test_refuses_stages_that_do_not_match(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Vivim(**kwargs)
