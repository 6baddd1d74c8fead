"""Values are read where the table says and come back where they were taken."""

from __future__ import annotations

import math

import pytest
import torch

from vssm.scans import list_scans, scan_table, to_grid, to_sequences

GRIDS = [(1, 1), (3, 7), (1, 6), (8, 8), (2, 3, 5), (4, 4, 4)]


CASES = [(name, grid) for grid in GRIDS for name in list_scans(len(grid))]


@pytest.mark.parametrize("middle_token", [False, True])
@pytest.mark.parametrize(("name", "grid"), CASES, ids=str)
def test_values_come_back_where_they_were_taken(name, grid, middle_token):
    """Reading, then writing, gives each cell times the number of its visits, in every row."""
    table, cells = scan_table(name, grid, middle_token=middle_token), math.prod(grid) + middle_token
    x = torch.randn(2, cells, 3)
    visits = torch.stack([torch.bincount(row, minlength=cells + 1)[:cells] for row in table])
    back = to_grid(to_sequences(x, table), table, cells)
    assert torch.equal(back, x[:, None] * visits[None, :, :, None])


def test_smallest_example():
    x = torch.tensor([[[1.0], [2.0]]])
    table = torch.tensor([[1, 0, 2], [0, 0, 1]])  # 2 is padding; the second row reads cell 0 twice
    y = to_sequences(x, table)
    assert y[0, :, :, 0].tolist() == [[2, 1, 0], [1, 1, 2]]
    y = y + torch.tensor([10.0, 20.0, 30.0])[:, None]
    assert to_grid(y, table, 2)[0, :, :, 0].tolist() == [[21, 12], [32, 32]]


def test_a_table_for_each_sample():
    x = torch.arange(6.0).view(2, 3, 1)
    table = torch.tensor([[[2, 1, 0]], [[1, 2, 3]]])
    y = to_sequences(x, table)
    assert y[:, 0, :, 0].tolist() == [[2, 1, 0], [4, 5, 0]]
    assert to_grid(y, table, 3)[:, 0, :, 0].tolist() == [[0, 1, 2], [0, 4, 5]]


def test_gradients_flow_through_both():
    table = torch.tensor([[1, 0, 3, 1], [2, 2, 0, 1]], dtype=torch.int32)
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: to_sequences(x, table), x)
    assert torch.autograd.gradcheck(lambda y: to_grid(y, table, 3), y)


def test_empty_batch_and_strided_input():
    table = scan_table("cross", (2, 3))
    assert to_grid(to_sequences(torch.randn(0, 6, 4), table), table, 6).shape == (0, 4, 6, 4)
    x = torch.randn(2, 4, 6).transpose(1, 2)
    assert torch.equal(to_sequences(x, table), to_sequences(x.contiguous(), table))


def test_wrong_shapes_are_named():
    table = scan_table("cross", (2, 3))
    with pytest.raises(ValueError, match=r"to_sequences: the tokens must be \(b, l, d\), got \(2, 6\)"):
        to_sequences(torch.randn(2, 6), table)
    with pytest.raises(ValueError, match=r"to_grid: the tokens must be \(b, k, t, d\), got \(2, 6, 1\)"):
        to_grid(torch.randn(2, 6, 1), table, 6)
    with pytest.raises(ValueError, match=r"to_grid: table must be \(k=3, t=6\) as y is, got \(4, 6\)"):
        to_grid(torch.randn(2, 3, 6, 1), table, 6)
    with pytest.raises(ValueError, match=r"to_sequences: table must be \(k, t\) or \(b=2, k, t\), got \(3, 4, 6\)"):
        to_sequences(torch.randn(2, 6, 1), table.expand(3, 4, 6))
