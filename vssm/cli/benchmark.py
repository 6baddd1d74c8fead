"""Time the scan, its scan orders and whole models, beside published figures and the hardware's floor.

``kernels`` runs the suite of selective scans whose CUDA figures are known, forward, and forward with backward.
``scans`` runs the same sizes along raster, Hilbert and random tables, ``calls`` asks what they cost the CPU.
``models`` runs inference and training steps of classifiers, segmenters and detectors. ``cpu`` needs no GPU: it compares
the CPU's scans with ``torch.exp``. A table is printed; ``--json`` keeps it with device and versions, ``--plot`` draws
it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vssm.checkpoints.files import written_whole
from vssm.cli._benchmark_cpu import BACKENDS, CASES, cpu, share_of_scan
from vssm.cli._benchmark_jobs import models as model_rows
from vssm.cli._benchmark_models import COLUMNS, MODES, SETS, check_names
from vssm.cli._timing import Timing, cpu_microseconds, peak_megabytes, timed

CACHE_BYTES = 150e6  # inputs are rotated until they are three times as large as the cache of an H100


class Case(NamedTuple):
    """A selective scan, and what the published CUDA path takes for it on an H100, milliseconds."""

    b: int
    k: int
    d: int
    grid: tuple[int, ...]
    n: int
    gate: bool
    peer_forward: float
    peer_both: float
    floor: float  # forward: the larger of bytes over 3.0 TB/s and exponentials over 4e12 a second


# bf16 inputs, H100 80GB, torch 2.11. Peers: mamba_ssm's selective_scan_cuda for k = 1; for k = 4 VMamba's core, forward
# cross-scan + selective_scan_cuda_oflex + cross-merge, with backward the scan alone.
SUITE = {
    "vim_t_224": Case(64, 1, 384, (197,), 16, True, 0.206, 0.829, 0.02),
    "vim_t_1248": Case(4, 1, 384, (6085,), 16, True, 0.303, 1.559, 0.04),
    "vim_s_512": Case(32, 1, 768, (1025,), 16, True, 1.374, 6.156, 0.10),
    "vmamba_v0_s1": Case(64, 4, 192, (56, 56), 16, False, 6.366, 25.663, 0.62),
    "vmamba_s1": Case(64, 4, 96, (56, 56), 1, False, 1.076, 1.976, 0.08),
    "vmamba_s3": Case(64, 4, 384, (14, 14), 1, False, 0.229, 0.606, 0.02),
    "vmamba_seg512_s1": Case(8, 4, 96, (128, 128), 1, False, 0.564, 0.716, 0.05),
    "mambair": Case(8, 4, 120, (64, 64), 16, False, 0.398, 1.486, 0.06),
    "segmamba_s1": Case(2, 1, 96, (64, 64, 64), 16, True, 2.575, 8.980, 0.20),
    "segmamba_s3": Case(2, 1, 384, (16, 16, 16), 16, True, 0.095, 0.509, 0.013),
    "umamba_bot3d": Case(2, 1, 640, (5, 8, 8), 16, True, 0.039, 0.623, 0.002),
}
ORDERS = ("hilbert", "random")
SECONDS = 2.0  # for the calls of a case, on the CPU


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vssm benchmark", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", choices=("kernels", "scans", "calls", "models", "cpu"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these cases or models (vim_tiny, fcos/vmamba_tiny)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    group = parser.add_argument_group("models")
    group.add_argument("--set", nargs="+", choices=SETS, default=["classifiers"], help="which, if --only does not say")
    group.add_argument(
        "--mode",
        nargs="+",
        choices=MODES,
        default=["eager"],
        help="as they are, replayed from a CUDA graph, or under torch.compile: whole, or each block alone",
    )
    group.add_argument("--without-core", action="store_true", help="with the identity in the place of the scan")
    group.add_argument("--jobs", type=int, default=1, help="models made ready at once; one a GPU is timed at a time")
    group.add_argument("--limit", type=float, default=1800, help="seconds that a model may take when there are jobs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results, with device and versions")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw measured times against floor and peers")
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.limit <= 0:
        parser.error(f"--jobs and --limit must be positive, got {args.jobs} and {args.limit:g}")
    names = _names(parser, args)
    if args.suite != "cpu" and not torch.cuda.is_available():
        parser.error("a GPU is needed: none is visible to torch")
    run = {"kernels": kernels, "scans": scans, "calls": calls, "models": models, "cpu": cpu}[args.suite]
    about = machine("cpu" if args.suite == "cpu" else "cuda")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows: list[dict[str, Any]] = []
    for row in run(names, getattr(torch, args.dtype), args):
        columns = COLUMNS if args.suite == "models" else tuple(row)
        if not rows:
            print(_line(columns))
        rows.append(row)
        print(_line([row.get(column, "") for column in columns]) + row.get("error", ""), flush=True)
        if args.json is not None:
            _keep({"machine": about, "suite": args.suite, "dtype": args.dtype, "rows": rows}, args.json)
    if args.suite == "kernels":
        for key in ("forward ratio", "both ratio"):
            ratios = [row[key] for row in rows]
            print(f"{key}: geometric mean {statistics.geometric_mean(ratios):.2f}, worst {min(ratios):.2f}")
    if args.suite == "cpu":
        print(f"the scan's share of vmamba_tiny's inference on one image of 224²: {share_of_scan():.0%}")
    if args.plot is not None:
        plot(rows, args.suite, about["device"], args.plot)
    return 1 if any("error" in row for row in rows) else 0


def _names(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """What is to be run; ends the program if there is no such thing."""
    if args.suite == "models":
        names = args.only or [name for chosen in args.set for name in SETS[chosen]]
        try:
            check_names(names)
        except ValueError as error:
            parser.error(str(error))
        return names
    known: Mapping[str, Any] = CASES if args.suite == "cpu" else SUITE
    unknown = [name for name in args.only or () if name not in known]
    if unknown:
        parser.error(f"no case named {', '.join(unknown)}; there are {', '.join(known)}")
    return args.only or list(known)


def _keep(record: dict[str, Any], path: Path) -> None:
    """Written after every row: a run that is stopped leaves what it measured."""
    with written_whole(path) as part:
        part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def kernels(names: list[str], dtype: torch.dtype, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Forward, and forward with backward, of each case along its model's own order; along others by the ratio.

    Times are those of the kernels, replayed from a CUDA graph; what a caller waits for, launches included, is beside.
    """
    for name in names:
        case = SUITE[name]
        forward, both, memory = scan_times(case, "raster", dtype)
        row: dict[str, Any] = {"case": name}
        for what, time, peer in (("forward", forward, case.peer_forward), ("both", both, case.peer_both)):
            row |= {f"{what} ms": time.device, f"{what} peer": peer, f"{what} ratio": peer / time.device}
        row |= {"forward floor": case.floor, "forward called": forward.called, "both called": both.called}
        row["peak MB"] = memory
        for order in ORDERS:  # a sequence lies as it lies
            others = scan_times(case, order, dtype)[:2] if len(case.grid) > 1 else (None, None)
            for what, time, other in zip(("forward", "both"), (forward, both), others, strict=True):
                row[f"{what} {order} x"] = "" if other is None else other.device / time.device
        yield row


