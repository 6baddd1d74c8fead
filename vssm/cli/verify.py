"""Compare our models, scan orders and ops with golden files of the published code.

Prints a line for each output with its mismatch, then ``N passed, M failed`` (``, K skipped``); exit status 1 if any
failed. A file is a model's (built from its ``source`` by the family's ``published``), a table of scan orders, or an
operator's with full arrays and gradients.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from vssm.checkpoints import load_state
from vssm.cli import _golden as golden
from vssm.kernels import scan2d, use_backend
from vssm.kernels.backends import BACKENDS
from vssm.kernels.compat import causal_conv1d_fn, mamba_chunk_scan_combined, selective_scan_fn
from vssm.models import variant as rows
from vssm.models.keys import to_published
from vssm.scans import published as scans
from vssm.scans import scan_table, to_grid, to_sequences

MODEL_BOUND = {torch.float64: 1e-6, torch.float32: 2e-4}        # standard deviations of the output
LOOSE_BOUND = 1e-3                                              # float32, where a file's notes ask for it
OPERATOR_BOUND = {torch.float64: 1e-9, torch.float32: 1e-4}     # of the largest entry


@dataclass(frozen=True)
class Line:
    """One output: its mismatch and the bound, or the reason why there is none."""

    name: str
    mismatch: float = 0.0
    bound: float = 0.0
    skipped: str = ""
    failed: str = ""

    @property
    def verdict(self) -> str:
        if self.skipped:
            return "skipped"
        return "passed" if not self.failed and self.mismatch <= self.bound else "failed"

    def __str__(self) -> str:
        figure = self.skipped or self.failed or f"{self.mismatch:.1e} (bound {self.bound:.0e})"
        return f"{self.verdict:7}  {self.name}  {figure}"


@dataclass(frozen=True)
class Where:
    """How to compute."""

    dtype: torch.dtype
    device: torch.device

    def tensor(self, array: Any) -> Tensor:
        return torch.as_tensor(np.asarray(array), dtype=self.dtype, device=self.device)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vssm verify", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", help="of the scan and convolution ops; the device chooses by default")
    options = parser.parse_args(argv)
    try:
        where = Where(getattr(torch, options.dtype), torch.device(options.device))
        contents = [(path, _read(path)) for path in options.files]
        backend = _backend(options.backend)
    except (OSError, RuntimeError, ValueError) as error:     # torch.device raises RuntimeError
        print(f"vssm verify: {error}", file=sys.stderr)
        return 2
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    with backend:
        for path, content in contents:
            for line in _checked(path, content, where):
                counts[line.verdict] += 1
                print(line, flush=True)
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    print(f"{counts['passed']} passed, {counts['failed']} failed{skipped}")
    return int(counts["failed"] > 0)


def _read(path: Path) -> dict[str, Any]:
    """A golden file's content.

    Raises:
        ValueError: If it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no golden file: not JSON ({error})") from error
    if not isinstance(content, dict) or _checker(content) is None:
        found = sorted(content)[:8] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} is no golden file: it needs cases or tables of outputs, it has {found}")
    return content


def _checker(content: dict[str, Any]) -> Any:
    if content.get("kind") in ("scan_tables", "scan_sequences") and isinstance(content.get("tables"), dict):
        return _scan_lines
    if "op" in content and "cases" in content:
        return _operator_lines
    if "source" in content and "loss_cases" in content:
        return _loss_lines
    if {"variant", "source", "state_dict", "cases"} <= content.keys():
        return _model_lines if content["state_dict"] else _summary_lines
    return None


def _checked(path: Path, content: dict[str, Any], where: Where) -> Iterator[Line]:
    """The lines of one file; whatever goes wrong inside becomes a failed line."""
    name, empty = f"{path.parent.name}/{path.stem}", True
    try:
        for line in _checker(content)(content, where):
            empty = False
            yield replace(line, name=f"{name} {line.name}".rstrip())
        if empty:
            yield Line(name, failed="it records no outputs")
    except Exception as error:                               # a check that raises has failed; the next file goes on
        yield Line(name, failed=f"{type(error).__name__}: {error}")


def _backend(name: str | None) -> AbstractContextManager[None]:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"no backend named {name!r}; there are {', '.join(BACKENDS)}")
    return use_backend(name)


