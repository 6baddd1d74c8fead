"""Tables as tensors: the cache, the ways a cache of tensors breaks, and what compilers and tracers see."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from vssm.scans import scan_array, scan_shape, scan_table, tables, to_grid, to_sequences

pytestmark = pytest.mark.usefixtures("no_tables")

REQUESTS = [("cross", {}), ("hilbert", {"axes": "wh"}), ("window", {"window": 3, "column": True}), ("atrous", {})]


class Reorder(nn.Module):
    """Weights x along each row of a table and puts it back: (b, h, w, d) in and out, any size."""

    def __init__(self, name: str = "cross", middle_token: bool = False, **options):
        super().__init__()
        self.name, self.middle_token, self.options = name, middle_token, options
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        h, w = x.shape[1:3]
        table = scan_table(self.name, (h, w), x.device, middle_token=self.middle_token, **self.options)
        cells = h * w + int(self.middle_token)
        tokens = x.flatten(1, 2)
        if self.middle_token:
            tokens = torch.cat([tokens, tokens.mean(1, keepdim=True)], dim=1)
        y = to_sequences(tokens, table) * self.scale
        y = y * torch.arange(1, y.shape[2] + 1, device=x.device)[:, None]
        return to_grid(y, table, cells).sum(1)


def train_step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    model(x).square().mean().backward()
    return model.scale.grad


# The cache in eager mode


def test_the_tensor_is_the_array():
    for name, options in REQUESTS:
        table = scan_table(name, (5, 6), **options)
        assert table.dtype == torch.int32
        assert table.is_contiguous()
        assert (table.numpy() == scan_array(name, (5, 6), **options)).all()


def test_every_call_gives_the_same_tensor():
    table = scan_table("window", (5, 6))
    assert scan_table("window", [5, 6], "cpu", window=7) is table
    assert scan_table("window", torch.Size((5, 6)), torch.device("cpu", 0), column=False) is table
    assert scan_table("window", (5, 6), middle_token=True) is not table
    assert scan_table("window", (5, 6), window=3) is not table


def test_writing_into_a_tensor_leaves_the_array_alone():
    scan_table("raster", (2, 2)).zero_()
    assert scan_array("raster", (2, 2)).tolist() == [[0, 1, 2, 3]]


def test_a_warm_call_makes_nothing(monkeypatch):
    table = scan_table("hilbert", (9, 5))
    monkeypatch.setattr(tables, "_make", None)
    assert scan_table("hilbert", (9, 5)) is table


def test_threads_share_one_table():
    got, start = [], threading.Barrier(8)

    def ask():
        start.wait()
        got.append(scan_table("hilbert", (31, 17)))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert all(table is got[0] for table in got)


def test_the_oldest_tables_are_dropped_and_made_again(monkeypatch):
    monkeypatch.setattr(tables, "CACHE_BYTES", 3 * 4 * 100)  # three raster tables of 100 cells
    first, *_ = [scan_table("raster", (10, 10)), *(scan_table("raster", (n, 100 // n)) for n in (1, 2, 4))]
    assert [key[1] for key in tables._tables] == [(1, 100), (2, 50), (4, 25)]
    again = scan_table("raster", (10, 10))
    assert again is not first
    assert torch.equal(again, first)
    assert scan_table("raster", (40, 40)).numel() == 1600  # larger than all that is kept, and kept alone
    assert [key[1] for key in tables._tables] == [(40, 40)]


# The middle token


def test_the_middle_token_lies_between_the_patches():
    """Vim on three patches: the token is cell 1, in front of patch 1, and the second row is the exact reverse."""
    assert scan_table("raster", (1, 4), middle_token=True).tolist() == [[0, 1, 2, 3, 4]]
    assert scan_table("bidirectional", (1, 3), middle_token=True).tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    columns = scan_table("bidirectional", (2, 2), middle_token=True, axes="wh")  # patches are cells 0 1 3 4
    assert columns.tolist() == [[0, 3, 2, 1, 4], [4, 1, 2, 3, 0]]


def test_the_middle_token_among_padding_and_skips():
    assert scan_table("window", (1, 3), middle_token=True, window=2).tolist() == [
        [0, 1, 2, 4, 4, 3, 4, 4, 4], [4, 4, 4, 3, 4, 4, 2, 1, 0],
    ]  # fmt: skip
    assert scan_table("atrous", (2, 4), middle_token=True).tolist() == [[0, 4, 2], [5, 4, 7], [1, 4, 3], [6, 4, 8]]


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 5)], ids=str)
def test_every_row_reads_the_middle_token_once(grid):
    for name, options in REQUESTS:
        table = scan_table(name, grid, middle_token=True, **options)
        assert tuple(table.shape) == scan_shape(name, grid, middle_token=True, **options)
        assert ((table == grid[0] * grid[1] // 2).sum(1) == 1).all()


# The ways a cache of tensors breaks: a table first made under a mode that marks tensors


def modes():
    yield pytest.param(torch.inference_mode, id="inference_mode")
    yield pytest.param(torch.no_grad, id="no_grad")
    yield pytest.param(lambda: torch.device("meta"), id="device context")
    yield pytest.param(FakeTensorMode, id="fake tensors")
    yield pytest.param(lambda: FlopCounterMode(display=False), id="a dispatch mode")


@pytest.mark.parametrize("mode", list(modes()))
def test_a_table_born_under_a_mode_serves_a_training_step(mode):
    """Lightning's sanity check runs under inference_mode before the first training step."""
    model = Reorder()
    expected = train_step(model, torch.ones(1, 4, 4, 3)).clone()
    tables._tables.clear()
    with mode():
        scan_table("cross", (4, 4))
    assert torch.equal(train_step(model, torch.ones(1, 4, 4, 3)), expected)
    assert all(type(table) is torch.Tensor and not table.is_inference() for table in tables._tables.values())


