"""Step time, idle GPUs and throughput of a run on a cluster that one does not have yet.

    python tools/simulate_cluster.py CONFIG --rates RATES.toml --lengths FILE [--mean-length N] [--correlation R]
        [--nodes 1 8 128] [--vary KEY=A,B]... [--steps 200] [--output OUT]
    python tools/simulate_cluster.py --calibrate RUN [--rates-out RATES.toml]

The first simulates CONFIG, and every combination of what is varied, with the trainer's own budget, selection and packing;
`--vary algorithm.name=grpo,c3po --vary rollout.partial=false,true` are four runs. --lengths is a file with one response
length per line, or a run directory, whose groups are drawn. The second takes the rates from a run's metrics and lengths,
and says how well they give the run back. Writes OUT.json and OUT.png. docs/simulator.md says what is modelled.
"""
