"""Stock nnU-Net plans, trains, validates and predicts with our networks through its external trainer path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tree import ROOT

from vssm.models.segmamba import SegMamba
from vssm.models.umamba import UMamba
from vssm.registries.nnunet import PlanNetwork, segmamba, trainer_folder, umamba

needs_nnunet = pytest.mark.skipif(find_spec("nnunetv2") is None, reason="needs the extra nnunet")


def raw_dataset(root):
    """Dataset999_Balls: six volumes of 40 x 36 x 44 voxels with a bright ball, labels 0 and 1."""
    import nibabel

    folder = root / "raw" / "Dataset999_Balls"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    noise, axes = np.random.default_rng(0), np.meshgrid(*map(np.arange, (40, 36, 44)), indexing="ij")
    affine = np.diag([1.0, 1.0, 1.2, 1.0])
    for i in range(6):
        centre, radius = noise.integers(14, 24, 3), noise.integers(8, 11)
        ball = sum((axis - c) ** 2 for axis, c in zip(axes, centre)) < radius**2
        image = noise.normal(0, 1, ball.shape) + 4 * ball
        nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), affine), folder / "imagesTr" / f"b{i}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(ball.astype(np.uint8), affine), folder / "labelsTr" / f"b{i}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "MRI"}, "labels": {"background": 0, "ball": 1}, "numTraining": 6,
        "file_ending": ".nii.gz",
    }))  # fmt: skip


RUN = """
import sys, torch
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.paths import nnUNet_raw, nnUNet_results

if __name__ == "__main__":
    configuration, *trainers = sys.argv[1:]
    torch.set_num_threads(1)
    extract_fingerprints([999], num_processes=1)
    plans = plan_experiments([999])
    preprocess([999], plans_identifier="nnUNetPlans", configurations=[configuration], num_processes=[1])
    for name in trainers:
        torch.manual_seed(0)
        trainer = get_trainer_from_args("999", configuration, 0, name, device=torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
        trainer.save_every = 1
        trainer.run_training()
        trainer.perform_actual_validation(False)
        losses = trainer.logger.local_logger.my_fantastic_logging if hasattr(trainer.logger, "local_logger") else \\
            trainer.logger.my_fantastic_logging
        assert all(torch.isfinite(torch.tensor(losses[key])).all() for key in ("train_losses", "val_losses")), losses
        predictor = nnUNetPredictor(tile_step_size=0.5, use_mirroring=False, device=torch.device("cpu"))
        predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), "checkpoint_final.pth")
        image = torch.randn(1, 40, 36, 44) if configuration != "2d" else torch.randn(1, 2, 36, 44)
        logits = predictor.predict_logits_from_preprocessed_data(image)
        assert logits.shape == (2, *image.shape[1:]), logits.shape
        print("DONE", name, type(trainer.network).__name__, trainer.network.deep_supervision)
"""


def train(tmp_path, configuration, *trainers):
    raw_dataset(tmp_path)
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {
        **os.environ, "nnUNet_raw": str(tmp_path / "raw"), "nnUNet_preprocessed": str(tmp_path / "preprocessed"),
        "nnUNet_results": str(tmp_path / "results"), "nnUNet_extTrainer": str(trainer_folder()),
        "nnUNet_n_proc_DA": "1", "nnUNet_compile": "f", "OMP_NUM_THREADS": "1", "nnUNet_def_n_proc": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    command = [sys.executable, str(script), configuration, *trainers]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-4000:])
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("DONE")]
    assert [name for name, *_ in found] == list(trainers)
    for name in trainers:
        folder = tmp_path / "results" / "Dataset999_Balls" / f"{name}__nnUNetPlans__{configuration}" / "fold_0"
        assert (folder / "checkpoint_final.pth").is_file()
        assert (folder / "validation" / "summary.json").is_file()


@needs_nnunet
@pytest.mark.slow
def test_segmamba_and_umamba_in_nnunet(tmp_path):
    train(tmp_path, "3d_fullres", "nnUNetTrainerVSSM_SegMamba", "nnUNetTrainerVSSM_UMambaBot")


@needs_nnunet
@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_every_trainer_in_nnunet(tmp_path, configuration):
    names = ["SegMamba_NoMamba", "UMambaEnc", "UMambaEnc_NoMamba", "NoMamba"]
    train(tmp_path, configuration, *(f"nnUNetTrainerVSSM_{name}" for name in names))


PLAN = {
    "patch_size": [8, 16, 16],
    "architecture": {"arch_kwargs": {
        "n_stages": 3, "features_per_stage": [4, 8, 8], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "n_conv_per_stage": [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
    }},
}  # fmt: skip


def test_a_patch_of_any_size_is_padded_and_cut():
    """What comes back has the patch's size; where no padding is needed it is the network alone."""
    small = SegMamba(2, 3, 2, depths=(1, 1, 1, 1), features=(4, 6, 8, 10), hidden_size=12, d_state=4)
    model = PlanNetwork(small).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 40, 37)).shape == (1, 2, 40, 37)
        x = torch.randn(1, 3, 32, 48)
        assert torch.equal(model(x), small(x))


@pytest.mark.parametrize("training", [False, True])
def test_umamba_follows_the_plan(training):
    """Logits of each stage of the decoder, in training and evaluation; the finest alone without deep supervision."""
    model = umamba(PLAN, 2, 3, True).train(training)
    assert isinstance(model.model, UMamba)
    x = torch.randn(1, 2, 8, 16, 16)
    outputs = model(x)
    assert [tuple(y.shape) for y in outputs] == [(1, 3, 8, 16, 16), (1, 3, 8, 8, 8)]
    model.deep_supervision = False
    assert torch.equal(model(x), outputs[0])
    alone = umamba(PLAN, 2, 3, False)
    assert set(alone.state_dict()) == set(model.state_dict())


def test_twins_have_no_scan():
    for twin in (umamba(PLAN, 1, 2, True, mixer="conv"), umamba(PLAN, 1, 2, True, mamba="encoder", mixer="conv"),
                 segmamba({"patch_size": [32, 32]}, 1, 2, False, mixer="conv")):  # fmt: skip
        assert not any("ssm" in name for name in twin.state_dict())


def test_what_a_plan_lacks_is_named():
    with pytest.raises(ValueError, match="strides"):
        umamba({"patch_size": [8, 8], "architecture": {"arch_kwargs": {}}}, 1, 2, True)
    with pytest.raises(ValueError, match="SegMamba has one output; set enable_deep_supervision = False"):
        segmamba(PLAN, 1, 2, True)


def test_the_module_prints_the_folder_of_the_trainers():
    done = subprocess.run(
        [sys.executable, "-m", "vssm.registries.nnunet"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip().endswith("trainers")
    assert (trainer_folder() / "vssm_trainers.py").is_file()
