"""Vim against its sheet: class tokens, directions, pooling, rotary embedding, image sizes, the dense backbone."""

from __future__ import annotations

import math

import pytest
import torch
from backbones import Backbone
from tolerance import TOLERANCE, error
from torch import nn
from torch.nn import functional as F

from vssm.models.keys import published_shapes, shapes_of, to_ours, to_published
from vssm.models.variant import NotCovered
from vssm.models.vim import VARIANTS, Vim, VimBackbone, published

CLASSIFIER, BACKBONE = "vim/models_mamba.py:VisionMamba", "seg/backbone/vim.py:VisionMambaSeg"
NARROW = dict(
    img_size=(40, 24), patch_size=8, stride=8, depth=3, embed_dim=8, d_state=3, channels=2, num_classes=5,
    final_pool_type="mean", if_cls_token=True, if_divide_out=True, use_middle_cls_token=True, rms_norm=True,
)  # fmt: skip


class TestBackbone(Backbone):
    """What timm and training demand."""

    name, size, isotropic = "test_vim", (40, 24), True
    decayed = frozenset({"A_log"})
    undecayed = ("pos_embed", "cls_token")

    def build(self, **kwargs):
        return super().build(img_size=self.size, **kwargs)


def ssm(p, suffix, x, decay):
    """The selective scan of the sheet over x (B, L, D), after the convolution."""
    R, N = p[f"dt_proj{suffix}.weight"].shape[1], decay.shape[1]
    dt, B, C = (x @ p[f"x_proj{suffix}.weight"].T).split([R, N, N], -1)
    dt = F.softplus(dt @ p[f"dt_proj{suffix}.weight"].T + p[f"dt_proj{suffix}.bias"])
    return dt, B, C, -decay.exp()


def recur(x, dt, B, C, A, skip):
    h, y = torch.zeros(*x.shape[::2], A.shape[1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1) + skip * x[:, t])
    return torch.stack(y, 1)


def convolved(p, suffix, x):
    D = x.shape[-1]
    weight, bias = p[f"conv1d{suffix}.weight"], p[f"conv1d{suffix}.bias"]
    return F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight, bias, groups=D)).mT


def plain_mixer(p, x, kind, halve):
    """The mixer of the sheet on x (B, L, C), with published parameters; sequences are flipped, no table is used."""
    x, z = (x @ p["in_proj.weight"].T).chunk(2, -1)
    u = convolved(p, "", x)
    dt, B, C, A = ssm(p, "", u, p["A_log"])
    y = recur(u, dt, B, C, A, p["D"])
    if kind == "v1":
        back = recur(u.flip(1), dt.flip(1), B.flip(1), C.flip(1), -p["A_b_log"].exp(), p["D"])
        y = y + back.flip(1)
    if kind == "v2":
        u = convolved(p, "_b", x.flip(1))
        y = y + recur(u, *ssm(p, "_b", u, p["A_b_log"]), p["D_b"]).flip(1)
        y = y / 2 if halve else y
    return (y * F.silu(z)) @ p["out_proj.weight"].T


