"""On GPUs: runs repeat bit for bit when asked to, resume exactly, and two GPUs train as one."""

from __future__ import annotations

import pytest
import torch
from small_runs import assert_same, checkpoint, fit_process, image_folder, small_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MODELS = {"test_vmamba": {}, "test_vim": {"img_size": 32, "patch_size": 8}}


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_deterministic_runs_are_equal_and_resume_exactly(name, precision, tmp_path):
    kwargs = {**MODELS[name], "drop_path_rate": 0.2}
    config = small_config(image_folder(tmp_path / "data"), model=name, model_kwargs=kwargs)
    config["trainer"].update(accelerator="gpu", deterministic=True, precision=precision)
    fit_process(tmp_path, "first", config)
    fit_process(tmp_path, "second", config)
    fit_process(tmp_path, "killed", config, kill_at=11)
    fit_process(tmp_path, "killed", config, "--ckpt_path", "last")
    first, second, killed = (checkpoint(tmp_path / run) for run in ("first", "second", "killed"))
    for key in ("state_dict", "trained_state_dict", "optimizer_states", "random_state", "global_step"):
        assert_same(second[key], first[key], key)
        assert_same(killed[key], first[key], key)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", MODELS)
def test_two_gpus_train_as_one_on_the_same_global_batch(name, tmp_path):
    """Without what is random inside a process, and without Adam, which makes whole steps of rounding errors."""
    options = {"mixup": {}, "ema_decay": None, "optimizer": {"name": "sgd", "lr": 0.05}}
    config = small_config(image_folder(tmp_path / "data"), model=name, model_kwargs=MODELS[name], **options)
    for gpus, batch in ((1, 4), (2, 2)):
        config["data"]["init_args"]["loader"]["batch_size"] = batch
        config["trainer"].update(accelerator="gpu", devices=gpus, strategy="ddp" if gpus > 1 else "auto")
        fit_process(tmp_path, str(gpus), config)
    one, two = (checkpoint(tmp_path / gpus)["state_dict"] for gpus in ("1", "2"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4)
