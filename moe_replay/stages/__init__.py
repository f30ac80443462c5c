"""The stages of an iteration: functions from committed artifacts to committed artifacts."""
