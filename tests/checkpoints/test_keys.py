"""Key rules: each does what it says, and its inverse undoes it."""

from __future__ import annotations

import pytest
import torch
from toy import KEYS, VARIANTS

from vssm.models.keys import (
    also,
    drop,
    published_shapes,
    rename,
    reshape,
    shapes_of,
    split,
    stack,
    to_ours,
    to_published,
)

RULES = [  # rule, published shapes, our shapes
    (rename(r"^layers\.(\d+)\.(\d+)\.", r"stages.\1.b.\2."), {"layers.1.0.D": (3,)}, {"stages.1.b.0.D": (3,)}),
    (rename(r"\.(a|b)\.w$", r".w_\1"), {"x.a.w": (1,), "x.b.w": (2,)}, {"x.w_a": (1,), "x.w_b": (2,)}),
    (rename(r"^(\d)-(\d)\.", r"\2+\1."), {"1-2.w": (1,)}, {"2+1.w": (1,)}),
    (stack(("D", "D_b"), "D"), {"m.D": (3,), "m.D_b": (3,)}, {"m.D": (2, 3)}),
    (stack(("p.weight", "p_b.weight"), "p"), {"p.weight": (4, 3), "p_b.weight": (4, 3)}, {"p": (2, 4, 3)}),
    (split("xz", ("x", "z")), {"m.xz": (5, 3)}, {"m.x": (2, 3), "m.z": (3, 3)}),
    (split("xz", ("x", "z"), dim=1), {"m.xz": (3, 5)}, {"m.x": (3, 2), "m.z": (3, 3)}),
    (reshape(r"A$", "(k d) n -> k d n"), {"A": (6, 4)}, {"A": (2, 3, 4)}),
    (reshape(r"\.(A|D)$", "(k d) ... -> k d ..."), {"m.A": (6, 4), "m.D": (6,)}, {"m.A": (2, 3, 4), "m.D": (2, 3)}),
    (reshape(r"conv$", "k d 1 w -> k d w"), {"conv": (2, 3, 1, 4)}, {"conv": (2, 3, 4)}),
]


@pytest.mark.parametrize(("rule", "published", "ours"), RULES, ids=[str(rule[1]) for rule in RULES])
def test_a_rule_and_its_inverse(rule, published, ours):
    """The rule makes these entries of those, and the inverse gives back every value."""
    state = {key: torch.randn(shape) for key, shape in published.items()}
    translated = to_ours(state, [rule], ours)
    assert {key: tuple(value.shape) for key, value in translated.items()} == ours
    assert published_shapes(ours, [rule]) == published
    back = to_published(translated, [rule])
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_every_kind_of_rule_together():
    """A whole family's rules round-trip, in whatever order the file lists its entries."""
    model = VARIANTS[0].build()
    state, shapes = model.state_dict(), shapes_of(model)
    published = to_published(state, KEYS)
    assert published["layers.0.0.op.A_logs"].shape == (8, 3)
    back = to_ours(dict(reversed(published.items())), KEYS, shapes)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_other_names_and_layouts_are_understood_and_never_written():
    """``also`` and ``drop`` act on loading alone."""
    rules = [also(rename(r"^old\.", "new.")), also(reshape(r"weight$", "o i 1 1 -> o i")), drop(r"^table$")]
    ours = {"new.weight": (3, 2)}
    old = {"old.weight": torch.randn(3, 2, 1, 1), "table": torch.zeros(5)}
    assert {key: tuple(value.shape) for key, value in to_ours(old, rules, ours).items()} == ours
    assert published_shapes(ours, rules) == ours


def test_what_a_rule_cannot_do_stays_under_its_name():
    """Half a stack, and sizes that do not divide, are left for the report."""
    state = {"m.D": torch.zeros(3), "xz": torch.zeros(4, 3), "A": torch.zeros(4, 4)}
    rules = [stack(("D", "D_b"), "D"), split("xz", ("x", "z")), reshape("A", "(k d) n -> k d n")]
    ours = {"m.D": (2, 3), "x": (2, 3), "z": (3, 3), "A": (2, 3, 4)}
    assert {key: tuple(value.shape) for key, value in to_ours(state, rules, ours).items()} == {
        "m.D": (3,), "xz": (4, 3), "A": (4, 4),
    }  # fmt: skip


def test_two_entries_under_one_name_are_an_error():
    """A file that mixes old and new names would lose one of them."""
    state = {"old.w": torch.zeros(1), "new.w": torch.ones(1)}
    with pytest.raises(ValueError, match=r"both become 'new\.w'"):
        to_ours(state, [also(rename(r"^old\.", "new."))], {"new.w": (1,)})


@pytest.mark.parametrize("pattern", ["a.b", r"a\d", "a+", "(?:a)(b)", "(a)(b)"])
def test_a_rename_without_an_inverse_is_refused(pattern):
    """A bare dot would match anything on the way back."""
    with pytest.raises(ValueError, match="no derived inverse"):
        rename(pattern, r"x\1")


def test_a_reshape_leaves_alone_what_has_another_size_than_one():
    """Other families' tensors meet our rules when the loader guesses what a file looks like."""
    state = {"D": torch.zeros(2, 32)}
    assert reshape("D", "d -> 1 d").to_published(state)["D"].shape == (2, 32)


def test_a_reshape_keeps_the_order_of_axes():
    """It is no permutation."""
    with pytest.raises(ValueError, match="same axes in the same order"):
        reshape("A", "(k d) n -> d k n")
