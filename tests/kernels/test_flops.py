"""What torch.utils.flop_counter says of our ops, in eager mode, on the meta device, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from tree import run_python

from vssm.kernels import causal_conv1d, scan2d, selective_scan
from vssm.scans import scan_table

B, K, H, W, D, N = 2, 4, 3, 5, 6, 7
L = H * W


def counted(call, *, backward: bool) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass."""
    with FlopCounterMode(display=False) as counter:
        y = call()
        forward = counter.get_total_flops()
        if backward:
            y.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shared", [True, False])
def test_selective_scan(device, shared):
    """9 a state of each step, 1 for D, 1 for the gate of the merged output; the backward pass three times that."""
    k = () if shared else (K,)
    x = torch.ones(B, *k, L, D, device=device, requires_grad=True)
    gates, A = torch.ones(B, *k, L, N, device=device), -torch.ones(*k, D, N, device=device)
    table = scan_table("cross", (H, W), device)

    def scan(**options):
        return selective_scan(x, x, A, gates, gates, table=table, merge="sum", **options)[0]

    plain = 9 * B * K * L * D * N
    assert counted(scan, backward=True) == (plain, 3 * plain)
    D_ = torch.ones(*k, D, device=device)
    z = torch.ones(B, L, D, device=device)
    assert counted(lambda: scan(D=D_, z=z), backward=False)[0] == plain + B * K * L * D + B * L * D


def test_selective_scan_counts_steps_not_cells():
    u = torch.ones(1, 4, D)
    table = torch.tensor([[0, 1, 2, 3, 3, 3, 3]])
    flops, _ = counted(lambda: selective_scan(u, u, -torch.ones(D, N), u[..., :1].expand(-1, -1, N).contiguous(),
                                              torch.ones(1, 4, N), table=table)[0], backward=False)  # fmt: skip
    assert flops == 9 * 7 * D * N


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("activation", "passes"), [(None, 2), ("silu", 3)])
def test_causal_conv1d(device, activation, passes):
    """A multiply-add for each tap, of each row; x has none of its own."""
    x = torch.ones(B, L, D, device=device, requires_grad=True)
    weight = torch.ones(K, D, 4, device=device)
    table = scan_table("cross", (H, W), device)
    forward = 2 * B * K * L * D * 4
    found = counted(lambda: causal_conv1d(x, weight, activation=activation, table=table)[0], backward=True)
    assert found == (forward, passes * forward)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_scan2d(device):
    u = torch.ones(B, H, W, D, device=device, requires_grad=True)
    A, gate = -torch.ones(D, N, device=device), torch.ones(B, H, W, N, device=device)
    forward = B * L * D * (16 * N + 1)
    D_ = torch.ones(D, device=device)
    assert counted(lambda: scan2d(u, u, u, A, A, gate, gate, gate, D_), backward=True) == (forward, 3 * forward)


def test_counting_changes_no_number():
    """The counter sees the custom op; the result is that of the eager call."""
    u, gates = torch.randn(B, L, D), torch.randn(B, L, N)
    A, table = -torch.rand(D, N), scan_table("cross", (H, W))
    plain = selective_scan(u, u.abs(), A, gates, gates, table=table)[0]
    with FlopCounterMode(display=False):
        counted = selective_scan(u, u.abs(), A, gates, gates, table=table)[0]
    assert torch.equal(plain, counted)


def test_nothing_is_said_of_a_missing_triton():
    """PyTorch's counter does, to every user of a build without it, when it is imported."""
    code = """
import logging, sys
class Said(logging.Handler):
    def emit(self, record):
        print(record.getMessage())
logging.getLogger("torch.utils.flop_counter").addHandler(Said())
sys.modules["triton"] = None
import vssm.kernels
print("imported")
"""
    assert run_python(code) == "imported\n"
