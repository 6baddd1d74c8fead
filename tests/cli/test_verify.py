"""``vssm verify``: what it compares, counts and refuses."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import published

from vssm.checkpoints import load_state
from vssm.cli import _golden as golden
from vssm.cli.verify import main
from vssm.models.keys import published_shapes, shapes_of


def summary(tensor):
    """An output as golden files record it."""
    array = tensor.detach().numpy()
    index = np.linspace(0, array.size - 1, min(array.size, 50)).round().astype(int)
    return {
        "shape": list(array.shape), "mean": array.mean(), "std": array.std(), "abs_max": abs(array).max(),
        "index": index.tolist(), "value": [float(f"{value:.9g}") for value in array.ravel()[index]],
    }  # fmt: skip


def recorded(kwargs):
    """A golden file of the toy family, made by the toy itself: only its plumbing is under test."""
    built = published("toy.py:Toy", kwargs)
    model = built.model.double().eval()
    shapes = published_shapes(shapes_of(model), built.keys)
    overrides = [["head", "0.1*n"]]
    load_state(model, {k: torch.from_numpy(golden.weight(k, s, overrides)) for k, s in shapes.items()}, built.keys)
    cases = []
    for number, size in enumerate([(1, 3, 64, 64), (2, 3, 64, 64)]):
        spec = {"x": {"shape": size, "kind": "uniform" if number else "normal"}}
        inputs = {name: torch.from_numpy(array) for name, array in golden.inputs(spec, number).items()}
        outputs = {name: summary(value) for name, value in built.run(model, inputs).items()}
        cases.append({"inputs": spec, "dtype": "float64", "outputs": outputs})
    return {
        "variant": "toy", "source": {"repo": "toy/toy", "commit": "0", "entry": "toy.py:Toy", "kwargs": kwargs},
        "weight_overrides": overrides, "notes": "", "params": 0, "kept": [], "cases": cases,
        "state_dict": {key: [list(shape), "float32"] for key, shape in shapes.items()},
    }  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(content, name="toy.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content, default=float))
        return str(path)

    return write


@pytest.mark.usefixtures("toys")
def test_a_model_passes(write, capsys):
    """A line for each output of each case, and the count; in float32 too."""
    path = write(recorded({"depth": 2}))
    assert main([path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "4 passed, 0 failed"
    assert [line.split()[0] for line in lines[:-1]] == ["passed"] * 4
    assert "case 1 stage0" in lines[3]
    assert main([path, "--dtype", "float32"]) == 0


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("spoil", ["value", "mean", "shape", "output"])
def test_a_wrong_output_fails(write, capsys, spoil):
    """One wrong number, moment, shape or name among the outputs is found; the others still pass."""
    content = recorded({"depth": 1})
    output = content["cases"][1]["outputs"]["logits"]
    if spoil == "value":
        output["value"][3] += 1e-5 * output["std"]
    elif spoil == "mean":
        output["mean"] += 1e-5 * output["std"]
    elif spoil == "shape":
        output["shape"] = [1, 20]
    else:
        content["cases"][1]["outputs"]["unknown"] = output
    assert main([write(content)]) == 1
    assert re.search(r"^(4|3) passed, 1 failed$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.usefixtures("toys")
def test_keys_are_loaded_strictly(write, capsys):
    """A published key that the model lacks fails the file and names the key."""
    content = recorded({"depth": 1})
    content["state_dict"]["layers.0.0.op.E"] = [[4], "float32"]
    assert main([write(content), write(recorded({"depth": 1}), "second.json")]) == 1
    out = capsys.readouterr().out
    assert "unexpected keys (1)" in out
    assert "layers.0.0.op.E" in out
    assert out.endswith("4 passed, 1 failed\n")


@pytest.mark.usefixtures("toys")
def test_what_no_family_covers_is_skipped_with_the_reason(write, capsys):
    """A skip is no failure."""
    content = recorded({"depth": 1})
    other = json.loads(json.dumps(content, default=float))
    content["source"]["entry"], other["source"]["repo"] = "toy.py:Other", "other/repo"
    assert main([write(content), write(other, "other.json")]) == 0
    out = capsys.readouterr().out
    assert "skipped  " in out
    assert "toy.py:Other is not in the toy family" in out
    assert "no family of other/repo here" in out
    assert out.endswith("0 passed, 0 failed, 2 skipped\n")


ROWS = {"k0": [0, 1], "k2": [1, 0], "diagonal": [0, 1]}
def test_a_file_without_outputs_is_no_pass(write, capsys):
    """Nothing compared is nothing proved."""
    assert main([write({"op": "selective_scan", "cases": []})]) == 1
    assert "it records no outputs" in capsys.readouterr().out


TABLES = {"kind": "scan_tables", "name": "cross_scan", "tables": {"1x2": ROWS}}


def test_scan_tables(write, capsys):
    """Rows are compared cell by cell; unknown rows are skipped."""
    assert main([write(TABLES)]) == 0
    assert capsys.readouterr().out.endswith("2 passed, 0 failed, 1 skipped\n")
    wrong = {**TABLES, "tables": {"1x2": {"k0": [1, 0], "k2": [1, 0, 0]}}}
    assert main([write(wrong)]) == 1
    assert capsys.readouterr().out.endswith("0 passed, 2 failed\n")


def test_scan_tables_in_groups_and_sets_of_sequences(write, capsys):
    """A group's name comes first; a slice that is cut differently is no pass."""
    tables = {"1x2": {"sweep": {"dir0": [0, 1], "dir9": [0, 1]}}}
    grouped = {"kind": "scan_tables", "source": {"repo": "lewandofskee/MambaAD"}, "tables": tables}
    assert main([write(grouped)]) == 0
    out = capsys.readouterr().out
    assert "1x2 sweep_dir0" in out
    assert out.endswith("1 passed, 0 failed, 1 skipped\n")
    slices = {"kind": "scan_sequences", "name": "xy_slice", "tables": {"2x2": {"intra_rows": [[0, 1], [2, 3]]}}}
    assert main([write(slices)]) == 0
    slices["tables"]["2x2"]["intra_rows"] = [[0, 1, 2, 3]]
    assert main([write(slices)]) == 1


