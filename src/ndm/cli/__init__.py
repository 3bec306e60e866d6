"""The command line: :mod:`ndm.cli.main` and one module per command."""
