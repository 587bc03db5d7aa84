"""This package simulates a synchronous run on a cluster, step by step. It uses the trainer's own scheduler over
response lengths, and measured or assumed rates for everything that takes time."""
