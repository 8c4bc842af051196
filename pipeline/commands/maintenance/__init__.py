"""The `cache` commands: from arguments to a `CommandResult`."""
