"""MSVMamba: Multi-Scale VMamba, hierarchy in hierarchy visual state space model (Shi et al., 2024, arXiv:2405.14174).

Four stages of blocks whose mixer reads its map along one path at full resolution, and along three more at half of it,
one after the other in one sequence; a convolutional MLP follows. Two generations were released, ``msvmamba_*`` and
``msvmambav3_*``, that differ in parts and in where the norms stand.
Published code and weights: github.com/YuHengsss/MSVMamba (no licence for either): written from a description of what
the code computes. Same function; other key names, see KEYS.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, register_notrace_function
from torch import Tensor, nn

from vssm.layers.conv import depthwise
from vssm.layers.downsample import ConvDownsample, PatchMerging
from vssm.layers.init import linear_like_transformers
from vssm.layers.layout import to_map, to_tokens
from vssm.layers.mixer import ScanMixer
from vssm.layers.norm import ChannelNorm
from vssm.layers.parts import check_choice
from vssm.layers.ssm import SelectiveSSM, ssm_parameters
from vssm.layers.stem import ConvStem, PatchStem
from vssm.models.backbone import StageMaps, run_backbone, run_classifier
from vssm.models.base import Hierarchical, make_stages, widths
from vssm.models.keys import Rule, rename, reshape, split, stack
from vssm.models.names import FIRST_RELEASE, SSM_SHAPES, frame, unread
from vssm.models.variant import NotCovered, Published, Variant, Weights, constructor, defaults_unknown, nothing_left
from vssm.scans import scan_rows, scan_table, to_grid

REPOSITORY = "YuHengsss/MSVMamba"
FULL, LOW = slice(0, 1), slice(1, 2)  # the parameters of the two sequences

register_notrace_function(to_grid)


class SqueezeExcite(nn.Module):
    """Scale channels by what their means over all cells say. (B, L, C) in and out."""

    def __init__(self, dim: int, reduction: int = 8):
        super().__init__()
        hidden = dim // reduction
        self.reduce, self.act = nn.Linear(dim, hidden, bias=False), nn.ReLU()
        self.expand = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.act(self.reduce(x.mean(1, keepdim=True)))).sigmoid()


class MultiScaleMixer(nn.Module):
    """Scan a map at full and at half resolution, add, excite, gate. (B, L, C) tokens in and out.

    Args:
        dim: Channels C of the tokens.
        scan, scan_options: A registered order. One of its rows is read at full resolution; the others at half of it,
            end to end in one sequence, through which the state runs on.
        full_row: The row that is read at full resolution.
        expand, d_state: Channels of the scan over C, and states of each.
        gate: Multiply by the activation of a second projection.
        norm: Where the norm stands: after each ``"sequence"``, before its steps return to their cells; or after the
            ``"sum"``.
        resize: How the low resolution becomes the full one: ``"bilinear"`` or ``"nearest"``.
        returned: The part of the low sequence whose steps return to the cells of each path, by default its own.
    """

    def __init__(
        self,
        dim: int,
        *,
        scan: str = "cross",
        scan_options: Mapping[str, Any] | None = None,
        full_row: int = 0,
        expand: float = 1.0,
        d_state: int = 1,
        gate: bool = False,
        norm: str = "sum",
        resize: str = "nearest",
        returned: Sequence[int] | None = None,
    ):
        super().__init__()
        check_choice("MSVMamba", "norm", norm, ("sequence", "sum"))
        check_choice("MSVMamba", "resize", resize, ("bilinear", "nearest"))
        self.scan, self.scan_options = scan, dict(scan_options or {})
        rows = scan_rows(scan, 2, **self.scan_options)
        if rows is None:
            raise ValueError(f"MSVMamba: scans name rows, those of {scan!r} follow the grid; choose another order")
        if not 0 <= full_row < rows:
            raise ValueError(f"MSVMamba: full_row must be one of the {rows} rows of {scan!r}, got {full_row}")
        half = (rows + 1) // 2  # the second half of an order's rows are reverses of the first: each follows its path
        paths = sorted(range(rows), key=lambda k: k % half)
        self.full_row, self.low_rows = full_row, [k for k in paths if k != full_row] or [full_row]
        self.returned = None if returned is None else tuple(returned)
        width = int(expand * dim)
        self.gate, self.norm_each, self.resize = gate, norm == "sequence", resize

        self.in_proj = nn.Linear(dim, 2 * width if gate else width, bias=False)
        self.act = nn.SiLU()
        self.full_conv = depthwise(width, 3)
        self.low_conv = nn.Conv2d(width, width, 7, stride=2, padding=3, groups=width)
        self.ssm = SelectiveSSM(width, 2, d_state, math.ceil(dim / 16))
        self.out_norm = LayerNorm(width, eps=1e-5)
        self.excite = SqueezeExcite(width)
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """``grid``: sizes of the grid whose cells the tokens are."""
        x, z = self.in_proj(x), None
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        x = to_map(x, grid)
        low = self.low_conv(x)
        low_grid = low.shape[2:]
        y = self.scan_full(to_tokens(self.act(self.full_conv(x))), grid)
        low = to_map(self.scan_low(to_tokens(self.act(low)), low_grid), low_grid)
        corners = {"align_corners": False} if self.resize == "bilinear" else {}
        y = y + to_tokens(nn.functional.interpolate(low, grid, mode=self.resize, **corners))
        y = self.excite(y if self.norm_each else self.out_norm(y))
        return self.out_proj(y if z is None else y * self.act(z))

    def scan_full(self, u: Tensor, grid: Sequence[int]) -> Tensor:
        table = scan_table(self.scan, grid, u.device, **self.scan_options)
        y = self.ssm(u, table[self.full_row : self.full_row + 1], rows=FULL)
        return self.out_norm(y) if self.norm_each else y

    def scan_low(self, u: Tensor, grid: Sequence[int]) -> Tensor:
        table = scan_table(self.scan, grid, u.device, **self.scan_options)
        table = torch.stack([table[k] for k in self.low_rows])  # an index would be copied from the host each time
        # As published: one sequence that visits each cell once a path; the state is not reset between them.
        tour = table.reshape(1, -1)
        if not self.norm_each and self.returned is None:
            return self.ssm(u, tour, rows=LOW)
        y = self.ssm(u, tour, rows=LOW, write="steps")
        y = (self.out_norm(y) if self.norm_each else y).unflatten(1, (len(self.low_rows), -1))
        if self.returned is not None:
            y = torch.stack([y[:, k] for k in self.returned], 1)
        return to_grid(y, table, u.shape[1]).sum(1)


class ExcitedMixer(ScanMixer):
    """The mixer of VMamba, which reads one resolution, with squeeze-and-excitation. (B, L, C) tokens in and out."""

    def __init__(
        self, dim: int, scan: str, scan_options: Mapping[str, Any] | None, expand: float, d_state: int, gate: bool
    ):
        super().__init__(
            dim, scan=scan, scan_options=scan_options, expand=expand, d_state=d_state, gate="act" if gate else "none",
            out_norm="layer",
        )  # fmt: skip
        self.excite = SqueezeExcite(self.out_proj.in_features)

    def mix(self, x: Tensor, z: Tensor | None, grid: Sequence[int]) -> Tensor:
        return self.excite(super().mix(x, z, grid))


class ConvMlp(nn.Module):
    """An MLP that adds a depthwise convolution of its hidden map to it. (B, C, H, W) in and out."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1, self.conv, self.act = nn.Conv2d(dim, hidden, 1), depthwise(hidden, 3), nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(self.act(x + self.conv(x)))


