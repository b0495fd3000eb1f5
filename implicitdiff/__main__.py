"""``python -m implicitdiff``: see `implicitdiff.tools.command_line`."""

import sys

from implicitdiff.tools.command_line import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
