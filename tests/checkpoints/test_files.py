"""Checkpoint files: what is read from them, what is refused, and that a write is whole."""

from __future__ import annotations

import os

import pytest
import torch
from toy import save_as_trained

from vssm.checkpoints import digest, read_checkpoint, write_checkpoint
from vssm.checkpoints.digest import grouped
from vssm.checkpoints.files import written_whole

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class Config(dict):
    """A dict with attributes, as yacs nodes are."""


def equal(state, other=STATE):
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in other)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_published_file_with_namespace_and_config_node(tmp_path, legacy):
    """What training scripts pickle beside the weights is read without their packages, and nothing is executed."""
    save_as_trained(STATE, tmp_path / "raw.pth", legacy=legacy)
    checkpoint = read_checkpoint(tmp_path / "raw.pth")
    assert equal(checkpoint.state)
    assert checkpoint.key == "model"
    assert set(checkpoint.entries) == {"model", "args", "config", "epoch"}


@pytest.mark.parametrize("zip", [True, False])
def test_an_unknown_class_is_named_and_not_made(tmp_path, zip):
    """The error says which class the file pickles and how to get rid of it."""
    content = {"model": STATE, "config": Config(a=1)}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zip)
    with pytest.raises(ValueError, match=r"pickles .*Config, which could run code; save its weights alone"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "key", "expected"),
    [
        (STATE, None, None),
        ({"model": STATE, "model_ema": {"a": torch.zeros(1)}}, None, "model"),
        ({"model": {"a": torch.zeros(1)}, "model_ema": STATE}, "model_ema", "model_ema"),
        ({"state_dict": STATE, "optimizer": {}}, None, "state_dict"),
        ({"module": {f"module.{key}": value for key, value in STATE.items()}}, None, "module"),
        ({"model": {f"module.{key}": value for key, value in STATE.items()}}, None, "model"),
        ({"state_dict": {f"module._orig_mod.{key}": value for key, value in STATE.items()}}, None, "state_dict"),
        ({"state_dict": {f"backbone.{key}": value for key, value in STATE.items()}}, None, "state_dict"),
    ],
)
def test_entries_and_wrapper_prefixes(tmp_path, content, key, expected):
    """The weights are found under any of the usual entries, wrapper prefixes are cut off."""
    torch.save(content, tmp_path / "x.pth")
    checkpoint = read_checkpoint(tmp_path / "x.pth", key=key)
    assert equal(checkpoint.state)
    assert checkpoint.key == expected


def test_a_part_of_a_file(tmp_path):
    """``prefix`` takes a detector's backbone and nothing else."""
    state = {**{f"backbone.{key}": value for key, value in STATE.items()}, "neck.weight": torch.zeros(3)}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    assert "neck.weight" in read_checkpoint(tmp_path / "x.pth").state
    assert equal(read_checkpoint(tmp_path / "x.pth", prefix="backbone.").state)
    with pytest.raises(ValueError, match=r"no entry of .* starts with 'head\.'"):
        read_checkpoint(tmp_path / "x.pth", prefix="head.")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_write_and_read(tmp_path, name):
    """Both formats give back what was written, tensors that share memory or are strided included."""
    state = {**STATE, "tied": STATE["a.weight"], "strided": STATE["a.weight"].T}
    write_checkpoint(state, tmp_path / "new" / name, {"model": "toy"})
    assert equal(read_checkpoint(tmp_path / "new" / name).state, state)
    assert os.listdir(tmp_path / "new") == [name]


def test_metadata_of_safetensors(tmp_path):
    """It says what the weights are."""
    write_checkpoint(STATE, tmp_path / "x.safetensors", {"model": "toy"})
    assert read_checkpoint(tmp_path / "x.safetensors").metadata == {"format": "pt", "model": "toy"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new folder" / "file.csv"
    with written_whole(file) as part:
        part.write_text("old", encoding="utf-8")
        assert not file.exists()
    with pytest.raises(ZeroDivisionError), written_whole(file) as part:
        part.write_text(f"ne{1 / 0}", encoding="utf-8")
    assert file.read_text() == "old"
    assert [path.name for path in file.parent.iterdir()] == ["file.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """The file under the name is the old one or the new one, never a half."""
    write_checkpoint(STATE, tmp_path / "x.pth")

    def full(content, part):
        with open(part, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint({"a": torch.zeros(1)}, tmp_path / "x.pth")
    assert os.listdir(tmp_path) == ["x.pth"]
    assert equal(read_checkpoint(tmp_path / "x.pth").state)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.pth", b"<!DOCTYPE html><html>404", "web page"),
        ("x.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer"),
        ("x.pth", b"PK\x03\x04 cut off", "damaged or no PyTorch file"),
        ("x.pth", b"", "damaged or no PyTorch file"),
        ("x.pth", b"# A text", r"got another or a damaged file$"),
        ("x.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{cut off", "no whole safetensors file"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, name, content, message):
    """A failed download is told from a wrong model."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ([1, 2], None, "holds a list, not a dict"),
        ({"model": STATE}, "model_ema", r"no entry 'model_ema' with weights; it has \['model'\]"),
        ({"net": STATE, "epoch": 1}, None, r"no tensors: \['net', 'epoch'\]; name the entry"),
        ({}, None, "no entries"),
    ],
)
def test_a_file_without_weights_is_an_error(tmp_path, content, key, message):
    """The error says what the file has instead."""
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "x.pth", key=key)


def test_no_file(tmp_path):
    """A wrong path is no ValueError."""
    with pytest.raises(FileNotFoundError, match="no file"):
        read_checkpoint(tmp_path / "x.pth")


def test_like_layers_stand_on_one_line():
    """Every key is there, and can be read back from the ranges."""
    keys = [f"layers.{i}.blocks.{j}.{leaf}" for i in (0, 1, 3) for j in range(2) for leaf in ("D", "norm.weight")]
    assert grouped([*keys, "layers.2.blocks.7.D", "cls_token", "stem.0.weight"]) == [
        "layers.{0-1,3}.blocks.{0-1}.{D, norm.weight}",
        "layers.2.blocks.7.D",
        "cls_token",
        "stem.0.weight",
    ]


def test_the_digest_tells_architectures_apart():
    """Same names and shapes, same checksum; another shape, another one; never more lines than asked for."""
    first, same = digest(STATE), digest({key: value + 1 for key, value in STATE.items()})
    other = digest({"a.weight": torch.zeros(1)})
    assert first == same
    assert first.splitlines()[0] == "2 tensors, 8 numbers, keys " + first.splitlines()[0][-8:]
    assert first.splitlines()[0][-8:] != other.splitlines()[0][-8:]
    many = {f"{name}.w": torch.zeros(1) for name in "abcdefghijklmnopq"}
    assert len(digest(many, lines=5).splitlines()) == 6
