"""`python -m tensorwright`: the same as the command `tensorwright`."""

from __future__ import annotations

import sys

from tensorwright.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
