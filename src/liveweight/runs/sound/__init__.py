"""Recordings, their features and noise."""
