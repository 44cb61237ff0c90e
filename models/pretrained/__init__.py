"""Checkpoints: load, save and exchange weights with transformers, nanoVLM and the Hub.

`layouts/` holds one table per published format: parameter names, shapes and config fields, no I/O.
`mapping.py` applies a table in either direction; `load.py` and `save.py` do so with files.
"""
