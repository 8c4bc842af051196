"""The work itself: clips in, features, a trained student, videos out. `pipeline` drives it."""
