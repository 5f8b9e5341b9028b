"""Every configuration shown in the how-to is valid, and its field mappings can work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tickmesh.control.config import Checks, parse_config
from tickmesh.node.fields import check_source

PAGE = Path(__file__).parents[1] / "docs/howto/add-a-source.md"
BLOCKS = [text for text in re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL) if not text.startswith("[project")]


@pytest.mark.parametrize("text", BLOCKS, ids=lambda text: text.split("]")[0].split(".")[-1])
def test_example_is_valid(text: str) -> None:
    parse_config(text, checks=Checks(source=check_source))


def test_there_are_examples() -> None:
    assert len(BLOCKS) == 13
