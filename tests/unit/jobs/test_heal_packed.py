"""What heal calls a packed student."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from moekit.errors import UnsupportedModel
from moekit.jobs.healing.sources import _refuse_untrainable


@pytest.mark.parametrize(
    ("settings", "called"),
    [({"format": "packed-experts"}, "moekit, packed-experts"), ({"quant_method": "fp8"}, "fp8")],
)
def test_a_packed_student_is_called_by_its_form(settings: dict[str, str], called: str) -> None:
    student = cast(Any, SimpleNamespace(config={"quantization_config": settings}, path=Path("small")))
    with pytest.raises(UnsupportedModel, match=rf"packed \({called}\)"):
        _refuse_untrainable(student)
