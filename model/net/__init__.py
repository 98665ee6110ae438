"""GPT-2: architecture, weight files, freezing, prompt format and sampling filters."""
