"""Write the tables that come from the zoo: the one in README.md and docs/models.md. ``--check`` only compares."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from vssm.cli.models import HEADER, row
from vssm.models.variant import Variant, Weights, families, variants
from vssm.registries.zoo import list_models

ROOT = Path(__file__).resolve().parent.parent
EVALUATE = "vssm train validate --config configs/classification/imagenet_eval.yaml"
INTRODUCTION = """# Models

Written by `make docs` from the rows in `vssm/models`. Do not edit.

Key names, preprocessing and accuracies are those of the published code and papers.
**No published file could be opened here and no ImageNet was at hand: none of the commands below has been run.**
Each is what would reproduce the published top-1 on the 50,000 validation images of ImageNet-1k;
the folder holds `val/CLASS/IMAGE`. The first use of a model's weights downloads the file;
where that fails, the error says what to fetch by hand and where to put it.
"""


def names() -> list[str]:
    """Every model but the tiny ones for tests."""
    return [name for name in list_models() if not name.startswith("test_")]


def members(family: ModuleType) -> list[Variant]:
    return [variants()[name] for name in names() if variants()[name] in family.VARIANTS]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the header."""
    header, *body = rows
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ("---",) * len(header), *body))


def span(texts: Iterable[str], unit: str) -> str:
    """"7.1 M", "97.6 M" -> "7.1–97.6 M"; a dash where there is nothing."""
    numbers = sorted(float(text.removesuffix(unit)) for text in texts if text != "–")
    if not numbers:
        return "–"
    return "–".join(f"{number:g}" for number in dict.fromkeys((numbers[0], numbers[-1]))) + unit


def family_row(family: ModuleType) -> tuple[str, ...]:
    """A line of README's table."""
    cells = [row(variant.name) for variant in members(family)]
    listed = ", ".join(f"`{name}`" for name, *_ in cells)
    title = family.__doc__.partition(":")[0]
    code = f"[{title}](https://github.com/{family.REPOSITORY})"
    licences = ", ".join(sorted({licence for *_, licence, _ in cells} - {"–"})) or "–"
    paper = ", ".join(sorted({paper for *_, paper in cells} - {"–"})) or "–"
    return (code, listed, span((count for _, count, *_ in cells), " M"),
            span((top1 for *_, top1, _, _ in cells), " %"), licences, paper)  # fmt: skip


def readme(text: str) -> str:
    """README with the table between its two comments replaced."""
    header = ("family", "models", "parameters", "top-1 as published", "licence of weights", "paper")
    table = markdown([header, *map(family_row, families())])
    replaced, count = re.subn(
        r"(?s)(<!-- models: .*? -->\n).*?(<!-- /models -->)", lambda found: f"{found[1]}{table}\n{found[2]}", text
    )
    if count != 1:
        raise SystemExit("tools/docs.py: README.md must have <!-- models: … --> and <!-- /models --> once")
    return replaced


def page() -> str:
    """docs/models.md: all variants in one table, then a section a family and a part a variant."""
    table = markdown([HEADER, *((f"[`{name}`](#{name})", *cells) for name, *cells in map(row, names()))])
    parts = [INTRODUCTION, f"{table}\n"]
    for family in families():
        introduction = family.__doc__.strip().partition("\n\n")[0].replace("\n", " ").rstrip(".")
        code = f"[{family.REPOSITORY}](https://github.com/{family.REPOSITORY})"
        parts.append(f"## {introduction}\n\nPublished code: {code}.\n")
        parts += [section(variant) for variant in members(family)]
    return "\n".join(parts)


def section(variant: Variant) -> str:
    """What there is to know about one variant."""
    cells = row(variant.name)
    lines = [f"### {variant.name}", ""]
    if variant.description:
        lines += [f"{variant.description[0].upper()}{variant.description[1:]}.", ""]
    lines += [f"{cells[1]} parameters." + ("" if variant.weights else " No published weights."), ""]
    for tag, weights in variant.weights.items():
        lines += weights_lines(f"{variant.name}.{tag}", weights)
    return "\n".join(lines)


def weights_lines(name: str, weights: Weights) -> list[str]:
    """One published file: where it is, how it was evaluated, what reproduces its accuracy."""
    where = weights.url or (f"https://huggingface.co/{weights.hf_hub_id}" if weights.hf_hub_id else weights.file)
    file = weights.hf_hub_filename or where.rpartition("/")[2]
    height, width = weights.input_size[1:]
    entry = f", entry `{weights.key}`" if weights.key else ""
    top1 = "" if weights.top1 is None else f" Published top-1: {weights.top1} %."
    return [
        f"- `{name}`: [{file}]({where}), licence {weights.license}, {weights.paper}{entry}.{top1}",
        f"- Evaluation: {height}×{width}, {weights.interpolation}, crop {weights.crop_pct}, "
        f"mean {weights.mean}, std {weights.std}.",
        *([f"- {weights.notes}"] if weights.notes else []),
        "",
        "```bash",
        f"{EVALUATE} --model.init_args.model={name} --data.init_args.root=/path/to/imagenet",
        "```",
        "",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a file is not up to date")
    check = parser.parse_args().check
    status = 0
    pages = {ROOT / "README.md": readme, ROOT / "docs" / "models.md": lambda text: page()}
    for path, make in pages.items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = make(old)
        if new == old:
            continue
        status = 1
        if not check:
            path.write_text(new, encoding="utf-8")
        print(f"{path.relative_to(ROOT)} {'is not up to date; run make docs' if check else 'is written'}")
    return status if check else 0


if __name__ == "__main__":
    raise SystemExit(main())
