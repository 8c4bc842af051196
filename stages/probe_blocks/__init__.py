"""How well each transformer block's tokens agree with the cached teacher, before training."""
