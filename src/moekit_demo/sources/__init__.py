"""Where the demo's text, questions and model come from: one file a source, each with its `SOURCES`."""
