"""SAM2 as a batched tracker that runs through a clip in a given order of frames."""
