"""The checks to make when a GPU is at hand for minutes: one command, in the order of worth."""