def operator(spoil=0.0):
    """y = x * w summed over a window of one: a convolution whose results are plain."""
    spec = {"x": {"shape": [1, 2, 3], "transform": "x"}, "weight": {"shape": [2, 2], "transform": "0.5*x"}}
    grad = {"grad_out": {"shape": [1, 2, 3], "transform": "x"}}
    arrays = golden.inputs({**spec, **grad}, 7)
    x, weight, g = (arrays[name] for name in ("x", "weight", "grad_out"))
    before = np.concatenate([np.zeros((1, 2, 1)), x[:, :, :-1]], 2)
    after = np.concatenate([g[:, :, 1:], np.zeros((1, 2, 1))], 2)
    w0, w1 = weight[:, 0, None], weight[:, 1, None]
    grads = {
        "x": g * w1 + after * w0 + spoil,
        "weight": np.stack([(g * before).sum((0, 2)), (g * x).sum((0, 2))], 1),
    }
    outputs = {"out": before * w0 + x * w1, "final_states": x[:, :, -1:]}
    return {
        "op": "causal_conv1d",
        "cases": [{
            "case": 7, "options": {"activation": None}, "inputs": spec, "grad_outputs": grad,
            "outputs": {name: {"value": array.tolist()} for name, array in outputs.items()},
            "grads": {name: {"value": array.tolist()} for name, array in grads.items()},
        }],
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_an_operator_with_gradients(write, capsys, backend):
    """Each output and each gradient has a line."""
    assert main([write(operator()), "--backend", backend]) == 0
    assert capsys.readouterr().out.endswith("4 passed, 0 failed\n")
    assert main([write(operator(spoil=1e-6)), "--backend", backend]) == 1
    assert "failed   " in capsys.readouterr().out


def plain_scan2d(x, deltaT, deltaL, AT, AL, BT, BL, C, D):
    """Cell by cell, each from the one above it and the one to its left."""
    h = {}
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            top = (deltaT[:, i, j] * x[:, i, j])[..., None] * BT[:, i, j, None]
            left = (deltaL[:, i, j] * x[:, i, j])[..., None] * BL[:, i, j, None]
            top = top + (deltaT[:, i, j, :, None] * AT).exp() * h[i - 1, j] if i else top
            left = left + (deltaL[:, i, j, :, None] * AL).exp() * h[i, j - 1] if j else left
            h[i, j] = (top + left) / 2 if i and j else top if i else left
    h = torch.stack([torch.stack([h[i, j] for j in range(x.shape[2])], 1) for i in range(x.shape[1])], 1)
    return {"y": (h * C[..., None, :]).sum(-1) + D * x, "hs": h}


def plain_ssd(x, dt, A, B, C):
    """One head of one channel."""
    h, y = 0.0, []
    for t in range(x.shape[1]):
        step = torch.nn.functional.softplus(dt[:, t, :, None, None])
        h = (A[:, None, None] * step).exp() * h + step * x[:, t, :, :, None] * B[:, t, :, None]
        y.append((h * C[:, t, :, None]).sum(-1))
    return {"y": torch.stack(y, 1), "final_state": h}


@pytest.mark.parametrize(
    ("formula", "expected"),
    [("x/np.sqrt(16)", 0.5), ("-np.exp(0.5*x - 1)", -1.0), ("np.log1p(np.exp(-x))", math.log1p(math.exp(-2))),
     ("2*x**2-1", 7.0)],
)  # fmt: skip
def test_inputs_are_transformed_by_any_arithmetic(monkeypatch, formula, expected):
    twos = SimpleNamespace(standard_normal=lambda shape: np.full(shape, 2.0))
    monkeypatch.setattr(golden, "_stream", lambda name: twos)
    assert golden.inputs({"x": {"shape": [1], "transform": formula}}, 0)["x"] == pytest.approx([expected])


@pytest.mark.parametrize("formula", ["__import__('os')", "x.tofile('x')", "np.save(x)", "open(x)", "x or x", "y"])
def test_a_transform_that_is_no_arithmetic_is_not_run(formula):
    with pytest.raises(ValueError, match=r"a transform must be arithmetic in x, with np\.abs"):
        golden.inputs({"x": {"shape": [1], "transform": formula}}, 0)


@pytest.mark.parametrize("grid", [(1, 3), (3, 2)])
@pytest.mark.parametrize("name", ["mamba2d.scan2d_core", "mamba2_ssd"])
def test_operators_of_other_papers(write, capsys, name, grid):
    """Mamba2D's recurrence, on one row too, where not every operand counts; Mamba-2's."""
    if name == "mamba2_ssd":
        shapes = {"x": (2, *grid, 1), "dt": (2, *grid), "A": grid[1:], **dict.fromkeys("BC", (2, grid[0], 1, 4))}
        function, options, grads = plain_ssd, {"dt_softplus": True}, ("grad_y", "grad_final_state")
    else:
        shapes = dict.fromkeys(("x", "deltaT", "deltaL"), (2, *grid, 3)) | {"AT": (3, 2), "AL": (3, 2), "D": (3,)}
        shapes |= dict.fromkeys(("BT", "BL", "C"), (2, *grid, 2))
        function, options, grads = plain_scan2d, {}, ("grad_y",)
    spec = {key: {"shape": list(shape), "transform": "-np.abs(x)" if key[0] == "A" else "x"}
            for key, shape in shapes.items()}  # fmt: skip
    arrays = golden.inputs(spec, 3)
    inputs = {key: torch.tensor(array, dtype=torch.float64).requires_grad_() for key, array in arrays.items()}
    outputs = function(**inputs)
    weights = {key: {"shape": list(outputs[key[5:]].shape), "transform": "x"} for key in grads}
    drawn = golden.inputs({**spec, **weights}, 3)
    loss = sum((outputs[key[5:]] * torch.tensor(drawn[key])).sum() for key in grads)
    found = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    content = {"op": name, "cases": [{
        "case": 3, "options": options, "inputs": spec, "grad_outputs": weights,
        "outputs": {key: {"value": y.tolist()} for key, y in outputs.items()},
        "grads": {key: {"value": y.tolist()} for key, y in zip(inputs, found, strict=True)},
    }]}  # fmt: skip
    assert main([write(content)]) == 0, capsys.readouterr().out
    assert f"{len(inputs) + 2} passed, 0 failed\n" in capsys.readouterr().out
    content["cases"][0]["outputs"]["y"]["value"][0][0][0][0] += 1e-6
    assert main([write(content)]) == 1


def test_an_unknown_operator_is_skipped(write, capsys):
    """Attention's is not here."""
    assert main([write({"op": "attention", "cases": []})]) == 0
    assert "no op named 'attention' here" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["# not JSON", "[1]", "{}", '{"cases": []}', '{"op": "selective_scan"}'])
