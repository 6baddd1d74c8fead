"""Mamba-YOLO: a one-stage detector on state-space blocks (Wang et al., AAAI 2025, arXiv:2406.05835).

A stem, four stages of scan-and-MLP blocks and spatial pyramid pooling; the maps at strides 8, 16 and 32 are fused
top-down and bottom-up, and a head reads from each a distribution of the distance to every side of the box, and class
scores. Published code: github.com/HZAI-ZJNU/Mamba-YOLO (AGPL-3.0, as its weights would be; none is published). Written
from the paper and from a description of what that code computes; same function, other key names, see KEYS.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

import torch
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from vssm.layers.conv import depthwise
from vssm.layers.layout import to_map, to_tokens
from vssm.layers.mixer import ScanMixer
from vssm.layers.norm import ChannelNorm
from vssm.layers.ssm import SelectiveSSM, ssm_parameters
from vssm.models.base import Stage
from vssm.models.boxes import cell_centres, corners, expected_distances, wide
from vssm.models.keys import Rule, also, rename, reshape
from vssm.models.mambayolo_loss import TaskAlignedLoss
from vssm.models.variant import NotCovered, Published, Variant

REPOSITORY = "HZAI-ZJNU/Mamba-YOLO"
Make = Callable[[int], nn.Module]  # a part, for this many channels
BINS = 16           # of the distribution over each distance, in cells


def batch_norm(dim: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(dim, eps=1e-3, momentum=0.03)


def conv(
    in_dim: int, dim: int, size: int = 1, stride: int = 1, *, bias: bool = False, act: type[nn.Module] = nn.SiLU
) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    convolution = nn.Conv2d(in_dim, dim, size, stride, size // 2, bias=bias)
    return nn.Sequential(OrderedDict(conv=convolution, norm=batch_norm(dim), act=act()))


class VisionClueMerge(nn.Module):
    """The four phases of a map as channels, projected: (B, C, H, W) to (B, dim, H/2, W/2)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.project = conv(4 * in_dim, dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        phases = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.project(torch.cat(phases, 1))


class LSBlock(nn.Module):
    """Local features: depthwise 3x3 and two pointwise convolutions, added."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv, self.norm = depthwise(dim, 3), batch_norm(dim)
        self.fc1, self.act, self.fc2 = nn.Conv2d(dim, dim, 1), nn.GELU(), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(self.conv(x)))))


class RGBlock(nn.Module):
    """Gated MLP of maps, whose gate sees its neighbours."""

    def __init__(self, dim: int, ratio: float = 4.0):
        super().__init__()
        hidden = int(2 * (ratio * dim) / 3)
        self.fc1, self.conv = nn.Conv2d(dim, 2 * hidden, 1), depthwise(hidden, 3)
        self.act, self.fc2 = nn.GELU(), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=1)
        return self.fc2(self.act(self.conv(gate) + gate) * value)


class ODSSBlock(nn.Module):
    """Project, scan, add; gated MLP, add. (B, in_dim, H, W) to (B, dim, H, W).

    Args:
        in_dim, dim: Channels.
        mixer: Makes a scan for so many channels.
        mixers: Scans, one after the other.
        bias: Of the projection.
    """

    def __init__(self, in_dim: int, dim: int, mixer: Make, mixers: int = 1, bias: bool = False):
        super().__init__()
        self.project = conv(in_dim, dim, bias=bias)
        self.local, self.norm1 = LSBlock(dim), ChannelNorm(dim, eps=1e-6)
        self.mixers = nn.ModuleList(mixer(dim) for _ in range(mixers))
        self.norm2, self.mlp = ChannelNorm(dim, eps=1e-6), RGBlock(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        y, grid = to_tokens(self.norm1(self.local(x))), x.shape[2:]
        for mixer in self.mixers:
            y = mixer(y, grid)
        x = x + to_map(y, grid)                              # As published: x is the map before the LSBlock
        return x + self.mlp(self.norm2(x))


class SPPF(nn.Module):
    """Spatial pyramid pooling: a map beside its maxima over 5, 9 and 13 cells. Keeps (B, dim, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduce, self.fuse = conv(dim, dim // 2), conv(dim // 2 * 4, dim)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.reduce(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.fuse(torch.cat(maps, 1))


class PAFPN(nn.Module):
    """Maps at strides 8, 16, 32 fused with those below them, then with those above. Channels ``dims`` in and out."""

    def __init__(self, dims: Sequence[int], mixer: Make, mixers: int):
        super().__init__()
        p3, p4, p5 = dims
        block = partial(ODSSBlock, mixer=mixer, mixers=mixers)
        self.top_down = nn.ModuleList([block(p5 + p4, p4), block(p4 + p3, p3)])
        self.downsamples = nn.ModuleList([conv(p3, p3, 3, 2), conv(p4, p4, 3, 2)])
        self.bottom_up = nn.ModuleList([block(p3 + p4, p4), block(p4 + p5, p5)])
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.grad_checkpointing = False

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        p3, p4, p5 = maps
        p4 = self.run(self.top_down[0], self.upsample(p5), p4)
        p3 = self.run(self.top_down[1], self.upsample(p4), p3)
        p4 = self.run(self.bottom_up[0], self.downsamples[0](p3), p4)
        p5 = self.run(self.bottom_up[1], self.downsamples[1](p4), p5)
        return [p3, p4, p5]

    def run(self, block: nn.Module, *maps: Tensor) -> Tensor:
        x = torch.cat(maps, 1)
        return checkpoint(block, x) if self.grad_checkpointing else block(x)


class Head(nn.Module):
    """For each cell of each map, logits of the distances to the sides of a box (4 x BINS) and of the classes."""

    def __init__(self, dims: Sequence[int], strides: Sequence[int], num_classes: int):
        super().__init__()
        self.strides = tuple(strides)
        box_dim, class_dim = max(16, dims[0] // 4, 4 * BINS), max(dims[0], min(num_classes, 100))
        self.box = nn.ModuleList(self._branch(dim, box_dim, 4 * BINS) for dim in dims)
        self.classes = nn.ModuleList(self._branch(dim, class_dim, num_classes) for dim in dims)
        self.register_buffer("bins", torch.arange(BINS, dtype=torch.float))
        for box, classes, stride in zip(self.box, self.classes, strides, strict=True):
            nn.init.ones_(box[-1].bias)
            nn.init.constant_(classes[-1].bias, math.log(5 / num_classes / (640 / stride) ** 2))  # 5 objects an image

    @staticmethod
    def _branch(in_dim: int, dim: int, out_dim: int) -> nn.Sequential:
        return nn.Sequential(conv(in_dim, dim, 3), conv(dim, dim, 3), nn.Conv2d(dim, out_dim, 1))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        branches = zip(self.box, self.classes, maps, strict=True)
        return [torch.cat([box(x), classes(x)], 1) for box, classes, x in branches]

    def decode(self, raw: Sequence[Tensor]) -> Tensor:
        """(B, 4 + num_classes, cells of all maps): centre x, centre y, width and height in pixels; class scores."""
        raw = wide(raw)
        flat = torch.cat([x.flatten(2) for x in raw], 2)
        logits, classes = flat.split((4 * BINS, flat.shape[1] - 4 * BINS), 1)
        centres, strides = cell_centres(raw, self.strides)
        boxes = corners(centres, expected_distances(logits.mT.unflatten(2, (4, BINS)), self.bins)) * strides
        low, high = boxes.chunk(2, -1)
        return torch.cat([torch.cat([(low + high) / 2, high - low], -1).mT, classes.sigmoid()], 1)


class MambaYOLO(nn.Module):
    """Mamba-YOLO for images (B, in_chans, H, W) in [0, 1], H and W multiples of 32. The defaults are T.

    In training mode ``forward`` returns the maps of logits at strides 8, 16 and 32, (B, 64 + num_classes, h, w) each,
    for ``TaskAlignedLoss``; in evaluation mode boxes and scores, (B, 4 + num_classes, cells), see ``Head.decode``.
    ``vssm.create_detector`` adds resizing, the loss and non-maximum suppression.

    Args:
        in_chans, num_classes: As in timm.
        dims: Channels of the stages, at strides 4, 8, 16, 32.
        depths: Blocks of the stages.
        neck_mixers: Scans in each block of the neck.
        scan, scan_options: A registered order and its options, see ``ScanMixer``.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 80,
        *,
        dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (1, 1, 3, 1),
        neck_mixers: int = 1,
        scan: str = "cross",
        scan_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"MambaYOLO: num_classes must be 1 or more, got {num_classes}")
        if not len(dims) == len(depths) == 4 or min(depths) < 1:
            raise ValueError(
                f"MambaYOLO: dims and depths must name four stages of one block or more, got {dims} and {depths}"
            )
        self.num_classes = num_classes
        self.stem = nn.Sequential(conv(in_chans, dims[0] // 2, 3, 2, act=nn.GELU), conv(dims[0] // 2, dims[0], 3, 2))
        mixer = partial(ScanMixer, scan=scan, scan_options=scan_options, act="gelu", gate="act", out_norm="layer")
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            shrink = VisionClueMerge(dims[i - 1], dim) if i else nn.Identity()
            stages.append(Stage(shrink, [ODSSBlock(dim, dim, mixer, bias=True) for _ in range(depth)]))
        self.stages = nn.Sequential(*stages)
        self.sppf = SPPF(dims[-1])
        self.neck = PAFPN(dims[1:], mixer, neck_mixers)
        self.head = Head(dims[1:], (8, 16, 32), num_classes)
        self.apply(_published_init)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The fused maps at strides 8, 16 and 32."""
        if any(-(-size // 4) % 8 or size == 0 for size in x.shape[2:]):
            raise ValueError(f"MambaYOLO: H and W must be multiples of 32, got {tuple(x.shape[2:])}; pad the images")
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return self.neck([*maps[1:-1], self.sppf(x)])

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        raw = self.head(self.forward_features(x))
        return raw if self.training else self.head.decode(raw)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward; their batch norms then see each batch twice in their running statistics."""
        for part in (*self.stages, self.neck):
            part.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Biases and norms aside (timm knows them). As published: A_log and D are decayed."""
        return set(ssm_parameters(self, "dt_bias"))


def _published_init(module: nn.Module) -> None:
    """As published: no S4D decay, and no small step sizes, at the start."""
    if isinstance(module, SelectiveSSM):
        nn.init.zeros_(module.A_log)
        nn.init.normal_(module.dt_weight)
        nn.init.normal_(module.dt_bias)


def keys(depths: Sequence[int]) -> list[Rule]:
    """Key rules for a model with these stages; published entries are numbered by layer."""
    return [
        also(rename(r"^(\d+)\.", r"model.\1.")),                # where "model." was taken for a wrapper
        *_conv("model.0.conv.0", "model.0.conv.1", "stem.0"),
        *_conv("model.0.conv.3", "model.0.conv.4", "stem.1"),
        *(rule for i, depth in enumerate(depths) for rule in _stage(i, depth)),
        *_conv("model.8.cv1.conv", "model.8.cv1.bn", "sppf.reduce"),
        *_conv("model.8.cv2.conv", "model.8.cv2.bn", "sppf.fuse"),
        *(rule for layer, name in NECK.items() for rule in _block(f"model.{layer}", name, "in_proj")),
        *_conv("model.15.conv", "model.15.bn", "neck.downsamples.0"),
        *_conv("model.18.conv", "model.18.bn", "neck.downsamples.1"),
        *_head(),
        reshape(r"^head\.bins$", "1 b 1 1 -> b"),
        reshape(r"\.mixers\.\d+\.(in|out)_proj\.weight$", "o i 1 1 -> o i"),
        reshape(r"\.ssm\.A_log$", "(k d) n -> k d n"),
        reshape(r"\.ssm\.D$", "(k d) -> k d"),
    ]


NECK = {11: "neck.top_down.0", 14: "neck.top_down.1", 17: "neck.bottom_up.0", 20: "neck.bottom_up.1"}
MIXER = {
    "x_proj_weight": "ssm.x_proj", "dt_projs_weight": "ssm.dt_weight", "dt_projs_bias": "ssm.dt_bias",
    "A_logs": "ssm.A_log", "Ds": "ssm.D",
}  # fmt: skip
BLOCK = {
    "norm.norm.": "norm1.", "norm2.norm.": "norm2.",
    "lsblock.fc1.": "local.conv.", "lsblock.norm.": "local.norm.", "lsblock.fc2.": "local.fc1.",
    "lsblock.fc3.": "local.fc2.", "mlp.dwconv.": "mlp.conv.", "mlp.fc1.": "mlp.fc1.", "mlp.fc2.": "mlp.fc2.",
}  # fmt: skip


def _moved(published: str, ours: str) -> Rule:
    return rename("^" + published.replace(".", r"\."), ours)


def _conv(convolution: str, norm: str, ours: str) -> Iterator[Rule]:
    yield _moved(f"{convolution}.", f"{ours}.conv.")
    yield _moved(f"{norm}.", f"{ours}.norm.")


def _stage(i: int, depth: int) -> Iterator[Rule]:
    if i:
        merge = f"model.{2 * i}.pw_linear"
        yield from _conv(f"{merge}.0", f"{merge}.1", f"stages.{i}.downsample.project")
    for j in range(depth):                                   # a stage of one block has no number for it
        layer = f"model.{2 * i + 1}" if depth == 1 else f"model.{2 * i + 1}.{j}"
        yield from _block(layer, f"stages.{i}.blocks.{j}", "proj_conv")


def _block(published: str, ours: str, projection: str) -> Iterator[Rule]:
    yield from _conv(f"{published}.{projection}.0", f"{published}.{projection}.1", f"{ours}.project")
    for theirs, name in BLOCK.items():
        yield _moved(f"{published}.{theirs}", f"{ours}.{name}")
    mixer = published.replace(".", r"\.")
    if projection == "proj_conv":
        yield rename(rf"^{mixer}\.op\.", f"{ours}.mixers.0.")
    else:
        yield rename(rf"^{mixer}\.ss2d\.(\d+)\.", rf"{ours}.mixers.\1.")
    prefix = ours.replace(".", r"\.")
    for theirs, name in MIXER.items():
        yield rename(rf"^{prefix}\.mixers\.(\d+)\.{theirs}$", rf"{ours}.mixers.\1.{name}")
    yield rename(rf"^{prefix}\.mixers\.(\d+)\.conv2d\.", rf"{ours}.mixers.\1.conv.")


def _head() -> Iterator[Rule]:
    for theirs, name in (("cv2", "box"), ("cv3", "classes")):
        for j in (0, 1):
            yield rename(rf"^model\.21\.{theirs}\.(\d+)\.{j}\.conv\.", rf"head.{name}.\1.{j}.conv.")
            yield rename(rf"^model\.21\.{theirs}\.(\d+)\.{j}\.bn\.", rf"head.{name}.\1.{j}.norm.")
        yield rename(rf"^model\.21\.{theirs}\.(\d+)\.2\.", rf"head.{name}.\1.2.")
    yield rename(r"^model\.21\.dfl\.conv\.weight$", r"head.bins")


KEYS = keys((1, 1, 3, 1))
SIZES: dict[str, dict[str, Any]] = {
    "t": dict(dims=(32, 64, 128, 256), depths=(1, 1, 3, 1), neck_mixers=1),
    "b": dict(dims=(64, 128, 256, 512), depths=(1, 1, 3, 1), neck_mixers=1),
    "l": dict(dims=(96, 192, 384, 576), depths=(2, 2, 6, 2), neck_mixers=2),
}


def _variant(name: str, description: str = "", **kwargs: Any) -> Variant:
    return Variant(
        name, MambaYOLO, kwargs, keys(kwargs["depths"]), first_conv="stem.0.conv", task="detection",
        classifier=tuple(f"head.classes.{i}.2" for i in range(3)), description=description,
    )  # fmt: skip


VARIANTS = [
    *(_variant(f"mamba_yolo_{size}", **kwargs) for size, kwargs in SIZES.items()),
    _variant("test_mamba_yolo", "for tests", dims=(8, 16, 16, 24), depths=(1, 1, 2, 1), neck_mixers=2),
]


def published(entry: str, kwargs: Mapping[str, Any]) -> Published:
    """``DetectionModel`` of the published code on one of its three files, as our model."""
    given = dict(kwargs)
    cfg, nc = given.pop("cfg", None), given.pop("nc", None)
    ours = dict(in_chans=given.pop("ch", 3), num_classes=80 if nc is None else nc)
    given.pop("verbose", None)
    size = str(PurePath(str(cfg)).stem).rpartition("-")[2].lower()
    if not entry.endswith("DetectionModel") or given:
        raise NotCovered(f"entry {entry!r} with arguments {', '.join(given) or 'as given'} is no model of this family")
    if not str(cfg).lower().endswith(f"mamba-yolo-{size}.yaml") or size not in SIZES:
        raise NotCovered(f"cfg={cfg!r}: the detectors are Mamba-YOLO-T, -B and -L.yaml")
    # A float64 network whose weights are only rounded to float32 is already off by 5e-5 (T, B) and 1.2e-3 (L).
    bounds = {"": 1e-2 if size == "l" else 1e-3}
    return Published(MambaYOLO(**ours, **SIZES[size]), keys(SIZES[size]["depths"]), _run, bounds)


def _run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = {
        "stage1_p2": model.stages[0], "stage2_p3": model.stages[1], "stage3_p4": model.stages[2],
        "stage4_p5": model.stages[3], "sppf_p5": model.sppf,
        "neck_11_p4": model.neck.top_down[0], "neck_14_p3": model.neck.top_down[1],
        "neck_17_p4": model.neck.bottom_up[0], "neck_20_p5": model.neck.bottom_up[1],
    }  # fmt: skip
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs.update({name: output})

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        raw = model.head(model.forward_features(inputs["x"]))
    finally:
        for handle in handles:
            handle.remove()
    return {**outputs, **{f"raw_{i}": x for i, x in enumerate(raw)}, "decoded": model.head.decode(raw)}


def published_loss(
    kwargs: Mapping[str, Any], raw: Sequence[Tensor], strides: Sequence[int], rows: Sequence[Sequence[float]]
) -> dict[str, Tensor]:
    """The published loss on maps of logits, and the assignment behind it, by the names of its golden file.

    Args:
        kwargs: Gains ``box``, ``cls``, ``dfl`` and the number of bins, ``reg_max``.
        raw: Maps of logits.
        strides: Of the maps.
        rows: Image, class, centre x, centre y, width and height of each object, in shares of the image.
    """
    given = dict(kwargs)
    loss = TaskAlignedLoss(tuple(strides), bins=given.pop("reg_max"), **given)
    table = torch.tensor(rows, dtype=raw[0].dtype, device=raw[0].device).reshape(-1, 6)
    height, width = (size * strides[0] for size in raw[0].shape[2:])
    scale = table.new_tensor([width, height, width, height])
    targets = []
    for image in range(len(raw[0])):
        mine = table[table[:, 0] == image]
        centre, size = (mine[:, 2:] * scale).chunk(2, 1)
        targets.append({"boxes": torch.cat([centre - size / 2, centre + size / 2], 1), "labels": mine[:, 1].long()})
    items = loss(raw, targets)
    found = loss.assign(raw, targets)
    positive = found.positive.flatten()
    return {
        "loss_items_box_cls_dfl": torch.stack([items["loss_box"], items["loss_cls"], items["loss_dfl"]]) / len(raw[0]),
        "loss_total": torch.stack(list(items.values())).sum(),
        "fg_flat_index": positive.nonzero().flatten(),
        "fg_gt_index": found.index.flatten()[positive],
        "fg_label": found.labels.flatten()[positive],
        "fg_target_score": found.score.flatten()[positive],
        "target_scores_sum": found.score.sum(),
    }
