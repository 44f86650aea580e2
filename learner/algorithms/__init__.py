"""Losses, advantages and corrections: pure functions, tensors in, tensors and metrics out."""
