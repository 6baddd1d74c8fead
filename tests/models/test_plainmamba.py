"""PlainMamba: what timm demands, and agreement with the published code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import Backbone
from tolerance import TOLERANCE, error
from torch.nn.functional import one_hot

from vssm.checkpoints import load_state
from vssm.cli import verify
from vssm.models.keys import published_shapes, shapes_of, to_published
from vssm.models.plainmamba import (
    KEYS,
    VARIANTS,
    DirectedMixer,
    PlainMamba,
    PlainMambaBackbone,
    entering_moves,
    published,
)
from vssm.models.variant import NotCovered
from vssm.scans import scan_table
from vssm.scans.snake import snake_directions

GOLDEN = Path(__file__).parent.parent / "golden" / "plainmamba"
TINY = next(v for v in VARIANTS if v.name == "test_plainmamba")


class TestPlainMamba(Backbone):
    name = "test_plainmamba"
    isotropic = True
    decayed = frozenset()
    undecayed = ("pos_embed", "direction_B")


def test_agrees_with_the_published_code_in_float64(capsys):
    assert verify.main([str(GOLDEN / "plainmamba_l1.json")]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


@pytest.mark.parametrize("grid", [(4, 5), (5, 4), (3, 1), (1, 3), (1, 1)], ids=str)
def test_moves_are_those_of_the_zigzag(grid):
    """One move a step: the published direction codes."""
    moves = entering_moves(scan_table("snake", grid), grid[1])
    assert torch.equal(moves.long(), one_hot(torch.as_tensor(snake_directions(grid)).long(), 5))


@pytest.mark.parametrize(
    ("scan", "options", "as_published"),
    [("snake", {}, True), ("hilbert", {}, True), ("window", {"window": 2}, False), ("atrous", {}, False)],
)
def test_where_step_parameters_come_from(scan, options, as_published):
    """Along a permutation those of step t are those of cell t, as published; else those of the cell that is read."""
    mixer, (h, w) = DirectedMixer(16, d_state=4, scan=scan, scan_options=options).double(), (3, 3)
    ssm = mixer.ssm
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    x = torch.randn(1, h * w, 16, dtype=torch.float64)
    u, z = mixer.in_proj(x).chunk(2, -1)
    u = mixer.act(mixer.conv(u.mT.unflatten(2, (h, w)))).flatten(2).mT[0]
    y, u = torch.zeros_like(u), torch.cat([u, torch.zeros_like(u[:1])])             # the last cell is padding
    dt, B, C = (u @ ssm.x_proj[0].T).split(ssm.splits, -1)
    delta = torch.nn.functional.softplus(dt @ ssm.dt_weight[0].T + 2 * ssm.dt_bias[0])
    table = scan_table(scan, (h, w), **options)
    for path, moves in zip(table.tolist(), entering_moves(table, w).double(), strict=True):
        state = torch.zeros(u.shape[1], B.shape[1], dtype=torch.float64)
        for t, (cell, move) in enumerate(zip(path, moves, strict=True)):
            q = t if as_published else cell
            drive = delta[q, :, None] * u[cell, :, None] * (B[q] + move @ mixer.direction_B)
            state = torch.exp(-delta[q, :, None] * ssm.A_log[0].exp()) * state + drive
            if cell < len(y):
                y[cell] += state @ C[q] + ssm.D[0] * u[cell]
    expected = mixer.out_proj(y * torch.nn.functional.silu(z))
    assert error(mixer(x, (h, w)), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(("name", "count"), [("l1", 7551656), ("l2", 26145832), ("l3", 50956456)])
def test_the_zoo_has_the_published_size(name, count):
    (variant,) = (v for v in VARIANTS if v.name == f"plainmamba_{name}")
    with torch.device("meta"):
        assert sum(p.numel() for p in variant.build().parameters()) == count


def test_the_position_table_is_resized_on_loading():
    """From square images of another size, if asked; as the model itself does for such images."""
    source, target = TINY.build(), TINY.build(img_size=(48, 24))
    load_state(target, to_published(source.state_dict(), KEYS), KEYS, adapt=["img_size"])
    x = torch.randn(1, 3, 48, 24)
    assert error(target.eval()(x), source.eval()(x)) < TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match=r"must be that of square images, got 18 patches"):
        source.adapt_state(target.state_dict())


def test_the_table_of_odd_sides_is_published_for_a_pixel_less():
    """Where that is a cell less, the table is resized for its own images."""
    model = TINY.build(img_size=(33, 41)).eval()
    assert (model.grid, model.pos_embed.shape) == ((4, 5), (1, 20, 16))
    x = torch.randn(1, 3, 33, 41)
    tokens, grid = model.embed(x)
    assert tuple(grid) == (5, 6)
    table = model.pos_embed.mT.unflatten(2, (4, 5))
    place = torch.nn.functional.interpolate(table, (5, 6), mode="bicubic").flatten(2).mT
    assert error(tokens, model.patch_embed(x).flatten(2).mT + place) < TOLERANCE[torch.float32]


def test_raw_weights_beside_an_average_are_left_out():
    """Files of models trained with an average hold ema_* entries too."""
    model = TINY.build()
    state = to_published(model.state_dict(), KEYS)
    assert "backbone.layers.0.mamba.A_log" in state
    assert "head.fc.weight" in state
    load_state(TINY.build(), {**state, "ema_backbone_ln1_weight": torch.zeros(16)}, KEYS)


def test_features_of_several_depths():
    """One stride, a norm of its own each but the last; a negative index counts from the end."""
    built = PlainMambaBackbone(TINY.build(), (0, -1)).eval()
    x = torch.randn(1, 3, 40, 24)
    first, last = built(x)
    trunk = built.trunk
    assert error(last, trunk.forward_features(x).mT.unflatten(2, (5, 3))) == 0
    tokens = trunk.forward_intermediates(x, [0], output_fmt="NLC", intermediates_only=True)[0]
    assert error(first, built.out_norms["0"](tokens).mT.unflatten(2, (5, 3))) == 0
    assert [info["num_chs"] for info in built.feature_info] == [16, 16]
    with pytest.raises(ValueError, match=r"out_indices must name 3 blocks, got \(3,\)"):
        PlainMambaBackbone(TINY.build(), (3,))


def test_the_backbone_has_what_training_asks_of_it():
    model, x = PlainMambaBackbone(TINY.build(), (0, -1)), torch.randn(1, 3, 40, 24)
    expected = model(x)
    model.set_grad_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True))
    assert {"trunk.pos_embed", "trunk.blocks.2.mixer.ssm.A_log"} <= model.no_weight_decay()
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_the_published_backbone_has_the_published_names():
    with torch.device("meta"):
        built = published("x:PlainMambaSeg", {"arch": "L1", "out_indices": (5, 11, 17, 23)})
    names = published_shapes(shapes_of(built.model), built.keys)
    assert {n for n in names if "norm_layer" in n and n.endswith("weight")} == {
        f"backbone.norm_layer{i}.weight" for i in (5, 11, 17)
    }
    assert "backbone.ln1.weight" in names
    assert "backbone.pos_embed" in names


NARROW = {
    "img_size": 32, "patch_size": 8, "embed_dims": 16, "num_layers": 3, "num_convs_patch_embed": 1,
    "layers_with_dwconv": [0], "layer_cfgs": {"use_rms_norm": False, "mamba_cfg": {"bias": True, "conv_size": 7}},
}  # fmt: skip


def test_the_published_parts_of_a_model_without_an_architecture():
    built = published("mmcls ImageClassifier(…)", {"backbone": NARROW, "num_classes": 1000})
    model, x = TINY.build().eval(), torch.randn(1, 3, 40, 24)
    load_state(built.model, to_published(model.state_dict(), KEYS), built.keys)
    assert error(built.run(built.model.eval(), {"x": x})["logits"], model(x)) == 0


def test_the_last_norm_may_be_missing():
    built = published("x:PlainMambaSeg", {**NARROW, "final_norm": False, "out_indices": 2})
    assert not any("ln1" in name for name in published_shapes(shapes_of(built.model), built.keys))
    model, x = built.model.eval(), torch.randn(1, 3, 40, 24)
    tokens = model.trunk.forward_intermediates(x, [2], output_fmt="NLC", intermediates_only=True)[0]
    assert error(built.run(model, {"x": x})["feat0"], tokens.mT.unflatten(2, (5, 3))) == 0


def test_an_architecture_has_its_parts_whatever_arguments_say():
    with torch.device("meta"):
        built = published("x:PlainMambaSeg", {**NARROW, "arch": "L2", "drop_rate": 0.1})
    assert len(built.model.trunk.blocks) == 24
    assert built.model.trunk.pos_embed.shape == (1, 4, 384)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"arch": "L9"}, "arch='L9'"), ({"arch": "L1", "rms": 1}, "arguments rms"),
        ({**NARROW, "layer_cfgs": {"norm": 1}}, "arguments norm"),
        ({**NARROW, "layer_cfgs": {"mamba_cfg": {"d_conv": 4}}}, "arguments d_conv"),
        ({**NARROW, "with_pos_embed": False}, "with_pos_embed=False"),
    ],
)  # fmt: skip
def test_what_is_not_covered_says_so(kwargs, says):
    with pytest.raises(NotCovered, match=says):
        published("mmcls ImageClassifier(…)", {"backbone": kwargs})


def test_bad_arguments():
    with pytest.raises(ValueError, match="global_pool must be one of"):
        PlainMamba(global_pool="token", depth=1)
    with pytest.raises(ValueError, match=r"img_size must be 2 or more each way, got \(1, 32\)"):
        PlainMamba(img_size=(1, 32), depth=1)
    with pytest.raises(ValueError, match="no option named 'size'"):
        TINY.build(scan="window", scan_options={"size": 3})
