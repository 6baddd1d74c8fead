"""Mamba2D: what timm demands, and agreement with the published code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backbones import Backbone
from timm.optim import param_groups_weight_decay
from tolerance import TOLERANCE, error

from vssm.cli import verify
from vssm.models.mamba2d import V1, VARIANTS, Mamba2D, ScanMixer2d, published, rotary_table
from vssm.models.variant import NotCovered

GOLDEN = Path(__file__).parent.parent / "golden" / "mamba2d"
ENTRY = "models.mamba2d_classifier.Mamba2DClassifier"
BACKBONE = {
    "n_blocks": [1, 1, 1, 1], "embed_dim": [8, 8, 32, 32],
    "token_mixer": ["2D", "2D_local", "Attention", "RopeAttention"],
}  # fmt: skip
HEAD = {"dim": 32, "n_classes": 5}


class TestMamba2D(Backbone):
    name = "test_mamba2d"
    op = "scan2d"
    head_ratio = 4                                              # its head has a hidden layer, which stays
    test_every_order_trains = None

    def cells(self, reduction):
        """The stem drops what is left of a patch of seven; later stages round up."""
        return [-(-((size - 3) // 4 + 1) // (reduction // 4)) for size in self.size]

    def test_weight_decay_is_that_of_the_published_recipe(self):
        """Matrices and kernels, but those of the recurrence."""
        model = self.build()
        none, _ = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        names = {id(p): n for n, p in model.named_parameters()}
        matrices = {names[id(p)].rpartition(".")[2] for p in none["params"] if p.ndim > 1}
        assert matrices == {"A_log", "dt_bias"}                 # published as several vectors, the bias
        assert sum(p.ndim == 1 for p in none["params"]) == sum(p.ndim == 1 for p in model.parameters())


@pytest.mark.parametrize("name", ["mamba2d_t_v1", "mamba2d_n"])
def test_agrees_with_the_published_code_in_float64(name, capsys):
    assert verify.main([str(GOLDEN / f"{name}.json")]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


@pytest.mark.parametrize("shared_input", [False, True])
def test_from_the_other_corner_the_scan_sees_the_map_turned_and_the_local_branch_does_not(shared_input):
    mixer = ScanMixer2d(8, 2, 4, local=True, shared_input=shared_input, reverse=True).double()
    x = torch.randn(2, 15, 8, dtype=torch.double)
    y, local = mixer(x, (3, 5)), mixer.local
    mixer.local, mixer.ssm.reverse = None, False                # flipping the tokens turns the map by 180 degrees
    assert error(y, mixer(x.flip(1), (3, 5)).flip(1) + local(x, (3, 5))) < TOLERANCE[torch.float64]


def test_only_every_second_block_of_a_stage_starts_in_the_other_corner():
    with torch.device("meta"):
        model = Mamba2D(depths=(3, 2, 1, 1))
        first = Mamba2D(depths=(3, 2, 1, 1), **V1)
    corners = [[block.mixer.ssm.reverse for block in stage.blocks] for stage in model.stages[:2]]
    assert corners == [[False, True, False], [False, True]]
    assert not any(block.mixer.ssm.reverse for stage in first.stages[:2] for block in stage.blocks)


def test_half_of_the_channels_turns_with_the_row_and_half_with_the_column():
    sin, cos = (table.unflatten(0, (3, 5)) for table in rotary_table((3, 5), torch.device("cpu")))
    assert sin.shape == cos.shape == (3, 5, 32)
    assert torch.equal(sin[2, 4, :3], torch.tensor([2.0, 2.0, 2.0 * 10**-0.5]).sin())
    assert torch.equal(cos[2, 4, 16:19], torch.tensor([4.0, 4.0, 4.0 * 10**-0.5]).cos())


def test_both_directions_start_with_the_same_steps():
    ssm = ScanMixer2d(8, 1, 4, local=False).ssm
    assert torch.equal(ssm.dt_bias[0], ssm.dt_bias[1])
    assert torch.allclose(ssm.A_log.exp(), torch.arange(1.0, 5.0).expand(2, 8, 4))


@pytest.mark.parametrize(
    ("name", "count"), [("n", 7178496), ("t", 26523136), ("s", 50273636), ("t_v1", 26687880)]
)
def test_the_zoo_has_the_published_size(name, count):
    (variant,) = (v for v in VARIANTS if v.name == f"mamba2d_{name}")
    with torch.device("meta"):
        assert sum(p.numel() for p in variant.build().parameters()) == count


def test_takes_images_from_eleven_pixels_a_side():
    model = Mamba2D(depths=(1, 1, 1, 1), dims=(8, 8, 32, 32), num_classes=5).eval()
    assert model(torch.randn(1, 3, 11, 40)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"at least two rows and two columns .* got \(1, 5\); .* at least 11 pixels"):
        model(torch.randn(1, 3, 10, 40))


def test_mixers_without_and_with_a_local_branch_and_positions():
    built = published(ENTRY, {"backbone": BACKBONE, "head": HEAD})
    mixers = [stage.blocks[0].mixer for stage in built.model.stages]
    assert mixers[0].local is None
    assert mixers[1].local is not None
    assert [mixer.rotary for mixer in mixers[2:]] == [False, True]
    scales = [stage.blocks[0].scale1 is not None for stage in built.model.stages]
    assert scales == [False, False, True, True]                 # the published class's defaults


@pytest.mark.parametrize(
    ("backbone", "head", "reason"),
    [
        ({"channel_last": False}, {}, "channel_last=False"),
        ({"token_mixer": ["2D_dbl_scan"] * 4}, {}, "token_mixer"),
        ({"window": 7}, {}, "arguments window"),
        ({}, {"mlp_ratio": 2}, "head="),
    ],
)
def test_what_is_not_covered_says_so(backbone, head, reason):
    with pytest.raises(NotCovered, match=reason):
        published(ENTRY, {"backbone": BACKBONE | backbone, "head": HEAD | head})


def test_published_defaults_that_no_model_uses_are_not_covered():
    with pytest.raises(NotCovered, match="the published defaults of embed_dim, token_mixer"):
        published(ENTRY, {"backbone": {"n_blocks": [1, 1, 1, 1]}, "head": HEAD})


def test_another_entry_is_not_covered():
    with pytest.raises(NotCovered, match="no model of this family"):
        published("models.mamba2d.Mamba2DBackbone", {})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dims": (8, 8)}, r"dims must name one a stage \(4 in depths\), got \(8, 8\)"),
        ({"mixers": ("scan", "scan", "scan", "window")}, "mixers must be of scan, .*, got 'window'"),
        ({"global_pool": ""}, "Mamba2D: global_pool='' leaves a map, which no classifier reads"),
    ],
)
def test_refuses_parts_that_do_not_fit(kwargs, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        Mamba2D(**kwargs)
