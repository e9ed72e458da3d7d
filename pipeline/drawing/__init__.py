"""Everything that is drawn or laid out, each once: palettes, figures, boxes on images, tables.

Arrays and texts in, PIL images, PNG bytes and lines out. Nothing here reads a file, runs a model or
knows what the numbers mean; pictures of one kind of result stand with that result, and use this.
"""
