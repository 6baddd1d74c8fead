"""``vssm convert``: published to ours and back, strict."""

from __future__ import annotations

import os

import pytest
import safetensors
import torch
from toy import KEYS, VARIANTS, save_as_trained

from vssm.checkpoints import read_checkpoint, write_checkpoint
from vssm.cli.convert import main
from vssm.models.keys import to_published

pytestmark = pytest.mark.usefixtures("toys")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other)


def test_there_and_back(tmp_path, capsys):
    """The last file has what the first one had, bit for bit, in the published order of names."""
    model = VARIANTS[1].build()
    state = to_published(model.state_dict(), KEYS)
    save_as_trained(state, tmp_path / "published.pth")
    ours, back = str(tmp_path / "ours.safetensors"), str(tmp_path / "back.pth")
    assert main([str(tmp_path / "published.pth"), ours, "--model", "toy_small"]) == 0
    assert "39 of 39 tensors, 100.0 %" in capsys.readouterr().out
    assert equal(read_checkpoint(ours).state, model.state_dict())
    assert main([ours, back, "--model", "toy_small", "--to", "published"]) == 0
    assert equal(read_checkpoint(back).state, state)


def test_the_file_says_what_it_is(tmp_path):
    """Metadata: model, names, version, and the source with its SHA-256."""
    write_checkpoint(VARIANTS[0].build(num_classes=7).state_dict(), tmp_path / "x.pth")
    arguments = ["--model", "toy_tiny", "--model-args", "num_classes=7", "scan=hilbert", "img_size=(64, 64)"]
    assert main([str(tmp_path / "x.pth"), str(tmp_path / "y.safetensors"), *arguments]) == 0
    with safetensors.safe_open(tmp_path / "y.safetensors", "pt") as file:
        metadata = file.metadata()
    expected = {"model": "toy_tiny", "names": "ours", "source": "x.pth", "num_classes": "7", "scan": "hilbert"}
    assert expected.items() <= metadata.items()
    assert len(metadata["sha256"]) == 64


def test_half_precision_stays(tmp_path):
    """The numbers are not widened on the way."""
    state = {key: value.half() for key, value in VARIANTS[0].build().state_dict().items()}
    write_checkpoint(state, tmp_path / "x.pth")
    assert main([str(tmp_path / "x.pth"), str(tmp_path / "y.safetensors"), "--model", "toy_tiny"]) == 0
    assert equal(read_checkpoint(tmp_path / "y.safetensors").state, state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "toy_small"], "it looks like toy_tiny"),
        (["--model", "toy_tinny"], "did you mean toy_tiny"),
        (["--model", "toy_tiny", "--key", "ema"], "no entry 'ema'"),
        (["--model", "toy_tiny", "--model-args", "num_classes"], "NAME=VALUE"),
        (["--model", "toy_tiny", "--model-args", "colour=3"], "cannot be built"),
    ],
)
def test_errors_write_nothing(tmp_path, capsys, arguments, message):
    """Status 1, one message, no file."""
    save_as_trained(to_published(VARIANTS[0].build().state_dict(), KEYS), tmp_path / "x.pth")
    assert main([str(tmp_path / "x.pth"), str(tmp_path / "y.safetensors"), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["x.pth"]
