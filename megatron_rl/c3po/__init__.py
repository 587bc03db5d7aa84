"""This package is C3PO, the policy optimization. Here is a reading guide, equation by equation (Ring-lite, arXiv
2506.14731v2):

    Eq. 1, the group-normalised advantage        advantage.py      group_advantages
    Eq. 2, the objective                         surrogate.py      clip: min(r A, clip(r) A) of a token
                                                 loss.py           policy_loss: the sum over Psi, with KL and entropy
        its denominator, the constant Phi        algorithms.py     normalise, "budget"
        its KL term                              kl.py             KL_ESTIMATORS
    Eq. 3, the selection of Psi, |Psi| = Phi     budget.py         selection_order, select
        Fig. 3, the cut of the crossing response budget.py         select, `cut`
        too few tokens: refill                   budget.py         Shortfall; surplus is carried: plan.py
        Phi divided over domains (not the paper) budget.py         apportion, select_by_domain; a Shortfall for each
    Eq. 6, entropy, balance and z loss           loss.py; megatron's router with model/router.py (a_bal, a_z of the
                                                 configuration's [moe])
    the synchronous step                         packing.py        micro-batches balanced between barriers
    all of it together                           plan.py           scored samples in, `records.Plan` out
    the gradient's scale, derived                train/step/trainer.py

What goes beyond the paper: correction.py (IcePop, KPop, truncated importance sampling) and the rivals in algorithms.py.
The readings taken where the paper is silent stand in the docstrings; what is sampled again is in rollout/sampler.py.

surrogate, kl, correction and loss are functions of tensors; everything else is of numbers and a seed, without torch, so
the simulator calls the same code.
"""
