"""Write what was measured into the docs: docs/speed.md, README's table of speed, and the pictures of docs/kernels.md.

Everything comes from docs/benchmarks/*.json, which ``tools/benchmark.py … --json FILE`` wrote. ``--check`` compares.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from pages import ROOT, markdown, with_block, write

RESULTS = ROOT / "docs" / "benchmarks"
YARDSTICK = "swin_tiny_patch4_window7_224"
TIMM = (YARDSTICK, "convnext_tiny", "deit_small_patch16_224")
# On the same GPU with torch 2.11: inference and training images a second, GB in training.
PUBLISHED = {
    "vmamba_tiny_s1l8": (2877, 1024, 13.1),
    "vanilla_vmamba_tiny": (828, 245, 15.3),
    "vim_tiny": (2223, 716, 5.0),
    "vim_small": (2231, 553, 9.6),
    "vim_tiny@1248": (83, 24, 4.5),
}
FIGURES = ("inference img/s", "training img/s", "training GB")
MODES = ("eager", "graphed", "compiled")
Row = dict[str, Any]


def results(suite: str) -> list[Row]:
    """Rows of every file of this suite, each with the machine it came from; a later file wins."""
    rows: dict[tuple[str, str], Row] = {}
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["suite"] == suite:
            for row in record["rows"]:
                rows[row.get("case", row.get("model")), row.get("mode", "")] = row | {"machine": record["machine"]}
    return list(rows.values())


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def machines(rows: Sequence[Row]) -> str:
    """Each machine once: device, driver and versions."""
    texts = (", ".join(f"{key} {value}" for key, value in row["machine"].items() if key != "vssm") for row in rows)
    return "; ".join(dict.fromkeys(text.removeprefix("device ") for text in texts))


def table_of_models(rows: Sequence[Row]) -> str:
    """A line a model and mode, with its place beside Swin-T in the same mode."""
    yardstick = {row["mode"]: row for row in results("models") if row["model"] == YARDSTICK}
    lines = []
    for row in rows:
        name = f"`{row['model']}`" + (" (timm)" if row["model"] in TIMM else "")
        mode = row["mode"] + (" (≥)" if row.get("bound") else "")
        if "error" in row:
            lines.append((name, mode, row["error"][:150].replace("|", "/"), *("–",) * 5))
            continue
        same = yardstick.get(row["mode"], {})
        beside = [f"{row[key] / same[key]:.2f}" for key in FIGURES[:2] if comparable(row, same, key)]
        figures = [shown(row.get(key)) for key in ("inference img/s", "inference GB", "training img/s", "training GB")]
        images = f"{row['batch']} × {row['size'].replace('×', '·')}"
        lines.append((name, mode, images, *figures, ", ".join(beside) or "–"))
    header = ("model", "mode", "images", "inference img/s", "GB", "training img/s", "GB", "× Swin-T")
    return markdown(header, lines)


def comparable(row: Row, yardstick: Row, key: str) -> bool:
    """Whether both were measured, on images of one size, as many a step."""
    alike = "bound" not in row and all(row.get(what) == yardstick.get(what) for what in ("size", "batch", "mode"))
    return alike and key in row and key in yardstick and row["model"] != YARDSTICK


def slower(rows: Sequence[Row]) -> str:
    """Which of our classifiers are slower than Swin-T in the same mode, and how much."""
    yardstick = {row["mode"]: row for row in rows if row["model"] == YARDSTICK}
    found = []
    for row in rows:
        same = yardstick.get(row["mode"], {})
        for key, what in zip(FIGURES[:2], ("inference", "training"), strict=True):
            if row["model"] not in TIMM and comparable(row, same, key) and row[key] < same[key]:
                found.append(f"`{row['model']}` {row['mode']} {what} ({row[key] / same[key]:.2f} ×)")
    return "Slower than Swin-T: " + (", ".join(found) or "none") + "."


def short_table(rows: Sequence[Row]) -> str:
    """README's: a line a model."""
    by_model: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["mode"]] = row
    lines = []
    for name, modes in by_model.items():
        peer = PUBLISHED.get(name)
        cells = [", ".join(shown(modes.get(mode, {}).get(key)) for key in FIGURES) for mode in MODES]
        published = ", ".join(f"{figure:g}" for figure in peer) if peer else "–"
        lines.append((f"`{name}`" + (" (timm)" if name in TIMM else ""), published, *cells))
    return markdown(("model", "published code", "ours, eager", "CUDA graph", "torch.compile"), lines)


