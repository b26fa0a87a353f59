"""Neurons of experts: matched, aligned, merged, recombined."""
