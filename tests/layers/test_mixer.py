"""ScanMixer: any order, in 2D and 3D, with the parts that families choose."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import TOLERANCE, error
from torch import nn
from torch.nn.functional import silu

from vssm.layers.layout import over_map
from vssm.layers.mixer import ScanMixer, with_ends
from vssm.layers.norm import OUT_NORMS
from vssm.scans import list_scans, scan_shape, scan_table, to_grid, to_sequences

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
    assert len(mixer.ssm.A_log) == scan_shape(scan, (8,) * dims)[0]
    assert [name for name, p in mixer.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


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
        ({"scan": "cross", "gate": "tanh"}, "ScanMixer: gate must be one of 'none', 'act', 'raw', got 'tanh'"),
        ({"scan": "cross", "conv": "line"}, "ScanMixer: conv must be one of"),
        ({"scan": "cross", "out_norm": "batch"}, "ScanMixer: out_norm must be one of"),
        ({"scan": "cross", "class_token": "last"}, "ScanMixer: class_token must be one of"),
        ({"scan": "cross", "conv": "sequence", "act": "gelu"}, "has SiLU built in, got act='gelu'"),
        ({"scan": "cross", "conv_size": 4}, "depthwise: size must be odd"),
        ({"scan": "cross", "merge": "max"}, "ScanMixer: merge must be one of"),
        ({"scan": "cross", "class_token": "middle"}, "ScanMixer: class tokens lie on no grid"),
    ],
)
def test_refuses_parts_that_are_not_there(options, message):
    with pytest.raises(ValueError, match=message):
        ScanMixer(8, **options)
