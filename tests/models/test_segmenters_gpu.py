"""SegMamba and U-Mamba on a GPU: half precision stays finite and learns; memory of a training step at 128 voxels."""

from __future__ import annotations

import pytest
import torch
from half_precision import train
from torch.nn import functional as F

import vssm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SMALL = {
    "segmamba_nano": {},
    "umamba_nano": {"deep_supervision": True},
    "umamba_enc_3d": dict(features=(12, 24, 48, 64), strides=(1, 2, 2, 2), kernel_size=3, depths=(2, 2, 1, 1),
                          decoder_depths=(2, 2, 1), img_size=(32, 32, 32), out_channels=3),
}  # fmt: skip


def shells(count):
    """Noisy volumes of 32 voxels a side, and in which of three shells around a random centre each voxel lies."""
    axes = torch.meshgrid(*[torch.linspace(-1, 1, 32, device="cuda")] * 3, indexing="ij")
    centre = torch.rand(count, 3, 1, 1, 1, device="cuda") - 0.5
    radius = (torch.stack(axes)[None] - centre).square().sum(1).sqrt()
    label = (radius > 0.5).long() + (radius > 1).long()
    return (label + 0.5 * torch.randn(label.shape, device="cuda"))[:, None], label


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_500_steps_stay_finite_and_learn(name, dtype):
    """New volumes at every step; deep supervision where the model has it."""
    model = vssm.create_model(name, **SMALL[name]).cuda().train()

    def loss():
        x, label = shells(2)
        outputs = model(x)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        labels = [F.interpolate(label[:, None].float(), y.shape[2:])[:, 0].long() for y in outputs]
        return torch.stack([F.cross_entropy(y, at) / (i + 1) for i, (y, at) in enumerate(zip(outputs, labels))]).sum()

    losses = train(model, loss, dtype, 1e-3)
    assert losses.isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-50:].sum() < 0.5 * losses[:50].sum()


@pytest.mark.parametrize(("checkpointing", "gigabytes"), [(False, 10.0), (True, 6.0)])
def test_a_step_of_128_voxels_takes_little_memory(checkpointing, gigabytes):
    """Batch 2 in bfloat16, optimiser included; the published code takes 17.5 GB."""
    model = vssm.create_model("segmamba").cuda().train()
    model.set_grad_checkpointing(checkpointing)
    optimiser = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.99, nesterov=True)
    x, label = torch.randn(2, 4, 128, 128, 128, device="cuda"), torch.randint(4, (2, 128, 128, 128), device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        optimiser.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(x), label)
        loss.backward()
        optimiser.step()
    assert torch.cuda.max_memory_allocated() < gigabytes * 1e9
