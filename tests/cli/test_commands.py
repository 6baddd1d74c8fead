"""The command table: what is found, what is refused, and how."""

from __future__ import annotations

import pytest

from vssm import cli


def test_help_lists_every_command_with_its_summary(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, summary in cli.commands().items():
        assert f"  {name:{max(map(len, cli.commands()))}}  {summary}\n" in printed
        assert summary, f"vssm/cli/{name}.py needs a docstring"


def test_no_argument_means_help(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: vssm COMMAND")


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vssm 0.")


def test_a_misspelt_command_is_met_with_the_nearest(capsys):
    assert cli.main(["dcotor"]) == 2
    assert capsys.readouterr().err == "vssm: no command named 'dcotor'; did you mean doctor?\n"


def test_an_unknown_command_is_met_with_the_list(capsys):
    assert cli.main(["%%"]) == 2
    assert "convert, doctor, " in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["lightning", "lightning.pytorch"])
def test_train_without_its_extra_says_what_to_install(missing, monkeypatch, capsys):
    monkeypatch.setattr(cli, "import_module", lambda name: importing(missing))
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err == f"vssm train: {missing} is not installed; run: pip install 'vssm[train]'\n"


def test_a_missing_module_of_ours_is_a_bug_and_shows_as_one(monkeypatch):
    monkeypatch.setattr(cli, "import_module", lambda name: importing("vssm.tasks"))
    with pytest.raises(ModuleNotFoundError, match=r"vssm\.tasks"):
        cli.main(["train"])


def importing(name: str):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_models_lists_the_zoo(capsys):
    assert cli.main(["models", "vmamba_t*", "--pretrained"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["model", "task", "parameters"]
    assert [row.split()[0] for row in rows] == ["vmamba_tiny", "vmamba_tiny_s1l8", "vmamba_tiny_s2l5"]
    assert "82.6 %" in rows[0]


def test_models_for_tests_are_listed_where_they_are_asked_for(capsys):
    assert cli.main(["models", "--family", "vssd"]) == 0
    assert "test_vssd" not in capsys.readouterr().out
    assert cli.main(["models", "test_vs*"]) == 0
    assert "test_vssd" in capsys.readouterr().out


def test_models_that_do_not_exist_are_no_success(capsys):
    assert cli.main(["models", "resnet*"]) == 1
    assert "no model fits" in capsys.readouterr().out


def test_models_by_order_licence_and_size(capsys):
    """The filters of list_models, and GFLOPs where they are asked for."""
    argv = ["models", "vim_t*", "--scan", "hilbert", "--license", "permissive", "--params-below", "7.2e6", "--flops"]
    assert cli.main(argv) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert "GFLOPs" in header
    assert row.split() == ["vim_tiny", "classification", "7.1", "M", "1.82", "224×224", "76.1", "%", "top-1",
                           "apache-2.0", "apache-2.0", "arXiv:2401.09417"]  # fmt: skip
    assert cli.main(["models", "--scan", "spirals"]) == 2
    assert "did you mean spiral" in capsys.readouterr().err


def test_every_family_says_under_which_licence_its_code_is_published():
    from vssm.cli.models import code_license
    from vssm.models.variant import families

    licences = {family.__name__.rpartition(".")[2]: code_license(family) for family in families()}
    assert {"vmamba": "mit", "vssd": "none", "mambayolo": "agpl-3.0"}.items() <= licences.items()
    assert set(licences.values()) <= {"mit", "apache-2.0", "none", "agpl-3.0", "cc by-nc 4.0", "bsd-3-clause"}
