"""Artifacts in object storage: written once, committed by one last object, verified when read."""
