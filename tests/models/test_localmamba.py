"""LocalMamba: what timm demands of both hosts, their windows, and agreement with the published code."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from backbones import Backbone
from tolerance import TOLERANCE, error

from vssm.checkpoints import load_state
from vssm.cli import verify
from vssm.layers.local_mixer import LocalMixer, local_mixers, sum_with_columns
from vssm.models.keys import published_shapes, shapes_of, to_published
from vssm.models.localmamba import FIXED, KEYS, VARIANTS, LocalVMamba, published
from vssm.models.localvim import LocalVim, LocalVimBackbone
from vssm.models.variant import NotCovered
from vssm.scans import scan_array

GOLDEN = Path(__file__).parent.parent / "golden" / "localmamba"
ROWS = {variant.name: variant for variant in VARIANTS}
TINY = ROWS["test_localvim"]


class TestLocalVim(Backbone):
    name = "test_localvim"
    isotropic = True
    decayed = frozenset({"A_log"})
    undecayed = ("pos_embed",)


class TestLocalVMamba(Backbone):
    name = "test_localvmamba"

    def cells(self, reduction):
        """The stem drops what is left of a patch; later stages pad."""
        return [-(-(size // 4) // (reduction // 4)) for size in self.size]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_agrees_with_the_published_code_in_float64(path, capsys):
    assert verify.main([str(path)]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


def undone_as_published(sequence, name, grid):
    """Steps (t, d) back as the published code lays them out, a list of cells: (h w, d)."""
    (h, w), d = grid, sequence.shape[1]
    if name.endswith("_flip"):
        sequence = sequence.flip(0)
    if name.startswith("h"):
        return sequence
    if name.startswith("v"):                                    # read as H x W, then transposed
        return sequence.view(h, w, d).transpose(0, 1).reshape(h * w, d)
    side = int(name.removesuffix("_flip")[1:])
    rows, columns = -(-h // side), -(-w // side)
    windows = sequence.view(rows, columns, side, side, d).transpose(1, 2)
    return windows.reshape(rows * side, columns * side, d)[:h, :w].reshape(h * w, d)


@pytest.mark.parametrize("directions", ["h v_flip w2 w3_flip", "v v_flip", "h_flip w7"])
@pytest.mark.parametrize("class_token", [None, "middle"])
@pytest.mark.parametrize(
    ("conv", "options"),
    [
        ("sequence", {}), ("grid", {}), ("grid", {"act": "gelu", "dt_rank": 3}), ("grid", {"conv_size": 0}),
        ("grid", {"conv_size": 5, "conv_bias": False}),
    ],
    ids=str,
)  # fmt: skip
def test_a_mixer_is_that_of_the_sheet(conv, options, class_token, directions):
    """On a grid that is not square: padding with values, the token after as many steps, columns as published."""
    if conv == "grid" and class_token:
        return
    columns = [k for k, name in enumerate(directions.split()) if name[0] == "v"]
    mixer = LocalMixer(16, "local", {"directions": directions}, columns, conv, class_token, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    (h, w), p = (3, 5), 7
    count = h * w + (class_token is not None)
    x = torch.randn(1, count, 16, dtype=torch.float64)
    xz, width, silu = mixer.in_proj(x)[0], 32, getattr(torch.nn.functional, options.get("act", "silu"))
    if conv == "grid":
        u = xz[:, :width].T.view(1, width, h, w)
        if options.get("conv_size", 3):
            taps = options.get("conv_size", 3)
            bias = mixer.conv.bias if options.get("conv_bias", True) else None
            u = torch.nn.functional.conv2d(u, mixer.conv.weight, bias, padding=taps // 2, groups=width)
        xz = torch.cat([silu(u)[0].flatten(1).T, xz[:, width:]], 1)
    patches = torch.cat([xz[:p], xz[p + 1 :]]) if class_token else xz
    ssm, total = mixer.ssm, 0
    for k, name in enumerate(directions.split()):
        path = scan_array("local", (h, w), directions=name)[0].tolist()
        steps = torch.cat([patches, torch.zeros_like(patches[:1])])[path]
        if class_token:
            steps = torch.cat([steps[:p], xz[p : p + 1], steps[p:]])
        u, z = steps.split(width, 1)
        if conv == "sequence":
            taps, before = mixer.sequence_conv.weight[k], torch.cat([u.new_zeros(3, width), u])
            u = silu(sum(taps[:, j] * before[j : j + len(u)] for j in range(4)) + mixer.sequence_conv.bias[k])
        dt, B, C = (u @ ssm.x_proj[k].T).split(ssm.splits, 1)
        delta = torch.nn.functional.softplus(dt @ ssm.dt_weight[k].T + ssm.dt_bias[k])
        state, y = torch.zeros(width, 16, dtype=torch.float64), []
        for t in range(len(u)):
            state = torch.exp(-delta[t, :, None] * ssm.A_log[k].exp()) * state + (delta[t] * u[t])[:, None] * B[t]
            y.append(state @ C[t] + ssm.D[k] * u[t])
        y = torch.stack(y) * (silu(z) if conv == "sequence" else 1)
        if class_token:
            cells = undone_as_published(torch.cat([y[:p], y[p + 1 :]]), name, (h, w))
            y = torch.cat([cells[:p], y[p : p + 1], cells[p:]])
        else:
            y = undone_as_published(y, name, (h, w))
        total = total + mixer.attention(y[None, None])[0, 0]
    if conv == "grid":
        total = torch.nn.functional.layer_norm(total, (width,), mixer.out_norm.weight, mixer.out_norm.bias)
        total = total * silu(xz[:, width:])
    assert error(mixer(x, (h, w)), mixer.out_proj(total)[None]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("conv", ["sequence", "grid"])
def test_the_search_weighs_normalised_directions(conv):
    """Weights (8, 1, 1, 1) of a softmax, norms without parameters, as published."""
    torch.manual_seed(0)
    x, grid = torch.randn(2, 15, 16, dtype=torch.float64), (3, 5)
    searching = local_mixers("local", None, None, 1, conv)(0, 16).double()
    torch.nn.init.normal_(searching.weights)
    y = torch.randn(2, 8, 15, 32, dtype=torch.float64)
    rows = searching.attention(y).unbind(1)
    rows = [torch.nn.functional.layer_norm(row, (32,)) for row in rows]
    for k in (2, 3):
        for _ in range(2):                                      # column by column; read as (3, 5), then transposed
            rows[k] = rows[k].unflatten(1, grid).transpose(1, 2).flatten(1, 2)
    weights = searching.weights.exp() / searching.weights.exp().sum()
    expected = sum(weight * row for weight, row in zip(weights, rows, strict=True))
    assert error(searching.merged(y, grid), expected) < TOLERANCE[torch.float64]
    assert searching(x, grid).shape == x.shape
    assert searching.scan_options == {"directions": "h h_flip v v_flip w2 w2_flip w7 w7_flip"}


SEARCH_PARTS = dict(depth=2, embed_dim=16, img_size=32, patch_size=8, rms_norm=True, if_abs_pos_embed=True,
                    final_pool_type="mean")  # fmt: skip


def test_the_networks_of_the_search_have_the_published_entries():
    vim = published("x.py:local_vim_tiny_search", SEARCH_PARTS)
    names = published_shapes(shapes_of(vim.model), vim.keys)
    assert names["layers.1.mixer.multi_scan.weights"] == (8, 1, 1, 1)
    assert {name for name in names if "A_log" in name} == {
        f"layers.{i}.mixer.A_log_{k}" for i in range(2) for k in range(8)
    }
    with torch.device("meta"):
        small = published("x.py:local_vssm_small_search", {})
    names = published_shapes(shapes_of(small.model), small.keys)
    assert names["layers.2.blocks.26.op.multi_scan.weights"] == (8, 1, 1, 1)
    assert names["layers.3.blocks.0.op.A_logs"] == (8 * 512, 16)


def test_blocks_may_read_different_numbers_of_directions():
    kwargs = {**SEARCH_PARTS, "depth": 3, "directions": [["h"], ["v", "w2", "h_flip"], ["v", "h"]]}
    source, target = (published("x.py:VisionMamba", kwargs) for _ in range(2))
    names = to_published(source.model.state_dict(), source.keys)
    assert [f"layers.{i}.mixer.D_{k}" in names for i in range(3) for k in range(3)] == [1, 0, 0, 1, 1, 1, 1, 1, 0]
    load_state(target.model, names, target.keys)
    x = torch.randn(1, 3, 32, 24)
    assert torch.equal(source.model.eval()(x), target.model.eval()(x))


def test_rotary_embedding_without_the_residual_turns_what_blocks_add():
    kwargs = {**SEARCH_PARTS, "directions": [["h"], ["v"]], "if_rope": True, "final_pool_type": "none"}
    model, x = published("x.py:VisionMamba", kwargs).model.eval(), torch.randn(1, 3, 32, 24)
    tokens, grid = model.embed(x)
    hidden, residual = tokens, 0
    for block in model.blocks:
        hidden = model.rope(hidden, grid)
        residual = residual + hidden
        hidden = block.mixer(block.norm(residual), grid)
    expected = model.head(model.norm(residual + hidden)[:, -1])
    assert error(model(x), expected) < TOLERANCE[torch.float32]


def test_columns_change_places_only_where_the_grid_is_not_square():
    y = torch.arange(6.0).view(1, 1, 6, 1)
    assert sum_with_columns(y, (2, 3), (0,), token=False).flatten().tolist() == [0, 4, 3, 2, 1, 5]
    both = torch.cat([y, 10 * y], 1)
    assert sum_with_columns(both, (2, 3), (1,), token=False).flatten().tolist() == [0, 41, 32, 23, 14, 55]
    assert sum_with_columns(both[:, :, :4], (2, 2), (0,), token=False).flatten().tolist() == [0, 11, 22, 33]


@pytest.mark.parametrize("name", ["hilbert", "atrous"])
@pytest.mark.parametrize("class_token", [None, "middle"])
def test_orders_that_leave_cells_out_keep_their_grid(name, class_token):
    mixer = LocalMixer(16, name, None, (), "sequence", class_token)
    x = torch.randn(2, 21 + (class_token is not None), 16)
    assert mixer(x, (3, 7)).shape == x.shape


@pytest.mark.parametrize(
    ("name", "count"),
    [("localvim_tiny", 7994152), ("localvim_tiny_cls", 7994536), ("localvim_tiny_fixed", 7994152),
     ("localvim_small", 27783784), ("localvim_small_searched", 27783784),
     ("localvmamba_tiny", 25527160), ("localvmamba_small", 49748536)],
)  # fmt: skip
def test_the_zoo_has_the_published_size(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in ROWS[name].build().parameters()) == count


def test_images_are_padded_to_whole_patches():
    """With zeros at the right and below; the table of positions is resized to what comes out."""
    model, x = TINY.build().eval(), torch.randn(2, 3, 45, 37)
    wide = torch.nn.functional.pad(x, (0, 3, 0, 3))
    assert torch.equal(model(x), model(wide))
    assert model.forward_intermediates(x, [0], intermediates_only=True)[0].shape == (2, 16, 6, 5)


def test_a_class_token_fixes_the_size():
    model = TINY.build(class_token="middle", rope=None, global_pool="token").eval()
    assert model.pos_embed.shape == (1, 17, 16)
    assert torch.isfinite(model(torch.randn(1, 3, 31, 26))).all()                       # 4 x 4 patches when padded
    with pytest.raises(ValueError, match=r"images must have 4 x 4 patches of 8 pixels, got 5 x 3; create the model"):
        model(torch.randn(1, 3, 40, 24))
    row = model.pos_embed[0, 8].clone()
    model.set_input_size((40, 24))
    assert torch.equal(model.pos_embed[0, 7], row)
    patches, tokens = model.forward_intermediates(torch.randn(1, 3, 40, 24), [1], return_prefix_tokens=True)[1][0]
    assert patches.shape == (1, 16, 5, 3)
    assert tokens.shape == (1, 1, 16)


def test_a_checkpoint_of_another_size_is_resized_on_request():
    source, target = TINY.build(), TINY.build(img_size=(48, 24))
    load_state(target, to_published(source.state_dict(), KEYS), KEYS, adapt=["img_size"])
    assert target.pos_embed.shape == (1, 18, 16)
    with pytest.raises(ValueError, match="must be that of square images, got 18 patches"):
        source.adapt_state(target.state_dict())
    source.set_input_size((48, 24))
    assert error(source.pos_embed, target.pos_embed) < TOLERANCE[torch.float32]
    assert error(source.rope.cos, target.rope.cos) == 0


def test_the_random_start_is_the_published_one():
    model = TINY.build(embed_dim=64)
    mixer = model.blocks[1].mixer
    assert (mixer.ssm.dt_bias == 0).all()
    assert mixer.ssm.x_proj.std().item() == pytest.approx(0.02, rel=0.1)
    assert mixer.out_proj.weight.abs().max().item() == pytest.approx(1 / math.sqrt(128 * 3), rel=0.05)
    grid = ROWS["test_localvmamba"].build().stages[0].blocks[0].mixer
    assert (grid.ssm.dt_bias < -2).all()                                                # Mamba's own step sizes stay
    assert grid.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_the_directions_have_their_own_decay_after_loading():
    """Published code loads the last direction's A_log into all four of a model on the CPU."""
    source, target = TINY.build(), TINY.build()
    for block in source.blocks:
        torch.nn.init.normal_(block.mixer.ssm.A_log)
    load_state(target, to_published(source.state_dict(), KEYS), KEYS)
    decays = target.blocks[0].mixer.ssm.A_log
    assert not torch.equal(decays[0], decays[3])


