"""Engines: how the deltas of a session are kept and trained."""
