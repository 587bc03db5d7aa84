"""Convert a Hugging Face directory to a Megatron distributed checkpoint: `megatron-rl convert --to megatron`.

python tools/convert_hf_to_megatron.py SRC DST [--dtype bfloat16] [--max-shard-size 5GB] [--dry-run] [--verify]
"""

import sys

from megatron_rl.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "megatron", *sys.argv[1:]]))
