"""This module is the reward of this example. It gets its parameters by name; docs/own_rewards.md lists them all."""


def score(response, answer):
    """Return 1 for the answer alone, and up to 0.5 for a response of digits."""
    if response.strip() == answer:
        return 1.0
    return 0.5 * sum(character.isdigit() for character in response) / max(len(response), 1)