class MSVMambaBlock(nn.Module):
    """Norm, scan, add; norm, MLP, add. (B, C, H, W) in and out, channels last in memory.

    With ``post_norm`` the second norm stands behind the MLP.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, post_norm: bool, drop_path: float = 0.0):
        super().__init__()
        self.norm1, self.mixer = ChannelNorm(dim), mixer
        self.norm2, self.mlp = ChannelNorm(dim), ConvMlp(dim, mlp_ratio)
        self.post_norm = post_norm
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        x = x + self.drop_path1(to_map(self.mixer(to_tokens(self.norm1(x)), grid), grid))
        y = self.norm2(self.mlp(x)) if self.post_norm else self.mlp(self.norm2(x))
        return x + self.drop_path2(y)


STEMS = {"patch": PatchStem, "conv": ConvStem}
DOWNSAMPLES = {"merge": PatchMerging, "conv": ConvDownsample}


class MSVMamba(Hierarchical):
    """MSVMamba classifier for images of any size from one patch. The defaults are ``msvmambav3_tiny``.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: As in timm.
        depths: Blocks of each stage.
        dim: Channels of the first stage, which double with every stage; or of all of them.
        scan, scan_options, full_row, expand, d_state, gate: Of the mixers, see ``MultiScaleMixer``.
        mixer_norm, resize, returned: Likewise, ``norm``, ``resize`` and ``returned`` there.
        plain_stages: Stages whose mixers read one resolution, see ``ExcitedMixer``.
        mlp_ratio: Hidden channels of the MLP over those of the block.
        post_norm: The MLP's norm stands behind it.
        stem: ``"conv"`` (two overlapping convolutions) or ``"patch"`` (one that does not overlap).
        downsample: ``"conv"`` or ``"merge"`` (patch merging).
        patch_size: Pixels of the image to one cell of the first stage.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        depths: Sequence[int] = (2, 2, 9, 2),
        dim: int | Sequence[int] = 96,
        scan: str = "cross",
        scan_options: Mapping[str, Any] | None = None,
        full_row: int = 0,
        expand: float = 1.0,
        d_state: int = 1,
        gate: bool = False,
        mixer_norm: str = "sum",
        resize: str = "nearest",
        returned: Sequence[int] | None = None,
        plain_stages: Collection[int] = (),
        mlp_ratio: float = 4.0,
        post_norm: bool = True,
        stem: str = "conv",
        downsample: str = "conv",
        patch_size: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        check_choice("MSVMamba", "stem", stem, STEMS)
        check_choice("MSVMamba", "downsample", downsample, DOWNSAMPLES)
        dims = widths("MSVMamba", dim, depths)

        def block(i: int, j: int, rate: float) -> nn.Module:
            if i in plain_stages:
                mixer: nn.Module = ExcitedMixer(dims[i], scan, scan_options, expand, d_state, gate)
            else:
                mixer = MultiScaleMixer(
                    dims[i], scan=scan, scan_options=scan_options, full_row=full_row, expand=expand, d_state=d_state,
                    gate=gate, norm=mixer_norm, resize=resize, returned=returned,
                )  # fmt: skip
            return MSVMambaBlock(dims[i], mixer, mlp_ratio, post_norm, rate)

        stages = make_stages(depths, dims, drop_path_rate, block, DOWNSAMPLES[downsample])
        super().__init__(
            STEMS[stem](in_chans, dims[0], patch_size), stages, dims, ChannelNorm(dims[-1]),
            reduction=patch_size, num_classes=num_classes, global_pool=global_pool, drop_rate=drop_rate,
        )  # fmt: skip
        self.apply(linear_like_transformers)

    def no_weight_decay(self) -> set[str]:
        """Biases and norms aside (timm knows them). As published: A_log and the step-size bias are decayed."""
        return set(ssm_parameters(self, "D"))


