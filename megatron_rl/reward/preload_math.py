"""Imported once by the server that workers are forked from: each of them, a replacement too, starts warm."""

from megatron_rl.reward.math import warm_up

warm_up()
