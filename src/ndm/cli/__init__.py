"""The command line: a file a command, and :mod:`ndm.cli.main`."""
