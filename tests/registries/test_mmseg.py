"""mmsegmentation with our backbones: its Runner trains, validates and resumes; its heads and ours are one function."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from scene_runs import scene_folder
from tolerance import error
from tree import ROOT, run_python

pytest.importorskip("mmseg", reason="needs the extra mmseg")

from vssm.models.keys import to_published
from vssm.registries.mmseg import allow_resume, ensure_mmcv_ops, point_sample, sigmoid_focal_loss
from vssm.registries.zoo import create_model, find

from mmengine.config import Config  # isort: skip
from mmengine.runner import Runner  # isort: skip
from mmseg.registry import MODELS  # isort: skip
from mmseg.utils import register_all_modules  # isort: skip

CONFIG = ROOT / "configs" / "mmsegmentation" / "upernet_vmamba_tiny_ade20k.py"


@pytest.fixture(autouse=True, scope="module")
def registered():
    register_all_modules(init_default_scope=True)


def segmenter(**heads):
    """mmsegmentation's own UPerNet on our smallest VMamba, as the config composes it."""
    config = Config.fromfile(str(CONFIG)).model
    norm = dict(type="BN", requires_grad=True)
    config.backbone = dict(type="VSSMBackbone", model="test_vmamba")
    config.decode_head.update(in_channels=[8, 16, 32, 64], channels=8, num_classes=5, norm_cfg=norm)
    config.auxiliary_head.update(in_channels=32, channels=4, num_classes=5, norm_cfg=norm)
    config.data_preprocessor.size = (64, 64)
    return config


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_our_upernet_is_theirs(training):
    """The same logits, auxiliary ones too, for the same weights under the same names, on a map of odd sizes."""
    theirs = MODELS.build(segmenter()).double()
    ours = create_model("test_upernet", out_channels=5).double()
    for module in (*theirs.modules(), *ours.modules()):
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 70, 45, dtype=torch.float64)
    theirs.train(training)
    ours.train(training)
    expected = [torch.nn.functional.interpolate(head.forward(theirs.extract_feat(x)), size=(70, 45), mode="bilinear")
                for head in (theirs.decode_head, theirs.auxiliary_head)]
    actual = ours(x)
    if training:
        assert error(actual[1], expected[1]) < 1e-9
    assert error(actual[0] if training else actual, expected[0]) < 1e-9


def test_a_published_segmenter_loads_into_theirs_and_ours():
    """Under the published names (mmsegmentation's heads, VMamba's backbone) every key fits, both ways."""
    source = create_model("test_upernet", out_channels=5)
    state = to_published(source.state_dict(), find("test_upernet").keys)
    assert "backbone.outnorm0.weight" in state
    assert "backbone.layers.0.blocks.0.op.A_logs" in state
    theirs = MODELS.build(segmenter())
    theirs.load_state_dict(dict(state), strict=True)
    for name, value in source.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name


def run_config(root, steps):
    config = Config.fromfile(str(CONFIG))
    config.model = segmenter()
    config.model.decode_head.num_classes = config.model.auxiliary_head.num_classes = 2
    for loader, split in (("train_dataloader", "training"), ("val_dataloader", "validation")):
        config[loader].update(batch_size=4 if split == "training" else 1, num_workers=0, persistent_workers=False)
        config[loader].dataset.update(
            type="BaseSegDataset", data_root=str(root), reduce_zero_label=True,
            img_suffix=".jpg", seg_map_suffix=".png",
            metainfo=dict(classes=("ground", "disk"), palette=[[0, 0, 0], [255, 255, 255]]),
        )  # fmt: skip
    scale = dict(type="RandomResize", scale=(96, 72), ratio_range=(0.8, 1.2), keep_ratio=True)
    pipeline = config.train_dataloader.dataset.pipeline
    config.train_dataloader.dataset.pipeline = [
        scale if step.type == "RandomResize" else dict(step, crop_size=(64, 64)) if step.type == "RandomCrop" else step
        for step in pipeline
        if step.type != "PhotoMetricDistortion"
    ]
    for step in config.val_dataloader.dataset.pipeline:
        if step.type == "Resize":
            step.scale = (96, 72)
    config.optim_wrapper.optimizer.lr = 1e-2
    config.param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=1.0, begin=0, end=30, by_epoch=False)]
    config.train_cfg = dict(type="IterBasedTrainLoop", max_iters=steps, val_interval=15)
    config.default_hooks.checkpoint = dict(type="CheckpointHook", by_epoch=False, interval=15)
    config.env_cfg.dist_cfg.backend = "gloo"
    config.update(work_dir=str(root / "work"), test_dataloader=None, test_cfg=None, test_evaluator=None,
                  log_level="ERROR", randomness=dict(seed=0), experiment_name=f"run{steps}")
    return config


