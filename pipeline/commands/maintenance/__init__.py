"""What each `cache` command does between its arguments and the printed answer."""
