"""Which experts become one, and how: one file a method (`moekit methods merge`)."""
