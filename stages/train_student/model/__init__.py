"""The student transformer with its adapters and projector heads, and a batch's teacher."""
