"""Clusters of experts and of neurons."""
