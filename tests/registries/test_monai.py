"""MONAI with our backbones: FlexibleUNet, sliding windows, the RetinaNet detector, networks of bundles."""

from __future__ import annotations

import pytest
import torch
from tree import run_python

pytest.importorskip("monai", reason="needs the extra medical")

from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
from monai.apps.detection.networks.retinanet_network import RetinaNet
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
from monai.bundle import ConfigParser
from monai.inferers import sliding_window_inference
from monai.networks.nets import FlexibleUNet

from vssm.registries.monai import FlexEncoder, FPNExtractor, encoder_names
from vssm.registries.zoo import create_model

SIZES = {2: (64, 96), 3: (32, 64, 32)}
TINY = [name for name in encoder_names() if name.startswith("test_")]


def unet(backbone, spatial_dims):
    return FlexibleUNet(
        in_channels=1, out_channels=3, backbone=backbone, spatial_dims=spatial_dims,
        decoder_channels=(16, 16, 8, 8, 8), norm="instance",
    )  # fmt: skip


@pytest.mark.parametrize(("backbone", "spatial_dims"), [*((name, 2) for name in TINY), ("test_vmamba", 3)])
def test_flexible_unet(backbone, spatial_dims):
    """By name: logits of the input's size, a gradient for every parameter."""
    model, x = unet(backbone, spatial_dims), torch.randn(1, 1, *SIZES[spatial_dims])
    logits = model(x)
    assert logits.shape == (1, 3, *x.shape[2:])
    logits.square().mean().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_encoder_halves_from_the_first_map_on(spatial_dims):
    """FlexibleUNet does not check this: with a first map of stride 4 its output would have half the size."""
    x = torch.randn(1, 2, *(64,) * spatial_dims)
    maps = FlexEncoder("test_vmamba", spatial_dims, 2)(x)
    assert [tuple(y.shape[2:]) for y in maps] == [(64 // 2**i,) * spatial_dims for i in range(1, 6)]
    widths = FlexEncoder.num_channels_per_output()[encoder_names().index("test_vmamba")]
    assert [y.shape[1] for y in maps] == list(widths)
    assert len(widths) == FlexEncoder.num_outputs()[0] == 5


def test_two_unets_do_not_share_their_arguments():
    first, second = unet("test_vmamba", 2), unet("test_vmamba", 3)
    assert first(torch.randn(1, 1, 32, 32)).ndim == 4
    assert second(torch.randn(1, 1, 32, 32, 32)).ndim == 5


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_sliding_windows(spatial_dims):
    """Windows larger than, as large as and smaller than the input; one window is the network itself."""
    model = unet("test_vmamba", spatial_dims).eval()
    x = torch.randn(1, 1, *(40,) * spatial_dims)
    with torch.no_grad():
        assert sliding_window_inference(x, 32, 2, model, overlap=0.5).shape == (1, 3, *x.shape[2:])
        window = x[..., :32, :32] if spatial_dims == 2 else x[..., :32, :32, :32]
        torch.testing.assert_close(sliding_window_inference(window, 32, 1, model), model(window))


@pytest.mark.parametrize(("spatial_dims", "extra"), [(2, "pool"), (2, "p6p7"), (3, None)])
def test_retinanet(spatial_dims, extra):
    """One training step changes every parameter that has a loss; inference returns boxes, labels and scores."""
    extractor = FPNExtractor("test_vmamba", spatial_dims, 1, 8, levels=(0, 1, 2), extra=extra)
    count = 3 + {"pool": 1, "p6p7": 2, None: 0}[extra]
    network = RetinaNet(
        spatial_dims, num_classes=2, num_anchors=1, feature_extractor=extractor, size_divisible=extractor.size_divisible
    )
    shapes = [(8,) * spatial_dims]
    detector = RetinaNetDetector(
        network, AnchorGeneratorWithAnchorShape([2**i for i in range(count)], shapes), size_divisible=16
    )
    detector.set_atss_matcher(num_candidates=4)
    detector.set_hard_negative_sampler(batch_size_per_image=16, positive_fraction=0.5, min_neg=1, pool_size=4)
    detector.set_box_selector_parameters(score_thresh=0.0, topk_candidates_per_level=10, detections_per_img=5)
    size = (48, 32, 32)[:spatial_dims]
    images = [torch.randn(1, *size), torch.randn(1, *size)]
    low, high = [4.0] * spatial_dims, [14.0] * spatial_dims
    targets = [
        {"boxes": torch.tensor([low + high]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 2 * spatial_dims), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.01)
    losses = detector(images, targets)
    loss = losses["classification"] + losses["box_regression"]
    assert torch.isfinite(loss)
    loss.backward()
    assert all(value.grad is not None for name, value in network.feature_extractor.maps.named_parameters())
    optimizer.step()
    detector.eval()
    with torch.no_grad():
        found = detector(images)
    assert [set(one) for one in found] == [{"boxes", "labels", "labels_scores"}] * 2
    assert all(one["boxes"].shape == (len(one["labels"]), 2 * spatial_dims) for one in found)


@pytest.mark.parametrize("target", [
    {"_target_": "vssm.create_model", "name": "test_upernet", "out_channels": 2},
    {"_target_": "vssm.models.upernet.UPerNet", "backbone": "test_vmamba", "out_channels": 2, "channels": 8},
])
def test_networks_of_bundles(target):
    model = ConfigParser({"net": target}).get_parsed_content("net")
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 2, 32, 32)


@pytest.mark.parametrize(("call", "said"), [
    (lambda: FlexEncoder("test_vssd", 3), "test_vssd builds in 2D only; in 3D there are .*vmamba_tiny"),
    (lambda: FlexEncoder("vmamba_tiny", 3, 1, pretrained=True), "are for images; pass pretrained=False in 3D"),
    (lambda: FlexEncoder("test_vmamba", 1), "spatial_dims must be 2 or 3, got 1"),
    (lambda: FlexEncoder("test_upernet"), "must be a classifier of the zoo, got 'test_upernet'"),
    (lambda: FPNExtractor("test_vmamba", levels=(2, 1)), r"levels must rise within 0, 1, 2, 3, got \(2, 1\)"),
    (lambda: FPNExtractor("test_vmamba", extra="p6"), "extra must be 'pool', 'p6p7' or None, got 'p6'"),
    (lambda: create_model("test_vmamba", spatial_dims=3), "in 3D there is no classifier"),
])
def test_what_cannot_be_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_only_importing_the_registry_imports_monai():
    assert run_python("import sys, vssm, vssm.registries\nprint('monai' in sys.modules)").strip() == "False"
