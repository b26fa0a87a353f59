"""Ranks come together, agree, watch each other and end: bounded in time everywhere."""
