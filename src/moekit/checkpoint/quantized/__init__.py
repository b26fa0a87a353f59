"""Quantized weights, read back as floats: one file a format, a row each in `registry`.

Nothing is quantized here, and nothing is computed in eight or four bits: a layer's numbers are taken out of their
packing as they are read from disk, so that whatever looks at full precision can look at a quantized checkpoint.
"""
