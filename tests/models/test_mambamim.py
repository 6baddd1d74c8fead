"""MambaMIM: the segmentation network, its pre-training, and the way from one to the other."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from segmenters import Segmenter
from tolerance import TOLERANCE, error
from torch import nn

import vssm
from vssm.checkpoints import load_encoder
from vssm.cli import verify
from vssm.layers.norm import ChannelNorm
from vssm.models.hymamba import HyMamba, keep, positions
from vssm.models.keys import published_shapes, shapes_of, to_published
from vssm.models.mambamim import EncoderAlone, MambaMIM, interpolated, pretraining_keys, published
from vssm.models.variant import NotCovered, variants

GOLDEN = Path(__file__).parent.parent / "golden" / "mambamim"


class TestHyMamba(Segmenter):
    name = "test_hymamba"
    multiple = 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("name", "outputs"), [("hybrid_48", 7), ("pretrain_32", 20)])
def test_agrees_with_the_published_code(name, outputs, dtype, capsys):
    assert verify.main([str(GOLDEN / f"{name}.json"), "--dtype", dtype]) == 0, capsys.readouterr().out
    assert f"{outputs} passed, 0 failed\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hybrid_48", "pretrain_32"])
def test_has_the_published_entries(name):
    """All but what the published code never uses, and tables."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    with torch.device("meta"):
        built = published(golden["source"]["entry"], golden["source"]["kwargs"])
    expected = {key: tuple(shape) for key, (shape, _) in golden["state_dict"].items()}
    written = published_shapes(shapes_of(built.model), built.keys)
    missing = expected.keys() - written.keys()
    assert written == {key: shape for key, shape in expected.items() if key not in missing}
    parts = ("mamba.A_b_log", "mamba.D_b", "conv1d_b.", "x_proj_b.", "dt_proj_b.", ".pos_embed", "fuse.0.",
             "densify_projs.4.", "mask_tokens.0", "mask_tokens.4")  # fmt: skip
    assert {key for key in missing if not any(part in key for part in parts)} <= {"mae.pos_embed"}


def plain_interpolation(tokens, visible, A):
    """S6T of one sample, as the sheet writes it; tokens (L, C)."""
    length = len(tokens)
    anchors = sorted({0, length - 1, *visible.nonzero().flatten().tolist()})
    out = torch.zeros_like(tokens)
    for a, b in pairwise(anchors):
        n, total = b - a, 0
        for j in range(n):
            alpha = j / (n - 1) if n > 1 else 0.0
            blend = (1 - alpha) * tokens[a] + alpha * tokens[b]
            total = total + torch.linalg.matrix_power(A, n - 1 - j) @ blend
            out[a + j] = total
    out[-1] = A @ tokens[-1]
    return out


@pytest.mark.parametrize("grid", [(3, 2, 4), (1, 2, 1), (5, 3)], ids=str)
def test_tokens_are_interpolated_as_in_the_sheet(grid):
    x, A = torch.randn(3, 6, *grid, dtype=torch.double), torch.randn(6, 6, dtype=torch.double) / 3
    visible = (torch.rand(3, 1, *grid) < 0.3).double()
    visible[1] = 0                                                  # the ends are anchors also where they are masked
    y = interpolated(x, visible, A)
    for i in range(3):
        expected = plain_interpolation(x[i].flatten(1).T, visible[i].flatten(), A)
        assert error(y[i].flatten(), expected.flatten()) < TOLERANCE[torch.float64]       # memory of (L, C), as (C, L)
    assert interpolated(x, visible, A * 0).isfinite().all()