def test_a_file_that_is_no_golden(write, capsys, content):
    """It is named, and nothing runs."""
    assert main([write(TABLES, "a.json"), write(content, "b.json")]) == 2
    captured = capsys.readouterr()
    assert "b.json is no golden file" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["--backend", "cuda"], ["--device", "gpu"]])
def test_wrong_options(write, capsys, arguments):
    """The message names what there is."""
    assert main([write(TABLES), *arguments]) == 2
    assert arguments[1] in capsys.readouterr().err


def test_no_file(tmp_path, capsys):
    """A wrong path is an error, no traceback."""
    assert main([str(tmp_path / "x.json")]) == 2
    assert "x.json" in capsys.readouterr().err


WEIGHTS = {  # what the formula is made of, entry by entry
    "norm.running_var": (1.0, 0.1, abs), "norm.running_mean": (0.0, 0.1, None), "m.D": (1.0, 0.1, None),
    "m.Ds": (1.0, 0.1, None), "norm.weight": (1.0, 0.1, None), "fc.bias": (0.0, 0.1, None),
    "dt_proj.bias": (-3.0, 0.5, None), "m.dt_projs_bias": (-3.0, 0.5, None),
}  # fmt: skip


@pytest.mark.parametrize("key", WEIGHTS)
def test_formula_weights_of_vectors(key):
    """Offset and scale depend on the entry's name; the numbers on nothing else."""
    offset, scale, function = WEIGHTS[key]
    normal = golden._stream(f"weight:{key}").standard_normal(5)
    expected = offset + scale * (function(normal) if function else normal)
    np.testing.assert_array_equal(golden.weight(key, (5,)), expected)


def test_formula_weights_of_matrices():
    """Fan-in scaling; log(1..n) for the decay; the last override that matches wins."""
    normal = golden._stream("weight:fc.weight").standard_normal((3, 4))
    np.testing.assert_array_equal(golden.weight("fc.weight", (3, 4)), normal / 2)
    np.testing.assert_array_equal(golden.weight("fc.weight", (3, 4), [["fc", "1+0.1*n"], ["w", "0.1*n"]]), 0.1 * normal)
    decay = golden.weight("m.A_logs", (2, 3)) - 0.1 * golden._stream("weight:m.A_logs").standard_normal((2, 3))
    np.testing.assert_allclose(decay, np.log([[1, 2, 3], [1, 2, 3]]))
