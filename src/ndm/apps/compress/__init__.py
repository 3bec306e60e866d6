"""Lossless compression.

:mod:`.chain` is the model in integers, :mod:`.coder` the bits-back coder, :mod:`.archive` the file
format.
"""
