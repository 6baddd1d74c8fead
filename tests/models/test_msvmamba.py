"""MSVMamba: what timm demands of both generations, their mixer, and agreement with the published code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import Backbone
from sheets import conv, linear, norm, ssm, sub
from tolerance import TOLERANCE, error
from torch.nn.functional import interpolate, layer_norm, silu, softplus

from vssm.cli import verify
from vssm.models.keys import published_shapes, shapes_of, to_ours, to_published
from vssm.models.msvmamba import VARIANTS, MSVMamba, MSVMambaBlock, MultiScaleMixer, published
from vssm.models.variant import NotCovered

GOLDEN = Path(__file__).parent.parent / "golden" / "msvmamba"
ROWS = {variant.name: variant for variant in VARIANTS}


class TestFirstGeneration(Backbone):
    name = "test_msvmamba"
    refused_orders = ("slices",)

    def cells(self, reduction):
        """The stem drops what is left of a patch; later stages pad."""
        return [-(-(size // 4) // (reduction // 4)) for size in self.size]


class TestThirdGeneration(Backbone):
    name = "test_msvmambav3"
    refused_orders = ("slices",)


SLOW = pytest.param("msvmambav3_tiny_backbone", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["msvmamba_micro_backbone", "narrow_vms_fullres2", "narrow_vms_fullres4", SLOW])
def test_agrees_with_the_published_code_in_float64(name, capsys):
    assert verify.main([str(GOLDEN / f"{name}.json")]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


def scanned(ssm, row, u):
    """The recurrence over the steps u (t, d) with one row of parameters."""
    dt, B, C = (u @ ssm.x_proj[row].T).split(ssm.splits, 1)
    delta = softplus(dt @ ssm.dt_weight[row].T + ssm.dt_bias[row])
    state, y = torch.zeros(*ssm.A_log.shape[1:], dtype=u.dtype), []
    for t in range(len(u)):
        state = torch.exp(-delta[t, :, None] * ssm.A_log[row].exp()) * state + (delta[t] * u[t])[:, None] * B[t]
        y.append(state @ C[t] + ssm.D[row] * u[t])
    return torch.stack(y)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("norm", "resize"), [("sequence", "bilinear"), ("sum", "nearest")])
def test_a_mixer_is_that_of_the_sheet(norm, resize, gate):
    """Odd sizes, two states: the low resolution is one sequence of three paths whose state runs on."""
    mixer = MultiScaleMixer(16, expand=2.0, d_state=2, gate=gate, norm=norm, resize=resize).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    h, w, width = 5, 4, 32
    x = torch.randn(1, h * w, 16, dtype=torch.float64)
    inner = mixer.in_proj(x)
    grid = inner[..., :width].mT.unflatten(2, (h, w))

    def normed(y):
        return layer_norm(y, (width,), mixer.out_norm.weight, mixer.out_norm.bias)

    full = scanned(mixer.ssm, 0, silu(mixer.full_conv(grid)).flatten(2)[0].T)
    low = silu(mixer.low_conv(grid))
    i, j = low.shape[2:]
    assert (i, j) == (3, 2)
    rows, columns = low.flatten(2)[0].T, low.transpose(2, 3).flatten(2)[0].T
    tour = scanned(mixer.ssm, 1, torch.cat([rows.flip(0), columns, columns.flip(0)]))
    full, tour = (normed(full), normed(tour)) if norm == "sequence" else (full, tour)
    backward, down, up = tour.split(i * j)
    low = backward.flip(0).view(i, j, width) + (down + up.flip(0)).view(j, i, width).transpose(0, 1)
    corners = {"align_corners": False} if resize == "bilinear" else {}
    low = interpolate(low.permute(2, 0, 1)[None], (h, w), mode=resize, **corners)
    y = full + low.flatten(2)[0].T
    y = y if norm == "sequence" else normed(y)
    excited = (y.mean(0) @ mixer.excite.reduce.weight.T).relu() @ mixer.excite.expand.weight.T
    y = y * excited.sigmoid() * (silu(inner[0, :, width:]) if gate else 1)
    assert error(mixer(x, (h, w)), mixer.out_proj(y)[None]) < TOLERANCE[torch.float64]


def test_each_backward_path_follows_its_own():
    """Rows, rows backwards, columns, columns backwards; without the one at full resolution."""
    low_rows = [MultiScaleMixer(16, full_row=row).low_rows for row in range(4)]
    assert low_rows == [[2, 1, 3], [0, 2, 3], [0, 1, 3], [0, 2, 1]]
    assert MultiScaleMixer(16, scan="raster").low_rows == [0]
    with pytest.raises(ValueError, match="full_row must be one of the 2 rows of 'hilbert', got 2"):
        MultiScaleMixer(16, scan="hilbert", full_row=2)


@pytest.mark.parametrize("post_norm", [False, True])
def test_the_second_norm_stands_before_or_behind_the_mlp(post_norm):
    block, x = MSVMambaBlock(16, MultiScaleMixer(16), 4.0, post_norm), torch.randn(2, 16, 3, 4)
    torch.nn.init.zeros_(block.mixer.out_proj.weight)
    torch.nn.init.normal_(block.norm2.weight)
    hidden = block.mlp.fc1(x if post_norm else block.norm2(x))
    y = block.mlp.fc2(torch.nn.functional.gelu(hidden + block.mlp.conv(hidden)))
    assert error(block(x), x + (block.norm2(y) if post_norm else y)) < TOLERANCE[torch.float32]


def test_the_first_generation_has_the_low_resolution_first():
    row = ROWS["test_msvmamba"]
    ours = row.build().state_dict()
    for value in ours.values():
        torch.nn.init.normal_(value)
    entries, ssm = to_published(ours, row.keys), "stages.1.blocks.0.mixer.ssm."
    op = "layers.1.blocks.0.op."
    assert torch.equal(entries[f"{op}x_proj_weight"], ours[f"{ssm}x_proj"].flip(0))
    assert torch.equal(entries[f"{op}dt_projs_weight"], ours[f"{ssm}dt_weight"].flip(0))
    assert torch.equal(entries[f"{op}dt_projs_bias"], ours[f"{ssm}dt_bias"].flip(0))
    assert torch.equal(entries[f"{op}A_logs"], ours[f"{ssm}A_log"].flip(0).flatten(0, 1))
    assert torch.equal(entries[f"{op}Ds"], ours[f"{ssm}D"].flip(0).flatten())


@pytest.mark.parametrize(
    ("name", "count"),
    [("msvmamba_nano", 6864136), ("msvmamba_micro", 11879272), ("msvmamba_tiny", 33046312),
     ("msvmambav3_tiny", 32263720), ("msvmambav3_small", 50216296), ("msvmambav3_base", 90591976)],
)  # fmt: skip
def test_the_zoo_has_the_published_size(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in ROWS[name].build().parameters()) == count


FIRST, THIRD = "vmamba.py (branch master):VSSM", "vmamba.py (branch v2):VSSM"


def test_the_layout_decides_where_the_norm_stands():
    small = {"dims": 16, "depths": [1, 1, 1, 1]}
    with torch.device("meta"):
        last = published(THIRD, {**small, "norm_layer": "ln", "forward_type": "vms", "conv_ffn_ratio": 2}).model
        first = published(FIRST, {**small, "ms_stage": (0, 1, 2, 3), "ssm_ratio": 1.0})
    block = last.stages[0].blocks[0]
    assert not block.post_norm
    assert block.mixer.gate
    assert block.mlp.fc1.out_channels == 32
    assert published_shapes(shapes_of(first.model), first.keys)["layers.0.blocks.0.op.x_proj_weight"] == (2, 3, 16)


def test_stages_of_one_resolution_have_the_mixer_of_vmamba_with_excitation():
    torch.manual_seed(0)
    built = published(FIRST, {"dims": 16, "depths": [1, 1, 1, 1], "ms_stage": [0, 3], "num_classes": 3})
    model = built.model.double().eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.4)
    entries = to_published(model.state_dict(), built.keys)
    assert [f"layers.{i}.blocks.0.op.conv2d_b1.weight" in entries for i in range(4)] == [True, False, False, True]
    ours = to_ours(entries, built.keys, shapes_of(model))
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())
    p, x, (h, w) = sub(entries, "layers.1.blocks.0.op."), torch.randn(2, 5, 3, 32, dtype=torch.float64), (5, 3)
    assert p["x_proj_weight"].shape == (4, 2 + 2, 64)
    u, z = linear(x, p, "in_proj").chunk(2, -1)
    u = silu(conv(u, p, "conv2d"))
    rows, columns, y = u.flatten(1, 2), u.transpose(1, 2).flatten(1, 2), 0
    for k, seq in enumerate((rows, columns, rows.flip(1), columns.flip(1))):
        out = ssm(seq, p, k, 2, 1)
        out = out.flip(1) if k > 1 else out
        y = y + (out.unflatten(1, (w, h)).transpose(1, 2) if k % 2 else out.unflatten(1, (h, w)))
    y = norm(y, p, "out_norm")
    y = y * linear(linear(y.mean((1, 2), keepdim=True), p, "se.fc.0").relu(), p, "se.fc.2").sigmoid()
    expected = linear(y * silu(z), p, "out_proj").flatten(1, 2)
    assert error(model.stages[1].blocks[0].mixer(x.flatten(1, 2), (h, w)), expected) < TOLERANCE[torch.float64]
    assert model(torch.randn(1, 3, 45, 33, dtype=torch.float64)).shape == (1, 3)


def test_reversed_columns_at_full_resolution_return_the_second_part_twice():
    """As published with full_res_index=4: the cells of the columns get what the reversed rows gave."""
    mixer = published(THIRD, {"dims": 8, "depths": [1], "full_res_index": 4}).model.stages[0].blocks[0].mixer.double()
    (h, w), rows = (3, 4), torch.randn(12, 8, dtype=torch.float64)
    columns = rows.unflatten(0, (h, w)).transpose(0, 1).flatten(0, 1)
    first, second, _ = scanned(mixer.ssm, 1, torch.cat([rows, rows.flip(0), columns])).chunk(3)
    expected = first + second.flip(0) + second.unflatten(0, (w, h)).transpose(0, 1).flatten(0, 1)
    assert error(mixer.scan_low(rows[None], (h, w))[0], expected) < TOLERANCE[torch.float64]
    expected = scanned(mixer.ssm, 0, columns.flip(0)).flip(0).unflatten(0, (w, h)).transpose(0, 1).flatten(0, 1)
    assert error(mixer.scan_full(rows[None], (h, w))[0], expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    ("entry", "kwargs", "reason"),
    [
        (FIRST, {"forward_type": "v3"}, "forward_type='v3'"),
        (FIRST, {"window": 7}, "arguments window"),
        (THIRD, {"full_res_index": 3}, "full_res_index=3: a mistake in the published code"),
        (THIRD, {"ms_stage": [0]}, "arguments ms_stage"),
        (THIRD, {"forward_type": "v05_noz"}, "forward_type='v05_noz'"),
        (THIRD, {"norm_layer": "bn"}, "norm_layer='bn'"),
        (FIRST, {"dims": 8}, "the published defaults of depths"),
        ("vmamba.py (branch v2):Heat", {}, "no model of this family"),
    ],
)
def test_what_is_not_covered_says_so(entry, kwargs, reason):
    with pytest.raises(NotCovered, match=reason):
        published(entry, kwargs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "patches"}, "stem must be one of 'patch', 'conv', got 'patches'"),
        ({"downsample": "pool"}, "downsample must be one of 'merge', 'conv'"),
        ({"mixer_norm": "none"}, "norm must be one of 'sequence', 'sum'"),
        ({"resize": "cubic"}, "resize must be one of 'bilinear', 'nearest'"),
        ({"dim": (8, 8)}, r"one width a stage \(4 in depths\), got \(8, 8\)"),
    ],
)
def test_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        MSVMamba(**options)
