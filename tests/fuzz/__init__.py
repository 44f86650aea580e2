"""Damaged bytes for every decoder: a declared error comes out, or something that keeps every promise."""
