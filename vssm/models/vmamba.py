"""VMamba: Visual State Space Model (Liu et al., 2024, arXiv:2401.10166).

Four stages of scan-and-MLP blocks; each mixer reads its map in four directions and sums them.
Published code and weights: github.com/MzeroMiko/VMamba (MIT). Same function; other key names, see KEYS.

Three generations were released: ``vanilla_*`` (gated mixer, no MLP), ``*_s2l*`` and ``*_s1l*`` (no gate, one state,
MLP; s is the expansion, l the depth of the third stage). The short names are the last one: ``vmamba_tiny`` is
``vmamba_tiny_s1l8``. ``*_m2``, with the recurrence of Mamba-2, came without weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp
from torch import Tensor, nn

from vssm.kernels import selective_scan
from vssm.layers.again import MadeAgain, Make
from vssm.layers.block import MixerBlock
from vssm.layers.downsample import ConvDownsample, PatchMerging
from vssm.layers.init import linear_like_transformers
from vssm.layers.layout import over_map
from vssm.layers.mixer import ScanMixer
from vssm.layers.mlp import LeanMlp
from vssm.layers.norm import NORMS
from vssm.layers.parts import activation, chosen
from vssm.layers.position import resize_map
from vssm.layers.ssm import decay, ssm_parameters
from vssm.layers.stem import ConvStem, PatchStem
from vssm.models.backbone import StageMaps, run_backbone, run_classifier
from vssm.models.base import Hierarchical, adapted, make_stages, widths
from vssm.models.keys import Rule, also, drop, rename, reshape
from vssm.models.names import FIRST_RELEASE, SSM_SHAPES, frame, unread
from vssm.models.variant import NotCovered, Published, Variant, Weights, constructor, nothing_left
from vssm.scans import scan_table

REPOSITORY = "MzeroMiko/VMamba"


class CascadeMixer(ScanMixer):
    """Scan each row both ways, then each column both ways: directions 0 and 1, then 2 and 3 of the SSM."""

    fuses_gate = False

    def mix(self, x: Tensor, z: Tensor | None, grid: Sequence[int]) -> Tensor:
        h, w = grid
        x = self.act(x if self.conv is None else over_map(self.conv, x, grid)).unflatten(1, grid)
        x = self.scan_lines(x.flatten(0, 1), w, slice(0, 2)).unflatten(0, (-1, h))
        x = self.scan_lines(x.transpose(1, 2).flatten(0, 1), h, slice(2, 4)).unflatten(0, (-1, w))
        x = x.transpose(1, 2).flatten(1, 2)
        return self.out_act(x if self.out_norm is None else over_map(self.out_norm, x, grid))

    def scan_lines(self, x: Tensor, length: int, rows: slice) -> Tensor:
        x = nn.functional.layer_norm(x, x.shape[-1:])
        table = scan_table("bidirectional", (1, length), x.device)
        # As published: the backward scan is added in its own order, last cell first.
        return self.ssm(x, table, rows=rows, write="steps")


class HeadSSM(nn.Module):
    """Projections to dt, B and C, and the scan of Mamba-2 (arXiv:2405.21060, section 6) along a table, rows summed.

    All channels of a head decay alike and have one step size. (b, l, d) in and out.

    Args:
        dim: Channels d of the scan.
        rows: Rows of the table; one set of parameters, ``rows=1``, serves a table of any number of rows.
        d_state: States of each channel.
        heads: Equal groups of channels.
        init: ``"uniform"`` or ``"normal"``.
    """

    def __init__(
        self, dim: int, rows: int, d_state: int, heads: int, *, init: str, per_row: bool = False, shared: bool = False
    ):
        super().__init__()
        if per_row or shared:
            raise ValueError("HeadSSM: rows read one input, each with parameters of its own; drop per_row and shared")
        if dim % heads:
            raise ValueError(f"HeadSSM: heads must divide the channels of the scan, got {heads} for {dim} channels")
        start = chosen("VMamba", "init", init, {"uniform": torch.rand, "normal": torch.randn})
        self.rows, self.width, self.splits = rows, dim // heads, (heads, d_state, d_state)
        self.x_proj = nn.Parameter(torch.empty(rows, sum(self.splits), dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.dt_bias = nn.Parameter(0.1 * start(rows, heads))
        self.A_log = nn.Parameter(torch.zeros(rows, heads) if init == "uniform" else start(rows, heads))
        self.D = nn.Parameter(torch.ones(rows, heads, self.width))

    def forward(
        self,
        u: Tensor,
        table: Tensor,
        z: Tensor | None = None,
        *,
        revisits: bool | None = None,
        origin: tuple[Make, Sequence[Tensor]] | None = None,
    ) -> Tensor:
        """As that of ``SelectiveSSM``."""
        with MadeAgain() as again:
            if origin is not None:
                again.later(u, origin[0], *origin[1])
            low = nn.functional.linear(u, self.x_proj.flatten(0, 1)).unflatten(-1, (self.rows, -1)).transpose(1, 2)
            dt, B, C = low.split(self.splits, -1)
            delta, bias, A = (t.repeat_interleave(self.width, -1) for t in (dt, self.dt_bias, decay(self.A_log)))
            A, D = A[..., None].repeat(1, 1, self.splits[1]), self.D.flatten(1)
            if self.rows == 1:
                delta, B, C, A, D, bias = delta[:, 0], B[:, 0], C[:, 0], A[0], D[0], bias[0]
            y, _ = selective_scan(
                u, delta, A, B, C, D, z, bias, delta_softplus=True, table=table, merge="sum", revisits=revisits
            )
        return y


class HeadMixer(ScanMixer):
    """A mixer with the scan of Mamba-2: as many heads as the rank of its step sizes would be."""

    ssm_type = HeadSSM


STEMS = {"patch": PatchStem, "conv": ConvStem}
DOWNSAMPLES = {
    "merge": PatchMerging,
    "conv2": partial(ConvDownsample, size=2),
    "conv3": partial(ConvDownsample, size=3),
}
MIXERS = {"scan": ScanMixer, "cascade": CascadeMixer, "heads": HeadMixer}
MLPS = {
    "mlp": lambda dim, ratio, act: LeanMlp(dim, int(dim * ratio), act_layer=act),
    "glu": lambda dim, ratio, act: GluMlp(dim, 2 * int(dim * ratio), act_layer=act),
}


class VMamba(Hierarchical):
    """VMamba classifier for images of any size. The defaults are ``vmamba_tiny``.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: As in timm.
        depths: Blocks of each stage.
        dim: Channels of the first stage, which double with every stage; or of all of them.
        d_state, expand, dt_rank, scan, scan_options, gate, conv_size, conv_bias, act, out_norm, out_act, init: Of the
            mixers, see ``ScanMixer``; ``conv_size=0`` for no convolution.
        mixer: ``"scan"``, ``"cascade"`` (rows first, then columns; reads no ``scan``), or ``"heads"`` (Mamba-2's scan,
            ``dt_rank`` its heads, ``init`` ``"uniform"`` or ``"normal"``).
        mlp_ratio: Hidden channels of the MLP over those of the block; 0 for no MLP.
        mlp: ``"mlp"``, or ``"glu"`` with a gated hidden layer.
        mlp_act: Activation of the MLP, by timm's name.
        norm: ``"layer"`` or ``"batch"``.
        stem: ``"conv"`` (two overlapping convolutions) or ``"patch"`` (one that does not overlap).
        downsample: ``"conv3"``, ``"conv2"`` (by kernel size) or ``"merge"`` (patch merging).
        patch_size: Pixels of the image to one cell of the first stage.
        position_size: Image size for which a position table is learned; None for no table. Other sizes then fail.
        spatial_dims: 2, or 3: a backbone for volumes (B, C, D, H, W), without a classifier.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 2, 8, 2),
        dim: int | Sequence[int] = 96,
        d_state: int = 1,
        expand: float = 1.0,
        dt_rank: int | None = None,
        scan: str = "cross",
        scan_options: Mapping[str, Any] | None = None,
        mixer: str = "scan",
        gate: str = "none",
        conv_size: int = 3,
        conv_bias: bool = False,
        act: str = "silu",
        out_norm: str | None = "layer",
        out_act: str | None = None,
        init: str = "mamba",
        mlp_ratio: float = 4.0,
        mlp: str = "mlp",
        mlp_act: str = "gelu",
        norm: str = "layer",
        stem: str = "conv",
        downsample: str = "conv3",
        patch_size: int = 4,
        position_size: int | None = None,
        spatial_dims: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if spatial_dims != 2:
            _check_volumes(spatial_dims, num_classes, global_pool, mixer, norm, position_size)
        dims, part = widths("VMamba", dim, depths), partial(chosen, "VMamba")
        make_norm = part("norm", norm, NORMS)
        make_mixer = partial(
            part("mixer", mixer, MIXERS), scan=scan, scan_options=scan_options, expand=expand, d_state=d_state,
            dt_rank=dt_rank, conv="grid" if conv_size else None, conv_size=conv_size, conv_bias=conv_bias, act=act,
            gate=gate, out_norm=out_norm, out_act=out_act, init=init, spatial_dims=spatial_dims,
        )  # fmt: skip
        mlp_part, mlp_act_layer = part("mlp", mlp, MLPS), activation("VMamba", "mlp_act", mlp_act)
        make_mlp = partial(mlp_part, ratio=mlp_ratio, act=mlp_act_layer) if mlp_ratio else None
        make_downsample = part("downsample", downsample, DOWNSAMPLES)
        stages = make_stages(
            depths, dims, drop_path_rate,
            block=lambda i, j, rate: MixerBlock(dims[i], make_mixer, make_mlp, make_norm, rate),
            downsample=lambda dim, out: make_downsample(dim, out, make_norm, spatial_dims=spatial_dims),
        )  # fmt: skip
        side = position_size // patch_size if position_size else None
        made_stem = part("stem", stem, STEMS)(
            in_chans, dims[0], patch_size, make_norm, side, spatial_dims=spatial_dims
        )
        super().__init__(
            made_stem, stages, dims, make_norm(dims[-1]),
            reduction=patch_size, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate,
        )  # fmt: skip
        self.apply(linear_like_transformers)

    def no_weight_decay(self) -> set[str]:
        """Biases and norms aside (timm knows them). As published: A_log and the step-size bias are decayed."""
        table = [] if self.stem.pos_embed is None else ["stem.pos_embed"]
        return {*ssm_parameters(self, "D"), *table}

    def adapt_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict whose position table, if there is one, has this model's size: resized, bicubic."""
        if self.stem.pos_embed is None:
            return dict(state)
        grid = self.stem.pos_embed.shape[2:]
        return adapted(state, "stem.pos_embed", lambda table: resize_map(table, grid))


