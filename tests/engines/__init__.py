"""What moekit writes, opened by other engines."""