def plain_rope(h, w, c):
    """The sheet's table of angles, (h w, c), in float64."""
    f = 10000.0 ** (-2 * torch.arange(c // 4, dtype=torch.double) / (c // 2))
    rows = (torch.arange(h, dtype=torch.double) / h * 14)[:, None] * f
    columns = (torch.arange(w, dtype=torch.double) / w * 14)[:, None] * f
    return torch.stack([
        torch.cat([rows[i].repeat_interleave(2), columns[j].repeat_interleave(2)]) for i in range(h) for j in range(w)
    ])  # fmt: skip


def turn(x, angles):
    """Rotary embedding; the first token stays where the sequence is odd."""
    still = x.shape[1] % 2
    pairs = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    y = x[:, still:] * angles.cos() + pairs[:, still:] * angles.sin()
    return torch.cat([x[:, :still], y], 1)


def normed(p, r, name, norm):
    if norm == "layer":
        return F.layer_norm(r, r.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])
    return r * torch.rsqrt(r.square().mean(-1, keepdim=True) + 1e-5) * p[f"{name}.weight"]


def plain_stream(p, x, *, token=None, kind="v2", halve=True, rope=None, norm="rms"):
    """The blocks of the sheet: the last hidden state and residual, of published entries p."""
    x = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=8)
    angles = plain_rope(*x.shape[2:], x.shape[1])
    x = x.flatten(2).mT
    m, b = x.shape[1], len(x)
    at = {"middle": m // 2, "first": 0}.get(token)
    if at is not None:
        x = torch.cat([x[:, :at], p["cls_token"].expand(b, -1, -1), x[:, at:]], 1)
    if token == "ends":
        x = torch.cat([p["cls_token_head"].expand(b, -1, -1), x, p["cls_token_tail"].expand(b, -1, -1)], 1)
    hidden, residual = x + p["pos_embed"], None
    for i in range(3):
        layer = {k.removeprefix(f"layers.{i}.mixer."): v for k, v in p.items() if k.startswith(f"layers.{i}.mixer.")}
        if rope:
            hidden = turn(hidden, angles)
            residual = turn(residual, angles) if rope == "both" and residual is not None else residual
        residual = hidden if residual is None else residual + hidden
        hidden = plain_mixer(layer, normed(p, residual, f"layers.{i}.norm", norm), kind, halve)
        hidden = hidden * layer.get("gamma", 1.0)
    return hidden, residual


def plain_vim(p, x, *, token, pool, norm="rms", **options):
    """The classifier of the sheet, published entries p."""
    y = normed(p, sum(plain_stream(p, x, token=token, norm=norm, **options)), "norm_f", norm)
    if token:
        at = {"middle": (y.shape[1] - 1) // 2, "first": 0}.get(token)
        y = (y[:, 0] + y[:, -1]) / 2 if token == "ends" else y[:, at]
    elif pool in ("mean", "none"):
        y = y.mean(1) if pool == "mean" else y[:, -1]
    logits = y @ p["head.weight"].T + p["head.bias"]
    return logits.amax(1) if not token and pool == "max" else logits


PATHS = [  # published arguments, and what the sheet says they do
    ({}, dict(token="middle")),
    ({"use_middle_cls_token": False}, dict(token="first")),
    ({"use_double_cls_token": True}, dict(token="ends")),
    ({"if_cls_token": False, "final_pool_type": "mean"}, dict(token=None, pool="mean")),
    ({"if_cls_token": False, "final_pool_type": "none"}, dict(token=None, pool="none")),
    ({"if_cls_token": False, "final_pool_type": "max"}, dict(token=None, pool="max")),
    ({"if_cls_token": False, "final_pool_type": "all"}, dict(token=None, pool="all")),
    ({"if_divide_out": False}, dict(token="middle", halve=False)),
    ({"if_devide_out": False}, dict(token="middle", halve=False)),
    ({"bimamba_type": "v1"}, dict(token="middle", kind="v1")),
    ({"if_bimamba": True}, dict(token="middle", kind="v1")),
    ({"ssm_cfg": {}, "initializer_cfg": None, "device": None, "dtype": None}, dict(token="middle")),
    ({"bimamba_type": "none", "use_middle_cls_token": False}, dict(token="first", kind="none")),
    ({"rms_norm": False}, dict(token="middle", norm="layer")),
    ({"init_layer_scale": 0.5}, dict(token="middle")),
    ({"if_rope": True, "img_size": (32, 48)}, dict(token="first", rope="hidden")),
    ({"if_rope": True, "if_rope_residual": True, "img_size": (32, 48)}, dict(token="middle", rope="both")),
    ({"if_rope": True, "if_rope_residual": True, "if_cls_token": False, "img_size": (32, 48)},
     dict(token=None, rope="both", pool="mean")),
    ({"img_size": (45, 31)}, dict(token="middle")),
]  # fmt: skip


@pytest.mark.parametrize(("options", "meaning"), PATHS, ids=[str(options) for options, _ in PATHS])
def test_every_path_is_the_forward_pass_of_the_sheet(options, meaning):
    """Under the published keys, with images that are not square."""
    if meaning.get("rope") == "hidden":
        options = {**options, "use_middle_cls_token": False}
    built = published(CLASSIFIER, {**NARROW, **options})
    model = built.model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    entries = to_published(model.state_dict(), built.keys)
    x = torch.randn(2, 2, *model.img_size, dtype=torch.double)
    tolerance = 1e-5 if "rope" in meaning else TOLERANCE[torch.float64]                  # the rotary table is float32
    expected = plain_vim(entries, x, **{"pool": "mean", **meaning})
    outputs = built.run(model, {"x": x})
    assert error(outputs["logits"], expected) < tolerance
    assert torch.equal(outputs["logits"], model(x))


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"if_bidirectional": True}, "if_bidirectional=True"),
        ({"flip_img_sequences_ratio": 0.5}, "flip_img_sequences_ratio=0.5"),
        ({"ssm_cfg": {"d_conv": 3}}, "ssm_cfg="),
        ({"bimamba_type": "v3"}, "bimamba_type='v3'"),
        ({"window": 7}, "arguments window"),
        ({"use_double_cls_token": True, "if_rope": True}, "if_rope with two class tokens"),
        ({"if_rope": True, "pt_hw_seq_len": 7}, "pt_hw_seq_len=7"),
        ({"final_pool_type": "max"}, "final_pool_type='max' with a class token"),
    ],
)
def test_says_what_it_does_not_cover(kwargs, reason):
    with pytest.raises(NotCovered, match=reason):
        published(CLASSIFIER, {**NARROW, **kwargs})


