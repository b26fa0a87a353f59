"""Jobs: what moekit does from beginning to end; a recipe's step, a command and a Python call run the same function."""
