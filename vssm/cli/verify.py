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
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vssm.checkpoints import load_state
from vssm.cli import _golden as golden
from vssm.cli._operators import OPERATORS, SUMMARIES
from vssm.kernels import use_backend
from vssm.kernels.backends import BACKENDS
from vssm.models import variant as rows
from vssm.models.keys import to_published
from vssm.scans import published as scans

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


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
