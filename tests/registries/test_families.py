"""Every row of the real zoo: its key rules, and what timm is told about it."""

from __future__ import annotations

import json
import re
from functools import cache
from math import prod

import pytest
import timm
import torch
from tree import ROOT

import vssm
from vssm.checkpoints import load_state, looks_like
from vssm.models.keys import published_shapes, shapes_of, to_ours, to_published
from vssm.models.variant import Variant, families, variants

ROWS = variants()
FAMILIES = {family.__name__.rpartition(".")[2]: family for family in families()}
GOLDEN = [path for name in FAMILIES for path in sorted((ROOT / "tests" / "golden" / name).glob(f"*{name}*.json"))]


@cache
def entries(name):
    """Names and shapes of a row's entries, without its memory."""
    with torch.device("meta"):
        return shapes_of(ROWS[name].build())


@pytest.mark.parametrize("name", ROWS)
def test_the_rules_are_undone_by_their_inverses(name):
    """Names and shapes come back, for every row."""
    rules, shapes = ROWS[name].keys, entries(name)
    published = published_shapes(shapes, rules)
    back = to_ours({key: torch.empty(shape, device="meta") for key, shape in published.items()}, rules, shapes)
    assert {key: tuple(value.shape) for key, value in back.items()} == shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_values_make_the_round_trip(family):
    """The family's smallest row goes to the published names and back, bit for bit, into a model that differs."""
    row = min(FAMILIES[family].VARIANTS, key=lambda row: sum(map(prod, entries(row.name).values())))
    source, target = row.build(), row.build()
    load_state(target, to_published(source.state_dict(), row.keys))
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_lists_its_rows(family):
    """Also where a row's class stands in another module, as LocalVim does."""
    assert sorted(vssm.list_models(family=family)) == sorted(row.name for row in FAMILIES[family].VARIANTS)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(
    "name", ["vanilla_vmamba_tiny", "msvmamba_nano", "localvim_tiny_cls", "mamba2d_t_v1", "segmamba_nomamba"]
)
def test_a_file_is_told_among_the_whole_zoo(name, published):
    """By its names and shapes, under the published names and ours; none of these is the first row of its family."""
    shapes = published_shapes(entries(name), ROWS[name].keys) if published else entries(name)
    assert looks_like({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}) == [name]


def test_a_foreign_file_builds_no_family(monkeypatch):
    """Only a small row of each is (UPerNet's builds its backbone); a ResNet has hardly a name of ours."""
    with torch.device("meta"):
        foreign = timm.create_model("resnet18").state_dict()
    built, build = [], Variant.build
    monkeypatch.setattr(Variant, "build", lambda row, **kwargs: built.append(row.name) or build(row, **kwargs))
    assert looks_like(foreign) == []
    assert len(FAMILIES) <= len(built) <= len(FAMILIES) + 1


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.task == "classification"])
def test_timm_knows_the_row(name):
    """The entry point exists, and the layers that timm adapts are there under their names."""
    row, shapes = ROWS[name], entries(name)
    assert timm.is_model(name)
    assert name in vssm.list_models()
    cfg = timm.models.get_pretrained_cfg(name)
    assert f"{cfg.first_conv}.weight" in shapes
    for classifier in [cfg.classifier] if isinstance(cfg.classifier, str) else cfg.classifier:
        assert shapes[f"{classifier}.weight"][0] == cfg.num_classes
    assert shapes[f"{cfg.first_conv}.weight"][1] == cfg.input_size[0]
    for weights in row.weights.values():
        assert weights.license
        assert weights.origin_url.startswith("https://")
        assert weights.paper.startswith("arXiv:")
        assert 50 < weights.top1 < 100
        assert timm.models.is_model_pretrained(name)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_published_entries(path):
    """Our rules write exactly the entries that the published code has, but for tables that we compute."""
    golden = json.loads(path.read_text())
    with torch.device("meta"):
        built = FAMILIES[path.parent.name].published(golden["source"]["entry"], golden["source"]["kwargs"])
    expected = {key: tuple(shape) for key, (shape, _) in golden["state_dict"].items()}
    if "rootfile" in path.stem:  # a second layout, which is understood and never written
        state = {key: torch.empty(shape, device="meta") for key, shape in expected.items()}
        written, expected = to_ours(state, built.keys, shapes_of(built.model)), shapes_of(built.model)
        written = {key: tuple(value.shape) for key, value in written.items()}
    else:
        written = published_shapes(shapes_of(built.model), built.keys)
    left_out = expected.keys() - written.keys()
    # Vim's features are taken before its norm; Vivim uses neither SegFormer's classifier nor the norms of its stages.
    unused = r"^norm_f\.weight$|^decoder\.classifier\.|^encoder\.downsample_layers\.layer_norm\."
    assert {key for key in left_out if not re.search(unused, key)} <= set(golden["kept"])
    assert written == {key: shape for key, shape in expected.items() if key not in left_out}
