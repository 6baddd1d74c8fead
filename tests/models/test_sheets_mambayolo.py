"""Mamba-YOLO against a short re-derivation from its published state dict; the published forms of its files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sheets import ssm, sub
from tolerance import error

import vssm
from vssm.checkpoints import load_weights
from vssm.models.keys import to_published
from vssm.models.mambayolo import keys
from vssm.models.variant import variants

NECK = {11: (8, 5), 14: (11, 3), 17: (15, 11), 20: (18, 8)}      # what layer 12 … upsamples or 15 … shrinks, the skip


class Sheet:
    """The layers of the published graph. Maps are (b, c, h, w); in training mode batches have their own statistics."""

    def __init__(self, p, training):
        self.p, self.training, self.statistics = p, training, {}

    def conv(self, x, name, stride=1):
        weight = self.p[f"{name}.weight"]
        groups = len(weight) if weight.shape[1] == 1 and x.shape[1] == len(weight) else 1
        return F.conv2d(x, weight, self.p.get(f"{name}.bias"), stride, weight.shape[-1] // 2, groups=groups)

    def batch_norm(self, x, name):
        mean, var = self.p[f"{name}.running_mean"], self.p[f"{name}.running_var"]
        if self.training:
            count, before = x.numel() / x.shape[1], (mean, var)
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            wide = var * count / (count - 1)
            self.statistics[name] = [0.97 * a + 0.03 * b for a, b in zip(before, (mean, wide), strict=True)]
        mean, var, weight, bias = (
            t[:, None, None] for t in (mean, var, self.p[f"{name}.weight"], self.p[f"{name}.bias"])
        )
        return (x - mean) / (var + 1e-3).sqrt() * weight + bias

    def unit(self, x, convolution, norm, stride=1, act=F.silu):
        return act(self.batch_norm(self.conv(x, convolution, stride), norm))

    def named(self, x, name, stride=1):
        return self.unit(x, f"{name}.conv", f"{name}.bn", stride)

    def norm(self, x, name):
        centred = x - x.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return x * self.p[f"{name}.norm.weight"][:, None, None] + self.p[f"{name}.norm.bias"][:, None, None]

    def scan(self, x, name):
        q, (h, w) = sub(self.p, f"{name}."), x.shape[2:]
        rank, n = q["dt_projs_weight"].shape[-1], q["A_logs"].shape[-1]
        x, z = self.conv(x, f"{name}.in_proj").chunk(2, 1)
        x, total = F.gelu(self.conv(x, f"{name}.conv2d")), 0.0
        for k in range(4):
            seq = (x.mT if k % 2 else x).flatten(2).mT
            y = ssm(seq.flip(1), q, k, rank, n).flip(1) if k > 1 else ssm(seq, q, k, rank, n)
            total = total + (y.mT.unflatten(2, (w, h)).mT if k % 2 else y.mT.unflatten(2, (h, w)))
        y = F.layer_norm(total.movedim(1, -1), total.shape[1:2], q["out_norm.weight"], q["out_norm.bias"], 1e-5)
        return self.conv(y.movedim(-1, 1) * F.gelu(z), f"{name}.out_proj")

    def block(self, x, name):
        projection = "proj_conv" if f"{name}.proj_conv.0.weight" in self.p else "in_proj"
        x = self.unit(x, f"{name}.{projection}.0", f"{name}.{projection}.1")
        y = self.batch_norm(self.conv(x, f"{name}.lsblock.fc1"), f"{name}.lsblock.norm")
        y = x + self.conv(F.gelu(self.conv(y, f"{name}.lsblock.fc2")), f"{name}.lsblock.fc3")
        y = self.norm(y, f"{name}.norm")
        scans = [f"{name}.op"] if projection == "proj_conv" else [f"{name}.ss2d.{i}" for i in range(2)]
        for scan in scans:
            y = self.scan(y, scan) if f"{scan}.Ds" in self.p else y
        x = x + y
        a, v = self.conv(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1").chunk(2, 1)
        return x + self.conv(F.gelu(self.conv(a, f"{name}.mlp.dwconv") + a) * v, f"{name}.mlp.fc2")

    def raw(self, x):
        x = self.unit(x, "model.0.conv.0", "model.0.conv.1", 2, F.gelu)
        x = self.unit(x, "model.0.conv.3", "model.0.conv.4", 2)
        layers = {}
        for i in range(1, 8):
            if i % 2 == 0:
                x = torch.cat([x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)], 1)
                x = self.unit(x, f"model.{i}.pw_linear.0", f"model.{i}.pw_linear.1")
            elif f"model.{i}.proj_conv.0.weight" in self.p:
                x = self.block(x, f"model.{i}")
            else:
                for j in range(2):
                    x = self.block(x, f"model.{i}.{j}")
            layers[i] = x
        pooled = [self.named(x, "model.8.cv1")]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
        layers[8] = self.named(torch.cat(pooled, 1), "model.8.cv2")
        for i, (source, skip) in NECK.items():
            if i < 15:
                x = layers[source].repeat_interleave(2, 2).repeat_interleave(2, 3)
            else:
                x = self.named(layers[i - 3], f"model.{source}", 2)
            layers[i] = self.block(torch.cat([x, layers[skip]], 1), f"model.{i}")
        return [
            torch.cat([self.branch(layers[i], f"model.21.{kind}.{level}") for kind in ("cv2", "cv3")], 1)
            for level, i in enumerate((14, 17, 20))
        ]

    def branch(self, x, name):
        return self.conv(self.named(self.named(x, f"{name}.0"), f"{name}.1"), f"{name}.2")


def decoded(raw):
    """Centre, size and class scores of every cell, box by box."""
    boxes = []
    for stride, x in zip((8, 16, 32), raw, strict=True):
        b, _, h, w = x.shape
        bins = x[:, :64].view(b, 4, 16, h, w).softmax(2)
        left, top, right, bottom = (bins * torch.arange(16.0).view(16, 1, 1)).sum(2).unbind(1)
        column, row = torch.arange(w) + 0.5, torch.arange(h)[:, None] + 0.5
        centre = [column + (right - left) / 2, row + (bottom - top) / 2]
        box = torch.stack([*centre, left + right, top + bottom], 1) * stride
        boxes.append(torch.cat([box, x[:, 64:].sigmoid()], 1).flatten(2))
    return torch.cat(boxes, 2)


def built(training=False, **kwargs):
    torch.manual_seed(0)
    model = vssm.create_model("test_mamba_yolo", **kwargs).double().train(training)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point() and key != "head.bins":
                value.add_(0.2 * torch.rand_like(value) if value.ndim < 2 else 0.1 * torch.randn_like(value))
    return model


@pytest.mark.parametrize(
    ("training", "size", "channels", "classes"), [(True, (64, 32), 1, 1), (False, (61, 95), 4, 130)],
    ids=["training", "evaluation"],
)  # fmt: skip
def test_the_network_is_that_of_the_sheet(training, size, channels, classes):
    """Stages of two blocks, two scans in a block of the neck, sides that the stem rounds up; a gradient."""
    rules = keys((1, 2, 1, 2))
    model = built(training, in_chans=channels, num_classes=classes, depths=(1, 2, 1, 2))
    p = {key: value.clone() for key, value in to_published(model.state_dict(), rules).items()}
    x = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
    sheet = Sheet(p, training)
    expected = sheet.raw(x)
    found = model(x) if training else model.head(model.forward_features(x))
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < 1e-9
    weights = [torch.randn_like(y) for y in expected]
    ours, theirs = (
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(maps, weights, strict=True)), x)[0]
        for maps in (found, expected)
    )
    assert error(ours, theirs) < 1e-8
    if training:
        after = to_published(model.state_dict(), rules)
        for name, (mean, var) in sheet.statistics.items():
            assert torch.allclose(after[f"{name}.running_mean"], mean, rtol=1e-9), name
            assert torch.allclose(after[f"{name}.running_var"], var, rtol=1e-9), name
        assert sum(key.endswith("running_mean") for key in p) == len(sheet.statistics)
    else:
        boxes = model(x)
        assert torch.allclose(boxes, decoded(expected), rtol=1e-9)


@pytest.mark.parametrize("form", ["bare", "half", "wrapped"])
def test_published_files_are_read(form, tmp_path):
    """Every entry of theirs starts with ``model.``, which is a wrapper elsewhere."""
    row = variants()["test_mamba_yolo"]
    source, model = row.build(), row.build()
    state = to_published(source.state_dict(), row.keys)
    assert all(key.startswith("model.") for key in state)
    content = {
        "bare": state,
        "half": {"model": {key: value.half() for key, value in state.items()}, "epoch": 3},
        "wrapped": {"model": {f"module.{key}": value for key, value in state.items()}},
    }[form]
    torch.save(content, tmp_path / "best.pt")
    load_weights(model, tmp_path / "best.pt")
    expected = source.half().float().state_dict() if form == "half" else source.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
