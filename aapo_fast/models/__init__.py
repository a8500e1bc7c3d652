"""Hugging Face causal language models: loading and saving, decoder and head, attention over packed rows."""
