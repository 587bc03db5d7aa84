"""Warms up the server that workers are forked from, which imports it once: each worker, a replacement too, starts
warm."""

from megatron_rl.reward.math import warm_up

warm_up()
