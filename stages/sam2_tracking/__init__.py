"""SAM2 and its relatives as a batched tracker that visits a clip's frames in a given order."""