def test_a_table_born_under_a_default_device_lies_on_the_cpu():
    torch.set_default_device("meta")
    try:
        table = scan_table("cross", (4, 4))
    finally:
        torch.set_default_device(None)
    assert table.tolist() == scan_array("cross", (4, 4)).tolist()


def test_a_table_born_under_function_transforms_outlives_them():
    def loss(scale, x):
        return torch.func.functional_call(model, {"scale": scale}, (x,)).square().mean()

    model = Reorder()
    x = torch.randn(2, 3, 4, 4, 3)
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(model.scale.detach(), x)
    expected = torch.stack([train_step(model, sample).clone() for sample in x])
    torch.testing.assert_close(per_sample, expected)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(scan_table("cross", (4, 4)))


def test_fake_tensors_get_a_fake_table():
    with FakeTensorMode() as mode:
        y = Reorder()(mode.from_tensor(torch.ones(2, 4, 5, 3)))
    assert y.shape == (2, 20, 3)
    assert not tables._tables


def test_the_meta_device_gets_a_meta_table():
    assert Reorder("window").to("meta")(torch.ones(2, 4, 5, 3, device="meta")).shape == (2, 20, 3)
    assert Reorder("window")(torch.ones(2, 4, 5, 3)).isfinite().all()
    assert {key[2].type for key in tables._tables} == {"meta", "cpu"}


def test_a_meta_model_trains_on_the_meta_device_after_inference():
    model, x = Reorder().to("meta"), torch.ones(2, 4, 5, 3, device="meta")
    with torch.inference_mode():
        model(x)
    assert train_step(model, x).is_meta


# Compilers and exporters


SIZES = [(5 + n, 7 + 2 * n) for n in range(12)]  # the first unlike the other sizes of x, which Dynamo would tie to them


