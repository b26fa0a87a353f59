"""Clustering and neuron maths that several methods share."""
