"""The stages of `moekit fit`: what is asked for, what recipes cost, which plan is best, and the model that it makes."""
