"""ScanMixer: any order, in 2D and 3D, with the parts that families choose."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tolerance import TOLERANCE, error
from torch import nn
from torch.nn.functional import silu

from vssm.cli import _golden as golden
from vssm.kernels import causal_conv1d, use_backend
from vssm.layers.heads import join_heads, route_attention, split_heads
from vssm.layers.layout import over_map
from vssm.layers.mixer import ScanMixer, with_ends
from vssm.layers.norm import OUT_NORMS
from vssm.scans import list_scans, scan_rows, scan_table, to_grid, to_sequences

GRIDS = {2: (3, 5), 3: (2, 3, 4)}


def tokens(grid, dim=8, extra=0, dtype=torch.float32):
    return torch.randn(2, math.prod(grid) + extra, dim, dtype=dtype)


@pytest.mark.parametrize(("dims", "scan"), [(dims, scan) for dims in GRIDS for scan in list_scans(dims)])
@pytest.mark.parametrize("conv", ["grid", "sequence"])
def test_every_order_trains_every_parameter(dims, scan, conv):
    grid = GRIDS[dims]
    mixer = ScanMixer(8, scan=scan, spatial_dims=dims, conv=conv, d_state=2)
    x = tokens(grid)
    y = mixer(x, grid)
    y.square().sum().backward()
    assert y.shape == x.shape
    assert len(mixer.ssm.A_log) == (scan_rows(scan, dims) or 1)
    assert [name for name, p in mixer.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scan", ["bidirectional", "cross", "raster"])
def test_directions_that_share_their_parameters_train(scan, batch):
    """With the gradients of the recorded reference."""
    torch.manual_seed(0)
    mixer, grid = ScanMixer(8, scan=scan, conv="sequence", conv_size=4, d_state=2, shared=True).double(), (3, 5)
    x = torch.randn(batch, 15, 8, dtype=torch.double, requires_grad=True)
    weight, found = torch.randn_like(x), []
    for backend in (None, "reference"):
        with use_backend(backend):
            y = mixer(x, grid)
            found.append([y, *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])])
    for ours, expected in zip(*found, strict=True):
        assert error(ours, expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("scan", ["bidirectional", "window", "hilbert", "cross"])
def test_convolves_along_the_sequence_not_the_grid(scan):
    """The same as gathering every row, convolving and scanning it as a sequence, and scattering it back."""
    grid = (3, 5)
    mixer = ScanMixer(8, scan=scan, conv="sequence", conv_size=4, d_state=2, merge="mean").double()
    x = tokens(grid, dtype=torch.double)
    u, z = mixer.in_proj(x).chunk(2, -1)
    table = scan_table(scan, grid)
    rows = to_sequences(u, table)                                                       # (b, k, t, d)
    total = 0
    for k in range(len(table)):
        padded = nn.functional.pad(rows[:, k].mT, (3, 0))
        weight, bias = mixer.sequence_conv.weight[k], mixer.sequence_conv.bias[k]
        row = silu(nn.functional.conv1d(padded, weight[:, None], bias, groups=16)).mT
        row = row * (table[k] < 15)[:, None]                                            # the scan reads zero at padding
        y = mixer.ssm(row.unsqueeze(1), torch.arange(row.shape[1])[None], rows=slice(k, k + 1))
        total = total + to_grid(y[:, None], table[k : k + 1], 15)[:, 0]
    expected = mixer.out_proj(total * silu(z)) / len(table)
    if scan != "window":                        # padding: B, C and dt of a padded step are 0, not those of a zero input
        assert error(mixer(x, grid), expected) < TOLERANCE[torch.float64]
    assert mixer(x, grid).isfinite().all()


@pytest.mark.parametrize("conv", ["grid", "sequence", None])
def test_slices_are_sequences_of_their_own(conv):
    """Rows of the map read as a batch of sequences by one set of parameters, whatever the number of rows."""
    mixer = ScanMixer(8, scan="slices", conv=conv, d_state=2).double()
    alone = ScanMixer(8, scan="raster", conv=conv, d_state=2).double()
    alone.load_state_dict(mixer.state_dict())
    x = tokens((3, 5), dtype=torch.double)
    y = mixer(x, (3, 5))
    if conv == "grid":                                              # the convolution sees the whole map
        changed = x.clone()
        changed[:, :5] += 1
        assert error(mixer(changed, (3, 5))[:, 10:], y[:, 10:]) < TOLERANCE[torch.float64]
    else:
        expected = alone(x.unflatten(1, (3, 5)).flatten(0, 1), (1, 5)).unflatten(0, (2, 3)).flatten(1, 2)
        assert error(y, expected) < TOLERANCE[torch.float64]
    assert mixer(tokens((7, 2), dtype=torch.double), (7, 2)).shape == (2, 14, 8)


@pytest.mark.parametrize("conv", ["grid", "sequence"])
@pytest.mark.parametrize("merge", ["sum", "mean", "attention"])
def test_each_head_is_a_mixer_of_its_own_rows_and_channels(conv, merge):
    """Four heads of MHS-VM's routes are four scans of a quarter of the channels, side by side."""
    mixer = ScanMixer(8, scan="routes", heads=4, merge=merge, conv=conv, d_state=2, threshold=0.8).double()
    x = tokens((3, 5), dtype=torch.double)
    u, z = mixer.in_proj(x).chunk(2, -1)
    table, parts = scan_table("routes", (3, 5)), []
    if conv == "grid":
        u = mixer.act(over_map(mixer.conv, u, (3, 5)))
    for head in range(4):
        rows, own = slice(4 * head, 4 * head + 4), u[..., 4 * head : 4 * head + 4]
        own = own[:, None].expand(-1, 4, -1, -1)
        if conv == "sequence":
            weight, bias = mixer.sequence_conv.weight[rows], mixer.sequence_conv.bias[rows]
            own = causal_conv1d(own, weight, bias, activation="silu", table=table[rows])[0]
        y = mixer.ssm(own, table[rows], rows=rows, merge=None)      # (b, 4, l, 4)
        parts.append(
            {"sum": lambda y: y.sum(1), "mean": lambda y: y.mean(1),
             "attention": lambda y: y.sum(1) * (y.std(1) / ((y - y.amin(1)[:, None]).mean(1) + 1e-5) - 0.8).relu()}
            [merge](y)
        )  # fmt: skip
    expected = mixer.out_proj(torch.cat(parts, -1) * silu(z))
    assert error(mixer(x, (3, 5)), expected) < TOLERANCE[torch.float64]


