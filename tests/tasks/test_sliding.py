"""Windows that stream: equal to MONAI's, mapped back to any grid, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from tree import run_python

pytest.importorskip("monai", reason="needs the extra medical")

from monai.inferers import sliding_window_inference

from vssm.data.volume_files import Case
from vssm.data.volumes import Preparation, Scan
from vssm.tasks.sliding import GridMap, Inference, segment, stream_logits, window_logits


def network(spatial_dims=3, channels=2, classes=3):
    torch.manual_seed(0)
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
    return nn.Sequential(conv(channels, classes, 3, padding=1), nn.Tanh())


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("shape", "patch"), [
    ((23, 17, 30), (8, 8, 8)), ((7, 9, 31), (8, 8, 16)), ((8, 8, 8), (8, 8, 8)), ((12, 15, 9), (8, 8, 1)),
], ids=str)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_planes_are_those_of_monai(shape, patch, overlap, axis):
    flat = patch.index(1) if 1 in patch else None
    net = network(2 if flat is not None else 3)
    volume = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    inference = Inference(overlap=overlap, batch_size=3)
    with torch.no_grad():
        chunks = list(stream_logits(net, volume, patch, inference=inference, axis=axis))
        expected = sliding_window_inference(
            volume[None], patch, 3, lambda x: window_logits(net, x, flat), overlap=overlap, mode="gaussian"
        )[0]
    torch.testing.assert_close(torch.cat(chunks).movedim(0, axis + 1), expected, rtol=0, atol=2e-6)


def test_flips_are_averaged_in_all_combinations():
    net, windows = network(), torch.randn(1, 2, 6, 5, 4)
    expected = torch.stack([
        net(windows.flip(axes)).flip(axes) for axes in [(), (2,), (4,), (2, 4)]
    ]).mean(0)
    torch.testing.assert_close(window_logits(net, windows, None, (0, 2)), expected)


AFFINES = {
    "RAS": np.diag([2.0, 1.5, 3.0, 1]),
    "LSA": np.array([[-2.0, 0, 0, 30], [0, 0, 1.5, -10], [0, 1.0, 0, 5], [0, 0, 0, 1]]),
    "oblique": np.array([[1.9, 0.2, 0, 3], [-0.2, 1.9, 0, 4], [0, 0, 2.5, 5], [0, 0, 0, 1.0]]),
}


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("preparation", [
    Preparation(patch=(8, 8, 8)),
    Preparation(patch=(8, 8, 8), orientation=None),
    Preparation(patch=(8, 8, 8), spacing_mm=(1.0, 1.0, 2.0)),
    Preparation(patch=(8, 8, 8), spacing_mm=(3.1, 2.9, 3.3)),
    Preparation(patch=(8, 8, 8), size=(20, 17, 9)),
    Preparation(patch=(8, 8, 8), crop_foreground=True),
], ids=str)
def test_what_goes_to_the_prepared_grid_comes_back(name, preparation):
    """A smooth map that is prepared and resampled back is itself, up to interpolation, in its own orientation."""
    affine, shape = AFFINES[name], (14, 12, 10)
    own = np.stack(np.meshgrid(*(np.arange(n) / n for n in shape), indexing="ij"))
    image = (np.sin(3 * own).sum(0) + 1).astype(np.float32)[None]
    image[:, :2] = 0 if preparation.crop_foreground else image[:, :2]
    ready = preparation(image.copy(), affine)
    grid = GridMap.between(ready["image"].shape[1:], ready["affine"].numpy(), shape, affine)
    kept = image[:, 2:] if preparation.crop_foreground else image
    unprepared = ready["image"] * kept.std() + kept.mean()
    for axis in range(3):
        back = np.zeros(shape, np.float32)
        planes = np.moveaxis(grid.turned(back), axis, 0)
        for number, plane in grid.resample(iter(unprepared.movedim(axis + 1, 0).split(3)), axis):
            if plane is not None:
                planes[number] = plane[0].clamp(-1, 9).numpy()
        inside = (slice(2, None), slice(None), slice(None)) if preparation.crop_foreground else (slice(None),) * 3
        same_grid = preparation.spacing_mm is None and preparation.size is None
        off = np.abs(back - image[0])[inside]
        assert off.max() < (1e-4 if same_grid else 1.0)  # where the prepared grid ends sooner, its edge is repeated
        assert off[2:-2, 2:-2, 2:-2].max() < (1e-4 if same_grid else 0.12)


def test_a_cropped_border_is_background():
    image = np.zeros((1, 12, 10, 8), np.float32)
    image[:, 4:9, 3:8, 2:7] = 1 + np.random.default_rng(0).random((5, 5, 5))
    ready = Preparation(patch=(4, 4, 4), crop_foreground=True)(image, np.eye(4))
    assert ready["image"].shape == (1, 5, 5, 5)
    scan = Scan(0, Case("a", ("a",)), ready["image"], ready["affine"].numpy(), (12, 10, 8), np.eye(4))
    shares = np.full((12, 10, 8, 2), np.nan, np.float32)
    label = segment(lambda x: torch.cat([-x * 0 - 1, x * 0 + 1], 1), scan, (4, 4, 4), Inference(), probabilities=shares)
    expected = np.zeros((12, 10, 8))
    expected[4:9, 3:8, 2:7] = 1
    np.testing.assert_array_equal(label, expected)
    np.testing.assert_allclose(shares[..., 1], np.where(expected, 1 / (1 + np.exp(-2)), 0), atol=1e-6)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-6)


def test_anisotropic_answers_are_interpolated_linearly():
    """Logits on planes 0 and 1 mm of an axis; at half a millimetre the answer is their mean."""
    grid = GridMap.between((2, 1, 1), np.eye(4), (3, 1, 1), np.diag([0.5, 1, 1, 1.0]))
    planes = [p for _, p in grid.resample(iter(torch.tensor([[0.0, 4], [2, 0]]).view(2, 1, 2, 1, 1)), 0)]
    assert [plane.flatten().tolist() for plane in planes] == [[0, 4], [1, 2], [2, 0]]


def test_grids_that_are_turned_against_each_other_are_refused():
    turn = np.eye(4)
    turn[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    with pytest.raises(ValueError, match="must lie along the same axes"):
        GridMap.between((4, 4, 4), np.eye(4), (4, 4, 4), turn)


@pytest.mark.parametrize(("options", "said"), [
    ({"overlap": 1.0}, "overlap must be"),
    ({"batch_size": 0}, "batch_size 1 or more"),
    ({"flips": (3,)}, "flips among"),
])
def test_bad_settings_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Inference(**options)


def test_memory_grows_with_a_slab_and_not_with_the_classes_of_the_volume():
    """40 classes of 64 x 64 x 384 voxels in float32 are 252 MB; four times the planes need little more than before."""
    code = """
import resource, torch
from vssm.tasks.sliding import Inference, stream_logits
torch.set_num_threads(1)
volume = torch.zeros(1, 64, 64, 384)
net = lambda x: x.expand(-1, 40, -1, -1, -1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
list(stream_logits(net, volume[..., :96], (64, 64, 32), inference=Inference(overlap=0.0), axis=2))
before, planes = peak(), 0
for chunk in stream_logits(net, volume, (64, 64, 32), inference=Inference(overlap=0.0), axis=2):
    planes += len(chunk)
assert planes == 384
print(peak() - before)
"""
    grown = float(run_python(code).split()[-1])
    assert grown < 60
