"""How stage one's shards get done: shared among workers, resumed, retried; `extract` leads."""
