"""Other people's names for our tensors: a short table per layout, read both ways by the engine.

Pure: names, shapes and config fields, no files. A table is a list of (ours, theirs) with `{i}` for
the layer; both sides store the same values in the same shape, unless a third entry, an op, says how
one of theirs holds ours. A table of fields does the same for config.json.
"""
