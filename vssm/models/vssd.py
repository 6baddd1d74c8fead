"""VSSD: Vision Mamba with Non-Causal State Space Duality (Shi et al., 2024, arXiv:2407.18559).

Four stages of mixer-and-MLP blocks. The mixer is Mamba-2 without an order: all cells write one state, each with a
weight of its own, and all read it, so there is nothing to scan; the last stage has plain attention instead.
Published code and weights: github.com/YuHengsss/VSSD (no licence; this is written from the paper and a description of
that code), weights on the Hugging Face hub. Same function; other key names, see KEYS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from vssm.layers.conv import depthwise
from vssm.layers.init import linear_like_transformers
from vssm.layers.layout import over_map
from vssm.layers.mlla import ConditionedBlock, InvertedDownsample, ResidualStem, UnitDownsample, UnitStem
from vssm.layers.norm import ChannelNorm, TokenNorm
from vssm.layers.parts import chosen
from vssm.layers.ssm import decay, dt_bias_
from vssm.models.backbone import StageMaps, run_backbone, run_classifier
from vssm.models.base import Hierarchical, make_stages, widths
from vssm.models.keys import Rule, rename
from vssm.models.names import MLLA, unread
from vssm.models.variant import NotCovered, Published, Variant, Weights, translated

REPOSITORY = "YuHengsss/VSSD"


class DualityMixer(nn.Module):
    """Non-causal state-space duality: write one state, read it everywhere. (B, L, C) tokens in and out.

        S = Σ_l B[l] ⊗ (dt[l] exp(A_log) x[l]),    y[l] = C[l] S + D x[l]

    S is (n, d), shared by all cells; dt, A and D have one value a head, B and C are common to the heads of a group.

    Args:
        dim: Channels C of the tokens.
        heads: Heads.
        d_state: States n of each channel.
        expand: Channels d of the state over C.
        groups: Of heads with a B and a C of their own. Head i is of group i modulo ``groups``.
        positive: The weight is dt exp(A_log); else it is -dt exp(A_log).
    """

    def __init__(
        self, dim: int, heads: int, d_state: int, *, expand: int = 2, groups: int = 1, positive: bool = True
    ):
        super().__init__()
        width = expand * dim
        if width % heads or heads % groups:
            raise ValueError(
                f"DualityMixer: heads must divide the {width} channels of the state, and groups the heads, got "
                f"heads={heads}, groups={groups}"
            )
        self.heads, self.groups, self.positive = heads, groups, positive
        self.splits = (width, groups * d_state, groups * d_state)
        self.in_proj = nn.Linear(dim, width + sum(self.splits) + heads, bias=False)
        self.conv, self.act = depthwise(sum(self.splits), 3), nn.SiLU()
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = TokenNorm(width, eps=1e-5)
        self.out_proj = nn.Linear(width, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        dt_bias_(self.dt_bias)
        with torch.no_grad():
            self.A_log.copy_(nn.init.uniform_(torch.empty_like(self.A_log), 1, 16).log())

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """``grid``: sizes of the grid whose cells the tokens are."""
        z, x, dt = self.in_proj(x).split((self.splits[0], sum(self.splits), self.heads), -1)
        u, B, C = self.act(over_map(self.conv, x, grid)).split(self.splits, -1)  # (b, l, d), (b, l, n) twice
        # As published: the weight is positive, and nothing divides the sum by the number of cells.
        A = -decay(self.A_log) if self.positive else decay(self.A_log)
        weight = nn.functional.softplus(dt + self.dt_bias) * A  # (b, l, heads)
        u = u.unflatten(-1, (self.heads, -1))
        written = (weight.type_as(u)[..., None] * u).unflatten(2, (-1, self.groups))
        B, C = (x.unflatten(-1, (self.groups, -1)).transpose(1, 2) for x in (B, C))  # (b, g, l, n)
        state = B.mT @ written.movedim(3, 1).flatten(3)  # (b, g, n, d / g)
        read = (C @ state).unflatten(-1, (self.heads // self.groups, -1)).movedim(1, 3)  # (b, l, heads / g, g, ·)
        y = read.flatten(2) + (self.D[:, None] * u).flatten(2)
        # As published: the norm stands before the gate, which has no activation.
        return self.out_proj(self.norm(y) * z)


class AttentionMixer(Attention):
    """Softmax attention between all cells. (B, L, C) tokens in and out."""

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        return super().forward(x)


MIXERS: dict[str, Callable[..., nn.Module]] = {  # by name: (dim, heads, d_state, …) -> module
    "duality": DualityMixer,
    "attention": lambda dim, heads, d_state, **options: AttentionMixer(dim, heads),
}
STEMS = {"conv": ResidualStem, "patch": UnitStem}
DOWNSAMPLES = {"inverted": InvertedDownsample, "conv": UnitDownsample}


class VSSD(Hierarchical):
    """VSSD classifier for images of any size. The defaults are ``vssd_tiny``.

    The published classifier takes multiples of 32 alone; its backbone takes any size, with the same arithmetic.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: As in timm.
        depths: Blocks of each stage.
        dim: Channels of the first stage, which double with every stage; or of all of them.
        heads: Heads of each stage's mixers.
        d_state, expand, groups, positive: Of the mixers, see ``DualityMixer``.
        mixers: Of each stage, ``"duality"`` or ``"attention"``.
        mlp_ratio: Hidden channels of the MLP over those of the block.
        stem: ``"conv"`` (five convolutions) or ``"patch"`` (one that does not overlap).
        downsample: ``"inverted"`` (three convolutions) or ``"conv"`` (one).
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 4, 8, 4),
        dim: int | Sequence[int] = 64,
        heads: Sequence[int] = (2, 4, 8, 16),
        d_state: int = 64,
        expand: int = 2,
        groups: int = 1,
        positive: bool = True,
        mixers: Sequence[str] = ("duality", "duality", "duality", "attention"),
        mlp_ratio: float = 4.0,
        stem: str = "conv",
        downsample: str = "inverted",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        dims = widths("VSSD", dim, depths)
        for name, values in (("heads", heads), ("mixers", mixers)):
            if len(values) != len(depths):
                raise ValueError(f"VSSD: {name} must name one a stage ({len(depths)} in depths), got {tuple(values)}")
        unknown = sorted(set(mixers) - set(MIXERS))
        if unknown:
            raise ValueError(f"VSSD: mixers must be of {', '.join(MIXERS)}, got {unknown[0]!r}")

        def block(i: int, j: int, rate: float) -> nn.Module:
            options = dict(expand=expand, groups=groups, positive=positive)
            mixer = MIXERS[mixers[i]](dims[i], heads[i], d_state, **options)
            return ConditionedBlock(dims[i], mixer, mlp_ratio, rate)

        make_stem = chosen("VSSD", "stem", stem, STEMS)
        make_downsample = chosen("VSSD", "downsample", downsample, DOWNSAMPLES)
        stages = make_stages(depths, dims, drop_path_rate, block, make_downsample)
        super().__init__(
            make_stem(in_chans, dims[0]), stages, dims, ChannelNorm(dims[-1]),
            num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate,
        )  # fmt: skip
        self.apply(linear_like_transformers)

    def no_weight_decay(self) -> set[str]:
        """Nothing beside vectors and biases, A_log, D and dt_bias among them, which timm leaves out by itself."""
        return set()