@pytest.mark.parametrize(
    ("name", "kwargs", "shape"),
    [
        ("vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2", {}, (1, 197, 192)),
        ("vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
         {"img_size": (96, 160)}, (1, 11 * 19 + 1, 384)),
        ("vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2",
         {"num_classes": 7}, (1, 197, 768)),
    ],
)  # fmt: skip
def test_published_factories_have_a_width_and_a_stride(name, kwargs, shape):
    with torch.device("meta"):
        model = published(f"vim/models_mamba.py:{name}", kwargs).model
    assert model.pos_embed.shape == shape
    assert model.head.out_features == kwargs.get("num_classes", 1000)
    with pytest.raises(NotCovered, match="no model of this family"):
        published("vim/models_mamba.py:vim_huge_patch16_224", {})


@pytest.mark.parametrize("size", [(224, 224), (230, 239), (96, 160)], ids=str)
@pytest.mark.parametrize("stride", [16, 8])
def test_patches_are_counted_from_the_top_left(size, stride):
    """What does not fill a patch at the right and below is not seen."""
    model = Vim(img_size=size, stride=stride, embed_dim=8, depth=1, num_classes=3).eval()
    h, w = ((s - 16) // stride + 1 for s in size)
    assert model.grid == (h, w)
    assert model.pos_embed.shape == (1, h * w + 1, 8)
    x = torch.randn(1, 3, *size)
    seen = x.clone()
    seen[..., (h - 1) * stride + 16 :, :] = 7.0
    assert torch.equal(model(x), model(seen))


def test_takes_other_sizes_when_asked():
    model, x = Vim(img_size=32, patch_size=8, embed_dim=8, depth=2, num_classes=3).eval(), torch.randn(2, 3, 48, 24)
    message = r"images must be 32 x 32, got 48 x 24; create the model with img_size=\(48, 24\) or dynamic_img_size=True"
    with pytest.raises(ValueError, match=message):
        model(x)
    dynamic = Vim(img_size=32, patch_size=8, embed_dim=8, depth=2, num_classes=3, dynamic_img_size=True).eval()
    dynamic.load_state_dict(model.state_dict())
    y = dynamic(x)
    model.set_input_size((48, 24))
    assert model.pos_embed.shape == (1, 6 * 3 + 1, 8)
    assert torch.allclose(model(x), y, atol=1e-6)
    model.set_input_size(32)
    assert model.grid == (4, 4)


@pytest.mark.parametrize("class_row", ["own", "first"])
def test_a_checkpoint_of_another_size_is_resized_on_request(class_row):
    small = Vim(img_size=32, patch_size=8, embed_dim=8, depth=1)
    large = Vim(img_size=(64, 40), patch_size=8, embed_dim=8, depth=1, class_row=class_row)
    state = large.adapt_state(small.state_dict())
    large.load_state_dict(state)
    token = 20 if class_row == "own" else 0                                                 # of 8 x 5 patches
    assert torch.equal(large.pos_embed[0, token], small.pos_embed[0, 8 if class_row == "own" else 0])
    assert torch.equal(large.adapt_state(state)["pos_embed"], large.pos_embed)
    with pytest.raises(ValueError, match="must be that of square images, got 40 patches; load it into a model"):
        small.adapt_state(large.state_dict())


def test_dropping_the_class_token_drops_its_own_row():
    model = Vim(img_size=32, patch_size=8, embed_dim=8, depth=1, num_classes=3)
    row = model.pos_embed[:, 8].clone()
    kept = torch.cat([model.pos_embed[:, :8], model.pos_embed[:, 9:]], 1)
    model.remove_class_token()
    assert torch.equal(model.pos_embed, kept)
    assert not (model.pos_embed == row).all(-1).any()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    as_published = Vim(img_size=32, patch_size=8, embed_dim=8, depth=1, class_row="first")
    kept = as_published.pos_embed[:, 1:].clone()
    as_published.remove_class_token()
    assert torch.equal(as_published.pos_embed, kept)


def test_the_random_start_is_the_published_one():
    model = Vim(img_size=32, embed_dim=64, depth=4)
    mixer = model.blocks[2].mixer
    assert (mixer.ssm.dt_bias[1] == 0).all()
    assert (mixer.ssm.dt_bias[0] < -2).all()
    assert mixer.out_proj.weight.abs().max() <= 1 / math.sqrt(128) / math.sqrt(4)
    assert mixer.out_proj.weight.abs().max() >= 0.9 / math.sqrt(128) / math.sqrt(4)
    assert (model.patch_embed.proj.bias == 0).all()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert (Vim(img_size=32, embed_dim=8, depth=1, scan="hilbert").blocks[0].mixer.ssm.dt_bias < -2).all()


def test_stochastic_depth_grows_from_nothing_to_the_full_rate():
    model = Vim(img_size=32, embed_dim=8, depth=3, drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.15, 0.3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_token": None}, "global_pool='token' needs a class token"),
        ({"class_token": "last"}, "class_token must be one of"),
        ({"global_pool": "max"}, "global_pool must be one of"),
        ({"rope": "both"}, "rope must be one of 'stream', 'block', None, got 'both'"),
        ({"rope": "stream", "class_token": "ends"}, "at most one class token"),
        ({"rope": "stream", "dynamic_img_size": True}, "drop dynamic_img_size"),
        ({"img_size": 12}, "at least one patch"),
        ({"class_row": "last"}, "class_row must be one of 'own', 'first', got 'last'"),
        ({"norm": "batch"}, "norm must be one of"),
    ],
)
def test_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Vim(**{"img_size": 32, "embed_dim": 8, "depth": 1, **options})