def _model_lines(content: dict[str, Any], where: Where) -> Iterator[Line]:
    """The published constructor call as our model, with formula weights under the published keys."""
    source = content["source"]
    family = next((f for f in rows.families() if source["repo"] == f.REPOSITORY), None)
    if family is None:
        yield Line("", skipped=f"no family of {source['repo']} here")
        return
    try:
        built = family.published(source["entry"], source["kwargs"])
    except rows.NotCovered as reason:
        yield Line("", skipped=str(reason))
        return
    model = built.model.to(where.device, where.dtype).eval()
    constructed = to_published(model.state_dict(), built.keys)
    overrides, kept = content.get("weight_overrides", ()), set(content["kept"])
    state = {
        key: where.tensor(golden.weight(key, shape, overrides)) if key not in kept else constructed[key]
        for key, (shape, _) in content["state_dict"].items()
        if key not in kept or key in constructed            # a table that we compute is no entry of ours
    }
    load_state(model, state, built.keys, source="the golden's state dict")
    if not content["cases"]:                                # names and shapes alone, which fit if we are here
        yield Line("state dict")
    bound = _bound(content, where.dtype)
    loose = built.float32_bounds if where.dtype == torch.float32 else {}
    for number, case in enumerate(content["cases"]):
        inputs = {name: where.tensor(array) for name, array in golden.inputs(case["inputs"], number).items()}
        with torch.no_grad():
            outputs = built.run(model, inputs)
        for name, summary in case["outputs"].items():
            if name not in outputs:
                yield Line(f"case {number} {name}", failed="the family's published() does not return it")
            else:
                allowed = loose.get(name, loose.get("", bound))
                yield Line(f"case {number} {name}", golden.mismatch(_array(outputs[name]), summary), allowed)


def _loss_lines(content: dict[str, Any], where: Where) -> Iterator[Line]:
    """A family's loss on formula maps: its value, and what was assigned to what."""
    source = content["source"]
    family = next((f for f in rows.families() if source["repo"] == f.REPOSITORY), None)
    if family is None or not hasattr(family, "published_loss"):
        yield Line("", skipped=f"no loss of {source['repo']} here")
        return
    for number, case in enumerate(content["loss_cases"]):
        maps = [where.tensor(array) for array in golden.inputs(case["inputs"], case["input_case"]).values()]
        found = family.published_loss(source["kwargs"], maps, case["strides"], case["targets"])
        for name, expected in case["expected"].items():
            error = golden.relative_error(_array(found[name]), expected)
            yield Line(f"loss case {number} {name}", error, OPERATOR_BOUND[where.dtype])


def _bound(content: dict[str, Any], dtype: torch.dtype) -> float:
    asks = re.search(r"tolerance[^.]*?\b1e-3\b", content.get("notes", ""), re.IGNORECASE)
    return LOOSE_BOUND if asks and dtype == torch.float32 else MODEL_BOUND[dtype]


def _scan_lines(content: dict[str, Any], where: Where) -> Iterator[Line]:
    """Tables cell by cell; the mismatch is the number of steps that differ."""
    file = content.get("name") or content["source"]["repo"]
    for what, ours in (("tables", scans.published_row), ("directions", scans.published_directions)):
        for size, orders in content.get(what, {}).items():
            for name, expected in _flat(orders):
                label = f"{size} {name}{' directions' * (what == 'directions')}"
                try:
                    found = ours(file, name, tuple(int(n) for n in re.findall(r"\d+", size)))
                except scans.NotCovered as reason:
                    yield Line(label, skipped=str(reason))
                    continue
                wanted = np.asarray(expected)
                yield Line(label, float((found != wanted).sum()) if found.shape == wanted.shape else np.inf)


