"""Generate text with an engine: the same as `tensorwright run`."""

import sys

from tensorwright.cli.main import run

sys.exit(run())
