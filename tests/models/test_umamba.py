"""U-Mamba: what every segmenter has, agreement with the published code, any plan, and checkpoints of nnU-Net."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from segmenters import Segmenter
from tolerance import TOLERANCE, error
from torch import nn
from torch.nn import functional as F

import vssm
from vssm.checkpoints import load_weights
from vssm.cli import verify
from vssm.models.keys import published_shapes, shapes_of, to_published
from vssm.models.umamba import UMamba, fewer_blocks, from_plan, keys, published
from vssm.models.variant import NotCovered, variants

GOLDEN = Path(__file__).parent.parent / "golden" / "umamba"
BOT, ENC = (f"umamba/nnunetv2/nets/UMamba{kind}_2d.py:UMamba{kind}" for kind in ("Bot", "Enc"))
NARROW = dict(
    input_channels=1, n_stages=3, features_per_stage=[4, 6, 8], kernel_sizes=[[3, 3]] * 3,
    strides=[[1, 1], [2, 2], [2, 2]], num_classes=3, deep_supervision=True, n_conv_per_stage=[2, 2, 2],
    n_conv_per_stage_decoder=[2, 2],
)  # fmt: skip


class TestBot(Segmenter):
    name = "test_umamba"
    multiple = 4


class TestEnc(Segmenter):
    """Here Mamba's output replaces each map and is normalised, which magnifies rounding, in the published code too."""

    name = "test_umamba_enc"
    multiple = 4

    def test_bfloat16_stays_near_float32(self):
        model, x = self.build().eval(), self.images()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert (y - model(x)).square().mean().sqrt() / model(x).std() < 0.2

    def test_a_sample_does_not_depend_on_its_batch(self):
        model, x = self.build().double().eval(), self.images(batch=3).double()
        assert error(model(x)[1:2], model(x[1:2])) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_agrees_with_the_published_code(dtype, capsys):
    assert verify.main([str(GOLDEN / "umamba_enc_3d_no_ds.json"), "--dtype", dtype]) == 0, capsys.readouterr().out
    assert "1 passed, 0 failed\n" in capsys.readouterr().out


@pytest.mark.slow
def test_agrees_with_the_published_bottleneck(capsys):
    assert verify.main([str(GOLDEN / "umamba_bot_3d.json")]) == 0, capsys.readouterr().out
    assert "5 passed, 0 failed\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["umamba_enc_2d_cell_manifest", "umamba_bot_3d", "umamba_enc_3d_no_ds"])
def test_has_the_published_entries(name):
    """All but second names of the same tensors, which the golden lists as kept; and as many parameters."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    with torch.device("meta"):
        built = published(golden["source"]["entry"], golden["source"]["kwargs"])
    expected = {key: tuple(shape) for key, (shape, _) in golden["state_dict"].items() if key not in golden["kept"]}
    assert published_shapes(shapes_of(built.model), built.keys) == expected
    assert sum(p.numel() for p in built.model.parameters()) == golden["params"]


@pytest.mark.parametrize(
    ("name", "size"),
    [("umamba_bot_3d", 41_945_158), ("umamba_enc_3d", 42_842_798), ("umamba_bot_2d", 47_533_012),
     ("umamba_enc_2d", 47_015_538), ("umamba_enc_2d_endovis", 47_680_592), ("umamba_enc_2d_cell", 64_014_261)],
)  # fmt: skip
def test_rows_have_the_published_size(name, size):
    """Parameters of the sheet's table."""
    with torch.device("meta"):
        assert sum(p.numel() for p in variants()[name].build().parameters()) == size


def plain_mamba(p, x):
    """The sheet's mixer over the sequences x (B, L, C)."""
    x, z = (x @ p["in_proj.weight"].T).chunk(2, -1)
    u = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), p["conv1d.weight"], p["conv1d.bias"], groups=x.shape[-1])).mT
    rank = p["dt_proj.weight"].shape[1]
    dt, B, C = (u @ p["x_proj.weight"].T).split([rank, 16, 16], -1)
    dt = F.softplus(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    h, y = torch.zeros(len(x), x.shape[-1], 16, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * -p["A_log"].exp()) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1) + p["D"] * u[:, t])
    return (torch.stack(y, 1) * F.silu(z)) @ p["out_proj.weight"].T


