"""What the published recipes do not decay, by the published names of the parameters."""

from __future__ import annotations

import re

import pytest
import torch
from timm.optim import param_groups_weight_decay

from vssm.models.keys import to_published
from vssm.models.variant import variants


def vmamba(name, shape):
    return len(shape) > 1 and not name.endswith(".bias")


def vim(name, shape):
    return vmamba(name, shape) and name not in ("pos_embed", "cls_token")


def plainmamba(name, shape):
    return len(shape) > 1 and not re.search(r"\.bias$|\.pos_embed|\.A_log|\.D|\.direction_Bs", name)


def mamba2d(name, shape):
    return len(shape) > 1 and not re.search(r"\.(AT_log|AL_log|D)$", name)


def mambayolo(name, shape):
    """Vectors that are neither biases nor of norms, D among them, are decayed."""
    norm = re.search(r"norm|\.bn\.|conv\.[14]\.|pw_linear\.1\.|(proj_conv|in_proj)\.1\.", name)
    return "bias" not in name and not norm


RULES = {
    "test_efficientvmamba": vmamba, "test_msvmamba": vmamba, "test_msvmambav3": vmamba, "test_groupmamba": vmamba,
    "test_spatialmamba": vmamba, "test_vssd": vmamba, "test_plainmamba": plainmamba, "test_mamba2d": mamba2d,
    "test_mamba_yolo": mambayolo, "test_vmamba": vmamba, "test_vmamba_m2": vmamba, "test_vim": vim,
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_what_is_not_decayed(name):
    row, model = variants()[name], variants()[name].build()
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    marks = {n: torch.full(p.shape, id(p) in decayed) for n, p in model.named_parameters()}
    found = to_published(marks, row.keys)
    assert len(found) >= len(marks)
    assert any(mark.all() for mark in found.values())
    assert {n for n, mark in found.items() if mark.all()} == {n for n in found if RULES[name](n, found[n].shape)}
    assert all(mark.all() or not mark.any() for mark in found.values())
