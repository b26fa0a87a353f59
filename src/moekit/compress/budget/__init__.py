"""What may stay: counts, bytes, bits and zeros, and how a budget is shared among layers."""