KEYS: list[Rule] = [
    rename(r"\.attn\.", r".mixer."),
    rename(r"\.mixer\.conv2d\.", r".mixer.conv."),
    rename(r"\.mixer\.to_qkv\.", r".mixer.qkv."),
    rename(r"\.mixer\.to_out\.", r".mixer.proj."),
    *MLLA,
]


def _weights(size: str, top1: float, mesa: float | None = None) -> dict[str, Weights]:
    """``mesa``: accuracy of a second file, trained with the loss of MESA."""

    def row(file: str, top1: float, key: str | None, notes: str = "") -> Weights:
        return Weights(
            "unknown", f"https://github.com/{REPOSITORY}", "arXiv:2407.18559", hf_hub_id="YuhengSSS/VSSD",
            hf_hub_filename=f"{file}.pth", key=key, top1=top1, notes=notes,
        )  # fmt: skip

    if mesa is None:
        return {"in1k": row(f"vssd_{size}_best", top1, None)}
    either = "the authors do not say whether model or model_ema reached the accuracy"
    return {
        "in1k": row(f"vssd_{size}_best_ema", top1, "model_ema"),
        "mesa_in1k": row(f"vssd_{size}_e300_with_mesa", mesa, None, either),
    }


def _variant(name: str, weights: Mapping[str, Weights] | None = None, description: str = "", **kwargs: Any) -> Variant:
    return Variant(
        name, VSSD, kwargs, KEYS, weights or {}, first_conv="stem.conv1.conv", classifier="head.fc", pool_size=(7, 7),
        description=description,
    )  # fmt: skip


