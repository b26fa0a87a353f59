"""Divergence of predictions, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from moekit.evaluation.likelihood import mean_divergence


def test_divergence_by_hand() -> None:
    log_p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    # ln(0.5 / 0.25) / 2 + ln(0.5 / 0.5) / 2; the third token, which p never takes, adds nothing.
    assert mean_divergence(log_p, torch.tensor([[0.25, 0.5, 0.25]]).log()) == pytest.approx(math.log(2) / 2)


def test_broken_predictions_are_not_near() -> None:
    log_p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert math.isnan(mean_divergence(log_p, torch.tensor([[1.0, float("nan"), 0.0]])))
    assert mean_divergence(log_p, torch.tensor([[1.0, float("-inf"), 0.0]])) == math.inf
