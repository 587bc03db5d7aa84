"""C3PO, the policy-optimization module. Where the paper's equations are (arXiv 2506.14731v2):

advantage.py   group-normalised advantage
budget.py      Eq. 3, the greedy selection of Psi with |Psi| = Phi, and how much more a rollout phase must sample
packing.py     micro-batches of a synchronous step
plan.py        the three together: scored samples in, `records.Plan` out
loss.py        Eq. 2 and the entropy term of Eq. 6

All but loss.py are functions of numbers and a seed, without torch, so the simulator calls the same code.
"""
