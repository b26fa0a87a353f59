"""How a mean number of bits is shared among experts: one file a way (`moekit methods sharer`)."""
