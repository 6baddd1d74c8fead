"""Published backbones that return some of their maps: their files hold more than that."""

from __future__ import annotations

import pytest
import torch

from vssm.checkpoints import load_state
from vssm.models import efficientvmamba, localmamba, msvmamba, plainmamba, spatialmamba, vmamba, vssd
from vssm.models.keys import to_published
from vssm.models.variant import Published

V2 = dict(ssm_d_state=1, ssm_ratio=1.0, ssm_conv_bias=False, forward_type="v05_noz", mlp_ratio=4.0,
          downsample_version="v3", patchembed_version="v2")  # fmt: skip
DIRECTIONS = [["h", "v"], ["w2"], ["v", "h_flip"], ["h"]]
SMALL = dict(dims=8, depths=[1, 1, 1, 1])
HIERARCHICAL = {
    "vmamba": (vmamba, "vmamba.py:Backbone_VSSM", {**SMALL, **V2}),
    "efficientvmamba": (efficientvmamba, "x.py:Backbone_EfficientVSSM", SMALL),
    "msvmamba": (msvmamba, "vmamba.py (branch master):Backbone_VSSM", SMALL),
    "msvmambav3": (msvmamba, "vmamba.py (branch v2):Backbone_VSSM", SMALL),
    "spatialmamba": (spatialmamba, "x.py:Backbone_SpatialMamba", SMALL),
    "localmamba": (localmamba, "x.py:Backbone_LocalVSSM", {**SMALL, "directions": DIRECTIONS}),
    "vssd": (vssd, "x.py Backbone_VMAMBA2", dict(embed_dim=16, depths=[1, 1, 1, 1], d_state=4)),
}


def outputs(built: Published, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(built.run(built.model.eval(), {"x": x}).values())


@pytest.mark.parametrize("indices", [(0,), (0, 1), (0, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("family", HIERARCHICAL)
def test_stages_that_nothing_reads_are_in_the_file(family, indices):
    torch.manual_seed(0)
    module, entry, kwargs = HIERARCHICAL[family]
    whole, part = (module.published(entry, {**kwargs, "out_indices": each}) for each in ((0, 1, 2, 3), indices))
    unused = tuple(f"outnorm{i}." for i in range(4) if i not in indices)
    state = to_published(whole.model.state_dict(), whole.keys)
    load_state(part.model, {k: v for k, v in state.items() if not k.startswith(unused)}, part.keys)
    x = torch.randn(2, 3, 75, 45)
    expected = outputs(whole, x)
    for y, i in zip(outputs(part, x), indices, strict=True):
        assert torch.equal(y, expected[i])


@pytest.mark.parametrize("family", HIERARCHICAL)
def test_maps_come_in_the_order_of_the_stages(family):
    """However their numbers are listed."""
    module, entry, kwargs = HIERARCHICAL[family]
    maps = module.published(entry, {**kwargs, "out_indices": (3, 1)}).model.eval()(torch.randn(1, 3, 64, 64))
    assert [y.shape[2:] for y in maps] == [(8, 8), (2, 2)]


ISOTROPIC = {
    "plainmamba": (plainmamba, "x:PlainMambaSeg", {"arch": "L1"}),
    "localvim": (localmamba, "x:Backbone_LocalVisionMamba", dict(
        img_size=32, patch_size=8, depth=3, embed_dim=16, rms_norm=True, if_abs_pos_embed=True,
        final_pool_type="mean", directions=DIRECTIONS[:3],
    )),
}  # fmt: skip


@pytest.mark.parametrize("family", ISOTROPIC)
def test_maps_come_in_the_order_of_the_blocks(family, monkeypatch):
    """However their numbers are listed; norms are counted, or named, in that order."""
    monkeypatch.setitem(plainmamba.ARCHITECTURES, "L1", dict(embed_dim=16, depth=3, stem_convs=1, conv_blocks=(0,)))
    module, entry, kwargs = ISOTROPIC[family]
    sorted_, listed = (module.published(entry, {**kwargs, "out_indices": each}) for each in ([0, 2], [2, 0]))
    load_state(listed.model, to_published(sorted_.model.state_dict(), sorted_.keys), listed.keys)
    x = torch.randn(1, 3, 32, 24)
    pairs = zip(outputs(listed, x), outputs(sorted_, x), strict=True)
    assert all(torch.equal(y, expected) for y, expected in pairs)
