"""Parts of the job that heals: models that belong together, texts, what the teacher says, the proof."""
