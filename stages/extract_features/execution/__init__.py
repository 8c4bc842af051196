"""Execution of an extraction: jobs per shard, shared by workers, resumed and retried."""
