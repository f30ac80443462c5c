"""Runs in MLflow; nothing else imports it."""
