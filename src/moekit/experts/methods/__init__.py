"""Experts parts, one file each."""