def classifiers() -> list[Row]:
    names = (*PUBLISHED, *TIMM)
    rows = [row for row in results("models") if row["model"] in names and row["mode"] in MODES]
    return sorted(rows, key=lambda row: names.index(row["model"]))


def page() -> str:
    """docs/speed.md."""
    rows = results("models")
    first = classifiers()
    cores = [row for row in rows if "without core" in row["mode"]]
    others = [row for row in rows if row not in first and row not in cores]
    families = [row for row in others if row.get("size", "224×224") == "224×224"]
    dense = [row for row in others if row not in families]
    parts = [
        "# Speed of whole models",
        "Written by `make docs` from `docs/benchmarks/*.json`. Do not edit. `vssm benchmark models` measures again.",
        f"{machines(rows)}. bf16 autocast, random weights and images, AdamW; median over 0.6 s of steps or more, "
        "launches included; GB is the peak that PyTorch allocates, weights and optimizer included. *graphed*: the "
        "whole step is replayed from a CUDA graph. *compiled*: `torch.compile(fullgraph=True)`; *blocks*: of each "
        "block alone. *× Swin-T*: inference and training over timm's Swin-T in the same mode, below 1 is slower. (≥): "
        "other processes used the GPU meanwhile. Eager rows were taken while other processes kept the machine's CPU "
        "busy, rates of graphed ones one after another on a GPU of their own; backward of classifiers ran on the "
        "calling thread, as under `vssm train`. Eager rows of GroupMamba, Spatial-Mamba, VSSD, Mamba2D, detectors and "
        "segmenters are of earlier versions.",
        "## Classifiers",
        table_of_models(first),
        slower(first),
    ]
    sections = (
        ("The share of the scan", "The same models with the identity in the place of each scan with its projections; "
         "eager rows on a machine whose CPU is half as fast.",
         cores),
        ("Families", "The two smallest variants of each family.", families),
        ("Detectors and segmenters",
         "Batches of inference and of training. Detectors: 800 × 1280, eight boxes with masks an image, 80 classes; "
         "weights are random, so that hardly a box passes the threshold of scores and what follows it costs nothing.",
         dense),
    )  # fmt: skip
    for title, words, measured in sections:
        if measured:
            parts += [f"## {title}", words, table_of_models(measured)]
    return "\n\n".join(parts) + "\n"


def readme(text: str) -> str:
    rows = classifiers()
    return with_block(text, "speed", f"{short_table(rows)}\n\n{slower(rows)}")


STYLE = (
    "text{font:12px sans-serif;fill:#333}.s{font-size:11px;fill:#666}.t{font-size:14px}"
    ".ours{fill:#2f6fb0}.peer{fill:#c9ced6}.floor{stroke:#c0392b;stroke-width:2}"
    ".cell{fill:#eef2f7;stroke:#8fa3b8}.warm{fill:#f6d9a8;stroke:#b98a3a}.line{stroke:#555;fill:none}"
)