def _low_first(name: str) -> list[Rule]:
    """The first generation has the parameters of the low resolution first; ``_full`` and ``_low`` pass by."""
    return [split(name, (f"{name}_low", f"{name}_full")), stack((f"{name}_full", f"{name}_low"), name)]


def _plain(stages: Collection[int]) -> list[Rule]:
    """Rules of mixers that read one resolution, up to their names before ``MIXER``; others pass by."""
    return [
        *(rename(rf"^(layers\.{i}\.blocks\.\d+)\.op\.", r"\1.plain.") for i in stages),
        reshape(r"\.plain\.A_logs$", "(k d) n -> k d n"),
        reshape(r"\.plain\.Ds$", "(k d) -> k d"),
        rename(r"\.plain\.conv2d\.", r".plain.conv."),
        rename(r"\.plain\.x_proj_weight$", r".plain.ssm.x_proj"),
        rename(r"\.plain\.dt_projs_weight$", r".plain.ssm.dt_weight"),
        rename(r"\.plain\.dt_projs_bias$", r".plain.ssm.dt_bias"),
        rename(r"\.plain\.A_logs$", r".plain.ssm.A_log"),
        rename(r"\.plain\.Ds$", r".plain.ssm.D"),
        rename(r"\.plain\.se\.fc\.0\.", r".plain.excite.reduce."),
        rename(r"\.plain\.se\.fc\.2\.", r".plain.excite.expand."),
    ]


