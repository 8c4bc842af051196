"""What a training looks at besides its own losses: held-out clips, and videos drawn on the way."""
