"""Prompts answered with the experts of their task alone."""
