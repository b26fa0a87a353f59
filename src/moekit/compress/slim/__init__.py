"""How experts are made narrower: one file a method (`moekit methods slim`)."""
