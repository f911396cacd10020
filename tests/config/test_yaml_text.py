"""YAML from elsewhere: read as PyYAML does, and refused before it costs time or memory."""

from __future__ import annotations

import time

import pytest
import yaml

from lora2serve.config.yaml_text import DEEPEST, LONGEST, MOST, compose_yaml, construct, front_matter, load_yaml

BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
TEXTS = (
    "", "a: 1\nb: [x, {y: 2026-01-01}]\n", "a: &a {b: 1}\nc:\n  <<: *a\n  d: *a\n", "- 1\n- ~\n", "x", "[" * 40 + "]" * 40,
)  # fmt: skip
REFUSED = {
    "nested": ("[" * 200_000, f"more than {DEEPEST} deep"),
    "nested keys": ("{a: " * 200_000, f"more than {DEEPEST} deep"),
    "nested lines": ("".join(" " * n + "a:\n" for n in range(200)), f"more than {DEEPEST} deep"),
    "anchors": (BOMB, f"more than {MOST} values"),
    "an anchor in itself": ("a: &a [*a]", "an anchor that holds itself"),
    "long": ("# " + "x" * LONGEST, f"expected {LONGEST} at most"),
    "a tag": ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "no date": ("a: 2026-13-41", "month must be in"),
    "a long number": ("a: " + "9" * 5000, "Exceeds the limit"),
    "no YAML": ("a: [", "expected the node content"),
    "two documents": ("a: 1\n---\nb: 2\n", "expected a single document"),
    "control characters": ("a: \x00", "special characters are not allowed"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_it_is_what_the_library_reads(text: str) -> None:
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_at_once(kind: str) -> None:
    """In one line, and far from the half a minute that the library takes for the first of them."""
    text, reason = REFUSED[kind]
    started = time.process_time()
    with pytest.raises(ValueError, match=reason) as caught:
        load_yaml(text)
    assert time.process_time() - started < 5
    assert "\n" not in str(caught.value)


def test_the_control() -> None:
    """The library takes the anchors, which stand for more values than there is memory."""
    assert len(yaml.safe_load(BOMB)["a11"]) == 9
    own = construct(compose_yaml("a: &a [*a]"))
    assert isinstance(own, dict) and own["a"][0] is own["a"], "which who reads by keys can take"


def test_the_head_of_a_card() -> None:
    assert front_matter("---\nlicense: mit\n---\n# A model\n---\n") == {"license": "mit"}
    assert front_matter("# A model\n---\na: 1\n---\n") == front_matter("") == front_matter("---\n\n---\n") == {}
    for wrong in ("---\n- a\n---\n", "---\na: [\n---\n", f"---\n{BOMB}---\n"):
        with pytest.raises(ValueError):
            front_matter(wrong)