def _check_volumes(
    spatial_dims: int, num_classes: int, global_pool: str, mixer: str, norm: str, position_size: int | None
) -> None:
    if spatial_dims != 3:
        raise ValueError(f"VMamba: spatial_dims must be 2 or 3, got {spatial_dims}")
    if num_classes or global_pool:
        raise ValueError(
            "VMamba: in 3D there is no classifier; pass num_classes=0 and global_pool='', got "
            f"num_classes={num_classes} and global_pool={global_pool!r}"
        )
    if mixer != "scan" or norm != "layer" or position_size:
        raise ValueError(
            "VMamba: in 3D mixer must be 'scan', norm 'layer' and position_size None, got "
            f"{mixer!r}, {norm!r} and {position_size}"
        )


WIDER_NAMES = [  # of other releases of the same weights
    *FIRST_RELEASE,
    also(rename(r"\.op\.x_proj\.weight$", r".op.x_proj_weight")),
    also(rename(r"\.op\.dt_projs\.weight$", r".op.dt_projs_weight")),
    also(reshape(r"\.op\.(x_proj|dt_projs)_weight$", "(k r) d -> k r d")),
    also(reshape(r"(in_proj|out_proj|fc1|fc2|reduction|head)\.weight$", "o i 1 1 -> o i")),
]


