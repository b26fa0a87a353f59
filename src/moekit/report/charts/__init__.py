"""Charts as SVG that takes its colours from the page's style, so that light, dark and print need no redrawing."""
