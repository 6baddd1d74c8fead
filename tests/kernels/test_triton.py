"""What only the Triton backends do: chunks, large outputs, other GPUs, graphs, and no second compilation."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import kernel_cases
import pytest
import torch
from kernel_cases import assert_close, conv_inputs, rounded, scan_inputs, value_and_grads
from tolerance import TOLERANCE, error
from torch import Tensor

from vssm.kernels import causal_conv1d, selective_scan

ROOT = Path(__file__).resolve().parents[2]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CHUNKED = (1, 2, 2100, 33, 16)  # few channels and many steps: rows are cut into chunks


def triton_release() -> tuple[int, ...]:
    """(3, 8) of Triton 3.8.0; (0, 0) where there is none."""
    try:
        return tuple(int(number) for number in version("triton").split(".")[:2])
    except PackageNotFoundError:
        return (0, 0)


def permutations(k: int, l: int) -> Tensor:
    return torch.stack([torch.randperm(l) for _ in range(k)]).int()


def on_gpu(inputs: dict[str, Tensor], options: dict, device: str = "cuda") -> dict[str, Tensor]:
    return kernel_cases.on(selective_scan, "triton", torch.device(device), inputs, **options)


defined = partial(kernel_cases.defined, selective_scan)


INTERPRETED = """
import os, sys
sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
import torch
from importlib import import_module
from kernel_cases import conv_inputs, scan_inputs
from tolerance import error
from vssm.kernels.conv1d.problem import Problem as Conv
from vssm.kernels.selective_scan.problem import Problem as Scan
from vssm.kernels.selective_scan.triton_forward import pass_states

def check(op, problem, names, inputs, **rest):
    compiled, definition = (import_module(f"vssm.kernels.{op}.{name}") for name in ("triton", "reference"))
    single = {name: x.float() for name, x in inputs.items()}
    double = {name: x.double().requires_grad_() for name, x in single.items()}
    p = problem(**single, **rest)
    expected = getattr(definition, {"conv1d": "causal_conv1d"}.get(op, op))(problem(**double, **rest))
    weights = [torch.randn(x.shape) for x in expected]
    grads = dict(zip(double, torch.autograd.grad(expected, list(double.values()), [w.double() for w in weights])))
    y, last, *saved = compiled.forward(p, True) if op == "selective_scan" else compiled.forward(p)
    actual = dict(zip(names, compiled.backward(p, *weights, *saved)))
    assert error(y, expected[0]) < 1e-5 and error(last, expected[1]) < 1e-5
    for name, grad in grads.items():
        assert error(actual[name], grad) < 1e-5, name
    if op == "selective_scan":
        left = ("A", "B", "C", "D", "delta_bias")
        needed = tuple(name not in left for name in p._fields[:12])
        for name, grad in zip(scan, compiled.backward(p, *weights, *saved, needed=needed)):
            assert grad is None if name in left else torch.equal(grad, actual[name]), f"{name} is not asked for"

torch.manual_seed(0)
scan = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
once = torch.stack([torch.randperm(7), torch.randperm(7)]).int()
again = torch.randint(-1, 8, (2, 2, 9)).int()
rest = dict(table=once, read=once, write=once, delta_softplus=True, merge=True, revisits=False)
check("selective_scan", Scan, scan, scan_inputs(2, 2, 7, 5, 3, shared="u z"), **rest)
rest = dict(table=again, read=again, write=again, delta_softplus=True, merge=False, revisits=True)
check("selective_scan", Scan, scan, scan_inputs(2, 2, 7, 5, 1, shared="B C"), **rest)
rest = dict(table=once[:1], read=once[:1], write=once[:1], delta_softplus=True, merge=False, revisits=False)
check("selective_scan", Scan, scan, scan_inputs(1, 1, 7, 4, 2), **rest)
for reverse in (False, True):
    b, k, chunks, n, d = 1, 2, 19, 2, 3
    chunked, A, first = torch.rand(b, chunks, k, n + 2, d), -torch.rand(k, d, n), torch.rand(b, k, d, n)
    h, expected = first.transpose(2, 3), chunked.clone()
    for c in reversed(range(chunks)) if reverse else range(chunks):
        expected[:, c, :, :n] = h
        h = torch.exp(chunked[:, c, :, n, :, None] * A).transpose(2, 3) * h + chunked[:, c, :, :n]
    sizes = *A.stride()[:2], 1, *first.stride()[:3], k, d, n, chunks
    pass_states[(k * n * b,)](chunked, A, first, *sizes, REVERSE=reverse, BLOCK_C=8, BLOCK_D=32, EXACT=True)
    assert error(chunked[..., :n, :], expected[..., :n, :]) < 1e-5
