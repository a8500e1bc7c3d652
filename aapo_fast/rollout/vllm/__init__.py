"""Rollouts by vLLM, with the policy's weights synced into it.

settings.py    how an engine is started: its arguments and environment
weights.py     what is sent: every parameter by its checkpoint name, tied heads explicitly
samples.py     what comes back: tokens and log-probabilities, checked
local.py       the engine in this process, over ...
adapter.py     ... vLLM's own
servers.py     the engine over servers: requests spread, weights synced, failed ones restarted
client.py      one server over HTTP
process.py     a server that we start; guard.py runs inside it
transport.py   how weights reach a server: as files
transfer.py    ... from GPU to GPU, by vLLM's own transfer; imports vllm, as adapter.py does, and no other file
"""
