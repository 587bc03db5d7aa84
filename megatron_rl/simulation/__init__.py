"""A synchronous run on a cluster, step by step, without the cluster: the trainer's own scheduler over response lengths,
and rates that were measured or assumed for everything that takes time."""