def test_a_head_may_have_one_row():
    """Then each group of channels reads one direction of the order, and nothing is copied."""
    mixer = ScanMixer(8, scan="cross", heads=4, d_state=2)
    x = tokens((3, 5))
    mixer(x, (3, 5)).sum().backward()
    assert mixer.ssm.A_log.shape == (4, 4, 2)
    assert mixer.ssm.A_log.grad.abs().amin() > 0
    u = torch.randn(2, 15, 16)
    assert split_heads(u, 4, 4).data_ptr() == u.data_ptr()
    assert torch.equal(join_heads(split_heads(u, 4, 8), 4, "mean"), u)


def test_route_attention():
    """By hand: routes 1 and 3 sum to 4, their deviation is sqrt(2), the mean over the smallest is 1."""
    y = torch.tensor([1.0, 3.0]).double().view(1, 1, 2, 1, 1)
    assert route_attention(y, 0.4).item() == pytest.approx(4 * (2**0.5 / (1 + 1e-5) - 0.4))
    assert route_attention(y, 2.0).item() == 0
    assert route_attention(5 * y, 0.4).item() == pytest.approx(5 * route_attention(y, 0.4).item(), rel=1e-4)


@pytest.mark.parametrize("out_norm", [None, *OUT_NORMS])
@pytest.mark.parametrize("gate", ["none", "act", "raw"])
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_gates_after_the_norm_of_the_merged_scan(out_norm, gate, act):
    """Fused into the kernel or not, the gate is the last step before the projection."""
    grid = (3, 5)
    mixer = ScanMixer(8, scan="cross", d_state=2, gate=gate, out_norm=out_norm, act=act, out_act="gelu").double()
    plain = ScanMixer(8, scan="cross", d_state=2, gate=gate, out_norm=out_norm, act=act).double()
    for m, after in ((mixer, nn.functional.gelu), (plain, lambda y: y)):
        x = tokens(grid, dtype=torch.double)
        u, *z = m.in_proj(x).chunk(1 if gate == "none" else 2, -1)
        y = m.ssm(m.act(over_map(m.conv, u, grid)), scan_table("cross", grid))
        y = after(y if out_norm is None else over_map(m.out_norm, y, grid))
        for factor in z:
            y = y * (m.act(factor) if gate == "act" else factor)
        assert error(m(x, grid), m.out_proj(y)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("scan", ["bidirectional", "cross", "window"])
def test_a_class_token_in_the_middle_is_read_in_the_middle(scan):
    """Its row of the table is that of the kernel's own, and it changes what the patches see."""
    mixer = ScanMixer(8, scan=scan, conv="sequence", d_state=2, class_token="middle")
    x = tokens((3, 5), extra=1)
    x.requires_grad_()
    y = mixer(x, (3, 5))
    y[:, 7].sum().backward()                                                            # the token is cell 15 // 2
    assert y.shape == x.shape
    assert (x.grad.abs().sum((0, 2)) > 0).all()


def test_added_cells_start_and_end_rows_and_reverses_mirror_them():
    table = torch.tensor([[0, 2, 1, 3], [3, 1, 2, 0]])                                  # three cells, and padding
    assert with_ends(table, 3, before=1, after=0).tolist() == [[0, 1, 3, 2, 4], [4, 2, 3, 1, 0]]
    assert with_ends(table, 3, before=1, after=1).tolist() == [[0, 1, 3, 2, 5, 4], [4, 5, 2, 3, 1, 0]]
    assert with_ends(torch.tensor([[0, 1]]), 2, before=1, after=1).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("class_token", ["first", "ends"])
def test_class_tokens_at_the_ends_are_part_of_the_sequence(class_token):
    """With rows and their reverse, the grid is no more than its sequence."""
    mixer = ScanMixer(8, scan="bidirectional", conv="sequence", d_state=2, class_token=class_token)
    x = tokens((3, 5), extra=1 if class_token == "first" else 2)
    plain = ScanMixer(8, scan="bidirectional", conv="sequence", d_state=2)
    plain.load_state_dict(mixer.state_dict())
    assert error(mixer(x, (3, 5)), plain(x, (1, x.shape[1]))) == 0


def test_scan_options_reach_the_order():
    x = tokens((4, 6))
    small, large = (ScanMixer(8, scan="window", scan_options={"window": w}, d_state=2) for w in (2, 3))
    large.load_state_dict(small.state_dict())
    assert error(small(x, (4, 6)), large(x, (4, 6))) > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scan": "spirall"}, "no order named 'spirall'"),
        ({"scan": "cross", "heads": 3}, "heads must divide the rows of the order and the channels of the scan"),
        ({"scan": "cross", "heads": 2, "shared": True}, "heads read channels of their own, so they share no SSM"),
        ({"scan": "cross", "heads": 4, "merge": "attention"}, "route attention compares the rows of a head"),
        ({"scan": "cross", "gate": "tanh"}, "ScanMixer: gate must be one of 'none', 'act', 'raw', got 'tanh'"),
        ({"scan": "cross", "conv": "line"}, "ScanMixer: conv must be one of"),
        ({"scan": "cross", "out_norm": "batch"}, "ScanMixer: out_norm must be one of"),
        ({"scan": "cross", "class_token": "last"}, "ScanMixer: class_token must be one of"),
        ({"scan": "cross", "conv": "sequence", "act": "gelu"}, "has SiLU built in, got act='gelu'"),
        ({"scan": "cross", "act": "silly"}, "act must name an activation of timm, such as 'silu', got 'silly'"),
        ({"scan": "cross", "out_act": "silly"}, "out_act must name an activation of timm"),
        ({"scan": "cross", "conv_size": 4}, "depthwise: size must be odd"),
        ({"scan": "cross", "merge": "max"}, "ScanMixer: merge must be one of"),
        ({"scan": "cross", "class_token": "middle"}, "ScanMixer: class tokens lie on no grid"),
    ],
)
def test_refuses_parts_that_are_not_there(options, message):
    with pytest.raises(ValueError, match=message):
        ScanMixer(8, **options)


