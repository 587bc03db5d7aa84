"""Convert a Megatron distributed checkpoint, or any step of a run, to a Hugging Face directory: `megatron-rl convert
--to hf`.

python tools/convert_megatron_to_hf.py SRC DST [--dtype bfloat16] [--max-shard-size 5GB] [--dry-run] [--verify]
"""

import sys

from megatron_rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "hf", *sys.argv[1:]]))