def test_refuses_a_size_without_patches():
    model = Vim(img_size=32, embed_dim=8, depth=1)
    with pytest.raises(ValueError, match="img_size must be at least one patch"):
        model.set_input_size(12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (0, 1)}, "must name one block or four of 2"),
        ({"out_indices": (5, 11, 17, 23)}, "must name one block or four of 2"),
        ({"features": "residual"}, "features must be one of 'branch', 'stream'"),
        ({"last": "add"}, "last must be one of"),
    ],
)
def test_the_backbone_refuses_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        VimBackbone(Vim(img_size=32, embed_dim=8, depth=2), **{"out_indices": (0,), **options})


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.weights], ids=lambda v: v.name)
def test_keys_lead_there_and_back(variant):
    ours = variant.build().state_dict()
    entries = to_published(ours, variant.keys)
    assert {"layers.0.mixer.A_b_log", "layers.0.mixer.conv1d_b.weight", "norm_f.weight", "head.bias"} <= set(entries)
    loaded = to_ours(entries, variant.keys, {k: tuple(v.shape) for k, v in ours.items()})
    assert all(torch.equal(loaded[key], ours[key]) for key in ours)


@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize("features", ["branch", "stream"])
def test_the_backbone_gives_four_strides_and_trains_every_parameter(stride, features):
    trunk = Vim(img_size=(64, 96), embed_dim=8, depth=4, stride=stride)
    model = VimBackbone(trunk, (0, 1, 2, 3), features, "norm")
    maps = model(torch.randn(2, 3, *trunk.img_size))
    h, w = trunk.grid
    expected = {16: [(4 * h, 4 * w), (2 * h, 2 * w), (h, w), (h // 2, w // 2)],
                8: [(2 * h, 2 * w), (h, w), (h // 2, w // 2), (h // 4, w // 4)]}[stride]  # fmt: skip
    assert [tuple(y.shape[2:]) for y in maps] == expected
    sum(y.square().sum() for y in maps).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert "trunk.pos_embed" in model.no_weight_decay()
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_the_backbone_recomputes_its_blocks_and_nothing_changes():
    options = dict(class_token=None, global_pool="avg", rope="block", drop_path_rate=0.5)
    trunk = Vim(img_size=64, embed_dim=8, depth=3, **options)
    model, x, results = VimBackbone(trunk, (1,), "stream"), torch.randn(4, 3, 64, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        maps = model(x)
        results.append([*maps, *torch.autograd.grad(maps[2].square().sum(), list(trunk.blocks[:2].parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("last", ["branch", "stream", "norm"])
def test_backbone_features_are_branches_or_the_stream(last):
    trunk = Vim(img_size=64, embed_dim=8, depth=3, class_token=None, global_pool="avg", rope="stream").eval()
    model = VimBackbone(trunk, (2,), "stream", last)
    x, grid = trunk.embed(torch.randn(2, 3, 64, 64))
    for block in trunk.blocks:
        x = trunk.rope(x)
        branch = block.mixer(block.norm(x), grid)
        x = x + branch
    expected = {"branch": branch, "stream": x, "norm": trunk.norm(x)}[last]
    assert torch.equal(model.feature(2, branch, x), expected)
    assert torch.equal(model.feature(1, branch, x), trunk.rope(x))                       # as the next block reads it
    with pytest.raises(ValueError, match="out_indices must name one block or four"):
        VimBackbone(Vim(img_size=64, embed_dim=8, depth=3), (0, 1))
    with pytest.raises(ValueError, match="stride must be 16 or 8, got 4"):
        VimBackbone(Vim(img_size=64, embed_dim=8, depth=1, stride=4), (0,))


def test_the_published_backbone_has_the_published_keys():
    kwargs = dict(img_size=64, patch_size=16, in_chans=3, num_classes=2, depth=4, out_indices=[0, 1, 2, 3], embed_dim=8)
    with pytest.raises(NotCovered, match="if_fpn=False"):
        published(BACKBONE, {**kwargs, "if_fpn": False})
    kwargs["if_fpn"] = True
    built = published(BACKBONE, {**kwargs, "use_residual_as_feature": True, "last_layer_process": "add & norm"})
    shapes = published_shapes(shapes_of(built.model), built.keys)
    assert shapes["layers.0.mixer.A_log"] == (16, 3)                                         # in_chans went to d_state
    assert shapes["patch_embed.proj.weight"] == (8, 2, 16, 16)                               # num_classes to channels
    assert shapes["pos_embed"] == (1, 16, 8)
    assert {"norm_f.weight", "fpn1.0.weight", "fpn1.1.running_mean", "fpn1.3.bias", "fpn2.0.weight"} <= set(shapes)


def test_the_patches_choose_the_published_pyramid():
    kwargs = dict(img_size=32, patch_size=16, stride=8, num_classes=2, depth=4, out_indices=[0, 1, 2, 3], embed_dim=8)
    built = published(BACKBONE, kwargs)
    assert [tuple(y.shape[2:]) for y in built.model(torch.randn(1, 2, 32, 32))] == [(12, 12), (6, 6), (3, 3), (1, 1)]
    assert "fpn1.3.bias" in published_shapes(shapes_of(built.model), built.keys)


@pytest.mark.parametrize("process", ["none", "add"])
def test_the_published_backbone_of_detectors_has_one_map(process):
    """The last block's output, or the sum of all, without a norm, on the patches alone."""
    kwargs = dict(img_size=32, patch_size=8, stride=8, in_chans=2, num_classes=80, depth=3, embed_dim=8, if_rope=True,
                  if_rope_residual=True, if_cls_token=True, last_layer_process=process)  # fmt: skip
    built = published("det/detectron2/modeling/backbone/vim.py:VisionMambaDet", kwargs)
    model = built.model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    entries = to_published(model.state_dict(), built.keys)
    assert entries["pos_embed"].shape == (1, 16, 8)
    assert not {"cls_token", "norm_f.weight", "head.weight"} & set(entries)
    x = torch.randn(2, 2, 32, 32, dtype=torch.double)
    hidden, residual = plain_stream(entries, x, rope="both")
    expected = (hidden if process == "none" else hidden + residual).mT.unflatten(2, (4, 4))
    assert error(built.run(model, {"x": x})["last_feat"], expected) < 1e-5                # rotary table: float32
    with pytest.raises(NotCovered, match="last_layer_process='add & norm' fails in the published code"):
        published("vim.py:VisionMambaDet", {**kwargs, "last_layer_process": "add & norm"})