@pytest.mark.parametrize(("stage", "channel_tokens"), [(0, False), (2, True)])
def test_the_layer_is_that_of_the_sheet(stage, channel_tokens):
    """Cells are tokens, or channels where cells are fewer; its output replaces the map."""
    built = published(ENC, {**NARROW, "input_size": [8, 16]})
    model = built.model.double()
    for parameter in model.mambas.parameters():
        nn.init.normal_(parameter, std=0.5)
    prefix = f"encoder.mamba_layers.{stage}."
    entries = to_published(model.state_dict(), built.keys)
    p = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
    layer, x = model.mambas[str(stage)], torch.randn(2, model.heads[-1].in_channels, 8, 16, dtype=torch.double)
    if stage == 2:
        x = torch.randn(2, 8, 2, 4, dtype=torch.double)
    assert layer.channel_tokens == channel_tokens
    tokens = x.flatten(2) if channel_tokens else x.flatten(2).mT
    normed = F.layer_norm(tokens, tokens.shape[-1:], p["norm.weight"], p["norm.bias"])
    y = plain_mamba({key.removeprefix("mamba."): value for key, value in p.items()}, normed)
    y = y if channel_tokens else y.mT
    assert error(layer(x), y.reshape(x.shape)) < TOLERANCE[torch.float64]


def test_mamba_layers_stand_where_they_were_published():
    sizes = dict(strides=(1,) + (2,) * 6, features=(2,) * 7, depths=(1,) * 7, decoder_depths=(1,) * 6)
    with torch.device("meta"):
        assert list(UMamba(2, mamba="encoder", **sizes).mambas) == ["0", "2", "4", "6"]
        assert list(UMamba(2, **sizes).mambas) == ["6"]
        assert list(UMamba(3, mamba="encoder").mambas) == ["0", "1", "2", "3"]
        cell = variants()["umamba_enc_2d_cell"].build().mambas
    assert {i: layer.channel_tokens for i, layer in cell.items()} == {"1": False, "3": False, "5": True, "7": True}


def test_volumes_read_every_skip_and_images_all_but_the_finest():
    for dims, widths in ((2, [12, 4]), (3, [12, 8])):
        model = UMamba(dims, features=(4, 6, 8), strides=(1, 2, 2), depths=(1, 1, 1), decoder_depths=(1, 1))
        assert [stage[0].conv1.in_channels for stage in model.up_stages] == widths


def test_deep_supervision_returns_every_map_in_training():
    model, x = vssm.create_model("test_umamba"), torch.randn(2, 3, 16, 8)
    assert [tuple(y.shape) for y in model.train()(x)] == [(2, 2, 16, 8), (2, 2, 8, 4)]
    full = model.eval()(x)
    assert torch.equal(full, model.all_logits(model.decode(model.encode(x)))[0])
    model.deep_supervision = False
    assert torch.equal(model.train()(x), full)


def test_half_precision_does_not_reach_the_mamba_layers():
    model, seen = vssm.create_model("test_umamba_enc").eval(), []
    for layer in model.mambas.values():
        layer.mixer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(1, 3, 8, 8))
    assert set(seen) == {(torch.float32, torch.float32)}
    assert y.dtype == torch.bfloat16


def test_an_encoder_of_channel_tokens_reads_one_size():
    model = UMamba(3, mamba="encoder", img_size=16, features=(4, 8, 16, 32))
    assert model.mambas["3"].channel_tokens
    assert model(torch.randn(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)
    message = r"the weights of stage 3 are those of 8 cells, images of \(16, 16, 16\); got 12 cells, images of "
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 1, 16, 16, 24))
    assert UMamba(3, mamba="encoder")(torch.randn(1, 1, 8, 16, 24)).shape == (1, 2, 8, 16, 24)


def test_sides_follow_the_strides_of_each_axis():
    model = UMamba(3, strides=[(1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2)], kernel_size=[(1, 3, 3), 3, 3, 3])
    assert model(torch.randn(1, 1, 2, 16, 8)).shape == (1, 2, 2, 16, 8)
    with pytest.raises(ValueError, match=r"multiple of \(2, 8, 8\), got \(3, 16, 8\); pad it to \(4, 16, 8\)"):
        model(torch.randn(1, 1, 3, 16, 8))
    with pytest.raises(ValueError, match=r"two cells or more, got one of images \(2, 8, 8\); pad them to \(4, 8, 8\)"):
        model(torch.randn(1, 1, 2, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1)}, r"UMamba: depths must have 4 entries for 4 features, got \(1, 1\)"),
        ({"strides": (2, 2, 2, 2)}, r"UMamba: strides\[0\] must be 1, as the first stage keeps"),
        ({"strides": (1, 2, (2, 2), 2)}, "UMamba: strides must be whole numbers from 1, 3 of them or one"),
        ({"kernel_size": 2}, "UMamba: kernel_size must be odd"),
        ({"mamba": "decoder"}, "UMamba: mamba must be one of 'bottleneck', 'encoder', got 'decoder'"),
        ({"mamba": "encoder", "img_size": (16, 16, 20)}, "UMamba: img_size must have 3 sides, multiples of"),
    ],
)
def test_refuses_plans_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        UMamba(3, **options)


