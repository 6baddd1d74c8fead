"""VMamba against its sheet: every forward_type, both layouts of keys, odd sizes."""

from __future__ import annotations

import pytest
import timm
import torch
from backbones import Backbone
from tolerance import TOLERANCE, error
from torch import nn
from torch.nn import functional as F

from vssm.models.backbone import StageMaps
from vssm.models.keys import published_shapes, shapes_of, to_ours, to_published
from vssm.models.variant import NotCovered
from vssm.models.vmamba import VANILLA, VARIANTS, VMamba, keys, parse_forward_type, published

VSSM, BACKBONE = "classification/models/vmamba.py:VSSM", "classification/models/vmamba.py:Backbone_VSSM"
NARROW = dict(
    depths=[1, 1], dims=8, in_chans=3, num_classes=4, patch_size=4, ssm_d_state=3, ssm_ratio=2.0, ssm_dt_rank="auto",
    ssm_act_layer="silu", ssm_conv=3, ssm_conv_bias=True, ssm_drop_rate=0.0, ssm_init="v0", forward_type="v05_noz",
    mlp_ratio=2.0, mlp_act_layer="gelu", mlp_drop_rate=0.0, gmlp=False, drop_path_rate=0.1, patch_norm=True,
    norm_layer="ln2d", downsample_version="v3", patchembed_version="v2", use_checkpoint=False, posembed=False,
    imgsize=32,
)  # fmt: skip
ACTS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid}


class TestBackbone(Backbone):
    """What timm and training demand."""

    name = "test_vmamba"

    def test_features_only_works_by_cutting_the_model_up_too(self):
        options = dict(features_only=True, feature_cls="list", out_indices=(1, 3))
        model = timm.create_model(self.name, **options).eval()
        maps = model(self.images())
        assert [list(y.shape[1:]) for y in maps] == [[16, *self.cells(8)], [64, *self.cells(32)]]


class TestMamba2(Backbone):
    """The same, with one step size and decay a head."""

    name = "test_vmamba_m2"
    decayed, projections = frozenset({"A_log", "dt_bias", "D"}), frozenset({"x_proj"})


