"""Training in 16 bits on a GPU: 500 steps of the two smallest published variants of each family."""

from __future__ import annotations

import pytest
import timm
import torch
from half_precision import train
from torch.nn import functional as F

import vssm  # noqa: F401 - its models become timm's

SMALLEST = (
    "vim_tiny vim_small vmamba_tiny vanilla_vmamba_tiny efficientvmamba_tiny "
    "efficientvmamba_small plainmamba_l1 plainmamba_l2 localvim_tiny localvim_tiny_fixed "
    "localvmamba_tiny localvmamba_small msvmamba_nano msvmamba_micro groupmamba_tiny "
    "groupmamba_small spatialmamba_tiny spatialmamba_small vssd_micro vssd_tiny "
    "mamba2d_n mamba2d_t"
).split()
SIZE = 64


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SMALLEST)
def test_500_steps_stay_finite_and_the_loss_falls(name, dtype):
    """Sixteen random images are learned by heart."""
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.0, **({"img_size": SIZE} if fixed else {}))
    model = model.cuda().to(memory_format=torch.channels_last).train()
    images = torch.randn(16, 3, SIZE, SIZE, device="cuda").contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (16,), device="cuda")
    losses = train(model, lambda: F.cross_entropy(model(images), labels), dtype, 5e-4)
    assert losses.isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-20:].sum() < 0.5 * losses[:20].sum()
