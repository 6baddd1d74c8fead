"""A family small enough to load, save and spoil in a few milliseconds, with every kind of key rule."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vssm.models import variant as rows
from vssm.models.base import Hierarchical, Stage
from vssm.models.keys import also, drop, rename, reshape, split, stack
from vssm.models.variant import NotCovered, Published, Variant, Weights


class Block(nn.Module):
    """Uses each of its parameters. (B, C, H, W) in and out."""

    def __init__(self, dim: int):
        super().__init__()
        self.A = nn.Parameter(torch.rand(2, dim, 3))
        self.D = nn.Parameter(torch.rand(2, dim))
        self.up, self.gate = nn.Conv2d(dim, dim, 1, bias=False), nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.A.mean(-1) + self.D).sum(0)[:, None, None]
        return x + self.up(x) * self.gate(x).sigmoid() * scale


class Stem(nn.Module):
    """Patches of 4 pixels and a position table. (B, C, H, W) to (B, dim, H/4, W/4)."""

    def __init__(self, in_chans: int, dim: int, img_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 4, 4)
        self.pos_embed = nn.Parameter(torch.randn(1, dim, img_size // 4, img_size // 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.pos_embed


class Toy(Hierarchical):
    """Four stages of blocks."""

    def __init__(self, depth=1, dim=4, img_size=64, in_chans=3, num_classes=10, global_pool="avg", scan="cross"):
        stem = Stem(in_chans, dim, img_size if isinstance(img_size, int) else img_size[0])
        stages = [Stage(nn.MaxPool2d(2) if i else nn.Identity(), [Block(dim) for _ in range(depth)]) for i in range(4)]
        norm = nn.GroupNorm(1, dim)
        super().__init__(stem, stages, [dim] * 4, norm, num_classes=num_classes, global_pool=global_pool)
        self.scan = scan

    def adapt_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        size = self.stem.pos_embed.shape[-2:]
        return {**state, "stem.pos_embed": F.interpolate(state["stem.pos_embed"], size, mode="bicubic")}


KEYS = [
    also(rename(r"\.self_attention\.", ".op.")),
    also(reshape(r"\.op\.proj\.weight$", "o i -> o i 1 1")),
    drop(r"^table$"),
    stack(("op.D", "op.D_b"), "D"),
    split("op.proj.weight", ("up.weight", "gate.weight")),
    reshape(r"\.op\.A_logs$", "(k d) n -> k d n"),
    rename(r"\.op\.A_logs$", ".A"),
    rename(r"^patch_embed\.", "stem.conv."),
    rename(r"^pos_embed$", "stem.pos_embed"),
    rename(r"^layers\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    rename(r"^head\.", "head.fc."),
]
WEIGHTS = Weights(
    url="https://toy.invalid/releases/%23v1/toy_small.pth", license="MIT", origin_url="https://toy.invalid", paper="",
    num_classes=10, input_size=(3, 64, 64), key="model",
)  # fmt: skip
COMMON = {"first_conv": "stem.conv", "classifier": "head.fc", "pool_size": (2, 2), "fixed_input_size": True}
VARIANTS = [
    Variant("toy_tiny", Toy, {"depth": 1}, KEYS, {"in10": Weights(
        hf_hub_id="toy/toy", hf_hub_filename="toy_tiny.safetensors", license="CC-BY-NC-4.0",
        origin_url="https://toy.invalid", paper="", num_classes=10, input_size=(3, 64, 64))}, **COMMON),
    Variant("toy_small", Toy, {"depth": 2}, KEYS, {"in10": WEIGHTS}, **COMMON),
    Variant("toy_base", Toy, {"depth": 2, "dim": 8, "img_size": 64}, KEYS, **COMMON),
]  # fmt: skip


def published(entry: str, kwargs: dict) -> Published:
    if entry != "toy.py:Toy":
        raise NotCovered(f"{entry} is not in the toy family")

    def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        maps = model.forward_intermediates(inputs["x"], intermediates_only=True)
        return {"logits": model(inputs["x"]), "stage0": maps[0]}

    return Published(Toy(**kwargs), KEYS, run)


def family() -> ModuleType:
    """What ``vssm.models.toy`` would be."""
    module = ModuleType("vssm.models.toy")
    module.VARIANTS, module.KEYS, module.REPOSITORY, module.published = VARIANTS, KEYS, "toy/toy", published
    return module


def save_as_trained(state: dict[str, Tensor], path: Path, *, legacy: bool = False) -> None:
    """Write a file as published training scripts leave it: an argparse namespace and a yacs node beside the weights.

    The package yacs exists only while this runs.
    """
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    package, module = ModuleType("yacs"), ModuleType("yacs.config")
    module.CfgNode = node
    config = node(MODEL=node(TYPE="vssm", DEPTHS=[2, 2]), TAG="x")
    config.__dict__["__immutable__"] = True
    content = {"model": state, "epoch": 300, "config": config, "args": Namespace(lr=1e-3, model="toy")}
    sys.modules |= {"yacs": package, "yacs.config": module}
    try:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    finally:
        del sys.modules["yacs"], sys.modules["yacs.config"]


@contextmanager
def zoo_of_toys() -> Iterator[None]:
    """The zoo holds this family alone."""
    found = rows.families
    rows.families = lambda: (family(),)
    rows.variants.cache_clear()
    try:
        yield
    finally:
        rows.families = found
        rows.variants.cache_clear()
