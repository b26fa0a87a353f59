"""How weights are rounded to few bits: one file a method (`moekit methods quantize`)."""
