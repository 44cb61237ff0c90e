"""Other people's names for our tensors: a short table per layout, read both ways by the engine.

Pure: names and shapes, no files. A table is a list of (ours, theirs) with `{i}` for the layer; both
sides store the same values in the same shape.
"""