def masked_by_hand(encoder, x, visible):
    """The sheet's sparse encoder in 2D: a mask behind every convolution, norm and pooling."""

    def mask(module, inputs, y):
        sides = (y.shape[axis] // visible.shape[axis] for axis in (2, 3))
        return y * visible.repeat_interleave(next(sides), 2).repeat_interleave(next(sides), 3)

    parts = [m for m in encoder.modules() if isinstance(m, (nn.Conv2d, ChannelNorm, nn.MaxPool2d))]
    hooks = [part.register_forward_hook(mask) for part in parts]
    maps = encoder.convolve(mask(None, None, x))
    for hook in hooks:
        hook.remove()
    return maps


def test_masked_patches_reach_no_visible_one():
    """As if every layer masked its output; and what is masked in the image changes nothing."""
    model = vssm.create_model("test_mambamim").double()
    x = torch.randn(2, 3, 16, 24, dtype=torch.double)
    visible = model.mask(x)
    maps = model.encode(x, visible)
    expected = masked_by_hand(model.encoder, x, visible)
    for ours, theirs in zip(model.encoder.convolve(x, visible), expected, strict=True):
        assert error(ours, theirs) < TOLERANCE[torch.float64]
    other = keep(x, visible) + keep(torch.randn_like(x), 1 - visible)
    assert all(torch.equal(a, b) for a, b in zip(maps, model.encode(other, visible), strict=True))


def test_blocks_read_as_many_tokens_as_the_batch_has_visible_ones():
    """As published: so the more samples, the more masked tokens behind the visible ones; all of them from 4 on."""
    model, read = vssm.create_model("test_mambamim"), []
    model.encoder.blocks[0].register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))
    for batch in (1, 2, 5):
        model(torch.randn(batch, 3, 16, 16))
    assert read == [4, 8, 16]


def test_the_mask_takes_the_smallest_numbers():
    model, noise = MambaMIM(2, mask_ratio=0.5, channels=(4, 6, 8), depths=(1, 1), mlp_ratios=(1, 1)), torch.rand(3, 15)
    visible = model.mask(torch.randn(3, 1, 20, 12), noise)
    assert visible.shape == (3, 1, 5, 3)
    assert visible.flatten(1).sum(1).tolist() == [8.0] * 3                  # half of 15, to the even number
    assert all(noise[i][visible[i].flatten() == 1].max() < noise[i][visible[i].flatten() == 0].min() for i in range(3))


def test_the_loss_is_that_of_normalised_masked_patches():
    model, x = vssm.create_model("test_mambamim").eval(), torch.randn(2, 3, 8, 16) * 3 + 5
    loss, image, patch_loss, visible = model(x)
    patch = x[1, :, 4:8, 8:12]
    target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
    expected = (image[1, :, 4:8, 8:12] - target).square().mean()
    assert patch_loss[1, 4 + 2].item() == pytest.approx(expected.item(), rel=1e-5)
    masked = visible.flatten(1) == 0
    assert loss.item() == pytest.approx(patch_loss[masked].mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["test_mambamim", "test_mambamim_nomamba"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_pre_training_reaches_every_parameter(name, spatial_dims):
    """But the head of full resolution, whose map only the segmentation network reads."""
    model = vssm.create_model(name, spatial_dims=spatial_dims).train()
    nn.init.normal_(model.interpolation, std=0.1)
    grads = []
    for enable in (False, True):
        torch.manual_seed(1)
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(torch.randn(2, 3, 16, 8, 8) if spatial_dims == 3 else torch.randn(2, 3, 16, 24)).loss.backward()
        missing = {n for n, p in model.named_parameters() if p.grad is None}
        assert {n.rpartition(".")[0].rpartition(".")[0] for n in missing} == {"encoder.heads.0"}
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_few_steps_lower_the_loss():
    model = vssm.create_model("test_mambamim").train()
    optimiser, x, noise = torch.optim.AdamW(model.parameters(), 3e-3), torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(x, noise).loss)
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]


def test_segmentation_starts_from_pre_training(tmp_path, monkeypatch):
    """From a model, from a file of ours, and from the file that the published pre-training saves."""
    narrow = variants()["test_mambamim"]
    sizes = {name: value for name, value in narrow.kwargs.items() if name != "decoder_width"}
    monkeypatch.setitem(variants(), "mambamim", narrow)
    encoder = replace(variants()["mambamim_encoder"], kwargs=sizes)
    monkeypatch.setitem(variants(), "mambamim_encoder", encoder)
    pretrained = vssm.create_model("test_mambamim")
    expected = pretrained.encoder.state_dict()

    model = vssm.create_model("test_hymamba")
    model.encoder.load_state_dict(expected)

    torch.save(pretrained.state_dict(), tmp_path / "ours.pth")
    entries = to_published(pretrained.state_dict(), pretraining_keys(2))
    theirs = {k.removeprefix("sparse_encoder."): v for k, v in entries.items() if k.startswith("sparse_encoder.")}
    assert "mae.mask_token" in theirs
    torch.save(theirs, tmp_path / "published.pth")
    for name in ("ours", "published"):
        model = vssm.create_model("test_hymamba")
        before = model.out.weight.clone()
        report = load_encoder(model, tmp_path / f"{name}.pth")
        assert all(torch.equal(value, model.encoder.state_dict()[key]) for key, value in expected.items())
        assert torch.equal(model.out.weight, before)
        assert set(report.loaded) == {f"encoder.{key}" for key in expected}


