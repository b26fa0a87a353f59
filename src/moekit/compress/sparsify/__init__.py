"""Which weights to zero: one file a method (`moekit methods sparsify`)."""
