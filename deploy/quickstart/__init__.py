"""The quickstart: the demo run from nothing to a picture."""
