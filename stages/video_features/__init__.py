"""Features of whole videos by a network that the user names, as FVD and its relatives use them."""
