"""The guide's command: python3 examples/llama/convert_checkpoint.py --model_dir M --output_dir C ..."""

import sys

from tensorwright.cli.main import convert_checkpoint

sys.exit(convert_checkpoint())