rest = dict(table=once, write=once, silu=True, revisits=False)
check("conv1d", Conv, ("x", "weight", "bias", "initial_state"), conv_inputs(2, 2, 7, 5, 4, shared="x"), **rest)
"""


@pytest.mark.skipif(triton_release() < (3, 7), reason="needs Triton 3.7: the interpreter before fails with NumPy 2.5")
def test_kernels_agree_with_the_definition_in_tritons_interpreter():
    """Without a GPU; in a process of its own, since Triton decides at its import."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chunks_agree_with_the_definition(dtype):
    inputs = rounded(scan_inputs(*CHUNKED), dtype)
    table = permutations(2, 2100)
    options = dict(delta_softplus=True, table=table, revisits=False)
    assert_close(on_gpu(inputs, options), defined(inputs, **options), TOLERANCE[dtype])


@gpu
def test_many_chunks_of_one_state_agree_with_the_definition():
    """Two a program, and more than are passed on at once elsewhere."""
    inputs = rounded(scan_inputs(1, 2, 2100, 96, 1), torch.bfloat16)
    options = dict(delta_softplus=True, table=permutations(2, 2100), revisits=False)
    actual, expected = on_gpu(inputs, options), defined(inputs, **options)
    # A's gradient is a sum of 2100 terms of both signs, each as exact as a state in bfloat16: by its norm.
    dA, exact = actual.pop("grad of A").double(), expected.pop("grad of A")
    assert (dA.cpu() - exact).norm() < 1e-2 * exact.norm()
    assert_close(actual, expected, TOLERANCE[torch.bfloat16])


@gpu
def test_rows_of_different_kinds_in_one_call():
    """Mixed dtypes, strided views of one projection, an expanded input, parameters read by step."""
    b, k, l, d, n = 3, 2, 200, 36, 8
    inputs = scan_inputs(b, k, l, d, n, shared="u A")
    projection = torch.randn(b, k, l, 2 * n + 5, dtype=torch.bfloat16)
    inputs = {name: x.float() for name, x in inputs.items()}
    inputs["delta"] = inputs["delta"].half()
    inputs["B"], inputs["C"] = projection[..., 5 : 5 + n], projection[..., 5 + n :]
    inputs["u"] = inputs["u"][:1].expand(b, l, d)
    options = dict(delta_softplus=True, table=torch.randint(0, l + 1, (b, k, l)), read="steps", merge="sum")
    moved = {name: x.cuda() for name, x in inputs.items()}
    moved["B"], moved["C"] = projection.cuda()[..., 5 : 5 + n], projection.cuda()[..., 5 + n :]
    assert_close(on_gpu(moved, options), defined(inputs, **options), TOLERANCE[torch.bfloat16])


@gpu
@pytest.mark.parametrize("revisits", [False, True])
def test_results_repeat_bit_for_bit(revisits):
    inputs = rounded(scan_inputs(2, 4, 500, 96, 4, shared="u B"), torch.bfloat16)
    table = torch.randint(0, 500, (4, 700)) if revisits else permutations(4, 500)
    options = dict(delta_softplus=True, table=table, merge="sum", revisits=revisits)
    first, second = (on_gpu(inputs, options) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@gpu
@pytest.mark.parametrize("table", [True, False], ids=["one table", "two tables"])
@pytest.mark.parametrize("shared", ["u", "B C"])
def test_sums_that_pass_through_programs_repeat_bit_for_bit(shared, table, monkeypatch):
    """Blocks of channels add to dB and dC one after another: five times more programs than fit, on two streams."""
    b, k, l, d = 256, 2, 60, 232
    inputs = {name: x.cuda() for name, x in rounded(scan_inputs(b, k, l, d, 16, shared=shared), torch.bfloat16).items()}
    tables = {name: permutations(k, l).cuda() for name in ("table", "read")}
    if table:
        tables["read"] = tables["table"]
    tables["read"][:, 7] = l  # padding
    options = dict(delta_softplus=True, revisits=False, backend="triton") | tables
    run = partial(value_and_grads, selective_scan, inputs, **options)
    expected, streams = run(), (torch.cuda.Stream(), torch.cuda.Stream())
    torch.cuda.synchronize()
    found = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run())
    torch.cuda.synchronize()
    for results in found:
        for name, value in results.items():
            assert torch.equal(value, expected[name]), name
    monkeypatch.setattr(import_module("vssm.kernels.selective_scan.triton"), "use_gluon", False)
    plain = run()
    for name in ("grad of B", "grad of C"):  # both are rounded, to 0.03 where they are largest
        assert error(expected[name], plain[name]) < 0.1, name


