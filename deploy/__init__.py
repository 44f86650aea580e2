"""Launching, installing and operating: everything around the two services."""