def test_the_backbone_trains_every_parameter():
    model, x = LocalVimBackbone(TINY.build(), (0, 2)), torch.randn(2, 3, 40, 24)
    maps = model(x)
    assert [tuple(y.shape) for y in maps] == [(2, 16, 5, 3)] * 2
    sum(y.square().sum() for y in maps).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.set_grad_checkpointing()
    assert model.trunk.grad_checkpointing
    assert torch.equal(model(x)[1], maps[1])
    assert {"trunk.pos_embed", "trunk.blocks.2.mixer.ssm.D"} <= model.no_weight_decay()
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_arguments_that_published_recipes_give_and_nothing_reads():
    """LocalVMamba's of Mask R-CNN and UPerNet have those of VMamba; the class's own defaults need not be given."""
    kwargs = dict(
        dims=8, depths=[1, 1], directions=[["h"], ["v"]], ssm_d_state=4, ssm_dt_rank="auto", ssm_ratio=2.0,
        mlp_ratio=0.0, downsample_version="v1", patchembed_version="v1", drop_path_rate=0.1, out_indices=(0, 1),
    )  # fmt: skip
    assert len(published("x.py:Backbone_LocalVSSM", kwargs).model(torch.randn(1, 3, 32, 40))) == 2
    rest = {**SEARCH_PARTS, "ssm_cfg": {}, "initializer_cfg": None, "device": None, "dtype": None}
    del rest["final_pool_type"]
    assert published("x.py:VisionMamba", rest).model.global_pool == "last"
    options = dict(ssm_dt_rank=3, ssm_act_layer="gelu", ssm_conv=1, ssm_conv_bias=False)
    mixer = published("x.py:VSSM", {"dims": 8, "depths": [1], **options}).model.stages[0].blocks[0].mixer
    assert (mixer.ssm.splits[0], type(mixer.act).__name__, mixer.conv) == (3, "GELU", None)


