"""Fewer, smaller or merged experts: one engine, and a folder of methods for each way."""
