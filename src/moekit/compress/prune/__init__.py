"""Which experts to drop: one file a method (`moekit methods prune`)."""
