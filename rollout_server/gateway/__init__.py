"""An OpenAI-compatible endpoint in front of the engine, for agents that drive their episodes themselves.

Every call belongs to a session, and every token that a session samples is kept with its evidence (recorder.py).
"""
