"""SegMamba: what every segmenter has, agreement with the published code, and slices of any volume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from segmenters import Segmenter
from tolerance import TOLERANCE, error
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import vssm
from vssm.cli import verify
from vssm.layers import again
from vssm.models.keys import published_shapes, shapes_of, to_published
from vssm.models.segmamba import SLICES, SegMamba, published
from vssm.models.variant import NotCovered

GOLDEN = Path(__file__).parent.parent / "golden" / "segmamba" / "segmamba_tiny.json"
ENTRY = "model_segmamba/segmamba.py:SegMamba"
NARROW = dict(depths=(1, 1, 1, 1), features=(4, 6, 8, 10), hidden_size=12)


class TestSegMamba(Segmenter):
    name = "test_segmamba"
    multiple = 16

    @pytest.mark.slow
    @pytest.mark.parametrize("spatial_dims", [2, 3])
    def test_exports_with_open_sides(self, spatial_dims):
        model = self.build(spatial_dims=spatial_dims, in_channels=1).double().eval()      # float32 errs by 1e-5
        sides = {i: 16 * Dim(f"side{i}", min=1, max=64) for i in range(2, spatial_dims + 2)}
        example = torch.randn(2, 1, *(64, 96, 32)[:spatial_dims], dtype=torch.double)
        program = torch.export.export(model, (example,), dynamic_shapes=({0: Dim.AUTO, **sides},)).module()
        x = torch.randn(3, 1, *(32, 80, 48)[:spatial_dims], dtype=torch.double)
        with torch.no_grad():
            assert error(program(x), model(x)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", [pytest.param("float64", marks=pytest.mark.slow), "float32"])
def test_agrees_with_the_published_code(dtype, capsys):
    assert verify.main([str(GOLDEN), "--dtype", dtype]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


def test_has_the_published_size():
    """Parameters of the sheet's table."""
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in model.parameters()) for model in (vssm.create_model("segmamba"), SegMamba())]
    assert sizes == [67_416_196, 67_363_213]


def scanned(p, suffix, xz):
    """One direction of the sheet's mixer, along the sequence xz (B, L, 2 E)."""
    middle = f"A{suffix}_log"
    x, z = xz.chunk(2, -1)
    taps = p[f"conv1d{suffix}.weight"]
    u = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), taps, p[f"conv1d{suffix}.bias"], groups=x.shape[-1])).mT
    rank = p[f"dt_proj{suffix}.weight"].shape[1]
    dt, B, C = (u @ p[f"x_proj{suffix}.weight"].T).split([rank, 16, 16], -1)
    dt = F.softplus(dt @ p[f"dt_proj{suffix}.weight"].T + p[f"dt_proj{suffix}.bias"])
    h, y = torch.zeros(len(x), x.shape[-1], 16, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * -p[middle].exp()) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1) + p[f"D{suffix}"] * u[:, t])
    return torch.stack(y, 1) * F.silu(z)


@pytest.mark.parametrize(("grid", "slices"), [((4, 3, 2), None), ((2, 3, 4), 6), ((3, 5), None)], ids=str)
def test_the_mixer_is_that_of_the_sheet(grid, slices):
    """Under the published keys: forward, backward, and the slices side by side."""
    options = dict(NARROW, spatial_dims=len(grid), slices=slices and (slices,) * 4)
    model = SegMamba(**options).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    rules = published(ENTRY, {}).keys
    prefix = "vit.stages.1.0.mamba."
    entries = to_published(model.state_dict(), rules)
    p = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
    t = torch.randn(2, len(torch.ones(grid).flatten()), 6, dtype=torch.double)
    xz, n = t @ p["in_proj.weight"].T, slices or grid[0]
    m = t.shape[1] // n
    order = torch.tensor([s * m + j for j in range(m) for s in range(n)])
    y = scanned(p, "", xz) + scanned(p, "_b", xz.flip(1)).flip(1)
    y[:, order] += scanned(p, "_s", xz[:, order])
    assert error(model.stages[1].blocks[0].mixer(t, grid), y @ p["out_proj.weight"].T) < TOLERANCE[torch.float64]


def test_planes_are_the_published_slices_at_the_published_depth():
    model, x = SegMamba(**NARROW).eval(), torch.randn(1, 1, 128, 16, 16)
    fixed = SegMamba(**NARROW, slices=SLICES).eval()
    fixed.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), fixed(x))
        x = x.view(1, 1, 32, 32, 32)
        assert error(model(x), fixed(x)) > 1e-3


