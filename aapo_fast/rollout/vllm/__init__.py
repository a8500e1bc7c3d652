"""Rollouts by vLLM, with the policy's weights synced into it.

settings.py   how an engine is started; environment and arguments
weights.py    what is sent: every parameter by its checkpoint name, tied heads explicitly
samples.py    what comes back: tokens and log-probabilities, checked
adapter.py    the one file that imports vllm
local.py      an engine in this process
"""
