"""List the models: parameters, published accuracy, licence of the published weights, paper."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache

import torch

from vssm.models.variant import Variant
from vssm.registries.zoo import find, list_models

__all__ = ["HEADER", "main", "row"]

HEADER = ("model", "parameters", "input", "top-1 as published", "licence of weights", "paper")


def parameters(variant: Variant) -> int:
    """Number of parameters, counted without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in variant.build().parameters())


@cache
def row(name: str) -> tuple[str, ...]:
    """One line of the table, a text for each entry of HEADER; a dash where there is nothing published."""
    variant = find(name)
    count = f"{parameters(variant) / 1e6:.1f} M"
    if not variant.weights:
        return (name, count, "–", "–", "–", "–")
    weights = next(iter(variant.weights.values()))
    height, width = weights.input_size[1:]
    top1 = "–" if weights.top1 is None else f"{weights.top1:.1f} %"
    return (name, count, f"{height}×{width}", top1, weights.license, weights.paper)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths)).rstrip() for line in rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vssm models", description=__doc__)
    parser.add_argument("pattern", nargs="*", default=["*"], help="names with wildcards, such as 'vim_*'")
    parser.add_argument("--pretrained", action="store_true", help="only models with published weights")
    parser.add_argument("--family", help="only one family, such as vmamba")
    parser.add_argument("--license", help="only weights under this licence; 'commercial-ok' for any that allows it")
    args = parser.parse_args(argv)
    names = list_models(args.pattern, pretrained=args.pretrained, family=args.family, license=args.license)
    if not names:
        print("vssm models: no model fits; 'vssm models' lists them all")
        return 1
    print(table([HEADER, *map(row, names)]))
    return 0
