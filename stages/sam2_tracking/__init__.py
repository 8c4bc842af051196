"""SAM2 as a batched tracker that visits the frames of a clip in a given order."""
