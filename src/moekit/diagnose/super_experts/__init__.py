"""Experts without which a model breaks: what finds them, and the proof by taking them out."""