def test_runner_trains_validates_and_resumes(tmp_path):
    """A disk is found after 30 steps; a run stopped at 15 goes on at 15, with the optimiser's state."""
    scene_folder(tmp_path)
    Runner.from_cfg(run_config(tmp_path, 15)).train()
    assert (tmp_path / "work" / "iter_15.pth").is_file()
    allow_resume()
    config = run_config(tmp_path, 30)
    config.resume = True
    runner = Runner.from_cfg(config)
    assert runner.iter == 0
    runner.train()
    assert runner.iter == 30
    steps = {int(state["step"]) for state in runner.optim_wrapper.optimizer.state_dict()["state"].values()}
    assert steps == {30}
    assert runner.message_hub.get_scalar("val/mIoU").current() > 60  # about 40 without a disk


def test_config_builds_the_published_model():
    config = deepcopy(Config.fromfile(str(CONFIG)).model)
    config.backbone.pretrained = False
    with torch.device("meta"):
        model = MODELS.build(config)
        ours = create_model("upernet_vmamba_tiny")
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


def test_the_stand_ins_for_compiled_ops():
    assert ensure_mmcv_ops() is getattr(__import__("mmcv.ops").ops, "stands_in_for_compiled_ops", False)
    maps = torch.arange(12.0).view(1, 1, 3, 4)
    corners = point_sample(maps, torch.tensor([[[1 / 8, 1 / 6], [7 / 8, 5 / 6]]]))
    torch.testing.assert_close(corners, torch.tensor([[[0.0, 11.0]]]))
    logits, labels = torch.tensor([[2.0, -1.0], [0.5, 0.0]]), torch.tensor([0, 2])
    p = logits.sigmoid()
    expected = torch.stack([
        -0.25 * (1 - p[0, 0]) ** 2 * p[0, 0].log(), -0.75 * p[0, 1] ** 2 * (1 - p[0, 1]).log(),
        -0.75 * p[1, 0] ** 2 * (1 - p[1, 0]).log(), -0.75 * p[1, 1] ** 2 * (1 - p[1, 1]).log(),
    ]).view(2, 2)  # fmt: skip
    torch.testing.assert_close(sigmoid_focal_loss(logits, labels, reduction="none"), expected)
    torch.testing.assert_close(sigmoid_focal_loss(logits, labels), expected.sum() / 2)


def test_an_op_that_is_missing_is_named():
    if not ensure_mmcv_ops():
        pytest.skip("mmcv is compiled here")
    import mmcv.ops

    with pytest.raises(ModuleNotFoundError, match=r"mmcv\.ops\.DeformConv2d needs a compiled mmcv"):
        mmcv.ops.DeformConv2d


def test_a_backbone_must_be_a_classifier():
    with pytest.raises(ValueError, match="must name a classifier of the zoo, got 'test_upernet'"):
        MODELS.build(dict(type="VSSMBackbone", model="test_upernet"))


def test_only_importing_the_registry_imports_mmsegmentation():
    loaded = run_python("import sys, vssm, vssm.registries\nprint(*{'mmseg', 'mmcv', 'mmengine'} & set(sys.modules))")
    assert loaded.strip() == ""
