"""MHS-UNet: what every segmenter has, agreement with the published code, and its mixer step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from segmenters import Segmenter
from tolerance import TOLERANCE, error
from torch.nn import functional as F

from vssm.checkpoints import load_weights
from vssm.cli import verify
from vssm.models.keys import published_shapes, shapes_of, to_ours, to_published
from vssm.models.mhsunet import KEYS, MHSUNet, MultiHeadMixer, published
from vssm.models.variant import NotCovered, variants

GOLDEN = Path(__file__).parent.parent / "golden" / "mhsvm"
ENTRY = "models/vmunet/vmunet.py:VMUNet"


class TestMHSUNet(Segmenter):
    name = "test_mhsunet"
    spatial_dims = (2,)
    repeats = True
    open_axes = (0, 2, 3)
    exported: ClassVar = {"depths": (1, 1), "decoder_depths": (1, 1)}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_agrees_with_the_published_code(dtype, capsys):
    assert verify.main([str(GOLDEN / "mhs_unet_3h_isic17.json"), "--dtype", dtype]) == 0, capsys.readouterr().out
    assert ", 0 failed\n" in capsys.readouterr().out            # and nothing skipped


def test_is_written_under_the_published_names():
    golden = json.loads((GOLDEN / "mhs_unet_3h_isic17.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        built = published(golden["source"]["entry"], golden["source"]["kwargs"])
    expected = {key: tuple(shape) for key, (shape, _) in golden["state_dict"].items() if key not in golden["kept"]}
    assert published_shapes(shapes_of(built.model), built.keys) == expected


def test_has_the_published_size():
    for name, size in {"mhsunet": 17_257_129, "mhsunet_isic18": 17_257_129, "mhsunet_3h": 17_386_153}.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in variants()[name].build().parameters()) == size


ROUTES = {  # on 3 x 4 cells, from the sheet
    "C": ([0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11], [0, 4, 8, 9, 5, 1, 2, 6, 10, 11, 7, 3]),
    "X": ([0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11], [3, 2, 7, 11, 6, 1, 0, 5, 10, 9, 4, 8]),
    "S": ([0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6], [8, 9, 10, 11, 7, 3, 2, 1, 0, 4, 5, 6]),
    "Z": (list(range(12)), [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]),
}
ONE_CELL = {head: ([0], [0]) for head in ROUTES}


def plain_mixer(p, x, grid, routes, threshold):
    """VSSGate of the sheet. x: (B, L, C); p: the published entries under ``self_attention``."""
    b, l, dim = x.shape
    heads = [head for head in "CXSZ" if f"mhs.scanhead_{head}.mambaeng.Ds" in p]
    x, z = (x @ p["in_proj.weight"].T).chunk(2, -1)
    x = F.conv2d(x.mT.unflatten(2, grid), p["conv2d.weight"], p["conv2d.bias"], padding=1, groups=dim)
    x = F.silu(x).flatten(2).mT @ p["mhs.x_ssproj.weight"].T
    parts = []
    for head, part in zip(heads, x.split(dim // len(heads), -1), strict=True):
        own = {key.rpartition(".")[2]: value for key, value in p.items() if f"scanhead_{head}.mambaeng." in key}
        d, n, r = part.shape[-1], own["A_logs"].shape[-1], own["dt_projs_weight"].shape[-1]
        y = torch.zeros(4, b, l, d, dtype=x.dtype)
        for k, route in enumerate([order for path in routes[head] for order in (path, path[::-1])]):
            dt, B, C = (part @ own["x_proj_weight"][k].T).split([r, n, n], -1)
            dt = F.softplus(dt @ own["dt_projs_weight"][k].T + own["dt_projs_bias"][k])
            A, D = -own["A_logs"].view(4, d, n)[k].exp(), own["Ds"].view(4, d)[k]
            h = torch.zeros(b, d, n, dtype=x.dtype)
            for cell in route:
                u = part[:, cell]
                h = torch.exp(dt[:, cell, :, None] * A) * h + (dt[:, cell] * u)[..., None] * B[:, cell, None]
                y[k, :, cell] = (h * C[:, cell, None]).sum(-1) + D * u
        mean = sum(y) / 4
        deviation = (sum((route - mean) ** 2 for route in y) / 3).sqrt()
        smallest = y.min(0).values
        ratio = deviation / (sum(route - smallest for route in y) / 4 + 1e-5)
        parts.append(sum(y) * F.relu(ratio - threshold))
    y = torch.cat(parts, -1)
    if "mhs.y_proj.weight" in p:
        y = F.layer_norm(y, y.shape[-1:], p["mhs.cat_norm.weight"], p["mhs.cat_norm.bias"]) @ p["mhs.y_proj.weight"].T
    return F.layer_norm(y, (dim,), p["out_norm.weight"], p["out_norm.bias"]) * F.silu(z)


@pytest.mark.parametrize("grid", [(3, 4), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("dim", "options"),
    [(16, {"heads": "cxsz", "threshold": 0.9}), (16, {"heads": "cxs"}), (8, {"heads": "cxsz", "join": False})],
    ids=["clipped", "uneven", "without_join"],
)
def test_the_mixer_is_that_of_the_sheet(dim, options, grid):
    """Three heads do not divide 16 channels; a threshold of 0.9 clips."""
    model = MHSUNet(dim=(dim, 2 * dim), depths=(1, 1), decoder_depths=(1, 1), **{"threshold": 0.0, **options}).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    prefix = "vmunet.layers.0.blocks.0.self_attention."
    entries = to_published(model.state_dict(), KEYS)
    p = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
    x = torch.randn(2, grid[0] * grid[1], dim, dtype=torch.double)
    routes = ROUTES if grid == (3, 4) else ONE_CELL
    y = model.encoder[0][0].mixer(x, grid)
    assert error(y, plain_mixer(p, x, grid, routes, options.get("threshold", 0.0))) < TOLERANCE[torch.float64]


def test_routes_are_compared_in_float32_under_autocast():
    """They agree in most of their digits, of which bfloat16 keeps two."""
    mixer, seen = MultiHeadMixer(16), []
    mixer.heads["s"].register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(torch.randn(1, 12, 16), (3, 4))
    assert seen == [torch.float32]
    assert y.isfinite().all()


def test_second_names_and_counters_of_published_files_are_left_out():
    model = variants()["test_mhsunet"].build()
    state = to_published(model.state_dict(), KEYS)
    mhs = "vmunet.layers.0.blocks.0.self_attention.mhs."
    assert f"{mhs}scanhead_S.mambaeng.A_logs" in state
    state |= {
        f"{mhs}x_ssproj_W": state[f"{mhs}x_ssproj.weight"], "vmunet.total_ops": torch.zeros(1),
        f"{mhs}scanhead_C.scanning.seq2seq_engine.Ds": state[f"{mhs}scanhead_C.mambaeng.Ds"],
        f"{mhs}total_params": torch.zeros(1), "total_params": torch.zeros(1),
    }  # fmt: skip
    assert set(to_ours(state, KEYS, shapes_of(model))) == set(model.state_dict())
    assert published_shapes(shapes_of(model), KEYS)[f"{mhs}scanhead_C.mambaeng.A_logs"] == (4 * 5, 16)


def test_published_files_load(tmp_path):
    """A bare state dict with second names and counters; other classes and channels if asked."""
    row = variants()["test_mhsunet"]
    source, model = row.build(), row.build()
    state = to_published(source.state_dict(), KEYS)
    mhs = "vmunet.layers_up.1.blocks.0.self_attention.mhs."
    state |= {f"{mhs}x_ssproj_W": state[f"{mhs}x_ssproj.weight"], "total_ops": torch.zeros(1)}
    torch.save(state, tmp_path / "best_3h.pth")
    load_weights(model, tmp_path / "best_3h.pth")
    expected = source.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    other = row.build(in_channels=1, out_channels=4)
    load_weights(other, tmp_path / "best_3h.pth", adapt=["classifier", "in_chans"])
    assert torch.equal(other.decoder[0][0].norm1.bias, expected["decoder.0.0.norm1.bias"])


def test_the_published_options_are_ours():
    built = published(ENTRY, {"num_classes": 1, "depths": [1, 1, 1, 1], "depths_decoder": [1, 1, 1, 1]}).model
    mixer = built.encoder[0][0].mixer
    assert (list(mixer.heads), mixer.threshold) == (["c", "x", "s"], 0.0)
    with pytest.raises(NotCovered, match="head_num=2"):
        published(ENTRY, {"para_dict": {"head_num": 2}})
    with pytest.raises(NotCovered, match="arguments gates in para_dict"):
        published(ENTRY, {"para_dict": {"gates": 2}})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"spatial_dims": 3}, "MHSUNet: spatial_dims must be 2, its routes are those of a plane; got 3"),
        ({"heads": "cxq"}, "heads must be letters of cxsz, got 'cxq'"),
        ({"heads": "cc"}, "MultiHeadMixer: heads must be different letters, at most 96 of them, got 'cc'"),
        ({"heads": "cxs", "dim": 16, "join": False}, "without join, heads must divide dim=16, got 3 heads"),
    ],
)
def test_refuses_heads_that_do_not_fit(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MHSUNet(**kwargs)


def test_a_mixer_needs_a_head():
    with pytest.raises(ValueError, match="heads must be different letters, at most 4 of them, got ''"):
        MultiHeadMixer(4, heads="")
