"""Tables on a GPU: one tensor a device, CUDA graphs, and compiled models that run as CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from vssm.scans import scan_table, tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
    pytest.mark.usefixtures("no_tables"),
]


def read(x: torch.Tensor) -> torch.Tensor:
    return x.flatten()[scan_table("hilbert", x.shape, x.device)]


def capture(function, x: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = function(x)
    return graph, y


def test_one_tensor_a_device():
    table = scan_table("cross", (5, 6), "cuda")
    assert table.device == torch.device("cuda", torch.cuda.current_device())
    assert scan_table("cross", (5, 6), table.device) is table
    assert torch.equal(table.cpu(), scan_table("cross", (5, 6)))


def test_a_captured_graph_keeps_its_table(monkeypatch):
    """The graph holds the table's address, so the memory stays the table's when the cache drops it."""
    x = torch.randn(64, 48, device="cuda")
    expected = read(x).clone()
    graph, y = capture(read, x)
    monkeypatch.setattr(tables, "CACHE_BYTES", 0)
    scan_table("raster", (3, 3), x.device)
    assert len(tables._tables) == 1
    scraps = [torch.zeros(2, 64 * 48, dtype=torch.int32, device="cuda") for _ in range(100)]
    graph.replay()
    assert torch.equal(y, expected)
    assert len(scraps) == 100


def test_a_table_is_not_made_during_capture():
    with pytest.raises(RuntimeError, match=r"first table of 'hilbert' for \(6, 9\) .* run the model once"):
        capture(read, torch.randn(6, 9, device="cuda"))


def test_a_model_compiled_into_cuda_graphs():
    """The table is born in the warm-up, whose allocations belong to the graphs' memory pool."""
    compiled = torch.compile(read, mode="reduce-overhead", fullgraph=True)
    for grid in [(16, 8), (8, 24)]:
        x = torch.randn(grid, device="cuda")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(x).clone(), read(x))
        assert torch.equal(scan_table("hilbert", grid, x.device).cpu(), scan_table("hilbert", grid))
