"""Agents: programs of many turns that talk to the policy as to OpenAI's API, and what they had it say, token by token.

recording.py keeps the tokens, history.py finds which of them a request goes on with, requests.py and answers.py are
OpenAI's JSON, parsers.py finds tool calls and reasoning, trajectory.py answers one request after the other, gateway.py
is the HTTP server. host.py is the process that runs agents, agents.py this side of it, model.py what an agent gets to
ask with, and sampler.py makes groups of what agents did.
"""