@gpu
@pytest.mark.parametrize("sizes", [(64, 1, 197, 384), (2, 1, 2**16, 96), (2, 1, 320, 640), (8, 4, 4096, 120)], ids=str)
def test_memory_beside_inputs_and_results(sizes):
    """At the peak of forward and backward with 16 states, in multiples of one (b, k, l, d)."""
    b, k, l, d = sizes
    inputs = {name: x.bfloat16().cuda() for name, x in scan_inputs(b, k, l, d, 16, shared="u").items()}
    inputs |= {name: inputs[name].float() for name in ("A", "D", "delta_bias")}
    left = ("initial_state",) if k == 1 else ("initial_state", "z")
    inputs = {name: x.requires_grad_() for name, x in inputs.items() if name not in left}
    options = dict(delta_softplus=True, table=permutations(k, l).cuda(), revisits=False, merge="sum", backend="triton")
    weights = torch.randn_like(inputs["u"])

    def run() -> int:
        y, _ = selective_scan(**inputs, **options)
        grads = torch.autograd.grad(y, list(inputs.values()), weights)
        return sum(x.numel() * x.element_size() for x in (y, *grads))

    results = run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before - results
    assert taken / (2 * b * k * l * d) < (1 if k == 1 else 2)


@gpu
@pytest.mark.parametrize("large", [0, 2**40], ids=["searched", "zeroed"])
def test_cells_that_no_step_visits_are_zero(large, monkeypatch):
    monkeypatch.setattr(import_module("vssm.kernels.selective_scan.triton"), "LARGE", large)
    inputs = rounded(scan_inputs(2, 2, 50, 20, 4), torch.float32)
    options = dict(delta_softplus=True, table=permutations(2, 50)[:, :30], revisits=False)
    assert_close(on_gpu(inputs, options), defined(inputs, **options), TOLERANCE[torch.float32])


@gpu
def test_many_rows_pass_the_limit_of_a_grid_dimension():
    inputs = rounded(scan_inputs(70_000, 1, 3, 2, 1), torch.float32)
    options = dict(delta_softplus=True)
    assert_close(on_gpu(inputs, options), defined(inputs, **options), TOLERANCE[torch.float32])


@gpu
def test_another_length_compiles_nothing():
    from triton import knobs

    compiled = []
    knobs.runtime.jit_post_compile_hook = lambda **found: compiled.append(found["repr"])

    def run(l: int) -> None:
        on_gpu(rounded(scan_inputs(2, 1, l, 32, 16), torch.float32), dict(delta_softplus=True))

    try:
        run(200)
        compiled.clear()
        run(208)
        run(333)
        assert not compiled
    finally:
        knobs.runtime.jit_post_compile_hook = None


@gpu
@pytest.mark.parametrize("sizes", [(40, 1), (96, 1), (40, 16)], ids=["n 1", "n 1, two chunks a program", "n 16"])
@pytest.mark.parametrize("shared", ["u", "u A B C D delta_bias", ""], ids=["u", "all", "none"])
@pytest.mark.parametrize("l", [1, 9, 500])
def test_gluon_kernels_agree_with_the_definition_and_the_plain_ones(l, shared, sizes, monkeypatch):
    """And it is they that run."""
    inputs, tolerance = rounded(scan_inputs(2, 2, l, *sizes, shared=shared), torch.bfloat16), TOLERANCE[torch.bfloat16]
    options = dict(delta_softplus=True, table=permutations(2, l), revisits=False)
    gluon = on_gpu(inputs, options)
    monkeypatch.setattr(import_module("vssm.kernels.selective_scan.triton"), "use_gluon", False)
    plain, expected = on_gpu(inputs, options), defined(inputs, **options)
    assert_close(gluon, expected, tolerance)
    assert_close(plain, expected, tolerance)
    assert any(not torch.equal(gluon[name], plain[name]) for name in gluon) or l == 1


