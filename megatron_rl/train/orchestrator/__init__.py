"""Rank 0: it collects groups, plans, and commands the other ranks and the servers."""
