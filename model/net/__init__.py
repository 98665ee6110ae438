"""GPT-2 itself: architecture, raw weights, the freeze, the prompt format and sampling."""
