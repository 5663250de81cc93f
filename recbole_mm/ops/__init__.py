"""Pure functions on tensors; torch is all they know."""
