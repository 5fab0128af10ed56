"""``python -m poodle_lightning`` is the same as ``poodle-lightning``."""

import sys

from poodle_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
