"""Scores of masks, as they are published, and what evaluate.py is made of."""
