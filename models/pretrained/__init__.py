"""Other people's names for our tensors: one short table per layout, and the engine that reads them both ways.

Pure: names and shapes, no files. A table is a list of (ours, theirs) with `{i}` for the layer; both sides store
the same values in the same shape.
"""