@gpu
@pytest.mark.slow
def test_random_shapes_agree_with_the_definition():
    """Any sizes, sharing, tables and options, in three dtypes."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    sizes = st.tuples(
        st.integers(1, 3),
        st.integers(1, 4),
        st.integers(1, 300),
        st.integers(1, 140),
        st.sampled_from([1, 3, 4, 16, 17]),
    )
    names = st.sets(st.sampled_from("u delta A B C D z delta_bias".split()))

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(sizes, names, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans(), st.booleans())
    def check(sizes, shared, dtype, permuted, whole):
        b, k, l, d, n = sizes
        d = -(-d // 8) * 8 if whole else d
        inputs = rounded(scan_inputs(b, k, l, d, n, shared=" ".join(sorted(shared | {"z"}))), dtype)
        table = permutations(k, l) if permuted else torch.randint(0, l + 1, (k, 2 * l))
        options = dict(delta_softplus=True, table=table, revisits=not permuted)
        assert_close(on_gpu(inputs, options), defined(inputs, **options), TOLERANCE[dtype])

    check()


@gpu
def test_a_call_that_is_repeated_uses_its_own_tensors():
    """The second call of a kind follows the recipe of the first: other values, another table, other results."""
    for seed in (0, 1):  # and the third call takes the shortcut
        torch.manual_seed(seed)
        inputs = rounded(scan_inputs(2, 2, 120, 32, 16, shared="u"), torch.bfloat16)
        options = dict(delta_softplus=True, table=permutations(2, 120), merge="sum", revisits=False)
        for _ in range(2):
            assert_close(on_gpu(inputs, options), defined(inputs, **options), TOLERANCE[torch.bfloat16])


@gpu
def test_a_table_changed_in_place_is_inverted_again():
    inputs = rounded(scan_inputs(1, 2, 50, 16, 4, shared="u"), torch.float32)
    table = permutations(2, 50).cuda()
    for _ in range(2):
        options = dict(delta_softplus=True, table=table, merge="sum", revisits=False)
        assert_close(on_gpu(inputs, options), defined(inputs, **options | {"table": table.cpu()}), 1e-5)
        table.copy_(permutations(2, 50))


@gpu
@pytest.mark.slow
def test_a_million_steps_agree_with_the_scan_in_pieces():
    l, d = 2**20, 16
    inputs = {name: x.bfloat16() for name, x in scan_inputs(1, 1, l, d, 16).items() if name in ("u", "delta", "B", "C")}
    run = partial(selective_scan, A=-torch.rand(d, 16, device="cuda") - 0.1, delta_softplus=True, backend="triton")
    moved = {name: x.cuda() for name, x in inputs.items()}
    y, last = run(**moved)
    state, parts = None, []
    for i in range(4):
        piece = {name: x[..., i * l // 4 : (i + 1) * l // 4, :] for name, x in moved.items()}
        part, state = run(**piece, initial_state=state)
        parts.append(part)
    assert error(y, torch.cat(parts, -2)) < TOLERANCE[torch.bfloat16]
    assert error(last, state) < 1e-4


@gpu
@pytest.mark.slow
def test_a_fresh_cache_is_filled_in_half_a_minute_and_said_once(tmp_path):
    """First forward of vim_tiny with an empty Triton cache, then in a second process."""
    code = (
        "import time, torch, vssm\n"
        "model = vssm.create_model('vim_tiny').cuda().eval()\n"
        "x = torch.randn(1, 3, 224, 224, device='cuda'); torch.cuda.synchronize(); start = time.perf_counter()\n"
        "with torch.inference_mode(), torch.autocast('cuda', torch.bfloat16): model(x)\n"
        "torch.cuda.synchronize(); print(time.perf_counter() - start)"
    )
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr[-2000:]
    seconds = [float(run.stdout.split()[-1]) for run in runs]
    print("first forward of vim_tiny, seconds:", seconds)
    assert seconds[0] < 30
    assert seconds[1] < 5
    assert runs[0].stderr.count("compiling GPU kernels") == 1
    assert "compiling GPU" not in runs[1].stderr


@gpu
def test_float64_is_refused():
    x = torch.ones(1, 2, 1, device="cuda", dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        selective_scan(x, x, -x[0, :1], x, x, backend="triton")


@gpu
def test_a_cuda_graph_replays_the_scan():
    inputs = {name: x.float().cuda() for name, x in scan_inputs(2, 2, 100, 40, 4).items()}
    run = partial(selective_scan, **inputs, delta_softplus=True, table=permutations(2, 100).cuda(), revisits=False)
    expected, _ = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = run()
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


@pytest.fixture
def forget(monkeypatch):
    """Forgets what calls were met before."""
    replay, kinds = (import_module(f"vssm.kernels.{name}") for name in ("triton_replay", "kinds"))

    def forgotten() -> None:
        for module, name in ((replay, "_recipes"), (kinds, "_kinds"), (kinds, "_guarded")):
            monkeypatch.setattr(module, name, {})

    forgotten()
    return forgotten


def chains() -> list[object]:
    """The graphs that calls are launched as."""
    recipes = import_module("vssm.kernels.triton_replay")._recipes.values()
    made = [recipe.direct.chain for recipe in recipes if recipe is not None and recipe.direct is not None]
    return [chain for chain in made if chain is not None]


@gpu
@pytest.mark.parametrize("stream", ["default", "own"])
def test_calls_in_flight_keep_their_arguments(stream, forget):
    """Kernels that are called often are one launch, told of the next tensors before it has run."""
    with torch.cuda.stream(None if stream == "default" else torch.cuda.Stream()):
        calls = [{name: x.bfloat16().cuda() for name, x in scan_inputs(1, 2, 2100, 64, 16).items()} for _ in range(20)]
        run = partial(selective_scan, delta_softplus=True, table=permutations(2, 2100).cuda(), revisits=False)
        run = partial(value_and_grads, partial(run, backend="triton"))
        torch.cuda.synchronize()
        alone = []
        for call in calls:
            alone.append(run(call))
            torch.cuda.synchronize()
        assert {chain.stream for chain in chains()} == {torch.cuda.current_stream().cuda_stream}
        assert len(chains()) == 2  # forward and backward
        torch.cuda._sleep(200_000_000)
        together = [run(call) for call in calls]
        torch.cuda.synchronize()
        for one, other in zip(alone, together):
            assert all(torch.equal(value, other[name]) for name, value in one.items())


@gpu
def test_a_cuda_graph_is_captured_of_calls_that_are_one_launch(forget):
    inputs = {name: x.bfloat16().cuda() for name, x in scan_inputs(1, 1, 2100, 64, 16).items()}
    run = partial(selective_scan, **inputs, delta_softplus=True)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        expected = [run()[0] for _ in range(20)][-1]
    assert chains()
    with torch.cuda.graph(graph, stream=stream):
        y, _ = run()
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    with torch.cuda.stream(stream):
        assert torch.equal(run()[0], expected)


@gpu
def test_one_tensor_may_be_two_operands(forget):
    """After calls with two, whose shortcut is taken."""
    inputs = {name: x.bfloat16().cuda() for name, x in scan_inputs(1, 1, 300, 32, 16).items()}
    run = partial(selective_scan, delta_softplus=True)
    twice = inputs | {"C": inputs["B"]}
    expected, _ = run(**twice)
    forget()
    for _ in range(20):
        run(**inputs)
    assert torch.equal(run(**twice)[0], expected)


@gpu
def test_the_driver_and_tritons_launcher_do_the_same(monkeypatch, forget):
    """The first call is made, the second replayed by the driver, the third by a shortcut, the last one by Triton."""
    replay, kinds = (import_module(f"vssm.kernels.{name}") for name in ("triton_replay", "kinds"))
    inputs = {name: x.bfloat16().cuda() for name, x in scan_inputs(2, 2, 300, 32, 16, shared="u").items()}
    run = partial(value_and_grads, partial(selective_scan, backend="triton"), inputs, delta_softplus=True)
    run = partial(run, table=permutations(2, 300).cuda(), merge="sum", revisits=False)
    made, directly, shorter = run(), run(), run()
    assert any(recipe is not None and recipe.direct is not None for recipe in replay._recipes.values())
    assert any(kind.shortcuts for kind in kinds._kinds.values())
    together = [run() for _ in range(20)][-1]
    assert len(chains()) == 2
    monkeypatch.setattr(replay.triton_direct, "arguments", lambda *_: None)
    forget()  # the shortcuts too, which end in the driver
    run()
    by_triton = run()
    assert any(recipe is not None for recipe in replay._recipes.values())
    assert all(recipe is None or recipe.direct is None for recipe in replay._recipes.values())
    for name, value in made.items():
        for other in (directly, shorter, together, by_triton):
            assert torch.equal(value, other[name]), name


@gpu
def test_a_thread_without_a_context_launches(forget):
    """The first thing that a thread does with the GPU may be a replayed call, whose memory comes from the cache."""
    inputs = {name: x.bfloat16().cuda() for name, x in scan_inputs(1, 1, 2100, 64, 16).items()}
    run = partial(selective_scan, **inputs, delta_softplus=True)
    expected, _ = run()
    for times in (2, 20):
        for _ in range(times):
            run()
        torch.cuda.synchronize()
        assert bool(chains()) == (times == 20)
        with ThreadPoolExecutor(1) as thread:
            for _ in range(2):
                assert torch.equal(thread.submit(lambda: run()[0]).result(), expected)


@gpu
def test_gradients_do_not_depend_on_which_are_asked_for():
    inputs = {name: x.bfloat16().cuda() for name, x in scan_inputs(2, 2, 100, 32, 16, shared="u").items()}
    options = dict(delta_softplus=True, table=permutations(2, 100).cuda(), merge="sum", revisits=False)
    names = ["u", "delta", "z"]
    asked = {name: x.requires_grad_(name in names) for name, x in inputs.items()}
    for _ in range(2):
        y, _ = selective_scan(**asked, **options, backend="triton")
        some = torch.autograd.grad(y.sum(), [asked[name] for name in names])
        every = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        y, _ = selective_scan(**every, **options, backend="triton")
        for name, grad, full in zip(names, some, torch.autograd.grad(y.sum(), [every[name] for name in names])):
            assert torch.equal(grad, full), name


@gpu
def test_saved_operands_may_come_back_in_another_layout():
    """As torch.autograd.graph.save_on_cpu brings them: contiguous."""
    inputs = {name: x.cuda() for name, x in scan_inputs(2, 1, 100, 32, 4).items()}
    wide = torch.randn(2, 100, 80, device="cuda")
    u, delta = (wide[..., i : i + 32].requires_grad_() for i in (0, 40))
    rest = {name: inputs[name].float() for name in ("A", "B", "C")}
    expected = actual = None
    for _ in range(2):
        y, _ = selective_scan(u, delta, **rest, delta_softplus=True)
        expected = torch.autograd.grad(y.square().sum(), (u, delta))
        with torch.autograd.graph.save_on_cpu():
            y, _ = selective_scan(u, delta, **rest, delta_softplus=True)
        actual = torch.autograd.grad(y.square().sum(), (u, delta))
        assert all(torch.equal(x, y) for x, y in zip(actual, expected))


@gpu
def test_compiled_graphs_do_not_share_remembered_tables():
    """Under mode="reduce-overhead" what a call allocates lies in a CUDA graph's memory, to be overwritten."""
    launches = import_module("vssm.kernels.triton_launch")
    inputs = {name: x.cuda() for name, x in scan_inputs(2, 2, 96, 32, 4, shared="u").items()}
    inputs = {name: x.float() for name, x in inputs.items()}
    tables = [permutations(2, 96).cuda() for _ in range(2)]

    def twice(u: Tensor, first: Tensor, second: Tensor) -> Tensor:
        rest = {name: x for name, x in inputs.items() if name != "u"}
        for table in (first, second.flip(0)):  # one that is given, one that is made
            u = selective_scan(u, **rest, delta_softplus=True, table=table, merge="sum", revisits=False)[0].sin()
        return u

    compiled = torch.compile(twice, mode="reduce-overhead", fullgraph=True)
    for step in range(6):
        u = torch.randn_like(inputs["u"], requires_grad=True)
        known = len(launches._inverses)
        actual = compiled(u, *tables)
        (grad,) = torch.autograd.grad(actual.square().sum(), u)
        assert len(launches._inverses) == known  # those of the eager calls
        actual, grad = actual.clone(), grad.clone()
        [torch.full((2, 96), -7, device="cuda", dtype=torch.int32) for _ in range(50)]  # takes memory that was freed
        with torch.no_grad():
            for table in tables:  # another order, at the same place
                table.copy_(table[:, torch.randperm(96, device="cuda")] if step == 2 else table)
        if step != 2:
            expected = twice(u, *tables)
            assert error(actual, expected) < 1e-4
            assert error(grad, torch.autograd.grad(expected.square().sum(), u)[0]) < 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_inputs_may_lie_on_a_gpu_that_is_not_the_current_one():
    inputs = rounded(scan_inputs(2, 2, 90, 20, 4), torch.float32)
    options = dict(delta_softplus=True, table=permutations(2, 90))
    actual = on_gpu(inputs, options, "cuda:1")
    assert actual["y"].device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_close(actual, defined(inputs, **options), TOLERANCE[torch.float32])


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("revisits", [False, True])
def test_the_convolution_agrees_with_the_definition(dtype, revisits):
    inputs = rounded(conv_inputs(2, 3, 150, 70, 4, shared="x bias"), dtype)
    table = torch.randint(0, 151, (2, 3, 200)) if revisits else permutations(3, 150)
    options = dict(activation="silu", table=table, revisits=revisits)
    double = {name: x.double() for name, x in inputs.items()}
    expected = value_and_grads(partial(causal_conv1d, backend="reference"), double, **options)
    moved = {name: x.cuda() for name, x in inputs.items()}
    options["table"] = table.cuda()
    first, *again = (value_and_grads(partial(causal_conv1d, backend="triton"), moved, **options) for _ in range(3))
    assert_close(first, expected, TOLERANCE[dtype])
    for name, value in first.items():
        assert all(torch.equal(value, other[name]) for other in again), name


