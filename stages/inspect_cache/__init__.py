"""Images and videos of stored clips: frames, features as colours, implied flow, masks."""
