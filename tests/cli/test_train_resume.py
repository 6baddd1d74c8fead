"""A run that is killed and resumed, or run again, ends in the same weights bit for bit."""

from __future__ import annotations

import pytest
import timm
import torch
from small_runs import EXACT, assert_same, checkpoint, fit_process, image_folder, small_config, write_config

from vssm.cli.train import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images") / "data")


def run(tmp_path, config, name, *arguments):
    """Fit in this process; return the last checkpoint."""
    config = {**config, "trainer": {**config["trainer"], "default_root_dir": str(tmp_path / name)}}
    assert main(["fit", "--config", write_config(tmp_path / f"{name}.yaml", config), *arguments]) == 0
    return checkpoint(tmp_path / name)


def test_two_runs_with_one_seed_are_equal_and_with_another_are_not(tmp_path, folder):
    config = small_config(folder)
    first, second = run(tmp_path, config, "first"), run(tmp_path, config, "second")
    other = run(tmp_path, config, "other", "--seed_everything=1")
    for key in EXACT:
        assert_same(first[key], second[key], key)
    weight = "model.head.weight"
    assert not torch.equal(first["state_dict"][weight], other["state_dict"][weight])


@pytest.mark.parametrize("step", [
    pytest.param(5, id="inside-epoch-0", marks=pytest.mark.slow), pytest.param(11, id="inside-epoch-1"),
])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, folder, step):
    """Six steps an epoch, saved every two and at the end of epochs: killed at 5 it resumes from 4, at 11 from 10."""
    config = small_config(folder)
    whole = run(tmp_path, config, "whole")
    fit_process(tmp_path, "broken", config, kill_at=step)
    assert checkpoint(tmp_path / "broken")["global_step"] == step - 1
    resumed = run(tmp_path, config, "broken", "--ckpt_path", "last")
    assert resumed["global_step"] == 12
    for key in EXACT:
        assert_same(resumed[key], whole[key], key)
    rows, expected = ([line.split(",") for line in (tmp_path / name / "version_0" / "metrics.csv").read_text().split()]
                      for name in ("broken", "whole"))
    assert [row[:2] for row in rows] == [row[:2] for row in expected]
    assert not (tmp_path / "broken" / "version_1").exists()


GROUPMAMBA = {"model": "test_groupmamba", "model_kwargs": {"drop_path_rate": 0.3}}
LOSSES = {
    "mesa": {"mesa": {"weight": 1.5}},
    "schedule_free": {
        "optimizer": {"name": "adamw_schedule_free", "ssm_decay": "all"}, "ema_decay": None,
        "schedule": {"warmup_epochs": 0.5, "shape": "constant"},
    },
    "distillation": {**GROUPMAMBA, "distillation": {"teacher": "test_resnet"}},
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_an_interrupted_run_with_a_second_model_resumes_to_the_same_weights(tmp_path, folder, name):
    """Interrupted inside the second epoch, after five steps of MESA: what teaches goes on, too."""
    options = LOSSES[name]
    if name == "schedule_free":
        pytest.importorskip("schedulefree")
    if name == "distillation":
        torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), tmp_path / "teacher.pth")
        options = {**options, "distillation": {**options["distillation"], "checkpoint_path": f"{tmp_path}/teacher.pth"}}
    config = small_config(folder, **options)
    whole = run(tmp_path, config, "whole")
    stop = [{"class_path": "small_runs.StopAt", "init_args": {"step": 9}}]
    with pytest.raises(InterruptedError):
        run(tmp_path, {**config, "trainer": {**config["trainer"], "callbacks": stop}}, "broken")
    assert checkpoint(tmp_path / "broken")["global_step"] == 8
    resumed = run(tmp_path, config, "broken", "--ckpt_path", "last")
    assert resumed["global_step"] == 12
    for key in EXACT:
        assert_same(resumed[key], whole[key], key)
    assert any(not torch.equal(whole["state_dict"][key], value) for key, value in whole["trained_state_dict"].items())


@pytest.mark.parametrize("trainer", [{"max_epochs": 1}, {"max_steps": 6}], ids=["epochs", "steps"])
def test_a_finished_epoch_continues_into_the_next(tmp_path, folder, trainer):
    """A run of one epoch, resumed with two workers and more epochs: its second epoch is the uninterrupted run's.

    The learning rate is constant, since its schedule depends on the length of the run.
    """
    config = small_config(folder, schedule={"warmup_epochs": 0, "min_lr": 1e-3})
    whole = run(tmp_path, config, "whole")
    run(tmp_path, {**config, "trainer": {**config["trainer"], **trainer}}, "parts")
    more = {"max_epochs": 2} if "max_epochs" in trainer else {"max_steps": 12}
    config["trainer"] = {**config["trainer"], **more}
    resumed = run(tmp_path, config, "parts", "--ckpt_path", "last", "--data.init_args.loader.workers=2")
    for key in ("state_dict", "trained_state_dict", "optimizer_states", "random_state", "global_step"):
        assert_same(resumed[key], whole[key], key)


def test_resuming_inside_an_epoch_refuses_another_order(tmp_path, folder, capsys):
    config = small_config(folder)
    config["trainer"]["max_steps"] = 5
    run(tmp_path, config, "short")
    more = ["--trainer.max_steps=9", "--ckpt_path=last", "--data.init_args.loader.batch_size=2"]
    assert main(["fit", "--config", str(tmp_path / "short.yaml"), *more]) == 1
    assert "ImageFolder: a run resumes inside an epoch only with the order it had" in capsys.readouterr().err


def test_last_is_refused_where_there_is_none(tmp_path, folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, small_config(folder), "nothing", "--ckpt_path", "last")
    assert "found no such checkpoint" in capsys.readouterr().err