def orders(mode, h, w):
    """(4, L) cells, from the sheet's table of scan orders."""
    cells = torch.arange(h * w).view(h, w)
    rows, columns = cells.flatten(), cells.T.flatten()
    if mode == "cross2d":
        return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])
    if mode == "unidi":
        return torch.stack([rows] * 4)
    if mode == "bidi":
        return torch.stack([rows, rows, rows.flip(0), rows.flip(0)])
    turned = torch.tensor([[(l % h) * w + w - 1 - l // h, (h - 1 - l % h) * w + l // h] for l in range(h * w)]).T
    return torch.stack([rows, turned[0], rows.flip(0), turned[1]])


def scan(p, k, x):
    """Direction k over the sequences x (B, L, D), with the published parameters p."""
    D, N = x.shape[-1], p["A_logs"].shape[-1]
    R = p["dt_projs_weight"].shape[-1]
    dt, B, C = (x @ p["x_proj_weight"][k].T).split([R, N, N], -1)
    dt = F.softplus(dt @ p["dt_projs_weight"][k].T + p["dt_projs_bias"][k])
    A, skip = -p["A_logs"].view(-1, D, N)[k].exp(), p["Ds"].view(-1, D)[k]
    h, y = torch.zeros(len(x), D, N, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1) + skip * x[:, t])
    return torch.stack(y, 1)


def plain_ss2d(p, x, mode, gate, out_norm, out_act, act):
    """SS2D as section 3 of the sheet writes it. x: (B, H, W, C), p: the published entries of one ``op``."""
    b, h, w, _ = x.shape
    x = x @ p["in_proj.weight"].T
    if gate:
        x, z = x.chunk(2, -1)
        z = ACTS[act](z) if gate == "act" else z
    D = x.shape[-1]
    if "conv2d.weight" in p:
        x = F.conv2d(x.permute(0, 3, 1, 2), p["conv2d.weight"], p.get("conv2d.bias"), padding=1, groups=D)
        x = x.permute(0, 2, 3, 1)
    x = ACTS[act](x)
    if mode == "cascade2d":
        x = F.layer_norm(x, (D,)).reshape(b * h, w, D)
        x = (scan(p, 0, x) + scan(p, 1, x.flip(1))).view(b, h, w, D)                    # the second is not flipped back
        x = F.layer_norm(x, (D,)).transpose(1, 2).reshape(b * w, h, D)
        y = (scan(p, 2, x) + scan(p, 3, x.flip(1))).view(b, w, h, D).transpose(1, 2)
    else:
        y = torch.zeros(b, h * w, D, dtype=x.dtype)
        for k, order in enumerate(orders(mode, h, w)):
            y[:, order] += scan(p, k, x.reshape(b, h * w, D)[:, order])
        y = y.view(b, h, w, D)
    y = y.permute(0, 3, 1, 2)
    if out_norm in ("layer", "cnorm"):
        name = "out_norm" if out_norm == "layer" else "out_norm.0"
        y = F.layer_norm(y.permute(0, 2, 3, 1), (D,), p[f"{name}.weight"], p[f"{name}.bias"]).permute(0, 3, 1, 2)
    if out_norm in ("dwconv3", "cnorm"):
        y = F.conv2d(y, p["out_norm.1.weight" if out_norm == "dwconv3" else "out_norm.2.weight"], padding=1, groups=D)
    y = y.flatten(2).softmax(-1).view_as(y) if out_norm == "softmax" else y
    y = y.sigmoid() if out_norm == "sigmoid" else y
    y = y.permute(0, 2, 3, 1)
    y = F.gelu(y) if out_act else y
    return (y * z if gate else y) @ p["out_proj.weight"].T


FORWARD_TYPES = [
    # forward_type, scan order, gate, out norm, GELU after it
    ("v0", "cross2d", "act", "layer", False), ("v0seq", "cross2d", "act", "layer", False),
    ("v01_noz_no32", "cross2d", None, "layer", False), ("v2", "cross2d", "act", "layer", False),
    ("v3_noz", "cross2d", None, "layer", False), ("v04_nozact", "cross2d", "raw", "layer", False),
    ("v05_noz_oact", "cross2d", None, "layer", True), ("v05_nozact_noz", "cross2d", None, "layer", False),
    ("v05_onnone", "cross2d", "act", None, False), ("v05_onnone_noz", "cross2d", None, None, False),
    ("v05_ondwconv3_noz", "cross2d", None, "dwconv3", False), ("v05_oncnorm_nozact", "cross2d", "raw", "cnorm", False),
    ("v05_onsoftmax_noz", "cross2d", None, "softmax", False), ("v05_onsigmoid_oact", "cross2d", "act", "sigmoid", True),
    ("v051d_noz", "unidi", None, "layer", False), ("v052d_noz", "bidi", None, "layer", False),
    ("v052d3_noz", "rot90", None, "layer", False), ("v052dc_noz", "cascade2d", None, "layer", False),
    ("v052dc_onnone", "cascade2d", "act", None, False),
]  # fmt: skip


@pytest.mark.parametrize("case", FORWARD_TYPES, ids=lambda case: case[0])
def test_every_forward_type_is_the_mixer_of_the_sheet(case):
    """Under the published keys, on a grid that is not square."""
    forward_type, mode, gate, out_norm, out_act = case
    built = published(VSSM, {**NARROW, "forward_type": forward_type})
    model = built.model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    prefix = "layers.1.blocks.0.op."
    entries = to_published(model.state_dict(), built.keys)
    p = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
    x = torch.randn(2, 3, 5, 16, dtype=torch.double)
    y = model.stages[1].blocks[0].mixer(x.flatten(1, 2), (3, 5)).view(2, 3, 5, 16)
    assert error(y, plain_ss2d(p, x, mode, gate, out_norm, out_act, "silu")) < TOLERANCE[torch.float64]


def plain_heads(p, x):
    """Section 5's m0: x (B, H, W, C), p the published entries of one ``op``; states (B, heads, width, N) in full."""
    b, h, w, _ = x.shape
    x = x @ p["in_proj.weight"].T
    x = F.conv2d(x.permute(0, 3, 1, 2), p["conv2d.1.weight"], p["conv2d.1.bias"], padding=1, groups=x.shape[-1])
    x = F.gelu(x.permute(0, 2, 3, 1)).flatten(1, 2)
    directions, R, P = p["Ds"].shape
    N = (p["x_proj_weight"].shape[1] - R) // 2
    y = torch.zeros_like(x)
    for k, order in zip(range(directions), orders("cross2d", h, w), strict=True):
        dt, B, C = (x[:, order] @ p["x_proj_weight"][k].T).split([R, N, N], -1)
        dt = F.softplus(dt + p["dt_projs_bias"][k])
        heads, state, out = x[:, order].unflatten(-1, (R, P)), 0.0, []
        for t in range(h * w):
            keep = torch.exp(-p["A_logs"][k].exp() * dt[:, t])
            state = keep[..., None, None] * state + (dt[:, t, :, None] * heads[:, t])[..., None] * B[:, t, None, None]
            out.append((state * C[:, t, None, None]).sum(-1) + p["Ds"][k] * heads[:, t])
        y[:, order] += torch.stack(out, 1).flatten(2)
    y = F.layer_norm(y, y.shape[-1:], p["out_norm.weight"], p["out_norm.bias"])
    return (y @ p["out_proj.weight"].T).view(b, h, w, -1)


def test_the_mixer_of_mamba_2_is_that_of_the_sheet():
    m0 = {"forward_type": "m0_noz", "dims": 32, "norm_layer": "ln", "ssm_init": "v2", "ssm_act_layer": "gelu"}
    built = published(VSSM, {**NARROW, **m0})
    model = built.model.double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    prefix = "layers.1.blocks.0.op."
    entries = to_published(model.state_dict(), built.keys)
    p = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
    assert p["Ds"].shape == (4, 4, 32)
    x = torch.randn(2, 3, 5, 64, dtype=torch.double)
    y = model.stages[1].blocks[0].mixer(x.flatten(1, 2), (3, 5)).view(2, 3, 5, 64)
    assert error(y, plain_heads(p, x)) < TOLERANCE[torch.float64]


def test_heads_start_as_published():
    ssm = VMamba(depths=(1, 1), dim=64, mixer="heads", init="uniform").stages[0].blocks[0].mixer.ssm
    assert (ssm.A_log == 0).all()
    assert (ssm.D == 1).all()
    assert 0 <= ssm.dt_bias.min() < ssm.dt_bias.max() <= 0.1
    assert 0.9 / 8 < ssm.x_proj.abs().max() <= 1 / 8
    with pytest.raises(ValueError, match="VMamba: init must be one of 'uniform', 'normal', got 'mamba'"):
        VMamba(depths=(1, 1), dim=64, mixer="heads")
    with pytest.raises(ValueError, match="heads must divide the channels of the scan, got 3 for 64 channels"):
        VMamba(depths=(1, 1), dim=64, mixer="heads", init="uniform", dt_rank=3)


def plain_vmamba(p, x, depths, mix):
    """Section 2: the map of each stage, (B, H, W, C) like x; ``mix(p, x)`` with the entries of one ``op``."""
    def conv(x, name, stride, padding):
        y = F.conv2d(x.permute(0, 3, 1, 2), p[f"{name}.weight"], p[f"{name}.bias"], stride, padding)
        return y.permute(0, 2, 3, 1)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    if "patch_embed.5.weight" in p:
        x = F.gelu(norm(conv(x, "patch_embed.0", 2, 1), "patch_embed.2"))
        x = norm(conv(x, "patch_embed.5", 2, 1), "patch_embed.7")
    else:
        x = norm(conv(x, "patch_embed.0", 4, 0), "patch_embed.2")
    maps = []
    for i, depth in enumerate(depths):
        for j in range(depth):
            b = f"layers.{i}.blocks.{j}."
            x = x + mix({k.removeprefix(f"{b}op."): v for k, v in p.items() if k.startswith(f"{b}op.")},
                        norm(x, f"{b}norm"))  # fmt: skip
            if f"{b}mlp.fc1.weight" in p:
                h = F.gelu(F.linear(norm(x, f"{b}norm2"), p[f"{b}mlp.fc1.weight"], p[f"{b}mlp.fc1.bias"]))
                x = x + F.linear(h, p[f"{b}mlp.fc2.weight"], p[f"{b}mlp.fc2.bias"])
        maps.append(x)
        down = f"layers.{i}.downsample."
        if f"{down}reduction.weight" in p:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = norm(x, f"{down}norm") @ p[f"{down}reduction.weight"].T
        elif f"{down}1.weight" in p:
            side = p[f"{down}1.weight"].shape[-1]
            x = norm(conv(x, f"{down}1", 2, side // 2 if side == 3 else 0), f"{down}3")
    return maps


WHOLE = {
    "vanilla": ({"forward_type": "v0", "mlp_ratio": 0.0, "downsample_version": "v1", "patchembed_version": "v1",
                 "norm_layer": "ln"}, "act"),
    "v2": ({"ssm_d_state": 1, "ssm_ratio": 1.0, "ssm_conv_bias": False}, None),
    "conv2": ({"downsample_version": "v2", "norm_layer": "ln"}, None),
    "m2": ({"forward_type": "m0_noz", "norm_layer": "ln", "ssm_init": "v2", "ssm_act_layer": "gelu"}, "heads"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_model_is_that_of_the_sheet(kind):
    """Classifier, backbone and the gradient of the images, of odd sizes and five channels."""
    options, gate = WHOLE[kind]
    kwargs = {**NARROW, "dims": 16, "in_chans": 5, "depths": [1, 2, 1], **options}
    built = published(VSSM, kwargs)
    model, x = built.model.double(), torch.randn(1, 5, 29, 38, dtype=torch.double, requires_grad=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    p = {key: value.detach() for key, value in to_published(model.state_dict(), built.keys).items()}

    def mix(p, x):
        return plain_heads(p, x) if gate == "heads" else plain_ss2d(p, x, "cross2d", gate, "layer", False, "silu")

    maps = plain_vmamba(p, x.permute(0, 2, 3, 1), kwargs["depths"], mix)
    y = F.layer_norm(maps[-1], maps[-1].shape[-1:], p["classifier.norm.weight"], p["classifier.norm.bias"])
    expected = y.mean((1, 2)) @ p["classifier.head.weight"].T + p["classifier.head.bias"]
    y = model(x)
    assert error(y, expected) < TOLERANCE[torch.float64]
    ours, theirs = (torch.autograd.grad(logits[:, 1].sum(), x, retain_graph=True)[0] for logits in (y, expected))
    assert error(ours, theirs) < TOLERANCE[torch.float64]
    del kwargs["num_classes"]
    built = published(BACKBONE, {**kwargs, "out_indices": (0, 2)})
    names = [(i, f"outnorm{i}.{name}") for i in (0, 2) for name in ("weight", "bias")]
    norms = {name: torch.randn(16 * 2**i, dtype=torch.double) for i, name in names}
    entries = {**{key: value for key, value in p.items() if not key.startswith("classifier.")}, **norms}
    backbone = built.model.double()
    backbone.load_state_dict(to_ours(entries, built.keys, shapes_of(backbone)))
    for i, y in zip((0, 2), backbone(x), strict=True):
        wanted = F.layer_norm(maps[i], maps[i].shape[-1:], norms[f"outnorm{i}.weight"], norms[f"outnorm{i}.bias"])
        assert error(y, wanted.permute(0, 3, 1, 2)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    "options", [{"ssm_conv": 1}, {"ssm_conv_bias": False}, {"ssm_act_layer": "gelu"}, {"ssm_ratio": 1.5}]
)
def test_other_parts_of_the_mixer_are_those_of_the_sheet(options):
    built = published(VSSM, {**NARROW, "forward_type": "v05", **options})
    model = built.model.double()
    entries = to_published(model.state_dict(), built.keys)
    p = {key.removeprefix("layers.0.blocks.0.op."): value for key, value in entries.items()}
    x = torch.randn(2, 4, 3, 8, dtype=torch.double)
    y = model.stages[0].blocks[0].mixer(x.flatten(1, 2), (4, 3)).view(2, 4, 3, 8)
    expected = plain_ss2d(p, x, "cross2d", "act", "layer", False, options.get("ssm_act_layer", "silu"))
    assert error(y, expected) < TOLERANCE[torch.float64]


def test_gated_mlp_activates_the_second_half():
    model = published(VSSM, {**NARROW, "gmlp": True}).model
    mlp, x = model.stages[0].blocks[0].mlp, torch.randn(2, 5, 8)
    a, g = mlp.fc1(x).chunk(2, -1)
    assert mlp.fc1.out_features == 2 * 16
    assert torch.allclose(mlp(x), mlp.fc2(a * F.gelu(g)))


def test_a_position_table_is_added_to_the_patches():
    built = published(VSSM, {**NARROW, "posembed": True})
    model, x = built.model.eval(), torch.randn(1, 3, 32, 32)
    assert published_shapes(shapes_of(model), built.keys)["pos_embed"] == (1, 8, 8, 8)
    with_table = model.stem(x)
    table = model.stem.pos_embed.detach().clone()
    nn.init.zeros_(model.stem.pos_embed)
    assert torch.allclose(model.stem(x) + table, with_table, atol=1e-6)
    larger = VMamba(depths=(1, 1), dim=8, position_size=64)
    assert larger.adapt_state(model.state_dict())["stem.pos_embed"].shape == (1, 8, 16, 16)


@pytest.mark.parametrize("size", [(1, 1), (37, 50), (64, 33), (30, 90)], ids=str)
@pytest.mark.parametrize("kind", ["vanilla", "v2", "batch"])
def test_takes_images_of_any_size(size, kind):
    options = {"vanilla": VANILLA, "v2": {"downsample": "conv2"}, "batch": {"norm": "batch"}}[kind]
    if kind != "batch":
        size = tuple(max(s, 32) for s in size)
    model = VMamba(depths=(1, 1, 1), dim=8, num_classes=3, **options).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 3)


@pytest.mark.parametrize("size", [(5, 6), (6, 5), (7, 7), (4, 8)], ids=str)
def test_patch_merging_stacks_the_cells_of_a_window_and_pads_below_and_right(size):
    merging = VMamba(depths=(1, 1), dim=8, **VANILLA).stages[1].downsample
    x = torch.randn(1, 8, *size)
    h, w = -(-size[0] // 2), -(-size[1] // 2)
    padded = torch.zeros(1, 8, 2 * h, 2 * w)
    padded[..., : size[0], : size[1]] = x
    y = merging(x)
    assert y.shape == (1, 16, h, w)
    window = torch.cat([padded[0, :, 2 * h - 2 + i, 2 * w - 2 + j] for j in (0, 1) for i in (0, 1)])
    expected = merging.reduction(F.layer_norm(window, (32,)))                # the last window, weights still at one
    assert torch.allclose(y[0, :, -1, -1], expected, atol=1e-6)


def test_keys_of_other_releases_are_understood():
    """First release, root version, 1x1 convolutions: each loads to the same model."""
    model = VMamba(depths=(2, 1), dim=8, num_classes=3, **VANILLA)
    rules, ours = keys("merge"), model.state_dict()
    usual = to_published(ours, rules)
    assert {"layers.0.downsample.reduction.weight", "layers.0.blocks.1.op.A_logs", "classifier.head.bias"} <= set(usual)
    first = {
        key.replace("patch_embed.0", "patch_embed.proj").replace("patch_embed.2", "patch_embed.norm")
        .replace(".norm.", ".ln_1.", key.count(".blocks.")).replace(".op.", ".self_attention.")
        .replace("classifier.", ""): value
        for key, value in usual.items()
    }  # fmt: skip
    root = {
        key.replace("downsample.norm", "downsample.1").replace("downsample.reduction", "downsample.2")
        .replace("x_proj_weight", "x_proj.weight").replace("dt_projs_weight", "dt_projs.weight"): value
        for key, value in usual.items()
    }  # fmt: skip
    root = {k: v.flatten(0, 1) if k.endswith(("x_proj.weight", "dt_projs.weight")) else v for k, v in root.items()}
    convolutions = {
        k: v[..., None, None] if k.endswith(("_proj.weight", "head.weight", "reduction.weight")) else v
        for k, v in usual.items()
    }
    assert "layers.0.blocks.0.ln_1.weight" in first
    for state in (usual, first, root, convolutions):
        loaded = to_ours(state, rules, shapes_of(model))
        assert set(loaded) == set(ours)
        assert all(torch.equal(loaded[key], ours[key]) for key in ours)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.weights], ids=lambda v: v.name)
def test_keys_lead_there_and_back(variant):
    ours = variant.build(**{} if variant.name.startswith("test_") else {"depths": (1, 1, 1, 1)}).state_dict()
    loaded = to_ours(to_published(ours, variant.keys), variant.keys, {k: tuple(v.shape) for k, v in ours.items()})
    assert all(torch.equal(loaded[key], ours[key]) for key in ours)


def test_the_backbone_norms_each_map_it_returns():
    built = published(BACKBONE, {**NARROW, "out_indices": [1]})
    model, x = built.model.eval(), torch.randn(2, 3, 40, 24)
    assert isinstance(model, StageMaps)
    (y,) = model(x)
    stage = model.stages(model.stem(x))
    assert torch.allclose(y, F.layer_norm(stage.movedim(1, -1), (16,)).movedim(-1, 1), atol=1e-6)
    assert "outnorm1.weight" in published_shapes(shapes_of(model), built.keys)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.set_grad_checkpointing()
    assert torch.equal(model(x)[0], y)
    assert model.no_weight_decay() == {f"stages.{i}.blocks.0.mixer.ssm.D" for i in (0, 1)}


def test_the_backbone_reads_files_that_hold_more_than_it_needs():
    """The published one keeps stages that nothing reads, and a table of positions that it does not add."""
    whole = published(BACKBONE, {**NARROW, "depths": [1, 1, 1], "out_indices": (0, 1, 2)})
    state = {**to_published(whole.model.state_dict(), whole.keys), "pos_embed": torch.ones(1, 8, 8, 8)}
    part = published(BACKBONE, {**NARROW, "depths": [1, 1, 1], "out_indices": (0, 1), "posembed": True})
    part.model.load_state_dict(to_ours({k: v for k, v in state.items() if k[:8] != "outnorm2"}, part.keys,
                                       shapes_of(part.model)))  # fmt: skip
    x = torch.randn(1, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(part.model(x), whole.model(x)[:2], strict=True))


def test_starts_with_the_published_distributions():
    model = VMamba(depths=(1, 1), dim=64)
    linear = model.stages[1].blocks[0].mlp.fc1
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (linear.bias == 0).all()
    assert model.stages[1].blocks[0].mixer.ssm.x_proj.abs().max() <= 128**-0.5


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"forward_type": "m0", "norm_layer": "ln", "ssm_init": "v2"}, "fails in the published code but with '_noz'"),
        ({"forward_type": "m0_noz", "ssm_init": "v2"}, "'m0_noz' fails in the published code"),
        ({"forward_type": "v05_noz_onnone"}, "core 'v05_noz'"),
        ({"forward_type": "xv1a"}, "core 'xv1a'"),
        ({"ssm_drop_rate": 0.1}, "ssm_drop_rate=0.1"),
        ({"downsample_version": "none"}, "downsample_version='none'"),
        ({"window": 7}, "arguments window"),
    ],
)
def test_says_what_it_does_not_cover(kwargs, reason):
    with pytest.raises(NotCovered, match=reason):
        published(VSSM, {**NARROW, **kwargs})


def test_the_published_defaults_are_those_of_no_release():
    with torch.device("meta"):
        built = published(VSSM, {"norm_layer": "LN2D", "depths": (1, 1)})
    names = published_shapes(shapes_of(built.model), built.keys)
    assert names["classifier.head.weight"] == (1000, 192)
    assert names["layers.0.downsample.1.weight"] == (192, 96, 2, 2)
    assert names["layers.0.blocks.0.op.A_logs"] == (4 * 192, 16)
    assert names["layers.0.blocks.0.mlp.fc1.weight"] == (384, 96)
    assert names["layers.0.blocks.0.op.in_proj.weight"] == (384, 96)
    assert names["patch_embed.0.weight"] == (96, 3, 4, 4)


def test_the_file_of_the_root_has_one_norm_and_one_mlp():
    kwargs = {**NARROW, "norm_layer": "bn", "gmlp": True}
    root = published("vmamba.py:VSSM (repository root)", kwargs)
    names = published_shapes(shapes_of(root.model), root.keys)
    assert "classifier.norm.running_var" not in names
    assert names["layers.0.blocks.0.mlp.fc1.weight"] == (16, 8)
    other = published(VSSM, kwargs)
    assert "classifier.norm.running_var" in published_shapes(shapes_of(other.model), other.keys)


@pytest.mark.parametrize("forward_type", ["v0", "v0seq"])
def test_arguments_that_the_first_mixer_ignores_are_ignored(forward_type):
    """It has SiLU, a convolution of side 3 and its bias, whatever the published constructor is told."""
    first = {**NARROW, "forward_type": forward_type, "norm_layer": "ln", "ssm_d_state": 2}
    told = {**first, "ssm_conv": 5, "ssm_conv_bias": False, "ssm_act_layer": "relu", "ssm_init": "v1"}
    source, target = published(VSSM, first), published(VSSM, told)
    target.model.load_state_dict(source.model.state_dict())
    x = torch.randn(1, 3, 33, 40)
    assert torch.equal(source.model.eval()(x), target.model.eval()(x))
    assert source.model.stages[0].blocks[0].mixer.conv.bias is not None


def test_names_of_short_variants_are_the_last_release():
    rows = {variant.name: variant for variant in VARIANTS}
    assert rows["vmamba_tiny"].kwargs == rows["vmamba_tiny_s1l8"].kwargs
    assert rows["vmamba_base"].weights == rows["vmamba_base_s1l20"].weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "linear"}, "VMamba: stem must be one of 'patch', 'conv', got 'linear'"),
        ({"norm": "group"}, "VMamba: norm must be one of 'layer', 'batch'"),
        ({"dim": (8, 16, 32)}, "VMamba: dim must name one width a stage"),
    ],
)
def test_refuses_parts_that_are_not_there(options, message):
    with pytest.raises(ValueError, match=message):
        VMamba(depths=(1, 1), **options)


def test_refuses_a_classifier_without_pooling():
    message = "VMamba: global_pool='' leaves a map, which no classifier reads; pass num_classes=0 or global_pool='avg'"
    with pytest.raises(ValueError, match=message):
        VMamba(depths=(1, 1), dim=8, global_pool="")
    with pytest.raises(ValueError, match=message):
        VMamba(depths=(1, 1), dim=8).reset_classifier(3, "")


def test_reads_a_forward_type_from_the_end():
    with pytest.raises(NotCovered):
        parse_forward_type("v05_oact_noz")
    ours = {"scan": "cross", "gate": "none", "out_norm": "layer", "out_act": "gelu"}
    assert parse_forward_type("v05_noz_oact") == ours