VARIANTS = [
    _variant("vssd_micro", _weights("micro", 82.5), depths=(2, 2, 8, 4), dim=48, d_state=48, drop_path_rate=0.2),
    _variant("vssd_tiny", _weights("tiny", 83.6, 84.1), depths=(2, 4, 8, 4), dim=64, drop_path_rate=0.2),
    _variant("vssd_small", _weights("small", 84.1, 84.5), depths=(3, 4, 21, 5), dim=64, drop_path_rate=0.4),
    _variant("vssd_base", _weights("base", 84.7, 85.4),
             depths=(3, 4, 21, 5), dim=96, heads=(3, 6, 12, 24), drop_path_rate=0.6),
    _variant("test_vssd", None, "for tests", depths=(1, 1, 1, 1), dim=8, d_state=4),
]  # fmt: skip

SAME = {"in_chans": "in_chans", "num_classes": "num_classes", "depths": "depths", "embed_dim": "dim",
        "num_heads": "heads", "d_state": "d_state", "mlp_ratio": "mlp_ratio", "ssd_expansion": "expand",
        "ssd_ngroups": "groups", "ssd_positve_dA": "positive"}  # fmt: skip
UNCHANGED = {"patch_size": 4, "linear_attn_duality": True, "lepe": False, "bidirection": False}
INEFFECTIVE = {  # in training only; or, as published, nothing depends on it
    "drop_rate", "drop_path_rate", "use_checkpoint", "img_size", "image_size", "ssd_chunk_size",
}  # fmt: skip
ATTENTION_TYPES = {"mamba2": "duality", "standard": "attention"}


def translate(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``VSSD`` for those of the published ``VMAMBA2``."""
    given = {"depths": (2, 4, 12, 4), **kwargs}
    types = given.pop("attn_types", ("mamba2", "mamba2", "mamba2", "standard"))
    if not set(types) <= set(ATTENTION_TYPES):
        raise NotCovered(f"attn_types={types!r}")
    stem = "patch" if given.pop("simple_patch_embed", False) else "conv"
    downsample = "conv" if given.pop("simple_downsample", False) else "inverted"
    ours = translated(given, SAME, UNCHANGED, INEFFECTIVE)
    return {**ours, "mixers": [ATTENTION_TYPES[name] for name in types], "stem": stem, "downsample": downsample}


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``VMAMBA2`` or ``Backbone_VMAMBA2`` of the published code as our model."""
    name = entry.rpartition(" ")[2]
    if name not in ("VMAMBA2", "Backbone_VMAMBA2"):
        raise NotCovered(f"entry {entry!r} is no model of this family")
    given = dict(kwargs)
    out_indices = given.pop("out_indices", (0, 1, 2, 3))
    ours = translate(given)
    if name == "VMAMBA2":
        return Published(VSSD(**ours), KEYS, run_classifier)
    model = VSSD(**{**ours, "num_classes": 0})
    maps = StageMaps(model, sorted(out_indices))
    return Published(maps, [*unread(len(maps.stages), len(model.stages)), *KEYS], run_backbone)
