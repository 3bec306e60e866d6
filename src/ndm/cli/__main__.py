"""``python -m ndm.cli`` runs ``ndm``."""

import sys

from ndm.cli.main import main

sys.exit(main())
