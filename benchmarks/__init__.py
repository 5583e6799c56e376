"""Measurements: what a POET layer costs beside the dense layer it replaces, and where the time goes."""