def _flat(orders: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and tables; where orders stand in groups, the group's name comes first."""
    for name, table in orders.items():
        if isinstance(table, dict):
            yield from ((f"{name}_{inner}", below) for inner, below in _flat(table))
        else:
            yield name, table


def _operator_lines(content: dict[str, Any], where: Where) -> Iterator[Line]:
    """Full arrays: every output and the gradient of every input."""
    operator = OPERATORS.get(content["op"])
    if operator is None:
        yield Line("", skipped=f"no op named {content['op']!r} here; there are {', '.join(OPERATORS)}")
        return
    bound = OPERATOR_BOUND[where.dtype]
    for case in content["cases"]:
        arrays = golden.inputs({**case["inputs"], **case["grad_outputs"]}, case["case"])
        inputs = {name: where.tensor(arrays[name]).requires_grad_() for name in case["inputs"]}
        outputs = operator(case["options"], **inputs)
        terms = [(outputs[name[5:]] * where.tensor(arrays[name])).sum() for name in case["grad_outputs"]]
        loss = torch.stack(terms).sum()
        wanted = [inputs[name] for name in case["grads"]]
        grads = dict(zip(case["grads"], torch.autograd.grad(loss, wanted, materialize_grads=True)))
        for kind, found, expected in (("", outputs, case["outputs"]), ("grad of ", grads, case["grads"])):
            for name, entry in expected.items():
                error = golden.relative_error(_array(found[name]), entry["value"])
                yield Line(f"case {case['case']} {kind}{name}", error, bound)


def _selective_scan(options: dict[str, Any], **inputs: Tensor) -> dict[str, Tensor]:
    y, last = selective_scan_fn(**inputs, delta_softplus=options["softplus"], return_last_state=True)
    return {"out": y, "last_state": last}


def _causal_conv1d(options: dict[str, Any], **inputs: Tensor) -> dict[str, Tensor]:
    y, last = causal_conv1d_fn(**inputs, activation=options["activation"], return_final_states=True)
    return {"out": y, "final_states": last}


def _mamba2_ssd(options: dict[str, Any], **inputs: Any) -> dict[str, Tensor]:
    y, last = mamba_chunk_scan_combined(**inputs, dt_softplus=options["dt_softplus"], return_final_states=True)
    return {"y": y, "final_state": last}


def _scan2d(options: dict[str, Any], **inputs: Tensor) -> dict[str, Tensor]:
    """y, and the states hs one by one: what y would be if C read that one alone."""
    x, top, left, A_top, A_left, B_top, B_left, C, D = (inputs[name] for name in SCAN2D)
    read = partial(scan2d, x, top, left, A_top, A_left, B_top, B_left)
    states = []
    with torch.no_grad():
        for n in range(C.shape[-1]):
            one = torch.zeros_like(C)
            one[..., n] = 1
            states.append(read(one))
    return {"y": read(C, D), "hs": torch.stack(states, -1)}


SCAN2D = ("x", "deltaT", "deltaL", "AT", "AL", "BT", "BL", "C", "D")


def _scan2d_projected(options: dict[str, Any], **p: Tensor) -> dict[str, Tensor]:
    rank, n = p["dt_projT_weight"].shape[1], p["AT_log"].shape[1]
    top, left, B_top, B_left, C = (p["x"] @ p["x_proj_weight"].T).split([rank, rank, n, n, n], -1)
    top = linear(top, p["dt_projT_weight"], p["dt_projT_bias"])
    left = linear(left, p["dt_projL_weight"], p["dt_projL_bias"])
    A_top, A_left = -p["AT_log"].exp(), -p["AL_log"].exp()
    return {"y": scan2d(p["x"], top, left, A_top, A_left, B_top, B_left, C, p["D"], delta_softplus=True)}


OPERATORS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "selective_scan": _selective_scan,
    "causal_conv1d": _causal_conv1d,
    "mamba2_ssd": _mamba2_ssd,
    "mamba2d.scan2d_core": _scan2d,
    "mamba2d.scan2d_projected": _scan2d_projected,
}


def _summary_lines(content: dict[str, Any], where: Where) -> Iterator[Line]:
    """Operators without parameters whose outputs are summaries, as models' are."""
    entry = (content["source"]["repo"], content["variant"])
    if entry not in SUMMARIES:
        yield Line("", skipped=f"no op here stands for {entry[1]} of {entry[0]}")
        return
    for number, case in enumerate(content["cases"]):
        inputs = {name: where.tensor(array) for name, array in golden.inputs(case["inputs"], number).items()}
        outputs = SUMMARIES[entry](**inputs)
        for name, summary in case["outputs"].items():
            error = golden.mismatch(_array(outputs[name]), summary)
            yield Line(f"case {number} {name}", error, MODEL_BOUND[where.dtype])


def _scan_and_merge(order: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x (b, c, h, w) as sequences (b, k, c, t), and sequences y back on the grid of x and summed, (b, c, h w)."""
    table = scan_table(order, tuple(x.shape[-2:]), x.device)
    sequences = to_sequences(x.flatten(2).transpose(1, 2), table)
    merged = to_grid(y.transpose(2, 3), table, x.shape[-2] * x.shape[-1]).sum(1)
    return sequences.transpose(2, 3), merged.transpose(1, 2)


def _vmamba_scans(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    outputs = {}
    for published, order in (("cross2d", "cross"), ("unidi", "unidi"), ("bidi", "bidi"), ("rot90", "rot90")):
        outputs[f"scan_{published}"], outputs[f"merge_{published}"] = _scan_and_merge(order, x, y)
    return outputs


def _efficient_scan(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return dict(zip(("scan", "merge"), _scan_and_merge("atrous", x, y)))


def _vmamba_selective_scan(
    u: Tensor, delta: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> dict[str, Tensor]:
    biased, _ = selective_scan_fn(u, delta, -A_log.exp(), B, C, D, None, delta_bias, True, return_last_state=True)
    plain, _ = selective_scan_fn(u, delta.abs(), -A_log.exp(), B, C, return_last_state=True)
    return {"y_softplus_bias_D": biased, "y_no_softplus": plain}


SUMMARIES: dict[tuple[str, str], Callable[..., dict[str, Tensor]]] = {
    ("MzeroMiko/VMamba", "ops_cross_scan"): _vmamba_scans,
    ("MzeroMiko/VMamba", "ops_selective_scan"): _vmamba_selective_scan,
    ("TerryPei/EfficientVMamba", "ops_efficient_scan"): _efficient_scan,
}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