def scans(names: list[str], dtype: torch.dtype, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each case with a grid along three orders; the ratios say what the order costs."""
    for name in names:
        case = SUITE[name]
        if len(case.grid) == 1:
            continue
        times = {order: scan_times(case, order, dtype)[:2] for order in ("raster", *ORDERS)}
        row: dict[str, Any] = {"case": name}
        for i, what in enumerate(("forward", "both")):
            raster = times["raster"][i].device
            row |= {f"{what} ms": raster} | {
                f"{what} {order} x": times[order][i].device / raster for order in ORDERS
            }
        yield row


def calls(names: list[str], dtype: torch.dtype, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What an eager call of each case costs the CPU, microseconds, whatever the GPU takes: the median, and the least.

    The least is nearest to what a CPU that is left alone takes.
    """
    for name in names:
        row: dict[str, Any] = {"case": name}
        for what, (median, least) in call_times(SUITE[name], dtype).items():
            row |= {f"{what} µs": median, f"{what} least": least}
        yield row


def call_times(case: Case, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """CPU time under no_grad (entered at each call), recorded, of forward with backward, and two yardsticks of the CPU.

    ``empty`` is a pass of the same tensors through autograd that launches nothing, ``python`` a loop of 100 turns.
    """
    scan = Scan(case, "raster", dtype, copies=1)
    (inputs,) = scan.calls
    scan.record()

    def forward() -> None:
        with torch.no_grad():
            scan.forward(inputs)

    return cpu_microseconds(
        {
            "forward": forward,
            "recorded": lambda: scan.forward(inputs),
            "both": lambda: scan.both(inputs),
            "empty": lambda: _Empty.apply(*inputs.values()),
            "python": _loop,
        },
        seconds=SECONDS,
    )


def _loop() -> None:
    for _ in range(100):
        pass


class _Empty(torch.autograd.Function):
    """Saves its inputs, returns two new tensors, and does nothing."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(inputs[0].shape), inputs[0].new_empty(4)


class Scan:
    """Calls of a case along an order, with ``copies`` of inputs."""

    def __init__(self, case: Case, order: str, dtype: torch.dtype, copies: int) -> None:
        self.table = _table(case, order)
        self.calls = [_inputs(case, math.prod(case.grid), dtype) for _ in range(copies)]

    def record(self) -> None:
        """Ask for gradients from here on."""
        for call in self.calls:
            for name, x in call.items():
                x.requires_grad_(name != "grad")

    def forward(self, call: dict[str, Tensor]) -> Tensor:
        from vssm.kernels import selective_scan

        operands: dict[str, Any] = {name: x for name, x in call.items() if name != "grad"}
        return selective_scan(**operands, delta_softplus=True, table=self.table, merge="sum", revisits=False)[0]

    def both(self, call: dict[str, Tensor]) -> tuple[Tensor, ...]:
        operands = [x for name, x in call.items() if name != "grad"]
        return torch.autograd.grad(self.forward(call), operands, call["grad"])


def scan_times(case: Case, order: str, dtype: torch.dtype) -> tuple[Timing, Timing, float]:
    """Forward, forward with backward, and the latter's peak memory in MB beyond inputs, outputs and gradients."""
    elements = case.b * case.k * case.d * math.prod(case.grid)
    scan = Scan(case, order, dtype, max(1, min(6, int(CACHE_BYTES / (elements * 2 * dtype.itemsize)))))
    with torch.no_grad():
        first = timed(scan.forward, scan.calls)
    scan.record()
    second = timed(scan.both, scan.calls)
    results = sum(x.numel() * x.element_size() for x in scan.calls[0].values()) / 1e6  # y and the gradients
    return first, second, peak_megabytes(lambda: scan.both(scan.calls[0])) - results


def _inputs(case: Case, l: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random operands with the step sizes of a fresh Mamba: delta from 0.001 to 0.1 before the input's part."""
    b, k, d, n = case.b, case.k, case.d, case.n
    device = torch.device("cuda")
    dt = torch.exp(torch.empty(k, d, device=device).uniform_(math.log(0.001), math.log(0.1)))
    operands = {
        "u": torch.randn(b, l, d, device=device, dtype=dtype),
        "delta": torch.randn(b, k, l, d, device=device, dtype=dtype) * 0.3,
        "A": -torch.arange(1, n + 1, device=device).float().expand(k, d, n).contiguous(),
        "B": torch.randn(b, k, l, n, device=device, dtype=dtype),
        "C": torch.randn(b, k, l, n, device=device, dtype=dtype),
        "D": torch.ones(k, d, device=device),
        "delta_bias": dt + torch.log(-torch.expm1(-dt)),
        "grad": torch.randn(b, l, d, device=device, dtype=dtype),
    }
    return operands | ({"z": torch.randn(b, l, d, device=device, dtype=dtype)} if case.gate else {})


def _table(case: Case, order: str) -> Tensor:
    """A table of k rows: raster (for four rows VMamba's cross), Hilbert there and back, or random permutations."""
    from vssm.scans import scan_table

    device = torch.device("cuda")
    if order == "random":
        cells = math.prod(case.grid)
        return torch.stack([torch.randperm(cells, device=device) for _ in range(case.k)]).int()
    if order == "raster" and case.k > 1:
        order = "cross"
    if len(case.grid) == 1:  # a sequence: as it lies
        return torch.arange(case.grid[0], dtype=torch.int32, device=device)[None]
    table = scan_table(order, case.grid, device)
    return table.repeat(math.ceil(case.k / len(table)), 1)[: case.k].contiguous()


def models(names: list[str], dtype: torch.dtype, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Inference and training under autocast."""
    return model_rows(names, args.mode, dtype, args.without_core, args.jobs, args.limit)


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    if device == "cpu":
        about = {"device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads"}
    else:
        about = {"device": torch.cuda.get_device_name(), "driver": _driver()}
    return about | {
        "torch": torch.__version__,
        "numba" if device == "cpu" else "triton": _version("numba" if device == "cpu" else "triton"),
        "vssm": _version("vssm"),
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from a checkout" if package == "vssm" else "not installed"


def _driver() -> str:
    """The driver's version, as the kernel module tells it; AMD's and Intel's stand elsewhere."""
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split() if path.exists() else []
    return next((word for word in words if word.count(".") == 2 and word[0].isdigit()), "unknown")


def _line(cells: Sequence[Any]) -> str:
    first, *rest = map(_shown, cells)
    return "  ".join([f"{first:28}", *(f"{cell:>16}" for cell in rest)])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3f}"
    return str(value)


def plot(rows: list[dict[str, Any]], suite: str, device: str, path: Path) -> None:
    """Bars of each case: measured, and for the kernels what peers take and the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels_of: dict[str, dict[str, tuple[str, ...]]] = {
        "kernels": {
            "forward": ("forward ms", "forward peer", "forward floor"),
            "forward + backward": ("both ms", "both peer"),
        },
        "scans": {
            "forward": ("forward hilbert x", "forward random x"),
            "forward + backward": ("both hilbert x", "both random x"),
        },
        "calls": {"µs of the CPU a call": ("recorded µs", "recorded least", "empty least")},
        "models": {"images a second": ("inference img/s", "training img/s")},
        "cpu": {
            "times torch.exp": tuple(f"{backend} {what} x" for backend in BACKENDS for what in ("forward", "both"))
        },
    }
    series = panels_of[suite]
    names = [next(iter(row.values())) for row in rows]
    figure, panels = pyplot.subplots(len(series), 1, figsize=(11, 4 * len(series)), squeeze=False, layout="constrained")
    for axes, (title, keys) in zip(panels[:, 0], series.items()):
        width = 0.8 / len(keys)
        for i, key in enumerate(keys):
            axes.bar([x + i * width for x in range(len(rows))], [row.get(key, 0) for row in rows], width, label=key)
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(rows))], names, rotation=20, ha="right")
        axes.set_title(f"{title}, {device}")
        if suite == "kernels":
            axes.set_yscale("log")
            axes.set_ylabel("ms")
        axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
