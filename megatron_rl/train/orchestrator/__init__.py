"""Contains rank 0's work: it collects groups, plans, and commands the other ranks and the servers."""