def svg(width: int, height: int, parts: Iterator[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f'<style>{STYLE}</style>\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def chart(rows: Sequence[Row]) -> str:
    """Measured times of the kernels beside the published path and the floor, on a logarithmic axis."""
    left, wide, step, low, high = 150, 330, 34, 0.001, 40.0

    def at(ms: float) -> float:
        return wide * math.log(max(ms, low) / low) / math.log(high / low)

    def draw() -> Iterator[str]:
        panels = (("forward", 0), ("both", wide + 40))
        for what, offset in panels:
            title = "forward" if what == "forward" else "forward + backward"
            yield text(left + offset, 18, f"{title}, ms (logarithmic)", "t")
            for ms in (0.01, 0.1, 1, 10):
                x = left + offset + at(ms)
                bottom = 30 + step * len(rows)
                yield f'<path class="line" stroke-opacity=".25" d="M{x:.1f} 26V{bottom}"/>'
                yield text(x, bottom + 14, f"{ms:g}", "s", "middle")
        for i, row in enumerate(rows):
            y = 30 + i * step
            yield text(left - 8, y + 18, row["case"], "", "end")
            for what, offset in panels:
                ours, peer = row[f"{what} ms"], row[f"{what} peer"]
                x = left + offset
                yield f'<rect class="ours" x="{x}" y="{y}" width="{at(ours):.1f}" height="12"/>'
                yield f'<rect class="peer" x="{x}" y="{y + 13}" width="{at(peer):.1f}" height="12"/>'
                yield text(x + at(peer) + 4, y + 18, f"{peer / ours:.1f} ×", "s")
                if what == "forward":
                    floor = x + at(row["forward floor"])
                    yield f'<path class="floor" d="M{floor:.1f} {y - 1}v27"/>'
        y = 30 + step * len(rows) + 34
        for x, kind, words in ((left, "ours", "vssm"), (left + 90, "peer", "published CUDA path")):
            yield f'<rect class="{kind}" x="{x}" y="{y - 10}" width="12" height="12"/>'
            yield text(x + 18, y, words)
        yield f'<path class="floor" d="M{left + 250} {y - 11}v14"/>'
        yield text(left + 258, y, "floor: bytes over bandwidth, or exponentials over their rate")
        yield text(left + 18, y + 20, machines(rows[:1]), "s")

    return svg(left + 2 * wide + 100, 30 + step * len(rows) + 66, draw())


def algorithm() -> str:
    """How a row of a scan is cut into chunks, and what the three kernels do."""

    def draw() -> Iterator[str]:
        yield text(20, 24, "One row: cells in the order of the table, in chunks that run at the same time", "t")
        for i in range(16):
            yield f'<rect class="{"cell" if i // 4 % 2 else "warm"}" x="{20 + i * 44}" y="40" width="40" height="28"/>'
            yield text(40 + i * 44, 59, f"p{i}", "s", "middle")
        stages = (
            (110, "1  chunk_ends", "each chunk from a zero state: the state at its end, the sum S of its step sizes"),
            (190, "2  pass_states", "over the chunks alone, h ← exp(A S) h + end: the state before each chunk"),
            (270, "3  outputs", "each chunk again, from its own first state: y = C · h + D u, written to the cells"),
        )
        for number, (y, name, words) in enumerate(stages):
            yield text(20, y, name, "t")
            yield text(150, y, words, "s")
            for chunk in range(4):
                x = 20 + chunk * 176
                if number == 1:
                    yield f'<circle class="warm" cx="{x + 172}" cy="{y + 26}" r="9"/>'
                    if chunk < 3:
                        yield f'<path class="line" d="M{x + 183} {y + 26}H{x + 337}l-7 -4m7 4l-7 4"/>'
                else:
                    yield f'<path class="line" d="M{x} {y + 26}H{x + 160}l-7 -4m7 4l-7 4"/>'
                    kind, end = ("cell", x) if number else ("warm", x + 168)
                    yield f'<circle class="{kind}" cx="{end}" cy="{y + 26}" r="6"/>'
        y = 350
        yield text(20, y, "Backward: states are computed again, interval by interval, from the last to the first", "t")
        for i in range(4):
            x = 20 + i * 176
            yield f'<rect class="cell" x="{x}" y="{y + 14}" width="170" height="56"/>'
            yield f'<circle class="warm" cx="{x}" cy="{y + 28}" r="6"/>'
            yield f'<path class="line" d="M{x + 10} {y + 28}H{x + 150}l-7 -4m7 4l-7 4"/>'
            yield f'<path class="line" d="M{x + 150} {y + 54}H{x + 10}l7 -4m-7 4l7 4"/>'
            yield text(x + 160, y + 32, "h", "s", "middle")
            yield text(x + 160, y + 58, "dh", "s", "middle")
        yield f'<circle class="warm" cx="28" cy="{y + 92}" r="6"/>'
        yield text(42, y + 96, "kept by the forward pass: the state at the start of an interval", "s")
        yield text(400, y + 96, "→ states again    ← adjoint, gradients of u, delta, B, C", "s")

    return svg(740, 460, draw())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a file is not up to date")
    pages = {
        "README.md": readme((ROOT / "README.md").read_text(encoding="utf-8")),
        "docs/speed.md": page(),
        "docs/chunks.svg": algorithm(),
        "docs/kernels.svg": chart(results("kernels")),
    }
    return write(pages, parser.parse_args(argv).check)


if __name__ == "__main__":
    raise SystemExit(main())
