"""What is done to stores that exist: checking, mending, changing, growing and moving them."""
