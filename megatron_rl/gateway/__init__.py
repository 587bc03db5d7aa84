"""Lets agents, which are programs of many turns, talk to the policy as to OpenAI's API, and records what they had it
say, token by token.

gateway.py is the HTTP server, requests.py and answers.py are OpenAI's JSON. trajectory.py answers the requests of one
agent: history.py finds what they go on with, chat_tokens.py and parsers.py are between texts and tokens, policy.py asks
the servers, recording.py keeps the tokens and turn_journal.py has them over kills.

host.py is the process that runs agents (agent_process.py: one of them), protocol.py what it is told, agents.py the
run's side of it, and model.py what an agent's function gets to ask with. sampler.py makes groups of what agents did.
"""
