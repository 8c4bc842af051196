"""Pictures of a store: frames, feature colours, implied flow."""