@pytest.mark.parametrize("size", [(16, 16, 32), (48, 48, 48), (16, 80, 48)], ids=str)
def test_takes_volumes_that_the_published_slices_do_not_divide(size):
    x = torch.randn(1, 1, *size)
    assert SegMamba(**NARROW).eval()(x).shape == (1, 13, *size)
    with pytest.raises(ValueError, match=r"SegMamba: stage \d has \d+ slices, which must divide its \d+ cells \("):
        SegMamba(**NARROW, slices=SLICES)(x)


@pytest.mark.parametrize("options", [{"depths": (1, 0, 0, 0)}, {"mixer": "conv"}], ids=str)
def test_slices_that_nobody_reads_divide_nothing(options):
    model = SegMamba(**{**NARROW, **options}, slices=SLICES)
    assert model(torch.randn(1, 1, 48, 32, 32)).shape[2:] == (48, 32, 32)



def test_refuses_a_volume_that_ends_as_one_cell():
    message = r"two cells or more, got \(1, 1, 1\) from images \(16, 16, 16\); pad them to \(32, 16, 16\)"
    with pytest.raises(ValueError, match=message):
        SegMamba(**NARROW)(torch.randn(1, 1, 16, 16, 16))


@pytest.mark.parametrize("options", [{"features": (4, 6)}, {"slices": (8,)}], ids=str)
def test_refuses_lists_that_do_not_name_each_stage(options):
    with pytest.raises(ValueError, match=rf"SegMamba: {next(iter(options))} must have one entry a stage \(4\), got"):
        SegMamba(**{**NARROW, **options})


def test_has_as_many_stages_as_depths():
    model = SegMamba(depths=(1, 1, 2), features=(4, 6, 8), hidden_size=10)
    assert model(torch.randn(1, 1, 8, 24, 8)).shape == (1, 13, 8, 24, 8)
    with pytest.raises(ValueError, match=r"multiple of 8, got \(8, 20, 8\); pad it to \(8, 24, 8\)"):
        model(torch.randn(1, 1, 8, 20, 8))


@pytest.mark.parametrize("half", [False, True])
def test_what_is_made_again_is_what_was(half, monkeypatch):
    """Gradients are those of the model that keeps everything, bit for bit.

    But those of an SSM's weights in half precision: where they are made as one, sums over samples are in float32.
    """
    # oneDNN's gradient of a bfloat16 kernel is not the same twice on a map of two cells, so the lowest has sixteen.
    model, x = SegMamba(depths=(1, 1, 1), features=(4, 6, 8), hidden_size=12), torch.randn(2, 1, 32, 16, 16)
    made, grads = [], []
    monkeypatch.setattr(again._Recipe, "result", lambda self, run=again._Recipe.result: made.append(1) or run(self))
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = model(x)
        y.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        monkeypatch.setattr(again, "free", lambda: False)
    for name, grad in grads[0].items():
        if half and name.endswith((".x_proj", ".dt_weight")):
            assert (grad - grads[1][name]).abs().max() <= 2**-7 * grad.abs().max(), name
        else:
            assert torch.equal(grad, grads[1][name]), name
    assert made


def test_training_is_deterministic():
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        model = SegMamba(**NARROW)
        loss = F.cross_entropy(model(torch.randn(2, 1, 32, 16, 16)), torch.randint(13, (2, 32, 16, 16)))
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_starts_with_the_published_distributions():
    ssm = SegMamba(**NARROW).stages[0].blocks[0].mixer.ssm
    assert torch.equal(ssm.A_log, torch.arange(1.0, 17).log().expand(3, 8, 16))
    assert (ssm.D == 1).all()
    assert ssm.dt_weight.abs().max() <= 1                           # rank 1
    dt = F.softplus(ssm.dt_bias)
    assert dt.min() >= 1e-4
    assert dt.max() <= 0.11


def test_blocks_of_the_decoder_may_be_plain():
    built = published(ENTRY, {"depths": [0, 0, 0, 0], "feat_size": [4, 6, 8, 8], "hidden_size": 8, "res_block": False})
    assert "encoder2.layer.conv2.conv.weight" in published_shapes(shapes_of(built.model), built.keys)
    assert not any("conv3" in name for name, _ in built.model.named_parameters())
    assert built.model(torch.randn(1, 1, 32, 32, 32)).shape == (1, 13, 32, 32, 32)


@pytest.mark.parametrize(
    ("entry", "kwargs", "reason"),
    [
        ("model_segmamba/segmamba.py:MambaEncoder", {}, "is no model of this family"),
        (ENTRY, {"norm_name": "batch"}, "norm_name='batch'"),
        (ENTRY, {"window": 7}, "arguments window"),
    ],
)
def test_says_what_it_does_not_cover(entry, kwargs, reason):
    with pytest.raises(NotCovered, match=reason):
        published(entry, kwargs)
