"""Teacher signals of a clip's subjects: tracking in both directions, quality, fusion, storage."""