@pytest.fixture
def strict_dynamo():
    """Dynamo from scratch, and a recompilation beyond the limit is an error rather than a fall-back to eager mode."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


class Counted:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self, backend: str):
        self.backend, self.graphs = torch._dynamo.lookup_backend(backend), 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.backend(graph, inputs)


@pytest.mark.usefixtures("strict_dynamo")
@pytest.mark.parametrize(("name", "options", "middle_token"), [(*REQUESTS[0], True), (*REQUESTS[2], False)])
def test_dynamic_sizes_compile_once(name, options, middle_token):
    """Twelve sizes, more than Dynamo's limit of eight versions, run in one graph and give the eager gradients."""
    model = Reorder(name, middle_token, **options)
    counter = Counted("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for h, w in SIZES:
        x = torch.randn(2, h, w, 3)
        torch.testing.assert_close(compiled(x), model(x))
        model.zero_grad()
        compiled(x).sum().backward()
    assert counter.graphs == 1


@pytest.mark.usefixtures("strict_dynamo")
def test_many_sizes_compile_twice_at_most_by_default():
    """Without dynamic=True the second size makes the sizes dynamic, and there it ends."""
    model = Reorder("window", window=3)
    counter = Counted("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for h, w in SIZES:
        x = torch.randn(2, h, w, 3)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.graphs == 2


@pytest.mark.usefixtures("strict_dynamo")
def test_a_compiled_table_is_not_the_cached_one():
    """Inductor may reuse the memory of what an op returns."""
    compiled = torch.compile(lambda x: scan_table("cross", x.shape, x.device), backend="eager", fullgraph=True)
    table = compiled(torch.ones(3, 4))
    assert torch.equal(table, scan_table("cross", (3, 4)))
    assert table.data_ptr() != scan_table("cross", (3, 4)).data_ptr()


@pytest.mark.usefixtures("strict_dynamo")
@pytest.mark.parametrize("first", ["compiled", "eager"])
def test_compiled_and_eager_calls_mix(first):
    model = Reorder()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 4, 4, 3)
    order = [compiled, model, compiled] if first == "compiled" else [model, compiled, model]
    with torch.inference_mode():
        order[0](x)
    gradients = []
    for run in order:
        model.zero_grad()
        run(x).square().mean().backward()
        gradients.append(model.scale.grad.clone())
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


@pytest.mark.parametrize(("name", "options", "strict"), [(*REQUESTS[0], True), (*REQUESTS[2], False)])
def test_export_with_dynamic_sizes(name, options, strict, tmp_path):
    """One exported program serves every size, saved and loaded too, and leaves no fake tensor in the cache."""
    model = Reorder(name, **options)
    dims = {1: torch.export.Dim("h", min=2, max=64), 2: torch.export.Dim("w", min=2, max=64)}
    program = torch.export.export(model, (torch.ones(2, 4, 6, 3),), dynamic_shapes={"x": dims}, strict=strict)
    assert not tables._tables
    torch.export.save(program, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for h, w in [(4, 6), (7, 5), (2, 9)]:
        x = torch.randn(2, h, w, 3)
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("middle_token", [False, True])
@pytest.mark.parametrize(("name", "options"), REQUESTS)
def test_opcheck(name, options, middle_token):
    options = repr(sorted(options.items()))
    torch.library.opcheck(torch.ops.vssm.scan_table.default, (name, [5, 6], torch.device("cpu"), middle_token, options))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_op(mode):
    graph = make_fx(PlusOne("cross"), tracing_mode=mode)(torch.ones(1, 3, 4, 3))
    assert torch.ops.vssm.scan_table.default in {node.target for node in graph.graph.nodes}


def test_an_unknown_order_is_refused_under_export_too():
    with pytest.raises(Exception, match="no order named 'hilbrt'; did you mean hilbert"):
        torch.export.export(Reorder("hilbrt"), (torch.ones(1, 3, 4, 3),))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_torch_jit_trace_keeps_the_table_of_its_size():
    """The old tracer hands out sizes as tensors."""
    x = torch.randn(2, 3, 4, 3)
    assert torch.equal(torch.jit.trace(PlusOne("cross"), (x,), check_trace=False)(x), scan_table("cross", (3, 4)) + 1)


# FX


class PlusOne(nn.Module):
    """The table of x's grid, plus one; (b, h, w, d) in."""

    def __init__(self, name, device=None, **options):
        super().__init__()
        self.name, self.device, self.options = name, device, options

    def forward(self, x):
        _, h, w, _ = x.shape
        return scan_table(self.name, (h, w), x.device if self.device is None else self.device, **self.options) + 1


@pytest.mark.parametrize("autowrap", [(), (scan_table,)], ids=["alone", "wrapped as timm does"])
@pytest.mark.parametrize(("name", "options"), REQUESTS)
def test_fx_sees_a_leaf(name, options, autowrap):
    """The table stays a call in the graph, options and all, so that the traced model serves other sizes."""
    model = PlusOne(name, **options)
    graph = torch.fx.GraphModule(model, torch.fx.Tracer(autowrap_functions=autowrap).trace(model))
    (leaf,) = (node for node in graph.graph.nodes if node.target is scan_table)
    assert {key: value for key, value in leaf.kwargs.items() if key != "middle_token"} == options
    for h, w in [(4, 5), (7, 3)]:
        assert torch.equal(graph(torch.ones(2, h, w, 3)), scan_table(name, (h, w), **options) + 1)


@pytest.mark.parametrize("grid", ["x.shape[1:3]", "(x.size(1), 4)", "(3, 4)"])
def test_fx_sees_a_leaf_wherever_a_proxy_stands(grid):
    forward = eval(f"lambda x: scan_table('cross', {grid}, x.device)", {"scan_table": scan_table})
    graph = torch.fx.symbolic_trace(forward)
    assert scan_table in {node.target for node in graph.graph.nodes}
    assert torch.equal(graph(torch.ones(1, 3, 4)), scan_table("cross", (3, 4)))
