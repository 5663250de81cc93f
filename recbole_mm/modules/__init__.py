"""Parts that carry a name in a paper."""
