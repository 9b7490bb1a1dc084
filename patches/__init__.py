"""Patches: read within a budget of memory, resampled and changed on the device."""