def test_positions_are_sines_and_cosines_of_each_axis():
    table = positions((2, 3, 4), 12)
    assert table.shape == (24, 12)
    d, h, w = 1, 2, 3
    expected = [torch.tensor([axis, axis * 10000**-0.5]) for axis in (d, h, w)]
    expected = torch.cat([wave(angle) for angle in expected for wave in (torch.sin, torch.cos)])
    assert torch.allclose(table[(d * 3 + h) * 4 + w], expected)


def test_starts_with_the_published_distributions():
    model = vssm.create_model("mambamim_nano")
    ssm = model.encoder.blocks[0].mixer.ssm
    assert (ssm.dt_bias == 0).all()
    assert ssm.x_proj.abs().max() <= (6 / sum(ssm.x_proj.shape[1:])) ** 0.5
    assert (model.interpolation == 0).all()
    assert (model.encoder.blocks[0].mlp.fc1.bias == 0).all()
    assert all(fill.abs().max() <= 0.02 for fill in model.fills)
    conv, up = model.stages[0].convs[0], model.stages[0].up
    assert conv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all((layer.bias == 0).all() for layer in (conv, up, model.out))
    fan_out = up.weight[:, 0].numel()  # PyTorch takes the first axis of any weight for the outputs
    assert up.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MambaMIM(mask_ratio=1.0), "MambaMIM: mask_ratio must lie between 0 and 1, got 1.0"),
        (lambda: MambaMIM(4), "spatial_dims must be one of 2, 3, got 4"),
        (lambda: EncoderAlone(1), "spatial_dims must be one of 2, 3, got 1"),
        (lambda: MambaMIM(decoder_width=40), "MambaMIM: decoder_width must be a multiple of 16, got 40"),
        (lambda: HyMamba(channels=(4, 8), depths=(1,), mlp_ratios=(1,)), "last of channels must be a multiple of 6"),
        (lambda: HyMamba(depths=(1,)), "depths must have 4 entries, one less than channels, got"),
    ],
)  # fmt: skip
def test_refuses_arguments_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_images_that_are_not_made_of_patches():
    model = vssm.create_model("test_mambamim")
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got \(1, 1, 8, 8\)"):
        model(torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"must be a multiple of 4, got \(8, 10\); pad it to \(8, 12\)"):
        model(torch.randn(1, 3, 8, 10))
    with pytest.raises(ValueError, match=r"of the 1 patches of images of \(4, 4\) some must be masked and some not"):
        model(torch.randn(1, 3, 4, 4))


def test_the_published_constructors_keep_their_own_defaults():
    """``Hybird`` alone is another network than what ``build_hybird`` makes of it."""
    entry, built = "models/network/hymamba.py", {}
    with torch.device("meta"):
        for name in ("Hybird", "build_hybird"):
            found = published(f"{entry}:{name}", {"img_size": 32})
            built[name] = published_shapes(shapes_of(found.model), found.keys)
        found = published("models/MambaMIM.py:MambaMIM", {"densify_norm": "bn", "sbn": False})
    alone, made = built["Hybird"], built["build_hybird"]
    assert (alone["embeddings.stem.weight"][1], made["embeddings.stem.weight"][1]) == (3, 1)
    assert (alone["decoder.out.conv.weight"][0], made["decoder.out.conv.weight"][0]) == (3, 14)
    assert (alone["embeddings.layer5.0.conv2.weight"][:2], made["embeddings.layer5.0.conv2.weight"][:2]) == (
        (384, 192), (1536, 384)
    )  # fmt: skip
    for third in ("embeddings.layer4.2.conv1.weight", "embeddings.layer3.2.conv1.weight"):
        assert third in alone
        assert third not in made
    assert "mae.blocks.3.norm1.weight" not in alone
    assert "mae.blocks.3.norm1.weight" in made
    assert found.model.mask_ratio == 0.6


def test_says_what_it_does_not_cover():
    with pytest.raises(NotCovered, match="is no model of this family"):
        published("models/MambaMIM.py:SparseEncoder", {})
    with pytest.raises(NotCovered, match="arguments window"):
        published("models/network/hymamba.py:Hybird", {"window": 7})
