"""Volumes of every format, raw files and case files."""
