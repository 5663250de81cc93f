"""Losses as pure functions from tensors to a scalar."""