def keys(generation: int, plain_stages: Collection[int] = ()) -> list[Rule]:
    """Key rules for a published generation, 1 or 3."""
    own = {
        1: [
            *(rule for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias") for rule in _low_first(name)),
            reshape(r"\.(x_proj|dt_projs)_weight$", "k 1 r d -> k r d"),
            reshape(r"\.dt_projs_bias$", "k 1 d -> k d"),
            *_low_first("A_logs"),
            *_low_first("Ds"),
        ],
        3: [
            *SSM_SHAPES,
            rename(r"^(layers\.\d+\.downsample)\.1\.", r"\1.conv."),
            rename(r"^(layers\.\d+\.downsample)\.3\.", r"\1.norm."),
        ],
    }
    return [
        *FIRST_RELEASE,
        *_plain(plain_stages),
        *own[generation],
        rename(r"\.op\.conv2d\.", r".op.full_conv."),
        *frame(),
        rename(r"^(stages\.\d+\.blocks\.\d+)\.norm\.", r"\1.norm1."),
        rename(r"\.convFFN\.linear1\.", r".mlp.fc1."),
        rename(r"\.convFFN\.linear2\.", r".mlp.fc2."),
        rename(r"\.convFFN\.dwc\.", r".mlp.conv."),
        rename(r"\.mixer\.conv2d_b1\.", r".mixer.low_conv."),
        rename(r"\.mixer\.se\.fc\.0\.", r".mixer.excite.reduce."),
        rename(r"\.mixer\.se\.fc\.2\.", r".mixer.excite.expand."),
        *(rename(rf"^(stages\.{i}\.blocks\.\d+)\.plain\.", r"\1.mixer.") for i in plain_stages),
    ]


KEYS = keys(3)
FIRST: dict[str, Any] = dict(
    expand=2.0, gate=True, mixer_norm="sequence", resize="bilinear", mlp_ratio=2.0, post_norm=False, stem="patch",
    downsample="merge",
)  # fmt: skip


def _variant(name: str, weights: Mapping[str, Weights] | None = None, description: str = "", **kwargs: Any) -> Variant:
    rules = keys(1) if kwargs.get("stem") == "patch" else KEYS
    return Variant(
        name, MSVMamba, kwargs, rules, weights or {}, first_conv="stem.conv1", classifier="head.fc", pool_size=(7, 7),
        description=description,
    )  # fmt: skip


def _hub(size: str, top1: float) -> dict[str, Weights]:
    return {
        "in1k": Weights(
            "unknown", f"https://github.com/{REPOSITORY}", "arXiv:2405.14174", hf_hub_id="YuhengSSS/MSVMamba",
            hf_hub_filename=f"msvmambav3_{size}_224.pth", top1=top1, notes="the repository has no licence",
        )
    }  # fmt: skip


def _drive(top1: float, folder: str) -> str:
    return f"published top-1 {top1}, weights for download by hand: https://drive.google.com/drive/folders/{folder}"


VARIANTS = [
    _variant("msvmamba_nano", None, _drive(77.3, "1J41w3ApitQhp2O3wHmJoOs4U032uqebK"),
             depths=(1, 2, 5, 2), dim=48, drop_path_rate=0.2, **FIRST),
    _variant("msvmamba_micro", None, _drive(79.8, "1jfl2GmuKcUB8sPwRlyHK_wT0MjqgljYk"),
             depths=(1, 2, 5, 2), dim=64, drop_path_rate=0.2, **FIRST),
    _variant("msvmamba_tiny", None, _drive(82.8, "1ddNWk89ohcxxMuVEaJ2Y5A6xeBKgA7lU"),
             depths=(1, 2, 9, 2), dim=96, drop_path_rate=0.2, **FIRST),
    _variant("msvmambav3_tiny", _hub("tiny", 83.0), depths=(2, 2, 9, 2), dim=96, drop_path_rate=0.2),
    _variant("msvmambav3_small", _hub("small", 84.1), depths=(2, 3, 20, 2), dim=96, drop_path_rate=0.4),
    _variant("msvmambav3_base", _hub("base", 84.4), depths=(2, 4, 18, 2), dim=128, gate=True, drop_path_rate=0.5),
    _variant("test_msvmamba", None, "for tests", depths=(1, 1, 1, 1), dim=8, **FIRST),
    _variant("test_msvmambav3", None, "for tests", depths=(1, 1, 1, 1), dim=8),
]  # fmt: skip

SAME = {  # published argument -> ours, same value
    "depths": "depths", "dims": "dim", "in_chans": "in_chans", "num_classes": "num_classes", "patch_size": "patch_size",
    "ssm_d_state": "d_state", "ssm_ratio": "expand",
}  # fmt: skip
UNCHANGED: dict[str, Any] = {  # we have no other value
    "ssm_dt_rank": "auto", "ssm_act_layer": "silu", "ssm_conv": 3, "ssm_conv_bias": True, "ssm_drop_rate": 0.0,
    "mlp_act_layer": "gelu", "mlp_drop_rate": 0.0, "patch_norm": True, "add_se": True, "ssm_rank_ratio": 2.0,
}  # fmt: skip
UNCHANGED_FIRST = UNCHANGED | {
    "ssm_simple_init": False, "forward_type": "v2", "mlp_ratio": 0.0, "norm_layer": "ln", "downsample_version": "v1",
    "patchembed_version": "v1", "recurrent": False, "sscore_type": "multiscale_4scan_12", "inter_block_ssm": False,
    "grid_size": 0, "multiscale_ratio": [], "multiscale_ksize": [], "continous_patch": False, "adaptive_merge": False,
    "add_conv": True, "b1_seq": False, "b1_ratio": 0.5, "ms_fusion": None, "up_sample": "interpolate", "convFFN": True,
    "lpu": False, "sep_norm": False, "ms_split": [1, 3],
}  # fmt: skip
UNCHANGED_THIRD = UNCHANGED | {
    "ssm_init": "v0", "downsample_version": "v3", "patchembed_version": "v2", "gmlp": False, "posembed": False,
    "convffn": True, "axis_stage": [],
}  # fmt: skip
INEFFECTIVE_FIRST = {"drop_path_rate", "use_checkpoint", "pretrained", "ffn_dropout"}  # in training only
# Beside training: mlp_ratio is that of an MLP that convffn replaces, heads are those of other mixers.
INEFFECTIVE_THIRD = {"drop_path_rate", "use_checkpoint", "pretrained", "imgsize", "mlp_ratio", "num_heads", "pre_norm"}


def translate(kwargs: Mapping[str, Any], generation: int) -> dict[str, Any]:
    """Arguments of ``MSVMamba`` for those of the published ``VSSM`` of a generation, 1 or 3."""
    ineffective = INEFFECTIVE_FIRST if generation == 1 else INEFFECTIVE_THIRD
    given = {key: value for key, value in kwargs.items() if key not in ineffective}
    multiscale = given.pop("ms_stage", range(4)) if generation == 1 else range(4)
    for key, value in (UNCHANGED_FIRST if generation == 1 else UNCHANGED_THIRD).items():
        found = given.pop(key, value)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise NotCovered(f"{key}={found!r}")
    ours = {SAME[key]: given.pop(key) for key in list(given) if key in SAME}
    if generation == 1:
        ours |= {**FIRST, "expand": ours.get("expand", FIRST["expand"])}
        ours["plain_stages"] = [i for i in range(len(ours.get("depths", range(4)))) if i not in multiscale]
    else:
        ours |= _third(given)
    nothing_left(given)
    defaults_unknown(kwargs, "dims", "depths")
    return ours


def _third(given: dict[str, Any]) -> dict[str, Any]:
    """What the last generation lets be chosen; taken out of ``given``."""
    forward_type, norm_layer = given.pop("forward_type", "vms_noz"), given.pop("norm_layer", "ln2d")
    index = given.pop("full_res_index", 1)
    if forward_type not in ("vms", "vms_noz"):
        raise NotCovered(f"forward_type={forward_type!r}")
    if norm_layer not in ("ln", "ln2d"):
        raise NotCovered(f"norm_layer={norm_layer!r}")
    if index not in FULL_ROWS:
        raise NotCovered(f"full_res_index={index}: a mistake in the published code, right on square maps alone")
    return {
        "returned": (0, 1, 1) if index == 4 else None,  # As published: the second part is read twice, no third one.
        "gate": forward_type == "vms",
        "post_norm": norm_layer == "ln2d",  # As published: the layout decides where this norm stands.
        "full_row": FULL_ROWS[index],
        "mlp_ratio": given.pop("conv_ffn_ratio", 4),
    }


FULL_ROWS = {1: 0, 2: 2, 4: 3}  # the published number of the path at full resolution -> row of "cross"


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``VSSM`` or ``Backbone_VSSM`` of either published branch as our model."""
    name = constructor(entry, "VSSM", "Backbone_VSSM")
    generation = 3 if "branch v2" in entry else 1
    given = dict(kwargs)
    out_indices = given.pop("out_indices", (0, 1, 2, 3))
    ours = translate(given, generation)
    rules = keys(generation, ours.get("plain_stages", ()))
    if name == "VSSM":
        return Published(MSVMamba(**ours), rules, run_classifier)
    model = MSVMamba(**{**ours, "num_classes": 0})
    maps = StageMaps(model, sorted(out_indices))
    return Published(maps, [*unread(len(maps.stages), len(model.stages)), *rules], run_backbone)
