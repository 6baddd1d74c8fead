"""UPerNet on any backbone of the zoo. (That its heads are mmsegmentation's: tests/registries/test_mmseg.py.)"""

from __future__ import annotations

import pytest
import torch
from tolerance import error

from vssm.models.backbone import TokenMaps, as_backbone, quarters
from vssm.models.keys import shapes_of, to_published
from vssm.models.upernet import UPerNet
from vssm.models.vim import VimBackbone
from vssm.registries.zoo import create_model, find, list_models

TINY = {"channels": 8, "auxiliary_channels": 4, "out_channels": 3}
BACKBONES = {  # one of each kind: four stages; tokens as published, class token dropped; tokens by TokenMaps
    "test_vmamba": {},
    "test_vssd": {},
    "test_vim": {"depth": 4, "dynamic_img_size": True},
    "test_localvim": {},
}


@pytest.mark.parametrize("name", BACKBONES)
def test_any_classifier_is_a_backbone(name):
    """Logits of the image's size; every parameter gets a gradient; two outputs in training, one otherwise."""
    size = (64, 96) if name != "test_localvim" else (32, 32)
    model = UPerNet(name, backbone_kwargs=BACKBONES[name], **TINY)
    x = torch.randn(2, 3, *size)
    out = model(x)
    assert [tuple(y.shape) for y in out] == [(2, 3, *size)] * 2
    assert [info["reduction"] for info in model.backbone.feature_info] == [4, 8, 16, 32]
    sum(y.square().mean() for y in out).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    assert tuple(model.eval()(x).shape) == (2, 3, *size)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["test_vmamba", "test_vim"])
def test_checkpointing_changes_nothing(name):
    model = UPerNet(name, backbone_kwargs=BACKBONES[name], **TINY).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    model.set_grad_checkpointing()
    assert error(model(x), expected) < 1e-5


def test_synchronised_batch_norms_change_nothing():
    """The recipes convert them; whatever is fused with a batch norm would be lost there."""
    model = create_model("test_upernet").eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules())
    assert torch.equal(converted(x), expected)


def test_a_classifier_given_as_a_module_keeps_its_weights():
    classifier = create_model("test_vmamba", in_chans=1)
    weight = classifier.stem.conv1.weight
    model = UPerNet(classifier, in_channels=1, **TINY)
    assert model.backbone.stem.conv1.weight is weight
    assert model.eval()(torch.randn(1, 1, 33, 47)).shape == (1, 3, 33, 47)


def test_without_an_auxiliary_head_training_returns_logits():
    model = UPerNet("test_vmamba", out_channels=3, channels=8, auxiliary_channels=0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3, 32, 32)


def test_vim_becomes_the_published_backbone():
    backbone = as_backbone(create_model("test_vim", depth=4), features="stream", last="stream")
    assert isinstance(backbone, VimBackbone)
    assert backbone.features == "stream"
    assert quarters(24) == (5, 11, 17, 23)


@pytest.mark.parametrize(("name", "millions"), [
    ("upernet_vmamba_tiny", 62), ("upernet_vmamba_small_s2l15", 82), ("upernet_vmamba_base_s2l15", 122),
])
def test_sizes_are_those_published(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    assert round(sum(value.numel() for value in model.parameters()) / 1e6) == millions


def test_published_names_are_mmsegmentations():
    row, model = find("test_upernet"), create_model("test_upernet")
    names = set(to_published(model.state_dict(), row.keys))
    assert {
        "backbone.patch_embed.0.weight", "backbone.layers.0.blocks.0.op.x_proj_weight", "backbone.outnorm3.bias",
        "decode_head.psp_modules.3.1.conv.weight", "decode_head.fpn_bottleneck.bn.running_var",
        "decode_head.conv_seg.bias", "auxiliary_head.convs.0.conv.weight",
    } <= names  # fmt: skip


def test_published_weights_are_named_for_what_they_are():
    names = list_models("upernet_*", pretrained=True)
    assert {"upernet_vmamba_tiny", "upernet_vanilla_vmamba_base", "upernet_vssd_micro"} <= set(names)
    for name in names:
        (weights,) = find(name).weights.values()
        assert weights.num_classes == 150
        assert (weights.url or weights.hf_hub_filename).endswith(".pth")


def test_weights_load_with_other_classes(tmp_path):
    """A file under published names, for other classes: everything but the two classifiers comes from it."""
    source = create_model("test_upernet", out_channels=5)
    row = find("test_upernet")
    torch.save({"state_dict": to_published(source.state_dict(), row.keys), "meta": {}}, tmp_path / "x.pth")
    loaded = create_model("test_upernet", out_channels=5, checkpoint_path=tmp_path / "x.pth")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in source.state_dict().items())
    from vssm.checkpoints import load_weights

    other = create_model("test_upernet", out_channels=7)
    with pytest.raises(ValueError, match="conv_seg"):
        load_weights(other, tmp_path / "x.pth")
    load_weights(other, tmp_path / "x.pth", adapt=["classifier"])
    differing = {name for name, shape in shapes_of(source).items() if shape != shapes_of(other)[name]}
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in source.state_dict().items()
               if name not in differing)


@pytest.mark.parametrize(("kwargs", "said"), [
    ({"backbone": "vmamba_tinny"}, "must name a classifier of the zoo, got 'vmamba_tinny'"),
    ({"backbone": "test_upernet"}, "must name a classifier of the zoo, got 'test_upernet'"),
    ({"backbone": torch.nn.Identity()}, "must be a classifier of the zoo, got a Identity"),
    ({"backbone": torch.nn.Identity(), "backbone_kwargs": {"scan": "cross"}}, "for a backbone given by name"),
])
def test_a_wrong_backbone_is_refused(kwargs, said):
    with pytest.raises(ValueError, match=said):
        UPerNet(**kwargs)


def test_token_maps_need_four_blocks():
    with pytest.raises(ValueError, match="must name four of 3 blocks"):
        TokenMaps(create_model("test_plainmamba"), (0, 1, 3, 2))