@gpu
@pytest.mark.bigindex
def test_more_elements_than_an_int_counts_agree_with_the_scan_in_pieces():
    """Only the forward: with its gradients it would not fit 80 GB."""
    l, d, pieces = 2**24, 136, 4  # 2.3e9 elements
    u, delta = (torch.empty(1, l, d, device="cuda", dtype=torch.bfloat16).uniform_(-1, 1) for _ in range(2))
    B, C = (torch.empty(1, l, 1, device="cuda", dtype=torch.bfloat16).uniform_(-1, 1) for _ in range(2))
    A = torch.full((d, 1), -1.0, device="cuda")
    run = partial(selective_scan, A=A, delta_softplus=True, backend="triton")
    with torch.no_grad():
        y, last = run(u, delta, B=B, C=C)
        state = None
        for i in range(pieces):
            part = slice(i * l // pieces, (i + 1) * l // pieces)
            expected, state = run(u[:, part], delta[:, part], B=B[:, part], C=C[:, part], initial_state=state)
            assert (y[:, ..., part, :].float() - expected.float()).abs().max() < 0.05
    assert error(last.flatten(), state.flatten()) < 1e-4


@gpu
@pytest.mark.bigindex
def test_gradients_of_more_elements_than_an_int_counts_agree_with_the_scan_in_pieces():
    """Pieces are joined by their states, and by the gradients of these. 45 GB."""
    l, d, pieces = 2**24, 136, 4  # 2.3e9 elements
    new = partial(torch.empty, 1, l, device="cuda", dtype=torch.bfloat16)
    u, delta, grad_y = (new(d).uniform_(-1, 1) for _ in range(3))
    B, C = (new(1).uniform_(-1, 1) for _ in range(2))
    A = torch.full((d, 1), -1.0, device="cuda")
    run = partial(selective_scan, A=A, delta_softplus=True, backend="triton")
    big = [x.requires_grad_() for x in (u, delta, B, C)]
    y, _ = run(u, delta, B=B, C=C)
    grads = torch.autograd.grad(y[:, 0], big, grad_y)
    del y
    parts = [slice(i * l // pieces, (i + 1) * l // pieces) for i in range(pieces)]
    with torch.no_grad():
        states: list[Tensor | None] = [None]
        for part in parts[:-1]:
            states.append(run(u[:, part], delta[:, part], B=B[:, part], C=C[:, part], initial_state=states[-1])[1])
    grad_last = None
    for part, state in reversed(list(zip(parts, states))):
        leaves = [x.detach()[:, part].requires_grad_() for x in big]
        begin = torch.zeros(1, 1, d, 1, device="cuda") if state is None else state
        begin.requires_grad_()
        y, last = run(leaves[0], leaves[1], B=leaves[2], C=leaves[3], initial_state=begin)
        outputs, given = ([y[:, 0]], [grad_y[:, part]]) if grad_last is None else (
            [y[:, 0], last], [grad_y[:, part], grad_last])  # fmt: skip
        *expected, grad_last = torch.autograd.grad(outputs, [*leaves, begin], given)
        for x, grad in zip(expected, grads):
            largest = x.float().abs().max()
            assert (x.float() - grad[:, part].float()).abs().max() < 0.02 * largest
        del y, last, outputs, expected
