"""Leases, replay queue and membership: pure rules in core.py, sockets and clock around them in service.py."""
