"""What several jobs do alike: opening models and text, estimating, proving, writing, checking."""
