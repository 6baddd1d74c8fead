"""The MONAI bundles: their metadata is valid; they train, validate, evaluate, infer and export on generated volumes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from tree import ROOT

for needed in ("ignite", "fire", "jsonschema"):
    pytest.importorskip(needed, reason="needs the extra bundle")
nibabel = pytest.importorskip("nibabel", reason="needs the extra bundle")
bundle = pytest.importorskip("monai.bundle", reason="needs the extra bundle")

BUNDLES = sorted(path.parent.parent.name for path in (ROOT / "bundles").glob("*/configs/metadata.json"))
SMALL = {  # networks that train in seconds, in the place of the bundles' own
    "segmamba": {"_target_": "vssm.create_model", "name": "segmamba_nano", "in_channels": 4, "out_channels": 4,
                 "features": [8, 12, 16, 24], "hidden_size": 32},
    "umamba_bot": {"_target_": "vssm.create_model", "name": "umamba_nano", "in_channels": 1, "out_channels": 14},
}
SCHEMA = {  # what https://docs.monai.io/en/stable/mb_specification.html and its schema of 2024-07-25 ask for
    "type": "object",
    "$defs": {"tensor": {
        "type": "object",
        "properties": {
            "type": {"type": "string"}, "format": {"type": "string"}, "num_channels": {"type": "integer"},
            "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}}, "dtype": {"type": "string"},
            "value_range": {"type": "array", "items": {"type": "number"}}, "is_patch_data": {"type": "boolean"},
            "channel_def": {"type": "object"},
        },
        "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    }},
    "properties": {
        **{name: {"type": "string"} for name in (
            "schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors",
            "copyright", "data_source", "data_type", "image_classes", "label_classes", "pred_classes", "intended_use",
        )},
        **{name: {"type": "object"} for name in ("changelog", "required_packages_version", "eval_metrics")},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "properties": {side: {"type": "object", "additionalProperties": {"$ref": "#/$defs/tensor"}}
                           for side in ("inputs", "outputs")},
            "required": ["inputs", "outputs"],
        },
    },
    "required": ["schema", "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version",
                 "task", "description", "authors", "copyright", "network_data_format"],
}  # fmt: skip


@pytest.fixture
def copy(request, tmp_path, monkeypatch):
    """A copy of the bundle, and a small Decathlon-style dataset for it; the working directory is the bundle."""
    name = request.param
    folder = shutil.copytree(ROOT / "bundles" / name, tmp_path / name)
    channels, classes = SMALL[name]["in_channels"], SMALL[name]["out_channels"]
    noise, data = np.random.default_rng(0), tmp_path / "data"
    for kind, count in (("imagesTr", 3), ("labelsTr", 3), ("imagesTs", 1)):
        (data / kind).mkdir(parents=True)
        for i in range(count):
            shape = (40, 36, 34)
            label = np.zeros(shape, np.uint8)
            for number in range(1, min(classes, 4)):
                label[8 * number : 8 * number + 8, 8:28, 6:26] = number
            if kind == "labelsTr":
                volume = label
            else:
                volume = noise.normal(0, 20, (*shape, channels)).astype(np.float32) + 60 * label[..., None]
                volume = volume if channels > 1 else volume[..., 0]
            spacing = np.diag([1.0, 1.0, 1.0, 1.0]) if channels > 1 else np.diag([0.8, 0.8, 2.5, 1.0])
            nibabel.save(nibabel.Nifti1Image(volume, spacing), data / kind / f"case{i}.nii.gz")
    monkeypatch.chdir(folder)
    return name, folder, data


def options(name, data):
    return {"meta_file": "configs/metadata.json", "dataset_dir": str(data), "network_def": SMALL[name], "workers": 0,
            "patch_size": [32, 32, 32], "device": "$torch.device('cpu')", "amp": False}


@pytest.mark.parametrize("name", BUNDLES)
def test_metadata_is_valid(name, tmp_path):
    """By ``verify_metadata``; the schema lies where it would be downloaded to."""
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    file = ROOT / "bundles" / name / "configs" / "metadata.json"
    bundle.verify_metadata(meta_file=str(file), filepath=str(tmp_path / "schema.json"))
    broken = json.loads(file.read_text()) | {"network_data_format": {"inputs": {}}}
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="'outputs' is a required property"):
        bundle.verify_metadata(meta_file=str(tmp_path / "broken.json"), filepath=str(tmp_path / "schema.json"))


@pytest.mark.parametrize("name", BUNDLES)
def test_the_network_is_the_one_that_metadata_describe(name):
    """Channels in and out; the patch is of the sizes that the metadata allow."""
    parser = bundle.ConfigParser()
    parser.read_config(str(ROOT / "bundles" / name / "configs" / "inference.yaml"))
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def")
    formats = json.loads((ROOT / "bundles" / name / "configs" / "metadata.json").read_text())["network_data_format"]
    assert network.in_channels == formats["inputs"]["image"]["num_channels"]
    assert network.out_channels == formats["outputs"]["pred"]["num_channels"]
    steps = [int(side.removesuffix("*n")) for side in formats["inputs"]["image"]["spatial_shape"]]
    assert all(patch % step == 0 for patch, step in zip(parser["patch_size"], steps))
    assert all(step % multiple == 0 for step, multiple in zip(steps, network.multiple))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in BUNDLES])
def test_verify_net_in_out_of_the_network_itself(name):
    folder = ROOT / "bundles" / name / "configs"
    bundle.verify_net_in_out(
        net_id="network_def", meta_file=str(folder / "metadata.json"), config_file=str(folder / "inference.yaml"),
        device="cpu", n=2,
    )  # fmt: skip


@pytest.mark.parametrize("copy", ["segmamba", pytest.param("umamba_bot", marks=pytest.mark.slow)], indirect=True)
def test_a_bundle_trains_evaluates_infers_and_exports(copy):
    name, folder, data = copy
    given = options(name, data)
    bundle.run(config_file="configs/train.yaml", epochs=1, val_interval=1, crops=1, **given)
    saved = torch.load(folder / "models" / "model.pt", weights_only=True)
    network = bundle.ConfigParser({"net": SMALL[name]}).get_parsed_content("net").eval()
    network.load_state_dict(saved)

    bundle.run(config_file=["configs/train.yaml", "configs/evaluate.yaml"], **given)
    assert (folder / "eval" / "metrics.csv").read_text().startswith("val_mean_dice")

    bundle.run(config_file="configs/inference.yaml", **given)
    written = nibabel.load(folder / "eval" / "case0_seg.nii.gz")
    source = nibabel.load(data / "imagesTs" / "case0.nii.gz")
    assert written.shape == source.shape[:3]
    np.testing.assert_allclose(written.affine, source.affine)
    assert set(np.unique(written.dataobj)) <= set(range(SMALL[name]["out_channels"]))

    channels = SMALL[name]["in_channels"]
    given = {key: given[key] for key in ("meta_file", "network_def")}
    bundle.verify_net_in_out(net_id="network_def", config_file="configs/inference.yaml", device="cpu", n=2, **given)
    bundle.ckpt_export(
        net_id="network_def", filepath="models/model.ts", ckpt_file="models/model.pt",
        config_file="configs/inference.yaml", use_trace=True, input_shape=[1, channels, 32, 32, 32], **given,
    )  # fmt: skip
    x = torch.randn(1, channels, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load("models/model.ts")(x), network(x), rtol=1e-4, atol=1e-5)
