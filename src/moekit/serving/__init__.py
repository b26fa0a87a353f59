"""Serving a model: which experts a prompt needs."""
