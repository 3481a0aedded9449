"""Which layers a rule means: roles, globs, regular expressions; and the errors of those that mean none."""

from __future__ import annotations

import re
from typing import Any

import pytest

from heedful import InvalidArgument
from heedful.rules import check_that_all_decide, deciding, rule

LAYERS = [
    ("unet.down_blocks.0.attn1", "self"),
    ("unet.down_blocks.0.attn2", "cross"),
    ("text_encoder.layers.0.self_attn", "text"),
    ("vae.mid_block.attentions.0", "vae"),
]


def meant(pattern: str) -> list[str]:
    return [path.partition(".")[0] + path[-1] for path, role in LAYERS if rule(pattern, None).means(path, role)]


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("self", ["unet1"]),
        ("text", ["text_encodern"]),
        ("vae", ["vae0"]),
        ("joint", []),
        ("*.attn2", ["unet2"]),
        ("unet.*", ["unet1", "unet2"]),
        ("unet", []),
        ("attn", []),
        ("*attn[12]", ["unet1", "unet2"]),
        ("re:attn", ["unet1", "unet2", "text_encodern"]),
        (r"re:^unet\..*\.attn[13]$", ["unet1"]),
        ("re:self", ["text_encodern"]),
    ],
)
def test_a_pattern_is_a_role_a_glob_over_the_path_or_an_expression_searched_in_it(pattern: str, paths: Any) -> None:
    assert meant(pattern) == paths


def test_the_first_rule_decides() -> None:
    first, second = rule("cross", "native"), rule("unet.*", "flex")
    assert deciding([first, second], *LAYERS[1]) is first
    assert deciding([first, second], *LAYERS[0]) is second
    assert deciding([first, second], *LAYERS[2]) is None
    assert (first.origin, rule("vae", None, "exclude").origin) == ("rule 'cross'", "exclude 'vae'")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (re.compile("attn1$"), r"write a regular expression as 're:attn1\$'"),
        ("re:attn(", "it is no regular expression: missing \\)"),
        ("", "give path patterns or roles, as strings"),
        (3, "rules: got 3"),
    ],
)
def test_what_is_no_pattern_is_an_error(pattern: Any, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        rule(pattern, None)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("*.atn2", r"it matches none of 4 layers; did you mean '\*\.attn2'"),
        ("unte.*", r"did you mean 'unet\.\*'\?"),
        ("text_encoder", r"did you mean 'text_encoder\.\*'"),
        ("re:.*attn3$", "did you mean|the first path is"),
        ("joint", r"the roles here are self \(1\), cross \(1\), text \(1\), vae \(1\)"),
        ("crss", "did you mean 'cross'"),
        ("nothing like it", "it matches none of 4 layers; the first path is 'unet.down_blocks.0.attn1'"),
    ],
)
def test_a_rule_that_decides_about_nothing_names_what_there_is(pattern: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        check_that_all_decide([rule(pattern, None)], LAYERS)


def test_a_rule_in_the_shadow_of_earlier_ones_is_an_error() -> None:
    check_that_all_decide([rule("cross", None), rule("unet.*", None)], LAYERS)
    with pytest.raises(InvalidArgument, match="exclude: got 'cross'; it matches only layers that an earlier rule"):
        check_that_all_decide([rule("unet.*", None), rule("cross", None, "exclude")], LAYERS)
