"""Position tables of another size, class tokens among patches, rotary embedding."""

from __future__ import annotations

import pytest
import torch
from tolerance import TOLERANCE, error

from vssm.layers.position import CLASS_TOKENS, Rotary, insert_class_tokens, resize_tokens, split_class_tokens


@pytest.mark.parametrize("where", [where for where in CLASS_TOKENS if where])
@pytest.mark.parametrize("patches", [1, 2, 5, 6])
def test_class_tokens_go_in_and_come_out(where, patches):
    x, tokens = torch.randn(2, patches, 3), torch.randn(2, CLASS_TOKENS[where], 3)
    both = insert_class_tokens(x, tokens, where)
    out, out_tokens = split_class_tokens(both, where)
    assert torch.equal(out, x)
    assert torch.equal(out_tokens, tokens)


def ramp(h, w):
    """A position table whose values are the coordinates, which bicubic resizing keeps inside."""
    rows, columns = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    return torch.stack([rows / h, columns / w], -1).view(1, h * w, 2)


@pytest.mark.parametrize("where", CLASS_TOKENS)
def test_resizing_moves_no_position_and_keeps_class_rows(where):
    table, tokens = ramp(14, 14), torch.full((1, CLASS_TOKENS[where], 2), 9.0)
    table = table if where is None else insert_class_tokens(table, tokens, where)
    patches, rows = split_class_tokens(resize_tokens(table, (14, 14), (20, 9), where), where)
    inner = (patches - ramp(20, 9)).view(20, 9, 2)[3:-3, 2:-2]
    assert torch.equal(rows, tokens)
    assert inner.abs().max() < 1e-2


def test_the_published_rule_takes_the_first_row_for_the_class_row():
    """It then moves the patches before the middle by one: the true class row stays among the patches."""
    table = insert_class_tokens(ramp(4, 4), torch.full((1, 1, 2), 9.0), "middle")
    same = resize_tokens(table, (4, 4), (4, 4), "middle", class_row="first")
    assert torch.equal(same, table)
    published = resize_tokens(table, (4, 4), (8, 8), "middle", class_row="first")
    assert torch.equal(published[:, 0], table[:, 0])
    assert published.max() > 5                                                          # a patch has got the class row
    assert split_class_tokens(resize_tokens(table, (4, 4), (8, 8), "middle"), "middle")[0].max() < 1.1


def test_rotary_keeps_lengths_and_turns_with_the_position():
    rotary = Rotary(8, (3, 5), skip=1).double()
    x = torch.randn(2, 16, 8, dtype=torch.double)
    y = rotary(x)
    assert torch.equal(y[:, 0], x[:, 0])
    assert error(y.norm(dim=-1), x.norm(dim=-1)) < 100 * TOLERANCE[torch.float64]       # its table is float32
    assert error(y[:, 1], x[:, 1]) == 0                                                 # position (0, 0)
    angle = torch.tensor(2 / 3 * 14, dtype=torch.double)                                # row 2 of 3, first frequency
    a, b = x[0, 1 + 10, 0], x[0, 1 + 10, 1]
    assert y[0, 11, 0] == pytest.approx((a * angle.cos() - b * angle.sin()).item(), abs=1e-5)


def test_rotary_refuses_channels_that_are_no_pairs_of_pairs():
    with pytest.raises(ValueError, match="Rotary: dim must be a multiple of 4, got 6"):
        Rotary(6, (2, 2))
