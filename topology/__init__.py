"""Distances, soft skeletons and persistent homology: what the losses stand on."""
