"""Generated tables: where they are written, and that those which need no measurement are there."""

import pytest

from bench import documents


@pytest.mark.parametrize("name", documents.computed())
def test_documents_hold_what_the_scripts_say(name):
    """`python -m bench.documents` makes it so again."""
    text = documents.BENCHMARKS.read_text(encoding="utf-8")
    assert documents.replace_block(text, name, documents.computed()[name]) == text


def test_only_a_block_is_replaced():
    text = "a\n<!-- x:start -->\nold\n<!-- x:end -->\nb <!-- y:start --><!-- y:end -->"
    assert documents.replace_block(text, "x", "new") == text.replace("old", "new")


def test_a_block_that_is_missing_is_named():
    with pytest.raises(ValueError, match="has no <!-- x:start -->"):
        documents.replace_block("<!-- x:end -->", "x", "new")
