"""Write the tables that come from the zoo: the one in README.md and docs/models.md. ``--check`` only compares.

Parameters and GFLOPs of a model that stands in docs/models.md already are taken from there; ``--recount`` counts all.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import published
from pages import ROOT, markdown, with_block, write

from vssm.cli.flops import PUBLISHED
from vssm.cli.models import HEADER, numbers, row
from vssm.models.variant import Variant, Weights, families, variants
from vssm.registries.zoo import list_models

EVALUATE = "vssm train validate --config configs/classification/imagenet_eval.yaml"
INTRODUCTION = """# Models

Written by `make docs` from the rows in `vssm/models`. Do not edit.

Key names, preprocessing and accuracies are those of the published code and papers.
**No published file could be opened here and no ImageNet was at hand: none of the commands below has been run.**
Each is what would reproduce the published top-1 on the 50,000 validation images of ImageNet-1k;
the folder holds `val/CLASS/IMAGE`. The first use of a model's weights downloads the file;
where that fails, the error says what to fetch by hand and where to put it.

GFLOPs are counted by `vssm flops` on one image (or volume) of the size in the table, as papers on vision Mamba count:
multiply-adds, and 9 for each step, channel and state of a scan. In brackets stands the published figure.
VMamba, PlainMamba, Spatial-Mamba and LocalVMamba count so, and agree within 2 %. MSVMamba and VSSD differ by up to 4 %.
The figures of Vim and LocalVim lie between ours with the scan and ours without it.

Each family's section says with which commit of the published code it was compared, and what of it ours repeats though
the paper or common sense would say otherwise (what the sources mark with "As published").
"""
TWIN = "_nomamba"  # a model's twin without Mamba; README does not name them one by one
Known = Mapping[str, tuple[str, str]]  # parameters and GFLOPs by model


def names() -> list[str]:
    """Every model but the tiny ones for tests."""
    return [name for name in list_models() if not name.startswith("test_")]


def known_from(page: str) -> dict[str, tuple[str, str]]:
    """Parameters and GFLOPs that a written docs/models.md holds."""
    rows = [[cell.strip() for cell in text.split("|")[1:-1]] for text in page.splitlines() if text.startswith("| [`")]
    cells = [dict(zip(HEADER, row)) for row in rows if len(row) == len(HEADER)]
    return {
        re.findall("`(.*?)`", cell["model"])[0]: (cell["parameters"], cell["GFLOPs"].partition(" ")[0])
        for cell in cells
    }


def line(name: str, known: Known) -> tuple[str, ...]:
    """A model's line of the table."""
    return row(name, known.get(name) or numbers(name))


def members(family: ModuleType) -> list[Variant]:
    return [variants()[name] for name in names() if variants()[name] in family.VARIANTS]


def span(texts: Iterable[str], unit: str) -> str:
    """"7.1 M", "97.6 M" -> "7.1–97.6 M"; a dash where there is nothing."""
    numbers = sorted(float(text.removesuffix(unit)) for text in texts if text != "–")
    if not numbers:
        return "–"
    return "–".join(f"{number:g}" for number in dict.fromkeys((numbers[0], numbers[-1]))) + unit


def family_row(family: ModuleType, known: Known) -> tuple[str, ...]:
    """A line of README's table."""
    cells = [dict(zip(HEADER, line(variant.name, known))) for variant in members(family)]
    cells = [cell for cell in cells if not cell["model"].endswith(TWIN)]
    listed = ", ".join(f"`{cell['model']}`" for cell in cells)
    tasks = ", ".join(dict.fromkeys(cell["task"] for cell in cells))
    title = family.__doc__.partition(":")[0]
    code = f"[{title}](https://github.com/{family.REPOSITORY})"
    top1 = span((cell["as published"] for cell in cells if "top-1" in cell["as published"]), " % top-1")
    weights, paper = (", ".join(sorted({cell[key] for cell in cells} - {"–"})) or "–"
                      for key in ("licence of weights", "paper"))  # fmt: skip
    return (code, tasks, listed, span((cell["parameters"] for cell in cells), " M"),
            span((cell["GFLOPs"] for cell in cells), ""), top1, cells[0]["licence of code"], weights,
            paper)  # fmt: skip