def keys(downsample: str, stages: int = 4, out_norm: str | None = "layer", mixer: str = "scan") -> list[Rule]:
    """Key rules for models with these parts."""
    merging = [
        also(rename(r"^(layers\.\d+\.downsample)\.1\.", r"\1.norm.")),
        also(rename(r"^(layers\.\d+\.downsample)\.2\.", r"\1.reduction.")),
    ]
    convolving = [
        rename(r"^(layers\.\d+\.downsample)\.1\.", r"\1.conv."),
        rename(r"^(layers\.\d+\.downsample)\.3\.", r"\1.norm."),
    ]
    out_norms = {
        "conv": [rename(r"\.op\.out_norm\.1\.", r".op.out_norm.")],
        "layer_conv": [rename(r"\.op\.out_norm\.2\.", r".op.out_norm.1.")],
    }
    return [
        *WIDER_NAMES,
        *(merging if downsample == "merge" else convolving),
        *out_norms.get(out_norm, []),
        *([rename(r"\.op\.conv2d\.1\.", r".op.conv2d.")] if mixer == "heads" else SSM_SHAPES),
        rename(r"^pos_embed$", r"stem.pos_embed"),
        *frame(stages),
        rename(r"^(stages\.\d+\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    ]


KEYS = keys("conv3")


def _weights(path: str, top1: float, **more: Any) -> dict[str, Weights]:
    url = f"https://github.com/{REPOSITORY}/releases/download/{path}"
    origin = f"https://github.com/{REPOSITORY}"
    return {"in1k": Weights("mit", origin, "arXiv:2401.10166", url=url, top1=top1, **more)}


def _variant(name: str, path: str | None, top1: float | None, description: str = "", **kwargs: Any) -> Variant:
    rules = keys(kwargs.get("downsample", "conv3"), mixer=kwargs.get("mixer", "scan"))
    return Variant(
        name, VMamba, kwargs, rules, _weights(path, top1) if path else {},
        first_conv="stem.conv1", classifier="head.fc", pool_size=(7, 7), description=description,
    )  # fmt: skip


VANILLA: dict[str, Any] = dict(
    d_state=16, expand=2.0, gate="act", conv_bias=True, mlp_ratio=0.0, stem="patch", downsample="merge"
)

MAMBA2: dict[str, Any] = dict(mixer="heads", d_state=64, act="gelu", init="uniform")

VARIANTS = [
    _variant("vanilla_vmamba_tiny", "%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth", 82.2,
             depths=(2, 2, 9, 2), dim=96, drop_path_rate=0.2, **VANILLA),
    _variant("vanilla_vmamba_small", "%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth", 83.5,
             depths=(2, 2, 27, 2), dim=96, drop_path_rate=0.3, **VANILLA),
    _variant("vanilla_vmamba_base", "%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth", 83.7,
             depths=(2, 2, 27, 2), dim=128, drop_path_rate=0.6, **VANILLA),
    _variant("vmamba_tiny_s2l5", "%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth", 82.5,
             depths=(2, 2, 5, 2), dim=96, expand=2.0, drop_path_rate=0.2),
    _variant("vmamba_small_s2l15", "%23v2cls/vssm_small_0229_ckpt_epoch_222.pth", 83.6,
             depths=(2, 2, 15, 2), dim=96, expand=2.0, drop_path_rate=0.3),
    _variant("vmamba_base_s2l15", "%23v2cls/vssm_base_0229_ckpt_epoch_237.pth", 83.9,
             depths=(2, 2, 15, 2), dim=128, expand=2.0, drop_path_rate=0.6),
    _variant("vmamba_tiny_s1l8", "%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth", 82.6,
             depths=(2, 2, 8, 2), dim=96, drop_path_rate=0.2),
    _variant("vmamba_small_s1l20", "%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth", 83.3,
             depths=(2, 2, 20, 2), dim=96, drop_path_rate=0.3),
    _variant("vmamba_base_s1l20", "%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth", 83.8,
             depths=(2, 2, 20, 2), dim=128, drop_path_rate=0.5),
    _variant("vmamba_tiny_m2", None, None, "the scan of Mamba-2; no weights were published",
             depths=(2, 2, 4, 2), dim=96, drop_path_rate=0.2, **MAMBA2),
    _variant("vmamba_small_m2", None, None, "the scan of Mamba-2; no weights were published",
             depths=(2, 2, 12, 2), dim=96, drop_path_rate=0.3, **MAMBA2),
    _variant("vmamba_base_m2", None, None, "the scan of Mamba-2; no weights were published",
             depths=(2, 2, 12, 2), dim=128, drop_path_rate=0.3, **MAMBA2),
    _variant("vmamba_nano", None, None, "not published: small images, demos",
             depths=(1, 1, 2, 1), dim=24),
    _variant("test_vmamba", None, None, "for tests", depths=(1, 1, 1, 1), dim=8),
    _variant("test_vmamba_m2", None, None, "for tests", depths=(1, 1, 1, 1), dim=16, **{**MAMBA2, "d_state": 4}),
]  # fmt: skip
VARIANTS += [  # the short names
    replace(variant, name=variant.name.rpartition("_")[0], description=f"the same as {variant.name}")
    for variant in VARIANTS
    if "_s1l" in variant.name
]

# The published constructor's forward_type: a core, then at most one of each postfix, in this order.
CORES = {
    **{core: {"scan": "cross"} for core in ("v01", "v02", "v03", "v04", "v05", "v2", "v3")},
    "v051d": {"scan": "unidi"},
    "v052d": {"scan": "bidi"},
    "v052d3": {"scan": "rot90"},
    "v052dc": {"mixer": "cascade"},
    "m0": {"scan": "cross", "mixer": "heads"},
}
OUT_NORM_TAGS = {
    "_onnone": None, "_ondwconv3": "conv", "_oncnorm": "layer_conv", "_onsoftmax": "softmax", "_onsigmoid": "sigmoid",
}  # fmt: skip


def parse_forward_type(text: str) -> dict[str, Any]:
    """Our arguments for a published ``forward_type``.

    >>> parse_forward_type("v052d_onnone_noz")
    {'scan': 'bidi', 'gate': 'none', 'out_norm': None, 'out_act': None}
    """
    if text in ("v0", "v0seq"):
        return {"scan": "cross", "gate": "act", "out_norm": "layer", "out_act": None}
    core, found = text, {}
    for tag in ("_no32", "_oact", "_noz", "_nozact"):
        found[tag] = core.endswith(tag)
        core = core.removesuffix(tag)
    on = next((tag for tag in OUT_NORM_TAGS if core.endswith(tag)), "")
    core = core.removesuffix(on)
    if core not in CORES:
        why = "no such scan in the published code, or one that fails there"
        raise NotCovered(f"forward_type {text!r}, core {core!r}: {why}")
    return {
        **CORES[core],
        "gate": "none" if found["_noz"] else "raw" if found["_nozact"] else "act",
        "out_norm": OUT_NORM_TAGS[on] if on else "layer",
        "out_act": "gelu" if found["_oact"] else None,
    }


SAME = {  # published argument -> ours, same value
    "depths": "depths", "dims": "dim", "in_chans": "in_chans", "num_classes": "num_classes", "patch_size": "patch_size",
    "ssm_d_state": "d_state", "ssm_ratio": "expand", "ssm_act_layer": "act", "ssm_conv_bias": "conv_bias",
    "mlp_ratio": "mlp_ratio", "mlp_act_layer": "mlp_act",
}  # fmt: skip
NAMED: dict[str, tuple[str, dict[Any, str]]] = {  # published argument -> ours, and our names of its values
    "ssm_init": ("init", {"v0": "mamba", "v1": "normal", "v2": "uniform"}),
    "norm_layer": ("norm", {"ln": "layer", "ln2d": "layer", "bn": "batch"}),
    "downsample_version": ("downsample", {"v1": "merge", "v2": "conv2", "v3": "conv3"}),
    "patchembed_version": ("stem", {"v1": "patch", "v2": "conv"}),
    "gmlp": ("mlp", {False: "mlp", True: "glu"}),
}
UNCHANGED = {"patch_norm": True, "ssm_drop_rate": 0.0, "mlp_drop_rate": 0.0}  # we have no other value
TRAINING = {"drop_path_rate", "use_checkpoint", "pretrained"}  # do not change what is computed


DEFAULTS = {  # of the published class, where they are not ours
    "depths": (2, 2, 9, 2), "dims": 96, "ssm_d_state": 16, "ssm_ratio": 2.0, "ssm_conv_bias": True, "mlp_ratio": 4.0,
    "forward_type": "v2", "downsample_version": "v2", "patchembed_version": "v1",
}  # fmt: skip


def translate(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``VMamba`` for those of the published ``VSSM``."""
    given = {key: value for key, value in {**DEFAULTS, **kwargs}.items() if key not in TRAINING}
    for key in ("norm_layer", "ssm_act_layer", "mlp_act_layer"):
        if key in given:
            given[key] = given[key].lower()  # as published
    norm_layer = given.get("norm_layer", "ln")
    ours: dict[str, Any] = {SAME[key]: given.pop(key) for key in list(given) if key in SAME}
    for key, (name, values) in NAMED.items():
        value = given.pop(key, next(iter(values)))
        if value not in values:
            raise NotCovered(f"{key}={value!r}")
        ours[name] = values[value]
    for key, value in UNCHANGED.items():
        if given.pop(key, value) != value:
            raise NotCovered(f"{key}={kwargs[key]!r}")
    rank, conv_size, size = given.pop("ssm_dt_rank", "auto"), given.pop("ssm_conv", 3), given.pop("imgsize", 224)
    ours["dt_rank"] = None if rank == "auto" else rank
    ours["conv_size"] = conv_size if conv_size > 1 else 0
    ours["position_size"] = size if given.pop("posembed", False) else None
    forward_type = given.pop("forward_type")
    ours |= parse_forward_type(forward_type)
    if forward_type in ("v0", "v0seq"):  # As published: no argument reaches these parts of the first mixer.
        ours |= {"conv_size": 3, "conv_bias": True, "act": "silu", "init": "mamba"}
    nothing_left(given)
    if ours.get("mixer") == "heads" and (ours["gate"] != "none" or norm_layer != "ln"):
        raise NotCovered(f"{forward_type!r} fails in the published code but with '_noz' and norm_layer='ln'")
    return ours


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``VSSM`` or ``Backbone_VSSM`` of the published code, from either of its two files, as our model."""
    name = constructor(entry, "VSSM", "Backbone_VSSM")
    given = dict(kwargs)
    out_indices = given.pop("out_indices", (0, 1, 2, 3))
    ours = translate(given)
    if entry.startswith("vmamba.py"):
        ours |= {"norm": "layer", "mlp": "mlp"}  # As published: this file knows no other norm and no gated MLP.
    if name == "Backbone_VSSM":
        # As published: the backbone holds a table of positions and does not add it.
        ours |= {"position_size": None, "num_classes": 0}
    model = VMamba(**ours)
    own_keys = keys(ours["downsample"], len(model.stages), ours["out_norm"], ours.get("mixer", "scan"))
    if name == "VSSM":
        return Published(model, own_keys, run_classifier)
    maps = StageMaps(model, sorted(out_indices), norm=type(model.norm))
    left_out = [*unread(len(maps.stages), len(model.stages)), drop(r"^pos_embed$")]
    return Published(maps, [*left_out, *own_keys], run_backbone)
