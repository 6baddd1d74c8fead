"""List the models: task, parameters, published accuracy, licences of code and of published weights, paper."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from types import ModuleType

from vssm.cli._tables import text_table
from vssm.models.variant import Variant, families
from vssm.registries.zoo import find, list_models, parameters

__all__ = ["HEADER", "code_license", "main", "numbers", "row"]

HEADER = (
    "model", "task", "parameters", "GFLOPs", "input", "as published", "licence of code", "licence of weights", "paper"
)  # fmt: skip
NOTHING = "–"


def numbers(name: str) -> tuple[str, str]:
    """Parameters and GFLOPs (as papers count them) of a model, for its own input size; a dash if that is not enough."""
    from vssm.cli.flops import Uncounted, flops_of

    try:
        return count(name), f"{flops_of(name).as_papers_count / 1e9:.2f}"
    except Uncounted:
        return count(name), NOTHING


def count(name: str) -> str:
    """Parameters of a model, in millions."""
    return f"{parameters(name) / 1e6:.1f} M"


def row(name: str, known: tuple[str, str] | None = None) -> tuple[str, ...]:
    """One line of the table, a text for each entry of HEADER; a dash where there is nothing published.

    ``known`` are the model's ``numbers`` if somebody has counted them; without them GFLOPs are not counted.
    """
    from vssm.cli.flops import input_size

    variant, family = find(name), family_of(name)
    counted, gflops = known or (count(name), NOTHING)
    size = "×".join(map(str, input_size(variant)))
    paper = re.search(r"arXiv:\d{4}\.\d{4,5}", family.__doc__)
    origin = paper[0] if paper else NOTHING
    if not variant.weights:
        return (name, variant.task, counted, gflops, size, NOTHING, code_license(family), NOTHING, origin)
    weights = next(iter(variant.weights.values()))
    reached = re.search(r"(\w+) as published: ([\d.]+)", weights.notes)
    score = f"{reached[2]} {reached[1]}" if reached else NOTHING
    score = score if weights.top1 is None else f"{weights.top1:.1f} % top-1"
    return (
        name, variant.task, counted, gflops, size, score, code_license(family), weights.license, weights.paper
    )  # fmt: skip


def family_of(name: str) -> ModuleType:
    """The module that declares a model."""
    variant: Variant = find(name)
    return next(family for family in families() if variant in family.VARIANTS)


def code_license(family: ModuleType) -> str:
    """Licence of a family's published code, which its docstring names behind the repository."""
    repository = re.escape(family.REPOSITORY)
    found = re.search(rf"github\.com/{repository},? \(?([^,;:)]+)", " ".join(family.__doc__.split()))
    if found is None:
        raise ValueError(f"{family.__name__}: the docstring must name github.com/{family.REPOSITORY} (LICENCE)")
    name = found[1].lower()
    return "none" if name.startswith("no licence") else name


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vssm models", description=__doc__)
    parser.add_argument("pattern", nargs="*", default=["*"], help="names with wildcards, such as 'vim_*'")
    parser.add_argument("--pretrained", action="store_true", help="only models with published weights")
    parser.add_argument("--task", help="only classification, segmentation, detection or pretraining")
    parser.add_argument("--family", help="only one family, such as vmamba")
    parser.add_argument("--scan", help="only models that can be made with this scan order")
    parser.add_argument("--license", help="only weights under this licence; 'permissive' for any permissive one")
    parser.add_argument("--params-below", type=float, metavar="N", help="only models with fewer parameters, 30e6")
    parser.add_argument("--flops", action="store_true", help="count GFLOPs too, a second or two for each model")
    args = parser.parse_args(argv)
    asked = any(pattern.startswith("test_") for pattern in args.pattern)  # for the models that tests use
    try:
        names = list_models(
            args.pattern, exclude=() if asked else "test_*", pretrained=args.pretrained, task=args.task,
            family=args.family, scan=args.scan,
            license=args.license, params_below=args.params_below,
        )  # fmt: skip
    except ValueError as error:
        print(f"vssm models: {error}", file=sys.stderr)
        return 2
    if not names:
        print("vssm models: no model fits; 'vssm models' lists them all")
        return 1
    rows = [HEADER, *(row(name, numbers(name) if args.flops else None) for name in names)]
    if not args.flops:
        rows = [line[:3] + line[4:] for line in rows]
    print(text_table(rows))
    return 0
