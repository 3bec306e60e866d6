"""``python -m ndm.cli`` is ``ndm``."""

import sys

from ndm.cli.main import main

sys.exit(main())