def test_published_constructors():
    """Factories set what their arguments do not; those of LocalVMamba take no arguments at all."""
    with torch.device("meta"):
        fixed = published("x.py:local_vim_tiny_wo_search", {"num_classes": 7, "img_size": 128}).model
        small = published("x.py:local_vssm_small", {"num_classes": 7})
        searched = published("x.py:local_vim_tiny", {}).model
    assert {block.mixer.scan_options["directions"] for block in fixed.blocks} == {FIXED}
    assert fixed.pos_embed.shape == (1, 64, 192)
    assert fixed.head.out_features == 7
    assert searched.blocks[0].mixer.scan_options["directions"] == "h v_flip w7 w7_flip"
    assert published_shapes(shapes_of(small.model), small.keys)["classifier.head.weight"] == (1000, 768)


VIM = {"directions": [["h"] * 4] * 24, "rms_norm": True, "final_pool_type": "mean", "if_abs_pos_embed": True}


@pytest.mark.parametrize(
    ("entry", "kwargs", "reason"),
    [
        ("local_vim_base", {}, "no model of this family"),
        ("local_vssm_base", {}, "no model of this family"),
        ("VisionMamba", {**VIM, "if_abs_pos_embed": False}, "if_abs_pos_embed=False"),
        ("VisionMamba", {**VIM, "if_cls_token": True}, "use_middle_cls_token=False"),
        ("VisionMamba", {**VIM, "window": 3}, "arguments window"),
        ("VisionMamba", {**VIM, "final_pool_type": "max"}, "final_pool_type='max'"),
        ("Backbone_LocalVSSM", {"directions": [["h"]], "patch_norm": False}, "patch_norm=False"),
        ("Backbone_LocalVSSM", {"directions": [["h"]], "window": 3}, "arguments window"),
    ],
)
def test_what_is_not_covered_says_so(entry, kwargs, reason):
    with pytest.raises(NotCovered, match=reason):
        published(f"x.py:{entry}", kwargs)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (LocalVim, {"directions": ("h", "v")}, r"one choice a block \(1 blocks\), got 2"),
        (LocalVim, {"directions": "h x"}, "a direction is h, v or w and a number"),
        (LocalVim, {"global_pool": "token"}, "global_pool='token' needs class_token='middle'"),
        (LocalVim, {"class_token": "first"}, "class_token must be one of 'middle', None"),
        (LocalVim, {"class_token": "middle"}, "rope turns patches only"),
        (LocalVim, {"rope": "both"}, "rope must be one of 'stream', 'block', None"),
        (LocalVim, {"norm": "batch"}, "norm must be one of 'rms', 'layer'"),
        (LocalVim, {"scan_options": {"window": 3}}, r"takes directions and no scan_options, got \{'window': 3\}"),
        (LocalVim, {"img_size": 12}, "at least one patch"),
        (LocalVMamba, {"dim": (8, 8), "directions": FIXED}, r"one width a stage \(4 in depths\), got \(8, 8\)"),
    ],
)
def test_refuses_options_that_do_not_fit(model, options, message):
    with pytest.raises(ValueError, match=message):
        model(**({"directions": "h", "embed_dim": 8, "depth": 1} if model is LocalVim else {}) | options)


@pytest.mark.parametrize(("token", "index", "message"), [(None, 3, "blocks 0 to 2"), ("middle", 0, "no class token")])
def test_refuses_trunks_that_do_not_fit(token, index, message):
    trunk = TINY.build(class_token=token, rope=None if token else "stream")
    with pytest.raises(ValueError, match=message):
        LocalVimBackbone(trunk, (index,))