SS2D = sorted((Path(__file__).parent.parent / "golden" / "mambaad").glob("ss2d_*.json"))


@pytest.mark.parametrize("path", SS2D, ids=lambda path: path.stem)
def test_with_a_hybrid_scan_it_is_the_mixer_of_mambaad(path):
    """Recorded outputs of the published module, for each of its paths and numbers of directions."""
    content = json.loads(path.read_text(encoding="utf-8"))
    kwargs = content["source"]["kwargs"]
    dim, k = kwargs["d_model"], kwargs["num_direction"]
    options = {"path": kwargs["scan_type"], "directions": k}
    mixer = ScanMixer(dim, scan="hybrid", scan_options=options, d_state=kwargs["d_state"], out_norm="layer").double()
    published = {
        key: torch.from_numpy(golden.weight(key, shape))
        for key, (shape, _) in content["state_dict"].items()
        if key not in content["kept"]
    }
    ours = {"x_proj_weight": "ssm.x_proj", "dt_projs_weight": "ssm.dt_weight", "dt_projs_bias": "ssm.dt_bias",
            "A_logs": "ssm.A_log", "Ds": "ssm.D"}  # fmt: skip
    shapes = mixer.state_dict()
    state = {ours.get(key, key.replace("conv2d", "conv")): value for key, value in published.items()}
    mixer.load_state_dict({key: value.view(shapes[key].shape) for key, value in state.items()})
    for number, case in enumerate(content["cases"]):
        x = torch.from_numpy(golden.inputs(case["inputs"], number)["x"])
        y = mixer(x.flatten(1, 2), x.shape[1:3]).view(x.shape)
        assert golden.mismatch(y.detach().numpy(), case["outputs"]["y"]) < 1e-6
