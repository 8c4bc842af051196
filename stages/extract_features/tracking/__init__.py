"""SAM2 driven frame by frame: loaded, fed, and asked for its features; `two_way_tracking` leads."""
