"""What a bench of methods that leave fewer experts takes."""

from __future__ import annotations

import pytest

from moekit.anatomy.probe import Geometry
from moekit.bench.pruning.setting import default_entries
from moekit.errors import BadConfig

GEOMETRY = Geometry(8, 4, 2, 6, 0, True, False, False, True)


def test_merging_methods_take_part_where_they_are_named() -> None:
    named = default_entries(("reap", "random-groups"), {"random-groups": {"align": "none"}})
    assert [entry.name for entry in named] == ["random", "frequency", "reap", "random-groups"]
    assert named[-1].make(GEOMETRY).model_dump()["align"] == "none"
    assert "random-groups" not in {entry.name for entry in default_entries()}


def test_a_name_that_is_no_method_is_refused() -> None:
    with pytest.raises(BadConfig, match="no prune method"):
        default_entries(("nothing",))
