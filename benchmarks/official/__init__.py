"""Official code of papers beside moekit's, a module a repository; `benchmarks/official_code.py` runs them."""
