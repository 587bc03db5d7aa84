"""Which distilled checkpoint reinforcement learning starts from: that whose policy has the right token entropy."""