def readme(text: str, known: Known) -> str:
    """README with the table between its two comments replaced."""
    header = ("family", "task", "models", "parameters", "GFLOPs", "as published", "licence of code",
              "licence of weights", "paper")  # fmt: skip
    return with_block(text, "models", markdown(header, [family_row(family, known) for family in families()]))


def page(known: Known) -> str:
    """docs/models.md: all variants in one table, then a section a family and a part a variant."""
    lines = [line(name, known) for name in names()]
    table = markdown(HEADER, [linked(cells) for cells in lines])
    parts = [INTRODUCTION, f"{table}\n"]
    counted = {name: parameters for name, _, parameters, *_ in lines}
    for family in families():
        introduction = family.__doc__.strip().partition("\n\n")[0].replace("\n", " ").rstrip(".")
        code = f"[{family.REPOSITORY}](https://github.com/{family.REPOSITORY})"
        parts.append(f"## {introduction}\n\nPublished code: {code}.\n")
        parts += published.lines(family)
        parts += [section(variant, counted[variant.name]) for variant in members(family)]
    return "\n".join(parts)


def linked(cells: Sequence[str]) -> tuple[str, ...]:
    """A line with a link to the model's section, and the published GFLOPs beside ours."""
    name, task, parameters, gflops, *rest = cells
    published = f" ({PUBLISHED[name]:g})" if name in PUBLISHED else ""
    return (f"[`{name}`](#{name})", task, parameters, gflops + published, *rest)


def section(variant: Variant, parameters: str) -> str:
    """What there is to know about one variant."""
    lines = [f"### {variant.name}", ""]
    if variant.description:
        lines += [f"{variant.description[0].upper()}{variant.description[1:]}.", ""]
    lines += [f"{parameters} parameters." + ("" if variant.weights else " No published weights."), ""]
    for tag, weights in variant.weights.items():
        lines += weights_lines(f"{variant.name}.{tag}", weights)
        if variant.task == "classification":
            command = f"{EVALUATE} --model.init_args.model={variant.name}.{tag} --data.init_args.root=/path/to/imagenet"
            lines += ["", "```bash", command, "```"]
        lines += [""]
    return "\n".join(lines)


def weights_lines(name: str, weights: Weights) -> list[str]:
    """One published file: where it is, and how it was evaluated."""
    where = weights.url or (f"https://huggingface.co/{weights.hf_hub_id}" if weights.hf_hub_id else weights.file)
    file = weights.hf_hub_filename or where.rpartition("/")[2]
    size = "×".join(map(str, weights.input_size[1:]))
    entry = f", entry `{weights.key}`" if weights.key else ""
    top1 = "" if weights.top1 is None else f" Published top-1: {weights.top1} %."
    return [
        f"- `{name}`: [{file}]({where}), licence {weights.license}, {weights.paper}{entry}.{top1}",
        f"- Evaluation: {size}, {weights.interpolation}, crop {weights.crop_pct}, "
        f"mean {weights.mean}, std {weights.std}.",
        *([f"- {weights.notes}"] if weights.notes else []),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a file is not up to date")
    parser.add_argument("--recount", action="store_true", help="count parameters and GFLOPs of all models again")
    options = parser.parse_args()
    models = ROOT / "docs" / "models.md"
    known = known_from(models.read_text(encoding="utf-8")) if models.exists() and not options.recount else {}
    known |= {name: numbers(name) for name in names() if name not in known}
    front = readme((ROOT / "README.md").read_text(encoding="utf-8"), known)
    return write({"README.md": front, "docs/models.md": page(known)}, options.check)


if __name__ == "__main__":
    raise SystemExit(main())
