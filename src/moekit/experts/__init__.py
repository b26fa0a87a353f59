"""Experts parts: how a layer's experts are computed, or what answers in their place."""
