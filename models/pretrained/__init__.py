"""Checkpoints: load, save and exchange weights with transformers, nanoVLM and the Hub.

`layouts/` has one module per published format: tables of parameter names and config fields, no I/O.
`mapping.py` applies a table in either direction; `load.py` and `save.py` do so with files.
"""