def test_reads_plans_of_both_layouts():
    old = {
        "patch_size": [20, 48, 64], "UNet_base_num_features": 32, "unet_max_num_features": 96,
        "conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_conv_per_stage_encoder": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2], "batch_size": 2,
    }  # fmt: skip
    new = {
        "patch_size": [20, 48, 64], "architecture": {"arch_kwargs": {
            "features_per_stage": [32, 64, 96], "strides": old["pool_op_kernel_sizes"], "n_stages": 3,
            "kernel_sizes": old["conv_kernel_sizes"], "n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2,
        }},
    }  # fmt: skip
    options = from_plan(old, mamba="encoder")
    assert options == from_plan(new, mamba="encoder")
    assert options["features"] == [32, 64, 96]
    assert (options["depths"], options["decoder_depths"]) == ([2, 2, 1], [2, 2])
    assert from_plan(old)["img_size"] is None
    with torch.device("meta"):
        assert UMamba(**options).multiple == (2, 4, 4)
    del old["conv_kernel_sizes"]
    with pytest.raises(ValueError, match="from_plan: the configuration must have conv_kernel_sizes"):
        from_plan(old)


@pytest.mark.parametrize(
    ("stages", "encoder", "decoder"),
    [(6, [2, 2, 2, 1, 1, 1], [2, 2, 2, 1, 1]), (7, [2, 2, 2, 2, 1, 1, 1], [2, 2, 2, 2, 1, 1]),
     (8, [2, 2, 2, 2, 1, 1, 1, 1], [2, 2, 2, 2, 1, 1, 1])],
)  # fmt: skip
def test_fewer_blocks_are_those_of_the_sheet(stages, encoder, decoder):
    assert fewer_blocks([2] * stages, [2] * (stages - 1)) == (encoder, decoder)


def test_loads_a_checkpoint_of_nnunet(tmp_path):
    """With the names that the published networks give to a tensor a second time, and those of DDP."""
    source, target = vssm.create_model("test_umamba"), vssm.create_model("test_umamba")
    entries = to_published(source.state_dict(), keys("bottleneck", 3))
    again = {f"decoder.{key}": value for key, value in entries.items() if key.startswith("encoder.")}
    again |= {key.replace(".conv1.norm.", ".conv1.all_modules.1."): value for key, value in entries.items()}
    weights = {f"module.{key}": value for key, value in {**entries, **again}.items()}
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": weights, "trainer_name": "nnUNetTrainerUMambaBot"}, path)
    load_weights(target, path)
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())


def test_starts_with_the_published_distributions():
    model = UMamba(features=(16, 32, 64, 128))
    conv = model.stages[3][0].conv2
    assert conv.weight.std().item() == pytest.approx((2 / (1 + 1e-4) / (128 * 27)) ** 0.5, rel=0.02)
    assert (conv.bias == 0).all()
    assert torch.equal(model.mambas["3"].mixer.ssm.A_log[0, 0], torch.arange(1.0, 17).log())


@pytest.mark.parametrize(
    ("entry", "kwargs", "reason"),
    [
        ("nets/UMambaBot.py:UMambaBot", {}, "is no model of this family"),
        (BOT, {"conv_bias": False}, "conv_bias=False"),
        (BOT, {"window": 7}, "arguments window"),
        (ENC, {}, "no input_size among the arguments"),
    ],
)
def test_says_what_it_does_not_cover(entry, kwargs, reason):
    with pytest.raises(NotCovered, match=reason):
        published(entry, {**NARROW, **kwargs})


def test_arguments_that_the_published_code_does_not_look_at_change_nothing():
    ignored = {"stem_channels": 64, "dropout_op": "torch.nn.Dropout3d", "dropout_op_kwargs": {"p": 0.5}}
    plain, told = (published(BOT, {**NARROW, **kwargs}).model for kwargs in ({}, ignored))
    assert str(plain) == str(told)
