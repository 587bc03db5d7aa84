"""Compare two checkpoints of either kind tensor by tensor: `megatron-rl compare`.

python tools/verify_checkpoint.py A B [--tolerance 1e-6] [--text "1 + 1 ="]
"""

import sys

from megatron_rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
