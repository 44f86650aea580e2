"""The demo run: a small task and a small model, made on the spot, so that the whole loop runs on a laptop."""
