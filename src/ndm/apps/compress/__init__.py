"""Lossless compression: :mod:`.chain` is the model in whole numbers, :mod:`.coder` bits-back
coding, :mod:`.archive` the file format.
"""
