"""Prefect tasks, one a stage, and the tracking of runs in MLflow."""
